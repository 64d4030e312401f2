"""The search page: form and results without JavaScript, everything escaped, and usable in a real browser."""

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, sync_playwright
from retrieval_world import PAPERS, WordSearcher, in_process, serving, settings_for, until, until_ready

from services.retrieval.app import create_app
from services.retrieval.page import marked
from services.retrieval.query import Filters, Query
from shared.records import Paper

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path (apt-get install chromium)")

PLANTED = '<script>document.title = "planted"</script><img src=x onerror="document.title = \'planted\'">'
NASTY = Paper(
    pmid="9", title=f"Gout {PLANTED}", abstract=f'Gout "{PLANTED}" & more.', journal=PLANTED, authors=(PLANTED,)
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = settings_for(tmp_path_factory.mktemp("none"))
    with serving(create_app(settings, open_searcher=lambda _: WordSearcher((*PAPERS, NASTY)))) as url:
        asyncio.run(until_ready(url))
        yield url


# ---- without a browser -----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_form_asks_what_it_says(tmp_path: Path) -> None:
    searcher = WordSearcher()
    form = {
        "q": " gout ",
        "mode": "bm25",
        "k": "4",
        "year_from": "2001",
        "year_to": "",
        "journal": "Lancet; Lancet, North American edition;",
        "mesh": "Gout",
        "type": "Review",
    }
    async with in_process(create_app(settings_for(tmp_path), open_searcher=lambda _: searcher)) as client:
        await until(client, "/ready", '"ready"')
        reply = await client.get("/", params=form)
    journals = ("Lancet", "Lancet, North American edition")
    filters = Filters(year_from=2001, journals=journals, mesh_terms=("Gout",), publication_types=("Review",))
    assert searcher.asked == [Query("gout", 4, "bm25", highlight=True, filters=filters)]
    assert reply.status_code == 200
    assert all(f'value="{value}"' in reply.text for name, value in form.items() if name in ("k", "year_from", "mesh"))


@pytest.mark.anyio
async def test_nothing_planted_in_a_query_or_a_paper_becomes_markup(address: str) -> None:
    async with httpx.AsyncClient(base_url=address, trust_env=False) as client:
        for name in ("q", "journal", "mode", "year_from", "like"):
            page = (await client.get("/", params={"q": "gout script", name: f'"{PLANTED}', "k": "100"})).text
            assert not re.search(r"<(script|img)\b", page)
        reply = await client.get("/", params={"q": "gout script", "k": "100"})
        assert "&lt;script&gt;" in reply.text
        assert "script" not in reply.headers["content-security-policy"].replace("default-src 'none'", "")
        assert "unsafe" not in reply.headers["content-security-policy"]


@pytest.mark.anyio
async def test_a_wrong_field_is_said_on_the_page_and_an_unready_service_too(address: str, tmp_path: Path) -> None:
    async with httpx.AsyncClient(base_url=address, trust_env=False) as client:
        wrong = await client.get("/", params={"q": "gout", "year_from": "last"})
        assert wrong.status_code == 422
        assert "year_from is &#39;last&#39;; expected a number" in wrong.text
        assert (await client.get("/", params={"q": "x" * 2001})).status_code == 422
        assert "There is no paper with PMID 77777" in (await client.get("/", params={"like": "77777"})).text

    def never(_: object) -> WordSearcher:
        raise RuntimeError("no")

    async with in_process(create_app(settings_for(tmp_path), open_searcher=never)) as client:
        assert (await client.get("/")).status_code == 200
        unready = await client.get("/", params={"q": "gout"})
        assert unready.status_code == 503
        assert "Not ready" in unready.text


@pytest.mark.parametrize(
    ("text", "sentence", "parts"),
    [
        ("One. Two. Three.", "Two.", ("One. ", "Two.", " Three.")),
        ("One.", "Two.", ("One.", "", "")),
        ("One.", "", ("One.", "", "")),
    ],
)
def test_the_marked_sentence_stands_in_its_abstract(text: str, sentence: str, parts: tuple[str, str, str]) -> None:
    assert marked(text, sentence) == parts


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["with scripts", "without scripts"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")),
            executable_path=CHROMIUM,
            headless=True,
            args=list(QUIET),
            java_script_enabled=request.param == "with scripts",
            viewport={"width": 390, "height": 844},
        )
        try:
            yield context.pages[0]
        finally:
            context.close()


@needs_chromium
def test_a_question_is_typed_and_answered_with_the_keyboard_alone(page: Page, address: str) -> None:
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.goto(address)
    page.locator("#q:focus").wait_for()
    page.keyboard.type("metformin sepsis")
    page.keyboard.press("Enter")
    page.wait_for_selector("article")
    assert page.title() == "metformin sepsis – PubMed search"
    assert page.input_value("#q") == "metformin sepsis"
    first = page.locator("article").first
    link = first.locator("h3 a")
    assert link.inner_text() == "Metformin in sepsis"
    assert link.get_attribute("href") == "https://pubmed.ncbi.nlm.nih.gov/1000/"
    assert "Journal of Tests · 2021 · PMID 1000" in first.inner_text()
    assert first.locator("mark").first.inner_text() == PAPERS[0].abstract
    assert "words 2.0" in first.inner_text()
    first.get_by_text("Similar papers").click()
    page.wait_for_selector("article")
    assert page.locator("h2").inner_text() == "Papers similar to PMID 1000"
    assert not problems


@needs_chromium
def test_filters_stay_filled_in_and_open(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_text("Filters and mode").click()
    page.get_by_label("From year").fill("2020")
    page.get_by_label("Search by").select_option("bm25")
    page.fill("#q", "gout")
    page.get_by_role("button", name="Search").click()
    page.wait_for_selector("article")
    assert page.get_by_label("From year").input_value() == "2020"
    assert page.get_by_label("Search by").input_value() == "bm25"


@needs_chromium
def test_a_phone_never_scrolls_sideways_and_nothing_planted_runs(page: Page, address: str) -> None:
    page.goto(f"{address}/?q=gout script {'x' * 300}&k=100")
    page.wait_for_selector("article")
    assert page.title() != "planted"
    widest = page.locator("html").evaluate("all => all.scrollWidth") if page.title() else 0
    assert widest <= 390
