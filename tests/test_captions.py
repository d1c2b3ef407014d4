"""Captions: their cleaning, prompt files, and the images that carry them (utils: captions, texts, captioned_images)."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoregressive.train import extract_codes_c2i
from tests.conftest import GOLDEN, call, export_models
from tests.test_codes import extract_options
from utils.captions import CLEANING, clean_caption, first_sentence, mend_caption
from utils.code_shards import open_codes
from utils.config import UserError
from utils.image_source import UnreadableImage
from utils.images import open_images
from utils.texts import Texts, read_prompts

SHADES = (10, 90, 170, 250)
WORDS = ("a dark square", "a grey square", "a light square", "a white square")


def png(shade: int) -> bytes:
    """A small image of one shade."""
    file = io.BytesIO()
    Image.fromarray(np.full((40, 36, 3), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_listed(folder: Path, *lines: str) -> Path:
    """Four images below `pictures/`, and captions.jsonl with the lines, or with one for each image."""
    (folder / "pictures").mkdir(parents=True)
    for number, shade in enumerate(SHADES):
        (folder / "pictures" / f"{number}.png").write_bytes(png(shade))
    own = [json.dumps({"image_path": f"pictures/{number}.png", "text": text, "more": {"short": text.split()[1]}})
           for number, text in enumerate(WORDS)]
    (folder / "captions.jsonl").write_text("\n".join(lines or own) + "\n")
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A shard with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def write_shards(folder: Path) -> Path:
    """Two shards of two samples each, with captions as text and JSON."""
    for shard in range(2):
        files: dict[str, bytes] = {}
        for number in (2 * shard, 2 * shard + 1):
            files |= {f"{number:04d}.png": png(SHADES[number]), f"{number:04d}.txt": WORDS[number].encode(),
                      f"{number:04d}.json": json.dumps({"short": WORDS[number].split()[1]}).encode()}
        write_tar(folder / f"{shard:05d}.tar", files)
    return folder


def write_npz(folder: Path) -> Path:
    """An npz of the same images and captions, without labels."""
    folder.mkdir(parents=True)
    images = np.stack([np.full((40, 36, 3), shade, np.uint8) for shade in SHADES])
    np.savez(folder / "x.npz", images=images, captions=np.array(WORDS), short=np.array([text.split()[1] for text in WORDS]))
    return folder / "x.npz"


SOURCES = {"listed": (write_listed, "more.short"), "shards": (write_shards, "short"), "npz": (write_npz, "short")}


# --- cleaning --------------------------------------------------------------------------------------------------------


def test_captions_are_cleaned_as_published():
    """Released text-conditional weights saw captions through this cleaning: another would be another prompt to them."""
    pairs = json.loads((GOLDEN / "captions.json").read_text())
    assert len(pairs) == 35
    for raw, cleaned in pairs:
        assert clean_caption(raw) == cleaned, raw


def test_mending_goes_before_the_signs_are_removed():
    """The published order loses what makes mojibake recognisable: é would stay ã."""
    assert (clean_caption("cafÃ© in Paris"), mend_caption("cafÃ© in Paris")) == ("cafã in paris", "café in paris")
    assert CLEANING["none"]("Two\nlines <b>") == "Two lines <b>"
    assert first_sentence("A cat. It sleeps.") == "A cat"


@pytest.mark.parametrize("text", ["", "<![a", "<![CDATA[x", "<!doctype [", "&#x110000;", "\ud800 a", "a\0b", "%ff", "<a" * 900])
def test_no_caption_stops_the_cleaning(text):
    """One strange line among millions must not end an extraction."""
    for clean in CLEANING.values():
        assert "\n" not in clean(text)


# --- strings and prompts ---------------------------------------------------------------------------------------------


def test_texts_hold_any_string_and_tell_lists_apart():
    """Half a surrogate pair is valid JSON and no UTF-8; the same letters cut elsewhere are other captions."""
    texts = Texts(["", "zwölf", "\ud800x", "日本"])
    assert list(texts) == ["", "zwölf", "?x", "日本"] and texts.of([3, 1]) == ["日本", "zwölf"]
    assert Texts(["ab", "c"]).checksum != Texts(["a", "bc"]).checksum == Texts(["a", "bc"]).checksum


def test_prompts_of_each_kind_of_file(tmp_path):
    """GenEval's and PartiPrompts' own files are read as they come."""
    (tmp_path / "a.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a cat", "tag": "single_object"}\n{"text": "a dog"}\n')
    (tmp_path / "c.tsv").write_text("Prompt\tCategory\na cat\tAnimals\na dog\tAnimals\n")
    for name in ("a.txt", "b.jsonl", "c.tsv"):
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["a cat", "a dog"]
    assert read_prompts(tmp_path / "b.jsonl")[0].about == {"prompt": "a cat", "tag": "single_object"}


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"\n \n", "is empty: give a file with a prompt in every line."),
    ("a.txt", b"", "is empty"),
    ("a.txt", b"\xff\xfe\xff", "is no text that can be read"),
    ("a.jsonl", b'{"prompt": "a"}\n{"promp', "a.jsonl, line 2, is no JSON"),
    ("a.jsonl", b'{"prompt": 3}', "line 1, has other than a string as 'prompt'"),
    ("a.tsv", b"Text\tx\na\tb", "has no column Prompt, only Text"),
])
def test_prompt_files_that_hold_none_are_refused(tmp_path, name, content, words):
    """Found before the models are loaded, with the line to mend."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="--prompts .*" + words):
        read_prompts(tmp_path / name)


