"""Exams: marks equal a slow plain computation, and an exam through live services is greedy, asked once, and resumes."""

import asyncio
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from model_services import CRASH, HANG, Fault, Reply, watched
from round_world import World, settings_at, world_of

from services.trainer.evaluation_sets import Item
from services.trainer.exam import (
    Graded,
    asked,
    chosen,
    compare,
    grade,
    macro_f1,
    marks,
    share_interval,
    take_exam,
)
from services.trainer.protocol import SEARCH_TOOL, alone_messages, solver_messages
from shared.clients import ServiceError
from shared.settings import Settings, changed

LABELS = ("yes", "no", "maybe")
ITEMS = [
    Item("qa", "1", "Does zinc help?", ("yes",), LABELS, ("7", "70")),
    Item("qa", "2", "Does lead help?", ("no",), LABELS, ("8",)),
    Item("own", "1", "Which kinase?", ("AMPK", "AMP-activated kinase")),
]


def answered(item: Item, answer: str, searches: Sequence[Sequence[str]] = ()) -> Graded:
    """An item with an answer, and the papers of each search."""
    found = [{"queries": ["q"], "pmids": list(pmids), "text": ""} for pmids in searches]
    return grade(item, {"name": item.id, "answer": answer, "ended": "done", "turns": [], "searches": found})


def choice_item(gold: str, number: int = 0) -> Item:
    return Item("qa", str(number), "Does it?", (gold,), LABELS, ("7",))


LOADS_SCIPY = hypothesis_settings(deadline=None)  # the first example does
ANSWERS = st.sampled_from(["yes", "no", "maybe", "Yes, it does.", "NO", "The maybe!", "", "unclear", "nonsense"])
PAIRS = st.lists(st.tuples(st.sampled_from(LABELS), ANSWERS), min_size=1, max_size=25)


def plainly(answer: str) -> str:
    """The choice that one of ANSWERS makes."""
    return {"Yes, it does.": "yes", "NO": "no", "The maybe!": "maybe"}.get(answer, answer if answer in LABELS else "")


# --- one answer


@given(st.sampled_from(LABELS), ANSWERS)
def test_an_answer_among_choices_is_right_when_it_chooses_the_gold(gold: str, answer: str) -> None:
    one = answered(choice_item(gold), answer)
    assert one.answer == plainly(answer)
    assert one.right == (plainly(answer) == gold)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("AMPK", True), ("the ampk.", True), ("AMPK (PMID 12345)", True), ("AMP-activated kinase", True),
     ("AMPK and mTOR", False), ("", False), ("kinase", False)],
)  # fmt: skip
def test_a_free_answer_is_right_when_it_equals_any_gold_after_normalisation(answer: str, right: bool) -> None:
    one = answered(ITEMS[2], answer)
    assert (one.answer, one.right) == (answer, right)


@given(st.text("yesnomab ,.THE", max_size=12), st.permutations(LABELS))
def test_the_order_of_the_choices_does_not_matter(answer: str, choices: list[str]) -> None:
    assert chosen(answer, choices) == chosen(answer, LABELS)
    assert chosen(answer, choices) in ("", *LABELS)


@given(st.sampled_from(["type 1", "type 1 diabetes", "diabetes"]), st.sampled_from(["", ".", " (PMID 7)", ", it is"]))
def test_every_choice_can_be_made_also_one_that_begins_another(choice: str, tail: str) -> None:
    choices = ("type 1", "type 1 diabetes", "diabetes")
    assert chosen(choice.upper() + tail, choices) == choice


def test_a_paper_is_found_when_any_search_shows_it_and_an_item_without_paper_finds_none() -> None:
    assert answered(ITEMS[0], "yes", [["1"], ["2", "7"]]).found
    assert answered(ITEMS[0], "yes", [["70"]]).found
    assert not answered(ITEMS[0], "yes", [["1"], []]).found
    assert not answered(ITEMS[2], "AMPK", [["7"]]).found
    assert answered(ITEMS[0], "yes", [["1"], ["2"]]).searches == 2


def test_choices_are_named_in_the_question() -> None:
    assert asked(ITEMS[0]) == "Does zinc help? Answer with one of: yes, no, maybe."
    assert asked(ITEMS[2]) == "Which kinase?"


# --- marks


