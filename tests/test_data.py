"""Images of folders as people have them, of torchvision's data sets, and those that are drawn."""

import os
import pickle
import shutil

import numpy
import pytest
import torch
import torchvision
from conftest import TINY, make_folder, read_log, train
from PIL import Image

import common
import music

CPU = torch.device("cpu")


def args_of(*flags):
    return music.get_args([*TINY, *map(str, flags)])


def open_data(*flags):
    return common.open_data(args_of(*flags), CPU)


def write(root, *names):
    """A picture under each name, or an empty folder where it ends in a slash."""
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not path.endswith(b"/"):
            Image.new("RGB", (20, 24), (200, 100, 50)).save(os.fsdecode(path), "JPEG")


FOLDERS = {  # the names of files; labels and classes of training images; labels of test images; what is said
    "matched by name": ("train/a/x.jpg train/c/x.JPEG val/c/x.jpg val/b/x.jpg", "ac", [0, 1], [1], "1 of 2"),
    "test, not val": ("train/a/deep/er/x.png test/a/x.jpg", "a", [0], [0], "1 of 1"),
    "train alone": ("train/a/x.jpg train/b/x.jpg", "ab", [0, 1], None, "no kNN"),
    "class folders": ("b/x.jpg a/x.jpg a/y.jpg", "ab", [0, 0, 1], None, "no kNN"),
    "flat": ("x.jpg y.jpg", "", [-1, -1], None, "no kNN"),
    "flat val": ("train/a/x.jpg val/x.jpg", "a", [0], None, "no folders named as"),
    "hidden": ("train/a/x.jpg train/e/ train/.h/x.jpg train/a/._x.jpg val/e/", "a", [0], None, "no kNN"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_validation_classes_are_matched_by_name_or_knn_is_off(case, tmp_path, capsys):
    names, classes, labels, test_labels, sentence = FOLDERS[case]
    write(tmp_path, *names.split())
    images, test = common.open_folder(tmp_path)
    assert images.classes == list(classes) and images.labels.tolist() == labels
    assert (test and test.labels.tolist()) == test_labels and sentence in capsys.readouterr().err
    assert test is None or test.read(0).shape == (3, 24, 20)


def test_links_are_followed_and_names_may_be_odd(tmp_path):
    odd = [b" .jpg", b"new\nline.jpg", b"\xff\xfe.jpg", b"-x.jpg", b"'\"[*].jpg", b"%s{0}.jpg"]
    write(tmp_path, *[b"data/train/a[b/" + name for name in odd], "elsewhere/x.jpg")
    (tmp_path / "data" / "train" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "train" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "x.jpg")
    images = common.list_folder(tmp_path / "data" / "train")
    assert images.classes == ["a[b", "link"] and sorted(images.labels.tolist()) == [-1, *[0] * 6, 1]
    assert {os.path.basename(path) for path in images.data} == {*odd, b"x.jpg", b"link.jpg"}
    assert all(images.read(i).shape == (3, 24, 20) for i in range(8))


FORMATS = {
    "gray.jpg": ("L", 153),
    "cmyk.JPEG": ("CMYK", (0, 0, 0, 102)),
    "x.gif": ("RGB", (153, 153, 153)),
    "x.webp": ("RGB", (153, 153, 153)),
    "x.bmp": ("L", 153),
    "x.ppm": ("RGB", (153, 153, 153)),
    "x.tiff": ("RGB", (153, 153, 153)),
    "alpha.png": ("LA", (153, 9)),
    "16 bits.png": ("I;16", 153 * 256 + 255),
    "big-endian.tif": ("I;16B", 153 * 256 + 255),
}


@pytest.mark.parametrize("name", FORMATS)
def test_all_usual_formats_are_read_and_16_bits_are_not_clipped(name, tmp_path):
    mode, colour = FORMATS[name]
    Image.new(mode, (30, 20), colour).save(tmp_path / name)
    image = common.list_folder(tmp_path).read(0)
    assert image.dtype == torch.uint8 and image.shape == (3, 20, 30)
    assert (image.float() - 153).abs().max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_unknown_range_are_not_read(mode, tmp_path):
    Image.new(mode, (30, 20), 153).save(tmp_path / "x.tif")
    assert common.list_folder(tmp_path).read(0) is None


@pytest.mark.parametrize("size", [(20, 24), (20, 140)])
def test_unreadable_images_are_skipped_and_named_and_above_1_percent_the_run_stops(size, tmp_path, capsys):
    make_folder(tmp_path, 64, size, ["train"])
    flags = ["--data", tmp_path, "--workers", "1"]
    half = tmp_path / "train" / "a" / "005.jpg"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    images, _, _ = open_data(*flags)
    steps = list(common.batches(images, args_of(*flags), CPU, 0, 16))
    assert len(steps) == 16 and capsys.readouterr().err.count("train/a/005.jpg") == 1
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        images, _, _ = open_data(*flags)
        list(common.batches(images, args_of(*flags), CPU, 0, 8))
    assert " of 128 images of --data cannot be read, more than 1 %" in capsys.readouterr().err


def test_small_images_of_one_size_are_in_memory_others_are_paths_in_an_array(folder, big_folder, tmp_path):
    assert common.to_memory(common.list_folder(folder), CPU).data.shape == (96, 3, 20, 24)
    mixed = make_folder(make_folder(tmp_path, 2), 1, (24, 24), ["more"])
    for root in (big_folder, mixed):
        images = common.to_memory(common.list_folder(root), CPU)
        assert not images.in_memory and len(pickle.dumps(images)) < images.data.nbytes + 2000


def test_tiny_imagenet_as_downloaded_trains_and_goes_on_elsewhere_but_not_when_changed(tmp_path, capsys):
    make_folder(tmp_path, 8, splits=["train"], classes=["n1/images", "n2/images"])
    make_folder(tmp_path, 2, splits=["val", "test"], classes=["images"])
    (tmp_path / "val" / "val_annotations.txt").write_text("000.jpg\tn1\t0\t0\t9\t9")
    flags = ["--epochs", "1", "--out", tmp_path / "out", "--data"]
    assert train(*flags, tmp_path) == 0
    assert "no kNN" in capsys.readouterr().err and "knn" not in read_log(tmp_path / "out")[-1]
    moved = shutil.move(tmp_path / "train", tmp_path / "moved")
    assert train(*flags, moved) == 0
    shutil.move(moved / "n1" / "images" / "000.jpg", moved / "n1" / "0.jpg")
    assert train(*flags, moved) == 2
    assert "--data has other images than the run began with" in capsys.readouterr().err


def test_a_subset_is_the_first_images_of_each_class(big_folder, tmp_path):
    images, _, test = open_data("--data", big_folder, "--subset", "9")
    names = [os.fsdecode(path)[-9:] for path in images.data]
    assert names == [f"{label}/{i:03}.jpg" for label in "ab" for i in range(9)] and len(test) == 40
    assert images.take(torch.arange(2)).key != images.take(torch.arange(1, 3)).key
    flat, _, _ = open_data("--data", big_folder / "train" / "a", "--subset", "17")
    assert len(flat) == 17


DOWNLOADED = {  # labels of training, bank and test images; the shape and, of an image, the second row
    "cifar10": ([3, 1, 4, 1] * 5, [3, 1, 4, 1] * 5, [3, 1, 4, 1], (3, 32, 32), [32, 33, 34]),
    "stl10": ([-1] * 17, [0, 1], [0, 1, 2], (3, 96, 96), [1, 97, 193]),
}


@pytest.mark.parametrize("name", DOWNLOADED)
def test_data_sets_of_torchvision_are_read_by_name(name, tmp_path, monkeypatch):
    """From files as they are downloaded, with few images, whose bytes count up."""
    for module in (torchvision.datasets.cifar, torchvision.datasets.stl10):
        monkeypatch.setattr(module, "check_integrity", lambda *_: True)
    count = numpy.arange(17 * 3 * 96 * 96).astype(numpy.uint8)
    batch = pickle.dumps(dict(data=count[: 4 * 3072].reshape(4, 3072), labels=[3, 1, 4, 1]))
    files = {f"cifar-10-batches-py/data_batch_{i}": batch for i in range(1, 6)}
    files["cifar-10-batches-py/test_batch"] = batch
    files["cifar-10-batches-py/batches.meta"] = pickle.dumps(dict(label_names=list("abcdefghij")))
    files["stl10_binary/class_names.txt"] = b"a\nb\nc"
    for split, n in dict(train=2, test=3, unlabeled=17).items():
        files[f"stl10_binary/{split}_X.bin"] = count[: n * 3 * 96 * 96]
        files[f"stl10_binary/{split}_y.bin"] = count[1 : n + 1]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    *labels, shape, row = DOWNLOADED[name]
    parts = open_data("--data", f"{name}:{tmp_path}")
    assert [images.labels.tolist() for images in parts] == labels
    assert parts[0].data[0].shape == shape and parts[0].data[0, 0, 1, :3].tolist() == row


def test_patterns_are_the_same_in_every_run_and_their_mean_colour_does_not_tell_the_label():
    images, again, test = [common.draw_patterns(n, split) for n, split in [(2000, 0), (2000, 0), (500, 1)]]
    assert images.data.shape == (2000, 3, 32, 32) and images.data.dtype == torch.uint8
    assert images.labels.unique().tolist() == list(range(len(images.classes)))
    assert torch.equal(images.data, again.data) and not torch.equal(images.data[:500], test.data)
    colours, test_colours = [part.data.float().mean((2, 3)) for part in (images, test)]
    nearest = torch.cdist(test_colours, colours).argmin(1)
    assert (images.labels[nearest] == test.labels).double().mean() < 0.2
