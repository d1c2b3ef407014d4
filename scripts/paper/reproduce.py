"""Reproduce tables and figures of the paper, from training to the printed table.

    bash scripts/paper/run.sh table5 --scale toy                                    the bundled images, in minutes
    bash scripts/paper/run.sh all --scale toy --dry                                 print the commands, run none
    bash scripts/paper/run.sh table5 --data-path DIR --val-path DIR --reference NPZ  ImageNet

What is done is not done again, and the same command carries on after an interruption.  tables.py and figures.py declare what is
trained, sampled and measured for each; steps.py runs it.
"""

import logging
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import tyro

from autoregressive.models.gpt import GPT_models
from scripts.paper import figures, tables  # noqa: F401  (they fill EXPERIMENTS)
from scripts.paper.pipeline import Lab
from scripts.paper.plot_figures import FigureConfig, print_figure
from scripts.paper.results import EXPERIMENTS, OF_ROWS, Result
from scripts.paper.scales import SCALES
from scripts.paper.steps import REPOSITORY, Runner
from scripts.paper.table import TableConfig, print_table
from tokenizer.tokenizer_image.baselines import PREFIX
from utils.config import AboveZero, NonNegative, Positive, Seed, UserError, choices, flag, parse, run_main
from utils.files import check_exists, check_writable, replacing, write_json

log = logging.getLogger("reproduce")

Model = Annotated[str, choices(GPT_models)]
OF_ALL = ("names", "scale", "dry", "out", "workers")
# What one scale reads and the other does not.
OF_SCALE = {"toy": ("toy_seconds", "tokenizer_steps"),
            "paper": ("data_path", "val_path", "reference", "gpt_model", "image_size", "epochs", "gpt_options",
                      "tokenizer_epochs", "nproc", "models", "classifier")}


@dataclass
class ReproduceConfig:
    """Options of the experiments."""

    names: tyro.conf.Positional[tuple[Annotated[str, choices(("all", *EXPERIMENTS))], ...]]
    """Tables and figures, in this order; figure9 makes 9 to 11."""
    scale: Annotated[str, choices(SCALES)] = "paper"
    """toy: bundled images, a tiny GPT, minutes on two CPU cores; paper: ImageNet at the paper's scale."""
    dry: bool = False
    """Print the commands, run none; MEASURED stands for what is measured first."""
    out: Path | None = None
    """Where everything goes; None: runs/paper or runs/paper-toy of the repository."""
    workers: Positive = 1
    """Commands at a time: each has a GPU, or its share of the CPU's threads."""
    seed: Seed | None = None
    """Seed of GPT training and sampling; None: 0."""
    keep_every: NonNegative | None = None
    """Epochs between the weights that a GPT's training keeps for good, for figure 7c; 0: none; None: 50, toy 0.5."""
    data_path: str = ""
    """Paper's scale: ImageNet's train folder."""
    val_path: str = ""
    """Paper's scale: ImageNet's val folder."""
    reference: str = ""
    """Paper's scale: ADM's VIRTUAL_imagenet256_labeled.npz."""
    gpt_model: Model | None = None
    """Paper's scale: size of the GPTs; None: what the paper says of the table, mostly GPT-B."""
    image_size: Positive | None = None
    """Paper's scale: side of the images in pixels that codes are extracted at; None: the paper's, mostly 384 (24x24 tokens)."""
    epochs: AboveZero | None = None
    """Paper's scale: training epochs of a GPT; None: the paper's, mostly 100 or 300."""
    gpt_options: str = ""
    """Paper's scale: more options of train_c2i.py in one word, for example --gpt-options="--data-parallel fsdp"."""
    tokenizer_epochs: Positive | None = None
    """Paper's scale: epochs of each stage of a tokenizer; None: 40, as LlamaGen's, which has one stage."""
    nproc: Positive | None = None
    """Paper's scale: processes, GPUs of this node, that a command has; None: all, or with several --workers one."""
    toy_seconds: AboveZero | None = None
    """Toy: training time of a GPT; None: 45."""
    tokenizer_steps: Positive | None = None
    """Toy: steps of a tokenizer's second stage; None: 1200."""
    models: tuple[Model, ...] = ()
    """Figures 7a and 8, paper's scale: sizes of the GPTs; empty: the paper's."""
    window_size: Positive | None = None
    """Table 6: side of the local context's window; None: 5."""
    classifier: str = ""
    """Table 2, paper's scale: what selects samples, a timm model for ImageNet; empty: convnext_large.fb_in22k_ft_in1k."""
    drawing_options: str = ""
    """Figures 3, 6 and 7a: more options of the command that draws or sweeps, in one word, as --gpt-options."""
    baselines: tuple[str, ...] = ()
    """Table 13: more tokenizers, a row each, as --vq-ckpt takes them, for example diffusers:stabilityai/sd-vae-ft-mse."""


