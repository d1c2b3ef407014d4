"""Publish a GPT, a tokenizer, both together, or extracted codes on the Hugging Face hub, with a card that says what they are.

    python scripts/push_to_hub.py runs/GPT-XXL-256 --vq-ckpt runs/vq/dual --repo me/iar2-xxl --figures evaluation.json
    python scripts/push_to_hub.py runs/vq/dual --repo me/iar2-tokenizer --folder published     # writes the folder alone
    python scripts/push_to_hub.py codes/imagenet256 --repo me/imagenet256-codes

Whatever is published is read and checked first.  `hf auth login` or HF_TOKEN says who you are.
"""

import json
import logging
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

import tyro
from huggingface_hub import CommitOperationAdd, HfApi

from autoregressive.train.options import TrainConfig
from scripts.model_card import Figure, codes_card, model_card, read_figures, run_figures, training_command
from tokenizer.tokenizer_image.vq_options import VQTrainConfig
from utils.checkpoint import export, read_export
from utils.code_shards import open_codes
from utils.config import UserError, defaults_of, parse, run_main
from utils.files import check_exists, check_writable, replacing, write_text
from utils.hub import HubName
from utils.untrusted import shortened

log = logging.getLogger("push_to_hub")

README = "README.md"
SCRIPTS = {"gpt": "bash scripts/autoregressive/train_c2i.sh", "tokenizer": "bash scripts/tokenizer/train_vq.sh"}


@dataclass
class PushConfig:
    """Options of publishing."""

    run: tyro.conf.Positional[Path]
    """Run folder, checkpoint or safetensors file of a GPT or a tokenizer, or a folder of codes."""
    repo: str
    """Name on the hub, owner/name; it is made if it is not there."""
    vq_ckpt: Path | None = None
    """Tokenizer to publish beside the GPT, so that one name serves both."""
    fine_ckpt: Path | None = None
    """CTF's second stage, to publish beside the first."""
    figures: tuple[Path, ...] = ()
    """JSON files of evaluator.py, reconstruction_vq_ddp.py or evaluate_c2i.py, for the card."""
    picture: Path | None = None
    """PNG of samples, for the card."""
    licence: Annotated[str, tyro.conf.arg(aliases=("--license",))] = "mit"
    """Licence of the weights or codes, as the hub calls it."""
    folder: Path | None = None
    """Only write the folder, and push nothing."""
    private: bool = False
    """Make a repository that only you can read."""


@dataclass
class Publication:
    """What a repository will hold: its kind, and every file as a source or as text."""

    kind: str
    sources: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    models: dict[str, tuple[str, dict[str, Any], Any]] = field(default_factory=dict)  # kind of export, description, tensors

    def write(self, folder: Path) -> None:
        """Write all files; the card comes last."""
        for name, (kind, description, tensors) in self.models.items():
            export(folder / name, kind, tensors, description)
        for name, source in self.sources.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with replacing(folder / name) as aside:
                shutil.copyfile(source, aside)
        for name, text in sorted(self.texts.items(), key=lambda item: item[0] == README):
            write_text(folder / name, text)


def find_kind(run: Path) -> str:
    """gpt, tokenizer or codes; raises UserError for a folder that is none of them, or no file of a model."""
    check_exists(run, "RUN", "a run folder, a safetensors file or a folder of codes")
    if (run / "header.json").is_file():
        return "codes"
    for kind in ("gpt", "tokenizer"):
        with suppress(UserError):
            read_export(run, kind, "RUN", tensors=False)
            return kind
    raise UserError(f"RUN {run} holds no GPT, no tokenizer and no codes: give what a training or an extraction wrote.")


