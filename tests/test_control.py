"""What a person asks of a run is heeded where it should be, outlives restarts, and is used up by what it ends."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from round_world import settings_at
from run_world import driven
from test_watch import write_checkpoint

from services.trainer import __main__ as driver_module
from services.trainer import control, train
from services.trainer.__main__ import main, run_stages
from services.trainer.control import FILE, Stopped, heed, order, requested
from services.trainer.driver import is_driven, note, noting_end, only_driver, read_driver
from services.trainer.paths import run_paths
from services.trainer.watch import Problem
from shared.command import UsageError
from shared.settings import Settings, as_environment

ROOT = Path(__file__).parents[1]
LOG: structlog.stdlib.BoundLogger = structlog.get_logger()


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(control, "POLL_S", 0.01)
    return settings_at(tmp_path)


def test_an_order_is_asked_until_it_is_withdrawn(settings: Settings) -> None:
    with driven(settings) as run:
        assert requested(run) is None
        for what in ("pause", "stop"):
            order(run, what)
            assert requested(run) == what
        order(run, "resume")
        assert requested(run) is None


def test_nothing_is_asked_of_a_run_that_nobody_drives(settings: Settings) -> None:
    run = run_paths(settings).run
    for what in ("pause", "stop"):
        with pytest.raises(UsageError, match="expected a running trainer"):
            order(run, what)
    order(run, "resume")
    assert requested(run) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"request": "explode"}', '{"request": ["stop"]}', "null"])
def test_a_file_that_is_none_of_ours_asks_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert requested(tmp_path) is None


@pytest.mark.parametrize(("then", "outcome"), [("resume", None), ("stop", "stop")])
def test_a_pause_lasts_until_something_else_is_asked(settings: Settings, then: str, outcome: str | None) -> None:
    said: list[str | None] = []
    paused = threading.Event()

    def tell(text: str | None) -> None:
        said.append(text)
        paused.set()

    with driven(settings) as run:
        order(run, "pause")
        thread = threading.Thread(target=lambda: paused.wait(10) and order(run, then))  # type: ignore[arg-type]
        thread.start()
        assert heed(run, "after step 3", tell) == outcome
        thread.join()
    assert said[0] is not None
    assert "after step 3" in said[0]
    assert said[1:] == [None]


# --- the driver


def stages(settings: Settings, work: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run two stages that do nothing but `work`."""
    monkeypatch.setattr(driver_module, "run_stage", lambda number, name, *_: work(f"{number}.{name}"))
    with only_driver(run_paths(settings).run):
        run_stages([(1, "seeds"), (1, "train")], settings, run_paths(settings).run, LOG)


def test_a_stop_ends_the_driver_before_the_next_stage(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_paths(settings).run
    done: list[str] = []

    def work(label: str) -> None:
        done.append(label)
        assert read_driver(run)["stage"] == label
        order(run, "stop")

    with pytest.raises(Stopped, match=r"before the stage 1\.train; run the same command again"):
        stages(settings, work, monkeypatch)
    assert done == ["1.seeds"]
    assert "stopped on request" in read_driver(run)["ended"]
    assert not is_driven(run)


def test_a_stop_is_status_0_and_used_up_so_that_the_same_command_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_paths(settings).run
    run.mkdir(parents=True)
    monkeypatch.setattr(driver_module.status, "serve_in_background", lambda _: type("Server", (), {})())
    (run / FILE).write_text(json.dumps({"request": "stop"}))  # asked of a driver that was killed before it could
    main("seeds", "seeds", settings, LOG)
    assert "stopped on request before the stage 1.seeds" in capsys.readouterr().out
    assert requested(run) is None
    done: list[str] = []
    stages(settings, done.append, monkeypatch)
    assert done == ["1.seeds", "1.train"]
    assert read_driver(run)["ended"] == "all stages are done"


def test_how_a_driver_ended_is_noted_and_a_killed_one_has_said_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError), noting_end(tmp_path):
        raise UsageError("too few papers")
    assert read_driver(tmp_path)["ended"] == "too few papers"
    note(tmp_path, ended=None, stage="1.train")
    assert not is_driven(tmp_path)
    with only_driver(tmp_path):
        assert is_driven(tmp_path)
    assert not is_driven(tmp_path)


# --- the training


def test_a_training_that_was_stopped_is_no_crash_and_says_where_it_resumes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = run_paths(settings)
    write_checkpoint(paths, 2)
    paths.log.mkdir(parents=True)
    runs: list[int] = []

    def run_verl(*_: Any) -> Problem | None:
        runs.append(1)
        order(paths.run, "stop")
        return None

    monkeypatch.setattr(train, "run_verl", run_verl)
    with driven(settings), pytest.raises(Stopped, match=r"stopped on request.*resume from the checkpoint of step 2"):
        train.run_to_the_end(settings, paths, LOG)
    assert len(runs) == 1


def test_an_outage_is_an_outage_even_when_a_stop_is_asked_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = run_paths(settings)
    paths.log.mkdir(parents=True)

    def run_verl(*_: Any) -> Problem | None:
        order(paths.run, "stop")
        paths.outage.write_text(json.dumps({"service": "solver", "text": "solver is away", "time": 0}))
        return Problem("a service stayed away")

    monkeypatch.setattr(train, "run_verl", run_verl)
    with driven(settings), pytest.raises(UsageError, match="solver is away"):
        train.run_to_the_end(settings, paths, LOG)


# --- the command


def test_the_command_steers_a_run_and_says_what_holds(settings: Settings) -> None:
    variables = {name: value for name, value in as_environment(settings).items() if value}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("DRZERO_")} | variables

    def run(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "services.trainer.control", what]
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)

    refused = run("pause")
    assert (refused.returncode, "expected a running trainer" in refused.stderr) == (1, True)
    with driven(settings) as folder:
        assert run("pause").returncode == 0
        assert requested(folder) == "pause"
        shown = run("show")
        assert '"requested": "pause"' in shown.stderr
        assert '"driven": true' in shown.stderr
        assert run("resume").returncode == 0
        assert requested(folder) is None
