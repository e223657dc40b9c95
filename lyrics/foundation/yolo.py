"""The only importer of ultralytics: its trainer and its models, without its side effects.

Left alone, ultralytics takes threads away from torch, installs packages, reports usage, fetches fonts and weights,
starts loggers of its own and writes settings into the home folder. All of that is switched off here.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before ultralytics, which sets OMP_NUM_THREADS=1 for whatever is imported after it
from PIL import Image
from torch import Tensor, nn
from torchvision import ops

from lyrics.errors import InputError
from lyrics.io import sha256_file

CLASS_NAMES = {0: "object"}
_OFF = {
    "sync": False,
    **dict.fromkeys(("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb", "vscode_msg"), False),
}


@contextlib.contextmanager
def kept_threads() -> Iterator[int]:
    """Give torch its threads back after any call into ultralytics; yields their number."""
    threads = torch.get_num_threads()
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _config_dir() -> Path:
    """A folder for ultralytics' settings: in the project where the package lies in one, else a temporary one."""
    project = Path(__file__).resolve().parents[2]
    if (project / "pyproject.toml").exists() and os.access(project, os.W_OK):
        return project / ".ultralytics"
    return Path(tempfile.gettempdir()) / f"lyrics-ultralytics-{os.getuid()}"


def load_ultralytics() -> ModuleType:
    """Import ultralytics with its network, logging and settings side effects off."""
    omp_threads, save, image_open = os.environ.get("OMP_NUM_THREADS"), torch.save, Image.open
    os.environ.update(
        YOLO_AUTOINSTALL="false",
        YOLO_OFFLINE="1",
        YOLO_VERBOSE="false",
        YOLO_CONFIG_DIR=str(_config_dir()),
        ULTRALYTICS_SAFE_LOAD="true",  # else what a model's description says is evaluated as code
    )
    with kept_threads():
        import ultralytics
        from ultralytics.nn import tasks
        from ultralytics.utils import USER_CONFIG_DIR
    tasks.SAFE_LOAD = True  # where it was imported before, the variable came too late
    if omp_threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    # It puts its own in place: the latter fails for want of a HEIF reader wherever a picture is broken.
    torch.save, Image.open = save, image_open
    if any(ultralytics.settings[key] != value for key, value in _OFF.items()):
        ultralytics.settings.update(_OFF)
    font = Path(USER_CONFIG_DIR) / "Arial.ttf"
    if not font.exists():  # where it looks before it fetches one
        import matplotlib

        source = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
        with contextlib.suppress(FileExistsError):  # a process beside this one was faster
            font.symlink_to(source)
    return ultralytics


def build(model_yaml: dict[str, Any], seed: int = 0) -> nn.Module:
    """A new YOLO from its description; `seed` fixes the weights without touching the global random state."""
    load_ultralytics()
    from ultralytics.nn.tasks import DetectionModel

    with kept_threads(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DetectionModel(dict(model_yaml), ch=3, nc=len(CLASS_NAMES), verbose=False)
    model.names = dict(CLASS_NAMES)
    return model


def train(
    model_yaml: dict[str, Any],
    images: dict[str, Path],
    work: Path,
    *,
    image_size_px: int,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: str,
    on_batch: Callable[[], None] = lambda: None,
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, losses: None,
) -> nn.Module:
    """Train a YOLO from scratch with ultralytics' trainer; every update is one batch, no mosaic.

    Args:
        images: `train` and `val` folders of pictures, each with its `labels` folder beside `images` as ultralytics
            expects; it neither validates nor saves here, so `val` may be small.

    Returns:
        The averaged (EMA) model in eval mode, float32, on the CPU.
    """
    load_ultralytics()
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):
        """Leaves out what reaches for the network (dataset and AMP checks) and what writes checkpoints (.pt)."""

        def get_dataset(self) -> dict[str, Any]:
            folders = {split: str(folder) for split, folder in images.items()}
            return {**folders, "path": str(work), "nc": len(CLASS_NAMES), "names": dict(CLASS_NAMES), "channels": 3}

        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            return build(model_yaml, seed)

        def validate(self) -> tuple[dict[str, float], float]:
            return {}, 0.0

        def save_model(self) -> bool:
            return False

        def final_eval(self) -> None:
            return None

    with kept_threads() as threads:
        trainer: Any = Trainer(
            overrides={
                "model": "object.yaml",
                "data": "object.yaml",
                "project": str(work.resolve()),  # a relative one would land in runs/ of the current folder
                "name": "run",
                "exist_ok": True,
                "imgsz": image_size_px,
                "epochs": epochs,
                "batch": batch_size,
                "nbs": batch_size,
                "optimizer": "AdamW",
                "lr0": lr,
                "lrf": 0.02,
                "cos_lr": True,
                "momentum": 0.9,
                "warmup_epochs": 0.3,
                "warmup_bias_lr": 0.0,
                "mosaic": 0.0,
                "close_mosaic": 0,
                "scale": 0.2,
                "hsv_s": 0.3,
                "hsv_v": 0.2,
                "workers": 0,
                "seed": seed,
                "device": device.removeprefix("cuda:").replace("cuda", "0"),
                "amp": False,
                "val": False,
                "save": False,
                "plots": False,
                "verbose": False,
            }
        )
        trainer.add_callback("on_train_start", lambda _: torch.set_num_threads(threads))
        trainer.add_callback("on_train_batch_end", lambda _: on_batch())
        trainer.add_callback(
            "on_train_epoch_end", lambda t: on_epoch(t.epoch, {k: float(v) for k, v in t.tloss.items()})
        )
        trainer.train()
    return trainer.ema.ema.float().cpu().eval()


