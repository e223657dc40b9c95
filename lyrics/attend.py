"""`lyrics attend`: where the queries look, what the answer leaned on, as one HTML page.

Shapes: V visual queries, G grounding queries, P patches, N objects, T tokens of the question, M tokens of the answer,
Y language layers, K places of the language model's prompt.
"""

import dataclasses
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lyrics import io
from lyrics.errors import InputError
from lyrics.inference import Lyrics, check_output, load, read_picture
from lyrics.model.attention_maps import Recording, by_object, recording
from lyrics.model.inputs import SeenImage
from lyrics.model.occlusion import answer_log_probs, language_attention, occlusion, prompt_places, taken_away

_MOST_ANSWER_TOKENS = 64
_ALTERNATIVES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerToken:
    """`alternatives`: the likeliest words in its place with their probabilities."""

    text: str
    probability: float
    alternatives: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What one kind of query in one layer attends to in self-attention, mean over heads and queries; sums to 1."""

    layer: int
    kind: str
    to_visual: float
    to_grounding: float
    to_question_T: Tensor
    to_objects: float
    to_special: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaning:
    """What taking objects away does to the answer; `drops` in nats, by `occlusion.WAYS`, `answer`: the one without."""

    drops: tuple[float, ...]
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examination:
    """One question about one picture.

    Attributes:
        source: which model answered.
        own_answer: what the model says; `answer` is another one if the caller gave it.
        visual: weights_VP of each layer with cross-attention, mean over heads; empty without visual queries.
        grounding: weights over `[nothing | objects]` of each grounding query, likewise.
        leanings: of each object; `all_objects` of all at once, None where there is none.
        language_YMK: shares of the language model's attention over `places`, whose rest is question and template.
        object_places: how many of the last places are objects (N, or 0 where it reads no spatial text).
    """

    source: str
    question: str
    answer: str
    own_answer: str
    tokens: list[AnswerToken]
    seen: SeenImage
    grid: tuple[int, int]
    prefix_tokens: int
    visual: dict[int, Tensor]
    grounding: dict[int, Tensor]
    question_tokens: list[str]
    readings: list[Reading]
    leanings: list[Leaning]
    all_objects: Leaning | None
    places: list[str]
    object_places: int
    language_YMK: Tensor


def examine(lyrics: Lyrics, picture: Image.Image, question: str, answer: str | None = None) -> Examination:
    """Ask, record where attention goes, then ask again without each object.

    Args:
        answer: explained in place of the model's own.
    """
    model, encoder = lyrics.model, lyrics.encoder
    seen = lyrics.see([picture])[0]
    own_answer = lyrics.answer_batch([question], [seen], max_new_tokens=_MOST_ANSWER_TOKENS)[0]
    said = own_answer if answer is None else answer
    answer_ids = model.template.answer(said)
    with recording(model.mq_former) as maps:
        log_probs_MW = answer_log_probs(model, question, [seen], answer_ids)[0].cpu()
    crossed = {layer: maps.cross_attention(layer) for layer in maps.cross_layers}
    sources, objects = len(model.mq_former.config.source_widths), len(seen.tags)
    parts, object_places = prompt_places(model, question, seen, len(answer_ids))
    places = [*parts, *object_places]
    return Examination(
        source=lyrics.label,
        question=question,
        answer=said,
        own_answer=own_answer,
        tokens=_answer_tokens(lyrics, log_probs_MW, answer_ids),
        seen=seen,
        grid=encoder.grid,
        prefix_tokens=encoder.prefix_tokens,
        visual={n: kinds["visual"][0].mean(0).cpu() for n, kinds in crossed.items() if "visual" in kinds},
        grounding={
            n: by_object(kinds["grounding"][0].mean(0), sources, objects).cpu()
            for n, kinds in crossed.items()
            if "grounding" in kinds
        },
        question_tokens=_words(model.text_tokenizer.tokenizer, model.text_tokenizer.ids(question)),
        readings=_readings(lyrics, maps, question),
        leanings=_leanings(lyrics, question, seen, answer_ids, torch.eye(objects, dtype=torch.bool)),
        all_objects=next(
            iter(_leanings(lyrics, question, seen, answer_ids, torch.ones(min(1, objects), objects, dtype=torch.bool))),
            None,
        ),
        places=[place.name for place in places],
        object_places=len(object_places),
        language_YMK=language_attention(model, question, seen, answer_ids, places),
    )


def _answer_tokens(lyrics: Lyrics, log_probs_MW: Tensor, answer_ids: list[int]) -> list[AnswerToken]:
    tokenizer = lyrics.model.template.tokenizer
    best, places = log_probs_MW.exp().topk(_ALTERNATIVES)
    return [
        AnswerToken(
            text=text,
            probability=float(log_probs_MW[row, token].exp()),
            alternatives=list(zip(_words(tokenizer, places[row].tolist()), best[row].tolist(), strict=True)),
        )
        for row, (token, text) in enumerate(zip(answer_ids, _words(tokenizer, answer_ids), strict=True))
    ]


def _words(tokenizer, ids: list[int]) -> list[str]:
    """Each token alone, to be read; its own name where it says nothing by itself."""
    return [str(tokenizer.decode([i])).strip() or str(tokenizer.convert_ids_to_tokens(i)) for i in ids]


def _readings(lyrics: Lyrics, maps: Recording, question: str) -> list[Reading]:
    """The text that the queries read is `[CLS] question [SEP] objects [SEP]`, cut to what MQ-Former takes."""
    model = lyrics.model
    config, words = model.mq_former.config, len(model.text_tokenizer.ids(question))
    visual, queries, text = config.visual_queries, config.queries, maps.text_ids_BT.shape[1]
    words = min(words, text - 2)
    readings = []
    for layer in range(config.layers):
        weights_SS = maps.self_attention(layer)[0].mean(0).cpu()
        for kind, rows in (("visual", weights_SS[:visual]), ("grounding", weights_SS[visual:queries])):
            if not len(rows):
                continue
            to_S = rows.mean(0)
            to_text_T = to_S[queries:]
            to_objects = float(to_text_T[words + 2 : -1].sum())
            to_question_T = to_text_T[1 : words + 1]
            readings.append(
                Reading(
                    layer=layer,
                    kind=kind,
                    to_visual=float(to_S[:visual].sum()),
                    to_grounding=float(to_S[visual:queries].sum()),
                    to_question_T=to_question_T,
                    to_objects=to_objects,
                    to_special=float(to_text_T.sum() - to_question_T.sum()) - to_objects,
                )
            )
    return readings


def _leanings(
    lyrics: Lyrics, question: str, seen: SeenImage, answer_ids: list[int], hidden_BN: Tensor
) -> list[Leaning]:
    """One for each row of objects that are taken away together."""
    model = lyrics.model
    if not len(hidden_BN):
        return []
    drops_B3 = occlusion(model, question, seen, answer_ids, hidden_BN)
    with taken_away(model, seen, hidden_BN, ["both"] * len(hidden_BN)) as pictures:
        answers = lyrics.answer_batch([question] * len(pictures), pictures, max_new_tokens=_MOST_ANSWER_TOKENS)
    return [Leaning(drops=tuple(drops), answer=said) for drops, said in zip(drops_B3.tolist(), answers, strict=True)]


def attend(image: Path, question: str, out: Path, answer: str | None = None) -> Examination:
    """Examine the best model at hand and write the page.

    Raises:
        InputError: the question is empty, the picture cannot be read, `out` cannot be written, or there is no model.
    """
    from lyrics import attend_page

    if not question.strip():
        raise InputError('The question is empty; ask something, e.g. "What color is the umbrella?"')
    picture = read_picture(image)
    check_output(out, "--out", "an HTML file", image)
    examination = examine(load(), picture, question, answer)
    io.write_text(out, attend_page.render(examination, picture))
    return examination
