"""Time decoding and training of a GPT, and a tokenizer, beside the same weights in the structure of the published code.

    python scripts/benchmark.py decode      ms per cell, tokens/s, images/s
    python scripts/benchmark.py train       ms a forward and backward pass, tokens/s
    python scripts/benchmark.py tokenizer   ms to encode, decode and train on an image
    python scripts/benchmark.py extract     images/s of code extraction, from an npz to the folder
    python scripts/benchmark.py sample      images/s of sampling, from labels to an npz
    python scripts/benchmark.py evaluate    seconds of each of the evaluator's phases on random features
    NPROC=2 bash scripts/launch.sh scripts/benchmark.py checkpoint    seconds that a training (FSDP2) waits for a checkpoint

Prints JSON.  `ratio` is our time over the published structure's (`published_structure.py`).  Both are measured in turn in one
run, and the least of `--repeats` counts, because noise only adds time.  `fraction_of_floor` is a lower bound over our time: the
time that the arithmetic and the reading of weights would take at this machine's rates (`machine` in the output).
"""

import copy
import json
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from autoregressive.models.decode_modes import MODES
from autoregressive.models.generate import Decoder, Sampler, SamplingOptions, draw_uniforms, with_unconditional
from autoregressive.models.gpt import GPT, GPT_models, build_gpt, place
from autoregressive.models.losses import stream_losses
from autoregressive.sample.pipeline import load_in
from autoregressive.train.optimizers import make_optimizer
from evaluations.c2i.metrics import feature_statistics, frechet_distance, inception_score, precision_recall
from scripts import published_structure
from scripts.benchmark_commands import benchmark_extract, benchmark_sample
from scripts.benchmark_tokenizer import make_tokenizer, tokenizer_tasks
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.checkpoint import CheckpointWriter, RunRecord
from utils.config import Count, Device, Positive, choices, parse, require_multiple, run_main
from utils.distributed import Processes, parallelize, setup
from utils.optim import OptimOptions, uses_bf16
from utils.train_state import TrainState

TASKS = ("decode", "train", "tokenizer", "extract", "sample", "evaluate", "checkpoint")


