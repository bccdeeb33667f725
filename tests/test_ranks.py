"""The same numbers on 1, 2 and 4 real processes that hold different rows."""

import pytest
import torch
import torch.distributed as dist
from conftest import TINY
from torch.utils.flop_counter import FlopCounterMode

import common
import corinfomax
import hsic
import mmd_sphere
import music

MODES = [
    dict(kernel="imq", f=64),
    dict(kernel="imq", f=0),
    dict(kernel="gaussian", f=64),
    dict(kernel="linear"),
]


def loss_and_gradients(dtype):
    """For each mode: the loss and the gradient for this rank's rows, as DDP would average it."""
    torch.manual_seed(0)
    zs, world = torch.randn(3, 16, 12).to(dtype), common.world()
    zs = (zs + 0.5 * zs.mean(0)).chunk(world, 1)[common.rank()].contiguous()
    found = []
    for mode in MODES:
        mine = zs.clone().requires_grad_()
        scales = [hsic.KernelScale(mode["kernel"], how).to(dtype) for how in ("adaptive", "adam")]
        cs = []
        for scale, step in ((scale, step) for scale in scales for step in range(2)):
            cs.append(scale(mine, 0, step).clone())
            scale.optimizer.step()
        loss, terms = hsic.hsic_loss(mine, cs[0], **mode, seed=1, step=2)
        loss.backward()
        found.append((loss.detach(), mine.grad / world, torch.stack(cs), torch.stack(list(terms.values()))))
    return found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_loss_gradient_and_scale_are_those_of_one_process(dtype, tolerance, on_ranks):
    one = loss_and_gradients(dtype)
    for world in (2, 4):
        ranks = on_ranks(loss_and_gradients, world, dtype)
        for i, (loss, grad, cs, terms) in enumerate(one):
            assert all(abs(r[i][0] - loss) < tolerance for r in ranks), MODES[i]
            assert all((r[i][2] - cs).abs().max() < 10 * tolerance for r in ranks), MODES[i]
            assert all((r[i][3] - terms).abs().max() < 10 * tolerance for r in ranks), MODES[i]
            got = torch.cat([r[i][1] for r in ranks], 1)
            assert (got - grad).norm() < tolerance * max(1, grad.norm()), MODES[i]
            assert (got - grad).norm() < 30 * tolerance * grad.norm(), MODES[i]


OTHERS = {
    "music, by P": lambda zs: music.music_loss(zs[0], zs[1], 4),
    "music, by rows": lambda zs: music.music_loss(*zs[:2].repeat(1, 1, 16), 16),
    "music, one segment": lambda zs: music.music_loss(zs[0], zs[1], 12),
    "legendre": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 10.0, [1, 2, 3]),
    "uniformity": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 1.0, [], "rbf", log=True),
    "quadratic": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 1.0, [], "quadratic"),
}
OBJECTIVES = ["corinfomax", "ldmi"]


def other_losses(dtype):
    """For each loss of the other methods: value, gradient as DDP averages it, and terms."""
    torch.manual_seed(0)
    zs, world = torch.randn(3, 16, 12).to(dtype), common.world()
    zs = (zs + 0.5 * zs.mean(0)).chunk(world, 1)[common.rank()].contiguous()
    losses = dict(OTHERS)
    states = []
    for objective in OBJECTIVES:
        criterion = corinfomax.CorInfoMax(12, 0.3, 0.2, 1e-3, objective=objective)
        criterion(*torch.nn.functional.normalize(zs[1:] ** 3, dim=2), 2.0)  # a state that is not the first
        losses[objective] = lambda zs, c=criterion: c(*torch.nn.functional.normalize(zs[:2], dim=2), 2.0)
        states.append(criterion)
    found = []
    for loss_of in losses.values():
        mine = zs.clone().requires_grad_()
        loss, terms = loss_of(mine)
        loss.backward()
        found.append((loss.detach(), mine.grad / world, torch.stack(list(terms.values()))))
    return found, [torch.cat([c.mu.flatten(), c.R.flatten(), c.R12.flatten()]) for c in states]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_the_other_losses_are_those_of_one_process(dtype, tolerance, on_ranks):
    one, states = other_losses(dtype)
    for world in (2, 4):
        ranks = on_ranks(other_losses, world, dtype)
        for i, (loss, grad, terms) in enumerate(one):
            name = [*OTHERS, *OBJECTIVES][i]
            assert all(abs(r[0][i][0] - loss) < tolerance * max(1, abs(loss)) for r in ranks), name
            assert all(torch.allclose(r[0][i][2], terms, rtol=tolerance, atol=tolerance) for r in ranks), name
            got = torch.cat([r[0][i][1] for r in ranks], 1)
            assert (got - grad).norm() < tolerance * max(1, grad.norm()), name
            assert (got - grad).norm() < 30 * tolerance * grad.norm(), name
        for i, state in enumerate(states):
            assert all(torch.equal(r[1][i], ranks[0][1][i]) for r in ranks)
            assert torch.allclose(ranks[0][1][i], state, atol=max(1e-12, tolerance / 10))


