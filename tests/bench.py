"""Benchmarks, side by side: all sides of a comparison take turns in one process.

    python tests/bench.py                    reduced sizes, minutes on two CPU cores; on a GPU if there is one
    python tests/bench.py --only d --full    on a GPU: the training step of each method, in ten minutes

Seconds are medians over the rounds; a ratio is the median of the rounds' ratios to the first side's time.
"""

import contextlib
import ctypes
import gc
import io
import json
import math
import os
import resource
import sys
import tempfile
import time
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import corinfomax
import hsic
import mmd_sphere
import music


@contextlib.contextmanager
def timed(device, times):
    """Append the seconds spent inside the context, by the clock of the device."""
    if device.type == "cpu":
        begin = time.perf_counter()
        yield
        times.append(time.perf_counter() - begin)
    else:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)


def peak_memory(device, reset=False):
    """Peak MiB since a reset, which itself returns the MiB in use; NaN if the kernel does not offer it."""
    if reset:
        gc.collect()
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return math.nan
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free but kept
        Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(sides, options, device, number=1):
    """Yield a row for each side: seconds, ratio to the first side, MiB added, items per second."""
    times = {name: [] for name in sides}
    for _ in range(options.rounds + 1):
        for name, run in sides.items():
            with timed(device, times[name]):
                run()
    first, *_ = times.values()
    for name, run in sides.items():
        before = peak_memory(device, reset=True)
        run()
        row = {"s": median(times[name][1:]), "ratio": median(map(truediv, times[name][1:], first[1:]))}
        yield name, {**row, "added MiB": peak_memory(device) - before, "per second": number / row["s"]}


def pil_pipeline(images, views):
    """Views by torchvision's transforms of PIL images, blurred by PIL as in the official codes."""
    transforms = []
    blur = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(()).item())))
    for view in views:
        crop = T.RandomResizedCrop(view.size, view.area, interpolation=T.InterpolationMode.BICUBIC)
        jitter = T.RandomApply([T.ColorJitter(*view.jitter)], view.jitter_p)
        steps = [crop, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(view.gray_p)]
        steps += [T.RandomApply([blur], view.blur_p), T.RandomSolarize(128, view.solarise_p)]
        transforms.append(T.Compose([*steps, T.ToTensor(), T.Normalize(0.45, 0.225)]))
    for path in images.data:
        image = Image.open(os.fsdecode(path)).convert("RGB")
        for transform in transforms:
            transform(image)


def input_pipeline(options):
    """(a) two views of 224 pixels from JPEGs, on one core; the goal for decoding and crops is 0.2"""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(64):  # of about 110 KB, ImageNet's usual size
            Image.effect_noise((500, 375), 50).convert("RGB").save(f"{folder}/{i}.jpg", quality=85)
        images = common.list_folder(options.images or Path(folder))
        rows = torch.arange(min(len(images), 320 if options.full else 64))
        images = images.take(rows)
        args = hsic.get_args(["--views", "byol", "--size", "224", "--workers", "0"])
        views, cpu = common.views_of(args), torch.device("cpu")
        order = [(step, 0, part) for step, part in enumerate(rows.split(32))]
        sides = {
            "PIL and torchvision": partial(pil_pipeline, images, views),
            "decoding and crops": lambda: list(common.load(images, order, views, args, cpu)),
            "and augmentation": lambda: list(common.view_batches(images, order, views, args, cpu)),
        }
        yield from compare(sides, options, cpu, len(images))


def first_batch(train, args, device):
    """(step, views, labels) as the loop of a method gets them, from images in memory."""
    order = common.epoch_order(len(train), args, 0, 1)
    return next(common.view_batches(train, order, common.views_of(args), args, device))


def augmentation(options):
    """(b) crop and augmentation of views on the device; on one core if it is a CPU"""
    train = common.to_memory(common.draw_patterns(8192, 0), options.device)
    for size, n in [(32, 8192), (224, 256)] if options.full else [(32, 1024), (224, 32)]:
        for name in common.VIEWS:
            args = hsic.get_args([f"--views={name}", f"--size={size}", f"--batch-size={n}"])
            side = {f"{name}, {size} pixels": partial(first_batch, train, args, options.device)}
            yield from compare(side, options, options.device, 2 * n)


