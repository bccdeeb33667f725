"""What no method varies: arguments, random numbers, views, data, networks, ranks, optimisers, runs.

A method file uses `Run` (set-up, batches, logging, checkpoints), `resnet`, `prepare` and `parallel` (networks
on their device and over ranks), `all_reduce` and `all_gather` (statistics of the global batch), and
`optimizer_for`.

Every random choice is a pure function of (seed, epoch, image, view, choice), see `uniform`: there is no
generator state to save, the number of workers does not matter, and one global batch gets the same views on 1,
2 or 8 ranks.
"""

import argparse
import contextlib
import difflib
import fcntl
import io
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

Args = argparse.Namespace

# ---------------------------------------------------------------------------------------- arguments


def fail(message: str) -> NoReturn:
    """Ends the program for an error of use: one sentence on stderr (from rank 0), exit code 2."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(2)  # torchrun ends all ranks when one leaves: rank 0 speaks first
    else:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)

    def parse_args(self, *args) -> Args:
        known, unknown = self.parse_known_args(*args)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            fail(f"unrecognized arguments: {' '.join(unknown)}" + f" (the nearest is {near[0]})" * bool(near))
        if empty := [name for name, value in vars(known).items() if value == ""]:  # an unset shell variable
            fail(f"--{empty[0].replace('_', '-')} is empty")
        return known


@contextlib.contextmanager
def readable(flag: str):
    """Within, or as a decorator: what cannot be read is an error of use of `flag`."""
    try:
        yield
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        fail(f"{flag} cannot be read: {error}")


def number(kind: type, low: float, high: float = 1e9):
    """An argparse type: a `kind` (int or float) in [low, high]."""

    def parse(text: str):
        value = kind(text)  # argparse says what a ValueError is of
        if not low <= value <= high:  # a NaN fails both
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


# fmt: off
def add_run_flags(add: Callable) -> None:
    """What pretraining and evaluation have alike, except data and out."""
    cpus = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.cpu_count())
    add("--seed", type=number(int, 0, 2**62), default=0, help="of all random choices: weights, order, views")
    add("--workers", type=number(int, 0, 1024), default=min(16, cpus), help="a rank, to decode")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N or cpu")
    add("--precision", choices=["bf16", "fp32", "fp64"], help="of the networks; losses are in fp32 or "
        "better (default: bf16 where the hardware has it)")
    add("--save-minutes", type=number(float, 1e-3), default=15.0, help="between checkpoints")
    add("--log-every", type=number(int, 1), default=50, help="steps")


def parser_for(doc: str, lr: str = "for 256 images, times batch-size / 256") -> Parser:
    """The flags every method has; those without a default here take it from the recipe. lr: what --lr is."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("data and run").add_argument
    add("--data", help="folder with train/ and val/ (or test/) of class folders; any folder of images; "
        "cifar10, cifar100 or stl10, with :/where/it/lies (default ./data); left out: built-in drawings")
    add("--out", help="run directory; the same command again resumes (default: runs/SCRIPT-RECIPE)")
    add("--recipe", help="published or tuned settings, any flag overrides one (default: imagenet for a "
        "folder, the data set's own by name, demo without --data)")
    add("--epochs", type=number(int, 1), help="passes over the data")
    add("--batch-size", type=number(int, 2), help="N, images a step over all ranks")
    add_run_flags(add)
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the networks")
    add("--micro-batch", type=number(int, 0), default=0, help="rows encoded at a time; the loss is that of "
        "the whole batch, BN statistics are per micro-batch (0: all, halved where memory runs out)")
    add("--knn-every", type=number(int, 0), default=1, help="epochs between kNN tests (0: first and last)")
    add = parser.add_argument_group("views").add_argument
    add("--views", choices=list(VIEWS), help="augmentation recipe")
    add("--size", type=number(int, 12, 1024), help="side of the two global views, pixels")
    add("--local-crops", type=number(int, 0, 64), default=0, help="more, small views (96 pixels at size 224)")
    add = parser.add_argument_group("network and optimiser").add_argument
    add("--arch", help="a ResNet of torchvision.models, e.g. resnet18, resnet50, wide_resnet50_2")
    add("--stem", choices=["imagenet", "cifar"], help="cifar: first convolution 3x3, stride 1, no pooling")
    add("--optimizer", choices=["lars", "sgd", "adamw"])
    add("--lr", type=number(float, 0, 1e6), help=f"peak learning rate, {lr}")
    add("--wd", type=number(float, 0, 1e3), help="weight decay, not of biases and norms")
    add("--warmup", type=number(float, 0), help="epochs of linear warm-up; then cosine to 0")
    return parser
# fmt: on


def parse(parser: Parser, recipes: dict, argv: list[str] | None) -> Args:
    """The flags, over the recipe's values, over the parser's defaults."""
    given, _ = parser.parse_known_args(argv)
    by_name = (given.data or "").partition(":")[0]
    name = given.recipe or ("demo" if not given.data else by_name if by_name in NAMED_DATA else "imagenet")
    if name not in recipes:
        fail(f"there is no recipe '{name}': choose one with --recipe from {', '.join(recipes)}")
    parser.set_defaults(**recipes[name], recipe=name)
    args = parser.parse_args(argv)
    args.precision = args.precision or default_precision(args.device)
    args.out = args.out or f"runs/{Path(sys.argv[0]).stem}-{name}"
    return args


def default_precision(device: str) -> str:
    """bf16 where it is fast: GPUs that have it, CPUs with AVX-512. Emulated, it is 10 to 50 times slower."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "fp32"


# ----------------------------------------------------------------------------------- random numbers

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants, as signed 64-bit integers
MIX = (30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1)


def hash64(*parts) -> Tensor:
    """63 random bits for ints, or int64 tensors that broadcast: splitmix64's finaliser over the parts."""
    x = torch.tensor(0)
    for part in map(torch.as_tensor, parts):
        x = x + (part + 1) * GOLDEN
        for shift, factor in MIX:
            x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x & ((1 << 63) - 1)


def uniform(seed, epoch, index, k) -> Tensor:
    """The k-th uniform in [0, 1) of image `index` in `epoch`, of ints or int64 tensors."""
    return (hash64(seed, epoch, index, k) >> 10).double() * 2.0**-53


# -------------------------------------------------------------------------------------------- views


class View(NamedTuple):
    """A view's area of the crop (None: the centre, and nothing else is done to it), jitter of brightness,
    contrast, saturation, hue, and probabilities."""

    scale: tuple[float, float] | None = None
    jitter: tuple[float, float, float, float] = (0, 0, 0, 0)
    jitter_p: float = 0.8
    blur: float = 0.0
    solarise: float = 0.0
    gray: float = 0.2
    flip: float = 0.5
    size: int = 0  # from --size


_BYOL = View((0.08, 1), (0.4, 0.4, 0.2, 0.1))
_SIMCLR = View((0.08, 1), (0.8, 0.8, 0.8, 0.2), blur=0.5)
_AUH = View((0.08, 1), (0.4, 0.4, 0.4, 0.4), jitter_p=1)
_CIFAR = View((0.2, 1), (0.4, 0.4, 0.4, 0.1))
VIEWS = {  # the two global views of each recipe; byol is vicreg's too
    "byol": (_BYOL._replace(blur=1.0), _BYOL._replace(blur=0.1, solarise=0.2)),
    "simclr": (_SIMCLR, _SIMCLR),
    "auh": (_AUH, _AUH),
    "cifar": (_CIFAR, _CIFAR),
}
LOCAL_SCALE, LEAST_GLOBAL = (0.05, 0.14), 0.14  # SwAV: area of local crops, least area of global ones
SIGMA, BLUR_RADIUS = (0.1, 2.0), 8  # pixels; the radius is 4 of the largest sigma at every image size
THRESHOLD = 128 / 255  # of solarisation
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Which uniform decides what; view v adds 64 v. The order of an epoch's images is choice -1.
CROP, FACTORS = slice(0, 40), slice(42, 46)
FLIP, JITTER, ORDER, GRAY, BLUR, BLUR_SIGMA, SOLARISE = 40, 41, 46, 47, 48, 49, 50
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def views_for(args: Args) -> list[View]:
    """The two global views, then the local ones: blurred half of the time (if any is), not solarised."""
    views = [view._replace(size=args.size) for view in VIEWS[args.views]]
    if not args.local_crops:
        return views
    blur, size = 0.5 * (views[0].blur > 0), max(12, round(args.size * 96 / 224))
    local = views[0]._replace(scale=LOCAL_SCALE, blur=blur, solarise=0.0, size=size)
    views = [view._replace(scale=(max(view.scale[0], LEAST_GLOBAL), view.scale[1])) for view in views]
    return views + [local] * args.local_crops


def draw(seed: int, epoch: int, index: Tensor, v: int) -> Tensor:
    """All uniforms of view v of images index (n,): (n, 51)."""
    return uniform(seed, epoch, index[:, None], torch.arange(SOLARISE + 1) + 64 * v)


