"""The solver's reward in its own training: exact match of the last answer (arXiv 2601.07055, §3.3). Pure.

Only the solver's own turns are read, never a search result. The biomedical match is measured beside it and not paid.
"""

from collections.abc import Sequence

from services.trainer.matching import exact_match, synonymous
from shared.transcript import last_tag


def answer_parts(turns: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """`score` is 1 for an answer that equals one of the gold answers after normalisation, else 0.

    Raises ValueError without a gold answer.
    """
    if not golds or not all(golds):
        raise ValueError(f"expected at least one gold answer, got {list(golds)!r}; check questions.parquet")
    answer = last_tag("\n".join(turns), "answer")
    exact = any(exact_match(answer, gold) for gold in golds)
    return {
        "score": float(exact),
        "exact_match": float(exact),
        "biomedical_match": float(exact or any(synonymous(answer, gold) for gold in golds)),
        "answered": float(bool(answer)),
    }
