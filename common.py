"""What the four methods share: arguments, random numbers, views, data, networks, ranks, optimisers, monitors,
run directories and launching.

Functions and small classes with one job each; main() of a method shows the order in which they are used.
Every random choice about an image is a pure function of (seed, epoch, image, choice), see `uniform`; only the
order of the jitter operations depends on (seed, step, view). So there is no generator state to save, the
number of workers does not matter, and a global batch gets the same views on 1, 2 or 8 ranks.
"""

import argparse
import collections
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
import warnings
import zipfile
import zlib
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import cloudpickle
import numpy
import submitit
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.functional import InterpolationMode, center_crop, resize
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------- arguments


def fail(message):
    """Exit with code 2 and one sentence on stderr, for mistakes that the user can correct."""
    if rank() > 0:
        time.sleep(3)  # if every rank fails, rank 0 reports it first, and the launcher ends the others
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and which refuses empty values, as of unset shell variables."""

    def __init__(self, **options):
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=110)
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message):
        fail(message)

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if value == "":
                fail(f"--{name} is empty: give a value or leave it out")
        return args


def number(kind, low, high=1e9):
    """An argparse type: a number of type `kind` in [low, high]."""

    def numeric(text):  # argparse prints this name: "invalid numeric value"
        value = kind(text)
        if not low <= value <= high:  # true of NaN, too
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return numeric


# fmt: off
def add_run_flags(add):
    """Add the flags that pretraining and evaluation share; `add` is add_argument of a group."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", os.cpu_count() // ranks_here))
    add("--seed", type=number(int, 0, 2**62), default=0, help="random seed")
    add("--workers", type=number(int, 0, 1024), default=min(16, cores), help="decoding processes per rank")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="local rank r uses GPU r of its machine, or of CUDA_VISIBLE_DEVICES")
    add("--precision", choices=["bf16", "fp32"], help="of the networks (default: bf16 on GPUs that "
        "support it, else fp32)")
    add("--save-minutes", type=number(float, 0), default=15.0, help="minutes between checkpoints")
    add("--log-every", type=number(int, 1), default=50, help="steps between log records")


def parser_for(doc, lr="for 256 images (multiplied by batch-size / 256)", last_lr="as a fraction of --lr"):
    """A parser with the flags of every method; those without a default here get it from the recipe.

    lr, last_lr: what --help says of --lr and --last-lr.
    """
    parser = Parser(description=doc, usage="%(prog)s [flags]")
    add = parser.add_argument_group("data and run").add_argument
    add("--data", help="folder with train/ and val/ (or test/) of class folders; any folder of images; a zip "
        "of either; or cifar10, cifar100, stl10, each with :/path/to/it (default ./data); left out: built-in "
        "patterns")
    add("--subset", type=number(int, 0), default=0, help="train on the first N images of each class (0: all)")
    add("--out", help="run directory; the same command resumes the run (default: runs/SCRIPT-RECIPE)")
    add("--recipe", help="published or tuned settings, which flags override (default: imagenet for a "
        "folder, the name of a named data set, demo without --data)")
    add("--init", metavar="FILE", help="a backbone to start from: any checkpoint with this ResNet")
    add("--epochs", type=number(int, 1), help="passes over the data")
    add("--batch-size", type=number(int, 2), help="N, images per step over all ranks")
    add_run_flags(add)
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile networks and "
        "augmentations; one rank only")
    add("--micro-batch", type=number(int, 0), default=0, help="rows per backbone pass, to save memory; the "
        "loss is still that of the whole batch, but BN statistics are per micro-batch (0: all rows)")
    add("--knn-every", type=number(int, 0), default=1, help="epochs between kNN evaluations (0: first, last)")
    add("--keep-every", type=number(int, 0), default=0, help="epochs between backbone-EPOCH.pth (0: none)")
    add = parser.add_argument_group("views").add_argument
    add("--views", choices=list(VIEWS), help="augmentation recipe")
    add("--size", type=number(int, 12, 1024), help="side of the two global views in pixels")
    add("--local-crops", type=number(int, 0, 64), default=0, help="small extra views, side 96/224 --size")
    add = parser.add_argument_group("network and optimiser").add_argument
    add("--arch", help="a ResNet of torchvision.models, e.g. resnet18, resnet50, wide_resnet50_2")
    add("--stem", choices=["imagenet", "cifar"], help="cifar: first convolution 3x3, stride 1, no pooling")
    add("--zero-init", action=argparse.BooleanOptionalAction, help="initial gain 0 in each block's last BN")
    add("--optimizer", choices=["lars", "sgd", "adamw"])
    add("--lr", type=number(float, 0, 1e6), help=f"peak learning rate, {lr}")
    add("--last-lr", type=number(float, 0, 1e6), help=f"learning rate at the end, {last_lr}")
    add("--wd", type=number(float, 0, 1e3), help="weight decay; biases and norms decay only with sgd")
    add("--warmup", type=number(float, 0), help="epochs of linear warm-up, before the cosine decay")
    return parser
# fmt: on


def parse(parser, recipes, argv):
    """Parse flags, which override the recipe, which overrides the parser's defaults."""
    given, _ = parser.parse_known_args(argv)
    default = "demo"
    if given.data:
        name = given.data.partition(":")[0]
        default = name if name in NAMED else "imagenet"
    recipe = given.recipe or default
    if recipe not in recipes:
        fail(f"there is no recipe '{recipe}': choose one with --recipe from {', '.join(recipes)}")
    parser.set_defaults(**recipes[recipe], recipe=recipe, out=f"runs/{Path(sys.argv[0]).stem}-{recipe}")
    args = parser.parse_args(argv)
    if args.compile and args.micro_batch:
        fail(f"--micro-batch {args.micro_batch} does not work with --compile: leave one of them out")
    return args


# ----------------------------------------------------------------------------------------- random numbers

# The constants of splitmix64, as signed 64-bit integers.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX2 = 0x94D049BB133111EB - (1 << 64)


def hash64(*parts):
    """Hash ints or int64 tensors, which broadcast, to 63 random bits (int64), by splitmix64."""
    x = torch.tensor(0)
    for part in parts:
        x = x + (torch.as_tensor(part) + 1) * GOLDEN
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX1
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX2
        x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return x & 0x7FFFFFFFFFFFFFFF


def uniform(*parts):
    """Uniform in [0, 1), float64, from the parts alone: (seed, epoch, image index, choice) for images."""
    return (hash64(*parts) >> 10).double() * 2.0**-53


# -------------------------------------------------------------------------------------------------- views


class View(typing.NamedTuple):
    """How a view of an image is made. A view without `area` is a centre crop, for evaluation."""

    area: tuple = None  # smallest and largest area of a random crop, as fractions of the image
    jitter: tuple = None  # strengths of brightness, contrast, saturation, hue
    jitter_p: float = 0.8  # its probability, as of the next four
    blur_p: float = 0
    solarise_p: float = 0
    gray_p: float = 0.2
    flip_p: float = 0.5
    size: int = 0  # side of the view in pixels
    resize: int = 0  # shorter side to which an image is resized before a centre crop


BYOL = View((0.08, 1), (0.4, 0.4, 0.2, 0.1))
SIMCLR = View((0.08, 1), (0.8, 0.8, 0.8, 0.2), blur_p=0.5)
AUH = View((0.08, 1), (0.4, 0.4, 0.4, 0.4), jitter_p=1)
CIFAR = View((0.2, 1), (0.4, 0.4, 0.4, 0.1))
VIEWS = {  # the two global views; VICReg's are byol
    "byol": [BYOL._replace(blur_p=1), BYOL._replace(blur_p=0.1, solarise_p=0.2)],
    "simclr": [SIMCLR, SIMCLR],
    "auh": [AUH, AUH],
    "cifar": [CIFAR, CIFAR],
}
ORDERS = list(itertools.permutations(["brightness", "contrast", "saturation", "hue"]))
BLUR_RADIUS = 8  # pixels, four times the largest sigma, at every image size


def views_of(args):
    """The two global views, then the local ones, with SwAV's areas and the first view's colours."""
    area = (0.14, 1) if args.local_crops else VIEWS[args.views][0].area
    views = [view._replace(size=args.size, area=area) for view in VIEWS[args.views]]
    side = max(BLUR_RADIUS + 1, round(args.size * 96 / 224))
    local = views[0]._replace(size=side, area=(0.05, 0.14), blur_p=min(0.5, views[0].blur_p))
    return views + [local] * args.local_crops


def draw(seed, epoch, index, views):
    """The uniforms (n, views, 64) that decide how each view of the images index (n,) is made.

    The first 40 are ten attempts at a crop. Then come flip, jitter and its four changes, an unused one, gray,
    blur, its sigma, and solarisation. Negative choices have other uses: -1 orders the images of an epoch.
    """
    return uniform(seed, epoch, index[:, None], torch.arange(64 * views)).unflatten(1, (views, 64))


def crop_boxes(u, height, width, area):
    """Crop boxes (n, 4) as torchvision's RandomResizedCrop draws them, from uniforms u (n, 64) on the CPU.

    A box is (top, left, height, width): the first of ten attempts that fits into the image, or else the
    largest centred one with a ratio in [3/4, 4/3]. area: least and largest share of the image, one for all or
    (n, 2). For the two boxes that a worker needs at once, NumPy takes a third of torch's time.
    """
    tries = u[:, :40].numpy().reshape(-1, 10, 4)
    smallest, largest = numpy.asarray(area).reshape(-1, 2, 1).swapaxes(0, 1)
    pixels = height * width * (smallest + tries[:, :, 0] * (largest - smallest))
    ratio = 3 / 4 * (16 / 9) ** tries[:, :, 1]
    h = numpy.sqrt(pixels / ratio).round()
    w = numpy.sqrt(pixels * ratio).round()
    top = numpy.floor((height - h + 1) * tries[:, :, 2])
    left = numpy.floor((width - w + 1) * tries[:, :, 3])
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    boxes = numpy.stack([top, left, h, w], 2)[range(len(u)), fits.argmax(1)]

    h = min(height, round(width * 4 / 3))
    w = min(width, round(height * 4 / 3))
    boxes[~fits.any(1)] = (height - h) // 2, (width - w) // 2, h, w
    return torch.from_numpy(boxes)


