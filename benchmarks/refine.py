"""Boxes and masks of pictures: the refiner beside the usual loop of ultralytics and segment-anything.

    make run until=refine && python -m benchmarks.refine --write docs/benchmarks.md

Both have the weights of models/foundation and the pictures of data/raw/instruct; their boxes are compared before the
clock starts. Programs take turns, a round each, so that a busy machine slows all of them.
"""

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from benchmarks.stage1 import cpu_name, high_water_mark, timed
from benchmarks.table import write_table
from lyrics import config as schema
from lyrics.data.webdataset import open_image
from lyrics.errors import InputError
from lyrics.foundation import detector, manifest, segmenter, yolo
from lyrics.foundation.quality import match
from lyrics.model.vision import load_image_encoder
from lyrics.process import keep_freed_memory
from lyrics.refiner.ahead import ahead
from lyrics.refiner.refiner import load_refiner

Boxes: TypeAlias = list[np.ndarray]  # (N, 4) of each picture, pixels
Program: TypeAlias = Callable[[Sequence[Path]], Boxes]
USUAL, OURS, WHOLE = "the usual loop", "ours, boxes and masks", "ours, all of refine"
FOUNDATION, PICTURES = Path("models/foundation"), Path("data/raw/instruct/images")
CPU = torch.device("cpu")
SAME_SHARE = 0.95


