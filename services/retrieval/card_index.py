"""All vectors on one or several GPUs, by torch: FAISS has no GPU wheel for CUDA 13 or for Hopper.

Vectors are float16 on the cards, in one shard of consecutive rows per card; queries are rounded to float16 as well,
products are summed and compared in float32. Scores are made for a part of the rows at a time, so that they never take
more than SCORE_BYTES, whatever the size of the index. It also works on the device "cpu", with the same roundings.
Not thread-safe.

The best k are found in two steps: the k groups of neighbours with the largest maxima hold the k best scores, so only
those groups are sorted, and all scores are read just once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from services.retrieval.nearest import Found, Masks, Vectors, by_mask

if TYPE_CHECKING:
    import torch

GROUP = 64  # neighbours that share a maximum
SCORE_BYTES = 256 << 20  # 64 queries against a million rows
ROWS_PER_COPY = 65_536  # rows that go from the file to a card at once
SIZE = 2  # bytes of a float16
ROUNDING = 2.0**-10 * 1.05  # of two float16 numbers in a product, with some room for numbers near 0
SPARE = 32  # candidates beyond those wanted, so that the last one is told apart at the first try
FEW = 4096


@dataclass(frozen=True)
class Shard:
    """The rows first … first + rows − 1 on one card; vectors of zeros fill the last group."""

    vectors: "torch.Tensor"
    first: int
    rows: int


class CardIndex:
    """A finder that reads every vector, in float16 on cards."""

    few = FEW

    def __init__(self, shards: Sequence[Shard], *, score_bytes: int = SCORE_BYTES) -> None:
        self._shards = shards
        self._score_bytes = score_bytes
        self._home = shards[0].vectors.device
        self.slack = ROUNDING + shards[0].vectors.shape[1] * 2.0**-23  # of the numbers, and of their sum

    @classmethod
    def of(cls, stored: Vectors, rows_by_device: Sequence[tuple[str, int]], *, score_bytes: int = SCORE_BYTES) -> Self:
        """The vectors of an index, so many consecutive rows on each device."""
        shards: list[Shard] = []
        for device, rows in rows_by_device:
            first = shards[-1].first + shards[-1].rows if shards else 0
            shards.append(Shard(_copied(stored[first : first + rows], device), first, rows))
        return cls(shards, score_bytes=score_bytes)

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """Memory of the vectors, by card."""
        return {str(shard.vectors.device): shard.vectors.nbytes for shard in self._shards}

    def candidates(self, top_k: int) -> int:
        """Some more than wanted."""
        return top_k + SPARE

    def nearest(self, vectors: Vectors, count: int, masks: Masks) -> Found:
        """The best rows by rounded scores, best first."""
        import torch

        queries = torch.from_numpy(np.ascontiguousarray(vectors)).half()
        # Every card has its work before the first result is waited for.
        parts = [part for shard in self._shards for part in self._parts(shard, queries, count, masks)]
        here = [(scores.to(self._home), rows.to(self._home)) for scores, rows in parts]
        scores, rows = merged(here, min(count, sum(shard.rows for shard in self._shards)))
        return Found(scores.cpu().numpy(), rows.cpu().numpy())

    def _parts(
        self, shard: Shard, queries: "torch.Tensor", count: int, masks: Masks
    ) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
        """The best scores and rows of each part of a shard, each of shape [n, ≤ count], on the shard's device."""
        asked = queries.to(shard.vectors.device, non_blocking=True)
        step = max(1, self._score_bytes // (4 * GROUP * len(queries))) * GROUP
        for start in range(0, shard.rows, step):
            rows = min(step, shard.rows - start)
            scores = products(asked, shard.vectors[start : start + step])
            scores[:, rows:] = float("-inf")  # the zeros that fill the last group
            forbid(scores, shard.first + start, rows, masks)
            found, places = best(scores, min(count, rows))
            yield found, places + (shard.first + start)


def forbid(scores: "torch.Tensor", first: int, rows: int, masks: Masks) -> None:
    """−∞ for the rows from `first` that a query's mask does not allow; each mask is copied to the card once."""
    import torch

    for mask, places in by_mask(masks):
        if mask is not None:
            allowed = torch.from_numpy(np.array(mask[first : first + rows])).to(scores.device)
            queries = torch.from_numpy(places).to(scores.device)
            scores[queries, :rows] = scores[queries, :rows].masked_fill(~allowed, float("-inf"))


def products(queries: "torch.Tensor", vectors: "torch.Tensor") -> "torch.Tensor":
    """Inner products of float16 rows in float32, [n, dim] and [m, dim] → [n, m]."""
    import torch

    if vectors.is_cuda:
        return torch.mm(queries, vectors.T, out_dtype=torch.float32)
    return torch.mm(queries.float(), vectors.float().T)  # a CPU has no such product


def best(scores: "torch.Tensor", top_k: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The largest scores of each row and their columns, best first: [n, m] → two of [n, top_k]; m in whole groups."""
    groups = scores.view(len(scores), -1, GROUP)
    chosen = groups.amax(dim=-1).topk(min(top_k, groups.shape[1]), sorted=False).indices
    candidates = groups.gather(1, chosen.unsqueeze(-1).expand(-1, -1, GROUP)).flatten(1)
    found, places = candidates.topk(top_k)
    return found, chosen.gather(1, places // GROUP) * GROUP + places % GROUP


def merged(parts: Sequence[tuple["torch.Tensor", "torch.Tensor"]], top_k: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The best of several lists of scores and rows, best first."""
    import torch

    if len(parts) == 1:
        return parts[0]
    scores, places = torch.cat([scores for scores, _ in parts], dim=1).topk(top_k)
    return scores, torch.cat([rows for _, rows in parts], dim=1).gather(1, places)


def stored(rows: int) -> int:
    """Rows that a shard of so many takes: whole groups."""
    return -(-rows // GROUP) * GROUP


def _copied(some: Vectors, device: str) -> "torch.Tensor":
    """Rows of the file in float16 on a device; the whole never lies in host memory."""
    import torch

    vectors = torch.zeros((stored(len(some)), some.shape[1]), dtype=torch.float16, device=device)
    for start in range(0, len(some), ROWS_PER_COPY):
        piece = torch.from_numpy(np.array(some[start : start + ROWS_PER_COPY]))
        vectors[start : start + len(piece)] = piece.to(device)
    return vectors
