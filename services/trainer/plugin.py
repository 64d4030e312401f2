"""What verl loads in each of its processes (`VERL_USE_EXTERNAL_MODULES=services.trainer.plugin`).

Everywhere: our trainer class, by verl's own registry. On a CPU verl also lacks a device, an engine for it and a rollout
without SGLang; `cpu_platform.py` and `cpu_rollout.py` add them. With attention `varlen`, processes with a rank, those
that train, take our engine.
"""

import os

from shared.settings import load_settings

ACTOR = load_settings().trainer.actor

if ACTOR.device == "cpu":
    from services.trainer import cpu_platform

    cpu_platform.install()

if ACTOR.packed and "RANK" in os.environ:
    from services.trainer import packed_engine

    packed_engine.install()

from services.trainer import verl_trainer  # noqa: E402, F401  after the platform, which verl must know first
