"""The whole model on tiny random parts: losses of dialogues, padded and packed; generation against slow references."""

import numpy as np
import pytest
import torch
from small_model import ANSWERS, PICTURES, QUESTIONS, llama, seen, small_model, with_adapter
from torch import Tensor

from lyrics.model.inputs import SeenImage
from lyrics.model.language import OBJECT, WORD, Conversation, Decoding, Layout, assemble
from lyrics.model.lyrics import LyricsModel, Read, Texts

TEXTS = [p.spatial_text for p in PICTURES]
# A dialogue, a question and a dialogue.
ASKED: list[Texts] = [(QUESTIONS[0], "is the cup red ?", "what is it ?"), QUESTIONS[1], (QUESTIONS[2], "what color ?")]
SAID: list[Texts] = [("red", "the cup is blue", "star"), ANSWERS[1], ("blue", "red")]


@pytest.fixture
def model() -> LyricsModel:
    return with_adapter(small_model())


def conversations(model: LyricsModel) -> list[Conversation]:
    return [model.conversation(q, a, text) for q, a, text in zip(ASKED, SAID, TEXTS, strict=True)]


def gradients(model: LyricsModel, *losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_batch_loses_what_its_samples_lose(model: LyricsModel) -> None:
    with torch.no_grad():
        alone = [
            float(model([q], [p], [a], [t])) for q, p, a, t in zip(QUESTIONS, PICTURES, ANSWERS, TEXTS, strict=True)
        ]
        lengths = [len(model.template.answer(a)) for a in ANSWERS]
        by_answers = float(model(QUESTIONS, PICTURES, ANSWERS, TEXTS, "answers"))
        by_tokens = float(model(QUESTIONS, PICTURES, ANSWERS, TEXTS, "tokens"))
    assert by_answers == pytest.approx(sum(alone) / 3, abs=1e-5)
    assert by_tokens == pytest.approx(np.average(alone, weights=lengths), abs=1e-5)
    assert abs(by_answers - by_tokens) > 1e-3


@torch.no_grad()
def test_every_answer_of_a_dialogue_is_predicted_from_what_came_before_it(model: LyricsModel) -> None:
    """Token by token, each from its own prefix, with no mask, no labels and no padding."""
    expected, count = 0.0, 0
    for asked, picture, conversation in zip(ASKED, PICTURES, conversations(model), strict=True):
        row_1SE = row_of(model, asked, picture, conversation)
        for start, stop in conversation.answers:
            for position in range(start, stop):
                log_p_V = model.llm(inputs_embeds=row_1SE[:, :position]).logits[0, -1].log_softmax(-1)
                expected, count = expected - float(log_p_V[conversation.ids[position]]), count + 1
    assert count == model.normaliser(SAID, "tokens") == sum(b - a for c in conversations(model) for a, b in c.answers)
    assert float(model(ASKED, PICTURES, SAID, TEXTS)) == pytest.approx(expected / count, abs=1e-5)


def row_of(model: LyricsModel, asked: Texts, seen: SeenImage, c: Conversation) -> Tensor:
    """row_1SE, position by position."""
    embed, tokens_QE = model.llm.get_input_embeddings(), model.query_tokens([asked], [seen])[0]
    places = zip(c.ids, c.queries, strict=True)
    return torch.stack([embed(torch.tensor(i)) if q == WORD else tokens_QE[q] for i, q in places])[None]


@pytest.mark.parametrize(
    ("told", "beside"), [(None, [2, 3, 2]), ([2], [2])], ids=["every object, as queries turn", "the third alone"]
)
def test_a_token_stands_beside_the_objects_of_its_query(told: list[int] | None, beside: list[int]) -> None:
    text = "star 1 2 3 4; cup 1 2 3 4; star 1 2 3 4;" if told is None else "star 1 2 3 4;"
    marked, first, found = small_model("per_object").shown(text, told)
    assert (marked, list(first), list(found)) == (text.replace(" 1", f"{OBJECT} 1"), [0, 1], beside)


def test_without_a_text_all_tokens_come_first() -> None:
    assert [list(part) for part in small_model("per_object").shown("")] == [[], [0, 1, 2, 3], []]
    assert list(small_model("pooled").shown("star 1 2 3 4;")[1]) == [0, 1, 2, 3]


def test_the_queries_read_the_first_question_alone(model: LyricsModel) -> None:
    """A later one could give an earlier answer away: `what color is the red star ?`."""
    first = model.query_tokens([ASKED[0]], PICTURES[:1])
    assert torch.equal(first, model.query_tokens([ASKED[0][0]], PICTURES[:1]))
    assert not torch.equal(first, model.query_tokens([ASKED[0][1]], PICTURES[:1]))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["left", "packed"])
