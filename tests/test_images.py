"""Image sources, crops, tensors, data sets and grids (utils: images, crops, image_dataset, pictures)."""

import logging
import os
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import TenCrop

from utils.config import UserError
from utils.crops import center_crop, flip_crops, random_crop, sample_rng, ten_crops, to_tensor, to_uint8
from utils.image_dataset import ImageDataset, crop_loader
from utils.images import ArrayImages, ImageSource, UnreadableImage, open_images
from utils.pictures import image_grid


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]"""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray) -> None:
    """Write a lossless or JPEG file by its extension, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def truncate(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def npz(path: Path, **arrays: Any) -> Path:
    """Write an uncompressed npz."""
    np.savez(path, **arrays)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with 4, 2 and 3 images of 20 x 24 pixels."""
    for name, count in (("b-dog", 2), ("a-cat", 4), ("c-owl", 3)):
        for index in range(count):
            save(tmp_path / "data" / name / f"{index}.png", noise(20, 24, index))
    return tmp_path / "data"


def numbers(count: int, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Images whose pixels are all their own number, and alternating labels."""
    values = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(values, (count, size, size, 3)).copy(), np.arange(count) % 2


def test_folder_numbers_classes_by_sorted_name(folder: Path) -> None:
    """Label ids must equal torchvision's and LlamaGen's, or released class-conditional weights draw other classes."""
    source = open_images(folder)
    assert source.class_names == ("a-cat", "b-dog", "c-owl") and source.num_classes == 3
    assert source.labels.tolist() == [0] * 4 + [1] * 2 + [2] * 3 and source.labels.dtype == np.int64
    assert source.name(5) == str(folder / "b-dog" / "1.png")
    assert np.array_equal(source.load(5), noise(20, 24, 1))


def test_folder_takes_all_extensions_at_any_depth(tmp_path: Path) -> None:
    """A data set must not lose images because they are called .JPEG or lie one folder deeper."""
    names = ["x.jpg", "x.jpeg", "x.JPEG", "x.JFIF", "deep/x.png", "deep/er/x.webp", "x.bmp"]
    for name in names:
        save(tmp_path / "class" / name, noise(8, 8))
    save(tmp_path / "class" / "._x.png", noise(8, 8))
    (tmp_path / "class" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    source = open_images(tmp_path)
    found = {os.path.relpath(source.name(i), tmp_path / "class") for i in range(len(source))}
    assert found == set(names)


def test_folder_follows_links_without_running_in_circles(tmp_path: Path) -> None:
    """ImageNet is often a farm of links; a link to a parent folder must not hang the scan."""
    save(tmp_path / "store" / "x.png", noise(8, 8))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "class").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "store")
    assert len(open_images(tmp_path / "data")) == 1


def test_images_beside_class_folders_are_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Images that belong to no class are left out, and the user must learn of it."""
    save(folder / "stray.png", noise(8, 8))
    assert len(open_images(folder)) == 9
    assert "1 images beside the class folders belong to no class" in caplog.text


@pytest.mark.parametrize("shape", [(6, 8, 9, 3), (6, 8, 9, 1), (6, 8, 9)])
@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_npz_gives_rgb_for_every_layout(tmp_path: Path, shape: tuple[int, ...], save_npz: Callable[..., None]) -> None:
    """Grey data sets such as Fashion-MNIST come without a channel axis; compressed files must read the same."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save_npz(tmp_path / "x.npz", images=pixels, labels=np.array([0, 2, 1, 0, 2, 4], np.uint8))
    source = open_images(tmp_path / "x.npz")
    assert len(source) == 6 and source.num_classes == 5 and source.labels.dtype == np.int64
    image = source.load(4)
    assert image.shape == (8, 9, 3) and image.flags.writeable
    assert np.array_equal(image, np.broadcast_to(pixels[4].reshape(8, 9, -1), (8, 9, 3)))
    assert source.name(4) == f"{tmp_path / 'x.npz'}[4]"


