"""The names of metrics that are there: ours from the registry, others' from the samples in tests/exporters/."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import promql_parser
import yaml
from prometheus_client import Metric

from shared.metrics import REGISTRY

ROOT = Path(__file__).parents[1]
RULES = sorted((ROOT / "monitoring/rules").glob("*.yml"))
EXPORTERS = Path(__file__).parent / "exporters"
OF_PROMETHEUS = {"up", "ALERTS"}


def our_metrics() -> list[Metric]:
    """Everything that the services declare, whether it has a number yet or not."""
    import services.retrieval.app
    import services.retrieval.routes
    import services.solver.server
    import services.trainer.disk_metrics
    import services.trainer.status  # noqa: F401

    return list(REGISTRY.collect())


def shown_names(metrics: Iterable[Metric]) -> set[str]:
    """The names of their series."""
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {metric.name + ending for metric in metrics for ending in endings.get(metric.type, ("",))}


def others_names() -> set[str]:
    """The names in the samples of other exporters; as they stand, because not all of their counters end with _total."""
    texts = [path.read_text(encoding="utf-8") for path in EXPORTERS.glob("*.prom")]
    return {name for text in texts for name in re.findall(r"^([\w:]+)[ {]", text, re.MULTILINE)}


def rules() -> Iterator[dict[str, str]]:
    """All rules, those that record and those that alert."""
    for path in RULES:
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            yield from group["rules"]


def recorded_names() -> set[str]:
    """The names that rules record."""
    return {rule["record"] for rule in rules() if "record" in rule}


def asked_names(expression: str) -> set[str]:
    """The names that a query asks for; Grafana's span of a rate may stand in it."""
    return set(_names(promql_parser.parse(expression.replace("$__rate_interval", "1m"))))


def _names(node: object) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    for part in ("vector_selector", "expr", "lhs", "rhs", "param"):
        if (inner := getattr(node, part, None)) is not None:
            yield from _names(inner)
    for argument in getattr(node, "args", None) or ():
        yield from _names(argument)
