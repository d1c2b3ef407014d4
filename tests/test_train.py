"""Training for real: resume after a kill, two processes, sharding, extraction, sampling through the command lines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoregressive.models.gpt import load_gpt
from autoregressive.train import evaluate_c2i, train_c2i
from autoregressive.train.optimizers import make_optimizer
from autoregressive.train.options import GPTOptions, TrainConfig, gpt_config, recipe
from tests.conftest import REPOSITORY, call, command, losses
from tests.test_codes import write_codes
from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.vq_model import load_tokenizer
from tokenizer.tokenizer_image.vq_options import VQTrainConfig
from tokenizer.tokenizer_image.vq_options import recipe as vq_recipe
from utils.batches import BatchOptions, GlobalBatches, plan_steps
from utils.checkpoint import read_export
from utils.config import UserError, check_options, parse
from utils.distributed import Processes
from utils.ema import EMA
from utils.optim import OptimOptions, clip_gradients, learning_rate

TRAIN = "autoregressive/train/train_c2i.py"
VQ_TRAIN = "tokenizer/tokenizer_image/vq_train.py"


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """Random codes shared by the tests of this file."""
    return write_codes(tmp_path_factory.mktemp("data") / "codes")


def gpt_options(codes: Path, run_dir: Path, steps: int = 8, **extra) -> list:
    """Command line of a small deterministic training: no dropout, one image size."""
    options = dict(code_path=codes, run_dir=run_dir, gpt_model="GPT-tiny", image_size=32, downsample_size=8,
                   num_classes=3, steps=steps, global_batch_size=8, lr=1e-3, log_every=1, checkpoint_every=4,
                   num_workers=0, dropout=0.0, class_dropout=0.0, device="cpu", mixed_precision="none") | extra
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return [*flags, "--codebook-sizes", 8, 16]


@pytest.fixture(scope="module")
def reference(codes, tmp_path_factory) -> dict[int, float]:
    """Losses of eight steps in one process, uninterrupted."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    command(TRAIN, *gpt_options(codes, run_dir, data_parallel="none", ema_decay=0.9))
    assert load_gpt(run_dir).config.grid_size == 4
    return losses(run_dir)


def test_a_killed_run_resumes_on_the_same_loss_curve(codes, tmp_path, reference):
    """Kill -9 at any moment, same command again: the loss of every step is that of an uninterrupted run."""
    options = gpt_options(codes, tmp_path / "run", steps=40, data_parallel="none", ema_decay=0.9)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, TRAIN, *map(str, options)], cwd=REPOSITORY, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        checkpoints = list((tmp_path / "run" / "checkpoints").glob("step-*"))
        if checkpoints:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    resumed = command(TRAIN, *options)
    assert "resumed from" in resumed.stderr
    seen = losses(tmp_path / "run")
    assert sorted(seen) == list(range(1, 41))
    for step, value in reference.items():
        assert seen[step] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_two_processes_train_like_one(codes, tmp_path, reference, mode):
    """Data parallelism is an implementation detail: the same batches must give the same losses."""
    extra = dict(ema_decay=0.9) | (dict(shard_size=1) if mode == "hsdp" else {})
    held_out = write_codes(tmp_path / "held-out", images=21)
    command(TRAIN, *gpt_options(codes, tmp_path / "run", data_parallel=mode, val_code_path=held_out, eval_every=4, **extra),
            processes=2)
    seen = losses(tmp_path / "run")
    assert seen == pytest.approx(reference, abs=2e-5)
    assert all(torch.isfinite(p).all() for p in load_gpt(tmp_path / "run").parameters())
    # What training logs of held-out codes is what evaluate_c2i.py says of the exported weights.
    bits = losses(tmp_path / "run", "eval/bits_per_image")
    call(evaluate_c2i.main, "--gpt-ckpt", tmp_path / "run", "--code-path", held_out, "--out", tmp_path / "bits.json",
         "--device", "cpu")
    alone = json.loads((tmp_path / "bits.json").read_text())
    assert sorted(bits) == [4, 8] and bits[8] == pytest.approx(alone["bits_per_image"], abs=1e-3)
    assert losses(tmp_path / "run", "eval/images") == {4: 21, 8: 21} and alone["steps"] == 8


