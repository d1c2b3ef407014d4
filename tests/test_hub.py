"""Names on the hub in the place of paths, over a hub on this machine: downloads, the cache without a connection, publishing."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoregressive.sample.pipeline import Pipeline
from autoregressive.train import train_c2i
from scripts import push_to_hub
from tests.conftest import REPOSITORY, call, command, export_models
from tests.fake_hub import serve
from tests.test_bad_input import refused
from tests.test_codes import write_codes
from tests.test_released_weights import MODEL_ARGS, llamagen_gpt_arrays
from utils.checkpoint import export, read_export
from utils.config import UserError, command_line
from utils.hub import HubName, inside, is_hub_name

GUIDED = {"guidance": "constant", "cfg_scale": [2.0]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with a model `me/iar2` of a GPT and a tokenizer, and the environment of programs that use it."""
    folder = tmp_path_factory.mktemp("hub")
    gpt, _ = export_models(folder / "models" / "me" / "iar2")
    description, tensors = read_export(gpt, "gpt", "--gpt-ckpt")
    export(gpt, "gpt", tensors, description | {"sampling": GUIDED, "class_names": ["cat", "dog", "owl"]})
    with serve(folder) as address:
        yield folder, {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "",
                       "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}


def sample(environment: dict[str, Any], out: Path, name: str = "hf:me/iar2", check: bool = True):
    """Two samples by the hub's name alone."""
    return command("autoregressive/sample/sample_c2i_ddp.py", "--gpt-ckpt", name, "--vq-ckpt", name, "--num-samples", 2,
                   "--device", "cpu", "--out", out, check=check, **environment)


def test_names_are_paths_without_a_connection_too(hub, tmp_path):
    """A name serves every command; once downloaded, the cache does without the hub, and gives the same images."""
    folder, environment = hub
    sample(environment, tmp_path / "online.npz")
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    sample(offline, tmp_path / "offline.npz", "hf:me/iar2@main")
    local = Pipeline.from_pretrained(folder / "models" / "me" / "iar2", device="cpu")
    expected = np.stack(local(["cat", "dog"], progress=False))
    for name in ("online", "offline"):
        with np.load(tmp_path / f"{name}.npz") as data:
            assert np.array_equal(data["arr_0"], expected)
    assert list((folder / "home").rglob("gpt.safetensors"))
    told = sample(offline, tmp_path / "other.npz", "hf:me/other", check=False)
    assert told.returncode == 2 and "not in the hub's cache and cannot be downloaded (HF_HUB_OFFLINE is set)" in told.stderr
    assert told.stderr.count("\n") == 1


def test_published_weights_are_imported_by_their_name(hub, tmp_path):
    """LlamaGen's files lie on the hub: the importer takes a file by its name there."""
    folder, environment = hub
    (folder / "models" / "them" / "LlamaGen").mkdir(parents=True)
    torch.save({"model": llamagen_gpt_arrays()}, folder / "models" / "them" / "LlamaGen" / "c2i.pt")
    words = ["scripts/released_weights.py", "llamagen-gpt", "hf:them/LlamaGen/c2i.pt", tmp_path / "ours", *MODEL_ARGS]
    command(*words, **environment)
    assert read_export(tmp_path / "ours", "gpt", "--gpt-ckpt")[0]["imported"]["file"] == "c2i.pt"
    words[2] = "hf:them/LlamaGen"
    told = command(*words, check=False, **environment)
    assert told.returncode == 2 and "SRC hf:them/LlamaGen names no file: give hf:owner/name/FILE" in told.stderr


TRY_ALL = """
import sys
sys.path.insert(0, {root!r})
from utils.config import UserError, command_line
from utils.hub import local_file, local_path
for name in sys.argv[1:]:
    try:
        print(local_path(name, "--code-path") if "datasets" in name else local_file(name, "--gpt-ckpt", "gpt.safetensors"))
    except UserError as error:
        print("error:", error)
"""


def test_what_the_hub_refuses_is_one_sentence(hub, tmp_path):
    """Not there, private, with conditions, another revision or file: each says what to do."""
    _, environment = hub
    names = {"hf:me/none": "is not on the hub, or private", "hf:secret/model": "is not on the hub, or private",
             "hf:gated/model": "is only for those who accepted its conditions", "hf:me/iar2@v9": "has no revision v9",
             "hf:me/iar2/epoch50": "has no file epoch50/gpt.safetensors", "hf:datasets/me/none": "is not on the hub, or private",
             "hf:me/iar2@v1": "gpt.safetensors", "hf:me/iar2/gpt.safetensors": "gpt.safetensors"}
    script = tmp_path / "try_all.py"
    script.write_text(TRY_ALL.format(root=str(REPOSITORY)))
    lines = command(script, *names, **environment).stdout.splitlines()
    assert len(lines) == len(names)
    for words, line in zip(names.values(), lines):
        assert words in line, line
        assert line.startswith("error:") == (words != "gpt.safetensors"), line
    nowhere = command(script, "hf:me/new", **environment | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "hf:me/new is not in the hub's cache and cannot be downloaded (the hub cannot be reached)" in nowhere.stdout
    assert not nowhere.stderr


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:a//b", "hf:a/b@", "hf:../b", "hf:a/b/../c", "hf:datasets/a", "hf:a/b c",
                                  "hf:-a/b", "hf:a/b."])
