"""MQ-Former: who can influence whom, empty rows, switched-off parts, and the start from BERT."""

import dataclasses

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from lyrics.errors import InputError
from lyrics.model.local_tokens import LocalFeatures
from lyrics.model.mq_former import PATTERNS, MQFormer, MQFormerConfig, attention_mask

V, G, T = 2, 3, 4
CONFIG = MQFormerConfig(
    visual_queries=V,
    grounding_queries=G,
    hidden_size=16,
    layers=2,
    heads=2,
    intermediate_size=32,
    cross_attention_every=2,
    max_text_tokens=12,
    dropout=0.0,
    projection_size=8,
    detector_tokens=True,
    segmenter_tokens=True,
    grounding="pooled",
    vocabulary_size=30,
    pad_token_id=0,
    image_width=10,
    detector_width=6,
    segmenter_width=5,
    max_objects=4,
)


def pictures(
    batch: int = 2, objects: int = 3, *, detector_width: int = 6, segmenter_width: int = 5
) -> tuple[torch.Tensor, LocalFeatures]:
    torch.manual_seed(1)
    return torch.randn(batch, 5, 10), LocalFeatures(
        detector_BND=torch.randn(batch, objects, detector_width),
        segmenter_BND=torch.randn(batch, objects, segmenter_width),
        tag_ids_BNK=torch.randint(1, 30, (batch, objects, 2)),
        boxes_BN4=torch.rand(batch, objects, 4),
        object_mask_BN=torch.ones(batch, objects, dtype=torch.bool),
    )


def model(**changes: object) -> MQFormer:
    torch.manual_seed(0)
    return MQFormer(dataclasses.replace(CONFIG, **changes)).eval()


def may_influence(objective: str) -> torch.Tensor:
    """Reachability over two layers of attention, computed by hand from the paper's table: row depends on column."""
    size = V + G + T
    one_SS = torch.eye(size, dtype=torch.bool)
    for row in range(size):
        for column in range(size):
            query_row, query_column = row < V + G, column < V + G
            if query_row == query_column:
                allowed = True
                if objective == "captioning" and not query_row:
                    allowed = column <= row
            elif query_row:
                allowed = objective in ("matching", "masked_spatial", "instruction")
            else:
                allowed = objective != "contrastive"
            one_SS[row, column] |= allowed
    return (one_SS.float() @ one_SS.float()) > 0


@pytest.mark.parametrize("objective", sorted(PATTERNS))
def test_gradients_flow_only_where_the_pattern_allows(objective: str) -> None:
    mq_former = model()
    with torch.no_grad():
        memory = mq_former.look(*pictures(batch=1))
    inputs: list[torch.Tensor] = []
    mq_former.embedding_norm.register_forward_hook(
        lambda _module, _input, output: inputs.append(output.detach().requires_grad_()) or inputs[-1]
    )
    query, text = mq_former(objective, memory, torch.tensor([[5, 6, 7, 8]]))
    # A LayerNorm's outputs sum to a constant: weigh them unevenly.
    outputs_S = (torch.cat([query, text], dim=1)[0] * torch.linspace(-1, 2, CONFIG.hidden_size)).sum(-1)
    found = torch.stack(
        [torch.autograd.grad(out, inputs[-1], retain_graph=True)[0][0].abs().sum(-1) > 0 for out in outputs_S]
    )
    assert torch.equal(found, may_influence(objective))


def test_padding_influences_nothing() -> None:
    mq_former = model()
    memory = mq_former.look(*pictures(batch=1))
    mask = torch.tensor([[True, True, False, False]])
    first, _ = mq_former("instruction", memory, torch.tensor([[5, 6, 7, 8]]), mask)
    second, _ = mq_former("instruction", memory, torch.tensor([[5, 6, 9, 1]]), mask)
    assert torch.equal(first, second)


def test_visual_queries_see_the_picture_and_grounding_queries_the_objects() -> None:
    mq_former = model()
    image, local = pictures(batch=1)
    image.requires_grad_()
    detector = local.detector_BND.requires_grad_()
    query, _ = mq_former("contrastive", mq_former.look(image, local), cross_query=False)
    visual, grounding = mq_former.split_queries(query)
    weights = torch.linspace(-1, 2, CONFIG.hidden_size)
    on_image, on_objects = torch.autograd.grad(
        (visual * weights).sum(), [image, detector], retain_graph=True, allow_unused=True
    )
    assert on_image.abs().sum() > 0 and (on_objects is None or on_objects.abs().sum() == 0)
    on_image, on_objects = torch.autograd.grad((grounding * weights).sum(), [image, detector], allow_unused=True)
    assert (on_image is None or on_image.abs().sum() == 0) and on_objects.abs().sum() > 0


