"""SFRIK: rotation-invariant kernels on the sphere.

Pull the views of an image together, and push the law of the L2-normalised embeddings towards the uniform law
on the sphere, in maximum mean discrepancy with a kernel K(u, v) = phi(<u, v>):

    L = alpha mse(z1, z2) + (MMD^2(z1) + MMD^2(z2)) / 2,     MMD^2(z) = 1/N^2 sum_ij phi(<z_i, z_j>)

With phi = sum_{l >= 1} b_l P_l, b_l >= 0 and P_l the Legendre polynomial of dimension d, this is the squared
MMD to the uniform law itself. Other kernels give earlier regularisers: rbf with --log is the uniformity loss
of Wang and Isola, quadratic (phi = t^2) the Frobenius norm of the covariance.

Zheng, Puy, Riccietti, Perez, Gribonval, ICLR 2023, arXiv 2208.00789. Official code: valeoai/sfrik.

    python mmd_sphere.py                                            built-in images, minutes on a CPU
    torchrun --nproc_per_node 8 mmd_sphere.py --data /imagenet      the published recipe

Time N^2 d, memory N d: nothing is d x d, or N x N. Other than in the official code, each rank computes its
own rows of the Gram matrix against detached columns: one gather forward, nothing backward, 1/W of the work.
"""

import argparse

import torch
from torch import Tensor, nn

import common

# ----------------------------------------------------------------------------------------- the loss

BLOCK = 2**20  # numbers of the Gram matrix at a time


def legendre(t: Tensor, d: int, order: int) -> list[Tensor]:
    """P_0 .. P_order of dimension d >= 2 at t = <u, v> in [-1, 1]; P_l(1) = 1."""
    P = [torch.ones_like(t), t]
    for l in range(1, order):
        P.append(((2 * l + d - 2) * t * P[l] - l * P[l - 1]) / (l + d - 2))
    return P


def phi_of(t: Tensor, d: int, b, kernel: str, tau: float) -> Tensor:
    """phi(t), elementwise, of the kernel K(u, v) = phi(<u, v>) in dimension d."""
    if kernel == "legendre":
        return sum(weight * P for weight, P in zip(b, legendre(t, d, len(b))[1:], strict=True))
    return torch.exp(-2 * tau * (1 - t)) if kernel == "rbf" else t.square()


