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

--data is what pretraining takes, with labels: a folder with train/ and val/ (or test/) of class folders, a
torchvision data set by name, or nothing for the built-in images. --labels goes with every mode.

What is chosen is chosen on a tenth of the TRAINING images, held out by class and seed, never on test images.
The probe trains the whole grid of (learning rate, weight decay) at once, as one batched head on one pass of
features, on the other nine tenths; the chosen head is reported as it is, not trained again. With one --lr and
one --wd nothing is held out: all images are trained on, as in published protocols. --lbfgs fits again, on all
training images, with the chosen penalty. --finetune and --knn choose nothing: numbers are those of the last
epoch, where the official code of CorInfoMax and SFRIK reports the best epoch on test images.

Features are kept beside the backbone (features/) and made again when its weights, or the size and time of a
file of the data, change. --out, by default beside the backbone too, holds results.jsonl (one line: the whole
protocol), neighbours.png (test images, each with its nearest training images, right ones framed green),
TensorBoard events, log.jsonl, and the checkpoint from which the same command resumes.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import Data, Files, Pixels, fail, rank, world

# -------------------------------------------------------------------------------------- classifiers


class Heads(nn.Module):
    """G linear classifiers trained at once on the same features, by SGD with momentum 0.9, each with its own
    peak learning rate and weight decay (G,), from zero. Biases do not decay. No autograd: the gradient of the
    cross-entropy is (softmax - one-hot) h^T, for all heads one matrix product."""

    def __init__(self, lr: list[float], wd: list[float], classes: int, width: int):
        super().__init__()
        for name, values in (("lr", lr), ("wd", wd)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        for name in ("weight", "velocity"):
            self.register_buffer(name, torch.zeros(len(lr), classes, width))
        for name in ("bias", "bias_velocity"):
            self.register_buffer(name, torch.zeros(len(lr), classes))

    def forward(self, h: Tensor) -> Tensor:
        """Logits (n, G, C) of features h (n, D)."""
        logits = torch.addmm(self.bias.flatten(), h, self.weight.flatten(0, 1).mT)
        return logits.view(len(h), *self.bias.shape)

    def step(self, h: Tensor, y: Tensor, factor: float) -> Tensor:
        """One step at `factor` times the peak rates on this rank's rows, h (n, D) and y (n,), of the global
        batch. The mean loss of each head on them: (G,)."""
        N, index = len(h) * world(), y.view(-1, 1, 1).expand(-1, len(self.bias), 1)
        P = self(h).softmax(2)  # (n, G, C)
        loss = -P.gather(2, index).log().mean((0, 2))
        P.scatter_add_(2, index, P.new_full((), -1.0).expand(index.shape))
        gradient = common.all_reduce(P.flatten(1).mT @ h).view_as(self.weight) / N
        self.velocity.mul_(0.9).add_(gradient).addcmul_(self.wd, self.weight)
        self.bias_velocity.mul_(0.9).add_(common.all_reduce(P.sum(0)) / N)
        self.weight.addcmul_(self.velocity, self.lr, value=-factor)
        self.bias.addcmul_(self.bias_velocity, self.lr[:, :, 0], value=-factor)
        return loss

    def accuracy(self, h: Tensor, y: Tensor) -> Tensor:
        """Share of h (m, D), the same on every rank, that each head has right: (G,); 0 if it has diverged."""
        mine = slice(rank(), None, world())
        pairs = zip(h[mine].split(1024), y[mine].split(1024), strict=True)
        right = sum((self(rows).argmax(2) == labels[:, None]).sum(0) for rows, labels in pairs)
        share = common.all_reduce(right.double()) / len(h)
        return share * self.weight.flatten(1).isfinite().all(1)


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
    N, square = common.all_reduce(torch.cat([h.new_tensor([len(h)]), h.square().sum(0)])).tensor_split([1])
    scale = torch.cat([(square / N / classes + penalty).rsqrt(), h.new_tensor([classes**0.5])])
    V = start / scale
    optimizer = torch.optim.LBFGS(
        [V], max_iter=10, history_size=20, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    gradient = torch.empty_like(V)

    def closure() -> Tensor:
        W, b = (V * scale).tensor_split([-1], 1)
        logp = torch.addmm(b[:, 0], h, W.mT).log_softmax(1)
        P = logp.exp()
        P[torch.arange(len(y), device=y.device), y] -= 1
        sums = torch.cat([(P.mT @ h).flatten(), P.sum(0), -logp.gather(1, y[:, None]).sum(0)])
        sums = common.all_reduce(sums) / N
        gradient[:, :-1] = sums[: W.numel()].view_as(W) + penalty * W
        gradient[:, -1] = sums[W.numel() : -1]
        V.grad = gradient * scale
        return sums[-1] + penalty / 2 * W.square().sum()

    closure()
    for _ in range(rounds):
        if gradient.abs().max() < 1e-5:
            break
        optimizer.step(closure)
        closure()
    return V * scale, float(gradient.abs().max())


def nearest(h: Tensor, bank: Tensor, k: int, block: int = 65536) -> tuple[Tensor, Tensor]:
    """Cosine similarities and rows, (m, k) each, best first, of the k nearest of bank (n, D) to h (m, D)."""
    h = F.normalize(h, dim=1)
    best, at = h.new_empty(len(h), 0), torch.empty(len(h), 0, dtype=torch.long, device=h.device)
    for start in range(0, len(bank), block):
        part = F.normalize(bank[start : start + block], dim=1).mT
        found = [(rows @ part).topk(min(k, part.shape[1])) for rows in h.split(1024)]
        values, index = (torch.cat(t) for t in zip(*found, strict=True))
        best, order = torch.cat([best, values], 1).topk(min(k, best.shape[1] + values.shape[1]))
        at = torch.cat([at, index + start], 1).gather(1, order)
    return best, at


def knn_votes(similarity: Tensor, labels: Tensor, classes: int, temperature: float = 0.07) -> Tensor:
    """Scores (m, C): the sum of exp(similarity / temperature) of each class' neighbours; -inf without any."""
    votes = similarity.new_zeros(len(labels), classes)
    votes.scatter_add_(1, labels, (similarity / temperature).exp())
    return votes.masked_fill_(votes == 0, -torch.inf)


def accuracies(scores: Tensor, y: Tensor) -> dict[str, float]:
    """top1, top5, mean per class in % over all ranks' images; scores (m, C) and y (m,) are this rank's."""
    top = scores.topk(min(5, scores.shape[1]))
    hit = (top.indices == y[:, None]) & top.values.isfinite()
    counts = torch.stack([hit[:, 0], hit.any(1), torch.ones_like(hit[:, 0])]).double()
    counts = counts.new_zeros(3, scores.shape[1]).index_add_(1, y, counts)  # (3, C)
    first, five, images = common.all_reduce(counts)
    found = first.sum() / images.sum(), five.sum() / images.sum(), (first / images)[images > 0].mean()
    return {name: 100 * float(x) for name, x in zip(("top1", "top5", "mean_per_class"), found, strict=True)}


# ----------------------------------------------------------------------------------------- backbone

ARCHS = """resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2
resnext50_32x4d resnext101_32x8d resnext101_64x4d""".split()
WRAPPERS = {"state_dict", "model", "module", "backbone", "encoder", "encoder_q", "online", "average"}
PROBE = "layer1.0.conv1.weight"


def read_weights(path: str) -> dict[str, Tensor]:
    """A ResNet's weights under torchvision's names, without fc, from any common checkpoint around it."""
    if not os.path.isfile(path):  # a pipe or a device would never end
        fail(f"--backbone {path}: no such file")
    try:
        if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"wrong checksum of {bad}")
        flat = dict(common.flatten(torch.load(path, map_location="cpu", weights_only=True)))
    except OSError as error:
        fail(f"--backbone {path} cannot be read: {error.strerror or error}")
    except Exception as error:  # damage, and pickles that would run code, have many names
        reason = str(error).strip().partition("\n")[0][:150]
        fail(f"--backbone {path} is no checkpoint of weights alone ({type(error).__name__}: {reason})")
    prefixes = [name[: -len(PROBE)] for name in flat if name.endswith(PROBE)]
    prefixes = [p for p in prefixes if WRAPPERS.issuperset(p.split(".")[:-1])]
    if not prefixes:
        fail(f"--backbone {path} holds no ResNet; its first keys: {', '.join([*flat][:3]) or 'none'}")
    prefix = min(prefixes, key=lambda p: ("average" not in p, len(p)))  # an average is for this
    weights = {name[len(prefix) :]: value for name, value in flat.items() if name.startswith(prefix)}
    return {name: value for name, value in weights.items() if not name.startswith("fc.")}


def shapes_of(weights: dict[str, Tensor]) -> set[tuple]:
    """(name, shape) of all but the counters, which old checkpoints lack."""
    return {(name, tuple(t.shape)) for name, t in weights.items() if not name.endswith("batches_tracked")}


def load_backbone(args: argparse.Namespace) -> tuple[nn.Module, int]:
    """The network of --backbone and its number of features; sets args.arch, args.stem, args.backbone_hash."""
    if args.backbone in ("random", "torchvision"):
        args.arch, args.stem = args.arch or "resnet50", args.stem or "imagenet"
        net, width = common.resnet(args.arch, args.stem)
        weights = net.state_dict()
        if args.backbone == "torchvision":
            try:
                weights = torchvision.models.get_model(args.arch, weights="IMAGENET1K_V1").state_dict()
            except (OSError, RuntimeError, ValueError) as error:
                fail(f"--backbone torchvision: the weights of {args.arch} cannot be had ({error})")
            weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    else:
        weights, wrong = read_weights(args.backbone), {}
        stem = "cifar" if weights.get("conv1.weight", torch.empty(7)).shape[-1] == 3 else "imagenet"
        for arch in ARCHS:
            with torch.device("meta"):
                wrong[arch] = len(shapes_of(weights) ^ shapes_of(common.resnet(arch, stem)[0].state_dict()))
            if not wrong[arch]:
                break
        arch = min(wrong, key=wrong.get)
        for name, asked, read in (("arch", args.arch, arch), ("stem", args.stem, stem)):
            if asked not in (None, read):
                fail(f"--{name} {asked}: the weights in {args.backbone} are of {read}")
        args.arch, args.stem = arch, stem
        net, width = common.resnet(arch, stem)
    if wrong := shapes_of(weights) ^ shapes_of(net.state_dict()):
        keys = ", ".join(sorted({name for name, _ in wrong})[:3])
        fail(f"--backbone {args.backbone} does not fit {args.arch} with stem {args.stem}, first in {keys}")
    net.load_state_dict(weights, strict=False)  # nothing is missing but counters
    args.backbone_hash = digest(*(t for _, t in sorted(net.state_dict().items()) if t.is_floating_point()))
    return net, width


def digest(*parts: Tensor) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.contiguous().cpu().numpy())
    return sha.hexdigest()[:16]


