"""The Inception network that FID is defined with: the one of 2015-12-05, as ADM's evaluator uses it.

Blocks, TensorFlow 1 resize and converted weights come from the package torch-fidelity; this module wires the blocks so that the
spatial features, which torch-fidelity's own extractor does not give, come out of the same pass, and loads the weights without
unpickling objects.  Source of the features: ADM (arXiv 2105.05233); spatial ones (sFID): Nash et al. 2021 (arXiv 2103.03841).
"""

from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from evaluations.c2i.weights import Weights

INPUT_SIZE = 299
POOL_FEATURES = 2048
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
CLASSES = 1008
WEIGHTS = Weights("--inception-weights", URL_INCEPTION_V3, "torch-fidelity's Inception weights", "the InceptionV3 of FID",
                  # The file name ends in the first digits of its SHA-256.
                  digest=Path(urlparse(URL_INCEPTION_V3).path).stem.rsplit("-", 1)[1])


class Inception(nn.Module):
    """InceptionV3 (2015), keys as in torch-fidelity's weights; in evaluation mode and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE_1(1280)
        self.Mixed_7c = InceptionE_2(2048)
        self.fc = nn.Linear(POOL_FEATURES, CLASSES)
        self.requires_grad_(False)
        self.eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of images.

        images: [B, 3, H, W], any size, uint8 or float, 0 to 255.  Returns float32 pool3 [B, 2048], spatial [B, 2023] in
        the order row, column, channel, and probs [B, 1008], the softmax without the layer's bias.
        """
        # Reduced precision would move the features by 1e-3.  The context manager's own default switches cuDNN off.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return self._features(images.float().contiguous(memory_format=torch.channels_last))

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = interpolate_bilinear_2d_like_tensorflow1x(images, (INPUT_SIZE, INPUT_SIZE), align_corners=False)
        x = (x - 128) / 128  # [B, 3, 299, 299], -1 to 0.992
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = F.max_pool2d(x, 3, stride=2)  # [B, 64, 73, 73]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # [B, 192, 71, 71]
        x = F.max_pool2d(x, 3, stride=2)  # [B, 192, 35, 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [B, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [B, 768, 17, 17]
        x = self.Mixed_6d(x)  # its first 192 channels are branch1x1
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # [B, 2023]
        x = self.Mixed_7a(self.Mixed_6e(x))  # [B, 1280, 8, 8]
        pool3 = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))  # [B, 2048]
        return pool3, spatial, F.linear(pool3, self.fc.weight).softmax(1)


def prepare(images: np.ndarray) -> Tensor:
    """Images as the network takes them: uint8 or float [n, H, W, 3] from 0 to 255 -> uint8 or float32 [n, 3, H, W]."""
    copied = images.astype(np.uint8 if images.dtype == np.uint8 else np.float32)  # what was read from a file cannot be written to
    return torch.from_numpy(copied).permute(0, 3, 1, 2)


def load_inception(path: Path | None, device: torch.device) -> tuple[Inception, str]:
    """The network with the weights in `path` (None: the download), and their file's SHA-256.

    Raises UserError if they are not torch-fidelity's.
    """
    file = WEIGHTS.file(path)
    tensors, digest = WEIGHTS.read(file)
    network = Inception()
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise WEIGHTS.misfit(file) from error
    return network.to(device).to(memory_format=torch.channels_last), digest  # 1.4 times as fast on a CPU
