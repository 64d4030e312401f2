"""What a run has done so far, over all its trainings, restarts and repeated steps: `runs/<run>/totals.json`.

The driver adds each step that it sees finish and writes the file before it shows the sums, so that a counter of
/metrics goes on where it was when the trainer is started again, and never falls: Prometheus would take a fall for
a counter that began anew and count everything twice. A step that is made again after a kill counts again: it was work.
Pure but for `read_totals` and `write_totals`.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from shared.files import write_atomically
from shared.metrics import SECONDS

FILE = "totals.json"
# Counter → what it counts, and its label where it has one.
COUNTERS = {
    "steps": ("Finished optimizer steps, those that were made again among them.", None),
    "step_seconds": ("Seconds of the finished steps.", None),
    "tokens": ("Tokens of prompts and responses that were trained on.", None),
    "refused_steps": ("Batches refused and made again.", None),
    "rollouts": ("Rollouts of finished steps, lost ones among them.", None),
    "invalid_rollouts": ("Rollouts lost, by reason.", "reason"),
    "searches": ("Search calls of rollouts, failed ones among them.", None),
    "failed_searches": ("Broken search calls and those without papers.", None),
    "broken_calls": ("Search calls that cannot be read, by kind.", "kind"),
    "attempts": ("Solver attempts by how they ended.", "ended"),
}
# Counter → what a step adds to it: one of verl's metrics, or of `step_metrics`.
OF_VERL = {"step_seconds": "timing_s/step", "tokens": "perf/total_num_tokens", "refused_steps": "drzero/refused"}
OF_OURS = {"rollouts": "rollouts", "failed_searches": "searches_failed"}
FAMILIES = {"invalid/": "invalid_rollouts", "calls_broken/": "broken_calls", "ended/": "attempts"}


@dataclass
class Totals:
    """The sums of a run: by counter and label ("" for none), and how long its attempts took."""

    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    attempts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))  # by the bounds of SECONDS, and above
    attempt_seconds: float = 0.0
    last_step: float = 0.0  # when the newest step was seen to finish, in seconds since 1970; 0: none has

    def add(self, counter: str, amount: float, label: str = "") -> None:
        """Count more; what is not a positive number (verl's nan) is none."""
        values = self.counts.setdefault(counter, {})
        values[label] = values.get(label, 0.0) + (amount if amount > 0 else 0.0)

    def add_step(
        self, verls: Mapping[str, float], ours: Mapping[str, float], attempt_seconds: Iterable[float], *, now: float
    ) -> None:
        """Add a step that has finished `now`: verl's metrics, `step_metrics`, and the time of each attempt."""
        self.last_step = now
        self.add("steps", 1)
        for counter, name in OF_VERL.items():
            self.add(counter, verls.get(name, 0.0))
        for counter, name in OF_OURS.items():
            self.add(counter, ours.get(name, 0.0))
        self.add("searches", ours.get("searches_made", 0.0) + ours.get("searches_failed", 0.0))
        for name, count in ours.items():
            prefix, slash, label = name.partition("/")
            if prefix + slash in FAMILIES:
                self.add(FAMILIES[prefix + slash], count, label)
        for seconds in attempt_seconds:
            self.attempts[bisect_left(SECONDS, seconds)] += 1
            self.attempt_seconds += seconds


def families(totals: Totals) -> Iterator[Metric]:
    """The sums as Prometheus' counters, and the time of an attempt as its histogram."""
    for counter, (words, label) in COUNTERS.items():
        family = CounterMetricFamily(f"drzero_trainer_{counter}", words, labels=[label] if label else [])
        values = dict(totals.counts.get(counter, {}))  # a copy: a step may end while a scrape is answered
        for value, count in values.items() if label else [("", values.get("", 0.0))]:
            family.add_metric([value] if label else [], count)
        yield family
    bounds = [*map(floatToGoString, SECONDS), "+Inf"]
    times = HistogramMetricFamily("drzero_trainer_attempt_seconds", "Time of a solver attempt.")
    sums = [float(count) for count in accumulate(totals.attempts)]
    times.add_metric([], list(zip(bounds, sums, strict=True)), totals.attempt_seconds)
    yield times


def read_totals(folder: Path) -> Totals:
    """The totals of the run in this folder; zeros when it has none yet."""
    file = folder / FILE
    return Totals(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else Totals()


def write_totals(folder: Path, totals: Totals) -> None:
    """Keep them beside the run's state."""
    write_atomically(folder / FILE, json.dumps(asdict(totals), indent=2) + "\n", alone=True)
