"""The page of cleaning: one HTML file without any outside reference and without scripts."""

import base64
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lyrics.data import files
from lyrics.data.clean_report import BINS, REASONS
from lyrics.data.webdataset import WebPair, read_pairs
from lyrics.pages import template

_HERE = Path(__file__).parent
_THUMBNAIL_PX = 144
_QUALITY = 80


def render(report: Mapping[str, Any], thumbnails: Mapping[tuple[str, str], str]) -> str:
    """Args: report: as in report.json. thumbnails: data URIs of what can be decoded, by shard and key."""
    return template(_HERE / "clean_page.html").render(
        report=report,
        funnel=funnel(report),
        sheets={
            reason: [
                {**row, "picture": thumbnails.get((row["shard"], row["key"]))} for row in report["examples"][reason]
            ]
            for reason in REASONS
            if reason in report["examples"]
        },
        distributions=[distribution(name, report["distributions"][name]) for name in BINS],
    )


def funnel(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reasons that dropped something, in their order: what came, what of it was dropped, what went on."""
    steps, came = [], report["pairs"]
    scores = (report["score"] or {}).get("reasons", {})
    for reason in REASONS:  # JSON sorts its keys
        dropped = report["dropped"][reason]
        if dropped:
            score = scores.get(reason, {})
            known = {name: score.get(name) for name in ("precision", "recall")}
            steps.append({"reason": reason, "came": came, "dropped": dropped, "left": came - dropped, **known})
            came -= dropped
    return steps


def distribution(name: str, counts: Mapping[str, list[int]]) -> dict[str, Any]:
    """Shares of all pairs that came and of all that were kept, bin by bin."""
    edges = BINS[name]
    names = [f"< {edges[0]:g}", *(f"{low:g} – {high:g}" for low, high in itertools.pairwise(edges))]
    totals = {when: max(sum(counts[when]), 1) for when in ("before", "after")}
    largest = max(count / totals[when] for when in totals for count in counts[when]) or 1
    rows = [
        {"name": label, **{when: counts[when][n] for when in totals}}
        | {f"{when}_width": 100 * counts[when][n] / totals[when] / largest for when in totals}
        for n, label in enumerate([*names, f"≥ {edges[-1]:g}"])
    ]
    return {"name": name, "rows": rows}


def thumbnails(tars: Iterable[Path], examples: Mapping[str, Iterable[Mapping[str, str]]]) -> dict[tuple[str, str], str]:
    """Small pictures of the examples, of those that can be decoded; each shard that has one is read once."""
    wanted: dict[str, set[str]] = {}
    for rows in examples.values():
        for row in rows:
            wanted.setdefault(row["shard"], set()).add(row["key"])
    found = {}
    for tar in tars:
        for pair in _until_all(tar, wanted.get(tar.name, set())):
            try:
                found[tar.name, pair.key] = _data_uri(pair.image_bytes or b"")
            except files.BadImageError:
                continue  # broken or cut: the page says that there is no picture
    return found


def _until_all(tar: Path, keys: set[str]) -> Iterator[WebPair]:
    left = set(keys)
    for pair in read_pairs(tar) if left else ():
        if pair.key in left:
            left.remove(pair.key)
            yield pair
            if not left:
                return


def _data_uri(content: bytes) -> str:
    """A JPEG of the decoded pixels: nothing else that the file may hold gets onto the page."""
    small = files.decode(content)
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
