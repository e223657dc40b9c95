"""Detectors from an ultralytics file, at their smallest and with random weights: YOLO, end-to-end YOLO, YOLO-World."""

import dataclasses
import json
import socket
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lyrics.config import DetectorPart
from lyrics.errors import InputError
from lyrics.foundation import detector_file, manifest, yolo
from lyrics.io import sha256_file
from lyrics.refiner import detection

PICTURE = Image.new("RGB", (64, 64))
NAMES = {0: "Star", 1: "moon", 2: "sun"}


def part(path, **fields):
    values = {"source": "file", "name": str(path), "revision": None, "sha256": None, "image_size_px": 64}
    values |= {"score_threshold": 0.0, "nms_iou": 0.6, "epochs": 0, "batch_size": 1, "lr": 0.0}
    return DetectorPart(**{**values, **fields})


def write_tower(folder):
    """A CLIP text tower of random weights in the 512 dimensions of ViT-B/32's, with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

    words = [
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
        "[UNK]",
        "[BOS]",
        "[EOS]",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, words.index(name)) for name in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]", pad_token="[EOS]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        projection_dim=512,
        bos_token_id=words.index("[BOS]"),
        eos_token_id=words.index("[EOS]"),
        pad_token_id=words.index("[EOS]"),
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    write_tower(folder)
    return folder


@pytest.fixture
def convert(tmp_path, monkeypatch, tower):
    """Writes a model as ultralytics does, converts it as the stage does, and forbids every connection."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("it reached for the network")

    def convert(model):
        path = tmp_path / "their.pt"
        torch.save({"model": model, "train_args": {}}, path)
        chosen = part(path, sha256=sha256_file(path))
        (tmp_path / "detector").mkdir()
        manifest.write(tmp_path / "detector", "detector", detector_file.fit(chosen, tmp_path / "detector"))
        return tmp_path

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(detector_file.hub, "fetch", lambda *_: SimpleNamespace(folder=tower))
    return convert


def their_model(name):
    yolo.load_ultralytics()
    from ultralytics.nn.tasks import DetectionModel, WorldModel

    torch.manual_seed(0)
    model = (WorldModel if "world" in name else DetectionModel)(name, nc=3, verbose=False)
    model.names = dict(NAMES)
    return model.eval()


@torch.inference_mode()
def test_a_yolo_scores_the_tags_it_has_a_class_for(convert):
    model = their_model("yolo11n.yaml")
    folder = convert(model)
    assert not list((folder / "detector").glob("*.pt"))
    loaded = detector_file.NamedDetector(folder / "detector")
    pixels = torch.rand(2, 3, 64, 64)
    expected = model(pixels)[0]
    predictions, maps = loaded.predict(pixels, [["moon", "unicorn", "star"], ["sun"]])
    torch.testing.assert_close(predictions[0, :5], expected[0, [0, 1, 2, 3, 5]])
    assert (predictions[0, 5] == 0).all()
    torch.testing.assert_close(predictions[0, 6], expected[0, 4])
    torch.testing.assert_close(predictions[1, :5], expected[1, [0, 1, 2, 3, 6]])
    assert (predictions[1, 5:] == 0).all()
    assert maps[0].shape[:2] == (2, loaded.width)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["yolo26n.yaml", "yolov10n.yaml"])
def test_a_yolo_with_an_end_to_end_head_is_read_through_its_ordinary_one(convert, name):
    model = their_model(name)
    model.model[-1].end2end = True
    pixels = torch.rand(1, 3, 64, 64)
    assert model(pixels)[0].shape[2] == 6  # boxes that are suppressed already
    loaded = detector_file.NamedDetector(convert(model) / "detector")
    model.model[-1].end2end = False
    torch.testing.assert_close(loaded.predict(pixels, [["Star", "moon", "sun"]])[0], model(pixels)[0])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["yolov8n-world.yaml", "yolov8n-worldv2.yaml"])
