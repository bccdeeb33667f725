"""What things cost, side by side: all sides of a comparison take turns in one run; medians of the rounds.

    python tests/bench.py                  reduced sizes, minutes on two CPU cores; on a GPU if there is one
    python tests/bench.py --full           the official sizes
    python tests/bench.py --only a,c       some sections; --images FOLDER for own JPEGs, --json FILE

Sections: (a) input pipeline, (b) augmentation, (c) losses against plain transcriptions of the official
formulas, (d) the training step against the network alone, (e) communication on gloo, (f) LARS against SGD,
(g) what 8 and 64 H200 need at least, on paper, (h) memory by micro-batch.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import itertools
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import write_jpeg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import corinfomax
import hsic
import mmd_sphere
import music

# ------------------------------------------------------------------------------------------ measuring


CPU = torch.device("cpu")


def seconds(run, device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def alternate(sides: dict, rounds: int, device=CPU) -> dict[str, list[float]]:
    """Seconds of each side in each round; a first round is thrown away."""
    times = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, run in sides.items():
            times[name].append(seconds(run, device))
    return {name: values[1:] for name, values in times.items()}


def ratio(times: dict, name: str, other: str) -> float:
    """The median over rounds of time(name) / time(other)."""
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


class PeakMemory:
    """with PeakMemory(device) as peak: ... leaves what that added at its peak in peak.MiB, from the allocator
    or the kernel's high-water mark; NaN without one."""

    def __init__(self, device):
        self.cuda, self.MiB = device.type == "cuda", math.nan

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
            return self
        self.before = math.nan
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # memory that is free but kept
            Path("/proc/self/clear_refs").write_text("5")  # resets the mark
            self.before = self.status("VmRSS")
        return self

    def __exit__(self, *_):
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else self.status("VmHWM")
        self.MiB = peak - self.before

    @staticmethod
    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def peak_memory(run, device) -> float:
    with PeakMemory(device) as peak:
        run()
    return peak.MiB


class Table:
    """Rows for the terminal and the JSON file."""

    def __init__(self):
        self.rows = []

    def title(self, text: str) -> None:
        self.section = text
        print(f"\n{text}", flush=True)

    def add(self, what: str, value: float, unit: str, note: str = "") -> None:
        self.rows.append(dict(section=self.section, what=what, value=value, unit=unit, note=note))
        print(f"  {what:58s}{value:10.4g} {unit:10s} {note}", flush=True)


# --------------------------------------------------------------------------------- (a), (b): the views


class Blur:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        sigma = random.uniform(0.1, 2.0)
        return image.filter(ImageFilter.GaussianBlur(sigma)) if random.random() < self.p else image


class Solarise(Blur):
    def __call__(self, image):
        return ImageOps.solarize(image) if random.random() < self.p else image


def pil_views(size):
    """The two views of the PIL pipeline, BYOL's recipe as in the official codebases."""

    def view(blur, solarise):
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        crop = T.RandomResizedCrop(size, (0.08, 1), interpolation=T.InterpolationMode.BICUBIC)
        steps = [crop, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2), Blur(blur)]
        return T.Compose([*steps, Solarise(solarise), T.ToTensor(), T.Normalize(common.MEAN, common.STD)])

    return view(1.0, 0.0), view(0.1, 0.2)


