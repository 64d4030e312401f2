"""Rounds: what each role starts from, which parts of a run are asked for, and what a run has cost."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import round_world
import structlog
from hypothesis import given
from hypothesis import strategies as st

from services.trainer import run_state
from services.trainer.__main__ import STAGES, chosen, place, run_stage
from services.trainer.driver import only_driver
from services.trainer.paths import run_paths
from services.trainer.questions import question_settings
from services.trainer.rounds import Role, paths_of, proposer_settings, solver_settings
from services.trainer.run_state import RunState, read_state
from services.trainer.seeds import seed_settings
from services.trainer.train import training_settings
from shared.command import UsageError
from shared.files import ArtifactError, publish, read_manifest
from shared.settings import Settings, as_environment, build_settings, changed, profiles

ROOT = Path(__file__).parents[1]
TIMED_WITHOUT_END = """
import signal, sys
from pathlib import Path
from services.trainer import run_state
from shared.settings import Settings
run_state.BEAT_S = 0.05
with run_state.RunState(Path(sys.argv[1]), Settings()).timing("1.train", Path(sys.argv[1]) / "artifact"):
    signal.pause()
"""


def settings_at(place: Path, **more: str) -> Settings:
    """The demo's settings with their files in `place`."""
    return build_settings({"DRZERO_STORAGE__DATA_DIR": str(place / "data"), **more})


def questions_of(settings: Settings, number: int, *, train: int, held_out: int, **rejected: int) -> None:
    """Publish an artifact of so many questions in a round."""
    with publish(paths_of(settings, number, "solver").questions, settings={}, made_from={}) as draft:
        draft.counts = {"train": train, "held_out": held_out, "candidates": train + held_out + sum(rejected.values())}
        draft.counts |= {f"rejected_{reason}": count for reason, count in rejected.items()}


# ---- settings of a role ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", profiles())
def test_settings_travel_through_the_environment_unchanged(name: str) -> None:
    settings = build_settings({"DRZERO_PROFILE": name, "DRZERO_TRAINER__SEED_MESH": "Sepsis,Asthma"})
    settings = changed(settings, {"trainer.role": "solver", "trainer.round": 3, "trainer.reward.gate_at": 0.5})
    assert build_settings(as_environment(settings)) == settings


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)


@given(
    terms=st.lists(texts | st.sampled_from(["Diabetes Mellitus, Type 2", "[x]", '["x"', ""]), max_size=3),
    files=st.lists(st.sampled_from(["a.txt", "a, b.txt", "[1]/c.txt"]), max_size=2),
    ratio=st.tuples(*[st.integers(0, 9)] * 4).filter(any),
    number=st.integers(1, 9),
    rate=st.floats(1e-12, 1, exclude_min=True),
)
def test_changed_settings_travel_too_lists_with_commas_and_empty_ones_among_them(
    terms: list[str], files: list[str], ratio: tuple[int, ...], number: int, rate: float
) -> None:
    changes: dict[str, Any] = {
        "trainer.seed_mesh": terms,
        "trainer.exclude_pmids": files,
        "trainer.evaluation.sets": files,
        "trainer.hop_ratio": ratio,
        "trainer.round": number,
        "trainer.actor.learning_rate": rate,
        "trainer.actor.offload": True,
    }
    settings = changed(build_settings({}), changes)
    assert settings.trainer.seed_mesh == tuple(terms)
    assert build_settings(as_environment(settings)) == settings


@pytest.mark.parametrize("name", profiles())
def test_what_a_role_is_told_in_a_round_reaches_its_child_processes(tmp_path: Path, name: str) -> None:
    settings = settings_at(tmp_path, DRZERO_PROFILE=name)
    for number in (1, 2):
        questions_of(settings, number, train=1000, held_out=100)
        for own in (proposer_settings(settings, number), solver_settings(settings, number)):
            assert build_settings(as_environment(own)) == own