def crop_boxes(u: Tensor, height: Tensor, width: Tensor, scale: tuple[float, float]) -> Tensor:
    """torchvision's RandomResizedCrop: (n, 4) of (top, left, height, width) in images height, width (n,).

    u (n, 40 or more): ten tries of (area, aspect ratio, top, left). The first that fits is taken, or else the
    largest centred box with a ratio in [3/4, 4/3].
    """
    area, ratio, y, x = u[:, CROP].reshape(-1, 10, 4).unbind(2)
    H, W = height[:, None].double(), width[:, None].double()
    area = H * W * (scale[0] + area * (scale[1] - scale[0]))
    ratio = torch.exp(math.log(3 / 4) + ratio * math.log(16 / 9))
    last_h, last_w = torch.minimum(H, (W * 4 / 3).round()), torch.minimum(W, (H * 4 / 3).round())
    centre = torch.full_like(H, 0.5 - 1e-9)  # so that the floor below is (H - h) // 2
    h = torch.cat([(area / ratio).sqrt().round(), last_h], 1)
    w = torch.cat([(area * ratio).sqrt().round(), last_w], 1)
    first = ((h > 0) & (h <= H) & (w > 0) & (w <= W)).int().argmax(1, keepdim=True)
    h, w, y, x = (t.gather(1, first) for t in (h, w, torch.cat([y, centre], 1), torch.cat([x, centre], 1)))
    return torch.cat([((H - h + 1) * y).floor(), ((W - w + 1) * x).floor(), h, w], 1).long()


