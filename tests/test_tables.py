"""Images in tables: parquet, hub folders, what `datasets` saves (utils: data_path, table_files, table_columns, table_images)."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from autoregressive.train import extract_codes_c2i
from tests.conftest import call, command, export_models
from tests.test_captions import SHADES, WORDS, png
from tests.test_codes import extract_options, refused
from utils.code_shards import open_codes
from utils.config import UserError
from utils.data_path import parse_data_path
from utils.image_source import UnreadableImage
from utils.images import open_images
from utils.table_columns import LABELS as LABEL_NAMES
from utils.table_files import split_of

datasets = pytest.importorskip("datasets")
NAMES = ["cat", "dog", "owl"]
LABELS = [0, 2, 1, 2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Arrow copies of parquet files go into the test's own folder, here and in processes that it starts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def images() -> list[dict]:
    """Four images as `datasets` stores them."""
    return [{"bytes": png(shade), "path": f"{shade}.png"} for shade in SHADES]


def table(types: dict | None = None, **columns):
    """A `datasets.Dataset`: images, class labels and captions, or these columns; types: of those that are no plain values."""
    columns = columns or {"image": images(), "label": LABELS, "text": list(WORDS)}
    known = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)} if types is None else types
    found = datasets.Dataset.from_dict(columns)
    for name in set(known) & set(columns):
        found = found.cast_column(name, known[name])
    return found


def write_file(folder: Path, rows=None) -> Path:
    """One parquet file."""
    folder.mkdir(parents=True)
    (table() if rows is None else rows).to_parquet(folder / "x.parquet")
    return folder / "x.parquet"


def write_snapshot(folder: Path, splits: tuple[str, ...] = ("train",), below: str = "data") -> Path:
    """A hub data set as it lies in the cache: a card, a picture for it, and links to two parquet files for each split."""
    (folder / below).mkdir(parents=True)
    blobs = folder.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Shades\n")
    (folder / "assets").mkdir()
    (folder / "assets" / "card.png").write_bytes(png(1))
    for split in splits:
        for number in range(2):
            blob = blobs / f"{folder.name}{split}{number}"
            table().shard(2, number, contiguous=True).to_parquet(blob)
            (folder / below / f"{split}-{number:05d}-of-00002.parquet").symlink_to(blob)
    return folder


def write_saved(folder: Path) -> Path:
    """What save_to_disk writes, of two Arrow files."""
    table().save_to_disk(folder, num_shards=2)
    return folder


def write_arrow(folder: Path) -> Path:
    """A single Arrow file."""
    table().save_to_disk(folder)
    return next(folder.glob("*.arrow"))


KINDS = {"file": write_file, "snapshot": write_snapshot, "saved": write_saved, "arrow": write_arrow}


def shades(source) -> list[int]:
    """What tells the images of a source apart."""
    return [int(source.load(row)[0, 0, 0]) for row in range(len(source))]


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_images_come_with_their_classes_and_captions(tmp_path, kind):
    """A label beside the wrong image trains without a word; `subset` and workers must keep the pairs too."""
    source = open_images(KINDS[kind](tmp_path / "data"))
    assert source.class_names == tuple(NAMES) and source.num_classes == 3
    for each in (source, pickle.loads(pickle.dumps(source)), source.subset(3)):
        kept = [SHADES.index(shade) for shade in shades(each)]
        assert each.labels.tolist() == [LABELS[row] for row in kept] and len(kept) == len(each)
        assert list(each.captions()) == list(each.captions("text")) == [WORDS[row] for row in kept]
    assert source.subset(3).checksum != source.checksum == open_images(source.path).checksum
    assert len(pickle.dumps(source)) < 20_000  # a worker is handed names of files, not pixels


def test_a_checksum_is_of_the_images_and_not_of_their_storage(tmp_path):
    """Codes extracted from a snapshot go on from its copy in another format, and other images are told apart."""
    found = {kind: open_images(write(tmp_path / kind)).checksum for kind, write in KINDS.items()}
    assert len(set(found.values())) == 1
    others = images()
    others[1] = {"bytes": png(SHADES[1]) + b" ", "path": others[1]["path"]}
    assert open_images(write_file(tmp_path / "other", table(image=others, label=LABELS))).checksum not in found.values()


@pytest.mark.parametrize("kind", KINDS)
def test_codes_of_a_table_are_those_of_its_images(tmp_path, kind):
    """The same decoders and crops whatever the storage; loader processes get at the rows as well."""
    data, tokenizer = KINDS[kind](tmp_path / "data"), export_models(tmp_path / "models")[1]
    for row, shade in enumerate(SHADES):
        (tmp_path / "folder" / NAMES[LABELS[row]]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / NAMES[LABELS[row]] / f"{shade}.png").write_bytes(png(shade))
    call(extract_codes_c2i.main, *extract_options(tmp_path / "folder", tokenizer, tmp_path / "expected"))
    options = extract_options(data, tokenizer, tmp_path / "codes")
    call(extract_codes_c2i.main, *options, *(("--num-workers", 2) if kind == "file" else ()))
    header, codes, labels, _ = open_codes(tmp_path / "codes")
    assert header.class_names == NAMES and labels.tolist() == LABELS
    assert np.array_equal(codes, open_codes(tmp_path / "expected").codes[[0, 3, 1, 2]])


def test_processes_share_one_copy_of_a_parquet_file(tmp_path, cache):
    """Eight processes that each copied 150 GB would fill the disk; a changed file must not be read from an old copy."""
    data, tokenizer = write_file(tmp_path / "data"), export_models(tmp_path / "models")[1]
    options = extract_options(data, tokenizer, tmp_path / "codes")
    done = command("autoregressive/train/extract_codes_c2i.py", *options, processes=2)
    assert len(list(cache.rglob("*.arrow"))) == 1 and f"below {cache}" in done.stderr
    assert open_codes(tmp_path / "codes").labels.tolist() == LABELS
    assert shades(open_images(data)) == list(SHADES) and len(list(cache.rglob("*.arrow"))) == 1
    data.unlink()
    table(image=images()[::-1], label=LABELS).to_parquet(data)
    os.utime(data, (1, 1))
    assert shades(open_images(data)) == list(SHADES)[::-1]


@pytest.mark.parametrize("name", ["a[1]*?{x}", "~ ümlaut", ".cache"])
def test_names_of_folders_are_no_patterns(tmp_path, name):
    """`datasets` takes names of files for patterns; what lies in a folder of a strange name is read all the same."""
    (tmp_path / name).mkdir()
    assert shades(open_images(write_file(tmp_path / name / "data"))) == list(SHADES)


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, split", [
    ("data/train-00000-of-00003.parquet", "train"), ("data/validation-00000-of-00001-0123abcdef.parquet", "validation"),
    ("test.parquet", "test"), ("default/train/0000.parquet", "train"), ("my_val_images.parquet", "validation"),
    ("data/unsupervised-00000-of-00001.parquet", "unsupervised"), ("images.parquet", "train"),
    ("dev/part-0.parquet", "validation"),
    ("train/test-set.parquet", "test"), ("contest.parquet", "train"), ("data/part-00000-of-00009.parquet", "part")])
def test_splits_are_told_by_names(name, split):
    """As the hub names its files and folders."""
    assert split_of(Path(name)) == split


def test_a_split_is_chosen_behind_the_path(tmp_path):
    """Training on train and test together would make every measurement worthless; the only split needs no choice."""
    hub = write_snapshot(tmp_path / "hub", ("train", "test"))
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": table(), "test": table().select([3])}).save_to_disk(saved)
    for folder in (hub, saved):
        with pytest.raises(UserError, match=f"--val-path {folder} has 2 splits, test, train: name one .* as {folder}::test."):
            open_images(folder, "--val-path")
        with pytest.raises(UserError, match="has no split 'dev': give one of test, train."):
            open_images(f"{folder}::dev")
        assert len(open_images(f"{folder}::train")) == 4
    assert shades(open_images(f"{saved}::test")) == shades(open_images(saved / "test")) == [SHADES[3]]
    assert str(open_images(Path(f"{hub}::test")).path) == f"{hub}::test"


def test_configurations_of_a_data_set_are_not_mixed(tmp_path):
    """Two folders with a split of the same name are two versions of the data: together every image would count twice."""
    for below in ("full", "small"):
        write_snapshot(tmp_path / "hub", below=below) if below == "full" else write_snapshot(tmp_path / below, below=below)
    shutil.move(tmp_path / "small" / "small", tmp_path / "hub" / "small")
    with pytest.raises(UserError, match="has files of one split in 2 folders, .*full and .*small: give one of them."):
        open_images(tmp_path / "hub")
    assert len(open_images(tmp_path / "hub" / "small")) == 4


@pytest.mark.parametrize("path, words", [
    ("x::train,test", "names 2 splits, train and test: name one"), ("x::mask=a", "has 'mask=a' behind ::: give the name"),
    ("x::label=a,label=b", "has 'label=b' behind ::: give the name of a split")])
def test_choices_that_are_none_are_refused(path, words):
    """A misspelt choice would be read as another data set."""
    with pytest.raises(UserError, match=words):
        parse_data_path(path, "--data-path")


def test_a_path_that_exists_has_no_choices(tmp_path):
    """Two colons may stand in a name."""
    (tmp_path / "a::b").mkdir()
    assert parse_data_path(tmp_path / "a::b", "--data-path").path == tmp_path / "a::b"


def test_splits_and_columns_of_what_has_none_are_refused(tmp_path, images_folder):
    """They would be ignored, and the user would believe in them."""
    single = write_file(tmp_path / "data")
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.arange(2))
    for path, words in ((f"{images_folder}::train", "names the split 'train', but a folder of class folders has none"),
                        (f"{single}::train", "names the split 'train', but a single file has none"),
                        (f"{tmp_path}/x.npz::label=x", "names label=x, but an npz has no such column")):
        with pytest.raises(UserError, match=words):
            open_images(path)


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_are_found_by_type_then_by_name(tmp_path):
    """Masks, sizes and file names stand beside the images of real data sets."""
    rows = table({"image": datasets.Image(), "mask": datasets.Image(), "kind": datasets.ClassLabel(names=NAMES)},
                 mask=images()[::-1], image=images(), width=[1, 2, 3, 4], file_name=list("abcd"), kind=LABELS)
    source = open_images(write_file(tmp_path / "data", rows))
    assert shades(source) == list(SHADES) and source.labels.tolist() == LABELS and source.class_names == tuple(NAMES)


def test_columns_without_the_types_of_datasets_are_read(tmp_path):
    """Parquet of pandas or polars: bytes, integers, or names of classes, which are sorted as folders are."""
    import pyarrow
    import pyarrow.parquet
    for column, labels, names in (("cls", LABELS, ()), ("class", ["b", "a", "c", "b"], ("a", "b", "c"))):
        folder = tmp_path / column
        folder.mkdir()
        rows = pyarrow.table({"jpg": [png(shade) for shade in SHADES], column: labels})
        pyarrow.parquet.write_table(rows, folder / "x.parquet")
        source = open_images(folder)
        assert shades(source) == list(SHADES) and source.class_names == names
        assert source.labels.tolist() == (LABELS if not names else [1, 0, 2, 1])


def test_images_that_are_files_beside_the_table_are_read(tmp_path):
    """`datasets` keeps the path alone where nobody asked it to embed the bytes; one that is gone is named like any other."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.png").write_bytes(png(SHADES[0]))
    rows = table(image=[{"bytes": None, "path": name} for name in ("one.png", "gone.png", "https://x/y.png", ".")], label=LABELS)
    import pyarrow.parquet
    pyarrow.parquet.write_table(rows.data.table, tmp_path / "data" / "x.parquet")
    source = open_images(tmp_path / "data")
    assert int(source.load(0)[0, 0, 0]) == SHADES[0]
    for row in (1, 2, 3):
        with pytest.raises(UnreadableImage, match=rf"data\[{row}\]"):
            source.load(row)


