import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import TypeAdapter

from lyrics.config import Data, Dirt, SceneCounts, World
from lyrics.data import ingest
from lyrics.stage import NullTracker

PARAMS = Path(__file__).parents[2] / "params" / "world" / "default.yaml"


def small_world(**changes) -> World:
    world = TypeAdapter(World).validate_python(yaml.safe_load(PARAMS.read_text()))
    counts = SceneCounts(foundation=8, web=100, instruct=60, val=5, test=20, test_ood=20)
    return dataclasses.replace(world, scenes=counts, corpus_documents=300, **changes)


def ingest_world(work: Path, world: World, seed: int = 0) -> Path:
    data = Data(source="world", folder=None, splits={}, sets=(), max_images=None, leak_hamming_bits=None)
    work.mkdir(parents=True, exist_ok=True)
    ingest.run(SimpleNamespace(seed=seed, world=world, data=data), work, NullTracker())
    return work / "out"


@pytest.fixture(scope="session")
def world() -> World:
    return small_world()


@pytest.fixture(scope="session")
def raw(tmp_path_factory, world) -> Path:
    """data/raw of a small world."""
    return ingest_world(tmp_path_factory.mktemp("ingest"), world)


@pytest.fixture
def make_world():
    return small_world


@pytest.fixture
def run_ingest():
    return ingest_world


@pytest.fixture
def all_dirty() -> Dirt:
    """Rates whose sum exceeds what the web split can carry."""
    rate = 0.2
    return Dirt(mismatched=rate, duplicate=rate, broken=rate, boilerplate=rate, language=rate, tiny=rate, extreme=rate)
