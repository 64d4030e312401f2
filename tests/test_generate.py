"""Questions by a trained proposer: what is written, and that the solver serves again what it served before."""

import argparse
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import structlog
from corpora import publish_corpus
from model_services import CRASH, Fault
from round_world import World, settings_at, world_of
from tiny_model import tiny_tokenizer
from using_world import CONTROLS, call_for, ended, searched, started

from services.trainer.__main__ import only_driver
from services.trainer.candidates import proposer_manner
from services.trainer.generate import STOPS, lent, main, parsed, undisturbed
from services.trainer.paths import run_paths
from services.trainer.rounds import Role, paths_of
from shared.clients import Refused, ServiceError
from shared.command import UsageError, counted, plain
from shared.files import ArtifactError, publish
from shared.model_files import CHAT_TEMPLATE
from shared.records import Paper
from shared.serving import note_path, note_served
from shared.settings import Settings, changed

LOG: Any = structlog.wrap_logger(structlog.ReturnLogger())  # standard output is for questions
NOBODY = "http://127.0.0.1:9"
PAPERS = [Paper(str(number), f"Zinc {number}", f"Zinc heals wounds of kind {number}.") for number in (7, 8, 9)]
ROLES: tuple[Role, ...] = ("proposer", "solver")


def proposes(body: dict[str, Any]) -> str:
    """Searches once, then asks; each seed in its own words."""
    if not searched(body):
        return call_for("wounds")
    return f"<think>So.</think><question>Which metal heals {body['seed']}?</question><answer>zinc (PMID 7)</answer>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with nothing but a tokenizer that can be talked to."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> Settings:
    """A run of two rounds with their weights, and a corpus of three papers."""
    shape = {"trainer__prompt_tokens": 20_000, "trainer__reward__concurrency": 4, "trainer__questions__candidates": 3}
    models = {"solver__model": str(model), "trainer__actor__model": str(model)}
    found = settings_at(tmp_path, **models, **shape, trainer__temperature=0.5)
    publish_corpus(found.storage.data_dir, PAPERS)
    for number in (1, 2):
        for role in ROLES:
            with publish(paths_of(found, number, role).weights, settings={}, made_from={role: str(number)}) as draft:
                shutil.copytree(model, draft.path, dirs_exist_ok=True)
    return found


def at(settings: Settings, world: World) -> Settings:
    return changed(settings, {"solver.url": world.url, "retrieval.url": world.url})


def proposer(settings: Settings, number: int = 2) -> str:
    return str(paths_of(settings, number, "proposer").weights.resolve())


def solver(settings: Settings, number: int = 2) -> str:
    return str(paths_of(settings, number, "solver").weights.resolve())


def write(settings: Settings, world: World, *words: str) -> None:
    main(parsed(list(words)), at(settings, world), LOG)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- what is written


