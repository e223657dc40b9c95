"""How the projection starts in stage 2: from what the queries give for some training samples.

Shapes: B batch, Q queries, X query outputs, D MQ-Former width, E language width, V vocabulary.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lyrics.data.prompts import instruction
from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.model.inputs import SeenImage
from lyrics.model.language import PromptTemplate
from lyrics.model.lyrics import LyricsModel
from lyrics.train.stage2_batches import Stage2Data, not_finite

_SAMPLES = 256
_ANSWERED = 2000
_PICTURES_AT_ONCE = 100


@torch.no_grad()
def start_projection(model: LyricsModel, data: Stage2Data, device: torch.device) -> None:
    """From answers about single objects where each grounding query has its object, else from the outputs' spread alone.

    The answers are those of `stage2.first.kinds`: what the text does not hold, the tokens have to.

    Raises:
        InputError: features are not finite.
    """
    # The language model may be too large for one device; it moves when it is sharded.
    model.mq_former.to(device).eval()  # dropout is noise that a regression takes for what pictures differ in
    model.projection.to(device)
    embeddings: Any = model.llm.get_input_embeddings()
    words_VE = embeddings.weight.to(device)
    answered = list(itertools.islice(_about_one_object(data), _ANSWERED)) if model.tokens_beside_objects else []
    if len({sample.references for sample, _ in answered}) > 1:  # from one alone nothing can be told apart
        query_XD = _outputs(model, data, answered)
        mean_E = words_VE.mean(0)
        answer_XE = torch.stack([_said(model.template, sample.references, words_VE, mean_E) for sample, _ in answered])
        model.projection.start_from_answers(query_XD, answer_XE, words_VE)
        return
    first = data.batch(0, _SAMPLES)
    _check(first.ids, first.seen)
    model.projection.start_from(model.query_outputs(first.instructions, first.seen), words_VE)


def _about_one_object(data: Stage2Data) -> Iterator[tuple[Sample, int]]:
    """Questions of `stage2.first.kinds` that name one object of their picture, by its tag, and its number there."""
    for sample in data.split.samples:
        if sample.kind not in data.first.kinds or not sample.references:
            continue
        tags = data.split.images[sample.image_id].tags
        named = [n for n, tag in enumerate(tags) if re.search(rf"\b{re.escape(tag)}\b", sample.question, re.IGNORECASE)]
        if len(named) == 1:
            yield sample, named[0]


def _outputs(model: LyricsModel, data: Stage2Data, answered: Sequence[tuple[Sample, int]]) -> Tensor:
    """query_XD: for each question the output of the query that its object has."""
    config, outputs = model.mq_former.config, []
    for start in range(0, len(answered), _PICTURES_AT_ONCE):
        part = answered[start : start + _PICTURES_AT_ONCE]
        seen = data.split.see([sample.image_id for sample, _ in part])
        _check([sample.sample_id for sample, _ in part], seen)
        query_BQD = model.query_outputs([instruction(sample) for sample, _ in part], seen)
        own = [config.visual_queries + number % config.grounding_queries for _, number in part]
        outputs.append(query_BQD[range(len(part)), own])
    return torch.cat(outputs)


def _said(template: PromptTemplate, answers: Sequence[str], words_VE: Tensor, mean_E: Tensor) -> Tensor:
    """said_E: the words of the answers, each less the mean of all words, in the mean over answers."""
    # Within a text, where the token will stand, many vocabularies have other words than at its start.
    ids = [word for answer in answers for word in template.answer(f" {answer}")[:-1]]
    return (words_VE[ids] - mean_E).sum(0) / len(answers)


def _check(ids: Sequence[str], seen: Sequence[SeenImage]) -> None:
    if damaged := not_finite(ids, seen):
        raise InputError(
            f"The features of {', '.join(damaged)} are not finite; make them again with: python -m lyrics refine"
        )
