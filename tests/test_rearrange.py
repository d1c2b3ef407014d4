"""Rearranging a codebook: equal clusters, chains of neighbours, coarse labels, and the files that carry them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import TINY_VQ, call
from tokenizer.tokenizer_image import kmeans, rearrange
from tokenizer.tokenizer_image.kmeans import balanced_kmeans, objective, plain_kmeans
from tokenizer.tokenizer_image.rearrange import neighbour_order
from tokenizer.tokenizer_image.vq_model import VQModel, load_tokenizer
from utils.checkpoint import export, fingerprint, read_export
from utils.code_map import load_code_map
from utils.config import UserError

SINGLE_VQ = replace(TINY_VQ, quantizer="single", codebook_sizes=(16,))


def codebook(kind: str, codes: int = 512, seed: int = 0) -> np.ndarray:
    """Normalised vectors [codes, 8] float32: spread evenly, in tight groups, each eight times, or on one side."""
    rng = np.random.default_rng([seed, codes])
    vectors = rng.standard_normal((codes, 8))
    if kind == "grouped":
        vectors = 3 * rng.standard_normal((11, 8))[rng.integers(0, 11, codes)] + vectors / 2
    if kind == "repeated":
        vectors = vectors[rng.integers(0, codes // 8, codes)]
    if kind == "onesided":
        vectors = vectors * np.exp(rng.standard_normal(8)) + 1
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def greedy_kmeans(vectors: np.ndarray, clusters: int, seed: int, iterations: int = 60) -> float:
    """The greedy rule, vector by vector; the least objective among all its iterations."""
    points, room = vectors.astype(np.float64), len(vectors) // clusters
    centres = points[np.random.default_rng(seed).choice(len(points), clusters, replace=False)]
    least, before = np.inf, None
    for _ in range(iterations):
        distance = np.square(points[:, None] - centres).sum(2)
        labels, left = np.empty(len(points), int), np.full(clusters, room)
        for index in distance.min(1).argsort(kind="stable"):
            labels[index] = np.where(left > 0, distance[index], np.inf).argmin()
            left[labels[index]] -= 1
        least = min(least, objective(points, labels))
        if before is not None and np.array_equal(labels, before):
            break
        before, centres = labels, np.stack([points[labels == index].mean(0) for index in range(clusters)])
    return least


def export_single(folder: Path, config=SINGLE_VQ) -> Path:
    """A tiny tokenizer, exported as training does."""
    torch.manual_seed(0)
    tensors = VQModel(config).state_dict()
    export(folder / "tokenizer.safetensors", "tokenizer", tensors,
           {"model": asdict(config), "stage": config.quantizer, "fingerprint": fingerprint(tensors)})
    return folder / "tokenizer.safetensors"


def run(vq_ckpt: Path, out: Path, *options) -> Path:
    """Run the command; returns its folder."""
    call(rearrange.main, "--vq-ckpt", vq_ckpt, "--out", out, *options)
    return out


def refused(capsys, *arguments) -> str:
    """The sentence with which the command refuses."""
    with pytest.raises(SystemExit) as stopped:
        call(rearrange.main, *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].endswith(".")
    return lines[0]


@pytest.mark.parametrize("kind", ["even", "grouped", "repeated", "onesided"])
def test_balanced_clusters_are_equal_and_no_worse_than_greedy(kind):
    """IAR's ranges of codes need equal clusters; a looser clustering than the release's would be a worse method."""
    for codes, clusters, seed in ((512, 16, 3), (512, 16, 5), (256, 32, 5)):
        vectors = codebook(kind, codes, seed)
        labels, _ = balanced_kmeans(vectors, clusters, seed)
        assert labels.dtype == np.int64
        assert np.bincount(labels, minlength=clusters).tolist() == [codes // clusters] * clusters
        assert objective(vectors, labels) <= greedy_kmeans(vectors, clusters, seed)


def test_balanced_assignment_is_the_cheapest():
    """Prices, moves and ties are easy to get almost right: scipy's exact assignment knows the least cost."""
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(0)
    for spread in (10**6, 5):  # 5: nearly all costs are ties
        for _ in range(5):
            cost = rng.integers(0, spread, (96, 8)).astype(np.int32)
            prices, choices = kmeans.search_prices(cost, np.zeros(8, np.int32), 12, np.eye(8))
            labels, prices = kmeans.settle(cost, prices, choices, 12)
            slots = np.repeat(cost, 12, axis=1)
            assert np.bincount(labels, minlength=8).tolist() == [12] * 8
            assert cost[np.arange(96), labels].sum() == slots[linear_sum_assignment(slots)].sum()
            assert np.array_equal((cost + prices)[np.arange(96), labels], (cost + prices).min(1))


