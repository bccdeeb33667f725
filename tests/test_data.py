"""Images of folders as people have them, of torchvision's data sets, and those that are drawn."""

import os
import pickle
from pathlib import Path

import numpy
import pytest
import torch
import torchvision
from conftest import TINY, make_folder, read_log, train
from PIL import Image

import common
import music

CPU = torch.device("cpu")


def open_data(*flags):
    return common.open_data(music.get_args([*TINY, *map(str, flags)]), CPU)


def write(root, *names):
    """A picture under each name."""
    for name in names:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24)).save(path, "JPEG")


@pytest.mark.parametrize(
    "names, classes, labels, known, sentence",  # known: the labels of test images
    [
        ("train/a/x.jpg train/c/x.jpg val/c/x.jpg val/b/x.jpg", ["a", "c"], [0, 1], [1], "1 of 2"),
        ("train/a/deep/er/x.jpg test/a/x.jpg", ["a"], [0], [0], "1 of 1"),
        ("b/x.jpg a/x.jpg a/._x.jpg .h/x.jpg e/x.txt x.jpg", ["a", "b"], [0, 1, -1], None, "no kNN"),
        ("train/a/x.jpg val/x.jpg val/e/x.txt", ["a"], [0], None, "no folders named as"),
    ],
)
def test_val_is_matched_by_name_or_knn_is_off(names, classes, labels, known, sentence, tmp_path, capsys):
    write(tmp_path, *names.split())
    images, test = common.open_folder(tmp_path)
    assert images.classes == classes and images.labels.tolist() == labels
    assert (test and test.labels.tolist()) == known and sentence in capsys.readouterr().err


def test_links_are_followed_and_names_may_be_odd(tmp_path):
    odd = [" .jpg", "new\nline.jpg", "\udcff\udcfe.jpg", "-x.jpg", "'\"[*].jpg", "%s{0}.jpg"]
    write(tmp_path, *[f"train/a[b/{name}" for name in odd], "elsewhere/x.jpg")
    (tmp_path / "train/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/link.jpg").symlink_to(tmp_path / "elsewhere/x.jpg")
    images = common.list_folder(tmp_path / "train")
    names = [os.path.basename(os.fsdecode(path)) for path in images.data]
    labels = dict(zip(names, images.labels.tolist(), strict=True))
    assert labels == {**dict.fromkeys(odd, 0), "x.jpg": 1, "link.jpg": -1}
    assert all(images.read(i).shape == (3, 24, 20) for i in range(8))


COLOURS = {"L": 153, "LA": (153, 9), "CMYK": (0, 0, 0, 102), "I;16": 39423, "I;16B": 39423}  # 153 in 8 bits
FILES = "L.gif L.webp L.bmp L.ppm L.tiff LA.png CMYK.JPEG I;16.png I;16B.tif".split()


@pytest.mark.parametrize("name", FILES)
def test_all_usual_formats_are_read_and_16_bits_are_not_clipped(name, tmp_path):
    mode, _ = name.split(".")
    Image.new(mode, (30, 20), COLOURS[mode]).save(tmp_path / name)
    image = common.list_folder(tmp_path).read(0)
    assert image.dtype == torch.uint8 and image.shape == (3, 20, 30)
    assert (image.float() - 153).abs().max() <= 1


def test_unreadable_images_are_skipped_and_named_and_above_1_percent_the_run_stops(tmp_path, capsys):
    make_folder(tmp_path, 64, splits=["train"])
    args = music.get_args([*TINY, f"--data={tmp_path}", "--workers=1"])
    damaged = tmp_path / "train/a/005.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    images, _, _ = common.open_data(args, CPU)
    assert len(list(common.batches(images, args, CPU, 0, 16))) == 16
    assert capsys.readouterr().err.count("train/a/005.jpg") == 1
    Image.new("F", (24, 20)).save(damaged.with_name("006.jpg"), "TIFF")  # of unknown range
    with pytest.raises(SystemExit, match="2"):
        list(common.batches(images, args, CPU, 0, 8))
    assert "2 of 128 images of --data cannot be read, more than 1 %" in capsys.readouterr().err
    (tmp_path / "train").rename(tmp_path / "moved")
    with pytest.raises(SystemExit, match="2"):
        list(common.batches(images.take(torch.arange(128)), args, CPU, 0, 8))