def test_uncompressed_npz_is_mapped(tmp_path: Path) -> None:
    """Workers must share the pages of a large array instead of each holding a copy."""
    pixels, labels = numbers(4)
    source = open_images(npz(tmp_path / "x.npz", images=pixels, labels=labels))
    source.load(0)
    assert isinstance(source, ArrayImages) and isinstance(source._images, np.memmap)


@pytest.mark.parametrize("make, sentence", [
    (lambda p: None, "does not exist: give the path of a folder with one sub-folder of images per class"),
    (lambda p: p.mkdir(), "has no class sub-folders (it is empty): give a folder with one sub-folder"),
    (lambda p: save(p / "x.png", noise(4, 4)), "has no class sub-folders (1 images lie flat in it): give"),
    (lambda p: save(p / "a" / "x.png", noise(4, 4)) or (p / "hollow").mkdir(),  # type: ignore[func-returns-value]
     "has a class folder 'hollow' without any image (.jpg .jpeg .jfif .png .webp .bmp): put its images into it, or remove"),
    (lambda p: p.write_text("text"), "is not a readable npz (File is not a zip file): give a folder"),
])
def test_folder_mistakes(tmp_path: Path, make: Callable[[Path], Any], sentence: str) -> None:
    """A wrong path must be told in one sentence before any work starts, not become a wrong number of classes."""
    make(tmp_path / "p")
    with pytest.raises(UserError) as error:
        open_images(tmp_path / "p", "--val-path")
    text = str(error.value)
    assert text.startswith("--val-path ") and str(tmp_path / "p") in text and sentence in text and text.endswith(".")


PIXELS, LABELS = np.zeros((3, 4, 4, 3), np.uint8), np.array([0, 1, 1])


