"""The trainer inside verl: what is refused, repeated and waited for, and what an update gets to see of a batch.

verl's trainer, replay buffer and agent loop worker are real, and so is the transfer queue between them (a local Ray of
about ten seconds); only the rollouts themselves are made up.
"""

import asyncio
import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_world import settings_in_force, verl_config

from services.trainer.advantage import grpo_advantages, hrpo_advantages
from services.trainer.late_rewards import LateRewards, Rollout
from services.trainer.outage import read_outage
from services.trainer.paths import RunPaths, run_paths
from services.trainer.records import TRAIN, Verdict, read_refusals, read_verdicts
from services.trainer.reward import PENDING
from shared.clients import Unavailable

pytest.importorskip("verl", reason="needs the trainer's packages")
# verl, Ray and what they import warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS, ROLLOUTS = 4, 2
LOST = (0.0, False)
GOOD = (1.0, True)


Ending = tuple[float, bool] | None  # score and validity of a rollout, None when it fails inside verl
Endings = Callable[[int, int, int], Ending]  # of try, prompt and session, each from 0
Judge = Callable[[int, int, int], tuple[float, bool]]  # the verdict on a rollout, for each time it is judged


# --- the pieces around the trainer


@contextmanager
def health(status: Callable[[str], int]) -> Iterator[str]:
    """A server that answers GETs with `status(path)`; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status(self.path))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def queue() -> Iterator[Any]:
    """verl's transfer queue on a Ray of its own."""
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 1024**2,
        log_to_driver=False,
        configure_logging=False,
    )
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    yield tq
    tq.close()
    ray.shutdown()


@dataclass
class Rollouts:
    """verl's agent loop manager with its worker in this process; `endings` says how each rollout ends."""

    config: Any
    endings: Endings
    judge: Judge | None
    log: Path
    submitted: list[list[str]] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)

    def generate_sequences(self, batch: Any) -> None:
        """Roll a batch out and return when all its rollouts are in the queue; the batch is used up."""
        number = len(self.submitted)
        uids = list(batch["uid"])
        self.submitted.append(uids)
        self.seen.append({name: list(batch[name]) for name in ("uid", "data_source", "extra_info", "raw_prompt")})
        made = MadeUp(
            lambda uid, session: self.endings(number, uids.index(uid), session),
            self.judge and (lambda uid, session: self.judge(0, uids.index(uid), session)),
            self.log,
        )
        worker = agent_loop_worker(self.config, made)

        async def main() -> None:
            await worker.generate_sequences(batch)
            while worker.background_tasks:
                await asyncio.gather(*list(worker.background_tasks))

        asyncio.run(main())
        for name in list(batch.keys()):
            batch.pop(name)


@dataclass(frozen=True)
class MadeUp:
    """How a rollout ends, and its verdict when that comes late (None: it comes with the rollout)."""

    ending: Callable[[str, int], Ending]
    judge: Callable[[str, int], tuple[float, bool]] | None
    log: Path


