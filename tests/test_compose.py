"""The whole loop in containers: build, start, train to the end, survive a killed service, tear down.

Needs a Docker engine from 20.10 on and Compose v2; `make compose-test` asks for both first. The stack has a project
name and host ports of its own, so it runs beside others.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parent.parent
PORTS = ("RETRIEVAL_PORT", "SOLVER_PORT", "TRAINER_PORT")
SERVICES = ("redis", "ingest", "index", "retrieval", "solver", "trainer")
TRAINING_S = 1200

pytestmark = pytest.mark.compose


@dataclass(frozen=True)
class Stack:
    """A running Compose project."""

    environ: dict[str, str]

    def compose(self, *arguments: str, timeout_s: float = 600.0) -> str:
        """Standard output of one `docker compose` command; fails the test with its errors."""
        return docker("compose", *arguments, environ=self.environ, timeout_s=timeout_s)

    def url(self, port: str) -> str:
        """Where the host reaches the service of a port variable."""
        return f"http://127.0.0.1:{self.environ[port]}"

    def state(self, service: str) -> dict[str, Any]:
        """What the engine says about a service's container."""
        container = self.compose("ps", "--all", "--quiet", service).strip()
        inspected: dict[str, Any] = json.loads(docker("inspect", container))[0]
        return inspected


def docker(*arguments: str, environ: dict[str, str] | None = None, timeout_s: float = 60.0) -> str:
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr[-3000:]}"
    return done.stdout


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until(what: str, true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(1)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """The stack, built and started; the trainer has begun."""
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    one = Stack({"COMPOSE_PROJECT_NAME": f"drzero-test-{os.getpid()}", **ports})
    try:
        one.compose("build", timeout_s=1800)
        one.compose("up", "--detach", timeout_s=900)
        yield one
    finally:
        logs = one.compose("logs", "--no-color", "--tail", "40")
        print(logs)  # pytest shows it when a test of this module fails
        one.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")


def test_services_answer_from_outside_the_containers(stack: Stack) -> None:
    assert answers(stack.url("RETRIEVAL_PORT") + "/ready")
    assert answers(stack.url("SOLVER_PORT") + "/health")
    wait_until("the trainer's status page", lambda: answers(stack.url("TRAINER_PORT") + "/health"), 120)

    search = {"queries": ["risk factors of disease", "treatment"], "top_k": 2}
    results = post(stack.url("RETRIEVAL_PORT") + "/search", search)["results"]
    assert [len(one["hits"]) for one in results] == [2, 2]

    retrieve = {"queries": ["treatment"], "topk": 3, "return_scores": True}
    hits = post(stack.url("RETRIEVAL_PORT") + "/retrieve", retrieve)["result"][0]
    assert len(hits) == 3
    assert all({"id", "contents"} <= hit["document"].keys() and "score" in hit for hit in hits)


def post(url: str, body: dict[str, Any]) -> Any:
    reply = httpx.post(url, json=body, timeout=60, trust_env=False)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("service", SERVICES)
def test_containers_can_do_little(stack: Stack, service: str) -> None:
    container = stack.state(service)
    host = container["HostConfig"]
    assert container["Config"]["User"] not in ("", "0", "root")
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    published = [one for many in (host["PortBindings"] or {}).values() for one in many]
    assert {one["HostIp"] for one in published} <= {"127.0.0.1"}


def test_the_ncbi_key_reaches_only_ingest(stack: Stack) -> None:
    environ = {**stack.environ, "NCBI_API_KEY": "not-a-key"}
    config = json.loads(docker("compose", "config", "--format", "json", environ=environ))
    environments = {name: one.get("environment") or {} for name, one in config["services"].items()}
    holders = {name for name, variables in environments.items() if "not-a-key" in variables.values()}
    assert holders == {"ingest"}


def test_the_run_finishes_although_retrieval_is_killed(stack: Stack) -> None:
    assert stack.state("trainer")["State"]["Running"], "the run ended before retrieval could be killed"
    # A signal from the host, because the engine takes `docker kill` for a wish and would not restart the container.
    os.kill(stack.state("retrieval")["State"]["Pid"], signal.SIGKILL)
    wait_until("retrieval's restart", lambda: stack.state("retrieval")["RestartCount"] == 1, 60)
    wait_until("retrieval after its restart", lambda: answers(stack.url("RETRIEVAL_PORT") + "/ready"), 180)

    wait_until("the run's end", lambda: stack.state("trainer")["State"]["Status"] == "exited", TRAINING_S)
    assert stack.state("trainer")["State"]["ExitCode"] == 0


def test_the_report_is_in_the_data_volume(stack: Stack, tmp_path: Path) -> None:
    stack.compose("cp", "--follow-link", "trainer:/data/runs/demo/1/report/report.html", str(tmp_path))
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_one_stage_runs_alone(stack: Stack) -> None:
    said = stack.compose("run", "--rm", "trainer", "--from", "report", timeout_s=300)
    assert "report.html" in said
