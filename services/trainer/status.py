"""What the trainer shows while it runs: /health, /metrics and /report on settings.trainer.port.

Gauges carry verl's names and the reward's parts as they are: `drzero_trainer_metric{name="actor/grad_norm"}` and
`drzero_trainer_reward_part{part="format_think"}`.
"""

import threading
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import Gauge

from shared.metrics import REGISTRY, metrics_text
from shared.settings import TrainerSettings
from shared.sockets import listen

STEP = Gauge("drzero_trainer_step", "Last finished optimizer step.", registry=REGISTRY)
METRIC = Gauge("drzero_trainer_metric", "verl's metrics of the last step.", ["name"], registry=REGISTRY)
PART = Gauge("drzero_trainer_reward_part", "Mean of each reward part, last step.", ["part"], registry=REGISTRY)
STAGE = Gauge("drzero_trainer_stage", "1 for the stage that runs.", ["stage"], registry=REGISTRY)


def show_step(step: int, metrics: dict[str, float], parts: dict[str, float]) -> None:
    """Set the gauges to a finished step."""
    STEP.set(step)
    for name, value in metrics.items():
        METRIC.labels(name).set(value)
    for name, value in parts.items():
        PART.labels(name).set(value)


def show_stage(stage: str) -> None:
    """Mark the stage that runs now."""
    STAGE.clear()
    STAGE.labels(stage).set(1)


def serve_in_background(trainer: TrainerSettings, report: Path) -> uvicorn.Server:
    """Serve until the process ends; returns the server, whose `should_exit` ends it earlier."""
    app = FastAPI(title="Dr. Zero trainer")

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    def metrics() -> Response:
        body, kind = metrics_text()
        return Response(body, media_type=kind)

    @app.get("/report")
    def show_report() -> Response:
        page = report / "report.html"
        if not page.is_file():
            return JSONResponse({"detail": "no report yet: it is written when the run ends"}, status_code=404)
        return FileResponse(page, media_type="text/html")

    listener = listen("trainer", trainer.host, trainer.port)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="status", daemon=True).start()
    return server
