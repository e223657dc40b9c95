import pytest

from lyrics import io
from lyrics.errors import InputError
from lyrics.inference import Lyrics


@pytest.mark.parametrize("settings", [{"refine": {"gone": 1}, "foundation": {}}, {"foundation": {}}])
def test_a_model_of_other_code_is_refused_in_a_sentence(tmp_path, settings):
    io.write_json(tmp_path / "config.json", settings)
    with pytest.raises(InputError, match=r"lyrics version 3 was trained by other code than this.*git_commit"):
        Lyrics.from_folders(tmp_path, tmp_path, device="cpu", label="lyrics version 3")