TWO = {"image": datasets.Image(), "fine_label": datasets.ClassLabel(names=NAMES),
       "coarse_label": datasets.ClassLabel(names=["a", "b"])}


def test_columns_are_chosen_behind_the_path(tmp_path):
    """CIFAR-100 has fine and coarse labels: either is right, and a choice by us would be wrong half of the time."""
    rows = table(TWO, image=images(), fine_label=LABELS, coarse_label=[1, 0, 1, 0])
    path = write_file(tmp_path / "data", rows)
    with pytest.raises(UserError, match="has 2 columns that may be the labels, fine_label, coarse_label: name one, "
                                        f"{path}::label=fine_label."):
        open_images(path)
    assert open_images(f"{path}::label=coarse_label").class_names == ("a", "b")
    assert open_images(f"{path}::image=image,label=fine_label").labels.tolist() == LABELS
    assert open_images(f"{path}::label=").num_classes == 1
    hub = write_snapshot(tmp_path / "hub", ("train", "test"))
    assert open_images(f"{hub}::test,label=text").class_names == tuple(sorted(WORDS))


@pytest.mark.parametrize("columns, suffix, words", [
    (dict(label=LABELS), "", r"has no column of images, only label \(integers\): give a table whose images"),
    (dict(picture=images(), photo=images()), "", "2 columns that may be the images, picture, photo: name one, .*::image=picture"),
    (dict(image=images(), img=images()), "", "has 2 columns that may be the images, image, img"),
    (dict(image=images(), target=LABELS), "",
     r"has neither labels .* nor captions .*, only image \(image\), target \(integers\): name a column, .*::label=NAME, or none"),
    (dict(image=images(), label=LABELS, cls=LABELS), "", "has 2 columns that may be the labels, label, cls"),
    (dict(image=images(), label=[0.5] * 4), "", r"has neither labels .*label \(double\)"),
    (dict(image=images(), label=LABELS), "label=x", "names label=x, which is none of its columns image"),
    (dict(image=images(), label=LABELS), "label=image", "names label=image, which holds image of its columns"),
    (dict(image=images(), label=LABELS), "image=label", "names image=label, which holds integers of its columns .*: name one of"),
])
def test_columns_that_are_not_clear_are_asked_for(tmp_path, columns, suffix, words):
    """One sentence that names the columns there are, instead of labels that mean something else."""
    rows = table({name: datasets.Image() for name in columns if name in ("image", "img", "picture", "photo")}, **columns)
    path = write_file(tmp_path / "data", rows)
    with pytest.raises(UserError, match="--data-path .*" + words) as error:
        open_images(f"{path}::{suffix}" if suffix else path)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_classes_beside_captions_are_pointed_at(tmp_path, caplog):
    """A class-conditional model trained on one class would be noticed days later."""
    path = write_file(tmp_path / "data", table(image=images(), text=list(WORDS), target=LABELS))
    assert open_images(path).num_classes == 1
    assert f"all images are of class 0, no column is called {' or '.join(LABEL_NAMES)}; if target is the class, give " \
           f"{path}::label=target" in caplog.text


