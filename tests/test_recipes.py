"""The published recipes, number by number, as the official code has them, and what each optimiser does."""

import math

import pytest
import torch
from conftest import train

import common
import corinfomax
import hsic
import mmd_sphere
import music

RN18, RN50 = dict(arch="resnet18", stem="imagenet"), dict(arch="resnet50", stem="imagenet")
LARS = dict(optimizer="lars", wd=1e-6, warmup=10, zero_init=True, batch_size=2048, size=224, views="byol")
SGD = dict(
    optimizer="sgd", wd=1e-4, warmup=10, zero_init=True, views="byol", first_lr=3e-3, last_lr=1e-6, eps=1e-8
)
SMALL = dict(
    SGD, arch="resnet18", stem="cifar", size=32, epochs=1000, batch_size=512, lr=0.5, forget=0.01, norm=False
)
HUNDRED = dict(SGD, size=224, batch_size=1024, lr=1, last_lr=5e-3, alpha=500, forget=0.01, hidden=[4096, 4096],
               dim=128, norm=False)  # fmt: skip
SFRIK = dict(LARS, **RN18, epochs=100, lr=1.2, alpha=4000, b=[1, 40, 40], hidden=[8192, 8192], dim=8192)
# ruff: noqa: E501
# fmt: off
PUBLISHED = {
    (hsic, "imagenet"): dict(LARS, **RN50, epochs=1000, batch_size=4096, lr=0.4, gamma=3, kernel="imq", features=512,
        draws=128, scale="adam", hidden=4096, dim=256, target=True, tau=0.99, ema=0.999),
    (corinfomax, "cifar10"): dict(SMALL, alpha=250, hidden=[2048, 2048], dim=64),
    (corinfomax, "cifar100"): dict(SMALL, alpha=1000, hidden=[4096, 4096], dim=128),
    (corinfomax, "tiny-imagenet"): dict(SMALL, **RN50, size=64, epochs=800, batch_size=1024, alpha=500, forget=0.1,
        hidden=[4096, 4096], dim=128),
    (corinfomax, "imagenet100-resnet18"): dict(HUNDRED, **RN18, epochs=400),
    (corinfomax, "imagenet100-resnet50"): dict(HUNDRED, **RN50, epochs=200, warmup=5),
    (corinfomax, "imagenet"): dict(SGD, **RN50, size=224, epochs=100, batch_size=1536, lr=0.2, alpha=2000, forget=0.1,
        hidden=[8192, 8192], dim=512, norm=True),
    (music, "imagenet"): dict(LARS, **RN50, epochs=100, lr=0.6, hidden=[8192], dim=8160, segment=80, temperature=1,
        weights=[1, 1, 1]),
    (music, "cifar10"): dict(optimizer="sgd", wd=5e-4, warmup=10, arch="resnet18", stem="cifar", zero_init=False,
        size=32, views="cifar", epochs=800, batch_size=512, lr=0.1, hidden=[1024, 1024], dim=1024, segment=32,
        temperature=1, weights=[1, 1, 1]),
    (mmd_sphere, "imagenet"): dict(SFRIK, arch="resnet50", epochs=200, lr=0.4, alpha=40000, dim=32768),
    (mmd_sphere, "imagenet20-resnet18"): dict(SFRIK, subset=260),
    (mmd_sphere, "stl10"): dict(SFRIK, size=64, views="auh", subset=0),
}
VIEWS = {  # crop area, jitter and its probability; for each view probabilities of blur and solarisation
    "byol": ((0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.8, [1, 0.1], [0, 0.2]),
    "simclr": ((0.08, 1), (0.8, 0.8, 0.8, 0.2), 0.8, [0.5, 0.5], [0, 0]),
    "auh": ((0.08, 1), (0.4, 0.4, 0.4, 0.4), 1, [0, 0], [0, 0]),
    "cifar": ((0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.8, [0, 0], [0, 0]),
}
# fmt: on


@pytest.mark.parametrize("module, recipe", PUBLISHED, ids=lambda value: getattr(value, "__name__", value))
def test_recipes_are_the_published_ones(module, recipe):
    args = vars(module.get_args(["--recipe", recipe]))
    assert {name: args[name] for name in PUBLISHED[module, recipe]} == PUBLISHED[module, recipe]


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_the_published_ones(name):
    area, jitter, jitter_p, blur, solarise = VIEWS[name]
    for v, view in enumerate(common.VIEWS[name]):
        assert (view.area, view.jitter, view.jitter_p, view.gray_p, view.flip_p) == (
            area,
            jitter,
            jitter_p,
            0.2,
            0.5,
        )
        assert (view.blur_p, view.solarise_p) == (blur[v], solarise[v])


@pytest.mark.parametrize(
    "optimizer, decays", [("sgd", [True, True]), ("lars", [True, False]), ("adamw", [True, False])]
)
def test_what_decays_under_each_optimiser(optimizer, decays):
    """Without a gradient, only what decays moves: a weight and a bias of one layer."""
    net = torch.nn.Linear(3, 3)
    before = [p.detach().clone() for p in net.parameters()]
    args = music.get_args(["--optimizer", optimizer, "--wd", "0.1", "--lr", "0.1"])
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    common.make_optimizer(net, args).step()
    assert [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)] == decays


def test_lars_scales_each_weight_by_its_norms():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    w, b = net.weight.detach().clone(), net.bias.detach().clone()
    optimizer = common.make_optimizer(
        net, music.get_args(["--optimizer", "lars", "--wd", "0.1", "--lr", "0.5"])
    )
    w_velocity = b_velocity = 0
    for _ in range(3):
        net.weight.grad, net.bias.grad = torch.randn(3, 4), torch.randn(3)
        g = net.weight.grad + 0.1 * w
        w_velocity = 0.9 * w_velocity + g * 1e-3 * w.norm() / g.norm()
        b_velocity = 0.9 * b_velocity + net.bias.grad
        w, b = w - 0.5 * w_velocity, b - 0.5 * b_velocity
        optimizer.step()
    assert torch.allclose(net.weight, w, atol=1e-6) and torch.allclose(net.bias, b, atol=1e-6)


def test_schedules_start_and_end_as_published():
    assert common.warmup_cosine(0, 10, 100) == pytest.approx(1 / 11)
    assert common.warmup_cosine(10, 10, 100) == 1
    assert common.warmup_cosine(100, 10, 100, last=1e-3) == pytest.approx(1e-3)


def test_momenta_of_target_and_average_rise_as_published(tmp_path, folder, monkeypatch):
    momenta = []
    monkeypatch.setattr(common, "ema_update", lambda average, net, momentum: momenta.append(momentum))
    flags = ["--target", "--ema", "0.3", "--data", folder, "--out", tmp_path]
    assert train(*flags, module=hsic) == 0
    target = [1 - 0.01 * (math.cos(math.pi * step / 6) + 1) / 2 for step in range(6)]
    assert momenta[::3] == momenta[1::3] == pytest.approx(target)
    assert momenta[2::3] == pytest.approx([min(0.3, (1 + step) / (10 + step)) for step in range(6)])
