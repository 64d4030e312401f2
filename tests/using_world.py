"""What the tests of asking, writing and taking away share: an agent that searches once, and commands as processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from shared.settings import Settings, as_environment

ROOT = Path(__file__).parents[1]
# What a terminal would obey: colours, a cleared screen, a title, C1's CSI, a backspace, and a line turned around.
CONTROLS = ("\x1b[31m", "\x1b[2J", "\x1b]0;x\x07", "\x9b31m", "\x08", "\r", "\x7f", "\u202e")


def call_for(*queries: str) -> str:
    """A turn that searches."""
    call = {"name": "search", "arguments": {"query_list": list(queries)}}
    return f"<think>I look it up.</think><tool_call>{json.dumps(call)}</tool_call>"


def searched(body: dict[str, Any]) -> bool:
    """Whether a request comes after a search."""
    return any(message["role"] == "tool" for message in body["messages"][-2:])


def searches_once(body: dict[str, Any]) -> str:
    """Searches, then answers and cites the paper that it was shown, and one that it was not."""
    if not searched(body):
        return call_for("imatinib kinase")
    return "<think>It is there.</think><answer>BCR-ABL</answer> (PMID 7, PMID 12345)"


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """The variables of a child process with these settings."""
    left_out = ("DRZERO_", "HF_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    return inherited | as_environment(settings) | more


def started(module: str, *words: str, settings: Settings, **more: str) -> "subprocess.Popen[str]":
    """A command of the trainer as a process, which Ctrl-C ends wherever the tests run: a shell's jobs ignore it."""
    return subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, "-m", f"services.trainer.{module}", *words],
        cwd=ROOT, env=environment(settings, **more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(module: str, *words: str, settings: Settings, **more: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command."""
    process = started(module, *words, settings=settings, **more)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors
