"""What a chat template writes around contents, learned from the shortest conversations it accepts.

This module owns the taking apart of a template's output into a preamble, an open and a close per
role and a generation prompt, as text. It must not know tokens; :mod:`.renderer` turns the texts
into ids and is the only one that puts them together.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.prompt.template import TemplateRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crdt_llm.inference.prompt.template import ChatTemplate

# Stand in a template's output for a content and for a date. Letters and digits only, so that what
# templates do to contents (trimming, escaping, a new line) leaves them as they are.
_CONTENT: Final = "zq7content{}w"
_CONTENT_PATTERN: Final = re.compile(r"zq7content(\d+)w")
_DATE: Final = "zq7date{}w"
_DATE_PATTERN: Final = re.compile(r"zq7date(\d+)w")

# The last millisecond that a date can have: clocks in a document are whatever somebody wrote.
_AT_MS_MAX: Final = 253_402_300_799_999
# Two dates that differ in every field: what a template does with its clock must hold for both.
_TRIAL_DATES_MS: Final = (946_684_799_000, 1_721_995_230_000)

Surround: TypeAlias = tuple[str, str]
"""What stands before and after a content."""


@dataclass(frozen=True, slots=True)
class Scaffolds:
    """A chat format as text. Dates are marked; :func:`fill_dates` fills them in.

    Attributes:
        preamble: the beginning of a conversation whose root is not ``system``.
        system_root: the beginning and end of a ``system`` entry at the root.
        system: of a later one.
        user: of a user's entry, after the preamble or later.
        tool: of a tool's result.
        generation: what stands before a reply.
        reply_close: what stands after a reply when something follows.
        date_formats: the formats, by the numbers in the marks.
    """

    preamble: str
    system_root: Surround
    system: Surround
    user: Surround
    tool: Surround
    generation: str
    reply_close: str
    date_formats: tuple[str, ...]


def learn(template: ChatTemplate) -> Scaffolds:
    """Take a template's output apart.

    With P the preamble, O and C the open and close of user (u), assistant (a), system (s) and tool
    (t), G the generation prompt and 1, 2, ... the contents, templates write::

        user                             P Ou 1 Cu, and with the generation prompt P Ou 1 Cu G
        user assistant                   P Ou 1 Cu Oa 2 Ca
        user assistant user              P Ou 1 Cu Oa 2 Ca Ou 3 Cu
        system user                      Rs 1 Cs Ou 2 Cu
        user assistant system user       P Ou 1 Cu Oa 2 Ca Os 3 Cs Ou 4 Cu
        user assistant tool              P Ou 1 Cu Oa 2 Ca Ot 3 Ct G

    A role that the template refuses, drops, mixes into another's turn, or takes for the
    assistant's gets the user's scaffold.

    Raises:
        ModelUnusable: there is no user's turn to be learned, or dates are computed with.
    """
    trial = _Trial(template)
    turns = _learn_turns(trial)
    trial.check_dates("user")
    system_root, system = _learn_system(trial, turns)
    return Scaffolds(
        preamble=turns.preamble,
        system_root=system_root,
        system=system,
        user=turns.user,
        tool=_learn_tool(trial, turns),
        generation=turns.generation,
        reply_close=turns.reply_close,
        date_formats=trial.date_formats,
    )


def fill_dates(text: str, formats: Sequence[str], at_ms: int) -> str:
    """Replace the marks of dates by what a clock says at ``at_ms``, milliseconds since 1970."""
    clock = _clock(at_ms)
    return _DATE_PATTERN.sub(lambda mark: clock(formats[int(mark[1])]), text)


def _clock(at_ms: int) -> Callable[[str], str]:
    """A clock that stands still, in UTC so that every machine reads the same."""
    seconds = min(max(at_ms, 0), _AT_MS_MAX) // 1000
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime


class _Trial:
    """A template that is shown conversations of marked contents, with marks for a clock."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._formats: list[str] = []
        self.bos = template.names.get("bos_token", "")
        self.why_refused = ""

    @property
    def date_formats(self) -> tuple[str, ...]:
        return tuple(self._formats)

    def gaps(self, *roles: str, generation: bool = False) -> list[str] | None:
        """What the template writes before, between and after the contents of these roles.

        Returns:
            One text more than there are roles, or None if the template refuses the roles or does
            not write each content once and in order.
        """
        try:
            text = self._render(roles, self._mark, generation=generation)
        except TemplateRefused as refused:
            self.why_refused = f"it refuses {', '.join(roles)}: {refused}"
            return None
        # Every other piece is the number of a mark.
        pieces = _CONTENT_PATTERN.split(text)
        if pieces[1::2] != [str(index) for index in range(len(roles))]:
            self.why_refused = f"it does not write the contents of {', '.join(roles)} as they are"
            return None
        return pieces[::2]

    def check_dates(self, *roles: str) -> None:
        """See that filling in a date later gives what the template would have written then."""
        marked = self._render(roles, self._mark, generation=False)
        for at_ms in _TRIAL_DATES_MS:
            try:
                then = self._render(roles, _clock(at_ms), generation=False)
            except TemplateRefused as refused:
                raise ModelUnusable(f"the chat template cannot be used: {refused}") from refused
            if then != fill_dates(marked, self.date_formats, at_ms):
                raise ModelUnusable(
                    "the chat template cannot be used: it computes with today's date"
                )

    def _mark(self, date_format: str) -> str:
        if date_format not in self._formats:
            self._formats.append(date_format)
        return _DATE.format(self._formats.index(date_format))

    def _render(
        self, roles: Sequence[str], clock: Callable[[str], str], *, generation: bool
    ) -> str:
        messages = [
            {"role": role, "content": _CONTENT.format(index)} for index, role in enumerate(roles)
        ]
        for message in messages:
            if message["role"] == "tool":  # templates ask for these
                message |= {"name": "tool", "tool_call_id": "000000000"}
        return self._template.render(messages, add_generation_prompt=generation, strftime_now=clock)