def test_a_change_leaves_the_settings_it_starts_from_as_they_are() -> None:
    settings = build_settings({})
    other = changed(settings, {"trainer.reward.attempts": 4})
    assert (settings, other.trainer.reward.attempts) == (build_settings({}), 4)


@pytest.mark.parametrize(
    ("name", "value"), [("trainer.step", 3), ("trainer.actor.nothing", 1), ("trainer.role", "judge"), ("gpus", 0)]
)
def test_an_unknown_name_or_a_value_out_of_bounds_is_no_change(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name.rpartition(".")[2]):
        changed(build_settings({}), {name: value})


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


@pytest.mark.parametrize("name", profiles())
def test_a_proposers_training_is_that_of_the_settings_but_for_its_round_and_its_models(
    tmp_path: Path, name: str
) -> None:
    settings = settings_at(tmp_path, DRZERO_PROFILE=name)
    own = proposer_settings(settings, 2)
    models = {"trainer.actor.model": "x", "solver.model": "x", "solver.in_place_of": None, "trainer.round": 1}
    assert changed(own, models) == changed(settings, models)


@pytest.mark.parametrize("role", ["proposer", "solver"])
def test_each_round_and_role_has_its_own_files_and_a_round_shares_questions_and_report(
    tmp_path: Path, role: Role
) -> None:
    settings = settings_at(tmp_path)
    own, other, later = (
        paths_of(settings, 1, role),
        paths_of(settings, 1, "solver" if role == "proposer" else "proposer"),
        paths_of(settings, 2, role),
    )
    of_a_role = ("seeds", "training", "weights", "last_good", "checkpoints", "log")
    assert not {getattr(own, part) for part in of_a_role} & {getattr(other, part) for part in of_a_role}
    for part in ("questions", "evaluation", "report", "candidates"):
        assert getattr(own, part) == getattr(other, part) != getattr(later, part)
    assert own.run == other.run == later.run == tmp_path / "data" / "runs" / "demo"


def test_a_further_round_changes_nothing_of_those_before() -> None:
    one, three = (proposer_settings(build_settings({"DRZERO_TRAINER__ITERATIONS": n}), 1) for n in ("1", "3"))
    assert seed_settings(one.trainer) == seed_settings(three.trainer)
    assert training_settings(one) == training_settings(three)
    assert question_settings(one) == question_settings(three)


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
    assert (own.trainer.worked_examples, own.trainer.guided_tool_call) == (reward.worked_examples, False)


def test_in_round_1_the_solver_starts_from_the_model_that_is_served(tmp_path: Path) -> None:
    settings = settings_at(tmp_path, DRZERO_TRAINER__ACTOR__MODEL="/models/proposer")
    questions_of(settings, 1, train=9, held_out=100)
    own = solver_settings(settings, 1)
    assert own.trainer.actor.model == settings.solver.model
    assert own.trainer.eval_seeds == settings.trainer.solver.eval_questions


@pytest.mark.parametrize(("attempt", "expected"), [({}, 64 * 2 + 128 + 64), ({"MAX_TURNS": "1"}, 64)])
def test_an_answer_in_training_may_be_as_long_as_all_its_turns_and_results(
    tmp_path: Path, attempt: dict[str, str], expected: int
) -> None:
    own = {f"DRZERO_TRAINER__REWARD__{name}": value for name, value in attempt.items()}
    settings = settings_at(tmp_path, DRZERO_TRAINER__SOLVER__PROMPT_TOKENS="100", **own)
    questions_of(settings, 1, train=9, held_out=1)
    assert solver_settings(settings, 1).trainer.response_tokens == expected


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


def refusal(folder: Path, *, train: int, held_out: int, **rejected: int) -> str:
    """What the solver's settings are refused with, for so many questions."""
    settings = settings_at(folder)
    questions_of(settings, 1, train=train, held_out=held_out, **rejected)
    with pytest.raises(UsageError) as refused:
        solver_settings(settings, 1)
    return str(refused.value)


