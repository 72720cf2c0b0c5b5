from __future__ import annotations

from pathlib import Path

import pytest

from crdt_llm.cli.folders import TOKEN_BYTES_MAX, DataFolder, default_data_folder, read_token
from crdt_llm.errors import AuthenticationFailed, LocalMisuse


def test_the_default_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_folder().is_relative_to(tmp_path)
    assert DataFolder.named(None).path == default_data_folder()
    assert DataFolder.named(Path("~/here")).path == tmp_path / "here"


def test_devices_have_folders_of_their_own(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    assert folder.device("phone") != folder.device("pad")
    assert folder.log.parent == folder.token.parent == tmp_path
    assert folder.device("log.db").parent != tmp_path


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "x" * 65, "-x", "a\n", "é"])
def test_a_device_s_name_is_a_folder_s_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(LocalMisuse, match="device"):
        DataFolder(tmp_path).device(name)


def test_a_token_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "owner.token"
    path.write_text(" abc-DEF_1\n")
    assert read_token(path) == "abc-DEF_1"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", b"\xff\xfe", b"x" * (TOKEN_BYTES_MAX + 1)]
)
def test_what_is_no_token_is_not_sent(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "owner.token"
    path.write_bytes(content)
    with pytest.raises(AuthenticationFailed, match="--token-file"):
        read_token(path)


def test_a_missing_token_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(AuthenticationFailed, match="crdt-llm serve"):
        read_token(tmp_path / "owner.token")


def test_a_token_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(AuthenticationFailed, match="cannot be read"):
        read_token(tmp_path)
