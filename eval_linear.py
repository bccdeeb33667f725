"""Every evaluation of a backbone that the four papers report.

    python eval_linear.py --backbone runs/hsic-demo/backbone.pth     linear probe, built-in images
    python eval_linear.py --data /imagenet --backbone runs/hsic/backbone.pth     random crops, 100 epochs
    torchrun --nproc_per_node 8 eval_linear.py --data /imagenet --backbone ...   on 8 GPUs
    ... --cached                     the probe on features of centre crops, kept on disk: seconds
    ... --knn                        cosine-weighted nearest neighbours, temperature 0.07
    ... --lbfgs --data food101       transfer: L2-regularised logistic regression on centre crops
    ... --finetune --labels 1        all weights, on 1 % of the labels (or 10, or a list of file names)
    ... --recipe sfrik-10            a published recipe; any flag overrides it
    ... --backbone random --arch resnet18     the floor; --backbone torchvision: the supervised ceiling

--data is what pretraining takes, with labels; --labels goes with every mode. What is chosen is chosen on a
tenth of the TRAINING images, held out by class and seed, never on test images. The probe trains a grid of
learning rates and weight decays at once on the rest, and reports the chosen head as it is; with one --lr and
one --wd nothing is held out, as in published protocols. --lbfgs fits again, on all training images, with the
chosen penalty. --finetune and --knn choose nothing: numbers are those of the last epoch, where the official
code of CorInfoMax and SFRIK reports the best epoch on test images.

--out, by default beside the backbone, holds results.jsonl (one line: the whole protocol), neighbours.png
(test images, each with its nearest training images, right ones framed green), TensorBoard events, log.jsonl,
and the checkpoint from which the same command resumes. Features are kept in features/ beside the backbone,
and made again when its weights or the data (sizes and times of files) change.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import Data, Pixels, Split, all_reduce, fail, knn_votes, nearest, number, rank, world

# -------------------------------------------------------------------------------------- classifiers


def share(x: Tensor) -> Tensor:
    """This rank's rows of what every rank has."""
    return x[rank() :: world()]


class Heads(nn.Module):
    """G linear classifiers trained at once on the same features, by SGD with momentum 0.9, each with its own
    peak learning rate and weight decay (G,), from zero. Biases do not decay. No autograd: the gradient of the
    cross-entropy is (softmax - one-hot) h^T, for all heads one matrix product."""

    def __init__(self, lr: list[float], wd: list[float], classes: int, width: int):
        super().__init__()
        for name, values in (("lr", lr), ("wd", wd)):
            self.register_buffer(name, torch.tensor(values), persistent=False)
        for name in ("weight", "velocity"):
            self.register_buffer(name, torch.zeros(classes, len(lr), width))
        for name in ("bias", "bias_velocity"):
            self.register_buffer(name, torch.zeros(classes, len(lr)))

    def forward(self, h: Tensor) -> Tensor:
        """Logits (n, C, G) of features h (n, D); classes come first since a softmax of the last is slow."""
        logits = torch.addmm(self.bias.flatten(), h, self.weight.flatten(0, 1).mT)
        return logits.view(len(h), *self.bias.shape)

    def step(self, h: Tensor, y: Tensor, factor: float) -> Tensor:
        """One step at `factor` times the peak rates on this rank's rows, h (n, D) and y (n,), of the global
        batch. The mean loss of each head on them: (G,)."""
        N, index = len(h) * world(), y.view(-1, 1, 1).expand(-1, 1, len(self.lr))
        P = self(h).softmax(1)  # (n, C, G)
        loss = -P.gather(1, index).log().mean((0, 1))
        P.scatter_add_(1, index, P.new_full((), -1.0).expand(index.shape))
        gradient = all_reduce(P.flatten(1).mT @ h).view_as(self.weight) / N
        self.velocity.mul_(0.9).add_(gradient).addcmul_(self.wd[:, None], self.weight)
        self.bias_velocity.mul_(0.9).add_(all_reduce(P.sum(0)) / N)
        self.weight.addcmul_(self.velocity, self.lr[:, None], value=-factor)
        self.bias.addcmul_(self.bias_velocity, self.lr, value=-factor)
        return loss

    def accuracy(self, h: Tensor, y: Tensor) -> Tensor:
        """Share of h (m, D), the same on every rank, that each head has right: (G,); 0 if it has diverged."""
        pairs = zip(share(h).split(1024), share(y).split(1024), strict=True)
        right = sum((self(rows).argmax(1) == labels[:, None]).sum(0) for rows, labels in pairs)
        return all_reduce(right.double()) / len(h) * self.weight.isfinite().all(2).all(0)


