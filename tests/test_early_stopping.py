"""Early stopping: the weights of the best evaluation are kept beside the last ones."""

import shutil

import pytest

from autoregressive.models.gpt import load_gpt
from autoregressive.train import train_c2i
from tests.conftest import call, losses
from tests.test_train import gpt_options, write_codes


@pytest.fixture
def codes(tmp_path):
    """A training set so small that it is learned by heart."""
    return write_codes(tmp_path / "codes", images=8)


def options(codes, tmp_path, steps):
    """A training with a learning rate that overfits within a few evaluations."""
    held_out = write_codes(tmp_path / "held", images=21, seed=1)
    return [*gpt_options(codes, tmp_path / "run", steps=steps, data_parallel="none", checkpoint_every=4, lr=2e-2),
            "--val-code-path", held_out, "--eval-every", 2, "--keep-best"]


def test_the_best_evaluation_is_kept_and_survives_a_resume(codes, tmp_path):
    """An overfitted run is scored by its best weights, not its last; an interrupted one keeps the same."""
    call(train_c2i.main, *options(codes, tmp_path, 40))
    bits = losses(tmp_path / "run", "eval/bits_per_image")
    best = min(bits, key=bits.__getitem__)
    assert best < 40 and load_gpt(tmp_path / "run" / "best").provenance.step == best
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000040")
    (tmp_path / "run" / "gpt.safetensors").unlink()
    call(train_c2i.main, *options(codes, tmp_path, 40))  # goes on from step 36, whose later evaluations are worse
    assert load_gpt(tmp_path / "run" / "best").provenance.step == best


def test_best_needs_something_to_go_by(codes, tmp_path, capsys):
    """Without held-out codes nothing can be best."""
    with pytest.raises(SystemExit):
        call(train_c2i.main, *gpt_options(codes, tmp_path / "run", steps=2, data_parallel="none"), "--keep-best")
    assert "--val-code-path" in capsys.readouterr().err
