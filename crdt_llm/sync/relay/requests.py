"""What a client may ask of the relay that is no write in a document.

This module owns the names of requests, what they need, and who may ask. It must not know frames'
bytes or sockets. An answer always comes: values, or a code and a reason.

============ ====================================== ===============================================
name         arguments                              answer
============ ====================================== ===============================================
``archive``  ``conversation``, ``archived`` (bool)  nothing; the asker's own list says so
``invite``   ``conversation``, ``role`` (``writer`` ``principal``, ``token``, ``id``,
             or ``reader``), ``expires_at`` (ms or  ``expires_at``. Only an owner asks. The token
             nil: in a year), ``name`` (text or     opens nothing until an owner gives the
             nil: for whom, noted beside it)        principal its right in the document
``revoke``   ``id``                                 nothing; only an owner of all conversations
                                                    that the token is for, or the relay's owner
============ ====================================== ===============================================

Whoever asks too often is told to wait. What is noted is noted on the files' own threads.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, TypeVar

from crdt_llm.document.schema import WHOLE_MAX, Grant, is_conversation_id
from crdt_llm.errors import CrdtLlmError, Forbidden, LocalMisuse, Refused, Unavailable
from crdt_llm.sync.relay.access import OWNER
from crdt_llm.sync.wire.frames import NAME_CHARACTERS_MAX, REASON_BYTES_MAX, Answer
from crdt_llm.sync.wire.verdict import reason_of, shorten

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from crdt_llm.sync.relay.access import Authority, Pass
    from crdt_llm.sync.relay.conversation_list import ConversationLists
    from crdt_llm.sync.wire.frames import Request

UNKNOWN: Final = "unknown"
INVALID: Final = "invalid"
DENIED: Final = "denied"
UNAVAILABLE: Final = "unavailable"

INVITE: Final = "invite"

INVITES_PER_MINUTE: Final = 10
"""Invitations of one principal: by hand. Each is a line that is kept."""

REQUESTS_PER_SECOND: Final = 10
"""Other requests of one principal: somebody tidies up a list. Each may wait for a disk."""

COUNTED_MAX: Final = 20_000
"""Principals that are counted at a time; beyond it who asked least recently is forgotten."""

_Value = TypeVar("_Value")


class _Allowance:
    """How often each principal may ask: so many at once, and then as they come back."""

    def __init__(self, clock: Callable[[], float], count: int, period_s: float) -> None:
        self._clock = clock
        self._each_s = period_s / count
        self._period_s = period_s
        self._paid_until: OrderedDict[str, float] = OrderedDict()

    def take(self, principal: str) -> None:
        """Count a request.

        Raises:
            Unavailable: It comes too soon.
        """
        now = self._clock()
        paid = max(self._paid_until.get(principal, 0.0), now) + self._each_s
        wait = paid - now - self._period_s
        if wait > 1e-9:  # noqa: PLR2004 - what sums of fractions are off
            raise Unavailable(f"that is too often: ask again in {wait:.1f} s")
        self._paid_until[principal] = paid
        self._paid_until.move_to_end(principal)
        if len(self._paid_until) > COUNTED_MAX:
            self._paid_until.popitem(last=False)


class Requests:
    """Answers requests.

    Args:
        lists: Who may do what where, and what was put away.
        authority: Issues and revokes tokens; ``None`` if there are only those of files.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        lists: ConversationLists,
        authority: Authority | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lists = lists
        self._authority = authority
        self._known: Mapping[str, Callable[[Pass, Mapping[str, Any]], Awaitable[dict[str, Any]]]]
        self._known = {"archive": self._archive, INVITE: self._invite, "revoke": self._revoke}
        self._invites = _Allowance(clock, INVITES_PER_MINUTE, 60.0)
        self._others = _Allowance(clock, REQUESTS_PER_SECOND, 1.0)

    async def answer(self, found: Pass, request: Request) -> Answer:
        """What comes of a request.

        Args:
            found: What the asker's token proves.
            request: What is asked.
        """
        known = self._known.get(request.name)
        if known is None:
            return Answer(request.id, None, UNKNOWN, "there is no such request")
        allowance = self._invites if request.name == INVITE else self._others
        try:
            allowance.take(found.principal)
            return Answer(request.id, await known(found, request.arguments), "", "")
        except Forbidden as error:
            code, reason = DENIED, error.reason
        except (Refused, LocalMisuse) as error:
            code, reason = INVALID, str(error)
        except (Unavailable, CrdtLlmError) as error:
            code, reason = UNAVAILABLE, reason_of(error)
        return Answer(request.id, None, code, shorten(reason, REASON_BYTES_MAX))

    async def _archive(self, found: Pass, given: Mapping[str, Any]) -> dict[str, Any]:
        conversation = _conversation(given)
        archived = _argument(given, "archived", bool)
        if await self._lists.grant(found, conversation) is None:
            raise Forbidden("forbidden", "you have no right in this conversation")
        await self._lists.put_away(found.principal, conversation, archived=archived)
        return {}

    async def _invite(self, found: Pass, given: Mapping[str, Any]) -> dict[str, Any]:
        conversation, role = _conversation(given), _argument(given, "role", str)
        expires_at = _optional(given, "expires_at", int)
        name = _optional(given, "name", str)
        if role not in {Grant.WRITER, Grant.READER}:
            raise Refused(INVALID, "a guest is a writer or a reader")
        if expires_at is not None and not 0 < expires_at <= WHOLE_MAX:
            raise Refused(INVALID, "expires_at is in milliseconds since 1970")
        if name is not None and len(name) > NAME_CHARACTERS_MAX:
            raise Refused(INVALID, f"a name has at most {NAME_CHARACTERS_MAX} characters")
        await self._only_owners(found, conversation)
        token, made = await self._tokens().invite(
            conversation, Grant(role), expires_at, inviter=found.principal, name=name
        )
        return {
            "principal": made.principal,
            "token": token,
            "id": made.id,
            "expires_at": made.expires_at,
        }

    async def _revoke(self, found: Pass, given: Mapping[str, Any]) -> dict[str, Any]:
        token_id, tokens = _argument(given, "id", str), self._tokens()
        if not (found.principal == OWNER and found.conversations is None):
            conversations = tokens.conversations_of(token_id)
            if conversations is None:
                raise Forbidden("forbidden", "only the relay's owner may revoke that")
            for conversation in conversations:
                await self._only_owners(found, conversation)
        await tokens.revoke_aside(token_id)
        return {}

    async def _only_owners(self, found: Pass, conversation: str) -> None:
        if await self._lists.grant(found, conversation) is not Grant.OWNER:
            raise Forbidden("forbidden", "only an owner of the conversation may do that")

    def _tokens(self) -> Authority:
        if self._authority is None:
            raise Refused(INVALID, "this relay issues no tokens")
        return self._authority


def _argument(given: Mapping[str, Any], name: str, kind: type[_Value]) -> _Value:
    value = given.get(name)
    if type(value) is not kind:
        raise Refused(INVALID, f"{name} is missing, or not of its kind")
    return value


def _optional(given: Mapping[str, Any], name: str, kind: type[_Value]) -> _Value | None:
    return None if given.get(name) is None else _argument(given, name, kind)


def _conversation(given: Mapping[str, Any]) -> str:
    conversation = _argument(given, "conversation", str)
    if not is_conversation_id(conversation):
        raise Refused(INVALID, "that is no conversation id")
    return conversation
