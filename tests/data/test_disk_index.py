"""The dictionary and the lists on disk beside those in memory."""

import contextlib
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from lyrics.data.disk_index import Groups, Index

keys = st.tuples(st.integers(0, 3) | st.text(max_size=2), st.sampled_from(["a", "a\0", "\ud800", None]))


@given(st.lists(st.tuples(keys, st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), max_size=30))
def test_an_index_keeps_the_first_value_of_a_key_and_a_group_all(entries):
    expected: dict = {}
    grouped = defaultdict(list)
    with contextlib.closing(Index()) as index, contextlib.closing(Groups()) as groups:
        for key, value in entries:
            text = tuple(map(str, key))
            assert index.add(*key, value=value) == (text not in expected)
            expected.setdefault(text, value)
            groups.add(*key, value=value)
            grouped[text].append(value)
        for key, _ in entries:
            text = tuple(map(str, key))
            assert index.get(*key) == expected[text]
            assert list(groups.of(*key, limit=100)) == grouped[text]
            assert list(groups.of(*key, limit=2)) == grouped[text][:2]
        assert index.get("never", "seen") is None and "never" not in index
