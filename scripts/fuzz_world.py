"""The tiny world of `fuzz.py` and `full_disk.py`: an entry of every kind that the commands read, and how they are run on it."""

import dataclasses
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from autoregressive.models.gpt import GPT
from autoregressive.models.transformer import GPTConfig
from evaluations.c2i.extractors import EXTRACTORS
from scripts.fuzz_commands import COMMANDS, READERS, Command, words_of
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from utils.checkpoint import export, fingerprint
from utils.config import UserError, run_main
from utils.files import write_json
from utils.text_encoders import TextEncoderOptions, make_encoder

MEMORY = 8 << 30  # bytes of address space that a case may add
TINY_VQ = VQConfig(codebook_sizes=(8, 16), channels=8, encoder_multipliers=(1, 2), decoder_multipliers=(1, 2), latent_channels=8,
                   residual_blocks=1, stem=4, norm_groups=4)
TINY_GPT = GPTConfig(dim=48, n_layer=2, n_head=4, head_layers=2, num_classes=3, grid_size=4, codebook_sizes=(8, 16),
                     token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0, class_dropout=0.0, ffn_multiple_of=256)


def write_files(world: Path) -> None:
    """The entries that no command makes: images, weights of random models, statistics, a mapping."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        folder = world / "images" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    names = np.array([f"class{index}" for index in range(3)])
    np.savez(world / "images_npz.npz", images=pixels, labels=np.arange(12) % 3, class_names=names,
             captions=np.array([f"A picture of class {index % 3}. It is number {index}." for index in range(12)]))
    write_tables(world, pixels, names.tolist())
    statistics = {key: np.eye(shape[0], dtype=np.float32) if len(shape) > 1 else np.zeros(shape, np.float32)
                  for output in EXTRACTORS["inception"].outputs for key, shape in output.statistics_shapes.items()}
    np.savez_compressed(world / "statistics.npz", **statistics)  # type: ignore[arg-type]
    torch.manual_seed(0)
    single = dataclasses.replace(TINY_VQ, quantizer="single", codebook_sizes=(16,))
    for name, config in (("tokenizer", TINY_VQ), ("single", single)):
        tensors = VQModel(config).state_dict()
        code = fingerprint(tensors)
        about = {"model": asdict(config), "stage": "dual", "fingerprint": code, "image_size": 32}
        export(world / f"{name}.safetensors", "tokenizer", tensors, about)
        if name == "tokenizer":
            export_gpts(world, code)
    torch.save(torch.randperm(16), world / "mapping.pt")
    write_json(world / "figures.json", {"fid": 3.5, "sfid": 4.5, "settings": {"seed": 0}, "precision": 0.5})
    (world / "rows").mkdir()
    for name in ("iar2-0100", "iar2-0200"):
        write_json(world / "rows" / f"{name}.json", {"fid": 3.5, "inception_score": 200.0})
    lines = [json.dumps({"tag": "counting", "prompt": f"a picture of number {number}"}) for number in range(3)]
    (world / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    write_report(world / "report")


def write_tables(world: Path, pixels: np.ndarray, names: list[str]) -> None:
    """The same images as parquet, as a saved data set, and as a tar shard with classes; random codes as LlamaGen saves them."""
    (world / "shards").mkdir()
    (world / "shards" / "classnames.txt").write_text("\n".join(names))
    held = list[bytes]()
    with tarfile.open(world / "shards" / "00000.tar", "w") as shard:
        for index, image in enumerate(pixels):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            held.append(file.getvalue())
            for suffix, content in (("png", held[-1]), ("cls", str(index % 3).encode())):
                about = tarfile.TarInfo(f"{index:04d}.{suffix}")
                about.size = len(content)
                shard.addfile(about, io.BytesIO(content))
    columns = {"image": [{"bytes": each, "path": None} for each in held], "label": [index % 3 for index in range(len(held))]}
    table = datasets.Dataset.from_dict(columns, datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names)))
    table.to_parquet(world / "table.parquet")
    table.save_to_disk(world / "saved")
    rng = np.random.default_rng(1)
    for name in ("codes", "labels"):
        (world / "llamagen" / f"imagenet32_{name}").mkdir(parents=True)
    for index in range(len(held)):
        np.save(world / "llamagen" / "imagenet32_codes" / f"{index}.npy", rng.integers(0, 16, (1, 2, 16)))
        np.save(world / "llamagen" / "imagenet32_labels" / f"{index}.npy", np.array([index % 3]))


def export_gpts(world: Path, tokenizer: str) -> None:
    """Two random GPTs, one of classes and one of hashed captions."""
    encoder = make_encoder(TextEncoderOptions("hashed", text_width=64, text_length=16), torch.device("cpu"), False).record
    text = dataclasses.replace(TINY_GPT, condition="text", caption_length=encoder.text_length, caption_dim=encoder.text_width)
    for name, config, guidance, scale, record in (("gpt", TINY_GPT, "progressive", [1.5, 3.0], ""),
                                                  ("text_gpt", text, "constant", [3.0], encoder.text)):
        weights = {key: torch.randn_like(value) * 0.1 for key, value in GPT(config).state_dict().items()}
        export(world / f"{name}.safetensors", "gpt", weights, {
            "model": asdict(config), "tokenizer": tokenizer, "image_size": 32, "encoder": record,
            "sampling": {"guidance": guidance, "cfg_scale": scale}})


def write_report(folder: Path) -> None:
    """What the quickstart's phases leave for its report."""
    folder.mkdir()
    judged = {"class_accuracy": 0.5, "frechet": 2.5, "images": 6}
    reconstructed = dict.fromkeys(("psnr", "ssim", "usage_semantic", "usage_detail", "perplexity_semantic",
                                   "perplexity_detail"), 0.5)
    write_json(folder / "judged.json", {name: judged for name in ("guided", "unguided", "real", "stage2")})
    for name in ("stage1", "stage2"):
        write_json(folder / f"{name}.json", reconstructed)
    for training, metrics in {"vq/semantic": ("perceptual",), "vq/dual": ("pixel",),
                              "gpt": ("loss_semantic", "loss_detail")}.items():
        (folder / training).mkdir(parents=True)
        lines = [json.dumps({"step": step} | dict.fromkeys(metrics, 1 / step)) + "\n" for step in (1, 2, 3)]
        (folder / training / "metrics.jsonl").write_text("".join(lines))
    (folder / "phases").mkdir()
    (folder / "phases" / "gpt").write_text("7\n")


