"""Evaluations: each classifier against its naive form, choices that never see test images, wrong use."""

import argparse
import json
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, make_folder

import common
import eval_linear as ev

TINY = "--backbone random --arch resnet18 --size 16 --device cpu --precision fp32 --workers 0".split()
TRAIN = ["--epochs", "2", "--batch-size", "16", "--log-every", "1"]


def evaluate(*flags):
    """An evaluation in this process; the exit code, or 0."""
    try:
        ev.main(ev.get_args([*TINY, *map(str, flags)]))
    except SystemExit as end:
        return end.code
    return 0


def results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def problem(n, classes=4, width=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    y = torch.arange(n) % classes
    means = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    return (means[y] + torch.randn(n, width, generator=generator)).to(dtype), y


# -------------------------------------------------------------------------------------- classifiers

POINTS = [(lr, wd) for lr in (0.01, 0.3, 2.0) for wd in (0.0, 1e-2)]


def train_heads(steps=30, n=24):
    """Weights of all heads, each rank with its rows of the global batch."""
    heads = ev.Heads(*zip(*POINTS, strict=True), 4, 6)
    for step in range(steps):
        h, y = problem(n + 4 * step)
        mine = slice(common.rank() * len(h) // common.world(), (common.rank() + 1) * len(h) // common.world())
        heads.step(h[mine], y[mine], common.warmup_cosine(step, 0, steps))
    return torch.cat([heads.weight, heads.bias[:, :, None]], 2).transpose(0, 1)


def test_heads_trained_at_once_are_those_trained_one_at_a_time(on_ranks):
    together, steps = train_heads(), 30
    for (lr, wd), found in zip(POINTS, together, strict=True):
        layer = torch.nn.Linear(6, 4)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        groups = [dict(params=[layer.weight], weight_decay=wd), dict(params=[layer.bias])]
        optimizer = torch.optim.SGD(groups, lr, momentum=0.9)
        for step in range(steps):
            h, y = problem(24 + 4 * step)
            common.set_lr(optimizer, lr * common.warmup_cosine(step, 0, steps))
            optimizer.zero_grad()
            F.cross_entropy(layer(h), y).backward()
            optimizer.step()
        assert (found[:, :-1] - layer.weight).abs().max() < 1e-5
        assert (found[:, -1] - layer.bias).abs().max() < 1e-5
    for ranks in on_ranks(train_heads, 2):
        assert (ranks - together).abs().max() < 1e-5


def test_heads_that_diverge_are_never_chosen_and_losses_are_cross_entropies():
    h, y = problem(40)
    heads = ev.Heads([0.1, 0.1], [0.0, 0.0], 4, 6)
    assert heads.step(h, y, 1.0).tolist() == pytest.approx([torch.tensor(4.0).log().item()] * 2)
    assert torch.allclose(
        heads.step(h, y, 0.0)[1], F.cross_entropy(h @ heads.weight[:, 1].mT + heads.bias[:, 1], y)
    )
    heads.weight[0, 0, 0] = torch.nan
    accuracy = heads.accuracy(h, y)
    right = ((h @ heads.weight[:, 1].mT + heads.bias[:, 1]).argmax(1) == y).double().mean()
    assert accuracy[0] == 0 and accuracy[1] == right > 0.3


def test_of_equally_good_heads_the_middle_one_is_chosen():
    assert ev.middle_best(torch.tensor([0.1, 0.3, 0.2])) == 1
    assert ev.middle_best(torch.tensor([0.1, 0.3, 0.3, 0.0, 0.3])) == 2


def fit(n=61, penalty=1e-3):
    """L-BFGS on uneven shards: every third image more or less on a rank."""
    h, y = problem(n, dtype=torch.float64)
    mine = slice(common.rank(), None, common.world())
    return ev.fit_logistic(h[mine], y[mine], 4, penalty, torch.zeros(4, 7, dtype=torch.float64))


@pytest.mark.parametrize("penalty", [10.0, 1e-3, 1e-6])
def test_lbfgs_reaches_the_optimum(penalty, on_ranks):
    weight, gradient = fit(penalty=penalty)
    h, y = problem(61, dtype=torch.float64)
    W, b = (t.clone().requires_grad_() for t in (weight[:, :-1], weight[:, -1]))
    loss = F.cross_entropy(h @ W.mT + b, y) + penalty / 2 * W.square().sum()
    loss.backward()
    largest = max(W.grad.abs().max(), b.grad.abs().max())
    assert largest < 1e-5 and abs(largest - gradient) < 1e-9
    for found, _ in on_ranks(fit, 2, 61, penalty):
        assert torch.allclose(found, weight, rtol=1e-2, atol=1e-2)


def knn_on_this_rank(n, m, block):
    bank, labels = problem(n)
    h, y = problem(m)
    mine = slice(common.rank(), None, common.world())
    similarity, at = ev.nearest(h[mine], bank, 9, block)
    votes = [ev.knn_votes(similarity[:, :k], labels[at[:, :k]], 4) for k in (1, 4, 9)]
    return [list(ev.accuracies(v, y[mine]).values()) for v in votes]


def test_knn_is_a_loop_over_all_images_also_on_uneven_shards(on_ranks):
    bank, labels = problem(50)
    h, y = problem(31)  # 16 and 15 on two ranks
    expected = []
    for k in (1, 4, 9):
        right = []
        for query, label in zip(h, y, strict=True):
            cosine = [float(torch.dot(query, x) / query.norm() / x.norm()) for x in bank]
            votes = [0.0] * 4
            for i in sorted(range(50), key=lambda i, cosine=cosine: -cosine[i])[:k]:
                votes[labels[i]] += float(torch.tensor(cosine[i] / 0.07).exp())
            best = sorted((c for c in range(4) if votes[c]), key=lambda c, votes=votes: -votes[c])
            right.append((best[0] == int(label), int(label) in best[:5], int(label)))
        per_class = [[r[0] for r in right if r[2] == c] for c in range(4)]
        mean = sum(sum(c) / len(c) for c in per_class) / 4
        expected.append([100 * sum(r[i] for r in right) / 31 for i in (0, 1)] + [100 * mean])
    for block in (7, 65536):
        assert all(
            a == pytest.approx(b) for a, b in zip(knn_on_this_rank(50, 31, block), expected, strict=True)
        )
    for found in on_ranks(knn_on_this_rank, 2, 50, 31, 7):
        assert all(a == pytest.approx(b) for a, b in zip(found, expected, strict=True))


# ----------------------------------------------------------------------------- backbones, data, choices


PREFIXES = ["", "module.", "backbone.", "encoder.", "module.encoder_q.", "module.backbone."]


@pytest.mark.parametrize("i, prefix", list(enumerate(PREFIXES)))
def test_weights_are_found_under_common_prefixes(i, prefix, tmp_path):
    nested = (None, "state_dict", "model")[i % 3]
    net = torchvision.models.resnet18(num_classes=3)
    state = {prefix + name: value for name, value in net.state_dict().items()}
    if prefix == "module.encoder_q.":  # MoCo's other encoder, and its queue
        state |= {f"module.encoder_k.{name}": value + 1 for name, value in net.state_dict().items()}
        state["module.queue"] = torch.zeros(3)
    torch.save({nested: state, "epoch": 3} if nested else state, tmp_path / "w.pth")
    args = argparse.Namespace(backbone=str(tmp_path / "w.pth"), arch=None, stem=None)
    loaded, width = ev.load_backbone(args)
    assert (args.arch, args.stem, width) == ("resnet18", "imagenet", 512)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    "arch, stem",
    [
        ("resnet18", "cifar"),
        ("resnet50", "imagenet"),
        ("wide_resnet50_2", "imagenet"),
        ("resnext50_32x4d", "cifar"),
    ],
)
def test_architecture_and_stem_are_read_and_torchvision_takes_the_weights(arch, stem, tmp_path):
    net, _ = common.resnet(arch, stem)
    torch.save(net.state_dict(), tmp_path / "backbone.pth")
    args = argparse.Namespace(backbone=str(tmp_path / "backbone.pth"), arch=None, stem=None)
    ev.load_backbone(args)
    assert (args.arch, args.stem) == (arch, stem)
    if stem == "imagenet":
        plain = getattr(torchvision.models, arch)()
        plain.fc = torch.nn.Identity()
        plain.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=True)