def publish_models(config: PushConfig, kind: str) -> Publication:
    """GPT and tokenizer, with their card."""
    publication, described = Publication("model"), dict[str, dict[str, Any]]()
    wanted = [(kind, config.run, "RUN", "")]
    if kind == "gpt":
        beside = config.run if (config.run / "tokenizer.safetensors").is_file() else None
        vq_ckpt = config.vq_ckpt or beside
        wanted += [("tokenizer", vq_ckpt, "--vq-ckpt", "")] if vq_ckpt else []
        wanted += [("gpt", config.fine_ckpt, "--fine-ckpt", "fine/")] if config.fine_ckpt else []
    elif config.vq_ckpt or config.fine_ckpt:
        raise UserError(f"RUN {config.run} is a tokenizer: give --vq-ckpt and --fine-ckpt with a GPT alone.")
    for each, path, option, folder in wanted:
        description, tensors = read_export(path, each, option)
        described.setdefault(each, description)
        publication.models[f"{folder}{each}.safetensors"] = each, description, tensors
    gpt, tokenizer = described.get("gpt", {}), described.get("tokenizer", {})
    if gpt and tokenizer and gpt.get("tokenizer") not in ("", tokenizer.get("fingerprint")) and not config.fine_ckpt:
        raise UserError(f"--vq-ckpt {config.vq_ckpt} is another tokenizer than the one of RUN {config.run}: give that one.")
    figures: list[Figure] = run_figures(config.run, tokenizer)
    for path in config.figures:
        figures += read_figures(path)
    defaults = {"gpt": TrainConfig, "tokenizer": VQTrainConfig}
    commands = [training_command(Path(path), SCRIPTS[each], defaults_of(defaults[each])) for each, path, _, _ in wanted]
    if config.picture is not None:
        publication.sources["samples.png"] = check_exists(config.picture, "--picture", "a PNG of samples")
    publication.texts["config.json"] = json.dumps(described, indent=1) + "\n"
    publication.texts[README] = model_card(config.repo, config.licence, gpt, tokenizer, figures, commands,
                                           "samples.png" if config.picture else "")
    return publication


def publish_codes(config: PushConfig) -> Publication:
    """A folder of codes, and of features of captions where it has them, with its card."""
    if config.vq_ckpt or config.fine_ckpt or config.figures or config.picture:
        raise UserError(f"RUN {config.run} holds codes: --vq-ckpt, --fine-ckpt, --figures and --picture are for models.")
    header = open_codes(config.run, "RUN").header
    files = [path for path in sorted(config.run.rglob("*")) if path.is_file() and path.suffix in (".npy", ".json")]
    publication = Publication("dataset", {str(path.relative_to(config.run)): path for path in files})
    publication.texts[README] = codes_card(config.repo, config.licence, header)
    return publication


def push(publication: Publication, folder: Path, config: PushConfig) -> str:
    """Push a folder that holds all models and texts; the sources go as they are.  Returns the address of the page."""
    api = HfApi()
    written = [*publication.models, *publication.texts]
    operations = [CommitOperationAdd(name, str(folder / name)) for name in written]
    operations += [CommitOperationAdd(name, str(source)) for name, source in publication.sources.items()]
    try:
        url = api.create_repo(config.repo, repo_type=publication.kind, private=config.private, exist_ok=True)
        api.create_commit(config.repo, operations, commit_message=f"Publish {config.run.name}", repo_type=publication.kind)
    except Exception as error:  # of the network or of the hub: the library raises those of several others
        reason = shortened(str(error).split("\n\n")[-1])
        raise UserError(f"--repo {config.repo} cannot be pushed to ({reason}): log in with `hf auth login` as someone who may "
                        "write there, or write the folder alone with --folder.") from error
    return str(url)


def main() -> None:
    """Parse options, check what is published, write it and push it."""
    config = parse(PushConfig)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    name = None
    with suppress(UserError):  # whose sentence asks for hf: before the name
        name = HubName.of(f"hf:{config.repo}", "--repo")
    if name is None or name.repository != config.repo:
        raise UserError(f"--repo {config.repo} is no name of a repository: give owner/name.")
    kind = find_kind(config.run)
    publication = publish_codes(config) if kind == "codes" else publish_models(config, kind)
    if config.folder is not None:
        check_writable(config.folder, "--folder")
        publication.write(config.folder)
        print(f"wrote {config.folder}: {', '.join(sorted([*publication.models, *publication.texts, *publication.sources]))}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        Publication(publication.kind, {}, publication.texts, publication.models).write(Path(temporary))
        print(f"published at {push(publication, Path(temporary), config)}")


if __name__ == "__main__":
    run_main(main)
