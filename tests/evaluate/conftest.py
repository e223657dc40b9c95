from pathlib import Path

import pytest
from evaluated_project import make

from lyrics.config import Config

SHARED = Path(__file__).parents[3] / "shared" / "formats"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A project folder, made once; tests that write go to folders of their own."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = make(folder, {"instruct": 30, "test": 16, "test_ood": 6}, web=60)
    return folder, config


@pytest.fixture
def project(made: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Config]:
    monkeypatch.chdir(made[0])
    return made


@pytest.fixture
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("the folder ../shared with published scores is not here")
    return SHARED
