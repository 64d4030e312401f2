"""Dashboards as plain values, and their JSON as Grafana provisions it.

A dashboard is rows of panels, laid out from left to right; a panel shows the answers to PromQL queries. Nothing is read
or written here; what there is to see stands in `dashboards.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

COLUMNS = 24
SCHEMA = 39  # of Grafana 11
RATE = "$__rate_interval"  # Grafana's span of a rate, at least four scrapes long
SOURCE = {"type": "prometheus", "uid": "prometheus"}  # of grafana/provisioning/datasources/


@dataclass(frozen=True, slots=True)
class Query:
    """What Prometheus is asked; `legend` names each answer by its labels, as `{{label}}`."""

    expr: str
    legend: str = "{{job}}"


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: curves, or the newest number of each query."""

    title: str
    queries: Sequence[Query]
    unit: str = "short"  # Grafana's name of it
    about: str = ""  # shown at the panel's corner
    kind: Literal["timeseries", "stat"] = "timeseries"
    width: int = 8
    stacked: bool = False
    most: float | None = None  # upper end of the axis


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page; `name` is its file and its address."""

    name: str
    title: str
    rows: Sequence[Row]


def curves(title: str, *queries: tuple[str, str], **looks: Any) -> Panel:
    """A panel of curves from (query, legend) pairs."""
    return Panel(title, [Query(*query) for query in queries], **looks)


def number(title: str, expr: str, unit: str = "short", *, legend: str = "", about: str = "") -> Panel:
    """A panel with the newest number, or with the name of a label when the legend asks for one."""
    return Panel(title, [Query(expr, legend)], unit, about, kind="stat", width=4)


def verl(title: str, names: str, *, unit: str = "short", about: str = "") -> Panel:
    """Curves of verl's own numbers, by a regular expression of their names."""
    return curves(title, (f'drzero_trainer_verl{{name=~"{names}"}}', "{{name}}"), unit=unit, about=about)


def parts(title: str, names: str, about: str = "") -> Panel:
    """Curves of parts of the reward, by a regular expression of their names."""
    return curves(title, (f'drzero_trainer_reward_mean{{part=~"{names}"}}', "{{part}}"), about=about)


def shares(title: str, names: str, about: str = "") -> Panel:
    """Curves of shares of the last step's rollouts, by a regular expression of their names."""
    return curves(title, (f'drzero_trainer_rollouts_ratio{{of=~"{names}"}}', "{{of}}"), unit="percentunit", about=about)


def quantiles(title: str, histogram: str, *, chosen: str = "") -> Panel:
    """Median, 95th and 99th percentile of a histogram of seconds; `chosen` are matchers of its labels."""
    rate = f"sum by (le) (rate({histogram}_bucket{chosen}[{RATE}]))"
    return curves(title, *((f"histogram_quantile({q}, {rate})", f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)), unit="s")


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana reads from a file."""
    return {
        "uid": f"drzero-{dashboard.name}",
        "title": dashboard.title,
        "tags": ["drzero"],
        "schemaVersion": SCHEMA,
        "editable": False,
        "refresh": "5s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,  # the same moment is marked in all panels
        "links": [
            {"type": "dashboards", "tags": ["drzero"], "title": "Dr. Zero", "asDropdown": True, "keepTime": True}
        ],
        "annotations": {"list": [alerts_shown()]},
        "templating": {"list": []},
        "panels": placed(dashboard.rows),
    }


def alerts_shown() -> dict[str, Any]:
    """Alerts as marks in every curve."""
    return {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{severity}}",
        "step": "30s",
    }


def placed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Headings and panels with their places on the page, numbered from 1."""
    shown: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        shown.append(
            {"type": "row", "title": row.title, "collapsed": False, "panels": [], "gridPos": box(0, top, COLUMNS, 1)}
        )
        left, top = 0, top + 1
        height = 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                left, top = 0, top + height
            height = 4 if panel.kind == "stat" else 8
            shown.append(panel_json(panel) | {"gridPos": box(left, top, panel.width, height)})
            left += panel.width
        top += height
    return [{"id": number} | panel for number, panel in enumerate(shown, start=1)]


def box(left: int, top: int, width: int, height: int) -> dict[str, int]:
    """A place on the page."""
    return {"x": left, "y": top, "w": width, "h": height}


def panel_json(panel: Panel) -> dict[str, Any]:
    """A panel without its place."""
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "targets": [target(query, name) for query, name in zip(panel.queries, "ABCDEFGH", strict=False)],
        "fieldConfig": {"defaults": field_defaults(panel), "overrides": []},
        "options": stat_options(panel) if panel.kind == "stat" else curve_options(),
    }


def target(query: Query, name: str) -> dict[str, Any]:
    """A query of a panel."""
    return {"refId": name, "datasource": SOURCE, "expr": query.expr, "legendFormat": query.legend, "editorMode": "code"}


def field_defaults(panel: Panel) -> dict[str, Any]:
    """Unit, axis and line of a panel's numbers."""
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0 if panel.stacked else None, "max": panel.most}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        fill = 40 if panel.stacked else 0
        # A step's numbers stand until the next step: steps, not slopes.
        line = {"drawStyle": "line", "lineInterpolation": "stepAfter", "lineWidth": 1, "showPoints": "never"}
        defaults["custom"] = line | {"fillOpacity": fill, "stacking": stacking, "spanNulls": False}
    return {name: value for name, value in defaults.items() if value is not None}


def curve_options() -> dict[str, Any]:
    """Legend and tooltip of curves."""
    legend = {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull"]}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def stat_options(panel: Panel) -> dict[str, Any]:
    """A number in large, or the name that its legend gives."""
    named = any(query.legend for query in panel.queries)
    reduced = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    return {
        "reduceOptions": reduced,
        "textMode": "name" if named else "value",
        "colorMode": "none",
        "graphMode": "none",
    }
