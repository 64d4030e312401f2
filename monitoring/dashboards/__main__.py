"""`python -m monitoring.dashboards` writes `monitoring/grafana/dashboards/*.json` from the modules beside this one.

Each query stands in them once. A test asks a real Prometheus for every one, and another compares the files with what
this module writes.
"""

import json
from pathlib import Path

from monitoring.dashboards.hardware import HARDWARE
from monitoring.dashboards.retrieval import RETRIEVAL
from monitoring.dashboards.reward import REWARD
from monitoring.dashboards.solver import SOLVER
from monitoring.dashboards.training import TRAINING
from monitoring.panels import Dashboard, dashboard_json

FOLDER = Path(__file__).parents[1] / "grafana/dashboards"
DASHBOARDS = (TRAINING, REWARD, RETRIEVAL, SOLVER, HARDWARE)


def main() -> None:
    """Write all files."""
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.name}.json").write_text(text_of(dashboard), encoding="utf-8")


def text_of(dashboard: Dashboard) -> str:
    """The file of a dashboard."""
    return json.dumps(dashboard_json(dashboard), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
