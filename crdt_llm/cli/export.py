"""``crdt-llm export``: a conversation as a file, to keep, to read, or to bring back.

This module owns the formats. ``document`` is the whole document as one Yjs v1 update, hidden fields
included: what any replica can merge and ``crdt-llm import`` brings back. ``json`` and ``markdown``
are for programs and people; they cannot be brought back. It must not write to a conversation.
"""

from __future__ import annotations

import json as json_format
import os
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from crdt_llm.cli.inspect import Question, document_facts, had
from crdt_llm.cli.printable import one_line
from crdt_llm.errors import LocalMisuse, StoreFailed

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.cli.folders import DataFolder
    from crdt_llm.document.conversation import Conversation

_PRIVATE: Final = 0o600  # a conversation is as private outside of the data folder as in it
REDACTED: Final = "*(withdrawn)*"


class Format(StrEnum):
    """How a conversation is written to a file."""

    DOCUMENT = "document"
    JSON = "json"
    MARKDOWN = "markdown"


def run_export(  # noqa: PLR0913 - the options of a command
    conversation: str | None,
    *,
    folder: DataFolder,
    url: str | None,
    token_file: Path | None,
    form: Format,
    output: Path | None,
) -> None:
    """Write a conversation to a file or to standard output.

    Raises:
        LocalMisuse: bytes for a terminal.
        StoreFailed: the file cannot be written; nothing is left of it.
        CrdtLlmError: the conversation cannot be had.
    """
    if form is Format.DOCUMENT and output is None and sys.stdout.isatty():
        raise LocalMisuse("a document is bytes: name a file with --output, or use --format json")
    question = Question(conversation=conversation, all=True)
    found = had(question, folder=folder, url=url, token_file=token_file)
    content = _written(found, form)
    if output is None:
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
    else:
        _save(output.expanduser(), content)


def _written(conversation: Conversation, form: Format) -> bytes:
    match form:
        case Format.DOCUMENT:
            return conversation.diff()
        case Format.JSON:
            facts = document_facts(conversation)
            return (json_format.dumps(facts, ensure_ascii=False, indent=2) + "\n").encode()
        case Format.MARKDOWN:
            return markdown(conversation).encode()


def markdown(conversation: Conversation) -> str:
    """The shown branch for people: a heading an entry, then its text as it is."""
    title = one_line(conversation.meta.title) or "Conversation"
    parts = [f"# {title}\n"]
    for name in conversation.view():
        entry = conversation.entry(name)
        if entry is None:
            continue
        born = entry.born
        who = one_line(" · ".join(part for part in (born.author, born.device) if part))
        parts += [
            f"## {born.role.value}" + (f" ({who})" if who and not entry.is_slot else "") + "\n",
            (REDACTED if entry.redacted else entry.content) + "\n",
        ]
    return "\n".join(parts)


def _save(path: Path, content: bytes) -> None:
    """Whole or not at all, and for its owner only."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreFailed(f"{path} cannot be written ({error.strerror})") from error
