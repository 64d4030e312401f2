"""The service as a process: it starts, answers, ends well, and says in one sentence why it cannot start."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
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


def cpu_seconds(process: int) -> float:
    """What a process has computed so far: its time on an idle machine, whatever else runs on this one."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


@needs_minilm
def test_killed_under_load_it_is_back_and_ready_within_ten_seconds_with_the_same_answers(tmp_path: Path) -> None:
    publish_corpus(tmp_path, PAPERS)
    build(settings_for(tmp_path), structlog.get_logger())
    port = free_port()
    process = service(tmp_path, port)

    async def client(first: list[Hit]) -> None:
        async with SearchClient(f"http://127.0.0.1:{port}", patience_s=60) as search:
            while True:
                assert (await search.search([PAPERS[5].text], 3))[0] == first

    async def load_and_kill() -> list[Hit]:
        async with SearchClient(f"http://127.0.0.1:{port}", patience_s=60) as search:
            await search.call("GET", "/ready")
            ((*first,),) = await search.search([PAPERS[5].text], 3)
            clients = [asyncio.create_task(client(first)) for _ in range(16)]
            for _ in range(20):
                await search.search([PAPERS[6].text], 3)
        process.kill()
        process.wait()
        for task in clients:
            task.cancel()
        ended = await asyncio.gather(*clients, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
        return first

    async def ask() -> list[Hit]:
        async with SearchClient(f"http://127.0.0.1:{port}", patience_s=60) as search:
            await search.call("GET", "/ready")
            return (await search.search([PAPERS[5].text], 3))[0]

    try:
        first = asyncio.run(load_and_kill())
        process.communicate()
        process = service(tmp_path, port)
        assert asyncio.run(ask()) == first
        assert cpu_seconds(process.pid) <= 10
    finally:
        process.kill()
        process.communicate()


@needs_minilm
@pytest.mark.parametrize("damaged", ["index/vectors.npy", "corpus/shard-00000.parquet"])
def test_a_damaged_file_ends_the_process_with_its_name(tmp_path: Path, damaged: str) -> None:
    publish_corpus(tmp_path, PAPERS)
    build(settings_for(tmp_path), structlog.get_logger())
    file = tmp_path / damaged
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    process = service(tmp_path, free_port())
    words = last_words(process)
    assert process.returncode == 1
    assert f"{file.name} does not have the content its manifest names" in words