def middle_best(values: Tensor) -> int:
    """Where the largest of values (G,) is; of equals the middle one, for few images tell few rates apart."""
    best = (values == values.max()).nonzero()[:, 0]
    return int(best[len(best) // 2])


def fit_logistic(h: Tensor, y: Tensor, classes: int, penalty: float, start: Tensor, rounds: int = 100):
    """Multinomial logistic regression by L-BFGS: the least of mean cross-entropy + penalty / 2 |W|^2.

    h (n, D), y (n,): this rank's rows, float64. start (C, D + 1): W, and the bias, which is not penalised.
    Ends where no entry of the gradient is above 1e-5, or after `rounds` of ten steps; returns (C, D + 1) and
    that entry. Fast where the columns of h are uncorrelated: their curvatures are scaled to be equal.
    """
    N, square = all_reduce(torch.cat([h.new_tensor([len(h)]), h.square().sum(0)])).tensor_split([1])
    scale = torch.cat([(square / N / classes + penalty).rsqrt(), h.new_tensor([classes**0.5])])
    V = (start / scale).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [V], max_iter=10, history_size=20, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        W, b = (V * scale).tensor_split([-1], 1)
        logits = F.linear(h, W.contiguous(), b[:, 0])  # of a slice, the backward takes 1.4 x the time
        loss = F.cross_entropy(logits, y, reduction="sum") / N + penalty / 2 * W.square().sum() / world()
        V.grad = all_reduce(torch.autograd.grad(loss, V)[0])
        return all_reduce(loss.detach())

    def largest() -> float:
        closure()
        return float((V.grad / scale).abs().max())

    for _ in range(rounds):
        if largest() < 1e-5:
            break
        optimizer.step(closure)
    return V.detach() * scale, largest()


def accuracies(scores: Tensor, y: Tensor) -> dict[str, float]:
    """top1, top5, mean per class in % over all ranks' images; scores (m, C) and y (m,) are this rank's."""
    top = scores.topk(min(5, scores.shape[1]))
    hit = (top.indices == y[:, None]) & top.values.isfinite()
    counts = torch.stack([hit[:, 0], hit.any(1), torch.ones_like(hit[:, 0])]).double()
    counts = counts.new_zeros(3, scores.shape[1]).index_add_(1, y, counts)  # (3, C)
    first, five, images = all_reduce(counts)
    found = first.sum() / images.sum(), five.sum() / images.sum(), (first / images)[images > 0].mean()
    return {name: 100 * float(x) for name, x in zip(("top1", "top5", "mean_per_class"), found, strict=True)}


# ----------------------------------------------------------------------------------------- backbone

WRAPPERS = {"state_dict", "model", "module", "backbone", "encoder", "encoder_q", "online", "average"}
PROBE = "layer1.0.conv1.weight"


def read_weights(path: str) -> dict[str, Tensor]:
    """A ResNet's weights under torchvision's names, from any common checkpoint around it."""
    if not os.path.isfile(path):  # a pipe or a device would never end
        fail(f"--backbone {path}: no such file")
    try:
        flat = dict(common.flatten(common.load_checked(path, "cpu")))
    except Exception as error:  # damage, and pickles that would run code, have many names
        reason = str(error).strip().partition("\n")[0][:150]
        fail(f"--backbone {path} is no checkpoint of weights alone ({type(error).__name__}: {reason})")
    prefixes = [name[: -len(PROBE)] for name in flat if name.endswith(PROBE)]
    prefixes = [p for p in prefixes if WRAPPERS.issuperset(p.split(".")[:-1])]
    if not prefixes:
        fail(f"--backbone {path} holds no ResNet; its first keys: {', '.join([*flat][:3]) or 'none'}")
    prefix = min(prefixes, key=lambda p: ("average" not in p, len(p)))  # an average is for this
    return {name[len(prefix) :]: value for name, value in flat.items() if name.startswith(prefix)}


def shapes_of(weights: dict[str, Tensor]) -> set[tuple]:
    """(name, shape) of all but the classifier, and the counters, which old checkpoints lack."""
    kept = (name for name in weights if not name.startswith("fc.") and not name.endswith("batches_tracked"))
    return {(name, tuple(weights[name].shape)) for name in kept}


def load_backbone(args: argparse.Namespace) -> tuple[nn.Module, int]:
    """The network of --backbone and its number of features; sets args.arch, args.stem, args.backbone_hash."""
    if args.backbone in ("random", "torchvision"):
        weights, arch, stem = {}, args.arch or "resnet50", args.stem or "imagenet"
    else:
        weights = read_weights(args.backbone)
        stem = "cifar" if weights.get("conv1.weight", torch.empty(7)).shape[-1] == 3 else "imagenet"
        with torch.device("meta"):
            known = torchvision.models.list_models(torchvision.models, include="*resne*")
            shapes = {name: shapes_of(common.resnet(name, stem)[0].state_dict()) for name in known}
        arch = min(known, key=lambda name: len(shapes[name] ^ shapes_of(weights)))
    for name, read in (("arch", arch), ("stem", stem)):
        if getattr(args, name) not in (None, read):
            fail(f"--{name} {getattr(args, name)}: the weights in {args.backbone} are of {read}")
        setattr(args, name, read)
    net, width = common.resnet(arch, stem)
    if args.backbone == "torchvision":
        try:
            weights = torchvision.models.get_model(arch, weights="IMAGENET1K_V1").state_dict()
        except (OSError, RuntimeError, ValueError) as error:
            fail(f"--backbone torchvision: the weights of {arch} cannot be had ({error})")
    if weights and (wrong := shapes_of(weights) ^ shapes_of(net.state_dict())):
        keys = ", ".join(sorted({name for name, _ in wrong})[:3])
        fail(f"--backbone {args.backbone} does not fit {arch} with stem {stem}, first in {keys}")
    net.load_state_dict(weights, strict=False)  # nothing is missing but counters, nothing is over but fc
    args.backbone_hash = digest(*(t for _, t in sorted(net.state_dict().items()) if t.is_floating_point()))
    return net, width


def digest(*parts: Tensor) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.contiguous().cpu().numpy())
    return sha.hexdigest()[:16]


# --------------------------------------------------------------------------------------------- data

LABELLED, HELD_OUT = -5, -6  # uniforms of common.uniform that choose images, beside its own choices


def stratified(labels: Tensor, part: float, seed: int, choice: int) -> Tensor:
    """True for `part` of each class, rounded, at least one image: (n,). The same for a seed."""
    order = common.uniform(seed, 0, torch.arange(len(labels)), choice).argsort()
    classes = order[labels[order].argsort(stable=True)].split(labels.bincount().tolist())
    chosen = torch.cat([rows[: max(1, round(len(rows) * part))] for rows in classes])
    return torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, chosen, True)


