"""Segmentation and depth: metrics against a loop over pixels, layouts of data, ranks, resume, wrong data."""

import argparse
import math
import signal

import numpy
import pytest
import torch
from conftest import EVALUATION, read_log, same, signals, state_of, train
from PIL import Image

import common
import eval_linear as ev

FLAGS = "--batch-size 4 --size 64 --lr 0.05".split()


def evaluate(flags, data, out):
    """Run an evaluation of dense predictions in this process; its exit code."""
    return train("--data", data, "--out", out, *FLAGS, *flags.split(), module=ev, usual=EVALUATION)


def make_pair(image, target, i, size=(40, 72), depth=False, classes=3):
    """Write an image of vertical bars, and what each bar is: a class, or depth in millimetres; 0 on top."""
    height, width = size[0] + i % 8, size[1] - i % 8  # of different sizes
    bars = torch.arange(width) * classes // width
    colours = torch.tensor([[30, 200, 90], [220, 40, 60], [90, 120, 250]], dtype=torch.uint8)
    pixels = colours[(bars + i) % classes].expand(height, -1, -1).clone()
    pixels += (torch.rand(height, width, 3, generator=torch.Generator().manual_seed(i)) * 20).byte()
    labels = ((bars + i) % classes).expand(height, -1).clone()
    values = (1000 * 2**labels).numpy().astype("uint16") if depth else labels.numpy().astype("uint8")
    values[:8] = 0 if depth else 255
    for path, array in ((image, pixels.numpy()), (target, values)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def make_data(root, depth=False, train_images=8, test_images=5):
    for split, count in (("train", train_images), ("val", test_images)):
        for i in range(count):
            target = root / split / ("depth" if depth else "masks") / f"{i}.png"
            make_pair(root / split / "images" / f"{i}.jpg", target, i, depth=depth)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """By mode, a folder of 8 training and 5 test images of three vertical bars."""
    root = tmp_path_factory.mktemp("dense")
    return {mode: make_data(root / mode, mode == "depth") for mode in ev.DENSE}


def test_metrics_of_masks_are_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(0)
    counts = numpy.zeros((4, 4))
    sums = 0
    for size in ((5, 7), (6, 4)):
        scores = torch.randn(4, *size, generator=generator)
        target = torch.randint(0, 3, size, generator=generator).byte()  # class 3 is only predicted
        target[0, :3] = 255
        sums = sums + ev.confusion(scores, target)
        for y in range(size[0]):
            for x in range(size[1]):
                if target[y, x] != 255:
                    counts[target[y, x], scores[:, y, x].argmax()] += 1
    iou = []
    for c in range(4):
        iou.append(100 * counts[c, c] / (counts[c].sum() + counts[:, c].sum() - counts[c, c]))
    found = ev.metrics_of(sums, "abcd")
    expected = dict(zip("abcd", iou, strict=True))
    assert found.pop("iou") == pytest.approx(expected, abs=1e-10)
    accuracy = 100 * counts.trace() / counts.sum()
    assert found == pytest.approx(dict(miou=sum(iou) / 4, pixel_accuracy=accuracy), abs=1e-10)
    sums[3], sums[:, 3] = 0, 0  # a class that is neither in labels nor in predictions has no IoU
    assert list(ev.metrics_of(sums, "abcd")["iou"]) == list("abc")


def test_metrics_of_depths_are_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(0)
    sums, errors = 0, []
    for size in ((5, 7), (6, 4)):
        target = torch.rand(size, generator=generator) * 4
        scores = (target + 0.1).log()[None] + torch.randn(1, *size, generator=generator) * 0.4
        target[0, :3] = 0
        sums = sums + ev.depth_errors(scores, target)
        for t, s in zip(target.flatten().tolist(), scores.flatten().tolist(), strict=True):
            if t > 0:
                p = math.exp(s)
                errors.append([max(p / t, t / p), abs(p - t) / t, (p - t) ** 2])
    ratio, rel, square = numpy.array(errors).T
    expected = dict(rel=100 * rel.mean(), rms=math.sqrt(square.mean()))
    for k in (1, 2, 3):
        expected[f"delta{k}"] = 100 * (ratio < 1.25**k).mean()
    assert ev.metrics_of(sums, []) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("mode", ev.DENSE)
def test_pixels_that_do_not_count_change_nothing(mode):
    args = argparse.Namespace(mode=mode)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 8, 8, generator=generator)
    target = torch.rand(2, 8, 8, generator=generator) + 0.5
    if mode == "segment":
        target = (target * 1.5).byte()
    target[:, :3] = 255 if mode == "segment" else 0
    other = scores.clone()
    other[:, :, :3] = 7
    losses, metrics = [], []
    for values in (scores, other, scores[:, :, 3:]):
        values.requires_grad_()
        counted = target[:, -values.shape[2] :]
        losses.append(ev.dense_loss(values, counted, args))
        losses[-1].backward()
        count = ev.confusion if mode == "segment" else ev.depth_errors
        metrics.append(ev.metrics_of(count(values[0].detach(), counted[0]), "abc"))
    assert losses[0] == losses[1] and metrics[0] == metrics[1] == metrics[2]
    torch.testing.assert_close(losses[0], losses[2])
    assert not scores.grad[:, :, :3].any() and scores.grad[:, :1, 3:].all()


