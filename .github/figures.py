"""Draw the figures of README.md and RESULTS.md, with matplotlib: python .github/figures.py RUNS

RUNS holds cifar10/NAME, a run of each method and fork, and cifar10/NAME-1, of some with a second seed;
patterns/METHOD, its demo, and patterns/METHOD-alone, the same without what spreads embeddings; and runs of
three epochs: three/ldmi with --log-ldmi, and three/music. The commands are in RESULTS.md.
"""

import json
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchvision
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

FIGURES = Path(__file__).parent / "figures"

COLOURS = {
    "hsic": ("SSL-HSIC", "#3b82f6"),
    "corinfomax": ("CorInfoMax", "#f97316"),
    "music": ("MUSIC", "#10b981"),
    "mmd_sphere": ("SFRIK", "#d946ef"),
    "sigreg": ("SIGReg, a fork", "#ef4444"),
    "barlow_twins": ("Barlow Twins, a fork", "#a16207"),
    "vicreg": ("VICReg, a fork", "#64748b"),
    "simclr": ("SimCLR, a fork", "#06b6d4"),
}
GRAY = "#808080"  # is read on white and on black
TEXTS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
plt.rcParams.update({name: GRAY for name in TEXTS})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 11})
CPU = torch.device("cpu")


def read_curve(run, key):
    """The values of a key in a run's log, and the epoch of each."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    epochs = json.loads((run / "args.json").read_text())["epochs"]
    points = [(epochs * record["step"] / log[-1]["step"], record[key]) for record in log if key in record]
    return tuple(map(torch.tensor, zip(*points, strict=True)))


def draw_accuracies(runs, path):
    """kNN accuracy over epochs, faint with a second seed, and as a line the level at initialisation."""
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    for name, (label, colour) in COLOURS.items():
        epochs, accuracies = read_curve(runs / name, "knn")
        style = "--" if "fork" in label else "-"
        label = f"{label}: {100 * accuracies[-1]:.1f}"
        second = runs / f"{name}-1"
        if second.exists():
            epochs, again = read_curve(second, "knn")
            axes.plot(epochs, 100 * again, style, color=colour, alpha=0.4)
            label += f", {100 * again[-1]:.1f}"
        axes.plot(epochs, 100 * accuracies, style, color=colour, label=label)
        if name == "hsic":
            axes.axhline(100 * accuracies[0], color=GRAY, linewidth=1, linestyle=":")
            axes.annotate("initialisation", (epochs[-1] - 2, 100 * accuracies[0] + 0.5))
    axes.set_xlabel("epoch")
    axes.set_ylabel("kNN accuracy, %")
    axes.legend(frameon=False, loc="lower right", ncols=2)
    figure.savefig(path, transparent=True, bbox_inches="tight")


def load_run(run):
    """The method of a run, its arguments and its network, as it was saved last."""
    args = Namespace(**json.loads((run / "args.json").read_text()))
    online = import_module(Path(args.script).stem).Online(args)
    online.load_state_dict(common.load_checked(run / "checkpoint.pt")["online"])
    return args, online.eval()


@torch.no_grad()
def spectrum_of(run):
    """Standard deviations of the normalised embeddings of 1,000 test images along their principal axes.

    Of MUSIC's codes, the softmax of each segment, since its loss sees those only.
    """
    args, online = load_run(run)
    images = common.draw_patterns(1000, 1)
    view = common.View(size=args.size, resize=args.size * 8 // 7)
    order = [(0, 0, torch.arange(1000))]
    _, (x,), _ = next(common.view_batches(images, order, [view], args, CPU))
    z = online([x])[1][0]
    if "segment" in args:
        z = (z / args.temperature).unflatten(1, (-1, args.segment)).softmax(2).flatten(1)
    z = F.normalize(z, dim=1)
    return torch.linalg.svdvals(z - z.mean(0)) / 1000**0.5


def draw_spectra(runs, path):
    """A panel a method: with what spreads its embeddings, and, dashed, without."""
    figure, panels = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True)
    for axes, (name, (label, colour)) in zip(panels, COLOURS.items(), strict=False):
        axes.semilogy(spectrum_of(runs / name), color=colour, label="whole loss")
        axes.semilogy(spectrum_of(runs / f"{name}-alone"), "--", color=colour, label="without its spread")
        axes.set_title(label, color=colour)
        axes.set_ylim(1e-6, 1)
        axes.set_xlabel("principal axis")
    panels[0].set_ylabel("standard deviation")
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, transparent=True, bbox_inches="tight")


def draw_views(run, path):
    """A column for each kind of built-in image: one, its two views, and its three nearest training images."""
    args, online = load_run(run)
    train, test = common.draw_patterns(5000, 0), common.draw_patterns(1000, 1)
    h, _ = common.features(online.backbone, test, torch.arange(1000), args)
    bank, _ = common.features(online.backbone, train, torch.arange(5000), args)
    _, neighbours = common.nearest(h, bank, 3)
    rows = torch.stack([(test.labels == kind).nonzero()[1, 0] for kind in range(10)])
    _, views, _ = next(common.view_batches(test, [(0, 0, rows)], common.views_of(args), args, CPU))
    lines = [test.data[rows] / 255]
    lines += [view * 0.226 + 0.449 for view in views]
    for k in range(3):
        found = neighbours[rows, k]
        wrong = train.labels[found] != test.labels[rows]
        lines.append(train.data[found] / 255 / (1 + 3 * wrong.view(-1, 1, 1, 1)))
    sheet = torchvision.utils.make_grid(torch.cat(lines).clamp(0, 1), nrow=10, padding=1, pad_value=0.5)
    picture = to_pil_image(sheet.repeat_interleave(2, 1).repeat_interleave(2, 2))
    picture.quantize(256).save(path)


def draw_information(run, path):
    """CorInfoMax's mutual information while its approximation is the loss."""
    figure, left = plt.subplots(figsize=(6, 3))
    _, colour = COLOURS["corinfomax"]
    left.plot(*read_curve(run, "information"), color=colour)
    left.set_ylabel("LDMI", color=colour)
    beside = left.twinx()
    epochs, loss = read_curve(run, "loss")
    beside.plot(epochs, -loss, color=GRAY, linestyle="--")
    beside.set_ylabel("- loss")
    left.set_xlabel("epoch")
    figure.savefig(path, transparent=True, bbox_inches="tight")


