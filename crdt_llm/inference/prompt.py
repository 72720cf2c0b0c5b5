"""Render once: how an entry of a conversation becomes token ids, once and for ever.

Chat templates are functions of a whole conversation: they refuse orders of roles, trim contents,
rewrite history, and so spoil what a model has already read. This module asks a template only at
load, learns its scaffolds from the shortest conversations that it accepts, and never asks again.
From then on the ids of an entry depend on the entry and on a few frozen facts of its parent. It
must not know documents, engines or sampling.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.errors import LocalMisuse, ModelUnusable
from crdt_llm.inference.models import read_json
from crdt_llm.inference.template import ChatTemplate, TemplateRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from crdt_llm.inference.tokens import Part, Vocabulary

RENDERER_VERSION: Final = 1
"""Raised with every change that can change an id."""

REDACTED_TEXT: Final = "[redacted]"
"""What the model reads in place of a redacted entry."""

AUTHOR_ROLES: Final = ("system", "user", "tool")
"""The roles whose entries are written whole; the fourth, ``assistant``, is replies."""

# Stand in a template's output for a content and for a date. No template, trimming or lower-casing
# aside, changes or contains such words.
_CONTENT: Final = "zq7content{}w"
_CONTENT_PATTERN: Final = re.compile(r"zq7content(\d+)w")
_DATE: Final = "zq7date{}w"
_DATE_PATTERN: Final = re.compile(r"zq7date(\d+)w")

# The last millisecond that a date can have: clocks in a document are whatever somebody wrote.
_AT_MS_MAX: Final = 253_402_300_799_999
# Two dates that differ in every field: what a template does with its clock must hold for both.
_TRIAL_DATES_MS: Final = (946_684_799_000, 1_721_995_230_000)


@dataclass(frozen=True, slots=True)
class ParentTail:
    """What an entry's ids depend on besides the entry: how its parent ended.

    Attributes:
        is_reply: whether the parent is an assistant entry, whose close its first child brings.
        last_sampled: the last id that was sampled in that reply, if any was.
    """

    is_reply: bool = False
    last_sampled: int | None = None


@dataclass(frozen=True, slots=True)
class _Scaffold:
    """What stands before and after a content."""

    opening: tuple[Part, ...]
    close: tuple[Part, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Renderer:
    """The scaffolds of one model's chat format. Make one with :meth:`learn`.

    Pure: equal arguments give equal ids, for ever and in every process with the same :attr:`id`.

    Attributes:
        id: names the rules that made the ids: this code's version, template and tokenizer.
        end_ids: sampling one of these ends a reply.
    """

    id: str
    end_ids: frozenset[int]
    _vocabulary: Vocabulary
    _preamble: tuple[Part, ...]
    _system_root: tuple[Part, ...]
    _scaffolds: Mapping[str, _Scaffold]
    _generation: tuple[Part, ...]
    _reply_close: tuple[Part, ...]
    _date_formats: tuple[str, ...]

    @classmethod
    def learn(cls, model_dir: Path, vocabulary: Vocabulary) -> Renderer:
        """Learn the scaffolds from a model folder's chat template.

        Args:
            model_dir: a folder with config, tokenizer config and template.
            vocabulary: the one of the same folder.

        Raises:
            ModelUnusable: the template cannot be used so; the message says why.
        """
        template = ChatTemplate.load(model_dir)
        text = _learn(template)
        parts = vocabulary.parts
        reply_close = parts(text.reply_close)
        identity = [
            RENDERER_VERSION,
            template.source,
            sorted(template.names.items()),
            vocabulary.digest.hex(),
        ]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        closing = [part for part in reply_close if isinstance(part, int)]
        return cls(
            id=f"render-once-{RENDERER_VERSION}-{digest[:16]}",
            end_ids=_model_end_ids(model_dir) | frozenset(closing[:1]),
            _vocabulary=vocabulary,
            _preamble=parts(text.preamble),
            _system_root=parts(text.system_root),
            _scaffolds={
                role: _Scaffold(parts(opening), parts(close))
                for role, (opening, close) in text.turns.items()
            },
            _generation=parts(text.generation),
            _reply_close=reply_close,
            _date_formats=text.date_formats,
        )

    def segment(
        self, *, role: str, content: str, is_root: bool, root_at_ms: int, parent: ParentTail
    ) -> tuple[int, ...]:
        """The ids of an author's entry, and before them its parent's close if that is a reply.

        Args:
            role: one of :data:`AUTHOR_ROLES`.
            content: what was written, as it was written; no part of it becomes a control token.
            is_root: whether nothing comes before it. Then ``parent`` is not looked at.
            root_at_ms: when the path's root was born, the clock of the template.
            parent: how the entry before it ended.

        Raises:
            LocalMisuse: ``role`` is of another kind.
        """
        if role not in AUTHOR_ROLES:
            raise LocalMisuse(f"{role!r} entries have no content to render; see reply_opening")
        scaffold = self._scaffolds[role]
        before = self._before(scaffold.opening, is_root=is_root, parent=parent, role=role)
        parts = (
            *self._dated(before, root_at_ms),
            content,
            *self._dated(scaffold.close, root_at_ms),
        )
        return self._encode(parts, is_root=is_root, parent=parent)

    def reply_opening(
        self, *, is_root: bool, root_at_ms: int, parent: ParentTail, extend: bool
    ) -> tuple[int, ...]:
        """The ids to inject before a reply is sampled. Its close comes with its first child.

        Args:
            is_root: as in :meth:`segment`.
            root_at_ms: as in :meth:`segment`.
            parent: as in :meth:`segment`.
            extend: whether the reply goes on where its parent, a reply, was cut: nothing is
                injected.
        """
        if extend and parent.is_reply and not is_root:
            return ()
        before = self._before(self._generation, is_root=is_root, parent=parent, role="assistant")
        return self._encode(self._dated(before, root_at_ms), is_root=is_root, parent=parent)

    def reply_text(self, content: str) -> tuple[int, ...]:
        """The ids of a reply of which only a text is left: read by another model, or redacted."""
        return tuple(self._vocabulary.encode_text(content))

    def _before(
        self, opening: tuple[Part, ...], *, is_root: bool, parent: ParentTail, role: str
    ) -> tuple[Part, ...]:
        if is_root:
            return self._system_root if role == "system" else (*self._preamble, *opening)
        return (*self._close_of(parent), *opening)

    def _close_of(self, parent: ParentTail) -> tuple[Part, ...]:
        if not parent.is_reply:
            return ()
        if parent.last_sampled in self.end_ids:
            # The model ended its turn itself, if perhaps with another of its end tokens than the
            # template's.
            for index, part in enumerate(self._reply_close):
                if isinstance(part, int):
                    return self._reply_close[index + 1 :]
        return self._reply_close

    def _encode(
        self, parts: Sequence[Part], *, is_root: bool, parent: ParentTail
    ) -> tuple[int, ...]:
        if is_root:
            after_control = True
        elif parent.is_reply:
            after_control = parent.last_sampled in self._vocabulary.added_ids
        else:  # authors' entries of all roles end alike, with a control token or without
            close = self._scaffolds["user"].close
            after_control = bool(close) and isinstance(close[-1], int)
        return self._vocabulary.encode(parts, after_control=after_control)

    def _dated(self, parts: Sequence[Part], at_ms: int) -> tuple[Part, ...]:
        if not self._date_formats:
            return tuple(parts)
        return tuple(
            _fill_dates(part, self._date_formats, at_ms) if isinstance(part, str) else part
            for part in parts
        )


@dataclass(frozen=True, slots=True)
class _Learned:
    """A template's scaffolds as text, dates marked."""

    preamble: str
    system_root: str
    turns: Mapping[str, tuple[str, str]]
    generation: str
    reply_close: str
    date_formats: tuple[str, ...]