def test_image_and_target_get_the_same_crop_on_any_number_of_workers(data):
    batches = []
    for workers in (0, 2):
        flags = f"--mode segment --data {data['segment']} --workers {workers}"
        args = ev.get_args([*EVALUATION, *FLAGS, *flags.split()])
        args, parts = ev.plan(args, "segment", *ev.open_dense(args))
        batches.append(list(ev.dense_batches(args, parts, torch.device("cpu"), 0, 4)))
    assert same(*batches)
    for _, x, target in batches[0]:
        red = x[:, 0] > x[:, 1] + 1
        counted = target != 255
        assert (red == (target == 1))[counted].float().mean() > 0.95 and counted.float().mean() > 0.3
    (_, first, _), _, (_, later, _), _ = batches[0]
    assert first.shape == (4, 3, 64, 64) and not torch.equal(first, later)


@pytest.mark.parametrize("mode", ev.DENSE)
def test_two_ranks_find_what_one_finds(mode, tmp_path, data, on_ranks):
    one, two = tmp_path / "one", tmp_path / "two"  # 5 test images: 3 and 2 on two ranks
    assert evaluate(f"--mode {mode}", data[mode], one) == 0
    assert on_ranks(evaluate, 2, f"--mode {mode}", data[mode], two) == [0, 0]
    (expected,), (found,) = read_log(one, "results.jsonl"), read_log(two, "results.jsonl")
    torch.testing.assert_close(found["results"], expected["results"], rtol=0, atol=0.1)
    for before, after in zip(read_log(one / mode), read_log(two / mode), strict=True):
        assert before["loss"] == pytest.approx(after["loss"], abs=1e-4)


def fine_tuning_step(mode):
    """Loss and gradients of a batch of four, in float64, of which each rank has its rows."""
    args = argparse.Namespace(
        mode=mode, lr_backbone=0.1, stem="imagenet", output_stride=32, seed=0, compile=False
    )
    torch.manual_seed(0)
    online = ev.dense_network(args, common.resnet("resnet18")[0], 3).double()
    model = common.parallel(online, args, torch.device("cpu"))
    x = torch.randn(4, 3, 64, 64).double()
    target = (1 + 2 * torch.rand(4, 64, 64)).byte()
    target[:2, :50] = 255  # fewer pixels count on rank 0
    if mode == "depth":
        target = target.float() * (target < 255)
    rows = torch.arange(4).chunk(common.world())[common.rank()]
    loss = ev.dense_loss(model(x[rows]), target[rows], args)
    loss.backward()
    return loss, [parameter.grad for parameter in online.parameters()]


@pytest.mark.parametrize("mode", ev.DENSE)
def test_a_step_of_fine_tuning_on_two_ranks_is_that_of_one(mode, on_ranks):
    expected = fine_tuning_step(mode)
    for found in on_ranks(fine_tuning_step, 2, mode):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flags", ["--mode segment", "--mode depth --lr-backbone 0.02"])
