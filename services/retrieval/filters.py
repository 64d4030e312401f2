"""Which papers may be found: columns of year, journal, MeSH terms and publication types, beside the vectors.

Files in an artifact's folder `filters`: `year.npy`, the year of each row (0: none known), and for each field its names,
folded and sorted, in `<field>.json`, and the rows of name i, ascending, in `<field>.rows.npy` from `<field>.starts.npy`
[i] to [i + 1]. Arrays are mapped into memory. Names match whatever their case, dots and spaces; one that no paper has
allows nothing.
"""

import json
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from services.retrieval.nearest import Mask
from services.retrieval.query import Filters
from services.retrieval.recipe import REMEDY
from shared.files import ArtifactError
from shared.records import Paper

FOLDER = "filters"
YEAR = "year.npy"
FIELDS = ("journals", "mesh_terms", "publication_types")  # as Filters has them
MASK_BYTES = 64 * 1024**2  # of the masks that are kept


def folded(name: str) -> str:
    """A name without case, dots and needless spaces: "J. Clin. Invest." and "j clin  invest" are the same."""
    return " ".join(name.replace(".", " ").casefold().split())


def names_of(paper: Paper) -> dict[str, set[str]]:
    """The folded names of a paper by field; a journal has its full name and its abbreviation."""
    given = {
        "journals": (paper.journal, paper.journal_abbreviation),
        "mesh_terms": paper.mesh_terms,
        "publication_types": paper.publication_types,
    }
    return {field: {name for name in map(folded, names) if name} for field, names in given.items()}


def year_of(paper: Paper) -> int:
    """The year of publication; 0 when it is not known."""
    year = paper.pub_date[:4]
    return int(year) if len(year) == 4 and year.isascii() and year.isdecimal() else 0


def write_filters(papers: Iterable[Paper], folder: Path) -> None:
    """Write the columns of all papers, in order, into an artifact's building folder.

    Takes eight bytes of memory for each name of each paper.
    """
    target = folder / FOLDER
    target.mkdir(parents=True)
    years = array("H")
    columns = {field: Column() for field in FIELDS}
    for row, paper in enumerate(papers):
        years.append(year_of(paper))
        for field, names in names_of(paper).items():
            columns[field].add(row, names)
    np.save(target / YEAR, np.array(years, dtype=np.uint16))
    for field, column in columns.items():
        column.write(target, field)


class Column:
    """The names of one field and the rows of each, for writing; rows come in order."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # by first appearance
        self._named, self._rows = array("i"), array("i")

    def add(self, row: int, names: Iterable[str]) -> None:
        """Take the names of a row."""
        for name in names:
            self._named.append(self._numbers.setdefault(name, len(self._numbers)))
            self._rows.append(row)

    def write(self, folder: Path, field: str) -> None:
        """Write names, rows and starts."""
        names = sorted(self._numbers)
        place = np.empty(len(names), np.int32)
        place[[self._numbers[name] for name in names]] = np.arange(len(names), dtype=np.int32)
        places = place[np.array(self._named, dtype=np.int32)]
        order = np.argsort(places, kind="stable")  # rows stay ascending within a name
        starts = np.concatenate([[0], np.cumsum(np.bincount(places, minlength=len(names)))])
        np.save(folder / f"{field}.rows.npy", np.array(self._rows, dtype=np.int32)[order])
        np.save(folder / f"{field}.starts.npy", starts.astype(np.int64))
        (folder / f"{field}.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


class Postings:
    """The names of one field and the rows of each, for reading."""

    def __init__(self, folder: Path, field: str) -> None:
        self._names: list[str] = json.loads((folder / f"{field}.json").read_text(encoding="utf-8"))
        self._starts = np.load(folder / f"{field}.starts.npy", mmap_mode="r", allow_pickle=False)
        self._rows = np.load(folder / f"{field}.rows.npy", mmap_mode="r", allow_pickle=False)
        if len(self._starts) != len(self._names) + 1 or self._starts[-1] != len(self._rows):
            raise ValueError(f"the files of {field} do not fit one another")

    def any_of(self, names: Iterable[str], length: int) -> Mask:
        """Which of `length` rows have one of the names."""
        mask = np.zeros(length, dtype=np.bool_)
        for name in names:
            wanted = folded(name)
            place = bisect_left(self._names, wanted)
            if place < len(self._names) and self._names[place] == wanted:
                mask[self._rows[self._starts[place] : self._starts[place + 1]]] = True
        return mask


class FilterIndex:
    """The columns of an artifact. Not thread-safe."""

    def __init__(self, years: NDArray[np.uint16], postings: Sequence[Postings]) -> None:
        self._years = years
        self._postings = dict(zip(FIELDS, postings, strict=True))
        self._kept: OrderedDict[Filters, Mask] = OrderedDict()
        self._most_kept = max(1, MASK_BYTES // max(1, len(years)))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The columns in `folder`, memory-mapped; ArtifactError when they are missing or damaged."""
        try:
            years = np.load(folder / YEAR, mmap_mode="r", allow_pickle=False)
            return cls(years, [Postings(folder, field) for field in FIELDS])
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder} holds no columns for filters ({error}); {REMEDY}") from error

    def __len__(self) -> int:
        return len(self._years)

    def allowed(self, filters: Filters) -> Mask | None:
        """Which rows fulfil every condition, shape [len], read-only; None when there is no condition."""
        if not filters:
            return None
        if filters not in self._kept:
            self._kept[filters] = self._made(filters)
            if len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(filters)
        return self._kept[filters]

    def _made(self, filters: Filters) -> Mask:
        mask = np.ones(len(self), dtype=np.bool_)
        if filters.year_from is not None or filters.year_to is not None:
            mask &= self._years > 0
        if filters.year_from is not None:
            mask &= self._years >= filters.year_from
        if filters.year_to is not None:
            mask &= self._years <= filters.year_to
        for field, postings in self._postings.items():
            if names := getattr(filters, field):
                mask &= postings.any_of(names, len(self))
        mask.flags.writeable = False
        return mask
