"""Answers beside transformers' `generate`: tokens a second, time to the first token, and a second question.

    python -m benchmarks.generate --sizes tiny laptop --write docs/benchmarks.md

The peer is the same language model given the same number of prompt tokens as ids, so what ours adds is the picture:
MQ-Former, projection, and the adapter merged into the weights. Weights are random, shapes those of the presets.
Programs take turns, round by round, so that a busy machine slows all of them.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.table import write_table
from lyrics.config import Refine
from lyrics.data.records import Annotation
from lyrics.inference import Lyrics
from lyrics.model.inputs import TextTokenizer
from lyrics.model.language import PromptTemplate, add_lora, assemble, merge
from lyrics.model.lyrics import LyricsModel
from lyrics.model.mq_former import MQFormer, MQFormerConfig
from lyrics.model.projection import Projection
from lyrics.model.vision import PREPROCESSING, Preprocessing, load_image_encoder, timm_network
from lyrics.refiner.detection import AnnotationDetector
from lyrics.refiner.refiner import RefinedObjects, Refiner
from lyrics.refiner.segmentation import AnnotationSegmenter
from lyrics.refiner.tagging import AnnotationTagger

PARAMS = Path("params")
NEW_TOKENS = 32
QUESTION = "What color is the umbrella to the left of the cup ?"
ASKED_NEXT = "How many objects are there in the image ?"
TAGS = ("umbrella", "cup", "star", "gear", "anchor")
ENDS = {"tiny": ("<s>", "</s>"), "laptop": ("<|im_start|>", "<|im_end|>")}
LLAMA: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 1002, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 4},
    "laptop": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
               "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 1e5},
}  # fmt: skip


def params(group: str, size: str) -> dict[str, Any]:
    return yaml.safe_load((PARAMS / group / f"{size}.yaml").read_text())


def tokenizer(size: str) -> PreTrainedTokenizerFast:
    """A word is a token; the template is the preset's own."""
    bos, eos = ENDS[size]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", bos, eos]
    words = [*special, *QUESTION.split(), *ASKED_NEXT.split(), *TAGS, *map(str, range(100))]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", bos_token=bos, eos_token=eos
    )
    name = params("foundation", size)["llm"]["name"]
    made.chat_template = (PARAMS / f"templates/{name}.jinja").read_text()
    return made


def language_model(size: str, end: int) -> Any:
    """Random weights that never end an answer, so that every program writes as many tokens."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, max_position_embeddings=1024, **LLAMA[size]))
    with torch.no_grad():
        model.get_input_embeddings().weight[end] = 0.0
    return model.eval()


def write_encoder(folder: Path, size: str) -> None:
    """The preset's image encoder as its foundation part would lie in `folder`."""
    part = params("foundation", size)["clip"]
    torch.manual_seed(0)
    if part["source"] == "fitted":
        config = CLIPVisionConfig(
            hidden_size=part["hidden_size"],
            intermediate_size=4 * part["hidden_size"],
            num_hidden_layers=part["layers"],
            num_attention_heads=part["heads"],
            image_size=part["image_size_px"],
            patch_size=part["patch_size_px"],
        )
        CLIPVisionModel(config).save_pretrained(folder)
    else:
        network = timm_network("tf_efficientnet_lite0")
        (folder / "config.json").write_text(json.dumps({"timm": "tf_efficientnet_lite0"}))
        save_file(network.state_dict(), folder / "model.safetensors")
    settings = Preprocessing(part["image_size_px"], (0.5,) * 3, (0.5,) * 3).as_dict()
    (folder / PREPROCESSING).write_text(json.dumps(settings))


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The `laptop` preset's refiner, which is told the objects of the one picture."""

    refiner: Refiner
    objects: tuple[Annotation, ...]

    @property
    def settings(self) -> Refine:
        return self.refiner.settings

    def refine(self, images: Sequence[Image.Image], _: object = None) -> list[RefinedObjects]:
        return self.refiner.refine(images, [self.objects] * len(images))


def build(size: str, llm: Any, words: PreTrainedTokenizerFast) -> Lyrics:
    with tempfile.TemporaryDirectory() as folder:
        write_encoder(Path(folder), size)
        encoder = load_image_encoder(Path(folder))
        refiner: Any = Refiner(
            tagger=AnnotationTagger(TAGS),
            detector=AnnotationDetector(Path(folder)),
            segmenter=AnnotationSegmenter(Path(folder)),
            settings=Refine(**params("refine", size)),
            score_threshold=0.0,
            nms_iou=None,
        )
    objects = tuple(
        Annotation(category=tag, box_xyxy=(20.0 * i, 30.0, 20.0 * i + 30, 70.0)) for i, tag in enumerate(TAGS)
    )
    mq_former = MQFormer(
        MQFormerConfig(
            **params("mq_former", size), vocabulary_size=len(words), pad_token_id=words.pad_token_id,
            image_width=encoder.width, detector_width=refiner.detector.width,
            segmenter_width=refiner.segmenter.width, max_objects=params("refine", size)["max_objects"],
        )
    )  # fmt: skip
    model = LyricsModel(
        mq_former,
        Projection(mq_former.config.hidden_size, llm.config.hidden_size, 0.02),
        merge(add_lora(llm, **params("stage2", size)["lora"])),
        text_tokenizer=TextTokenizer(words),
        template=PromptTemplate(words),
        spatial_text_in_llm=True,
    )
    return Lyrics(model=model.eval(), encoder=encoder, refiner=Oracle(refiner, objects), label=size)  # type: ignore[arg-type]


