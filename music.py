"""MUSIC: multi-segmental informational coding.

Split an embedding into S segments of s units, take a softmax in each, p1 and p2 (N, S, s) for the two views,
and let P[a,i,b,j] = 1/N sum_n p1[n,a,i] p2[n,b,j] be the joint probability of unit i of segment a in view 1
and unit j of segment b in view 2:

    L = 1/S sum_a sum_i P[a,i,a,i] log P[a,i,a,i]                     maximise the entropy of each segment
      + 1/(S (S - 1)) sum_{a != b} sum_ij P[a,i,b,j] log P[a,i,b,j]   and make segments independent
      - 1/(N S) sum_n sum_a log sum_i p1[n,a,i] p2[n,a,i]             views agree

No momentum network, no stop-gradient, no normalisation of the embedding. With S > 1, L >= -3 log s, reached
where units are equally frequent, segments independent, and both views of an image have the same one-hot code.

Niu, Wang 2022, arXiv 2206.06461. The code was not released: the loss is the paper's, settings are those of
its successor's code, IMSVD (github.com/niuchuangnn/IMSVD).

    python music.py                                                 built-in images, minutes on a CPU
    torchrun --nproc_per_node 8 music.py --data /imagenet           the recipe `imagenet`

Differences from IMSVD's code: P (d x d) is computed some rows at a time, and its rows are divided among the
ranks; probabilities are clamped at 1e-30, in logarithms only, not at 1e-8.
"""

import torch
import torch.distributed as dist
from torch import nn

import common

# ----------------------------------------------------------------------------------------- the loss


def safe_log(p):
    return p.clamp(min=1e-30).log()


def music_loss(z1, z2, segment_size, weights=(1, 1, 1), temperature=1):
    """L of embeddings z1, z2 (n, d), d = S s, in float32 or float64, over all ranks; and its terms, detached.

    The weights are those of the terms within segments, between segments and invariance.

    Raises ValueError where d is not a multiple of the segment size s.
    """
    n, d = z1.shape
    if d % segment_size:
        raise ValueError(f"the dimension {d} is not a multiple of the segment size {segment_size}")
    N = n * common.world()
    S = d // segment_size
    z = torch.stack([z1, z2]).view(2, n, S, segment_size)
    p = torch.softmax(z / temperature, 3)

    product = p[0] * p[1]
    P_diagonal = common.all_reduce(product.sum(0)) / N  # (S, s): P[a,i,a,i]
    within = (P_diagonal * safe_log(P_diagonal)).sum() / S
    invariance = -common.all_reduce(safe_log(product.sum(2)).sum()) / (N * S)
    between = torch.zeros_like(within)
    if S > 1:
        p = p.flatten(2)  # (2, n, d)
        value, grad = between_segments(p.detach(), segment_size)
        between = common.with_gradient(value, p, grad)

    loss = weights[0] * within + weights[1] * between + weights[2] * invariance
    terms = dict(within=within, between=between, invariance=invariance)
    return loss, {name: term.detach() for name, term in terms.items()}


