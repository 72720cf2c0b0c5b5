"""A chat template as a function from messages to text, in a sandbox.

This module owns how a template is run: which names it sees, what it may not do, and that its clock
is an argument. It must not know what its output means; :mod:`.renderer` learns that.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from crdt_llm.errors import ModelUnusable
from crdt_llm.inference.models.folders import read_chat_template, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from jinja2 import nodes
    from jinja2.parser import Parser

# What code in a sandbox can raise over values that it did not expect.
_TEMPLATE_ERRORS: Final = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class TemplateRefused(Exception):  # noqa: N818 - a template's answer, no error of ours
    """The template does not accept these messages."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant says, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The template of a model folder, with the names that transformers gives it.

    Source: ``render_jinja_template`` in huggingface/transformers ``utils/chat_template_utils.py``.

    Attributes:
        source: the template's text.
        names: the tokens that it may name, e.g. ``bos_token``.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        self.source = source
        self.names = dict(names)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelUnusable(f"the chat template cannot be read: {error}") from error

    @classmethod
    def load(cls, model_dir: Path) -> ChatTemplate:
        """Read the template of a model folder and the names of its tokens.

        Raises:
            ModelUnusable: there is none, or it is not Jinja.
        """
        names: dict[str, str] = {}
        # The first is the older place; where both speak the second is right.
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            if (model_dir / file).is_file():
                for name, token in read_json(model_dir / file).items():
                    text = token.get("content") if isinstance(token, dict) else token
                    if name.endswith("_token") and isinstance(text, str):
                        names[name] = text
        return cls(read_chat_template(model_dir), names)

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool,
        strftime_now: Callable[[str], str],
    ) -> str:
        """Run the template.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: whether to end with the beginning of a reply.
            strftime_now: what the template's clock says, in a format of :func:`time.strftime`.

        Raises:
            TemplateRefused: it raised; the message says what.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=strftime_now,
                **self.names,
            )
        except _TEMPLATE_ERRORS as error:
            raise TemplateRefused(str(error)) from error


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
