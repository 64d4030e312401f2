"""What verl starts last, started first: each of these processes imports for a dozen seconds or two.

verl makes the workers that drive rollouts, and the router that sends their requests to engines, when the engines are
ready. Here they are made before that and import while models load; when verl asks for them, they get what did not
exist before. The workers' manager is named to verl as `rollout.agent.agent_loop_manager_class`; for the router verl has
no such setting, so its function that makes one is replaced in the process of the trainer.
"""

import importlib
from typing import Any, ClassVar

import ray
from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.utils.ray_utils import auto_await
from verl.workers.rollout import router

CLIENT = "verl.workers.rollout.llm_server"  # the module of what the workers are given last


class EarlyWorkers(AgentLoopManagerTQ):  # type: ignore[misc]
    """verl's manager of the workers, in two steps: `start`, then `create`."""

    begun: ClassVar["EarlyWorkers | None"] = None

    @classmethod
    def start(cls, config: Any) -> None:
        """Begin to start the workers of verl's `config`; returns at once."""
        manager = super().create(config=config, llm_client=None)
        for worker in manager.agent_loop_workers:
            worker.__ray_call__.remote(load, CLIENT)
        cls.begun = manager

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


def start_router() -> None:
    """Begin to start verl's router; verl's next call for one gets it, with the servers that it names."""
    actor = ray.remote(router.GlobalRequestLoadBalancer).remote(servers={})

    def get_router_handle(servers: dict[str, Any], **_: Any) -> Any:
        ray.get(actor.add_servers.remote(servers))
        return actor

    router.get_router_handle = get_router_handle


def know(holder: Any, known: dict[str, Any]) -> None:
    """Give a manager or a worker the objects it was made without."""
    vars(holder).update(known)


def load(_: Any, module: str) -> None:
    """Import a module in a worker, before it is needed."""
    importlib.import_module(module)