def centre_boxes(height: Tensor, width: Tensor, size: int) -> Tensor:
    """Evaluation: the centred square of 224/256 of the shorter side, or of all of it if within `size`."""
    side = torch.minimum(height, width)
    side = torch.where(side <= size, side, (side * 224 / 256).round().long())
    return torch.stack([(height - side) // 2, (width - side) // 2, side, side], 1)


def resize_matrix(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Antialiased bicubic resize, one axis, of [start, start + length) to `size`: (n, size, source)."""
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale, pixel = length / size, torch.arange(source, device=start.device)
    centre = start + scale * (torch.arange(size, device=start.device).view(1, size, 1) + 0.5)
    t = ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()
    cubic = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2)
    weight = cubic * ((t < 2) & (pixel >= start) & (pixel < start + length))
    return weight / weight.sum(2, keepdim=True)


def crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop and resize of uint8 (n, 3, H, W) as two matrix products: (n, 3, size, size) in [0, 1]."""
    top, left, h, w = boxes.to(images.device, non_blocking=True).unbind(1)
    rows = resize_matrix(top, h, images.shape[2], size)
    columns = resize_matrix(left, w, images.shape[3], size)
    return (rows[:, None] @ (images.float() / 255) @ columns[:, None].mT).clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Hue plus `shift` (n,) turns, at constant HSV saturation and value."""
    r, g, b = x.unbind(1)
    value, brightest = x.max(1)
    chroma = value - x.amin(1)
    d = chroma.clamp(min=1e-12)
    sector = torch.where(brightest == 1, (b - r) / d + 2, (r - g) / d + 4)
    sector = torch.where(brightest == 0, (g - b) / d, sector) + 6 * shift.view(-1, 1, 1)
    k = (sector[:, None] + torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def _column(t: Tensor, x: Tensor) -> Tensor:
    """(n,) parameters from the CPU against images x (n, 3, S, S)."""
    return t.to(x.device, non_blocking=True).view(-1, 1, 1, 1)


def jitter(x: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order; order, factor (n, 4) on the CPU.

    The first three are one formula, clamp(f x + (1 - f) other), with other = 0, the mean of gray, or gray.
    """
    for kind, f in zip(order.unbind(1), factor.unbind(1), strict=True):
        gray = luma(x)
        other = gray * _column((kind == SATURATION) * (1 - f), x)
        other += gray.mean((1, 2, 3), keepdim=True) * _column((kind == CONTRAST) * (1 - f), x)
        x = torch.addcmul(other, x, _column(torch.where(kind == HUE, 1.0, f), x)).clamp_(0, 1)
        rows = ((kind == HUE) & (f != 0)).nonzero()[:, 0]  # on the CPU: no waiting for the device
        if len(rows):
            at = rows.to(x.device, non_blocking=True)
            x[at] = shift_hue(x[at], f[rows].to(x.device, non_blocking=True))
    return x


@lru_cache(maxsize=8)
def _shifts(size: int, device: torch.device) -> Tensor:
    """The matrix of each shift within the blur's radius, reflecting at borders: (2 R + 1, size^2)."""
    source = torch.arange(size)[None] + torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)[:, None]
    source = source.abs() % max(2 * size - 2, 1)
    return F.one_hot(torch.minimum(source, 2 * size - 2 - source), size).float().flatten(1).to(device)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur of (n, 3, S, S), each image with its own sigma (n,) in pixels, as two matrix products."""
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device)
    weight = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, 1)  # (n, 2 R + 1)
    matrix = (weight @ _shifts(x.shape[-1], x.device)).view(-1, 1, x.shape[-1], x.shape[-1])
    return matrix @ x @ matrix.mT


def photometric(u: Tensor, view: View) -> dict[str, Tensor]:
    """Parameters of all after the crop from u (n, 51): (n,), or (n, 4) for the jitter, in order of use."""
    strength, identity = torch.tensor(view.jitter).double(), torch.tensor([1.0, 1.0, 1.0, 0.0]).double()
    low = torch.where(identity > 0, (1 - strength).clamp(min=0), -strength)
    factor = low + u[:, FACTORS] * (identity + strength - low)
    factor = torch.where(u[:, JITTER, None] < view.jitter_p, factor, identity)
    order = ORDERS[(u[:, ORDER] * len(ORDERS)).long()]
    flags = dict(flip=u[:, FLIP] < view.flip, gray=u[:, GRAY] < view.gray, blur=u[:, BLUR] < view.blur)
    sigma = (SIGMA[0] + u[:, BLUR_SIGMA] * (SIGMA[1] - SIGMA[0])).float()
    solarise = u[:, SOLARISE] < view.solarise
    return dict(flags, order=order, factor=factor.gather(1, order).float(), sigma=sigma, solarise=solarise)


def augment(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """All after the crop, (n, 3, S, S) in [0, 1] again: flip, jitter, gray, blur, solarise."""
    x = jitter(torch.where(_column(p["flip"], x), x.flip(3), x), p["order"], p["factor"])
    x = torch.where(_column(p["gray"], x), luma(x), x)
    rows = p["blur"].nonzero()[:, 0]
    if len(rows):
        at = rows.to(x.device, non_blocking=True)
        x[at] = gaussian_blur(x[at], p["sigma"][rows].to(x.device, non_blocking=True))
    if p["solarise"].any():
        x = torch.where(_column(p["solarise"], x) & (x >= THRESHOLD), 1 - x, x)
    return x


def normalise(x: Tensor) -> Tensor:
    """By ImageNet's channel means and deviations, channels last in memory."""
    mean, std = (torch.tensor(c, device=x.device).view(1, 3, 1, 1) for c in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def make_view(images: Tensor, boxes: Tensor | None, u: Tensor, view: View) -> Tensor:
    """One view (n, 3, S, S), normalised, of uint8 images and boxes (n, 4), or of crops; u (n, 51) uniforms.

    In chunks: on a CPU they stay in cache, on a GPU they bound the memory of what lies between.
    """
    x = torch.empty(len(u), 3, view.size, view.size, device=images.device, memory_format=torch.channels_last)
    p = photometric(u, view)
    chunk = max(1, (2**18 if x.is_cpu else 2**26) // x[0].numel())
    for rows in (slice(i, i + chunk) for i in range(0, len(u), chunk)):
        part = images[rows].float() / 255 if boxes is None else crop(images[rows], boxes[rows], view.size)
        part = augment(part, {name: t[rows] for name, t in p.items()}) if view.scale else part
        x[rows] = normalise(part)
    return x


# --------------------------------------------------------------------------------------------- data

datasets = torchvision.datasets
TRAIN, VAL, TRAINVAL, TEST = (dict(split=name) for name in ("train", "val", "trainval", "test"))
NAMED_DATA = {  # training splits, together, and the test split; the first three are arrays, the others files
    "cifar10": (datasets.CIFAR10, [dict(train=True)], dict(train=False)),
    "cifar100": (datasets.CIFAR100, [dict(train=True)], dict(train=False)),
    "stl10": (datasets.STL10, [dict(split="train+unlabeled")], TEST),
    "flowers102": (datasets.Flowers102, [TRAIN, VAL], TEST),
    "oxford_iiit_pet": (datasets.OxfordIIITPet, [TRAINVAL], TEST),
    "dtd": (datasets.DTD, [TRAIN, VAL], TEST),
    "food101": (datasets.Food101, [TRAIN], TEST),
    "fgvc_aircraft": (datasets.FGVCAircraft, [TRAINVAL], TEST),
}
SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".ppm", b".tif", b".tiff")
MEMORY_SIDE, MEMORY_BYTES = 128, 4 << 30  # images of at most this side are kept decoded, if all of them fit
MAX_UNREADABLE = 0.01
STALL = 300  # seconds without a batch from workers, which then hang


class Pixels(NamedTuple):
    """Images in memory: (n, 3, H, W) uint8 on any device; labels (n,) int64 on the CPU, -1 for none."""

    images: Tensor
    labels: Tensor

    def read(self, i: int) -> Tensor:
        return self.images[i]

    def take(self, rows: Tensor) -> "Pixels":
        return Pixels(self.images[rows], self.labels[rows])


class Files(NamedTuple):
    """Image files: their paths in one uint8 tensor, which workers share, with ends (n,); labels (n,)."""

    paths: Tensor
    ends: Tensor
    labels: Tensor
    unreadable: set[int]  # found so far

    def path(self, i: int) -> str:
        start = int(self.ends[i - 1]) if i else 0
        return os.fsdecode(self.paths[start : int(self.ends[i])].numpy().tobytes())

    def read(self, i: int) -> Tensor | None:
        """(3, H, W) uint8, RGB; None where the file is no whole image, or has above 179 million pixels."""
        try:
            if not os.path.isfile(self.path(i)):  # a pipe would never end
                return None
            data = bytearray(Path(self.path(i)).read_bytes())
            picture = Image.open(io.BytesIO(data))  # the header: a decompression bomb is refused
            if data.startswith(b"\xff\xd8"):  # a JPEG; torchvision's PNG decoder dies of a damaged file
                with contextlib.suppress(RuntimeError, AttributeError):  # Pillow reads all kinds, more slowly
                    bits = torch.frombuffer(data, dtype=torch.uint8)
                    return torchvision.io.decode_jpeg(bits, torchvision.io.ImageReadMode.RGB)
            wide = picture.mode.startswith("I;16")  # convert would clip it
            picture = picture if wide else picture.convert("RGB")
            image = torchvision.transforms.functional.pil_to_tensor(picture)
            return (image.int() >> 8).byte().expand(3, -1, -1) if wide else image
        except Exception:  # damage has many names
            return None

    def take(self, rows: Tensor) -> "Files":
        return files_of([os.fsencode(self.path(i)) for i in rows.tolist()], self.labels[rows].tolist())


Split = Pixels | Files


class Data(NamedTuple):
    """What a run trains and is watched on; without labels, test is None and classes is empty."""

    train: Split
    test: Split | None
    classes: list[str]


def list_split(folder: Path, classes: list[str]) -> Files:
    """Every image file of a split, at any depth; with classes, labelled by the folders right below `folder`.

    Links are followed, each folder once; hidden files are left out.
    """
    paths, seen, errors = [], set(), []
    for place, below, names in os.walk(os.fsencode(folder), onerror=errors.append, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(b"."))
        paths += (os.path.join(place, name) for name in names)
    if errors:
        raise errors[0]
    if not paths:
        fail(f"no images below {folder}: known are {', '.join(s.decode() for s in SUFFIXES)}")
    paths.sort()
    if not classes:
        return files_of(paths, [-1] * len(paths))
    start, number_of = len(os.fsencode(folder)) + 1, {name: i for i, name in enumerate(classes)}
    names = [os.fsdecode(path[start:].partition(b"/")[0]) for path in paths]
    if unknown := sorted({*names} - {*classes}):
        fail(f"{folder}: {len(unknown)} entries are no class folder of train/: {', '.join(unknown[:3])}")
    return files_of(paths, [number_of[name] for name in names])


def files_of(paths: list[bytes], labels: list[int]) -> Files:
    blob = torch.frombuffer(bytearray(b"".join(paths)), dtype=torch.uint8)
    return Files(blob, torch.tensor([len(path) for path in paths]).cumsum(0), torch.tensor(labels), set())


def list_folder(root: Path, cache: Path) -> Data:
    """`--data` as a folder. A run keeps its listing, `cache`: the order of images is part of a run."""
    if not os.path.isdir(root):  # False for names that cannot be
        fail(f"--data {root}: no such folder, nor a data set by that name ({', '.join(NAMED_DATA)})")
    if cache.is_file():
        try:
            *splits, classes = torch.load(cache, weights_only=True)
        except Exception as error:  # damage has many names
            fail(f"{cache} is damaged ({error}): delete it, and --data is listed again")
        return Data(*(split and Files(*split, set()) for split in splits), classes)
    train = root / "train" if (root / "train").is_dir() else root
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    classes = sorted(path.name for path in train.iterdir() if path.is_dir() and path.name[0] != ".")
    if train == root or not test or not classes:
        if rank() == 0:
            print("no train/ and val/ (or test/) of class folders: no probe and no kNN", file=sys.stderr)
        return Data(list_split(train, []), None, [])
    return Data(list_split(train, classes), list_split(test, classes), classes)


def to_memory(split: Split | None, device: torch.device) -> Split | None:
    """On the device, decoded, where they are small images of one size; others stay files."""
    if isinstance(split, Files):
        n, bad = len(split.labels), []
        first = next((image for image in map(split.read, range(n)) if image is not None), None)
        if first is None:
            fail(f"none of the {n} images can be read, the first is {split.path(0)!r}")
        if max(first.shape) > MEMORY_SIDE or n * first.numel() > MEMORY_BYTES:
            return split
        images = torch.empty(n, *first.shape, dtype=torch.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i, image in enumerate(pool.map(split.read, range(n))):
                if image is None:
                    bad.append(i)
                elif image.shape != first.shape:
                    pool.shutdown(cancel_futures=True)
                    return split
                else:
                    images[i] = image
        report_unreadable(split, bad)
        keep = [i for i in range(n) if i not in split.unreadable] if bad else slice(None)
        split = Pixels(images[keep], split.labels[keep])
    return split and Pixels(split.images.to(device), split.labels)


def load_small(data: Data, device: torch.device) -> Data:
    return Data(*(to_memory(split, device) for split in data[:2]), data.classes)


def report_unreadable(files: Files, found: list[int]) -> None:
    """Names images found to be unreadable, once; where they are above 1 % of all, the run stops."""
    for i in sorted(set(found) - files.unreadable):
        files.unreadable.add(i)
        if rank() == 0 and len(files.unreadable) <= 100:
            tqdm.write(f"unreadable, skipped ({len(files.unreadable)} so far): {files.path(i)!r}", sys.stderr)
    n, count = len(files.labels), len(files.unreadable)
    if count > MAX_UNREADABLE * n:
        one = files.path(max(files.unreadable))
        fail(f"{count} of {n} images cannot be read, more than 1 %, one is {one!r}")


def named_data(name: str, root: str) -> Data:
    """A torchvision data set by name, downloaded where it is missing."""
    kind, train_splits, test_split = NAMED_DATA[name]
    try:
        for split in [*train_splits, test_split] if rank() == 0 else ():
            kind(root, download=True, **split)
        barrier()
        *trains, test = (kind(root, **split) for split in [*train_splits, test_split])
    except (OSError, RuntimeError, ImportError) as error:  # flowers102 needs scipy
        fail(f"{name} is not in {root} and cannot be had ({error}): give --data {name}:/where/it/lies")
    return Data(_splits(trains), _splits([test]), list(map(str, getattr(test, "classes", ()))))


def _splits(found: list) -> Split:
    """Together. torchvision has no public way to paths and labels that does not decode the images."""
    if not hasattr(found[0], "data"):
        paths = (path for x in found for path in getattr(x, "_image_files", None) or x._images)
        return files_of([os.fsencode(path) for path in paths], [label for x in found for label in x._labels])
    images = torch.tensor(found[0].data)
    if hasattr(found[0], "labels"):  # STL-10, (n, 3, H, W) already
        return Pixels(images, torch.tensor(found[0].labels).long())
    return Pixels(images.permute(0, 3, 1, 2).contiguous(), torch.tensor(found[0].targets))


GLYPHS = {  # signed distances from the outline, in glyph radii, at (a, b) from the centre
    "disc": lambda a, b: a.hypot(b) - 0.95,
    "ring": lambda a, b: (a.hypot(b) - 0.75).abs() - 0.22,
    "square": lambda a, b: torch.maximum(a.abs(), b.abs()) - 0.85,
    "frame": lambda a, b: (torch.maximum(a.abs(), b.abs()) - 0.65).abs() - 0.2,
    "triangle": lambda a, b: torch.maximum(-b, 0.87 * a.abs() + 0.5 * b) - 0.5,
    "plus": lambda a, b: torch.maximum(torch.minimum(a.abs(), b.abs()) - 0.25, a.abs() + b.abs() - 1.2),
    "ell": lambda a, b: torch.maximum(torch.maximum(a.abs(), b.abs()) - 0.9, torch.minimum(a, b) + 0.3),
    "bar": lambda a, b: torch.maximum(a.abs() - 1.1, b.abs() - 0.3),
    "crescent": lambda a, b: torch.maximum(a.hypot(b) - 1, 0.8 - (a - 0.5).hypot(b)),
    "star": lambda a, b: a.hypot(b) - 0.65 - 0.35 * (5 * torch.atan2(b, a)).cos(),
}


def draw_glyphs(n: int, split: int) -> Pixels:
    """The built-in set: n images of 32 pixels with six glyphs of one kind each, the label. Places, sizes and
    turns are random; so are colours, though hues of a kind lie within 0.3 turns (kinds are 0.1 apart)."""
    index, axis = torch.arange(n), (torch.arange(32) + 0.5) / 16 - 1
    labels = (uniform(0, split, index, -3) * len(GLYPHS)).long()
    y, x, images = axis[:, None], axis[None, :], torch.full((n, 3, 32, 32), 0.5)
    u = uniform(0, split, index[:, None], torch.arange(42)).float().view(n, 6, 7, 1, 1)
    for kind, distance in enumerate(GLYPHS.values()):
        mine = images[labels == kind]
        for g, glyphs in enumerate(u[labels == kind].unbind(1)):
            cy, cx, size, turn, hue, saturation, value = glyphs.unbind(1)  # (m, 1, 1) each
            cy, cx = (g // 2 - 1) * 0.64 + (cy - 0.5) * 0.3, (g % 2 - 0.5) * 0.96 + (cx - 0.5) * 0.4
            radius, sin, cos = 0.28 + 0.12 * size, (2 * math.pi * turn).sin(), (2 * math.pi * turn).cos()
            a, b = ((x - cx) * cos + (y - cy) * sin) / radius, ((y - cy) * cos - (x - cx) * sin) / radius
            mask = (0.5 - distance(a, b) * radius * 16).clamp(0, 1)[:, None]  # an edge one pixel wide
            pale = 0.7 * (1 - saturation)
            red = torch.stack([torch.ones_like(pale), pale, pale], 1)  # (m, 3, 1, 1)
            colour = shift_hue(red, 0.1 * kind + 0.3 * (hue - 0.5)) * (0.3 + 0.7 * value[:, None])
            mine += mask * (colour - mine)
        images[labels == kind] = mine
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(split))
    return Pixels(((images + 0.1 * (noise - 0.5)).clamp(0, 1) * 255).round().byte(), labels)


@readable("--data")
def open_data(args: Args, out: Path) -> Data:
    """`--data` as it is: built in, by name, or a folder."""
    name, _, root = (args.data or "").partition(":")
    if not args.data:
        data = Data(draw_glyphs(5_000, 0), draw_glyphs(1_000, 1), list(GLYPHS))
    elif name in NAMED_DATA:
        data = named_data(name, root or "data")
    else:
        data = list_folder(Path(args.data).absolute(), out / "files.pt")
    if len(data.train.labels) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {len(data.train.labels)} training images")
    return data


class Batches:
    """(epoch, index (n,)) of steps start .. stop - 1: rank r has rows r n .. (r + 1) n - 1 of the batch."""

    def __init__(self, images: int, batch: int, seed: int, start: int, stop: int):
        self.images, self.batch, self.seed, self.start, self.stop = images, batch, seed, start, stop

    def __iter__(self):
        epoch, rows = -1, self.batch // world()
        for step in range(self.start, self.stop):
            if epoch != (epoch := step // (self.images // self.batch)):
                order = uniform(self.seed, epoch, torch.arange(self.images), -1).argsort()
            first = step % (self.images // self.batch) * self.batch + rank() * rows
            yield epoch, order[first : first + rows]


def boxes_of(views: list[View], seed: int, epoch: int, index: Tensor, height: Tensor, width: Tensor):
    """The box of each view in images height, width (n,): a list of (n, 4)."""
    return [
        crop_boxes(draw(seed, epoch, index, v), height, width, view.scale)
        if view.scale
        else centre_boxes(height, width, view.size)
        for v, view in enumerate(views)
    ]


class Crops(torch.utils.data.Dataset):
    """A worker's part: each file is read and decoded once, and cut to a uint8 crop for each view. An
    unreadable image is replaced by the next one, and reported."""

    def __init__(self, files: Files, views: list[View], seed: int, workers: int = 0):
        self.files, self.views, self.seed = files, views, seed
        self.reading = torch.full((max(1, workers),), -1).share_memory_()  # what each worker is at

    def read(self, i: int) -> Tensor | None:
        worker = torch.utils.data.get_worker_info()
        self.reading[worker.id if worker else 0] = i
        return self.files.read(i)

    def __getitems__(self, batch: tuple[int, Tensor]):
        epoch, index = batch
        crops = [torch.empty(len(index), 3, v.size, v.size, dtype=torch.uint8) for v in self.views]
        labels, bad = torch.empty_like(index), []
        for start in range(0, len(index), 16):  # few decoded images at a time
            images = []
            for row, i in enumerate(index[start : start + 16].tolist(), start):
                while (image := self.read(i)) is None:
                    bad.append(i)
                    if len(bad) > len(index):  # hopeless: the run will stop
                        return epoch, index, crops, labels, bad
                    i = (i + 1) % len(self.files.labels)
                images.append(image)
                labels[row] = self.files.labels[i]
            sides = torch.tensor([image.shape[1:] for image in images]).unbind(1)
            boxes = boxes_of(self.views, self.seed, epoch, index[start : start + 16], *sides)
            for out, box in zip(crops, boxes, strict=True):
                for row, (image, (t, l, h, w)) in enumerate(zip(images, box.tolist(), strict=True), start):
                    part = image[None, :, t : t + h, l : l + w]
                    out[row] = F.interpolate(part, out.shape[2:], mode="bicubic", antialias=True)[0]
        return epoch, index, crops, labels, bad


def _start_worker(_: int) -> None:
    """Launchers send signals to all processes: the main one answers them, and ends its workers."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)


def crop_batches(split: Split, batches, views: list[View], args: Args, device: torch.device):
    """Yields epoch, index (n,), labels (n,), and of each view images and boxes (n, 4), or crops and None.

    From files, workers decode and crop; pixels in memory are cropped where they are.
    """
    if isinstance(split, Pixels):
        for epoch, index in batches:
            images = split.images[index.to(device, non_blocking=True)]
            sides = (torch.full_like(index, side) for side in images.shape[2:])
            boxes = boxes_of(views, args.seed, epoch, index, *sides)
            yield epoch, index, split.labels[index], [images] * len(views), boxes
        return
    crops = Crops(split, views, args.seed, args.workers)
    others = {*torch.multiprocessing.active_children()}
    loader = torch.utils.data.DataLoader(
        crops, batch_sampler=batches, collate_fn=tuple, num_workers=args.workers,
        worker_init_fn=_start_worker, pin_memory=device.type == "cuda", timeout=STALL if args.workers else 0,
    )  # fmt: skip
    try:
        for epoch, index, images, labels, bad in loader:
            report_unreadable(split, bad)
            yield epoch, index, labels, [x.to(device, non_blocking=True) for x in images], [None] * len(views)
    except RuntimeError as error:  # of a worker that hangs, or was killed
        if "DataLoader" not in str(error):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where the loader would protest
        for worker in {*torch.multiprocessing.active_children()} - others:
            worker.kill()
        paths = ", ".join(repr(split.path(i)) for i in crops.reading.tolist() if i >= 0)
        fail(f"{error}; last read, one of each worker: {paths}")


def batches_of(split: Split, batches, views: list[View], args: Args, device: torch.device):
    """Yields ([x (n, 3, S, S) of each view], y (n,)), on the device, for (epoch, index (n,)) of batches."""
    for epoch, index, y, images, boxes in crop_batches(split, batches, views, args, device):
        us = (draw(args.seed, epoch, index, v) for v in range(len(views)))
        xs = [make_view(*parts) for parts in zip(images, boxes, us, views, strict=True)]
        yield xs, y.to(device, non_blocking=True)


def view_batches(split: Split, args: Args, device: torch.device, start: int, stop: int):
    """Yields ([x1, x2, local crops...], y) of steps start .. stop - 1: (n, 3, S, S) and (n,)."""
    batches = Batches(len(split.labels), args.batch_size, args.seed, start, stop)
    return batches_of(split, batches, views_for(args), args, device)


# ----------------------------------------------------------------------------------------- networks


class _Conv(nn.Conv2d):
    """A 3x3 convolution of single pixels, the last stage at 32 pixels, as the matrix product it is: zeros are
    all that the outer taps meet. On CPUs it halves the time of the whole network."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] == (1, 1):
            return F.conv2d(x, self.weight[:, :, 1:2, 1:2], groups=self.groups)
        return super().forward(x)


def resnet(arch: str, stem: str | None = "imagenet", zero_init: bool = False) -> tuple[nn.Module, int]:
    """torchvision's ResNet without its classifier, and the number of its features."""
    builder = getattr(torchvision.models, arch, None) if "resne" in arch else None
    if not callable(builder):
        fail(f"--arch {arch}: not a ResNet of torchvision.models, such as resnet18 or resnet50")
    net = builder(zero_init_residual=zero_init)
    width, net.fc = net.fc.in_features, nn.Identity()
    if stem == "cifar":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.__class__ = _Conv
    return net, width


def mlp(*sizes: int, norm: bool = True) -> nn.Sequential:
    """Linear, BN (with `norm`), ReLU for each hidden size; the last layer is linear without bias."""
    layers = []
    for inputs, outputs in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=False))


def per_view(net: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    """`net` of each view: a forward for each global view (BN statistics are per view), one for local ones."""
    outs = [net(x) for x in xs[:2]]
    return outs + list(net(torch.cat(xs[2:])).chunk(len(xs) - 2)) if len(xs) > 2 else outs


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.SyncBatchNorm for CPU tensors, which torch's refuses: statistics of all ranks, float32 or better."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        count = world() * x.numel() // x.shape[1]
        mean = _AllReduce.apply(wide.sum(dims), False) / count
        centred = wide - mean.view(shape)
        variance = _AllReduce.apply(centred.square().sum(dims), False) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        y = centred * (variance + self.eps).rsqrt().view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y).to(x.dtype)


def prepare(net: nn.Module, args: Args, device: torch.device) -> nn.Module:
    """To the device and precision, channels last, BN synchronised over ranks."""
    dtype = torch.float64 if args.precision == "fp64" else None
    net = net.to(device, dtype, memory_format=torch.channels_last)
    if world() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules() if world() > 1 else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm  # the same parameters and buffers, another forward
    return net


def parallel(net: nn.Module, args: Args, device: torch.device) -> nn.Module:
    """What is called in training: `net`, compiled with --compile, under DDP where there are ranks."""
    if args.compile:
        net.compile()
    if world() == 1:
        return net
    ids = [device.index] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)
    ddp.broadcast_buffers = False  # they are the same; torch 2.15 warns of the argument of that name
    return ddp


@torch.no_grad()
def ema_update(average: nn.Module, net: nn.Module, momentum: float) -> None:
    """average <- momentum average + (1 - momentum) net: parameters and BN statistics; counters are copied."""
    pairs = list(zip(average.state_dict().values(), net.state_dict().values(), strict=True))
    averaged, new = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    torch._foreach_lerp_(averaged, new, 1 - momentum)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)


def autocast(args: Args, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


# -------------------------------------------------------------------------------------------- ranks


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class _AllReduce(torch.autograd.Function):
    """Sum over ranks. Backward: times W where all ranks do the same with it, otherwise the sum over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, same: bool) -> Tensor:
        ctx.same, x = same, x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.same:
            return grad * dist.get_world_size(), None
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad, None


def all_reduce(x: Tensor) -> Tensor:
    """The sum over ranks of a statistic from which every rank computes the same loss.

    Backward needs no communication: the gradient times W, since DDP divides by W. Without ranks: x itself.
    """
    return _AllReduce.apply(x, True) if dist.is_initialized() else x


GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # renamed


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (W n, ...), without gradient; x (n, ...), the same n everywhere."""
    if not dist.is_initialized():
        return x.detach()
    out = x.new_empty(world() * len(x), *x.shape[1:])
    getattr(dist, GATHER)(out, x.contiguous())
    return out


def start_ranks(args: Args) -> torch.device:
    """The device of this rank, its process group joined under torchrun; errors of use first."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", args.device):
        fail(f"--device {args.device}: give cuda, cuda:N or cpu")
    device = torch.device(args.device)
    if args.batch_size % world() or args.batch_size // world() < 2:
        fail(f"--batch-size {args.batch_size} on {world()} ranks: it must divide, into 2 or more images each")
    if device.type == "cuda":
        count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.index is None else device.index + 1
        if torch.cuda.device_count() < count:
            fail(f"--device {args.device}: {count} CUDA devices needed, {torch.cuda.device_count()} here")
        if args.precision == "fp64":
            fail("--precision fp64 is for exactness tests on the CPU: add --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world() > 1 and not dist.is_initialized():
        store, mine, count = next(dist.rendezvous("env://"))
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store has the addresses of each
        store, backend = dist.PrefixStore(life, store), "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=mine, world_size=count)
    return device


# ------------------------------------------------------------------------------------- optimisation


class LARS(torch.optim.Optimizer):
    """SGD with momentum, layer by layer in proportion: gradients are scaled by trust |weights| / |gradient|.

    You, Gitman, Ginsburg 2017. Groups with adapt=False (biases, norms) are not scaled.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, trust: float = 1e-3):
        super().__init__(params, dict(lr=lr, momentum=momentum, trust=trust, weight_decay=0.0, adapt=True))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if params and group["adapt"]:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
                p_norm, g_norm = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, grads))
                ratio = torch.where((p_norm > 0) & (g_norm > 0), group["trust"] * p_norm / g_norm, 1.0)
                torch._foreach_mul_(grads, list(ratio.unbind()))
            for p in params:
                if not self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocity = [self.state[p]["velocity"] for p in params]
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, grads)
            torch._foreach_add_(params, velocity, alpha=-group["lr"])


