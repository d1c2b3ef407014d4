"""Requests of many, drawn together: everybody gets their own samples, and one failure is one person's."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.serving import Batcher
from tests.test_pipeline import folder, pipeline  # noqa: F401
from utils.config import UserError


@pytest.fixture
def batcher(pipeline):  # noqa: F811
    """A batcher of at most eight samples."""
    made = Batcher(pipeline, largest=8)
    yield made
    made.close()


def last(batcher: Batcher, label: int, seed: int, count: int = 2, **options) -> np.ndarray:
    """The finished images of a request."""
    sampling = replace(batcher.pipeline.sampling, seed=seed, **options)
    *_, images = batcher.draw(torch.full((count,), label), np.arange(count), sampling)
    return images


def expected(pipeline: Pipeline, label: int, seed: int, count: int = 2) -> np.ndarray:  # noqa: F811
    """The same by the pipeline alone."""
    return np.stack([np.asarray(image) for image in pipeline([label] * count, seed=seed, progress=False)])


def hold(batcher: Batcher) -> threading.Event:
    """Keep the models busy until the returned event is set, so that what comes meanwhile waits together."""
    release, busy = threading.Event(), threading.Event()

    def wait() -> None:
        busy.set()
        release.wait(20)

    threading.Thread(target=lambda: batcher.call(wait), daemon=True).start()
    assert busy.wait(20)
    return release


def test_those_who_wait_share_a_batch_and_get_their_own(batcher, pipeline):  # noqa: F811
    """Classes and seeds differ within a batch; the images are those of everybody alone."""
    release = hold(batcher)
    with ThreadPoolExecutor(10) as people:
        asked = [people.submit(last, batcher, number % 3, number) for number in range(10)]
        while len(batcher._waiting) < 10:
            pass
        release.set()
        found = [each.result() for each in asked]
    assert batcher.batches == [8, 8, 4]  # 20 samples, at most 8 at once
    for number, images in enumerate(found):
        assert np.array_equal(images, expected(pipeline, number % 3, number))


def test_other_options_are_another_batch(batcher, pipeline):  # noqa: F811
    """A batch has one guidance scale; nobody's is changed by others."""
    release = hold(batcher)
    with ThreadPoolExecutor(3) as people:
        asked = [people.submit(last, batcher, 1, 4, cfg_scale=scale) for scale in ((1.5, 3.0), (1.0, 1.0), (1.5, 3.0))]
        while len(batcher._waiting) < 3:
            pass
        release.set()
        one, other, same = (each.result() for each in asked)
    assert sorted(batcher.batches) == [2, 4] and np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.array_equal(one, expected(pipeline, 1, 4))


def test_pictures_on_the_way_end_with_the_finished_one(batcher, pipeline):  # noqa: F811
    """The first picture comes before the last: grey where nothing is drawn."""
    pictures = list(batcher.draw(torch.tensor([2]), np.arange(1), pipeline.sampling))
    assert len(pictures) >= 2 and (pictures[0][:, 8:] == 128).all() and not (pictures[-1] == 128).all()
    assert np.array_equal(pictures[-1], expected(pipeline, 2, 0, 1))


def test_kept_codes_stand_beside_requests_without(batcher, pipeline):  # noqa: F811
    """Somebody who edits an image shares the batch of somebody who does not."""
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    kept = pipeline.top_codes(image, 2)
    release = hold(batcher)

    def edited() -> np.ndarray:
        *_, images = batcher.draw(torch.tensor([1]), np.arange(1), replace(pipeline.sampling, seed=7), kept)
        return images

    with ThreadPoolExecutor(2) as people:
        asked = [people.submit(edited), people.submit(last, batcher, 1, 7, 1)]
        while len(batcher._waiting) < 2:
            pass
        release.set()
        with_top, without = (each.result() for each in asked)
    assert batcher.batches == [2] and np.array_equal(without, expected(pipeline, 1, 7, 1))
    *_, (_, codes) = pipeline.rows(torch.tensor([1]), pipeline.uniforms(7, np.arange(1)), pipeline.sampling, kept)
    assert np.array_equal(with_top, pipeline.decode(codes)) and not np.array_equal(with_top, without)


def test_a_failure_is_told_to_its_batch_and_the_next_is_drawn(batcher, pipeline):  # noqa: F811
    """A label out of range ends neither the thread nor anybody else's picture."""
    with pytest.raises(ValueError, match="the GPT knows classes 0 to 2"):
        last(batcher, 9, 0)
    with pytest.raises(UserError, match="9 images are asked for at once: give a number from 1 to 8"):
        last(batcher, 0, 0, 9)
    with pytest.raises(ZeroDivisionError):
        batcher.call(lambda: 1 / 0)
    assert np.array_equal(last(batcher, 0, 0), expected(pipeline, 0, 0)) and batcher.call(lambda: 5) == 5


def test_whoever_leaves_is_not_drawn_for(batcher, pipeline):  # noqa: F811
    """A closed page costs nothing."""
    release = hold(batcher)
    leaving = batcher.draw(torch.tensor([0]), np.arange(1), pipeline.sampling)
    threading.Thread(target=lambda: next(leaving, None), daemon=True).start()
    while not batcher._waiting:
        pass
    batcher._waiting[0].gone = True  # as the generator's end sets it
    release.set()
    assert np.array_equal(last(batcher, 1, 3), expected(pipeline, 1, 3)) and batcher.batches == [2]


def test_those_who_wait_at_the_end_are_told(pipeline):  # noqa: F811
    """Ctrl-C leaves nobody waiting for ever."""
    batcher = Batcher(pipeline)
    release = hold(batcher)
    with ThreadPoolExecutor(1) as people:
        asked = people.submit(last, batcher, 0, 0)
        while not batcher._waiting:
            pass
        threading.Timer(0.1, release.set).start()
        batcher.close()
        with pytest.raises(UserError, match="ask again later"):
            asked.result()
    with pytest.raises(UserError, match="being put away"):
        last(batcher, 0, 0)