def costs(n, d):
    """Of each loss on n rows a rank: numbers moved forward, backward, and operations in matrix products."""
    torch.manual_seed(common.rank())
    corinfo = corinfomax.CorInfoMax(d)
    losses = {
        "hsic": lambda zs: hsic.hsic_loss(zs, f=16),
        "corinfomax": lambda zs: corinfo(*zs, 1.0),
        "music": lambda zs: music.music_loss(*zs, 4),
        "mmd_sphere": lambda zs: mmd_sphere.mmd_sphere_loss(zs, 1.0, [1, 2, 3]),
    }
    moved, found, in_place = [0], [], {torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]}
    names, count = (("all_reduce", common.GATHER), lambda x: moved.__setitem__(0, moved[0] + x.numel()))
    originals = [getattr(dist, name) for name in names]
    for name, original in zip(names, originals, strict=True):
        setattr(dist, name, lambda x, *rest, original=original: (count(x), original(x, *rest)))
    try:
        for loss_of in losses.values():
            zs, moved[0] = torch.randn(2, n, d, requires_grad=True), 0
            with FlopCounterMode(display=False, custom_mapping=in_place) as flops:
                loss = loss_of(zs)[0]
                forward = moved[0]
                loss.backward()
            found.append([forward, moved[0] - forward, flops.get_total_flops()])
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(dist, name, original)
    return dict(zip(losses, found, strict=True))


@pytest.mark.parametrize("n", [4, 64])
def test_communication_and_work_are_as_stated(n, on_ranks):
    """Of W = 2 ranks with n rows each; hsic and corinfomax move the same whatever n is."""
    d, N, f = 32, 2 * n, 16
    one, two = costs(N, d), on_ranks(costs, 2, n, d)[0]
    moved = {name: (forward, backward) for name, (forward, backward, _) in two.items()}
    assert moved["hsic"] == (f * f + 3 * f + 2, 0)
    assert moved["corinfomax"] == (2 * d * d + 2 * d + 1, 0)
    assert moved["mmd_sphere"] == (2 * N * d + 5, 0)  # each embedding once
    assert moved["music"] == (min(4 * N * d, 2 * d * d) + d + 2, 0)
    for name in ("hsic", "music", "mmd_sphere"):
        assert one[name][2] == 2 * two[name][2], name


def after_steps(steps, precision, folder, frozen=False, *flags):
    """All parameters, online and target, and the kernel scale after some whole steps of hsic.py, with BN
    frozen; and the views."""
    extra = ["--data", folder, "--recipe", "imagenet", "--optimizer", "lars", "--precision", precision]
    extra += ["--out", "unused", "--scale", "adam", "--local-crops", "1", "--lr", "3"]
    args = hsic.get_args([*TINY, *extra, *flags])
    args.dim, args.hidden, args.batch_size = 8, 32, 8
    state, views = {}, []

    def begin(self, evaluate, width, **parts):
        self.data = common.load_small(self.data, self.device)
        self.probe, self.state = None, parts
        state.update(parts)
        for module in parts["online"].modules() if frozen else ():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()

    def run_steps(self):
        batches = common.view_batches(self.data.train, self.args, self.device, 0, steps)
        for step, (xs, y) in enumerate(batches):
            views.append(torch.cat([x.flatten(1) for x in xs], 1))
            yield step, [x.double() for x in xs] if precision == "fp64" else xs, y

    old = common.Run.begin, common.Run.steps, common.Run.log
    common.Run.begin, common.Run.steps, common.Run.log = begin, run_steps, lambda *a: None
    try:
        hsic.main(args)
    finally:
        common.Run.begin, common.Run.steps, common.Run.log = old
    names = ("online", "target", "average", "scale")
    tensors = [
        t.double().flatten() for name in names for t in (*state[name].parameters(), *state[name].buffers())
    ]
    return torch.cat(tensors), torch.stack(views)


