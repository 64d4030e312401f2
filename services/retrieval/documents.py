"""Papers that were found lately, each with its JSON: what a reply is joined from without encoding it again.

One of these belongs to one version of the corpus. Bounded; what has not been used for longest goes first.
"""

from collections import OrderedDict

from pydantic_core import to_json

from shared.records import Paper

KEPT = 4096  # about 12 kB each


class Documents:
    """PMID → paper and the bytes of its corpus record. Lives in one thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Paper, bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def paper(self, pmid: str) -> Paper | None:
        """The paper if it is here."""
        kept = self._kept.get(pmid)
        return kept and kept[0]

    def body(self, paper: Paper) -> bytes:
        """The JSON of a paper's record."""
        kept = self._kept.get(paper.pmid)
        if kept is not None:
            self._kept.move_to_end(paper.pmid)
            return kept[1]
        body = to_json(paper.as_record())
        self._kept[paper.pmid] = (paper, body)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return body
