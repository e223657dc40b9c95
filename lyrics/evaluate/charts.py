"""Numbers to places: what the report's template needs to draw bars, dots and loss curves. No markup here."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lyrics.evaluate import plots
from lyrics.evaluate.tasks import HEADLINE, SYSTEMS

SYSTEM_NAMES = {
    "model": "model",
    "most_frequent": "most frequent",
    "other_image": "other image",
    "other_features": "other features",
}
METRIC_NAMES = {
    "vqa_accuracy": "Visual questions",
    "refer_accuracy": "Referring expressions",
    "pope_accuracy": "Object hallucination",
    "cider": "Captions",
}
METRIC_UNITS = {
    "vqa_accuracy": "VQA accuracy",
    "refer_accuracy": "accuracy at IoU > 0.5",
    "pope_accuracy": "POPE accuracy",
    "cider": "CIDEr",
}
LOSS_NAMES = {
    "itc_loss": "Image and caption (ITC)",
    "itc_spatial_loss": "Image and spatial text (ITC)",
    "itm_loss": "Matching (ITM)",
    "icg_loss": "Captioning (ICG)",
    "msp_loss": "Masked spatial (MSP)",
    "lm_loss": "Answer tokens",
}
WIDTH, HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 12, 12, 24
_SMOOTH = 0.1  # share of the curve that the moving mean spans


def shown(metric: str, value: float | None) -> str:
    """A score as people write it: `73.5 %`, and CIDEr, BLEU and the like as `1.24`."""
    if value is None:
        return "–"
    if metric.partition("/")[0] in ("cider", "rouge_l", "meteor") or metric.startswith("bleu"):
        return f"{value:.2f}"
    return f"{100 * value:.1f} %"


def headline_cards(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One card a task: for every split four bars, as percentages of the card's scale."""
    cards = []
    for metric in HEADLINE.values():
        entries = {split: scores[metric] for split, scores in evaluation["splits"].items() if metric in scores}
        if not entries:
            continue
        top = 1.0
        if metric == "cider":
            values = [entry[key] or 0.0 for entry in entries.values() for key in (*SYSTEMS, "high")]
            top = nice_ceiling(max(values))
        groups = []
        for split, entry in entries.items():
            bars = [_bar(metric, system, entry[system], top) for system in SYSTEMS]
            known = [entry[system] for system in SYSTEMS[1:] if entry[system] is not None]
            gain = entry["model"] - max(known) if known else None
            interval = {"from": 100 * entry["low"] / top, "to": 100 * min(entry["high"], top) / top}
            text = f"95 % interval {shown(metric, entry['low'])} to {shown(metric, entry['high'])}"
            groups.append(
                {"split": split, "n": entry["n"], "bars": bars, "interval": interval, "interval_text": text}
                | {"gain": None if gain is None else _gain(metric, gain), "value": shown(metric, entry["model"])}
            )
        scale = f"bars end at {top:g}" if metric == "cider" else ""
        cards.append(
            {"metric": metric, "name": METRIC_NAMES[metric], "unit": METRIC_UNITS[metric], "scale": scale}
            | {"groups": groups}
        )
    return cards


def _bar(metric: str, system: str, value: float | None, top: float) -> dict[str, Any]:
    width = 0.0 if value is None else 100 * min(max(value / top, 0.0), 1.0)
    return {"system": system, "name": SYSTEM_NAMES[system], "width": width, "text": shown(metric, value)}


def _gain(metric: str, gain: float) -> str:
    text = f"{abs(gain):.2f}" if metric == "cider" else f"{100 * abs(gain):.1f} points"
    sign = "±" if not text.strip("0. points") else "+" if gain > 0 else "−"
    return sign + text


def kind_panels(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy by kind: for each metric and split, rows of four dots on a line from 0 to 1."""
    panels = []
    for metric in ("vqa_accuracy", "refer_accuracy", "pope_accuracy"):
        for split, scores in evaluation["splits"].items():
            rows = [
                {"kind": name.partition("/")[2], "n": entry["n"], "text": shown(metric, entry["model"])}
                | {"dots": [_bar(metric, system, entry[system], 1.0) for system in reversed(SYSTEMS)]}
                for name, entry in scores.items()
                if name.startswith(f"{metric}/")
            ]
            if rows:
                panels.append({"metric": metric, "name": METRIC_NAMES[metric], "split": split, "rows": rows})
    return panels


def nice_ceiling(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 × a power of ten."""
    if value <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within [low, high]."""
    step = nice_ceiling((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 10) for place in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A loss over steps in a WIDTH × HEIGHT drawing; `lines` are (name, y, text) of chance and floor."""

    name: str
    points: str
    smooth: str
    end: tuple[str, str, str]
    x_ticks: list[tuple[str, str]]
    y_ticks: list[tuple[str, str]]
    lines: list[tuple[str, str, str]]
    description: str


def loss_curves(folder: Path) -> list[Curve]:
    """Every loss in a stage's history; chance and floor where the stage states them."""
    history = plots.read_history(folder)
    names = dict.fromkeys(key for row in history for key in row if key.endswith("loss"))
    chance, floor = plots.read_constants(folder, "chance"), plots.read_constants(folder, "floor")
    curves = []
    for key in names:
        points = [(row["step"], row[key]) for row in history if key in row and math.isfinite(row[key])]
        name = plots.short_name(key)
        if points:
            levels = [(label, table[name]) for label, table in (("chance", chance), ("floor", floor)) if name in table]
            curves.append(_curve(LOSS_NAMES.get(name, name.replace("_", " ")), points, levels))
    return curves


def _curve(name: str, points: Sequence[tuple[float, float]], levels: Sequence[tuple[str, float]]) -> Curve:
    values = [value for _, value in points] + [level for _, level in levels]
    last_step, last = points[-1]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.5
    low, high = max(0.0, low - margin) if low >= 0 else low - margin, high + margin
    right = max(last_step, 1.0)

    def x(step: float) -> str:
        return f"{_LEFT + (WIDTH - _LEFT - _RIGHT) * step / right:.1f}"

    def y(value: float) -> str:
        return f"{_TOP + (HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low):.1f}"

    smooth = _moving_mean([value for _, value in points])
    steps = [step for step, _ in points]
    first_step, first = points[0]
    said = [f"{label} {level:.2f}" for label, level in levels]
    return Curve(
        name=name,
        points=" ".join(f"{x(step)},{y(value)}" for step, value in points),
        smooth=" ".join(f"{x(step)},{y(value)}" for step, value in zip(steps, smooth, strict=True)),
        end=(x(last_step), y(smooth[-1]), f"{smooth[-1]:.2f}"),
        x_ticks=[(x(tick), f"{tick:g}") for tick in ticks(0, right, 4)],
        y_ticks=[(y(tick), f"{tick:g}") for tick in ticks(low, high, 4)],
        lines=[(label, y(level), f"{label} {level:.2f}") for label, level in levels],
        description=f"{name}: from {first:.2f} at step {first_step:g} to {last:.2f} at step {last_step:g}"
        + (f"; {', '.join(said)}" if said else ""),
    )


def _moving_mean(values: Sequence[float]) -> list[float]:
    half = int(len(values) * _SMOOTH / 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
