"""`lyrics inspect`: what the pages hold, read as a browser reads them."""

import dataclasses
import html.parser
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lyrics.errors import InputError
from lyrics.foundation import masks
from lyrics.inspect import inspect
from lyrics.refiner import features
from lyrics.refiner.features import RefinedImage

HOSTILE = """</script><b onclick="x">'bold'</b>"""


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def refined_image(row: int, *, shard: int = 0, tags: tuple[str, ...] = (), path: str = "picture.png") -> RefinedImage:
    mask = np.zeros((1, 40, 80), bool)
    mask[0, 10:30, 20:60] = True
    return RefinedImage(
        image_id=f"i{shard}-{row}",
        path=path,
        width=80,
        height=40,
        captions=(f"Caption {row}", HOSTILE),
        tags=tags,
        boxes_xyxy=((20.0, 10.0, 60.0, 30.0),) * len(tags),
        scores=(0.5,) * len(tags),
        masks=masks.encode(mask) * len(tags),
        spatial_text="; ".join(tags),
        shard=shard,
        row=row,
    )


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of val (three pictures, one of them gone, and one) and one of test."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 40), "teal").save("picture.png")
    val = [
        refined_image(0, tags=("cup", "cup")),
        refined_image(1),
        refined_image(2, tags=(HOSTILE,), path="gone.png"),
        refined_image(0, shard=1, tags=("star",)),
    ]
    features.write_images(tmp_path / "refined" / "val" / features.IMAGES_FILE, val)
    features.write_images(tmp_path / "refined" / "test" / features.IMAGES_FILE, [refined_image(0, tags=("sun",))])
    return tmp_path


def test_each_shard_has_a_page_and_the_index_links_them_all(project: Path) -> None:
    gallery = inspect(Path("refined"), Path("out"))
    assert (gallery.images, gallery.missing) == (5, 1)
    links = [a["href"] for a in Elements(gallery.index).named("a")]
    assert links == ["test-00000.html", "val-00000.html", "val-00001.html"]
    assert [len(Elements(project / "out" / str(link)).named("article")) for link in links] == [1, 3, 1]
    assert "1 could not be opened" in Elements(gallery.index).text
    assert not list(project.glob(".out*"))


def test_a_card_shows_boxes_masks_tags_and_texts(project: Path) -> None:
    inspect(Path("refined"), Path("out"), ["val"])
    page = Elements(project / "out" / "val-00000.html")
    first = page.named("article")[0]
    assert (first["data-n"], first["data-tags"]) == ("2", "cup\ncup\n")
    assert "left: 25.0%; top: 25.0%; width: 50.0%; height: 50.0%" in str(page.named("i")[0]["style"])
    corners = np.array([float(v) for v in str(page.named("path")[0]["d"]).strip("MZ").replace("L", " ").split()])
    x, y = corners[::2], corners[1::2]
    np.testing.assert_allclose([x.min(), x.max(), y.min(), y.max()], [20, 60, 10, 30], atol=1)
    assert all(word in page.text for word in ("cup 0.50", "cup; cup", "Caption 0", "No object was found."))
    assert [option["value"] for option in page.named("option")] == ["", HOSTILE, "cup"]


def test_pictures_are_small_files_that_load_when_they_are_seen(project: Path) -> None:
    inspect(Path("refined"), Path("out"))
    pictures = Elements(project / "out" / "val-00000.html").named("img")
    assert len(pictures) == 2
    for picture in pictures:
        assert picture["loading"] == "lazy"
        with Image.open(project / "out" / str(picture["src"])) as thumbnail:
            assert thumbnail.format == "JPEG"
            assert thumbnail.size == (80, 40)


def test_what_strangers_wrote_stays_text(project: Path) -> None:
    inspect(Path("refined"), Path("out"))
    page = Elements(project / "out" / "val-00000.html")
    assert not page.named("b")
    assert page.text.count(HOSTILE) >= 3
    assert [script["src"] for script in page.named("script")] == ["inspect.js"]
    outside = [
        v for _, attributes in page.found for k, v in attributes.items() if k in ("src", "href") and "//" in str(v)
    ]
    assert not outside


def test_a_picture_that_is_gone_leaves_a_card_that_says_so(project: Path) -> None:
    inspect(Path("refined"), Path("out"))
    assert "gone.png cannot be read" in Elements(project / "out" / "val-00000.html").text


def test_an_older_gallery_is_replaced_and_nothing_else(project: Path) -> None:
    inspect(Path("refined"), Path("out"))
    inspect(Path("refined"), Path("out"), ["test"])
    assert not (project / "out" / "val-00000.html").exists()
    assert json.loads((project / "out" / "gallery.json").read_text())["images"] == {"test": 1}
    (project / "mine").mkdir()
    (project / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="something else than a gallery; give a new folder"):
        inspect(Path("refined"), Path("mine"))
    assert (project / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("refined", "splits", "says"),
    [
        ("absent", [], "absent is not a folder; give the one that `refine` wrote"),
        (".", [], "no split with images.parquet; give the folder that holds them"),
        ("refined", ["train"], "no split train; it has test, val"),
    ],
)
def test_what_cannot_be_shown_says_what_can(project: Path, refined: str, splits: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says.replace(".", r"\.")):
        inspect(Path(refined), Path("out"), splits)
    assert not Path("out").exists()


def test_a_damaged_table_is_named(project: Path) -> None:
    Path("refined/val/images.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"val/images\.parquet cannot be read .* python -m lyrics refine"):
        inspect(Path("refined"), Path("out"))
    assert not Path("out").exists()


def test_without_a_segmenter_there_are_boxes_alone(project: Path) -> None:
    plain = dataclasses.replace(refined_image(0, tags=("cup",)), masks=("",))
    features.write_images(project / "plain" / "val" / features.IMAGES_FILE, [plain])
    inspect(Path("plain"), Path("out"))
    page = Elements(project / "out" / "val-00000.html")
    assert len(page.named("i")) == 1
    assert not page.named("path")
