"""Stage `evaluate`: the held-out verdicts before and after training → `evaluation.json`.

verl's validation rolls out the held-out seeds greedily with the untrained model (step 0) and with the trained one
(last step), through the same loop, search and reward. With few seeds the differences are noise: each mean comes with
its 95 % interval (normal approximation) so that nobody reads more into it.
"""

import json
import math
from typing import Any

import structlog

from services.trainer.paths import RunPaths
from services.trainer.records import Verdict, mean_parts, read_lines, valid_only
from shared.files import ArtifactError, publish, read_manifest, stale_reason
from shared.settings import Settings


def evaluate(settings: Settings, paths: RunPaths, log: structlog.stdlib.BoundLogger) -> None:
    """Write evaluation.json unless the current one is there."""
    origin = {"training": read_manifest(paths.training).identity, "weights": read_manifest(paths.weights).identity}
    if stale_reason(paths.evaluation, settings={}, made_from=origin) is None:
        log.info("evaluation reused", path=str(paths.evaluation))
        return
    rows = list(read_lines(paths.training / "held_out.jsonl"))
    before = [v for v in valid_only(rows) if v["step"] == 0]
    after = [v for v in valid_only(rows) if v["step"] == settings.trainer.steps]
    if not before or not after:
        raise ArtifactError(
            f"expected judged held-out rollouts before and after training, found {len(before)} and {len(after)} (of "
            f"{len(rows)} in all); delete {paths.training} and run the stage train again"
        )
    change = json.loads((paths.weights / "change.json").read_text(encoding="utf-8"))
    result = {"before": summary(before), "after": summary(after), "weights": change}
    with publish(paths.evaluation, settings={}, made_from=origin) as draft:
        text = json.dumps(result, indent=2, sort_keys=True) + "\n"
        (draft.path / "evaluation.json").write_text(text, encoding="utf-8")
        draft.rows = len(after)
    log.info(
        "evaluated",
        rollouts=len(after),
        reward_before=round(result["before"]["score"]["mean"], 3),
        reward_after=round(result["after"]["score"]["mean"], 3),
    )


def summary(verdicts: list[Verdict]) -> dict[str, Any]:
    """Per number in the verdicts, which are all valid: mean, 95 % half-width and count."""
    return {name: interval([v[name] for v in verdicts]) for name in mean_parts(verdicts)}


def interval(values: list[float]) -> dict[str, float]:
    """Mean and half-width of its 95 % confidence interval, 1.96·s/√n; half-width 0 for a single value."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((v - mean) ** 2 for v in values) / (count - 1) if count > 1 else 0.0
    return {"mean": mean, "half_width_95": 1.96 * math.sqrt(variance / count), "count": float(count)}