def build_named(model_yaml: dict[str, Any], classes: int, world: bool) -> Any:
    """A YOLO, or a YOLO-World, of the user's; its weights are loaded into it afterwards."""
    load_ultralytics()
    from ultralytics.nn.tasks import DetectionModel, WorldModel

    with kept_threads(), torch.random.fork_rng(devices=[]):
        kind = WorldModel if world else DetectionModel
        return kind(dict(model_yaml), ch=model_yaml.get("channels", 3), nc=classes, verbose=False)


def for_inference(model: Any, device: torch.device) -> Any:
    """The model with its normalisations folded into its convolutions, in the memory layout that they are fastest in."""
    with kept_threads():
        return model.eval().fuse(verbose=False).to(device, memory_format=torch.channels_last)


def load_file(path: Path, sha256: str | None) -> Any:
    """A detector that the user names: an ultralytics .pt file (YOLO or YOLO-World).

    Such a file is a pickle and can run code, so it is opened only if the configuration lists its sha256, and even then
    only classes of torch and ultralytics are made from it.
    """
    if not path.is_file():
        raise InputError(
            f"The detector file {path} does not exist; put it there, or name another in foundation.detector.name"
        )
    found = sha256_file(path)
    if found != sha256:
        listed = f"lists {sha256}" if sha256 else "lists none"
        raise InputError(
            f"The detector file {path} has sha256 {found}, the configuration {listed}. Opening a .pt file can run "
            f"code: if you trust its source, set foundation.detector.sha256: {found}"
        )
    load_ultralytics()
    from ultralytics.nn.tasks import torch_safe_load

    with kept_threads():
        try:
            # A whole path: of a name alone, ultralytics would look for such a file elsewhere.
            checkpoint, _ = torch_safe_load(str(path.resolve()), safe_only=True)
            model = checkpoint.get("ema") or checkpoint["model"]
        except (TypeError, AttributeError, KeyError, ImportError) as error:
            why = " ".join(str(error).split())
            raise InputError(
                f"The detector file {path} is listed, but holds no ultralytics detector that can be read safely "
                f"({why:.200}); train or export it again with ultralytics, or name another in foundation.detector.name"
            ) from None
    return model.float().eval()


def nms(predictions: Tensor, score_threshold: float, iou: float, max_detections: int) -> list[Tensor]:
    """Class-wise non-maximum suppression of decoded predictions (B, 4 + classes, anchors).

    torchvision's, because ultralytics' own stops at a time limit: a busy machine would lose boxes.

    Returns:
        For each image (N, 6): box xyxy, score, class; highest score first.
    """
    kept = []
    for one in predictions.float().transpose(1, 2):
        scores, classes = one[:, 4:].max(dim=1)
        above = scores > score_threshold
        boxes = ops.box_convert(one[above, :4], "cxcywh", "xyxy")
        scores, classes = scores[above], classes[above]
        keep = ops.batched_nms(boxes, scores, classes, iou)[:max_detections]
        kept.append(torch.cat([boxes[keep], scores[keep, None], classes[keep, None].to(boxes)], dim=1))
    return kept