@torch.no_grad()
def draw_codes(run, path):
    """MUSIC's joint probabilities of units in two views of 5,000 test images, and the images of each unit."""
    args, online = load_run(run)
    test = common.to_memory(common.open_folder(Path(args.data))[1], CPU)
    rows = torch.arange(0, len(test), len(test) // 5000)
    _, views, _ = next(common.view_batches(test, [(0, 0, rows)], common.views_of(args), args, CPU))
    codes = [
        (online([x])[1][0] / args.temperature).unflatten(1, (-1, args.segment)).softmax(2) for x in views
    ]
    P = codes[0].flatten(1).mT @ codes[1].flatten(1) / len(rows)
    counts = F.one_hot(codes[0].argmax(2), args.segment).sum(0)  # (S, s)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=[1, 1.7])
    image = left.imshow(P, norm="log", vmin=1e-3, cmap="viridis")
    figure.colorbar(image, ax=left)
    left.set_title("joint probability of two units", fontsize=10)
    left.set_xlabel("unit, second view")
    left.set_ylabel("unit, first view")
    right.bar(range(counts.numel()), counts.flatten(), width=1, color=COLOURS["music"][1])
    right.axhline(len(rows) / args.segment, color=GRAY, linestyle="--")
    right.set_title("images in which a unit is the largest of its segment", fontsize=10)
    right.set_xlabel("unit")
    figure.tight_layout()
    figure.savefig(path, transparent=True, bbox_inches="tight", dpi=80)


if __name__ == "__main__":
    runs = Path(sys.argv[1])
    FIGURES.mkdir(parents=True, exist_ok=True)
    draw_accuracies(runs / "cifar10", FIGURES / "accuracies.svg")
    draw_spectra(runs / "patterns", FIGURES / "spectra.svg")
    draw_views(runs / "patterns" / "hsic", FIGURES / "views.png")
    draw_information(runs / "three" / "ldmi", FIGURES / "information.svg")
    draw_codes(runs / "three" / "music", FIGURES / "codes.png")
