"""The frozen language model with its LoRA adapter, and how a prompt is put together.

Shapes: R rows, S positions of a row.
"""

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lyrics import io
from lyrics.errors import InputError
from lyrics.model.inputs import TEXTS_REMEMBERED

IMAGE = "<image>"  # where a template puts the query tokens
OBJECT = "\N{OBJECT REPLACEMENT CHARACTER}"  # where an object's own query token stands in a spatial text
IGNORED = -100
NOBODY = -1  # padding belongs to no sample
WORD = -1  # where no query token stands
_PLACE = re.compile("\ue000(.+?)\ue001")  # in a rendered template, where a text goes
_PROBE = "a <b> & 'c' \"d\"\ne"  # what a template that escapes or rewrites texts would change
_BOX = re.compile(r":? (?:\d+ \d+ \d+ \d+|\[[^\]]*\]);")  # what `refiner.spatial_text` writes after a tag


Layout = Literal["left", "right", "packed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are chosen. As it stands: greedily.

    Attributes:
        num_beams: beams of beam search, scored by mean log-probability; 1 for none.
        temperature: 0 takes the most likely token; above, tokens are drawn, the less likely ones oftener as it rises.
        top_p: draws from the likeliest tokens that together have this probability.
        seed: of the draws; the same seed on the same batch gives the same answers.

    Raises:
        InputError: a value is out of its range, or one would have no effect.
    """

    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_beams < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"num_beams is {self.num_beams}, temperature {self.temperature}, top_p {self.top_p}; expected "
                "num_beams >= 1, temperature >= 0 and 0 < top_p <= 1"
            )
        if self.temperature and self.num_beams > 1:
            raise InputError(
                f"temperature {self.temperature} draws tokens and num_beams {self.num_beams} searches for the "
                "likeliest answer; choose one: temperature 0, or num_beams 1"
            )
        if self.top_p < 1 and not self.temperature:
            raise InputError(f"top_p {self.top_p} has no effect at temperature 0; raise the temperature")

    def settings(self) -> dict[str, Any]:
        """The same in the words of transformers' `generate`."""
        if self.temperature:
            return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"do_sample": False, "num_beams": self.num_beams}


