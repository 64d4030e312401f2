"""Are corpus and index what their manifests say? Every file is hashed, at the start or, when there is much, after it.

Up to AT_START_GB are hashed before anything is served: about a second per GB where the processor has SHA
instructions. More would hold up the start for long, and is hashed while the service answers already.
"""

from pathlib import Path

from services.retrieval.recipe import corpus_folder, index_folder
from shared.files import read_manifest
from shared.settings import Settings

AT_START_GB = 2.0


def folders(settings: Settings) -> list[Path]:
    """The published versions that lie under the two names now."""
    return [path.resolve() for path in (corpus_folder(settings), index_folder(settings)) if path.exists()]


def is_small(paths: list[Path]) -> bool:
    """Whether so much can be hashed before the service answers."""
    size = sum(file.stat().st_size for path in paths for file in path.rglob("*") if file.is_file())
    return size <= AT_START_GB * 1e9


def verify(paths: list[Path]) -> None:
    """Raise shared.files.ArtifactError with the name of the first file that is damaged or missing."""
    for path in paths:
        read_manifest(path, verify=True)
