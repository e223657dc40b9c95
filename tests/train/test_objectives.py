"""The four objectives on a real batch, each against a slow computation: one picture, one text, one token at a time."""

import contextlib
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import small_project
import torch
from torch import Tensor

from lyrics.foundation.tokenizer import load_text_tokenizer
from lyrics.model.inputs import TextTokenizer
from lyrics.model.mq_former import MQFormer
from lyrics.train import losses, stage1
from lyrics.train.objectives import Objectives
from lyrics.train.stage1_batches import Stage1Batch, Stage1Data

SMOOTHING, STEP = 0.1, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Stage1Data:
    config = small_project.configuration()
    with contextlib.chdir(tmp_path_factory.mktemp("project")):
        small_project.make(Path.cwd(), config)
        tokenizer = TextTokenizer(load_text_tokenizer(stage1.FOUNDATION / "tokenizer"))
        found = stage1.stage1_data(config, tokenizer, stage1.open_splits(("web",), config, torch.device("cpu")))
        yield found


@pytest.fixture(scope="module")
def objectives(data: Stage1Data) -> Objectives:
    mq_former = stage1.new_mq_former(small_project.configuration(), data.tokenizer).eval()
    torch.manual_seed(0)
    for name, parameter in mq_former.named_parameters():
        if name != "temperature":  # away from the start, where all pictures look alike
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.15)
    return Objectives(mq_former, data.tokenizer, itc_cross_query=True, smoothing=SMOOTHING)


@pytest.fixture
def batch(data: Stage1Data) -> Stage1Batch:
    """Ten pictures with none to three objects; three without any share their captions."""
    return data.batch(range(len(data)), STEP)


def look_at_one(objectives: Objectives, batch: Stage1Batch, row: int):
    one = torch.tensor([row])
    return objectives.mq_former.look(batch.visual.image_tokens_BPD[one], batch.visual.local.index(one))


def encode(objectives: Objectives, ids: list[int]) -> Tensor:
    t = objectives.tokenizer
    _, text = objectives.mq_former("contrastive", None, torch.tensor([[t.cls, *ids, t.sep]]))
    return objectives.mq_former.text_projection(text[0, 0])


def slow_contrastive(similarity: list[list[float]], same: Tensor, temperature: float) -> float:
    """InfoNCE both ways by hand; pairs that share picture or text are left out, but for the pair itself."""
    count, total = len(similarity), 0.0
    for i in range(count):
        for value in (lambda j, i=i: similarity[i][j], lambda j, i=i: similarity[j][i]):
            others = [j for j in range(count) if j == i or not same[i, j]]
            norm = math.log(sum(math.exp(value(j) / temperature) for j in others))
            log_p = {j: value(j) / temperature - norm for j in others}
            total -= (1 - SMOOTHING) * log_p[i] + SMOOTHING * sum(log_p.values()) / len(others)
    return total / 2 / count


@pytest.mark.parametrize("kind", ["itc_loss", "itc_spatial_loss"])
@torch.no_grad()
def test_itc_of_captions_by_visual_and_of_spatial_texts_by_grounding_queries(
    objectives: Objectives, batch: Stage1Batch, kind: str
) -> None:
    visual, mq_former = kind == "itc_loss", objectives.mq_former
    rows = batch.caption_rows if visual else batch.spatial_rows
    similarity = []
    for i in range(len(batch.ids)):
        query, _ = mq_former("contrastive", look_at_one(objectives, batch, i))
        own = query[0, : mq_former.config.visual_queries] if visual else query[0, mq_former.config.visual_queries :]
        projected = mq_former.image_projection(own)
        similarity.append(
            [max(float(torch.cosine_similarity(q, encode(objectives, row), dim=0)) for q in projected) for row in rows]
        )
    same = batch.same_caption_BB if visual else batch.same_spatial_BB
    assert same.sum() > len(same)  # some are left out
    expected = slow_contrastive(similarity, same, float(objectives.temperature))
    assert float(objectives(batch)[kind]) == pytest.approx(expected, abs=1e-4)


def similarities(objectives: Objectives, batch: Stage1Batch) -> tuple[Tensor, Tensor]:
    looked = objectives.look(batch)
    query, caption, _ = objectives.contrastive_features(batch, looked)
    similarity = losses.query_text_similarity(objectives.mq_former.split_queries(query)[0], caption)
    return similarity, similarity.T


