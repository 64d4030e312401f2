"""verl's own `main_ppo`, as a child that ends when its parent ends, however the parent dies.

Started by train.py with verl's overrides as arguments; not meant to be called by hand.
"""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent dies; elsewhere a killed parent leaves this process to the user."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    die_with_parent()
    from verl.trainer.main_ppo import main

    main()