def write_verdict(log: Path, name: str, score: float, valid: bool) -> dict[str, Any]:
    """What a reward worker appends, as far as the trainer reads it."""
    row = {"rollout": name, "split": "train", "step": 1, "index": 0, "time": time.time(), "began": time.time()}
    row |= {"score": score, "valid": float(valid), "invalid_reason": "" if valid else "solver"}
    with (log / "verdicts-1.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    return row


class MadeUpRewards(LateRewards):
    """The real waiting; a rollout that is judged here gets a made-up verdict, and `asked` counts how often."""

    def __init__(self, settings: Any, judge: Judge) -> None:
        super().__init__(settings)
        self.made_up = judge
        self.asked = 0

    def judge(self, rollouts: Mapping[str, Rollout]) -> dict[str, Verdict]:
        self.asked += 1
        found = {}
        for name, rollout in rollouts.items():
            assert rollout.trajectory["rollout"] == name
            assert rollout.info["hop"] == int(rollout.data_source[-1])
            prompt, session = map(int, name.removeprefix("prompt-").split("_"))
            found[name] = write_verdict(self._log, name, *self.made_up(self.asked, prompt, session))
        return found


def agent_loop_worker(config: Any, made: MadeUp) -> Any:
    """verl's worker without a model: real from the batch to the rows in the queue."""
    from verl.experimental.agent_loop import AgentLoopOutput
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    base = AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__

    class Worker(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            self.config = config
            self.processor = None
            self.distillation_enabled = False
            self.background_tasks: set[Any] = set()

        async def _run_agent_loop(self, sampling_params: Any, trajectory: Any, *, trace: bool, **prompt: Any) -> None:
            name = f"{prompt['uid']}_{prompt['session_id']}"
            ended = made.ending(prompt["uid"], prompt["session_id"])
            if ended is None:
                raise RuntimeError("this rollout fails")
            trajectory_text = json.dumps({"lost": "" if ended[1] else "search", "rollout": name})
            output = AgentLoopOutput(
                prompt_ids=[5, 6, 7],
                response_ids=[8, 9, 10, 11],
                response_mask=[1, 0, 0, 1],
                response_logprobs=[-1.0, 0.0, 0.0, -1.0],
                num_turns=2,
                metrics={},
                extra_fields={"min_global_steps": 0, "max_global_steps": 0, "trajectory": trajectory_text},
            )
            await self._agent_loop_postprocess(output, trajectory["validate"], **prompt)

        async def _compute_score(self, outputs: list[Any], kwargs: Any) -> None:
            uid, session = kwargs["uid"], kwargs["session_id"]
            score, valid = made.ending(uid, session) or LOST
            if made.judge is None or not valid:
                write_verdict(made.log, f"{uid}_{session}", score, valid)
                notes = {"score": score, "valid": float(valid)}
            else:
                write_verdict(made.log, f"{uid}_{session}", *made.judge(uid, session))
                notes = PENDING
            outputs[-1].reward_score = notes["score"]
            outputs[-1].extra_fields["reward_extra_info"] = notes

    return Worker()


def prompts(hops: Sequence[int] = (1, 2, 2, 3)) -> Any:
    """A batch of seed prompts as verl's data loader gives it."""
    import numpy as np
    from verl.utils import tensordict_utils as tu

    def column(values: Sequence[Any]) -> Any:
        made = np.empty(len(values), dtype=object)
        made[:] = values
        return made

    rows = range(len(hops))
    batch = tu.get_tensordict(
        {
            "uid": column([f"prompt-{row}" for row in rows]),
            "raw_prompt": column([[{"role": "user", "content": f"seed {row}"}] for row in rows]),
            "data_source": column([f"search_biomedical_{hop}" for hop in hops]),
            "extra_info": column([{"hop": hop, "index": row} for row, hop in enumerate(hops)]),
            "index": column(list(rows)),
            "agent_name": column(["search_agent" for _ in rows]),
        }
    )
    tu.assign_non_tensor_data(batch, "global_steps", 1)
    return batch


@dataclass(frozen=True)
class Stage:
    """A trainer with its rollouts, and where its run keeps its files."""

    trainer: Any
    rollouts: Rollouts
    paths: RunPaths

    def sample(self) -> tuple[Any, dict[str, Any]]:
        """One step's batch, as verl asks for it."""
        self.trainer._submit_batch_to_rollout(prompts())
        batch, metrics = self.trainer.replay_buffer.sample(global_steps=1, partition_id="train", batch_size=PROMPTS)
        return batch, dict(metrics)


@pytest.fixture
def stage(queue: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stage]]:
    """Makes verl's trainer, ours, in front of made-up rollouts; services are healthy unless said otherwise."""
    from services.trainer import verl_trainer

    monkeypatch.setattr(verl_trainer, "PROBE_S", 0.01)
    with ExitStack() as stack:

        def make(
            endings: Endings,
            status: Callable[[str], int] = lambda path: 200,
            judge: Judge | None = None,
            **values: str,
        ) -> Stage:
            address = stack.enter_context(health(status))
            given = {
                "RETRIEVAL__URL": address,
                "SOLVER__URL": address,
                "TRAINER__PROMPTS_PER_STEP": str(PROMPTS),
                "TRAINER__ROLLOUTS_PER_PROMPT": str(ROLLOUTS),
                "TRAINER__PATIENCE_S": "30",
            }
            made = stack.enter_context(settings_in_force(tmp_path, **(given | values)))
            trainer = verl_trainer.SelfPlayTrainer(verl_config(made, "/models/none"))
            trainer.global_steps, trainer.timing_raw = 1, {}
            trainer.agent_loop_manager = Rollouts(trainer.config, endings, judge, run_paths(made).log)
            trainer._rewards = MadeUpRewards(made, judge or (lambda number, prompt, session: GOOD))
            run_paths(made).log.mkdir(parents=True)
            return Stage(trainer, trainer.agent_loop_manager, run_paths(made))

        yield make
    for partition, keys in queue.kv_list().items():
        if keys:
            queue.kv_clear(partition_id=partition, keys=list(keys))


def scores(queue: Any, batch: Any) -> dict[str, float]:
    """Scores of a batch's rows by key."""
    data = queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
    return {key: float(row.sum()) for key, row in zip(batch.keys, data["rm_scores"].unbind(), strict=True)}


# --- a batch that may be trained on


def test_a_batch_with_few_lost_rollouts_passes_at_once(stage: Callable[..., Stage]) -> None:
    here = stage(lambda number, prompt, session: LOST if (prompt, session) == (0, 0) else GOOD)
    batch, metrics = here.sample()
    assert len(batch.keys) == PROMPTS * ROLLOUTS
    assert metrics["drzero/refused"] == 0
    assert metrics["drzero/invalid_share"] == pytest.approx(1 / 8)
    assert len(here.rollouts.submitted) == 1
    assert read_refusals(here.paths.log) == []


def test_a_rollout_that_never_came_back_counts_as_lost(stage: Callable[..., Stage]) -> None:
    here = stage(lambda number, prompt, session: None if (prompt, session) == (0, 0) else GOOD)
    batch, metrics = here.sample()
    assert len(batch.keys) == PROMPTS * ROLLOUTS - 1
    assert metrics["drzero/invalid_share"] == pytest.approx(1 / 8)


# --- a batch that may not


@pytest.mark.parametrize("ending", [LOST, None])
@pytest.mark.parametrize("prompts_lost", [2, PROMPTS])
def test_a_batch_that_lost_too_much_is_rolled_out_again_with_the_same_prompts(
    stage: Callable[..., Stage], queue: Any, ending: Ending, prompts_lost: int
) -> None:
    here = stage(lambda number, prompt, session: ending if number == 0 and prompt < prompts_lost else (0.75, True))
    batch, metrics = here.sample()
    assert metrics["drzero/refused"] == 1
    assert metrics["drzero/invalid_share"] == 0
    first, second = here.rollouts.seen
    assert first == second
    # All rows are the second try's, and nothing of the first is left to be sampled later.
    assert sorted(batch.keys) == [f"prompt-{p}_{s}_0" for p in range(PROMPTS) for s in range(ROLLOUTS)]
    assert set(scores(queue, batch).values()) == {0.75}
    assert set(queue.kv_list("train")["train"]) == set(batch.keys)
    [refusal] = read_refusals(here.paths.log)
    assert refusal["step"] == 1
    assert f"{prompts_lost / PROMPTS:.0%}" in refusal["text"]


def test_a_row_of_a_refused_try_is_never_taken_for_one_of_the_next(stage: Callable[..., Stage]) -> None:
    here = stage(lambda number, prompt, session: LOST if number == 0 else None if (prompt, session) == (0, 0) else GOOD)
    batch, metrics = here.sample()
    assert "prompt-0_0_0" not in batch.keys
    assert metrics["drzero/invalid_share"] == pytest.approx(1 / 8)


def test_a_third_try_is_given_the_prompts_as_they_were(stage: Callable[..., Stage]) -> None:
    here = stage(lambda number, prompt, session: LOST if number < 2 else GOOD)
    _, metrics = here.sample()
    assert metrics["drzero/refused"] == 2
    assert here.rollouts.seen[0] == here.rollouts.seen[1] == here.rollouts.seen[2]


def test_a_batch_without_any_judged_rollout_is_refused_whatever_share_is_allowed(stage: Callable[..., Stage]) -> None:
    here = stage(lambda number, prompt, session: LOST if number == 0 else GOOD, TRAINER__MAX_INVALID_SHARE="1")
    assert here.sample()[1]["drzero/refused"] == 1


def test_the_repetition_waits_until_search_and_solver_are_healthy(stage: Callable[..., Stage]) -> None:
    probes: list[str] = []
    reasons: list[str] = []

    def status(path: str) -> int:
        probes.append(path)
        if waiting.is_file():
            reasons.append(json.loads(waiting.read_text())["text"])
        return 200 if probes.count(path) > 2 else 503

    here = stage(lambda number, prompt, session: LOST if number == 0 else GOOD, status)
    waiting = here.paths.waiting
    here.sample()
    assert probes == ["/ready"] * 3 + ["/health"] * 3
    assert len(here.rollouts.submitted) == 2
    assert "step 1 refused" in reasons[0]
    assert "waiting for retrieval" in reasons[0]
    assert "waiting for solver" in reasons[-1]
    assert not waiting.exists()


def test_training_stops_after_too_many_refusals(stage: Callable[..., Stage]) -> None:
    here = stage(lambda number, prompt, session: LOST, TRAINER__MAX_REFUSALS="2")
    with pytest.raises(Unavailable, match=r"step 1 refused: 100% .* 3 times in a row"):
        here.sample()
    assert len(here.rollouts.submitted) == len(read_refusals(here.paths.log)) == 3
    assert "3 times in a row" in (read_outage(here.paths.outage) or "")


@pytest.mark.parametrize(("away", "path"), [("retrieval", "/ready"), ("solver", "/health")])
def test_training_stops_when_a_service_stays_away(stage: Callable[..., Stage], away: str, path: str) -> None:
    here = stage(
        lambda number, prompt, session: LOST, lambda asked: 503 if asked == path else 200, TRAINER__PATIENCE_S="0.05"
    )
    with pytest.raises(Unavailable, match=away):
        here.sample()
    assert len(here.rollouts.submitted) == 1
    assert away in (read_outage(here.paths.outage) or "")


def test_an_error_of_verl_is_not_taken_for_an_outage(stage: Callable[..., Stage], queue: Any) -> None:
    here = stage(lambda number, prompt, session: GOOD)
    queue.kv_batch_put(
        keys=["odd"], partition_id="train", tags=[{"is_prompt": True, "status": "unheard-of", "global_steps": 1}]
    )
    with pytest.raises(ValueError, match="Unknown status"):
        here.sample()
    assert read_refusals(here.paths.log) == []


# --- validation


def test_a_validation_batch_passes_as_it_is(stage: Callable[..., Stage], queue: Any) -> None:
    from verl.utils import tensordict_utils as tu

    here = stage(lambda number, prompt, session: LOST)
    batch = prompts()
    tu.assign_non_tensor_data(batch, "validate", True)
    tags = [{"is_prompt": True, "status": "pending", "global_steps": 1}] * PROMPTS
    queue.kv_batch_put(keys=list(batch["uid"]), partition_id="val", tags=tags)
    here.rollouts.generate_sequences(batch)
    sampled, metrics = here.trainer.replay_buffer.sample(global_steps=1, partition_id="val", batch_size=PROMPTS)
    assert len(sampled.keys) == PROMPTS
    assert metrics == {}
    assert len(here.rollouts.submitted) == 1


def test_a_validation_begins_when_the_services_are_there(stage: Callable[..., Stage]) -> None:
    probes: list[str] = []

    def status(path: str) -> int:
        probes.append(path)
        return 200 if len(probes) > 3 else 503

    stage(lambda number, prompt, session: GOOD, status).trainer.on_validate_begin()
    assert probes == ["/ready"] * 4 + ["/health"]


# --- what the update sees


def padded(here: Stage, queue: Any, multiple: int) -> Any:
    """A sampled batch as it comes to the advantage: upsampled by verl, with the trained model's log-probabilities."""
    from tensordict import TensorDict
    from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size

    batch, _ = here.sample()
    batch = upsample_batch_to_divisible_size(batch, multiple, eos_token_id=2)
    data = queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["rollout_log_probs"])
    old = TensorDict({"old_log_probs": data["rollout_log_probs"]}, batch_size=len(batch))
    return queue.kv_batch_put(keys=batch.keys, partition_id="train", fields=old) and batch


