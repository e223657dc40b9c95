"""The four scored tasks: which samples are asked, and what their answers are worth.

Every score exists four times: the model, and three baselines that say what the score is worth (see baselines.py).
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from lyrics import seeding
from lyrics.data.prompts import target
from lyrics.data.records import Sample
from lyrics.evaluate import captions
from lyrics.evaluate.metrics import Box, pope_scores, refer_hit, yes_or_no
from lyrics.evaluate.vqa import vqa_accuracy
from lyrics.refiner.features import RefinedImage
from lyrics.refiner.spatial_text import CoordinateFormat, parse_box

TASKS = ("vqa", "refer", "pope", "caption")
SYSTEMS = ("model", "most_frequent", "other_image", "other_features")
HEADLINE = {"vqa": "vqa_accuracy", "refer": "refer_accuracy", "pope": "pope_accuracy", "caption": "cider"}

Answers = Mapping[str, Sequence[str] | None]
"""Answers of each system in the order of the samples; None where the system could not answer."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """`each`: one score a sample, by system. `metrics`: value by metric and system, with the number of samples."""

    each: dict[str, list[float] | None]
    metrics: dict[str, dict[str, float | int | None]]


def choose(samples: Sequence[Sample], task: str, limit: int | None, *keys: object) -> list[Sample]:
    """At most `limit` samples of a task, drawn by `keys`, in the order of `samples`.

    Kinds (for pope also yes and no) keep their proportions.
    """
    strata: dict[tuple[str, ...], list[Sample]] = collections.defaultdict(list)
    for sample in samples:
        if sample.task == task:
            label = sample.references[:1] if task == "pope" else ()
            strata[sample.kind, *label].append(sample)
    total = sum(map(len, strata.values()))
    if limit is None or total <= limit:
        return [sample for sample in samples if sample.task == task]
    chosen: set[str] = set()
    for stratum, count in _shares({stratum: len(members) for stratum, members in strata.items()}, limit).items():
        names = sorted(sample.sample_id for sample in strata[stratum])
        order = seeding.rng("evaluate", *keys, task, *stratum).permutation(len(names))
        chosen.update(names[place] for place in order[:count])
    return [sample for sample in samples if sample.task == task and sample.sample_id in chosen]


def _shares(sizes: Mapping[tuple[str, ...], int], limit: int) -> dict[tuple[str, ...], int]:
    """`limit` divided in proportion to `sizes` by largest remainders: the mean stays that of the whole split."""
    total = sum(sizes.values())
    shares = {stratum: limit * size // total for stratum, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda stratum: (-(limit * sizes[stratum] % total), stratum))
    for stratum in by_remainder[: limit - sum(shares.values())]:
        shares[stratum] += 1
    return shares


def score(
    task: str,
    samples: Sequence[Sample],
    answers: Answers,
    images: Mapping[str, RefinedImage],
    coordinate_format: CoordinateFormat,
    meteor: captions.MeteorProcess | None = None,
) -> Scored:
    """Score every system's answers to `samples`, all of one task."""
    if task == "caption":
        return _score_captions(samples, answers, meteor)
    if task == "pope":
        return _score_pope(samples, answers)
    if task == "vqa":
        each = _each(answers, lambda i, text: vqa_accuracy(text, samples[i].references))
        return Scored(each, _means("vqa_accuracy", samples, each))
    return _score_refer(samples, answers, images, coordinate_format)


def reference_texts(sample: Sample, image: RefinedImage, coordinate_format: CoordinateFormat) -> list[str]:
    """What a right answer looks like; for refer the target box as text."""
    if sample.task == "refer":
        return [target(sample, image.width, image.height, coordinate_format)]
    return list(sample.references)


def _target_box(sample: Sample) -> Box:
    assert sample.box_xyxy is not None, f"{sample.sample_id}: a referring expression without a box"
    return sample.box_xyxy


def answered_box(text: str, image: RefinedImage, coordinate_format: CoordinateFormat) -> Box | None:
    """The answered box in pixels of `image`; None where the answer holds none."""
    box = parse_box(text, coordinate_format)
    if box is None:
        return None
    return box[0] * image.width, box[1] * image.height, box[2] * image.width, box[3] * image.height


