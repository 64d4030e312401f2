"""Where the vectors are searched: on the GPUs that have room for them, or on the CPU in the form that was built.

Decided before anything is loaded, from the size of the vectors and the free memory that each card reports, and said in
one log line with both numbers and in a gauge. GPUs search all vectors exactly, so they take no other form.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog
from prometheus_client import Gauge

from services.retrieval import vector_file
from services.retrieval.card_index import GROUP, SIZE, CardIndex, stored
from services.retrieval.cores import cores
from services.retrieval.faiss_index import FaissIndex, file_of
from services.retrieval.flat_index import FlatIndex
from services.retrieval.index import VectorIndex
from services.retrieval.nearest import Finder, Vectors
from services.retrieval.vectors import Kind, kind_for, require_memory
from shared.files import ArtifactError
from shared.hardware import GIB
from shared.metrics import REGISTRY
from shared.settings import IndexSettings, RetrievalSettings

EXACT = ("auto", "flat")  # kinds whose vectors go to a GPU

HELD = Gauge("drzero_retrieval_index_bytes", "Bytes of the vectors that are searched.", ["place"], registry=REGISTRY)


class Card(NamedTuple):
    """A device by torch's name, and what tells its free memory in bytes; asking takes memory on the card."""

    device: str
    free_bytes: Callable[[], int]


def open_vectors(folder: Path, settings: RetrievalSettings, encoder_card: int | None) -> VectorIndex:
    """The vectors of a published artifact, where the settings want them and they fit; `encoder_card` None is the CPU.

    ArtifactError when a file is missing or damaged, the memory can never do, or a GPU is demanded and there is none.
    """
    vectors = vector_file.read(folder)
    kind = kind_of(folder, settings.index, len(vectors))
    wanted = settings.index.device
    if wanted == "cuda" and kind != "flat":
        raise ArtifactError(
            f"retrieval.index.device is 'cuda' and retrieval.index.kind {kind!r}, but GPUs search exactly; "
            "set the kind to flat, or the device to cpu"
        )
    on_gpu = wanted == "cuda" or (wanted == "auto" and encoder_card is not None and settings.index.kind in EXACT)
    cards = all_cards(encoder_card) if on_gpu and len(vectors) else []
    finder = on_cards(vectors, cards, settings.index.reserve_gb) if cards else None
    index = VectorIndex(vectors, finder or on_cpu(folder, vectors, kind, settings))
    HELD.clear()  # an index before this one may have lain elsewhere
    for place, held in index.bytes_by_place.items():
        HELD.labels(place).set(held)
    return index


def kind_of(folder: Path, settings: IndexSettings, rows: int) -> Kind:
    """The kind to search: the one that is set, which must have been built, or for `auto` what there is."""
    kind = kind_for(settings, rows)
    if kind == "flat" or (folder / file_of(kind)).is_file():
        return kind
    if settings.kind == "auto":
        return "flat"
    raise ArtifactError(
        f"retrieval.index.kind is {kind!r}, expected {file_of(kind)} in {folder}, found none; "
        "make the index again with `python -m services.retrieval.build`"
    )


def on_cpu(folder: Path, vectors: Vectors, kind: Kind, settings: RetrievalSettings) -> Finder:
    """The finder of a kind, once it is known that its memory can be had."""
    file = folder / (vector_file.FILE if kind == "flat" else file_of(kind))
    require_memory(f"searching {len(vectors):,} vectors as {kind}", file.stat().st_size)
    threads = cores(settings.encoder.threads)
    if kind == "flat":
        return FlatIndex(vectors, threads=threads)
    index = FaissIndex.read(folder, kind, settings.index, threads=threads)
    if len(index) != len(vectors):
        raise ArtifactError(
            f"expected {len(vectors)} vectors in {file}, found {len(index)}; delete {folder} and make it again"
        )
    return index


def all_cards(encoder_card: int | None) -> list[Card]:
    """All GPUs, the encoder's first."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ArtifactError("retrieval.index.device is 'cuda', but torch sees no GPU; use auto or cpu")
    numbers = sorted(range(count), key=lambda number: number != encoder_card)
    return [Card(f"cuda:{number}", partial(_free_bytes, number)) for number in numbers]


def on_cards(vectors: Vectors, cards: Sequence[Card], reserve_gb: float) -> CardIndex | None:
    """The vectors on the first cards that hold them together; None, and a warning, when all are too few."""
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    free: list[int] = []
    rows: list[int] = []
    for card in cards:
        free.append(card.free_bytes())
        rows = spread(len(vectors), vectors.shape[1] * SIZE, [int(there - reserve_gb * GIB) for there in free])
        if rows:
            break
    sizes = {
        "needed_gb": round(stored(len(vectors)) * vectors.shape[1] * SIZE / GIB, 3),
        "free_gb": [round(there / GIB, 3) for there in free],
        "reserve_gb": reserve_gb,
    }
    if not rows:
        log.warning("the GPUs have no room for the vectors; they are searched on the CPU", **sizes)
        return None
    used = zip(cards, rows, strict=False)  # not every card was asked
    index = CardIndex.of(vectors, [(card.device, count) for card, count in used if count])
    log.info("the vectors are on the GPU", **sizes, bytes_by_place=index.bytes_by_place)
    return index


def spread(rows: int, row_bytes: int, rooms: Iterable[int]) -> list[int]:
    """Rows for each card, in proportion to the bytes it has for them; [] when all together have too few."""
    # A shard is stored in whole groups.
    capacities = [max(0, room) // row_bytes // GROUP * GROUP for room in rooms]
    total = sum(capacities)
    if total < rows:
        return []
    ends = [rows * sum(capacities[: place + 1]) // total for place in range(len(capacities))]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _free_bytes(number: int) -> int:
    import torch

    return int(torch.cuda.mem_get_info(number)[0])
