"""Artifacts: complete or not there, whatever happens to the process that builds them."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shared.files import (
    MANIFEST,
    ArtifactError,
    free_gb,
    publish,
    read_manifest,
    require_free_space,
    stale_reason,
    sweep,
    write_atomically,
)

ROOT = Path(__file__).parents[1]
# Writes half of an artifact, says so and waits to be killed (or, when its input ends, leaves).
HALF = """
import sys
from pathlib import Path
from shared.files import publish
with publish(Path(sys.argv[1]), settings={}, made_from={}) as draft:
    (draft.path / "a.txt").write_text("half")
    print("half", flush=True)
    sys.stdin.read()
    draft.discard = True
"""


def make(target: Path, text: str, *, settings: dict[str, object] | None = None, origin: str = "o") -> None:
    with publish(target, settings=settings or {}, made_from={"corpus": origin}) as draft:
        (draft.path / "inside").mkdir()
        (draft.path / "inside" / "a.txt").write_text(text)
        (draft.path / "b.txt").write_text("b")
        draft.rows = 1


def content(target: Path) -> str:
    read_manifest(target, verify=True)
    return (target / "inside" / "a.txt").read_text()


def half_builder(target: Path) -> "subprocess.Popen[str]":
    """A process that holds a half-built artifact."""
    process = subprocess.Popen(
        [sys.executable, "-c", HALF, str(target)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def leftovers(target: Path) -> list[str]:
    """What lies beside the artifact, apart from its lock and its current version."""
    known = {target.name, f".{target.name}.lock", target.resolve().name}
    return sorted({path.name for path in target.parent.iterdir()} - known)


def test_a_published_artifact_reads_back_with_its_manifest(tmp_path: Path) -> None:
    make(tmp_path / "corpus", "one", settings={"shard": 4}, origin="x")
    manifest = read_manifest(tmp_path / "corpus", verify=True)
    assert (manifest.artifact, manifest.rows) == ("corpus", 1)
    assert sorted(manifest.files) == ["b.txt", "inside/a.txt"]
    assert (manifest.settings, manifest.made_from) == ({"shard": 4}, {"corpus": "x"})
    assert content(tmp_path / "corpus") == "one"


def test_the_same_content_has_the_same_identity_and_any_change_another(tmp_path: Path) -> None:
    def identity(folder: str, text: str, origin: str) -> str:
        make(tmp_path / folder / "a", text, origin=origin)
        return read_manifest(tmp_path / folder / "a").identity

    first = identity("1", "one", "x")
    assert identity("2", "one", "x") == first
    assert first not in (identity("3", "two", "x"), identity("4", "one", "y"))


def test_a_new_version_replaces_the_old_one_and_leaves_nothing_behind(tmp_path: Path) -> None:
    make(tmp_path / "a", "one")
    make(tmp_path / "a", "two")
    assert content(tmp_path / "a") == "two"
    assert leftovers(tmp_path / "a") == []


def test_an_exception_while_building_leaves_the_old_version(tmp_path: Path) -> None:
    target = tmp_path / "a"
    make(target, "one")
    with pytest.raises(ZeroDivisionError), publish(target, settings={}, made_from={}) as draft:  # noqa: PT012
        (draft.path / "a.txt").write_text("half")
        raise ZeroDivisionError
    assert content(target) == "one"
    assert leftovers(target) == []


def test_an_exception_in_the_first_build_leaves_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), publish(tmp_path / "a", settings={}, made_from={}):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    assert leftovers(tmp_path / "a") == []


def test_a_discarded_draft_leaves_the_old_version(tmp_path: Path) -> None:
    make(tmp_path / "a", "one")
    with publish(tmp_path / "a", settings={}, made_from={}) as draft:
        draft.discard = True
    assert content(tmp_path / "a") == "one"


def test_a_killed_builder_leaves_the_old_version_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "a"
    make(target, "one")
    builder = half_builder(target)
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    assert content(target) == "one"
    assert leftovers(target) == [".a.building"]
    make(target, "two")
    assert content(target) == "two"
    assert leftovers(target) == []


def test_a_second_builder_is_told_that_another_one_is_at_work(tmp_path: Path) -> None:
    builder = half_builder(tmp_path / "a")
    try:
        with pytest.raises(ArtifactError, match=r"another process is building .*/a; wait for it or stop it"):
            make(tmp_path / "a", "two")
    finally:
        end(builder)


def test_a_second_builder_that_waits_comes_next(tmp_path: Path) -> None:
    target = tmp_path / "a"
    builder = half_builder(target)
    entered, finished = threading.Event(), threading.Event()

    def wait_and_build() -> None:
        entered.set()
        with publish(target, settings={}, made_from={}, wait=True) as draft:
            (draft.path / "a.txt").write_text("second")
        finished.set()

    second = threading.Thread(target=wait_and_build)
    try:
        second.start()
        assert entered.wait(10)
        assert not finished.wait(0.2)
        assert not target.exists()
        assert builder.stdin is not None
        builder.stdin.close()  # lets the first one leave
        assert finished.wait(10)
    finally:
        builder.kill()
        builder.wait()
        assert builder.stdout is not None
        builder.stdout.close()
        second.join()
    assert (target / "a.txt").read_text() == "second"


def test_builders_of_different_artifacts_do_not_wait_for_each_other(tmp_path: Path) -> None:
    builder = half_builder(tmp_path / "a")
    try:
        make(tmp_path / "b", "one")
    finally:
        end(builder)
    assert content(tmp_path / "b") == "one"


def test_building_sweeps_only_its_own_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".ab.building").mkdir()
    make(tmp_path / "a", "one")
    assert (tmp_path / ".ab.building").is_dir()


def test_a_missing_artifact_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected the artifact .*/a, found none; run the stage that makes it"):
        read_manifest(tmp_path / "a")


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    make(tmp_path / "a", "one")
    (tmp_path / "a" / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="found none"):
        read_manifest(tmp_path / "a")


def test_a_deleted_file_is_named(tmp_path: Path) -> None:
    make(tmp_path / "a", "one")
    (tmp_path / "a" / "inside" / "a.txt").unlink()
    with pytest.raises(ArtifactError, match=r"/a lacks the file inside/a\.txt of its manifest; make it again"):
        read_manifest(tmp_path / "a")


def test_an_edited_file_is_named_by_the_reader_that_verifies(tmp_path: Path) -> None:
    make(tmp_path / "a", "one")
    (tmp_path / "a" / "inside" / "a.txt").write_text("two")
    read_manifest(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"inside/a\.txt does not have the content its manifest names"):
        read_manifest(tmp_path / "a", verify=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"artifact": "a", "surprise": 1}', "7", "null"])
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, text: str) -> None:
    make(tmp_path / "a", "one")
    (tmp_path / "a" / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="is not a manifest"):
        read_manifest(tmp_path / "a")


def test_another_format_is_expected_and_found(tmp_path: Path) -> None:
    make(tmp_path / "a", "one")
    path = tmp_path / "a" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ArtifactError, match="has format 99, expected 2; make it again"):
        read_manifest(tmp_path / "a")


def test_what_makes_an_artifact_stale_is_named(tmp_path: Path) -> None:
    target, settings, origin = tmp_path / "a", {"model": "m", "rows": 4, "folder": Path("x")}, {"corpus": "c"}
    assert "found none" in (stale_reason(target, settings=settings, made_from=origin) or "")
    make(target, "one", settings=settings, origin="c")
    assert stale_reason(target, settings=settings, made_from=origin) is None
    changed = {"model": "other", "folder": Path("x"), "new": 1}
    assert stale_reason(target, settings=changed, made_from=origin) == "changed settings: model, new, rows"
    assert stale_reason(target, settings=settings, made_from={"corpus": "d"}) == "changed inputs: corpus"
    assert stale_reason(target, settings=settings, made_from={}) == "changed inputs: corpus"
    (target / "b.txt").unlink()
    assert "lacks the file b.txt" in (stale_reason(target, settings=settings, made_from=origin) or "")


def test_too_little_disk_is_refused_with_found_expected_and_remedy(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet", 0.0)
    free = free_gb(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        require_free_space(tmp_path / "not" / "yet", free + 1000)
    assert "GB of free disk, expected at least" in str(caught.value)
    assert "DRZERO_STORAGE__MIN_FREE_GB" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_single_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.json"
    write_atomically(path, "one")
    before = path.stat().st_ino
    write_atomically(path, "two — ü")
    assert path.read_text(encoding="utf-8") == "two — ü"
    assert path.stat().st_ino != before
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]


def test_what_a_killed_writer_has_left_is_gone_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    (tmp_path / ".state.json.new").write_text("hal")
    write_atomically(path, "whole", alone=True)
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"state.json": "whole"}


def test_what_a_killed_builder_has_left_is_swept_and_what_is_published_stays(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    sweep(target)
    sweep(tmp_path / "no folder" / "weights")
    with publish(target, settings={}, made_from={}):
        pass
    current = target.resolve()
    for name in (".weights.0123456789ab.17", ".weights.building", "weights.other"):
        (tmp_path / name).mkdir()
    sweep(target)
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == {target, current, tmp_path / "weights.other"}
