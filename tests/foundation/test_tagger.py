import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_world import TAGGER, configuration, write_foundation

from lyrics.data.records import Annotation
from lyrics.errors import InputError
from lyrics.foundation import clip as clip_part
from lyrics.foundation import manifest, tagger, tokenizer
from lyrics.foundation.clip import load_clip
from lyrics.refiner import tagging
from lyrics.stage import NullTracker


def test_a_tag_in_one_patch_is_enough():
    torch.manual_seed(0)
    head = tagger.TagHead(4, 4, 2)
    with torch.no_grad():
        head.hidden.weight.copy_(10 * torch.eye(4))
        head.classify.weight.zero_()
        head.classify.weight[0, 0] = 1.0
        head.classify.bias.fill_(-3.0)
        patches_BPD = torch.zeros(1, 64, 4)
        patches_BPD[0, 17, 0] = 1.0
        logits_BV = head(patches_BPD)
    assert logits_BV[0, 0] > 5 and logits_BV[0, 1] < -2


def test_quality_counts_pairs_of_picture_and_tag():
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, logits):
            return logits

    said = torch.tensor([[9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])
    true = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    quality = tagger.quality_of(Fixed(), said, true, 0.5)
    assert quality == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})


def test_oracle_has_a_vocabulary_and_reads_annotations(tmp_path, monkeypatch):
    write_foundation(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    part = tmp_path / "models/foundation/tagger"
    (tmp_path / "work/out").mkdir(parents=True)
    made = tagger.fit(configuration(tagger={"source": "annotations"}), tmp_path / "work", None)
    part.parent.mkdir(parents=True)
    (tmp_path / "work/out").rename(part)
    manifest.write(part, "tagger", made)
    oracle = tagging.load_tagger(tmp_path / "models/foundation", TAGGER)
    assert oracle.vocabulary == ("disc", "square")
    box = (0.0, 0.0, 1.0, 1.0)
    truth = [tuple(Annotation(category=c, box_xyxy=box) for c in ("square", "disc", "square")), ()]
    assert oracle.tag([None, None], truth) == [["square", "disc"], []]
    assert oracle.tag([None]) == [[]]


def test_vocabulary_comes_from_a_file_or_from_the_splits(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("cat\n\n dog \t 0.25\ncat\t0.9\nfire hydrant\t\n")
    part = configuration(tagger={"vocabulary": str(words)}).foundation.tagger
    assert tagger.read_vocabulary(part, tmp_path) == {"cat": None, "dog": 0.25, "fire hydrant": None}
    for bad in ("dog\tsure", "dog\t1.5", "dog\tnan", "dog\t0.1\t0.2"):
        words.write_text(f"cat\n{bad}\n")
        with pytest.raises(InputError, match=r"words\.txt:2: the threshold of 'dog' is .*expected a number from 0"):
            tagger.read_vocabulary(part, tmp_path)
    words.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"words\.txt, which cannot be read .*expected one tag a line"):
        tagger.read_vocabulary(part, tmp_path)
    words.write_text("\n \n")
    with pytest.raises(InputError, match=r"no tag in .*words\.txt"):
        tagger.read_vocabulary(part, tmp_path)
    with pytest.raises(InputError, match=r"absent\.txt, which cannot be read"):
        tagger.read_vocabulary(configuration(tagger={"vocabulary": "absent.txt"}).foundation.tagger, tmp_path)
    with pytest.raises(InputError, match="no tag to give"):
        tagger.read_vocabulary(TAGGER, tmp_path)
    (tmp_path / "val").mkdir()
    document = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "kite"}]}
    (tmp_path / "val/instances.json").write_text(json.dumps(document))
    assert tagger.read_vocabulary(TAGGER, tmp_path) == {"kite": None}


def made_part(tmp_path, **fields):
    """A tagger part, made through `fit` with the vocabulary words.txt, and its configuration."""
    config = configuration(tagger={"vocabulary": str(tmp_path / "words.txt"), **fields})
    folder = tmp_path / "tagger"
    (folder / "out").mkdir(parents=True)
    made = tagger.fit(config, folder, None)
    (folder / "out").rename(tmp_path / "made")
    folder.rmdir()
    (tmp_path / "made").rename(folder)
    manifest.write(folder, "tagger", made)
    return config.foundation.tagger


