"""Train a tokenizer: stage 1 (semantic), stage 2 (joint, interleaved 2:1), or LlamaGen's single codebook.

Paper section 4.2.2, equations 7 to 10.  The loss weights of each stage are in `vq_loss.RECIPES`.  In stage 2 the joint
loss moves encoder, decoder and detail codebook at every step; every third step adds stage 1's loss on a semantic-only
forward, and only then does the semantic codebook move.
"""

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tokenizer.tokenizer_image.codebook import (
    CodeUsage,
    initialise_codebook,
    revive_dead_codes,
    warn_of_collapse,
    whiten_projection,
)
from tokenizer.tokenizer_image.discriminator import PatchGAN
from tokenizer.tokenizer_image.evaluate import evaluate_tokenizer, reconstruction_grid
from tokenizer.tokenizer_image.perceptual import PerceptualNet, build_perceptual
from tokenizer.tokenizer_image.quantizer import QUANTIZERS, Quantized
from tokenizer.tokenizer_image.vq_loss import RECIPES, LossWeights, TokenizerLoss
from tokenizer.tokenizer_image.vq_model import VQ_models, VQConfig, VQModel, build_tokenizer
from utils.batches import GlobalBatches, ImageOptions, train_loader
from utils.checkpoint import export, exported_step, fingerprint, initialise_optimizer, load_weights, read_export
from utils.config import UserError, parse, run_main, to_dict
from utils.distributed import Processes, average_gradients, clip_gradients, setup, split_batch
from utils.ema import EMA
from utils.files import check_writable
from utils.images import ImageDataset, open_images
from utils.run import Run, RunOptions, set_up_logging

log = logging.getLogger("vq_train")

INTERLEAVE = 3  # of three joint steps, one also updates the semantic codebook (section 4.2.2)


@dataclass
class VQTrainConfig:
    """Options of tokenizer training."""

    run: RunOptions
    images: ImageOptions
    stage: Literal["semantic", "dual", "single"] = "semantic"
    """Stage 1, stage 2, or a single stage for all codebooks at once (LlamaGen)."""
    quantizer: Literal["auto", "single", "dual", "product"] = "auto"
    """auto: single for --stage single, dual for the others; product: the unassociated dual codebook of table 7."""
    recipe: Literal["paper", "released"] = "paper"
    """Whose loss weights (the next three): equations 7 to 10 as printed, or those of the released code."""
    pixel_weight: float = 1.0
    """Weight of the squared error of pixels."""
    perceptual_weight: float = 1.0
    """Weight of LPIPS."""
    disc_weight: float = 0.5
    """Weight of the adversarial term, from --disc-start on."""
    vq_model: str = "VQ-16"
    """Preset of the autoencoder: VQ-16, VQ-8, VQ-8-small, VQ-4-small."""
    codebook_sizes: tuple[int, ...] = ()
    """Codes of each codebook; empty: 256 4096, or 16384 for a single one."""
    code_dim: int = 8
    """Dimension of a code."""
    beta: float = 0.25
    """Weight of the commitment term."""
    init_from: str = ""
    """Tokenizer whose weights start this run; stage 2 needs stage 1's result."""
    val_path: str = ""
    """Evaluation images; empty: the training images, centre-cropped."""
    val_limit: int = 5000
    """Evaluate on at most this many images, evenly over classes; 0: all."""
    eval_every: int = 5000
    """Steps between evaluations; 0: only at the end."""
    random_crop: bool = True
    """Train on random crops; off: centre crops."""
    random_flip: bool = True
    """Mirror half of the training images."""
    epochs: int = 40
    """Passes over the data, unless --steps is given."""
    steps: int = 0
    """Optimizer steps; 0: from --epochs."""
    global_batch_size: int = 128
    """Images per step, over all processes and micro-batches."""
    micro_batch_size: int = 0
    """Images a process takes at once; 0: its whole share (no gradient accumulation)."""
    lr: float = 1e-4
    """Adam's learning rate."""
    lr_end: float = -1.0
    """Learning rate reached by cosine decay at the last step; negative: constant."""
    max_grad_norm: float = 1.0
    """Clip the gradient norm to this; 0: do not clip."""
    perceptual_net: PerceptualNet = "vgg"
    """LPIPS backbone vgg, alex or squeeze; random (no download); or classifier, a local one."""
    perceptual_file: str = ""
    """Local weights: a torchvision state dict, or a classifier file; empty: the usual download."""
    disc_loss: Literal["hinge", "vanilla", "non-saturating"] = "hinge"
    """Adversarial loss."""
    disc_start: int = 20_000
    """First step of the adversarial term."""
    disc_channels: int = 64
    """Width of the discriminator."""
    disc_layers: int = 3
    """Strided layers of the discriminator."""
    disc_adaptive_weight: bool = False
    """Balance the adversarial term by gradient norms (VQGAN)."""
    codebook_init: Literal["uniform", "kmeans"] = "uniform"
    """Start of the codebook that this stage introduces."""
    kmeans_vectors: int = 65_536
    """Vectors that k-means sees."""
    revive_every: int = 0
    """Steps between revivals of codes that were never chosen; 0: never."""
    ema_decay: float = 0.0
    """Average the weights with this decay and export the averages; 0: off."""
    mixed_precision: Literal["auto", "bf16", "none"] = "auto"
    """bf16 autocast; auto: on GPUs only."""


