from __future__ import annotations

import pytest

from crdt_llm.sync.wire.loopback import is_loopback


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True),
        ("app.localhost", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("127.0.0.1.example.org", False),
        ("", False),
    ],
)
def test_which_hosts_are_this_machine(host: str, *, here: bool) -> None:
    assert is_loopback(host) is here
