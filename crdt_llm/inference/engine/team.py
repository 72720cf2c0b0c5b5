"""How many threads compute: all of them, or one while other processes want the cores.

Owns that decision, from what the last steps took. It knows no torch and no clock. Results do not
depend on it: that is what exactness level 2 says of threads.

A step has hundreds of parallel regions, and each ends when its last thread has. A thread that the
system has put aside for another process holds up all of them for a slice of time, again and again:
measured, with two other processes on two cores, two threads took ten times as long as one. So the
team is sent home when it does no more together than one would do alone.
"""

from __future__ import annotations

from typing import Final

WORTH: Final = 1.15
"""CPU time over wall time of a step, from which on more than one thread is worth having. An
undisturbed step has 1.3 to 1.9 with two."""

BAD_STEPS_MIN: Final = 4
"""So many steps in a row must have been held up. One alone says that some other program had
something to do for a moment, such as to pass on what the step before it found."""

ALONE_STEPS_MIN: Final = 8
ALONE_STEPS_MAX: Final = 128
"""Steps until the whole team has another try. A try in a bad moment costs as much as ten steps, so
the pause doubles each time."""


class Team:
    """Decides from step to step.

    Args:
        most: the threads that there are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._alone = 0
        self._bad = 0
        self._pause = ALONE_STEPS_MIN

    @property
    def threads(self) -> int:
        """Of the next step."""
        return 1 if self._alone else self._most

    def note(self, wall_s: float, cpu_s: float) -> None:
        """Take into account what a step took, by the clock and of all threads together."""
        if self._most == 1:
            return
        if self._alone:
            self._alone -= 1
        elif cpu_s < WORTH * wall_s:
            self._bad += 1
            if self._bad >= BAD_STEPS_MIN:
                self._alone = self._pause
                self._pause = min(2 * self._pause, ALONE_STEPS_MAX)
                # The next try has one step to show that it is worth it.
                self._bad = BAD_STEPS_MIN - 1
        else:
            self._bad = 0
            self._pause = ALONE_STEPS_MIN
