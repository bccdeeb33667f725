"""Evaluate a backbone by the protocols of the four papers, and on dense tasks.

    python eval_linear.py --backbone FILE        kNN and a linear probe, on built-in images
    ... --data /imagenet            a folder with train/ and val/ (or test/), or a data set of torchvision
    ... --mode knn                  cosine-weighted nearest neighbours
    ... --mode cached               a linear probe on features of centre crops, which are cached on disk
    ... --mode crops                a linear probe on random crops, as published
    ... --mode lbfgs                transfer: L2-regularised logistic regression on features of centre crops
    ... --mode features --data FOLDER   features.npy and names.txt of any images, without labels
    ... --mode finetune --labels 1  all weights, on 1 % of the labels (or 10, or a list of file names)
    ... --mode segment              linear semantic segmentation, on built-in mosaics
    ... --mode segment --data voc2012:/path --lr-backbone 0.003      fine-tuned, with the head of an FCN
    ... --mode depth --data /nyu    linear depth estimation
    ... --recipe hsic-linear        a published protocol; any flag overrides it
    ... --backbone random --arch resnet18        the floor; --backbone torchvision: the supervised ceiling

FILE is any checkpoint that holds a torchvision ResNet, under whatever names. Hyperparameters are chosen on a
tenth of the TRAINING images, held out per class (unless all have five or fewer), never on test images: probes
train a grid of rates and decays at once on the rest, and report the best head as it is (with one --lr and one
--wd, as published, nothing is held out); lbfgs then fits all training images. crops and finetune report the
last epoch, where the official code of CorInfoMax and SFRIK reports the epoch that is best on the test images.

segment and depth take train/images/NAME.jpg with train/masks/NAME.png (8-bit class indices, 255 is ignored)
or train/depth/NAME.png (16 bits, 0 is ignored), and val/ likewise; segment also takes ADE20K as unpacked.

--out gets results.jsonl (a line per mode: results and the whole protocol), neighbours.png (knn),
predictions.png (segment and depth), and checkpoints for the same command to resume from. Features are cached
in features/ beside it.
"""

import collections
import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision import datasets, tv_tensors
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

import common
from common import fail, number

# fmt: off
RECIPES = {  # of the official code, where rates are absolute except for SSL-HSIC's
    "hsic-linear":
        "--mode crops --epochs 90 --batch-size 4096 --lr 0.5 --wd 0 --warmup-steps 100 --ema 0.999",
    "corinfomax-linear": "--mode crops --absolute --lr 0.2 --wd 0 --last 0.01",
    "corinfomax-imagenet-linear": "--mode crops --absolute --lr 25 --wd 0 --steps 20 40 60 80",
    "music-linear": "--mode crops --absolute --lr 0.02 --wd 1e-6",
    "music-cifar-linear": "--mode crops --absolute --lr 30 --wd 0 --steps 60 80 --area 0.8",
    "sfrik-linear": "--mode crops --absolute --lr 0.4 --wd 1e-6",
    "corinfomax-1":
        "--mode finetune --labels 1 --absolute --lr-head 10 --lr-backbone 0.005 --steps 5 10 15",
    "corinfomax-10":
        "--mode finetune --labels 10 --absolute --lr-head 20 --lr-backbone 0.005 --steps 5 10 15",
    "sfrik-1": "--mode finetune --labels 1 --absolute --lr-head 1 --lr-backbone 0.004",
    "sfrik-10": "--mode finetune --labels 10 --absolute --lr-head 0.1 --lr-backbone 0.02",
}
GRID = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]  # x 3 decays
DENSE = {"segment": 0.1, "depth": 0.01}  # modes that predict a value for each pixel, and their --lr


