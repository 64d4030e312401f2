"""Alarms: what is bad, when it warns, when it ends the run, and what a reader is told to do."""

import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.guards import NAMES, Alarm, alarms, last_good_step
from services.trainer.records import read_metrics
from shared.settings import GuardSettings, known_variables

SETTINGS = GuardSettings()
HEALTHY: dict[str, float | None] = {
    "actor/loss": -0.01,
    "actor/pg_loss": -0.01,
    "actor/grad_norm": 0.4,
    "actor/entropy": 1.3,
    "response_length/mean": 300.0,
    "score_mean": 0.4,
    "invalid_share": 0.0,
    "critic/score/mean": 0.4,
    "repeated_share": 0.1,
    "drzero/refused": 0.0,
    "drzero/groups": 4.0,
    "drzero/groups_flat": 1.0,
}
# What one bad step looks like, by the alarm it raises.
BAD: dict[str, dict[str, float | None]] = {
    "loss": {"actor/pg_loss": math.nan},
    "gradient": {"actor/grad_norm": math.inf},
    "entropy": {"actor/entropy": 0.019},
    "length": {"response_length/mean": 901.0},
    "reward": {"score_mean": 0.09},
    "repeats": {"repeated_share": 0.51},
    "refused": {"drzero/refused": 1.0},
    "flat": {"drzero/groups_flat": 4.0},
}

healthy_steps = st.fixed_dictionaries(
    {},
    optional={
        "actor/loss": st.floats(-1, 1),
        "actor/pg_loss": st.floats(-1, 1),
        "actor/grad_norm": st.floats(0, 100),
        "actor/entropy": st.floats(SETTINGS.min_entropy, 10),
        "response_length/mean": st.floats(100, 299),
        "score_mean": st.floats(0.4, 1.5),
        "repeated_share": st.floats(0, 0.5),
        "drzero/refused": st.just(0.0),
        "drzero/groups": st.integers(1, 4),
        "drzero/groups_flat": st.just(0.0),
    },
)
values = st.none() | st.floats(allow_nan=True, allow_infinity=True)
any_steps = st.dictionaries(st.sampled_from(sorted(HEALTHY)), values)
histories = st.dictionaries(st.integers(0, 30), any_steps, max_size=15)


def run_of(*bad: dict[str, float | None], healthy: int = 6) -> dict[int, dict[str, float | None]]:
    """Healthy steps from 1 on, then these."""
    steps = [HEALTHY] * healthy + [HEALTHY | one for one in bad]
    return dict(enumerate(steps, start=1))


def raised(history: dict[int, dict[str, float | None]]) -> dict[str, Alarm]:
    return {alarm.name: alarm for alarm in alarms(history, SETTINGS)}


def test_every_alarm_has_a_bad_step_in_this_file() -> None:
    assert set(BAD) == set(NAMES)


@pytest.mark.parametrize("name", ["gradient", "entropy", "length", "reward"])
def test_the_first_bad_step_warns_and_the_third_in_a_row_ends_the_run(name: str) -> None:
    for streak, fatal in ((1, False), (2, False), (3, True), (4, True)):
        (alarm,) = alarms(run_of(*[BAD[name]] * streak), SETTINGS)
        assert (alarm.name, alarm.step, alarm.streak, alarm.fatal) == (name, 7, streak, fatal)


