import io
import json
import time
from pathlib import Path

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from lyrics.data import clean_judge, files, filters

CAPTIONS = [
    "A red umbrella left of a star.",
    "A blue skull.",
    "Two purple diamonds.",
    "A man standing on a beach next to a surfboard.",
    "Woman eating a bagel, 1980s",
    "Image of a phone and a cup",
    "A stop sign with a click counter",
]


def picture(seed, size=(96, 96)):
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(0, 80, 3)))
    for _ in range(4):
        x, y = rng.integers(0, size[0] - 30), rng.integers(0, size[1] - 30)
        ImageDraw.Draw(image).ellipse((x, y, x + 30, y + 30), fill=tuple(rng.integers(80, 255, 3)))
    return image


def reencoded(image, scale, quality):
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale))).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ordinary_captions_stay(caption):
    assert filters.boilerplate(caption) is None
    assert filters.length(caption, 2, 60) is None
    assert filters.language(caption, 0.02) is None


@pytest.mark.photos
def test_captions_of_photographs_stay():
    file = Path(__file__).parents[2].parent / "shared/photos/train/captions.json"
    if not file.exists():
        pytest.skip(f"{file} is absent: real files for testing are not part of the project")
    captions = [record["caption"] for record in json.loads(file.read_bytes())["annotations"]]
    dropped = [c for c in captions if filters.boilerplate(c) or filters.length(c, 2, 60) or filters.language(c, 0.02)]
    words = filters.word_pattern(clean_judge.read_words(Path(__file__).parents[2] / "params/unsafe_words.txt"))
    dropped += [c for c in captions if filters.repetition(c, 0.5) or filters.encoding(c) or filters.unsafe(c, words)]
    assert [filters.repaired(c) for c in captions] == captions
    assert len(captions) > 500 and dropped == []


@pytest.mark.parametrize(
    ("caption", "detail"),
    [
        ("IMG_1234.JPG", "file name"),
        ("photo 0012", "file name"),
        ("see www.example.org for more", "address"),
        ("https://example.org/x", "address"),
        ("Click to enlarge", "call to act"),
        ("Sunset over hills - Free shipping", "call to act"),
        ("Sunset Royalty Free Stock Photo", "stock"),
        ("© 2019 Somebody", "rights"),
        ("Untitled", "placeholder"),
        ("posted by admin", "by-line"),
        ("<b>Sunset</b>", "markup"),
        ("4411-22 / 17 x", "more digits and signs than letters"),
    ],
)
def test_boilerplate_is_named(caption, detail):
    assert filters.boilerplate(caption) == detail


@pytest.mark.parametrize(
    ("caption", "code"),
    [
        ("Ein roter Regenschirm links von einem Stern", "de"),
        ("une étoile rouge à gauche d'un parapluie", "fr"),
        ("un paraguas rojo a la izquierda de una estrella", "es"),
        ("красный зонт слева от звезды", "ru"),
        ("一把红色的雨伞在星星的左边", "zh"),
        ("一つの赤い傘は星の左にあります", "ja"),
    ],
)
def test_other_languages_are_named(caption, code):
    assert filters.language(caption, 0.02).startswith(f"{code}, ")


def test_sizes_shapes_and_lengths_at_their_limits():
    assert filters.tiny(48, 300, 48) is None and filters.tiny(300, 47, 48) == "300 × 47"
    assert filters.extreme(400, 100, 4.0) is None and filters.extreme(100, 401, 4.0) == "100 × 401, 4.0 : 1"
    assert filters.length("two words", 2, 3) is None
    assert filters.length("one", 2, 3) == "1 words" and filters.length("", 2, 3) == "0 words"
    assert filters.length("免费下载的电脑壁纸", 2, 60) is None
    assert filters.length("one two three four", 2, 3) == "4 words"


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_file_that_stops_early_is_truncated_and_noise_in_a_whole_one_is_not(form):
    whole = encoded(picture(1), form)
    assert filters.truncated(whole) is None and filters.truncated(whole + b"\0\n") is None
    for share in (0.5, 0.7, 0.95):
        cut = whole[: int(len(whole) * share)]
        with pytest.raises(files.BadImageError):
            files.decode(cut)
        assert filters.truncated(cut), share
    assert filters.truncated(b"<html>404</html>") is None and filters.truncated(b"") is None


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_only_several_frames_are_animated(form):
    frames = [picture(seed) for seed in range(3)]
    assert filters.animated(encoded(frames[0], form, save_all=True, append_images=frames[1:])) == "several frames"
    assert filters.animated(encoded(frames[0], form)) is None


def test_a_second_picture_in_a_jpeg_and_pages_are_not_animated():
    for form in ("MPO", "TIFF"):
        content = encoded(picture(1), form, save_all=True, append_images=[picture(2)])
        assert filters.animated(content) is None, form


