"""What an ingest run will take, before anything is fetched: `--dry-run`.

Rules of thumb with their measured bases, for decisions such as "tonight or over the weekend"; not a promise.
"""

from dataclasses import dataclass

# Measured on 28,936 PubMed records on one core of a small machine; see docs/decisions.md.
CORPUS_BYTES = 1_000  # of a paper in the corpus
REPLY_BYTES = 2_500  # of a record in EFetch's replies, gzipped, kept until the corpus is published
PACKED_BYTES = 2_000  # of a record in a gzipped PubMed file
PLAIN_BYTES = 12_000  # of a record in a plain PubMed file
PARSED_PER_S = 4_000  # records that one core parses, both passes


@dataclass(frozen=True, slots=True)
class Estimate:
    """Papers before filters, calls to NCBI, seconds, and bytes in the data and in the scratch folder."""

    papers: int
    requests: int
    seconds: float
    data_bytes: int
    scratch_bytes: int

    def told(self) -> dict[str, object]:
        """The fields of the log line."""
        return {
            "papers": self.papers,
            "requests": self.requests,
            "minutes": round(self.seconds / 60, 1),
            "data_mb": round(self.data_bytes / 1e6, 1),
            "scratch_mb": round(self.scratch_bytes / 1e6, 1),
        }


def of_query(found: int, *, limit: int, batch: int, cap: int, rate: float) -> Estimate:
    """For a query that finds `found` papers: batches and the searches of its windows, at `rate` requests a second."""
    papers = min(found, limit)
    windows = -(-papers // cap)
    requests = -(-papers // batch) + 4 * windows
    return Estimate(papers, requests, requests / rate, papers * CORPUS_BYTES, papers * REPLY_BYTES)


def of_files(packed_bytes: int, plain_bytes: int, *, processes: int) -> Estimate:
    """For PubMed files of these sizes, gzipped and plain."""
    papers = packed_bytes // PACKED_BYTES + plain_bytes // PLAIN_BYTES
    return Estimate(papers, 0, papers / (PARSED_PER_S * processes), papers * CORPUS_BYTES, 0)
