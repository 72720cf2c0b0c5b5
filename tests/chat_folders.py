"""Model folders of a few kilobytes that have a tokenizer and a template, but no weights.

Owns two tokenizers of the kinds that models come with, byte-level BPE and sentencepiece-style BPE
with byte fallback, each with merges that would make its own control tokens out of text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

TEMPLATES = Path(__file__).parent / "inference" / "prompt" / "templates"

UNKNOWN = "<unk>"
WORDS = ("the", "and", " the", " and", "ing", "er", "in", "th", "  ", "\n\n", "user", "system")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A saved template, and the tokens that its model has for it."""

    template: str
    special: tuple[str, ...]
    ordinary: tuple[str, ...] = ()
    bos: str = "<s>"
    eos: str = "</s>"
    sentencepiece: bool = False
    spaced: bool = False  # a space before every text that follows a control token

    def build(self, folder: Path) -> Path:
        """Write the folder."""
        folder.mkdir(parents=True)
        tokenizer = _sentencepiece(self) if self.sentencepiece else _byte_level(self)
        tokenizer.add_special_tokens(
            [AddedToken(token, normalized=False) for token in self.special]
        )
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.ordinary])
        tokenizer.save(str(folder / "tokenizer.json"))
        end = tokenizer.token_to_id(self.eos)
        for name, value in (
            ("config.json", {"model_type": "llama", "eos_token_id": end}),
            ("generation_config.json", {"eos_token_id": [end]}),
            ("tokenizer_config.json", {"bos_token": self.bos, "eos_token": {"content": self.eos}}),
        ):
            (folder / name).write_text(json.dumps(value), encoding="utf-8")
        source = (TEMPLATES / f"{self.template}.jinja").read_text(encoding="utf-8")
        (folder / "chat_template.jinja").write_text(source.rstrip("\n"), encoding="utf-8")
        return folder


FORMATS = {
    "strict": ChatFormat("strict", ("<unk>", "<s>", "</s>"), sentencepiece=True, spaced=True),
    "trimming": ChatFormat(
        "trimming",
        ("<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        bos="<|begin|>",
        eos="<|end_of_text|>",
    ),
    "dated": ChatFormat(
        "dated",
        ("<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin|>",
        eos="<|eot_id|>",
    ),
    "no_system": ChatFormat(
        "no_system",
        ("<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"),
        ordinary=("<table>", "    "),
        sentencepiece=True,
    ),
    "thinking": ChatFormat(
        "thinking",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ordinary=("<think>", "</think>", "<tool_response>", "</tool_response>", "<fim>", "   "),
        bos="<|endoftext|>",
        eos="<|im_end|>",
    ),
    "unclosed": ChatFormat("unclosed", ("<unk>", "<s>", "</s>"), sentencepiece=True, spaced=True),
}


def _with_words(
    symbols: dict[str, str], vocabulary: dict[str, int], words: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Merges that build each word from the left, one character's symbols at a time."""
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [symbols.get(character, character) for character in word]
        left = pieces[0]
        for right in pieces[1:]:
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
            elif (left, right) not in merges and all(left + right != a + b for a, b in merges):
                merges.append((left, right))
            left += right
    return merges


def _byte_level(chat: ChatFormat) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(chat.special)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(symbol, len(vocabulary))
    symbols = {" ": "\u0120", "\n": "\u010a"}
    merges = _with_words(symbols, vocabulary, (*WORDS, *chat.special))
    # Where a whole word in the vocabulary wins over its merges, as in Llama 3.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(chat: ChatFormat) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(chat.special)}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for code in range(0x21, 0x7F):
        vocabulary.setdefault(chr(code), len(vocabulary))
    vocabulary["\u2581"] = len(vocabulary)
    merges = _with_words(
        {" ": "\u2581"}, vocabulary, (*(w for w in WORDS if "\n" not in w), *chat.special)
    )
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "\u2581")]
    if chat.spaced:
        steps.insert(0, normalizers.Prepend("\u2581"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
