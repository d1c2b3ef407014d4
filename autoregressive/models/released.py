"""Key names of the published GPTs of LlamaGen and IAR2, and what their tensors tell of the shape.

What the published code computes otherwise is configuration of the imported checkpoint: IAR2's rotary rows (`rotary="repeated"`,
`head_rotary="zero_summary"`) and those of LlamaGen's captions (`caption_rotary="zero"`).  The class token's zero rotary row and
the compression of a zero vector at borders are the same in all our models.
"""

from typing import Any

from torch import Tensor

from autoregressive.models.gpt import GPT
from autoregressive.models.transformer import GPTConfig
from utils.released import Kind, Table, affine, count, require

BLOCK = ("attention.wqkv.weight", "attention.wo.weight", "feed_forward.w1.weight", "feed_forward.w2.weight",
         "feed_forward.w3.weight", "attention_norm.weight", "ffn_norm.weight")


def blocks(released: str, ours: str) -> Table:
    """Keys of a stack of transformer layers."""
    return [(f"{released}.{{}}.{name}", f"{ours}.{{}}.{name}") for name in BLOCK]


def half_biased(released: str, ours: str) -> Table:
    """Keys of a two-layer MLP whose second layer has no bias."""
    return [*affine(f"{released}.0", f"{ours}.0"), (f"{released}.2.weight", f"{ours}.2.weight")]


TRUNK: Table = [*blocks("layers", "layers"), ("norm.weight", "paradigm.norm.weight")]
CLASS: Table = [("cls_embedding.embedding_table.weight", "cls_embedding.weight")]
TEXT: Table = [("cls_embedding.uncond_embedding", "cls_embedding.null_caption"),
               ("cls_embedding.cap_proj.fc1.weight", "cls_embedding.projection.0.weight"),
               ("cls_embedding.cap_proj.fc2.weight", "cls_embedding.projection.2.weight")]
SINGLE: Table = [*TRUNK, ("tok_embeddings.weight", "paradigm.embeddings.0.weight"),
                 ("output.weight", "paradigm.outputs.0.weight")]
LLAMAGEN_GPT: Table = [*CLASS, *SINGLE]
LLAMAGEN_T2I_GPT: Table = [*TEXT, *SINGLE]
IAR2_GPT: Table = [
    *CLASS, *TRUNK, *blocks("factorized_blocks", "paradigm.head.layers"),
    ("tok_embeddings1.weight", "paradigm.embeddings.0.weight"),
    ("tok_embeddings2.weight", "paradigm.embeddings.1.weight"),
    *affine("aggregation_layer.0", "paradigm.fusion.0"), *affine("aggregation_layer.2", "paradigm.fusion.2"),
    *half_biased("mlp1", "paradigm.head.context.compress"), *half_biased("mlp2", "paradigm.head.context.expand"),
    *half_biased("output1", "paradigm.outputs.0"), *half_biased("output2", "paradigm.outputs.1"),
]


def gpt_shape(tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    """GPTConfig fields that the published tensors tell; heads and grid are not among them."""
    classes, dim = require(tensors, "cls_embedding.embedding_table.weight", what, 2).shape
    return {"num_classes": classes - 1} | trunk_shape(tensors, dim, what)


def caption_gpt_shape(tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    """The same of text-conditional tensors."""
    length, width = require(tensors, "cls_embedding.uncond_embedding", what, 2).shape
    dim = len(require(tensors, "cls_embedding.cap_proj.fc1.weight", what, 2))
    return {"caption_length": length, "caption_dim": width} | trunk_shape(tensors, dim, what)


def trunk_shape(tensors: dict[str, Tensor], dim: int, what: str) -> dict[str, Any]:
    """What the tensors behind the condition tell, for a trunk of width `dim`."""
    tables = [require(tensors, key, what, 2) for key in ("tok_embeddings.weight", "tok_embeddings1.weight",
                                                         "tok_embeddings2.weight") if key in tensors]
    fields = {"dim": dim, "n_layer": count(tensors, r"layers\.(\d+)\."),
              "codebook_sizes": [len(table) for table in tables]}
    head_layers = count(tensors, r"factorized_blocks\.(\d+)\.")
    return fields | ({"head_layers": head_layers} if head_layers else {})


GPT_KINDS: dict[str, Kind] = {
    "llamagen-gpt": Kind("gpt", GPT, GPTConfig, gpt_shape, LLAMAGEN_GPT,
                         {"paradigm": "single", "condition": "class"}),
    "llamagen-t2i-gpt": Kind("gpt", GPT, GPTConfig, caption_gpt_shape, LLAMAGEN_T2I_GPT,
                             {"paradigm": "single", "condition": "text", "caption_rotary": "zero"}),
    "iar2-gpt": Kind("gpt", GPT, GPTConfig, gpt_shape, IAR2_GPT,
                     {"paradigm": "hierarchical", "condition": "class", "rotary": "repeated", "head_rotary": "zero_summary"}),
}
