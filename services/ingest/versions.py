"""Which record of a PMID stands, when files repeat, revise and delete records.

Files are met in order, records in file order. Of two records with one PMID the higher PMID version stands, and of
equal versions the later one. A deletion removes the record met so far, unless a higher version of it stands; a record
that comes after its deletion counts again. Every record that does not stand is counted once as replaced or deleted.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.ledger import Ledger

HELD, NOTHING = -2, -1


@dataclass(frozen=True)
class Events:
    """Records and deletions in the order of the input; columns of shape [k]. PMID 0 is a record without a PMID."""

    pmids: NDArray[np.int64]
    versions: NDArray[np.uint8]
    deletes: NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: list["Events"]) -> "Events":
        """All parts, one behind the other."""
        return cls(
            np.concatenate([np.empty(0, np.int64), *(part.pmids for part in parts)]),
            np.concatenate([np.empty(0, np.uint8), *(part.versions for part in parts)]),
            np.concatenate([np.empty(0, np.bool_), *(part.deletes for part in parts)]),
        )


@dataclass(frozen=True)
class Settled:
    """Which of the events are records that stand, which entries of the ledger remain, and what became of the others."""

    stands: NDArray[np.bool_]  # shape [k]
    remains: NDArray[np.bool_]  # shape [n]
    replaced: int
    deleted: int


def settled(events: Events, ledger: Ledger) -> Settled:
    """Meet the events in order, after all that the ledger holds."""
    stands, remains = np.zeros(len(events.pmids), bool), np.ones(len(ledger), bool)
    replaced = deleted = 0
    named = np.flatnonzero(events.pmids)
    order = named[np.argsort(events.pmids[named], kind="stable")]
    starts = np.flatnonzero(np.diff(events.pmids[order], prepend=0))
    ends = np.append(starts[1:], len(order))
    held = ledger.places(events.pmids[order[starts]])
    plain = (ends - starts == 1) & (held < 0)  # most PMIDs are new and come once: no Python for them
    stands[order[starts[plain]]] = ~events.deletes[order[starts[plain]]]
    for group in np.flatnonzero(~plain).tolist():
        entry = int(held[group])
        version = None if entry < 0 else int(ledger.versions[entry])
        standing, out, gone = _replayed(events, order[starts[group] : ends[group]].tolist(), version)
        replaced, deleted = replaced + out, deleted + gone
        if standing >= 0:
            stands[standing] = True
        if entry >= 0 and standing != HELD:
            remains[entry] = False
    return Settled(stands, remains, replaced, deleted)


def _replayed(events: Events, met: list[int], version: int | None) -> tuple[int, int, int]:
    """Of the events of one PMID, the one that stands in the end, and how many records were replaced and deleted.

    `version` is that of the ledger's entry, None without one. HELD: that entry stands; NOTHING: no record does.
    """
    standing, current = (NOTHING, 0) if version is None else (HELD, version)
    replaced = deleted = 0
    for event in met:
        new = int(events.versions[event])
        if events.deletes[event]:
            if standing != NOTHING and current <= new:
                standing, deleted = NOTHING, deleted + 1
            continue
        replaced += standing != NOTHING
        if standing == NOTHING or current <= new:
            standing, current = event, new
    return standing, replaced, deleted
