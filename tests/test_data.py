"""Images from folders as people have them, from torchvision's data sets, and built-in ones."""

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy
import pytest
import torch
import torchvision
from conftest import FORKSERVER, TINY, exit_code, launch, make_folder, read_log, state_of, train
from PIL import Image

import common
import music

CPU = torch.device("cpu")


def open_data(*flags):
    return common.open_data(music.get_args([*TINY, *map(str, flags)]), CPU)


def write(root, *names):
    """Save a picture under each name."""
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
        ("train/a/x.jpg val/x.jpg val/e/x.txt", ["a"], [0], None, "val with class folders as in train"),
    ],
)
def test_val_is_matched_by_name_or_knn_is_off(names, classes, labels, known, sentence, tmp_path, capsys):
    write(tmp_path, *names.split())
    images, test = common.open_folder(tmp_path)
    assert images.classes == classes and images.labels.tolist() == labels
    assert (test and test.labels.tolist()) == known and sentence in capsys.readouterr().err


def test_links_are_followed_each_folder_once_and_names_may_be_odd(tmp_path):
    odd = [" .jpg", "new\nline.jpg", "\udcff\udcfe.jpg", "-x.jpg", "'\"[*].jpg", "%s{0}.jpg"]
    write(tmp_path, *[f"train/b[b/{name}" for name in odd], "elsewhere/x.jpg")
    links = {"link": "../elsewhere", "link.jpg": "../elsewhere/x.jpg"}
    links |= {"a": "b[b", "b[b/up": ".."}  # the images of b[b again, and an endless path
    for link, target in links.items():
        (tmp_path / "train" / link).symlink_to(target)
    images = common.list_folder(tmp_path / "train")
    assert images.classes == ["b[b", "link"] and len(images) == 8
    names = [os.path.basename(images.name(i)) for i in range(8)]
    labels = dict(zip(names, images.labels.tolist(), strict=True))
    assert labels == {**dict.fromkeys(odd, 0), "x.jpg": 1, "link.jpg": -1}
    assert all(images.read(i).shape == (3, 24, 20) for i in range(8))


