import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_scenes import SIDE, write_scenes

from lyrics.config import SegmenterPart
from lyrics.errors import InputError
from lyrics.foundation import manifest, masks, sam, segmenter
from lyrics.io import sha256_tree
from lyrics.stage import NullTracker

PART = SegmenterPart(
    source="fitted", name="sam-small", revision=None, image_size_px=SIDE, epochs=2, batch_size=4, lr=1e-3
)


def fit(work, part=PART):
    (work / "out").mkdir(parents=True)
    config = SimpleNamespace(foundation=SimpleNamespace(segmenter=part), seed=0, device="cpu")
    made = segmenter.fit(config, work, NullTracker())
    manifest.write(work / "out", "segmenter", made)
    return made


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    write_scenes(folder, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit(folder / "first")
        fit(folder / "second")
    return folder


def small_sam():
    torch.manual_seed(0)
    model = sam.BoxSam(segmenter.small(SIDE)).eval()
    return model.requires_grad_(False)


BOXES = [torch.tensor([[4.0, 4, 30, 30], [20, 10, 60, 50]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 10, 64]])]


def test_batched_decoding_equals_the_decoder_of_segment_anything():
    """Inside the boxes, without details, with each box drawn as its mask prompt."""
    model = small_sam()
    embeddings, details = model.encode(torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
    together = model.decode(embeddings, torch.zeros_like(details), BOXES)
    one_by_one = []
    for embedding, boxes in zip(embeddings, BOXES, strict=True):
        if len(boxes):
            drawn = sam.draw(boxes / 2, SIDE // 2)
            sparse, dense = model.sam.prompt_encoder(points=None, boxes=boxes, masks=drawn[:, None])
            masks, _ = model.sam.mask_decoder(
                image_embeddings=embedding[None],
                image_pe=model.sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
            one_by_one.append(masks[:, 0])
    near = sam.draw(sam.widen(torch.cat(BOXES), 0.1) / 2, SIDE // 2) > 0
    torch.testing.assert_close(together[near], torch.cat(one_by_one)[near])
    assert (together[~near] < 0).all()


def test_boxes_that_fill_up_a_batch_change_nothing_and_attention_is_what_training_computed():
    model = small_sam()
    pixels = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert sam.fill_up(3).tolist() == [0, 1, 2] + [0] * 13 and len(sam.fill_up(16)) == 16 and len(sam.fill_up(0)) == 0
    learning = small_sam().train()
    torch.testing.assert_close(model.encode(pixels), learning.encode(pixels), atol=1e-5, rtol=1e-4)
    encoded = model.encode(pixels)
    torch.testing.assert_close(model.decode(*encoded, BOXES), learning.decode(*encoded, BOXES), atol=1e-4, rtol=1e-4)


def test_details_reach_the_masks():
    model = small_sam()
    embeddings, details = model.encode(torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(model.decode(embeddings, details, BOXES), model.decode(embeddings, details * 2, BOXES))


def test_drawing_and_widening_boxes():
    boxes = torch.tensor([[1.0, 0.0, 3.0, 2.5]])
    expected = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert torch.equal(sam.draw(boxes, 4)[0], expected.float())
    assert sam.widen(torch.tensor([[10.0, 20, 30, 60]]), 0.1).tolist() == [[8, 16, 32, 64]]


def test_encoding_equals_the_preprocessing_of_segment_anything():
    model = small_sam()
    pixels = torch.rand(3, SIDE, SIDE)
    expected = model.sam.image_encoder(model.sam.preprocess(pixels * 255)[None])
    torch.testing.assert_close(model.encode(pixels[None])[0], expected)


def test_no_box_at_all_gives_no_mask():
    model = small_sam()
    encoded = model.encode(torch.zeros(2, 3, SIDE, SIDE))
    assert model.decode(*encoded, [torch.zeros(0, 4)] * 2).shape == (0, 32, 32)
    found, features = segmenter.BoxSegmenter(model, SIDE).masks([Image.new("RGB", (80, 40))], [np.zeros((0, 4))])
    assert found == [()]
    assert features[0].shape == (0, 64)


def test_features_are_averages_under_masks():
    columns = torch.arange(4.0).expand(1, 1, 4, 4)
    left_half = torch.zeros(3, 8, 16, dtype=torch.bool)
    left_half[0, :, :8] = True  # columns 0 and 1 of the map
    left_half[1, 4:, 14:] = True  # half of column 3
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8], [5, 0, 12, 8]])  # the third mask is empty: columns 1 to 3
    features = sam.average_under(columns, [left_half], [boxes])
    assert features.flatten().tolist() == [0.5, 3.0, 2.0]


def test_masks_have_the_size_of_their_picture():
    whole = segmenter.BoxSegmenter(small_sam(), SIDE)
    images = [Image.new("RGB", size) for size in ((SIDE, SIDE), (100, 30), (20, 50))]
    found, features = whole.masks(images, [np.array([[1.0, 1, 9, 9]])] * 3)
    for image, (counts,), feature in zip(images, found, features, strict=True):
        assert masks.decode(counts, image.height, image.width).shape == (image.height, image.width)
        assert feature.shape == (1, 64)


def test_two_fits_are_the_same_bytes(project):
    assert sha256_tree(project / "first/out") == sha256_tree(project / "second/out")
    found = manifest.verify(project / "first/out")
    assert 0 <= found["quality"]["mask_iou"] <= 1


def test_a_loaded_fit_answers_as_the_fitted_one(project):
    first, second = (segmenter.load(project / name / "out") for name in ("first", "second"))
    image, boxes = Image.new("RGB", (SIDE, SIDE), "red"), [np.array([[3.0, 3, 30, 30]])]
    assert np.array_equal(first.masks([image], boxes)[1][0], second.masks([image], boxes)[1][0])


def test_losses_of_perfect_and_of_inverted_masks():
    target = torch.zeros(1, 8, 8)
    target[0, 2:6, 2:6] = 1
    right = segmenter.mask_losses((target - 0.5) * 40, target)
    wrong = segmenter.mask_losses((0.5 - target) * 40, target)
    assert sum(right.values()).item() == pytest.approx(0, abs=1e-4)
    assert wrong["dice_loss"].item() > 0.9


def test_boxes_alone_are_not_enough(tmp_path, monkeypatch):
    write_scenes(tmp_path, 4, masks=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="has no masks"):
        fit(tmp_path / "work")


def test_the_oracle_has_no_weights(tmp_path):
    made = fit(tmp_path, dataclasses.replace(PART, source="annotations"))
    assert made.parameters == 0
    assert json.loads((tmp_path / "out/segmenter.json").read_text()) == {"source": "annotations"}


def test_a_batch_is_filled_up_with_the_last_picture_s_boxes_to_few_different_numbers():
    data = segmenter._Data.__new__(segmenter._Data)
    data._pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    data._boxes = [np.tile(np.float32([n, n, n + 4, n + 4]), (count, 1)) for n, count in enumerate((2, 3, 14))]
    data._masks = [torch.full((len(boxes), 8, 8), n, dtype=torch.uint8) for n, boxes in enumerate(data._boxes)]
    for rows, last in (([0, 1], 14), ([1, 0], 13), ([0, 2], 14)):
        pixels, boxes, masks = data.batch(rows, np.random.default_rng(0))
        assert [len(one) for one in boxes] == [len(data._boxes[rows[0]]), last] and len(pixels) == 2
        assert masks.flatten(1)[:, 0].tolist() == [rows[0]] * len(boxes[0]) + [rows[1]] * last
