"""Score a registered version on the test set that is here now, because it was scored on another one."""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lyrics import config as configuration
from lyrics import io, seeding
from lyrics.errors import InputError
from lyrics.stage import WORK, locked
from lyrics.track import lineage, versions

if TYPE_CHECKING:
    from lyrics.config import Config
    from lyrics.data.annotated import Split
    from lyrics.inference import Lyrics
    from lyrics.refiner.features import RefinedSplit

NAME = "evaluate-again"


def evaluate_again(version: int, split: str) -> Path:
    """Scores of a registered version on data/raw/SPLIT, with the choice of samples that `evaluate` makes now.

    The version's own frozen parts look at the pictures anew, with the thresholds and the coordinate format that it was
    trained with. data/refined is not read: it holds what models/foundation saw, which may be other parts or the same
    ones under other thresholds, and nothing in it says which, nor of which pictures. Only the pictures that are asked
    about are looked at.

    An interrupted evaluation goes on where it stopped, and a finished one is not repeated.

    Returns:
        A folder laid out as reports/, with evaluation.json and samples/SPLIT.parquet only.

    Raises:
        InputError: the split is not here, the version's files are gone, or another process evaluates here.
        RetryableError: the registry is down.
    """
    config = configuration.load()
    raw = versions.RAW / split
    if not raw.is_dir():
        raise InputError(
            f"{versions.NAME} version {version} must be scored again, but {raw} does not exist; fetch it with "
            "`dvc pull data/raw`, or make it with `dvc repro ingest`"
        )
    files = versions.resolve(f"models:/{versions.NAME}/{version}")
    with locked(NAME):
        work = WORK / NAME / f"version-{version}" / _fingerprint(config, files, raw)
        for other in work.parent.glob("*"):
            if other != work:
                shutil.rmtree(other)
        finished = work / "finished"
        if not finished.exists():
            print(f"lyrics: version {version} is scored on {raw} as it is now; this takes a while", file=sys.stderr)
            _evaluate(config, files, raw, work)
            (work / "out").rename(finished)
        for rest in work.iterdir():  # features and answers, also those of a process killed here
            if rest != finished:
                shutil.rmtree(rest)
    return finished


def _fingerprint(config: "Config", files: versions.LocalModel, raw: Path) -> str:
    """All that the scores depend on: model, pictures and questions, settings, code."""
    from lyrics.evaluate import captions

    model = lineage.model_sha256(files.stage2, files.foundation)
    hashes = [*model.values(), io.sha256_tree(raw), lineage.code_sha256()]
    return f"{seeding.stable_seed(*hashes, config.evaluate, config.seed, captions.tokenizer_name()):016x}"


def _evaluate(config: "Config", files: versions.LocalModel, raw: Path, work: Path) -> None:
    """Write `work / "out"`; shards of features and answers are kept in `work` until then."""
    from lyrics.data.annotated import read_split
    from lyrics.evaluate import evaluate, tasks
    from lyrics.inference import Lyrics

    split = read_split(raw)
    limit = config.evaluate.samples_per_split
    chosen = [s for task in tasks.TASKS for s in tasks.choose(split.samples, task, limit, config.seed, raw.name)]
    if not chosen:
        raise InputError(f"{raw} has no sample of a scored task ({', '.join(tasks.TASKS)}) to compare versions by")
    asked = {sample.image_id for sample in chosen}
    split = dataclasses.replace(split, images=[i for i in split.images if i.image_id in asked], samples=chosen)
    model = Lyrics.from_folders(files.stage2, files.foundation, config.device)
    refined = _refine(model, raw.name, split, work / "refined")
    own = dataclasses.replace(config, refine=model.refiner.settings)
    evaluate.run_alone(own, work, raw.name, refined, model, files.stage2, files.foundation)


def _refine(model: "Lyrics", name: str, split: "Split", folder: Path) -> "RefinedSplit":
    from tqdm import tqdm

    from lyrics.refiner import features
    from lyrics.refiner.online import Looker
    from lyrics.refiner.refine import Frozen, write_shard

    frozen = Frozen(encoder=model.encoder, refiner=model.refiner, device=model.model.device)
    settings = model.refiner.settings
    size = settings.images_per_shard
    with tqdm(total=len(split.images), desc=f"refine {name}", unit="image") as progress:
        for number, start in enumerate(range(0, len(split.images), size)):
            records, shard = split.images[start : start + size], features.shard_folder(folder, number)
            if not shard.exists():
                write_shard(frozen, records, number, shard)
            progress.update(len(records))
    shards = sorted(folder.glob("shard-*"))
    features.write_images(
        folder / features.IMAGES_FILE,
        [i for shard in shards for i in features.read_images(shard / features.IMAGES_FILE)],
    )
    features.write_samples(folder / features.SAMPLES_FILE, split.samples)
    return features.RefinedSplit(folder, Looker(model.encoder, model.model.device, settings.batch_size))
