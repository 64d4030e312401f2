"""The numbers and console lines of one step, and how the trainer's status page shows them over HTTP."""

import math
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from round_world import solver_verdict

from services.trainer import status
from services.trainer.guards import NAMES, alarms
from services.trainer.paths import run_paths
from services.trainer.step_metrics import (
    MISMATCH,
    PART_TIMERS,
    attempt_seconds,
    console_lines,
    mismatch,
    shorten,
    step_metrics,
    step_times,
)
from services.trainer.totals import OF_VERL, Totals, families
from shared.files import publish, write_atomically
from shared.settings import GuardSettings, Settings, changed

Verdict = dict[str, Any]
LOST: Verdict = {"valid": 0.0, "invalid_reason": "solver", "score": 0.0, "attempts_valid": 0.0}


def attempt(answer: str = "TP53", ended: str = "answered", seconds: float = 1.0) -> dict[str, Any]:
    return {"answer": answer, "ended": ended, "searches": 1, "seed": 7, "seconds": seconds}


def verdict(right: int = 2, judged: int = 5, **changes: Any) -> Verdict:
    """A valid verdict with `right` of `judged` attempts right, but for these changes."""
    parts = {f"format_{name}": 1.0 for name in ("integrity", "think", "tool", "question", "answer")}
    return {
        "hop": 2,
        "pmid": "7",
        "question": "Which gene does the drug act on?",
        "answer": "TP53",
        "attempts": [attempt(seconds=float(number + 1)) for number in range(judged)],
        "valid": 1.0,
        "invalid_reason": "",
        "score": 0.5,
        "format": 1.0,
        "difficulty": 0.0,
        **parts,
        "citations": 0.0,
        "genes": 1.0,
        "reasoning": 0.5,
        "novelty": 1.0,
        "reasoning_type": "entity",
        "attempts_made": float(judged),
        "attempts_valid": float(judged),
        "attempts_correct": float(right),
        "searches_made": 2.0,
        "calls_failed": 1.0,
        "calls_broken": {},
        "seconds_attempts": 6.0,
        "seconds_generating": 4.0,
        "seconds_searching": 0.5,
        "generated": 100.0,
        "time": 107.0,
        **changes,
    }


judged_verdicts = st.integers(0, 5).flatmap(
    lambda judged: st.builds(
        verdict,
        st.integers(0, judged),
        st.just(judged),
        hop=st.integers(1, 4),
        score=st.floats(0, 1.5),
        novelty=st.floats(0, 1),
        reasoning_type=st.sampled_from(["entity", "cause", "other"]),
    )
)
lost_verdicts = st.sampled_from(["solver", "search", "deadline"]).map(
    lambda reason: verdict(**(LOST | {"invalid_reason": reason}))
)
steps = st.lists(judged_verdicts | lost_verdicts, min_size=1, max_size=12)


def test_no_verdicts_have_no_numbers_and_no_lines() -> None:
    assert step_metrics([]) == {}
    assert console_lines(1, {}, []) == []


def test_invalid_rollouts_alone_give_counts_and_times_but_no_mean() -> None:
    lost = [verdict(**LOST), verdict(**(LOST | {"invalid_reason": "deadline", "attempts": [], "hop": 3}))]
    numbers = step_metrics(lost)
    assert numbers["rollouts"] == 2
    assert numbers["invalid_share"] == 1
    assert (numbers["invalid/solver"], numbers["invalid/deadline"]) == (1, 1)
    allowed = ("invalid", "searches", "rollouts", "ended/", "calls_broken/", "seconds/")
    assert [name for name in numbers if not name.startswith(allowed)] == []
    assert [label for label, _ in console_lines(4, numbers, lost)] == ["Step 4", "Searches"]


def test_an_invalid_rollout_is_in_no_mean() -> None:
    numbers = step_metrics([verdict(score=1.0, format=0.8), verdict(**LOST, format=0.0, hop=2)])
    assert (numbers["score_mean"], numbers["format_mean"], numbers["hop/2/count"]) == (1.0, 0.8, 1)
    assert (numbers["invalid_share"], numbers["judged"]) == (0.5, 1)


