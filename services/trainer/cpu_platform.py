"""verl 0.9.1 on a CPU: a platform, FSDP2 for it, gloo, and the rollout of `cpu_rollout.py`.

Every change is a registration in a registry of verl's, but for two: the process group is made with plain gloo (verl
joins "cpu:gloo" with a second backend for the same device, which torch refuses), and torch.cpu gets the memory
functions that verl asks of every device (all report that nothing is used).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase

ROLLOUT = "transformers"  # actor_rollout_ref.rollout.name


class CpuPlatform(PlatformBase):  # type: ignore[misc]
    """verl's view of a machine without an accelerator. Ray is told that it has one "GPU": the place to train."""

    @property
    def device_name(self) -> str:
        """torch's name of the device."""
        return "cpu"

    @property
    def vendor_name(self) -> str:
        """verl looks engines up by device and vendor."""
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        """torch.cuda's counterpart."""
        return torch.cpu

    def is_available(self) -> bool:
        """A CPU is always there."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """As above; there is nothing to ask."""
        return True

    def current_device(self) -> torch.device:
        """The one device."""
        return torch.device("cpu")

    def device_count(self) -> int:
        """One."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing to choose."""

    def synchronize(self, device_index: int | None = None) -> None:
        """CPU work is done when it returns."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The CPU allocator has none."""

    def empty_cache(self) -> None:
        """The CPU allocator keeps no cache."""

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        """A CUDA notion."""
        return None, None

    def communication_backend_name(self) -> str:
        """torch.distributed's backend."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Ray sets this for its "GPU" resource; nothing reads it here."""
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        """The Ray resource that verl's workers ask for."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """None to keep Ray from setting."""
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        """Ray options of a worker that trains."""
        return {"num_gpus": num_gpus}

    def is_ipc_supported(self) -> bool:
        """Weights go to the rollout as tensors, not as device handles."""
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No profiler marks."""
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def cudart(self) -> None:
        """No CUDA runtime."""


def install() -> None:
    """Make this process of verl train on the CPU. Safe to call once per process."""
    platform_manager.PlatformRegistry.register("cpu")(CpuPlatform)
    platform_manager.set_platform(CpuPlatform())
    _give_torch_cpu_memory_functions()
    _register_rollout()
    # Engines import torch models; only the workers that train need them, and Ray gives those a rank.
    if "RANK" in os.environ:
        _register_engine()
        _use_plain_gloo()


def _register_rollout() -> None:
    from verl.workers.rollout import base
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    def replica() -> type:
        from services.trainer.cpu_rollout import CpuReplica

        return CpuReplica

    base._ROLLOUT_REGISTRY[(ROLLOUT, "async")] = "services.trainer.cpu_rollout.CpuServerAdapter"
    RolloutReplicaRegistry.register(ROLLOUT, replica)


def _register_engine() -> None:
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    register = EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])
    register(FSDPEngineWithLMHead)


def _use_plain_gloo() -> None:
    from verl.utils import distributed

    def initialize(timeout_second: int | None = None, backend: str | None = None) -> None:
        if torch.distributed.is_initialized():
            return
        torch.distributed.init_process_group(
            backend="gloo",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=None if timeout_second is None else timedelta(seconds=timeout_second),
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )

    distributed.initialize_global_process_group_ray = initialize


def _give_torch_cpu_memory_functions() -> None:
    zero = ("memory_reserved", "memory_allocated", "max_memory_allocated", "max_memory_reserved")
    nothing = ("empty_cache", "ipc_collect", "reset_peak_memory_stats")
    functions: dict[str, Any] = {name: lambda *_, **__: 0 for name in zero}
    functions |= {name: lambda *_, **__: None for name in nothing}
    functions |= {
        "mem_get_info": lambda *_: (1 << 30, 1 << 30),
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=1 << 30),
        "get_device_name": lambda *_: "cpu",
        "get_device_capability": lambda *_: (0, 0),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    for name, function in functions.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)
