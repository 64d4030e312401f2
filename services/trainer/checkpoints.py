"""verl's checkpoints on disk: which is the newest that is complete.

verl writes `global_step_<n>/actor`, then `global_step_<n>/data.pt`, then the number n into a tracker file. A kill can
leave a folder without data.pt or with a part of it, or an empty tracker; none is taken for a checkpoint or stops a
resume.
"""

import os
import re
import shutil
import zipfile
from pathlib import Path

STEP = re.compile(r"global_step_(\d+)")


def newest_checkpoint(folder: Path, through: int | None = None) -> tuple[int, Path] | None:
    """Step and folder of the newest complete checkpoint (of at most step `through`), or None."""
    steps = {int(match[1]): path for path in folder.glob("global_step_*") if (match := STEP.fullmatch(path.name))}
    for step in sorted(steps, reverse=True):
        if (through is None or step <= through) and is_complete(steps[step]):
            return step, steps[step]
    return None


def completed_at(folder: Path) -> float:
    """When the newest complete checkpoint was written, in seconds since 1970; 0 when there is none."""
    newest = newest_checkpoint(folder)
    return newest[1].stat().st_mtime if newest else 0.0


def keep_copy(folder: Path, target: Path, *, through: int) -> None:
    """Keep the newest checkpoint of at most step `through` as hard links in `target`, unless it is there already."""
    newest = newest_checkpoint(folder, through)
    if newest is None or (target / newest[1].name).is_dir():
        return
    draft = target / f".{newest[1].name}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(newest[1], draft, copy_function=os.link)
    draft.rename(target / newest[1].name)


def go_back(folder: Path, kept: Path, *, through: int) -> tuple[int, Path] | None:
    """Make the last good checkpoint the newest one: later ones are removed, a kept copy is put back.

    Returns its step and folder, or None when there was none yet.
    """
    for path in folder.glob("global_step_*"):
        if int(path.name.rpartition("_")[2]) > through:
            shutil.rmtree(path)
    good = newest_checkpoint(kept, through)
    if good is not None and not (folder / good[1].name).is_dir():
        good[1].rename(folder / good[1].name)
    shutil.rmtree(kept, ignore_errors=True)
    return newest_checkpoint(folder)


def is_complete(checkpoint: Path) -> bool:
    """Whether all parts were written: the plain weights, the shards and, last, the position in the data."""
    weights = checkpoint / "actor" / "huggingface"
    return (
        zipfile.is_zipfile(checkpoint / "data.pt")  # torch's files are; its directory is written last
        and any(weights.glob("*.safetensors"))
        and any((checkpoint / "actor").glob("model_world_size_*.pt"))
    )


def discard_incomplete(folder: Path) -> None:
    """Remove what a kill has left half-written, so that nothing mistakes it for a checkpoint."""
    for path in folder.glob("global_step_*"):
        if not is_complete(path):
            shutil.rmtree(path)


def discard_all(folder: Path) -> None:
    """Remove all checkpoints; a kill in the middle leaves none that looks complete."""
    for last in folder.glob("global_step_*/data.pt"):
        last.unlink()
    if folder.is_dir():
        shutil.rmtree(folder)


def prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` complete checkpoints."""
    paths = sorted(folder.glob("global_step_*"), key=lambda p: int(p.name.rpartition("_")[2]))
    for path in paths[:-keep]:
        shutil.rmtree(path)
