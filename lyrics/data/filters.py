"""Reasons to drop an image–text pair: one small function each, with its parameter.

A filter returns None for a pair that may stay, else a detail for the ledger: what it saw.
"""

import array
import functools
import itertools
import re
from collections.abc import Iterable

import ftfy
import imagehash
import numpy as np
from PIL import Image
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from lyrics.data import files

HASH_SIDE = 16
HASH_BITS = HASH_SIDE * HASH_SIDE
_BAND_BITS = 20
# Against all of its 139 languages the identifier often mistakes a three-word caption for a small relative of English.
COMMON_LANGUAGES = (
    *("ar", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it"),
    *("ja", "ko", "nl", "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh"),
)

_UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")
_BOILERPLATE = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "address": r"https?:|www\.|(?<![\w-])[\w-]+\.(?:com|net|org|info|html?|php)\b",
        "file name": r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|pdf)\b"
        r"|^\W*(?:img|dscn?|pict?|picture|photo|image|screen ?shot|scan|file|figure)[\W_]*\d[\d\W_]*$",
        "placeholder": r"^\W*(?:untitled|thumbnail|loading|placeholder|no image|default|none|logo|banner|avatar)\W*$"
        r"|\bimage (?:is )?(?:not|no longer|un)[ -]?(?:found|available)\b",
        "call to act": r"\bclick (?:here|to|on|for)\b"
        r"|\b(?:view|see) (?:the )?(?:full|large)[ -]?(?:size|image|version)\b"
        r"|\b(?:free|wallpapers?) downloads?\b|\bdownload (?:now|free|wallpapers?)\b|\bfree shipping\b"
        r"|\b(?:buy|order|shop) (?:this|it|now|online)\b|\badd to (?:cart|basket)\b|\bsubscribe\b|\bsign up\b",
        "stock": r"\bstock (?:photos?|images?|vectors?|illustrations?|footage|pictures?)\b|\broyalty[- ]free\b"
        r"|\b(?:shutterstock|getty ?images|alamy|istock(?:photo)?|dreamstime|depositphotos)\b",
        "rights": r"\bcopyright\b|©|\ball rights reserved\b",
        "by-line": r"^\W*(?:posted|published|uploaded) (?:by|on)\b",
        "markup": r"<[a-z/!][^<>]*>|&(?:amp|nbsp|quot|lt|gt|#\d+);|\{\{",
    }.items()
}


# How a whole file ends; the head of WebP tells the length instead.
_ENDS = {"jpg": b"\xff\xd9", "png": b"IEND\xae\x42\x60\x82", "gif": b";"}


