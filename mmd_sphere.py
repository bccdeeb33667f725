"""SFRIK: rotation-invariant kernels on the sphere.

Pull the views of an image together, and push the distribution of L2-normalised embeddings towards the uniform
one on the sphere, by their maximum mean discrepancy (MMD) with a kernel K(u, v) = phi(<u, v>):

    L = alpha mse(z1, z2) + (MMD^2(z1) + MMD^2(z2)) / 2,     MMD^2(z) = 1/N^2 sum_ij phi(<z_i, z_j>)

The mse is a mean over all N d coordinates, so alpha grows with d. With phi = sum_{l >= 1} b_l P_l, b_l >= 0
and P_l the Legendre polynomial of dimension d, this is the squared MMD to the uniform distribution; with
other kernels, up to a constant. Those give earlier regularisers: rbf with --log the uniformity loss of Wang
and Isola, quadratic (phi = t^2) the squared Frobenius norm of the uncentred covariance.

Zheng, Puy, Riccietti, Perez, Gribonval, ICLR 2023, arXiv 2208.00789. Official code: valeoai/sfrik.

    python mmd_sphere.py                                            built-in images, a minute on a CPU
    torchrun --nproc_per_node 8 mmd_sphere.py --data /imagenet      the published recipe

On one process it takes time N^2 d and memory N d + N^2, and nothing is d x d. Unlike in the official code,
each of W ranks computes only its own rows of the Gram matrix: 1/W of the work, and no gradients to exchange.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import common

# ----------------------------------------------------------------------------------------- the loss


def legendre(t, d, order):
    """Legendre polynomials P_0 .. P_order of dimension d >= 2 at t = <u, v> in [-1, 1]; P_l(1) = 1."""
    P = [torch.ones_like(t), t]
    for l in range(1, order):
        P.append(((2 * l + d - 2) * t * P[l] - l * P[l - 1]) / (l + d - 2))
    return P


def phi_of(t, d, b, kernel, tau):
    """phi(t), elementwise, of the kernel K(u, v) = phi(<u, v>) in dimension d."""
    if kernel == "legendre":
        return sum(weight * P for weight, P in zip(b, legendre(t, d, len(b))[1:], strict=True))
    if kernel == "rbf":
        return torch.exp(-2 * tau * (1 - t))
    return t.square()


def mmd2(z, b, kernel="legendre", log=False, tau=2.0):
    """MMD^2 of normalised z (n, d) over all ranks; with log, the logarithm of the mean over pairs i != j.

    Each rank computes its own rows of the Gram matrix, against detached columns of all ranks.
    """
    z_all = common.all_gather(z).detach()  # (N, d)
    N, d = z_all.shape
    phi = phi_of(z @ z_all.mT, d, b, kernel, tau)  # (n, N)
    if log:
        diagonal = phi.diagonal(common.rank() * len(z))  # (n,), of each row with itself
        mean = common.all_reduce(phi.sum() - diagonal.sum()) / (N * (N - 1))
    else:
        mean = common.all_reduce(phi.sum()) / N**2
    mean = 2 * mean - mean.detach()  # the same value, twice the gradient, by symmetry: rows and columns
    return mean.log() if log else mean


def mmd_sphere_loss(zs, alpha, b, kernel="legendre", log=False, tau=2.0):
    """L of embeddings zs (v, n, d), float32 or better, over all ranks, and its terms, detached.

    With v > 2 views, the invariance is the mean over each of the global views, zs[:2], with each other view,
    so that their own pair counts twice; the MMD is that of the global views.
    """
    zs = F.normalize(zs, dim=2)
    pairs = [(0, 1)]  # (1, 0) would be the same
    if len(zs) > 2:
        pairs = [(g, other) for g in range(2) for other in range(len(zs)) if other != g]
    invariance = torch.stack([F.mse_loss(zs[g], zs[other]) for g, other in pairs]).mean()
    invariance = common.all_reduce(invariance) / common.world()
    mmd = (mmd2(zs[0], b, kernel, log, tau) + mmd2(zs[1], b, kernel, log, tau)) / 2
    loss = alpha * invariance + mmd
    return loss, dict(invariance=invariance.detach(), mmd=mmd.detach())


# ------------------------------------------------------------------------------------------ recipes

# fmt: off
RECIPES = {
    "imagenet": dict(  # official: 200 epochs, 70.3 % linear top-1
        arch="resnet50", stem="imagenet", zero_init=True, hidden=[8192, 8192], dim=32768,
        size=224, views="byol", epochs=200, batch_size=2048,
        optimizer="lars", lr=0.4, wd=1e-6, warmup=10.0, last_lr=1e-3,
        alpha=40000.0, b=[1.0, 40.0, 40.0],
    ),
    "imagenet20-resnet18": dict(  # official, 20 % of ImageNet
        arch="resnet18", stem="imagenet", zero_init=True, hidden=[8192, 8192], dim=8192,
        size=224, views="byol", subset=260, epochs=100, batch_size=2048,  # 260 images of each class
        optimizer="lars", lr=1.2, wd=1e-6, warmup=10.0, last_lr=1e-3,
        alpha=4000.0, b=[1.0, 40.0, 40.0],
    ),
    "cifar10": dict(  # tuned here
        arch="resnet18", stem="cifar", zero_init=False, hidden=[2048, 2048], dim=2048,
        size=32, views="cifar", epochs=800, batch_size=512, knn_every=10, log_every=500,
        optimizer="adamw", lr=5e-4, wd=1e-4, warmup=10.0, last_lr=1e-3,
        alpha=2500.0, b=[1.0, 40.0, 40.0],
    ),
    "demo": dict(  # about a minute on two cores
        arch="resnet18", stem="imagenet", zero_init=False, hidden=[1024], dim=512,
        size=32, views="cifar", epochs=3, batch_size=128,
        optimizer="adamw", lr=2e-3, wd=1e-4, warmup=0.4, last_lr=1e-3,
        alpha=2000.0, b=[1.0, 40.0, 40.0], log_every=10, workers=0,
    ),
}
# fmt: on
RECIPES["stl10"] = dict(RECIPES["imagenet20-resnet18"], subset=0, size=64, views="auh")


def get_args(argv=None):
    """Arguments from argv, by default the command line; those not given come from the recipe."""
    parser = common.parser_for(__doc__)
    add = parser.add_argument_group("SFRIK").add_argument
    add("--alpha", type=common.number(float, 0), help="weight of the invariance; scale it with --dim")
    add("--kernel", choices=["legendre", "rbf", "quadratic"], default="legendre", help="phi")
    add("--b", type=common.number(float, 0), nargs="+", help="b_1, b_2, ..., weights of the polynomials")
    add("--tau", type=common.number(float, 0), default=2.0, help="tau of the rbf kernel, exp(-2 tau (1 - t))")
    add("--log", action=argparse.BooleanOptionalAction, default=False, help="log of the mean over i != j")
    add("--hidden", type=common.number(int, 1), nargs="+", help="widths of the projector's hidden layers")
    add("--dim", type=common.number(int, 2), help="d, dimension of the embedding")
    args = common.parse(parser, RECIPES, argv)
    if args.log and args.kernel == "legendre":
        common.fail("--log needs --kernel rbf or quadratic: the mean of Legendre polynomials may be negative")
    if args.tau != parser.get_default("tau") and args.kernel != "rbf":
        common.fail(f"--tau {args.tau:g} has no effect with --kernel {args.kernel}: leave it out")
    return args


# -------------------------------------------------------------------------------------------- model


class Online(nn.Module):
    """The network that is trained: backbone and projector."""

    def __init__(self, args):
        super().__init__()
        self.micro_batch = args.micro_batch
        self.backbone, self.width = common.resnet(args.arch, args.stem, args.zero_init, args.init)
        self.projector = common.mlp(self.width, *args.hidden, args.dim)

    def forward(self, xs):
        """Features (n, D) of the first of v views, and embeddings (v, n, d) of all."""
        hs = common.per_view(self.backbone, xs, self.micro_batch)
        return hs[0], torch.stack(common.per_view(self.projector, hs))


def main(args):
    device = common.start(args, __file__)
    train, bank, test = common.open_data(args, device)  # bank and test: for kNN
    steps_per_epoch = len(train) // args.batch_size
    total = args.epochs * steps_per_epoch
    warmup = args.warmup * steps_per_epoch

    online = common.prepare(Online(args), device)
    model = common.parallel(online, args, device)  # the same, in DDP if there are several ranks
    optimizer = common.make_optimizer(online, args.optimizer, args.lr, args.wd)
    probe = common.Probe(online.width, train, test, device)
    state = dict(data=train, online=online, optimizer=optimizer, probe=probe)  # saved; of the data, a hash
    start = common.resume(args, state)
    log = common.Log(args, start, total)
    signals = common.Signals(args)

    for step, xs, y in log.watch(common.batches(train, args, device, start, total)):
        if common.evaluation_due(step, steps_per_epoch, args):
            log(step, common.evaluate(online.backbone, probe, bank, test, args))
        if step == 0:
            log.show(xs)
        lr = args.lr * args.batch_size / 256 * common.warmup_cosine(step, warmup, total, last=args.last_lr)
        common.set_lr(optimizer, lr)

        optimizer.zero_grad()
        with common.autocast(args, device):
            h, zs = model(xs)
        loss, terms = mmd_sphere_loss(zs.float(), args.alpha, args.b, args.kernel, args.log, args.tau)
        loss.backward()
        done = step + 1
        if log.due(done):  # before the update, since LARS changes gradients in place
            norm = common.gradient_norm(online)
            spread = common.spread(h, zs[0])
            log(done, terms, loss=loss.detach(), lr=lr, gradient_norm=norm, **spread)
        optimizer.step()
        probe.step(h.float().detach(), y)

        stop, save = signals.agree()
        keep = common.keep_due(done, steps_per_epoch, args)
        if stop or save or keep or done == total:
            common.save(args, done, state, online.backbone, loss, terms)
        if keep:
            common.keep(args, done // steps_per_epoch)
        if stop and done < total:
            signals.leave()

    log(total, common.evaluate(online.backbone, probe, bank, test, args))
    common.finish(log, signals)


if __name__ == "__main__":
    common.launch(main, get_args)
