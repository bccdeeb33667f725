"""The same numbers on 1, 2 and 4 real processes, each with rows of its own."""

from functools import partial
from importlib import import_module
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TINY, train

import common
import corinfomax
import hsic
import mmd_sphere
import music

assert_near = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


def hsic_loss(zs, kernel, how):
    """The loss with the kernel's scale after a step of Adam."""
    scale = hsic.KernelScale(kernel, how).double()
    scale(zs, 0, 0)
    scale.optimizer.step()
    return hsic.hsic_loss(zs, scale(zs, 0, 1), kernel=kernel, f=0)


def corinfomax_loss(zs, objective="corinfomax"):
    """The loss of a second step; the state is among the terms."""
    criterion = corinfomax.CorInfoMax(12, 0.3, 0.2, 1e-3, objective=objective)
    criterion(*F.normalize(zs[1:].detach() ** 3, dim=2), 2.0)
    loss, terms = criterion(*F.normalize(zs[:2], dim=2), 2.0)
    return loss, terms | dict(criterion.named_buffers())


def batch_norm(zs):
    """The sum of cubes of normalised rows; the running statistics are the terms."""
    norm = common.BatchNorm(12).double()
    loss = common.all_reduce((norm(zs[0]) ** 3).sum())
    return loss, dict(norm.named_buffers())


def gather_stats(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    N = counts.sum()
    mean = means.mean(0)
    var = (invstds**-2 - eps + means**2).mean(0) - mean**2
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * N / (N - 1), momentum)
    return mean, (var + eps).rsqrt()


def backward_reduce(grad, x, mean, invstd, weight, *_):
    along = (grad * (x - mean)).sum(0)
    return grad.sum(0), along, along * invstd, grad.sum(0)


def backward_elemt(grad, x, mean, invstd, weight, total, along, counts):
    N = counts.sum()
    return (grad - total / N - (x - mean) * invstd**2 * along / N) * invstd * weight


KERNELS = dict(  # which GPUs alone have, by their formulas, of x (n, C)
    batch_norm_stats=lambda x, eps: (x.mean(0), (x.var(0, correction=0) + eps).rsqrt()),
    batch_norm_gather_stats_with_counts=gather_stats,
    batch_norm_elemt=lambda x, weight, bias, mean, invstd, eps: (x - mean) * invstd * weight + bias,
    batch_norm_backward_reduce=backward_reduce,
    batch_norm_backward_elemt=backward_elemt,
)


def batch_norm_on_gpus(zs):
    if common.world() == 1:
        return batch_norm(zs)
    patch.multiple(torch, **KERNELS).start()  # also for backward
    norm = common.BatchNorm(12).double()
    norm.num_batches_tracked += 1
    running = norm.running_mean, norm.running_var
    y = common.NormaliseOverRanks.apply(zs[0], norm.weight, norm.bias, *running, norm.momentum, norm.eps)
    return common.all_reduce((y**3).sum()), dict(norm.named_buffers())


LOSSES = {  # of zs (3, n, 12)
    "hsic, exact": lambda zs: hsic_loss(zs, "imq", "adam"),
    "hsic, exact, gaussian": lambda zs: hsic_loss(zs, "gaussian", "adaptive"),
    "hsic, linear": lambda zs: hsic.hsic_loss(zs, kernel="linear"),
    "hsic, draws": lambda zs: hsic.hsic_loss(zs, 0.8, f=64, draws=5),
    "music": lambda zs: music.music_loss(zs[0], zs[1], 4),  # 3 segments: of 4 ranks one has none
    "music, all rows not at once": lambda zs: music.music_loss(*zs[:2].repeat(1, 1, 100), 200),
    "corinfomax": corinfomax_loss,
    "ldmi": lambda zs: corinfomax_loss(zs, "ldmi"),
    "mmd_sphere": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 10.0, [1, 2, 3]),
    "uniformity": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 1.0, [], "rbf", log=True),
    "batch norm": batch_norm,
    "batch norm on GPUs": batch_norm_on_gpus,
}