def optimizer_for(net: nn.Module, args: Args) -> torch.optim.Optimizer:
    """--optimizer for all parameters; biases and norms without weight decay and without LARS's scaling."""
    params = [p for p in net.parameters() if p.requires_grad]
    weights = dict(params=[p for p in params if p.ndim > 1], weight_decay=args.wd)
    others = dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0)
    if args.optimizer == "lars":
        return LARS([weights, dict(others, adapt=False)], args.lr)
    if args.optimizer == "sgd":
        return torch.optim.SGD([weights, others], args.lr, momentum=0.9, foreach=True)
    return torch.optim.AdamW([weights, others], args.lr, fused=True)


def warmup_cosine(step: int, warmup: float, total: int, first: float = 0.0, last: float = 0.0) -> float:
    """Linear from `first` up to 1 over `warmup` steps, then half a cosine down to `last` at `total`."""
    if step < warmup:
        return first + (1 - first) * (step + 1) / (warmup + 1)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# ------------------------------------------------------------------------------------------ monitor


def evenly(n: int, most: int) -> Tensor:
    """At most `most` of 0 .. n - 1, evenly spread."""
    return torch.arange(min(n, most)) * n // min(n, most)


@torch.no_grad()
def features(backbone: nn.Module, split: Split, index: Tensor, args: Args, device: torch.device):
    """float32 features (m, D) and labels (m,) of images `index`, on every rank."""
    padded = torch.cat([index, index[:1].expand(-len(index) % world())])  # to equal shards
    mine, found, training = padded[rank() :: world()], [], backbone.training
    backbone.eval()
    batches = [(0, rows) for rows in mine.split(256)]
    for (x,), y in batches_of(split, batches, [View(size=args.size)], args, device):
        with autocast(args, device):
            h = backbone(x.double() if args.precision == "fp64" else x)
        found.append((h.float(), y))
    backbone.train(training)
    h, y = (all_gather(torch.cat(t)) for t in zip(*found, strict=True))
    order = torch.arange(len(h), device=device).view(world(), -1).mT.flatten()[: len(index)]
    return h[order], y[order]


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
    """Scores (m, C) of neighbours (m, k): the sum of exp(similarity / temperature) of each class' ones (Wu et
    al. 2018); -inf without any."""
    votes = similarity.new_zeros(len(labels), classes)
    votes.scatter_add_(1, labels, (similarity / temperature).exp())
    return votes.masked_fill_(votes == 0, -torch.inf)


