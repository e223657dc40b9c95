"""Web pairs in any number, whose dirt is known: pair `number` depends on nothing but its number.

Pictures are noise of several sizes laid over each other, the coarse the stronger, as in photographs. Of a hundred pairs
`PLANTED` says which are dirty; a copy repeats an earlier clean picture.
"""

import dataclasses
import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from lyrics.data.webdataset import WebPair, write_tar
from lyrics.io import write_bytes, write_text

SIDE_PX = 128
PAIRS_PER_TAR = 500
HELD_OUT = 50
# Of each hundred: where in it, and what. Copies are named by what was done to the picture.
PLANTED = {
    5: "same bytes",
    25: "recompressed",
    45: "smaller",
    65: "larger",
    85: "brighter",
    10: "broken",
    20: "truncated",
    30: "tiny",
    40: "extreme",
    50: "unsafe",
    60: "boilerplate",
    70: "length",
    80: "repetition",
    90: "language",
    95: "leaked",
}
COPIES = ("same bytes", "recompressed", "smaller", "larger", "brighter")
_CLEAN_PLACES = [place for place in range(100) if place not in PLANTED]
_NOISE_SIDES = (32, 16, 8, 4)
_CAPTIONS = {
    "unsafe": "A forbidden phrase beside the {} {}",
    "boilerplate": "Click here to see the {} {}",
    "length": "{1}",
    "repetition": "{} {} big sale big sale big sale big sale big sale big sale",
    "language": "Ein schönes Bild von einem Haus auf dunklem Grund, mit Fenster und Tür",
}
_ADJECTIVES = ("small", "large", "wooden", "bright", "old", "narrow", "quiet", "painted", "heavy", "round")
_THINGS = ("house", "bridge", "bicycle", "table", "window", "garden", "street", "basket", "mountain", "river")
_PLACES = ("in the morning", "near the water", "on the hill", "behind the market", "under the trees", "in winter")


@dataclasses.dataclass(frozen=True)
class Planted:
    """What pair `number` is: `kind` is empty for a clean one.

    `original` is the number of the picture that it repeats: of a pair, or of a picture that measures (leaked).
    """

    number: int
    kind: str = ""
    original: int | None = None

    @property
    def reason(self) -> str:
        """Why `clean` should drop it; empty if it should not."""
        return "duplicate" if self.kind in COPIES else self.kind

    @property
    def motif(self) -> tuple[bool, int]:
        """Equal for all pairs that show the same."""
        return self.kind == "leaked", self.number if self.original is None else self.original


def key(number: int) -> str:
    return f"{number:09d}"


def planted(number: int) -> Planted:
    """The first hundred has no copies, so that each finds an earlier original."""
    kind = PLANTED.get(number % 100, "")
    if kind in COPIES:
        if number < 100:
            return Planted(number)
        draw = np.random.default_rng([1, number])
        return Planted(number, kind, 100 * int(draw.integers(number // 100)) + int(draw.choice(_CLEAN_PLACES)))
    return Planted(number, kind, number // 100 % HELD_OUT if kind == "leaked" else None)


def picture(number: int, collection: int = 0) -> Image.Image:
    """RGB, `SIDE_PX` wide and high. Args: collection: another one has other pictures."""
    draw = np.random.default_rng([2, collection, number])
    finest, *coarser = (Image.fromarray(draw.integers(0, 256, (n, n, 3), np.uint8)) for n in _NOISE_SIDES)
    for layer in coarser:
        finest = Image.blend(finest, layer.resize(finest.size, Image.Resampling.BICUBIC), 0.6)
    return finest.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)


def pair(number: int) -> WebPair:
    what = planted(number)
    content = _content(what)
    meta = {"url": f"https://pictures.example/{number}.jpg", "width": SIDE_PX, "height": SIDE_PX}
    return WebPair(key=key(number), image_bytes=content, caption=_caption(what), meta=meta)


def write(folder: Path, count: int) -> None:
    """A project's inputs of `clean`: the tars, the pictures that measure, and the list of unsafe words."""
    pairs = map(pair, range(count))
    for shard in range(-(-count // PAIRS_PER_TAR)):
        write_tar(folder / f"data/raw/web/{shard:05d}.tar", itertools.islice(pairs, PAIRS_PER_TAR))
    for number in range(HELD_OUT):
        write_bytes(folder / f"data/raw/val/images/{key(number)}.jpg", _jpeg(picture(number, collection=1), 92))
    write_text(folder / "params/unsafe_words.txt", "forbidden phrase\n")


def _content(what: Planted) -> bytes:
    if what.kind == "leaked":
        return _jpeg(picture(what.original or 0, collection=1), 60)
    if what.original is not None:
        image = picture(what.original)
        stored = _jpeg(image, 92)
        return stored if what.kind == "same bytes" else _again(Image.open(io.BytesIO(stored)), what.kind)
    image = picture(what.number)
    if what.kind == "tiny":
        return _jpeg(image.resize((32, 32)), 92)
    if what.kind == "extreme":
        return _jpeg(image.resize((6 * 64, 64)), 92)
    content = _jpeg(image, 92)
    if what.kind == "broken":
        return b"<html>404</html>" + content[:200]
    return content[: len(content) // 2] if what.kind == "truncated" else content


def _again(stored: Image.Image, kind: str) -> bytes:
    """The same picture as another site would serve it."""
    if kind == "recompressed":
        return _jpeg(stored, 50)
    if kind == "brighter":
        return _jpeg(ImageEnhance.Brightness(stored).enhance(1.15), 85)
    scale = {"smaller": 0.7, "larger": 1.5}[kind]
    return _jpeg(stored.resize((round(scale * SIDE_PX),) * 2, Image.Resampling.BICUBIC), 80)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _caption(what: Planted) -> str:
    n = what.number
    words = _ADJECTIVES[n % 10], _THINGS[n // 10 % 10]
    known = _CAPTIONS.get(what.kind)
    return known.format(*words) if known else f"The {' '.join(words)} number {n} {_PLACES[n // 100 % len(_PLACES)]}"
