"""The user's choices in params/run.yaml, and what Hydra makes of them: build/config.yaml."""

import contextlib
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import TypeAdapter

from lyrics import io
from lyrics.config import CONFIG_PATH, PARAMS, Config, parse
from lyrics.errors import InputError

RUN = PARAMS / "run.yaml"
EMBEDDED = "lyrics/world"
_OPEN_MAPPINGS = ("data.splits", "promote.minimum", "stage2.shares")  # mappings whose keys are the user's


def compose(run: Path = RUN) -> dict[str, Any]:
    """Every value of the configuration that the choices in `run` select, checked, as plain types.

    Raises:
        InputError: naming the choice, key or value that is wrong, and what it could be.
    """
    return _compose(read_choices(run), run)


def _compose(choices: dict[str, Any], run: Path) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    root = run.parent.resolve()
    flat = dict(_flatten(choices["overrides"]))
    groups = {key: value for key, value in flat.items() if isinstance(value, str) and (root / key).is_dir()}
    for group, name in {"preset": choices["preset"], "data": choices["data"], **groups}.items():
        known = sorted(file.stem for file in (root / group).glob("*.yaml"))
        if name not in known:
            raise InputError(f"{group} {name!r} in {run} is unknown; choices: {', '.join(known)}")
    selected = [f"preset={choices['preset']}", f"data={choices['data']}", *(f"{k}={v}" for k, v in groups.items())]
    try:
        with initialize_config_dir(str(root), version_base=None):
            composed = hydra_compose("config", selected)
        OmegaConf.set_struct(composed, True)
        for key, value in flat.items():
            if key not in groups:
                _set(composed, key, value, run)
        values = cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"A file in {root.name}/ is not valid YAML: {' '.join(str(error).split())}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(
            f"The configuration in {root.name}/ cannot be composed: {str(error).splitlines()[0]}"
        ) from None
    _set_folder(values, choices["folder"])
    _set_vocabulary(values["foundation"]["tagger"], root)
    return TypeAdapter(Config).dump_python(parse(values), mode="json")


def _set_vocabulary(tagger: dict[str, Any], root: Path) -> None:
    """The file's content belongs to the configuration; outside of params/ nobody would notice that it changed."""
    if tagger["vocabulary"] is None:
        return
    path = Path(tagger["vocabulary"])
    if not path.is_file() or not path.resolve().is_relative_to(root):
        raise InputError(
            f"foundation.tagger.vocabulary is {path}, which is no file in {root.name}/; put it there, one tag a line, "
            f"e.g. {root.name}/words.txt"
        )
    tagger["vocabulary_sha256"] = io.sha256_file(path)


