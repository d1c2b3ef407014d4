"""rFID of a tokenizer in one command: reference, reconstructions and evaluation of a set of images.

    bash scripts/tokenizer/rfid.sh --vq-ckpt runs/vq/dual --data-path imagenet/val --out runs/rfid/dual

does what val.sh, reconstruction_vq.sh and evaluate_c2i.sh do one after the other, and leaves all figures in OUT/rfid.json.  The
same command carries on after an interruption: finished parts are not done again.  Tokenizers that share --reference make it once.
"""

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import torch

from evaluations.c2i.evaluation_file import EvaluationFile
from evaluations.c2i.evaluator import compare, find_pitfalls
from evaluations.c2i.features import FeatureOptions, FeatureSource, open_sources
from tokenizer.tokenizer_image.reconstruction_vq_ddp import ReconstructionOptions, open_autoencoder, reconstruct_all
from tokenizer.validation.val_ddp import ValidationConfig, make_reference
from utils.config import command_line, flatten, parse, run_main, to_dict
from utils.distributed import Processes, broadcast, setup
from utils.files import check_writable, read_json, write_json
from utils.images import open_images
from utils.logs import set_up_logging

log = logging.getLogger("rfid")

NAMES = {"fid": "rfid", "sfid": "rsfid", "fd_dinov2": "rfd_dinov2"}  # of distances between images and their reconstructions


@dataclass
class RfidConfig:
    """Options of rFID."""

    what: ReconstructionOptions
    networks: FeatureOptions
    out: Path
    """Folder of the result, rfid.json, and of reconstruction.npz with its figures and picture."""
    reference: Path | None = None
    """npz of the images, made where it is missing; None: OUT/reference.npz."""


def reconstruct_once(config: RfidConfig, processes: Processes) -> dict[str, Any]:
    """Figures of the reconstructions in OUT/reconstruction.npz, which are made unless an earlier call has made them.

    Returns the figures in the main process, with what they are of.
    """
    source, result = open_images(config.what.images.data_path), config.out / "rfid.json"
    autoencoder = open_autoencoder(config.what, processes.device)
    free = ("num_workers", "batch_size", "device")  # change nothing beyond rounding
    about = {name: value for name, value in flatten(to_dict(config.what)).items() if name not in free}
    about |= {"images_checksum": source.checksum, "tokenizer_fingerprint": autoencoder.fingerprint}
    known: Any = {}
    if processes.is_main and result.exists() and (config.out / "reconstruction.npz").exists():
        known = read_json(result, "--out", "rfid.json")
    same = isinstance(known, dict) and known.get("of") == about
    done = torch.tensor(same, dtype=torch.uint8, device=processes.device)
    if bool(broadcast(done, processes)):
        log.info("%s is there already, made by these options", config.out / "reconstruction.npz")
        return known
    if processes.is_main:
        result.unlink(missing_ok=True)  # of another npz than the one that takes its place
    figures = reconstruct_all(config.what, autoencoder, source, config.out / "reconstruction.npz", processes) | {"of": about}
    if processes.is_main:
        write_json(result, figures)
    return figures


def distances(reference: Path, samples: Path, sources: list[FeatureSource]) -> dict[str, float | None]:
    """rFID and its like by the names of `NAMES`, of reconstructions against the images."""
    files = EvaluationFile(reference, "REF"), EvaluationFile(samples, "SAMPLE")
    for warning in find_pitfalls(*files, "reconstruction", [source.name for source in sources]):
        log.warning(warning)
    found: dict[str, float | None] = {}
    for source in sources:
        found |= compare(*files, source, neighbours=False)
    return {NAMES[name]: value for name, value in found.items() if name in NAMES}


def main() -> None:
    """Parse options, do what is not done, print and write all figures."""
    config = parse(RfidConfig)
    processes = setup(config.what.device)
    set_up_logging(processes)
    check_writable(config.out, "--out")
    # Weights that are missing are told before anything is reconstructed.
    sources = open_sources(config.networks, processes.device) if processes.is_main else []
    images = replace(config.what.images, image_size=config.what.compared_size)
    reference = config.reference or config.out / "reference.npz"
    said = make_reference(ValidationConfig(images, reference), processes, "--reference" if config.reference else "--out")
    log.info(said)
    figures = reconstruct_once(config, processes)
    if processes.is_main:
        kept = {name: value for name, value in figures.items() if name not in NAMES.values()}
        result = distances(reference, config.out / "reconstruction.npz", sources) | kept
        write_json(config.out / "rfid.json", result | {"command": command_line()})
        for name, value in result.items():
            if name != "of":
                print(f"{name:22} {value if isinstance(value, str) else 'n/a' if value is None else f'{value:.4f}'}")
    processes.close()


if __name__ == "__main__":
    run_main(main)
