"""A short training on the built-in images keeps the rank of the embeddings, and loses it without what spreads
them."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT  # noqa: F401
from torch import nn

import common
import corinfomax
import hsic
import mmd_sphere
import music


def rank_after(loss_of, steps=100):
    """The effective rank of z (128, 32) after a short training of a small network."""
    torch.manual_seed(0)
    args = hsic.get_args(["--batch-size", "128", "--size", "16", "--device", "cpu"])
    layers = [nn.Conv2d(3, 32, 5, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    layers += [nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32)]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for xs, _ in common.view_batches(common.draw_glyphs(256, 0), args, torch.device("cpu"), 0, steps):
        zs = torch.stack([net(x) for x in xs])
        optimizer.zero_grad()
        loss_of(zs).backward()
        optimizer.step()
    return common.effective_rank(zs[0].detach())


def hsic_pair():
    scale = hsic.KernelScale("imq", "adaptive")

    def positives(zs):
        z = F.normalize(zs, dim=2)
        return -(1 + (z[0] - z[1]).square().sum(1)).rsqrt().mean()

    return lambda zs: hsic.hsic_loss(zs, scale(zs, 0, 0), gamma=1.0, f=0)[0], positives


def corinfomax_pair():
    criterion = corinfomax.CorInfoMax(32)
    return lambda zs: criterion(*F.normalize(zs, dim=2), 50.0)[0], lambda zs: F.mse_loss(
        *F.normalize(zs, dim=2)
    )


def music_pair():
    return [lambda zs, w=w: music.music_loss(*zs, 8, weights=w)[0] for w in ((1, 1, 1), (0, 0, 1))]


def mmd_sphere_pair():
    return [lambda zs, b=b: mmd_sphere.mmd_sphere_loss(zs, 20.0, b)[0] for b in ([1, 40, 40], [0, 0, 0])]


@pytest.mark.parametrize("pair", [hsic_pair, corinfomax_pair, music_pair, mmd_sphere_pair])
def test_the_whole_loss_keeps_the_rank_and_without_spreading_it_collapses(pair):
    whole, alone = pair()
    high, low = rank_after(whole), rank_after(alone)
    assert low < 4 and high > 2 * low, (high, low)