def fingerprint(split: Split) -> str:
    """Of the pixels, or of the paths, sizes and times of the files; and of the labels."""
    if isinstance(split, Pixels):
        return digest(split.images, split.labels)
    paths = map(split.path, range(len(split.labels)))
    stats = (os.stat(path, follow_symlinks=os.path.exists(path)) for path in paths)  # a link may lead nowhere
    changes = torch.tensor([(status.st_size, status.st_mtime_ns) for status in stats])
    return digest(split.paths, split.ends, split.labels, changes)


@common.readable("--data")
def open_labelled(args: argparse.Namespace) -> Data:
    """--data, whose training and test images have the same classes, two or more; the images with a label."""
    if args.data and args.data.partition(":")[0] not in common.NAMED_DATA and os.path.isdir(args.data):
        root = Path(args.data)
        for folder in (root / "train", root / ("val" if (root / "val").is_dir() else "test")):
            if not any(path.is_dir() for path in folder.glob("*")):
                fail(f"--data {root} is unlabelled, or has no val/ or test/: no class folders in {folder}")
    data = common.open_data(argparse.Namespace(data=args.data, batch_size=1), Path(os.devnull))
    train, test = (s.take((s.labels >= 0).nonzero()[:, 0]) if (s.labels < 0).any() else s for s in data[:2])
    known, tested = set(train.labels.tolist()), set(test.labels.tolist())
    classes = data.classes or [str(c) for c in range(max(known | tested) + 1)]
    if wrong := [classes[c] for c in sorted(known ^ tested)]:
        fail(f"--data {args.data}: {len(wrong)} classes are not in both splits: {', '.join(wrong[:3])}")
    if len(known) < 2:
        fail(f"--data {args.data} has one class only: there is nothing to tell apart")
    return Data(train, test, classes)


