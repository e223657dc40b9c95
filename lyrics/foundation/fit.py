"""The frozen parts, one at a time: fitted on the foundation split, taken out of a wheel, or fetched from a hub.

Each part is a module of this package with

    def fit(config: Config, work: Path, tracker: Tracker) -> manifest.Made

which writes the part's files into `work / "out"` (it exists and is empty) and logs its metrics over steps.
"""

import importlib
import shutil
from pathlib import Path

from lyrics.config import Config
from lyrics.errors import InputError
from lyrics.foundation import manifest
from lyrics.stage import Tracker

FOUNDATION = Path("models/foundation")
SPLIT = Path("data/raw/foundation")
# In an order in which each finds what it reads: llm and clip read the tokenizer, the tagger and the detector the clip.
PARTS = ("tokenizer", "llm", "clip", "tagger", "detector", "segmenter")


def run(part: str, config: Config, work: Path, tracker: Tracker) -> None:
    """Make one part in `work / "out"`, with its manifest."""
    if part not in PARTS:
        raise InputError(f"There is no foundation part {part!r}; the parts are {', '.join(PARTS)}")
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)  # what a killed fit left: it starts over
    out.mkdir(parents=True)
    made = importlib.import_module(f"lyrics.foundation.{part}").fit(config, work, tracker)
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # some libraries write weights for their owner alone
    manifest.write(out, part, made)
    tracker.log_params({f"foundation/{part}/{key}": getattr(made, key) for key in ("source", "name", "revision")})
    tracker.log_metrics({f"foundation/{part}_{name}": value for name, value in made.quality.items()})
    tracker.log_artifact(out / manifest.NAME)
