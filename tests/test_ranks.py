"""The same numbers on 1, 2 and 4 real processes, each with rows of its own."""

import math
from argparse import Namespace
from functools import partial
from importlib import import_module
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TINY, train
from torch import nn

import common
import corinfomax
import hsic
import mmd_sphere
import music

assert_near = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


def corinfomax_loss(zs, objective="corinfomax"):
    """The loss of a second step; the state is among the terms."""
    criterion = corinfomax.CorInfoMax(12, 0.3, 0.2, 1e-3, objective=objective)
    criterion(*F.normalize(zs[1:].detach() ** 3, dim=2), 2.0)
    loss, terms = criterion(*F.normalize(zs[:2], dim=2), 2.0)
    return loss, terms | dict(criterion.named_buffers())


def hsic_with_scale(zs, kernel, how):
    """The loss with the kernel's scale after a step of Adam."""
    scale = hsic.KernelScale(kernel, how).double()
    scale(zs, 0, 0)
    scale.optimizer.step()
    return hsic.hsic_loss(zs, scale(zs, 0, 1), kernel=kernel, f=0)


LOSSES = {  # of zs (3, n, 12)
    "hsic, exact": lambda zs: hsic_with_scale(zs, "imq", "adam"),
    "hsic, exact, gaussian": lambda zs: hsic_with_scale(zs, "gaussian", "adaptive"),
    "hsic, 1 draw": lambda zs: hsic.hsic_loss(zs, 0.8, f=64, seed=1, step=2),
    "hsic, 5 draws": lambda zs: hsic.hsic_loss(zs, f=64, kernel="gaussian", draws=5),
    "hsic, linear": lambda zs: hsic.hsic_loss(zs, kernel="linear", draws=5),
    "music": lambda zs: music.music_loss(zs[0], zs[1], 4),  # 3 segments: of 4 ranks one has none
    "music, all rows not at once": lambda zs: music.music_loss(*zs[:2].repeat(1, 1, 100), 200),
    "corinfomax": corinfomax_loss,
    "ldmi": lambda zs: corinfomax_loss(zs, "ldmi"),
    "mmd_sphere": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 10.0, [1, 2, 3]),
    "uniformity": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 1.0, [], "rbf", log=True),
}


def mine(x, dim=0):
    return x.chunk(common.world(), dim)[common.rank()].clone().requires_grad_()


def outcome(name):
    """Loss and terms, and the gradient of this rank's rows as DDP averages it."""
    zs = torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    zs = mine(zs + 0.5 * zs.mean(0), 1)
    loss, terms = LOSSES[name](zs)
    (3 * loss).backward()  # a gradient that is computed with the loss may forget the 3
    return [loss, *terms.values()], zs.grad / common.world()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_terms_state_and_gradient_are_those_of_one_process(name, world, on_ranks):
    values, grad = outcome(name)
    ranks = on_ranks(outcome, world, name)
    assert_near([rank[0] for rank in ranks], [values] * world)
    assert_near(torch.cat([rank[1] for rank in ranks], 1), grad)


def traffic(name, n):
    """Numbers that a rank sends, forward and backward."""
    zs = torch.randn(3, n, 12).double().requires_grad_()
    reduce, gather = Mock(wraps=dist.all_reduce), Mock(wraps=common.all_gather)
    sent = lambda: sum(call.args[0].numel() for call in reduce.call_args_list + gather.call_args_list)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", reduce)
        patch.setattr(common, "all_gather", gather)
        loss, _ = LOSSES[name](zs)
        forward = sent()
        loss.backward()
    return forward, sent() - forward


@pytest.mark.parametrize("n", [4, 64])
def test_communication_is_as_stated(n, on_ranks):
    """On two ranks of n rows; corinfomax, here two steps, sends the same whatever n is."""
    d = 12
    expected = {
        "hsic, 1 draw": 3 * n * d + 2 * 3 * n * d + 4,  # embeddings, and gradients of all of them
        "ldmi": 2 * (3 * d * d + 2 * d + 1),
        "music": 2 * n * d + 2 * 2 * n * d + d + 2,
        "mmd_sphere": 2 * n * d + 2 * 2 + 1,  # each embedding once
    }
    for name, numbers in expected.items():
        assert on_ranks(traffic, 2, name, n) == [(numbers, 0)] * 2, name


