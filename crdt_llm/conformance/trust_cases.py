"""Cases about trust: who may do what, and that a refusal leaves nothing behind.

This module owns what is tried; each forgery is a well-formed update that a dishonest client could
send.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.conformance.case import Case, agree, request, requested, require
from crdt_llm.conformance.device import CHANNEL, Device
from crdt_llm.document.conversation import EMPTY_STATE_VECTOR
from crdt_llm.document.schema import Birth, Grant, Place, Role, State, conversation_id
from crdt_llm.errors import ConnectionLost
from crdt_llm.sync.wire.frames import Ack, Closed, Code, Nack, Open

if TYPE_CHECKING:
    from collections.abc import Callable

    from crdt_llm.conformance.case import World
    from crdt_llm.document.conversation import Writer

_FINAL: Final = range(4400, 4500)
_UNAUTHENTICATED: Final = 4401


async def keeps_strangers_out(world: World) -> None:
    """Nobody comes in without a token that counts."""
    for token in (None, "", "x", "a.b.c", world.endpoint.token[:-1] + "_"):
        bare = await world.native()
        try:
            await bare.hello(token)
        except ConnectionLost as lost:
            require(lost.code == _UNAUTHENTICATED, f"a stranger was turned away with {lost.code}")
        else:
            require(holds=False, what=f"the token {token!r} was accepted")
    bare = await world.native()
    await bare.send(Open(CHANNEL, world.device().id, None, 0, EMPTY_STATE_VECTOR))
    code, _ = await bare.expect_end()
    require(code in _FINAL, "a frame before the hello must end the connection")


async def _refused(device: Device, write: Callable[[Writer], None], what: str) -> None:
    verdict = await device.write(write)
    require(isinstance(verdict, Nack), f"{what}: was accepted")
    if isinstance(verdict, Nack):
        fitting = verdict.code in {Code.DENIED, Code.INVALID}
        require(fitting, f"{what}: was answered with {verdict.code}")
        require(verdict.reason, f"{what}: was refused without a reason")


async def _attacker(world: World, owner: Device) -> Device:
    """A device that may write, with a replica of its own: a refused one is lost."""
    device = world.another(owner, "attacker")
    await device.connect()
    return device


async def _all_refused(world: World, forgeries: dict[str, Any]) -> None:
    owner = world.device("owner")
    await owner.connect()
    name, update = owner.say("what was said")
    await owner.send(update)
    _, slot, update = owner.ask("and asked", max_tokens=1)
    del slot
    await owner.send(update)
    for what, forge in forgeries.items():
        attacker = await _attacker(world, owner)
        await _refused(attacker, forge(attacker, name), what)
        await attacker.close()
    fresh = world.another(owner, "fresh")
    await fresh.connect()
    require("forged" not in " ".join(fresh.texts()), "a forged text is there")
    require(fresh.replica.meta.title != "forged", "a forged title is there")
    _, update = owner.say("life goes on")
    await owner.send(update)


async def keeps_names_true(world: World) -> None:
    """An entry under somebody else's name."""

    def under_another_name(device: Device, _: str) -> Callable[[Writer], None]:
        name, born = device.entry()
        return lambda writer: writer.add(name, replace(born, author="somebody else"), "forged")

    def together_with_a_valid_write(device: Device, _: str) -> Callable[[Writer], None]:
        forge = under_another_name(device, "")

        def write(writer: Writer) -> None:
            writer.set_meta("title", "forged")
            forge(writer)

        return write

    await _all_refused(
        world,
        {
            "a forged author": under_another_name,
            "a valid write in one update with a forged one": together_with_a_valid_write,
        },
    )


async def keeps_the_models_words_its_own(world: World) -> None:
    """A client writes what only the node may."""

    def slot_with(key: str, value: Any) -> Any:
        def forge(device: Device, _: str) -> Callable[[Writer], None]:
            name, born = device.entry(Role.ASSISTANT)

            def write(writer: Writer) -> None:
                writer.add(name, born)
                writer.set(name, key, value)

            return write

        return forge

    def reply_text(device: Device, _: str) -> Callable[[Writer], None]:
        name, born = device.entry(Role.ASSISTANT)
        return lambda writer: writer.add(name, born, "forged")

    def a_place(device: Device, name: str) -> Callable[[Writer], None]:
        del device
        return lambda writer: writer.place(name, Place("", 1))

    def a_lease(device: Device, _: str) -> Callable[[Writer], None]:
        del device
        return lambda writer: writer.add_lease(99, os.urandom(32), os.urandom(64))

    await _all_refused(
        world,
        {
            "the text of a reply": reply_text,
            "a state": slot_with("state", State.DONE.value),
            "a usage": slot_with("usage", {"prompt": 1, "prefilled": 0, "reused": 1}),
            "a salt": slot_with("salt", os.urandom(16)),
            "a proof": slot_with("proof", {"digest": bytes(32), "signature": bytes(64)}),
            "tool calls": slot_with("calls", [{"name": "rm"}]),
            "an admission": a_place,
            "a lease": a_lease,
        },
    )


