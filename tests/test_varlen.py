"""Packed sequences give what padded ones give: attention, log-probabilities, entropies, gradients and verl's update."""

import multiprocessing
import os
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import save_tiny_model, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # verl and what it imports warn about themselves
pytest.importorskip("verl", reason="needs the trainer's packages")

PACKED = {
    "actor_rollout_ref.model.use_remove_padding": "true",
    "actor_rollout_ref.model.use_fused_kernels": "true",
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "actor_rollout_ref.actor.use_dynamic_bsz": "true",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "60",
}
PADDED = {
    "actor_rollout_ref.model.use_remove_padding": "false",
    "actor_rollout_ref.model.use_fused_kernels": "false",
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "actor_rollout_ref.actor.use_dynamic_bsz": "false",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "2",
}
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}


def packed_model(seed: int) -> Any:
    from services.trainer.packed_engine import pack

    model = tiny_model(seed)
    pack(model, compile_layers=False)
    return model


def tokens(lengths: list[int], seed: int = 0) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 272, (length,), generator=generator) for length in lengths]


def packed_row(rows: list[Any]) -> dict[str, Any]:
    """What verl's engine passes to a forward pass that names `cu_seqlens`."""
    import torch

    row = torch.cat(rows)[None]
    starts = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0)
    return {
        "input_ids": row,
        "attention_mask": None,
        "position_ids": torch.cat([torch.arange(len(r)) for r in rows])[None],
        "cu_seqlens": starts,
        "cu_seqlens_cpu": starts,
        "shift_labels": row.roll(-1, 1),
        "return_dict": True,
        "use_cache": False,
    }


def by_padding(model: Any, rows: list[Any], temperature: float) -> tuple[Any, Any]:
    """Log-probability of every token after a sequence's first, and the entropies before them, with padding and sdpa."""
    import torch

    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    log_p = (model(input_ids=batch, attention_mask=mask).logits / temperature).log_softmax(-1)
    chosen = log_p[:, :-1].gather(-1, batch[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)[:, :-1]
    real = mask[:, 1:].bool()
    return chosen[real], entropy[real]


@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS.filter(lambda lengths: max(lengths) > 1), temperature=st.sampled_from([0.8, 1.0]))
def test_packing_changes_neither_log_probabilities_nor_entropies_nor_gradients(
    lengths: list[int], temperature: float
) -> None:
    import torch

    rows = tokens(lengths)
    padded, packed = tiny_model(1), packed_model(1)
    expected = by_padding(padded, rows, temperature)
    out = packed(**packed_row(rows), temperature=temperature)
    inner = torch.cat([torch.arange(len(r)) < len(r) - 1 for r in rows])
    found = (out.log_probs[0][inner], out.entropy[0][inner])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    (found[0].sum() + 0.3 * found[1].sum()).backward()
    (expected[0].sum() + 0.3 * expected[1].sum()).backward()
    for (name, ours), (_, theirs) in zip(packed.named_parameters(), padded.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=2e-4, msg=name)


def test_a_qwen_with_tied_embeddings_packs_as_well() -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from services.trainer.packed_engine import pack

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    model, rows = Qwen2ForCausalLM(config), tokens([7, 1, 30, 12])
    expected = by_padding(model, rows, 1.0)[0]
    pack(model, compile_layers=False)
    inner = torch.cat([torch.arange(len(row)) < len(row) - 1 for row in rows])
    torch.testing.assert_close(model(**packed_row(rows), temperature=1.0).log_probs[0][inner], expected, **CLOSE)


def test_boundaries_come_from_the_position_ids_when_nobody_gives_them() -> None:
    import torch

    from services.trainer.varlen import boundaries

    rows = tokens([3, 1, 7])
    model, packed = packed_model(2), packed_row(rows)
    starts, longest = boundaries(packed["position_ids"])
    assert (starts.tolist(), longest) == ([0, 3, 4, 11], 7)
    named = model.model(packed["input_ids"], position_ids=packed["position_ids"], use_cache=False)[0]
    given_ = {"cu_seq_lens_q": starts, "max_length_q": longest}
    told = model.model(packed["input_ids"], position_ids=packed["position_ids"], use_cache=False, **given_)[0]
    assert torch.equal(named, told)


