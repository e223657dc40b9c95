"""Each fitted part, from data to files to use, at toy sizes; two fits give the same bytes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import CLIP, KINDS, SIDE, TAGGER, configuration, write_foundation

from lyrics.errors import InputError
from lyrics.foundation import clip, fit, llm, manifest
from lyrics.io import sha256_tree
from lyrics.model.pictures import Pictures
from lyrics.model.vision import load_image_encoder
from lyrics.refiner import tagging
from lyrics.stage import NullTracker

PARTS = ("tokenizer", "llm", "clip", "tagger")
TEMPLATES = Path(__file__).parents[2] / "params/templates"


class Recorder(NullTracker):
    def __init__(self):
        self.metrics = []

    def log_metrics(self, values, step=None):
        self.metrics.append((step, values))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Every part made in order, and made again."""
    folder = tmp_path_factory.mktemp("project")
    write_foundation(folder, 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(llm, "TEMPLATES", TEMPLATES)
        for part in PARTS:
            for destination in (folder / "again" / part, folder / "models/foundation" / part):
                fit.run(part, configuration(), folder / "work", NullTracker())
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(folder / "work/out", destination)
        yield folder


@pytest.mark.parametrize("part", PARTS)
def test_two_fits_are_the_same_bytes_and_match_their_manifest(project, part):
    made = project / "models/foundation" / part
    assert sha256_tree(made) == sha256_tree(project / "again" / part)
    written = manifest.verify(made)
    assert (written["part"], written["source"], written["licence"]) == (part, "fitted", "Apache-2.0")
    assert all(np.isfinite(value) for value in written["quality"].values())
    assert {oct(file.stat().st_mode & 0o777) for file in made.iterdir()} == {"0o644"}


def test_another_seed_gives_other_weights(project, tmp_path):
    other = configuration()
    other.seed = 1
    fit.run("clip", other, tmp_path, NullTracker())
    assert sha256_tree(tmp_path / "out") != sha256_tree(project / "models/foundation/clip")


def test_a_fit_that_was_killed_leaves_nothing_behind_in_the_next(project, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/half.safetensors").write_bytes(b"half")
    fit.run("tokenizer", configuration(), tmp_path, NullTracker())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["manifest.json", "tokenizer.json"]


def test_losses_are_logged_over_steps_and_the_quality_at_the_end(project, tmp_path):
    tracker = Recorder()
    fit.run("clip", configuration(), tmp_path, tracker)
    steps = [step for step, values in tracker.metrics if "foundation/clip_itc_loss" in values]
    assert steps[0] == 0 and steps == sorted(steps) and len(steps) > 1
    last_step, last = tracker.metrics[-1]
    assert last_step is None and {"foundation/clip_recall_at_1", "foundation/clip_region_tag_accuracy"} <= set(last)


def test_an_unknown_part_is_refused(project, tmp_path):
    with pytest.raises(InputError, match="no foundation part 'ear'"):
        fit.run("ear", configuration(), tmp_path, NullTracker())


def test_llm_loads_with_its_tokenizer_and_template(project):
    model, tokenizer = llm.load_llm(project / "models/foundation/llm")
    assert not model.training and model.dtype == torch.float32
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert model.config.vocab_size == len(tokenizer)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is left?"}],
        spatial_text="disc 1 2 3 4;",
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<s><image>disc 1 2 3 4; question: What is left?"
    ids = tokenizer(text.replace("<image>", ""), add_special_tokens=False)["input_ids"]
    read = llm.read_document("disc 1 2 3 4; question: What is left? answer: disc", tokenizer)
    assert read.ids[: len(ids)] == ids  # the prompt reads as the documents did


def test_clip_compares_pictures_boxes_and_texts(project):
    folder = project / "models/foundation/clip"
    loaded = clip.load_clip(folder)
    images = [Image.open(project / f"data/raw/foundation/images/{i}.png") for i in (1, 2, 3)]
    image_BE, text_BE = loaded.encode_images(images), loaded.encode_texts(["a red disc", "a blue square " * 40])
    assert image_BE.shape == (3, 16) and text_BE.shape == (2, 16)
    regions = loaded.encode_regions(
        images, [np.array([[0, 0, 16, 16], [16, 16, 32, 32]]), np.zeros((0, 4)), [[1, 1, 9, 9]]]
    )
    assert [len(r) for r in regions] == [2, 0, 1]
    for rows in (image_BE, text_BE, regions[0]):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))
    torch.testing.assert_close(loaded.encode_images(images[1:2]), image_BE[1:2])  # whatever is beside it in the batch
    torch.testing.assert_close(loaded.encode_texts(["a red disc"]), text_BE[:1])
    assert loaded.encode_images([]).shape == (0, 16) and clip.has_text_tower(folder)