def build(world: Path, run: Callable[[Callable[[], None], list[str], Path], int | None]) -> dict[str, str]:
    """Fill an empty folder; run: starts a command in a process of its own.  Returns the path of every entry, for {name}."""
    world.mkdir(parents=True)
    code = run(lambda: write_files(world), [], world)
    paths = {name: str(next(iter(world.glob(f"{name}.*")), world / name))
             for name in (*READERS, "single_codes", "npz_codes", "semantic", "rows", "report")}
    paths["gpt_args"] = json.dumps({"n_head": TINY_GPT.n_head, "grid_size": TINY_GPT.grid_size})
    making = {
        "classifier": ("classifier", {}, "classifier.safetensors"), "codes": ("extract", {}, "codes"),
        "single_codes": ("extract", {"tokenizer": "single"}, "codes"), "code_map": ("rearrange", {}, "r/code_map.safetensors"),
        "samples": ("sample", {}, "x.npz"), "run": ("train", {}, "run"), "semantic": ("vq train", {}, "run"),
        "released": ("export", {}, "x.pt"), "npz_codes": ("extract npz", {}, "codes"), "text": ("extract text", {}, "text")}
    for name, (command, swapped, result) in making.items():
        out = world / "making"
        out.mkdir()
        used = paths | {key: paths[value] for key, value in swapped.items()}
        code = code or run(COMMANDS[command].main, words_of(COMMANDS[command], used, out), out)
        if code:
            raise RuntimeError(f"{command} failed in the undamaged world: {(out / 'stderr').read_text()[-2000:]}")
        paths[name] = str(world / (name + (out / result).suffix))
        shutil.move(out / result, paths[name])
        shutil.rmtree(out)
    return paths


