"""Render once: every order of roles, the template's own text, and ids that never change."""

from __future__ import annotations

import datetime as dt
import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from chat_folders import FORMATS
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from crdt_llm.errors import LocalMisuse, ModelUnusable
from crdt_llm.inference.prompt.renderer import AUTHOR_ROLES, ParentTail, Renderer
from crdt_llm.inference.prompt.template import ChatTemplate, TemplateRefused
from crdt_llm.inference.prompt.tokens import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.real_model

NAMES = [*FORMATS, "real", "tiny"]
ROLES = ("user", "assistant", "system", "tool")
SEQUENCES = [s for length in range(1, 5) for s in itertools.product(ROLES, repeat=length)]
AT_MS = 1_753_500_000_000
NO_PARENT = ParentTail()


@dataclass(frozen=True, slots=True)
class Model:
    folder: Path
    vocabulary: Vocabulary
    renderer: Renderer
    library: Tokenizer

    @classmethod
    def load(cls, folder: Path) -> Model:
        vocabulary = Vocabulary.load(folder)
        library = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(folder, vocabulary, Renderer.learn(folder, vocabulary), library)

    def segments(
        self, entries: Sequence[tuple[str, str]], *, at_ms: int = AT_MS, end: int | None = None
    ) -> list[tuple[int, ...]]:
        """What each entry of a path adds; replies are made of their text and ``end``."""
        segments: list[tuple[int, ...]] = []
        parent = NO_PARENT
        for index, (role, content) in enumerate(entries):
            if role == "assistant":
                opening = self.renderer.reply_opening(
                    is_root=index == 0, root_at_ms=at_ms, parent=parent, extend=False
                )
                sampled = self.renderer.reply_text(content) + (() if end is None else (end,))
                segments.append(opening + sampled)
                parent = ParentTail(is_reply=True, last_sampled=sampled[-1] if sampled else None)
            else:
                segments.append(
                    self.renderer.segment(
                        role=role,
                        content=content,
                        is_root=index == 0,
                        root_at_ms=at_ms,
                        parent=parent,
                    )
                )
                parent = NO_PARENT
        return segments

    def prompt(self, entries: Sequence[tuple[str, str]], *, end: int | None = None) -> str:
        """The text of a path and of the opening of a reply to it."""
        answered = [*entries, ("assistant", "")]
        ids = itertools.chain.from_iterable(self.segments(answered, end=end))
        return self.vocabulary.spell(list(ids)[: None if end is None else -1])

    def template_text(self, entries: Sequence[tuple[str, str]]) -> str:
        """What the template itself writes for it."""
        clock = dt.datetime.fromtimestamp(AT_MS / 1000, dt.UTC).strftime
        return ChatTemplate.load(self.folder).render(
            [{"role": role, "content": content} for role, content in entries],
            add_generation_prompt=True,
            strftime_now=clock,
        )


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, real_model_dir: Path, tiny_model_dir: Path
) -> dict[str, Model]:
    place = tmp_path_factory.mktemp("prompts")
    folders = {name: chat.build(place / name) for name, chat in FORMATS.items()}
    folders |= {"real": real_model_dir, "tiny": tiny_model_dir}
    return {name: Model.load(folder) for name, folder in folders.items()}


@pytest.fixture(params=NAMES)
def model(models: dict[str, Model], request: pytest.FixtureRequest) -> Model:
    return models[request.param]


# -- every role sequence renders -------------------------------------------------------------------


def test_every_role_sequence_renders_with_its_contents_as_they_are(model: Model) -> None:
    for roles in SEQUENCES:
        entries = [(role, f"  number {index}\n ") for index, role in enumerate(roles)]
        text = model.prompt(entries)
        at = 0
        for _, content in entries:
            at = text.index(content, at) + len(content)


