from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.cli.commands import COMMANDS, Do, Say, help_lines, parse, usage
from crdt_llm.errors import LocalMisuse


@pytest.mark.parametrize(
    ("line", "wish"),
    [
        ("", None),
        ("  \n ", None),
        ("hello there", Say("hello there")),
        ("two\nlines ", Say("two\nlines")),
        ("//etc/hosts", Say("/etc/hosts")),
        ("/quit", Do("quit")),
        (" /stop ", Do("stop")),
        ("/edit 3 a new  text\nwith lines", Do("edit", ("3", "a new  text\nwith lines"))),
        ("/edit last x", Do("edit", ("last", "x"))),
        ("/branches", Do("branches")),
        ("/branches 2", Do("branches", ("2",))),
        ("/title Rivers of Europe", Do("title", ("Rivers of Europe",))),
        ("/open AbC", Do("open", ("AbC",))),
    ],
)
def test_a_line_asks_for_one_thing(line: str, wish: Say | Do | None) -> None:
    assert parse(line) == wish


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nonsense", "/help"),
        ("/", "/help"),
        ("/etc/hosts", "//etc/hosts"),
        ("/stop now", "/stop"),
        ("/edit", "/edit N|last TEXT"),
        ("/edit 3", "/edit N|last TEXT"),
        ("/title", "/title TEXT"),
    ],
)
def test_a_mistake_says_how_it_is_written(line: str, says: str) -> None:
    with pytest.raises(LocalMisuse) as error:
        parse(line)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_help_has_every_command() -> None:
    lines = help_lines()
    assert len(lines) == len(COMMANDS)
    assert all(any(line.strip().startswith(usage(name)) for line in lines) for name in COMMANDS)


@given(st.text())
def test_any_line_is_a_wish_or_a_mistake(line: str) -> None:
    try:
        wish = parse(line)
    except LocalMisuse:
        assert line.strip().startswith("/")
    else:
        assert (wish is None) == (not line.strip())
