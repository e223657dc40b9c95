"""An image encoder whose tokens are known: a class token, then the mean colour of each quarter of the picture."""

import torch

from lyrics.model.vision import ImageEncoder, Preprocessing


class _Quarters(torch.nn.Module):
    """Its finer map, where it has one, is the picture itself."""

    def __init__(self, finer):
        super().__init__()
        self.finer = finer

    def forward(self, pixels_B3HW):
        means = torch.nn.functional.adaptive_avg_pool2d(pixels_B3HW, 2).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.full_like(means[:, :1], 9.0), means], dim=1)
        return tokens, [pixels_B3HW] if self.finer else []


def quarter_encoder(_folder=None, finer=False):
    return ImageEncoder(
        _Quarters(finer),
        Preprocessing(16, (0.0,) * 3, (1.0,) * 3),
        width=3,
        grid=(2, 2),
        prefix_tokens=1,
        finer_channels=[3] if finer else [],
    )
