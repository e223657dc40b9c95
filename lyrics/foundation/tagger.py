"""Foundation part `tagger`: which words of a vocabulary are in a picture.

Files: vocabulary.json, head.safetensors where a head was fitted on the CLIP tower, and thresholds.json where tags have
thresholds of their own. `zero_shot` compares the CLIP with the vocabulary, `annotations` reads the ground truth, `none`
gives the whole vocabulary; these have no weights.

Shapes: B pictures, P patches, D encoder width, V vocabulary.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from lyrics.config import Config, TaggerPart
from lyrics.data.annotated import read_split
from lyrics.data.coco import read_instances
from lyrics.data.records import ImageRecord
from lyrics.data.webdataset import open_image
from lyrics.errors import InputError
from lyrics.foundation import training
from lyrics.foundation.clip import Clip, load_clip
from lyrics.foundation.fit import FOUNDATION, SPLIT
from lyrics.foundation.manifest import Made
from lyrics.io import read_json, write_json
from lyrics.seeding import rng
from lyrics.stage import Tracker

VOCABULARY, THRESHOLDS, HEAD = "vocabulary.json", "thresholds.json", "head.safetensors"
_BATCH = 64


class TagHead(nn.Module):
    """A classifier at each patch; a picture has a tag as surely as its surest patches.

    Weights of the pooling come from the patches themselves, so that small objects count as much as large ones.
    """

    def __init__(self, width: int, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.classify = nn.Linear(hidden, vocabulary)
        self.sharpness = nn.Parameter(torch.tensor(1.0))

    def forward(self, patches_BPD: Tensor) -> Tensor:
        """Logits (B, V)."""
        logits_BPV = self.classify(functional.gelu(self.hidden(patches_BPD)))
        return (logits_BPV * (self.sharpness * logits_BPV).softmax(1)).sum(1)


def fit(config: Config, work: Path, tracker: Tracker) -> Made:
    part, out = config.foundation.tagger, work / "out"
    if part.source == "fitted":
        return _fit(config, out, tracker)
    if part.source == "zero_shot":
        _check_prompts(part.prompts)
    vocabulary = read_vocabulary(part, SPLIT.parent)
    write_json(out / VOCABULARY, list(vocabulary))
    if own := {tag: threshold for tag, threshold in vocabulary.items() if threshold is not None}:
        write_json(out / THRESHOLDS, own)
    licence = "that of foundation.clip" if part.source == "zero_shot" else "none: it has no weights"
    return Made(source=part.source, name=part.name, parameters=0, licence=licence)


def _check_prompts(prompts: Sequence[str]) -> None:
    if not prompts or not all("{}" in prompt for prompt in prompts):
        raise InputError(
            f"foundation.tagger.prompts is {list(prompts)}; expected sentences with {{}} where the tag belongs, e.g. "
            '"a photo of a {}"'
        )


def read_vocabulary(part: TaggerPart, raw: Path) -> dict[str, float | None]:
    """Tags and their own thresholds: of the part's vocabulary file, else the categories of the foundation split, else
    those of all splits.

    Raises:
        InputError: the file is missing or malformed, or there is no category at all.
    """
    if part.vocabulary is not None:
        return _read_file(Path(part.vocabulary))
    own = raw / SPLIT.name / "instances.json"
    paths = [own] if own.exists() else sorted(raw.glob("*/instances.json"))
    documents = [read_instances(path) for path in paths]
    names = sorted({category["name"] for document in documents for category in document.categories})
    if not names:
        raise InputError(
            f"There is no tag to give: no split in {raw} has categories in an instances.json; name a file with one tag "
            "a line in foundation.tagger.vocabulary"
        )
    return dict.fromkeys(names)


def _read_file(path: Path) -> dict[str, float | None]:
    """One tag a line, and after a tab its threshold where it has one; the first of equal tags counts."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"foundation.tagger.vocabulary is {path}, which cannot be read ({error}); expected one tag a line"
        ) from None
    found: dict[str, float | None] = {}
    for number, line in enumerate(lines, start=1):
        tag, _, threshold = (part.strip() for part in line.partition("\t"))
        if not tag:
            continue
        try:
            own = float(threshold) if threshold else None
        except ValueError:
            own = math.nan
        if own is not None and not 0 <= own <= 1:
            raise InputError(
                f"{path}:{number}: the threshold of {tag!r} is {threshold!r}; expected a number from 0 to 1"
            )
        found.setdefault(tag, own)
    if not found:
        raise InputError(f"There is no tag in {path}; expected one a line, after a tab its own threshold")
    return found


def _fit(config: Config, out: Path, tracker: Tracker) -> Made:
    part, device = config.foundation.tagger, training.pick_device(config.device)
    records = [image for image in read_split(SPLIT).images if image.annotations]
    records, held_out = training.hold_out(records)
    vocabulary = list(read_vocabulary(part, SPLIT.parent))
    clip = load_clip(FOUNDATION / "clip", str(device))
    with training.deterministic(config.seed, "tagger"):
        patches_BPD, targets_BV = features(clip, records), targets(records, vocabulary)
        width = patches_BPD.shape[-1]
        head = TagHead(width, width, len(vocabulary)).to(device)
        nn.init.constant_(head.classify.bias, -2.0)  # most tags are absent
        steps_per_epoch = max(1, len(records) // _BATCH)

        def losses_at(step: int) -> dict[str, Tensor]:
            epoch, index = divmod(step, steps_per_epoch)
            order = rng(config.seed, "tagger", "epoch", epoch).permutation(len(records))
            rows = torch.from_numpy(order[index * _BATCH : (index + 1) * _BATCH])
            logits_BV = head(patches_BPD[rows].to(device))
            return {
                "tag_loss": functional.binary_cross_entropy_with_logits(logits_BV.float(), targets_BV[rows].to(device))
            }

        training.train(
            head,
            part="tagger",
            steps=part.epochs * steps_per_epoch,
            lr=part.lr,
            losses_at=losses_at,
            device=device,
            tracker=tracker,
        )
        quality = quality_of(head, features(clip, held_out), targets(held_out, vocabulary), part.threshold)
    save_file({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, out / HEAD)
    write_json(out / VOCABULARY, vocabulary)
    return Made(source=part.source, name=part.name, parameters=training.parameter_count(head), quality=quality)


def features(clip: Clip, records: Sequence[ImageRecord]) -> Tensor:
    """Patches of the tower's last layer, (B, P, D)."""
    chunks = [records[start : start + _BATCH] for start in range(0, len(records), _BATCH)]
    return torch.cat([clip.patch_features([open_image(r.path) for r in chunk]).cpu() for chunk in chunks])


def targets(records: Sequence[ImageRecord], vocabulary: Sequence[str]) -> Tensor:
    """(B, V) of 0 and 1."""
    column = {tag: index for index, tag in enumerate(vocabulary)}
    result = torch.zeros(len(records), len(vocabulary))
    for row, record in enumerate(records):
        for annotation in record.annotations:
            if annotation.category in column:
                result[row, column[annotation.category]] = 1.0
    return result


@torch.no_grad()
def quality_of(head: TagHead, patches_BPD: Tensor, targets_BV: Tensor, threshold: float) -> dict[str, float]:
    """Precision, recall and F1 over all (picture, tag) pairs at the threshold."""
    device = next(head.parameters()).device
    said_BV = head(patches_BPD.to(device)).sigmoid().cpu() > threshold
    true_BV = targets_BV.bool()
    hits = float((said_BV & true_BV).sum())
    precision, recall = hits / max(1.0, float(said_BV.sum())), hits / max(1.0, float(true_BV.sum()))
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(1e-9, precision + recall)}


def load_vocabulary(folder: Path) -> tuple[str, ...]:
    return tuple(read_json(folder / VOCABULARY))


def load_thresholds(folder: Path) -> dict[str, float]:
    """Those of the tags that have one of their own."""
    path = folder / THRESHOLDS
    return read_json(path) if path.exists() else {}


def load_head(folder: Path) -> TagHead:
    state = load_file(folder / HEAD)
    hidden, width = state["hidden.weight"].shape
    head = TagHead(width, hidden, len(state["classify.bias"]))
    head.load_state_dict(state)
    return head.eval().requires_grad_(False)
