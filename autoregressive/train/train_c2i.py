"""Train a GPT on extracted codes, from classes or captions: one loop for one device, DDP, FSDP2 and HSDP.

Paper section 4.3.3 (equation 14) and table 11, whose rows `--gpt-model` and the number of cells select (`options.py`); a
typed flag wins over the recipe.  No step waits for the device: metrics are read when they are logged, and a step whose gradients
are not finite is left out on the device itself.
"""

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.utils.data import DataLoader

from autoregressive.models.conditions import each
from autoregressive.models.gpt import GPT, GPTProvenance
from autoregressive.models.guidance import sampling_preset
from autoregressive.models.losses import objective
from autoregressive.models.order import draw_orders, random_share
from autoregressive.models.transformer import GPTConfig
from autoregressive.train.dry_run import print_dry_run
from autoregressive.train.estimate import fitted, measure
from autoregressive.train.evaluate_c2i import evaluate, open_held_out
from autoregressive.train.initial import start_from
from autoregressive.train.optimizers import make_optimizer
from autoregressive.train.options import (
    FIXED_OPTIONS,
    MODEL_FLAGS,
    TrainConfig,
    check_codes,
    gpt_config,
    mapped_header,
    recipe,
    told,
)
from autoregressive.train.preview import open_preview
from autoregressive.train.sources import find_source
from utils.batches import GlobalBatches, StepPlan, plan_steps
from utils.checkpoint import RunRecord, export
from utils.code_map import CodeMap
from utils.code_shards import CodeHeader
from utils.config import UserError, parse, run_main, to_dict
from utils.devices import compile_layers, compiles, loader_processes, memory_bytes, peak_flops
from utils.distributed import Processes, parallelize, setup, synchronize_gradients
from utils.ema import EMA
from utils.initial import Start
from utils.logs import set_up_logging
from utils.optim import clip_gradients, learning_rate, set_learning_rate, step_if_finite, trains_in_bf16
from utils.run import Run, Work, first_line
from utils.signals import ignore_in_worker
from utils.text_encoders import encoder_facts
from utils.train_state import TrainState

log = logging.getLogger("train_c2i")


def set_up(config: TrainConfig, model_config: GPTConfig, start: Start, processes: Processes) -> tuple[GPT, TrainState]:
    """The GPT and its training state before the first step; every process draws, or takes, the same initial weights."""
    torch.manual_seed(config.run.seed)
    gpt = GPT(model_config)
    start.load(gpt)
    gpt.activation_checkpointing = config.parallel.activation_checkpointing
    gpt.to(processes.device)
    if compiles(config.parallel.compile, processes.device):
        compile_layers(gpt.blocks)
    bf16 = trains_in_bf16(config.optim.mixed_precision, processes.device)
    model = parallelize(gpt, gpt.blocks, config.parallel.data_parallel, processes, bf16, config.parallel.shard_size)
    optimizer = make_optimizer(gpt, config.optim, config.optimizer)
    ema = EMA(gpt, config.optim.ema_decay) if config.optim.ema_decay else None
    return gpt, TrainState(model, optimizer, ema)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """bf16 where asked for; sharded models cast their parameters themselves."""
    enabled = trains_in_bf16(config.optim.mixed_precision, device) and not config.parallel.sharded
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def step_orders(config: TrainConfig, model: GPTConfig, plan: StepPlan, step: int,
                processes: Processes) -> Sequence[Tensor | None]:
    """For each micro-batch of a step the order of its grids [B, N], or None where the GPT knows raster alone."""
    if model.order == "raster":
        return [None] * plan.accumulation
    share = random_share(step / plan.total_steps, config.gpt.order_anneal)
    return draw_orders(share, model.cells, plan, config.run.seed, step, processes)


def scheduled(config: TrainConfig, plan: StepPlan, step: int) -> dict[str, float]:
    """What else changes along a training: r, the probability of a random order, where the GPT knows other orders."""
    share = random_share(step / plan.total_steps, config.gpt.order_anneal)
    return {} if config.gpt.order == "raster" else {"random_order": share}


