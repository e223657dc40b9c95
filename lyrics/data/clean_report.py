"""What cleaning did, counted, with examples, and scored where the truth about the dirt is known."""

import bisect
import collections
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lyrics.data.disk_index import Index
from lyrics.data.rows import read_rows

REASONS = (
    *("broken", "truncated", "animated", "tiny", "extreme"),
    *("unsafe", "boilerplate", "length", "repetition", "encoding", "language"),
    *("leaked", "duplicate", "mismatched", "look_alike"),
)
# Reasons that name a kind of dirt: a file that stops early is known as broken too.
NAMES = {reason: (reason,) for reason in REASONS} | {"broken": ("broken", "truncated")}
BINS: dict[str, list[float]] = {
    "shorter side, px": [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024],
    "longer by shorter side": [1.25, 1.5, 2, 3, 4, 6],
    "words": [1, 2, 4, 8, 16, 32, 64, 128],
}
_EXAMPLES = 8


def summary(ledger: Iterable[dict], not_checked: dict[str, int]) -> dict[str, Any]:
    """Counts, distributions before and after, and a few dropped pairs a reason.

    The rows of the ledger come with their captions and sizes.
    """
    dropped: collections.Counter[str] = collections.Counter()
    examples: dict[str, list[dict]] = {reason: [] for reason in REASONS}
    distributions = {name: {w: [0] * (len(edges) + 1) for w in ("before", "after")} for name, edges in BINS.items()}
    pairs = repaired = 0
    for row in ledger:
        pairs += 1
        repaired += row["repaired"] and row["kept"]
        for name, value in _measures(row).items():
            place = bisect.bisect_right(BINS[name], value)
            distributions[name]["before"][place] += 1
            distributions[name]["after"][place] += row["kept"]
        if not row["kept"]:
            dropped[row["reason"]] += 1
            if len(examples[row["reason"]]) < _EXAMPLES:
                examples[row["reason"]].append({name: row[name] for name in ("key", "shard", "detail", "caption")})
    return {
        "pairs": pairs,
        "kept": pairs - dropped.total(),
        "dropped": {reason: dropped[reason] for reason in REASONS},
        "repaired": repaired,
        "not_checked": not_checked,
        "distributions": distributions,
        "examples": {reason: rows for reason, rows in examples.items() if rows},
        "score": None,
    }


def _measures(row: Mapping[str, Any]) -> dict[str, float]:
    """What is counted in `BINS`; a picture that cannot be decoded has no sides."""
    measures: dict[str, float] = {"words": len(row["caption"].split())}
    if row["width"]:
        short, long = sorted((row["width"], row["height"]))
        measures |= {"shorter side, px": short, "longer by shorter side": long / short}
    return measures


def read_truth(path: Path) -> Iterator[tuple[str, str]]:
    """Keys with their kind of dirt, `clean` for none."""
    return ((row["key"], row["dirt"]) for row in read_rows(path))


def score(ledger: Iterable[dict], truth: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Precision and recall of the drops. A dirty pair counts as found whichever reason it was dropped for.

    Per reason: `precision` is the share of its drops that are dirty in any way, `recall` the share of that dirt that
    was dropped, `named` the share that was dropped for that very reason; None where there is nothing to share.
    """
    of_kind, found, named = collections.Counter[str](), collections.Counter[str](), collections.Counter[str]()
    dropped, rightly = collections.Counter[str](), collections.Counter[str]()
    with contextlib.closing(Index()) as reasons:  # on disk: the two need not come in the same order
        for row in ledger:
            if not row["kept"]:
                reasons.add(row["key"], value=row["reason"])
        for key, kind in truth:
            reason = reasons.get(key)
            of_kind[kind] += 1
            if reason is not None:
                dropped[reason] += 1
                rightly[reason] += kind != "clean"
                found[kind] += 1
                named[kind] += reason in NAMES.get(kind, ())
    return {
        "precision": _share(rightly.total(), dropped.total()),
        "recall": _share(rightly.total(), of_kind.total() - of_kind["clean"]),
        "reasons": {
            reason: {
                "precision": _share(rightly[reason], dropped[reason]),
                "recall": _share(found[reason], of_kind[reason]),
                "named": _share(named[reason], of_kind[reason]),
                "dropped": dropped[reason],
                "truth": of_kind[reason],
            }
            for reason in REASONS
        },
    }


def metrics(report: dict[str, Any]) -> dict[str, float]:
    """The report as figures for the tracker; what is not known is left out."""
    values = {f"clean/{name}": report[name] for name in ("pairs", "kept", "repaired")}
    values |= {f"clean/dropped_{reason}": count for reason, count in report["dropped"].items()}
    values |= {f"clean/not_checked_{reason}": count for reason, count in report["not_checked"].items()}
    if report["score"]:
        values |= {f"clean/{name}": report["score"][name] for name in ("precision", "recall")}
        for reason, scores in report["score"]["reasons"].items():
            values |= {f"clean/{name}_{reason}": scores[name] for name in ("precision", "recall")}
    return {name: float(value) for name, value in values.items() if value is not None}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