class _Trial:
    """A template that is shown conversations of marked contents, with marks for a clock."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._formats: list[str] = []
        self.why_refused = "it says nothing"

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
            self.why_refused = str(refused)
            return None
        found = _CONTENT_PATTERN.findall(text)
        if found != [str(index) for index in range(len(roles))]:
            self.why_refused = "it does not write every content once and in order"
            return None
        return re.split(_CONTENT_PATTERN.pattern.replace("(", "(?:"), text)

    def check_dates(self, *roles: str) -> None:
        """See that filling in a date later gives what the template would have written then."""
        marked = self._render(roles, self._mark, generation=False)
        for at_ms in _TRIAL_DATES_MS:
            try:
                now = self._render(roles, _clock(at_ms), generation=False)
            except TemplateRefused as refused:
                raise ModelUnusable(f"the chat template cannot be used: {refused}") from refused
            if now != _fill_dates(marked, self.date_formats, at_ms):
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
            # The last two are what templates ask of a tool's message.
            {
                "role": role,
                "content": _CONTENT.format(index),
                **({"name": "tool", "tool_call_id": "000000000"} if role == "tool" else {}),
            }
            for index, role in enumerate(roles)
        ]
        return self._template.render(messages, add_generation_prompt=generation, strftime_now=clock)


def _learn(template: ChatTemplate) -> _Learned:
    """Take a template's output apart.

    With P the preamble, O and C the open and close of user (u), assistant (a), system (s) and tool
    (t), G the generation prompt and 1, 2, ... the contents, the template writes::

        user                      P Ou 1 Cu             with the generation prompt  P Ou 1 Cu G
        user assistant            P Ou 1 Cu Oa 2 Ca
        user assistant user       P Ou 1 Cu Oa 2 Ca Ou 3 Cu
        system user               Rs 1 Cs Ou 2 Cu       Rs: the beginning and Os, without P's
        default text user assistant system user            ...2 Ca Os 3 Cs Ou 4 Cu user assistant
        tool                   ...2 Ca Ot 3 Ct
    """
    trial = _Trial(template)
    alone, asked = trial.gaps("user"), trial.gaps("user", generation=True)
    answered, again = trial.gaps("user", "assistant"), trial.gaps("user", "assistant", "user")
    if alone is None or asked is None or again is None:
        raise ModelUnusable(f"the chat template cannot be used: {trial.why_refused}")

    user_close = _common_beginning(alone[1], asked[1], again[1])
    generation = asked[1].removeprefix(user_close)
    bos = template.names.get("bos_token", "")
    opens = []
    if answered is not None and again[2].startswith(answered[2]):
        opens.append(again[2].removeprefix(answered[2]))
    if again[0] != bos:
        # A template may close a reply only when something follows. Then the beginning, if it is but
        # a token, tells where the user's scaffold begins.
        opens.append(again[0].removeprefix(bos))
    for user_open in opens:
        if again[0].endswith(user_open) and again[2].endswith(user_open):
            break
    else:
        raise ModelUnusable(
            "the chat template cannot be used: it writes the first user's turn unlike the others"
        )
    reply_close = again[2].removesuffix(user_open)
    user = (user_open, user_close)
    preamble = again[0].removesuffix(user_open)
    turns = {"user": user, "system": user, "tool": user}
    system_root = preamble + user_open
    trial.check_dates("user")

    first = trial.gaps("system", "user")
    if first is not None and user_open and first[1].endswith(user_open):
        system_close = first[1].removesuffix(user_open)
        system_root = first[0]
        late = trial.gaps("user", "assistant", "system", "user")
        if late is not None and late[2].startswith(reply_close) and late[3] == first[1]:
            system_open = late[2].removeprefix(reply_close)
        else:
            system_open = system_root.removeprefix(bos)
        turns["system"] = (system_open, system_close)
        trial.check_dates("system", "user")

    result = trial.gaps("user", "assistant", "tool")
    answer = trial.gaps("user", "assistant", "tool", generation=True)
    if (
        result is not None
        and answer is not None
        and result[2].startswith(reply_close)
        and answer[3] == result[3] + generation
    ):
        turns["tool"] = (result[2].removeprefix(reply_close), result[3])

    return _Learned(preamble, system_root, turns, generation, reply_close, trial.date_formats)


def _common_beginning(first: str, *others: str) -> str:
    for length, character in enumerate(first):
        if any(other[length : length + 1] != character for other in others):
            return first[:length]
    return first


def _clock(at_ms: int) -> Callable[[str], str]:
    """A clock that stands still, in UTC so that every machine reads the same."""
    seconds = min(max(at_ms, 0), _AT_MS_MAX) // 1000
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime


def _fill_dates(text: str, formats: Sequence[str], at_ms: int) -> str:
    clock = _clock(at_ms)
    return _DATE_PATTERN.sub(lambda mark: clock(formats[int(mark[1])]), text)


def _model_end_ids(model_dir: Path) -> frozenset[int]:
    """``eos_token_id`` of generation config and config: a number, several, or absent."""
    configs: list[dict[str, Any]] = [
        read_json(model_dir / name)
        for name in ("generation_config.json", "config.json")
        if (model_dir / name).is_file()
    ]
    values = [config.get("eos_token_id") for config in configs]
    listed = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in values)
    return frozenset(value for value in listed if isinstance(value, int))
