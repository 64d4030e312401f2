"""The round's questions: what is kept fulfils every rule, what is rejected breaks the one it names, nothing leaks."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from round_world import publish_files, publish_weights_at, settings_at, world_of

from services.trainer.biomedical import likeness
from services.trainer.journal import Row
from services.trainer.paths import run_paths
from services.trainer.questions import (
    FILE,
    Candidate,
    make_questions,
    objection,
    papers_kept_out,
    question_counts,
    read_candidate,
    read_rows,
    require_disjoint,
    select,
    sources,
    verdict,
)
from services.trainer.records import HELD_OUT, TRAIN
from services.trainer.seeds import write_rows
from shared.clients import Unavailable
from shared.files import ArtifactError, publish, read_manifest
from shared.settings import QuestionSettings, Settings, changed

PMIDS = [str(number) for number in range(1, 13)]
TOPICS = ["insulin", "asthma", "copper", "the retina", "malaria", "a stroke", "the spleen", "iron", "sepsis", "zinc"]
TEXTS = [f"What {verb} {topic}?" for topic in TOPICS for verb in ("raises", "is known to be the cause of")]
UNRELATED = [f"{word * 9}?" for word in "abcdefghijklmnop"]  # no two alike


def candidate(name: str = "0.0", **changes: Any) -> Candidate:
    """A candidate without fault."""
    return replace(
        Candidate(
            name=name, pmid="1", hop=2, question="Which kinase does it activate?", answer="AMPK",
            hops=[{"queries": ["kinase"], "pmids": ["2"]}], evidence="AMPK.", sound=True, grounded=True, cited=(),
        ),
        **changes,
    )  # fmt: skip


def check(right_with: int, right_without: int, tries: int, answer: str = "AMPK") -> Row:
    """The solver's answers to a candidate, the right ones first."""
    return {
        kind: [answer if number < right else "none" for number in range(tries)]
        for kind, right in (("with_evidence", right_with), ("without", right_without))
    }


def settings_of(questions: QuestionSettings, seed: int = 42) -> Settings:
    return changed(Settings(), {"trainer.questions": questions.model_dump(), "trainer.seed": seed})


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Candidate], dict[str, Row], Settings, frozenset[str]]:
    """Candidates of a few papers with their checks, settings of the stage, and barred papers."""
    tries = draw(st.integers(1, 3))
    questions = QuestionSettings(
        tries=tries,
        min_with_evidence=draw(st.integers(0, tries)),
        max_without=draw(st.integers(0, tries)),
        held_out_share=draw(st.sampled_from([0.01, 0.2, 0.5, 0.99])),
        likeness=draw(st.sampled_from([0.5, 0.8, 1.0])),
    )
    pmids = st.sampled_from(PMIDS)
    candidates = [
        candidate(
            f"{paper}.{number}",
            pmid=PMIDS[paper],
            question=draw(st.sampled_from(TEXTS)),
            hops=[
                {"queries": ["q"], "pmids": found} for found in draw(st.lists(st.lists(pmids, max_size=2), max_size=2))
            ],
            sound=draw(st.sampled_from([True, True, True, False])),
            grounded=draw(st.sampled_from([True, True, True, False])),
        )
        for paper in range(draw(st.integers(0, 6)))
        for number in range(draw(st.integers(1, 3)))
    ]
    barred = frozenset(draw(st.lists(pmids, max_size=2)))
    right = st.integers(0, tries)
    checks = {one.name: check(draw(right), draw(right), tries) for one in candidates if not objection(one, barred)}
    return candidates, checks, settings_of(questions, draw(st.integers(0, 3))), barred


# --- what is kept and what is not


@given(cases())
def test_every_kept_question_fulfils_every_rule(case: tuple[Any, ...]) -> None:
    candidates, checks, settings, barred = case
    rules, by_name = settings.trainer.questions, {one.name: one for one in candidates}
    kept, rejected = select(candidates, checks, settings, barred)
    kept_out = {row["pmid"] for row in kept if row["split"] == HELD_OUT}
    for row in kept:
        one, answers = by_name[row["id"]], checks[row["id"]]
        assert one.sound
        assert row["grounded"] == one.grounded
        assert sources(row) == one.sources
        assert not one.sources & barred
        assert row["right_with_evidence"] == answers["with_evidence"].count("AMPK") >= rules.min_with_evidence
        assert row["right_without"] == answers["without"].count("AMPK") <= rules.max_without
        assert row["difficulty"] == pytest.approx(1 - row["right_with_evidence"] / rules.tries)
        assert row["split"] == (HELD_OUT if row["pmid"] in kept_out else TRAIN)
        assert row["split"] == HELD_OUT or not one.sources & kept_out
    texts = [row["question"] for row in kept]
    assert all(likeness(text, texts[:place]) <= rules.likeness for place, text in enumerate(texts))
    require_disjoint(kept, barred)
    # Each candidate is in one of the lists, in the given order.
    for rows in (kept, rejected):
        names = [row["id"] for row in rows]
        assert names == [one.name for one in candidates if one.name in names]
    assert Counter(row["id"] for row in kept + rejected) == Counter(list(by_name))