def test_a_sharded_run_resumes_on_another_world_size(codes, tmp_path, reference):
    """Two processes' shards, carried on by one: the losses go on where they were."""
    command(TRAIN, *gpt_options(codes, tmp_path / "run", steps=4, data_parallel="fsdp", ema_decay=0.9), processes=2)
    command(TRAIN, *gpt_options(codes, tmp_path / "run", steps=8, data_parallel="none", ema_decay=0.9))
    assert losses(tmp_path / "run") == pytest.approx(reference, abs=2e-5)


def test_gradient_accumulation_does_not_change_the_run(codes, tmp_path, reference):
    """Smaller micro-batches for smaller devices: same batch, same losses."""
    call(train_c2i.main, *gpt_options(codes, tmp_path / "run", data_parallel="none", ema_decay=0.9, micro_batch_size=2))
    assert losses(tmp_path / "run") == pytest.approx(reference, abs=2e-5)


def test_a_run_starts_from_given_weights(codes, tmp_path, reference, capsys):
    """Fine-tuning: with a learning rate of zero the start is what comes out; another shape is refused."""
    command(TRAIN, *gpt_options(codes, tmp_path / "first", steps=3, data_parallel="none"))
    options = gpt_options(codes, tmp_path / "run", steps=2, data_parallel="none", lr=0, init_from=tmp_path / "first")
    call(train_c2i.main, *options)
    for start, end in zip(load_gpt(tmp_path / "first").parameters(), load_gpt(tmp_path / "run").parameters(), strict=True):
        assert torch.equal(start, end)
    with pytest.raises(SystemExit):
        call(train_c2i.main, *gpt_options(codes, tmp_path / "other", gpt_model="GPT-small", init_from=tmp_path / "first"))
    assert "--init-from" in capsys.readouterr().err


def test_a_finished_run_is_left_as_it_is(codes, tmp_path, capsys):
    """The same command again does nothing; another objective is another run."""
    options = gpt_options(codes, tmp_path / "run", steps=2, data_parallel="none")
    call(train_c2i.main, *options)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.*")
              if path.name not in ("log.txt", ".lock")}
    call(train_c2i.main, *options)
    assert before == {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in before} and "gpt.safetensors" in before
    with pytest.raises(SystemExit):
        call(train_c2i.main, *options, "--semantic-weight", 3)
    assert "semantic_weight" in capsys.readouterr().err


def test_gradients_are_clipped_or_left():
    """0 means no clipping, as in LlamaGen; it must not mean gradients of length 0."""
    weight = torch.nn.Parameter(torch.zeros(4))
    for norm, expected in ((0.5, 0.5), (0.0, 6.0), (9.0, 6.0)):
        weight.grad = torch.full((4,), 3.0)
        assert clip_gradients([weight], norm).item() == pytest.approx(6.0)
        assert weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)


def test_a_non_finite_step_is_left_out(codes, tmp_path, monkeypatch, caplog):
    """One bad batch must not ruin the weights and both moments of the optimizer."""
    original, calls = train_c2i.objective, []

    def poisoned(logits, target, options):
        loss, parts = original(logits, target, options)
        calls.append(1)
        return (loss * float("nan"), parts) if len(calls) == 3 else (loss, parts)

    monkeypatch.setattr(train_c2i, "objective", poisoned)
    call(train_c2i.main, *gpt_options(codes, tmp_path / "run", data_parallel="none"))
    assert all(torch.isfinite(p).all() for p in load_gpt(tmp_path / "run").parameters())
    assert "up to step 3: gradients of the model that are not finite, 1 steps left out" in (
        tmp_path / "run" / "log.txt").read_text()