def test_a_checkpoint_of_pretraining_gives_the_weights_that_backbone_pth_has(tmp_path):
    average, online = (common.resnet("resnet18")[0].state_dict() for _ in range(2))
    online = {f"backbone.{name}": value for name, value in online.items()}
    target = {f"0.{name}": value for name, value in average.items()}
    torch.save(dict(online=online, target=target, average=average, step=3), tmp_path / "a.pt")
    torch.save(dict(online=online, target=target, step=3), tmp_path / "b.pt")
    assert torch.equal(ev.read_weights(tmp_path / "a.pt")["conv1.weight"], average["conv1.weight"])
    assert torch.equal(ev.read_weights(tmp_path / "b.pt")["conv1.weight"], online["backbone.conv1.weight"])


def test_choices_are_stratified_and_seeded():
    labels = torch.tensor([0] * 100 + [1] * 30 + [2] * 3)[torch.randperm(133)]
    one, other = (ev.stratified(labels, 0.1, seed, ev.HELD_OUT) for seed in (0, 1))
    assert labels[one].bincount().tolist() == [10, 3, 1] == labels[other].bincount().tolist()
    assert not torch.equal(one, other) and torch.equal(one, ev.stratified(labels, 0.1, 0, ev.HELD_OUT))
    assert not torch.equal(one, ev.stratified(labels, 0.1, 0, ev.LABELLED))


