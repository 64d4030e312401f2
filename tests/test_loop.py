"""The whole loop as local processes, as `make demo` runs it: killed in the middle, resumed, finished, run again.

One round with the real 135M model in the demo profile (some fifteen minutes on two cores), so it is marked `slow`.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.trainer.records import read_lines
from shared.files import read_manifest
from shared.transcript import search_calls

ROOT = Path(__file__).parents[1]
RUN_S = 1500
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").is_file(), reason="run-local.sh needs .venv: make venv"),
]


class Loop:
    """One run of run-local.sh and what it has printed so far."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            ["./run-local.sh"], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))

    def wait_for(self, seen: Callable[[str], bool]) -> str:
        """The first line for which `seen` is true; fails when the run ends or takes too long before it."""
        end = time.monotonic() + RUN_S
        while time.monotonic() < end:
            for line in list(self.lines):
                if seen(line):
                    return line
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.2)
        pytest.fail("the run ended or hung; its last lines:\n" + "\n".join(self.lines[-30:]))

    def end(self) -> int:
        """The exit status, waited for."""
        status = self.process.wait(RUN_S)
        self._reader.join(10)
        return status


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("loop")
    ports = {name: free_port() for name in ("RETRIEVAL", "SOLVER", "TRAINER")}
    services = {f"DRZERO_{name}__PORT": str(port) for name, port in ports.items()}
    services |= {f"DRZERO_{name}__URL": f"http://127.0.0.1:{ports[name]}" for name in ("RETRIEVAL", "SOLVER")}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DRZERO_")}
    places = {"DRZERO_STORAGE__DATA_DIR": str(folder / "data"), "DRZERO_STORAGE__SCRATCH_DIR": str(folder / "scratch")}
    return {**kept, **services, **places}


@pytest.fixture(scope="module")
def finished(environ: dict[str, str]) -> Path:
    """The folder of a run whose trainer, solver and search service were each killed once."""
    first = Loop(environ)
    first.wait_for(lambda line: event(line) == "step finished")
    kill(environ, "services.trainer")
    assert first.end() == 128 + signal.SIGKILL
    assert any("the same command again goes on where it stopped" in line for line in first.lines)

    second = Loop(environ)
    resumed = json.loads(second.wait_for(lambda line: event(line) == "verl starts"))
    assert resumed["resumed_at"] >= 1
    kill(environ, "services.solver")
    kill(environ, "services.retrieval")
    assert second.end() == 0, second.lines[-20:]
    # Services that are stopped at the end may have the last word.
    assert next(line for line in reversed(second.lines) if not line.startswith("{")).startswith("report: ")
    return Path(environ["DRZERO_STORAGE__DATA_DIR"]) / "runs" / "demo" / "1"


def test_every_step_is_there_once(finished: Path) -> None:
    metrics = list(read_lines(finished / "proposer" / "training" / "metrics.jsonl"))
    assert [m["step"] for m in metrics if "actor/grad_norm" in m] == [1, 2, 3]
    rollouts = list(read_lines(finished / "proposer" / "training" / "rollouts.jsonl"))
    assert sorted({r["step"] for r in rollouts}) == [1, 2, 3]
    counts = {"steps": 3, "rollouts": 24, "invalid": 0, "refused_batches": 0, "held_out": 8}
    assert read_manifest(finished / "proposer" / "training", verify=True).counts == counts


def test_the_model_itself_searched_and_received_papers(finished: Path) -> None:
    rollouts = list(read_lines(finished / "proposer" / "training" / "rollouts.jsonl"))
    searched = [r for r in rollouts if r["searches_made"] > 0]
    assert searched
    for rollout in searched:
        written = [q for turn in rollout["turns"] for call in search_calls(turn) for q in call.queries]
        for search in rollout["searches"]:
            assert set(search["queries"]) <= set(written)
        assert any(search["pmids"] for search in rollout["searches"])


def test_the_weights_really_changed(finished: Path) -> None:
    change = json.loads((finished / "proposer" / "weights" / "change.json").read_text())
    assert change["changed_tensors"] > 0.5 * change["tensors"]
    assert change["relative_change"] > 0
    assert (finished / "proposer" / "weights" / "model.safetensors").is_file()


