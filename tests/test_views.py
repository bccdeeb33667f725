"""Random numbers without state, and each augmentation against torchvision's own."""

import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import TINY
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import common
import music

BICUBIC = InterpolationMode.BICUBIC
CPU = torch.device("cpu")
CHOICES = "flip jitter brightness contrast saturation hue unused gray blur sigma solarise".split()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(6, 3, 40, 48)


@pytest.fixture
def files(folder):
    return common.list_folder(folder / "train")


def uniforms(n, **choices):
    """Uniforms (n, 64) of a view that decide for `choices`, a number or (n,) each, and against all else."""
    u = torch.full((n, 64), 0.999, dtype=torch.double)
    for name, value in choices.items():
        u[:, 40 + CHOICES.index(name)] = value
    return u


def steps_of(images, start, stop, *flags):
    args = music.get_args([*TINY, *flags])
    return list(common.batches(images, args, CPU, start, stop))


def test_uniform_is_what_it_was_in_earlier_versions_and_each_of_its_parts_counts():
    index = torch.arange(20000)
    parts = [(3, 7, index, 5), (4, 7, index, 5), (3, 8, index, 5), (3, 7, index + 1, 5), (3, 7, index, 6)]
    u = torch.stack([common.uniform(*some) for some in parts])
    assert u[0, 1] == 0.0768374433883563 and 0 <= u.min() and u.max() < 1
    assert (torch.corrcoef(u) - torch.eye(5)).abs().max() < 0.03
    assert (u.sort(1)[0] - torch.linspace(0, 1, 20000)).abs().max() < 0.02


@pytest.mark.parametrize("size", [8, 16, 32, 60])
def test_crop_is_torchvisions_antialiased_bicubic_crop(size, images):
    pixels = (images * 255).byte()
    boxes = [[0, 0, 40, 48], [3, 5, 30, 20], [10, 0, 8, 11], [39, 47, 1, 1], [2, 2, 35, 44], [0, 20, 16, 16]]
    crops = common.crop(pixels, torch.tensor(boxes).float(), size)
    for image, box, x in zip(pixels / 255, boxes, crops, strict=True):
        wanted = TF.resized_crop(image, *box, [size, size], BICUBIC)
        assert (x - wanted.clamp(0, 1)).abs().max() < 1e-3


@pytest.mark.parametrize("area", [(0.08, 1), (0.5, 1), (0.05, 0.14)])
@pytest.mark.parametrize("sides", [(32, 32), (375, 500), (400, 20), (1, 1)])
def test_crop_boxes_are_distributed_as_those_of_random_resized_crop(sides, area):
    torch.manual_seed(0)
    u = common.draw(0, 0, torch.arange(1500), 1)[:, 0].tolist()
    boxes = torch.tensor([common.crop_box(row, *sides, area) for row in u]).double()
    image = torch.empty(3, *sides)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, area, (3 / 4, 4 / 3)) for _ in u]).double()
    distances = (boxes.sort(0)[0] - theirs.sort(0)[0]).abs().mean(0)
    assert (distances <= 0.1 * theirs.std(0)).all()
    assert boxes.min() >= 0 and (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(sides)).all()


@pytest.mark.parametrize("size, resize", [(32, 36), (64, 73), (224, 256)])
@pytest.mark.parametrize("width", [40, 41, 48])
def test_the_centre_is_torchvisions_resize_and_centre_crop(size, resize, width, images):
    pixels = (images[..., :width] * 255).byte()
    x = common.centre(pixels, common.View(size=size, resize=resize))
    wanted = TF.center_crop(TF.resize(pixels / 255, resize, BICUBIC), size)
    assert (x - wanted.clamp(0, 1)).abs().max() < 1e-5