def recipe(config: VQTrainConfig) -> dict[str, float]:
    """The loss weights of --recipe for --stage; typed ones win."""
    weights = RECIPES[config.recipe, config.stage]
    return {"pixel_weight": weights.pixel, "perceptual_weight": weights.perceptual, "disc_weight": weights.adversarial}


def optimizer_step(name: str, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, run: Run, step: int,
                   max_norm: float) -> Tensor:
    """Average, clip and apply gradients that `loss.backward()` has accumulated; a non-finite step is left out."""
    average_gradients(parameters, run.processes)
    norm = clip_gradients([p for p in parameters if p.grad is not None], max_norm)
    if run.require_finite(norm, step, name):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


def autoencoder_loss(model: VQModel, loss: TokenizerLoss, images: Tensor, config: VQTrainConfig,
                     step: int) -> tuple[Tensor, dict[str, Tensor], Tensor, Quantized]:
    """Equation 7 (stage 1), or 9 with 7 on every third step (stage 2).

    images: [B, 3, H, W] in [-1, 1].  Returns the loss, its terms, the reconstructions and what the quantizer chose.
    """
    weights = LossWeights(config.pixel_weight, config.perceptual_weight, config.disc_weight)
    last_layer = model.decoder.last_layer
    streams = "semantic" if config.stage == "semantic" else "all"
    reconstructions, quantized = model(images, streams, freeze_semantic=config.stage == "dual")
    total, terms = loss.generator(images, reconstructions, quantized, weights, step, last_layer)
    if config.stage == "dual" and step % INTERLEAVE == INTERLEAVE - 1:
        semantic_only, semantic_quantized = model(images, "semantic")
        semantic_total, _ = loss.generator(images, semantic_only, semantic_quantized,
                                           RECIPES[config.recipe, "semantic"], step, last_layer)
        total = total + semantic_total
    return total, terms, reconstructions, quantized