def test_every_part_of_the_reward_has_a_mean_and_score_and_format_a_maximum() -> None:
    numbers = step_metrics([verdict(score=0.5, format=0.2, genes=0.0), verdict(score=1.0, format=0.6, bonus=0.1)])
    assert (numbers["score_mean"], numbers["score_max"]) == (0.75, 1.0)
    assert [numbers["format_mean"], numbers["format_max"]] == pytest.approx([0.4, 0.6])
    assert (numbers["genes_mean"], numbers["bonus_mean"], numbers["format_think_mean"]) == (0.5, 0.1, 1.0)
    parts = {"score", "format", "difficulty", "bonus", "citations", "genes", "reasoning", "novelty"}
    formats = {f"format_{name}" for name in ("integrity", "think", "tool", "question", "answer")}
    assert {name.removesuffix("_mean") for name in numbers if name.endswith("_mean") and "/" not in name} == (
        parts | formats
    )


def test_a_solvers_rollouts_have_means_of_their_own_parts_and_no_judged_questions() -> None:
    rows = [solver_verdict(1, answer) for answer in ("zinc", "lead", "lead", "")]
    numbers = step_metrics(rows)
    assert (numbers["score_mean"], numbers["exact_match_mean"], numbers["answered_mean"]) == (0.25, 0.25, 0.75)
    assert not [name for name in numbers if name.startswith(("solved/", "format", "ended/", "seconds/attempt"))]
    assert dict(console_lines(1, numbers, rows))["Rewards"] == "Avg 0.250, Max 1.000"


def test_questions_are_sorted_by_how_many_of_their_judged_attempts_are_right() -> None:
    # 3 of 3 is always solved, though 3 of 5 would not be; a rollout without attempts is no judged question.
    numbers = step_metrics([verdict(0), verdict(2), verdict(3, 3), verdict(0, 0, question="")])
    assert numbers["judged"] == 3
    assert [numbers[f"solved/{k}"] for k in range(6)] == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3, 0, 0])
    shares = [numbers[f"{name}_share"] for name in ("never_solved", "solvable", "always_solved")]
    assert shares == pytest.approx([1 / 3] * 3)


def test_hops_are_told_apart_with_the_deviation_that_the_advantage_divides_by() -> None:
    numbers = step_metrics([verdict(hop=1, score=0.2), verdict(hop=1, score=0.6), verdict(hop=4, score=0.9)])
    assert numbers["hop/1/count"] == 2
    assert numbers["hop/1/score_mean"] == pytest.approx(0.4)
    assert numbers["hop/1/score_std"] == pytest.approx(statistics.stdev([0.2, 0.6]))
    assert (numbers["hop/4/count"], numbers["hop/4/score_mean"], numbers["hop/4/score_std"]) == (1, 0.9, 0)
    assert not any(name.startswith("hop/2") for name in numbers)


def test_a_rollout_without_a_question_is_no_duplicate_and_asks_for_nothing() -> None:
    silent = verdict(0, 0, question="", novelty=0.0, reasoning_type="other")
    numbers = step_metrics([silent, verdict(novelty=0.3, reasoning_type="cause"), verdict()])
    assert (numbers["duplicates_share"], numbers["reasoning/cause"], numbers["reasoning/entity"]) == (0.5, 0.5, 0.5)
    assert "reasoning/other" not in numbers
    assert "duplicates_share" not in step_metrics([silent])


def test_one_question_for_many_papers_shows_as_repeats_and_a_papers_own_group_does_not() -> None:
    same = [verdict(question="Which hormone lowers glucose?", pmid=str(n)) for n in range(6)]
    group = [verdict(question="What does APOE bind?", pmid="99")] * 2
    assert step_metrics([*same, *group])["repeated_share"] == 0.75
    assert "repeated_share" not in step_metrics(same)
    example = [verdict(question="Which kinase does metformin activate?", pmid=str(n), copied=1.0) for n in range(8)]
    numbers = step_metrics([*same, *group, *example])
    assert (numbers["repeated_share"], numbers["copied_share"]) == (0.75, 0.5)
    assert step_metrics(example)["copied_share"] == 1


