"""Care of codebooks where an option is unusual."""

import torch

from tests.conftest import TINY_VQ
from tokenizer.tokenizer_image.codebook import initialise_codebook, revive_dead_codes
from tokenizer.tokenizer_image.vq_model import VQModel
from utils.distributed import Processes

ALONE = Processes(0, 1, 0, torch.device("cpu"))


def test_a_frozen_codebook_is_revived_without_moments():
    """The optimizer knows nothing of a codebook that it does not train, and must still be saved afterwards."""
    torch.manual_seed(0)
    model = VQModel(TINY_VQ)
    book = model.quantizer.codebooks[0].requires_grad_(False)
    optimizer = torch.optim.Adam(parameter for parameter in model.parameters() if parameter.requires_grad)
    before, counts = book.clone(), torch.tensor([0.0] * 3 + [1.0] * 5)
    assert revive_dead_codes(model.quantizer, 0, counts, torch.randn(100, 8), optimizer, ALONE) == 3
    assert torch.equal(book[3:], before[3:]) and not (book[:3] == before[:3]).any()
    assert optimizer.state_dict()["state"] == {}


def test_any_seed_of_a_run_starts_a_codebook():
    """scikit-learn takes seeds of 32 bits, and so does --seed."""
    model = VQModel(TINY_VQ)
    initialise_codebook(model.quantizer, 0, torch.randn(100, 8), 2**32 - 1, ALONE)
    assert torch.isfinite(model.quantizer.codebooks[0]).all()
