"""A run as its files show it, written step by step: for tests of the run page."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from retrieval_world import serving
from round_world import json_lines, proposer_verdict, settings_at

from services.trainer.driver import note, only_driver
from services.trainer.page import create_app
from services.trainer.paths import RunPaths
from services.trainer.records import Verdict
from services.trainer.rounds import Role, paths_of
from shared.settings import Settings

TOKEN = "planted-0123456789abcdef"
METRICS = {
    "timing_s/step": 60.0, "timing_s/gen": 30.0, "timing_s/update_actor": 20.0, "actor/entropy": 1.1,
    "actor/grad_norm": 0.2, "actor/loss": 0.1, "rollout_corr/k3_kl": 0.003, "response_length/mean": 210.0,
}  # fmt: skip


def rollout(step: int, number: int = 0, **changes: Any) -> Verdict:
    """The verdict of a proposer's rollout, with a name and a time of its own."""
    verdict = proposer_verdict(step, right=number % 4, **changes)
    return verdict | {"time": 1.8e9 + 1000 * step + number, "began": 1.8e9 + 1000 * step, "hop": 1 + number % 4}


def write_step(paths: RunPaths, step: int, verdicts: Sequence[Verdict], /, **numbers: float) -> None:
    """What reward workers and verl append for a finished step."""
    append(paths.log / "verdicts-1.jsonl", verdicts)
    append(paths.log / "metrics-1.jsonl", [{"step": step, "data": METRICS | numbers}])


def append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json_lines(rows))


def small_run(folder: Path, steps: int = 3, **changes: Any) -> Settings:
    """Settings of a run in `folder` whose proposer has finished some steps of four rollouts."""
    settings = settings_at(folder, **changes)
    paths = training_paths(settings)
    for step in range(1, steps + 1):
        write_step(paths, step, [rollout(step, number) for number in range(4)])
    return settings


def training_paths(settings: Settings, number: int = 1, role: Role = "proposer") -> RunPaths:
    """Where a training of the run keeps its files."""
    return paths_of(settings, number, role)


@contextmanager
def driven(settings: Settings, stage: str = "1.train") -> Iterator[Path]:
    """A driver at work in this stage; yields the run's folder."""
    folder = training_paths(settings).run
    with only_driver(folder):
        steps = {"proposer": settings.trainer.steps, "solver": settings.trainer.solver.steps}
        note(folder, stage=stage, since=time.time(), steps=steps, waiting=None, ended=None)
        yield folder


@contextmanager
def page_of(settings: Settings, token: str | None = None) -> Iterator[httpx.Client]:
    """The page of a run on a socket, and a client that has the token; all that was written before is read."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with (
        serving(create_app(settings, token)) as url,
        httpx.Client(base_url=url, trust_env=False, headers=headers, timeout=30) as client,
    ):
        until_read(client)
        yield client


def until_read(client: httpx.Client, seconds: float = 60.0) -> None:
    """Ask until the page has read what is there."""
    deadline = time.monotonic() + seconds
    while "The records are being read" in (text := client.get("/").text):
        assert time.monotonic() < deadline, text[:2000]


def until_shown(client: httpx.Client, wanted: str, path: str = "/live", seconds: float = 10.0) -> float:
    """Ask `path` until the reply holds the text; returns the seconds that took."""
    began = time.monotonic()
    while wanted not in (text := client.get(path).text):
        assert time.monotonic() < began + seconds, f"{wanted!r} is not in {text[:3000]}"
        time.sleep(0.02)
    return time.monotonic() - began


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