GREEDY = Decoding()


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Token ids of a dialogue.

    Attributes:
        ids: padding where a query token stands.
        queries: for each position the number of the query whose token stands there, or WORD.
        answers: the spans that carry the loss.
    """

    ids: list[int]
    queries: list[int]
    answers: tuple[tuple[int, int], ...] = ()


class PromptTemplate:
    """The language model's own chat template, with `<image>` and `spatial_text` in it (params/templates).

    In training this runs for every turn of every sample of a step. So the template is rendered once for each number of
    messages, with places for their texts, and token ids of the texts seen last are remembered.

    Raises:
        InputError: the template has no `<image>`, or does not write texts as they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template or IMAGE not in str(tokenizer.chat_template):
            raise InputError(
                f"The chat template of {tokenizer.name_or_path} has no {IMAGE}; it says where the picture's tokens go. "
                "Put a template in params/templates and make the llm part again"
            )
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id
        self._ids = functools.lru_cache(TEXTS_REMEMBERED)(self._tokenized)
        self._form = functools.cache(self._rendered_once)
        self._check_texts()

    def conversation(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        spatial_text: str,
        first: Sequence[int],
        beside: Sequence[int] = (),
    ) -> Conversation:
        """Questions and answers in turn. With one question more than answers it ends where the next answer starts.

        Each answer, with its end token, is a span of its own: text and span grow together, turn by turn.

        Args:
            first: numbers of the queries whose tokens stand at `<image>`.
            beside: those whose tokens stand at each OBJECT of the spatial text.
        """
        assert len(questions) - len(answers) in (0, 1)
        assert spatial_text.count(OBJECT) == len(beside)
        messages: list[str] = []
        ids: list[int] = []
        queries: list[int] = []
        spans = []
        told = ""
        for turn, question in enumerate(questions):
            messages.append(question.replace(OBJECT, " "))
            asked = self._render(messages, spatial_text)
            if turn:
                told = self._up_to_end(told, asked, answers[turn - 1])
            text = asked[len(told) :]
            for part in self.parts(text, first, beside) if turn == 0 else [text]:
                if isinstance(part, str):
                    words = self._ids(part).tolist()
                    ids += words
                    queries += [WORD] * len(words)
                else:
                    ids += [self.pad] * len(part)
                    queries += part
            if turn == len(answers):
                break
            answer = self.answer(answers[turn])
            spans.append((len(ids), len(ids) + len(answer)))
            ids += answer
            queries += [WORD] * len(answer)
            messages.append(answers[turn])
            told = asked
        return Conversation(ids, queries, tuple(spans))

    @staticmethod
    def parts(text: str, first: Sequence[int], beside: Sequence[int]) -> list[str | Sequence[int]]:
        """A first question as rendered, in the order of its texts and of the queries that stand between them."""
        before, after = text.split(IMAGE, 1)
        parts: list[str | Sequence[int]] = [before, first]
        for query in beside:
            piece, after = after.split(OBJECT, 1)
            parts += [piece, [query]]
        return [*parts, after]

    def render(self, question: str, spatial_text: str) -> str:
        """The prompt of one question as text."""
        return self._render([question.replace(OBJECT, " ")], spatial_text)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer with the end token: the span that carries the loss."""
        return [*self._ids(text).tolist(), self.end]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _render(self, messages: Sequence[str], spatial_text: str) -> str:
        """The dialogue as text, up to where its next answer starts; questions and answers take turns."""
        return self._form(len(messages), bool(spatial_text)).format(*messages, spatial=spatial_text)

    def _rendered_once(self, messages: int, spatial: bool) -> str:
        """What the template writes, as a format string with places for the messages and `spatial`."""
        text = self._by_template([_place(n) for n in range(messages)], _place("spatial") if spatial else "")
        return _PLACE.sub(r"{\1}", text.replace("{", "{{").replace("}", "}}"))

    def _by_template(self, messages: Sequence[str], spatial_text: str) -> str:
        spoken = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(messages)]
        return str(
            self.tokenizer.apply_chat_template(
                spoken, spatial_text=spatial_text, tokenize=False, add_generation_prompt=True
            )
        )

    def _check_texts(self) -> None:
        messages = [f"{n} {_PROBE}" for n in range(3)]
        for spatial_text in ("", _PROBE):
            found, expected = self._by_template(messages, spatial_text), self._render(messages, spatial_text)
            if found != expected:
                raise InputError(
                    f"The chat template of {self.tokenizer.name_or_path} writes {found!r:.200}, expected "
                    f"{expected!r:.200}: it must write questions, answers and spatial_text as they are. Correct the "
                    "template in params/templates"
                )

    def _up_to_end(self, before: str, asked: str, answer: str) -> str:
        """The text up to the end token of the last answer; what follows it belongs to the next question.

        Args:
            before: as rendered up to where the answer starts.
            asked: as rendered with the answer and the next question.
        """
        if not asked.startswith(before):
            raise InputError(
                f"The chat template of {self.tokenizer.name_or_path} changes what came before when a message is added; "
                "dialogues need one that only appends. Correct the template in params/templates"
            )
        added, said = asked[len(before) :], f"{answer}{self.tokenizer.eos_token}"
        if not added.lstrip().startswith(said):
            raise InputError(
                f"The chat template of {self.tokenizer.name_or_path} writes {added!r:.80} for an answer; expected the "
                f"answer and then the end token {self.tokenizer.eos_token}. Correct the template in params/templates"
            )
        return before + added[: added.index(said) + len(said)]

    def _tokenized(self, text: str) -> np.ndarray:
        """In an array, as `TextTokenizer` keeps them."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        return np.array(ids, dtype=np.int32)


def _place(text: int | str) -> str:
    return f"\ue000{text}\ue001"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """Conversations laid out in rows: one a row, padded left or right, or packed, several in a row.

    Attributes:
        sample_RS: which conversation a position belongs to, NOBODY for padding.
        position_RS: from 0 in each conversation.
        query_RS: number of the query whose token goes there, or WORD.
        labels_RS: IGNORED outside of answers.
        answer_RS: number of the answer a label belongs to, counted over all conversations in the order given.
    """

    ids_RS: Tensor
    sample_RS: Tensor
    position_RS: Tensor
    query_RS: Tensor
    labels_RS: Tensor
    answer_RS: Tensor
    layout: Layout

    def mask(self) -> Tensor:
        """mask_RS: where there is no padding."""
        return self.sample_RS != NOBODY

    def attention(self) -> dict[str, Tensor]:
        """Masks and positions for the language model.

        Padding on the right comes after all that is read: causality alone hides it, and leaves the fused kernel its
        plain mask. In packed rows each conversation sees itself alone.
        """
        if self.layout == "right":
            return {}
        if self.layout == "left":
            return {"attention_mask": self.mask().long(), "position_ids": self.position_RS}
        same_RSS = self.sample_RS[:, :, None] == self.sample_RS[:, None, :]
        return {"attention_mask": same_RSS.tril()[:, None], "position_ids": self.position_RS}


