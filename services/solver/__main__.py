"""Serve the solver model: `python -m services.solver`, OpenAI-compatible on settings.solver.port.

Two engines with one contract, chosen by `DRZERO_SOLVER__ENGINE`: SGLang's own server on GPUs, transformers' server
code on machines without one. Both answer /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics,
/get_model_info and /update_weights_from_disk.
"""

import os
import sys

import structlog

from services.solver.sglang import sglang_command
from shared.command import run
from shared.gpu import self_test
from shared.serving import weights_to_serve
from shared.settings import Settings
from shared.sockets import listen


def main(settings: Settings, log: structlog.stdlib.BoundLogger) -> None:
    """Start the engine of the settings; returns when the server is stopped."""
    solver = settings.solver
    listener = listen("solver", solver.host, solver.port)
    self_test(settings, "solver", log)
    folder = weights_to_serve(settings)
    log.info("solver starts", engine=solver.engine, model=folder, port=solver.port)
    if solver.engine == "sglang":
        command = sglang_command(solver, folder)
        # /health is asked every few seconds; by default SGLang generates a token each time.
        os.environ.setdefault("SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION", "0")
        listener.close()  # SGLang takes the port itself
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *command])  # noqa: S606
    from services.solver.server import serve

    serve(solver, folder, listener)


if __name__ == "__main__":
    raise SystemExit(run("solver", main))