def read_choices(run: Path) -> dict[str, Any]:
    """The content of params/run.yaml: preset, data, folder, overrides; nothing else."""
    if not run.exists():
        raise InputError(f"{run} does not exist; restore it with: git checkout {run}")
    try:
        choices = yaml.safe_load(run.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{run} is not valid YAML: {' '.join(str(error).split())}") from None
    return check_choices(choices, run)


def check_choices(choices: Any, run: Path) -> dict[str, Any]:
    expected = {"preset", "data", "folder", "overrides"}
    if not isinstance(choices, dict) or set(choices) != expected:
        found = ", ".join(map(str, choices)) if isinstance(choices, dict) else repr(choices)
        raise InputError(f"{run} must hold exactly the keys {', '.join(sorted(expected))}; found {found}")
    choices["overrides"] = choices["overrides"] or {}
    if not isinstance(choices["overrides"], dict):
        raise InputError(f"overrides in {run} must map dotted keys to values; found {choices['overrides']!r}")
    return choices


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(composed: Any, key: str, value: Any, run: Path) -> None:
    from omegaconf import DictConfig, OmegaConf

    parent_key, _, leaf = key.rpartition(".")
    parent = OmegaConf.select(composed, parent_key) if parent_key else composed
    if not isinstance(parent, DictConfig) or (leaf not in parent and parent_key not in _OPEN_MAPPINGS):
        known = sorted(map(str, parent)) if isinstance(parent, DictConfig) else sorted(map(str, composed))
        raise InputError(f"the override {key} in {run} names an unknown key; keys there: {', '.join(known)}")
    if isinstance(parent.get(leaf), DictConfig) and value is not None and key not in _OPEN_MAPPINGS:
        raise InputError(
            f"the override {key} in {run} is a group of keys, not a value: {', '.join(map(str, parent[leaf]))}"
        )
    OmegaConf.update(composed, key, value, force_add=parent_key in _OPEN_MAPPINGS)


def _set_folder(values: dict[str, Any], folder: str) -> None:
    """Fill data.folder from the one choice that DVC sees as well."""
    if values["data"]["source"] == "world":
        if folder != EMBEDDED:
            raise InputError(
                f"data source world reads no folder, but folder is {folder}; set folder={EMBEDDED}, or data=photos"
            )
        return
    if not folder or folder == EMBEDDED:
        raise InputError("this data source reads your folder, but none is named; add folder=PATH")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(
            f"folder {folder} is missing or not a folder; name one that holds the splits listed in params/data/"
        )
    values["data"]["folder"] = str(path)


def write(values: dict[str, Any], path: Path = CONFIG_PATH) -> None:
    """Write the composed configuration whole or not at all."""
    io.write_text(path, "# generated; edit params/\n" + yaml.safe_dump(values, sort_keys=True))


def configure(settings: Sequence[str], run: Path = RUN) -> dict[str, Any]:
    """Change params/run.yaml by `preset=…`, `data=…`, `folder=…`, `dotted.key=value`, `~dotted.key` (forget that one).

    `~overrides` forgets all overrides. The file changes only if the result composes; its comments stay.

    Returns:
        The choices that are now in force.
    """
    text, choices = edited(settings, run)
    io.write_text(run, text)
    return choices


def preview(settings: Sequence[str], run: Path = RUN) -> dict[str, Any]:
    """What `compose` would give after `configure` with the same settings; nothing is changed."""
    return _compose(edited(settings, run)[1], run)


def edited(settings: Sequence[str], run: Path = RUN) -> tuple[str, dict[str, Any]]:
    """What `configure` would write, and the choices in it; nothing is changed."""
    from ruamel.yaml import YAML

    editor = YAML()
    read_choices(run)
    document = editor.load(run.read_text())
    named = {setting.partition("=")[0] for setting in settings}
    for setting in settings:
        _apply(document, setting)
    if "data" in named and "folder" not in named and _reads_no_folder(run.parent, document["data"]):
        document["folder"] = EMBEDDED
    written = StringIO()
    editor.dump(document, written)
    choices = check_choices(yaml.safe_load(written.getvalue()), run)
    _compose(choices, run)
    return written.getvalue(), choices


def _apply(document: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    overrides = document["overrides"] or {}
    if setting == "~overrides":
        overrides = {}
    elif setting.startswith("~") and setting[1:] in overrides:
        del overrides[setting[1:]]
    elif setting.startswith("~"):
        raise InputError(f"there is no override {setting[1:]!r} to forget; overrides: {', '.join(overrides) or 'none'}")
    elif not equals or not key:
        raise InputError(
            f"{setting!r} is not of the form key=value (preset=, data=, folder=, or a dotted key of params/)"
        )
    elif key in ("preset", "data"):
        document[key] = text
    elif key == "folder":
        document["folder"] = _portable(text)
    else:
        overrides[key] = _value(text, key)
    document["overrides"] = overrides


def _portable(folder: str) -> str:
    """Relative to the project where it lies inside (so that it holds in a clone), absolute elsewhere."""
    path = Path(folder).expanduser().resolve()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else str(path)


def _value(text: str, key: str) -> Any:
    with contextlib.suppress(ValueError):
        if "e" in text.lower():
            return float(text)  # YAML 1.1 reads 2e-4 as a word
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"the value of {key} is not valid YAML: {text}") from None


def _reads_no_folder(params: Path, data: str) -> bool:
    file = params / "data" / f"{data}.yaml"
    return file.exists() and yaml.safe_load(file.read_text()).get("source") == "world"
