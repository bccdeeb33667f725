"""The published recipes, number by number, as the official code has them, and what each optimiser does."""

import copy
import math
from importlib import import_module

import pytest
import torch
from conftest import train
from torch import nn
from torch.testing import assert_close

import common
import hsic

# Of a flag that is given twice, the last counts.
RN18, RN50 = "--arch resnet18 --stem imagenet", "--arch resnet50 --stem imagenet"
CIFAR = "--arch resnet18 --stem cifar --size 32"
LARS = """--optimizer lars --wd 1e-6 --warmup 10 --last-lr 1e-3 --zero-init --batch-size 2048 --size 224
    --views byol"""
SGD = """--optimizer sgd --wd 1e-4 --warmup 10 --zero-init --first-lr 3e-3 --last-lr 1e-6 --eps 1e-8
    --views byol --no-norm"""
SMALL = f"{SGD} {CIFAR} --epochs 1000 --batch-size 512 --lr 0.5 --forget 0.01"
HUNDRED = f"""{SGD} --size 224 --batch-size 1024 --lr 1 --last-lr 5e-3 --alpha 500 --forget 0.01
    --hidden 4096 4096 --dim 128"""
MUSIC = "--temperature 1 --weights 1 1 1"
SFRIK = f"{LARS} {RN18} --epochs 100 --lr 1.2 --alpha 4000 --b 1 40 40 --hidden 8192 8192 --dim 8192"
PUBLISHED = {
    "hsic imagenet": f"""{LARS} {RN50} --epochs 1000 --batch-size 4096 --lr 0.4 --last-lr 0 --gamma 3
        --kernel imq --features 512 --draws 128 --scale adam --hidden 4096 --dim 256 --target
        --tau 0.99 --ema 0.999""",
    "corinfomax cifar10": f"{SMALL} --alpha 250 --hidden 2048 2048 --dim 64",
    "corinfomax cifar100": f"{SMALL} --alpha 1000 --hidden 4096 4096 --dim 128",
    "corinfomax tiny-imagenet": f"""{SMALL} {RN50} --size 64 --epochs 800 --batch-size 1024 --alpha 500
        --forget 0.1 --hidden 4096 4096 --dim 128""",
    "corinfomax imagenet100-resnet18": f"{HUNDRED} {RN18} --epochs 400",
    "corinfomax imagenet100-resnet50": f"{HUNDRED} {RN50} --epochs 200 --warmup 5",
    "corinfomax imagenet": f"""{SGD} {RN50} --size 224 --epochs 100 --batch-size 1536 --lr 0.2 --alpha 2000
        --forget 0.1 --hidden 8192 8192 --dim 512 --norm""",
    "music imagenet": f"{LARS} {RN50} {MUSIC} --epochs 100 --lr 0.6 --hidden 8192 --dim 8160 --segment 80",
    "music cifar10": f"""{CIFAR} {MUSIC} --optimizer sgd --wd 5e-4 --warmup 10 --last-lr 1e-3 --no-zero-init
        --views cifar --epochs 800 --batch-size 512 --lr 0.1 --hidden 1024 1024 --dim 1024 --segment 32""",
    "mmd_sphere imagenet": f"{SFRIK} {RN50} --epochs 200 --lr 0.4 --alpha 40000 --dim 32768",
    "mmd_sphere imagenet20-resnet18": f"{SFRIK} --subset 260",
    "mmd_sphere stl10": f"{SFRIK} --size 64 --views auh --subset 0",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_given_all_its_published_flags_does_not_change(name):
    script, recipe = name.split()
    get_args = import_module(script).get_args
    published = get_args(["--recipe", recipe, *PUBLISHED[name].split()])
    assert vars(get_args(["--recipe", recipe])) == vars(published)


def test_views_are_the_published_ones():
    """Area, jitter, and probabilities of jitter, blur, solarisation, gray and flip; sides are set later."""
    cifar = common.View((0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.8, 0, 0, 0.2, 0.5, 0, 0)
    byol_1 = cifar._replace(area=(0.08, 1), jitter=(0.4, 0.4, 0.2, 0.1), blur_p=1)
    byol_2 = byol_1._replace(blur_p=0.1, solarise_p=0.2)
    simclr = byol_1._replace(jitter=(0.8, 0.8, 0.8, 0.2), blur_p=0.5)
    auh = byol_1._replace(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1, blur_p=0)
    assert common.VIEWS == dict(byol=[byol_1, byol_2], simclr=[simclr] * 2, auh=[auh] * 2, cifar=[cifar] * 2)


@pytest.mark.parametrize("name, kept", [("sgd", 0.99), ("adamw", 1)])
def test_weights_decay_under_each_optimiser_and_biases_under_sgd_alone(name, kept):
    net = nn.Linear(2, 2)
    before = copy.deepcopy(net)
    net(torch.zeros(2)).sum().mul(0).backward()
    common.make_optimizer(net, name, 0.1, 0.1).step()
    assert_close(net.weight, 0.99 * before.weight)
    assert_close(net.bias, kept * before.bias)


def test_lars_is_sgd_with_the_gradient_of_each_weight_scaled_by_its_norms():
    net = nn.Linear(4, 3)
    before = copy.deepcopy(net)
    lars = common.make_optimizer(net, "lars", 100.0, 0.1)
    net.weight.grad = torch.randn(3, 4)
    net.bias.grad = torch.ones(3)
    decayed = net.weight.grad + 0.1 * before.weight
    scaled = decayed * 1e-3 * before.weight.norm() / decayed.norm()
    lars.step()
    assert_close(net.weight, before.weight - 100 * scaled)
    assert_close(net.bias, before.bias - 100)
    assert lars.defaults["momentum"] == 0.9


def test_schedules_start_and_end_as_published():
    rates = [common.warmup_cosine(step, 10, 100, first=0.12, last=1e-3) for step in (0, 10, 55, 100)]
    assert rates == pytest.approx([0.2, 1, 0.5005, 1e-3])


def test_momenta_of_target_and_average_rise_as_published(tmp_path, folder, monkeypatch):
    momenta, published = [], []
    for step in range(6):
        target = 0.995 - 0.005 * math.cos(math.pi * step / 6)
        published += [target, target, min(0.3, (1 + step) / (10 + step))]
    monkeypatch.setattr(common, "ema_update", lambda average, net, momentum: momenta.append(momentum))
    assert train("--target", "--ema", 0.3, "--data", folder, "--out", tmp_path, module=hsic) == 0
    assert momenta == pytest.approx(published)
