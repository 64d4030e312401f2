"""What verl loads in each of its processes (`VERL_USE_EXTERNAL_MODULES=services.trainer.plugin`).

On a GPU there is nothing to add here. On a CPU verl lacks a device, an engine for it and a rollout without SGLang;
`cpu_platform.py` and `cpu_rollout.py` add them through verl's own registries.
"""

from shared.settings import load_settings

if load_settings().trainer.actor.device == "cpu":
    from services.trainer import cpu_platform

    cpu_platform.install()