@pytest.mark.parametrize("key", ["actor/loss", "actor/pg_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_loss_that_is_not_finite_ends_the_run_at_once(key: str, value: float | None) -> None:
    (alarm,) = alarms(run_of({key: value}), SETTINGS)
    assert (alarm.name, alarm.step, alarm.streak, alarm.fatal) == ("loss", 7, 1, True)
    assert alarm.text.startswith(f"{key} not finite at step 7")


def test_a_norm_that_verls_log_wrote_as_null_is_seen(tmp_path: Path) -> None:
    # verl's file logger uses orjson, which knows no NaN.
    (tmp_path / "metrics-1.jsonl").write_text('{"step":1,"data":{"actor/loss":0.1,"actor/grad_norm":null}}\n')
    assert [alarm.name for alarm in alarms(read_metrics(tmp_path), SETTINGS)] == ["gradient"]


def test_a_refused_batch_warns_and_never_ends_the_run() -> None:
    (alarm,) = alarms(run_of(*[BAD["refused"]] * 20), SETTINGS)
    assert (alarm.name, alarm.streak, alarm.fatal) == ("refused", 20, False)


def test_flat_groups_are_said_from_the_fifth_step_on_and_never_end_the_run() -> None:
    assert alarms(run_of(*[BAD["flat"]] * 4), SETTINGS) == []
    for streak in (5, 20):
        (alarm,) = alarms(run_of(*[BAD["flat"]] * streak), SETTINGS)
        assert (alarm.name, alarm.step, alarm.streak, alarm.fatal) == ("flat", 7, streak, False)
        assert "DRZERO_TRAINER__REWARD__FORMAT_FORM=graded" in alarm.text


@pytest.mark.parametrize(
    "edge",
    [
        {"actor/entropy": 0.02},
        {"response_length/mean": 900.0},
        {"score_mean": 0.1},
        {"repeated_share": 0.5},
        {"drzero/groups": 0.0, "drzero/groups_flat": 0.0},
        {"drzero/groups_flat": 3.0},
    ],
)
def test_a_measure_on_its_bound_is_healthy(edge: dict[str, float | None]) -> None:
    assert alarms(run_of(*[edge] * 6), SETTINGS) == []


@pytest.mark.parametrize("name", NAMES)
def test_one_good_step_ends_a_streak_and_the_next_bad_one_begins_anew(name: str) -> None:
    needed = SETTINGS.flat_steps if name == "flat" else 1
    broken = [BAD[name]] * 6 + [{}]
    assert alarms(run_of(*broken), SETTINGS) == []
    again = raised(run_of(*broken, *[BAD[name]] * needed))
    assert (again[name].step, again[name].streak) == (14, needed)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_measure_raises_no_alarm(name: str) -> None:
    for key in BAD[name]:
        history = run_of(*[BAD[name]] * 5)
        newest = {k: v for k, v in HEALTHY.items() if k != key and not (name == "reward" and "score" in k)}
        assert name not in raised(history | {12: newest})


def test_a_step_without_a_measure_neither_breaks_nor_lengthens_a_streak() -> None:
    history = run_of(BAD["entropy"], {}, BAD["entropy"])
    del history[8]["actor/entropy"]
    assert raised(history)["entropy"].streak == 2


def test_the_usual_length_is_that_of_the_first_five_steps() -> None:
    late = {step: {"response_length/mean": 1000.0 if step > 5 else 300.0} for step in range(1, 7)}
    assert [alarm.step for alarm in alarms(late, SETTINGS)] == [6]
    early = {step: {"response_length/mean": 1000.0 if step == 5 else 100.0} for step in range(1, 6)}
    assert alarms(early, SETTINGS) == []


def test_a_fall_from_a_reward_that_was_never_meaningful_is_no_collapse() -> None:
    assert alarms({step: {"score_mean": 0.04 if step < 9 else 0.0} for step in range(1, 12)}, SETTINGS) == []


def test_one_lucky_step_is_no_best_reward() -> None:
    assert alarms({step: {"score_mean": 1.4 if step == 3 else 0.1} for step in range(1, 12)}, SETTINGS) == []


def test_verls_mean_stands_in_only_where_ours_is_not_known() -> None:
    verls: dict[str, float] = {"critic/score/mean": 0.4}
    fallen = dict.fromkeys(range(1, 7), verls) | {7: {"critic/score/mean": 0.0}}
    assert [alarm.name for alarm in alarms(fallen, SETTINGS)] == ["reward"]
    all_lost = {"critic/score/mean": 0.0, "invalid_share": 1.0}
    assert alarms(fallen | {7: all_lost}, SETTINGS) == []


def test_the_gate_that_closes_is_no_collapse_and_a_fall_behind_it_is_one() -> None:
    graded, gated = {"score_mean": 0.8}, {"score_mean": 0.1, "drzero/gated": 1.0}
    history: dict[int, dict[str, float]] = {step: graded if step < 8 else gated for step in range(1, 14)}
    assert alarms(history, SETTINGS) == []
    assert [a.name for a in alarms(history | {14: {"score_mean": 0.0, "drzero/gated": 1.0}}, SETTINGS)] == ["reward"]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_has_the_step_and_only_variables_that_exist(name: str) -> None:
    text = raised(run_of(*[BAD[name]] * 5))[name].text
    variables = re.findall(r"DRZERO_[A-Z_]+", text)
    assert variables
    assert set(variables) <= known_variables().keys()
    assert "step 11" in text
    assert "5 steps in a row, since step 7" in text


def test_the_last_good_step_is_before_the_first_bad_one_of_all_harmful_alarms() -> None:
    history = run_of(BAD["flat"], BAD["flat"], BAD["flat"] | BAD["entropy"], BAD["flat"] | BAD["entropy"], BAD["flat"])
    history[11] |= BAD["entropy"] | BAD["gradient"]
    found = alarms(history, SETTINGS)
    assert {alarm.name for alarm in found} == {"flat", "entropy", "gradient"}
    assert last_good_step(found) == 8


def test_there_is_no_last_good_step_while_no_harm_is_seen() -> None:
    for harmless in ([], alarms(run_of(BAD["refused"]), SETTINGS)):
        with pytest.raises(ValueError, match="expected an alarm that can end the run"):
            last_good_step(harmless)


def test_an_empty_history_has_no_alarms() -> None:
    assert alarms({}, SETTINGS) == []


@given(st.lists(healthy_steps, max_size=30))
def test_a_healthy_history_never_alarms(steps: list[dict[str, float]]) -> None:
    assert alarms(dict(enumerate(steps)), SETTINGS) == []


@given(histories, st.randoms(use_true_random=False))
def test_the_order_in_which_steps_are_given_is_irrelevant(
    history: dict[int, dict[str, float | None]], order: random.Random
) -> None:
    shuffled = list(history.items())
    order.shuffle(shuffled)
    assert alarms(dict(shuffled), SETTINGS) == alarms(history, SETTINGS)


@given(histories)
def test_alarms_of_any_history_are_consistent(history: dict[int, dict[str, float | None]]) -> None:
    for alarm in alarms(history, SETTINGS):
        assert 1 <= alarm.streak <= len(history)
        assert alarm.step in history
        assert not (alarm.fatal and alarm.name in {"flat", "refused"})
        assert alarm.streak >= SETTINGS.steps or not alarm.fatal or alarm.name == "loss"


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_the_streak_is_the_number_of_bad_steps_at_the_end(bad: list[bool]) -> None:
    history = run_of(*[BAD["entropy"] if one else {} for one in bad])
    at_the_end = len(bad) if all(bad) else bad[::-1].index(False)
    assert (raised(history)["entropy"].streak if at_the_end else 0) == at_the_end
    assert bool(alarms(history, SETTINGS)) == bad[-1]
