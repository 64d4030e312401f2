"""Where the vectors are searched: on the GPUs that have room for them, or on the CPU by FAISS.

Decided before anything is loaded, from the size of the vectors and the free memory that each card reports, and said in
one log line with both numbers and in a gauge. Other forms of index have their place in `open_index`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog
from prometheus_client import Gauge

from services.retrieval.card_index import GROUP, SIZE, CardIndex, stored
from services.retrieval.index import FlatIndex
from shared.files import ArtifactError
from shared.hardware import GIB
from shared.metrics import REGISTRY
from shared.settings import RetrievalSettings

HELD = Gauge("drzero_retrieval_index_bytes", "Bytes of the vectors that are searched.", ["place"], registry=REGISTRY)


class Card(NamedTuple):
    """A device by torch's name, and what tells its free memory in bytes; asking takes memory on the card."""

    device: str
    free_bytes: Callable[[], int]


def open_index(folder: Path, settings: RetrievalSettings, encoder_card: int | None) -> FlatIndex | CardIndex:
    """The index of a published artifact where the settings want it and it fits; `encoder_card` None is the CPU.

    ArtifactError when a GPU is demanded and there is none.
    """
    flat = FlatIndex.read(folder, threads=settings.encoder.threads)
    wanted = settings.index.device
    on_gpu = wanted == "cuda" or (wanted == "auto" and encoder_card is not None)
    searched = on_cards(flat, cards(encoder_card), settings.index.reserve_gb) if on_gpu and len(flat) else None
    index = searched or flat
    for place, held in index.bytes_by_place.items():
        HELD.labels(place).set(held)
    return index


def cards(encoder_card: int | None) -> list[Card]:
    """All GPUs, the encoder's first."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ArtifactError("retrieval.index.device is 'cuda', but torch sees no GPU; use auto or cpu")
    numbers = sorted(range(count), key=lambda number: number != encoder_card)
    return [Card(f"cuda:{number}", partial(_free_bytes, number)) for number in numbers]


def on_cards(flat: FlatIndex, cards: Sequence[Card], reserve_gb: float) -> CardIndex | None:
    """The vectors on the first cards that hold them together; None, and a warning, when all are too few."""
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    free: list[int] = []
    rows: list[int] = []
    for card in cards:
        free.append(card.free_bytes())
        rows = spread(len(flat), flat.dim * SIZE, [int(there - reserve_gb * GIB) for there in free])
        if rows:
            break
    sizes = {
        "needed_gb": round(stored(len(flat)) * flat.dim * SIZE / GIB, 3),
        "free_gb": [round(there / GIB, 3) for there in free],
        "reserve_gb": reserve_gb,
    }
    if not rows:
        log.warning("the GPUs have no room for the vectors; they are searched on the CPU", **sizes)
        return None
    used = zip(cards, rows, strict=False)  # not every card was asked
    index = CardIndex.of(flat, [(card.device, count) for card, count in used if count])
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