@common.readable("--labels")
def choose_labels(train: Split, labels: str, seed: int) -> Split:
    """--labels: that many per cent of each class, or the files of a list (names, or class/name)."""
    percent = float(labels) if labels.replace(".", "", 1).isdecimal() else 0.0
    if 0 < percent <= 100:
        return train.take(stratified(train.labels, percent / 100, seed, LABELLED).nonzero()[:, 0])
    text = Path(labels).read_text() if os.path.isfile(labels) and not isinstance(train, Pixels) else ""
    names = list(dict.fromkeys(filter(None, map(str.strip, text.splitlines()))))
    if not names:
        fail(
            f"--labels {labels}: neither a percentage above 0, at most 100, nor a list of the files of --data"
        )
    row_of = {}
    for i in range(len(train.labels)):
        path = Path(train.path(i))
        for name in (path.name, f"{path.parent.name}/{path.name}"):
            row_of[name] = -1 if name in row_of else i
    if missing := [name for name in names if row_of.get(name, -1) < 0]:
        shown = ", ".join(missing[:3])
        fail(f"--labels {labels}: {len(missing)} of {len(names)} are missing, or there twice: {shown}")
    return train.take(torch.tensor([row_of[name] for name in names]))


# ---------------------------------------------------------------------------------------- arguments

