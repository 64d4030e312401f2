"""The dashboards: files are what the module writes, panels have places of their own, queries ask for what is there."""

import json
from pathlib import Path
from typing import Any

import pytest
from metric_names import OF_PROMETHEUS, asked_names, others_names, our_metrics, recorded_names, rules, shown_names

from monitoring.dashboards.__main__ import DASHBOARDS, FOLDER, text_of
from monitoring.panels import COLUMNS, Dashboard, dashboard_json

ROOT = Path(__file__).parents[1]
QUERIES = [
    (dashboard.name, panel.title, query.expr)
    for dashboard in DASHBOARDS
    for row in dashboard.rows
    for panel in row.panels
    for query in panel.queries
]
KNOWN = shown_names(our_metrics()) | others_names() | recorded_names() | OF_PROMETHEUS
EXPRESSIONS = sorted({expr for _, _, expr in QUERIES} | {rule["expr"] for rule in rules()})


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_the_file_is_what_the_module_writes(dashboard: Dashboard) -> None:
    text = (FOLDER / f"{dashboard.name}.json").read_text(encoding="utf-8")
    assert text == text_of(dashboard), "run `python -m monitoring.dashboards` and commit what it writes"


def test_no_file_is_left_of_a_dashboard_that_is_gone() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(dashboard.name for dashboard in DASHBOARDS)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_panels_have_places_of_their_own_and_titles_that_tell_them_apart_in_their_row(dashboard: Dashboard) -> None:
    taken: set[tuple[int, int]] = set()
    panels: list[dict[str, Any]] = dashboard_json(dashboard)["panels"]
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= COLUMNS
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
    for row in dashboard.rows:
        assert len({panel.title for panel in row.panels}) == len(row.panels)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_query_asks_only_for_metrics_that_are_there(expression: str) -> None:
    names = asked_names(expression)
    assert names
    assert names <= KNOWN


def test_every_metric_of_ours_is_on_a_dashboard_or_in_a_rule_or_named_here_with_the_reason() -> None:
    not_needed = {
        "drzero_trainer_run_seconds",  # for queries of one's own
        "drzero_trainer_run_info",  # tells runs apart in queries of one's own
        "drzero_trainer_planned_rounds",  # on the run's own page
        "drzero_trainer_step_seconds",  # the counter: for queries of one's own, over days
        "drzero_trainer_rollouts",
    }
    ours = [metric for metric in our_metrics() if metric.name.startswith("drzero_")]
    asked = set().union(*map(asked_names, EXPRESSIONS))
    assert {metric.name for metric in ours if not shown_names([metric]) & asked} == not_needed


def test_provisioning_names_the_data_source_and_the_folder_that_the_dashboards_use() -> None:
    import yaml

    place = ROOT / "monitoring/grafana/provisioning"
    [source] = yaml.safe_load((place / "datasources/prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    panels = [panel for one in DASHBOARDS for panel in dashboard_json(one)["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    [provider] = yaml.safe_load((place / "dashboards/drzero.yml").read_text(encoding="utf-8"))["providers"]
    mounts = (ROOT / "compose.monitoring.yaml").read_text(encoding="utf-8")
    assert f"./monitoring/grafana/dashboards:{provider['options']['path']}:ro" in mounts
    for one in DASHBOARDS:
        assert json.loads((FOLDER / f"{one.name}.json").read_text(encoding="utf-8"))["uid"] == f"drzero-{one.name}"
