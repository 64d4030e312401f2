"""A real Prometheus with our configuration and rules, beside the real services: every query of the dashboards has data.

Search, solver and the trainer's status page are processes of their own, so that each job has only its own numbers.
Other exporters are played by the samples in tests/exporters/, with counters that grow. Prometheus is Debian's.
"""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
import structlog
import yaml
from corpora import publish_corpus
from retrieval_world import PAPERS, environment, needs_minilm, settings_for
from test_retrieval_cache import needs_redis, redis_at
from tiny_model import save_tiny_model

from monitoring.dashboards.__main__ import DASHBOARDS
from services.retrieval.build import build

ROOT = Path(__file__).parents[1]
RATE = "10s"  # Grafana's span of a rate with scrapes a second apart
EXPORTERS = {"redis": "redis", "gpu": "dcgm", "containers": "cadvisor", "solver": "sglang"}  # job → its sample
PATIENCE_S = 120.0
QUERIES = {
    f"{dashboard.name}: {row.title}: {panel.title}: {query.expr}": query.expr.replace("$__rate_interval", RATE)
    for dashboard in DASHBOARDS
    for row in dashboard.rows
    for panel in row.panels
    for query in panel.queries
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus on the path (Debian's package)"),
    needs_minilm,
    needs_redis,
]


@dataclass
class World:
    """Prometheus, what it scrapes, and the processes behind it."""

    ports: dict[str, int]
    processes: dict[str, "subprocess.Popen[str]"] = field(default_factory=dict)
    began: float = field(default_factory=time.time)

    def ask(self, path: str, **parameters: Any) -> Any:
        """`data` of a reply of Prometheus' API."""
        url = f"http://127.0.0.1:{self.ports['prometheus']}/api/v1/{path}"
        reply = httpx.get(url, params=parameters, trust_env=False, timeout=30)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    def now(self, expression: str) -> list[float]:
        """The values of a query at this moment."""
        return [float(one["value"][1]) for one in self.ask("query", query=expression)["result"]]

    def ever(self, expression: str) -> bool:
        """Whether a query has a number at any moment so far."""
        found = self.ask("query_range", query=expression, start=self.began, end=time.time(), step=1)["result"]
        return any(math.isfinite(float(value)) for series in found for _, value in series["values"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    publish_corpus(folder, PAPERS)
    build(settings_for(folder), structlog.get_logger())
    with ExitStack() as stack:
        stack.enter_context(redis_at(folder))
        one = World(free_ports("retrieval", "solver", "trainer", "prometheus"))
        for service, command in commands(folder, one.ports).items():
            one.processes[service] = stack.enter_context(running(command, variables(folder, one.ports)))
        exporters = {job: stack.enter_context(exporter(name)) for job, name in EXPORTERS.items()}
        command = prometheus_command(folder, one.ports, exporters)
        one.processes["prometheus"] = stack.enter_context(running(command, dict(os.environ)))
        wait_until("Prometheus", lambda: answers(f"http://127.0.0.1:{one.ports['prometheus']}/-/ready"))
        wait_until("all services", lambda: len(one.now('up{job=~"retrieval|solver|trainer"} == 1')) >= len(one.ports))
        wait_until("search", lambda: answers(f"http://127.0.0.1:{one.ports['retrieval']}/ready"))
        yield one


def free_ports(*names: str) -> dict[str, int]:
    with ExitStack() as held:
        sockets = {name: held.enter_context(socket.create_server(("127.0.0.1", 0))) for name in names}
        return {name: int(one.getsockname()[1]) for name, one in sockets.items()}


def variables(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    given = {
        "REDIS__URL": f"unix://{folder}/redis.sock",
        "STORAGE__SCRATCH_DIR": str(folder / "scratch"),
        "SOLVER__MODEL": str(folder / "model"),
        "SOLVER__CONTEXT_TOKENS": "256",
        "SOLVER__DTYPE": "float32",
        "TRAINER__PRICE_PER_HOUR": "2.5",
        **{f"{name.upper()}__PORT": str(ports[name]) for name in ("retrieval", "solver", "trainer")},
    }
    return environment(folder, **given) | {"PYTHONPATH": str(ROOT)}


def commands(folder: Path, ports: dict[str, int]) -> dict[str, list[str]]:
    model = Path(save_tiny_model(folder / "model"))
    (model / "chat_template.jinja").write_bytes((ROOT / "shared/chat_template.jinja").read_bytes())
    return {
        "retrieval": [sys.executable, "-m", "services.retrieval"],
        "solver": [sys.executable, "-m", "services.solver"],
        "trainer": [sys.executable, str(ROOT / "tests/trainer_page.py")],
    }


@contextmanager
def running(command: list[str], environ: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def exporter(name: str) -> Iterator[int]:
    """The sample of an exporter at a port, with counters and histograms larger at each scrape."""
    text = (ROOT / f"tests/exporters/{name}.prom").read_text(encoding="utf-8")
    scrapes = iter(range(1, 10**6))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = grown(text, next(scrapes)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def grown(text: str, times: int) -> str:
    """A sample with its counters and histograms `times` as large."""
    lines, grows = [], False
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            grows = line.endswith((" counter", " histogram"))
        elif grows and not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            line = f"{series} {float(value) * times}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def prometheus_command(folder: Path, ports: dict[str, int], exporters: dict[str, int]) -> list[str]:
    """Prometheus with our configuration, but for addresses and a scrape a second."""
    config = yaml.safe_load((ROOT / "monitoring/prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "monitoring/rules/*.yml")]
    del config["alerting"]
    for job in config["scrape_configs"]:
        name = job["job_name"]
        job.pop("scrape_interval", None)
        job.pop("dns_sd_configs", None)
        found = [places[name] for places in (ports, exporters) if name in places]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in found]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{ports['prometheus']}", "--log.level=error",
    ]  # fmt: skip


def wait_until(what: str, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:.0f} s"
        time.sleep(0.5)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.TransportError:
        return False


def use_services(world: World) -> None:
    """A search, a completion, and weights that are loaded again."""
    search = {"queries": [f"metformin in sepsis {time.time()}"], "top_k": 2}  # not one that Redis keeps
    post(world.ports["retrieval"], "/search", search)
    post(world.ports["solver"], "/v1/completions", {"model": "solver", "prompt": "abc", "max_tokens": 4})
    folder = httpx.get(f"http://127.0.0.1:{world.ports['solver']}/get_model_info", trust_env=False).json()["model_path"]
    post(world.ports["solver"], "/update_weights_from_disk", {"model_path": folder})


def post(port: int, path: str, body: dict[str, Any]) -> None:
    reply = httpx.post(f"http://127.0.0.1:{port}{path}", json=body, trust_env=False, timeout=60)
    assert reply.status_code == 200, reply.text


def finish_step(world: World) -> None:
    """Let the trainer show its next recorded step."""
    stream = world.processes["trainer"].stdin
    assert stream
    stream.write("\n")
    stream.flush()


def test_every_query_of_the_dashboards_has_data(world: World) -> None:
    for part in ("difficulty", "exact_match"):  # of a proposer's step and of the solver's
        finish_step(world)
        use_services(world)
        wait_until(part, lambda part=part: world.ever(f'drzero_trainer_reward_mean{{part="{part}"}}'))  # type: ignore[misc]

    missing = set(QUERIES)
    deadline = time.monotonic() + 60
    while missing and time.monotonic() < deadline:
        use_services(world)
        missing = {name for name in missing if not world.ever(QUERIES[name])}
    assert missing == set()


def test_every_rule_can_be_evaluated(world: World) -> None:
    rules = [rule for group in world.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 30
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}


def test_a_healthy_world_raises_no_alert_of_ours(world: World) -> None:
    firing = world.ask("query", query='ALERTS{alertname!~"ExporterDown|TrainingAlarm"}')["result"]
    assert [one["metric"]["alertname"] for one in firing] == []


def test_a_trainer_that_ends_well_is_seen_to_have_finished(world: World) -> None:
    trainer = world.processes["trainer"]
    assert trainer.stdin
    trainer.stdin.close()
    assert trainer.wait(timeout=60) == 0
    wait_until("the end is seen", lambda: world.now('up{job="trainer"}') == [0.0])
    assert world.now('last_over_time(drzero_trainer_finished{job="trainer"}[5m])') == [1.0]
    assert world.now('ALERTS{alertname="TrainerDown"}') == []


def test_a_killed_search_service_raises_its_alert(world: World) -> None:
    world.processes["retrieval"].send_signal(signal.SIGKILL)
    wait_until("the alert", lambda: bool(world.now('ALERTS{alertname="ServiceDown", job="retrieval"}')))
