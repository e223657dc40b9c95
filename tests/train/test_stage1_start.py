"""Stage 1 starts from the foundation's BERT where it has one."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from lyrics import config
from lyrics.train.stage1 import new_mq_former

SIZES = config.MQFormer(
    visual_queries=2, grounding_queries=2, hidden_size=16, layers=2, heads=2, intermediate_size=24,
    cross_attention_every=2, max_text_tokens=12, dropout=0.0, projection_size=5, detector_tokens=True,
    segmenter_tokens=True, grounding="pooled",
)  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("models/foundation/tokenizer", "data/refined"):
        (tmp_path / folder).mkdir(parents=True)
    widths = {"image_width": 8, "detector_width": 6, "segmenter_width": 4}
    (tmp_path / "data/refined/summary.json").write_text(json.dumps(widths))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings() -> Any:
    return SimpleNamespace(
        seed=3, mq_former=SIZES, refine=SimpleNamespace(max_objects=4), stage1=SimpleNamespace(temperature=0.1)
    )


TOKENIZER: Any = SimpleNamespace(tokenizer=range(20), pad=0)


def test_a_fitted_tokenizer_starts_a_new_mq_former_by_the_seed(project: Path) -> None:
    first, second = (new_mq_former(settings(), TOKENIZER).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["temperature"] == pytest.approx(0.1)


def test_a_berts_tokenizer_starts_from_its_weights(project: Path) -> None:
    bert = BertModel(
        BertConfig(
            vocab_size=19, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=12,
        )
    )  # fmt: skip
    new = new_mq_former(settings(), TOKENIZER).state_dict()
    save_file(bert.state_dict(), project / "models/foundation/tokenizer/model.safetensors")
    mq_former = new_mq_former(settings(), TOKENIZER)
    assert dataclasses.asdict(SIZES).items() <= dataclasses.asdict(mq_former.config).items()
    filled = "layers.1.query_feed_forward.outer.weight"
    assert torch.equal(mq_former.get_parameter(filled), bert.encoder.layer[1].output.dense.weight)
    assert torch.equal(mq_former.grounding_queries, new["grounding_queries"])