def slow_f1(pairs: Sequence[tuple[str, str]]) -> Fraction:
    """Macro-F1 of (gold, choice) from precision and recall, in exact numbers."""
    total = Fraction(0)
    for label in LABELS:
        true = sum(1 for gold, choice in pairs if gold == label and choice == label)
        precise = [gold == label for gold, choice in pairs if choice == label]
        recalled = [choice == label for gold, choice in pairs if gold == label]
        if true:
            precision, recall = Fraction(true, len(precise)), Fraction(true, len(recalled))
            total += 2 * precision * recall / (precision + recall)
    return total / len(LABELS)


@LOADS_SCIPY
@given(PAIRS)
def test_marks_equal_a_slow_plain_computation(pairs: list[tuple[str, str]]) -> None:
    graded = [answered(choice_item(gold, n), answer, [["7"]] * (n % 3)) for n, (gold, answer) in enumerate(pairs)]
    plain = [(gold, plainly(answer)) for gold, answer in pairs]
    found = marks(graded)
    right = [gold == choice for gold, choice in plain]
    assert found["questions"] == len(pairs)
    assert found["right"] == right.count(True)
    assert found["accuracy"] == pytest.approx(right.count(True) / len(right))
    assert found["macro_f1"] == pytest.approx(float(slow_f1(plain)))
    assert found["answered"] == pytest.approx(sum(choice != "" for _, choice in plain) / len(plain))
    assert found["answers"] == {choice: [c for _, c in plain].count(choice) for _, choice in plain}
    assert found["searches"] == pytest.approx(sum(n % 3 for n in range(len(pairs))) / len(pairs))
    assert found["paper_found"] == pytest.approx(sum(n % 3 > 0 for n in range(len(pairs))) / len(pairs))
    found_count = sum(n % 3 > 0 for n in range(len(pairs)))
    assert found["paper_found_interval_95"] == share_interval(found_count, len(pairs))
    assert (found["about_a_paper"], found["overdue"]) == (len(pairs), 0)
    assert found["interval_95"] == share_interval(right.count(True), len(right))
    json.dumps(found, allow_nan=False)


@LOADS_SCIPY
@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_the_questions_does_not_matter(pairs: list[tuple[str, str]], random: Any) -> None:
    graded = [answered(choice_item(gold, n), answer) for n, (gold, answer) in enumerate(pairs)]
    shuffled = random.sample(graded, len(graded))
    assert marks(shuffled) == marks(graded)


def test_free_answers_have_no_f1_and_no_count_of_answers() -> None:
    found = marks([answered(ITEMS[2], "AMPK"), answered(ITEMS[2], "mTOR")])
    assert (found["accuracy"], found["macro_f1"], found["answers"]) == (0.5, None, None)
    assert (found["about_a_paper"], found["paper_found"], found["paper_found_interval_95"]) == (0, None, None)


def test_questions_with_choices_of_their_own_have_no_f1_in_common() -> None:
    other = Item("qa", "9", "Up or down?", ("up",), ("up", "down"))
    found = marks([answered(choice_item("yes"), "yes"), answered(other, "up")])
    assert (found["accuracy"], found["macro_f1"], found["answers"]) == (1.0, None, None)


def test_f1_is_one_for_all_right_and_zero_for_all_wrong() -> None:
    assert macro_f1([answered(choice_item(label), label) for label in LABELS]) == 1.0
    assert macro_f1([answered(choice_item(label), "") for label in LABELS]) == 0.0
    # Always the commonest answer: much of the accuracy, little of the F1.
    same = [answered(choice_item(gold), "yes") for gold in ["yes"] * 8 + ["no"] * 2]
    assert marks(same)["accuracy"] == 0.8
    assert macro_f1(same) == pytest.approx(16 / 18 / 3)


# --- intervals and differences


