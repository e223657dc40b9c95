"""How tasks are mixed."""

import pytest

from lyrics.errors import InputError
from lyrics.train.stage2_batches import mixing_weights


def test_without_shares_tasks_mix_by_the_square_root_of_their_size() -> None:
    assert mixing_weights({"caption": 100, "vqa": 900}, None) == {"caption": 0.25, "vqa": 0.75}


def test_shares_are_scaled_to_the_tasks_that_the_data_has() -> None:
    found = mixing_weights({"caption": 10, "vqa": 10, "chat": 5}, {"caption": 0.2, "vqa": 0.6, "refer": 0.2})
    assert found == pytest.approx({"caption": 0.25, "vqa": 0.75})


def test_shares_that_no_task_has_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"task_shares names refer, but the data has only caption"):
        mixing_weights({"caption": 10}, {"refer": 1.0})
