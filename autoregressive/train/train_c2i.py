"""Train a class-conditional GPT on extracted codes: one loop for one device, DDP, FSDP2 and HSDP.

Paper section 4.3.3 (equation 14) and table 11, whose rows `--gpt-model` and the number of tokens select; a typed flag
wins over the recipe.  Deviation: the gradient norm is read once per step, because a non-finite step must be stopped
before the optimizer; all other metrics stay on the device until they are logged.
"""

import logging
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader

from autoregressive.models.generate import sampling_preset
from autoregressive.models.gpt import GPT, GPT_models, GPTProvenance
from autoregressive.models.losses import ObjectiveOptions, check_objective, objective
from autoregressive.models.paradigms import PARADIGMS
from autoregressive.models.transformer import GPTConfig
from autoregressive.train import evaluate_c2i
from utils.batches import GlobalBatches
from utils.checkpoint import export, exported_step, initialise_optimizer, load_weights, read_export
from utils.code_map import CodeMap, load_code_map
from utils.code_shards import CodeDataset, CodeHeader, as_batch, read_header, require_fit
from utils.config import UserError, from_dict, parse, run_main, to_dict
from utils.distributed import (
    DataParallel,
    Processes,
    clip_gradients,
    parallelize,
    setup,
    shard_group,
    split_batch,
    synchronize_gradients,
)
from utils.ema import EMA
from utils.run import Run, RunOptions, set_up_logging

log = logging.getLogger("train_c2i")


@dataclass
class GPTOptions:
    """Which GPT to build."""

    gpt_model: str = "GPT-B"
    """Size: GPT-tiny, GPT-small, GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-3B, GPT-XXXL."""
    image_size: int = 256
    """Side of the images in pixels; with --downsample-size it gives the grid."""
    downsample_size: int = 16
    """Pixels a grid cell covers along one axis."""
    num_classes: int = 1000
    """Classes of the data set."""
    codebook_sizes: tuple[int, ...] = ()
    """Codes of each codebook; empty: those of the codes in --code-path (after --code-map)."""
    paradigm: Literal["auto", "single", "alternating", "grouped", "independent", "hierarchical", "fine"] = "auto"
    """Prediction paradigm (table 5); auto: single for one codebook, hierarchical for two, fine for a map of fine labels."""
    context: Literal["compressed", "concatenated", "none"] = "compressed"
    """Local context of the hierarchical head (table 6)."""
    head_layers: int = 0
    """Layers of the hierarchical head; 0: the size's own."""
    window_size: int = 5
    """Side K of the head's local window (equation 15)."""
    rotary: Literal["grid", "repeated"] = "grid"
    """Rotary rows: one per cell, or the released table, which repeats rows."""
    head_rotary: Literal["none", "zero_summary"] = "none"
    """Rotation of the head's slots: none, or the released zero row for the summary."""
    dropout: float = 0.1
    """Dropout of tokens, residual branches and feed-forward layers."""
    class_dropout: float = 0.1
    """Probability of training a sample without its class."""


@dataclass
class TrainConfig:
    """Options of GPT training."""

    run: RunOptions
    gpt: GPTOptions
    code_path: Path
    """Folder written by extract_codes_c2i.py."""
    objective: ObjectiveOptions
    code_map: str = ""
    """Code map written by rearrange.py, applied while reading: IAR's new order, CTF's coarse or (coarse, fine) labels."""
    val_code_path: str = ""
    """Held-out codes: their cross-entropy and bits per image are logged every --eval-every steps; empty: none."""
    eval_every: int = 5000
    """Steps between evaluations on --val-code-path; 0: only at the end."""
    init_from: str = ""
    """gpt.safetensors or run folder whose weights start this run, of the same shape; the grid may differ."""
    epochs: float = 300
    """Passes over the data, unless --steps is given."""
    steps: int = 0
    """Optimizer steps; 0: from --epochs."""
    global_batch_size: int = 256
    """Images per step, over all processes and micro-batches."""
    micro_batch_size: int = 0
    """Images a process takes at once; 0: its whole share (no gradient accumulation)."""
    lr: float = 1e-4
    """Learning rate, reached after --warmup-steps."""
    lr_end: float = 1e-4
    """Learning rate at the last step of the cosine schedule."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Schedule after warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.05
    """Decay of matrices and embeddings, not of norms and biases."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.95
    """AdamW."""
    max_grad_norm: float = 1.0
    """Clip the gradient norm to this; 0: do not clip."""
    ema_decay: float = 0.0
    """Average the weights with this decay and export the averages; 0: off."""
    data_parallel: DataParallel = "ddp"
    """none, ddp, fsdp (FSDP2 over all processes), hsdp (shards inside groups, replicates between)."""
    shard_size: int = 0
    """hsdp: processes a shard group has; 0: those of a node."""
    mixed_precision: Literal["auto", "bf16", "none"] = "auto"
    """bf16; auto: on GPUs only."""
    activation_checkpointing: bool = False
    """Recompute every layer in the backward pass: less memory, a third more arithmetic."""
    compile: bool = False
    """torch.compile every layer."""
    num_workers: int = 4
    """Loader processes for each training process."""
    dry_run: bool = False
    """Print the resolved options, parameters and estimated memory, and exit."""


