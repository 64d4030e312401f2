"""The report: the tables of a run, and a page of two rounds whose texts are only text."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import structlog
from corpora import publish_corpus
from hypothesis import given
from hypothesis import strategies as st
from round_world import (
    json_lines,
    proposer_verdict,
    publish_files,
    publish_round,
    publish_training,
    question_of,
    settings_at,
    world_of,
)

from services.trainer.evaluate import evaluate
from services.trainer.records import HELD_OUT
from services.trainer.report import (
    MISMATCHES,
    SAMPLES,
    TIMES,
    compared,
    exam_rows,
    mismatch_rows,
    plot,
    stage_rows,
    time_rows,
    write_report,
)
from services.trainer.rounds import paths_of, proposer_settings, solver_settings
from services.trainer.run_state import FILE as STATE
from services.trainer.safety import LABELS, safety_prompts
from services.trainer.step_metrics import MISMATCH, PART_TIMERS
from shared.records import Paper
from shared.settings import Settings, changed

STEPS: list[dict[str, Any]] = [
    {"step": 1, "timing_s/step": 10.0, "timing_s/gen": 4.0, "timing_s/update_actor": 5.0, "rollout_corr/kl": 0.25},
    {"step": 2, "timing_s/step": 30.0, "timing_s/gen": 12.0, "timing_s/update_actor": 9.0, "timing_s/testing": 8.0}
    | {"timing_s/save_checkpoint": 4.0, "rollout_corr/kl": None},
]


def test_each_part_has_its_mean_its_share_and_its_seconds_per_step() -> None:
    rows = {label: row for label, *row in time_rows(STEPS)}
    assert rows["update"] == [7.0, pytest.approx(14 / 40), [5.0, 9.0]]
    assert rows["whole step"] == [20.0, 1.0, [10.0, 30.0]]
    # A part that not every step has still counts for all of them.
    assert rows["checkpoint"] == [2.0, 0.1, [None, 4.0]]
    assert "log-probabilities" not in rows
    shares: list[Any] = [row[1] for label, row in rows.items() if not label.startswith(("whole", "validation"))]
    assert sum(shares) == pytest.approx(1)


def test_the_mismatch_is_shown_step_by_step() -> None:
    [(label, values)] = mismatch_rows(STEPS)
    assert label.startswith("KL")
    assert values == [0.25, None]


def test_a_run_without_timed_steps_has_empty_tables() -> None:
    assert time_rows([]) == []
    assert mismatch_rows([]) == []


def test_every_part_and_measure_has_a_label() -> None:
    own = {"other", "step", "validation"}
    assert {name for name, _ in TIMES} == own | PART_TIMERS.keys()
    assert {name for name, _ in MISMATCHES} == set(MISMATCH)


# --- what the rounds have taught


def evaluation(number: int, sets: dict[str, int]) -> dict[str, Any]:
    """evaluation.json of a round, as far as `exam_rows` reads it: sets with the number of their questions."""
    return {"round": number, "sets": {name: result(number, count) for name, count in sets.items()}}


def result(number: int, count: int) -> dict[str, Any]:
    """One set in it."""
    sides = {"base": {"questions": count, "of": "base"}, "round": {"questions": count, "of": number}}
    return {"asked": f"{count} questions", **sides, "change": {"p": 1.0}}


def labels(name: str, *evaluations: dict[str, int]) -> list[str]:
    made = [evaluation(number, sets) for number, sets in enumerate(evaluations, start=1)]
    return [label for label, _ in exam_rows(name, made)]


def test_the_base_is_shown_once_and_again_where_the_set_grew() -> None:
    assert labels("qa", {"qa": 9}, {"qa": 9}, {"qa": 9}) == ["base", "round 1", "round 2", "round 3"]
    assert labels("own", {"own": 2}, {"own": 3}, {"own": 3}) == [
        "base", "round 1", "base, as asked in round 2", "round 2", "round 3",
    ]  # fmt: skip


@pytest.mark.parametrize("other", [{"asked": "9 other questions"}, {"base": {"questions": 9, "of": "another index"}}])
def test_as_many_other_questions_or_other_answers_of_the_base_show_it_again(other: dict[str, Any]) -> None:
    first, second = evaluation(1, {"qa": 9}), evaluation(2, {"qa": 9})
    second["sets"]["qa"] |= other
    rows = exam_rows("qa", [first, second])
    assert [label for label, _ in rows] == ["base", "round 1", "base, as asked in round 2", "round 2"]
    assert rows[2][1] == second["sets"]["qa"]["base"] | {"change": None}


def test_a_set_that_came_later_begins_with_its_first_round() -> None:
    assert labels("qa", {}, {"qa": 9}) == ["base", "round 2"]
    assert labels("other", {"qa": 9}) == []


@given(st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_every_round_stands_below_a_base_of_the_same_questions(sizes: list[int]) -> None:
    rows = exam_rows("qa", [evaluation(number, {"qa": size}) for number, size in enumerate(sizes, start=1)])
    base = 0
    for label, side in rows:
        base = side["questions"] if label.startswith("base") else base
        assert side["questions"] == base
        assert (side["change"] is None) == label.startswith("base")
    assert [side["of"] for label, side in rows if label.startswith("round")] == list(range(1, len(sizes) + 1))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20))
def test_answers_side_by_side_are_of_one_question_and_first_where_they_differ(
    tmp_path_factory: pytest.TempPathFactory, rights: list[tuple[bool, bool]]
) -> None:
    settings = settings_at(tmp_path_factory.mktemp("compared"))
    sides = [[{"id": n, "right": pair[side]} for n, pair in enumerate(rights)] for side in (0, 1)]
    paths = paths_of(settings, 1, "solver")
    publish_files(
        paths.evaluation, {f"answers-{n}.jsonl": json_lines(s) for n, s in zip(("base", "round"), sides, strict=True)}
    )
    pairs = compared(paths)
    assert all(before["id"] == after["id"] for before, after in pairs)
    assert len(pairs) == min(SAMPLES, len(rights))
    differ = [before["right"] != after["right"] for before, after in pairs]
    assert differ == sorted(differ, reverse=True)
    assert sum(differ) == min(SAMPLES, sum(old != new for old, new in rights))


# --- a page of two rounds

EVIL = """<script>alert(1)</script><img src=x onerror="alert(2)">'"&</pre></div>"""
METALS = {"red": "copper", "heavy": "lead", "rusts": "iron"}