@pytest.mark.parametrize("lanes", [False, True])
def test_each_grounding_query_sees_its_own_objects_alone(lanes: bool) -> None:
    """Query g of G at objects g, g + G …; in one layer, for queries see each other."""
    mq_former = model(layers=1, grounding="per_object")
    image, local = pictures(batch=2, objects=4)
    features = [local.detector_BND.requires_grad_(), local.segmenter_BND.requires_grad_()]
    memory = mq_former.look(image, local)
    if lanes:
        memory = memory.index(torch.tensor([1, 1]))
    query_PQD, _ = mq_former("contrastive", memory, cross_query=False)
    for query, own in ((0, [0, 3]), (1, [1]), (2, [2])):
        target = (query_PQD[-1, CONFIG.visual_queries + query] * torch.linspace(-1, 2, CONFIG.hidden_size)).sum()
        for gradient in torch.autograd.grad(target, features, retain_graph=True):
            assert gradient[1].abs().sum(-1).nonzero().flatten().tolist() == own
            assert not gradient[0].any()


def test_a_query_without_an_object_of_its_own_sees_nothing() -> None:
    mq_former = model(layers=1, grounding="per_object")
    image, one = pictures(objects=1)
    found, _ = mq_former("contrastive", mq_former.look(image, one), cross_query=False)
    none, _ = mq_former("contrastive", mq_former.look(image, pictures(objects=0)[1]), cross_query=False)
    assert found.isfinite().all() and not torch.allclose(
        found[:, CONFIG.visual_queries], none[:, CONFIG.visual_queries]
    )
    for query_D in none[0, CONFIG.visual_queries :]:
        told = (query_D * torch.linspace(-1, 2, CONFIG.hidden_size)).sum()
        assert torch.autograd.grad(told, mq_former.local_tokens.nothing, retain_graph=True)[0].any()


def masked_objects() -> LocalFeatures:
    local = pictures()[1]
    return dataclasses.replace(local, object_mask_BN=torch.zeros_like(local.object_mask_BN))


@pytest.mark.parametrize("local", [masked_objects(), pictures(objects=0)[1]], ids=["masked", "none in the batch"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_picture_without_objects_is_ordinary(local: LocalFeatures, autocast: bool) -> None:
    mq_former = model().train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        query, text = mq_former("matching", mq_former.look(pictures()[0], local), torch.tensor([[5, 6], [7, 8]]))
        loss = query.float().pow(2).sum() + text.float().pow(2).sum()
    loss.backward()
    assert query.isfinite().all() and text.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mq_former.parameters() if p.grad is not None)
    assert mq_former.local_tokens.nothing.grad.abs().sum() > 0


def test_masked_objects_and_no_objects_are_the_same() -> None:
    mq_former = model()
    image, none = pictures(objects=0)
    without, _ = mq_former("contrastive", mq_former.look(image, none))
    masked, _ = mq_former("contrastive", mq_former.look(image, masked_objects()))
    torch.testing.assert_close(masked, without)


@pytest.mark.parametrize(("objects", "detector_width", "segmenter_width"), [(1, 2, 9), (7, 12, 3), (300, 5, 24)])
def test_local_tokens_of_any_width_and_number(objects: int, detector_width: int, segmenter_width: int) -> None:
    widths = {"detector_width": detector_width, "segmenter_width": segmenter_width}
    mq_former = model(max_objects=objects, **widths)
    image, local = pictures(objects=objects, **widths)
    local.object_mask_BN[1, objects // 2 :] = False
    other = local.detector_BND.clone()
    other[1, objects // 2 :] = 9.0
    query, _ = mq_former("contrastive", mq_former.look(image, local))
    again, _ = mq_former("contrastive", mq_former.look(image, dataclasses.replace(local, detector_BND=other)))
    assert torch.equal(query, again)  # masked objects are seen by nobody
    other[0, 0] = torch.arange(detector_width)
    changed, _ = mq_former("contrastive", mq_former.look(image, dataclasses.replace(local, detector_BND=other)))
    assert not torch.equal(query[0], changed[0])


def test_more_objects_than_ranks_are_refused() -> None:
    with pytest.raises(InputError, match=r"300 objects.* max_objects = 4; keep the first of them, or raise"):
        model().look(*pictures(objects=300))


@pytest.mark.parametrize(("visual", "grounding"), [(1, 0), (0, 1), (7, 2), (1, 40)])
def test_any_number_of_either_kind_of_query(visual: int, grounding: int) -> None:
    mq_former = model(visual_queries=visual, grounding_queries=grounding).train()
    with torch.autocast("cpu", torch.bfloat16):
        query, _ = mq_former("matching", mq_former.look(*pictures()), torch.tensor([[5, 6], [7, 8]]))
    query.float().pow(2).sum().backward()
    assert query.shape == (2, visual + grounding, 16) and query.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mq_former.parameters() if p.grad is not None)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match=r"visual_queries and mq_former.grounding_queries are both 0.*at least one"):
        model(visual_queries=0, grounding_queries=0)
    with pytest.raises(InputError, match=r"hidden_size \(16\) must be a multiple of mq_former.heads \(3\)"):
        model(heads=3)


@pytest.mark.parametrize("changes", [{"visual_queries": 0}, {"grounding_queries": 0}, {"segmenter_tokens": False}])
def test_either_kind_of_query_and_each_source_can_be_switched_off(changes: dict) -> None:
    mq_former = model(**changes)
    query, _ = mq_former("matching", mq_former.look(*pictures()), torch.tensor([[5, 6], [7, 8]]))
    assert query.shape == (2, mq_former.config.queries, 16) and query.isfinite().all()
    assert all(part.shape[1] for part in mq_former.split_queries(query))


def test_memory_index_equals_looking_again() -> None:
    mq_former = model()
    image, local = pictures(batch=3)
    rows = torch.tensor([2, 0])
    ids = torch.tensor([[5, 6], [7, 8]])
    indexed, _ = mq_former("matching", mq_former.look(image, local).index(rows), ids)
    again, _ = mq_former("matching", mq_former.look(image[rows], local.index(rows)), ids)
    torch.testing.assert_close(indexed, again)


def test_rows_of_one_picture_stand_side_by_side_in_any_order() -> None:
    mq_former = model()
    image, local = pictures(batch=3)
    rows = torch.tensor([1, 1, 2, 1])  # picture 0 has no row
    ids = torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]])
    indexed, _ = mq_former("matching", mq_former.look(image, local).index(rows), ids)
    alone = [
        mq_former("matching", mq_former.look(image[picture], local.index(picture)), text)[0]
        for picture, text in zip(rows.split(1), ids.split(1), strict=True)
    ]
    torch.testing.assert_close(indexed, torch.cat(alone))


