"""Rearrange a trained single codebook: equal clusters with reordered codes (IAR), or coarse labels (CTF).

IAR (arXiv 2501.00880) clusters the codes into equal parts and renumbers them so that a cluster is a range of codes; the
tokenizer stays the same function.  CTF (arXiv 2503.16194) keeps the codes and adds the label of their k-means cluster.

The clustering, and how it deviates from IAR's release, is in `kmeans.py`.
"""

import hashlib
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by its path

import numpy as np
import torch
from matplotlib.figure import Figure

from tokenizer.tokenizer_image.kmeans import balanced_kmeans, cluster_size, objective, plain_kmeans
from tokenizer.tokenizer_image.vq_model import load_tokenizer
from utils.checkpoint import export, fingerprint, read_export
from utils.code_map import CodeMap
from utils.config import Count, Seed, UserError, choices, parse, run_main
from utils.distributed import setup
from utils.files import check_exists, check_writable, replacing, write_json
from utils.logs import set_up_logging

log = logging.getLogger("rearrange")

CODEBOOK = "quantizer.codebooks.0"
CLUSTERS = {"balanced": 128, "coarse": 512}  # of 16384 codes, as in the papers


@dataclass
class RearrangeConfig:
    """Options of the rearrangement."""

    vq_ckpt: Path
    """Tokenizer with a single codebook: exported file or run folder."""
    out: Path
    """Folder for the maps, the figures and, for balanced, the rearranged tokenizer."""
    method: Annotated[str, choices(CLUSTERS)] = "balanced"
    """Equal clusters and renumbered codes (IAR), or k-means labels beside the codes (CTF)."""
    clusters: Count = 0
    """Number of clusters; 0: 128 for balanced, 512 for coarse."""
    mapping: str = ""
    """Released IAR mapping (.pt, old code -> new code) to use instead of clustering."""
    seed: Seed = 0
    """Seed of the clustering's start."""


