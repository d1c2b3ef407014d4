"""Classes of WebDataset shards (utils/tar_images.py); their captions: test_captions.py."""

import json
import pickle
from pathlib import Path

import pytest

from autoregressive.train import extract_codes_c2i
from tests.conftest import call, export_models
from tests.test_captions import SHADES, png, write_tar
from tests.test_codes import extract_options
from utils.code_shards import open_codes
from utils.config import UserError
from utils.images import open_images

LABELS = (0, 2, 1, 2)


def write_classes(folder: Path, labels=LABELS, names: str = "cat\ndog\nowl\n") -> Path:
    """Two shards of two samples each with classes, and the classes' names beside them."""
    for shard in range(2):
        files: dict[str, bytes] = {}
        for number in (2 * shard, 2 * shard + 1):
            files |= {f"{number:04d}.cls": str(labels[number]).encode(), f"{number:04d}.png": png(SHADES[number])}
        write_tar(folder / f"{shard:05d}.tar", files)
    if names:
        (folder / "classnames.txt").write_text(names)
    return folder


def write_described(folder: Path, *descriptions: object) -> Path:
    """A shard whose samples have a .json each."""
    files: dict[str, bytes] = {}
    for number, about in enumerate(descriptions):
        files |= {f"{number}.png": png(SHADES[number]), f"{number}.json": json.dumps(about).encode()}
    return write_tar(folder / "a.tar", files).parent


def test_classes_of_shards(tmp_path):
    """ImageNet's shards hold .jpg and .cls: read without the latter, a class-conditional model would learn one class."""
    source = open_images(write_classes(tmp_path / "data"))
    assert source.labels.tolist() == list(LABELS) and source.class_names == ("cat", "dog", "owl") and source.num_classes == 3
    for each in (pickle.loads(pickle.dumps(source)), source.subset(3)):
        rows = [SHADES.index(int(each.load(row)[0, 0, 0])) for row in range(len(each))]
        assert each.labels.tolist() == [LABELS[row] for row in rows]
    other = open_images(write_classes(tmp_path / "other", (0, 1, 2, 2), names=""))
    assert other.class_names == () and other.num_classes == 3 and other.checksum != source.checksum
    assert open_images(tmp_path / "data" / "00000.tar").labels.tolist() == [0, 2]


def test_shards_that_the_webdataset_package_writes_have_classes(tmp_path):
    """The package encodes integers under cls; `jpg` are files as they are."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, label in enumerate(LABELS):
            writer.write({"__key__": f"part/{number}", "png": png(SHADES[number]), "cls": label, "json": {"label": 7}})
    assert open_images(tmp_path / "a.tar").labels.tolist() == list(LABELS)


def test_codes_of_shards_have_their_classes(tmp_path):
    """What the trainer sees: ids and names in the header of the codes."""
    data, tokenizer = write_classes(tmp_path / "data"), export_models(tmp_path / "models")[1]
    call(extract_codes_c2i.main, *extract_options(data, tokenizer, tmp_path / "codes"))
    header, _, labels, _ = open_codes(tmp_path / "codes")
    assert header.class_names == ["cat", "dog", "owl"] and labels.tolist() == list(LABELS)


def test_classes_of_descriptions_are_read_where_they_are_asked_for(tmp_path, caplog):
    """Any .json may have a field of that name: it is pointed at, and read where the path says so; names sort like folders."""
    path = write_described(tmp_path / "numbers", {"label": 1}, {"label": 0, "more": {"name": "x"}})
    assert open_images(path).num_classes == 1
    assert "their .json have label: add ::label=label to the path if it is the class" in caplog.text
    assert open_images(f"{path}::label=label").labels.tolist() == [1, 0]
    source = open_images(f"{write_described(tmp_path / 'names', *({'in': {'class': name}} for name in 'bab'))}::label=in.class")
    assert source.labels.tolist() == [1, 0, 1] and source.class_names == ("a", "b")
    assert open_images(f"{write_classes(tmp_path / 'data')}::label=").num_classes == 1


def test_names_of_classes_may_be_json(tmp_path):
    """Either file is common; names beyond the classes that occur keep their ids."""
    folder = write_classes(tmp_path / "data", names="")
    (folder / "classnames.json").write_text(json.dumps(["a", "b", "c", "d"]))
    source = open_images(folder)
    assert source.class_names == ("a", "b", "c", "d") and source.num_classes == 4


@pytest.mark.parametrize("labels, names, words", [
    ((0, "x", 1, 2), "", r"00000\.tar/0001\.png has the \.cls 'x': give every sample an integer from 0 as its class\."),
    ((0, "", 1, 2), "", r"0001\.png has the \.cls ''"),
    ((0, 1.5, 1, 2), "", r"has the \.cls '1\.5'"),
    ((0, -1, 1, 2), "", r"has the negative label -1 of .*00000\.tar/0001\.png: number the classes from 0\."),
    ((0, 1, 1, 10**30), "", r"has the label 10{30} of .*00001\.tar/0003\.png: number the classes from 0, without gaps"),
    (LABELS, "cat\ndog", r"has the label 2 of .*0001\.png but names 2 classes: give a name for each class"),
    (LABELS, "cat\n\nowl\n", r"classnames\.txt is no list of names"),
])
def test_classes_that_cannot_be_used_are_refused_by_sample(tmp_path, labels, names, words):
    """The same checks as of a folder or an npz, with the sample to mend."""
    with pytest.raises(UserError, match="--data-path .*" + words):
        open_images(write_classes(tmp_path / "data", labels, names))


def test_samples_without_a_class_are_refused(tmp_path):
    """A sample that was given its neighbour's class, or class 0, would train without a word."""
    write_tar(tmp_path / "a.tar", {"0.png": png(1), "0.cls": b"0", "1.png": png(2)})
    with pytest.raises(UserError, match=r"a\.tar/1\.png has no \.cls, where others have one: give every sample an integer"):
        open_images(tmp_path)


@pytest.mark.parametrize("descriptions, words", [
    (({"label": 1}, {"label": None}), r"1\.png has no class in its \.json under 'label'"),
    (({"label": 1}, {"label": "a"}), "has a name as label and others have integers: give one kind"),
    (({"label": "a"}, {"label": 1}), "has the label 1 and others have names: give one kind"),
    (({"label": True}, {"label": 1}), r"0\.png has no class in its \.json"),
    ((5, {"label": 1}), r"0\.png has no class in its \.json")])
def test_descriptions_without_a_class_are_refused(tmp_path, descriptions, words):
    """The field was asked for by name: one sample without it is a mistake in the data."""
    with pytest.raises(UserError, match=words):
        open_images(f"{write_described(tmp_path / 'data', *descriptions)}::label=label")


def test_damaged_names_and_choices_are_refused(tmp_path):
    """One sentence each, before anything else is read."""
    folder = write_classes(tmp_path / "data", names="")
    (folder / "classnames.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="classnames.txt cannot be read"):
        open_images(folder)
    for choice, words in (("train", "names the split 'train', but a folder of tar shards has none"),
                          ("image=png", "names image=png")):
        with pytest.raises(UserError, match=words):
            open_images(f"{folder}::{choice}")
