"""MQ-Former without grounding queries is the Q-Former of BLIP-2 and InstructBLIP; what each checkpoint fills."""

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

import lyrics.model
from lyrics.errors import InputError
from lyrics.model import MQFormer, MQFormerConfig, mq_former
from lyrics.model.local_tokens import LocalFeatures
from lyrics.model.mq_former import PATTERNS, attention_mask
from lyrics.model.mq_former_weights import load_bert, load_qformer

CONFIG = MQFormerConfig(
    visual_queries=3, grounding_queries=0, hidden_size=16, layers=3, heads=2, intermediate_size=24,
    cross_attention_every=2, max_text_tokens=12, dropout=0.0, projection_size=5, detector_tokens=True,
    segmenter_tokens=True, grounding="pooled", vocabulary_size=20, pad_token_id=0, image_width=8, detector_width=6,
    segmenter_width=4, max_objects=4,
)  # fmt: skip
GROUNDED = dataclasses.replace(CONFIG, grounding_queries=2)
LOCAL = LocalFeatures(
    detector_BND=torch.zeros(2, 0, 6),
    segmenter_BND=torch.zeros(2, 0, 4),
    tag_ids_BNK=torch.zeros(2, 0, 1, dtype=torch.long),
    boxes_BN4=torch.zeros(2, 0, 4),
    object_mask_BN=torch.zeros(2, 0, dtype=torch.bool),
)
# Names of MQ-Former's parameters as LYRICS sorts them; `{i}` is a layer.
EMBEDDINGS = ["word_embeddings.weight", "position_embeddings.weight", "embedding_norm.weight", "embedding_norm.bias"]
ATTENTION = ["attention.query", "attention.key", "attention.value", "attention.out", "attention.norm"]
TEXT = ["text_feed_forward.inner", "text_feed_forward.outer", "text_feed_forward.norm"]
QUERY = ["query_feed_forward.inner", "query_feed_forward.outer", "query_feed_forward.norm"]
CROSS = ["query", "key.visual", "value.visual", "out", "norm"]
TEXT_HEAD = [f"text_head.{name}" for name in ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias")]
HEADS = {
    "query_tokens": {"visual_queries"},
    "vision_model.post_layernorm": {"image_norm.weight", "image_norm.bias"},
    "vision_projection": {"image_projection.weight", "image_projection.bias"},
    "text_projection": {"text_projection.weight", "text_projection.bias"},
    "itm_head": {"matching_head.weight", "matching_head.bias"},
}


def in_layers(parts: list[str], layers: range) -> set[str]:
    return {f"layers.{i}.{part}.{kind}" for i in layers for part in parts for kind in ("weight", "bias")}


def qformer_names(config: MQFormerConfig) -> set[str]:
    """What an InstructBLIP Q-Former has."""
    every = range(config.layers)
    crossed = range(0, config.layers, config.cross_attention_every)
    cross = in_layers([f"cross_attention.{part}" for part in CROSS], crossed)
    return {*EMBEDDINGS, *in_layers(ATTENTION + TEXT + QUERY, every), *cross}


def peer_sizes(config: MQFormerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_text_tokens,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def qformer_sizes(config: MQFormerConfig) -> dict[str, Any]:
    cross = {"encoder_hidden_size": config.image_width, "cross_attention_frequency": config.cross_attention_every}
    return peer_sizes(config) | cross


@torch.no_grad()
def scrambled(module: Any, seed: int = 0) -> Any:
    """Every parameter differs from every other: swapped norms and forgotten biases show."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()


def instructblip(config: MQFormerConfig = CONFIG, seed: int = 0) -> InstructBlipQFormerModel:
    return scrambled(InstructBlipQFormerModel(InstructBlipQFormerConfig(**qformer_sizes(config))), seed)


def text(lengths: list[int], vocabulary_size: int, padded_to: int = 0) -> tuple[Tensor, Tensor]:
    length = max(padded_to, *lengths)
    mask_BT = torch.arange(length) < torch.tensor(lengths)[:, None]
    return torch.randint(1, vocabulary_size, mask_BT.shape) * mask_BT, mask_BT


def largest_difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@torch.no_grad()
def check_against_instructblip(
    config: MQFormerConfig, objectives: list[str], ids_BT: Tensor, mask_BT: Tensor, patches: int, seed: int = 0
) -> None:
    """Queries with text, text alone and queries alone."""
    peer = instructblip(config, seed)
    ours = MQFormer.from_instructblip(peer.state_dict(), config).eval()
    scrambled(ours.image_norm, seed)
    batch, queries = len(ids_BT), config.visual_queries
    image_BPD = torch.randn(batch, patches, config.image_width)
    memory = ours.look(image_BPD, LOCAL.index(torch.zeros(batch, dtype=torch.long)))
    seen = {
        "query_embeds": ours.visual_queries.expand(batch, -1, -1),
        "encoder_hidden_states": ours.image_norm(image_BPD),
    }
    for objective in objectives:
        mask_B1SS = attention_mask(objective, visual=queries, grounding=0, text_mask_BT=mask_BT)
        expected = peer(ids_BT, attention_mask=mask_B1SS, **seen).last_hidden_state
        query_BQD, text_BTD = ours(objective, memory, ids_BT, mask_BT)
        assert largest_difference(torch.cat([query_BQD, text_BTD], dim=1), expected) < 1e-5, objective
        alone = peer(ids_BT, attention_mask=mask_B1SS[:, :, queries:, queries:]).last_hidden_state
        assert largest_difference(ours(objective, None, ids_BT, mask_BT)[1], alone) < 1e-5, objective
    unread = peer(None, **seen).last_hidden_state
    assert largest_difference(ours("contrastive", memory)[0], unread) < 1e-5


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([1, 2, 4]),
    head_width=st.sampled_from([2, 5, 8]),
    layers=st.integers(1, 4),
    every=st.integers(1, 3),
    queries=st.integers(1, 6),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    patches=st.integers(1, 7),
    eps=st.sampled_from([1e-12, 1e-5, 1e-2]),
    seed=st.integers(0, 99),
)
def test_outputs_equal_instructblip(
    heads: int,
    head_width: int,
    layers: int,
    every: int,
    queries: int,
    lengths: list[int],
    patches: int,
    eps: float,
    seed: int,
) -> None:
    config = dataclasses.replace(
        CONFIG, heads=heads, hidden_size=heads * head_width, layers=layers, cross_attention_every=every,
        visual_queries=queries, layer_norm_eps=eps,
    )  # fmt: skip
    check_against_instructblip(config, list(PATTERNS), *text(lengths, config.vocabulary_size), patches, seed)


def test_outputs_equal_instructblip_at_paper_size() -> None:
    config = dataclasses.replace(
        CONFIG, hidden_size=768, layers=12, heads=12, intermediate_size=3072, visual_queries=32, max_text_tokens=512,
        vocabulary_size=1000, image_width=1024,
    )  # fmt: skip
    different = list({pattern: objective for objective, pattern in PATTERNS.items()}.values())
    assert len(different) == 3
    check_against_instructblip(config, different, *text([19], 1000, padded_to=32), patches=257)


@pytest.fixture(scope="module")
def retrieval() -> Blip2ForImageTextRetrieval:
    """A whole BLIP-2 with a text branch."""
    vision = {"hidden_size": CONFIG.image_width, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 8, "patch_size": 4}
    qformer = qformer_sizes(CONFIG) | {"use_qformer_text_input": True}
    sizes = {"num_query_tokens": CONFIG.visual_queries, "image_text_hidden_size": CONFIG.projection_size}
    return scrambled(Blip2ForImageTextRetrieval(Blip2Config(vision_config=vision, qformer_config=qformer, **sizes)))


@torch.no_grad()
def test_outputs_equal_blip2_with_its_text_branch(retrieval: Blip2ForImageTextRetrieval) -> None:
    ours = MQFormer.from_instructblip(retrieval.state_dict(), CONFIG).eval()
    image_BPD = torch.randn(2, 5, CONFIG.image_width)
    memory = ours.look(image_BPD, LOCAL)
    ids_BT, mask_BT = text([7, 4], CONFIG.vocabulary_size)
    query_BQD = retrieval.query_tokens.expand(2, -1, -1)
    seen = {"query_length": CONFIG.visual_queries, "encoder_hidden_states": ours.image_norm(image_BPD)}

    queries_alone = retrieval.qformer(query_BQD, **seen).last_hidden_state
    assert largest_difference(ours("contrastive", memory)[0], queries_alone) < 1e-5

    text_alone = retrieval.qformer(
        retrieval.embeddings(ids_BT), query_length=0, attention_mask=mask_BT.long()
    ).last_hidden_state
    found = ours("contrastive", None, ids_BT, mask_BT)[1]
    assert largest_difference(found[mask_BT], text_alone[mask_BT]) < 1e-5  # padding has no meaning

    for objective in PATTERNS:
        both = retrieval.qformer(
            retrieval.embeddings(ids_BT, query_embeds=query_BQD),
            attention_mask=attention_mask(objective, visual=3, grounding=0, text_mask_BT=mask_BT),
            **seen,
        ).last_hidden_state
        query, words = ours(objective, memory, ids_BT, mask_BT)
        assert largest_difference(torch.cat([query, words], dim=1), both) < 1e-5, objective


@torch.no_grad()
def test_matching_equals_blip2_from_pixels_to_logits(retrieval: Blip2ForImageTextRetrieval) -> None:
    ours = MQFormer.from_instructblip(retrieval.state_dict(), CONFIG).eval()
    ours.image_norm.eps = retrieval.vision_model.post_layernorm.eps
    tokens: list[Tensor] = []
    hook = retrieval.vision_model.post_layernorm.register_forward_pre_hook(lambda _, given: tokens.append(given[0]))
    ids_BT, mask_BT = text([6, 3], CONFIG.vocabulary_size)
    expected = retrieval(torch.randn(2, 3, 8, 8), ids_BT, mask_BT.long(), use_image_text_matching_head=True)
    hook.remove()
    query_BQD, _ = ours("matching", ours.look(tokens[0], LOCAL), ids_BT, mask_BT)
    assert largest_difference(ours.matching_head(query_BQD).mean(1), expected.logits_per_image) < 1e-5


def test_a_whole_blip2_fills_all_but_grounding_text_head_and_temperature(
    retrieval: Blip2ForImageTextRetrieval,
) -> None:
    ours = MQFormer(GROUNDED)
    result = load_qformer(ours, retrieval.state_dict())
    assert result.loaded.keys() == qformer_names(GROUNDED).union(*HEADS.values())
    grounding = {name for name in result.new if name.startswith("local_tokens.")}
    grounding |= in_layers(["cross_attention.key.grounding", "cross_attention.value.grounding"], range(0, 3, 2))
    assert result.new.keys() == {"temperature", "grounding_queries", *TEXT_HEAD, *grounding}
    assert grounding & {"local_tokens.nothing"} and not result.copied and not result.frozen
    assert torch.equal(ours.visual_queries, retrieval.query_tokens[0])
    assert torch.equal(ours.image_projection.weight, retrieval.vision_projection.weight)
    assert torch.equal(ours.text_projection.weight, retrieval.text_projection.weight)
    assert torch.equal(ours.matching_head.bias, retrieval.itm_head.bias)
    assert torch.equal(ours.image_norm.bias, retrieval.vision_model.post_layernorm.bias)


def test_grounding_parameters_stay_what_a_new_mq_former_has() -> None:
    torch.manual_seed(5)
    fresh = MQFormer(GROUNDED).state_dict()
    torch.manual_seed(5)
    ours = MQFormer(GROUNDED)
    result = load_qformer(ours, instructblip().state_dict())
    assert result.loaded.keys() == qformer_names(GROUNDED)
    assert set().union(*HEADS.values()) <= result.new.keys()
    assert all(torch.equal(fresh[name], ours.state_dict()[name]) for name in result.new)
    assert sum(result.loaded.values()) == sum(p.numel() for p in instructblip().parameters())


def test_a_whole_instructblip_is_read_and_the_log_says_what_was_not(caplog: pytest.LogCaptureFixture) -> None:
    vision = {"hidden_size": CONFIG.image_width, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 8, "patch_size": 4}
    language = {"model_type": "opt", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
    language |= {"num_attention_heads": 1, "ffn_dim": 8, "word_embed_proj_dim": 8, "max_position_embeddings": 12}
    whole = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=vision, qformer_config=qformer_sizes(CONFIG), text_config=language, num_query_tokens=3
        )
    )
    state = whole.state_dict() | {"qformer.embeddings.position_ids": torch.arange(12)[None]}
    ours = MQFormer(CONFIG)
    ours.temperature.requires_grad_(False)
    with caplog.at_level(logging.INFO, logger="lyrics"):
        result = load_qformer(ours, state)
    assert result.loaded.keys() == qformer_names(CONFIG) | HEADS["query_tokens"] | HEADS["vision_model.post_layernorm"]
    counts, names = caplog.messages
    assert counts == (
        f"MQ-Former from a Q-Former: loaded {len(result.loaded)} tensors ({sum(result.loaded.values()):,} parameters), "
        f"copied 0 tensors (0 parameters), new {len(result.new)} tensors ({sum(result.new.values()):,} parameters), "
        "frozen 1 tensors (1 parameters)"
    )
    new, unused = names.split("; not used: ")
    assert "temperature" in new and "image_projection.weight" in new
    assert "embeddings.position_ids" in unused and "language_projection.bias" in unused


def without(state: dict[str, Tensor], *words: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not any(word in name for word in words)}


def test_a_q_former_without_text_branch_is_refused_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    plain = scrambled(Blip2QFormerModel(Blip2QFormerConfig(**qformer_sizes(CONFIG)))).state_dict()
    words = r"lacks its text branch: layers\.\*\.text_feed_forward.*position_embeddings.*allow_new_text_branch=True"
    with pytest.raises(InputError, match=words):
        MQFormer.from_instructblip(plain, CONFIG)
    with caplog.at_level(logging.INFO, logger="lyrics"):
        ours = MQFormer.from_instructblip(plain, CONFIG, allow_new_text_branch=True)
    new = caplog.messages[-1].partition(";")[0]
    assert "layers.*.text_feed_forward.inner.weight" in new and "word_embeddings.weight" in new
    assert "query_feed_forward" not in new
    assert torch.equal(
        ours.get_parameter("layers.2.query_feed_forward.outer.bias"), plain["encoder.layer.2.output_query.dense.bias"]
    )


def test_a_text_branch_without_its_embeddings_is_no_text_branch(retrieval: Blip2ForImageTextRetrieval) -> None:
    with pytest.raises(InputError, match=r"text branch: position_embeddings\.weight, word_embeddings\.weight;"):
        MQFormer.from_instructblip(retrieval.qformer.state_dict(), CONFIG)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 8}, r"word_embeddings\.weight has shape \(20, 16\), MQ-Former's has \(20, 8\)"),
        ({"image_width": 7}, r"cross_attention\.key\.visual\.weight has shape \(16, 8\), MQ-Former's has \(16, 7\)"),
        ({"vocabulary_size": 21}, r"word_embeddings\.weight has shape \(20, 16\), MQ-Former's has \(21, 16\)"),
        ({"max_text_tokens": 11}, r"position_embeddings\.weight has shape \(12, 16\), MQ-Former's has \(11, 16\)"),
        ({"layers": 2}, r"weights of the Q-Former have no place.*encoder\.layer\.\*\.attention"),
        ({"layers": 4}, r"lacks 16 weights that a Q-Former has.*layers\.\*\.attention\.key\.bias"),
        ({"cross_attention_every": 3}, r"no place in MQ-Former: encoder\.layer\.\*\.crossattention"),
        ({"cross_attention_every": 1}, r"lacks 10 weights that a Q-Former has.*cross_attention\.key\.visual"),
        ({"visual_queries": 0, "grounding_queries": 2}, r"no place.*crossattention\.attention\.key"),
    ],
)
def test_sizes_that_differ_from_the_q_formers_are_named(changes: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MQFormer.from_instructblip(instructblip().state_dict(), dataclasses.replace(CONFIG, **changes))


def test_other_numbers_of_queries_are_named(retrieval: Blip2ForImageTextRetrieval) -> None:
    with pytest.raises(InputError, match=r"visual_queries has shape \(3, 16\), MQ-Former's has \(5, 16\)"):
        MQFormer.from_instructblip(retrieval.state_dict(), dataclasses.replace(CONFIG, visual_queries=5))


def test_unknown_and_missing_weights_are_named() -> None:
    state = instructblip().state_dict()
    with pytest.raises(InputError, match=r"1 weights of the Q-Former have no place in MQ-Former: embeddings\.type;"):
        MQFormer.from_instructblip(state | {"embeddings.type": torch.zeros(2)}, CONFIG)
    with pytest.raises(InputError, match=r"lacks 1 weights.* layers\.\*\.attention\.norm\.bias;"):
        MQFormer.from_instructblip(without(state, "layer.1.attention.output.LayerNorm.bias"), CONFIG)


def bert(kind: type, **changes: int) -> Any:
    return scrambled(kind(BertConfig(**peer_sizes(CONFIG) | changes)))


@pytest.mark.parametrize(
    ("kind", "head"), [(BertModel, []), (BertForMaskedLM, TEXT_HEAD), (BertForPreTraining, TEXT_HEAD)]
)
def test_a_bert_fills_what_the_paper_says(kind: type, head: list[str]) -> None:
    source = bert(kind, vocab_size=19, max_position_embeddings=30)
    ours = MQFormer(GROUNDED)
    result = load_bert(ours, source.state_dict())
    every = range(GROUNDED.layers)
    assert result.loaded.keys() == {*EMBEDDINGS, *head, *in_layers(ATTENTION + TEXT, every)}
    assert result.copied.keys() == in_layers(QUERY, every)
    cross = in_layers(
        [f"cross_attention.{part}" for part in (*CROSS, "key.grounding", "value.grounding")], range(0, 3, 2)
    )
    local = {name for name, _ in ours.named_parameters() if name.startswith("local_tokens.")}
    heads = set().union(*HEADS.values(), {"temperature", "grounding_queries"}, set(TEXT_HEAD) - set(head))
    assert result.new.keys() == cross | local | heads

    inner = source.bert if head else source
    rows = inner.embeddings.word_embeddings.weight
    assert torch.equal(ours.word_embeddings.weight[:19], rows)
    torch.testing.assert_close(ours.word_embeddings.weight[19], rows.mean(0))  # [DEC]
    positions = inner.embeddings.position_embeddings.weight[:12] + inner.embeddings.token_type_embeddings.weight[0]
    assert torch.equal(ours.position_embeddings.weight, positions)
    for name in result.copied:
        assert torch.equal(ours.get_parameter(name), ours.get_parameter(name.replace(".query_", ".text_")))


@torch.no_grad()
def test_a_minilm_computes_as_it_did() -> None:
    """Six layers of 384 with 12 heads, a bare BertModel with its pooler and, as in old files, position ids."""
    config = dataclasses.replace(
        CONFIG, hidden_size=384, layers=6, heads=12, intermediate_size=1536, vocabulary_size=51, max_text_tokens=32
    )
    source = scrambled(BertModel(BertConfig(**peer_sizes(config) | {"vocab_size": 50, "max_position_embeddings": 64})))
    state = source.state_dict() | {"embeddings.position_ids": torch.arange(64)[None]}
    assert "pooler.dense.weight" in state
    ours = MQFormer(config).eval()
    result = load_bert(ours, state)
    assert (len(result.loaded), len(result.copied)) == (4 + 6 * 16, 6 * 6)
    ids_BT, mask_BT = text([9, 5], 50)
    expected = source(ids_BT, attention_mask=mask_BT.long()).last_hidden_state
    found = ours("contrastive", None, ids_BT, mask_BT)[1]
    assert largest_difference(found[mask_BT], expected[mask_BT]) < 1e-5


@torch.no_grad()
def test_the_text_head_predicts_as_berts_does() -> None:
    source = bert(BertForMaskedLM)
    ours = MQFormer.from_bert(source.state_dict(), CONFIG).eval()
    ids_BT, mask_BT = text([8, 8], CONFIG.vocabulary_size)
    found = ours.text_logits(ours("contrastive", None, ids_BT, mask_BT)[1])
    assert largest_difference(found, source(ids_BT).logits) < 1e-5


def test_names_of_the_first_berts_are_known() -> None:
    source = bert(BertForMaskedLM).state_dict()
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in source.items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in old
    found, expected = MQFormer(CONFIG), MQFormer(CONFIG)
    assert load_bert(found, old) == load_bert(expected, source)
    assert torch.equal(found.embedding_norm.weight, expected.embedding_norm.weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 4}, r"16 weights of the BERT have no place.*encoder\.layer\.\*\.attention\.self\.key"),
        ({"num_hidden_layers": 2}, r"lacks 16 weights that a BERT has.*layers\.\*\.text_feed_forward\.inner"),
        ({"hidden_size": 8}, r"word_embeddings\.weight has shape \(20, 8\), MQ-Former's has \(20, 16\)"),
        ({"vocab_size": 21}, r"word_embeddings\.weight has shape \(21, 16\), MQ-Former's has \(20, 16\)"),
        (
            {"max_position_embeddings": 7},
            r"position_embeddings\.weight has shape \(7, 16\), MQ-Former's has \(12, 16\)",
        ),
    ],
)
def test_sizes_that_differ_from_berts_are_named(changes: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MQFormer.from_bert(bert(BertModel, **changes).state_dict(), CONFIG)


def test_what_is_no_bert_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 weights of the BERT have no place in MQ-Former: conv1\.weight"):
        MQFormer.from_bert({"conv1.weight": torch.zeros(3)}, CONFIG)
    with pytest.raises(InputError, match=r"lacks 52 weights that a BERT has"):
        MQFormer.from_bert({}, CONFIG)


def test_the_package_offers_mq_former_and_imports_torch_only_for_it() -> None:
    code = "import sys, lyrics.model; print('torch' in sys.modules, *lyrics.model.__all__)"
    said = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[2], text=True)
    assert said.split() == ["False", "MQFormer", "MQFormerConfig"]
    assert (MQFormer, MQFormerConfig) == (mq_former.MQFormer, mq_former.MQFormerConfig)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lyrics.model.Nothing  # noqa: B018
