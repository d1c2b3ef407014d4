"""scripts/paper: every command of every table is one the entry points understand, and shared runs are shared rightly."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image
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
from scripts.paper import reproduce
from scripts.paper.pipeline import MEASURED, Lab
from scripts.paper.plot_losses import PlotConfig
from scripts.paper.reproduce import ReproduceConfig
from scripts.paper.results import EXPERIMENTS, Figures, Result, Row
from scripts.paper.steps import Made, Own, Runner, Step, in_order
from scripts.paper.sweep_c2i import SweepConfig
from scripts.paper.systems import PARADIGMS, iar2
from tests.conftest import call
from tests.test_bad_input import refused
from tests.test_codes import write_codes
from tokenizer.tokenizer_image.code_distance import CodeDistanceConfig
from tokenizer.tokenizer_image.rearrange import RearrangeConfig
from tokenizer.tokenizer_image.reconstruction_vq_ddp import ReconstructionConfig
from tokenizer.tokenizer_image.vq_options import VQTrainConfig
from tokenizer.tokenizer_image.vq_options import recipe as vq_recipe
from tokenizer.validation.val_ddp import ValidationConfig
from utils.config import UserError, parse

# What reads the command line of each entry point.
CONFIGS = {"vq_train.py": VQTrainConfig, "train_c2i.py": TrainConfig, "extract_codes_c2i.py": ExtractConfig,
           "evaluate_c2i.py": EvaluateConfig, "sample_c2i_ddp.py": SampleConfig, "sweep_c2i.py": SweepConfig,
           "evaluator.py": EvaluatorConfig, "judge.py": JudgeConfig, "classifier.py": ClassifierTrainConfig,
           "rearrange.py": RearrangeConfig, "code_distance.py": CodeDistanceConfig,
           "reconstruction_vq_ddp.py": ReconstructionConfig, "val_ddp.py": ValidationConfig, "plot_losses.py": PlotConfig,
           "sample_c2i.py": GridConfig, "guidance_map.py": GuidanceMapConfig}
GIVEN = {"toy": [], "paper": ["--data-path", "imagenet/train", "--val-path", "imagenet/val", "--reference", "reference.npz"]}


def lab_of(name: str, out: Path, scale: str, *options: str) -> Lab:
    """The lab of one experiment."""
    words = [name, "--dry", "--scale", scale, *GIVEN[scale], "--out", str(out), *options]
    return reproduce.make_lab(parse(ReproduceConfig, args=words), name)


def steps_of(name: str, out: Path, scale: str, *options: str) -> list[Step]:
    """All steps of an experiment of which nothing is done, what is needed first."""
    lab = lab_of(name, out, scale, *options)
    result = reproduce.declare(lab)
    return in_order([*lab.wanted, *result.steps])


def arguments(step: Step) -> list[str]:
    """A step's command line after its script; what would be measured first is a number."""
    words = step.command()
    place = next(place for place, word in enumerate(words) if word == str(step.words[0]))
    return ["7" if word == MEASURED else word for word in words[place + 1:]]


def option(step: Step, name: str) -> str:
    return arguments(step)[arguments(step).index(name) + 1]


