"""MUSIC: multi-segmental informational coding.

Split an embedding into S segments of s units, take a softmax in each, p1 and p2 (N, S, s) for the two views,
and let P[a,i,b,j] = 1/N sum_n p1[n,a,i] p2[n,b,j] be the joint probability of unit i of segment a and unit j
of segment b:

    L = 1/S sum_a sum_i P log P at (a,i,a,i)                          maximise the entropy of each segment
      + 1/(S (S - 1)) sum_{a != b} sum_ij P log P at (a,i,b,j)        and make segments independent
      - 1/(N S) sum_n sum_a log sum_i p1[n,a,i] p2[n,a,i]             views agree

No momentum network, no stop-gradient, no normalisation of the embedding. L >= -3 log s.

Niu, Wang 2022, arXiv 2206.06461. The code was not released; the numbers are those of its successor's, IMSVD.

    python music.py                                                 built-in images, minutes on a CPU
    torchrun --nproc_per_node 8 music.py --data /imagenet           the published recipe

Other than in that code: P is never held in memory, and its d x d numbers are shared among ranks;
probabilities are clamped at 1e-30 in logarithms, not at 1e-8.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import common

# ----------------------------------------------------------------------------------------- the loss


def log(p: Tensor) -> Tensor:
    return p.clamp(min=1e-30).log()


def music_loss(z1, z2, segment_size, weights=(1, 1, 1), temperature=1) -> tuple[Tensor, dict[str, Tensor]]:
    """L of embeddings z1, z2 (n, d), d = S s, float32 or better, over all ranks; weights of its three terms.

    Raises ValueError where d is not a multiple of the segment size s.
    """
    n, d = z1.shape
    if d % segment_size:
        raise ValueError(f"the dimension {d} is not a multiple of the segment size {segment_size}")
    N, S = n * common.world(), d // segment_size
    p1, p2 = (torch.softmax(z.view(n, S, segment_size) / temperature, 2) for z in (z1, z2))  # (n, S, s)
    same = p1 * p2
    stats = common.all_reduce(torch.cat([same.sum(0).flatten(), log(same.sum(2)).sum().view(1)]))
    P = stats[:-1] / N  # (d,): a = b, i = j
    diagonal = (P * log(P)).sum() / S
    invariance = -stats[-1] / (N * S)
    off_diagonal = (
        OffDiagonal.apply(p1.flatten(1), p2.flatten(1), segment_size) if S > 1 else torch.zeros_like(diagonal)
    )
    loss = weights[0] * diagonal + weights[1] * off_diagonal + weights[2] * invariance
    terms = dict(diagonal=diagonal, off_diagonal=off_diagonal, invariance=invariance)
    return loss, {name: term.detach() for name, term in terms.items()}


class OffDiagonal(torch.autograd.Function):
    """1/(S (S - 1)) sum of P log P over blocks a != b of P = p1^T p2 / N, for p1, p2 (n, d), over all ranks.

    The gradient G = dL/dP = log P + 1 is at hand where P is, so that dL/dp1 = p2 G^T / N and dL/dp2 = p1 G /
    N are computed in the same pass over rows of P, which is then forgotten. Each rank does its share of the
    segments a.
    """

    @staticmethod
    def forward(ctx, p1: Tensor, p2: Tensor, s: int) -> Tensor:
        n, d = p1.shape
        S, W, r = d // s, common.world(), common.rank()
        scale, mine = 1 / (S * (S - 1)), torch.arange(S).tensor_split(W)[r].tolist()
        value, factor = p1.new_zeros(()), scale / n  # of G: 1 / n, not 1 / N, since DDP divides by W
        if W > 1 and d < 2 * n * W:  # by P: d^2 numbers, and d^2 for G
            P = (p1 / (n * W)).mT @ p2
            dist.all_reduce(P)
            G = torch.zeros_like(P)
            for a in mine:
                G[a * s : (a + 1) * s], part = entropy(P[a * s : (a + 1) * s], a, s, factor)
                value += part
            dist.all_reduce(G)
            grad1, grad2 = p2 @ G.mT, p1 @ G
        else:  # by rows: 2 N d numbers for p1 and p2, and 2 N d for their gradients
            p1, p2 = common.all_gather(p1), common.all_gather(p2)
            grad1, grad2 = torch.zeros_like(p1), torch.zeros_like(p2)
            per_pass = max(1, 1024 // s)
            for first in mine[::per_pass]:
                rows = slice(first * s, min(first + per_pass, mine[-1] + 1) * s)
                P = (p1[:, rows] / (n * W)).mT @ p2  # (rows, d), then G in its place
                for a in range(first, rows.stop // s):
                    block = P[a * s - rows.start : (a + 1) * s - rows.start]
                    block[:], part = entropy(block, a, s, factor)
                    value += part
                grad1[:, rows] = p2 @ P.mT
                grad2.addmm_(p1[:, rows], P)
            if W > 1:
                dist.all_reduce(grad1)
                dist.all_reduce(grad2)
            grad1, grad2 = (grad[r * n : (r + 1) * n] for grad in (grad1, grad2))
        ctx.save_for_backward(grad1, grad2)
        if W > 1:
            dist.all_reduce(value)
        return value * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *(grad * saved for saved in ctx.saved_tensors), None


def entropy(P: Tensor, a: int, s: int, factor: float) -> tuple[Tensor, Tensor]:
    """For segment a's rows of P (s, d), block (a, a) left out: factor (log P + 1), and sum P log P."""
    G = log(P)
    G[:, a * s : (a + 1) * s] = 0
    value = (P * G).sum()
    G += 1
    G[:, a * s : (a + 1) * s] = 0
    return G * factor, value


