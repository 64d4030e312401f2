"""What lies in `storage.data_dir` and `storage.scratch_dir`, as parts that say whether they may go.

May go, of runs that nobody drives at the moment:
- a checkpoint that is not the newest complete one of its training; once its weights are published, that one too, and
  what the training has logged
- a journal whose artifact is published
- what a killed process has left half-written or half-deleted
- superseded weights: the tensors of a role's weights in a round, once the next round's weights are published and
  everything else that is made from them is there. Manifest and small files stay, so that whatever was made from them
  is still current; the weights are refused when they are to be served

Everything else stays: artifacts, the last weights of each role, the last good checkpoint and weights of a training that
went wrong, and what the solver is to serve or the settings name. Reads manifests and sizes, and changes nothing.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import get_args

from services.trainer.checkpoints import STEP, newest_checkpoint
from services.trainer.disk_plan import Files, Inode, Origin, Part
from services.trainer.paths import RunPaths
from services.trainer.rounds import Role
from shared.files import ArtifactError, Manifest, hash_json, read_manifest
from shared.serving import note_path
from shared.settings import Settings

ARTIFACT, NOTES = "an artifact", "small files of record"
BUSY = "its run is being driven"
FOREIGN = "of no run"
UNKNOWN = "not known here"
NEWEST = "the newest checkpoint of a training without published weights"
UNFINISHED = "a training without published weights goes on from it"
LAST_GOOD = "the last good one of a training that went wrong"
NAMED = "what the solver serves or the settings name"
FREED = "superseded, its tensors are freed"
JOURNAL = "what is not finished goes on from it"

Paths = Callable[[int, Role], RunPaths]  # of one run, by round and role


def inventory(settings: Settings, busy: Collection[str]) -> list[Part]:
    """All parts, kept files first; `busy` are the runs that are driven."""
    data, scratch = settings.storage.data_dir.absolute(), settings.storage.scratch_dir.absolute()
    parts = [*top_parts(data, Origin("kept"), ARTIFACT), *top_parts(scratch, Origin("scratch"), FOREIGN)]
    named = named_weights(settings)
    for run in run_names(settings):
        paths = partial(run_paths_at, settings, run)
        reason = BUSY if run in busy else ""
        parts += kept_parts(data / "runs" / run, paths, reason, named)
        parts += scratch_parts(scratch / "runs" / run, paths, reason)
    return sorted(parts, key=lambda part: (part.origin.place, part.origin.run, part.origin.round, part.origin.role))


def run_names(settings: Settings) -> list[str]:
    """The runs that have kept files or scratch."""
    folders = (settings.storage.data_dir / "runs", settings.storage.scratch_dir / "runs")
    return sorted({path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()})


def run_paths_at(settings: Settings, run: str, number: int, role: Role) -> RunPaths:
    """The paths of a part of any run on the disk."""
    data, scratch = settings.storage.data_dir.absolute(), settings.storage.scratch_dir.absolute()
    place = Path("runs", run, str(number), role)
    return RunPaths(kept=data / place, work=scratch / place, corpus=data / "corpus", index=data / "index")


def named_weights(settings: Settings) -> set[Path]:
    """The folders that `serving.json` or the settings name, links resolved."""
    names = [settings.trainer.actor.model, settings.solver.model]
    note = note_path(settings)
    if note.is_file():
        names.append(json.loads(note.read_text(encoding="utf-8"))["weights"])
    return {Path(name).resolve() for name in names}


# --- what there is


def top_parts(folder: Path, origin: Origin, stays: str) -> Iterator[Part]:
    """The parts of a storage folder that belong to no run."""
    for name, path in entries(folder):
        if name != "runs":
            yield part_of(path, name, origin, stays=stays)
    yield from notes(folder, origin)


def kept_parts(folder: Path, paths: Paths, stays: str, named: Collection[Path]) -> Iterator[Part]:
    """The kept parts of one run; `stays` is why none may go, or ""."""
    run = folder.name
    yield from notes(folder, Origin("kept", run))
    for number, inside in rounds_in(folder):
        origin = Origin("kept", run, number)
        yield from notes(inside, origin)
        for name, path in entries(inside):
            if name not in get_args(Role):
                yield kept_part(path, name, origin, stays or ARTIFACT)
        for role in get_args(Role):
            origin = Origin("kept", run, number, role)
            yield from notes(inside / role, origin)
            for name, path in entries(inside / role):
                reason = stays or why_kept(path, name, number, role, paths=paths, named=named)
                yield kept_part(path, name, origin, reason)


def kept_part(path: Path, name: str, origin: Origin, stays: str) -> Part:
    """An artifact, or what a killed process has left of one."""
    if name.startswith("."):
        return part_of(path, f"leftover {name}", origin, stays=stays if stays == BUSY else "")
    if not stays:
        return part_of(path, name, origin, tensors_only=True)
    return part_of(path, name, origin, stays=stays)


def why_kept(path: Path, name: str, number: int, role: Role, *, paths: Paths, named: Collection[Path]) -> str:
    """Why a role's artifact may not be freed; "" for superseded weights."""
    if name == "last_good":
        return LAST_GOOD
    if name != "weights":
        return ARTIFACT
    if path.resolve() in named:
        return NAMED
    if not superseded(number, role, paths):
        return ARTIFACT
    return "" if any(file.stat().st_size for file in tensors(path)) else FREED