def test_searches_broken_calls_and_endings_are_summed_over_all_rollouts() -> None:
    ended = [attempt(ended="answered"), attempt("", ended="deadline")]
    numbers = step_metrics(
        [
            verdict(attempts=ended, calls_broken={"json": 2}, searches_made=3.0, calls_failed=2.0),
            verdict(**(LOST | {"attempts": [attempt(ended="solver")], "calls_broken": {"json": 1, "name": 1}})),
        ]
    )
    assert (numbers["searches_made"], numbers["searches_failed"]) == (5, 3)
    assert (numbers["calls_broken/json"], numbers["calls_broken/name"]) == (3, 1)
    assert (numbers["ended/answered"], numbers["ended/deadline"], numbers["ended/solver"]) == (1, 1, 1)


def test_times_are_those_of_attempts_and_of_the_questions_that_had_some() -> None:
    tried = verdict(attempts=[attempt(seconds=s) for s in (1.0, 2.0, 9.0)], seconds_attempts=10.0)
    verdicts = [tried, verdict(0, 0, seconds_attempts=0.0)]
    numbers = step_metrics(verdicts)
    assert attempt_seconds(verdicts) == [1.0, 2.0, 9.0]
    assert (numbers["seconds/attempt/p50"], numbers["seconds/attempt/max"]) == (2.0, 9.0)
    assert numbers["seconds/attempt/p95"] == pytest.approx(8.3)
    assert numbers["seconds/question/p50"] == numbers["seconds/question/max"] == 10.0


def test_times_of_a_rollout_are_those_it_waited_for_engine_and_search() -> None:
    verdicts = [verdict(seconds_generating=s, seconds_searching=s / 10) for s in (1.0, 2.0, 9.0)]
    numbers = step_metrics(verdicts)
    assert [numbers[f"seconds/generation/{at}"] for at in ("p50", "max")] == [2.0, 9.0]
    assert [numbers[f"seconds/search/{at}"] for at in ("p50", "max")] == [0.2, 0.9]
    assert numbers["seconds/generation/p95"] == pytest.approx(8.3)


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), min_size=1, max_size=8))
def test_the_reward_tail_is_from_the_last_rollout_to_the_last_verdict(pairs: list[tuple[float, float]]) -> None:
    rows = [verdict(generated=end, time=end + took) for end, took in pairs]
    tail = step_metrics(rows)["seconds/reward_tail"]
    assert 0 <= tail <= max(took for _, took in pairs) + 1e-9
    assert max(end for end, _ in pairs) + tail == pytest.approx(max(end + took for end, took in pairs))


def test_clocks_that_disagree_make_no_negative_tail() -> None:
    assert step_metrics([verdict(generated=10.0, time=9.9)])["seconds/reward_tail"] == 0


def test_verdicts_of_older_logs_have_no_times_of_rollouts() -> None:
    kept = verdict()
    old = {
        name: value
        for name, value in kept.items()
        if name not in ("seconds_generating", "seconds_searching", "generated")
    }
    names = set(step_metrics([kept])) - set(step_metrics([old]))
    spread = {f"seconds/{what}/{at}" for what in ("generation", "search") for at in ("p50", "p95", "max")}
    assert names == spread | {"seconds/reward_tail"}
    assert step_metrics([old, kept])["seconds/generation/max"] == 4


seconds = st.floats(0, 1e4)