class OneHotClip:
    """Pictures and texts on axes: a picture of size (i, j) shows the tags i and j, to 0.8 and 0.6."""

    scale = 10.0
    axes = ("cat", "dog", "kite", "thing")

    def __init__(self):
        self.asked = []

    def encode_texts(self, texts):
        self.asked += texts
        return torch.stack([torch.eye(4)[[axis in text for axis in self.axes].index(True)] for text in texts])

    def encode_images(self, images):
        return torch.stack([0.8 * torch.eye(4)[i.width - 1] + 0.6 * torch.eye(4)[i.height - 1] for i in images])


def test_zero_shot_judges_each_tag_by_its_own_threshold_in_every_sentence(tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("cat\ndog\t0.9999\nkite\n")
    prompts = ("a photo of a {}", "the {}, {}")
    part = made_part(tmp_path, source="zero_shot", prompts=prompts, threshold=0.9)
    clip = OneHotClip()
    monkeypatch.setattr("lyrics.foundation.clip.load_clip", lambda *_: clip)
    loaded = tagging.load_tagger(tmp_path, part)
    assert {"a photo of a kite", "the dog, dog", "a photo of a thing"} <= set(clip.asked)
    pictures = [Image.new("RGB", size) for size in ((1, 3), (3, 2), (2, 1), (4, 2))]
    # sigmoid(10 × 0.8) is 0.99966, sigmoid(10 × 0.6) 0.9975; against "thing" the last picture has 0 and sigmoid(-2).
    assert loaded.tag(pictures) == [["cat", "kite"], ["kite"], ["dog", "cat"], ["dog"]]
    assert loaded.tag([]) == []


def test_a_word_more_in_the_vocabulary_does_not_change_what_others_get():
    clip, picture = OneHotClip(), Image.new("RGB", (1, 3))
    few = tagging.ZeroShotTagger(clip, ("cat", "kite"), ("a {}",), [0.5, 0.5])
    more = tagging.ZeroShotTagger(clip, ("dog", "cat", "kite"), ("a {}",), [0.5, 0.5, 0.5])
    assert few.tag([picture]) == more.tag([picture]) == [["cat", "kite"]]


@pytest.mark.parametrize("prompts", [(), ("a photo",), ("a {}", "a photo of it")])
def test_prompts_have_a_place_for_the_tag(tmp_path, prompts):
    (tmp_path / "words.txt").write_text("cat\n")
    with pytest.raises(InputError, match=r"foundation\.tagger\.prompts.*where the tag belongs"):
        made_part(tmp_path, source="zero_shot", prompts=prompts)


def test_zero_shot_through_a_clip_of_transformers(project_of_clip, tmp_path):
    """Random weights: the texts go through a real tokenizer and tower, and the scores are those written out here."""
    (tmp_path / "words.txt").write_text("disc\nsquare\n")
    part = made_part(tmp_path, source="zero_shot", threshold=0.5)
    (tmp_path / "clip").symlink_to(project_of_clip)
    loaded = tagging.load_tagger(tmp_path, part)
    clip = load_clip(project_of_clip)
    pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "white")]
    texts = clip.encode_texts(["a photo of a disc", "a photo of a square", "a photo of a thing"])
    logits = clip.scale * clip.encode_images(pictures) @ texts.T
    pairs = torch.stack([logits[:, :2], logits[:, 2:].expand(-1, 2)]).softmax(0)[0]
    for said, row in zip(loaded.tag(pictures), pairs, strict=True):
        best, other = row.argsort(descending=True).tolist()
        assert said == [("disc", "square")[i] for i in (best, other) if i == best or row[i] > 0.5]


@pytest.fixture
def project_of_clip(tmp_path, monkeypatch):
    """A `clip` part of random weights, with the tokenizer that a fit of the small world writes."""
    write_foundation(tmp_path / "world", 4)
    monkeypatch.chdir(tmp_path / "world")
    for name, module in (("tokenizer", tokenizer), ("clip", clip_part)):
        (Path("work") / name / "out").mkdir(parents=True)
        module.fit(configuration(clip={"epochs": 0}), Path("work") / name, NullTracker())
        Path("models/foundation").mkdir(parents=True, exist_ok=True)
        (Path("work") / name / "out").rename(Path("models/foundation") / name)
    return (tmp_path / "world/models/foundation/clip").resolve()


def test_without_a_tagger_every_word_is_looked_for(tmp_path):
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    part = made_part(tmp_path, source="none")
    assert tagging.load_tagger(tmp_path, part).tag([None, None], [(), ()]) == [["cat", "dog"]] * 2
