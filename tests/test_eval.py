"""Evaluations: classifiers against naive ones, choices that never see test images, checkpoints."""

import argparse
import itertools
import shutil
import signal
import textwrap
from unittest.mock import Mock

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import EVALUATION, ROOT, exit_code, make_folder, read_log, same, signals, state_of, train

import common
import eval_linear as ev


def evaluate(flags, data, out):
    """Run an evaluation in this process; its exit code."""
    return train("--data", data, "--out", out, *flags.split(), module=ev, usual=EVALUATION)


def problem(n):
    """Features (n, 6) and labels of four overlapping classes."""
    y = torch.arange(n) % 4
    noise = torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    return 3 * F.one_hot(y, 6) + 2 * noise, y


def test_heads_trained_at_once_are_those_trained_one_at_a_time(tmp_path, monkeypatch):
    h, y = problem(64)
    monkeypatch.setattr(ev, "kept_features", lambda *_: (h.float(), y))
    images = common.Images(h, y, list("abcd"), "")
    grid = f"--lr .01 .3 2 --wd 0 .1 --warmup-steps=3 --batch-size=32 --epochs=9 --size=96 --out={tmp_path}"
    args, data = ev.plan(ev.get_args([*EVALUATION, *grid.split()]), "cached", images, images)
    assert common.side_before_centre(args.size) == 96  # STL-10's images are left as they are
    net, device = argparse.Namespace(inplanes=6), common.start(args, ev.__file__)
    ev.train(args, net, data, device)
    heads = state_of(tmp_path / "cached")["online"]["1.weight"].unflatten(0, (4, 6)).unbind(1)
    for (lr, wd), head in zip(itertools.product(args.lr, args.wd), heads, strict=True):
        weight = torch.zeros(4, 7, requires_grad=True)
        optimizer = torch.optim.SGD([weight], momentum=0.9, weight_decay=wd)
        for step, x, labels in ev.training_batches(args, data, (h, y), device, 0, 9):
            common.set_lr(optimizer, 32 / 256 * lr * ev.schedule(args, step, 9, 0.1))
            optimizer.zero_grad()
            F.cross_entropy(ev.with_one(x) @ weight.mT, labels).backward()
            optimizer.step()
        torch.testing.assert_close(weight, head, rtol=0, atol=1e-5)


@pytest.mark.parametrize("penalty", [10.0, 1e-3, 1e-7])
def test_lbfgs_reaches_the_optimum(penalty):
    h, y = problem(61)
    h = h * 10.0 ** -torch.arange(6.0).double()
    weight = ev.fit_logistic(ev.with_one(h), y, penalty, h.new_zeros(4, 7)).requires_grad_()
    loss = F.cross_entropy(ev.with_one(h) @ weight.mT, y) + penalty / 2 * weight[:, :-1].square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-5


@pytest.mark.parametrize("per_class, held", [(20, 8), (3, 1)])
def test_a_tenth_of_each_class_is_held_out_or_of_all_images_if_few(per_class, held):
    h, y = problem(4 * per_class)
    images = common.Images(h, y, list("abcd"), "")
    args = ev.get_args([*EVALUATION, "--size=32"])
    _, data = ev.plan(args, "lbfgs", images, images)
    assert len(data.held) == held and y[data.held].bincount().max() <= 2
    assert torch.cat([data.fit, data.held]).sort()[0].tolist() == list(range(len(h)))
    images.labels = torch.arange(len(h))  # a held-out image would be the only one of its class
    assert exit_code(lambda: ev.plan(args, "lbfgs", images, images)) == 2


def test_knn_is_a_loop_over_images():
    (bank, labels), (h, _) = problem(40), problem(9)
    expected = torch.zeros(9, 4)
    for query, votes in zip(h, expected, strict=True):
        cosine = F.cosine_similarity(query, bank)
        for i in cosine.argsort()[-5:]:
            votes[labels[i]] += (cosine[i] / 0.07).exp()
    similarity, rows = common.nearest(h, bank, 5)
    torch.testing.assert_close(common.knn_votes(similarity, labels[rows], 4), expected)
    scores = -torch.arange(6.0).expand(4, 6)  # class 0 is best, class 5 is not among five
    assert ev.accuracies(scores, torch.tensor([0, 0, 4, 5])) == pytest.approx(
        dict(top1=50, top5=75, mean_per_class=100 / 3)
    )


