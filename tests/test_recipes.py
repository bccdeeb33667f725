"""The published recipes, number by number, as the official code has them, and what each optimiser does."""

import math
from importlib import import_module

import pytest
import torch
from conftest import train

import common
import hsic
import music

RN18, RN50 = " --arch resnet18 --stem imagenet ", " --arch resnet50 --stem imagenet "
CIFAR = " --arch resnet18 --stem cifar --size 32 --batch-size 512 "
LARS = " --optimizer lars --wd 1e-6 --warmup 10 --zero-init --size 224 --views byol "
SGD = " --optimizer sgd --wd 1e-4 --warmup 10 --zero-init --views byol --first-lr 3e-3 --last-lr 1e-6 --eps 1e-8 "
SMALL = SGD + CIFAR + "--epochs 1000 --lr 0.5 --forget 0.01 --no-norm "
HUNDRED = SGD + "--size 224 --batch-size 1024 --lr 1 --last-lr 5e-3 --alpha 500 --forget 0.01 --no-norm "
SFRIK = LARS + RN18 + "--batch-size 2048 --epochs 100 --lr 1.2 --alpha 4000 --b 1 40 40 --hidden 8192 8192 "
# ruff: noqa: E501
# fmt: off
PUBLISHED = {
    "hsic imagenet": LARS + RN50 + "--epochs 1000 --batch-size 4096 --lr 0.4 --gamma 3 --kernel imq --features 512 "
        "--draws 128 --scale adam --hidden 4096 --dim 256 --target --tau 0.99 --ema 0.999",
    "corinfomax cifar10": SMALL + "--alpha 250 --hidden 2048 2048 --dim 64",
    "corinfomax cifar100": SMALL + "--alpha 1000 --hidden 4096 4096 --dim 128",
    "corinfomax tiny-imagenet": SMALL + RN50 + "--size 64 --epochs 800 --batch-size 1024 --alpha 500 --forget 0.1 "
        "--hidden 4096 4096 --dim 128",
    "corinfomax imagenet100-resnet18": HUNDRED + RN18 + "--epochs 400 --hidden 4096 4096 --dim 128",
    "corinfomax imagenet100-resnet50": HUNDRED + RN50 + "--epochs 200 --warmup 5 --hidden 4096 4096 --dim 128",
    "corinfomax imagenet": SGD + RN50 + "--size 224 --epochs 100 --batch-size 1536 --lr 0.2 --alpha 2000 --forget 0.1 "
        "--hidden 8192 8192 --dim 512 --norm",
    "music imagenet": LARS + RN50 + "--batch-size 2048 --epochs 100 --lr 0.6 --hidden 8192 --dim 8160 --segment 80 "
        "--temperature 1 --weights 1 1 1",
    "music cifar10": CIFAR + "--no-zero-init --views cifar --epochs 800 --optimizer sgd --wd 5e-4 --warmup 10 --lr 0.1 "
        "--hidden 1024 1024 --dim 1024 --segment 32 --temperature 1 --weights 1 1 1",
    "mmd_sphere imagenet": SFRIK + "--arch resnet50 --epochs 200 --lr 0.4 --alpha 40000 --dim 32768 --subset 0",
    "mmd_sphere imagenet20-resnet18": SFRIK + "--dim 8192 --subset 260",
    "mmd_sphere stl10": SFRIK + "--dim 8192 --size 64 --views auh --subset 0",
}
VIEWS = {  # crop area, jitter and its probability; probabilities of blur and of solarisation; gray, flip
    "byol": [((0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 1, 0, 0.2, 0.5), ((0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.8, 0.1, 0.2, 0.2, 0.5)],
    "simclr": [((0.08, 1), (0.8, 0.8, 0.8, 0.2), 0.8, 0.5, 0, 0.2, 0.5)] * 2,
    "auh": [((0.08, 1), (0.4, 0.4, 0.4, 0.4), 1, 0, 0, 0.2, 0.5)] * 2,
    "cifar": [((0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.8, 0, 0, 0.2, 0.5)] * 2,
}
# fmt: on


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_given_all_its_published_flags_does_not_change(name):
    script, recipe = name.split()
    get_args = import_module(script).get_args
    assert get_args(["--recipe", recipe]) == get_args(["--recipe", recipe, *PUBLISHED[name].split()])


def test_views_are_the_published_ones():
    assert {name: [view[:7] for view in views] for name, views in common.VIEWS.items()} == VIEWS


@pytest.mark.parametrize(
    "optimizer, decays", [("sgd", [True, True]), ("lars", [True, False]), ("adamw", [True, False])]
)
def test_what_decays_under_each_optimiser(optimizer, decays):
    """Without a gradient, only what decays moves: a weight and a bias of one layer."""
    net = torch.nn.Linear(3, 3)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    common.make_optimizer(
        net, music.get_args(["--optimizer", optimizer, "--wd", "0.1", "--lr", "0.1"])
    ).step()
    assert [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)] == decays


def test_lars_scales_each_weight_by_its_norms():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    w, b = net.weight.detach().clone(), net.bias.detach().clone()
    optimizer = common.make_optimizer(net, music.get_args("--optimizer lars --wd 0.1 --lr 0.5".split()))
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