async def keeps_what_was_said(world: World) -> None:
    """What is written once is not written again, nor deleted."""

    def another_text(device: Device, name: str) -> Callable[[Writer], None]:
        del device
        return lambda writer: writer.set(name, "content", "forged")

    def another_birth(device: Device, name: str) -> Callable[[Writer], None]:
        _, born = device.entry()
        return lambda writer: writer.set(name, "born", born.plain())

    def another_owner(device: Device, _: str) -> Callable[[Writer], None]:
        del device
        birth = Birth("somebody else", os.urandom(16))
        return lambda writer: writer.set_meta("birth", birth.plain())

    def an_unknown_field(device: Device, name: str) -> Callable[[Writer], None]:
        del device
        return lambda writer: writer.set(name, "votes", 7)

    await _all_refused(
        world,
        {
            "another text in an entry that is there": another_text,
            "another birth of an entry": another_birth,
            "another birth of the conversation": another_owner,
            "a field that no entry has": an_unknown_field,
        },
    )


async def keeps_readers_in_step(world: World) -> None:
    """A read-only peer writes nothing, and sees what everybody sees."""
    owner = world.device("owner")
    await owner.connect()
    _, update = owner.say("for readers")
    await owner.send(update)
    reader = await world.guest(owner, Grant.READER)
    opened = await reader.open()
    require(opened.grant == Grant.READER, f"a reader was told to be {opened.grant}")
    spoiled = world.another(reader, "spoiled", state=reader.replica.diff())
    _, update = spoiled.say("a reader's opinion")
    verdict = await reader.submit(update)
    require(
        isinstance(verdict, Nack) and verdict.code is Code.DENIED,
        "a reader's write must be denied",
    )
    _, update = owner.say("said later")
    await owner.send(update)
    await reader.until(lambda replica: "said later" in _texts(replica), "what was said later")
    require(reader.texts() == owner.texts(), "a reader's view differs from the owner's")


async def keeps_a_refusal_whole(world: World) -> None:
    """After a refusal the same person goes on at once; nobody saw anything of it."""
    owner, second = await world.pair()
    attacker = await _attacker(world, owner)
    name, born = attacker.entry()

    def write(writer: Writer) -> None:
        writer.add(name, replace(born, author="somebody else"), "forged")
        writer.set_meta("title", "forged")

    verdict = await attacker.write(write)
    require(isinstance(verdict, Nack), "a forged author was accepted")
    rebuilt = world.another(owner, "rebuilt")
    rebuilt.wire = attacker.wire
    attacker.wire = None
    rebuilt.replica.apply(second.replica.diff())
    _, update = rebuilt.say("said properly")
    await rebuilt.send(update)
    await second.until(lambda replica: len(replica.tree) == 1, "the proper entry")
    require(second.texts() == ("said properly",), "something of the refused write was seen")
    require(second.replica.meta.title == "", "something of the refused write was seen")


async def keeps_a_guest_where_it_was_invited(world: World) -> None:
    """An invitation opens one conversation, as long as it is not taken back."""
    owner, other = world.device("owner"), world.device("other")
    await owner.connect()
    await other.connect()
    guest = await world.guest(owner, Grant.WRITER)
    await guest.connect()
    _, update = guest.say("thank you")
    await guest.send(update)
    wire = guest.wire
    require(wire is not None, "the guest was disconnected")
    if wire is not None:
        await wire.send(Open(2, other.id, None, 0, EMPTY_STATE_VECTOR))
        closed = await wire.expect(Closed, lambda closed: closed.channel == 2)  # noqa: PLR2004
        require(closed.code in _FINAL, "a guest came into another conversation")
    verdict = await owner.write(lambda writer: writer.grant(guest.principal, None))
    require(isinstance(verdict, Ack), "an owner may take a right back")
    if wire is not None:
        closed = await wire.expect_closed(CHANNEL)
        require(closed.code in _FINAL, "who lost the right to read is still there")


