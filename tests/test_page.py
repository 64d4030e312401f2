"""The run page: what it says of a run, live and from files alone; its controls; and how it looks in a real browser."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Page, sync_playwright
from retrieval_world import serving
from round_world import publish_files, solver_verdict
from run_world import TOKEN, append, driven, page_of, rollout, small_run, training_paths, until_shown, write_step
from test_retrieval_page import CHROMIUM, QUIET, needs_chromium

from services.trainer.charts import HEIGHT, LEFT, MOST_POINTS, WIDTH, draw, levels, thinned
from services.trainer.control import requested
from services.trainer.driver import note
from services.trainer.page import FOLDER, READS, create_app
from services.trainer.page_feed import FIELDS, WrongForm, cursor_of, fields_of, wanted_of
from services.trainer.page_view import duration
from shared.files import hash_file
from shared.settings import Settings

PLANTED = '"><script>document.title = "planted"</script><img src=x onerror="document.title = \'planted\'" hx-get="/x">'
HTML = {"Accept": "text/html"}


def evaluated(settings: Settings) -> None:
    """An evaluation and a report of round 1."""
    side = {"questions": 9, "accuracy": 0.5, "interval_95": [0.25, 0.75], "paper_found": 0.4}
    change = {"gained": 3, "lost": 1, "p": 0.6}
    sets = {"kept_out": {"base": side, "round": side | {"accuracy": 0.7}, "change": change}}
    run = training_paths(settings).run
    publish_files(run / "1" / "evaluation", {"evaluation.json": json.dumps({"round": 1, "sets": sets})})
    publish_files(run / "1" / "report", {"report.html": "<p>A report</p>", "more.html": "more"})


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_a_run_that_never_began_has_a_page(tmp_path: Path) -> None:
    with page_of(small_run(tmp_path, steps=0)) as client:
        text = client.get("/").text
        assert "nothing has been run under this name" in text
        assert "No step has finished yet." in text
        assert client.get("/report").status_code == 404


def test_files_alone_show_a_finished_run(tmp_path: Path) -> None:
    settings = small_run(tmp_path)
    evaluated(settings)
    note(
        training_paths(settings).run, stage="1.report", since=1.8e9, steps={}, waiting=None, ended="all stages are done"
    )
    with page_of(settings) as client:
        text = client.get("/").text
        assert "Not running: all stages are done" in text
        assert "Round 1, proposer: 3 steps" in text
        assert "<td>0.700</td><td>0.250 to 0.750</td>" in text
        assert '<a href="/report/1/report.html">round 1</a>' in text
        for path in ("/report", "/report/1/report.html"):
            reply = client.get(path)
            assert reply.text.startswith("<p>A report</p>")
            assert "sandbox" in reply.headers["content-security-policy"]
        assert client.get("/report/1/more.html").text == "more"
        for path in ("/report/2/report.html", "/report/1/manifest.json", "/report/1/..%2f..%2fdriver.json"):
            assert client.get(path).status_code == 404


def test_stage_step_and_end_are_shown_while_a_driver_works(tmp_path: Path) -> None:
    settings = small_run(tmp_path, trainer__steps=8)
    append(training_paths(settings).log / "verdicts-1.jsonl", [rollout(4), rollout(4, 1)])
    with page_of(settings) as client, driven(settings):
        text = client.get("/live").text
        assert "Running, stage 1.train" in text
        assert "step 3 of 8, 2 rollouts of the next judged" in text
        assert "about 5 min left, until" in text
    with page_of(settings) as client:
        assert "the driver was killed in stage 1.train" in client.get("/live").text


def test_what_is_waited_for_and_what_is_wrong_are_shown(tmp_path: Path) -> None:
    settings = small_run(tmp_path)
    paths = training_paths(settings)
    write_step(paths, 4, [rollout(4)], **{"actor/entropy": 0.001})
    with page_of(settings) as client, driven(settings):
        text = client.get("/live").text
        assert "<strong>entropy</strong> actor/entropy is 0.001 nats at step 4" in text
        paths.waiting.write_text(json.dumps({"text": "step 5 refused; waiting for solver"}))
        until_shown(client, "Waiting: step 5 refused; waiting for solver")
        paths.waiting.unlink()
        paths.outage.write_text(json.dumps({"service": "solver", "text": "solver stayed away", "time": 0}))
        until_shown(client, "solver stayed away")


def test_the_solvers_training_has_curves_of_its_own(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=1)
    write_step(training_paths(settings, 1, "solver"), 1, [solver_verdict(1, text) for text in ("zinc", "lead")])
    with page_of(settings) as client:
        assert "Round 1, solver: 1 step" in client.get("/").text  # the newest
        assert "Right answers" in client.get("/").text
        other = client.get("/", params={"view": "1.proposer"}).text
        assert "Round 1, proposer: 1 step" in other
        assert "Format and difficulty" in other
        assert "Round 1, solver" in client.get("/", params={"view": "9.nobody"}).text


def test_a_reader_is_told_only_what_is_new(tmp_path: Path) -> None:
    settings = small_run(tmp_path)
    with page_of(settings) as client:
        (seen,) = re.findall(r"/live\?seen=(\w+)", client.get("/").text)
        assert client.get("/live", params={"seen": seen}).status_code == 204
        write_step(training_paths(settings), 4, [rollout(4)])
        until_shown(client, "4 steps", f"/live?seen={seen}")


def test_a_new_step_shows_within_two_seconds_and_the_page_within_one_with_10000_rollouts(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=0)
    paths = training_paths(settings)
    padding = {"turns": ["<think>" + "word " * 800 + "</think>"]}
    for step in range(1, 201):
        write_step(paths, step, [rollout(step, number) | padding for number in range(50)])
    with page_of(settings) as client:
        assert "10,000 rollouts" in client.get("/").text
        pages = []
        for _ in range(5):
            began = time.monotonic()
            client.get("/").raise_for_status()
            pages.append(time.monotonic() - began)
        late = []
        for step in range(201, 206):
            write_step(paths, step, [rollout(step, number) | padding for number in range(50)])
            late.append(until_shown(client, f"{step} steps"))
    print(f"page {max(pages):.3f} s, new step {max(late):.3f} s")
    assert max(pages) < 1
    assert max(late) < 2 - 1  # the browser asks every second


# ---- the feed --------------------------------------------------------------------------------------------------------


def test_the_feed_is_paged_newest_first(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=12)
    with page_of(settings) as client:
        text, seen = client.get("/").text, []
        while True:
            seen += re.findall(r"<article>.*?step (\d+)", text, re.DOTALL)
            older = re.search(r'href="(/\?before=[^"#]+)#rollouts"', text)
            if older is None:
                break
            text = client.get(older[1].replace("&amp;", "&")).text
        assert len(seen) == 48
        assert list(map(int, seen)) == sorted(map(int, seen), reverse=True)


def test_newer_rollouts_are_announced_by_the_filter(tmp_path: Path) -> None:
    settings = small_run(tmp_path)
    with page_of(settings) as client:
        address = re.search(r'hx-get="(/fresh\?[^"]+)"', client.get("/", params={"hop": "2"}).text)
        assert address is not None
        fresh = address[1].replace("&amp;", "&")
        assert client.get(fresh).text.strip() == ""
        append(training_paths(settings).log / "verdicts-1.jsonl", [rollout(4, number) for number in range(4)])
        until_shown(client, "1 newer, show", fresh)


def test_a_rollout_shows_document_searches_attempts_and_verdict_by_part(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=0)
    search = {"queries": ["zinc wounds"], "pmids": ["990000905"], "text": "PMID 990000905: Zinc."}
    row = rollout(1, 2, searches=[search]) | {"searches": [{"queries": ["zinc wounds"], "pmids": ["990000905"]}]}
    write_step(training_paths(settings), 1, [row])
    with page_of(settings) as client:
        text = client.get("/").text
        for wanted in (
            "Which metal heals?",
            "<q>zinc wounds</q>",
            ">990000905</a>",
            "solved sometimes (2 of 3)",
            "PMID 7",
        ):
            assert wanted in text
        part = client.get("/rollout/1", headers={"HX-Request": "true"}).text
        assert "format score F" in part
        assert "&lt;think&gt;I ask.&lt;/think&gt;" in part
        assert "<html" not in part
        assert "<html" in client.get("/rollout/1").text
        assert client.get("/rollout/99").status_code == 404
        assert client.get(f"/rollout/{2**70}").status_code == 404


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("hop", "two", "hop is &#39;two&#39;; expected a whole number"),
        ("low", "nan", "low is &#39;nan&#39;; expected a number"),
        ("solved", "perhaps", "solved is &#39;perhaps&#39;; expected sometimes, never, always, unasked or nothing"),
        ("before", "x", "before is &#39;x&#39;; expected the address of a page"),
        ("text", "x" * 201, "text has 201 characters; expected at most 200"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_said_on_the_page(tmp_path: Path, name: str, value: str, text: str) -> None:
    with page_of(small_run(tmp_path, steps=1)) as client:
        reply = client.get("/", params={name: value})
        assert reply.status_code == 422
        assert text in reply.text


@given(st.dictionaries(st.sampled_from(FIELDS), st.text(max_size=40)))
def test_fields_become_a_filter_or_a_sentence(given_fields: dict[str, str]) -> None:
    with suppress(WrongForm):
        fields = fields_of(given_fields)
        wanted_of(fields)
        cursor_of(fields["before"])


# ---- who may do what -------------------------------------------------------------------------------------------------


def test_without_a_token_the_controls_are_off_and_the_page_says_so(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=1)
    with driven(settings) as run, page_of(settings) as client:
        text = client.get("/").text
        assert "The controls are off" in text
        assert "<button name=" not in text
        reply = client.post("/control", data={"do": "stop"})
        assert (reply.status_code, "DRZERO_API_TOKEN is not set" in reply.json()["detail"]) == (403, True)
        assert requested(run) is None


def test_with_a_token_nothing_is_read_or_done_without_it(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=1)
    with driven(settings) as run, page_of(settings, TOKEN) as client:
        for headers in ({"Authorization": ""}, {"Authorization": f"Bearer {TOKEN}x"}):
            for path in ("/", "/live", "/fresh", "/rollout/1", "/report", "/page/run.css"):
                assert client.get(path, headers=headers).status_code == 401
            assert client.post("/control", data={"do": "stop"}, headers=headers).status_code == 401
        assert requested(run) is None


def test_with_the_token_a_run_is_paused_resumed_and_stopped(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=1)
    with page_of(settings, TOKEN) as client:
        assert client.post("/control", data={"do": "pause"}).status_code == 409  # nobody to ask
        with driven(settings) as run:
            for what, asked in (("pause", "pause"), ("resume", None), ("stop", "stop")):
                assert client.post("/control", data={"do": what}).json() == {"order": what}
                assert requested(run) == asked
            assert "Asked for: <strong>stop</strong>" in client.get("/").text
            page = client.post("/control", data={"do": "resume"}, headers=HTML)
            assert (page.status_code, page.headers["location"]) == (303, "/")
            assert client.post("/control", data={"do": "explode"}).status_code == 422
            assert client.post("/control", content=b"do=stop&x=" + b"x" * 5000).status_code == 413
            evil = client.post("/control", data={"do": "stop"}, headers={"Sec-Fetch-Site": "cross-site"})
            assert evil.status_code == 403
            assert requested(run) is None


def test_the_token_stands_on_no_page(tmp_path: Path) -> None:
    with page_of(small_run(tmp_path, steps=1), TOKEN) as client:
        for path in ("/", "/live", "/rollout/1"):
            assert TOKEN not in client.get(path).text


def test_too_many_readers_are_sent_away_for_a_while(tmp_path: Path) -> None:
    with page_of(small_run(tmp_path, steps=1)) as client:
        statuses = [client.get("/fresh?after=0").status_code for _ in range(READS + 20)]
        refused = client.get("/live")
    assert 429 in statuses
    assert refused.headers["retry-after"] == "5"


def test_nothing_planted_by_a_model_a_paper_or_a_reader_becomes_markup(tmp_path: Path) -> None:
    settings = small_run(tmp_path, steps=0)
    search = {"queries": [PLANTED], "pmids": [PLANTED]}
    attempt = {"answer": PLANTED, "ended": PLANTED, "searches": 0, "seconds": 0.1, "problem": PLANTED}
    row = rollout(1) | {
        "question": PLANTED, "answer": PLANTED, "turns": [PLANTED], "searches": [search], "attempts": [attempt],
        "pmid": PLANTED, "reasoning_type": PLANTED, "invalid_reason": PLANTED,
    }  # fmt: skip
    write_step(training_paths(settings), 1, [row, row | {"valid": 0.0}])
    training_paths(settings).waiting.write_text(json.dumps({"text": PLANTED}))
    publish_files(training_paths(settings).run / "1" / "evaluation", {"evaluation.json": json.dumps(
        {"round": 1, "sets": {PLANTED: {"base": {"questions": 1, "accuracy": 0.0, "interval_95": [0, 1],
         "paper_found": None}, "round": {"questions": 1, "accuracy": 0.0, "interval_95": [0, 1],
         "paper_found": None}, "change": None}}})})  # fmt: skip
    with driven(settings, stage="1.train"), page_of(settings) as client:
        for path in ("/", "/live", "/rollout/1", "/rollout/2", *(f"/?{name}={PLANTED}" for name in (*FIELDS, "view"))):
            reply = client.get(path)
            text = re.sub(r'<script src="/page/htmx.min.js" defer></script>', "", reply.text)
            assert not re.search(r"<(script|img)\b", text), path
            assert not re.search(r'<[^>]*hx-get="/x"', text), path
            policy = reply.headers["content-security-policy"]
            assert "unsafe" not in policy
            assert "script-src 'self'" in policy
        assert "&lt;script&gt;" in client.get("/").text


def test_the_front_end_library_is_the_one_that_was_looked_at() -> None:
    # htmx.org 2.0.8 of the npm registry, dist/htmx.min.js
    assert hash_file(FOLDER / "htmx.min.js") == "22283ef68cb7545914f0a88a1bdedc7256a703d1d580c1d255217d0a50d31313"


# ---- curves ----------------------------------------------------------------------------------------------------------

CURVES = st.dictionaries(st.integers(0, 10_000), st.floats(width=32), max_size=300)


@given(st.dictionaries(st.sampled_from("abc"), CURVES))
def test_every_curve_can_be_drawn_and_stays_inside_its_chart(curves: dict[str, dict[int, float]]) -> None:
    chart = draw("Title", curves)
    if chart is None:
        assert not any(abs(v) < float("inf") for curve in curves.values() for v in curve.values())
        return
    for line in chart.lines:
        for piece in line.pieces:
            for point in piece.split():
                x, y = map(float, point.split(","))
                assert LEFT - 2.1 <= x <= WIDTH + 2
                assert 0 <= y <= HEIGHT


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400))
def test_many_points_are_drawn_as_means_of_neighbours(values: list[float]) -> None:
    points = thinned(dict(enumerate(values)))
    assert len(points) <= MOST_POINTS
    assert [first for first, _, _ in points] == sorted({first for first, _, _ in points})
    assert sum(last - first + 1 for first, last, _ in points) == len(values)
    total = sum(mean * (last - first + 1) for first, last, mean in points)
    assert total == pytest.approx(sum(values), rel=1e-6, abs=1e-3)


def test_the_newest_value_is_said_also_where_means_are_drawn() -> None:
    chart = draw("Title", {"a": {step: float(step) for step in range(1, 401)}})
    assert chart is not None
    assert chart.lines[0].now == "400"
    assert chart.strips[-1].text == "steps 396 to 400: a 398"


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
def test_levels_enclose_all_numbers(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    found = levels(low, high)
    assert found[0] <= low + 1e-9 * max(1, abs(low))
    assert found[-1] >= high - 1e-9 * max(1, abs(high))
    assert 2 <= len(found) <= 6


@pytest.mark.parametrize(("seconds", "words"), [(5, "5 s"), (600, "10 min"), (7260, "2 h 1 min"), (4e5, "4.6 days")])
def test_a_duration_is_said_in_at_most_two_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["with scripts", "without scripts"])
def scripts(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "with scripts")


@pytest.fixture
def page(scripts: bool, tmp_path: Path) -> Iterator[Page]:
    """A tab of a phone's size in a dark room, which knows the token; what its console says is an error."""
    said: list[str] = []
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=CHROMIUM,
            headless=True,
            args=list(QUIET),
            java_script_enabled=scripts,
            viewport={"width": 390, "height": 844},
            color_scheme="dark",
            http_credentials={"username": "anybody", "password": TOKEN},
        )
        try:
            tab = context.pages[0]
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            yield tab
            assert said == []
        finally:
            context.close()


