"""Exact inner product on one or several GPUs, by torch: FAISS has no GPU wheel for CUDA 13 or for Hopper.

Vectors are float16 on the cards, in one shard of consecutive rows per card; queries are rounded to float16 as well,
products are summed and compared in float32. Scores are made for a part of the rows at a time, so that they never take
more than SCORE_BYTES, whatever the size of the index. The same calls as `FlatIndex`, made from one. It also works on
the device "cpu", with the same roundings. Not thread-safe.

The best k are found in two steps, which is exact: the k groups of neighbours with the largest maxima hold the k best
scores, so only those groups are sorted, and all scores are read just once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from services.retrieval.encoder import Vectors
from services.retrieval.index import FlatIndex, Rows, hits

if TYPE_CHECKING:
    import torch

GROUP = 64  # neighbours that share a maximum
SCORE_BYTES = 256 << 20  # 64 queries against a million rows
ROWS_PER_COPY = 65_536  # rows that go from the file to a card at once
SIZE = 2  # bytes of a float16


@dataclass(frozen=True)
class Shard:
    """The rows first … first + rows − 1 on one card; vectors of zeros fill the last group."""

    vectors: "torch.Tensor"
    first: int
    rows: int


class CardIndex:
    """All vectors in float16 on cards; exact search among those."""

    def __init__(self, shards: Sequence[Shard], *, score_bytes: int = SCORE_BYTES) -> None:
        self._shards = shards
        self._score_bytes = score_bytes
        self._home = shards[0].vectors.device
        self.dim: int = shards[0].vectors.shape[1]

    @classmethod
    def of(cls, flat: FlatIndex, rows_by_device: Sequence[tuple[str, int]], *, score_bytes: int = SCORE_BYTES) -> Self:
        """The vectors of `flat`, so many consecutive rows on each device."""
        shards: list[Shard] = []
        for device, rows in rows_by_device:
            first = shards[-1].first + shards[-1].rows if shards else 0
            shards.append(Shard(_copied(flat, range(first, first + rows), device), first, rows))
        return cls(shards, score_bytes=score_bytes)

    def __len__(self) -> int:
        return sum(shard.rows for shard in self._shards)

    @property
    def bytes_by_place(self) -> dict[str, int]:
        """Memory of the vectors, by card."""
        return {str(shard.vectors.device): shard.vectors.nbytes for shard in self._shards}

    def vectors(self, rows: NDArray[np.int64]) -> Vectors:
        """The vectors of some rows as they are stored, rounded, shape [n, dim]."""
        found = np.empty((len(rows), self.dim), dtype=np.float32)
        for shard in self._shards:
            here = np.flatnonzero((rows >= shard.first) & (rows < shard.first + shard.rows))
            found[here] = shard.vectors[rows[here] - shard.first].float().cpu().numpy()
        return found

    def search(self, vectors: Vectors, top_k: int) -> list[Rows]:
        """The best min(top_k, len) rows of each vector, best first."""
        if not len(vectors) or not len(self):
            return [[] for _ in range(len(vectors))]
        return hits(*self.nearest(vectors, top_k))

    def nearest(self, vectors: Vectors, top_k: int) -> tuple[Vectors, NDArray[np.int64]]:
        """`search` as arrays: scores and rows, each of shape [n, min(top_k, len)]."""
        import torch

        queries = torch.from_numpy(np.ascontiguousarray(vectors)).half()
        # Every card has its work before the first result is waited for.
        parts = [
            part for shard in self._shards for part in nearest_of(shard, queries, top_k, score_bytes=self._score_bytes)
        ]
        scores, rows = merged([(s.to(self._home), r.to(self._home)) for s, r in parts], min(top_k, len(self)))
        return scores.cpu().numpy(), rows.cpu().numpy()


def nearest_of(
    shard: Shard, queries: "torch.Tensor", top_k: int, *, score_bytes: int
) -> Iterator[tuple["torch.Tensor", "torch.Tensor"]]:
    """The best scores and rows of each part of a shard, each of shape [n, ≤ top_k], on the shard's device."""
    asked = queries.to(shard.vectors.device, non_blocking=True)
    step = max(1, score_bytes // (4 * GROUP * len(queries))) * GROUP
    for start in range(0, shard.rows, step):
        count = min(step, shard.rows - start)
        scores = products(asked, shard.vectors[start : start + step])
        scores[:, count:] = float("-inf")  # the zeros that fill the last group
        found, rows = best(scores, min(top_k, count))
        yield found, rows + (shard.first + start)


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


def _copied(flat: FlatIndex, rows: range, device: str) -> "torch.Tensor":
    """Rows of the file in float16 on a device; the whole never lies in host memory."""
    import torch

    vectors = torch.zeros((stored(len(rows)), flat.dim), dtype=torch.float16, device=device)
    for start in range(0, len(rows), ROWS_PER_COPY):
        piece = np.array(rows[start : start + ROWS_PER_COPY], dtype=np.int64)
        vectors[start : start + len(piece)] = torch.from_numpy(flat.vectors(piece)).to(device)
    return vectors
