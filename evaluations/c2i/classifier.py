"""Train the small classifier (`utils/classifier.py`) that judges small images or serves as a perceptual distance.

Inception features say little about 28-pixel clothes. The quickstart therefore trains one classifier that judges samples
(`judge.py`) and another whose features serve the tokenizer's perceptual loss, so that the judge is not the teacher.
"""

import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from utils.checkpoint import export
from utils.classifier import ClassifierConfig, SmallClassifier
from utils.config import parse, run_main
from utils.crops import center_crop, to_tensor
from utils.distributed import Processes, setup
from utils.files import check_writable
from utils.images import ImageSource, UnreadableImage, open_images
from utils.run import set_up_logging

log = logging.getLogger("classifier")


@dataclass
class ClassifierTrainConfig:
    """Options of classifier training."""

    data_path: Path
    """Image folder or npz with labels."""
    out: Path
    """File to write."""
    image_size: int = 32
    """Side of the square images in pixels."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of the stages, each at half the resolution of the one before."""
    epochs: int = 8
    """Passes over the data."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 2e-3
    """Peak of the one-cycle learning rate."""
    seed: int = 0
    """Seed of initialisation and data order."""
    device: str = "auto"
    """auto, cuda or cpu."""


def load_all(source: ImageSource, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All readable images of a small set in memory: uint8 [N, size, size, 3] and labels [N]."""
    images, rows = [], []
    for index in range(len(source)):
        try:
            images.append(center_crop(source.load(index), size))
            rows.append(index)
        except UnreadableImage as error:
            log.warning("skipped %s", error)
    return np.stack(images), source.labels[rows]


def augment(images: Tensor) -> Tensor:
    """Mirror half of a batch [B, 3, H, W] and shift all of it by up to two pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    dy, dx = torch.randint(-2, 3, (2,)).tolist()
    return torch.where(mirrored, images.flip(3), images).roll((dy, dx), (2, 3))


def train(options: ClassifierTrainConfig, processes: Processes) -> SmallClassifier:
    """Train with label-smoothed cross-entropy and a one-cycle learning rate."""
    source = open_images(options.data_path)
    images, labels = load_all(source, options.image_size)
    labels = torch.from_numpy(labels).to(processes.device)
    torch.manual_seed(options.seed)
    model = SmallClassifier(ClassifierConfig(source.num_classes, options.widths)).to(processes.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    steps = options.epochs * max(len(images) // options.batch_size, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
    bar = tqdm(total=steps, desc="classifier", dynamic_ncols=True, mininterval=1.0)
    for _ in range(options.epochs):
        order = np.random.default_rng([options.seed, bar.n]).permutation(len(images))
        for first in range(0, max(len(order) - options.batch_size + 1, 1), options.batch_size):
            rows = order[first : first + options.batch_size]
            batch = augment(to_tensor(torch.from_numpy(images[rows])).to(processes.device))
            loss = F.cross_entropy(model(batch), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()
    return model.eval()


def main() -> None:
    """Train a classifier on an image source and export it."""
    options = parse(ClassifierTrainConfig)
    processes = setup(options.device)
    set_up_logging(processes)
    check_writable(options.out.parent, "--out")
    model = train(options, processes)
    export(options.out, "classifier", model.state_dict(), {"model": asdict(model.config)})
    log.info("wrote %s", options.out)
    processes.close()


if __name__ == "__main__":
    run_main(main)