@pytest.mark.parametrize("order", common.ORDERS, ids=" ".join)
def test_jitter_is_torchvisions_in_every_order_with_factors_of_each_image(order, images):
    strengths = dict(brightness=0.9, contrast=0.8, saturation=0.7, hue=0.3)
    view = common.AUH._replace(jitter=tuple(strengths.values()), jitter_p=0.8)
    choices = {name: torch.rand(6) for name in strengths}
    x = common.augment(images, uniforms(6, jitter=0.79, **choices), view, order)
    for i, image in enumerate(images):
        for name in order:
            change = strengths[name] * float(2 * choices[name][i] - 1)
            factor = change if name == "hue" else 1 + change
            image = getattr(TF, f"adjust_{name}")(image, factor)
        assert (x[i] - image).abs().max() < 1e-5


CHANGES = {  # their probability in the second view of byol, and what they are at the middle of all sigmas
    "flip": (0.5, TF.hflip),
    "gray": (0.2, lambda x: TF.rgb_to_grayscale(x, 3)),
    "solarise": (0.2, lambda x: TF.solarize(x, 128 / 255)),
    "blur": (0.1, lambda x: TF.gaussian_blur(x, [39, 39], [1.05, 1.05])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_torchvisions_on_its_share_of_the_images(change, images):
    p, changed = CHANGES[change]
    images = images[..., :40]
    u = uniforms(6, sigma=0.5, **{change: torch.tensor([p + 0.01] * 3 + [p - 0.01] * 3)})
    x = common.augment(images, u, common.VIEWS["byol"][1], common.ORDERS[0])
    assert (x - torch.cat([images[:3], changed(images[3:])])).abs().max() < 1e-4


def test_normalise_is_torchvisions(images):
    wanted = TF.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (common.normalise(images) - wanted).abs().max() < 1e-5


def test_an_order_of_jitter_is_of_a_step_and_a_view(files, monkeypatch):
    orders = []
    monkeypatch.setattr(common, "augment", lambda x, u, view, order: orders.append(order) or x)
    steps_of(files, 0, 12)
    assert len(orders) == 24 and len(set(orders[::2])) > 5 and orders[::2] != orders[1::2]


@pytest.mark.parametrize("memory", [False, True])
def test_views_depend_neither_on_ranks_nor_workers_and_little_on_where_images_are(memory, files, monkeypatch):
    flags = ["--local-crops", "2", "--workers"]
    images = common.to_memory(files, CPU) if memory else files
    runs = [steps_of(files, 1, 5, *flags, "0"), steps_of(images, 1, 5, *flags, "0")]
    monkeypatch.setattr(common, "world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        runs.append(steps_of(images, 1, 5, *flags, "2"))
    for (_, as_files, _), (_, xs, y), *halves in zip(*runs, strict=True):
        assert torch.equal(y, torch.cat([labels for _, _, labels in halves]))
        for x, other, *parts in zip(xs, as_files, *[views for _, views, _ in halves], strict=True):
            assert len(parts[0]) == 8 and torch.equal(x, torch.cat(parts))
            assert (x - other).abs().mean() * 0.225 * 255 < 3  # levels; solarisation makes many of one


def test_every_epoch_has_every_image_once_in_another_order_from_wherever_it_begins():
    args = music.get_args([*TINY, "--batch-size", "20"])
    index = torch.stack([index for _, _, index in common.epoch_order(110, args, 0, 10)]).view(2, 100)
    assert [len(set(order)) for order in index.tolist()] == [100, 100]
    assert not torch.equal(*index)
    assert torch.equal(next(common.epoch_order(110, args, 7, 8))[2], index[1, 40:60])


def test_local_crops_are_small_and_have_the_first_views_colours_but_no_solarisation(files):
    flags = ["--local-crops", "6", "--views"]
    first, second, *local = common.views_of(music.get_args([*TINY, *flags, "simclr", "--size", "224"]))
    assert first == second == common.SIMCLR._replace(area=(0.14, 1), size=224)
    assert local == [common.SIMCLR._replace(area=(0.05, 0.14), size=96)] * 6
    _, xs, _ = steps_of(files, 0, 1, *flags, "byol")[0]
    assert [x.shape[2] for x in xs] == [16, 16] + 6 * [12] and not torch.equal(xs[2], xs[3])
    assert common.views_of(music.get_args([*TINY, *flags, "byol"]))[2].blur_p == 0.5
