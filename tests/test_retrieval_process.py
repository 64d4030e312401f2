"""The service as a process: it starts, answers, ends well, and says in one sentence why it cannot start."""

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import structlog
from corpora import publish_corpus
from retrieval_world import PAPERS, environment, needs_minilm, settings_for

from services.retrieval.build import build
from shared.clients import SearchClient
from shared.records import Hit


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def service(folder: Path, port: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "services.retrieval"],
        env=environment(folder, RETRIEVAL__PORT=str(port)),
        stderr=subprocess.PIPE,
        text=True,
    )


def last_words(process: "subprocess.Popen[str]") -> str:
    """The sentence after the log lines, once the process has ended by itself."""
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    return errors.strip().splitlines()[-1]


@needs_minilm
def test_the_process_lives_at_once_answers_when_ready_and_ends_well_on_sigterm(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    build(settings_for(tmp_path), structlog.get_logger())
    port = free_port()
    process = service(tmp_path, port)

    async def ask() -> list[list[Hit]]:
        async with SearchClient(f"http://127.0.0.1:{port}", patience_s=60) as client:
            assert await client.call("GET", "/health") == {"status": "alive"}
            assert await client.call("GET", "/ready") == {"status": "ready"}
            return await client.search([PAPERS[3].text, PAPERS[9].text], 1)

    try:
        assert [hits[0].paper for hits in asyncio.run(ask())] == [PAPERS[3], PAPERS[9]]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "listening" in errors
    assert "Traceback" not in errors


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = int(other.getsockname()[1])
        process = service(tmp_path, port)
        words = last_words(process)
    assert process.returncode == 1
    assert words.startswith(f"retrieval: port {port} of 127.0.0.1 is in use")


def test_a_missing_corpus_ends_the_process_with_one_sentence(tmp_path: Path) -> None:
    process = service(tmp_path, free_port())
    words = last_words(process)
    assert process.returncode == 1
    assert words.startswith("retrieval: expected")
    assert "`python -m services.ingest`" in words


@needs_minilm
def test_an_index_of_another_corpus_ends_the_process_with_one_sentence(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS[:3])
    build(settings_for(tmp_path), structlog.get_logger())
    publish_corpus(tmp_path, PAPERS[:4])
    port = free_port()
    process = service(tmp_path, port)
    words = last_words(process)
    assert process.returncode == 1
    assert words.startswith("retrieval: index made from another corpus")
    with httpx.Client(trust_env=False) as client:
        try:
            client.get(f"http://127.0.0.1:{port}/health")
        except httpx.ConnectError:
            return
    raise AssertionError("somebody still answers on the port")
