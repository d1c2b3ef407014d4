"""What a training would be, before anything is reserved: `train_c2i.py --dry-run`."""

from typing import Any

from autoregressive.models.conditions import CONDITIONS
from autoregressive.models.transformer import GPTConfig
from autoregressive.train.estimate import Footprint, fitted, kept_states, measure, memory, usable
from autoregressive.train.options import TrainConfig, check_codes, gpt_config, known_header, known_sizes, told
from utils.batches import StepPlan, plan_steps
from utils.code_shards import CodeHeader
from utils.config import flatten, to_dict
from utils.devices import memory_bytes, peak_flops
from utils.distributed import Processes
from utils.optim import trains_in_bf16

IMAGENET = 1_281_167  # training images, where there are no codes yet
UTILISATION = 0.4     # of a device's peak, assumed for the hours


def count_images(config: TrainConfig, model: GPTConfig, header: CodeHeader | None) -> int:
    """Images of the codes, once they are checked as training does; ImageNet's where there are no codes."""
    if header is None:
        return IMAGENET
    check_codes(config, model, header)
    return header.images


def memory_row(config: TrainConfig, footprint: Footprint, world_size: int, device_bytes: float | None, bf16: bool) -> str:
    """The estimated memory of a device in words."""
    need = memory(footprint, config, world_size, bf16)
    parts = {"weights and optimizer": need.states, "copies": need.copies, "activations": need.activations}
    text = f"{need.total / 2**30:.1f} GiB: " + ", ".join(f"{name} {part / 2**30:.1f}" for name, part in parts.items())
    if device_bytes is None:
        return f"{text} (give --device-memory GIB for the micro-batch that fits)"
    fits = "fits" if need.total <= usable(device_bytes) else "does NOT fit"
    return f"{text}; {fits} a device of {device_bytes / 2**30:.0f} GiB"


def compute_row(config: TrainConfig, footprint: Footprint, plan: StepPlan, peak: float | None) -> str:
    """Flops and GPU-hours in words."""
    passes = 4 if config.parallel.activation_checkpointing else 3  # forward, twice that backward, recomputation
    total = footprint.flops * passes * plan.global_batch * plan.total_steps
    rate, device = (peak, "this device") if peak else (989e12, "an H100")
    return (f"{3 * footprint.flops / 1e12:.2f} TFLOP an image; {total / rate / UTILISATION / 3600:,.0f} device-hours at "
            f"{UTILISATION:.0%} of the {rate / 1e12:.0f} TFLOP/s of {device}")


def print_dry_run(config: TrainConfig, processes: Processes) -> None:
    """Model, steps, memory and time of a training, and the options that are not --help's defaults."""
    world_size = config.devices.world_size or processes.world_size
    device_bytes = memory_bytes(processes.device, config.devices.device_memory)
    # A named amount of memory means a GPU, also where this machine has none.
    bf16 = trains_in_bf16(config.optim.mixed_precision, processes.device) or (
        config.optim.mixed_precision == "auto" and config.devices.device_memory > 0)
    header, code_map = known_header(config.codes)
    model = gpt_config(config.gpt, known_sizes(config.gpt, header, code_map), code_map, told(config).fields)
    images, footprint = count_images(config, model, header), measure(model, bf16)
    if device_bytes is not None:
        config = fitted(config, footprint, world_size, device_bytes, bf16)
    plan = plan_steps(config.batch, images, world_size)
    rows: dict[str, Any] = {
        "model": f"{config.gpt.gpt_model}, {model.paradigm}, codebooks {' + '.join(map(str, model.codebook_sizes))}, grid "
                 f"{model.grid_size}x{model.grid_size}, {CONDITIONS[model.condition].describe(model)}",
        "parameters": f"{footprint.parameters:,}",
        "steps": f"{plan.total_steps:,} of {plan.global_batch} images, {plan.steps_per_epoch:,} an epoch of {images:,} images",
        "micro-batch": f"{plan.micro_batch} x {plan.accumulation} on each of {world_size} processes, "
                       f"{config.parallel.data_parallel}, {'bf16' if bf16 else 'float32'}"
                       f"{', layers recomputed' if config.parallel.activation_checkpointing else ''}",
        "memory of a device": memory_row(config, footprint, world_size, device_bytes, bf16),
        "checkpoint": f"{4 * kept_states(footprint, config) / 2**30:.1f} GiB, "
                      f"{config.run.keep_checkpoints} kept",
        "compute": compute_row(config, footprint, plan, peak_flops(processes.device, config.devices.peak_tflops)),
    }
    for name, value in rows.items():
        print(f"{name:22} {value}")
    print("options:")
    for name, value in flatten(to_dict(config)).items():
        if value not in ("", 0, [], False, None):
            print(f"  {name:26} {value}")
