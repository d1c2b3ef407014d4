"""k-means of codebooks and latents, in the three forms that the systems need.

    plain_kmeans        clusters of any size: CTF's coarse labels (arXiv 2503.16194)
    balanced_kmeans     clusters of equal size: IAR's rearrangement (arXiv 2501.00880)
    minibatch_kmeans    centres of many latents: the trainer's start of a codebook (`--codebook-init kmeans`), not in the papers

Deviation from IAR's release, which places vectors one after another, each in the nearest cluster with room: here vectors are
assigned to given centres at the least total cost under equal sizes (a transport problem).  So the objective never rises, and
the iteration converges.
"""

import logging
import warnings

import numpy as np
from scipy.cluster.hierarchy import linkage
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

from utils.config import UserError

log = logging.getLogger("kmeans")

SPAN = 2**26           # the largest squared distance as an integer: costs with surcharges and prices fit in int32
PRICE_ROUNDS = 80
MAX_ITERATIONS = 1000  # a backstop: convergence is certain, and 16384 codes take about 100
FAR = np.int64(2**45)


def plain_kmeans(vectors: np.ndarray, clusters: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """Clusters of any size: vectors [K, d] -> labels [K] int64 in [0, clusters), and iterations of the best of three starts.

    With as many clusters as vectors, vector i has label i.  Raises UserError for more clusters than vectors.
    """
    if not 1 <= clusters <= len(vectors):
        raise UserError(f"--clusters {clusters} is not between 1 and {len(vectors)}, the number of codes: change it.")
    if clusters == len(vectors):
        return np.arange(clusters), 0
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # duplicates leave clusters empty
        kmeans = KMeans(clusters, n_init=3, random_state=seed).fit(vectors)
    return kmeans.labels_.astype(np.int64), int(kmeans.n_iter_)


def minibatch_kmeans(vectors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Centres [C, d] of vectors [M, d], from random batches of them."""
    # k-means++ picks vectors far from each other: random ones would often be of the same background patch.
    kmeans = MiniBatchKMeans(clusters, batch_size=4096, n_init=1, max_iter=20, random_state=seed)
    return kmeans.fit(vectors).cluster_centers_


def balanced_kmeans(vectors: np.ndarray, clusters: int, seed: int = 0,
                    max_iterations: int = MAX_ITERATIONS) -> tuple[np.ndarray, int]:
    """Clusters of K / C members each: vectors [K, d] -> labels [K] int64 in [0, C), and the number of iterations.

    Starts at random vectors, as IAR does.  Costs are squared distances with two surcharges, which shake the assignment out
    of poor optima: a fixed one on the vector's present cluster, whose centre is too near because the vector is part of its
    mean, and a random one on every cluster.  Both halve whenever they no longer help; at zero the plain iteration goes on
    until nothing improves.  The objective never rises.  Raises UserError when `clusters` does not divide K.
    """
    vectors, capacity = vectors.astype(np.float64), cluster_size(len(vectors), clusters)
    rng = np.random.default_rng(seed)
    centres = vectors[rng.choice(len(vectors), clusters, replace=False)]           # [C, d]
    span = 4 * np.square(vectors - vectors.mean(0)).sum(1).max()
    scale = SPAN / span if span > 0 else 0.0
    labels, prices = np.zeros(len(vectors), np.int64), np.zeros(clusters, np.int32)
    least, surcharge = np.inf, 1.0
    for iteration in range(1, max_iterations + 1):
        cost = squared_distances(vectors, centres) * scale                         # [K, C]
        if iteration > 1 and surcharge:
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


def cluster_size(codes: int, clusters: int) -> int:
    """Members of each of equal clusters; raises UserError when they would not be equal."""
    if clusters < 1 or codes % clusters:
        raise UserError(f"--clusters {clusters} does not divide the {codes} codes: give a divisor of that number.")
    return codes // clusters


def squared_distances(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances of vectors [K, d] to centres [C, d]: [K, C]."""
    norms = np.square(vectors).sum(1)[:, None] + np.square(centres).sum(1)
    return np.maximum(norms - 2 * vectors @ centres.T, 0)


def objective(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of vectors [K, d] to the mean of their cluster; clusters of any size."""
    vectors = vectors.astype(np.float64)
    sizes = np.bincount(labels)
    sums = np.stack([np.bincount(labels, column) for column in vectors.T], 1)
    return float(np.square(vectors - (sums / np.maximum(sizes, 1)[:, None])[labels]).sum(1).mean())


def cluster_tree(centres: np.ndarray) -> np.ndarray:
    """Groups of neighbouring clusters, each cluster alone among them: centres [C, d] -> members [2 C - 2, C] of 0 and 1."""
    groups = list(np.eye(len(centres)))
    if len(centres) > 1:
        for first, second in linkage(centres, "average")[:-1, :2].astype(int):
            groups.append(groups[first] + groups[second])
    return np.stack(groups)


def search_prices(cost: np.ndarray, prices: np.ndarray, capacity: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prices of clusters at which vectors that choose the least cost + price fill them almost equally.

    cost: [K, C] int32; prices: [C] int32, the start; groups: [G, C] of `cluster_tree`.  Returns the best prices found [C]
    and the choices at them [K].  Subgradient steps on the dual of the transport problem.  Every group has a step size, which
    grows while the group stays too full (or too empty) and halves when that changes.  With prices of single clusters alone
    the search would stall: the price of one cluster moves vectors only to its neighbours, not to a group far away.
    """
    total, side = np.empty_like(cost), np.zeros(len(groups))
    best, least_wrong = (prices, np.zeros(len(cost), np.int64)), np.inf
    steps, moving = np.full(len(groups), cost.min(1).mean() / 50), prices.astype(np.float64)
    for _ in range(PRICE_ROUNDS):
        moving = np.clip(moving - moving.mean(), -4 * SPAN, 4 * SPAN)  # no two prices need differ by more than a cost
        prices = moving.astype(np.int32)
        choices = np.add(cost, prices, out=total).argmin(1)
        excess = np.bincount(choices, minlength=len(prices)) - capacity
        wrong = np.abs(excess).sum()
        if wrong < least_wrong:
            least_wrong, best = wrong, (prices, choices)
        if wrong <= len(cost) // 500:  # `settle` is quicker for the rest
            break
        now = np.sign(groups @ excess)
        steps *= np.select([now * side > 0, now * side < 0], [1.3, 0.5], 1.0)
        side = now
        moving += (steps * side) @ groups
    return best


def cheapest_moves(cost: np.ndarray, labels: np.ndarray, moves: np.ndarray, stale: np.ndarray) -> None:
    """Compute the rows `stale` [C] of moves [C, C] anew: the least rise of cost when one member of a moves to b."""
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
    of the total cost.  Prices fall by the path lengths.  Then every vector stays where its cost + price is least, which
    proves the assignment optimal, and a vector moves only between clusters of equal sums.  Sums are integers, so that
    equality is exact, for duplicates too.  Returns labels [K] and prices [C], the least of them 0.
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
