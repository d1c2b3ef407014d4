"""Gather what the quickstart's phases measured in figures.json and report.md."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

from matplotlib.figure import Figure

from scripts.paper.plot_losses import read_curve
from utils.config import parse, run_main
from utils.files import read_json, write_json, write_text
from utils.pictures import save_picture


@dataclass
class ReportConfig:
    """Options of the report."""

    folder: Path = Path("runs/quickstart")
    """Folder of the quickstart."""


def draw_curves(folder: Path) -> None:
    """Loss curves of the three trainings in one picture."""
    panels = [("stage 1", "vq/semantic", ("perceptual",)), ("stage 2", "vq/dual", ("pixel",)),
              ("GPT", "gpt", ("loss_semantic", "loss_detail"))]
    figure = Figure(figsize=(12, 3.2))
    for axis, (title, run_dir, names) in zip(figure.subplots(1, len(panels)), panels):
        for name in names:
            axis.plot(*read_curve(folder / run_dir, name), label=name.replace("loss_", ""))
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    save_picture(figure, folder / "curves.png", dpi=90)


def gather(folder: Path) -> dict[str, Any]:
    """All figures, from the files that the phases wrote."""
    judged, semantic, dual = (read_json(folder / f"{name}.json", "--folder", "the quickstart's figures")
                              for name in ("judged", "stage1", "stage2"))
    guided, unguided, real, reconstructed = (judged[name] for name in ("guided", "unguided", "real", "stage2"))
    return {
        "psnr_semantic": semantic["psnr"], "psnr_dual": dual["psnr"], "ssim_dual": dual["ssim"],
        **{name: dual[name] for name in ("usage_semantic", "usage_detail", "perplexity_semantic", "perplexity_detail")},
        "class_accuracy_guided": guided["class_accuracy"], "class_accuracy_unguided": unguided["class_accuracy"],
        "class_accuracy_real": real["class_accuracy"], "class_accuracy_reconstructed": reconstructed["class_accuracy"],
        "frechet_samples": guided["frechet"], "frechet_unguided": unguided["frechet"],
        "frechet_reconstructed": reconstructed["frechet"], "frechet_real": real["frechet"], "samples": guided["images"],
        "seconds": {path.name: int(path.read_text()) for path in sorted((folder / "phases").iterdir())
                    if not path.name.startswith(".")},
    }


def report(figures: dict[str, Any]) -> str:
    """The report in Markdown."""
    judged = f"{figures['class_accuracy_reconstructed']:.1%} | {figures['frechet_reconstructed']:.3f}"
    seconds = "\n".join(f"| {name} | {value} |" for name, value in figures["seconds"].items())
    return f"""# Quickstart: IAR2 on Fashion-MNIST

10,000 training and 2,000 test images of clothes, padded to 32 pixels; 4x4 cells of one semantic and one detail code.

## Reconstructions

Stage 1 (semantic codes alone, its own decoder), then stage 2 (semantic codes alone, and semantic + detail):

![stage 1](stage1.png)

![stage 2](stage2.png)

| test images | PSNR | class accuracy | Fréchet distance |
|---|---|---|---|
| stage 1, semantic | {figures["psnr_semantic"]:.2f} dB | | |
| stage 2, semantic + detail | {figures["psnr_dual"]:.2f} dB | {judged} |
| real | | {figures["class_accuracy_real"]:.1%} | {figures["frechet_real"]:.3f} |

| codebook | used on the test set | perplexity |
|---|---|---|
| semantic, 128 codes | {figures["usage_semantic"]:.1%} | {figures["perplexity_semantic"]:.1f} |
| detail, 512 codes | {figures["usage_detail"]:.1%} | {figures["perplexity_detail"]:.1f} |

## Samples

![samples by class](samples.png)

| {figures["samples"]} samples | class accuracy | Fréchet distance |
|---|---|---|
| progressive attention-guided CFG | {figures["class_accuracy_guided"]:.1%} | {figures["frechet_samples"]:.3f} |
| without guidance | {figures["class_accuracy_unguided"]:.1%} | {figures["frechet_unguided"]:.3f} |

Accuracy and distance are those of a small classifier (`judge.safetensors`) that had no part in training the tokenizer;
the reference of the distance is one half of the test images, and "real" is the other half.

## Training

![loss curves](curves.png)

| phase | seconds |
|---|---|
{seconds}
"""


def main() -> None:
    """Write figures.json and report.md, and print where they are."""
    folder = parse(ReportConfig).folder
    figures = gather(folder)
    draw_curves(folder)
    write_json(folder / "figures.json", figures)
    write_text(folder / "report.md", report(figures))
    for name, value in figures.items():
        print(f"{name:30} {value if isinstance(value, (int, dict)) else f'{value:.4f}'}")
    print(f"report: {folder / 'report.md'}")


if __name__ == "__main__":
    run_main(main)