def test_a_yolo_world_is_prompted_with_any_tag(convert, name):
    """Its own forward pass with the same texts, each picture alone: neighbours and their tags change nothing."""
    model = their_model(name)
    for head in model.model[-1].cv4:
        head.bias.data.zero_()  # else every score of random weights is next to 0
        head.logit_scale.data.fill_(3.0)
    folder = convert(model) / "detector"
    loaded = detector_file.NamedDetector(folder)
    texts = detector_file._TextTower(folder / "text", torch.device("cpu"))
    pixels = torch.rand(3, 3, 64, 64)
    asked = [["moon", "a unicorn", "kite"], [], ["zebra"]]
    predictions, _ = loaded.predict(pixels, asked)
    assert predictions.shape[1] == 4 + 3
    for row, tags in enumerate(asked):
        if tags:
            embedded = texts.encode(tags)
            torch.testing.assert_close(embedded.norm(dim=1), torch.ones(len(tags)))
            model.txt_feats, model.model[-1].nc = embedded[None], len(tags)
            alone = model(pixels[row : row + 1])[0][0]
            torch.testing.assert_close(predictions[row, : 4 + len(tags)], alone, atol=2e-5, rtol=1e-4)
        assert (predictions[row, 4 + len(tags) :] == 0).all()
    model.txt_feats, model.model[-1].nc = texts.encode(["moon", "a unicorn", "owl"])[None], 3
    assert (model(pixels[:1])[0][0, 6] - predictions[0, 6]).abs().max() > 1e-3  # another tag, other scores


def test_behind_the_interface(convert):
    folder = convert(their_model("yolo11n.yaml"))
    found = detection.load_detector(folder, part("any")).detect(
        [Image.new("RGB", (100, 50), "red"), PICTURE, PICTURE], [["sun", "moon"], ["star"], []]
    )
    assert set(found[0].tag_index.tolist()) <= {0, 1}
    assert len(found[0]) > 0
    assert (found[0].boxes_xyxy[:, 3] <= 50).all()
    assert found[0].features.shape[1] == found[1].features.shape[1]
    assert set(found[1].tag_index.tolist()) == {0}
    assert len(found[2]) == 0


class Touches:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import pathlib

        return (pathlib.Path.touch, (self.path,))


def test_a_hostile_file_is_refused_with_how_to_list_it_and_then_still_runs_nothing(tmp_path):
    path, marker = tmp_path / "yolo.pt", tmp_path / "ran"
    torch.save({"model": Touches(marker)}, path)
    (tmp_path / "out").mkdir()
    for sha256 in (None, "0" * 64):
        with pytest.raises(InputError, match=f"set foundation.detector.sha256: {sha256_file(path)}"):
            detector_file.fit(part(path, sha256=sha256), tmp_path / "out")
    listed = part(path, sha256=sha256_file(path))
    with pytest.raises(InputError, match="is listed, but holds no ultralytics detector that can be read safely"):
        detector_file.fit(listed, tmp_path / "out")
    assert not marker.exists()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off"])
def test_a_listed_file_that_is_damaged_is_one_sentence(tmp_path, content):
    path = tmp_path / "yolo.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is listed, but holds no ultralytics detector"):
        detector_file.fit(part(path, sha256=sha256_file(path)), tmp_path)


def test_a_description_is_not_evaluated_as_code(tmp_path, monkeypatch):
    """The description of a converted model is text on disk; ultralytics would evaluate its activation.

    Also in a program that has imported ultralytics before.
    """
    yolo.load_ultralytics()
    from ultralytics.nn import tasks

    monkeypatch.setattr(tasks, "SAFE_LOAD", False)
    marker = tmp_path / "ran"
    hostile = {"activation": f"open({str(marker)!r}, 'w')", "nc": 3}
    hostile |= {"backbone": [[-1, 1, "Conv", [16, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}
    with pytest.raises(TypeError, match="unsupported activation"):
        yolo.build_named(json.loads(json.dumps(hostile)), 3, world=False)
    assert not marker.exists()


def test_another_kind_of_model_is_refused(tmp_path):
    yolo.load_ultralytics()
    from ultralytics.nn.tasks import ClassificationModel

    path = tmp_path / "their.pt"
    torch.save({"model": ClassificationModel("yolo11n-cls.yaml", nc=3, verbose=False), "train_args": {}}, path)
    with pytest.raises(InputError, match="holds a ClassificationModel; expected an ultralytics detector"):
        detector_file.fit(dataclasses.replace(part(path), sha256=sha256_file(path)), tmp_path)