@dataclass
class BenchmarkConfig:
    """Options of a benchmark."""

    task: tyro.conf.Positional[Annotated[str, choices(TASKS)]]
    """What to time."""
    gpt_model: Annotated[str, choices(GPT_models)] = "GPT-B"
    """Size of the GPT."""
    image_size: Positive = 256
    """Side of the images; 256 is 16x16 cells."""
    paradigm: Annotated[str, choices(("hierarchical", "single"))] = "hierarchical"
    """IAR2's prediction, or LlamaGen's (which has no published structure to compare with here)."""
    vq_model: Annotated[str, choices(VQ_models)] = "VQ-16"
    """Preset of the tokenizer."""
    batch_size: Count = 0
    """Images at once; 0: 4 to decode and sample, with guidance, 2 to train, 1 to pass a tokenizer."""
    images: Count = 0
    """Extract, sample: images in all; 0: 4 of them on a CPU, 2,048 on a GPU."""
    cells: Count = 32
    """Decode: cells timed, from the first on; 0, or more than there are: the whole grid."""
    repeats: Positive = 5
    """Timings of which the least counts."""
    precision: Annotated[str, choices(("auto", "bf16", "float32"))] = "auto"
    """auto: bf16 on GPUs; to decode also on CPUs that compute in it, as the samplers do."""
    decode: Annotated[str, choices(("auto", *MODES))] = "auto"
    """Decode: how, as the samplers' option."""
    device: Device = "auto"
    """auto: CUDA where there is any."""


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def in_turn(timers: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The least that each timer returns, called in turn after one round to warm up."""
    rounds = [{name: timer() for name, timer in timers.items()} for _ in range(repeats + 1)]
    return {name: min(taken[name] for taken in rounds[1:] or rounds) for name in timers}


def machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What the machine does at best: TFLOP/s of a square matrix product, GB/s of reading memory."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    big = torch.randn(2**27 if device.type == "cuda" else 2**25, device=device)
    taken = in_turn({"product": lambda: seconds(lambda: a @ b, device), "read": lambda: seconds(big.sum, device)}, 5)
    return {"tflops": 2 * side**3 / taken["product"] / 1e12, "gigabytes_per_second": 4 * big.numel() / taken["read"] / 1e9}


def make_gpt(config: BenchmarkConfig, device: torch.device) -> GPT:
    """A randomly initialised GPT."""
    torch.manual_seed(0)
    sizes = (16384,) if config.paradigm == "single" else (256, 4096)
    gpt = build_gpt(config.gpt_model, grid_size=config.image_size // 16, paradigm=config.paradigm, codebook_sizes=sizes)
    for output in gpt.paradigm.output_layers():
        torch.nn.init.normal_(next(output.parameters()), std=0.02)
    return gpt.to(device)


def multiplications(gpt: GPT) -> int:
    """Multiplications for one cell: the entries of all matrices, those of the head's layers once for each slot."""
    slots = len(gpt.config.codebook_sizes) + 1
    return sum(parameter.numel() * (slots if name.startswith("paradigm.head.layers") else 1)
               for name, parameter in gpt.named_parameters() if parameter.ndim == 2 and "embedding" not in name)


def benchmark_decode(config: BenchmarkConfig, gpt: GPT, device: torch.device, rates: dict[str, float]) -> dict[str, Any]:
    """Decode the first cells with guidance, ours and the published structure in turn."""
    batch, cells = config.batch_size or 4, min(config.cells or gpt.config.cells, gpt.config.cells)
    gpt.eval().requires_grad_(False)
    labels = torch.arange(batch, device=device)
    uniforms = draw_uniforms(0, np.arange(batch), len(gpt.config.codebook_sizes), gpt.config.cells).to(device)
    options = SamplingOptions(cfg_scale=(1.75, 2.5))

    decoder = Decoder(gpt, config.decode)

    def ours() -> float:
        with closing(decoder.steps(labels, options, uniforms)) as steps:
            return seconds(lambda: deque(islice(steps, cells), maxlen=0), device)

    def published(gpt: GPT) -> float:
        sampler = Sampler(gpt, options, uniforms)
        decoder, rows = published_structure.Decoder(gpt, 2 * len(labels)), with_unconditional(gpt, labels)
        return seconds(lambda: decoder.run(gpt.condition.tokens(rows)[:, 0], cells, sampler), device)

    timers = {"ours": ours}
    if config.paradigm == "hierarchical":
        timers["published"] = lambda: published(gpt)
        if gpt.paradigm.norm.weight.dtype != torch.float32:
            single = place(copy.deepcopy(gpt), device, torch.float32)
            timers["published_float32"] = lambda: published(single)
    with torch.inference_mode():
        taken = in_turn(timers, config.repeats)
    a_cell = {name: value / cells for name, value in taken.items()}
    weights, size = multiplications(gpt), gpt.paradigm.norm.weight.element_size()
    floor = max(2 * weights * 2 * batch / (rates["tflops"] * 1e12), weights * size / (rates["gigabytes_per_second"] * 1e9))
    return {"ms_per_cell": 1e3 * a_cell["ours"], "tokens_per_second": len(gpt.config.codebook_sizes) * batch / a_cell["ours"],
            "images_per_second": batch / (a_cell["ours"] * gpt.config.cells), "batch_size": batch, "cells": cells,
            "fraction_of_floor": floor / a_cell["ours"], **compare(a_cell, "ms_per_cell")}


def compare(taken: dict[str, float], unit: str) -> dict[str, float]:
    """The published structure's time and the ratio to it, where it was measured, in our precision and in float32."""
    others = {name: name.replace("published", "ratio") for name in taken if name != "ours"}
    return {f"{name}_{unit}": 1e3 * taken[name] for name in others} | {
        ratio: taken["ours"] / taken[name] for name, ratio in others.items()}


def benchmark_train(config: BenchmarkConfig, gpt: GPT, device: torch.device, rates: dict[str, float],
                    bf16: bool) -> dict[str, Any]:
    """Forward and backward pass of whole grids, ours and the published structure in turn."""
    batch, shape = config.batch_size or 2, gpt.config
    gpt.train()
    labels = torch.arange(batch, device=device)
    codes = torch.stack([torch.randint(size, (batch, shape.cells), device=device) for size in shape.codebook_sizes], 1)

    def step(forward: Callable[[GPT, Tensor, Tensor], list[Tensor]], low: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            loss, _ = stream_losses(forward(gpt, labels, codes), codes, (1.0,) * len(shape.codebook_sizes))
        loss.backward()

    def timer(forward: Callable[[GPT, Tensor, Tensor], list[Tensor]], low: bool = bf16) -> float:
        gpt.zero_grad(set_to_none=True)
        return seconds(lambda: step(forward, low), device)

    timers = {"ours": lambda: timer(GPT.__call__)}
    if config.paradigm == "hierarchical":
        timers["published"] = lambda: timer(published_structure.forward)
        if bf16:
            timers["published_float32"] = lambda: timer(published_structure.forward, low=False)
    taken = in_turn(timers, config.repeats)
    floor = 6 * multiplications(gpt) * batch * shape.cells / (rates["tflops"] * 1e12)
    return {"ms_per_step": 1e3 * taken["ours"],
            "tokens_per_second": len(shape.codebook_sizes) * batch * shape.cells / taken["ours"],
            "batch_size": batch, "fraction_of_floor": floor / taken["ours"], **compare(taken, "ms_per_step")}


def benchmark_tokenizer(config: BenchmarkConfig, device: torch.device, bf16: bool) -> dict[str, Any]:
    """Encoding, decoding and training of a tokenizer, ours and as published in turn."""
    batch, model = config.batch_size or 1, make_tokenizer(config.vq_model, device)
    images = torch.rand(batch, 3, config.image_size, config.image_size, device=device) * 2 - 1
    figures: dict[str, Any] = {"vq_model": config.vq_model, "batch_size": batch}
    for name, ways in tokenizer_tasks(model, images, device, bf16).items():
        taken = in_turn({way: partial(seconds, work, device) for way, work in ways.items()}, config.repeats)
        figures |= {f"{name}_ms": 1e3 * taken["ours"], f"{name}_images_per_second": batch / taken["ours"],
                    f"{name}_published_ms": 1e3 * taken["published"], f"{name}_ratio": taken["ours"] / taken["published"]}
    return figures


def benchmark_commands(config: BenchmarkConfig, gpt: GPT, processes: Processes) -> dict[str, float]:
    """Whole commands, from files to files: extraction with ten crops, or sampling with guidance."""
    tokenizer = make_tokenizer(config.vq_model, processes.device)
    images, batch = config.images or (2048 if processes.device.type == "cuda" else 4), config.batch_size or 4
    if config.task == "extract":
        return benchmark_extract(tokenizer, images, config.image_size, config.precision, processes)
    words = ["--precision", config.precision, "--decode", config.decode]
    return benchmark_sample(gpt, tokenizer, images, batch, words, processes)


def benchmark_evaluate(config: BenchmarkConfig, device: torch.device) -> dict[str, float]:
    """The evaluator's phases after the network, on 10,000 random rows (the inception score: 50,000)."""
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(10_000, 2048, generator=generator).square() for _ in range(2))
    probabilities = torch.randn(50_000, 1008, generator=generator).softmax(-1)
    statistics = *feature_statistics(real), *feature_statistics(fake)
    return in_turn({
        "mean_and_covariance": lambda: seconds(lambda: feature_statistics(real), device),
        "frechet_distance": lambda: seconds(lambda: frechet_distance(*statistics), device),
        "precision_recall": lambda: seconds(lambda: precision_recall(real, fake, device=device), device),
        "inception_score": lambda: seconds(lambda: inception_score(probabilities), device)}, config.repeats - 1)


def benchmark_checkpoint(config: BenchmarkConfig, gpt: GPT, processes: Processes) -> dict[str, float]:
    """Seconds that a sharded training waits: for a whole checkpoint, and for one that is written beside it."""
    model = parallelize(gpt, gpt.blocks, "fsdp", processes, bf16=False)
    training = TrainState(model, make_optimizer(gpt, OptimOptions()), None)
    with TemporaryDirectory() as folder:
        places = [folder]
        dist.broadcast_object_list(places)
        writer = CheckpointWriter(Path(places[0]), RunRecord("gpt", {}, {}, {}, ()), processes)
        taken: dict[str, list[float]] = {"whole": [], "beside": []}
        for step in range(config.repeats):
            processes.barrier()
            start = time.perf_counter()
            writer.save(step, training.state_dict(), 1, {})
            taken["beside"].append(time.perf_counter() - start)
            writer.finish()
            taken["whole"].append(time.perf_counter() - start)
        processes.barrier()
    whole, beside = (min(taken[name]) for name in ("whole", "beside"))
    return {"whole_seconds": whole, "beside_seconds": beside, "ratio": beside / whole, "processes": processes.world_size}


def peak_memory(device: torch.device) -> float:
    """Peak GiB of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Parse options, measure, print JSON."""
    config = parse(BenchmarkConfig)
    require_multiple("--image-size", config.image_size, 16, "the tokenizers' downsampling")
    processes = setup(config.device)
    device = processes.device
    gpt = make_gpt(config, device)
    if config.task == "decode":
        gpt = load_in(config.precision, gpt, device)
    bf16 = uses_bf16(config.precision, device) or gpt.paradigm.norm.weight.dtype == torch.bfloat16
    rates = machine_rates(device, torch.bfloat16 if bf16 else torch.float32)
    figures = {
        "decode": lambda: benchmark_decode(config, gpt, device, rates),
        "train": lambda: benchmark_train(config, gpt, device, rates, bf16),
        "tokenizer": lambda: benchmark_tokenizer(config, device, bf16),
        "extract": lambda: benchmark_commands(config, gpt, processes),
        "sample": lambda: benchmark_commands(config, gpt, processes),
        "evaluate": lambda: benchmark_evaluate(config, device),
        "checkpoint": lambda: benchmark_checkpoint(config, gpt, processes),
    }[config.task]()
    about = {"task": config.task, "gpt_model": config.gpt_model, "paradigm": config.paradigm, "device": str(device),
             "precision": "bf16" if bf16 else "float32", "threads": torch.get_num_threads(), "torch": torch.__version__}
    if processes.is_main:
        print(json.dumps(about | figures | {"peak_memory_gib": peak_memory(device), "machine": rates}, indent=1))
    processes.close()


if __name__ == "__main__":
    run_main(main)
