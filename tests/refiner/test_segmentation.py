import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from quarter_encoder import quarter_encoder

from lyrics.data.records import Annotation
from lyrics.foundation import manifest, masks
from lyrics.refiner import segmentation

PICTURE = Image.new("RGB", (40, 20))
NO_BOXES = np.zeros((0, 4), np.float32)


def part(tmp_path, source):
    folder = tmp_path / "segmenter"
    folder.mkdir()
    manifest.write(folder, "segmenter", manifest.Made(source=source, name="any", parameters=0))
    return folder


@pytest.fixture
def oracle(monkeypatch, tmp_path):
    monkeypatch.setattr("lyrics.model.vision.load_image_encoder", quarter_encoder)
    part(tmp_path, "annotations")
    return segmentation.load_segmenter(tmp_path)


def test_the_oracle_finds_the_mask_that_a_box_belongs_to(oracle):
    """Boxes come in another order, and a little off."""
    shapes = np.zeros((2, 20, 40), np.uint8)
    shapes[0, 2:10, 3:12], shapes[1, 5:18, 20:35] = 1, 1
    truth = []
    for shape, box in zip(shapes, [(3.0, 2.0, 12.0, 10.0), (20.0, 5.0, 35.0, 18.0)], strict=True):
        rle = coco_mask.encode(np.asfortranarray(shape))
        rle["counts"] = rle["counts"].decode()
        truth.append(Annotation(category="thing", box_xyxy=box, rle=rle))
    boxes = np.array([[21, 5, 35, 18], [3, 2, 12, 11]], np.float32)
    first, second = oracle.segment([PICTURE, PICTURE], [boxes, NO_BOXES], [truth, truth])
    assert np.array_equal([masks.decode(counts, 20, 40) for counts in first.masks], shapes[::-1].astype(bool))
    assert first.features.shape == (2, oracle.width)
    assert (second.masks, second.features.shape) == ((), (0, oracle.width))


def test_the_oracle_fills_a_box_that_has_no_mask(oracle):
    boxes = np.array([[2.0, 3.0, 10.0, 8.0]], np.float32)
    for truth in ([()], [(Annotation(category="thing", box_xyxy=(2.0, 3.0, 10.0, 8.0)),)], None):
        (found,) = oracle.segment([PICTURE], [boxes], truth)
        expected = np.zeros((20, 40), bool)
        expected[3:8, 2:10] = True
        assert np.array_equal(masks.decode(found.masks[0], 20, 40), expected)


def test_the_oracle_reads_finer_maps_under_the_mask(monkeypatch, tmp_path):
    """Two colours share a box; the mask tells which of them is the object's."""
    monkeypatch.setattr("lyrics.model.vision.load_image_encoder", lambda _: quarter_encoder(finer=True))
    pixels = np.full((16, 16, 3), (0, 0, 255), np.uint8)
    shape = np.zeros((16, 16), np.uint8)
    shape[2:6, 2:4] = 1
    pixels[shape == 1] = (255, 0, 0)
    rle = coco_mask.encode(np.asfortranarray(shape))
    rle["counts"] = rle["counts"].decode()
    oracle = segmentation.AnnotationSegmenter(tmp_path)
    box = (2.0, 2.0, 6.0, 6.0)
    truth = (Annotation(category="thing", box_xyxy=box, rle=rle),)
    (found,) = oracle.segment([Image.fromarray(pixels)], [np.array([box], np.float32)], [truth])
    assert found.features.shape == (1, oracle.width) == (1, 6)
    np.testing.assert_allclose(found.features[0, :3], np.array([2, -1, -1]) / np.sqrt(6), atol=1e-5)


@pytest.fixture
def published(tmp_path):
    """Random weights in the layout of the published ones."""
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamMaskDecoderConfig,
        SamModel,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )

    folder = tmp_path / "segmenter"
    folder.mkdir()
    torch.manual_seed(0)
    vision = SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        window_size=0,
        num_pos_feats=8,
        global_attn_indexes=[0],
        mlp_dim=32,
    )
    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8, image_embedding_size=8)
    decoder = SamMaskDecoderConfig(hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16)
    SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    ).save_pretrained(folder)
    SamImageProcessor(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    ).save_pretrained(folder)
    manifest.write(folder, "segmenter", manifest.Made(source="hub", name="random", parameters=0))
    return segmentation.load_segmenter(tmp_path)


def test_published_weights_segment_boxes_of_any_picture(published):
    loaded = published
    boxes = np.array([[1, 1, 9, 9], [5, 5, 30, 18]], np.float32)
    found = loaded.segment([PICTURE, Image.new("RGB", (20, 30), "red"), PICTURE], [boxes, boxes[:1], NO_BOXES])
    assert [len(one.masks) for one in found] == [2, 1, 0]
    assert masks.decode(found[1].masks[0], 30, 20).shape == (30, 20)  # raises if it were of another size
    assert [one.features.shape for one in found] == [(2, 16), (1, 16), (0, 16)]
    assert np.isfinite(found[0].features).all()
    assert [one.masks for one in loaded.segment([PICTURE], [NO_BOXES])] == [()]


@torch.inference_mode()
def test_masks_are_those_of_transformers_own_post_processing(published):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 52, 3), np.uint8)
    picture = Image.fromarray(pixels)
    boxes = np.array([[1, 1, 20, 9], [5, 5, 50, 28], [40, 2, 44, 3]], np.float32)
    (found,) = published.segment([picture], [boxes])
    inputs = published._processor(images=[picture], return_tensors="pt")
    assert inputs["reshaped_input_sizes"].tolist() == [[37, 64]]
    prompts = torch.from_numpy(boxes)[None] * torch.tensor([64 / 52, 37 / 30] * 2)
    output = published._model(pixel_values=inputs["pixel_values"], input_boxes=prompts, multimask_output=False)
    (expected,) = published._processor.post_process_masks(
        output.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    ours = np.stack([masks.decode(counts, 30, 52) for counts in found.masks])
    assert 0 < ours.mean() < 1
    assert (ours != expected[:, 0].numpy()).mean() < 0.0005  # next to 0 the order of additions decides


def test_pictures_go_through_the_encoder_together_and_the_boxes_of_each_through_the_decoder(published, monkeypatch):
    calls = []
    model = published._model
    encode = model.get_image_embeddings
    monkeypatch.setattr(model, "get_image_embeddings", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    model.register_forward_pre_hook(
        lambda _, __, inputs: calls.append(tuple(inputs["input_boxes"].shape)), with_kwargs=True
    )
    boxes = np.array([[1, 1, 9, 9], [5, 5, 30, 18], [2, 2, 8, 8]], np.float32)
    found = published.segment([PICTURE] * 4, [boxes, NO_BOXES, boxes[:1], boxes[:2]])
    assert [len(one.masks) for one in found] == [3, 0, 1, 2]
    assert calls == [3, (1, 3, 4), (1, 1, 4), (1, 2, 4)]  # the picture without a box is not looked at
    assert found[0].masks[:2] == found[3].masks
