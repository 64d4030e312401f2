"""The stages of a run, in order: `python -m services.trainer` runs all, `python -m services.trainer <stage>` one.

A stage whose artifact is current (same settings, same inputs) is skipped and says so, so the same command starts,
resumes and finishes a run.
"""

import argparse
import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import structlog

from services.trainer import status
from services.trainer.evaluate import evaluate
from services.trainer.paths import RunPaths, run_paths
from services.trainer.publish import publish_weights
from services.trainer.report import write_report
from services.trainer.seeds import make_seeds
from services.trainer.train import train
from shared.command import UsageError, run
from shared.gpu import self_test
from shared.settings import Settings

Stage = Callable[[Settings, RunPaths, structlog.stdlib.BoundLogger], None]

STAGES: dict[str, Stage] = {
    "seeds": make_seeds,
    "train": train,
    "publish": publish_weights,
    "evaluate": evaluate,
    "report": write_report,
}


def main(stages: list[str], settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Run the named stages of the settings' run."""
    paths = run_paths(settings)
    if "train" in stages and settings.trainer.ray_address is None:  # a cluster's GPUs are elsewhere
        self_test(settings, "trainer", log)
    with only_driver(paths):
        server = status.serve_in_background(settings.trainer, paths.report)
        for name in stages:
            status.show_stage(name)
            structlog.contextvars.bind_contextvars(stage=name)
            STAGES[name](settings, paths, log)
        server.should_exit = True
    if "report" in stages:
        print(f"report: {paths.report / 'report.html'}")


@contextmanager
def only_driver(paths: RunPaths) -> Iterator[None]:
    """Raise UsageError when another process drives this run."""
    paths.kept.mkdir(parents=True, exist_ok=True)
    with (paths.kept / ".driver.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process drives the run {paths.kept}; wait for it or stop it") from error
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m services.trainer", description="Run stages of a training run.")
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"one or more of {', '.join(STAGES)}; default all")
    chosen = parser.parse_args().stages or list(STAGES)
    unknown = sorted(set(chosen) - set(STAGES))
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; expected one of {', '.join(STAGES)}")
    raise SystemExit(run("trainer", partial(main, chosen)))
