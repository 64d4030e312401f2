"""The check before verl starts: every problem is named with its variable, shipped profiles have none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_tokenizer

from services.trainer.checks import (
    arithmetic_problems,
    check_training,
    seed_file_problems,
    training_notes,
    uneven_hops,
)
from services.trainer.fitting import FittedSeed
from services.trainer.overrides import verl_overrides
from services.trainer.paths import RunPaths, run_paths
from services.trainer.seeds import seed_row, spread_hops, write_rows
from services.trainer.solver_seeds import numbered, solver_row
from services.trainer.templates import position_problems, render_probe, template_problems
from shared.command import UsageError
from shared.model_files import CHAT_TEMPLATE
from shared.records import Seed
from shared.settings import Settings, SettingsError, TrainerSettings, build_settings, profiles

Row = dict[str, Any]


def settings(**variables: str | int) -> Settings:
    """Settings of the demo with hops of all numbers, and some of the trainer's variables, as in DRZERO_TRAINER__…."""
    chosen = {"HOP_RATIO": "4,3,2,1", **variables}
    return build_settings({f"DRZERO_TRAINER__{name}": str(value) for name, value in chosen.items()})


def only(problems: list[str]) -> str:
    assert len(problems) == 1
    return problems[0]


# --- settings


@pytest.mark.parametrize("profile", profiles())
def test_a_shipped_profile_has_no_arithmetic_problems(profile: str) -> None:
    assert arithmetic_problems(build_settings({"DRZERO_PROFILE": profile})) == []


@given(prompts=st.integers(1, 64), rollouts=st.integers(1, 4), gpus=st.integers(1, 8), micro=st.integers(1, 4))
def test_a_step_whose_rollouts_do_not_divide_among_devices_and_micro_batches_is_refused(
    prompts: int, rollouts: int, gpus: int, micro: int
) -> None:
    chosen = settings(
        PROMPTS_PER_STEP=prompts, ROLLOUTS_PER_PROMPT=rollouts, ACTOR__GPUS=gpus, ACTOR__MICRO_BATCH=micro, SEEDS=64
    )
    problems = arithmetic_problems(chosen)
    assert bool(problems) == bool(prompts * rollouts % (gpus * micro))
    assert all("DRZERO_TRAINER__PROMPTS_PER_STEP" in problem for problem in problems)


def test_nodes_count_among_the_devices() -> None:
    problem = only(arithmetic_problems(settings(PROMPTS_PER_STEP=4, ROLLOUTS_PER_PROMPT=1, ACTOR__NODES=8)))
    assert "= 1 × 8 × 1 = 8, found 4 × 1 = 4" in problem


def test_batch_32_with_mini_batch_256_cannot_be_written() -> None:
    with pytest.raises(SettingsError, match="DRZERO_TRAINER__MINI_BATCH"):
        settings(PROMPTS_PER_STEP=32, MINI_BATCH=256)
    chosen = settings(PROMPTS_PER_STEP=32)
    written = dict(
        line.split("=", 1) for line in verl_overrides(chosen, run_paths(chosen), model="m", resume_from=None)
    )
    assert written["data.train_batch_size"] == "32"
    assert written["actor_rollout_ref.actor.ppo_mini_batch_size"] == "32"


def test_unknown_configuration_keys_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"DRZERO_TRAINER__TURN_TOKEN;.*DRZERO_TRAINER__TURN_TOKENS"):
        settings(TURN_TOKEN=7)


def test_grpo_needs_a_group_and_hrpo_does_not() -> None:
    assert arithmetic_problems(settings(ADVANTAGE="hrpo", ROLLOUTS_PER_PROMPT=1)) == []
    assert arithmetic_problems(settings(ADVANTAGE="grpo", ROLLOUTS_PER_PROMPT=2)) == []
    problem = only(arithmetic_problems(settings(ADVANTAGE="grpo", ROLLOUTS_PER_PROMPT=1)))
    assert "DRZERO_TRAINER__ROLLOUTS_PER_PROMPT" in problem


def test_a_turn_longer_than_the_response_is_refused() -> None:
    problem = only(arithmetic_problems(settings(TURN_TOKENS=400, RESPONSE_TOKENS=352, MAX_TURNS=1)))
    assert "DRZERO_TRAINER__TURN_TOKENS" in problem
    assert "found 400" in problem


