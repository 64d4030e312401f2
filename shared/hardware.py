"""What this machine can do, read without torch: processors, memory, bf16, NVIDIA cards."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Limit, use and reclaimable cache of a container's memory, under /sys/fs/cgroup: version 2, then version 1.
CONTAINER_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True, slots=True)
class Card:
    """One NVIDIA GPU as nvidia-smi names it."""

    name: str
    driver: str
    memory_gb: float
    free_gb: float
    compute: float


def cpu_dtype(wanted: str) -> str:
    """`auto` → bfloat16 where the processor multiplies it natively (AMX, AVX512-BF16), else float32."""
    if wanted != "auto":
        return wanted
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8") if info.is_file() else ""
    return "bfloat16" if "amx_bf16" in flags or "avx512_bf16" in flags else "float32"


def memory_gb(root: Path = Path("/")) -> tuple[float, float]:
    """Total and available memory in GB, the limit of our container included."""
    info = root / "proc/meminfo"
    if not info.is_file():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        return total, total
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in info.read_text().splitlines()}
    total, available = fields["MemTotal"] / 1e9, fields["MemAvailable"] / 1e9
    for limit, used, cache in CONTAINER_MEMORY:
        files = [root / "sys/fs/cgroup" / name for name in (limit, used)]
        if not all(file.is_file() for file in files) or (given := files[0].read_text().strip()) == "max":
            continue
        stat = dict(line.split() for line in (files[0].parent / "memory.stat").read_text().splitlines())
        # File cache that is given back on demand counts as used in a container.
        taken = int(files[1].read_text()) - int(stat.get(cache, 0))
        total, available = min(total, int(given) / 1e9), min(available, (int(given) - taken) / 1e9)
    return total, available


def cards() -> list[Card]:
    """The NVIDIA GPUs of this machine; empty when there is no driver."""
    fields = "name,driver_version,memory.total,memory.free,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in lines:
        name, driver, total, free, compute = (part.strip() for part in line.split(","))
        found.append(Card(name, driver, _number(total) / 1024, _number(free) / 1024, _number(compute)))
    return found


def _number(text: str) -> float:
    """A field of nvidia-smi; 0 for "[N/A]", which it prints where a card does not tell."""
    try:
        return float(text)
    except ValueError:
        return 0.0