def build(config: VQTrainConfig, processes: Processes) -> tuple[VQModel, TokenizerLoss]:
    """The tokenizer, started from --init-from where given, and its losses."""
    if config.vq_model not in VQ_models:
        raise UserError(f"--vq-model {config.vq_model} is unknown: choose one of {', '.join(VQ_models)}.")
    quantizer = config.quantizer
    if quantizer == "auto":
        quantizer = "single" if config.stage == "single" else "dual"
    _, wanted, stages = QUANTIZERS[quantizer]
    if config.stage not in stages:
        raise UserError(f"--quantizer {quantizer} does not go with --stage {config.stage}: it has --stage "
                        f"{' and '.join(stages)}.")
    sizes = config.codebook_sizes or ((16384,) if wanted == 1 else (256, 4096))
    if len(sizes) != wanted:
        raise UserError(f"--codebook-sizes has {len(sizes)} values but --quantizer {quantizer} needs {wanted}.")
    torch.manual_seed(config.run.seed)
    model = build_tokenizer(config.vq_model, quantizer=quantizer, codebook_sizes=tuple(sizes), code_dim=config.code_dim,
                            beta=config.beta)
    if config.images.image_size % model.config.downsampling:
        raise UserError(f"--image-size {config.images.image_size} is not a multiple of {model.config.downsampling}, the "
                        f"downsampling of {config.vq_model}.")
    if config.init_from:
        _, tensors = read_export(config.init_from, "tokenizer", "--init-from")
        load_weights(model, tensors, f"--init-from {config.init_from}")
    elif config.stage == "dual":
        raise UserError("--stage dual starts from stage 1's result: give it as --init-from RUN_DIR.")
    perceptual = build_perceptual(config.perceptual_net, config.perceptual_file, processes.device)
    discriminator = PatchGAN(config.disc_channels, config.disc_layers).to(processes.device)
    loss = TokenizerLoss(perceptual, discriminator, config.disc_loss, config.disc_start, config.disc_adaptive_weight)
    return model.to(processes.device, memory_format=torch.channels_last), loss


def open_datasets(config: VQTrainConfig) -> tuple[ImageDataset, ImageDataset]:
    """Training images with augmentation, and centre-cropped evaluation images."""
    size = config.images.image_size
    source = open_images(config.images.data_path)
    held_out = open_images(config.val_path, "--val-path") if config.val_path else source
    if config.val_limit:
        held_out = held_out.subset(config.val_limit)
    training = ImageDataset(source, size, augment="train", seed=config.run.seed, random_crop=config.random_crop,
                            random_flip=config.random_flip)
    return training, ImageDataset(held_out, size)


@torch.no_grad()
def introduce_codebook(model: VQModel, dataset: ImageDataset, config: VQTrainConfig, processes: Processes) -> None:
    """k-means start of the codebooks that this stage adds: on whitened latents, or on residuals (stage 2)."""
    per_image = (config.images.image_size // model.config.downsampling) ** 2
    count = min(len(dataset), -(-config.kmeans_vectors // per_image))
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.run.seed))[:count].tolist()
    encoded = torch.cat([model.encoder(torch.stack([dataset[(0, row)][0] for row in rows[first : first + 64]])
                                       .to(processes.device)) for first in range(0, count, 64)])
    if config.stage != "dual" and not config.init_from:
        whiten_projection(model.quant_conv, encoded, processes)
    introduced = {"semantic": [0], "dual": [1], "single": range(len(model.config.codebook_sizes))}
    for stream in introduced[config.stage]:
        vectors = model.quantizer.residuals(model.quant_conv(encoded), stream)
        initialise_codebook(model.quantizer, stream, vectors, config.run.seed, processes)


def learning_rate(config: VQTrainConfig, step: int, total_steps: int) -> float:
    """Constant, or cosine decay to --lr-end."""
    if config.lr_end < 0:
        return config.lr
    cosine = 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / max(total_steps, 1))).item()
    return config.lr_end + (config.lr - config.lr_end) * cosine


