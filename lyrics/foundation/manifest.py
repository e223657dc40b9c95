"""A manifest beside every frozen part: where it came from, under which licence, and the hash of every file."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from lyrics.errors import InputError
from lyrics.io import read_json, sha256_file, write_json

NAME = "manifest.json"
OWN_LICENCE = "Apache-2.0"  # of what is fitted here, on data of ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What the `fit` of a part hands back once its files lie in `work / "out"`.

    Attributes:
        licence: of the weights, as their publisher states it; `OWN_LICENCE` for what is fitted here.
        parameters: number of weights in the part (0 for an oracle).
        quality: figures on held-out data, by metric name (`recall_at_1`); empty for what was not measured.
        revision: version of the wheel or commit of the hub repository; None for what is fitted here.
    """

    source: str
    name: str
    parameters: int
    quality: dict[str, float] = dataclasses.field(default_factory=dict)
    licence: str = OWN_LICENCE
    revision: str | None = None


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def write(folder: Path, part: str, made: Made) -> None:
    """Write `folder / manifest.json` over all files that lie there now."""
    quality = {name: round(float(value), 6) for name, value in made.quality.items()}
    write_json(
        folder / NAME, {**dataclasses.asdict(made), "part": part, "quality": quality, "sha256": _hashes(Path(folder))}
    )


def count_parameters(folder: Path) -> int:
    """Number of weights in the safetensors of a folder, from their headers."""
    from safetensors import safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            shapes: list[Any] = [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
            total += sum(math.prod(shape) for shape in shapes)
    return total


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a part, without hashing its files (`verify` does that).

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = Path(folder) / NAME
    make = f"make the part with: python -m lyrics foundation {Path(folder).name}"
    if not path.exists():
        raise InputError(f"{path} does not exist; {make}")
    try:
        manifest = read_json(path)
    except ValueError:
        raise InputError(f"{path} is not valid JSON; {make}") from None
    if missing := {"part", "sha256"} - set(manifest):
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}; {make}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Check the sha256 of every file of a part.

    Returns:
        The manifest.

    Raises:
        InputError: naming the first file that is missing, changed, or not in the manifest.
    """
    folder = Path(folder)
    manifest = read(folder)
    expected, found = manifest["sha256"], _hashes(folder)
    again = f"make the part again with: python -m lyrics foundation {manifest['part']}"
    for name in sorted(expected | found):
        if name not in found:
            raise InputError(f"{folder / name} is in the manifest but not on disk; {again}")
        if name not in expected:
            raise InputError(f"{folder / name} is not in the manifest; remove it, or {again}")
        if found[name] != expected[name]:
            raise InputError(
                f"{folder / name} has sha256 {found[name][:12]}…, the manifest says {expected[name][:12]}…; {again}"
            )
    return manifest
