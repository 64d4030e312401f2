"""What the trainer shows while it runs: /health, /metrics, /report and /safety.html on settings.trainer.port.

Gauges hold the newest step: verl's names as they are in `drzero_trainer_metric{name="actor/grad_norm"}`, and each name
of `step_metrics.py` in one family per kind, such as `drzero_trainer_reward_part{part="format_think"}` or
`drzero_trainer_hop{hop="3",name="score_mean"}`; the rest by their full name in `drzero_trainer_rollouts{name=…}`. Two
more are made of verl's: where the time of the step went, and how far rollout and trained model differ.
Counters grow over the steps that this process has seen. /health is 200 while the process lives, and its `status` is
`warning` while an alarm is raised or the trainer waits.
"""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import Counter, Gauge, Histogram

from services.trainer.guards import NAMES, Alarm
from services.trainer.step_metrics import REWARD_TAIL, mismatch, step_times
from shared.access import Access, api_token
from shared.metrics import REGISTRY, SECONDS, metrics_text
from shared.settings import TrainerSettings
from shared.sockets import listen

STEP = Gauge("drzero_trainer_step", "Last finished optimizer step.", registry=REGISTRY)
STAGE = Gauge("drzero_trainer_stage", "1 for the stage that runs.", ["stage"], registry=REGISTRY)
ROUND = Gauge("drzero_trainer_round", "The round that the stage belongs to.", registry=REGISTRY)
WAITING = Gauge("drzero_trainer_waiting", "1 while the trainer waits; /health says for what.", registry=REGISTRY)
ALARM = Gauge("drzero_trainer_alarm", "Bad steps in a row, 0 for none.", ["name"], registry=REGISTRY)

METRIC = Gauge("drzero_trainer_metric", "verl's metrics of the last step.", ["name"], registry=REGISTRY)
PART = Gauge("drzero_trainer_reward_part", "Mean of each reward part, last step.", ["part"], registry=REGISTRY)
BEST = Gauge("drzero_trainer_reward_part_max", "Maximum of a reward part, last step.", ["part"], registry=REGISTRY)
SOLVED = Gauge("drzero_trainer_solved_share", "Share of questions by right attempts.", ["right"], registry=REGISTRY)
HOP = Gauge("drzero_trainer_hop", "Rollouts and scores by hop, last step.", ["hop", "name"], registry=REGISTRY)
REASONING = Gauge("drzero_trainer_reasoning_share", "Share of questions by kind.", ["type"], registry=REGISTRY)
LATENCY = Gauge(
    "drzero_trainer_seconds",
    "Time of attempts, questions, and rollouts' generation and search, last step; reward_tail is how long the last "
    "verdict came after the last rollout.",
    ["of", "at"],
    registry=REGISTRY,
)
ROLLOUTS = Gauge("drzero_trainer_rollouts", "Other numbers of the last step's rollouts.", ["name"], registry=REGISTRY)

STEP_SECONDS = Gauge(
    "drzero_trainer_step_seconds",
    "Time of the last step by part; all but validation sum to the step, and reward is what it adds to generation.",
    ["part"],
    registry=REGISTRY,
)
MISMATCH = Gauge(
    "drzero_trainer_mismatch",
    "Trained model against rollout engine on the tokens of the last step: correlation of their probabilities (1: "
    "equal), mean_difference and largest_difference of a probability, and two estimates of KL(rollout || trained) in "
    "nats, kl and k3_kl (0: equal). A guided turn differs by its guidance.",
    ["measure"],
    registry=REGISTRY,
)

REFUSED = Counter("drzero_trainer_refused_steps", "Batches refused and made again.", registry=REGISTRY)
INVALID = Counter("drzero_trainer_invalid_rollouts", "Rollouts lost, by reason.", ["reason"], registry=REGISTRY)
SEARCHES = Counter("drzero_trainer_searches", "Search calls of rollouts, failed ones among them.", registry=REGISTRY)
FAILED = Counter("drzero_trainer_searches_failed", "Broken search calls and those without papers.", registry=REGISTRY)
BROKEN = Counter("drzero_trainer_broken_calls", "Search calls that cannot be read.", ["kind"], registry=REGISTRY)
ATTEMPTS = Counter("drzero_trainer_attempts", "Solver attempts by how they ended.", ["ended"], registry=REGISTRY)
ATTEMPT_S = Histogram("drzero_trainer_attempt_seconds", "Time of an attempt.", buckets=SECONDS, registry=REGISTRY)

PREFIXES = {"solved/": SOLVED, "reasoning/": REASONING, "hop/": HOP, "seconds/": LATENCY}
SUFFIXES = {"_mean": PART, "_max": BEST}
FAMILIES = (*PREFIXES.values(), *SUFFIXES.values(), ROLLOUTS)
RUN_TOTALS = {"invalid/": INVALID, "calls_broken/": BROKEN, "ended/": ATTEMPTS}


class Health(TypedDict):
    """The parts of /health that change."""

    stage: str
    round: int
    step: int
    alarms: list[str]
    waiting: str | None


