"""The reward as verl calls it, rollout by rollout while others still run, and as a batch for other callers.

`compute_score` is verl's streaming entry: the moment a proposer's rollout ends, its question goes to the solver service
for its attempts, `judge.py` puts the parts together, and the verdict is appended to the run's log as one JSON line; a
solver's rollout is compared with the gold answer (`solver_reward.py`). In training
verl is not kept waiting for that: it gets `PENDING`, and the trainer collects the verdicts when it has nothing else to
do (`late_rewards.py`).
`compute_biomedical_challenger_score_batch` does the same for a list of responses. A service that stays away makes a
rollout invalid, never wrong; what then happens to the batch is decided in `verl_trainer.py`.
"""

import asyncio
import hashlib
import json
import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from services.trainer.attempts import Attempts
from services.trainer.biomedical import likeness, reasoning_type
from services.trainer.conversations import Conversations
from services.trainer.gate import form_at
from services.trainer.judge import Surroundings, invalid_reason, judge, worth_attempting
from services.trainer.matching import normalise
from services.trainer.paths import RunPaths, run_paths
from services.trainer.protocol import example_questions, hop_of
from services.trainer.recent import RecentQuestions
from services.trainer.records import TRAIN, Verdict, append_defect
from services.trainer.scores import Proposal
from services.trainer.solver_reward import answer_parts
from services.trainer.tokens import Tokens
from shared.balance import addresses_in
from shared.clients import SearchClient, SolverClient
from shared.corpus import Corpus
from shared.files import ArtifactError
from shared.model_files import resolve_model
from shared.records import Attempt
from shared.settings import Settings, load_settings
from shared.transcript import last_tag, search_calls, split_response

COPIED = 0.8  # likeness to a worked example's question above which it is that question
PMID_SHOWN = re.compile(r"\bPMID (\d{1,9}):")

# What `agent_loop.py` measures; responses that others have made lack it.
MEASURED = ("rollout", "seconds_generating", "seconds_searching", "generated")
PENDING = {"score": 0.0, "valid": 1.0}  # until the verdict is there

T = TypeVar("T")
Scores = list[dict[str, float]]
Scored = tuple[dict[str, float], Verdict]  # the numbers that verl keeps, and the whole verdict for the log


@dataclass(frozen=True, slots=True)
class Judging:
    """What a worker needs to judge rollouts: settings, places, and the objects it shares among them."""

    settings: Settings
    paths: RunPaths
    solver: SolverClient
    search: SearchClient
    attempts: Attempts
    recent: RecentQuestions
    late: set[asyncio.Task[Scored]] = field(default_factory=set)  # asyncio itself keeps none alive

    async def close(self) -> None:
        """Close the connections."""
        await self.solver.close()
        await self.search.close()


async def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **_: Any
) -> dict[str, float]:
    """Score one rollout of `agent_loop.py`; the numbers of the result become verl's metrics of a validation.

    A training rollout that is not lost is scored behind the caller's back, who gets PENDING.
    """
    judging = judging_of_this_loop()
    trajectory = json.loads(extra_info["trajectory"])
    scoring = score_and_log(data_source, trajectory, extra_info, judging)
    if extra_info.get("split", TRAIN) != TRAIN or trajectory.get("lost", ""):
        return (await scoring)[0]
    task = asyncio.create_task(scoring)
    judging.late.add(task)
    task.add_done_callback(partial(_settle, judging))
    return PENDING


async def score_and_log(data_source: str, trajectory: dict[str, Any], info: dict[str, Any], judging: Judging) -> Scored:
    """Numbers and verdict of one rollout of the role that is trained; the verdict is in the log then."""
    hop = hop_of(data_source)
    if judging.settings.trainer.role == "solver":
        numbers, verdict = score_answer(trajectory, info)
    else:
        proposal = read_proposal(trajectory, hop=hop, info=info)
        numbers, verdict = await score_proposal(proposal, trajectory, info, judging)
    append_verdict(judging.paths.log, verdict)
    return numbers, verdict


def _settle(judging: Judging, task: asyncio.Task[Scored]) -> None:
    judging.late.discard(task)
    if not task.cancelled() and (error := task.exception()):  # nobody awaits it, so the trainer has to be told
        append_defect(judging.paths.log, "".join(traceback.format_exception(error)))