# --------------------------------------------------------------------------------------------- data

LABELLED, HELD_OUT = -5, -6  # uniforms of common.uniform that choose images, beside its own choices


def stratified(labels: Tensor, share: float, seed: int, choice: int) -> Tensor:
    """True for `share` of each class, rounded, at least one image: (n,). The same for a seed."""
    u = common.uniform(seed, 0, torch.arange(len(labels)), choice)
    order = u.argsort()
    order = order[labels[order].argsort(stable=True)]  # by class, in each by u
    count = labels.bincount()
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels)) - (count.cumsum(0) - count)[labels[order]]
    return place < (count * share).round().clamp(min=1)[labels]


def part(split: Pixels | Files, rows: Tensor) -> Pixels | Files:
    if isinstance(split, Pixels):
        return Pixels(split.images[rows], split.labels[rows])
    paths = [os.fsencode(split.path(i)) for i in rows.tolist()]
    return common.files_of(paths, split.labels[rows].tolist())


def fingerprint(split: Pixels | Files) -> str:
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
    root = Path(args.data or "")
    if args.data and os.path.isdir(root) and args.data.partition(":")[0] not in common.NAMED_DATA:
        folders = [root / "train", *(root / name for name in ("val", "test") if (root / name).is_dir())]
        if len(folders) < 2:
            fail(f"--data {root} has no val/ or test/: there is nothing to evaluate on")
        for folder in folders[:2]:
            if not folder.is_dir() or not any(path.is_dir() for path in folder.iterdir()):
                fail(f"--data {root} is unlabelled: {folder} is no folder of class folders")
    data = common.open_data(argparse.Namespace(data=args.data, batch_size=1), Path(os.devnull))
    train, test = (part(s, (s.labels >= 0).nonzero()[:, 0]) if (s.labels < 0).any() else s for s in data[:2])
    known, tested = set(train.labels.tolist()), set(test.labels.tolist())
    if known != tested:
        names = [data.classes[c] if data.classes else str(c) for c in sorted(known ^ tested)]
        fail(f"--data {args.data}: {len(names)} classes are not in both splits: {', '.join(names[:3])}")
    if len(known) < 2:
        fail(f"--data {args.data} has one class only: there is nothing to tell apart")
    return Data(train, test, data.classes or [str(c) for c in range(max(known) + 1)])