def test_an_interrupted_training_ends_bit_for_bit_as_one_that_was_not(flags, tmp_path, data):
    mode = flags.split()[1]
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert evaluate(flags, data[mode], whole) == 0
    with signals(signal.SIGTERM):
        assert evaluate(flags, data[mode], out) == 0 and not (out / "results.jsonl").exists()
    assert evaluate(flags, data[mode], out) == 0
    assert same(state_of(out / mode), state_of(whole / mode))
    (found,), (expected,) = read_log(out, "results.jsonl"), read_log(whole, "results.jsonl")
    assert found["results"] == expected["results"] and (out / "predictions.png").exists()


def test_the_backbone_is_frozen_unless_it_has_a_rate(tmp_path, data):
    before = ev.load_backbone(ev.get_args(EVALUATION)).state_dict()
    before = {name: value for name, value in before.items() if "num_batches" not in name}  # not counted
    for rate in (0, 0.01):
        out = tmp_path / str(rate)
        assert evaluate(f"--mode segment --lr-backbone {rate} --epochs 4", data["segment"], out) == 0
        online = state_of(out / "segment")["online"]
        kept = [same(value, online[f"backbone.{name}"]) for name, value in before.items()]
        assert all(kept) if rate == 0 else not any(kept)
    losses = [record["loss"] for record in read_log(out / "segment")]
    assert sum(losses[4:]) < sum(losses[:4])
    again = ev.get_args(["--backbone", f"{out}/segment/model.pth"])
    loaded = ev.load_backbone(again).state_dict()
    assert all(same(loaded[name], online[f"backbone.{name}"]) for name in before)


def test_bottlenecks_are_dilated_with_the_same_weights():
    for arch, stem, side in (
        ("resnet18", "imagenet", 2),
        ("resnet50", "imagenet", 8),
        ("resnet18", "cifar", 8),
    ):
        args = argparse.Namespace(arch=arch, stem=stem, seed=0, lr_backbone=0.0)
        net, _ = common.resnet(arch, stem)
        args.output_stride = ev.output_stride(net, args)
        online = ev.dense_network(args, net.eval(), 5).eval()
        assert online(torch.zeros(1, 3, 64, 64)).shape == (1, 5, side, side)
        assert 64 // side == args.output_stride
        assert same(dict(online.backbone.state_dict()), dict(net.state_dict()))


def make_layout(root, layout):
    """The flags of a small data set in one of three layouts, with the classes of its first training mask."""
    parts = {
        "folder": ("train/images train/masks val/images val/masks", ""),
        "ade20k": ("images/training annotations/training images/validation annotations/validation", ""),
        "voc2012": ("JPEGImages SegmentationClass JPEGImages SegmentationClass", "VOCdevkit/VOC2012"),
    }
    names, below = parts[layout]
    folders = [root / below / name for name in names.split()]
    for split, (images, masks) in zip(("train", "val"), (folders[:2], folders[2:]), strict=True):
        for i in range(4):
            mask = masks / f"{split}{i}.png"
            make_pair(images / f"{split}{i}.jpg", mask, i)
            labels = numpy.array(Image.open(mask))
            if layout == "ade20k":
                labels += 1  # 255 is 0, which does not count
            picture = Image.fromarray(labels)
            if layout == "voc2012":
                picture.putpalette(range(255, -1, -1), "RGB")
            picture.save(mask)
        if layout == "voc2012":
            names = root / below / f"ImageSets/Segmentation/{split}.txt"
            names.parent.mkdir(parents=True, exist_ok=True)
            names.write_text("".join(f"{split}{i}\n" for i in range(4)))
    return f"voc2012:{root}" if layout == "voc2012" else str(root)