def test_malformed_names_are_refused_before_anything_is_asked(name):
    """A name may not lead out of the cache, and a slip of the finger is told as such."""
    with pytest.raises(UserError, match=r"is no name on the hub: give hf:owner/name\[/folder\]\[@revision\]"):
        HubName.of(name, "--gpt-ckpt")


def test_names_are_taken_apart():
    """Revision, folder and kind; a folder inside keeps the revision."""
    assert HubName.of("hf:a/b", "") == HubName("hf:a/b", "a/b")
    assert HubName.of("hf:datasets/a/b/c/d@v1", "") == HubName("hf:datasets/a/b/c/d@v1", "a/b", "c/d", "v1", "dataset")
    assert inside("hf:a/b@v1", "fine") == "hf:a/b/fine@v1" and inside("runs/a", "fine") == "runs/a/fine"
    assert is_hub_name(Path("hf:a/b")) and not is_hub_name("hf/a")


def test_published_models_are_loaded_by_their_name(hub, tmp_path):
    """The whole way round: a run is published with its card, and sampled from by the name."""
    folder, environment = hub
    run = folder / "models" / "me" / "iar2"
    found = {"fid": 2.5, "command": "bash evaluate.sh REF SAMPLE", "counts": {"sample": 5}}
    (tmp_path / "fid.json").write_text(json.dumps(found))
    words = [run, "--repo", "me/published", "--figures", tmp_path / "fid.json", "--licence", "apache-2.0"]
    done = command("scripts/push_to_hub.py", *words, **environment | {"HF_TOKEN": "right"})
    assert "published at http" in done.stdout
    published = folder / "models" / "me" / "published"
    assert sorted(path.name for path in published.iterdir()) == ["README.md", "config.json", "gpt.safetensors",
                                                                 "tokenizer.safetensors"]
    card = (published / "README.md").read_text()
    assert "license: apache-2.0" in card and 'from_pretrained("hf:me/published")' in card and '["cat"] * 4' in card
    assert "| FID | 2.5 | `bash evaluate.sh REF SAMPLE` |" in card and "hierarchical prediction, 4x4 cells, 3 classes" in card
    assert json.loads((published / "config.json").read_text())["gpt"]["class_names"] == ["cat", "dog", "owl"]
    sample(environment, tmp_path / "published.npz", "hf:me/published")
    refusal = command("scripts/push_to_hub.py", *words, check=False, **environment | {"HF_TOKEN": "wrong"})
    assert refusal.returncode == 2 and "--repo me/published cannot be pushed to" in refusal.stderr
    assert refusal.stderr.count("\n") == 1


def test_published_codes_are_trained_on_by_their_name(hub, tmp_path):
    """Codes are a data set of the hub: header, labels and codes as they are, and a card that says how to use them."""
    folder, environment = hub
    codes = write_codes(tmp_path / "codes")
    command("scripts/push_to_hub.py", codes, "--repo", "me/codes", **environment | {"HF_TOKEN": "right"})
    published = folder / "datasets" / "me" / "codes"
    assert {path.name for path in codes.iterdir() if path.suffix} < {path.name for path in published.iterdir()}
    assert "--code-path hf:datasets/me/codes" in (published / "README.md").read_text()
    done = command("autoregressive/train/train_c2i.py", "--code-path", "hf:datasets/me/codes", "--gpt-model", "GPT-tiny",
                   "--image-size", 32, "--downsample-size", 8, "--num-classes", 3, "--steps", 1, "--global-batch-size", 4,
                   "--data-parallel", "none", "--num-workers", 0, "--device", "cpu", "--run-dir", tmp_path / "run", **environment)
    assert done.returncode == 0 and (tmp_path / "run" / "gpt.safetensors").is_file()
    command("autoregressive/train/evaluate_c2i.py", "--gpt-ckpt", tmp_path / "run", "--code-path", "hf:datasets/me/codes",
            "--device", "cpu", "--out", tmp_path / "bits.json", **environment)
    bits = json.loads((tmp_path / "bits.json").read_text())
    assert bits["images"] == 48 and "--code-path hf:datasets/me/codes" in bits["command"]


