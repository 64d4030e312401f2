"""What the trainer shows while it runs: /health, /metrics and the run page (`page.py`) on settings.trainer.port.

Gauges hold the newest step: verl's names as they are in `drzero_trainer_verl{name="actor/grad_norm"}`, and each name of
`step_metrics.py` in the family of its kind, such as `drzero_trainer_reward_mean{part="format_think"}`,
`drzero_trainer_rollouts_ratio{of="invalid"}` or `drzero_trainer_hop_score_mean{hop="3"}`. Two more are made of verl's:
where the time of the step went, and how far rollout and trained model differ. A trainer that is started again shows
the step it goes on from, and its counters go on where they were (`totals.py`). What lies on the disk is shown by
`disk_metrics.py`. /health is 200 while the process lives, and its `status` is `warning` while an alarm is raised or the
trainer waits.
"""

import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import uvicorn
from fastapi.responses import JSONResponse, Response
from prometheus_client import Gauge
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.background import BackgroundTask

from services.trainer.guards import NAMES, Alarm
from services.trainer.page import create_app
from services.trainer.paths import run_paths
from services.trainer.step_metrics import REWARD_TAIL, mismatch, step_times
from services.trainer.totals import Totals, families, read_totals, write_totals
from shared.access import api_token
from shared.metrics import REGISTRY, metrics_text
from shared.settings import Settings, TrainerSettings
from shared.sockets import listen

SCRAPED_LATELY_S = 60.0  # who has asked for metrics within this time will ask again
LAST_SCRAPE_S = 20.0  # how long a run that has ended waits for that


def gauge(name: str, words: str, *labels: str) -> Gauge:
    """A gauge of the trainer."""
    return Gauge(f"drzero_trainer_{name}", words, labels, registry=REGISTRY)


RUN = gauge("run_info", "The run, and its profile, as labels.", "run", "profile")
STEP = gauge("step", "Last finished optimizer step of the training.")
PLANNED_STEPS = gauge("planned_steps", "Optimizer steps that the training shall have.")
SAVE_EVERY = gauge("save_every_steps", "Steps between checkpoints.")
LAST_STEP = gauge("last_step_timestamp_seconds", "When a step last finished, in any training of the run; 0: none has.")
CHECKPOINT = gauge("checkpoint_timestamp_seconds", "When the training's newest checkpoint was complete; 0: none is.")
STAGE = gauge("stage", "1 for the stage that runs.", "stage")
STAGE_START = gauge("stage_start_timestamp_seconds", "When the stage that runs has begun, or begun again.")
ROUND = gauge("round", "The round that the stage belongs to.")
PLANNED_ROUNDS = gauge("planned_rounds", "Rounds that the run shall have.")
FINISHED = gauge("finished", "1 once everything that was asked for is done and the process ends.")
WAITING = gauge("waiting", "1 while the trainer waits; /health says for what.")
ALARM = gauge("alarm_steps", "Bad steps in a row, by alarm; 0: not raised.", "alarm")
SPENT = gauge("run_seconds", "Wall clock that the run's stages have taken, unfinished ones among them.")
ENERGY = gauge("run_energy_joules", "Energy that the GPUs took for them; 0 where they do not tell.")
COST = gauge("run_cost", "What they have cost, in the currency of trainer.price_per_hour; 0 where that is not set.")

VERL = gauge("verl", "verl's metrics of the last step, by their own names.", "name")
MEAN = gauge("reward_mean", "Mean of each part of the reward over the valid rollouts, last step.", "part")
BEST = gauge("reward_max", "Maximum of a part of the reward, last step.", "part")
RATIO = gauge("rollouts_ratio", "Shares, from 0 to 1, of the last step's rollouts or questions.", "of")
COUNT = gauge("step_count", "Numbers of rollouts, questions, searches and attempts, last step.", "of")
SOLVED = gauge("solved_ratio", "Share of the judged questions by number of right attempts, last step.", "right")
REASONING = gauge("reasoning_ratio", "Share of the questions by what they ask for, last step.", "type")
HOP_ROLLOUTS = gauge("hop_rollouts", "Valid rollouts by hop, last step.", "hop")
HOP_MEAN = gauge("hop_score_mean", "Mean reward by hop, last step.", "hop")
HOP_STD = gauge("hop_score_std", "Standard deviation of the reward by hop, last step.", "hop")
WORK = gauge("work_seconds", "Quantiles of what attempts, questions and rollouts took, last step.", "work", "at")
TAIL = gauge("reward_tail_seconds", "How long the last verdict came after the last rollout, last step.")