def test_padding_side_and_packing_change_no_token_of_any_sample(model: LyricsModel, layout: Layout) -> None:
    tokens_BQE = model.query_tokens(ASKED, PICTURES)

    def losses(layout: Layout) -> list[list[float]]:
        laid = assemble(conversations(model), pad=model.template.pad, layout=layout)
        loss_M, answer_M = model.token_losses(laid, tokens_BQE)
        return [loss_M[answer_M == answer].tolist() for answer in range(6)]

    for found, expected in zip(losses(layout), losses("right"), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("average", ["tokens", "answers"])
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(model: LyricsModel, average: str) -> None:
    asked, pictures, said, texts = ASKED * 2, PICTURES * 2, SAID * 2, TEXTS * 2
    rows: list[int] = []
    model._base.model.register_forward_hook(lambda _m, _a, output: rows.append(len(output[0])))
    padded = model(asked, pictures, said, texts, average)
    expected = gradients(model, padded)
    model.packing = True
    packed = model(asked, pictures, said, texts, average)
    found = gradients(model, packed)
    assert rows == [6, 5]
    assert float(packed.detach()) == pytest.approx(float(padded.detach()), abs=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("average", ["tokens", "answers"])
def test_parts_of_a_batch_with_the_joint_total_sum_to_it(model: LyricsModel, average: str) -> None:
    whole = model(ASKED, PICTURES, SAID, TEXTS, average)
    expected = gradients(model, whole)
    total = model.normaliser(SAID, average)
    parts = [
        model(ASKED[p], PICTURES[p], SAID[p], TEXTS[p], average, total=total) for p in (slice(0, 1), slice(1, None))
    ]
    assert float(sum(p.detach() for p in parts)) == pytest.approx(float(whole.detach()), abs=1e-6)
    found = gradients(model, *parts)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_activation_checkpointing_of_the_language_model_changes_no_gradient(model: LyricsModel) -> None:
    model.train()
    expected = gradients(model, model(ASKED, PICTURES, SAID, TEXTS))
    calls: list[int] = []
    model._base.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    model._base.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, model(ASKED, PICTURES, SAID, TEXTS))
    assert len(calls) == 2  # forward, and again in the backward pass
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


@torch.no_grad()
def uncached(model: LyricsModel, question: str, picture: SeenImage, limit: int) -> str:
    """Greedy, with the whole sequence through the model for every token."""
    inputs = row_of(model, question, picture, model.conversation(question, (), picture.spatial_text))
    ids: list[int] = []
    while len(ids) < limit and ids[-1:] != [model.template.end]:
        ids.append(int(model.llm(inputs_embeds=inputs, use_cache=False).logits[0, -1].argmax()))
        inputs = torch.cat([inputs, model.llm.get_input_embeddings()(torch.tensor([ids[-1:]]))], dim=1)
    return model.template.decode(ids)


def test_cached_generation_equals_uncached_token_by_token(model: LyricsModel) -> None:
    for limit in range(1, 13):
        for question, picture in zip(QUESTIONS, PICTURES, strict=True):
            assert model.generate([question], [picture], max_new_tokens=limit) == [
                uncached(model, question, picture, limit)
            ]


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(num_beams=3)])
def test_answers_in_a_batch_equal_answers_one_by_one(model: LyricsModel, decoding: Decoding) -> None:
    together = model.generate(QUESTIONS, PICTURES, max_new_tokens=8, decoding=decoding)
    alone = [
        model.generate([q], [p], max_new_tokens=8, decoding=decoding)[0]
        for q, p in zip(QUESTIONS, PICTURES, strict=True)
    ]
    assert together == alone and len(set(together)) == 3


def test_beams_as_many_as_words_find_the_likeliest_pair_of_tokens(model: LyricsModel) -> None:
    """With two tokens to go and a beam for every word the search is exhaustive."""
    size = model.llm.get_input_embeddings().weight.shape[0]
    found = model.generate(QUESTIONS[:1], PICTURES[:1], max_new_tokens=2, decoding=Decoding(num_beams=size))
    conversation = model.conversation(QUESTIONS[0], (), TEXTS[0])
    with torch.no_grad():
        inputs_1SE = row_of(model, QUESTIONS[0], PICTURES[0], conversation)
        words_V1E = model.llm.get_input_embeddings()(torch.arange(size))[:, None]
        first_V = model.llm(inputs_embeds=inputs_1SE).logits[0, -1].log_softmax(-1)
        both = model.llm(inputs_embeds=torch.cat([inputs_1SE.expand(size, -1, -1), words_V1E], dim=1)).logits[:, -1]
        joint_VV = first_V[:, None] + both.log_softmax(-1)
    joint_VV[model.template.end] = -torch.inf  # that answer is one token long
    best = divmod(int(joint_VV.argmax()), size)
    assert float(first_V[model.template.end]) < float(joint_VV.max()) / 2  # scores are means over tokens
    assert found == [model.template.decode(best)]


