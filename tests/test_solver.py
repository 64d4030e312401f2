"""The solver service: SGLang's command line from settings, and the CPU server over HTTP on a tiny model."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn
from tiny_model import save_tiny_model

from services.solver.server import create_app
from services.solver.sglang import sglang_command
from shared.settings import SolverSettings

ROOT = Path(__file__).parents[1]
SETTINGS = SolverSettings(engine="transformers", context_tokens=256, max_running=8, max_waiting=16, dtype="float32")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    (Path(folder) / "chat_template.jinja").write_bytes((ROOT / "shared" / "chat_template.jinja").read_bytes())
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(SETTINGS, folder), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


def complete(address: str, **body: object) -> httpx.Response:
    return httpx.post(
        f"{address}/v1/completions", json={"model": "solver", "prompt": "abc", "max_tokens": 8, **body}, timeout=60
    )


def test_completions_and_chat_have_openais_form(address: str) -> None:
    done = complete(address, temperature=0).json()
    assert done["choices"][0]["finish_reason"] in {"length", "stop"}
    assert done["usage"]["prompt_tokens"] == 3
    body = {"model": "solver", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    chat = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert [m["id"] for m in httpx.get(f"{address}/v1/models").json()["data"]] == ["solver"]


def test_each_request_is_sampled_at_its_own_temperature(address: str) -> None:
    complete(address, temperature=1.5)  # the first request must not set the temperature of the others
    greedy = {complete(address, temperature=0).json()["choices"][0]["text"] for _ in range(3)}
    assert len(greedy) == 1


def test_requests_in_flight_together_are_generated_together(address: str) -> None:
    def timed(count: int) -> float:
        started = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            replies = list(
                pool.map(lambda _: complete(address, max_tokens=60, temperature=1).status_code, range(count))
            )
        assert replies == [200] * count
        return time.monotonic() - started

    timed(1)
    assert timed(8) < 4 * max(timed(1), 0.05)


@pytest.mark.parametrize(("field", "value"), [("n", 2), ("stream", True), ("stop", ["x"]), ("top_p", 0.5)])
def test_a_field_that_would_be_ignored_is_refused_by_name(address: str, field: str, value: object) -> None:
    reply = complete(address, **{field: value})
    assert reply.status_code == 400
    assert field in reply.text


def test_wrong_model_and_too_long_prompt_are_refused(address: str) -> None:
    assert "other" in complete(address, model="other").text
    reply = complete(address, prompt="x" * 400)
    assert reply.status_code == 400
    assert "context" in reply.text


def test_weights_change_in_place_and_a_wrong_folder_changes_nothing(address: str, tmp_path: Path) -> None:
    before = complete(address, temperature=0).json()["choices"][0]["text"]
    missing = httpx.post(f"{address}/update_weights_from_disk", json={"model_path": str(tmp_path / "no")}, timeout=60)
    assert missing.status_code == 400
    assert missing.json()["success"] is False
    assert complete(address, temperature=0).json()["choices"][0]["text"] == before
    folder = save_tiny_model(tmp_path / "new", seed=3)
    done = httpx.post(f"{address}/update_weights_from_disk", json={"model_path": folder}, timeout=60)
    assert done.json()["success"] is True
    assert complete(address, temperature=0).json()["choices"][0]["text"] != before
    assert httpx.get(f"{address}/get_model_info").json()["model_path"] == folder


def test_health_and_metrics_answer(address: str) -> None:
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    text = httpx.get(f"{address}/metrics").text
    assert 'drzero_solver_requests_total{route="/v1/completions",status="200"}' in text
    assert "drzero_solver_tokens_total" in text


def test_a_port_in_use_ends_in_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = {"DRZERO_SOLVER__PORT": port, "DRZERO_SOLVER__MODEL": str(tmp_path), "PATH": "/usr/bin"}
        ended = subprocess.run(
            [sys.executable, "-m", "services.solver"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith(f"solver: port {port} of 127.0.0.1 is in use")


def test_sglangs_command_carries_the_settings() -> None:
    words = sglang_command(SolverSettings(port=9001, max_running=7), "/models/x")
    flags = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
    assert words[:2] == ["-m", "sglang.launch_server"]
    assert words[-1] == "--enable-metrics"
    assert flags["--port"] == "9001"
    assert flags["--model-path"] == "/models/x"
    assert flags["--max-running-requests"] == "7"
