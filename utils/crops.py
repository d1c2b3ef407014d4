"""Crops of an image, and the step from pixels to the network's range and back.

Crops follow the guided-diffusion evaluation (ADM; Dhariwal and Nichol 2021): box halving, then bicubic, then a window,
so that results compare with published ones.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def _resize_shorter(image: np.ndarray, size: int) -> np.ndarray:
    """Resize so that the shorter side equals `size`: box halving while it is at least twice that, then bicubic."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    target = (round(picture.width * scale), round(picture.height * scale))
    return np.array(picture.resize(target, Image.Resampling.BICUBIC))


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cut the centre square after resizing the shorter side to `size` (ADM's centre crop).

    image: uint8 [H, W, 3].  Returns uint8 [size, size, 3]; an image of that shape comes back unchanged.
    """
    image = _resize_shorter(image, size)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top:top + size, left:left + size]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator, min_fraction: float = 0.8,
                max_fraction: float = 1.0) -> np.ndarray:
    """Cut a random square after resizing the shorter side to a random length (ADM's random crop).

    image: uint8 [H, W, 3]; min_fraction, max_fraction: part of the shorter side that the square covers, in (0, 1].
    Returns uint8 [size, size, 3].
    """
    length = int(rng.integers(math.ceil(size / max_fraction), math.ceil(size / min_fraction), endpoint=True))
    image = _resize_shorter(image, length)
    top, left = (int(rng.integers(side - size, endpoint=True)) for side in image.shape[:2])
    return image[top:top + size, left:left + size]


def ten_crops(image: np.ndarray, size: int, crop_range: float = 1.1) -> np.ndarray:
    """Corners and centre of the image and of its mirror image, out of a centre crop `crop_range` times as wide.

    image: uint8 [H, W, 3].  Returns uint8 [10, size, size, 3] in the order of torchvision's TenCrop: top left, top
    right, bottom left, bottom right, centre, then the same five of the mirrored image (whose top left is the mirrored
    top right).  Raises ValueError if crop_range < 1.
    """
    width = int(size * crop_range)
    if width < size:
        raise ValueError(f"crop_range is {crop_range}, below 1")
    image = center_crop(image, width)
    far, middle = width - size, round((width - size) / 2)
    corners = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
    return np.stack([view[top:top + size, left:left + size] for view in (image, image[:, ::-1])
                     for top, left in corners])  # [10, size, size, 3]


def flip_crops(image: np.ndarray, size: int) -> np.ndarray:
    """Centre crop and its mirror image: uint8 [H, W, 3] -> uint8 [2, size, size, 3]."""
    image = center_crop(image, size)
    return np.stack([image, image[:, ::-1]])


def to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """Pixels to network range, x / 127.5 - 1: uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.require(images, requirements=["C", "W"]))  # copies mirrored and mapped views
    return images.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Network range to the nearest pixel value: float [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3].

    Truncates 127.5 x + 128 after clamping it to [0, 255], as ADM and LlamaGen do, so that numbers compare; this is
    127.5 x + 127.5 (the inverse of `to_tensor`) rounded to nearest, half up.  Values outside [-1, 1] are clamped.
    """
    images = images.to(torch.float32, copy=True).mul_(127.5).add_(128).clamp_(0, 255)
    return images.to(torch.uint8).movedim(-3, -1).contiguous()


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """A generator for one image in one epoch, the same in every worker and process (Philox, Salmon et al. 2011).

    epoch, index: in [0, 2^64).  The counter's upper words hold them, so no two streams overlap.
    """
    counter = np.array([0, 0, epoch, index], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed % 2**64, 0], np.uint64)))
