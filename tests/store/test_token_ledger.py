"""The list of tokens that were issued and revoked."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import pytest

from crdt_llm.errors import Corrupt, StoreFailed
from crdt_llm.store.token_ledger import Issued, TokenLedger

if TYPE_CHECKING:
    from pathlib import Path

ONE = Issued("one", "ada", "everything", 1_000, None)
TWO = Issued("two", "bob", "reader of x", 2_000, 9_000)


def test_issued_tokens_are_listed_with_their_end(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    ledger = TokenLedger.open(path)
    ledger.record(ONE)
    ledger.record(TWO)
    ledger.revoke("one", 3_000)
    ledger.close()

    again = TokenLedger.open(path)
    first, second = again.issued()
    again.close()
    assert first == TWO
    assert (second.id, second.revoked_at) == ("one", 3_000)
    assert path.stat().st_mode & 0o077 == 0


def test_a_revocation_counts_at_once_here_and_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    relay, command_line = TokenLedger.open(path), TokenLedger.open(path)
    assert not relay.is_revoked("one")
    command_line.revoke("one", 1)
    assert relay.is_revoked("one")
    relay.revoke("two", 2)
    assert relay.is_revoked("two")
    assert command_line.is_revoked("two")
    assert not relay.is_revoked("three")
    relay.close()
    command_line.close()


def test_revoking_twice_keeps_the_first_time(tmp_path: Path) -> None:
    ledger = TokenLedger.open(tmp_path / "tokens.db")
    ledger.record(ONE)
    ledger.revoke("one", 5)
    ledger.revoke("one", 6)
    (line,) = ledger.issued()
    ledger.close()
    assert line.revoked_at == 5


def test_an_id_is_given_out_once(tmp_path: Path) -> None:
    ledger = TokenLedger.open(tmp_path / "tokens.db")
    ledger.record(ONE)
    with pytest.raises(Corrupt):
        ledger.record(ONE)
    ledger.close()


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    other = sqlite3.connect(path)
    other.execute("PRAGMA application_id = 7")
    other.execute("CREATE TABLE mine (x)")
    other.commit()
    other.close()
    with pytest.raises(Corrupt, match="not a list of tokens"):
        TokenLedger.open(path)


def test_bytes_that_are_no_database_are_said_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(Corrupt, match="damaged"):
        TokenLedger.open(path)


def test_a_folder_that_is_not_there_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match="cannot be opened"):
        TokenLedger.open(tmp_path / "missing" / "tokens.db")


def test_a_nodes_key_is_whose_it_was_first_until_it_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    relay, command_line = TokenLedger.open(path), TokenLedger.open(path)
    assert relay.claim_node(b"a" * 32, "node-1", 1) == "node-1"
    assert relay.claim_node(b"a" * 32, "node-2", 2) == "node-1"
    assert relay.claim_node(b"b" * 32, "node-2", 3) == "node-2"
    assert [(one.principal, one.since) for one in command_line.nodes()] == [
        ("node-2", 3),
        ("node-1", 1),
    ]
    assert command_line.release_node(b"a" * 32)
    assert not command_line.release_node(b"a" * 32)
    assert relay.node_owner(b"a" * 32) is None
    assert relay.claim_node(b"a" * 32, "node-2", 4) == "node-2"
    relay.close()
    command_line.close()
