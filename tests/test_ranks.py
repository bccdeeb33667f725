"""The same numbers on 1, 2 and 4 real processes, each with rows of its own."""

import time
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TINY, forks, same, train

import common
import corinfomax
import hsic
import mmd_sphere
import music


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


def batch_norm(zs, forward=common.BatchNorm.forward):
    """The sum of cubes of normalised rows; the running statistics are the terms."""
    norm = common.BatchNorm(12).double()
    loss = common.all_reduce((forward(norm, zs[0]) ** 3).sum())
    return loss, dict(norm.named_buffers())


def forward_on_gpus(norm, x):
    if common.world() == 1:
        return norm(x)
    patch.multiple(torch, **KERNELS).start()  # also for backward
    state = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return common.NormaliseOverRanks.apply(x, *state, norm.momentum, norm.eps)


def gather_stats(x, means, squares, running_mean, running_var, momentum, eps, counts):
    mean = means.mean(0)
    var = squares.mean(0) - mean**2
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var / (1 - 1 / counts.sum()), momentum)
    return mean, (var + eps).rsqrt()


def backward_elemt(grad, x, mean, invstd, weight, total, along, counts):
    return (grad - (total + (x - mean) * invstd**2 * along) / counts.sum()) * invstd * weight


KERNELS = dict(  # which GPUs alone have, by their formulas, of x (n, C); the first two exchange moments here
    batch_norm_stats=lambda x, eps: (x.mean(0), x.square().mean(0)),
    batch_norm_gather_stats_with_counts=gather_stats,
    batch_norm_elemt=lambda x, weight, bias, mean, invstd, eps: (x - mean) * invstd * weight + bias,
    batch_norm_backward_reduce=lambda g, x, mean, *_: (g.sum(0), (g * (x - mean)).sum(0), None, None),
    batch_norm_backward_elemt=backward_elemt,
)


def fork_loss(name, zs, *more):
    """The loss of a fork that the documentation shows."""
    code = {"__name__": name}
    exec(forks()[name], code)
    return code["loss_of"](zs, Namespace(seed=0, temperature=0.5), *more)


LOSSES = {  # (loss, terms) of this rank's zs (3, n, 12) in float64; a line here tests a fork's loss, too
    "hsic, exact": lambda zs: hsic_loss(zs, "imq", "adam"),
    "hsic, exact, gaussian": lambda zs: hsic_loss(zs, "gaussian", "adaptive"),
    "hsic, draws": lambda zs: hsic.hsic_loss(zs, 0.8, f=64, draws=5),
    "music": lambda zs: music.music_loss(zs[0], zs[1], 4),
    "corinfomax": corinfomax_loss,
    "ldmi": lambda zs: corinfomax_loss(zs, "ldmi"),
    "mmd_sphere": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 10.0, [1, 2, 3]),
    "sigreg": lambda zs: fork_loss("sigreg", zs, 1),
    "barlow_twins": lambda zs: fork_loss("barlow_twins", zs[:2]),
    "vicreg": lambda zs: fork_loss("vicreg", zs[:2]),
    "simclr": lambda zs: fork_loss("simclr", zs[:2]),
    "uniformity": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 1.0, [], "rbf", log=True),
    "batch norm": batch_norm,
    "batch norm on GPUs": lambda zs: batch_norm(zs, forward_on_gpus),
}


def outcome(name):
    """Loss and terms, the gradient of this rank's rows as DDP averages it, and how many numbers are sent."""
    zs = torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    zs = zs.chunk(common.world(), 1)[common.rank()].clone().requires_grad_()
    reducing = patch.object(dist, "all_reduce", wraps=dist.all_reduce)
    gathering = patch.object(common, "all_gather", wraps=common.all_gather)
    with reducing as reduce, gathering as gather:
        loss, terms = LOSSES[name](zs)
        (3 * loss).backward()  # a gradient that is written by hand may forget the 3
    sent = sum(call.args[0].numel() for call in reduce.call_args_list + gather.call_args_list)
    return [loss, *terms.values()], zs.grad / common.world(), sent


SENT = {  # by each of two ranks, n = 8, N = 16, d = 12, forward and backward
    "hsic, draws": 868,  # 3 n d + 3 N d + 4: embeddings, and gradients of all of them
    "music": 290,  # 2 d^2 + 2
    "ldmi": 1370,  # 6 d^2 + 4 d + 1, and as much as that forward in a step before
    "mmd_sphere": 198,  # 2 n d + 6: each embedding once
}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_terms_state_and_gradient_are_those_of_one_process(name, world, on_ranks):
    """And as many numbers are sent as stated in SENT."""
    terms, grad, _ = outcome(name)
    results, grads, sent = zip(*on_ranks(outcome, world, name), strict=True)
    actual = [*results, torch.cat(grads, 1)]
    torch.testing.assert_close(actual, [terms] * world + [grad], rtol=1e-10, atol=1e-11)
    if world == 2 and name in SENT:
        assert sent == (SENT[name],) * 2


