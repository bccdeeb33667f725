"""Random numbers without state, and each augmentation against torchvision's own."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import TINY
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import common
import music

BICUBIC = InterpolationMode.BICUBIC
IMAGES = torch.rand(6, 3, 40, 48, generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")
CHOICES = "flip jitter brightness contrast saturation hue unused gray blur sigma solarise".split()


def uniforms(n, **choices):
    """Uniforms (n, 64) that set `choices`, each a number or (n,), and turn off everything else."""
    u = torch.full((n, 64), 0.999, dtype=torch.double)
    for name, value in choices.items():
        u[:, 40 + CHOICES.index(name)] = value
    return u


def steps_of(images, start, stop, *flags):
    args = music.get_args([*TINY, *flags])
    return [[*xs, labels] for _, xs, labels in common.batches(images, args, CPU, start, stop)]


def test_draws_are_those_of_earlier_versions_and_depend_on_each_part():
    index = torch.arange(3000)
    parts = [(3, 7, index), (4, 7, index), (3, 8, index), (3, 7, index + 1)]
    u = torch.cat([common.draw(*some, views=2)[:, :, 5] for some in parts], 1)
    assert u[1, 0] == 0.0768374433883563
    assert (torch.corrcoef(u.mT) - torch.eye(8)).abs().max() < 0.1


@pytest.mark.parametrize("size", [8, 32, 60])
def test_crop_is_torchvisions_antialiased_bicubic_crop(size):
    pixels = (IMAGES * 255).byte()
    boxes = [[0, 0, 40, 48], [3, 5, 30, 20], [10, 0, 8, 11], [39, 47, 1, 1], [2, 2, 35, 44], [0, 20, 16, 16]]
    crops = common.crop(pixels, torch.tensor(boxes).float(), size)
    for image, box, x in zip(pixels / 255, boxes, crops, strict=True):
        wanted = TF.resized_crop(image, *box, [size, size], BICUBIC)
        assert (x - wanted.clamp(0, 1)).abs().max() < 1e-3


def first_box_that_fits(u, height, width, area):
    """What crop_boxes draws for one image, as a loop over the ten attempts."""
    for i in range(0, 40, 4):
        pixels = height * width * (area[0] + u[i] * (area[1] - area[0]))
        ratio = 3 / 4 * (16 / 9) ** u[i + 1]
        h = round(math.sqrt(pixels / ratio))
        w = round(math.sqrt(pixels * ratio))
        if 0 < h <= height and 0 < w <= width:
            return [int((height - h + 1) * u[i + 2]), int((width - w + 1) * u[i + 3]), h, w]
    h = min(height, round(width * 4 / 3))
    w = min(width, round(height * 4 / 3))
    return [(height - h) // 2, (width - w) // 2, h, w]


def test_a_crop_box_is_the_first_of_ten_tries_that_fits():
    areas = [(0.08, 1), (0.5, 1), (0.05, 0.14)]
    sides = (400 * common.uniform(1, torch.arange(400)) ** 2).int() + 1  # from 1 to 400, often few
    for i, (height, width) in enumerate(sides.view(-1, 2).tolist()):
        u = common.draw(i, 0, torch.arange(30), 1)[:, 0]
        boxes = [first_box_that_fits(row, height, width, areas[j % 3]) for j, row in enumerate(u.tolist())]
        assert common.crop_boxes(u, height, width, 10 * areas).tolist() == boxes


@pytest.mark.parametrize("area", [(0.5, 1), (0.05, 0.14)])
@pytest.mark.parametrize("sides", [(30, 40), (400, 20), (20, 400), (1, 1)])
def test_crop_boxes_are_distributed_as_those_of_random_resized_crop(sides, area):
    torch.manual_seed(0)
    u = common.draw(0, 0, torch.arange(1500), 1)[:, 0]
    boxes = common.crop_boxes(u, *sides, area)
    image = torch.empty(3, *sides)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, area, (3 / 4, 4 / 3)) for _ in u]).double()
    distances = (boxes.sort(0)[0] - theirs.sort(0)[0]).abs().mean(0)
    assert (distances <= 0.1 * theirs.std(0)).all()


@pytest.mark.parametrize("size, resize", [(32, 36), (64, 73), (224, 256)])
def test_evaluation_views_are_torchvisions_resize_crop_and_normalisation(size, resize):
    pixels = (IMAGES * 255).byte()
    x = common.make_view(pixels, None, common.View(size=size, resize=resize), None, uncropped=True)
    wanted = TF.center_crop(TF.resize(pixels / 255, resize, BICUBIC), size).clamp(0, 1)
    wanted = TF.normalize(wanted, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (x - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("order", common.ORDERS, ids=" ".join)
def test_jitter_is_torchvisions_in_every_order_with_factors_of_each_image(order):
    strengths = dict(brightness=0.9, contrast=0.8, saturation=0.7, hue=0.3)
    view = common.AUH._replace(jitter=tuple(strengths.values()), jitter_p=0.8)
    choices = {name: common.uniform(i, torch.arange(6)) for i, name in enumerate(strengths)}
    x = common.augment(IMAGES, uniforms(6, jitter=0.79, **choices), view, order)
    for i, image in enumerate(IMAGES):
        for name in order:
            change = strengths[name] * float(2 * choices[name][i] - 1)
            factor = change if name == "hue" else 1 + change
            image = getattr(TF, f"adjust_{name}")(image, factor)
        assert (x[i] - image).abs().max() < 1e-5


@pytest.mark.parametrize(
    "change, p, changed",  # probabilities in the second view of byol; sigma in the middle of its range
    [
        ("flip", 0.5, TF.hflip),
        ("gray", 0.2, lambda x: TF.rgb_to_grayscale(x, 3)),
        ("solarise", 0.2, lambda x: TF.solarize(x, 128 / 255)),
        ("blur", 0.1, lambda x: TF.gaussian_blur(x, [39, 39], [1.05, 1.05])),
    ],
)
def test_each_change_is_torchvisions_on_its_share_of_the_images(change, p, changed):
    images = IMAGES[..., :40]
    u = uniforms(6, sigma=0.5, **{change: torch.tensor([p + 0.01] * 3 + [p - 0.01] * 3)})
    x = common.augment(images, u, common.VIEWS["byol"][1], common.ORDERS[0])
    assert (x - torch.cat([images[:3], changed(images[3:])])).abs().max() < 1e-4


def test_an_order_of_jitter_is_of_a_step_and_a_view(monkeypatch):
    orders = []
    monkeypatch.setattr(common, "augment", lambda x, u, view, order, run: orders.append(order) or x)
    steps_of(common.draw_patterns(64, 0), 0, 12)
    assert len(orders) == 24 and len(set(orders[::2])) > 5 and orders[::2] != orders[1::2]


def test_views_are_the_same_on_all_ranks_and_workers_and_close_in_memory(folder, tmp_path, monkeypatch):
    """Workers read a zip, and a single process without workers the files."""
    flags = ["--local-crops=2", "--size=32", "--workers"]
    files, _ = common.open_folder(folder)
    zipped, _ = common.open_folder(Path(shutil.make_archive(tmp_path / "images", "zip", folder)))
    memory = common.to_memory(files, CPU)
    runs = [steps_of(memory, 1, 5, *flags, "0"), steps_of(files, 1, 5, *flags, "0")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        runs.append(steps_of(zipped, 1, 5, *flags, "2"))
    for step in zip(*runs, strict=True):
        for of_memory, x, *halves in zip(*step, strict=True):
            assert torch.equal(x, torch.cat(halves))
            levels = (x - of_memory).double().abs() * 0.225 * 255
            assert levels.mean() < 3  # solarisation makes many of one


def test_every_epoch_has_each_image_once_in_a_new_order_wherever_it_begins():
    args = music.get_args(TINY)
    index = torch.stack([index for _, _, index in common.epoch_order(100, args, 0, 12)]).view(2, 96)
    assert [len(set(order)) for order in index.tolist()] == [96, 96] and not torch.equal(*index)
    assert torch.equal(next(common.epoch_order(100, args, 7, 8))[2], index[1, 16:32])


def test_local_crops_are_small_with_first_views_colours_unsolarised():
    first, second, *local = common.views_of(music.get_args([*TINY, "--local-crops=6", "--size=224"]))
    assert first.area == second.area == (0.14, 1)
    assert local == [common.BYOL._replace(area=(0.05, 0.14), blur_p=0.5, size=96)] * 6
    *xs, _ = steps_of(common.draw_patterns(16, 0), 0, 1, "--local-crops=6", "--size=32")[0]
    assert [x.shape[2] for x in xs] == [32, 32] + 6 * [14]