@given(
    timers=st.dictionaries(st.sampled_from(sorted(set(PART_TIMERS.values()) - {"timing_s/reward"})), seconds),
    waited=st.floats(0, 1),
    rest=seconds,
    testing=seconds | st.none(),
)
def test_the_parts_of_a_step_sum_to_it_and_validation_comes_on_top(
    timers: dict[str, float], waited: float, rest: float, testing: float | None
) -> None:
    verls = timers | {"timing_s/step": sum(timers.values()) + rest}
    if "timing_s/adv" in verls:  # verl's timer of the advantage is around ours of the reward
        verls |= {"timing_s/reward": waited * verls["timing_s/adv"]}
    after = {} if testing is None else {"timing_s/testing": testing}
    parts = step_times(verls | after)
    assert parts.pop("validation", None) == testing
    assert all(value >= 0 for value in parts.values())
    assert sum(parts.values()) == pytest.approx(verls["timing_s/step"])
    assert parts.get("reward") == verls.get("timing_s/reward")
    assert parts["other"] == pytest.approx(rest, abs=1e-6)


def test_what_verl_has_not_timed_is_no_part_of_a_step() -> None:
    assert step_times({"timing_s/testing": 3.0, "val-core/x": 1.0}) == {}
    assert step_times({"timing_s/step": 3.0, "timing_s/adv": 1.0}) == {"advantage": 1.0, "other": 2.0}


def test_the_mismatch_has_the_measures_that_verl_took() -> None:
    assert mismatch({"actor/loss": 1.0}) == {}
    assert mismatch({"rollout_corr/k3_kl": 0.003, "training/rollout_probs_diff_mean": 0.01}) == {
        "mean_difference": 0.01,
        "k3_kl": 0.003,
    }


@given(steps)
def test_shares_sum_to_one_counts_to_the_rollouts_and_every_number_is_finite(verdicts: list[Verdict]) -> None:
    numbers = step_metrics(verdicts)
    assert all(type(value) is float and math.isfinite(value) for value in numbers.values())
    invalid = sum(value for name, value in numbers.items() if name.startswith("invalid/"))
    hops = sum(value for name, value in numbers.items() if name.startswith("hop/") and name.endswith("/count"))
    assert invalid + hops == numbers["rollouts"] == len(verdicts)
    assert invalid == pytest.approx(numbers["invalid_share"] * len(verdicts))
    if "judged" in numbers:
        parts = [numbers[f"{name}_share"] for name in ("never_solved", "solvable", "always_solved")]
        assert sum(parts) == pytest.approx(1)
        assert sum(value for name, value in numbers.items() if name.startswith("solved/")) == pytest.approx(1)


@given(steps.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(rows))))
def test_the_order_of_verdicts_is_irrelevant(pair: tuple[list[Verdict], list[Verdict]]) -> None:
    assert step_metrics(pair[0]) == pytest.approx(step_metrics(pair[1]))


def test_the_console_shows_averages_maxima_and_the_best_question_that_was_tried() -> None:
    verdicts = [
        verdict(score=1.4, attempts=[]),  # the best, but nobody tried it
        verdict(1, 2, score=1.3, question="Which?", answer="HER2", attempts=[attempt("ERBB2"), attempt("", "length")]),
        verdict(score=0.1, format=0.4),
        verdict(**(LOST | {"score": 9.0})),
    ]
    lines = dict(console_lines(12, step_metrics(verdicts), verdicts))
    assert lines == {
        "Step 12": "4 rollouts, lost: 1 by solver",
        "Searches": "8 with papers, 4 failed",
        "Format scores": "Avg 0.800, Max 1.000",
        "Rewards": "Avg 0.933, Max 1.400",
        "Questions": "3 judged; solved 100% sometimes, 0% never, 0% always",
        "Proposer's question": "Which? (2-hop)",
        "Proposer's answer": "HER2",
        "Solver's answers": '["ERBB2", "(length)"], 1 of 2 right',
    }


@given(st.text(), st.integers(2, 40))
def test_a_shortened_text_is_one_printable_line_of_limited_length(text: str, longest: int) -> None:
    line = shorten(text, longest)
    assert len(line) <= longest
    assert line.isprintable()
    assert shorten(line, longest) == line


def test_a_text_that_is_cut_ends_with_a_sign_of_it() -> None:
    assert shorten("one\n two\x1b[31m three", 100) == "one two [31m three"
    assert shorten("abcdef", 5) == "abcd…"


