"""A process that a driver starts ends with it, also when the driver dies before the process has asked for that."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASKS = """
import sys
from services.trainer.verl_main import die_with_parent
die_with_parent(int(sys.argv[1]))
print("goes on")
"""
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_process_goes_on_while_its_parent_lives() -> None:
    done = run(ASKS, str(os.getpid()))
    assert (done.returncode, done.stdout) == (0, "goes on\n")


def test_a_process_whose_parent_died_before_it_asked_ends() -> None:
    done = run(ASKS, str(os.getpid() + 1))
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