def outcome(name):
    """Loss and terms, the gradient of this rank's rows as DDP averages it, and how many numbers it sends."""
    zs = torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    zs = zs.chunk(common.world(), 1)[common.rank()].clone().requires_grad_()
    reducing = patch.object(dist, "all_reduce", wraps=dist.all_reduce)
    gathering = patch.object(common, "all_gather", wraps=common.all_gather)
    with reducing as reduce, gathering as gather:
        loss, terms = LOSSES[name](zs)
        (3 * loss).backward()  # a gradient that is computed with the loss may forget the 3
    sent = sum(call.args[0].numel() for call in reduce.call_args_list + gather.call_args_list)
    return [loss, *terms.values()], zs.grad / common.world(), sent


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_terms_state_and_gradient_are_those_of_one_process(name, world, on_ranks):
    values, grad, _ = outcome(name)
    all_values, grads, _ = zip(*on_ranks(outcome, world, name), strict=True)
    assert_near(all_values, (values,) * world)
    assert_near(torch.cat(grads, 1), grad)


n, d = 8, 12  # of each of two ranks
SENT = {
    "hsic, draws": 3 * n * d + 6 * n * d + 4,  # embeddings, and gradients of all of them
    "music": 2 * n * d + 4 * n * d + d + 2,
    "ldmi": 2 * (3 * d * d + 2 * d + 1),  # in two steps
    "mmd_sphere": 2 * n * d + 5,  # each embedding once
}


@pytest.mark.parametrize("name", SENT)
def test_communication_is_as_stated(name, on_ranks):
    assert [sent for _, _, sent in on_ranks(outcome, 2, name)] == [SENT[name]] * 2


def keep_activations(net, part, **_):
    assert len(part) <= 3
    return net(part)


def in_chunks(checkpoint):
    """Gradients and running statistics after two steps of at most 3 rows at a time; with ranks under DDP."""
    torch.manual_seed(common.rank())
    xs = [torch.randn(4, 3, side, side) for side in (16, 16, 12)]
    torch.manual_seed(0)
    args = music.get_args([*TINY, "--micro-batch", "3"])
    online = music.Online(args)
    model = common.parallel(online, args, torch.device("cpu"))
    with patch.object(common, "checkpoint", checkpoint):
        for _ in range(2):
            _, zs = model(xs)
            zs.square().mean().backward()
    found = [p.grad for p in online.parameters()]
    found += [x for name, x in online.named_buffers() if "running" in name]
    return torch.cat([x.flatten() for x in found])


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_are_chunks_to_the_bit(world, on_ranks):
    kept = on_ranks(in_chunks, world, keep_activations)
    again = on_ranks(in_chunks, world, common.checkpoint)
    assert all(map(torch.equal, kept, again))


def run(name, out, *flags):
    """The weights after the first and the second epoch of a run, each in a row."""
    assert train(*flags, "--out", out, module=import_module(name)) == 0
    rows = []
    for checkpoint in ("checkpoint-previous.pt", "checkpoint.pt"):
        state = torch.load(out / checkpoint)
        tensors = [*state["online"].items(), *state.get("target", {}).items()]
        rows.append(torch.cat([x.flatten() for name, x in tensors if "weight" in name]))
    return torch.stack(rows)


RUNS = {
    "hsic": "--target --tau 0.5 --scale adam --features 32 --draws 3 --local-crops 1 --optimizer lars --lr 1",
    "mmd_sphere": "--optimizer lars --lr 0.003",
}


@pytest.mark.parametrize("name", RUNS)
def test_steps_and_a_resume_on_other_ranks_are_those_of_one_process(name, on_ranks, folder, tmp_path):
    """Two epochs of three steps on one rank, then on two, and the second epoch again on one."""
    flags = [*RUNS[name].split(), "--data", folder]
    one = run(name, tmp_path / "one", *flags)
    on_ranks(run, 2, name, tmp_path / "two", *flags)
    (tmp_path / "two" / "checkpoint.pt").unlink()
    two = run(name, tmp_path / "two", *flags)
    assert (two - one).norm() < min(1e-4 * one.norm(), 0.02 * (one[1] - one[0]).norm())