STEP_SECONDS = gauge(
    "step_seconds",
    "Time of the last step by part; all but validation sum to the step, and reward is what it adds to generation.",
    "part",
)
MISMATCH = gauge(
    "mismatch",
    "Trained model against rollout engine on the tokens of the last step: correlation of their probabilities (1: "
    "equal), mean_difference and largest_difference of a probability, and two estimates of KL(rollout || trained) in "
    "nats, kl and k3_kl (0: equal). A guided turn differs by its guidance.",
    "measure",
)

HOPS = {"count": HOP_ROLLOUTS, "score_mean": HOP_MEAN, "score_std": HOP_STD}
PREFIXES = {"solved/": SOLVED, "reasoning/": REASONING, "seconds/": WORK}
SUFFIXES = {"_mean": MEAN, "_max": BEST, "_share": RATIO}
FAMILIES = (*HOPS.values(), *PREFIXES.values(), *SUFFIXES.values(), COUNT)


class RunTotals(Collector):
    """The counters of the run that is served: kept in its folder, only in memory without one."""

    def __init__(self) -> None:
        self.totals = Totals()
        self._folder: Path | None = None

    def open(self, folder: Path) -> None:
        """Go on with the totals of the run in this folder."""
        self._folder, self.totals = folder, read_totals(folder)

    def save(self) -> None:
        """Write down what has been added."""
        if self._folder is not None:
            write_totals(self._folder, self.totals)

    def collect(self) -> Iterator[Metric]:
        """What /metrics shows."""
        return families(self.totals)


@dataclass
class Scrapes:
    """Who asks for /metrics: when it was last done, and whether it was done since the run has ended."""

    newest: float = -math.inf
    ended: bool = False
    seen: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> None:
        """A run begins: nobody has asked yet."""
        self.newest, self.ended = -math.inf, False
        self.seen.clear()

    def note(self) -> BackgroundTask | None:
        """Take note of a scrape that begins; what is returned is to run once its reply is sent."""
        self.newest = time.monotonic()
        return BackgroundTask(self.seen.set) if self.ended else None


TOTALS = RunTotals()
REGISTRY.register(TOTALS)
SCRAPES = Scrapes()


class Health(TypedDict):
    """The parts of /health that change."""

    stage: str
    round: int
    step: int
    alarms: list[str]
    waiting: str | None


HEALTH: Health = {"stage": "", "round": 0, "step": 0, "alarms": [], "waiting": None}


def show_run(settings: Settings) -> None:
    """Show which run this is and what it shall have."""
    RUN.clear()
    RUN.labels(settings.trainer.run, settings.profile).set(1)
    PLANNED_ROUNDS.set(settings.trainer.iterations)