def finish(step: Step, part: str, text: str) -> None:
    """Leave a step as if it had been done, with one file."""
    path = step.path(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    step.path("step.json").write_text('{"seconds": 1}')


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[tuple[str, str], list[Step]]:
    """The steps of every experiment at both scales; nothing is written."""
    out = tmp_path_factory.mktemp("dry") / "paper"
    found = {(name, scale): steps_of(name, out, scale) for name in EXPERIMENTS for scale in GIVEN}
    assert not out.exists()
    return found


def test_every_command_is_understood(steps):
    """The paper's scale cannot be run here; at least no option of it is unknown, malformed or missing."""
    seen = set()
    for (name, scale), found in steps.items():
        trains_nothing = (name, scale) in (("figure1", "paper"), ("figure7b", "paper"))
        assert bool(found) != trains_nothing, name
        for step in found:
            script, words = Path(str(step.words[0])).name, arguments(step)
            if (key := (script, *(word for word in words if "/" not in word))) not in seen:
                seen.add(key)
                with_recipe = script == "train_c2i.py" and "--code-map" not in words  # which would be read
                parse(CONFIGS[script], recipe if with_recipe else None, args=words)
    assert {script for script, *_ in seen} == set(CONFIGS)


def test_what_tables_share_is_one_step(steps):
    """A training is named by its content: equal ones meet in one folder, whichever table asks, and others never do."""
    commands: dict[Path, set[tuple[str, ...]]] = {}
    for step in (step for found in steps.values() for step in found):
        commands.setdefault(step.folder, set()).add(tuple(step.command()))
    assert all(len(found) == 1 and len(folder.name) < 200 for folder, found in commands.items())
    trained = [step.folder for name in ("table4", "table6", "table7") for step in steps[name, "paper"] if step.kind == "gpt"]
    assert (len(trained), len(set(trained))) == (10, 8)  # tables 4 and 7 share those without context, of two codebooks


@pytest.mark.parametrize("scale", GIVEN)
def test_codebooks_are_compared_under_equal_conditions(steps, scale):
    """Tables 4 and 7: every kind has two phases of the same terms, lengths and schedules, and no other tokenizer is used."""
    phases = {}
    for step in steps["table7", scale]:
        if step.kind == "tokenizer":
            config = parse(VQTrainConfig, vq_recipe, args=arguments(step))
            kind = "dual" if config.stage in ("semantic", "dual") else config.tokenizer.quantizer
            phases[kind, 2 if config.init_from else 1] = config
    assert set(phases) == {(kind, phase) for kind in ("single", "product", "dual") for phase in (1, 2)}
    for (kind, phase), config in phases.items():
        like = phases["dual", phase]
        assert config.loss == like.loss and config.loss.recipe == "equal" and config.loss.perceptual_weight > 0
        assert (config.batch, config.optim, config.augmentation) == (like.batch, like.optim, like.augmentation)
        # The second phase of these two introduces no codebook, that of the dual one does.
        again = phase == 2 and kind != "dual"
        assert config.codebook.codebook_init == ("kmeans" if scale == "toy" and not again else "uniform")
        if phase == 2:
            assert config.init_from == str(phases[kind, 1].run.run_dir)
    used = [step for name in ("table4", "table7") for step in steps[name, scale] if step.kind in ("tokenizer", "codes")]
    assert used and all(step.label.startswith("equal-") for step in used)


def test_figures_draw_what_tables_have_measured(tmp_path):
    """Paper's scale: figures 1 and 7b train nothing, and find the rows of tables 2 and 3 of one grid, length and seed."""
    for folder in ("table2-XXL-384-300-seed0", "table3-B-384-300-seed0", "table3-B-256-300-seed0", "table3-B-384-50-seed0"):
        (tmp_path / "figures" / folder).mkdir(parents=True)
    for name, found in (("figure1", ["table2-XXL-384-300-seed0", "table3-B-384-300-seed0"]),
                        ("figure7b", ["table3-B-384-300-seed0"])):
        lab = lab_of(name, tmp_path, "paper")
        result = reproduce.declare(lab)
        assert not result.steps and [folder.name for folder in reproduce.measured_folders(lab, result)] == found
    table = lab_of("table3", tmp_path, "paper")  # which writes there
    assert f"table3-{table.variant}" == "table3-B-384-300-seed0"


def test_a_name_says_which_class_is_drawn(steps):
    """Figures 9 to 11: ImageNet's ids, as timm lists them, have the names of the captions."""
    names, drawn = ImageNetInfo(), {}
    for step in steps["figure9", "paper"]:
        if step.kind.startswith("figure"):
            config = parse(GridConfig, args=arguments(step))
            assert config.sampling.cfg_scale == CFG_RANGES[2, "GPT-XL", 24] and config.sampling.guidance == "attention"
            drawn |= dict(zip(config.classes, config.class_names))
    assert len(drawn) == 12 and all(names.index_to_description(number).split(",")[0] == name for number, name in drawn.items())


def test_sizes_grids_and_seeds_have_folders_of_their_own(tmp_path):
    """Codes of another grid, a GPT of another size, length or seed never meet."""
    runs = [steps_of("table3", tmp_path, "paper", *options) for options in (
        [], ["--image-size", "256"], ["--gpt-model", "GPT-L"], ["--epochs", "50"], ["--seed", "1"])]
    folders = [{step.folder for step in run if step.kind == "gpt"} for run in runs]
    assert [len(folder) for folder in folders] == [5] * 5
    assert len(set.union(*folders)) == 24  # CTF's second stage is the same beside GPT-B and GPT-L
    codes = [{step.folder for step in run if step.kind == "codes"} for run in runs[:2]]
    assert not codes[0] & codes[1]


def test_equal_time_follows_from_rates(tmp_path):
    """Table 5: a paradigm's epochs are those that take as long as the reference's, by one short run of each, alone."""
    lab = lab_of("table5", tmp_path, "paper", "--epochs", "10")
    assert {option(step, "--epochs") for step in in_order(reproduce.declare(lab).steps) if step.kind == "gpt"} == {"7", "10"}
    rates = {step.folder: step for step in lab.wanted}
    assert len(rates) == 4 and all(step.alone for step in rates.values())
    for step in rates.values():
        paradigm = option(step, "--paradigm") if "--paradigm" in arguments(step) else "hierarchical"
        rate = {"alternating": 20, "grouped": 30.04, "independent": 50, "hierarchical": 40}[paradigm]
        finish(step, "run/metrics.jsonl", '{"step": 10}\n' + json.dumps({"step": 20, "images_per_second": rate}) + "\n")
    trained = {step.label: option(step, "--epochs") for step in in_order(reproduce.declare(lab).steps) if step.kind == "gpt"}
    assert not lab.wanted and list(trained.values()) == ["5", "7.5", "12.5", "10"]
    assert [label.split("-")[4] for label in trained] == [*PARADIGMS][:3] + ["none"]
    other = lab_of("table6", tmp_path, "paper")
    reproduce.declare(other)
    assert {step.label for step in other.wanted} == {"dual-128-4096-context-concatenated-GPT-B", "dual-128-4096-GPT-B"}


def test_toy_gpts_have_equal_time(tmp_path):
    """All systems of a toy table are trained as long by their own rate, CTF's two models together as long as another."""
    lab = lab_of("table3", tmp_path, "toy", "--toy-seconds", "64")
    reproduce.declare(lab)
    for step in lab.wanted:
        finish(step, "run/metrics.jsonl", json.dumps({"images_per_second": 200}) + "\n")
    lengths = [option(step, "--steps") for step in in_order(reproduce.declare(lab).steps) if step.kind == "gpt"]
    assert lengths == ["100", "100", "50", "50", "100"]  # LlamaGen, IAR, CTF, IAR2


def test_a_rate_is_measured_by_a_training(tmp_path):
    """The log of the short run must hold what the lab reads from it; measured once, it is not measured again."""
    lab = lab_of("table5", tmp_path, "toy")
    options = ("--image-size", 64, "--downsample-size", 16, "--num-classes", 3, "--global-batch-size", 8, "--device", "cpu")
    assert lab.rate(lab.dual, options) is None
    step, = lab.wanted
    for each in in_order([step])[:-1]:
        finish(each, "nothing", "")
    write_codes(lab.codes(lab.dual).step.path("codes"))
    Runner().run([step])
    rate = lab.rate(lab.dual, options)
    assert rate == json.loads(step.path("run/metrics.jsonl").read_text().splitlines()[-1])["images_per_second"] > 0
    step.path("run/metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no rate: remove the folder"):
        lab.rate(lab.dual, options)


def test_figure_7c_is_of_the_weights_that_were_kept(tmp_path):
    """How far a toy training comes is known after it; a training that has kept nothing must not end as an empty figure."""
    lab = lab_of("figure7c", tmp_path, "toy")
    reproduce.declare(lab)
    assert {step.kind for step in lab.wanted} == {"rate"}  # the trainings, whose lengths follow from them, come later
    lab = lab_of("figure7c", tmp_path, "paper", "--epochs", "120")
    assert [row.name for row in reproduce.declare(lab).rows] == [f"{name}-{epoch}" for name in ("llamagen", "iar2")
                                                                 for epoch in ("0050", "0100")]
    system = iar2(lab)
    finish(system.stages[0].gpt, "run/snapshots/epoch-0007.50/gpt.safetensors", "")
    assert lab.snapshots(system) == ["0007.50"]
    row = reproduce.declare(lab).rows[-1]
    sampled = row.figures[1].file.step
    assert row.name == "iar2-0007.50" and option(sampled, "--gpt-ckpt").endswith("run/snapshots/epoch-0007.50")
    (system.stages[0].gpt.path("run/snapshots")).rename(tmp_path / "lost")
    with pytest.raises(UserError, match="has kept no weights"):
        lab.snapshots(system)
    with pytest.raises(UserError, match="--keep-every 0"):
        reproduce.declare(lab_of("figure7c", tmp_path, "paper", "--keep-every", "0"))


def test_results_are_those_of_this_call(tmp_path, capsys):
    """Rows of an earlier call with other options would be drawn as points of this one."""
    lab = lab_of("figure7c", tmp_path, "toy", "--toy-seconds", "5")
    step = Step(tmp_path, "made", "x", ("x.py", Own()))
    finish(step, "figures.json", '{"frechet": 2.0, "class_accuracy": 0.5}')
    Image.new("RGB", (8, 8)).save(step.path("x.png"))
    stale = tmp_path / "figures" / "figure7c-5s-seed0" / "iar2-0000.25.json"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"frechet": 9.0, "class_accuracy": 0.5}')
    rows = (Row("iar2-0001", (Figures(Made(step, "figures.json")), Figures(Made(step, "none.json"), optional=True))),)
    reproduce.print_result(lab, Result(rows, "8-300", plot="7c", pictures=(Made(step, "x.png"),), note=" (twice)"))
    out = capsys.readouterr().out
    assert not stale.exists() and "GPT-tiny, 5 s each (twice). Published: ImageNet." in out and "| iar2-0001 |" in out
    drawn = json.loads((tmp_path / "figure7c.json").read_text())["panels"]
    assert [panel["curves"][0]["y"] for panel in drawn if "toy" in panel["title"]] == [[2.0], [0.5]]
    assert (tmp_path / "x.png").exists() and (stale.parent / "table8-300.md").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_reference_is_asked_for_where_it_is_read(name, tmp_path):
    """An experiment that never evaluates against it needs none, and refuses one; the others say that it is missing."""
    words = [name, "--dry", *GIVEN["paper"][:4], "--out", str(tmp_path)]
    lab = reproduce.make_lab(parse(ReproduceConfig, args=words), name)
    if reproduce.reads(name, "reference", "paper"):
        with pytest.raises(UserError, match="--reference is missing"):
            reproduce.declare(lab)
    else:
        reproduce.declare(lab)


