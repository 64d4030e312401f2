"""The API token: who is let in where, what a page of elsewhere may ask, and where the token never stands."""

import asyncio
import base64
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from corpora import publish_corpus
from hypothesis import given
from hypothesis import strategies as st
from retrieval_world import PAPERS, WordSearcher, environment, needs_minilm, serving, settings_for
from test_retrieval_process import free_port

from services.retrieval.app import create_app
from shared.access import Hidden, api_token, exposed, presented, token_headers
from shared.clients import Refused, SearchClient
from shared.settings import Settings, SettingsError, build_settings

ROOT = Path(__file__).parents[1]
TOKEN = "planted-0123456789abcdef"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
QUERY = {"queries": ["aspirin"], "top_k": 1}


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()}


def words(_: Settings) -> WordSearcher:
    return WordSearcher()


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A search service that wants the token."""
    monkeypatch.setenv("DRZERO_API_TOKEN", TOKEN)
    with serving(create_app(settings_for(tmp_path), open_searcher=words)) as url:
        yield url


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/info", "/documents/1", "/similar/1"])
def test_without_the_token_nothing_is_read(address: str, path: str) -> None:
    reply = httpx.get(address + path)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"].startswith("Basic ")
    assert "DRZERO_API_TOKEN" in reply.json()["detail"]
    assert reply.json()["request_id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer no"}, basic("no"), basic(""),
     {"Authorization": "Basic !!"}, {"Authorization": f"Token {TOKEN}"},
     {"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": f"Bearer {TOKEN}x"}],
)  # fmt: skip
def test_a_search_needs_the_whole_token(address: str, headers: dict[str, str]) -> None:
    assert httpx.post(f"{address}/search", json=QUERY, headers=headers).status_code == 401


@pytest.mark.parametrize("headers", [BEARER, basic(TOKEN), {"authorization": f"bearer {TOKEN}"}])
def test_the_token_lets_in_by_either_way(address: str, headers: dict[str, str]) -> None:
    assert httpx.get(address, headers=headers).status_code == 200
    assert httpx.post(f"{address}/search", json=QUERY, headers=headers).status_code in (200, 503)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_need_no_token_to_be_read(address: str, path: str) -> None:
    assert httpx.get(address + path).status_code in (200, 503)
    assert httpx.post(address + path).status_code == 401


def test_our_own_clients_send_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def search() -> int:
        async with SearchClient(address, patience_s=20) as client:
            return len(await client.search(["aspirin"], 1))

    assert asyncio.run(search()) == 1
    monkeypatch.delenv("DRZERO_API_TOKEN")
    with pytest.raises(Refused, match="401"):
        asyncio.run(search())


@pytest.mark.parametrize("token", ["", TOKEN])
def test_a_page_of_another_site_changes_nothing_with_or_without_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("DRZERO_API_TOKEN", token)
    with serving(create_app(settings_for(tmp_path), open_searcher=words)) as url:
        for site, allowed in (("cross-site", False), ("same-site", False), ("same-origin", True), ("none", True)):
            reply = httpx.post(f"{url}/search", json=QUERY, headers=BEARER | {"Sec-Fetch-Site": site})
            assert (reply.status_code != 403) == allowed
        elsewhere = BEARER | {"Sec-Fetch-Site": "cross-site"}
        assert httpx.get(url, headers=elsewhere | {"Sec-Fetch-Mode": "no-cors"}).status_code == 403  # as an image
        assert httpx.get(url, headers=elsewhere | {"Sec-Fetch-Mode": "navigate"}).status_code == 200  # a link to us


def test_without_a_token_everybody_is_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRZERO_API_TOKEN", raising=False)
    with serving(create_app(settings_for(tmp_path), open_searcher=words)) as url:
        assert httpx.get(url).status_code == 200


@given(st.binary(max_size=60))
def test_no_header_is_too_odd_to_read(header: bytes) -> None:
    assert isinstance(presented(header), bytes)


def test_the_token_comes_from_the_variable_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    assert api_token({}) is None
    assert api_token({"DRZERO_API_TOKEN": ""}) is None
    assert api_token({"DRZERO_API_TOKEN": TOKEN, "DRZERO_API_TOKEN_FILE": "/nowhere"}) == TOKEN
    assert api_token({"DRZERO_API_TOKEN_FILE": str(file)}) == TOKEN
    assert token_headers({"DRZERO_API_TOKEN": TOKEN}) == BEARER
    with pytest.raises(SettingsError, match="no such file"):
        api_token({"DRZERO_API_TOKEN_FILE": str(tmp_path / "none")})


@pytest.mark.parametrize("token", ["short", "x" * 15, "with space " + "x" * 20, "ümlaut" + "x" * 20])
def test_a_weak_or_unsendable_token_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(SettingsError, match="openssl rand") as refused:
        api_token({"DRZERO_API_TOKEN": token})
    assert token not in str(refused.value)


def test_the_token_is_no_setting() -> None:
    settings = build_settings({"DRZERO_API_TOKEN": TOKEN})
    assert settings == build_settings({})
    with pytest.raises(SettingsError, match="DRZERO_API_TOKENS"):
        build_settings({"DRZERO_API_TOKENS": TOKEN})


def test_only_a_port_for_others_without_a_token_is_exposed() -> None:
    assert [exposed(host, {}) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "10.0.0.7")] == [
        False, False, False, True, True, True,
    ]  # fmt: skip
    assert not exposed("0.0.0.0", {"DRZERO_API_TOKEN": TOKEN})


@dataclasses.dataclass
class Flags:
    """As SGLang's, which are written to its log."""

    api_key: str | None