@pytest.fixture
def run(tmp_path: Path) -> Settings:
    settings = small_run(tmp_path / "run", steps=8, trainer__steps=20)
    evaluated(settings)
    return settings


@needs_chromium
def test_a_finished_step_comes_into_the_open_page(page: Page, run: Settings, tmp_path: Path, scripts: bool) -> None:
    with serving(create_app(run, None)) as url, driven(run):
        page.goto(url)
        page.get_by_role("heading", name="8 steps").wait_for()
        write_step(training_paths(run), 9, [rollout(9, number) for number in range(4)])
        began = time.monotonic()
        if not scripts:
            page.wait_for_timeout(600)
            page.reload()
        page.get_by_role("heading", name="9 steps").wait_for()
        assert time.monotonic() - began < 2
        curve = page.get_by_role("img", name="Reward by step")
        assert curve.locator("polyline").count() == 1
        assert "step 9: mean" in curve.locator("title").last.text_content()
        assert page.get_by_text("step 9 of 20").is_visible()
        page.screenshot(path=tmp_path / "run.png", full_page=True)


@needs_chromium
def test_the_feed_is_filtered_with_the_keyboard_alone(page: Page, run: Settings, tmp_path: Path) -> None:
    append(training_paths(run).log / "verdicts-1.jsonl", [rollout(8, 5, question="What does gold do?")])
    with serving(create_app(run, None)) as url:
        page.goto(url)
        page.get_by_text("33 rollouts").wait_for()
        page.get_by_label("Text in question").focus()
        page.keyboard.type("GOLD does")
        page.keyboard.press("Enter")
        page.get_by_text("1 rollout", exact=True).wait_for()
        assert "text=GOLD+does" in page.url or "text=GOLD%20does" in page.url
        assert page.locator("article").count() == 1
        assert page.locator(".question").inner_text() == "What does gold do?"
        page.screenshot(path=tmp_path / "filter.png", full_page=True)
        page.reload()
        page.get_by_text("1 rollout", exact=True).wait_for()
        assert page.get_by_label("Text in question").input_value() == "GOLD does"


