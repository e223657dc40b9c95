"""What an answer leans on: its probability with an object taken away, and where the language model attends.

An object is told to the model twice: by its local tokens, which the grounding queries look at, and by its piece of
the spatial text, which MQ-Former and (if so trained) the language model read. Each can be taken away alone.
The image tokens stay as they are.

Shapes: B batch, N objects, Q query tokens, M tokens of the answer, Y language layers, H heads, S sequence, K places,
W words of the language model's vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lyrics.model.attention_maps import hiding_objects
from lyrics.model.inputs import SeenImage
from lyrics.model.language import IGNORED, IMAGE, OBJECT, WORD, Conversation, assemble
from lyrics.model.lyrics import LyricsModel

Way = Literal["local tokens", "spatial text", "both"]
WAYS: tuple[Way, ...] = ("local tokens", "spatial text", "both")
_ROWS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Positions of one sequence of the language model."""

    name: str
    positions: tuple[int, ...]


def object_texts(spatial_text: str) -> list[str]:
    """The piece of each object; tags hold no semicolon."""
    return [f"{piece.strip()};" for piece in spatial_text.split(";")[:-1]]


def without_objects(seen: SeenImage, hidden_N: Tensor) -> SeenImage:
    """The picture with a spatial text that leaves objects out; its local tokens stay, for their ranks to stay."""
    told = [n for n, hidden in enumerate(hidden_N.tolist()) if not hidden]
    pieces = object_texts(seen.spatial_text)
    return dataclasses.replace(seen, spatial_text=" ".join(pieces[n] for n in told), told=tuple(told))


@contextlib.contextmanager
def taken_away(
    model: LyricsModel, seen: SeenImage, hidden_BN: Tensor, ways: Sequence[Way]
) -> Iterator[list[SeenImage]]:
    """One picture a row of `hidden_BN`, without the row's objects in the way of `ways`, while the context lasts."""
    pairs = list(zip(hidden_BN, ways, strict=True))
    local_BN = torch.stack([row if way != "spatial text" else torch.zeros_like(row) for row, way in pairs])
    pictures = [without_objects(seen, row) if way != "local tokens" else seen for row, way in pairs]
    # A picture without objects has one masked place, which nothing needs to hide.
    hiding = hiding_objects(model.mq_former, local_BN) if hidden_BN.shape[1] else contextlib.nullcontext()
    with hiding:
        yield pictures


@torch.inference_mode()
def answer_log_probs(
    model: LyricsModel, question: str, pictures: Sequence[SeenImage], answer_ids: Sequence[int]
) -> Tensor:
    """log_probs_BMW: at each token of one answer, of every word, given the answer before it."""
    tokens_BQE = model.query_tokens([question] * len(pictures), pictures)
    conversations = [_answered(model, question, seen, answer_ids) for seen in pictures]
    sequences = assemble(conversations, pad=model.template.pad, layout="right")
    output = model.llm(
        inputs_embeds=model.embed(sequences, tokens_BQE),
        attention_mask=sequences.mask().long().to(model.device),
        use_cache=False,
    )
    predicts_BS = sequences.labels_RS[:, 1:] != IGNORED  # position s predicts the token at s + 1
    logits_BMW = output.logits[:, :-1][predicts_BS.to(model.device)].unflatten(0, (len(pictures), -1))
    return logits_BMW.float().log_softmax(-1)


def occlusion(
    model: LyricsModel, question: str, seen: SeenImage, answer_ids: Sequence[int], hidden_BN: Tensor
) -> Tensor:
    """drop_B3 of the answer's log-probability (natural logarithm) without the objects of each row, by `WAYS`.

    Above 0: the answer leaned on them. Below 0: they spoke against it.
    """
    own = _log_prob(model, question, [seen], answer_ids)
    rows = [(row, way) for row in hidden_BN for way in WAYS]
    without = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        hidden, ways = zip(*rows[start : start + _ROWS_AT_ONCE], strict=True)
        with taken_away(model, seen, torch.stack(hidden), ways) as pictures:
            without.append(_log_prob(model, question, pictures, answer_ids))
    return (own - torch.cat(without)).view(-1, len(WAYS)) if without else own.new_zeros(0, len(WAYS))


