from __future__ import annotations

import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from crdt_llm.document.schema import Grant
from crdt_llm.errors import Corrupt, Forbidden, LocalMisuse, TooLarge
from crdt_llm.store.token_ledger import TokenLedger
from crdt_llm.sync.relay import access as access_module
from crdt_llm.sync.relay.access import (
    GUEST,
    OWNER,
    TOKEN_CHARACTERS,
    Authority,
    Pass,
    TokenAccess,
    load_or_create_token,
    may_connect,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_the_token_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "data" / "owner.token"
    token = load_or_create_token(path)
    assert len(token) == TOKEN_CHARACTERS
    assert load_or_create_token(path) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["owner.token"]


def test_tokens_differ(tmp_path: Path) -> None:
    assert load_or_create_token(tmp_path / "a") != load_or_create_token(tmp_path / "b")


def test_who_is_faster_wins(tmp_path: Path) -> None:
    path = tmp_path / "owner.token"

    def somebody_is_faster(count: int) -> bytes:
        if not path.exists():
            load_or_create_token(path)
        return bytes(count)

    token = load_or_create_token(path, somebody_is_faster)
    assert token == load_or_create_token(path)
    assert token != "A" * TOKEN_CHARACTERS


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 43, b"x" * 44])
def test_a_damaged_token_file_is_not_used(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "owner.token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(Corrupt, match="damaged"):
        load_or_create_token(path)


def test_a_token_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "owner.token"
    load_or_create_token(path)
    path.chmod(0o640)
    with pytest.raises(Corrupt, match="chmod 600"):
        load_or_create_token(path)


def test_only_the_token_is_the_token() -> None:
    access = TokenAccess("secret")
    assert access.authenticate("secret") == Pass(OWNER)
    for wrong in (None, "", "secre", "secret ", "SECRET", "sécret", "\ud800", "x" * 10**6):
        assert access.authenticate(wrong) is None
    assert "secret" not in repr(access)


@pytest.mark.parametrize(
    ("origin", "host", "may"),
    [
        (None, "127.0.0.1:8765", True),
        ("http://127.0.0.1:8765", "127.0.0.1:8765", True),
        ("http://localhost:5173", "127.0.0.1:8765", True),
        ("http://app.localhost", "127.0.0.1:8765", True),
        ("http://[::1]:3000", "[::1]:8765", True),
        ("http://127.8.9.1", None, True),
        ("https://relay.example", "relay.example", True),
        ("https://relay.example", "relay.example:443", True),
        ("http://relay.example:8765", "relay.example:8765", True),
        ("https://allowed.example", "127.0.0.1:8765", True),
        ("https://evil.example", "127.0.0.1:8765", False),
        ("http://relay.example:1", "relay.example:8765", False),
        ("http://relay.example:1", "relay.example", False),
        ("http://relay.example", "relay.example:8765", False),
        ("https://relay.example.evil", "relay.example", False),
        ("https://localhost.evil.example", "127.0.0.1", False),
        ("http://127.0.0.1.evil.example", "127.0.0.1", False),
        ("http://allowed.example", "127.0.0.1:8765", False),
        ("null", "127.0.0.1:8765", False),
        ("file://", "127.0.0.1:8765", False),
        ("", "127.0.0.1:8765", False),
        ("http://[", "127.0.0.1:8765", False),
        ("http://a:99999", "a:99999", False),
        ("http://evil.example", None, False),
    ],
)
def test_pages_from_elsewhere_may_not_connect(
    origin: str | None,
    host: str | None,
    may: bool,  # noqa: FBT001 - a column of the table
) -> None:
    assert may_connect(origin, host, frozenset({"https://allowed.example"})) is may


class World:
    """An authority with a clock that the test moves."""

    def __init__(self, path: Path, secret: bytes = bytes(32)) -> None:
        self.now_ms = 1_700_000_000_000
        self.ledger = TokenLedger.open(path)
        self.authority = Authority("owners-own", secret, self.ledger, clock=lambda: self.now_ms)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "tokens.db")
    yield world
    world.ledger.close()


def test_the_owners_token_allows_everything_for_ever(world: World) -> None:
    assert world.authority.authenticate("owners-own") == Pass(OWNER)
    assert world.authority.is_valid(Pass(OWNER))


def test_a_token_proves_what_it_was_issued_for(world: World) -> None:
    scopes = {"A" * 22: Grant.READER}
    token, made = world.authority.issue("ada", conversations=scopes)
    found = world.authority.authenticate(token)
    assert found == made
    assert found is not None
    assert found.may_enter("A" * 22)
    assert not found.may_enter("B" * 22)
    assert found.cap("A" * 22) is Grant.READER
    node, _ = world.authority.issue("node-2", node=True)
    proved = world.authority.authenticate(node)
    assert proved is not None
    assert proved.node
    assert proved.may_enter("B" * 22)
    assert proved.cap("B" * 22) is None


