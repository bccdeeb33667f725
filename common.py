"""What no method varies: arguments, random numbers, views, data, networks, ranks, optimisers, the run directory.

A method file uses `Run` (set-up, batches, logging, checkpoints), `resnet`, `prepare` and `parallel` (networks on their
device and over ranks), `all_reduce` and `all_gather` (statistics of the global batch), and `optimizer_for`.

Every random choice is a pure function of (seed, epoch, image, view, choice), see `uniform`: there is no generator state
to save, the number of workers does not matter, and one global batch gets the same views on 1, 2 or 8 ranks.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
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


def number(kind: type, low: float, high: float = 1e9):
    """An argparse type: a `kind` (int or float) in [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is no {kind.__name__}") from None
        if not low <= value <= high:  # a NaN fails both
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return parse


def parser_for(doc: str) -> Parser:
    """The flags every method has. Those without a default here take it from the recipe."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # fmt: off
    add = parser.add_argument_group("data and run").add_argument
    add("--data", help="folder with train/ and val/ (or test/) of class folders; folder of unlabelled images, any depth; "
                       "cifar10, cifar100 or stl10, with :/where/it/lies (default ./data); left out: built-in drawings")
    add("--out", help="run directory; the same command again resumes (default: runs/SCRIPT-RECIPE)")
    add("--recipe", help="published or tuned settings, any flag overrides one (default: imagenet for a folder, the data "
                         "set's own by name, demo without --data)")
    add("--epochs", type=number(int, 1), help="passes over the data")
    add("--batch-size", type=number(int, 2), help="N, images a step over all ranks")
    add("--seed", type=number(int, 0, 2**62), default=0, help="of initialisation, order and views")
    add("--workers", type=number(int, 0, 1024), default=min(16, os.cpu_count() or 1), help="decoding processes a rank")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N or cpu")
    add("--precision", choices=["bf16", "fp32", "fp64"], help="of the networks; losses are in float32 or better "
                                                              "(default: bf16 where the hardware has it, else fp32)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--micro-batch", type=number(int, 0), default=0, help="rows encoded at a time; the loss stays that of the whole "
        "batch, BN statistics are per micro-batch (0: all; halved by itself where one GPU's memory is short)")
    add("--save-minutes", type=number(float, 1e-3), default=15.0, help="between checkpoints, besides one an epoch")
    add("--log-every", type=number(int, 1), default=50, help="steps")
    add("--knn-every", type=number(int, 0), default=1, help="epochs between kNN evaluations (0: first and last)")
    add = parser.add_argument_group("views").add_argument
    add("--views", choices=list(VIEWS), help="augmentation recipe")
    add("--size", type=number(int, 8, 1024), help="side of the two global views, pixels")
    add("--local-crops", type=number(int, 0, 64), default=0, help="more, small views (96 pixels at size 224)")
    add = parser.add_argument_group("network and optimiser").add_argument
    add("--arch", help="a ResNet of torchvision.models, e.g. resnet18, resnet50, wide_resnet50_2")
    add("--stem", choices=["imagenet", "cifar"], help="cifar: first convolution 3x3, stride 1, no max-pooling")
    add("--optimizer", choices=["lars", "sgd", "adamw"])
    add("--lr", type=number(float, 0, 1e6), help="peak learning rate for 256 images, times batch-size / 256")
    add("--wd", type=number(float, 0, 1e3), help="weight decay, not of biases and norms")
    add("--warmup", type=number(float, 0), help="epochs of linear warm-up; then cosine to 0")
    # fmt: on
    return parser


def parse(parser: Parser, recipes: dict, argv: list[str] | None) -> argparse.Namespace:
    """The flags, over the recipe's values, over the parser's defaults."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--data")
    given, _ = first.parse_known_args(argv)
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
    """bf16 where it is fast: on GPUs that have it and CPUs with AVX-512. Elsewhere it is emulated, 10 to 50 times slower."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "fp32"


# ----------------------------------------------------------------------------------- random numbers

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants, as signed 64-bit integers
MIX = (30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1)


def _wrap(x):
    """To 64 signed bits: what int64 tensors do by themselves."""
    return x if isinstance(x, Tensor) else (x + (1 << 63)) % (1 << 64) - (1 << 63)


def hash64(*parts):
    """63 random bits for ints or int64 tensors that broadcast: splitmix64's finaliser folded over the parts."""
    x = 0
    for part in parts:
        x = _wrap(x + _wrap((part + 1) * GOLDEN))
        for shift, factor in MIX:
            x = _wrap((x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor)
    return x & ((1 << 63) - 1)


def uniform(seed, epoch, index, k):
    """The k-th uniform number in [0, 1) of image `index` in `epoch`: ints give a float, int64 tensors float64."""
    bits = hash64(seed, epoch, index, k) >> 10
    return (bits.double() if isinstance(bits, Tensor) else bits) * 2.0**-53


# -------------------------------------------------------------------------------------------- views


class View(NamedTuple):
    """Distribution of one view: crop area, jitter strengths (brightness, contrast, saturation, hue), probabilities."""

    scale: tuple[float, float]
    jitter: tuple[float, float, float, float]
    jitter_p: float = 0.8
    blur: float = 0.0
    solarise: float = 0.0
    gray: float = 0.2
    flip: float = 0.5
    size: int = 0  # set from --size


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
LOCAL_SCALE, GLOBAL_SCALE = (
    (0.05, 0.14),
    0.14,
)  # with local crops (SwAV): theirs, and the least of the global views
SIGMA, BLUR_RADIUS = (0.1, 2.0), 8  # pixels; 4 of the largest sigma: a true Gaussian at every image size
THRESHOLD = 128 / 255  # of solarisation
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Which uniform decides what; view v adds 64 v. The order of an epoch's images is choice -1.
CROP, FACTORS = slice(0, 40), slice(42, 46)
FLIP, JITTER, ORDER, GRAY, BLUR, BLUR_SIGMA, SOLARISE = 40, 41, 46, 47, 48, 49, 50
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = torch.tensor(list(itertools.permutations(range(4))))


def views_for(args: argparse.Namespace) -> list[View]:
    """The two global views and then the local ones, which blur half of the time and do not solarise."""
    views = [view._replace(size=args.size) for view in VIEWS[args.views]]
    if args.local_crops:
        blur = 0.5 if any(view.blur for view in views) else 0.0
        small = views[0]._replace(
            scale=LOCAL_SCALE, blur=blur, solarise=0.0, size=max(8, round(args.size * 96 / 224))
        )
        views = [view._replace(scale=(max(view.scale[0], GLOBAL_SCALE), view.scale[1])) for view in views]
        views += [small] * args.local_crops
    return views


def draw(seed: int, epoch: int, index: Tensor, v: int) -> Tensor:
    """All uniforms of view v of images index (n,): (n, 51)."""
    return uniform(seed, epoch, index[:, None], torch.arange(SOLARISE + 1) + 64 * v)


def crop_boxes(u: Tensor, height: Tensor, width: Tensor, scale: tuple[float, float]) -> Tensor:
    """torchvision's RandomResizedCrop: (top, left, height, width), (n, 4), for images (height, width), (n,) each.

    u (n, 40 or more): ten tries of (area, aspect ratio, top, left); the first that fits, or else the largest centred
    box with a ratio in [3/4, 4/3].
    """
    area, ratio, y, x = u[:, CROP].reshape(-1, 10, 4).unbind(2)
    H, W = height[:, None].double(), width[:, None].double()
    area = H * W * (scale[0] + area * (scale[1] - scale[0]))
    ratio = torch.exp(math.log(3 / 4) + ratio * math.log(16 / 9))
    last_h, last_w = (torch.minimum(a, (b * 4 / 3).round()) for a, b in ((H, W), (W, H)))
    h = torch.cat([(area / ratio).sqrt().round(), last_h], 1)
    w = torch.cat([(area * ratio).sqrt().round(), last_w], 1)
    first = ((h > 0) & (h <= H) & (w > 0) & (w <= W)).int().argmax(1, keepdim=True)
    centre = torch.full_like(H, 0.5 - 1e-9)  # so that the floor below is (H - h) // 2
    h, w, y, x = (t.gather(1, first) for t in (h, w, torch.cat([y, centre], 1), torch.cat([x, centre], 1)))
    return torch.cat([((H - h + 1) * y).floor(), ((W - w + 1) * x).floor(), h, w], 1).long()


def centre_boxes(height: Tensor, width: Tensor, size: int) -> Tensor:
    """Evaluation: the centred square of 224/256 of the shorter side, or all of it where it is no larger than `size`."""
    side = torch.minimum(height, width)
    side = torch.where(side <= size, side, (side * 224 / 256).round().long())
    return torch.stack([(height - side) // 2, (width - side) // 2, side, side], 1)


def resize_matrix(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Bicubic resize with antialiasing of pixels [start, start + length) to `size`, one axis: (n, size, source)."""
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / size
    pixel = torch.arange(source, device=start.device)
    centre = start + scale * (torch.arange(size, device=start.device).view(1, size, 1) + 0.5)
    t = ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()
    cubic = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2)
    weight = cubic * ((t < 2) & (pixel >= start) & (pixel < start + length))
    return weight / weight.sum(2, keepdim=True)


def crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop and resize of uint8 images (n, 3, H, W) on any device, as two matrix products: (n, 3, size, size) in [0, 1]."""
    top, left, h, w = boxes.to(images.device, non_blocking=True).unbind(1)
    rows, columns = (
        resize_matrix(top, h, images.shape[2], size),
        resize_matrix(left, w, images.shape[3], size),
    )
    return (rows[:, None] @ (images.float() / 255) @ columns[:, None].mT).clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Hue plus `shift` (n,) turns, at constant HSV saturation and value."""
    r, g, b = x.unbind(1)
    value, brightest = x.max(1)
    chroma = value - x.amin(1)
    d = chroma.clamp(min=1e-12)
    sector = torch.where(
        brightest == 0, (g - b) / d, torch.where(brightest == 1, (b - r) / d + 2, (r - g) / d + 4)
    )
    offset = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = ((sector + 6 * shift.view(-1, 1, 1))[:, None] + offset) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


@lru_cache(maxsize=8)
def _blur_basis(size: int, device: torch.device) -> Tensor:
    """(2 R + 1, size * size): for each offset, the matrix that shifts pixels by it, reflecting at the border."""
    source = torch.arange(size)[None] + torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)[:, None]
    source = source.abs() % max(2 * size - 2, 1)
    return F.one_hot(torch.minimum(source, 2 * size - 2 - source), size).float().flatten(1).to(device)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur of (n, 3, S, S), each image with its own sigma (n,) in pixels, as two matrix products."""
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device)
    weight = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, 1)  # (n, 2 R + 1)
    matrix = (weight @ _blur_basis(x.shape[-1], x.device)).view(-1, 1, x.shape[-1], x.shape[-1])
    return matrix @ x @ matrix.mT


def photometric(u: Tensor, view: View) -> dict[str, Tensor]:
    """The drawn parameters of everything after the crop, each (n,) or (n, 4), on the CPU; jitter in order of use."""
    strength = torch.tensor(view.jitter, dtype=torch.double)
    identity = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.double)
    low = torch.where(identity > 0, (1 - strength).clamp(min=0), -strength)
    factor = low + u[:, FACTORS] * (identity + strength - low)
    factor = torch.where(u[:, JITTER, None] < view.jitter_p, factor, identity)
    order = ORDERS[(u[:, ORDER] * len(ORDERS)).long()]
    return {
        "flip": u[:, FLIP] < view.flip,
        "order": order,
        "factor": factor.gather(1, order).float(),
        "gray": u[:, GRAY] < view.gray,
        "blur": u[:, BLUR] < view.blur,
        "sigma": (SIGMA[0] + u[:, BLUR_SIGMA] * (SIGMA[1] - SIGMA[0])).float(),
        "solarise": u[:, SOLARISE] < view.solarise,
    }


def jitter(x: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in each image's own order; parameters (n, 4) on the CPU.

    The first three are one formula, clamp(f x + (1 - f) other), with other = 0, the mean of gray, or gray.
    """

    def column(t: Tensor) -> Tensor:
        return t.to(x.device, non_blocking=True).view(-1, 1, 1, 1)

    for kind, f in zip(order.unbind(1), factor.unbind(1), strict=True):
        gray = luma(x)
        other = gray * column((kind == SATURATION) * (1 - f))
        other += gray.mean((1, 2, 3), keepdim=True) * column((kind == CONTRAST) * (1 - f))
        x = torch.addcmul(other, x, column(torch.where(kind == HUE, 1.0, f))).clamp_(0, 1)
        rows = ((kind == HUE) & (f != 0)).nonzero()[
            :, 0
        ]  # known on the CPU: the device need not be waited for
        if len(rows):
            at = rows.to(x.device, non_blocking=True)
            x[at] = shift_hue(x[at], f[rows].to(x.device, non_blocking=True))
    return x


def augment(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Everything after the crop, for (n, 3, S, S) in [0, 1]: flip, jitter, gray, blur, solarise. Still in [0, 1]."""

    def column(t: Tensor) -> Tensor:
        return t.to(x.device, non_blocking=True).view(-1, 1, 1, 1)

    x = torch.where(column(p["flip"]), x.flip(3), x)
    x = jitter(x, p["order"], p["factor"])
    x = torch.where(column(p["gray"]), luma(x), x)
    rows = p["blur"].nonzero()[:, 0]
    if len(rows):
        at = rows.to(x.device, non_blocking=True)
        x[at] = gaussian_blur(x[at], p["sigma"][rows].to(x.device, non_blocking=True))
    if p["solarise"].any():
        x = torch.where(column(p["solarise"]) & (x >= THRESHOLD), 1 - x, x)
    return x


def normalise(x: Tensor) -> Tensor:
    """By ImageNet's channel means and deviations, channels last in memory."""
    mean, std = (torch.tensor(c, device=x.device).view(1, 3, 1, 1) for c in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def make_view(cut, u: Tensor, view: View, device: torch.device) -> Tensor:
    """One view of n images, normalised: cut(rows) gives crops in [0, 1], u (n, 51) the uniforms.

    In chunks: on a CPU those that stay in cache, on a GPU those that bound the memory of intermediate results.
    """
    size, n = view.size, len(u)
    out = torch.empty(n, 3, size, size, device=device, memory_format=torch.channels_last)
    p = photometric(u, view)
    chunk = max(1, (2**18 if device.type == "cpu" else 2**26) // (3 * size * size))
    for rows in (slice(i, i + chunk) for i in range(0, n, chunk)):
        out[rows] = normalise(augment(cut(rows), {name: t[rows] for name, t in p.items()}))
    return out


# --------------------------------------------------------------------------------------------- data

NAMED_DATA = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100,
              "stl10": torchvision.datasets.STL10}  # fmt: skip
SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".ppm", b".tif", b".tiff")
MEMORY_SIDE, MEMORY_BYTES = (
    128,
    4 << 30,
)  # images up to this side, and this many bytes in all, are kept decoded
MAX_UNREADABLE = 0.01


class Pixels(NamedTuple):
    """Images held in memory: images (n, 3, H, W) uint8 on any device, labels (n,) int64 on the CPU, -1 for none."""

    images: Tensor
    labels: Tensor


class Files(NamedTuple):
    """Image files: paths as one uint8 tensor and their ends (n,), so that workers share them; labels (n,), -1 for none."""

    paths: Tensor
    ends: Tensor
    labels: Tensor

    def path(self, i: int) -> str:
        start = int(self.ends[i - 1]) if i else 0
        return os.fsdecode(self.paths[start : int(self.ends[i])].numpy().tobytes())

    def read(self, i: int) -> Tensor:
        """(3, H, W) uint8, RGB. Raises an exception of any kind where the file is no image."""
        with open(self.path(i), "rb") as file:
            data = file.read()
        try:
            image = torchvision.io.decode_image(
                torch.frombuffer(bytearray(data), dtype=torch.uint8), torchvision.io.ImageReadMode.RGB
            )
        except (RuntimeError, ValueError):  # kinds that torchvision leaves to Pillow
            with Image.open(self.path(i)) as picture:
                image = torchvision.transforms.functional.pil_to_tensor(picture.convert("RGB"))
        if image.ndim == 4:  # an animation: its first frame
            image = image[0]
        return (image.int() >> 8).byte() if image.dtype == torch.uint16 else image


class Data(NamedTuple):
    """What a run trains and is watched on. `test` is None without labels; `classes` are their names."""

    train: Pixels | Files
    test: Pixels | Files | None
    classes: list[str]


def _walk(folder: str) -> list[bytes]:
    """Every image file at any depth, sorted; links are followed, each folder once. Hidden files are not images."""
    found, stack, seen = [], [os.fsencode(folder)], set()
    while stack:
        folder = stack.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.name.lower().endswith(SUFFIXES):
                    found.append(entry.path)
                elif os.path.isdir(entry.path):  # False for a loop of links
                    stack.append(entry.path)
    return sorted(found)


def _list_split(folder: Path, classes: list[str] | None) -> Files:
    """Files of one split; with classes, labels by the folder right below, which must be one of them."""
    paths = _walk(str(folder))
    if not paths:
        fail(f"no images below {folder}: known are {', '.join(s.decode() for s in SUFFIXES)}")
    labels = [-1] * len(paths)
    if classes:
        number_of = {os.fsencode(name): i for i, name in enumerate(classes)}
        prefix = len(os.fsencode(str(folder))) + 1
        names = [path[prefix:].partition(b"/")[0] for path in paths]
        unknown = sorted({os.fsdecode(name) for name in names if name not in number_of})
        if unknown:
            fail(
                f"{folder} has {len(unknown)} entries that are no class folder of train/: {', '.join(unknown[:3])}"
            )
        labels = [number_of[name] for name in names]
    ends = torch.tensor([len(path) for path in paths]).cumsum(0)
    return Files(torch.frombuffer(bytearray(b"".join(paths)), dtype=torch.uint8), ends, torch.tensor(labels))


def list_folder(root: Path, cache: Path) -> Data:
    """`--data` as a folder. The listing is kept in the run directory: the order of images is part of a run."""
    if not root.is_dir():
        names = ", ".join(NAMED_DATA)
        fail(
            f"--data {root}: there is no such folder, nor a data set of that name ({names}, each with :/where/it/lies)"
        )
    if cache.is_file():
        saved = torch.load(cache, weights_only=True)
        return Data(
            Files(*saved["train"]), Files(*saved["test"]) if saved["test"] else None, saved["classes"]
        )
    train = root / "train" if (root / "train").is_dir() else root
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    folders = sorted(
        entry.name for entry in os.scandir(train) if entry.is_dir() and not entry.name.startswith(".")
    )
    if train == root or test is None or not folders:
        return Data(_list_split(train, None), None, [])
    return Data(_list_split(train, folders), _list_split(test, folders), folders)


def to_memory(files: Files) -> Pixels | Files:
    """Decodes small images of one size, all of them; leaves others as files."""

    def read(i: int) -> Tensor | None:
        try:
            return files.read(i)
        except Exception:  # whatever a decoder says of a damaged file
            return None

    n = len(files.labels)
    first = next((image for image in map(read, range(n)) if image is not None), None)
    if first is None:
        fail(f"none of the {n} images can be read, the first is {files.path(0)}")
    if max(first.shape) > MEMORY_SIDE or n * first.numel() > MEMORY_BYTES:
        return files
    images, bad = torch.empty(n, *first.shape, dtype=torch.uint8), []
    with ThreadPoolExecutor() as pool:
        for i, image in enumerate(pool.map(read, range(n), chunksize=64)):
            if image is None:
                bad.append(i)
            elif image.shape != first.shape:
                return files
            else:
                images[i] = image
    if bad:
        report_unreadable(files, bad, n)
        keep = torch.ones(n, dtype=torch.bool)
        keep[bad] = False
        return Pixels(images[keep], files.labels[keep])
    return Pixels(images, files.labels)


def report_unreadable(files: Files, bad: list[int], seen: int) -> None:
    """Names unreadable images; above 1 % of those seen the run stops."""
    if rank() == 0:
        for i in bad[:10]:
            tqdm.write(f"unreadable, skipped: {files.path(i)!r}", file=sys.stderr)
    if len(bad) > MAX_UNREADABLE * seen:
        fail(
            f"{len(bad)} of {seen} images seen cannot be read, more than 1 %, one is {files.path(bad[-1])!r}"
        )


def named_data(name: str, root: str) -> Data:
    """A torchvision data set by name, downloaded where it is missing."""
    kind, splits = NAMED_DATA[name], {"train": {"train": True}, "test": {"train": False}}
    if name == "stl10":
        splits = {"train": {"split": "train+unlabeled"}, "test": {"split": "test"}}
    try:
        if rank() == 0:
            for split in splits.values():
                kind(root, download=True, **split)
        barrier()
        train, test = (kind(root, **split) for split in splits.values())
    except (OSError, RuntimeError) as error:
        fail(
            f"{name} is not in {root} and cannot be downloaded ({error}): give its folder as --data {name}:/where/it/lies"
        )

    def pixels(data) -> Pixels:
        images = torch.as_tensor(data.data)
        labels = torch.as_tensor(data.labels if name == "stl10" else data.targets).long()
        return Pixels(images if name == "stl10" else images.permute(0, 3, 1, 2).contiguous(), labels)

    return Data(pixels(train), pixels(test), list(train.classes))


GLYPHS = {  # signed distances from the outline, in glyph radii, at (a, b) from the centre
    "disc": lambda a, b: a.hypot(b) - 0.95,
    "ring": lambda a, b: (a.hypot(b) - 0.75).abs() - 0.22,
    "square": lambda a, b: torch.maximum(a.abs(), b.abs()) - 0.85,
    "frame": lambda a, b: (torch.maximum(a.abs(), b.abs()) - 0.65).abs() - 0.2,
    "triangle": lambda a, b: torch.maximum(-b, 0.87 * a.abs() + 0.5 * b) - 0.5,
    "plus": lambda a, b: torch.maximum(
        torch.minimum(a.abs(), b.abs()) - 0.25, torch.maximum(a.abs(), b.abs()) - 1
    ),
    "ell": lambda a, b: torch.maximum(torch.maximum(a.abs(), b.abs()) - 0.9, torch.minimum(a, b) + 0.3),
    "bar": lambda a, b: torch.maximum(a.abs() - 1.1, b.abs() - 0.3),
    "crescent": lambda a, b: torch.maximum(a.hypot(b) - 1, 0.8 - (a - 0.5).hypot(b)),
    "star": lambda a, b: a.hypot(b) - 0.65 - 0.35 * (5 * torch.atan2(b, a)).cos(),
}


def draw_glyphs(n: int, split: int) -> Pixels:
    """The built-in set: n images of 32 pixels with six glyphs each, of one kind (the label), their places, sizes, turns
    and colours at random: two crops of an image share the kind of glyph more surely than any colour."""
    index, axis = torch.arange(n), (torch.arange(32) + 0.5) / 16 - 1
    labels = (uniform(0, split, index, -3) * len(GLYPHS)).long()
    y, x = axis[:, None], axis[None, :]
    u = uniform(0, split, index[:, None], torch.arange(69)).float().view(n, 69, 1, 1)
    images = (u[:, 60:63] + (u[:, 63:66] - 0.5) * x + (u[:, 66:69] - 0.5) * y).clamp(
        0, 1
    )  # a gradient of colour
    for kind, distance in enumerate(GLYPHS.values()):
        rows = labels == kind
        mine, v = images[rows], u[rows]
        for g in range(6):
            cy, cx, size, turn = v[:, 10 * g : 10 * g + 4].unbind(1)
            cy, cx = (g // 2 - 1) * 0.64 + (cy - 0.5) * 0.3, (g % 2 - 0.5) * 0.96 + (cx - 0.5) * 0.4
            radius, sin, cos = 0.26 + 0.12 * size, (2 * math.pi * turn).sin(), (2 * math.pi * turn).cos()
            a, b = ((x - cx) * cos + (y - cy) * sin) / radius, ((y - cy) * cos - (x - cx) * sin) / radius
            mask = (0.5 - distance(a, b) * radius * 16).clamp(0, 1)[:, None]  # an edge one pixel wide
            mine += mask * (v[:, 10 * g + 4 : 10 * g + 7] - mine)
        images[rows] = mine
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(split))
    return Pixels(((images + 0.08 * (noise - 0.5)).clamp(0, 1) * 255).round().byte(), labels)


def open_data(args: argparse.Namespace, out: Path) -> Data:
    """`--data` as it is: built in, by name, or a folder; small images in memory, on the device."""
    name, _, root = (args.data or "").partition(":")
    if not args.data:
        data = Data(draw_glyphs(10_000, 0), draw_glyphs(2_000, 1), list(GLYPHS))
    elif name in NAMED_DATA:
        data = named_data(name, root or "data")
    else:
        data = list_folder(Path(args.data).resolve(), out / "files.pt")
        if rank() == 0 and not data.classes:
            print(
                "no train/ and val/ (or test/) of class folders: no linear probe and no kNN", file=sys.stderr
            )
    if len(data.train.labels) < args.batch_size:
        fail(
            f"--batch-size {args.batch_size} is more than the {len(data.train.labels)} training images of {args.data}"
        )
    return data


def load_small(data: Data, device: torch.device) -> Data:
    splits = [to_memory(split) if isinstance(split, Files) else split for split in data[:2]]
    splits = [
        Pixels(split.images.to(device), split.labels) if isinstance(split, Pixels) else split
        for split in splits
    ]
    return Data(*splits, data.classes)


class Batches:
    """(epoch, index (n,)) of every step from `start`: rank r has rows r n .. (r + 1) n - 1 of the global batch."""

    def __init__(self, images: int, batch: int, seed: int, start: int, stop: int):
        self.images, self.batch, self.seed, self.start, self.stop = images, batch, seed, start, stop

    def __iter__(self):
        epoch, rows = -1, self.batch // world()
        for step in range(self.start, self.stop):
            if epoch != (epoch := step // (self.images // self.batch)):
                order = uniform(self.seed, epoch, torch.arange(self.images), -1).argsort()
            first = step % (self.images // self.batch) * self.batch + rank() * rows
            yield epoch, order[first : first + rows]

    def __len__(self) -> int:
        return self.stop - self.start


class Crops(torch.utils.data.Dataset):
    """A worker's part of the pipeline: each file is read and decoded once, and cut to uint8 crops.

    boxes(epoch, rows, height, width) gives a list, one (n, 4) a view; sizes are the views' sides. An unreadable image is
    replaced by the next one.
    """

    def __init__(self, files: Files, sizes: list[int], boxes):
        self.files, self.sizes, self.boxes = files, sizes, boxes

    def __getitems__(self, batch: tuple[int, Tensor]):
        epoch, index = batch
        crops = [torch.empty(len(index), 3, size, size, dtype=torch.uint8) for size in self.sizes]
        labels, bad = torch.empty_like(index), []
        for start in range(0, len(index), 16):
            images = []
            for row, i in enumerate(index[start : start + 16].tolist(), start):
                image = None
                while image is None:
                    try:
                        image = self.files.read(i)
                    except Exception:  # whatever a decoder says of a damaged file
                        bad.append(i)
                        if len(bad) > len(index):
                            return epoch, index, crops, labels, bad
                        i = (i + 1) % len(self.files.labels)
                images.append(image)
                labels[row] = self.files.labels[i]
            height, width = torch.tensor([image.shape[1:] for image in images]).unbind(1)
            views = self.boxes(epoch, index[start : start + 16], height, width)
            for out, size, boxes in zip(crops, self.sizes, views, strict=True):
                for row, (image, (t, l, h, w)) in enumerate(zip(images, boxes.tolist(), strict=True), start):
                    part = image[None, :, t : t + h, l : l + w]
                    out[row] = F.interpolate(part, (size, size), mode="bicubic", antialias=True)[0]
        return epoch, index, crops, labels, bad


def _first(batch):
    return batch


def _quiet_worker(_: int) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is the main process's to handle: it ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _file_loader(crops: Crops, batches, workers: int, device: torch.device):
    return torch.utils.data.DataLoader(
        crops, batch_sampler=batches, collate_fn=_first, num_workers=workers, worker_init_fn=_quiet_worker,
        pin_memory=device.type == "cuda", prefetch_factor=2 if workers else None,
    )  # fmt: skip


class _RandomBoxes(NamedTuple):
    seed: int
    views: list[View]

    def __call__(self, epoch: int, index: Tensor, height: Tensor, width: Tensor) -> list[Tensor]:
        return [crop_boxes(draw(self.seed, epoch, index, v), height, width, view.scale)
                for v, view in enumerate(self.views)]  # fmt: skip


class _CentreBoxes(NamedTuple):
    size: int

    def __call__(self, epoch: int, index: Tensor, height: Tensor, width: Tensor) -> list[Tensor]:
        return [centre_boxes(height, width, self.size)]


def view_batches(
    split: Pixels | Files, args: argparse.Namespace, device: torch.device, start: int, stop: int
):
    """Yields ([x1, x2, local crops...], y) for steps start .. stop - 1: views (n, 3, S, S) on device, y (n,) or -1."""
    views, boxes = views_for(args), _RandomBoxes(args.seed, views_for(args))
    batches = Batches(len(split.labels), args.batch_size, args.seed, start, stop)
    if isinstance(split, Pixels):
        H, W = (torch.full((args.batch_size // world(),), side) for side in split.images.shape[2:])
        source = (
            (epoch, index, boxes(epoch, index, H, W), split.labels[index], []) for epoch, index in batches
        )
    else:
        source = _file_loader(
            Crops(split, [view.size for view in views], boxes), batches, args.workers, device
        )
    unreadable, seen = set(), 0
    for epoch, index, cuts, labels, bad in source:
        seen += len(index)
        if new := sorted(set(bad) - unreadable):
            unreadable.update(new)
            report_unreadable(
                split, new, max(seen, math.ceil(100 * len(new)) if len(unreadable) < 3 else seen)
            )
        xs = []
        for v, view in enumerate(views):
            if isinstance(split, Pixels):
                images = split.images[index.to(split.images.device, non_blocking=True)]
                cut = lambda rows, v=v, view=view, images=images: crop(images[rows], cuts[v][rows], view.size)  # noqa: E731
            else:
                uint8 = cuts[v].to(device, non_blocking=True)
                cut = lambda rows, uint8=uint8: uint8[rows].float() / 255  # noqa: E731
            xs.append(make_view(cut, draw(args.seed, epoch, index, v), view, device))
        yield xs, labels.to(device, non_blocking=True)


def centre_batches(split: Pixels | Files, index: Tensor, args: argparse.Namespace, device: torch.device):
    """Yields (x (n, 3, size, size), y (n,)) on device, centre crops of images `index`, 256 at a time, in order."""
    chunks = list(index.split(256))
    if isinstance(split, Files):
        loader = _file_loader(Crops(split, [args.size], _CentreBoxes(args.size)), [(0, c) for c in chunks],
                              args.workers, device)  # fmt: skip
        for _, _, (crops,), labels, _ in loader:
            yield normalise(crops.to(device, non_blocking=True).float() / 255), labels.to(device)
        return
    for chunk in chunks:
        images = split.images[chunk.to(split.images.device)]
        H, W = (torch.full((len(chunk),), side) for side in images.shape[2:])
        yield (
            normalise(crop(images, centre_boxes(H, W, args.size), args.size)),
            split.labels[chunk].to(device),
        )


# ----------------------------------------------------------------------------------------- networks


def resnet(arch: str, stem: str | None = "imagenet", zero_init: bool = False) -> tuple[nn.Module, int]:
    """torchvision's ResNet without its classifier, and the number of its features."""
    builder = getattr(torchvision.models, arch, None) if "resne" in arch else None
    if not callable(builder):
        fail(
            f"--arch {arch}: not a ResNet of torchvision.models, such as resnet18, resnet50 or wide_resnet50_2"
        )
    net = builder(zero_init_residual=zero_init)
    features, net.fc = net.fc.in_features, nn.Identity()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net, features


def per_view(net: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    """`net` of each view: the two global views a forward each (BN statistics are per view), local crops in one."""
    outs = [net(x) for x in xs[:2]]
    return outs + list(net(torch.cat(xs[2:])).chunk(len(xs) - 2)) if len(xs) > 2 else outs


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """nn.SyncBatchNorm for CPU tensors, which torch's refuses: statistics of all ranks, in float32 or better."""

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
        y = y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y
        return y.to(x.dtype)


def prepare(net: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """To the device and precision, channels last, BN synchronised over ranks."""
    net = net.to(
        device, torch.float64 if args.precision == "fp64" else None, memory_format=torch.channels_last
    )
    if world() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules() if world() > 1 else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = SyncBatchNorm  # same parameters and buffers, another forward
    return net


def parallel(net: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """What is called in training: `net` compiled with --compile, under DDP where there are ranks."""
    if args.compile:
        net.compile()
    if world() == 1:
        return net
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        net, ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )


@torch.no_grad()
def ema_update(average: nn.Module, net: nn.Module, momentum: float) -> None:
    """average <- momentum average + (1 - momentum) net, for parameters and BN statistics; counters are copied."""
    for mine, other in ((average.parameters(), net.parameters()), (average.buffers(), net.buffers())):
        pairs = list(zip(mine, other, strict=True))
        floats = [(a, b) for a, b in pairs if a.is_floating_point()]
        if floats:
            torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - momentum)
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)


# -------------------------------------------------------------------------------------------- ranks


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class _AllReduce(torch.autograd.Function):
    """Sum over ranks. Backward of what follows identically on all ranks: times W. Otherwise: the sum over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, identical: bool) -> Tensor:
        ctx.identical, x = identical, x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.identical:
            return grad * dist.get_world_size(), None
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad, None


def all_reduce(x: Tensor) -> Tensor:
    """The sum over ranks of a statistic from which every rank computes the same loss.

    Backward needs no communication: the gradient times W, since DDP divides by W. Without ranks: x itself.
    """
    return _AllReduce.apply(x, True) if dist.is_initialized() else x


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """(W n, ...) rows of all ranks in rank order, without gradient, for x (n, ...) with the same n everywhere."""
    if not dist.is_initialized():
        return x.detach()
    out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


def start_ranks(args: argparse.Namespace) -> torch.device:
    """The device of this rank, its process group joined under torchrun; errors of use first."""
    try:
        device = torch.device(args.device)
    except RuntimeError:
        fail(f"--device {args.device}: no such device, give cuda, cuda:N or cpu")
    if device.type not in ("cpu", "cuda"):
        fail(f"--device {args.device}: give cuda, cuda:N or cpu")
    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.index is None else device.index + 1
    if device.type == "cuda" and torch.cuda.device_count() < count:
        fail(
            f"--device {args.device}: {count} CUDA devices needed, {torch.cuda.device_count()} here; try --device cpu"
        )
    if args.precision == "fp64" and device.type == "cuda":
        fail("--precision fp64 is for exactness tests on the CPU: add --device cpu")
    if args.batch_size % world():
        fail(f"--batch-size {args.batch_size} is not divisible by the {world()} ranks")
    if args.batch_size // world() < 2:
        fail(
            f"--batch-size {args.batch_size} on {world()} ranks: batch normalisation needs 2 images or more a rank"
        )
    if device.type == "cuda":
        device = torch.device(
            "cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        )
        torch.cuda.set_device(device)
    if world() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


# ------------------------------------------------------------------------------------- optimisation


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled, layer by layer, to trust * |weights| / |gradient| (You et al. 2017).

    Groups with adapt=False (biases, norms) are left unscaled. No value leaves the device.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, trust: float = 1e-3):
        super().__init__(params, dict(lr=lr, momentum=momentum, trust=trust, weight_decay=0.0, adapt=True))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if not params:
                continue
            if group["adapt"]:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
                p_norm, g_norm = (
                    torch.stack(torch._foreach_norm(params)),
                    torch.stack(torch._foreach_norm(grads)),
                )
                ratio = torch.where((p_norm > 0) & (g_norm > 0), group["trust"] * p_norm / g_norm, 1.0)
                torch._foreach_mul_(grads, list(ratio.unbind()))
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            velocity = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, grads)
            torch._foreach_add_(params, velocity, alpha=-group["lr"])


def optimizer_for(net: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """--optimizer over all parameters; biases and norms without weight decay and without LARS's scaling."""
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=args.wd),
              dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0)]  # fmt: skip
    if args.optimizer == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, args.lr)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, args.lr, momentum=0.9, foreach=True)
    return torch.optim.AdamW(groups, args.lr, fused=True)


def warmup_cosine(step: int, warmup: float, total: int) -> float:
    """Linear from 0 to 1 over `warmup` steps, then a half cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# ------------------------------------------------------------------------------------------ monitor


@torch.no_grad()
def features(
    backbone: nn.Module, split: Pixels | Files, index: Tensor, args: argparse.Namespace, device: torch.device
):
    """Features (m, D), L2-normalised float32, and labels (m,) of images `index` of a split, from all ranks, on device."""
    pad = -len(index) % world()
    mine = torch.cat([index, index[:1].expand(pad)])[rank() :: world()]
    backbone.eval()
    found = []
    for x, y in centre_batches(split, mine, args, device):
        with autocast(args, device):
            h = backbone(x.double() if args.precision == "fp64" else x)
        found.append((F.normalize(h.float(), dim=1), y))
    backbone.train()
    h, y = (torch.cat(t) for t in zip(*found, strict=True))
    h, y = (
        all_gather(t).view(world(), len(mine), -1).transpose(0, 1).flatten(0, 1)[: len(index)] for t in (h, y)
    )
    return h, y[:, 0]


def knn_accuracy(
    bank: Tensor, bank_y: Tensor, h: Tensor, y: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of queries h (m, D) whose cosine-weighted vote of k neighbours in bank (n, D) is right (Wu et al. 2018)."""
    right, classes = 0, int(max(bank_y.max(), y.max())) + 1
    for rows in torch.arange(len(h)).split(1024):
        similarity, at = (h[rows] @ bank.mT).topk(min(k, len(bank)))
        votes = torch.zeros(len(rows), classes, device=h.device)
        votes.scatter_add_(1, bank_y[at], (similarity / temperature).exp())
        right += int((votes.argmax(1) == y[rows]).sum())
    return right / len(h)


@torch.no_grad()
def spectrum(z: Tensor) -> Tensor:
    """Singular values of the L2-normalised, uncentred rows of z (n, d), normalised to sum 1."""
    s = torch.linalg.svdvals(F.normalize(z.double(), dim=1))
    return s / s.sum().clamp(min=1e-30)


def effective_rank(z: Tensor) -> float:
    """RankMe: the exponential of the entropy of `spectrum`: 1 where all rows of z (n, d) are one point, at most d."""
    s = spectrum(z)
    return float(torch.exp(-torch.special.xlogy(s, s).sum()))


class Probe(nn.Module):
    """Online linear classifier on detached features, standardised by a BN without parameters; SGD with momentum."""

    def __init__(self, features: int, classes: int, args: argparse.Namespace, device: torch.device):
        super().__init__()
        net = nn.Sequential(nn.BatchNorm1d(features, affine=False), nn.Linear(features, classes))
        self.net = prepare(net, args, device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)

    def step(self, h: Tensor, y: Tensor) -> None:
        """One step on features h (n, D) of images with labels y (n,), -1 for none."""
        known = all_reduce((y >= 0).sum())
        logits = self.net(h.detach().to(self.net[1].weight.dtype))
        loss = F.cross_entropy(logits, y, ignore_index=-1, reduction="sum") / known.clamp(min=1)
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.parameters():
            p.grad = all_reduce(p.grad)
        self.optimizer.step()

    @torch.no_grad()
    def accuracy(self, h: Tensor, y: Tensor) -> float:
        self.net.eval()
        right = (self.net(h.to(self.net[1].weight.dtype)).argmax(1) == y).float().mean()
        self.net.train()
        return float(right)


# ---------------------------------------------------------------------------------------------- run


def autocast(args: argparse.Namespace, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


class Run:
    """One training run: checks of what the user asked, the directory, batches, log, checkpoints, bar and signals.

        run = Run(args, __file__)                     # every error of use is raised here, before anything is written
        run.begin(evaluate=backbone, model=..., optimizer=...)              # makes or resumes the directory
        for step, xs, y in run.steps():               # views on the device, in (seed, step)'s order
            loss, terms, h, z = run.backward(model, xs, loss_of)
            run.log(loss, terms, lr, h, z, y)

    Between steps it evaluates at the end of epochs, saves, and leaves when a signal asked for it.
    """

    FREE = {"out", "workers", "device", "save_minutes", "log_every"}  # arguments that may change on resume

    def __init__(self, args: argparse.Namespace, script: str):
        self.args, self.script, self.out = args, Path(script), Path(args.out)
        self.device = start_ranks(args)
        self._check_directory()
        self.data = open_data(args, self.out)
        self.epoch_steps = len(self.data.train.labels) // args.batch_size
        self.step, self.total, self.stop, self.micro = 0, args.epochs * self.epoch_steps, 0, args.micro_batch
        torch.manual_seed(args.seed)

    def _check_directory(self) -> None:
        """Refuses a directory that another command made, or that cannot be written."""
        try:
            saved = json.loads((self.out / "args.json").read_text())
        except FileNotFoundError:
            if self.out.is_dir() and any(self.out.iterdir()):
                fail(f"--out {self.out} is neither empty nor a run directory: choose another")
        except (OSError, ValueError) as error:
            fail(f"--out {self.out}: its args.json cannot be read ({error}): choose another")
        else:
            now = {key: value for key, value in vars(self.args).items() if key not in self.FREE}
            changed = [f"{key} {saved.get(key)} -> {now.get(key)}" for key in sorted(now.keys() | saved.keys() - self.FREE)
                       if saved.get(key) != json.loads(json.dumps(now.get(key)))]  # fmt: skip
            if changed:
                fail(
                    f"--out {self.out} holds a run with other arguments ({'; '.join(changed)}): choose another --out"
                )
        parent = next(folder for folder in (self.out, *self.out.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            fail(f"--out {self.out}: {parent} is not a folder that can be written")

    def begin(self, evaluate: nn.Module, width: int, **state) -> None:
        """Makes the directory or resumes from it. `evaluate`: the backbone (`width` features) that is watched and
        exported; state: whatever has a state_dict and belongs in the checkpoint."""
        self.data = load_small(self.data, self.device)
        self.backbone, self.state = evaluate, state
        self.probe = Probe(width, len(self.data.classes), self.args, self.device) if self.data.test else None
        if self.probe:
            state.update(probe=self.probe, probe_optimizer=self.probe.optimizer)
        self.records, self.pending, self.knn = [], None, []
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if rank() == 0:
                self._lock()
            self._resume()
            if rank() == 0:
                self._write("args.json", json.dumps(vars(self.args), indent=1).encode())
                for source in {self.script.resolve(), Path(__file__).resolve()}:
                    shutil.copy(source, self.out / source.name)
                if isinstance(self.data.train, Files) and not (self.out / "files.pt").exists():
                    test = tuple(self.data.test) if isinstance(self.data.test, Files) else None
                    self._save_torch(
                        "files.pt", dict(train=tuple(self.data.train), test=test, classes=self.data.classes)
                    )
        except OSError as error:
            fail(f"--out {self.out} cannot be written: {error.strerror or error}")
        self.votes = (
            dist.new_group(backend="gloo") if world() > 1 else None
        )  # signals: agreed without the GPU
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(name, self._on_signal)

    def _lock(self) -> None:
        self.lock = open(self.out / ".lock", "w")  # noqa: SIM115 - held until this process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--out {self.out} is in use by another process: choose another --out or end that one")

    def _on_signal(self, number: int, _) -> None:
        self.stop = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait for the step

    # Files are written beside, synced and renamed, so that a file with its final name is whole.

    def _write(self, name: str, data: bytes) -> None:
        with open(self.out / (name + ".tmp"), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.out / (name + ".tmp"), self.out / name)

    def _save_torch(self, name: str, value) -> None:
        temporary = self.out / (name + ".tmp")
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.out / name)

    def save(self) -> None:
        """checkpoint.pt, with the one before kept, and backbone.pth under torchvision's names."""
        self._check_pending()
        self.saved_at = time.monotonic()
        if rank() > 0:
            return
        try:
            if (self.out / "checkpoint.pt").exists():
                os.replace(self.out / "checkpoint.pt", self.out / "checkpoint-previous.pt")
            state = {name: value.state_dict() for name, value in self.state.items()}
            self._save_torch("checkpoint.pt", dict(step=self.step, world=world(), knn=self.knn, **state))
            self._save_torch("backbone.pth", self.backbone.state_dict())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            fail(
                f"cannot write the checkpoint of step {self.step} in {self.out} ({error}); the one before is kept"
            )

    def _resume(self) -> None:
        """Loads the newest whole checkpoint: `torch.load` does not notice flipped bytes, the archive's CRCs do."""
        damaged = []
        for path in (self.out / "checkpoint.pt", self.out / "checkpoint-previous.pt"):
            if not path.exists():
                continue
            try:
                with zipfile.ZipFile(path) as archive:
                    if bad := archive.testzip():
                        raise ValueError(f"checksum of {bad}")
                saved = torch.load(path, map_location=self.device, weights_only=True)
                break
            except Exception as error:  # noqa: BLE001 - damage has many names
                damaged.append(f"{path.name} is damaged ({error})")
        else:
            if damaged:
                fail(f"--out {self.out}: {'; '.join(damaged)}; nothing to resume from, choose another --out")
            return
        for name, value in self.state.items():
            value.load_state_dict(saved[name])
        self.step, self.knn = saved["step"], [tuple(pair) for pair in saved["knn"]]
        if rank() == 0:
            for sentence in damaged:
                print(f"{sentence}: going on from the one before", file=sys.stderr)
            ranks = "" if saved["world"] == world() else f", saved on {saved['world']} ranks, now {world()}"
            print(f"{self.out}: resuming at step {self.step} of {self.total}{ranks}", file=sys.stderr)
            lines = (
                (self.out / "log.jsonl").read_text().splitlines() if (self.out / "log.jsonl").exists() else []
            )
            kept = [line for line in lines if _step_of(line) <= self.step]
            self._write("log.jsonl", "".join(line + "\n" for line in kept).encode())

    def steps(self):
        """Yields (step, [views], labels) from where the run stands to its end; evaluates and saves between."""
        from torch.utils.tensorboard import SummaryWriter

        self.bar = tqdm(total=self.total, initial=self.step, unit="step", disable=rank() > 0, dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
        self.board = SummaryWriter(str(self.out), purge_step=self.step) if rank() == 0 else None
        self.started, self.saved_at = time.monotonic(), time.monotonic()
        self.clock, self.clock_step, self.seen = time.monotonic(), self.step, self.step
        if self.step == 0:
            self.evaluate()
        batches = view_batches(self.data.train, self.args, self.device, self.step, self.total)
        for xs, y in batches:
            if self.args.precision == "fp64":
                xs = [x.double() for x in xs]
            if self.step == 0 and self.board:
                shown = [F.interpolate(x[:8].float().cpu(), self.args.size) for x in xs]
                self.board.add_image("views", _grid(torch.cat(shown)), 0)
            yield self.step, xs, y
            self.step += 1
            self.bar.update()
            last = self.step == self.total
            if self.step % self.epoch_steps == 0:
                every, epoch = self.args.knn_every, self.step // self.epoch_steps
                if last or (every and epoch % every == 0):
                    self.evaluate()
                self.save()
            elif time.monotonic() - self.saved_at > 60 * self.args.save_minutes:
                self.save()
            self._leave_if_asked()
        self.bar.close()
        self._summary()

    def _leave_if_asked(self) -> None:
        """All ranks agree on the step; the state is saved and the program ends."""
        asked = torch.tensor(self.stop)
        if self.votes:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.votes)
        if not asked or self.step == self.total:
            return
        self.save()
        barrier()
        if rank() == 0:
            self.bar.close()
            print(f"{signal.Signals(int(asked)).name}: saved at step {self.step} of {self.total} in {self.out}; "
                  "the same command resumes", file=sys.stderr)  # fmt: skip
        raise SystemExit(130 if asked == signal.SIGINT else 0)

    def backward(self, model: nn.Module, xs: list[Tensor], loss_of) -> tuple:
        """Gradients of loss_of(zs) -> (loss, terms) with h, zs = model(xs): lists of views, (v, n, ...) stacks.

        With --micro-batch the stacks are computed without graph, then dL/dzs on the whole batch, then micro-batches
        again with graph: the loss is that of the whole batch. Returns loss, terms, h (n, D) of view 1, zs.
        """
        n = len(xs[0])
        while True:
            parts = math.ceil(n / self.micro) if self.micro else 1
            buffers = [buffer.clone() for buffer in model.buffers()]
            model.zero_grad(set_to_none=True)
            try:
                return self._backward(
                    model, list(zip(*(x.tensor_split(parts) for x in xs), strict=True)), loss_of, buffers
                )
            except torch.OutOfMemoryError as error:
                size = math.ceil(n / parts)
                if world() > 1 or size < 4:
                    fail(f"out of memory at {size} rows a forward on rank {rank()}: give --micro-batch {max(2, size // 2)} "
                         f"({error})")  # fmt: skip
                self.micro = size // 2
            self._restore(model, buffers)
            tqdm.write(
                f"out of memory at {size} rows a forward: going on with micro-batches of {self.micro}",
                file=sys.stderr,
            )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @staticmethod
    def _restore(model: nn.Module, buffers: list[Tensor]) -> None:
        for buffer, old in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(old)

    def _backward(self, model, chunks, loss_of, buffers) -> tuple:
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
            self._restore(model, buffers)  # the running statistics of BN see each row once
        zs = torch.cat(zs, 1).requires_grad_()
        loss, terms = loss_of(zs)
        loss.backward()
        for i, (chunk, grad) in enumerate(zip(chunks, zs.grad.tensor_split(len(chunks), 1), strict=True)):
            last = i == len(chunks) - 1 or not hasattr(model, "no_sync")
            with contextlib.nullcontext() if last else model.no_sync():
                encode(chunk)[1].backward(grad)
        return loss.detach(), terms, torch.cat([h[0] for h in hs]), zs.detach()

    def log(self, loss: Tensor, terms: dict[str, Tensor], lr: float, h: Tensor, z: Tensor, y: Tensor) -> None:
        """After the optimiser's step: the online probe, the check for non-finite values, a record every --log-every.

        h (n, D) features and z (n, d) embeddings of view 1, y (n,) labels.
        """
        if self.probe:
            self.probe.step(F.normalize(h.float(), dim=1), y)
        self._check_pending()
        values = torch.stack([loss.double(), *(term.double() for term in terms.values())])
        self.pending = self.step, list(terms), values.to("cpu", non_blocking=True), None
        if values.is_cuda:  # looked at a step later, so that the device is never waited for
            self.pending = (*self.pending[:3], torch.cuda.Event())
            self.pending[3].record()
        else:
            self._check_pending()
        done = self.step + 1
        if done % self.args.log_every and done != self.total and done != 1:
            return
        self._check_pending()
        now, images = time.monotonic(), self.args.batch_size * (done - self.clock_step)
        speed, self.clock, self.clock_step = images / (now - self.clock), now, done
        z_rank, h_rank = effective_rank(z), effective_rank(h)
        record = dict(step=done, epoch=round(done / self.epoch_steps, 3), loss=float(loss), lr=lr, images_per_second=speed,
                      **{name: float(term) for name, term in terms.items()}, rank_z=z_rank, rank_h=h_rank,
                      std_z=float(F.normalize(z.float(), dim=1).std(0).mean()), std_h=float(h.float().std(0).mean()))  # fmt: skip
        self.record(record)
        if self.board:
            self.board.add_histogram("spectrum/z (log10)", spectrum(z).clamp(min=1e-12).log10(), done)
        if z_rank < 4 <= z.shape[1] / 8 and done >= min(100, self.total // 4):
            tqdm.write(f"step {done}: the embeddings are collapsing, effective rank of z {z_rank:.1f} of {z.shape[1]}",
                       file=sys.stderr)  # fmt: skip
        self.bar.set_postfix_str(f"epoch {record['epoch']:.2f} loss {record['loss']:.4f} {speed:.0f} images/s"
                                 + (f" kNN {100 * self.knn[-1][1]:.1f} %" if self.knn else ""), refresh=False)  # fmt: skip

    def _check_pending(self) -> None:
        """A loss that is not finite ends the run, before anything is saved."""
        if self.pending is None:
            return
        step, names, values, event = self.pending
        if event:
            event.synchronize()
        self.pending = None
        if not values.isfinite().all():
            shown = ", ".join(
                f"{name} {value:g}" for name, value in zip(["loss", *names], values.tolist(), strict=True)
            )
            fail(f"step {step}: the loss is not finite ({shown}); the last checkpoint in {self.out} is kept")

    def record(self, record: dict) -> None:
        """One line of log.jsonl, and its numbers on TensorBoard."""
        if rank() > 0:
            return
        try:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            fail(f"cannot write the log of {self.out} ({error.strerror}); the last checkpoint is kept")
        for name, value in record.items():
            if name not in ("step", "epoch"):
                self.board.add_scalar(name, value, record["step"])

    def evaluate(self) -> None:
        """kNN and online-probe accuracy on the test images (at most 10,000), with a bank of at most 25,000."""
        if not self.data.test:
            return
        begun = time.monotonic()
        (bank, bank_y), (h, y) = (
            features(self.backbone, split, _spread(len(split.labels), most), self.args, self.device)
            for split, most in ((self.data.train, 25_000), (self.data.test, 10_000))
        )
        known = bank_y >= 0
        accuracy = knn_accuracy(bank[known], bank_y[known], h, y)
        self.knn.append((self.step, accuracy))
        self.record(dict(step=self.step, epoch=round(self.step / self.epoch_steps, 3), knn=accuracy,
                         probe=self.probe.accuracy(h, y), test_rank_h=effective_rank(h[:2048]), seconds=time.monotonic() - begun))  # fmt: skip
        self.clock += time.monotonic() - begun  # not training time

    def _summary(self) -> None:
        if rank() > 0:
            return
        lines = [
            f"{self.script.name}: {self.total} steps done, {self.args.epochs} epochs of {len(self.data.train.labels)} images"
        ]
        if self.knn:
            lines.append(
                f"kNN accuracy {100 * self.knn[0][1]:.1f} % at initialisation, {100 * self.knn[-1][1]:.1f} % now"
            )
        lines += [f"in {self.out}: backbone.pth (torchvision's names), checkpoint.pt, log.jsonl, args.json",
                  f"next: tensorboard --logdir {self.out}",
                  f"      python {self.script.name} --data /path/to/images   (train/ and val/ of class folders, or any images)"]  # fmt: skip
        print("\n".join(lines))


def _spread(n: int, most: int) -> Tensor:
    """min(n, most) image numbers, evenly spread."""
    return torch.arange(min(n, most)) * n // min(n, most)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # the torn last line of a killed run
        return math.inf


def _grid(x: Tensor) -> Tensor:
    """Normalised views as one image in [0, 1], eight a row."""
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (MEAN, STD))
    return torchvision.utils.make_grid((x * std + mean).clamp(0, 1), nrow=8)
