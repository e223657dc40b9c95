"""The benchmark of answers: both programs do the same work, and the table lands between its markers."""

from pathlib import Path

import pytest

from benchmarks import generate
from benchmarks.table import write_table
from lyrics.errors import InputError
from lyrics.model.lyrics import LyricsModel

ROOT = Path(__file__).parents[2]


def test_programs_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    found = generate.seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3 and found.keys() == {"a", "b"}


def test_both_read_prompts_of_the_same_length_and_rates_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    look = LyricsModel.look
    monkeypatch.setattr(LyricsModel, "look", lambda self, seen: looked.append(len(seen)) or look(self, seen))

    def fixed(programs: dict, rounds: int) -> dict[str, float]:
        for program in programs.values():
            program()
        return {"ours": 0.5, "theirs": 0.25, "ours, first": 0.002, "theirs, first": 0.001}

    monkeypatch.setattr(generate, "seconds", fixed)
    monkeypatch.setattr(generate, "NEW_TOKENS", 4)
    size, batch, prompt, *figures = generate.answering("tiny", 2, 1)
    assert (size, batch, figures) == ("tiny", "2", ["16", "32", "0.50", "0.50", "2.0", "1.0", "2.00"])
    assert looked == [2, 2]  # no round is spared by the one before, and no row by the one beside it
    words = generate.tokenizer("tiny")
    text = f"<s> {'image ' * 8} {' '.join(['umbrella image 1 2 3 4 ;'] * 5)} question: {generate.QUESTION}"
    assert int(prompt) == len(words(text, add_special_tokens=False)["input_ids"])


def test_each_size_is_built_as_wide_as_its_refiner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generate.LLAMA, "laptop", generate.LLAMA["tiny"])
    words = generate.tokenizer("laptop")
    made = generate.build("laptop", generate.language_model("laptop", words.eos_token_id), words)
    assert made.answer_batch([generate.QUESTION], made.see([generate.picture()]), max_new_tokens=2)


def test_the_table_goes_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text("before\n<!-- generate -->\nold\n<!-- /generate -->\nafter\n")
    write_table(document, "generate", generate.table(["a", "b"], [["1", "2"]]))
    assert document.read_text() == (
        "before\n<!-- generate -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- /generate -->\nafter\n"
    )
    with pytest.raises(InputError, match=r"must hold <!-- gone --> and, after it, <!-- /gone -->"):
        write_table(document, "gone", "")


def test_the_document_has_a_place_for_the_table() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert 0 < text.index("<!-- generate -->") < text.index("<!-- /generate -->")
