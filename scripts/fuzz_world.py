"""The tiny world that `fuzz.py` damages: a file or folder of every kind that the commands read, made by the commands."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from PIL import Image

from autoregressive.models.gpt import GPT
from autoregressive.models.transformer import GPTConfig
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.train import evaluate_c2i, extract_codes_c2i, train_c2i
from evaluations.c2i import classifier, judge
from evaluations.c2i.evaluation_file import STATISTICS, EvaluationFile
from evaluations.c2i.evaluator import find_pitfalls
from scripts import released_weights
from scripts.paper import plot_losses, table
from tokenizer.tokenizer_image import rearrange, reconstruction_vq_ddp, vq_train
from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from tokenizer.validation import val_ddp
from utils.checkpoint import export, fingerprint
from utils.files import write_json

TINY_VQ = VQConfig(codebook_sizes=(8, 16), channels=8, encoder_multipliers=(1, 2), decoder_multipliers=(1, 2), latent_channels=8,
                   residual_blocks=1, stem=4, norm_groups=4)
TINY_GPT = GPTConfig(dim=48, n_layer=2, n_head=4, head_layers=2, num_classes=3, grid_size=4, codebook_sizes=(8, 16),
                     token_dropout=0.0, resid_dropout=0.0, ffn_dropout=0.0, class_dropout=0.0, ffn_multiple_of=256)
CPU = "--device cpu"


@dataclass(frozen=True)
class Command:
    """One command line on the world, and what it writes."""

    main: Callable[[], None]
    words: str                     # {name}: an entry of the world; {out}: the case's own folder
    results: tuple[str, ...]       # files below {out} (or {name}), which must be the same after harmless damage
    options: type | None = None    # the dataclass of its command line
    copied: tuple[str, ...] = ()   # entries that it writes to


def print_evaluation_file() -> None:
    """What the evaluator reads of both files, without the network."""
    reference, sample = (EvaluationFile(Path(path), name) for name, path in zip(("REF", "SAMPLE"), sys.argv[1:]))
    print(*find_pitfalls(reference, sample, "generation"), file=sys.stderr)
    for file in (reference, sample):
        print(file.kind, file.count, file.labels(), *(file.statistic(key) for key in STATISTICS), sep="\n")
        for batch in file.batches(4) if file.count else ():
            print(batch.sum(), batch.dtype)


GPT_WORDS = ("--gpt-model GPT-tiny --codebook-sizes 8 16 --image-size 32 --downsample-size 8 --num-classes 3 "
             "--global-batch-size 6 --num-workers 0 --data-parallel none --log-every 1 " + CPU)
VQ_WORDS = ("--vq-model VQ-8-small --codebook-sizes 8 16 --image-size 32 --global-batch-size 4 --num-workers 0 --disc-channels 4 "
            "--perceptual-net classifier --perceptual-file {classifier} --val-limit 4 " + CPU)
EXTRACT = "--image-size 32 --augmentation flip --num-workers 0 --code-path {out}/codes " + CPU
SAMPLE = "--gpt-ckpt {gpt} --vq-ckpt {tokenizer} --cfg-scale 1.5 3 --num-samples 6 --batch-size 6 --out {out}/x.npz " + CPU

COMMANDS: dict[str, Command] = {
    "train": Command(train_c2i.main, f"--code-path {{codes}} --run-dir {{out}}/run --steps 1 {GPT_WORDS}",
                     ("{out}/run/gpt.safetensors",), train_c2i.TrainConfig),
    "train mapped": Command(train_c2i.main, "--code-path {single_codes} --code-map {code_map} --run-dir {out}/run --steps 1 "
                            + GPT_WORDS.replace("8 16", "16"), ("{out}/run/gpt.safetensors",)),
    "resume": Command(train_c2i.main, f"--code-path {{codes}} --run-dir {{run}} --steps 2 {GPT_WORDS}",
                      ("{run}/gpt.safetensors",), copied=("run",)),
    "evaluate": Command(evaluate_c2i.main, f"--gpt-ckpt {{gpt}} --code-path {{codes}} --out {{out}}/x.json {CPU}",
                        ("{out}/x.json",), evaluate_c2i.EvaluateConfig),
    "evaluate checkpoint": Command(evaluate_c2i.main, f"--gpt-ckpt {{run}}/checkpoints/step-00000001 --code-path {{codes}} "
                                   f"--out {{out}}/x.json {CPU}", ("{out}/x.json",)),
    "sample": Command(sample_c2i_ddp.main, SAMPLE, ("{out}/x.npz",), sample_c2i_ddp.SampleConfig),
    "reject": Command(sample_c2i_ddp.main, SAMPLE + " --classifier {classifier} --rejection-ratio 2", ("{out}/x.npz",)),
    "grid": Command(sample_c2i.main, f"--gpt-ckpt {{gpt}} --vq-ckpt {{tokenizer}} --cfg-scale 1.5 3 --classes 0 2 --per-class 2 "
                    f"--out {{out}}/x.png {CPU}", ("{out}/x.png",), sample_c2i.GridConfig),
    "vq train": Command(vq_train.main, f"--data-path {{images}} --run-dir {{out}}/run --steps 1 {VQ_WORDS}",
                        ("{out}/run/tokenizer.safetensors",), vq_train.VQTrainConfig),
    "extract": Command(extract_codes_c2i.main, "--data-path {images} --vq-ckpt {tokenizer} " + EXTRACT,
                       ("{out}/codes/codes.npy", "{out}/codes/header.json"), extract_codes_c2i.ExtractConfig),
    "extract npz": Command(extract_codes_c2i.main, "--data-path {images_npz} --vq-ckpt {tokenizer} " + EXTRACT,
                           ("{out}/codes/codes.npy", "{out}/codes/header.json")),
    "reconstruct": Command(reconstruction_vq_ddp.main, "--data-path {images} --vq-ckpt {tokenizer} --image-size 32 "
                           "--num-workers 0 --perceptual-net classifier --perceptual-file {classifier} --out {out}/x.npz " + CPU,
                           ("{out}/x.npz",), reconstruction_vq_ddp.ReconstructionConfig),
    "reference": Command(val_ddp.main, "--data-path {images} --image-size 32 --num-workers 0 --out {out}/x.npz", ("{out}/x.npz",),
                         val_ddp.ValidationConfig),
    "classifier": Command(classifier.main, f"--data-path {{images_npz}} --widths 4 4 --epochs 1 --batch-size 6 --out "
                          f"{{out}}/classifier.safetensors {CPU}", ("{out}/classifier.safetensors",),
                          classifier.ClassifierTrainConfig),
    "judge": Command(judge.main, f"--classifier {{classifier}} --reference {{images}} --samples {{samples}} --out "
                     f"{{out}}/x.json {CPU}", ("{out}/x.json",), judge.JudgeConfig),
    "rearrange": Command(rearrange.main, "--vq-ckpt {single} --clusters 4 --out {out}/r", ("{out}/r/code_map.safetensors",),
                         rearrange.RearrangeConfig),
    "mapping": Command(rearrange.main, "--vq-ckpt {single} --clusters 4 --mapping {mapping} --out {out}/r",
                       ("{out}/r/code_map.safetensors",)),
    "import": Command(released_weights.main, "iar2-gpt {released} {out}/r --model-args {gpt_args}", ("{out}/r/gpt.safetensors",),
                      released_weights.ReleasedConfig),
    "export": Command(released_weights.main, "iar2-gpt {gpt} {out}/x.pt --export", ("{out}/x.pt",)),
    "evaluator files": Command(print_evaluation_file, "{statistics} {samples}", ("{out}/stdout",)),
    "losses": Command(plot_losses.main, "{run} --out {out}/x.png", ("{out}/x.json",), plot_losses.PlotConfig),
    "table": Command(table.main, "merge {figures} --folder {out} --name row", ("{out}/row.json",), table.TableConfig),
}

# Which commands read an entry of the world.
READERS = {
    "codes": ("train", "evaluate", "resume"), "images": ("vq train", "extract", "reconstruct", "reference", "judge"),
    "images_npz": ("extract npz", "classifier"), "tokenizer": ("extract", "reconstruct", "sample"),
    "gpt": ("evaluate", "sample", "grid", "export"), "classifier": ("judge", "reject", "vq train"), "single": ("rearrange",),
    "code_map": ("train mapped",), "mapping": ("mapping",), "run": ("resume", "evaluate checkpoint", "losses"),
    "samples": ("judge", "evaluator files"), "statistics": ("evaluator files",), "released": ("import",), "figures": ("table",),
}


def fields_of(config: type) -> list[tuple[str, Any]]:
    """(name, declared type) of all flags of a command line."""
    found: list[tuple[str, Any]] = []
    for name, hint in get_type_hints(config, include_extras=True).items():
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found += fields_of(hint) if nested else [(name, hint)]
    return found


def write_files(world: Path) -> None:
    """The entries that no command makes: images, weights of random models, statistics, a mapping."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        folder = world / "images" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    names = np.array([f"class{index}" for index in range(3)])
    np.savez(world / "images_npz.npz", images=pixels, labels=np.arange(12) % 3, class_names=names)
    statistics = {key: np.eye(shape[0], dtype=np.float32) if len(shape) > 1 else np.zeros(shape, np.float32)
                  for key, shape in STATISTICS.items()}
    np.savez_compressed(world / "statistics.npz", **statistics)  # type: ignore[arg-type]
    torch.manual_seed(0)
    single = dataclasses.replace(TINY_VQ, quantizer="single", codebook_sizes=(16,))
    for name, config in (("tokenizer", TINY_VQ), ("single", single)):
        tensors = VQModel(config).state_dict()
        about = {"model": asdict(config), "stage": "dual", "fingerprint": fingerprint(tensors), "image_size": 32}
        export(world / f"{name}.safetensors", "tokenizer", tensors, about)
        if name == "tokenizer":
            gpt = {key: torch.randn_like(value) * 0.1 for key, value in GPT(TINY_GPT).state_dict().items()}
            sampling = {"guidance": "progressive", "cfg_scale": [1.5, 3.0]}
            export(world / "gpt.safetensors", "gpt", gpt, {"model": asdict(TINY_GPT), "tokenizer": about["fingerprint"],
                                                           "image_size": 32, "sampling": sampling})
    torch.save(torch.randperm(16), world / "mapping.pt")
    write_json(world / "figures.json", {"fid": 3.5, "sfid": 4.5, "settings": {"seed": 0}, "precision": 0.5})


def build(world: Path, run: Callable[[Callable[[], None], list[str], Path], int | None]) -> dict[str, str]:
    """Fill an empty folder; run: starts a command in a process of its own.  Returns the path of every entry, for {name}."""
    world.mkdir(parents=True)
    code = run(lambda: write_files(world), [], world)
    paths = {name: str(next(iter(world.glob(f"{name}.*")), world / name)) for name in (*READERS, "single_codes")}
    paths["gpt_args"] = json.dumps({"n_head": TINY_GPT.n_head, "grid_size": TINY_GPT.grid_size})
    making = {
        "classifier": ("classifier", {}, "classifier.safetensors"), "codes": ("extract", {}, "codes"),
        "single_codes": ("extract", {"tokenizer": "single"}, "codes"), "code_map": ("rearrange", {}, "r/code_map.safetensors"),
        "samples": ("sample", {}, "x.npz"), "run": ("train", {}, "run"), "released": ("export", {}, "x.pt")}
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


def words_of(command: Command, paths: dict[str, str], out: Path) -> list[str]:
    """The command line on the given paths."""
    return [word.format(out=out, **paths) for word in command.words.split()]