def assemble(conversations: Sequence[Conversation], *, pad: int, layout: Layout) -> Sequences:
    """Lay out conversations in rows. Generation reads rows padded on the left.

    The label mask follows from the spans, so no token id can be mistaken for another's place.
    """
    lengths = [len(c.ids) for c in conversations]
    rows = pack(lengths) if layout == "packed" else [[index] for index in range(len(lengths))]
    shape = (len(rows), max(lengths))
    ids, labels = np.full(shape, pad, np.int64), np.full(shape, IGNORED, np.int64)
    sample, position = np.full(shape, NOBODY, np.int64), np.zeros(shape, np.int64)
    queries, answer = np.full(shape, WORD, np.int64), np.full(shape, NOBODY, np.int64)
    numbers = np.cumsum([0, *(len(c.answers) for c in conversations)])  # of each conversation's first answer
    for row, members in enumerate(rows):
        start = shape[1] - lengths[members[0]] if layout == "left" else 0
        for index in members:
            conversation, stop = conversations[index], start + lengths[index]
            sample[row, start:stop] = index
            position[row, start:stop] = np.arange(stop - start)
            ids[row, start:stop] = conversation.ids
            queries[row, start:stop] = conversation.queries
            for number, (first, last) in enumerate(conversation.answers, numbers[index]):
                labels[row, start + first : start + last] = conversation.ids[first:last]
                answer[row, start + first : start + last] = number
            start = stop
    return Sequences(
        ids_RS=torch.from_numpy(ids),
        sample_RS=torch.from_numpy(sample),
        position_RS=torch.from_numpy(position),
        query_RS=torch.from_numpy(queries),
        labels_RS=torch.from_numpy(labels),
        answer_RS=torch.from_numpy(answer),
        layout=layout,
    )


def mark_objects(spatial_text: str) -> str:
    """The text with an OBJECT after each tag: `cup￼ 12 45 78 91;`, `cup￼: [0.123, 0.450, 0.781, 0.910];`."""
    return _BOX.sub(lambda box: f"{OBJECT}{box.group()}", spatial_text.replace(OBJECT, " "))


def pack(lengths: Sequence[int]) -> list[list[int]]:
    """Which samples share a row as long as the longest of them: each, by falling length, in the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def add_lora(
    llm: PreTrainedModel, *, rank: int, alpha: int, dropout: float, target_modules: Sequence[str]
) -> PeftModel:
    """Freeze `llm` and add adapters that start without effect (B = 0)."""
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules), task_type="CAUSAL_LM"
    )
    with _quiet_peft():
        return get_peft_model(llm, settings)


def adapter_state(llm: PeftModel) -> dict[str, Tensor]:
    """The adapter's weights by peft's names."""
    return get_peft_model_state_dict(llm)


def save_adapter(folder: Path, llm: PeftModel, state: dict[str, Tensor]) -> None:
    """peft's own layout, without what changes from run to run (its model card; sets in hash order).

    Args:
        state: of `adapter_state`, whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = llm.peft_config["default"].to_dict()
    plain = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in settings.items()}
    plain["base_model_name_or_path"] = "models/foundation/llm"
    plain["target_modules"] = sorted(plain["target_modules"])
    plain["inference_mode"] = True
    io.write_json(folder / "adapter_config.json", plain)


def load_adapter(folder: Path, llm: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """The language model with the adapter in its weights, and nothing of peft left to pass through for each token.

    In weights of 16 bits most of the adapter would be rounded away: there it stays beside them.
    """
    with _quiet_peft():
        adapted = PeftModel.from_pretrained(llm, str(folder), is_trainable=False)
    return merge(adapted) if llm.dtype == torch.float32 else adapted


def merge(llm: PeftModel) -> PreTrainedModel:
    """The language model below, `W + BA` in the place of each adapted weight `W`."""
    merged: Any = llm
    return merged.merge_and_unload()


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    """peft asks transformers by an old name, of which users would be told at every question."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield
