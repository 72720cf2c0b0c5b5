"""What is learned from a template, case by case."""

from __future__ import annotations

import pytest

from crdt_llm.inference.prompt.scaffolds import Scaffolds, fill_dates, learn
from crdt_llm.inference.prompt.template import ChatTemplate

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def of(source: str) -> Scaffolds:
    return learn(ChatTemplate(source, NAMES))


CHATML = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


def test_every_part_of_a_plain_format() -> None:
    assert of("{{ bos_token }}" + CHATML + PROMPT) == Scaffolds(
        preamble="<s>",
        system_root=("<s><|system|>", "<|end|>"),
        system=("<|system|>", "<|end|>"),
        user=("<|user|>", "<|end|>"),
        tool=("<|tool|>", "<|end|>"),
        generation="<|assistant|>",
        reply_close="<|end|>",
        date_formats=(),
    )


def test_a_default_system_text_is_part_of_the_preamble_alone() -> None:
    default = "{% if messages[0].role != 'system' %}{{ '<|system|>Be.<|end|>' }}{% endif %}"
    learned = of("{{ bos_token }}" + default + CHATML + PROMPT)
    assert learned.preamble == "<s><|system|>Be.<|end|>"
    assert learned.system_root == ("<s><|system|>", "<|end|>")
    assert learned.user == ("<|user|>", "<|end|>")


def test_a_template_that_begins_replies_itself_has_no_generation_prompt() -> None:
    learned = of(
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + ' A: ' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    assert learned.user == ("Q: ", " A: ")
    assert learned.generation == ""
    assert learned.reply_close == "</s>"
    # The template takes whoever is not the user for the assistant; we do not.
    assert learned.system == learned.tool == learned.user


def test_a_reply_that_is_closed_only_when_something_follows_has_its_close() -> None:
    learned = of(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% if not (loop.last and m.role == 'assistant') %}{{ '<|end|>' }}{% endif %}{% endfor %}"
        + PROMPT
    )
    assert learned.user == ("<|user|>", "<|end|>")
    assert learned.reply_close == "<|end|>"


def test_a_role_written_as_the_assistants_is_one_the_template_does_not_know() -> None:
    learned = of(
        "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    assert learned.generation == "A: "
    assert learned.system == learned.system_root == learned.tool == learned.user == ("Q: ", "\n")


@pytest.mark.parametrize(
    "late",
    [
        "{{ raise_exception('system comes first') }}",
        "",  # dropped
        "{{ m.content | upper }}",
        "{{ '[' + m.content + ']' }}",  # closed otherwise than at the beginning
    ],
)
def test_a_late_system_entry_is_written_as_a_first_one_if_the_template_has_no_other(
    late: str,
) -> None:
    learned = of(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        + late
        + "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        + PROMPT
    )
    assert learned.system_root == ("<s><|system|>", "<|end|>")
    assert learned.system == ("<|system|>", "<|end|>")


def test_a_late_system_entry_with_a_scaffold_of_its_own_gets_it() -> None:
    learned = of(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and loop.first %}"
        "{{ '<|system|>Today you are told:\n' + m.content + '<|end|>' }}"
        "{% else %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        + PROMPT
    )
    assert learned.system_root == ("<s><|system|>Today you are told:\n", "<|end|>")
    assert learned.system == ("<|system|>", "<|end|>")


def test_a_bare_system_text_keeps_its_place_at_the_root_only() -> None:
    learned = of(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}"
        "{% else %}{{ 'BOT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    assert learned.system_root == ("<s>", "\n\n")
    assert learned.system == learned.user  # later nothing would tell it from what was said before


def test_a_system_text_mixed_into_the_users_turn_is_no_role() -> None:
    learned = of(
        "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'user' %}"
        "{{ '[INST] ' }}{% if loop.index0 == 1 and messages[0].role == 'system' %}"
        "{{ messages[0].content + '\n' }}{% endif %}{{ m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    assert learned.system == learned.user == ("[INST] ", " [/INST]")


def test_dates_are_filled_in_later() -> None:
    learned = of(
        "{{ strftime_now('%d %B') + strftime_now('%Y') + strftime_now('%d %B') }}" + CHATML
    )
    assert learned.date_formats == ("%d %B", "%Y")
    filled = fill_dates(learned.preamble, learned.date_formats, 1_709_164_800_000)
    assert filled == "29 February202429 February"
