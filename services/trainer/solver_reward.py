"""The solver's reward in its own training, as verl calls it: exact match of the last answer (arXiv 2601.07055, §3.3).

Only the solver's own turns are read, never a search result. The biomedical match is measured beside it and not paid.
verl finds the function by `reward.custom_reward_function.path=pkg://services.trainer.solver_reward`.
"""

import json
from collections.abc import Mapping
from typing import Any

from services.trainer.matching import exact_match, synonymous
from services.trainer.reward import hop_of
from shared.transcript import last_tag, split_response


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **_: Any
) -> dict[str, float]:
    """1 for an answer that equals one of the gold answers after normalisation, else 0.

    Raises ValueError for a data source other than `search_biomedical_<hop>` and for a row without a gold answer.
    """
    hop_of(data_source)
    golds = gold_answers(ground_truth)
    answer = last_tag("\n".join(own_turns(solution_str, extra_info or {})), "answer")
    exact = any(exact_match(answer, gold) for gold in golds)
    return {
        "score": float(exact),
        "exact_match": float(exact),
        "biomedical_match": float(exact or any(synonymous(answer, gold) for gold in golds)),
        "answered": float(bool(answer)),
    }


def own_turns(solution: str, info: Mapping[str, Any]) -> list[str]:
    """The solver's turns: those its rollout brought along, or those of the decoded response."""
    if "trajectory" in info:
        return list(json.loads(info["trajectory"])["turns"])
    return split_response(solution)[0]


def gold_answers(ground_truth: Any) -> list[str]:
    """Gold answers from verl's forms: a text, a list of texts, or {"target": either}."""
    target = ground_truth.get("target") if isinstance(ground_truth, Mapping) else ground_truth
    golds = [target] if isinstance(target, str) else list(target if target is not None else [])
    if not golds or not all(isinstance(gold, str) and gold for gold in golds):
        raise ValueError(f"expected at least one gold answer, got {ground_truth!r}; check the questions parquet")
    return golds
