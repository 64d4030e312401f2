"""Following one run of verl from outside: what its finished steps say, why it waits, and when it must be stopped.

`Watch` is asked once a second. It logs and shows each finished step, tells the reward workers when the format score
becomes gated, raises the alarms of `guards.py`, and sees outages and stalls. It decides nothing about processes:
`train.py` acts on what `Watch.look` returns.
"""

import json
import time
from dataclasses import dataclass, field

import structlog

from services.trainer import status
from services.trainer.checkpoints import completed_at, keep_copy
from services.trainer.gate import form_at, gated_from, write_gate
from services.trainer.guards import NEVER_FATAL, Alarm, alarms, last_good_step
from services.trainer.outage import read_outage
from services.trainer.paths import RunPaths
from services.trainer.records import TRAIN, read_metrics, read_verdicts
from services.trainer.step_metrics import attempt_seconds, console_lines, step_metrics
from shared.settings import Settings


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a run of verl must end. `good_step` is set when the weights went wrong after that step."""

    text: str
    good_step: int | None = None


@dataclass
class Watch:
    """The state of watching one run of verl."""

    settings: Settings
    paths: RunPaths
    log: structlog.stdlib.BoundLogger
    history: dict[int, dict[str, float]] = field(default_factory=dict)
    _signs: tuple[int, tuple[str, ...]] = (0, ())
    _last_change: float = field(default_factory=time.monotonic)
    _waiting: str | None = None

    def __post_init__(self) -> None:
        """Take the steps of earlier runs as read, so that they are not reported twice; show the newest of them."""
        verdicts = read_verdicts(self.paths.log, TRAIN)
        newest: tuple[int, dict[str, float], dict[str, float]] = (0, {}, {})
        for step, metrics in read_metrics(self.paths.log).items():
            if step in verdicts:
                newest = step, metrics, step_metrics(verdicts[step])
                self.history[step] = self._numbers(*newest)
        status.show_training(self.settings.trainer, *newest)
        status.show_checkpoint(completed_at(self.paths.checkpoints))
        self._tell_gate()

    def look(self) -> Problem | None:
        """What is new; a Problem when verl must be stopped."""
        problem = self._new_steps()
        if problem is not None:
            return problem
        self._show_waiting()
        if read_outage(self.paths.outage) is not None:
            return Problem("a service stayed away")
        return self._stall()

    def _new_steps(self) -> Problem | None:
        metrics = read_metrics(self.paths.log)
        fresh = [step for step in metrics if step not in self.history and "timing_s/step" in metrics[step]]
        verdicts = read_verdicts(self.paths.log, TRAIN) if fresh else {}
        for step in fresh:
            ours = step_metrics(verdicts.get(step, []))
            self.history[step] = self._numbers(step, metrics[step], ours)
            status.show_step(step, metrics[step], ours, attempt_seconds=attempt_seconds(verdicts.get(step, [])))
            for label, text in console_lines(step, ours, verdicts.get(step, [])):
                self.log.info(f"{label}: {text}")
            self.log.info("step finished", step=step, seconds=round(metrics[step]["timing_s/step"], 1))
            problem = self._guard(step)
            if problem is not None:
                return problem
        if fresh:
            self._tell_gate()
        return None

    def _numbers(self, step: int, verls: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
        """What the guards know of a step; rewards are compared only among steps scored with the same form."""
        gated = form_at(step, self.settings.trainer.reward, self.paths.gate) == "gated"
        return verls | ours | {"drzero/gated": float(gated)}

    def _guard(self, step: int) -> Problem | None:
        guards = self.settings.trainer.guards
        raised = alarms({s: m for s, m in self.history.items() if s <= step}, guards)
        status.show_alarms(raised)
        for alarm in raised:
            self.log.warning(f"alarm: {alarm.name}", text=alarm.text)
        harmful = [alarm for alarm in raised if alarm.name not in NEVER_FATAL]
        if not harmful:
            return None
        good = last_good_step(raised)
        # verl deletes old checkpoints as it goes on; the good one must outlive the warnings.
        keep_copy(self.paths.checkpoints, self.paths.good, through=good)
        fatal: list[Alarm] = [alarm for alarm in harmful if alarm.fatal]
        return Problem("; ".join(alarm.text for alarm in fatal), good_step=good) if fatal else None

    def _tell_gate(self) -> None:
        means = {step: numbers["format_mean"] for step, numbers in self.history.items() if "format_mean" in numbers}
        write_gate(self.paths.gate, gated_from(means, self.settings.trainer.reward.gate_at))

    def _show_waiting(self) -> None:
        text = None
        if self.paths.waiting.is_file():
            text = str(json.loads(self.paths.waiting.read_text(encoding="utf-8"))["text"])
        if text != self._waiting:
            self._waiting = text
            status.show_waiting(text)
            self.log.warning("training waits", reason=text) if text else self.log.info("goes on")

    def _stall(self) -> Problem | None:
        """A stall is the lack of verdicts, metrics and checkpoints.

        verl's own log does not count: a trainer that waits for a worker that has died goes on writing that it waits.
        """
        written = sum(path.stat().st_size for path in self.paths.log.glob("*.jsonl"))
        signs = written, tuple(sorted(str(path) for path in self.paths.checkpoints.glob("global_step_*/*")))
        if signs != self._signs or self._waiting:
            self._signs, self._last_change = signs, time.monotonic()
            status.show_checkpoint(completed_at(self.paths.checkpoints))
        elif time.monotonic() - self._last_change > self.settings.trainer.stall_s:
            return Problem(f"no sign of progress for {self.settings.trainer.stall_s:.0f} s")
        return None
