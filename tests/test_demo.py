"""The page: what its buttons give, in a browser and by ten programs at once, and what it says of mistakes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.serving import Batcher
from scripts import demo
from tests.conftest import REPOSITORY
from tests.test_bad_input import refused
from tests.test_pipeline import folder, pipeline  # noqa: F401
from tests.test_t2i_sampling import PROMPTS, world  # noqa: F401
from utils.pictures import image_grid

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
from scripts import demo_page  # noqa: E402  imports gradio

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OWN = (1.5, 3.0, 0.1, 1.0, 0)  # guidance from, to, attention weight, temperature, top-k: the model's own
MISTAKES = [
    ((7, 4, *OWN, 0), "class 7 is out of range"), (("ca", 4, *OWN, 0), "fits 2 classes (0 cat; 1 cable car, cable)"),
    (("zebra", 4, *OWN, 0), "is the name of no class"), ((None, 4, *OWN, 0), "there is no class yet"),
    ((0, 4, 3.0, 1.5, 0.1, 1.0, 0, 0), "--cfg-scale 3.0 1.5 is upside down"), ((0, 99, *OWN, 0), "greater than maximum"),
    ((0, 4, *OWN, None), "a number is missing")]


@pytest.fixture(scope="module")
def served(pipeline) -> Iterator[tuple[str, Batcher]]:  # noqa: F811
    """The page of the tiny models: its address, and who draws for it."""
    batcher = Batcher(pipeline)
    page = demo_page.build_page(batcher, "tiny")
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, theme=demo_page.THEME,
                                css=demo_page.CSS)
    yield address, batcher
    page.close()
    batcher.close()


def client(address: str) -> Any:
    """A program that uses the page."""
    return gradio_client.Client(address, verbose=False)


def pixels(path: str) -> np.ndarray:
    """A picture of the page: uint8 [H, W, 3]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def expected(pipeline: Pipeline, label: int, seed: int) -> np.ndarray:  # noqa: F811
    """Four samples as the page shows them, by the pipeline alone."""
    images = np.stack([np.asarray(image) for image in pipeline([label] * 4, seed=seed, progress=False)])
    return np.asarray(image_grid(images, 4, 192 // 32))


def test_ten_at_once_are_served_together(served, pipeline):  # noqa: F811
    """Everybody gets their own samples, nobody fails, and they do not wait for each other one by one."""
    address, batcher = served
    people, before = [client(address) for _ in range(10)], len(batcher.batches)
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda number: people[number].predict(number % 3, 4, *OWN, number, api_name="/sample"), range(10)))
    for number, path in enumerate(found):
        difference = pixels(path).astype(int) - expected(pipeline, number % 3, number)
        assert np.abs(difference).max() <= 1  # kernels of another batch size may round otherwise
    assert sum(batcher.batches[before:]) == 40 and len(batcher.batches) - before < 10


def test_the_grid_appears_while_it_is_drawn(served):
    """A person sees the first rows before the last are drawn."""
    job = client(served[0]).submit("Hund", 4, *OWN, 0, api_name="/sample")
    job.result()
    first, *_, last = map(pixels, job.outputs())
    grey = (first == 128).all(-1).mean()
    assert grey > 0.6 > (last == 128).all(-1).mean() + 0.5


