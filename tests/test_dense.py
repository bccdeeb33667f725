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


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_pair(image, target, i, layout="masks"):
    """An image of three vertical bars, and the class of each, or its depth in millimetres; 0 on top."""
    height, width = 40 + i % 8, 72 - i % 8
    labels = ((torch.arange(width) * 3 // width + i) % 3).expand(height, -1)
    colours = torch.tensor([[30, 200, 90], [220, 40, 60], [90, 120, 250]])
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(i)) * 20
    write(image, (colours[labels] + noise).clamp(max=255).byte().numpy())
    values = (1000 * 2**labels).numpy().astype("uint16") if layout == "depth" else labels.byte().numpy()
    values[:8] = 0 if layout == "depth" else 255
    if layout == "ade20k":
        values += 1  # 255 is 0, which does not count
    write(target, values)


def make_data(root, layout="masks", counts=(8, 5)):
    folders = [root / folder for folder in ev.LAYOUTS[layout]]
    for images, targets, count in zip(folders[::2], folders[1::2], counts, strict=True):
        for i in range(count):
            make_pair(images / f"{i}.jpg", targets / f"{i}.png", i, layout)
    return root


def make_voc(root):
    """PASCAL VOC's layout: masks have palettes, and lists name the images of train and val."""
    top = root / "VOCdevkit/VOC2012"
    for split, count in dict(train=8, val=5).items():
        names = [f"{split}{i}" for i in range(count)]
        for i, name in enumerate(names):
            path = top / f"SegmentationClass/{name}.png"
            make_pair(top / f"JPEGImages/{name}.jpg", path, i)
            mask = Image.open(path)
            mask.putpalette(range(255, -1, -1), "RGB")
            mask.save(path)
        listed = top / f"ImageSets/Segmentation/{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(names))
    return f"voc2012:{root}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """By mode, a folder of 8 training and 5 test images."""
    layouts = dict(segment="masks", depth="depth")
    return {mode: make_data(tmp_path_factory.mktemp(mode), layout) for mode, layout in layouts.items()}


def crops_of(data, mode, *flags):
    """The DenseCrops of training images, and the arguments."""
    args = ev.get_args([*EVALUATION, *FLAGS, "--mode", mode, "--data", str(data), *flags])
    args, parts = ev.plan(args, mode, *ev.open_dense(args))
    return ev.DenseCrops(parts.train, args), args


def random_maps(mode, size):
    """Scores (2, 4, H, W) and targets (2, H, W) of which the first three rows do not count."""
    generator = torch.Generator().manual_seed(size[0])
    scores = torch.randn(2, 4, *size, generator=generator)
    target = torch.rand(2, *size, generator=generator) * 3 + 0.1
    if mode == "segment":
        target = target.byte()  # class 3 is rarely a label
    target[:, :3] = 255 if mode == "segment" else 0
    return scores, target


def test_metrics_of_masks_are_a_loop_over_pixels():
    counts = numpy.zeros((4, 4))
    sums = 0
    for size in ((5, 7), (6, 4)):
        scores, target = random_maps("segment", size)
        sums = sums + ev.confusion(scores, target)
        for label, column in zip(target.flatten(), scores.movedim(1, 3).reshape(-1, 4), strict=True):
            if label != 255:
                counts[label, column.argmax()] += 1
    iou = {}
    for c in range(4):
        iou["abcd"[c]] = 100 * counts[c, c] / (counts[c].sum() + counts[:, c].sum() - counts[c, c])
    metrics = ev.segment_metrics(sums, "abcd")
    assert metrics.pop("iou") == pytest.approx(iou, abs=1e-10)
    accuracy = 100 * counts.trace() / counts.sum()
    assert metrics == pytest.approx(dict(miou=sum(iou.values()) / 4, pixel_accuracy=accuracy), abs=1e-10)
    sums[3], sums[:, 3] = 0, 0  # a class that is neither in labels nor in predictions has no IoU
    assert list(ev.segment_metrics(sums, "abcd")["iou"]) == list("abc")


def test_metrics_of_depths_are_a_loop_over_pixels():
    sums, errors = 0, []
    for size in ((5, 7), (6, 4)):
        scores, target = random_maps("depth", size)
        sums = sums + ev.depth_errors(scores, target)
        for t, score in zip(target.flatten().tolist(), scores[:, 0].flatten().tolist(), strict=True):
            if t > 0:
                p = math.exp(score)
                errors.append([max(p / t, t / p), abs(p - t) / t, (p - t) ** 2])
    ratio, rel, square = numpy.array(errors).T
    expected = dict(rel=100 * rel.mean(), rms=math.sqrt(square.mean()))
    for k in (1, 2, 3):
        expected[f"delta{k}"] = 100 * (ratio < 1.25**k).mean()
    assert ev.depth_metrics(sums) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("mode", ev.DENSE)
def test_the_loss_is_the_mean_over_pixels_that_count(mode):
    args = argparse.Namespace(mode=mode)
    scores, target = random_maps(mode, (6, 7))
    scores.requires_grad_()
    loss = ev.dense_loss(scores, target, args)
    loss.backward()
    counted, labels = scores[:, :, 3:], target[:, 3:]
    if mode == "segment":
        expected = -counted.log_softmax(1).gather(1, labels[:, None].long()).mean()
    else:
        expected = (counted[:, 0] - labels.log()).abs().mean()
    torch.testing.assert_close(loss, expected)
    assert not scores.grad[:, :, :3].any() and scores.grad[:, :1, 3:].all()
    assert ev.dense_loss(scores[:, :, :3], target[:, :3], args) == 0


def test_image_and_target_get_the_same_crop_on_any_number_of_workers(data):
    batches = []
    for workers in ("0", "2"):
        crops, args = crops_of(data["segment"], "segment", "--workers", workers)
        order = common.epoch_order(8, args, 0, 4)
        batches.append(list(ev.dense_batches(crops.images, order, args, torch.device("cpu"))))
    assert same(*batches)
    for _, x, target in batches[0]:
        red = x[:, 0] > x[:, 1] + 1
        counted = target != 255
        assert x.shape == (4, 3, 64, 64) and counted.float().mean() > 0.3
        assert (red == (target == 1))[counted].float().mean() > 0.95


def test_a_crop_depends_on_seed_epoch_and_image(data):
    draws = []
    for seed in ("0", "1"):
        crops, _ = crops_of(data["segment"], "segment", "--seed", seed)
        crops.crop = lambda image, target, *numbers: (image, numbers)
        draws += [crops[place][1] for place in ((0, 0), (0, 1), (1, 0))]
        assert crops[0, 0][1] == crops[0, 0][1]
    assert len(set(draws)) == len(set(sum(draws, ()))) / 4 == 6


@pytest.mark.parametrize("mode", ev.DENSE)
def test_two_ranks_find_what_one_finds(mode, tmp_path, data, on_ranks):
    one, two = tmp_path / "one", tmp_path / "two"  # 5 test images: 3 and 2 on two ranks
    assert evaluate(f"--mode {mode}", data[mode], one) == 0
    assert on_ranks(evaluate, 2, f"--mode {mode}", data[mode], two) == [0, 0]
    (expected,), (found,) = read_log(one, "results.jsonl"), read_log(two, "results.jsonl")
    torch.testing.assert_close(found["results"], expected["results"], rtol=0, atol=0.1)
    for before, after in zip(read_log(one / mode), read_log(two / mode), strict=True):
        assert before["loss"] == pytest.approx(after["loss"], abs=1e-4)


def fine_tuning_step():
    """Loss and gradients of a batch of four, in float64, of which each rank has its rows."""
    args = ev.get_args([*EVALUATION, "--mode=segment", "--lr-backbone=0.1"])
    args.output_stride = 32
    online = ev.dense_network(args, common.resnet("resnet18")[0], 3).double()
    model = common.parallel(online, args, torch.device("cpu"))
    x = torch.randn(4, 3, 64, 64).double()
    target = (3 * torch.rand(4, 64, 64)).byte()
    target[:2, :50] = 255  # fewer pixels count on rank 0
    rows = torch.arange(4).chunk(common.world())[common.rank()]
    loss = ev.dense_loss(ev.predict(model, x[rows], target[rows], args), target[rows], args)
    loss.backward()
    return loss, [parameter.grad for parameter in online.parameters()]


def test_a_step_of_fine_tuning_on_two_ranks_is_that_of_one(on_ranks):
    expected = fine_tuning_step()
    for found in on_ranks(fine_tuning_step, 2):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_an_interrupted_training_ends_bit_for_bit_as_one_that_was_not(tmp_path, data):
    flags = "--mode depth --lr-backbone 0.02"
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert evaluate(flags, data["depth"], whole) == 0
    with signals(signal.SIGTERM):
        assert evaluate(flags, data["depth"], out) == 0 and not (out / "results.jsonl").exists()
    assert evaluate(flags, data["depth"], out) == 0
    assert same(state_of(out / "depth"), state_of(whole / "depth"))
    (found,), (expected,) = read_log(out, "results.jsonl"), read_log(whole, "results.jsonl")
    assert found["results"] == expected["results"] and (out / "predictions.png").exists()


def test_the_backbone_is_frozen_unless_it_has_a_rate(tmp_path, data):
    before = ev.load_backbone(ev.get_args(EVALUATION))[0].state_dict()
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
    loaded = ev.load_backbone(again)[0].state_dict()
    assert all(same(loaded[name], online[f"backbone.{name}"]) for name in before)


@pytest.mark.parametrize(
    "arch, stem, stride",
    [("resnet18", "imagenet", 32), ("resnet50", "imagenet", 8), ("resnet18", "cifar", 8)],
)
def test_bottlenecks_are_dilated_and_see_what_they_saw(arch, stem, stride):
    net, width = common.resnet(arch, stem)
    net.eval()
    args = argparse.Namespace(arch=arch, stem=stem, seed=0, lr_backbone=0.0, precision="fp32")
    args.output_stride = ev.output_stride(net, args)
    online = ev.dense_network(args, net, 5)
    x = torch.randn(2, 3, 64, 64)
    h = online.backbone(x)
    assert args.output_stride == stride and h.shape == (2, width, 64 // stride, 64 // stride)
    enlarged = torch.nn.functional.interpolate(online.classifier(h), (50, 70), mode="bilinear")
    assert torch.equal(ev.predict(online, x, torch.zeros(2, 50, 70), args), enlarged) and not h.requires_grad
    net.avgpool = torch.nn.Identity()
    strided = net(x).detach().view(2, width, -1)
    step = 4 if arch == "resnet50" else 1  # of the places that the strided network has
    same_places = h[:, :, ::step, ::step].flatten(2)
    assert (same_places - strided).abs().max() < 1e-4 * strided.max()


@pytest.mark.parametrize("layout", ["masks", "ade20k", "voc2012"])
def test_masks_are_read_in_each_layout(layout, tmp_path, capsys):
    data = make_voc(tmp_path) if layout == "voc2012" else make_data(tmp_path, layout)
    args = ev.get_args([*EVALUATION, "--mode=segment", f"--data={data}"])
    train, test = ev.open_dense(args)
    assert (len(train), len(test)) == (8, 5) and train.classes == ["0", "1", "2"]
    assert f"{data}: 3 classes" in capsys.readouterr().err
    for images in (train, test):
        image, target, _ = ev.DenseCrops(images, args)[None, 1]
        assert image.shape[1:] == target.shape == (41, 71) and (target[:8] == 255).all()
        assert torch.equal(target[8], (torch.arange(71) * 3 // 71 + 1).byte() % 3)


def test_depths_of_8_bits_are_refused_once(tmp_path, capsys):
    root = make_data(tmp_path, "depth")
    for path in (root / "train/depth").iterdir():
        write(path, numpy.array(Image.open(path)).astype("uint8"))
    assert evaluate("--mode depth --workers 4", root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "type uint8, and its image" in error


def test_depths_are_in_metres_and_crops_that_are_enlarged_are_nearer(data):
    crops, _ = crops_of(data["depth"], "depth", "--depth-unit", "500")
    image, target, _ = crops[None, 0]
    assert target.unique().tolist() == [0, 2, 4, 8]
    _, nearer = crops.crop(ev.tv_tensors.Image(image), ev.tv_tensors.Mask(target), 2 / 3, 0.5, 0.5, 0.9)
    assert nearer.shape == (64, 64) and set((3 * nearer).unique().tolist()) <= {0, 4, 8, 16}


def test_the_rate_is_chosen_on_training_images(tmp_path, data, monkeypatch):
    calls = []
    measure = ev.measure

    def spy(*args):
        calls.append((*args[:2], args[2].tolist(), measure(*args)))
        return calls[-1][-1]

    monkeypatch.setattr(ev, "measure", spy)
    assert evaluate("--mode segment --lr 1e-9 0.05", data["segment"], tmp_path / "out") == 0
    (record,) = read_log(tmp_path / "out", "results.jsonl")
    held, again, (online, test, rows, metrics) = calls
    best = max(held, again, key=lambda call: call[3]["miou"])
    assert held[3] != again[3] and online is best[0] and list(record["results"].values()) == [metrics]
    assert held[1] is again[1] and held[2] == again[2] and len(held[2]) == 1
    assert test is not held[1] and rows == [0, 1, 2, 3, 4]
    assert state_of(tmp_path / "out/segment/lr 0.05, wd 0.0001")["data"]["images"] == 7  # to fit
    assert "chosen on 1 held-out" in record["protocol"]


WRONG_TARGETS = {  # what is replaced, by what (shape None: that of the image), and the message
    "size": (
        "train/masks/0.png",
        (20, 30),
        "uint8",
        0,
        "shape (20, 30) and type uint8, and its image has shape (40, 72)",
    ),
    "16 bits": ("train/masks/0.png", (40, 72), "uint16", 0, "0.png has shape (40, 72) and type uint16"),
    "class": ("val/masks/0.png", (40, 72), "uint8", 7, "test masks have class 7, training masks 0 to 2"),
    "ignored": ("train/masks/*.png", None, "uint8", 255, "no pixel of"),
    "ignored, held out": ("train/masks/{held}.png", None, "uint8", 255, "no pixel of the 1 held-out"),
    "missing": ("train/masks/0.png", (), "uint8", 0, "1 of 8 images have no target that can be read, such"),
    "no images": ("val/images/*.jpg", (), "uint8", 0, "no images in"),
}


@pytest.mark.parametrize("kind", WRONG_TARGETS)
def test_wrong_targets_get_one_sentence(kind, tmp_path, capsys):
    root = make_data(tmp_path / "data")
    pattern, shape, dtype, value, message = WRONG_TARGETS[kind]
    held = ev.stratified(torch.zeros(8), 0.1, 0, ev.HELD_OUT).item()
    for path in list(root.glob(pattern.format(held=held))):
        size = Image.open(path).size
        path.unlink()
        if shape != ():
            write(path, numpy.full(shape or size[::-1], value, dtype))
    assert evaluate("--mode segment --epochs 1 --lr 1e-9 0.05", root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_of_a_hundred_images_one_may_be_damaged_and_one_without_a_mask(tmp_path, capsys):
    root = make_data(tmp_path / "data", counts=(101, 101))
    (root / "train/masks/9.png").unlink()
    for split in ("train", "val"):
        path = root / split / "images/7.jpg"
        path.write_bytes(path.read_bytes()[:700])  # its header is whole
    assert evaluate("--mode segment --epochs 1 --batch-size 50", root, tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert error.count("train/images/7.jpg") == error.count("val/images/7.jpg") == 1
    assert error.count(f"left out: 1 of 101 images have no target that can be read, such as {root}") == 1
    (record,) = read_log(tmp_path / "out", "results.jsonl")
    assert "100 training, 101 test images" in record["protocol"]
    crops, _ = crops_of(root, "segment")
    row = [crops.images.read(i) is None for i in range(100)].index(True)
    _, target, readable = crops[0, row]
    assert not readable and (target == 255).all()
