import dataclasses
import io as stdio
import itertools
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lyrics import io
from lyrics.config import Clean, Engine
from lyrics.data import clean, clean_judge, clean_page, clean_report, rows
from lyrics.data.webdataset import WebPair, read_pairs, write_tar
from lyrics.errors import InputError
from lyrics.stage import NullTracker

ONE_WORKER = Engine(kind="local", address=None, workers=1, threads_per_worker=1, gpus_per_worker=0, retries=0)
SETTINGS = Clean(
    min_side_px=48,
    max_aspect_ratio=4.0,
    drop_animated=True,
    duplicate_hamming_bits=24,
    min_words=2,
    max_words=60,
    max_repetition=0.5,
    repair_encodings=True,
    drop_unsafe_words=True,
    min_english_probability=0.02,
    max_better_captions=0.3,
    look_alike_cosine=None,
)
COLORS = ("red", "green", "blue", "white")
GOOD = 60
PLANTED = [
    reason for reason in clean_report.REASONS if reason != "look_alike"
]  # which tests/clean/test_look_alikes.py has


class FakeEncoder:
    """Embeds a picture by its key colour's number, a caption by the number it names."""

    def __init__(self):
        self.calls = 0

    def encode_images(self, images):
        self.calls += 1
        codes = [int(np.asarray(image)[2, 2, 0]) for image in images]
        return np.stack([self._embed(code) for code in codes])

    def encode_texts(self, texts):
        return np.stack([self._embed(3 * int(text.split()[1][1:])) for text in texts])

    @staticmethod
    def _embed(code):
        angle = code / 255 * np.pi
        return np.array([np.cos(angle), np.sin(angle)], np.float32)


def jpeg(seed, size=(64, 64)):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (8, 8, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)
    image.paste((3 * seed, 3 * seed, 3 * seed), (0, 0, 8, 8))
    buffer = stdio.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def again(content, scale=0.9, quality=70, form="JPEG"):
    """The same picture as another site would serve it."""
    image = Image.open(stdio.BytesIO(content))
    buffer = stdio.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale))).save(buffer, form, quality=quality)
    return buffer.getvalue()


def moving(form="GIF"):
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    buffer = stdio.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def pair(key, content, caption):
    return WebPair(key=key, image_bytes=content, caption=caption, meta={"url": "u", "width": 64, "height": 64})