def test_small_images_of_one_size_are_in_memory_others_are_paths_in_an_array(folder, big_folder, tmp_path):
    assert common.to_memory(common.list_folder(folder), CPU).data.shape == (96, 3, 20, 24)
    for root in (big_folder, make_folder(make_folder(tmp_path, 2), 1, (24, 24), ["more"])):
        images = common.to_memory(common.list_folder(root), CPU)
        assert not images.in_memory and len(pickle.dumps(images)) < images.data.nbytes + 2000


def test_tiny_imagenet_as_downloaded_trains_and_goes_on_elsewhere_but_not_when_changed(tmp_path, capsys):
    make_folder(tmp_path, 8, splits=["train"], classes=["n1/images", "n2/images"])
    make_folder(tmp_path, 2, splits=["val", "test"], classes=["images"])
    flags = ["--epochs=1", "--out", tmp_path / "out", "--data"]
    assert train(*flags, tmp_path) == 0
    assert "no kNN" in capsys.readouterr().err and "knn" not in read_log(tmp_path / "out")[-1]
    moved = (tmp_path / "train").rename(tmp_path / "moved")
    assert train(*flags, moved) == 0
    (moved / "n1/images/000.jpg").rename(moved / "n1/0.jpg")
    assert train(*flags, moved) == 2
    assert "--data has other images than the run began with" in capsys.readouterr().err


def test_a_subset_is_the_first_images_of_each_class(big_folder):
    images, _, test = open_data("--data", big_folder, "--subset=9")
    names = [os.fsdecode(path)[-9:] for path in images.data]
    assert names == [f"{label}/{i:03}.jpg" for label in "ab" for i in range(9)] and len(test) == 40
    assert images.take(torch.arange(2)).key != images.take(torch.arange(1, 3)).key
    assert len(open_data(f"--data={big_folder}/train/a", "--subset=17")[0]) == 17


@pytest.mark.parametrize(
    "name, labels, pixel",  # labels of training, bank and test images; the third pixel of the second row
    [("cifar10", [[3, 1] * 5, [3, 1] * 5, [3, 1]], 34), ("stl10", [[-1] * 4, [0, 1], [0, 1, 2]], 193)],
)
def test_data_sets_of_torchvision_are_read_by_name(name, labels, pixel, tmp_path, monkeypatch):
    """From files as they are downloaded, with few images, whose bytes count up."""
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda *_: True)
    cifar, stl = tmp_path / "cifar-10-batches-py", tmp_path / "stl10_binary"
    cifar.mkdir()
    stl.mkdir()
    count = numpy.arange(4 * 3 * 96 * 96).astype(numpy.uint8)
    batch = pickle.dumps(dict(data=count[: 2 * 3072].reshape(2, 3072), labels=[3, 1], label_names=[]))
    for file in ["batches.meta", "test_batch", *[f"data_batch_{i}" for i in range(1, 6)]]:
        (cifar / file).write_bytes(batch)
    (stl / "class_names.txt").touch()
    for split, n in dict(train=2, test=3, unlabeled=4).items():
        count[: n * 3 * 96 * 96].tofile(stl / f"{split}_X.bin")
        count[1 : n + 1].tofile(stl / f"{split}_y.bin")
    parts = open_data("--data", f"{name}:{tmp_path}", "--batch-size=2")
    assert [images.labels.tolist() for images in parts] == labels and parts[0].data[0, 0, 1, 2] == pixel


def test_patterns_are_the_same_in_every_run_and_their_mean_colour_does_not_tell_the_label():
    images, test = common.draw_patterns(2000, 0), common.draw_patterns(500, 1)
    assert images.data.shape == (2000, 3, 32, 32) and images.data.dtype == torch.uint8
    assert images.labels.unique().tolist() == list(range(10))
    assert torch.equal(images.data, common.draw_patterns(2000, 0).data)
    assert not torch.equal(images.data[:500], test.data)
    colours, test_colours = [part.data.float().mean((2, 3)) for part in (images, test)]
    nearest = torch.cdist(test_colours, colours).argmin(1)
    assert (images.labels[nearest] == test.labels).double().mean() < 0.2