def test_a_path_only_grows(model: Model) -> None:
    for roles in SEQUENCES:
        entries = [(role, f"number {index}") for index, role in enumerate(roles)]
        whole = model.segments(entries)
        for length in range(len(entries)):
            assert model.segments(entries[:length]) == whole[:length]


@given(data=st.data())
def test_a_segment_depends_on_its_entry_and_its_parents_tail_alone(
    models: dict[str, Model], data: st.DataObject
) -> None:
    model = models[data.draw(st.sampled_from(NAMES))]
    entry = st.tuples(st.sampled_from(ROLES), st.text(max_size=12))
    entries = data.draw(st.lists(entry, min_size=2, max_size=6))
    other_root = data.draw(st.lists(entry, min_size=1, max_size=3))
    # The same last two entries after another history: the last adds the same ids.
    one = model.segments(entries)
    other = model.segments([*other_root, *entries[-2:]])
    assert one[-1] == other[-1]


# -- the template's own text -----------------------------------------------------------------------

NORMAL = {
    "real": ["u", "uu", "uau", "su", "suau", "uaua", "us", "usu", "uats", "a", "aa"],
    "tiny": ["u", "uu", "uau", "su", "suau", "uaua", "us", "usu", "uats", "a"],
    "strict": ["u", "uau", "uauau"],
    "trimming": ["u", "uu", "uau", "su", "suau", "usu", "uat"],
    "dated": ["u", "uu", "uau", "su", "suau", "usu", "uat"],
    "no_system": ["u", "uau", "uauau"],
    "thinking": ["u", "uu", "su", "us", "ut", "sut"],  # it rewrites replies, we do not
    "unclosed": ["u", "uau"],
}
LETTERS = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}


@pytest.mark.parametrize(
    ("name", "letters"), [(name, letters) for name in NAMES for letters in NORMAL[name]]
)
def test_the_text_is_the_templates(models: dict[str, Model], name: str, letters: str) -> None:
    model = models[name]
    entries = [(LETTERS[x], f"the {x} says {i}, and") for i, x in enumerate(letters)]
    text = model.prompt(entries)
    if model.vocabulary.spell(model.vocabulary.encode(["a"])) == " a":
        # This tokenizer puts a space before a text that follows a control token.
        text = text.replace("<s> ", "<s>").replace("</s> ", "</s>")
    assert text == model.template_text(entries)


@pytest.mark.parametrize("letters", ["u", "su", "uau", "suau", "uu", "us"])
def test_the_default_models_text_is_what_transformers_writes(
    real_model_dir: Path, models: dict[str, Model], letters: str
) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 - two seconds that one test should cost

    tokenizer = AutoTokenizer.from_pretrained(real_model_dir)
    entries = [(LETTERS[x], f" what {x} says, 2026  12\n") for x in letters]
    messages = [{"role": role, "content": content} for role, content in entries]
    theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert models["real"].prompt(entries) == theirs
    (end,) = models["real"].renderer.end_ids
    assert models["real"].prompt(entries, end=end) == theirs
    if "a" not in letters:  # the ids of a reply are those that were sampled: they may differ
        ids = [*itertools.chain.from_iterable(models["real"].segments(entries))]
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)


PLAIN = st.text("abc the\n 12.<|>", max_size=12).filter(lambda text: "<|" not in text)


@given(
    name=st.sampled_from(["real", "tiny", "strict"]),
    entries=st.lists(st.tuples(st.sampled_from(["user", "system"]), PLAIN), min_size=1, max_size=3),
)
def test_authors_ids_are_those_the_model_was_trained_on(
    models: dict[str, Model], name: str, entries: list[tuple[str, str]]
) -> None:
    """Text between two control tokens is encoded as one, as the library does in a whole prompt."""
    model = models[name]
    if name == "strict":  # all that its template accepts without a reply
        entries = [("user", entries[0][1])]
    ids = itertools.chain.from_iterable(model.segments([*entries, ("assistant", "")]))
    theirs = model.library.encode(model.template_text(entries), add_special_tokens=False)
    assert list(ids) == theirs.ids