def test_table_13_takes_baselines(tmp_path, monkeypatch):
    """A tokenizer of diffusers, or a file, is a row without training; it is done first, so that a wrong name is told at once."""
    (tmp_path / "here" / "vae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = ("diffusers:stabilityai/sd-vae-ft-mse", "diffusers:here/vae", "here")
    lab = lab_of("table13", tmp_path / "out", "paper", "--baselines", *given)
    rows = reproduce.declare(lab).rows
    assert [row.name for row in rows] == ["sd-vae-ft-mse", "vae", "here", "llamagen", "iar2"]
    steps = [step for step in in_order(reproduce.declare(lab).steps) if step.kind in ("reconstruction", "tokenizer")]
    assert [step.kind for step in steps[:3]] == ["reconstruction"] * 3
    found = [parse(ReconstructionConfig, args=arguments(step)).what.vq_ckpt for step in steps[:3]]
    assert [str(each) for each in found] == [given[0], f"diffusers:{tmp_path}/here/vae", f"{tmp_path}/here"]
    assert len({step.folder for step in steps}) == len(steps)


@pytest.mark.parametrize("words, sentence", [
    ("table5 --scale toy --epochs 5", "--epochs 5.0 is for --scale paper"),
    ("table5 --toy-seconds 5", "--toy-seconds 5.0 is for --scale toy"),
    ("table5 --window-size 3 --scale toy", "--window-size 3 is read by table6, not by table5"),
    ("figure8 --gpt-model GPT-B", "--gpt-model GPT-B is read by table1"),
    ("figure1 --keep-every 5", "figure9, not by figure1"),
    ("table13 figure3 --seed 1 --scale toy", "not by table13, figure3"),
    ("table13 figure3 --reference .", "not by table13, figure3"), ("figure8 --reference .", "not by figure8"),
    ("table7 --baselines diffusers:a/b --scale toy", "is read by table13, not by table7"),
    ("table13 --baselines nowhere --scale toy", "--baselines 'nowhere' does not exist"),
    ("table4 --models GPT-B", "--models ('GPT-B',) is read by figure7a, figure8, not by table4"),
    ("table5 --nproc 2 --workers 2", "leave one of them out"),
    ("table5 --gpt-options=--lr='", "close its quotes"),
    ("table5", "--data-path is missing"), ("figure3 --data-path .", "--val-path is missing"),
    ("table5 --data-path nowhere", "does not exist"), ("", "no table or figure was named")])
def test_what_nothing_reads_is_refused(words, sentence, capsys, tmp_path):
    """A typed option that changes nothing is believed to have been followed."""
    assert sentence in refused(capsys, reproduce.main, *words.split(), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dry_prints_commands_and_nothing_else(tmp_path, capsys):
    """What would be run, in order, each once, without a file written; the paper's trainings are started on all GPUs."""
    call(reproduce.main, "table13", "figure3", "--dry", *GIVEN["paper"][:4], "--out", tmp_path / "out", "--tokenizer-epochs", 3)
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    scripts = [next(Path(word).name for word in line if word.endswith(".py")) for line in lines]
    assert scripts == ["vq_train.py", "reconstruction_vq_ddp.py", "val_ddp.py", "evaluator.py", "vq_train.py", "vq_train.py",
                       "reconstruction_vq_ddp.py", "evaluator.py", "code_distance.py"]
    assert lines[0][:2] == ["bash", "scripts/launch.sh"] and lines[0][lines[0].index("--epochs") + 1] == "3"
    assert not (tmp_path / "out").exists()
    options = ("--gpt-options=--data-parallel fsdp --compile off", "--dry", "--out", tmp_path / "out")
    call(reproduce.main, "table8", *GIVEN["paper"], *options)
    assert "--data-parallel fsdp --compile off" in capsys.readouterr().out
