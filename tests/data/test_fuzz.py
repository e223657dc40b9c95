"""Readers on damaged files: no crash, no hang, no growth, and every rejected record has its file and place."""

import gc
import os
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from fuzz import damaged, ingest
from hypothesis import HealthCheck, given, seed, settings
from small_sets import SETS, pictures

from lyrics.data import sets

SECONDS = float(os.environ.get("LYRICS_FUZZ_SECONDS", "600"))
GROWTH_MIB = 48
_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]


def _one(example: tuple[str, str, dict[str, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger = ingest(Path(folder), *example)
        if ledger is not None:
            rows = pq.read_table(Path(folder) / "raw" / "rejected.parquet").to_pylist()
            assert len(rows) == ledger.reasons.total()
            assert all(row["source"] and row["record"] and row["reason"] for row in rows)


@pytest.mark.parametrize("name", sorted(SETS))
@pytest.mark.parametrize("split", ["instruct", "web"])
def test_every_small_data_set_is_read_whole(tmp_path, name, split):
    ledger = ingest(tmp_path, name, split, SETS[name][1] | pictures())
    has_caption = name.partition(" ")[0] in ("webdataset", "url_list", "coco", "flickr", "llava_context")
    if split == "instruct" or has_caption:
        assert ledger is not None
        expected = {"no caption", "picture again"} if split == "web" else set()
        assert set(ledger.reasons) <= expected
    else:
        assert ledger is None


@settings(max_examples=150, deadline=5_000, derandomize=True, suppress_health_check=_CHECKS, database=None)
@given(damaged())
def test_damaged_data_sets_are_read_or_refused(example):
    _one(example)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_damaged_data_sets_for_ten_minutes(capsys, monkeypatch):
    monkeypatch.setattr(sets, "tqdm", lambda found, *_, **__: found)
    process, started, rounds, examples, first = psutil.Process(), time.monotonic(), 0, 0, 0.0
    while time.monotonic() - started < SECONDS:
        count = 0

        @seed(rounds)
        @settings(max_examples=500, deadline=20_000, suppress_health_check=_CHECKS, database=None)
        @given(damaged())
        def attack(example):
            nonlocal count
            count += 1
            _one(example)

        attack()
        rounds, examples = rounds + 1, examples + count
        gc.collect()
        memory = process.memory_info().rss / 2**20
        first = memory if rounds == 2 else first  # by then every module is loaded and every cache full
    with capsys.disabled():
        print(
            f"\n{examples} damaged data sets in {time.monotonic() - started:.0f} s: no crash, no hang; "
            f"memory {first:.0f} MiB after the second round, {memory:.0f} MiB after the last of {rounds}"
        )
    assert rounds < 3 or memory < first + GROWTH_MIB