def knn_accuracy(bank: Tensor, bank_y: Tensor, h: Tensor, y: Tensor, k: int = 20) -> float:
    """Share of queries h (m, D) that a cosine-weighted vote in bank (n, D) gets right."""
    similarity, at = nearest(h, bank, k)
    votes = knn_votes(similarity, bank_y[at], int(max(bank_y.max(), y.max())) + 1)
    return float((votes.argmax(1) == y).double().mean())


@torch.no_grad()
def spectrum(z: Tensor) -> Tensor:
    """Singular values of the L2-normalised, uncentred rows of z (n, d), divided by their sum."""
    s = torch.linalg.svdvals(F.normalize(z.double(), dim=1))
    return s / s.sum().clamp(min=1e-30)


def effective_rank(z: Tensor) -> float:
    """RankMe, the exponential of the entropy of `spectrum`: 1 where all rows are one point, at most d."""
    return float(torch.special.entr(spectrum(z)).sum().exp())


class Probe(nn.Module):
    """Online linear classifier on detached, L2-normalised features, after a BN without parameters."""

    def __init__(self, width: int, classes: int, args: Args, device: torch.device):
        super().__init__()
        net = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes))
        self.net = prepare(net, args, device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)

    def forward(self, h: Tensor) -> Tensor:
        return self.net(F.normalize(h.detach(), dim=1).to(self.net[1].weight.dtype))

    def step(self, h: Tensor, y: Tensor) -> None:
        """One step on features h (n, D) of images with labels y (n,), -1 for none."""
        known = all_reduce((y >= 0).sum()).clamp(min=1)
        self.optimizer.zero_grad()
        (F.cross_entropy(self(h), y, ignore_index=-1, reduction="sum") / known).backward()
        for p in self.parameters():
            p.grad = all_reduce(p.grad)
        self.optimizer.step()

    @torch.no_grad()
    def accuracy(self, h: Tensor, y: Tensor) -> float:
        self.net.eval()
        right = (self(h).argmax(1) == y).float().mean()
        self.net.train()
        return float(right)


# --------------------------------------------------------------------------------------------- run