@pytest.mark.parametrize(("response", "fits"), [(241, True), (240, False)])
def test_a_first_turn_and_one_result_must_leave_room_for_an_answer(response: int, fits: bool) -> None:
    chosen = {"TURN_TOKENS": 112, "MAX_TOOL_TOKENS": 128, "RESPONSE_TOKENS": response}
    problems = arithmetic_problems(settings(**chosen))
    assert (problems == []) == fits
    assert all("DRZERO_TRAINER__MAX_TOOL_TOKENS = 128" in problem for problem in problems)
    assert arithmetic_problems(settings(**chosen, HOP_RATIO="1,0,0,0")) == []


def test_a_solver_turn_as_long_as_its_context_is_refused() -> None:
    problem = only(arithmetic_problems(settings(REWARD__MAX_NEW_TOKENS=2048)))
    assert "DRZERO_SOLVER__CONTEXT_TOKENS = 2048" in problem


def test_more_than_one_pass_over_the_seeds_is_allowed_and_noted() -> None:
    chosen = settings(SEEDS=9, PROMPTS_PER_STEP=4, STEPS=5)
    assert arithmetic_problems(chosen) == []
    assert "5 steps pass 2.5 times over seeds for 2 steps" in training_notes(chosen)
    assert not any("pass" in note for note in training_notes(settings(SEEDS=8, PROMPTS_PER_STEP=4, STEPS=2)))


def test_fewer_turns_than_hops_are_noted() -> None:
    assert any("DRZERO_TRAINER__MAX_TURNS is 3" in note for note in training_notes(settings(MAX_TURNS=3)))
    assert not any("MAX_TURNS" in note for note in training_notes(settings(MAX_TURNS=4)))


# --- seed files

TRAINER = TrainerSettings(seeds=20, eval_seeds=4, prompts_per_step=10, prompt_tokens=500)


def good_rows(split: str) -> list[Row]:
    count, first = (20, 100) if split == "train" else (4, 900)
    hops = spread_hops(count, TRAINER.hop_ratio, 10)
    seeds = [Seed(i, str(first + i), hop, f"Document {i}.") for i, hop in enumerate(hops)]
    return [seed_row(FittedSeed(seed, 400), TRAINER, split) for seed in seeds]


def write_seeds(folder: Path, change: Callable[[list[Row]], object] = lambda rows: None) -> Path:
    """Seed files of which `change` has edited the training rows in place."""
    train = good_rows("train")
    change(train)
    write_rows(train, folder / "train.parquet")
    write_rows(good_rows("held_out"), folder / "held_out.parquet")
    return folder


def each(edit: Callable[[Row], object]) -> Callable[[list[Row]], object]:
    return lambda rows: [edit(row) for row in rows]


def one_hop(row: Row) -> None:
    row["data_source"], row["extra_info"]["hop"] = "search_biomedical_1", 1


CHANGES: dict[str, tuple[Callable[[list[Row]], object], str]] = {
    "missing reward_model column": (each(lambda row: row.pop("reward_model")), "expected the columns"),
    "unknown column": (each(lambda row: row.update(note="x")), "expected the columns"),
    "missing field of extra_info": (each(lambda row: row["extra_info"].pop("hop")), "in extra_info"),
    "fewer rows than a step takes": (lambda rows: rows.__delitem__(slice(9, None)), "DRZERO_TRAINER__PROMPTS_PER_STEP"),
    "hop is not the suffix": (lambda rows: rows[3].update(data_source="search_biomedical_9"), "the first is 3"),
    "all seeds 1-hop": (each(one_hop), "DRZERO_TRAINER__HOP_RATIO = 4:3:2:1"),
    "empty prompt": (lambda rows: rows[5].update(prompt=[]), "messages with a role and a text"),
    "prompt of an empty text": (
        lambda rows: rows[5].update(prompt=[{"role": "user", "content": ""}]),
        "messages with a role and a text",
    ),
    "over-long data": (
        lambda rows: rows[2]["extra_info"].update(prompt_tokens=501),
        "DRZERO_TRAINER__PROMPT_TOKENS = 500",
    ),
    "empty tools_kwargs so that no tool is offered": (
        each(lambda row: row["extra_info"].update(tools_kwargs=None)),
        "arguments for the tool search",
    ),
    "unseeded sampling": (each(lambda row: row["extra_info"].update(draw_seed=7)), "DRZERO_TRAINER__SEED = 42"),
    "PMID in both files": (lambda rows: rows[0]["extra_info"].update(pmid="901"), "no PMID in both files, found 1"),
}


def test_seeds_as_they_are_written_have_no_problems(tmp_path: Path) -> None:
    assert seed_file_problems(write_seeds(tmp_path), TRAINER) == []