@common.readable("--labels")
def choose_labels(train: Pixels | Files, labels: str, seed: int) -> Pixels | Files:
    """--labels: that many per cent of each class, or the files of a list (names, or class/name)."""
    try:
        percent = float(labels)
    except ValueError:
        percent = 0.0
    if 0 < percent <= 100:
        return part(train, stratified(train.labels, percent / 100, seed, LABELLED).nonzero()[:, 0])
    if not os.path.isfile(labels):
        fail(f"--labels {labels}: neither a percentage above 0, at most 100, nor a file with a list")
    if isinstance(train, Pixels):
        fail(f"--labels {labels}: a list names files, and these images are not in files")
    row_of = {}
    for i in range(len(train.labels)):
        path = Path(train.path(i))
        for name in (path.name, f"{path.parent.name}/{path.name}"):
            row_of[name] = -1 if name in row_of else i
    names = list(dict.fromkeys(filter(None, map(str.strip, Path(labels).read_text().splitlines()))))
    if missing := [name for name in names if row_of.get(name, -1) < 0]:
        shown = ", ".join(missing[:3])
        fail(f"--labels {labels}: {len(missing)} of {len(names)} are missing, or there twice: {shown}")
    if not names:
        fail(f"--labels {labels} names no files")
    return part(train, torch.tensor([row_of[name] for name in names]))