def test_ten_bad_steps_in_a_row_end_a_run(codes, tmp_path, monkeypatch, capsys):
    """Nothing but bad gradients: one sentence at the next line of the log, and the weights are those of the start."""
    original, before = train_c2i.objective, []

    def poisoned(logits, target, options):
        loss, parts = original(logits, target, options)
        return loss * float("nan"), parts

    def kept(*arguments):
        before.extend(built := set_up(*arguments))
        return built

    set_up = train_c2i.set_up
    monkeypatch.setattr(train_c2i, "set_up", kept)
    monkeypatch.setattr(train_c2i, "objective", poisoned)
    with pytest.raises(SystemExit):
        call(train_c2i.main, *gpt_options(codes, tmp_path / "run", steps=20, data_parallel="none", ema_decay=0.9, log_every=12))
    assert "12 steps in a row up to 12 had gradients of the model that are not finite" in capsys.readouterr().err
    gpt, training = before
    torch.manual_seed(0)
    start = type(gpt)(gpt.config)
    for now, average, then in zip(gpt.parameters(), training.ema.averages.values(), start.parameters(), strict=True):
        assert torch.equal(now, then) and torch.equal(average, then)


def test_models_are_kept_by_epoch(codes, tmp_path):
    """Figure 7c needs the model after every so many epochs; a resumed run makes those that are missing."""
    options = gpt_options(codes, tmp_path / "run", steps=13, data_parallel="none", keep_every=0.5, checkpoint_every=5)
    call(train_c2i.main, *options)
    kept = sorted(path.parent.name for path in (tmp_path / "run" / "snapshots").glob("*/gpt.safetensors"))
    assert kept == ["epoch-0000.50", "epoch-0001", "epoch-0001.50", "epoch-0002"]  # of six steps each
    assert [load_gpt(tmp_path / "run" / "snapshots" / name).provenance.step for name in kept] == [3, 6, 9, 12]
    whole = load_gpt(tmp_path / "run" / "snapshots" / "epoch-0002").state_dict()
    for gone in ("checkpoints/step-00000013", "snapshots/epoch-0002", "snapshots/epoch-0001.50"):
        shutil.rmtree(tmp_path / "run" / gone)
    call(train_c2i.main, *options)  # goes on from step 10
    again = load_gpt(tmp_path / "run" / "snapshots" / "epoch-0002").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert not (tmp_path / "run" / "snapshots" / "epoch-0001.50").exists()


def test_biases_and_norms_do_not_decay(gpt):
    """As in the released DDP trainer; its FSDP trainer decays them too."""
    decayed, kept = make_optimizer(gpt, OptimOptions(weight_decay=0.05)).param_groups
    assert {p.ndim for p in kept["params"]} == {1} and kept["weight_decay"] == 0 and decayed["weight_decay"] == 0.05
    assert sum(p.numel() for group in (decayed, kept) for p in group["params"]) == sum(p.numel() for p in gpt.parameters())


def test_a_typed_end_of_the_learning_rate_means_cosine_decay_in_both_trainers():
    """One option, one meaning: a typed --lr-end is reached, unless another schedule is typed."""
    gpt = ["--code-path", "c", "--gpt-model", "GPT-tiny", "--image-size", "32"]
    for trainer, defaults, required in ((TrainConfig, recipe, gpt), (VQTrainConfig, vq_recipe, ["--data-path", "d"])):
        for typed, schedule in (([], "constant"), (["--lr-end", "1e-5"], "cosine"),
                                (["--lr-end", "1e-5", "--lr-schedule", "constant"], "constant")):
            assert parse(trainer, defaults, [*required, *typed]).optim.lr_schedule == schedule


