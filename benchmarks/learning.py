"""What is learned: full Lyrics, without grounding queries, without pre-training; several seeds, scores by kind.

    python -m benchmarks.learning --project . --work build/learning --seeds 0 1 2 --write docs/learning.md

The project must have been run (`make run`): its own scores are those of full Lyrics with its seed. Each other variant
and seed trains and is evaluated in a folder of its own, which links to the project's data and frozen parts; what is
finished there is not done again, so the command may be interrupted. The seed is that of training (and of which
questions are asked), not of the data.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.table import write_table
from lyrics import io
from lyrics.errors import InputError

ROOT = Path(__file__).parents[1]
STAGES = {"pretrain": "models/stage1", "finetune": "models/stage2", "evaluate": "reports"}
LINKED = ("data", "models/foundation", "params", "lyrics", "dvc.yaml", "requirements.lock")
HEADLINES = ("vqa_accuracy", "refer_accuracy", "pope_accuracy")
SYSTEMS = ("most_frequent", "other_features")
# Without grounding queries the visual ones take their number, so that the language model reads as many tokens.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "no grounding queries": {"mq_former.grounding_queries": 0, "mq_former.visual_queries": "all queries"},
    "no pre-training": {"stage1.steps": 0},
}


def changed(config: Mapping[str, Any], variant: str, seed: int) -> dict[str, Any]:
    """The project's composed configuration as `variant` wants it, evaluated on `test` alone."""
    values = json.loads(json.dumps(config))
    values["seed"] = seed
    values["evaluate"]["splits"] = ["test"]
    sizes = config["mq_former"]
    for key, value in VARIANTS[variant].items():
        section, name = key.split(".")
        queries = sizes["visual_queries"] + sizes["grounding_queries"]
        values[section][name] = queries if value == "all queries" else value
    return values


def prepare(project: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """A folder in which the last three stages run: links to what comes before, and a configuration of its own."""
    for name in LINKED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to((project / name).resolve())
    (folder / "build").mkdir(exist_ok=True)
    io.write_text(folder / "build/config.yaml", yaml.safe_dump(dict(config), sort_keys=False))


def evaluation(project: Path, work: Path, config: Mapping[str, Any], variant: str, seed: int) -> dict[str, Any]:
    """Train and score one variant with one seed, as far as that was not done before; the scores on `test`."""
    if not VARIANTS[variant] and seed == config["seed"]:
        return _test_scores(project)
    folder = work / f"{variant.replace(' ', '-')}-{seed}"
    wanted = changed(config, variant, seed)
    settings = folder / "build/config.yaml"
    if settings.exists() and yaml.safe_load(settings.read_text()) != wanted:
        raise InputError(f"{folder} was made with other settings; remove it, or name another --work")
    prepare(project, folder, wanted)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"PYTHONPATH": str(ROOT)}
    for stage, out in STAGES.items():
        if not (folder / out).exists():
            subprocess.run([sys.executable, "-m", "lyrics", stage], cwd=folder, env=environment, check=True)
    return _test_scores(folder)


def _test_scores(folder: Path) -> dict[str, Any]:
    return io.read_json(folder / "reports/evaluation.json")["splits"]["test"]


def spread(values: Sequence[float]) -> str:
    """Mean, and from the least to the greatest."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def table(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One row a metric: baselines of the first variant, then each variant over its seeds."""
    first = next(iter(scores.values()))
    metrics = [
        m
        for h in HEADLINES
        for m in sorted(first[0], key=lambda m: (m.count("/"), m))
        if m == h or m.startswith(f"{h}/")
    ]
    lines = [
        "| metric on `test` | n | " + " | ".join([s.replace("_", " ") for s in SYSTEMS] + list(scores)) + " |",
        "| --- | --- |" + " --- |" * (len(SYSTEMS) + len(scores)),
    ]
    for metric in metrics:
        baselines = [[run[metric][s] for run in first if run[metric].get(s) is not None] for s in SYSTEMS]
        cells = [f"{statistics.mean(values):.3f}" if values else "–" for values in baselines]
        cells += [spread([run[metric]["model"] for run in runs]) for runs in scores.values()]
        lines.append(f"| {metric} | {first[0][metric]['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--work", type=Path, default=Path("build/learning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--write", type=Path, help="a document with the markers <!-- MARKER -->, <!-- /MARKER -->")
    parser.add_argument("--marker", default="learning")
    chosen = parser.parse_args(arguments)
    path = chosen.project / "build/config.yaml"
    if not (chosen.project / "reports/evaluation.json").exists() or not path.exists():
        raise InputError(f"{chosen.project} has no reports or no build/config.yaml; run there first: make run")
    config = yaml.safe_load(path.read_text())
    scores = {
        variant: [evaluation(chosen.project, chosen.work, config, variant, seed) for seed in chosen.seeds]
        for variant in chosen.variants
    }
    markdown = table(scores)
    print(markdown)
    if chosen.write:
        write_table(
            chosen.write,
            chosen.marker,
            f"Seeds {', '.join(map(str, chosen.seeds))}: mean (least–greatest).\n\n{markdown}",
        )


if __name__ == "__main__":
    main()
