"""params/run.yaml to build/config.yaml: what is accepted, what is refused and in which words."""

import shutil
from pathlib import Path

import pytest
import yaml

from lyrics import compose, config
from lyrics.errors import InputError

ROOT = Path(__file__).parents[2]
RUN = Path("params/run.yaml")


@pytest.fixture(autouse=True)
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "params"


def choose(**changes: object) -> None:
    RUN.write_text(yaml.safe_dump({**yaml.safe_load(RUN.read_text()), **changes}))


@pytest.mark.parametrize("preset", ["tiny", "laptop", "paper"])
def test_every_preset_composes_and_is_read_back(preset: str) -> None:
    choose(preset=preset)
    compose.write(compose.compose())
    assert config.load().preset == preset
    assert Path("build/config.yaml").read_text().startswith("# generated; edit params/\n")


def test_composing_twice_gives_the_same_bytes() -> None:
    compose.write(compose.compose())
    first = Path("build/config.yaml").read_bytes()
    compose.write(compose.compose())
    assert Path("build/config.yaml").read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, r"preset 'huge' in params/run.yaml is unknown; choices: laptop, paper, tiny"),
        ({"data": "mars"}, r"data 'mars' .* choices: files, photos, world"),
        ({"overrides": {"stage2.stepz": 3}}, r"override stage2.stepz .* unknown key; keys there: .*steps"),
        ({"overrides": {"nothing.here": 3}}, r"override nothing.here .* unknown key; keys there: .*stage1"),
        ({"overrides": {"stage2.optimizer": 3}}, r"stage2.optimizer .* is a group of keys, not a value: .*lr"),
        ({"overrides": {"stage2.steps": "many"}}, r"stage2.steps: .*valid integer.*'many'"),
        ({"overrides": {"stage1.objectives": "some"}}, r"stage1.objectives: .*'all' or 'alternate'"),
        ({"overrides": {"mq_former.heads": 5}}, r"mq_former.hidden_size \(\d+\) must be a multiple of .*heads \(5\)"),
        (
            {"overrides": {"mq_former.visual_queries": 0, "mq_former.grounding_queries": 0}},
            r"visual_queries and mq_former.grounding_queries are both 0; set at least one",
        ),
        (
            {"overrides": {"refine.max_objects": 16}},
            r"refine.max_objects is 16, but mq_former.max_text_tokens 128 hold a caption and 15 objects of 6 tokens "
            r"\(refine.coordinate_format grid100\); lower the first",
        ),
        (
            {"overrides": {"foundation.tagger.vocabulary": "words.txt"}},
            r"vocabulary is words.txt, which is no file in params/; put it there, one tag a line",
        ),
        ({"overrides": {"data.splits.val": "../val"}}, r"data.splits.val is ../val, which leads out of data.folder"),
        ({"overrides": {"clean.duplicate_hamming_bits": 32}}, r"clean.duplicate_hamming_bits: .*less than 32"),
        ({"overrides": {"stage2.steps": -5}}, r"stage2.steps: .*greater than or equal to 1 \(found -5\)"),
        ({"overrides": {"stage1.mask_probability": 1.5}}, r"stage1.mask_probability: .*less than or equal to 1"),
        ({"overrides": {"stage1.temperature": float("nan")}}, r"stage1.temperature: .*finite number"),
        ({"overrides": {"stage2": {}}}, r"stage2 .* is a group of keys, not a value: .*steps"),
        ({"overrides": {"device": "quantum"}}, r"device 'quantum' is unknown; choices: auto, cpu, mps, cuda"),
        ({"overrides": {"stage1": "enormous"}}, r"stage1 'enormous' .* choices: laptop, paper, tiny"),
        ({"overrides": 3}, r"overrides .* must map dotted keys to values; found 3"),
        ({"folder": "/somewhere"}, r"data source world reads no folder, but folder is /somewhere"),
        (
            {"overrides": {"data.splits.tset": "val"}},
            r"data.splits has the unknown key tset; splits are foundation, web, instruct, val, test, test_ood,",
        ),
        ({"data": "photos"}, r"reads your folder, but none is named; add folder=PATH"),
        ({"data": "photos", "folder": "/no/such"}, r"folder /no/such is missing or not a folder"),
        ({"presets": "tiny"}, r"must hold exactly the keys data, folder, overrides, preset; found .*presets"),
    ],
)
def test_a_wrong_choice_is_refused_by_name(changes: dict, message: str) -> None:
    choose(**changes)
    with pytest.raises(InputError, match=message):
        compose.compose()


