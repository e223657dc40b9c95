"""An image encoder whose tokens are known: a class token, then the mean colour of each quarter of the picture."""

import torch

from lyrics.model.vision import ImageEncoder, Preprocessing


class _Quarters(torch.nn.Module):
    def forward(self, pixels_B3HW):
        means = torch.nn.functional.adaptive_avg_pool2d(pixels_B3HW, 2).flatten(2).transpose(1, 2)
        return torch.cat([torch.full_like(means[:, :1], 9.0), means], dim=1)


def quarter_encoder(_folder=None):
    return ImageEncoder(_Quarters(), Preprocessing(16, (0.0,) * 3, (1.0,) * 3), width=3, grid=(2, 2), prefix_tokens=1)