# fmt: off
GRID = dict(lr=[x * 10.0**e for e in range(-3, 2) for x in (1, 2, 5)], wd=[0.0, 1e-6, 1e-4])  # 45 heads
MODES = {  # each with the flags that are only for some, and their defaults
    "linear": dict(epochs=100, batch_size=256, **GRID),
    "cached": dict(epochs=20, batch_size=256, **GRID),
    "knn": dict(k=[10, 20, 100, 200]),
    "lbfgs": dict(),
    "finetune": dict(epochs=20, batch_size=256, lr=[0.1], lr_backbone=0.01, wd=[0.0], schedule="cosine"),
}
RECIPES = {  # the official commands, where they differ from the mode's defaults
    "sfrik-linear": dict(mode="linear", lr=[0.4], wd=[1e-6]),
    "sfrik-1": dict(mode="finetune", labels="1", lr_backbone=0.004, lr=[1.0]),
    "sfrik-10": dict(mode="finetune", labels="10", lr_backbone=0.02, lr=[0.1]),
    "corinfomax-1": dict(mode="finetune", labels="1", lr_backbone=0.005, lr=[10.0], schedule="step"),
    "corinfomax-10": dict(mode="finetune", labels="10", lr_backbone=0.005, lr=[20.0], schedule="step"),
}
PENALTIES = torch.logspace(1, -7, 45, dtype=torch.float64).tolist()  # of features of mean square norm 1
common.VIEWS["crop and flip"] = (common.View((0.08, 1), (0, 0, 0, 0), 0.0, gray=0.0),)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from argv (default: the command line), over the recipe's, over the mode's defaults."""
    parser = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("what (default: the linear probe on random crops)")
    modes = group.add_mutually_exclusive_group()
    for mode in [*MODES][1:]:
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    group.add_argument("--recipe", choices=list(RECIPES), help="a published command")
    group.add_argument("--labels", help="per cent of each class to train on, or a file with names of images")
    add = parser.add_argument_group("backbone, data and run").add_argument
    add("--backbone", required=True, help="backbone.pth, a checkpoint, random or torchvision")
    add("--arch", help="for random and torchvision (default: resnet50); of a file it is read")
    add("--stem", choices=["imagenet", "cifar"], help="for random (default: imagenet)")
    add("--data", help="folder with train/ and val/ (or test/) of class folders; or by name, with "
        f":/where/it/lies: {', '.join(common.NAMED_DATA)}; left out: built-in drawings")
    add("--out", help="directory of this evaluation; the same command again resumes")
    add("--features", help="directory of kept features (default: features/ beside the backbone)")
    add("--size", type=number(int, 12, 1024), help="pixels (default: as in pretraining, or of small images, "
        "or 224)")
    add("--projector", action="store_true", help="test features with thumbnails for TensorBoard's projector")
    common.add_run_flags(add)
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1))
    add("--batch-size", type=number(int, 2), help="N, over all ranks")
    add("--lr", type=number(float, 0, 1e6), nargs="+", help="peaks, for 256 images, of the heads")
    add("--wd", type=number(float, 0, 1e3), nargs="+", help="weight decays: every one with every --lr")
    add("--lr-backbone", type=number(float, 0, 1e6), help="of --finetune")
    add("--schedule", choices=["cosine", "step"], help="of --finetune; step: at each quarter the rate of the "
        "head falls to 1/10, of the backbone to 1/5 (CorInfoMax)")
    add("--k", type=number(int, 1), nargs="+", help="neighbours")
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    given = {"mode": "linear", **RECIPES.get(args.recipe, {}), **given}
    special = {name for flags in MODES.values() for name in flags}
    if wrong := sorted(special & given.keys() - MODES[given["mode"]].keys()):
        fail(f"--{wrong[0].replace('_', '-')} has no meaning for {given['mode']}")
    args = argparse.Namespace(**{**vars(args), **MODES[given["mode"]], **given})
    if args.mode == "finetune" and len(args.lr) * len(args.wd) > 1:
        fail("--finetune takes one --lr and one --wd: it trains one network")
    args.precision = args.precision or common.default_precision(args.device)
    there = os.path.exists(args.backbone)
    home = Path(args.backbone).parent if there else Path("runs", f"{args.backbone}-{args.arch or 'resnet50'}")
    name = Path((args.data or "drawings").partition(":")[0]).name
    labels = f"-labels-{Path(args.labels).name}" if args.labels else ""
    args.out = args.out or str(home / f"eval-{args.mode}-{name}{labels}")
    args.features = args.features or str((home if there else Path(args.out)) / "features")
    return argparse.Namespace(**vars(args), views="crop and flip", local_crops=0, knn_every=1, compile=False)
# fmt: on

# ---------------------------------------------------------------------------------- the evaluation


class Evaluation(common.Run):
    """An evaluation: what a run has (directory, lock, log, checkpoints, signals), and features.

    Errors of use are raised when it is made, before anything is written; `open` makes the directory.
    fit, held: what is trained and what is chosen on, as rows of the training images.
    """

    FREE = common.Run.FREE | {"features", "projector"}

    def __init__(self, args: argparse.Namespace):
        self.args, self.script, self.out = args, Path(__file__), Path(args.out)
        self.kept, self.seconds, self.lapped = {}, {}, time.monotonic()
        batch = args.batch_size or 2 * world()  # kNN and L-BFGS have none
        self.device = common.start_ranks(argparse.Namespace(**{**vars(args), "batch_size": batch}))
        torch.manual_seed(args.seed)
        net, self.width = load_backbone(args)
        self.train, self.test, self.classes = open_labelled(args)
        if args.labels:
            self.train = choose_labels(self.train, args.labels, args.seed)
        args.size = args.size or default_size(args.backbone, self.test)
        labels = self.train.labels
        n, held = len(labels), torch.zeros(len(labels), dtype=torch.bool)
        self.points = list(itertools.product(args.lr or (), args.wd or ()))
        if args.mode == "lbfgs" or len(self.points) > 1:
            alone = labels.bincount()[labels] < 2
            held = stratified(labels, 0.1, args.seed, HELD_OUT) & ~alone
            if not held.any():
                fail(f"{n} training images, one a class, leave none to choose on: give one --lr and one --wd")
        self.fit, self.held = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
        flag, asked = ("k", max(args.k)) if args.k else ("batch-size", batch)
        if asked > len(self.fit):
            fail(f"--{flag} {asked} is more than the {len(self.fit)} images to train on")
        self.keys = dict(train=fingerprint(self.train), test=fingerprint(self.test))
        args.data_hash = self.keys["train"][:8] + self.keys["test"][:8]
        self._check_directory()
        self.data = Data(self.train.take(self.fit), None, self.classes)
        if args.mode in ("linear", "finetune"):
            self.data = common.load_small(self.data, self.device)
        self.epoch_steps = max(1, len(self.data.train.labels) // batch)
        self.step, self.stop, self.total = 0, 0, (args.epochs or 0) * self.epoch_steps
        self.net = common.prepare(net, args, self.device)
        self.lap("loading")

    def lap(self, name: str) -> None:
        """The seconds since the last lap, under this name in results.jsonl."""
        self.seconds[name] = round(time.monotonic() - self.lapped, 2)
        self.lapped = time.monotonic()

    def features(self, split: Split, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features (m, D) of centre crops of these images and labels (m,), on every rank's device."""
        parts = tqdm(rows.split(4096), "features", disable=rank() > 0 or len(rows) < 4 * 4096)
        found = [common.features(self.net, split, i, self.args, self.device) for i in parts]
        h, y = (torch.cat(t) for t in zip(*found, strict=True))
        return h, y

    def extract(self, name: str) -> tuple[Tensor, Tensor]:
        """`features` of all images of a split, for the rest of the evaluation; from disk, if there."""
        kept = f"{name}-{self.keys[name]}-{self.args.size}-{self.args.precision}.pt"
        split, path, fresh = getattr(self, name), Path(self.args.features) / kept, False
        with contextlib.suppress(Exception):  # not there, or damaged
            saved = common.load_checked(path, self.device)
            fresh = saved["backbone"] == self.args.backbone_hash
        if all_reduce(torch.tensor(float(fresh), device=self.device)) < world():
            h, y = self.features(split, torch.arange(len(split.labels)))
            saved = dict(backbone=self.args.backbone_hash, h=h, y=y)
            if rank() == 0:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    torch.save(dict(saved, h=h.cpu(), y=y.cpu()), path.with_suffix(f".{os.getpid()}"))
                    os.replace(path.with_suffix(f".{os.getpid()}"), path)
                except (OSError, RuntimeError) as error:
                    path.with_suffix(f".{os.getpid()}").unlink(missing_ok=True)
                    print(f"features are not kept: {path} cannot be written ({error})", file=sys.stderr)
        self.lap(f"features of {name}")
        self.kept[name] = saved["h"], saved["y"]
        return self.kept[name]

    def batches(self):
        """Views; or with --cached features, as the only view."""
        if self.args.mode != "cached":
            return super().batches()
        h, y = self.fit_features
        order = common.Batches(len(h), self.args.batch_size, self.args.seed, self.step, self.total)
        return (([h[i]], y[i]) for _, i in order)

    def evaluate(self) -> None:
        """At the end of epochs: the accuracy of every head on held-out images."""
        if self.step and len(self.held):
            found = (100 * self.heads.accuracy(*self.held_features)).tolist()
            pairs = zip(self.points, found, strict=True)
            named = {f"held_out/lr {lr:g} wd {wd:g}": x for (lr, wd), x in pairs}
            self.record(self.step, best=max(found), **named)
            self.bar.set_postfix_str(f"best held-out {max(found):.2f} %", refresh=False)

    def watch(self, loss: Tensor, factor: float) -> None:
        """A record every --log-every steps."""
        done = self.step + 1
        if done % self.args.log_every == 0 or done in (1, self.total):
            if not (least := float(loss.nan_to_num(torch.inf).min())) < torch.inf:
                fail(f"step {self.step}: the loss is not finite; the last checkpoint in {self.out} is kept")
            self.record(done, loss=least, rate=factor)

    _check_state = _show = _summary = lambda *_: None  # heads at rates that are too high diverge: they lose