def make_images(folder, count=64):
    """JPEGs of 500 x 375 pixels and about 110 KB, ImageNet's usual size."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse = torch.rand(1, 3, 24, 32, generator=generator)
        image = F.interpolate(coarse, (375, 500), mode="bicubic")[0]
        image = image + 0.12 * torch.randn(3, 375, 500, generator=generator)
        write_jpeg((image.clamp(0, 1) * 255).byte(), str(folder / f"{i:03}.jpg"), quality=85)
    return folder


def input_pipeline(table, options):
    table.title("(a) input pipeline, 224 pixels, two views, one core")
    folder = options.images or make_images(Path(tempfile.mkdtemp()))
    files = common.list_folder(folder, folder / "none").train
    index = torch.arange(min(320, len(files.labels)))
    args = hsic.get_args(["--batch-size", "32", "--views", "byol", "--size", "224", "--device", "cpu"])
    crops = common.Crops(files, common.views_for(args), 0)
    pair = pil_views(224)

    def pil():
        for i in index.tolist():
            with Image.open(files.path(i)) as image:
                rgb = image.convert("RGB")
                [view(rgb) for view in pair]

    sides = {
        "PIL pipeline": pil,
        "decoding alone": lambda: [files.read(i) for i in index.tolist()],
        "worker: decode, two crops": lambda: [crops.__getitems__((0, part)) for part in index.split(32)],
    }
    times = alternate(sides, options.rounds)
    for name in sides:
        note = f"{1 / ratio(times, name, 'PIL pipeline'):.2f} x PIL"
        if name.startswith("worker"):
            note += f", {100 / ratio(times, name, 'decoding alone'):.0f} % of decoding"
        table.add(name, len(index) / statistics.median(times[name]), "images/s", note)


def augmentation(table, options):
    for size, n in ((32, 1024), (224, 64)):
        where = "one core" if options.device.type == "cpu" else "PIL on one core"
        table.title(f"(b) crop and augmentation of decoded images, {size} pixels, two views, {where}")
        small = common.draw_glyphs(n, 0)
        images = F.interpolate(small.images.float(), size).byte() if size != 32 else small.images
        data = common.Pixels(images.to(options.device), small.labels)
        flags = ["--batch-size", str(min(n, 256)), "--views", "byol", "--size", str(size)]
        args = hsic.get_args([*flags, "--device", options.device.type])
        pictures = [T.functional.to_pil_image(image) for image in images[: n // 4]]
        pair, steps = pil_views(size), n // args.batch_size
        sides = {
            "PIL pipeline": lambda pair=pair, pictures=pictures: [
                [view(picture) for view in pair] for picture in pictures * 4
            ],
            "batched": lambda data=data, args=args, steps=steps: list(
                common.view_batches(data, args, options.device, 0, steps)
            ),
        }
        times = alternate(sides, options.rounds, options.device)
        for name in sides:
            note = f"{1 / ratio(times, name, 'PIL pipeline'):.2f} x PIL"
            table.add(name, n / statistics.median(times[name]), "images/s", note)


# ---------------------------------------------------------------------------------------- (c): losses


def plain_hsic(zs, features):
    """Li et al. 2021, as the official code has it: features of all views, then whole-batch means."""
    (omega, phase), (omega2, phase2) = features
    zs = F.normalize(zs, dim=2)
    M, N, _ = zs.shape
    phi, psi = (math.sqrt(2 / len(p)) * torch.cos(zs @ o + p) for o, p in ((omega, phase), (omega2, phase2)))
    zy = phi.sum(0).square().sum() / (N * M * (M - 1)) - phi.mean((0, 1)).square().sum()
    phi, psi = (x.flatten(0, 1) - x.mean((0, 1)) for x in (phi, psi))
    return -zy + 3 * ((phi.mT @ psi).square().sum() / (N * M) ** 2 + 1e-14).sqrt()


def plain_corinfomax(z1, z2, alpha=500.0, forget=0.01, eps=1e-8):
    """Ozsoy et al. 2022, the first step of the recursion, with slogdet, in float32 as officially."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    loss = alpha * F.mse_loss(z1, z2)
    eye = torch.eye(z1.shape[1], device=z1.device)
    for z in (z1, z2):
        centred = z - (1 - forget) * z.mean(0)
        R = forget * eye + (1 - forget) * centred.mT @ centred / len(z)
        loss = loss - torch.linalg.slogdet(R + eps * eye)[1] / len(R)
    return loss


