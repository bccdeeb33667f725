"""What things cost, side by side: all sides of a comparison take turns in one process.

    python tests/bench.py                      reduced sizes, minutes on two CPU cores; on a GPU if there is one
    python tests/bench.py --full               the official sizes
    python tests/bench.py --only d --full      on a GPU: the training step of each method, in ten minutes
    python tests/bench.py --only a --images FOLDER --json bench.json

Times are medians over the rounds; ratios are medians of the ratios of each round.
"""

import argparse
import contextlib
import copy
import ctypes
import gc
import io
import itertools
import json
import math
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torchvision.io import write_jpeg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import corinfomax
import hsic
import mmd_sphere
import music

METHODS = dict(hsic=hsic, corinfomax=corinfomax, music=music, mmd_sphere=mmd_sphere)


@contextlib.contextmanager
def timed(device, times):
    """Append the seconds that pass within, on the clock of the device."""
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


def alternate(sides, rounds, device):
    """Seconds of each side in each round; a first round is thrown away."""
    times = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            with timed(device, times[name]):
                run()
    return {name: values[1:] for name, values in times.items()}


def ratio(times, others):
    """The median over rounds of time / other time."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def peak_memory(device):
    """MiB at the peak since reset_memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_memory(device):
    """Watch for a peak of memory from now on; MiB in use, NaN where the kernel does not offer it."""
    gc.collect()
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # gives back what is free but kept
            Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return math.nan
    return peak_memory(device)


def pil_transform(view):
    """The same view by torchvision's transforms of PIL images, blurred by PIL as in the official codes."""
    crop = T.RandomResizedCrop(view.size, view.area, interpolation=T.InterpolationMode.BICUBIC)
    jitter = T.RandomApply([T.ColorJitter(*view.jitter)], view.jitter_p)
    blur = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))))
    colours = [jitter, T.RandomGrayscale(view.gray_p), T.RandomApply([blur], view.blur_p)]
    last = [T.RandomSolarize(128, view.solarise_p), T.ToTensor(), T.Normalize(0.45, 0.225)]
    return T.Compose([crop, T.RandomHorizontalFlip(), *colours, *last])


def pil_pipeline(images, rows, views):
    transforms = [pil_transform(view) for view in views]
    for i in rows.tolist():
        image = Image.open(os.fsdecode(images.data[i])).convert("RGB")
        for transform in transforms:
            transform(image)


def write_images(folder, count):
    """JPEGs of 500 x 375 pixels and about 110 KB, ImageNet's usual size."""
    for i, image in enumerate(common.draw_patterns(count, 0).data.float()):
        image = F.interpolate(image[None], (375, 500), mode="bicubic")[0]
        image += 25 * torch.randn(image.shape)
        write_jpeg(image.clamp(0, 255).byte(), f"{folder}/{i}.jpg", quality=85)


def input_pipeline(options):
    """(a) input pipeline: two views of 224 pixels from JPEGs, a core"""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.images is None:
            write_images(folder, 64)
        images = common.list_folder(options.images or Path(folder))
        rows = torch.arange(min(len(images), 320 if options.full else 64))
        args = hsic.get_args(["--views", "byol", "--size", "224", "--workers", "0"])
        views, cpu = common.views_of(args), torch.device("cpu")
        crops = common.Crops(images, views, seed=0)
        order = [(step, 0, part) for step, part in enumerate(rows.split(32))]
        sides = {
            "PIL + torchvision": partial(pil_pipeline, images, rows, views),
            "decoding": lambda: [images.read(i) for i in rows],
            "worker: + two crops": lambda: [crops[0, i] for i in rows.tolist()],
            "all: + augmentation": lambda: list(common.view_batches(images, order, views, args, cpu)),
        }
        times = alternate(sides, options.rounds, cpu)
    for side in sides:
        speed = len(rows) / statistics.median(times[side])
        yield {"side": side, "images/s": speed, "x PIL": ratio(times["PIL + torchvision"], times[side])}


