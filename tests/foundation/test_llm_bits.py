"""The frozen language model in fewer bits, and where it is refused."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lyrics.errors import InputError
from lyrics.foundation import llm
from lyrics.foundation.tokenizer import train_wordpiece

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_wordpiece(["Where is the cup?"], 200).save(str(tmp_path / "tokenizer.json"))
    tokenizer = llm.add_text_ends(tmp_path)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    llm.save(tmp_path / "out", model, tokenizer, ROOT / "params/templates/llama.jinja")
    return tmp_path / "out"


@pytest.mark.parametrize(("bits", "dtype"), [(None, torch.float32), (16, torch.bfloat16)])
def test_sixteen_bits_are_bf16_and_none_leaves_them_as_they_are(folder: Path, bits: int, dtype: torch.dtype) -> None:
    model, _ = llm.load_llm(folder, bits=bits)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_need_cuda_and_then_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=rf"llm_bits is {bits}, which needs CUDA, and this machine has none; set it"):
        llm.load_llm(folder, bits=bits)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"llm_bits is {bits}, which needs the package bitsandbytes.*pip install"):
        llm.load_llm(folder, bits=bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_transformers_is_told_what_to_load(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    options = llm._quantised(bits)
    assert options["device_map"] == {"": 0}
    assert (options["quantization_config"].load_in_8bit, options["quantization_config"].load_in_4bit) == (
        bits == 8,
        bits == 4,
    )