def resize_matrix(start, length, source, size):
    """Matrix (..., size, source) that resizes pixels [start, start + length), bicubic with antialiasing."""
    length = length[..., None, None]
    scale = length / size
    pixel = torch.arange(source, device=start.device) + 0.5 - start[..., None, None]
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    t = ((pixel - centre) / scale.clamp(min=1)).abs().clamp(max=2)  # beyond 2 the kernel is 0
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    inside = (pixel > 0) & (pixel < length)
    weight = torch.where(t < 1, near, far) * inside
    return weight / weight.sum(-1, keepdim=True)


def crop(images, boxes, size):
    """Cut float boxes (n, 4) out of uint8 images (n, 3, H, W) and resize: (n, 3, size, size) in [0, 1]."""
    height, width = images.shape[2:]
    starts, lengths = boxes.view(-1, 2, 1, 2).unbind(1)  # of rows and of columns
    rows, columns = resize_matrix(starts, lengths, max(height, width), size).unbind(2)  # (n, 1, size, ...)
    return (rows[..., :height] @ (images.float() / 255) @ columns[..., :width].mT).clamp_(0, 1)


def centre(images, view):
    """Resize the shorter side of uint8 (n, 3, H, W) and crop the centre: (n, 3, size, size) in [0, 1]."""
    resized = resize(images.float() / 255, view.resize, InterpolationMode.BICUBIC)
    return center_crop(resized, view.size).clamp_(0, 1)


@lru_cache
def constant(values, device):
    """Three numbers on the device, (1, 3, 1, 1); cached, since creating them would wait for the GPU."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def gray(x, luminance):
    """Luminance of (n, 3, S, S): (n, 1, S, S)."""
    return (x * luminance).sum(1, keepdim=True)


def change_brightness(x, change):
    """Multiply brightness by 1 + change (n, 1, 1, 1)."""
    return (x * (1 + change)).clamp_(0, 1)


def change_contrast(x, change, luminance):
    """Multiply the distance to the mean luminance by 1 + change (n, 1, 1, 1)."""
    mean = gray(x, luminance).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, 1 + change).clamp_(0, 1)


def change_saturation(x, change, luminance):
    """Multiply the distance to the gray image by 1 + change (n, 1, 1, 1)."""
    return torch.lerp(gray(x, luminance), x, 1 + change).clamp_(0, 1)


def change_hue(x, change):
    """Rotate the hue by `change` (n, 1, 1, 1) turns, at constant HSV saturation and value."""
    value, brightest = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    difference = (x.roll(-1, 1) - x.roll(-2, 1)).gather(1, brightest)
    sector = 2 * brightest + difference / chroma.clamp(min=1e-12) + 6 * change
    k = (sector + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    return (value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)).clamp_(0, 1)


def flip(x, u, p):
    """Mirror the images whose uniform is below p."""
    return torch.where(u < p, x.flip(3), x)


def drop_colour(x, u, p, luminance):
    """Remove the colour of the images whose uniform is below p."""
    return torch.where(u < p, gray(x, luminance), x)


def solarise(x, u, p):
    """Invert the bright pixels of the images whose uniform is below p."""
    return torch.where((u < p) & (x >= 128 / 255), 1 - x, x)


def standardise(x, mean, deviation):
    """Standardise each channel by its mean and standard deviation; the result is channels last in memory."""
    return ((x - mean) / deviation).contiguous(memory_format=torch.channels_last)


def blur(x, sigma):
    """Gaussian blur of (n, 3, S, S), each image with its own sigma (n,) in pixels, as two matrix products."""
    size = x.shape[-1]
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device)
    weight = torch.softmax(-0.5 * (offset / sigma[:, None]) ** 2, 1)  # (n, 2 R + 1)
    border = F.pad(torch.eye(size, device=x.device)[None], (BLUR_RADIUS, BLUR_RADIUS), mode="reflect")
    matrix = torch.einsum("no,sop->nps", weight, border[0].unfold(1, size, 1))[:, None]
    return matrix @ x @ matrix.mT


def eager(function):
    """Return the function as it is, the alternative to `compiled`."""
    return function


@lru_cache
def compiled(function):
    """Compile a function with torch.compile, anew for each shape of its tensors.

    Augmentations are compiled one by one: a single function would be compiled again for each order of the
    jitter. Constants are arguments, since those created inside would be copied to the GPU in each call.
    """
    return torch.compile(function, dynamic=False)


def augment(x, u, view, order, run=eager):
    """Flip, jitter, gray, blur and solarise x (n, 3, S, S) in [0, 1], by uniforms u (n, 64) on the CPU.

    run: eager or compiled; the blur is always eager, since the number of blurred images varies.
    """
    u = u[:, 40:51].float()
    u[:, 2:6] = (2 * u[:, 2:6] - 1) * torch.tensor(view.jitter) * (u[:, 1:2] < view.jitter_p)
    blurred = (u[:, 8] < view.blur_p).nonzero()[:, 0].to(x.device, non_blocking=True)
    columns = u.to(x.device, non_blocking=True)[:, :, None, None, None].unbind(1)
    mirrored, _, brightness, contrast, saturation, hue, _, to_gray, _, sigma, inverted = columns
    luminance = constant((0.2989, 0.587, 0.114), x.device)

    x = run(flip)(x, mirrored, view.flip_p)
    for operation in order if view.jitter_p else ():
        if operation == "brightness":
            x = run(change_brightness)(x, brightness)
        elif operation == "contrast":
            x = run(change_contrast)(x, contrast, luminance)
        elif operation == "saturation":
            x = run(change_saturation)(x, saturation, luminance)
        else:
            x = run(change_hue)(x, hue)
    x = run(drop_colour)(x, to_gray, view.gray_p, luminance)
    if len(blurred):
        x[blurred] = blur(x[blurred], 0.1 + 1.9 * sigma[blurred].flatten())
    if view.solarise_p:
        x = run(solarise)(x, inverted, view.solarise_p)
    return x


def normalise(x, run=eager):
    """Standardise by the channel means and standard deviations of ImageNet."""
    mean = constant((0.485, 0.456, 0.406), x.device)
    deviation = constant((0.229, 0.224, 0.225), x.device)
    return run(standardise)(x, mean, deviation)


# --------------------------------------------------------------------------------------------------- data

NAMED = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "stl10": torchvision.datasets.STL10,
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
TAR_TO_ZIP = (
    "python -c \"import sys, tarfile, zipfile, pathlib; z = zipfile.ZipFile('images.zip', 'w'); "
    "[z.writestr(s + m.name.removeprefix('./').removeprefix(s), t.extractfile(m).read()) "
    "for p in sys.argv[1:] for s in [pathlib.Path(p).name.split('.tar')[0].removesuffix('.tgz') + '/'] "
    'for t in [tarfile.open(p)] for m in t if m.isfile()]; z.close()"'
)
warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # pixels are never written to
MEMORY_SIDE, MEMORY_BYTES = 128, 4 << 30  # images up to this side are kept decoded if all fit


class Images:
    """Images with labels: decoded pixels, files of a folder, or members of a zip.

    data: uint8 pixels (n, 3, H, W) on the device, or one array that workers share: n paths of files or, if
    `archive` is the path of a zip, n records of its members (see read_directory). files: the paths or members
    that decoded pixels come from. labels (n,), on the CPU: class indices, -1 for none. key: a hash of all
    names, saved in the checkpoint, so that a run does not resume with other images.
    """

    def __init__(self, data, labels, classes, key, archive=None, files=None):
        self.data = data
        self.labels = labels
        self.classes = classes
        self.key = key
        self.archive = archive
        self.in_memory = torch.is_tensor(data)
        self.files = files if self.in_memory else data
        self.unreadable = set()
        self.unreadable_limit = 0.01  # a larger share stops the run

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """The path of image i, its name in the archive or, without files, its index."""
        if self.files is None:
            return str(int(i))
        return os.fsdecode(self.files[i]["name"] if self.archive else self.files[i])

    def read(self, i):
        """Image i, uint8 (3, H, W), or None if it cannot be decoded."""
        if self.in_memory:
            return self.data[i]
        try:
            if self.archive:
                return decode(io.BytesIO(read_member(self.archive, self.data[i])))
            return decode(os.fsdecode(self.data[i]))
        except Exception:  # Pillow raises many types of error for damaged files
            return None

    def labelled(self):
        """The rows of the images that have a label."""
        return (self.labels >= 0).nonzero()[:, 0]

    def take(self, rows):
        """The images in the given rows, with a key of their own."""
        key = hashlib.sha256(self.key.encode() + rows.numpy().tobytes()).hexdigest()
        files = None
        if self.in_memory and self.files is not None:
            files = self.files[rows.numpy()]
        return Images(self.data[rows.numpy()], self.labels[rows], self.classes, key, self.archive, files)

    def report(self, unreadable):
        """Name each unreadable image once; stop the run if there are too many."""
        for i in sorted(set(unreadable) - self.unreadable):
            tqdm.write(f"unreadable, skipped: {self.name(i)!r}", sys.stderr)
        self.unreadable.update(unreadable)
        if len(self.unreadable) > self.unreadable_limit * len(self):
            fail(f"{len(self.unreadable)} of {len(self)} images of --data cannot be read, more than 1 %")

    def state_dict(self):
        return dict(images=len(self), key=self.key)

    def load_state_dict(self, saved):
        if saved != self.state_dict():
            counts = f"{saved['images']} then, {len(self)} now"
            fail(f"--data has other images than the run began with ({counts}): choose another --out")


def decode(file):
    """Decode an image, given by path or file object, to RGB, uint8 (3, H, W)."""
    with Image.open(file) as picture:  # reads only the header; refuses more than 179 million pixels
        if picture.mode in ("I", "F"):
            raise ValueError("32-bit pixels have no known range")
        if picture.mode.startswith("I;16"):  # convert() would clip 16 bits
            return torch.from_numpy((numpy.array(picture) >> 8).astype("uint8")).expand(3, -1, -1)
        rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
        return torch.from_numpy(numpy.asarray(rgb)).permute(2, 0, 1)


@lru_cache
def descriptor(archive):
    """Open the archive, once per process; forks may share it, since pread does not move a position."""
    return os.open(archive, os.O_RDONLY)


def read_member(archive, member):
    """Read a member of a zip, given as a record of read_directory, and verify its checksum."""
    file, start = descriptor(archive), int(member["offset"])
    header = os.pread(file, 30, start)  # name and extra field can be longer than in the directory
    start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content = os.pread(file, int(member["size"]), start)
    if member["method"] == zipfile.ZIP_DEFLATED:
        content = zlib.decompress(content, -zlib.MAX_WBITS)
    if zlib.crc32(content) != member["crc"]:
        raise ValueError(f"wrong checksum of {member['name']}")
    return content


def read_directory(path):
    """The images in a zip, sorted by name: an array of records (name, offset, size, method, crc)."""
    members = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                # the bytes of the name, which zipfile has decoded as UTF-8 or, unflagged, as cp437
                name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
                members[os.fsdecode(name)] = info
    except Exception as error:  # damaged zips raise many types of error
        fail(f"--data {path} cannot be read as a zip: {error}")
    records = []
    for name in sorted(filter(is_image, members)):
        info = members[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            fail(f"--data {path}: {name} is compressed by method {info.compress_type}, use zip -0 instead")
        if info.flag_bits & 1:
            fail(f"--data {path}: {name} is encrypted, make the zip without a password")
        entry = (info.header_offset, info.compress_size, info.compress_type, info.CRC)
        records.append((os.fsencode(name), *entry))
    longest = max((len(record[0]) for record in records), default=1)
    fields = [("name", f"S{longest}"), ("offset", "i8"), ("size", "i8"), ("method", "u2"), ("crc", "u4")]
    return numpy.array(records, fields)


def is_image(name):
    """Whether a file name is that of an image and not hidden, as ._x.jpg from a Mac would be."""
    return name.lower().endswith(SUFFIXES) and "/." not in f"/{name}"


def image_names(folder):
    """Names of the image files below a folder, at any depth, sorted, without hidden ones.

    Links to directories are followed after all real directories, and each directory is listed only once,
    since links may form cycles.
    """
    names = []
    listed = set()
    tops = [str(folder)]
    for top in tops:  # links to directories are appended in the loop
        for path, children, files in os.walk(top):
            identity = os.path.realpath(path)
            if identity in listed:
                children.clear()
                continue
            listed.add(identity)
            children[:] = [child for child in children if not child.startswith(".")]
            paths = [os.path.join(path, child) for child in sorted(children)]
            tops += filter(os.path.islink, paths)
            prefix = os.path.relpath(path, folder) + "/"
            names += [prefix.removeprefix("./") + file for file in files]
    return sorted(filter(is_image, names))


def label_by_folder(names, data, classes=None, archive=None):
    """Label images by the first folder in their names; folders other than `classes` give no label."""
    folders = [os.path.dirname(name).partition("/")[0] for name in names]
    if classes is None:
        classes = sorted(set(folders) - {""})
    label_of = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([label_of.get(name, -1) for name in folders])
    key = hashlib.sha256(os.fsencode("/".join(names))).hexdigest()
    return Images(data, labels, classes, key, archive)


def list_folder(folder, classes=None):
    """The image files below a folder, labelled by its immediate subfolders."""
    names = image_names(folder)
    paths = numpy.array([os.fsencode(f"{folder}/{name}") for name in names])
    return label_by_folder(names, paths, classes)


def list_zip(archive, members, part, classes=None):
    """The images below the folder `part` of a zip, or None if there are none; all images if `part` is "".

    train, val and test are at the top of the zip, or in the folder that all images of the zip are in.
    """
    names = [f"/{os.fsdecode(name)}" for name in members["name"]]  # sorted
    folder = "/"
    if part and names:
        top = os.path.commonpath([os.path.dirname(names[0]), os.path.dirname(names[-1])]).rstrip("/")
        below = {name.removeprefix(f"{top}/").partition("/")[0] for name in names}
        if not below <= {"train", "val", "test"}:  # `top` may be inside one of these
            top = re.split("/(train|val|test)/", f"{top}/")[0].rstrip("/")
        folder = f"{top}/{part}/"
    rows = [row for row, name in enumerate(names) if name.startswith(folder)]
    if part and not rows:
        return None
    names = [names[row].removeprefix(folder) for row in rows]
    return label_by_folder(names, members[rows], classes, str(archive))


def list_part(root, part, classes=None):
    """The images in train, val or test ("": all) of a folder, which may be a zip; None if it is missing."""
    if (root / part).is_dir():
        return list_folder(root / part, classes)
    archive = root / f"{part}.zip"
    if not archive.is_file():
        return None
    members = read_directory(archive)
    return list_zip(archive, members, part, classes) or list_zip(archive, members, "", classes)


def lister(root):
    """A function (part, classes) that lists images of a folder or zip; a zip's directory is read once."""
    refuse_tar(root)
    if root.is_file():
        return partial(list_zip, root, read_directory(root))
    return partial(list_part, root)


