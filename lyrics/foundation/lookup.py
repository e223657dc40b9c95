"""How the small Llama starts: with attention that can look up. From random weights that takes thousands of steps.

Looking up a word of the context takes two layers (Olsson et al. 2022, "induction heads"): one head writes, at each
token, what the tokens before it were; a later head finds the place that matches and copies what stands there. Neither
helps without the other, so both come late. Here the first layer's heads start as looks one, two, three … tokens back,
and every later head starts as a copier of whatever it attends to (Trockman & Kolter 2023 start from such products);
where to attend is learned. All of it is ordinary weights of an ordinary Llama, and is trained on.

Shapes: D width, d width of a head.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_EMBEDDING_STD = 0.2  # of a size with what layers add, so that a token can be told from its neighbours early
_SHARPNESS = 3.0
_SLOWEST = 0.05  # radians a token: slower rotary frequencies hardly tell neighbours apart


@torch.no_grad()
def start_with_lookup(model: "LlamaForCausalLM") -> None:
    """Overwrite embeddings and attention; draws from torch's generator."""
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    embeddings: Any = model.get_input_embeddings().weight
    nn.init.normal_(embeddings, mean=_EMBEDDING_STD, std=_EMBEDDING_STD)  # the mean is a direction all tokens share
    frequencies = model.model.rotary_emb.inv_freq
    for number, layer in enumerate(model.model.layers):
        attention: Any = layer.self_attn
        for head in range(heads):
            rows = slice(head * width // heads, (head + 1) * width // heads)
            _project(attention, rows, back=number > 0)
            if number == 0:
                _look_back(attention, rows, head + 1, frequencies)


def _look_back(attention: Any, rows: slice, offset: int, frequencies: torch.Tensor) -> None:
    """Query and key read only what all tokens share; the rotation between them peaks at `offset` tokens back."""
    width = int(attention.q_proj.weight.shape[1])
    shared_D = torch.full((width,), 1 / math.sqrt(width))
    used = (frequencies > _SLOWEST).float()
    query_d = torch.cat([used * torch.cos(offset * frequencies), -used * torch.sin(offset * frequencies)])
    key_d = torch.cat([used, torch.zeros_like(used)])
    attention.q_proj.weight[rows] = _SHARPNESS * torch.outer(query_d, shared_D)
    attention.k_proj.weight[rows] = _SHARPNESS * torch.outer(key_d, shared_D)


def _project(attention: Any, rows: slice, back: bool) -> None:
    """Value and output as a projection and its transpose (`back`: what is attended to is copied), or two unlike ones.

    What stood before must not look like what stands here, so the first layer writes it elsewhere.
    """
    values_dD, outputs_Dd = attention.v_proj.weight[rows], attention.o_proj.weight[:, rows]
    projection = nn.init.orthogonal_(torch.empty_like(values_dD))
    attention.v_proj.weight[rows] = projection - projection.mean(1, keepdim=True)  # blind to what all tokens share
    attention.o_proj.weight[:, rows] = projection.T if back else nn.init.orthogonal_(torch.empty_like(outputs_Dd))
