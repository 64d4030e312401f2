"""The page that answers: no JavaScript, everything escaped, few questions at once, and usable in a real browser."""

import asyncio
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_services import CRASH, Fault
from playwright.sync_api import Page, sync_playwright
from retrieval_world import serving
from round_world import World, settings_at, world_of
from using_world import call_for, searched, searches_once, started

from services.trainer.ask import NOTICE, Answer, Source, Step, served_tokens
from services.trainer.ask_page import AT_ONCE, create_app, shown
from shared.settings import Settings

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

QUESTION = "Which kinase does imatinib block?"
PLANTED = '<script>document.title = "planted"</script><img src=x onerror="document.title = \'planted\'">'
SETTINGS = Settings()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def page_of(world: World, folder: Path, **changes: Any) -> Any:
    settings = settings_at(folder, world.url, **changes)
    return create_app(settings, served_tokens(settings))


def nasty(body: dict[str, Any]) -> str:
    """Plants markup in thought, query and answer."""
    turn = call_for(PLANTED) if not searched(body) else f"<answer>{PLANTED}{'x' * 300}</answer>"
    return f"{PLANTED}{turn}"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    with ExitStack() as worlds:
        world = worlds.enter_context(world_of(searches_once, model="/weights/one"))
        yield worlds.enter_context(serving(page_of(world, folder)))


@pytest.fixture(scope="module")
def nasty_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("nasty")
    with ExitStack() as worlds:
        world = worlds.enter_context(world_of(nasty, model=PLANTED, pmid=PLANTED))
        yield worlds.enter_context(serving(page_of(world, folder)))


# ---- without a browser -----------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """Tags, and all text and attributes, of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag."""
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        """A text."""
        self.text += data


def answer_of(text: str) -> Answer:
    """An answer all of whose texts are this."""
    paper = Source(text, text, text, text, "https://pubmed.ncbi.nlm.nih.gov/7/", shown=True, cited=True)
    step = Step(text, (text,), (paper,))
    unseen = replace(paper, title="", shown=False)
    return Answer(text, text, "answered", (step,), (paper, unseen), text, 1.5)


@given(st.one_of(st.text(), st.sampled_from([PLANTED, "'\"><b>", "{{ 7 * 7 }}", "&lt;i&gt;", "</title><script>"])))
def test_no_text_changes_the_markup_of_the_page_and_every_text_is_read_as_it_was(text: str) -> None:
    def seen(word: str) -> Seen:
        found = shown(word, SETTINGS, answer=answer_of(word), problem=word)
        return Seen(bytes(found.body).decode())

    page, plain = seen(f"x{text}"), seen("x")
    assert page.tags == plain.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    wanted = f"x{text}".replace("\r\n", "\n").replace("\r", "\n")
    values = [(value or "").replace("\r\n", "\n").replace("\r", "\n") for name, value in page.attributes]
    assert wanted in values
    assert page.text.replace("\r\n", "\n").replace("\r", "\n").count(wanted) >= 8


@pytest.mark.anyio
async def test_a_question_is_answered_with_its_papers_and_searches(address: str) -> None:
    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=30) as client:
        empty = await client.get("/")
        reply = await client.get("/", params={"q": QUESTION})
        style = await client.get("/ask.css")
    assert (empty.status_code, reply.status_code, style.headers["content-type"]) == (
        200,
        200,
        "text/css; charset=utf-8",
    )
    assert "Answer" not in empty.text
    for part in (QUESTION, "BCR-ABL", "I look it up.", "Searches: imatinib kinase", "A paper", "/weights/one", NOTICE):
        assert part in reply.text
    assert 'href="https://pubmed.ncbi.nlm.nih.gov/7/"' in reply.text
    assert "cited, but never shown to the model" in reply.text


@pytest.mark.anyio
async def test_scripts_and_anything_from_elsewhere_are_forbidden_on_every_reply(address: str) -> None:
    async with httpx.AsyncClient(base_url=address, trust_env=False, timeout=30) as client:
        replies = [await client.get("/", params={"q": q}) for q in ("", " ", QUESTION)] + [await client.get("/ask.css")]
        assert (await client.get("/docs")).status_code == (await client.get("/openapi.json")).status_code == 404
    for reply in replies:
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert "script-src" not in policy
        assert (reply.headers["x-content-type-options"], reply.headers["cache-control"]) == ("nosniff", "no-store")
        assert "<script" not in reply.text