def refuse_tar(path):
    """Refuse a tar, which has no index of its members, and say what to do instead."""
    if ".tar" in path.suffixes or path.suffix == ".tgz":
        fail(
            f"--data {path}: a tar has no index of its members: mount it with ratarmount, or convert it to a "
            f"zip (unpack a tar of tars first): {TAR_TO_ZIP} {shlex.quote(str(path))}"
        )


def refuse_empty(root, images):
    if not root.exists():
        fail(f"--data {root} does not exist: give a folder or zip of images, or {', '.join(NAMED)}")
    if not images:
        for path in root.glob("*"):
            refuse_tar(path)
        fail(f"--data {root} has no images: give a folder or zip of images, or {', '.join(NAMED)}")


def list_all(root):
    """All images of a folder or a zip."""
    images = lister(root)("")
    refuse_empty(root, images)
    return images


def open_folder(root):
    """The training images in a folder or zip, and the test images of the same classes, or None."""
    listing = lister(root)
    folder = root / "train"
    train = listing("train")
    if train is None:
        folder = root
        train = listing("")
    refuse_empty(root, train)
    if folder != root:
        for name in ("val", "test"):
            test = listing(name, train.classes)
            known = test.labelled() if test else []
            if len(known):
                counts = f"{len(known)} of {len(test)} images"
                print(f"{root / name}: {counts} are of classes in train", file=sys.stderr)
                return train, test.take(known)
    print(f"{folder}: training on all {len(train)} images", file=sys.stderr)
    print(f"no kNN and no probe: these need {root}/val with class folders as in train", file=sys.stderr)
    return train, None


def open_named(name, root):
    """Training and test images of a torchvision data set, downloaded if missing, and STL-10's kNN bank."""
    images = []
    try:
        from_rank_0(lambda: len(NAMED[name](root, download=True)))  # the others wait
        for split in ["unlabeled", "test", "train"] if name == "stl10" else [True, False]:
            part = NAMED[name](root, split)
            pixels, labels = torch.tensor(part.data), getattr(part, "labels", None)
            if name != "stl10":
                pixels, labels = pixels.permute(0, 3, 1, 2).contiguous(), part.targets
            images.append(Images(pixels, torch.as_tensor(labels).long(), part.classes, name))
    except (OSError, RuntimeError) as error:
        here = f", or --data ./{name} for the folder of that name" if os.path.isdir(name) else ""
        fail(f"{name} is not in {root} and cannot be fetched ({error}): give --data {name}:/path/to/it{here}")
    return images


def to_memory(images, device):
    """Decode small images of equal size onto the device if all can be read; others stay files."""
    pixels = images.data
    if not images.in_memory:
        decoded = []
        for i in range(len(images)):  # threads would not speed up small images
            image = images.read(i)
            if image is None or max(image.shape) > MEMORY_SIDE or len(images) * image.numel() > MEMORY_BYTES:
                return images
            decoded.append(image)
            if image.shape != decoded[0].shape:
                return images
        pixels = torch.stack(decoded)
    pixels = pixels.to(device)
    return Images(pixels, images.labels, images.classes, images.key, images.archive, images.files)


def open_data(args, device):
    """The training images, and for kNN a labelled bank and labelled test images, or None."""
    name, _, root = (args.data or "").partition(":")
    if not args.data:
        images = draw_patterns(5000, 0), draw_patterns(1000, 1)
    elif name in NAMED:
        images = open_named(name, root or "data")
    else:
        images = from_rank_0(lambda: open_folder(Path(args.data)))
    train, test, *banks = images
    if args.subset:
        rows = [(train.labels == label).nonzero()[: args.subset, 0] for label in train.labels.unique()]
        train = train.take(torch.cat(rows).sort()[0])
    if len(train) < args.batch_size:
        fail(f"--batch-size {args.batch_size} is more than the {len(train)} training images")
    train = to_memory(train, device)
    bank = to_memory(banks[0], device) if banks else train
    if test is not None:
        test = to_memory(test, device)
    return train, bank, test


