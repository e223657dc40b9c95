"""Every kind of write of the stages, one after another, where there is no room: `full_disk.py FOLDER [BYTES]`.

With BYTES, no file may grow beyond them (EFBIG); without, FOLDER is expected to be full (ENOSPC).
Prints a line of JSON for each write: its name, exit code and sentence, whether it was seen to be a full disk, and what
it left behind.
"""

import contextlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel

from lyrics import io, stage
from lyrics.data.webdataset import WebPair, write_tar
from lyrics.model import pretrained
from lyrics.refiner import shard_files
from lyrics.track import runs
from lyrics.train import checkpoint

NOISE = np.random.default_rng(0).integers(0, 255, 1_000_000, dtype=np.uint8)
CONTENT = NOISE.tobytes()


def text(folder: Path) -> None:
    io.write_text(folder / "text", "x" * len(CONTENT))


def tar(folder: Path) -> None:
    pair = {"image_bytes": CONTENT[:100_000], "caption": "a dog", "meta": {}}
    write_tar(folder / "0.tar", [WebPair(key=str(number), **pair) for number in range(9)])


def parquet(folder: Path) -> None:
    with io.atomic_path(folder / "0.parquet") as temporary:
        pq.write_table(pa.table({"a": [CONTENT[i : i + 999] for i in range(0, 999_000, 999)]}), temporary)


def features_array(folder: Path) -> None:
    shard_files.save(folder / "image_tokens.npy", NOISE.reshape(100, 100, 100).astype(np.float16))


def picture(folder: Path) -> None:
    Image.fromarray(NOISE[:750_000].reshape(500, 500, 3)).save(folder / "0.png", format="PNG")


def large_checkpoint(folder: Path) -> None:
    checkpoint.save(folder, 1, {"weights": torch.ones(300_000)}, kept=2)


def checkpoint_of_many_tensors(folder: Path) -> None:
    checkpoint.save(folder, 1, {str(number): torch.ones(300) for number in range(200)}, kept=2)


def safetensors(folder: Path) -> None:
    save_file({"weights": torch.ones(300_000)}, folder / "model.safetensors")


def pretrained_model(folder: Path) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    pretrained.write(BertModel(BertConfig(**size)), folder)


def tokenizer(folder: Path) -> None:
    words = {str(number): number for number in range(50_000)}
    Tokenizer(models.WordLevel(words, unk_token="0")).save(str(folder / "tokenizer.json"))


def copied_tree(folder: Path) -> None:
    shutil.copytree(os.environ["SOURCE"], folder / "copy")


def mlflow_metrics(_: Path) -> None:
    with runs.stage_run("clean", {}) as tracker:
        for step in range(1000):
            tracker.log_metrics({f"metric-{number:0100}": 1.0 for number in range(100)}, step)


def mlflow_artifact(_: Path) -> None:
    with runs.stage_run("clean", {}) as tracker:
        tracker.log_artifact(Path(os.environ["SOURCE"]))


FILES: tuple[Callable[[Path], None], ...] = (
    text,
    tar,
    parquet,
    features_array,
    picture,
    large_checkpoint,
    checkpoint_of_many_tensors,
    safetensors,
    pretrained_model,
    tokenizer,
    copied_tree,
)
MLFLOW: tuple[Callable[[Path], None], ...] = (mlflow_artifact, mlflow_metrics)


def attempt(write: Callable[[Path], None], folder: Path) -> dict[str, object]:
    folder.mkdir()
    try:
        write(folder)
    except Exception as error:
        code, sentence = stage.verdict(error)
        left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return {"code": code, "sentence": sentence, "full": stage.is_full_disk(error), "left": left}
    finally:
        shutil.rmtree(folder)
    return {"code": 0, "sentence": "it had room", "full": False, "left": []}


def main(folder: Path, limit: int | None) -> None:
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for write in (*FILES, *MLFLOW):
        if write in MLFLOW and "MLFLOW_TRACKING_URI" not in os.environ:
            continue
        outcome = attempt(write, folder / "place")
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps({"write": write.__name__, **outcome}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else None)