@pytest.mark.parametrize("arrays, sentence", [
    ({"arr_0": PIXELS, "arr_1": LABELS}, "has no images and no labels, only arr_0, arr_1: give an npz with"),
    ({"images": PIXELS, "y": LABELS}, "has no labels, only images, y: give an npz with images and labels."),
    ({"images": PIXELS / 255, "labels": LABELS}, "has images of type float64, not uint8: save them as integers"),
    ({"images": PIXELS.transpose(0, 3, 1, 2), "labels": LABELS}, "has images of shape (3, 3, 4, 4), not (N, H, W, 3)"),
    ({"images": PIXELS[0, 0], "labels": LABELS}, "has images of shape (4, 3), not (N, H, W, 3)"),
    ({"images": PIXELS[:0], "labels": LABELS[:0]}, "has images of shape (0, 4, 4, 3), not (N, H, W, 3)"),
    ({"images": PIXELS, "labels": LABELS[:2]}, "has labels of shape (2,) for 3 images, not (3,): give one label"),
    ({"images": PIXELS, "labels": LABELS[:, None]}, "has labels of shape (3, 1) for 3 images, not (3,)"),
    ({"images": PIXELS, "labels": LABELS * 1.0}, "has labels of type float64, not integers: number the classes"),
    ({"images": PIXELS, "labels": np.array([None] * 3)}, "has labels of type object, not integers"),
    ({"images": PIXELS, "labels": LABELS - 1}, "has the negative label -1 at row 0: number the classes from 0."),
])
def test_npz_mistakes(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    """A wrong array would otherwise train for hours on swapped axes or shifted classes."""
    path = npz(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError) as error:
        open_images(path)
    text = str(error.value)
    assert text.startswith(f"--data-path {path} has") and sentence in text and text.endswith(".")


@pytest.mark.parametrize("save_npz", [np.savez, np.savez_compressed])
def test_truncated_npz(tmp_path: Path, save_npz: Callable[..., None]) -> None:
    """A half-finished download is the commonest damage; it must not end in a traceback."""
    save_npz(tmp_path / "x.npz", images=noise(40, 40)[None], labels=np.array([0]))
    truncate(tmp_path / "x.npz")
    with pytest.raises(UserError, match="is not a readable npz .*: give a folder .* whole and not truncated"):
        open_images(tmp_path / "x.npz")


def test_subset_spreads_over_classes(folder: Path, tmp_path: Path) -> None:
    """The first images of a sorted folder are all of one class: a trial on them would learn nothing."""
    source = open_images(folder)
    part = source.subset(5)
    assert [os.path.relpath(part.name(i), folder) for i in range(5)] == [
        "a-cat/0.png", "a-cat/1.png", "b-dog/0.png", "b-dog/1.png", "c-owl/0.png"]
    assert part.labels.tolist() == [0, 0, 1, 1, 2] and part.num_classes == 3
    assert len(source.subset(100)) == len(source) == 9  # and the source itself stays whole
    assert np.bincount(source.subset(8).labels).tolist() == [3, 2, 3]  # a class that runs out is made up for
    pixels, labels = numbers(10)
    arrays = open_images(npz(tmp_path / "x.npz", images=pixels, labels=labels)).subset(6).subset(4)
    assert arrays.name(3).endswith("[3]") and arrays.load(3)[0, 0, 0] == 3
    with pytest.raises(ValueError, match="not positive"):
        source.subset(0)


def test_sources_survive_pickling_and_stay_small(folder: Path, tmp_path: Path) -> None:
    """Spawned workers receive the source as a pickle; it must carry paths, not pixels."""
    pixels, labels = numbers(200, 64)
    array = open_images(npz(tmp_path / "x.npz", images=pixels, labels=labels))
    array.load(0)
    for source in (array.subset(100), open_images(folder).subset(5)):
        data = pickle.dumps(source)
        again = pickle.loads(data)
        assert len(data) < 10_000
        assert np.array_equal(again.load(4), source.load(4)) and again.name(4) == source.name(4)
        assert again.labels.tolist() == source.labels.tolist() and again.num_classes == source.num_classes


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("1", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "webp"),
                                          ("CMYK", "jpg"), ("I;16", "png")])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    """ImageNet holds grey and CMYK files: each must come as three channels of the right brightness."""
    path = tmp_path / "class" / f"x.{suffix}"
    path.parent.mkdir()
    if mode == "I;16":
        Image.fromarray(np.full((8, 8), 200 * 256, np.uint16)).save(path)
    elif mode == "P":
        picture = Image.new("RGBA", (8, 8), (200, 200, 200, 255)).quantize(4)
        picture.save(path, transparency=bytes([0, 0, 0, 0]))
    else:
        Image.new("L", (8, 8), 200).convert("1" if mode == "1" else "RGB").convert(mode).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_images(tmp_path).load(0)
    assert image.dtype == np.uint8 and image.shape == (8, 8, 3)
    if mode == "1":  # black and white dots
        assert abs(image.mean() - 200) < 10
    else:
        assert np.abs(image.astype(int) - 200).max() <= 2


def test_exif_rotation_is_not_applied(tmp_path: Path) -> None:
    """ADM and LlamaGen ignore the EXIF rotation; reference statistics depend on doing the same."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "class").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "class" / "x.jpg", exif=exif)
    assert open_images(tmp_path).load(0).shape == (10, 20, 3)


@pytest.mark.parametrize("damage", [truncate, lambda p: p.write_text("x"), lambda p: p.write_bytes(b""), Path.unlink])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_unreadable_file_is_named(tmp_path: Path, damage: Callable[[Path], Any], suffix: str) -> None:
    """Whoever must repair a data set needs the file's name and the cause, not a decoder's traceback."""
    path = tmp_path / "class" / f"x.{suffix}"
    save(path, noise(64, 64))
    source = open_images(tmp_path)
    damage(path)
    with pytest.raises(UnreadableImage) as error:
        source.load(0)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) > len(f"{path}: ")


def test_center_crop_halves_then_resizes_then_cuts() -> None:
    """Reference statistics were made with this order of filters: another one shifts FID."""
    image = noise(70, 101)
    halved = Image.fromarray(image).resize((50, 35), Image.Resampling.BOX)  # 70 >= 2 * 32; 35 is not
    expected = np.array(halved.resize((46, 32), Image.Resampling.BICUBIC))[:, 7:39]
    assert np.array_equal(center_crop(image, 32), expected)
    assert center_crop(noise(10, 5), 16).shape == (16, 16, 3)  # small images are enlarged


def test_center_crop_keeps_an_image_of_the_right_size() -> None:
    """Images cropped once, as in a reference npz, must not be blurred by being cropped again."""
    assert np.array_equal(center_crop(noise(32, 32), 32), noise(32, 32))


def test_random_crop_stays_inside_its_fractions() -> None:
    """The crop range is a training option of the paper's baseline: too wide a range changes what is learnt."""
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (100, 100, 3))
    spans = [np.ptp(random_crop(ramp, 40, sample_rng(0, 0, i), 0.5, 0.8)[20, :, 0].astype(int)) for i in range(200)]
    assert 45 < min(spans) < 55 and 72 < max(spans) < 82
    lefts = [random_crop(ramp, 40, sample_rng(0, 0, i), 0.5, 0.8)[20, 0, 0] for i in range(200)]
    assert min(lefts) < 5 and max(lefts) > 40