@pytest.mark.parametrize("steps, precision, tolerance", [(3, "fp32", 1e-4), (20, "fp64", 1e-8)])
def test_whole_steps_are_those_of_one_process(steps, precision, tolerance, on_ranks, folder):
    alone, views = after_steps(steps, precision, str(folder))
    ranks = on_ranks(after_steps, 2, steps, precision, str(folder))
    assert torch.allclose(torch.cat([v for _, v in ranks], 1), views, atol=1e-5)
    assert not torch.equal(ranks[0][1], ranks[1][1])
    for tensors, _ in ranks:
        assert (tensors - alone).norm() / alone.norm() < tolerance
    assert torch.equal(ranks[0][0], ranks[1][0])


def test_micro_batches_take_the_step_of_the_whole_batch_also_under_ddp(on_ranks, folder):
    """BN frozen; 8 rows in parts of 3, 3, 2 alone and of 2, 2 on each of two ranks."""
    start, whole = (after_steps(1, "fp64", str(folder), True, "--lr", lr)[0] for lr in ("0", "3"))
    parts = [after_steps(1, "fp64", str(folder), True, "--micro-batch", "3")]
    parts += on_ranks(after_steps, 2, 1, "fp64", str(folder), True, "--micro-batch", "3")
    for tensors, _ in parts:
        assert (tensors - whole).norm() < 1e-5 * (whole - start).norm()


def batch_norm(train):
    torch.manual_seed(0)
    x = torch.randn(8, 4, 3, 3).double() * torch.arange(1, 9).view(8, 1, 1, 1)
    net, weight = torch.nn.BatchNorm2d(4).double(), torch.randn(8, 4, 3, 3).double()
    torch.nn.init.normal_(net.weight)
    if common.world() > 1:
        net.__class__ = common.SyncBatchNorm
    net.train(train)
    x, weight = (t.chunk(common.world())[common.rank()].clone() for t in (x, weight))
    y = net(x.requires_grad_())
    (y * weight).sum().backward()
    return y.detach(), x.grad, net.running_mean, net.running_var, net.weight.grad


@pytest.mark.parametrize("train", [True, False])
def test_sync_batch_norm_is_batch_norm_of_all_rows(train, on_ranks):
    alone, ranks = batch_norm(train), on_ranks(batch_norm, 2, train)
    for i, want in enumerate(alone):
        got = (
            torch.cat([r[i] for r in ranks]) if i < 2 else sum(r[4] for r in ranks) if i == 4 else ranks[0][i]
        )
        assert torch.allclose(got, want, atol=1e-12), i
    assert torch.equal(ranks[0][3], ranks[1][3])


def knn_features(folder):
    import argparse

    data = common.load_small(common.list_folder(folder, folder / "none"), torch.device("cpu"))
    args = argparse.Namespace(precision="fp32", size=16, workers=0, seed=0)
    torch.manual_seed(0)
    net = common.resnet("resnet18")[0]
    h, y = common.features(net, data.train, torch.arange(47), args, torch.device("cpu"))
    return h, y, common.knn_accuracy(h[:30], y[:30], h[30:], y[30:], k=5)


def test_features_from_uneven_shards_are_those_of_one_process(on_ranks, folder):
    h, y, accuracy = knn_features(folder)
    for mine, labels, knn in on_ranks(knn_features, 2, folder):
        assert (
            torch.allclose(mine, h, atol=1e-5) and torch.equal(labels, y) and knn == pytest.approx(accuracy)
        )
