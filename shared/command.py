"""What every command does around its work: settings, logs, and one sentence with a non-zero exit on a known error.

Used as `raise SystemExit(run("ingest", main))`. Known errors are the ones whose text is written for the user;
anything else is a defect and keeps its traceback.
"""

import sys
from collections.abc import Callable

import structlog

from shared.access import api_token
from shared.clients import ServiceError
from shared.files import ArtifactError
from shared.logs import configure
from shared.settings import Settings, SettingsError, load_settings


class UsageError(RuntimeError):
    """The command cannot do what was asked; the text says expected, found and what to do."""


def run(service: str, work: Callable[[Settings, structlog.stdlib.BoundLogger], None]) -> int:
    """Run one command; returns the exit status: 0 done, 1 a known error, 2 wrong settings, 130 interrupted."""
    try:
        settings = load_settings()
        api_token()  # one that cannot be used ends everything at once
    except SettingsError as error:
        print(f"{service}: {error}", file=sys.stderr)
        return 2
    log = configure(service, settings)
    try:
        work(settings, log)
    except (ArtifactError, ServiceError, UsageError) as error:
        print(f"{service}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # disk full, permission, address in use: the system's words plus the file
        print(f"{service}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{service}: interrupted", file=sys.stderr)
        return 130
    return 0