def by_score(number: int, prompt: int, session: int) -> Ending:
    """Rollout 3_1 is lost with a high score, 0_1 never comes back; the others have different scores."""
    return {(3, 1): (9.0, False), (0, 1): None}.get((prompt, session), (0.1 * prompt + 0.3 * session, True))


def test_rollouts_are_read_with_hop_prompt_and_validity(stage: Callable[..., Stage], queue: Any) -> None:
    from services.trainer.verl_trainer import read_rollouts

    here = stage(by_score)
    batch = padded(here, queue, multiple=5)
    rollouts = read_rollouts(batch)
    rows = {key: row for row, key in enumerate(batch.keys)}
    assert len(rows) == 10
    assert sum(rollouts.real) == 7
    assert sum(rollouts.valid) == 6
    assert not rollouts.valid[rows["prompt-3_1_0"]]
    assert rollouts.rewards[rows["prompt-3_1_0"]] == 9
    for key, row in rows.items():
        if key.startswith("prompt-"):
            number = int(key.removeprefix("prompt-")[0])
            assert rollouts.hops[row] == (1, 2, 2, 3)[number]
            assert rollouts.prompts[row] == f"prompt-{number}"
        else:
            assert not rollouts.real[row]
            assert not rollouts.valid[row]


def test_a_batch_of_one_row_is_read_too(stage: Callable[..., Stage]) -> None:
    from services.trainer.verl_trainer import lost_rollouts, read_rollouts

    here = stage(lambda number, prompt, session: GOOD, TRAINER__ROLLOUTS_PER_PROMPT="1")
    here.trainer._submit_batch_to_rollout(prompts([3]))
    batch, _ = here.trainer.replay_buffer._inner.sample(global_steps=1, partition_id="train", batch_size=1)
    rollouts = read_rollouts(batch)
    assert (rollouts.hops, rollouts.rewards, rollouts.valid, rollouts.real) == ([3], [1.0], [True], [True])
    assert lost_rollouts(batch, expected=2) == {"failure": 1}