def test_draws_follow_their_seed_and_leave_the_global_state_alone(model: LyricsModel) -> None:
    def drawn(**values: float | int) -> list[str]:
        return model.generate(QUESTIONS, PICTURES, max_new_tokens=8, decoding=Decoding(temperature=1.5, **values))

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = drawn(seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert first == drawn(seed=1) != drawn(seed=2)
    assert first != model.generate(QUESTIONS, PICTURES, max_new_tokens=8)
    assert drawn(top_p=1e-6) == model.generate(QUESTIONS, PICTURES, max_new_tokens=8)


def test_the_next_answer_of_a_dialogue_reads_what_was_said(model: LyricsModel) -> None:
    asked, said = [(QUESTIONS[0], "is the cup red ?")], [("red",)]
    found = model.generate(asked, PICTURES[:1], said=said, max_new_tokens=6)
    conversation = model.conversation(asked[0], said[0], TEXTS[0])
    with torch.no_grad():
        inputs = row_of(model, QUESTIONS[0], PICTURES[0], conversation)
        ids = model.llm.generate(inputs_embeds=inputs, max_new_tokens=6, do_sample=False, eos_token_id=7)
    assert found == [model.template.decode(ids[0].tolist())]
    assert found != model.generate([asked[0][1]], PICTURES[:1], max_new_tokens=6)


def test_a_dialogue_goes_on_from_what_was_read(model: LyricsModel) -> None:
    lengths: list[int] = []
    model._base.model.register_forward_hook(lambda _m, _a, output: lengths.append(output[0].shape[1]))
    questions = (QUESTIONS[0], "is the cup red ?", "what is it ?")
    read, said = Read(), []
    for turn in range(1, 4):
        lengths.clear()
        anew = model.generate([questions[:turn]], PICTURES[:1], said=[tuple(said)], max_new_tokens=5)
        prompt = lengths[0]
        lengths.clear()
        found = model.generate([questions[:turn]], PICTURES[:1], said=[tuple(said)], max_new_tokens=5, read=read)
        assert found == anew
        # Answers of random weights hold special tokens, which a text does not: from there it is read again.
        new = 5 + len(questions[turn - 1].split()) + 5
        assert lengths[0] == prompt if turn == 1 else lengths[0] <= new < prompt
        said += found


def test_a_dialogue_that_turns_out_otherwise_is_read_from_where_it_differs(model: LyricsModel) -> None:
    read = Read()
    model.generate([QUESTIONS[0]], PICTURES[:1], max_new_tokens=5, read=read)
    for question, picture in ((QUESTIONS[1], PICTURES[1]), (QUESTIONS[0], PICTURES[0]), (QUESTIONS[0], PICTURES[0])):
        assert model.generate([question], [picture], max_new_tokens=5, read=read) == model.generate(
            [question], [picture], max_new_tokens=5
        )


def test_what_was_looked_at_once_serves_every_question(model: LyricsModel) -> None:
    memory = model.look(PICTURES[:1])
    looks: list[int] = []
    original = model.mq_former.look
    model.mq_former.look = lambda *a: looks.append(1) or original(*a)  # type: ignore[method-assign]
    remembered = [model.generate([q], PICTURES[:1], max_new_tokens=6, memory=memory) for q in QUESTIONS]
    assert not looks
    assert remembered == [model.generate([q], PICTURES[:1], max_new_tokens=6) for q in QUESTIONS]


def test_the_picture_and_the_replaced_spatial_text_both_matter(model: LyricsModel) -> None:
    @torch.no_grad()
    def loss(picture: SeenImage, text: str) -> float:
        return float(model(QUESTIONS[:1], [picture], ANSWERS[:1], [text]))

    own = loss(PICTURES[0], PICTURES[0].spatial_text)
    assert loss(PICTURES[2], PICTURES[0].spatial_text) != pytest.approx(own, abs=1e-6)
    assert loss(PICTURES[0], PICTURES[2].spatial_text) != pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize("in_llm", [True, False])
def test_a_replaced_spatial_text_is_what_is_read_of_the_objects(model: LyricsModel, in_llm: bool) -> None:
    """Where MQ-Former alone reads it, it must not go on reading the other picture's."""
    model.spatial_text_in_llm = in_llm
    read: list[str] = []
    original = model.text_tokenizer.ids
    model.text_tokenizer.ids = lambda text: read.append(text) or original(text)  # type: ignore[method-assign]
    own, other = PICTURES[0].spatial_text, PICTURES[2].spatial_text
    model.generate(QUESTIONS[:1], PICTURES[2:3], spatial_texts=[own], max_new_tokens=1)
    assert (own in read, other in read) == ((False, True) if in_llm else (True, False))


def test_gradients_reach_queries_and_local_tokens() -> None:
    model = small_model()
    model(QUESTIONS, [seen(2, 0), seen(1, 1), seen(3, 2)], ANSWERS, [""] * 3).backward()
    assert model.mq_former.visual_queries.grad.abs().sum() > 0
    assert model.mq_former.local_tokens.project["detector"].weight.grad.abs().sum() > 0
    assert llama().config.hidden_size == model.projection.linear.out_features
