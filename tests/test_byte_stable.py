"""Every stage, done again by force, gives the same bytes: dvc.lock stays as it was."""

from pathlib import Path

import pytest
import real_project

from lyrics import dag

SMALL = [
    *("world.scenes.foundation=120", "world.scenes.web=80", "world.scenes.instruct=60", "world.scenes.val=10"),
    *("world.scenes.test=10", "world.scenes.test_ood=10", "world.corpus_documents=800"),
    *("foundation.llm.steps=12", "foundation.clip.epochs=2", "foundation.tagger.epochs=2"),
    *("foundation.detector.epochs=2", "foundation.segmenter.epochs=1"),
    *("stage1.steps=8", "stage2.steps=8", "stage2.first.steps=3", "evaluate.samples_per_split=8"),
]


@pytest.mark.soak  # the whole pipeline twice, with small numbers
@pytest.mark.timeout(3600)
def test_a_forced_run_of_every_stage_leaves_dvc_lock_unchanged(tmp_path: Path) -> None:
    project = real_project.copy(tmp_path)
    project("lyrics", "configure", "~overrides", "preset=tiny", "data=world", *SMALL)
    project("dvc", "repro")
    before = (tmp_path / "dvc.lock").read_text()
    assert set(dag.read(tmp_path / "dvc.yaml")) <= {line.strip().rstrip(":") for line in before.splitlines()}
    project("dvc", "repro", "--force", "--no-run-cache")
    assert (tmp_path / "dvc.lock").read_text() == before
