"""Ways to run a decoded step: eagerly, compiled, captured, and on a GPU, which a fake one stands in for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from autoregressive.models import decode_modes
from autoregressive.models.conditions import ClassCondition
from autoregressive.models.ctf import FineOptions, draw_fine, refine
from autoregressive.models.generate import Decoder, SamplingOptions, decode_step, draw_uniforms, new_decoding, restart
from autoregressive.models.gpt import GPT, build_gpt, place
from autoregressive.models.guidance import GUIDANCE
from autoregressive.models.packing import PackedLinears
from autoregressive.models.paradigms import PARADIGMS
from autoregressive.sample import image_decoder
from autoregressive.sample.image_decoder import ImageDecoder
from tests.conftest import TINY_GPT, TINY_VQ, random_codes, randomise
from tests.fake_cuda import Watch, fake_cuda, to_cuda
from tests.test_gpt import teacher_forced_decode
from tests.test_paradigms import COARSE_OF, FINE, VARIANTS, fine_grid, variant
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.beside import Beside
from utils.config import UserError
from utils.optim import native_bf16

OPTIONS = SamplingOptions(guidance="attention", cfg_scale=(1.5, 3.0), cfg_attention_weight=0.1)
DECODED = [name for name, row in PARADIGMS.items() if name != "fine"]
SHALLOW = dict(n_layer=1, head_layers=1)  # compiled faster, by the same code
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")


def shape_of(paradigm: str) -> dict:
    """Fields of GPTConfig beside the paradigm."""
    return dict(paradigm=paradigm, codebook_sizes=(16,) if PARADIGMS[paradigm].codebooks == 1 else (8, 16))


def batch(gpt: GPT, first: int = 0, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and uniforms of some samples."""
    samples = np.arange(first, first + count)
    return torch.from_numpy(samples % 3), draw_uniforms(0, samples, len(gpt.config.codebook_sizes), gpt.config.cells)


@pytest.fixture
def compilations(monkeypatch) -> Iterator[dict]:
    """Counts of torch's compiler, from none on; keys are read by eights, so that a tiny grid reads several lengths."""
    monkeypatch.setattr(decode_modes, "_MULTIPLE", 8)
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@pytest.mark.parametrize("name", VARIANTS)
def test_keys_that_are_not_written_yet_change_nothing(name):
    """Attention reads a fixed number of keys; those behind the newest are hidden, or old batches would show through."""
    gpt = randomise(GPT(variant(name)))
    codes, labels = random_codes(3, gpt.config), torch.tensor([0, 2, 3])
    for exact, more in zip(teacher_forced_decode(gpt, labels, codes), teacher_forced_decode(gpt, labels, codes, extra=7)):
        torch.testing.assert_close(exact, more, atol=1e-4, rtol=0)


@pytest.mark.parametrize("paradigm", DECODED)
def test_compiled_codes_are_the_eager_ones(compilations, paradigm):
    """Speed must not change a sample; one compilation serves every length of keys, scale and batch."""
    gpt = randomise(GPT(replace(TINY_GPT, **shape_of(paradigm), **SHALLOW)))
    eager, compiled = Decoder(gpt), Decoder(gpt, "compiled")
    for first, options in ((0, OPTIONS), (5, OPTIONS), (5, replace(OPTIONS, cfg_scale=(1.2, 2.0)))):
        labels, uniforms = batch(gpt, first)
        assert torch.equal(compiled.draw(labels, options, uniforms), eager.draw(labels, options, uniforms))
    assert compilations["unique_graphs"] == len(set(gpt.paradigm.streams_of))


def test_compiled_fine_labels_are_the_eager_ones(compilations):
    """CTF's second stage, guided and kept to the clusters."""
    gpt, (_, coarse), labels = randomise(GPT(replace(FINE, **SHALLOW))), fine_grid(), torch.tensor([0, 1, 2])
    options = FineOptions(fine_candidates="cluster", fine_cfg_scale=2.0)
    for seed in range(2):
        uniforms = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed))
        eager, compiled = (refine(gpt, labels, coarse, options, uniforms, COARSE_OF, mode) for mode in ("eager", "compiled"))
        assert torch.equal(eager, compiled)
    assert compilations["unique_graphs"] == 1