def compute_biomedical_challenger_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[dict[str, Any]],
    *,
    model_name: str,
    base_url: str,
    reward_rollout_n: int,
    **_: Any,
) -> Scores:
    """Score many decoded responses against the solver `model_name` at `base_url`, `reward_rollout_n` attempts each.

    `base_url` is one address or several separated by commas. `extra_infos` hold at least `document` and `pmid`. The
    result has one dict per response, in order, with `score`, `valid` (0 where the solver or search could not be
    reached: mask such a sample, do not train on its score) and every part by name. Raises ValueError when the lists
    differ in length or a data source is unknown.
    """
    # Before anything is asked of the solver, so that a wrong row costs no attempts.
    samples = list(zip(map(hop_of, data_sources), solution_strs, extra_infos, strict=True))
    base = load_settings()
    reward = base.trainer.reward.model_copy(
        update={"attempts": reward_rollout_n, "min_attempts": min(base.trainer.reward.min_attempts, reward_rollout_n)}
    )
    url = ",".join(address.removesuffix("/v1") for address in addresses_in(base_url))
    solver = base.solver.model_copy(update={"served_name": model_name, "url": url})
    trainer = base.trainer.model_copy(update={"reward": type(reward).model_validate(reward.model_dump())})
    settings = base.model_copy(update={"solver": solver, "trainer": trainer})

    async def score_all() -> Scores:
        judging = make_judging(settings)

        async def one(hop: int, text: str, info: dict[str, Any]) -> dict[str, float]:
            trajectory = read_response(text)
            proposal = read_proposal(trajectory, hop=hop, info=info)
            return (await score_proposal(proposal, trajectory, info, judging))[0]

        try:
            return await asyncio.gather(*[one(*sample) for sample in samples])
        finally:
            await judging.close()

    return in_own_loop(score_all())


def in_own_loop(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, also where the caller has a running event loop, as a notebook does."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def score_proposal(
    proposal: Proposal, trajectory: dict[str, Any], info: dict[str, Any], judging: Judging
) -> Scored:
    """Judge a proposal, after its attempts."""
    reward, step = judging.settings.trainer.reward, int(trajectory.get("step", 0))
    split, lost = info.get("split", TRAIN), trajectory.get("lost", "")
    # Held-out rollouts keep the form of the settings, so that before and after can be compared.
    form = form_at(step, reward, judging.paths.gate) if split == TRAIN else reward.format_form
    recent = judging.recent.before(step, reward.biomedical.novelty_window)
    began, since = time.time(), time.monotonic()
    attempts: list[Attempt] = []
    if not lost and worth_attempting(proposal, reward):
        seeds = attempt_seeds(judging.settings.trainer.seed, step, proposal.question, reward.attempts)
        attempts = await judging.attempts.answer(proposal.question, seeds)
    around = Surroundings(form, recent, corpus_has(judging.paths.corpus))
    numbers = judge(proposal, attempts, reward, around, lost=lost)
    verdict: Verdict = {
        **rollout_row(trajectory, info, began=began),
        "hop": proposal.hop,
        "question": proposal.question,
        "answer": proposal.cited_answer,
        "attempts": [attempt_row(attempt) for attempt in attempts],
        "invalid_reason": invalid_reason(attempts, bool(numbers["valid"]), lost),
        "reasoning_type": reasoning_type(proposal.question),
        "seconds_attempts": time.monotonic() - since,
        **numbers,
    }
    return numbers, verdict


def score_answer(trajectory: dict[str, Any], info: dict[str, Any]) -> Scored:
    """Judge a rollout of the solver's own training."""
    began, lost = time.time(), trajectory.get("lost", "")
    fruitful = sum(bool(search["pmids"]) for search in trajectory["searches"])
    calls = sum(len(search_calls(turn)) for turn in trajectory["turns"])
    numbers = {
        **answer_parts(trajectory["turns"], [info["answer"]]),
        "valid": float(not lost),
        "searches_made": float(fruitful),
        "calls_failed": float(calls - fruitful),
    }
    verdict: Verdict = {
        **rollout_row(trajectory, info, began=began),
        "hop": info["hop"],
        "question": info["question"],
        "answer": last_tag("\n".join(trajectory["turns"]), "answer"),
        "gold": info["answer"],
        "attempts": [],
        "invalid_reason": lost,
        "reasoning_type": reasoning_type(info["question"]),
        "seconds_attempts": 0.0,
        **numbers,
    }
    return numbers, verdict


