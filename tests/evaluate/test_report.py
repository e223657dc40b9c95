import base64
import html.parser
import io
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluated_project import FakeModel, configured
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from lyrics.errors import InputError
from lyrics.evaluate import charts, evaluate, gallery, pictures, plots, report
from lyrics.stage import NullTracker

EVIL = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "link", "input", "img", "image", "line", "polyline", "circle", "rect", "path", "br"}


class Page(html.parser.HTMLParser):
    """Elements, ids, links and addresses of a page; unclosed or crossed elements are an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.sources = [], [], set(), [], []
        self.feed(text)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.ids.add(values.get("id"))
        for name in ("src", "href", "srcset", "action", "data"):
            (self.links if tag == "a" else self.sources).extend([values[name]] if values.get(name) else [])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def written(project, tmp_path):
    config = configured(project[1], splits=("test", "test_ood"), samples_per_split=12, gallery_size=10)
    evaluate.run(config, tmp_path, NullTracker(), FakeModel())
    return tmp_path / "out", config


def test_the_page_is_whole_and_loads_nothing(written):
    out, _ = written
    text = (out / "index.html").read_text()
    page = Page(text)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert len(page.sources) > 20
    assert page.links and all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"https?://|url\(|@import", text)
    assert page.tags.count("h1") == 1
    assert "chance 4.16" in text
    assert page.tags.count("article") == 4 + 2 * 10


def test_text_of_models_and_data_is_escaped(written, monkeypatch):
    out, config = written
    path = out / "samples/test.parquet"
    table = pq.read_table(path)
    evil = table.to_pylist()
    for row in evil:
        row |= {
            "question": EVIL,
            "prediction": EVIL,
            "kind": EVIL,
            "references": [EVIL],
            "prediction_other_image": EVIL,
        }
    pq.write_table(type(table).from_pylist(evil, schema=table.schema), path)
    report.write(out, config)
    text = (out / "index.html").read_text()
    assert EVIL not in text
    assert "alert(&#39;x&#39;)" in text
    Page(text)


def test_missing_optional_inputs_leave_a_sentence(written, tmp_path, monkeypatch):
    out, config = written
    for name in ("CLEAN", "FOUNDATION"):
        monkeypatch.setattr(report, name, Path("nowhere"))
    monkeypatch.setattr(plots, "STAGES", {"stage1": Path("nowhere"), "stage2": Path("nowhere")})
    report.write(out, config)
    text = (out / "index.html").read_text()
    assert text.count('class="absent"') == 4
    Page(text)


def test_without_scores_there_is_no_report(project, tmp_path):
    with pytest.raises(InputError, match=r"evaluation.json does not exist.*lyrics evaluate"):
        report.write(tmp_path, project[1])


def test_broken_pairs_are_shown_as_broken(project):
    found = report.cleaning()
    assert found is not None
    reasons = {reason["reason"]: reason for reason in found["reasons"]}
    assert reasons["broken"]["count"] == 1
    assert [example["picture"] for example in reasons["broken"]["examples"]] == [None]
    assert all(example["picture"] for example in reasons["tiny"]["examples"])
    assert found["pairs"] == 60 and found["kept"] + sum(r["count"] for r in found["reasons"]) == 60


def test_the_gallery_takes_kinds_and_verdicts_in_turn():
    rows = [
        {"task": "vqa", "kind": kind, "score": score, "sample_id": f"{kind}{score}{i}", "image_id": str(i)}
        for kind, count in (("colour", 50), ("count", 5))
        for score in (0.0, 1.0)
        for i in range(count)
    ]
    chosen = gallery.choose(rows, 12, 0)
    assert [(r["kind"], gallery.verdict(r)) for r in chosen].count(("count", "wrong")) == 3
    assert len({r["image_id"] for r in chosen}) >= 11
    assert len(gallery.choose(rows[:3], 12, 0)) == 3


def test_outline_follows_the_mask():
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 5:30] = 1
    counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    path = pictures.outline(counts, 60, 40)
    points = np.array([[float(v) for v in point.split()] for point in re.findall(r"[ML]([^MLZ]+)", path)])
    assert path.startswith("M") and path.endswith("Z")
    np.testing.assert_allclose(points.min(axis=0), [5, 10], atol=0.6)
    np.testing.assert_allclose(points.max(axis=0), [30, 20], atol=0.6)
    assert pictures.outline(coco_mask.encode(np.asfortranarray(mask * 0))["counts"].decode(), 60, 40) == ""


def test_large_pictures_are_scaled_down(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (700, 1000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    uri = pictures.data_uri(tmp_path / "large.png")
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 150_000


def test_no_picture_keeps_what_its_camera_wrote(tmp_path):
    """A browser would turn it, but not the boxes over it; and it may say where it was taken."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg", exif=turned)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "b.jpg")
    shown = {
        name: base64.b64decode(pictures.data_uri(tmp_path / name).partition(",")[2]) for name in ("a.jpg", "b.jpg")
    }
    with Image.open(io.BytesIO(shown["a.jpg"])) as image:
        assert not image.getexif() and image.size == (40, 20)
    assert shown["b.jpg"] == (tmp_path / "b.jpg").read_bytes()


def test_ticks_are_round_and_inside():
    assert charts.ticks(0.0, 4.3) == [0, 2, 4]
    assert charts.ticks(0.15, 0.68, 4) == [0.2, 0.4, 0.6]
    assert charts.nice_ceiling(5.09) == 10
    assert charts.nice_ceiling(2.0) == 2


def test_curves_survive_a_single_point_and_gaps(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 10, "stage2/lm_loss": 2.0, "note": "x"}\n')
    (curve,) = charts.loss_curves(tmp_path)
    assert curve.name == "Answer tokens"
    assert "2.00 at step 10" in curve.description
    (tmp_path / "history.jsonl").write_text("not json\n")
    with pytest.raises(InputError, match=r"history.jsonl is not JSON lines"):
        charts.loss_curves(tmp_path)


def test_curves_draw_chance_and_floor(project):
    names = {curve.name: [line[2] for line in curve.lines] for curve in charts.loss_curves(Path("models/stage1"))}
    assert names == {"Image and caption (ITC)": ["chance 4.16"], "Matching (ITM)": ["chance 0.64"]}
