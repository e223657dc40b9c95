"""A `segment_anything` model of any size, and its decoder over the boxes of many pictures at once.

Shapes: B images, R boxes of a batch, C width of the image embedding, H × W its grid.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

BOX_STEP = 16
_MARGIN = 0.1  # of a side: a predicted box is never exact
_OUTSIDE = -10.0  # logit of what lies further out: an object ends where its box does


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamSize:
    image_size_px: int
    patch_size_px: int
    width: int
    layers: int
    heads: int
    embedding: int
    detail: int
    decoder_layers: int
    decoder_heads: int
    decoder_mlp: int


class BoxSam(nn.Module):
    """A `Sam` made for learning fast: it is told where a box is, and sees fine detail.

    A box is its two corners, as in Sam, and drawn as Sam's mask prompt; outside it no mask is looked for. A path past
    the encoder, as SAM 2 has one, brings detail to where the decoder's upscaling ends: a patch of 8 px blurs what is
    2 px wide.
    """

    def __init__(self, size: SamSize) -> None:
        super().__init__()
        self.sam = build(size)
        self.detail = nn.Sequential(
            nn.Conv2d(3, size.detail, 3, stride=size.patch_size_px // 4, padding=1),
            nn.GELU(),
            nn.Conv2d(size.detail, size.embedding // 8, 3, padding=1),
        )

    def encode(self, pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Image embeddings (B, C, H, W) and details (B, C / 8, 4H, 4W) of pictures in [0, 1]."""
        normalised = (pixels_B3SS * 255 - self.sam.pixel_mean) / self.sam.pixel_std
        return self.sam.image_encoder(normalised), self.detail(normalised)

    def decode(self, embeddings_BCHW: Tensor, details_BKhw: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Mask logits (R, 4H, 4W) of every box (pixels of the network's picture) of every picture, in order.

        `MaskDecoder` itself takes one picture at a time and refuses no boxes; this is its computation with each box
        beside its own picture.
        """
        if not any(map(len, boxes)):
            return embeddings_BCHW.new_zeros(0, *details_BKhw.shape[2:])
        boxes_R4 = torch.cat(list(boxes))
        picture_R = torch.cat([torch.full((len(one),), i) for i, one in enumerate(boxes)]).to(boxes_R4.device)
        if self.training:
            return self._decode(embeddings_BCHW, details_BKhw, boxes_R4, picture_R)
        filled_R = fill_up(len(boxes_R4)).to(boxes_R4.device)
        return self._decode(embeddings_BCHW, details_BKhw, boxes_R4[filled_R], picture_R[filled_R])[: len(boxes_R4)]

    def _decode(self, embeddings_BCHW: Tensor, details_BKhw: Tensor, boxes_R4: Tensor, picture_R: Tensor) -> Tensor:
        decoder, prompts = self.sam.mask_decoder, self.sam.prompt_encoder
        side = details_BKhw.shape[-1]
        scale = side / prompts.input_image_size[0]
        drawn_Rhw = draw(boxes_R4 * scale, side)
        sparse_RNC, dense_RCHW = prompts(points=None, boxes=boxes_R4, masks=drawn_Rhw[:, None])
        tokens_TC = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens_RTC = torch.cat([tokens_TC.expand(len(sparse_RNC), -1, -1), sparse_RNC], dim=1)
        source_RCHW = embeddings_BCHW.index_select(0, picture_R) + dense_RCHW
        position_RCHW = prompts.get_dense_pe().expand(len(source_RCHW), -1, -1, -1)
        tokens_RTC, source_RLC = decoder.transformer(source_RCHW, position_RCHW, tokens_RTC)
        upscaled_RKhw = decoder.output_upscaling(source_RLC.transpose(1, 2).reshape(source_RCHW.shape))
        upscaled_RKhw = upscaled_RKhw + details_BKhw.index_select(0, picture_R)
        weights_RK = decoder.output_hypernetworks_mlps[0](tokens_RTC[:, 1])
        logits_Rhw = torch.einsum("rk,rkhw->rhw", weights_RK, upscaled_RKhw)
        near_Rhw = draw(widen(boxes_R4, _MARGIN) * scale, side) > 0
        return logits_Rhw.masked_fill(~near_Rhw, _OUTSIDE)


def fill_up(count: int) -> Tensor:
    """Rows 0 … count - 1 and the first again, to a multiple of `BOX_STEP`: few different numbers of boxes come.

    Each new number costs a CPU half a second of new kernels.
    """
    rows = torch.arange(count + -count % BOX_STEP)
    return torch.where(rows < count, rows, 0)


class FusedAttention(Attention):
    """The encoder's attention where nothing is learned: torch's own kernel, which keeps no map of all pairs."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.use_rel_pos:
            return super().forward(x)
        batch, rows, columns, width = x.shape
        qkv_3BhLd = self.qkv(x).reshape(batch, rows * columns, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        found_BhLd = F.scaled_dot_product_attention(*qkv_3BhLd.unbind(0))
        return self.proj(found_BhLd.transpose(1, 2).reshape(batch, rows, columns, width))


def widen(boxes_R4: Tensor, share: float) -> Tensor:
    """Boxes with every side moved outwards by a share of the box's width or height."""
    margin_R2 = (boxes_R4[:, 2:] - boxes_R4[:, :2]) * share
    return torch.cat([boxes_R4[:, :2] - margin_R2, boxes_R4[:, 2:] + margin_R2], dim=1)


def draw(boxes_R4: Tensor, side: int) -> Tensor:
    """Boxes, in units of cells, as masks (R, side, side): 1 where a box touches a cell."""
    x0, y0, x1, y1 = (edge[:, None] for edge in boxes_R4.unbind(dim=1))
    cells = torch.arange(side, device=boxes_R4.device)
    across, down = (cells < x1) & (cells + 1 > x0), (cells < y1) & (cells + 1 > y0)
    return (down[:, :, None] & across[:, None, :]).to(boxes_R4.dtype)


def build(size: SamSize) -> Sam:
    """As `segment_anything` builds its own, with one mask per box in place of three candidates."""
    grid = size.image_size_px // size.patch_size_px
    encoder = ImageEncoderViT(
        img_size=size.image_size_px,
        patch_size=size.patch_size_px,
        embed_dim=size.width,
        depth=size.layers,
        num_heads=size.heads,
        out_chans=size.embedding,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=0,
    )
    for block in encoder.blocks:
        block.attn.__class__ = FusedAttention
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=size.embedding,
            image_embedding_size=(grid, grid),
            input_image_size=(size.image_size_px, size.image_size_px),
            mask_in_chans=4,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=0,
            transformer=TwoWayTransformer(
                depth=size.decoder_layers,
                embedding_dim=size.embedding,
                num_heads=size.decoder_heads,
                mlp_dim=size.decoder_mlp,
            ),
            transformer_dim=size.embedding,
            iou_head_depth=2,
            iou_head_hidden_dim=size.embedding,
        ),
    )


def average_under(maps_BCHW: Tensor, masks: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
    """A feature map averaged under each mask (R, C); under the whole box where a mask is empty.

    Args:
        masks: for each picture (N, height, width), over all that its map covers.
        boxes: for each picture (N, 4), in the pixels of the masks.
    """
    features = []
    for map_CHW, masks_NST, boxes_N4 in zip(maps_BCHW, masks, boxes, strict=True):
        if not len(masks_NST):
            features.append(map_CHW.new_zeros(0, len(map_CHW)))
            continue
        grid = map_CHW.shape[1:]
        cells = F.adaptive_avg_pool2d(masks_NST.to(map_CHW)[:, None], grid)[:, 0].flatten(1)
        empty = cells.sum(dim=1) == 0
        if empty.any():
            height, width = masks_NST.shape[1:]
            scale = torch.tensor([grid[1] / width, grid[0] / height] * 2, device=boxes_N4.device)
            cells[empty] = _cells_of_boxes(boxes_N4[empty] * scale, grid[0], grid[1]).to(cells)
        features.append(cells @ map_CHW.flatten(1).T / cells.sum(dim=1, keepdim=True))
    return torch.cat(features)


def _cells_of_boxes(boxes_N4: Tensor, rows: int, columns: int) -> Tensor:
    """(N, rows × columns): 1 where a box, in units of cells, touches a cell; at least one."""
    x0, y0, x1, y1 = (side[:, None] for side in boxes_N4.clamp(min=0).unbind(dim=1))
    x0, y0 = x0.clamp(max=columns - 1), y0.clamp(max=rows - 1)
    x, y = torch.arange(columns, device=boxes_N4.device), torch.arange(rows, device=boxes_N4.device)
    inside_x, inside_y = (x <= x1.maximum(x0)) & (x + 1 > x0), (y <= y1.maximum(y0)) & (y + 1 > y0)
    return (inside_y[:, :, None] & inside_x[:, None, :]).flatten(1).float()
