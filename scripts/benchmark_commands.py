"""Time whole commands on random weights and images: `benchmark.py extract` and `benchmark.py sample`.

What they take beside the networks (loading, cropping, copying, writing) is part of the figure.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from autoregressive.models.gpt import GPT
from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.model_options import carried_options
from autoregressive.sample.pipeline import Pipeline
from autoregressive.train import extract_codes_c2i
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.checkpoint import export, fingerprint
from utils.config import parse
from utils.distributed import Processes

IMAGES_50K = 50_000  # images of a published evaluation


def export_tokenizer(tokenizer: VQModel, folder: Path) -> Path:
    """A tokenizer as training exports it."""
    tensors = tokenizer.state_dict()
    export(folder / "tokenizer.safetensors", "tokenizer", tensors,
           {"model": asdict(tokenizer.config), "stage": "dual", "fingerprint": fingerprint(tensors)})
    return folder / "tokenizer.safetensors"


def benchmark_extract(tokenizer: VQModel, images: int, side: int, precision: str, processes: Processes) -> dict[str, float]:
    """Images a second from an npz of larger pictures to ten crops' codes on the disk."""
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures = rng.integers(0, 256, (images, side * 5 // 4, side * 3 // 2, 3), dtype=np.uint8)
        np.savez(folder / "images.npz", images=pictures, labels=np.arange(images) % 10)
        vq_ckpt = export_tokenizer(tokenizer, folder)
        taken = []
        for name in ("first", "second"):  # the first run warms up
            words = f"--data-path {folder}/images.npz --vq-ckpt {vq_ckpt} --image-size {side} --precision {precision}"
            config = parse(extract_codes_c2i.ExtractConfig, args=[*words.split(), "--code-path", str(folder / name)])
            started = time.perf_counter()
            extract_codes_c2i.extract(config, processes)
            taken.append(time.perf_counter() - started)
    return {"images": images, "images_per_second": images / taken[1], "crops_per_second": 10 * images / taken[1]}


def benchmark_sample(gpt: GPT, tokenizer: VQModel, images: int, batch_size: int, words: list[str],
                     processes: Processes) -> dict[str, float]:
    """Images a second from labels to an npz, with guidance; words: more options of the sampler."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vq_ckpt = export_tokenizer(tokenizer, folder)
        export(folder / "gpt.safetensors", "gpt", gpt.state_dict(), {"model": asdict(gpt.config), "image_size": 256})
        args = f"--gpt-ckpt {folder} --vq-ckpt {vq_ckpt} --cfg-scale 1.75 2.5 --batch-size {batch_size}"
        config = parse(sample_c2i_ddp.SampleConfig, carried_options, [*args.split(), *words])
        pipeline, rates = Pipeline(config.models, config.sampling, config.fine, processes.device), []
        for name, count in (("first", 2 * batch_size), ("second", images)):  # the first run warms up
            config = replace(config, num_samples=count, out=folder / f"{name}.npz")
            started = time.perf_counter()
            sample_c2i_ddp.write_samples(config, pipeline, None, processes)
            rates.append(count / (time.perf_counter() - started))
    return {"images": images, "batch_size": batch_size, "images_per_second": rates[1],
            "hours_for_50k": IMAGES_50K / rates[1] / 3600}
