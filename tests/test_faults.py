"""A service that is down, slow, busy or talks nonsense never changes the reward of any sample: judged as ever, or lost.

One live server plays solver and search for all batches. A request to the solver tells its attempt, and the fake solver
searches for just that, so that a fault hits the attempts at chosen questions of one batch and nobody else.
"""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from model_services import (
    BUSY,
    CRASH,
    GARBAGE,
    HALF_A_BODY,
    HANG,
    HANGS_UP,
    LOADING,
    WRONG_SHAPE,
    Answer,
    Fault,
    Reply,
    chat_reply,
    search_reply,
    serving,
)
from tiny_model import tiny_tokenizer

from services.trainer import reward
from services.trainer.advantage import grpo_advantages, hrpo_advantages
from services.trainer.paths import run_paths
from shared.settings import Settings, build_settings

CHAT = "/v1/chat/completions"
ATTEMPTS = 3
DEADLINE_S = 6.0
DOCUMENT = "Metformin activates AMPK. Loss of function of the transporter; factor VIII; B12; the gene BRCA1."

Scores = list[dict[str, float]]


@dataclass(frozen=True)
class Sample:
    """A response of the proposer and how the solver fares with its question: `right` of its attempts know."""

    question: str
    answer: str = ""
    right: int = 0
    searching: bool = False
    hop: int = 1
    hit: bool = False

    @property
    def text(self) -> str:
        """The response."""
        if not self.question:
            return "<think>I have no idea.</think>"
        return f"<think>So.</think><question>{self.question}</question><answer>{self.answer}</answer>"


@dataclass(frozen=True)
class Strike:
    """A fault of one service, at every request or only at the first of an attempt."""

    target: str
    fault: Fault
    once: bool = False


SAMPLES = [
    Sample("Which enzyme does metformin act on?", "AMPK", right=3),
    Sample("Why do carriers of the variant bleed?", "factor VIII", right=1, hit=True),
    Sample("Which drug inhibits the product of this fusion?", "imatinib (PMID 7)", 2, searching=True, hop=2, hit=True),
    Sample("Through which receptor does it signal?", "IL6R", right=0, hop=2),
    Sample("How does the transporter fail?", "loss of function", 1, searching=True, hop=3, hit=True),
    Sample("Which gene, apart from TP53, is lost?", "BRCA1", right=2, hit=True),
    Sample(""),
    Sample("Which vitamin is the cofactor?", "B12", right=2, searching=True, hop=2),
]
TARGETS = ["solver", "search"]
ABORT = Fault(body=json.dumps(chat_reply("<answer>x</answer>", "abort")[1]).encode())
AT_ONCE = {"garbage": GARBAGE, "wrong shape": WRONG_SHAPE, "500": CRASH, "abort": ABORT}
UNTIL_THE_DEADLINE = {
    "hang": HANG,
    "half a body": HALF_A_BODY,
    "hang-up": HANGS_UP,
    "503 for ever": LOADING,
    "429 for ever": BUSY,
}
LASTING = AT_ONCE | UNTIL_THE_DEADLINE
PASSING = {"429 once": BUSY, "503 once": LOADING, "hang-up once": HANGS_UP, "half a body once": HALF_A_BODY}
STRIKES = {
    f"{target} {name}": Strike(target, fault, once=name in PASSING)
    for target in TARGETS
    for name, fault in (LASTING | PASSING).items()
}
LASTING_STRIKES = {name: strike for name, strike in STRIKES.items() if not strike.once}
# Of each kind of fault one: silence, a useless reply, a refusal to work now.
AT_EVERY_REQUEST = [name for name in LASTING_STRIKES if STRIKES[name].fault in (HANG, GARBAGE, LOADING)]

Plan = Callable[[str, Sample], Strike | None]


def fake_services(samples: Sequence[Sample], plan: Plan) -> Answer:
    """Solver and search, with the fault that `plan` has for a model's name and a sample."""
    by_question = {sample.question: sample for sample in samples}
    struck: set[tuple[str, str]] = set()

    def answer(path: str, body: dict[str, Any]) -> Reply | Fault:
        target = "solver" if path == CHAT else "search"
        # "model|seed|question" tells an attempt; the fake solver searches for just that.
        attempt = named(body) if path == CHAT else body["queries"][0]
        model, seed, question = attempt.split("|")
        strike = plan(model, by_question[question])
        if strike and strike.target == target and not (strike.once and (target, attempt) in struck):
            struck.add((target, attempt))
            return strike.fault
        if target == "search":
            return search_reply(body["queries"], pmid="7")
        return solve(by_question[question], attempt, int(seed), searched=body["messages"][-1]["role"] == "tool")

    return answer


