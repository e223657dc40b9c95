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


def read_constants(folder: Path, name: str) -> dict[str, float]:
    """A table of config.json by short metric name.

    Args:
        name: `chance`, what a model that learned nothing scores, or `floor`, what a perfect one does.
    """
    path = folder / "config.json"
    values = io.read_json(path).get(name, {}) if path.exists() else {}
    return {short_name(key): value for key, value in values.items() if isinstance(value, int | float)}


def write(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Write scores.csv, and stage1.csv and stage2.csv where the stage left a history."""
    rows: list[dict[str, Any]] = []
    for split, metrics in evaluation["splits"].items():
        for metric in HEADLINE.values():
            for system in SYSTEMS if metric in metrics else ():
                row = {"split": split, "metric": metric, "system": system, "score": metrics[metric][system]}
                rows.append({**row, "bar": f"{split} {metric} {system}"})
    rows = [row for row in rows if row["score"] is not None]
    _write_csv(folder / "scores.csv", rows, ["split", "metric", "system", "bar", "score"])
    for stage, source in STAGES.items():
        table = loss_table(source)
        if table:
            columns = sorted({key for row in table for key in row} - {"step"})
            _write_csv(folder / f"{stage}.csv", table, ["step", *columns])


def loss_table(folder: Path) -> list[dict[str, float]]:
    """Losses by step, with their chance beside them in columns `NAME_chance`."""
    chance = read_constants(folder, "chance")
    table = []
    for row in read_history(folder):
        losses = {short_name(key): value for key, value in row.items() if key.endswith("loss")}
        lines = {f"{name}_chance": chance[name] for name in losses if name in chance}
        table.append({"step": row["step"], **losses, **lines})
    return table


def short_name(key: str) -> str:
    """`stage1/itc_loss` → `itc_loss`."""
    return key.rpartition("/")[2]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    buffer = text_io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    io.write_text(path, buffer.getvalue())
