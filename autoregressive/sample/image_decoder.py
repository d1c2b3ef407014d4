"""From codes to pixels, beside whatever is drawn next.

The tokenizer's decoder takes about a third of the time of sampling once codes are drawn fast.  On a GPU it has a stream of its
own, computes in bf16 where the GPT does, and hands its images over in pinned memory; a thread that waits for them writes them.
Not tried on a GPU yet.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.tokenizer_image.vq_model import VQModel
from utils.crops import to_uint8
from utils.devices import image_layout

# Pixels decoded at once: about 5 GB of activations in bf16, 64 images of 256 pixels.  Not what happens to be free: another
# number of images selects other kernels and changes the last bits.
_PIXELS = 2**22

# Waits until images are there, uint8 [B, S, S, 3], and returns them.
Images = Callable[[], np.ndarray]


class ImageDecoder:
    """Decodes codes of a grid into images of `size` pixels a side, or of the tokenizer's size where that is 0."""

    def __init__(self, tokenizer: VQModel, grid_size: int, size: int, dtype: torch.dtype) -> None:
        """dtype: of the decoder; codebooks keep theirs."""
        device = tokenizer.post_quant_conv.weight.device
        self.tokenizer, self.grid_size, self.size = tokenizer.to(memory_format=image_layout(device)), grid_size, size
        for part in (tokenizer.post_quant_conv, tokenizer.decoder):
            part.to(dtype)
        self.at_once = max(1, _PIXELS // (grid_size * tokenizer.config.downsampling) ** 2)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def start(self, codes: Tensor) -> Images:
        """Begin with codes [B, C, N] as soon as they are drawn; on a CPU the images are there at once.

        Of fewer cells, whole rows from the top, images are grey below.
        """
        if self.stream is None:
            decoded = self._decode(codes).numpy()
            return lambda: decoded
        self.stream.wait_stream(torch.cuda.current_stream(codes.device))
        codes.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            images = self._decode(codes)
            host = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(images, non_blocking=True)
            done = self.stream.record_event()

        def wait() -> np.ndarray:
            done.synchronize()
            return host.numpy()

        return wait

    def _decode(self, codes: Tensor) -> Tensor:
        """Codes [B, C, N] -> uint8 [B, S, S, 3] on their device."""
        return torch.cat([self._decode_slice(some) for some in codes.unflatten(-1, (-1, self.grid_size)).split(self.at_once)])

    def _decode_slice(self, codes: Tensor) -> Tensor:
        images = self.tokenizer.decode_codes(codes).float()                        # [b, 3, H or less, W]
        if missing := images.shape[-1] - images.shape[-2]:
            images = F.pad(images, (0, 0, 0, missing))
        if self.size:
            images = F.interpolate(images, size=(self.size,) * 2, mode="bicubic")
        return to_uint8(images)