def mmd2(z: Tensor, b, kernel="legendre", log=False, tau=2.0, grad: Tensor | None = None) -> Tensor:
    """MMD^2 of normalised z (n, d) over all ranks; with log, the logarithm of the mean over pairs i != j.

    Leaves its gradient in grad (n, d), times W since DDP divides by W. Own rows against detached columns give
    half of it, by symmetry. A block of rows at a time, while its part of the Gram matrix is at hand.
    """
    columns, sums = common.all_gather(z), z.new_zeros(2)  # over all pairs; over i = j
    (n, d), N = z.shape, len(columns)
    for first in range(0, n, size := max(1, BLOCK // N)):
        rows = slice(first, first + size)
        t = (z[rows] @ columns.mT).requires_grad_()  # (size, N)
        with torch.enable_grad():
            phi = phi_of(t, d, b, kernel, tau)
            total = phi.sum()
        if grad is not None:
            torch.mm(*torch.autograd.grad(total, t), columns, out=grad[rows])
        itself = phi.detach()[:, common.rank() * n + first :].diagonal().sum()
        sums += torch.stack([total.detach(), itself])
    total, itself = common.all_reduce(sums)
    if grad is not None:
        grad *= 2 * common.world() / (total - itself if log else N**2)
    return ((total - itself) / (N * (N - 1))).log() if log else total / N**2


def mmd_sphere_loss(
    zs: Tensor, alpha, b, kernel="legendre", log=False, tau=2.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """L of embeddings zs (v, n, d), float32 or better, over all ranks, and its terms.

    With v > 2 views: invariance over all pairs of a global view, zs[:2], with another; MMD of the global
    views.
    """
    loss, invariance, mmd = Loss.apply(zs, alpha, (b, kernel, log, tau))
    return loss, dict(invariance=invariance, mmd=mmd)


class Loss(torch.autograd.Function):
    """The gradient is computed with the value, in place: of size (v, n, d) there are only z and itself."""

    @staticmethod
    def forward(ctx, zs: Tensor, alpha: float, kernel: tuple) -> tuple[Tensor, Tensor, Tensor]:
        v, n, d = zs.shape
        norm = zs.norm(dim=2, keepdim=True).clamp(min=1e-12)
        z, grad = zs / norm, torch.zeros_like(zs)
        mmd = (mmd2(z[0], *kernel, grad[0]) + mmd2(z[1], *kernel, grad[1])) / 2
        grad /= 2
        near, mean = z.new_zeros(()), 1 / (2 * (v - 1) * n * d)
        for g, o, times in [(0, 1, 2)] + [(g, o, 1) for g in (0, 1) for o in range(2, v)]:
            apart = z[g] - z[o]  # times 2: as the pairs (0, 1) and (1, 0)
            near += times * mean * apart.norm().square()
            grad[g].add_(apart, alpha=2 * alpha * times * mean)
            grad[o].sub_(apart, alpha=2 * alpha * times * mean)
        invariance = common.all_reduce(near) / common.world()
        along = torch.einsum("vnd,vnd->vn", grad, z)[:, :, None]
        grad.addcmul_(z, along, value=-1).div_(norm)  # through the normalisation
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(invariance, mmd)
        return alpha * invariance + mmd, invariance, mmd

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        return grad * ctx.saved_tensors[0], None, None


# ------------------------------------------------------------------------------------------ recipes

# fmt: off
RECIPES = {
    "imagenet": dict(  # official: 200 epochs, 70.3 % linear top-1
        arch="resnet50", stem="imagenet", size=224, views="byol", epochs=200, batch_size=2048,
        optimizer="lars", lr=0.4, wd=1e-6, warmup=10.0, alpha=40000.0, b=[1.0, 40.0, 40.0],
        hidden=[8192, 8192], dim=32768, zero_init=True,
    ),
    "imagenet20-resnet18": dict(  # official, 260 images a class
        arch="resnet18", stem="imagenet", size=224, views="byol", epochs=100, batch_size=2048,
        optimizer="lars", lr=1.2, wd=1e-6, warmup=10.0, alpha=4000.0, b=[1.0, 40.0, 40.0],
        hidden=[8192, 8192], dim=8192, zero_init=True,
    ),
    "cifar10": dict(  # found here: see the README for what was tried
        arch="resnet18", stem="cifar", size=32, views="cifar", epochs=800, batch_size=512,
        optimizer="adamw", lr=5e-4, wd=1e-4, warmup=10.0, alpha=2500.0, b=[1.0, 40.0, 40.0],
        hidden=[2048, 2048], dim=2048, zero_init=False,
    ),
    "demo": dict(  # minutes on two cores
        arch="resnet18", stem="imagenet", size=32, views="cifar", epochs=3, batch_size=128,
        optimizer="adamw", lr=2e-3, wd=1e-4, warmup=0.4, alpha=400.0, b=[1.0, 40.0, 40.0],
        hidden=[1024], dim=512, zero_init=False, log_every=10, workers=0,
    ),
}
# fmt: on
RECIPES["stl10"] = dict(RECIPES["imagenet20-resnet18"], size=64, views="auh")


def get_args(argv=None):
    """Arguments from argv (default: the command line), each left out taken from the recipe."""
    parser = common.parser_for(__doc__)
    add = parser.add_argument_group("SFRIK").add_argument
    add("--alpha", type=common.number(float, 0), help="alpha, weight of the invariance")
    add("--kernel", choices=["legendre", "rbf", "quadratic"], default="legendre", help="phi")
    add(
        "--b",
        type=common.number(float, 0),
        nargs="+",
        help="b_1, b_2, ..., weights of the Legendre polynomials",
    )
    add("--tau", type=common.number(float, 0), default=2.0, help="tau of the rbf kernel, exp(-2 tau (1 - t))")
    add("--log", action=argparse.BooleanOptionalAction, default=False, help="log of the mean over i != j")
    add("--zero-init", action=argparse.BooleanOptionalAction, help="last BN gain of each residual block at 0")
    add("--hidden", type=common.number(int, 1), nargs="+", help="widths of the projector's hidden layers")
    add("--dim", type=common.number(int, 2), help="d, dimension of the embedding")
    return common.parse(parser, RECIPES, argv)


# -------------------------------------------------------------------------------------------- model


class Online(nn.Module):
    """Backbone and projector."""

    def __init__(self, args):
        super().__init__()
        self.backbone, self.width = common.resnet(args.arch, args.stem, args.zero_init)
        self.projector = common.mlp(self.width, *args.hidden, args.dim)

    def forward(self, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Features (v, n, D) and projections (v, n, d) of the views."""
        hs = common.per_view(self.backbone, xs)
        return torch.stack(hs), torch.stack(common.per_view(self.projector, hs))


def main(args):
    run = common.Run(args, __file__)
    online = common.prepare(Online(args), args, run.device)
    optimizer = common.optimizer_for(online, args)
    model = common.parallel(online, args, run.device)
    run.begin(online.backbone, online.width, online=online, optimizer=optimizer)
    peak, warmup = args.lr * args.batch_size / 256, args.warmup * run.epoch_steps

    def loss_of(zs):
        return mmd_sphere_loss(zs, args.alpha, args.b, args.kernel, args.log, args.tau)

    for step, xs, y in run.steps():
        lr = common.set_lr(optimizer, peak * common.warmup_cosine(step, warmup, run.total))
        loss, terms, h, zs = run.backward(model, xs, loss_of)
        optimizer.step()
        run.log(loss, terms, lr, h, zs[0], y)


if __name__ == "__main__":
    common.launch(main, get_args)
