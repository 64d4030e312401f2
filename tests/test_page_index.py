"""The index of a run's records: it follows files as they grow, forgets what is rewritten, and finds rollouts."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from round_world import json_lines, proposer_verdict, publish_training, solver_verdict
from run_world import append, lines_of, rollout, small_run, training_paths, write_step

from services.trainer.page_index import RunIndex, Wanted, condition, solved
from services.trainer.records import append_refusal, compact, read_verdicts
from services.trainer.step_metrics import step_metrics
from shared.settings import Settings

PROPOSER = (1, "proposer")


def index_of(settings: Settings) -> RunIndex:
    """The index of a run, with all that is there taken in."""
    paths = training_paths(settings)
    index = RunIndex(paths.run, paths.work.parents[1])
    read(index)
    return index


def read(index: RunIndex) -> None:
    while index.sync():
        pass


def questions(index: RunIndex, wanted: Wanted, limit: int = 100) -> list[str]:
    return [found.verdict["question"] for found in index.find(wanted, before=None, limit=limit)]


def test_numbers_of_a_step_are_those_of_the_reports(tmp_path: Path) -> None:
    settings = small_run(tmp_path)
    log = training_paths(settings).log
    steps = index_of(settings).steps(PROPOSER)
    assert list(steps) == [1, 2, 3]
    for step, verdicts in read_verdicts(log, "train").items():
        ours = step_metrics(verdicts)
        assert {name: steps[step][name] for name in ours} == pytest.approx(ours)
        assert steps[step]["actor/entropy"] == 1.1


def test_only_what_is_new_is_read_and_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    settings = small_run(tmp_path)
    log = training_paths(settings).log
    index = index_of(settings)
    assert not index.sync()
    whole = json_lines([rollout(4)])
    for part in (whole[:50], whole[50:]):
        with (log / "verdicts-9.jsonl").open("a") as stream:
            stream.write(part)
        read(index)
    assert index.count(Wanted()) == 13
    assert list(index.steps(PROPOSER)) == [1, 2, 3]
    append(log / "metrics-1.jsonl", [{"step": 4, "data": {"timing_s/step": 1.0, "actor/entropy": None}}])
    read(index)
    assert index.steps(PROPOSER)[4]["rollouts"] == 1


def test_what_a_resume_drops_is_forgotten(tmp_path: Path) -> None:
    settings = small_run(tmp_path)
    index = index_of(settings)
    compact(training_paths(settings).log, through=1, validation_stands=lambda rows: True)
    read(index)
    assert list(index.steps(PROPOSER)) == [1]
    assert index.count(Wanted()) == 4
    write_step(training_paths(settings), 2, [rollout(2, question="Again?")])
    read(index)
    assert index.steps(PROPOSER)[2]["rollouts"] == 1


def test_a_refused_try_of_a_step_is_forgotten_and_never_comes_back(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=1)
    log = training_paths(settings).log
    index = index_of(settings)
    late = rollout(2, question="Late?") | {"began": 1.0}
    append(log / "verdicts-1.jsonl", [rollout(2, question="Old?") | {"began": 1.0}])
    read(index)
    assert "Old?" in questions(index, Wanted())
    append_refusal(log, step=2, text="refused")
    append(log / "verdicts-1.jsonl", [late, rollout(2, question="New?") | {"began": 4e9}])
    read(index)
    assert questions(index, Wanted(step=2)) == ["New?"]


def test_without_scratch_the_published_training_is_read(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=0)
    publish_training(training_paths(settings), [], [proposer_verdict(1, split="held_out")], 2)
    index = index_of(settings)
    assert list(index.steps(PROPOSER)) == [1, 2]
    assert index.count(Wanted(split="train")) == 2
    assert index.count(Wanted(split="held_out")) == 1
    publish_training(training_paths(settings), [], [proposer_verdict(1, split="held_out", question="Newer?")], 3)
    read(index)
    assert list(index.steps(PROPOSER)) == [1, 2, 3]
    assert questions(index, Wanted()).count("Newer?") == 4


def test_rounds_and_roles_are_told_apart(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=1)
    write_step(training_paths(settings, 1, "solver"), 1, [solver_verdict(1, answer) for answer in ("zinc", "lead")])
    write_step(training_paths(settings, 2), 1, [rollout(1)])
    index = index_of(settings)
    assert index.trainings() == [(1, "proposer"), (1, "solver"), (2, "proposer")]
    assert index.count(Wanted(role="solver")) == 2
    assert index.count(Wanted(role="solver", solved="always")) == 1
    assert index.count(Wanted(round=2)) == 1
    assert index.rolled_out((1, "solver"), 1) == 2


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (Wanted(), 12), (Wanted(step=2), 4), (Wanted(hop=4), 3), (Wanted(solved="never"), 3),
        (Wanted(solved="sometimes"), 6), (Wanted(solved="always"), 3), (Wanted(text="METAL heals"), 12),
        (Wanted(text="metal nowhere"), 0), (Wanted(text="%"), 0), (Wanted(text="7"), 12), (Wanted(valid=True), 12),
        (Wanted(valid=False), 0), (Wanted(low=2.0), 0), (Wanted(low=0.0, high=9.0), 12),
    ],
)  # fmt: skip
def test_a_filter_finds_what_it_says(tmp_path: Path, wanted: Wanted, count: int) -> None:
    index = index_of(small_run(tmp_path))
    assert index.count(wanted) == len(index.find(wanted, before=None, limit=100)) == count


@given(size=st.integers(1, 7))
def test_pages_hold_every_rollout_once_newest_first(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    settings = small_run(tmp_path_factory.mktemp("run"))
    index = index_of(settings)
    seen: list[tuple[float, int]] = []
    while page := index.find(Wanted(), before=seen[-1] if seen else None, limit=size):
        seen += [(found.time, found.id) for found in page]
    assert len(seen) == len(set(seen)) == 12
    assert seen == sorted(seen, reverse=True)


def test_what_was_taken_in_later_is_counted(tmp_path: Path) -> None:
    settings = small_run(tmp_path)
    index = index_of(settings)
    newest = index.newest()
    append(training_paths(settings).log / "verdicts-2.jsonl", [rollout(4), rollout(4, 1)])
    read(index)
    assert index.count(Wanted(), after=newest) == 2
    assert index.count(Wanted(hop=2), after=newest) == 1


def test_a_rollout_of_a_file_that_is_another_now_is_not_mistaken(tmp_path: Path) -> None:
    settings = small_run(tmp_path)
    index = index_of(settings)
    file = training_paths(settings).log / "verdicts-1.jsonl"
    lines = lines_of(file)
    file.rename(file.with_suffix(".old"))
    file.write_text(json_lines(lines[::-1]))
    assert index.rollout(1) is None
    assert index.find(Wanted(), before=None, limit=5) == []


def test_a_line_that_is_no_verdict_is_passed_over(tmp_path: Path) -> None:
    settings = small_run(tmp_path)
    with (training_paths(settings).log / "verdicts-1.jsonl").open("a") as stream:
        stream.write('{"cut of\n[]\n{}\n' + json_lines([rollout(4) | {"searches": None}, rollout(4)]))
    assert index_of(settings).count(Wanted()) == 13


@given(text=st.text(max_size=30))
def test_no_text_is_too_odd_to_look_for(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    where, values = condition(Wanted(text=text))
    assert where.count("?") == len(values)
    assert index_of(small_run(tmp_path_factory.mktemp("run"), steps=1)).count(Wanted(text=text)) >= 0


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        ({"attempts_correct": 0.0, "attempts_valid": 3.0}, "never"),
        ({"attempts_correct": 2.0, "attempts_valid": 3.0}, "sometimes"),
        ({"attempts_correct": 3.0, "attempts_valid": 3.0}, "always"),
        ({"attempts_correct": 0.0, "attempts_valid": 0.0}, "unasked"),
        ({}, "unasked"),
        ({"exact_match": 1.0}, "always"),
        ({"exact_match": 0.0}, "never"),
    ],
)
def test_solved_is_by_the_attempts_that_were_judged(verdict: dict[str, Any], word: str) -> None:
    assert solved(json.loads(json.dumps(verdict))) == word
