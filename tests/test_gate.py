"""The switch from graded to gated, and the memory of earlier questions."""

import json
from pathlib import Path

from services.trainer.gate import form_at, gated_from, write_gate
from services.trainer.recent import RecentQuestions
from shared.settings import RewardSettings

GRADED = RewardSettings(format_form="graded", gate_at=0.6)


def test_the_gate_closes_two_steps_after_the_mean_is_reached() -> None:
    assert gated_from({1: 0.3, 2: 0.61, 3: 0.4}, 0.6) == 4
    assert gated_from({1: 0.3}, 0.6) is None
    assert gated_from({1: 0.9}, None) is None


def test_reward_workers_see_the_switch_and_a_resumed_run_takes_it_back(tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    assert form_at(9, GRADED, path) == "graded"
    write_gate(path, 4)
    assert [form_at(step, GRADED, path) for step in (3, 4, 5)] == ["graded", "gated", "gated"]
    write_gate(path, None)
    assert form_at(9, GRADED, path) == "graded"


def test_without_a_set_mean_the_form_never_changes(tmp_path: Path) -> None:
    write_gate(tmp_path / "gate.json", 1)
    assert form_at(5, RewardSettings(format_form="graded"), tmp_path / "gate.json") == "graded"
    assert form_at(5, RewardSettings(format_form="gated"), tmp_path / "gate.json") == "gated"


def verdict(step: int, index: int, question: str, split: str = "train") -> str:
    return json.dumps({"split": split, "step": step, "index": index, "question": question}) + "\n"


def test_only_questions_of_earlier_steps_are_recent_whichever_worker_wrote_them(tmp_path: Path) -> None:
    first, second = tmp_path / "verdicts-1.jsonl", tmp_path / "verdicts-2.jsonl"
    first.write_text(verdict(1, 5, "b") + verdict(1, 0, "held out", "held_out"))
    second.write_text(verdict(1, 2, "a") + verdict(1, 3, ""))
    recent = RecentQuestions(tmp_path)
    assert recent.before(1, 10) == []
    assert recent.before(2, 10) == ["a", "b"]
    with first.open("a") as stream:
        stream.write(verdict(2, 1, "c"))
    assert recent.before(2, 10) == ["a", "b"]
    assert recent.before(3, 2) == ["b", "c"]


def test_a_line_that_is_still_being_written_is_read_later(tmp_path: Path) -> None:
    path = tmp_path / "verdicts-1.jsonl"
    path.write_text(verdict(1, 0, "a") + '{"split": "tr')
    recent = RecentQuestions(tmp_path)
    assert recent.before(2, 10) == ["a"]
    path.write_text(verdict(1, 0, "a") + verdict(2, 0, "b"))
    assert recent.before(3, 10) == ["a", "b"]