def named(body: dict[str, Any]) -> str:
    """Which attempt a request to the solver belongs to."""
    asked = [message["content"] for message in body["messages"] if message["role"] == "user"][-1]
    return f"{body['model']}|{body['seed']}|{asked.removeprefix('Question: ')}"


def solve(sample: Sample, attempt: str, seed: int, *, searched: bool) -> Reply:
    """A turn of the solver: a search for the attempt's own name, or an answer."""
    if sample.searching and not searched:
        call = {"name": "search", "arguments": {"query_list": [attempt]}}
        return chat_reply(f"<think>I search.</think><tool_call>{json.dumps(call)}</tool_call>")
    place = reward.attempt_seeds(42, 0, sample.question, ATTEMPTS).index(seed)
    return chat_reply(f"<answer>{sample.answer if place < sample.right else 'something else'}</answer>")


@contextmanager
def judged_by(
    folder: Path, solver: str, search: str, *, deadline_s: float = DEADLINE_S, attempts: int = ATTEMPTS
) -> Iterator[Settings]:
    """Settings with these services for the reward."""
    tiny_tokenizer().save_pretrained(folder / "model")
    made = build_settings(
        {
            "DRZERO_STORAGE__DATA_DIR": str(folder / "data"),
            "DRZERO_STORAGE__SCRATCH_DIR": str(folder / "scratch"),
            "DRZERO_SOLVER__MODEL": str(folder / "model"),
            "DRZERO_SOLVER__URL": solver,
            "DRZERO_RETRIEVAL__URL": search,
            "DRZERO_TRAINER__REWARD__VARIANT": "biomedical",
            "DRZERO_TRAINER__REWARD__BIOMEDICAL__GROUNDED": "false",  # the samples come without a document
            "DRZERO_TRAINER__REWARD__ATTEMPTS": str(attempts),
            "DRZERO_TRAINER__REWARD__ATTEMPT_DEADLINE_S": str(deadline_s),
            "DRZERO_TRAINER__REWARD__CONCURRENCY": "256",  # nobody waits for a place
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward, "load_settings", lambda: made)
        yield made


def score(samples: Sequence[Sample], *, model: str, solver: str) -> Scores:
    """The batch entry's result."""
    return reward.compute_biomedical_challenger_score_batch(
        [f"search_biomedical_{sample.hop}" for sample in samples],
        [sample.text for sample in samples],
        [None] * len(samples),
        [{"document": DOCUMENT, "pmid": "7"}] * len(samples),
        model_name=model,
        base_url=f"{solver}/v1",
        reward_rollout_n=ATTEMPTS,
    )


def nobody() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def reaches(sample: Sample, target: str) -> bool:
    """Whether the attempts at a sample ask the service."""
    return bool(sample.question) and (target == "solver" or sample.searching)


def plan_of_batches(model: str, sample: Sample) -> Strike | None:
    """The model's name is "some" or "all" and a strike, or "faultless"."""
    reach, _, name = model.partition(" ")
    return STRIKES[name] if reach == "all" or (reach == "some" and sample.hit) else None


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Scores]]:
    """The scores of the whole batch by the model's name."""
    models = ["faultless", *[f"some {name}" for name in STRIKES], *[f"all {name}" for name in AT_EVERY_REQUEST]]
    slow = [model for model in models if any(model.endswith(name) for name in UNTIL_THE_DEADLINE)]
    with (
        serving(fake_services(SAMPLES, plan_of_batches)) as url,
        judged_by(tmp_path_factory.mktemp("batches"), url, url),
        ThreadPoolExecutor(len(slow) + 1) as threads,
    ):
        # One after the other, so that a busy machine makes none of them too slow; the others only wait.
        scores = {model: score(SAMPLES, model=model, solver=url) for model in models if model not in slow}
        waiting = {model: threads.submit(score, SAMPLES, model=model, solver=url) for model in slow}
        waiting["refused"] = threads.submit(score, SAMPLES, model="refused", solver=nobody())
        yield scores | {model: done.result() for model, done in waiting.items()}


def expect_lost(scores: Scores, faultless: Scores, lost: Sequence[bool]) -> None:
    """Each sample is invalid with score 0 where `lost`, and as without faults everywhere else."""
    for got, without, gone in zip(scores, faultless, lost, strict=True):
        if gone:
            assert (got["valid"], got["score"], got["attempts_valid"]) == (0, 0, 0)
            assert got["attempts_made"] == ATTEMPTS
        else:
            assert got == without


