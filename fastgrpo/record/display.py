"""The current step on a terminal: a live panel, or one plain line a step where the output is no terminal."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastgrpo.errors import printable, say_on_stderr, show_any_text, without_reader
from fastgrpo.record.phases import PhaseTimer

# Metric, label and format, in the order shown.
SHOWN = (
    ("reward/total", "reward", ".3f"),
    ("pass_rate", "pass rate", ".1%"),
    ("infrastructure", "failed for infrastructure", ".0f"),
    ("loss", "loss", ".4f"),
    ("kl", "KL", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("grad_norm", "gradient norm", ".3f"),
    ("parity", "sync parity", ".4f"),
    ("tokens_per_s", "tokens/s", ",.0f"),
    ("train_tokens_per_s", "training tokens/s", ",.0f"),
    ("mfu", "training MFU", ".1%"),
    ("gpu/utilisation", "GPU busy", ".0%"),
    ("gpu/memory_gib", "GPU memory, GiB", ".1f"),
    ("gpu/power_w", "GPU power, W", ".0f"),
    ("jails", "jails in flight", ".0f"),
)
CURVES = {"reward/total", "pass_rate", "loss"}
HISTORY = 40
PLAIN_INTERVAL_S = 1.0
SHOWN_WAIT_S = 2.0


class Display:
    """Shows the stage, the last step's metrics with their history, the seconds of each phase and the time left."""

    def __init__(self, run: str, timer: PhaseTimer, *, live: bool | None = None) -> None:
        self._run = run
        self._timer = timer
        show_any_text()
        self._console = Console()
        self._metrics: dict[str, float] = {}
        self._history: dict[str, deque[float]] = {}
        self._stage, self._total, self._done, self._first = "", 0, 0, 0
        self._waited_for = ""
        self._started = self._printed = time.monotonic()
        self._live: Live | None = None
        if self._console.is_terminal if live is None else live:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()

    def stage(self, name: str, total: int, done: int) -> None:
        """Begin a stage of `total` steps, `done` of them in an earlier process."""
        if self._live is not None and self._stage:
            with _shown_if_read():
                self._console.print(Text(self._line(), style="dim"))
        self._stage, self._total, self._done, self._first = name, total, done, done
        self._metrics, self._history = {}, {}
        self._started = time.monotonic()
        if self._live is None:
            self.say(f"{name}: {total} steps" + (f", resumed after {done}" if done else ""))

    def step(self, step: int, metrics: Mapping[str, float], waited_for: str = "") -> None:
        """Show a finished step, and what it waited for where that took long."""
        self._done = step
        self._waited_for = waited_for if metrics.get("tail_s", 0.0) >= SHOWN_WAIT_S else ""
        self._metrics = dict(metrics)
        for name in CURVES & metrics.keys():
            self._history.setdefault(name, deque(maxlen=HISTORY)).append(metrics[name])
        due = time.monotonic() - self._printed >= PLAIN_INTERVAL_S or step in (self._first + 1, self._total)
        if self._live is None and due:
            self._printed = time.monotonic()
            self.say(self._line())

    def status(self, values: Mapping[str, float]) -> None:
        """Show values of the running step."""
        self._metrics.update(values)

    def say(self, text: str) -> None:
        """Print a line, above the panel where there is one."""
        with _shown_if_read():
            if self._live is None:
                print(printable(text), flush=True)
            else:
                self._console.print(Text(printable(text)))

    def close(self) -> None:
        """Leave the last panel on the screen and stop drawing."""
        if self._live is not None:
            with _shown_if_read():
                self._live.stop()
            self._live = None

    def _seconds_left(self) -> float | None:
        steps = self._done - self._first
        if steps <= 0:
            return None
        return (time.monotonic() - self._started) / steps * (self._total - self._done)

    def _phases(self) -> list[tuple[str, float, float]]:
        """Phase, seconds and share of the last step, longest first."""
        whole = self._metrics.get("seconds/step", 0.0)
        phases = [(n.removeprefix("seconds/"), s) for n, s in self._metrics.items() if n.startswith("seconds/")]
        return sorted(((n, s, s / whole if whole else 0.0) for n, s in phases if n != "step"), key=lambda p: -p[1])

    def _shown(self) -> list[tuple[str, str, str]]:
        """Metric, label and format of what there is to show; the terms of any task follow the reward."""
        terms = [(n, f"  {n.removeprefix('reward/')}", ".3f") for n in self._metrics if n.startswith("reward/")]
        terms = [term for term in terms if term[0] != SHOWN[0][0]]
        shown = [row for row in (SHOWN[0], *terms, *SHOWN[1:]) if row[0] in self._metrics]
        return [row for row in shown if row[0] != "infrastructure" or self._metrics[row[0]]]

    def _line(self) -> str:
        parts = [f"{self._stage} {self._done}/{self._total}"]
        parts += [f"{label.strip()} {self._metrics[n]:{form}}" for n, label, form in self._shown()]
        parts += [f"{name} {seconds:.1f}s {share:.0%}" for name, seconds, share in self._phases()[:4] if share >= 0.02]
        if self._waited_for:
            waited = f"waited {self._metrics['tail_s']:.0f}s for {self._waited_for}"
            if (rest := self._metrics.get("tail_after_answers_s")) is not None:
                waited += f", {rest:.1f}s of it after the last answer"
            parts.append(waited)
        left = self._seconds_left()
        return " | ".join([*parts, f"left {duration(left)}"] if left else parts)

    def _render(self) -> RenderableType:
        left = self._seconds_left()
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"[bold]{escape(self._stage or 'starting')}[/]",
            f"step {self._done}/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=self._done, width=36),
            f"{duration(time.monotonic() - self._started)} gone",
            f"{duration(left)} left" if left is not None else "",
            f"[dim]{escape(self._timer.current)}[/]",
        )
        columns = Table.grid(padding=(0, 4))
        columns.add_row(self._metric_table(), self._phase_table())
        return Panel(Group(head, "", columns), title=f"fastgrpo {escape(self._run)}", title_align="left")

    def _metric_table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        table.add_column(style="cyan")
        for name, label, form in self._shown():
            curve = sparkline(self._history.get(name, ()), ascii_only=self._console.options.ascii_only)
            table.add_row(escape(label), format(self._metrics[name], form), curve)
        return table

    def _phase_table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right")
        for name, seconds, share in self._phases():
            bar = ProgressBar(total=1.0, completed=share, width=16)
            table.add_row(escape(name), f"{seconds:.2f} s", f"{share:4.0%}", bar)
        return table


@contextmanager
def _shown_if_read() -> Iterator[None]:
    """What the block prints; where its reader is gone (`| tee`, a closed terminal) the run goes on, in its folder."""
    try:
        yield
    except OSError as error:
        without_reader()
        say_on_stderr(f"nothing more is shown here ({error.strerror}): the run goes on, and its folder has all of it")


def sparkline(values: deque[float] | tuple[float, ...], *, ascii_only: bool = False) -> str:
    """A curve in one row of text, its lowest value the lowest mark; NaN and infinity are blank."""
    marks = "_.-=^" if ascii_only else "▁▂▃▄▅▆▇█"
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    low = min(finite) / 2
    span = max(finite) / 2 - low
    heights = ((value / 2 - low) / span if span else 0.0 for value in finite)
    drawn = iter([marks[round(height * (len(marks) - 1))] for height in heights])
    return "".join(next(drawn) if math.isfinite(value) else " " for value in values)


def duration(seconds: float) -> str:
    """`45s`, `3m10s`, `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole // 60 % 60:02d}m"