def keep_activations(net, part, **_):
    assert len(part) <= 3
    return net(part)


def in_chunks(checkpoint):
    """Gradients and running statistics after two steps, at most 3 rows at a time; with ranks under DDP."""
    torch.manual_seed(common.rank())
    xs = [torch.randn(4, 3, side, side) for side in (16, 16, 12)]
    torch.manual_seed(0)
    args = music.get_args([*TINY, "--micro-batch=3"])
    online = music.Online(args)
    online.backbone.fc = torch.nn.Dropout()
    model = common.parallel(online, args, torch.device("cpu"))
    with patch.object(common, "checkpoint", checkpoint):
        for _ in range(2):
            _, zs = model(xs)
            zs.square().mean().backward()
    statistics = [x for name, x in online.named_buffers() if "running" in name]
    return [p.grad for p in online.parameters()] + statistics


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_are_chunks_to_the_bit(world, on_ranks):
    kept = on_ranks(in_chunks, world, keep_activations)
    assert same(kept, on_ranks(in_chunks, world, common.checkpoint))


def test_online_and_target_network_see_the_same_micro_batches(tmp_path, folder):
    rows = {}
    with patch.object(common, "checkpoint", wraps=common.checkpoint) as chunks:
        assert train("--target", "--micro-batch=5", "--data", folder, "--out", tmp_path, module=hsic) == 0
    for call in chunks.call_args_list:
        rows.setdefault(call.args[0], []).append(call.args[1])
    online, target = rows.values()
    assert same(online, target) and max(map(len, target)) <= 5


def train_in_float64(*flags):
    """Train in float64, since three steps in float32 would magnify rounding to a few per cent."""
    torch.set_default_dtype(torch.double)
    try:
        uncached = patch.object(common, "constant", common.constant.__wrapped__)
        with uncached, patch.object(torch.Tensor, "float", torch.Tensor.double):
            return train(*flags, module=hsic)
    finally:
        torch.set_default_dtype(torch.float)


def run(out, *flags):
    """The weights after the first and after the second epoch of a run, as two rows."""
    assert train_in_float64(*flags, "--out", out) == 0
    rows = []
    for checkpoint in ("checkpoint-previous.pt", "checkpoint.pt"):
        state = torch.load(out / checkpoint)
        tensors = [*state["online"].items(), *state["target"].items()]  # under the same names
        rows.append(torch.cat([x.flatten() for name, x in tensors if "weight" in name]))
    return torch.stack(rows)


def run_first_epoch(*flags):
    with patch.object(common, "keep", side_effect=SystemExit(7)):  # which comes after the save
        return train_in_float64(*flags)


def test_steps_and_a_resume_on_other_ranks_are_those_of_one_process(on_ranks, folder, tmp_path):
    """Two epochs of three steps on one rank, then the first on two, and the second on one."""
    flags = (
        "--target --tau 0.5 --scale adam --features 32 --draws 3 --local-crops 1 --optimizer lars --lr 0.3"
    )
    flags = [*flags.split(), "--keep-every=1", "--data", folder]
    one = run(tmp_path / "one", *flags)
    assert on_ranks(run_first_epoch, 2, *flags, "--out", tmp_path / "two") == [7, 7]
    two = run(tmp_path / "two", *flags)
    assert 0 < (two - one).norm() < 1e-9 * (one[1] - one[0]).norm()  # two ranks add in another order


def times_at_barrier():
    """When this rank comes to a barrier, later ranks later, and when it goes on."""
    common.cpu_group()  # whose making waits for all ranks, too
    time.sleep(0.3 * common.rank())
    came = time.monotonic()
    common.barrier()
    return came, time.monotonic()


def test_a_barrier_waits_for_every_rank(on_ranks):
    came, went_on = zip(*on_ranks(times_at_barrier, 3), strict=True)
    assert max(came) <= min(went_on)


def threads_ended():
    """How many threads have ended after all groups are left."""
    before = len(list(Path("/proc/self/task").iterdir()))
    common.barrier()
    common.leave_ranks()
    return before - len(list(Path("/proc/self/task").iterdir()))


def test_no_thread_of_a_group_is_left_to_abort_the_exit(on_ranks):
    assert min(on_ranks(threads_ended, 2)) > 0