def settings_in(folder: Path, port: int = 0) -> Settings:
    return changed(
        Settings(),
        {"storage.data_dir": folder / "data", "storage.scratch_dir": folder / "scratch", "trainer.port": port or 8002},
    )


@contextmanager
def served(folder: Path) -> Iterator[tuple[uvicorn.Server, httpx.Client]]:
    """The status page of the run whose data lies in a folder, and a client of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = status.serve_in_background(settings_in(folder, port))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        yield server, client
    server.should_exit = True


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(tmp_path_factory.mktemp("run")) as (_, client):
        yield client


def test_the_report_is_that_of_the_newest_round_and_until_then_none(tmp_path: Path) -> None:
    run = run_paths(settings_in(tmp_path)).run
    write_atomically(run / "state.json", '{"stages": {}}')
    with served(tmp_path) as (_, client):
        assert client.get("/report").status_code == client.get("/safety.html").status_code == 404
        for number in (9, 10, 2):  # 10 comes after 9, and what is written last is not the newest round
            with publish(run / str(number) / "report", settings={}, made_from={}) as draft:
                (draft.path / "report.html").write_text(f"<p>Round {number}</p>", encoding="utf-8")
                (draft.path / "safety.html").write_text(f"<p>Safety {number}</p>", encoding="utf-8")
            for place, word in (("/report", "Round"), ("/safety.html", "Safety")):
                reply = client.get(place)
                assert (reply.status_code, reply.text) == (200, f"<p>{word} {9 if number == 9 else 10}</p>")
                assert reply.headers["content-type"].startswith("text/html")


def series(page: httpx.Client) -> dict[tuple[str, ...], float]:
    """All numbers of /metrics by name and label values, in the order of the labels' names."""
    text = page.get("/metrics").text
    found = [sample for metric in text_string_to_metric_families(text) for sample in metric.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in found}


def test_every_number_of_a_step_is_on_the_page(page: httpx.Client) -> None:
    numbers = step_metrics([verdict(calls_broken={"json": 1}, hop=3), verdict(**LOST)])
    status.show_step(5, {"actor/grad_norm": 0.5}, numbers)
    shown = series(page)
    assert shown["drzero_trainer_step",] == 5
    assert shown["drzero_trainer_verl", "actor/grad_norm"] == 0.5
    assert shown["drzero_trainer_reward_mean", "format_think"] == 1
    assert shown["drzero_trainer_reward_max", "score"] == 0.5
    assert shown["drzero_trainer_solved_ratio", "2"] == 1
    assert shown["drzero_trainer_hop_score_mean", "3"] == 0.5
    assert shown["drzero_trainer_reasoning_ratio", "entity"] == 1
    assert shown["drzero_trainer_work_seconds", "p50", "attempt"] == 3
    assert shown["drzero_trainer_rollouts_ratio", "invalid"] == 0.5
    families = {f"drzero_trainer_{name}" for name in (
        "hop_rollouts", "hop_score_mean", "hop_score_std", "reasoning_ratio", "reward_max", "reward_mean",
        "reward_tail_seconds", "rollouts_ratio", "solved_ratio", "step_count", "work_seconds",
    )}  # fmt: skip
    assert families <= {name for name, *_ in shown}
    assert sum(name in families for name, *_ in shown) == len(numbers)


def test_the_page_shows_where_the_step_went_and_how_far_rollouts_and_training_differ(page: httpx.Client) -> None:
    verls = {"timing_s/step": 20.0, "timing_s/gen": 5.0, "timing_s/update_actor": 5.0}
    verls |= {"timing_s/adv": 8.0, "timing_s/reward": 7.0}
    measured = {key: float(place) for place, key in enumerate(MISMATCH.values())}
    status.show_step(6, verls | measured, step_metrics([verdict()]))
    shown = series(page)
    parts = {key[1]: value for key, value in shown.items() if key[0] == "drzero_trainer_step_seconds"}
    assert parts == {"generation": 5.0, "reward": 7.0, "advantage": 1.0, "update": 5.0, "other": 2.0}
    found = {key[1]: value for key, value in shown.items() if key[0] == "drzero_trainer_mismatch"}
    assert found == {name: float(place) for place, name in enumerate(MISMATCH)}
    helps = {family.name: family.documentation for family in text_string_to_metric_families(page.get("/metrics").text)}
    assert all(name in helps["drzero_trainer_mismatch"] for name in MISMATCH)
    status.show_step(7, {}, {})
    assert not [key for key in series(page) if key[0] in ("drzero_trainer_step_seconds", "drzero_trainer_mismatch")]