async def ends_a_revoked_token(world: World) -> None:
    """Taking a token back ends what it opened."""
    owner = world.device("owner")
    await owner.connect()
    values = await request(owner, "invite", {"conversation": owner.id, "role": "reader"})
    await owner.send(owner.compose(lambda writer: writer.grant(values["principal"], Grant.READER)))
    guest = world.kept(
        Device(
            world.endpoint,
            owner.id,
            principal=values["principal"],
            token=values["token"],
            name="guest",
        )
    )
    await guest.open()
    await request(owner, "revoke", {"id": values["id"]})
    if guest.wire is not None:
        code, _ = await guest.wire.expect_end()
        require(code == _UNAUTHENTICATED, f"a revoked token's connection ended with {code}")
    answer = await requested(owner, "invite", {"conversation": "A" * 22, "role": "reader"})
    require(answer.values is None, "an invitation into somebody else's conversation was made")


async def keeps_ids_from_strangers(world: World) -> None:
    """An id belongs to the birth that hashes to it."""
    theirs = Device.born(
        world.endpoint, principal="somebody else", token=world.endpoint.token, name="thief"
    )
    world.kept(theirs)
    opened = await theirs.open()
    verdict = await theirs.submit(theirs.replica.diff(opened.state_vector))
    require(isinstance(verdict, Nack), "a conversation was begun in somebody else's name")
    birth = Birth(world.principal, os.urandom(16))
    wrong = world.device("wrong")
    wrong.id = conversation_id(Birth(world.principal, os.urandom(16)))
    wrong.compose(lambda writer: writer.set_meta("birth", birth.plain()))
    opened = await wrong.open()
    verdict = await wrong.submit(wrong.replica.diff(opened.state_vector))
    require(isinstance(verdict, Nack), "a birth was accepted under an id that it does not hash to")


async def withdraws_what_was_said(world: World) -> None:
    """A redaction takes the text from everybody, for good."""
    owner, second = await world.pair()
    name, update = owner.say("the code is 4711")
    await owner.send(update)
    await second.until(lambda replica: name in replica.tree, "the entry")

    def redact(writer: Writer) -> None:
        writer.redact(name, world.principal, 1)

    verdict = await owner.write(redact)
    require(isinstance(verdict, Ack), "an author may withdraw an entry")
    await second.until(lambda replica: replica.text(name) == "", "the withdrawal")
    await agree([owner, second])
    fresh = world.another(owner, "fresh")
    opened = await fresh.open()
    require(b"4711" not in opened.update, "the endpoint still hands out what was withdrawn")


def _texts(replica: Any) -> list[str]:
    return [replica.text(name) for name in replica.view()]


CASES: Final = (
    Case(
        "stranger",
        "nobody takes part without a token that counts",
        "anyone with the link could read along",
        keeps_strangers_out,
    ),
    Case(
        "forged-author",
        "an entry is under its writer's own name",
        "a message in my name that I did not write",
        keeps_names_true,
    ),
    Case(
        "forged-reply",
        "only the node writes what the node writes",
        "a client can put words into the model's mouth, and the model believes it said them",
        keeps_the_models_words_its_own,
    ),
    Case(
        "frozen",
        "what was said is not changed afterwards",
        "an edited history makes the model answer to what nobody said",
        keeps_what_was_said,
    ),
    Case(
        "reader",
        "a read-only peer writes nothing and sees what everybody sees",
        "a read-only viewer's local change made its page diverge for ever",
        keeps_readers_in_step,
    ),
    Case(
        "whole-refusal",
        "a refusal is whole, and the next write is taken",
        "after one rejected message the thread stayed broken until it was deleted",
        keeps_a_refusal_whole,
    ),
    Case(
        "guest",
        "an invitation is for one conversation, until it is taken back",
        "a shared link gave access to everything",
        keeps_a_guest_where_it_was_invited,
    ),
    Case(
        "revoked",
        "a revoked token ends its live connections",
        "a leaked key went on working in an open tab",
        ends_a_revoked_token,
    ),
    Case(
        "birth",
        "an id belongs to the birth that hashes to it",
        "a stranger created a thread under my lost id",
        keeps_ids_from_strangers,
    ),
    Case(
        "redaction",
        "what is withdrawn is gone for whoever comes next",
        "a deleted message came back after a sync",
        withdraws_what_was_said,
    ),
)