class World:
    """The undamaged world, and the folders of the case that runs; scratch: where these lie, if not beside the world."""

    def __init__(self, folder: Path, time_limit: float, scratch: Path | None = None) -> None:
        self.folder, self.time_limit, self.scratch = folder, time_limit, scratch or folder
        self.out, self.case, self.outside = self.scratch / "out", self.scratch / "case", folder / "outside"
        self.outside.mkdir(parents=True)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"  # of Arrow copies, which a command may make where it likes
        datasets.disable_progress_bars()
        self.paths = build(folder / "pristine", self.run)
        self.undamaged: dict[str, list[str]] = {}

    def run(self, main: Callable[[], None], words: list[str], out: Path, stderr: int | None = None,
            watch: Callable[[], None] = lambda: None) -> int | None:
        """Exit code of an entry point in a process of its own; None: it was still running at the time limit.

        stderr: file descriptor of its standard error, None: a file in `out`; watch: called again and again while it runs.
        """
        process = multiprocessing.get_context("fork").Process(target=_child, args=(main, words, out, stderr))
        process.start()
        end = time.monotonic() + (self.time_limit if self.out.exists() else 120)
        while process.is_alive() and time.monotonic() < end:
            watch()
            process.join(0.002)
        if process.is_alive():
            process.kill()
            process.join()
            return None
        return process.exitcode

    def fresh(self, copied: tuple[str, ...]) -> dict[str, str]:
        """Empty the folders of the case, copy entries into them; returns the paths of all entries for this case."""
        for folder in (self.out, self.case):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        (self.outside / "target").write_text("precious\n")
        paths = dict(self.paths)
        for name in copied:
            source, target = Path(paths[name]), self.case / Path(paths[name]).name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
            paths[name] = str(target)
        return paths

    def digest(self, command: Command, paths: dict[str, str]) -> list[str]:
        """The results of a command, comparable."""
        return [_content(Path(result.format(out=self.out, **paths))) for result in command.results]

    def expected(self, name: str) -> list[str]:
        """The results of a command on the undamaged world."""
        if name not in self.undamaged:
            command, paths = COMMANDS[name], self.fresh(COMMANDS[name].copied)
            if self.run(command.main, words_of(command, paths, self.out), self.out) != 0:
                raise UserError(f"{name} fails on the undamaged world: {(self.out / 'stderr').read_text()[-3000:]}")
            self.undamaged[name] = self.digest(command, paths)
        return self.undamaged[name]

    def state(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file that no case may change."""
        return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for folder in (self.folder / "pristine", self.outside)
                for path in folder.rglob("*") if not path.is_dir()}


def _child(main: Callable[[], None], words: list[str], out: Path, stderr: int | None) -> None:
    for number, name, file in ((1, "stdout", None), (2, "stderr", stderr)):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if file is None else file, number)
    # The parent's streams may be a notebook's or a test's.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, errors="backslashreplace") for number in (1, 2))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    os.chdir(out)
    torch.set_num_threads(1)
    getattr(tqdm, "_instances", set()).clear()  # the parent's bars are not this process's to move or close
    sys.argv = ["program", *words]
    run_main(main)


def _content(path: Path) -> str:
    """What a result holds, without what differs between two runs."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            return repr({key: (file[key].shape, file[key].tobytes()) for key in sorted(file.files) if key != "options"})
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return repr([(key, file.get_tensor(key).numpy().tobytes()) for key in sorted(file.keys())])
    return re.sub(r'"seconds": .*', "", path.read_bytes().decode("latin1"))
