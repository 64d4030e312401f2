"""Rollout workers that start before they are needed.

verl makes the processes that drive rollouts last, when the engine is ready, and each then imports for a dozen seconds.
Here they are made first and import while models load; when verl asks for them, they get what did not exist before.
Named to verl as `rollout.agent.agent_loop_manager_class`.
"""

from typing import Any, ClassVar

import ray
from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.utils.ray_utils import auto_await


class EarlyWorkers(AgentLoopManagerTQ):  # type: ignore[misc]
    """verl's manager of the workers, in two steps: `start`, then `create`."""

    begun: ClassVar["EarlyWorkers | None"] = None

    @classmethod
    def start(cls, config: Any) -> None:
        """Begin to start the workers of verl's `config`; returns at once."""
        cls.begun = super().create(config=config, llm_client=None)

    @classmethod
    @auto_await  # type: ignore[untyped-decorator]
    async def create(cls, **known: Any) -> "EarlyWorkers":
        """The manager of the workers that `start` has begun, once they have what verl's `create` is given."""
        manager = cls.begun
        if manager is None:
            raise RuntimeError("expected EarlyWorkers.start before create, found no workers; see verl_trainer.py")
        know(manager, known)
        ray.get([worker.__ray_call__.remote(know, known) for worker in manager.agent_loop_workers])
        return manager


def know(holder: Any, known: dict[str, Any]) -> None:
    """Give a manager or a worker the objects it was made without."""
    vars(holder).update(known)
