"""What a client may ask of the relay that is no write in a document.

This module owns the names of requests, what they need, and who may ask. It must not know frames'
bytes or sockets. An answer always comes: values, or a code and a reason.

============ ====================================== ===============================================
name         arguments                              answer
============ ====================================== ===============================================
``archive``  ``conversation``, ``archived`` (bool)  nothing; the asker's own list says so
``invite``   ``conversation``, ``role`` (``writer`` ``principal``, ``token``, ``id``. Only an owner
             or ``reader``), ``expires_at`` (ms or   asks. The token opens nothing until an owner
             nil), ``name`` (text or nil)           gives the principal its right in the document
``revoke``   ``id``                                 nothing; only an owner of all conversations
                                                    that the token is for, or the relay's owner
============ ====================================== ===============================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from crdt_llm.document.schema import Grant, is_conversation_id
from crdt_llm.errors import CrdtLlmError, Forbidden, LocalMisuse, Refused, Unavailable
from crdt_llm.sync.access import OWNER
from crdt_llm.sync.frames import NAME_CHARACTERS_MAX, REASON_BYTES_MAX, Answer
from crdt_llm.sync.verdict import shorten

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from crdt_llm.sync.access import Authority, Pass
    from crdt_llm.sync.conversation_list import ConversationLists
    from crdt_llm.sync.frames import Request

UNKNOWN: Final = "unknown"
INVALID: Final = "invalid"
DENIED: Final = "denied"
UNAVAILABLE: Final = "unavailable"

_Value = TypeVar("_Value")


class Requests:
    """Answers requests.

    Args:
        lists: Who may do what where, and what was put away.
        authority: Issues and revokes tokens; ``None`` if there are only those of files.
    """

    def __init__(self, lists: ConversationLists, authority: Authority | None = None) -> None:
        self._lists = lists
        self._authority = authority
        self._known: Mapping[str, Callable[[Pass, Mapping[str, Any]], Awaitable[dict[str, Any]]]]
        self._known = {"archive": self._archive, "invite": self._invite, "revoke": self._revoke}

    async def answer(self, found: Pass, request: Request) -> Answer:
        """What comes of a request.

        Args:
            found: What the asker's token proves.
            request: What is asked.
        """
        known = self._known.get(request.name)
        if known is None:
            return Answer(request.id, None, UNKNOWN, "there is no such request")
        try:
            return Answer(request.id, await known(found, request.arguments), "", "")
        except Forbidden as error:
            code, reason = DENIED, error.reason
        except (Refused, LocalMisuse) as error:
            code, reason = INVALID, str(error)
        except (Unavailable, CrdtLlmError) as error:
            code, reason = UNAVAILABLE, str(error)
        return Answer(request.id, None, code, shorten(reason, REASON_BYTES_MAX))

    async def _archive(self, found: Pass, given: Mapping[str, Any]) -> dict[str, Any]:
        conversation = _conversation(given)
        archived = _argument(given, "archived", bool)
        if await self._lists.grant(found, conversation) is None:
            raise Forbidden("forbidden", "you have no right in this conversation")
        self._lists.put_away(found.principal, conversation, archived=archived)
        return {}

    async def _invite(self, found: Pass, given: Mapping[str, Any]) -> dict[str, Any]:
        conversation, role = _conversation(given), _argument(given, "role", str)
        expires_at = _optional(given, "expires_at", int)
        name = _optional(given, "name", str)
        if role not in {Grant.WRITER, Grant.READER}:
            raise Refused(INVALID, "a guest is a writer or a reader")
        if name is not None and len(name) > NAME_CHARACTERS_MAX:
            raise Refused(INVALID, f"a name has at most {NAME_CHARACTERS_MAX} characters")
        await self._only_owners(found, conversation)
        token, made = self._tokens().invite(conversation, Grant(role), expires_at)
        return {"principal": made.principal, "token": token, "id": made.id}

    async def _revoke(self, found: Pass, given: Mapping[str, Any]) -> dict[str, Any]:
        token_id, tokens = _argument(given, "id", str), self._tokens()
        if not (found.principal == OWNER and found.conversations is None):
            conversations = tokens.conversations_of(token_id)
            if conversations is None:
                raise Forbidden("forbidden", "only the relay's owner may revoke that")
            for conversation in conversations:
                await self._only_owners(found, conversation)
        tokens.revoke(token_id)
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
