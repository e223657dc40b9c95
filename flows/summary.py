"""What a run ends with: scores beside baselines, one answered question, the version, times, what was reused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.stages import Outcome
from lyrics import io

REPORT = Path("reports/index.html")
EVALUATION = Path("reports/evaluation.json")
SAMPLES = Path("reports/samples")
REFINED = Path("data/refined")
SYSTEMS = {
    "model": "Lyrics",
    "most_frequent": "most frequent",
    "other_image": "other image",
    "other_features": "other features",
}


def score_rows(evaluation: Mapping[str, Any], headlines: bool = False) -> list[dict[str, str]]:
    """One row per split and metric, slices (`vqa_accuracy/colour`) included; `headlines`: per split and task."""
    from lyrics.evaluate.tasks import HEADLINE

    return [
        {
            "split": split,
            "metric": metric,
            **{title: _number(values.get(system)) for system, title in SYSTEMS.items()},
            "n": str(values.get("n", "")),
        }
        for split, metrics in evaluation.get("splits", {}).items()
        for metric, values in metrics.items()
        if not headlines or metric in HEADLINE.values()
    ]


def example() -> dict[str, str] | None:
    """The first question about a picture of `test` (else of another split) with the picture's path and the answer."""
    import pyarrow.parquet as pq

    for split in ("test", "val", "test_ood"):
        samples, images = SAMPLES / f"{split}.parquet", REFINED / split / "images.parquet"
        if not (samples.exists() and images.exists()):
            continue
        columns = ["image_id", "task", "question", "prediction"]
        rows = pq.read_table(samples, columns=columns).to_pylist()
        row = next((row for row in rows if row["task"] == "vqa"), next(iter(rows), None))
        if row is None:
            continue
        paths = pq.read_table(images, columns=["image_id", "path"], filters=[("image_id", "=", row["image_id"])])
        picture = paths.column("path")[0].as_py()
        return {"question": row["question"] or "Describe the image.", "picture": picture, "answer": row["prediction"]}
    return None


def report(outcomes: Sequence[Outcome], version: str, console: Console | None = None) -> None:
    """Print the end of a run. What lies in reports/ is its own only if it came as far as `evaluate`."""
    console = console or Console(width=110, highlight=False)
    evaluated = any(one.stage == "evaluate" for one in outcomes)
    if evaluated:
        evaluation = io.read_json(EVALUATION)
        console.print(_table("Scores beside their baselines", score_rows(evaluation, headlines=True)))
        console.print("The report has all metrics, by kind of question.", style="dim")
        for metric, reason in sorted(evaluation.get("absent", {}).items()):
            console.print(f"absent: {metric}: {reason}", style="dim", markup=False)
    shown = example() if evaluated else None
    if shown:
        console.print(f"\nQuestion  {shown['question']}\nPicture   {shown['picture']}", markup=False)
        console.print(f"Answer    {shown['answer']}\n", markup=False)
    times = [
        {"stage": one.stage, "result": one.how, "time": f"{one.seconds:.1f} s" if one.seconds >= 0.05 else ""}
        for one in outcomes
    ]
    console.print(_table("Stages", times))
    reused = [one.stage for one in outcomes if one.how != "ran"]
    console.print(f"Reused    {', '.join(reused) or 'nothing'}", markup=False)
    console.print(f"Model     {version}", markup=False)
    if evaluated:
        console.print(f"Report    {REPORT.absolute()}", markup=False, soft_wrap=True)


def _table(title: str, rows: Sequence[Mapping[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in rows[0] if rows else ():
        table.add_column(column, justify="left" if column in ("split", "metric", "stage", "result") else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