def seconds(programs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each program; they take turns, and the first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            started = time.perf_counter()
            program()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def answering(size: str, batch: int, rounds: int) -> list[str]:
    """A row of the table: ours beside the peer."""
    words = tokenizer(size)
    peer = language_model(size, words.eos_token_id)
    lyrics = build(size, language_model(size, words.eos_token_id), words)
    model = lyrics.model
    seen = lyrics.see([picture()]) * batch
    prompt = model.conversation(QUESTION, (), seen[0].spatial_text)
    laid = assemble([prompt] * batch, pad=words.unk_token_id, layout="left")
    ids_BS, mask_BS = laid.ids_RS, laid.mask().long()

    def ours(limit: int) -> object:
        new = [dataclasses.replace(one) for one in seen]  # else keys and values of the round before would serve
        return lyrics.answer_batch([QUESTION] * batch, new, max_new_tokens=limit)

    @torch.inference_mode()
    def theirs(limit: int) -> torch.Tensor:
        return peer.generate(
            ids_BS, attention_mask=mask_BS, max_new_tokens=limit, do_sample=False, pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
        )  # fmt: skip

    assert theirs(NEW_TOKENS).shape[1] == ids_BS.shape[1] + NEW_TOKENS
    found = seconds(
        {
            "ours": lambda: ours(NEW_TOKENS),
            "theirs": lambda: theirs(NEW_TOKENS),
            "ours, first": lambda: ours(1),
            "theirs, first": lambda: theirs(1),
        },
        rounds,
    )
    rate = {name: batch * NEW_TOKENS / found[name] for name in ("ours", "theirs")}
    first = {name: 1e3 * found[f"{name}, first"] for name in ("ours", "theirs")}
    after = {name: 1e3 * found[name] - first[name] for name in ("ours", "theirs")}
    return [
        size, str(batch), str(ids_BS.shape[1]),
        f"{rate['ours']:.0f}", f"{rate['theirs']:.0f}", f"{rate['ours'] / rate['theirs']:.2f}",
        f"{after['theirs'] / after['ours']:.2f}",
        f"{first['ours']:.1f}", f"{first['theirs']:.1f}", f"{first['ours'] / first['theirs']:.2f}",
    ]  # fmt: skip


def asking_again(size: str, rounds: int) -> list[str]:
    """A row of the table: the time to the first token of questions about one picture."""
    words = tokenizer(size)
    lyrics = build(size, language_model(size, words.eos_token_id), words)
    image = picture()
    history = [(QUESTION, lyrics.answer(image, QUESTION, 8))]

    def first_question() -> str:
        return dataclasses.replace(lyrics).answer(image, QUESTION, 1)  # has not seen the picture

    def in_the_dialogue() -> str:
        return lyrics.answer(image, ASKED_NEXT, 1, history=history)

    found = seconds(
        {
            "first": first_question,
            "another": lambda: lyrics.answer(image, ASKED_NEXT, 1),
            "again": lambda: lyrics.answer(image, QUESTION, 8),  # what the dialogue goes on from
            "dialogue": in_the_dialogue,
        },
        rounds,
    )
    first, another, dialogue = (1e3 * found[name] for name in ("first", "another", "dialogue"))
    return [
        size, f"{first:.1f}", f"{another:.1f}", f"{another / first:.2f}", f"{dialogue:.1f}", f"{dialogue / first:.2f}"
    ]  # fmt: skip


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 160, 3), np.uint8))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=sorted(LLAMA), default=["tiny", "laptop"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path, help="the document that gets the table")
    chosen = parser.parse_args()
    beside = table(
        ["size", "batch", "prompt tokens", "tokens/s: ours", "transformers", "ratio", "after the first",
         "first token, ms: ours", "transformers", "ratio"],
        [answering(size, batch, chosen.rounds) for size in chosen.sizes for batch in chosen.batches],
    )  # fmt: skip
    again = table(
        ["size", "first question, ms", "another question", "ratio", "next in the dialogue", "ratio"],
        [asking_again(size, chosen.rounds) for size in chosen.sizes],
    )
    machine = (
        f"Medians of {chosen.rounds} rounds; fp32, {torch.get_num_threads()} threads, {platform.machine()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}."
    )
    markdown = f"{beside}\n\n{again}\n\n{machine}"
    print(markdown)
    if chosen.write:
        write_table(chosen.write, "generate", markdown)


if __name__ == "__main__":
    main()
