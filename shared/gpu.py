"""Whether this machine's GPUs do what the settings ask of them; the self-test of every GPU service at its start.

In: settings and what NVML says (`hardware.gpus`). Out: sentences, each with expected, found and what to do; none when
all fits. Judging is pure; `self_test` is the one function that reads the machine, logs what it found and refuses. A
service whose settings name no GPU is not tested.
"""

from collections.abc import Sequence
from typing import Literal

import structlog

from shared.command import UsageError
from shared.hardware import Card, Gpus, gpus
from shared.memory_plan import known_shapes, memory_plan, peak_gb, plan_problems
from shared.settings import Settings

MIN_DRIVER = 580  # torch 2.11 and SGLang 0.5.12 are built for CUDA 13
MIN_COMPUTE = (8, 0)  # Ampere: SGLang's kernels begin at sm_80, and so does bfloat16 in hardware

Service = Literal["retrieval", "solver", "trainer"]


def gpu_settings(settings: Settings) -> dict[str, str]:
    """The settings that demand an NVIDIA GPU, by name; `auto` takes one where there is one and demands none."""
    asks = {
        "trainer.actor.device": settings.trainer.actor.device,
        "trainer.actor.rollout_engine": settings.trainer.actor.rollout_engine,
        "solver.engine": settings.solver.engine,
        "retrieval.encoder.device": settings.retrieval.encoder.device,
    }
    return {name: value for name, value in asks.items() if value.split(":")[0] in ("cuda", "sglang")}


def cards_wanted(settings: Settings, service: Service) -> int:
    """How many GPUs a service takes; 0 when its settings ask for none."""
    if not any(name.startswith(f"{service}.") for name in gpu_settings(settings)):
        return 0
    if service == "trainer":
        return settings.trainer.actor.gpus
    if service == "solver":
        return settings.solver.sglang.tp_size * settings.solver.sglang.dp_size
    return int(settings.retrieval.encoder.device.partition(":")[2] or 0) + 1


def machine_problems(found: Gpus | None, wanted: int, asking: Sequence[str]) -> list[str]:
    """What is wrong with the driver and the number and age of the cards; the cards' memory is not looked at."""
    if found is None or len(found.cards) < wanted:
        return [
            f"NVIDIA GPUs: expected {wanted} because of {', '.join(asking)}, found "
            f"{'no NVIDIA driver' if found is None else len(found.cards)}; check that nvidia-smi lists them (in a "
            "container: compose.gpu.yaml and DRZERO_GPUS), or use DRZERO_PROFILE=demo"
        ]
    problems = []
    if int(found.driver.split(".")[0]) < MIN_DRIVER:
        problems.append(
            f"expected NVIDIA driver {MIN_DRIVER} or newer, which CUDA 13 needs, found {found.driver} (CUDA "
            f"{found.cuda}); update the driver"
        )
    too_old = [card for card in found.cards[:wanted] if card.compute < MIN_COMPUTE]
    if too_old:
        problems.append(
            f"expected compute capability {_dotted(MIN_COMPUTE)} (sm_80, Ampere) or newer, which the GPU packages are "
            f"built for, found {too_old[0].name} with {_dotted(too_old[0].compute)}; use another card"
        )
    return problems


def memory_problems(settings: Settings, cards: Sequence[Card]) -> list[str]:
    """Why the profile's memory plan does not fit the smallest card; empty where no plan can be made yet."""
    shapes = known_shapes(settings)
    if shapes is None or not cards:
        return []
    card_gb = min(card.memory_gb for card in cards)
    return plan_problems(settings, memory_plan(settings, shapes), card_gb)


def planned_gb(settings: Settings, card_gb: float) -> float | None:
    """The peak of the plan on a card of this size; None while a model's shape is not known."""
    shapes = known_shapes(settings)
    return None if shapes is None else peak_gb(memory_plan(settings, shapes))


def described(card: Card) -> str:
    """A card in a line."""
    return (
        f"{card.name}, {card.memory_gb:.0f} GB, {card.free_gb:.0f} GB free, compute capability {_dotted(card.compute)}"
    )


def self_test(settings: Settings, service: Service, log: structlog.stdlib.BoundLogger) -> None:
    """Log driver, CUDA and cards; raise UsageError with one sentence per misfit. Does nothing for a CPU service."""
    wanted = cards_wanted(settings, service)
    if not wanted:
        return
    found = gpus()
    asking = [f"{name}={value}" for name, value in gpu_settings(settings).items() if name.startswith(f"{service}.")]
    problems = machine_problems(found, wanted, asking)
    if problems or found is None:
        raise UsageError("; ".join(problems))
    cards = found.cards[:wanted]
    log.info("GPUs", driver=found.driver, cuda=found.cuda, cards=[described(card) for card in cards])
    problems = memory_problems(settings, cards)
    if problems and settings.gpu_plan == "refuse":
        raise UsageError("; ".join(problems) + " (DRZERO_GPU_PLAN=warn starts all the same)")
    for problem in problems:
        log.warning("GPU memory", problem=problem)


def _dotted(compute: tuple[int, int]) -> str:
    return ".".join(map(str, compute))
