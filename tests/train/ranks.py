"""One of several processes that train together: `python ranks.py PORT RUN…`, RANK and WORLD_SIZE in the environment.

A RUN is STAGE:STRATEGY:FOLDER, in the project that is the current directory; it resumes in FOLDER.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lyrics import config, io
from lyrics.stage import NullTracker
from lyrics.train import loop, stage1, stage2

STAGES = {"stage1": stage1.run, "stage2": stage2.run}


def train(stage: str, folder: Path, **changes: object) -> None:
    settings = config.load()
    settings = dataclasses.replace(settings, **{stage: dataclasses.replace(getattr(settings, stage), **changes)})
    STAGES[stage](settings, folder, NullTracker())


def what_it_held(arguments: dict) -> dict[str, object]:
    """Of the parameters that the loop was given."""
    parameters = arguments["trainable"].values()
    return {
        "sharded": [isinstance(p, DTensor) for p in parameters],
        "local": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters),
        "whole": sum(p.numel() for p in parameters),
    }


def main(port: str, *runs: str) -> None:
    fit = loop.fit
    for number, run in enumerate(runs):
        stage, strategy, folder = run.split(":")
        os.environ["MASTER_PORT"] = str(int(port) + number)

        def recorded(folder: str = folder, **arguments: object) -> object:
            history = fit(**arguments)
            io.write_json(Path(folder) / f"held-{os.environ['RANK']}.json", what_it_held(arguments))
            return history

        loop.fit = recorded
        train(stage, Path(folder), strategy=strategy)
        assert not dist.is_initialized()


if __name__ == "__main__":
    main(*sys.argv[1:])
