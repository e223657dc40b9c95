import json

import pytest
import torch
from small_world import TAGGER, configuration, write_foundation

from lyrics.data.records import Annotation
from lyrics.errors import InputError
from lyrics.foundation import manifest, tagger
from lyrics.refiner import tagging


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
    words.write_text("cat\n\n dog \ncat\n")
    part = configuration(tagger={"vocabulary": str(words)}).foundation.tagger
    assert tagger.read_vocabulary(part, tmp_path) == ["cat", "dog"]
    with pytest.raises(InputError, match=r"absent\.txt, which is no file"):
        tagger.read_vocabulary(configuration(tagger={"vocabulary": "absent.txt"}).foundation.tagger, tmp_path)
    with pytest.raises(InputError, match="no tag to give"):
        tagger.read_vocabulary(TAGGER, tmp_path)
    (tmp_path / "val").mkdir()
    document = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "kite"}]}
    (tmp_path / "val/instances.json").write_text(json.dumps(document))
    assert tagger.read_vocabulary(TAGGER, tmp_path) == ["kite"]


def test_zero_shot_tagger_must_share_the_clip(tmp_path):
    with pytest.raises(InputError, match=r"foundation\.tagger\.name is other"):
        tagger.fit(configuration(tagger={"source": "hub", "name": "other"}), tmp_path, None)
