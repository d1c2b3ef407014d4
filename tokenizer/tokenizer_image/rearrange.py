"""Rearrange a trained single codebook: equal clusters with reordered codes (IAR), or coarse labels (CTF).

IAR (arXiv 2501.00880) clusters the codes into equal parts and renumbers them so that a cluster is a range of codes; the
tokenizer stays the same function.  CTF (arXiv 2503.16194) keeps the codes and adds the label of their k-means cluster.

Deviation from IAR's release, which places vectors greedily: here the assignment to given centres is the cheapest one of
equal sizes (a transport problem), so that the objective falls at every iteration and the iteration ends.
"""

import hashlib
import logging
import pickle
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from scipy.cluster.hierarchy import linkage
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from tokenizer.tokenizer_image.vq_model import load_tokenizer
from utils.checkpoint import export, fingerprint, read_export
from utils.code_map import CodeMap
from utils.config import UserError, parse, run_main
from utils.distributed import setup
from utils.files import check_exists, check_writable, write_json
from utils.run import set_up_logging

log = logging.getLogger("rearrange")

CODEBOOK = "quantizer.codebooks.0"
CLUSTERS = {"balanced": 128, "coarse": 512}  # of 16384 codes, as in the papers
SPAN = 2**26           # the largest squared distance as an integer: costs with surcharges and prices fit in int32
PRICE_ROUNDS = 80
MAX_ITERATIONS = 1000  # a backstop: convergence is certain, and 16384 codes take about 100
FAR = np.int64(2**45)


@dataclass
class RearrangeConfig:
    """Options of the rearrangement."""

    vq_ckpt: Path
    """Tokenizer with a single codebook: exported file or run folder."""
    out: Path
    """Folder for the maps, the figures and, for balanced, the rearranged tokenizer."""
    method: Literal["balanced", "coarse"] = "balanced"
    """Equal clusters and renumbered codes (IAR), or k-means labels beside the codes (CTF)."""
    clusters: int = 0
    """Number of clusters; 0: 128 for balanced, 512 for coarse."""
    mapping: str = ""
    """Released IAR mapping (.pt, old code -> new code) to use instead of clustering."""
    seed: int = 0
    """Seed of the clustering's start."""


def cluster_size(codes: int, clusters: int) -> int:
    """Members of each of equal clusters; raises UserError when there is no such number."""
    if clusters < 1 or codes % clusters:
        raise UserError(f"--clusters {clusters} does not divide the {codes} codes: give a divisor of that number.")
    return codes // clusters