def _log_prob(model: LyricsModel, question: str, pictures: Sequence[SeenImage], answer_ids: Sequence[int]) -> Tensor:
    """log_prob_B of the whole answer."""
    log_probs_BMW = answer_log_probs(model, question, pictures, answer_ids)
    index_BM1 = torch.tensor(answer_ids, device=log_probs_BMW.device).expand(len(pictures), -1).unsqueeze(-1)
    return log_probs_BMW.gather(-1, index_BM1).sum((1, 2)).cpu()


@torch.inference_mode()
def language_attention(
    model: LyricsModel, question: str, seen: SeenImage, answer_ids: Sequence[int], places: Sequence[Places]
) -> Tensor:
    """shares_YMK of attention, mean over heads, from where each answer token is predicted to each of `places`."""
    tokens_1QE = model.query_tokens([question], [seen])
    conversation = _answered(model, question, seen, answer_ids)
    sequences = assemble([conversation], pad=model.template.pad, layout="right")
    with _attention_weights_given(model):
        output = model.llm(
            inputs_embeds=model.embed(sequences, tokens_1QE),
            attention_mask=sequences.mask().long().to(model.device),
            use_cache=False,
            output_attentions=True,
        )
    weights_YSS = torch.stack([layer_1HSS[0].float().mean(0) for layer_1HSS in output.attentions]).cpu()
    last = weights_YSS.shape[-1] - 1
    rows_YMS = weights_YSS[:, last - len(answer_ids) : last]
    return torch.stack([rows_YMS[..., list(place.positions)].sum(-1) for place in places], dim=-1)


def _answered(model: LyricsModel, question: str, seen: SeenImage, answer_ids: Sequence[int]) -> Conversation:
    """The question with an answer given by its tokens."""
    asked = model.conversation(question, (), seen.spatial_text, seen.told)
    start = len(asked.ids)
    return Conversation(
        [*asked.ids, *answer_ids],
        [*asked.queries, *[WORD] * len(answer_ids)],
        ((start, start + len(answer_ids)),),
    )


def prompt_places(
    model: LyricsModel, question: str, seen: SeenImage, answer_tokens: int
) -> tuple[list[Places], list[Places]]:
    """Where the language model reads what: start, query tokens, answer; and each object (none if it reads no text)."""
    prompt = model.conversation(question, (), seen.spatial_text, seen.told)
    visual = model.mq_former.config.visual_queries
    numbered = list(enumerate(prompt.queries))
    start, answer = next(i for i, query in numbered if query != WORD), len(prompt.ids)
    parts = [
        Places(name="start of the prompt", positions=tuple(range(start))),
        Places(name="visual queries", positions=tuple(i for i, query in numbered if 0 <= query < visual)),
        Places(name="grounding queries", positions=tuple(i for i, query in numbered if query >= visual)),
        Places(name="answer so far", positions=tuple(range(answer, answer + answer_tokens))),
    ]
    text = model.shown(seen.spatial_text, seen.told)[0]
    characters = _characters(model, question, seen)
    objects, end = [], 0
    for piece, tag in zip(object_texts(text), seen.tags, strict=False):
        begin = text.index(piece, end)
        end = begin + len(piece)
        inside = tuple(i for i, (first, last) in enumerate(characters) if first < end and last > begin)
        objects.append(Places(name=tag, positions=inside))
    return parts, objects


def _characters(model: LyricsModel, question: str, seen: SeenImage) -> list[tuple[int, int]]:
    """Which characters of the spatial text, as the language model reads it, each position of the prompt covers.

    What comes before the text lies below 0; a query token covers the mark that it stands for.
    """
    template, (text, first, beside) = model.template, model.shown(seen.spatial_text, seen.told)
    sign = next(sign for sign in map(chr, range(0xE000, 0xF900)) if sign not in question)  # a sign for private use
    place = len(IMAGE) - template.render(question, sign).index(sign)  # of the prompt's first character
    characters: list[tuple[int, int]] = []
    for part in template.parts(template.render(question, text), first, beside):
        if isinstance(part, str):
            offsets = template.tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            characters += [(place + begin, place + stop) for begin, stop in offsets]
            place += len(part)
        elif part is first:
            characters += [(-1, -1)] * len(part)
        else:
            characters.append((place, place := place + len(OBJECT)))
    return characters


@contextlib.contextmanager
def _attention_weights_given(model: LyricsModel) -> Iterator[None]:
    """Fused attention returns no weights; the plain one gives the same outputs, and them."""
    fused = model.llm.config._attn_implementation
    model.llm.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.llm.set_attn_implementation(fused)