def test_random_crop_of_the_whole_image_is_the_center_crop() -> None:
    """With both fractions at 1 nothing is left to chance for a square image."""
    image = noise(64, 64)
    assert np.array_equal(random_crop(image, 32, sample_rng(0, 0, 0), 1.0, 1.0), center_crop(image, 32))


@pytest.mark.parametrize("size, crop_range", [(32, 1.1), (30, 1.05), (32, 1.0)])
def test_ten_crops_equal_torchvision(size: int, crop_range: float) -> None:
    """Codes are extracted from these crops: order and rounding must be those of LlamaGen's, which uses torchvision."""
    image = noise(50, 60)
    expected = TenCrop(size)(Image.fromarray(center_crop(image, int(size * crop_range))))
    assert np.array_equal(ten_crops(image, size, crop_range), np.stack([np.array(view) for view in expected]))
    with pytest.raises(ValueError, match="below 1"):
        ten_crops(image, size, 0.9)


def test_flip_crops() -> None:
    """Centre crop first, mirror image second: the layout of two-crop code shards."""
    crops = flip_crops(noise(50, 60), 32)
    assert np.array_equal(crops[0], center_crop(noise(50, 60), 32)) and np.array_equal(crops[1], crops[0][:, ::-1])


def test_pixels_survive_the_round_trip() -> None:
    """A reconstruction that equals its input must score an infinite PSNR, for all 256 values."""
    pixels = np.arange(256, dtype=np.uint8).reshape(2, 8, 16)[..., None].repeat(3, -1)  # [2, 8, 16, 3]
    tensor = to_tensor(pixels)
    assert tensor.shape == (2, 3, 8, 16) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(to_uint8(tensor).numpy(), pixels)
    assert np.array_equal(to_uint8(to_tensor(torch.from_numpy(pixels))).numpy(), pixels)


def test_to_uint8_clamps_and_rounds_to_nearest() -> None:
    """A value past the range must not wrap around to black; rounding is that of published evaluations."""
    values = torch.tensor([-9.0, -1.0, (2.4 / 127.5) - 1, (2.6 / 127.5) - 1, 1.0, 9.0])
    assert to_uint8(values.expand(3, 1, 6))[0, :, 0].tolist() == [0, 0, 2, 3, 255, 255]
    source = torch.zeros(3, 2, 2)
    to_uint8(source)
    assert not source.any()  # the caller's images stay as they were
    assert to_uint8(torch.ones(3, 2, 2, dtype=torch.bfloat16)).max() == 255


def test_to_tensor_takes_mirrored_and_read_only_arrays() -> None:
    """Crops are views: mirrored or mapped memory must neither fail nor warn in every worker."""
    image = noise(4, 4)
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(to_tensor(image[:, ::-1]), to_tensor(image).flip(-1))


def test_sample_rng_depends_on_its_three_keys_alone() -> None:
    """Resumed runs and other numbers of workers must see the same augmentations."""
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (0, 1, 1)]
    draws = [tuple(sample_rng(*key).random(3)) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(sample_rng(*key).random(3)) for key in keys]