# AdamW (0.9, 0.95), weight decay 0.05, clip 1.0 for all.  Two codebooks: table 11; the larger sizes of the table of models
# have no row and take XXL's.  One codebook: LlamaGen's training, which IAR and CTF follow; 50 epochs of XL and XXL at 256
# pixels as in table 3.  Published FID in generate.CFG_RANGES.
_COLUMNS = ("global_batch_size", "lr", "lr_end", "lr_schedule", "epochs", "semantic_weight", "data_parallel")
RECIPES: dict[tuple[int, str, int], dict[str, Any]] = {
    key: dict(zip(_COLUMNS, row, strict=True)) for key, row in {
        # codebooks, size, cells  batch  lr      lr_end  schedule    epochs λ_s  parallel
        (2, "GPT-B", 256):       (256, 1.0e-4, 1.0e-4, "constant", 300, 2.0, "fsdp"),
        (2, "GPT-L", 256):       (256, 1.0e-4, 1.0e-4, "constant", 300, 1.0, "fsdp"),
        (2, "GPT-XL", 256):      (256, 1.5e-4, 5.0e-5, "cosine",    50, 1.0, "ddp"),
        (2, "GPT-XXL", 256):     (256, 1.5e-4, 5.0e-5, "cosine",    50, 1.0, "fsdp"),  # table: none; 40 GB do not fit it
        (2, "GPT-B", 576):       (256, 1.0e-4, 1.0e-4, "constant", 300, 2.0, "fsdp"),
        (2, "GPT-L", 576):       (256, 1.0e-4, 1.0e-4, "constant", 300, 1.0, "fsdp"),
        (2, "GPT-XL", 576):      (256, 1.5e-4, 5.0e-5, "cosine",   300, 1.0, "ddp"),
        (2, "GPT-XXL", 576):     (512, 3.0e-4, 1.0e-4, "cosine",   300, 1.5, "fsdp"),
        (1, "GPT-B", 256):       (256, 1.0e-4, 1.0e-4, "constant", 300, 1.0, "ddp"),
        (1, "GPT-L", 256):       (256, 1.0e-4, 1.0e-4, "constant", 300, 1.0, "ddp"),
        (1, "GPT-XL", 256):      (256, 1.0e-4, 1.0e-4, "constant",  50, 1.0, "ddp"),
        (1, "GPT-XXL", 256):     (256, 1.0e-4, 1.0e-4, "constant",  50, 1.0, "fsdp"),
        (1, "GPT-B", 576):       (256, 1.0e-4, 1.0e-4, "constant", 300, 1.0, "ddp"),
        (1, "GPT-L", 576):       (256, 1.0e-4, 1.0e-4, "constant", 300, 1.0, "ddp"),
        (1, "GPT-XL", 576):      (256, 1.0e-4, 1.0e-4, "constant", 300, 1.0, "ddp"),
        (1, "GPT-XXL", 576):     (256, 1.0e-4, 1.0e-4, "constant", 300, 1.0, "fsdp"),
    }.items()
}