# ---------------------------------------------------------------------------------------- arguments

# fmt: off
GRID = dict(lr=[x * 10.0**e for e in range(-3, 2) for x in (1, 2, 5)], wd=[0.0, 1e-6, 1e-4])  # 45 heads
MODES = {  # each with its flags and their defaults
    "linear": dict(epochs=100, batch_size=256, **GRID),
    "cached": dict(epochs=20, batch_size=256, **GRID),
    "knn": dict(k=[10, 20, 100, 200]),
    "lbfgs": dict(),
    "finetune": dict(epochs=20, batch_size=256, lr=[0.1], lr_backbone=0.01, wd=[0.0], schedule="cosine"),
}
_SEMI = dict(mode="finetune", epochs=20, batch_size=256, wd=[0.0])
RECIPES = {  # the official commands
    "sfrik-linear": dict(mode="linear", epochs=100, batch_size=256, lr=[0.4], wd=[1e-6]),
    "sfrik-1": dict(_SEMI, labels="1", lr_backbone=0.004, lr=[1.0], schedule="cosine"),
    "sfrik-10": dict(_SEMI, labels="10", lr_backbone=0.02, lr=[0.1], schedule="cosine"),
    "corinfomax-1": dict(_SEMI, labels="1", lr_backbone=0.005, lr=[10.0], schedule="step"),
    "corinfomax-10": dict(_SEMI, labels="10", lr_backbone=0.005, lr=[20.0], schedule="step"),
}
PENALTIES = torch.logspace(1, -7, 45, dtype=torch.float64).tolist()  # of features of mean square norm 1
common.VIEWS["crop and flip"] = (common.View((0.08, 1), (0, 0, 0, 0), 0.0, gray=0.0),)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments from argv (default: the command line), over the recipe's, over the mode's defaults."""
    number = common.number
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
    add("--size", type=number(int, 12, 1024), help="side of the views, pixels (default: as in "
        "args.json beside the backbone, or of small images, or 224)")
    add("--projector", action="store_true", help="test features with thumbnails for TensorBoard's projector")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of held-out and labelled images, order, views")
    add("--workers", type=number(int, 0, 1024), default=min(16, os.cpu_count()), help="a rank, to decode")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N or cpu")
    add("--precision", choices=["bf16", "fp32", "fp64"], help="of the backbone (default: as in pretraining)")
    add("--save-minutes", type=number(float, 1e-3), default=15.0, help="between checkpoints")
    add("--log-every", type=number(int, 1), default=50, help="steps")
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
    recipe = RECIPES.get(args.recipe, {})
    args.mode = args.mode or recipe.get("mode", "linear")
    for name in {name for flags in MODES.values() for name in flags} - MODES[args.mode].keys():
        if getattr(args, name) is not None:
            fail(f"--{name.replace('_', '-')} has no meaning for {args.mode}")
    for name, value in {**MODES[args.mode], **recipe}.items():
        setattr(args, name, value if getattr(args, name, None) is None else getattr(args, name))
    if args.mode == "finetune" and len(args.lr) * len(args.wd) > 1:
        fail("--finetune takes one --lr and one --wd: it trains one network")
    args.precision = args.precision or common.default_precision(args.device)
    source = Path(args.backbone) if os.path.exists(args.backbone) else None
    home = source.parent if source else Path("runs", f"{args.backbone}-{args.arch or 'resnet50'}")
    name = (args.data or "drawings").partition(":")[0]
    labels = f"-labels-{Path(args.labels).name}" if args.labels else ""
    args.out = args.out or str(home / f"eval-{args.mode}-{Path(name).name}{labels}")
    args.features = args.features or str((home if source else Path(args.out)) / "features")
    return argparse.Namespace(**vars(args), views="crop and flip", local_crops=0, knn_every=1, compile=False)
# fmt: on

# ---------------------------------------------------------------------------------- the evaluation


class Evaluation(common.Run):
    """An evaluation: what a run has (directory, lock, log, checkpoints, signals), and features.

    Errors of use are raised when it is made, before anything is written. fit, held: what is trained and what
    is chosen on, as rows of `train`; test: the test images. `open` makes the directory.
    """

    FREE = common.Run.FREE | {"features", "projector"}

    def __init__(self, args: argparse.Namespace):
        self.args, self.script, self.out, self.begun = args, Path(__file__), Path(args.out), time.monotonic()
        batch = getattr(args, "batch_size", None) or 2 * world()
        self.device = common.start_ranks(argparse.Namespace(**{**vars(args), "batch_size": batch}))
        torch.manual_seed(args.seed)
        net, self.width = load_backbone(args)
        data = open_labelled(args)
        self.train = choose_labels(data.train, args.labels, args.seed) if args.labels else data.train
        self.test, self.classes = data.test, data.classes
        args.size = args.size or default_size(args.backbone, self.test)
        self.keys = dict(train=fingerprint(self.train), test=fingerprint(self.test))
        args.data_hash = self.keys["train"][:8] + self.keys["test"][:8]
        n, held = len(self.train.labels), torch.zeros(len(self.train.labels), dtype=torch.bool)
        self.points = [(lr, wd) for lr in args.lr or () for wd in args.wd or ()]
        if args.mode == "lbfgs" or len(self.points) > 1:
            alone = self.train.labels.bincount()[self.train.labels] < 2
            held = stratified(self.train.labels, 0.1, args.seed, HELD_OUT) & ~alone
            if not held.any():
                fail(f"{n} training images, one a class, leave none to choose on: give one --lr and one --wd")
        self.fit, self.held = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
        if len(self.fit) < batch:
            fail(f"--batch-size {batch} is more than the {len(self.fit)} images to train on")
        if args.k and max(args.k) > n:
            fail(f"--k {max(args.k)} is more than the {n} images of the bank")
        self._check_directory()
        self.data = Data(self.train, None, self.classes)
        if args.mode in ("linear", "finetune"):
            self.data = common.load_small(Data(part(self.train, self.fit), None, self.classes), self.device)
        self.epoch_steps = max(1, len(self.data.train.labels) // batch)
        self.step, self.stop, self.total = 0, 0, (args.epochs or 0) * self.epoch_steps
        self.kept, self.seconds = {}, {}
        self.net = common.prepare(net, args, self.device)

    def extract(self, split: Pixels | Files, name: str) -> tuple[Tensor, Tensor]:
        """Features (m, D) of centre crops and labels (m,) on every rank's device; from disk, if there."""
        begun, key = time.monotonic(), self.keys.get(name) or fingerprint(split)
        path = Path(self.args.features) / f"{name}-{key}-{self.args.size}-{self.args.precision}.pt"
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            fresh = saved["backbone"] == self.args.backbone_hash
        except Exception:  # not there, or damaged
            fresh = False
        if common.all_reduce(torch.tensor(float(fresh), device=self.device)) < world():
            rows = torch.arange(len(split.labels)).split(4096)
            shown = tqdm(rows, f"features of {name}", disable=rank() > 0 or len(rows) < 4)
            found = [common.features(self.net, split, i, self.args, self.device, unit=False) for i in shown]
            h, y = (torch.cat(t) for t in zip(*found, strict=True))
            saved = dict(backbone=self.args.backbone_hash, h=h, y=y)
            if rank() == 0:
                self._keep(path, dict(saved, h=h.cpu(), y=y.cpu()))
        self.seconds[f"features of {name}"] = round(time.monotonic() - begun, 2)
        self.kept[name] = saved["h"], saved["y"]
        return self.kept[name]

    def features_of(self, split: Pixels | Files) -> tuple[Tensor, Tensor]:
        """L2-normalised features (m, D) and labels (m,) of all of its images, made now."""
        return common.features(self.net, split, torch.arange(len(split.labels)), self.args, self.device)

    def _keep(self, path: Path, saved: dict) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(saved, path.with_suffix(f".{os.getpid()}"))
            os.replace(path.with_suffix(f".{os.getpid()}"), path)
        except (OSError, RuntimeError) as error:
            print(f"features are not kept: {path} cannot be written ({error})", file=sys.stderr)

    def batches(self):
        if self.args.mode != "cached":
            yield from super().batches()
            return
        order = common.Batches(len(self.h_fit), self.args.batch_size, self.args.seed, self.step, self.total)
        for _, index in order:
            index = index.to(self.device)
            yield [self.h_fit[index]], self.y_fit[index]

    def _show(self, xs: list[Tensor]) -> None:
        if self.args.mode != "cached":
            super()._show(xs)

    def evaluate(self) -> None:
        """At the end of epochs: the accuracy of every head on held-out images."""
        if self.step and len(self.held) and self.args.mode in ("linear", "cached"):
            self.held_out = self.heads.accuracy(*self.held_features)
            named = zip(self.points, (100 * self.held_out).tolist(), strict=True)
            best = float(100 * self.held_out.max())
            self.record(self.step, best=best, **{f"held_out/lr {lr:g} wd {wd:g}": x for (lr, wd), x in named})
            self.bar.set_postfix_str(f"best held-out {best:.2f} %", refresh=False)

    def _summary(self) -> None:
        pass

    def _check_state(self, state: dict) -> None:
        pass  # heads at rates that are too high diverge: they lose

    def watch(self, loss: Tensor, factor: float) -> None:
        """A record every --log-every steps."""
        done = self.step + 1
        if done % self.args.log_every == 0 or done in (1, self.total):
            if not (least := float(loss.nan_to_num(torch.inf).min())) < torch.inf:
                fail(f"step {self.step}: the loss is not finite; the last checkpoint in {self.out} is kept")
            self.record(done, loss=least, rate=factor)