@pytest.mark.parametrize("layout", ["folder", "ade20k", "voc2012"])
def test_masks_are_read_in_each_layout(layout, tmp_path, capsys):
    data = make_layout(tmp_path / "data", layout)
    args = ev.get_args([*EVALUATION, "--mode", "segment", "--data", data])
    parts = ev.open_dense(args)
    for images in parts:
        assert len(images) == 4
        image, target, _ = ev.DenseCrops(images, args)[None, 1]
        assert image.shape[1:] == target.shape == (41, 71) and (target[:8] == 255).all()
        assert torch.equal(target[8], (torch.arange(71) * 3 // 71 + 1).byte() % 3)
    assert parts[0].classes == ["0", "1", "2"] and "3 classes" in capsys.readouterr().err
    assert evaluate("--mode segment --epochs 1", data, tmp_path / "out") == 0
    (record,) = read_log(tmp_path / "out", "results.jsonl")
    assert f"{data}: 4 training, 4 test images" in record["protocol"]


def test_depths_are_in_metres_and_crops_that_are_enlarged_are_nearer(data):
    flags = f"--mode depth --data {data['depth']} --depth-unit 500".split()
    args = ev.get_args([*EVALUATION, *FLAGS, *flags])
    images, _ = ev.open_dense(args)
    crops = ev.DenseCrops(images, args)
    image, target, _ = crops[None, 0]
    assert target.unique().tolist() == [0, 2, 4, 8]
    _, nearer = crops.crop(ev.tv_tensors.Image(image), ev.tv_tensors.Mask(target), 2 / 3, 0.5, 0.5, 0.9)
    assert nearer.shape == (64, 64) and set((3 * nearer).unique().tolist()) <= {0, 4, 8, 16}


def test_the_rate_is_chosen_on_training_images(tmp_path, data, monkeypatch):
    measured = []
    measure = ev.measure

    def spy(online, images, rows, *rest):
        measured.append((images.key, rows.tolist()))
        return measure(online, images, rows, *rest)

    monkeypatch.setattr(ev, "measure", spy)
    assert evaluate("--mode segment --lr 1e-9 0.05", data["segment"], tmp_path / "out") == 0
    (record,) = read_log(tmp_path / "out", "results.jsonl")
    assert len(record["grid"]) == 2 and list(record["results"]) == [
        max(record["grid"], key=record["grid"].get)
    ]
    (train, held), again, (test, rows) = measured
    assert again == (train, held) and len(held) == 1 and train != test and rows == [0, 1, 2, 3, 4]
    assert "chosen on 1 held-out" in record["protocol"]


def damage(root, kind):
    """Make one thing wrong in a data set of segmentation."""
    masks = root / "train/masks"
    if kind == "size":
        Image.new("L", (30, 20)).save(masks / "0.png")
    elif kind == "colours":
        Image.open(masks / "0.png").convert("RGB").save(masks / "0.png")
    elif kind == "16 bits":
        numbers = numpy.array(Image.open(masks / "0.png")).astype("uint16")
        Image.fromarray(numbers).save(masks / "0.png")
    elif kind == "class":
        Image.new("L", (72, 40), 7).save(root / "val/masks/0.png")
    elif kind == "missing":
        (masks / "0.png").unlink()
    elif kind == "ignored":
        for path in masks.iterdir():
            Image.new("L", Image.open(path).size, 255).save(path)
    elif kind == "layout":
        masks.rename(root / "train/labels")


@pytest.mark.parametrize(
    "kind, flags, message",
    [
        ("size", "", "0.png is of shape (20, 30) and uint8, its image of shape (40, 72)"),
        ("colours", "", "0.png is of shape (40, 72, 3) and uint8"),
        ("16 bits", "", "0.png is of shape (40, 72) and uint16"),
        ("class", "", "test masks have class 7, training masks 0 to 2"),
        ("missing", "", "1 of 8 images have no target that can be read, such as"),
        ("ignored", "", "no pixel of"),
        ("layout", "", "train/masks"),
        ("", "--mode depth", "train/depth"),
        ("", "--mode segment,knn", "--mode segment,knn: segment has data of its own"),
        ("", "--labels 10", "--labels 10 is for labels of images"),
        ("", "--batch-size 9", "--batch-size 9 is more than the 8 images to train on"),
        ("", "--data voc2012:/nowhere", "voc2012 is not in /nowhere"),
    ],
)
def test_bad_input_gets_one_sentence(kind, flags, message, tmp_path, capsys):
    root = make_data(tmp_path / "data")
    damage(root, kind)
    assert evaluate(f"--mode segment {flags}", root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_an_image_that_cannot_be_read_is_named_and_its_pixels_do_not_count(tmp_path, capsys):
    root = make_data(tmp_path / "data", train_images=4, test_images=101)
    path = root / "val/images/7.jpg"
    path.write_bytes(path.read_bytes()[:700])  # its header is whole
    assert evaluate("--mode segment --epochs 1", root, tmp_path / "out") == 0
    assert capsys.readouterr().err.count("7.jpg") == 1
