"""A trainer's status page on recorded steps, for tests of monitoring: it shows one more for each line of its input.

Run from the repository's root: `PYTHONPATH=. python tests/trainer_page.py`, with settings as variables. It prints
a line once it listens, and ends with its input, like a trainer whose run is done.
"""

import json
import sys
from pathlib import Path

from services.trainer import status
from services.trainer.disk_metrics import show_disk
from services.trainer.guards import alarms
from services.trainer.paths import run_paths
from shared.settings import load_settings

STEPS = json.loads((Path(__file__).parent / "recorded_steps.json").read_text(encoding="utf-8"))


def main() -> None:
    """Show them and end."""
    settings = load_settings()
    run = run_paths(settings).run
    run.mkdir(parents=True, exist_ok=True)
    server = status.serve_in_background(settings)
    status.show_run(settings)
    status.show_spent({"1.seeds": {"seconds": 12.0, "energy_wh": 0.5, "cost": 0.1}})
    show_disk(settings)
    status.show_stage("train", 1)
    status.show_training(settings.trainer, 0, {}, {})
    print("listening", flush=True)
    for number, _ in enumerate(sys.stdin):
        one = STEPS[number % len(STEPS)]
        if one["role"] == "solver":
            status.show_stage("solver_train", 1)
        status.show_step(one["step"], one["verl"], one["ours"], attempt_seconds=one["attempt_seconds"])
        status.show_alarms(alarms({one["step"]: one["verl"] | one["ours"]}, settings.trainer.guards))
    status.finish(server)


if __name__ == "__main__":
    main()
