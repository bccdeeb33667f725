"""Evaluations: classifiers against naive ones, choices that never see test images, checkpoints, wrong use."""

import argparse
import json
import math
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, make_folder, same, state_of

import common
import eval_linear as ev

FLAGS = "--backbone random --arch resnet18 --size 16 --device cpu --precision fp32 --workers 0"
SHORT = "--batch-size 16 --epochs 2 --log-every 1"


def evaluate(flags, data, out, **paths):
    """Run an evaluation in this process; its exit code, 0 where it does not exit."""
    words = f"{FLAGS} {SHORT} --data {{data}} --out {{out}} {flags}".split()
    try:
        ev.main(ev.get_args([word.format(data=data, out=out, **paths) for word in words]))
    except SystemExit as end:
        return end.code
    return 0


def results(out):
    """mode -> record."""
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {record["mode"]: record for record in records}


def problem(n):
    """Features (n, 6) and labels of four overlapping classes."""
    y = torch.arange(n) % 4
    return 3 * F.one_hot(y, 6) + 2 * torch.randn(n, 6, generator=torch.Generator().manual_seed(n)), y


def test_heads_trained_at_once_are_those_trained_one_at_a_time():
    points = [(lr, wd) for lr in (0.01, 0.3, 2.0) for wd in (0.0, 1e-2)]
    heads = ev.Heads(points, 4, 6)
    optimizer = torch.optim.SGD([heads.weight], momentum=0.9)
    for step in range(30):
        h, y = problem(24 + 4 * step)
        common.set_lr(optimizer, common.warmup_cosine(step, 0, 30))
        optimizer.zero_grad()
        F.cross_entropy(heads(h), y[:, None].expand(-1, 6), reduction="none").mean(0).sum().backward()
        heads.scale_gradient()
        optimizer.step()
    for (lr, wd), weight in zip(points, heads.weight.unbind(1), strict=True):
        W, b = torch.zeros(4, 6, requires_grad=True), torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.SGD([dict(params=[W], weight_decay=wd), dict(params=[b])], momentum=0.9)
        for step in range(30):
            h, y = problem(24 + 4 * step)
            common.set_lr(optimizer, lr * common.warmup_cosine(step, 0, 30))
            optimizer.zero_grad()
            F.cross_entropy(F.linear(h, W, b), y).backward()
            optimizer.step()
        assert (torch.cat([W, b[:, None]], 1) - weight).abs().max() < 1e-5


@pytest.mark.parametrize("penalty", [10.0, 1e-3, 1e-7])
def test_lbfgs_reaches_the_optimum(penalty):
    h, y = problem(61)
    h = h.double() * 10.0 ** -torch.arange(6.0).double()
    variance, axes = torch.linalg.eigh(torch.cov(h.mT))
    h = ev.with_one((h - h.mean(0)) @ axes)
    weight = ev.fit_logistic(h, y, penalty, h.new_zeros(4, 7), variance).requires_grad_()
    loss = F.cross_entropy(h @ weight.mT, y) + penalty / 2 * weight[:, :-1].square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-5


def test_knn_is_a_loop_over_images():
    (bank, labels), (h, y) = problem(40), problem(9)
    similarity, rows = common.nearest(h, bank, 5)
    votes = common.knn_votes(similarity, labels[rows], 4)
    for query, vote in zip(h, votes, strict=True):
        cosine = F.cosine_similarity(query[None], bank)
        expected = torch.zeros(4)
        for i in cosine.argsort()[-5:]:
            expected[labels[i]] += math.exp(cosine[i] / 0.07)
        torch.testing.assert_close(vote, expected)
    right = votes.argmax(1) == y
    shares = [right[y == label].double().mean() for label in range(4)]
    wanted = dict(top1=100 * sum(right.tolist()) / 9, top5=100, mean_per_class=25 * float(sum(shares)))
    assert ev.accuracies(votes, y) == pytest.approx(wanted) and 30 < wanted["top1"] < 100


def numbers_on_this_rank(data, out):
    common.leave_ranks = bool  # the ranks of other tests go on
    assert evaluate("--mode knn,cached --k 1 4", data, out) == 0
    common.from_rank_0(bool)
    return [[*record["results"].values()] for record in results(out).values()]


def test_two_ranks_find_what_one_finds(tmp_path, on_ranks, monkeypatch):
    monkeypatch.setattr(common, "leave_ranks", bool)
    data = make_folder(tmp_path / "data", 12)
    (data / "val/b/000.jpg").unlink()  # 23 images: 12 and 11 on two ranks
    (data / "val/b/001.jpg").rename(data / "val/a/x.jpg")  # not all are right
    [[one, *_], probe] = numbers_on_this_rank(data, tmp_path / "one")
    shutil.rmtree(tmp_path / "features")
    for [[found, *_], found_probe] in on_ranks(numbers_on_this_rank, 2, data, tmp_path / "two"):
        assert found == pytest.approx(one) and found_probe == [pytest.approx(probe[0], abs=1e-4)]