def truncated(content: bytes) -> str | None:
    """A picture that cannot be decoded since its file stops early: it has a good head and lacks its end."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        announced = int.from_bytes(content[4:8], "little") + 8
        return f"{len(content)} of {announced} bytes" if len(content) < announced else None
    try:
        suffix, width, height = files.measure(content)
    except files.BadImageError:
        return None
    if suffix not in _ENDS or content.rstrip(b"\0\r\n").endswith(_ENDS[suffix]):
        return None
    return f"{width} × {height} {suffix} without its end"


def animated(content: bytes) -> str | None:
    return "several frames" if files.is_animated(content) else None


def tiny(width: int, height: int, min_side_px: int) -> str | None:
    return f"{width} × {height}" if min(width, height) < min_side_px else None


def extreme(width: int, height: int, max_aspect_ratio: float) -> str | None:
    ratio = max(width, height) / min(width, height)
    return f"{width} × {height}, {ratio:.1f} : 1" if ratio > max_aspect_ratio else None


def boilerplate(caption: str) -> str | None:
    """Text that a page carries whatever its picture shows: file names, addresses, calls to click or to buy."""
    for name, pattern in _BOILERPLATE.items():
        if pattern.search(caption):
            return name
    solid = [character for character in caption if not character.isspace()]
    if sum(map(str.isalpha, solid)) < 0.5 * len(solid):
        return "more digits and signs than letters"
    return None


def length(caption: str, min_words: int, max_words: int) -> str | None:
    """Words between spaces; in scripts without spaces a character counts as a word."""
    words = len(caption.split()) + len(_UNSPACED.findall(caption))
    return None if min_words <= words <= max_words else f"{words} words"


def repetition(caption: str, max_repetition: float) -> str | None:
    """The same words again and again: the share of neighbouring pairs of words that were there before."""
    words = caption.casefold().split()
    neighbours = list(itertools.pairwise(words))
    repeated = 1 - len(set(neighbours)) / max(len(neighbours), 1)
    return f"{repeated:.0%} said before" if neighbours and repeated > max_repetition else None


def repaired(caption: str) -> str:
    """Text whose bytes were read in a wrong encoding, read in the right one: `cafÃ©` as `café`; other text as it is."""
    return ftfy.fix_encoding(caption)


def encoding(caption: str) -> str | None:
    """Characters that were lost when bytes were read in a wrong encoding: nothing brings them back."""
    lost = caption.count("\ufffd")
    return f"{lost} lost characters" if lost else None


def word_pattern(words: Iterable[str]) -> re.Pattern[str] | None:
    """Finds the words and phrases, whole and in any case; None for no words."""
    phrases = [r"\s+".join(map(re.escape, word.split())) for word in words]
    return re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.IGNORECASE) if phrases else None


def unsafe(caption: str, pattern: re.Pattern[str] | None) -> str | None:
    found = pattern.search(caption) if pattern else None
    return found and found.group().casefold()


def language(caption: str, min_english_probability: float) -> str | None:
    """Another language than English.

    English gets the benefit of the doubt (a low threshold): character statistics of a caption of three words are weak.
    """
    ranking = _identifier().rank(caption)
    english = float(dict(ranking)["en"])
    return f"{ranking[0][0]}, English {english:.3f}" if english < min_english_probability else None


@functools.cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(COMMON_LANGUAGES)
    return identifier


def perceptual_hash(image: Image.Image) -> str:
    """256 bits of low frequencies as hex: stable under resizing and re-encoding."""
    bits = imagehash.phash(image, hash_size=HASH_SIDE).hash
    return np.packbits(bits).tobytes().hex()  # as the str() of an ImageHash, which goes bit by bit


class DuplicateIndex:
    """Finds the first picture added whose hash differs in at most `max_bits` bits.

    The hash is cut into so many bands that two hashes that close differ in at most one bit of at least one band. So
    only pictures are compared that share a band up to one bit; at twenty bits a band these are few even among millions.
    For each picture its hash, its place in the chains of its bands and its name are held: some 130 bytes.
    """

    def __init__(self, max_bits: int) -> None:
        if not 0 <= max_bits < HASH_BITS // 8:
            raise ValueError(f"max_bits is {max_bits}; from {HASH_BITS // 8} of {HASH_BITS} on, bands say nothing")
        edges = np.linspace(0, HASH_BITS, max_bits // 2 + 2).astype(int)
        self._starts: list[int] = edges[:-1].tolist()
        widths = np.minimum(np.diff(edges), _BAND_BITS).tolist()
        self._masks = [(1 << width) - 1 for width in widths]
        flips = [(band, flip) for band, width in enumerate(widths) for flip in (0, *(1 << bit for bit in range(width)))]
        self._probe_bands, self._probe_flips = np.array(flips).T
        self._max_bits = max_bits
        self._heads = np.zeros((len(widths), 1 << _BAND_BITS), np.int32)  # the last picture of a chain, from 1
        self._earlier = np.zeros((1024, len(widths)), np.int32)  # the one before it
        self._hashes = np.zeros((1024, HASH_BITS // 64), np.uint64)
        self._names = bytearray()
        self._name_ends = array.array("q", [0])

    def __len__(self) -> int:
        return len(self._name_ends) - 1

    def find(self, hash_hex: str) -> int | None:
        """The number, in order of adding, of the first picture that looks like this."""
        numbers = self.candidates(hash_hex)
        distances = np.bitwise_count(self._hashes[numbers] ^ _words(hash_hex)).sum(1)
        within = numbers[distances <= self._max_bits]
        return int(within[0]) if within.size else None

    def candidates(self, hash_hex: str) -> np.ndarray:
        """Numbers, in order of adding, of the pictures whose hash shares a band with this one, up to one bit."""
        at = self._heads[self._probe_bands, self._keys(hash_hex)[self._probe_bands] ^ self._probe_flips]
        bands = self._probe_bands
        near = []
        while (alive := at > 0).any():
            at, bands = at[alive] - 1, bands[alive]
            near.append(at)
            at = self._earlier[at, bands]
        return np.unique(np.concatenate(near)) if near else np.zeros(0, np.int64)

    def add(self, name: str, hash_hex: str) -> None:
        number = len(self)
        if number == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
            self._earlier = np.concatenate([self._earlier, np.zeros_like(self._earlier)])
        bands, keys = np.arange(len(self._starts)), self._keys(hash_hex)
        self._earlier[number] = self._heads[bands, keys]
        self._heads[bands, keys] = number + 1
        self._hashes[number] = _words(hash_hex)
        self._names += name.encode("utf-8", "surrogatepass")
        self._name_ends.append(len(self._names))

    def name(self, number: int) -> str:
        start, end = self._name_ends[number : number + 2]
        return self._names[start:end].decode("utf-8", "surrogatepass")

    def find_or_add(self, name: str, hash_hex: str) -> str | None:
        """The name of the picture that this one repeats; None for a new one, which is remembered."""
        original = self.find(hash_hex)
        if original is not None:
            return self.name(original)
        self.add(name, hash_hex)
        return None

    def _keys(self, hash_hex: str) -> np.ndarray:
        value = int(hash_hex, 16)
        return np.array([value >> start & mask for start, mask in zip(self._starts, self._masks, strict=True)])


def _words(hash_hex: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(hash_hex), np.uint64)


def better_captions(image_embeddings_NE: np.ndarray, text_embeddings_NE: np.ndarray) -> np.ndarray:
    """For each of N pairs, the share of the other captions that fit its picture better than its own, in [0, 1].

    A rank, so that the threshold means the same for a well and for a poorly fitted image–text model: a caption chosen
    at random is at 0.5 on average, whatever the model.
    """
    similarity_NN = image_embeddings_NE @ text_embeddings_NE.T
    better = (similarity_NN > np.diagonal(similarity_NN)[:, None]).sum(1)
    return better / max(len(similarity_NN) - 1, 1)


def mismatched(better_share: float, max_better_captions: float) -> str | None:
    return f"{better_share:.0%} of other captions fit better" if better_share > max_better_captions else None