class Faulty(ImageSource):
    """Twelve tiny images, of which some cannot be read."""

    def __init__(self, bad: set[int], count: int = 12) -> None:
        super().__init__(Path("faulty"), "--data-path", np.arange(count), [str(i) for i in range(count)])
        self.bad = bad

    def name(self, index: int) -> str:
        return f"image-{index}"

    def load(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise UnreadableImage(f"{self.name(index)}: damaged")
        return np.full((8, 8, 3), index, np.uint8)


def test_dataset_center(folder: Path) -> None:
    """Evaluation must see exactly the centre crop, in the network's range, whichever way the sampler asks."""
    source = open_images(folder)
    dataset = ImageDataset(source, 16)
    image, label, index = dataset[3, 5]
    assert torch.equal(image, to_tensor(center_crop(source.load(5), 16))) and (label, index) == (1, 5)
    assert torch.equal(dataset[5][0], image) and len(dataset) == 9


def test_train_augmentation_is_reproducible_and_changes_each_epoch(folder: Path) -> None:
    """The same (seed, epoch, index) gives the same pixels; another epoch gives new ones."""
    source = open_images(folder)
    first, second = (ImageDataset(source, 16, 3, True, True) for _ in range(2))
    assert torch.equal(first[1, 2][0], second[1, 2][0])
    views = {first[epoch, 2][0].numpy().tobytes() for epoch in range(8)}
    assert len(views) > 4
    assert len({ImageDataset(source, 16, s, True, True)[0, 2][0].numpy().tobytes() for s in range(8)}) > 4


def test_crop_and_flip_can_be_switched_off_separately(folder: Path) -> None:
    """LlamaGen's tokenizer and GPT training differ in these switches; one must not change the other's draws."""
    source = open_images(folder)
    plain = ImageDataset(source, 16)
    flips = ImageDataset(source, 16, random_flip=True)
    crops = ImageDataset(source, 16, random_crop=True)
    both = ImageDataset(source, 16, random_crop=True, random_flip=True)
    centre = to_tensor(center_crop(source.load(0), 16))
    mirrored = 0
    for epoch in range(200):
        assert torch.equal(plain[epoch, 0][0], centre)
        flipped = torch.equal(flips[epoch, 0][0], centre.flip(-1))
        assert flipped or torch.equal(flips[epoch, 0][0], centre)
        crop = crops[epoch, 0][0]
        assert torch.equal(both[epoch, 0][0], crop.flip(-1) if flipped else crop)
        mirrored += flipped
    assert 70 < mirrored < 130


def test_unreadable_images_are_replaced_logged_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """One damaged file must not end a run of days, and nobody must have to guess how many there were."""
    dataset = ImageDataset(Faulty({3, 4, 11}), 8)
    assert [dataset[index][1:] for index in (2, 3, 4, 11)] == [(2, 2), (5, 5), (5, 5), (0, 0)]
    assert dataset.skipped == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"unreadable image replaced by the next: image-{index}: damaged" for index in (3, 4, 11)]
    assert {record.name for record in caplog.records} == {"images"}
    caplog.clear()
    dataset.report_skipped()
    assert [record.getMessage() for record in caplog.records] == [
        "--data-path faulty: 3 of 12 images were unreadable and replaced by others"]


def test_report_skipped_is_silent_when_all_could_be_read(caplog: pytest.LogCaptureFixture) -> None:
    """A clean run should not end with a warning."""
    caplog.set_level(logging.DEBUG)
    ImageDataset(Faulty(set()), 8).report_skipped()
    assert not caplog.records


@pytest.mark.parametrize("count, tries", [(150, 100), (5, 5)])
def test_too_many_unreadable_images_end_the_run(count: int, tries: int) -> None:
    """An unmounted disk must stop a run, not turn it into training on one image."""
    dataset = ImageDataset(Faulty(set(range(count)), count), 8)
    with pytest.raises(UserError, match=f"^--data-path faulty has {tries} unreadable images in a row, the last "
                       f"image-{tries - 1}: check that its images are whole and can be read.$"):
        dataset[0]