def scratch_parts(folder: Path, paths: Paths, stays: str) -> Iterator[Part]:
    """The scratch parts of one run; `stays` is why none may go, or ""."""
    run = folder.name
    yield from notes(folder, Origin("scratch", run))
    for name, path in entries(folder):
        if name == "exams":
            reason = stays or ("" if all_evaluated(paths(1, "solver").run, paths) else JOURNAL)
            yield part_of(path, name, Origin("scratch", run), stays=reason)
        elif not name.isdecimal():
            yield part_of(path, name, Origin("scratch", run), stays=stays or UNKNOWN)
    for number, inside in rounds_in(folder):
        origin = Origin("scratch", run, number)
        for name, path in entries(inside):
            if name == "questions":
                reason = stays or ("" if made_from_state(paths(number, "proposer").questions, path) else JOURNAL)
                yield part_of(path, name, origin, stays=reason)
            elif name not in get_args(Role):
                yield part_of(path, name, origin, stays=stays or UNKNOWN)
        for role in get_args(Role):
            yield from work_parts(paths(number, role), Origin("scratch", run, number, role), stays)


def work_parts(paths: RunPaths, origin: Origin, stays: str) -> Iterator[Part]:
    """The scratch parts of one training."""
    published = not stays and is_published(paths)
    newest = None if stays else newest_checkpoint(paths.checkpoints)
    yield from notes(paths.work, origin)
    for name, path in entries(paths.checkpoints):
        needed = newest is not None and path == newest[1] and not published
        kind = f"checkpoint {step[1]}" if (step := STEP.fullmatch(name)) else f"leftover {name}"
        yield part_of(path, kind, origin, stays=stays or (NEWEST if needed else ""))
    yield from notes(paths.checkpoints, origin)
    for name, path in entries(paths.work):
        if path == paths.good:
            yield part_of(path, "good", origin, stays=stays or LAST_GOOD)
        elif path != paths.checkpoints:
            yield part_of(path, name, origin, stays=stays or ("" if published else UNFINISHED))


# --- files


def part_of(path: Path, kind: str, origin: Origin, *, stays: str = "", tensors_only: bool = False) -> Part:
    """A part with its files. What goes of it is nothing where it stays, else its tensors or all."""
    files, changed = scan([path])
    if stays:
        return Part(path, kind, origin, files, changed, stays=stays)
    return Part(path, kind, origin, files, changed, goes=scan(tensors(path))[0] if tensors_only else files)