@given(cases())
def test_every_rejected_candidate_breaks_the_rule_it_names(case: tuple[Any, ...]) -> None:
    candidates, checks, settings, barred = case
    rules, by_name = settings.trainer.questions, {one.name: one for one in candidates}
    kept, rejected = select(candidates, checks, settings, barred)
    reasons = {row["id"]: row["reason"] for row in rejected}
    kept_out = {row["pmid"] for row in kept if row["split"] == HELD_OUT}
    stood = [one.name for one in candidates if reasons.get(one.name) in (None, "held_out_paper")]
    for name, reason in reasons.items():
        one, answers = by_name[name], checks.get(name, {})
        match reason:
            case "malformed":
                assert not one.sound
            case "evaluation_paper":
                assert one.sources & barred
            case "not_answerable":
                assert answers["with_evidence"].count("AMPK") < rules.min_with_evidence
            case "known":
                assert answers["without"].count("AMPK") > rules.max_without
            case "duplicate":
                before = [by_name[other].question for other in stood if before_in(candidates, other, name)]
                assert likeness(one.question, before) > rules.likeness
            case "held_out_paper":
                assert one.pmid not in kept_out
                assert one.sources & kept_out
            case _:
                pytest.fail(f"no such rule: {reason}")


def before_in(candidates: Sequence[Candidate], first: str, second: str) -> bool:
    names = [one.name for one in candidates]
    return names.index(first) < names.index(second)


@given(cases())
def test_what_is_rejected_before_the_check_was_not_checked_and_the_rest_says_how_it_fared(
    case: tuple[Any, ...],
) -> None:
    candidates, checks, settings, barred = case
    _, rejected = select(candidates, checks, settings, barred)
    early = ("malformed", "evaluation_paper")
    assert all(("with_evidence" in row) == (row["reason"] not in early) for row in rejected)


@given(cases())
def test_the_same_candidates_make_the_same_questions(case: tuple[Any, ...]) -> None:
    candidates, checks, settings, barred = case
    again = dict(reversed(checks.items()))
    assert select(candidates, checks, settings, barred) == select(list(candidates), again, settings, barred)


@given(cases())
def test_counts_add_up_to_the_candidates(case: tuple[Any, ...]) -> None:
    candidates, checks, settings, barred = case
    counts = question_counts(candidates, *select(candidates, checks, settings, barred))
    assert counts.pop("candidates") == len(candidates) == sum(counts.values())


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_more_right_answers_with_evidence_and_fewer_without_never_cost_a_question(
    right_with: int, right_without: int, least: int, most: int
) -> None:
    rules = QuestionSettings(tries=3, min_with_evidence=least, max_without=most)
    kept = not verdict(right_with, right_without, rules)
    assert kept == (right_with >= least and right_without <= most)
    if kept:
        assert not verdict(min(3, right_with + 1), max(0, right_without - 1), rules)


def test_a_copy_in_other_words_order_is_a_duplicate_and_the_first_one_stays() -> None:
    first = candidate("0.0", question="Which kinase does metformin activate in the liver?")
    copy = candidate("0.1", question="In the liver, which kinase does metformin activate?")
    other = candidate("0.2", question="How long does measles last?")
    checks = {one.name: check(3, 0, 3) for one in (first, copy, other)}
    kept, [rejected] = select([first, copy, other], checks, settings_of(QuestionSettings()), frozenset())
    assert [row["id"] for row in kept] == ["0.0", "0.2"]
    assert (rejected["id"], rejected["reason"]) == ("0.1", "duplicate")


