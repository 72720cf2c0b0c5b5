"""The bytes of an id, the ids of a text, and the text of a reply."""

from __future__ import annotations

import itertools
import json
import unicodedata
from typing import TYPE_CHECKING

import pytest
from chat_folders import FORMATS
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from crdt_llm.document.seal import Kind
from crdt_llm.errors import LocalMisuse, ModelUnusable
from crdt_llm.inference.prompt.tokens import TextStream, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

pytestmark = pytest.mark.real_model

SURROGATES = st.text(st.characters(codec=None), max_size=20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, real_model_dir: Path) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("tokens")
    built = {name: chat.build(place / name) for name, chat in FORMATS.items()}
    return built | {"real": real_model_dir}


@pytest.fixture(scope="module")
def vocabularies(folders: dict[str, Path]) -> dict[str, Vocabulary]:
    return {name: Vocabulary.load(folder) for name, folder in folders.items()}


@pytest.fixture(params=[*FORMATS, "real"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vocabulary(vocabularies: dict[str, Vocabulary], name: str) -> Vocabulary:
    return vocabularies[name]


@pytest.fixture
def library(folders: dict[str, Path], name: str) -> Tokenizer:
    return Tokenizer.from_file(str(folders[name] / "tokenizer.json"))


# -- no text can become a control token ------------------------------------------------------------


def disguises(token: str) -> list[str]:
    """A control token's name as somebody would smuggle it in."""
    middle = len(token) // 2
    return [
        token,
        f"a{token}b",
        f" {token} ",
        f"\n{token}\n{token}{token}",
        token[:middle] + token + token[middle:],
        token.upper(),
        unicodedata.normalize("NFD", token),
        "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in token),  # full width
        "\u200b".join(token),
        token[:middle] + "\ud800" + token[middle:],
        token.replace(" ", "\u2581"),
        "".join(f"<0x{byte:02X}>" for byte in token.encode()),
    ]


def test_no_name_of_an_added_token_gives_one(vocabulary: Vocabulary, library: Tokenizer) -> None:
    added = library.get_added_tokens_decoder()
    assert added
    for token in added.values():
        for text in disguises(token.content):
            assert vocabulary.added_ids.isdisjoint(vocabulary.encode_text(text)), text
            parts = vocabulary.encode([text])
            assert vocabulary.added_ids.isdisjoint(parts), text


@pytest.mark.parametrize("trap", FORMATS)
def test_the_trap_is_real(folders: dict[str, Path], trap: str) -> None:
    """The library, even told to split special tokens, lets a text become a control token."""
    library = Tokenizer.from_file(str(folders[trap] / "tokenizer.json"))
    library.encode_special_tokens = True
    added = library.get_added_tokens_decoder()
    reached = {
        i
        for i, token in added.items()
        if i in library.encode(token.content, add_special_tokens=False).ids
    }
    assert reached >= {i for i, token in added.items() if not token.special}
    assert any(added[i].special for i in reached)  # by a merge, or as a word of the vocabulary


@given(data=st.data())
def test_no_mixture_of_names_gives_one(
    vocabularies: dict[str, Vocabulary], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(vocabularies)))
    vocabulary = vocabularies[name]
    names = sorted({vocabulary.spell([i]) for i in vocabulary.added_ids})
    pieces = st.sampled_from(names).flatmap(
        lambda token: (
            st.integers(0, len(token)).map(lambda cut: token[cut:])
            | st.integers(0, len(token)).map(lambda cut: token[:cut])
        )
    )
    text = "".join(data.draw(st.lists(pieces | SURROGATES, max_size=8)))
    assert vocabulary.added_ids.isdisjoint(vocabulary.encode_text(text))


def test_a_scaffold_has_its_control_tokens(vocabulary: Vocabulary, library: Tokenizer) -> None:
    for i, token in library.get_added_tokens_decoder().items():
        assert vocabulary.encode_control(token.content) == [i]
        parts = vocabulary.parts(f"the{token.content}and")
        assert parts == ("the", i, "and")


def test_ids_are_the_librarys_where_no_added_token_is_named(
    vocabulary: Vocabulary, library: Tokenizer
) -> None:
    for text in ("the user  and\n\nthe 2026 \u00fc\U0001f600", "a", "", "  x  12 "):
        ids = library.encode(text, add_special_tokens=False).ids
        if vocabulary.added_ids.isdisjoint(ids):
            assert list(vocabulary.encode([text])) == ids


# -- bytes -----------------------------------------------------------------------------------------


@given(text=SURROGATES)
def test_a_text_comes_back_from_its_ids(vocabularies: dict[str, Vocabulary], text: str) -> None:
    for vocabulary in vocabularies.values():
        ids = vocabulary.encode_text(text)
        back = vocabulary.text_of(ids, [Kind.SAMPLED] * len(ids))
        assert len(back) <= len(text)  # a surrogate pair becomes one character
        if "\ufffd" not in back:
            assert back == text


def test_an_unpaired_surrogate_becomes_a_replacement_character(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode_text("a\ud800b")
    assert vocabulary.spell(ids) == "a\ufffdb"


def test_a_character_without_bytes_in_the_vocabulary_becomes_a_replacement_character(
    vocabularies: dict[str, Vocabulary],
) -> None:
    real = vocabularies["real"]
    # The default model's tokenizer has no symbol for the byte F1, and drops it silently.
    assert real.spell(real.encode_text("a\U00040000b")) == "a\ufffdb"


def test_control_tokens_and_foreign_ids_give_nothing(vocabulary: Vocabulary) -> None:
    for i in [*vocabulary.control_ids, 10**9, -1]:
        assert vocabulary.bytes_of(i) == b""


def test_added_tokens_are_text_unless_special_or_in_the_template(
    vocabularies: dict[str, Vocabulary],
) -> None:
    thinking, gemma = vocabularies["thinking"], vocabularies["no_system"]

    def texts(vocabulary: Vocabulary) -> set[bytes]:
        return {vocabulary.bytes_of(i) for i in vocabulary.added_ids} - {b""}

    assert texts(thinking) == {b"<fim>", b"   "}  # <think> is in the template
    assert texts(gemma) == {b"<table>", b"    "}


def test_the_library_decodes_the_same_bytes(
    vocabularies: dict[str, Vocabulary], folders: dict[str, Path]
) -> None:
    for name in ("real", "thinking"):
        vocabulary = vocabularies[name]
        library = Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
        for i in range(0, library.get_vocab_size(), 7):
            if i not in vocabulary.added_ids:
                said = vocabulary.bytes_of(i).decode(errors="replace")
                assert said == library.decode([i]), i


# -- the text of a reply ---------------------------------------------------------------------------


def expected_text(data: bytes, stop: Sequence[str]) -> str:
    """A second, naive writing of the rule: read on until one is complete."""
    text = data.decode("utf-8", errors="replace")
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stop if s and text[:end].endswith(s)]
        if begins:
            return text[: min(begins)]
    return text


@st.composite
def replies(draw: st.DrawFn) -> tuple[list[bytes], list[str], list[str]]:
    """Tokens as any bytes, half characters and all; their kinds; stop strings likely to occur."""
    alphabet = st.sampled_from(["a", "b", "ab", "ba", "\u00fc", "\U0001f600", "\ufffd", "\n", " "])
    whole = b"".join(text.encode() for text in draw(st.lists(alphabet, max_size=24)))
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    edges = [0, *cuts, len(whole)]
    tokens = [whole[a:b] for a, b in itertools.pairwise(edges)]
    tokens += draw(st.lists(st.binary(max_size=4), max_size=3))
    tokens = draw(st.permutations(tokens)) if draw(st.booleans()) else tokens
    kinds = draw(
        st.lists(
            st.sampled_from([Kind.SAMPLED] * 4 + [Kind.INJECTED, Kind.REASONING]),
            min_size=len(tokens),
            max_size=len(tokens),
        )
    )
    stop = draw(st.lists(st.lists(alphabet, max_size=4).map("".join), max_size=3))
    return list(tokens), [str(kind) for kind in kinds], stop


class Bytes(Vocabulary):
    """A vocabulary whose ids are numbers of given tokens."""

    __slots__ = ()

    @classmethod
    def of(cls, tokens: list[bytes]) -> Bytes:
        return cls(
            added_ids=frozenset(),
            control_ids=frozenset(),
            digest=b"",
            _bytes=dict(enumerate(tokens)),
            _unwritable=frozenset(),
            _content={},
            _scaffolds=NO_TOKENIZER,
            _first=NO_TOKENIZER,
            _next=NO_TOKENIZER,
        )


NO_TOKENIZER = Tokenizer.from_str(
    json.dumps(
        {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    )
)


@settings(max_examples=400)
@given(reply=replies(), cut=st.integers(0, 30))
def test_every_way_to_the_text_gives_the_same_text(
    reply: tuple[list[bytes], list[str], list[str]], cut: int
) -> None:
    tokens, kinds, stop = reply
    vocabulary = Bytes.of(tokens)
    ids = list(range(len(tokens)))
    visible = b"".join(t for t, kind in zip(tokens, kinds, strict=True) if kind == "sampled")

    whole = vocabulary.text_of(ids, kinds, stop)
    assert whole == expected_text(visible, stop)

    stream = TextStream(vocabulary, stop)
    emitted = ""
    at_cut = ""
    deltas: list[str] = []
    for i, kind in zip(ids, kinds, strict=True):
        if i == cut:
            at_cut = emitted
        deltas.append(stream.feed(i, kind))
        emitted += deltas[-1]
        assert whole.startswith(emitted)
    emitted += stream.finish()
    assert emitted == whole
    assert stream.stopped == (whole != visible.decode(errors="replace"))
    assert stream.finish() == ""

    if cut < len(ids):
        resumed, before = TextStream.resume(vocabulary, stop, ids[:cut], kinds[:cut])
        assert before == at_cut
        assert [resumed.feed(i, k) for i, k in zip(ids[cut:], kinds[cut:], strict=True)] == deltas[
            cut:
        ]
        assert before + "".join(deltas[cut:]) + resumed.finish() == whole


def test_a_stream_holds_back_no_more_than_it_must() -> None:
    vocabulary = Bytes.of([b"a", b"END", b"EN", b"\xf0\x9f", b"\x98\x80", b"D"])
    stream = TextStream(vocabulary, ["END"])
    assert [stream.feed(i) for i in (0, 2, 0, 3, 4, 0)] == ["a", "", "ENa", "", "\U0001f600", "a"]
    assert [stream.feed(i) for i in (2, 5)] == ["", ""]
    assert stream.stopped
    assert stream.feed(0) == stream.finish() == ""


def test_the_stop_string_that_is_complete_first_wins() -> None:
    vocabulary = Bytes.of([b"xabcd"])
    assert vocabulary.text_of([0], ["sampled"], ["abcd", "bc"]) == "xa"
    assert vocabulary.text_of([0], ["sampled"], ["bc", "abc"]) == "x"
    assert vocabulary.text_of([0], ["sampled"], [""]) == "xabcd"


def test_a_finished_stream_takes_nothing_more() -> None:
    stream = TextStream(Bytes.of([b"a"]))
    stream.finish()
    with pytest.raises(LocalMisuse, match="finished"):
        stream.feed(0)


# -- what is refused -------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, object]], None]) -> Path:
    file = folder / "tokenizer.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")
    return folder


def wordpiece(value: dict[str, object]) -> None:
    value["model"] = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}
    value["added_tokens"] = []