@pytest.mark.parametrize("estimator", ["hrpo", "grpo"])
def test_lost_and_padding_rows_reach_the_loss_with_nothing(
    stage: Callable[..., Stage], queue: Any, estimator: str
) -> None:
    from services.trainer.verl_trainer import read_rollouts

    here = stage(by_score, TRAINER__ADVANTAGE=estimator, TRAINER__SMALL_GROUP="2")
    metrics: dict[str, Any] = {}
    batch = here.trainer._compute_advantage(padded(here, queue, multiple=5), metrics)
    read = read_rollouts(batch)
    if estimator == "hrpo":
        expected = hrpo_advantages(read.rewards, read.hops, read.valid, small_group=2, small_group_rule="batch")
    else:
        expected = grpo_advantages(read.rewards, read.prompts, read.valid)
    names = ["advantages", "returns", "response_mask", "loss_mask"]
    data = queue.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=names)
    rows = {name: [row.tolist() for row in data[name].unbind()] for name in names}
    for row, (valid, real) in enumerate(zip(read.valid, read.real, strict=True)):
        mask = [1, 0, 0, 1] if valid else [0] * (4 if real else 1)
        assert rows["response_mask"][row] == rows["loss_mask"][row] == mask
        assert rows["advantages"][row] == rows["returns"][row] == pytest.approx([expected[row] * m for m in mask])
    assert any(any(row) for row in rows["advantages"])
    assert metrics["drzero/invalid"] == 1


