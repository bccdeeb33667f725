"""SSL-HSIC: self-supervised learning with the Hilbert-Schmidt independence criterion.

Maximise the dependence between an embedding Z and the identity Y of its image, and keep the kernelised
variance low:

    L = - HSIC(Z, Y) + gamma sqrt(HSIC(Z, Z))

with an inverse multiquadric kernel k(a, b) = c / sqrt(c^2 + |a - b|^2) on L2-normalised embeddings, in linear
time by random Fourier features phi, and a linear kernel on the one-hot identity. For M views of B images,

    HSIC(Z, Y) = sum_i |sum_p phi_i^p|^2 / (B M (M - 1)) - |sum_ip phi_i^p|^2 / (B M)^2
    HSIC(Z, Z) = |sum_ip (phi_i^p - mean phi) (psi_i^p - mean psi)^T|_F^2 / (B M)^2,   psi another draw

Li, Pogodin, Sutherland, Gretton, NeurIPS 2021, arXiv 2106.08320. Official code: google-deepmind/ssl_hsic.

    python hsic.py                                                  built-in images, minutes on a CPU
    torchrun --nproc_per_node 8 hsic.py --data /imagenet            the published recipe
    python hsic.py --data cifar10 --local-crops 4 --gamma 10        any flag overrides the recipe

Other than in the official code: random features are drawn exactly, as a scale mixture of Gaussians, not from
a table of a truncated density (200 s at start-up); the kernel scale's samples come from the global batch, so
it cannot differ between ranks; `dependence` is logged, HSIC(Z, Y) without the pairs of a view with itself,
near 0 without dependence.
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

# ----------------------------------------------------------------------------------------- the loss


def sample_features(d: int, f: int, kernel: str, seed: int, step: int, device="cpu") -> tuple[Tensor, Tensor]:
    """Frequencies omega (d, f) and phases (f,) of the kernel with c = 1, the same on every rank and device.

    The IMQ kernel is a mixture of Gaussians, (1 + r^2)^(-1/2) = E exp(-s^2 r^2 / 2) s ~ N(0, 1); so is omega.
    """
    generator = torch.Generator().manual_seed(int(common.hash64(seed, step)))
    omega = torch.randn(d, f, generator=generator)
    if kernel == "imq":
        omega = omega * torch.randn(1, f, generator=generator)
    phase = 2 * math.pi * torch.rand(f, generator=generator)
    return omega.to(device), phase.to(device)


def random_features(z: Tensor, omega: Tensor, phase: Tensor, c=1.0) -> Tensor:
    """phi(z) = sqrt(2 / f) cos(z omega / c + phase), so that phi(a).phi(b) ~ k(a, b), for z (..., d)."""
    return math.sqrt(2 / len(phase)) * torch.cos(z @ omega.to(z.dtype) / c + phase.to(z.dtype))


def hsic_zy(phi: Tensor) -> Tensor:
    """HSIC(Z, Y) of features phi (M, n, f) of M views, over all ranks; pairs p = l kept, as officially."""
    M, N = phi.shape[0], phi.shape[1] * common.world()
    per_image = phi.sum(0)  # (n, f)
    same = common.all_reduce(per_image.square().sum())
    mean = common.all_reduce(per_image.sum(0)) / (N * M)  # (f,)
    return same / (N * M * (M - 1)) - mean.square().sum()


def hsic_zz(phi: Tensor, psi: Tensor) -> Tensor:
    """HSIC(Z, Z) of two independent draws of features, (M, n, f) each, over all ranks: |cov(phi, psi)|_F^2.

    No gradient passes through the means: it would be the sum of the other side's centred rows, which is 0.
    """
    N = phi.shape[0] * phi.shape[1] * common.world()
    means = common.all_reduce(torch.stack([phi.detach().sum((0, 1)), psi.detach().sum((0, 1))])) / N
    phi, psi = (phi - means[0]).flatten(0, 1), (psi - means[1]).flatten(0, 1)  # (M n, f)
    return common.all_reduce(phi.mT @ psi).square().sum() / N**2


def exact_hsic(zs: Tensor, kernel: str, c) -> tuple[Tensor, Tensor]:
    """Both criteria of the kernel itself, without features, for normalised zs (M, n, d), in O(N^2).

    Each rank has its own rows of the Gram matrix, against detached columns of all ranks. By symmetry that is
    half of the gradient: doubled below. The centring is constant: sum (HKH)^2 has the derivative 2 <HKH, dK>.
    """
    M, n, d = zs.shape
    rows = zs.transpose(0, 1).flatten(0, 1)  # (n M, d), the views of an image together
    K = kernel_of((2 - 2 * rows @ common.all_gather(rows).mT).clamp(min=0), kernel, c)  # (n M, N M)
    mean = common.all_gather(K.mean(1))  # (N M,)
    own = common.rank() * n * M
    centred = K - mean[own : own + n * M, None] - mean + mean.mean()
    same = K[:, own : own + n * M].view(n, M, n, M).diagonal(dim1=0, dim2=2)  # (M, M, n)
    same, every, square = common.all_reduce(torch.stack([same.sum(), K.sum(), centred.square().sum()]))
    NM = K.shape[1]
    zy, zz = same / (NM * (M - 1)) - every / NM**2, square / NM**2
    return 2 * zy - zy.detach(), 2 * zz - zz.detach()


def kernel_of(r2: Tensor, kernel: str, c) -> Tensor:
    """k as a function of the squared distance: imq or gaussian."""
    return (1 + r2 / c**2).rsqrt() if kernel == "imq" else torch.exp(-r2 / (2 * c**2))


def hsic_loss(
    zs: Tensor, c=1.0, gamma=3.0, kernel="imq", f=512, seed=0, step=0
) -> tuple[Tensor, dict[str, Tensor]]:
    """L of embeddings zs (M, n, d), M >= 2, in float32 or better, and its terms; c is a constant here.

    f: random features a draw, or 0 for the exact kernel. The linear kernel is its own features, phi = z.
    """
    zs = F.normalize(zs, dim=2)
    M, N = zs.shape[0], zs.shape[1] * common.world()
    itself = torch.full((), 1 / (M - 1), device=zs.device)  # pairs p = l: k(z, z) = 1
    if kernel == "linear":
        zy, zz = hsic_zy(zs), hsic_zz(zs, zs)
    elif f == 0:
        zy, zz = exact_hsic(zs, kernel, c)
    else:  # two draws: with one, HSIC(Z, Z) would be biased
        draws = (sample_features(zs.shape[2], f, kernel, seed, 2 * step + i, zs.device) for i in range(2))
        phi, psi = (random_features(zs, omega, phase, c) for omega, phase in draws)
        zy, zz = hsic_zy(phi), hsic_zz(phi, psi)
        itself = common.all_reduce(phi.detach().square().sum()) / (N * M * (M - 1))
    root = (zz + 1e-14).sqrt()  # finite gradient where all embeddings are equal
    loss = -zy + gamma * root
    return loss, dict(hsic_zy=zy.detach(), sqrt_hsic_zz=root.detach(), dependence=zy.detach() - itself)


class KernelScale(nn.Module):
    """The scale c, kept where the kernel is most sensitive to distance: maximise E log |dk / d(r^2)|.

    r^2: squared distances of random pairs from the global batch. IMQ: log c - 3/2 E log(c^2 + r^2), largest
    where 3 c^2 E[1 / (c^2 + r^2)] = 1; gaussian: -2 log c - E r^2 / 2 c^2, largest where c^2 = E r^2 / 2.
    """

    def __init__(self, kernel: str, how: str, pairs: int = 1024):
        super().__init__()
        self.kernel, self.how, self.pairs = kernel, how, pairs
        self.c = nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.Adam([self.c], 3e-4)

    def forward(self, zs: Tensor, seed: int, step: int) -> Tensor:
        """c for this step's loss, from zs (M, n, d) detached; with `adam`, also its gradient."""
        if self.kernel == "linear":
            return self.c.detach()
        r2 = self.squared_distances(zs.detach(), seed, step)
        if self.how == "adaptive":
            c2 = r2.mean() / 2  # the fixed point for the Gaussian kernel; the start of the iteration for IMQ
            for _ in range(12 if self.kernel == "imq" else 0):
                c2 = 1 / (3 * (1 / (r2 + c2).clamp(min=1e-12)).mean())
            with torch.no_grad():
                self.c.copy_(c2.clamp(min=1e-8).sqrt())
            return self.c.detach().clone()
        if self.kernel == "imq":
            sensitivity = self.c.log() - 1.5 * (self.c**2 + r2).log().mean()
        else:
            sensitivity = -2 * self.c.log() - r2.mean() / (2 * self.c**2)
        self.c.grad = torch.autograd.grad(-sensitivity, self.c)[0]
        return self.c.detach().clone()

    def squared_distances(self, zs: Tensor, seed: int, step: int) -> Tensor:
        """|z_a - z_b|^2 of random pairs of rows of all ranks, the same on every rank: (pairs,)."""
        M, n, d = zs.shape
        N, first = n * common.world(), n * common.rank()
        draw = common.uniform(seed, step, torch.arange(2 * self.pairs), -2)
        view, image = (draw * M * N).long() // N, (draw * M * N).long() % N
        mine = ((image >= first) & (image < first + n)).nonzero()[:, 0]
        rows = zs.new_zeros(2 * self.pairs, d)
        rows[mine.to(zs.device)] = F.normalize(
            zs[view[mine].to(zs.device), (image[mine] - first).to(zs.device)], dim=1
        )
        return torch.sub(*common.all_reduce(rows).chunk(2)).square().sum(1)


