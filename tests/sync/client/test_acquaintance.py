"""What a device remembers of relays."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crdt_llm.errors import Corrupt, Refused, StoreFailed
from crdt_llm.sync.client.acquaintance import FILE_NAME, Acquaintances

if TYPE_CHECKING:
    from pathlib import Path

HERE, THERE = "ws://here:1/", "wss://there/"
KEY, OTHER = b"k" * 32, b"o" * 32


def test_the_first_key_is_kept_and_another_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    known = Acquaintances(path)
    assert known.principal(HERE) is None
    known.meet(HERE, KEY, "ada")
    known.meet(THERE, OTHER, "guest:1")
    for again in (known, Acquaintances(path)):  # also after a restart
        with pytest.raises(Refused, match="shows another key") as caught:
            again.meet(HERE, OTHER, "mallory")
        assert caught.value.code == "relay-key"
        assert str(path) in str(caught.value)
        assert (again.principal(HERE), again.principal(THERE)) == ("ada", "guest:1")
        again.meet(HERE, KEY, "ada")


def test_a_principal_may_change_with_the_token(tmp_path: Path) -> None:
    known = Acquaintances(tmp_path / FILE_NAME)
    known.meet(HERE, KEY, "ada")
    known.meet(HERE, KEY, "bob")
    assert Acquaintances(tmp_path / FILE_NAME).principal(HERE) == "bob"


def test_nothing_is_written_when_nothing_is_new(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    known = Acquaintances(path)
    known.meet(HERE, KEY, "ada")
    path.unlink()
    known.meet(HERE, KEY, "ada")
    assert not path.exists()


def test_without_a_file_it_is_remembered_as_long_as_it_lives() -> None:
    known = Acquaintances(None)
    known.meet(HERE, KEY, "ada")
    assert known.principal(HERE) == "ada"
    with pytest.raises(Refused, match="this device's memory"):
        known.meet(HERE, OTHER, "ada")


def test_a_disk_that_fails_is_said_each_time(tmp_path: Path) -> None:
    known = Acquaintances(tmp_path / "no such folder" / FILE_NAME)
    for _ in range(2):  # it is not taken for kept
        with pytest.raises(StoreFailed, match="cannot be written"):
            known.meet(HERE, KEY, "ada")
    assert known.principal(HERE) is None
    with pytest.raises(StoreFailed, match="cannot be read"):
        Acquaintances(tmp_path)  # a folder


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"ws://here:1/": 5}',
        b'{"ws://here:1/": {}}',
        b'{"ws://here:1/": {"key": 5}}',
        b'{"ws://here:1/": {"key": "k", "principal": 5}}',
        b"[" * 100_000,
    ],
)
def test_another_file_is_said_to_be_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(Corrupt, match="no list of relays"):
        Acquaintances(path)
    assert path.read_bytes() == content


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from((HERE, "key", "principal")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(anything)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the file is overwritten
def test_any_json_is_read_or_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(content))
    try:
        known = Acquaintances(path)
    except Corrupt:
        return
    assert isinstance(known.principal(HERE), str | None)