def train_step(gpt: GPT, training: TrainState, loader: Iterator[tuple[Any, ...]], plan: StepPlan, config: TrainConfig,
               run: Run, step: int) -> None:
    """One optimizer step over the micro-batches of a global batch (equation 14); batches are those of `sources.py`."""
    device, orders = run.processes.device, step_orders(config, gpt.config, plan, step, run.processes)
    for micro in range(plan.accumulation):
        with run.timed("data"):
            batch = next(loader)
        codes, given, *valid = (each(lambda part: part.to(device, non_blocking=True), field) for field in batch)
        synchronize_gradients(training.model, last=micro == plan.accumulation - 1)
        with autocast(config, device):
            logits = training.model(given, codes, orders[micro])
            loss, parts = objective(logits, gpt.paradigm.targets(codes), config.objective, *valid)
        (loss / plan.accumulation).backward()
        run.metrics.add(parts)
    norm = clip_gradients(training.model.parameters(), config.optim.max_grad_norm)
    run.watch_gradient(norm)
    step_if_finite(training.optimizer, norm)
    if training.ema:
        training.ema.update(step)
    training.optimizer.zero_grad(set_to_none=True)
    run.metrics.add({"gradient_norm": norm})


def provenance(config: TrainConfig, model: GPTConfig, header: CodeHeader, code_map: CodeMap | None,
               encoder: str = "") -> GPTProvenance:
    """What the exported file will say about the GPT beside its configuration; encoder: that of its captions."""
    preset = sampling_preset(config.gpt.gpt_model, len(model.codebook_sizes), model.grid_size, config.recipe, model.condition)
    about = GPTProvenance(config.gpt.gpt_model, header.tokenizer, header.image_size, tuple(header.class_names),
                          ema=config.optim.ema_decay, sampling=preset, encoder=encoder)
    if code_map and code_map.coarse:
        about.coarse, about.coarse_of = code_map.coarse, tuple(code_map.table[:, 0].tolist())
    return about


def run_record(config: TrainConfig, model: GPTConfig, about: GPTProvenance, header: CodeHeader, start: Start) -> RunRecord:
    """What a checkpoint says of the run, and what must be the same on resume."""
    data = start.facts | {"tokenizer": header.tokenizer, "images_checksum": header.images_checksum}
    data |= encoder_facts(about.encoder)  # checkpoints from before they were recorded are taken for these
    return RunRecord("gpt", model=to_dict(model) | data | {"coarse": about.coarse},
                     defaults=to_dict(GPTConfig()) | data | {"coarse": ""}, options=to_dict(config), fixed=FIXED_OPTIONS,
                     export=to_dict(about) | {"model": to_dict(model)}, flags=MODEL_FLAGS)


@dataclass
class HeldOut:
    """Codes that are not trained on, and the fewest bits per image that they had so far."""

    codes: Any  # a data set of `sources.py`
    batch_size: int
    fewest_bits: float = math.inf


def open_validation(config: TrainConfig, model: GPTConfig, about: GPTProvenance, plan: StepPlan) -> HeldOut | None:
    """The codes of --val-code-path; raises UserError where they do not fit, or where --keep-best has none to go by."""
    codes = config.codes
    if codes.val_code_path:
        return HeldOut(open_held_out(model, about, "this run", codes.val_code_path, codes.code_map, "--val-code-path"),
                       plan.micro_batch)
    if codes.keep_best:
        raise UserError("--keep-best chooses by held-out codes: give --val-code-path too.")
    return None


def evaluate_held_out(gpt: GPT, training: TrainState, held_out: HeldOut, config: TrainConfig, run: Run, step: int) -> None:
    """Log the likelihood of held-out codes under the averaged (or, without averaging, the present) weights."""
    training.model.eval()
    with run.timed("evaluation"), training.averaged(), autocast(config, run.processes.device):
        figures = evaluate(gpt, held_out.codes, held_out.batch_size, run.processes)
    training.model.train()
    run.write_evaluation(step, figures)
    if config.codes.keep_best and figures["bits_per_image"] < held_out.fewest_bits:
        held_out.fewest_bits = figures["bits_per_image"]
        export_gpt(training, run, step + 1, run.folder / "best")


def export_gpt(training: TrainState, run: Run, step: int, folder: Path) -> None:
    """Write gpt.safetensors into `folder`, averaged weights where averaging is on."""
    with run.timed("checkpoint"), training.averaged():
        tensors: dict[str, Any] = get_model_state_dict(training.model)
        export(folder / "gpt.safetensors", "gpt", tensors, run.record.export | {"step": step}, run.processes)