def test_the_step_logs_how_many_groups_taught_something(stage: Callable[..., Stage], queue: Any) -> None:
    # Hops 1, 2, 2, 3: hop 2 has four rollouts, the others two each; those of hop 3 are alike.
    here = stage(lambda n, prompt, session: (0.5 if prompt == 3 else 0.1 * prompt + 0.3 * session, True))
    metrics: dict[str, Any] = {}
    here.trainer._settings = here.trainer._settings.model_copy(
        update={"trainer": here.trainer._settings.trainer.model_copy(update={"small_group_rule": "zero"})}
    )
    here.trainer._compute_advantage(padded(here, queue, multiple=8), metrics)
    ours = {name: value for name, value in metrics.items() if name.startswith("drzero/")}
    assert ours == {
        "drzero/groups": 3, "drzero/groups_flat": 2, "drzero/groups_small": 2, "drzero/invalid": 0,
        "drzero/refused": 0, "drzero/invalid_share": 0,
    }  # fmt: skip


# --- rewards that come late


def graded(number: int, prompt: int, session: int) -> tuple[float, bool]:
    """A score of its own for every rollout."""
    return 0.1 * prompt + 0.3 * session, True


def test_rewards_that_come_after_the_batch_are_those_of_the_update(stage: Callable[..., Stage], queue: Any) -> None:
    here = stage(lambda number, prompt, session: GOOD, judge=graded)
    batch = padded(here, queue, multiple=5)
    metrics: dict[str, Any] = {}
    here.trainer._compute_advantage(batch, metrics)
    rows = {key: score for key, score in scores(queue, batch).items() if key.startswith("prompt-")}
    expected = {f"prompt-{p}_{s}_0": graded(0, p, s)[0] for p in range(PROMPTS) for s in range(ROLLOUTS)}
    assert rows == pytest.approx(expected)
    assert here.trainer._rewards.asked == 0
    assert here.trainer.timing_raw["reward"] < 5
    assert (metrics["drzero/refused"], metrics["drzero/invalid_share"]) == (0, 0)


