"""Cleaning on the embedded world, whose dirt is known: everything that needs no image–text model is found."""

from pathlib import Path

import pytest
import yaml

from lyrics import seeding
from lyrics.config import Clean, Dirt, Engine, SceneCounts, World
from lyrics.data import clean, clean_report
from lyrics.data.webdataset import WebPair, write_tar
from lyrics.stage import NullTracker
from lyrics.world import datasets

PARAMS = Path(__file__).parents[2] / "params"

ONE_WORKER = Engine(kind="local", address=None, workers=1, threads_per_worker=1, gpus_per_worker=0, retries=0)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The ledger's score on 300 pairs of a seed that no preset uses, with the parameters of `tiny`."""
    folder = tmp_path_factory.mktemp("world")
    values = yaml.safe_load((PARAMS / "world/default.yaml").read_text())
    counts = SceneCounts(**{**values["scenes"], "web": 300})
    world = World(**{**values, "scenes": counts, "dirt": Dirt(**values["dirt"])})
    items = list(datasets.web_items(seeding.stable_seed("test"), world))
    pairs = (WebPair(key=i.key, image_bytes=i.image_bytes, caption=i.caption, meta={}) for i in items)
    write_tar(folder / "00000.tar", pairs)
    settings = Clean(**yaml.safe_load((PARAMS / "clean/tiny.yaml").read_text()))
    shards = [folder / "00000.tar"]
    report = clean.clean(shards, settings, lambda: None, folder / "work", (), ONE_WORKER, NullTracker())
    assert report["not_checked"]["mismatched"] == report["kept"]
    return clean_report.score(clean.ledger(shards, folder / "work"), ((item.key, item.dirt) for item in items))


def test_no_clean_pair_is_dropped(scored):
    assert scored["precision"] == 1.0


@pytest.mark.parametrize("reason", ["broken", "tiny", "extreme", "boilerplate", "language", "duplicate"])
def test_all_of_it_is_found_for_its_reason(scored, reason):
    assert scored["reasons"][reason]["truth"] > 0
    assert scored["reasons"][reason]["named"] == 1.0
