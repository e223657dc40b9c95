"""What LoRA promises: nothing at the start, W + scaling · B A when merged, and an adapter that plain peft reads."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from small_model import ANSWERS, PICTURES, QUESTIONS, llama, small_model, with_adapter

from lyrics.model.language import adapter_state, load_adapter, merge, save_adapter
from lyrics.model.lyrics import LyricsModel

IDS = torch.tensor([[6, 9, 10, 11]])
RANK, ALPHA = 2, 4  # of small_model


@pytest.fixture
def model() -> LyricsModel:
    return small_model()


def base_weights(model: LyricsModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.llm.named_parameters() if "lora_" not in name}


def train_one_step(model: LyricsModel) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.1)
    model(QUESTIONS, PICTURES, ANSWERS, [""] * 3).backward()
    optimizer.step()


@torch.no_grad()
def test_a_new_adapter_has_no_effect(model: LyricsModel) -> None:
    assert torch.equal(model.llm(IDS).logits, llama().eval()(IDS).logits)
    with_adapter(model)
    assert not torch.allclose(model.llm(IDS).logits, llama().eval()(IDS).logits)


def test_a_step_of_training_moves_the_adapter_and_not_a_bit_of_the_base(model: LyricsModel) -> None:
    before, logits = base_weights(model), model.llm(IDS).logits.detach()
    train_one_step(model)
    assert all(torch.equal(p, before[name]) for name, p in base_weights(model).items())
    assert not torch.allclose(model.llm(IDS).logits, logits)
    with model.llm.disable_adapter():
        assert torch.equal(model.llm(IDS).logits, llama().eval()(IDS).logits)


def test_merged_weights_are_w_plus_scaled_b_a_and_merging_again_changes_nothing(model: LyricsModel) -> None:
    with_adapter(model)
    before = base_weights(model)
    expected = {}
    for name, layer in model.llm.named_modules():
        if hasattr(layer, "lora_A"):
            b, a = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
            weight = f"{name}.base_layer.weight"
            expected[weight] = before[weight] + b @ a * (ALPHA / RANK)
    model.llm.merge_adapter()
    merged = base_weights(model)
    assert len(expected) == 4  # q and v of two layers
    for name, weight in merged.items():
        assert torch.equal(weight, expected.get(name, before[name])), name
        assert (name in expected) != torch.equal(weight, before[name]), name
    with pytest.warns(UserWarning, match="already merged"):
        model.llm.merge_adapter()
    assert all(torch.equal(weight, merged[name]) for name, weight in base_weights(model).items())
    with pytest.warns(UserWarning, match="already merged"):
        plain = merge(model.llm).state_dict()
    assert plain.keys() == llama().state_dict().keys()
    for name, weight in merged.items():
        assert torch.equal(weight, plain[name.removeprefix("base_model.model.").replace("base_layer.", "")]), name


@torch.no_grad()
def test_a_saved_adapter_loads_with_plain_peft_and_is_the_same_bytes(model: LyricsModel, tmp_path) -> None:
    with_adapter(model)
    save_adapter(tmp_path / "a", model.llm, adapter_state(model.llm))
    save_adapter(tmp_path / "b", model.llm, adapter_state(model.llm))
    expected = model.llm(IDS).logits
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path / "a").eval()(IDS).logits, expected)
    loaded: Any = load_adapter(tmp_path / "a", llama())
    assert loaded.state_dict().keys() == llama().state_dict().keys()
    torch.testing.assert_close(loaded.eval()(IDS).logits, expected)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@torch.no_grad()
def test_beside_weights_of_16_bits_the_adapter_keeps_its_own(model: LyricsModel, tmp_path) -> None:
    with_adapter(model)
    save_adapter(tmp_path, model.llm, adapter_state(model.llm))
    loaded = load_adapter(tmp_path, llama().to(torch.bfloat16))
    assert isinstance(loaded, PeftModel)
    assert adapter_state(loaded).keys() == adapter_state(model.llm).keys()
    for name, value in adapter_state(loaded).items():
        assert torch.equal(value.float(), adapter_state(model.llm)[name]), name
    assert loaded.eval()(IDS).logits.dtype == torch.bfloat16