def show_spent(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Show what the stages of `run_state.py` have taken, from now on as they stand when they are asked for."""
    SPENT.set_function(lambda: taken(stages, "seconds"))
    ENERGY.set_function(lambda: taken(stages, "energy_wh") * 3600)
    COST.set_function(lambda: taken(stages, "cost"))


def taken(stages: Mapping[str, Mapping[str, Any]], name: str) -> float:
    """The sum of one number over all stages; what is not known counts nothing."""
    accounts = [account for stage in list(stages.values()) for account in (stage, stage.get("unfinished")) if account]
    return sum(float(account.get(name) or 0.0) for account in accounts)


def show_training(trainer: TrainerSettings, step: int, verls: Mapping[str, float], ours: Mapping[str, float]) -> None:
    """Show a training that begins or goes on after `step`, 0 for none, with that step's numbers and no alarm yet."""
    PLANNED_STEPS.set(trainer.steps)
    SAVE_EVERY.set(trainer.save_every)
    show_alarms([])
    show_numbers(step, verls, ours)


def show_checkpoint(completed: float) -> None:
    """Show when the newest checkpoint was complete, in seconds since 1970; 0 when there is none."""
    CHECKPOINT.set(completed)


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
    metrics = {name: math.nan if value is None else value for name, value in verls.items()}
    now = time.time()
    TOTALS.totals.add_step(metrics, ours, attempt_seconds, now=now)
    TOTALS.save()
    LAST_STEP.set(now)
    show_numbers(step, metrics, ours)


def show_numbers(step: int, verls: Mapping[str, float], ours: Mapping[str, float]) -> None:
    """Show a step's numbers in place of those before; counters stay as they are."""
    STEP.set(step)
    HEALTH["step"] = step
    for shown, numbers in ((VERL, verls), (STEP_SECONDS, step_times(verls)), (MISMATCH, mismatch(verls))):
        replace(shown, {(name,): value for name, value in numbers.items()})
    values: dict[Gauge, dict[tuple[str, ...], float]] = {shown: {} for shown in FAMILIES}
    for name, value in ours.items():
        if name != REWARD_TAIL:  # one number, of no distribution
            shown, labels = family(name)
            values[shown][labels] = value
    for shown, numbers_by_label in values.items():
        replace(shown, numbers_by_label)
    TAIL.set(ours.get(REWARD_TAIL, math.nan))


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
    STAGE_START.set(time.time())
    ROUND.set(number)
    HEALTH["stage"] = stage
    HEALTH["round"] = number


def family(name: str) -> tuple[Gauge, tuple[str, ...]]:
    """The gauge and the labels of one name of `step_metrics`."""
    if name.startswith("hop/"):
        _, hop, kind = name.split("/")
        return HOPS[kind], (hop,)
    for prefix, shown in PREFIXES.items():
        if name.startswith(prefix):
            return shown, tuple(name.removeprefix(prefix).split("/"))
    for suffix, shown in SUFFIXES.items():
        if name.endswith(suffix):
            return shown, (name.removesuffix(suffix),)
    return COUNT, (name,)


def replace(shown: Gauge, values: Mapping[tuple[str, ...], float]) -> None:
    """Set a gauge to these values by labels, and drop all other labels: a reader at any moment sees no gap."""
    for labels, value in values.items():
        shown.labels(*labels).set(value)
    there = {tuple(sample.labels.values()) for metric in shown.collect() for sample in metric.samples}
    for labels in there - values.keys():
        shown.remove(*labels)


def health() -> dict[str, object]:
    """The body of /health."""
    calm = not HEALTH["alarms"] and HEALTH["waiting"] is None
    return {"status": "ok" if calm else "warning", **HEALTH}


def serve_in_background(settings: Settings) -> uvicorn.Server:
    """Serve the settings' run until the process ends; returns the server, which `finish` ends with the run."""
    TOTALS.open(run_paths(settings).run)
    LAST_STEP.set(TOTALS.totals.last_step)
    FINISHED.set(0)
    SCRAPES.begin()
    app = create_app(settings, api_token())

    @app.get("/health")
    def show_health() -> JSONResponse:
        return JSONResponse(health())

    @app.get("/metrics")
    def metrics() -> Response:
        sent = SCRAPES.note()
        body, kind = metrics_text()
        return Response(body, media_type=kind, background=sent)

    listener = listen("trainer", settings.trainer.host, settings.trainer.port)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, limit_concurrency=100))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="status", daemon=True).start()
    return server


def finish(server: uvicorn.Server, *, wait_s: float = LAST_SCRAPE_S) -> None:
    """Show that the run has ended well and end the server.

    Whoever scrapes it is given `wait_s` seconds to see that: to Prometheus, a trainer that is gone without has died.
    """
    FINISHED.set(1)
    replace(STAGE, {})
    SCRAPES.ended = True
    if time.monotonic() - SCRAPES.newest < SCRAPED_LATELY_S:
        SCRAPES.seen.wait(wait_s)
    server.should_exit = True
