"""Train a tokenizer: stage 1 (semantic), stage 2 (joint, interleaved 2:1), or LlamaGen's single codebook.

Paper section 4.2.2, equations 7 to 10.  The loss weights of each stage are in `vq_loss.RECIPES`.  In stage 2 the joint
loss moves encoder, decoder and detail codebook at every step; every third step adds stage 1's loss on a semantic-only
forward, and only then does the semantic codebook move.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

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
    remedies,
    revive_dead_codes,
    warn_of_collapse,
    whiten_projection,
)
from tokenizer.tokenizer_image.discriminator import PatchGAN
from tokenizer.tokenizer_image.evaluate import ByCodes, evaluate_tokenizer, reconstruction_grid
from tokenizer.tokenizer_image.perceptual import build_perceptual, distance_name
from tokenizer.tokenizer_image.quantizer import GRADIENTS, QUANTIZERS, Quantized, Streams
from tokenizer.tokenizer_image.vq_loss import PROCEDURES, RECIPES, LossWeights, TokenizerLoss
from tokenizer.tokenizer_image.vq_model import TokenizerProvenance, VQConfig, VQModel, build_tokenizer
from tokenizer.tokenizer_image.vq_options import FIXED_OPTIONS, MODEL_FLAGS, VQTrainConfig, quantizer_name, recipe
from utils.batches import GlobalBatches, StepPlan, plan_steps
from utils.checkpoint import RunRecord, export, fingerprint, load_weights, read_export
from utils.config import UserError, parse, require_multiple, run_main, to_dict
from utils.devices import SYMBOLIC_SIZES, compiles, image_layout
from utils.distributed import Processes, average_gradients, setup
from utils.ema import EMA
from utils.image_dataset import ImageDataset, train_loader
from utils.images import open_images
from utils.initial import Initial, Start, plan_start, read_initial
from utils.logs import set_up_logging
from utils.optim import clip_gradients, initialise_optimizer, learning_rate, set_learning_rate, step_if_finite, trains_in_bf16
from utils.run import Run, first_line
from utils.train_state import TrainState

log = logging.getLogger("vq_train")

COLLAPSED = 0.2  # usage of a codebook below which a run is not expected to recover
INTERLEAVE = 3  # of three joint steps, one also updates the semantic codebook (section 4.2.2)


def optimizer_step(name: str, groups: list[list[nn.Parameter]], optimizer: torch.optim.Optimizer, run: Run,
                   max_norm: float) -> Tensor:
    """Average, clip (each group to `max_norm`) and apply the gradients that `loss.backward()` has accumulated.

    Returns the norm of all gradients; where it is not finite, the weights stay as they are.
    """
    average_gradients([p for group in groups for p in group], run.processes)
    moved = [[p for p in group if p.grad is not None] for group in groups]
    norm = torch.stack([clip_gradients(group, max_norm) for group in moved if group]).norm()
    run.watch_gradient(norm, name)
    step_if_finite(optimizer, norm)
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


def clipping_groups(model: VQModel, recipe_name: str) -> list[list[nn.Parameter]]:
    """The parameters that are clipped together: all, or in the release each codebook and the network by themselves."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not PROCEDURES[recipe_name].clip_apart:
        return [trained]
    books = [model.quantizer.trained(stream) for stream in range(len(model.config.codebook_sizes))]
    return [[book] for book in books if book.requires_grad] + [[p for p in trained if not any(p is book for book in books)]]


def trained_streams(config: VQTrainConfig) -> Streams:
    """The streams that this stage quantizes with."""
    return "semantic" if config.stage == "semantic" else "all"


def semantic_weights(config: VQTrainConfig) -> LossWeights:
    """Weights of stage 1's loss inside stage 2: the recipe's, except those that were typed for stage 2."""
    options, joint, semantic = config.loss, RECIPES[config.loss.recipe, config.stage], RECIPES[config.loss.recipe, "semantic"]
    typed = {"pixel": options.pixel_weight, "perceptual": options.perceptual_weight, "adversarial": options.disc_weight}
    return replace(semantic, **{name: value for name, value in typed.items() if value != getattr(joint, name)})


def interleaved_loss(model: VQModel, loss: TokenizerLoss, images: Tensor, config: VQTrainConfig, step: int) -> Tensor:
    """Equation 7 on the third step of stage 2; in the release only its codebook term, which moves nothing but the codebook."""
    if config.loss.interleave_gradients == "codebook":
        with torch.no_grad():
            latents = model.latents(images)
        return model.quantizer(latents, "semantic").codebook_loss
    reconstructions, quantized = model(images, "semantic")
    total, _ = loss.generator(images, reconstructions, quantized, semantic_weights(config), step, model.decoder.conv_out.weight)
    return total


