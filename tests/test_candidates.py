"""Candidates and their verification through live services: what is asked, what comes back, and what faults cost."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from model_services import BUSY, CRASH, HANG, HANGS_UP, LOADING, Fault, Reply, chat_reply, slowly
from round_world import World, settings_at, world_of

from services.trainer.attempts import solver_manner
from services.trainer.candidates import check_candidates, proposer_manner, write_candidates
from services.trainer.journal import Row
from services.trainer.protocol import GUIDED_CALL, SEARCH_TOOL, alone_messages, last_turn_note
from services.trainer.reward import attempt_seeds
from shared.clients import Overdue, ServiceError
from shared.settings import Settings, changed

SEEDS: list[Row] = [
    {
        "prompt": [
            {"role": "system", "content": "You ask."},
            {"role": "user", "content": f"Paper {pmid}, {hop} hops."},
        ],
        "extra_info": {"index": index, "pmid": pmid, "hop": hop, "document": f"Document {pmid}."},
    }
    for index, (pmid, hop) in enumerate([("11", 1), ("12", 2), ("13", 3)])
]
WANTED: list[Row] = [
    {"name": f"{number}.0", "question": f"Which metal is {number}?", "evidence": f"Evidence {number} is zinc. " * 5}
    for number in range(3)
]


def call_for(*queries: str) -> str:
    """A turn that searches."""
    call = {"name": "search", "arguments": {"query_list": list(queries)}}
    return f"<think>I search.</think><tool_call>{json.dumps(call)}</tool_call>"


def settings_for(folder: Path, **changes: Any) -> Settings:
    given = {"trainer__questions__candidates": 3, "trainer__questions__tries": 2, "trainer__guided_tool_call": True}
    return settings_at(folder, **{**given, "trainer__max_turns": 3, "trainer__search_top_k": 2, **changes})


def at(settings: Settings, world: World) -> Settings:
    return changed(settings, {"solver.url": world.url, "retrieval.url": world.url})


def write(settings: Settings, world: World, file: Path) -> list[Row]:
    file.parent.mkdir(parents=True, exist_ok=True)
    return asyncio.run(write_candidates(at(settings, world), SEEDS, file, never))


def never(_: object) -> bool:
    return False


def verify(settings: Settings, world: World, file: Path) -> list[Row]:
    file.parent.mkdir(parents=True, exist_ok=True)
    return asyncio.run(check_candidates(at(settings, world), WANTED, file))


def turn_of(body: dict[str, Any]) -> int:
    """Which turn of its conversation a request asks for, from 1; searches come between turns."""
    return 1 + [message["role"] for message in body["messages"]].count("tool")


def proposes(body: dict[str, Any]) -> str:
    """Searches once where the paper wants hops, then asks; each seed in its own words."""
    if turn_of(body) == 1 and "1 hops" not in body["messages"][1]["content"]:
        return call_for(f"query {body['seed']}")
    return f"<question>Which of {body['seed']}?</question><answer>AMPK</answer>"


def solves(body: dict[str, Any]) -> str:
    """An answer that shows what was asked with which seed."""
    told = "told" if "Evidence" in body["messages"][-1]["content"] else "untold"
    return f"<think>So.</think><answer>{told} {body['seed']}</answer>"


# --- the proposer's candidates


def test_each_paper_gets_its_candidates_with_seeds_of_their_own(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with world_of(proposes) as world:
        rows = write(settings, world, tmp_path / "c.jsonl")
    assert [row["name"] for row in rows] == [f"{paper}.{number}" for paper in range(3) for number in range(3)]
    assert [(row["pmid"], row["hop"], row["document"]) for row in rows[::3]] == [
        (seed["extra_info"]["pmid"], seed["extra_info"]["hop"], seed["extra_info"]["document"]) for seed in SEEDS
    ]
    # One turn for the paper of one hop, two with a search between them for the others.
    assert [len(row["turns"]) for row in rows] == [1] * 3 + [2] * 6
    assert Counter(turn_of(body) for body in world.bodies) == {1: 9, 2: 6}
    assert len(world.searches) == 6
    seeds = {pmid: attempt_seeds(42, 1, pmid, 3) for pmid in ("11", "12", "13")}
    assert {body["seed"] for body in world.bodies} == {seed for drawn in seeds.values() for seed in drawn}
    for row in rows:
        seed = seeds[row["pmid"]][int(row["name"][-1])]
        assert f"Which of {seed}?" in row["turns"][-1]
        assert [s["queries"] for s in row["searches"]] == ([[f"query {seed}"]] if row["hop"] > 1 else [])
        assert all(search["pmids"] == ["7"] and "PMID 7:" in search["text"] for search in row["searches"])


def test_no_further_papers_are_asked_about_when_there_is_enough_and_a_second_run_asks_nothing(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__reward__concurrency=4)  # two papers' candidates at once
    seen: list[int] = []

    def first(rows: Sequence[Row]) -> bool:
        seen.append(len(rows))
        return True

    with world_of(proposes) as world:
        runs = [
            asyncio.run(write_candidates(at(settings, world), SEEDS, tmp_path / "c.jsonl", first)) for _ in range(2)
        ]
    assert [row["pmid"] for row in runs[0]] == ["11"] * 3 + ["12"] * 3
    assert runs[0] == runs[1]
    assert seen == [6, 6]
    assert Counter(turn_of(body) for body in world.bodies) == {1: 6, 2: 3}


def test_another_round_and_another_run_draw_other_seeds(tmp_path: Path) -> None:
    drawn: list[set[int]] = []
    for changes in ({}, {"trainer__round": 2}, {"trainer__seed": 7}):
        with world_of(proposes) as world:
            write(settings_for(tmp_path, **changes), world, tmp_path / str(len(drawn)) / "c.jsonl")
        drawn.append({body["seed"] for body in world.bodies})
    assert not drawn[0] & drawn[1]
    assert not drawn[0] & drawn[2]


def test_only_the_first_turn_of_more_than_one_hop_is_guided(tmp_path: Path) -> None:
    for name, guided in (("guided", True), ("free", False)):
        with world_of(proposes) as world:
            write(settings_for(tmp_path, trainer__guided_tool_call=guided), world, tmp_path / name / "c.jsonl")
        for body in world.bodies:
            several = "1 hops" not in body["messages"][1]["content"]
            assert ("regex" in body) == (guided and several and turn_of(body) == 1)
            assert body.get("regex", GUIDED_CALL) == GUIDED_CALL
            assert body["tools"] == [SEARCH_TOOL]


def test_a_proposer_is_asked_as_in_its_training(tmp_path: Path) -> None:
    changes = {"trainer__temperature": 0.7, "trainer__turn_tokens": 321, "trainer__max_tool_tokens": 12}
    settings = settings_for(tmp_path, **changes)
    with world_of(proposes) as world:
        rows = write(settings, world, tmp_path / "c.jsonl")
    for body in world.bodies:
        assert body["model"] == settings.solver.served_name
        assert (body["temperature"], body["max_tokens"]) == (0.7, 321)
        assert body["messages"][:2] == SEEDS[int(body["messages"][1]["content"].split()[1].strip(",")) - 11]["prompt"]
    assert {body["top_k"] for body in world.searches} == {2}
    assert all(len(search["text"].split()) <= 12 for row in rows for search in row["searches"])


def test_a_proposer_that_goes_on_searching_has_as_many_turns_as_allowed(tmp_path: Path) -> None:
    with world_of(lambda body: call_for(f"turn {turn_of(body)}")) as world:
        rows = write(settings_for(tmp_path), world, tmp_path / "c.jsonl")
    assert all((len(row["turns"]), len(row["searches"])) == (3, 2) for row in rows)
    last = [body["messages"][-1]["content"] for body in world.bodies if turn_of(body) == 3]
    assert all(text.endswith(last_turn_note("proposer")) for text in last)
    assert len(last) == 9
    assert not any(
        last_turn_note("proposer") in message["content"]
        for body in world.bodies if turn_of(body) == 2 for message in body["messages"]
    )  # fmt: skip


def test_a_conversation_that_outgrows_the_context_ends_as_it_is(tmp_path: Path) -> None:
    def too_long(body: dict[str, Any]) -> str | Reply:
        words = {"error": {"message": "3500 prompt tokens and 512 new ones exceed the context of 3072"}}
        return proposes(body) if turn_of(body) == 1 else (400, words)

    with world_of(too_long) as world:
        rows = write(settings_for(tmp_path), world, tmp_path / "c.jsonl")
    assert [len(row["turns"]) for row in rows] == [1] * 9
    assert [len(row["searches"]) for row in rows] == [0] * 3 + [1] * 6


# --- the solver's verification


def test_a_candidate_is_answered_as_often_with_evidence_as_without_and_never_with_the_search(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__reward__temperature=0.9, trainer__reward__max_new_tokens=77)
    with world_of(solves) as world:
        rows = verify(settings, world, tmp_path / "k.jsonl")
    assert [row["name"] for row in rows] == [row["name"] for row in WANTED]
    for row, wanted in zip(rows, WANTED, strict=True):
        seeds = attempt_seeds(42, 1, wanted["question"], 2)
        assert row["with_evidence"] == [f"told {seed}" for seed in seeds]
        assert row["without"] == [f"untold {seed}" for seed in seeds]
    assert (len(world.chats), world.searches) == (3 * 2 * 2, [])
    for body in world.bodies:
        assert "tools" not in body
        assert "regex" not in body
        assert (body["temperature"], body["max_tokens"]) == (0.9, 77)
        assert body["model"] == settings.solver.served_name


@pytest.mark.parametrize("examples", [0, 1, 2])
@pytest.mark.parametrize("prompts", ["full-v1", "short-v1"])
def test_the_solver_reads_the_question_and_with_evidence_the_evidence_and_no_word_of_a_search(
    tmp_path: Path, prompts: str, examples: int
) -> None:
    changes = {"trainer__prompts": prompts, "trainer__reward__worked_examples": examples}
    with world_of(solves) as world:
        verify(settings_for(tmp_path, **changes), world, tmp_path / "k.jsonl")
    for row in WANTED:
        asked = [body["messages"] for body in world.bodies if row["question"] in body["messages"][-1]["content"]]
        evidence = row["evidence"]
        expected = [alone_messages(row["question"], prompts, examples, evidence=text) for text in (evidence, "")]
        assert sorted(map(json.dumps, asked)) == sorted(map(json.dumps, expected * 2))
    for body in world.bodies:
        said = " ".join(message["content"] for message in body["messages"])
        assert "tool_call" not in said
        assert not re.search(r"\bsearch", said, re.IGNORECASE)


def test_evidence_is_cut_to_its_tokens(tmp_path: Path) -> None:
    with world_of(solves) as world:
        verify(settings_for(tmp_path, trainer__questions__evidence_tokens=7), world, tmp_path / "k.jsonl")
    told = [body["messages"][-1]["content"] for body in world.bodies if "Evidence" in body["messages"][-1]["content"]]
    assert len(told) == 6
    assert {text.count("Evidence") for text in told} == {2}  # four words each


def test_an_answer_that_searches_or_says_nothing_counts_as_none(tmp_path: Path) -> None:
    said = iter([call_for("zinc"), "", "<answer>", "<answer></answer>"] * 3)
    with world_of(lambda _: next(said)) as world:
        rows = verify(settings_for(tmp_path, trainer__reward__concurrency=1), world, tmp_path / "k.jsonl")
    assert all(row["with_evidence"] == row["without"] == ["", ""] for row in rows)
    assert (len(world.chats), world.searches) == (12, [])


def test_nothing_to_check_asks_nothing(tmp_path: Path) -> None:
    with world_of(solves) as world:
        settings = at(settings_for(tmp_path), world)
        assert asyncio.run(check_candidates(settings, [], tmp_path / "k.jsonl")) == []
        assert asyncio.run(write_candidates(settings, [], tmp_path / "c.jsonl", never)) == []
    assert world.chats == []


# --- faults, resuming, order


@pytest.mark.parametrize("fault", [CRASH, Fault(404), (400, {"error": {"message": "no such field"}})])
def test_a_service_that_fails_for_good_ends_the_stage_and_a_second_run_asks_only_for_what_is_missing(
    tmp_path: Path, fault: Fault | Reply
) -> None:
    settings = settings_for(tmp_path, trainer__reward__concurrency=1)
    for work, says, name in ((write, proposes, "c.jsonl"), (verify, solves, "k.jsonl")):
        with world_of(says) as world:
            whole = work(settings, world, tmp_path / "whole" / name)
        asked = len(world.chats)
        left = [asked - 3]

        def breaks_down(body: dict[str, Any], says: Any = says, left: list[int] = left) -> Any:
            left[0] -= 1
            return says(body) if left[0] >= 0 else fault

        with world_of(breaks_down) as world, pytest.raises(ServiceError):
            work(settings, world, tmp_path / name)
        done = [json.loads(line)["name"] for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert done == [row["name"] for row in whole[: len(done)]]
        assert 0 < len(done) < len(whole)
        with world_of(says) as world:
            assert work(settings, world, tmp_path / name) == whole
            missing = whole[len(done) :]
            assert len(world.chats) == sum(len(row.get("turns", [1] * 4)) for row in missing)
        with world_of(says) as world:
            assert work(settings, world, tmp_path / name) == whole
            assert world.chats == []


def test_a_search_that_fails_for_good_ends_the_stage(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__patience_s=0.3, trainer__rollout_deadline_s=0.5)
    with world_of(proposes) as world:
        given = changed(settings, {"solver.url": world.url})  # nobody listens where the search should be
        with pytest.raises(ServiceError, match="retrieval"):
            asyncio.run(write_candidates(given, SEEDS, tmp_path / "c.jsonl", never))


def test_a_conversation_that_outlasts_its_deadline_ends_as_it_is_and_the_others_go_on(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__rollout_deadline_s=0.8, trainer__questions__candidates=1)

    def hangs(body: dict[str, Any]) -> str | Fault:
        if len(body["messages"]) == 1:  # whether it still works
            return "?"
        return HANG if turn_of(body) == 2 and "3 hops" in body["messages"][1]["content"] else proposes(body)

    with world_of(hangs) as world:
        rows = write(settings, world, tmp_path / "c.jsonl")
    assert [len(row["turns"]) for row in rows] == [1, 2, 1]
    assert "<question>" in rows[1]["turns"][-1]
    assert "<question>" not in rows[2]["turns"][-1]


def test_a_check_that_outlasts_its_deadline_counts_as_no_answer(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__rollout_deadline_s=0.5, trainer__questions__tries=1)

    def hangs(body: dict[str, Any]) -> str | Fault:
        if len(body["messages"]) == 1:  # whether it still works
            return "?"
        return HANG if "Evidence 1" in body["messages"][-1]["content"] else solves(body)

    with world_of(hangs) as world:
        rows = verify(settings, world, tmp_path / "k.jsonl")
    assert [row["with_evidence"] == [""] for row in rows] == [False, True, False]
    assert all(row["without"][0].startswith("untold") for row in rows)


def test_a_solver_that_hangs_for_good_ends_the_stage(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, trainer__rollout_deadline_s=0.3, trainer__patience_s=0.3)
    with world_of(lambda _: HANG) as world, pytest.raises(Overdue, match="solver"):
        write(settings, world, tmp_path / "c.jsonl")
    assert (tmp_path / "c.jsonl").read_text(encoding="utf-8") == ""


def test_faults_that_pass_change_nothing(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    with world_of(proposes) as world:
        calm = write(settings, world, tmp_path / "calm" / "c.jsonl")
    struck: set[str] = set()

    def stormy(body: dict[str, Any]) -> str | Fault:
        key = json.dumps(body)
        if key in struck:
            return proposes(body)
        struck.add(key)
        return (BUSY, LOADING, HANGS_UP)[len(struck) % 3]

    with world_of(stormy) as world:
        assert write(settings, world, tmp_path / "stormy" / "c.jsonl") == calm
    assert len(struck) == 15


@hypothesis_settings(max_examples=8, deadline=None)
@given(delays=st.lists(st.sampled_from([0.0, 0.01, 0.04]), min_size=5, max_size=5), places=st.sampled_from([1, 2, 64]))
def test_results_do_not_depend_on_the_order_of_replies(
    tmp_path_factory: pytest.TempPathFactory, delays: list[float], places: int
) -> None:
    folder = tmp_path_factory.mktemp("order")
    settings = settings_for(folder, trainer__reward__concurrency=places)

    def late(body: dict[str, Any]) -> Fault:
        return slowly(chat_reply(proposes(body)), delays[body["seed"] % len(delays)])

    with world_of(proposes) as world:
        at_once = write(settings, world, folder / "a" / "c.jsonl")
    with world_of(late) as world:
        assert write(settings, world, folder / "b" / "c.jsonl") == at_once


def test_no_more_conversations_are_held_at_once_than_allowed(tmp_path: Path) -> None:
    with world_of(lambda body: slowly(chat_reply(proposes(body)), 0.02)) as world:
        write(settings_for(tmp_path, trainer__reward__concurrency=2), world, tmp_path / "c.jsonl")
    assert world.peak == 2


def test_the_manner_of_the_proposer_is_that_of_its_training(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    one, two = proposer_manner(settings, 1), proposer_manner(settings, 2)
    assert replace(two, first_regex="", done=one.done) == one
    assert (one.first_regex, two.first_regex) == ("", GUIDED_CALL)
    assert not two.done("<question>Which?</question><answer>AMPK</answer>")
    assert solver_manner(settings).done("<answer>AMPK</answer>")
