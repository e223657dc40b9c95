"""Stage 1 as this project and as its peer compute it, from the same weights on the same random batch.

Shapes: B pairs, P tokens of a picture, W their width, Q queries, H × W pixels.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from benchmarks.peer import PUBLISHED_TEXT_TOKENS, Captioning, Peer, copy_weights
from lyrics import optimizer
from lyrics.config import PARAMS
from lyrics.foundation.tokenizer import SPECIAL
from lyrics.model.inputs import SeenImage, TextTokenizer
from lyrics.model.mq_former import MQFormer, MQFormerConfig
from lyrics.model.vision import timm_network
from lyrics.train import losses
from lyrics.train.stage1 import Objectives
from lyrics.train.stage1_batches import Stage1Batch

PAIRS = {"tiny": 32, "laptop": 16, "paper": 8}  # a step's batch, that all programs fit into 8 GiB
SMOOTHING = 0.1
# Words and punctuation marks of the first caption of 64 pictures of COCO 2017 (validation), in the order of their ids.
CAPTION_TOKENS = (
    11, 12, 8, 10, 10, 13, 9, 13, 14, 9, 12, 9, 13, 13, 11, 13, 12, 14, 9, 15, 16, 10, 10, 11, 10, 12, 9, 10, 13, 11, 9,
    10, 17, 14, 12, 13, 12, 13, 13, 14, 12, 12, 9, 8, 11, 8, 11, 12, 11, 13, 15, 9, 8, 10, 10, 9, 11, 9, 11, 12, 10, 12,
    13, 12,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the peer runs (see `Peer`). With `encoder` its step encodes the pictures; ours reads cached features."""

    text_tokens: int | None
    captioning: Captioning = "kept"
    encoder: bool = False


OURS = "ours"
PEERS = {
    "peer, 32 text tokens": Recipe(PUBLISHED_TEXT_TOKENS),
    "peer, longest text": Recipe(None),
    "peer, 32 text tokens, encoder in the step": Recipe(PUBLISHED_TEXT_TOKENS, encoder=True),
    "peer, 32 text tokens, queries again for captions": Recipe(PUBLISHED_TEXT_TOKENS, captioning="again"),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """What is measured. Ours computes with deterministic kernels, as the `pretrain` verb does."""

    name: str
    module: nn.Module
    losses: Callable[[], dict[str, Tensor]]
    optimizers: list[torch.optim.Optimizer]
    deterministic: bool


def read_params(group: str, width: str) -> dict[str, Any]:
    return yaml.safe_load((PARAMS / group / f"{width}.yaml").read_text())


def mq_former_config(width: str) -> MQFormerConfig:
    """The preset's sizes without grounding queries, which the peer does not have."""
    foundation = read_params("foundation", width)
    return MQFormerConfig(
        **{**read_params("mq_former", width), "grounding_queries": 0},
        vocabulary_size=foundation["tokenizer"]["vocabulary_size"],
        pad_token_id=0,
        image_width=foundation["clip"]["hidden_size"],
        detector_width=1,
        segmenter_width=1,
        max_objects=1,
    )


def text_tokenizer(vocabulary_size: int) -> TextTokenizer:
    """Special tokens and numbered words: texts are random, only their lengths matter."""
    words = [*SPECIAL.values(), *(f"w{i}" for i in range(vocabulary_size - len(SPECIAL)))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL["unk_token"])
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **SPECIAL))


def random_batch(config: MQFormerConfig, tokenizer: TextTokenizer, pairs: int, patches: int) -> Stage1Batch:
    """Different pictures without objects, and different captions as long as COCO's."""
    draw = np.random.default_rng(0)
    seen = [
        SeenImage(
            image_tokens_PD=draw.standard_normal((patches, config.image_width), dtype=np.float32),
            detector_tokens_ND=np.zeros((0, config.detector_width), np.float32),
            segmenter_tokens_ND=np.zeros((0, config.segmenter_width), np.float32),
            tags=(),
            boxes_xyxy_N4=np.zeros((0, 4)),
            spatial_text="",
        )
        for _ in range(pairs)
    ]
    lengths = [CAPTION_TOKENS[i % len(CAPTION_TOKENS)] for i in range(pairs)]
    visual = tokenizer.visual_batch(seen)
    nothing = torch.zeros(visual.local.object_mask_BN.shape, dtype=torch.bool)
    captions = [draw.integers(len(SPECIAL), config.vocabulary_size, length).tolist() for length in lengths]
    return Stage1Batch(
        own=slice(0, pairs),
        ids=tuple(map(str, range(pairs))),
        visual=visual,
        caption_rows=captions,
        spatial_rows=[[]] * pairs,
        same_caption_BB=torch.eye(pairs, dtype=torch.bool),
        same_spatial_BB=torch.eye(pairs, dtype=torch.bool),
        msp_rows=[[]] * pairs,
        msp_labels=[[]] * pairs,
        msp_in_tag=[[]] * pairs,
        hidden_tag_bN=nothing,
        hidden_box_bN=nothing,
        uniform_B2=torch.from_numpy(draw.random((pairs, 2))),
        totals={"itc_loss": pairs, "itm_loss": 3 * pairs, "icg_loss": sum(len(row) + 1 for row in captions)},
    )