def swap_test_labels(source, target):
    """The same images, half of the test images in the other class' folder."""
    shutil.copytree(source, target)
    for name in ("a", "b"):
        for path in sorted((target / "val" / name).iterdir())[::2]:
            path.rename(target / "val" / ("b" if name == "a" else "a") / f"moved-{path.name}")
    return target


@pytest.mark.parametrize("mode", ["--cached", "--lbfgs"])
def test_shuffled_test_labels_change_the_accuracy_but_not_what_is_chosen(mode, tmp_path, folder):
    flags = [mode, *(TRAIN if mode == "--cached" else [])]
    swapped = swap_test_labels(folder, tmp_path / "data")
    for data, out in ((folder, "right"), (swapped, "wrong")):
        assert evaluate("--data", data, "--out", tmp_path / out, *flags) == 0
    (right,), (wrong,) = results(tmp_path / "right"), results(tmp_path / "wrong")
    held = [[point["held_out"] for point in record["grid"]] for record in (right, wrong)]
    assert right["chosen"] == wrong["chosen"] and held[0] == held[1]
    top1 = [next(iter(record["results"].values()))["top1"] for record in (right, wrong)]
    assert abs(top1[0] - top1[1]) > 20  # the ramp tells the classes apart; half of the labels now lie


def test_features_are_kept_and_made_again_when_anything_changed_them(tmp_path, folder, monkeypatch):
    data, made, features = shutil.copytree(folder, tmp_path / "data"), [], common.features
    monkeypatch.setattr(common, "features", lambda *a: (made.append(a), features(*a))[1])

    def extracted(*flags):
        made.clear()
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        flags = [
            "--data",
            data,
            "--out",
            out,
            "--features",
            tmp_path / "features",
            "--knn",
            "--k",
            "3",
            *flags,
        ]
        assert evaluate(*flags) == 0
        return len(made)  # train and test

    assert [extracted(), extracted(), extracted("--k", "5")] == [2, 0, 0]
    os.utime(data / "val" / "a" / "000.jpg", ns=(1, 1))
    assert [extracted(), extracted()] == [1, 0]
    assert [extracted("--seed", "1"), extracted("--seed", "1")] == [2, 0]  # other random weights
    for path in (tmp_path / "features").iterdir():  # a flipped bit, which torch.load does not notice
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert [extracted("--seed", "1"), extracted("--seed", "1")] == [2, 0]