def test_a_decoder_forgets_the_batch_before(gpt):
    """Buffers are used again: what the last batch left in them must not reach the next, of the same kind or of another."""
    decoder = Decoder(gpt)
    for first, count, options in ((0, 3, OPTIONS), (7, 3, OPTIONS), (7, 2, OPTIONS), (7, 2, replace(OPTIONS, top_k=(2,)))):
        labels, uniforms = batch(gpt, first, count)
        kept = uniforms.clone()
        codes = decoder.draw(labels, options, uniforms)
        assert torch.equal(codes, Decoder(gpt).draw(labels, options, uniforms)) and torch.equal(uniforms, kept)
        decoder.draw(*_swap(batch(gpt, 20, count), options))
        assert torch.equal(codes, Decoder(gpt).draw(labels, options, uniforms))  # also after the decoder has gone on


def _swap(pair: tuple[torch.Tensor, torch.Tensor], options: SamplingOptions) -> tuple:
    return pair[0], options, pair[1]


def test_each_kind_of_step_is_captured_once_and_replayed(monkeypatch):
    """A step while capturing runs nothing: the state must advance by one a call, whether run, captured or replayed."""
    class Graph:
        """A graph that remembers what was called while it was open."""

        calls: list[int]

        def replay(self) -> None:
            """Do it."""
            state.add_(len(self.calls))

    @contextmanager
    def capture(graph, **options):
        before, graph.calls = state.clone(), []
        open_graphs.append(graph)
        yield
        open_graphs.pop()
        state.copy_(before)

    def step(model, state, keys, streams) -> None:
        state.add_(1)
        ran.append((len(keys), streams))
        for graph in open_graphs:
            graph.calls.append(1)

    state, ran, open_graphs = torch.zeros(1), [], []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    steps, keys = decode_modes.CapturedSteps(step), torch.arange(16)
    kinds = [(8, (0,)), (8, (0,)), (8, (1,)), (8, (0,)), (16, (0,)), (16, (0,)), (8, (0,)), (16, (0,)), (8, (1,)), (8, (1,))]
    for count, (length, streams) in enumerate(kinds, 1):
        steps(None, state, keys[:length], streams)
        assert state.item() == count
    assert sorted(ran) == sorted([(8, (0,)), (8, (1,)), (16, (0,))] * 2)  # once by itself, once while captured


@pytest.mark.skipif(not native_bf16(torch.device("cpu")), reason="this CPU does not compute in bfloat16")
def test_packed_bf16_is_bf16(gpt):
    """Packed weights are another layout of the same numbers, also in half the bytes."""
    place(gpt, "cpu", torch.bfloat16)
    x, packed = torch.randn(4, 48, dtype=torch.bfloat16), PackedLinears(gpt, 4)
    layer = gpt.layers[0].attention.wqkv
    plain = layer(x)
    with packed.in_use():
        assert "forward" in layer.__dict__
        torch.testing.assert_close(layer(x), plain, atol=0.02, rtol=0.02)
    assert torch.equal(layer(x), plain)


# --- images beside codes ---------------------------------------------------------------------------------------------


def test_slices_are_the_whole(monkeypatch):
    """A batch that does not fit memory at once is decoded in parts, in order."""
    tokenizer = VQModel(TINY_VQ).eval()
    codes = torch.stack([torch.randint(size, (5, 16)) for size in TINY_VQ.codebook_sizes], dim=1)
    whole = ImageDecoder(tokenizer, 4, 24, torch.float32)
    monkeypatch.setattr(image_decoder, "_PIXELS", 2 * 32**2)
    parts = ImageDecoder(tokenizer, 4, 24, torch.float32)
    assert (whole.at_once, parts.at_once) == (4096, 2) and parts.start(codes)().shape == (5, 24, 24, 3)
    assert np.abs(whole.start(codes)().astype(int) - parts.start(codes)().astype(int)).max() <= 1


