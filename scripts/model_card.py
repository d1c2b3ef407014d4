"""Cards of models and codes on the hub: what they are, how to load them, figures with the commands that measured them."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from utils.code_shards import CodeHeader
from utils.config import UserError, flag, flatten
from utils.files import read_json
from utils.run import read_metrics
from utils.untrusted import printable

CITATION = """```
@article{yi2025iar2, title={IAR2: Improving Autoregressive Visual Generation with Semantic-Detail Associated Token Prediction},
                     author={Yi, Ran and Hu, Teng and Su, Zihan and Ma, Lizhuang}, year={2025}}
```"""

# What figures are called in a card; others keep the name that the command gave them.
TITLES = {"fid": "FID", "sfid": "sFID", "inception_score": "inception score", "precision": "precision", "recall": "recall",
          "rfid": "rFID", "rsfid": "rsFID", "fd_dinov2": "FD-DINOv2", "rfd_dinov2": "rFD-DINOv2", "psnr": "PSNR (dB)",
          "ssim": "SSIM", "lpips": "LPIPS", "perceptual_classifier": "a classifier's perceptual distance",
          "bits_per_image": "held-out bits per image", "class_accuracy": "class accuracy", "frechet": "Fréchet distance"}


@dataclass(frozen=True)
class Figure:
    """A measured number, and what measured it."""

    title: str
    value: float
    source: str


def read_figures(path: Path) -> list[Figure]:
    """The numbers of a JSON file that a command of this repository wrote, with that command; raises UserError for none."""
    found = read_json(path, "--figures", "the file of figures")
    numbers = {name: value for name, value in found.items() if isinstance(value, float)} if isinstance(found, dict) else {}
    if not numbers:
        raise UserError(f"--figures {path} holds no figures: give the JSON of evaluator.py, reconstruction_vq_ddp.py or "
                        "evaluate_c2i.py.")
    command = found.get("command")
    source = f"`{printable(command)}`" if isinstance(command, str) else f"`{path.name}`"
    return [Figure(TITLES.get(name, printable(name)), value, source) for name, value in numbers.items()]


def run_figures(folder: Path, tokenizer: Mapping[str, Any]) -> list[Figure]:
    """The last evaluation of a GPT's run, and that of the tokenizer's training as its file tells it."""
    found = []
    if (metrics := folder / "metrics.jsonl").is_file():
        lines = [line for line in read_metrics(metrics) if "eval/bits_per_image" in line]
        if lines:
            found.append(Figure(TITLES["bits_per_image"], lines[-1]["eval/bits_per_image"],
                                f"`train_c2i.py`, step {lines[-1]['step']}"))
    stage, step = tokenizer.get("stage"), tokenizer.get("step")
    for name in ("psnr", "ssim", "lpips", "perceptual_classifier"):
        value = tokenizer.get("figures", {}).get(name)
        if isinstance(value, float):
            found.append(Figure(f"{TITLES[name]} of reconstructions", value, f"`vq_train.py --stage {stage}`, step {step}"))
    return found


def training_command(folder: Path, script: str, defaults: Mapping[str, Any]) -> str:
    """The command of a run: its options that are not the defaults; "" where the folder has no options.json."""
    if not (file := folder / "options.json").is_file():
        return ""
    found = read_json(file, "RUN", "the options of the run")
    options = found.get("options") if isinstance(found, dict) else None
    words = list[str]()
    for name, value in flatten(options if isinstance(options, dict) else {}).items():
        if name not in defaults or value == defaults[name] or value in (None, "", []) or name == "run_dir":
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return f"{script} {shlex.join(words)}"


def table(figures: Iterable[Figure]) -> str:
    """Figures with what measured them, as Markdown."""
    rows = [f"| {each.title} | {each.value:.4g} | {each.source} |" for each in figures]
    return "\n".join(["| figure | value | measured by |", "|---|---|---|", *rows])


def facts(gpt: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str:
    """What the models are, in a list."""
    lines = []
    if gpt:
        model = gpt["model"]
        asked = "captions" if model.get("condition") == "text" else f"{model['num_classes']} classes"
        lines.append(f"- GPT: {gpt.get('gpt_model') or 'own size'} ({model['n_layer']} layers of width {model['dim']}), "
                     f"{model['paradigm']} prediction, {model['grid_size']}x{model['grid_size']} cells, {asked}")
        lines.append(f"- sampled with {gpt.get('sampling') or 'guidance that the caller gives'}")
    if tokenizer:
        model = tokenizer["model"]
        lines.append(f"- tokenizer: {model['quantizer']}, codebooks of {' and '.join(map(str, model['codebook_sizes']))} codes")
    return "\n".join(lines)


def usage(repository: str, gpt: Mapping[str, Any]) -> str:
    """How to load the models, by the hub's name."""
    if not gpt:
        return (f"```python\nfrom tokenizer.tokenizer_image.vq_model import load_tokenizer\n\n"
                f"tokenizer = load_tokenizer(\"hf:{repository}\")\n```\n\n"
                f"or `--vq-ckpt hf:{repository}` in every command that takes a tokenizer.")
    names = gpt.get("class_names") or ["0"]
    wanted = '"a caption"' if gpt["model"].get("condition") == "text" else f'"{names[0]}"' if gpt.get("class_names") else "0"
    return (f"```python\nfrom autoregressive.sample.pipeline import Pipeline\n\n"
            f"images = Pipeline.from_pretrained(\"hf:{repository}\")([{wanted}] * 4, seed=0)  # PIL\n```\n\n"
            f"or `--gpt-ckpt hf:{repository} --vq-ckpt hf:{repository}` in every command that takes them.")