def test_captions_by_their_column(tmp_path, caplog):
    """Several captions of an image, inner fields, and rows without one: said, and never the neighbour's."""
    rows = table(image=images(), caption=[["a", "b"], ["c"], [], None], label=LABELS, more=[{"short": word} for word in "wxyz"],
                 odd=LABELS)
    source = open_images(write_file(tmp_path / "data", rows))
    assert list(source.captions()) == ["a", "c", "", ""] and "2 of 4 rows have no caption" in caplog.text
    assert list(source.captions("more.short")) == list("wxyz")
    for key, words in (("x", r"has no column 'x', only image \(image\), caption \(lists of strings\)"),
                       ("odd", "has no captions in 'odd', whose row 0 is no string")):
        with pytest.raises(UserError, match=words):
            source.captions(key)
    for name, columns, words in (("two", dict(text=list("abcd"), caption=list("abcd")), "has captions in text and caption: name"),
                                 ("none", dict(), r"has no captions, only image \(image\), label \(classes\): name the column")):
        with pytest.raises(UserError, match=words + ".*--caption-key NAME"):
            open_images(write_file(tmp_path / name, table(image=images(), label=LABELS, **columns))).captions()


# --- bad rows, bad files, no package ---------------------------------------------------------------------------------


def test_rows_that_cannot_be_decoded_are_named_and_left_out(tmp_path, capsys):
    """As with files: one truncated image among millions does not end an extraction, and never becomes a sample."""
    broken = images()
    broken[1]["bytes"], broken[2] = broken[1]["bytes"][:40], None
    data = write_file(tmp_path / "data", table(image=broken, label=LABELS))
    source = open_images(data)
    for row, words in ((1, "cannot identify image"), (2, "it has no bytes")):
        with pytest.raises(UnreadableImage, match=rf"x\.parquet\[{row}\].*{words}"):
            source.load(row)
    tokenizer = export_models(tmp_path / "models")[1]
    call(extract_codes_c2i.main, *extract_options(data, tokenizer, tmp_path / "codes"))
    assert open_codes(tmp_path / "codes").state.tolist() == [1, 2, 2, 1]
    assert "2 unreadable images left out" in capsys.readouterr().err