def test_how_colours_alpha_and_orientation_are_decoded():
    red = Image.new("RGB", (6, 4), (255, 0, 0))
    assert files.decode(encoded(red.convert("CMYK"), "JPEG", quality=95)).getpixel((2, 2)) == pytest.approx(
        (254, 0, 0), abs=3
    )
    hidden = Image.new("RGBA", (6, 4), (10, 200, 30, 0))
    assert files.decode(encoded(hidden, "PNG")).getpixel((0, 0)) == (10, 200, 30)  # stored under full transparency
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert files.decode(encoded(red, "JPEG", exif=exif)).size == (6, 4)


@pytest.mark.parametrize(
    ("caption", "share"),
    [
        ("sale sale sale sale sale", "75% said before"),
        ("Big Sale big sale BIG sale big sale", "71% said before"),
        ("ha ha ha", None),
        ("a star to the left of a star to the left of a moon", None),
        ("word", None),
        ("", None),
    ],
)
def test_repetition(caption, share):
    assert filters.repetition(caption, 0.5) == share


@pytest.mark.parametrize(
    "text", ["café by the sea", "“Ünter” – naïve façade", "Привет, мир", "一张漂亮的图片", "señor"]
)
def test_misread_encodings_are_repaired_and_others_untouched(text):
    assert filters.repaired(text) == text
    assert filters.repaired(text.encode().decode("latin-1")) == text
    assert filters.encoding(text) is None and filters.encoding(text + "\ufffd") == "1 lost characters"


def test_markup_and_quotes_are_left_to_the_other_filters():
    assert filters.repaired("Tom &amp; Jerry \u201cfun\u201d") == "Tom &amp; Jerry \u201cfun\u201d"


def test_unsafe_words_are_found_whole_in_any_case():
    pattern = filters.word_pattern(["bad", "very  wrong", "c++"])
    assert filters.unsafe("A BAD picture", pattern) == "bad"
    assert filters.unsafe("a Very\twrong one", pattern) == "very\twrong"
    assert filters.unsafe("about c++!", pattern) == "c++"
    assert filters.unsafe("a badger, very, wrong", pattern) is None
    assert filters.word_pattern([]) is None and filters.unsafe("bad", None) is None


@pytest.mark.parametrize("image", [*map(picture, range(20)), Image.new("RGB", (64, 64))])
def test_hashes_are_those_of_imagehash(image):
    assert filters.perceptual_hash(image) == str(imagehash.phash(image, hash_size=filters.HASH_SIDE))


def test_reencoded_pictures_are_duplicates_and_other_pictures_are_not():
    index = filters.DuplicateIndex(24)
    for seed in range(40):
        assert index.find_or_add(f"p{seed}", filters.perceptual_hash(picture(seed))) is None
    for seed in range(40):
        again = reencoded(picture(seed), 0.85 + 0.01 * seed, 70)
        assert index.find_or_add("again", filters.perceptual_hash(again)) == f"p{seed}"


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 24))
def test_bands_find_what_comparing_all_pairs_finds(data, max_bits):
    bits = st.integers(0, 2**filters.HASH_BITS - 1)
    values = data.draw(st.lists(bits, min_size=1, max_size=6))
    for value in list(values):
        flips = data.draw(st.sets(st.integers(0, filters.HASH_BITS - 1), max_size=max_bits + 2))
        values.append(value ^ sum(1 << flip for flip in flips))
    index, originals = filters.DuplicateIndex(max_bits), []
    for value in values:
        expected = next((o for o in originals if (o ^ value).bit_count() <= max_bits), None)
        found = index.find_or_add(str(value), f"{value:064x}")
        assert found == (None if expected is None else str(expected))
        if expected is None:
            originals.append(value)


def test_duplicate_search_is_not_quadratic():
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(32).hex() for _ in range(8000)]
    index = filters.DuplicateIndex(24)
    start = time.perf_counter()
    assert all(index.find_or_add(value, value) is None for value in hashes)
    assert time.perf_counter() - start < 8
    assert index.find_or_add("again", hashes[5]) == hashes[5]


def test_a_caption_is_ranked_among_the_others():
    images = np.eye(4, dtype=np.float32)
    texts = np.eye(4, dtype=np.float32)[[1, 0, 2, 3]] + 0.01 * np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(filters.better_captions(images, texts), [1 / 3, 1 / 3, 0, 0])
    assert filters.better_captions(images[:1], texts[:1]).tolist() == [0]
    assert filters.mismatched(0.31, 0.3) and filters.mismatched(0.3, 0.3) is None


@pytest.mark.parametrize("caption", ["a-" * 10_000, "<a" * 10_000])
def test_the_longest_caption_is_judged_in_no_time(caption):
    """Time grew with the square of a caption without spaces: 11 s for the first of these."""
    started = time.process_time()
    filters.boilerplate(caption)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(("form", "suffix"), [("MPO", "jpg"), ("AVIF", "avif"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_a_picture_is_called_what_its_bytes_are(form, suffix):
    """Phones hide a second picture in a JPEG; other readers know it as one."""
    buffer = io.BytesIO()
    one, other = Image.new("RGB", (40, 30)), Image.new("RGB", (20, 15))
    one.save(buffer, form, **({"save_all": True, "append_images": [other]} if form == "MPO" else {}))
    assert files.measure(buffer.getvalue()) == (suffix, 40, 30)
