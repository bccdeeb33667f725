"""Randomness without state, and each augmentation against torchvision's own."""

import math

import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from conftest import ROOT  # noqa: F401
from torchvision.transforms.functional import InterpolationMode

import common

BICUBIC = InterpolationMode.BICUBIC


@pytest.fixture
def images():
    torch.manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(12, 3, 6, 7), (40, 48), mode="bicubic").clamp(0, 1)
    return ((smooth * 0.9 + 0.1 * torch.rand(12, 3, 40, 48)) * 255).round().byte()


def test_uniform_is_the_same_for_ints_and_tensors_and_looks_uniform():
    index = torch.arange(20000)
    u = common.uniform(3, 7, index, 5)
    assert [common.uniform(3, 7, i, 5) for i in range(50)] == u[:50].tolist()
    assert common.uniform(2**62, 0, 1, -1) == common.uniform(2**62, 0, torch.tensor([1]), -1).item()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003
    others = [
        common.uniform(4, 7, index, 5),
        common.uniform(3, 8, index, 5),
        common.uniform(3, 7, index, 6),
        u.roll(1),
    ]
    for other in others:  # each argument counts, and neighbours are uncorrelated
        assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 0.03


def test_crop_is_torchvisions_antialiased_bicubic_crop(images):
    boxes = torch.tensor(
        [[0, 0, 40, 48], [3, 5, 30, 20], [10, 0, 8, 11], [39, 47, 1, 1], [2, 2, 35, 44], [0, 20, 16, 16]]
    )
    for size in (8, 16, 32, 60):
        mine = common.crop(images[:6], boxes, size)
        for image, (t, l, h, w), got in zip(images, boxes.tolist(), mine, strict=False):
            want = TF.resized_crop(image.float() / 255, t, l, h, w, [size, size], BICUBIC, antialias=True)
            assert (got - want.clamp(0, 1)).abs().max() < 1e-3


def test_crop_boxes_follow_torchvisions_random_resized_crop():
    for height, width, scale in (
        (32, 32, (0.08, 1)),
        (375, 500, (0.2, 1)),
        (400, 20, (0.5, 1)),
        (1, 1, (0.08, 1)),
    ):
        n = 4000
        u = common.draw(0, 0, torch.arange(n), 0)
        mine = common.crop_boxes(u, torch.full((n,), height), torch.full((n,), width), scale).double()
        torch.manual_seed(0)
        image, ratio = torch.empty(3, height, width), (3 / 4, 4 / 3)
        theirs = torch.tensor(
            [T.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)]
        ).double()
        error = 4 * (theirs.var(0) / n * 2).sqrt() + 1e-9
        assert ((mine.mean(0) - theirs.mean(0)).abs() <= error).all(), (height, width)
        assert ((mine.std(0) - theirs.std(0)).abs() <= 2 * error).all(), (height, width)
        assert (
            (mine[:, 0] + mine[:, 2] <= height).all()
            and (mine[:, 1] + mine[:, 3] <= width).all()
            and (mine[:, 2:] > 0).all()
        )


def test_jitter_is_torchvisions_in_every_order(images):
    x = images[:, :, :40, :40].float() / 255
    torch.manual_seed(2)
    factor = torch.stack(
        [torch.rand(12) * 2, torch.rand(12) * 2, torch.rand(12) * 2, torch.rand(12) - 0.5], 1
    )
    order = torch.stack([torch.randperm(4) for _ in range(12)])
    mine = common.jitter(x.clone(), order, factor.gather(1, order))
    steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for image, turn, f, got in zip(x, order.tolist(), factor.tolist(), mine, strict=True):
        for kind in turn:
            image = steps[kind](image, f[kind])
        assert (got - image).abs().max() < 1e-5


def test_blur_is_the_true_gaussian_with_reflection(images):
    x, sigma = images[:3, :, :40, :40].float() / 255, torch.tensor([0.1, 1.0, 2.0])
    for image, s, got in zip(x, sigma.tolist(), common.gaussian_blur(x, sigma), strict=True):
        want = TF.gaussian_blur(image, [39, 39], [s, s])
        assert (got - want).abs().max() < 1e-4


