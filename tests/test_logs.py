"""Logs: JSON lines where no terminal is, readable text on one; every line says which service and run."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TALK = """
import logging
from shared.logs import configure
from shared.settings import load_settings
log = configure("ingest", load_settings())
log.info("papers read", count=3, title="β-carotene")
log.debug("detail")
logging.getLogger("somebody.else").warning("foreign %s", "line")
logging.getLogger("httpx").info("one line per request")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it broke")
"""


def environment(**settings: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DRZERO_") and k != "NO_COLOR"}
    return kept | {f"DRZERO_{name}": value for name, value in settings.items()}


def stderr_of(**settings: str) -> str:
    # Warnings are errors in the child, too: a terminal is no place for a library's advice.
    command = [sys.executable, "-W", "error", "-c", TALK]
    done = subprocess.run(command, cwd=ROOT, env=environment(**settings), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done.stderr


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_without_a_terminal_every_line_is_json_with_service_and_run() -> None:
    lines = json_lines(stderr_of(TRAINER__RUN="first"))
    assert [line["event"] for line in lines] == ["papers read", "foreign line", "it broke"]
    assert {(line["service"], line["run"]) for line in lines} == {("ingest", "first")}
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert (lines[0]["count"], lines[0]["title"]) == (3, "β-carotene")
    assert lines[0]["timestamp"].endswith("Z")
    assert "ZeroDivisionError" in lines[2]["exception"]


def test_the_level_decides_what_is_written() -> None:
    assert [line["event"] for line in json_lines(stderr_of(LOG__LEVEL="error"))] == ["it broke"]
    assert "detail" in [line["event"] for line in json_lines(stderr_of(LOG__LEVEL="debug"))]


def test_the_console_form_is_readable_text() -> None:
    text = stderr_of(LOG__FORMAT="console")
    first = text.splitlines()[0]
    assert not first.startswith("{")
    assert "papers read" in first
    assert "ingest" in first
    assert "ZeroDivisionError" in text
    assert "foreign line" in text


def test_on_a_terminal_the_form_is_readable_unless_json_is_asked_for() -> None:
    def on_terminal(**settings: str) -> str:
        ours, theirs = pty.openpty()
        subprocess.run([sys.executable, "-c", TALK], cwd=ROOT, env=environment(**settings), stderr=theirs, timeout=60)
        os.close(theirs)
        text = os.read(ours, 65536).decode(errors="replace")
        os.close(ours)
        return text

    assert not on_terminal().startswith("{")
    assert on_terminal(LOG__FORMAT="json").startswith("{")
