"""The report: one HTML file without any outside reference, from what the stages left on disk.

Every section but the scores is left out, with a sentence, where its input is missing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lyrics import io
from lyrics.config import Config
from lyrics.data.files import BadImageError
from lyrics.errors import InputError
from lyrics.evaluate import charts, gallery, pictures, plots
from lyrics.evaluate.tasks import SYSTEMS
from lyrics.pages import template

WEB, CLEAN = Path("data/raw/web"), Path("data/clean")
REFINED, FOUNDATION = Path("data/refined"), Path("models/foundation")
PARTS = ("tokenizer", "llm", "clip", "tagger", "detector", "segmenter")
_TEMPLATE = Path(__file__).with_name("template")
_THUMBNAIL_PX = 128
_EXAMPLES = 6


def write(reports: Path, config: Config) -> None:
    """Write `reports / "index.html"` from evaluation.json and samples/ beside it, and the folders of the stages.

    Raises:
        InputError: evaluation.json is missing, or a picture of the gallery is.
    """
    path = reports / "evaluation.json"
    if not path.exists():
        raise InputError(f"{path} does not exist; make it with: python -m lyrics evaluate")
    evaluation = io.read_json(path)
    io.write_text(reports / "index.html", render(evaluation, reports / "samples", config))


def render(evaluation: Mapping[str, Any], samples: Path, config: Config) -> str:
    of_splits = gallery.cards(
        samples, REFINED, config.evaluate.gallery_size, config.seed, config.refine.coordinate_format
    )
    return template(_TEMPLATE / "report.html").render(
        config=config,
        evaluation=evaluation,
        style=(_TEMPLATE / "report.css").read_text(),
        script=(_TEMPLATE / "report.js").read_text(),
        cards=charts.headline_cards(evaluation),
        panels=charts.kind_panels(evaluation),
        table=score_table(evaluation),
        systems=charts.SYSTEM_NAMES,
        stages=[(name, charts.loss_curves(folder), _quality(folder)) for name, folder in plots.STAGES.items()],
        chart={"width": charts.WIDTH, "height": charts.HEIGHT},
        gallery=[card for _, of_split in of_splits for card in of_split],
        cleaning=cleaning(),
        parts=[_part(name) for name in PARTS if (FOUNDATION / name / "manifest.json").exists()],
        refined=flatten(io.read_json(REFINED / "summary.json")) if (REFINED / "summary.json").exists() else [],
        headline=headline(evaluation),
    )


def headline(evaluation: Mapping[str, Any]) -> str:
    """The split that the page opens with: test if it was evaluated, else the first."""
    splits = list(evaluation["splits"])
    return "test" if "test" in splits else splits[0]


def score_table(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every score, one row: the text to read and the value to sort by of each system."""
    rows = []
    for split, scores in evaluation["splits"].items():
        for metric, entry in scores.items():
            name, _, kind = metric.partition("/")
            cells = [(charts.shown(metric, entry[system]), entry[system]) for system in SYSTEMS]
            rows.append({"split": split, "metric": name, "kind": kind or "all", "cells": cells, "n": entry["n"]})
    return rows


def cleaning() -> dict[str, Any] | None:
    """Counts per reason with thumbnails of what was dropped; None where cleaning left no report."""
    path = CLEAN / "report.json"
    if not path.exists():
        return None
    report = io.read_json(path)
    score = report.get("score") or {}
    of_reason = score.get("reasons", {})
    reasons = []
    for reason, count in report["dropped"].items():
        examples = [_example(example) for example in report.get("examples", {}).get(reason, [])[:_EXAMPLES]]
        numbers = of_reason.get(reason, {})
        reasons.append(
            {"reason": reason, "count": count, "share": count / max(1, report["pairs"]), "examples": examples}
            | {key: numbers.get(key) for key in ("precision", "recall")}
        )
    return {
        "pairs": report["pairs"],
        "kept": report["kept"],
        "reasons": reasons,
        "not_checked": {name: count for name, count in report.get("not_checked", {}).items() if count},
        "precision": score.get("precision"),
        "recall": score.get("recall"),
        "largest": max([1, *report["dropped"].values()]),
    }


def _example(example: Mapping[str, str]) -> dict[str, str | None]:
    """A dropped pair; `picture` is None where it cannot be decoded."""
    tar = WEB / example["shard"]
    picture = None
    for suffix in ("jpg", "png", "webp"):
        try:
            picture = pictures.data_uri(f"{tar}::{example['key']}.{suffix}", _THUMBNAIL_PX)
            break
        except (InputError, BadImageError):
            continue
    return {
        "picture": picture,
        "caption": example.get("caption", ""),
        "detail": example["detail"],
        "key": example["key"],
    }


def _quality(folder: Path) -> list[tuple[str, str]]:
    path = folder / "quality.json"
    return flatten(io.read_json(path)) if path.exists() else []


def _part(name: str) -> dict[str, Any]:
    manifest = io.read_json(FOUNDATION / name / "manifest.json")
    size = sum(path.stat().st_size for path in (FOUNDATION / name).rglob("*") if path.is_file())
    return manifest | {"part": name, "bytes": size, "quality": flatten(manifest.get("quality", {}))}


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested tables as (name, text) pairs: `test: images` → `200`; lists are left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}: {key}" if prefix else str(key)
        name = name.replace("_", " ")
        if isinstance(value, Mapping):
            pairs += flatten(value, name)
        elif isinstance(value, float) and not value.is_integer():
            pairs.append((name, f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"))
        elif isinstance(value, int | float):
            pairs.append((name, f"{value:,.0f}"))
        elif isinstance(value, str):
            pairs.append((name, value))
    return pairs
