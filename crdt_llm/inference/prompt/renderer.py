"""Render once: how an entry of a conversation becomes token ids, once and for ever.

Chat templates are functions of a whole conversation: they refuse orders of roles, trim contents,
rewrite history, and so spoil what a model has already read. This module asks a template only at
load, learns its scaffolds from the shortest conversations that it accepts, and never asks again.
From then on the ids of an entry depend on the entry and on a few frozen facts of its parent. It
must not know documents, engines or sampling.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.errors import LocalMisuse
from crdt_llm.inference.models.folders import read_json
from crdt_llm.inference.prompt.scaffolds import fill_dates, learn
from crdt_llm.inference.prompt.template import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from crdt_llm.inference.prompt.tokens import Part, Vocabulary

RENDERER_VERSION: Final = 1
"""Raised with every change that can change an id."""

REDACTED_TEXT: Final = "[redacted]"
"""What the model reads in place of a redacted entry."""

AUTHOR_ROLES: Final = ("system", "user", "tool")
"""The roles whose entries are written whole; the fourth, ``assistant``, is replies."""


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
    _system_root: _Scaffold
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
        text = learn(template)
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
            _system_root=_Scaffold(*map(parts, text.system_root)),
            _scaffolds={
                role: _Scaffold(*map(parts, surround))
                for role, surround in zip(
                    AUTHOR_ROLES, (text.system, text.user, text.tool), strict=True
                )
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
        if is_root and role == "system":
            scaffold = self._system_root
            before = scaffold.opening
        else:
            scaffold = self._scaffolds[role]
            before = self._before(scaffold.opening, is_root=is_root, parent=parent)
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
        before = self._before(self._generation, is_root=is_root, parent=parent)
        return self._encode(self._dated(before, root_at_ms), is_root=is_root, parent=parent)

    def reply_text(self, content: str) -> tuple[int, ...]:
        """The ids of a reply of which only a text is left: read by another model, or redacted."""
        return tuple(self._vocabulary.encode_text(content))

    def _before(
        self, opening: tuple[Part, ...], *, is_root: bool, parent: ParentTail
    ) -> tuple[Part, ...]:
        before = self._preamble if is_root else self._close_of(parent)
        return (*before, *opening)

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
            fill_dates(part, self._date_formats, at_ms) if isinstance(part, str) else part
            for part in parts
        )


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
