"""Train a GPT from captions (LlamaGen's entry point): train_c2i.py with --condition text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

from autoregressive.train import train_c2i
from utils.config import run_main


def main() -> None:
    """Train on the captions beside --code-path, or of --text-path."""
    train_c2i.main("--condition", "text")


if __name__ == "__main__":
    run_main(main)