def test_two_ranks_find_what_one_finds(tmp_path, on_ranks):
    data = make_folder(tmp_path / "data", 12)
    (data / "val/b/000.jpg").rename(data / "train/a/x.jpg")  # 23 test images: 12 and 11 on two ranks
    flags = "--mode knn,cached --k 1 4"
    one, two = tmp_path / "1/out", tmp_path / "2/out"
    assert evaluate(flags, data, one) == 0
    assert on_ranks(evaluate, 2, flags, data, two) == [0, 0]
    for found, expected in zip(read_log(two, "results.jsonl"), read_log(one, "results.jsonl"), strict=True):
        torch.testing.assert_close(found["results"], expected["results"], rtol=0, atol=1e-4)
    for found, expected in zip(read_log(two / "cached"), read_log(one / "cached"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)


def test_other_test_labels_change_the_accuracy_but_not_what_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "fit_logistic", Mock(wraps=ev.fit_logistic))
    data = make_folder(tmp_path / "data", 24)
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    assert evaluate("--mode cached,lbfgs", data, right) == 0
    (data / "val/b").rename(data / "val/a/b")  # all images have the label of a
    assert evaluate("--mode cached,lbfgs", data, wrong) == 0
    for before, after in zip(read_log(right, "results.jsonl"), read_log(wrong, "results.jsonl"), strict=True):
        assert before["grid"] == after["grid"] and len(before["grid"]) == 45
        ((name, accuracies),) = before["results"].items()
        assert accuracies["top1"] > 90 and after["results"][name]["top1"] < 60
        assert not any(accuracy % 25 for accuracy in before["grid"].values())  # of four held-out images
    assert {len(call.args[0]) for call in ev.fit_logistic.call_args_list} == {44, 48}  # the others, and all


@pytest.mark.parametrize("mode", ["crops", "finetune"])
def test_an_interrupted_evaluation_ends_bit_for_bit_as_one_that_was_not(mode, tmp_path, folder):
    flags = f"--mode {mode} --ema 0.9"
    out, uncut = tmp_path / "out", tmp_path / "uncut"
    assert evaluate(flags, folder, uncut) == 0
    with signals(signal.SIGTERM):
        assert evaluate(flags, folder, out) == 0 and not (out / "results.jsonl").exists()
    assert evaluate(flags, folder, out) == 0
    state = state_of(out / mode)
    assert same(state, state_of(uncut / mode)) and "average" in state
    assert read_log(out, "results.jsonl")[0]["results"] == read_log(uncut, "results.jsonl")[0]["results"]
    groups = state["optimizer"]["param_groups"]
    assert [(group["peak"], group["fall"]) for group in groups] == [(1.0, 0.1), (0.01, 0.2)]
    assert evaluate(f"--backbone {out}/{mode}/model.pth --mode knn", folder, tmp_path / "again") == 0


def test_features_are_kept_until_images_change(tmp_path, folder, monkeypatch, capsys):
    data = shutil.copytree(folder, tmp_path / "data")
    assert evaluate("--mode knn --batch-size 4096", data, tmp_path / "1") == 0
    how = f"temperature 0.07; resnet18 of random; {data}: 48 training, 48 test images, centre 20 of 22 pixels"
    assert how in capsys.readouterr().out
    monkeypatch.setattr(common, "features", None)
    assert evaluate("--mode knn,cached", data, tmp_path / "2") == 0
    assert (tmp_path / "2/neighbours.png").exists()
    for old, new in (("val/a", "a"), ("val/b", "val/a"), ("a", "val/b")):  # same names, labels and pixels
        (data / old).rename(data / new)
    with pytest.raises(TypeError):  # they would be made again
        evaluate("--mode knn", data, tmp_path / "3")
    (data / "val/a/000.jpg").unlink()
    assert evaluate("--mode knn --batch-size 4096", data, tmp_path / "1") == 2
    assert "holds results of other images" in capsys.readouterr().err