@torch.no_grad()
def test_itm_of_each_pair_and_of_a_hard_negative_each_way(objectives: Objectives, batch: Stage1Batch) -> None:
    t, mq_former = objectives.tokenizer, objectives.mq_former
    pairs = [(i, i) for i in range(len(batch.ids))]
    for way, similarity in enumerate(similarities(objectives, batch)):
        for i in range(len(batch.ids)):
            others = [j for j in range(len(batch.ids)) if not batch.same_caption_BB[i, j]]
            weights = np.exp(np.array([float(similarity[i, j]) for j in others]) / float(objectives.temperature))
            edges = np.cumsum(weights / weights.sum())
            drawn = others[min(int(np.searchsorted(edges, float(batch.uniform_B2[i, way]))), len(others) - 1)]
            pairs.append((i, drawn) if way == 0 else (drawn, i))
    total = 0.0
    for picture, caption in pairs:
        ids = [t.cls, *batch.caption_rows[caption], t.sep, *batch.spatial_rows[picture], t.sep]
        query, _ = mq_former("matching", look_at_one(objectives, batch, picture), torch.tensor([ids]))
        log_p = mq_former.matching_head(query[0]).mean(0).log_softmax(-1)
        total -= float(log_p[int(picture == caption)])
    assert float(objectives(batch)["itm_loss"]) == pytest.approx(total / len(pairs), abs=1e-5)
    assert batch.totals["itm_loss"] == len(pairs)