def test_a_lower_number_of_prompts_is_proposed_only_where_it_helps(tmp_path: Path) -> None:
    lower = "lower DRZERO_TRAINER__SOLVER__PROMPTS_PER_STEP to 1"
    assert lower in refusal(tmp_path / "few", train=1, held_out=1)
    assert "lower" not in refusal(tmp_path / "none", train=0, held_out=1)
    unkept = refusal(tmp_path / "unkept", train=1, held_out=0)
    assert "lower" not in unkept
    assert "as soon as two papers have verified questions" in unkept


REASONS = {
    "malformed": "DRZERO_TRAINER__STEPS", "not_answerable": "lower DRZERO_TRAINER__QUESTIONS__MIN_WITH_EVIDENCE",
    "known": "raise DRZERO_TRAINER__QUESTIONS__MAX_WITHOUT", "duplicate": "raise DRZERO_TRAINER__QUESTIONS__LIKENESS",
    "held_out_paper": "lower DRZERO_TRAINER__QUESTIONS__HELD_OUT_SHARE", "evaluation_paper": "ingest more papers",
}  # fmt: skip


@pytest.mark.parametrize("worst", REASONS)
def test_the_commonest_reason_of_a_rejection_is_named_with_its_setting(tmp_path: Path, worst: str) -> None:
    said = refusal(tmp_path, train=0, held_out=1, **{reason: 9 if reason == worst else 2 for reason in REASONS})
    assert f"9 of 20 candidates were rejected as `{worst}`: " in said
    assert REASONS[worst] in said
    assert not any(words in said for reason, words in REASONS.items() if reason != worst)


@pytest.mark.parametrize("share", [0, 1])
def test_neither_none_nor_all_of_the_papers_can_be_kept_out(share: int) -> None:
    with pytest.raises(ValueError, match=r"held_out_share is '.' *: "):
        build_settings({"DRZERO_TRAINER__QUESTIONS__HELD_OUT_SHARE": str(share)})


def test_without_questions_the_artifact_that_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected the artifact .*questions, found none"):
        solver_settings(settings_at(tmp_path), 1)


# ---- parts of a run --------------------------------------------------------------------------------------------------


def test_a_run_has_all_stages_of_all_rounds_in_order() -> None:
    assert chosen("", "", 2) == [(number, name) for number in (1, 2) for name in STAGES]


def test_a_part_may_name_its_rounds() -> None:
    assert chosen("2.questions", "2.solver_seeds", 3) == [(2, "questions"), (2, "solver_seeds")]
    assert chosen("report", "", 1) == [(1, "report")]
    assert chosen("", "seeds", 2)[-1] == (2, "seeds")


@given(first=st.integers(0, 26), length=st.integers(0, 26))
def test_a_part_is_the_stages_from_its_first_to_its_last_without_a_gap(first: int, length: int) -> None:
    run = chosen("", "", 3)
    part = run[first : first + length + 1]
    begin, end = (f"{number}.{name}" for number, name in (part[0], part[-1]))
    assert chosen(begin, end, 3) == part


@pytest.mark.parametrize(
    "text", ["traim", "3.train", "0.train", "x.train", "1.", "1.traim", "2.1.train", ".train", "01.train", "١.train"]
)
def test_no_such_place_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(UsageError, match=r"unknown place .* expected one of seeds, train, .* a round of 1 to 2"):
        chosen(text, "", 2)


places = st.builds("{}{}{}".format, texts, st.sampled_from([".", "", "1.", " "]), st.sampled_from([*STAGES]))


@given(text=texts | places)
def test_a_text_is_a_stage_with_or_without_its_round_or_it_is_refused(text: str) -> None:
    known = {*STAGES, *(f"{number}.{name}" for number in (1, 2) for name in STAGES)}
    if text in known:
        number, name = place(text, 2, 2)
        assert text in (name, f"{number}.{name}")
    else:
        with pytest.raises(UsageError, match="expected one of seeds"):
            place(text, 2, 2)


def test_an_end_before_the_beginning_is_refused() -> None:
    with pytest.raises(UsageError, match="--from at or before --to"):
        chosen("2.train", "1.report", 2)


