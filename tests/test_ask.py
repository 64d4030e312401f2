"""Asking the served agent: what it is asked, what is told of the answer, and what happens when it cannot answer."""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import example, given
from hypothesis import strategies as st
from model_services import CRASH, Fault, Reply, watched
from round_world import Says, World, settings_at, world_of
from using_world import CONTROLS, call_for, ended, searched, searches_once

from services.trainer.ask import (
    NOTICE,
    OUTCOMES,
    Answer,
    answer_question,
    checked_question,
    main,
    parsed,
    served_tokens,
    summary,
    temperature_of,
    thought_of,
)
from services.trainer.protocol import SEARCH_TOOL, solver_messages
from shared.clients import ServiceError
from shared.command import UsageError, plain
from shared.settings import Settings

LOG = structlog.get_logger()
QUESTION = "Which kinase does imatinib block?"
NOBODY = "http://127.0.0.1:9"


def asked(world: World, folder: Path, said: Callable[[str], None] = lambda _: None, **changes: Any) -> Answer:
    settings = settings_at(folder, world.url, trainer__reward__max_turns=3, **changes)
    return asyncio.run(answer_question(QUESTION, settings, served_tokens(settings), say=said))


def answered(says: Says, folder: Path, **changes: Any) -> Answer:
    with world_of(says, model="/weights/one") as world:
        return asked(world, folder, **changes)


# --- the answer


def test_an_answer_has_its_searches_its_papers_and_the_weights_that_gave_it(tmp_path: Path) -> None:
    answer = answered(searches_once, tmp_path)
    assert (answer.question, answer.answer, answer.ended) == (QUESTION, "BCR-ABL", "answered")
    assert (answer.weights, answer.notice) == ("/weights/one", NOTICE)
    assert [step.thought for step in answer.steps] == ["I look it up.", "It is there."]
    assert [step.queries for step in answer.steps] == [("imatinib kinase",), ()]
    assert [[paper.pmid for paper in step.papers] for step in answer.steps] == [["7"], []]
    shown, unseen = answer.sources
    assert (shown.pmid, shown.title, shown.shown, shown.cited) == ("7", "A paper", True, True)
    assert shown.link == "https://pubmed.ncbi.nlm.nih.gov/7/"
    assert (unseen.pmid, unseen.title, unseen.shown, unseen.cited) == ("12345", "", False, True)


def test_it_is_asked_as_in_an_attempt_but_greedily(tmp_path: Path) -> None:
    with world_of(searches_once) as world:
        asked(world, tmp_path, trainer__reward__max_new_tokens=77, trainer__reward__temperature=0.9)
    settings = settings_at(tmp_path)
    trainer = settings.trainer
    for body in world.bodies:
        assert body["messages"][:2] == solver_messages(QUESTION, trainer.prompts, trainer.reward.worked_examples)[:2]
        assert (body["temperature"], body["max_tokens"], body["tools"]) == (0.0, 77, [SEARCH_TOOL])
        assert body["model"] == settings.solver.served_name
    assert [body["queries"] for body in world.searches] == [["imatinib kinase"]]


def test_the_same_question_is_asked_in_the_same_words_and_another_temperature_is_passed_on(tmp_path: Path) -> None:
    with world_of(searches_once) as world:
        for temperature in ("0", "0", "0.7"):
            main(parsed([QUESTION, "--json", "--temperature", temperature]), settings_at(tmp_path, world.url), LOG)
    first, again, warm = world.bodies[:2], world.bodies[2:4], world.bodies[4:]
    assert first == again
    assert [body["temperature"] for body in warm] == [0.7, 0.7]


@pytest.mark.parametrize(
    ("says", "outcome", "turns"),
    [
        (lambda _: "I do not know.", "no_answer", 1),
        (lambda _: call_for("more"), "no_answer", 3),  # and never comes to an end
        (lambda _: (400, {"error": {"message": "9 prompt tokens exceed the context of 8"}}), "length", 0),
        (lambda body: "<answer></answer>", "no_answer", 1),
    ],
)
def test_what_is_no_answer_is_said_as_such(tmp_path: Path, says: Says, outcome: str, turns: int) -> None:
    answer = answered(says, tmp_path)
    assert (answer.answer, answer.ended, len(answer.steps)) == ("", outcome, turns)
    assert OUTCOMES[outcome] in summary(answer)


def test_no_search_is_told_that_was_not_made(tmp_path: Path) -> None:
    said: list[str] = []
    with world_of(lambda _: call_for("zinc")) as world:
        answer = asked(world, tmp_path, said.append)
    assert len(world.searches) == 2  # the call in the last of three turns leads nowhere
    assert said.count("searches: zinc") == 2
    assert [step.queries for step in answer.steps] == [("zinc",), ("zinc",), ()]


def test_weights_that_change_meanwhile_are_both_named(tmp_path: Path) -> None:
    worlds: list[World] = []

    def swaps(body: dict[str, Any]) -> str:
        worlds[0].model = "/weights/two"
        return searches_once(body)

    with world_of(swaps, model="/weights/one") as world:
        worlds.append(world)
        assert asked(world, tmp_path).weights == "/weights/one, then /weights/two"


def test_thoughts_are_what_stands_before_a_search_or_an_answer() -> None:
    assert thought_of("<think>So.</think>\n<answer>zinc</answer>") == "So."
    assert thought_of(call_for("zinc")) == "I look it up."
    assert thought_of("no tags at all") == "no tags at all"
    assert thought_of("<think>never ends") == "never ends"


# --- what is not asked


