"""VQA accuracy as the VQA challenge defines it (github.com/GT-Vision-Lab/VQA, vqaEval.py).

An answer scores min(matches / 3, 1), averaged over leaving out each of the (ten) people who answered. Spelling is
normalised only where those people disagree: a unanimous reference is compared letter by letter, as the official script
does it.
"""

import re
from collections.abc import Sequence

_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the official call passes re.UNICODE (32) where `count` stands

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Spellings that lack one apostrophe → the contraction: the challenge's table, with its one reversed entry."""
    table = {
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTED.split()
        for place, letter in enumerate(word)
        if letter == "'"
    }
    return table | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def normalise(answer: str) -> str:
    """Settle punctuation, number words, articles, contractions and case as the official script does."""
    text = answer
    has_comma_in_number = _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        beside_space = mark + " " in answer or " " + mark in answer
        text = text.replace(mark, "" if beside_space or has_comma_in_number else " ")
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of one answer against people's answers, in [0, 1]."""
    assert references, "a question without reference answers cannot be scored"
    answer = _one_line(answer)
    references = [_one_line(reference) for reference in references]
    if len(set(references)) > 1:
        answer = normalise(answer)
        references = [normalise(reference) for reference in references]
    matches = [reference == answer for reference in references]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