# ------------------------------------------------------------------------------------------ recipes

# fmt: off
RECIPES = {
    "imagenet": dict(  # official config: 1000 epochs, 74.8 % linear top-1
        arch="resnet50", stem="imagenet", size=224, views="byol", epochs=1000, batch_size=4096,
        optimizer="lars", lr=0.4, wd=1e-6, warmup=10.0, gamma=3.0, features=512, scale="adam",
        hidden=4096, dim=256, target=True, ema=0.999,
    ),
    "cifar10": dict(  # found here: see the README for what was tried
        arch="resnet18", stem="cifar", size=32, views="cifar", epochs=800, batch_size=512,
        optimizer="adamw", lr=5e-4, wd=1e-4, warmup=10.0, gamma=3.0, features=0, scale="adaptive",
        hidden=2048, dim=256, target=False, ema=0.99,
    ),
    "demo": dict(  # minutes on two cores
        arch="resnet18", stem="imagenet", size=32, views="cifar", epochs=3, batch_size=128,
        optimizer="adamw", lr=2e-3, wd=1e-4, warmup=0.4, gamma=1.0, features=0, scale="adaptive",
        hidden=1024, dim=256, target=False, ema=0.9, log_every=10, workers=0,
    ),
}
# fmt: on
RECIPES["cifar100"] = RECIPES["cifar10"]