def our_losses(objectives: Objectives, batch: Stage1Batch) -> dict[str, Tensor]:
    """What both have: ITC of captions, ITM, ICG."""
    looked = objectives.look(batch)
    similarity_BB = losses.query_text_similarity(
        objectives.mq_former.image_projection(looked.encoded.query_PQD), objectives.encode_text(batch.caption_rows)
    )
    same_BB = batch.same_caption_BB.to(similarity_BB.device)
    both_ways = similarity_BB, similarity_BB.T
    found = {
        "itc_loss": losses.contrastive_loss(*both_ways, objectives.temperature, same_BB, objectives.smoothing),
        "itm_loss": losses.matching_loss(
            *objectives.matching_logits(batch, looked, *(similarity.detach() for similarity in both_ways))
        ),
        "icg_loss": objectives.captioning(batch, looked),
    }
    return {name: loss / batch.totals[name] for name, loss in found.items()}


def peer_losses(
    peer: Peer, recipe: Recipe, batch: Stage1Batch, encode: Callable[[], Tensor] | None
) -> dict[str, Tensor]:
    """The same objectives by the peer, on cached features or, with `encode`, on what the frozen encoder sees."""
    with torch.no_grad():
        image_BPW = encode() if encode else batch.visual.image_tokens_BPD
    return peer(
        image_BPW, batch.caption_rows, batch.uniform_B2, text_tokens=recipe.text_tokens, captioning=recipe.captioning
    )


def patches(width: str) -> int:
    """Tokens of a picture: the patches, and CLIP's class token."""
    clip = read_params("foundation", width)["clip"]
    grid = clip["image_size_px"] // clip["patch_size_px"]
    return grid**2 + (clip["source"] != "wheel")


def frozen_encoder(width: str) -> Callable[[Tensor], Tensor]:
    """The preset's image encoder with random weights; CLIP up to its penultimate layer, as both models read it."""
    clip = read_params("foundation", width)["clip"]
    if clip["source"] == "wheel":
        network: Any = timm_network("tf_efficientnet_lite0").eval().requires_grad_(False)
        return lambda pixels_B3HW: network.forward_features(pixels_B3HW).flatten(2).transpose(1, 2)
    config = CLIPVisionConfig(
        hidden_size=clip["hidden_size"],
        intermediate_size=4 * clip["hidden_size"],
        num_hidden_layers=clip["layers"] - 1,
        num_attention_heads=clip["heads"],
        image_size=clip["image_size_px"],
        patch_size=clip["patch_size_px"],
    )
    tower: Any = CLIPVisionModel(config).eval().requires_grad_(False)
    return lambda pixels_B3HW: tower(pixel_values=pixels_B3HW).last_hidden_state


def adamw(module: nn.Module) -> list[torch.optim.Optimizer]:
    return optimizer.build(module, algorithm="adamw", lr_of=lambda _: 1e-4, betas=(0.9, 0.98), weight_decay=0.05)


def build(width: str, names: Sequence[str]) -> list[Program]:
    """The programs asked for, on one batch, from the same weights; those of the peer share weights and optimiser."""
    torch.manual_seed(0)
    config = mq_former_config(width)
    tokenizer = text_tokenizer(config.vocabulary_size)
    batch = random_batch(config, tokenizer, PAIRS[width], patches(width))
    mq_former = MQFormer(config).train()
    programs = []
    if OURS in names:
        objectives = Objectives(mq_former, tokenizer, itc_cross_query=True, smoothing=SMOOTHING)
        step = functools.partial(our_losses, objectives, batch)
        programs.append(Program(OURS, objectives, step, adamw(objectives), deterministic=True))
    recipes = {name: recipe for name, recipe in PEERS.items() if name in names}
    if recipes:
        peer = Peer(config, tokenizer, SMOOTHING).train()
        copy_weights(mq_former, peer)
        optimizers = adamw(peer)
        side = read_params("foundation", width)["clip"]["image_size_px"]
        pixels_B3HW = torch.randn(PAIRS[width], 3, side, side)
        for name, recipe in recipes.items():
            encode = functools.partial(frozen_encoder(width), pixels_B3HW) if recipe.encoder else None
            step = functools.partial(peer_losses, peer, recipe, batch, encode)
            programs.append(Program(name, peer, step, optimizers, deterministic=False))
    return programs
