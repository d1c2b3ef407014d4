"""Recipes of the GPT trainer: table 11, the released trainers, and one step beyond."""

from dataclasses import replace

from autoregressive.models.guidance import sampling_preset
from autoregressive.train.options import RECIPES, TrainConfig, recipe
from utils.config import parse


def test_recipes_are_table_11_and_typed_flags_win():
    """--gpt-model alone selects the row; a typed flag wins over the recipe, the recipe over a default."""
    required = ["--run-dir", "r", "--code-path", "c"]
    config = parse(TrainConfig, recipe, [*required, "--gpt-model", "GPT-XXL", "--image-size", "384"])
    assert (config.batch.global_batch_size, config.optim.lr, config.optim.lr_end, config.optim.lr_schedule, config.batch.epochs,
            config.objective.semantic_weight, config.parallel.data_parallel) == (512, 3e-4, 1e-4, "cosine", 300, 1.5, "fsdp")
    typed = parse(TrainConfig, recipe, [*required, "--gpt-model", "GPT-XXL", "--lr", "7e-4"])
    assert typed.optim.lr == 7e-4 and typed.optim.lr_end == 5e-5 and typed.batch.epochs == 50
    llamagen = parse(TrainConfig, recipe, [*required, "--gpt-model", "GPT-XL", "--codebook-sizes", "16384"])
    assert (llamagen.optim.lr, llamagen.optim.lr_schedule, llamagen.batch.epochs) == (1e-4, "constant", 50)
    assert len(RECIPES) == 16 and llamagen.optim.weight_decay == 0.05


def test_the_released_recipe_is_that_of_its_two_trainers():
    """One schedule for DDP, one for FSDP, λ_s 1 but 2 for L, w 0.1; typed flags win, and LlamaGen's rows stay."""
    def chosen(*words):
        config = parse(TrainConfig, recipe, ["--code-path", "c", "--recipe", "released", *words])
        return config.optim.lr, config.optim.lr_end, config.objective.semantic_weight, config.parallel.data_parallel

    assert chosen("--gpt-model", "GPT-B") == (1.5e-4, 5e-5, 1.0, "ddp")
    assert chosen("--gpt-model", "GPT-B", "--data-parallel", "fsdp") == (3e-4, 1e-4, 1.0, "fsdp")
    assert chosen("--gpt-model", "GPT-L", "--image-size", "384") == (1.5e-4, 5e-5, 2.0, "ddp")
    assert chosen("--gpt-model", "GPT-XXL", "--image-size", "384") == (3e-4, 1e-4, 1.0, "fsdp")
    assert chosen("--gpt-model", "GPT-L", "--semantic-weight", "3", "--lr-schedule", "constant")[2] == 3
    assert chosen("--gpt-model", "GPT-B", "--codebook-sizes", "16384") == (1e-4, 0.0, 1.0, "ddp")
    assert sampling_preset("GPT-B", 2, 16)["cfg_attention_weight"] == 0.05
    assert sampling_preset("GPT-B", 2, 16, "released")["cfg_attention_weight"] == 0.1


def test_the_recipe_beyond_is_table_11_with_muon():
    """For every size and codebook, also those without a row; a typed optimizer wins."""
    for words in (["--gpt-model", "GPT-B"], ["--gpt-model", "GPT-tiny"], ["--codebook-sizes", "16384"]):
        paper, beyond = (parse(TrainConfig, recipe, ["--code-path", "c", "--recipe", name, *words]) for name in (
            "paper", "beyond"))
        assert beyond.optimizer == "muon" and replace(beyond, optimizer="adamw", recipe="paper") == paper
    assert parse(TrainConfig, recipe, ["--code-path", "c", "--recipe", "beyond", "--optimizer", "adamw"]).optimizer == "adamw"
    assert sampling_preset("GPT-B", 2, 16, "beyond") == sampling_preset("GPT-B", 2, 16)
