"""A journal: what it has is not made again, whatever a kill has left of its last line."""

import asyncio
import json
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


@given(cut=st.integers(1, 300), again=st.integers(0, 300))
def test_a_journal_cut_off_twice_still_has_every_item_once(cut: int, again: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "work.jsonl"
        whole = run(file, NAMES, [])
        for size in (cut, again):
            written = file.read_bytes()
            file.write_bytes(written[: max(0, len(written) - size)])
            run(file, NAMES, [])
        assert run(file, NAMES, []) == whole
        lines = file.read_text(encoding="utf-8").split("\n")
        assert sorted(json.loads(line)["name"] for line in lines if line) == NAMES


def test_a_whole_journal_is_read_and_not_written(tmp_path: Path) -> None:
    file = tmp_path / "work.jsonl"
    rows = run(file, NAMES, [])
    before, made = file.read_bytes(), list[str]()
    assert run(file, NAMES, made) == rows
    assert (file.read_bytes(), made) == (before, [])


def test_more_names_than_before_make_only_the_new_ones(tmp_path: Path) -> None:
    file, made = tmp_path / "work.jsonl", list[str]()
    run(file, NAMES[:2], [])
    assert [row["name"] for row in run(file, NAMES, made)] == NAMES
    assert made == NAMES[2:]


@given(text=st.text(st.characters(codec="utf-8")))
def test_a_journal_gives_back_any_text(text: str) -> None:
    async def work(_: str) -> Row:
        return {"text": text}

    async def one(file: Path) -> list[Row]:
        with Progress("test", Settings()) as progress:
            return await journalled(file, ["a", "b"], work, at_once=1, progress=progress)

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "work.jsonl"
        assert asyncio.run(one(file)) == [{"name": name, **row} for name, row in read_journal(file).items()]
        assert read_journal(file) == {"a": {"text": text}, "b": {"text": text}}


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


def test_an_error_cancels_what_is_being_made_and_begins_nothing_more(tmp_path: Path) -> None:
    begun: list[str] = []
    cancelled: list[str] = []

    async def work(name: str) -> Row:
        begun.append(name)
        if name == NAMES[1]:
            raise RuntimeError(name)
        try:
            await asyncio.Event().wait()  # for ever
        except asyncio.CancelledError:
            cancelled.append(name)
            raise
        return {}

    async def all_of_them() -> None:
        with Progress("test", Settings()) as progress:
            await journalled(tmp_path / "work.jsonl", NAMES, work, at_once=2, progress=progress)

    with pytest.raises(RuntimeError, match=NAMES[1]):
        asyncio.run(asyncio.wait_for(all_of_them(), 10))
    assert begun[:2] == NAMES[:2]
    assert cancelled == [name for name in begun if name != NAMES[1]]
    assert read_journal(tmp_path / "work.jsonl") == {}


@pytest.mark.parametrize("at_once", [1, 3, 10])
def test_no_more_are_made_at_once_than_told(tmp_path: Path, at_once: int) -> None:
    running = [0]
    most = [0]

    async def work(_: str) -> Row:
        running[0] += 1
        most[0] = max(most[0], running[0])
        for _turn in range(5):
            await asyncio.sleep(0)
        running[0] -= 1
        return {}

    async def all_of_them() -> None:
        with Progress("test", Settings()) as progress:
            await journalled(tmp_path / "work.jsonl", NAMES, work, at_once=at_once, progress=progress)
            assert progress.done == len(NAMES)

    asyncio.run(all_of_them())
    assert most[0] == min(at_once, len(NAMES))


def test_another_key_begins_anew_and_the_same_goes_on(tmp_path: Path) -> None:
    folder = open_journal(tmp_path / "journal", "one")
    run(folder / "work.jsonl", NAMES, [])
    assert read_journal(open_journal(folder, "one") / "work.jsonl")
    assert not read_journal(open_journal(folder, "two") / "work.jsonl")