def default_size(backbone: str, split: Split) -> int:
    """--size of the run that left this backbone; or the side of images small enough for memory; or 224."""
    try:
        return json.loads((Path(backbone).parent / "args.json").read_text())["size"]
    except (OSError, ValueError, KeyError, TypeError):
        image = split.read(0)
    side = min(image.shape[1:]) if image is not None else 0
    return side if 12 <= side <= common.MEMORY_SIDE else 224


def probe(run: Evaluation) -> tuple[dict, dict[str, Tensor]]:
    """The linear probe, on random crops or on kept features."""
    args, cached = run.args, run.args.mode == "cached"
    lr, wd = zip(*((lr * args.batch_size / 256, wd) for lr, wd in run.points), strict=True)
    run.heads = Heads(lr, wd, len(run.classes), run.width).to(run.device)
    run.EXPORT = "heads.pth"
    run.open(run.heads, dict(heads=run.heads))
    net = run.net.eval().requires_grad_(False)
    if cached:
        h, y = run.extract("train")
        run.fit_features, run.held_features = (h[run.fit], y[run.fit]), (h[run.held], y[run.held])
    elif len(run.held):
        run.held_features = run.features(run.train, run.held)
        run.lap("features of held-out")

    for step, (x,), y in run.steps():
        factor = common.warmup_cosine(step, 0, run.total)
        with torch.no_grad(), common.autocast(args, run.device):
            h = x if cached else net(x)
        run.watch(run.heads.step(h.float(), y, factor), factor)

    run.lap("heads" if cached else "training")
    chosen, found = 0, {}
    if len(run.held):
        accuracy = run.heads.accuracy(*run.held_features)
        chosen, values = middle_best(accuracy), (100 * accuracy).tolist()
        found["grid"] = [dict(lr=a, wd=b, held_out=x) for (a, b), x in zip(run.points, values, strict=True)]
    h, _ = run.extract("test")
    found["chosen"] = "lr {:g}, wd {:g}".format(*run.points[chosen])
    weight, bias = run.heads.weight[:, chosen], run.heads.bias[:, chosen]
    return found, {found["chosen"]: F.linear(share(h), weight, bias)}


