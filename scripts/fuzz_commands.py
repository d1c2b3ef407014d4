"""The commands that `fuzz.py` and `full_disk.py` run on the tiny world of `fuzz_world.py`: command lines and results."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import patch

import torch
from torch import Tensor

from autoregressive.sample import guidance_map, sample_c2i, sample_c2i_ddp, sample_t2i_ddp
from autoregressive.train import evaluate_c2i, extract_codes_c2i, extract_text, train_c2i, train_t2i
from evaluations.c2i import classifier, evaluation_file, evaluator, judge
from evaluations.c2i.extractors import EXTRACTORS, Extractor, Output, stored_statistics
from evaluations.c2i.inception import prepare
from scripts import llamagen_codes, quickstart_report, released_weights
from scripts.paper import plot_figures, plot_losses, sweep_c2i, table
from tokenizer.tokenizer_image import code_distance, rearrange, reconstruction_vq_ddp, vq_train
from tokenizer.validation import val_ddp
from utils.files import write_json

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
        print(file.kind, file.count, file.labels(), *(file.statistic(key) for key in stored_statistics()), sep="\n")
        for batch in file.batches(4) if file.count else ():
            print(batch.sum(), batch.dtype)


class FewFeatures(torch.nn.Module):
    """A few cheap features of images, for what does not depend on their values."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [B, 3, H, W] -> [B, 64], [B, 36] and eight probabilities [B, 8]."""
        flat = images.float().flatten(1)[:, :64] / 255
        return flat, flat[:, :36], flat[:, :8].softmax(1)


FEW = Extractor(lambda path, device: (FewFeatures(), "0" * 64), prepare, (
    Output("pool3", 64, "fid", ("mu", "sigma"), ("precision", "recall"), half=True),
    Output("spatial", 36, "sfid", ("mu_s", "sigma_s")), Output("probs", 8, score="inception_score")), "a few cheap features")


def evaluate_few_features() -> None:
    """The evaluator with `FewFeatures` in the networks' place, whose weights would have to be downloaded."""
    tokens = Output("class_token", 64, "fd_dinov2", ("mu_dinov2", "sigma_dinov2"), ("precision_dinov2", "recall_dinov2"))
    few_tokens = Extractor(lambda path, device: (lambda images: FewFeatures()(images)[:1], "1" * 64), prepare, (tokens,), "them")
    with patch.dict(EXTRACTORS, inception=FEW, dinov2=few_tokens):
        evaluator.main()


def gather_row() -> None:
    """A table's row of a file of figures."""
    figures, row = map(Path, sys.argv[1:])
    write_json(row, table.gather([(figures, (), "")]))


GPT_WORDS = ("--gpt-model GPT-tiny --codebook-sizes 8 16 --image-size 32 --downsample-size 8 --num-classes 3 "
             "--global-batch-size 6 --num-workers 0 --data-parallel none --log-every 1 " + CPU)
VQ_WORDS = ("--vq-model VQ-8-small --codebook-sizes 8 16 --image-size 32 --global-batch-size 4 --num-workers 0 --disc-channels 4 "
            "--perceptual-net classifier --perceptual-file {classifier} --val-limit 4 " + CPU)
EXTRACT = "--image-size 32 --augmentation flip --num-workers 0 --code-path {out}/codes " + CPU
SAMPLE = "--gpt-ckpt {gpt} --vq-ckpt {tokenizer} --cfg-scale 1.5 3 --num-samples 6 --batch-size 6 --out {out}/x.npz " + CPU