def epoch_order(images, args, start, stop):
    """Yield (step, epoch, index (n,)): rank r has rows r n .. (r + 1) n - 1 of the global batch."""
    n = args.batch_size // world()
    for step in range(start, stop):
        epoch, position = divmod(step, images // args.batch_size)
        if position == 0 or step == start:
            order = uniform(args.seed, epoch, torch.arange(images), -1).argsort()
        first = position * args.batch_size + rank() * n
        yield step, epoch, order[first : first + n]


class Crops(torch.utils.data.Dataset):
    """What a worker does: read and decode a file once, and cut a uint8 crop for each view."""

    def __init__(self, images, views, seed):
        self.images = images
        self.views = views
        self.seed = seed

    def __getitems__(self, keys):
        """For each key (epoch, image index): (crops (S, S, 3), label, whether the image can be read)."""
        epochs, index = torch.tensor(keys).unbind(1)
        draws = draw(self.seed, epochs[:, None], index, len(self.views))
        batch = [self.cut(i, u) for i, u in zip(index.tolist(), draws, strict=True)]
        return [([x.permute(1, 2, 0) for x in crops], *rest) for crops, *rest in batch]

    def cut(self, i, u):
        """Crops (3, S, S) and label of the first readable image from i on, and whether it is image i."""
        for skipped in range(100):
            row = (i + skipped) % len(self.images)
            image = self.images.read(row)
            if image is not None:
                break
        else:  # so many that report() usually stops the run
            image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        return self.crops_of(image, u), self.images.labels[row], skipped == 0

    def crops_of(self, image, u):
        """Cut a uint8 crop (3, S, S) of an image (3, H, W) for each view, by uniforms u (views, 64)."""
        if not self.views[0].area:  # for evaluation
            return [(centre(image[None], view)[0] * 255).round().byte() for view in self.views]
        crops = []
        boxes = crop_boxes(u, *image.shape[1:], [view.area for view in self.views])
        for view, (top, left, h, w) in zip(self.views, boxes.int().tolist(), strict=True):
            box = image[None, :, top : top + h, left : left + w]
            box = box.contiguous(memory_format=torch.channels_last)  # the fastest to resize
            crops.append(F.interpolate(box, (view.size, view.size), mode="bicubic", antialias=True)[0])
        return crops


def ignore_signals(_):
    """Ignore signals in a worker: schedulers signal all processes, and the main one ends its workers."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def load(images, order, views, args, device):
    """Yield (step, epoch, index, labels, [uint8 images per view]), uncropped if in memory, else cropped."""
    if images.in_memory:
        for step, epoch, index in order:
            uncropped = images.data[index.to(device, non_blocking=True)]
            yield step, epoch, index, images.labels[index], [uncropped] * len(views)
        return
    dataset = Crops(images, views, args.seed)
    for step, epoch, index, (crops, labels) in read_ahead(dataset, order, args, device):
        yield step, epoch, index, labels, [x.permute(0, 3, 1, 2) for x in crops]


def read_ahead(dataset, order, args, device):
    """Yield (step, epoch, index, batch) for each (step, epoch, index) in `order`, read by --workers.

    The last part of an item says whether its image can be read; images that cannot are reported.
    """
    order, ahead = itertools.tee(order)
    workers = {}
    if args.workers:
        # forked, to share the list of images; since Python 3.14 the default, forkserver, would copy it
        context = "fork" if sys.platform == "linux" else None
        workers = dict(prefetch_factor=1, timeout=300, multiprocessing_context=context)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=([(epoch, i) for i in index.tolist()] for _, epoch, index in ahead),
        num_workers=args.workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
        **workers,
    )
    for (step, epoch, index), (*batch, readable) in zip(order, loader, strict=False):
        dataset.images.report(index[~readable].tolist())
        yield step, epoch, index, batch


LOST_WORKER = "DataLoader worker .*(exited|killed).*|DataLoader timed out.*|.*shared memory.*"


def refuse_lost_worker(error):
    """Fail with advice if an error says that a worker died or that shared memory is full.

    torch raises it wherever the main process happens to be, since a signal tells it that a worker has died.
    """
    match = re.search(LOST_WORKER, str(error))
    if match:
        fail(
            f"a decoding process was lost ({match[0]}), probably for lack of memory: give fewer --workers "
            "or --workers 0, or docker run --shm-size 8g; the last checkpoint is kept"
        )


def view_batches(images, order, views, args, device):
    """Yield (step, [x (n, 3, S, S) per view], labels (n,)) for each (step, epoch, index) in `order`."""
    run = compiled if args.compile else eager
    for step, epoch, index, labels, sources in load(images, order, views, args, device):
        u = draw(args.seed, epoch, index, len(views))
        xs = []
        for v, view in enumerate(views):
            rows = len(index)
            if device.type == "cpu":  # parts that fit in its cache
                rows = max(1, 2**18 // view.size**2)
            operations = ORDERS[int(hash64(args.seed, step, v)) % len(ORDERS)]
            source = sources[v].to(device, non_blocking=True)
            parts = []
            for x, draws in zip(source.split(rows), u[:, v].split(rows), strict=True):
                parts.append(make_view(x, draws, view, operations, images.in_memory, run))
            xs.append(torch.cat(parts))
        yield step, xs, labels.to(device, non_blocking=True)


def make_view(x, u, view, order, uncropped, run=eager):
    """Make a normalised view (n, 3, S, S) of uint8 images, uncropped or cropped, by uniforms u (n, 64)."""
    if uncropped and view.area:
        boxes = crop_boxes(u, *x.shape[2:], view.area).float()
        x = run(crop)(x, boxes.to(x.device, non_blocking=True), view.size)
    elif uncropped:
        x = centre(x, view)
    else:
        x = x.contiguous().float() / 255  # not channels last, in which augment is slower
    if not view.area:  # for evaluation
        return normalise(x)
    return normalise(augment(x, u, view, order, run), run)


def batches(train, args, device, start, stop):
    """Yield (step, [x1, x2, local crops...], labels) for steps start .. stop - 1, on the device."""
    return view_batches(train, epoch_order(len(train), args, start, stop), views_of(args), args, device)


# The classes of the built-in images, and the period of each pattern in pixels.
PATTERNS = "pinstripes stripes waves checks grid dots rings triangles clouds grains".split()
PERIODS = (3.8, 10, 8, 14, 8, 5.5, 12, 10, 1, 1)


def draw_patterns(n, split):
    """Draw n images of 32 x 32 pixels, in which only the pattern, not the colour, predicts the label."""
    index = torch.arange(n)
    labels = (uniform(0, split, index, 7) * 10).long()
    draws = uniform(0, split, index[:, None], torch.arange(7)).float()[:, :, None, None, None]
    right, down, turn, stretch, polarity, contrast, hue = draws.unbind(1)
    noise = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(split))
    angle = math.tau * turn
    x = torch.arange(32) - 32 * right
    y = torch.arange(32)[:, None] - 32 * down
    across = x * angle.cos() + y * angle.sin()  # (n, 1, 32, 32)
    along = y * angle.cos() - x * angle.sin()
    frequency = math.tau * (0.85 + 0.3 * stretch) / torch.tensor(PERIODS)[labels].view(-1, 1, 1, 1)
    a, b = frequency * across, frequency * along

    wave, ridge = a.cos(), b.cos()
    hills = wave + ridge
    heights = [
        wave,
        wave,
        (a + 2 * ridge).cos(),
        3 * wave * ridge,
        wave.maximum(ridge) - 0.8,
        hills - 0.5,
        (hills - 1.1).abs() - 0.5,
        a.sin() - 2 * (a / 2).sin() * (0.866 * b).cos(),
        4 * F.interpolate(noise[:, :1, :10, :10], 32, mode="bicubic") - 2,
        2 * noise[:, :1] - 1,
    ]
    tone = (2 * torch.stack(heights)[labels, index]).tanh() * (polarity - 0.5).sign()
    gray = 0.45 * (1 + along / 60) * (1 + (0.3 + 0.4 * contrast) * tone)
    red_green_blue = torch.tensor([0, 2.1, 4.2]).view(3, 1, 1)  # on the colour wheel, in radians
    tint = 1 + 0.15 * (red_green_blue + along / 8 + math.tau * hue).cos()
    images = (gray * tint + 0.1 * noise).clamp(0, 1)
    return Images((255 * images).byte(), labels, PATTERNS, f"patterns {split}")


# ----------------------------------------------------------------------------------------------- networks


def resnet(arch, stem="imagenet", zero_init=False, init=None):
    """A torchvision ResNet without its classifier, with weights from a file `init` if given; its width."""
    if arch not in torchvision.models.list_models(torchvision.models, include="*resne*"):
        fail(f"--arch {arch} is not a ResNet of torchvision.models: give resnet18, resnet50, ...")
    net = torchvision.models.get_model(arch, zero_init_residual=zero_init, norm_layer=BatchNorm)
    width = net.fc.in_features
    net.fc = nn.Identity()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    if init:
        load_resnet(net, init, f"{arch} with stem {stem}")
    return net, width


def mlp(*sizes, norm=True):
    """Linear, BN (with `norm`) and ReLU for each hidden size, then a linear layer without bias."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), BatchNorm(outputs) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:], bias=False))


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the rows of all ranks, the same number on each, on CPUs and GPUs.

    torch's SyncBatchNorm needs GPUs, and waits for them in each layer, to leave out empty ranks. The counter
    of batches is kept only for torchvision's state_dict: counting would take a kernel per layer.
    """

    def _check_input_dim(self, x):
        pass  # any number of dimensions will do

    def forward(self, x):
        running = self.running_mean, self.running_var
        if world() == 1 or not self.training:
            return F.batch_norm(x, *running, self.weight, self.bias, self.training, self.momentum, self.eps)
        if x.device.type == "cuda":
            return NormaliseOverRanks.apply(x, self.weight, self.bias, *running, self.momentum, self.eps)
        rows = all_gather(x)
        y = F.batch_norm(rows, *running, self.weight, self.bias, True, self.momentum, self.eps)
        return y[rank() * len(x) :][: len(x)]  # not chunk(), whose views forbid an in-place ReLU


@lru_cache
def counts_of_ranks(rows, ranks, device):
    """The number of rows on each rank (W,), as float32 and int32; cached to save two kernels per layer."""
    counts = torch.full((ranks,), rows, device=device)
    return counts.float(), counts.int()


class NormaliseOverRanks(torch.autograd.Function):
    """Normalise x (n, C, ...) over all ranks by torch's kernels: one collective forward, one backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        mean, invstd = torch.batch_norm_stats(x, eps)
        statistics = all_gather(torch.stack([mean, invstd])[None])  # (W, 2, C)
        counts, int_counts = counts_of_ranks(x.numel() // x.shape[1], world(), x.device)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, statistics[:, 0], statistics[:, 1], running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, invstd, int_counts)
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
        *sums, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grad, x, mean, invstd, weight, True, *ctx.needs_input_grad[1:3]
        )
        sums = torch.stack(sums)
        dist.all_reduce(sums)
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, *sums, counts)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def per_view(net, xs, micro_batch=0):
    """Apply `net` to each global view, since BN statistics are per view, and to all local views at once.

    With micro_batch, activations are kept for that many rows at a time: backward computes them again.
    """
    groups = [*xs[:2], torch.cat(xs[2:])] if len(xs) > 2 else xs
    options = dict(use_reentrant=False)  # random numbers, as of dropout, are drawn again as they were
    options["context_fn"] = lambda: (contextlib.nullcontext(), frozen_statistics(net))
    hs = []
    for x in groups:
        if micro_batch:
            parts = x.tensor_split(math.ceil(len(x) / micro_batch))
            hs.append(torch.cat([checkpoint(net, part, **options) for part in parts]))
        else:
            hs.append(net(x))
    return hs[:2] + [h for local in hs[2:] for h in local.chunk(len(xs) - 2)]