@pytest.mark.anyio
async def test_nothing_planted_in_a_question_a_paper_or_a_model_becomes_markup(nasty_address: str) -> None:
    async with httpx.AsyncClient(base_url=nasty_address, trust_env=False, timeout=30) as client:
        for question in (f'"{PLANTED}', PLANTED * 40):
            reply = await client.get("/", params={"q": question})
            assert not re.search(r"<(script|img)\b", reply.text)
            assert "&lt;script&gt;" in reply.text


@pytest.mark.anyio
@pytest.mark.parametrize(("question", "words"), [("  ", "found none"), ("x" * 2001, "found one of 2001")])
async def test_a_question_that_is_refused_is_said_on_the_page(address: str, question: str, words: str) -> None:
    async with httpx.AsyncClient(base_url=address, trust_env=False) as client:
        reply = await client.get("/", params={"q": question})
    assert reply.status_code == 422
    assert words in reply.text


@pytest.mark.anyio
@pytest.mark.parametrize("fault", [CRASH, Fault(404)])
async def test_a_service_that_fails_is_said_on_the_page_with_503(tmp_path: Path, fault: Fault) -> None:
    with world_of(lambda _: fault) as world, serving(page_of(world, tmp_path)) as url:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client:
            reply = await client.get("/", params={"q": QUESTION})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "10")
    assert 'role="alert">solver: ' in reply.text


@pytest.mark.anyio
async def test_few_questions_are_answered_at_once_and_who_goes_away_frees_a_place(tmp_path: Path) -> None:
    entered, go = threading.Semaphore(0), threading.Event()

    def waits(body: dict[str, Any]) -> str:
        entered.release()
        assert go.wait(60)
        return searches_once(body)

    with world_of(waits) as world, serving(page_of(world, tmp_path)) as url:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
            asked = [asyncio.create_task(client.get("/", params={"q": QUESTION})) for _ in range(AT_ONCE)]
            for _ in asked:
                assert await asyncio.to_thread(entered.acquire, timeout=30)
            beyond = await client.get("/", params={"q": QUESTION})
            assert (beyond.status_code, beyond.headers["retry-after"]) == (503, "10")
            assert (await client.get("/")).status_code == 200
            asked[0].cancel()
            further = asyncio.create_task(until_answered(client))
            assert await asyncio.to_thread(entered.acquire, timeout=30)
            go.set()
            replies = await asyncio.gather(*asked[1:], further)
    assert [reply.status_code for reply in replies] == [200] * AT_ONCE


async def until_answered(client: httpx.AsyncClient) -> httpx.Response:
    """Ask until there is a place."""
    async with asyncio.timeout(30):
        while (reply := await client.get("/", params={"q": QUESTION})).status_code == 503:
            pass
    return reply


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_the_page_until_it_is_stopped(tmp_path: Path, stop: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    with world_of(searches_once) as world:
        settings = settings_at(tmp_path, world.url, trainer__port=port)
        process = started("ask", "--page", settings=settings)
        assert process.stderr is not None
        assert f"http://127.0.0.1:{port}/" in process.stderr.readline()
        reply = httpx.get(f"http://127.0.0.1:{port}/", params={"q": QUESTION}, trust_env=False, timeout=30)
        second = started("ask", "--page", settings=settings)
        _, taken = second.communicate(timeout=60)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
    assert "BCR-ABL" in reply.text
    assert (second.returncode, len(taken.splitlines())) == (1, 1)
    assert f"port {port} of 127.0.0.1 is in use" in taken
    assert "Traceback" not in errors
    assert process.returncode in (130, -stop)


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
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer")
    assert page.title() == f"{QUESTION} – Dr. Zero Biomedical"
    assert page.input_value("#q") == QUESTION
    assert page.locator(".answer").inner_text() == "BCR-ABL"
    first = page.locator("article").first
    assert first.locator("a").inner_text() == "A paper"
    assert first.locator("a").get_attribute("href") == "https://pubmed.ncbi.nlm.nih.gov/7/"
    assert "no medical advice" in page.locator(".notice").inner_text()
    assert not problems


@needs_chromium
def test_a_phone_never_scrolls_sideways_and_nothing_planted_runs(page: Page, nasty_address: str) -> None:
    page.goto(f"{nasty_address}/?q={'x' * 300}")
    page.wait_for_selector(".answer")
    assert page.title() != "planted"
    assert page.locator("html").evaluate("all => all.scrollWidth") <= 390
