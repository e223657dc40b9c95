"""Fit a small CLIP: pictures against captions, and boxes in pictures against the names of what they hold.

The second is what a refiner needs (region–tag similarity), and it teaches the first: from a thousand pictures, a box
with its name says more than a caption does.

Shapes: B pictures, R boxes of the batch, P patches, U different texts, E shared space.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lyrics.config import ClipPart
from lyrics.data.annotated import read_split
from lyrics.data.records import ImageRecord
from lyrics.data.webdataset import open_image
from lyrics.foundation import training
from lyrics.foundation.clip import Clip, box_weights, encode_batch, image_embeddings, text_embeddings
from lyrics.model.vision import Preprocessing
from lyrics.seeding import rng
from lyrics.stage import Tracker

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

_MAX_SCALE = 100.0
_ZOOM, _SHIFT = 0.1, 0.08  # augmentation: at most, as fractions of the side
_SHORT = 3  # words
_OPEN_AT_ONCE = 64  # pictures in their own size
_NOT_ADJECTIVES = frozenset(
    {"a", "an", "the", "of", "and", "with", "one", "two", "three", "four", "five", "some", "many"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Captions, and boxes (as fractions of the picture) with the phrases that name what they hold: `cup`, `red cup`."""

    captions: tuple[str, ...]
    boxes_N4: np.ndarray
    names: tuple[tuple[str, ...], ...]


def scene_of(image: ImageRecord) -> Scene:
    size = np.array([image.width, image.height, image.width, image.height], np.float32)
    boxes = np.array([a.box_xyxy for a in image.annotations], np.float32).reshape(-1, 4) / size
    categories = [a.category.lower() for a in image.annotations]
    described = {c: adjective_before(c, image.captions) for c in set(categories) if categories.count(c) == 1}
    names = tuple((c, f"{described[c]} {c}") if described.get(c) else (c,) for c in categories)
    return Scene(captions=image.captions, boxes_N4=boxes, names=names)


def adjective_before(name: str, captions: Sequence[str]) -> str | None:
    """The word before `name`, if the captions that have one agree: `red` for cup in `a red cup on a table`."""
    found = set()
    length = len(name.split())
    for caption in captions:
        words = [w.strip(".,;:!?\"'") for w in caption.lower().split()]
        for i in range(1, len(words) - length + 1):
            if " ".join(words[i : i + length]) == name and words[i - 1] not in _NOT_ADJECTIVES:
                found.add(words[i - 1])
    return found.pop() if len(found) == 1 else None


def fit_clip(
    split: Path,
    tokenizer: "PreTrainedTokenizerFast",
    preprocessing: Preprocessing,
    part: ClipPart,
    seed: int,
    device: torch.device,
    tracker: Tracker,
) -> "tuple[CLIPModel, dict[str, float]]":
    """Train on the pictures of `split` but the last; returns the model with its quality on those."""
    records = [image for image in read_split(split).images if image.captions]
    records, held_out = training.hold_out(records)
    scenes = [scene_of(image) for image in records]
    pixels = torch.cat(
        [
            preprocessing.to_uint8([open_image(image.path) for image in records[start : start + _OPEN_AT_ONCE]])
            for start in range(0, len(records), _OPEN_AT_ONCE)
        ]
    )
    with training.deterministic(seed, "clip"):
        model: Any = _new_model(part, tokenizer)
        model.to(device)
        most_tokens = model.config.text_config.max_position_embeddings
        steps_per_epoch = max(1, len(records) // part.batch_size)
        steps = part.epochs * steps_per_epoch

        def losses_at(step: int) -> dict[str, Tensor]:
            epoch, index = divmod(step, steps_per_epoch)
            order = rng(seed, "clip", "epoch", epoch).permutation(len(records))
            chosen = order[index * part.batch_size : (index + 1) * part.batch_size]
            generator = rng(seed, "clip", step)
            captions = [str(generator.choice(scenes[i].captions)) for i in chosen]
            images, boxes = augment(pixels[torch.from_numpy(chosen)], [scenes[i].boxes_N4 for i in chosen], generator)
            return losses(
                model,
                preprocessing.normalise(images.to(device)),
                captions,
                boxes,
                [scenes[i].names for i in chosen],
                lambda texts: encode_batch(tokenizer, texts, most_tokens).to(device),
            )

        training.train(model, part="clip", steps=steps, lr=part.lr, losses_at=losses_at, device=device, tracker=tracker)
        return model, quality_of(Clip(model, tokenizer, preprocessing, str(device)), held_out)


def _new_model(part: ClipPart, tokenizer: "PreTrainedTokenizerFast") -> "CLIPModel":
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": part.text_hidden_size,
        "intermediate_size": 4 * part.text_hidden_size,
        "num_hidden_layers": part.text_layers,
        "num_attention_heads": part.heads,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": part.hidden_size,
        "intermediate_size": 4 * part.hidden_size,
        "num_hidden_layers": part.layers,
        "num_attention_heads": part.heads,
        "image_size": part.image_size_px,
        "patch_size": part.patch_size_px,
        "hidden_act": "gelu_pytorch_tanh",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=part.projection_size))


def augment(
    images_B3HW: Tensor, boxes: Sequence[np.ndarray], generator: np.random.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Zoom and shift each picture a little, its boxes with it. No flips: left and right, and glyphs, have a hand."""
    count = len(images_B3HW)
    zoom = torch.from_numpy(generator.uniform(1 - _ZOOM, 1 + _ZOOM, count).astype(np.float32))
    shift = torch.from_numpy(generator.uniform(-2 * _SHIFT, 2 * _SHIFT, (count, 2)).astype(np.float32))
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = shift
    grid = functional.affine_grid(theta, list(images_B3HW.shape), align_corners=False)
    moved = functional.grid_sample(images_B3HW.float(), grid, padding_mode="reflection", align_corners=False)
    # The grid says where each new pixel comes from: new = (old - shift) / zoom, in coordinates from -1 to 1.
    placed = []
    for index, boxes_N4 in enumerate(boxes):
        old = 2 * torch.from_numpy(boxes_N4) - 1
        new = (old - shift[index].repeat(2)) / zoom[index]
        placed.append(((new + 1) / 2).clamp(0, 1))
    return moved, placed


def losses(model, pixels_B3HW, captions, boxes, names, encode) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """The two contrasts. A text that two pictures or boxes share is one column, positive for both."""
    scale = model.logit_scale.exp().clamp(max=_MAX_SCALE)
    image_BE, patches_BPE = image_embeddings(model, pixels_B3HW)
    side = round(patches_BPE.shape[1] ** 0.5)
    rows_RE = [box_weights(b, side).to(patches_BPE.device) @ p.float() for b, p in zip(boxes, patches_BPE, strict=True)]
    region_RE = functional.normalize(torch.cat(rows_RE), dim=-1)
    named = [box_names for picture in names for box_names in picture]
    texts = sorted({*captions, *(name for box_names in named for name in box_names)}, key=lambda t: (_words(t), t))
    place = {text: index for index, text in enumerate(texts)}
    text_UE = torch.cat([text_embeddings(model, encode(chunk)) for chunk in _by_length(texts)])
    result = {"itc_loss": contrast(scale * image_BE @ text_UE[[place[c] for c in captions]].T, captions)}
    for number, key in enumerate(("tag_loss", "phrase_loss")):
        rows = [i for i, box_names in enumerate(named) if len(box_names) > number]
        if not rows:
            continue
        vocabulary = sorted({named[i][number] for i in rows})
        column = {text: index for index, text in enumerate(vocabulary)}
        logits_RU = scale * region_RE[rows] @ text_UE[[place[t] for t in vocabulary]].T
        targets = torch.tensor([column[named[i][number]] for i in rows], device=logits_RU.device)
        result[key] = functional.cross_entropy(logits_RU, targets)
    return result


def _words(text: str) -> int:
    return len(text.split())


def _by_length(texts: Sequence[str]) -> list[Sequence[str]]:
    """Short names apart from long captions, so that neither is padded to the other; `texts` is sorted by words."""
    short = sum(_words(text) <= _SHORT for text in texts)
    return [part for part in (texts[:short], texts[short:]) if part]


def contrast(logits_BB: Tensor, captions: Sequence[str]) -> Tensor:
    """InfoNCE both ways; pictures with the same caption are not each other's negatives."""
    same = torch.tensor([[a == b for b in captions] for a in captions], device=logits_BB.device)
    same.fill_diagonal_(False)
    logits_BB = logits_BB.masked_fill(same, float("-inf"))
    targets = torch.arange(len(captions), device=logits_BB.device)
    return (functional.cross_entropy(logits_BB, targets) + functional.cross_entropy(logits_BB.T, targets)) / 2


def quality_of(clip: Clip, held_out: Sequence[ImageRecord]) -> dict[str, float]:
    """Retrieval among the held-out pictures, names of true boxes, and how far right and wrong captions lie apart."""
    images = [open_image(record.path) for record in held_out]
    image_BE = clip.encode_images(images)
    text_BE = clip.encode_texts([record.captions[0] for record in held_out])
    similarity_BB = image_BE @ text_BE.T
    own = similarity_BB.diagonal()
    others = similarity_BB[~torch.eye(len(held_out), dtype=torch.bool)]
    result = {
        "recall_at_1": _recall(similarity_BB, [record.captions[0] for record in held_out]),
        "text_recall_at_1": float((similarity_BB.argmax(0) == torch.arange(len(held_out))).float().mean()),
        "similarity_matched": float(own.mean()),
    }
    if len(others):  # of one picture there is no other
        result["similarity_mismatched"] = float(others.mean())
        result["matched_above_mismatched"] = float((own[:, None] > others[None]).float().mean())
    scenes = [scene_of(record) for record in held_out]
    regions = torch.cat(clip.encode_regions(images, [np.array([a.box_xyxy for a in r.annotations]) for r in held_out]))
    named = [box_names for scene in scenes for box_names in scene.names]
    for number, key in enumerate(("region_tag_accuracy", "region_phrase_accuracy")):
        rows = [i for i, box_names in enumerate(named) if len(box_names) > number]
        vocabulary = sorted({named[i][number] for i in rows})
        if not rows or len(vocabulary) < 2:
            continue
        best = (regions[rows] @ clip.encode_texts(vocabulary).T).argmax(1)
        result[key] = float(np.mean([vocabulary[b] == named[i][number] for i, b in zip(rows, best, strict=True)]))
    return result


def _recall(similarity_BB: Tensor, captions: Sequence[str]) -> float:
    """Share of pictures whose nearest caption is theirs (or reads the same)."""
    return float(
        np.mean([captions[best] == captions[row] for row, best in enumerate(similarity_BB.argmax(1).tolist())])
    )
