"""What a person asks of a run: `python -m services.trainer.control pause|stop|resume|show`, or the run page.

A request is the file `control.json` in the run's folder. It needs no connection and outlives restarts of everything:
verl's trainer looks at it between two steps, the driver between two stages. Both save first: at a pause, too, there is
a checkpoint of the last step. A pause holds until it is lifted; a stop is used up by the driver that it ends, with
status 0, and the same command then resumes.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import structlog

from services.trainer.driver import is_driven
from services.trainer.paths import run_paths
from shared.command import UsageError, run
from shared.files import write_atomically
from shared.settings import Settings

FILE = "control.json"
POLL_S = 0.5
Request = Literal["pause", "stop"]
Order = Literal["pause", "stop", "resume"]
ORDERS: tuple[Order, ...] = get_args(Order)


class Stopped(Exception):
    """A person has asked the run to stop, and it has; the text says where the same command resumes."""


def requested(folder: Path) -> Request | None:
    """What is asked of the run in this folder; None for nothing, or for a file that is none of ours."""
    try:
        asked = json.loads((folder / FILE).read_text(encoding="utf-8"))["request"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return asked if asked in get_args(Request) else None


def order(folder: Path, what: Order) -> None:
    """Ask it of the run, in place of what was asked before; raises UsageError when nobody drives the run."""
    if what == "resume":
        withdraw(folder)
        return
    if not is_driven(folder):
        raise UsageError(f"expected a running trainer of {folder.name} to {what}, found none; nothing is asked of it")
    write_atomically(folder / FILE, json.dumps({"request": what, "time": time.time()}))


def withdraw(folder: Path) -> None:
    """Nothing is asked any more."""
    (folder / FILE).unlink(missing_ok=True)


def heed(folder: Path, place: str, tell: Callable[[str | None], None]) -> Request | None:
    """Return when no pause is asked for; "stop" when that is. `tell` gets the words for a wait, None at its end."""
    if (asked := requested(folder)) == "pause":
        tell(f"paused on request {place}; resume it on the run page or with python -m services.trainer.control resume")
        while (asked := requested(folder)) == "pause":
            time.sleep(POLL_S)
        tell(None)
    return asked


def main(what: str, settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Carry the order out, and say what holds now."""
    folder = run_paths(settings).run
    if what in ORDERS:
        order(folder, what)
    log.info("control", run=folder.name, driven=is_driven(folder), requested=requested(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m services.trainer.control", description="Steer a running trainer.")
    parser.add_argument("what", choices=[*ORDERS, "show"])
    raise SystemExit(run("control", partial(main, parser.parse_args().what)))