def default_size(backbone: str, split: Pixels | Files) -> int:
    """--size of the run that left this backbone; or the side of images small enough for memory; or 224."""
    try:
        return json.loads((Path(backbone).parent / "args.json").read_text())["size"]
    except (OSError, ValueError, KeyError, TypeError):
        image = split.images[0] if isinstance(split, Pixels) else split.read(0)
    side = min(image.shape[1:]) if image is not None else 0
    return side if 12 <= side <= common.MEMORY_SIDE else 224


def probe(run: Evaluation) -> dict:
    """The linear probe, on random crops or on kept features."""
    args, cached = run.args, run.args.mode == "cached"
    lr, wd = zip(*run.points, strict=True)
    peaks = [x * args.batch_size / 256 for x in lr]
    run.heads = Heads(peaks, wd, len(run.classes), run.width).to(run.device)
    run.EXPORT = "heads.pth"
    run.open(run.heads, dict(heads=run.heads))
    net = run.net.eval().requires_grad_(False)
    if cached:
        h, y = run.extract(run.train, "train")
        run.h_fit, run.y_fit, run.held_features = h[run.fit], y[run.fit], (h[run.held], y[run.held])
    elif len(run.held):
        run.held_features = run.extract(part(run.train, run.held), "held-out")
    begun = time.monotonic()

    for step, (x,), y in run.steps():
        factor = common.warmup_cosine(step, 0, run.total)
        with torch.no_grad(), common.autocast(args, run.device):
            h = x if cached else net(x)
        run.watch(run.heads.step(h.float(), y, factor), factor)

    run.seconds["heads" if cached else "training"] = round(time.monotonic() - begun, 2)
    chosen, found = 0, {}
    if len(run.held):
        run.held_out = run.heads.accuracy(*run.held_features)
        chosen = middle_best(run.held_out)
        values = (100 * run.held_out).tolist()
        found["grid"] = [dict(lr=a, wd=b, held_out=x) for (a, b), x in zip(run.points, values, strict=True)]
    h, y = run.extract(run.test, "test")
    mine = slice(rank(), None, world())
    scores = torch.cat([run.heads(rows)[:, chosen] for rows in h[mine].split(1024)])
    name = f"lr {run.points[chosen][0]:g}, wd {run.points[chosen][1]:g}"
    return dict(found, chosen=name, results={name: accuracies(scores, y[mine])})