def test_image_encoder_gives_the_penultimate_layer(project):
    folder = project / "models/foundation/clip"
    encoder, whole = load_image_encoder(folder), clip.load_clip(folder)
    pixels = encoder.preprocess([Image.new("RGB", (SIDE, SIDE), "red"), Image.new("RGB", (50, 20))])
    assert pixels.shape == (2, 3, SIDE, SIDE)
    tokens_BPD, finer = encoder(pixels)
    assert finer == []
    assert tokens_BPD.shape == (2, encoder.patches, encoder.width) == (2, 17, CLIP.hidden_size)
    every_layer = whole.model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tokens_BPD, every_layer[-2])
    assert encoder.feature_map(tokens_BPD).shape == (2, CLIP.hidden_size, 4, 4)
    torch.testing.assert_close(encoder.feature_map(tokens_BPD)[0, :, 1, 2], tokens_BPD[0, 1 + 4 + 2])
    assert not encoder.train().training and not any(p.requires_grad for p in encoder.parameters())


def test_the_towers_of_a_folder_share_what_they_see(project):
    folder, cpu = project / "models/foundation/clip", torch.device("cpu")
    encoder, whole = load_image_encoder(folder), clip.load_clip(folder)
    images = [Image.open(project / f"data/raw/foundation/images/{i}.png") for i in (1, 2, 3)]
    pictures = Pictures(images)
    tokens_BPD = encoder.look(pictures, cpu)
    whole.model.vision_model.embeddings = None  # what was seen is not looked at again
    shared = whole.patch_features(pictures), whole.encode_images(pictures)
    alone = clip.load_clip(folder)
    torch.testing.assert_close(tokens_BPD, encoder(encoder.preprocess(images))[0])
    torch.testing.assert_close(shared, (alone.patch_features(images), alone.encode_images(images)))


def test_tagger_gives_tags_of_its_vocabulary_best_first(project):
    loaded = tagging.load_tagger(project / "models/foundation", TAGGER)
    assert loaded.vocabulary == KINDS
    images = [Image.open(project / f"data/raw/foundation/images/{i}.png") for i in (1, 2)]
    tags = loaded.tag(images)
    assert len(tags) == 2 and all(1 <= len(t) <= 2 and set(t) <= set(KINDS) for t in tags)
    assert loaded.tag([]) == []
    assert tagging.above(torch.tensor([0.2, 0.9, 0.7]), ("a", "b", "c"), torch.full((3,), 0.5)) == ["b", "c"]
    assert tagging.above(torch.tensor([0.2, 0.9, 0.7]), ("a", "b", "c"), torch.tensor([0.1, 0.8, 0.8])) == ["b", "a"]
    assert tagging.above(torch.tensor([0.2, 0.2]), ("a", "b"), torch.full((2,), 0.5)) == ["a"]


@pytest.mark.parametrize(("part", "missing"), [("tokenizer", "corpus.txt"), ("llm", "corpus.txt")])
def test_a_split_without_a_corpus_says_what_to_do(project, tmp_path, monkeypatch, part, missing):
    shutil.copytree(project / "data", tmp_path / "data")
    (tmp_path / "data/raw/foundation" / missing).unlink()
    (tmp_path / "models").symlink_to(project / "models")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{missing}.*preset laptop or paper"):
        fit.run(part, configuration(), tmp_path / "work", NullTracker())


def test_a_model_without_a_template_is_refused(project, tmp_path):
    with pytest.raises(InputError, match=r"params/templates/other\.jinja does not exist|other\.jinja does not exist"):
        fit.run("llm", configuration(llm={"name": "other", "steps": 1}), tmp_path, NullTracker())