def _score_refer(
    samples: Sequence[Sample],
    answers: Answers,
    images: Mapping[str, RefinedImage],
    coordinate_format: CoordinateFormat,
) -> Scored:
    def box(place: int, text: str) -> Box | None:
        return answered_box(text, images[samples[place].image_id], coordinate_format)

    each = _each(answers, lambda i, text: refer_hit(box(i, text), _target_box(samples[i])))
    unparsed = _each(answers, lambda i, text: float(box(i, text) is None))
    metrics = _means("refer_accuracy", samples, each)
    metrics["refer_unparsable"] = _means("refer_unparsable", samples, unparsed)["refer_unparsable"]
    return Scored(each, metrics)


def _each(answers: Answers, one: Callable[[int, str], float]) -> dict[str, list[float] | None]:
    return {
        system: None if (texts := answers[system]) is None else [one(i, text) for i, text in enumerate(texts)]
        for system in SYSTEMS
    }


def _kinds(task: str, samples: Sequence[Sample]) -> list[str]:
    """Kinds to break scores down by: none where there is only the task's own name."""
    kinds = sorted({sample.kind for sample in samples})
    return [] if kinds == [task] else kinds


def _means(
    metric: str, samples: Sequence[Sample], each: Mapping[str, Sequence[float] | None]
) -> dict[str, dict[str, float | int | None]]:
    """Mean score overall, and under `metric/KIND` for every kind."""
    groups = {metric: list(range(len(samples)))}
    for kind in _kinds(samples[0].task, samples):
        groups[f"{metric}/{kind}"] = [i for i, sample in enumerate(samples) if sample.kind == kind]
    return {
        name: {s: None if (v := each[s]) is None else sum(v[i] for i in places) / len(places) for s in SYSTEMS}
        | {"n": len(places)}
        for name, places in groups.items()
    }


def _score_pope(samples: Sequence[Sample], answers: Answers) -> Scored:
    labels = [sample.references[0] for sample in samples]
    said = {s: None if (texts := answers[s]) is None else [yes_or_no(text) for text in texts] for s in SYSTEMS}
    each = _each(said, lambda i, answer: float(answer == labels[i]))
    metrics: dict[str, dict[str, float | int | None]] = {}
    for kind in [None, *_kinds("pope", samples)]:
        places = [i for i, sample in enumerate(samples) if kind in (None, sample.kind)]
        for system, given in said.items():
            scores = given and dataclasses.asdict(pope_scores([given[i] for i in places], [labels[i] for i in places]))
            for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
                key = f"pope_{name}" if kind is None else f"pope_{name}/{kind}"
                metrics.setdefault(key, {"n": len(places)})[system] = scores[name] if scores else None
    return Scored(each, metrics)


def _score_captions(samples: Sequence[Sample], answers: Answers, meteor: captions.MeteorProcess | None) -> Scored:
    """All sentences of the split go through the tokenizer in one call."""
    sentences = {text for sample in samples for text in sample.references}
    sentences |= {text for texts in answers.values() if texts is not None for text in texts}
    ordered = sorted(sentences)
    tokens = dict(zip(ordered, captions.tokenize(ordered), strict=True))
    references = [[tokens[text] for text in sample.references] for sample in samples]
    each: dict[str, list[float] | None] = {}
    metrics: dict[str, dict[str, float | int | None]] = {}
    for system in SYSTEMS:
        texts = answers[system]
        scores = None if texts is None else captions.score([tokens[text] for text in texts], references)
        each[system] = scores.cider if scores else None
        corpus: Mapping[str, float] = scores.corpus if scores else {}
        if meteor and texts is not None:
            corpus = {**corpus, "meteor": meteor.score([tokens[text] for text in texts], references)}
        for name in ("cider", *(f"bleu_{n}" for n in range(1, 5)), "rouge_l", *(["meteor"] if meteor else [])):
            metrics.setdefault(name, {"n": len(samples)})[system] = corpus.get(name)
    return Scored(each, metrics)
