"""A project folder that both training stages run in: drawn pictures' features, a fitted tokenizer, a random Llama.

Nothing in it comes from `ingest`, `refine` or a fit, so that what they change leaves the training curves alone.
Features tell kind and colour of each object, so that there is something to learn.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import yaml
from pydantic import TypeAdapter
from transformers import LlamaConfig, LlamaForCausalLM

from lyrics import io
from lyrics.compose import preview
from lyrics.config import CONFIG_PATH, Config, First, Lora, Optimizer, parse
from lyrics.data.records import Sample
from lyrics.foundation import llm, manifest
from lyrics.foundation.tokenizer import train_wordpiece
from lyrics.model.inputs import TextTokenizer
from lyrics.refiner import features
from lyrics.refiner.spatial_text import format_objects
from lyrics.seeding import rng
from lyrics.train import stage1

ROOT = Path(__file__).parents[2]
SIDE = 100
KINDS, COLORS = ("cup", "star", "key", "boat"), ("red", "blue", "green")
PATCHES, IMAGE_WIDTH, LOCAL_WIDTH, MAX_OBJECTS = 9, 24, 12, 3
SPLITS = {"web": 10, "instruct": 14, "val": 6}
STEPS = 20


def configuration(*, steps: int = STEPS, dropout: float = 0.0, checkpoint_every: int = 4) -> Config:
    """Small sizes in place of those of `tiny`; in fp32, every objective in every step."""
    config = parse(preview(["~overrides", "preset=tiny", "data=world"], ROOT / "params/run.yaml"))
    optimizer = Optimizer(
        algorithm="adamw", lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=4, grad_clip=1.0
    )
    trained = {
        "steps": steps,
        "checkpoint_every": checkpoint_every,
        "log_every": 1,
        "precision": "fp32",
        "optimizer": optimizer,
    }
    return dataclasses.replace(
        config,
        preset="tiny",
        seed=0,
        device="cpu",
        refine=dataclasses.replace(config.refine, coordinate_format="grid100", max_objects=MAX_OBJECTS),
        mq_former=dataclasses.replace(
            config.mq_former,
            visual_queries=4,
            grounding_queries=4,
            hidden_size=32,
            layers=2,
            heads=4,
            intermediate_size=64,
            cross_attention_every=2,
            max_text_tokens=56,
            dropout=dropout,
            projection_size=16,
            detector_tokens=True,
            segmenter_tokens=True,
            grounding="per_object",
        ),
        stage1=dataclasses.replace(
            config.stage1,
            **trained,
            batch_size=8,
            objectives="all",
            itc_cross_query=True,
            label_smoothing=0.1,
            temperature=0.07,
            mask_probability=0.15,
        ),
        stage2=dataclasses.replace(
            config.stage2,
            **trained,
            batch_size=6,
            spatial_text="llm",
            mix_by="task",
            shares={"caption": 0.3, "vqa": 0.4, "refer": 0.3},
            first=First(steps=5, kinds=("caption",), without_spatial=1.0),
            turns=2,
            without_spatial=0.4,
            loss_average="answers",
            lora=Lora(rank=4, alpha=8, dropout=dropout, target_modules=("q_proj", "v_proj")),
            projection_lr=2e-3,
            lora_lr=2e-3,
        ),
    )


def make(folder: Path, config: Config) -> None:
    """Fill `folder`, which must be the current directory, with what `pretrain` and `finetune` read.

    models/stage1 holds an MQ-Former that was not trained: stage 2 then starts from the same weights whatever becomes of
    stage 1.
    """
    for name in ("lyrics", "params", "dvc.yaml", "requirements.lock"):
        (folder / name).symlink_to(ROOT / name)
    values = TypeAdapter(Config).dump_python(config, mode="json")
    io.write_text(CONFIG_PATH, yaml.safe_dump(values))
    for split, count in SPLITS.items():
        _write_split(split, count)
    widths = {"image_width": IMAGE_WIDTH, "detector_width": LOCAL_WIDTH, "segmenter_width": LOCAL_WIDTH}
    io.write_json(stage1.REFINED / "summary.json", widths)
    _write_foundation(config)
    mq_former = stage1.new_mq_former(config, TextTokenizer(stage1.load_text_tokenizer(stage1.FOUNDATION / "tokenizer")))
    stage1.save_mq_former(stage1.STAGE1, mq_former)
    io.write_json(stage1.STAGE1 / "config.json", {"mq_former": dataclasses.asdict(mq_former.config)})


def _write_split(split: str, count: int) -> None:
    folder = stage1.REFINED / split
    drawn = [_picture(split, row) for row in range(count)]
    pictures = ((image, tokens) for image, tokens, _ in drawn)
    features.write_shard(features.shard_folder(folder, 0), pictures, max_objects=MAX_OBJECTS)
    features.write_images(folder / features.IMAGES_FILE, [image for image, _, _ in drawn])
    features.write_samples(folder / features.SAMPLES_FILE, [s for *_, samples in drawn for s in samples])


def _picture(split: str, row: int) -> tuple[features.RefinedImage, features.Tokens, list[Sample]]:
    """One picture with row % 4 objects, from none to three."""
    draw = rng("picture", split, row)
    kinds = [KINDS[i] for i in draw.permutation(len(KINDS))[: row % (MAX_OBJECTS + 1)]]
    colors = [COLORS[int(draw.integers(len(COLORS)))] for _ in kinds]
    corners = [draw.integers(0, 60, 2) for _ in kinds]
    boxes = [(float(x), float(y), float(x + 30), float(y + 30)) for x, y in corners]
    named = [f"{color} {kind}" for color, kind in zip(colors, kinds, strict=True)]
    captions = (f"A {' and a '.join(named)}.", f"There is a {', a '.join(named)}.") if named else ("An empty table.",)
    image = features.RefinedImage(
        image_id=f"{split}-{row}",
        path=f"data/raw/{split}/{row}.png",
        width=SIDE,
        height=SIDE,
        captions=captions,
        tags=tuple(kinds),
        boxes_xyxy=tuple(boxes),
        scores=tuple(0.9 for _ in kinds),
        masks=tuple("" for _ in kinds),
        spatial_text=format_objects(kinds, [np.array(box) / SIDE for box in boxes], "grid100"),
        shard=0,
        row=row,
    )
    patches_PD = 0.3 * draw.standard_normal((PATCHES, IMAGE_WIDTH))
    for patch, name in enumerate(named):
        patches_PD[patch] += _direction(name, IMAGE_WIDTH)
    local_ND = np.array([_direction(name, LOCAL_WIDTH) for name in named]).reshape(-1, LOCAL_WIDTH)
    tokens = features.Tokens(
        image_tokens_PD=patches_PD.astype(np.float32),
        detector_tokens_ND=local_ND.astype(np.float32),
        segmenter_tokens_ND=(local_ND + 0.1 * draw.standard_normal(local_ND.shape)).astype(np.float32),
    )
    return image, tokens, _samples(image, colors)


def _direction(name: str, width: int) -> np.ndarray:
    return rng("direction", name, width).standard_normal(width)


def _samples(image: features.RefinedImage, colors: list[str]) -> list[Sample]:
    about = {"image_id": image.image_id}
    samples = [
        Sample(
            sample_id=f"{image.image_id}-caption", task="caption", kind="caption", references=image.captions, **about
        )
    ]
    for n, (kind, color, box) in enumerate(zip(image.tags, colors, image.boxes_xyxy, strict=True)):
        asked = f"What color is the {kind}?"
        samples += [
            Sample(
                sample_id=f"{image.image_id}-vqa-{n}",
                task="vqa",
                kind="colour",
                question=asked,
                references=(color,),
                **about,
            ),
            Sample(
                sample_id=f"{image.image_id}-refer-{n}",
                task="refer",
                kind="refer",
                question=f"the {color} {kind}",
                box_xyxy=box,
                **about,
            ),
        ]
    return samples


def _write_foundation(config: Config) -> None:
    """A tokenizer of the words at hand, and a Llama with random weights."""
    folder = stage1.FOUNDATION / "tokenizer"
    folder.mkdir(parents=True)
    named = [f"{color} {kind}" for color in COLORS for kind in KINDS]
    lines = [
        f"A {name}. There is a {name}, an empty table. What color is Where is the Describe image" for name in named
    ]
    train_wordpiece(lines, 220).save(str(folder / "tokenizer.json"))
    manifest.write(folder, "tokenizer", manifest.Made(source="fitted", name="wordpiece", parameters=0))
    tokenizer = llm.add_text_ends(folder)
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            initializer_range=0.1,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    folder = stage1.FOUNDATION / "llm"
    llm.save(folder, model, tokenizer, ROOT / "params/templates/llama.jinja")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    manifest.write(folder, "llm", manifest.Made(source="fitted", name="llama", parameters=parameters))