def test_a_second_driver_of_the_same_run_is_refused(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\nfrom services.trainer.driver import only_driver\n"
        "from shared.command import UsageError\n"
        f"try:\n    only_driver(Path({str(tmp_path)!r})).__enter__()\nexcept UsageError as error:\n    print(error)\n"
    )
    with only_driver(tmp_path):
        said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "another process drives the run" in said.stdout
    with only_driver(tmp_path):
        pass  # it is free again


def test_a_driver_that_was_killed_leaves_the_run_free(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom services.trainer.driver import only_driver\n"
        f"with only_driver(Path({str(tmp_path)!r})):\n    print('driving', flush=True)\n    sys.stdin.read()\n"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **pipes) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "driving\n"
            with pytest.raises(UsageError, match=f"another process drives the run {tmp_path}; wait for it or stop it"):
                only_driver(tmp_path).__enter__()
            with only_driver(tmp_path / "another run"):
                pass
        finally:
            other.kill()
    assert other.returncode == -signal.SIGKILL
    with only_driver(tmp_path):
        pass


# ---- what a stage needs before it begins -----------------------------------------------------------------------------


def spoil(file: Path, how: str) -> None:
    """Swap, truncate or remove a file of an artifact."""
    if how == "missing":
        file.unlink()
    else:
        text = file.read_text(encoding="utf-8")
        file.write_text(text[:-1] if how == "truncated" else text.replace("?", "!"), encoding="utf-8")


def second_round(place: Path, url: str) -> Settings:
    """A run with a first round, and all of the second that its trainings need."""
    settings = round_world.settings_at(place, url, trainer__iterations=2, trainer__solver__prompts_per_step=1)
    rows = [round_world.question_of(f"{n}", f"Question {n}?", "zinc", held_out=n == 0) for n in range(3)]
    for number in (1, 2):
        round_world.publish_round(settings, number, rows)
    for role in ("proposer", "solver"):
        paths = paths_of(settings, 2, role)
        round_world.publish_files(paths.seeds, {"seeds": role})
        paths.training.unlink()
    return settings


@pytest.mark.parametrize("how", ["swapped", "truncated", "missing"])
@pytest.mark.parametrize(("stage", "role"), [("train", "proposer"), ("train", "solver"), ("solver_train", "solver")])
def test_a_training_never_begins_with_weights_that_are_not_those_of_the_round_before(
    tmp_path: Path, stage: str, role: Role, how: str
) -> None:
    with round_world.world_of(lambda _: "") as world:
        settings = second_round(tmp_path, world.url)
        spoil(paths_of(settings, 1, role).weights / "tokenizer.json", how)
        state = RunState(tmp_path, settings)
        with pytest.raises(UsageError, match=rf"1/{role}/weights.*tokenizer\.json.*make .* again"):
            run_stage(2, stage, settings, state, structlog.get_logger())
    assert (world.chats, world.loaded) == ([], [])
    assert not settings.storage.scratch_dir.exists()
    assert state.stages[f"2.{stage}"]["finished"] is None


@pytest.mark.parametrize(("stage", "role"), [("train", "proposer"), ("train", "solver"), ("solver_train", "solver")])
def test_a_training_never_begins_with_whole_weights_that_are_somebody_elses(
    tmp_path: Path, stage: str, role: Role
) -> None:
    with round_world.world_of(lambda _: "") as world:
        settings = second_round(tmp_path, world.url)
        round_world.publish_weights_at(tmp_path / "elsewhere" / "weights", "of another run")
        weights = paths_of(settings, 1, role).weights
        weights.unlink()
        weights.symlink_to(tmp_path / "elsewhere" / "weights")
        with pytest.raises(UsageError, match=rf"expected the weights of training .* in .*1/{role}/weights, found"):
            run_stage(2, stage, settings, RunState(tmp_path, settings), structlog.get_logger())
    assert not settings.storage.scratch_dir.exists()


@pytest.mark.parametrize("how", ["swapped", "truncated", "missing"])
def test_a_proposer_whose_weights_are_damaged_writes_no_questions(tmp_path: Path, how: str) -> None:
    with round_world.world_of(lambda _: "") as world:
        settings = second_round(tmp_path, world.url)
        spoil(paths_of(settings, 2, "proposer").weights / "tokenizer.json", how)
        with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
            run_stage(2, "questions", settings, RunState(tmp_path, settings), structlog.get_logger())
    assert (world.chats, world.loaded) == ([], [])


def test_a_stage_begins_only_within_the_budget(tmp_path: Path) -> None:
    settings = changed(settings_at(tmp_path), {"storage.budget_gb": 1e-6})
    with publish(tmp_path / "data" / "corpus", settings={}, made_from={}) as draft:
        (draft.path / "shard").write_bytes(b"x" * 2000)
    state = RunState(tmp_path, settings)
    with pytest.raises(ArtifactError, match=r"DRZERO_STORAGE__BUDGET_GB = 1e-06; .*--prune"):
        run_stage(1, "seeds", settings, state, structlog.get_logger())
    assert state.stages == {}


# ---- what it has cost ------------------------------------------------------------------------------------------------


def test_interrupted_parts_add_up_and_what_is_reused_costs_nothing_again(tmp_path: Path) -> None:
    settings = settings_at(tmp_path, DRZERO_TRAINER__PRICE_PER_HOUR="3600")
    artifact = tmp_path / "artifact"
    state = RunState(tmp_path, settings)
    with pytest.raises(RuntimeError), state.timing("1.seeds", artifact):
        raise RuntimeError
    assert state.stages["1.seeds"]["artifact"] is None
    state.stages["1.seeds"]["unfinished"]["seconds"] = 100.0
    with state.timing("1.seeds", artifact), publish(artifact, settings={}, made_from={}):
        pass
    finished = read_state(tmp_path)["1.seeds"]
    assert finished["artifact"] == read_manifest(artifact).identity
    assert 100 <= finished["seconds"] < 160
    assert finished["cost"] == pytest.approx(finished["seconds"], abs=0.1)
    with RunState(tmp_path, settings).timing("1.seeds", artifact):
        pass
    assert read_state(tmp_path)["1.seeds"] == finished


