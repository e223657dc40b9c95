"""The stages as dvc.yaml describes them, without importing DVC: names, commands, dependencies, outputs, order."""

import dataclasses
import graphlib
import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from lyrics.errors import InputError

DVC_FILE = Path("dvc.yaml")
_HOLE = re.compile(r"\$\{([^}]+)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage; paths are relative to the project root or absolute, `params` maps a file to the keys read there."""

    name: str
    command: str
    deps: tuple[str, ...]
    params: dict[str, tuple[str, ...]]
    outs: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.deps + tuple(self.params)


def read(path: Path = DVC_FILE) -> dict[str, Stage]:
    """All stages by name, upstream first; `foreach` stages are called GROUP@KEY as DVC calls them."""
    if not path.exists():
        raise InputError(f"{path} does not exist here; run from the root of the project")
    document = read_yaml(path)
    if not isinstance(document, dict) or not isinstance(document.get("stages"), dict):
        raise InputError(f"{path} describes no stages; restore it with: git checkout {path}")
    scope: dict[str, Any] = {}
    for entry in document.get("vars", []):
        scope.update(entry if isinstance(entry, dict) else _variables(path.parent, entry))
    stages: dict[str, Stage] = {}
    for name, body in document["stages"].items():
        if "foreach" in body:
            for key, item in body["foreach"].items():
                stages[f"{name}@{key}"] = _stage(f"{name}@{key}", body["do"], {**scope, "key": key, "item": item})
        else:
            stages[name] = _stage(name, body, scope)
    order = graphlib.TopologicalSorter({name: upstream(stage, stages) for name, stage in stages.items()})
    return {name: stages[name] for name in order.static_order()}


def upstream(stage: Stage, stages: dict[str, Stage]) -> list[str]:
    """Names of the stages whose outputs `stage` reads."""
    return [
        other.name
        for other in stages.values()
        if other.name != stage.name and any(_overlap(out, dep) for out in other.outs for dep in stage.reads)
    ]


def with_upstream(name: str, stages: dict[str, Stage]) -> list[str]:
    """`name` and all that it needs, upstream first."""
    needed = {name}
    for one in reversed(stages):
        if one in needed:
            needed.update(upstream(stages[one], stages))
    return [one for one in stages if one in needed]


def _overlap(out: str, dep: str) -> bool:
    a, b = PurePosixPath(out), PurePosixPath(dep)
    return a == b or a in b.parents or b in a.parents


def _stage(name: str, body: dict[str, Any], scope: dict[str, Any]) -> Stage:
    body = _fill(body, scope)
    params: dict[str, tuple[str, ...]] = {}
    for entry in body.get("params", []):
        for file, keys in entry.items():
            params[file] = tuple(keys or ())
    outs = tuple(next(iter(out)) if isinstance(out, dict) else out for out in body.get("outs", []))
    deps = tuple(dict.fromkeys(body.get("deps", [])))
    return Stage(name=name, command=body["cmd"], deps=deps, params=params, outs=outs)


def _variables(root: Path, entry: str) -> dict[str, Any]:
    """`file.yaml:key,key` or `file.yaml`."""
    file, _, keys = entry.partition(":")
    values = read_yaml(root / file)
    wanted = keys.split(",") if keys else []
    absent = [key for key in wanted if not isinstance(values, dict) or key not in values]
    if absent:
        raise InputError(f"{root / file} has no {', '.join(absent)}; restore it with: git checkout {root / file}")
    return {key: values[key] for key in wanted} if keys else values


def read_yaml(path: Path, cure: str = "") -> Any:
    """The YAML document in `path`; InputError with the `cure` where there is none."""
    cure = cure or f"restore it with: git checkout {path}"
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; {cure}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML ({' '.join(str(error).split())}); correct it, or {cure}") from None


def _fill(value: Any, scope: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _fill(inner, scope) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, scope) for inner in value]
    return _HOLE.sub(lambda hole: str(lookup(scope, hole[1])), value) if isinstance(value, str) else value


def lookup(values: Any, dotted: str) -> Any:
    """`a.b[0]` in nested mappings and lists; KeyError where it is absent."""
    for part in re.findall(r"[^.\[\]]+", dotted):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values
