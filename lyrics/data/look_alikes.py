"""Pictures that show the same in other pixels: their embeddings in the image–text model are close (SemDeDup, 2023).

A perceptual hash finds a picture that was stored again. A crop, a mirror image or a slogan over it changes the hash,
but hardly the embedding. What is close enough depends on the model, so the threshold is None until it was looked at.

Shapes: N pictures, E width of the embeddings, H bits of a hash.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from lyrics import io
from lyrics.data import filters
from lyrics.data.clean_judge import Verdict, read_verdicts, write_verdicts

_BAND_BITS = (
    22  # twelve bands of twenty bits; at a cosine of 0.95, after centring, all but three in a thousand share one
)
_SEED = 0


class EmbeddingIndex:
    """Finds the first picture added whose embedding has a cosine of at least `min_cosine` with the one asked for.

    Only pictures are compared that share most of a band of signs of random projections (Charikar, 2002), so that time
    grows about linearly. `centre_E` is taken out before: embeddings of one model lie in a cone, where most signs agree.
    In memory are the hashes, some 130 bytes each; the embeddings are appended to `file`, as float16.

    Args:
        file: empty, opened for reading and writing without a buffer.
    """

    def __init__(self, min_cosine: float, centre_E: np.ndarray, file: BinaryIO) -> None:
        self._min_cosine, self._centre_E, self._file = min_cosine, centre_E, file
        self._planes_EH = np.random.default_rng(_SEED).standard_normal((len(centre_E), filters.HASH_BITS))
        self._hashes = filters.DuplicateIndex(_BAND_BITS)
        self._row_bytes = 2 * len(centre_E)

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, embedding_E: np.ndarray) -> tuple[int, float] | None:
        """Its number, in order of adding, and the cosine."""
        for number in self._hashes.candidates(self._hash(embedding_E)).tolist():
            content = os.pread(self._file.fileno(), self._row_bytes, number * self._row_bytes)
            cosine = float(np.frombuffer(content, np.float16).astype(np.float32) @ embedding_E)
            if cosine >= self._min_cosine:
                return number, cosine
        return None

    def add(self, name: str, embedding_E: np.ndarray) -> None:
        self._hashes.add(name, self._hash(embedding_E))
        self._file.write(embedding_E.astype(np.float16).tobytes())

    def name(self, number: int) -> str:
        return self._hashes.name(number)

    def _hash(self, embedding_E: np.ndarray) -> str:
        return np.packbits((embedding_E - self._centre_E) @ self._planes_EH > 0).tobytes().hex()


def write_embeddings(path: Path, names: Sequence[str], image_NE: np.ndarray, text_NE: np.ndarray) -> None:
    """Args: names: of the pictures. text_NE: of their captions, N = 0 where they have none."""
    with io.atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, names=np.array(names, np.str_), image_NE=image_NE, text_NE=text_NE)


def read_embeddings(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    with np.load(path) as stored:
        return stored["names"].tolist(), stored["image_NE"], stored["text_NE"]


def mark_look_alikes(
    verdicts: Iterable[Verdict], images: Iterable[np.ndarray], index: EmbeddingIndex, held_out: int
) -> Iterator[Verdict]:
    """Of pictures that look alike the first stays; none that looks like one of the first `held_out` in the index.

    Args:
        images: the embedding of each picture that was in before mismatches were dropped.
    """
    embeddings = iter(images)
    for verdict in verdicts:
        if verdict.reason in ("", "mismatched"):
            embedding_E = next(embeddings)
            if not verdict.reason:
                _judge(verdict, embedding_E, index, held_out)
        yield verdict


def _judge(verdict: Verdict, embedding_E: np.ndarray, index: EmbeddingIndex, held_out: int) -> None:
    found = index.find(embedding_E)
    if found is None:
        index.add(verdict.key, embedding_E)
        return
    number, cosine = found
    verdict.drop("leaked" if number < held_out else "look_alike", f"of {index.name(number)}, cosine {cosine:.3f}")


def find_look_alikes(
    shards: Sequence[tuple[Path, Path, Path]], held_out: Sequence[Path], min_cosine: float, file: BinaryIO
) -> None:
    """One pass in order, since what looks alike depends on every earlier shard; no picture is read.

    Args:
        shards: of each the verdicts so far, its embeddings (absent where no picture was in), and where verdicts go.
        held_out: embeddings of the splits that measure.
    """
    index: EmbeddingIndex | None = None
    first = 0
    for source, embedded, destination in tqdm(shards, "clean: look-alikes"):
        verdicts: Iterable[Verdict] = read_verdicts(source)
        if embedded.exists():
            _, image_NE, _ = read_embeddings(embedded)
            if index is None:
                index = _with_held_out(held_out, min_cosine, image_NE.mean(axis=0), file)
                first = len(index)
            verdicts = mark_look_alikes(verdicts, image_NE, index, first)
        write_verdicts(destination, verdicts)


def _with_held_out(held_out: Sequence[Path], min_cosine: float, centre_E: np.ndarray, file: BinaryIO) -> EmbeddingIndex:
    index = EmbeddingIndex(min_cosine, centre_E, file)
    for path in held_out:
        names, image_NE, _ = read_embeddings(path)
        for name, embedding_E in zip(names, image_NE, strict=True):
            index.add(name, embedding_E)
    return index
