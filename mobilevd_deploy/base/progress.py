"""Progress for the user: stage names, elapsed time, and an estimate of the remaining time.

Library code takes a `Progress`, which prints nothing. Only the command line makes one that prints.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self, TextIO


class Progress:
    """Receives the progress of stages and prints nothing; subclasses print. A context manager.

    Call `plan` first, or not at all; then `begin` and `end` for each stage.
    """

    def plan(self, stages: Mapping[str, float]) -> None:
        """Announce the stages: name -> expected time, in any unit."""

    def begin(self, stage: str) -> None:
        """Start a stage. It need not be planned."""

    def advance(self, fraction: float) -> None:
        """Set the fraction of the running stage that is done, from 0 to 1."""

    def end(self, *, reused: bool = False) -> None:
        """Finish the running stage; `reused` if an earlier run did the work."""

    def say(self, sentence: str) -> None:
        """Show a message."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore the terminal, also after an error."""


def shares(progress: Progress, sizes: Sequence[float]) -> list[Progress]:
    """Return one Progress per task, for tasks that run in threads within one stage.

    `sizes` are the expected times of the tasks, in any unit. The stage advances by the weighted sum.
    """
    lock, done = threading.Lock(), [0.0] * len(sizes)

    class Share(Progress):
        def __init__(self, number: int) -> None:
            self._number = number

        def advance(self, fraction: float) -> None:
            with lock:
                done[self._number] = fraction * sizes[self._number]
                progress.advance(sum(done) / sum(sizes))

        def say(self, sentence: str) -> None:
            with lock:
                progress.say(sentence)

    return [Share(number) for number in range(len(sizes))]


class LineProgress(Progress):
    """Prints a line when a stage begins and a line when it ends: for logs and pipes."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._left: dict[str, float] = {}
        self._number = self._total = 0
        self._stage = ""
        self._fraction = self._since = 0.0
        self._seconds_spent = self._share_spent = 0.0

    def plan(self, stages: Mapping[str, float]) -> None:
        """Announce the stages."""
        self._left = dict(stages)
        self._total = self._number + len(stages)

    def begin(self, stage: str) -> None:
        """Show the stage's number and name."""
        self._number += 1
        self._total = max(self._total, self._number)
        self._stage, self._fraction, self._since = stage, 0.0, self._clock()
        self._show_running(self._label())

    def advance(self, fraction: float) -> None:
        """Use the fraction in the estimate of the remaining time."""
        self._fraction = min(max(fraction, 0.0), 1.0)

    def end(self, *, reused: bool = False) -> None:
        """Show how long the stage took, and the estimated time of the remaining stages."""
        share, seconds, label = self._left.pop(self._stage, 0.0), self._clock() - self._since, self._label()
        self._stage = ""
        if reused:
            self.say(f"{label}: done in an earlier run")
            return
        self._seconds_spent += seconds
        self._share_spent += share
        rest = self.rest()
        self.say(f"{label}: {duration(seconds)}" + (f", {rest}" if rest else ""))

    def say(self, sentence: str) -> None:
        """Print the sentence on its own line."""
        print(sentence, file=self._stream, flush=True)

    def rest(self) -> str:
        """Return "about TIME left" for the planned stages; empty if unknown or if nothing is left."""
        now = self._left.get(self._stage, 0.0) * self._fraction
        seconds = self._seconds_spent + (self._clock() - self._since if now else 0.0)
        share, left = self._share_spent + now, sum(self._left.values()) - now
        return f"about {duration(seconds / share * left)} left" if share > 0 and left > 0 else ""

    def _label(self) -> str:
        return f"[{self._number}/{self._total}] {self._stage}"

    def _show_running(self, label: str) -> None:
        self.say(f"{label} ...")


class LiveProgress(LineProgress):
    """Prints a line per finished stage; below them, the running stage with a spinner and its time."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        from rich import progress
        from rich.console import Console
        from rich.text import Text

        class Rest(progress.ProgressColumn):
            def render(column, task: progress.Task) -> Text:  # noqa: N805
                return Text(self.rest(), style="dim")

        self._live = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}", markup=False),
            progress.TimeElapsedColumn(),
            Rest(),
            console=Console(file=stream),
            transient=True,
        )

    def end(self, *, reused: bool = False) -> None:
        """Replace the spinner with the line of the finished stage."""
        self._clear()
        super().end(reused=reused)

    def say(self, sentence: str) -> None:
        """Print the sentence above the running stage."""
        self._live.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the spinner."""
        self._clear()

    def _show_running(self, label: str) -> None:
        self._clear()
        self._live.add_task(label, total=None)
        self._live.start()

    def _clear(self) -> None:
        self._live.stop()
        for task in self._live.task_ids:
            self._live.remove_task(task)


def make_progress(*, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """Return a Progress for `stream` (default: standard error): live on a terminal, lines elsewhere.

    `quiet` prints nothing.
    """
    stream = stream or sys.stderr
    if quiet:
        return Progress()
    return LiveProgress(stream) if stream.isatty() else LineProgress(stream)


def duration(seconds: float) -> str:
    """Format a time span: "3.2 s", "1 min 05 s", "2 h 03 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
