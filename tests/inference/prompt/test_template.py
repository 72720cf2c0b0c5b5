"""A template runs as transformers runs it, with its clock as an argument and nothing to break."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from chat_folders import FORMATS

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.prompt.template import ChatTemplate, TemplateRefused

if TYPE_CHECKING:
    from pathlib import Path

MESSAGES = [{"role": "user", "content": "<a> & 'b' \u00fc"}, {"role": "assistant", "content": "c"}]

SOURCES = {
    "blocks": "{% for m in messages %}\n    {% if loop.first %}\n  {{ m.role }}\n    {% endif %}\n"
    "{% endfor %}\n",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}",
    "loop controls": "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}",
    "names": "{{ bos_token }}{{ eos_token }}{{ nothing }}|{{ tools }}|{{ documents }}",
    "methods": "{{ messages[0].content.split(' ') | last | upper }}{{ messages[1:] | length }}",
}


def run(template: ChatTemplate) -> str:
    return template.render(MESSAGES, add_generation_prompt=True, strftime_now=str)


@pytest.mark.parametrize("name", SOURCES)
def test_it_writes_what_transformers_writes(name: str) -> None:
    from transformers.utils.chat_template_utils import (  # noqa: PLC0415 - seconds that few should cost
        render_jinja_template,
    )

    names = {"bos_token": "<s>", "eos_token": "</s>"}
    render: Any = render_jinja_template  # its types are narrower than what it does
    theirs, _ = render(
        conversations=[MESSAGES],
        chat_template=SOURCES[name],
        add_generation_prompt=True,
        **names,
    )
    assert [run(ChatTemplate(SOURCES[name], names))] == theirs


def test_its_clock_is_an_argument() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}", {})
    said = template.render([], add_generation_prompt=False, strftime_now=lambda f: f"<{f}>")
    assert said == "<%Y>"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('not you') }}", "not you"),
        ("{{ messages[0] + 1 }}", "unsupported operand"),
        ("{{ messages[9].role }}", "undefined|no element"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ messages.__class__.__base__ }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_a_template_raises_is_its_refusal(source: str, why: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(TemplateRefused, match=why):
        run(template)


def test_what_is_no_template_is_unusable() -> None:
    with pytest.raises(ModelUnusable, match="cannot be read"):
        ChatTemplate("{% if %}", {})


def test_names_come_from_both_files_and_the_newer_wins(tmp_path: Path) -> None:
    folder = FORMATS["strict"].build(tmp_path / "model")
    older = {"bos_token": "<old>", "unk_token": {"content": "<unk>"}, "extra": "no token"}
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    names = ChatTemplate.load(folder).names
    assert names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
