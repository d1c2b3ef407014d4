"""The commands that `fuzz.py` and `full_disk.py` run on the tiny world of `fuzz_world.py`: command lines and results."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.train import evaluate_c2i, extract_codes_c2i, train_c2i
from evaluations.c2i import classifier, evaluation_file, evaluator, judge
from scripts import released_weights
from scripts.paper import plot_losses, table
from tokenizer.tokenizer_image import rearrange, reconstruction_vq_ddp, vq_train
from tokenizer.validation import val_ddp

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
    reference, sample = (evaluation_file.EvaluationFile(Path(path), name)
                         for name, path in zip(("REF", "SAMPLE"), sys.argv[1:]))
    print(*evaluator.find_pitfalls(reference, sample, "generation"), file=sys.stderr)
    for file in (reference, sample):
        print(file.kind, file.count, file.labels(), *(file.statistic(key) for key in evaluation_file.STATISTICS), sep="\n")
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


def words_of(command: Command, paths: dict[str, str], out: Path) -> list[str]:
    """The command line on the given paths."""
    return [word.format(out=out, **paths) for word in command.words.split()]
