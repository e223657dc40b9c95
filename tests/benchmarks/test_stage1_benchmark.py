"""The peer of the benchmark is the same computation, and the table lands where it belongs."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.peer import Captioning, Peer, copy_weights, peer_name
from benchmarks.stage1 import Measured, count_flops, table
from benchmarks.stage1_programs import OURS, PEERS, Program, mq_former_config, our_losses, random_batch, text_tokenizer
from benchmarks.table import write_table
from lyrics.errors import InputError
from lyrics.model.mq_former import MQFormer
from lyrics.train.stage1 import Objectives
from lyrics.train.stage1_batches import Stage1Batch

CONFIG = dataclasses.replace(
    mq_former_config("tiny"),
    visual_queries=3,
    hidden_size=24,
    layers=3,
    heads=2,
    intermediate_size=40,
    projection_size=8,
    vocabulary_size=60,
    image_width=10,
    dropout=0.0,
)
PAIRS, PATCHES = 5, 7


def both() -> tuple[Objectives, Peer, Stage1Batch]:
    torch.manual_seed(0)
    tokenizer = text_tokenizer(CONFIG.vocabulary_size)
    mq_former = MQFormer(CONFIG)
    # Away from their first values, where an exchanged norm or bias would not show.
    for parameter in mq_former.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
    mq_former.temperature.data.fill_(0.1)
    objectives = Objectives(mq_former, tokenizer, itc_cross_query=True, smoothing=0.1)
    peer = Peer(CONFIG, tokenizer, smoothing=0.1)
    copy_weights(mq_former, peer)
    batch = random_batch(CONFIG, tokenizer, PAIRS, PATCHES)
    return objectives, peer, batch


@pytest.mark.parametrize("text_tokens", [None, 32])
@pytest.mark.parametrize("captioning", ["kept", "again"])
def test_the_peer_has_our_losses_and_gradients(text_tokens: int | None, captioning: Captioning) -> None:
    objectives, peer, batch = both()
    ours = our_losses(objectives, batch)
    theirs = peer(
        batch.visual.image_tokens_BPD,
        batch.caption_rows,
        batch.uniform_B2,
        text_tokens=text_tokens,
        captioning=captioning,
    )
    assert ours.keys() == theirs.keys()
    for loss in ours:
        assert theirs[loss].item() == pytest.approx(ours[loss].item(), abs=1e-5), loss
        compare_gradients(objectives, ours[loss], peer, theirs[loss])


def compare_gradients(objectives: Objectives, our_loss: torch.Tensor, peer: Peer, peer_loss: torch.Tensor) -> None:
    places = dict(peer.named_parameters())
    parameters = dict(objectives.mq_former.named_parameters())
    ours = gradients(our_loss, parameters)
    theirs = gradients(peer_loss, places)
    assert sum(bool(gradient.any()) for gradient in ours.values()) > 20
    for name, gradient in ours.items():
        place = peer_name(name)
        expected = torch.zeros_like(gradient) if place is None else theirs.pop(place)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert not theirs


def gradients(loss: torch.Tensor, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(
        loss, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, found, strict=True))


def test_flops_of_attention_are_counted() -> None:
    """Of queries alone: linear layers and attention, forward, and twice as much backward."""
    query, key, value = (torch.randn(2, 3, 4, 8, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    program = Program("attention", torch.nn.Identity(), lambda: {"loss": attend(query, key, value).sum()}, [], False)
    products = 2 * (2 * 3 * 4 * 4 * 8) * 2  # scores and mixture; a product of m × k and k × n is 2 m k n
    assert count_flops(program, "fp32") == 3 * products


def test_a_row_of_the_table_by_hand() -> None:
    """32 pairs: 2 s at 8 GFLOP against 1 s; a machine of 16 GFLOP/s."""
    peer = next(iter(PEERS))
    ours = Measured("tiny", OURS, [1.0, 1.0, 4.0], 4 * 10**9, 2**20)
    text = table([ours, Measured("tiny", peer, [2.0, 2.0, 9.0], 8 * 10**9, 2**21)], peak=16e9)
    assert text.splitlines()[2] == "| tiny | ours | 32.00 |  | 4.0 | 128.00 | 25% | 1 |"
    assert text.splitlines()[3] == f"| tiny | {peer} | 16.00 | 2.00 × | 8.0 | 64.00 | 25% | 2 |"


def test_a_table_replaces_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("before\n<!-- one -->\nold\n<!-- /one -->\nbetween\n<!-- two -->\n<!-- /two -->\n")
    write_table(document, "one", "| new |")
    assert (
        document.read_text() == "before\n<!-- one -->\n| new |\n<!-- /one -->\nbetween\n<!-- two -->\n<!-- /two -->\n"
    )
    with pytest.raises(InputError, match=r"must hold <!-- three --> and, after it, <!-- /three -->"):
        write_table(document, "three", "")