def test_a_copy_of_a_rejected_candidate_is_no_duplicate() -> None:
    first, copy = candidate("0.0"), candidate("0.1")
    checks = {"0.0": check(0, 0, 3), "0.1": check(2, 0, 3)}
    kept, rejected = select([first, copy], checks, settings_of(QuestionSettings()), frozenset())
    assert [row["id"] for row in kept] == ["0.1"]
    assert [row["reason"] for row in rejected] == ["not_answerable"]


# --- leaks


@given(cases(), st.integers(0, 3), st.booleans(), st.data())
def test_a_planted_evaluation_paper_is_never_kept(
    case: tuple[Any, ...], turn: int, as_seed: bool, data: st.DataObject
) -> None:
    candidates, checks, settings, barred = case
    planted = "999"
    changes: dict[str, Any] = {"pmid": planted}
    if not as_seed:
        changes = {"hops": [{"queries": ["q"], "pmids": ["8", planted]}] * (turn + 1)}
    spy = candidate("99.0", question="Who leaks?", **changes)
    place = data.draw(st.integers(0, len(candidates)))
    mixed = [*candidates[:place], spy, *candidates[place:]]
    kept, rejected = select(mixed, checks, settings, barred | {planted})
    assert all(planted not in sources(row) for row in kept)
    assert {row["id"]: row["reason"] for row in rejected}["99.0"] == "evaluation_paper"
    # The spy changes nothing else.
    assert kept == select(candidates, checks, settings, barred)[0]


@given(cases(), st.data())
def test_a_planted_leak_is_refused(case: tuple[Any, ...], data: st.DataObject) -> None:
    kept, _ = select(*case)
    if not kept:
        return
    row = data.draw(st.sampled_from(kept))
    row["hops"] = [*row["hops"], {"queries": ["q"], "pmids": ["999"]}]
    with pytest.raises(ArtifactError, match=rf"question {row['id']} \({row['split']}\) rests on PMID 999"):
        require_disjoint(kept, {"999"})
    with pytest.raises(ArtifactError, match="PMID 998"):
        require_disjoint([*kept, row | {"pmid": "998", "split": HELD_OUT, "hops": []}], {"998"})


@given(cases())
def test_a_kept_out_paper_behind_a_training_question_is_refused(case: tuple[Any, ...]) -> None:
    kept, _ = select(*case)
    held_out = [row["pmid"] for row in kept if row["split"] == HELD_OUT]
    train = [row for row in kept if row["split"] == TRAIN]
    if not held_out or not train:
        return
    train[0]["hops"] = [{"queries": [], "pmids": [held_out[0]]}]
    with pytest.raises(ArtifactError, match=rf"\(train\) rests on PMID {held_out[0]}"):
        require_disjoint(kept, case[3])


def test_kept_out_questions_may_share_papers_with_each_other_and_with_training() -> None:
    rows: list[Row] = [
        {"id": "0.0", "pmid": "1", "split": HELD_OUT, "hops": [{"queries": ["q"], "pmids": ["2", "3"]}]},
        {"id": "1.0", "pmid": "2", "split": HELD_OUT, "hops": []},
        {"id": "2.0", "pmid": "3", "split": TRAIN, "hops": []},
    ]
    require_disjoint(rows, {"4"})


@given(papers=st.lists(st.sampled_from(PMIDS), unique=True), share=st.floats(0.001, 1), seed=st.text(max_size=3))
def test_a_share_of_the_papers_is_kept_out_and_the_same_one_each_time(
    papers: list[str], share: float, seed: str
) -> None:
    kept_out = papers_kept_out(papers, share, seed)
    assert kept_out == papers_kept_out(papers, share, seed)
    assert kept_out <= set(papers)
    assert len(kept_out) == (min(max(1, round(share * len(papers))), len(papers) - 1) if papers else 0)


def test_another_round_keeps_other_papers_out() -> None:
    candidates = [candidate(f"{n}.0", pmid=str(100 + n), question=text, hops=[]) for n, text in enumerate(UNRELATED)]
    checks = {one.name: check(3, 0, 3) for one in candidates}
    settings = settings_of(QuestionSettings(held_out_share=0.3, likeness=0.9))

    def held_out(number: int) -> set[str]:
        kept, rejected = select(candidates, checks, changed(settings, {"trainer.round": number}), frozenset())
        assert (len(kept), rejected) == (len(UNRELATED), [])
        return {row["pmid"] for row in kept if row["split"] == HELD_OUT}

    assert len(held_out(1)) == round(0.3 * len(UNRELATED))
    assert held_out(1) != held_out(2)