def test_a_padded_batch_is_refused_and_not_computed_wrongly() -> None:
    import torch

    model = packed_model(0)
    batch, mask = torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with pytest.raises(ValueError, match="expects one row of packed sequences"):
        model.model(input_ids=batch, attention_mask=mask, use_cache=False)


@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 9))
def test_only_tokens_before_a_response_are_projected(lengths: list[int], seed: int) -> None:
    import torch

    from services.trainer.packed_engine import before_responses

    generator = torch.Generator().manual_seed(seed)
    answers = [int(torch.randint(0, length, (1,), generator=generator)) for length in lengths]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    expected: list[int] = []
    for end, answer in zip(ends[1:].tolist(), answers, strict=True):
        expected += range(end - answer - 1, end - 1)
    wanted = before_responses(ends, torch.tensor([0, *answers]).cumsum(0))
    assert wanted.tolist() == expected

    model, row = packed_model(3), packed_row(tokens(lengths))
    whole, some = model(**row, temperature=1.0), model(**row, temperature=1.0, wanted=wanted)
    torch.testing.assert_close(some.log_probs[0][wanted], whole.log_probs[0][wanted], **CLOSE)
    assert some.log_probs.count_nonzero() <= len(wanted)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 50), elements=st.sampled_from([1, 100, 1000, 1 << 28]), temperature=st.floats(0.5, 2))