@pytest.mark.parametrize("context, workers", [("fork", 2), ("spawn", 1)])
def test_workers_share_the_count_of_truncated_files(folder: Path, context: str, workers: int) -> None:
    """Skips happen in workers; the main process must know their number, and no image may count twice."""
    save(folder / "a-cat" / "broken.jpg", noise(64, 64))
    truncate(folder / "a-cat" / "broken.jpg")
    dataset = ImageDataset(open_images(folder), 16)
    loader = DataLoader(dataset, 5, num_workers=workers, multiprocessing_context=context, persistent_workers=True)
    for _ in range(2):
        found = torch.cat([index for _, _, index in loader]).tolist()
        assert found == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9]
    assert dataset.skipped == 1


def test_workers_do_not_change_the_augmentation(folder: Path) -> None:
    """The number of workers is a matter of speed and must never change what is trained."""
    dataset = ImageDataset(open_images(folder), 16, 0, True, True)
    items = [(2, index) for index in range(9)]
    alone, shared = (torch.cat([images for images, _, _ in DataLoader(dataset, 4, sampler=items, num_workers=n)])
                     for n in (0, 2))
    assert torch.equal(alone, shared)


@pytest.mark.parametrize("workers", [0, 2])
def test_crop_loader_keeps_the_order_and_names_unreadable_rows(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    """What is written under a row must be that row's image; a batch may hold no readable image at all."""
    rows = np.array([7, 3, 4, 0, 9])
    batches = list(crop_loader(Faulty({3, 4, 9}), rows, partial(flip_crops, size=8), 2, workers))
    assert [(good.tolist(), bad.tolist()) for good, _, bad in batches] == [([7], [3]), ([0], [4]), ([], [9])]
    assert batches[0][1].shape == (1, 2, 8, 8, 3) and (batches[0][1] == 7).all() and batches[2][1] is None
    assert workers or "unreadable image left out: image-4: damaged" in caplog.text


def test_grid_holds_every_image_enlarged_by_nearest_pixels() -> None:
    """A grid is how people judge quality: no interpolation, nothing lost, two pixels between images."""
    pixels = np.stack([noise(4, 5, seed) for seed in range(5)])
    grid = np.array(image_grid(pixels, columns=3, scale=2))
    assert grid.shape == (2 + 2 * (8 + 2), 2 + 3 * (10 + 2), 3)
    for index in range(5):
        y, x = 2 + index // 3 * 10, 2 + index % 3 * 12
        assert np.array_equal(grid[y:y + 8, x:x + 10], pixels[index].repeat(2, 0).repeat(2, 1))
    assert (grid[12:, 26:] == 255).all()  # the sixth cell is blank


def test_grid_captions_stand_beside_the_images() -> None:
    """Input and reconstruction are told apart by captions, which must not cover pixels."""
    pixels = np.full((4, 16, 16, 3), 255, np.uint8)
    plain = image_grid(pixels, 2)
    grid = image_grid(pixels, 2, rows=["input", "output"], titles=["one", "a caption much too long for an image this small"])
    assert grid.width > plain.width and grid.height > plain.height and grid.width < 400
    assert (np.array(grid) < 128).any()  # something was written
    rows_only = np.array(image_grid(pixels, 2, rows=["input", "output"]))
    assert (rows_only[:18, :30] < 128).any() and (rows_only[18:, :30] < 128).any()
    assert (rows_only[:, -36:] == 255).all()  # the images themselves are untouched


@pytest.mark.parametrize("options", [{"columns": 0}, {"columns": 2, "rows": ["x"]}, {"columns": 2, "titles": ["x"]}])
def test_grid_refuses_captions_that_do_not_fit(options: dict[str, Any]) -> None:
    """A missing caption would label the wrong image."""
    with pytest.raises(ValueError, match="do not fit"):
        image_grid(np.zeros((3, 4, 4, 3), np.uint8), **options)
