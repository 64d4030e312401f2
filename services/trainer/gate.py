"""When a run switches from graded to gated format scores: `trainer.reward.gate_at`.

The parent process decides from the finished steps and writes `gate.json`; reward workers read it. The switch takes
effect one step after the next, so that no step is scored with two forms.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from shared.files import write_atomically
from shared.settings import RewardSettings


def gated_from(mean_format: Mapping[int, float], gate_at: float | None) -> int | None:
    """The first step scored with the gate: two after the first step whose mean F reaches `gate_at`; None if never."""
    reached = [step for step, mean in mean_format.items() if gate_at is not None and mean >= gate_at]
    return min(reached) + 2 if reached else None


def write_gate(path: Path, step: int | None) -> None:
    """Tell the reward workers; None removes what an earlier attempt had written."""
    if step is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or json.loads(path.read_text(encoding="utf-8"))["from_step"] != step:
        write_atomically(path, json.dumps({"from_step": step}))


def form_at(step: int, settings: RewardSettings, path: Path) -> str:
    """`graded` or `gated` for a step."""
    if settings.format_form == "gated" or settings.gate_at is None or not path.is_file():
        return settings.format_form
    return "gated" if step >= json.loads(path.read_text(encoding="utf-8"))["from_step"] else "graded"