@pytest.mark.parametrize("labels, words", [
    ([0, -1, 1, 2], r"column 'label', has the negative label -1 at row 1: number the classes from 0, or give .*::label= where"),
    ([0, 1, 10**7, 2], "column 'label', has the label 10000000 at row 2: number the classes from 0, without gaps"),
    ([0, None, 1, 2], "column 'label', has no label at row 1, as at 1 of 4: give every image a label.")])
def test_labels_that_number_no_classes_are_refused(tmp_path, labels, words):
    """-1 is the hub's label of a test set without labels: it would be an index error hours later."""
    with pytest.raises(UserError, match=words):
        open_images(write_file(tmp_path / "data", table({"image": datasets.Image()}, image=images(), label=labels)))


def test_tables_without_a_readable_image_or_any_row_are_refused(tmp_path):
    """Found at once, not by replacing images for ever."""
    nothing = [{"bytes": b"no image", "path": None}] * 4
    with pytest.raises(UserError, match="has no readable image among the 4 that were tried"):
        open_images(write_file(tmp_path / "data", table(image=nothing, label=LABELS)))
    import pyarrow
    with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table().data.schema) as stream:
        stream.write_table(table().data.table.slice(0, 0))
    for path, words in ((tmp_path / "x.arrow", "has no rows"), (write_file(tmp_path / "empty", table().select([])), "no data")):
        with pytest.raises(UserError, match=words):
            open_images(path)


