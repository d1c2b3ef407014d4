"""Key names of the published tokenizers of LlamaGen, IAR and IAR2, and what their tensors tell of the shape."""

from typing import Any

from torch import Tensor

from tokenizer.tokenizer_image.vq_model import VQConfig, VQModel
from utils.released import Kind, Table, affine, count, require


def autoencoder(side: str, resample: str) -> Table:
    """Keys of the encoder or the decoder."""
    residual, attention = ("norm1", "conv1", "norm2", "conv2"), ("norm", "q", "k", "v", "proj_out")
    released, ours = f"{side}.conv_blocks.{{}}", f"{side}.stages.{{}}"
    names = [(name, name) for name in (f"{side}.conv_in", f"{side}.norm_out", f"{side}.conv_out",
                                       *(f"{side}.mid.{{}}.{part}" for part in residual + attention))]
    names += [(f"{released}.res.{{}}.{part}", f"{ours}.res.{{}}.{part}") for part in residual]
    names += [(f"{released}.res.{{}}.nin_shortcut", f"{ours}.res.{{}}.shortcut")]
    names += [(f"{released}.attn.{{}}.{part}", f"{ours}.attn.{{}}.{part}") for part in attention]
    names += [(f"{released}.{resample}.conv", f"{ours}.resample.conv")]
    return [pair for name in names for pair in affine(*name)]


LLAMAGEN_VQ: Table = [*autoencoder("encoder", "downsample"), *autoencoder("decoder", "upsample"), *affine("quant_conv"),
                      *affine("post_quant_conv"), ("quantize.embedding.weight", "quantizer.codebooks.0")]
IAR2_VQ: Table = [*LLAMAGEN_VQ, ("quantize.embedding_second", "quantizer.codebooks.1")]


def tokenizer_shape(tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    """VQConfig fields that the published tensors tell."""
    channels = require(tensors, "encoder.conv_in.weight", what, 4).shape[0]

    def multipliers(side: str) -> list[int]:
        levels = range(count(tensors, rf"{side}\.conv_blocks\.(\d+)\."))
        return [require(tensors, f"{side}.conv_blocks.{level}.res.0.conv1.weight", what, 4).shape[0] // channels
                for level in levels]

    books = [require(tensors, "quantize.embedding.weight", what, 2)]
    if "quantize.embedding_second" in tensors:
        books.append(require(tensors, "quantize.embedding_second", what, 2))
    return {"channels": channels, "encoder_multipliers": multipliers("encoder"),
            "decoder_multipliers": multipliers("decoder")[::-1],  # the decoder begins at the deepest level
            "latent_channels": require(tensors, "encoder.conv_out.weight", what, 4).shape[0],
            "residual_blocks": count(tensors, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
            "code_dim": books[0].shape[1], "codebook_sizes": [len(book) for book in books]}


SINGLE = Kind("tokenizer", VQModel, VQConfig, tokenizer_shape, LLAMAGEN_VQ, {"quantizer": "single"}, ("quantize.codebook_used",))
TOKENIZER_KINDS: dict[str, Kind] = {
    "llamagen-vq": SINGLE,
    "iar-vq": SINGLE,  # LlamaGen's tokenizer with a reordered codebook
    "iar2-vq": Kind("tokenizer", VQModel, VQConfig, tokenizer_shape, IAR2_VQ, {"quantizer": "dual"},
                    ("quantize.codebook_used", "quantize.codebook_used2")),
}