# ------------------------------------------------------------------------------------ whole evaluations

MODES = {
    "linear": [*TRAIN],
    "cached": ["--cached", *TRAIN],
    "knn": ["--knn", "--k", "1", "5"],
    "lbfgs": ["--lbfgs"],
    "finetune": ["--finetune", *TRAIN],
    "one point": ["--lr", "0.5", "--wd", "0", *TRAIN],
    "labels": ["--cached", "--labels", "50", "--epochs", "2", "--batch-size", "8"],
}


@pytest.mark.parametrize("mode", MODES)
def test_what_an_evaluation_leaves_and_says_when_started_again(mode, tmp_path, folder, capsys):
    flags = ["--data", folder, "--out", tmp_path / "out", *MODES[mode]]
    assert evaluate(*flags) == 0
    text = capsys.readouterr().out
    (record,) = results(tmp_path / "out")
    images = record["images"]
    assert images["train"] == (24 if mode == "labels" else 48) and images["test"] == 48
    assert images["held_out"] == (
        0 if mode in ("knn", "finetune", "one point") else 2 if mode == "labels" else 4
    )
    assert images["trained_on"] == images["train"] - (images["held_out"] if mode != "lbfgs" else 0)
    assert record["reported"] == ("fitted again on all training images" if mode == "lbfgs" else "as trained")
    assert {"views", "seconds", "versions", "chosen_on", "args", "classes"} <= record.keys()
    assert {"seed", "data_hash", "backbone_hash", "arch", "stem", "size"} <= record["args"].keys()
    for values in record["results"].values():
        assert 0 <= values["top1"] <= values["top5"] == 100 and f"{values['top1']:.2f}" in text
    if "--epochs" in MODES[mode]:  # of what is trained on, not of what is held out
        steps = 2 * (images["trained_on"] // record["args"]["batch_size"])
        assert steps == json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])["step"]
    grid = dict(linear=45, cached=45, labels=45, lbfgs=45).get(mode, 0)
    assert len(record.get("grid", [])) == grid
    sheet = torchvision.io.read_image(str(tmp_path / "out" / "neighbours.png"))
    assert sheet.shape == (3, 12 * 74 + 2, 10 * 74 + 2)
    kept = {p: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()}
    assert evaluate(*flags) == 0
    again = capsys.readouterr().out
    assert again and again in text and kept == {p: p.read_bytes() for p in kept}
    assert evaluate(*flags, "--seed", "5") == 2 and "seed 0 -> 5" in capsys.readouterr().err


def test_the_probe_learns_what_is_there_to_learn(tmp_path, folder):
    """The classes differ by a colour ramp, which random features keep."""
    cached = "--cached --epochs 20 --batch-size 16".split()
    for mode in (cached, ["--lbfgs"], ["--knn", "--k", "5"]):
        out = tmp_path / mode[0]
        assert evaluate("--data", folder, "--out", out, *mode) == 0
        assert next(iter(results(out)[0]["results"].values()))["top1"] > 90


def test_frames_are_green_where_the_class_is_right(tmp_path, folder):
    assert evaluate("--data", folder, "--out", tmp_path / "out", "--knn", "--k", "1") == 0
    sheet = torchvision.io.read_image(str(tmp_path / "out" / "neighbours.png"))
    corners = sheet[:, 3::74, 3::74].permute(1, 2, 0)[:12, :10].int()  # a frame's pixel of each tile
    greens = (corners[:, 1:, 1] > corners[:, 1:, 0]).float().mean()
    assert greens > 0.8 and (corners[:, 0, 2] == 255).all()  # the classes are easy; queries are blue


def on_this_rank(folder, out, mode):
    assert evaluate("--data", folder, "--out", out, *MODES[mode]) == 0
    record = results(out)[0]
    found = [v for r in record["results"].values() for v in r.values()]
    return found + [point["held_out"] for point in record.get("grid", [])]