def autoencoder_loss(model: VQModel, loss: TokenizerLoss, images: Tensor, config: VQTrainConfig,
                     step: int) -> tuple[Tensor, dict[str, Tensor], Tensor, Quantized]:
    """Equation 7 (stage 1), or 9 with 7 on every third step (stage 2).

    images: [B, 3, H, W] in [-1, 1].  Returns the loss, its terms, the reconstructions and what the quantizer chose.
    """
    weights = LossWeights(config.loss.pixel_weight, config.loss.perceptual_weight, config.loss.disc_weight)
    last_layer = model.decoder.conv_out.weight
    reconstructions, quantized = model(images, trained_streams(config), freeze_semantic=config.stage == "dual")
    total, terms = loss.generator(images, reconstructions, quantized, weights, step, last_layer)
    if config.stage == "dual" and step % INTERLEAVE == INTERLEAVE - 1:
        total = total + interleaved_loss(model, loss, images, config, step)
    return total, terms, reconstructions, quantized


def build_model(config: VQTrainConfig, initial: Initial | None) -> VQModel:
    """The tokenizer before the weights of --init-from, where there are any; raises UserError for options that do not fit."""
    options, quantizer = config.tokenizer, quantizer_name(config)
    _, wanted, _ = QUANTIZERS[quantizer]
    sizes = options.codebook_sizes or ((16384,) if wanted == 1 else (256, 4096))
    if len(sizes) != wanted:
        raise UserError(f"--codebook-sizes has {len(sizes)} values but --quantizer {quantizer} needs {wanted}.")
    torch.manual_seed(config.run.seed)
    model = build_tokenizer(options.vq_model, quantizer=quantizer, codebook_sizes=tuple(sizes), code_dim=options.code_dim,
                            beta=options.beta)
    model.quantizer.gradient = GRADIENTS[config.codebook.gradient]
    require_multiple("--image-size", config.images.image_size, model.config.downsampling,
                     f"the downsampling of {options.vq_model}")
    if config.stage == "dual" and not initial:
        raise UserError("--stage dual starts from stage 1's result: give it as --init-from RUN_DIR.")
    return model


def build_loss(config: VQTrainConfig, device: torch.device) -> TokenizerLoss:
    """The losses, with their perceptual distance and their discriminator."""
    options = config.loss
    perceptual = build_perceptual(config.perceptual, device)
    discriminator = PatchGAN(options.disc_channels, options.disc_layers)
    if config.stage == "dual" and PROCEDURES[options.recipe].keep_discriminator:
        beside = Path(config.init_from).is_file()  # else a run folder, or a repository of the hub
        folder = Path(config.init_from).parent if beside else config.init_from
        _, tensors = read_export(folder, "discriminator", "--init-from")
        load_weights(discriminator, tensors, f"--init-from {folder}/discriminator.safetensors")
    discriminator.to(device)
    return TokenizerLoss(perceptual, discriminator, options.disc_loss, options.disc_start, options.disc_adaptive_weight)


def open_datasets(config: VQTrainConfig) -> tuple[ImageDataset, ImageDataset]:
    """Training images with augmentation, and centre-cropped evaluation images."""
    size, evaluation = config.images.image_size, config.evaluation
    source = open_images(config.images.data_path)
    held_out = open_images(evaluation.val_path, "--val-path") if evaluation.val_path else source
    if evaluation.val_limit:
        held_out = held_out.subset(evaluation.val_limit)
    training = ImageDataset(source, size, config.run.seed, config.augmentation.random_crop, config.augmentation.random_flip)
    return training, ImageDataset(held_out, size, left_out=True)