COMMANDS: dict[str, Command] = {
    "train": Command(train_c2i.main, f"--code-path {{codes}} --run-dir {{out}}/run --steps 1 {GPT_WORDS}",
                     ("{out}/run/gpt.safetensors",), train_c2i.TrainConfig),
    "train on": Command(train_c2i.main, "--code-path {codes} --val-code-path {codes} --run-dir {out}/run --steps 12 "
                        f"--checkpoint-every 3 --keep-checkpoints 1 --keep-every 6 --eval-every 5 {GPT_WORDS}",
                        ("{out}/run/gpt.safetensors", "{out}/run/snapshots/epoch-0006/gpt.safetensors")),
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
    "vq train dual": Command(vq_train.main, "--data-path {images} --stage dual --init-from {semantic} --run-dir {out}/run "
                             f"--steps 4 --checkpoint-every 2 --eval-every 2 {VQ_WORDS}", ("{out}/run/tokenizer.safetensors",)),
    "extract": Command(extract_codes_c2i.main, "--data-path {images} --vq-ckpt {tokenizer} " + EXTRACT,
                       ("{out}/codes/codes.npy", "{out}/codes/header.json"), extract_codes_c2i.ExtractConfig),
    "extract npz": Command(extract_codes_c2i.main, "--data-path {images_npz} --vq-ckpt {tokenizer} " + EXTRACT,
                           ("{out}/codes/codes.npy", "{out}/codes/header.json")),
    **{f"extract {kind}": Command(extract_codes_c2i.main, f"--data-path {{{kind}}} --vq-ckpt {{tokenizer}} {EXTRACT}",
                                  ("{out}/codes/codes.npy", "{out}/codes/header.json")) for kind in ("table", "saved", "shards")},
    "llamagen codes": Command(llamagen_codes.main, "{llamagen}/imagenet32_codes {llamagen}/imagenet32_labels --vq-ckpt {single} "
                              "--code-path {out}/codes --num-classes 3", ("{out}/codes/codes.npy", "{out}/codes/header.json"),
                              llamagen_codes.LlamaGenCodesConfig),
    # No options to fuzz: another encoder would be looked for on the hub.
    "extract text": Command(extract_text.main, "--data-path {images_npz} --text-encoder hashed --text-width 64 --short-captions "
                            "first-sentence --text-path {out}/text " + CPU,
                            ("{out}/text/features.npy", "{out}/text/header.json")),
    "train text": Command(train_t2i.main, "--code-path {npz_codes} --text-path {text} --short-captions 0.5 --run-dir {out}/run "
                          f"--steps 1 {GPT_WORDS}".replace("--num-classes 3 ", ""), ("{out}/run/gpt.safetensors",)),
    "sample text": Command(sample_t2i_ddp.main, "--gpt-ckpt {text_gpt} --vq-ckpt {tokenizer} --prompts {prompts} --per-prompt 2 "
                           "--layout geneval --out {out}/x.npz " + CPU, ("{out}/x.npz", "{out}/x/00001/samples/0001.png"),
                           sample_t2i_ddp.PromptSampleConfig),
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
    "coarse": Command(rearrange.main, "--vq-ckpt {single} --method coarse --clusters 4 --out {out}/r",
                      ("{out}/r/coarse_map.safetensors", "{out}/r/fine_map.safetensors")),
    "mapping": Command(rearrange.main, "--vq-ckpt {single} --clusters 4 --mapping {mapping} --out {out}/r",
                       ("{out}/r/code_map.safetensors",)),
    "import": Command(released_weights.main, "iar2-gpt {released} {out}/r --model-args {gpt_args}", ("{out}/r/gpt.safetensors",),
                      released_weights.ReleasedConfig),
    "export": Command(released_weights.main, "iar2-gpt {gpt} {out}/x.pt --export", ("{out}/x.pt",)),
    "code distance": Command(code_distance.main, "--data-path {images} --vq-ckpt {single} --image-size 32 --num-workers 0 "
                             "--points 3 --perceptual-net classifier --perceptual-file {classifier} --out {out}/d " + CPU,
                             ("{out}/d/code_distance.json", "{out}/d/code_distance_images.png"),
                             code_distance.CodeDistanceConfig),
    "guidance map": Command(guidance_map.main, "--gpt-ckpt {gpt} --vq-ckpt {tokenizer} --classes 0 2 --out {out}/x.png " + CPU,
                            ("{out}/x.json", "{out}/x.png"), guidance_map.GuidanceMapConfig),
    "sweep": Command(sweep_c2i.main, "--gpt-ckpt {gpt} --vq-ckpt {tokenizer} --num-samples 6 --batch-size 6 --ranges 1:2 2:2 "
                     f"--reference {{images_npz}} --judge {{classifier}} --folder {{out}}/s {CPU}",
                     ("{out}/s/1-2.npz", "{out}/s/2-2.npz", "{out}/s/sweep.json", "{out}/s/sweep.md", "{out}/s/sweep.png"),
                     sweep_c2i.SweepConfig),
    "evaluator": Command(evaluate_few_features, "{samples} {samples} --inception-weights {mapping} --json {out}/x.json " + CPU,
                         ("{out}/x.json",), evaluator.EvaluatorConfig, copied=("samples",)),
    "evaluator files": Command(print_evaluation_file, "{statistics} {samples}", ("{out}/stdout",)),
    "losses": Command(plot_losses.main, "{run} --out {out}/x.png", ("{out}/x.json",), plot_losses.PlotConfig),
    "row": Command(gather_row, "{figures} {out}/row.json", ("{out}/row.json",)),
    "table": Command(table.main, "--folder {rows} --table 3 --rows iar2-0100 iar2-0200", ("{rows}/table3.md",), table.TableConfig,
                     copied=("rows",)),
    "figure": Command(plot_figures.main, "7c --folders {rows} --out {out}/x.png", ("{out}/x.json", "{out}/x.png"),
                      plot_figures.FigureConfig),
    "report": Command(quickstart_report.main, "--folder {report}",
                      ("{report}/figures.json", "{report}/report.md", "{report}/curves.png"), quickstart_report.ReportConfig,
                      copied=("report",)),
}

# Which commands read an entry of the world.
READERS = {
    "codes": ("train", "evaluate", "resume"), "images": ("vq train", "extract", "reconstruct", "reference", "judge"),
    "images_npz": ("extract npz", "classifier"), "tokenizer": ("extract", "reconstruct", "sample"),
    "gpt": ("evaluate", "sample", "grid", "export"), "classifier": ("judge", "reject", "vq train"), "single": ("rearrange",),
    "code_map": ("train mapped",), "mapping": ("mapping",), "run": ("resume", "evaluate checkpoint", "losses"),
    "samples": ("judge", "evaluator files"), "statistics": ("evaluator files",), "released": ("import",), "figures": ("row",),
    "table": ("extract table",), "saved": ("extract saved",), "shards": ("extract shards",), "llamagen": ("llamagen codes",),
    "text": ("train text",), "text_gpt": ("sample text",), "prompts": ("sample text",),
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