def test_chunks_change_nothing_about_log_probabilities(count: int, elements: int, temperature: float) -> None:
    import torch

    from services.trainer import token_log_probs as head

    generator = torch.Generator().manual_seed(count)
    hidden, weight = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (count, 30))
    labels = torch.randint(0, 30, (count,), generator=generator)
    upstream = torch.randn(2, count, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_ELEMENTS", elements)
        parts = head.chunks(count, 30)
        found = head.token_log_probs(hidden, weight, labels, temperature=temperature)
        ours = torch.autograd.grad((torch.stack(found) * upstream).sum(), (hidden, weight))
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    expected = (log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1))
    theirs = torch.autograd.grad((torch.stack(expected) * upstream).sum(), (hidden, weight))
    for one, other in zip((*found, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_frozen_head_gets_no_gradient_and_passes_one_on() -> None:
    import torch

    from services.trainer.token_log_probs import token_log_probs

    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8)
    log_probs, _ = token_log_probs(hidden, weight, torch.arange(5))
    torch.autograd.backward(log_probs.sum())
    assert weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_a_saved_model_does_not_name_an_attention_that_others_lack() -> None:
    assert "varlen" not in packed_model(0).config.to_json_string(use_diff=False)


@pytest.mark.parametrize(("device", "vendor"), [("cuda", "nvidia"), ("cpu", "cpu")])
def test_verl_picks_the_packed_engine_before_its_own(device: str, vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.workers.engine.base import EngineRegistry

    from services.trainer.packed_engine import PackedEngine, install

    backends = EngineRegistry._engines["language_model"]
    monkeypatch.setitem(backends, "fsdp2", dict(backends["fsdp2"]))
    monkeypatch.setenv("VERL_ENGINE_DEVICE", device)
    monkeypatch.setenv("VERL_ENGINE_VENDOR", vendor)
    install()
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is PackedEngine


def test_verl_finds_the_boundaries_in_the_signature_of_the_packed_forward_pass() -> None:
    assert "cu_seqlens" in signature(packed_model(0).forward).parameters


def verl_config(model: str, changes: dict[str, str]) -> Any:
    """verl's configuration by the overrides of the demo, with `changes`."""
    import hydra
    import verl

    from services.trainer.overrides import verl_overrides
    from services.trainer.paths import run_paths
    from shared.settings import build_settings

    config = build_settings({"DRZERO_TRAINER__ACTOR__DTYPE": "float32", "DRZERO_TRAINER__ACTOR__DEVICE": "cpu"})
    names = {key.lstrip("+") for key in changes} | {"hydra.run.dir", "hydra.output_subdir"}
    ours = verl_overrides(config, run_paths(config), model=model, resume_from=None)
    kept = [item for item in ours if item.split("=")[0].lstrip("+") not in names]
    single = ["+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32}"]
    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    with hydra.initialize_config_dir(folder, version_base=None):
        return hydra.compose("ppo_trainer", overrides=kept + [f"{k}={v}" for k, v in changes.items()] + single)


def verl_worker(model: str, changes: dict[str, str], engine: type) -> Any:
    """verl's own worker, without Ray, with the given engine class."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    EngineRegistry._engines["language_model"]["fsdp2"]["cpu"] = engine
    config = verl_config(model, changes)
    hf_model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    shape = actor.engine
    shape.use_dynamic_bsz = actor.use_dynamic_bsz
    shape.max_token_len_per_gpu = shape.infer_max_token_len_per_gpu = actor.ppo_max_token_len_per_gpu
    shape.micro_batch_size_per_gpu = shape.infer_micro_batch_size_per_gpu = actor.ppo_micro_batch_size_per_gpu
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=hf_model,
            engine_config=shape,
            optimizer_config=actor.optim,
            checkpoint_config=actor.checkpoint,
        )
    )
    worker.reset()
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def verl_batch(answers: list[int]) -> Any:
    """A batch as the transfer queue delivers it: prompts of 10 to 13 tokens and answers."""
    import torch
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    rows = tokens([10 + i % 4 + answer for i, answer in enumerate(answers)])
    ones = [torch.ones(answer, dtype=torch.long) for answer in answers]
    parts = {
        "input_ids": rows,
        "position_ids": [torch.arange(len(row)) for row in rows],
        "prompts": [row[:-answer] for row, answer in zip(rows, answers, strict=True)],
        "responses": [row[-answer:] for row, answer in zip(rows, answers, strict=True)],
        "response_mask": ones,
        "loss_mask": ones,
        "old_log_probs": [torch.full((answer,), -5.6) for answer in answers],
        "advantages": [torch.full((answer,), 1.0 - i % 3) for i, answer in enumerate(answers)],
    }
    nested = {key: torch.nested.as_nested_tensor(value, layout=torch.jagged) for key, value in parts.items()}
    data = TensorDict(nested, batch_size=len(rows))
    count = {"global_batch_size": len(rows), "mini_batch_size": len(rows), "epochs": 1, "seed": 1}
    tu.assign_non_tensor(data, temperature=0.8, dataloader_kwargs={"shuffle": False}, pad_token_id=0, **count)
    return data


def update_both_ways(model: str, checkpoint: str) -> list[dict[str, Any]]:
    """Log-probabilities and entropies of responses, then loss and gradient norm: of verl's engine and of ours.

    What is trained by ours is left in `checkpoint`.
    """
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from services.trainer import cpu_platform

    cpu_platform.install()
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from services.trainer.packed_engine import PackedEngine

    answers = [3, 17, 1, 9, 30, 12]
    seen = []
    for changes, engine in ((PADDED, FSDPEngineWithLMHead), (PACKED, PackedEngine)):
        worker = verl_worker(model, changes, engine)
        data = verl_batch(answers)
        tu.assign_non_tensor(data, calculate_entropy=True, compute_loss=False)
        known = worker.infer_batch(data)
        rows = {key: [row.tolist() for row in known[key].unbind()] for key in ("log_probs", "entropy")}
        kept = {key: [r[-n - 1 : -1] for r, n in zip(row, answers, strict=True)] for key, row in rows.items()}
        metrics = worker.train_mini_batch(verl_batch(answers))["metrics"]
        seen.append(kept | {name: metrics[name] for name in ("grad_norm", "loss", "actor/pg_loss")})
    worker.save_checkpoint(checkpoint)
    return seen


def test_verls_own_worker_makes_the_same_update_packed_as_padded(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, checkpoint = save_tiny_model(tmp_path / "model"), tmp_path / "checkpoint"
    with multiprocessing.get_context("spawn").Pool(1) as child:  # verl's process group and platform are global
        theirs, ours = child.apply(update_both_ways, (model, str(checkpoint)))
    assert theirs["grad_norm"][0] > 0
    for name, expected in theirs.items():
        for one, other in zip(ours[name], expected, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-4), name
    trained = AutoModelForCausalLM.from_pretrained(checkpoint / "huggingface", dtype="float32").state_dict()
    begun = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert trained.keys() == begun.keys()
    assert any((trained[name] != begun[name]).any() for name in begun)