def test_images_of_a_data_set_are_read_by_its_name(hub, tmp_path):
    """A data set of the hub stands where a folder of images may, with the choice of a split or a file in it."""
    folder, environment = hub
    made = folder / "datasets" / "me" / "images"
    made.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    np.savez(made / "train.npz", images=images, labels=np.arange(6) % 3)
    command("tokenizer/validation/val_ddp.py", "--data-path", "hf:datasets/me/images/train.npz", "--image-size", 32,
            "--num-workers", 0, "--out", tmp_path / "reference.npz", **environment)
    with np.load(tmp_path / "reference.npz") as data:
        assert np.array_equal(data["arr_0"], images)
    told = command("tokenizer/validation/val_ddp.py", "--data-path", "hf:datasets/me/images/test.npz", "--image-size", 32,
                   "--num-workers", 0, "--out", tmp_path / "other.npz", check=False, **environment)
    assert told.returncode == 2 and "is there, but no test.npz in it" in told.stderr


def test_a_folder_is_written_without_the_hub(tmp_path):
    """What would be pushed can be looked at first; the training's command is in the card."""
    codes = write_codes(tmp_path / "codes")
    call(train_c2i.main, "--code-path", codes, "--gpt-model", "GPT-tiny", "--image-size", 32, "--downsample-size", 8,
         "--num-classes", 3, "--steps", 1, "--global-batch-size", 4, "--data-parallel", "none", "--num-workers", 0, "--device",
         "cpu", "--val-code-path", codes, "--run-dir", tmp_path / "run")
    call(push_to_hub.main, tmp_path / "run", "--repo", "me/model", "--folder", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nbash scripts/autoregressive/train_c2i.sh --code-path" in card and "--log-every" not in card
    assert "--gpt-model GPT-tiny" in card and "--steps 1" in card
    assert "held-out bits per image" in card and "`train_c2i.py`, step 1" in card
    assert read_export(tmp_path / "out", "gpt", "x")[0]["step"] == 1


def test_figures_say_the_command_that_measured_them(monkeypatch):
    """A number without its command cannot be measured again; the command names no folder of this machine's repository."""
    monkeypatch.setattr(sys, "argv", [str(REPOSITORY / "scripts" / "rfid.py"), "--out", "a b"])
    assert command_line() == "python scripts/rfid.py --out 'a b'" and command_line(["REF"]) == "python scripts/rfid.py REF"


@pytest.mark.parametrize("words, sentence", [
    (("none", "--repo", "me/a"), "RUN 'none' does not exist"),
    ((".", "--repo", "me/a"), "holds no GPT, no tokenizer and no codes"),
    (("models", "--repo", "me"), "--repo me is no name of a repository: give owner/name"),
    (("models", "--repo", "me/a/b"), "--repo me/a/b is no name of a repository"),
    (("models", "--repo", "me/a", "--figures", "text.json"), "--figures text.json is no JSON"),
    (("models", "--repo", "me/a", "--figures", "empty.json"), "--figures empty.json holds no figures"),
    (("models/tokenizer.safetensors", "--repo", "me/a", "--vq-ckpt", "models"), "is a tokenizer: give --vq-ckpt"),
    (("codes", "--repo", "me/a", "--picture", "x.png"), "holds codes: --vq-ckpt"),
    (("models", "--repo", "me/a", "--picture", "x.png"), "--picture 'x.png' does not exist")])
def test_mistakes_of_publishing_are_one_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    """Nothing is written or pushed before all of it was read."""
    monkeypatch.chdir(tmp_path)
    export_models(tmp_path / "models")
    write_codes(tmp_path / "codes")
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "empty.json").write_text('{"counts": {}}')
    assert sentence in refused(capsys, push_to_hub.main, *words, "--folder", tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()