def no_bytes(value: dict[str, object]) -> None:
    model = value["model"]
    assert isinstance(model, dict)
    model["byte_fallback"] = False


def other_id(value: dict[str, object]) -> None:
    added = value["added_tokens"]
    assert isinstance(added, list)
    added[0]["id"] = 100_000


def no_model(value: dict[str, object]) -> None:
    value["model"] = None


def bad_step(value: dict[str, object]) -> None:
    value["normalizer"] = {"type": "Nonsense"}


@pytest.mark.parametrize("change", [wordpiece, no_bytes, other_id, no_model, bad_step])
def test_an_unusable_tokenizer_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, object]], None]
) -> None:
    folder = rewrite(FORMATS["strict"].build(tmp_path / "model"), change)
    with pytest.raises(ModelUnusable) as refusal:
        Vocabulary.load(folder)
    assert "tokenizer.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_tokens_that_only_the_config_lists_are_added_tokens_too(tmp_path: Path) -> None:
    folder = FORMATS["thinking"].build(tmp_path / "model")
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    config = folder / "tokenizer_config.json"
    value = json.loads(config.read_text(encoding="utf-8"))
    value["added_tokens_decoder"] = {
        "0": {"content": "<|endoftext|>", "special": True},
        str(size): {"content": "<|extra|>", "special": True},
    }
    config.write_text(json.dumps(value), encoding="utf-8")
    vocabulary = Vocabulary.load(folder)
    assert size in vocabulary.control_ids
    assert vocabulary.encode_control("<|extra|>") == [size]
    assert size not in vocabulary.encode_text("<|extra|>")


def test_equal_tokenizers_have_equal_digests(
    vocabularies: dict[str, Vocabulary], folders: dict[str, Path]
) -> None:
    strict = vocabularies["strict"].digest
    assert strict == Vocabulary.load(folders["strict"]).digest
    assert strict == vocabularies["unclosed"].digest  # another template, the same tokenizer
    assert len({vocabulary.digest for vocabulary in vocabularies.values()}) == len(vocabularies) - 1
