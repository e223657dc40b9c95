"""The words of the glyph world: kinds, colours, sizes, grounds, and which colour–kind pairs are held out."""

from typing import Literal

KINDS: dict[str, str] = {
    "airplane": "✈",
    "cloud": "☁",
    "sun": "☀",
    "moon": "☾",
    "star": "★",
    "umbrella": "☂",
    "phone": "☎",
    "cup": "☕",
    "gear": "⚙",
    "envelope": "✉",
    "pencil": "✏",
    "note": "♫",
    "anchor": "⚓",
    "flag": "⚑",
    "skull": "☠",
    "crown": "♛",
    "castle": "♜",
    "horse": "♞",
    "flower": "✿",
    "heart": "♥",
    "snowflake": "❄",
    "spade": "♠",
    "club": "♣",
    "diamond": "♦",
}
"""Everyday name → the glyph of DejaVu Sans that draws it."""

THEMES: tuple[tuple[str, ...], ...] = tuple(tuple(KINDS)[start : start + 6] for start in range(0, len(KINDS), 6))
"""Kinds that like to appear together, so that co-occurrence carries information as it does in photographs."""

POPULARITY: dict[str, float] = {kind: 1.3 - 0.1 * theme.index(kind) for theme in THEMES for kind in theme}

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (228, 38, 38),
    "orange": (255, 138, 0),
    "yellow": (250, 228, 60),
    "green": (44, 186, 68),
    "blue": (52, 120, 255),
    "purple": (172, 78, 232),
    "pink": (255, 148, 200),
    "white": (246, 246, 246),
}

Size = Literal["small", "large"]
SIZES_PX: dict[Size, tuple[int, int]] = {"small": (24, 30), "large": (38, 50)}
"""Inclusive range of an object's longer side at an image size of 128 px."""

GROUNDS: dict[str, str] = {"plain": "plain", "stripes": "striped", "dots": "dotted", "checker": "checkered"}
GROUNDS_OOD: dict[str, str] = {"grid": "grid", "waves": "wavy", "speckles": "speckled"}
"""Texture → the adjective that captions use; the second set appears in `test_ood` alone."""

GROUND_COLORS: tuple[tuple[int, int, int], ...] = (
    (30, 32, 38),
    (44, 40, 36),
    (26, 40, 46),
    (46, 36, 50),
    (36, 46, 38),
)
"""Dark and nearly grey: every object colour stands out from each."""

NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_COLOR_NAMES = tuple(COLORS)
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    (_COLOR_NAMES[(index + shift) % len(_COLOR_NAMES)], kind) for index, kind in enumerate(KINDS) for shift in (0, 3)
)
"""(colour, kind) pairs that only `test_ood` shows: two colours of each kind, six kinds of each colour."""


def colors_of(kind: str, ood: bool) -> tuple[str, ...]:
    """The colours in which a split may show `kind`, or ask about it."""
    return tuple(color for color in COLORS if ((color, kind) in HELD_OUT) == ood)


def plural(noun: str) -> str:
    return f"{noun}s"


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def number_word(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)