def test_without_faults_every_sample_is_judged_and_the_scores_differ(batches: dict[str, Scores]) -> None:
    assert {one["valid"] for one in batches["faultless"]} == {1}
    correct = [sample.right if sample.question else 0 for sample in SAMPLES]
    assert [one["attempts_correct"] for one in batches["faultless"]] == correct
    assert len({one["score"] for one in batches["faultless"]}) > 5


@pytest.mark.parametrize("name", [name for name, strike in STRIKES.items() if strike.once])
def test_a_fault_that_passes_changes_nothing(batches: dict[str, Scores], name: str) -> None:
    assert batches[f"some {name}"] == batches["faultless"]


@pytest.mark.parametrize("name", LASTING_STRIKES)
def test_a_fault_that_lasts_loses_the_samples_it_hits_and_changes_no_other(
    batches: dict[str, Scores], name: str
) -> None:
    lost = [sample.hit and reaches(sample, STRIKES[name].target) for sample in SAMPLES]
    assert any(lost)
    expect_lost(batches[f"some {name}"], batches["faultless"], lost)


@pytest.mark.parametrize("name", AT_EVERY_REQUEST)
def test_a_fault_at_every_request_loses_every_sample_that_needs_the_service(
    batches: dict[str, Scores], name: str
) -> None:
    expect_lost(
        batches[f"all {name}"], batches["faultless"], [reaches(sample, STRIKES[name].target) for sample in SAMPLES]
    )


def test_a_solver_that_is_down_loses_every_sample_that_needs_it(batches: dict[str, Scores]) -> None:
    expect_lost(batches["refused"], batches["faultless"], [reaches(sample, "solver") for sample in SAMPLES])


def test_a_search_that_is_down_loses_the_samples_whose_attempts_search(
    tmp_path: Path, batches: dict[str, Scores]
) -> None:
    with (
        serving(fake_services(SAMPLES, lambda _, __: None)) as solver,
        judged_by(tmp_path, solver, nobody(), deadline_s=3.0),
    ):
        scores = score(SAMPLES, model="faultless", solver=solver)
    expect_lost(scores, batches["faultless"], [reaches(sample, "search") for sample in SAMPLES])


@pytest.mark.parametrize("name", LASTING_STRIKES)
@pytest.mark.parametrize("rule", ["batch", "zero"])
def test_lost_samples_change_no_advantage_of_the_judged_ones(batches: dict[str, Scores], name: str, rule: str) -> None:
    mixed = batches[f"some {name}"]
    valid = [bool(one["valid"]) for one in mixed]
    kept = [row for row, ok in enumerate(valid) if ok]
    hops, rewards = [sample.hop for sample in SAMPLES], [one["score"] for one in mixed]
    alone = [batches["faultless"][row]["score"] for row in kept]

    def hrpo(rewards: list[float], hops: list[int], valid: list[bool]) -> list[float]:
        return hrpo_advantages(rewards, hops, valid, small_group=2, small_group_rule=rule)

    for estimate in (hrpo, grpo_advantages):
        advantages = estimate(rewards, hops, valid)
        assert [advantages[row] for row in kept] == estimate(alone, [hops[row] for row in kept], [True] * len(kept))
        assert not any(advantage for advantage, ok in zip(advantages, valid, strict=True) if not ok)
        assert any(advantages)


def test_the_verdict_of_a_lost_rollout_says_what_was_lost(tmp_path: Path) -> None:
    strikes = {f"Which gene is hit by {name}?": strike for name, strike in LASTING_STRIKES.items()}
    samples = [Sample(question, "TP53", searching=one.target == "search") for question, one in strikes.items()]

    async def stream() -> None:
        infos = [{"turns": [sample.text], "searches": [], "step": 1} for sample in samples]
        scores = [
            reward.compute_score(
                "search_biomedical_1", sample.text, "", {"document": "", "pmid": "7", "trajectory": json.dumps(info)}
            )
            for sample, info in zip(samples, infos, strict=True)
        ]
        judging = reward.judging_of_this_loop()
        try:
            await asyncio.gather(*scores)
            await asyncio.gather(*judging.late)
        finally:
            await judging.close()

    with (
        serving(fake_services(samples, lambda _, sample: strikes[sample.question])) as url,
        # Many, because a try that begins just before the deadline is cut off by it, whatever the fault.
        judged_by(tmp_path, url, url, deadline_s=4.0, attempts=7) as settings,
    ):
        asyncio.run(stream())
    lines = [line for path in run_paths(settings).log.iterdir() for line in path.read_text("utf-8").splitlines()]
    reasons = {verdict["question"]: verdict["invalid_reason"] for verdict in map(json.loads, lines)}
    assert reasons == {
        question: "deadline" if strike.fault is HANG else strike.target for question, strike in strikes.items()
    }