def test_shuffled_test_labels_change_the_accuracy_but_not_what_is_chosen(tmp_path, folder):
    data = shutil.copytree(folder, tmp_path / "data")
    for name, other in (("a", "b"), ("b", "a")):
        for path in sorted((data / "val" / name).glob("0*"))[::2]:
            path.rename(data / "val" / other / f"moved-{path.name}")
    for place, out in ((folder, "right"), (data, "wrong")):
        assert evaluate("--mode cached,lbfgs", place, tmp_path / out) == 0
    for mode, right in results(tmp_path / "right").items():
        wrong = results(tmp_path / "wrong")[mode]
        assert right["grid"] == wrong["grid"] and len(right["grid"]) == 45
        assert right["results"].keys() == wrong["results"].keys()
        ((good,), (bad,)) = (record["results"].values() for record in (right, wrong))
        assert good["top1"] - bad["top1"] > 20


def under(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


NET, OTHER = torchvision.models.resnet18(), torchvision.models.resnet18()
STATE, NOT, CHILDREN = NET.state_dict(), OTHER.state_dict(), torch.nn.Sequential(*list(NET.children())[:-1])
LAYOUTS = {  # what other codebases save round a ResNet, whose published choice is STATE
    "torchvision": STATE,
    "without counters": {name: value for name, value in STATE.items() if "tracked" not in name},
    "moco": dict(state_dict=under("module.encoder_k.", NOT) | under("module.encoder_q.", STATE), epoch=3),
    "moco v3": dict(state_dict=under("module.momentum_encoder.", NOT) | under("module.base_encoder.", STATE)),
    "dino": dict(student=under("module.backbone.", NOT), teacher=under("backbone.", STATE)),
    "vicreg": dict(model=under("module.backbone.", STATE), args=argparse.Namespace(arch="resnet18", lr=0.1)),
    "corinfomax": dict(model_state_dict=under("backbone.", STATE), optimizer=dict(state={0: dict(step=1)})),
    "swav": under("module.", STATE) | {"module.prototypes.weight": torch.zeros(3)},
    "lightly": under("backbone.", CHILDREN.state_dict()),
    "lightly, alone": CHILDREN.state_dict(),
    "our checkpoint": dict(online=under("backbone.", NOT), target=under("0.", NOT), average=STATE),
    "a target alone": under("target_network.", STATE),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_published_resnet_is_found_in_a_checkpoint(name, tmp_path):
    torch.save(LAYOUTS[name], tmp_path / "file", _use_new_zipfile_serialization=name != "moco")
    args = ev.get_args(["--backbone", str(tmp_path / "file")])
    loaded = ev.load_backbone(args).state_dict()
    assert (args.arch, args.stem) == ("resnet18", "imagenet")
    assert all(torch.equal(value, STATE[key]) for key, value in loaded.items())


@pytest.mark.parametrize("arch, stem", [("resnet34", "cifar"), ("resnet50", "imagenet")])
def test_architecture_and_stem_are_read_from_the_weights_and_size_from_the_run(arch, stem, tmp_path):
    torch.save(common.resnet(arch, stem)[0].state_dict(), tmp_path / "backbone.pth")
    (tmp_path / "args.json").write_text('{"size": 64}')
    args = ev.get_args(["--backbone", str(tmp_path / "backbone.pth")])
    ev.load_backbone(args)
    assert (args.arch, args.stem, args.size, args.resize) == (arch, stem, 64, 73)


@pytest.mark.parametrize("mode", ["crops", "finetune"])
def test_an_interrupted_evaluation_ends_bit_for_bit_as_one_that_was_not(mode, tmp_path, folder, monkeypatch):
    update, calls = common.ema_update, []

    def interrupt(*args):
        update(*args)
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), 15)

    monkeypatch.setattr(common, "ema_update", interrupt)
    for out in ("out", "out", "whole"):
        assert evaluate(f"--mode {mode} --ema 0.9", folder, tmp_path / out) == 0
        assert (tmp_path / out / "results.jsonl").exists() == (len(calls) > 2)
    assert same(state_of(tmp_path / "out" / mode), state_of(tmp_path / "whole" / mode))
    assert results(tmp_path / "out")[mode]["results"] == results(tmp_path / "whole")[mode]["results"]
    exported = f"--backbone {tmp_path}/out/{mode}/model.pth --mode knn --batch-size 4096"
    assert evaluate(exported, folder, tmp_path / "again") == 0