def test_work_beside_is_in_order_and_its_errors_are_raised():
    """A full disk must stop the sampler, and no row may be lost at the end."""
    done: list[int] = []
    with Beside() as thread:
        for number in range(20):
            thread.run(done.append, number)
    assert done == list(range(20))

    def fail() -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"), Beside() as thread:
        thread.run(fail)
    with pytest.raises(UserError, match="the disk is full"), Beside() as thread:
        thread.run(fail)
        thread.run(done.append, 20)
    with pytest.raises(KeyError), Beside() as thread:
        thread.run(fail)
        raise KeyError
    assert done == list(range(20))


# --- on a fake GPU -----------------------------------------------------------------------------------------------------


def on_cuda(gpt: GPT) -> GPT:
    """Move a GPT to the fake GPU, as `place` would to another."""
    to_cuda(gpt.eval(), torch.bfloat16)
    gpt.rotary = gpt.build_rotary()
    return gpt


def cuda_gpt(paradigm: str, size: str = "GPT-B") -> GPT:
    """A GPT on the fake GPU, as the sampler holds it."""
    sizes = (16384,) if PARADIGMS[paradigm].codebooks == 1 else (256, 4096)
    return on_cuda(build_gpt(size, paradigm=paradigm, codebook_sizes=sizes))


# Kernels of a cell with guidance, GPT-B, eagerly: what a GPU's host has to launch (torch 2.14).
KERNELS = {"single": 329, "alternating": 628, "grouped": 628, "independent": 341, "hierarchical": 577,
           "conditional": 354}


@needs_cuda_build
@pytest.mark.parametrize("paradigm", DECODED)
def test_a_cell_stays_on_the_device(paradigm):
    """A copy or a wait in each of 256 cells is what makes a GPU idle; and the number of kernels is what eager decoding costs."""
    with fake_cuda():
        gpt = cuda_gpt(paradigm)
        decoding = new_decoding(gpt, OPTIONS, 4, multiple=64)
        restart(gpt, decoding, torch.arange(4), torch.rand(4, 2, 256))
        steps = gpt.paradigm.streams_of
        a_cell = steps[: len(steps) // gpt.config.cells] if paradigm != "grouped" else [steps[0], steps[-1]]
        with Watch() as watch:
            for streams in a_cell:
                decode_step(gpt, decoding, decoding.cache.positions[:64], streams)
    assert not watch.copies and watch.kernels.total() == pytest.approx(KERNELS[paradigm], rel=0.03)  # versions of torch differ


@needs_cuda_build
@pytest.mark.parametrize("guidance, interval", [*((name, -1) for name in GUIDANCE), ("attention", 3)])
@pytest.mark.parametrize("paradigm", DECODED)
def test_whole_grids_are_drawn_without_a_wait(monkeypatch, paradigm, guidance, interval):
    """Every paradigm under every schedule: all on one device, and no step needs to know a value."""
    monkeypatch.setattr(ClassCondition, "check", lambda self, labels: None)  # the one wait, before the loop
    scale = (2.0,) if guidance == "constant" else (1.5, 3.0)
    options = SamplingOptions(guidance=guidance, cfg_scale=scale, cfg_interval=interval, top_k=(5,), top_p=(0.9,))
    with fake_cuda():
        gpt = on_cuda(GPT(replace(TINY_GPT, **shape_of(paradigm))))
        codes = Decoder(gpt).draw(torch.arange(3), options, torch.rand(3, 2, 16))
        assert codes.device.type == "cuda" and codes.shape == (3, len(gpt.config.codebook_sizes), 16)


@needs_cuda_build
@pytest.mark.parametrize("candidates", ["all", "cluster"])
def test_fine_labels_are_drawn_without_a_wait(candidates):
    """CTF's second stage, which is one step."""
    options = FineOptions(fine_candidates=candidates, fine_cfg_scale=2.0, fine_top_k=5)
    with fake_cuda():
        gpt = on_cuda(GPT(FINE))
        labels, coarse, uniforms, coarse_of = (torch.zeros(shape, dtype=kind).to("cuda") for shape, kind in (
            ((3,), torch.long), ((3, 1, 16), torch.long), ((3, 16), torch.float32), ((16,), torch.long)))
        with Watch() as watch:
            codes = draw_fine(gpt, labels, coarse, options, uniforms, coarse_of)
    assert not watch.copies and codes.device.type == "cuda" and codes.shape == coarse.shape
