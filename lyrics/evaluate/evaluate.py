"""The stage `evaluate`: ask the model and its baselines, score the answers, write tables, plots and the report."""

import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from lyrics import bootstrap, io, seeding
from lyrics.config import Config
from lyrics.data.prompts import instruction
from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.evaluate import baselines, captions, plots, report, tasks
from lyrics.model.inputs import SeenImage
from lyrics.refiner.features import IMAGES_FILE, SAMPLES_FILE, RefinedSplit
from lyrics.refiner.online import looker
from lyrics.stage import Tracker
from lyrics.track import lineage
from lyrics.train.devices import pick_device

RAW, REFINED, FOUNDATION, STAGE2 = (
    Path("data/raw"),
    Path("data/refined"),
    Path("models/foundation"),
    Path("models/stage2"),
)
TRAINING_SPLIT = "instruct"
# What decides on a score beside the answer: scores of two versions of it are not compared.
SCORING = (
    *("evaluate/captions.py", "evaluate/metrics.py", "evaluate/tasks.py", "evaluate/vqa.py"),
    *("data/prompts.py", "refiner/spatial_text.py"),
)
_DIGITS = 6
_RESAMPLES, _CONFIDENCE = 1000, 0.95
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("sample_id", "image_id", "task", "kind", "question")]
    + [("references", pa.list_(pa.string())), ("box_xyxy", pa.list_(pa.float64())), ("prediction", pa.string())]
    + [(f"prediction_{system}", pa.string()) for system in tasks.SYSTEMS[1:]]
    + [("score", pa.float64())]
    + [(f"score_{system}", pa.float64()) for system in tasks.SYSTEMS[1:]]
)


class Answering(Protocol):
    """The part of `lyrics.inference.Lyrics` that evaluation uses."""

    def answer_batch(
        self,
        questions: Sequence[str],
        seen: Sequence[SeenImage],
        spatial_texts: Sequence[str] | None = None,
        max_new_tokens: int = 32,
    ) -> list[str]: ...


def run(config: Config, work: Path, tracker: Tracker, model: Answering | None = None) -> None:
    """Write `work / "out"`. Answers are kept in `work`, task by task, so that an interrupted run goes on from there.

    Args:
        model: answers the questions; None loads models/stage2.

    Raises:
        InputError: none of the configured splits exists, or a file of one is unreadable.
    """
    splits, absent = _open_splits(config)
    constant = _constant_answers(config)
    if constant is None:
        absent["most_frequent"] = f"{REFINED / TRAINING_SPLIT} does not exist: no training split to count answers in"
    data = _data_hashes(splits, STAGE2, FOUNDATION)
    asker = _Asker(config, _answers_folder(work / "answers", config, splits, data), model)
    out = work / "out"
    evaluation = _score(config, splits, asker, out, data, absent, _Baselines(constant))
    plots.write(out / "plots", evaluation)
    report.write(out, config)
    _track(evaluation, out, tracker)


def run_full(config: Config, work: Path, tracker: Tracker, model: Answering | None = None) -> None:
    """As `run`, on every sample of every split (`make evaluate-full`); the result is no output of the pipeline."""
    shutil.rmtree(work / "out", ignore_errors=True)
    everything = dataclasses.replace(config.evaluate, samples_per_split=None)
    run(dataclasses.replace(config, evaluate=everything), work, tracker, model)


def run_alone(
    config: Config, work: Path, name: str, split: RefinedSplit, model: Answering, stage2: Path, foundation: Path
) -> None:
    """Score one model on one split, into `work / "out"` as `run` does, without baselines, plots and report.

    Args:
        split: what the frozen parts in `foundation` saw in data/raw/NAME.
        model: made of `stage2` and `foundation`. Its answers are kept in `work`: a folder for this model and split.
    """
    data = _data_hashes({name: split}, stage2, foundation)
    asker = _Asker(config, work / "answers", model)
    absent = dict.fromkeys(tasks.SYSTEMS[1:], "the model was scored alone")
    _score(config, {name: split}, asker, work / "out", data, absent, None)


@dataclasses.dataclass(frozen=True)
class _Baselines:
    """The baselines that are wanted; `constant` is None where there is no training split to fit it on."""

    constant: baselines.MostFrequent | None


