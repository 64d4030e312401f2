"""verl's checkpoints on disk: which is the newest that is complete.

verl writes `global_step_<n>/actor`, then `global_step_<n>/data.pt`, then the number n into a tracker file. A kill can
leave a folder without data.pt, or an empty tracker; neither is taken for a checkpoint or stops a resume.
"""

import re
import shutil
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
STEP = re.compile(r"global_step_(\d+)")


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest complete checkpoint, or None."""
    steps = {int(match[1]): path for path in folder.glob("global_step_*") if (match := STEP.fullmatch(path.name))}
    for step in sorted(steps, reverse=True):
        if is_complete(steps[step]):
            return step, steps[step]
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether all parts were written: the plain weights, the shards and, last, the position in the data."""
    weights = checkpoint / "actor" / "huggingface"
    return (
        (checkpoint / "data.pt").is_file()
        and (checkpoint / "data.pt").stat().st_size > 0
        and any(weights.glob("*.safetensors"))
        and any((checkpoint / "actor").glob("model_world_size_*.pt"))
    )


def discard_incomplete(folder: Path) -> None:
    """Remove what a kill has left half-written, so that nothing mistakes it for a checkpoint."""
    for path in folder.glob("global_step_*"):
        if not is_complete(path):
            shutil.rmtree(path)


def prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` complete checkpoints."""
    paths = sorted(folder.glob("global_step_*"), key=lambda p: int(p.name.rpartition("_")[2]))
    for path in paths[:-keep]:
        shutil.rmtree(path)