def test_without_the_package_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    """It is needed for tables alone; everything else runs without it."""
    data, tokenizer = write_file(tmp_path / "data"), export_models(tmp_path / "models")[1]
    monkeypatch.setitem(sys.modules, "datasets", None)
    error = refused(capsys, extract_codes_c2i.main, *extract_options(data, tokenizer, tmp_path / "codes"))
    assert "a table, needs the package datasets" in error and "`pip install datasets`" in error
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.arange(2))
    assert len(open_images(tmp_path / "x.npz")) == 2


@pytest.mark.parametrize("damage", [lambda whole: whole[:-50], lambda whole: b"", lambda whole: b"<html>404</html>",
                                    lambda whole: whole[:4] + bytes(len(whole) - 8) + whole[-4:]])
def test_damaged_files_are_refused(tmp_path, damage):
    """A download that ended early, a page in the place of a file: one sentence, and no copy of it is kept."""
    for path in (write_file(tmp_path / "parquet"), write_arrow(tmp_path / "arrow")):
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(UserError, match=f"--data-path {path}: the table of {path} cannot be read .*: make or copy it again"):
            open_images(path)


@pytest.mark.parametrize("name, change, words", [
    ("state.json", lambda found: found.update(_data_files=[{"filename": "../secret"}]), "which are not all files beside it"),
    ("state.json", lambda found: found.update(_data_files=[]), "names no Arrow files"),
    ("state.json", lambda found: found.update(_data_files=5), "names no Arrow files"),
    ("dataset_info.json", lambda found: found["features"]["label"].update(names=["a"]), "has the label 2 at row 1 but names 1"),
    ("dataset_info.json", lambda found: found["features"]["label"].update(names=["a", 5, "c"]), "holds classes whose names are"),
    ("dataset_info.json", lambda found: found["features"].pop("label"), "cannot be read"),
    ("dataset_info.json", lambda found: found.update(features=5), "cannot be read")])
def test_saved_data_sets_that_contradict_themselves_are_refused(tmp_path, name, change, words):
    """Nothing outside the folder is opened on the word of a file in it."""
    file = write_saved(tmp_path / "data") / name
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=words):
        open_images(tmp_path / "data")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """The home folder of a cluster is often full, and nobody knows that `datasets` writes there."""
    data = write_file(tmp_path / "data")
    (tmp_path / "file").write_text("")

    def full(*arguments, **options):
        raise datasets.exceptions.DatasetGenerationError("x") from OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "from_parquet", full)
    with pytest.raises(UserError, match=r"below .*cache \(No space left on device\): make space there, or name another folder by "
                                        "the variable HF_DATASETS_CACHE."):
        open_images(data)


def test_folders_of_class_folders_stay_what_they_are(images_folder):
    """A stray parquet file among the images of a class does not make a table of an image folder."""
    shutil.copy(write_file(images_folder.parent / "data"), images_folder / "class0" / "notes.parquet")
    assert len(open_images(images_folder)) == 24
