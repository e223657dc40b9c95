"""Which parameters each stage trains: the patterns of params/ against sets written out here, and the README's table."""

import re
from pathlib import Path

import pytest
import yaml
from small_model import small_model
from torch import nn

from lyrics.errors import InputError
from lyrics.train.trainable import train_only

ROOT = Path(__file__).parents[2]
PRESETS = ("tiny", "laptop", "paper")
# Parts of MQ-Former by their first name.
BODY = {
    "visual_queries", "grounding_queries", "word_embeddings", "position_embeddings", "embedding_norm", "image_norm",
    "local_tokens", "layers",
}  # fmt: skip
HEADS = {"text_head", "image_projection", "text_projection", "matching_head", "temperature"}
LLM = "llm.base_model.model.model.layers"
ADAPTER = {
    f"{LLM}.{layer}.self_attn.{product}_proj.lora_{factor}.default.weight"
    for layer in (0, 1)
    for product in "qv"
    for factor in "AB"
}


def patterns(stage: str, preset: str) -> list[str]:
    return yaml.safe_load((ROOT / f"params/{stage}/{preset}.yaml").read_text())["trainable"]


def trained_in_stage1(preset: str) -> tuple[set[str], set[str]]:
    """Names that train, and all names."""
    mq_former = small_model().mq_former
    found = train_only(mq_former, patterns("stage1", preset), "stage1.trainable")
    assert {name for name, p in mq_former.named_parameters() if p.requires_grad} == set(found)
    return set(found), {name for name, _ in mq_former.named_parameters()}


def trained_in_stage2(preset: str) -> tuple[set[str], set[str]]:
    model = small_model()
    found = train_only(model, patterns("stage2", preset), "stage2.trainable")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(found)
    return set(found), {name for name, _ in model.named_parameters()}


def of_parts(names: set[str], parts: set[str], prefix: str = "") -> set[str]:
    return {name for name in names if name.removeprefix(prefix).split(".")[0] in parts and name.startswith(prefix)}


@pytest.mark.parametrize("preset", PRESETS)
def test_stage_1_trains_the_whole_mq_former(preset: str) -> None:
    trained, names = trained_in_stage1(preset)
    assert trained == names
    assert {name.split(".")[0] for name in names} == BODY | HEADS


@pytest.mark.parametrize("preset", PRESETS)
def test_stage_2_trains_mq_formers_body_projection_and_adapter_alone(preset: str) -> None:
    trained, names = trained_in_stage2(preset)
    projection = {"projection.linear.weight", "projection.linear.bias"}
    assert trained == of_parts(names, BODY, "mq_former.") | projection | ADAPTER


def test_a_pattern_that_matches_nothing_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"stage1.trainable has 'layer.\*', which matches no .* 0, 1\. Correct it"):
        train_only(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ["0.*", "layer.*"], "stage1.trainable")


def test_what_was_trainable_and_matches_nothing_is_frozen_and_the_other_way_round() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    net[1].requires_grad_(False)
    assert list(train_only(net, ["1.*"], "x")) == ["1.weight", "1.bias"]
    assert not net[0].weight.requires_grad and net[1].weight.requires_grad


def test_the_freeze_table_of_the_readme_says_what_the_patterns_say() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "README.md")
        .read_text()
        .partition("Which part trains when")[2]
        .split("\n\n")[1]
        .splitlines()
    ]
    stage1, names1 = trained_in_stage1("tiny")
    stage2, names2 = trained_in_stage2("tiny")
    prefixed1, all1 = ({f"mq_former.{name}" for name in names} for names in (stage1, names1))
    parts = {
        "MQ-Former: queries, layers, local-token embeddings": of_parts(names2, BODY, "mq_former."),
        "MQ-Former: contrastive, matching and text heads, temperature": of_parts(names2, HEADS, "mq_former."),
        "projection": of_parts(names2, {"projection"}),
        "language model": {n for n in of_parts(names2, {"llm"}) if "lora_" not in n},
        "LoRA adapter": {n for n in names2 if "lora_" in n},
    }
    assert set.union(*parts.values()) == names2

    def says(part: set[str], trained: set[str], present: set[str]) -> str:
        assert part <= trained or not part & trained
        if not part & present:
            return "–"
        return "**trained**" if part <= trained else "frozen"

    table = {row[0]: row[2:] for row in rows[2:]}
    for label, part in parts.items():
        expected = [says(part, prefixed1, all1), says(part, stage2, names2)]
        assert [re.sub(r",.*", "", cell) for cell in table.pop(label)] == expected, label
    assert set(map(tuple, table.values())) == {("frozen", "frozen")}  # what only computes features