def get_args(argv=None):
    """Arguments from argv (default: the command line), each left out taken from the recipe."""
    parser = common.parser_for(__doc__)
    add = parser.add_argument_group("SSL-HSIC").add_argument
    add("--gamma", type=common.number(float, 0, 1e6), help="gamma, weight of sqrt(HSIC(Z, Z))")
    add("--kernel", choices=["imq", "gaussian", "linear"], default="imq", help="k, on normalised embeddings")
    add(
        "--features",
        type=common.number(int, 0),
        help="f, random Fourier features a draw (0: the exact kernel, O(N^2))",
    )
    add("--scale", choices=["adam", "adaptive"], help="c, learned by Adam or at its optimum every step")
    add(
        "--target",
        action=argparse.BooleanOptionalAction,
        help="a target network and a predictor, M = 4; or online projections only, M = 2",
    )
    add(
        "--tau",
        type=common.number(float, 0, 1),
        default=0.99,
        help="first momentum of the target network; rises to 1",
    )
    add(
        "--ema",
        type=common.number(float, 0, 0.999999),
        help="momentum of the weights that are evaluated (0: none)",
    )
    add("--hidden", type=common.number(int, 1), help="width of projector and predictor")
    add("--dim", type=common.number(int, 2), help="d, dimension of the embedding")
    return common.parse(parser, RECIPES, argv)


# -------------------------------------------------------------------------------------------- model


class Online(nn.Module):
    """Backbone, projector and, with a target network, predictor."""

    def __init__(self, args):
        super().__init__()
        self.backbone, self.width = common.resnet(args.arch, args.stem)
        self.projector = common.mlp(self.width, args.hidden, args.dim)
        self.predictor = common.mlp(args.dim, args.hidden, args.dim) if args.target else nn.Identity()

    def forward(self, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Features (v, n, D) and predictions, or without target projections, (v, n, d) of the views."""
        hs = common.per_view(self.backbone, xs)
        zs = common.per_view(self.predictor, common.per_view(self.projector, hs))
        return torch.stack(hs), torch.stack(zs)


def main(args):
    run = common.Run(args, __file__)
    online = common.prepare(Online(args), args, run.device)
    target = copy.deepcopy(nn.Sequential(online.backbone, online.projector)) if args.target else nn.Identity()
    target.requires_grad_(False)
    average = copy.deepcopy(online.backbone).requires_grad_(False)
    scale = common.prepare(KernelScale(args.kernel, args.scale), args, run.device)
    optimizer = common.optimizer_for(online, args)
    model = common.parallel(online, args, run.device)
    state = dict(online=online, target=target, average=average, optimizer=optimizer)
    run.begin(average, online.width, scale=scale, scale_optimizer=scale.optimizer, **state)
    peak, warmup = args.lr * args.batch_size / 256, args.warmup * run.epoch_steps

    for step, xs, y in run.steps():
        lr = common.set_lr(optimizer, peak * common.warmup_cosine(step, warmup, run.total))
        with torch.no_grad(), common.autocast(args, run.device):
            fixed = [target(x) for x in xs[:2]] if args.target else []  # (n, d) each

        def loss_of(zs, fixed=fixed, step=step):
            zs = torch.cat([zs, *(z[None].to(zs.dtype) for z in fixed)])  # (M, n, d)
            c = scale(zs, args.seed, step)
            loss, terms = hsic_loss(zs, c, args.gamma, args.kernel, args.features, args.seed, step)
            return loss, dict(terms, c=c)

        loss, terms, h, zs = run.backward(model, xs, loss_of)
        optimizer.step()
        scale.optimizer.step()
        if args.target:
            progress = (1 + math.cos(math.pi * step / run.total)) / 2
            common.ema_update(target[0], online.backbone, 1 - (1 - args.tau) * progress)
            common.ema_update(target[1], online.projector, 1 - (1 - args.tau) * progress)
        common.ema_update(average, online.backbone, min(args.ema, (1 + step) / (10 + step)))
        run.log(loss, terms, lr, h, zs[0], y)


if __name__ == "__main__":
    common.launch(main, get_args)
