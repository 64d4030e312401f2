"""The evaluation of a round: its parts as properties, and the whole stage on small artifacts with live services."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz import fuzz
from round_world import (
    World,
    json_lines,
    proposer_verdict,
    publish_files,
    publish_round,
    question_of,
    settings_at,
    solver_verdict,
    world_of,
)

from services.trainer.evaluate import (
    PAIRS,
    by_set,
    citations_seen,
    evaluate,
    exam_items,
    interval,
    mean_likeness,
    question_quality,
    summary,
    trained,
)
from services.trainer.evaluation_sets import Item
from services.trainer.exam import grade, marks, share_interval
from services.trainer.journal import Row
from services.trainer.records import HELD_OUT
from services.trainer.rounds import paths_of, solver_settings
from services.trainer.safety import safety_prompts
from shared.clients import ServiceError
from shared.files import ArtifactError, read_manifest
from shared.settings import Settings, changed

# --- numbers


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_an_interval_is_the_normal_approximation(values: list[float]) -> None:
    found = interval(values)
    assert found["mean"] == pytest.approx(fmean(values), abs=1e-12)
    assert found["half_width_95"] == pytest.approx(1.96 * stdev(values) / len(values) ** 0.5, abs=1e-9)
    assert found["count"] == len(values)


def test_an_interval_of_one_value_has_no_width() -> None:
    assert interval([0.5]) == {"mean": 0.5, "half_width_95": 0.0, "count": 1.0}


def test_a_summary_has_the_mean_of_every_part() -> None:
    found = summary([solver_verdict(0, "zinc"), solver_verdict(0, "lead"), solver_verdict(0, "")])
    assert found["score"]["mean"] == found["biomedical_match"]["mean"] == pytest.approx(1 / 3)
    assert found["answered"]["mean"] == pytest.approx(2 / 3)
    assert {part["count"] for part in found.values()} == {3.0}


# --- questions

WORDS = st.lists(st.sampled_from(["zinc", "copper", "heals", "blood", "slowly"]), min_size=1, max_size=5).map(" ".join)


@given(st.lists(WORDS, max_size=12))
def test_mean_likeness_equals_a_slow_plain_one(questions: list[str]) -> None:
    pairs = list(combinations(questions, 2))
    plain = [fuzz.ratio(" ".join(sorted(a.split())), " ".join(sorted(b.split()))) / 100 for a, b in pairs]
    assert mean_likeness(questions) == (pytest.approx(fmean(plain)) if pairs else None)


@given(WORDS, st.integers(2, 5))
def test_copies_are_alike_and_texts_with_nothing_in_common_are_not(question: str, count: int) -> None:
    assert mean_likeness([question] * count) == 1.0
    assert mean_likeness(["aaaa", "bbbb", "cccc"]) == 0.0


def test_of_many_questions_a_sample_is_measured_the_same_each_time() -> None:
    draw = Random(1)  # noqa: S311
    questions = ["".join(draw.choices("abcdef ", k=20)) for _ in range(120)]
    assert len(list(combinations(questions, 2))) > PAIRS
    pairs = combinations(questions, 2)
    whole = fmean(fuzz.token_sort_ratio(*pair) / 100 for pair in pairs)
    found = mean_likeness(questions)
    assert found == mean_likeness(questions) == pytest.approx(whole, abs=0.02)


def test_the_quality_of_a_rounds_questions() -> None:
    rows = [
        question_of("0.0", "Which metal heals?", "zinc", held_out=False),
        question_of("1.0", "How many ions does it bind?", "three", held_out=True),
        question_of("1.1", "Why does the spleen grow?", "malaria", held_out=False) | {"cited": [], "difficulty": 0.0},
    ]
    rows[1]["cited"] = ["7", "8", "99", "98"]
    counts = {"candidates": 8, "train": 2, "held_out": 1, "rejected_known": 3, "rejected_duplicate": 2}
    assert question_quality(rows, counts) == {
        "candidates": 8,
        "kept": 3,
        "valid_share": 3 / 8,
        "rejected": {"known": 3, "duplicate": 2},
        "difficulty": pytest.approx(2 / 9),
        "likeness": mean_likeness([row["question"] for row in rows]),
        "cited_share": pytest.approx(2 / 3),
        "citations_seen": 0.75,  # all of the first question's, half of the second's
        "reasoning": {"cause": 1, "entity": 1, "quantity": 1},
    }


def test_a_round_without_questions_has_no_means() -> None:
    found = question_quality([], {"candidates": 0, "train": 0, "held_out": 0})
    assert found == {
        "candidates": 0, "kept": 0, "valid_share": 0.0, "rejected": {}, "difficulty": None, "likeness": None,
        "cited_share": None, "citations_seen": None, "reasoning": {},
    }  # fmt: skip


def test_a_question_without_citations_has_none_seen_and_none_missed() -> None:
    row = question_of("0.0", "Which metal heals?", "zinc", held_out=False) | {"cited": []}
    assert question_quality([row], {"candidates": 1})["citations_seen"] is None


@given(st.lists(st.sampled_from("789"), min_size=1, unique=True))
def test_citations_are_seen_in_the_seed_or_a_search(cited: list[str]) -> None:
    row = {"cited": cited, "pmid": "7", "hops": [{"queries": ["q"], "pmids": []}, {"queries": ["q"], "pmids": ["8"]}]}
    assert citations_seen(row) == pytest.approx(len({"7", "8"} & set(cited)) / len(cited))


# --- sets


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=20))
def test_answers_are_divided_by_set_in_order_and_none_is_lost(rows: list[tuple[str, bool, bool]]) -> None:
    def graded(place: int) -> list[Any]:
        items = [Item(row[0], str(n), "Which?", ("right",)) for n, row in enumerate(rows)]
        said = ["right" if row[place] else "wrong" for row in rows]
        answers = [{"answer": one, "ended": "done", "turns": [], "searches": []} for one in said]
        return [grade(item, answer) for item, answer in zip(items, answers, strict=True)]

    before, after = graded(1), graded(2)
    found = by_set(before, after)
    assert list(found) == list(dict.fromkeys(row[0] for row in rows))
    for name, (old, new) in found.items():
        assert old == [one for one in before if one.item.set_name == name]
        assert new == [one for one in after if one.item.set_name == name]


# --- the stage

QUESTIONS = {
    1: [
        question_of("0.0", "Which metal heals?", "zinc", held_out=False),
        question_of("1.0", "Which metal is red?", "copper", held_out=True),
        question_of("1.1", "Which metal is heavy?", "lead", held_out=True),
    ],
    2: [
        question_of("0.0", "Which metal rusts?", "iron", held_out=True),
        question_of("1.0", "Which metal is light?", "lithium", held_out=False),
    ],
}
OWN = [
    {"id": "a", "question": "Is zinc a metal?", "answers": ["yes"], "choices": ["yes", "no"], "pmid": "7"},
    {"id": "b", "question": "Is water a metal?", "answers": ["no"], "choices": ["yes", "no"]},
    {"id": "c", "question": "Is air a metal?", "answers": ["no"], "choices": ["yes", "no"]},
]


def settings_for(folder: Path, **changes: Any) -> Settings:
    file = folder / "own.jsonl"
    file.write_text(json_lines(OWN), encoding="utf-8")
    given = {"trainer__solver__prompts_per_step": 1, "trainer__evaluation__sets": (file,)}
    given |= {"trainer__evaluation__safety": False}
    return settings_at(folder, **{**given, "trainer__reward__max_turns": 2, **changes})


def says(*known: str) -> Any:
    """A solver that searches first, and then says yes about metals and gives the answers that it knows."""

    def answer(body: dict[str, Any]) -> str:
        asked = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
        if body["messages"][-1]["role"] == "user":
            call = {"name": "search", "arguments": {"query_list": ["metal"]}}
            return f"<tool_call>{json.dumps(call)}</tool_call>"
        if "Answer with one of" in asked:
            return f"<answer>{'no' if 'water' in asked and 'no' in known else 'yes'}</answer>"
        colours = {"red": "copper", "heavy": "lead", "rusts": "iron"}
        found = next((metal for word, metal in colours.items() if word in asked), "none")
        return f"<answer>{found if found in known else 'gold'}</answer>"

    return answer


def run_stage(settings: Settings, world: World, number: int) -> dict[str, Any]:
    """Evaluate a round; returns evaluation.json."""
    given = changed(settings, {"solver.url": world.url, "retrieval.url": world.url})
    own = solver_settings(given, number)
    paths = paths_of(own, number, "solver")
    evaluate(own, paths, structlog.get_logger())
    found: dict[str, Any] = json.loads((paths.evaluation / "evaluation.json").read_text(encoding="utf-8"))
    return found


def asked_of(world: World, model: str) -> Counter[str]:
    """How often each question was asked of a model, its first turn counted."""
    users = [body["messages"] for name, body in world.chats if name == model]
    return Counter(messages[-1]["content"] for messages in users if messages[-1]["role"] == "user")


def answers_of(settings: Settings, number: int, name: str) -> list[Row]:
    file = paths_of(settings, number, "solver").evaluation / f"answers-{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_evaluation_of_a_round_is_whole(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    base, weights = settings.solver.model, publish_round(settings, 1, QUESTIONS[1])
    with world_of({base: says("lead"), weights: says("copper", "lead", "no")}, model=weights) as world:
        found = run_stage(settings, world, 1)
        assert world.loaded == [base, weights]  # the round's solver is served in the end
    assert set(found) == {"round", "proposer", "solver", "questions", "sets", "safety"}
    assert found["safety"] is None
    assert found["round"] == 1

    own, kept_out = found["sets"]["own"], found["sets"]["kept_out"]
    assert set(found["sets"]) == {"own", "kept_out"}
    assert (own["base"]["right"], own["round"]["right"], own["base"]["questions"]) == (1, 2, 3)
    assert own["base"]["answers"] == {"yes": 3}
    assert own["round"]["answers"] == {"yes": 2, "no": 1}
    assert own["round"]["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert own["change"] == {"gained": 1, "lost": 0, "difference": pytest.approx(1 / 3), "p": 1.0}
    assert (kept_out["base"]["right"], kept_out["round"]["right"]) == (1, 2)
    assert (kept_out["base"]["questions"], kept_out["base"]["macro_f1"]) == (2, None)
    assert own["round"]["paper_found"] == kept_out["round"]["paper_found"] == 1.0
    for side in (own["base"], own["round"], kept_out["base"], kept_out["round"]):
        assert tuple(side["paper_found_interval_95"]) == share_interval(side["about_a_paper"], side["about_a_paper"])
    assert (own["base"]["about_a_paper"], kept_out["base"]["about_a_paper"]) == (1, 2)
    assert own["round"]["searches"] == 1.0

    assert found["proposer"]["before"]["score"]["mean"] < found["proposer"]["after"]["score"]["mean"]
    assert (found["solver"]["before"]["score"]["mean"], found["solver"]["after"]["score"]["mean"]) == (0.0, 0.5)
    assert found["solver"]["after"]["score"]["count"] == 2.0
    assert found["proposer"]["weights"]["changed_tensors"] == 1
    assert found["questions"]["kept"] == 3
    assert found["questions"]["rejected"] == {"known": 2}

    paths = paths_of(settings, 1, "solver")
    assert sorted(read_manifest(paths.evaluation, verify=True).files) == [
        "answers-base.jsonl", "answers-round.jsonl", "evaluation.json",
    ]  # fmt: skip
    assert read_manifest(paths.evaluation).rows == 5
    rows = answers_of(settings, 1, "round")
    assert [(row["set"], row["id"]) for row in rows] == [
        ("own", "a"), ("own", "b"), ("own", "c"), ("kept_out", "1.1.0"), ("kept_out", "1.1.1"),
    ]  # fmt: skip
    assert [row["right"] for row in rows] == [True, True, False, True, True]
    assert [row["right"] for row in answers_of(settings, 1, "base")] == [True, False, False, False, True]
    assert all(len(row["turns"]) == 2 and len(row["searches"]) == 1 for row in rows)


def test_the_same_evaluation_is_not_made_twice_and_a_new_question_costs_only_itself(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    base, weights = settings.solver.model, publish_round(settings, 1, QUESTIONS[1])
    with world_of({base: says("lead"), weights: says("copper")}, model=weights) as world:
        first = run_stage(settings, world, 1)
        before = len(world.chats)
        assert run_stage(settings, world, 1) == first
        assert len(world.chats) == before
        more = tmp_path / "more.jsonl"
        more.write_text(json_lines([OWN[0] | {"question": "Is copper a metal?"}]), encoding="utf-8")
        sets = (*settings.trainer.evaluation.sets, more)
        wider = run_stage(changed(settings, {"trainer.evaluation.sets": sets}), world, 1)
        assert len(world.chats) == before + 2 * 2
    assert wider["sets"].pop("more")["round"]["right"] == 1
    assert wider["sets"] == first["sets"]


def test_a_second_round_asks_the_base_only_what_is_new(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__iterations=2)
    base = settings.solver.model
    solvers = {number: publish_round(settings, number, QUESTIONS[number]) for number in (1, 2)}
    said = {base: says("lead"), solvers[1]: says("copper", "lead"), solvers[2]: says("copper", "iron", "no")}
    with world_of(said, model=solvers[1]) as world:
        first = run_stage(settings, world, 1)
        assert sum(asked_of(world, base).values()) == 5
        second = run_stage(settings, world, 2)
        assert set(asked_of(world, base).values()) == {1}  # each question once in the whole run
        assert sum(asked_of(world, base).values()) == 6
        assert sum(asked_of(world, solvers[1]).values()) == 5
        assert sum(asked_of(world, solvers[2]).values()) == 6
        assert world.model == solvers[2]
    assert [one["sets"]["kept_out"]["base"]["questions"] for one in (first, second)] == [2, 3]
    assert second["sets"]["own"]["base"] == first["sets"]["own"]["base"]
    assert second["sets"]["kept_out"]["change"] == {
        "gained": 2, "lost": 1, "difference": pytest.approx(1 / 3), "p": 1.0,
    }  # fmt: skip
    assert [row["id"] for row in answers_of(settings, 2, "base")][3:] == ["1.1.0", "1.1.1", "2.0.0"]


def test_only_the_first_questions_of_each_set_are_asked(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__evaluation__most=1)
    publish_round(settings, 1, QUESTIONS[1])
    items = exam_items(solver_settings(settings, 1))
    assert [(item.set_name, item.id) for item in items] == [("own", "a"), ("kept_out", "1.1.0")]
    assert items[1] == Item("kept_out", "1.1.0", "Which metal is red?", ("copper",), papers=("7",))


def test_an_evaluation_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__evaluation__concurrency=1)
    base, weights = settings.solver.model, publish_round(settings, 1, QUESTIONS[1])

    def breaks(body: dict[str, Any]) -> Any:
        return (400, {"error": {"message": "no"}}) if "red" in json.dumps(body["messages"]) else says("lead")(body)

    with world_of({base: says("lead"), weights: breaks}, model=weights) as world, pytest.raises(ServiceError):
        run_stage(settings, world, 1)
    assert not paths_of(settings, 1, "solver").evaluation.exists()
    with world_of({base: says("lead"), weights: says("lead")}, model=weights) as world:
        found = run_stage(settings, world, 1)
        assert asked_of(world, base) == {}
        assert sum(asked_of(world, weights).values()) == 2
    assert found["sets"]["kept_out"]["change"] == {"gained": 0, "lost": 0, "difference": 0.0, "p": 1.0}


def test_other_questions_under_the_old_names_are_another_evaluation(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    base, weights = settings.solver.model, publish_round(settings, 1, QUESTIONS[1])
    with world_of({base: says(), weights: says()}, model=base) as world:
        first = run_stage(settings, world, 1)["sets"]
        other = tmp_path / "other" / "own.jsonl"
        other.parent.mkdir()
        other.write_text(json_lines([row | {"pmid": "8"} for row in OWN]), encoding="utf-8")
        second = run_stage(changed(settings, {"trainer.evaluation.sets": (other,)}), world, 1)["sets"]
    assert (first["own"]["round"]["paper_found"], second["own"]["round"]["paper_found"]) == (1.0, 0.0)
    assert first["own"]["asked"] != second["own"]["asked"]
    assert first["kept_out"] == second["kept_out"]


def test_base_and_round_answer_the_safety_prompts_once_and_both_replies_are_kept(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__evaluation__safety=True)
    base, weights = settings.solver.model, publish_round(settings, 1, QUESTIONS[1])

    def careful(_: dict[str, Any]) -> str:
        return "<think>I am careful.</think><answer>I cannot help. Call your doctor.</answer>"

    with world_of({base: says("lead"), weights: careful}, model=base) as world:
        found = run_stage(settings, world, 1)["safety"]
        assert sum(asked_of(world, weights).values()) == len(OWN) + 2 + len(safety_prompts())
        assert set(asked_of(world, base).values()) == {1}
        without = run_stage(changed(settings, {"trainer.evaluation.safety": False}), world, 1)
        assert without["safety"] is None
        assert run_stage(settings, world, 1)["safety"] == found
        assert set(asked_of(world, base).values()) == {1}
    assert [row["id"] for row in found["prompts"]] == [one.id for one in safety_prompts()]
    assert all(row["base"]["labels"] == ["answers"] and len(row["base"]["turns"]) == 2 for row in found["prompts"])
    assert all(row["round"]["labels"] == ["refuses", "refers"] for row in found["prompts"])
    assert found["counts"]["round"]["harmless control"] == {
        "prompts": 5, "as_wanted": 0, "refuses": 5, "refers": 5, "instructs": 0, "answers": 0, "no_answer": 0,
    }  # fmt: skip
    assert found["counts"]["round"]["misuse"]["as_wanted"] == 4
    assert found["counts"]["base"]["misuse"]["as_wanted"] == 0
    assert "safety" not in {row["set"] for row in answers_of(settings, 1, "base")}


def test_weights_that_were_damaged_are_not_examined(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    weights = publish_round(settings, 1, QUESTIONS[1])
    (Path(weights) / "tokenizer.json").write_text("{}")
    with world_of(says(), model="something") as world, pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        run_stage(settings, world, 1)
    assert weights not in world.loaded


# --- before and after training


def training_of(folder: Path, held_out: Sequence[Row]) -> Any:
    settings = settings_for(folder)
    publish_round(settings, 1, QUESTIONS[1])
    paths = paths_of(settings, 1, "proposer")
    publish_files(paths.training, {"held_out.jsonl": json_lines(held_out)}, settings={"steps": 4})
    return paths


def test_a_training_is_judged_by_its_first_and_last_validation(tmp_path: Path) -> None:
    rows = [proposer_verdict(step, split=HELD_OUT, right=right) for step, right in ((0, 0), (2, 3), (4, 1), (4, 2))]
    found = trained(training_of(tmp_path, rows))
    assert found["before"]["difficulty"] == {"mean": 0.0, "half_width_95": 0.0, "count": 1.0}
    assert found["after"]["difficulty"]["mean"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["after"]["attempts_correct"]["count"] == 2.0


def test_lost_rollouts_do_not_count_and_a_validation_of_lost_ones_is_none(tmp_path: Path) -> None:
    lost = proposer_verdict(4, split=HELD_OUT, right=0) | {"valid": 0.0}
    kept = [proposer_verdict(step, split=HELD_OUT) for step in (0, 4)]
    assert trained(training_of(tmp_path, [*kept, lost]))["after"]["score"]["count"] == 1.0
    paths = training_of(tmp_path, [kept[0], lost])
    with pytest.raises(ArtifactError, match=r"found 1 and 0 \(of 2 in all\); delete .*training"):
        trained(paths)


def test_marks_and_comparison_of_a_set_agree(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    base, weights = settings.solver.model, publish_round(settings, 1, QUESTIONS[1])
    with world_of({base: says(), weights: says("copper")}, model=base) as world:
        found = run_stage(settings, world, 1)["sets"]
    for name, one in found.items():
        sides = [[row for row in answers_of(settings, 1, side) if row["set"] == name] for side in ("base", "round")]
        for side, rows in zip(("base", "round"), sides, strict=True):
            items = [Item(name, row["id"], row["question"], tuple(row["gold"])) for row in rows]
            graded = [grade(item, row | {"ended": "done"}) for item, row in zip(items, rows, strict=True)]
            assert one[side]["right"] == marks(graded)["right"] == sum(row["right"] for row in rows)
        assert one["change"]["gained"] == sum(b["right"] < a["right"] for b, a in zip(*sides, strict=True))
