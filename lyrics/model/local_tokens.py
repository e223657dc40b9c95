"""Local visual features: the refiner's objects as a token sequence for the grounding queries (paper section 1).

Shapes: B batch, N objects, K tokens of a tag, L local tokens = 1 + N for each source, D hidden width.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lyrics.errors import InputError

NOTHING, PADDING = -1, -2  # what stands for an object's number where there is none
BOX_FEATURES = 6  # corners, width, height


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalFeatures:
    """What the refiner saw in a batch. Hidden tags and boxes are those that masked spatial prediction asks for."""

    detector_BND: Tensor
    segmenter_BND: Tensor
    tag_ids_BNK: Tensor
    boxes_BN4: Tensor
    object_mask_BN: Tensor
    hidden_tag_BN: Tensor | None = None
    hidden_box_BN: Tensor | None = None

    def index(self, rows_B: Tensor) -> "LocalFeatures":
        return self._each(lambda tensor: tensor[rows_B])

    def to(self, device: torch.device) -> "LocalFeatures":
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "LocalFeatures":
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: change(x) for name, x in given.items() if x is not None})


class LocalTokens(nn.Module):
    """Each object becomes one token per source; a learned "nothing" token comes first, so that no row is empty.

    Every token is its source's normalised feature plus the embeddings of tag text, box, rank and source.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        source_widths: dict[str, int],
        max_objects: int,
        word_embeddings: nn.Embedding,
        pad_token_id: int,
    ) -> None:
        super().__init__()
        self.pad_token_id = pad_token_id
        self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in source_widths.items()})
        self.project = nn.ModuleDict({name: nn.Linear(width, hidden_size) for name, width in source_widths.items()})
        self.source = nn.ParameterDict({name: nn.Parameter(torch.zeros(hidden_size)) for name in source_widths})
        self.tag_norm = nn.LayerNorm(hidden_size)
        self.tag = nn.Linear(hidden_size, hidden_size)
        self.box = nn.Sequential(
            nn.Linear(BOX_FEATURES, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),
        )
        self.rank = nn.Embedding(max_objects, hidden_size)
        self.hidden_tag = nn.Parameter(torch.zeros(hidden_size))
        self.hidden_box = nn.Parameter(torch.zeros(hidden_size))
        self.nothing = nn.Parameter(torch.zeros(hidden_size))
        self.out_norm = nn.LayerNorm(hidden_size)
        # Features, tag, box and rank start at about the same size: none drowns the others.
        for embedding in (*self.source.values(), self.rank.weight, self.hidden_tag, self.hidden_box, self.nothing):
            nn.init.normal_(embedding, std=0.5)
        self._words = [word_embeddings]  # shared with the text side, owned there: a list keeps it unregistered here

    def forward(self, local: LocalFeatures) -> tuple[Tensor, Tensor]:
        """Return tokens_BLD and object_BL: which object each tells of, from 0, NOTHING or PADDING.

        Raises:
            InputError: there are more objects than ranks.
        """
        if (objects := local.boxes_BN4.shape[1]) > self.rank.num_embeddings:
            raise InputError(
                f"{objects} objects of a picture were given, and MQ-Former has ranks for max_objects = "
                f"{self.rank.num_embeddings}; keep the first of them, or raise refine.max_objects and train again"
            )
        about_BND = self._about_objects(local)
        batch = len(about_BND)
        tokens = [self.nothing.expand(batch, 1, -1)]
        features = {"detector": local.detector_BND, "segmenter": local.segmenter_BND}
        for name in self.norm:
            projected_BND = self.project[name](self.norm[name](features[name].to(about_BND.dtype)))
            tokens.append(projected_BND + about_BND + self.source[name])
        number_N = torch.arange(objects, device=about_BND.device)
        number_BN = torch.where(local.object_mask_BN, number_N, PADDING)
        object_BL = torch.cat([number_BN.new_full((batch, 1), NOTHING), *[number_BN] * len(self.norm)], dim=1)
        return self.out_norm(torch.cat(tokens, dim=1)), object_BL

    def _about_objects(self, local: LocalFeatures) -> Tensor:
        words_BNK = local.tag_ids_BNK
        valid_BNK1 = (words_BNK != self.pad_token_id).unsqueeze(-1)
        embedded_BNKD = self._words[0](words_BNK) * valid_BNK1
        tag_BND = self.tag(self.tag_norm(embedded_BNKD.sum(2) / valid_BNK1.sum(2).clamp(min=1)))
        size_BN2 = local.boxes_BN4[..., 2:] - local.boxes_BN4[..., :2]
        box_BND = self.box(torch.cat([local.boxes_BN4, size_BN2], dim=-1).to(tag_BND.dtype))
        if local.hidden_tag_BN is not None:
            tag_BND = torch.where(local.hidden_tag_BN.unsqueeze(-1), self.hidden_tag.to(tag_BND.dtype), tag_BND)
        if local.hidden_box_BN is not None:
            box_BND = torch.where(local.hidden_box_BN.unsqueeze(-1), self.hidden_box.to(box_BND.dtype), box_BND)
        ranks_N = torch.arange(words_BNK.shape[1], device=words_BNK.device)
        return tag_BND + box_BND + self.rank(ranks_N)
