"""Kept files on a drive and back: what comes back is what was there, and nobody else's files are touched."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from shared.command import UsageError
from shared.drive_copy import SAVED, differs, found, read_saved, restore, save
from shared.files import ArtifactError, publish, read_manifest


def make(target: Path, text: str) -> str:
    """Publish an artifact of one file; returns its identity."""
    with publish(target, settings={"text": text}, made_from={}) as draft:
        (draft.path / "part").mkdir()
        (draft.path / "part" / "text.txt").write_text(text, encoding="utf-8")
    return read_manifest(target).identity


def tree(folder: Path) -> dict[str, str]:
    """What a folder holds, links by what they point to."""
    now = found(folder)
    return {**{name: (folder / name).read_text(encoding="utf-8") for name in now.files}, **dict(now.links)}


@limits(deadline=None, max_examples=20)
@given(texts=st.lists(st.text(max_size=5), min_size=1, max_size=3))
def test_what_was_saved_last_comes_back_with_its_links(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    place = tmp_path_factory.mktemp("drive")
    data, drive, other = place / "data", place / "drive", place / "other"
    for text in texts:
        make(data / "runs" / "a" / "weights", text)
        make(data / "corpus", text[::-1])
        (data / "serving.json").write_text(json.dumps(text), encoding="utf-8")
        save(data, drive)
    restore(read_saved(drive), other, drive)
    assert tree(other) == tree(data)
    for name in ("corpus", "runs/a/weights"):
        assert read_manifest(other / name, verify=True) == read_manifest(data / name)
    make(other / "corpus", "and it is an artifact as any other")


def test_a_drive_holds_no_link_lock_or_draft(tmp_path: Path) -> None:
    data, drive = tmp_path / "data", tmp_path / "drive"
    make(data / "corpus", "a")
    (data / ".index.building").mkdir()
    (data / ".index.building" / "half").touch()
    save(data, drive)
    names = [str(path.relative_to(drive)) for path in drive.rglob("*") if path.is_file() or path.is_symlink()]
    version = (data / "corpus").readlink()
    assert sorted(names) == [f"{version}/manifest.json", f"{version}/part/text.txt", SAVED]
    assert not any(path.is_symlink() for path in drive.rglob("*"))


def test_a_second_save_copies_only_what_is_new_and_removes_what_is_superseded(tmp_path: Path) -> None:
    data, drive = tmp_path / "data", tmp_path / "drive"
    make(data / "corpus", "a")
    make(data / "index", "b")
    assert save(data, drive) == 4
    assert save(data, drive) == 0
    old = drive / (data / "index").readlink() / "part" / "text.txt"
    make(data / "index", "c")
    assert old.is_file()
    assert save(data, drive) == 2
    assert not old.exists()


def test_files_that_were_not_saved_from_here_stay(tmp_path: Path) -> None:
    data, drive = tmp_path / "data", tmp_path / "drive"
    make(data / "corpus", "a")
    drive.mkdir()
    (drive / "thesis.txt").write_text("mine")
    save(data, drive)
    make(data / "corpus", "b")
    save(data, drive)
    assert (drive / "thesis.txt").read_text() == "mine"


def test_a_save_that_was_killed_leaves_a_drive_that_restores_what_was_before(tmp_path: Path) -> None:
    data, drive = tmp_path / "data", tmp_path / "drive"
    make(data / "corpus", "a")
    save(data, drive)
    make(data / "corpus", "b")
    later = found(data)
    (drive / later.files[0]).parent.mkdir(parents=True)
    (drive / f"{later.files[0]}.part").write_text("half of it")
    restore(read_saved(drive), tmp_path / "other", drive)
    assert (tmp_path / "other" / "corpus" / "part" / "text.txt").read_text() == "a"


def test_a_drive_with_artifacts_that_are_not_here_is_not_written_over(tmp_path: Path) -> None:
    data, drive, fresh = tmp_path / "data", tmp_path / "drive", tmp_path / "fresh"
    make(data / "corpus", "a")
    save(data, drive)
    make(fresh / "index", "b")
    before = tree(drive)
    with pytest.raises(UsageError, match=r"has artifacts that .*fresh lacks \(corpus\).* restore first"):
        save(fresh, drive)
    assert tree(drive) == before


def test_a_copy_is_made_again_when_its_original_is_newer_or_of_another_size(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("aa")
    assert differs(source, target)
    target.write_text("bb")
    os.utime(source, (1, 1))
    assert not differs(source, target)
    os.utime(target, (0, 0))
    assert differs(source, target)
    os.utime(target, (2, 2))
    target.write_text("b")
    assert differs(source, target)


def test_a_file_that_the_drive_has_lost_is_named_by_the_artifact(tmp_path: Path) -> None:
    data, drive = tmp_path / "data", tmp_path / "drive"
    make(data / "corpus", "a")
    save(data, drive)
    (lost,) = drive.rglob("text.txt")
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=r"text\.txt"):
        restore(read_saved(drive), tmp_path / "other", drive)
    with pytest.raises(ArtifactError, match="expected the artifact"):
        read_manifest(tmp_path / "other" / "corpus")
