"""What is trained on is what was sampled: real agent loop, real search socket, verl's own loss on a tiny model.

Search results, prompts and lost rollouts get no gradient, and a lost rollout does not change that of the others.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_services import Reply, search_reply, serving
from rollout_world import CALL, Engine, World, world
from tiny_model import tiny_model

from services.trainer.outage import read_outage
from services.trainer.paths import run_paths
from services.trainer.protocol import last_turn_note
from shared.files import ArtifactError
from shared.model_files import package_file
from shared.settings import read_profile

# verl and what it imports warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("verl", reason="needs the trainer's packages")

ABSTRACT = "Metformin lowers hepatic glucose production. " * 30
RESULT_TURN = (
    "<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"  # our template's
)
FINAL = "<think>done</think><question>What is activated?</question><answer>AMPK</answer><|im_end|>"
NOTE = last_turn_note("proposer")
FOUR_TURNS = {"TRAINER__RESPONSE_TOKENS": "900", "TRAINER__TURN_TOKENS": "200", "TRAINER__MAX_TURNS": "4"}


def search(_: str, body: dict[str, Any]) -> Reply:
    return search_reply(body["queries"], "31415", ABSTRACT)


def call(query: str, thought: str = "x") -> str:
    return f"<think>{thought}</think>\n{CALL.format(query=query)}<|im_end|>"


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world with the demo's budgets, whose search answers."""
    with serving(search) as address, world(tmp_path_factory.mktemp("world"), address) as made:
        yield made


def rolled_out(made: World, turns: Sequence[list[int]]) -> tuple[Any, Engine]:
    """verl's output of a rollout that samples `turns`, and what the engine was asked."""
    engine = Engine(turns)
    return asyncio.run(made.roll_out(engine)), engine


def notes(output: Any) -> dict[str, Any]:
    """What the reward gets to know of a rollout."""
    return dict(json.loads(output.extra_fields["trajectory"]))


def picked(output: Any, mask: int) -> list[int]:
    """Response ids with this mask."""
    return [token for token, kept in zip(output.response_ids, output.response_mask, strict=True) if kept == mask]


# --- what was sampled is what is masked in


def test_mask_one_is_what_was_sampled_and_mask_zero_the_result_turn(searching: World) -> None:
    turns = [searching.ids(call("ampk")), searching.ids(FINAL)]
    output, engine = rolled_out(searching, turns)
    assert picked(output, 1) == turns[0] + turns[1]
    result = notes(output)["searches"][0]["text"]
    assert "PMID 31415" in result
    # The newline ends the model's turn: the template writes it after <|im_end|>, where sampling stops.
    assert searching.text(picked(output, 0)) == "\n" + RESULT_TURN.format(f"{result}\n\n{NOTE}")
    assert output.prompt_ids == engine.prompts[0]
    assert engine.prompts[1] + turns[1] == output.prompt_ids + output.response_ids
    assert len(output.response_logprobs) == len(output.response_ids)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_ids_that_encoding_would_never_give_are_kept_as_sampled(searching: World, data: st.DataObject) -> None:
    text = call("ampk and metformin")
    cuts = data.draw(st.lists(st.integers(1, len(text) - len("<|im_end|>") - 1), min_size=1, max_size=12, unique=True))
    ends = [*sorted(cuts), len(text)]
    odd = [piece for start, end in zip([0, *ends], ends, strict=False) for piece in searching.ids(text[start:end])]
    # Half of a character: decoding it gives a replacement sign, which encodes to other ids.
    broken = [searching.tokenizer.convert_tokens_to_ids("Ã")]
    turns = [broken + odd, searching.ids(FINAL)]
    assert searching.ids(searching.text(turns[0])) != turns[0]
    output, engine = rolled_out(searching, turns)
    assert engine.prompts[1][: len(engine.prompts[0]) + len(turns[0])] == engine.prompts[0] + turns[0]
    assert picked(output, 1) == turns[0] + turns[1]