def test_as_many_questions_as_wanted_are_written_by_the_newest_proposer(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with world_of(proposes, model=solver(settings)) as world:
        write(settings, world, "--pmid", "8", "--hops", "2", "--count", "5")
    found = lines_of(capsys.readouterr().out)
    assert len(found) == len({one["question"] for one in found}) == 5
    for one in found:
        assert one.keys() == {"question", "answer", "hop", "pmid", "searches"}
        assert (one["pmid"], one["hop"], one["answer"]) == ("8", 2, "zinc")
        assert one["searches"] == [{"queries": ["wounds"], "pmids": ["7"]}]
    assert {weights for weights, _ in world.chats} == {proposer(settings)}
    manner = proposer_manner(settings, 2)
    assert {(body["temperature"], body["max_tokens"]) for body in world.bodies} == {
        (manner.temperature, manner.max_new_tokens)
    }


def test_a_round_can_be_named_and_one_that_is_not_there_is_said(settings: Settings) -> None:
    with world_of(proposes, model=solver(settings)) as world:
        write(settings, world, "--pmid", "8", "--count", "1", "--round", "1")
        assert world.loaded == [proposer(settings, 1), solver(settings)]
        with pytest.raises(UsageError, match=r"round 3 .*found those of \[1, 2\]"):
            write(settings, world, "--pmid", "8", "--round", "3")


def test_the_same_command_asks_for_the_same_questions(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    written = []
    with world_of(proposes, model=solver(settings)) as world:
        for _ in range(2):
            write(settings, world, "--pmid", "7", "--count", "3")
            written.append(capsys.readouterr().out)
    assert written[0] == written[1]


def test_a_topic_is_searched_for_and_asked_about(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with world_of(proposes, model=solver(settings), pmid="9") as world:
        write(settings, world, "--topic", " sepsis biomarkers ", "--count", "2", "--hops", "1")
    assert world.searches[0] == {"queries": ["sepsis biomarkers"], "top_k": 2}
    assert {one["pmid"] for one in lines_of(capsys.readouterr().out)} == {"9"}


def test_malformed_questions_are_replaced_and_too_few_are_printed_and_said(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    held: list[int] = []

    def rarely(body: dict[str, Any]) -> str:
        if not searched(body):
            return proposes(body)
        held.append(body["seed"])
        return proposes(body) if len(held) % 3 == 0 else "I have no question."

    with world_of(rarely, model=solver(settings)) as world:
        write(settings, world, "--pmid", "7", "--hops", "1", "--count", "2")
        assert len(lines_of(capsys.readouterr().out)) == 2
        held.clear()
        with world_of(lambda _: "None.", model=solver(settings)) as silent:
            with pytest.raises(UsageError, match=r"expected 2 well-formed questions.* wrote 0 in 6 tries"):
                write(settings, silent, "--pmid", "7", "--hops", "1", "--count", "2")
            assert (len(silent.chats), silent.model) == (6, solver(settings))


@pytest.mark.parametrize("words", [[], ["--text"]])
def test_nothing_that_a_terminal_obeys_gets_through(
    settings: Settings, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    control = "".join(CONTROLS)

    def nasty(body: dict[str, Any]) -> str:
        if not searched(body):
            return call_for(f"a{control}b")
        return f"<question>Which {control}metal?</question><answer>zi{control}nc</answer>"

    with world_of(nasty, model=solver(settings), pmid="7") as world:
        write(settings, world, "--pmid", "7", "--count", "1", *words)
    shown = capsys.readouterr().out
    assert "Which" in shown
    assert plain(shown) == shown


def test_people_read_question_answer_and_searches(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with world_of(proposes, model=solver(settings)) as world:
        write(settings, world, "--pmid", "8", "--count", "1", "--text")
    question, *rest = capsys.readouterr().out.splitlines()
    assert question.startswith("Question: Which metal heals ")
    assert rest == ["Answer: zinc", "  2 hops from PMID 8", "  searched wounds: PMID 7", ""]


# --- what is not written


@pytest.mark.parametrize("pmid", ["12", "x", "-1", "7 8", "", "99999999999"])
def test_a_paper_that_is_not_in_the_corpus_is_said_before_weights_are_swapped(settings: Settings, pmid: str) -> None:
    with world_of(proposes, model=solver(settings)) as world, pytest.raises(UsageError, match="in the corpus"):
        write(settings, world, f"--pmid={pmid}")
    assert (world.loaded, world.chats) == ([], [])


@pytest.mark.parametrize(("topic", "words"), [(" ", "expected a topic, found none"), ("x" * 2001, "of at most 2000")])
def test_a_topic_that_is_empty_or_too_long_is_refused(settings: Settings, topic: str, words: str) -> None:
    with world_of(proposes, model=solver(settings)) as world, pytest.raises(UsageError, match=words):
        write(settings, world, "--topic", topic)
    assert (world.loaded, world.searches) == ([], [])


@pytest.mark.parametrize("text", ["0", "-1", "5", "1.5", "two", "", "٣", "9" * 5000])
def test_a_number_outside_its_bounds_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number from 1 to 4"):
        counted(text, 4)
    assert [counted(str(number), 4) for number in (1, 2, 3, 4)] == [1, 2, 3, 4]


def test_services_that_are_away_end_the_command_with_one_sentence_and_no_swap(settings: Settings) -> None:
    with world_of(proposes, model=solver(settings)) as world:
        for name in ("solver", "retrieval"):
            given = changed(at(settings, world), {f"{name}.url": NOBODY})
            status, output, errors = ended("generate", "--pmid", "7", settings=given)
            (sentence,) = [line for line in errors.splitlines() if not line.startswith("{")]  # others are log lines
            assert (status, output) == (1, "")
            assert sentence.startswith(f"trainer: {name}: {NOBODY}/")
    assert world.loaded == []
    assert not note_path(settings).exists()


@pytest.mark.parametrize("run", ["demo", "another"])
def test_while_any_run_is_driven_nothing_is_swapped_and_no_run_begins_meanwhile(settings: Settings, run: str) -> None:
    folder = run_paths(settings).run.parent / run
    folder.mkdir(exist_ok=True)
    refused: list[str] = []

    def tries_to_drive(body: dict[str, Any]) -> str:
        with pytest.raises(UsageError, match="another process drives"), only_driver(folder):
            pass
        refused.append(run)
        return proposes(body)

    with world_of(tries_to_drive, model=solver(settings)) as world:
        with only_driver(folder), pytest.raises(UsageError, match=f"another process drives the run {run}"):
            write(settings, world, "--pmid", "7")
        assert (world.loaded, world.chats) == ([], [])
        write(settings, world, "--pmid", "7", "--count", "1", "--hops", "1")
    assert refused
    with only_driver(folder):
        pass


# --- what is served afterwards


def noted(settings: Settings) -> str | None:
    note = note_path(settings)
    return note.read_text(encoding="utf-8") if note.is_file() else None


@pytest.mark.parametrize("note", [True, False])
@pytest.mark.parametrize("base", [True, False])
def test_the_solver_serves_again_what_it_served_and_the_note_is_as_it_was(
    settings: Settings, note: bool, base: bool
) -> None:
    before = settings.solver.model if base else solver(settings)
    if note:
        note_served(settings, before)
    words = noted(settings)
    with world_of(proposes, model=before) as world:
        write(settings, world, "--pmid", "7", "--count", "1")
        assert (world.model, world.loaded) == (before, [proposer(settings), before])
    assert noted(settings) == words


@pytest.mark.parametrize("fault", [CRASH, Fault(404)])
def test_also_after_a_service_that_fails(settings: Settings, fault: Fault) -> None:
    note_served(settings, solver(settings))
    words = noted(settings)
    with world_of(lambda _: fault, model=solver(settings)) as world, pytest.raises(ServiceError):
        write(settings, world, "--pmid", "7")
    assert (world.model, noted(settings)) == (solver(settings), words)


def test_also_when_the_proposer_is_refused(settings: Settings) -> None:
    with world_of(proposes, model=solver(settings)) as world:
        world.refusal = "tensors that do not fit"
        with pytest.raises(Refused, match="tensors that do not fit"):
            write(settings, world, "--pmid", "7")
    assert (world.model, noted(settings)) == (solver(settings), None)


def test_also_when_the_reader_of_the_output_has_gone(settings: Settings) -> None:
    with (
        world_of(proposes, model=solver(settings)) as world,
        started("generate", "--pmid", "7", "--count", "1", settings=at(settings, world)) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert (world.model, noted(settings)) == (solver(settings), None)


@pytest.mark.parametrize("stop", STOPS)
def test_also_after_a_signal_that_asks_for_an_end(settings: Settings, stop: signal.Signals) -> None:
    note_served(settings, solver(settings))
    words = noted(settings)
    entered, go = threading.Event(), threading.Event()

    def waits(_: dict[str, Any]) -> str:
        entered.set()
        go.wait(60)
        return ""

    with world_of(waits, model=solver(settings)) as world:
        process = started("generate", "--pmid", "7", settings=at(settings, world))
        assert entered.wait(60)
        assert world.model == proposer(settings)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
        go.set()
        assert world.model == solver(settings)
    assert process.returncode == 130
    assert errors.endswith("trainer: interrupted\n")
    assert "Traceback" not in errors
    assert noted(settings) == words


def test_a_second_signal_does_not_end_the_giving_back() -> None:
    before = {number: signal.getsignal(number) for number in STOPS}
    with undisturbed():
        for number in STOPS:
            os.kill(os.getpid(), number)
    assert {number: signal.getsignal(number) for number in STOPS} == before


def test_of_two_solvers_each_serves_its_own_again_though_one_fails(settings: Settings) -> None:
    with world_of(proposes, model=solver(settings, 1)) as bad, world_of(proposes, model=solver(settings)) as good:
        given = changed(settings, {"solver.url": f"{bad.url},{good.url}", "retrieval.url": good.url})
        with pytest.raises(Refused, match="no more"), lent(given, Path(proposer(settings)), LOG):  # noqa: PT012
            assert bad.model == good.model == proposer(settings)
            bad.refusal = "no more"  # which raises when the block ends
        assert good.model == solver(settings)
        bad.refusal = ""
        with lent(given, Path(proposer(settings)), LOG):
            pass
        assert (bad.model, good.model) == (proposer(settings), solver(settings))


def test_what_could_not_be_given_back_is_not_taken_away(settings: Settings) -> None:
    (Path(solver(settings)) / "tokenizer.json").write_text("{}", encoding="utf-8")
    with world_of(proposes, model=solver(settings)) as world:
        with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
            write(settings, world, "--pmid", "7")
        assert (world.loaded, noted(settings)) == ([], None)


def test_questions_are_printed_even_if_the_solver_then_fails(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked_last(body: dict[str, Any]) -> str:
        world.refusal = "no more"
        return proposes(body)

    with world_of(asked_last, model=solver(settings)) as world, pytest.raises(Refused, match="no more"):
        write(settings, world, "--pmid", "7", "--count", "1", "--hops", "1")
    assert len(lines_of(capsys.readouterr().out)) == 1