def plain_music(z1, z2, s):
    """Niu, Wang 2022: P whole, clamped at 1e-8, autograd through it."""
    n, S = len(z1), z1.shape[1] // s
    p1, p2 = (z.view(n, S, s).softmax(2) for z in (z1, z2))
    P = (p1.flatten(1).mT @ p2.flatten(1) / n).clamp(min=1e-8)
    blocks = (P * P.log()).view(S, s, S, s)
    diagonal, per_pair = torch.einsum("aiai->", blocks) / S, blocks.sum((1, 3))
    off_diagonal = (per_pair.sum() - per_pair.diagonal().sum()) / (S * (S - 1))
    return diagonal + off_diagonal - (p1 * p2).sum(2).clamp(min=1e-8).log().mean()


def plain_mmd_sphere(z1, z2, alpha=40000.0, b=(1, 40, 40)):
    """Zheng et al. 2023: the Gram matrix of each view, autograd through both of its sides."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    d, loss = z1.shape[1], alpha * F.mse_loss(z1, z2)
    for z in (z1, z2):
        t = z @ z.mT
        P = [torch.ones_like(t), t]
        for l in range(1, len(b)):
            P.append(((2 * l + d - 2) * t * P[l] - l * P[l - 1]) / (l + d - 2))
        loss = loss + sum(w * p for w, p in zip(b, P[1:], strict=True)).mean() / 2
    return loss


def sides_of(method, N, d, device):
    """Here and the plain formula, forward and backward: {name: function} for two views of N rows."""
    torch.manual_seed(0)
    v = 4 if method == "hsic" else 2
    leaf = torch.randn(v, N, d, device=device, requires_grad=True)
    rows = [x.detach().clone().requires_grad_() for x in (leaf if v == 2 else ())]
    if method == "hsic":
        draws = [hsic.sample_features(d, 512, "imq", 0, k, device) for k in range(2)]
        here, plain = lambda: hsic.hsic_loss(leaf)[0], lambda: plain_hsic(leaf, draws)
    elif method == "corinfomax":
        criterion = corinfomax.CorInfoMax(d).to(device)
        here = lambda: criterion(*F.normalize(leaf, dim=2), 500.0)[0]
        plain = lambda: plain_corinfomax(*rows)
    elif method == "music":
        s = 80 if d % 80 == 0 else 32
        here, plain = lambda: music.music_loss(*leaf.unbind(), s)[0], lambda: plain_music(*rows, s)
    else:
        here = lambda: mmd_sphere.mmd_sphere_loss(leaf, 40000.0, [1, 40, 40])[0]
        plain = lambda: plain_mmd_sphere(*rows)

    def step(loss_of):
        for x in (leaf, *rows):
            x.grad = None
        loss_of().backward()

    return {"here": lambda: step(here), "plain": lambda: step(plain)}


METHODS = "hsic", "corinfomax", "music", "mmd_sphere"
OFFICIAL = [("hsic", 4096, 256), ("corinfomax", 1536, 512), ("music", 2048, 8160)]
OFFICIAL += [("mmd_sphere", 2048, 8192), ("mmd_sphere", 2048, 32768)]
REDUCED = [("hsic", 1024, 256), ("corinfomax", 512, 256), ("music", 512, 2080)]
REDUCED += [("mmd_sphere", 512, 2048), ("mmd_sphere", 512, 8192)]


def losses(table, options):
    table.title("(c) losses, forward and backward, float32, against a plain transcription")
    full = options.full or options.device.type == "cuda"
    for method, N, d in OFFICIAL if full else REDUCED:
        sides = sides_of(method, N, d, options.device)
        times = alternate(sides, 3, options.device)
        here, plain = (
            statistics.median(peak_memory(sides[k], options.device) for _ in range(3)) for k in sides
        )
        share, what = ratio(times, "here", "plain"), f"{method}, N = {N}, d = {d}"
        note = f"plain {statistics.median(times['plain']):.4g} s, ratio {share:.2f}"
        table.add(what, statistics.median(times["here"]), "s", note)
        table.add(
            f"{what}: added memory", here, "MiB", f"plain {plain:.0f} MiB, ratio {here / max(plain, 1):.2f}"
        )
    sweeps(table, options, full)


def sweeps(table, options, full):
    """Seconds of each loss over N, and over d."""
    sizes = [1024, 2048, 4096, 8192, 16384] if full else [256, 512, 1024, 2048]
    sweep = [(method, N, d) for method, d in zip(METHODS, (256, 256, 1024, 2048), strict=True) for N in sizes]
    sizes = [512, 1024, 2048, 4096] if full else [256, 512, 1024]
    sweep += [(method, 512, d) for method in METHODS for d in sizes]
    for method, N, d in sweep:
        here = sides_of(method, N, d, options.device)["here"]
        table.add(
            f"{method}, N = {N}, d = {d}", alternate(dict(here=here), 1, options.device)["here"][0], "s"
        )


# ------------------------------------------------------------------------------------------ (d): steps


def training_step(table, options, module, flags, views=False):
    """The body of a script's loop, from views to updated parameters, taking turns with its bare networks."""
    args = module.get_args(
        [*flags, "--device", options.device.type, "--out", "unused", "--log-every", "1000"]
    )
    found = dict(step=[], network=[], views=[])
    peak = PeakMemory(options.device)

    def begin(self, evaluate, width, **state):
        self.probe, self.model = common.Probe(width, 10, args, self.device), state["online"]
        self.frozen, self.pending, self.step = state.get("target"), None, 1  # a step that logs nothing

    def steps(self):
        generator = torch.Generator().manual_seed(0)
        n, S = args.batch_size, args.size
        images = torch.randint(0, 256, (n, 3, S, S), generator=generator, dtype=torch.uint8)
        data = common.Pixels(images.to(self.device), torch.randint(0, 10, (n,), generator=generator))
        batch = lambda: next(common.view_batches(data, args, self.device, 0, 1))
        xs, y = batch()
        y = y.to(self.device)

        def network():
            self.model.zero_grad(set_to_none=True)
            with common.autocast(args, self.device):
                if isinstance(self.frozen, torch.nn.Sequential):
                    with torch.no_grad():
                        [self.frozen(x) for x in xs]
                zs = self.model(xs)[1]
            zs.backward(torch.ones_like(zs))

        clock = (
            (lambda: torch.cuda.synchronize() or time.perf_counter()) if xs[0].is_cuda else time.perf_counter
        )
        for step in range(options.rounds + 2):
            begun = clock()
            if step == 1:
                with peak:
                    yield step, xs, y
            else:
                yield step, xs, y
            found["step"].append(clock() - begun)
            found["network"].append(seconds(network, self.device))
            if views:
                found["views"].append(seconds(batch, self.device))

    old = common.Run.begin, common.Run.steps, common.open_data
    common.Run.begin, common.Run.steps = begin, steps
    common.open_data = lambda args, out: common.Data(common.draw_glyphs(args.batch_size, 0), None, [])
    try:
        module.main(args)
    finally:
        common.Run.begin, common.Run.steps, common.open_data = old
    if not options.rounds:  # for its memory
        return peak.MiB
    found = {name: values[2:] for name, values in found.items()}
    extra = found["views"] if views else [0.0] * options.rounds
    rows = zip(found["step"], found["network"], extra, strict=True)
    outside = statistics.median((s + v - n) / (s + v) for s, n, v in rows)
    total = statistics.median(a + b for a, b in zip(found["step"], extra, strict=True))
    what = f"{module.__name__}, {args.arch}, {args.size} pixels, {args.precision}, batch {args.batch_size}"
    what += f" in parts of {args.micro_batch}" * bool(args.micro_batch)
    note = f"{args.batch_size / total:.0f} images/s, {100 * outside:.1f} % outside the network"
    table.add(what, total, "s", f"{note}, adds {peak.MiB:.0f} MiB")