def make_views(images, views):
    """Views as common.view_batches makes them: of whole images if they are small, or of the crops of files."""
    rows = len(images) if images.is_cuda else max(1, 2**18 // images.shape[2] ** 2)
    u = common.draw(0, 0, torch.arange(len(images)), len(views))
    whole = images.shape[2] <= common.MEMORY_SIDE
    for v, view in enumerate(views):
        for part, numbers in zip(images.split(rows), u[:, v].split(rows), strict=True):
            common.make_view(part, numbers, view, common.ORDERS[v], whole)


def augmentation(options):
    """(b) augmentation of one view of decoded images on the device; a core, if it is a CPU"""
    torch.set_num_threads(1)
    names = ["byol, view 1", "byol, view 2", "cifar"]
    views = [*common.VIEWS["byol"], common.CIFAR]
    for size, n in [(32, 1024), (224, 256)] if options.full else [(32, 512), (224, 32)]:
        images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=options.device)
        sides = [partial(make_views, images, [view._replace(size=size)]) for view in views]
        times = alternate(dict(zip(names, sides, strict=True)), options.rounds, options.device)
        for name in names:
            yield {"view": name, "pixels": size, "images/s": n / statistics.median(times[name])}


def plain_features(z, f=512):
    """Random Fourier features of z (..., d) for the IMQ kernel, a new draw."""
    omega = torch.randn(z.shape[-1], f, device=z.device) * torch.randn(f, device=z.device)
    return math.sqrt(2 / f) * torch.cos(z @ omega + 2 * math.pi * torch.rand(f, device=z.device))


def plain_hsic(zs):
    """Li et al. 2021: features of all views, whole-batch means."""
    M, N, _ = zs.shape
    zs = F.normalize(zs, dim=2)
    phi, psi = plain_features(zs), plain_features(zs)
    zy = phi.sum(0).square().sum() / (N * M * (M - 1)) - phi.mean((0, 1)).square().sum()
    phi = (phi - phi.mean((0, 1))).flatten(0, 1)
    psi = (psi - psi.mean((0, 1))).flatten(0, 1)
    return 3 * ((phi.mT @ psi).square().sum() / (N * M) ** 2 + 1e-14).sqrt() - zy


def plain_exact_hsic(zs):
    """The same with the kernel itself: the centred Gram matrix, autograd through both of its sides."""
    M, N, _ = zs.shape
    z = F.normalize(zs, dim=2).flatten(0, 1)
    K = (1 + (2 - 2 * z @ z.mT).clamp(min=0)).rsqrt()
    same = K.view(M, N, M, N).diagonal(dim1=1, dim2=3).sum()
    zy = same / (N * M * (M - 1)) - K.mean()
    centred = K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()
    return 3 * (centred.square().sum() / (N * M) ** 2 + 1e-14).sqrt() - zy


def plain_corinfomax(zs, alpha=500.0, forget=0.01):
    """Ozsoy et al. 2022, the first step of the recursion, with slogdet, in float32."""
    zs = F.normalize(zs, dim=2)
    loss = alpha * F.mse_loss(*zs)
    eye = torch.eye(zs.shape[2], device=zs.device)
    for z in zs:
        centred = z - (1 - forget) * z.mean(0)
        R = forget * eye + (1 - forget) * centred.mT @ centred / len(z)
        loss = loss - torch.linalg.slogdet(R + 1e-8 * eye)[1] / len(R)
    return loss


def plain_music(zs, s=80):
    """Niu, Wang 2022: P whole, clamped at 1e-8, autograd through it."""
    _, n, d = zs.shape
    p1, p2 = zs.view(2, n, d // s, s).softmax(3)
    P = (p1.flatten(1).mT @ p2.flatten(1) / n).clamp(min=1e-8)
    blocks = (P * P.log()).view(d // s, s, d // s, s)
    diagonal = torch.einsum("aiai->", blocks) / (d // s)
    pairs = blocks.sum((1, 3))  # of segments
    off_diagonal = (pairs.sum() - pairs.trace()) / (pairs.numel() - len(pairs))
    return diagonal + off_diagonal - (p1 * p2).sum(2).clamp(min=1e-8).log().mean()


def plain_mmd_sphere(zs, alpha=40000.0, b=(1, 40)):
    """Zheng et al. 2023: the Gram matrix of each view, autograd through both of its sides."""
    zs = F.normalize(zs, dim=2)
    loss = alpha * F.mse_loss(*zs)
    for z in zs:
        t = z @ z.mT
        P2 = (len(z[0]) * t**2 - 1) / (len(z[0]) - 1)
        P3 = ((len(z[0]) + 2) * t * P2 - 2 * t) / len(z[0])
        loss = loss + (t + 40 * P2 + 40 * P3).mean() / 2
    return loss
