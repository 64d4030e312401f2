"""verl's own `main_ppo` in one process, a child that ends when its parent ends, however the parent dies.

Started by train.py with verl's overrides as arguments; not meant to be called by hand.
"""

import ctypes
import os
import signal
import sys
from types import SimpleNamespace

PR_SET_PDEATHSIG = 1
PARENT = "DRIVER_PID"  # variable: the process that has started this one


def die_with_parent(parent: int) -> None:
    """Ask Linux for SIGTERM when the parent dies; elsewhere a killed parent leaves this process to the user.

    A parent that died before it was asked is missed by Linux, so that is looked for.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """verl's `main`, but its TaskRunner runs here: as an actor it would import everything once more."""
    import ray
    from omegaconf import DictConfig
    from verl.trainer import main_ppo

    runner = main_ppo.TaskRunnerV1.__ray_metadata__.modified_class()

    def run(config: DictConfig) -> "ray.ObjectRef[None]":
        os.environ.update(ray.get_runtime_context().runtime_env["env_vars"])
        runner.run(config)
        return ray.put(None)

    # What verl calls of an actor class, `remote()`, and of its actor, `run.remote(config)`.
    actor = SimpleNamespace(run=SimpleNamespace(remote=run))
    main_ppo.TaskRunnerV1 = SimpleNamespace(remote=lambda: actor)
    main_ppo.main()


if __name__ == "__main__":
    die_with_parent(int(os.environ[PARENT]))
    main()
