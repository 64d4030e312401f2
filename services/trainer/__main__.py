"""A run, from its first round to its last: `python -m services.trainer [--from STAGE] [--to STAGE]`.

Each round trains a proposer and, on its questions, a solver, and evaluates both; `STAGES` has the stages of a round in
order. A stage whose artifact is current (same settings, same inputs) is skipped and says so: the same command starts,
resumes and finishes a run. What has finished stands in `runs/<run>/state.json` (`run_state.py`).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from services.trainer import status
from services.trainer.control import Stopped, heed, withdraw
from services.trainer.disk_metrics import show_disk
from services.trainer.driver import note, noting_end, only_driver
from services.trainer.evaluate import evaluate
from services.trainer.paths import RunPaths, run_paths
from services.trainer.publish import publish_solver, publish_weights
from services.trainer.questions import make_questions
from services.trainer.report import write_report
from services.trainer.rounds import Role, proposer_settings, solver_settings
from services.trainer.run_state import RunState
from services.trainer.seeds import make_seeds
from services.trainer.solver_seeds import make_solver_seeds
from services.trainer.storage import require_budget, warn_of_budget
from services.trainer.train import train
from shared.command import UsageError, run
from shared.files import sweep
from shared.gpu import self_test
from shared.settings import Settings

Work = Callable[[Settings, RunPaths, structlog.stdlib.BoundLogger], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of a round: whose settings it works with, what it does, and which artifact it leaves."""

    role: Role
    work: Work
    artifact: Callable[[RunPaths], Path]


STAGES: dict[str, Stage] = {
    "seeds": Stage("proposer", make_seeds, lambda paths: paths.seeds),
    "train": Stage("proposer", train, lambda paths: paths.training),
    "publish": Stage("proposer", publish_weights, lambda paths: paths.weights),
    "questions": Stage("proposer", make_questions, lambda paths: paths.questions),
    "solver_seeds": Stage("solver", make_solver_seeds, lambda paths: paths.seeds),
    "solver_train": Stage("solver", train, lambda paths: paths.training),
    "solver_publish": Stage("solver", publish_solver, lambda paths: paths.weights),
    "evaluate": Stage("solver", evaluate, lambda paths: paths.evaluation),
    "report": Stage("proposer", write_report, lambda paths: paths.report),
}
Place = tuple[int, str]  # round and stage


def main(first: str, last: str, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Run the stages from `first` to `last` of the settings' run; "" is the run's first, or its last."""
    places = chosen(first, last, settings.trainer.iterations)
    paths = run_paths(settings)
    trains = any(name in ("train", "solver_train") for _, name in places)
    if trains and settings.trainer.ray_address is None:  # a cluster's GPUs are elsewhere
        self_test(settings, "trainer", log)
    warn_of_budget(settings, log)
    with only_driver(paths.run):
        server = status.serve_in_background(settings)
        status.show_run(settings)
        show_disk(settings)
        try:
            run_stages(places, settings, paths.run, log)
            withdraw(paths.run)
            status.finish(server)
        except Stopped as stop:
            withdraw(paths.run)
            status.finish(server)
            print(f"trainer: {stop}")
            return
        finally:
            server.should_exit = True
    if places[-1][1] == "report":
        print(f"report: {run_paths(proposer_settings(settings, places[-1][0])).report / 'report.html'}")


def run_stages(places: list[Place], settings: Settings, folder: Path, log: structlog.stdlib.BoundLogger) -> None:
    """The stages one after the other; between two, a person's request to pause or to stop is heeded."""
    state = RunState(folder, settings)
    status.show_spent(state.stages)
    steps = {"proposer": settings.trainer.steps, "solver": settings.trainer.solver.steps}
    with noting_end(folder):
        for number, name in places:
            label = f"{number}.{name}"
            note(folder, stage=label, since=time.time(), steps=steps, waiting=None, ended=None)
            if heed(folder, f"before the stage {label}", partial(show_wait, folder)) == "stop":
                raise Stopped(f"stopped on request before the stage {label}; run the same command again to go on there")
            run_stage(number, name, settings, state, log)


def show_wait(folder: Path, text: str | None) -> None:
    """Say why the driver waits between two stages, or that it no longer does."""
    note(folder, waiting=text)
    status.show_waiting(text)


def run_stage(number: int, name: str, settings: Settings, state: RunState, log: structlog.stdlib.BoundLogger) -> None:
    """One stage of round `number`, with the settings of its role."""
    stage = STAGES[name]
    label = f"{number}.{name}"
    status.show_stage(name, number)
    structlog.contextvars.bind_contextvars(stage=label)
    own = proposer_settings(settings, number) if stage.role == "proposer" else solver_settings(settings, number)
    paths = run_paths(own)
    artifact = stage.artifact(paths)
    sweep(artifact)  # a driver that was killed just after it published has left the version before
    require_budget(own)
    with state.timing(label, artifact):
        stage.work(own, paths, log)


def chosen(first: str, last: str, rounds: int) -> list[Place]:
    """All places from `first` to `last`, each a stage with or without the number of its round before it.

    Without a number `first` is of round 1 and `last` of the last round. Raises UsageError for what is no place.
    """
    places = [(number, name) for number in range(1, rounds + 1) for name in STAGES]
    start = place(first, 1, rounds) if first else places[0]
    end = place(last, rounds, rounds) if last else places[-1]
    if places.index(start) > places.index(end):
        raise UsageError(f"expected --from at or before --to, found {first} and {last}")
    return places[places.index(start) : places.index(end) + 1]


def place(text: str, default: int, rounds: int) -> Place:
    """`questions` or `2.questions` as round and stage; UsageError for any other text."""
    places = {f"{number}.{name}": (number, name) for number in range(1, rounds + 1) for name in STAGES}
    places |= {name: (default, name) for name in STAGES}
    if text not in places:
        raise UsageError(
            f"unknown place {text!r}; expected one of {', '.join(STAGES)}, with or without a round of 1 to {rounds} "
            "(DRZERO_TRAINER__ITERATIONS) before it, as in 1.questions"
        )
    return places[text]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m services.trainer",
        description=f"Run a training run or a part of it. The stages of a round: {', '.join(STAGES)}.",
    )
    parser.add_argument("--from", dest="first", default="", metavar="STAGE", help="begin here, e.g. 2.questions")
    parser.add_argument("--to", dest="last", default="", metavar="STAGE", help="end after this")
    given = parser.parse_args()
    raise SystemExit(run("trainer", partial(main, given.first, given.last)))
