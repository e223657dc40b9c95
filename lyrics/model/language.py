"""The frozen language model with its LoRA adapter, and how a prompt is put together.

Shapes: B batch, Q query tokens, S sequence, E language width.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lyrics import io
from lyrics.errors import InputError

IMAGE = "<image>"  # where a template puts the query tokens
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids before and after the query tokens."""

    before: list[int]
    after: list[int]


class PromptTemplate:
    """The language model's own chat template, with `<image>` and `spatial_text` in it (params/templates)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template or IMAGE not in str(tokenizer.chat_template):
            raise InputError(
                f"The chat template of {tokenizer.name_or_path} has no {IMAGE}; it says where the picture's tokens go. "
                "Put a template in params/templates and make the llm part again"
            )
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id
        self._before: dict[str, list[int]] = {}

    def prompt(self, instruction: str, spatial_text: str) -> Prompt:
        """Everything up to where the answer starts."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": instruction}],
            spatial_text=spatial_text,
            tokenize=False,
            add_generation_prompt=True,
        )
        before, after = str(text).split(IMAGE, 1)
        if before not in self._before:
            self._before[before] = self._ids(before)
        return Prompt(self._before[before], self._ids(after))

    def answer(self, text: str) -> list[int]:
        """Ids of an answer with the end token: the span that carries the loss."""
        return [*self._ids(text), self.end]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """Padded prompts: `image_mask_BS` marks where query tokens go, `labels_BS` is IGNORED outside of answers."""

    ids_BS: Tensor
    mask_BS: Tensor
    image_mask_BS: Tensor
    labels_BS: Tensor


def assemble(
    prompts: Sequence[Prompt], queries: int, *, pad: int, answers: Sequence[Sequence[int]] | None = None
) -> Sequences:
    """Lay out `before, queries, after, answer` per row; padded left for generation, right with answers.

    The label mask follows from the spans, so no token id can be mistaken for another's place.
    """
    targets = answers or [[] for _ in prompts]
    lengths = [len(p.before) + queries + len(p.after) + len(a) for p, a in zip(prompts, targets, strict=True)]
    shape = (len(prompts), max(lengths))
    ids, labels = np.full(shape, pad, np.int64), np.full(shape, IGNORED, np.int64)
    mask, image = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (prompt, answer, length) in enumerate(zip(prompts, targets, lengths, strict=True)):
        start = 0 if answers is not None else shape[1] - length
        mask[row, start : start + length] = True
        first_query = start + len(prompt.before)
        ids[row, start:first_query] = prompt.before
        image[row, first_query : first_query + queries] = True
        after = first_query + queries
        ids[row, after : start + length] = [*prompt.after, *answer]
        if answer:
            labels[row, start + length - len(answer) : start + length] = answer
    return Sequences(
        ids_BS=torch.from_numpy(ids),
        mask_BS=torch.from_numpy(mask),
        image_mask_BS=torch.from_numpy(image),
        labels_BS=torch.from_numpy(labels),
    )


def add_lora(
    llm: PreTrainedModel, *, rank: int, alpha: int, dropout: float, target_modules: Sequence[str]
) -> PeftModel:
    """Freeze `llm` and add adapters that start without effect (B = 0)."""
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules), task_type="CAUSAL_LM"
    )
    with _quiet_peft():
        return get_peft_model(llm, settings)


def save_adapter(folder: Path, llm: PeftModel) -> None:
    """peft's own layout, without what changes from run to run (its model card; sets in hash order)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(llm).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = llm.peft_config["default"].to_dict()
    plain = {k: sorted(v) if isinstance(v, set | frozenset) else v for k, v in settings.items()}
    plain["base_model_name_or_path"] = "models/foundation/llm"
    plain["target_modules"] = sorted(plain["target_modules"])
    plain["inference_mode"] = True
    io.write_json(folder / "adapter_config.json", plain)


def load_adapter(folder: Path, llm: PreTrainedModel) -> PeftModel:
    """The language model with its adapter merged into the weights: without extra products, answers come sooner."""
    with _quiet_peft():
        model = PeftModel.from_pretrained(llm, str(folder), is_trainable=False)
    model.merge_adapter()
    return model


@contextlib.contextmanager
def _quiet_peft() -> Iterator[None]:
    """peft asks transformers by an old name, of which users would be told at every question."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield
