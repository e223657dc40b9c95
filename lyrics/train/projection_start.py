"""How the projection starts in stage 2: from what the queries give for some training samples.

Shapes: B batch, Q queries, X query outputs, D MQ-Former width, E language width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lyrics.data.prompts import DESCRIBE
from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.model.inputs import SeenImage
from lyrics.model.language import PromptTemplate
from lyrics.model.lyrics import LyricsModel
from lyrics.train.stage2_batches import Stage2Data, not_finite

_SAMPLES = 256
_CAPTIONED = 2000
_PICTURES_AT_ONCE = 100


@torch.no_grad()
def start_projection(model: LyricsModel, data: Stage2Data, device: torch.device) -> None:
    """From captions where each grounding query has its object, else from the spread of the outputs alone.

    Raises:
        InputError: features are not finite.
    """
    # The language model may be too large for one device; it moves when it is sharded.
    model.mq_former.to(device).eval()  # dropout is noise that a regression takes for what pictures differ in
    model.projection.to(device)
    embeddings: Any = model.llm.get_input_embeddings()
    words_VE = embeddings.weight.to(device)
    captions = [sample for sample in data.split.samples if sample.task == "caption"][:_CAPTIONED]
    if model.tokens_beside_objects and captions:
        _from_captions(model, data, captions, words_VE)
        return
    first = data.batch(0, _SAMPLES)
    _check(first.ids, first.seen)
    model.projection.start_from(model.query_outputs(first.instructions, first.seen), words_VE)


def _from_captions(model: LyricsModel, data: Stage2Data, captions: list[Sample], words_VE: Tensor) -> None:
    config, outputs, pictures, said = model.mq_former.config, [], [], []
    for start in range(0, len(captions), _PICTURES_AT_ONCE):
        part = captions[start : start + _PICTURES_AT_ONCE]
        seen = data.split.see([sample.image_id for sample in part])
        _check([sample.sample_id for sample in part], seen)
        query_BQD = model.query_outputs([DESCRIBE] * len(part), seen)
        for row, (sample, picture) in enumerate(zip(part, seen, strict=True)):
            own = slice(config.visual_queries, config.visual_queries + len(picture.tags))
            outputs.append(query_BQD[row, own])
            pictures += [start + row] * len(outputs[-1])
            said.append(_unsaid(model.template, sample.references, picture.tags, words_VE))
    if pictures:
        picture_X = torch.tensor(pictures, device=words_VE.device)
        model.projection.start_from_captions(torch.cat(outputs), picture_X, torch.stack(said), words_VE)


def _unsaid(template: PromptTemplate, captions: Sequence[str], tags: Sequence[str], words_VE: Tensor) -> Tensor:
    """said_E: what captions say that no tag says, in the mean."""
    # After a space many vocabularies have another word.
    tagged = {word for tag in tags for form in (tag, f" {tag}") for word in template.answer(form)}
    ids = [word for caption in captions for word in template.answer(caption) if word not in tagged]
    return (words_VE[ids] - words_VE.mean(0)).sum(0) / len(captions)


def _check(ids: Sequence[str], seen: Sequence[SeenImage]) -> None:
    if damaged := not_finite(ids, seen):
        raise InputError(
            f"The features of {', '.join(damaged)} are not finite; make them again with: python -m lyrics refine"
        )
