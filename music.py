"""MUSIC: multi-segmental informational coding.

Split an embedding into S segments of s units, take a softmax in each, p1 and p2 (N, S, s) for the two views,
and let P[a,i,b,j] = 1/N sum_n p1[n,a,i] p2[n,b,j] be the joint probability of unit i of segment a in view 1
and unit j of segment b in view 2:

    L = 1/S sum_a sum_i P[a,i,a,i] log P[a,i,a,i]                     maximise the entropy of agreed units
      + 1/(S (S - 1)) sum_{a != b} sum_ij P[a,i,b,j] log P[a,i,b,j]   and make segments independent
      - 1/(N S) sum_n sum_a log sum_i p1[n,a,i] p2[n,a,i]             views agree

There is no momentum network, no stop-gradient, and no normalisation of the embedding. With unit weights and
S > 1 the loss is at least -3 log s, which it reaches if units are equally frequent, segments are pairwise
independent, and both views of an image have the same one-hot code.

Niu, Wang 2022, arXiv 2206.06461. The code was not released: the loss is the paper's, the settings come from
the code of its successor, IMSVD (github.com/niuchuangnn/IMSVD). IMSVD clamps probabilities at 1e-8; this file
clamps only P, at 1e-30, inside its logarithm.

    python music.py                                                 built-in images, a minute on a CPU
    torchrun --nproc_per_node 8 music.py --data /imagenet           the recipe `imagenet`
"""

import torch
from torch import nn

import common

# ----------------------------------------------------------------------------------------- the loss


def music_loss(z1, z2, segment_size, weights=(1, 1, 1), temperature=1):
    """L of embeddings z1, z2 (n, d), float32 or better, over all ranks, and its terms, detached.

    weights: those of the terms within segments, between segments, and invariance. Raises ValueError if d is
    not a multiple of the segment size s.
    """
    n, d = z1.shape
    s = segment_size
    if d % s:
        raise ValueError(f"the dimension {d} is not a multiple of the segment size {s}")
    N = n * common.world()
    S = d // s

    log_p1 = torch.log_softmax(z1.view(n, S, s) / temperature, 2)
    log_p2 = torch.log_softmax(z2.view(n, S, s) / temperature, 2)
    p1, p2 = log_p1.exp(), log_p2.exp()
    P = common.all_reduce(p1.flatten(1).mT @ p2.flatten(1)) / N  # (d, d)
    P_log_P = P * P.clamp(min=1e-30).log()
    pairs = P_log_P.view(S, s, S, s).sum((1, 3))  # (S, S), of each pair of segments
    log_agreement = torch.logsumexp(log_p1 + log_p2, 2)  # (n, S); p1 p2 may underflow

    within = P_log_P.diagonal().sum() / S
    between = (pairs.sum() - pairs.diagonal().sum()) / max(1, S * (S - 1))  # 0 if S = 1
    invariance = -common.all_reduce(log_agreement.sum()) / (N * S)
    loss = weights[0] * within + weights[1] * between + weights[2] * invariance
    terms = dict(within=within, between=between, invariance=invariance)
    return loss, {name: term.detach() for name, term in terms.items()}


# ------------------------------------------------------------------------------------------ recipes

# fmt: off
RECIPES = {
    "imagenet": dict(  # from IMSVD's imsvd.py and job_imsvd.sh
        arch="resnet50", stem="imagenet", zero_init=True, hidden=[8192], dim=8160,
        size=224, views="byol", epochs=100, batch_size=2048,
        optimizer="lars", lr=0.6, wd=1e-6, warmup=10.0, last_lr=1e-3,
        segment=80, temperature=1.0,
    ),
    "cifar10": dict(  # from IMSVD's imsvd_cifar.py
        arch="resnet18", stem="cifar", zero_init=False, hidden=[1024, 1024], dim=1024,
        size=32, views="cifar", epochs=800, batch_size=512, knn_every=10, log_every=500,
        optimizer="sgd", lr=0.1, wd=5e-4, warmup=10.0, last_lr=1e-3,
        segment=32, temperature=1.0,
    ),
    "demo": dict(  # about a minute on two cores
        arch="resnet18", stem="imagenet", zero_init=False, hidden=[1024], dim=512,
        size=32, views="cifar", epochs=3, batch_size=128,
        optimizer="adamw", lr=2e-3, wd=1e-4, warmup=0.4, last_lr=1e-3,
        segment=8, temperature=0.5, log_every=10, workers=0,
    ),
}
# fmt: on


def get_args(argv=None):
    """Arguments from argv, by default the command line; those not given come from the recipe."""
    parser = common.parser_for(__doc__)
    add = parser.add_argument_group("MUSIC").add_argument
    add("--segment", type=common.number(int, 1), help="s, number of units in a segment; must divide --dim")
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
    """The mean loss over all pairs of a global view and another view; the terms of the two global views."""
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
        loss, terms = loss_of(zs.float(), args)
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