@needs_chromium
def test_older_rollouts_and_a_whole_conversation_are_a_click_away(page: Page, run: Settings, scripts: bool) -> None:
    with serving(create_app(run, None)) as url:
        page.goto(url)
        page.get_by_role("link", name="Older").click()
        page.get_by_text("32 rollouts, older ones").wait_for()
        assert page.locator("article").count() == 12
        card = page.locator("article").first
        card.get_by_text("Verdict by part").click()
        if not scripts:
            card.get_by_role("link", name="Show").click()
        page.locator("pre").first.wait_for()
        assert "<think>I ask.</think>" in page.locator("pre").first.inner_text()
        assert page.get_by_text("format score F").first.is_visible()


@needs_chromium
def test_a_person_pauses_and_stops_a_run_with_the_token_only(page: Page, run: Settings, tmp_path: Path) -> None:
    with driven(run) as folder:
        with serving(create_app(run, None)) as url:
            page.goto(url)
            assert page.get_by_text("The controls are off").is_visible()
            assert page.get_by_role("button", name="Pause").count() == 0
        with serving(create_app(run, TOKEN)) as url:
            page.goto(url)
            for button, asked in (("Pause after this step", "pause"), ("Resume", None), ("Stop with", "stop")):
                page.get_by_role("button", name=button).click()
                page.wait_for_url(f"{url}/")
                assert requested(folder) == asked
            assert page.get_by_text("Asked for: stop").is_visible()
            page.screenshot(path=tmp_path / "controls.png", full_page=True)


@needs_chromium
def test_a_phone_never_scrolls_sideways_and_nothing_planted_runs(page: Page, run: Settings) -> None:
    long = rollout(8, 6) | {"question": PLANTED + "x" * 400, "answer": PLANTED, "turns": [PLANTED]}
    append(training_paths(run).log / "verdicts-1.jsonl", [long])
    with serving(create_app(run, None)) as url:
        page.goto(f"{url}/?text=planted")
        page.locator("article").wait_for()
        assert page.title() != "planted"
        assert page.locator("html").evaluate("all => all.scrollWidth") <= 390
        assert page.locator("body").evaluate("all => getComputedStyle(all).backgroundColor") == "rgb(20, 25, 26)"