def test_numbers_of_an_earlier_step_are_gone_from_the_page(page: httpx.Client) -> None:
    status.show_step(1, {"timing_s/testing": 3.0}, step_metrics([verdict(hop=4)]))
    status.show_step(2, {"actor/loss": None}, step_metrics([verdict(hop=1)]))
    shown = series(page)
    assert ("drzero_trainer_hop_score_mean", "4") not in shown
    assert ("drzero_trainer_verl", "timing_s/testing") not in shown
    assert math.isnan(shown["drzero_trainer_verl", "actor/loss"])


def test_counters_add_what_each_step_brings(page: httpx.Client) -> None:
    verdicts = [verdict(attempts=[attempt(seconds=2.0), attempt("", "deadline", 120.0)]), verdict(**LOST)]
    before = series(page)
    for step in (1, 2):
        numbers = step_metrics(verdicts)
        status.show_step(step, {"drzero/refused": 1.0}, numbers, attempt_seconds=attempt_seconds(verdicts[:1]))
    after = series(page)
    grown = {key: after[key] - before.get(key, 0) for key in after}
    assert grown["drzero_trainer_refused_steps_total",] == 2
    assert grown["drzero_trainer_invalid_rollouts_total", "solver"] == 2
    assert grown["drzero_trainer_searches_total",] == 2 * 6
    assert grown["drzero_trainer_failed_searches_total",] == 2 * 2
    assert grown["drzero_trainer_attempts_total", "deadline"] == 2
    assert grown["drzero_trainer_attempt_seconds_count",] == 4
    assert grown["drzero_trainer_attempt_seconds_sum",] == 2 * 122


def test_health_names_the_stage_the_step_the_alarms_and_what_is_waited_for(page: httpx.Client) -> None:
    status.show_stage("train", 2)
    status.show_step(3, {}, {})
    status.show_alarms([])
    calm = {"status": "ok", "stage": "train", "round": 2, "step": 3, "alarms": [], "waiting": None}
    assert page.get("/health").json() == calm
    found = alarms({3: {"actor/entropy": 0.0}}, GuardSettings())
    status.show_alarms(found)
    assert page.get("/health").json() == calm | {"status": "warning", "alarms": [found[0].text]}
    assert {name: series(page)["drzero_trainer_alarm_steps", name] for name in NAMES} == {
        name: float(name == "entropy") for name in NAMES
    }
    status.show_alarms([])
    status.show_waiting("the solver is away")
    reply = page.get("/health")
    assert (reply.status_code, reply.json()) == (200, calm | {"status": "warning", "waiting": "the solver is away"})
    assert series(page)["drzero_trainer_waiting",] == 1
    status.show_waiting(None)
    assert page.get("/health").json() == calm


def test_only_the_stage_that_runs_is_marked(page: httpx.Client) -> None:
    for stage in ("seeds", "train"):
        status.show_stage(stage, 3)
    shown = series(page)
    assert [key for key in shown if key[0] == "drzero_trainer_stage"] == [("drzero_trainer_stage", "train")]
    assert shown["drzero_trainer_round",] == 3


