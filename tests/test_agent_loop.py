"""The deadline of a rollout and where its time goes: real agent loop, real search socket, an engine that may hang.

The event loop's clock can be moved, so that no test waits for a deadline.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from model_services import HANG, Fault, Reply, Service, search_reply, watched
from rollout_world import CALL, Engine, World, world

pytestmark = pytest.mark.filterwarnings("ignore")  # verl and what it imports warn about themselves
pytest.importorskip("verl", reason="needs the trainer's packages")

DEADLINE_S = 30.0
ASKS = f"<think>x</think>\n{CALL.format(query='ampk')}<|im_end|>"
FINAL = "<think>done</think><question>What is activated?</question><answer>AMPK</answer><|im_end|>"


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time can be moved on."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s

    def move(self, seconds: float) -> None:
        """Let so much time pass at once."""
        self.ahead_s += seconds


@dataclass
class Slow(Engine):
    """An engine that takes `each_s` for a turn; from turn number `hangs_at` on it takes for ever."""

    each_s: float = 0.0
    hangs_at: int = 99

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **other: Any
    ) -> Any:
        clock = asyncio.get_running_loop()
        assert isinstance(clock, Clock)
        if len(self.prompts) == self.hangs_at:
            self.prompts.append(list(prompt_ids))
            clock.move(DEADLINE_S)
            await asyncio.Event().wait()
        clock.move(self.each_s)
        return await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **other)


class Broken(Engine):
    """An engine whose own patience ends."""

    async def generate(self, *_: Any, **__: Any) -> Any:
        raise TimeoutError("the engine's")


@dataclass(frozen=True)
class Place:
    """A clock, a search service that takes `search_s` by it and then may hang, and the rollouts made there."""

    clock: Clock
    service: Service
    made: World

    def turns(self, *texts: str) -> list[list[int]]:
        return [self.made.ids(text) for text in texts]

    def roll_out(self, engine: Any) -> tuple[Any, dict[str, Any]]:
        """verl's output, and what the reward gets to know."""
        with asyncio.Runner(loop_factory=lambda: self.clock) as runner:
            output = runner.run(self.made.roll_out(engine))
        return output, json.loads(output.extra_fields["trajectory"])


@contextmanager
def place(
    folder: Path, *, search_s: float = 0.0, hangs: bool = False, deadline_s: float = DEADLINE_S
) -> Iterator[Place]:
    clock = Clock()

    def search(_: str, body: dict[str, Any]) -> Reply | Fault:
        clock.call_soon_threadsafe(clock.move, search_s)
        return HANG if hangs else search_reply(body["queries"], "31415")

    values = {"TRAINER__ROLLOUT_DEADLINE_S": str(deadline_s)}
    with watched(search) as service, world(folder, service.url, **values) as made:
        yield Place(clock, service, made)


def test_a_rollout_in_time_is_not_lost_and_says_where_its_time_went(tmp_path: Path) -> None:
    with place(tmp_path, search_s=3.0) as here:
        before = time.time()
        _, told = here.roll_out(Slow(here.turns(ASKS, FINAL), each_s=5.0))
        after = time.time()
    assert (told["lost"], len(told["turns"]), len(told["searches"])) == ("", 2, 1)
    assert 10 <= told["seconds_generating"] <= 10 + after - before
    assert 3 <= told["seconds_searching"] <= 3 + after - before
    assert before <= told["generated"] <= after


def test_an_engine_that_hangs_in_the_first_turn_loses_the_rollout_and_leaves_verl_a_row(tmp_path: Path) -> None:
    with place(tmp_path) as here:
        engine = Slow([], hangs_at=0)
        output, told = here.roll_out(engine)
    assert (told["lost"], told["turns"], told["trained_tokens"]) == ("deadline", [], 0)
    assert told["seconds_generating"] >= DEADLINE_S
    assert output.prompt_ids == engine.prompts[0]
    assert len(output.response_ids) == 1
    assert (output.response_mask, output.response_logprobs) == ([0], [0.0])
    # verl makes integers of these for every row of a batch.
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (0, 0)
    row = output.as_dict()
    assert {"prompts", "responses", "response_mask", "rollout_log_probs"} <= row.keys()


def test_an_engine_that_hangs_later_leaves_the_turns_before_as_sampled(tmp_path: Path) -> None:
    with place(tmp_path) as here:
        turns = here.turns(ASKS)
        output, told = here.roll_out(Slow(turns, hangs_at=1))
    assert (told["lost"], len(told["turns"]), len(told["searches"])) == ("deadline", 1, 1)
    assert output.response_ids[: len(turns[0])] == turns[0]
    assert sum(output.response_mask) == len(turns[0]) == told["trained_tokens"]
    assert len(output.response_ids) == len(output.response_mask) == len(output.response_logprobs)


def test_a_search_in_flight_is_cut_off_at_the_deadline(tmp_path: Path) -> None:
    with place(tmp_path, search_s=DEADLINE_S, hangs=True) as here:
        engine = Slow(here.turns(ASKS, FINAL))
        output, told = here.roll_out(engine)
        assert here.service.requests == 1
    assert (told["lost"], len(told["turns"]), told["searches"]) == ("deadline", 1, [])
    assert told["seconds_searching"] >= DEADLINE_S
    assert (len(engine.prompts), output.response_ids) == (1, engine.turns[0])


def test_after_the_deadline_no_turn_begins(tmp_path: Path) -> None:
    with place(tmp_path, deadline_s=1e-6) as here:
        engine = Slow(here.turns(FINAL))
        output, told = here.roll_out(engine)
    assert (told["lost"], told["seconds_generating"], engine.prompts) == ("deadline", 0.0, [])
    assert output.response_mask == [0]


def test_after_the_deadline_no_search_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with place(tmp_path) as here:
        decode = here.made.tokenizer.decode

        def late(*given: Any, **options: Any) -> str:
            here.clock.move(DEADLINE_S)
            return str(decode(*given, **options))

        turns = here.turns(ASKS, FINAL)
        # The turn is read after the last moment in which its generation could be cut off.
        monkeypatch.setattr(here.made.tokenizer, "decode", late)
        _, told = here.roll_out(Slow(turns))
        assert here.service.requests == 0
    assert (told["lost"], len(told["turns"]), told["seconds_searching"]) == ("deadline", 1, 0.0)


def test_a_timeout_of_the_engine_itself_is_no_deadline(tmp_path: Path) -> None:
    with place(tmp_path) as here, pytest.raises(TimeoutError, match="the engine's"):
        here.roll_out(Broken([]))


def test_a_rollout_without_a_turn_is_masked_out_of_the_loss_like_any_lost_one(tmp_path: Path) -> None:
    import torch

    from services.trainer.verl_trainer import loss_fields

    with place(tmp_path) as here:
        empty, _ = here.roll_out(Slow([], hangs_at=0))
    rows = [torch.tensor(empty.response_mask), torch.ones(5, dtype=torch.int64)]
    masks = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    fields = loss_fields(masks, [9.0, 1.0], [False, True])
    lost, kept = fields["advantages"].unbind()
    assert (lost.tolist(), kept.tolist()) == ([0.0], [1.0] * 5)
    assert int(fields["loss_mask"].values().sum()) == 5