def test_of_a_driver_that_is_killed_only_the_last_seconds_are_lost(tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    driver = subprocess.Popen([sys.executable, "-c", TIMED_WITHOUT_END, str(tmp_path)], cwd=ROOT)
    try:
        noted = 0.0
        while noted < 0.3:
            assert driver.poll() is None
            noted = read_state(tmp_path).get("1.train", {"unfinished": {"seconds": 0.0}})["unfinished"]["seconds"]
    finally:
        driver.kill()
        driver.wait()
    assert read_state(tmp_path)["1.train"]["finished"] is None
    state = RunState(tmp_path, settings_at(tmp_path))
    with state.timing("1.train", artifact), publish(artifact, settings={}, made_from={}):
        pass
    assert noted - 0.1 <= read_state(tmp_path)["1.train"]["seconds"] < 60
    assert read_state(tmp_path)["1.train"]["unfinished"] is None
    assert not list(tmp_path.glob(".state.json.*"))


def test_what_is_made_again_is_counted_anew(tmp_path: Path) -> None:
    state, artifact = RunState(tmp_path, settings_at(tmp_path)), tmp_path / "artifact"
    for version in (1, 2):
        with state.timing("1.seeds", artifact), publish(artifact, settings={"version": version}, made_from={}):
            pass
        state.stages["1.seeds"]["seconds"] += 100 * (version == 1)
    assert read_state(tmp_path)["1.seeds"]["seconds"] < 60
    assert read_state(tmp_path)["1.seeds"]["cost"] is None


def test_a_remake_that_was_interrupted_counts_with_the_rest_of_it_and_not_with_what_it_replaces(tmp_path: Path) -> None:
    state, artifact = RunState(tmp_path, settings_at(tmp_path)), tmp_path / "artifact"
    with state.timing("1.seeds", artifact), publish(artifact, settings={"version": 1}, made_from={}):
        pass
    state.stages["1.seeds"]["seconds"] = 1000.0
    with pytest.raises(RuntimeError), state.timing("1.seeds", artifact):
        raise RuntimeError
    state.stages["1.seeds"]["unfinished"]["seconds"] = 100.0
    again = RunState(tmp_path, settings_at(tmp_path))
    again.stages = state.stages
    with again.timing("1.seeds", artifact), publish(artifact, settings={"version": 2}, made_from={}):
        pass
    found = read_state(tmp_path)["1.seeds"]
    assert 100 <= found["seconds"] < 160
    assert found["artifact"] == read_manifest(artifact).identity
    assert found["finished"] is not None
    assert found["unfinished"] is None


def test_a_finished_account_outlives_a_remake_that_fails_and_is_given_up(tmp_path: Path) -> None:
    state, artifact = RunState(tmp_path, settings_at(tmp_path)), tmp_path / "artifact"
    with state.timing("1.seeds", artifact), publish(artifact, settings={}, made_from={}):
        pass
    state.stages["1.seeds"]["seconds"] = 1000.0
    finished = dict(state.stages["1.seeds"])
    for _ in range(2):
        with pytest.raises(RuntimeError), state.timing("1.seeds", artifact):
            raise RuntimeError
        state.stages["1.seeds"]["unfinished"]["seconds"] += 50
    with state.timing("1.seeds", artifact):
        pass  # the settings are as before, and the artifact is reused
    found = state.stages["1.seeds"]
    assert found | {"unfinished": None} == finished
    assert 100 <= found["unfinished"]["seconds"] < 160
    with state.timing("1.seeds", artifact), publish(artifact, settings={"version": 2}, made_from={}):
        pass
    found = read_state(tmp_path)["1.seeds"]
    assert 100 <= found["seconds"] < 160  # what failed is paid once, by what finished in the end
    assert found["unfinished"] is None


def test_a_stage_that_has_never_finished_has_an_account_of_nothing_but_what_is_unfinished(tmp_path: Path) -> None:
    state = RunState(tmp_path, settings_at(tmp_path, DRZERO_TRAINER__PRICE_PER_HOUR="3600"))
    with pytest.raises(RuntimeError), state.timing("1.seeds", tmp_path / "artifact"):
        raise RuntimeError
    found = read_state(tmp_path)["1.seeds"]
    assert (found["artifact"], found["finished"], found["seconds"], found["cost"]) == (None, None, 0.0, None)
    assert found["unfinished"].keys() == {"seconds", "energy_wh", "cost"}
    assert found["unfinished"]["cost"] == pytest.approx(found["unfinished"]["seconds"], abs=0.1)


def test_each_stage_has_its_own_account_and_another_process_reads_them_all(tmp_path: Path) -> None:
    state = RunState(tmp_path, settings_at(tmp_path))
    for label in ("1.seeds", "1.train", "2.seeds"):
        with state.timing(label, tmp_path / label), publish(tmp_path / label, settings={}, made_from={}):
            pass
    assert list(read_state(tmp_path)) == ["1.seeds", "1.train", "2.seeds"]
    assert RunState(tmp_path, settings_at(tmp_path)).stages == state.stages
    assert read_state(tmp_path / "no run") == {}


def test_energy_adds_up_where_cards_report_it_and_is_none_where_they_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([1000.0, 4600.0, 10_000.0, 17_200.0, None, None])
    monkeypatch.setattr(run_state, "energy_joules", lambda: next(readings))
    state, artifact = RunState(tmp_path, settings_at(tmp_path)), tmp_path / "artifact"
    with pytest.raises(RuntimeError), state.timing("1.train", artifact):
        raise RuntimeError
    for label in ("1.train", "1.publish"):
        with state.timing(label, artifact), publish(artifact, settings={}, made_from={}):
            pass
    stages = read_state(tmp_path)
    assert [stages[label]["energy_wh"] for label in ("1.train", "1.publish")] == [3.0, None]
