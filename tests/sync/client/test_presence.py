"""Who else is here, as far as a client believes what it hears."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from crdt_llm.sync.client.presence import DEVICE_CHARACTERS_MAX, DEVICES_MAX, Company, NodePresence
from crdt_llm.sync.wire.y_websocket import AwarenessState

US = 7

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("device", "node", "model", "doing", "warm", "tokens", "queue", "x")),
            inner,
        )
    ),
    max_leaves=12,
)


def says(client: int, clock: int, state: Any) -> AwarenessState:
    return AwarenessState(client, clock, None if state is None else json.dumps(state))


def test_each_announcement_is_newer_than_the_last() -> None:
    company = Company(US, "phone" * 100)
    first, second = company.announcement(), company.announcement()
    assert [one.clock for one in (*first, *second)] == [1, 2]
    state = json.loads(first[0].state_json or "")
    assert state == {"device": ("phone" * 100)[:DEVICE_CHARACTERS_MAX]}


def test_devices_come_change_and_go() -> None:
    company = Company(US, "phone")
    assert company.hear([says(1, 1, {"device": "laptop"}), says(2, 1, {"device": "desk"})])
    assert list(company.devices) == ["desk", "laptop"]
    assert not company.hear([says(1, 2, {"device": "laptop"})])  # said again: nothing new
    assert company.hear([says(1, 3, {"device": "tablet"})])
    assert not company.hear([says(1, 2, {"device": "laptop"})])  # older than what is known
    assert list(company.devices) == ["desk", "tablet"]
    assert company.hear([says(1, 4, None)])
    assert not company.hear([says(1, 5, None)])
    assert list(company.devices) == ["desk"]


def test_our_own_echo_is_nobody() -> None:
    company = Company(US, "phone")
    assert not company.hear(company.announcement())
    assert company.devices == ()


def test_a_node_is_no_device() -> None:
    company = Company(US, "phone")
    said = {"model": "m", "doing": "prefilling", "warm": 10, "tokens": 20, "queue": 0}
    assert company.hear([says(1, 1, {"node": said})])
    assert company.devices == ()
    assert company.node == NodePresence("m", "prefilling", 10, 20, 0)
    assert company.hear([says(1, 2, {"node": said | {"doing": "idle", "warm": "much"}})])
    assert company.node == NodePresence("m", "idle", None, 20, 0)
    assert company.hear([says(1, 3, None)])
    assert company.node is None


def test_a_crowd_is_not_remembered() -> None:
    company = Company(US, "phone")
    company.hear(says(100 + number, 1, {"device": "x"}) for number in range(DEVICES_MAX + 50))
    assert len(company.devices) == DEVICES_MAX
    assert company.hear([says(100, 2, {"device": "renamed"})])  # who is known may go on


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), anything), max_size=8))
def test_whatever_others_say_is_read(said: list[tuple[int, int, Any]]) -> None:
    company = Company(US, "phone")
    for client, clock, state in said:
        before = company.devices, company.node
        assert company.hear([says(client, clock, state)]) == (
            before != (company.devices, company.node)
        )
    assert all(len(name) <= DEVICE_CHARACTERS_MAX for name in company.devices)
    node = company.node
    if node is not None:
        assert all(
            value is None or type(value) is int for value in (node.warm, node.tokens, node.queue)
        )
        assert all(value is None or isinstance(value, str) for value in (node.model, node.doing))
