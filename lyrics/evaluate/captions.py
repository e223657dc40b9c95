"""Caption metrics by pycocoevalcap. Tokens decide the scores, so the tokenizer travels with them by name."""

import dataclasses
import functools
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

PTB = "PTB (Stanford CoreNLP 3.4.1)"
FALLBACK = "regular expressions (PTB-like; no Java here)"
SPICE_ABSENT = "SPICE needs the Stanford CoreNLP 3.6 models, which pycocoevalcap does not carry"
_JAVA_TIMEOUT_S = 300
_SPLIT_CLITIC = re.compile(r"(n't|'(?:s|m|d|ll|re|ve))(?![\w'])")
_TOKEN = re.compile(r"n't|'(?:s|m|d|ll|re|ve)(?!\w)|\w+(?:[-./:,]\w+)*|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class CaptionScores:
    """Corpus scores by metric name (`cider`, `bleu_1` … `bleu_4`, `rouge_l`, `meteor`) and CIDEr of each caption."""

    corpus: dict[str, float]
    cider: list[float]


@functools.cache
def has_java() -> bool:
    """Whether a Java that starts is here; some systems have a `java` that only says where to get one."""
    return bool(shutil.which("java")) and not subprocess.run(["java", "-version"], capture_output=True).returncode


def tokenizer_name() -> str:
    return PTB if has_java() else FALLBACK


def tokenize(sentences: Sequence[str]) -> list[str]:
    """Lower-case tokens joined by spaces, punctuation removed as the COCO caption evaluation does it.

    One Java process for all `sentences`, fed through pipes: the library's own wrapper writes beside its code.
    """
    lines = [" ".join(sentence.split()) for sentence in sentences]
    tokenized = _tokenize_ptb(lines) if has_java() else [_tokenize_fallback(line) for line in lines]
    assert len(tokenized) == len(lines), f"{len(lines)} captions became {len(tokenized)} tokenized lines"
    return tokenized


def _tokenize_ptb(lines: Sequence[str]) -> list[str]:
    from pycocoevalcap.tokenizer import ptbtokenizer

    if not lines:
        return []
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(line + "\n" for line in lines)
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False, timeout=_JAVA_TIMEOUT_S)
    if done.returncode:
        reason = done.stderr.decode(errors="replace")[-500:]
        raise RuntimeError(f"Java's PTB tokenizer failed with exit status {done.returncode}: {reason}")
    removed = set(ptbtokenizer.PUNCTUATIONS)
    output = done.stdout.decode().split("\n")[: len(lines)]
    return [" ".join(token for token in line.split() if token not in removed) for line in output]


def _tokenize_fallback(line: str) -> str:
    """Words, numbers and clitics as PTB splits them (`don't` → `do n't`), single punctuation marks dropped.

    Differs from PTB in abbreviations, currencies and rare symbols; equal on plain English sentences.
    """
    spaced = _SPLIT_CLITIC.sub(r" \1", line.lower().replace("’", "'").replace("cannot", "can not"))
    tokens = _TOKEN.findall(spaced)
    return " ".join(token for token in tokens if re.search(r"\w", token) or token in "&%$#@*+=")


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """CIDEr, BLEU and ROUGE-L of tokenized captions; CIDEr's document frequencies are those of `references`."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    expected = {i: list(refs) for i, refs in enumerate(references)}
    found = {i: [prediction] for i, prediction in enumerate(predictions)}
    bleu, _ = Bleu(4).compute_score(expected, found, verbose=0)
    cider, each = Cider().compute_score(expected, found)
    rouge, _ = Rouge().compute_score(expected, found)
    corpus = {"cider": float(cider), "rouge_l": float(rouge)}
    corpus |= {f"bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)}
    return CaptionScores(corpus, [float(value) for value in each])


class MeteorProcess:
    """METEOR 1.5 through the library, one Java process (about ten seconds to start) for any number of sets."""

    def __init__(self) -> None:
        from pycocoevalcap.meteor.meteor import Meteor

        self._meteor = Meteor()

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """METEOR of tokenized captions."""
        expected = {i: list(refs) for i, refs in enumerate(references)}
        value, _ = self._meteor.compute_score(expected, {i: [text] for i, text in enumerate(predictions)})
        return float(value)


def meteor_absent(wanted: bool) -> str | None:
    """Why METEOR cannot or shall not be computed; None when it can."""
    if not wanted:
        return "switched off by evaluate.meteor (it costs about ten seconds)"
    if not has_java():
        return "METEOR needs Java, which is not on this machine"
    return None
