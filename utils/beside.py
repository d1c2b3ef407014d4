"""One piece of work at a time in a thread, beside what the caller does next."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Beside:
    """A thread that works beside the caller; leaving the block waits for it.

    At most one piece is under way: the next call waits for it, and raises its error.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def run(self, work: Callable[..., None], *args: object) -> None:
        """Start `work(*args)` once the piece before is done."""
        self.wait()
        self._under_way = self._pool.submit(work, *args)

    def wait(self) -> None:
        """Wait until nothing is under way; raises what the work raised."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:  # otherwise the error that is under way already is the one to show
                self.wait()
        finally:
            self._pool.shutdown()
