import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from lyrics.errors import InputError
from lyrics.foundation import tokenizer as part

LINES = ["A red umbrella above two blue stars.", "umbrella 12 45 78 91; star 3 4 20 30;"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tokenizer")
    part.train_wordpiece(LINES, 200).save(str(made / "tokenizer.json"))
    return made


def test_numbers_of_the_grid_and_its_signs_are_one_token_each(folder):
    loaded = part.load_text_tokenizer(folder)
    for word in [*map(str, range(100)), ";", "[DEC]"]:
        assert len(loaded.tokenize(word)) == 1, word
    assert loaded.tokenize("Umbrella 12 45 78 91;") == ["umbrella", "12", "45", "78", "91", ";"]


def test_special_tokens_stand_where_bert_puts_them(folder):
    loaded = part.load_text_tokenizer(folder)
    named = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    assert loaded.convert_tokens_to_ids(named) == list(range(6))
    assert (loaded.pad_token, loaded.bos_token, loaded.mask_token) == ("[PAD]", "[DEC]", "[MASK]")
    assert loaded.convert_ids_to_tokens(loaded("A STAR")["input_ids"]) == ["[CLS]", "a", "star", "[SEP]"]
    assert loaded.decode(loaded("a red star [MASK]")["input_ids"], skip_special_tokens=True) == "a red star"


def test_two_fits_are_the_same_bytes(folder, tmp_path):
    part.train_wordpiece(LINES, 200).save(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@given(
    lines=st.lists(
        st.text(st.sampled_from("aÉ\u0301Σ 9;字\t\x1c\u00a0\u3000\r\n\u00ad") | st.characters(codec="utf-8"))
    )
)
def test_words_are_those_that_whole_lines_are_split_into(lines):
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    whole = Counter(word for line in lines for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line)))
    assert list(part.count_words(lines, normalizer, splitter).items()) == list(whole.items())


def test_a_tokenizer_without_weights_does_not_import_torch(folder):
    code = "import sys; from pathlib import Path; from lyrics.foundation import tokenizer as part\n"
    code += "assert part.bert_state(Path(sys.argv[1])) is None and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def test_vocabulary_is_no_larger_than_asked_and_a_too_small_one_is_refused():
    assert part.train_wordpiece(LINES, 130).get_vocab_size() == 130
    with pytest.raises(InputError, match=r"vocabulary_size is 100; it must be above \d+"):
        part.train_wordpiece(LINES, 100)


def test_a_taken_tokenizer_gains_dec_and_loses_padding_and_cutting(tmp_path):
    given = part.train_wordpiece(LINES, 200)
    document = json.loads(given.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] != "[DEC]"]
    vocabulary = document["model"]["vocab"]
    del vocabulary["[DEC]"]
    document["model"]["vocab"] = {word: i for i, word in enumerate(sorted(vocabulary, key=lambda w: vocabulary[w]))}
    for token in document["added_tokens"]:
        token["id"] = document["model"]["vocab"][token["content"]]
    for entry in document["post_processor"]["special_tokens"].values():
        entry["ids"] = [document["model"]["vocab"][entry["id"]]]
    bert = Tokenizer.from_str(json.dumps(document))
    bert.enable_padding(length=64)
    bert.enable_truncation(8)
    bert.save(str(tmp_path / "bert.json"))
    part._take(tmp_path / "bert.json", tmp_path / "tokenizer.json")
    loaded = part.load_text_tokenizer(tmp_path)
    assert loaded.bos_token_id == len(vocabulary)  # after what was there, so that no row of BERT's embeddings moves
    assert len(loaded(" ".join(["star"] * 20))["input_ids"]) == 22
    assert part.bert_state(tmp_path) is None


def test_a_missing_part_says_how_to_make_it(tmp_path):
    with pytest.raises(InputError, match="python -m lyrics foundation tokenizer"):
        part.load_text_tokenizer(tmp_path)