def test_a_batch_whose_attempts_were_lost_is_judged_again_and_not_rolled_out_again(
    stage: Callable[..., Stage], queue: Any
) -> None:
    probes: list[str] = []
    here = stage(
        lambda number, prompt, session: GOOD,
        lambda path: probes.append(path) or 200,
        judge=lambda time, prompt, session: LOST if time < 2 and prompt < 2 else graded(time, prompt, session),
    )
    batch = padded(here, queue, multiple=8)
    metrics: dict[str, Any] = {}
    here.trainer._compute_advantage(batch, metrics)
    assert (metrics["drzero/refused"], metrics["drzero/invalid_share"]) == (2, 0)
    assert set(probes) == {"/ready", "/health"}
    assert len(here.rollouts.submitted) == 1
    assert "50% of its rollouts were lost (4 by solver)" in read_refusals(here.paths.log)[0]["text"]
    # What counts in the end is one verdict for each rollout, the last one.
    verdicts = read_verdicts(here.paths.log, TRAIN)[1]
    assert len({v["rollout"] for v in verdicts}) == len(verdicts) == PROMPTS * ROLLOUTS
    assert all(v["valid"] for v in verdicts)


def test_training_stops_when_the_attempts_are_lost_again_and_again(stage: Callable[..., Stage], queue: Any) -> None:
    here = stage(lambda number, prompt, session: GOOD, judge=lambda *_: LOST, TRAINER__MAX_REFUSALS="2")
    with pytest.raises(Unavailable, match=r"step 1 refused: 100% .* 3 times in a row"):
        here.trainer._compute_advantage(padded(here, queue, multiple=8), {})
    assert "3 times in a row" in (read_outage(here.paths.outage) or "")