HEALTH: Health = {"stage": "", "round": 0, "step": 0, "alarms": [], "waiting": None}


def show_step(
    step: int,
    verls: Mapping[str, float | None],
    ours: Mapping[str, float],
    *,
    attempt_seconds: Iterable[float] = (),
) -> None:
    """Show a finished step: verl's metrics (None: not finite), `step_metrics`, and the time of each attempt.

    Call it once per step: the counters add what it brings.
    """
    STEP.set(step)
    HEALTH["step"] = step
    metrics = {name: math.nan if value is None else value for name, value in verls.items()}
    for gauge, numbers in ((METRIC, metrics), (STEP_SECONDS, step_times(metrics)), (MISMATCH, mismatch(metrics))):
        replace(gauge, {(name,): value for name, value in numbers.items()})
    families: dict[Gauge, dict[tuple[str, ...], float]] = {gauge: {} for gauge in FAMILIES}
    for name, value in ours.items():
        gauge, labels = family(name)
        families[gauge][labels] = value
    for gauge, values in families.items():
        replace(gauge, values)
    add_to_totals(metrics, ours)
    for seconds in attempt_seconds:
        ATTEMPT_S.observe(seconds)


def show_alarms(alarms: Sequence[Alarm]) -> None:
    """Show the alarms of the newest step in place of those before."""
    streaks = {alarm.name: alarm.streak for alarm in alarms}
    for name in NAMES:
        ALARM.labels(name).set(streaks.get(name, 0))
    HEALTH["alarms"] = [alarm.text for alarm in alarms]


def show_waiting(text: str | None) -> None:
    """Say why the trainer waits, or that it no longer does."""
    WAITING.set(text is not None)
    HEALTH["waiting"] = text


def show_stage(stage: str, number: int) -> None:
    """Mark the stage that runs now, and its round."""
    replace(STAGE, {(stage,): 1})
    ROUND.set(number)
    HEALTH["stage"] = stage
    HEALTH["round"] = number


def family(name: str) -> tuple[Gauge, tuple[str, ...]]:
    """The gauge and the labels of one name of `step_metrics`."""
    if name == REWARD_TAIL:  # one number, of no distribution
        return LATENCY, ("reward_tail", "")
    for prefix, gauge in PREFIXES.items():
        if name.startswith(prefix):
            return gauge, tuple(name.removeprefix(prefix).split("/"))
    for suffix, gauge in SUFFIXES.items():
        if name.endswith(suffix):
            return gauge, (name.removesuffix(suffix),)
    return ROLLOUTS, (name,)


def replace(gauge: Gauge, values: Mapping[tuple[str, ...], float]) -> None:
    """Set the gauge to these values by labels, and drop all other labels: a reader at any moment sees no gap."""
    for labels, value in values.items():
        gauge.labels(*labels).set(value)
    shown = {tuple(sample.labels.values()) for metric in gauge.collect() for sample in metric.samples}
    for labels in shown - values.keys():
        gauge.remove(*labels)


def add_to_totals(verls: Mapping[str, float], ours: Mapping[str, float]) -> None:
    """Add one step to the counters."""
    REFUSED.inc(verls.get("drzero/refused", 0))
    SEARCHES.inc(ours.get("searches_made", 0) + ours.get("searches_failed", 0))
    FAILED.inc(ours.get("searches_failed", 0))
    for prefix, counter in RUN_TOTALS.items():
        for name, count in ours.items():
            if name.startswith(prefix):
                counter.labels(name.removeprefix(prefix)).inc(count)


def health() -> dict[str, object]:
    """The body of /health."""
    calm = not HEALTH["alarms"] and HEALTH["waiting"] is None
    return {"status": "ok" if calm else "warning", **HEALTH}


def newest_page(run: Path, name: str) -> Response:
    """A page of the last round that has a report."""
    pages = sorted(run.glob(f"*/report/{name}"), key=lambda page: int(page.parts[-3]))
    if not pages:
        return JSONResponse({"detail": "no report yet: it is written when a round ends"}, status_code=404)
    return FileResponse(pages[-1], media_type="text/html")


def serve_in_background(trainer: TrainerSettings, run: Path) -> uvicorn.Server:
    """Serve the run in this folder until the process ends; returns the server, whose `should_exit` ends it earlier."""
    app = FastAPI(title="Dr. Zero trainer")
    app.add_middleware(Access, token=api_token())

    @app.get("/health")
    def show_health() -> JSONResponse:
        return JSONResponse(health())

    @app.get("/metrics")
    def metrics() -> Response:
        body, kind = metrics_text()
        return Response(body, media_type=kind)

    @app.get("/report")
    def show_report() -> Response:
        return newest_page(run, "report.html")

    @app.get("/safety.html")  # as the report links to it
    def show_safety() -> Response:
        return newest_page(run, "safety.html")

    listener = listen("trainer", trainer.host, trainer.port)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="status", daemon=True).start()
    return server
