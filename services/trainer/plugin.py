"""What verl loads in each of its processes (`VERL_USE_EXTERNAL_MODULES=services.trainer.plugin`).

Everywhere: our trainer class, by verl's own registry. On a CPU verl also lacks a device, an engine for it and a rollout
without SGLang; `cpu_platform.py` and `cpu_rollout.py` add them.
"""

from shared.settings import load_settings

if load_settings().trainer.actor.device == "cpu":
    from services.trainer import cpu_platform

    cpu_platform.install()

from services.trainer import verl_trainer  # noqa: F401  after the platform, which verl must know first
