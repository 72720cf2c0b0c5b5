from __future__ import annotations

from sync.device import CONVERSATION
from sync.native import Native, device, open_frame, update_frame
from sync.rooms import Place, born, turns

from crdt_llm.store.memory import MemoryDisk, MemoryLog
from crdt_llm.sync.relay.hub import Hub
from crdt_llm.sync.relay.metrics import MeasuredLog, Metrics


def value(metrics: Metrics, line: str) -> float:
    """The value of one line of what is shown."""
    found = [one for one in metrics.render().decode().splitlines() if one.startswith(line + " ")]
    return float(found[0].split()[-1]) if found else 0.0


async def test_verdicts_refusals_and_commits_are_counted() -> None:
    place, metrics = Place(), Metrics()
    place.hub = Hub(place.log, metrics=metrics)
    await born(place)
    native = Native(place, metrics=metrics)
    await native.greet()
    await native.send(open_frame())
    await turns()
    replica = device(1)
    replica.hear(native.down())
    update = replica.entitle("On tea")
    await native.send(*[update_frame(n, update) for n in (1, 2)], update_frame(3, b"\1\2\3"))
    await turns()
    updates = 'crdt_llm_updates_total{dialect="native",verdict="%s"}'
    assert value(metrics, updates % "committed") == 1
    assert value(metrics, updates % "known") == 1
    assert value(metrics, updates % "refused") == 1
    assert value(metrics, 'crdt_llm_refusals_total{code="invalid"}') == 1
    assert value(metrics, "crdt_llm_commit_seconds_count") == 2


async def test_a_slow_commit_is_seen() -> None:
    times = iter((1.0, 3.5))
    seen: list[float] = []
    log = MeasuredLog(
        MemoryLog(MemoryDisk("log"), clock=lambda: 0), seen.append, lambda: next(times)
    )
    assert await log.append(CONVERSATION, [b"x"]) == 1
    assert seen == [2.5]
    assert (await log.load(CONVERSATION)).lsn == 1


def test_gauges_go_up_and_down() -> None:
    metrics = Metrics(rooms=lambda: 3)
    metrics.opened("plain")
    metrics.opened("native")
    metrics.closed("native")
    metrics.resynced("plain")
    metrics.received(10)
    metrics.sent(20)
    assert value(metrics, 'crdt_llm_connections{dialect="plain"}') == 1
    assert value(metrics, 'crdt_llm_connections{dialect="native"}') == 0
    assert value(metrics, 'crdt_llm_resyncs_total{dialect="plain"}') == 1
    assert value(metrics, 'crdt_llm_frame_bytes_total{direction="in"}') == 10
    assert value(metrics, 'crdt_llm_frame_bytes_total{direction="out"}') == 20
    assert value(metrics, "crdt_llm_rooms") == 3


def test_somebody_else_s_numbers_are_read_when_they_are_asked_for() -> None:
    metrics, numbers = Metrics(), [1, 2]
    metrics.show("node_sampled_tokens", "Tokens.", lambda: numbers[0], grows=True)
    metrics.show("engine_queue", "Requests that wait.", lambda: numbers[1])
    assert value(metrics, "crdt_llm_node_sampled_tokens_total") == 1
    numbers[:] = [5, 0]
    assert value(metrics, "crdt_llm_node_sampled_tokens_total") == 5
    assert value(metrics, "crdt_llm_engine_queue") == 0
    assert "# TYPE crdt_llm_engine_queue gauge" in metrics.render().decode()


async def test_nothing_in_them_says_who_or_what() -> None:
    place, metrics = Place(), Metrics()
    place.hub = Hub(place.log, metrics=metrics)
    owner, replica = await born(place)
    await owner.membership.submit(replica.say("confidential"))
    native = Native(place, "stranger", metrics=metrics)
    await native.greet()
    await native.send(open_frame())
    await turns()
    native.down()
    shown = metrics.render().decode()
    assert value(metrics, 'crdt_llm_refusals_total{code="4403"}') == 1
    for secret in ("owner", "stranger", CONVERSATION, "confidential"):
        assert secret not in shown