def test_captions_after_encoded_queries_are_those_of_one_pass() -> None:
    mq_former = model()
    memory = mq_former.look(*pictures())
    ids, mask = torch.tensor([[5, 6, 7], [7, 8, 0]]), torch.tensor([[True, True, True], [True, True, False]])
    encoded = mq_former.encode_queries(memory)
    _, cached = mq_former("captioning", memory, ids, mask, encoded=encoded)
    query, whole = mq_former("captioning", memory, ids, mask)
    torch.testing.assert_close(cached, whole)
    torch.testing.assert_close(encoded.query_PQD, query)


@pytest.mark.parametrize("wanted", ["queries", "text", "cls"])
def test_what_is_not_wanted_is_left_out_and_the_rest_is_the_same(wanted: str) -> None:
    mq_former = model()
    memory, ids = mq_former.look(*pictures()), torch.tensor([[5, 6, 7], [7, 8, 9]])
    query, text = mq_former("matching", memory, ids)
    expected = {"queries": (query, text[:, :0]), "text": (query[:, :0], text), "cls": (query[:, :0], text[:, :1])}
    torch.testing.assert_close(mq_former("matching", memory, ids, wanted=wanted), expected[wanted])


def test_looking_again_projects_other_local_features_and_keeps_the_image() -> None:
    mq_former = model()
    image, local = pictures()
    hidden = dataclasses.replace(local, hidden_tag_BN=torch.tensor([[True, False, False], [False, True, True]]))
    first = mq_former.look(image, local)
    again, expected = mq_former.look_again(first, hidden), mq_former.look(image, hidden)
    assert again.layers[0]["visual"] is first.layers[0]["visual"]
    torch.testing.assert_close(again.layers[0]["grounding"].key, expected.layers[0]["grounding"].key)
    assert not torch.equal(again.layers[0]["grounding"].key, first.layers[0]["grounding"].key)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        mq_former = model(dropout=0.3).train()
        mq_former.activation_checkpointing = checkpointing
        torch.manual_seed(3)
        query, text = mq_former("matching", mq_former.look(*pictures()), torch.tensor([[5, 6], [7, 8]]))
        (query.pow(2).sum() + text.pow(3).sum()).backward()
        found.append({name: p.grad for name, p in mq_former.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_compiled_layers_compute_the_same(backend: str) -> None:
    plain, compiled = model(), model()
    compiled.compile_layers(backend)
    for length in (2, 3):
        ids = torch.arange(5, 5 + 2 * length).reshape(2, length)
        expected = plain("matching", plain.look(*pictures()), ids)
        torch.testing.assert_close(compiled("matching", compiled.look(*pictures()), ids), expected)


def test_captioning_mask_is_causal_and_padding_sees_only_itself() -> None:
    mask = attention_mask("captioning", visual=1, grounding=0, text_mask_BT=torch.tensor([[True, True, False]]))
    assert mask[0, 0].tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]


def test_text_alone_equals_the_bert_it_started_from() -> None:
    torch.manual_seed(0)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=28, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=20,
        )
    ).eval()  # fmt: skip
    mq_former = MQFormer.from_bert(bert.state_dict(), CONFIG).eval()
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[True, True, True], [True, True, False]])
    expected = bert.bert(ids, attention_mask=mask.long()).last_hidden_state
    _, found = mq_former("contrastive", None, ids, mask)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)
