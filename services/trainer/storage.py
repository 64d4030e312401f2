"""What uses the disk, and what of it may go: `python -m services.trainer.storage [--json] [--prune [GB]] [--yes]`.

Lists every artifact and scratch part of `storage.data_dir` and `storage.scratch_dir` by run, round and role, with its
size, age and why it stays; a file with several names counts once. `--prune` says what it would free: as much as the
kept files exceed `storage.budget_gb` and free disk falls short of `storage.min_free_gb`, or at least so many GB; with
`--yes` it frees that. What may go says `disk_parts.py`, in which order `disk_plan.py`. While it frees, it holds the
drivers' locks of all runs that are not driven, and it touches nothing of the others.
"""

import argparse
import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from services.trainer.disk_estimate import estimate
from services.trainer.disk_parts import inventory, run_names, scan, tensors
from services.trainer.disk_plan import Part, Wanted, choose, freed, shares, total
from services.trainer.driver import LOCK
from shared.command import UsageError, run
from shared.files import ArtifactError, free_gb
from shared.settings import Settings

COMMAND = "python -m services.trainer.storage --prune"
GB = 10**9
HEADER = ("", "run", "round", "role", "what", "size", "age", "")


def main(arguments: argparse.Namespace, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """List what there is; with --prune say what goes, and with --yes let it go."""
    with driven(settings, hold=arguments.yes) as busy:
        parts = inventory(settings, busy)
        wanted = None if arguments.prune is None else needed(settings, parts, round(arguments.prune * GB))
        chosen = [] if wanted is None else choose(parts, wanted)
        if arguments.yes:
            for part in chosen:
                free(part)
                log.info("freed", path=str(part.path), gb=round(freed([part]) / GB, 3))
    if arguments.json:
        print(as_json(settings, parts, chosen))
    else:
        print(as_text(settings, parts) if wanted is None else told(chosen, wanted, done=arguments.yes))
    if wanted is not None:
        require_enough(chosen, wanted)


def require_budget(settings: Settings) -> None:
    """Raise ArtifactError when the kept files take more than `storage.budget_gb`."""
    budget = settings.storage.budget_gb
    if budget and (found := kept_bytes(settings)) > budget * GB:
        raise ArtifactError(
            f"the kept files in {settings.storage.data_dir} take {sized(found)}, expected at most "
            f"DRZERO_STORAGE__BUDGET_GB = {budget:g}; `{COMMAND}` says what may go and frees it with --yes; or raise it"
        )


def warn_of_budget(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Say before a run that its files will not fit the budget, not only when they do not."""
    expected, budget = estimate(settings), settings.storage.budget_gb
    if expected is not None and budget and (gb := expected.kept(settings.trainer.iterations)) > budget:
        log.warning("the run will not fit DRZERO_STORAGE__BUDGET_GB", expected_gb=round(gb, 1), budget_gb=budget)


def kept_bytes(settings: Settings) -> int:
    """Bytes of all kept files, each counted once."""
    files, _ = scan([settings.storage.data_dir.absolute()])
    return sum(inode.size for inode in files)


# --- what is to go


def needed(settings: Settings, parts: Sequence[Part], least: int = 0) -> Wanted:
    """The bytes that budget and free disk ask for, and at least `least`."""
    storage = settings.storage
    kept = total(part for part in parts if part.origin.place == "kept")
    over = max(0, kept - round(storage.budget_gb * GB)) if storage.budget_gb else 0
    short = {path: max(0, round((storage.min_free_gb - free_gb(path)) * GB)) for path in volumes(settings)}
    if len(short) == 1:
        return Wanted(kept=over, either=max(least, *short.values()))
    on_data, on_scratch = short.values()
    return Wanted(kept=max(over, on_data), scratch=on_scratch, either=least)


def volumes(settings: Settings) -> list[Path]:
    """The data and the scratch folder; one of them where both are on the same file system."""
    folders = [settings.storage.data_dir.absolute(), settings.storage.scratch_dir.absolute()]
    places = [next(path for path in (folder, *folder.parents) if path.exists()) for folder in folders]
    return folders if places[0].stat().st_dev != places[1].stat().st_dev else folders[:1]


def require_enough(chosen: Sequence[Part], wanted: Wanted) -> None:
    """Raise UsageError when what may go is less than what is wanted."""
    for name, bytes_wanted, places in (
        ("kept files", wanted.kept, ("kept",)),
        ("scratch", wanted.scratch, ("scratch",)),
        ("files", wanted.either, ("kept", "scratch")),
    ):
        found = freed(part for part in chosen if part.origin.place in places)
        if found < bytes_wanted:
            raise UsageError(
                f"expected {sized(bytes_wanted)} of {name} that may go, found {sized(found)}; delete exports or a run "
                "(its folders in data/runs and scratch/runs), raise DRZERO_STORAGE__BUDGET_GB, or use a larger disk"
            )


def free(part: Part) -> None:
    """Remove a part, or, of superseded weights, put empty files in place of the tensors."""
    if part.kind == "weights":
        for file in tensors(part.path):
            empty = file.with_name(f".{file.name}.freed")
            empty.write_bytes(b"")
            empty.replace(file)
        return
    # A kill in the middle must not leave what looks like a checkpoint or a journal.
    going = part.path if part.path.name.startswith(".") else part.path.with_name(f".{part.path.name}.going")
    part.path.rename(going)
    shutil.rmtree(going)


@contextmanager
def driven(settings: Settings, *, hold: bool) -> Iterator[set[str]]:
    """The runs that are driven at the moment; with `hold` no other can be until the block ends."""
    runs = settings.storage.data_dir.absolute() / "runs"
    with ExitStack() as stack:
        yield {name for name in run_names(settings) if not idle(runs / name, stack, hold=hold)}


def idle(folder: Path, stack: ExitStack, *, hold: bool) -> bool:
    """Whether nobody holds the lock of a run; with `hold` the stack holds it from now on."""
    lock = folder / LOCK
    if hold:
        folder.mkdir(parents=True, exist_ok=True)
        stream = stack.enter_context(lock.open("a"))
    elif lock.is_file():
        stream = stack.enter_context(lock.open())
    else:
        return True
    try:
        fcntl.flock(stream, (fcntl.LOCK_EX if hold else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if not hold:  # a driver that starts now must not find it taken
        fcntl.flock(stream, fcntl.LOCK_UN)
    return True


# --- what is said


def as_text(settings: Settings, parts: Sequence[Part]) -> str:
    """The parts as a table, and the totals beside budget and free disk."""
    rows = [HEADER]
    for part, size in zip(parts, shares(parts), strict=True):
        origin = part.origin
        why = f"stays: {part.stays}" if part.stays else "may go"
        rows.append((origin.place, origin.run, str(origin.round or ""), origin.role, part.kind, sized(size),
                     aged(time.time() - part.changed), why))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *totals(settings, parts)])


def totals(settings: Settings, parts: Sequence[Part]) -> list[str]:
    """Kept files and scratch, the budget, free disk, and what the settings will take."""
    storage = settings.storage
    kept, scratch = (total(part for part in parts if part.origin.place == place) for place in ("kept", "scratch"))
    budget = f"budget {storage.budget_gb:g} GB" if storage.budget_gb else "no budget"
    lines = [
        f"kept files: {sized(kept)} in {storage.data_dir}, {budget}, {free_gb(storage.data_dir):.1f} GB free",
        f"scratch: {sized(scratch)} in {storage.scratch_dir}, {free_gb(storage.scratch_dir):.1f} GB free",
    ]
    expected = estimate(settings)
    if expected is not None:
        rounds = settings.trainer.iterations
        lines.append(
            f"a run of these settings ({rounds} {'round' if rounds == 1 else 'rounds'}) keeps "
            f"{expected.kept(rounds):.1f} GB, {expected.pruned(rounds):.1f} with superseded weights freed; "
            f"each model's weights take {expected.weights:.1f}"
        )
    return lines


def told(chosen: Sequence[Part], wanted: Wanted, *, done: bool) -> str:
    """What goes, or went."""
    if wanted == Wanted():
        return f"nothing has to go: the budget and free disk are kept; `{COMMAND} 10` would free 10 GB all the same"
    lines = [f"  {part.path} ({part.kind}, {sized(freed([part]))})" for part in chosen]
    words = "freed" if done else "would be freed (--yes frees them)"
    return "\n".join([f"{words}: {sized(freed(chosen))}", *lines])


def as_json(settings: Settings, parts: Sequence[Part], chosen: Sequence[Part]) -> str:
    """All of it for a program, sizes in bytes."""
    rows: list[dict[str, Any]] = [
        {
            "path": str(part.path),
            "place": part.origin.place,
            "run": part.origin.run,
            "round": part.origin.round or None,
            "role": part.origin.role,
            "what": part.kind,
            "bytes": size,
            "changed": part.changed,
            "stays": part.stays,
        }
        for part, size in zip(parts, shares(parts), strict=True)
    ]
    storage = settings.storage
    expected = estimate(settings)
    return json.dumps(
        {
            "parts": rows,
            "kept_bytes": total(part for part in parts if part.origin.place == "kept"),
            "scratch_bytes": total(part for part in parts if part.origin.place == "scratch"),
            "budget_bytes": round(storage.budget_gb * GB),
            "free_bytes": {
                "kept": round(free_gb(storage.data_dir) * GB),
                "scratch": round(free_gb(storage.scratch_dir) * GB),
            },
            "expected_bytes": None if expected is None else round(expected.kept(settings.trainer.iterations) * GB),
            "goes": [str(part.path) for part in chosen],
            "goes_bytes": freed(chosen),
        },
        indent=2,
    )


def sized(count: float) -> str:
    """Bytes in GB, MB or kB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"


def aged(seconds: float) -> str:
    """An age in days, hours or minutes."""
    for unit, size in (("d", 86_400), ("h", 3600)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0) / 60:.0f} min"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m services.trainer.storage", description="What uses the disk.")
    parser.add_argument("--json", action="store_true", help="one JSON object, sizes in bytes")
    parser.add_argument("--prune", nargs="?", type=float, const=0.0, metavar="GB", help="say what would be freed")
    parser.add_argument("--yes", action="store_true", help="free what --prune says")
    given = parser.parse_args()
    if given.yes and given.prune is None:
        parser.error("--yes belongs to --prune")
    raise SystemExit(run("trainer", partial(main, given)))
