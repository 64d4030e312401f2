"""The search service as a process: `python -m services.retrieval`.

Listens at once, loads in the background (/ready says when), ends with one sentence and a non-zero status when the
index is missing or made from something else, and on SIGTERM finishes the requests in flight first.
"""

import signal
import sys

import structlog
import uvicorn

from services.retrieval.app import create_app
from shared.command import run
from shared.gpu import self_test
from shared.settings import Settings
from shared.sockets import listen

GRACE_S = 10  # a container is killed 10 s after SIGTERM, by default


def main(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Serve until SIGTERM or SIGINT; raises what kept the searcher from opening."""
    listener = listen("retrieval", settings.retrieval.host, settings.retrieval.port)
    self_test(settings, "retrieval", log)
    failures: list[BaseException] = []

    def give_up(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(settings, on_failure=give_up)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_S))
    # uvicorn repeats the signal after its graceful end; without this the status would be "killed by SIGTERM".
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    log.info("listening", address=f"http://{settings.retrieval.host}:{settings.retrieval.port}", docs="/docs")
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    log.info("stopped")


if __name__ == "__main__":
    raise SystemExit(run("retrieval", main))
