"""A team of threads works alone while it would be held up."""

from __future__ import annotations

from crdt_llm.inference.engine.team import ALONE_STEPS_MAX, ALONE_STEPS_MIN, BAD_STEPS_MIN, Team


def steps_alone(team: Team) -> int:
    """Go on until the whole team works again; what one does alone says nothing of it."""
    count = 0
    while team.threads == 1:
        team.note(wall_s=1.0, cpu_s=1.0)
        count += 1
    return count


def test_an_undisturbed_team_stays_together() -> None:
    team = Team(2)
    for _ in range(100):
        assert team.threads == 2
        team.note(wall_s=1.0, cpu_s=1.4)


def test_a_team_that_is_held_up_leaves_the_work_to_one_for_longer_each_time() -> None:
    team = Team(4)
    for _ in range(BAD_STEPS_MIN - 1):
        team.note(wall_s=1.0, cpu_s=0.3)
    pauses = []
    for _ in range(7):
        assert team.threads == 4
        team.note(wall_s=1.0, cpu_s=0.3)
        pauses.append(steps_alone(team))
    assert pauses == [8, 16, 32, 64, 128, 128, 128]
    assert (pauses[0], pauses[-1]) == (ALONE_STEPS_MIN, ALONE_STEPS_MAX)
    team.note(wall_s=1.0, cpu_s=3.0)
    for _ in range(BAD_STEPS_MIN):
        team.note(wall_s=1.0, cpu_s=0.3)
    assert steps_alone(team) == ALONE_STEPS_MIN


def test_a_team_that_is_held_up_now_and_then_stays_together() -> None:
    team = Team(2)
    for step in range(100):
        team.note(wall_s=1.0, cpu_s=1.4 if step % BAD_STEPS_MIN == 0 else 1.0)
        assert team.threads == 2


def test_one_thread_is_a_team() -> None:
    team = Team(1)
    team.note(wall_s=1.0, cpu_s=0.1)
    assert team.threads == 1
