"""What may be written at all: texts, roles and parameters, checked before anything is written.

This module owns the limits that a caller runs into. It must not know documents, disks or sockets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypedDict

from crdt_llm.document.schema import (
    PARAMS_STOP_CHARACTERS_MAX,
    PARAMS_STOP_MAX,
    TEXT_BYTES_MAX,
    Params,
    Role,
    read_params,
)
from crdt_llm.errors import LocalMisuse

if TYPE_CHECKING:
    from collections.abc import Iterable

NOTHING_ASKED: Final = Params()
_AUTHORS_ROLES: Final = frozenset({Role.SYSTEM, Role.USER, Role.TOOL})


class Sampling(TypedDict, total=False):
    """What a request for a reply may ask of the sampler; what is left out is up to the node."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: Iterable[str]
    ignore_eos: bool


def checked_text(text: str, what: str, *, characters_max: int | None = None) -> str:
    """``text``, if it can be stored: UTF-8 must be able to write it."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise LocalMisuse(f"{what} holds a lone surrogate, which is no text") from None
    if characters_max is not None and len(text) > characters_max:
        raise LocalMisuse(f"{what} has {len(text)} characters; {characters_max} are the limit")
    if size > TEXT_BYTES_MAX:
        raise LocalMisuse(f"{what} has {size} bytes; {TEXT_BYTES_MAX} are the limit")
    return text


def params_of(asked: Sampling, before: Params = NOTHING_ASKED) -> Params:
    """Checked parameters: what was asked for, else what an earlier slot had."""
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if "stop" in given:
        if isinstance(given["stop"], str):
            given["stop"] = (given["stop"],)
        given["stop"] = tuple(checked_text(text, "a stop string") for text in given["stop"])
        if len(given["stop"]) > PARAMS_STOP_MAX:
            raise LocalMisuse(f"at most {PARAMS_STOP_MAX} stop strings, not {len(given['stop'])}")
        if not all(0 < len(text) <= PARAMS_STOP_CHARACTERS_MAX for text in given["stop"]):
            raise LocalMisuse(f"a stop string has 1 to {PARAMS_STOP_CHARACTERS_MAX} characters")
    try:
        params = replace(before, **given)
    except TypeError:
        raise LocalMisuse(f"unknown parameters: {', '.join(sorted(given))}") from None
    # Every replica reads them so; what would count as absent there is a mistake here.
    read = read_params(params.plain())
    wrong = [name for name in given if getattr(read, name) != getattr(params, name)]
    if wrong:
        raise LocalMisuse(f"{wrong[0]}={given[wrong[0]]!r} is out of range")
    return params


def author_role(role: str) -> Role:
    """The role of an entry of ours.

    Raises:
        LocalMisuse: the model's words are not ours to write.
    """
    if role not in _AUTHORS_ROLES:
        raise LocalMisuse(f"an entry of ours is user, system or tool, not {role!r}")
    return Role(role)
