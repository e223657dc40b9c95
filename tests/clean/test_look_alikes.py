"""Pictures that show the same in other pixels, found by their embeddings."""

import dataclasses
import io as stdio
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from test_clean import ONE_WORKER, SETTINGS

from lyrics import io
from lyrics.data import clean, filters, look_alikes
from lyrics.data.webdataset import WebPair, write_tar
from lyrics.stage import NullTracker

WIDTH = 64
CHECKED = dataclasses.replace(SETTINGS, max_better_captions=None, look_alike_cosine=0.97)


class Histogram:
    """Embeds a picture by its colours, wherever they are: a mirrored picture has the same embedding."""

    def encode_images(self, images):
        counts = [np.histogramdd(np.asarray(i).reshape(-1, 3), bins=4, range=[(0, 256)] * 3)[0] for i in images]
        vectors = np.stack(counts).reshape(len(images), -1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_texts(self, texts):
        return np.ones((len(texts), WIDTH))


def picture(seed):
    """Blocks of four colours: other seeds have others."""
    draw = np.random.default_rng(seed)
    palette = draw.integers(0, 256, (4, 3))
    blocks = palette[draw.integers(0, 4, (8, 8))].astype(np.uint8)
    return Image.fromarray(blocks).resize((64, 64), Image.Resampling.NEAREST)


def png(image):
    buffer = stdio.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pair(key, image):
    return WebPair(key=key, image_bytes=png(image), caption="Blocks of colours side by side.", meta={})


@pytest.fixture
def web(tmp_path, monkeypatch):
    """Two tars; the second repeats a picture of the first and one of val, both mirrored: other pixels, another hash."""
    monkeypatch.chdir(tmp_path)
    own = [pair(f"own{n:02d}", picture(n)) for n in range(30)]
    mirrored = [pair("copy", ImageOps.mirror(picture(3))), pair("from_val", ImageOps.mirror(picture(100)))]
    write_tar(Path("data/raw/web/00000.tar"), own[:20])
    write_tar(Path("data/raw/web/00001.tar"), [*mirrored, *own[20:]])
    io.write_bytes(Path("data/raw/val/images/a.png"), png(picture(100)))
    io.write_text(clean.UNSAFE_WORDS, "")
    return tmp_path


def run(work, monkeypatch, encoder, settings=CHECKED):
    class Config:
        clean, device, engine = settings, "cpu", ONE_WORKER

    monkeypatch.setattr(clean, "_load_encoder", lambda *_: encoder)
    work.mkdir(exist_ok=True)
    clean.run(Config, work, NullTracker())
    return work / "out"


def dropped(out):
    rows = pq.read_table(out / "ledger.parquet").to_pylist()
    return {row["key"]: (row["reason"], row["detail"]) for row in rows if not row["kept"]}


def test_mirrored_pictures_are_found_by_their_embeddings_and_no_others(web, monkeypatch):
    assert filters.perceptual_hash(picture(3)) != filters.perceptual_hash(ImageOps.mirror(picture(3)))
    out = run(web / "work", monkeypatch, Histogram())
    assert dropped(out) == {
        "copy": ("look_alike", "of own03, cosine 1.000"),
        "from_val": ("leaked", "of val/a.png, cosine 1.000"),
    }
    report = io.read_json(out / "report.json")
    assert report["kept"] == 30 and report["dropped"]["look_alike"] == report["dropped"]["leaked"] == 1
    assert report["not_checked"]["look_alike"] == 0


def test_they_stay_where_nobody_asks_and_are_counted_where_no_model_can_tell(web, monkeypatch):
    assert not dropped(run(web / "off", monkeypatch, Histogram(), dataclasses.replace(CHECKED, look_alike_cosine=None)))
    out = run(web / "blind", monkeypatch, None)
    assert not dropped(out) and io.read_json(out / "report.json")["not_checked"]["look_alike"] == 32


def test_a_mismatch_is_no_original(web, monkeypatch):
    """A pair that was dropped before is not what a later one repeats."""
    monkeypatch.setattr(clean.filters, "mismatched", lambda share, _: "bad" if next(turns) == 3 else None)
    turns = iter(range(1000))
    settings = dataclasses.replace(CHECKED, max_better_captions=0.5)
    monkeypatch.setattr(clean, "MIN_COMPARED", 15)
    found = dropped(run(web / "work", monkeypatch, Histogram(), settings))
    assert found["own03"] == ("mismatched", "bad") and "copy" not in found


def test_a_stopped_pass_begins_anew_and_ends_the_same(web, monkeypatch):
    whole = run(web / "whole", monkeypatch, Histogram())
    judge, seen = look_alikes._judge, []

    def stop(verdict, *rest):
        seen.append(verdict.key)
        if len(seen) > 25:
            raise KeyboardInterrupt
        judge(verdict, *rest)

    monkeypatch.setattr(look_alikes, "_judge", stop)
    with pytest.raises(KeyboardInterrupt):
        run(web / "work", monkeypatch, Histogram())
    assert (web / "work/final/00000.parquet").exists() and not (web / "work/final/00001.parquet").exists()
    monkeypatch.setattr(look_alikes, "_judge", judge)
    assert io.sha256_tree(run(web / "work", monkeypatch, Histogram())) == io.sha256_tree(whole)


def test_near_embeddings_are_found_among_many_in_a_cone_and_few_are_compared(tmp_path):
    """The embeddings of one model have a large part in common; a copy has a cosine of 0.96 to 0.99."""
    draw = np.random.default_rng(0)
    count, copies = 4000, 200

    def unit(rows_NE):
        return (rows_NE / np.linalg.norm(rows_NE, axis=1, keepdims=True)).astype(np.float32)

    first_NE = unit(draw.standard_normal((count, WIDTH)) + 8 * draw.standard_normal(WIDTH) / np.sqrt(WIDTH) * 3)
    wide_NE = first_NE[:copies] - first_NE.mean(0)
    near_NE = unit(
        wide_NE
        + 0.25 * np.linalg.norm(wide_NE, axis=1, keepdims=True) * unit(draw.standard_normal((copies, WIDTH)))
        + first_NE.mean(0)
    )
    cosine_N = (near_NE * first_NE[:copies]).sum(1)
    limit = float(cosine_N.min()) - 1e-3
    others = first_NE[copies:] @ first_NE[copies:].T
    np.fill_diagonal(others, 0)
    assert others.mean() > 0.5  # a cone
    with (tmp_path / "file").open("wb+", buffering=0) as file:
        index = look_alikes.EmbeddingIndex(limit, first_NE[:500].mean(0), file)
        for number, embedding_E in enumerate(first_NE):
            index.add(f"n{number}", embedding_E)
        found = [index.find(embedding_E) for embedding_E in near_NE]
        right = [pair is not None and pair[0] == number for number, pair in enumerate(found)]
        assert np.mean(right) >= 0.98
        for number, (_, cosine) in ((n, pair) for n, pair in enumerate(found) if right[n]):
            assert cosine == pytest.approx(cosine_N[number], abs=2e-3)
        compared = [len(index._hashes.candidates(index._hash(e))) for e in near_NE]
        assert np.mean(compared) < 0.02 * count
