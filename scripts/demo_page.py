"""What the page shows and what its buttons do; `demo.py` serves it.

Whatever a person or a program sends is checked as the command line's options are; a mistake is one sentence on the page.
"""

import functools
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from autoregressive.models.generate import SamplingOptions, cfg_ranges
from autoregressive.models.guidance import GUIDANCE
from autoregressive.sample.guidance_map import draw, has_map, measure
from autoregressive.sample.pipeline import check_sampling, with_options
from autoregressive.sample.serving import Batcher
from utils.config import UserError
from utils.image_source import DECODER_ERRORS, decode
from utils.pictures import image_grid

_SIDE = 192  # pixels that an image of the page has at least

CSS = ".gradio-container {max-width: 1100px !important}"
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # others would be fetched from elsewhere


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose mistakes of the user are shown on the page."""
    @functools.wraps(function)
    def handler(*arguments: Any) -> Iterator[Any]:
        try:
            yield from function(*arguments)
        except (UserError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return handler


def read_picture(path: str | None) -> np.ndarray:
    """An uploaded image: uint8 [H, W, 3]; raises UserError for what is none."""
    if not path:
        raise UserError("there is no image yet: drop one on the page, or choose a file.")
    try:
        return decode(Path(path))
    except DECODER_ERRORS as error:
        raise UserError("this file is no image that can be read: give a JPEG, PNG, WebP, BMP or GIF.") from error


class Page:
    """The handlers of the page, on one model."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher, self.pipeline = batcher, batcher.pipeline
        self.by_class = self.pipeline.gpt.config.condition == "class"
        self.side = self.pipeline.gpt.config.grid_size

    def options(self, *controls: float | None) -> SamplingOptions:
        """The sampling options of the page's controls; raises UserError for values that make no sense."""
        if None in controls:
            raise UserError("a number is missing: fill in every field.")
        start, end, weight, temperature, top_k, seed = (value or 0 for value in controls)
        constant = self.pipeline.sampling.guidance == "constant"
        changes: dict[str, Any] = {"cfg_scale": (float(start),) if constant else (float(start), float(end)), "seed": int(seed),
                                   "temperature": (float(temperature),), "top_k": (int(top_k),)}
        if GUIDANCE[self.pipeline.sampling.guidance].reads_weight:
            changes["cfg_attention_weight"] = float(weight)
        sampling = with_options(self.pipeline.sampling, changes)
        check_sampling(sampling, self.pipeline.gpt)
        return sampling

    def grid(self, images: np.ndarray) -> Image.Image:
        """Images [n, S, S, 3] in one picture, small ones enlarged."""
        columns = min(len(images), 4 if len(images) % 4 == 0 or len(images) > 4 else len(images))
        return image_grid(images, columns, max(1, _SIDE // images.shape[1]))

    def sample(self, wanted: Any, count: float, *controls: float) -> Iterator[Image.Image]:
        """Samples of a class or caption, as they are drawn."""
        sampling, samples = self.options(*controls), np.arange(int(count))
        given = self.given(wanted, samples)
        for images in self.batcher.draw(given, samples, sampling):
            yield self.grid(images)

    def given(self, wanted: Any, samples: np.ndarray) -> Any:
        """What the model is told of each sample; raises UserError for no class or caption."""
        if wanted in (None, ""):
            raise UserError(f"there is no {'class' if self.by_class else 'caption'} yet: choose or type one.")
        if self.by_class:
            return self.pipeline.conditions([wanted] * len(samples))(samples)
        return self.batcher.call(lambda: self.pipeline.conditions([wanted] * len(samples))(samples))

    def guidance_map(self, wanted: Any, *controls: float) -> Iterator[Image.Image]:
        """The first sample with the attention to its condition and its guidance scale, cell by cell."""
        sampling, samples = self.options(*controls), np.arange(1)
        given = self.given(wanted, samples)
        found = self.batcher.call(lambda: measure(self.pipeline, given, self.pipeline.uniforms(sampling.seed, samples), sampling))
        buffer = BytesIO()
        draw(found, [""]).savefig(buffer, format="png", dpi=110)
        yield Image.open(buffer)

    def reconstruct(self, path: str | None) -> Iterator[tuple[Image.Image, ...]]:
        """An image as the tokenizer sees it, from its semantic codes alone where there are others, and from all codes."""
        picture = read_picture(path)

        def decoded() -> list[np.ndarray]:
            codes = self.pipeline.encode(picture)
            return [self.pipeline.decode(codes[:, :streams])[0] for streams in range(1, codes.shape[1] + 1)]

        yield tuple(self.grid(image[None]) for image in self.batcher.call(decoded))

    def edit(self, path: str | None, rows: float, wanted: Any, count: float, *controls: float) -> Iterator[Image.Image]:
        """Samples that keep the top rows of an image, as they are drawn."""
        picture, sampling, samples = read_picture(path), self.options(*controls), np.arange(int(count))
        given = self.given(wanted, samples)
        kept = self.batcher.call(lambda: self.pipeline.top_codes(picture, int(rows))).expand(len(samples), -1, -1)
        for images in self.batcher.draw(given, samples, sampling, kept):
            yield self.grid(images)


def condition_control(page: Page) -> Any:
    """Where a class is searched by name, or a caption is typed."""
    if not page.by_class:
        return gr.Textbox(label="Caption", placeholder="a photograph of ...", lines=2)
    names = page.pipeline.spoken_names
    return gr.Dropdown([(name, label) for label, name in enumerate(names)], value=0, filterable=True, allow_custom_value=True,
                       label=f"Class ({len(names)}, type to search)")


def own_image(name: str) -> Any:
    """Where a person drops an image; name: of the element."""
    image = gr.Image(label="Your image (its centre square)", type="filepath", sources=["upload", "clipboard"], elem_id=name,
                     height=260)
    # Handed on as it came: the decoders of all other commands find out whether it is an image, and have a sentence for it.
    vars(image)["preprocess"] = lambda payload: None if payload is None else payload.path
    return image


def sampling_controls(page: Page) -> list[Any]:
    """Controls of guidance and randomness, at the model's own values."""
    sampling = page.pipeline.sampling
    start, end = cfg_ranges(sampling, page.pipeline.gpt)[0]
    constant, highest = sampling.guidance == "constant", max(10, end)
    with gr.Accordion("Guidance and randomness", open=False):
        with gr.Row():
            low = gr.Slider(0, highest, start, step=0.05, label="Guidance scale" + ("" if constant else ", first cell"))
            high = gr.Slider(0, highest, end, step=0.05, label="Guidance scale, last cell", visible=not constant)
            weight = gr.Slider(0, 2, min(sampling.cfg_attention_weight, 2), step=0.05, label="Attention weight",
                               visible=GUIDANCE[sampling.guidance].reads_weight)
        with gr.Row():
            temperature = gr.Slider(0, 2, min(sampling.temperature[0], 2), step=0.05, label="Temperature")
            top_k = gr.Number(sampling.top_k[0], label="Top-k (0: all)", precision=0, minimum=0)
            seed = gr.Number(sampling.seed, label="Seed", precision=0, minimum=0)
    return [low, high, weight, temperature, top_k, seed]


def sample_tab(page: Page, largest: int) -> None:
    """Draw, and see where guidance acted."""
    with gr.Row():
        with gr.Column(scale=1):
            wanted = condition_control(page)
            count = gr.Slider(1, largest, min(4, largest), step=1, label="Images")
            controls = sampling_controls(page)
            go = gr.Button("Sample", variant="primary", elem_id="sample")
            show = gr.Button("Where guidance acts", elem_id="map", visible=has_map(page.pipeline))
        with gr.Column(scale=2):
            picture = gr.Image(show_label=False, format="png", interactive=False, elem_id="samples")
            guided = gr.Image(show_label=False, format="png", interactive=False, elem_id="guidance",
                              visible=has_map(page.pipeline))
    go.click(told(page.sample), [wanted, count, *controls], picture, api_name="sample", concurrency_limit=None)
    if has_map(page.pipeline):
        show.click(told(page.guidance_map), [wanted, *controls], guided, api_name="guidance_map", concurrency_limit=None)


def reconstruct_tab(page: Page) -> None:
    """An image of one's own through the tokenizer."""
    streams = len(page.pipeline.tokenizer.config.codebook_sizes)
    titles = ["From all codes"] if streams == 1 else ["From semantic codes alone", "From semantic and detail codes"]
    with gr.Row():
        given = own_image("own")
        shown = [gr.Image(label=title, format="png", interactive=False, elem_id=f"decoded{number}")
                 for number, title in enumerate(titles)]
    gr.Button("Reconstruct", variant="primary", elem_id="reconstruct").click(
        told(page.reconstruct), given, shown, api_name="reconstruct", concurrency_limit=None)


def edit_tab(page: Page, largest: int) -> None:
    """Go on from the top of an image."""
    with gr.Row():
        with gr.Column(scale=1):
            given = own_image("begun")
            rows = gr.Slider(0, page.side, page.side // 2, step=1, label=f"Rows to keep, of {page.side}")
            wanted = condition_control(page)
            count = gr.Slider(1, largest, min(4, largest), step=1, label="Images")
            controls = sampling_controls(page)
            go = gr.Button("Go on from its top", variant="primary", elem_id="edit")
        picture = gr.Image(show_label=False, format="png", interactive=False, elem_id="edited", scale=2)
    go.click(told(page.edit), [given, rows, wanted, count, *controls], picture, api_name="edit", concurrency_limit=None)


def build_page(batcher: Batcher, name: str) -> gr.Blocks:
    """The page of a model; name: what to call it."""
    page, largest = Page(batcher), min(16, batcher.largest)
    gpt, pixels = page.pipeline.gpt, page.pipeline.image_size
    size = f"{sum(parameter.numel() for parameter in gpt.parameters()) / 1e6:.1f}M parameters"
    with gr.Blocks(title=name, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {name}\n{gpt.provenance.gpt_model or 'GPT'}, {size}, {gpt.config.paradigm} prediction, "
                    f"{page.side}x{page.side} cells, {pixels} pixels, {page.pipeline.sampling.guidance} guidance")
        with gr.Tab("Sample"):
            sample_tab(page, largest)
        with gr.Tab("Reconstruct"):
            reconstruct_tab(page)
        with gr.Tab("Edit"):
            edit_tab(page, largest)
    return blocks.queue(default_concurrency_limit=None, max_size=1000)