@dataclass
class Training:
    """Everything that changes while training, and how it is saved."""

    model: VQModel
    loss: TokenizerLoss
    optimizer: torch.optim.Optimizer
    disc_optimizer: torch.optim.Optimizer
    ema: EMA | None
    usage: CodeUsage  # since the last revival
    processes: Processes

    def state(self) -> dict:
        """Nested dict for `utils.checkpoint`."""
        state = {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "discriminator": get_model_state_dict(self.loss.discriminator),
            "disc_optimizer": get_optimizer_state_dict(self.loss.discriminator, self.disc_optimizer),
            "usage": self.usage.total(self.processes),  # of what is not sharded a checkpoint keeps any one copy
        }
        return state | ({"ema": self.ema.state_dict()} if self.ema else {})

    def restore(self, state: dict) -> None:
        """Take over a loaded state."""
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        set_model_state_dict(self.loss.discriminator, state["discriminator"])
        set_optimizer_state_dict(self.loss.discriminator, self.disc_optimizer, state["disc_optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.usage.counts = state["usage"]
        if not self.processes.is_main:
            self.usage.reset()

    def averaged(self) -> AbstractContextManager:
        """Within the block the model has its averaged weights, where averaging is on."""
        return self.ema.applied() if self.ema else nullcontext()


def set_up(config: VQTrainConfig, processes: Processes) -> Training:
    """Model, losses and optimizers before the first step."""
    model, loss = build(config, processes)
    if config.stage == "semantic":
        model.quantizer.codebooks[1].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr, betas=(0.9, 0.95))
    disc_optimizer = torch.optim.Adam(loss.discriminator.parameters(), lr=config.lr, betas=(0.9, 0.95))
    for each in (optimizer, disc_optimizer):
        initialise_optimizer(each)
    usage = CodeUsage(model.config.codebook_sizes, processes.device)
    ema = EMA(model, config.ema_decay) if config.ema_decay else None
    return Training(model, loss, optimizer, disc_optimizer, ema, usage, processes)


def train_step(training: Training, loader, accumulation: int, config: VQTrainConfig, run: Run, step: int) -> None:
    """One step of generator and, from --disc-start on, discriminator."""
    model, loss, device = training.model, training.loss, run.processes.device
    discriminating = config.disc_weight > 0 and step >= config.disc_start
    bf16 = config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and device.type == "cuda")
    for _ in range(accumulation):
        images = next(loader)[0].to(device, non_blocking=True, memory_format=torch.channels_last)
        loss.discriminator.requires_grad_(False)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            total, terms, reconstructions, quantized = autoencoder_loss(model, loss, images, config, step)
        (total / accumulation).backward()
        if config.revive_every:
            training.usage.add(quantized.codes)
        if discriminating:
            loss.discriminator.requires_grad_(True)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                disc_total, disc_terms = loss.discriminate(images, reconstructions)
            (disc_total / accumulation).backward()
            terms = terms | disc_terms
        run.metrics.add(terms)
    trained = training.optimizer.param_groups[0]["params"]
    norm = optimizer_step("tokenizer", trained, training.optimizer, run, step, config.max_grad_norm)
    run.metrics.add({"gradient_norm": norm})
    if discriminating:
        optimizer_step("discriminator", list(loss.discriminator.parameters()), training.disc_optimizer, run, step,
                       config.max_grad_norm)


def revive(training: Training, dataset: ImageDataset, config: VQTrainConfig, run: Run, step: int) -> None:
    """Move dead codes of the codebooks this stage trains onto latents of fresh images; starts counting anew."""
    model, processes = training.model, run.processes
    training.usage.gather(processes)
    rows = torch.randint(len(dataset), (64,)).tolist()
    images = torch.stack([dataset[(step, row)][0] for row in rows]).to(processes.device)
    model.eval()
    for stream in range(1 if config.stage == "semantic" else len(model.config.codebook_sizes)):
        with torch.no_grad():
            vectors = model.quantizer.residuals(model.latents(images), stream)
        moved = revive_dead_codes(model.quantizer, stream, training.usage.counts[stream], vectors, training.optimizer,
                                  processes)
        if moved:
            log.info("step %d: revived %d codes of codebook %d", step + 1, moved, stream)
    model.train()
    training.usage.reset()


