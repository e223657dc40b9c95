"""Our programs of the benchmark of `clean`, each in a process of its own: `python -m benchmarks.clean_programs NAME`.

The working folder holds what `clean_pairs.write` wrote. The last line printed is JSON: seconds of the processor without
imports, the memory before the first pair, links (a copy's key, its original's) and, of the whole stage, its counts.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.watch import pss_bytes
from lyrics import compose
from lyrics.config import Config, parse
from lyrics.data import clean, files, filters
from lyrics.data.webdataset import read_pairs
from lyrics.stage import NullTracker

ROOT = Path(__file__).parents[1]


def configuration(workers: int) -> Config:
    """`tiny` without its fitted image–text model, so without the filter of mismatches."""
    config = parse(compose.preview(["preset=tiny", "data=world"], ROOT / "params/run.yaml"))
    engine = dataclasses.replace(config.engine, kind="local", workers=workers, threads_per_worker=1)
    return dataclasses.replace(
        config, device="cpu", engine=engine, clean=dataclasses.replace(config.clean, max_better_captions=None)
    )


def search(config: Config) -> dict[str, Any]:
    """Decode and hash, then look for earlier pictures that look alike: what the peers do, with the parts of `clean`."""
    hashes = []
    for tar in sorted(clean.WEB.glob("*.tar")):
        for pair in read_pairs(tar):
            with contextlib.suppress(files.BadImageError):
                hashes.append((pair.key, filters.perceptual_hash(files.decode(pair.image_bytes or b""))))
    started = time.process_time()
    index = filters.DuplicateIndex(config.clean.duplicate_hamming_bits)
    originals = [(key, index.find_or_add(key, hashed)) for key, hashed in hashes]
    links = [(key, original) for key, original in originals if original is not None]
    return {"links": links, "search_seconds": time.process_time() - started}


def whole(config: Config) -> dict[str, Any]:
    """The stage: every filter but that of mismatches, and the kept pairs written."""
    work = Path("work")
    work.mkdir()
    clean.run(config, work, NullTracker())
    table = pq.read_table(work / "out/ledger.parquet")
    rows = zip(*(table[name].to_pylist() for name in ("key", "reason", "detail")), strict=True)
    found = {key: (reason, detail) for key, reason, detail in rows}
    return {
        "pairs": table.num_rows,
        "keys": len(found),
        "kept": sum(not reason for reason, _ in found.values()),
        "dropped": dict(collections.Counter(reason for reason, _ in found.values() if reason)),
        "links": [
            (key, detail.removeprefix("of ")) for key, (reason, detail) in found.items() if reason == "duplicate"
        ],
    }


PROGRAMS: dict[str, Callable[[Config], dict[str, Any]]] = {"search": search, "clean": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PROGRAMS)
    parser.add_argument("--workers", type=int, default=1)
    chosen = parser.parse_args()
    config = configuration(chosen.workers)
    if chosen.name == "clean" and chosen.workers == 1:
        importlib.import_module("torch")  # as the engine will in this process: imports are not what is measured
    before, busy = pss_bytes(os.getpid()), sum(os.times()[:4])
    said = PROGRAMS[chosen.name](config)
    print(json.dumps({**said, "cpu_seconds": sum(os.times()[:4]) - busy, "before_bytes": before}))


if __name__ == "__main__":
    main()
