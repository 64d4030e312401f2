"""Rounds: what each role starts from, which parts of a run are asked for, and what a run has cost."""

import subprocess
import sys
from pathlib import Path

import pytest

from services.trainer.__main__ import STAGES, chosen, only_driver
from services.trainer.paths import run_paths
from services.trainer.rounds import paths_of, proposer_settings, solver_settings
from services.trainer.run_state import RunState, read_state
from shared.command import UsageError
from shared.files import publish, read_manifest
from shared.settings import Settings, as_environment, build_settings, changed, profiles

ROOT = Path(__file__).parents[1]


def settings_at(place: Path, **more: str) -> Settings:
    """The demo's settings with their files in `place`."""
    return build_settings({"DRZERO_STORAGE__DATA_DIR": str(place / "data"), **more})


def questions_of(settings: Settings, number: int, *, train: int, held_out: int) -> None:
    """Publish an artifact of so many questions in a round."""
    with publish(paths_of(settings, number, "solver").questions, settings={}, made_from={}) as draft:
        draft.counts = {"train": train, "held_out": held_out}


# ---- settings of a role ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", profiles())
def test_settings_travel_through_the_environment_unchanged(name: str) -> None:
    settings = build_settings({"DRZERO_PROFILE": name, "DRZERO_TRAINER__SEED_MESH": "Sepsis,Asthma"})
    settings = changed(settings, {"trainer.role": "solver", "trainer.round": 3, "trainer.reward.gate_at": 0.5})
    assert build_settings(as_environment(settings)) == settings


def test_a_change_that_breaks_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts_per_step"):
        changed(build_settings({}), {"trainer.prompts_per_step": 10_000})


def test_round_1_starts_from_the_settings_and_round_2_from_round_1(tmp_path: Path) -> None:
    settings = settings_at(tmp_path)
    first, second = proposer_settings(settings, 1), proposer_settings(settings, 2)
    assert (first.trainer.actor.model, first.solver.model) == (settings.trainer.actor.model, settings.solver.model)
    runs = tmp_path / "data" / "runs" / "demo" / "1"
    assert second.trainer.actor.model == str(runs / "proposer" / "weights")
    assert second.solver.model == str(runs / "solver" / "weights")
    assert run_paths(second).weights == tmp_path / "data" / "runs" / "demo" / "2" / "proposer" / "weights"


def test_the_solver_is_trained_as_it_answers(tmp_path: Path) -> None:
    settings = settings_at(tmp_path)
    questions_of(settings, 2, train=9, held_out=1)
    own, reward = solver_settings(settings, 2), settings.trainer.reward
    assert own.trainer.actor.model == str(tmp_path / "data" / "runs" / "demo" / "1" / "solver" / "weights")
    assert own.solver.model == settings.solver.model
    assert (own.trainer.role, own.trainer.round, own.trainer.advantage) == ("solver", 2, "grpo")
    assert (own.trainer.max_turns, own.trainer.turn_tokens) == (reward.max_turns, reward.max_new_tokens)
    assert own.trainer.response_tokens >= reward.max_turns * reward.max_new_tokens + reward.max_tool_tokens
    assert own.trainer.kv_tokens == settings.trainer.kv_tokens
    assert (own.trainer.seeds, own.trainer.eval_seeds) == (9, 1)


@pytest.mark.parametrize("name", profiles())
def test_an_answer_in_training_has_the_context_of_an_attempt_and_fits_the_memory_of_the_proposers_plan(
    tmp_path: Path, name: str
) -> None:
    settings = settings_at(tmp_path, DRZERO_PROFILE=name)
    questions_of(settings, 1, train=1000, held_out=100)
    own, longest = solver_settings(settings, 1), settings.trainer.prompt_tokens + settings.trainer.response_tokens
    assert own.trainer.prompt_tokens + own.trainer.response_tokens <= min(settings.solver.context_tokens, longest)
    assert own.trainer.turn_tokens < own.trainer.response_tokens


@pytest.mark.parametrize(("train", "held_out"), [(1, 5), (9, 0)])
def test_too_few_questions_are_refused_with_what_to_change(tmp_path: Path, train: int, held_out: int) -> None:
    settings = settings_at(tmp_path)
    questions_of(settings, 1, train=train, held_out=held_out)
    with pytest.raises(UsageError, match=rf"found {train} and {held_out}; raise DRZERO_TRAINER__QUESTIONS__PAPERS"):
        solver_settings(settings, 1)


# ---- parts of a run --------------------------------------------------------------------------------------------------


def test_a_run_has_all_stages_of_all_rounds_in_order() -> None:
    assert chosen("", "", 2) == [(number, name) for number in (1, 2) for name in STAGES]


def test_a_part_may_name_its_rounds() -> None:
    assert chosen("2.questions", "2.solver_seeds", 3) == [(2, "questions"), (2, "solver_seeds")]
    assert chosen("report", "", 1) == [(1, "report")]
    assert chosen("", "seeds", 2)[-1] == (2, "seeds")


@pytest.mark.parametrize("text", ["traim", "3.train", "0.train", "x.train", "1.", "1.traim", "2.1.train"])
def test_no_such_place_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(UsageError, match=r"unknown place .* expected one of seeds, train, .* a round of 1 to 2"):
        chosen(text, "", 2)


def test_an_end_before_the_beginning_is_refused() -> None:
    with pytest.raises(UsageError, match="--from at or before --to"):
        chosen("2.train", "1.report", 2)


def test_a_second_driver_of_the_same_run_is_refused(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\nfrom services.trainer.__main__ import only_driver\n"
        "from shared.command import UsageError\n"
        f"try:\n    only_driver(Path({str(tmp_path)!r})).__enter__()\nexcept UsageError as error:\n    print(error)\n"
    )
    with only_driver(tmp_path):
        said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "another process drives the run" in said.stdout
    with only_driver(tmp_path):
        pass  # it is free again


# ---- what it has cost ------------------------------------------------------------------------------------------------


def test_interrupted_parts_add_up_and_what_is_reused_costs_nothing_again(tmp_path: Path) -> None:
    settings = settings_at(tmp_path, DRZERO_TRAINER__PRICE_PER_HOUR="3600")
    artifact = tmp_path / "artifact"
    state = RunState(tmp_path, settings)
    with pytest.raises(RuntimeError), state.timing("1.seeds", artifact):
        raise RuntimeError
    assert state.stages["1.seeds"]["artifact"] is None
    state.stages["1.seeds"]["seconds"] = 100.0
    with state.timing("1.seeds", artifact), publish(artifact, settings={}, made_from={}):
        pass
    finished = read_state(tmp_path)["1.seeds"]
    assert finished["artifact"] == read_manifest(artifact).identity
    assert 100 <= finished["seconds"] < 160
    assert finished["cost"] == pytest.approx(finished["seconds"], abs=0.1)
    with RunState(tmp_path, settings).timing("1.seeds", artifact):
        pass
    assert read_state(tmp_path)["1.seeds"] == finished


def test_what_is_made_again_is_counted_anew(tmp_path: Path) -> None:
    state, artifact = RunState(tmp_path, settings_at(tmp_path)), tmp_path / "artifact"
    for version in (1, 2):
        with state.timing("1.seeds", artifact), publish(artifact, settings={"version": version}, made_from={}):
            pass
        state.stages["1.seeds"]["seconds"] += 100 * (version == 1)
    assert read_state(tmp_path)["1.seeds"]["seconds"] < 60
    assert read_state(tmp_path)["1.seeds"]["cost"] is None
