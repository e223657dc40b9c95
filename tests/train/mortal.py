"""Runs stages that die as they are told to: JSON lines say what to run and how it dies, and then what became of it.

Each life is a fork of this process, which has imported everything and computed nothing: a start costs milliseconds.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pandas  # noqa: F401 - pyarrow would import it in every fork
import torch

from lyrics import config, stage
from lyrics.train import checkpoint, stage1, stage2

STAGES = {"pretrain": stage1.run, "finetune": stage2.run}
SMALL_FILE = 20_000  # bytes, below the size of a checkpoint


class Fate:
    """A tracker that does something to its own process once a step was taken, before its checkpoint is written."""

    def __init__(self, at: int, how: str, work: Path, steps: Path) -> None:
        self.at, self.how, self.work, self.steps = at, how, work, steps

    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None:
        if step is None:
            return
        with self.steps.open("a") as opened:
            opened.write(f"{step}\n")
        if step == self.at:
            getattr(self, f"_{self.how}")()

    def log_params(self, values: dict[str, object]) -> None: ...
    def log_artifact(self, path: Path) -> None: ...
    def log_dataset(self, name: str, path: Path, sha256: str) -> None: ...

    def _die(self, *_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _die_in_the_middle_of_a_write(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends a process that writes past the limit
        self._reach_a_size_limit()

    def _die_before_the_rename(self) -> None:
        Path.replace = self._die  # type: ignore[method-assign, assignment]

    def _die_after_the_rename(self) -> None:
        Path.unlink = self._die  # type: ignore[method-assign, assignment]

    def _reach_a_size_limit(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, SMALL_FILE))

    def _fill_the_disk(self) -> None:
        (self.work / "checkpoints" / checkpoint._UNFINISHED).symlink_to("/dev/full")

    def _poison(self) -> None:
        """One picture's features change under training's eyes: they are memory-mapped."""
        tokens = np.load("data/refined/instruct/shard-00000/image_tokens.npy", mmap_mode="r+")
        tokens[5] = np.nan
        tokens.flush()


def live(verb: str, at: int, how: str) -> None:
    torch.set_num_threads(1)
    settings = config.load()

    def body(work: Path) -> None:
        STAGES[verb](settings, work, Fate(at, how, work, Path("steps")))

    with stage.one_sentence():
        stage.run_stage(verb, body)


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        os.chdir(order["folder"])
        Path("steps").write_text("")
        child = os.fork()
        if not child:
            said = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 2)
            code = 0
            try:
                live(order["verb"], order["at"], order["how"])
            except SystemExit as exit_:
                code = int(exit_.code or 0)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        steps = [int(step) for step in Path("steps").read_text().split()]
        result = {"code": os.waitstatus_to_exitcode(status), "steps": steps, "said": Path("stderr").read_text()}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
