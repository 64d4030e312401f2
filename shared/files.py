"""Artifacts: folders that are either complete, with a manifest, or not there.

`publish()` yields a private building folder; when the block ends well, the files are hashed and synced, the manifest
is written last and the public name (a relative symbolic link) is swapped to the new version in one rename. A reader
calls `read_manifest()` and gets an `ArtifactError` with expected, found and remedy when anything does not match.
Nothing half-written is ever reachable under the public name; leftovers of a killed process are removed by the next
`publish()` of the same artifact, or by `sweep()`.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 2  # raised when the meaning of an artifact's files changes


class ArtifactError(RuntimeError):
    """An artifact is missing, damaged or made from something else; the text says expected, found and remedy."""


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, what it was made from and what it must contain."""

    artifact: str
    rows: int
    files: Mapping[str, str]  # path inside the artifact → sha256
    settings: Mapping[str, Any]  # the settings that shaped the content, and nothing else
    made_from: Mapping[str, str]  # artifact or input → identity
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    format: int = FORMAT

    @property
    def identity(self) -> str:
        """sha256 over content, settings and origins: what downstream manifests refer to. Time does not enter."""
        parts = {k: v for k, v in asdict(self).items() if k not in ("seconds", "counts")}
        return hash_json(parts)


class Draft:
    """A building folder, to be filled inside a `publish()` block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self.counts: dict[str, int] = {}
        self.discard = False  # set to keep the published version after all
        self.seconds: float | None = None  # set when the work was done before the block


def hash_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, text: str, *, alone: bool = False) -> None:
    """Replace one file's content in one step.

    `alone`: no other process writes it meanwhile, so that what a killed one has left is written over by the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{'new' if alone else os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


@contextmanager
def publish(
    target: Path, *, settings: Mapping[str, Any], made_from: Mapping[str, str], wait: bool = False
) -> Iterator[Draft]:
    """Build the artifact `target`; on an exception the old version stays and the draft is removed.

    When another process is building the same artifact: waits for it with `wait`, else raises ArtifactError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with _lock(target, wait=wait):
        _sweep(target)
        building = target.parent / f".{target.name}.building"
        building.mkdir()
        draft = Draft(building)
        try:
            yield draft
            if draft.discard:
                return
            manifest = Manifest(
                artifact=target.name,
                rows=draft.rows,
                files={str(p.relative_to(building)): _sync(p) for p in sorted(building.rglob("*")) if p.is_file()},
                settings=json.loads(json.dumps(settings, default=str)),
                made_from=dict(made_from),
                counts=draft.counts,
                seconds=round(time.monotonic() - started if draft.seconds is None else draft.seconds, 3),
            )
            write_atomically(building / MANIFEST, json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n")
            version = target.parent / f".{target.name}.{manifest.identity[:12]}.{time.time_ns()}"
            building.replace(version)
            link = target.parent / f".{target.name}.link"
            link.symlink_to(version.name)
            link.replace(target)
        finally:
            _sweep(target)


def sweep(target: Path) -> None:
    """Remove what a killed builder of `target` has left, an older version too; the published one stays."""
    if target.parent.is_dir():
        with _lock(target, wait=False):
            _sweep(target)


def read_manifest(target: Path, *, verify: bool = False) -> Manifest:
    """The manifest of a published artifact.

    `verify` also hashes every file. Raises ArtifactError when the artifact is missing, of another format or damaged.
    """
    path = target / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"expected the artifact {target}, found none; run the stage that makes it")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is not a manifest ({error}); delete {target} and make it again") from error
    if manifest.format != FORMAT:
        raise ArtifactError(f"{target} has format {manifest.format}, expected {FORMAT}; make it again")
    for name, digest in manifest.files.items():
        file = target / name
        if not file.is_file():
            raise ArtifactError(f"{target} lacks the file {name} of its manifest; make it again")
        if verify and hash_file(file) != digest:
            raise ArtifactError(f"{file} does not have the content its manifest names; make {target} again")
    return manifest


def stale_reason(target: Path, *, settings: Mapping[str, Any], made_from: Mapping[str, str]) -> str | None:
    """None when `target` is complete and was made from just these settings and inputs, else why it was not."""
    try:
        manifest = read_manifest(target)
    except ArtifactError as error:
        return str(error)
    wanted = json.loads(json.dumps(settings, default=str))
    changed = sorted(k for k in {*wanted, *manifest.settings} if wanted.get(k) != manifest.settings.get(k))
    if changed:
        return f"changed settings: {', '.join(changed)}"
    origins = sorted(k for k in {*made_from, *manifest.made_from} if made_from.get(k) != manifest.made_from.get(k))
    return f"changed inputs: {', '.join(origins)}" if origins else None


def free_gb(path: Path) -> float:
    """Free space of the file system that holds `path` (or would), in GB."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9


def require_free_space(path: Path, gb: float) -> None:
    """Raise ArtifactError when less than `gb` GB are free at `path`."""
    found = free_gb(path)
    if found < gb:
        raise ArtifactError(
            f"{path} has {found:.1f} GB of free disk, expected at least {gb:.1f} GB; free some, "
            "or lower DRZERO_STORAGE__MIN_FREE_GB"
        )


@contextmanager
def _lock(target: Path, *, wait: bool) -> Iterator[None]:
    with (target.parent / f".{target.name}.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(f"another process is building {target}; wait for it or stop it") from error
        yield


def _sweep(target: Path) -> None:
    current = target.resolve().name if target.is_symlink() else None
    for path in target.parent.glob(f".{target.name}.*"):
        if path.name.endswith(".lock") or path.name == current:
            continue
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)


def _sync(path: Path) -> str:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return hash_file(path)