@pytest.mark.parametrize("mode", ["knn", "cached", "linear"])
def test_two_ranks_find_what_one_finds(mode, tmp_path, folder, on_ranks):
    one = on_this_rank(folder, tmp_path / "one", mode)
    for found in on_ranks(on_this_rank, 2, folder, tmp_path / "two", mode):
        assert found == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_an_interrupted_evaluation_ends_bit_for_bit_as_one_that_was_not(
    mode, tmp_path, folder, monkeypatch, capsys
):
    flags, watch = ["--data", folder, *MODES[mode]], ev.Evaluation.watch

    def interrupt(self, *args):
        watch(self, *args)
        if self.step == 1:
            os.kill(os.getpid(), 15)

    with monkeypatch.context() as patch:
        patch.setattr(ev.Evaluation, "watch", interrupt)
        assert evaluate(*flags, "--out", tmp_path / "out") == 0
    assert "at step 2 of" in capsys.readouterr().err and not (tmp_path / "out" / "results.jsonl").exists()
    assert evaluate(*flags, "--out", tmp_path / "out") == evaluate(*flags, "--out", tmp_path / "whole") == 0
    a, b = (torch.load(tmp_path / out / "checkpoint.pt", weights_only=True) for out in ("out", "whole"))
    for name in a.keys() & {"heads", "model"}:
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name])
    a, b = (results(tmp_path / out)[0] for out in ("out", "whole"))
    assert a["results"] == b["results"]
    if mode == "finetune":
        net = torchvision.models.resnet18(num_classes=2)
        net.load_state_dict(torch.load(tmp_path / "out" / "finetuned.pth", weights_only=True), strict=True)


# ----------------------------------------------------------------------------------------- wrong use


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


BAD = {
    "no such folder": (["--data", "/no/such"], "/no/such"),
    "no test images": (["--data", "{noval}"], "no val/ or test/"),
    "unlabelled": (["--data", "{flat}"], "unlabelled"),
    "a flat folder": (["--data", "{folder}/train"], "no val/ or test/"),
    "classes only in train": (["--data", "{three}"], "1 classes are not in both splits: c"),
    "classes only in val": (["--data", "{extra}"], "no class folder of train/: c"),
    "one class": (["--data", "{one}"], "one class only"),
    "no such backbone": (["--backbone", "/no/such.pth"], "no such file"),
    "a backbone that is text": (["--backbone", "{text}"], "no checkpoint"),
    "a backbone that runs code": (["--backbone", "{bomb}"], "no checkpoint"),
    "a backbone that is another network": (["--backbone", "{other}"], "features.0.weight"),
    "a backbone that lacks a layer": (["--backbone", "{lacking}"], "layer4.1.conv2.weight"),
    "a damaged backbone": (["--backbone", "{damaged}"], "no checkpoint"),
    "another arch than the weights'": (["--backbone", "{good}", "--arch", "resnet50"], "are of resnet18"),
    "an unknown arch": (["--arch", "vit_b_16"], "vit_b_16"),
    "a list of missing files": (
        ["--labels", "{list}"],
        "4 of 5 are missing, or there twice: w.jpg, x.jpg, y.jpg",
    ),
    "labels that are neither": (["--labels", "many"], "neither a percentage"),
    "labels of 0 %": (["--labels", "0"], "neither a percentage"),
    "k larger than the bank": (["--knn", "--k", "49"], "49 is more than the 48 images"),
    "a flag of another mode": (["--knn", "--epochs", "3"], "--epochs has no meaning for knn"),
    "two rates to fine-tune": (["--finetune", "--lr", "1", "2"], "one --lr"),
    "a batch larger than the data": (["--batch-size", "46"], "46 is more than the 44"),
    "one image a class": (["--labels", "2", "--batch-size", "2"], "leave none to choose on"),
    "a foreign directory": (["--out", "{folder}", "--batch-size", "16"], "neither empty nor a run"),
    "nan": (["--lr", "nan"], "nan"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, folder):
    tmp, net = tmp_path_factory.mktemp("places"), torchvision.models.resnet18()
    make_folder(tmp / "noval", 2, splits=("train",))
    make_folder(tmp / "one", 9, classes=("only",))
    for name, split in (("three", "train"), ("extra", "val")):
        make_folder(make_folder(tmp / name, 2), 2, splits=(split,), classes=("c",))
    shutil.copytree(folder / "train" / "a", tmp / "flat" / "train")
    (tmp / "flat" / "val").mkdir()
    (tmp / "text").write_text("no weights")
    (tmp / "list").write_text("a/000.jpg\nw.jpg\nx.jpg\ny.jpg\nz.jpg\n")
    torch.save(Bomb(tmp / "exploded"), tmp / "bomb")
    torch.save(net.state_dict(), tmp / "good")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp / "other")
    state = net.state_dict()
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp / "lacking")
    data = bytearray((tmp / "good").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp / "damaged").write_bytes(data)
    return {path.name: path for path in tmp.iterdir()} | dict(folder=folder)