# --- reading what the proposer wrote

WRITTEN: Row = {
    "name": "3.1", "pmid": "11", "hop": 2, "document": "Metformin lowers glucose.",
    "turns": ["<think>I search.</think>", "<think>Found.</think><question>Which kinase does exercise switch on?"
              "</question><answer>AMPK (PMID 7)</answer>"],
    "searches": [{"queries": ["metformin kinase"], "pmids": ["7", "8"], "text": "PMID 7: A paper. It activates AMPK."}],
}  # fmt: skip


def test_a_candidate_has_its_paper_its_searches_and_its_citations() -> None:
    one = read_candidate(WRITTEN)
    assert (one.name, one.pmid, one.hop) == ("3.1", "11", 2)
    assert (one.question, one.answer, one.cited) == ("Which kinase does exercise switch on?", "AMPK", ("7",))
    assert one.hops == [{"queries": ["metformin kinase"], "pmids": ["7", "8"]}]
    assert one.sources == {"11", "7", "8"}
    assert "Metformin lowers glucose." in one.evidence
    assert "It activates AMPK." in one.evidence
    assert one.grounded
    assert objection(one, set()) == ""
    assert objection(one, {"8"}) == "evaluation_paper"
    assert not read_candidate(WRITTEN | {"turns": [WRITTEN["turns"][1].replace("AMPK", "mTOR")]}).grounded


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ("", "malformed"),
        ("<question>Which kinase?</question>", "malformed"),
        ("<answer>AMPK</answer>", "malformed"),
        ("<question>Which kinase?</question><answer> </answer>", "malformed"),
        ("<question>Is AMPK a kinase?</question><answer>AMPK</answer>", "malformed"),
        ("<question>Lack of which vitamin causes the scurvy?</question><answer>AMPK</answer>", "malformed"),
        ("<question>Which kinase?</question><answer>AMPK</answer>", ""),
    ],
)
def test_a_candidate_that_is_no_question_is_not_worth_checking(last: str, reason: str) -> None:
    assert objection(read_candidate(WRITTEN | {"turns": [last]}), set()) == reason


@given(st.lists(st.text('<>/questionanswer thk?"{}', max_size=80), max_size=3))
def test_no_text_of_a_model_is_too_odd_to_read(turns: list[str]) -> None:
    one = read_candidate(WRITTEN | {"turns": turns})
    assert objection(one, {"11"}) in ("malformed", "evaluation_paper")


# --- the whole stage

QUESTION_PAPERS = {"11": "zinc", "12": "copper", "13": "iron", "14": "selenium"}


def made_run(folder: Path, url: str, **changes: Any) -> tuple[Settings, str]:
    """Settings of a run whose proposer is trained and whose question papers are drawn, and its weights."""
    given = {"trainer__questions__candidates": 2, "trainer__questions__tries": 2, "trainer__questions__papers": 4}
    settings = settings_at(folder, url, **given, trainer__questions__held_out_share=0.25, **changes)
    paths = run_paths(settings)
    proposer = publish_weights_at(paths.weights, "proposer")
    publish_files(paths.index, {"x": "index"})
    with publish(paths.seeds, settings={}, made_from={"test": "seeds"}) as draft:
        rows = [
            {"prompt": [{"role": "user", "content": f"Paper {pmid} on {metal}."}],
             "extra_info": {"index": index, "pmid": pmid, "hop": 1 + index % 2, "document": f"It holds {metal}."}}
            for index, (pmid, metal) in enumerate(QUESTION_PAPERS.items())
        ]  # fmt: skip
        write_rows(rows, draft.path / FILE)
    return settings, proposer


def proposes(body: dict[str, Any]) -> str:
    """A question about each paper, the same in each of its candidates."""
    metal = body["messages"][0]["content"].split()[-1].strip(".")
    asked = f"Which metal did the {metal[::-1] * 5} trial measure?"
    return f"<think>I ask.</think><question>{asked}</question><answer>{metal}</answer>"


def solves(body: dict[str, Any]) -> str:
    """The answer when it reads it."""
    text = body["messages"][-1]["content"]
    return next((f"<answer>{m}</answer>" for m in QUESTION_PAPERS.values() if m in text), "<answer>?</answer>")


def run_stage(settings: Settings) -> None:
    make_questions(settings, run_paths(settings), structlog.get_logger())