def test_balanced_objective_never_rises_and_converges(caplog):
    """Otherwise the result would depend on where the iterations were cut off."""
    vectors = codebook("even", 256)
    reached = [objective(vectors, balanced_kmeans(vectors, 8, 0, stop)[0]) for stop in (1, 2, 3, 5, 8, 13)]
    assert all(later <= earlier for earlier, later in zip(reached, reached[1:]))
    assert "before it had converged" in caplog.text
    caplog.clear()
    labels, iterations = balanced_kmeans(vectors, 8)
    assert iterations < 200 and not caplog.text and objective(vectors, labels) <= reached[-1]
    assert np.array_equal(labels, balanced_kmeans(vectors, 8, 0, iterations + 100)[0])


def test_balanced_clusters_repeat_and_need_a_divisor():
    """A code map must be reproducible from its seed, and unequal clusters are no ranges."""
    vectors = codebook("even", 128)
    assert np.array_equal(balanced_kmeans(vectors, 8, 3)[0], balanced_kmeans(vectors, 8, 3)[0])
    assert not np.array_equal(balanced_kmeans(vectors, 8, 3)[0], balanced_kmeans(vectors, 8, 4)[0])
    for clusters in (0, 7, 256):
        with pytest.raises(UserError, match=f"--clusters {clusters} .* 128"):
            balanced_kmeans(vectors, clusters)