def plain_hsic(zs, f=512):
    M, N, d = zs.shape
    omega = torch.randn(2, 1, d, f, device=zs.device) * torch.randn(2, 1, 1, f, device=zs.device)
    phase = 2 * math.pi * torch.rand(2, 1, 1, f, device=zs.device)
    features = math.sqrt(2 / f) * torch.cos(F.normalize(zs, dim=2) @ omega + phase)  # (2, M, N, f)
    means = features.mean((1, 2), keepdim=True)
    phi, psi = (features - means).flatten(1, 2)
    root = ((phi.mT @ psi).square().sum() / (N * M) ** 2 + 1e-14).sqrt()
    return 3 * root - features[0].sum(0).square().sum() / (N * M * (M - 1)) + means[0].square().sum()


def plain_exact_hsic(zs):
    M, N, _ = zs.shape
    z = F.normalize(zs, dim=2).flatten(0, 1)
    K = (1 + (2 - 2 * z @ z.mT).clamp(min=0)).rsqrt()  # (M N, M N)
    same = K.view(M, N, M, N).diagonal(dim1=1, dim2=3).sum() / (N * M * (M - 1))
    centred = K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()
    return 3 * (centred.square().mean() + 1e-14).sqrt() - same + K.mean()


def plain_cor(zs, forget=0.01):
    zs, eye = F.normalize(zs, dim=2), torch.eye(zs.shape[2], device=zs.device)
    centred = zs - (1 - forget) * zs.mean(1, keepdim=True)
    R = forget * eye + (1 - forget) * centred.mT @ centred / zs.shape[1]
    logdets = [torch.linalg.slogdet(r + 1e-8 * eye)[1] for r in R]  # a batch can fail in MKL: pytorch 142815
    return 500 * F.mse_loss(*zs) - sum(logdets) / len(eye)


def plain_music(zs, s=80):
    p1, p2 = zs.unflatten(2, (-1, s)).softmax(3)
    P = (p1.flatten(1).mT @ p2.flatten(1) / len(p1)).clamp(min=1e-8)
    blocks = (P * P.log()).unflatten(1, (-1, s)).unflatten(0, (-1, s))  # (S, s, S, s)
    off_diagonal = (blocks.sum() - torch.einsum("aiaj->", blocks)) / (len(blocks) ** 2 - len(blocks))
    return torch.einsum("aiai->", blocks) / len(blocks) + off_diagonal - (p1 * p2).sum(2).log().mean()


def plain_sphere(zs):
    zs = F.normalize(zs, dim=2)
    P = mmd_sphere.legendre(zs @ zs.mT, zs.shape[2], 3)  # each (2, N, N)
    return 40000 * F.mse_loss(*zs) + (P[1] + 40 * P[2] + 40 * P[3]).mean()


def backward(loss_of, zs, repeats=1):
    for _ in range(repeats):
        loss_of(zs).backward()