def _score(
    config: Config,
    splits: Mapping[str, RefinedSplit],
    asker: "_Asker",
    out: Path,
    data: Mapping[str, Any],
    absent: dict[str, str],
    beside: _Baselines | None,
) -> dict[str, Any]:
    """Ask and score; writes the per-sample scores and evaluation.json, and returns the latter."""
    reason = captions.meteor_absent(config.evaluate.meteor)
    absent |= {"spice": captions.SPICE_ABSENT} | ({"meteor": reason} if reason else {})
    meteor = None if reason else captions.MeteorProcess()
    scores: dict[str, dict[str, Any]] = {}
    for name, split in splits.items():
        scores[name], rows = _evaluate_split(name, split, config, beside, asker, meteor, absent)
        with io.atomic_path(out / "samples" / f"{name}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), temporary, compression="zstd")
    evaluation = {
        "preset": config.preset,
        "seed": config.seed,
        "samples_per_split": config.evaluate.samples_per_split,
        "tokenizer": captions.tokenizer_name(),
        "max_new_tokens": config.evaluate.max_new_tokens,
        "scoring_sha256": io.sha256_tree(*(lineage.PACKAGE / name for name in SCORING)),
        "splits": scores,
        "absent": absent,
        "data": data,
    }
    io.write_json(out / "evaluation.json", evaluation)
    return evaluation


def _answers_folder(
    answers: Path, config: Config, splits: Mapping[str, RefinedSplit], data: Mapping[str, Mapping[str, str]]
) -> Path:
    """Where answers of this model and code to these questions are kept; those of others are removed."""
    tables = [split.folder / name for split in splits.values() for name in (SAMPLES_FILE, IMAGES_FILE)]
    seen = [lineage.code_sha256(), *map(io.sha256_file, tables), *(entry["sha256"] for entry in data.values())]
    folder = answers / f"{seeding.stable_seed(*seen, config.evaluate, config.refine, config.seed):016x}"
    for other in answers.glob("*"):
        if other != folder:
            shutil.rmtree(other)
    return folder


def _open_splits(config: Config) -> tuple[dict[str, RefinedSplit], dict[str, str]]:
    names = config.evaluate.splits
    look = looker(FOUNDATION / "clip", config.refine, pick_device(config.device))
    absent = {
        name: f"{REFINED / name} does not exist: the data has no such split"
        for name in names
        if not (REFINED / name / SAMPLES_FILE).exists()
    }
    splits = {name: RefinedSplit(REFINED / name, look) for name in names if name not in absent}
    if not splits:
        found = sorted(path.parent.name for path in REFINED.glob(f"*/{SAMPLES_FILE}"))
        raise InputError(
            f"{REFINED} has none of the splits of evaluate.splits ({', '.join(names)}); found: "
            f"{', '.join(found) or 'nothing'}; run: python -m lyrics refine, or correct params/evaluate/"
        )
    return splits, absent


def _constant_answers(config: Config) -> baselines.MostFrequent | None:
    if not (REFINED / TRAINING_SPLIT / SAMPLES_FILE).exists():
        return None
    training = RefinedSplit(REFINED / TRAINING_SPLIT, verify=False)  # of its tables alone
    return baselines.MostFrequent(training.samples, training.images, config.refine.coordinate_format)


class _Asker:
    """Batches of questions to the model, loaded when first needed; finished answers are kept in `folder`."""

    def __init__(self, config: Config, folder: Path, model: Answering | None) -> None:
        self._config = config
        self._folder = folder
        self._model = model

    def ask(
        self, name: str, split: RefinedSplit, samples: Sequence[Sample], others: Mapping[str, str], own_text: bool
    ) -> list[str]:
        """Answers to `samples` about the images in `others`; `own_text` keeps the spatial text."""
        path = self._folder / f"{name}.json"
        if path.exists():
            return io.read_json(path)
        size = self._config.evaluate.batch_size
        # Neighbours of equal length need little padding.
        order = sorted(range(len(samples)), key=lambda i: (len(split.images[samples[i].image_id].spatial_text), i))
        answers = [""] * len(samples)
        for start in tqdm(range(0, len(order), size), desc=f"evaluate {name}", unit="batch", leave=False):
            places = order[start : start + size]
            batch = [samples[place] for place in places]
            seen = split.see([others.get(sample.image_id, sample.image_id) for sample in batch])
            texts = [split.images[sample.image_id].spatial_text for sample in batch] if own_text else None
            questions = [instruction(sample) for sample in batch]
            limit = self._config.evaluate.max_new_tokens
            given = self._loaded().answer_batch(questions, seen, spatial_texts=texts, max_new_tokens=limit)
            for place, answer in zip(places, given, strict=True):
                answers[place] = answer
        io.write_json(path, answers)
        return answers

    def _loaded(self) -> Answering:
        if self._model is None:
            from lyrics.inference import Lyrics

            self._model = Lyrics.from_folders(STAGE2, FOUNDATION, self._config.device)
        return self._model


def _evaluate_split(
    name: str,
    split: RefinedSplit,
    config: Config,
    beside: _Baselines | None,
    asker: _Asker,
    meteor: captions.MeteorProcess | None,
    absent: dict[str, str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores by metric, and one row a sample. Adds to `absent` what the split cannot tell."""
    scores: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    constant = beside.constant if beside else None
    others = baselines.other_images(split.image_ids, config.seed, name) if beside else None
    if beside and others is None:
        absent[f"{name}/other_image"] = absent[f"{name}/other_features"] = "the split has a single image"
    for task in tasks.TASKS:
        samples = tasks.choose(split.samples, task, config.evaluate.samples_per_split, config.seed, name)
        headline = tasks.HEADLINE[task]
        if not samples:
            absent[f"{name}/{headline}"] = f"the split has no {task} samples"
            continue
        fixed = [constant.answer(sample) for sample in samples] if constant else [None]
        answers: dict[str, list[str] | None] = {
            "model": asker.ask(f"{name}-{task}-model", split, samples, {}, False),
            "most_frequent": None if None in fixed else [answer for answer in fixed if answer is not None],
            "other_image": None,
            "other_features": None,
        }
        if others is not None:
            for system, own_text in (("other_image", False), ("other_features", True)):
                answers[system] = asker.ask(f"{name}-{task}-{system}", split, samples, others, own_text)
        if constant and answers["most_frequent"] is None:
            absent[f"{name}/{headline}/most_frequent"] = f"the training split ({TRAINING_SPLIT}) has no {task} samples"
        scored = tasks.score(task, samples, answers, split.images, config.refine.coordinate_format, meteor)
        images = [sample.image_id for sample in samples]
        draws = seeding.rng("interval", config.seed, name, task)
        low, high = bootstrap.interval(
            scored.each["model"] or [], images, draws, resamples=_RESAMPLES, confidence=_CONFIDENCE
        )
        scored.metrics[headline] |= {"low": low, "high": high}
        scores |= {metric: _rounded(values) for metric, values in scored.metrics.items()}
        rows += _rows(samples, answers, scored, split, config)
    if chats := sum(sample.task == "chat" for sample in split.samples):
        absent[f"{name}/chat"] = f"{chats} dialogues: free answers have no agreed score"
    return scores, rows


def _rows(
    samples: Sequence[Sample],
    answers: Mapping[str, list[str] | None],
    scored: tasks.Scored,
    split: RefinedSplit,
    config: Config,
) -> list[dict[str, Any]]:
    rows = []
    for i, sample in enumerate(samples):
        image = split.images[sample.image_id]
        row: dict[str, Any] = {
            key: getattr(sample, key) for key in ("sample_id", "image_id", "task", "kind", "box_xyxy")
        }
        row["question"] = instruction(sample)
        row["references"] = tasks.reference_texts(sample, image, config.refine.coordinate_format)
        for system in tasks.SYSTEMS:
            suffix = "" if system == "model" else f"_{system}"
            texts, each = answers[system], scored.each[system]
            row[f"prediction{suffix}"] = texts[i] if texts else None
            row[f"score{suffix}"] = round(each[i], _DIGITS) if each else None
        rows.append(row)
    return rows


def _rounded(values: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
    return {key: round(value, _DIGITS) if isinstance(value, float) else value for key, value in values.items()}


def _data_hashes(splits: Mapping[str, RefinedSplit], stage2: Path, foundation: Path) -> dict[str, dict[str, Any]]:
    """What was evaluated: the split as it was read, and the model."""
    hashes: dict[str, dict[str, Any]] = {}
    for name, split in splits.items():
        raw = RAW / name
        paths = [raw] if raw.exists() else [split.folder / SAMPLES_FILE]
        hashes[name] = {"path": paths[0].as_posix(), "sha256": io.sha256_tree(*paths)}
    read = {"stage2": stage2.as_posix(), "foundation": f"{foundation}/*/manifest.json"}
    found = lineage.model_sha256(stage2, foundation)
    return hashes | {name: {"path": read[name], "sha256": sha256} for name, sha256 in found.items()}


def _track(evaluation: Mapping[str, Any], out: Path, tracker: Tracker) -> None:
    values: dict[str, float] = {}
    for split, metrics in evaluation["splits"].items():
        for metric, entry in metrics.items():
            key = re.sub(r"[^\w\-./ ]", "_", f"eval/{split}/{metric}")
            values[key] = entry["model"]
            if "/" not in metric:
                values |= {f"{key}.{s}": entry[s] for s in tasks.SYSTEMS[1:] if entry[s] is not None}
    tracker.log_metrics(values)
    for split in evaluation["splits"]:
        data = evaluation["data"][split]
        tracker.log_dataset(split, Path(data["path"]), data["sha256"])
    for path in ("evaluation.json", "index.html"):
        tracker.log_artifact(out / path)
