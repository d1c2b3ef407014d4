"""Train the small classifier (`utils/classifier.py`) that judges small images or serves as a perceptual distance.

Inception features say little about 28-pixel clothes. The quickstart therefore trains one classifier that judges samples
(`judge.py`) and another whose features serve the tokenizer's perceptual loss, so that the judge is not the teacher.
"""

import logging
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.checkpoint import export
from utils.classifier import ClassifierConfig, SmallClassifier
from utils.config import Device, NonNegative, Positive, Seed, UserError, parse, run_main
from utils.crops import center_crop, to_tensor
from utils.distributed import Processes, setup
from utils.files import check_writable
from utils.image_dataset import CropDataset, collate_crops
from utils.images import ImageSource, open_images
from utils.logs import progress, set_up_logging

log = logging.getLogger("classifier")


@dataclass
class ClassifierTrainConfig:
    """Options of classifier training."""

    data_path: Path
    """Image folder or npz with labels."""
    out: Path
    """File to write."""
    image_size: Positive = 32
    """Side of the square images in pixels."""
    widths: tuple[Positive, ...] = (32, 64, 128)
    """Channels of the stages, each at half the resolution of the one before."""
    epochs: Positive = 8
    """Passes over the data."""
    batch_size: Positive = 128
    """Images per step."""
    lr: NonNegative = 2e-3
    """Peak of the one-cycle learning rate."""
    seed: Seed = 0
    """Seed of initialisation and data order."""
    device: Device = "auto"
    """auto: CUDA where there is any."""


def load_all(source: ImageSource, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All readable images of a small set in memory: uint8 [N, size, size, 3] and labels [N]; UserError if there is none."""
    crops = CropDataset(source, np.arange(len(source)), partial(center_crop, size=size))
    rows, images, _ = collate_crops([crops[index] for index in range(len(crops))])
    if images is None:
        raise UserError(f"{source.option} {source.path} has no readable image: check that its images are whole.")
    return images.numpy(), source.labels[rows]


def augment(images: Tensor) -> Tensor:
    """Mirror half of a batch [B, 3, H, W] and shift all of it by up to two pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    dy, dx = torch.randint(-2, 3, (2,)).tolist()
    return torch.where(mirrored, images.flip(3), images).roll((dy, dx), (2, 3))


def train(config: ClassifierTrainConfig, processes: Processes) -> SmallClassifier:
    """Train with label-smoothed cross-entropy and a one-cycle learning rate."""
    source = open_images(config.data_path)
    images, class_ids = load_all(source, config.image_size)
    labels = torch.from_numpy(class_ids).to(processes.device)
    torch.manual_seed(config.seed)
    model = SmallClassifier(ClassifierConfig(source.num_classes, config.widths, source.class_names)).to(processes.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.05)
    steps = config.epochs * max(len(images) // config.batch_size, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    bar = progress(steps, "classifier", "steps", processes)
    for _ in range(config.epochs):
        order = np.random.default_rng([config.seed, schedule.last_epoch]).permutation(len(images))
        for first in range(0, max(len(order) - config.batch_size + 1, 1), config.batch_size):
            rows = order[first : first + config.batch_size]
            batch = augment(to_tensor(torch.from_numpy(images[rows])).to(processes.device))
            loss = F.cross_entropy(model(batch), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    return model.eval()


def main() -> None:
    """Train a classifier on an image source and export it."""
    config = parse(ClassifierTrainConfig)
    processes = setup(config.device)
    set_up_logging(processes)
    if config.out.is_dir():
        raise UserError(f"--out {config.out} is a folder: give the name of a file.")
    check_writable(config.out.parent, "--out")
    model = train(config, processes)
    export(config.out, "classifier", model.state_dict(), {"model": asdict(model.config)})
    log.info("wrote %s", config.out)
    processes.close()


if __name__ == "__main__":
    run_main(main)
