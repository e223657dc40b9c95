"""What the documentation names exists: make targets, verbs and their options, modules, parameters, files, packages."""

import dataclasses
import importlib.util
import re
import shlex
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from lyrics import cli, config, dag
from lyrics.compose import RUN

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/attend.md",
    "docs/benchmarks.md",
    "docs/data.md",
    "docs/formats.md",
    "docs/inspect.md",
    "docs/learning.md",
    "docs/operations.md",
    "docs/refiner.md",
    "docs/plan.md",
)
# What a run makes, by its first folder; and words with a slash that are no files.
MADE = ("build/", "data/", "models/", "reports/", "mlruns/", ".venv/", "mlflow.db", "dvc.lock", ".dvc/config.local")
OWN = ("lyrics/", "flows/", "params/", "tests/", "docs/", ".ci/", ".dvc/")
CHOICES = {"preset", "data", "folder", "overrides", "until", "push"}


def code(document: str) -> list[str]:
    """Lines of code blocks without their comments, and code spans of a document."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for kind, block in blocks for line in block.splitlines() if kind in ("sh", "python", "text")]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\s+# .*", "", line) for line in lines] + re.findall(r"`([^`\n]+)`", prose)


def commands(document: str, start: str) -> list[list[str]]:
    """The arguments of every command in a document that begins so."""
    found = []
    for piece in (p for line in code(document) for p in re.split(r"&&|[|;]", line)):
        if re.match(rf"\s*{re.escape(start)}\s", piece):
            found.append(shlex.split(piece.strip().removeprefix(start).rstrip(" &")))
    return found


def fields(kind: Any, prefix: str = "") -> set[str]:
    """Dotted names of all values of a configuration dataclass."""
    names = set()
    for name, hint in typing.get_type_hints(kind).items():
        names |= fields(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {f"{prefix}{name}"}
    return names


KEYS = fields(config.Config)


def known(key: str) -> bool:
    is_group = (ROOT / "params" / key).is_dir() or any(one.startswith(f"{key}.") for one in KEYS)  # engine=ray
    return is_group or key in KEYS or key.rpartition(".")[0] in ("data.splits", "promote.minimum", "stage2.shares")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_and_choices_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(document, "make"):
        settings = [word.partition("=")[::2] for word in words if "=" in word]
        assert {word for word in words if "=" not in word} <= targets, words
        assert {name for name, _ in settings} <= CHOICES, words
        for name, value in settings:
            if name == "overrides":
                assert all(known(one.partition("=")[0]) for one in value.split()), value
            elif name in ("preset", "data"):
                assert (ROOT / "params" / name / f"{value}.yaml").exists(), words
            elif name == "until":
                assert value in dag.read(ROOT / "dvc.yaml"), words


def test_the_readme_shows_every_make_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets == {words[0] for words in commands("README.md", "make")}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_verbs_and_their_options_exist(document: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    for words in commands(document, "python -m lyrics"):
        if words[:1] in ([], ["VERB"]) or words[0].startswith("-"):
            continue
        verb = group.commands.get(words[0])
        assert verb is not None, words
        options = {name for parameter in verb.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, words
        for word in words[1:]:
            assert words[0] != "configure" or known(word.lstrip("~").partition("=")[0]), words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_that_are_run_exist(document: str) -> None:
    for line in code(document):
        for module in re.findall(r"python -m ([\w.]+)", line):
            assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("document", DOCUMENTS)
def test_stages_experiments_and_configuration_keys_exist(document: str) -> None:
    stages = {name.partition("@")[0] for name in dag.read(ROOT / "dvc.yaml")}
    for words in commands(document, "dvc repro"):
        assert {word for word in words if not word.startswith("-")} <= stages, words
    for words in commands(document, "dvc exp run -S"):
        file, _, setting = words[0].partition(":")
        assert setting.partition("=")[0] in yaml.safe_load((ROOT / file).read_text()), words
    sections = "|".join(f.name for f in dataclasses.fields(config.Config) if dataclasses.is_dataclass(f.type))
    for span in code(document):
        if re.fullmatch(rf"({sections})(\.\w+)+", span):
            assert known(span), span


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    folder = Path(document).parent
    links = [str(folder / link) for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    spans = [word.strip("`,:;()").rstrip(".") for span in code(document) for word in span.split()]
    named = [word.partition(":")[0] for word in spans if word.startswith(OWN)]
    for name in [*links, *(name for name in named if not name.startswith(MADE))]:
        assert list(ROOT.glob(name)), name
    for word in spans:
        if re.fullmatch(r"[\w.-]+\.(md|toml|yaml|lock)", word) and word not in MADE:
            assert (ROOT / word).exists() or "/" in word, word


def test_every_dependency_has_its_line_with_a_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = {re.match(r"[\w.-]+", one)[0] for one in project["project"]["dependencies"]}  # type: ignore[index]
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("\n## Dependencies\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", section, re.M)[2:]]
    assert sorted(row[0] for row in rows) == sorted(wanted)
    assert all(len(row) == 3 and row[1] and row[2] for row in rows)
    for one in project["dependency-groups"]["dev"]:
        assert re.match(r"[\w.-]+", one)[0] in section, one  # type: ignore[index]


def test_the_pipeline_table_has_every_stage_and_where_it_writes() -> None:
    rows = dict(re.findall(r"^\| `(\w+)(?: PART)?` \| `([\w/.]+)`", (ROOT / "README.md").read_text(), re.MULTILINE))
    outs = {name.partition("@")[0]: stage.outs[0] for name, stage in dag.read(ROOT / "dvc.yaml").items()}
    outs["foundation"] = "models/foundation"
    assert rows == outs


def test_the_preset_table_states_the_sizes_of_params() -> None:
    readme = (ROOT / "README.md").read_text()
    for preset in ("tiny", "laptop", "paper"):
        sizes = types.SimpleNamespace(**yaml.safe_load((ROOT / f"params/mq_former/{preset}.yaml").read_text()))
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{preset}`"))
        assert f"{sizes.layers} × {sizes.hidden_size}" in row
        assert f"{sizes.visual_queries} + {sizes.grounding_queries}" in row


def test_the_place_for_the_output_of_a_run_and_the_choices_file_are_there() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.index("<!-- make-run-output:start -->") < readme.index("<!-- make-run-output:end -->")
    assert (ROOT / RUN).exists()
    assert (ROOT / "docs/scene.png").stat().st_size < 150_000