class Run:
    """One training run: checks of what was asked, the directory, batches, log, checkpoints, bar, signals.

        run = Run(args, __file__)                # errors of use are raised here, before anything is written
        run.begin(backbone, width, model=model, optimizer=optimizer)    # makes the directory, or resumes
        for step, xs, y in run.steps():          # views and labels, on the device
            loss, terms, h, zs = run.backward(model, xs, loss_of)
            run.log(loss, terms, lr, h, zs[0], y)

    Between steps it evaluates and saves at the end of epochs, and leaves when a signal asked for it.
    """

    FREE = {"out", "workers", "device", "save_minutes", "log_every"}  # arguments that may change on resume
    EXPORT = "backbone.pth"

    def __init__(self, args: Args, script: str):
        self.args, self.script, self.out = args, Path(script), Path(args.out)
        self.device = start_ranks(args)
        self._check_directory()
        self.data = open_data(args, self.out)
        self.epoch_steps = len(self.data.train.labels) // args.batch_size
        self.step, self.total, self.stop, self.micro = 0, args.epochs * self.epoch_steps, 0, args.micro_batch
        torch.manual_seed(args.seed)

    def _check_directory(self) -> None:
        """Refuses a directory that holds something else or another run, or that cannot be written."""
        if not str(self.out).isprintable():  # TensorBoard has its limits
            fail(f"--out {str(self.out)!r}: give a name that can be printed")
        parent = next(path for path in (self.out, *self.out.absolute().parents) if os.path.lexists(path))
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            fail(f"--out {self.out}: {parent} is not a folder that can be written")
        with readable(f"--out {self.out}"):
            found = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
            saved = json.loads((self.out / "args.json").read_text()) if "args.json" in found else None
        if found - {".lock", "job.json", "submit"} and saved is None:
            fail(f"--out {self.out} is neither empty nor a run directory: choose another")
        now = json.loads(json.dumps(vars(self.args)))
        was = now if saved is None else saved
        keys = sorted((now.keys() | was.keys()) - self.FREE)
        changed = [f"{key} {was.get(key)} -> {now.get(key)}" for key in keys if was.get(key) != now.get(key)]
        if changed:
            fail(f"--out {self.out} holds another run ({'; '.join(changed)}): choose another")

    def begin(self, evaluate: nn.Module, width: int, **state) -> None:
        """Makes the directory, or resumes from it.

        evaluate: the backbone (`width` features) that is watched and exported; state: for the checkpoint.
        """
        self.data = load_small(self.data, self.device)
        self.probe = None
        if self.data.test:
            self.probe = Probe(width, len(self.data.classes), self.args, self.device)
            state.update(probe=self.probe, probe_optimizer=self.probe.optimizer)
        splits = [split and split[:3] for split in self.data[:2]]
        self.open(
            evaluate, state, (*splits, self.data.classes) if isinstance(self.data.train, Files) else None
        )

    def open(self, evaluate: nn.Module, state: dict, listing: tuple | None = None) -> None:
        """The directory, locked and described, with the state of its checkpoint if there is one."""
        barrier()  # every rank has checked the directory
        self.backbone, self.state, self.pending, self.knn = evaluate, state, None, []
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if rank() == 0:  # the lock is held until this process ends, however it ends, and unlike flock's
                self.lock = open(self.out / ".lock", "w")  # not by the workers of a killed one
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._resume()
            if rank() == 0:
                for source in {self.script.resolve(), Path(__file__).resolve()}:
                    shutil.copy(source, self.out)
                if listing and not (self.out / "files.pt").exists():
                    self._write("files.pt", lambda file: torch.save(listing, file))
                text = json.dumps(vars(self.args), indent=1)
                self._write("args.json", lambda file: file.write(text.encode()))
        except BlockingIOError:
            fail(f"--out {self.out} is in use by another process: choose another --out, or end that one")
        except OSError as error:
            fail(f"--out {self.out} cannot be written: {error.strerror or error}")
        self.votes = dist.new_group(backend="gloo") if world() > 1 else None  # on signals, without the GPU
        if rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = SummaryWriter(str(self.out), purge_step=self.step)

    def _on_signal(self, number: int, _) -> None:
        self.stop = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait for the step

    def _write(self, name: str, write) -> None:
        """Beside, synced and renamed: a file under its final name is whole."""
        with open(self.out / (name + ".tmp"), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.out / (name + ".tmp"), self.out / name)

    def save(self) -> None:
        """checkpoint.pt, with the one before kept, and backbone.pth under torchvision's names."""
        self._check_pending()
        self.saved_at = time.monotonic()
        if rank() > 0:
            return
        state = {name: value.state_dict() for name, value in self.state.items()}
        self._check_state(state)
        state.update(step=self.step, world=world(), knn=self.knn)
        try:
            self._write("checkpoint-new.pt", lambda file: torch.save(state, file))
            if (self.out / "checkpoint.pt").exists():
                os.replace(self.out / "checkpoint.pt", self.out / "checkpoint-previous.pt")
            os.replace(self.out / "checkpoint-new.pt", self.out / "checkpoint.pt")
            self._write(self.EXPORT, lambda file: torch.save(self.backbone.state_dict(), file))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            fail(f"step {self.step} cannot be saved in {self.out} ({error}); the checkpoint before is kept")

    def _resume(self) -> None:
        """Loads the newest whole checkpoint."""
        names = ("checkpoint.pt", "checkpoint-previous.pt", "log.jsonl")
        (last, before, log), damaged = (self.out / name for name in names), []
        for path in filter(Path.exists, (last, before)):
            try:
                saved = load_checked(path, self.device)
                break
            except Exception as error:  # damage has many names
                damaged.append(f"{path} is damaged ({error})")
        else:
            if damaged:
                fail(f"{'; '.join(damaged)}: nothing to resume from, choose another --out")
            return
        for name, value in self.state.items():
            value.load_state_dict(saved[name])
        self.step, self.knn = saved["step"], saved["knn"]
        if rank() > 0:
            return
        if damaged:
            print(f"{damaged[0]}: going on from the one before", file=sys.stderr)
            os.replace(before, last)
        ranks = "" if saved["world"] == world() else f", saved on {saved['world']} ranks, now {world()}"
        print(f"{self.out}: resuming at step {self.step} of {self.total}{ranks}", file=sys.stderr)
        lines = text_of(log).splitlines(True)
        kept = "".join(line for line in lines if json_of(line).get("step", math.inf) <= self.step)
        self._write("log.jsonl", lambda file: file.write(kept.encode()))

    def steps(self):
        """Yields (step, [views], labels) from where the run stands to the end; evaluates, saves between."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
        self.handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        interval = 0.5 if sys.stderr.isatty() else 30
        self.bar = tqdm(total=self.total, initial=self.step, disable=rank() > 0, mininterval=interval)
        self.saved_at = self.clock = time.monotonic()
        self.clock_step, every = self.step, self.args.knn_every
        try:
            if self.step == 0:
                self.evaluate()
            with contextlib.closing(self.batches()) as batches:  # ends the workers, however the loop ends
                for xs, y in batches:
                    if self.step == 0:
                        self._show(xs)
                    yield self.step, [x.double() for x in xs] if self.args.precision == "fp64" else xs, y
                    self.step += 1
                    self.bar.update()
                    epoch, rest = divmod(self.step, self.epoch_steps)
                    if self.step == self.total or (rest == 0 and every and epoch % every == 0):
                        self.evaluate()
                    if rest == 0 or time.monotonic() - self.saved_at > 60 * self.args.save_minutes:
                        self.save()
                    self._leave_if_asked()
            self.bar.close()
            self._summary()
        finally:  # of the run, or of its generator where an error ends the loop
            self.bar.close()
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            if rank() == 0:
                self.board.close()
                self.lock.close()

    def batches(self):
        """Yields (views, labels) of the steps that are left."""
        return view_batches(self.data.train, self.args, self.device, self.step, self.total)

    def _show(self, xs: list[Tensor]) -> None:
        """The views of the first eight images on TensorBoard, one row a view."""
        if rank() == 0:
            x = torch.cat([F.interpolate(x[:8].cpu(), self.args.size) for x in xs])
            mean, std = (torch.tensor(c).view(3, 1, 1) for c in (MEAN, STD))
            self.board.add_image("views", torchvision.utils.make_grid((x * std + mean).clamp(0, 1)), 0)

    def _leave_if_asked(self) -> None:
        """All ranks agree on the step, the state is saved, and the program ends; on SLURM, is ended.

        Who left a SLURM job before it is ended would complete or fail it, and it would not come back.
        """
        asked = torch.tensor(self.stop)
        if self.votes:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.votes)
        if not asked or self.step == self.total:
            return
        self.save()
        barrier()
        self.bar.close()
        if rank() == 0:
            where = f"saved {self.out} at step {self.step} of {self.total}, the same command resumes"
            print(f"{signal.Signals(int(asked)).name}: {where}", file=sys.stderr)
            if asked == signal.SIGUSR2 and callable(self.handlers[signal.SIGUSR2]):
                self.handlers[signal.SIGUSR2](signal.SIGUSR2, None)  # submitit's: requeues the job, exits
        if asked != signal.SIGINT and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(900)
        raise SystemExit(130 if asked == signal.SIGINT else 0)

    def backward(self, model: nn.Module, xs: list[Tensor], loss_of) -> tuple:
        """Gradients of loss_of(zs) -> (loss, terms), where model(xs) -> (h, zs), (v, n, ...) for all views.

        In micro-batches, zs is computed without graph, then dL/dzs of the whole batch, then micro-batches
        again with graph: the loss is that of the whole batch. Returns loss, terms, h (n, D) of view 1 and zs.
        """
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        while True:
            parts = math.ceil(len(xs[0]) / self.micro) if self.micro else 1
            chunks = list(zip(*(x.tensor_split(parts) for x in xs), strict=True))
            model.zero_grad(set_to_none=True)
            try:
                return self._backward(model, chunks, loss_of, before)
            except torch.OutOfMemoryError as error:
                size, reason = len(chunks[0][0]), str(error).partition("\n")[0]
            if world() > 1 or size < 4:
                fail(f"out of memory at {size} rows: give --micro-batch {max(1, size // 2)} ({reason})")
            self.micro = size // 2
            tqdm.write(f"out of memory at {size} rows: going on with --micro-batch {self.micro}", sys.stderr)
            model.load_state_dict(before, strict=False)
            torch.cuda.empty_cache()

    def _backward(self, model: nn.Module, chunks: list, loss_of, before: dict[str, Tensor]) -> tuple:
        def encode(chunk):
            with autocast(self.args, self.device):
                h, zs = model(list(chunk))
            return h, zs.to(torch.promote_types(zs.dtype, torch.float32))

        if len(chunks) == 1:
            h, zs = encode(chunks[0])
            loss, terms = loss_of(zs)
            loss.backward()
            return loss.detach(), terms, h[0].detach(), zs.detach()
        with torch.no_grad():
            hs, zs = zip(*(encode(chunk) for chunk in chunks), strict=True)
        model.load_state_dict(before, strict=False)  # the running statistics of BN shall see each row once
        zs = torch.cat(zs, 1).requires_grad_()
        loss, terms = loss_of(zs)
        loss.backward()
        for i, (chunk, grad) in enumerate(zip(chunks, zs.grad.tensor_split(len(chunks), 1), strict=True)):
            more = i < len(chunks) - 1 and world() > 1
            with model.no_sync() if more else contextlib.nullcontext():
                encode(chunk)[1].backward(grad)
        return loss.detach(), terms, torch.cat([h[0] for h in hs]), zs.detach()

    def log(self, loss: Tensor, terms: dict[str, Tensor], lr: float, h: Tensor, z: Tensor, y: Tensor) -> None:
        """After the optimiser's step: online probe, check for non-finite values, a record every --log-every.

        h (n, D) features and z (n, d) embeddings of view 1, y (n,) labels.
        """
        if self.probe:
            self.probe.step(h.float(), y)
        self._check_pending()
        values = torch.stack([loss.double(), *(term.double() for term in terms.values())])
        copied = values.to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event() if values.is_cuda else None
        self.pending, done = (self.step, ["loss", *terms], copied, event), self.step + 1
        due = done % self.args.log_every == 0 or done in (1, self.total)
        if due or not event:  # else a step later, so that the device is not waited for
            self._check_pending()
        if not due:
            return
        now, images = time.monotonic(), self.args.batch_size * (done - self.clock_step)
        speed, self.clock, self.clock_step = images / (now - self.clock), now, done
        ranks = dict(rank_z=effective_rank(z), rank_h=effective_rank(h))
        spread = dict(std_z=F.normalize(z, dim=1).std(0).mean().item(), std_h=h.float().std(0).mean().item())
        named = {name: value.item() for name, value in terms.items()}
        self.record(done, loss=loss.item(), **named, lr=lr, **ranks, **spread, images_per_second=speed)
        if rank() == 0:
            self.board.add_histogram("spectrum_z_log10", spectrum(z).clamp(min=1e-12).log10(), done)
        if ranks["rank_z"] < 4 <= z.shape[1] / 4 and done > min(100, self.total // 4):
            lost = f"the effective rank of the embeddings is {ranks['rank_z']:.1f} of {z.shape[1]}"
            tqdm.write(f"step {done}: collapse: {lost}", file=sys.stderr)
        knn = f" kNN {100 * self.knn[-1][1]:.1f} %" if self.knn else ""
        text = f"epoch {done / self.epoch_steps:.2f} loss {loss.item():.4f} {speed:.0f} images/s{knn}"
        self.bar.set_postfix_str(text, refresh=False)

    def _check_pending(self) -> None:
        """A loss that is not finite ends the run, before anything is saved."""
        if self.pending is None:
            return
        (step, names, values, event), self.pending = self.pending, None
        if event:
            event.synchronize()
        if not values.isfinite().all():
            shown = ", ".join(f"{name} {value:g}" for name, value in zip(names, values.tolist(), strict=True))
            fail(f"step {step}: the loss is not finite ({shown}); the last checkpoint in {self.out} is kept")

    def _check_state(self, state: dict) -> None:
        """A step can spoil weights after a loss that was finite."""
        if bad := [name for name, t in flatten(state) if t.is_floating_point() and not t.isfinite().all()]:
            fail(f"step {self.step}: {bad[0]} is not finite; the last checkpoint in {self.out} is kept")

    def record(self, step: int, **values: float) -> None:
        """One line of log.jsonl, and its numbers on TensorBoard."""
        if rank() > 0:
            return
        try:
            with open(self.out / "log.jsonl", "a") as file:
                record = dict(step=step, steps=self.total, epoch=round(step / self.epoch_steps, 3), **values)
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            fail(f"{self.out}/log.jsonl cannot be written ({error.strerror}); the last checkpoint is kept")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def evaluate(self) -> None:
        """kNN and online-probe accuracy on at most 10,000 test images, with a bank of at most 25,000."""
        if not self.data.test:
            return
        begun, found = time.monotonic(), []
        for split, most in ((self.data.train, 25_000), (self.data.test, 10_000)):
            known = (split.labels >= 0).nonzero()[:, 0]
            index = known[evenly(len(known), most)]
            found += features(self.backbone, split, index, self.args, self.device)
        bank, bank_y, h, y = found
        self.knn.append((self.step, knn_accuracy(bank, bank_y, h, y)))
        seconds = time.monotonic() - begun
        self.record(self.step, knn=self.knn[-1][1], probe=self.probe.accuracy(h, y), seconds=seconds)
        self.clock += seconds  # not training time

    def _summary(self) -> None:
        if rank() > 0:
            return
        images = len(self.data.train.labels)
        print(f"{self.script.name}: done, {self.total} steps, {self.args.epochs} epochs of {images} images")
        if self.knn:
            first, last = 100 * self.knn[0][1], 100 * self.knn[-1][1]
            print(f"kNN accuracy: {first:.1f} % at initialisation, {last:.1f} % now")
        print(f"{self.out}: backbone.pth (torchvision's names), checkpoint.pt, log.jsonl, args.json")
        data = self.args.data if self.data.test else "/path/to/labelled/images"
        print(f"next: tensorboard --logdir {self.out}")
        data = f" --data {data}" if data else ""
        print(f"      python eval_linear.py --backbone {self.out}/backbone.pth{data}")


def load_checked(path: Path | str, device: torch.device | str):
    """torch.load of data alone; it does not notice flipped bits, the archive's checksums do (ValueError)."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if record := archive.testzip():
                raise ValueError(f"wrong checksum of {record}")
    return torch.load(path, map_location=device, weights_only=True)