def recipe(config: TrainConfig) -> dict[str, Any]:
    """The row for the codebooks, size and cells that the command line names, or nothing."""
    tokens = (config.gpt.image_size // config.gpt.downsample_size) ** 2
    name = "GPT-XXL" if config.gpt.gpt_model in ("GPT-3B", "GPT-XXXL") else config.gpt.gpt_model
    sizes, code_map = known_codes(config)
    # Both stages of CTF see one codebook through a map, (coarse, fine) labels too, and train as LlamaGen does.
    return RECIPES.get((1 if code_map and code_map.coarse else len(sizes), name, tokens), {})


def known_codes(config: TrainConfig) -> tuple[tuple[int, ...], CodeMap | None]:
    """Codebook sizes as the GPT will see them, and the code map; IAR2's sizes where nothing says them (a dry run)."""
    if (config.code_path / "header.json").exists():
        header, code_map = open_codes(config)
        return config.gpt.codebook_sizes or tuple(header.codebook_sizes), code_map
    code_map = load_code_map(config.code_map) if config.code_map else None
    return config.gpt.codebook_sizes or (tuple(code_map.codebook_sizes) if code_map else (256, 4096)), code_map


def choose_paradigm(options: GPTOptions, codebook_sizes: tuple[int, ...], code_map: CodeMap | None) -> str:
    """The paradigm for codes of the given codebooks; raises UserError where it does not go with codes or options."""
    fine = code_map is not None and bool(code_map.coarse)
    paradigm = options.paradigm
    if paradigm == "auto":
        paradigm = "fine" if fine else "single" if len(codebook_sizes) == 1 else "hierarchical"
    if PARADIGMS[paradigm][1] != len(codebook_sizes):
        raise UserError(f"--paradigm {paradigm} predicts {PARADIGMS[paradigm][1]} codes a cell but there are "
                        f"{len(codebook_sizes)} codebooks, {codebook_sizes}: choose a paradigm or codes that fit.")
    if fine != (paradigm == "fine"):
        raise UserError(f"--paradigm {paradigm} does not go with --code-map {'of fine labels' if fine else 'of other codes'}: "
                        "the fine paradigm needs rearrange.py's fine_map, and that map the fine paradigm.")
    default = GPTOptions()
    for name in ("window_size", "head_layers", "head_rotary"):
        if paradigm != "hierarchical" and getattr(options, name) != getattr(default, name):
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} is of the hierarchical head, which --paradigm "
                            f"{paradigm} has not: leave it out.")
    return paradigm


def gpt_config(options: GPTOptions, codebook_sizes: tuple[int, ...], code_map: CodeMap | None = None) -> GPTConfig:
    """The model that the options describe, for codes of the given codebooks; raises UserError for values that fit none."""
    if options.gpt_model not in GPT_models:
        raise UserError(f"--gpt-model {options.gpt_model} is unknown: choose one of {', '.join(GPT_models)}.")
    if options.image_size % options.downsample_size:
        raise UserError(f"--image-size {options.image_size} is not a multiple of --downsample-size "
                        f"{options.downsample_size}.")
    if options.window_size < 3 or options.window_size % 2 == 0:
        raise UserError(f"--window-size {options.window_size} must be odd and at least 3.")
    shape = GPT_models[options.gpt_model] | ({"head_layers": options.head_layers} if options.head_layers else {})
    return GPTConfig(
        **shape, num_classes=options.num_classes, codebook_sizes=codebook_sizes,
        paradigm=choose_paradigm(options, codebook_sizes, code_map),
        context=options.context, grid_size=options.image_size // options.downsample_size, window_size=options.window_size,
        token_dropout=options.dropout, resid_dropout=options.dropout, ffn_dropout=options.dropout,
        class_dropout=options.class_dropout, rotary=options.rotary, head_rotary=options.head_rotary)


def open_codes(config: TrainConfig) -> tuple[CodeHeader, CodeMap | None]:
    """The header of the codes as the GPT will see them, and the map that makes them so."""
    header = read_header(config.code_path)
    if not config.code_map:
        return header, None
    code_map = load_code_map(config.code_map)
    return code_map.header(header, f"--code-map {config.code_map}"), code_map