def logistic(run: Evaluation) -> dict:
    """L-BFGS along the penalties, strong to weak; the best on held-out images is fitted to all of them."""
    run.open(run.net, {})
    (h, y), (h_test, y_test) = run.extract(run.train, "train"), run.extract(run.test, "test")
    begun, C, D, grid = time.monotonic(), len(run.classes), run.width, []
    mean = h.double().mean(0)
    h, h_test = (x.double() - mean for x in (h, h_test))
    axes = torch.linalg.eigh(h.mT @ h)[1]  # features along them are uncorrelated, and |W| is the same
    norm = h.square().sum(1).mean().sqrt()  # so that a penalty means the same for every backbone
    h, h_test = (x @ axes / norm for x in (h, h_test))
    share, weight = lambda rows: rows[rank() :: world()], h.new_zeros(C, D + 1)
    fit, held = share(run.fit), share(run.held)
    score = lambda x: x @ weight[:, :-1].mT + weight[:, -1]
    for penalty in tqdm(PENALTIES, "penalties", disable=rank() > 0):
        weight, gradient = fit_logistic(h[fit], y[fit], C, penalty, weight, rounds=20)
        found = accuracies(score(h[held]), y[held])["top1"]
        grid.append(dict(penalty=penalty, held_out=found, gradient=gradient, weight=weight))
    best = max(grid, key=lambda point: point["held_out"])
    penalty, start = best["penalty"], best["weight"]
    weight, gradient = fit_logistic(share(h), share(y), C, penalty, start)
    run.seconds["fits"] = round(time.monotonic() - begun, 2)
    for point in grid:
        del point["weight"]
    name = f"penalty {penalty:.3g}"
    results = {name: accuracies(score(share(h_test)), share(y_test))}
    return dict(grid=grid, chosen=name, gradient=gradient, results=results)


