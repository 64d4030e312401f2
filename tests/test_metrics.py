"""The names of our metrics follow the scheme of `shared/metrics.py`, and their labels take few values."""

import json
import re
from pathlib import Path

import pytest
from metric_names import our_metrics, shown_names

from services.trainer import status
from shared.metrics import REGISTRY

OURS = [metric for metric in our_metrics() if not metric.name.startswith(("process_", "python_"))]
RECORDED = json.loads((Path(__file__).parent / "recorded_steps.json").read_text(encoding="utf-8"))
# Labels and how many values each may take: routes, reasons, parts, stages, bounds of a histogram.
MOST_VALUES = 64
VERL_NAMES = 400  # of verl's own metrics, which are the label of one family
DERIVED_UNITS = re.compile(r"_(ms|milliseconds|minutes|hours|percent|share|kb|mb|gb|mib|gib|wh|kwh)(_total)?$")


@pytest.mark.parametrize("metric", OURS, ids=lambda metric: metric.name)
def test_a_name_says_whose_it_is_and_has_a_base_unit(metric: object) -> None:
    names = shown_names([metric])  # type: ignore[list-item]
    for name in names:
        assert re.fullmatch(r"drzero_(retrieval|solver|trainer)(_[a-z0-9]+)+", name)
        assert not DERIVED_UNITS.search(name)


@pytest.mark.parametrize("metric", OURS, ids=lambda metric: metric.name)
def test_counters_and_only_they_end_with_total_and_every_metric_is_explained(metric: object) -> None:
    kind, name, words = metric.type, metric.name, metric.documentation  # type: ignore[attr-defined]
    shown = shown_names([metric])  # type: ignore[list-item]
    assert all(one.endswith("_total") == (kind == "counter") for one in shown)
    assert not name.endswith("_info") or kind == "gauge"
    assert words.endswith((".", ")"))


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda one: one["role"])
def test_a_recorded_step_is_shown_whole_and_its_labels_take_few_values(recorded: dict[str, object]) -> None:
    verl, ours, seconds = (recorded[name] for name in ("verl", "ours", "attempt_seconds"))
    status.show_step(recorded["step"], verl, ours, attempt_seconds=seconds)  # type: ignore[arg-type]
    trainer = {metric.name: metric for metric in REGISTRY.collect() if metric.name.startswith("drzero_trainer_")}
    assert {sample.labels["name"] for sample in trainer["drzero_trainer_verl"].samples} == verl.keys()  # type: ignore[attr-defined]
    for name, metric in trainer.items():
        values = {tuple(sorted(sample.labels.items())) for sample in metric.samples}
        assert len(values) <= (VERL_NAMES if name == "drzero_trainer_verl" else MOST_VALUES), name
