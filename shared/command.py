"""What every command does around its work: settings, logs, and one sentence with a non-zero exit on a known error.

Used as `raise SystemExit(run("ingest", main))`. Known errors are the ones whose text is written for the user;
anything else is a defect and keeps its traceback. What papers, models and services say is printed as `plain` leaves it.
"""

import argparse
import re
import sys
from collections.abc import Callable

import structlog

from shared.access import api_token
from shared.clients import ServiceError
from shared.files import ArtifactError
from shared.logs import configure
from shared.settings import Settings, SettingsError, load_settings

# What a terminal might obey: controls but line feed and tab, and what turns the direction of a line around.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class UsageError(RuntimeError):
    """The command cannot do what was asked; the text says expected, found and what to do."""


def run(service: str, work: Callable[[Settings, structlog.stdlib.BoundLogger], None]) -> int:
    """Run one command; returns the exit status: 0 done, 1 a known error, 2 wrong settings, 130 interrupted."""
    try:
        settings = load_settings()
        api_token()  # one that cannot be used ends everything at once
    except SettingsError as error:
        print(plain(f"{service}: {error}"), file=sys.stderr)
        return 2
    log = configure(service, settings)
    try:
        work(settings, log)
    except (ArtifactError, ServiceError, UsageError) as error:
        print(plain(f"{service}: {error}"), file=sys.stderr)
        return 1
    except OSError as error:  # disk full, permission, address in use: the system's words plus the file
        print(plain(f"{service}: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{service}: interrupted", file=sys.stderr)
        return 130
    return 0


def plain(text: str) -> str:
    """A text without what a terminal might obey."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def counted(text: str, most: int) -> int:
    """A number of 1 to `most` on a command line; ArgumentTypeError for any other text."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(most)) and 1 <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {most}, found {text!r}")
    return int(text)