def notes(folder: Path, origin: Origin) -> Iterator[Part]:
    """The loose files of a folder as one part; none when they are empty."""
    if folder.is_dir():
        files, changed = scan(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
        if any(inode.size for inode in files):
            yield Part(folder, "notes", origin, files, changed, stays=NOTES)


def scan(paths: Iterator[Path] | list[Path]) -> tuple[Files, float]:
    """All files at and below the paths, and when the newest was changed; a link counts for what is in its folder."""
    files: Counter[Inode] = Counter()
    changed = 0.0
    for path in paths:
        for file in files_below(path):
            with suppress(FileNotFoundError):  # a run that is driven goes on meanwhile
                found = file.lstat()
                files[Inode(found.st_dev, found.st_ino, found.st_size, found.st_nlink)] += 1
                changed = max(changed, found.st_mtime)
    return files, changed


def files_below(path: Path) -> Iterator[Path]:
    """The file `path`, or all regular files below it; links below it are not followed."""
    if path.is_file():
        yield path
    for folder, _, names in os.walk(path.resolve()):
        yield from (file for name in names if not (file := Path(folder, name)).is_symlink())


def entries(folder: Path) -> list[tuple[str, Path]]:
    """The folders in a folder by name; versions of artifacts by their public names, or else their own hidden ones."""
    if not folder.is_dir():
        return []
    found = sorted(folder.iterdir())
    links = {path for path in found if path.is_symlink() and path.resolve().parent == folder.resolve()}
    versions = {path.resolve().name for path in links}
    plain = {path for path in found if path.is_dir() and not path.is_symlink() and path.name not in versions}
    return [(path.name, path) for path in sorted({path for path in links if path.is_dir()} | plain)]


def rounds_in(folder: Path) -> list[tuple[int, Path]]:
    """The rounds in a run's folder."""
    return sorted((int(name), path) for name, path in entries(folder) if name.isdecimal())


def tensors(weights: Path) -> list[Path]:
    """The files of a model that hold its numbers."""
    return sorted(weights.glob("*.safetensors"))


# --- what manifests say


def superseded(number: int, role: Role, paths: Paths) -> bool:
    """Whether the next round's weights were trained from these, and all else that reads these has been made."""
    own, after = paths(number, role), paths(number + 1, role)
    weights, training = identity(own.weights), identity(after.training)
    readers = [(after.training, "base_weights")]
    if role == "proposer":
        readers += [(own.questions, "proposer")]
    else:
        readers += [
            (own.evaluation, "solver"),
            (paths(number + 1, "proposer").training, "solver_weights"),
            (after.questions, "solver"),
        ]
    if weights is None or training is None or made_from(after.weights, "training") != training:
        return False
    return all(made_from(artifact, name) == weights for artifact, name in readers)


def is_published(paths: RunPaths) -> bool:
    """Whether the weights of the training in scratch are published; what is there may be of other settings."""
    training = identity(paths.training)
    return made_from_state(paths.training, paths.work) and made_from(paths.weights, "training") == training


def made_from_state(artifact: Path, folder: Path) -> bool:
    """Whether an artifact is what the scratch folder, whose state.json has the key of its settings, was for."""
    manifest, state = manifest_of(artifact), folder / "state.json"
    if manifest is None or not state.is_file():
        return False
    key = json.loads(state.read_text(encoding="utf-8"))["key"]
    return bool(key == hash_json([manifest.settings, manifest.made_from]))


def all_evaluated(run: Path, paths: Paths) -> bool:
    """Whether the newest round of a run is evaluated; exams of the base model serve all rounds."""
    rounds = rounds_in(run)
    return bool(rounds) and manifest_of(paths(rounds[-1][0], "solver").evaluation) is not None


def identity(artifact: Path) -> str | None:
    """The identity of an artifact; None where there is none."""
    manifest = manifest_of(artifact)
    return None if manifest is None else manifest.identity


def made_from(artifact: Path, name: str) -> str | None:
    """The identity of what an artifact was made from; None where either is unknown."""
    manifest = manifest_of(artifact)
    return None if manifest is None else manifest.made_from.get(name)


def manifest_of(artifact: Path) -> Manifest | None:
    """The manifest of an artifact; None where it is missing or damaged."""
    try:
        return read_manifest(artifact)
    except ArtifactError:
        return None
