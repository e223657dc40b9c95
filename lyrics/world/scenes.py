"""Scenes of coloured glyphs: a scene graph with exact boxes and masks, and its picture.

Everything that a data set says about a picture follows from the `Scene`, so it is true by construction.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lyrics.world import vocabulary

Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
_REFERENCE_PX = 128
_DRAWN = 128  # a pixel belongs to an object when at least half of it is covered
_TRIES = 40
_PROBE_POINTS = 200.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One glyph. Boxes are whole pixels (x0, y0, x1, y1), the far edge exclusive, tight around visible pixels."""

    kind: str
    color: str
    size: vocabulary.Size
    side_px: int
    left: int
    top: int
    rgb: tuple[int, int, int]
    box_xyxy: tuple[int, int, int, int]

    @functools.cached_property
    def center(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box_xyxy
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ground:
    texture: str
    rgb: tuple[int, int, int]
    rgb_second: tuple[int, int, int]
    period: int
    phase: int
    vertical: bool

    @property
    def adjective(self) -> str:
        return (vocabulary.GROUNDS | vocabulary.GROUNDS_OOD)[self.texture]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects are in drawing order: a later one covers an earlier one."""

    image_size_px: int
    ood: bool
    ground: Ground
    objects: tuple[SceneObject, ...]

    @property
    def margin_px(self) -> float:
        """Centres nearer than this along an axis are neither left nor right of (above nor below) each other."""
        return 0.1 * self.image_size_px

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(item.kind for item in self.objects)

    def holds(self, first: SceneObject, relation: Relation, second: SceneObject) -> bool | None:
        """Whether `first` is `relation` `second`; None where the two are level within the margin."""
        axis = 0 if relation in ("left of", "right of") else 1
        difference = first.center[axis] - second.center[axis]
        if abs(difference) < self.margin_px:
            return None
        return (difference < 0) == (relation in ("left of", "above"))

    def find(self, *, kind: str | None = None, color: str | None = None, size: str | None = None) -> list[SceneObject]:
        """The objects with these attributes, e.g. `find(kind="star", color="red")`."""
        return [
            item
            for item in self.objects
            if (kind is None or item.kind == kind)
            and (color is None or item.color == color)
            and (size is None or item.size == size)
        ]


@functools.lru_cache(maxsize=8192)
def glyph(kind: str, side_px: int) -> np.ndarray:
    """Coverage 0–255 of one glyph, cropped to its ink; its longer side is `side_px`, give or take a thin stroke."""
    coverage = _ink(vocabulary.KINDS[kind], side_px * _PROBE_POINTS / max(_ink(vocabulary.KINDS[kind]).shape))
    coverage.setflags(write=False)
    return coverage


@functools.lru_cache(maxsize=256)
def _ink(character: str, points: float = _PROBE_POINTS) -> np.ndarray:
    """One character at a font size, cropped to the pixels at least half covered (a font's own box is wider)."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", points)
    x0, y0, x1, y1 = font.getbbox(character)
    canvas = Image.new("L", (int(x1 - x0) + 4, int(y1 - y0) + 4))
    ImageDraw.Draw(canvas).text((2 - x0, 2 - y0), character, fill=255, font=font)
    coverage = np.asarray(canvas)
    ys, xs = np.nonzero(coverage >= _DRAWN)
    return coverage[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].copy()


def sample_scene(
    generator: np.random.Generator, split: str, image_size_px: int = _REFERENCE_PX, max_objects: int = 5
) -> Scene:
    """Draw one scene graph. `test_ood` has more objects, other grounds, and only the held-out colour–kind pairs."""
    ood = split == "test_ood"
    count = int(generator.integers(max_objects, max_objects + 3)) if ood else _object_count(generator, max_objects)
    theme = vocabulary.THEMES[int(generator.integers(len(vocabulary.THEMES)))]
    placed: list[SceneObject] = []
    for _ in range(count):
        item = _place(generator, placed, _choose_kind(generator, theme, placed), ood, image_size_px)
        if item is not None:
            placed.append(item)
    owner = _owner(placed, image_size_px)
    objects = tuple(dataclasses.replace(o, box_xyxy=_tight_box(owner, i, o.box_xyxy)) for i, o in enumerate(placed))
    return Scene(image_size_px=image_size_px, ood=ood, ground=_sample_ground(generator, ood), objects=objects)


def masks(scene: Scene) -> np.ndarray:
    """Visible pixels of each object, (objects, height, width) bool."""
    indices = np.arange(len(scene.objects), dtype=np.int16)
    return _owner(scene.objects, scene.image_size_px)[None] == indices[:, None, None]


def render(scene: Scene) -> Image.Image:
    size = scene.image_size_px
    canvas = _draw_ground(scene.ground, size)
    for item in scene.objects:
        coverage = glyph(item.kind, item.side_px)
        area = np.s_[item.top : item.top + coverage.shape[0], item.left : item.left + coverage.shape[1]]
        alpha = coverage[..., None].astype(np.float32) / 255
        canvas[area] += alpha * (np.asarray(item.rgb, dtype=np.float32) - canvas[area])
    return Image.fromarray(np.rint(canvas).astype(np.uint8))


def _object_count(generator: np.random.Generator, max_objects: int) -> int:
    weights = np.array([3.0, 5, 6, 5, 4])[:max_objects] if max_objects <= 5 else np.ones(max_objects)
    return 1 + int(generator.choice(len(weights), p=weights / weights.sum()))


def _choose_kind(generator: np.random.Generator, theme: tuple[str, ...], placed: list[SceneObject]) -> str:
    """Sometimes a kind that is there already (counting needs it), often one of the theme, else any."""
    if placed and generator.random() < 0.25:
        return placed[int(generator.integers(len(placed)))].kind
    pool = theme if generator.random() < 0.5 else tuple(vocabulary.KINDS)
    return pool[int(generator.choice(len(pool), p=_popularity(pool)))]


@functools.cache
def _popularity(pool: tuple[str, ...]) -> np.ndarray:
    """The probability of each kind of `pool`."""
    weights = np.array([vocabulary.POPULARITY[kind] for kind in pool])
    return weights / weights.sum()


def _place(
    generator: np.random.Generator, placed: list[SceneObject], kind: str, ood: bool, image_size_px: int
) -> SceneObject | None:
    """Find room for one object that covers little of the others; None in a scene that is too full."""
    colors = vocabulary.colors_of(kind, ood)
    color = colors[int(generator.integers(len(colors)))]
    size: vocabulary.Size = "large" if generator.random() < (0.25 if ood else 0.5) else "small"
    jitter = generator.integers(-8, 9, size=3).tolist()
    rgb = tuple(min(max(v + j, 0), 255) for v, j in zip(vocabulary.COLORS[color], jitter, strict=True))
    for attempt in range(_TRIES):
        if attempt == _TRIES // 2:
            size = "small"
        low, high = (round(side * image_size_px / _REFERENCE_PX) for side in vocabulary.SIZES_PX[size])
        side_px = int(generator.integers(low, high + 1))
        height, width = glyph(kind, side_px).shape
        left = int(generator.integers(1, image_size_px - width))
        top = int(generator.integers(1, image_size_px - height))
        box = (left, top, left + width, top + height)
        if all(_overlap(box, other.box_xyxy) <= 0.05 for other in placed):
            assert len(rgb) == 3
            return SceneObject(
                kind=kind, color=color, size=size, side_px=side_px, left=left, top=top, rgb=rgb, box_xyxy=box
            )
    return None


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Shared area over the smaller area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(0, width) * max(0, height) / smaller


def _owner(objects: tuple[SceneObject, ...] | list[SceneObject], image_size_px: int) -> np.ndarray:
    """For each pixel the index of the object that is seen there, the last one drawn; -1 for the ground."""
    owner = np.full((image_size_px, image_size_px), -1, dtype=np.int16)
    for index, item in enumerate(objects):
        drawn = glyph(item.kind, item.side_px) >= _DRAWN
        owner[item.top : item.top + drawn.shape[0], item.left : item.left + drawn.shape[1]][drawn] = index
    return owner


def _tight_box(owner: np.ndarray, index: int, drawn_xyxy: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Around what is left of object `index` where it was drawn."""
    left, top, right, bottom = drawn_xyxy
    mask = owner[top:bottom, left:right] == index
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return left + int(xs[0]), top + int(ys[0]), left + int(xs[-1]) + 1, top + int(ys[-1]) + 1


def _sample_ground(generator: np.random.Generator, ood: bool) -> Ground:
    textures = tuple(vocabulary.GROUNDS_OOD if ood else vocabulary.GROUNDS)
    base = np.array(vocabulary.GROUND_COLORS[int(generator.integers(len(vocabulary.GROUND_COLORS)))])
    base = base + generator.integers(-6, 7, size=3)
    lift = int(generator.integers(14, 26))
    return Ground(
        texture=textures[int(generator.integers(len(textures)))],
        rgb=(int(base[0]), int(base[1]), int(base[2])),
        rgb_second=(int(base[0]) + lift, int(base[1]) + lift, int(base[2]) + lift),
        period=int(generator.integers(6, 15)),
        phase=int(generator.integers(0, 15)),
        vertical=bool(generator.integers(2)),
    )


def _draw_ground(ground: Ground, size: int) -> np.ndarray:
    """(size, size, 3) float32."""
    ys, xs = (axis + ground.phase for axis in np.ogrid[0:size, 0:size])  # each along its own axis only
    along, across = (xs, ys) if ground.vertical else (ys, xs)
    period = ground.period
    if ground.texture == "stripes":
        second = along // period % 2 == 0
    elif ground.texture == "dots":
        radius = period / 3
        second = (xs % period - period / 2) ** 2 + (ys % period - period / 2) ** 2 < radius**2
    elif ground.texture == "checker":
        second = (xs // period + ys // period) % 2 == 0
    elif ground.texture == "grid":
        second = (xs % period < 2) | (ys % period < 2)
    elif ground.texture == "waves":
        second = (along + 3 * np.sin(across / period * 2)) // period % 2 < 1
    elif ground.texture == "speckles":
        second = (xs * 7919 + ys * 104729 + (xs * ys) % 251 * 31) % 13 < 2
    else:
        second = np.zeros((1, 1), dtype=bool)
    both = np.array([ground.rgb, ground.rgb_second], dtype=np.float32)
    return both.take(np.broadcast_to(second, (size, size)), axis=0)