def test_a_trainer_that_is_started_again_goes_on_with_the_runs_counters(tmp_path: Path) -> None:
    verdicts = [verdict(calls_broken={"json": 1}), verdict(**LOST)]
    verls = {"timing_s/step": 20.0, "perf/total_num_tokens": 5000.0, "drzero/refused": 1.0}
    with served(tmp_path) as (_, page):
        for step in (1, 2):
            status.show_step(step, verls, step_metrics(verdicts), attempt_seconds=attempt_seconds(verdicts))
        before = totals_of(page)
    status.TOTALS.totals = Totals()  # as in a new process
    with served(tmp_path) as (_, page):
        assert totals_of(page) == before
        status.show_step(3, verls, step_metrics(verdicts), attempt_seconds=attempt_seconds(verdicts))
        after = totals_of(page)
    assert before["drzero_trainer_steps_total",] == 2
    assert before["drzero_trainer_step_seconds_total",] == 40
    assert before["drzero_trainer_tokens_total",] == 10_000
    assert before["drzero_trainer_rollouts_total",] == 4
    assert after["drzero_trainer_steps_total",] == 3
    assert all(after[key] >= value for key, value in before.items())


def totals_of(page: httpx.Client) -> dict[tuple[str, ...], float]:
    """The counters of the run, its histogram, and when its last step ended."""
    endings = ("_total", "attempt_seconds_bucket", "attempt_seconds_sum", "last_step_timestamp_seconds")
    shown = series(page).items()
    return {key: value for key, value in shown if key[0].startswith("drzero_trainer_") and key[0].endswith(endings)}


@given(st.lists(st.floats(0, 1e4)))
def test_the_histogram_of_attempts_is_cumulative_and_has_each_in_its_bucket(times: list[float]) -> None:
    totals = Totals()
    totals.add_step({}, {}, times, now=1.0)
    histogram = list(families(totals))[-1]
    sums = {sample.labels["le"]: sample.value for sample in histogram.samples if sample.name.endswith("_bucket")}
    expected = {bound: sum(time <= float(bound) for time in times) for bound in sums}
    assert sums == expected
    assert sums["+Inf"] == len(times)


@given(verls=st.dictionaries(st.sampled_from(sorted(OF_VERL.values())), st.floats(allow_nan=True)), rows=steps)
def test_no_step_lowers_a_counter(verls: dict[str, float], rows: list[Verdict]) -> None:
    totals = Totals()
    totals.add_step({}, step_metrics(rows), attempt_seconds(rows), now=1.0)
    before = {name: dict(values) for name, values in totals.counts.items()}
    totals.add_step(verls, step_metrics(rows), attempt_seconds(rows), now=2.0)
    assert all(
        totals.counts[name][label] >= value for name, values in before.items() for label, value in values.items()
    )


def test_a_run_that_is_scraped_ends_once_its_end_has_been_seen(tmp_path: Path) -> None:
    with served(tmp_path) as (server, page):
        assert series(page)["drzero_trainer_finished",] == 0
        ending = threading.Thread(target=status.finish, args=(server,))
        ending.start()
        while not (last := series(page))["drzero_trainer_finished",]:
            pass
        with suppress(httpx.TransportError):  # that page may have been made a moment before it counts
            series(page)
        ending.join(timeout=10)
        assert not ending.is_alive()
        assert server.should_exit
    assert not [key for key in last if key[0] == "drzero_trainer_stage"]


def test_a_run_that_nobody_scrapes_ends_at_once(tmp_path: Path) -> None:
    with served(tmp_path) as (server, _):
        began = time.monotonic()
        status.finish(server)
        assert time.monotonic() - began < 5


def test_what_a_run_has_taken_is_shown_as_it_grows(page: httpx.Client) -> None:
    stages: dict[str, dict[str, Any]] = {"1.seeds": {"seconds": 10.0, "energy_wh": None, "cost": None}}
    status.show_spent(stages)
    names = ("run_seconds", "run_energy_joules", "run_cost")
    assert [series(page)[f"drzero_trainer_{name}",] for name in names] == [10, 0, 0]
    made_again = {"seconds": 5.0, "energy_wh": 2.0, "cost": 0.5}
    stages["1.train"] = {"seconds": 20.0, "energy_wh": 1.0, "cost": 0.25, "unfinished": made_again}
    assert [series(page)[f"drzero_trainer_{name}",] for name in names] == [35, 3 * 3600, 0.75]
