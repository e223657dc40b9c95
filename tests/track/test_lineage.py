"""Where a version comes from."""

import subprocess
from pathlib import Path

from lyrics import io
from lyrics.track import lineage


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def test_commit_state_pipeline_and_data(project):
    Path("dvc.lock").write_text("stages: {}\n")
    git("init", "-q")
    git("add", "dvc.lock")
    git("commit", "-q", "-m", "first")
    tags = lineage.collect().tags()
    assert tags["git_commit"] == git("rev-parse", "HEAD") and tags["git_state"] == "clean"
    assert tags["dvc_lock_sha256"] == io.sha256_file(Path("dvc.lock"))
    assert {key for key in tags if key.startswith("data/")} == {"data/web", "data/test"}
    assert tags["environment/mlflow"]
    Path("dvc.lock").write_text("stages: {x: 1}\n")
    assert lineage.collect().tags()["git_state"] == "dirty: dvc.lock"


def test_what_is_unknown_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    tags = lineage.collect().tags()
    assert tags["git_commit"].startswith("none") and tags["dvc_lock_sha256"].startswith("none")


def test_content_follows_every_byte_and_name_but_not_the_place(tmp_path):
    for place in ("here", "there"):
        io.write_text(tmp_path / place / "a" / "x", "1")
        io.write_text(tmp_path / place / "b" / "x", "2")
    here, there = tmp_path / "here", tmp_path / "there"
    same = lineage.content_sha256(a=here / "a", b=here / "b")
    assert same == lineage.content_sha256(b=there / "b", a=there / "a")
    assert same != lineage.content_sha256(a=here / "b", b=here / "a"), "parts that change places are other content"
    io.write_text(there / "b" / "x", "3")
    assert same != lineage.content_sha256(a=there / "a", b=there / "b")