def get_args(argv):
    """Parse argv, whose flags override those of the recipe."""
    parser = common.Parser(description=__doc__, usage="%(prog)s --backbone FILE [flags]")
    rate = number(float, 0, 1e6)
    count = number(int, 1)
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--backbone", required=True, metavar="FILE", help="a checkpoint; or random, or torchvision")
    add("--mode", default="knn,cached", help=f"one or more of {', '.join(MODES)} (default: %(default)s); "
        "or features, of all images of --data, without labels")
    add("--recipe", choices=RECIPES, help="a published protocol")
    add("--data", help=f"folder with train/ and val/; or {', '.join([*common.NAMED, *FILE_SETS])}, with "
        ":/path/to/it (default ./data); left out: built-in patterns")
    add("--labels", help="percentage of each class to train on, or a file of image names")
    add("--arch", default="resnet50", help="of random or torchvision; detected in a file")
    add("--stem", default="imagenet", choices=["imagenet", "cifar"], help="of random; detected in a file")
    add("--size", type=number(int, 12, 1024), help="pixels (default: that of FILE's run, or of small "
        "images of equal size, or 224)")
    add("--out", help="directory; the same command resumes (default: beside FILE)")
    common.add_run_flags(add)
    add = parser.add_argument_group("settings of some modes").add_argument
    add("--k", type=count, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours")
    add("--epochs", type=count, help="passes over the data (default: 100 in crops, 5 on mosaics, else 20)")
    add("--batch-size", type=count, default=256, help="images per step, on all ranks (16 in segment, depth)")
    add("--lr", type=rate, nargs="+", default=GRID, help="peak learning rates of the heads (0.1 in "
        "segment, 0.01 in depth)")
    add("--wd", type=rate, nargs="+", default=[0.0, 1e-6, 1e-4], help="weight decays, each tried "
        "with every --lr (1e-4 in segment and depth)")
    add("--lr-head", type=rate, default=0.1, help="peak learning rate of the classifier in finetune")
    add("--lr-backbone", type=rate, default=0.01, help="peak learning rate of the backbone in "
        "finetune, segment and depth; in the last two 0, the default, freezes it")
    add("--scales", type=number(float, 0.1, 10), nargs=2, default=[0.5, 2.0], help="smallest and largest "
        "scale of crops in segment and depth (default: 0.5 2; for mosaics 1 1)")
    add("--depth-unit", type=number(float, 1e-6), default=1000.0, help="value of one metre in depth PNGs")
    add("--absolute", action="store_true", help="do not multiply rates by batch-size / 256 "
        "(always so in segment and depth)")
    add("--warmup-steps", type=number(int, 0), default=0, help="steps of linear warm-up, before the cosine")
    add("--last", type=rate, default=0.0, help="where the cosine ends, as a fraction of the peak")
    add("--steps", type=count, nargs="+", help="epochs at which rates drop to a tenth (of the backbone: "
        "to a fifth), instead of the cosine decay")
    add("--area", type=number(float, 0.01, 1), default=0.08, help="smallest area of a random crop")
    add("--ema", type=number(float, 0, 0.999999), default=0.0, help="momentum of the averaged heads")
    parser.set_defaults(subset=0, compile=False)
    given, _ = parser.parse_known_args(argv)
    if given.mode in DENSE:
        rates = dict(lr=[DENSE[given.mode]], wd=[1e-4], lr_backbone=0.0, absolute=True)
        parser.set_defaults(**rates, batch_size=16)
        if not given.data:  # mosaics are small, and quickly learnt
            parser.set_defaults(epochs=5, scales=[1.0, 1.0])
    args = parser.parse_args(RECIPES.get(given.recipe, "").split() + argv)
    # fmt: on
    check_flags(args, given, parser)
    args.scale = 1.0 if args.absolute else args.batch_size / 256
    path = Path(args.backbone)
    if args.backbone in ("random", "torchvision"):
        path = Path("runs", f"{path}-{args.arch}")
    run = path.parent / "args.json"
    if run.exists() and not args.size and args.mode not in DENSE:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # not the settings of a run
            args.size = int(json.loads(run.read_text())["size"])
    data = Path((args.data or "patterns").partition(":")[0]).name
    name = f"eval-{path.stem}-{args.recipe or args.mode}-{data}"
    if given.labels:
        name += f"-{Path(given.labels).stem}"  # 1, 10, or of a list
    args.out = args.out or str(path.parent / name)
    return args


def check_flags(args, given, parser):
    """Refuse modes that do not go together, and flags on the command line that would have no effect."""
    modes = args.mode.split(",")
    for mode in modes:
        if mode not in MODES and mode != "features":
            fail(f"--mode {args.mode}: choose from {', '.join(MODES)}, features")
        if mode in ("features", *DENSE) and len(modes) > 1:
            fail(f"--mode {args.mode}: {mode} has data of its own, give it alone")
    if args.mode in DENSE and args.labels:
        fail(f"--labels {args.labels} is for labels of images, and --mode {args.mode} has none: omit it")
    if args.steps and (given.warmup_steps or given.last):
        fail("--warmup-steps and --last are for the cosine decay, which --steps replaces: omit them")
    if args.mode == "finetune":
        for name in ("lr", "wd"):
            if getattr(given, name) != parser.get_default(name):
                fail(f"--{name} is for a frozen backbone: finetune has --lr-head and --lr-backbone")


# ------------------------------------------------------------------------------------------- backbone

def load_backbone(args):
    """The network of --backbone, and a description of it; sets args.arch, .stem and .backbone_hash."""
    torch.manual_seed(args.seed)
    source = args.backbone
    if args.backbone == "random":
        net, _ = common.resnet(args.arch, args.stem)
    else:
        if args.backbone == "torchvision":
            weights = published_weights(args.arch)
        else:
            weights = common.load_weights(args.backbone)
        resnet = common.find_resnet(weights)
        if resnet is None:
            names = f"its first tensors are {list(weights)[:3]}"
            fail(f"--backbone {args.backbone} holds no complete ResNet of torchvision; {names}")
        net, args.arch, args.stem, prefix = resnet
        count = len(common.resnets_in(weights))
        if count > 1:
            source += f" (the weights under '{prefix}', one of {count} networks in it)"
    content = b"".join(tensor.numpy().tobytes() for tensor in net.state_dict().values())
    args.backbone_hash = hashlib.sha256(content).hexdigest()[:16]
    return net, f"{args.arch} of {source}"


def published_weights(arch):
    """Supervised weights of torchvision."""
    try:
        return torchvision.models.get_model(arch, weights="IMAGENET1K_V1").state_dict()
    except Exception as error:  # unknown names, no network, a full disk
        fail(f"--backbone torchvision --arch {arch} cannot be loaded ({error})")


# ----------------------------------------------------------------------------------------------- data

FILE_SETS = {  # data sets of torchvision in files, and the splits to train on; all have a "test"
    "dtd": (datasets.DTD, "train val"),
    "fgvc_aircraft": (datasets.FGVCAircraft, "trainval"),
    "flowers102": (datasets.Flowers102, "train val"),
    "food101": (datasets.Food101, "train"),
}
LABELLED = -5  # choices of common.uniform, beside those of the views
HELD_OUT = -6
Data = collections.namedtuple("Data", "train test fit held")  # rows of train: to fit, and to choose on


def open_labelled(args, device):
    """The training images, or those of --labels, and the test images."""
    name, _, root = (args.data or "").partition(":")
    if name in FILE_SETS:
        train, test = common.from_rank_0(lambda: open_files(name, root or "data"))
    else:
        unbatched = copy.copy(args)
        unbatched.batch_size = 1  # not every mode has batches, for which open_data wants enough images
        _, train, test = common.open_data(unbatched, device)
    if test is None:
        fail(f"--data {args.data} has no test images: give a folder with train/ and val/ of class folders")
    train = train.take(train.labelled())
    if args.labels:
        train = train.take(labelled_rows(train, args))
    return train, test


def open_files(name, root):
    """Training and test images of a data set in FILE_SETS, downloaded if missing."""
    dataset, splits = FILE_SETS[name]
    images = []
    try:
        for group in (splits, "test"):
            items = []
            for split in group.split():  # with this loader, items are paths and labels, not decoded
                part = dataset(root, split=split, download=True, loader=os.fsencode)
                items += part
            paths, labels = zip(*items, strict=True)
            images.append(common.Images(numpy.array(paths), torch.tensor(labels), part.classes, name))
    except Exception as error:  # nothing there, no network, flowers102 without scipy
        fail(f"{name} is not in {root} and cannot be fetched ({error}): give --data {name}:/path/to/it")
    return images


def labelled_rows(images, args):
    """Rows of the images that --labels asks for: a percentage of each class, or the files of a list."""
    if args.labels in map(str, range(1, 101)):
        return stratified(images.labels, int(args.labels) / 100, args.seed, LABELLED, least=1)
    if images.files is None or not os.path.isfile(args.labels):
        fail(f"--labels {args.labels} is neither a percentage, 1 to 100, nor a list of files of --data")
    lines = Path(args.labels).read_text().splitlines()
    names = {os.path.basename(line.strip()) for line in lines} - {""}
    rows = []
    for row in range(len(images)):
        if os.path.basename(images.name(row)) in names:
            rows.append(row)
    if len(rows) != len(names):
        fail(f"--labels {args.labels}: {len(rows)} images of --data match its {len(names)} names")
    return torch.tensor(rows)


def stratified(labels, share, seed, choice, least=0):
    """Random rows: a share of each class, rounded, at least `least`; the same ones for a given seed."""
    order = common.uniform(seed, 0, torch.arange(len(labels)), choice).argsort()
    chosen = []
    for label in labels.unique():
        rows = order[labels[order] == label]
        chosen.append(rows[: max(least, round(len(rows) * share))])
    return torch.cat(chosen).sort()[0]


def plan(args, mode, train, test):
    """The arguments and the data of a mode; settings that leave too few images are refused."""
    args = copy.copy(args)
    args.mode = mode
    args.out = f"{args.out}/{mode}"
    args.epochs = args.epochs or (100 if mode == "crops" else 20)
    set_size(args, train, 512 if mode in DENSE else 224)
    rows = torch.arange(len(train))
    held = rows[:0]
    if mode == "lbfgs" or (mode in ("cached", "crops", *DENSE) and len(args.lr + args.wd) > 2):
        held = stratified(train.labels, 0.1, args.seed, HELD_OUT)
        if not len(held):  # five images per class, or fewer
            held = stratified(torch.zeros(len(train)), 0.1, args.seed, HELD_OUT)
        trained = train.labels[~torch.isin(rows, held)]
        if not len(held) or not torch.isin(train.labels[held], trained).all():
            text = f"{len(train)} training images are too few to choose settings on a tenth of them"
            fail(f"{text}: give more --labels or, except in lbfgs, one --lr and one --wd")
    fit = rows[~torch.isin(rows, held)]
    if mode not in ("knn", "lbfgs") and args.batch_size > len(fit):
        fail(f"--batch-size {args.batch_size} is more than the {len(fit)} images to train on")
    return args, Data(train, test, fit, held)


def set_size(args, images, default=224):
    """Set args.size, if it is not given: the side of small images in memory, or the default."""
    if not args.size:
        args.size = min(images.data.shape[2:]) if images.in_memory else default


def refuse_other_images(args, *parts):
    """Refuse an --out with results of other images; sets args.images, the keys of these."""
    args.images = [part.key for part in parts]
    before = common.from_rank_0(lambda: common.saved_settings(Path(args.out)))
    if before.get("images", args.images) != args.images:
        fail(f"--out {args.out} holds results of other images: choose another --out")


# ------------------------------------------------------------------------------- features and accuracies


def kept_features(args, net, images):
    """Features (n, D) of all images' centre crops and labels (n,), cached on disk for later evaluations."""
    key = common.from_rank_0(lambda: fingerprint(images))
    name = f"{args.backbone_hash}-{key}-{args.size}-{args.precision}.pt"
    path = Path(args.out).parent.parent / "features" / name
    if common.from_rank_0(path.exists):
        return [tensor.to(net.conv1.weight.device) for tensor in common.load_checked(path)]
    kept = common.features(net, images, torch.arange(len(images)), args)
    if common.rank() == 0:
        try:
            path.parent.mkdir(exist_ok=True)
            common.write(path, lambda file: torch.save(kept, file))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            print(f"{path} cannot be written, so these features are not cached: {error}", file=sys.stderr)
    return kept


def fingerprint(images):
    """A hash of the labels and of all pixels or, for files, of Images.key and their sizes."""
    if images.in_memory:
        content = hashlib.sha256(images.data.cpu().numpy()).hexdigest()
    elif images.archive:
        content = hashlib.sha256(images.data).hexdigest()  # which holds names, sizes and checksums
    else:
        content = [os.path.getsize(path) for path in images.data]
    text = f"{images.key} {images.labels.tolist()} {content}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_one(h):
    """Append a column of ones to features (n, D), whose weight in a linear classifier is the bias."""
    return F.pad(h, (0, 1), value=1.0)


def accuracies(scores, y):
    """Accuracies in % of class scores (m, C) for images with labels (m,)."""
    hits = (scores.topk(min(5, scores.shape[1])).indices == y[:, None]).double()
    per_class = torch.stack([hits[y == label, 0].mean() for label in y.unique()])
    values = dict(top1=hits[:, 0], top5=hits.sum(1), mean_per_class=per_class)
    return {name: 100 * float(value.mean()) for name, value in values.items()}


def choose(weights, h, y):
    """The name of the linear classifier that is best on held-out features, and the accuracies of all."""
    grid = {}
    for name, weight in weights.items():
        grid[name] = 100 * float(((h @ weight.mT).argmax(1) == y).double().mean())
    best = [name for name in grid if grid[name] == max(grid.values())]
    return best[len(best) // 2], grid  # the middle one of equals, which few images cannot tell apart


# --------------------------------------------------------------------------------------------- modes


def knn(args, net, data, device):
    """Classify by the cosine-weighted vote of the k nearest training images."""
    bank, labels = kept_features(args, net, data.train)
    h, y = kept_features(args, net, data.test)
    ks = [min(k, len(bank)) for k in args.k]
    similarity, rows = common.nearest(h, bank, max(ks))
    results = {}
    for k in ks:
        votes = common.knn_votes(similarity[:, :k], labels[rows[:, :k]], len(data.train.classes))
        results[f"k = {k}"] = accuracies(votes, y)
    if common.rank() == 0:
        queries = common.evenly(torch.arange(len(rows)), 12)
        path = Path(args.out).with_name("neighbours.png")
        write_sheet(path, data.test, queries, data.train, rows[queries, :9])
    return results, {}


def write_sheet(path, images, queries, bank, neighbours):
    """Save a picture whose rows are an image and its nearest in the bank, darkened if of another class."""
    view = common.View(size=64, resize=64)
    images = common.Crops(images, [view], 0)
    bank = common.Crops(bank, [view], 0)
    tiles = []
    for query, rows in zip(queries.tolist(), neighbours.tolist(), strict=True):
        (picture,), label, _ = images.cut(query, None)
        tiles.append(picture.cpu() / 255)  # either may be in the memory of a GPU
        for row in rows:
            (picture,), other, _ = bank.cut(row, None)
            tiles.append(picture.cpu() / (255 if other == label else 4 * 255))
    torchvision.utils.save_image(tiles, path, nrow=1 + neighbours.shape[1], pad_value=1)


class Heads(nn.Linear):
    """G linear classifiers of C classes, in rows c G + g, in float32; the last column is the bias."""

    def forward(self, h):
        with torch.autocast(h.device.type, enabled=False):
            return super().forward(with_one(h.float()))


def train(args, net, data, device):
    """Train heads by SGD, on cached features or random crops, and in `finetune` the backbone with them."""
    total = args.epochs * (len(data.fit) // args.batch_size)
    points = list(itertools.product(args.lr, args.wd))
    backbone = net
    features = None
    if args.mode == "cached":
        backbone = nn.Identity()
        features = kept_features(args, net, data.train)  # before Signals, which would only note a Ctrl-C
    elif args.mode == "finetune":
        points = [(args.lr_head, 0.0)]
        backbone = copy.deepcopy(net).requires_grad_(True).train()
    shape = (len(data.train.classes), len(points))  # C, G
    heads = Heads(net.inplanes + 1, math.prod(shape), bias=False)
    nn.init.zeros_(heads.weight)
    online = nn.Sequential(backbone, heads).to(device)
    average = copy.deepcopy(heads)
    model = common.parallel(online, args, device)
    settings = torch.tensor(points, device=device).repeat(shape[0], 1)  # (C G, 2)
    lr, wd = settings[:, :, None].unbind(1)
    groups = [
        dict(params=heads.parameters(), peak=1.0, fall=0.1),
        dict(params=backbone.parameters(), peak=args.lr_backbone, fall=0.2),
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    state = dict(data=data.train, online=online, average=average, optimizer=optimizer)
    start = common.resume(args, state)
    log = common.Log(args, start, total)
    signals = common.Signals(args)

    for step, x, y in log.watch(training_batches(args, data, features, device, start, total)):
        for group in optimizer.param_groups:
            group["lr"] = args.scale * group["peak"] * schedule(args, step, total, group["fall"])
        with common.autocast(args, device):
            logits = model(x).unflatten(1, shape)  # (n, C, G)
        losses = F.cross_entropy(logits, y[:, None].expand(-1, shape[1]), reduction="none").mean(0)  # (G,)
        optimizer.zero_grad()
        losses.sum().backward()
        heads.weight.grad.addcmul_(wd, heads.weight.detach()).mul_(lr)  # each head's own decay and rate
        optimizer.step()
        common.ema_update(average, heads, min(args.ema, (1 + step) / (10 + step)))

        done = step + 1
        if log.due(done):
            log(done, {}, loss=common.all_reduce(losses.detach()).min() / common.world())
        stop, save = signals.agree()
        if stop or save or done == total:
            common.save(args, done, state, online, losses.sum(), {}, "model.pth")
        if stop and done < total:
            signals.leave()

    log.close()
    signals.restore()
    names = [f"lr {lr:g}, wd {wd:g}" for lr, wd in points]
    weights = average.weight.detach().unflatten(0, shape).unbind(1)
    return score(args, net, backbone, dict(zip(names, weights, strict=True)), data, features)


def score(args, net, backbone, weights, data, features):
    """Test accuracies of the head that is best on held-out images, and the held-out accuracy of all.

    features: those of the training images, if they are in memory already.
    """
    best, *_ = weights
    grid = {}
    if len(data.held):
        h, y = features or kept_features(args, net, data.train)
        best, grid = choose(weights, with_one(h[data.held]), y[data.held])
    if args.mode == "finetune":
        h, y = common.features(backbone, data.test, torch.arange(len(data.test)), args)
    else:
        h, y = kept_features(args, net, data.test)
    return {best: accuracies(with_one(h) @ weights[best].mT, y)}, grid


def training_batches(args, data, features, device, start, total):
    """Yield (step, x, labels (n,)), where x are rows of `features`, if given, or random crops and flips."""
    order = common.epoch_order(len(data.fit), args, start, total)
    if features:
        h, y = features
        for step, _, index in order:
            rows = data.fit[index].to(device, non_blocking=True)
            yield step, h[rows], y[rows]
    else:
        view = common.View((args.area, 1), (0, 0, 0, 0), jitter_p=0, gray_p=0, size=args.size)
        for step, (x,), y in common.view_batches(data.train.take(data.fit), order, [view], args, device):
            yield step, x, y


def schedule(args, step, total, fall):
    """The factor of the peak rates: a warm-up and a cosine, or a drop by `fall` at each epoch of --steps."""
    if args.steps:
        return fall ** sum(step >= total * epoch // args.epochs for epoch in args.steps)
    return common.warmup_cosine(step, args.warmup_steps, total, last=args.last)


def fit_logistic(h, y, penalty, start):
    """Multinomial logistic regression by L-BFGS: minimise mean cross-entropy + penalty / 2 |W|^2.

    h (n, D + 1) ends in a column of ones; y (n,); start (C, D + 1): W and, as last column, the bias, which is
    not penalised.
    """
    weight = start.clone().requires_grad_()
    tolerance = 1e-5 / len(start)  # the gradient is spread over the classes
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=2000, tolerance_grad=tolerance, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(h @ weight.mT, y) + penalty / 2 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def lbfgs(args, net, data, device):
    """Logistic regression at 45 penalties, strong to weak; the best on held-out images is refitted to all."""
    h, y = kept_features(args, net, data.train)
    h_test, y_test = kept_features(args, net, data.test)
    h = h.double()
    mean = h.mean(0)
    scale = h.var(0).sum().sqrt()  # divided by it, a penalty means the same for every backbone
    h = with_one((h - mean) / scale)
    h_test = with_one((h_test - mean) / scale)

    weight = h.new_zeros(len(data.train.classes), h.shape[1])
    weights = {}
    for penalty in tqdm(torch.logspace(1, -7, 45).tolist(), "penalties", disable=common.rank() > 0):
        weight = fit_logistic(h[data.fit], y[data.fit], penalty, weight)
        weights[f"{penalty:.3g}"] = weight
    best, grid = choose(weights, h[data.held], y[data.held])
    weight = fit_logistic(h, y, float(best), weights[best])
    return {f"penalty {best}": accuracies(h_test @ weight.mT, y_test)}, grid


# ---------------------------------------------------------------------------------------- embeddings

PART = 50_000  # images whose features are in memory at a time


def embed(args, net, description, device):
    """Write features.npy, names.txt in the same order and neighbours.png, for all images of --data."""
    name = (args.data or "").partition(":")[0]
    if not name or name in common.NAMED or name in FILE_SETS:
        fail("--mode features is for your own images: give --data FOLDER, or a zip")
    images = common.from_rank_0(lambda: common.list_all(Path(args.data)))
    images.labels.fill_(-1)  # folders need not be classes
    images.unreadable_limit = 1.0  # however many there are, they are left out
    images = common.to_memory(images, device)
    refuse_other_images(args, images)
    common.resume(args, {})  # makes the directory
    set_size(args, images)  # after resume(), which keeps the settings as given

    out = Path(args.out)
    temporary = out / "features.npy.tmp"
    rows = []
    with open(temporary if common.rank() == 0 else os.devnull, "wb") as file:
        write_header(file, len(images), net.inplanes)
        for part in torch.arange(len(images)).split(PART):
            h, _ = common.features(net, images, part, args)
            unreadable = torch.zeros(len(images), device=device)
            unreadable[list(images.unreadable)] = 1
            readable = common.all_reduce(unreadable)[part] == 0  # on all ranks
            rows.append(part[readable.cpu()])
            file.write(h[readable].cpu().numpy().tobytes())
        rows = torch.cat(rows)
        if not len(rows):
            fail(f"--data {args.data}: no image can be read, of {len(images)}")
        file.seek(0)
        write_header(file, len(rows), net.inplanes)
    if common.rank() == 0:
        names = [images.name(row).replace("\n", "\\n") for row in rows]  # one per line
        (out / "names.txt").write_bytes(os.fsencode("".join(f"{name}\n" for name in names)))
        temporary.replace(out / "features.npy")
        write_neighbours(out, images, rows)
        print(f"{out}: features.npy {len(rows), net.inplanes}, names.txt in the same order, neighbours.png")
        print(f"{description}, {centre(args)}")
    common.leave_ranks()


def write_header(file, rows, width):
    """Write the header of a .npy file of float32 (rows, width); its length does not depend on `rows`."""
    header = dict(descr="<f4", fortran_order=False, shape=(rows, width))
    numpy.lib.format.write_array_header_1_0(file, header)


def write_neighbours(out, images, rows):
    """Save a picture of nearest neighbours among the images `rows`, whose features are in features.npy."""
    saved = numpy.load(out / "features.npy", mmap_mode="r")
    queries = common.evenly(torch.arange(len(rows)), 12)
    h = F.normalize(torch.tensor(saved[queries.numpy()]), dim=1)
    similarity = []
    for first in range(0, len(rows), PART):
        similarity.append(h @ F.normalize(torch.tensor(saved[first : first + PART]), dim=1).mT)
    similarity = torch.cat(similarity, 1)
    similarity[torch.arange(len(queries)), queries] = -1  # an image is not its own neighbour
    neighbours = similarity.topk(min(9, len(rows) - 1)).indices
    write_sheet(out / "neighbours.png", images, rows[queries], images, rows[neighbours])


# ------------------------------------------------------------------------------------------- dense tasks

MEAN = (124, 116, 104)  # of ImageNet's colours, which the network sees as 0


class DenseImages(common.Images):
    """Images with a target for each pixel, a class or a depth; class 255 and depth 0 are ignored.

    targets: paths of PNGs, or masks in memory (n, H, W). The labels of the images are all 0.
    """

    def __init__(self, images, targets, mode, depth_unit=1, first_class=0):
        super().__init__(images.data, torch.zeros(len(images)), images.classes, images.key)
        self.targets = targets
        self.mode = mode
        self.depth_unit = depth_unit
        self.first_class = first_class  # 1 in ADE20K, where 0 is ignored
        self.ignored = 0 if mode == "depth" else 255

    def take(self, rows):
        targets = [self.targets[row] for row in rows.tolist()]
        return DenseImages(super().take(rows), targets, self.mode, self.depth_unit, self.first_class)

    def read_target(self, i):
        """The target of image i (H, W): classes as uint8, or depths in metres as float32."""
        if self.in_memory:
            return self.targets[i]
        with Image.open(self.targets[i]) as picture:
            target = numpy.array(picture)
        if self.mode == "segment":
            return target - numpy.uint8(self.first_class)  # 0 - 1 is 255
        if target.dtype == "uint8":
            return target  # which check_target() refuses
        return target.astype("float32") / numpy.float32(self.depth_unit)

    def check_target(self, i):
        """How many pixels of target i count, and their largest value; None where it cannot be read."""
        try:
            with Image.open(self.data[i]) as picture:
                width, height = picture.size
            target = self.read_target(i)
        except Exception:  # Pillow raises many types of error
            return None
        dtype = "float32" if self.mode == "depth" else "uint8"
        if target.shape != (height, width) or target.dtype != dtype:
            raise ValueError(
                f"{self.targets[i]} has shape {target.shape} and type {target.dtype}, and its image has "
                f"shape {height, width}: masks must have 8 bits, depths 16, and both the size of their image"
            )
        counted = target[target != self.ignored]
        return counted.size, counted.max(initial=0)


LAYOUTS = {  # the folders of images and of targets, to train and to test on
    "depth": ("train/images", "train/depth", "val/images", "val/depth"),
    "masks": ("train/images", "train/masks", "val/images", "val/masks"),
    "ade20k": ("images/training", "annotations/training", "images/validation", "annotations/validation"),
}


def open_dense(args):
    """Training and test images with a class or a depth for each pixel."""
    if not args.data and args.mode == "depth":
        fail("--mode depth needs --data: a folder with train/images, train/depth, val/images, val/depth")
    if not args.data:
        return draw_mosaics(1000, 2), draw_mosaics(200, 3)
    name, _, root = args.data.partition(":")
    if name == "voc2012" and args.mode == "segment":
        train = open_voc(root or "data", "train")
        test = open_voc(root or "data", "val")
    else:
        layout = "masks"
        if args.mode == "depth":
            layout = "depth"
        elif Path(args.data, "annotations").is_dir():
            layout = "ade20k"
        folders = [Path(args.data, folder) for folder in LAYOUTS[layout]]
        train = list_pairs(args, *folders[:2], first_class=int(layout == "ade20k"))
        test = list_pairs(args, *folders[2:], first_class=int(layout == "ade20k"))
    train, highest = check_targets(args, train)
    test, highest_of_test = check_targets(args, test)
    train.classes = test.classes = ["depth"]
    if args.mode == "segment":
        if highest_of_test > highest:
            text = f"test masks have class {highest_of_test}, training masks 0 to {highest}"
            fail(f"--data {args.data}: {text}")
        train.classes = test.classes = [str(label) for label in range(highest + 1)]
        print(f"{args.data}: {highest + 1} classes, as in the training masks", file=sys.stderr)
    return train, test


def draw_mosaics(n, split):
    """Draw n images of 64 x 64 pixels: patterns, nearly always of two classes, side by side or stacked."""
    patterns = common.draw_patterns(4 * n, split)
    pairs = patterns.labels.argsort().view(2 * n, 2)  # of one class, but for a few
    tiles = pairs[common.uniform(0, split, torch.arange(2 * n), 8).argsort()].view(n, 2, 2)
    tiles[1::2] = tiles[1::2].mT.clone()
    images = patterns.data[tiles].permute(0, 3, 1, 4, 2, 5).reshape(n, 3, 64, 64)
    masks = patterns.labels[tiles].byte().repeat_interleave(32, 1).repeat_interleave(32, 2)
    images = common.Images(images, torch.zeros(n), patterns.classes, f"mosaics {split}")
    return DenseImages(images, masks.numpy(), "segment")


def open_voc(root, split):
    """A split of PASCAL VOC 2012, downloaded if missing."""
    try:
        missing = not Path(root, "VOCdevkit/VOC2012").is_dir()
        voc = datasets.VOCSegmentation(root, image_set=split, download=missing)
    except Exception as error:  # no network, or files are missing
        fail(f"voc2012 is not in {root} and cannot be fetched ({error}): give --data voc2012:/path/to/it")
    paths = numpy.array([os.fsencode(path) for path in voc.images])
    images = common.Images(paths, torch.zeros(len(paths)), [], f"voc2012 {split}")
    return DenseImages(images, voc.masks, "segment")


def list_pairs(args, folder, targets, first_class):
    """The images of a folder with their targets, PNGs of the same names in another folder."""
    images = common.list_folder(folder)
    if not len(images):
        fail(f"--data {args.data}: there are no images in {folder} (see --help for what it can be)")
    paths = []
    for path in images.data:
        name = Path(os.fsdecode(path)).relative_to(folder)
        paths.append(targets / name.with_suffix(".png"))
    return DenseImages(images, paths, args.mode, args.depth_unit, first_class)


def check_targets(args, images):
    """The images whose targets can be read, and the largest value in a target."""
    with ThreadPoolExecutor(args.workers or 1) as pool:
        checks = pool.map(images.check_target, range(len(images)))
        try:
            checks = list(tqdm(checks, "targets", len(images), delay=10))
        except ValueError as error:
            fail(error)
    rows = [row for row, check in enumerate(checks) if check]
    missing = [row for row, check in enumerate(checks) if not check]
    if missing:
        example = images.targets[missing[0]]
        text = f"{len(missing)} of {len(images)} images have no target that can be read, such as {example}"
        if len(missing) > 0.01 * len(images):
            fail(f"--data {args.data}: {text}; more than 1 % stops the run")
        print(f"left out: {text}", file=sys.stderr)
    counts, highest = zip(*[checks[row] for row in rows], strict=True)
    if not any(counts):
        fail(f"--data {args.data}: no pixel of {images.targets[0].parent} counts: all are {images.ignored}")
    return images.take(torch.tensor(rows)), int(max(highest))


class DenseCrops(torch.utils.data.Dataset):
    """What a worker does: read an image and its target, and crop both alike."""

    def __init__(self, images, args):
        self.images = images
        self.args = args

    def __getitem__(self, key):
        """(image, target, whether the image can be read) of (epoch, row); uncropped if epoch is None."""
        epoch, row = key
        image = self.images.read(row)
        target = torch.from_numpy(self.images.read_target(row))
        readable = image is not None
        if not readable:  # its pixels are ignored
            image = torch.zeros(3, *target.shape, dtype=torch.uint8)
            target = torch.full_like(target, self.images.ignored)
        if epoch is not None:
            draws = common.uniform(self.args.seed, epoch, row, torch.arange(4)).tolist()
            image, target = self.crop(tv_tensors.Image(image), tv_tensors.Mask(target), *draws)
        return image, target, readable

    def crop(self, image, target, zoom, down, right, flip):
        """Crop a square from an image and its target, at a scale from --scales, and flip half of them."""
        size = self.args.size
        low, high = self.args.scales
        scale = low + zoom * (high - low)
        side = max(1, round(size / scale))
        height, width = target.shape
        top = int(down * (max(height, side) - side + 1))
        left = int(right * (max(width, side) - side + 1))
        padding = [0, 0, max(0, side - width), max(0, side - height)]
        crops = []
        for picture, fill in ((image, MEAN), (target, self.images.ignored)):
            picture = transforms.pad(picture, padding, fill)
            picture = transforms.resized_crop(picture, top, left, side, side, [size, size])
            if flip < 0.5:
                picture = transforms.horizontal_flip(picture)
            crops.append(picture)
        if self.images.mode == "depth":  # an enlarged image is one taken from nearer (Eigen et al., 2014)
            crops[1] /= scale
        return crops


def dense_batches(images, order, args, device):
    """Yield (step, x (n, 3, H, W), targets (n, H, W)) for each (step, epoch, rows (n,)) of `order`."""
    for step, _, _, (x, target) in common.read_ahead(DenseCrops(images, args), order, args, device):
        x = x.to(device, non_blocking=True)
        yield step, common.normalise(x / 255), target.to(device, non_blocking=True)


def output_stride(net, args):
    """Pixels per cell of the last feature map: 8 or, where dilation cannot make it 8, 32."""
    basic_blocks = not hasattr(net.layer4[0], "conv3")
    return 32 if args.stem == "imagenet" and basic_blocks else 8


def dense_network(args, net, channels):
    """The backbone up to its last map, then BN and a 1 x 1 convolution or, with --lr-backbone, an FCN head.

    Bottlenecks get output stride 8 by dilated convolutions in stages 3 and 4, in place of strided ones;
    torchvision's basic blocks cannot be dilated. With the CIFAR stem, the output stride is 8 anyway.
    """
    if args.stem == "imagenet" and args.output_stride == 8:
        strides = dict(replace_stride_with_dilation=[False, True, True], norm_layer=common.BatchNorm)
        dilated = torchvision.models.get_model(args.arch, **strides)
        dilated.fc = nn.Identity()
        dilated.load_state_dict(net.state_dict())
        net = dilated
    torch.manual_seed(args.seed)
    if args.lr_backbone:
        head = FCNHead(net.inplanes, channels)
        head[1] = common.BatchNorm(net.inplanes // 4)
        head[3] = nn.Identity()  # dropout would depend on the number of ranks and on interruptions
    else:
        head = nn.Sequential(common.BatchNorm(net.inplanes), nn.Conv2d(net.inplanes, channels, 1))
    stages = collections.OrderedDict(list(net.named_children())[:-2])  # without pooling and classifier
    backbone = copy.deepcopy(nn.Sequential(stages))
    backbone.requires_grad_(args.lr_backbone > 0).train(args.lr_backbone > 0)
    return nn.Sequential(collections.OrderedDict(backbone=backbone, classifier=head))


def predict(model, x, target, args):
    """Scores (n, C, H, W) of classes, or of the log depth, enlarged to the size of the targets (n, H, W)."""
    with common.autocast(args, x.device):
        scores = model(x)
    return F.interpolate(scores.float(), target.shape[1:], mode="bilinear")


def dense_loss(scores, target, args):
    """The mean over valid pixels of all ranks: cross-entropy, or the absolute error of the log depth."""
    if args.mode == "segment":
        counted = target != 255
        error = F.cross_entropy(scores, target.long(), ignore_index=255, reduction="sum")
    else:
        counted = target > 0
        errors = (scores[:, 0] - target.log()).abs()  # infinite where the depth is 0
        error = torch.where(counted, errors, 0).sum()
    total, count = common.all_reduce(torch.stack([error, counted.sum().float()]))
    return total / count.clamp(min=1)


def train_dense(args, net, images, device, lr, wd):
    """Train the head, or with --lr-backbone all weights, by SGD; returns the network."""
    total = args.epochs * (len(images) // args.batch_size)
    online = common.prepare(dense_network(args, net, len(images.classes)), device)
    model = common.parallel(online, args, device)
    groups = [
        dict(params=online.classifier.parameters(), peak=lr, fall=0.1),
        dict(params=online.backbone.parameters(), peak=args.lr_backbone, fall=0.2),
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=wd)
    state = dict(data=images, online=online, optimizer=optimizer)
    start = common.resume(args, state)
    log = common.Log(args, start, total)
    signals = common.Signals(args)

    order = common.epoch_order(len(images), args, start, total)
    for step, x, target in log.watch(dense_batches(images, order, args, device)):
        for group in optimizer.param_groups:
            group["lr"] = args.scale * group["peak"] * schedule(args, step, total, group["fall"])
        loss = dense_loss(predict(model, x, target, args), target, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        done = step + 1
        if log.due(done):
            log(done, {}, loss=loss)
        stop, save = signals.agree()
        if stop or save or done == total:
            common.save(args, done, state, online, loss, {}, "model.pth")
        if stop and done < total:
            signals.leave()

    log.close()
    signals.restore()
    return online.eval()


def confusion(scores, target):
    """Counts (C + 1, C) of pixels by true and predicted class; the last row is for ignored pixels."""
    classes = scores.shape[1]
    index = target.long().clamp(max=classes) * classes + scores.argmax(1)
    return index.flatten().bincount(minlength=(classes + 1) * classes).view(classes + 1, classes)


def depth_errors(scores, target):
    """Over valid pixels: their number; those within 1.25, 1.25^2, 1.25^3; sums of relative, squared error."""
    counted = target > 0
    true = target[counted].double()
    predicted = scores[:, 0][counted].double().exp()
    ratio = torch.maximum(predicted / true, true / predicted)
    error = (predicted - true).abs()
    terms = [ratio > 0, ratio < 1.25, ratio < 1.25**2, ratio < 1.25**3, error / true, error**2]
    return torch.stack([term.double().sum() for term in terms])


def segment_metrics(counts, classes):
    """In %, from the sum of `confusion` over images; the IoU of classes that are in labels or predictions."""
    counts = counts[:-1].double()
    hits = counts.diag()
    union = counts.sum(0) + counts.sum(1) - hits
    iou = {}
    for label in (union > 0).nonzero()[:, 0].tolist():
        iou[classes[label]] = 100 * float(hits[label] / union[label])
    accuracy = 100 * float(hits.sum() / counts.sum())
    return dict(miou=sum(iou.values()) / len(iou), pixel_accuracy=accuracy, iou=iou)


def depth_metrics(sums):
    """In %, but rms in metres, from the sum of `depth_errors` over images."""
    *shares, square = (sums[1:] / sums[0]).tolist()
    delta1, delta2, delta3, rel = [100 * share for share in shares]
    return dict(delta1=delta1, delta2=delta2, delta3=delta3, rel=rel, rms=math.sqrt(square))


@torch.no_grad()
def measure(online, images, rows, args, device):
    """Metrics over all pixels of the uncropped images in `rows`, which are divided among the ranks."""
    classes = len(images.classes)
    counts = torch.zeros(classes + 1, classes, dtype=torch.int64, device=device)
    errors = torch.zeros(6, dtype=torch.float64, device=device)
    local_rows = rows[common.rank() :: common.world()]
    order = [(None, None, row) for row in local_rows.split(1) if len(row)]
    for _, x, target in dense_batches(images, order, args, device):
        scores = predict(online, x, target, args)
        if args.mode == "depth":
            errors += depth_errors(scores, target)
        else:
            counts += confusion(scores, target)
    counts = common.all_reduce(counts)
    errors = common.all_reduce(errors)
    if counts[:-1].sum() + errors[0] == 0:  # test images were checked
        fail(f"no pixel of the {len(rows)} held-out images counts: give one --lr and one --wd")
    if args.mode == "depth":
        return depth_metrics(errors)
    return segment_metrics(counts, images.classes)


@torch.no_grad()
def write_predictions(path, online, images, args, device):
    """Save a picture of eight test images, their targets and predictions; near depths are bright."""
    colours = torch.rand(256, 3, generator=torch.Generator().manual_seed(104))  # the first differ most
    colours[255] = 1
    tiles = []
    for row in common.evenly(torch.arange(len(images)), 8).tolist():
        image, target, _ = DenseCrops(images, args)[None, row]
        x = common.normalise(image[None].to(device) / 255)
        scores = predict(online, x, target[None], args)[0].cpu()
        if args.mode == "depth":
            depths = torch.stack([target, scores[0].exp()])[:, None].expand(-1, 3, -1, -1)
            nearest = torch.where(target > 0, target, math.inf).min()
            maps = torch.where(depths > 0, (nearest / depths).clamp(max=1), 0)
        else:
            maps = colours[torch.stack([target.long(), scores.argmax(0)])].permute(0, 3, 1, 2)
        for picture in (image / 255, *maps):
            picture = transforms.resize(picture, None, transforms.InterpolationMode.NEAREST, max_size=256)
            tiles.append(transforms.center_crop(picture, [256, 256]))
    torchvision.utils.save_image(tiles, path, nrow=6, pad_value=1)


def dense(args, net, data, device):
    """Train with each rate and decay in turn, and test the network that is best on held-out images."""
    args.output_stride = output_stride(net, args)
    points = list(itertools.product(args.lr, args.wd))
    fit = data.train.take(data.fit)
    networks = {}
    grid = {}
    for lr, wd in points:
        name = f"lr {lr:g}, wd {wd:g}"
        point = copy.copy(args)
        if len(points) > 1:
            point.out = f"{args.out}/{name}"
        networks[name] = train_dense(point, net, fit, device, lr, wd)
        if len(data.held):
            metrics = measure(networks[name], data.train, data.held, args, device)
            grid[name] = metrics["delta1" if args.mode == "depth" else "miou"]
    best = max(grid, key=grid.get, default=name)
    metrics = measure(networks[best], data.test, torch.arange(len(data.test)), args, device)
    if common.rank() == 0:
        picture = Path(args.out).with_name("predictions.png")
        write_predictions(picture, networks[best], data.test, args, device)
    return {best: metrics}, grid


# ---------------------------------------------------------------------------------------------- main

MODES = dict(knn=knn, cached=train, crops=train, lbfgs=lbfgs, finetune=train, segment=dense, depth=dense)


def centre(args):
    """What the network sees of an image."""
    return f"centre {args.size} of {common.side_before_centre(args.size)} pixels"


def protocol(args, description, data):
    """Describe in a line, for a caption, how results were obtained."""
    sgd = f"SGD with momentum 0.9, epochs {args.epochs}, batch {args.batch_size}, rates x {args.scale:g}"
    if args.warmup_steps:
        sgd += f", {args.warmup_steps} steps of warm-up"
    sgd += f", falling at epochs {args.steps}" if args.steps else f", cosine to {args.last:g}"
    if args.ema:
        sgd += f", heads averaged at {args.ema:g}"
    crops = f"crops of {args.area:.0%} to 100% and flips"
    tested = centre(args)
    if args.mode == "knn":
        how = "cosine kNN at temperature 0.07"
    elif args.mode == "lbfgs":
        how = "logistic regression by L-BFGS on features of centres, fitted again on all training images"
    elif args.mode == "cached":
        how = f"linear probe on features of centres, {sgd}"
    elif args.mode == "crops":
        how = f"linear probe on {crops}, {sgd}"
    elif args.mode == "finetune":
        how = f"fine-tuned on {crops}, {sgd}, backbone at {args.lr_backbone:g}, last epoch"
    else:
        task = "segmentation" if args.mode == "segment" else "log depth by L1"
        head = "BN and a 1 x 1 convolution on the frozen backbone"
        if args.lr_backbone:
            head = f"an FCN head without dropout, and the backbone at {args.lr_backbone:g}"
        crops = f"crops of {args.size} pixels at scales of {args.scales[0]:g} to {args.scales[1]:g}"
        how = f"{task}, {head}, at output stride {args.output_stride}, on {crops}, {sgd}"
        tested = "tested uncropped"
    if len(data.held):
        how += f", chosen on {len(data.held)} held-out training images"
    images = f"{args.data or 'patterns'}: {len(data.train)} training, {len(data.test)} test images"
    return f"{how}; {description}; {images}, {tested}"


def print_table(results, how):
    """Print the protocol and a line for each result; the IoU of each class is only in results.jsonl."""
    names = [name for name in next(iter(results.values())) if name != "iou"]
    width = max(map(len, results))
    unit = "%, rms in m" if "rms" in names else "%"
    print(f"{how}, in {unit}:")
    print(" " * width, *[f"{name:>15}" for name in names])
    for row, values in results.items():
        print(f"{row:{width}}", *[f"{values[name]:15.2f}" for name in names])


def main(args):
    net, description = load_backbone(args)
    device = common.start(args, __file__)
    net = common.prepare(net, device).eval().requires_grad_(False)
    if args.mode == "features":
        return embed(args, net, description, device)
    if args.mode in DENSE:
        train, test = common.from_rank_0(lambda: open_dense(args))
    else:
        train, test = open_labelled(args, device)
    plans = [plan(args, mode, train, test) for mode in args.mode.split(",")]
    refuse_other_images(args, train, test)
    common.resume(args, {})  # makes the directory

    records = ""
    for mode_args, data in plans:
        results, grid = MODES[mode_args.mode](mode_args, net, data, device)
        how = protocol(mode_args, description, data)
        record = dict(results=results, protocol=how, grid=grid, args=vars(mode_args))
        records += json.dumps(record) + "\n"
        if common.rank() == 0:
            Path(args.out, "results.jsonl").write_text(records)
            print_table(results, how)
    common.leave_ranks()


if __name__ == "__main__":
    common.launch(main, get_args)
