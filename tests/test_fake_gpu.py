"""Training, encoding and evaluation on CUDA tensors without values: nothing is on the wrong device, and no step waits.

A step that must know a value, and so would make the host wait for the device, raises; decoding is in test_decoding.py.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoregressive.models.gpt import GPT
from autoregressive.train import extract_codes_c2i, train_c2i
from autoregressive.train.options import TrainConfig
from autoregressive.train.options import recipe as gpt_recipe
from evaluations.c2i.inception import Inception
from tests.conftest import TINY_GPT
from tests.fake_cuda import Watch, fake_cuda, to_cuda
from tests.test_decoding import DECODED, needs_cuda_build, shape_of
from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.codebook import CodeUsage
from tokenizer.tokenizer_image.discriminator import PatchGAN
from tokenizer.tokenizer_image.perceptual import PerceptualOptions, build_perceptual
from tokenizer.tokenizer_image.quantizer import QUANTIZERS
from tokenizer.tokenizer_image.vq_loss import TokenizerLoss
from tokenizer.tokenizer_image.vq_model import VQModel, build_tokenizer
from tokenizer.tokenizer_image.vq_options import VQTrainConfig
from tokenizer.tokenizer_image.vq_options import recipe as vq_recipe
from utils.batches import plan_steps
from utils.config import parse
from utils.distributed import Processes
from utils.ema import EMA
from utils.optim import initialise_optimizer
from utils.run import MeanMetrics, Run
from utils.train_state import TrainState

GPU = Processes(0, 1, 0, torch.device("cuda"))
pytestmark = needs_cuda_build


@pytest.fixture(autouse=True)
def bf16_as_on_a_gpu(monkeypatch) -> None:
    """Autocast asks the driver, and there is none."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)


def a_run() -> Any:
    """What a step needs of a run."""
    run: Any = SimpleNamespace(processes=GPU, metrics=MeanMetrics(), timed=lambda what: nullcontext(), bad_steps={})
    run.watch_gradient = lambda norm, name="model": Run.watch_gradient(run, norm, name)
    return run


def backward_of(*modules: nn.Module) -> Any:
    """The backward pass, which needs a driver: it leaves a gradient on every parameter that is trained."""
    def backward(loss: Tensor) -> None:
        assert loss.device.type == "cuda" and loss.ndim == 0
        for parameter in (p for module in modules for p in module.parameters() if getattr(p, "trained", True)):
            parameter.grad = torch.empty_like(parameter)

    return mock.patch.object(Tensor, "backward", backward)


def optimizer_of(module: nn.Module, kind: type) -> torch.optim.Optimizer:
    """A fused optimizer of all parameters."""
    optimizer = kind(list(module.parameters()), lr=1e-3, fused=True)
    initialise_optimizer(optimizer)
    return optimizer


def batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same batch again and again, as a loader gives it: on the host."""
    while True:
        yield tensors


@pytest.mark.parametrize("paradigm", DECODED)
def test_a_step_of_the_gpt_does_not_wait(paradigm):
    """Two micro-batches, clipping, a step that may be left out, the average, and the metrics."""
    words = "--code-path none --global-batch-size 8 --micro-batch-size 4 --ema-decay 0.9 --data-parallel none"
    config = parse(TrainConfig, gpt_recipe, words.split())
    plan, run = plan_steps(config.batch, 8, 1), a_run()
    with fake_cuda():
        gpt = to_cuda(GPT(replace(TINY_GPT, **shape_of(paradigm), class_dropout=0.1, token_dropout=0.1)), torch.float32).train()
        gpt.rotary = gpt.build_rotary().to("cuda")
        training = TrainState(gpt, optimizer_of(gpt, torch.optim.AdamW), EMA(gpt, 0.9))
        loader = batches(torch.zeros(4, len(gpt.config.codebook_sizes), 16, dtype=torch.long), torch.zeros(4, dtype=torch.long))
        with backward_of(gpt), Watch() as watch:
            train_c2i.train_step(gpt, training, loader, plan, config, run, 0)
    copied = sum(watch.copies.values())
    assert copied == 2 * plan.accumulation  # codes and labels of each micro-batch, and nothing else
    assert all(value.device.type == "cuda" for value in run.metrics.sums.values())


@pytest.mark.parametrize("stage, disc_start", [("semantic", 0), ("dual", 0), ("dual", 100)])
def test_a_step_of_the_tokenizer_does_not_wait(stage, disc_start):
    """Every third step of stage 2, with and without discriminator; usage is counted for revivals."""
    start = ["--init-from", "first"] if stage == "dual" else []
    words = f"--data-path none --stage {stage} --global-batch-size 2 --revive-every 5 --disc-start {disc_start} --ema-decay 0.9"
    config = parse(VQTrainConfig, vq_recipe, [*words.split(), *start])
    perceptual = build_perceptual(PerceptualOptions("random"), torch.device("cpu"))
    plan, run = plan_steps(config.batch, 2, 1), a_run()
    with fake_cuda():
        model = to_cuda(build_tokenizer("VQ-8-small", quantizer="dual", codebook_sizes=(8, 16)), torch.float32).train()
        loss = TokenizerLoss(to_cuda(type(perceptual)(net="vgg", pnet_rand=True, verbose=False), torch.float32).eval(),
                             to_cuda(PatchGAN(8, 1), torch.float32), discriminator_start=disc_start)
        training = vq_train.TokenizerState(
            model, optimizer_of(model, torch.optim.Adam), EMA(model, 0.9), loss,
            optimizer_of(loss.discriminator, torch.optim.Adam), CodeUsage((8, 16), GPU.device), GPU)
        with backward_of(model, loss.discriminator), Watch() as watch, \
                mock.patch.object(vq_train, "clipping_groups", lambda model, recipe: [list(model.parameters())]):
            vq_train.train_step(training, batches(torch.zeros(2, 3, 32, 32)), plan, config, run, 2)
    assert sum(watch.copies.values()) == 1  # the images


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_extraction_and_decoding_do_not_wait(quantizer):
    """Pixels go over as bytes, codes come back once the next batch is on the device."""
    sizes = (16,) if QUANTIZERS[quantizer][1] == 1 else (8, 16)
    with fake_cuda():
        tokenizer = to_cuda(build_tokenizer("VQ-8-small", quantizer=quantizer, codebook_sizes=sizes), torch.float32).eval()
        with Watch() as watch:
            codes = extract_codes_c2i.encode(tokenizer, torch.zeros(2, 10, 32, 32, 3, dtype=torch.uint8), GPU.device, bf16=True)
            images = tokenizer.decode_codes(codes[:, 0].unflatten(-1, (4, 4)))
    assert codes.shape == (2, 10, len(sizes), 16) and images.shape == (2, 3, 32, 32) and codes.device.type == "cuda"
    assert sum(watch.copies.values()) == 1


def test_codes_are_fetched_one_batch_late():
    """While the host writes one batch, the device works on the next."""
    events, tokenizer = [], VQModel(build_tokenizer("VQ-8-small", codebook_sizes=(8, 16)).config).eval()

    def loader() -> Iterator[tuple]:
        for batch in range(3):
            events.append(f"begin {batch}")
            yield np.array([batch]), torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8), np.array([], int)

    for rows, codes, _ in extract_codes_c2i.encoded(loader(), tokenizer, torch.device("cpu"), bf16=False):
        events.append(f"write {rows[0]}")
        assert codes.shape == (1, 1, 2, 16)
    assert events == ["begin 0", "begin 1", "write 0", "begin 2", "write 1", "write 2"]


def test_the_evaluators_network_does_not_wait():
    """Features of a batch, with cuDNN."""
    with fake_cuda():
        network = to_cuda(Inception(), torch.float32)
        with Watch() as watch:
            pool3, spatial, probs = network(torch.zeros(2, 64, 64, 3, dtype=torch.uint8, device="cuda").movedim(-1, 1))
    assert pool3.shape == (2, 2048) and spatial.shape == (2, 2023) and probs.shape == (2, 1008)
    assert not watch.copies and all(each.device.type == "cuda" for each in (pool3, spatial, probs))
