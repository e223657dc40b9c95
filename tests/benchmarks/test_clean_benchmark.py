import dataclasses
import io
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import clean, clean_pairs
from benchmarks.watch import watched
from lyrics.data.webdataset import read_pairs
from lyrics.errors import InputError


def test_a_pair_depends_on_its_number_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(clean_pairs, "PAIRS_PER_TAR", 40)
    clean_pairs.write(tmp_path, 130)
    tars = sorted((tmp_path / "data/raw/web").glob("*.tar"))
    stored = [pair for tar in tars for pair in read_pairs(tar)]
    assert len(tars) == 4 and [pair.key for pair in stored] == [clean_pairs.key(n) for n in range(130)]
    assert all(stored[n].image_bytes == clean_pairs.pair(n).image_bytes for n in (0, 20, 105, 129))


def test_copies_repeat_earlier_clean_pictures():
    planted = [clean_pairs.planted(number) for number in range(1000)]
    copies = [what for what in planted if what.reason == "duplicate"]
    assert len(copies) == 45 and {what.kind for what in copies} == set(clean_pairs.COPIES)
    assert all(what.original < what.number and not planted[what.original].kind for what in copies)
    first = next(what for what in copies if what.kind == "larger")
    larger, original = (Image.open(io.BytesIO(clean_pairs.pair(n).image_bytes)) for n in (first.number, first.original))
    assert larger.size == (192, 192) and original.size == (128, 128)


def test_both_programs_find_what_was_planted(tmp_path):
    """In processes of their own, whose memory is seen."""
    clean_pairs.write(tmp_path, 200)
    kinds = [clean_pairs.planted(number).reason for number in range(200)]
    search, whole = (clean.run(name, tmp_path, Path()) for name in (clean.OURS, clean.WHOLE))
    assert clean.score(search["links"]) == clean.score(whole["links"]) == (kinds.count("duplicate"), 0)
    assert whole["dropped"] == {kind: kinds.count(kind) for kind in set(kinds) - {""}}
    assert whole["kept"] == kinds.count("") and whole["keys"] == 200
    for found in (search, whole):
        assert found["cpu_seconds"] > 0
        assert found["before_bytes"] < found["pss_bytes"] <= found["high_water_bytes"]


def test_wrong_links_are_counted_apart():
    copy = next(what for what in map(clean_pairs.planted, range(100, 200)) if what.kind == "smaller")
    key = clean_pairs.key
    right, wrong = (key(copy.number), key(copy.original)), (key(copy.number), key(copy.original + 1))
    assert clean.score([right, right]) == (1, 0)
    assert clean.score([wrong]) == (0, 1) and clean.score([]) == (0, 0)
    assert clean.score([(key(5095), key(95))]) == (0, 0)  # both show a picture of val: neither planted copy nor error


def test_memory_of_children_is_seen(tmp_path):
    child = "x = bytearray(80 << 20); import time; time.sleep(1.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True); print('{{}}')"
    found = watched([sys.executable, "-c", parent], tmp_path, os.environ)
    assert 80 << 20 < found["pss_bytes"] <= found["high_water_bytes"] < 160 << 20


def test_peers_that_are_missing_are_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"cannot run the peers.*venv build/peer.*--peer-python"):
        clean.check_peer(tmp_path / "python")
    with pytest.raises(InputError, match=r"No module named.*venv build/peer"):
        clean.check_peer(Path(sys.executable))


def test_the_table_compares_programs_and_sizes():
    ours = clean.Measured(1000, clean.OURS, 2.0, 0.1, 2**20, 45, 0)
    dedup = clean.Measured(1000, clean.DEDUP, 4.0, 3.6, 2**21, 40, 1)
    tenfold = dataclasses.replace(ours, pairs=10_000, seconds=30.0, search_seconds=2.0, found=495)
    rows = clean.table([ours, dedup, tenfold], 1000).splitlines()[2:]
    assert rows == [
        "| 1,000 | ours, hash and search | 500 |  |  | 0.100 | 1 | 45 of 45 | 0 |",
        "| 1,000 | imagededup | 250 | 2.00 × |  | 3.600 | 2 | 40 of 45 | 1 |",
        "| 10,000 | ours, hash and search | 333 |  | 1.50 × | 0.200 | 1 | 495 of 495 | 0 |",
        "| 10,000 | imagededup | stopped at 1,000: by its growth about 0.1 h |||||||",
    ]
