"""``crdt-llm inspect``: a conversation as the document has it, entry by entry.

This module owns which facts are shown and how they are laid out. Where the document comes from is
:mod:`crdt_llm.cli.stored` or the client; what holds is :mod:`crdt_llm.cli.verification`. It must
not write to anything.
"""

from __future__ import annotations

import asyncio
import json as json_format
import os
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from crdt_llm.cli.connection import door_to, known
from crdt_llm.cli.printable import one_line
from crdt_llm.cli.stored import complete_id, fresh_client_id, list_stored, load_stored
from crdt_llm.cli.verification import Keys, Report, open_hidden, verify
from crdt_llm.document.conversation import Conversation
from crdt_llm.document.keys import SigningKey, load_or_create_secret
from crdt_llm.document.schema import State, is_conversation_id
from crdt_llm.document.seal import Sealer
from crdt_llm.errors import BadProof, LocalMisuse, StoreFailed, Unavailable
from crdt_llm.sync.client.client import Client

if TYPE_CHECKING:
    from pathlib import Path

    from crdt_llm.cli.folders import DataFolder
    from crdt_llm.document.schema import Entry
    from crdt_llm.document.seal import Hidden

SHORT_ID: Final = 8  # the end of an id: its beginning is the time, alike in neighbours
SHORT_DIGEST: Final = 12  # enough to compare two by eye
TEXT_COLUMNS: Final = 40  # of a row; the whole text is in --json


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked for on the command line."""

    conversation: str | None
    all: bool = False
    verify: bool = False
    hidden: bool = False
    model: str = ""
    json: bool = False


def run_inspect(
    question: Question, *, folder: DataFolder, url: str | None, token_file: Path | None
) -> int:
    """Print a conversation.

    Returns:
        The exit code.

    Raises:
        BadProof: something does not hold (after everything was printed).
        CrdtLlmError: the conversation cannot be had.
    """
    conversation = had(question, folder=folder, url=url, token_file=token_file)
    # Another relay's token means that this folder's keys are of no use there.
    keys = _keys(folder) if url is None or token_file is None else Keys()
    _check_key(question, keys, folder)
    report = _verified(question, conversation, keys) if question.verify else None
    _print(question, conversation, keys, report)
    if report is not None and report.problem is not None:
        raise BadProof(f"entry {report.problem.entry} does not hold: {report.problem.reason}")
    return 0


# -- the document ----------------------------------------------------------------------------------


def had(
    question: Question, *, folder: DataFolder, url: str | None, token_file: Path | None
) -> Conversation:
    """The conversation that was asked for, from the folder's log or from a relay.

    Raises:
        CrdtLlmError: it cannot be had.
    """
    if url is None:
        return load_stored(folder.log, _stored_id(question.conversation, folder))
    return asyncio.run(_ask_relay(question.conversation, url, token_file or folder.token))


def _stored_id(given: str | None, folder: DataFolder) -> str:
    names = [stored.conversation for stored in list_stored(folder.log)]
    if not names:
        raise StoreFailed(
            f"there are no conversations in {folder.log}: name the data folder with --data"
        )
    if given is None:
        return names[0]
    found = complete_id(given, names)
    if found is None:
        raise StoreFailed(f"{folder.log} has no conversation {given}; its last one is {names[0]}")
    return found


async def _ask_relay(given: str | None, url: str, token_file: Path) -> Conversation:
    if given is None or not is_conversation_id(given):
        raise LocalMisuse("with --url, name the conversation by its whole id (22 characters)")
    door = door_to(url, token_file)
    async with Client(url, token=door.token, device="inspect", dial=door.dial) as client:
        conversation = await client.open(given)
        await known(conversation, door)
        state = conversation.document.diff()
    return Conversation(fresh_client_id(), update=state)


# -- keys ------------------------------------------------------------------------------------------


def _secret(path: Path) -> bytes | None:
    return load_or_create_secret(path) if path.exists() else None


def _keys(folder: DataFolder) -> Keys:
    relay, master = _secret(folder.key("relay")), _secret(folder.key("master"))
    return Keys(
        relay=SigningKey(relay).public if relay is not None else None,
        sealer=Sealer(master, os.urandom) if master is not None else None,
    )


def _check_key(question: Question, keys: Keys, folder: DataFolder) -> None:
    if question.hidden and keys.sealer is None:
        raise Unavailable(
            f"--hidden needs the key that hidden fields are sealed with, {folder.key('master')}:"
            " name the server's data folder with --data"
        )


def _with_model(keys: Keys, model: str) -> Keys:
    """The keys and a tokenizer, which costs a second: only where a reply is there to check."""
    from crdt_llm.inference.models.folders import resolve  # noqa: PLC0415 - optional dependencies
    from crdt_llm.inference.prompt.renderer import Renderer  # noqa: PLC0415 - as above
    from crdt_llm.inference.prompt.tokens import Vocabulary  # noqa: PLC0415 - as above

    folder = resolve(model, fetch=False)
    vocabulary = Vocabulary.load(folder)
    return Keys(keys.relay, keys.sealer, vocabulary, Renderer.learn(folder, vocabulary))


# -- facts -----------------------------------------------------------------------------------------


def _paths(question: Question, conversation: Conversation) -> list[tuple[str, ...]]:
    shown = conversation.view()
    if not question.all:
        return [shown]
    return [shown, *(conversation.tree.path(tip) for tip in conversation.tree.tips())]


def _entries(question: Question, conversation: Conversation) -> list[Entry]:
    names = dict.fromkeys(name for path in _paths(question, conversation) for name in path)
    if question.all:  # unplaced ends too, which are on no path
        names |= dict.fromkeys(sorted(conversation.tree.entries))
    return [entry for name in names if (entry := conversation.entry(name)) is not None]


def _verified(question: Question, conversation: Conversation, keys: Keys) -> Report:
    entries = _entries(question, conversation)
    if keys.sealer is not None and any(entry.sealed for entry in entries):
        keys = _with_model(keys, question.model)
    report = Report()
    for path in _paths(question, conversation):
        verify(conversation, path, keys, report)
        if report.problem is not None:
            break
    return report


def _state(entry: Entry) -> str:
    if entry.redacted:
        return "redacted"
    if not entry.is_slot:
        return "-"
    if entry.stop is not None and not entry.ended:
        return "stopping"
    return "requested" if entry.state is None else entry.state.value


def facts_of(conversation: Conversation, entry: Entry) -> dict[str, Any]:
    """Everything visible of an entry, as JSON."""
    usage, born, proof = entry.usage, entry.born, entry.proof
    return {
        "id": entry.id,
        "parent": conversation.tree.up(entry.id) or None,
        "role": born.role.value,
        "author": born.author,
        "device": born.device,
        "at": born.at,
        "fork": born.fork,
        "params": born.params.plain(),
        "state": _state(entry) if entry.is_slot or entry.redacted else None,
        "placed": conversation.tree.is_admitted(entry.id),
        "epoch": entry.place.epoch if entry.place is not None else None,
        "usage": usage.plain() if usage is not None else None,
        "digest": proof.digest.hex() if proof is not None else None,
        "sealed_bytes": sum(map(len, entry.sealed)),
        "text": entry.content,
    }


def hidden_facts(hidden: Hidden) -> dict[str, Any]:
    """A reply's hidden state, as JSON; kinds as runs."""
    return {
        "model": hidden.model,
        "renderer": hidden.renderer,
        "params": hidden.params,
        "kinds": [[kind.value, len(list(run))] for kind, run in groupby(hidden.kinds)],
        "ids": list(hidden.ids),
        "logprobs": list(hidden.logprobs),
    }