def neighbour_order(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Order [K] of vectors [K, d], order[new] = old: cluster c of m members takes the places c m to (c + 1) m - 1.

    labels: [K] int64, clusters of one size.  Inside a cluster the vector nearest the mean takes the place in the middle.
    From there the chain grows to the left and to the right in turn, each time by the free vector nearest to that end.
    """
    clusters = int(labels.max()) + 1
    members = np.argsort(labels, kind="stable").reshape(clusters, -1)              # [C, m]
    points, every = vectors.astype(np.float64)[members], np.arange(clusters)       # [C, m, d]
    placed = np.zeros(members.shape, bool)

    def take_nearest(anchors: np.ndarray) -> np.ndarray:
        distance = np.square(points - anchors[:, None]).sum(2)
        nearest = np.where(placed, np.inf, distance).argmin(1)
        placed[every, nearest] = True
        return nearest

    middle = take_nearest(points.mean(1))
    left, right = [middle], [middle]
    for step in range(members.shape[1] - 1):
        side = right if step % 2 else left
        side.append(take_nearest(points[every, side[-1]]))
    chain = np.stack(left[:0:-1] + right, 1)                                       # [C, m]
    return np.take_along_axis(members, chain, 1).ravel()


def read_released_mapping(path: str | Path) -> np.ndarray:
    """IAR's released rearrangement, a .pt file of one integer tensor: [K] int64 old code -> new code.

    Raises UserError when the file is no such tensor or the tensor no permutation.
    """
    check_exists(path, "--mapping", "IAR's released .pt file")
    wanted = "give IAR's released .pt file of one integer tensor, old code -> new code"
    try:
        mapping = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise UserError(f"--mapping {path} cannot be read as a tensor ({type(error).__name__}): {wanted}.") from error
    integer = isinstance(mapping, torch.Tensor) and not (mapping.is_floating_point() or mapping.is_complex())
    if not integer or mapping.dtype == torch.bool or mapping.ndim != 1:
        raise UserError(f"--mapping {path} holds no one-dimensional integer tensor: {wanted}.")
    mapping = mapping.long().numpy()
    if not np.array_equal(np.sort(mapping), np.arange(len(mapping))):
        raise UserError(f"--mapping {path} is no permutation of 0 to {len(mapping) - 1}: {wanted}.")
    return mapping


def write_balanced(out: Path, description: dict[str, Any], tensors: dict[str, torch.Tensor], order: np.ndarray,
                   clusters: int) -> None:
    """Write the tokenizer with its codebook in the given order [K] (order[new] = old), and the map to its codes."""
    tensors = tensors | {CODEBOOK: tensors[CODEBOOK][torch.from_numpy(order)]}
    target = fingerprint(tensors)
    table = np.argsort(order)[:, None]
    CodeMap(table, (len(order),), description["fingerprint"], target).save(out / "code_map.safetensors")
    export(out / "tokenizer.safetensors", "tokenizer", tensors,
           description | {"fingerprint": target, "cluster_size": len(order) // clusters})


def write_coarse(out: Path, source: str, labels: np.ndarray, clusters: int) -> None:
    """Write the maps of both stages for coarse labels [K] of the codes of tokenizer `source`."""
    table = labels[:, None]
    target = "coarse-" + hashlib.sha256(np.ascontiguousarray(table, "<i8").tobytes()).hexdigest()[:16]
    CodeMap(table, (clusters,), source, target).save(out / "coarse_map.safetensors")
    pairs = np.stack([labels, np.arange(len(labels))], 1)
    CodeMap(pairs, (clusters, len(labels)), source, source, target).save(out / "fine_map.safetensors")


def draw(path: Path, vectors: np.ndarray, order: np.ndarray, pixels: int = 512) -> None:
    """Picture of the cosine similarities of all codes as trained and in `order` [K], and of the first codes closer up.

    vectors: [K, d], normalised; a pixel is the mean over its codes.
    """
    def pooled(rows: np.ndarray) -> np.ndarray:
        edges = np.linspace(0, len(rows), min(pixels, len(rows)) + 1).astype(int)
        means = np.add.reduceat(rows, edges[:-1], axis=0) / np.diff(edges)[:, None]
        return means @ means.T

    shown = min(pixels, len(order))
    panels = {f"all {len(order)} codes, as trained": (pooled(vectors), len(order)),
              f"all {len(order)} codes, by cluster": (pooled(vectors[order]), len(order)),
              f"first {shown} codes, by cluster": (pooled(vectors[order[:shown]]), shown)}
    figure = Figure(figsize=(16, 5), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, (similarity, codes)) in zip(axes, panels.items()):
        image = axis.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest", extent=(0, codes, codes, 0))
        axis.set_title(title)
    figure.colorbar(image, ax=axes, label="cosine similarity")
    with replacing(path) as aside:
        figure.savefig(aside, dpi=120, format="png")


def cluster(config: RearrangeConfig, vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Labels [K], order [K] (order[new] = old) and iterations (None for a released mapping)."""
    if config.method == "coarse":
        labels, iterations = plain_kmeans(vectors, clusters, config.seed)
        return labels, np.argsort(labels, kind="stable"), iterations
    if config.mapping:
        mapping = read_released_mapping(config.mapping)
        if len(mapping) != len(vectors):
            raise UserError(f"--mapping {config.mapping} is of {len(mapping)} codes but --vq-ckpt has {len(vectors)}: "
                            "give the mapping that was made for this tokenizer.")
        return mapping // cluster_size(len(mapping), clusters), np.argsort(mapping), None
    labels, iterations = balanced_kmeans(vectors, clusters, config.seed)
    return labels, neighbour_order(vectors, labels), iterations


def check(config: RearrangeConfig, description: dict[str, Any]) -> None:
    """Raise UserError for options that contradict each other or the tokenizer's configuration."""
    sizes = description["model"]["codebook_sizes"]
    if len(sizes) != 1:
        raise UserError(f"--vq-ckpt {config.vq_ckpt} has {len(sizes)} codebooks but only a single one can be rearranged: give a "
                        "tokenizer trained with --stage single.")
    if config.mapping and config.method != "balanced":
        raise UserError(f"--mapping {config.mapping} is a balanced rearrangement but --method is {config.method}: "
                        "use --method balanced or leave it out.")
    file = config.vq_ckpt / "tokenizer.safetensors" if config.vq_ckpt.is_dir() else config.vq_ckpt
    if file.resolve() == (config.out / "tokenizer.safetensors").resolve():
        raise UserError(f"--out {config.out} holds the tokenizer of --vq-ckpt, which would be overwritten: give another folder.")


def main() -> None:
    """Cluster the codebook of a tokenizer and write what training on the clusters needs."""
    config = parse(RearrangeConfig)
    processes = setup("cpu")
    set_up_logging(processes)
    description, tensors = read_export(config.vq_ckpt, "tokenizer", "--vq-ckpt")
    check(config, description)
    check_writable(config.out, "--out")
    vectors = load_tokenizer(config.vq_ckpt).quantizer.table(0).numpy()
    clusters = config.clusters or CLUSTERS[config.method]
    started = time.perf_counter()
    labels, order, iterations = cluster(config, vectors, clusters)
    seconds = time.perf_counter() - started
    if config.method == "balanced":
        write_balanced(config.out, description, tensors, order, clusters)
    else:
        write_coarse(config.out, description["fingerprint"], labels, clusters)
    sizes = np.bincount(labels, minlength=clusters)
    figures = {"method": config.method, "mapping": config.mapping, "clusters": clusters, "codes": len(labels),
               "seed": config.seed, "objective": objective(vectors, labels), "size_min": int(sizes.min()),
               "size_max": int(sizes.max()), "iterations": iterations, "seconds": round(seconds, 3)}
    write_json(config.out / "clusters.json", figures)
    draw(config.out / "clusters.png", vectors, order)
    log.info("%d codes in %d clusters of %d to %d, mean squared distance %.5f, %.1f s; wrote %s", len(labels), clusters,
             sizes.min(), sizes.max(), figures["objective"], seconds, config.out)
    processes.close()


if __name__ == "__main__":
    run_main(main)
