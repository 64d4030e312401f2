"""What the run's files take, as gauges: kept files and scratch beside the budget and the free disk.

A scrape measures again when the last measure is a minute old: the sizes of a few thousand files are read in
milliseconds on a local disk, and in seconds on one behind a network.
"""

import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

from prometheus_client import Gauge

from services.trainer.disk_parts import scan
from shared.files import free_gb
from shared.metrics import REGISTRY
from shared.settings import Settings

Place = Literal["kept", "scratch"]
GB = 10**9
MEASURED_EVERY_S = 60

BYTES = Gauge("drzero_trainer_storage_bytes", "Bytes of kept files and of scratch.", ["place"], registry=REGISTRY)
FREE = Gauge("drzero_trainer_storage_free_bytes", "Free bytes of their disks.", ["place"], registry=REGISTRY)
LEAST = Gauge("drzero_trainer_storage_min_free_bytes", "Free bytes without which no stage starts.", registry=REGISTRY)
BUDGET = Gauge("drzero_trainer_storage_budget_bytes", "Most that kept files may take; 0: no limit.", registry=REGISTRY)


def show_disk(settings: Settings) -> None:
    """Show the folders of these settings from now on."""
    storage = settings.storage
    BUDGET.set(storage.budget_gb * GB)
    LEAST.set(storage.min_free_gb * GB)
    folders: dict[Place, Path] = {"kept": storage.data_dir.absolute(), "scratch": storage.scratch_dir.absolute()}
    for place, folder in folders.items():
        BYTES.labels(place).set_function(partial(lately_measured, folder))
        FREE.labels(place).set_function(partial(free_bytes, folder))


def lately_measured(folder: Path) -> float:
    """Bytes of all files below the folder, at most a minute ago."""
    return _measured(folder, int(time.monotonic() / MEASURED_EVERY_S))


@lru_cache(maxsize=2)
def _measured(folder: Path, _minute: int) -> float:
    return float(sum(inode.size for inode in scan([folder])[0]))


def free_bytes(folder: Path) -> float:
    """Free bytes where the folder is, or will be."""
    return free_gb(folder) * GB
