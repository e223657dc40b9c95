import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, UnidentifiedImageError
from small_scenes import SIDE, write_scenes

from lyrics.data.annotated import read_split
from lyrics.errors import InputError
from lyrics.foundation import detector, yolo

DESCRIPTION = yaml.safe_load(Path(detector.__file__).with_name("yolo_small.yaml").read_text())


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # ultralytics would make it one less than there are processors
    yield
    torch.set_num_threads(before)


def test_training_keeps_threads_files_and_network_alone(tmp_path, monkeypatch, two_threads):
    import socket

    def refuse(*_args, **_kwargs):
        raise AssertionError("it reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    save = torch.save
    write_scenes(tmp_path, 6)
    records = read_split(Path("data/raw/foundation")).images
    images = {split: tmp_path / "yolo/images" / split for split in ("train", "val")}
    for split, folder in images.items():
        detector.write_layout(records, folder, tmp_path / "yolo/labels" / split)
    threads = []
    model = yolo.train(
        DESCRIPTION,
        images,
        tmp_path / "yolo",
        image_size_px=SIDE,
        epochs=1,
        batch_size=3,
        lr=1e-3,
        seed=0,
        device="cpu",
        on_batch=lambda: threads.append(torch.get_num_threads()),
    )
    assert threads == [2, 2]
    assert torch.get_num_threads() == 2
    assert torch.save is save
    assert "OMP_NUM_THREADS" not in os.environ
    assert not list(tmp_path.rglob("*.pt"))
    assert next(model.parameters()).dtype == torch.float32
    assert not model.training


def test_importing_it_switches_everything_off(tmp_path):
    """In a process of its own, with an empty home folder: settings are read when ultralytics is imported."""
    code = (
        "from lyrics.foundation.yolo import load_ultralytics\n"
        "load_ultralytics()\n"
        "from ultralytics.utils import AUTOINSTALL, ONLINE, SETTINGS, USER_CONFIG_DIR\n"
        "from ultralytics.utils.checks import check_font\n"
        "from ultralytics.utils.events import events\n"
        "assert not AUTOINSTALL and not ONLINE and not events.enabled\n"
        "names = ('sync', 'mlflow', 'dvc', 'clearml', 'comet', 'raytune', 'tensorboard', 'wandb')\n"
        "assert not any(SETTINGS[name] for name in names), dict(SETTINGS)\n"
        "assert check_font().parent == USER_CONFIG_DIR\n"
        "print(USER_CONFIG_DIR)"
    )
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("YOLO")}
    environment |= {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config"), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(root / ".ultralytics/Ultralytics")
    assert not [path for path in tmp_path.rglob("*") if "ltralytics" in path.name]


def test_suppression_agrees_with_ultralytics_own():
    yolo.load_ultralytics()
    from ultralytics.utils.nms import non_max_suppression

    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(2, 4, 300, generator=generator) * 60 + 5
    predictions = torch.cat([boxes, torch.rand(2, 3, 300, generator=generator)], dim=1)
    ours = yolo.nms(predictions, 0.3, 0.5, 100)
    theirs = non_max_suppression(predictions.clone(), conf_thres=0.3, iou_thres=0.5, max_det=100)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_suppression_of_nothing():
    (found,) = yolo.nms(torch.zeros(1, 5, 20), 0.3, 0.5, 100)
    assert found.shape == (0, 6)


class Touches:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("listed", [None, "0" * 64])
def test_a_file_with_an_unlisted_hash_is_never_opened(tmp_path, listed):
    torch.save({"model": Touches(tmp_path / "ran")}, tmp_path / "yolo.pt")
    with pytest.raises(InputError, match=r"has sha256 [0-9a-f]{64}.*set foundation\.detector\.sha256: [0-9a-f]{64}"):
        yolo.load_file(tmp_path / "yolo.pt", listed)
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.pt does not exist.*foundation\.detector\.name"):
        yolo.load_file(tmp_path / "none.pt", None)


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = yolo.build(DESCRIPTION, seed=1)
    assert torch.rand(1) == expected
    second = yolo.build(DESCRIPTION, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_broken_pictures_stay_broken_pictures_after_ultralytics_was_imported():
    yolo.load_ultralytics()
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(b"no picture"))