@pytest.mark.parametrize("name", CHANGES)
def test_a_defect_of_the_seed_files_is_named_once_with_what_to_do(tmp_path: Path, name: str) -> None:
    change, words = CHANGES[name]
    problem = only(seed_file_problems(write_seeds(tmp_path, change), TRAINER))
    assert words in problem
    assert "and run the same command again" in problem


SOLVER = TrainerSettings(
    role="solver", seeds=20, eval_seeds=4, prompts_per_step=10, prompt_tokens=500, rollouts_per_prompt=5
)


def write_questions(folder: Path, change: Callable[[list[Row]], object] = lambda rows: None) -> Path:
    """A solver's seed files, all of one hop, of which `change` has edited the training rows in place."""
    for split, count in (("train", 20), ("held_out", 4)):
        asked = [
            {"split": split, "pmid": f"{count}{n}", "hop": 1, "question": f"Question {n}?", "answer": "AMPK"}
            for n in range(count)
        ]
        prompt = [{"role": "user", "content": "Why?"}]
        rows = numbered([solver_row(one, prompt, 400, SOLVER) for one in asked], split, seed=1)
        if split == "train":
            change(rows)
        write_rows(rows, folder / f"{split}.parquet")
    return folder


def test_a_solvers_seeds_have_any_hops_and_fields_of_their_own(tmp_path: Path) -> None:
    assert seed_file_problems(write_questions(tmp_path), SOLVER) == []
    of_another_role = seed_file_problems(tmp_path, TRAINER)
    assert [("document" in problem and "in extra_info" in problem) for problem in of_another_role] == [True, True]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.__delitem__(slice(9, None)), "DRZERO_TRAINER__SOLVER__PROMPTS_PER_STEP = 10 rows, found 9"),
        (lambda rows: rows[2]["extra_info"].update(prompt_tokens=501), "DRZERO_TRAINER__SOLVER__PROMPT_TOKENS = 500"),
        (each(lambda row: row["extra_info"].pop("answer")), "in extra_info"),
        (lambda rows: rows[0]["extra_info"].update(pmid="41"), "no PMID in both files, found 1"),
    ],
)
def test_a_defect_of_a_solvers_seeds_is_named_with_its_own_variable(
    tmp_path: Path, change: Callable[[list[Row]], object], words: str
) -> None:
    assert words in only(seed_file_problems(write_questions(tmp_path, change), SOLVER))


def test_too_few_kept_out_questions_are_named(tmp_path: Path) -> None:
    more = SOLVER.model_copy(update={"eval_seeds": 5})
    problem = only(seed_file_problems(write_questions(tmp_path), more))
    assert "DRZERO_TRAINER__SOLVER__EVAL_QUESTIONS = 5 rows, found 4" in problem


def test_a_solvers_batch_that_does_not_divide_names_the_solvers_variables() -> None:
    chosen = settings(ROLE="solver", PROMPTS_PER_STEP=3, ROLLOUTS_PER_PROMPT=3, ACTOR__GPUS=2)
    problem = only(arithmetic_problems(chosen))
    assert "DRZERO_TRAINER__SOLVER__PROMPTS_PER_STEP, DRZERO_TRAINER__SOLVER__ROLLOUTS_PER_PROMPT" in problem


def test_a_missing_validation_file_is_named(tmp_path: Path) -> None:
    (write_seeds(tmp_path) / "held_out.parquet").unlink()
    assert "held_out.parquet: expected this file, found none" in only(seed_file_problems(tmp_path, TRAINER))


def test_too_few_held_out_rows_are_named(tmp_path: Path) -> None:
    chosen = TRAINER.model_copy(update={"eval_seeds": 5})
    assert "DRZERO_TRAINER__EVAL_SEEDS = 5 rows, found 4" in only(seed_file_problems(write_seeds(tmp_path), chosen))


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (write_seeds(tmp_path) / "train.parquet").write_text("nothing", encoding="utf-8")
    assert "expected Parquet" in only(seed_file_problems(tmp_path, TRAINER))


