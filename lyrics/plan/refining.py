"""What the frozen parts cost for one picture in `refine`."""

import copy
from typing import Any

import torch
from torch import nn

from lyrics.config import Config
from lyrics.foundation import sam
from lyrics.plan import costs
from lyrics.plan.hardware import Assumptions, Hardware
from lyrics.plan.parts import Encoder, Parts, without_data


def seconds_per_picture(config: Config, assumed: Assumptions, parts: Parts, hardware: Hardware) -> tuple[float, float]:
    """FLOPs and seconds of the networks for a picture: without decoding it, and without a decoder of masks."""
    batch, part = config.refine.batch_size, config.foundation
    flops = moved = 0.0
    with costs.metered(fused_attention=hardware.kind == "cuda") as counted, torch.no_grad():
        encoder, side = copy.copy(parts.encoder), part.clip.image_size_px
        _run(encoder, batch, side)
        flops += costs.flops(counted.operations)
        moved += costs.seconds(counted.operations, hardware)
        counted.forget()
        if parts.segmenter is not None:
            _segment(parts.segmenter, batch, part.segmenter.image_size_px)
            flops += costs.flops(counted.operations)
            moved += costs.seconds(counted.operations, hardware)
    detector = assumed.detector_gflop * 1e9 * (part.detector.source != "none")
    return flops / batch + detector, moved / batch + detector / (hardware.fp32_tflops * 1e12)


def _run(encoder: Encoder, batch: int, side: int) -> None:
    without_data(encoder.network)
    network: Any = encoder.network.eval()
    pixels_B3HW = torch.empty(batch, 3, side, side)
    if hasattr(network, "forward_features"):
        network.forward_features(pixels_B3HW)
    else:
        network(pixel_values=pixels_B3HW)


def _segment(module: nn.Module, batch: int, side: int) -> None:
    without_data(module)
    network: Any = module.eval()
    pixels_B3HW = torch.empty(batch, 3, side, side)
    if isinstance(module, sam.BoxSam):
        module.encode(pixels_B3HW)
    else:
        network.get_image_embeddings(pixels_B3HW)