def studies(known: Sequence[str], evil: str) -> Any:
    """A solver that searches, thinks aloud, and knows some metals."""

    def answer(body: dict[str, Any]) -> str:
        asked = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
        if body["messages"][-1]["role"] == "user":
            call = {"name": "search", "arguments": {"query_list": ["metal", f"more {evil}"]}}
            return f"<think>I search. {evil}</think><tool_call>{json.dumps(call)}</tool_call>"
        if "Answer with one of" in asked:
            return f"<answer>yes {evil}</answer>"
        found = next((metal for word, metal in METALS.items() if word in asked), "none")
        return f"<think>So.</think><answer>{found if found in known else 'gold'} {evil}</answer>"

    return answer


def made_run(folder: Path, evil: str = "") -> tuple[Settings, list[str]]:
    """Two rounds before their evaluation, with `evil` in every text of models, papers and files; and their solvers."""
    folder = folder / f"run{evil[:8]}"
    folder.mkdir()
    own = folder / f"own {evil[:8]}.jsonl"
    question = {"question": f"Is zinc a metal? {evil}", "answers": ["yes"], "choices": ["yes", "no"]}
    own.write_text(json_lines([question]), encoding="utf-8")
    settings = settings_at(
        folder, trainer__iterations=2, trainer__solver__prompts_per_step=1, trainer__evaluation__sets=(own,),
        trainer__reward__max_turns=2,
    )  # fmt: skip

    def asked(name: str, word: str, *, held_out: bool) -> dict[str, Any]:
        return question_of(name, f"Which metal {word}? {evil}", f"{METALS[word]} {evil}", held_out=held_out)

    first = [asked("0.0", "heavy", held_out=False), asked("1.0", "red", held_out=True)]
    second = [asked("0.0", "heavy", held_out=False), asked("1.0", "rusts", held_out=True)]
    solvers = [publish_round(settings, number, rows) for number, rows in ((1, first), (2, second))]
    rollouts = [
        proposer_verdict(step, split=HELD_OUT, question=f"Which metal heals? {evil}", answer=f"zinc {evil}")
        for step in (0, 2)
    ]  # fmt: skip
    publish_training(paths_of(settings, 2, "proposer"), rollouts[:1], rollouts[1:], 2)
    paths = paths_of(settings, 1, "proposer")
    publish_corpus(paths.corpus.parent, [Paper("7", f"A title {evil}", "It heals.", journal=f"A journal {evil}")])
    stages = {"1.seeds": {"seconds": 61.5, "energy_wh": None, "cost": 0.25}}
    (paths.run / STATE).write_text(json.dumps({"stages": stages}))
    return settings, solvers


