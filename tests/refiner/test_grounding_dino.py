"""Grounding DINO at its smallest and with random weights, in the layout of the published files."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

from lyrics.config import DetectorPart
from lyrics.errors import InputError
from lyrics.foundation import grounding_dino, hub, manifest
from lyrics.refiner import detection

PART = DetectorPart(
    source="grounding_dino",
    name="some/dino",
    revision="a" * 40,
    sha256=None,
    image_size_px=128,
    score_threshold=0.0,
    nms_iou=0.6,
    epochs=0,
    batch_size=1,
    lr=0.0,
)
MOST_TOKENS = 16
WORDS = ("cat", "dog", "traffic", "light", "kite", "a", "fire", "hydrant")


def write_published(folder):
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        SwinConfig,
    )

    # The model knows the ends of phrases by the numbers that BERT's vocabulary gives them.
    words = [f"[unused{i}]" for i in range(1030)]
    words[0], words[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words[1012], words[1029] = ".", "?"
    words[200 : 200 + len(WORDS)] = WORDS
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, num_queries=12, max_text_len=MOST_TOKENS,
        encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, disable_custom_kernels=True,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    GroundingDinoImageProcessor().save_pretrained(folder)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory):
    """A foundation whose detector was made as the stage makes it, of what the hub would have given."""
    folder = tmp_path_factory.mktemp("foundation")
    write_published(folder / "hub")
    (folder / "detector").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        fetched = SimpleNamespace(folder=folder / "hub", licence="Apache-2.0")
        patch.setattr(grounding_dino.hub, "fetch", lambda *_: fetched)
        made = grounding_dino.fit(PART, folder / "detector")
    manifest.write(folder / "detector", "detector", made)
    return folder


PICTURES = [Image.new("RGB", size, colour) for size, colour in (((100, 50), "red"), ((64, 64), "blue"))]


def test_the_part_is_what_the_hub_gave(foundation):
    written = manifest.verify(foundation / "detector")
    assert (written["source"], written["revision"], written["licence"]) == ("grounding_dino", "a" * 40, "Apache-2.0")
    assert written["parameters"] > 10_000
    assert not [file for file in written["sha256"] if file.endswith((".bin", ".pt", ".pth"))]


@torch.inference_mode()
def test_scores_are_those_of_transformers_for_the_same_words(foundation):
    """Post-processing written out anew, over each tag's own words in the published form of the text."""
    model = grounding_dino.GroundingDino(foundation / "detector")
    ((one,),) = model.predict(PICTURES[:1], [["traffic light", "cat"]])
    inputs = model._processor(images=PICTURES[:1], return_tensors="pt")
    encoded = model._tokenizer("traffic light . cat .", return_tensors="pt")
    output = model._model(**inputs, **encoded)
    tokens = model._tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    assert tokens == ["[CLS]", "traffic", "light", ".", "cat", ".", "[SEP]"]
    probability = output.logits.sigmoid()[0]
    expected = torch.stack([probability[:, 1:3].mean(1), probability[:, 4]], dim=1)
    torch.testing.assert_close(one.scores_QT, expected)
    assert inputs["pixel_values"].shape[-2:] == (106, 213)  # the longest side by 1333/800, as published
    processor = transformers.GroundingDinoProcessor(model._processor, model._tokenizer)
    (theirs,) = processor.post_process_grounded_object_detection(
        output, encoded["input_ids"], threshold=-1.0, target_sizes=[(50, 100)]
    )
    torch.testing.assert_close(one.boxes_xyxy, theirs["boxes"])


@torch.inference_mode()
def test_a_picture_is_seen_as_if_alone(foundation):
    model = grounding_dino.GroundingDino(foundation / "detector")
    same_size = [PICTURES[1], Image.new("RGB", (64, 64), "white")]
    asked = [["cat"], ["kite", "traffic light", "dog"]]
    together = model.predict(same_size, asked)
    for picture, tags, (looked,) in zip(same_size, asked, together, strict=True):
        ((alone,),) = model.predict([picture], [tags])
        torch.testing.assert_close(looked.scores_QT, alone.scores_QT, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(looked.boxes_xyxy, alone.boxes_xyxy, atol=1e-3, rtol=1e-4)


def test_more_tags_than_a_text_holds_are_asked_for_in_several(foundation):
    model = grounding_dino.GroundingDino(foundation / "detector")
    tags = ["cat", "traffic light", "dog", "fire hydrant", "kite", "a cat", "a dog", "a kite"]
    texts = model.texts(tags)
    assert [place for text in texts for place, _ in text] == list(range(len(tags)))
    lengths = [2 + sum(len(ids) + 1 for _, ids in text) for text in texts]
    assert len(texts) == 2 and all(length <= MOST_TOKENS for length in lengths)
    looks = model.predict(PICTURES[:1], [tags])[0]
    assert len(looks) == 2
    first = [place for place, _ in texts[0]]
    rest = [place for place, _ in texts[1]]
    assert (looks[0].scores_QT[:, rest] == 0).all() and (looks[0].scores_QT[:, first] > 0).all()
    assert (looks[1].scores_QT[:, first] == 0).all() and (looks[1].scores_QT[:, rest] > 0).all()


def test_tags_of_any_characters(foundation):
    model = grounding_dino.GroundingDino(foundation / "detector")
    assert model.texts(["cat. dog?"]) == model.texts(["cat dog"])
    assert [[place for place, _ in text] for text in model.texts(["...", "cat", " "])] == [[1]]
    ((place, ids),) = model.texts(["cat " * 100])[0]
    assert place == 0 and len(ids) <= MOST_TOKENS - 3
    assert model.predict(PICTURES, [["?"], []]) == [[], []]


def test_behind_the_interface(foundation):
    loaded = detection.load_detector(foundation, PART)
    found, nothing, other = loaded.detect([*PICTURES, PICTURES[0]], [["cat", "traffic light"], [], ["dog"]])
    assert loaded.width == 32 and found.features.shape == (12, 32)
    assert (found.score[:-1] >= found.score[1:]).all() and set(found.tag_index.tolist()) <= {0, 1}
    assert (found.boxes_xyxy >= 0).all() and (found.boxes_xyxy <= [100, 50, 100, 50]).all()
    assert (len(nothing), nothing.features.shape) == (0, (0, 32))
    assert set(other.tag_index.tolist()) == {0}
    strict = detection.load_detector(foundation, dataclasses.replace(PART, score_threshold=1.0))
    assert [len(one) for one in strict.detect(PICTURES, [["cat"]] * 2)] == [0, 0]


def test_without_its_weights_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("cannot reach it")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=f"where there is a network run: hf download some/dino --revision {'a' * 40}"):
        grounding_dino.fit(PART, tmp_path)
    assert hub._LICENCES["IDEA-Research/grounding-dino-tiny"] == "Apache-2.0"