def flatten(tree: dict, prefix: str = ""):
    """(name, tensor) of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")


# ------------------------------------------------------------------------------------------- launch


def launch(main: Callable, get_args: Callable) -> None:
    """What a script ends with: runs it here or, with --submit, leaves it to a scheduler."""
    parser = Parser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    add = parser.add_argument_group("launch").add_argument
    # fmt: off
    add("--submit", choices=["slurm", "local"], help="leave the run to SLURM, or to the background here "
        "(a sweep: all points at once)")
    add("--sweep", nargs="+", metavar="FLAG=V1,V2", help="a run below --out for each point of the product; "
        "true and false for flags with a --no, 'flag=1 2,3' for flags of several values")
    add("--gpus", type=number(int, 0), help="a node, each a rank (default: slurm 0, local 1 if it is there)")
    add("--tasks", type=number(int, 1), help="ranks a node, without GPUs (default: 1)")
    add("--cpus", type=number(int, 1), help="a rank (default: slurm 1, local its share)")
    add("--nodes", type=number(int, 1), help="(default: 1)")
    add("--minutes", type=number(int, 1), help="until the run saves, is requeued and goes on (default: 60)")
    add("--partition", help="(default: the cluster's)")
    add("--slurm", nargs="+", metavar="KEY=VALUE", help="more for sbatch: account, qos, exclude, ...")
    # fmt: on
    asked, argv = parser.parse_known_args()
    given = [name for name, value in vars(asked).items() if value is not None]
    slurms = {"nodes", "minutes", "partition", "slurm"}
    if {"-h", "--help"} & {*argv}:
        with contextlib.suppress(SystemExit):
            get_args(argv)
        print("\n" + parser.format_help(), end="")
    elif wrong := [name for name in given if not asked.submit or name in slurms and asked.submit != "slurm"]:
        fail(f"--{wrong[0]} needs --submit slurm" + " or local" * (wrong[0] not in slurms))
    elif asked.submit:
        submit(asked, argv, get_args)
    else:
        try:
            main(get_args(argv))
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            reason = re.sub(r"^\[\S+\] ", "", str(error)).partition("\n")[0].partition(". ")[0]
            text = f"error: rank {rank()}: another one does not answer ({reason})"
            print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
            raise SystemExit(1) from None


def job_of(path: list[str], command: list[str], cpus: int) -> Callable:
    """What each task of a job runs: the command without the launch flags, as one rank. A job that comes back
    runs it again, and it resumes. Pickled by value, as what a function makes: the common.py that the run
    imports is the one beside its script."""
    import submitit

    class Job(submitit.helpers.Checkpointable):
        def __call__(self) -> None:
            env, life = submitit.JobEnvironment(), int(os.environ.get("SLURM_RESTART_COUNT", 0))
            env.paths.result_pickle.unlink(missing_ok=True)  # of an earlier life, whose port can linger, too
            os.environ["MASTER_PORT"] = str(10000 + (16 * int(env.raw_job_id) + life) % 20000)
            ranks = submitit.helpers.TorchDistributedEnvironment()
            if env.cluster == "local":
                ranks.master_addr = "127.0.0.1"  # this machine's name need not resolve
            ranks.export(set_cuda_visible_devices=False, overwrite=True)
            torch.set_num_threads(cpus)
            sys.path[:0], sys.argv = path, command
            runpy.run_path(command[0], run_name="__main__")

    return Job()


def sweep_points(sweep: list[str], argv: list[str], get_args: Callable) -> tuple[Path, dict[str, list[str]]]:
    """--out, and the flags of each point by the name of its directory; without a sweep, of one point "".

    A point that the script refuses fails alone, in its run; where it refuses them all, nothing is submitted.
    """
    out, points, seen, values = None, {}, set(), {}
    for item in sweep:
        flag, _, listed = item.partition("=")
        flag = flag.strip("-").replace("_", "-")
        if not flag or flag in values or not all(listed.split(",")):
            fail(f"--sweep {item}: give each flag once, as flag=value,value")
        values[flag] = listed.split(",")
    for point in itertools.product(*values.values()):
        flags, said = [], io.StringIO()
        for flag, value in zip(values, point, strict=True):
            switch = dict(true=[f"--{flag}"], false=[f"--no-{flag}"])
            flags += switch.get(value, [f"--{flag}", *value.split()])
        name = re.sub(r"[^\w.,=+-]", "_", ",".join(map("=".join, zip(values, point, strict=True))))
        means = name
        with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            args = get_args([*argv, *flags])
            out, means = out or Path(args.out), str({**vars(args), "out": None})
        if name in points or means in seen:
            fail(f"--sweep {' '.join(sweep)}: the point {name} is there twice")
        points[name] = flags
        seen.add(means)
    if out is None:
        print(said.getvalue(), end="", file=sys.stderr)
        raise SystemExit(2)
    return out, points


def ask(*command: str) -> str | None:
    """What a command of SLURM's prints; None where it does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def check_slurm(partition: str | None, nodes: int) -> None:
    """SLURM lets a job for more nodes than there are wait for ever."""
    if (text := ask("sinfo", "-h", "-o", "%P %D")) is None:
        fail("--submit slurm: no SLURM answers here (sinfo); --submit local needs none")
    count, default = {}, []
    for name, number in map(str.split, text.splitlines()):
        count[name.strip("*")] = int(number)
        default += [name.strip("*")] * ("*" in name)
    chosen = partition.split(",") if partition else default
    if not chosen or {*chosen} - {*count}:
        fail(f"--partition {partition}: the cluster has {', '.join(count)}")
    if nodes > (most := max(count[name] for name in chosen)):
        fail(f"--nodes {nodes}: partition {','.join(chosen)} has {most}")