def usual_loop(settings: schema.Config) -> Program:
    """`YOLO.predict` for each picture, `SamPredictor.set_image` for each picture, `predict` for each box."""
    yolo.load_ultralytics()
    import cv2
    from segment_anything import SamPredictor
    from ultralytics import YOLO

    part = settings.foundation.detector
    finder: Any = YOLO(str(Path(detector.__file__).with_name(f"{part.name}.yaml")), task="detect")
    finder.model = detector.load_yolo(FOUNDATION / "detector")
    predictor = SamPredictor(segmenter.load(FOUNDATION / "segmenter").model.sam)
    chosen = {"imgsz": part.image_size_px, "conf": part.score_threshold, "iou": part.nms_iou, "device": "cpu"}

    @torch.inference_mode()
    def run(paths: Sequence[Path]) -> Boxes:
        found = []
        for path in paths:
            pixels: Any = cv2.imread(str(path))
            with yolo.kept_threads():
                (result,) = finder.predict(pixels, verbose=False, **chosen)
            boxes = result.boxes.xyxy.numpy()
            predictor.set_image(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
            for box in boxes:
                predictor.predict(box=box, multimask_output=False)
            found.append(boxes)
        return found

    return run


def boxes_and_masks(settings: schema.Config) -> Program:
    """What the usual loop does, in batches; with features of the boxes and masks, and the masks as run lengths."""
    part = settings.foundation.detector
    finder = detector.load(FOUNDATION / "detector", FOUNDATION / "clip")
    masker = segmenter.load(FOUNDATION / "segmenter")

    @torch.inference_mode()
    def run(paths: Sequence[Path]) -> Boxes:
        found: Boxes = []
        for pictures in ahead(batches(paths, settings.refine.batch_size), decode):
            proposals = finder.propose(pictures, score_threshold=part.score_threshold, nms_iou=part.nms_iou)
            boxes = [one.boxes_xyxy.numpy() for one in proposals]
            masker.masks(pictures, boxes)
            found += boxes
        return found

    return run


def all_of_refine(settings: schema.Config) -> Program:
    """Image tokens, tags, boxes, masks, merging, spatial text, local features."""
    encoder = load_image_encoder(FOUNDATION / "clip")
    refiner = load_refiner(FOUNDATION, settings.refine, settings.foundation.tagger, settings.foundation.detector)

    @torch.inference_mode()
    def run(paths: Sequence[Path]) -> Boxes:
        found: Boxes = []
        for pictures in ahead(batches(paths, settings.refine.batch_size), decode):
            encoder.look(pictures, CPU)
            found += [objects.boxes_xyxy for objects in refiner.refine(pictures)]
        return found

    return run


PROGRAMS: dict[str, Callable[[schema.Config], Program]] = {
    USUAL: usual_loop,
    OURS: boxes_and_masks,
    WHOLE: all_of_refine,
}


def batches(paths: Sequence[Path], size: int) -> list[Sequence[Path]]:
    return [paths[start : start + size] for start in range(0, len(paths), size)]


def decode(paths: Sequence[Path]) -> list[Image.Image]:
    return [open_image(str(path)) for path in paths]


def enlarged(paths: Sequence[Path], side_px: int, folder: Path) -> list[Path]:
    """The same pictures as JPEG files of another size."""
    folder.mkdir()
    copies = []
    for path in paths:
        copies.append(folder / f"{path.stem}.jpg")
        open_image(str(path)).resize((side_px, side_px), Image.Resampling.BICUBIC).save(copies[-1], quality=90)
    return copies


def agreement(one: Boxes, other: Boxes) -> float:
    """Share of boxes that both found: matched one to one at IoU ≥ 0.5.

    Not exact: OpenCV, which ultralytics reads with, makes pictures smaller without smoothing them.
    """
    both = sum(len(match(a.tolist(), b.tolist())) for a, b in zip(one, other, strict=True))
    return 2 * both / max(1, sum(map(len, one)) + sum(map(len, other)))


def peak_memory(name: str, settings: schema.Config, paths: Sequence[Path]) -> int:
    """How far the resident set of a process of its own rises above its models."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_rise, name, settings, paths, torch.get_num_threads()).result()


def _rise(name: str, settings: schema.Config, paths: Sequence[Path], threads: int) -> int:
    torch.set_num_threads(threads)
    run = PROGRAMS[name](settings)
    before = high_water_mark()
    run(paths)
    return high_water_mark() - before


def measure(settings: schema.Config, paths: Sequence[Path], rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round.

    Raises:
        AssertionError: they do not find the same boxes.
    """
    programs = {name: make(settings) for name, make in PROGRAMS.items()}
    found = {name: run(paths) for name, run in programs.items()}  # they warm up, too
    if (share := agreement(found[USUAL], found[OURS])) < SAME_SHARE:
        raise AssertionError(f"{share:.1%} of the boxes were found by both; expected {SAME_SHARE:.0%}")
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            seconds[name].append(timed(lambda run=run: run(paths)))  # type: ignore[misc]
    return seconds


def table(measured: dict[int, dict[str, list[float]]], memory: dict[int, dict[str, list[int]]], pictures: int) -> str:
    """One row per program; `ratio` compares rounds with the usual loop's."""
    rows = [
        "| pictures of | program | images/s | ratio | peak memory, MiB | of a quarter of the pictures |",
        "| --- | --- | --: | --: | --: | --: |",
    ]
    for side, seconds in measured.items():
        for name, values in seconds.items():
            ratio = statistics.median(u / v for u, v in zip(seconds[USUAL], values, strict=True))
            whole, quarter = (value / 2**20 for value in memory[side][name])
            rows.append(
                f"| {side} px | {name} | {pictures / statistics.median(values):.1f} "
                f"| {'' if name == USUAL else f'{ratio:.2f} ×'} | {whole:.0f} | {quarter:.0f} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 640], help="sizes of the pictures, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="a document with the markers of refine")
    chosen = parser.parse_args()
    settings = schema.load()
    if {manifest.read(FOUNDATION / part)["source"] for part in ("detector", "segmenter")} != {"fitted"}:
        raise InputError(f"{FOUNDATION} holds another detector or segmenter than this compares: make run preset=tiny")
    originals = sorted(PICTURES.iterdir())[: chosen.pictures]
    keep_freed_memory()
    measured, memory = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side in chosen.sides:
            paths = enlarged(originals, side, Path(folder) / str(side))
            memory[side] = {
                name: [peak_memory(name, settings, some) for some in (paths, paths[: len(paths) // 4])]
                for name in PROGRAMS
            }
            measured[side] = measure(settings, paths, chosen.rounds)
    threads = torch.get_num_threads()
    text = "\n\n".join(
        [
            table(measured, memory, len(originals)),
            f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, fp32; {len(originals)} "
            f"pictures, batches of {settings.refine.batch_size}; medians of {chosen.rounds} rounds.",
        ]
    )
    print(text)
    if chosen.write:
        write_table(chosen.write, "refine", text)


if __name__ == "__main__":
    main()
