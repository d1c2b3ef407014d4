"""Requests of many people, drawn together: one thread owns the models, and what waits for it goes into one batch.

Requests of equal sampling options share a batch, whatever their classes, captions and seeds: every sample has randomness of its
own, so that nobody sees who else asked.  While codes are drawn, everybody is shown the rows so far, as often as a quarter of the
time allows.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.conditions import Given, count, each
from autoregressive.models.generate import SamplingOptions
from autoregressive.sample.pipeline import Pipeline
from utils.config import UserError

_GATHER = 0.02         # seconds that a batch waits for others who asked at the same moment
_PREVIEW_SHARE = 0.25  # of the time that may go into pictures of unfinished grids


@dataclass
class Request:
    """Samples that someone asked for, and the pictures that they get: None follows the last one, a failure stands alone."""

    given: Given            # class ids [n] or captions
    samples: np.ndarray     # [n] numbers of the samples, which with the seed of `sampling` fix the randomness
    sampling: SamplingOptions
    kept: Tensor | None = None  # [n, C, N] codes that are given, -1 where one is drawn
    pictures: "queue.SimpleQueue[np.ndarray | Exception | None]" = field(default_factory=queue.SimpleQueue)
    gone: bool = False      # whether nobody waits any more

    @property
    def kind(self) -> SamplingOptions:
        """What requests of one batch have in common."""
        return replace(self.sampling, seed=0)


@dataclass
class Task:
    """Something else to do with the models, and what came of it."""

    function: Callable[[], Any]
    result: "queue.SimpleQueue[tuple[Any, Exception | None]]" = field(default_factory=queue.SimpleQueue)


class Batcher:
    """Draws what is asked for from any thread, at most `largest` samples at once."""

    def __init__(self, pipeline: Pipeline, largest: int = 32) -> None:
        self.pipeline, self.largest, self.batches = pipeline, largest, list[int]()  # samples of each batch so far
        self._waiting: deque[Request | Task] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._serve, name="batcher", daemon=True)
        self._thread.start()

    def draw(self, given: Given, samples: np.ndarray, sampling: SamplingOptions,
             kept: Tensor | None = None) -> Iterator[np.ndarray]:
        """Images of n samples, uint8 [n, S, S, 3]: some that are grey below the rows drawn so far, and the finished ones last.

        given, samples, kept: as in Request.  Raises UserError for more samples than a batch holds, and what drawing raises.
        """
        if not 0 < len(samples) <= self.largest:
            raise UserError(f"{len(samples)} images are asked for at once: give a number from 1 to {self.largest}.")
        request = Request(given, samples, sampling, kept)
        self._add(request)
        try:
            while (picture := request.pictures.get()) is not None:
                if isinstance(picture, Exception):
                    raise picture
                yield picture
        finally:
            request.gone = True

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that uses the models, called between batches."""
        task = Task(function)
        self._add(task)
        result, error = task.result.get()
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """Finish what is being drawn and end the thread; what still waits fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _add(self, job: Request | Task) -> None:
        with self._changed:
            if self._closed:
                raise UserError("the models are being put away: ask again later.")
            self._waiting.append(job)
            self._changed.notify()

    def _serve(self) -> None:
        while (jobs := self._next()) is not None:
            if isinstance(jobs, Task):
                try:
                    jobs.result.put((jobs.function(), None))
                except Exception as error:  # whoever asked is told
                    jobs.result.put((None, error))
            elif jobs:
                self._answer(jobs)

    def _next(self) -> list[Request] | Task | None:
        """The next batch or task, once there is one; None when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                self._refuse_waiting()
                return None
            if isinstance(self._waiting[0], Task):
                task = self._waiting.popleft()
                assert isinstance(task, Task)
                return task
            self._changed.wait_for(lambda: self._closed, timeout=_GATHER)
            return self._take_batch()

    def _take_batch(self) -> list[Request]:
        """The requests of one kind with the first, in their order, as many as a batch holds."""
        batch, left, samples, kind = [], deque[Request | Task](), 0, None
        for job in self._waiting:
            if isinstance(job, Request) and job.gone:
                continue
            kind = job.kind if kind is None and isinstance(job, Request) else kind
            fits = isinstance(job, Request) and job.kind == kind and samples + len(job.samples) <= self.largest
            if isinstance(job, Request) and fits:
                batch.append(job)
                samples += len(job.samples)
            else:
                left.append(job)
        self._waiting = left
        return batch

    def _refuse_waiting(self) -> None:
        closed = UserError("the models were put away before this was drawn: ask again later.")
        for job in self._waiting:
            if isinstance(job, Request):
                job.pictures.put(closed)
            else:
                job.result.put((None, closed))

    def _answer(self, batch: list[Request]) -> None:
        """Draw a batch, and hand everybody their pictures."""
        ends = np.cumsum([len(request.samples) for request in batch])
        self.batches.append(int(ends[-1]))
        try:
            for images in self._pictures(batch):
                for request, own in zip(batch, np.split(images, ends[:-1]), strict=True):
                    request.pictures.put(own)
            for request in batch:
                request.pictures.put(None)
        except Exception as error:  # everybody is told, and the next batch is drawn
            for request in batch:
                request.pictures.put(error)

    def _pictures(self, batch: list[Request]) -> Iterator[np.ndarray]:
        """Images of all samples of a batch after some of the rows, and after all of them."""
        pipeline, side = self.pipeline, self.pipeline.gpt.config.grid_size
        given = each(lambda *parts: torch.cat(parts), *(request.given for request in batch))
        uniforms = torch.cat([pipeline.uniforms(request.sampling.seed, request.samples) for request in batch])
        started, spent = time.perf_counter(), 0.0
        for rows, codes in pipeline.rows(given, uniforms, batch[0].sampling, _kept(batch)):
            begun = time.perf_counter()
            if rows == side or spent <= _PREVIEW_SHARE * (begun - started):
                yield pipeline.decode(codes, rows)
            spent += time.perf_counter() - begun


def _kept(batch: list[Request]) -> Tensor | None:
    """The codes that are given in a batch [B, C, N]; None where nobody gives any."""
    shapes = [request.kept.shape[1:] for request in batch if request.kept is not None]
    if not shapes:
        return None
    return torch.cat([torch.full((count(request.given), *shapes[0]), -1) if request.kept is None else request.kept.cpu()
                      for request in batch])