def test_rollouts_lost_before_and_after_they_were_generated_are_added_up(
    stage: Callable[..., Stage], queue: Any
) -> None:
    here = stage(
        lambda number, prompt, session: LOST if (prompt, session) == (0, 0) else GOOD,
        judge=lambda time, prompt, session: LOST if time == 0 and prompt in (1, 2) else GOOD,
    )
    batch = padded(here, queue, multiple=8)
    metrics: dict[str, Any] = {}
    here.trainer._compute_advantage(batch, metrics)
    assert "62% of its rollouts were lost (" in read_refusals(here.paths.log)[0]["text"]
    assert metrics["drzero/refused"] == 1


@given(rows=st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.floats(-3, 3), st.booleans())
                     , min_size=1, max_size=6))  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_advantage_and_masks_stand_where_a_valid_row_was_sampled_and_nowhere_else(
    rows: list[tuple[list[int], float, bool]],
) -> None:
    import torch

    from services.trainer.verl_trainer import loss_fields

    masks, advantages, valid = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
    nested = torch.nested.as_nested_tensor([torch.tensor(mask) for mask in masks], layout=torch.jagged)
    fields = loss_fields(nested, advantages, valid)
    for row, (mask, advantage, ok) in enumerate(rows):
        kept = [bit * ok for bit in mask]
        assert fields["response_mask"][row].tolist() == fields["loss_mask"][row].tolist() == kept
        assert fields["advantages"][row].tolist() == pytest.approx([advantage * bit for bit in kept], abs=1e-6)
        assert fields["response_mask"].dtype == nested.dtype


# --- a person's requests between steps


@dataclass
class Fitted:
    """verl's own loop over steps that do nothing; `seen` has what happened, in order."""

    trainer: Any
    paths: RunPaths
    after: Mapping[int, Callable[[], object]]  # step → what a person does while it runs
    seen: list[str] = field(default_factory=list)

    def fit(self, steps: int) -> None:
        trainer = self.trainer
        trainer.global_steps, trainer.steps_per_epoch, trainer.total_training_steps = 0, steps, steps
        trainer.config.trainer.val_before_train, trainer.config.trainer.test_freq = False, 0
        trainer.config.trainer.logger = ["file"]
        trainer.checkpoint_manager = self
        trainer._init_dump_executor()
        trainer.step, trainer._save_checkpoint = self.step, self.save_checkpoint
        trainer._compute_metrics = lambda batch, metrics, timing, **_: metrics.update(
            {f"timing_s/{name}": value for name, value in timing.items()}
        )
        trainer.fit(None)

    def step(self, metrics: dict[str, Any], timing: dict[str, float]) -> Any:
        import transfer_queue as tq

        number = self.trainer.global_steps
        self.seen.append(f"step {number}")
        self.after.get(number, lambda: None)()
        tag = {"is_prompt": True, "status": "finished", "global_steps": number}
        tq.kv_batch_put(keys=[f"row-{number}"], partition_id="train", tags=[tag])
        return tq.KVBatchMeta(partition_id="train", keys=[f"row-{number}"], tags=[tag])

    def save_checkpoint(self) -> None:
        self.seen.append(f"checkpoint {self.trainer.global_steps}")

    def update_weights(self, step: int) -> None:
        """What verl asks of its checkpoint manager when a step ends."""


