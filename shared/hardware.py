"""What this machine can do, read without torch: processors, memory, bf16, NVIDIA cards."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Limit, use and reclaimable cache of a container's memory, under /sys/fs/cgroup: version 2, then version 1.
CONTAINER_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


GIB = 2**30  # a card's "GB": the 80 GB of an A100 are 80 of these


@dataclass(frozen=True, slots=True)
class Card:
    """One NVIDIA GPU; memory in GB of 2³⁰ bytes, compute capability as (major, minor)."""

    name: str
    memory_gb: float
    free_gb: float
    compute: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Gpus:
    """The driver, the newest CUDA version that it runs, and the cards a process may use."""

    driver: str
    cuda: str
    cards: tuple[Card, ...]


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


def gpus() -> Gpus | None:
    """The NVIDIA GPUs that this process may use, by NVML; None where no driver answers."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return Gpus(
            driver=pynvml.nvmlSystemGetDriverVersion(),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
            cards=tuple(_card(handle) for handle in _handles(os.environ.get("CUDA_VISIBLE_DEVICES"))),
        )
    finally:
        pynvml.nvmlShutdown()


def energy_joules() -> float | None:
    """What the GPUs of this process have used since their driver was loaded, in joules; None where none reports it."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        cards = _handles(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return float(sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(card) for card in cards)) / 1000  # they tell mJ
    except pynvml.NVMLError:  # cards before Volta do not count it
        return None
    finally:
        pynvml.nvmlShutdown()


def _handles(visible: str | None) -> Iterator[Any]:
    """The cards in CUDA's own way of reading CUDA_VISIBLE_DEVICES: numbers or UUIDs, up to the first unknown one."""
    import pynvml

    names = map(str, range(pynvml.nvmlDeviceGetCount())) if visible is None else visible.split(",")
    with suppress(pynvml.NVMLError, ValueError):
        for name in names:
            by_uuid = name.strip().startswith("GPU-")
            yield (
                pynvml.nvmlDeviceGetHandleByUUID(name.strip())
                if by_uuid
                else pynvml.nvmlDeviceGetHandleByIndex(int(name))
            )


def _card(handle: Any) -> Card:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Card(
        name=pynvml.nvmlDeviceGetName(handle),
        memory_gb=memory.total / GIB,
        free_gb=memory.free / GIB,
        compute=pynvml.nvmlDeviceGetCudaComputeCapability(handle),
    )
