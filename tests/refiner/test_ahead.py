import threading

import pytest
import torch
from PIL import Image
from quarter_encoder import quarter_encoder

from lyrics.errors import InputError
from lyrics.model.pictures import Pictures, made, once
from lyrics.refiner.ahead import ahead

CPU = torch.device("cpu")


def decode(batch):
    return [Image.new("RGB", (n, 1)) for n in batch]


def test_pictures_come_in_order_and_few_wait():
    decoded = []

    def slow(batch):
        decoded.append(batch)
        return decode(batch)

    batches = [[3 * n + 1, 3 * n + 2, 3 * n + 3] for n in range(10)]
    for number, pictures in enumerate(ahead(batches, slow)):
        assert [image.width for image in pictures] == batches[number]
        assert len(decoded) <= number + 4  # the one at hand, two that wait, one in the making
    assert decoded == batches
    assert list(ahead([], decode)) == []


def test_an_error_arrives_at_its_batch_and_the_rest_is_left():
    decoded = []

    def failing(batch):
        decoded.append(batch)
        if batch == [2]:
            raise InputError("2.png cannot be used")
        return decode(batch)

    arrived = []
    with pytest.raises(InputError, match=r"2\.png cannot be used"):
        arrived += [pictures[0].width for pictures in ahead([[n] for n in range(1, 30)], failing)]
    assert len(decoded) < 8


def test_what_a_batch_was_asked_for_is_made_for_the_next_in_another_thread():
    made_in = []

    def squares(images):
        made_in.append(threading.current_thread() is threading.main_thread())
        return [image.width**2 for image in images]

    found = [once(pictures, "squares", squares, ahead=True) for pictures in ahead([[n] for n in range(1, 9)], decode)]
    assert found == [[n**2] for n in range(1, 9)]
    assert len(made_in) == 8 and made_in[0] and not any(made_in[4:])  # the first few were on their way


def test_once_is_once_for_a_batch_and_always_for_a_list():
    calls = []
    for images, times in ((Pictures(decode([1, 2])), 1), (decode([1, 2]), 2)):
        calls.clear()
        for _ in range(2):
            assert once(images, "sizes", lambda some: calls.append(1) or [i.width for i in some], ahead=False) == [1, 2]
        assert len(calls) == times
    assert made(images, "sizes") is None


def test_an_encoder_looks_once_whoever_asks(monkeypatch):
    first, second = quarter_encoder(), quarter_encoder()
    first.origin = second.origin = "a folder"
    looks = []
    for encoder in (first, second):
        encoder.register_forward_hook(lambda *_: looks.append(1))
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pictures = Pictures(images)
    torch.testing.assert_close(first.look(pictures, CPU), first.look(images, CPU))
    assert second.look(pictures, CPU) is first.look(pictures, CPU)
    assert len(looks) == 2
    second.origin = "another"
    second.look(pictures, CPU)
    assert len(looks) == 3