def test_an_image_of_ones_own(served, pipeline, tmp_path):  # noqa: F811
    """Reconstruction by one and by both codebooks, the top of an image gone on from, and the map of guidance."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "own.png")
    own, image = gradio_client.handle_file(str(tmp_path / "own.png")), pixels(str(tmp_path / "own.png"))
    user = client(served[0])
    semantic, both = (pixels(path) for path in user.predict(own, api_name="/reconstruct"))
    codes = pipeline.encode(image)
    assert np.array_equal(both, np.asarray(image_grid(pipeline.decode(codes), 1, 6))) and not np.array_equal(semantic, both)
    edited = pixels(user.predict(own, 2, "Hund", 1, *OWN, 3, api_name="/edit"))
    completed = pipeline(["Hund"], seed=3, top=(Image.fromarray(image), 2), progress=False)
    assert np.array_equal(edited, np.asarray(image_grid(np.stack(completed), 1, 6)))
    guided = pixels(user.predict("cat", *OWN, 0, api_name="/guidance_map"))
    assert guided.shape[1] > 600 and len(np.unique(guided.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("arguments, words", MISTAKES)
def test_mistakes_are_one_sentence_on_the_page(served, arguments, words):
    """Whatever a program sends is checked as the command line is."""
    with pytest.raises(Exception, match=".") as told:
        client(served[0]).predict(*arguments, api_name="/sample")
    assert words in str(told.value) and "Traceback" not in str(told.value)


def test_a_picture_that_is_none_is_told(served, tmp_path):
    """The decoders of all other commands decide, and no path of this machine is told."""
    (tmp_path / "none.png").write_text("no picture")
    with pytest.raises(Exception, match="this file is no image that can be read: give a JPEG") as told:
        client(served[0]).predict(gradio_client.handle_file(str(tmp_path / "none.png")), api_name="/reconstruct")
    assert "/tmp" not in str(told.value)
    with pytest.raises(Exception, match="there is no image yet"):
        client(served[0]).predict(None, 2, 0, 1, *OWN, 0, api_name="/edit")


def test_captions_are_typed_where_the_model_takes_them(world):  # noqa: F811
    """The same page for a text model: a box for a sentence in the place of the list of classes."""
    model = Pipeline.from_pretrained(world["gpt"], world["tokenizer"], device="cpu")
    batcher = Batcher(model)
    page = demo_page.build_page(batcher, "text")
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        found = pixels(client(address).predict(PROMPTS[0], 2, 3.0, 3.0, 0.05, 1.0, 0, 0, api_name="/sample"))
        assert np.array_equal(found, np.asarray(image_grid(np.stack(model([PROMPTS[0]] * 2, progress=False)), 2, 6)))
        with pytest.raises(Exception, match="there is no caption yet"):
            client(address).predict("", 2, 3.0, 3.0, 0.05, 1.0, 0, 0, api_name="/sample")
    finally:
        page.close()
        batcher.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_person_clicks_and_sees(served, tmp_path):
    """The page in a browser: class by typing, samples, the map, an image of one's own, and a mistake."""
    sync_api = pytest.importorskip("playwright.sync_api")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "own.png")
    (tmp_path / "none.png").write_text("no picture")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(served[0])
        page.get_by_label(re.compile("^Class")).first.fill("hun")
        page.get_by_role("option", name="Hund").click()
        page.click("#sample")
        page.wait_for_selector("#samples img")
        page.click("#map")
        page.wait_for_selector("#guidance img")
        page.get_by_role("tab", name="Reconstruct").click()
        page.set_input_files("#own input[type=file]", tmp_path / "own.png")
        page.wait_for_selector("#own img")
        page.click("#reconstruct")
        page.wait_for_selector("#decoded1 img")
        page.get_by_role("tab", name="Edit").click()
        page.set_input_files("#begun input[type=file]", tmp_path / "own.png")
        page.wait_for_selector("#begun img")
        page.click("#edit")
        page.wait_for_selector("#edited img")
        page.get_by_role("tab", name="Reconstruct").click()
        page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
        page.set_input_files("#own input[type=file]", tmp_path / "none.png")
        page.wait_for_timeout(500)
        page.click("#reconstruct")
        page.get_by_text("this file is no image that can be read").wait_for()
        assert page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()


def test_the_command_serves_until_it_is_stopped(folder):  # noqa: F811
    """One command, an address to open, and Ctrl-C ends it without a traceback."""
    words = [sys.executable, "scripts/demo.py", "--gpt-ckpt", folder, "--vq-ckpt", folder, "--port", 0, "--device", "cpu"]
    process = subprocess.Popen([*map(str, words)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    told: list[str] = []
    for line in process.stderr:
        told.append(line)
        if found := re.search(r"the page is at (http://[\d.:]+)", line):
            assert pixels(client(found[1]).predict("cat", 1, *OWN, 0, api_name="/sample")).shape[0] > 100
            process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and not any("Traceback" in line for line in told), "".join(told)


def test_without_gradio_or_port_there_is_one_sentence(folder, monkeypatch, capsys):  # noqa: F811
    """The page is optional: its package is named; a taken port too."""
    models = ["--gpt-ckpt", folder, "--vq-ckpt", folder, "--device", "cpu"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be used" in refused(capsys, demo.main, *models, "--port", port)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "install it with `pip install gradio`" in refused(capsys, demo.main, *models)
