"""What an index must have been made from: the one place where builder and server agree on it.

In: settings and the corpus manifest. Out: a recipe (settings that shape vectors, words and the form of the index,
identities of corpus and weights) and the sentence that says how an index differs from it. Which runtime encodes, on how
many threads, and how far a search looks shape nothing that is stored, so they are no part of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.retrieval.encoder import EncoderIdentity
from services.retrieval.terms import TERMS_VERSION
from shared.files import MANIFEST, ArtifactError, Manifest, hash_file, read_manifest
from shared.settings import IndexSettings, Settings

REMEDY = "make it again with `python -m services.retrieval.build`"

# Settings that shape each kind of index; `auto` may become flat or hnsw.
SHAPED_BY = {
    "auto": ("hnsw_m",),
    "flat": (),
    "hnsw": ("hnsw_m",),
    "ivf_sq": ("lists",),
    "ivf_pq": ("lists", "pq_bytes"),
}


@dataclass(frozen=True)
class Recipe:
    """The `settings` and `made_from` of an index manifest."""

    settings: Mapping[str, Any]
    made_from: Mapping[str, str]
    encoder: EncoderIdentity


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


def recipe(corpus: Manifest, encoder: EncoderIdentity, index: IndexSettings) -> Recipe:
    """What an index of this corpus with this encoder in this form is made from."""
    form = {key: getattr(index, key) for key in ("kind", *SHAPED_BY[index.kind])}
    return Recipe(
        settings={**encoder.as_settings(), **form, "terms": TERMS_VERSION},
        made_from={"corpus": corpus.identity, "encoder": encoder.weights},
        encoder=encoder,
    )


def same_encoder(folder: Path, wanted: Recipe) -> bool:
    """Whether `folder` holds an index with vectors of the recipe's encoder, whatever texts they belong to."""
    try:
        found = read_manifest(folder)
    except ArtifactError:
        return False
    settings = wanted.encoder.as_settings()
    return found.made_from.get("encoder") == wanted.encoder.weights and settings == {
        key: found.settings.get(key) for key in settings
    }


def damaged_file(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of these files of a published index that is not what its manifest names; None when all are."""
    digests = read_manifest(folder).files
    return next((folder / name for name in names if hash_file(folder / name) != digests.get(name)), None)


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
                f"index made with other settings: expected {key} = {value!r}, "
                f"{folder} was made with {found.settings.get(key)!r}; {REMEDY}"
            )
    if found.made_from.get("encoder") != wanted.made_from["encoder"]:
        return (
            f"index made with other encoder weights: expected {wanted.made_from['encoder'][:19]}, "
            f"{folder} was made with {str(found.made_from.get('encoder'))[:19]}; {REMEDY}"
        )
    return None