def test_a_token_ends_with_its_time_on_live_connections_too(world: World) -> None:
    token, _ = world.authority.issue("ada", expires_at=world.now_ms + 60_000)
    found = world.authority.authenticate(token)
    assert found is not None
    world.now_ms += 59_000
    assert world.authority.is_valid(found)
    world.now_ms += 1_000
    assert not world.authority.is_valid(found)
    assert world.authority.authenticate(token) is None


def test_a_revoked_token_counts_no_more(world: World) -> None:
    token, made = world.authority.issue("ada")
    kept, _ = world.authority.issue("ada")
    world.authority.revoke(made.id)
    assert world.authority.authenticate(token) is None
    assert not world.authority.is_valid(made)
    assert world.authority.authenticate(kept) is not None


async def test_an_invitation_is_for_one_conversation_and_a_guest_of_its_own(world: World) -> None:
    _, first = await world.authority.invite("A" * 22, Grant.WRITER, inviter="ada", name="Bob")
    _, second = await world.authority.invite("A" * 22, Grant.WRITER, inviter="ada")
    assert first.principal.startswith(GUEST)
    assert first.principal != second.principal
    assert first.conversations == {"A" * 22: Grant.WRITER}
    with pytest.raises(LocalMisuse, match="invite writers or readers"):
        await world.authority.invite("A" * 22, Grant.OWNER, inviter="ada")
    lines = {line.id: (line.inviter, line.name) for line in world.ledger.issued()}
    assert lines == {first.id: ("ada", "Bob"), second.id: ("ada", None)}


async def test_an_invitation_ends_in_a_year_where_nothing_else_is_said(world: World) -> None:
    token, made = await world.authority.invite("A" * 22, Grant.WRITER, inviter="ada")
    assert world.authority.authenticate(token) == made
    assert made.expires_at == world.now_ms + access_module.INVITATION_MS


async def test_invitations_that_count_are_bounded_by_principal(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_module, "INVITATIONS_MAX", 2)
    _, first = await world.authority.invite("A" * 22, Grant.WRITER, inviter="ada")
    await world.authority.invite("A" * 22, Grant.READER, world.now_ms + 1_000, inviter="ada")
    with pytest.raises(TooLarge, match="revoke some"):
        await world.authority.invite("A" * 22, Grant.WRITER, inviter="ada")
    assert len(world.ledger.issued()) == 2
    await world.authority.invite("A" * 22, Grant.WRITER, inviter="bob")
    await world.authority.revoke_aside(first.id)
    await world.authority.invite("A" * 22, Grant.WRITER, inviter="ada")
    world.now_ms += 1_000
    await world.authority.invite("A" * 22, Grant.WRITER, inviter="ada")


async def test_a_nodes_key_is_that_of_the_principal_that_came_with_it_first(world: World) -> None:
    mine, other = Pass("node-1", "a", node=True), Pass("node-2", "b", node=True)
    for _ in range(2):
        await world.authority.admit_node(mine, b"k" * 32)
    with pytest.raises(Forbidden):
        await world.authority.admit_node(other, b"k" * 32)
    await world.authority.admit_node(other, b"l" * 32)


@given(st.data())
def test_a_token_that_was_touched_proves_nothing(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "tokens.db")
        token, _ = world.authority.issue("ada")
        at = data.draw(st.integers(0, len(token) - 1))
        # The last character of each part holds spare bits that base64 readers ignore.
        assume(at + 1 < len(token) and "." not in token[at : at + 2])
        letter = data.draw(st.characters(codec="ascii").filter(lambda one: one != token[at]))
        assert world.authority.authenticate(token[:at] + letter + token[at + 1 :]) is None
        world.ledger.close()


def test_a_token_of_another_key_or_without_a_signature_proves_nothing(
    world: World, tmp_path: Path
) -> None:
    other = World(tmp_path / "other.db", bytes([1]) * 32)
    token, _ = other.authority.issue("ada")
    other.ledger.close()
    assert world.authority.authenticate(token) is None
    claims = {"iss": "crdt-llm", "sub": "owner", "jti": "x"}
    assert world.authority.authenticate(jwt.encode(claims, "", algorithm="none")) is None
    symmetric = jwt.encode(claims, "k" * 32, algorithm="HS256")
    assert world.authority.authenticate(symmetric) is None


@pytest.mark.parametrize(
    ("principal", "options", "why"),
    [
        ("", {}, "characters"),
        ("a\nb", {}, "characters"),
        ("x" * 201, {}, "characters"),
        ("ada", {"expires_at": 1}, "ended before"),
        ("ada", {"conversations": {}}, "1 to 100"),
        ("ada", {"conversations": {"short": Grant.READER}}, "22 characters"),
    ],
)
def test_what_no_token_can_say(
    world: World, principal: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(LocalMisuse, match=why):
        world.authority.issue(principal, **options)
    assert world.ledger.issued() == ()
