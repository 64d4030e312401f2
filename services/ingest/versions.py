"""Which record of a PMID stands, when files repeat, revise and delete records.

Files are met in order, records in file order. Of two records with one PMID the higher PMID version stands, and of
equal versions the later one. A deletion removes the record met so far, unless a higher version of it stands; a record
that comes after its deletion counts again. Every record that does not stand is counted once in `replaced` or `deleted`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is: number of its file and its position there, both from 0."""

    file: int
    position: int
    version: int


class Standing:
    """PMID → place of the record that stands. Memory: one small entry per PMID, no text."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.replaced = 0
        self.deleted = 0

    def add(self, pmid: str, place: Place) -> None:
        """Meet a record; call in the order of the input."""
        held = self.places.get(pmid)
        if held is not None:
            self.replaced += 1
            if held.version > place.version:
                return
        self.places[pmid] = place

    def delete(self, pmid: str, version: int) -> None:
        """Meet a deletion; one of an unknown PMID means nothing here."""
        held = self.places.get(pmid)
        if held is not None and held.version <= version:
            del self.places[pmid]
            self.deleted += 1

    def stands(self, pmid: str, *, file: int, position: int) -> bool:
        """Whether the record at this place is the one that stands."""
        held = self.places.get(pmid)
        return held is not None and (held.file, held.position) == (file, position)