@torch.no_grad()
def introduce_codebook(model: VQModel, dataset: ImageDataset, config: VQTrainConfig, processes: Processes) -> None:
    """Whitened latents for a fresh encoder; k-means start of the codebooks that this stage adds, where asked for."""
    per_image = (config.images.image_size // model.config.downsampling) ** 2
    count = min(len(dataset), -(-config.codebook.kmeans_vectors // per_image))
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.run.seed))[:count].tolist()
    encoded = torch.cat([model.encoder(torch.stack([dataset[(0, row)][0] for row in rows[first : first + 64]])
                                       .to(processes.device)) for first in range(0, count, 64)])
    if config.stage != "dual" and not config.init_from:
        whiten_projection(model.quant_conv, encoded, processes)
    introduced = {"semantic": [0], "dual": [1], "single": range(len(model.config.codebook_sizes))}
    for stream in introduced[config.stage] if config.codebook.codebook_init == "kmeans" else ():
        vectors = model.quantizer.residuals(model.quant_conv(encoded), stream)
        initialise_codebook(model.quantizer, stream, vectors, config.run.seed, processes)


@dataclass
class TokenizerState(TrainState):
    """The training state of the tokenizer, with its losses and the discriminator's optimizer."""

    model: VQModel
    loss: TokenizerLoss
    disc_optimizer: torch.optim.Optimizer
    usage: CodeUsage            # since the last revival
    processes: Processes
    start: Start = Start()      # what was taken from --init-from

    def state_dict(self) -> dict[str, Any]:
        """Nested dict for `utils.checkpoint`."""
        return super().state_dict() | {
            "discriminator": get_model_state_dict(self.loss.discriminator),
            "disc_optimizer": get_optimizer_state_dict(self.loss.discriminator, self.disc_optimizer),
            "usage": self.usage.total(self.processes),  # the sum, since a checkpoint keeps one process's copy
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a loaded state."""
        super().load_state_dict(state)
        set_model_state_dict(self.loss.discriminator, state["discriminator"])
        set_optimizer_state_dict(self.loss.discriminator, self.disc_optimizer, state["disc_optimizer"])
        self.usage.counts = state["usage"]
        if not self.processes.is_main:
            self.usage.reset()


def set_up(config: VQTrainConfig, initial: Initial | None, processes: Processes) -> TokenizerState:
    """Model, losses and optimizers before the first step; initial: a tokenizer to start from, of which stage 2 takes all."""
    model, options = build_model(config, initial), config.optim
    start = plan_start(model, initial, config.init_strict or config.stage == "dual")
    start.load(model)
    loss = build_loss(config, processes.device)
    model.to(processes.device).to(memory_format=image_layout(processes.device))
    if compiles(config.compile, processes.device):
        model.encoder.compile(options=SYMBOLIC_SIZES)  # evaluation brings other batches
        model.decoder.compile(options=SYMBOLIC_SIZES)
    if config.stage == "semantic":
        model.quantizer.trained(1).requires_grad_(False)
    betas = options.beta1, options.beta2
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=options.lr, betas=betas, weight_decay=options.weight_decay, fused=True)
    disc_optimizer = torch.optim.Adam(loss.discriminator.parameters(), lr=options.lr, betas=betas, fused=True)
    for each in (optimizer, disc_optimizer):
        initialise_optimizer(each)
    usage = CodeUsage(model.config.codebook_sizes, processes.device)
    ema = EMA(model, options.ema_decay) if options.ema_decay else None
    return TokenizerState(model, optimizer, ema, loss, disc_optimizer, usage, processes, start)


def train_step(training: TokenizerState, loader: Iterator[tuple[Tensor, Tensor, Tensor]], plan: StepPlan,
               config: VQTrainConfig, run: Run, step: int) -> None:
    """One step of generator and, from --disc-start on, discriminator."""
    loss, device = training.loss, run.processes.device
    discriminating = config.loss.disc_weight > 0 and step >= config.loss.disc_start
    bf16 = trains_in_bf16(config.optim.mixed_precision, device)
    for _ in range(plan.accumulation):
        with run.timed("data"):
            batch = next(loader)
        images = batch[0].to(device, non_blocking=True, memory_format=image_layout(device))
        loss.discriminator.requires_grad_(False)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            total, terms, reconstructions, quantized = autoencoder_loss(training.model, loss, images, config, step)
        (total / plan.accumulation).backward()
        if config.codebook.revive_every:
            training.usage.add(quantized.codes)
        if discriminating:
            loss.discriminator.requires_grad_(True)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                disc_total, disc_terms = loss.discriminate(images, reconstructions)
            weight = config.loss.disc_weight if PROCEDURES[config.loss.recipe].weigh_discriminator else 1.0
            (weight * disc_total / plan.accumulation).backward()
            terms = terms | disc_terms
        run.metrics.add(terms)
    groups, max_norm = clipping_groups(training.model, config.loss.recipe), config.optim.max_grad_norm
    norm = optimizer_step("tokenizer", groups, training.optimizer, run, max_norm)
    if training.ema:
        training.ema.update(step)
    run.metrics.add({"gradient_norm": norm})
    if discriminating:
        optimizer_step("discriminator", [list(loss.discriminator.parameters())], training.disc_optimizer, run, max_norm)


def revive(training: TokenizerState, dataset: ImageDataset, config: VQTrainConfig, run: Run, step: int) -> None:
    """Move dead codes of the codebooks this stage trains onto latents of fresh images; starts counting anew."""
    model, processes = training.model, run.processes
    counts = training.usage.total(processes)
    rows = torch.randint(len(dataset), (64,)).tolist()
    images = torch.stack([dataset[(step, row)][0] for row in rows]).to(processes.device)
    model.eval()
    for stream in range(model.quantizer.streams(trained_streams(config))):
        with torch.no_grad():
            vectors = model.quantizer.residuals(model.latents(images), stream)
        moved = revive_dead_codes(model.quantizer, stream, counts[stream], vectors, training.optimizer, processes)
        if moved:
            log.info("step %d: revived %d codes of codebook %d", step + 1, moved, stream)
    model.train()
    training.usage.reset()


def evaluate(training: TokenizerState, dataset: ImageDataset, plan: StepPlan, config: VQTrainConfig, run: Run,
             step: int) -> dict[str, float]:
    """Whole-set figures and pictures of the averaged (or, without averaging, the present) weights."""
    model, streams = training.model.eval(), trained_streams(config)
    with run.timed("evaluation"), training.averaged():
        figures = evaluate_tokenizer(model, dataset, streams, training.loss.perceptual, run.processes, plan.micro_batch,
                                     config.images.num_workers, distance_name(config.perceptual))
        if run.processes.is_main:
            run.picture(step + 1, "reconstructions", reconstruction_grid(ByCodes(model, streams), dataset, run.processes.device))
    model.train()
    run.write_evaluation(step, figures)
    care = remedies(model.config, config.codebook.codebook_init, config.codebook.revive_every)
    if (usage := warn_of_collapse(figures, model.config, config.images.image_size, care)) < COLLAPSED:
        run.doubt(f"step {step + 1}: a codebook is used to {100 * usage:.1f}%")
    return figures


def export_tokenizer(training: TokenizerState, config: VQTrainConfig, run: Run, step: int, figures: dict[str, float],
                     folder: Path) -> None:
    """Write tokenizer.safetensors into `folder`, averaged where averaging is on, with its configuration and latest figures."""
    if config.stage == "semantic":  # stage 2 goes on with it under --recipe released
        export(folder / "discriminator.safetensors", "discriminator", training.loss.discriminator.state_dict(),
               {"step": step}, run.processes)
    with run.timed("checkpoint"), training.averaged():
        tensors = training.model.state_dict()
        about = TokenizerProvenance(fingerprint(tensors), config.stage, step, config.images.image_size, figures)
        export(folder / "tokenizer.safetensors", "tokenizer", tensors,
               to_dict(about) | {"model": to_dict(training.model.config)}, run.processes)


def train(config: VQTrainConfig, processes: Processes) -> None:
    """Train one stage to its end, resuming where an earlier run of the same folder stopped."""
    set_up_logging(processes)
    training_set, evaluation_set = open_datasets(config)
    plan = plan_steps(config.batch, len(training_set), processes.world_size)
    training = set_up(config, read_initial(config.init_from, "tokenizer"), processes)
    begun_from = training.start.facts
    record = RunRecord("tokenizer", model=to_dict(training.model.config) | {"stage": config.stage} | begun_from,
                       defaults=to_dict(VQConfig()) | begun_from, options=to_dict(config), fixed=FIXED_OPTIONS,
                       flags=MODEL_FLAGS)
    run = Run(config.run, record, processes, plan.total_steps)
    log.info(first_line(f"{config.tokenizer.vq_model}, stage {config.stage}", len(training_set),
                        f"{training_set.source.num_classes} classes", sum(p.numel() for p in training.model.parameters()), plan,
                        processes))
    first_step = run.resume(training)
    if first_step == 0 and training.start.text:
        log.info(training.start.text)
    if first_step == 0 and config.codebook.codebook_init != "uniform":
        introduce_codebook(training.model, training_set, config, processes)
    batches = GlobalBatches(len(training_set), plan, processes.rank, config.run.seed, first_step)
    loader = iter(train_loader(training_set, batches, config.images.num_workers))
    training.model.train()
    figures: dict[str, float] = {}
    for step in run.steps():
        lr = learning_rate(config.optim, step, plan.total_steps)
        set_learning_rate(lr, training.optimizer, training.disc_optimizer)
        train_step(training, loader, plan, config, run, step)
        every = config.codebook.revive_every
        if every and (step + 1) % every == 0 and step + 1 < 0.8 * plan.total_steps:
            revive(training, training_set, config, run, step)
        run.after_step(step, plan.global_batch, lr=lr)
        if snapshot := run.snapshot(step, plan.steps_per_epoch):  # before the checkpoint: what follows one is not made again
            export_tokenizer(training, config, run, step + 1, figures, snapshot)
        if run.due(config.evaluation.eval_every, step):
            figures = evaluate(training, evaluation_set, plan, config, run, step)
        if run.checkpoint_due(step):
            run.checkpoint(step, training)  # leaves here when asked to stop
            export_tokenizer(training, config, run, step + 1, figures, run.folder)
    if run.lacks_export:
        figures = evaluate(training, evaluation_set, plan, config, run, plan.total_steps - 1)
        export_tokenizer(training, config, run, plan.total_steps, figures, run.folder)
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