@given(st.text())
@example("")
@example(" \n\t")
@example("\ud800")
@example("x" * 2001)
def test_a_question_is_asked_stripped_and_one_that_is_empty_or_too_long_is_refused(text: str) -> None:
    settings = Settings()
    most = settings.retrieval.max_query_chars
    if 0 < len(text.strip()) <= most:
        question = checked_question(text, settings)
        assert len(question) == len(text.strip())
        question.encode()
    else:
        with pytest.raises(UsageError, match=r"expected a question.*found"):
            checked_question(text, settings)


@given(length=st.integers(1, 60), most=st.integers(1, 50))
def test_the_limit_is_that_of_the_search(length: int, most: int) -> None:
    settings = Settings.model_validate({"retrieval": {"max_query_chars": most}})
    if length <= most:
        assert checked_question("x" * length, settings) == "x" * length
    else:
        with pytest.raises(UsageError, match="DRZERO_RETRIEVAL__MAX_QUERY_CHARS"):
            checked_question("x" * length, settings)


@pytest.mark.parametrize("question", ["", "  ", "x" * 2001])
def test_a_question_that_is_refused_reaches_no_service(tmp_path: Path, question: str) -> None:
    with world_of(searches_once) as world, pytest.raises(UsageError):
        main(parsed([question]), settings_at(tmp_path, world.url), LOG)
    assert (world.chats, world.searches) == ([], [])


@pytest.mark.parametrize("text", ["-1", "2.1", "nan", "inf", "warm", ""])
def test_a_temperature_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(Exception, match="expected a number from 0 to 2"):
        temperature_of(text)


# --- services that are away or fail


def test_without_services_the_command_ends_with_one_sentence_and_status_1(tmp_path: Path) -> None:
    with world_of(searches_once) as world:
        for changes, name in (({"solver__url": NOBODY}, "solver"), ({"retrieval__url": NOBODY}, "retrieval")):
            settings = settings_at(tmp_path, world.url, **changes)
            status, output, errors = ended("ask", QUESTION, settings=settings)
            assert (status, output) == (1, "")
            assert re.fullmatch(rf"trainer: {name}: {NOBODY}/\S+ gave no answer within 5 s .*\n", errors)
    assert world.chats == []


@pytest.mark.parametrize("fault", [CRASH, Fault(404), (400, {"error": {"message": "no such field"}})])
def test_a_service_that_fails_in_the_middle_is_an_error_and_no_answer(tmp_path: Path, fault: Fault | Reply) -> None:
    def breaks(body: dict[str, Any]) -> str | Reply | Fault:
        return fault if searched(body) else searches_once(body)

    with pytest.raises(ServiceError, match="solver"):
        answered(breaks, tmp_path)


def test_an_index_that_is_not_ready_is_said_before_the_model_is_asked(tmp_path: Path) -> None:
    with world_of(searches_once) as world, watched(lambda *_: CRASH) as broken:
        settings = settings_at(tmp_path, world.url, retrieval__url=broken.url)
        with pytest.raises(ServiceError, match="retrieval"):
            main(parsed([QUESTION]), settings, LOG)
    assert world.chats == []


# --- for people and for programs


def test_people_read_thoughts_searches_papers_answer_and_weights_in_this_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with world_of(searches_once, model="/weights/one") as world:
        main(parsed([QUESTION]), settings_at(tmp_path, world.url), LOG)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        "I look it up.",
        "searches: imatinib kinase",
        "  PMID 7  A paper",
        "It is there.",
        "Answer: BCR-ABL",
        "Papers:",
        "  PMID 7 · A paper (cited)",
        "    https://pubmed.ncbi.nlm.nih.gov/7/",
        "  PMID 12345 (cited, but never shown to the model)",
        "    https://pubmed.ncbi.nlm.nih.gov/12345/",
        "Weights: /weights/one",
        NOTICE,
    ]


def test_programs_read_one_object_and_nothing_else(tmp_path: Path) -> None:
    with world_of(searches_once, model="/weights/one") as world:
        status, output, _ = ended("ask", "--json", "--", QUESTION, settings=settings_at(tmp_path, world.url))
    found = json.loads(output)
    assert (status, found["answer"], found["notice"]) == (0, "BCR-ABL", NOTICE)
    assert [paper["pmid"] for paper in found["sources"]] == ["7", "12345"]


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_nothing_that_a_terminal_obeys_gets_through_from_papers_or_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    control = "".join(CONTROLS)

    def nasty(body: dict[str, Any]) -> str:
        turn = call_for(f"a{control}b") if not searched(body) else f"<answer>{control}zinc</answer>"
        return f"{control}thought{turn}"

    with world_of(nasty, model=f"/weights{control}", pmid=f"7{control}") as world:
        main(parsed([QUESTION, *words]), settings_at(tmp_path, world.url), LOG)
    shown = capsys.readouterr().out
    assert plain(shown) == shown
    assert "zinc" in shown


def test_nor_in_the_error_of_a_service(tmp_path: Path) -> None:
    def refuses(_: dict[str, Any]) -> Fault:
        return Fault(418, "".join(CONTROLS).encode())

    with world_of(refuses) as world:
        status, _, errors = ended("ask", QUESTION, settings=settings_at(tmp_path, world.url))
    assert (status, plain(errors)) == (1, errors)


@given(st.text())
def test_plain_text_keeps_all_but_controls_and_its_length(text: str) -> None:
    found = plain(text)
    assert len(found) == len(text)
    assert plain(found) == found
    for before, after in zip(text, found, strict=True):
        if before.isprintable() or before in "\n\t":
            assert after == before
