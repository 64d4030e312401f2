"""Kept files to a drive and back: `python -m shared.drive_copy save FOLDER`, or `restore FOLDER`.

For machines that do not last, such as hosted notebooks. Their drives often hold no symbolic links (Google's does not),
so that artifacts cannot be made there. FOLDER gets the files of `storage.data_dir` as they are, and in `saved.json` the
list of them and of the links. `save` copies what is new or has changed and removes what it has saved before and is
gone; killed in the middle, FOLDER still restores to a whole state. `restore` fills a data folder that has no artifact
yet and leaves every other alone. Nothing may write to the data folder meanwhile.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import structlog

from shared.command import UsageError, run
from shared.files import require_free_space, write_atomically
from shared.settings import Settings

SAVED = "saved.json"
PASSING = (".lock", ".building", ".part")  # locks, drafts, and what a killed copy leaves


@dataclass(frozen=True, slots=True)
class Saved:
    """What a drive holds: paths of files, and links with what they point to; all relative to the folder."""

    files: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()


def main(given: argparse.Namespace, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Save or restore, and say what was done."""
    data, drive = settings.storage.data_dir.absolute(), Path(given.folder).absolute()
    if given.action == "save":
        copied = save(data, drive)
        log.info("saved", to=str(drive), files_copied=copied)
        return
    if found(data).links:
        log.info("nothing restored: there are artifacts here already", path=str(data))
        return
    saved = read_saved(drive)
    log.info("restored", path=str(data), files_copied=restore(saved, data, drive), artifacts=len(saved.links))


def save(data: Path, drive: Path) -> int:
    """Bring the drive to the state of the data folder; returns how many files were copied.

    Raises UsageError when the drive has artifacts that are not here: they would be lost.
    """
    before, now = read_saved(drive), found(data)
    lost = sorted({name for name, _ in before.links} - {name for name, _ in now.links})
    if lost:
        raise UsageError(
            f"{drive} has artifacts that {data} lacks ({', '.join(lost[:3])}), expected all of them here; restore "
            f"first, or delete {drive / SAVED} to give them up"
        )
    copied = copy_all(now.files, data, drive)
    # From here on the drive restores to the new state; superseded files may go.
    write_atomically(drive / SAVED, json.dumps(asdict(now), indent=1) + "\n")
    for name in set(before.files) - set(now.files):
        (drive / name).unlink(missing_ok=True)
    return copied


def restore(saved: Saved, data: Path, drive: Path) -> int:
    """Copy what was saved into the data folder, links last; returns how many files were copied."""
    copied = copy_all(saved.files, drive, data)
    for name, target in saved.links:
        link = data / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    return copied


def read_saved(drive: Path) -> Saved:
    """What the drive's list names; nothing when it has none."""
    file = drive / SAVED
    if not file.is_file():
        return Saved()
    raw = json.loads(file.read_text(encoding="utf-8"))
    return Saved(tuple(raw["files"]), tuple((name, target) for name, target in raw["links"]))


def found(data: Path) -> Saved:
    """What a data folder holds now."""
    paths = sorted(below(data))
    files = (path for path in paths if not path.is_symlink())
    links = (path for path in paths if path.is_symlink())
    return Saved(
        tuple(str(path.relative_to(data)) for path in files),
        tuple((str(path.relative_to(data)), str(path.readlink())) for path in links),
    )


def below(folder: Path) -> Iterator[Path]:
    """Files and links below a folder but passing ones; links are not followed."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.endswith(PASSING)]
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from (Path(place) / name for name in [*files, *links] if not name.endswith(PASSING))


def copy_all(names: Iterable[str], source: Path, target: Path) -> int:
    """Copy the files that are not there yet or have changed; returns how many."""
    wanted = [name for name in names if differs(source / name, target / name)]
    require_free_space(target, sum((source / name).stat().st_size for name in wanted) / 1e9)
    for name in wanted:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        shutil.copyfile(source / name, part)
        part.replace(file)  # what has its name is whole
    return len(wanted)


def differs(source: Path, target: Path) -> bool:
    """Whether `target` is no copy of `source`: it is absent, of another size, or older."""
    if not target.is_file():
        return True
    ours, theirs = source.stat(), target.stat()
    return ours.st_size != theirs.st_size or ours.st_mtime > theirs.st_mtime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m shared.drive_copy", description="Kept files to a drive and back.")
    parser.add_argument("action", choices=["save", "restore"])
    parser.add_argument("folder", help="a folder of the drive, for nothing else")
    raise SystemExit(run("drive", partial(main, parser.parse_args())))
