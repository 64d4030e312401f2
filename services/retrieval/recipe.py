"""What an index must have been made from: the one place where builder and server agree on it.

In: settings and the corpus manifest. Out: a recipe (settings that shape the vectors, identities of corpus and weights)
and the sentence that says how an index differs from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.retrieval.encoder import EncoderIdentity
from shared.files import MANIFEST, ArtifactError, Manifest
from shared.settings import Settings

REMEDY = "make it again with `python -m services.retrieval.build`"


@dataclass(frozen=True)
class Recipe:
    """The `settings` and `made_from` of an index manifest."""

    settings: Mapping[str, Any]
    made_from: Mapping[str, str]


def corpus_folder(settings: Settings) -> Path:
    """Where the corpus is published; ArtifactError when it is not."""
    return require(settings.storage.data_dir / "corpus", "services.ingest")


def index_folder(settings: Settings) -> Path:
    """Where the index is published."""
    return settings.storage.data_dir / "index"


def require(folder: Path, command: str) -> Path:
    """The folder of a published artifact; an ArtifactError that names the command which makes it when there is none."""
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"expected {folder} with a manifest, found none; make it with `python -m {command}`")
    return folder


def recipe(corpus: Manifest, encoder: EncoderIdentity) -> Recipe:
    """What an index of this corpus with this encoder is made from."""
    return Recipe(settings=encoder.as_settings(), made_from={"corpus": corpus.identity, "encoder": encoder.weights})


def difference(found: Manifest, wanted: Recipe, folder: Path) -> str | None:
    """None when the index in `folder` follows the recipe, else expected, found and remedy in one sentence."""
    if found.made_from.get("corpus") != wanted.made_from["corpus"]:
        return (
            f"index made from another corpus: expected corpus {wanted.made_from['corpus'][:12]}, "
            f"{folder} was made from {str(found.made_from.get('corpus'))[:12]}; {REMEDY}"
        )
    for key, value in wanted.settings.items():
        if found.settings.get(key) != value:
            return (
                f"index made with other encoder settings: expected {key} = {value!r}, "
                f"{folder} was made with {found.settings.get(key)!r}; {REMEDY}"
            )
    if found.made_from.get("encoder") != wanted.made_from["encoder"]:
        return (
            f"index made with other encoder weights: expected {wanted.made_from['encoder'][:19]}, "
            f"{folder} was made with {str(found.made_from.get('encoder'))[:19]}; {REMEDY}"
        )
    return None
