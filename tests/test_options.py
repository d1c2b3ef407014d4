"""Option values that make no sense: one sentence that names option, value and range, before anything else happens."""

import dataclasses
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.train import train_c2i
from tests.conftest import REPOSITORY, call, command
from tests.test_bad_input import refused, sample, vq
from tests.test_repository import option_classes
from tokenizer.tokenizer_image import vq_train
from utils.config import UserError, Values, check_options, declared_values, parse

WORDS = {"--steps": "an integer of 0 or more", "--ema-decay": "a number from 0 to below 1", 
         "--device": "one of auto, cuda, cpu", "--lr": "a number of 0 or more", "--log-every": "an integer of 1 or more",
         "--window-size": "an odd integer of 3 or more", "--top-p": "a number above 0 to 1",
         "--gpt-model": "one of GPT-tiny, GPT-tiny-wide, GPT-small, GPT-B"}


def check(sentence: str, option: str, value: str) -> None:
    """A sentence that names the option, the value seen and what to give."""
    assert option in sentence and value in sentence and "give " in sentence, sentence
    assert WORDS.get(option, "") in sentence, sentence


@pytest.mark.parametrize("option, value", [
    ("--steps", "-3"), ("--ema-decay", "1.5"), ("--device", "tpu"), ("--semantic-weight", "-1"), ("--epochs", "-1"),
    ("--weight-decay", "-1"), ("--max-grad-norm", "-1"), ("--head-layers", "-1"), ("--warmup-steps", "-1"),
    ("--eval-every", "-5"), ("--global-batch-size", "0"), ("--lr", "nan"), ("--lr", "inf"), ("--dropout", "1.5"),
    ("--log-every", "0"), ("--seed", "-1"), ("--num-workers", "-1"), ("--downsample-size", "-8"), ("--beta1", "2"),
    ("--gpt-model", "GPT-Q"), ("--window-size", "4"), ("--paradigm", "both"), ("--keep-checkpoints", "0")])
def test_gpt_training(capsys, tmp_path, option, value):
    """Each of these was accepted, or ended in a traceback after the model was built."""
    options = ["--code-path", tmp_path / "codes", "--run-dir", tmp_path / "run", option, value]
    check(refused(capsys, train_c2i.main, *options), option, value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option, values", [
    ("--codebook-sizes", ("0", "4")), ("--code-dim", ("0",)), ("--image-size", ("0",)), ("--lr", ("nan",)),
    ("--val-limit", ("-1",)), ("--beta", ("-1",)), ("--disc-layers", ("-1",)), ("--steps", ("-1",)),
    ("--vq-model", ("VQ-7",)), ("--device", ("tpu",)), ("--kmeans-vectors", ("0",)), ("--quantizer", ("triple",))])
def test_tokenizer_training(capsys, tmp_path, option, values):
    """The same for the tokenizer's options, before the images are opened."""
    check(refused(capsys, vq_train.main, *vq(tmp_path / "nowhere", tmp_path / "run"), option, *values), option, values[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option, values", [
    ("--cfg-scale", ("nan",)), ("--cfg-scale", ("1", "inf")), ("--seed", ("-1",)), ("--image-size-eval", ("-8",)),
    ("--top-p", ("0",)), ("--temperature", ("-1",)), ("--top-k", ("-1",)), ("--guidance", ("none",)),
    ("--per-class", ("0",)), ("--batch-size", ("0",)), ("--fine-temperature", ("-1",)), ("--cfg-interval", ("-2",))])
@pytest.mark.parametrize("sampler", [sample_c2i, sample_c2i_ddp])
def test_sampling(capsys, models, tmp_path, sampler, option, values):
    """NaN as a guidance scale gave 50,000 images of noise without a word."""
    bad = next(value for value in values if value != "1")
    check(refused(capsys, sampler.main, *sample(models, tmp_path / "x.npz"), option, *values), option, bad)


def test_lists_that_may_not_be_empty(capsys, models, tmp_path):
    """`--classes` without a value ended in a traceback."""
    sentence = refused(capsys, sample_c2i.main, *sample(models, tmp_path / "x.png"), "--classes")
    assert sentence == "error: --classes is empty: give at least one value."


def declared(config: type) -> list[tuple[type, str, Values | None, object]]:
    """(declaring class, field, declared values, type) of all options of a command."""
    found: list[tuple[type, str, Values | None, object]] = []
    for name, hint in get_type_hints(config, include_extras=True).items():
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found += declared(hint) if nested else [(config, name, declared_values(hint), hint)]
    return found


def holds_number(hint: object) -> bool:
    """True for int, float, and types made of them."""
    return hint in (int, float) or any(holds_number(part) for part in get_args(hint))


def test_every_number_of_every_command_declares_its_range():
    """A new option without a range would accept nonsense again."""
    for config in option_classes():
        for owner, name, values, hint in declared(config):
            assert values or not holds_number(hint), f"{owner.__name__}.{name}"


def test_every_declared_range_is_checked_and_shown():
    """One function holds all ranges; --help shows each."""
    for config in option_classes():
        for owner, name, values, _ in declared(config):
            if values is None:
                continue
            outside = [value for value in (-7, 7.5, float("nan")) if not values.allows(value)] if "{" not in values.metavar \
                else ["no-such-row"]
            assert outside, f"{owner.__name__}.{name}"
            options = owner.__new__(owner)  # required fields need no values here
            for field in dataclasses.fields(owner):
                setattr_always(options, field.name, outside[0] if field.name == name else None)
            with pytest.raises(UserError, match="is out of range: give "):
                check_options(options)
    done = command("autoregressive/train/train_c2i.py", "--help")
    for shown in ("--steps INT>=0", "--ema-decay 0<=FLOAT<1", "{auto,cuda,cpu}", "ODD INT>=3", "GPT-XXL"):
        assert shown in done.stdout, shown


def setattr_always(options: object, name: str, value: object) -> None:
    """Set a field, of a frozen dataclass too."""
    object.__setattr__(options, name, value)


def test_help_shows_the_defaults_of_the_recipe(capsys):
    """A default that the named size does not have misleads whoever plans a training."""
    for sampler, words in ((train_c2i, ["--gpt-model", "GPT-XXL", "--image-size", "384"]), (sample_c2i, [])):
        with pytest.raises(SystemExit):
            call(sampler.main, *words, "--help")
    shown = " ".join(re.sub("[│─]", " ", capsys.readouterr().out).split())
    assert "(default: 512)" in shown and "(default: runs/GPT-XXL-384)" in shown
    assert "--gpt-ckpt PATH" in shown and "(required)" in shown


def test_help_can_be_cut_short():
    """`--help | head` ended in a BrokenPipe traceback."""
    script = f"{sys.executable} autoregressive/train/train_c2i.py --help | head -n 1"
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_recipe_does_not_hide_a_bad_value():
    """Typed options are checked before a recipe divides by one of them."""
    for name, value in (("--downsample-size", "-16"), ("--image-size", "-256")):
        with pytest.raises(UserError, match=name):
            parse(train_c2i.TrainConfig, train_c2i.recipe, ["--code-path", "c", name, value])