def knn(run: Evaluation) -> dict:
    """The vote of the k nearest, each rank for its share of the test images."""
    run.open(run.net, {})
    (bank, labels), (h, y) = run.extract(run.train, "train"), run.extract(run.test, "test")
    begun, mine, found = time.monotonic(), slice(rank(), None, world()), {}
    similarity, at = nearest(h[mine], bank, max(run.args.k))
    for k in sorted(run.args.k):
        votes = knn_votes(similarity[:, :k], labels[at[:, :k]], len(run.classes))
        found[f"k = {k}"] = accuracies(votes, y[mine])
    run.seconds["search"] = round(time.monotonic() - begun, 2)
    return dict(temperature=0.07, results=found)


def finetune(run: Evaluation) -> dict:
    """All weights, backbone and classifier at rates of their own; exported under torchvision's names."""
    args, net = run.args, run.net
    net.fc = nn.Linear(run.width, len(run.classes)).to(run.device, next(net.parameters()).dtype)
    nn.init.normal_(net.fc.weight, std=0.01)
    nn.init.zeros_(net.fc.bias)
    body = [p for name, p in net.named_parameters() if not name.startswith("fc.")]
    groups = [dict(params=body), dict(params=[*net.fc.parameters()])]
    optimizer = torch.optim.SGD(groups, 0.0, momentum=0.9, weight_decay=args.wd[0])
    peaks = [rate * args.batch_size / 256 for rate in (args.lr_backbone, args.lr[0])]
    model = common.parallel(net, args, run.device)
    run.EXPORT = "finetuned.pth"
    run.open(net, dict(model=net, optimizer=optimizer))
    begun = time.monotonic()

    for step, (x,), y in run.steps():
        quarter = 4 * step // run.total
        factors = [common.warmup_cosine(step, 0, run.total)] * 2
        factors = [0.2**quarter, 0.1**quarter] if args.schedule == "step" else factors
        for group, peak, factor in zip(optimizer.param_groups, peaks, factors, strict=True):
            group["lr"] = peak * factor
        with common.autocast(args, run.device):
            logits = model(x)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.watch(loss.detach(), factors[1])

    run.seconds["training"] = round(time.monotonic() - begun, 2)
    rows = torch.arange(len(run.test.labels))
    logits, y = common.features(net, run.test, rows, args, run.device, unit=False)
    net.fc = nn.Identity()  # from here on, features
    mine = slice(rank(), None, world())
    return dict(results={"last epoch": accuracies(logits[mine], y[mine])})


# ------------------------------------------------------------------------------------------- report


def thumbnails(split: Pixels | Files, rows: list[int], side: int) -> Tensor:
    """Centre squares (n, 3, side, side) in [0, 1]."""
    images = [split.images[i].cpu() if isinstance(split, Pixels) else split.read(i) for i in rows]
    images = [torch.zeros(3, side, side).byte() if image is None else image for image in images]
    sizes = (torch.tensor([image.shape[1:]]).unbind(1) for image in images)
    boxes = (common.centre_boxes(h, w, max(h, w)) for h, w in sizes)
    return torch.cat([common.crop(x[None], box, side) for x, box in zip(images, boxes, strict=True)])