@pytest.mark.parametrize("case", BAD)
def test_wrong_use_is_answered_in_a_sentence_and_leaves_nothing(case, tmp_path, places, folder, capsys):
    flags, part = BAD[case]
    flags = [flag.format(**places) for flag in flags]
    flags += [] if "--data" in flags else ["--data", folder]
    flags += [] if "--out" in flags else ["--out", tmp_path / "out"]
    assert evaluate(*flags) == 2
    text = capsys.readouterr().err.strip().splitlines()
    assert len(text) == 1 and "error: " in text[0] and part in text[0]
    assert not list(tmp_path.iterdir()) and not (places["bomb"].parent / "exploded").exists()


def test_a_list_of_file_names_is_what_is_trained_on(tmp_path, folder):
    names = [f"{name}/{i:03}.jpg" for name in ("a", "b") for i in range(0, 24, 3)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    split = common.list_folder(folder, tmp_path / "none").train
    found = ev.choose_labels(split, str(tmp_path / "list.txt"), 0)
    assert [os.path.relpath(found.path(i), folder / "train") for i in range(16)] == names
    assert found.labels.tolist() == [0] * 8 + [1] * 8


def test_named_data_sets_of_image_files_are_read(tmp_path):
    """Describable Textures, as torchvision lays it out: partition 1, train and val to train on."""
    make_folder(tmp_path / "dtd/dtd", 6, splits=("images",), classes=("braided", "dotted"))
    (tmp_path / "dtd/dtd/labels").mkdir()
    for i, split in enumerate(("train", "val", "test")):
        lines = [f"{name}/{j:03}.jpg" for name in ("braided", "dotted") for j in (2 * i, 2 * i + 1)]
        (tmp_path / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(lines))
    data = common.named_data("dtd", str(tmp_path))
    assert data.train.labels.tolist() == [0, 0, 1, 1] * 2 and data.classes == ["braided", "dotted"]
    assert data.test.path(3).endswith("dotted/005.jpg") and data.test.read(3).shape == (3, 20, 24)
    assert evaluate("--data", f"dtd:{tmp_path}", "--out", tmp_path / "out", "--knn", "--k", "1") == 0


def test_the_lines_of_the_readme_for_detection_and_segmentation_run(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text().partition("## Evaluation")[2]
    (lines,) = re.findall(r"(?:^    .*\n|^\n)*^    .*FasterRCNN\((?:.*\n)(?:^    .*\n|^\n)*", text, re.M)
    torch.save(common.resnet("resnet50")[0].state_dict(), tmp_path / "backbone.pth")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(line[4:] for line in lines.splitlines()), names)
    first = torch.load("backbone.pth", weights_only=True)["conv1.weight"]
    assert torch.equal(names["detector"].backbone.body.conv1.weight, first)
    assert torch.equal(names["segmenter"].backbone.conv1.weight, first)
    image = torch.rand(3, 64, 64)
    assert {"boxes", "labels", "scores"} <= names["detector"].eval()([image])[0].keys()
    assert names["segmenter"].eval()(image[None])["out"].shape == (1, 21, 64, 64)
