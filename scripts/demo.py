"""A page to try a model in the browser: sample, see where guidance acts, reconstruct an image of one's own, go on from one.

    python scripts/demo.py --gpt-ckpt runs/quickstart/gpt --vq-ckpt runs/quickstart/vq/dual     # http://127.0.0.1:7860

Classes are found by name, captions are typed where the model takes them.  Requests that come together are drawn together.  Needs
gradio (`pip install gradio`).
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

from autoregressive.models.ctf import FineOptions
from autoregressive.models.generate import SamplingOptions
from autoregressive.sample.model_options import ModelOptions, carried_options
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.serving import Batcher
from utils.config import Positive, UserError, interval, parse, run_main
from utils.distributed import setup
from utils.logs import set_up_logging
from utils.packages import require_package

log = logging.getLogger("demo")


@dataclass
class DemoConfig:
    """Options of the page."""

    models: ModelOptions
    sampling: SamplingOptions
    fine: FineOptions
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: reachable from other machines."""
    port: Annotated[int, interval(int, 0, 65_535)] = 7860
    """Port to listen at; 0: one that is free, from 7860 on."""
    largest_batch: Positive = 32
    """Images drawn at once, of all who wait."""


def carried(config: Any) -> dict[str, Any]:
    """Defaults of the command line: what the GPT's file carries; batches differ in size, and each would be compiled anew."""
    return carried_options(config) | {"decode": "eager"}


def main() -> None:
    """Parse options, load the models, serve the page until Ctrl-C."""
    config = parse(DemoConfig, carried)
    require_package("gradio", "the page")
    from scripts import demo_page  # imports gradio

    processes = setup(config.models.device)
    set_up_logging(processes)
    pipeline = Pipeline(config.models, config.sampling, config.fine, processes.device, condition="")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is there
    batcher = Batcher(pipeline, config.largest_batch)
    page = demo_page.build_page(batcher, Path(config.models.gpt_ckpt).name)
    try:
        _, address, _ = page.launch(server_name=config.host, server_port=config.port or None, prevent_thread_lock=True,
                                    quiet=True, theme=demo_page.THEME, css=demo_page.CSS)
        log.info("the page is at %s; Ctrl-C ends it", address)
        page.block_thread()
    except OSError as error:
        raise UserError(f"--port {config.port} cannot be used ({error}): give another one, or 0.") from error
    finally:
        batcher.close()
        processes.close()


if __name__ == "__main__":
    run_main(main)
