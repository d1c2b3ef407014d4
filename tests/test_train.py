"""Training for real: resume after a kill, two processes, sharding, extraction, sampling through the command lines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.models.gpt import load_gpt
from autoregressive.train import evaluate_c2i, extract_codes_c2i, train_c2i
from autoregressive.train.options import RECIPES, GPTOptions, TrainConfig, gpt_config, recipe
from tests.conftest import REPOSITORY, TINY_VQ, call, command, export_models, losses
from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.vq_model import load_tokenizer
from tokenizer.tokenizer_image.vq_options import VQTrainConfig
from tokenizer.tokenizer_image.vq_options import recipe as vq_recipe
from utils.batches import BatchOptions, GlobalBatches, plan_steps
from utils.checkpoint import read_export
from utils.code_shards import CodeDataset, CodeHeader, CodeWriter, read_header
from utils.config import UserError, check_options, parse
from utils.ema import EMA
from utils.optim import OptimOptions, clip_gradients, learning_rate

TRAIN = "autoregressive/train/train_c2i.py"
VQ_TRAIN = "tokenizer/tokenizer_image/vq_train.py"


def write_codes(folder: Path, images: int = 48, crops: int = 2, tokenizer: str = "test") -> Path:
    """A code folder of random codes: 8 semantic, 16 detail, 4x4 grid, three classes."""
    rng = np.random.default_rng(0)
    header = CodeHeader(tokenizer, [8, 16], 4, 32, crops, "flip", 3, images, source="random")
    folder.mkdir(parents=True)
    writer = CodeWriter(folder, header, np.arange(images) % 3, create=True)
    codes = np.stack([rng.integers(0, size, (images, crops, 16)) for size in (8, 16)], axis=2)
    writer.write(np.arange(images), codes.astype(np.uint16))
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def codes(tmp_path_factory) -> Path:
    """Random codes shared by the tests of this file."""
    return write_codes(tmp_path_factory.mktemp("data") / "codes")


def gpt_options(codes: Path, run_dir: Path, steps: int = 8, **extra) -> list:
    """Command line of a small deterministic training: no dropout, one image size."""
    options = dict(code_path=codes, run_dir=run_dir, gpt_model="GPT-tiny", image_size=32, downsample_size=8,
                   num_classes=3, steps=steps, global_batch_size=8, lr=1e-3, log_every=1, checkpoint_every=4,
                   num_workers=0, dropout=0.0, class_dropout=0.0, device="cpu") | extra
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
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.*") if path.name != "log.txt"}
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
    assert "step left out" in (tmp_path / "run" / "log.txt").read_text()


def test_recipes_are_table_11_and_typed_flags_win():
    """--gpt-model alone selects the row; a typed flag wins over the recipe, the recipe over a default."""
    required = ["--run-dir", "r", "--code-path", "c"]
    config = parse(TrainConfig, recipe, [*required, "--gpt-model", "GPT-XXL", "--image-size", "384"])
    assert (config.batch.global_batch_size, config.optim.lr, config.optim.lr_end, config.optim.lr_schedule, config.batch.epochs,
            config.objective.semantic_weight, config.parallel.data_parallel) == (512, 3e-4, 1e-4, "cosine", 300, 1.5, "fsdp")
    typed = parse(TrainConfig, recipe, [*required, "--gpt-model", "GPT-XXL", "--lr", "7e-4"])
    assert typed.optim.lr == 7e-4 and typed.optim.lr_end == 5e-5 and typed.batch.epochs == 50
    llamagen = parse(TrainConfig, recipe, [*required, "--gpt-model", "GPT-XL", "--codebook-sizes", "16384"])
    assert (llamagen.optim.lr, llamagen.optim.lr_schedule, llamagen.batch.epochs) == (1e-4, "constant", 50)
    assert len(RECIPES) == 16 and llamagen.optim.weight_decay == 0.05


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
    assert "1,570,110,336" in printed
    assert "lr_schedule                cosine" in printed and "GiB" in printed
    assert not (tmp_path / "run").exists()


def test_codes_round_trip_through_the_memory_map(tmp_path):
    """What is read in training is what was written, crop by crop, without the unreadable rows."""
    folder = write_codes(tmp_path / "codes", images=10)
    stored = np.load(folder / "codes.npy")
    state = np.lib.format.open_memmap(folder / "state.npy", mode="r+")
    state[3] = 2
    state.flush()
    dataset = CodeDataset(folder)
    assert len(dataset) == 9
    seen_crops = set()
    for epoch in range(8):
        batch, labels = dataset.__getitems__([(epoch, index) for index in range(9)])
        for item, row in enumerate([0, 1, 2, 4, 5, 6, 7, 8, 9]):
            matches = [crop for crop in range(2) if np.array_equal(batch[item], stored[row, crop])]
            assert matches and labels[item] == row % 3
            seen_crops.update(matches)
    assert seen_crops == {0, 1}


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """An exported tiny tokenizer."""
    return export_models(tmp_path / "models")[1]


def extract_options(images: Path, tokenizer: Path, out: Path) -> list:
    """Command line of a flip extraction at 32 pixels."""
    return ["--data-path", images, "--vq-ckpt", tokenizer, "--code-path", out, "--augmentation", "flip", "--image-size", 32,
            "--num-workers", 0, "--batch-size", 4, "--device", "cpu"]


def test_codes_of_huge_codebooks_keep_their_values(tmp_path):
    """Sixteen bits hold 65,536 codes; one more must not come back as code 0."""
    codes = np.array([[[[0, 65_535, 65_536, 69_999]]]])
    for size, dtype in ((2**16, np.uint16), (70_000, np.uint32)):
        folder = tmp_path / str(size)
        folder.mkdir()
        writer = CodeWriter(folder, CodeHeader("t", [size], 2, 32, 1, "none", 1, 1, "x"), np.zeros(1, int), create=True)
        writer.write(np.array([0]), np.minimum(codes, size - 1))
        writer.finish()
        assert np.load(folder / "codes.npy").dtype == dtype
        seen, _ = CodeDataset(folder).__getitems__([(0, 0)])
        assert seen.flatten().tolist() == np.minimum(codes, size - 1).flatten().tolist()


def test_extraction_in_two_processes_equals_one_and_carries_on(images_folder, tokenizer, tmp_path):
    """The codes of image i do not depend on who encoded it; an interrupted extraction does only what is missing."""
    call(extract_codes_c2i.main, *extract_options(images_folder, tokenizer, tmp_path / "one"))
    command("autoregressive/train/extract_codes_c2i.py", *extract_options(images_folder, tokenizer, tmp_path / "two"),
            processes=2)
    one, two = (np.load(tmp_path / name / "codes.npy") for name in ("one", "two"))
    assert np.array_equal(one, two) and one.shape == (24, 2, 2, 16) and one.any()
    model = load_tokenizer(tokenizer)
    assert (one[:, :, 0] < TINY_VQ.codebook_sizes[0]).all()
    assert read_header(tmp_path / "one").tokenizer == model.provenance.fingerprint
    # Undo two rows, spoil a third: only the two come back.
    state = np.lib.format.open_memmap(tmp_path / "two" / "state.npy", mode="r+")
    codes = np.lib.format.open_memmap(tmp_path / "two" / "codes.npy", mode="r+")
    state[[4, 9]], codes[[4, 9, 11]] = 0, 0
    state.flush(), codes.flush()
    call(extract_codes_c2i.main, *extract_options(images_folder, tokenizer, tmp_path / "two"))
    again = np.load(tmp_path / "two" / "codes.npy")
    assert np.array_equal(again[[4, 9]], one[[4, 9]]) and not again[11].any()


def test_unreadable_images_are_left_out_of_the_codes(images_folder, tokenizer, tmp_path, caplog):
    """A truncated file is named, skipped and counted, and never becomes a training sample."""
    bad = images_folder / "class1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    call(extract_codes_c2i.main, *extract_options(images_folder, tokenizer, tmp_path / "codes"))
    assert len(CodeDataset(tmp_path / "codes")) == 23
    assert (np.load(tmp_path / "codes" / "state.npy") == 2).sum() == 1


def vq_options(images: Path, run_dir: Path, stage: str, steps: int = 6, *extra) -> list:
    """Command line of a tiny tokenizer training that uses every part: k-means, revival, EMA, discriminator."""
    return ["--data-path", images, "--run-dir", run_dir, "--stage", stage, "--vq-model", "VQ-8-small",
            "--codebook-sizes", 8, 16, "--image-size", 16, "--global-batch-size", 4, "--steps", steps, "--num-workers", 0,
            "--perceptual-net", "random", "--codebook-init", "kmeans", "--kmeans-vectors", 64, "--revive-every", 2,
            "--ema-decay", 0.9, "--disc-start", 3, "--disc-channels", 8, "--disc-layers", 1, "--log-every", 1,
            "--checkpoint-every", 3, "--device", "cpu", *extra]


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


def test_a_non_finite_step_of_the_tokenizer_does_not_reach_the_average(stage_one, tmp_path, monkeypatch):
    """Both trainers leave a bad step out of weights, moments and averages alike."""
    updates, original = [], vq_train.autoencoder_loss

    def poisoned(*args):
        total, *rest = original(*args)
        return (total * float("nan") if args[-1] == 1 else total, *rest)

    monkeypatch.setattr(vq_train, "autoencoder_loss", poisoned)
    monkeypatch.setattr(EMA, "update", lambda self, step: updates.append(step))
    call(vq_train.main, *vq_options(stage_one[0], tmp_path / "run", "semantic", 3))
    assert updates == [0, 2]


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
    command(TRAIN, *options, "--compile", "--activation-checkpointing", processes=2)
    seen = losses(tmp_path / "run")
    assert seen == pytest.approx({step: reference[step] for step in (1, 2, 3)}, abs=1e-4)


def test_sharded_training_in_bf16_stays_close(codes, tmp_path, reference):
    """GPUs train in bf16 by default: FSDP2's casts must meet in every layer, and the loss must stay float32's."""
    options = gpt_options(codes, tmp_path / "run", steps=3, data_parallel="fsdp", ema_decay=0.9, mixed_precision="bf16")
    command(TRAIN, *options, processes=2)
    assert losses(tmp_path / "run") == pytest.approx({step: reference[step] for step in (1, 2, 3)}, abs=0.02)