def test_learning_rate_schedules():
    """Warm-up, then the constant or the cosine of table 11, ending at --lr-end."""
    options = OptimOptions(lr=1.0, lr_end=0.1, warmup_steps=4, lr_schedule="cosine")
    assert learning_rate(options, 0, 100) == 0.25 and learning_rate(options, 4, 100) == 1.0
    assert learning_rate(options, 100, 100) == pytest.approx(0.1)
    options.lr_schedule = "constant"
    assert learning_rate(options, 99, 100) == 1.0


def test_batches_do_not_depend_on_the_number_of_processes():
    """Two ranks together take exactly what one takes, every epoch visits every example once, resume continues."""
    def take(rank, world, first=0):
        plan = plan_steps(BatchOptions(epochs=2, global_batch_size=6), 20, world)
        return [sorted(batch) for batch in GlobalBatches(20, plan, rank, 1, first)]

    alone, pair = take(0, 1), list(zip(take(0, 2), take(1, 2)))
    assert alone == [sorted(a + b) for a, b in pair]
    assert take(0, 1, first=4) == alone[4:]
    first_epoch = [index for batch in alone[:3] for _, index in batch]
    assert len(set(first_epoch)) == 18
    assert {epoch for epoch, _ in alone[3]} == {1}


def test_dry_run_prints_and_starts_nothing(tmp_path, capsys):
    """One looks before one reserves 32 GPUs."""
    call(train_c2i.main, "--gpt-model", "GPT-XXL", "--run-dir", tmp_path / "run", "--code-path", "nowhere", "--dry-run")
    printed = capsys.readouterr().out
    assert "1,570,110,336" in printed and "250,200 of 256 images" in printed
    assert "lr_schedule                cosine" in printed and "give --device-memory" in printed
    assert not (tmp_path / "run").exists()
    call(train_c2i.main, "--gpt-model", "GPT-XXL", "--image-size", 384, "--code-path", "nowhere", "--dry-run",
         "--device-memory", 80, "--world-size", 8, "--peak-tflops", 500)
    printed = capsys.readouterr().out
    assert "16 x 4 on each of 8 processes, fsdp, bf16" in printed and "; fits a device of 80 GiB" in printed
    assert "40% of the 500 TFLOP/s of this device" in printed


def test_a_dry_run_refuses_the_codes_that_training_refuses(codes, tmp_path, capsys):
    """It looks at them as training does, and counts their images."""
    options = gpt_options(codes, tmp_path / "run", epochs=2)
    call(train_c2i.main, *options, "--dry-run")
    assert "6 an epoch of 48 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call(train_c2i.main, *gpt_options(codes, tmp_path / "run", num_classes=7), "--dry-run")
    assert "--num-classes says 7" in capsys.readouterr().err


def vq_options(images: Path, run_dir: Path, stage: str, steps: int = 6, *extra) -> list:
    """Command line of a tiny tokenizer training that uses every part: k-means, revival, EMA, discriminator."""
    return ["--data-path", images, "--run-dir", run_dir, "--stage", stage, "--vq-model", "VQ-8-small",
            "--codebook-sizes", 8, 16, "--image-size", 16, "--global-batch-size", 4, "--steps", steps, "--num-workers", 0,
            "--perceptual-net", "random", "--codebook-init", "kmeans", "--kmeans-vectors", 64, "--revive-every", 2,
            "--ema-decay", 0.9, "--disc-start", 3, "--disc-channels", 8, "--disc-layers", 1, "--log-every", 1,
            "--checkpoint-every", 3, "--device", "cpu", "--mixed-precision", "none", *extra]


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory) -> tuple[Path, Path]:
    """(images, run folder) of a finished stage 1."""
    folder = tmp_path_factory.mktemp("stage1")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 255, (24, 20, 18, 3), dtype=np.uint8), labels=np.arange(24) % 3)
    command(VQ_TRAIN, *vq_options(folder / "images.npz", folder / "run", "semantic"))
    return folder / "images.npz", folder / "run"