def test_the_stage_writes_verified_questions_and_makes_them_once(tmp_path: Path) -> None:
    settings, proposer = made_run(tmp_path, "http://127.0.0.1:1")
    base = settings.solver.model
    with world_of({proposer: proposes, base: solves}, model=base) as world:
        settings = changed(settings, {"solver.url": world.url, "retrieval.url": world.url})
        run_stage(settings)
        asked = len(world.chats)
        run_stage(settings)
        assert len(world.chats) == asked
    assert world.loaded == [proposer, base]
    assert Counter(model for model, _ in world.chats) == {proposer: 8, base: 8 * 2 * 2}
    paths = run_paths(settings)
    rows, rejected = read_rows(paths.questions / FILE), (paths.questions / "rejected.jsonl").read_text().splitlines()
    assert [row["id"] for row in rows] == ["0.0", "1.0", "2.0", "3.0"]
    assert [row["answer"] for row in rows] == list(QUESTION_PAPERS.values())
    assert Counter(row["split"] for row in rows) == {TRAIN: 3, HELD_OUT: 1}
    assert {(row["right_with_evidence"], row["right_without"], row["tries"]) for row in rows} == {(2, 0, 2)}
    assert {json.loads(line)["reason"] for line in rejected} == {"duplicate"}
    assert read_manifest(paths.questions).counts == {
        "candidates": 8, "train": 3, "held_out": 1, "rejected_duplicate": 4,
    }  # fmt: skip


@pytest.mark.parametrize(("enough", "papers"), [(0, 4), (1, 1), (2, 2), (9, 4)])
def test_enough_papers_with_a_sound_candidate_end_the_writing(tmp_path: Path, enough: int, papers: int) -> None:
    changes = {"trainer__questions__enough": enough, "trainer__reward__concurrency": 2}  # a paper at a time
    settings, proposer = made_run(tmp_path, "http://127.0.0.1:1", **changes)
    base = settings.solver.model
    with world_of({proposer: proposes, base: solves}, model=base) as world:
        run_stage(changed(settings, {"solver.url": world.url, "retrieval.url": world.url}))
    assert read_manifest(run_paths(settings).questions).counts["candidates"] == papers * 2


def test_a_question_about_an_evaluation_paper_is_neither_checked_nor_kept(tmp_path: Path) -> None:
    settings, proposer = made_run(tmp_path, "http://127.0.0.1:1")
    barred = tmp_path / "barred.txt"
    barred.write_text("12\n")
    with world_of({proposer: proposes, settings.solver.model: solves}, model=proposer) as world:
        addresses = {"solver.url": world.url, "retrieval.url": world.url}
        settings = changed(settings, addresses | {"trainer.exclude_pmids": (barred,)})
        run_stage(settings)
    assert not any("reppoc" in body["messages"][-1]["content"] for body in world.bodies)
    assert [row["pmid"] for row in read_rows(run_paths(settings).questions / FILE)] == ["11", "13", "14"]


def test_a_killed_stage_goes_on_and_makes_the_same_questions(tmp_path: Path) -> None:
    def fails_once(body: dict[str, Any]) -> Any:
        if not broken:
            broken.append(True)
            return 500, {"detail": "defect"}
        return solves(body)

    broken: list[bool] = []
    found = []
    for name, says in (("a", fails_once), ("b", solves)):
        settings, proposer = made_run(tmp_path / name, "http://127.0.0.1:1")
        base = settings.solver.model
        with world_of({proposer: proposes, base: says}, model=base) as world:
            settings = changed(settings, {"solver.url": world.url, "retrieval.url": world.url})
            if name == "a":
                with pytest.raises(Unavailable):
                    run_stage(settings)
                assert world.model == base
            run_stage(settings)
            assert sum(model == proposer for model, _ in world.chats) == 8
        found.append(read_rows(run_paths(settings).questions / FILE))
    assert found[0] == found[1]


def test_a_proposer_that_writes_nothing_of_use_leaves_an_artifact_without_rows(tmp_path: Path) -> None:
    settings, _ = made_run(tmp_path, "http://127.0.0.1:1")
    with world_of(lambda _: "<think>I do not know.</think>") as world:
        settings = changed(settings, {"solver.url": world.url, "retrieval.url": world.url})
        run_stage(settings)
    paths = run_paths(settings)
    assert read_rows(paths.questions / FILE) == []
    counts = {"candidates": 8, "train": 0, "held_out": 0, "rejected_malformed": 8}
    assert read_manifest(paths.questions).counts == counts