def test_overrides_may_be_dotted_nested_or_another_group() -> None:
    choose(overrides={"stage2.steps": 5, "stage1": "laptop", "world": {"scenes": {"web": 9}}})
    values = compose.compose()
    laptop = yaml.safe_load((ROOT / "params/stage1/laptop.yaml").read_text())
    assert values["stage2"]["steps"] == 5
    assert values["world"]["scenes"]["web"] == 9
    assert values["stage1"]["batch_size"] == laptop["batch_size"]


def test_the_folder_of_the_user_becomes_the_data_folder(tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    compose.configure(["data=photos", f"folder={outside}"])
    assert compose.compose()["data"]["folder"] == str(outside)
    inside = tmp_path / "pictures"
    inside.mkdir()
    compose.configure(["folder=pictures"])
    assert compose.compose()["data"]["folder"] == "pictures"
    assert compose.configure(["data=world"])["folder"] == "lyrics/world"


def test_configure_keeps_comments_and_changes_only_what_is_named() -> None:
    before = RUN.read_text()
    compose.configure(["stage2.optimizer.lr=2e-4", "stage1.log_every=7"])
    assert compose.read_choices(RUN)["overrides"] == {"stage2.optimizer.lr": 2e-4, "stage1.log_every": 7}
    assert [line for line in RUN.read_text().splitlines() if line.startswith("#")] == [
        line for line in before.splitlines() if line.startswith("#")
    ]
    compose.configure(["~stage1.log_every"])
    assert compose.read_choices(RUN)["overrides"] == {"stage2.optimizer.lr": 2e-4}
    compose.configure(["~overrides"])
    assert compose.read_choices(RUN)["overrides"] == {}


@pytest.mark.parametrize("setting", ["preset=huge", "stage2.stepz=1", "nonsense", "~stage2.steps", "stage2.steps=[1"])
def test_a_refused_setting_leaves_the_file_as_it_was(setting: str) -> None:
    before = RUN.read_bytes()
    with pytest.raises(InputError):
        compose.configure([setting])
    assert RUN.read_bytes() == before
    assert list(RUN.parent.glob(".*")) == []


@pytest.mark.parametrize("content", [b"preset: [tiny\n", b"- : :\n\t- x", b"\xff\xfe"])
@pytest.mark.parametrize(
    ("file", "says"), [("run.yaml", r"params/run.yaml"), ("stage2/tiny.yaml", r"A file in params/")]
)
def test_broken_yaml_is_one_sentence(content: bytes, file: str, says: str) -> None:
    (RUN.parent / file).write_bytes(content)
    with pytest.raises(InputError, match=rf"{says} is not valid YAML: .*") as refused:
        compose.compose()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["[", "3", ""])
def test_a_damaged_composed_file_is_named_with_its_cure(content: str) -> None:
    config.CONFIG_PATH.parent.mkdir()
    config.CONFIG_PATH.write_text(content)
    with pytest.raises(InputError, match=r"build/config.yaml is damaged; write it again with: .*compose"):
        config.load()


def test_shares_may_be_a_rule_or_a_mapping_with_names_of_the_users() -> None:
    compose.configure(["stage2.shares=as_given", "stage2.mix_by=source"])
    assert compose.compose()["stage2"]["shares"] == "as_given"
    compose.configure(["~stage2.shares", "stage2.shares.gqa=0.5", "stage2.shares.vqa=0"])
    shares = compose.compose()["stage2"]["shares"]
    assert (shares["gqa"], shares["vqa"], shares["caption"]) == (0.5, 0, 0.15)


def test_data_sets_may_be_named_in_an_override(tmp_path: Path) -> None:
    compose.configure(["data=files", f"folder={tmp_path}", "data.sets=[{format: pope, path: a.json, split: test}]"])
    assert compose.compose()["data"]["sets"][0] == {
        **dict.fromkeys(("images", "annotations", "part", "named_by", "name")),
        **{"format": "pope", "path": "a.json", "split": "test"},
    }
    with pytest.raises(InputError, match=r"data\.sets\.0\.format: .*'webdataset'.*found 'tfrecord'"):
        compose.configure(["data.sets=[{format: tfrecord, path: a, split: test}]"])
    with pytest.raises(InputError, match=r"data\.sets\.0\.part says nothing to the format pope, only to aokvqa"):
        compose.configure(["data.sets=[{format: pope, path: a, split: test, part: val}]"])


def test_looking_at_a_choice_changes_nothing() -> None:
    before = RUN.read_bytes()
    assert compose.edited(["seed=3"])[1]["overrides"] == {"seed": 3}
    assert RUN.read_bytes() == before


def test_other_words_of_the_tagger_are_another_configuration() -> None:
    words = Path("params/words.txt")
    choose(overrides={"foundation.tagger.vocabulary": str(words)})
    found = []
    for text in ("cup\n", "cup\nstar\n"):
        words.write_text(text)
        found.append(compose.compose()["foundation"]["tagger"]["vocabulary_sha256"])
    assert found[0] != found[1]