def logistic(run: Evaluation) -> tuple[dict, dict[str, Tensor]]:
    """L-BFGS along the penalties, strong to weak; the best on held-out images is fitted to all of them."""
    run.open(run.net, {})
    (h, y), (h_test, _) = run.extract("train"), run.extract("test")
    mean = h.double().mean(0)
    h, h_test = (x.double() - mean for x in (h, h_test))
    axes = torch.linalg.eigh(h.mT @ h)[1]  # features along them are uncorrelated, and |W| is the same
    norm = h.square().sum(1).mean().sqrt()  # so that a penalty means the same for every backbone
    h, h_test = (x @ axes / norm for x in (h, h_test))
    score = lambda h, weight: h @ weight[:, :-1].mT + weight[:, -1]
    fit, held, C, grid = share(run.fit), share(run.held), len(run.classes), []
    weights = [h.new_zeros(C, run.width + 1)]
    for penalty in tqdm(PENALTIES, "penalties", disable=rank() > 0):
        weight, gradient = fit_logistic(h[fit], y[fit], C, penalty, weights[-1], rounds=20)
        top1 = accuracies(score(h[held], weight), y[held])["top1"]
        grid.append(dict(penalty=penalty, held_out=top1, gradient=gradient))
        weights.append(weight)
        run.record(len(grid), held_out=top1)
    penalty, start = max(zip(grid, weights[1:], strict=True), key=lambda pair: pair[0]["held_out"])
    weight, gradient = fit_logistic(share(h), share(y), C, penalty["penalty"], start)
    run.lap("fits")
    chosen = f"penalty {penalty['penalty']:.3g}"
    return dict(grid=grid, chosen=chosen, gradient=gradient), {chosen: score(share(h_test), weight)}


def knn(run: Evaluation) -> tuple[dict, dict[str, Tensor]]:
    """The vote of the k nearest, each rank for its share of the test images."""
    run.open(run.net, {})
    (bank, labels), (h, _) = run.extract("train"), run.extract("test")
    similarity, at = nearest(share(h), bank, max(run.args.k))
    votes = lambda k: knn_votes(similarity[:, :k], labels[at[:, :k]], len(run.classes))
    scores = {f"k = {k}": votes(k) for k in sorted(run.args.k)}
    run.lap("search")
    return dict(temperature=0.07), scores


def finetune(run: Evaluation) -> tuple[dict, dict[str, Tensor]]:
    """All weights, backbone and classifier at rates of their own; exported under torchvision's names."""
    args, net = run.args, run.net
    head = nn.Linear(run.width, len(run.classes)).to(run.device, next(net.parameters()).dtype)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    parts = (net, args.lr_backbone, 0.2), (head, args.lr[0], 0.1)  # peak rates; falls of --schedule step
    groups = [dict(params=[*part.parameters()], peak=lr, fall=fall) for part, lr, fall in parts]
    net.fc = head
    optimizer = torch.optim.SGD(groups, 0.0, momentum=0.9, weight_decay=args.wd[0])
    model = common.parallel(net, args, run.device)
    run.EXPORT = "finetuned.pth"
    run.open(net, dict(model=net, optimizer=optimizer))

    for step, (x,), y in run.steps():
        cosine = common.warmup_cosine(step, 0, run.total)
        for group in optimizer.param_groups:
            factor = group["fall"] ** (4 * step // run.total) if args.schedule == "step" else cosine
            group["lr"] = group["peak"] * args.batch_size / 256 * factor
        with common.autocast(args, run.device):
            logits = model(x)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.watch(loss.detach(), factor)

    run.lap("training")
    net.fc = nn.Identity()
    h, _ = run.kept["test"] = run.features(run.test, torch.arange(len(run.test.labels)))
    return {}, {"last epoch": head(share(h).to(head.weight.dtype))}


# ------------------------------------------------------------------------------------------- report


def thumbnails(split: Split, rows: Tensor, side: int) -> Tensor:
    """Centre squares (n, 3, side, side) in [0, 1]; black where an image cannot be read."""
    black = torch.zeros(3, side, side).byte()
    images = [black if (image := split.read(i)) is None else image.cpu() for i in rows.tolist()]
    return torch.stack([TF.center_crop(TF.resize(image, [side]), [side]) for image in images]) / 255


def neighbour_sheet(run: Evaluation, queries: int = 12, k: int = 9, side: int = 64) -> Tensor:
    """A row for each of some test images, then its nearest training images (of 10,000, where features are not
    kept), framed green where the class is right and red where it is wrong: (3, H, W) uint8."""
    n = len(run.train.labels)
    rows, bank = common.evenly(len(run.test.labels), queries), torch.arange(n)
    if "train" not in run.kept:
        bank = common.evenly(n, 10_000)
        run.kept["train"] = run.features(run.train, bank)
    (h, y), (h_bank, y_bank) = run.kept["test"], run.kept["train"]
    at = nearest(h[rows], h_bank, k)[1]
    kind = F.pad((y_bank[at] == y[rows, None]).long(), (1, 0), value=2).flatten().cpu()
    frames = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2], [0.2, 0.3, 1.0]])[kind]
    tiles = frames[:, :, None, None].repeat(1, 1, side + 8, side + 8)
    found = thumbnails(run.train, bank[at.flatten().cpu()], side).view(len(rows), -1, 3, side, side)
    found = torch.cat([thumbnails(run.test, rows, side)[:, None], found], 1)
    tiles[:, :, 4:-4, 4:-4] = found.flatten(0, 1)
    sheet = torchvision.utils.make_grid(tiles, nrow=found.shape[1], padding=2, pad_value=1.0)
    return (sheet * 255).round().byte()