def losses(options):
    """(c) losses, forward and backward, against the official formulas; a 32nd of the rows without --full"""
    cor = corinfomax.CorInfoMax(512).to(options.device)
    sphere = partial(mmd_sphere.mmd_sphere_loss, alpha=40000, b=(1, 40, 40))
    cases = [  # views, rows and dimension; the plain loss is repeated: each draw is a device's, officially
        ("hsic, 1 draw", (4, 4096, 256), lambda zs: hsic.hsic_loss(zs)[0], plain_hsic, 1),
        ("hsic, 128 draws", (4, 4096, 256), lambda zs: hsic.hsic_loss(zs, draws=128)[0], plain_hsic, 128),
        ("hsic, exact", (4, 4096, 256), lambda zs: hsic.hsic_loss(zs, f=0)[0], plain_exact_hsic, 1),
        ("corinfomax", (2, 1536, 512), lambda zs: cor(*F.normalize(zs, dim=2), 500)[0], plain_cor, 1),
        ("music", (2, 2048, 8160), lambda zs: music.music_loss(*zs, 80)[0], plain_music, 1),
        ("mmd_sphere", (2, 2048, 32768), lambda zs: sphere(zs)[0], plain_sphere, 1),
    ]
    for name, (v, n, d), here, plain, repeats in cases:
        zs = torch.randn(v, n if options.full else n // 32, d, device=options.device, requires_grad=True)
        sides = {f"{name} {tuple(zs.shape)}, plain": partial(backward, plain, zs, repeats)}
        sides[f"{name} {tuple(zs.shape)}"] = partial(backward, here, zs)
        yield from compare(sides, options, options.device)


def measure_step(module, options, *flags):
    """A row of times: main() of a method takes turns with its networks alone and with the augmentation."""
    args = module.get_args([*flags, *options.flags, "--log-every=1000000"])
    times, memory, resume = {"step": [], "network": [], "views": []}, [], mock.Mock(return_value=0)

    def network(online, xs, target=None, **_):
        online.zero_grad()
        with common.autocast(args, options.device):
            if getattr(args, "target", False):
                common.per_view(target, xs)
            zs = online(xs)[1]
        zs.backward(torch.ones_like(zs))

    def batches(train, *_):
        _, xs, y = first_batch(train, args, options.device)
        for step in range(options.rounds + 1):
            before = peak_memory(options.device, reset=step == 1)
            with timed(options.device, times["step"]):
                yield step, xs, y
            memory.append(peak_memory(options.device) - (before if options.device.type == "cpu" else 0))
            with timed(options.device, times["network"]):
                network(xs=xs, **resume.call_args.args[1])
            with timed(options.device, times["views"]):
                first_batch(train, args, options.device)

    parts = dict(resume=resume, batches=batches, save=mock.Mock(), finish=mock.Mock())
    parts |= dict(evaluate=mock.Mock(return_value={}))
    with tempfile.TemporaryDirectory() as args.out, mock.patch.multiple(common, **parts):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.main(args)
    row = {f"{name} s": median(values[1:]) for name, values in times.items()}
    row["images/s"] = args.batch_size / (row["step s"] + row["views s"])
    row["outside %"] = 100 - 100 * median(map(truediv, times["network"][1:], times["step"][1:]))
    name = f"{module.__name__}, {args.arch}, {args.size} px, {args.batch_size} by {args.micro_batch}"
    return name, row | {"MiB": memory[1]}  # added on a CPU, in all on a GPU


def training_steps(options):
    """(d) the training step against its networks alone; the goal is 10 % outside of them, 5 % on a GPU"""
    small = ["--recipe=cifar10", "--stem=imagenet", "--batch-size=256"]
    recipes = [["--recipe=cifar10"]] if options.full else [small]
    if options.full and options.device.type == "cuda":
        recipes.append(["--recipe=imagenet", "--batch-size=256"])
    for flags in recipes:
        for module in (hsic, corinfomax, music, mmd_sphere):
            yield measure_step(module, options, *flags)


def optimizers(options):
    """(e) a step of the optimisers, and of an average of the weights, for a ResNet-50"""
    net, average = [common.resnet("resnet50")[0].to(options.device) for _ in range(2)]
    net(torch.randn(2, 3, 64, 64, device=options.device)).sum().backward()
    sides = {}
    for name in ("sgd", "lars", "adamw"):
        sides[name] = common.make_optimizer(net, name, 0.1, 1e-4).step
    sides["average"] = partial(common.ema_update, average, net, 0.99)
    yield from compare(sides, options, options.device)


def micro_batches(options):
    """(f) memory that a step of hsic adds, by batch and micro-batch"""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: memory goes back at once when it is freed
    pairs = [("64", "0"), ("64", "16"), ("128", "0"), ("128", "16"), ("128", "32")]
    for batch, micro in pairs:
        flags = ["--recipe=cifar10", "--stem=imagenet", "--batch-size", batch, "--micro-batch", micro]
        yield measure_step(hsic, options, *flags, "--size=96" if options.full else "--size=48")


def main():
    parser = common.Parser(description=__doc__)
    parser.add_argument("--only", default="a,b,c,d,e,f", help="sections")
    parser.add_argument("--full", action="store_true", help="the official sizes")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of JPEGs (default: made here)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="for the tables", default=os.devnull)
    options = parser.parse_args()
    base = hsic.get_args(["--out", "bench"])
    options.device = common.start(base, __file__)
    options.flags = [f"--device={options.device.type}", f"--precision={base.precision}"]
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    threads = torch.get_num_threads()
    sections = [input_pipeline, augmentation, losses, training_steps, optimizers, micro_batches]
    tables = {}
    for key in options.only.split(","):
        section = sections["abcdef".index(key)]
        torch.set_num_threads(1 if key in "ab" else threads)
        head = f"{hardware}, torch {torch.__version__}, {torch.get_num_threads()} threads, {base.precision}"
        print(f"\n{section.__doc__}\n{head}")
        rows = tables[f"{section.__doc__}; {head}"] = {}
        for name, row in section(options):
            if not rows:
                print(" " * 46 + "".join(f"{column:>11}" for column in row))
            print(f"{name:46}" + "".join(f"{value:11.4g}" for value in row.values()), flush=True)
            rows[name] = row
    options.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
