import pytest

from lyrics.errors import InputError
from lyrics.foundation import manifest
from lyrics.io import sha256_file


@pytest.fixture
def part(tmp_path):
    folder = tmp_path / "clip"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"weights")
    (folder / "sub/more.txt").write_text("more")
    made = manifest.Made(source="fitted", name="clip", parameters=7, quality={"recall_at_1": 1 / 3})
    manifest.write(folder, "clip", made)
    return folder


def test_manifest_says_where_a_part_came_from_and_hashes_every_file(part):
    written = manifest.verify(part)
    assert written["sha256"] == {
        "sub/more.txt": sha256_file(part / "sub/more.txt"),
        "weights.bin": sha256_file(part / "weights.bin"),
    }
    del written["sha256"]
    assert written == {
        "part": "clip",
        "source": "fitted",
        "name": "clip",
        "revision": None,
        "licence": "Apache-2.0",
        "parameters": 7,
        "quality": {"recall_at_1": 0.333333},
    }


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda f: (f / "weights.bin").write_bytes(b"weightz"), "weights.bin has sha256"),
        (lambda f: (f / "weights.bin").unlink(), "weights.bin is in the manifest but not on disk"),
        (lambda f: (f / "sub/new.txt").write_text(""), "sub/new.txt is not in the manifest"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json does not exist"),
    ],
)
def test_verify_names_the_file_that_is_not_as_it_was(part, spoil, named):
    spoil(part)
    with pytest.raises(InputError, match=named) as caught:
        manifest.verify(part)
    assert "python -m lyrics foundation clip" in str(caught.value)
