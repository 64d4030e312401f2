"""A journal: what it has is not made again, whatever a kill has left of its last line."""

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.journal import Row, journalled, open_journal, read_journal
from shared.progress import Progress
from shared.settings import Settings

NAMES = [f"item {number}" for number in range(6)]


def run(file: Path, names: Sequence[str], made: list[str], *, fails: str = "") -> list[Row]:
    """The rows of a journal whose work notes what it makes."""

    async def work(name: str) -> Row:
        await asyncio.sleep(0)
        if name == fails:
            raise RuntimeError(f"{name} cannot be made")
        made.append(name)
        return {"length": len(name), "text": "é\n"}

    async def all_of_them() -> list[Row]:
        with Progress("test", Settings()) as progress:
            return await journalled(file, names, work, at_once=2, progress=progress)

    return asyncio.run(all_of_them())


@given(cut=st.integers(0, 300))
def test_a_journal_cut_off_anywhere_makes_the_rest_and_nothing_twice(cut: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "work.jsonl"
        whole = run(file, NAMES, [])
        written = file.read_bytes()
        file.write_bytes(written[: len(written) - cut])
        complete = file.read_bytes().count(b"\n")
        made: list[str] = []
        assert run(file, NAMES, made) == whole
        assert len(made) == len(NAMES) - complete
        assert read_journal(file).keys() == set(NAMES)


def test_rows_come_in_the_order_of_their_names_whatever_was_made_first(tmp_path: Path) -> None:
    file = tmp_path / "work.jsonl"
    run(file, NAMES[3:], [])
    assert [row["name"] for row in run(file, NAMES, [])] == NAMES


def test_the_first_error_ends_the_work_and_what_was_made_stays(tmp_path: Path) -> None:
    file = tmp_path / "work.jsonl"
    made: list[str] = []
    with pytest.raises(RuntimeError, match="item 3 cannot be made"):
        run(file, NAMES, made, fails="item 3")
    kept = set(read_journal(file))
    assert kept == set(made)
    again: list[str] = []
    run(file, NAMES, again)
    assert set(again) == set(NAMES) - kept


def test_another_key_begins_anew_and_the_same_goes_on(tmp_path: Path) -> None:
    folder = open_journal(tmp_path / "journal", "one")
    run(folder / "work.jsonl", NAMES, [])
    assert read_journal(open_journal(folder, "one") / "work.jsonl")
    assert not read_journal(open_journal(folder, "two") / "work.jsonl")