def test_tokenizer_stages_resume_and_chain(stage_one, tmp_path):
    """Stage 2 starts from stage 1's weights and an interrupted stage 2 goes on as if nothing had happened."""
    images, first = stage_one
    start = ["--init-from", first, "--recipe", "released"]
    command(VQ_TRAIN, *vq_options(images, tmp_path / "whole", "dual", 6, *start))
    command(VQ_TRAIN, *vq_options(images, tmp_path / "parts", "dual", 6, *start, "--checkpoint-every", 2))
    newest = sorted((tmp_path / "parts" / "checkpoints").iterdir())[-1]
    for path in [newest, *newest.glob("*")]:  # as if killed between the last two checkpoints
        if path.is_file():
            path.unlink()
    newest.rmdir()
    resumed = command(VQ_TRAIN, *vq_options(images, tmp_path / "parts", "dual", 6, *start, "--checkpoint-every", 2))
    assert "at step 4 of 6" in resumed.stderr
    assert losses(tmp_path / "parts", "total") == pytest.approx(losses(tmp_path / "whole", "total"), rel=1e-4)
    model = load_tokenizer(tmp_path / "whole")
    assert model.provenance.stage == "dual" and (tmp_path / "whole" / "reconstructions.png").exists()
    assert {"psnr", "usage_semantic", "usage_detail", "perplexity_detail"} <= set(model.provenance.figures)


def test_stage_two_goes_on_with_the_discriminator_of_stage_one(stage_one):
    """As in the release; the paper says nothing of it, and there stage 2 begins with a new one."""
    images, first = stage_one
    _, kept = read_export(first, "discriminator", "--init-from")
    for name, equal in (("released", True), ("paper", False)):
        words = vq_options(images, first, "dual", 6, "--init-from", first, "--recipe", name)
        config = parse(VQTrainConfig, vq_recipe, list(map(str, words)))
        state = vq_train.build_loss(config, torch.device("cpu")).discriminator.state_dict()
        assert all(torch.equal(state[key], kept[key]) for key in kept) == equal


def test_the_discriminators_loss_bears_the_weight_under_the_released_recipe(stage_one, monkeypatch):
    """There one factor of 0.5 is on both sides; the paper says nothing of the discriminator's, here 1."""
    norms, images = {}, torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name in ("paper", "released"):
        words = vq_options(stage_one[0], Path("r"), "semantic", 6, "--recipe", name, "--disc-weight", 0.5, "--disc-start", 0)
        config = parse(VQTrainConfig, vq_recipe, list(map(str, words)))
        training = vq_train.set_up(config, {}, Processes(0, 1, 0, torch.device("cpu")))
        with torch.no_grad():
            for seed, parameter in enumerate([*training.model.parameters(), *training.loss.discriminator.parameters()]):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)

        def noted(step, groups, *rest, name=name):
            if step == "discriminator":
                norms[name] = torch.stack([p.grad.norm() for p in groups[0]]).norm().item()
            return torch.zeros(())

        monkeypatch.setattr(vq_train, "optimizer_step", noted)
        run = SimpleNamespace(processes=training.processes, metrics=SimpleNamespace(add=lambda metrics: None),
                              timed=lambda what: nullcontext())
        plan = plan_steps(config.batch, 24, 1)
        vq_train.train_step(training, iter([(images,)]), plan, config, run, 0)
    assert norms["released"] == pytest.approx(0.5 * norms["paper"], rel=1e-4) and norms["paper"] > 0


def test_a_whitened_start_leaves_the_codes_and_keeps_models(stage_one, tmp_path):
    """It spreads the latents alone: without a step the codebooks are those of the uniform start, which k-means moves."""
    books = {}
    for start in ("uniform", "whitened", "kmeans"):
        words = vq_options(stage_one[0], tmp_path / start, "semantic", 1, "--codebook-init", start, "--lr", 0, "--ema-decay", 0,
                           "--revive-every", 0, "--keep-every", 1 / 6)
        call(vq_train.main, *words)
        folder = tmp_path / start / "snapshots" / "epoch-0000.17"
        state = load_tokenizer(folder).state_dict()
        assert (folder / "discriminator.safetensors").exists()
        books[start] = state["quantizer.codebooks.0"], state["quant_conv.weight"]
    assert torch.equal(books["whitened"][0], books["uniform"][0]) and not torch.equal(books["kmeans"][0], books["uniform"][0])
    assert torch.equal(books["whitened"][1], books["kmeans"][1]) and not torch.equal(books["whitened"][1], books["uniform"][1])