def reads(name: str, option: str, scale: str) -> bool:
    """Whether an experiment reads an option that its scale has."""
    about, special = EXPERIMENTS[name], {option for each in EXPERIMENTS.values() for option in each.options}
    if about.gathers and scale == "paper":
        return option in OF_ROWS
    return option in about.options or option not in special | about.unread


def check(config: ReproduceConfig, names: tuple[str, ...]) -> None:
    """Raise UserError for an option that nothing would read, or two that exclude each other."""
    if not names:
        raise UserError(f"no table or figure was named: give some of {', '.join(EXPERIMENTS)}, or all.")
    if config.nproc and config.workers > 1:
        raise UserError(f"--nproc {config.nproc} with --workers {config.workers}: a worker has one GPU, leave one of them out.")
    for option in (field.name for field in fields(config) if field.name not in OF_ALL):
        if (value := getattr(config, option)) in (None, "", ()):
            continue
        other, = (scale for scale in SCALES if scale != config.scale)
        if option in OF_SCALE[other]:
            raise UserError(f"{flag(option)} {value} is for --scale {other}: leave it out.")
        readers = [name for name in EXPERIMENTS if reads(name, option, config.scale)]
        if not set(names) & set(readers):
            raise UserError(f"{flag(option)} {value} is read by {', '.join(readers)}, not by {', '.join(names)}: leave it out.")


