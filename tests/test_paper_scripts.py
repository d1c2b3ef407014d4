"""scripts/paper: every command of every table is one the entry points understand, and shared runs are shared rightly."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from autoregressive.models.guidance import CFG_RANGES
from autoregressive.sample.guidance_map import GuidanceMapConfig
from autoregressive.sample.sample_c2i import GridConfig
from autoregressive.sample.sample_c2i_ddp import SampleConfig
from autoregressive.train.evaluate_c2i import EvaluateConfig
from autoregressive.train.extract_codes_c2i import ExtractConfig
from autoregressive.train.options import TrainConfig, recipe
from evaluations.c2i.classifier import ClassifierTrainConfig
from evaluations.c2i.evaluator import EvaluatorConfig
from evaluations.c2i.judge import JudgeConfig
from scripts.paper.plot_figures import FigureConfig
from scripts.paper.plot_losses import PlotConfig
from scripts.paper.sweep_c2i import SweepConfig
from scripts.paper.table import TableConfig
from tests.conftest import REPOSITORY
from tests.test_train import write_codes
from tokenizer.tokenizer_image.code_distance import CodeDistanceConfig
from tokenizer.tokenizer_image.rearrange import RearrangeConfig
from tokenizer.tokenizer_image.reconstruction_vq_ddp import ReconstructionConfig
from tokenizer.tokenizer_image.vq_options import VQTrainConfig
from tokenizer.tokenizer_image.vq_options import recipe as vq_recipe
from tokenizer.validation.val_ddp import ValidationConfig
from utils.config import parse

FOLDER = REPOSITORY / "scripts" / "paper"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh") if path.name not in ("common.sh", "systems.sh"))
# What reads the command line of each entry point; a launcher adds the options named here.
CONFIGS = {"train_dual_vq.sh": VQTrainConfig, "train_vq.sh": VQTrainConfig, "train_c2i.sh": TrainConfig,
           "extract_codes_c2i.py": ExtractConfig, "evaluate_c2i.py": EvaluateConfig, "sample_c2i_ddp.py": SampleConfig,
           "sweep_c2i.py": SweepConfig, "evaluator.py": EvaluatorConfig, "judge.py": JudgeConfig,
           "classifier.py": ClassifierTrainConfig, "rearrange.py": RearrangeConfig, "code_distance.py": CodeDistanceConfig,
           "reconstruction_vq_ddp.py": ReconstructionConfig, "val_ddp.py": ValidationConfig, "table.py": TableConfig,
           "plot_losses.py": PlotConfig, "plot_figures.py": FigureConfig, "sample_c2i.py": GridConfig,
           "guidance_map.py": GuidanceMapConfig}
ADDED = {"train_dual_vq.sh": ["--stage", "dual"], "train_vq.sh": ["--stage", "single"]}


def dry_run(script: str, out: Path, **variables: str) -> list[list[str]]:
    """The commands of a script, split into words; nothing is run, nothing written."""
    scale = {"DATA": "imagenet/train", "VAL": "imagenet/val", "REFERENCE": "reference.npz", "NPROC": "1"}
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LD_LIBRARY_PATH")}
    environment = kept | scale | {"DRY": "1", "OUT": str(out / "paper"), "PYTHON": sys.executable,
                                  "REQUIREMENTS_MET_BY": sys.executable} | variables
    done = subprocess.run(["bash", FOLDER / script], env=environment, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not list(out.iterdir())
    return [shlex.split(line) for line in done.stdout.splitlines()]


def entry_point(command: list[str]) -> tuple[str, list[str]]:
    """A command -> the entry point's file name and its own arguments."""
    place = next(place for place, word in enumerate(command) if word.endswith((".py", ".sh")))
    name = Path(command[place]).name
    assert (REPOSITORY / command[place]).exists(), command[place]
    return name, [*ADDED.get(name, []), *command[place + 1:]]


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[tuple[str, str], list[list[str]]]:
    """The commands of every script at both scales."""
    out = tmp_path_factory.mktemp("dry")
    return {(script, toy): dry_run(script, out, TOY=toy) for script in SCRIPTS for toy in ("0", "1")}


def test_every_command_is_understood(commands):
    """Full scale cannot be run here; at least no option of it is unknown, malformed or missing."""
    seen = set()
    for (script, _), lines in commands.items():
        assert lines, script
        for line in lines:
            name, arguments = entry_point(line)
            if (key := (name, *(word for word in arguments if "/" not in word))) not in seen:
                seen.add(key)
                with_recipe = name == "train_c2i.sh" and "--code-map" not in arguments  # which would be read
                parse(CONFIGS[name], recipe if with_recipe else None, args=arguments)
    assert {name for name, *_ in seen} == set(CONFIGS)


def test_scripts_that_share_a_run_agree_about_it(commands):
    """A folder is one training, whichever table asks first: equal options in every script, or another folder."""
    trainings: dict[str, dict[tuple, str]] = {}
    for (script, toy), lines in commands.items():
        for line in lines:
            if "--run-dir" in line:
                folder = line[line.index("--run-dir") + 1]
                options = (toy, *(word for word in line if word != folder))
                trainings.setdefault(f"{toy} {folder}", {})[options] = script
    assert all(len(scripts) == 1 for scripts in trainings.values()), trainings
    shared = [line[-1] for script in ("table4.sh", "table6.sh", "table7.sh") for line in commands[script, "0"]
              if "train_c2i.sh" in line[1]]
    assert (len(shared), len(set(shared))) == (10, 8)  # tables 4 and 7 share those without context, of two codebooks