# -- replies ---------------------------------------------------------------------------------------


def spelled_child(model: Model, parent: ParentTail) -> str:
    return model.vocabulary.spell(
        model.renderer.segment(
            role="user", content="!", is_root=False, root_at_ms=AT_MS, parent=parent
        )
    )


def test_a_reply_is_closed_by_its_first_child_and_not_twice(models: dict[str, Model]) -> None:
    model = models["real"]
    end = model.vocabulary.encode_control("<|im_end|>")[0]
    other = model.vocabulary.encode_text("x")[0]
    child = "<|im_start|>user\n!<|im_end|>\n"
    assert spelled_child(model, NO_PARENT) == child
    assert spelled_child(model, ParentTail(is_reply=True, last_sampled=end)) == "\n" + child
    for last in (other, None):
        parent = ParentTail(is_reply=True, last_sampled=last)
        assert spelled_child(model, parent) == "<|im_end|>\n" + child


def test_any_end_token_stands_for_the_templates(models: dict[str, Model]) -> None:
    model = models["trimming"]
    ends = {model.vocabulary.spell([i]): i for i in model.renderer.end_ids}
    assert set(ends) == {"<|eot_id|>", "<|end_of_text|>"}  # of the close, and of the config
    texts = {
        spelled_child(model, ParentTail(is_reply=True, last_sampled=end)) for end in ends.values()
    }
    assert texts == {spelled_child(model, NO_PARENT)}


def test_a_space_is_put_before_a_text_only_after_a_control_token(tmp_path: Path) -> None:
    folder = FORMATS["strict"].build(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content + '; ' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}",
        encoding="utf-8",
    )
    model = Model.load(folder)
    (end,) = model.vocabulary.encode_control("</s>")
    (letter,) = model.vocabulary.encode_text("x")
    assert spelled_child(model, NO_PARENT) == "Q: !; "
    assert spelled_child(model, ParentTail(is_reply=True, last_sampled=letter)) == "; Q: !; "
    assert spelled_child(model, ParentTail(is_reply=True, last_sampled=end)) == " ; Q: !; "
    assert model.vocabulary.spell(model.segments([("user", "!")])[0]) == " Q: !; "


def test_a_reply_to_a_reply_closes_it(models: dict[str, Model]) -> None:
    renderer, spell = models["real"].renderer, models["real"].vocabulary.spell
    opening = renderer.reply_opening(
        is_root=False, root_at_ms=AT_MS, parent=ParentTail(is_reply=True), extend=False
    )
    assert spell(opening) == "<|im_end|>\n<|im_start|>assistant\n"


def test_going_on_after_a_cut_reply_injects_nothing(model: Model) -> None:
    for last in (None, 5):
        parent = ParentTail(is_reply=True, last_sampled=last)
        opening = model.renderer.reply_opening(
            is_root=False, root_at_ms=AT_MS, parent=parent, extend=True
        )
        assert opening == ()


def test_there_is_nothing_to_go_on_with_after_an_authors_entry(model: Model) -> None:
    for is_root in (False, True):
        openings = {
            model.renderer.reply_opening(
                is_root=is_root, root_at_ms=AT_MS, parent=NO_PARENT, extend=extend
            )
            for extend in (False, True)
        }
        assert len(openings) == 1


def test_replies_have_no_segment_before_they_are_sampled(model: Model) -> None:
    with pytest.raises(LocalMisuse, match="reply_opening"):
        model.renderer.segment(
            role="assistant", content="", is_root=True, root_at_ms=AT_MS, parent=NO_PARENT
        )


# -- control tokens --------------------------------------------------------------------------------


