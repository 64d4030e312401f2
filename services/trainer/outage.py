"""How a worker deep inside verl ends the training when a service stays away.

verl treats a failed rollout as a missing sample and trains on; that would hide an outage. A worker that gives up
writes `outage.json` into the run's scratch folder before it raises; the stage `train` sees it, stops verl and says
what to do.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.trainer.paths import run_paths
from shared.clients import ServiceError
from shared.files import write_atomically
from shared.settings import load_settings


@contextmanager
def noting_outage() -> Iterator[None]:
    """Write down a ServiceError of this block, and let it pass."""
    try:
        yield
    except ServiceError as error:
        text = json.dumps({"service": error.service, "text": str(error), "time": time.time()})
        write_atomically(run_paths(load_settings()).outage, text)
        raise


def read_outage(path: Path) -> str | None:
    """The sentence of an outage file, or None."""
    if not path.is_file():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["text"])
