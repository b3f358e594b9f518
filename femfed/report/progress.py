"""The progress of a run: a live display in a terminal, one plain line a round in a pipe."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from femfed import one_line
from femfed.report.files import Row


class Progress:
    """Shows how far a run is; a context manager.

    Args:
        rounds: number of the last round; round 0 is the evaluation before the first, a resumed
            run starts further up.
        title: what is run, on which data.
        live: whether to draw a display in place; a terminal that cannot gets plain lines.
        list_clients: whether to list the clients of every round, as the homework did.
        stream: where to write; standard output if None.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        rounds: int,
        title: str,
        live: bool,
        list_clients: bool,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rounds = rounds
        self._title = one_line(title)
        self._list_clients = list_clients
        self._stream = stream or sys.stdout
        self._clock = clock
        console = Console(file=self._stream, force_terminal=live or None)
        self._live: Live | None = None
        if live and console.is_interactive:
            # What others print is the caller's to catch: rich would put it above the display.
            self._live = Live(
                self,
                console=console,
                refresh_per_second=4,
                redirect_stdout=False,
                redirect_stderr=False,
            )
        self._status = ""
        self._share = 0.0  # of the clients of the round under way
        self._begun = False
        self._number = 0
        self._seen: dict[str, tuple[int, float]] = {}  # column -> last round with a value, value
        self._accuracies: dict[str, list[float]] = {"test_accuracy": [], "unseen_accuracy": []}
        self._start = clock()
        self._first_end = self._last_end = self._start
        self._ended = 0  # rounds that this process has done
        self._per_round = math.nan

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start(refresh=True)
        else:
            self._write(self._title)
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._share = 0.0
            self._status = "stopped" if failure else "done"
            self._live.stop()

    def status(self, text: str) -> None:
        """Say what is going on, such as `starting 2 workers`.

        Between the first round and the last only the live display shows it: a pipe gets one line a
        round.
        """
        self._status = text
        if not self._live and (not self._begun or self._number == self._rounds):
            self._write(text)

    def message(self, text: str) -> None:
        """Show a warning or a note; it stays."""
        self._write(text)

    def clients_done(self, done: int, total: int) -> None:
        """Move on within a round."""
        self._begun = True
        self._share = done / max(1, total)
        self._status = f"clients {done}/{total}"

    def round(self, row: Row, clients: Sequence[Row]) -> None:
        """Show a finished round.

        Args:
            row: `ROUND_COLUMNS`, accuracies in [0, 1], None where the round was not evaluated.
            clients: `CLIENT_COLUMNS` of each of its clients.
        """
        now = self._clock()
        self._begun = True
        self._number = int(row["round"] or 0)
        values = {name: value for name in row if (value := _number(row, name)) is not None}
        # A new dictionary: the display's thread may be reading the old one.
        self._seen = self._seen | {name: (self._number, value) for name, value in values.items()}
        for name, history in self._accuracies.items():
            if math.isfinite(value := values.get(name, math.nan)):
                history.append(value)
        self._ended += self._number > 0
        if self._number == 0:  # it trains no client: it foretells no other round
            self._per_round = math.nan
        elif self._ended == 1:
            # The first round pays for tracing: it foretells the others only until they are there.
            self._first_end = now
            self._per_round = values.get("seconds_total", now - self._start)
        else:
            self._per_round = (now - self._first_end) / (self._ended - 1)
        self._last_end = now
        self._share, self._status = 0.0, ""
        if self._list_clients or not self._live:
            self._write(self._line(values))
        if self._list_clients:
            for client in clients:
                self._write(_client_line(client))

    def _line(self, values: dict[str, float]) -> str:
        width = len(str(self._rounds))
        cells = [f"round {self._number:{width}}/{self._rounds}"]
        if "test_loss" in values:
            cells.append(f"loss {values['test_loss']:.3f}")
        elif "train_loss" in values:
            cells.append(f"train loss {values['train_loss']:.3f}")
        if "test_accuracy" in values:
            cells.append(f"accuracy {_percent(values['test_accuracy'])}")
        if "accuracy_p10" in values and "accuracy_p90" in values:
            spread = _spread(values["accuracy_p10"], values["accuracy_p90"])
            cells.append(f"writers p10-p90 {spread}")
        if "unseen_accuracy" in values:
            cells.append(f"unseen {_percent(values['unseen_accuracy'])}")
        if rate := _rate(values):
            cells.append(rate)
        if math.isfinite(self._per_round):
            cells.append(f"{_duration(self._left(self._last_end))} left")
        return "  ".join(cells)

    def _left(self, now: float) -> float:
        rest = (self._rounds - self._number) * self._per_round
        return max(0.0, rest - (now - self._last_end))

    def _write(self, text: str) -> None:
        text = one_line(text)
        if self._live:
            self._live.console.print(Text(text), soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(10, min(40, options.max_width - 64))
        blocks = not options.ascii_only
        seen = {name: value for name, (_, value) in self._seen.items()}
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", style="bold", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(style="dim", no_wrap=True)

        bar = ProgressBar(self._rounds, self._number + self._share, width, complete_style="cyan")
        table.add_row("round", f"{self._number}/{self._rounds}", bar, self._status)
        for label, name in (("accuracy", "test_accuracy"), ("unseen", "unseen_accuracy")):
            if name in seen:
                history = self._accuracies[name]
                text = f"best {_percent(max(history))}" if history else ""
                if self._seen[name][0] < self._number:
                    text += f", evaluated in round {self._seen[name][0]}"
                line = Text(_sparkline(history, width) if blocks else "", style="cyan")
                table.add_row(label, _percent(seen[name]), line, text)
        if "accuracy_p10" in seen and "accuracy_p90" in seen:
            low, high = seen["accuracy_p10"], seen["accuracy_p90"]
            middle = seen.get("accuracy_p50", math.nan)
            text = f"p10-p90 {_spread(low, high)}"
            if "accuracy_worst_tenth" in seen:
                text += f", worst tenth {_percent(seen['accuracy_worst_tenth'])}"
            span = _span(low, middle, high, width) if blocks else ""
            table.add_row("writers", _percent(middle), span, text)
        if "test_loss" in seen or "train_loss" in seen:
            test, train = (seen.get(name, math.nan) for name in ("test_loss", "train_loss"))
            table.add_row("loss", f"{test:.3f}", "", f"train {train:.3f}")
        now = self._clock()
        under_way = 0 < self._number < self._rounds and self._status != "stopped"
        times = [f"{_duration(self._left(now))} left"] if under_way else []
        times += [rate] if (rate := _rate(seen)) else []
        table.add_row("elapsed", _duration(now - self._start), "", ", ".join(times))

        yield Text(self._title, style="bold", no_wrap=True, overflow="ellipsis")
        yield table


def _number(row: Row, column: str) -> float | None:
    value = row.get(column)
    return float(value) if isinstance(value, int | float) else None


def _rate(values: dict[str, float]) -> str:
    seconds = values.get("seconds_total", 0.0)
    clients = values.get("clients", 0.0)
    return f"{clients / seconds:.1f} clients/s" if seconds and clients else ""


def _client_line(client: Row) -> str:
    line = f"number : {client['number']}, subject number : {client['subject_number']}"
    line += f", examples : {client['examples']}"
    if (loss := _number(client, "train_loss")) is not None:
        line += f", loss : {loss:.3f}"
    if (accuracy := _number(client, "train_accuracy")) is not None:
        line += f", accuracy : {_percent(accuracy)}"
    return line


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _spread(low: float, high: float) -> str:
    return f"{100 * low:.1f}-{100 * high:.1f} %"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _sparkline(values: Sequence[float], width: int) -> str:
    """Draw values as blocks between their least and greatest; more than `width` are thinned."""
    count = min(len(values), width)
    drawn = [values[(i + 1) * len(values) // count - 1] for i in range(count)]
    low, high = min(drawn, default=0.0), max(drawn, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / ((high - low) or 1))] for v in drawn)


def _span(low: float, middle: float, high: float, width: int) -> Text:
    """Draw writers' accuracy on an axis from 0 to 1: p10 to p90 thick, the median marked."""
    if not all(math.isfinite(value) for value in (low, middle, high)):
        return Text()
    first, mark, last = (min(width - 1, int(value * width)) for value in (low, middle, high))
    return Text.assemble(
        ("─" * first, "bright_black"),
        ("━" * (mark - first), "cyan"),
        ("╋", "bold cyan"),
        ("━" * (last - mark), "cyan"),
        ("─" * (width - 1 - last), "bright_black"),
    )