def test_a_turn_cut_off_by_its_budget_is_followed_by_the_result_as_it_stands(searching: World) -> None:
    whole = searching.ids(call("ampk").removesuffix("<|im_end|>"))
    turns = [whole, searching.ids(FINAL)]
    output, engine = rolled_out(searching, turns)
    assert engine.prompts[1][: len(engine.prompts[0]) + len(whole)] == engine.prompts[0] + whole
    assert searching.text(picked(output, 0)).startswith("<|im_start|>user")


def test_the_real_engine_reports_the_log_probabilities_the_trained_model_gives_its_tokens(tmp_path: Path) -> None:
    import torch

    from services.trainer.cpu_rollout import CpuServer

    # A random model thinks as long as guidance lets it, a token a character.
    room = {"TRAINER__RESPONSE_TOKENS": "1000", "TRAINER__TURN_TOKENS": "320", "TRAINER__MAX_TURNS": "2"}
    exact = {"TRAINER__ACTOR__ROLLOUT_DTYPE": "float32"}
    with serving(search) as address, world(tmp_path, address, **room, **exact) as made:
        model = tiny_model(vocab_size=len(made.tokenizer), positions=2048)
        model.save_pretrained(tmp_path / "model")
        made.tokenizer.save_pretrained(tmp_path / "model")

        async def rollout() -> Any:
            server = CpuServer(str(tmp_path / "model"), context_tokens=2048, max_running=2)
            await server.start()
            try:
                return await made.roll_out(server)
            finally:
                server._engine.stop()

        output = asyncio.run(rollout())
    turns = notes(output)["turns"]
    assert len(notes(output)["searches"]) == len(turns) - 1 == 1
    ids = torch.tensor([output.prompt_ids + output.response_ids])
    with torch.no_grad():
        log_probs = model(ids).logits[0, len(output.prompt_ids) - 1 : -1].log_softmax(-1)
    expected = log_probs.gather(1, torch.tensor(output.response_ids)[:, None])[:, 0].tolist()
    # The first turn was decoded under guidance, which renormalises; the second was sampled freely.
    second = len(output.response_mask) - output.response_mask[::-1].index(0)
    assert second < len(output.response_ids)
    assert output.response_logprobs[second:] == pytest.approx(expected[second:], abs=1e-3)


# --- what a result may take, and who is told what


def test_the_last_turn_note_stands_in_the_result_before_the_last_turn_alone(tmp_path: Path) -> None:
    with serving(search) as address, world(tmp_path, address, **FOUR_TURNS) as made:
        turns = [made.ids(call(query)) for query in ("ampk", "mtor", "insulin")]
        output, engine = rolled_out(made, [*turns, made.ids(FINAL)])
    assert len(engine.prompts) == 4
    told = [made.text(prompt).count(NOTE) for prompt in engine.prompts]
    assert told == [0, 0, 0, 1]
    assert made.text(engine.prompts[-1]).endswith(NOTE + RESULT_TURN.partition("{}")[2])
    assert all(NOTE not in text["text"] for text in notes(output)["searches"])


def test_of_several_calls_in_a_turn_only_the_last_result_has_the_note(searching: World) -> None:
    first = f"<think>x</think>\n{CALL.format(query='ampk')}\n{CALL.format(query='mtor')}<|im_end|>"
    output, engine = rolled_out(searching, [searching.ids(first), searching.ids(FINAL)])
    one, two = searching.text(engine.prompts[1]).split("<tool_response>")[-2:]
    assert NOTE not in one
    assert NOTE in two
    assert len(notes(output)["searches"]) == 2


