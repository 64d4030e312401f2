"""How many threads this process should compute with: one per core that it may really use."""

import os
from pathlib import Path


def cores(wanted: int = 0, root: Path = Path("/")) -> int:
    """`wanted`, or for 0 the cores of the process's affinity, at most what its container's quota pays for."""
    if wanted:
        return wanted
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(root)
    return here if quota is None else max(1, min(here, int(quota)))


def _quota(root: Path) -> float | None:
    """Cores' worth of time that the container has (cgroup version 2, then 1); None without a limit."""
    folder = root / "sys/fs/cgroup"
    if (file := folder / "cpu.max").is_file():
        given, period = file.read_text(encoding="utf-8").split()
    elif (file := folder / "cpu/cpu.cfs_quota_us").is_file():
        given, period = (
            (folder / f"cpu/cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
        )
    else:
        return None
    return None if given in ("max", "-1") else int(given) / int(period)