def test_features_are_made_once_and_again_when_images_change(tmp_path, folder, monkeypatch, capsys):
    data, made, features = shutil.copytree(folder, tmp_path / "data"), [], common.features
    monkeypatch.setattr(common, "features", lambda *args: made.append(args) or features(*args))
    for out, expected in (("1", 2), ("2", 0), ("3", 1)):
        made.clear()
        assert evaluate("--mode knn,cached", data, tmp_path / out) == 0
        assert len(made) == expected and (tmp_path / out / "neighbours.png").exists()
        if out == "2":
            shutil.copy(data / "val/b/000.jpg", data / "val/a/000.jpg")
    protocol = "cosine kNN at temperature 0.07; resnet18 of random; "
    assert f"{protocol}{data}: 48 training, 48 test images, centre 16 of 18 pixels" in capsys.readouterr().out
    assert evaluate("--mode knn,cached --k 3", data, tmp_path / "1") == 2  # another evaluation is there


def test_labels_are_a_share_of_each_class_or_a_list_of_files(tmp_path):
    images = common.list_folder(make_folder(tmp_path, 20, splits=("a", "b", "c"), classes=("",)))
    args = argparse.Namespace(labels="10", seed=0)
    assert images.labels[ev.labelled_rows(images, args)].tolist() == [0, 0, 1, 1, 2, 2]
    args.labels = str(tmp_path / "list")
    (tmp_path / "list").write_text("007.jpg\n")
    assert len(ev.labelled_rows(images.take(torch.arange(20)), args)) == 1


def test_data_sets_of_torchvision_are_read_by_their_public_interface(tmp_path):
    make_folder(tmp_path / "dtd/dtd", 6, splits=("images",))
    (tmp_path / "dtd/dtd/labels").mkdir()
    for i, split in enumerate(("train", "val", "test")):
        lines = [f"{name}/{j:03}.jpg" for name in ("a", "b") for j in (2 * i, 2 * i + 1)]
        (tmp_path / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(lines))
    train, test = ev.open_files("dtd", str(tmp_path))
    assert train.labels.tolist() == [0, 0, 1, 1] * 2 and train.classes == ["a", "b"]
    assert test.data[3].endswith(b"b/005.jpg") and test.read(3).shape == (3, 20, 24)


def test_a_recipe_is_flags_that_others_override():
    args = ev.get_args("--backbone random --recipe corinfomax-10 --lr-head 3".split())
    assert (args.mode, args.labels, args.lr_head, args.scale) == ("finetune", "10", 3.0, 1.0)
    args.epochs = 20
    assert [ev.schedule(args, step, 40, 0.5) for step in (9, 10, 20, 39)] == [1, 0.5, 0.25, 0.125]
    for recipe in ev.RECIPES:
        assert ev.get_args(["--backbone", "random", "--recipe", recipe]).recipe == recipe


BAD = {
    "--data /no/such": "/no/such",
    "--data {data}/train": "has no test images",
    "--backbone /no/such.pth": "No such file",
    "--backbone {text}": "cannot be read as weights",
    "--backbone {bomb}": "cannot be read as weights (UnpicklingError",
    "--backbone {another}": "no whole ResNet of torchvision: 'features.0.weight'",
    "--backbone {damaged}": "wrong checksum",
    "--arch vit_b_16": "vit_b_16",
    "--mode knn,linear": "--mode knn,linear: choose from",
    "--labels many": "--labels many is neither",
    "--mode cached --batch-size 46": "46 is more than the 44 images",
    "--mode cached --labels 5 --batch-size 2": "leaves none to choose on",
    "--out {data}": "neither empty nor a run",
    "--lr nan": "nan is not between",
}


@pytest.mark.parametrize("flags", BAD)
def test_wrong_use_is_answered_in_a_sentence_and_leaves_nothing(flags, tmp_path, folder, capsys):
    paths = {name: tmp_path / name for name in ("text", "bomb", "another", "damaged")}
    paths["text"].write_text("no weights")
    torch.save(os.system, paths["bomb"])
    torch.save({"features.0.weight": torch.zeros(3)}, paths["another"])
    torch.save(dict(weight=torch.zeros(10000)), paths["damaged"])
    content = paths["damaged"].read_bytes()
    paths["damaged"].write_bytes(content[:9999] + b"1" + content[10000:])
    assert evaluate(flags, folder, tmp_path / "out", **paths) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last and BAD[flags] in last
    assert not (tmp_path / "out").exists()


def test_the_lines_of_the_readme_for_detection_and_segmentation_run(tmp_path, monkeypatch):
    block = r"(?:^    .*\n|^\n)*^    .*FasterRCNN\((?:.*\n)(?:^    .*\n|^\n)*"
    (lines,) = re.findall(block, (ROOT / "README.md").read_text(), re.M)
    torch.save(common.resnet("resnet50")[0].state_dict(), tmp_path / "backbone.pth")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(line[4:] for line in lines.splitlines()), names)
    first = torch.load("backbone.pth", weights_only=True)["conv1.weight"]
    assert torch.equal(names["detector"].backbone.body.conv1.weight, first)
    assert torch.equal(names["segmenter"].backbone.conv1.weight, first)
