"""Speed of the input pipeline on one core, against the PIL pipeline of the published codebases and against
decoding alone.

    python tests/bench.py [--images FOLDER]      JPEGs of ImageNet's size, or as many as 320 of a folder

All sides alternate in one run; the figures are medians of the rounds.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps
from torchvision.io import write_jpeg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import hsic


class Blur:
    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        sigma = random.uniform(0.1, 2.0)
        return image.filter(ImageFilter.GaussianBlur(sigma)) if random.random() < self.p else image


class Solarise(Blur):
    def __call__(self, image):
        return ImageOps.solarize(image) if random.random() < self.p else image


def pil_view(size, blur, solarise):
    """One view of the PIL pipeline: BYOL's recipe as in the official codebases."""
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    crop = T.RandomResizedCrop(size, (0.08, 1), interpolation=T.InterpolationMode.BICUBIC)
    steps = [crop, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2), Blur(blur), Solarise(solarise)]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(common.MEAN, common.STD)])


def make_images(folder, count=64):
    """JPEGs of 500 x 375 pixels and about 110 KB, ImageNet's usual size."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse = torch.rand(1, 3, 24, 32, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (375, 500), mode="bicubic")[0]
        image = image + 0.12 * torch.randn(3, 375, 500, generator=generator)
        write_jpeg((image.clamp(0, 1) * 255).byte(), str(folder / f"{i:03}.jpg"), quality=85)


def alternate(sides, rounds):
    """Images/s of each side, {name: function() -> images done}, medians over rounds in which all take
    turns."""
    speeds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            begun = time.perf_counter()
            done = run()
            speeds[name].append(done / (time.perf_counter() - begun))
    return {name: statistics.median(values[1:] or values) for name, values in speeds.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="a folder of JPEGs, at any depth (default: made here)")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.images
    if folder is None:
        folder = Path(tempfile.mkdtemp())
        make_images(folder)
    files = common.list_folder(folder, folder / "none").train
    index = torch.arange(min(320, len(files.labels)))
    args = hsic.get_args(["--batch-size", "32", "--views", "byol", "--size", "224", "--device", "cpu"])
    views = common.views_for(args)
    crops = common.Crops(files, [224, 224], common._RandomBoxes(0, views))
    pair = [pil_view(224, 1.0, 0.0), pil_view(224, 0.1, 0.2)]

    def pil():
        for i in index[::4].tolist():
            with Image.open(files.path(i)) as image:
                rgb = image.convert("RGB")
                [view(rgb) for view in pair]
        return len(index[::4])

    def decode():
        return len([files.read(i) for i in index.tolist()])

    def worker():
        return sum(len(crops.__getitems__((0, part))[1]) for part in index.split(32))

    speed = alternate(
        {"PIL, two views": pil, "decoding alone": decode, "worker: decode, two crops": worker}, options.rounds
    )
    report("224 pixels, images/s on one core", speed)

    small = common.draw_glyphs(1024, 0)
    pictures = [T.functional.to_pil_image(image) for image in small.images[:256]]
    args.size = 32
    pair32 = [pil_view(32, 1.0, 0.0), pil_view(32, 0.1, 0.2)]
    args.batch_size = 256

    def pil32():
        return len([[view(picture) for view in pair32] for picture in pictures])

    def batched():
        return sum(len(y) for _, y in common.view_batches(small, args, torch.device("cpu"), 0, 4))

    report(
        "32 pixels, images/s on one core",
        alternate({"PIL, two views": pil32, "batched, two views": batched}, options.rounds),
    )


def report(title, speed):
    print(title)
    first = next(iter(speed.values()))
    for name, value in speed.items():
        print(f"  {name:28s}{value:8.0f}   {value / first:5.2f} x PIL")


if __name__ == "__main__":
    main()
