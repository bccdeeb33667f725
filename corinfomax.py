"""CorInfoMax: self-supervised learning with an information maximisation criterion.

Maximise the log-determinant mutual information of the two views, by default in an approximation:

    L = alpha mse(z1, z2) - (logdet(R1 + eps I) + logdet(R2 + eps I)) / d

with a mean and a covariance of L2-normalised embeddings per view, which are updated with every batch:

    mu <- lam_mu mu + (1 - lam_mu) mean(z)
    R <- lam_R R + (1 - lam_R) (z - mu)^T (z - mu) / N          (with the new mu)

or, with --objective ldmi, without the approximation:

    L = -2/d (logdet(R1 + eps I) - logdet(R1 - R12 (R2 + eps I)^-1 R12^T + eps I))

Ozsoy, Hamdan, Arik, Yuret, Erdogan, NeurIPS 2022, arXiv 2209.07999. Official code:
serdarozsoy/corinfomax-ssl.

    python corinfomax.py                                            built-in images, a minute on a CPU
    torchrun --nproc_per_node 8 corinfomax.py --data /imagenet      the published recipe

Unlike the official code: R and mu are saved in the checkpoint, log-determinants are computed by Cholesky, and
the learning rate changes every step, not every epoch.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import common

# ----------------------------------------------------------------------------------------- the loss


class CorInfoMax(nn.Module):
    """The loss with its state, float64, the same on every rank: mu (2, d), R (2, d, d), R12 (d, d).

    A call in training mode updates the state. Gradients flow only through this batch's share of it.
    With log_ldmi the mutual information is among the terms whatever the objective is.
    """

    def __init__(
        self, d, forget_R=0.01, forget_mu=0.01, eps=1e-8, r0=1.0, objective="corinfomax", log_ldmi=False
    ):
        super().__init__()
        self.forget_R = forget_R
        self.forget_mu = forget_mu
        self.eps = eps
        self.objective = objective
        self.with_ldmi = log_ldmi or objective == "ldmi"
        self.register_buffer("mu", torch.zeros(2, d, dtype=torch.float64))
        self.register_buffer("R", r0 * torch.eye(d, dtype=torch.float64).repeat(2, 1, 1))
        self.register_buffer("R12", torch.zeros(d, d, dtype=torch.float64))

    def forward(self, z1, z2, alpha):
        """L of normalised z1, z2 (n, d), over all ranks, and its terms, detached."""
        n, d = z1.shape
        N = n * common.world()
        z = torch.stack([z1, z2]).double()  # (2, n, d)
        mean = common.all_reduce(z.sum(1)) / N  # (2, d)
        mu = self.forget_mu * self.mu + (1 - self.forget_mu) * mean
        x = z - mu[:, None]
        R = self.forget_R * self.R + (1 - self.forget_R) * common.all_reduce(x.mT @ x) / N  # (2, d, d)
        invariance = common.all_reduce(F.mse_loss(z[0], z[1], reduction="sum")) / (N * d)
        terms = dict(invariance=invariance)
        R12 = self.R12
        if self.with_ldmi:
            R12 = self.forget_R * self.R12 + (1 - self.forget_R) * common.all_reduce(x[0].mT @ x[1]) / N
            schur = R[0] - R12 @ torch.linalg.solve_ex(self.regularised(R[1]), R12.mT)[0]
            terms["information"] = 2 / d * (self.logdet(R[0]) - self.logdet((schur + schur.mT) / 2))
        if self.objective == "ldmi":
            loss = -terms["information"]
        else:
            terms["big_bang"] = -(self.logdet(R[0]) + self.logdet(R[1])) / d
            loss = alpha * invariance + terms["big_bang"]
        if self.training:
            self.mu = mu.detach()
            self.R = R.detach()
            self.R12 = R12.detach()
        return loss, {name: term.detach() for name, term in terms.items()}

    def regularised(self, R):
        return R + self.eps * torch.eye(len(R), dtype=R.dtype, device=R.device)

    def logdet(self, R):
        """logdet(R + eps I) by Cholesky; NaN where rounding has made the positive definite R indefinite."""
        factor, failed = torch.linalg.cholesky_ex(self.regularised(R))  # `if failed` would wait for a GPU
        return 2 * factor.diagonal().log().sum().masked_fill(failed != 0, torch.nan)


# ------------------------------------------------------------------------------------------ recipes

# fmt: off
_COMMON = dict(
    optimizer="sgd", wd=1e-4, warmup=10.0, first_lr=3e-3, last_lr=1e-6, eps=1e-8, views="byol",
    zero_init=True)
RECIPES = {  # the official commands; --lr is absolute
    "imagenet": dict(  # 69.08 % linear top-1
        _COMMON, arch="resnet50", stem="imagenet", hidden=[8192, 8192], dim=512, norm=True,
        size=224, epochs=100, batch_size=1536, lr=0.2,
        alpha=2000.0, forget=0.1,
    ),
    "imagenet100-resnet18": dict(  # 80.48 %
        _COMMON, arch="resnet18", stem="imagenet", hidden=[4096, 4096], dim=128, norm=False,
        size=224, epochs=400, batch_size=1024, lr=1.0, last_lr=5e-3,
        alpha=500.0, forget=0.01,
    ),
    "tiny-imagenet": dict(  # 54.86 %
        _COMMON, arch="resnet50", stem="imagenet", hidden=[4096, 4096], dim=128, norm=False,
        size=64, epochs=800, batch_size=1024, lr=0.5,
        alpha=500.0, forget=0.1,
    ),
    "cifar10": dict(  # 93.18 %
        _COMMON, arch="resnet18", stem="cifar", hidden=[2048, 2048], dim=64, norm=False,
        size=32, epochs=1000, batch_size=512, lr=0.5, knn_every=10, log_every=500,
        alpha=250.0, forget=0.01,
    ),
    "cifar100": dict(  # 71.61 %
        _COMMON, arch="resnet18", stem="cifar", hidden=[4096, 4096], dim=128, norm=False,
        size=32, epochs=1000, batch_size=512, lr=0.5, knn_every=10, log_every=500,
        alpha=1000.0, forget=0.01,
    ),
    "demo": dict(  # about a minute on two cores
        arch="resnet18", stem="imagenet", zero_init=False, hidden=[1024], dim=64, norm=True,
        size=32, views="cifar", epochs=3, batch_size=128,
        optimizer="adamw", lr=2e-3, wd=1e-4, warmup=0.4, first_lr=0.0, last_lr=0.0,
        alpha=250.0, forget=0.01, eps=1e-8, log_every=10, workers=0,
    ),
}
RECIPES["imagenet100-resnet50"] = dict(  # 82.64 %
    RECIPES["imagenet100-resnet18"], arch="resnet50", epochs=200, warmup=5.0)
# fmt: on


def get_args(argv=None):
    """Arguments from argv, by default the command line; those not given come from the recipe."""
    parser = common.parser_for(__doc__, lr="absolute", last_lr="absolute")
    add = parser.add_argument_group("CorInfoMax").add_argument
    add(
        "--objective",
        choices=["corinfomax", "ldmi"],
        default="corinfomax",
        help="which loss L; ldmi has no alpha, and estimates a covariance of 2 d dimensions",
    )
    log_ldmi = "log the mutual information, whatever the objective"
    add("--log-ldmi", action=argparse.BooleanOptionalAction, default=False, help=log_ldmi)
    add("--alpha", type=common.number(float, 0), help="alpha, weight of the invariance")
    add(
        "--forget",
        type=common.number(float, 0, 0.999999),
        help="lam_R = lam_mu, weight of the previous statistics",
    )
    add(
        "--eps",
        type=common.number(float, 1e-12),
        help="eps, added to the diagonal; raise it if the loss is not finite",
    )
    add("--first-lr", type=common.number(float, 0, 1e6), help="learning rate at the start of the warm-up")
    add("--norm", action=argparse.BooleanOptionalAction, help="BN in the projector")
    add("--hidden", type=common.number(int, 1), nargs="+", help="widths of the projector's hidden layers")
    add("--dim", type=common.number(int, 2), help="d, dimension of the embedding")
    args = common.parse(parser, RECIPES, argv)
    if args.local_crops:
        common.fail(f"--local-crops {args.local_crops}: CorInfoMax is defined for two views, leave it at 0")
    return args


# -------------------------------------------------------------------------------------------- model


class Online(nn.Module):
    """The network that is trained: backbone and projector."""

    def __init__(self, args):
        super().__init__()
        self.micro_batch = args.micro_batch
        self.backbone, self.width = common.resnet(args.arch, args.stem, args.zero_init, args.init)
        self.projector = common.mlp(self.width, *args.hidden, args.dim, norm=args.norm)

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
    first, last = args.first_lr / max(args.lr, 1e-12), args.last_lr / max(args.lr, 1e-12)

    online = common.prepare(Online(args), device)
    model = common.parallel(online, args, device)  # the same, in DDP if there are several ranks
    criterion = CorInfoMax(
        args.dim, args.forget, args.forget, args.eps, objective=args.objective, log_ldmi=args.log_ldmi
    ).to(device)
    optimizer = common.make_optimizer(online, args.optimizer, args.lr, args.wd)
    probe = common.Probe(online.width, train, test, device)
    state = dict(data=train, online=online, optimizer=optimizer, probe=probe)  # saved; of the data, a hash
    state.update(criterion=criterion)
    start = common.resume(args, state)
    log = common.Log(args, start, total)
    signals = common.Signals(args)

    for step, xs, y in log.watch(common.batches(train, args, device, start, total)):
        if common.evaluation_due(step, steps_per_epoch, args):
            log(step, common.evaluate(online.backbone, probe, bank, test, args))
        if step == 0:
            log.show(xs)
        lr = args.lr * common.warmup_cosine(step, warmup, total, first, last)
        common.set_lr(optimizer, lr)

        optimizer.zero_grad()
        with common.autocast(args, device):
            h, zs = model(xs)
        loss, terms = criterion(*F.normalize(zs.float(), dim=2), args.alpha)
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