@dataclass(frozen=True, slots=True)
class _Turns:
    """What the conversation of a user and an assistant shows."""

    preamble: str
    user: Surround
    assistant_open: str
    reply_close: str
    generation: str


def _learn_turns(trial: _Trial) -> _Turns:
    alone = trial.gaps("user")
    asked = alone and trial.gaps("user", generation=True)
    again = asked and trial.gaps("user", "assistant", "user")
    if not alone or not asked or not again:
        raise ModelUnusable(f"the chat template cannot be used: {trial.why_refused}")
    user_close = _common_beginning(alone[1], asked[1], again[1])

    opens = []
    answered = trial.gaps("user", "assistant")
    if answered is not None and again[2].startswith(answered[2]):
        opens.append(again[2].removeprefix(answered[2]))
    if again[0] != trial.bos:
        # A template may close a reply only when something follows. Then the beginning, if it is
        # but a token, tells where the user's scaffold begins.
        opens.append(again[0].removeprefix(trial.bos))
    for user_open in opens if alone[0] == asked[0] == again[0] else []:
        if again[0].endswith(user_open) and again[2].endswith(user_open):
            return _Turns(
                preamble=again[0].removesuffix(user_open),
                user=(user_open, user_close),
                assistant_open=again[1].removeprefix(user_close),
                reply_close=again[2].removesuffix(user_open),
                generation=asked[1].removeprefix(user_close),
            )
    raise ModelUnusable(
        "the chat template cannot be used: what it writes before a user's content varies"
    )


def _learn_system(trial: _Trial, turns: _Turns) -> tuple[Surround, Surround]:
    """What surrounds a system entry at the root, and a later one."""
    user_open, user_close = turns.user
    unknown = ((turns.preamble + user_open, user_close), turns.user)
    first = trial.gaps("system", "user")
    if first is None or not user_open or not first[1].endswith(user_open):
        return unknown
    opening = first[0].removeprefix(trial.bos)
    if opening == turns.assistant_open != user_open:
        return unknown
    trial.check_dates("system", "user")
    close = first[1].removesuffix(user_open)
    late = trial.gaps("user", "assistant", "system", "user")
    if late is not None and late[2].startswith(turns.reply_close) and late[3] == first[1]:
        opening = late[2].removeprefix(turns.reply_close)
    if not opening.strip():  # nothing would tell it from what was said before
        return (first[0], close), turns.user
    return (first[0], close), (opening, close)


def _learn_tool(trial: _Trial, turns: _Turns) -> Surround:
    gaps = trial.gaps("user", "assistant", "tool", generation=True)
    if (
        gaps is None
        or not gaps[2].startswith(turns.reply_close)
        or not gaps[3].endswith(turns.generation)
    ):
        return turns.user
    opening = gaps[2].removeprefix(turns.reply_close)
    if not opening.strip() or opening == turns.assistant_open:
        return turns.user
    return opening, gaps[3].removesuffix(turns.generation)


def _common_beginning(first: str, *others: str) -> str:
    for length, character in enumerate(first):
        if any(other[length : length + 1] != character for other in others):
            return first[:length]
    return first
