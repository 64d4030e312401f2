"""Seeds: who may be one, exact hops in every batch, prompts that fit as verl builds them, the same bytes again."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import structlog
from corpora import publish_corpus
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_tokenizer

from services.trainer.fitting import FittedSeed, fit_prompts, load_tokenizer, longest_fit, prompt_lengths, prompt_of
from services.trainer.paths import RunPaths
from services.trainer.protocol import SEARCH_TOOL
from services.trainer.seeds import (
    barred_pmids,
    draw_rows,
    draw_seeds,
    make_seeds,
    qualifying_rows,
    seed_row,
    spread_hops,
    write_rows,
)
from shared.command import UsageError
from shared.files import read_manifest
from shared.model_files import CHAT_TEMPLATE
from shared.pmids import read_pmids
from shared.records import Paper, Seed
from shared.settings import EvaluationSettings, QuestionSettings, TrainerSettings, build_settings

NUMBERS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
PAPERS = [Paper(str(n), f"Paper {NUMBERS[n % 10]} {NUMBERS[n // 10]}", "word " * (20 + n)) for n in range(100) if n]
SETTINGS = TrainerSettings(
    seeds=40, eval_seeds=10, prompts_per_step=4, min_abstract_words=30, questions=QuestionSettings(papers=15)
)
NO_FILTER = TrainerSettings(min_abstract_words=0)
NONE: frozenset[str] = frozenset()
ROOT = Path(__file__).parents[1]

VARIABLE = "DRZERO_TRAINER__EXCLUDE_PMIDS"


# --- hops


@pytest.mark.parametrize(
    ("count", "expected"),
    [(10, [4, 3, 2, 1]), (100, [40, 30, 20, 10]), (7, [3, 2, 1, 1]), (1, [1, 0, 0, 0]), (0, [0] * 4)],
)
def test_hops_follow_the_ratio_exactly(count: int, expected: list[int]) -> None:
    hops = spread_hops(count, (4, 3, 2, 1), 10)
    assert [hops.count(hop) for hop in (1, 2, 3, 4)] == expected


@given(
    count=st.integers(0, 300),
    batch=st.integers(1, 80),
    ratio=st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any),
)
def test_every_batch_has_each_hops_share_to_within_one(count: int, batch: int, ratio: list[int]) -> None:
    hops, total = spread_hops(count, ratio, batch), sum(ratio)
    assert len(hops) == count
    for start in range(0, count, batch):
        part = hops[start : start + batch]
        for hop, weight in enumerate(ratio, start=1):
            assert abs(part.count(hop) - len(part) * weight / total) < 1


@given(count=st.integers(0, 300), batch=st.integers(1, 80), ratio=st.permutations([4, 3, 2, 1, 0]))
def test_batches_change_the_order_of_hops_and_not_their_number(count: int, batch: int, ratio: list[int]) -> None:
    assert sorted(spread_hops(count, ratio, batch)) == sorted(spread_hops(count, ratio, max(count, 1)))


def test_seeds_are_not_all_of_one_hop() -> None:
    draw = draw_seeds(PAPERS, SETTINGS, NONE)
    assert [sum(seed.hop == hop for seed in draw.train) for hop in (1, 2, 3, 4)] == [16, 12, 8, 4]
    assert [sum(seed.hop == hop for seed in draw.held_out) for hop in (1, 2, 3, 4)] == [4, 3, 2, 1]


# --- the draw


def test_sampling_is_seeded() -> None:
    first, second = draw_seeds(PAPERS, SETTINGS, NONE), draw_seeds(PAPERS, SETTINGS, NONE)
    other = draw_seeds(PAPERS, SETTINGS.model_copy(update={"seed": 7}), NONE)
    assert first == second
    assert {seed.pmid for seed in first.train} != {seed.pmid for seed in other.train}


def test_held_out_papers_are_no_training_papers_and_short_abstracts_are_none() -> None:
    draw = draw_seeds(PAPERS, SETTINGS, NONE)
    assert len(draw.train) == 40
    assert len(draw.held_out) == 10
    assert not {s.pmid for s in draw.train} & {s.pmid for s in draw.held_out}
    assert all(int(s.pmid) >= 10 for s in draw.train + draw.held_out)
    assert draw.left_out == {"short_abstract": 9}


def test_too_few_papers_are_named_with_reasons_and_a_remedy() -> None:
    with pytest.raises(UsageError, match=r"expected 65 papers .* found 20 of 29 .*short_abstract 9.*ingest more"):
        draw_seeds(PAPERS[:29], SETTINGS, NONE)


def rounds_of(settings: TrainerSettings, count: int) -> list[dict[str, set[int]]]:
    """The rows of each split in rounds 1 to `count`, of rows 0 to 99."""
    drawn = [draw_rows(range(100), settings.model_copy(update={"round": number})) for number in range(1, count + 1)]
    return [{split: set(rows) for split, rows in one.items()} for one in drawn if one is not None]


@given(seed=st.integers(0, 1000), papers=st.integers(1, 8), seeds=st.integers(4, 30), held_out=st.integers(1, 10))
def test_rounds_share_held_out_papers_and_no_question_rests_on_a_paper_that_trained_a_proposer(
    seed: int, papers: int, seeds: int, held_out: int
) -> None:
    questions = QuestionSettings(papers=papers)
    chosen = TrainerSettings(seed=seed, seeds=seeds, eval_seeds=held_out, prompts_per_step=4, questions=questions)
    rounds = rounds_of(chosen, 3)
    assert rounds == rounds_of(chosen.model_copy(update={"iterations": 3}), 3)  # however many are planned
    trained: set[int] = set()
    asked: set[int] = set()
    for one in rounds:
        assert [len(one[split]) for split in ("train", "held_out", "questions")] == [seeds, held_out, papers]
        assert one["held_out"] == rounds[0]["held_out"]
        assert not one["train"] & (one["held_out"] | asked)
        trained |= one["train"]
        assert not one["questions"] & (one["held_out"] | trained | asked)
        asked |= one["questions"]


@given(
    seed=st.integers(0, 100), papers=st.integers(1, 40), seeds=st.integers(4, 60), held_out=st.integers(1, 40),
    number=st.integers(1, 4),
)  # fmt: skip
def test_a_round_has_all_its_papers_or_none_and_with_more_room_those_before_it_have_them_too(
    seed: int, papers: int, seeds: int, held_out: int, number: int
) -> None:
    chosen = TrainerSettings(
        seed=seed, seeds=seeds, eval_seeds=held_out, prompts_per_step=4, questions=QuestionSettings(papers=papers)
    )
    drawn = [draw_rows(range(100), chosen.model_copy(update={"round": one})) for one in range(1, number + 1)]
    there = [one is not None for one in drawn]
    assert there == sorted(there, reverse=True)
    for one in drawn:
        if one is not None:
            rows = [row for part in one.values() for row in part]
            assert len(rows) == len(set(rows)) == seeds + held_out + papers
            assert set(rows) <= set(range(100))


def test_rounds_end_with_a_sentence_when_papers_run_out() -> None:
    tight = SETTINGS.model_copy(update={"round": 3, "questions": QuestionSettings(papers=20)})
    with pytest.raises(UsageError, match="after those that rounds before 3 have used"):
        draw_seeds(PAPERS, tight, NONE)


def test_papers_of_an_evaluation_set_are_never_drawn(tmp_path: Path) -> None:
    drawn = draw_seeds(PAPERS, SETTINGS, NONE)
    planted = [drawn.train[0].pmid, drawn.held_out[0].pmid, drawn.questions[0].pmid]
    lines = [json.dumps({"question": "Why?", "answers": ["so"], "pmid": pmid}) for pmid in planted]
    (tmp_path / "known.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = SETTINGS.model_copy(update={"evaluation": EvaluationSettings(sets=(tmp_path / "known.jsonl",))})
    barred = barred_pmids(settings)
    assert barred == set(planted)
    again = draw_seeds(PAPERS, settings, barred)
    assert not barred & {seed.pmid for seed in [*again.train, *again.held_out, *again.questions]}
    assert again.left_out["excluded"] == 3


def test_all_papers_of_a_bioasq_question_are_barred(tmp_path: Path) -> None:
    drawn = draw_seeds(PAPERS, SETTINGS, NONE)
    planted = [drawn.train[0].pmid, drawn.held_out[0].pmid, drawn.questions[0].pmid]
    addresses = [f"http://www.ncbi.nlm.nih.gov/pubmed/{pmid}" for pmid in planted]
    question = {
        "id": "1", "type": "factoid", "body": "Why?", "exact_answer": ["so"], "documents": addresses[:2],
        "snippets": [{"document": addresses[2], "text": "So."}],
    }  # fmt: skip
    (tmp_path / "task.json").write_text(json.dumps({"questions": [question]}), encoding="utf-8")
    settings = SETTINGS.model_copy(update={"evaluation": EvaluationSettings(sets=(tmp_path / "task.json",))})
    assert barred_pmids(settings) == set(planted)
    again = draw_seeds(PAPERS, settings, barred_pmids(settings))
    assert not set(planted) & {seed.pmid for seed in [*again.train, *again.held_out, *again.questions]}


# --- which papers


def kept(papers: list[Paper], settings: TrainerSettings, excluded: frozenset[str] = NONE) -> list[str]:
    return [papers[row].pmid for row in qualifying_rows(papers, settings, excluded)[0]]


@pytest.mark.parametrize(
    ("term", "fits"),
    [
        ("Lung Neoplasms", True), ("lung neoplasms", True), ("*Lung Neoplasms", True),
        ("Lung Neoplasms/*genetics", True), ("Neoplasms", False), ("Genetics/Lung Neoplasms", False), ("", False),
    ],
)  # fmt: skip
def test_a_mesh_filter_looks_at_descriptors_in_any_case(term: str, fits: bool) -> None:
    settings = NO_FILTER.model_copy(update={"seed_mesh": ("Lung neoplasms", "Asthma")})
    papers = [Paper("1", "T", "A", mesh_terms=("Humans", term))]
    assert qualifying_rows(papers, settings, NONE) == (([0], {}) if fits else ([], {"other_mesh": 1}))


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("A role of IL-6.", True), ("il-6 levels", True), ("anti-IL-6-therapy", True), ("Kinase inhibitors", True),
        ("IL-60 levels", False), ("kinases", False), ("HIL-6", False),
    ],
)  # fmt: skip
def test_a_keyword_is_a_whole_word_of_title_or_abstract(text: str, fits: bool) -> None:
    settings = NO_FILTER.model_copy(update={"seed_keywords": (" IL-6", "kinase")})
    for paper in (Paper("1", text, "A"), Paper("1", "T", text)):
        assert qualifying_rows([paper], settings, NONE) == (([0], {}) if fits else ([], {"no_keyword": 1}))


def test_one_paper_under_two_ids_or_one_id_with_two_papers_is_one_seed() -> None:
    papers = [
        Paper("1", "The Role of X", "It acts, on Y."),
        Paper("2", "The role of X.", "It  acts on Y"),
        Paper("1", "Another", "text"),
        Paper("3", "A third", "text"),
    ]
    assert kept(papers, NO_FILTER) == ["1", "3"]
    assert qualifying_rows(papers, NO_FILTER, NONE)[1] == {"double": 2}


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_an_excluded_paper_is_no_seed_under_another_id_either(order: tuple[int, ...]) -> None:
    papers = [Paper("1", "A title", "text"), Paper("2", "A Title.", "Text"), Paper("3", "Another", "text")]
    rows, left_out = qualifying_rows([papers[place] for place in order], NO_FILTER, frozenset({"1"}))
    assert rows == [2]
    assert left_out == {"excluded": 2}


def test_pmid_files_may_have_comments_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# an evaluation set\n123\n\n 456 # yes/no\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\ufeff789\r\n123", encoding="utf-8")
    assert read_pmids([tmp_path / "a.txt", tmp_path / "b.txt"], VARIABLE) == {"123", "456", "789"}


@pytest.mark.parametrize("line", ["PMC123", "12 34", "0123", "12345678901", "١٢٣"])
def test_a_line_that_is_no_pmid_is_named_with_file_and_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "held.txt"
    file.write_text(f"1\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"held\.txt, line 2: expected one PMID.*DRZERO_TRAINER__EXCLUDE_PMIDS"):
        read_pmids([file], VARIABLE)


def test_a_missing_pmid_file_is_named_with_its_variable(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.txt of DRZERO_TRAINER__EXCLUDE_PMIDS, found none"):
        read_pmids([tmp_path / "none.txt"], VARIABLE)


# --- prompts that fit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a byte-level tokenizer and this project's chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return str(folder)


def fitting(**changes: Any) -> TrainerSettings:
    return TrainerSettings(prompts="short-v1", document_tokens=400, prompt_tokens=4000).model_copy(update=changes)


LONG = Seed(0, "123", 2, "A long document about the gene BRCA1. " * 8)


@given(most=st.integers(0, 200), edge=st.integers(-1, 200))
def test_the_longest_fit_is_the_last_size_that_fits(most: int, edge: int) -> None:
    assert longest_fit(most, lambda size: size <= edge) == min(most, edge)


def test_a_document_is_cut_to_its_tokens(model: str) -> None:
    (fitted,) = fit_prompts([LONG], trainer=fitting(document_tokens=20), model=model)
    assert fitted.seed.document == LONG.document[:20]
    assert not fitted.shortened


def test_a_prompt_that_is_too_long_loses_the_end_of_its_document_and_nothing_else(model: str) -> None:
    whole = prompt_lengths(model, [prompt_of(LONG, fitting())])[0]
    for limit in (whole, whole - 1, whole - 100):
        trainer = fitting(prompt_tokens=limit)
        (fitted,) = fit_prompts([LONG], trainer=trainer, model=model)
        assert fitted.prompt_tokens == limit  # a byte is a token: the longest that fits uses all
        assert fitted.prompt_tokens == prompt_lengths(model, [prompt_of(fitted.seed, trainer)])[0]
        assert LONG.document.startswith(fitted.seed.document)
        assert fitted.shortened == (limit < whole)


def test_over_long_prompts_are_an_error_where_no_document_would_fit(model: str) -> None:
    empty = prompt_lengths(model, [prompt_of(replace(LONG, document=""), fitting())])[0]
    with pytest.raises(UsageError, match=rf"DRZERO_TRAINER__PROMPT_TOKENS = {empty} .* has {empty} without"):
        fit_prompts([LONG], trainer=fitting(prompt_tokens=empty), model=model)


def test_the_prompt_limit_is_measured_with_tool_schema_and_worked_examples(model: str) -> None:
    plain, shown = (prompt_of(LONG, fitting(worked_examples=examples)) for examples in (0, 2))
    tokenizer = load_tokenizer(model)
    with_tool, with_examples = prompt_lengths(model, [plain, shown])
    bare = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert with_tool > len(bare) + len(SEARCH_TOOL["function"]["description"])
    assert with_examples > with_tool


def test_prompts_are_measured_as_verls_agent_loop_builds_them(model: str) -> None:
    builders = pytest.importorskip("verl.utils.tokenizer.continuous_token_wiring", reason="verl is the trainer's")
    schemas = pytest.importorskip("verl.tools.schemas")
    tool = schemas.OpenAIFunctionToolSchema(**SEARCH_TOOL).model_dump(exclude_unset=True, exclude_none=True)
    builder = builders.create_continuous_token_builder(load_tokenizer(model), hf_model_type="qwen2")
    prompts = [prompt_of(LONG, fitting(worked_examples=examples)) for examples in (0, 1, 2)]
    assert prompt_lengths(model, prompts) == [len(builder.build_initial_tokens(p, tools=[tool])) for p in prompts]


def test_a_model_without_tokenizer_or_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a tokenizer at .*DRZERO_TRAINER__ACTOR__MODEL"):
        load_tokenizer(str(tmp_path))
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(UsageError, match=r"expected a chat template .*DRZERO_TRAINER__ACTOR__MODEL"):
        load_tokenizer(str(tmp_path / "bare"))


# --- rows


def structs(type_: pa.DataType) -> Iterator[pa.StructType]:
    if pa.types.is_struct(type_):
        yield type_
        for field in type_:
            yield from structs(field.type)


def test_rows_survive_parquet_with_verls_columns_and_no_empty_dicts(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    trainer = fitting(seed=9, worked_examples=2)
    rows = [seed_row(FittedSeed(Seed(0, "123", 2, "A paper."), 77), trainer, "train")]
    write_rows(rows, path)
    table = pq.read_table(path)
    assert table.to_pylist() == rows
    row = rows[0]
    assert set(row) == {"prompt", "data_source", "ability", "reward_model", "agent_name", "extra_info"}
    assert row["data_source"] == f"search_biomedical_{row['extra_info']['hop']}"
    assert row["extra_info"]["tools_kwargs"]["search"]["create_kwargs"]["data_source"] == "search_biomedical_2"
    assert (row["extra_info"]["draw_seed"], row["extra_info"]["prompt_tokens"]) == (9, 77)
    assert row["prompt"][-1]["role"] == "user"
    assert all(kind.num_fields for field in table.schema for kind in structs(field.type))


# --- the stage

MAKE = """
import sys
from pathlib import Path
from test_seeds import make
make(Path(sys.argv[1]), sys.argv[2], "again")
"""


def make(data: Path, model: str, name: str) -> Path:
    """Make the seeds of a run `name` and return their folder."""
    variables = {
        "SEEDS": 30, "EVAL_SEEDS": 10, "PROMPTS_PER_STEP": 4, "MIN_ABSTRACT_WORDS": 30, "PROMPT_TOKENS": 4000,
        "DOCUMENT_TOKENS": 100, "ACTOR__MODEL": model, "SEED": 42, "QUESTIONS__PAPERS": 12,
        "EXCLUDE_PMIDS": data / "excluded.txt",
    }  # fmt: skip
    settings = build_settings({f"DRZERO_TRAINER__{key}": str(value) for key, value in variables.items()})
    paths = RunPaths(kept=data / name, work=data / "work", corpus=data / "corpus", index=data / "index")
    make_seeds(settings, paths, structlog.get_logger())
    return paths.seeds


@pytest.fixture
def data(tmp_path: Path) -> Path:
    publish_corpus(tmp_path, PAPERS)
    (tmp_path / "excluded.txt").write_text("50\n51\n", encoding="utf-8")
    return tmp_path


def test_the_same_seed_gives_the_same_bytes_in_another_process_which_never_loads_transformers(
    data: Path, model: str
) -> None:
    first = make(data, model, "first")
    script = MAKE + 'assert "transformers" not in sys.modules and "torch" not in sys.modules'
    places = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    subprocess.run([sys.executable, "-c", script, str(data), model], cwd=data, env=places, check=True, timeout=120)
    manifest, again = read_manifest(first), read_manifest(data / "again" / "seeds")
    assert again.files == manifest.files
    assert manifest.settings["seed"] == 42
    assert manifest.counts["left_out_excluded"] == 2
    assert manifest.counts["left_out_short_abstract"] == 9
    parts = {name: pq.read_table(first / f"{name}.parquet").to_pylist() for name in ("train", "held_out", "questions")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 30, "held_out": 10, "questions": 12}
    assert all(row["extra_info"]["split"] == name for name, part in parts.items() for row in part)
    rows = [row for part in parts.values() for row in part]
    assert len({row["extra_info"]["pmid"] for row in rows}) == 52
    lengths = [row["extra_info"]["prompt_tokens"] for row in rows]
    assert max(lengths) == manifest.counts["prompt_tokens_max"] <= 4000
    assert {row["extra_info"]["draw_seed"] for row in rows} == {42}
    assert not {row["extra_info"]["pmid"] for row in rows} & {"50", "51"}
