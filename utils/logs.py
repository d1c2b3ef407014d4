"""What one sees while a command works: lines of the log with their dates, and progress.

A terminal shows a bar, and messages above it.  A file, or what else reads standard error, gets a line of the log now and then:
a bar that is drawn again every second would bury everything else in cursor codes.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from utils.distributed import Processes
from utils.files import unlinked

log = logging.getLogger("progress")

T = TypeVar("T")

_SOONEST, _LATEST = 30.0, 1800.0  # seconds from one line of progress to the next


class StandardError(logging.StreamHandler):
    """The log on standard error, where a message has lines of its own also while a bar is shown."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        if not getattr(tqdm, "_instances", ()):
            super().emit(record)
        elif os.getpid() == self._process:
            with tqdm.external_write_mode(self.stream):
                super().emit(record)
        else:  # a loader process, where the lock of the bars may be held by a thread that it has not got
            self.stream.write("\r\x1b[K")
            super().emit(record)


class LogFile(logging.FileHandler):
    """The log of a run, which ends when it cannot be written: logging itself would print a traceback for every line and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Deal with what writing a line has raised."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            error.filename = self.baseFilename
            raise error
        super().handleError(record)


def set_up_logging(processes: Processes, file: Path | None = None) -> None:
    """Log to standard error and `file` in the main process, only warnings elsewhere."""
    handlers: list[logging.Handler] = [StandardError()]
    if file is not None and processes.is_main:
        handlers.append(LogFile(unlinked(file)))
    logging.basicConfig(level=logging.INFO if processes.is_main else logging.WARNING, handlers=handlers, force=True,
                        format="%(asctime)s %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


class ProgressLines:
    """What `progress` gives where there is no terminal: a line of the log now and then.

    The first is due after 30 seconds, the next when as much time again has gone, and so on; later ones every half hour.  A last
    one tells the end of what has had one before: of what is done sooner its own result is enough.
    """

    def __init__(self, total: int, name: str, unit: str, initial: int = 0, shown: bool = True) -> None:
        self.total, self.name, self.unit, self.shown = total, name, unit, shown
        self.n = self._first = initial
        self._started = self._told = time.monotonic()
        self._closed = False

    def update(self, n: int = 1) -> None:
        """Count what was done."""
        self.n += n
        now = time.monotonic()
        if now - self._told >= min(max(self._told - self._started, _SOONEST), _LATEST) and self.n < self.total:
            self._told = now
            rate = (self.n - self._first) / (now - self._started)
            left = timedelta(seconds=round((self.total - self.n) / rate)) if rate else "unknown time"
            self._tell(f"{rate:.3g} a second, {left} left")

    def close(self) -> None:
        """Say where it ended."""
        if not self._closed and self._told > self._started:
            self._tell(f"in {timedelta(seconds=round(time.monotonic() - self._started))}")
        self._closed = True

    def _tell(self, pace: str) -> None:
        text = f"{self.name}: {self.n} of {self.total} {self.unit}, {pace}"
        if self.shown and log.hasHandlers():
            log.info(text)
        elif self.shown:  # a command without a log
            sys.stderr.write(f"{text}\n")

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def progress(total: int, name: str, unit: str, processes: Processes | None = None, initial: int = 0) -> tqdm | ProgressLines:
    """The progress of this process's work, shown by the main process: `update` counts, `close` or the end of a block ends it.

    unit: what is counted, in the plural.  A bar inside another one vanishes when it is done.
    """
    shown = processes is None or processes.is_main
    if not sys.stderr.isatty():
        return ProgressLines(total, name, unit, initial, shown)
    return tqdm(total=total, initial=initial, desc=name, unit=f" {unit}", disable=not shown, dynamic_ncols=True, mininterval=1.0,
                leave=None)


def followed(items: Sequence[T], name: str, unit: str, processes: Processes | None = None) -> Iterator[T]:
    """The items, whose progress is shown as in `progress`."""
    with progress(len(items), name, unit, processes) as bar:
        for item in items:
            yield item
            bar.update()