# ------------------------------------------------------------------------------------------ recipes

# fmt: off
RECIPES = {
    "imagenet": dict(
        arch="resnet50", stem="imagenet", size=224, views="byol", epochs=100, batch_size=2048,
        optimizer="lars", lr=0.6, wd=1e-6, warmup=10.0, hidden=[8192], dim=8160, segment=80,
    ),
    "cifar10": dict(
        arch="resnet18", stem="cifar", size=32, views="cifar", epochs=800, batch_size=512,
        optimizer="sgd", lr=0.1, wd=5e-4, warmup=10.0, hidden=[1024, 1024], dim=1024, segment=32,
    ),
    "demo": dict(  # minutes on two cores
        arch="resnet18", stem="imagenet", size=32, views="cifar", epochs=3, batch_size=128,
        optimizer="adamw", lr=2e-3, wd=1e-4, warmup=0.4, hidden=[1024], dim=512, segment=16,
        log_every=10, workers=0,
    ),
}
# fmt: on


def get_args(argv=None):
    """Arguments from argv (default: the command line), each left out taken from the recipe."""
    parser = common.parser_for(__doc__)
    add = parser.add_argument_group("MUSIC").add_argument
    add("--segment", type=common.number(int, 1), help="s, units of a segment; divides --dim")
    add("--temperature", type=common.number(float, 1e-3), default=1.0, help="of the softmax in a segment")
    add(
        "--weights", type=common.number(float, 0), nargs=3, default=[1.0, 1.0, 1.0], help="of the three terms"
    )
    add("--hidden", type=common.number(int, 1), nargs="+", help="widths of the projector's hidden layers")
    add("--dim", type=common.number(int, 2), help="d = S s, dimension of the embedding")
    args = common.parse(parser, RECIPES, argv)
    if args.dim % args.segment:
        common.fail(f"--dim {args.dim} is not a multiple of --segment {args.segment}")
    return args


# -------------------------------------------------------------------------------------------- model


class Online(nn.Module):
    """Backbone and projector."""

    def __init__(self, args):
        super().__init__()
        self.backbone, self.width = common.resnet(args.arch, args.stem)
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
        """Over the two global views; local crops are pulled to both."""
        pairs = [(0, 1)] + [(g, v) for v in range(2, len(zs)) for g in (0, 1)]
        losses = [music_loss(zs[a], zs[b], args.segment, args.weights, args.temperature) for a, b in pairs]
        return torch.stack([loss for loss, _ in losses]).mean(), losses[0][1]

    for step, xs, y in run.steps():
        lr = common.set_lr(optimizer, peak * common.warmup_cosine(step, warmup, run.total, last=1e-3))
        loss, terms, h, zs = run.backward(model, xs, loss_of)
        optimizer.step()
        run.log(loss, terms, lr, h, zs[0], y)


if __name__ == "__main__":
    common.launch(main, get_args)