def test_gray_flip_solarise_are_torchvisions(images):
    x = images[:4, :, :40, :40].float() / 255
    off, on = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    p = dict(flip=off, gray=off, blur=off, solarise=off, sigma=torch.ones(4))
    p |= dict(order=torch.arange(4).expand(4, 4), factor=torch.tensor([1.0, 1, 1, 0]).expand(4, 4))
    assert torch.equal(common.augment(x, p), x)
    assert torch.equal(common.augment(x, p | dict(flip=on)), TF.hflip(x))
    assert (common.augment(x, p | dict(gray=on)) - TF.rgb_to_grayscale(x, 3)).abs().max() < 1e-6
    assert torch.equal(common.augment(x, p | dict(solarise=on)), TF.solarize(x, 128 / 255))
    want = TF.normalize(x, common.MEAN, common.STD)
    assert (common.normalise(x) - want).abs().max() < 1e-6


def test_drawn_parameters_have_torchvisions_moments():
    view = common.VIEWS["byol"][1]._replace(jitter=(0.4, 1.4, 0.2, 0.1))
    n = 40000
    p = common.photometric(common.draw(0, 3, torch.arange(n), 1), view)
    factor = torch.empty(n, 4).scatter_(1, p["order"], p["factor"])
    on = (factor != torch.tensor([1.0, 1, 1, 0])).any(1)
    close = lambda value, want, spread: abs(float(value) - want) < 5 * spread / math.sqrt(n)  # noqa: E731
    assert close(on.float().mean(), 0.8, 0.4)
    for column, low, high in ((0, 0.6, 1.4), (1, 0, 2.4), (2, 0.8, 1.2), (3, -0.1, 0.1)):
        drawn = factor[on, column]
        assert low <= drawn.min() and drawn.max() <= high
        assert close(drawn.mean(), (low + high) / 2, (high - low) / 3) and close(
            drawn.std(), (high - low) / 12**0.5, high - low
        )
    for kind in range(4):  # every operation is as often in every place
        assert all(close((p["order"][:, slot] == kind).float().mean(), 0.25, 0.44) for slot in range(4))
    for name, want in (("flip", 0.5), ("gray", 0.2), ("blur", 0.1), ("solarise", 0.2)):
        assert close(p[name].float().mean(), want, 0.5)
    assert close(p["sigma"].mean(), 1.05, 0.55) and 0.1 <= p["sigma"].min() and p["sigma"].max() <= 2
    independent = torch.corrcoef(
        torch.stack([p["flip"].float(), p["gray"].float(), p["sigma"], factor[:, 0], factor[:, 3]])
    )
    assert (independent - torch.eye(5)).abs().max() < 0.03


def test_files_and_memory_give_the_same_views_to_a_few_levels(folder, monkeypatch):
    import hsic

    flags = "--recipe demo --batch-size 16 --size 16 --workers 2 --local-crops 2 --views byol --device cpu"
    args = hsic.get_args(["--data", str(folder), *flags.split()])
    files = common.list_folder(folder, folder / "none").train
    cpu = torch.device("cpu")
    kept = [
        batch
        for batch, _ in zip(
            common.view_batches(common.to_memory(files, cpu), args, cpu, 1, 5), range(4), strict=False
        )
    ]
    streamed = list(common.view_batches(files, args, cpu, 1, 5))
    assert len(kept) == len(streamed) == 4
    for (a, ya), (b, yb) in zip(kept, streamed, strict=True):
        assert torch.equal(ya, yb)
        assert [x.shape[-1] for x in a] == [16, 16, 12, 12] and all(
            x.is_contiguous(memory_format=torch.channels_last) for x in a
        )
        difference = torch.stack([(x - y).abs().mean() for x, y in zip(a, b, strict=True)]) * 0.225 * 255
        assert difference.max() < 3, (
            difference
        )  # levels; solarisation turns a level at its threshold into many


def test_every_epoch_has_every_image_once_and_no_two_orders_agree():
    seen = [
        torch.cat([index for _, index in common.Batches(100, 20, 0, epoch * 5, epoch * 5 + 5)])
        for epoch in (0, 1)
    ]
    assert all(torch.equal(order.sort()[0], torch.arange(100)) for order in seen)
    assert not torch.equal(*seen)
    _, third = list(common.Batches(100, 20, 0, 0, 5))[3]
    assert torch.equal(third, next(iter(common.Batches(100, 20, 0, 3, 5)))[1])