@pytest.mark.parametrize("toy", ("0", "1"))
def test_codebooks_are_compared_under_equal_conditions(commands, toy):
    """Tables 4 and 7: every kind has two phases of the same terms, lengths and schedules, and no other tokenizer is used."""
    phases = {}
    for line in commands["table7.sh", toy]:
        name, arguments = entry_point(line)
        if name == "train_dual_vq.sh":
            stages = {word.split("=")[0]: shlex.split(word.split("=")[1]) for word in line if word.startswith("STAGE")}
            for stage, more in (("STAGE1", ["--stage", "semantic"]), ("STAGE2", ["--stage", "dual", "--init-from", "x"])):
                phases["dual", stage] = parse(VQTrainConfig, vq_recipe, args=[*arguments, *stages[stage], *more])
        elif name == "train_vq.sh":
            config = parse(VQTrainConfig, vq_recipe, args=arguments)
            phases[config.tokenizer.quantizer, "STAGE2" if config.init_from else "STAGE1"] = config
    assert set(phases) == {(kind, stage) for kind in ("single", "product", "dual") for stage in ("STAGE1", "STAGE2")}
    for (kind, stage), config in phases.items():
        like = phases["dual", stage]
        assert config.loss == like.loss and config.loss.recipe == "equal" and config.loss.perceptual_weight > 0
        assert (config.batch, config.optim, config.augmentation) == (like.batch, like.optim, like.augmentation)
        # The second phase of these two introduces no codebook, that of the dual one does.
        again = stage == "STAGE2" and kind != "dual"
        assert config.codebook.codebook_init == ("kmeans" if toy == "1" and not again else "uniform")
        if again:
            assert config.init_from == str(phases[kind, "STAGE1"].run.run_dir)
    used = {word for script in ("table4.sh", "table7.sh") for line in commands[script, toy] for word in line
            if "/tokenizers/" in word or "/codes/" in word}
    assert used and all(re.search("/(tokenizers|codes)/equal-", word) for word in used)


def test_figures_draw_what_tables_have_measured(tmp_path):
    """Full scale: figures 1 and 7b train nothing, and find the rows of tables 2 and 3 of one grid, length and seed."""
    out = tmp_path / "results"
    for folder in ("table2-XXL-384-300-seed0", "table3-B-384-300-seed0", "table3-B-256-300-seed0", "table3-B-384-50-seed0"):
        (out / "figures" / folder).mkdir(parents=True)
    for script, found in (("figure1.sh", ["table2-XXL-384-300-seed0", "table3-B-384-300-seed0"]),
                          ("figure7b.sh", ["table3-B-384-300-seed0"])):
        (tmp_path / script).mkdir()
        command, = dry_run(script, tmp_path / script, TOY="0", OUT=str(out))
        assert [Path(folder).name for folder in parse(FigureConfig, args=entry_point(command)[1]).folders] == found


def test_a_name_says_which_class_is_drawn(commands):
    """Figures 9 to 11: ImageNet's ids, as timm lists them, have the names of the captions."""
    names = ImageNetInfo()
    drawn = {}
    for line in commands["figure9.sh", "0"]:
        name, arguments = entry_point(line)
        if name == "sample_c2i.py":
            config = parse(GridConfig, args=arguments)
            assert config.sampling.cfg_scale == CFG_RANGES[2, "GPT-XL", 24] and config.sampling.guidance == "attention"
            drawn |= dict(zip(config.classes, config.class_names))
    assert len(drawn) == 12 and all(names.index_to_description(number).split(",")[0] == name for number, name in drawn.items())


def test_sizes_grids_and_seeds_have_folders_of_their_own(tmp_path):
    """Codes of another grid, a GPT of another size, length or seed never meet."""
    runs = [dry_run("table3.sh", tmp_path, **variables) for variables in (
        {}, {"SIZE": "256"}, {"MODEL": "GPT-L"}, {"EPOCHS": "50"}, {"SEED": "1"})]
    folders = [{line[line.index("--run-dir") + 1] for line in run if "--gpt-model" in line} for run in runs]
    assert [len(folder) for folder in folders] == [5] * 5
    assert len(set.union(*folders)) == 24  # CTF's second stage is the same beside GPT-B and GPT-L
    codes = [{line[line.index("--code-path") + 1] for line in run if "--code-path" in line} for run in runs[:2]]
    assert not codes[0] & codes[1]


def test_equal_time_is_measured_once(tmp_path):
    """Full scale: a paradigm's epochs follow from its rate and the reference's, by two short runs that are kept."""
    write_codes(tmp_path / "codes" / "dual-8-16-64")
    training = "--num-classes 3 --global-batch-size 8 --num-workers 0 --device cpu --data-parallel none"
    environment = os.environ | {
        "OUT": str(tmp_path), "DATA": "d", "VAL": "v", "REFERENCE": "r", "MODEL": "GPT-tiny", "SIZE": "64", "EPOCHS": "10",
        "NPROC": "1", "GPT_OPTIONS": training, "PYTHON": sys.executable, "REQUIREMENTS_MET_BY": sys.executable,
        "OMP_NUM_THREADS": "1"}
    script = f"source {FOLDER}/common.sh; DUAL=dual-8-16; equal_time '--context none' ''; echo $EPOCHS"
    first, second = (subprocess.run(["bash", "-c", script, FOLDER / "x.sh"], env=environment, capture_output=True, text=True)
                     for _ in range(2))
    rates = {path.name: float(path.read_text()) for path in (tmp_path / "rates" / "dual-8-16").iterdir()}
    assert set(rates) == {"tiny-64--contextnone", "tiny-64"}, first.stderr
    assert float(first.stdout) == round(10 * rates["tiny-64--contextnone"] / rates["tiny-64"], 1)
    assert second.stdout == first.stdout and "step 20" in first.stderr and not second.stderr
