"""Publishing: what is finished comes into its place whole, wherever that is mounted."""

import errno
from pathlib import Path

import pytest

from lyrics import io


def folder(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    (path / "a.txt").write_text(text)
    return path


@pytest.fixture
def mounted(monkeypatch):
    """Nothing can be renamed out of a folder called `work`, as onto another file system."""
    rename = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if "work" in self.parts and "work" not in Path(target).parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse)


def test_a_folder_takes_the_place_of_the_one_before(tmp_path):
    io.publish(folder(tmp_path / "work/new", "new"), folder(tmp_path / "data", "old"))
    assert (tmp_path / "data/a.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "work"]
    assert not (tmp_path / "work/new").exists()


def test_onto_another_file_system_it_is_copied(tmp_path, mounted):
    io.publish(folder(tmp_path / "work/new", "new"), folder(tmp_path / "data", "old"))
    assert (tmp_path / "data/a.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "work"]


def test_a_copy_that_fails_leaves_what_was_there(tmp_path, mounted, monkeypatch):
    def full(source: Path, target: Path) -> None:
        target.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    with pytest.raises(OSError, match="No space left"):
        io.publish(folder(tmp_path / "work/new", "new"), folder(tmp_path / "data", "old"))
    assert (tmp_path / "data/a.txt").read_text() == "old"