def steps(table, options):
    small = ["--recipe", "cifar10", "--stem", "imagenet", "--batch-size"]
    table.title("(d) a training step, views ready to parameters updated")
    for module in (hsic, corinfomax, music, mmd_sphere):
        training_step(table, options, module, [*small, "256"])
    for micro in ("0", "128"):
        training_step(table, options, hsic, [*small, "512", "--micro-batch", micro])
    if options.device.type == "cuda":
        table.title("(d) a training step of ResNet-50 at 224 pixels, augmentation included")
        for module in (hsic, corinfomax, music, mmd_sphere):
            training_step(table, options, module, ["--recipe", "imagenet", "--batch-size", "256"], views=True)


def alone(queue, options, flags):
    with contextlib.redirect_stdout(io.StringIO()):
        queue.put(training_step(Table(), options, hsic, flags))


def micro_batches(table, options):
    """Each in a process of its own, whose allocator gives back at once what is freed."""
    table.title("(h) memory that a step adds, by batch and micro-batch; ResNet-18, 96 pixels")
    context, options = torch.multiprocessing.get_context("spawn"), argparse.Namespace(**vars(options))
    options.rounds = 0
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for batch, micro in itertools.product((64, 128), (0, 16, 32)):
        flags = f"--recipe cifar10 --stem imagenet --size 96 --batch-size {batch} --micro-batch {micro}"
        queue = context.SimpleQueue()
        process = context.Process(target=alone, args=(queue, options, flags.split()))
        process.start()
        what = f"hsic, batch {batch}" + f" in parts of {micro}" * bool(micro)
        table.add(f"{what}: added memory", queue.get(), "MiB")
        process.join()
    del os.environ["MALLOC_MMAP_THRESHOLD_"]