def evaluate(training: Training, dataset: ImageDataset, config: VQTrainConfig, run: Run, step: int) -> dict[str, float]:
    """Whole-set figures and pictures of the averaged (or, without averaging, the present) weights."""
    model, streams = training.model, "semantic" if config.stage == "semantic" else "all"
    micro, _ = split_batch(config.global_batch_size, config.micro_batch_size, run.processes.world_size)
    with training.averaged():
        figures = evaluate_tokenizer(model, dataset, streams, training.loss.perceptual, run.processes, micro,
                                     config.images.num_workers)
        if run.processes.is_main:
            run.picture(step + 1, "reconstructions", reconstruction_grid(model, dataset, streams, run.processes.device))
    run.write(step + 1, {f"eval/{name}": value for name, value in figures.items()})
    log.info("step %d: %s", step + 1, "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    cells = (config.images.image_size // model.config.downsampling) ** 2
    warn_of_collapse(figures, int(figures["images"]), cells, model.config.codebook_sizes)
    return figures


def export_tokenizer(training: Training, config: VQTrainConfig, run: Run, step: int, figures: dict[str, float]) -> None:
    """Write tokenizer.safetensors, averaged where averaging is on, with its configuration and figures."""
    with training.averaged():
        tensors = training.model.state_dict()
        description = {"model": to_dict(training.model.config), "stage": config.stage, "step": step,
                       "image_size": config.images.image_size, "fingerprint": fingerprint(tensors), "figures": figures}
        export(run.folder / "tokenizer.safetensors", "tokenizer", tensors, description, run.processes)


def train(config: VQTrainConfig, processes: Processes) -> None:
    """Train one stage to its end, resuming where an earlier run of the same folder stopped."""
    check_writable(config.run.run_dir, "--run-dir")
    set_up_logging(processes, config.run.run_dir / "log.txt")
    training_set, evaluation_set = open_datasets(config)
    micro, accumulation = split_batch(config.global_batch_size, config.micro_batch_size, processes.world_size)
    # Checked before anything is built: too small a set is a mistake of the options.
    probe = GlobalBatches(len(training_set), config.global_batch_size, micro, 0, 1, 0, 0, 0)
    total_steps = config.steps or config.epochs * probe.steps_per_epoch
    training = set_up(config, processes)
    model = training.model
    run = Run(config.run, {"model": to_dict(model.config) | {"stage": config.stage}, "defaults": to_dict(VQConfig()),
                           "options": to_dict(config)},
              processes, total_steps)
    state, first_step = run.resume(training.state())
    if state is not None:
        training.restore(state)
    elif config.codebook_init == "kmeans":
        introduce_codebook(model, training_set, config, processes)
    batches = GlobalBatches(len(training_set), config.global_batch_size, micro, processes.rank, processes.world_size,
                            config.run.seed, first_step, total_steps)
    loader = iter(train_loader(training_set, batches, config.images.num_workers))
    model.train()
    figures: dict[str, float] = {}
    for step in run.steps():
        lr = learning_rate(config, step, total_steps)
        for group in training.optimizer.param_groups + training.disc_optimizer.param_groups:
            group["lr"] = lr
        train_step(training, loader, accumulation, config, run, step)
        if training.ema:
            training.ema.update(step)
        if config.revive_every and (step + 1) % config.revive_every == 0 and step + 1 < 0.8 * total_steps:
            revive(training, training_set, config, run, step)
        run.after_step(step, config.global_batch_size, lr=lr)
        if run.due(config.run.checkpoint_every, step):
            run.checkpoint(step, training.state())
        if run.due(config.eval_every, step):
            figures = evaluate(training, evaluation_set, config, run, step)
        if run.due(config.run.checkpoint_every, step):
            export_tokenizer(training, config, run, step + 1, figures)
    if first_step >= total_steps and exported_step(run.folder, "tokenizer") < total_steps:
        # Killed between the last checkpoint and its export.
        figures = evaluate(training, evaluation_set, config, run, total_steps - 1)
        export_tokenizer(training, config, run, total_steps, figures)
    training_set.report_skipped()
    run.close()


def main() -> None:
    """Parse options and train."""
    config = parse(VQTrainConfig, recipe)
    processes = setup(config.run.device)
    train(config, processes)
    processes.close()


if __name__ == "__main__":
    run_main(main)