def model_card(repository: str, licence: str, gpt: Mapping[str, Any], tokenizer: Mapping[str, Any], figures: list[Figure],
               commands: list[str], picture: str = "") -> str:
    """The README.md of a repository of models; gpt, tokenizer: what their files say, empty for none."""
    text = gpt and gpt["model"].get("condition") == "text"
    data = ModelCardData(license=licence, pipeline_tag="text-to-image" if text else "unconditional-image-generation",
                         tags=["image-generation", "autoregressive", "vector-quantization", "iar2"])
    parts = [f"---\n{data.to_yaml()}\n---", f"# {repository.partition('/')[2]}", facts(gpt, tokenizer)]
    if picture:
        parts.append(f"![samples]({picture})")
    parts += ["## How to load it", usage(repository, gpt)]
    parts += ["## Figures", table(figures) if figures else "None were given."]
    if any(commands):
        parts += ["## Training", "```bash\n" + "\n".join(filter(None, commands)) + "\n```"]
    parts += ["## Licence", f"{licence}.  The method is of IAR2's authors:", CITATION]
    return "\n\n".join(parts) + "\n"


def codes_card(repository: str, licence: str, header: CodeHeader) -> str:
    """The README.md of a repository of codes."""
    data = ModelCardData(license=licence, tags=["image-codes", "iar2"])
    sizes = " and ".join(map(str, header.codebook_sizes))
    return "\n\n".join([
        f"---\n{data.to_yaml()}\n---", f"# {repository.partition('/')[2]}",
        f"Codes of {header.images} images in {header.num_classes} classes ({header.source}): {header.crops} crops each "
        f"({header.augmentation}), {header.grid_size}x{header.grid_size} cells, codebooks of {sizes} codes, by the tokenizer "
        f"`{header.tokenizer}`.",
        "## How to train on them", f"```bash\nbash scripts/autoregressive/train_c2i.sh --code-path hf:datasets/{repository} "
        f"--image-size {header.image_size}\n```",
        "## Licence", f"{licence}.  The images' own licence says what may be done with their codes."]) + "\n"