# ---------------------------------------------------------------------------------- (e): communication


def on_rank(rank, world, port, n, d, queue):
    """Numbers moved and seconds a step of each loss on this rank's n rows."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    moved, found = [0], {}
    for name in ("all_reduce", common.GATHER):
        original = getattr(dist, name)

        def counted(x, *rest, original=original):
            moved[0] += x.numel() * x.element_size()
            original(x, *rest)

        setattr(dist, name, counted)
    for method in METHODS:
        run = sides_of(method, n, d, CPU)["here"]
        run()
        moved[0], times = 0, []
        for _ in range(5):
            dist.barrier()
            times.append(seconds(run, CPU))
        found[method] = moved[0] / 5, statistics.median(times)
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


def communication(table, options):
    N, d = 512, 256
    table.title(f"(e) communication of a loss and its backward on gloo, N = {N} rows of all ranks, d = {d}")
    context = torch.multiprocessing.get_context("spawn")
    for world in (1, 2, 4):
        queue, port = context.SimpleQueue(), random.randrange(20000, 60000)
        ranks = [
            context.Process(target=on_rank, args=(r, world, port, N // world, d, queue)) for r in range(world)
        ]
        [process.start() for process in ranks]
        found = queue.get()
        [process.join() for process in ranks]
        for method, (size, duration) in found.items():
            moved = 0 if world == 1 else size
            table.add(f"{method}, W = {world}", duration, "s", f"{moved / 2**20:.2f} MiB through collectives")


# ------------------------------------------------------------------------------------------- (f): LARS


def optimizers(table, options):
    table.title("(f) a step of the optimiser, ResNet-50's parameters")
    nets = [common.resnet("resnet50")[0].to(options.device) for _ in range(2)]
    args = hsic.get_args([])
    for net in nets:
        for p in net.parameters():
            p.grad = torch.randn_like(p)
    made = {}
    for name, net in zip(("sgd", "lars"), nets, strict=True):
        args.optimizer = name
        made[name] = common.optimizer_for(net, args).step
    times = alternate(made, 3 * options.rounds, options.device)
    for name in made:
        note = f"{ratio(times, name, 'sgd'):.2f} x SGD"
        table.add(name, statistics.median(times[name]), "s", note)


# ---------------------------------------------------------------------------------------- (g): on paper

H200 = dict(
    memory=4.8e12, bf16=989e12, fp32=67e12, nvlink=450e9, network=50e9
)  # bytes or operations a second
VIEWS = {"view", "detach", "expand", "t", "transpose", "permute", "unsqueeze", "select", "slice", "alias",
         "split", "unbind", "empty", "empty_like", "new_empty"}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each on its own."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name.partition("::")[2] not in VIEWS:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return out


def network_costs(module, args):
    """Bytes of traffic, operations and bytes kept for backward of an image (two views); parameters."""
    with torch.device("meta"):
        net, found = module.Online(args).to(torch.bfloat16), []
        for n in (8, 16):
            xs, kept = [torch.empty(n, 3, args.size, args.size, dtype=torch.bfloat16)] * 2, {}

            def keep(t, kept=kept):
                kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
                return t

            saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
            with Traffic() as traffic, saved, FlopCounterMode(display=False) as flops:
                net(xs)[1].sum().backward()
            found.append((traffic.total, flops.get_total_flops(), sum(kept.values())))
    few, many = found
    return [(b - a) / 8 for a, b in zip(few, many, strict=True)], sum(p.numel() for p in net.parameters())


def on_paper(table, options):
    """What cannot be undercut at data-sheet rates, the official ImageNet recipes, ResNet-50, bf16."""
    table.title("(g) least times of a step on H200s, on paper: counted bytes and operations at peak rates")
    for module in (hsic, corinfomax, music, mmd_sphere):
        args = module.get_args(["--recipe", "imagenet"])
        (traffic, flops, kept), P = network_costs(module, args)
        N, d = args.batch_size, args.dim
        passes = 4 / 3 if getattr(args, "target", False) else 1  # the target's forward
        work, moved = {  # operations of the loss on all ranks, bytes through its collectives
            "hsic": (12 * 4 * N * 512 * (d + 256), 4 * 512**2),
            "corinfomax": (12 * N * d**2, 8 * 2 * d**2),
            "music": (6 * N * d**2, 4 * min(4 * N * d, 2 * d**2)),
            "mmd_sphere": (8 * N**2 * d, 4 * 2 * N * d / 2),  # a gather: half of what a sum moves
        }[module.__name__]
        for W, wire in ((8, H200["nvlink"]), (64, H200["network"])):
            ring = 2 * (W - 1) / W / wire
            times = dict(
                network=passes * N / W * (traffic / H200["memory"] + flops / H200["bf16"]),
                optimiser=20 * P / H200["memory"],  # weights, gradients, momentum
                loss=work / W / H200["fp32"],
                collectives=moved * ring,
                gradients=4 * P * ring,  # beside backward
            )
            note = ", ".join(f"{name} {1e3 * t:.2g}" for name, t in times.items())
            GB = (N / W * kept + 12 * P) / 1e9
            table.add(f"{module.__name__}, N = {N}, d = {d}, W = {W}: network", 1e3 * times["network"], "ms",
                      f"{note.partition(', ')[2]} ms; {GB:.0f} GB")  # fmt: skip


SECTIONS = dict(
    a=input_pipeline,
    b=augmentation,
    c=losses,
    d=steps,
    e=communication,
    f=optimizers,
    g=on_paper,
    h=micro_batches,
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="a folder of JPEGs, at any depth (default: made here)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="the official sizes (always on a GPU)")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, e.g. a,c")
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"torch {torch.__version__}, {name}, {torch.backends.cpu.get_cpu_capability()}")
    threads, table = torch.get_num_threads(), Table()
    for key in options.only.split(","):
        torch.set_num_threads(1 if key in "ab" else threads)
        SECTIONS[key](table, options)
    rows = dict(torch=torch.__version__, device=name, full=options.full, rows=table.rows)
    options.json.write_text(json.dumps(rows, indent=1))
    print(f"\nwritten: {options.json}")


if __name__ == "__main__":
    main()
