"""Being asked to stop: SIGTERM, SIGUSR1 (Slurm's --signal) and Ctrl-C.

A command leaves at once, by SystemExit, so that temporary files are removed.  A training finishes its step and writes a
checkpoint first (`Run`).  Exit codes are the shell's: 143 for SIGTERM and SIGUSR1, 130 for Ctrl-C.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
RETRY = 75             # exit code of a process that lost another one: starting all of them again may help
LAUNCHED = "IAR2_LAUNCHED"  # set where scripts/launch.py tells what went wrong, for all processes together
_ECHO_SECONDS = 2.0    # Ctrl-C reaches a process twice, by the terminal and by the script that started it


class _Leaving(SystemExit):
    """What a signal raises; signum: the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(EXIT_CODES[signal.Signals(signum)])
        self.signum = signum


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Within the block a signal ends the process by SystemExit; an echo does not cut short what is tidied up on the way."""
    since = -math.inf

    def leave(signum: int, frame: FrameType | None) -> None:
        nonlocal since
        if time.monotonic() - since > _ECHO_SECONDS:
            since = time.monotonic()
            raise _Leaving(signum)

    def unraisable(dropped: Any) -> None:
        nonlocal since
        if isinstance(dropped.exc_value, _Leaving):  # raised in a __del__, say, whose exceptions Python drops: ask again
            since = -math.inf
            threading.Timer(0.05, os.kill, (os.getpid(), dropped.exc_value.signum)).start()
        else:
            former(dropped)

    former, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        with handled_by(leave):
            yield
    finally:
        sys.unraisablehook = former


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Within the block the signals go to `handler`; threads other than the main one cannot choose."""
    chosen = EXIT_CODES if threading.current_thread() is threading.main_thread() else ()
    before = {each: signal.signal(each, handler) for each in chosen}
    try:
        yield
    finally:
        for each, former in before.items():
            signal.signal(each, former)


def ignore_in_worker(worker: int) -> None:
    """A DataLoader's worker_init_fn: a signal to the whole process group must leave the workers to their training."""
    for each in EXIT_CODES:
        signal.signal(each, signal.SIG_IGN)


class StopRequest:
    """A signal that is noted (`handled_by(request.note)`) instead of ending the process; a second one, later, ends it."""

    def __init__(self) -> None:
        self.exit_code = 0       # 0: none yet
        self._since = 0.0

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.exit_code and time.monotonic() - self._since > _ECHO_SECONDS:
            os._exit(self.exit_code)
        if not self.exit_code:
            self.exit_code, self._since = EXIT_CODES[signal.Signals(signum)], time.monotonic()
