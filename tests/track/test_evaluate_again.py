"""A version scored again on a test set of real pictures, as `python -m lyrics promote` and the flow have it done.

The model is a fake in the place of `lyrics.inference.Lyrics`; everything around it is the real thing.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lyrics import compose, io
from lyrics.data import vqa
from lyrics.data.formats import write_coco, write_json_lines
from lyrics.errors import InputError
from lyrics.evaluate import again
from lyrics.refiner.features import RefinedSplit
from lyrics.track import gates, registry, server, versions

ROOT = Path(__file__).parents[2]
CHANNELS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
PICTURES, SIDE = 12, 8


def write_test_set(folder: Path, colours: list[str]) -> None:
    """Twelve plain pictures, the colour of each asked for, and where its left half is."""
    shutil.rmtree(folder)
    images, asked, expressions = [], [], []
    for number in range(1, PICTURES + 1):
        colour, name = colours[number % len(colours)], f"{number}.png"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), CHANNELS[colour]).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        asked.append((number, "colour", "What color is it?", colour))
        expressions.append({"img_path": name, "expression": "the left half", "bbox": [0, 0, 4, 8]})
    write_coco(folder, images, [], [], [])
    vqa.write(folder, asked, "test")
    write_json_lines(folder / "refcoco.jsonl", [{**e, "width": SIDE, "height": SIDE} for e in expressions])


@pytest.fixture
def here(project):
    """The present project: a configuration, and a test set of red and blue pictures. There is no data/refined."""
    values = compose.preview(["~overrides", "preset=tiny", "data=world"], ROOT / "params/run.yaml")
    values["promote"] |= {"minimum": {"vqa_accuracy": 0.4}, "bootstrap_samples": 200}
    values["evaluate"]["meteor"] = False
    compose.write(values)
    write_test_set(Path("data/raw/test"), ["red", "blue"])
    return project


def register(sources, make_model, *models) -> None:
    """Versions 1, 2 … as (logged score, colours that its encoder tells apart), scored on an older test set."""
    kept = Path("data/raw/test")
    kept.rename("kept")
    io.write_text(kept / "captions.json", "questions of long ago")
    for number, (quality, colours) in enumerate(models):
        io.write_text(kept / "captions.json", f"questions of long ago, {number}")
        make_model(quality, colours=colours)
        registry.register({}, sources)
    shutil.rmtree(kept)
    Path("kept").rename(kept)


def champion() -> int | None:
    found = versions.by_alias(server.connect(), "champion")
    return int(found.version) if found else None


def make_champion(version: int) -> None:
    server.connect().set_registered_model_alias("lyrics", "champion", str(version))


def test_a_version_is_scored_by_its_own_parts_on_the_present_set(here, sources, make_model, fake_model):
    """Version 1 knows red alone. What lies in models/ is version 2, which knows more; data/refined is not there."""
    register(sources, make_model, (0.9, ["red"]), (0.5, ["red", "blue"]))
    for version, expected in ((1, 0.5), (2, 1.0)):
        reports = again.evaluate_again(version, "test")
        found = io.read_json(reports / "evaluation.json")
        assert found["splits"]["test"]["vqa_accuracy"]["model"] == expected
        assert found["splits"]["test"]["refer_accuracy"]["model"] == 1.0, "boxes are read in the version's own format"
        assert found["data"]["test"] == {"path": "data/raw/test", "sha256": io.sha256_tree(Path("data/raw/test"))}
        scores = gates.read_scores(reports / "samples" / "test.parquet")
        assert len(scores) == 2 * PICTURES and len({score.sample_id for score in scores}) == 2 * PICTURES
        assert sum(score.score for score in scores if score.task == "vqa") == expected * PICTURES
        assert [path.name for path in reports.parent.iterdir()] == ["finished"], "features and answers are removed"


def test_a_killed_evaluation_goes_on_and_a_finished_one_is_kept(here, sources, make_model, fake_model, monkeypatch):
    register(sources, make_model, (0.9, ["red"]))
    looked = Path("looked.txt")
    whole = again.evaluate_again(1, "test")
    shutil.copytree(whole, "whole")
    assert sum(map(int, looked.read_text().split())) == PICTURES
    again.evaluate_again(1, "test")
    assert sum(map(int, looked.read_text().split())) == PICTURES, "a finished evaluation is not repeated"

    shutil.rmtree(again.WORK)
    looked.unlink()
    answer = fake_model.answer_batch
    asked = []

    def dies(self, questions, *arguments, **options):
        asked.append(questions[0])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, questions, *arguments, **options)

    monkeypatch.setattr(fake_model, "answer_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        again.evaluate_again(1, "test")
    assert not list(again.WORK.rglob("finished")) and not list(again.WORK.rglob("evaluation.json"))
    assert len(asked) == 2 and asked[0] != asked[1], "one call a task"
    monkeypatch.setattr(fake_model, "answer_batch", answer)
    resumed = again.evaluate_again(1, "test")
    assert resumed == whole and io.sha256_tree(resumed) == io.sha256_tree(Path("whole"))
    assert sum(map(int, looked.read_text().split())) == PICTURES, "the features of the killed process were used"


def test_new_questions_or_settings_are_asked_anew(here, sources, make_model, fake_model):
    register(sources, make_model, (0.9, ["red"]))
    first = again.evaluate_again(1, "test")
    write_test_set(Path("data/raw/test"), ["green"])
    second = again.evaluate_again(1, "test")
    assert second != first and not first.exists(), "the last one of a version is kept"
    assert io.read_json(second / "evaluation.json")["splits"]["test"]["vqa_accuracy"]["model"] == 0.0
    values = compose.preview(["~overrides", "preset=tiny", "data=world"], ROOT / "params/run.yaml")
    values["evaluate"] |= {"samples_per_split": 5, "meteor": False}
    compose.write(values)
    Path("looked.txt").unlink()
    assert len(gates.read_scores(again.evaluate_again(1, "test") / "samples/test.parquet")) == 2 * 5
    assert sum(map(int, Path("looked.txt").read_text().split())) <= 2 * 5, "only pictures that are asked about"


def test_features_are_those_that_refine_would_write(here, sources, make_model, fake_model):
    from lyrics.data.annotated import read_split

    split = read_split(Path("data/raw/test"))
    refined = again._refine(fake_model(0.5, []), "test", split, Path("refined"))
    assert isinstance(refined, RefinedSplit) and refined.image_ids == [image.image_id for image in split.images]
    assert refined.samples == split.samples
    for number, image_id in enumerate(refined.image_ids, start=1):
        assert refined.seen(image_id).image_tokens_PD.argmax() == [0, 2][number % 2]


def test_an_absent_test_set_is_refused(here, sources, make_model):
    register(sources, make_model, (0.9, ["red"]))
    shutil.rmtree("data/raw/test")
    with pytest.raises(InputError, match=r"version 1 must be scored again, but data/raw/test does not exist; fetch it"):
        again.evaluate_again(1, "test")
    assert not again.WORK.exists() or not any(again.WORK.glob(f"{again.NAME}/*"))


def lyrics(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m lyrics` in the package with the fake model."""
    environment = {**os.environ, "PYTHONPATH": str(Path("fake").absolute())}
    command = [sys.executable, "-m", "lyrics", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_command_line_scores_again_promotes_and_refuses(here, sources, make_model):
    """The logged scores say the opposite of the fresh ones."""
    register(sources, make_model, (0.9, ["red"]), (0.5, ["red", "blue"]))
    make_champion(1)
    promoted = lyrics("promote")
    assert promoted.returncode == 0, promoted.stderr
    assert "vqa no worse than the champion: +0.5000" in promoted.stdout
    assert "(version 1 and version 2 scored again on the test set that is here now)" in promoted.stdout
    assert "lyrics version 2 is champion, in place of version 1" in promoted.stdout
    assert "lyrics: version 1 is scored on data/raw/test as it is now" in promoted.stderr
    assert champion() == 2
    refused = lyrics("promote", "1")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "version 1 was not promoted; nothing changed, version 2 stays champion" in refused.stderr
    assert "vqa no worse than the champion: -0.5000" in refused.stderr
    assert "this takes a while" not in refused.stderr, "both are known already"
    assert champion() == 2


def test_only_the_champion_is_scored_again_where_the_candidate_was_scored_here(here, sources, make_model, fake_model):
    register(sources, make_model, (0.9, ["red"]), (0.5, ["blue", "red"]))
    make_champion(1)
    shutil.rmtree("reports")
    shutil.copytree(again.evaluate_again(2, "test"), "reports")  # as the stage `evaluate` would have scored it
    assert registry.register({}, sources).version == 3
    verdict = registry.promote(evaluate_again=again.evaluate_again)
    assert (verdict.version, verdict.former, verdict.scored_again) == (3, 1, (1,))
    assert "vqa no worse than the champion: +0.5000" in str(verdict)


def test_the_flow_scores_again(here, sources, make_model, fake_model, flow, capsys):
    register(sources, make_model, (0.9, ["red"]), (0.5, ["red", "blue"]))
    make_champion(1)
    assert flow() == 0
    assert "vqa no worse than the champion: +0.5000" in capsys.readouterr().out and champion() == 2
    assert flow("--version", "1") == 2
    assert "vqa no worse than the champion: -0.5000" in capsys.readouterr().err and champion() == 2
