"""Lists of PMIDs as text files: one a line; blank lines and what follows a # do not count."""

import re
from collections.abc import Iterable
from pathlib import Path

from shared.command import UsageError

PMID = re.compile(r"[1-9][0-9]{0,9}")


def number(text: str) -> int:
    """The PMID as a number; 0 for what is none."""
    return int(text) if PMID.fullmatch(text) else 0


def read_pmids(files: Iterable[Path], variable: str) -> frozenset[str]:
    """The PMIDs of all files; UsageError, which names the variable that lists them, for a bad file or line."""
    found: set[str] = set()
    for file in files:
        if not file.is_file():
            raise UsageError(f"expected the file {file} of {variable}, found none; mend the path")
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            pmid = line.partition("#")[0].strip()
            if pmid and not PMID.fullmatch(pmid):
                raise UsageError(
                    f"{file}, line {number}: expected one PMID, found {pmid[:40]!r}; mend the line or take the file "
                    f"out of {variable}"
                )
            found |= {pmid} if pmid else set()
    return frozenset(found)
