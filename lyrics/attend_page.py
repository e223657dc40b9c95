"""The page of `lyrics attend`: one HTML file without any outside reference and without scripts.

Shapes: V visual queries, G grounding queries, P patches, h × w grid, N objects, M tokens of the answer, Y language
layers.
"""

import base64
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from lyrics.attend import Examination
from lyrics.drawing import object_colour
from lyrics.model.occlusion import WAYS, Way
from lyrics.pages import template

_HERE = Path(__file__).parent
_MAX_SIDE_PX = 768
_QUALITY = 85
_SHADE_FULL = 0.5  # the share of attention that is shaded darkest
_LACKING: dict[Way, str] = {"local tokens": "local tokens", "spatial text": "spatial text", "both": "tokens and text"}
_LITTLE = 0.1  # nats: a tenth less probable
_MOST_FOLD = 1000
_DROP_FULL = 3.0  # nats: e⁻³ is a twentieth


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One map over the patches: `peak` is its largest share, `prefix` what goes to the class token."""

    name: str
    image: str
    peak: float
    prefix: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """A number or (`words`) a text in a table; `shade` in [0, 1], below 0 for the opposite colour."""

    text: str
    shade: float = 0.0
    words: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    cells: list[Cell]
    colour: str | None = None
    total: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    caption: str
    columns: list[str]
    rows: list[Row]


def render(examination: Examination, picture: Image.Image) -> str:
    names = object_names(examination)
    style = (_HERE / "evaluate" / "template" / "report.css", _HERE / "attend.css")
    return template(_HERE / "attend.html").render(
        e=examination,
        style="\n".join(path.read_text() for path in style),
        photo=data_uri(picture),
        width=picture.width,
        height=picture.height,
        names=names,
        colours=[_colour(n) for n in range(len(names))],
        boxes=_boxes(examination, picture),
        ways=WAYS,
        verdict=verdict(examination, names),
        leaned=leaned(examination, names),
        maps=[heat_map(f"layer {n}", weights_VP.mean(0), examination) for n, weights_VP in examination.visual.items()],
        maps_of_queries=[
            (f"layer {n}", [heat_map(f"query {v}", row_P, examination) for v, row_P in enumerate(weights_VP)])
            for n, weights_VP in examination.visual.items()
        ],
        uniform=1 / (examination.grid[0] * examination.grid[1] + examination.prefix_tokens),
        in_boxes=in_boxes(examination, names),
        grounding=grounding(examination, names),
        reading=reading(examination),
        language=language(examination, names),
        language_layers=language_by_layer(examination, names),
    )


def object_names(examination: Examination) -> list[str]:
    """`cup 2`: tags with their place, since several objects may share a tag."""
    return [f"{tag} {n}" for n, tag in enumerate(examination.seen.tags, start=1)]


def verdict(examination: Examination, names: list[str]) -> str | None:
    """Which object matters most, in one sentence; None without objects."""
    if not names:
        return None
    # What an object's tokens told may hide while its text is gone as well: the way that costs most counts.
    drops_N3 = np.array([leaning.drops for leaning in examination.leanings])
    first, way = np.unravel_index(drops_N3.argmax(), drops_N3.shape)
    nats = float(drops_N3[first, way])
    if nats < _LITTLE:
        return "Taking away any single object hardly lowers the answer's probability."
    times = f"more than {_MOST_FOLD}" if nats > math.log(_MOST_FOLD) else f"{math.exp(nats):.1f}"
    return (
        f"The answer leaned most on {names[first]}: without its {_LACKING[WAYS[way]]}, the answer is {times} times "
        f"less probable ({nats:.2f} nats)."
    )


def leaned(examination: Examination, names: list[str]) -> Table:
    """Objects × (drop without each way, attention of the language model, most attention of a grounding query)."""
    columns = [*(f"drop without {way}" for way in WAYS)]
    attention_K = examination.language_YMK.mean((0, 1))
    read = examination.object_places > 0
    looked = [weights_GL.max(0).values for weights_GL in examination.grounding.values()]
    rows = []
    for n, (name, leaning) in enumerate(zip(names, examination.leanings, strict=True)):
        cells = [_drop(value) for value in leaning.drops]
        if read:
            place = len(examination.places) - examination.object_places + n
            cells.append(_share(float(attention_K[place]), full=0.1))
        if looked:
            cells.append(_share(float(looked[-1][n + 1])))
        rows.append(Row(name=name, cells=[*cells, Cell(text=leaning.answer, words=True)], colour=_colour(n)))
    if examination.all_objects is not None:
        leaning = examination.all_objects
        blank = [Cell(text="")] * (read + bool(looked))
        cells = [*(_drop(value) for value in leaning.drops), *blank, Cell(text=leaning.answer, words=True)]
        rows.append(Row(name="all objects", cells=cells, total=True))
    columns += ["attention to its text"] * read + ["most by a grounding query, last layer"] * bool(looked)
    return Table(caption="", columns=[*columns, "answer without it"], rows=rows)


def in_boxes(examination: Examination, names: list[str]) -> Table:
    """How much of the visual queries' attention falls into each box, beside the box's share of the picture."""
    covers = [box_cover(box, examination.grid) for box in examination.seen.boxes_xyxy_N4]
    rows = []
    for n, (name, cover_P) in enumerate(zip(names, covers, strict=True)):
        cells = [Cell(text=f"{100 * cover_P.mean():.1f}")]
        for weights_VP in examination.visual.values():
            patches_P = weights_VP.mean(0).numpy()[examination.prefix_tokens :]
            cells.append(_share(float(patches_P @ cover_P)))
        rows.append(Row(name=name, cells=cells, colour=_colour(n)))
    return Table(
        caption="Share in each box, %", columns=["area", *(f"layer {n}" for n in examination.visual)], rows=rows
    )


def grounding(examination: Examination, names: list[str]) -> list[Table]:
    """For each layer, queries × `[nothing | objects]`."""
    tables = []
    for layer, weights_GL in examination.grounding.items():
        rows = [
            Row(name=f"query {g}", cells=[_share(share) for share in row]) for g, row in enumerate(weights_GL.tolist())
        ]
        rows.append(Row(name="mean", cells=[_share(share) for share in weights_GL.mean(0).tolist()], total=True))
        tables.append(Table(caption=f"Layer {layer}", columns=["nothing", *names], rows=rows))
    return tables


def reading(examination: Examination) -> Table:
    """Layers and kinds of query × what they read."""
    cut = len(examination.readings[0].to_question_T) if examination.readings else 0
    words = examination.question_tokens[:cut]
    rows = []
    for one in examination.readings:
        values = [one.to_visual, one.to_grounding, *one.to_question_T.tolist(), one.to_objects, one.to_special]
        rows.append(Row(name=f"layer {one.layer}, {one.kind}", cells=[_share(value) for value in values]))
    return Table(
        caption="Share of self-attention, %",
        columns=["visual queries", "grounding queries", *words, "spatial text", "[CLS], [SEP]"],
        rows=rows,
    )


def language(examination: Examination, names: list[str]) -> Table:
    """Tokens of the answer × places of the prompt, mean over layers."""
    shares_MK = examination.language_YMK.mean(0)
    rows = [
        Row(name=token.text, cells=_shares_and_rest(shares_K))
        for token, shares_K in zip(examination.tokens, shares_MK, strict=True)
    ]
    return Table(
        caption="Share of the language model's attention, %", columns=_place_names(examination, names), rows=rows
    )


def language_by_layer(examination: Examination, names: list[str]) -> Table:
    shares_YK = examination.language_YMK.mean(1)
    rows = [Row(name=f"layer {n}", cells=_shares_and_rest(shares_K)) for n, shares_K in enumerate(shares_YK)]
    return Table(caption="By layer, mean over the answer, %", columns=_place_names(examination, names), rows=rows)


def _place_names(examination: Examination, names: list[str]) -> list[str]:
    parts = examination.places[: len(examination.places) - examination.object_places]
    return [*parts, *names[: examination.object_places], "question and template"]


def _shares_and_rest(shares_K: Tensor) -> list[Cell]:
    return [_share(value) for value in [*shares_K.tolist(), max(0.0, 1 - float(shares_K.sum()))]]


def heat_map(name: str, weights_P: Tensor, examination: Examination) -> HeatMap:
    """Shares of attention over the grid, brightest where largest, as a PNG of one pixel a patch."""
    prefix = examination.prefix_tokens
    patches_hw = weights_P[prefix:].reshape(examination.grid).numpy()
    peak = float(patches_hw.max())
    relative_hw = patches_hw / peak
    rgba_hw4 = matplotlib.colormaps["inferno"](0.1 + 0.9 * relative_hw)
    rgba_hw4[..., 3] = 0.2 + 0.65 * relative_hw
    buffer = io.BytesIO()
    Image.fromarray((255 * rgba_hw4).round().astype(np.uint8), "RGBA").save(buffer, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return HeatMap(name=name, image=uri, peak=peak, prefix=float(weights_P[:prefix].sum()))


def box_cover(box_xyxy: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """cover_P: which share of each patch, row by row, a box in fractions of the picture covers."""
    x1, y1, x2, y2 = (float(value) for value in box_xyxy)
    sides = []
    for low, high, count in ((y1, y2, grid[0]), (x1, x2, grid[1])):
        edges = np.arange(count + 1) / count
        sides.append(np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) * count)
    return np.outer(*sides).ravel()


def data_uri(picture: Image.Image) -> str:
    """A JPEG of the decoded pixels: nothing else that the file may hold gets onto the page."""
    small = picture.convert("RGB")
    small.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _boxes(examination: Examination, picture: Image.Image) -> list[dict[str, Any]]:
    """Corner and size in pixels of the picture."""
    size = np.array([picture.width, picture.height] * 2)
    return [
        {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
        for x1, y1, x2, y2 in (examination.seen.boxes_xyxy_N4 * size).tolist()
    ]


def _share(value: float, full: float = _SHADE_FULL) -> Cell:
    return Cell(text=f"{100 * value:.1f}", shade=min(1.0, value / full))


def _drop(nats: float) -> Cell:
    text = f"{nats:+.2f}".replace("-", "−")
    return Cell(text="0.00" if abs(nats) < 0.005 else text, shade=max(-1.0, min(1.0, nats / _DROP_FULL)))


def _colour(index: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*object_colour(index))