def spread(split: Pixels | Files, most: int) -> Pixels | Files:
    """At most that many of the images, evenly spread."""
    n = len(split.labels)
    return part(split, torch.arange(min(n, most)) * n // min(n, most))


def neighbour_sheet(run: Evaluation, queries: int = 12, k: int = 9, side: int = 64) -> Tensor:
    """A row for each of some test images, then its nearest training images (of 10,000, where features are not
    kept), framed green where the class is right and red where it is wrong: (3, H, W) uint8."""
    test, bank = spread(run.test, queries), run.train if "train" in run.kept else spread(run.train, 10_000)
    (h, y), (h_bank, y_bank) = run.features_of(test), run.kept.get("train") or run.features_of(bank)
    _, at = nearest(h, h_bank, k)
    right = (y_bank[at] == y[:, None]).cpu()
    green, red, blue = torch.tensor([[0.1, 0.7, 0.2], [0.9, 0.1, 0.1], [0.2, 0.3, 1]])[:, :, None, None]
    tiles = []
    for i, mine in enumerate(at.cpu().tolist()):
        row = torch.cat([thumbnails(test, [i], side), thumbnails(bank, mine, side)])
        colours = [blue, *(green if ok else red for ok in right[i])]
        for image, colour in zip(row, colours, strict=True):
            tiles.append(colour.expand(3, side + 8, side + 8).clone())
            tiles[-1][:, 4:-4, 4:-4] = image
    sheet = torchvision.utils.make_grid(torch.stack(tiles), nrow=1 + at.shape[1], padding=2, pad_value=1.0)
    return (sheet * 255).round().byte()


def show(record: dict) -> None:
    """The table on the terminal."""
    rows = {}
    for point in record.get("grid", []):
        rows.setdefault(point.get("lr", point.get("penalty")), []).append(point)
    if rows:
        print(f"top-1 on {record['images']['held_out']} held-out training images, %")
        heads = [f"wd {point['wd']:g}" for point in next(iter(rows.values())) if "wd" in point]
        print(f"{'lr' if heads else 'penalty':>10} " + " ".join(f"{head:>9}" for head in heads))
    for value, points in rows.items():
        print(f"{value:10.3g} " + " ".join(f"{point['held_out']:9.2f}" for point in points))
    print(f"{record['mode']}, {record['images']['test']} test images, %     top-1     top-5   mean per class")
    for name, found in record["results"].items():
        print(f"{name:>30}{found['top1']:14.2f}{found['top5']:10.2f}{found['mean_per_class']:14.2f}")


def main(args: argparse.Namespace) -> None:
    run = Evaluation(args)
    kept = run.out / "results.jsonl"
    if kept.exists() and not args.projector:
        return show(json.loads(kept.read_text().splitlines()[-1])) if rank() == 0 else None
    modes = dict(linear=probe, cached=probe, knn=knn, lbfgs=logistic, finetune=finetune)
    found = modes[args.mode](run)
    sheet, projected = neighbour_sheet(run), None
    if args.projector:
        some = spread(run.test, 2000)
        projected = *run.features_of(some), thumbnails(some, range(len(some.labels)), 32)
    if rank() == 0:
        report(run, found, sheet, projected, new=not kept.exists())
    common.barrier()


def report(run: Evaluation, found: dict, sheet: Tensor, projected: tuple | None, new: bool) -> None:
    """Table, results.jsonl, neighbours.png, TensorBoard."""
    args = run.args
    trained = len(run.train.labels if args.mode in ("knn", "lbfgs") else run.fit)
    crops = "crops of 8 to 100 % of the area, flip" if args.mode in ("linear", "finetune") else "centre crop"
    images = dict(train=len(run.train.labels), trained_on=trained, held_out=len(run.held))
    record = dict(
        mode=args.mode, top1=max(r["top1"] for r in found["results"].values()),
        backbone=args.backbone, data=args.data or "built-in drawings", **found,
        images=dict(images, test=len(run.test.labels)), classes=len(run.classes),
        views=dict(training=crops, test="centre crop", size=args.size),
        chosen_on="held-out training images" if len(run.held) else "nothing was chosen",
        reported="fitted again on all training images" if args.mode == "lbfgs" else "as trained",
        ranks=world(), seconds=dict(run.seconds, all=round(time.monotonic() - run.begun, 2)),
        versions=dict(torch=torch.__version__, torchvision=torchvision.__version__, python=sys.version),
        args=vars(args),
    )  # fmt: skip
    show(record)
    run._write("neighbours.png", lambda file: file.write(torchvision.io.encode_png(sheet).numpy().tobytes()))
    run.board.add_image("neighbours", sheet)
    for i, (name, values) in enumerate(found["results"].items()):
        for metric, value in values.items():
            run.board.add_scalar(f"test/{metric}", value, int(name[4:]) if name.startswith("k = ") else i)
    for i, point in enumerate(found.get("grid", []) if args.mode == "lbfgs" else []):
        run.board.add_scalar("held_out/by penalty", point["held_out"], i)
    if projected:
        h, y, images = projected
        run.board.add_embedding(h, [run.classes[c] for c in y.tolist()], images, tag="test")
    run.board.close()
    if new:
        with open(run.out / "results.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    print(f"{run.out}: results.jsonl, neighbours.png, log.jsonl; next: tensorboard --logdir {run.out}")


if __name__ == "__main__":
    common.launch(main, get_args)