@contextlib.contextmanager
def frozen_statistics(net):
    """Freeze BN's running statistics while checkpoint() recomputes rows that have already updated them.

    checkpoint() leaves by an exception as soon as it has all that it needs, hence `finally`.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def prepare(net, device):
    """Move a network to the device, channels last in memory."""
    return net.to(device, memory_format=torch.channels_last)


def check_compiler(device):
    """Refuse --compile on several ranks, where each BN would break the graph, or without a C compiler."""
    if world() > 1:
        fail(f"--compile on {world()} ranks does not work, since BN over ranks is not compiled: leave it out")
    if device.type == "cpu":
        compilers = [os.environ.get("CXX", "g++")]
    else:  # for Triton
        compilers = [os.environ.get("CC", "gcc"), "clang"]
    if not any(shutil.which(name) for name in compilers):
        fail(f"--compile needs {' or '.join(compilers)}, which is not installed: install it or leave it out")


def parallel(net, args, device):
    """The callable for training: `net`, compiled if --compile is given, in DDP if there are several ranks.

    Compiled, all views go through one graph, which a GPU launches as a whole. Calls to parts of `net`, as in
    an evaluation, are not compiled.
    """
    if args.compile:
        net.compile(mode="reduce-overhead", dynamic=False)
    if world() == 1:
        return net
    ids = [device.index] if device.type == "cuda" else None
    model = nn.parallel.DistributedDataParallel(net, device_ids=ids, gradient_as_bucket_view=True)
    model.broadcast_buffers = False  # they are equal on all ranks; the argument of this name is deprecated
    if device.type == "cpu":
        model.register_comm_hook(None, mean_in_rank_order)
    return model


def mean_in_rank_order(_, bucket):
    """A hook of DDP for CPUs: the mean over ranks, summed in an order that does not depend on the buckets.

    DDP rebuilds its buckets after the first step, so a resumed run would otherwise differ in the last bit.
    """
    rows = all_gather(bucket.buffer()).view(world(), -1)
    mean = torch.futures.Future()
    mean.set_result(sum(rows.unbind()) / world())
    return mean


@torch.no_grad()
def ema_update(average, net, momentum):
    """average <- momentum average + (1 - momentum) net, for all parameters and BN statistics."""
    averages = [*average.parameters(), *average.buffers()]
    new = [*net.parameters(), *net.buffers()]
    pairs = [(old, value) for old, value in zip(averages, new, strict=True) if old.is_floating_point()]
    torch._foreach_lerp_(*zip(*pairs, strict=True), 1 - momentum)


def autocast(args, device):
    """A context in which networks compute in bfloat16, if --precision is bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


# ------------------------------------------------------------------------------------------------ weights


class Inert(dict):
    """A stand-in for any object but a tensor in a file of weights: a dict of the object's attributes.

    It accepts whatever a pickle does to an object, so that nothing it names is imported or called.
    """

    dtype = torch.uint8  # when it replaces a class of storages, which is then read as bytes
    dump_patches = False  # when it replaces a class of modules, whose source torch would compare
    __hash__ = object.__hash__  # it may be a key of a dict

    def __init__(self, *args, **options):
        super().__init__()

    def __call__(self, *args, **options):
        return Inert()

    def __setstate__(self, state):
        for part in state if isinstance(state, tuple) else [state]:
            if isinstance(part, dict):
                self.update(part)

    def append(self, item):
        pass

    add = extend = append


def rebuild_plain(rebuild, kind, args, state):
    """Rebuild a tensor of a subclass, or with attributes, as a plain tensor."""
    return rebuild(*args)


PICKLED_TENSORS = {  # all that a pickled tensor refers to, except storages, which torch handles
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._tensor", "_rebuild_from_type_v2"): rebuild_plain,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): torch._utils._rebuild_parameter_with_state,
    **{("torch", name): item for name, item in vars(torch).items() if isinstance(item, torch.dtype)},
}


class TensorPickle:
    """A pickle_module for torch.load that reads tensors, and Inert in place of everything else."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            item = PICKLED_TENSORS.get((module, name), Inert)
            if inspect.isfunction(item):
                return partial(item)  # a pickle may set attributes, but not on the function itself
            return item

    @classmethod
    def load(cls, file, **options):
        return cls.Unpickler(file, **options).load()


def load_weights(path, flag="--backbone"):
    """All tensors in anybody's checkpoint by name, without running any of its code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about old files and changed classes
            content = load_anything(path)
            return tensors(content, set()) if isinstance(content, dict) else {}
    except Exception as error:  # damaged and foreign files raise many types of error
        if "TorchScript" in str(error):
            fail(f"{flag} {path} is a TorchScript program: save the state_dict() of torch.jit.load(FILE)")
        reason = str(error).partition("\n")[0]
        fail(f"{flag} {path} cannot be read as weights ({type(error).__name__}: {reason})")


def load_anything(path):
    """Load a file of torch.save, with Inert in place of all but tensors, containers and numbers."""
    try:
        return load_checked(path)
    except pickle.UnpicklingError:  # it holds other objects; TorchScript raises RuntimeError
        return torch.load(path, "cpu", TensorPickle, weights_only=False)


def tensors(content, visited, prefix=""):
    """Collect the tensors in nested dicts under names: their keys, joined by dots.

    The attributes in which a pickled module holds its parts (_modules, ...) do not appear in the names.
    """
    named = {}
    visited.add(id(content))  # objects may refer to each other
    for key, value in content.items():
        name = f"{prefix}{key}"
        if torch.is_tensor(value):
            named[name] = value.detach()
        elif isinstance(value, dict) and id(value) not in visited:
            inner_prefix = prefix if key in ("_modules", "_parameters", "_buffers") else f"{name}."
            named.update(tensors(value, visited, inner_prefix))
    return named


CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def resnets_in(weights):
    """The ResNets in named weights, without classifiers: prefix -> weights, the preferred prefix first."""
    prefixes = re.findall(r"^(|.*\.)(?:layer1|4)\.0\.conv1\.weight$", "\n".join(weights), re.MULTILINE)
    resnets = {}
    for prefix in sorted(prefixes, key=preference):
        resnets[prefix] = {}
        for name, tensor in weights.items():
            child, _, rest = name.removeprefix(prefix).partition(".")
            child = CHILDREN.get(child, child)  # in an nn.Sequential, children are numbered
            if name.startswith(prefix) and child in CHILDREN.values():
                resnets[prefix][f"{child}.{rest}"] = tensor
    return resnets


def preference(prefix):
    """A sort key: published weights (averages, DINO's teacher) first, targets and momentum encoders last."""
    if re.search("average|teacher", prefix):
        return 0
    if re.search("target|momentum|encoder_k|key", prefix):
        return 2
    return 1


def load_resnet(net, path, description):
    """Load the weights of a ResNet from a file, under whatever prefix and whatever else is in it."""
    weights = load_weights(path, "--init")
    for resnet_weights in resnets_in(weights).values():
        with contextlib.suppress(RuntimeError):  # names or shapes are those of another architecture
            net.load_state_dict(resnet_weights)
            return
    fail(f"--init {path} holds no complete {description}; its first tensors are {list(weights)[:3]}")


def find_resnet(weights):
    """(ResNet, arch, stem, prefix) of the preferred complete ResNet in named weights, or None."""
    for prefix, resnet_weights in resnets_in(weights).items():
        stem = "imagenet"
        if "conv1.weight" in resnet_weights and resnet_weights["conv1.weight"].shape[-1] == 3:
            stem = "cifar"
        for arch in sorted(torchvision.models.list_models(torchvision.models, "*resne*"), key=len):
            net, _ = resnet(arch, stem)
            with contextlib.suppress(RuntimeError):  # names or shapes are those of another architecture
                net.load_state_dict(resnet_weights)
                return net, arch, stem, prefix
    return None


# -------------------------------------------------------------------------------------------------- ranks


def rank():
    """The rank of this process; 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    """The number of ranks, W."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