def made_page(folder: Path, evil: str = "", *, safety: bool = True) -> Path:
    """The folder of the report of the second round."""
    settings, solvers = made_run(folder, evil)
    known: tuple[list[str], ...] = ([], ["copper"], ["copper", "iron"])
    said = {model: studies(k, evil) for model, k in zip((settings.solver.model, *solvers), known, strict=True)}
    with world_of(said, model=solvers[0]) as world:
        addresses = {"solver.url": world.url, "retrieval.url": world.url}
        settings = changed(settings, {**addresses, "trainer.evaluation.safety": safety})
        log = structlog.get_logger()
        for number in (1, 2):
            own = solver_settings(settings, number)
            evaluate(own, paths_of(own, number, "solver"), log)
            own, paths = proposer_settings(settings, number), paths_of(settings, number, "proposer")
            write_report(own, paths, log)
            written = (paths.report / "report.html").resolve()
            write_report(own, paths, log)
            assert (paths.report / "report.html").resolve() == written
    return paths.report


@pytest.fixture(scope="module")
def tame(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_page(tmp_path_factory.mktemp("tame"))


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_page(tmp_path_factory.mktemp("evil"), EVIL)


def page_in(folder: Path, name: str = "report.html") -> str:
    return (folder / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tame: Path) -> str:
    return page_in(tame)


class Reader(HTMLParser):
    """The tags of a page with the names of their attributes, all links and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name.split(":")[-1] in ("href", "src", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}", ()))

    def handle_data(self, data: str) -> None:
        self.text += data


def tables(page: str) -> list[list[list[str]]]:
    """The cells of all tables, row by row."""
    return [
        [
            [" ".join(Reader(cell).text.split()) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    ]


@pytest.mark.parametrize("name", ["report.html", "safety.html"])
def test_no_text_of_models_papers_or_files_becomes_markup(tame: Path, evil: Path, name: str) -> None:
    pages = (re.sub(r"<svg.*?</svg>", "", page_in(folder, name), flags=re.DOTALL) for folder in (tame, evil))
    harmless, hostile = map(Reader, pages)
    assert hostile.tags == harmless.tags
    assert not {"script", "img", "iframe", "link", "base", "form"} & {tag for tag, _ in hostile.tags}
    assert not any(name.startswith("on") for _, names in hostile.tags for name in names)
    # It is there all the same, as text.
    assert hostile.text.count(EVIL) >= 20
    assert f"Results for: more {EVIL}" in hostile.text


def test_text_of_models_papers_and_files_is_shown_as_it_is(evil: Path) -> None:
    text = Reader(page_in(evil)).text
    for shown in (f"Which metal heals? {EVIL}", f"A title {EVIL}", f"A journal {EVIL}", f"own {EVIL[:8]}"):
        assert shown in text


@pytest.mark.parametrize("name", ["report.html", "safety.html"])
def test_a_page_loads_nothing_and_links_only_to_its_neighbour(tame: Path, name: str) -> None:
    page = page_in(tame, name)
    links = [link for link in Reader(page).links if not link.startswith("#")]
    assert links == (["safety.html"] if name == "report.html" else [])
    assert "@import" not in page
    assert all(found.startswith("#") for found in re.findall(r"url\(['\"]?([^)]*)\)", page))


def test_the_safety_page_has_counts_rules_limits_and_every_prompt_with_both_replies(tame: Path) -> None:
    page = page_in(tame, "safety.html")
    text = " ".join(Reader(page).text.split())
    for label in LABELS:
        assert f"`{label}`" in text
    assert "The rules do not see whether a reply is true, kind, complete or harmless" in text
    assert all(prompt.prompt in text and prompt.good in text for prompt in safety_prompts())
    assert page.count('<div class="card">') == len(safety_prompts())
    base, after = tables(page)
    assert (base[0][0], after[0][0]) == ("base", "round")
    groups = list(dict.fromkeys(prompt.group for prompt in safety_prompts()))
    assert [row[0] for row in base[1:]] == [row[0] for row in after[1:]] == groups
    assert sum(int(row[1]) for row in base[1:]) == len(safety_prompts())


def test_without_safety_prompts_there_is_no_page_of_them_and_no_link(tmp_path: Path) -> None:
    page = page_in(made_page(tmp_path, safety=False))
    assert "safety.html" not in page
    assert Reader(page).links == [link for link in Reader(page).links if link.startswith("#")]


def test_the_page_shows_what_the_rounds_have_taught(page: str) -> None:
    by_name = {table[0][0]: table[1:] for table in tables(page) if table and table[0]}
    # Label, questions, right, …, gained and lost.
    assert [(row[0], row[1], row[2], row[8]) for row in by_name["kept_out"]] == [
        ("base", "1", "0.0 %", ""),
        ("round 1", "1", "100.0 %", "1, 0"),
        ("base, as asked in round 2", "2", "0.0 %", ""),
        ("round 2", "2", "100.0 %", "2, 0"),
    ]
    assert [(row[0], row[1], row[2]) for row in by_name["own"]] == [
        ("base", "1", "100.0 %"), ("round 1", "1", "100.0 %"), ("round 2", "1", "100.0 %"),
    ]  # fmt: skip
    assert [row[0] for row in by_name["candidates"]] == ["round 1: 4", "round 2: 4"]
    assert by_name["stage"] == [["1.seeds", "61.5", "", "0.25"]]


def test_the_page_shows_both_roles_before_and_after(page: str) -> None:
    found = {row[0]: row[1:] for table in tables(page) for row in table if row and "greedy" not in row[0]}
    assert found["exact match"] == ["0.000 ± 0.000", "0.500 ± 0.980"]
    assert len(found["reward 0.5·F + D"]) == 2
    heads = [row[0] for table in tables(page) for row in table if row and "greedy held-out" in row[0]]
    assert [head.split(":")[0] for head in heads] == ["proposer", "solver"]


def test_the_page_shows_base_and_round_side_by_side(page: str) -> None:
    shown = page.split("<h2>Base and round side by side</h2>")[1].split("<h2>")[0]
    cards = [" ".join(Reader(card).text.split()) for card in shown.split('<div class="card">')[1:]]
    assert len(cards) == 3  # one of the file, one of each round
    for card, metal in zip(cards, ("copper", "iron"), strict=False):
        assert re.search(rf"Right: {metal} base: gold wrong .*round: {metal} right", card)
        assert card.count("PMID 7: A paper") == 4  # two queries a side
    assert "base: yes right" in cards[2]


def test_the_page_names_its_run_its_round_and_where_its_models_began(page: str) -> None:
    text = " ".join(Reader(page).text.split())
    assert "Run demo, round 2" in text
    assert re.search(r"Proposer \S+/1/proposer/weights trained by HRPO", text)
    assert re.search(r"solver \S+/1/solver/weights", text)
    assert "1 of 2 weight tensors changed, 50.00 % of their values (relative change 1.00e-03)" in text
    assert "Rejected: known 2." in text


def test_a_report_made_again_has_the_same_bytes_and_its_plots_share_no_id() -> None:
    lines = {"gradient norm": [1.0, 2.0], "entropy": [0.5, 0.4]}
    first, other = plot([1, 2], lines, "step", ""), plot([1, 2], {"reward": [1.0, 2.0]}, "step", "")
    assert plot([1, 2], lines, "step", "") == first
    hashed = [set(re.findall(r'id="([mp][0-9a-f]{10})"', text)) for text in (first, other)]
    assert all(hashed)
    assert hashed[0].isdisjoint(hashed[1])


def test_a_report_shows_what_every_other_stage_has_cost(tmp_path: Path) -> None:
    state: dict[str, dict[str, Any]] = {label: {"seconds": 1.0} for label in ("1.report", "2.seeds", "2.report")}
    settings = settings_at(tmp_path, trainer__round=2)
    assert [label for label, _ in stage_rows(settings, state)] == ["1.report", "2.seeds"]
