"""Curves as the run page draws them: numbers by step → the geometry of an SVG, whose text the template escapes. Pure.

With more steps than a screen can tell apart, neighbours are drawn as their mean. A number that is not finite is a gap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

WIDTH, HEIGHT = 360.0, 150.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 8.0, 20.0
MOST_POINTS = 90
Curve = Mapping[int, float]  # step → value
Point = tuple[int, int, float]  # first step, last step, mean


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: its name, the newest value, and the pieces between gaps as SVG points."""

    name: str
    now: str
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Strip:
    """The part of a chart that belongs to one point, and what is read there."""

    x: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """What the template draws."""

    title: str
    lines: tuple[Line, ...]
    strips: tuple[Strip, ...]
    levels: tuple[tuple[float, str], ...]  # y and label
    steps: tuple[tuple[float, str], ...]  # x and label


def draw(title: str, curves: Mapping[str, Curve]) -> Chart | None:
    """A chart of the curves that have any finite number; None when there is none."""
    points = {name: thinned(curve) for name, curve in curves.items()}
    points = {name: there for name, there in points.items() if any(math.isfinite(value) for _, _, value in there)}
    if not points:
        return None
    values = [value for there in points.values() for _, _, value in there if math.isfinite(value)]
    marks = levels(min(values), max(values))
    steps = sorted({(first, last) for there in points.values() for first, last, _ in there})
    low, high = steps[0][0], steps[-1][1]

    def x(first: float, last: float) -> float:
        share = ((first + last) / 2 - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (marks[-1] - value) / (marks[-1] - marks[0]) * (HEIGHT - TOP - BOTTOM)

    lines = []
    for name, there in points.items():
        newest = curves[name][max(curves[name])]
        drawn = [(x(first, last), y(mean) if math.isfinite(mean) else math.nan) for first, last, mean in there]
        lines.append(Line(name, short(newest), pieces(drawn)))
    return Chart(
        title,
        tuple(lines),
        strips({place: x(*place) for place in steps}, points),
        tuple((round(y(mark), 1), short(mark)) for mark in marks),
        tuple((round(x(step, step), 1), str(step)) for step in sorted({low, (low + high) // 2, high})),
    )


def thinned(curve: Curve) -> list[Point]:
    """The points that are drawn: all, or means of neighbours where there are more than `MOST_POINTS`."""
    steps = sorted(curve)
    size = max(1, math.ceil(len(steps) / MOST_POINTS))
    groups = [steps[start : start + size] for start in range(0, len(steps), size)]
    made = []
    for group in groups:
        finite = [curve[step] for step in group if math.isfinite(curve[step])]
        made.append((group[0], group[-1], fmean(finite) if finite else math.nan))
    return made


def levels(low: float, high: float) -> list[float]:
    """Three to six round values that enclose all numbers between `low` and `high`."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        margin = max(abs(high) * 0.1, 0.1)
        low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
    rough = (high - low) / 3
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def pieces(points: Sequence[tuple[float, float]]) -> tuple[str, ...]:
    """The points between gaps, as an SVG polyline takes them; a lone one is drawn as a dash."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isnan(y):
            runs.append([])
        else:
            runs[-1].append((x, y))
    made = []
    for run in filter(None, runs):
        drawn = run if len(run) > 1 else [(run[0][0] - 2, run[0][1]), (run[0][0] + 2, run[0][1])]
        made.append(" ".join(f"{x:.1f},{y:.1f}" for x, y in drawn))
    return tuple(made)


def strips(places: Mapping[tuple[int, int], float], points: Mapping[str, list[Point]]) -> tuple[Strip, ...]:
    """For each point the text that a pointer over it shows; `places` has where the points are."""
    values = {name: {(first, last): value for first, last, value in there} for name, there in points.items()}
    centres = list(places.values())
    width = min((b - a for a, b in pairwise(centres)), default=WIDTH - LEFT - RIGHT)
    made = []
    for (first, last), centre in places.items():
        step = f"step {first}" if first == last else f"steps {first} to {last}"
        shown = [f"{name} {short(of[first, last])}" for name, of in values.items() if (first, last) in of]
        made.append(Strip(round(centre - width / 2, 1), round(width, 1), f"{step}: {', '.join(shown)}"))
    return tuple(made)


def short(value: float) -> str:
    """A number in at most four digits."""
    if not math.isfinite(value):
        return "not finite"
    return (
        f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"
    )