@torch.no_grad()
def test_pairs_are_split_by_length_where_it_spares_padding_and_the_loss_is_the_same(
    objectives: Objectives, batch: Stage1Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    similar, plain = similarities(objectives, batch), objectives.mq_former.forward
    calls: list[str] = []
    monkeypatch.setattr(objectives.mq_former, "forward", lambda *a, **k: calls.append(a[0]) or plain(*a, **k))
    for longest, passes in ((0, 1), (40, 3)):
        texts = [[5] * (longest * (row == 0)) for row in range(len(batch.ids))]
        changed = dataclasses.replace(batch, spatial_rows=texts, caption_rows=[row[:2] for row in batch.caption_rows])
        looked = objectives.look(changed)
        calls.clear()
        loss = losses.matching_loss(*objectives.matching_logits(changed, looked, *similar))
        assert calls == ["matching"] * passes
        with monkeypatch.context() as patch:
            patch.setattr("lyrics.train.objectives.WORTH_PARTS", 0.0 if passes == 1 else 99.0)
            torch.testing.assert_close(
                losses.matching_loss(*objectives.matching_logits(changed, looked, *similar)), loss
            )


@torch.no_grad()
def test_no_negative_shares_picture_or_caption(objectives: Objectives, batch: Stage1Batch) -> None:
    ways = similarities(objectives, batch)
    for value in np.linspace(0, 0.999, 50):
        drawn = torch.full_like(batch.uniform_B2, value)
        for way in range(2):
            of = losses.hard_negatives(ways[way], objectives.temperature, batch.same_caption_BB, drawn[:, way])
            assert not batch.same_caption_BB[torch.arange(len(of)), of].any()


@torch.no_grad()
def test_icg_predicts_each_token_from_the_picture_and_the_tokens_before_it(
    objectives: Objectives, batch: Stage1Batch
) -> None:
    t, mq_former, total, count = objectives.tokenizer, objectives.mq_former, 0.0, 0
    for row, caption in enumerate(batch.caption_rows):
        memory = look_at_one(objectives, batch, row)
        for end, expected in enumerate([*caption, t.sep]):
            _, text = mq_former("captioning", memory, torch.tensor([[t.dec, *caption[:end]]]))
            total -= float(mq_former.text_logits(text[:, -1]).log_softmax(-1)[0, expected])
            count += 1
    assert float(objectives(batch)["icg_loss"]) == pytest.approx(total / count, abs=1e-5)


@torch.no_grad()
def test_msp_asks_for_what_is_masked_in_the_text(objectives: Objectives, batch: Stage1Batch) -> None:
    t, mq_former, total, count = objectives.tokenizer, objectives.mq_former, 0.0, 0
    for row, (ids, labels) in enumerate(zip(batch.msp_rows, batch.msp_labels, strict=True)):
        one = torch.tensor([row])
        local = dataclasses.replace(
            batch.visual.local.index(one),
            hidden_tag_BN=batch.hidden_tag_bN[one],
            hidden_box_BN=batch.hidden_box_bN[one],
        )
        memory = mq_former.look(batch.visual.image_tokens_BPD[one], local)
        _, text = mq_former("masked_spatial", memory, torch.tensor([[t.cls, *ids, t.sep]]))
        log_p = mq_former.text_logits(text[0, 1:-1]).log_softmax(-1)
        for place, label in enumerate(labels):
            assert (label == losses.IGNORED) == (ids[place] != t.mask)
            if label != losses.IGNORED:
                total -= float(log_p[place, label])
                count += 1
    assert count == batch.totals["msp_loss"] > 10
    assert float(objectives(batch)["msp_loss"]) == pytest.approx(total / count, abs=1e-5)


def msp_logits(objectives: Objectives, batch: Stage1Batch, **local: Tensor) -> Tensor:
    changed = dataclasses.replace(batch.visual, local=dataclasses.replace(batch.visual.local, **local))
    other = dataclasses.replace(batch, visual=changed)
    return objectives.masked_spatial_logits(other, objectives.look(other))[0]


@torch.no_grad()
def test_what_msp_asks_for_is_nowhere_in_its_input(objectives: Objectives, batch: Stage1Batch) -> None:
    """A hidden tag or box may be anything; one that is not hidden, and the features, may not."""
    local, expected = batch.visual.local, msp_logits(objectives, batch)
    tags, boxes = local.tag_ids_BNK, local.boxes_BN4
    hidden_tag, hidden_box = batch.hidden_tag_bN[..., None], batch.hidden_box_bN[..., None]
    assert hidden_tag.any() and hidden_box.any()
    assert torch.equal(msp_logits(objectives, batch, tag_ids_BNK=torch.where(hidden_tag, tags.flip(0), tags)), expected)
    assert torch.equal(msp_logits(objectives, batch, boxes_BN4=torch.where(hidden_box, 1 - boxes, boxes)), expected)
    for change in (
        {"tag_ids_BNK": torch.where(hidden_tag, tags, tags.flip(0))},
        {"boxes_BN4": torch.where(hidden_box, boxes, 1 - boxes)},
        {"detector_BND": local.detector_BND.flip(0)},
    ):
        assert not torch.allclose(msp_logits(objectives, batch, **change), expected, atol=1e-3)


@torch.no_grad()
def test_a_picture_is_projected_and_its_queries_encoded_once(
    objectives: Objectives, batch: Stage1Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For four objectives and three pairs of each picture; only MSP projects the local tokens again, some hidden."""
    cross = [layer.cross_attention for layer in objectives.mq_former.layers if layer.cross_attention is not None]
    projected: list[str] = []
    encoded: list[int] = []
    remember, encode_queries = type(cross[0]).remember, MQFormer.encode_queries
    monkeypatch.setattr(
        type(cross[0]), "remember", lambda self, sources: projected.extend(sources) or remember(self, sources)
    )
    monkeypatch.setattr(
        MQFormer, "encode_queries", lambda self, *a, **k: encoded.append(1) or encode_queries(self, *a, **k)
    )
    looked: list[int] = []
    hooks = [module.register_forward_hook(lambda *_: looked.append(1)) for module in cross]
    objectives(batch)
    for hook in hooks:
        hook.remove()
    # Alone, beside ITM's three groups of texts and beside MSP's: captions only look back at what was encoded.
    assert len(looked) == 5 * len(cross)
    assert sorted(projected) == ["grounding"] * 2 * len(cross) + ["visual"] * len(cross)
    assert len(encoded) == 1


def test_chance_and_floor_are_those_of_a_model_that_knows_nothing_and_everything() -> None:
    levels = stage1._levels(pairs=8, smoothing=0.1, vocabulary_size=50)
    assert levels["chance"] == pytest.approx(
        {
            "stage1/itc_loss": math.log(8),
            "stage1/itc_spatial_loss": math.log(8),
            "stage1/itm_loss": 0.6365,
            "stage1/icg_loss": math.log(50),
            "stage1/msp_loss": math.log(50),
        },
        abs=1e-4,
    )
    assert levels["floor"].keys() == {"stage1/itc_loss", "stage1/itc_spatial_loss"}
    assert 0 < levels["floor"]["stage1/itc_loss"] < 0.6


@torch.no_grad()
def test_texts_longer_than_the_positions_are_cut_by_every_objective(objectives: Objectives, batch: Stage1Batch) -> None:
    limit = objectives.mq_former.config.max_text_tokens
    long = [(row or [7]) * limit for row in batch.spatial_rows]
    cut = dataclasses.replace(batch, spatial_rows=[row[: limit - 2] for row in long])
    found, expected = (objectives(b) for b in (dataclasses.replace(batch, spatial_rows=long), cut))
    assert found["itc_spatial_loss"] == expected["itc_spatial_loss"] and torch.isfinite(found["itm_loss"])


def test_a_temperature_that_overstepped_still_learns(objectives: Objectives, batch: Stage1Batch) -> None:
    temperature = objectives.mq_former.temperature
    before = temperature.detach().clone()
    try:
        with torch.no_grad():
            temperature.fill_(-0.2)
        objectives.bound_temperature()
        assert float(temperature.detach()) == pytest.approx(0.001)
        objectives(batch)["itc_loss"].backward()
        assert temperature.grad is not None and float(temperature.grad.abs()) > 0
    finally:
        objectives.zero_grad()
        with torch.no_grad():
            temperature.copy_(before)
