"""What a person sees while the study runs: which notebook, which cell, how far, and how long it will take."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

__all__ = ["BUDGET_SECONDS", "Overview", "Plan", "in_words", "seconds_left"]

#: Seconds each notebook may take at ``laptop`` on two cores: what is expected before a run has been measured.
BUDGET_SECONDS = {
    "01": 60, "02": 420, "03": 660, "04": 180, "05": 660, "06": 360, "07": 120, "08": 210, "09": 30,
}


@dataclass(frozen=True)
class Plan:
    """One notebook of a run.

    Attributes:
        name: ``03_kd_alpha_comparison``.
        reason: why it runs, or ``None`` when its results still hold.
        expected: seconds expected of each cell it executes.
        measured: whether these come from an earlier run, or are a budget that only fixes proportions.
    """

    name: str
    reason: str | None
    expected: Sequence[float]
    measured: bool

    @property
    def seconds(self) -> float:
        """Seconds expected of the whole notebook."""
        return float(sum(self.expected))


def in_words(seconds: float) -> str:
    """A duration for people.

    Example:
        >>> in_words(8), in_words(95), in_words(4000)
        ('8 s', '1 min 35 s', '1 h 7 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def seconds_left(spent: float, done: float, remaining: float, measured: bool) -> float | None:
    """Estimate of the seconds left, or ``None`` while nothing is known.

    Args:
        spent: seconds that passed so far.
        done: expected seconds of the cells that are finished.
        remaining: expected seconds of the cells to come.
        measured: whether the expectations are times of an earlier run; a budget is scaled by the pace so far.
    """
    if measured:
        return remaining
    return remaining * spent / done if done > 0 and spent > 0 else None


class Overview:
    """Shows how far a run is: one line that is rewritten on a terminal, one line per event elsewhere."""

    def __init__(
        self, plans: Sequence[Plan], stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plans = plans
        self._stream = stream
        self._clock = clock
        self._live = stream.isatty()
        self._started = clock()
        self._done = 0.0
        self._current: Plan | None = None
        self._cell = 0
        self._cell_started = self._started
        self._lock = threading.Lock()
        self._over = threading.Event()
        if self._live:
            threading.Thread(target=self._tick, daemon=True).start()

    def begin(self, plan: Plan) -> None:
        """A notebook starts."""
        with self._lock:
            self._current, self._cell = plan, 0
            self._notebook_started = self._cell_started = self._clock()
        if not self._live:
            self._say(f"{self._place(plan)}: started ({plan.reason})")

    def cell(self, number: int) -> None:
        """Code cell ``number`` (from 0) of the current notebook starts."""
        with self._lock:
            self._cell, self._cell_started = number, self._clock()
        self._draw()

    def skipped(self, plan: Plan) -> None:
        """A notebook need not run."""
        self._say(f"{self._place(plan)}: up to date")

    def finished(self, plan: Plan) -> None:
        """The current notebook has finished."""
        took = self._clock() - self._notebook_started
        with self._lock:
            self._done += plan.seconds
            self._current, self._cell = None, 0
        left = self._left()
        rest = f", about {in_words(left)} left" if left else ""
        self._say(f"{self._place(plan)}: finished in {in_words(took)}{rest}")

    def close(self) -> None:
        """No more events come."""
        self._over.set()
        if self._live:
            with self._lock:
                self._stream.write("\r\x1b[2K")
                self._stream.flush()

    def line(self) -> str:
        """The line that a terminal shows now."""
        plan = self._current
        if plan is None:
            return ""
        left = self._left()
        rest = "estimating the time left" if left is None else f"about {in_words(left)} left"
        spent = in_words(self._clock() - self._started)
        return f"{self._place(plan)}: cell {self._cell + 1}/{len(plan.expected)}, {spent} so far, {rest}"

    def _left(self) -> float | None:
        pending = [plan for plan in self._plans if plan.reason is not None]
        now = self._clock()
        done = self._done
        if self._current:
            expected = self._current.expected
            done += sum(expected[: self._cell])
            if self._current.measured and self._cell < len(expected):
                done += min(now - self._cell_started, expected[self._cell])
        remaining = sum(plan.seconds for plan in pending) - done
        return seconds_left(now - self._started, done, remaining, all(plan.measured for plan in pending))

    def _place(self, plan: Plan) -> str:
        return f"[{self._plans.index(plan) + 1}/{len(self._plans)}] {plan.name}"

    def _say(self, text: str) -> None:
        with self._lock:
            self._stream.write(f"\r\x1b[2K{text}\n" if self._live else f"{text}\n")
            self._stream.flush()
        self._draw()

    def _draw(self) -> None:
        if not self._live or self._over.is_set():
            return
        with self._lock:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[2K{self.line()[:width]}")
            self._stream.flush()

    def _tick(self) -> None:
        while not self._over.wait(1.0):
            self._draw()