def normalised():
    """Of rows and in evaluation; gradients of rows and weights; running statistics."""
    x = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    x = mine(x * torch.arange(1, 9).view(8, 1, 1, 1))
    norm = (common.BatchNorm(4) if common.world() > 1 else nn.BatchNorm2d(4)).double()
    norm.weight.data = torch.arange(4).double()
    y = norm(x)
    (y**3).sum().backward()
    return torch.cat([y, norm.eval()(x), x.grad], 1), norm.weight.grad, norm.running_mean, norm.running_var


def test_batch_norm_of_ranks_is_batch_norm_of_all_rows(on_ranks):
    rows, weight_grad, *statistics = normalised()
    one, other = on_ranks(normalised, 2)
    assert_near([torch.cat([one[0], other[0]]), one[1] + other[1]], [rows, weight_grad])
    assert_near([*one[2:], *other[2:]], 2 * statistics)


def in_chunks(micro_batch):
    """Gradients and running statistics of 3 rows at a time, which are kept or computed again; with DDP."""
    torch.manual_seed(common.rank())
    xs = [torch.randn(4, 3, side, side) for side in (16, 16, 12)]
    torch.manual_seed(0)
    args = music.get_args([*TINY, "--segment", "4", "--micro-batch", str(micro_batch)])
    online = music.Online(args)
    if not micro_batch:
        whole = online.backbone.forward
        online.backbone.forward = lambda x: torch.cat(
            [whole(part) for part in x.tensor_split(math.ceil(len(x) / 3))]
        )
    model = common.parallel(online, args, torch.device("cpu"))
    _, zs = model(xs)
    zs.square().mean().backward()
    gradients = [p.grad.clone() for p in online.parameters()]  # not views of DDP's buckets, to be sent
    return gradients + [x for x in online.buffers() if x.is_floating_point()]


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_are_chunks_to_the_bit(world, on_ranks):
    for kept, again in zip(on_ranks(in_chunks, world, 0), on_ranks(in_chunks, world, 3), strict=True):
        assert all(map(torch.equal, kept, again))


def run(name, steps, *flags):
    """A run of up to so many steps: its views, and at the start and each save a sample of its parameters."""
    views, parameters = [], []
    batches, resume, save = common.batches, common.resume, common.save

    def watched(*args):
        for step, xs, y in batches(*args):
            views.append(torch.cat([x.flatten(1) for x in xs], 1))
            yield step, xs, y
            if step + 1 == steps:
                return

    def copied(state, result):
        parts = [state[name] for name in ("online", "target", "scale") if name in state]
        flat = torch.cat([p.detach().flatten() for part in parts for p in part.parameters()])
        parameters.append(flat[::20])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "batches", watched)
        patch.setattr(common, "resume", lambda args, state: copied(state, resume(args, state)))
        patch.setattr(common, "save", lambda *args: copied(args[2], save(*args)))
        assert train(*flags, module=import_module(name)) == 0
    return torch.stack(views), torch.stack(parameters)


RUNS = [
    (
        "hsic",
        "--target --tau 0.5 --scale adam --features 32 --draws 3 --local-crops 1 --optimizer lars --lr 1",
    ),
    ("mmd_sphere", "--optimizer lars --lr 0.003"),
]


@pytest.mark.parametrize("name, flags", RUNS)
def test_steps_and_a_resume_on_other_ranks_are_those_of_one_process(name, flags, on_ranks, folder, tmp_path):
    """Two epochs of three steps; two ranks do the first, and one goes on."""
    flags = [*flags.split(), "--data", folder, "--out"]
    views, (start, middle, end) = run(name, 6, *flags, tmp_path / "one")
    (views_0, parameters), (views_1, others) = on_ranks(run, 2, name, 3, *flags, tmp_path / "two")
    views_2, (_, end_on_one) = run(name, 6, *flags, tmp_path / "two")
    assert torch.equal(torch.cat([torch.cat([views_0, views_1], 1), views_2]), views)
    assert torch.equal(parameters, others)
    for before, after, other in ((start, middle, parameters[1]), (middle, end, end_on_one)):
        assert (other - after).norm() < min(1e-4 * after.norm(), 0.02 * (after - before).norm())


def features(folder):
    """Of 47 images, which two ranks cannot share evenly."""
    data = common.to_memory(common.list_folder(folder / "train"), torch.device("cpu"))
    torch.manual_seed(0)
    args = Namespace(precision="fp32", size=16, workers=0, seed=0)
    return common.features(common.resnet("resnet18")[0], data, torch.arange(47), args)


def test_features_from_uneven_shards_are_those_of_one_process(on_ranks, folder):
    torch.testing.assert_close(on_ranks(features, 2, folder), [features(folder)] * 2)