def show(record: dict) -> None:
    """The table on the terminal."""
    grid, images = record.get("grid"), record["images"]
    if grid:
        name = "lr" if "lr" in grid[0] else "penalty"
        print(f"top-1 on {images['held_out']} held-out training images, %")
        print(f"{name:>10}", *(f"{f'wd {wd:g}':>9}" for wd in record["args"]["wd"] or ()))
        for value, points in itertools.groupby(grid, lambda point: point[name]):
            print(f"{value:10.3g}", *(f"{point['held_out']:9.2f}" for point in points))
    print(f"{record['mode']}, {images['test']} test images, %     top-1     top-5   mean per class")
    for name, found in record["results"].items():
        print(f"{name:>30}{found['top1']:14.2f}{found['top5']:10.2f}{found['mean_per_class']:14.2f}")


def main(args: argparse.Namespace) -> None:
    run = Evaluation(args)
    kept = run.out / "results.jsonl"
    if kept.exists() and not args.projector:
        return show(json.loads(kept.read_text())) if rank() == 0 else None
    modes = dict(linear=probe, cached=probe, knn=knn, lbfgs=logistic, finetune=finetune)
    found, scores = modes[args.mode](run)
    results = {name: accuracies(values, share(run.kept["test"][1])) for name, values in scores.items()}
    sheet, (h, y) = neighbour_sheet(run), run.kept["test"]
    if rank() > 0:
        return common.barrier()
    train, test = run.train.labels, run.test.labels
    trained = len(train if args.mode == "lbfgs" else run.fit)
    crops = "crops of 8 to 100 % of the area, flip" if args.mode in ("linear", "finetune") else "centre crop"
    record = dict(
        mode=args.mode, top1=next(iter(results.values()))["top1"],
        backbone=args.backbone, data=args.data or "built-in drawings", **found, results=results,
        images=dict(train=len(train), trained_on=trained, held_out=len(run.held), test=len(test)),
        classes=len(run.classes),
        views=dict(training=crops, test="centre crop", size=args.size),
        chosen_on="held-out training images" if len(run.held) else "nothing was chosen",
        reported="fitted again on all training images" if args.mode == "lbfgs" else "as trained",
        ranks=world(), seconds=dict(run.seconds, all=round(sum(run.seconds.values()), 2)),
        versions=dict(torch=torch.__version__, torchvision=torchvision.__version__, python=sys.version),
        args=vars(args),
    )  # fmt: skip
    show(record)
    run._write("neighbours.png", lambda file: file.write(torchvision.io.encode_png(sheet).numpy().tobytes()))
    run.board.add_image("neighbours", sheet)
    for name, metric in itertools.product(results, ("top1", "top5", "mean_per_class")):
        run.board.add_scalar(f"test {metric}/{name}", results[name][metric], run.total)
    if args.projector:
        rows = common.evenly(len(run.test.labels), 2000)
        names = [run.classes[c] for c in y[rows].tolist()]
        run.board.add_embedding(h[rows], names, thumbnails(run.test, rows, 32), tag="test")
    run.board.close()
    if not kept.exists():
        run._write(kept.name, lambda file: file.write(json.dumps(record).encode() + b"\n"))
    print(f"{run.out}: results.jsonl, neighbours.png, log.jsonl; next: tensorboard --logdir {run.out}")
    common.barrier()


if __name__ == "__main__":
    common.launch(main, get_args)