@given(data=st.data())
def test_no_content_of_any_role_adds_a_control_token(
    models: dict[str, Model], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(NAMES))
    model = models[name]
    added = model.vocabulary.added_ids
    names = st.sampled_from(sorted(model.vocabulary.spell([i]) for i in added))
    evil = st.lists(names | st.text(st.characters(codec=None), max_size=4), max_size=6).map("".join)
    content = data.draw(evil)
    end = data.draw(st.sampled_from([None, 5, *model.renderer.end_ids]))
    parent = data.draw(st.sampled_from([NO_PARENT, ParentTail(is_reply=True, last_sampled=end)]))
    is_root = data.draw(st.booleans())
    for role in AUTHOR_ROLES:
        with_content, without = (
            [
                i
                for i in model.renderer.segment(
                    role=role, content=text, is_root=is_root, root_at_ms=AT_MS, parent=parent
                )
                if i in added
            ]
            for text in (content, "-")
        )
        assert with_content == without
    assert added.isdisjoint(model.renderer.reply_text(content))


# -- the clock -------------------------------------------------------------------------------------


def test_a_date_is_the_roots_birth(models: dict[str, Model]) -> None:
    model = models["dated"]
    for at_ms, date in (
        (0, "01 Jan 1970"),
        (1_709_164_800_000, "29 Feb 2024"),
        (-5, "01 Jan 1970"),
        (2**63, "31 Dec 9999"),
    ):
        for role in ROLES:
            (segment,) = model.segments([(role, "zq7date0w")], at_ms=at_ms)
            text = model.vocabulary.spell(segment)
            assert f"Today: {date}\n" in text
            assert "zq7date0w" in text  # a content that looks like a mark stays as it is
            assert text.count("date0") == 1


def test_without_a_date_the_clock_changes_nothing(models: dict[str, Model]) -> None:
    entries = [("user", "a"), ("assistant", "b"), ("system", "c")]
    for name in set(NAMES) - {"dated"}:
        assert models[name].segments(entries, at_ms=0) == models[name].segments(
            entries, at_ms=10**12
        )


# -- identity --------------------------------------------------------------------------------------


def test_an_id_names_template_tokenizer_and_version(
    models: dict[str, Model], tmp_path: Path
) -> None:
    ids = {model.renderer.id for model in models.values()}
    assert len(ids) == len(models)
    again = Model.load(models["strict"].folder)
    assert again.renderer.id == models["strict"].renderer.id
    changed = FORMATS["strict"].build(tmp_path / "model")
    file = changed / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert Model.load(changed).renderer.id not in ids


def test_end_ids_may_be_listed_or_absent(tmp_path: Path) -> None:
    folder = FORMATS["strict"].build(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (folder / "config.json").write_text("{}")
    close = 2  # </s>
    assert Model.load(folder).renderer.end_ids == {7, 8, close}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "as they are"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "as they are"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "as they are"),
        ("{{ messages[-1].content }}", "as they are"),
        ("{% for m in messages %}{{ loop.length }}: {{ m.content }}\n{% endfor %}", "varies"),
        ("{% for m in messages %}{{ 1 // 0 }}{% endfor %}", "zero"),
        ("{{ messages.nothing.there }}", "nothing"),
        (
            "{{ strftime_now('%d') | int + 1 }}{% for m in messages %}{{ m.content }};{% endfor %}",
            "date",
        ),
        ("{% for", "cannot be read"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_at_load(
    tmp_path: Path, template: str, why: str
) -> None:
    folder = FORMATS["strict"].build(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    vocabulary = Vocabulary.load(folder)
    with pytest.raises(ModelUnusable, match=why) as refusal:
        Renderer.learn(folder, vocabulary)
    assert "\n" not in str(refusal.value)


def test_the_saved_templates_refuse_what_they_are_saved_for(models: dict[str, Model]) -> None:
    for name, letters in (
        ("strict", "uu"),
        ("strict", "su"),
        ("no_system", "su"),
        ("no_system", "uu"),
    ):
        with pytest.raises(TemplateRefused):
            models[name].template_text([(LETTERS[x], x) for x in letters])
    assert "  x" not in models["trimming"].template_text([("user", "  x")])