def test_the_released_tokenizer_trains_as_long_as_its_file(stage_one):
    """0485000.pt: 48.5 epochs of ImageNet in batches of 128."""
    for stage, recipe_name, epochs in (("dual", "released", 48.5), ("dual", "paper", 40), ("semantic", "released", 40)):
        config = parse(VQTrainConfig, vq_recipe, ["--data-path", "d", "--stage", stage, "--recipe", recipe_name])
        assert config.batch.epochs == epochs and config.batch.global_batch_size == 128
    assert round(485_000 / (1_281_167 / 128), 1) == 48.5


def test_a_non_finite_step_of_the_tokenizer_does_not_reach_the_average(stage_one, tmp_path, monkeypatch):
    """Both trainers leave a bad step out of weights and moments; the average follows weights that have not moved."""
    original, seen = vq_train.autoencoder_loss, []

    def poisoned(*args):
        total, *rest = original(*args)
        return (total * float("nan") if args[-1] == 1 else total, *rest)

    update = EMA.update
    monkeypatch.setattr(vq_train, "autoencoder_loss", poisoned)
    monkeypatch.setattr(EMA, "update", lambda self, step: (seen.append([p.detach().clone() for p in self.parameters.values()]),
                                                           update(self, step)))
    call(vq_train.main, *vq_options(stage_one[0], tmp_path / "run", "semantic", 3))
    first, second, third = ([torch.equal(a, b) for a, b in zip(seen[0], each)] for each in seen)
    assert all(first) and all(second) and not all(third)
    assert all(torch.isfinite(p).all() for p in load_tokenizer(tmp_path / "run").parameters())


def test_tokenizer_training_in_two_processes_equals_one(stage_one, tmp_path):
    """Averaged gradients over two processes are the gradients of the whole batch."""
    images, first = stage_one
    options = ["--init-from", first, "--disc-start", 100, "--revive-every", 0]
    command(VQ_TRAIN, *vq_options(images, tmp_path / "one", "dual", 4, *options))
    command(VQ_TRAIN, *vq_options(images, tmp_path / "two", "dual", 4, *options), processes=2)
    assert losses(tmp_path / "two", "total") == pytest.approx(losses(tmp_path / "one", "total"), rel=1e-3)
    figures = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()][-1]
    assert figures["eval/images"] == 24


def test_sampling_in_two_processes_equals_one_and_survives_a_crash(models, tmp_path):
    """The npz is the same for any number of processes and batch size; finished batches are not drawn again."""
    gpt, tokenizer = models
    options = ["--gpt-ckpt", gpt, "--vq-ckpt", tokenizer, "--num-samples", 11, "--cfg-scale", 1.5, 3.0, "--device", "cpu"]
    script = "autoregressive/sample/sample_c2i_ddp.py"
    command(script, *options, "--out", tmp_path / "one.npz", "--batch-size", 4)
    command(script, *options, "--out", tmp_path / "two.npz", "--batch-size", 3, processes=2)
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(one["arr_0"], two["arr_0"]) and one["arr_0"].shape == (11, 32, 32, 3)
        assert one["arr_1"].tolist() == [i % 3 for i in range(11)] and one["arr_0"].std() > 1
    assert not (tmp_path / "one.partial").exists() and (tmp_path / "one.png").exists()


