"""What cleaning did, counted, with examples, and scored where the truth about the dirt is known."""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

REASONS = (
    *("broken", "truncated", "animated", "tiny", "extreme"),
    *("unsafe", "boilerplate", "length", "repetition", "encoding", "language"),
    *("leaked", "duplicate", "mismatched"),
)
# Reasons that name a kind of dirt: a file that stops early is known as broken too.
NAMES = {reason: (reason,) for reason in REASONS} | {"broken": ("broken", "truncated")}
_EXAMPLES = 8


def summary(ledger: Sequence[dict], captions: Sequence[str], not_checked: dict[str, int]) -> dict[str, Any]:
    """Counts and a few dropped pairs a reason; `captions` go with the rows of the ledger."""
    dropped = collections.Counter(row["reason"] for row in ledger if not row["kept"])
    examples: dict[str, list[dict]] = {reason: [] for reason in REASONS if dropped[reason]}
    for row, caption in zip(ledger, captions, strict=True):
        if not row["kept"] and len(examples[row["reason"]]) < _EXAMPLES:
            shown = {name: row[name] for name in ("key", "shard", "detail")}
            examples[row["reason"]].append({**shown, "caption": caption})
    return {
        "pairs": len(ledger),
        "kept": sum(row["kept"] for row in ledger),
        "dropped": {reason: dropped[reason] for reason in REASONS},
        "repaired": sum(row["repaired"] and row["kept"] for row in ledger),
        "not_checked": not_checked,
        "examples": examples,
        "score": None,
    }


def read_truth(path: Path) -> dict[str, str]:
    """Key → kind of dirt, `clean` for none."""
    return {row["key"]: row["dirt"] for row in pq.read_table(path).to_pylist()}


def score(ledger: Sequence[dict], dirt: dict[str, str]) -> dict[str, Any]:
    """Precision and recall of the drops. A dirty pair counts as found whichever reason it was dropped for.

    Per reason: `precision` is the share of its drops that are dirty in any way, `recall` the share of that dirt that
    was dropped, `named` the share that was dropped for that very reason; None where there is nothing to share.
    """
    dropped = {row["key"]: row["reason"] for row in ledger if not row["kept"] and row["key"] in dirt}
    dirty = {key for key, kind in dirt.items() if kind != "clean"}
    reasons = {}
    for reason in REASONS:
        for_it = [key for key, why in dropped.items() if why == reason]
        of_it = [key for key, kind in dirt.items() if kind == reason]
        reasons[reason] = {
            "precision": _share(key in dirty for key in for_it),
            "recall": _share(key in dropped for key in of_it),
            "named": _share(dropped.get(key) in NAMES[reason] for key in of_it),
            "dropped": len(for_it),
            "truth": len(of_it),
        }
    return {
        "precision": _share(key in dirty for key in dropped),
        "recall": _share(key in dropped for key in dirty),
        "reasons": reasons,
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


def _share(values: Iterable[bool]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None