# --- images with captions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_images_come_with_their_captions(tmp_path, kind):
    """A caption beside the wrong image trains without a word; `subset` and workers must keep the pairs too."""
    write, short = SOURCES[kind]
    source = open_images(write(tmp_path / "data"))
    assert len(source) == 4 and source.num_classes == 1 and source.class_names == () and not source.labels.any()
    for each in (source, pickle.loads(pickle.dumps(source)), source.subset(3)):
        shades = [int(each.load(index)[0, 0, 0]) for index in range(len(each))]
        assert list(each.captions()) == [WORDS[SHADES.index(shade)] for shade in shades]
        assert list(each.captions(short)) == [WORDS[SHADES.index(shade)].split()[1] for shade in shades]
    assert source.subset(3).checksum != source.checksum == open_images(source.path).checksum


@pytest.mark.parametrize("kind", SOURCES)
def test_codes_of_captioned_images_are_extracted(tmp_path, kind):
    """One command for all images: those without classes are of class 0, and their rows are the captions'."""
    data, (_, tokenizer) = SOURCES[kind][0](tmp_path / "data"), export_models(tmp_path / "models")
    call(extract_codes_c2i.main, *extract_options(data, tokenizer, tmp_path / "codes"))
    header, codes, labels, _ = open_codes(tmp_path / "codes")
    assert (header.num_classes, header.images, labels.tolist()) == (1, 4, [0] * 4)
    assert header.images_checksum == open_images(data).checksum and len(np.unique(codes[:, 0].reshape(4, -1), axis=0)) == 4


def test_shards_of_the_webdataset_package_are_read(tmp_path):
    """The format is what that package writes: folders in names, several dots, other files, samples without an image."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, text in enumerate(WORDS):
            image = {"left.PNG".lower(): png(SHADES[number])} if number != 1 else {}
            writer.write({"__key__": f"part/{number}", "cls": b"7", "txt": text} | image)
    source = open_images(tmp_path / "a.tar")
    assert [int(source.load(row)[0, 0, 0]) for row in range(3)] == [10, 170, 250]
    assert list(source.captions()) == [WORDS[0], *WORDS[2:]] and source.name(0) == f"{tmp_path}/a.tar/part/0.left.png"


def test_samples_without_a_caption_are_counted(tmp_path, caplog):
    """One missing text among millions is said, and its caption is empty rather than its neighbour's."""
    write_tar(tmp_path / "a.tar", {"0.png": png(1), "0.txt": b"one", "1.png": png(2), "2.png": png(3), "2.txt": b"three"})
    assert list(open_images(tmp_path).captions()) == ["one", "", "three"]
    assert "1 of 3 samples have no .txt" in caplog.text


def test_an_image_of_a_shard_that_cannot_be_decoded_is_named(tmp_path):
    """As with files: it is left out, and the message says which."""
    source = open_images(write_tar(tmp_path / "a.tar", {"0.png": png(1), "0.txt": b"one", "1.png": b"no image", "1.txt": b"two"}))
    with pytest.raises(UnreadableImage, match=r"a\.tar/1\.png"):
        source.load(1)


@pytest.mark.parametrize("lines, words", [
    (['{"image_path": "pictures/0.png", "text": "a"}', '{"image_path'], "captions.jsonl, line 2, is no JSON"),
    (['["pictures/0.png"]'], "line 1, is no JSON object but"),
    (['{"text": "a"}'], "line 1, has no 'image_path', only text"),
    (['{"image_path": "../0.png", "text": "a"}'], "line 1, has the image_path '../0.png', which leaves the folder"),
    (['{"image_path": "/etc/passwd", "text": "a"}'], "'/etc/passwd', which leaves the folder"),
    (['{"image_path": "pictures/../../x.png", "text": "a"}'], "which leaves the folder"),
    ([" "], "captions.jsonl has no captions"),
    (['{"image_path": "pictures/9.png", "text": "a"}'], "has no readable image"),
])
def test_lines_that_cannot_be_used_are_refused_by_number(tmp_path, lines, words):
    """A list of millions is mended by its line numbers; a path out of the folder would read what is none of the data."""
    with pytest.raises(UserError, match="--data-path .*" + words) as error:
        open_images(write_listed(tmp_path / "data", *lines))
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


def test_captions_that_are_not_there_are_refused(tmp_path, images_folder):
    """Each kind of storage says what it lacks and what to do."""
    listed, shards, arrays = (open_images(write(tmp_path / name)) for name, (write, _) in SOURCES.items())
    bare = open_images(write_tar(tmp_path / "bare" / "a.tar", {"0.png": png(1)}))
    for source, key, words in ((open_images(images_folder), "", "has no captions: give a folder with captions.jsonl"),
                               (bare, "", "its samples have no .txt"), (shards, "x", r"its \.json has no 'x', only short"),
                               (listed, "more.long", "line 1, has no 'more.long'"), (arrays, "x", "has no x, only images")):
        with pytest.raises(UserError, match=words):
            source.captions(key)


@pytest.mark.parametrize("damage, words", [
    (lambda whole: whole[: len(whole) // 2], "a.tar is no whole tar file"),
    (lambda whole: b"\x1f\x8b" + whole, "a.tar is no whole tar file"),
    (lambda whole: b"", "a.tar is no whole tar file"),
])
def test_damaged_shards_are_refused(tmp_path, damage, words):
    """A shard that was copied in part would silently train on its beginning."""
    path = write_tar(tmp_path / "a.tar", {f"{number}.{kind}": png(number) * 9 for number in range(9) for kind in ("png", "txt")})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=words):
        open_images(tmp_path)


def test_shards_without_images_are_refused(tmp_path):
    """A tar of something else."""
    write_tar(tmp_path / "a.tar", {"0.txt": b"one"})
    with pytest.raises(UserError, match="has no image in 1 tar files"):
        open_images(tmp_path)
