"""Reading models of transformers: what is missing is an error, what lies beside is not worth a word."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from lyrics.errors import InputError
from lyrics.model import pretrained

SIZE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    vision = {**SIZE, "image_size": 8, "patch_size": 4}
    tokens = {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    text = {**SIZE, **tokens, "max_position_embeddings": 4}
    pretrained.write(CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=4)), tmp_path)
    return tmp_path


def test_one_tower_is_read_from_both_without_noise(clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    model = pretrained.read(CLIPVisionModel, clip)
    expected = load_file(clip / "model.safetensors")["vision_model.post_layernorm.weight"]
    (found,) = (p for name, p in model.named_parameters() if name.endswith("post_layernorm.weight"))
    assert found.equal(expected)
    assert capfd.readouterr().err == ""


def test_missing_weights_are_refused_by_name(clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    del weights["vision_model.post_layernorm.weight"]
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of CLIPVisionModel, the first is .*post_layernorm.weight"):
        pretrained.read(CLIPVisionModel, clip)
