"""Every exception this package raises on purpose, as one tree.

The docstring of each class says where blame lies. ``str(error)`` is always one line, for people:
what happened and what to do. Details belong in ``__cause__`` and in the log. An exception by which
one module answers another, and which the other always catches, is none of these and stands there.

* :exc:`CrdtLlmError`

  * :exc:`LocalMisuse` - the calling program is wrong (a bug of the caller)
  * :exc:`RemoteMisuse` - a peer sent what it must not

    * :exc:`MalformedMessage` - bytes that are no message or no update
    * :exc:`Refused` - well-formed, but against a rule; carries a ``code`` and a ``reason``

      * :exc:`AuthenticationFailed` - no or a wrong token
      * :exc:`Forbidden` - known, but not allowed here
      * :exc:`TooLarge` - over a named limit

    * :exc:`Gap` - an update that builds on something we have not seen yet; no offence

  * :exc:`Unavailable` - not now: try again later

    * :exc:`StoreFailed` - a commit did not become durable
    * :exc:`EngineDied` - the engine's process ended
    * :exc:`EngineBusy` - the engine has no room for another request or its KV
    * :exc:`ConnectionLost` - the socket closed
    * :exc:`LeaseLost` - another node may act for the conversation now
    * :exc:`Behind` - the relay waits for a replica that has what it lost
    * :exc:`Stopping` - this process is shutting down

  * :exc:`Corrupt` - bytes on disk are not what was written
  * :exc:`BadProof` - a signature, seal or digest does not hold
  * :exc:`ModelUnusable` - a model, tokenizer or template cannot be used, and why
  * :exc:`PromptTooLong` - the path does not fit the model's positions
  * :exc:`DataFolderBusy` - another process holds the data folder
  * :exc:`ReplyFailed` - the node could not finish a reply; its entry keeps the partial text
"""

from __future__ import annotations


class CrdtLlmError(Exception):
    """The root of the tree: catch this to catch all of them."""


class LocalMisuse(CrdtLlmError):  # noqa: N818 - the tree is named after what happened
    """The calling program used an object in a way it does not allow."""


class RemoteMisuse(CrdtLlmError):  # noqa: N818 - as above
    """A peer sent something it must not send."""


class MalformedMessage(RemoteMisuse):
    """Bytes that are no message of the protocol, or no update."""


class Refused(RemoteMisuse):
    """A write or request that is against a rule. Nothing of it is stored or seen by others.

    Args:
        code: a short stable word for programs, e.g. ``forged-author``.
        reason: one line for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class AuthenticationFailed(Refused):
    """The token is missing or not one we know."""


class Forbidden(Refused):
    """The principal is known, but may not do this here."""


class TooLarge(Refused):
    """Over a named limit."""


class Gap(RemoteMisuse):
    """An update that builds on structs, deletions or entries we have not seen yet."""


class Unavailable(CrdtLlmError):  # noqa: N818 - as above
    """Not now. The same request may succeed later."""


class StoreFailed(Unavailable):
    """A write did not become durable (full disk, I/O error). What was durable before, still is."""


class EngineDied(Unavailable):
    """The engine's process ended; the KV cache is gone and will be rebuilt from the document."""


class EngineBusy(Unavailable):
    """The engine has no room: too many requests, or their KV fills the memory budget."""


class ConnectionLost(Unavailable):
    """The socket closed, or never opened.

    Args:
        message: one line for people.
        code: the websocket close code; 1006 (RFC 6455: abnormal closure) where there was none.
        reason: what the peer said on closing.
    """

    def __init__(self, message: str, *, code: int = 1006, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class LeaseLost(Unavailable):
    """A node's lease is over: what it wrote since is refused, and another node may act now."""


class Behind(Unavailable):
    """The relay lost something that was admitted; it waits for a replica that has it."""


class Stopping(Unavailable):
    """This process is shutting down; what it accepted is durable."""


class Corrupt(CrdtLlmError):  # noqa: N818 - as above
    """Bytes on disk are not what was written. We refuse to guess."""


class BadProof(CrdtLlmError):  # noqa: N818 - as above
    """A signature, a seal or a digest does not hold."""


class ModelUnusable(CrdtLlmError):  # noqa: N818 - as above
    """A model, tokenizer or chat template cannot be used; the message says why and what to do."""


class PromptTooLong(CrdtLlmError):  # noqa: N818 - as above
    """The path has more tokens than the model has positions."""


class DataFolderBusy(CrdtLlmError):  # noqa: N818 - as above
    """Another process holds the data folder."""


class ReplyFailed(CrdtLlmError):  # noqa: N818 - as above
    """The node could not finish a reply. Its entry keeps the text that it got to.

    Args:
        code: a short stable word for programs, from the slot's ``usage.error``.
        reason: one line for people.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