@pytest.fixture
def web(tmp_path, monkeypatch):
    """Two shards in which every kind of dirt lies once, and its truth."""
    monkeypatch.chdir(tmp_path)
    good = [pair(f"g{n:02d}", jpeg(n), f"Picture n{n} is a good one.") for n in range(GOOD)]
    bad = {
        "broken": pair("b0", b"<html>404</html>", "Picture n60 is broken."),
        "truncated": pair("b00", jpeg(60)[:-200], "Picture n60 is cut."),
        "animated": pair("b01", moving(), "Picture n60 is moving."),
        "tiny": pair("b1", jpeg(61, (32, 32)), "Picture n61 is tiny."),
        "extreme": pair("b2", jpeg(62, (400, 64)), "Picture n62 is extreme."),
        "unsafe": pair("b30", jpeg(63), "Picture n63 is a Word to hide."),
        "boilerplate": pair("b3", jpeg(63), "Click here to see n63"),
        "length": pair("b4", jpeg(64), "One"),
        "repetition": pair("b40", jpeg(64), "Picture n64 big sale big sale big sale big sale big sale"),
        "encoding": pair("b41", jpeg(64), "Picture n64 is a caf\ufffd."),
        "language": pair("b5", jpeg(65), "Ein n65 schönes Bild auf dunklem Grund."),
        "leaked": pair("b8", again(jpeg(67)), "Picture n67 is one of val."),
        "duplicate": pair("b6", jpeg(7), "Picture n7 is a copy."),
        "mismatched": pair("b7", jpeg(2), "Picture n59 is not this."),
    }
    bad["mismatched"] = pair("b7", jpeg(66), "Picture n2 is not this.")
    io.write_bytes(Path("data/raw/val/images/000000000001.jpg"), jpeg(67))
    write_tar(Path("data/raw/web/00000.tar"), good[: GOOD // 2])
    write_tar(Path("data/raw/web/00001.tar"), good[GOOD // 2 :] + list(bad.values()))
    truth = [{"key": p.key, "dirt": "clean"} for p in good] + [{"key": p.key, "dirt": r} for r, p in bad.items()]
    io.write_text(clean.UNSAFE_WORDS, "# a list\n\nword  to\u0020hide\n")
    truth[3]["dirt"] = "mismatched"  # dirt that nothing can see
    rows.write_rows(Path("data/raw/web_truth.parquet"), truth, clean.pa.schema([("key", "string"), ("dirt", "string")]))
    return tmp_path


class Config:
    clean = SETTINGS
    device = "cpu"
    engine = ONE_WORKER


def run(work, monkeypatch, encoder):
    monkeypatch.setattr(clean, "_load_encoder", lambda *_: encoder)
    if not clean.UNSAFE_WORDS.exists():
        io.write_text(clean.UNSAFE_WORDS, "")
    work.mkdir(parents=True, exist_ok=True)
    clean.run(Config, work, NullTracker())
    return work / "out"


def test_what_a_killed_worker_left_of_a_tar_is_not_published(web, monkeypatch):
    io.write_text(web / "work/kept/.00000.tar.abc.tmp", "half of it")
    out = run(web / "work", monkeypatch, FakeEncoder())
    assert {path.name for path in out.iterdir()} >= {"00000.tar", "ledger.parquet"} and not list(out.glob(".*"))


def test_every_kind_of_dirt_is_dropped_for_its_reason(web, monkeypatch):
    out = run(web / "work", monkeypatch, FakeEncoder())
    ledger = {row["key"]: row for row in pq.read_table(out / "ledger.parquet").to_pylist()}
    dropped = [row["reason"] for row in ledger.values() if not row["kept"]]
    assert dropped == PLANTED
    assert ledger["b6"]["detail"] == "of g07" and ledger["b6"]["shard"] == "00001.tar"
    assert ledger["b8"]["detail"] == "of val/000000000001.jpg"
    kept = [p for tar in sorted(out.glob("*.tar")) for p in read_pairs(tar)]
    raw = {p.key: p for tar in sorted(Path("data/raw/web").glob("*.tar")) for p in read_pairs(tar)}
    assert [p.key for p in kept] == [f"g{n:02d}" for n in range(GOOD)]
    assert all(p.image_bytes == raw[p.key].image_bytes and p.caption == raw[p.key].caption for p in kept)


def test_the_report_counts_and_scores(web, monkeypatch):
    report = io.read_json(run(web / "work", monkeypatch, FakeEncoder()) / "report.json")
    assert report["held_out"] == {"test": 0, "test_ood": 0, "val": 1}
    assert report["pairs"] == GOOD + len(PLANTED) and report["kept"] == GOOD
    assert report["dropped"] == {**dict.fromkeys(PLANTED, 1), "look_alike": 0} and report["not_checked"] == {
        "mismatched": 0
    }
    assert report["score"]["precision"] == 1.0 and report["score"]["recall"] == pytest.approx(14 / 15)
    assert report["score"]["reasons"]["mismatched"]["recall"] == 0.5
    assert report["examples"]["language"][0]["caption"].startswith("Ein")
    assert clean_report.metrics(report)["clean/dropped_tiny"] == 1


def test_pictures_of_every_split_that_measures_are_found_again_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forms = [(1.0, 95, "PNG"), (1.0, 40, "JPEG"), (0.8, 70, "JPEG"), (1.5, 85, "JPEG"), (2.0, 80, "WEBP")]
    planted, pairs = {}, [pair(f"own{n}", jpeg(n), f"Picture n{n} is a good one.") for n in range(20)]
    for s, split in enumerate(("val", "test", "test_ood", "instruct")):
        for n, form in enumerate(forms):
            content = jpeg(30 + 10 * s + n, (96, 96))
            name = f"{n}.jpg" if n else "train2017/0.jpg"  # COCO names some with their folder
            io.write_bytes(Path(f"data/raw/{split}/images/{name}"), content)
            pairs.append(pair(f"{split}{n}", again(content, *form), "Picture n1 is here again."))
            planted[f"{split}{n}"] = "" if split == "instruct" else f"of {split}/{name}"
    write_tar(Path("data/raw/web/00000.tar"), pairs)
    found = pq.read_table(run(tmp_path / "work", monkeypatch, None) / "ledger.parquet").to_pylist()
    leaked = {row["key"]: row["detail"] for row in found if row["reason"] == "leaked"}
    assert leaked == {key: detail for key, detail in planted.items() if detail}
    assert all(row["kept"] for row in found if row["key"] not in leaked)


def test_a_damaged_picture_of_val_stops_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(Path("data/raw/web/00000.tar"), [pair("a", jpeg(1), "A star.")])
    io.write_bytes(Path("data/raw/val/images/a.jpg"), jpeg(2)[:-200])
    with pytest.raises(InputError, match=r"val/images/a\.jpg cannot be compared"):
        run(tmp_path / "work", monkeypatch, None)
    assert not (tmp_path / "work/out").exists()


def test_a_repaired_caption_is_what_is_judged_matched_and_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = jpeg(1)
    stored = "A caf\u00c3\u00a9 by the sea", "A caf\u00e9 by the sea", "  A dog \u201cbarks\u201d &amp "
    pairs = [pair(f"p{n}", jpeg(n), caption) for n, caption in enumerate(stored)]
    write_tar(Path("data/raw/web/00000.tar"), pairs)
    out = run(tmp_path / "work", monkeypatch, None)
    kept = list(read_pairs(out / "00000.tar"))
    assert [p.caption for p in kept] == [stored[1], *stored[1:]]
    assert kept[0].meta["caption"] == stored[1] and kept[1].image_bytes == content
    assert pq.read_table(out / "00000.parquet")["caption"].to_pylist() == [stored[1], *stored[1:]]
    assert pq.read_table(out / "ledger.parquet")["repaired"].to_pylist() == [True, False, False]
    assert io.read_json(out / "report.json")["repaired"] == 1


def test_each_new_filter_can_be_switched_off(web, monkeypatch):
    off = {"drop_animated": False, "max_repetition": 1.0, "repair_encodings": False, "drop_unsafe_words": False}
    settings = dataclasses.replace(SETTINGS, **off)
    clean.UNSAFE_WORDS.unlink()
    assert clean_judge.judge(pair("a", moving(), "A big sale big sale big sale big sale"), settings).reason == ""
    verdict = clean_judge.judge(pair("a", jpeg(1), "A caf\u00c3\u00a9 by the sea"), settings)
    assert verdict.caption == "A caf\u00c3\u00a9 by the sea" and not verdict.repaired
    monkeypatch.setattr(Config, "clean", settings)
    monkeypatch.setattr(clean, "_load_encoder", lambda *_: None)
    clean.run(Config, web / "work", NullTracker())
    assert io.read_json(web / "work/out/report.json")["dropped"]["unsafe"] == 0


@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=pytest.mark.soak)])
def test_other_processes_write_the_same_bytes_as_this_one(web, monkeypatch, kind):
    """Each worker loads what it needs by itself, so nothing here is patched."""
    settings = dataclasses.replace(SETTINGS, max_better_captions=None)
    monkeypatch.setattr(Config, "clean", settings)
    written = []
    for name, engine in (("here", ONE_WORKER), ("apart", dataclasses.replace(ONE_WORKER, kind=kind, workers=2))):
        monkeypatch.setattr(Config, "engine", engine)
        work = web / name
        work.mkdir()
        clean.run(Config, work, NullTracker())
        out = work / "out"
        written.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert {"00000.tar", "00001.tar", "ledger.parquet", "report.json", "report.html"} < set(written[0])
    assert written[0] == written[1]


def test_a_missing_list_of_words_is_named(web, monkeypatch):
    clean.UNSAFE_WORDS.unlink()
    monkeypatch.setattr(clean, "_load_encoder", lambda *_: None)
    with pytest.raises(InputError, match=r"unsafe_words\.txt is no readable list.*drop_unsafe_words=false"):
        clean.run(Config, web / "work", NullTracker())


def test_the_page_needs_nothing_else_and_escapes_what_strangers_wrote(web, monkeypatch):
    evil = '<script>alert("x")</script> a caption'
    write_tar(Path("data/raw/web/00002.tar"), [pair("e0", jpeg(70), evil), pair('e"1', jpeg(71), "One")])
    out = run(web / "work", monkeypatch, FakeEncoder())
    page = (out / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:image/jpeg)""", page) and "url(" not in page
    report = io.read_json(out / "report.json")
    shown = {row["key"]: reason for reason, rows in report["examples"].items() for row in rows}
    assert all(key.replace('"', "&#34;") in page for key in shown)
    undecodable = [key for key, reason in shown.items() if reason in ("broken", "truncated")]
    assert page.count("no picture</span>") == len(undecodable) == 2
    assert page.count("data:image/jpeg;base64,") == len(shown) - 2


def test_the_funnel_and_the_distributions_add_up(web, monkeypatch):
    report = io.read_json(run(web / "work", monkeypatch, FakeEncoder()) / "report.json")
    steps = clean_page.funnel(report)
    assert steps[0]["came"] == report["pairs"] and steps[-1]["left"] == report["kept"]
    assert all(step["left"] == following["came"] for step, following in itertools.pairwise(steps))
    sides = report["distributions"]["shorter side, px"]
    assert sum(sides["before"]) == report["pairs"] - 2 and sum(sides["after"]) == report["kept"] == GOOD
    assert sides["before"][1] == 1 and sides["after"][3] == GOOD  # one of 32 px; the others have 64, or 86 of leak
    shape = clean_page.distribution("longer by shorter side", report["distributions"]["longer by shorter side"])
    assert [row["before"] for row in shape["rows"]][-1] == 1 and shape["rows"][-1]["name"] == "≥ 6"
    assert max(row[key] for row in shape["rows"] for key in ("before_width", "after_width")) == 100


def test_without_an_image_text_model_mismatches_are_counted_as_not_checked(web, monkeypatch):
    report = io.read_json(run(web / "work", monkeypatch, None) / "report.json")
    assert report["dropped"]["mismatched"] == 0 and report["not_checked"] == {"mismatched": GOOD + 1}


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(web, monkeypatch):
    whole = run(web / "whole", monkeypatch, FakeEncoder())
    stopped = FakeEncoder()

    def stop(texts):
        if stopped.calls > 1:
            raise KeyboardInterrupt
        return FakeEncoder.encode_texts(stopped, texts)

    stopped.encode_texts = stop
    with pytest.raises(KeyboardInterrupt):
        run(web / "work", monkeypatch, stopped)
    monkeypatch.setattr(clean_judge, "judge", lambda *_: pytest.fail("a finished shard was judged again"))
    second = FakeEncoder()
    again = run(web / "work", monkeypatch, second)
    assert second.calls == 1  # the first shard was matched before
    assert io.sha256_tree(again) == io.sha256_tree(whole)


def test_an_empty_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"data/raw/web holds no \.tar"):
        run(tmp_path / "work", monkeypatch, None)


def test_a_source_without_web_pairs_leaves_an_empty_ledger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    io.write_text(Path("data/raw/web/absent.txt"), "none\n")
    out = run(tmp_path / "work", monkeypatch, None)
    assert pq.read_table(out / "ledger.parquet").num_rows == 0
    assert io.read_json(out / "report.json")["kept"] == 0


def test_a_shard_in_which_nothing_is_good_leaves_an_empty_shard(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(Path("data/raw/web/00000.tar"), [pair("a", None, "A star."), pair("b", jpeg(1), None)])
    out = run(tmp_path / "work", monkeypatch, FakeEncoder())
    assert list(read_pairs(out / "00000.tar")) == []
    assert [row["reason"] for row in pq.read_table(out / "ledger.parquet").to_pylist()] == ["broken", "length"]
    assert io.read_json(out / "report.json")["score"] is None


def peak_bytes(folder, count):
    """Most memory that Python objects take while `count` verdicts go through everything that sees all of them."""

    def verdicts():
        for n in range(count):
            reason = clean_report.REASONS[n % 3] if n % 2 else ""
            yield clean_judge.Verdict(key=f"{n:09d}", caption=f"Picture {n} " * 5, reason=reason)

    tracemalloc.start()
    clean_judge.write_verdicts(folder / "judged/a.parquet", verdicts())
    shares = itertools.repeat(0.5)
    marked = clean.mark_mismatches(clean_judge.read_verdicts(folder / "judged/a.parquet"), shares, 0.6)
    clean_judge.write_verdicts(folder / "final/a.parquet", marked)
    report = clean_report.summary(clean.ledger([Path("a.tar")], folder), {})
    rows.write_rows(folder / "ledger.parquet", clean.ledger([Path("a.tar")], folder), clean._LEDGER_SCHEMA)
    truth = ((verdict.key, verdict.reason or "clean") for verdict in verdicts())
    score = clean_report.score(clean.ledger([Path("a.tar")], folder), truth)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report["pairs"] == count and report["kept"] == count // 2 and score["precision"] == score["recall"] == 1
    return peak


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 100)
    peak_bytes(tmp_path / "warm", 400)
    assert peak_bytes(tmp_path / "many", 4_000) < 1.1 * peak_bytes(tmp_path / "few", 400)