@pytest.mark.parametrize("zipped", [True, False])
def test_features_of_images_are_written_with_their_names(
    zipped, tmp_path, monkeypatch, folder, big_folder, capsys
):
    """Of large images in a zip, or of small ones that are kept in memory."""
    root = shutil.copytree(big_folder if zipped else folder, tmp_path / "images")
    (root / "train/a/odd\nname.jpg").write_bytes((root / "train/a/000.jpg").read_bytes())
    kept = sorted(common.image_names(root))
    data, size, prefix = root, 20, f"{root}/"
    if zipped:
        damaged = ["train/a/003.jpg", "val/b/000.jpg"]
        for name in damaged:
            (root / name).write_bytes(b"damaged")
            kept.remove(name)
        data, size, prefix = shutil.make_archive(root, "zip", root), 64, ""
    monkeypatch.setattr(ev, "PART", 7)
    out = tmp_path / "out"
    flags = "--mode features" + (" --size 64" if zipped else "")
    assert evaluate(flags, data, out) == 0
    assert zipped or evaluate(flags, data, out) == 0  # the same again
    names = (out / "names.txt").read_text().splitlines()
    assert names == [prefix + name.replace("\n", "\\n") for name in kept]
    features = numpy.load(out / "features.npy")
    assert features.shape == (len(kept), 512) and features.dtype == numpy.float32
    net = ev.load_backbone(ev.get_args(EVALUATION))[0].eval()
    view = common.View(size=size, resize=size * 8 // 7)
    for row in (0, len(kept) // 2, len(kept) - 1):
        pixels = common.decode(root / kept[row])[None]
        x = common.make_view(pixels, None, view, None, True)
        with torch.no_grad():
            torch.testing.assert_close(net(x)[0].numpy(), features[row], rtol=0, atol=2e-2)
    assert (out / "neighbours.png").exists() and not list(out.glob("*.tmp"))
    assert capsys.readouterr().err.count("unreadable") == (2 if zipped else 0)


def test_features_of_one_image_and_of_none_that_can_be_read(tmp_path, capsys):
    data = make_folder(tmp_path / "images", 1, splits=[""], classes=["a"])
    assert evaluate("--mode features", data, tmp_path / "one") == 0
    assert numpy.load(tmp_path / "one/features.npy").shape == (1, 512)
    (data / "a/000.jpg").write_bytes(b"damaged")
    assert evaluate("--mode features --size 32", data, tmp_path / "none") == 2
    assert "no image can be read, of 1" in capsys.readouterr().err


def test_two_ranks_write_the_features_that_one_writes(tmp_path, big_folder, on_ranks):
    root = shutil.copytree(big_folder / "val", tmp_path / "images")
    (root / "b/003.jpg").write_bytes(b"damaged")  # on the second rank
    one, two = tmp_path / "1", tmp_path / "2"
    assert evaluate("--mode features --size 32", root, one) == 0
    assert on_ranks(evaluate, 2, "--mode features --size 32", root, two) == [0, 0]
    assert (one / "names.txt").read_text() == (two / "names.txt").read_text()
    features = [numpy.load(out / "features.npy") for out in (one, two)]
    assert len(features[0]) == 39
    numpy.testing.assert_allclose(*features, rtol=0, atol=1e-4)


def test_the_protocol_is_printed_once_above_a_table(capsys):
    ev.print_table({"k = 10": dict(top1=9.5, top5=50.0), "k = 200": dict(top1=10.25, top5=51.0)}, "kNN")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["kNN, in %:", "top1 top5", "k = 10 9.50 50.00", "k = 200 10.25 51.00"]


def test_torchvision_data_sets_are_read_by_their_public_interface(tmp_path):
    root = make_folder(tmp_path / "dtd/dtd", 6, splits=("images",))
    (root / "labels").mkdir()
    for i, split in enumerate(("train", "val", "test")):
        (root / f"labels/{split}1.txt").write_text(f"a/00{i}.jpg\nb/00{i + 3}.jpg")
    images, test = ev.open_files("dtd", str(tmp_path))
    assert images.labels.tolist() == [0, 1, 0, 1] and images.classes == ["a", "b"]
    assert test.data[1].endswith(b"b/005.jpg")
    (root / "images/a/000.jpg").rename(root / "images/a/0 0.jpg")
    images.data[0] = images.data[0].replace(b"000", b"0 0")
    (root / "labels/train1.txt").write_text("a/0 0.jpg\n\nb/003.jpg\n")
    for labels, rows in (("50", [2, 3]), (root / "labels/train1.txt", [0, 1])):  # per cent; a list
        args = argparse.Namespace(labels=str(labels), seed=0)
        assert ev.labelled_rows(images, args).tolist() == rows


def test_a_recipe_is_flags_that_others_override():
    for recipe in ev.RECIPES:
        ev.get_args(["--backbone=random", "--recipe", recipe])
    args = ev.get_args("--backbone random --recipe corinfomax-10 --lr-head 3 --epochs 20".split())
    assert (args.mode, args.labels, args.lr_head, args.scale) == ("finetune", "10", 3.0, 1.0)
    assert [ev.schedule(args, step, 40, 0.5) for step in (9, 10, 20, 39)] == [1, 0.5, 0.25, 0.125]
    assert ev.schedule(ev.get_args(["--backbone=random", "--recipe=corinfomax-linear"]), 9, 9, 0.1) == 0.01
    args = ev.get_args("--backbone random --recipe corinfomax-linear --steps 2 --epochs 4".split())
    assert [ev.schedule(args, step, 40, 0.5) for step in (19, 20)] == [1, 0.5]


def test_recipes_and_percentages_of_labels_have_directories_of_their_own():
    protocols = [f"--recipe {recipe}" for recipe in ev.RECIPES]
    protocols += ["--mode lbfgs", "--mode lbfgs --labels 1", "--mode lbfgs --labels 10", "--mode finetune"]
    outs = {ev.get_args(f"--backbone random {protocol}".split()).out for protocol in protocols}
    assert len(outs) == len(protocols)


def test_the_lines_of_the_readme_for_detection_and_segmentation_run(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text().partition("detection and segmentation:\n")[2]
    torch.save(common.resnet("resnet50")[0].state_dict(), tmp_path / "backbone.pth")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(textwrap.dedent(readme.partition("\n## ")[0]), names)
    assert {"detector", "segmenter"} <= names.keys()