@given(thought=st.integers(0, 70), calls=st.integers(1, 2))
@settings(max_examples=12, deadline=None)
def test_a_result_is_cut_so_that_a_last_turn_still_fits(searching: World, thought: int, calls: int) -> None:
    from services.trainer.agent_loop import FINAL_TURN_TOKENS

    trainer = searching.settings.trainer
    called = "\n".join([CALL.format(query="ampk")] * calls)
    turns = (searching.ids(f"<think>{'é' * length}</think>\n{called}<|im_end|>") for length in range(thought, -1, -1))
    ids = next(turn for turn in turns if len(turn) <= trainer.turn_tokens)
    output, engine = rolled_out(searching, [ids, searching.ids(FINAL)])
    assert engine.params[1]["max_tokens"] >= min(trainer.turn_tokens, FINAL_TURN_TOKENS)
    assert len(output.response_ids) <= trainer.response_tokens
    assert all(len(searching.ids(found["text"])) <= trainer.max_tool_tokens for found in notes(output)["searches"])


def test_the_markup_of_a_result_fits_what_is_kept_free_for_it_with_the_demos_tokenizer() -> None:
    from transformers import AutoTokenizer

    from services.trainer.agent_loop import RESULT_MARKUP_TOKENS

    try:
        gguf = package_file(read_profile("demo")["trainer"]["actor"]["model"])
    except ArtifactError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = "\n" + RESULT_TURN.format(f"\n\n{NOTE}")
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= RESULT_MARKUP_TOKENS


def test_a_search_that_is_away_loses_the_rollout_and_leaves_no_trace_in_its_context(tmp_path: Path) -> None:
    with world(tmp_path, "http://127.0.0.1:9", TRAINER__PATIENCE_S="0.3") as made:
        turns = [made.ids(call("ampk"))]
        output, engine = rolled_out(made, turns)
        assert notes(output)["lost"] == "search"
        assert notes(output)["searches"] == []
        assert output.response_ids == turns[0]
        assert output.response_mask == [1] * len(turns[0])
        assert len(engine.prompts) == 1
        # Whether the run ends is the trainer's decision, batch by batch.
        assert read_outage(run_paths(made.settings).outage) is None


def test_a_rollout_that_was_answered_is_not_lost(searching: World) -> None:
    output, _ = rolled_out(searching, [searching.ids(call("ampk")), searching.ids(FINAL)])
    assert notes(output)["lost"] == ""
    assert notes(output)["trained_tokens"] == sum(output.response_mask)


# --- what the loss does with it


@dataclass(frozen=True)
class Pulled:
    """The loss of a batch, its gradient at the logits of each row (tokens, vocabulary) and at the weights."""

    loss: float
    logits: list[Any]
    weights: list[Any]


def pull(made: World, rollouts: Sequence[Any], advantages: list[float], valid: list[bool], *, micro: int) -> Pulled:
    """verl's policy loss in micro-batches of `micro` rows, as its engine computes it, and the gradients."""
    from services.trainer.verl_trainer import loss_fields

    model = tiny_model(vocab_size=len(made.tokenizer), positions=2048)
    fields = loss_fields(nested([output.response_mask for output in rollouts]), advantages, valid)
    logits = [model(as_tensor([output.prompt_ids + output.response_ids])).logits for output in rollouts]
    for row in logits:
        row.retain_grad()
    tokens = int(fields["loss_mask"].values().sum())
    total = 0.0
    for start in range(0, len(rollouts), micro):
        part = slice(start, start + micro)
        chosen = {name: nested(list(value.unbind())[part]) for name, value in fields.items()}
        loss = policy_loss(made, rollouts[part], logits[part], chosen, tokens)
        loss.backward(retain_graph=True)
        total += float(loss.detach())
    return Pulled(total, [row.grad[0] for row in logits], [weight.grad for weight in model.parameters()])