def test_config_errors_are_user_errors(codes, tmp_path):
    """Options that fit no model are refused before anything is built."""
    for options, words in ((GPTOptions(window_size=4), "--window-size 4 .* odd"), (GPTOptions(gpt_model="GPT-Q"), "GPT-XXL")):
        with pytest.raises(UserError, match=words):
            check_options(options)
    with pytest.raises(UserError, match="--image-size 250 is not a multiple of 16"):
        gpt_config(GPTOptions(image_size=250), (256, 4096))


def test_revival_counts_survive_a_checkpoint_of_two_processes(stage_one, tmp_path):
    """Counts differ by process; a resumed run must not take codes for dead that another process used."""
    images, first = stage_one
    options = vq_options(images, tmp_path / "run", "dual", 5, "--init-from", first, "--checkpoint-every", 3,
                         "--revive-every", 100)
    command(VQ_TRAIN, *options, processes=2)
    from torch.distributed.checkpoint import load

    counts = {"usage": [torch.zeros(8, dtype=torch.long), torch.zeros(16, dtype=torch.long)]}
    load(counts, checkpoint_id=tmp_path / "run" / "checkpoints" / "step-00000005", no_dist=True)
    assert [int(stream.sum()) for stream in counts["usage"]] == [5 * 4 * 4] * 2  # steps, images, cells


def test_sharding_compile_and_activation_checkpointing_work_together(codes, tmp_path, reference):
    """The three are used together on the large models; each wraps the layers."""
    options = gpt_options(codes, tmp_path / "run", steps=3, data_parallel="fsdp", ema_decay=0.9)
    command(TRAIN, *options, "--compile", "on", "--activation-checkpointing", processes=2)
    seen = losses(tmp_path / "run")
    assert seen == pytest.approx({step: reference[step] for step in (1, 2, 3)}, abs=1e-4)


def test_sharded_training_in_bf16_stays_close(codes, tmp_path, reference):
    """GPUs train in bf16 by default: FSDP2's casts must meet in every layer, and the loss must stay float32's."""
    options = gpt_options(codes, tmp_path / "run", steps=3, data_parallel="fsdp", ema_decay=0.9, mixed_precision="bf16")
    command(TRAIN, *options, processes=2)
    assert losses(tmp_path / "run") == pytest.approx({step: reference[step] for step in (1, 2, 3)}, abs=0.02)


def test_a_compiled_tokenizer_trains_as_an_eager_one(stage_one, tmp_path, monkeypatch):
    """Encoder and decoder compiled: the same losses, and a checkpoint that an eager run reads."""
    original = torch.nn.Module.compile  # inductor would take minutes here; what it is given is the same
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: original(self, backend="aot_eager", fullgraph=True))
    for name in ("on", "off"):
        call(vq_train.main, *vq_options(stage_one[0], tmp_path / name, "semantic", 3, "--compile", name))
    assert losses(tmp_path / "on", "total") == pytest.approx(losses(tmp_path / "off", "total"), rel=1e-3)
    call(vq_train.main, *vq_options(stage_one[0], tmp_path / "on", "semantic", 4, "--compile", "off"))
    assert len(losses(tmp_path / "on", "total")) == 4


@pytest.mark.parametrize("paradigm", ["hierarchical", "independent", "conditional", "alternating", "grouped"])
def test_layers_are_compiled_whole(codes, tmp_path, monkeypatch, paradigm):
    """No graph break, which fullgraph would raise, in training or in the evaluation between its steps."""
    original = torch.nn.Module.compile

    def backend(graph, inputs):
        assert not [each for each in inputs if not isinstance(each, torch.Tensor)]  # no size is a symbol
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: original(
        self, backend=backend, fullgraph=True, **options))
    options = gpt_options(codes, tmp_path / "run", steps=3, data_parallel="none", compile="on", paradigm=paradigm)
    call(train_c2i.main, *options, "--val-code-path", write_codes(tmp_path / "held", images=21, seed=1), "--eval-every", 2)
    assert len(losses(tmp_path / "run", "eval/bits_per_image")) == 2
