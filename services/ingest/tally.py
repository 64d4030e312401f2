"""The fate of every record of one ingest run: a plain counter and the one equation that must hold.

Keys: `read` (records met in the input), `kept` (rows of the corpus), `dropped_<reason>`, and whatever else a source
counts (`files`, `found`, …). Every record read has exactly one fate: read = kept + sum of dropped_<reason>.
"""

from collections import Counter

DROPPED = "dropped_"


def drop(counts: Counter[str], reason: str, number: int = 1) -> None:
    """Count `number` records as dropped for `reason` (a word such as `no_abstract`)."""
    counts[DROPPED + reason] += number


def settle(counts: Counter[str], kept: int) -> dict[str, int]:
    """The counts of the manifest, `kept` included; AssertionError, a defect of ours, when a record has no fate."""
    dropped = sum(number for name, number in counts.items() if name.startswith(DROPPED))
    if counts["read"] != kept + dropped:
        raise AssertionError(f"read {counts['read']} records, but kept {kept} and dropped {dropped}: {dict(counts)}")
    return {"read": counts["read"], **dict(sorted(counts.items())), "kept": kept}
