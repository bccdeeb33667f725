"""SSL-HSIC: self-supervised learning with the Hilbert-Schmidt independence criterion.

Maximise the dependence between an embedding Z and the identity Y of its image, and keep the kernelised
variance low:

    L = - HSIC(Z, Y) + gamma sqrt(HSIC(Z, Z))

with an inverse multiquadric kernel k(a, b) = c / sqrt(c^2 + |a - b|^2) on L2-normalised embeddings, in linear
time by random Fourier features phi, and a linear kernel on the one-hot identity. For M views of B images,

    HSIC(Z, Y) = sum_i |sum_p phi_i^p|^2 / (B M (M - 1)) - |sum_ip phi_i^p|^2 / (B M)^2
    HSIC(Z, Z) = |sum_ip (phi_i^p - mean phi) (psi_i^p - mean psi)^T|_F^2 / (B M)^2,   psi another draw

Li, Pogodin, Sutherland, Gretton, NeurIPS 2021, arXiv 2106.08320. Official code: google-deepmind/ssl_hsic.

    python hsic.py                                                  built-in images, a minute on a CPU
    torchrun --nproc_per_node 8 hsic.py --data /imagenet            the published recipe
    python hsic.py --data cifar10 --local-crops 4 --gamma 10        any flag overrides the recipe

Unlike the official code: random features are drawn exactly, as a scale mixture of Gaussians, not from a
truncated table that takes 200 s to compute; the scale c follows random pairs, not all pairs of two random
samples; the target network starts as a copy of the online one; and averages include BN statistics. HSIC(Z, Y)
counts the pairs of a view with itself, as officially; the logged `dependence` does not: it is 0 if Z ignores
identity.
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import common

# ----------------------------------------------------------------------------------------- the loss

# A draw has M N 2 f features; several draws share a product of up to about this many features.
FEATURES_AT_ONCE = {"cpu": 1, "cuda": 2**25}  # a CPU's cache is small, and a GPU waits for each product


def sample_features(d, f, kernel, seed, step, draws):
    """Frequencies omega (d, G, 2, f) and phases (G, 2, f) of the kernel with c = 1, for draws numbered (G,).

    A draw has two sets of f features, the same on every rank. The IMQ kernel is a mixture of Gaussians,
    (1 + r^2)^(-1/2) = E exp(-s^2 r^2 / 2) with s ~ N(0, 1); so is omega.
    """
    numbers = torch.arange((d + 2) * 2 * f, device=draws.device).view(d + 2, 1, 2, f)
    u = common.uniform(seed, step, draws[:, None, None], numbers)  # (d + 2, G, 2, f)
    symmetric = 2 * u[:-1] + (2.0**-53 - 1)  # in (-1, 1)
    normal = math.sqrt(2) * torch.erfinv(symmetric)
    omega = normal[:d]
    if kernel == "imq":
        omega = omega * normal[d]
    return omega.float(), (math.tau * u[-1]).float()


def random_features(z, omega, phase, c=1.0):
    """phi(z) = sqrt(2 / f) cos(z omega / c + phase), so that phi(a).phi(b) ~ k(a, b).

    For z (..., d), omega (d, G, f) and phase (G, f) of G draws: (..., G, f), in one product.
    """
    omega = (omega / c).to(z.dtype).flatten(1)
    waves = F.linear(z, omega.mT, phase.to(z.dtype).flatten()).cos()
    return math.sqrt(2 / phase.shape[-1]) * waves.unflatten(-1, phase.shape)


def hsic_zy(phi):
    """HSIC(Z, Y) of phi (..., M, N, f) of M views; pairs of a view with itself count, as officially."""
    M, N, _ = phi.shape[-3:]
    same = phi.sum(-3).square().sum((-2, -1)) / (N * M * (M - 1))
    return same - phi.mean((-3, -2)).square().sum(-1)


def hsic_zz(phi, psi):
    """HSIC(Z, Z) of two independent sets of features, (..., M, N, f) each: |cov(phi, psi)|_F^2.

    No gradient passes through the means: it would be the sum of the other side's centred rows, which is 0.
    """
    phi = (phi - phi.detach().mean((-3, -2), keepdim=True)).flatten(-3, -2)  # (..., M N, f)
    psi = (psi - psi.detach().mean((-3, -2), keepdim=True)).flatten(-3, -2)
    return (phi.mT @ psi).square().sum((-2, -1)) / phi.shape[-2] ** 2


def hsic_loss(zs, c=1.0, gamma=3.0, kernel="imq", f=512, seed=0, step=0, draws=1):
    """L of embeddings zs (M, n, d), M >= 2, float32 or better, over all ranks, and its terms; c is fixed.

    f: features in each of the two sets of a draw, or 0 for the kernel itself; the linear one needs none.
    """
    zs = F.normalize(zs, dim=2)
    z_all = common.all_gather(zs.transpose(0, 1)).transpose(0, 1)  # (M, N, d)
    if f == 0 or kernel == "linear":
        return exact_loss(zs, z_all.detach(), c, gamma, kernel)
    return loss_of_draws(z_all, c, gamma, kernel, f, seed, step, draws)


def loss_of_draws(z_all, c, gamma, kernel, f, seed, step, draws):
    """The mean of L over draws of features, of which a rank computes every W-th, for z_all (M, N, d).

    The activations of all draws would not fit into memory, so each draw's gradient is computed with its loss.
    """
    M, N, d = z_all.shape
    W = common.world()
    grad = torch.zeros_like(z_all)
    sums = z_all.new_zeros(4)  # of loss, HSIC(Z, Y), sqrt HSIC(Z, Z), pairs of a view with itself
    at_once = W * max(1, FEATURES_AT_ONCE[z_all.device.type] // (M * N * 2 * f))
    for first in range(common.rank(), draws, at_once):
        numbers = torch.arange(first, min(first + at_once, draws), W, device=z_all.device)  # of G draws
        omega, phase = sample_features(d, f, kernel, seed, step, numbers)
        with torch.enable_grad():
            z = z_all.detach().requires_grad_()
            phi = random_features(z, omega[:, :, 0], phase[:, 0], c).permute(2, 0, 1, 3)  # (G, M, N, f)
            psi = random_features(z, omega[:, :, 1], phase[:, 1], c).permute(2, 0, 1, 3)
            zy = hsic_zy(phi)  # (G,)
            zz = hsic_zz(phi, psi)  # phi twice would be biased
            root = (zz + 1e-14).sqrt()  # its gradient is finite at collapse
            loss = gamma * root - zy
            grad += torch.autograd.grad(loss.sum() / draws, z)[0]
        self_pairs = phi.detach().square().sum((1, 2, 3)) / (N * M * (M - 1))
        sums += torch.stack([loss, zy, root, self_pairs]).detach().sum(1) / draws
    loss, zy, root, self_pairs = common.all_reduce(sums)
    product = W * (z_all * grad).sum()  # all_gather sums its gradient over ranks; W undoes DDP's division
    loss = loss + (product - product.detach())
    return loss, dict(hsic_zy=zy, sqrt_hsic_zz=root, dependence=zy - self_pairs)


def kernel_of(r2, kernel, c):
    """k as a function of the squared distance between normalised embeddings."""
    if kernel == "linear":
        return 1 - r2 / 2
    if kernel == "gaussian":
        return torch.exp(-r2 / (2 * c**2))
    return (1 + r2 / c**2).rsqrt()


def exact_loss(zs, z_all, c, gamma, kernel):
    """L with the kernel itself, in O(N^2), for normalised zs (M, n, d) and those of all ranks (M, N, d).

    Each rank computes its own rows of the Gram matrix, against detached columns of all ranks. By symmetry
    that is half of the gradient, doubled below. Centring is constant: d sum (HKH)^2 = 2 <HKH, dK>.
    """
    M, n, _ = zs.shape
    first = common.rank() * n * M
    local = slice(first, first + n * M)
    rows = zs.transpose(0, 1).flatten(0, 1)  # (n M, d), the views of an image together
    columns = z_all.transpose(0, 1).flatten(0, 1)
    r2 = (2 - 2 * rows @ columns.mT).clamp(min=0)  # (n M, N M)
    K = kernel_of(r2, kernel, c)
    NM = K.shape[1]
    mean = common.all_gather(K.detach().mean(1))  # (N M,)
    centred = K - mean[local, None] - mean + mean.mean()
    same = K[:, local].view(n, M, n, M).diagonal(dim1=0, dim2=2)  # (M, M, n)
    sums = torch.stack([same.sum(), K.sum(), centred.square().sum()])
    same, total, square = common.all_reduce(sums)
    zy = same / (NM * (M - 1)) - total / NM**2
    zz = square / NM**2
    zy = 2 * zy - zy.detach()  # the same value, twice the gradient
    zz = 2 * zz - zz.detach()
    root = (zz + 1e-14).sqrt()
    loss = gamma * root - zy
    zy = zy.detach()
    return loss, dict(hsic_zy=zy, sqrt_hsic_zz=root.detach(), dependence=zy - 1 / (M - 1))


class KernelScale(nn.Module):
    """The scale c, kept where the kernel is most sensitive to distance: maximise E log |dk / d(r^2)|.

    r^2: squared distances of random pairs from the global batch. IMQ: log c - 3/2 E log(c^2 + r^2), largest
    where 3 c^2 E[1 / (c^2 + r^2)] = 1; gaussian: -2 log c - E r^2 / 2 c^2, largest where c^2 = E r^2 / 2.
    With `adam`, optimizer.step() takes c a step towards the maximum; with `adaptive`, forward() sets c to it
    at once.
    """

    def __init__(self, kernel, rule):
        super().__init__()
        self.kernel = kernel
        self.rule = rule
        self.c = nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.Adam([self.c], 3e-4)

    def get_extra_state(self):
        return self.optimizer.state_dict()

    def set_extra_state(self, saved):
        self.optimizer.load_state_dict(saved)

    def forward(self, zs, seed, step):
        """c for the loss of this step, from zs (M, n, d); `adam` also sets its gradient."""
        if self.kernel == "linear":
            return self.c.detach()
        r2 = self.squared_distances(zs.detach(), seed, step)
        if self.rule == "adaptive":
            c2 = r2.mean() / 2
            if self.kernel == "imq":
                for _ in range(12):  # towards the fixed point
                    nearness = (r2 + c2).reciprocal().mean()
                    c2 = nearness.reciprocal() / 3
            self.c.data.copy_(c2.clamp(min=1e-8).sqrt())
        else:
            if self.kernel == "imq":
                sensitivity = self.c.log() - 1.5 * (self.c**2 + r2).log().mean()
            else:
                sensitivity = -2 * self.c.log() - r2.mean() / (2 * self.c**2)
            (gradient,) = torch.autograd.grad(-sensitivity, self.c)
            self.c.grad = gradient
        return self.c.detach().clone()

    def squared_distances(self, zs, seed, step):
        """|z_a - z_b|^2 of random pairs of rows of all views and ranks, the same on every rank: (1024,)."""
        z_all = common.all_gather(F.normalize(zs, dim=2).transpose(0, 1)).flatten(0, 1)  # (N M, d)
        u = common.uniform(seed, step, torch.arange(2048), -2)
        rows = (u * len(z_all)).long().to(zs.device, non_blocking=True)
        a, b = z_all[rows].chunk(2)
        return (a - b).square().sum(1)


# ------------------------------------------------------------------------------------------ recipes

# fmt: off
RECIPES = {
    "imagenet": dict(  # official config: 1000 epochs, 74.8 % linear top-1
        arch="resnet50", stem="imagenet", zero_init=True, hidden=[4096], dim=256,
        size=224, views="byol", epochs=1000, batch_size=4096,
        optimizer="lars", lr=0.4, wd=1e-6, warmup=10.0, last_lr=0.0, target=True, ema=0.999,
        gamma=3.0, features=512, draws=128, scale="adam",
    ),
    "cifar10": dict(  # tuned here
        arch="resnet18", stem="cifar", zero_init=False, hidden=[2048], dim=256,
        size=32, views="cifar", epochs=800, batch_size=512, knn_every=10, log_every=500,
        optimizer="adamw", lr=5e-4, wd=1e-4, warmup=10.0, last_lr=0.0, target=False, ema=0.99,
        gamma=3.0, features=0, draws=1, scale="adaptive",
    ),
    "demo": dict(  # about a minute on two cores
        arch="resnet18", stem="imagenet", zero_init=False, hidden=[1024], dim=256,
        size=32, views="cifar", epochs=3, batch_size=128,
        optimizer="adamw", lr=2e-3, wd=1e-4, warmup=0.4, last_lr=0.0, target=False, ema=0.9,
        gamma=3.0, features=0, draws=1, scale="adaptive", log_every=10, workers=0,
    ),
}
# fmt: on
RECIPES["cifar100"] = RECIPES["cifar10"]


def get_args(argv=None):
    """Arguments from argv, by default the command line; those not given come from the recipe."""
    parser = common.parser_for(__doc__)
    add = parser.add_argument_group("SSL-HSIC").add_argument
    add("--gamma", type=common.number(float, 0, 1e6), help="gamma, weight of sqrt(HSIC(Z, Z))")
    add("--kernel", choices=["imq", "gaussian", "linear"], default="imq", help="k, on normalised embeddings")
    add(
        "--features",
        type=common.number(int, 0),
        help="f, random features in each of the two "
        "sets of a draw; 0: the exact kernel, the limit of many draws, which is faster on few GPUs",
    )
    add(
        "--draws",
        type=common.number(int, 1),
        help="draws of features per step, divided among ranks; the gradient's "
        "cosine with that of --features 0 is 0.43 for one draw, 0.98 for 128",
    )
    add("--scale", choices=["adam", "adaptive"], help="c, learned by Adam or set to its optimum every step")
    add("--target", action=argparse.BooleanOptionalAction, help="target network and predictor: M = 4, not 2")
    add("--tau", type=common.number(float, 0, 1), default=0.99, help="target's initial momentum; rises to 1")
    add("--ema", type=common.number(float, 0, 0.999999), help="momentum of the averages that are evaluated")
    add("--hidden", type=common.number(int, 1), nargs="+", help="widths of the MLPs' hidden layers")
    add("--dim", type=common.number(int, 2), help="d, dimension of the embedding")
    given, _ = parser.parse_known_args(argv)
    args = common.parse(parser, RECIPES, argv)
    if given.draws and (args.features == 0 or args.kernel == "linear"):
        common.fail(f"--draws {given.draws} has no effect with --features 0 or --kernel linear: leave it out")
    return args


# -------------------------------------------------------------------------------------------- model


class Online(nn.Module):
    """The network that is trained: backbone, projector and, with a target network, predictor."""

    def __init__(self, args):
        super().__init__()
        self.micro_batch = args.micro_batch
        self.backbone, self.width = common.resnet(args.arch, args.stem, args.zero_init, args.init)
        self.projector = common.mlp(self.width, *args.hidden, args.dim)
        self.predictor = common.mlp(args.dim, *args.hidden, args.dim) if args.target else nn.Identity()

    def forward(self, xs):
        """Features (n, D) of the first view; predictions, or without target projections, (v, n, d) of all."""
        hs = common.per_view(self.backbone, xs, self.micro_batch)
        zs = common.per_view(self.projector, hs)
        return hs[0], torch.stack(common.per_view(self.predictor, zs))


def main(args):
    device = common.start(args, __file__)
    train, bank, test = common.open_data(args, device)  # bank and test: for kNN
    steps_per_epoch = len(train) // args.batch_size
    total = args.epochs * steps_per_epoch
    warmup = args.warmup * steps_per_epoch

    online = common.prepare(Online(args), device)
    average = copy.deepcopy(online.backbone).requires_grad_(False)
    scale = KernelScale(args.kernel, args.scale).to(device)
    model = common.parallel(online, args, device)  # the same, in DDP if there are several ranks
    optimizer = common.make_optimizer(online, args.optimizer, args.lr, args.wd)
    probe = common.Probe(online.width, train, test, device)
    state = dict(data=train, online=online, optimizer=optimizer, probe=probe)  # saved; of the data, a hash
    state.update(average=average, scale=scale)
    if args.target:
        target = copy.deepcopy(nn.Sequential(online.backbone, online.projector)).requires_grad_(False)
        state.update(target=target)
    start = common.resume(args, state)
    log = common.Log(args, start, total)
    signals = common.Signals(args)

    for step, xs, y in log.watch(common.batches(train, args, device, start, total)):
        if common.evaluation_due(step, steps_per_epoch, args):
            log(step, common.evaluate(average, probe, bank, test, args))
        if step == 0:
            log.show(xs)
        lr = args.lr * args.batch_size / 256 * common.warmup_cosine(step, warmup, total, last=args.last_lr)
        common.set_lr(optimizer, lr)

        optimizer.zero_grad()
        with common.autocast(args, device):
            h, zs = model(xs)
        if args.target:  # M = 4: predictions of both views, and the target's projections of both
            with torch.no_grad(), common.autocast(args, device):
                hs = common.per_view(target[0], xs[:2], args.micro_batch)
                fixed = torch.stack(common.per_view(target[1], hs))
            zs = torch.cat([zs, fixed])
        zs = zs.float()
        c = scale(zs, args.seed, step)
        loss, terms = hsic_loss(zs, c, args.gamma, args.kernel, args.features, args.seed, step, args.draws)
        loss.backward()
        done = step + 1
        if log.due(done):  # before the update, since LARS changes gradients in place
            norm = common.gradient_norm(online)
            spread = common.spread(h, zs[0])
            log(done, terms, loss=loss.detach(), c=c, lr=lr, gradient_norm=norm, **spread)
        optimizer.step()
        scale.optimizer.step()
        if args.target:
            momentum = 1 - (1 - args.tau) * common.warmup_cosine(step, 0, total)
            common.ema_update(target[0], online.backbone, momentum)
            common.ema_update(target[1], online.projector, momentum)
        momentum = min(args.ema, (1 + step) / (10 + step))
        common.ema_update(average, online.backbone, momentum)
        probe.step(h.float().detach(), y)

        stop, save = signals.agree()
        keep = common.keep_due(done, steps_per_epoch, args)
        if stop or save or keep or done == total:
            common.save(args, done, state, average, loss, terms)
        if keep:
            common.keep(args, done // steps_per_epoch)
        if stop and done < total:
            signals.leave()

    log(total, common.evaluate(average, probe, bank, test, args))
    common.finish(log, signals)


if __name__ == "__main__":
    common.launch(main, get_args)