def between_segments(p, s):
    """The second term of L, of p (2, n, d) over all ranks, and its gradient with respect to p.

    With P = p1^T p2 / N and G = log P + 1, both without the blocks a = b, the gradient of sum P log P is
    p2 G^T / N for p1 and p1 G / N for p2. G needs only P, so that value and gradient come in one pass. The
    gradient is that of this rank's rows times W, the number of ranks, since DDP divides by W.
    """
    _, n, d = p.shape
    S = d // s
    W = common.world()
    N = n * W
    p1, p2 = common.all_gather(p[0]), common.all_gather(p[1])  # (N, d)
    value = p.new_zeros(())
    grad = torch.zeros(2, N, d, dtype=p.dtype, device=p.device)
    my_segments = torch.arange(S).tensor_split(W)[common.rank()].tolist()
    at_once = max(1, 1024 // s)  # about 1024 rows of P
    for first in my_segments[::at_once]:  # k segments of view 1, against all of view 2
        k = min(at_once, my_segments[-1] + 1 - first)
        rows = slice(first * s, (first + k) * s)
        P = (p1[:, rows] / N).mT @ p2
        G = safe_log(P)
        same = G.view(k, s, S, s)[:, :, first : first + k].diagonal(dim1=0, dim2=2)
        same.zero_()  # the blocks a = b count neither in the value nor in the gradient
        value += (P * G).sum()
        G += 1
        same.zero_()
        grad[0, :, rows] = p2 @ G.mT
        grad[1].addmm_(p1[:, rows], G)
    if W > 1:
        dist.all_reduce(value)
        dist.all_reduce(grad)
    grad = grad.chunk(W, 1)[common.rank()]
    scale = 1 / (S * (S - 1))
    return value * scale, grad * (scale / n)  # 1 / n is W / N


# ------------------------------------------------------------------------------------------ recipes

# fmt: off
RECIPES = {
    "imagenet": dict(  # from IMSVD's imsvd.py and job_imsvd.sh
        arch="resnet50", stem="imagenet", zero_init=True, hidden=[8192], dim=8160,
        size=224, views="byol", epochs=100, batch_size=2048,
        optimizer="lars", lr=0.6, wd=1e-6, warmup=10.0,
        segment=80, temperature=1.0,
    ),
    "cifar10": dict(  # from IMSVD's imsvd_cifar.py
        arch="resnet18", stem="cifar", zero_init=False, hidden=[1024, 1024], dim=1024,
        size=32, views="cifar", epochs=800, batch_size=512,
        optimizer="sgd", lr=0.1, wd=5e-4, warmup=10.0,
        segment=32, temperature=1.0,
    ),
    "demo": dict(  # takes a minute or two on two cores
        arch="resnet18", stem="imagenet", zero_init=False, hidden=[1024], dim=512,
        size=32, views="cifar", epochs=3, batch_size=128,
        optimizer="adamw", lr=2e-3, wd=1e-4, warmup=0.4,
        segment=8, temperature=0.5, log_every=10, workers=0,
    ),
}
# fmt: on


def get_args(argv=None):
    """Arguments from argv, by default the command line; those not given come from the recipe."""
    parser = common.parser_for(__doc__)
    add = parser.add_argument_group("MUSIC").add_argument
    add("--segment", type=common.number(int, 1), help="s, number of units in a segment; divides --dim")
    add("--temperature", type=common.number(float, 1e-3), help="of the softmax in a segment")
    weight = common.number(float, 0)
    add("--weights", type=weight, nargs=3, default=[1.0, 1.0, 1.0], help="within, between, invariance")
    add("--hidden", type=common.number(int, 1), nargs="+", help="widths of the projector's hidden layers")
    add("--dim", type=common.number(int, 2), help="d = S s, dimension of the embedding")
    args = common.parse(parser, RECIPES, argv)
    if args.dim % args.segment:
        common.fail(f"--dim {args.dim} is not a multiple of --segment {args.segment}")
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


def loss_of(zs, args):
    """The mean loss of all pairs of a global view and another view; terms of the two global views."""
    pairs = [(0, 1)]
    for local in range(2, len(zs)):
        pairs += [(0, local), (1, local)]
    losses = [music_loss(zs[a], zs[b], args.segment, args.weights, args.temperature) for a, b in pairs]
    loss = torch.stack([loss for loss, _ in losses]).mean()
    return loss, losses[0][1]


def main(args):
    device = common.start(args, __file__)
    train, bank, test = common.open_data(args, device)  # bank and test: for kNN
    steps_per_epoch = len(train) // args.batch_size
    total = args.epochs * steps_per_epoch
    warmup = args.warmup * steps_per_epoch

    online = common.prepare(Online(args), device)
    model = common.parallel(online, args, device)  # the same, under DDP
    optimizer = common.make_optimizer(online, args)
    probe = common.Probe(online.width, train, device)
    state = dict(data=train, online=online, optimizer=optimizer, probe=probe)  # what is saved; of data a hash
    start = common.resume(args, state)
    log = common.Log(args, start, total)
    signals = common.Signals(args)

    for step, xs, y in log.watch(common.batches(train, args, device, start, total)):
        if common.evaluation_due(step, steps_per_epoch, args):
            log(step, **common.evaluate(online.backbone, probe, bank, test, args))
        if step == 0:
            log.show(xs)
        lr = args.lr * args.batch_size / 256 * common.warmup_cosine(step, warmup, total, last=1e-3)
        common.set_lr(optimizer, lr)

        with common.autocast(args, device):
            h, zs = model(xs)
        loss, terms = loss_of(zs.float(), args)
        optimizer.zero_grad()
        loss.backward()
        gradient_norm = common.gradient_norm(online)  # now, since LARS changes gradients in place
        optimizer.step()
        probe.step(h.float().detach(), y)

        done = step + 1
        if log.due(done):
            spread = common.spread(h, zs[0])
            log(done, loss=loss.detach(), **terms, lr=lr, gradient_norm=gradient_norm, **spread)
        stop, save = signals.agree()
        if stop or save or done % steps_per_epoch == 0:
            common.save(args, done, state, online.backbone, loss, terms)
        if done % steps_per_epoch == 0:
            common.keep(args, done // steps_per_epoch)
        if stop and done < total:
            signals.leave()

    log(total, **common.evaluate(online.backbone, probe, bank, test, args))
    common.finish(log, signals)


if __name__ == "__main__":
    common.launch(main, get_args)
