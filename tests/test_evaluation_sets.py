"""Evaluation sets: three forms are read as they are, and a file of none of them is refused by name."""

import gzip
import json
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.evaluation_sets import Item, evaluation_items, own_items, read_set, require_usable
from services.trainer.exam import chosen
from shared.command import UsageError
from shared.settings import EvaluationSettings

PUBMEDQA: dict[str, dict[str, Any]] = {
    "11": {"QUESTION": "Does it work?", "final_decision": "yes", "CONTEXTS": ["…"], "LONG_ANSWER": "It does."},
    "12": {"QUESTION": "Is it safe?", "final_decision": "maybe"},
}
BIOASQ: dict[str, list[dict[str, Any]]] = {
    "questions": [
        {
            "id": "a",
            "body": "Is it a kinase?",
            "type": "yesno",
            "exact_answer": "Yes",
            "documents": ["http://www.ncbi.nlm.nih.gov/pubmed/101", "https://pubmed.ncbi.nlm.nih.gov/0102/"],
            "snippets": [
                {"document": "http://www.ncbi.nlm.nih.gov/pubmed/101", "text": "…"},
                {"document": "http://www.ncbi.nlm.nih.gov/pubmed/103", "text": "…"},
                {"document": "http://www.ncbi.nlm.nih.gov/pmc/articles/PMC104", "text": "…"},
            ],
        },
        {"id": "b", "body": "Which gene?", "type": "factoid", "exact_answer": [["TP53", "p53"], ["MDM2"]]},
        {
            "id": "c",
            "body": "Which drug?",
            "type": "factoid",
            "exact_answer": ["metformin"],
            "documents": ["http://www.ncbi.nlm.nih.gov/pubmed/105"],
        },
        {"id": "d", "body": "Which organ?", "type": "factoid", "exact_answer": "liver"},
        {"id": "e", "body": "List them.", "type": "list", "exact_answer": [["x"]]},
        {"id": "f", "body": "Tell of it.", "type": "summary", "ideal_answer": ["…"]},
        {"id": "g", "body": "Is it known?", "type": "yesno", "exact_answer": ["no"]},
        {"id": "h", "body": "Unanswered yet?", "type": "yesno"},
    ]
}
OWN: list[dict[str, Any]] = [
    {"question": "Which\u2028vitamin?", "answers": ["vitamin C", "ascorbic acid"]},
    {"id": 0, "question": "Up or down?", "answers": ["up"], "choices": ["up", "down"], "pmid": 31},
    {"id": None, "question": "Which hormone?", "answers": ["insulin"], "choices": None, "pmid": None},
]
REAL = Path(__file__).parents[2] / "shared/data/pubmedqa"


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def file_of(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def read(*paths: Path) -> list[Item]:
    return evaluation_items(EvaluationSettings(sets=paths))


# --- the three forms


@pytest.mark.parametrize("name", ["ori.json", "ori.json.gz"])
def test_pubmedqa_is_read_plain_and_packed(tmp_path: Path, name: str) -> None:
    choices = ("yes", "no", "maybe")
    assert read(file_of(tmp_path, name, json.dumps(PUBMEDQA))) == [
        Item("ori", "11", "Does it work?", ("yes",), choices, ("11",)),
        Item("ori", "12", "Is it safe?", ("maybe",), choices, ("12",)),
    ]


@pytest.mark.parametrize("name", ["task11b.json", "task11b.json.gz"])
def test_of_bioasq_the_questions_with_one_short_answer_are_read(tmp_path: Path, name: str) -> None:
    assert read(file_of(tmp_path, name, json.dumps(BIOASQ))) == [
        Item("task11b", "a", "Is it a kinase?", ("yes",), ("yes", "no"), ("101", "102", "103")),
        Item("task11b", "b", "Which gene?", ("TP53", "p53", "MDM2")),
        Item("task11b", "c", "Which drug?", ("metformin",), papers=("105",)),
        Item("task11b", "d", "Which organ?", ("liver",)),
        Item("task11b", "g", "Is it known?", ("no",), ("yes", "no")),
    ]


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_lines_of_ones_own_are_read_and_what_they_leave_out_has_a_default(tmp_path: Path, name: str) -> None:
    expected = [
        Item("mine", "1", "Which\u2028vitamin?", ("vitamin C", "ascorbic acid")),
        Item("mine", "0", "Up or down?", ("up",), ("up", "down"), ("31",)),
        Item("mine", "3", "Which hormone?", ("insulin",)),
    ]
    assert read(file_of(tmp_path, name, lines(OWN))) == expected
    windows = "\ufeff" + lines(OWN).replace("\n", "\r\n\r\n")
    assert read(file_of(tmp_path, f"w-{name}", windows)) == [replace(one, set_name="w-mine") for one in expected]


def test_one_line_alone_is_a_set_of_one_question(tmp_path: Path) -> None:
    [item] = read(file_of(tmp_path, "one.jsonl", lines(OWN[:1])))
    assert item.answers == ("vitamin C", "ascorbic acid")


def test_sets_follow_each_other_in_the_order_of_the_setting(tmp_path: Path) -> None:
    first, second = file_of(tmp_path, "z.jsonl", lines(OWN)), file_of(tmp_path, "a.json", json.dumps(PUBMEDQA))
    assert [item.set_name for item in read(first, second)] == ["z"] * 3 + ["a"] * 2
    assert read() == []


@pytest.mark.skipif(not REAL.is_dir(), reason="PubMedQA is not at hand")
def test_the_real_pubmedqa_is_read_whole() -> None:
    items = read(REAL / "ori_pqal.json.gz")
    assert Counter(item.answers[0] for item in items) == {"yes": 552, "no": 338, "maybe": 110}
    assert len({item.id for item in items}) == len(items) == 1000
    assert all(item.papers == (item.id,) and item.id.isdecimal() and item.question.strip() for item in items)


@pytest.mark.skipif(not REAL.is_dir(), reason="PubMedQA is not at hand")
def test_pubmedqas_list_of_answers_is_no_set() -> None:
    with pytest.raises(UsageError, match=r"test_ground_truth\.json\.gz"):
        read(REAL / "test_ground_truth.json.gz")


@given(
    st.lists(
        st.fixed_dictionaries(
            {"question": st.text('ab? é\u2028\u0085"\\\n', min_size=1).filter(str.strip)},
            optional={"pmid": st.integers(1, 99), "choices": st.just(["up", "down"])},
        ),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_written_as_own_lines_is_read_again(rows: list[dict[str, Any]]) -> None:
    given = [row | {"answers": ["up"], "id": f"q{number}"} for number, row in enumerate(rows)]
    items = list(own_items([json.loads(line) for line in lines(given).split("\n") if line], "own"))
    require_usable(items)
    assert [(one.id, one.question, list(one.choices), list(one.papers)) for one in items] == [
        (row["id"], row["question"], row.get("choices", []), [str(row["pmid"])] if "pmid" in row else [])
        for row in given
    ]


# --- files of no use


def own(**changes: Any) -> str:
    return lines([{"question": "Which?", "answers": ["a gene"]} | changes])


def pubmedqa(**changes: Any) -> str:
    return json.dumps({"11": PUBMEDQA["11"] | changes})


def bioasq(**changes: Any) -> str:
    return json.dumps({"questions": [BIOASQ["questions"][0] | changes]})


WRONG: dict[str, str | bytes] = {
    "prose": "What is this?",
    "binary": b"\xff\xfe\x00\x01",
    "a number": "7",
    "a list": json.dumps([OWN[0]]),
    "lines that are no objects": '"a"\n"b"\n',
    "a line cut off": lines(OWN)[:-20],
    "an answer that is no list": own(answers="aspirin"),
    "no answers": own(answers=[]),
    "no answers at all": lines([{"question": "Which?"}]),
    "an empty answer": own(answers=[" "]),
    "an answer that is no text": own(answers=[7]),
    "no question": own(question=""),
    "a question that is no text": own(question=None),
    "an answer outside its choices": own(choices=["up", "down"], answers=["left"]),
    "two answers among choices": own(choices=["up", "down"], answers=["up", "down"]),
    "choices that are no list": own(choices="up", answers=["u"]),
    "choices that are the same": own(choices=["The up", "up"], answers=["up"]),
    "a choice that is an article": own(choices=["A", "B"], answers=["B"]),
    "an id twice": lines([OWN[0] | {"id": 5}, OWN[2] | {"id": "5"}]),
    "an unknown decision": pubmedqa(final_decision="perhaps"),
    "no decision": json.dumps({"11": {"QUESTION": "Does it work?"}}),
    "an empty question of PubMedQA": pubmedqa(QUESTION=""),
    "decisions alone": json.dumps({"11": "yes"}),
    "another JSON": json.dumps({"version": 3}),
    "a yes-no question answered otherwise": bioasq(exact_answer="perhaps"),
    "a BioASQ question without a type": json.dumps({"questions": [{"id": "a", "body": "Which?"}]}),
    "a BioASQ question without a body": bioasq(body=None),
    "documents that are no addresses": bioasq(documents=[7]),
    "a snippet without its document": bioasq(snippets=[{"text": "…"}]),
    "synonyms that are no text": bioasq(type="factoid", exact_answer=[[None]]),
}
EMPTY = {"nothing": "", "blank lines": "\n \n", "no records": "{}", "no questions": '{"questions": []}',
         "lists alone": json.dumps({"questions": BIOASQ["questions"][4:6]})}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["wrong.json", "wrong.json.gz"])
def test_a_wrong_file_is_refused_with_its_name_and_its_variable(tmp_path: Path, kind: str, name: str) -> None:
    path = file_of(tmp_path, name, WRONG[kind])
    with pytest.raises(UsageError) as refused:
        read(path)
    assert f"expected {path} of DRZERO_TRAINER__EVALUATION__SETS" in str(refused.value)
    assert "found something else" in str(refused.value)


@pytest.mark.parametrize("kind", EMPTY)
def test_a_file_without_questions_is_refused(tmp_path: Path, kind: str) -> None:
    path = file_of(tmp_path, "empty.json", EMPTY[kind])
    with pytest.raises(UsageError, match=r"expected questions in .*empty\.json of DRZERO.*found none"):
        read(path)


@pytest.mark.parametrize("data", [b"", b"plain", gzip.compress(b"{}")[:-6], zlib.compress(b"{}")])
def test_a_damaged_gz_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "damaged.json.gz"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"damaged\.json\.gz"):
        read(path)


def test_a_gz_with_changed_bytes_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(PUBMEDQA).encode(), mtime=0)
    for place in range(10, len(whole) - 8, 7):
        path = tmp_path / f"changed-{place}.json.gz"
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(UsageError, match=path.name):
            read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected the file .*gone\.json of DRZERO_TRAINER__EVALUATION__SETS"):
        read(tmp_path / "gone.json")


@pytest.mark.parametrize(
    "names", [("a/set.json", "b/set.json.gz"), ("a/set.json", "a/set.json"), ("kept_out.jsonl",), ("safety.json",)]
)
def test_two_sets_of_one_name_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        file_of(tmp_path, name, json.dumps(PUBMEDQA))
    with pytest.raises(UsageError, match="a name of its own"):
        read(*(tmp_path / name for name in names))


# --- choices


def test_a_choice_is_what_the_answer_is_or_begins_with() -> None:
    choices = ("yes", "no", "maybe")
    assert chosen("Yes, it does.", choices) == "yes"
    assert chosen("No", choices) == "no"
    assert chosen("nothing of it", choices) == chosen("", choices) == chosen("It may be", choices) == ""
    assert chosen("Type 1 diabetes", ("type 1", "type 1 diabetes")) == "type 1 diabetes"


def test_a_set_is_read_once(tmp_path: Path) -> None:
    path = file_of(tmp_path, "ori.json", json.dumps(PUBMEDQA))
    first = read_set(path)
    path.unlink()
    path.write_text("gone")
    assert read_set(path) is first