def policy_loss(
    made: World, rollouts: Sequence[Any], logits: Sequence[Any], fields: dict[str, Any], tokens: int
) -> Any:
    """verl's `ppo_loss` with the actor's own configuration; `tokens` is how many of the batch are trained on."""
    import torch
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.torch_functional import logprobs_from_logits
    from verl.workers.utils.losses import ppo_loss

    log_probs, old = [], []
    for output, row in zip(rollouts, logits, strict=True):
        ids = as_tensor(output.prompt_ids + output.response_ids)
        log_probs.append(logprobs_from_logits(row[0], torch.roll(ids, -1), inplace_backward=False))
        old.append(log_probs[-1].detach()[-len(output.response_ids) - 1 : -1])
    rows = {
        "prompts": nested([output.prompt_ids for output in rollouts]),
        "responses": nested([output.response_ids for output in rollouts]),
        "old_log_probs": nested(old),
        **fields,
    }
    data = TensorDict(rows, batch_size=len(rollouts))
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=tokens, global_batch_size=len(rollouts))
    actor = omega_conf_to_dataclass(made.config.actor_rollout_ref.actor)
    loss, _ = ppo_loss(actor, {"log_probs": torch.cat(log_probs)}, data)
    return loss


def nested(rows: Sequence[Any]) -> Any:
    """A jagged tensor, as verl's transfer queue gives it."""
    import torch

    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


def as_tensor(ids: Any) -> Any:
    import torch

    return torch.tensor(ids)


def moved(gradient: Any) -> list[bool]:
    """For each position of a row, whether its logits have any gradient."""
    return [bool(flag) for flag in (gradient != 0).any(-1)]


@pytest.fixture(scope="module")
def three(searching: World) -> list[Any]:
    """Rollouts with one search, with none, and with two in one turn."""
    twice = f"<think>y</think>\n{CALL.format(query='insulin')}\n{CALL.format(query='mtor')}<|im_end|>"
    turns = [[call("ampk"), FINAL], [FINAL], [twice, FINAL]]
    return [rolled_out(searching, [searching.ids(turn) for turn in row])[0] for row in turns]


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_exactly_the_positions_that_predict_sampled_tokens_are_pulled(
    searching: World, three: list[Any], advantage: float, micro: int
) -> None:
    pulled = pull(searching, three, [advantage] * 3, [True] * 3, micro=micro)
    for output, gradient in zip(three, pulled.logits, strict=True):
        # The logits at a position predict the token after it; those at the very last one predict nothing.
        assert moved(gradient) == [False] * (len(output.prompt_ids) - 1) + [m == 1 for m in output.response_mask] + [
            False
        ]
        assert 0 in output.response_mask or output is three[1]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_rollout_has_no_gradient_and_changes_none(
    searching: World, three: list[Any], lost: int, micro: int
) -> None:
    import torch

    # advantage.py gives a lost rollout 0; here it has a large one, which must not come through either.
    advantages, valid = [0.7, -1.2, 0.4], [row != lost for row in range(3)]
    advantages[lost] = 50.0
    with_it = pull(searching, three, advantages, valid, micro=micro)
    rest = [row for row in range(3) if row != lost]
    without = pull(searching, [three[row] for row in rest], [advantages[row] for row in rest], [True] * 2, micro=micro)
    assert not any(moved(with_it.logits[lost]))
    assert with_it.loss == pytest.approx(without.loss, rel=1e-6)
    for row, gradient in zip(rest, without.logits, strict=True):
        assert torch.allclose(with_it.logits[row], gradient, rtol=1e-5, atol=0)
    for one, other in zip(with_it.weights, without.weights, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_each_sampled_token_weighs_the_same_in_rollouts_of_any_length(searching: World, three: list[Any]) -> None:
    import torch

    pulled = pull(searching, three, [1.0] * 3, [True] * 3, micro=3)
    tokens = sum(sum(output.response_mask) for output in three)
    for output, gradient in zip(three, pulled.logits, strict=True):
        ids = output.response_ids
        start = len(output.prompt_ids) - 1
        model = tiny_model(vocab_size=len(searching.tokenizer), positions=2048)
        with torch.no_grad():
            chances = model(as_tensor([output.prompt_ids + ids])).logits[0, start:-1].softmax(-1)
        for place, (token, kept) in enumerate(zip(ids, output.response_mask, strict=True)):
            if kept:
                expected = (chances[place, token] - 1) / tokens
                assert gradient[start + place, token] == pytest.approx(float(expected), rel=1e-3, abs=1e-8)