@pytest.mark.parametrize("clusters", [1, 4, 64])
def test_equal_vectors_still_give_equal_clusters_and_a_permutation(clusters):
    """A collapsed codebook holds many copies of one code; every copy needs a place of its own."""
    for vectors in (np.ones((64, 8), np.float32), np.zeros((64, 8), np.float32), codebook("repeated", 64)):
        labels, _ = balanced_kmeans(vectors, clusters)
        assert np.bincount(labels).tolist() == [64 // clusters] * clusters
        assert np.array_equal(np.sort(neighbour_order(vectors, labels)), np.arange(64))


@pytest.mark.parametrize("codes", [48, 52])
def test_order_is_a_chain_grown_both_ways(codes):
    """Nearby indices must be nearby vectors: the cluster is the range, the chain is the order inside it."""
    vectors = codebook("even", codes)
    labels, _ = balanced_kmeans(vectors, 4)
    order = neighbour_order(vectors, labels)
    assert np.array_equal(labels[order], np.repeat(np.arange(4), codes // 4))
    for chain in vectors.astype(np.float64)[order].reshape(4, codes // 4, 8):
        ends = [len(chain) // 2, len(chain) // 2]
        assert np.square(chain - chain.mean(0)).sum(1).argmin() == ends[0]
        for step in range(len(chain) - 1):
            side, free = step % 2, np.r_[0 : ends[0], ends[1] + 1 : len(chain)]
            distance = np.square(chain - chain[ends[side]]).sum(1)
            ends[side] += 1 if side else -1
            assert distance[ends[side]] == distance[free].min()


def test_coarse_labels_are_in_range_even_where_kmeans_degenerates():
    """CTF's coarse head has one class a label; as many clusters as codes must be the plain model again."""
    vectors = codebook("even", 64)
    assert np.array_equal(plain_kmeans(vectors, 64)[0], np.arange(64))
    labels, _ = plain_kmeans(vectors, 8, seed=1)
    assert labels.dtype == np.int64 and set(labels) == set(range(8))
    assert np.array_equal(labels, plain_kmeans(vectors, 8, seed=1)[0])
    for copies in (np.ones((64, 8), np.float32), codebook("repeated", 64)):
        labels, _ = plain_kmeans(copies, 32)
        assert labels.min() >= 0 and labels.max() < 32
    with pytest.raises(UserError, match="--clusters 65"):
        plain_kmeans(vectors, 65)


def test_balanced_files_decode_to_the_same_images(tmp_path):
    """The rearrangement renames codes and must change nothing else, to the last bit."""
    old_file = export_single(tmp_path / "run")
    out = run(tmp_path / "run", tmp_path / "out", "--method", "balanced", "--clusters", 4)
    old, new, code_map = load_tokenizer(old_file), load_tokenizer(out), load_code_map(out / "code_map.safetensors")
    assert code_map.table.shape == (16, 1) and code_map.codebook_sizes == (16,)
    assert (code_map.source, code_map.target) == (old.provenance.fingerprint, new.provenance.fingerprint)
    assert new.provenance.fingerprint == fingerprint(new.state_dict()) != old.provenance.fingerprint
    assert new.provenance == replace(old.provenance, fingerprint=new.provenance.fingerprint, cluster_size=4)

    codes = np.random.default_rng(0).permutation(np.arange(64) % 16).reshape(4, 1, 16)  # [B, 1, N], every code
    mapped = code_map.apply(codes)
    assert mapped.shape == codes.shape and not np.array_equal(mapped, codes)
    grids = [torch.from_numpy(array).view(4, 1, 4, 4) for array in (codes, mapped)]
    assert torch.equal(old.decode_codes(grids[0]), new.decode_codes(grids[1]))
    assert torch.equal(old.quantizer.table(0), new.quantizer.table(0)[code_map.table[:, 0]])

    figures = json.loads((out / "clusters.json").read_text())
    assert (figures["size_min"], figures["size_max"]) == (4, 4) and figures["iterations"] > 0
    labels = code_map.table[:, 0] // 4
    assert figures["objective"] == pytest.approx(objective(old.quantizer.table(0).numpy(), labels))
    assert (out / "clusters.png").stat().st_size > 1000


def test_large_table_normalises_alike_in_any_order():
    """Bit for bit holds for 16 codes easily; vectorised norms of a full codebook must not depend on the row's place."""
    torch.manual_seed(0)
    rows, order = torch.randn(16384, 8), torch.randperm(16384)
    quantizer = VQModel(SINGLE_VQ).quantizer
    quantizer.codebooks[0].data = rows
    before = quantizer.table(0)
    quantizer.codebooks[0].data = rows[order]
    assert torch.equal(before[order], quantizer.table(0))


def test_coarse_files_pair_every_code_with_its_label(tmp_path):
    """The fine stage's pairs must hold the coarse stage's labels, and its codes are still the old tokenizer's."""
    source = load_tokenizer(export_single(tmp_path / "run")).provenance.fingerprint
    out = run(tmp_path / "run", tmp_path / "out", "--method", "coarse", "--clusters", 5)
    coarse, fine = (load_code_map(out / f"{name}_map.safetensors") for name in ("coarse", "fine"))
    assert coarse.table.shape == (16, 1) and coarse.codebook_sizes == (5,)
    assert coarse.source == source and coarse.target.startswith("coarse-")
    assert np.array_equal(fine.table, np.column_stack([coarse.table[:, 0], np.arange(16)]))
    assert (fine.codebook_sizes, fine.source, fine.target, fine.coarse) == ((5, 16), source, source, coarse.target)
    pairs = fine.apply(np.arange(16).reshape(2, 1, 8))
    assert pairs.shape == (2, 2, 8) and np.array_equal(pairs[:, 1], np.arange(16).reshape(2, 8))
    assert np.array_equal(pairs[:, :1], coarse.apply(np.arange(16).reshape(2, 1, 8)))
    assert not (out / "tokenizer.safetensors").exists()
    figures = json.loads((out / "clusters.json").read_text())
    assert figures["size_max"] == np.bincount(coarse.table[:, 0]).max() and figures["clusters"] == 5


def test_released_mapping_is_used_as_it_stands(tmp_path):
    """Published IAR models were trained on the released order: ours in its place would scramble their codes."""
    file, mapping = export_single(tmp_path / "run"), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    torch.save(mapping, tmp_path / "mapping.pt")
    out = run(file, tmp_path / "out", "--clusters", 2, "--mapping", tmp_path / "mapping.pt")
    assert np.array_equal(load_code_map(out / "code_map.safetensors").table[:, 0], mapping.numpy())
    _, old = read_export(file, "tokenizer", "--vq-ckpt")
    config, new = read_export(out, "tokenizer", "--vq-ckpt")
    assert torch.equal(new[rearrange.CODEBOOK][mapping], old[rearrange.CODEBOOK]) and config["cluster_size"] == 8
    assert json.loads((out / "clusters.json").read_text())["iterations"] is None


def test_released_mapping_is_refused_when_it_is_none(tmp_path):
    """A file that is no permutation would map two codes to one, silently."""
    path = tmp_path / "mapping.pt"
    with pytest.raises(UserError, match="--mapping .* does not exist"):
        rearrange.read_released_mapping(path)
    wrong = [torch.tensor([0, 1, 1, 3]), torch.tensor([1, 2, 3, 4]), torch.arange(4).float(), torch.eye(2).long(),
             torch.tensor([True, False]), {"mapping": torch.arange(4)}, Path("object")]
    for value in wrong:
        torch.save(value, path)
        with pytest.raises(UserError, match="--mapping"):
            rearrange.read_released_mapping(path)
    for content in (b"", b"no tensor at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            rearrange.read_released_mapping(path)


def test_command_refuses_what_it_cannot_rearrange(capsys, tmp_path):
    """Two codebooks, clusters that do not divide, a foreign mapping, or its own input as the target."""
    file, dual, out = export_single(tmp_path / "run"), export_single(tmp_path / "dual", TINY_VQ), tmp_path / "out"
    torch.save(torch.arange(8), tmp_path / "mapping.pt")
    assert "2 codebooks" in refused(capsys, "--vq-ckpt", dual, "--out", out)
    assert "--clusters 128" in refused(capsys, "--vq-ckpt", file, "--out", out)
    assert "--clusters 512" in refused(capsys, "--vq-ckpt", file, "--out", out, "--method", "coarse")
    assert "of 8 codes" in refused(capsys, "--vq-ckpt", file, "--out", out, "--mapping", tmp_path / "mapping.pt")
    assert "--method is coarse" in refused(capsys, "--vq-ckpt", file, "--out", out, "--method", "coarse",
                                           "--mapping", tmp_path / "mapping.pt")
    assert "overwritten" in refused(capsys, "--vq-ckpt", tmp_path / "run", "--out", tmp_path / "run")