def squared_distances(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[K, d], [C, d] -> [K, C]."""
    norms = np.square(vectors).sum(1)[:, None] + np.square(centres).sum(1)
    return np.maximum(norms - 2 * vectors @ centres.T, 0)


def objective(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of vectors [K, d] to the mean of their cluster; clusters of any size."""
    vectors = vectors.astype(np.float64)
    sizes = np.bincount(labels)
    sums = np.stack([np.bincount(labels, column) for column in vectors.T], 1)
    return float(np.square(vectors - (sums / np.maximum(sizes, 1)[:, None])[labels]).sum(1).mean())


def cluster_tree(centres: np.ndarray) -> np.ndarray:
    """Every cluster alone and every group of neighbouring ones: members [2 C - 2, C] of 0 and 1 ([1, 1] for one)."""
    groups = list(np.eye(len(centres)))
    if len(centres) > 1:
        for first, second in linkage(centres, "average")[:-1, :2].astype(int):
            groups.append(groups[first] + groups[second])
    return np.stack(groups)


def search_prices(cost: np.ndarray, prices: np.ndarray, capacity: int,
                  groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prices at which vectors that choose the least cost + price fill the clusters almost equally.

    cost: [K, C] int32; prices: [C] int32, a start; groups: [G, C] of `cluster_tree`.  Returns the best prices met and
    the choices [K].  Subgradient steps on the transport problem's dual with a step size for each group, which grows
    while the group stays too full (too empty) and halves when that turns.  Prices of single clusters alone would stall:
    where groups lie apart, raising one of them upsets only its neighbours.
    """
    total, side, best = np.empty_like(cost), np.zeros(len(groups)), None
    steps, moving = np.full(len(groups), cost.min(1).mean() / 50), prices.astype(np.float64)
    for _ in range(PRICE_ROUNDS):
        moving = np.clip(moving - moving.mean(), -4 * SPAN, 4 * SPAN)  # no two prices need differ by more than a cost
        prices = moving.astype(np.int32)
        choices = np.add(cost, prices, out=total).argmin(1)
        excess = np.bincount(choices, minlength=len(prices)) - capacity
        wrong = np.abs(excess).sum()
        if best is None or wrong < best[0]:
            best = wrong, prices, choices
        if wrong <= len(cost) // 500:  # the rest is quicker by `settle`
            break
        now = np.sign(groups @ excess)
        steps *= np.select([now * side > 0, now * side < 0], [1.3, 0.5], 1.0)
        side = now
        moving += (steps * side) @ groups
    return best[1], best[2]


def cheapest_moves(cost: np.ndarray, labels: np.ndarray, moves: np.ndarray, stale: np.ndarray) -> None:
    """Renew the rows `stale` [C] of moves [C, C]: the least rise of cost for moving one member of a to b."""
    rows = np.flatnonzero(stale[labels])
    rows = rows[np.argsort(labels[rows], kind="stable")]
    rises = cost[rows]
    rises -= cost[rows, labels[rows]][:, None]
    present, first = np.unique(labels[rows], return_index=True)
    moves[stale] = FAR
    moves[present] = np.minimum.reduceat(rises, first, axis=0)


def shortest_paths(lengths: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances [C] from the nearest of `sources` [C] bool, and each node's predecessor (-1: none).

    lengths: [C, C] int64, not negative.  Bellman and Ford's rounds, all edges at once.
    """
    distance, before = np.where(sources, 0, 2 * FAR), np.full(len(lengths), -1)
    while True:
        through = distance[:, None] + lengths
        reached = through.min(0)
        nearer = reached < distance
        if not nearer.any():
            return distance, before
        before[nearer] = through[:, nearer].argmin(0)
        distance = np.where(nearer, reached, distance)


def settle(cost: np.ndarray, prices: np.ndarray, labels: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """From choices at given prices to the cheapest assignment of exactly `capacity` vectors a cluster.

    Successive shortest paths over the graph of clusters: surplus vectors move from cluster to cluster at the least rise
    of the total cost.  Prices fall by the path lengths, which keeps every vector at its least cost + price (the proof
    of optimality); a move along a path is then one between equal sums.  Integers make "equal" exact, with duplicates
    too.  Returns labels [K] and prices [C] from zero.
    """
    labels, prices = labels.copy(), prices.astype(np.int64)
    excess = np.bincount(labels, minlength=len(prices)) - capacity
    moves, stale = np.empty((len(prices), len(prices)), np.int64), np.ones(len(prices), bool)
    while excess.any():
        cheapest_moves(cost, labels, moves, stale)
        distance, before = shortest_paths(moves + prices - prices[:, None], excess > 0)
        prices -= distance
        stale[:] = False
        empty = np.flatnonzero(excess < 0)
        for sink in empty[np.argsort(distance[empty], kind="stable")]:
            path = [sink]
            while before[path[-1]] >= 0:
                path.append(before[path[-1]])
            count, movers = min(excess[path[-1]], -excess[sink]), []
            for target, origin in zip(path, path[1:]):
                if count <= 0:  # an earlier path took the source's surplus or the only mover
                    break
                rows = np.flatnonzero(labels == origin)
                movers.append(rows[cost[rows, origin] + prices[origin] == cost[rows, target] + prices[target]])
                count = min(count, len(movers[-1]))
            if count > 0:
                for target, rows in zip(path, movers):
                    labels[rows[:count]] = target
                excess[path[-1]] -= count
                excess[sink] += count
                stale[path] = True
    return labels, (prices - prices.min()).astype(np.int32)


def balanced_lloyd(vectors: np.ndarray, clusters: int, seed: int = 0,
                   max_iterations: int = MAX_ITERATIONS) -> tuple[np.ndarray, int]:
    """`balanced_kmeans` with the number of iterations it took: (labels [K], iterations).

    Starts at random vectors, as IAR does.  Surcharges on the distances shake the assignment out of poor optima: a fixed
    one on the own centre, which lies too near because it follows its members, and a random one on every centre.  Both
    halve whenever they no longer help; at zero the plain iteration goes on until nothing improves.  The objective never
    rises.
    """
    vectors, capacity = vectors.astype(np.float64), cluster_size(len(vectors), clusters)
    rng = np.random.default_rng(seed)
    centres = vectors[rng.choice(len(vectors), clusters, replace=False)]
    span = 4 * np.square(vectors - vectors.mean(0)).sum(1).max()
    scale = SPAN / span if span > 0 else 0.0
    labels, least, prices, surcharge = None, np.inf, np.zeros(clusters, np.int32), 1.0
    for iteration in range(1, max_iterations + 1):
        cost = squared_distances(vectors, centres) * scale
        if labels is not None and surcharge:
            cost *= 1 + surcharge * rng.random(cost.shape, np.float32)
            cost[np.arange(len(cost)), labels] *= 1 + surcharge
        cost = np.rint(cost, out=cost).astype(np.int32)
        trial, trial_prices = settle(cost, *search_prices(cost, prices, capacity, cluster_tree(centres)), capacity)
        trial_centres = vectors[np.argsort(trial, kind="stable")].reshape(clusters, capacity, -1).mean(1)
        reached = np.square(vectors - trial_centres[trial]).sum()
        if reached < least:
            labels, least, centres, prices = trial, reached, trial_centres, trial_prices
        elif surcharge == 0:
            return labels, iteration
        else:
            surcharge = surcharge / 2 if surcharge > 1 / capacity else 0.0
    log.warning("clustering stopped after %d iterations before it had converged", max_iterations)
    return labels, max_iterations


def balanced_kmeans(vectors: np.ndarray, clusters: int, seed: int = 0,
                    max_iterations: int = MAX_ITERATIONS) -> np.ndarray:
    """k-means with exactly K / clusters members a cluster: [K, d] -> labels [K] int64.

    Raises UserError when `clusters` does not divide K.
    """
    return balanced_lloyd(vectors, clusters, seed, max_iterations)[0]


def neighbour_order(vectors: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Order [K] with order[new] = old in which cluster c of m members takes the places c m to (c + 1) m - 1.

    assignment: [K], all clusters of one size.  Inside a cluster the place in the middle goes to the vector nearest the
    mean; the left end and the right end take turns, each going on to its nearest vector not yet placed.
    """
    clusters = int(assignment.max()) + 1
    members = np.argsort(assignment, kind="stable").reshape(clusters, -1)          # [C, m]
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


def plain_kmeans(vectors: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, int]:
    """`coarse_labels` with the iterations of the start that was kept: (labels [K], iterations)."""
    if not 1 <= clusters <= len(vectors):
        raise UserError(f"--clusters {clusters} is not between 1 and {len(vectors)}, the number of codes: change it.")
    if clusters == len(vectors):
        return np.arange(clusters), 0
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # duplicates leave clusters empty
        kmeans = KMeans(clusters, n_init=3, random_state=seed).fit(vectors)
    return kmeans.labels_.astype(np.int64), int(kmeans.n_iter_)


def coarse_labels(vectors: np.ndarray, clusters: int, seed: int = 0) -> np.ndarray:
    """CTF's coarse labels, plain k-means of the codebook: [K, d] -> [K] int64 in [0, clusters), clusters of any size.

    clusters == K gives every code its own label, in order.
    """
    return plain_kmeans(vectors, clusters, seed)[0]


def read_released_mapping(path: str | Path) -> np.ndarray:
    """IAR's released rearrangement, a .pt file of one integer tensor: [K] int64 old code -> new code.

    Raises UserError when the file is no such tensor or the tensor no permutation.
    """
    check_exists(path, "--mapping", "IAR's released .pt file")
    wanted = "give IAR's released .pt file of one integer tensor, old code -> new code"
    try:
        mapping = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"--mapping {path} cannot be read as a tensor ({type(error).__name__}): {wanted}.") from error
    integer = isinstance(mapping, torch.Tensor) and not (mapping.is_floating_point() or mapping.is_complex())
    if not integer or mapping.dtype == torch.bool or mapping.ndim != 1:
        raise UserError(f"--mapping {path} holds no one-dimensional integer tensor: {wanted}.")
    mapping = mapping.long().numpy()
    if not np.array_equal(np.sort(mapping), np.arange(len(mapping))):
        raise UserError(f"--mapping {path} is no permutation of 0 to {len(mapping) - 1}: {wanted}.")
    return mapping


def write_balanced(out: Path, config: dict, tensors: dict[str, torch.Tensor], order: np.ndarray, clusters: int) -> None:
    """Write the tokenizer with its codebook in the given order [K] (order[new] = old), and the map to its codes."""
    tensors = tensors | {CODEBOOK: tensors[CODEBOOK][torch.from_numpy(order)]}
    target = fingerprint(tensors)
    table = np.argsort(order)[:, None]
    CodeMap(table, (len(order),), config["fingerprint"], target).save(out / "code_map.safetensors")
    export(out / "tokenizer.safetensors", "tokenizer", tensors,
           config | {"fingerprint": target, "cluster_size": len(order) // clusters})


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
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 5), layout="constrained")
    for axis, (title, (similarity, codes)) in zip(axes, panels.items()):
        image = axis.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest",
                            extent=(0, codes, codes, 0))
        axis.set_title(title)
    figure.colorbar(image, ax=axes, label="cosine similarity")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def cluster(options: RearrangeConfig, vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Labels [K], order [K] (order[new] = old) and iterations, by the method that the options ask for."""
    if options.method == "coarse":
        labels, iterations = plain_kmeans(vectors, clusters, options.seed)
        return labels, np.argsort(labels, kind="stable"), iterations
    if options.mapping:
        mapping = read_released_mapping(options.mapping)
        if len(mapping) != len(vectors):
            raise UserError(f"--mapping {options.mapping} is of {len(mapping)} codes but --vq-ckpt has {len(vectors)}: "
                            "give the mapping that was made for this tokenizer.")
        return mapping // cluster_size(len(mapping), clusters), np.argsort(mapping), None
    labels, iterations = balanced_lloyd(vectors, clusters, options.seed)
    return labels, neighbour_order(vectors, labels), iterations


def check_options(options: RearrangeConfig, config: dict) -> None:
    """Raise UserError for options that contradict each other or the tokenizer's configuration."""
    sizes = config["model"]["codebook_sizes"]
    if len(sizes) != 1:
        raise UserError(f"--vq-ckpt {options.vq_ckpt} has {len(sizes)} codebooks but a rearrangement is of one: give a "
                        "tokenizer trained with --stage single.")
    if options.mapping and options.method != "balanced":
        raise UserError(f"--mapping {options.mapping} is a balanced rearrangement but --method is {options.method}: "
                        "use --method balanced or leave it out.")
    file = options.vq_ckpt / "tokenizer.safetensors" if options.vq_ckpt.is_dir() else options.vq_ckpt
    if file.resolve() == (options.out / "tokenizer.safetensors").resolve():
        raise UserError(f"--out {options.out} holds the tokenizer of --vq-ckpt, which would be overwritten: give "
                        "another folder.")


def main() -> None:
    """Cluster the codebook of a tokenizer and write what training on the clusters needs."""
    options = parse(RearrangeConfig)
    processes = setup("cpu")
    set_up_logging(processes)
    config, tensors = read_export(options.vq_ckpt, "tokenizer", "--vq-ckpt")
    check_options(options, config)
    check_writable(options.out, "--out")
    vectors = load_tokenizer(options.vq_ckpt).quantizer.table(0).numpy()
    clusters = options.clusters or CLUSTERS[options.method]
    started = time.perf_counter()
    labels, order, iterations = cluster(options, vectors, clusters)
    seconds = time.perf_counter() - started
    if options.method == "balanced":
        write_balanced(options.out, config, tensors, order, clusters)
    else:
        write_coarse(options.out, config["fingerprint"], labels, clusters)
    sizes = np.bincount(labels, minlength=clusters)
    figures = {"method": options.method, "mapping": options.mapping, "clusters": clusters, "codes": len(labels),
               "seed": options.seed, "objective": objective(vectors, labels), "size_min": int(sizes.min()),
               "size_max": int(sizes.max()), "iterations": iterations, "seconds": round(seconds, 3)}
    write_json(options.out / "clusters.json", figures)
    draw(options.out / "clusters.png", vectors, order)
    log.info("%d codes in %d clusters of %d to %d, mean squared distance %.5f, %.1f s; wrote %s", len(labels), clusters,
             sizes.min(), sizes.max(), figures["objective"], seconds, options.out)
    processes.close()


if __name__ == "__main__":
    run_main(main)
