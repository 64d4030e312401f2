"""The reward as verl calls it: one rollout → {"score": …, parts by name}.

verl's reward workers call `compute_score` the moment a rollout ends. The question goes to the solver service for its
attempts; the parts of `scores.py` are put together; the whole verdict is appended to the run's log as one JSON line.
A service that stays away ends the training (see outage.py): it is never a score.
"""

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from services.trainer.attempts import Attempts
from services.trainer.matching import exact_match
from services.trainer.outage import noting_outage
from services.trainer.paths import run_paths
from services.trainer.scores import Proposal, difficulty, format_parts, format_score, reward
from shared.clients import SearchClient, SolverClient
from shared.records import Attempt
from shared.settings import RewardSettings, Settings, load_settings
from shared.transcript import search_calls

_ATTEMPTS: dict[asyncio.AbstractEventLoop, Attempts] = {}


async def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **_: Any
) -> dict[str, Any]:
    """Score one rollout of `agent_loop.py`. Numbers of the result become verl's validation metrics.

    Raises shared.clients.ServiceError when solver or search stay away for `trainer.patience_s`.
    """
    settings = load_settings()
    trajectory = json.loads(extra_info["trajectory"])
    proposal = read_proposal(trajectory, hop=hop_of(data_source), document=extra_info["document"])
    with noting_outage():
        attempts = await attempt_question(proposal, settings)
    verdict = judge(proposal, attempts, settings.trainer.reward)
    append_verdict(
        run_paths(settings).log,
        {
            "time": time.time(),
            "split": extra_info["split"],
            "step": trajectory["step"],
            "index": int(extra_info["index"]),
            "pmid": extra_info["pmid"],
            "hop": proposal.hop,
            "question": proposal.question,
            "answer": proposal.answer,
            "turns": trajectory["turns"],
            "searches": [{"queries": s["queries"], "pmids": s["pmids"]} for s in trajectory["searches"]],
            "attempts": [{"answer": a.answer, "ended": a.ended, "searches": a.searches} for a in attempts],
            "trained_tokens": trajectory["trained_tokens"],
            **verdict,
        },
    )
    return verdict


def judge(proposal: Proposal, attempts: list[Attempt], settings: RewardSettings) -> dict[str, float]:
    """All parts of the reward by name, and their sum as `score`. Pure."""
    parts = format_parts(proposal)
    form = format_score(parts, settings.format_form)
    correct = sum(exact_match(attempt.answer, proposal.answer) for attempt in attempts)
    hard = difficulty(correct, len(attempts)) if attempts else 0.0
    return {
        "score": reward(form, hard, settings.format_weight),
        "format": form,
        "difficulty": hard,
        **{f"format_{name}": value for name, value in parts.items()},
        "attempts_made": float(len(attempts)),
        "attempts_correct": float(correct),
        "searches_made": float(proposal.searches),
        "calls_failed": float(proposal.failed_calls),
    }


def read_proposal(trajectory: dict[str, Any], *, hop: int, document: str) -> Proposal:
    """The proposal in a trajectory of `agent_loop.py`."""
    calls = [call for turn in trajectory["turns"] for call in search_calls(turn)]
    fruitful = [search for search in trajectory["searches"] if search["pmids"]]
    return Proposal(
        turns=tuple(trajectory["turns"]),
        hop=hop,
        searches=len(fruitful),
        failed_calls=len(calls) - len(fruitful),
        evidence="\n".join([document, *(search["text"] for search in trajectory["searches"])]),
    )


def hop_of(data_source: str) -> int:
    """The hop number of `search_biomedical_<hop>`; ValueError for any other source."""
    name, _, hop = data_source.rpartition("_")
    if name != "search_biomedical" or not hop.isdigit():
        raise ValueError(f"expected a data_source of the form search_biomedical_<hop>, got {data_source!r}")
    return int(hop)


async def attempt_question(proposal: Proposal, settings: Settings) -> list[Attempt]:
    """The solver's attempts, or none when there is no question with an answer to try."""
    if not proposal.question or not proposal.answer:
        return []
    loop = asyncio.get_running_loop()
    if loop not in _ATTEMPTS:
        _ATTEMPTS[loop] = make_attempts(settings)
    return await _ATTEMPTS[loop].answer(proposal.question, settings.trainer.search_top_k)


def make_attempts(settings: Settings) -> Attempts:
    """Attempts against the services of the settings."""
    patience, concurrency = settings.trainer.patience_s, settings.trainer.reward.concurrency
    return Attempts(
        SolverClient(settings.solver.url, patience_s=patience, connections=concurrency),
        SearchClient(settings.retrieval.url, patience_s=patience, connections=concurrency),
        settings.trainer.reward,
        model=settings.solver.served_name,
    )


def append_verdict(folder: Path, verdict: dict[str, Any]) -> None:
    """Append one line to this worker's file of verdicts; readers ignore a line that a kill has cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(verdict, ensure_ascii=False) + "\n"
    with (folder / f"verdicts-{os.getpid()}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line)
