"""Which files go when disk is short: a pure plan over parts of the disk, each with its files and why it stays.

In: parts, and how many bytes are wanted of kept files, of scratch, and of either. Out: the parts to free, in order:
scratch before kept files, in each the oldest first, and no more of them than it takes. A file with several names
(hard links) is counted once, and is free only when all its names go. Touches nothing; `disk_parts.py` makes the parts
and `storage.py` frees them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Place = Literal["kept", "scratch"]


@dataclass(frozen=True, slots=True)
class Inode:
    """A file on disk, whatever its names; `links` is the number of them anywhere."""

    device: int
    number: int
    size: int = field(compare=False)
    links: int = field(compare=False)


Files = Mapping[Inode, int]  # file → how many of its names are meant


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose files they are: "" and 0 for none."""

    place: Place
    run: str = ""
    round: int = 0
    role: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """What lies at one path. What may not be freed has `stays`, the reason, and nothing that `goes`."""

    path: Path
    kind: str
    origin: Origin
    files: Files
    changed: float  # of its newest file, in seconds since 1970
    goes: Files = field(default_factory=dict)
    stays: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Bytes to be freed."""

    kept: int = 0
    scratch: int = 0
    either: int = 0  # at least so many of kept files and scratch together


def choose(parts: Iterable[Part], wanted: Wanted) -> list[Part]:
    """The parts to free, first one first; all that may go, when that is not enough."""
    chosen: list[Part] = []
    for part in in_order(parts):
        if lacking(chosen, wanted, part.origin.place):
            chosen.append(part)
    return chosen


def in_order(parts: Iterable[Part]) -> list[Part]:
    """All parts that may go and would free something, in the order in which they go."""
    going = [part for part in parts if part.goes and not part.stays]
    useful = set(released(going))
    return sorted(
        (part for part in going if not useful.isdisjoint(part.goes)),
        key=lambda part: (part.origin.place == "kept", part.changed, str(part.path)),
    )


def lacking(chosen: Sequence[Part], wanted: Wanted, place: Place) -> bool:
    """Whether one more part of `place` is needed after the chosen ones."""
    of_place = [part for part in chosen if part.origin.place == place]
    needed = wanted.kept if place == "kept" else wanted.scratch
    return freed(of_place) < needed or freed(chosen) < wanted.either


def freed(parts: Iterable[Part]) -> int:
    """Bytes that are free once these parts are gone."""
    return sum(inode.size for inode in released(parts))


def released(parts: Iterable[Part]) -> list[Inode]:
    """The files none of whose names are left once these parts are gone."""
    names: Counter[Inode] = Counter()
    for part in parts:
        names.update(part.goes)
    return [inode for inode, count in names.items() if count >= inode.links]


def total(parts: Iterable[Part]) -> int:
    """Bytes of all files of these parts, each counted once."""
    return sum(inode.size for inode in {inode for part in parts for inode in part.files})


def shares(parts: Iterable[Part]) -> list[int]:
    """Bytes of each part; a file of several parts counts for the first of them."""
    seen: set[Inode] = set()
    sizes = []
    for part in parts:
        own = part.files.keys() - seen
        seen |= own
        sizes.append(sum(inode.size for inode in own))
    return sizes
