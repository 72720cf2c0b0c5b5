"""Between text and token ids: the bytes of an id, the ids of a text, and the text of a reply.

This module owns the reading of ``tokenizer.json`` and the two rules that everything else rests on:
no text can become a control token, and the text of a reply is one function of its ids, streamed or
not. It must not know roles, templates' scaffolds or models' weights, and it loads neither torch nor
transformers.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from tokenizers import Tokenizer

from crdt_llm.document.seal import Kind
from crdt_llm.errors import LocalMisuse, ModelUnusable
from crdt_llm.inference.models.folders import read_chat_template, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

Part: TypeAlias = int | str
"""A piece of a prompt: a control token, or text that is free to be encoded."""

_REPLACEMENT: Final = "\ufffd"
_SPACE_MARK: Final = "\u2581"  # sentencepiece writes a space so
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")


def _gpt2_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, inverted.

    Source: ``bytes_to_unicode`` in openai/gpt-2 ``src/encoder.py``.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF: Final = _gpt2_alphabet()


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The tokenizer of one model, as two encoders and a table of bytes.

    Make one with :meth:`load`. It is never changed afterwards and may be shared between threads.

    Attributes:
        added_ids: every added token, special or not. No text can produce one of them.
        control_ids: the added tokens that give no text when they are sampled. An added token is
            ordinary text only if it is not special and the chat template does not use it: runs of
            spaces, HTML tags, and marks like ``<think>`` in models whose template never mentions
            them.
        digest: SHA-256 of what the ids depend on; equal digests, equal ids.
    """

    added_ids: frozenset[int]
    control_ids: frozenset[int]
    digest: bytes
    _bytes: Mapping[int, bytes]
    _unwritable: frozenset[int]
    _content: Mapping[int, str]
    _scaffolds: Tokenizer
    _first: Tokenizer  # of a text after a control token
    _next: Tokenizer  # of a text after a text

    @classmethod
    def load(cls, model_dir: Path) -> Vocabulary:
        """Read ``tokenizer.json``: byte-level BPE, or sentencepiece-style BPE with byte fallback.

        Raises:
            ModelUnusable: files are missing or damaged, the tokenizer is of another kind, or text
                could become a control token.
        """
        file = model_dir / "tokenizer.json"
        full = read_json(file)
        template = read_chat_template(model_dir)
        try:
            full["added_tokens"] = _added_tokens(full, model_dir)
            # Both would make the ids of a text depend on chance or on its length.
            full["truncation"] = full["padding"] = None
            full["model"]["dropout"] = None
            bare = _without_added_tokens(full)
            _add_no_space(bare, by_position_only=True)
            bare_next = copy.deepcopy(bare)
            _add_no_space(bare_next, by_position_only=False)
            is_byte_level = _is_byte_level(full, file)
            added = {int(token["id"]): token for token in full["added_tokens"]}
            content = {i: token for token, i in full["model"]["vocab"].items()}
            content |= {i: str(token["content"]) for i, token in added.items()}
            control = frozenset(i for i, token in added.items() if _is_control(token, template))
            scaffolds, first, following = (
                Tokenizer.from_str(json.dumps(one)) for one in (full, bare, bare_next)
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelUnusable(f"{file} is damaged; fetch the model again ({error})") from error
        except Exception as error:
            # The tokenizers library raises bare Exception for JSON it cannot use.
            if type(error) is not Exception:
                raise
            raise ModelUnusable(f"{file} cannot be used: {error}") from error
        # So by construction; but a library that reads the file otherwise must not get past this.
        for token_id, token in added.items():
            if scaffolds.token_to_id(token["content"]) != token_id:
                raise ModelUnusable(f"{file}: {token['content']!r} is not the token {token_id}")
        if reachable := added.keys() & {
            *first.get_vocab().values(),
            *following.get_vocab().values(),
        }:
            names = ", ".join(sorted(content[i] for i in reachable))
            raise ModelUnusable(f"{file}: text could become the control tokens {names}")

        spell = _byte_level_bytes if is_byte_level else _sentencepiece_bytes
        token_bytes = {
            i: token.encode() if is_byte_level and i in added else spell(token)
            for i, token in content.items()
        }
        single = {token_bytes[i] for i in bare["model"]["vocab"].values()}
        return cls(
            added_ids=frozenset(added),
            control_ids=control,
            digest=hashlib.sha256(
                json.dumps([full, sorted(control)], sort_keys=True).encode()
            ).digest(),
            _bytes=token_bytes | dict.fromkeys(control, b""),
            _unwritable=frozenset(byte for byte in range(0x100) if bytes((byte,)) not in single),
            _content=content,
            _scaffolds=scaffolds,
            _first=first,
            _next=following,
        )

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes, possibly half a character, that an id stands for.

        Control tokens give nothing, and so do the ids by which a model's head is larger than its
        tokenizer.
        """
        return self._bytes.get(token_id, b"")

    def spell(self, ids: Iterable[int]) -> str:
        """Write ids out for people, control tokens by their names. Never to be encoded again."""
        return b"".join(
            self._content[i].encode() if i in self.added_ids else self._bytes.get(i, b"")
            for i in ids
        ).decode(errors="replace")

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text by a tokenizer that has no added tokens: whatever it says, it is text.

        Total: lone surrogates, and characters whose bytes the vocabulary cannot write, become
        U+FFFD. No space is put before the text.
        """
        return self._encode_text(text, self._next)

    def encode_control(self, text: str) -> list[int]:
        """Ids of a scaffold: names of control tokens stand for them. Never for what users wrote."""
        return list(self.encode(self.parts(text)))

    def parts(self, scaffold: str) -> tuple[Part, ...]:
        """Divide a scaffold into control tokens and the text between them.

        A tokenizer encodes the text between two added tokens as one, so ids come out as the model
        was trained on them when such texts are joined with content before they are encoded.
        """
        encoding = self._scaffolds.encode(scaffold, add_special_tokens=False)
        parts: list[Part] = []
        done = 0
        for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.added_ids:
                parts += [scaffold[done:begin], token_id]
                done = end
        parts.append(scaffold[done:])
        return tuple(part for part in parts if part != "")

    def encode(self, parts: Iterable[Part], *, after_control: bool = True) -> tuple[int, ...]:
        """Ids of a sequence of parts; neighbouring texts are encoded as one.

        Args:
            parts: control tokens and texts in order.
            after_control: whether a control token, or nothing at all, comes before the first part.
                Some tokenizers put a space before a text there, and nowhere else.
        """
        ids: list[int] = []
        text: list[str] = []
        encoder = self._first if after_control else self._next
        for part in parts:
            if isinstance(part, str):
                text.append(part)
                continue
            ids += self._encode_text("".join(text), encoder)
            text.clear()
            ids.append(part)
            encoder = self._first
        ids += self._encode_text("".join(text), encoder)
        return tuple(ids)

    def text_of(self, ids: Sequence[int], kinds: Sequence[str], stop: Sequence[str] = ()) -> str:
        """The visible text of a reply: one function of its ids, however they were cut into pieces.

        UTF-8, errors replaced, of the bytes of the ``sampled`` ids, ended before the stop string
        that is complete first (the longest one, if several are). Empty stop strings never match.

        Args:
            ids: the reply's ids in order.
            kinds: a :class:`~crdt_llm.document.seal.Kind` for each.
            stop: the stop strings.
        """
        text = b"".join(
            self.bytes_of(i) for i, kind in zip(ids, kinds, strict=True) if kind == Kind.SAMPLED
        ).decode(errors="replace")
        return text[:cut] if (cut := _first_stop(text, stop)) is not None else text

    def _encode_text(self, text: str, encoder: Tokenizer) -> list[int]:
        if not text:
            return []
        ids: list[int] = encoder.encode(self._writable(text), add_special_tokens=False).ids
        return ids

    def _writable(self, text: str) -> str:
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            encoded = text.encode()
        if self._unwritable.isdisjoint(encoded):
            return text
        return "".join(
            character if self._unwritable.isdisjoint(character.encode()) else _REPLACEMENT
            for character in text
        )


class TextStream:
    """:meth:`Vocabulary.text_of`, one id at a time.

    Holds back an incomplete character and what may be the beginning of a stop string, so that
    everything emitted is a prefix of the final text. What is held is shorter than the longest stop
    string.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()) -> None:
        self._vocabulary = vocabulary
        self._stop = tuple(string for string in stop if string)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._stopped = False
        self._finished = False

    @classmethod
    def resume(
        cls, vocabulary: Vocabulary, stop: Sequence[str], ids: Sequence[int], kinds: Sequence[str]
    ) -> tuple[TextStream, str]:
        """Rebuild a stream that was fed ``ids``; it goes on exactly as the first one would have.

        Returns:
            The stream and the text that had been emitted.
        """
        stream = cls(vocabulary, stop)
        emitted = [stream.feed(i, kind) for i, kind in zip(ids, kinds, strict=True)]
        return stream, "".join(emitted)

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete: nothing more will be emitted."""
        return self._stopped

    def feed(self, token_id: int, kind: str = Kind.SAMPLED) -> str:
        """Take the next id; give the text that is certain now and was not before."""
        if self._finished:
            raise LocalMisuse("the stream is finished; make another")
        if self._stopped or kind != Kind.SAMPLED:
            return ""
        return self._emit(self._decoder.decode(self._vocabulary.bytes_of(token_id)), final=False)

    def finish(self) -> str:
        """No more ids come: give what was held back. A second call gives nothing."""
        if self._finished or self._stopped:
            self._finished = True
            return ""
        self._finished = True
        return self._emit(self._decoder.decode(b"", final=True), final=True)

    def _emit(self, fresh: str, *, final: bool) -> str:
        if not self._stop:
            return fresh
        # Invariant: `_held` is the longest end of the text so far with which a stop string begins,
        # so a stop string that becomes complete lies within `_held + fresh`.
        text = self._held + fresh
        cut = _first_stop(text, self._stop)
        if cut is not None:
            self._stopped, self._held = True, ""
            return text[:cut]
        certain = len(text) if final else _possible_stop(text, self._stop)
        self._held = text[certain:]
        return text[:certain]


def _first_stop(text: str, stop: Iterable[str]) -> int | None:
    """Where the stop string that is complete first begins; of several, the longest."""
    found = [(at + len(string), at) for string in stop if string and (at := text.find(string)) >= 0]
    return min(found)[1] if found else None


def _possible_stop(text: str, stop: Iterable[str]) -> int:
    """Where the longest end of ``text`` begins that is a proper beginning of a stop string."""
    longest = max((len(string) for string in stop), default=0)
    for begin in range(max(0, len(text) - longest + 1), len(text)):
        end = text[begin:]
        if any(string.startswith(end) for string in stop):
            return begin
    return len(text)


def _added_tokens(full: Mapping[str, Any], model_dir: Path) -> list[dict[str, Any]]:
    """The added tokens of ``tokenizer.json``, and what ``tokenizer_config.json`` alone lists."""
    added: list[dict[str, Any]] = [dict(token) for token in full["added_tokens"]]
    known = {token["id"] for token in added}
    config = model_dir / "tokenizer_config.json"
    listed = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    for token_id, token in listed.items():
        if int(token_id) not in known:
            flags = {
                name: bool(token.get(name, False))
                for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            added.append({"id": int(token_id), "content": token["content"], **flags})
    return sorted(added, key=lambda token: int(token["id"]))


def _is_control(token: Mapping[str, Any], template: str) -> bool:
    content = str(token["content"])
    # White space is in every template and a control token in none.
    return bool(token["special"]) or (content.strip() != "" and content in template)


def _without_added_tokens(full: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``tokenizer.json`` whose model cannot give the id of an added token.

    Many tokenizers list their control tokens in the model's vocabulary too, where a merge,
    ``unk_token`` or ``ignore_merges`` could still produce them. So they leave the vocabulary, and
    every merge with them.
    """
    bare = copy.deepcopy(dict(full))
    contents = {token["content"] for token in full["added_tokens"]}
    model = bare["model"]
    bare["added_tokens"] = []
    bare["post_processor"] = None
    model["unk_token"] = None
    model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in contents}
    model["merges"] = [
        merge for merge in model["merges"] if contents.isdisjoint(_merge_tokens(merge))
    ]
    return bare


def _merge_tokens(merge: str | Sequence[str]) -> tuple[str, str, str]:
    """Both sides of a merge and its product; older files write a merge as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def _add_no_space(bare: dict[str, Any], *, by_position_only: bool) -> None:
    """Make a tokenizer put no space before a text.

    ``prepend_scheme: first`` goes by the place in the whole prompt, which a segment does not know:
    it goes in any case. The others put a space before every text that follows a control token.
    """
    for step in _steps(bare.get("pre_tokenizer")):
        if step["type"] == "Metaspace" and (
            not by_position_only or step.get("prepend_scheme") == "first"
        ):
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)  # the older name of the same
        elif step["type"] == "ByteLevel" and not by_position_only:
            step["add_prefix_space"] = False
    if not by_position_only:
        for step in _steps(bare.get("normalizer")):
            if step["type"] == "Prepend":
                step["prepend"] = ""


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, in a sequence or alone."""
    if part is None:
        return []
    for several in ("pretokenizers", "normalizers", "decoders"):
        if several in part:
            return [step for one in part[several] for step in _steps(one)]
    return [part]


def _is_byte_level(full: Mapping[str, Any], file: Path) -> bool:
    """Tell byte-level BPE from sentencepiece-style BPE with byte fallback; refuse all else."""
    model = full["model"]
    kind = model.get("type")
    if (
        kind == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
    ):
        if any(
            step["type"] == "ByteLevel"
            for part in ("pre_tokenizer", "decoder")
            for step in _steps(full.get(part))
        ):
            return True
        if model.get("byte_fallback") and all(f"<0x{b:02X}>" in model["vocab"] for b in range(256)):
            return False
    raise ModelUnusable(
        f"{file} is a {kind} tokenizer; only BPE over bytes or with byte fallback can be used"
    )


def _byte_level_bytes(token: str) -> bytes:
    # The library's decoder too takes a token as plain text if a character stands for no byte.
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes((int(byte[1], 16),))
    return token.replace(_SPACE_MARK, " ").encode()
