"""A finished model as a self-contained MLflow folder: code, weights, pins, signature, example and model card."""

import base64
import io as bytes_io
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lyrics import io
from lyrics.errors import InputError
from lyrics.track import runs
from lyrics.track.lineage import PACKAGE, Lineage

LOCK = Path("requirements.lock")
BASELINES = ("most_frequent", "other_image", "other_features")
_CARD = """# Lyrics

A vision-language model with fine-grained grounding (arXiv 2312.05278): it answers questions about a picture, describes
it and points at what is in it. Made from commit `{commit}` ({state}), pipeline state (dvc.lock) `{pipeline}`.

## Scores

Each beside what is reached without looking: the most frequent answer of the training split, the same model shown
another picture, and its own spatial text with another picture's features.

| split | metric | model | most frequent | other image | other features | n |
| --- | --- | --- | --- | --- | --- | --- |
{scores}

Not measured: {absent}.

## Frozen parts and licences

| part | name | revision | weights | licence |
| --- | --- | --- | --- | --- |
{parts}

The code of Lyrics is Apache-2.0. Installed together with ultralytics (the YOLO detectors), which is AGPL-3.0, the
combination falls under the AGPL-3.0: whoever serves it over a network owes its users the source. The detector backends
`annotations`, `grounding_dino` and `none` do without ultralytics.

## Limits

- Scores hold for pictures like those of the test split; `test_ood`, where present, shows how far they carry.
- Answers are generated text: a wrong one sounds like a right one.
- One picture and one question at a time; no dialogue is remembered.

## Data

{data}
{counts}"""
_PIN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*(\[[^\]]*\])?==[^\s;\\]+(\s*;[^\\]*)?")


def save(folder: Path, *, stage2: Path, foundation: Path, card: str, code: Path = PACKAGE, lock: Path = LOCK) -> None:
    """Write the model folder that `mlflow models serve` understands.

    Args:
        folder: a new folder; the code is gathered beside it.
        code: the package `lyrics`, copied into the model, so that a later edit does not change what is served.
        lock: pinned requirements; given, so that MLflow does not load the model to guess them.
    """
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    # MLflow would copy caches of editors and linters too, and with them the paths of this machine.
    source = folder.with_name("code") / "lyrics"
    shutil.copytree(code, source, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(source / "serving.py"),
        artifacts={"stage2": str(stage2.absolute()), "foundation": str(foundation.absolute())},
        code_paths=[str(source)],
        signature=ModelSignature(
            inputs=Schema([ColSpec("string", "image"), ColSpec("string", "prompt")]),
            outputs=Schema([ColSpec("string")]),
        ),
        input_example=input_example(),
        pip_requirements=pinned(lock),
    )
    (folder / "model_card.md").write_text(card)


def input_example() -> Any:
    """One small picture with a question, as a client would send it."""
    import pandas as pd
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill="red")
    buffer = bytes_io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return pd.DataFrame({"image": [encoded], "prompt": ["Describe the image."]})


def pinned(lock: Path) -> list[str]:
    """The pins of a lock file, without hashes, comments and options."""
    if not lock.exists():
        raise InputError(
            f"{lock} does not exist; a registered model names the exact versions it needs: run from the root"
        )
    lines = (line.strip() for line in lock.read_text().splitlines())
    pins = [match.group(0).strip() for line in lines if (match := _PIN.match(line))]
    if not pins:
        raise InputError(f"{lock} holds no pinned requirement (name==version)")
    return pins


def model_card(evaluation: Mapping[str, Any], lineage: Lineage, foundation: Path, raw: Path) -> str:
    """Markdown for whoever considers using the model."""
    manifests = [io.read_json(path) for path in sorted(foundation.glob("*/manifest.json"))]
    return _CARD.format(
        commit=lineage.git_commit,
        state="clean" if not lineage.git_dirty else "with uncommitted changes",
        pipeline=lineage.dvc_lock_sha256[:16],
        scores="\n".join(_score_rows(evaluation)),
        data="\n".join(f"- `{name}`: sha256 `{sha256[:16]}`" for name, sha256 in lineage.data.items()) or "- not here",
        counts=_data_counts(raw),
        parts="\n".join(_part_row(manifest) for manifest in manifests) or "| - | - | - | - | - |",
        absent=_absent(evaluation),
    )


def score_tags(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """`eval/SPLIT/METRIC` of the model, without slices: what tells versions apart in a list."""
    return {
        f"eval/{split}/{metric}": f"{values['model']:.4f}"
        for split, metrics in evaluation.get("splits", {}).items()
        for metric, values in metrics.items()
        if "/" not in metric and values.get("model") is not None
    }


def parameter_tags(config: Any) -> dict[str, str]:
    """The parameters that tell versions apart; the run has all of them."""
    flat = runs.flatten(config or {})
    chosen = (
        "preset",
        "seed",
        "data.source",
        "foundation.llm.name",
        "foundation.clip.name",
        "refine.coordinate_format",
    )
    groups = ("mq_former.", "stage1.", "stage2.")
    return {f"param/{key}": str(value) for key, value in flat.items() if key in chosen or key.startswith(groups)}


def all_scores(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Every score, slices and baselines too: `eval/SPLIT/METRIC[/SLICE]`, baselines with `.BASELINE` behind."""
    return {
        f"eval/{split}/{metric}" + ("" if who == "model" else f".{who}"): float(value)
        for split, metrics in evaluation.get("splits", {}).items()
        for metric, values in metrics.items()
        for who, value in values.items()
        if value is not None
    }


def _score_rows(evaluation: Mapping[str, Any]) -> list[str]:
    rows = []
    for split, metrics in evaluation.get("splits", {}).items():
        for metric, values in metrics.items():
            if "/" not in metric:
                numbers = [_number(values.get(who)) for who in ("model", *BASELINES)]
                rows.append(f"| {split} | {metric} | {' | '.join(numbers)} | {values.get('n', '-')} |")
    return rows


def _part_row(manifest: Mapping[str, Any]) -> str:
    weights = f"{manifest.get('parameters', 0):,}"
    cells = [
        manifest.get("part"),
        manifest.get("name"),
        manifest.get("revision") or "-",
        weights,
        manifest.get("licence"),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _data_counts(raw: Path) -> str:
    summary = raw / "summary.json"
    return f"\n```json\n{io.dump_json(io.read_json(summary))}```\n" if summary.exists() else ""


def _absent(evaluation: Mapping[str, Any]) -> str:
    absent = evaluation.get("absent", {})
    return "; ".join(f"{metric} ({reason})" for metric, reason in absent.items()) or "nothing that was planned"