def test_a_hidden_text_shows_in_no_representation_and_is_otherwise_the_text() -> None:
    hidden = Hidden(TOKEN)
    again = pickle.loads(pickle.dumps(Flags(hidden)))  # noqa: S301
    for shown in (repr(hidden), repr(Flags(hidden)), repr(again), f"{[hidden]}"):
        assert TOKEN not in shown
    assert hidden == TOKEN == again.api_key
    assert f"Bearer {hidden}" == BEARER["Authorization"]


def test_sglang_gets_the_token_and_logs_none(tmp_path: Path) -> None:
    """With a stand-in for SGLang: its two modules as far as they read, log and use flags."""
    package = tmp_path / "sglang" / "srt"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "server_args.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass ServerArgs:\n    port: int\n    api_key: str | None = None\n"
        "def prepare_server_args(words):\n    return ServerArgs(port=int(words[1]))\n"
    )
    (package.parent / "launch_server.py").write_text(
        "import sys\nfrom sglang.srt.server_args import prepare_server_args\n"
        "if __name__ == '__main__':\n    args = prepare_server_args(sys.argv[1:])\n"
        "    print(f'{args=}', len(args.api_key or ''))\n"
    )
    for token, length in ((TOKEN, len(TOKEN)), ("", 0)):
        variables = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "DRZERO_API_TOKEN": token}
        command = [sys.executable, "-m", "services.solver.sglang_server", "--port", "9"]
        said = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert said.strip().endswith(f") {length}")
        assert "port=9" in said
        assert TOKEN not in said


@needs_minilm
def test_a_planted_secret_stands_in_no_log_manifest_or_reply(tmp_path: Path) -> None:
    secrets = {"DRZERO_API_TOKEN": TOKEN, "HF_TOKEN": "hf_planted_9876543210", "NCBI_API_KEY": "ncbi-planted-54321"}
    publish_corpus(tmp_path, PAPERS)
    port = free_port()
    variables = environment(tmp_path, RETRIEVAL__PORT=str(port), LOG__LEVEL="debug") | secrets
    python = [sys.executable, "-m"]
    said = subprocess.run(
        [*python, "services.retrieval.build"], env=variables, cwd=ROOT, capture_output=True, text=True, check=True
    )
    texts = [said.stdout, said.stderr]
    listed = subprocess.run([*python, "shared.settings_table"], env=variables, cwd=ROOT, capture_output=True, text=True)
    texts += [listed.stdout, listed.stderr]
    service = subprocess.Popen(
        [*python, "services.retrieval"],
        env=variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=5)) as client:
            asyncio.run(ready(f"http://127.0.0.1:{port}"))
            for headers in (BEARER, basic("wrong-" + "x" * 20)):
                texts += [
                    client.post("/search", json=QUERY, headers=headers).text,
                    client.get("/info", headers=headers).text,
                ]
            texts.append(client.get("/metrics").text)
    finally:
        service.terminate()
        texts.append(service.communicate()[0])
    texts += [path.read_text("utf-8", "replace") for path in tmp_path.rglob("*") if path.is_file()]
    for secret in secrets.values():
        assert not [text[:200] for text in texts if secret in text]


async def ready(url: str) -> None:
    async with SearchClient(url, patience_s=60) as client:
        await client.call("GET", "/ready")