def test_the_report_shows_questions_curves_and_times(finished: Path) -> None:
    page = (finished / "report" / "report.html").read_text()
    for part in (
        "Before and after training",
        "What the rounds have taught the solver",
        "Base and round side by side",
        "Curves",
        "<svg",
        "Questions",
        "right attempts",
        "PMID 99",
        "What ran for how long",
        "rollouts, searches",
    ):
        assert part in page
    result = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    assert result["proposer"]["before"]["score"]["count"] == result["proposer"]["after"]["score"]["count"] == 4
    assert result["sets"]["kept_out"]["round"]["questions"] > 0


def test_the_solver_was_trained_on_verified_questions_and_is_served(finished: Path, environ: dict[str, str]) -> None:
    counts = read_manifest(finished / "questions", verify=True).counts
    assert counts["candidates"] in (24, 48)  # 24 at a time, until 4 papers have a sound one
    assert counts["train"] >= 2
    assert counts["held_out"] >= 1
    training = read_manifest(finished / "solver" / "training", verify=True)
    assert training.counts["rollouts"] == 4
    assert training.made_from["seeds"] == read_manifest(finished / "solver" / "seeds").identity
    note = json.loads((Path(environ["DRZERO_STORAGE__DATA_DIR"]) / "serving.json").read_text())
    assert Path(note["weights"]) == (finished / "solver" / "weights").resolve()


def test_a_kill_in_any_of_the_shorter_stages_ends_with_the_same_artifacts(
    finished: Path, environ: dict[str, str]
) -> None:
    before = {path: path.readlink() for path in finished.rglob("*") if path.is_symlink()}
    words = "tests/stage_kills.py --kills 1 --seed 5 --stages seeds,solver_seeds,evaluate,report"
    command = [str(ROOT / ".venv" / "bin" / "python"), *words.split()]
    folder = Path(environ["DRZERO_STORAGE__DATA_DIR"]).parent
    own = {**environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(folder)], cwd=ROOT, env=own, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert before == {path: path.readlink() for path in finished.rglob("*") if path.is_symlink()}


def test_a_second_run_reuses_every_stage_and_says_so(finished: Path, environ: dict[str, str]) -> None:
    before = {path: path.readlink() for path in finished.rglob("*") if path.is_symlink()}
    started = time.monotonic()
    again = Loop(environ)
    assert again.end() == 0
    assert time.monotonic() - started < 180
    text = "\n".join(again.lines)
    for stage in ("seeds", "training", "weights", "questions", "solver's seeds", "evaluation", "report"):
        assert f"{stage} reused" in text
    assert before == {path: path.readlink() for path in finished.rglob("*") if path.is_symlink()}


def test_a_changed_setting_remakes_what_depends_on_it_and_nothing_else(finished: Path, environ: dict[str, str]) -> None:
    changed = {**environ, "DRZERO_TRAINER__EVAL_SEEDS": "5", "DRZERO_TRAINER__RUN": "demo"}
    data = Path(environ["DRZERO_STORAGE__DATA_DIR"])
    kept = {name: (data / name).readlink() for name in ("corpus", "index")}
    seeds = (finished / "proposer" / "seeds").readlink()
    for command in (["services.ingest"], ["services.retrieval.build"], ["services.trainer", "--to", "seeds"]):
        run = [str(ROOT / ".venv" / "bin" / "python"), "-m", *command]
        subprocess.run(run, cwd=ROOT, env=changed, check=True, capture_output=True)
    assert {name: (data / name).readlink() for name in kept} == kept
    assert (finished / "proposer" / "seeds").readlink() != seeds


def event(line: str) -> Any:
    """The event of a JSON log line, or None."""
    try:
        return json.loads(line).get("event")
    except (ValueError, AttributeError):
        return None


def kill(environ: dict[str, str], module: str) -> None:
    """SIGKILL to the process that runs `python -m module` on this test's data."""
    mark = f"DRZERO_STORAGE__DATA_DIR={environ['DRZERO_STORAGE__DATA_DIR']}".encode()
    for path in Path("/proc").iterdir():
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            mine = mark in (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mine and words[1:3] == [b"-m", module.encode()]:
            os.kill(int(path.name), signal.SIGKILL)
            return
    pytest.fail(f"no process runs {module}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
