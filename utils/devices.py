"""What a device can do and hold, and what suits it: a table of published figures, what the driver says, and defaults."""

import logging
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Annotated

import torch
import torch._dynamo
from torch import nn

from utils.config import choices

log = logging.getLogger("devices")

# Dense bf16 TFLOP/s by a part of the device's name, from the makers' data sheets; the first that fits counts.
PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.0, "GH200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H800": 989.0,
               "A100": 312.0, "A800": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0, "A6000": 155.0,
               "RTX 5090": 209.0, "RTX 4090": 165.0, "RTX 3090": 71.0, "MI300X": 1307.0, "MI250X": 191.0}


def peak_flops(device: torch.device, tflops: float = 0.0) -> float | None:
    """Products and sums in bf16 that a device does in a second at most; tflops: what the user says; None where unknown."""
    if tflops:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((each * 1e12 for part, each in PEAK_TFLOPS.items() if part in name), None)


def memory_bytes(device: torch.device, gib: float = 0.0) -> float | None:
    """Memory of a device; gib: what the user says; None for a CPU, which swaps rather than fails."""
    if gib:
        return gib * 2**30
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


@lru_cache
def loader_processes(wanted: int) -> int:
    """How many of the loader processes that were asked for are started: not more than the CPUs that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted > cpus:
        log.info("%d loader processes, one for each CPU that this process may use, instead of --num-workers %d", cpus, wanted)
    return min(wanted, cpus)


Compile = Annotated[str, choices(("auto", "on", "off"))]


def compiles(option: str, device: torch.device) -> bool:
    """Whether to compile for a device; auto: on GPUs, where it fuses what would pass through their memory again and again."""
    return option == "on" or (option == "auto" and device.type == "cuda")


# For graphs whose sizes may be symbols: inductor's analysis of coalesced reads is not made for those and fails on some, so that
# nothing is compiled (PyTorch issue 197077; seen with 2.11 on an H100).
SYMBOLIC_SIZES: dict[str, str | int | bool | Callable[..., object]] = {"triton.coalesce_tiling_analysis": False}
_VARIANTS = 32  # of one function: shapes and options of trunk, head and last layer, in training and evaluation


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile layers that share their code, every shape by itself: trunk and head would be one graph of symbolic sizes."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for layer in layers:
        layer.compile(dynamic=False)


def image_layout(device: torch.device) -> torch.memory_format:
    """How a convolutional network with group norms keeps images: a GPU's group norm would turn channels-last back each time."""
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last