@LOADS_SCIPY
@given(st.integers(1, 1200).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_an_interval_holds_its_share_lies_in_0_to_1_and_is_wilsons(pair: tuple[int, int]) -> None:
    right, count = pair
    low, high = share_interval(right, count)
    assert 0 <= low <= right / count <= high <= 1
    share, z = right / count, 1.959963984540054
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    assert [low, high] == pytest.approx([middle - half, middle + half], abs=1e-9)
    assert [1 - high, 1 - low] == pytest.approx(list(share_interval(count - right, count)), abs=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_more_questions_make_a_narrower_interval(share: float) -> None:
    widths = [high - low for low, high in (share_interval(round(share * n), n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)


RIGHTS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def of_rights(rights: Sequence[bool]) -> list[Graded]:
    return [answered(choice_item("yes", n), "yes" if right else "no") for n, right in enumerate(rights)]


@LOADS_SCIPY
@given(RIGHTS)
def test_a_comparison_is_symmetric_and_equals_a_slow_plain_one(pairs: list[tuple[bool, bool]]) -> None:
    before, after = (of_rights(side) for side in zip(*pairs, strict=True))
    found, back = compare(before, after), compare(after, before)
    assert (found["gained"], found["lost"]) == (back["lost"], back["gained"])
    assert found["gained"] == pairs.count((False, True))
    assert found["lost"] == pairs.count((True, False))
    assert found["difference"] == -back["difference"]
    assert found["difference"] == pytest.approx(marks(after)["accuracy"] - marks(before)["accuracy"])
    assert found["p"] == pytest.approx(back["p"])
    # The exact test: both tails of a fair coin.
    changed_answers, fewer = found["gained"] + found["lost"], min(found["gained"], found["lost"])
    tail = sum(math.comb(changed_answers, k) for k in range(fewer + 1)) / 2**changed_answers
    assert found["p"] == pytest.approx(min(1.0, 2 * tail))


@LOADS_SCIPY
@given(st.lists(st.booleans(), min_size=1, max_size=10))
def test_a_solver_does_not_differ_from_itself(rights: list[bool]) -> None:
    same = of_rights(rights)
    assert compare(same, same) == {"gained": 0, "lost": 0, "difference": 0, "p": 1.0}


def test_solvers_that_answered_different_questions_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare(of_rights([True]), of_rights([True, False]))


# --- taking an exam


def turn_of(body: dict[str, Any]) -> int:
    return 1 + [message["role"] for message in body["messages"]].count("tool")


def studies(body: dict[str, Any]) -> str:
    """Searches, then answers: "yes" about zinc, "AMPK" about the kinase, and of anything else it knows nothing."""
    if turn_of(body) == 1 and "tools" in body:
        call = {"name": "search", "arguments": {"query_list": ["metal"]}}
        return f"<think>I search.</think><tool_call>{json.dumps(call)}</tool_call>"
    said = body["messages"][-1]["content"] if "tools" not in body else json.dumps(body["messages"])
    answer = "Yes." if "zinc" in said else "AMPK" if "kinase?" in said else ""
    return f"<think>So.</think><answer>{answer}</answer>"


def settings_for(folder: Path, **changes: Any) -> Settings:
    return settings_at(folder, **{"trainer__reward__max_turns": 3, "trainer__reward__temperature": 1.0, **changes})


def sit(settings: Settings, world: World, file: Path, items: Sequence[Item] = ITEMS, **how: Any) -> list[Graded]:
    file.parent.mkdir(parents=True, exist_ok=True)
    given = changed(settings, {"solver.url": world.url, "retrieval.url": world.url})
    return asyncio.run(take_exam(given, items, file, **how))


def test_an_exam_is_greedy_searches_and_is_marked_in_the_order_of_its_questions(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__reward__max_new_tokens=55)
    with world_of(studies) as world:
        graded = sit(settings, world, tmp_path / "a.jsonl")
    assert [one.item for one in graded] == ITEMS
    assert [(one.answer, one.right) for one in graded] == [("yes", True), ("", False), ("AMPK", True)]
    assert [one.found for one in graded] == [True, False, False]  # the search shows paper 7
    assert [(one.searches, len(one.row["turns"])) for one in graded] == [(1, 2)] * 3
    for body in world.bodies:
        assert (body["temperature"], body["max_tokens"], body["tools"]) == (0.0, 55, [SEARCH_TOOL])
        assert body["seed"] == settings.trainer.seed
        assert "regex" not in body
    first = [body["messages"] for body in world.bodies if turn_of(body) == 1]
    expected = [solver_messages(asked(item), settings.trainer.prompts, 0) for item in ITEMS]
    assert sorted(map(json.dumps, first)) == sorted(map(json.dumps, expected))


def test_an_exam_from_memory_has_one_turn_and_no_search(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with world_of(studies) as world:
        graded = sit(settings, world, tmp_path / "a.jsonl", search=False)
    assert [one.answer for one in graded] == ["yes", "", "AMPK"]
    assert (len(world.chats), world.searches) == (3, [])
    assert all("tools" not in body and body["temperature"] == 0.0 for body in world.bodies)
    expected = [alone_messages(asked(item), settings.trainer.prompts, 0) for item in ITEMS]
    assert sorted(json.dumps(body["messages"]) for body in world.bodies) == sorted(map(json.dumps, expected))


def test_an_exam_that_was_broken_off_goes_on_with_the_questions_that_are_left(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__evaluation__concurrency=1)

    def breaks_down(body: dict[str, Any]) -> str | Reply | Fault:
        return CRASH if "kinase" in json.dumps(body["messages"]) else studies(body)

    with world_of(breaks_down) as world, pytest.raises(ServiceError):
        sit(settings, world, tmp_path / "a.jsonl")
    with world_of(studies) as world:
        resumed = sit(settings, world, tmp_path / "a.jsonl")
        assert {"kinase" in json.dumps(body["messages"]) for body in world.bodies} == {True}
        assert sit(settings, world, tmp_path / "a.jsonl", ITEMS[::-1]) == resumed[::-1]
        assert len(world.chats) == 2
        assert sit(settings, world, tmp_path / "b.jsonl") == resumed


def test_a_question_that_has_changed_is_asked_again_under_its_old_id(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with world_of(studies) as world:
        sit(settings, world, tmp_path / "a.jsonl")
        before = len(world.chats)
        [one] = sit(settings, world, tmp_path / "a.jsonl", [Item("own", "1", "Does zinc glow?", ("Yes",))])
        assert (one.right, len(world.chats)) == (True, before + 2)
        # With another gold answer alone it is only marked again.
        [one] = sit(settings, world, tmp_path / "a.jsonl", [Item("own", "1", "Which kinase?", ("mTOR",))])
        assert (one.answer, one.right, len(world.chats)) == ("AMPK", False, before + 2)


def test_no_more_questions_are_out_at_once_than_allowed(tmp_path: Path) -> None:
    items = [Item("own", str(number), f"Which kinase? {number}", ("AMPK",)) for number in range(12)]
    with world_of(studies) as world:
        graded = sit(settings_for(tmp_path, trainer__evaluation__concurrency=3), world, tmp_path / "a.jsonl", items)
    assert all(one.right for one in graded)
    assert 1 <= world.peak <= 3


def test_an_answer_that_outgrows_the_context_is_none(tmp_path: Path) -> None:
    words = {"error": {"message": "3500 prompt tokens and 512 new ones exceed the context of 3072"}}
    with world_of(lambda _: (400, words)) as world:
        graded = sit(settings_for(tmp_path), world, tmp_path / "a.jsonl")
    assert [(one.answer, one.right) for one in graded] == [("", False)] * 3


def overdue(after: int) -> Any:
    """A solver that says nothing more about the kinase from its turn `after` on, and else studies."""

    def answer(body: dict[str, Any]) -> str | Fault:
        silent = "kinase" in json.dumps(body["messages"]) and turn_of(body) >= after
        return HANG if silent else studies(body)

    return answer


@pytest.mark.parametrize("after", [1, 2])
def test_a_question_that_outlasts_its_deadline_has_no_answer_and_the_others_theirs(tmp_path: Path, after: int) -> None:
    settings = settings_for(tmp_path, trainer__rollout_deadline_s=1.0)
    with world_of(overdue(after)) as world:
        graded = sit(settings, world, tmp_path / "a.jsonl")
        assert [(one.answer, one.right, one.overdue) for one in graded] == [
            ("yes", True, False), ("", False, False), ("", False, True),
        ]  # fmt: skip
        assert (marks(graded)["overdue"], len(graded[2].row["turns"])) == (1, after - 1)
        before = len(world.chats)
        assert sit(settings, world, tmp_path / "a.jsonl") == graded
        assert len(world.chats) == before


@pytest.mark.parametrize("service", ["solver", "retrieval"])
def test_a_service_that_hangs_ends_the_exam_and_is_named(tmp_path: Path, service: str) -> None:
    settings = settings_for(tmp_path, trainer__rollout_deadline_s=0.5, trainer__patience_s=0.5)
    with watched(lambda *_: HANG) as hung, world_of(studies) as world:
        given = changed(settings, {"solver.url": world.url, "retrieval.url": world.url, f"{service}.url": hung.url})
        with pytest.raises(ServiceError, match=f"{service}: .*no whole reply"):
            asyncio.run(take_exam(given, ITEMS, tmp_path / "a.jsonl"))


def test_an_exam_without_questions_asks_nothing(tmp_path: Path) -> None:
    with world_of(studies) as world:
        assert sit(settings_for(tmp_path), world, tmp_path / "a.jsonl", []) == []
    assert world.chats == []