@given(count=st.integers(0, 200), batch=st.integers(1, 40), ratio=st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_hops_as_they_are_spread_are_even(count: int, batch: int, ratio: list[int]) -> None:
    if any(ratio):
        assert uneven_hops(spread_hops(count, ratio, batch), ratio, batch) == []


# --- models


def save_model(folder: Path, template: str, *, end: str = "<|im_end|>", positions: int = 8192) -> str:
    from transformers import LlamaConfig

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = template, end
    tokenizer.save_pretrained(folder)
    LlamaConfig(max_position_embeddings=positions).save_pretrained(folder)
    return str(folder)


CHATML = CHAT_TEMPLATE.read_text(encoding="utf-8")
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "no tool schema": (TURNS + OPENING, "show the tool's schema"),
    "messages left out": (
        "{{ tools }}" + TURNS.replace("m in messages", "m in messages[1:]") + OPENING,
        "every message",
    ),
    "roles not told apart": ("{{ tools }}" + TURNS.replace("{{ m.role }}", "user") + OPENING, "four roles apart"),
    "no opening of the reply": ("{{ tools }}" + TURNS, "open the reply"),
    "turns without an end": (
        "{{ tools }}" + TURNS.replace("<|im_end|>", "") + OPENING,
        "end an assistant's turn with its eos_token <|im_end|>",
    ),
}


def test_our_own_template_has_no_problems(tmp_path: Path) -> None:
    model = save_model(tmp_path, CHATML)
    assert template_problems(render_probe(model), model) == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_defect_of_a_chat_template_is_named(tmp_path: Path, name: str) -> None:
    template, words = TEMPLATES[name]
    model = save_model(tmp_path, template)
    assert words in only(template_problems(render_probe(model), model))


def test_a_tokenizer_whose_end_token_is_not_the_templates_is_named(tmp_path: Path) -> None:
    model = save_model(tmp_path, CHATML, end="<|endoftext|>")
    assert "eos_token <|endoftext|>" in only(template_problems(render_probe(model), model))


def test_a_template_that_refuses_a_role_is_named(tmp_path: Path) -> None:
    model = save_model(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match=r"roles must alternate.*DRZERO_TRAINER__ACTOR__MODEL"):
        render_probe(model)


@pytest.mark.parametrize(("positions", "fits"), [(1184, True), (1183, False)])
def test_prompt_and_response_must_fit_the_models_positions(tmp_path: Path, positions: int, fits: bool) -> None:
    (tmp_path / "config.json").write_text(f'{{"max_position_embeddings": {positions}}}', encoding="utf-8")
    problems = position_problems(str(tmp_path), settings().trainer)
    assert (problems == []) == fits
    assert all("DRZERO_TRAINER__PROMPT_TOKENS + DRZERO_TRAINER__RESPONSE_TOKENS" in p for p in problems)
    assert position_problems("some/model-of-the-hub", settings().trainer) == []


# --- all together


def run_with(folder: Path, model: str, **variables: str | int) -> tuple[Settings, RunPaths]:
    asked = {"HOP_RATIO": "4,3,2,1", **variables}
    environ = {f"DRZERO_TRAINER__{name}": str(value) for name, value in asked.items()}
    solver = {"DRZERO_SOLVER__MODEL": model, "DRZERO_SOLVER__CONTEXT_TOKENS": "4096"}
    chosen = build_settings(environ | solver | {"DRZERO_TRAINER__ACTOR__MODEL": model})
    (folder / "seeds").mkdir()
    write_seeds(folder / "seeds")
    return chosen, RunPaths(kept=folder, work=folder, corpus=folder, index=folder)


def test_a_training_without_problems_may_start(tmp_path: Path) -> None:
    chosen, paths = run_with(tmp_path, save_model(tmp_path, CHATML), SEEDS=20, PROMPTS_PER_STEP=10)
    check_training(chosen, paths)


def test_all_problems_are_listed_in_one_message(tmp_path: Path) -> None:
    model = save_model(tmp_path, TURNS + OPENING, positions=500)
    few = {"SEEDS": 20, "PROMPTS_PER_STEP": 10, "PROMPT_TOKENS": 399, "REWARD__MAX_NEW_TOKENS": 4000}
    chosen, paths = run_with(tmp_path, model, **few, ADVANTAGE="grpo", ROLLOUTS_PER_PROMPT=1)
    (paths.seeds / "held_out.parquet").unlink()
    with pytest.raises(UsageError) as caught:
        check_training(chosen, paths)
    lines = str(caught.value).splitlines()
    assert lines[0] == "training cannot start, 6 to mend:"
    expected = [
        "ADVANTAGE=hrpo",
        "PROMPT_TOKENS = 399",
        "held_out.parquet",
        "500 positions",
        "tool's schema",
        "CONTEXT",
    ]
    assert [word in line for word, line in zip(expected, lines[1:], strict=True)] == [True] * 6


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    chosen, paths = run_with(tmp_path, "package:no_such_package/model.gguf", SEEDS=20, PROMPTS_PER_STEP=10)
    with pytest.raises(UsageError, match="expected the Python package no_such_package"):
        check_training(chosen, paths)
