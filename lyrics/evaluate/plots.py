"""Tables for `dvc plots`: loss curves of both stages with their chance lines, and every headline score by system."""

import csv
import io as text_io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lyrics import io
from lyrics.errors import InputError
from lyrics.evaluate.tasks import HEADLINE, SYSTEMS

STAGES = {"stage1": Path("models/stage1"), "stage2": Path("models/stage2")}


def read_history(folder: Path) -> list[dict[str, float]]:
    """Logged steps of a training stage, oldest first; empty where the stage left none."""
    path = folder / "history.jsonl"
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} is not JSON lines ({error}); train the stage again") from None
    return [{key: value for key, value in row.items() if isinstance(value, int | float)} for row in rows]


def read_chance(folder: Path) -> dict[str, float]:
    """What a model that learned nothing scores, by metric without its stage (`itc_loss`)."""
    path = folder / "config.json"
    chance = io.read_json(path).get("chance", {}) if path.exists() else {}
    return {key.rpartition("/")[2]: value for key, value in chance.items() if isinstance(value, int | float)}


def write(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Write scores.csv, and stage1.csv and stage2.csv where the stage left a history."""
    rows = [
        {"split": split, "metric": metric, "system": system, "bar": f"{split} {metric} {system}", "score": entry[system]}
        for split, metrics in evaluation["splits"].items()
        for metric, entry in metrics.items()
        if metric in HEADLINE.values()
        for system in SYSTEMS
        if entry[system] is not None
    ]
    _write_csv(folder / "scores.csv", rows, ["split", "metric", "system", "bar", "score"])
    for stage, source in STAGES.items():
        history = read_history(source)
        chance = read_chance(source)
        names = sorted({key for row in history for key in row if key.endswith("_loss") or key.endswith("/loss")})
        table = []
        for step in history:
            short = {key.rpartition("/")[2]: step[key] for key in names if key in step}
            table.append({"step": step["step"], **short, **{f"{key}_chance": chance[key] for key in short if key in chance}})
        if table:
            columns = sorted({key for row in table for key in row} - {"step"})
            _write_csv(folder / f"{stage}.csv", table, ["step", *columns])


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    buffer = text_io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    io.write_text(path, buffer.getvalue())