def make_zip(path, root, *prefixes, method=zipfile.ZIP_STORED, start=0):
    """Zip a folder, with each file below each of the prefixes, after a hole of `start` bytes."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        file.seek(start)
        with zipfile.ZipFile(file, "w", method) as archive:
            for name in sorted(Path(root).rglob("*"), reverse=True):
                for prefix in prefixes:
                    archive.write(name, f"{prefix}{name.relative_to(root)}")


@pytest.mark.parametrize("layout", ["stored", "deflated", "deep", "two", "two, flat", "large"])
def test_a_zip_is_the_folder_it_was_made_from(layout, folder, tmp_path):
    path = tmp_path / "images.zip"
    root = shutil.copytree(folder, tmp_path / "images")
    write(root, "train/b/\u00e9\u4e2d.jpg", "train/c/x.jpg")
    if layout == "stored":
        subprocess.run(["zip", "-0", "-qr", path, "train", "val"], cwd=root, check=True)
    elif layout == "deflated":
        make_zip(path, root, "", method=zipfile.ZIP_DEFLATED)
    elif layout == "deep":
        make_zip(path, root, "sets/of images/", "sets/of images/more/train/", "__MACOSX/._", ".hidden/")
    elif layout == "large":
        make_zip(path, root, "", start=5 << 30)
    else:
        path = tmp_path / "zips"
        for part in ("train", "val"):
            make_zip(path / f"{part}.zip", root / part, "" if layout == "two, flat" else f"{part}/")
    opened = len(os.listdir("/proc/self/fd"))
    for images, expected in zip(common.open_folder(path), common.open_folder(root), strict=True):
        assert images.key == expected.key and images.classes == expected.classes
        assert torch.equal(images.labels, expected.labels)
        names = [os.path.basename(images.name(i)) for i in range(len(images))]
        assert names == [os.path.basename(expected.name(i)) for i in range(len(images))]
        assert all(torch.equal(images.read(i), expected.read(i)) for i in range(len(images)))
    assert len(os.listdir("/proc/self/fd")) - opened <= 1 + ("two" in layout)


@pytest.mark.parametrize(
    "names, top, classes",  # in a folder; where train/ is looked for in its zip
    [
        ("2020/a/x.jpg 2021/train/x.jpg", "", ["2020", "2021"]),
        ("train/train/x.jpg train/val/x.jpg train/a/x.jpg", "", ["a", "train", "val"]),
        ("test/train/a/x.jpg test/val/a/x.jpg", "test", ["a"]),
        ("train/a/x.jpg", "", ["a"]),
    ],
)
def test_folders_of_a_zip_mean_what_they_mean_on_a_disk(names, top, classes, tmp_path):
    write(tmp_path / "photos", *names.split())
    make_zip(tmp_path / "photos.zip", tmp_path / "photos", "")
    for root in (tmp_path / "photos.zip", tmp_path / "photos" / top):
        images, test = common.open_folder(root)
        assert images.classes == classes and len(images) == len(classes)
        assert (test is None) == (top == "")


def test_a_damaged_member_is_an_unreadable_image(folder, tmp_path, capsys):
    make_zip(tmp_path / "images.zip", folder, "")
    images, _ = common.open_folder(tmp_path / "images.zip")
    content = bytearray((tmp_path / "images.zip").read_bytes())
    content[int(images.data[1]["offset"]) + 400] ^= 1  # which Pillow would not notice
    (tmp_path / "images.zip").write_bytes(content)
    images.unreadable_limit = 1
    assert images.read(0) is not None and images.read(1) is None
    images.report([1])
    assert "unreadable, skipped: 'train/a/001.jpg'" in capsys.readouterr().err


ARCHIVES = {  # a name, how it is made in a shell, and what the error says
    "x.zip": ("echo damaged > x.zip", "x.zip cannot be read as a zip: File is not a zip file"),
    "bzip2.zip": ("zip -qr -Z bzip2 bzip2.zip train", "train/a/x.jpg is compressed by method 12, use zip -0"),
    "key.zip": ("zip -qr -P secret key.zip train", "is encrypted"),
    "shards": ("mkdir shards && tar -czf shards/0.tar.gz train", "shards/0.tar.gz: a tar has no index"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_other_archives_are_refused_with_a_sentence(name, tmp_path, monkeypatch, capsys):
    command, sentence = ARCHIVES[name]
    write(tmp_path, "train/a/x.jpg")
    monkeypatch.chdir(tmp_path)
    subprocess.run(command, shell=True, check=True)
    assert exit_code(lambda: common.open_folder(Path(name))) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "make, tars",
    [
        ("tar -cf images.tar -C in .", "images.tar"),
        ("tar -czf train.tar.gz -C in train && tar -cf val.tar -C in val", "train.tar.gz val.tar"),
        ("tar -czf train.tgz -C in/train . && tar -cf val.tar -C in/val b", "train.tgz val.tar"),
    ],
)
def test_the_command_that_makes_tars_a_zip_runs(make, tars, tmp_path, monkeypatch, capsys):
    write(tmp_path, "in/train/a/x.jpg", "in/train/b/x.jpg", "in/val/b/x.jpg")
    monkeypatch.chdir(tmp_path)
    subprocess.run(make, shell=True, check=True)
    first, *more = tars.split()
    assert exit_code(lambda: common.open_folder(Path(first))) == 2
    command = capsys.readouterr().err.partition("python -c")[2].strip()
    subprocess.run(" ".join([sys.executable, "-c", command, *more]), shell=True, check=True)
    images, test = common.open_folder(tmp_path / "images.zip")
    assert images.classes == ["a", "b"] and test.labels.tolist() == [1]


def test_a_folder_named_as_a_data_set_is_mentioned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "data").touch()
    assert exit_code(lambda: open_data("--data=cifar10")) == 2
    assert "or --data ./cifar10 for the folder of that name" in capsys.readouterr().err


def lose_a_worker(errors, *flags):
    """Lose a worker in a process of its own, since torch notices at once only in a process's first run.

    Its default is not to fork, as in Python 3.14.
    """
    assert multiprocessing.get_start_method() == "forkserver"
    common.Crops.cut = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        raise SystemExit(launch("music.py", *TINY, "--workers=1", *flags))


def test_a_killed_worker_ends_the_run_with_a_sentence(big_folder, tmp_path):
    flags = [tmp_path / "errors", "--data", big_folder, "--out", tmp_path / "out"]
    process = FORKSERVER.Process(target=lose_a_worker, args=flags)
    process.start()
    process.join(200)
    message = (tmp_path / "errors").read_text().partition("music.py: error: ")[2]
    assert "lost (DataLoader worker" in message and "--workers 0, or docker run --shm-size" in message
    assert process.exitcode == 2


@pytest.mark.parametrize(
    "code, text",
    [
        (2, "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
        (2, "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ..."),
        (2, "DataLoader timed out after 300 seconds"),
        (0, "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: size mismatch"),
    ],
)
def test_only_errors_of_a_lost_worker_become_a_sentence(code, text):
    assert exit_code(lambda: common.refuse_lost_worker(RuntimeError(text))) == code


COLOURS = {"L": 153, "LA": (153, 9), "CMYK": (0, 0, 0, 102), "I;16": 39423, "I;16B": 39423}  # 153 in 8 bits
FILES = "L.gif L.webp L.bmp L.ppm L.tiff LA.png CMYK.JPEG I;16.png I;16B.tif".split()


@pytest.mark.parametrize("name", FILES)
def test_all_usual_formats_are_read_and_16_bits_are_not_clipped(name, tmp_path):
    mode, _ = name.split(".")
    Image.new(mode, (30, 20), COLOURS[mode]).save(tmp_path / name)
    image = common.list_folder(tmp_path).read(0)
    assert image.dtype == torch.uint8 and image.shape == (3, 20, 30)
    assert (image.float() - 153).abs().max() <= 1


def test_unreadable_images_are_skipped_and_named_above_1_percent_are_fatal(tmp_path, capsys):
    make_folder(tmp_path, 64, splits=["train"])
    make_folder(tmp_path, 1, splits=["val"])
    args = music.get_args([*TINY, f"--data={tmp_path}", "--workers=1"])
    damaged = tmp_path / "train/a/005.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    (tmp_path / "val/a/000.jpg").write_bytes(b"damaged")
    images, _, test = common.open_data(args, CPU)
    net, _ = common.resnet("resnet18")
    assert "knn" in common.evaluate(net, Mock(labelled=False), images, test, args)  # half of test is damaged
    assert len(list(common.batches(images, args, CPU, 0, 16))) == 16
    assert capsys.readouterr().err.count("train/a/005.jpg") == 1
    Image.new("F", (24, 20)).save(damaged.with_name("006.jpg"), "TIFF")  # of unknown range
    with pytest.raises(SystemExit, match="2"):
        list(common.batches(images, args, CPU, 0, 8))
    assert "2 of 128 images of --data cannot be read, more than 1 %" in capsys.readouterr().err
    (tmp_path / "train").rename(tmp_path / "moved")
    with pytest.raises(SystemExit, match="2"):
        list(common.batches(images.take(torch.arange(128)), args, CPU, 0, 8))


def test_small_images_of_one_size_are_in_memory_others_are_paths(folder, big_folder, tmp_path):
    assert common.to_memory(common.list_folder(folder), CPU).data.shape == (96, 3, 20, 24)
    for root in (big_folder, make_folder(make_folder(tmp_path, 2), 1, (24, 24), ["more"])):
        images = common.to_memory(common.list_folder(root), CPU)
        assert not images.in_memory and len(pickle.dumps(images)) < images.data.nbytes + 2000


def test_tiny_imagenet_as_downloaded_resumes_when_moved_not_when_changed(tmp_path, capsys):
    make_folder(tmp_path, 8, splits=["train"], classes=["n1/images", "n2/images"])
    make_folder(tmp_path, 2, splits=["val", "test"], classes=["images"])
    flags = ["--epochs=1", "--out", tmp_path / "out", "--data"]
    assert train(*flags, tmp_path) == 0
    assert "no kNN" in capsys.readouterr().err and "knn" not in read_log(tmp_path / "out")[-1]
    assert not state_of(tmp_path / "out")["probe"]["_extra_state"]["state"]  # it is off
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
    """The files are laid out as downloaded, with few images, whose bytes count up."""
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


def test_patterns_never_change_and_mean_colour_does_not_predict_labels():
    images, test = common.draw_patterns(2000, 0), common.draw_patterns(500, 1)
    assert images.data.shape == (2000, 3, 32, 32) and images.data.dtype == torch.uint8
    assert images.labels.unique().tolist() == list(range(10))
    assert torch.equal(images.data, common.draw_patterns(2000, 0).data)
    assert not torch.equal(images.data[:500], test.data)
    colours, test_colours = [part.data.float().mean((2, 3)) for part in (images, test)]
    nearest = torch.cdist(test_colours, colours).argmin(1)
    assert (images.labels[nearest] == test.labels).double().mean() < 0.2
