"""Recorded attention weights against what MQ-Former's own attention gives."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from test_mq_former import model, pictures
from torch import Tensor, nn

from lyrics.model.attention_maps import Recording, attention_weights, by_object, hiding_objects, recording
from lyrics.model.mq_former import MQFormer

IDS_BT = torch.tensor([[2, 5, 6, 7], [2, 8, 3, 0]])
TEXT_BT = IDS_BT != 0
OBJECTS_BN = torch.tensor([[True, True, True], [True, False, False]])


def record(mq_former: MQFormer, objective: str = "instruction") -> tuple[Recording, dict[str, Tensor], Tensor]:
    """A pass, what each `value` and `out` projection of its attention saw and gave, and the queries' outputs."""
    image_BPD, local = pictures()
    passed: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        return lambda _module, inputs, output: passed.update({name: inputs[0] if name.endswith("out") else output})

    for name, module in mq_former.named_modules():
        if "attention" in name and ("value" in name or name.endswith("out")) and isinstance(module, nn.Linear):
            module.register_forward_hook(keep(name))
    with recording(mq_former) as maps, torch.no_grad():
        memory = mq_former.look(image_BPD, dataclasses.replace(local, object_mask_BN=OBJECTS_BN))
        outputs = mq_former(objective, memory, IDS_BT, TEXT_BT)
    return maps, passed, torch.cat(outputs, dim=1)


def attended(weights_BHQL: Tensor, value_BLD: Tensor) -> Tensor:
    value_BHLd = value_BLD.unflatten(-1, (weights_BHQL.shape[1], -1)).transpose(1, 2)
    return (weights_BHQL @ value_BHLd).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("changes", [{}, {"visual_queries": 0}, {"grounding_queries": 0}, {"layers": 4}])
@pytest.mark.parametrize("objective", ["instruction", "captioning", "contrastive"])
def test_recorded_weights_give_the_modules_own_outputs(objective: str, changes: dict) -> None:
    mq_former = model(**changes)
    maps, passed, _ = record(mq_former, objective)
    assert maps.cross_layers == list(range(0, mq_former.config.layers, 2))
    for layer in range(mq_former.config.layers):
        name = f"layers.{layer}.attention"
        weights_BHSS = maps.self_attention(layer)
        torch.testing.assert_close(weights_BHSS.sum(-1), torch.ones(weights_BHSS.shape[:-1]))
        own = passed[f"{name}.out"]
        torch.testing.assert_close(attended(weights_BHSS, passed[f"{name}.value"]), own, atol=1e-5, rtol=0)
    for layer in maps.cross_layers:
        name = f"layers.{layer}.cross_attention"
        kinds = maps.cross_attention(layer)
        assert list(kinds) == list(mq_former.counts)
        for weights_BHQL in kinds.values():
            torch.testing.assert_close(weights_BHQL.sum(-1), torch.ones(weights_BHQL.shape[:-1]))
        parts = [
            (weights @ maps.memory.layers[layer][kind].value).transpose(1, 2).flatten(2)
            for kind, weights in kinds.items()
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), passed[f"{name}.out"], atol=1e-5, rtol=0)


def test_what_is_masked_gets_exactly_nothing() -> None:
    maps, _, _ = record(model())
    weights_BHGL = maps.cross_attention(0)["grounding"]
    absent_BL = torch.cat([torch.zeros(2, 1, dtype=torch.bool), ~OBJECTS_BN, ~OBJECTS_BN], dim=1)
    assert (weights_BHGL.movedim(-1, 1)[absent_BL] == 0).all()
    assert (weights_BHGL.movedim(-1, 1)[~absent_BL] > 0).all()
    assert (maps.self_attention(0)[1, :, :-1, -1] == 0).all()  # padding, which is seen by itself alone
    assert torch.equal(maps.text_ids_BT, IDS_BT)


def test_recording_changes_nothing_and_leaves_no_hook() -> None:
    mq_former = model()
    image_BPD, local = pictures()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in mq_former.modules()]
    own = mq_former("instruction", mq_former.look(image_BPD, local), IDS_BT, TEXT_BT)[0]
    with pytest.raises(RuntimeError, match="inside"), recording(mq_former):
        memory = mq_former.look(image_BPD, local)
        assert torch.equal(mq_former("instruction", memory, text_ids_PT=IDS_BT, text_mask_PT=TEXT_BT)[0], own)
        raise RuntimeError("inside")
    with hiding_objects(mq_former, torch.zeros(2, 3, dtype=torch.bool)):
        assert torch.equal(mq_former("instruction", mq_former.look(image_BPD, local), IDS_BT, TEXT_BT)[0], own)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in mq_former.modules()]


def test_hidden_objects_are_as_good_as_absent() -> None:
    mq_former = model()
    image_BPD, local = pictures()
    fewer = dataclasses.replace(local, object_mask_BN=OBJECTS_BN)
    expected = mq_former("instruction", mq_former.look(image_BPD, fewer), IDS_BT, TEXT_BT)[0]
    with hiding_objects(mq_former, ~OBJECTS_BN):
        hidden = mq_former("instruction", mq_former.look(image_BPD, local), IDS_BT, TEXT_BT)[0]
    assert torch.equal(hidden, expected)
    shown = mq_former("instruction", mq_former.look(image_BPD, local), IDS_BT, TEXT_BT)[0]
    assert not torch.allclose(hidden, shown, atol=1e-4)


def test_an_objects_tokens_are_summed_over_sources() -> None:
    weights_QL = torch.tensor([[0.1, 0.2, 0.3, 0.0, 0.25, 0.15, 0.0]])  # nothing, detector × 3, segmenter × 3
    torch.testing.assert_close(by_object(weights_QL, sources=2, objects=2), torch.tensor([[0.1, 0.45, 0.45]]))
    torch.testing.assert_close(by_object(weights_QL[:, :4], sources=1, objects=3), weights_QL[:, :4])
    torch.testing.assert_close(by_object(weights_QL[:, :1], sources=0, objects=2), torch.tensor([[0.1, 0, 0]]))
    assert by_object(weights_QL[:, :3], sources=2, objects=0).shape == (1, 1)


def test_two_keys_by_hand() -> None:
    query_112, key_122 = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[2.0, 5.0], [0.0, 1.0]]])
    scores = torch.tensor([2.0 * 2.0 / 2**0.5, 0.0])
    found = attention_weights(query_112[None], key_122[None])
    torch.testing.assert_close(found[0, 0, 0], scores.softmax(0))