def _report_facts(report: Report) -> dict[str, Any]:
    problem = report.problem
    return {
        "holds": problem is None,
        "chain": len(report.chain),
        "tokens": len(report.tokens),
        "texts": len(report.texts),
        "other_model": len(report.other_model),
        "problem": {"entry": problem.entry, "reason": problem.reason} if problem else None,
    }


# -- printing --------------------------------------------------------------------------------------


def _print(
    question: Question, conversation: Conversation, keys: Keys, report: Report | None
) -> None:
    entries = _entries(question, conversation)
    hidden = _opened(conversation, entries, keys) if question.hidden else {}
    if question.json:
        print(json_format.dumps(_document_facts(conversation, entries, hidden, report)))  # noqa: T201 - the terminal
        return
    lines = [_heading(conversation), *_table(conversation, entries, hidden)]
    if report is not None:
        lines += _conclusion(report, keys)
    print("\n".join(lines))  # noqa: T201 - the terminal


def _opened(
    conversation: Conversation, entries: list[Entry], keys: Keys
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if keys.sealer is None or not entry.sealed:
            continue
        try:
            hidden = open_hidden(conversation, entry, keys.sealer)
        except BadProof as error:
            found[entry.id] = {"problem": str(error)}
        else:
            found[entry.id] = hidden_facts(hidden) if hidden is not None else {}
    return found


def document_facts(conversation: Conversation) -> dict[str, Any]:
    """Everything visible of a conversation, every branch of it, as JSON."""
    entries = _entries(Question(conversation.id, all=True), conversation)
    return _document_facts(conversation, entries, {}, None)


def _document_facts(
    conversation: Conversation,
    entries: list[Entry],
    hidden: dict[str, dict[str, Any]],
    report: Report | None,
) -> dict[str, Any]:
    meta, shown = conversation.meta, frozenset(conversation.view())
    facts: dict[str, Any] = {
        "conversation": conversation.id,
        "title": meta.title,
        "owner": meta.birth.owner if meta.birth is not None else None,
        "created_at": meta.created_at,
        "head": meta.head or None,
        "entries_in_all": len(conversation.tree),
        "branches": len(conversation.tree.tips()),
        "entries": [
            facts_of(conversation, entry)
            | {"shown": entry.id in shown}
            | ({"hidden": hidden[entry.id]} if entry.id in hidden else {})
            for entry in entries
        ],
    }
    if report is not None:
        facts["verification"] = _report_facts(report)
    return facts


def _heading(conversation: Conversation) -> str:
    title = one_line(conversation.meta.title, TEXT_COLUMNS)
    named = f" “{title}”" if title else ""
    entries, branches = len(conversation.tree), len(conversation.tree.tips())
    said = f"{entries} entr{'y' if entries == 1 else 'ies'}, {branches} branch"
    return f"{conversation.id}{named}: {said}{'' if branches == 1 else 'es'}"


_COLUMNS: Final = (
    "#", "id", "after", "role", "author", "state", "placed", "tokens", "reused/prefilled",
    "ttft ms", "digest", "text",
)  # fmt: skip


def _cells(conversation: Conversation, number: int, entry: Entry) -> tuple[str, ...]:
    usage, proof = entry.usage, entry.proof
    answered = usage is not None and entry.state is not State.SUPERSEDED
    failure = usage.error_message if usage is not None else None
    return (
        str(number),
        entry.id[-SHORT_ID:],
        conversation.tree.up(entry.id)[-SHORT_ID:] or "-",
        entry.born.role.value,
        one_line(entry.born.author, 12),
        _state(entry),
        "yes" if conversation.tree.is_admitted(entry.id) else "no",
        str(usage.sampled) if usage is not None and answered else "-",
        f"{usage.reused}/{usage.prefilled}" if usage is not None and answered else "-",
        str(usage.ttft_ms) if usage is not None and usage.ttft_ms is not None else "-",
        proof.digest.hex()[:SHORT_DIGEST] if proof is not None else "-",
        one_line(entry.content or (f"({failure})" if failure else ""), TEXT_COLUMNS),
    )


def _table(
    conversation: Conversation, entries: list[Entry], hidden: dict[str, dict[str, Any]]
) -> list[str]:
    rows = [_cells(conversation, number, entry) for number, entry in enumerate(entries, start=1)]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    lines = [_aligned(_COLUMNS, widths)]
    for entry, row in zip(entries, rows, strict=True):
        lines.append(_aligned(row, widths))
        if facts := hidden.get(entry.id):
            lines += _hidden_lines(facts)
    return lines


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    pairs = zip(cells, widths, strict=True)
    return "  ".join(cell.ljust(width) for cell, width in pairs).rstrip()


def _hidden_lines(facts: dict[str, Any]) -> list[str]:
    if "problem" in facts:
        return [f"    sealed: {facts['problem']}"]
    runs = ", ".join(f"{count} {kind}" for kind, count in facts["kinds"])
    params = " ".join(f"{name}={value!r}" for name, value in sorted(facts["params"].items()))
    return [
        f"    sealed: {runs}",
        f"    model: {one_line(facts['model'])}, renderer: {one_line(facts['renderer'])}",
        f"    params: {one_line(params)}",
        f"    ids: {' '.join(map(str, facts['ids']))}",
    ]


def _conclusion(report: Report, keys: Keys) -> list[str]:
    lines = [
        f"chain: {len(report.chain)} entries hold"
        + ("" if keys.relay is not None else " (leases not checked: no relay key here)")
    ]
    if keys.sealer is None:
        lines.append("tokens: not checked, there is no master key here")
    else:
        lines.append(
            f"tokens: {len(report.tokens)} replies hold, the text of {len(report.texts)} follows"
            " from them"
        )
    if report.other_model:
        lines.append(
            f"text: {len(report.other_model)} replies are of another model: name it with --model"
        )
    return lines