def words(text: str, option: str) -> tuple[str, ...]:
    """Options in one word of the command line, as a shell would split it; raises UserError for an open quote."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{option} {text!r} cannot be split into words ({error}): close its quotes.") from error


def absolute(tokenizer: str) -> str:
    """A value of --baselines with a path that holds in the repository too, where commands run; a name on the hub stays."""
    prefix = PREFIX if tokenizer.startswith(PREFIX) else ""
    path = Path(tokenizer.removeprefix(prefix))
    if path.exists() or not prefix:
        return f"{prefix}{check_exists(path, '--baselines', 'a tokenizer').absolute()}"
    return tokenizer


def make_lab(config: ReproduceConfig, name: str) -> Lab:
    """The lab of one experiment; raises UserError for a path that does not exist."""
    scale, about, toy = SCALES[config.scale], EXPERIMENTS[name], config.scale == "toy"
    model, classifier = config.gpt_model or about.model, config.classifier or "convnext_large.fb_in22k_ft_in1k"
    classifier = str(Path(classifier).absolute()) if Path(classifier).exists() else classifier
    paths = {"data_path": "ImageNet's train folder", "val_path": "ImageNet's val folder", "reference": "ADM's reference npz"}
    given = {}
    for option, what in paths.items():
        path = getattr(config, option)
        given[option] = str(Path(path).absolute()) if path else ""  # commands run in the repository
        if path and not config.dry:
            check_exists(path, flag(option), what)
    return Lab(
        name=name, scale=scale, root=config.out.absolute() if config.out else REPOSITORY / scale.out,
        row_size=model.removeprefix("GPT-"), image_size=config.image_size or about.image_size,
        epochs=config.epochs or about.epochs, model="GPT-tiny" if toy else model, seed=config.seed or 0,
        seconds=config.toy_seconds or 45, keep_every=scale.keep_every if config.keep_every is None else config.keep_every,
        tokenizer_length=config.tokenizer_steps or config.tokenizer_epochs or scale.tokenizer_length,
        gpt_options=words(config.gpt_options, "--gpt-options"), train_path=given["data_path"] or scale.train,
        val_path=given["val_path"] or scale.validation, reference_path=given["reference"], models=config.models,
        window_size=config.window_size or 5, classifier=classifier,
        drawing_options=words(config.drawing_options, "--drawing-options"), baselines=tuple(map(absolute, config.baselines)))


def declare(lab: Lab) -> Result:
    """What the experiment of a lab needs, as far as it is known; what must be measured first is in `lab.wanted`."""
    lab.wanted.clear()
    return EXPERIMENTS[lab.name].declare(lab)


def reproduce(lab: Lab, runner: Runner) -> Result:
    """Do all that an experiment needs."""
    while (result := declare(lab)) and lab.wanted and not runner.dry:
        runner.run(lab.wanted)
    runner.run([*lab.wanted, *result.steps])
    return result


def print_result(lab: Lab, result: Result) -> None:
    """Gather the rows, print the table, draw the figure, copy the pictures to where everything lies."""
    folder = lab.root / "figures" / f"{lab.name}-{lab.variant}"
    if result.rows:
        check_writable(folder, "--out")
        for row in result.rows:
            write_json(folder / f"{row.name}.json", row.read())
        for stale in set(folder.glob("*.json")) - {folder / f"{row.name}.json" for row in result.rows}:
            stale.unlink()  # of another --keep-every, say
    note = f"Measured: Fashion-MNIST, 4x4 cells, GPT-tiny, {lab.seconds:g} s each{result.note}. Published: ImageNet."
    note = note if lab.toy else ""
    if result.table:
        print_table(TableConfig(result.table, tuple(row.name for row in result.rows), folder, result.all_published, note))
    if result.plot:
        check_writable(lab.root, "--out")
        folders = (folder,) if result.rows else measured_folders(lab, result)
        print_figure(FigureConfig(result.plot, lab.root / f"figure{result.plot}.png", folders, note))
    for picture in result.pictures:
        source, target = picture.step.path(picture.part), lab.root / picture.part
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            with replacing(target) as aside:
                shutil.copyfile(source, aside)
        print(target)


def measured_folders(lab: Lab, result: Result) -> tuple[Path, ...]:
    """Rows of the tables that a figure draws, of this grid, length and seed: folders, perhaps none."""
    same = f"{lab.image_size}-{lab.epochs:g}-seed{lab.seed}"
    return tuple(found for table in result.plotted for found in sorted((lab.root / "figures").glob(f"{table}-*-{same}")))


def main() -> None:
    """Parse options, do everything for each experiment in turn and show it."""
    config = parse(ReproduceConfig)
    names = tuple(dict.fromkeys(EXPERIMENTS if "all" in config.names else config.names))
    check(config, names)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S",
                        stream=sys.stderr)
    labs = [make_lab(config, name) for name in names]
    for lab in labs:
        declare(lab)  # so that what is missing is said before the first starts
    gpus = 0
    if config.workers > 1:
        import torch
        gpus, os.environ["NPROC"] = torch.cuda.device_count(), "1"
    elif config.nproc:
        os.environ["NPROC"] = str(config.nproc)
    runner = Runner(config.workers, gpus, config.dry)
    if not config.dry:
        log.info("what the commands say: %s", labs[0].root / "KIND" / "LABEL" / "output.txt")
    for lab in labs:
        result = reproduce(lab, runner)
        if not config.dry:
            print_result(lab, result)


if __name__ == "__main__":
    run_main(main)