@pytest.fixture
def fitted(
    stage: Callable[..., Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Fitted]]:
    """verl's loop in a run that is driven."""
    from services.trainer import control
    from services.trainer.driver import only_driver

    monkeypatch.setattr(control, "POLL_S", 0.01)
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    here = stage(lambda number, prompt, session: GOOD, TRAINER__SAVE_EVERY="10")
    with only_driver(here.paths.run):
        yield lambda after: Fitted(here.trainer, here.paths, after)


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """verl's metrics by step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["data"] for row in rows}


def test_a_stop_ends_verl_after_the_step_with_its_checkpoint_and_its_metrics(
    fitted: Callable[..., Fitted], tmp_path: Path
) -> None:
    from services.trainer.control import order

    run = fitted({})
    run.after = {2: lambda: order(run.paths.run, "stop")}
    with pytest.raises(SystemExit) as ended:
        run.fit(5)
    assert ended.value.code == 0
    assert run.seen == ["step 1", "step 2", "checkpoint 2"]
    assert list(logged(tmp_path)) == [1, 2]
    assert "timing_s/save_checkpoint" in logged(tmp_path)[2]


def test_a_pause_holds_the_next_step_and_its_time_is_nobodys(fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    from services.trainer.control import order

    run = fitted({})
    texts: list[str] = []

    def lift() -> None:
        while not run.paths.waiting.is_file():
            time.sleep(0.01)
        texts.append(json.loads(run.paths.waiting.read_text())["text"])
        assert run.seen == ["step 1", "step 2", "checkpoint 2"]
        time.sleep(1.0)  # the pause that step 3 must not count
        order(run.paths.run, "resume")

    person = threading.Thread(target=lift)

    def pause() -> None:
        order(run.paths.run, "pause")
        person.start()

    run.after = {2: pause}
    run.fit(3)
    person.join()
    assert "paused on request after step 2" in texts[0]
    assert not run.paths.waiting.exists()
    assert run.seen == ["step 1", "step 2", "checkpoint 2", "step 3", "checkpoint 3"]
    assert 0 <= logged(tmp_path)[3]["timing_s/step"] < 0.5


def test_a_stop_during_a_pause_needs_no_further_step(fitted: Callable[..., Fitted]) -> None:
    from services.trainer.control import order

    run = fitted({})

    def stop() -> None:
        while not run.paths.waiting.is_file():
            time.sleep(0.01)
        order(run.paths.run, "stop")

    person = threading.Thread(target=stop)
    run.after = {1: lambda: (order(run.paths.run, "pause"), person.start())}
    with pytest.raises(SystemExit):
        run.fit(3)
    person.join()
    assert run.seen == ["step 1", "checkpoint 1"]


def test_a_stop_in_the_last_step_lets_the_training_finish(fitted: Callable[..., Fitted], tmp_path: Path) -> None:
    from services.trainer.control import order

    run = fitted({})
    run.after = {2: lambda: order(run.paths.run, "stop")}
    run.fit(2)
    assert run.seen == ["step 1", "step 2", "checkpoint 2"]
    assert list(logged(tmp_path)) == [1, 2]


# --- how verl finds and uses it


def test_verl_finds_the_trainer_by_the_name_in_the_overrides(tmp_path: Path) -> None:
    from verl.trainer.ppo.v1 import get_trainer_cls

    from services.trainer.verl_trainer import SelfPlayTrainer

    with settings_in_force(tmp_path) as made:
        config = verl_config(made, "/models/none")
    assert config.trainer.v1.trainer_mode == "drzero"
    assert get_trainer_cls(config.trainer.v1.trainer_mode) is SelfPlayTrainer


def test_verls_synchronous_trainer_asks_its_replay_buffer_for_nothing_but_samples() -> None:
    from verl.trainer.ppo.v1 import trainer_base, trainer_sync

    source = inspect.getsource(trainer_base) + inspect.getsource(trainer_sync)
    assert set(re.findall(r"self\.replay_buffer\.(\w+)", source)) == {"sample"}
    assert "getattr(self.replay_buffer" not in source


def test_to_verl_the_mode_is_the_synchronous_one(stage: Callable[..., Stage]) -> None:
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    trainer = stage(lambda number, prompt, session: GOOD).trainer
    assert trainer.trainer_mode == "sync"
    assert trainer.parameter_sync_step == 1
    assert type(trainer.replay_buffer._inner) is ReplayBuffer