def rollout_row(trajectory: dict[str, Any], info: dict[str, Any], *, began: float) -> Verdict:
    """What a verdict says of the rollout itself; judging it `began` then."""
    turns = trajectory["turns"]
    return {
        "time": time.time(),
        "began": began,
        "split": info.get("split", TRAIN),
        "step": int(trajectory.get("step", 0)),
        "index": int(info.get("index", 0)),
        "pmid": info["pmid"],
        "turns": turns,
        "searches": [{"queries": s["queries"], "pmids": s["pmids"]} for s in trajectory["searches"]],
        "calls_broken": Counter(call.broken for turn in turns for call in search_calls(turn) if call.broken),
        "trained_tokens": trajectory.get("trained_tokens", 0),
        **{name: trajectory[name] for name in MEASURED if name in trajectory},
    }


def attempt_row(attempt: Attempt) -> dict[str, Any]:
    """An attempt as it stands in the log."""
    row: dict[str, Any] = {"answer": attempt.answer, "ended": attempt.ended, "searches": attempt.searches}
    return row | {"seed": attempt.seed, "seconds": round(attempt.seconds, 3), "problem": attempt.problem}


def attempt_seeds(seed: int, step: int, question: str, count: int) -> list[int]:
    """Sampling seeds of the attempts at a question, in [0, 2³¹): the same for the same run, step and question."""
    digest = hashlib.sha256(f"{seed}|{step}|{question}".encode()).digest()
    first = int.from_bytes(digest[:4], "big")
    return [(first + number) % 2**31 for number in range(count)]


def read_proposal(trajectory: dict[str, Any], *, hop: int, info: dict[str, Any]) -> Proposal:
    """The proposal in a trajectory of `agent_loop.py` or of `read_response`, with the seed of `info`."""
    calls = [call for turn in trajectory["turns"] for call in search_calls(turn)]
    searches = trajectory["searches"]
    # The same search twice finds nothing further: it counts once.
    fruitful = {frozenset(map(normalise, search["queries"])) for search in searches if search["pmids"]}
    proposal = Proposal(
        turns=tuple(trajectory["turns"]),
        hop=hop,
        searches=len(fruitful),
        failed_calls=len(calls) - len(fruitful),
        evidence="\n".join([info["document"], *(search["text"] for search in searches)]),
        seen=(str(info["pmid"]), *(pmid for search in searches for pmid in search["pmids"])),
    )
    return replace(proposal, copied=likeness(proposal.question, example_questions()) > COPIED)


def read_response(text: str) -> dict[str, Any]:
    """A trajectory from a decoded response: turns and search results as the chat template writes them."""
    turns, results = split_response(text)
    queries = [list(call.queries) for turn in turns for call in search_calls(turn) if not call.broken]
    pairs = zip(queries, results, strict=False)
    found = [{"queries": asked, "pmids": PMID_SHOWN.findall(result), "text": result} for asked, result in pairs]
    return {"turns": turns, "searches": found}


@cache
def corpus_has(folder: Path) -> Any:
    """A function that says whether the corpus in `folder` holds a PMID; without a corpus nothing is known."""
    try:
        corpus = Corpus(folder)
    except ArtifactError:
        return lambda pmid: False
    return lambda pmid: corpus.find(pmid) is not None


_JUDGING: dict[asyncio.AbstractEventLoop, Judging] = {}


def judging_of_this_loop() -> Judging:
    """The objects of this worker; made once per event loop, because connections belong to one."""
    loop = asyncio.get_running_loop()
    if loop not in _JUDGING:
        _JUDGING[loop] = make_judging(load_settings())
    return _JUDGING[loop]


def make_judging(settings: Settings) -> Judging:
    """Clients of the services of the settings, and the run's memory of its questions."""
    reward, paths = settings.trainer.reward, run_paths(settings)
    patience = reward.attempt_deadline_s
    solver = SolverClient(settings.solver.url, patience_s=patience, connections=reward.concurrency)
    search = SearchClient(settings.retrieval.url, patience_s=patience, connections=reward.concurrency)
    conversations = Conversations(solver, search, Tokens(resolve_model(settings.solver.model, settings)))
    return Judging(settings, paths, solver, search, Attempts(conversations, settings), RecentQuestions(paths.log))


def append_verdict(folder: Path, verdict: dict[str, Any]) -> None:
    """Append one line to this worker's file of verdicts; readers ignore a line that a kill has cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(verdict, ensure_ascii=False) + "\n"
    with (folder / f"verdicts-{os.getpid()}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line)