def check_codes(config: TrainConfig, model: GPTConfig, header: CodeHeader) -> None:
    """Refuse codes whose header does not fit the model."""
    wanted = list(config.gpt.codebook_sizes or header.codebook_sizes)
    require_fit(header, config.code_path, {
        "codebook_sizes": (wanted, "--codebook-sizes"),
        "grid_size": (model.grid_size, f"--image-size {config.gpt.image_size} / {config.gpt.downsample_size}"),
        "num_classes": (model.num_classes, "--num-classes"),
    })


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant or cosine decay from --lr to --lr-end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, config: TrainConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings only."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)
    initialise_optimizer(optimizer)
    return optimizer


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether to compute in bf16."""
    return config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and device.type == "cuda")


@dataclass
class Training:
    """Everything that changes while training, and how it is saved."""

    gpt: GPT            # the bare model
    model: nn.Module    # what is called: the same, wrapped for data parallelism
    optimizer: torch.optim.Optimizer
    ema: EMA | None

    def state(self) -> dict:
        """Nested dict for `utils.checkpoint`; shards stay with their process."""
        state = {"model": get_model_state_dict(self.model),
                 "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
        return state | ({"ema": self.ema.state_dict()} if self.ema else {})

    def averaged(self) -> AbstractContextManager:
        """Within the block the model has its averaged weights, where averaging is on."""
        return self.ema.applied() if self.ema else nullcontext()

    def restore(self, state: dict) -> None:
        """Take over a loaded state."""
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])


def set_up(config: TrainConfig, model_config: GPTConfig, processes: Processes) -> Training:
    """Model and optimizer before the first step; every process draws the same initial weights."""
    torch.manual_seed(config.run.seed)
    gpt = GPT(model_config)
    if config.init_from:
        load_weights(gpt, read_export(config.init_from, "gpt", "--init-from")[1], f"--init-from {config.init_from}")
    gpt.activation_checkpointing = config.activation_checkpointing
    gpt.to(processes.device)
    bf16 = uses_bf16(config, processes.device)
    if config.compile:
        for block in gpt.blocks:
            block.compile()
    model = parallelize(gpt, gpt.blocks, config.data_parallel, processes, bf16, config.shard_size)
    optimizer = make_optimizer(model, config, fused=processes.device.type == "cuda")
    return Training(gpt, model, optimizer, EMA(gpt, config.ema_decay) if config.ema_decay else None)


def train_step(training: Training, loader, accumulation: int, config: TrainConfig, run: Run, step: int) -> None:
    """One optimizer step over `accumulation` micro-batches (equation 14)."""
    device = run.processes.device
    sharded = config.data_parallel in ("fsdp", "hsdp")  # FSDP2 casts parameters itself
    for micro in range(accumulation):
        codes, labels = (t.to(device, non_blocking=True) for t in next(loader))
        synchronize_gradients(training.model, last=micro == accumulation - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device) and not sharded):
            logits = training.model(labels, codes)
            loss, parts = objective(logits, training.gpt.paradigm.targets(codes), config.objective)
        (loss / accumulation).backward()
        run.metrics.add(parts)
    norm = clip_gradients(training.model.parameters(), config.max_grad_norm)
    if run.require_finite(norm, step):
        training.optimizer.step()
        if training.ema:
            training.ema.update(step)
    training.optimizer.zero_grad(set_to_none=True)
    run.metrics.add({"gradient_norm": norm})


def describe(config: TrainConfig, model: GPTConfig, header: CodeHeader, code_map: CodeMap | None) -> dict[str, Any]:
    """All that sampling needs to know about the GPT beside its weights."""
    about = {"model": to_dict(model), "gpt_model": config.gpt.gpt_model, "tokenizer": header.tokenizer,
             "image_size": header.image_size, "ema": config.ema_decay,
             "sampling": sampling_preset(config.gpt.gpt_model, len(model.codebook_sizes), model.grid_size)}
    if code_map and code_map.coarse:
        about |= {"coarse": code_map.coarse, "coarse_of": code_map.table[:, 0].tolist()}
    return about


def evaluate(training: Training, held_out: CodeDataset, config: TrainConfig, run: Run, step: int) -> None:
    """Log the likelihood of held-out codes under the averaged (or, without averaging, the present) weights."""
    device, sharded = run.processes.device, config.data_parallel in ("fsdp", "hsdp")
    batch, _ = split_batch(config.global_batch_size, config.micro_batch_size, run.processes.world_size)
    training.model.eval()
    with training.averaged(), torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device) and not sharded):
        figures = evaluate_c2i.evaluate(training.gpt, held_out, batch, run.processes)
    training.model.train()
    run.write(step + 1, {f"eval/{name}": value for name, value in figures.items()})
    log.info("step %d: held-out %s", step + 1, "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def export_gpt(training: Training, run: Run, step: int) -> None:
    """Write gpt.safetensors, averaged weights where averaging is on."""
    with training.averaged():
        export(run.folder / "gpt.safetensors", "gpt", get_model_state_dict(training.model),
               run.config["export"] | {"step": step}, run.processes)


def train(config: TrainConfig, processes: Processes) -> None:
    """Train to the end, resuming where an earlier run of the same folder stopped."""
    header, code_map = open_codes(config)
    model_config = gpt_config(config.gpt, tuple(header.codebook_sizes), code_map)
    check_codes(config, model_config, header)
    check_objective(config.objective, header.codebook_sizes)
    micro, accumulation = split_batch(config.global_batch_size, config.micro_batch_size, processes.world_size)
    dataset = CodeDataset(config.code_path, config.run.seed, code_map.apply if code_map else None)
    probe = GlobalBatches(len(dataset), config.global_batch_size, micro, 0, 1, 0, 0, 0)
    total_steps = config.steps or int(config.epochs * probe.steps_per_epoch)
    coarse = {"coarse": code_map.coarse if code_map else ""}
    run = Run(config.run, {"model": to_dict(model_config) | {"tokenizer": header.tokenizer} | coarse,
                           "defaults": to_dict(GPTConfig()) | {"coarse": ""}, "options": to_dict(config),
                           "export": describe(config, model_config, header, code_map)}, processes, total_steps)
    training = set_up(config, model_config, processes)
    about = {name: value for name, value in run.config["export"].items() if name != "model"}
    training.gpt.provenance = from_dict(GPTProvenance, about)
    held_out = config.val_code_path and evaluate_c2i.open_codes(training.gpt, "this run", config.val_code_path, config.code_map,
                                                                "--val-code-path")
    log.info("%s: %.1fM parameters, %d steps of %d images, %s on %d processes", config.gpt.gpt_model,
             sum(p.numel() for p in training.gpt.parameters()) / 1e6, total_steps, config.global_batch_size,
             config.data_parallel, processes.world_size)
    state, first_step = run.resume(training.state())
    if state is not None:
        training.restore(state)
    batches = GlobalBatches(len(dataset), config.global_batch_size, micro, processes.rank, processes.world_size,
                            config.run.seed, first_step, total_steps)
    loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=as_batch, num_workers=config.num_workers,
                             pin_memory=torch.cuda.is_available()))
    training.model.train()
    for step in run.steps():
        lr = learning_rate(config, step, total_steps)
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        train_step(training, loader, accumulation, config, run, step)
        run.after_step(step, config.global_batch_size, lr=lr)
        if held_out and run.due(config.eval_every, step):
            evaluate(training, held_out, config, run, step)
        if run.due(config.run.checkpoint_every, step):
            run.checkpoint(step, training.state())
            export_gpt(training, run, step + 1)
    if first_step >= total_steps and exported_step(run.folder, "gpt") < total_steps:
        # Killed between the last checkpoint and its export.
        export_gpt(training, run, total_steps)
    run.close()


def print_dry_run(config: TrainConfig, processes: Processes) -> None:
    """Resolved options, parameter count and an estimate of memory per device."""
    model_config = gpt_config(config.gpt, *known_codes(config))
    with torch.device("meta"):
        gpt = GPT(model_config)
    parameters, head = sum(p.numel() for p in gpt.parameters()), getattr(gpt.paradigm, "head", None)
    micro, accumulation = split_batch(config.global_batch_size, config.micro_batch_size, processes.world_size)
    shards = {"fsdp": processes.world_size, "hsdp": shard_group(config.shard_size)}.get(config.data_parallel, 1)
    # float32 weights, gradients and two moments, and the average where kept; gradients of accumulated micro-batches
    # stay whole under FSDP.
    states = parameters * 4 * (4 + bool(config.ema_decay)) / shards
    states += parameters * 4 * (shards > 1 and accumulation > 1)
    bf16 = 2 if uses_bf16(config, processes.device) else 4
    # Kept for the backward pass, in multiples of D a token and layer: 2 norms, q, k, v, attention output, residuals
    # about 10; SwiGLU 4 x 2.7; head layers hold C + 1 slots a cell.  Checkpointing keeps the input alone.
    head_positions = 0 if head is None else model_config.cells * head.slots * model_config.head_layers
    positions = len(gpt.rotary) * model_config.n_layer + head_positions
    width = 1 if config.activation_checkpointing else 21
    activations = micro * (positions * width * model_config.dim * bf16
                           + model_config.cells * sum(model_config.codebook_sizes) * (bf16 + 4))
    for name, value in to_dict(config).items():
        for key, inner in (value.items() if isinstance(value, dict) else [(name, value)]):
            print(f"  {key:26} {inner}")
    print(f"parameters                   {parameters:,}")
    print(f"micro-batch x accumulation   {micro} x {accumulation} on {processes.world_size} processes")
    print(f"estimated memory per device  {(states + activations) / 2**30:.1f} GiB "
          f"({states / 2**30:.1f} weights and optimizer, {activations / 2**30:.1f} activations)")


def main() -> None:
    """Parse options and train."""
    config = parse(TrainConfig, recipe)
    processes = setup(config.run.device)
    if config.dry_run:
        if processes.is_main:
            print_dry_run(config, processes)
    else:
        set_up_logging(processes)
        train(config, processes)
    processes.close()


if __name__ == "__main__":
    run_main(main)