@lru_cache
def cpu_group():
    """A gloo group of all ranks, in which they agree and wait for each other without waiting for a GPU."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def from_rank_0(function):
    """Call function() on rank 0 alone, and return its result on every rank."""
    objects = [function() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(objects, group=cpu_group())
    return objects[0]


def barrier():
    """Wait on the CPU until all ranks are here, up to a day: a disk may be slow."""
    if dist.is_initialized():
        # not dist.barrier, which may choose a GPU
        dist.all_reduce(torch.zeros(1), group=cpu_group())


class AllReduce(torch.autograd.Function):
    """The sum over ranks of a tensor; backward, the sum over ranks of its gradient."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return AllReduce.forward(ctx, grad)


class AllGather(torch.autograd.Function):
    """The rows of all ranks; backward, this rank's rows of the sum over ranks of the gradient."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(world() * len(x), *x.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
        gather(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        return AllReduce.forward(ctx, grad).chunk(world())[rank()]


def all_reduce(x):
    """The sum of x over ranks, whose gradient is exact however such calls are nested.

    Each rank computes the loss of the global batch, and backward sums the gradients of all these losses. They
    are thus W times those of one process, and DDP, which averages over W ranks, makes them equal.
    """
    return AllReduce.apply(x) if dist.is_initialized() else x


def all_gather(x):
    """The rows x (n, ...) of all ranks in rank order, (W n, ...), differentiable; n is the same on all."""
    return AllGather.apply(x) if dist.is_initialized() else x


def start(args, script):
    """Join the process group, check --out and set the seed, writing nothing; returns this rank's device."""
    args.script = str(Path(script).resolve())
    if args.batch_size % world() or args.batch_size < 2 * world():
        advice = f"give a multiple of {world()} with at least 2 images per rank"
        fail(f"--batch-size {args.batch_size} on {world()} rank(s): {advice}")
    device = torch.device("cpu")
    group = dict(backend="gloo")
    default = "fp32"
    if args.device == "cuda":
        gpus = torch.cuda.device_count()  # SLURM may show a rank only its own GPU
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if gpus > 1 else 0)
        if device.index >= gpus:
            fail(f"rank {rank()} has no GPU, this machine shows {gpus}: give fewer ranks or --device cpu")
        torch.cuda.set_device(device)
        torch.set_num_threads(1)  # little is left for the CPU, and threads would compete with the workers
        group = dict(backend="nccl", device_id=device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            default = "bf16"
    if args.compile:
        check_compiler(device)
    torch.backends.cudnn.allow_tf32 = False
    if world() > 1 and not dist.is_initialized():
        # NCCL's ten minutes are too few if one rank reads its part of the images much more slowly than others
        dist.init_process_group(**group, timeout=timedelta(hours=1))
    before = from_rank_0(lambda: saved_settings(Path(args.out)))
    args.precision = args.precision or before.get("precision") or default
    sides = [args.size or 224]
    if "views" in args:
        sides = [view.size for view in views_of(args)]
    if device.type == "cpu" and args.precision == "bf16" and min(sides) < 18:
        problem = f"--precision bf16 on a CPU gives wrong gradients for views of {min(sides)} pixels"
        fail(f"{problem}: give fp32, and another --out if this run began on a GPU")
    check_settings(args, before)
    torch.manual_seed(args.seed)
    return device


# --------------------------------------------------------------------------------------------- optimisers


class LARS(torch.optim.SGD):
    """SGD with the gradient of each layer scaled by 1e-3 |weights| / |gradient + decay|.

    You, Gitman, Ginsburg 2017, arXiv 1708.03888. Biases and norms are not scaled and do not decay.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.ndim > 1 and p.grad is not None]
            grads = [p.grad for p in weights]
            torch._foreach_add_(grads, weights, alpha=group["decay"])
            w = torch.stack(torch._foreach_norm(weights))
            g = torch.stack(torch._foreach_norm(grads))
            scale = torch.where((w > 0) & (g > 0), 1e-3 * w / g, 1.0)
            torch._foreach_mul_(grads, list(scale.unbind()))
        return super().step(closure)


def make_optimizer(net, kind, lr, wd):
    """An optimiser for all parameters: "lars", "sgd" or "adamw"; biases and norms decay only with "sgd"."""
    params = list(net.parameters())
    if kind == "sgd":
        return torch.optim.SGD(params, lr, momentum=0.9, weight_decay=wd, foreach=True)
    if kind == "lars":
        return LARS([dict(params=params, decay=wd)], lr, momentum=0.9, foreach=True)
    weights = dict(params=[p for p in params if p.ndim > 1], weight_decay=wd)
    others = dict(params=[p for p in params if p.ndim <= 1], weight_decay=0)
    return torch.optim.AdamW([weights, others], lr, fused=True)


def warmup_cosine(step, warmup, total, first=0.0, last=0.0):
    """The factor of the peak rate: `first` to 1 over `warmup` steps, then a cosine to `last` at `total`."""
    if step < warmup:
        return first + (1 - first) * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer, lr):
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# ----------------------------------------------------------------------------------------------- monitors


def side_before_centre(size):
    """The shorter side to which an image is resized before its centre of `size` pixels is cut."""
    if size == 96:  # of STL-10, which the official evaluation takes as it is
        return size
    return size * 8 // 7  # 36 for 32, 73 for 64, 256 for 224


@torch.no_grad()
def features(backbone, images, rows, args):
    """Features (m, D), float32, of centre crops of the images in `rows`, and labels (m,), on every rank."""
    device = next(backbone.parameters()).device
    view = View(size=args.size, resize=side_before_centre(args.size))
    padded = torch.cat([rows, rows[:1].expand(-len(rows) % world())])  # to a multiple of W
    order = [(0, 0, part) for part in padded.chunk(world())[rank()].split(256)]
    training = backbone.training
    backbone.eval()
    hs, ys = [], []
    batches = view_batches(images, order, [view], args, device)
    for _, (x,), y in tqdm(batches, "features", len(order), disable=rank() > 0, delay=10):
        with autocast(args, device):
            hs.append(backbone(x).float())
        ys.append(y)
    backbone.train(training)
    return [all_gather(torch.cat(parts))[: len(rows)] for parts in (hs, ys)]


def nearest(h, bank, k):
    """The k nearest of bank (n, D) to each of h (m, D), best first: cosine similarities and rows (m, k)."""
    bank = F.normalize(bank, dim=1).mT
    parts = [(F.normalize(part, dim=1) @ bank).topk(k) for part in h.split(512)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def knn_votes(similarity, labels, classes, temperature=0.07):
    """Class scores (m, C) from neighbours (m, k): the sum of exp(similarity / temperature) per class."""
    votes = similarity.new_zeros(len(labels), classes)
    return votes.scatter_add_(1, labels, (similarity / temperature).exp())


def spectrum(z):
    """Singular values of the L2-normalised, uncentred rows of z (n, d), largest first, with sum 1, on a CPU.

    Square roots of a Gram matrix's eigenvalues, in float64 against rounding errors, on a CPU for speed.
    """
    z = F.normalize(z.double(), dim=1)
    gram = z @ z.mT if len(z) < z.shape[1] else z.mT @ z
    values = torch.linalg.eigvalsh(gram.nan_to_num().cpu())
    values = values.flip(0).clamp(min=0).sqrt()
    return values / values.sum().clamp(min=1e-30)


def perplexity(p):
    """The exponential of the entropy: the number of equal probabilities with the same entropy."""
    return float(torch.special.entr(p).sum().exp())


def effective_rank(z):
    """RankMe: the perplexity of the spectrum, from 1 (all rows on a line) to min(n, d)."""
    return perplexity(spectrum(z))


@torch.no_grad()
def spread(h, z):
    """Measure how far features h (n, D) and embeddings z (n, d) are from collapse, on rows of all ranks.

    These are 1,024 rows, or 512 in more than 512 dimensions, where a spectrum then takes 30 ms, not 200.
    """
    h, z = [all_gather(x[: (1024 if x.shape[1] <= 512 else 512) // world()].float()) for x in (h, z)]
    deviations = dict(std_h=h.std(0).mean(), std_z=F.normalize(z, dim=1).std(0).mean())
    spectrum_z = spectrum(z)
    return dict(deviations, rank_h=effective_rank(h), rank_z=perplexity(spectrum_z), spectrum_z=spectrum_z)


def gradient_norm(net):
    """The norm of the gradient of all parameters."""
    return nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])


class Probe(nn.Sequential):
    """An online linear classifier of L2-normalised features after a BN; off without labels or test images."""

    def __init__(self, width, train, test, device):
        super().__init__(BatchNorm(width, affine=False), nn.Linear(width, len(train.classes) or 1))
        self.labelled = test is not None and len(train.labelled()) > 0
        self.to(device)
        self.optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def get_extra_state(self):
        return self.optimizer.state_dict()

    def set_extra_state(self, saved):
        self.optimizer.load_state_dict(saved)

    def step(self, h, y):
        """Take a step on detached features h (n, D) of images with labels y (n,), -1 for none."""
        if not self.labelled:
            return
        known = all_reduce((y >= 0).sum()).clamp(min=1)
        logits = self(F.normalize(h, dim=1))
        self.optimizer.zero_grad()
        (F.cross_entropy(logits, y, ignore_index=-1, reduction="sum") / known).backward()
        for p in self.parameters():
            p.grad = all_reduce(p.grad)
        self.optimizer.step()


def evenly(rows, limit):
    """At most `limit` of the rows, evenly spaced."""
    count = min(len(rows), limit)
    return rows[torch.arange(count) * len(rows) // count]


def evaluation_due(step, steps_per_epoch, args):
    """Whether to evaluate: before the first step, and at the start of every --knn-every-th epoch."""
    every = args.knn_every * steps_per_epoch
    return step == 0 or (every > 0 and step % every == 0)


@torch.no_grad()
def evaluate(backbone, probe, bank, test, args):
    """Accuracies in [0, 1] of kNN (k = 20; bank up to 25,000) and probe, on up to 10,000 test images."""
    if test is None:
        return {}
    test.unreadable_limit = 1.0  # pretraining does not depend on test images
    h_bank, y_bank = features(backbone, bank, evenly(bank.labelled(), 25_000), args)
    h, y = features(backbone, test, evenly(torch.arange(len(test)), 10_000), args)
    similarity, rows = nearest(h, h_bank, min(20, len(h_bank)))
    votes = knn_votes(similarity, y_bank[rows], len(bank.classes))
    accuracies = dict(knn=(votes.argmax(1) == y).float().mean())
    if probe.labelled:
        probe.eval()
        accuracies["probe"] = (probe(F.normalize(h, dim=1)).argmax(1) == y).float().mean()
        probe.train()
    return accuracies


# ------------------------------------------------------------------------------------------ run directory

MAY_CHANGE = {"out", "script", "data", "workers", "device", "save_minutes", "log_every"}  # when a run resumes
TOKEN = secrets.token_hex(8)  # of this process; a run directory holds that of the last process started
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)  # SLURM's warning, termination, Ctrl-C


def saved_settings(out):
    """The settings of the run in a directory, {} if there is none; refuses what is not a run directory."""
    try:
        if not out.exists() or {path.name for path in out.iterdir() if path.suffix != ".tmp"} <= {"submit"}:
            return {}
        return dict(json.loads((out / "args.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        fail(f"--out {out} is neither empty nor a run directory ({error}): choose another --out")


def check_settings(args, before):
    """Refuse to go on with the run in --out, whose settings are `before`, if they have changed."""
    if not before:
        return
    changes = []
    for name, value in json.loads(json.dumps(vars(args))).items():
        if name not in MAY_CHANGE and value != before.get(name):
            changes.append(f"{name} {before.get(name)} -> {value}")
    if changes:
        fail(f"--out {args.out} holds another run ({', '.join(changes)}): choose another --out")


def provenance(step):
    """For args.json, what computes the steps from `step` on; jobs inherit the commit noted by submit()."""
    git = f"git -C '{Path(__file__).parent}' describe --always --dirty 2>/dev/null"
    return dict(
        step=step,
        command=sys.argv,
        commit=os.environ.get("CODE_COMMIT") or subprocess.getoutput(git),
        versions=[sys.version, torch.__version__, torchvision.__version__],
        hardware=subprocess.getoutput("nvidia-smi -L 2>/dev/null || uname -m"),
        ranks=world(),
    )


def write(path, save):
    """Write a temporary file by save(file) and rename it, so that a killed run leaves the old one intact."""
    temporary = Path(f"{path}.{TOKEN}.tmp")  # another job may write the same file
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception:  # such as a full disk
        temporary.unlink(missing_ok=True)
        raise


def load_checked(path):
    """Load a file of tensors to the CPU, after verifying its checksums: torch.load misses flipped bits."""
    if zipfile.is_zipfile(path):  # files of torch before 1.6 are not
        damaged = zipfile.ZipFile(path).testzip()
        if damaged:
            raise ValueError(f"wrong checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def newest_checkpoint(out):
    """The path of the newest intact checkpoint, or None; a damaged one is renamed."""
    paths = [path for path in (out / "checkpoint.pt", out / "checkpoint-previous.pt") if path.exists()]
    for path in paths:
        try:
            load_checked(path)
            return path
        except Exception as error:  # torch and zipfile raise many types of error
            if path == paths[-1]:
                fail(f"{path} is damaged ({error}), and there is no earlier one: choose another --out")
            print(f"{path} is damaged ({error}): resuming from the one before", file=sys.stderr)
            path.rename(out / "checkpoint-damaged.pt")
    return None


def resume(args, state):
    """Create the run directory or load its newest checkpoint into `state`; returns the steps done so far."""
    out = Path(args.out)
    path = from_rank_0(lambda: newest_checkpoint(out))
    step = 0
    if path:
        saved = load_checked(path)
        step = saved["step"]
        for name, part in state.items():
            if name not in saved:
                fail(f"{path} has no '{name}', so other code saved it: choose another --out")
            part.load_state_dict(saved[name])
        if rank() == 0:
            print(f"{out}: resuming at step {step}, saved by {saved['world']} rank(s)", file=sys.stderr)
    if rank() == 0:
        try:
            prepare_directory(args, step)
        except OSError as error:
            fail(f"--out {out} cannot be written: {error}")
    return step


def prepare_directory(args, step):
    """Write settings and code to the run directory, and truncate its log to the records up to `step`."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for temporary in out.glob("*.tmp"):  # left by a killed run
        temporary.unlink()
    starts = []
    if (out / "args.json").exists():
        starts = json.loads((out / "args.json").read_text()).get("starts", [])
    settings = json.dumps(dict(vars(args), starts=[*starts, provenance(step)]), indent=1)
    write(out / "args.json", lambda file: file.write(settings.encode()))
    (out / "token").write_text(TOKEN)
    for source in (args.script, __file__):
        copy_code(Path(source), out, step)
    log = out / "log.jsonl"
    if log.exists():
        kept = bytearray()
        for line in log.read_bytes().splitlines(True):
            last = step if b'"loss"' in line else step - 1  # evaluations at this step are repeated
            if line.endswith(b"}\n") and json.loads(line)["step"] <= last:
                kept += line
        write(log, lambda file: file.write(kept))


def copy_code(source, out, step):
    """Copy a source file into the run directory, keeping an older copy that differs under another name."""
    copy = out / source.name
    if copy.exists() and copy.read_bytes() != source.read_bytes():
        old = out / f"{source.stem}-until-{step}{source.suffix}"
        if not old.exists():  # else no step was saved with this copy
            copy.rename(old)
        print(f"{out}: {source.name} has changed since step {step}, the old code is {old}", file=sys.stderr)
    with contextlib.suppress(shutil.SameFileError):  # the run's own copy is running
        shutil.copy(source, copy)


def check_finite(step, values, prefix=""):
    """Fail if a tensor in nested dicts is not finite, naming it."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            check_finite(step, value, f"{name}.")
        elif torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all():
            fail(f"step {step}: {name} is not finite; the last checkpoint is kept")


def check_loss(step, loss, terms):
    """Fail if the loss is not finite, listing its terms."""
    values = {name: float(term) for name, term in terms.items()}
    check_finite(step, {f"the loss (with terms {values})": loss})


def save(args, step, state, backbone, loss, terms, name="backbone.pth"):
    """Write checkpoint.pt, keeping the one before, and the backbone under torchvision's names, on rank 0."""
    check_loss(step, loss, terms)
    if rank() == 0:
        saved = {key: part.state_dict() for key, part in state.items()}
        check_finite(step, saved)
        try:
            write_checkpoint(args, dict(saved, step=step, world=world()))
            weights = {}
            for key, value in backbone.state_dict().items():
                weights[key] = value.cpu() if torch.is_tensor(value) else value
            write(Path(args.out, name), lambda file: torch.save(weights, file))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            fail(f"step {step} cannot be saved in {args.out} ({error}); the last checkpoint is kept")
    barrier()  # other ranks wait here, not in a collective of the GPUs, which would time out


def write_checkpoint(args, saved):
    """Write checkpoint.pt and keep the one before; fail if another run was started in the directory."""
    out = Path(args.out)
    if (out / "token").read_text() != TOKEN:
        fail(f"step {saved['step']}: another run was started in {out}, so this one ends")
    checkpoint, new = out / "checkpoint.pt", out / "checkpoint-new.pt"
    write(new, lambda file: torch.save(saved, file))
    if checkpoint.exists():
        checkpoint.replace(out / "checkpoint-previous.pt")
    new.replace(checkpoint)


def keep_due(step, steps_per_epoch, args):
    """Whether to keep the backbone: at the end of every --keep-every-th epoch."""
    return args.keep_every > 0 and step % (args.keep_every * steps_per_epoch) == 0


def keep(args, epoch):
    """Copy backbone.pth, which was just saved, to backbone-EPOCH.pth."""
    if rank() == 0:
        backbone = Path(args.out, "backbone.pth").read_bytes()
        write(Path(args.out, f"backbone-{epoch}.pth"), lambda file: file.write(backbone))


class Log:
    """The progress bar, log.jsonl and TensorBoard, written by rank 0."""

    def __init__(self, args, start, total):
        self.args = args
        self.total = total
        self.step = start
        self.clock = time.monotonic()
        self.waiting = 0.0
        self.collapsed = False
        self.bar = tqdm(total=total, initial=start, disable=rank() > 0, mininterval=5)
        if rank() == 0:
            from torch.utils import tensorboard  # slow to import

            self.board = tensorboard.SummaryWriter(args.out, purge_step=start + 1)
            settings = {name: str(value) for name, value in vars(args).items()}
            for summary in tensorboard.summary.hparams(settings, {"eval/knn": 0}):
                self.board.file_writer.add_summary(summary)

    def watch(self, batches):
        """Yield the batches, advance the bar, and add up the seconds spent waiting for them."""
        asked = time.monotonic()
        for batch in batches:
            self.waiting += time.monotonic() - asked
            yield batch
            self.bar.update()
            asked = time.monotonic()

    def due(self, step):
        """Whether to record this step: the first, every --log-every-th and the last."""
        return step in (1, self.total) or step % self.args.log_every == 0

    def __call__(self, step, terms, spectrum_z=None, **values):
        """Record numbers or 0-dim tensors: the loss, its terms and more, or the results of an evaluation.

        A loss that is not finite ends the run, on all ranks.
        """
        clash = terms.keys() & {"step", "images_per_second", "seconds_waiting", "spectrum_z", *values}
        if clash:
            fail(f"the loss has a term named '{min(clash)}', which the log uses itself: rename it")
        if "loss" in values:
            check_loss(step, values["loss"], terms)
        values.update(terms)
        if rank() > 0 or not values:
            return
        values = {name: value.item() if torch.is_tensor(value) else value for name, value in values.items()}
        now = time.monotonic()
        if "loss" in values:
            group = "train"
            self.bar.set_postfix(loss=values["loss"], refresh=False)
            values["images_per_second"] = self.args.batch_size * (step - self.step) / (now - self.clock)
            values["seconds_waiting"] = self.waiting
        else:
            group = "eval"
            self.bar.set_postfix(values, refresh=False)
        self.step = step
        self.clock = now
        self.waiting = 0.0
        with open(Path(self.args.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(dict(step=step, **values)) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{group}/{name}", value, step)
        if spectrum_z is not None:
            self.board.add_histogram("train/spectrum_z_log10", spectrum_z.clamp(min=1e-12).log10(), step)
            self.warn_of_collapse(step, values["rank_z"], len(spectrum_z))

    def warn_of_collapse(self, step, rank_z, largest):
        """Warn once when embeddings collapse, and again only after they have recovered."""
        beginning = step <= min(100, self.total // 4)
        collapsed = rank_z < 4 and largest >= 16 and not beginning
        if collapsed and not self.collapsed:
            text = f"collapse: the effective rank of the embeddings is {rank_z:.1f} of {largest}"
            tqdm.write(f"step {step}: {text}", sys.stderr)
        self.collapsed = collapsed

    def show(self, xs):
        """Show the two global views of the first eight images in TensorBoard."""
        if rank() == 0:
            self.board.add_images("views", torch.cat([x[:8] for x in xs[:2]]) * 0.226 + 0.449, self.step)

    def close(self):
        self.bar.close()
        if rank() == 0:
            self.board.close()


class Signals:
    """Answers SIGUSR2, SIGTERM and Ctrl-C between steps, and keeps the clock of --save-minutes."""

    def __init__(self, args):
        self.args = args
        self.received = 0
        self.saved_at = time.monotonic()
        self.previous = {number: signal.signal(number, self.receive) for number in SIGNALS}

    def receive(self, number, _):
        """Only note the signal, since all ranks must stop at the same step."""
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C interrupts at once

    def agree(self):
        """Whether to stop (a signal on any rank) and to save (rank 0's clock), the same on all ranks."""
        due = rank() == 0 and time.monotonic() - self.saved_at > 60 * self.args.save_minutes
        votes = torch.tensor([self.received, due])
        if dist.is_initialized():
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=cpu_group())
        self.received, due = votes.tolist()
        if due:
            self.saved_at = time.monotonic()
        return self.received > 0, due > 0

    def leave(self):
        """Exit after a save; a job that SLURM has warned is requeued, and waits for SLURM to end it."""
        name = signal.Signals(self.received).name
        submitted = os.environ.get("SUBMITIT_EXECUTOR")
        if rank() == 0:
            print(f"\n{name}: saved {self.args.out}", file=sys.stderr, flush=True)
            if submitted and name == "SIGUSR2":
                self.previous[signal.SIGUSR2](signal.SIGUSR2, None)  # submitit's: requeues the job, and exits
            print("repeat the command to resume", file=sys.stderr, flush=True)
        if submitted == "slurm" and name != "SIGINT":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(900)  # a task that leaves early would complete or fail the SLURM job
        self.restore()
        leave_ranks()
        raise SystemExit(130 if name == "SIGINT" else 0)

    def restore(self):
        """Restore the previous handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def leave_ranks():
    """Destroy the process group, if there is one, before a program ends."""
    cpu_group.cache_clear()  # a group in use would outlive this, and its threads might abort Python's exit
    if dist.is_initialized():
        dist.destroy_process_group()


def finish(log, signals):
    """Close the log, leave the process group, and say where everything is and what to type next."""
    signals.restore()
    log.close()
    leave_ranks()
    if rank() > 0:
        return
    out = Path(log.args.out)
    accuracies = re.findall(r'"knn": ([0-9.e-]+)', (out / "log.jsonl").read_text())
    if accuracies:
        first, last = float(accuracies[0]), float(accuracies[-1])
        print(f"kNN accuracy: {first:.1%} at initialisation, {last:.1%} now")
    print(f"{out}: backbone.pth (torchvision's names), checkpoint.pt, log.jsonl, args.json")
    print(f"next: tensorboard --logdir {out}")
    if find_resnet(load_checked(out / "backbone.pth")):  # what eval_linear.py evaluates
        command = ["python", "eval_linear.py", "--backbone", f"{out}/backbone.pth"]
        if log.args.data:
            command += ["--data", log.args.data]
        if not accuracies:  # without labels
            command += ["--mode", "features"]
        print(f"      {shlex.join(command)}")


# ------------------------------------------------------------------------------------------------- launch


def launch(main, get_args):
    """Run a script's main() here or submit it to a scheduler; every script ends with this call."""
    parser = Parser(usage=argparse.SUPPRESS, add_help=False)
    add = parser.add_argument_group("launch").add_argument
    # fmt: off
    add("--submit", choices=["slurm", "local"], help="run as a SLURM job, or locally in the background, to "
        "try a submission without SLURM")
    add("--sweep", nargs="+", default=[], metavar="FLAG=V1,V2", help="with --submit, a run below --out for "
        "each combination; true, false: --flag, --no-flag; 'flag=1 2,3': --flag 1 2, then --flag 3")
    add("--nodes", type=number(int, 1), default=1, help="number of nodes")
    add("--gpus", type=number(int, 0), default=0, help="GPUs per node, one rank each")
    add("--tasks", type=number(int, 1), default=1, help="ranks per node, without GPUs")
    add("--cpus", type=number(int, 1), default=1, help="cores per rank")
    add("--minutes", type=number(int, 1), default=60, help="time limit; a run that reaches it saves, "
        "is requeued and resumes")
    add("--partition", help="partition of the cluster")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="more sbatch options: account, qos, ...")
    # fmt: on
    job, argv = parser.parse_known_args()
    if {"--help", "-h"} & set(argv):
        return show_help(get_args, parser)
    if job.submit:
        return submit(job, combinations(job.sweep, argv, get_args))
    for name, value in vars(job).items():
        if value != parser.get_default(name):
            fail(f"--{name} is for jobs: give --submit slurm or --submit local, too")
    try:
        main(get_args(argv))
    except torch.OutOfMemoryError as error:
        fail(f"out of memory ({error}): give a smaller --batch-size or, in pretraining, --micro-batch")
    except RuntimeError as error:
        refuse_lost_worker(error)
        raise
    finally:  # workers ignore the signals that would end them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()


def show_help(get_args, launch_parser):
    """Print the flags of a script and those of launching; a reader such as `head` may close the pipe."""
    try:
        with contextlib.suppress(SystemExit):
            get_args(["--help"])
        print("\n" + launch_parser.format_help(), end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit


def combinations(sweep, argv, get_args):
    """The flags of each run of a sweep, each with an --out of its own; wrong values are refused."""
    out = Path(get_args(argv).out).absolute()
    axes = []
    for item in sweep:
        flag, _, values = item.partition("=")
        if not values:
            fail(f"--sweep {item}: give flag=value,value")
        axes.append([f"{flag}={value}" for value in values.split(",")])
    runs = []
    for settings in itertools.product(*axes):
        flags = list(argv)
        for setting in settings:
            flag, _, value = setting.partition("=")
            switch = {"true": [f"--{flag}"], "false": [f"--no-{flag}"]}
            flags += switch.get(value, [f"--{flag}", *value.split()])
        name = re.sub(r"[^\w.,=+-]", "_", ",".join(settings))
        runs.append([*flags, "--out", str(out / name)])
        get_args(runs[-1])
    return runs


class Job(submitit.helpers.Checkpointable):
    """A task of a job: one rank of a run. After a requeue it runs again, and the run resumes."""

    def __init__(self, script, flags):
        self.script = script
        self.flags = flags

    def __call__(self):
        job = submitit.JobEnvironment()
        job.paths.result_pickle.unlink(missing_ok=True)  # left before a requeue
        ranks = submitit.helpers.TorchDistributedEnvironment()
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        ranks.master_port = 20000 + (ranks.master_port + 100 * restarts) % 40000  # the old one may be in use
        ranks.export(set_cuda_visible_devices=False, overwrite=True)
        sys.path.insert(0, os.path.dirname(self.script))
        sys.argv = [self.script, *self.flags]
        runpy.run_path(self.script, run_name="__main__")


def submit(job, runs):
    """Submit all runs as a job array, with copies of the code as it is now, and print where they will be."""
    out = Path(os.path.commonpath([flags[-1] for flags in runs]))
    folder = out / "submit" / f"{time.strftime('%Y%m%d-%H%M%S')}-{TOKEN}"
    try:
        folder.mkdir(parents=True)
        script = shutil.copy(sys.argv[0], folder)
        shutil.copy(__file__, folder)
        executor = submitit.AutoExecutor(folder, job.submit, **{f"{job.submit}_max_num_timeout": 1000})
        executor.update_parameters(
            name=out.name,
            nodes=job.nodes,
            gpus_per_node=job.gpus or None,
            tasks_per_node=job.gpus or job.tasks,
            cpus_per_task=job.cpus,
            timeout_min=job.minutes,
            stderr_to_stdout=True,
            slurm_partition=job.partition,
            slurm_signal_delay_s=min(300, 6 * job.minutes),
            slurm_srun_args=["--kill-on-bad-exit=1"],
            slurm_setup=["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"],
            slurm_additional_parameters={
                "requeue": True,
                **dict(item.partition("=")[::2] for item in job.slurm),
            },
        )
        os.environ["CODE_COMMIT"] = provenance(0)["commit"]  # inherited by jobs, which run copies
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the job imports the copy of this file
        with executor.batch():
            jobs = [executor.submit(Job(script, flags)) for flags in runs]
    except (OSError, ValueError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.removedirs(folder.parent)  # as far as they are empty
        fail(f"--submit {job.submit}: {str(error).strip().splitlines()[-1]}")
    for submitted, flags in zip(jobs, runs, strict=True):
        print(f"job {submitted.job_id}: {flags[-1]}, log {submitted.paths.stdout}")