@contextlib.contextmanager
def in_background():
    """What is started here keeps neither terminal nor pipes, and outlives them."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with open(os.devnull, "r+b") as null, contextlib.ExitStack() as after:
        after.callback(signal.signal, signal.SIGHUP, hangup)
        for fd in range(3):
            kept = after.enter_context(open(os.dup(fd), "wb"))
            after.callback(os.dup2, kept.fileno(), fd)
            os.dup2(null.fileno(), fd)
        yield


# After a rank was killed or crashed, as by a failing node; not where the run ended by an error of its own.
REQUEUE = """code=$?
case $code in 134|135|136|137|139)
    [ ${SLURM_RESTART_COUNT:-0} -lt 20 ] && scontrol requeue $SLURM_JOB_ID ;;
esac
exit $code"""


def submit(asked: Args, argv: list[str], get_args: Callable) -> None:
    """Submits a run, or the points of a sweep as one job array, and says where they are."""
    slurm, script = asked.submit == "slurm", Path(sys.argv[0]).absolute()
    if "RANK" in os.environ:
        fail("--submit under torchrun: start it with python, a job's tasks are its ranks")
    if asked.gpus and asked.tasks:
        fail("--tasks is for nodes without GPUs: with --gpus, each GPU has a rank")
    root, points = sweep_points(asked.sweep or [], argv, get_args)
    if asked.sweep and (root / "args.json").exists():
        fail(f"--out {root} holds a run: give the sweep another")
    for out in (root / name for name in points):
        if (state := state_of(out)[0]) in ("waiting", "running"):
            fail(f"{out} is {state} already: choose another --out, or end that job")
    import submitit

    nodes, minutes = asked.nodes or 1, asked.minutes or 60
    if slurm:
        check_slurm(asked.partition, nodes)
    gpus = min(1, torch.cuda.device_count()) if asked.gpus is None and not slurm else asked.gpus or 0
    tasks = gpus or asked.tasks or 1
    share = asked.cpus or (1 if slurm else max(1, os.cpu_count() // tasks))
    options = (option.partition("=") for option in asked.slurm or ())
    options = {key.replace("-", "_"): value or True for key, _, value in options}
    folder = root.absolute() / "submit"
    made = next((path for path in [*reversed(folder.parents), folder] if not path.exists()), None)
    lives = {f"{asked.submit}_max_num_timeout": 1000}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in (script, Path(__file__)):  # the run is that of the code as it is now
            shutil.copy(source, folder)
        executor = submitit.AutoExecutor(folder, cluster=asked.submit, **lives)
        executor.update_parameters(
            name=root.name, nodes=nodes, gpus_per_node=gpus or None, tasks_per_node=tasks,
            cpus_per_task=share, timeout_min=minutes if slurm else 10**6,
            slurm_signal_delay_s=min(300, 6 * minutes), slurm_srun_args=["--kill-on-bad-exit=1"],
            stderr_to_stdout=True, slurm_partition=asked.partition,
            slurm_setup=["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"], slurm_teardown=[REQUEUE],
            slurm_additional_parameters={"requeue": True, **options},
        )  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()), in_background(), executor.batch():
            jobs = []
            for name, flags in points.items():
                command = [str(folder / script.name), *argv, *flags, "--out", str((root / name).absolute())]
                jobs.append(executor.submit(job_of([str(folder), str(script.parent)], command, share)))
        for name, job in zip(points, jobs, strict=True):
            (root / name).mkdir(exist_ok=True)
            record = dict(cluster=asked.submit, job=job.job_id, log=str(job.paths.stdout))
            (root / name / "job.json").write_text(json.dumps(record))
            print(f"job {job.job_id}: {root / name}, log {job.paths.stdout}")
    except (OSError, submitit.core.utils.FailedJobError) as error:
        if made:
            shutil.rmtree(made, ignore_errors=True)
        said = re.search("sbatch: .*", str(error)) or re.search(".*", str(error))
        fail(f"--submit {asked.submit}: {said[0]}")
    print(f"follow: tail -f {job.paths.stdout}\n        python common.py {root}")


# -------------------------------------------------------------------------------------------- table


@lru_cache
def queue() -> dict[str, str] | None:
    """SLURM's word for each of my jobs that is not over, by number; None where SLURM does not answer."""
    text = ask("squeue", "-h", "-r", "--me", "-o", "%i %T")
    return None if text is None else dict(line.split() for line in text.splitlines())


def text_of(path: Path | str) -> str:
    """Of a file; empty where there is none."""
    return Path(path).read_text(errors="replace") if os.path.isfile(path) else ""


def json_of(text: str) -> dict:
    """The object that a text or a line holds; empty for half of one."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def newest(out: Path) -> dict:
    """Each value that the run logged, as it was last."""
    lines = text_of(out / "log.jsonl").splitlines()
    return {key: value for line in lines for key, value in json_of(line).items()}


def locked(out: Path) -> bool:
    """Whether a run holds the directory; asked without taking the lock, which a run could miss then."""
    try:
        with open(out / ".lock", "r+") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0))
    except OSError:
        return False
    return struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK


def state_of(out: Path) -> tuple[str, str]:
    """waiting, running, done, failed with the job's last sentence, or stopped where it had no job."""
    job, last = json_of(text_of(out / "job.json")), newest(out)
    word = (queue() or {}).get(job["job"], "") if job.get("cluster") == "slurm" else ""
    if word.startswith(("PENDING", "CONFIGURING", "REQUEUE")):
        return "waiting", ""
    process = Path("/proc", job.get("job", "none"), "cmdline")  # a local job's number is its process's
    if word or locked(out) or (job.get("cluster") == "local" and "submitit" in text_of(process)):
        return "running", ""
    text = text_of(job.get("log", ""))
    if (out / "results.jsonl").exists() or ("steps" in last and last["step"] == last["steps"]):
        return "done", ""
    if "Job completed successfully" in text:  # submitit's word, for scripts that log no steps
        return "done", ""
    if not job:
        return "stopped", ""
    if job["cluster"] == "slurm" and queue() is None:
        return "unknown", "SLURM does not answer here"
    noise = re.compile(r"\s*$|srun: |submitit |slurmstepd\S*: error: \*\*\* STEP")  # follows from the error
    lines = [line for line in re.split(r"[\r\n]+", text) if not noise.match(line)]
    errors = [line for line in lines if re.search("error|cancelled|: saved", line, re.I)]
    return "failed", re.sub(r"^\S+: error: ", "", (errors or lines or ["no log"])[-1])


def table(runs: list[str], by: str) -> None:
    """Prints a line for each run below `runs`: what differs, state, step, loss, kNN and linear accuracy.

    Evaluations inside a run have no line of their own: their best linear accuracy is the run's.
    """
    found = {
        path.parent for top in runs for kind in ("args", "job") for path in Path(top).rglob(f"{kind}.json")
    }
    args, values, rows = {}, {}, []
    for out in sorted(out for out in found if out.parent not in found):
        swept = (item.split("=") for item in out.name.split(",") if item.count("=") == 1)
        args[out] = {name.replace("-", "_"): value for name, value in swept}  # of a run that never began
        args[out].update(json_of(text_of(out / "args.json")))
        for key, value in args[out].items():
            values.setdefault(key, set()).add(str(value))
    differ = [key for key, seen in values.items() if len(seen) > 1 and key not in Run.FREE]
    for out, one in args.items():
        last, (state, words) = newest(out), state_of(out)
        results = [*out.glob("results.jsonl"), *out.glob("*/results.jsonl")]
        results = [json_of(line) for path in results for line in text_of(path).splitlines()]
        linear = [r["top1"] for r in results if r.get("mode") in ("linear", "cached") and "top1" in r]  # in %
        row = dict(run=out, **{key: one.get(key, "") for key in differ}, state=state)
        row["step"] = f"{last['step']}/{last['steps']}" if "steps" in last else ""
        row["loss"] = f"{last['loss']:.4f}" if "loss" in last else ""
        row["knn"] = f"{100 * last['knn']:.1f}" if "knn" in last else ""
        row["linear"] = f"{max(linear):.1f}" if linear else ""
        rows.append({key: str(value) for key, value in dict(row, words=words).items()})
    if not rows:
        fail(f"no runs below {', '.join(runs)}")
    if by not in rows[0]:
        fail(f"--by {by}: choose from {', '.join(rows[0])}")

    def place(row):  # accuracies from the best down, all else up, what is missing last
        text, sign = row[by], -1 if by in ("knn", "linear") else 1
        try:
            return text == "", 0, sign * float(text.partition("/")[0])
        except ValueError:
            return text == "", 1, text

    head = {key: key.replace("words", "") for key in rows[0]}
    width = {key: max(len(row[key]) for row in (head, *rows)) for key in head}
    for row in (head, *sorted(rows, key=place)):
        print("  ".join(text.ljust(width[key]) for key, text in row.items() if width[key]).rstrip())


if __name__ == "__main__":
    parser = Parser(description="A table of runs: what differs, state, step, loss, kNN and linear accuracy")
    parser.add_argument("runs", nargs="+", help="run directories, or folders with some below")
    parser.add_argument("--by", default="run", help="the column to sort by")
    table(**vars(parser.parse_args()))