def plan_work(config: TrainConfig, model: GPTConfig, processes: Processes) -> tuple[TrainConfig, Work]:
    """The options with the micro-batch that fits the device, where it is left to us, and what one image costs."""
    device, devices, bf16 = processes.device, config.devices, trains_in_bf16(config.optim.mixed_precision, processes.device)
    footprint, peak = measure(model, bf16), peak_flops(device, devices.peak_tflops)
    if device_bytes := memory_bytes(device, devices.device_memory):
        config = fitted(config, footprint, processes.world_size, device_bytes, bf16)
    # Backward costs twice the forward pass; recomputation does not count as use.
    return config, Work(len(model.codebook_sizes) * model.grid_size**2, 3 * footprint.flops,
                        peak and peak * processes.world_size)


def announce(config: TrainConfig, gpt: GPT, images: int, plan: StepPlan, processes: Processes) -> None:
    """Log what is trained, on what, for how long and where."""
    of = "captions" if gpt.config.condition == "text" else f"{gpt.config.num_classes} classes"
    parameters = sum(p.numel() for p in gpt.parameters())
    log.info(first_line(config.gpt.gpt_model, images, of, parameters, plan, processes, config.parallel.data_parallel))


def train(config: TrainConfig, processes: Processes) -> None:
    """Train to the end, resuming where an earlier run of the same folder stopped."""
    header, code_map = mapped_header(config.codes)
    condition = told(config)
    model_config = gpt_config(config.gpt, tuple(header.codebook_sizes), code_map, condition.fields)
    check_codes(config, model_config, header)
    config, work = plan_work(config, model_config, processes)
    source = find_source(model_config.condition)
    dataset = source.dataset(*config.codes.code_path, seed=config.run.seed, transform=code_map.apply if code_map else None,
                             **source.chosen(config.captions))
    plan = plan_steps(config.batch, len(dataset), processes.world_size)
    about = provenance(config, model_config, header, code_map, condition.encoder)
    start = start_from(config.init_from, config.init_strict, model_config, about)
    held_out = open_validation(config, model_config, about, plan)
    preview = open_preview(config.preview, model_config, about, dataset, config.run.seed, processes)
    run = Run(config.run, run_record(config, model_config, about, header, start), processes, plan.total_steps, work)
    gpt, training = set_up(config, model_config, start, processes)
    announce(config, gpt, len(dataset), plan, processes)
    first_step = run.resume(training)
    if first_step == 0 and start.text:
        log.info(start.text)
    if held_out:
        held_out.fewest_bits = min(run.evaluations("bits_per_image"), default=math.inf)
    batches = GlobalBatches(len(dataset), plan, processes.rank, config.run.seed, first_step)
    # The data set makes whole batches: there is nothing to collate.
    workers = loader_processes(config.codes.num_workers)
    loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=tuple, num_workers=workers,
                             pin_memory=torch.cuda.is_available(), worker_init_fn=ignore_in_worker))
    training.model.train()
    for step in run.steps():
        lr = learning_rate(config.optim, step, plan.total_steps)
        set_learning_rate(lr, training.optimizer)
        train_step(gpt, training, loader, plan, config, run, step)
        run.after_step(step, plan.global_batch, lr=lr, **scheduled(config, plan, step))
        if held_out and run.due(config.codes.eval_every, step):
            evaluate_held_out(gpt, training, held_out, config, run, step)
        if preview and run.due(config.preview.sample_every, step):
            preview.draw(training, run, step)
        if snapshot := run.snapshot(step, plan.steps_per_epoch):  # before the checkpoint: what follows one is not made again
            export_gpt(training, run, step + 1, snapshot)
        if run.checkpoint_due(step):
            run.checkpoint(step, training)  # leaves here when asked to stop
            export_gpt(training, run, step + 1, run.folder)
    if run.lacks_export:
        export_gpt(training, run, plan.total_steps, run.folder)
    run.close()


def main(*words: str) -> None:
    """Parse options and train; words: options before those of the command line, which win."""
    config = parse(TrainConfig, recipe, [*words, *sys.argv[1:]])
    processes = setup(config.run.device)
    if config.devices.dry_run:
        if processes.is_main:
            print_dry_run(config, processes)
    else:
        set_up_logging(processes)
        train(config, processes)
    processes.close()


if __name__ == "__main__":
    run_main(main)
