"""Runs as a user meets them: errors of use, kill and resume, unreadable images, micro-batches, the demo."""

import fcntl
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import torchvision
from conftest import ROOT, TINY, make_folder, read_log, script
from PIL import Image

import common
import hsic


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_the_network_is_torchvisions_down_to_single_pixels(arch):
    net = common.resnet(arch)[0].double()
    plain = getattr(torchvision.models, arch)(num_classes=1).double()
    plain.fc = torch.nn.Identity()
    plain.load_state_dict(net.state_dict())
    x = torch.rand(8, 3, 32, 32).double()
    h, expected = net(x), plain(x)
    assert torch.allclose(h, expected, atol=1e-10)
    h.square().mean().backward()
    expected.square().mean().backward()
    largest = max(float(p.grad.norm()) for p in plain.parameters())
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-10 * largest


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def train(*flags):
    """A run in this process; the exit code, or 0."""
    try:
        hsic.main(hsic.get_args([*TINY, *map(str, flags)]))
    except SystemExit as end:
        return end.code
    return 0


# ------------------------------------------------------------------------------------------- errors


BAD = {
    "no such folder": (["--data", "/no/such"], "/no/such"),
    "no images": (["--data", "{empty}"], "no images"),
    "fewer images than a batch": (["--data", "{folder}", "--batch-size", "4096"], "4096"),
    "batch of 0": (["--batch-size", "0"], "0"),
    "batch of 1": (["--batch-size", "1"], "1"),
    "learning rate nan": (["--lr", "nan"], "nan"),
    "learning rate -1": (["--lr", "-1"], "-1"),
    "epochs -1": (["--epochs", "-1"], "-1"),
    "epochs text": (["--epochs", "many"], "many"),
    "gamma nan": (["--gamma", "nan"], "nan"),
    "unknown recipe": (["--recipe", "nope"], "nope"),
    "unknown data set": (["--data", "cifar11"], "cifar11"),
    "data set not there": (["--data", "cifar10:{empty}"], "cifar10"),
    "unknown arch": (["--arch", "vit_b_16"], "vit_b_16"),
    "unknown device": (["--device", "tpu"], "tpu"),
    "absent device": (["--device", "cuda:7"], "cuda:7"),
    "abbreviated flag": (["--epoch", "3"], "--epoch"),
    "foreign directory": (["--out", "{folder}"], "neither empty nor a run"),
    "out is a file": (["--out", "{file}"], "not a folder"),
    "out below a file": (["--out", "{file}/x"], "not a folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_of_use_are_one_sentence_exit_2_and_leave_nothing(case, tmp_path, folder, capsys, monkeypatch):
    flags, part = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = dict(empty=tmp_path / "empty", folder=folder, file=tmp_path / "file")
    flags = [flag.format(**places) for flag in flags]
    flags += [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    recipe = [] if "--recipe" in flags else ["--recipe", "demo"]
    before = {*tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", ["hsic.py"])
    code = train(*flags, *recipe)
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and text.startswith("hsic.py: error: ") and part in text and "Traceback" not in text
    assert {*tmp_path.iterdir()} == before


def test_an_error_from_the_shell_is_one_line_without_a_traceback(tmp_path):
    done = script("hsic.py", "--data", "/no/such", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_batch_that_ranks_cannot_share_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train("--out", tmp_path / "out") == 2
    assert "--batch-size 16 on 3 ranks" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_directory_with_other_hyper_parameters_is_refused_by_name(tmp_path, folder, capsys):
    common_flags = ["--data", folder, "--recipe", "demo", "--out", tmp_path / "out", "--epochs", "1"]
    assert train(*common_flags) == 0
    log = read_log(tmp_path / "out")
    assert train(*common_flags, "--lr", "0.123", "--arch", "resnet34") == 2
    text = capsys.readouterr().err
    assert "lr 0.002 -> 0.123" in text and "arch resnet18 -> resnet34" in text
    assert train(*common_flags, "--workers", "1") == 0  # finished, and says so again
    assert read_log(tmp_path / "out") == log


# ------------------------------------------------------------------------------------------ a run


def test_what_a_run_leaves_behind(tmp_path, folder):
    out = tmp_path / "out"
    assert train("--data", folder, "--recipe", "demo", "--out", out, "--local-crops", "2") == 0
    assert {"args.json", "log.jsonl", "checkpoint.pt", "backbone.pth", "hsic.py", "common.py"} <= {
        p.name for p in out.iterdir()
    }
    log = read_log(out)
    assert log[0]["step"] == 0 and 0 <= log[0]["knn"] <= 1
    assert log[-1]["step"] == 6 and 0 <= log[-1]["knn"] <= 1 and 0 <= log[-1]["probe"] <= 1
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert {
        "dependence",
        "hsic_zy",
        "sqrt_hsic_zz",
        "c",
        "lr",
        "rank_z",
        "rank_h",
        "std_z",
        "images_per_second",
    } <= steps[0].keys()
    assert json.loads((out / "args.json").read_text())["recipe"] == "demo"
    net = torchvision.models.resnet18()
    net.fc = torch.nn.Identity()
    net.load_state_dict(torch.load(out / "backbone.pth", weights_only=True), strict=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out))
    board.Reload()
    assert {"loss", "knn", "lr", "rank_z"} <= set(board.Tags()["scalars"]) and board.Tags()["images"] == [
        "views"
    ]


WAYS = [
    "--target",
    "--kernel linear",
    "--kernel gaussian --features 32",
    "--scale adam --features 32",
    "--optimizer sgd",
]


@pytest.mark.parametrize("flags", WAYS)
def test_every_way_of_running_trains(flags, tmp_path, folder):
    assert train("--data", folder, "--recipe", "demo", "--out", tmp_path / "out", *flags.split()) == 0
    assert read_log(tmp_path / "out")[-1]["step"] == 6


@pytest.mark.parametrize("layout", ["unlabelled", "one class", "no val"])
def test_folders_without_labels_and_of_one_class_train(layout, tmp_path, folder, capsys):
    data = {"unlabelled": folder / "train", "one class": tmp_path / "one", "no val": tmp_path / "noval"}[
        layout
    ]
    if layout != "unlabelled":
        make_folder(
            data, 32, splits=("train",) if layout == "no val" else ("train", "test"), classes=("only",)
        )
    assert train("--data", data, "--recipe", "demo", "--out", tmp_path / "out", "--epochs", "1") == 0
    assert ("no probe and no kNN" in capsys.readouterr().err) == (layout != "one class")


def test_demo_separates_the_kinds_far_better_than_at_initialisation(tmp_path):
    """`python hsic.py`, one epoch of its three."""
    done = script("hsic.py", "--out", tmp_path / "out", "--epochs", 1, env=dict(OMP_NUM_THREADS="2"))
    assert done.returncode == 0, done.stderr
    accuracy = [record["knn"] for record in read_log(tmp_path / "out") if "knn" in record]
    assert accuracy[-1] > accuracy[0] + 0.06
    assert "at initialisation" in done.stdout and "tensorboard" in done.stdout


FLAGS = dict(
    hsic="", corinfomax="--objective ldmi", music="--segment 4 --local-crops 1", mmd_sphere="--local-crops 1"
)


@pytest.mark.parametrize("name", FLAGS)
def test_a_fork_of_each_script_trains_and_resumes(name, tmp_path, folder):
    text = (ROOT / f"{name}.py").read_text()
    assert "wd=1e-4, warmup=0.4" in text
    (tmp_path / "mine.py").write_text(text.replace("wd=1e-4, warmup=0.4", "wd=2e-4, warmup=0.4"))
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    flags = [*TINY, "--data", str(folder), "--recipe", "demo", "--epochs", "1", *FLAGS[name].split()]
    args = mine.get_args([*flags, "--out", str(tmp_path / "out")])
    assert args.wd == 2e-4
    mine.main(args)
    log = read_log(tmp_path / "out")
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3] and (tmp_path / "out" / "mine.py").exists()
    mine.main(args)
    assert read_log(tmp_path / "out") == log


# ---------------------------------------------------------------------------------- kill and resume


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, big_folder):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = script("hsic.py", *TINY, *RESUME, "--data", big_folder, "--out", out)
    assert done.returncode == 0, done.stderr
    return state_of(out)


RESUME = [
    "--recipe",
    "demo",
    "--target",
    "--scale",
    "adam",
    "--features",
    "16",
    "--epochs",
    "4",
    "--save-minutes",
    "0.001",
]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_ends_bit_for_bit_as_one_never_stopped(workers, tmp_path, big_folder, undisturbed):
    out, flags = (
        tmp_path / "out",
        [*TINY, *RESUME, "--data", big_folder, "--out", tmp_path / "out", "--workers", workers],
    )
    command = [sys.executable, str(ROOT / "hsic.py"), *map(str, flags)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    random.seed(workers)
    # killed at some moment after a checkpoint in the middle of an epoch
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    begun = time.monotonic()
    while not (out / "log.jsonl").exists() or max([r["step"] for r in read_safely(out)], default=0) < 3:
        assert process.poll() is None and time.monotonic() - begun < 90
        time.sleep(0.01)
    time.sleep(random.random() * 0.2)
    process.kill()
    process.wait()
    with open(out / ".lock", "a") as lock:  # not held by the workers, which outlive it by seconds
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    done = script("hsic.py", *flags)
    assert done.returncode == 0, done.stderr
    assert same(state_of(out), undisturbed)
    steps = [r["step"] for r in read_log(out) if "loss" in r]
    assert steps == sorted(set(steps))


def read_safely(out):
    try:
        return read_log(out)
    except (ValueError, OSError):
        return []


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_step_and_leaves(number, code, tmp_path, folder, monkeypatch, capsys):
    flags = ["--data", folder, "--recipe", "demo", "--out", tmp_path / "out"]
    log = common.Run.log

    def interrupt(self, *args):
        log(self, *args)
        if self.step == 3:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", interrupt)
        assert train(*flags) == code
    assert state_of(tmp_path / "out")["step"] == 4 and "at step 4 of 6" in capsys.readouterr().err
    assert (
        train(*flags) == 0 and train("--data", folder, "--recipe", "demo", "--out", tmp_path / "whole") == 0
    )
    assert same(state_of(tmp_path / "out"), state_of(tmp_path / "whole"))


def test_sigterm_to_all_processes_saves_and_leaves_no_worker_behind(tmp_path, big_folder):
    """As torchrun and schedulers send it: the workers get it too."""
    out = tmp_path / "out"
    flags = [
        *TINY,
        "--recipe",
        "demo",
        "--data",
        big_folder,
        "--out",
        out,
        "--workers",
        "2",
        "--epochs",
        "50",
    ]
    command = [sys.executable, str(ROOT / "hsic.py"), *map(str, flags)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (out / "log.jsonl").exists() or max([r["step"] for r in read_safely(out)], default=0) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 0 and "SIGTERM: saved" in text and "Traceback" not in text
    assert state_of(out)["step"] >= 3
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def run_until(step, flags):
    """A run on the ranks of this process group, stopped after `step` as by a signal to one of them; its exit
    code."""
    log = common.Run.log

    def interrupt(self, *args):
        log(self, *args)
        self.stop = signal.SIGTERM * (self.step == step and common.rank() == 1)

    common.Run.log = interrupt
    try:
        return train(*flags)
    finally:
        common.Run.log = log


def test_two_ranks_agree_on_the_step_they_leave_at_and_resume_bit_for_bit(on_ranks, tmp_path, folder):
    flags = ["--data", folder, "--recipe", "demo", "--out"]
    assert on_ranks(run_until, 2, 3, [*flags, tmp_path / "out"]) == [0, 0]
    assert state_of(tmp_path / "out")["step"] == 4
    assert on_ranks(run_until, 2, -1, [*flags, tmp_path / "out"]) == [0, 0]
    assert on_ranks(run_until, 2, -1, [*flags, tmp_path / "whole"]) == [0, 0]
    assert same(state_of(tmp_path / "out"), state_of(tmp_path / "whole"))
    assert state_of(tmp_path / "out")["step"] == 6


def test_damaged_checkpoints_fall_back_or_are_refused(tmp_path, folder, capsys):
    out, flags = (
        tmp_path / "out",
        ["--data", folder, "--recipe", "demo", "--out", tmp_path / "out"],
    )
    assert train(*flags) == 0
    whole = state_of(out)
    data = bytearray((out / "checkpoint.pt").read_bytes())
    random.seed(0)
    for _ in range(2):
        spoilt = bytearray(data)
        spoilt[random.randrange(len(data) // 10, len(data) * 9 // 10)] ^= 1 << random.randrange(8)
        (out / "checkpoint.pt").write_bytes(spoilt)
        assert train(*flags) == 0
        assert "checkpoint.pt is damaged" in capsys.readouterr().err
        assert same(state_of(out), whole)
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (out / name).write_bytes(data[: len(data) // 2])
    assert train(*flags) == 2
    assert "nothing to resume from" in capsys.readouterr().err


def test_two_runs_cannot_share_a_directory(tmp_path, folder, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    command = [
        sys.executable,
        "-c",
        code + "; print(flush=True); time.sleep(60)",
        str(tmp_path / "out" / ".lock"),
    ]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert train("--data", folder, "--recipe", "demo", "--out", tmp_path / "out") == 2
    assert "in use" in capsys.readouterr().err
    holder.kill()
    holder.wait()
    assert train("--data", folder, "--recipe", "demo", "--out", tmp_path / "out", "--epochs", "1") == 0


# ------------------------------------------------------------------------------------------ numbers


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path, folder, capsys, monkeypatch
):
    flags = ["--data", folder, "--recipe", "demo", "--out", tmp_path / "out"]
    loss = hsic.hsic_loss

    def spoilt(zs, *args):
        value, terms = loss(zs, *args)
        return (value * float("nan"), terms) if args[-1] == 4 else (value, terms)

    monkeypatch.setattr(hsic, "hsic_loss", spoilt)
    assert train(*flags) == 2
    text = capsys.readouterr().err
    assert (
        "step 4: the loss is not finite (loss nan, hsic_zy" in text
        and state_of(tmp_path / "out")["step"] == 3
    )


def test_a_run_that_collapses_says_so(tmp_path, folder, capsys, monkeypatch):
    def positives(zs, *args):
        z = torch.nn.functional.normalize(zs, dim=2)
        return (z[0] - z[1]).square().sum(1).mean(), dict()

    monkeypatch.setattr(hsic, "hsic_loss", positives)
    flags = ["--lr", "0.1", "--epochs", "6"]
    assert train("--data", folder, "--recipe", "demo", "--out", tmp_path / "out", *flags) == 0
    assert "collapse: the effective rank of the embeddings is" in capsys.readouterr().err
    assert read_log(tmp_path / "out")[-2]["rank_z"] < 4


def gradients(micro, out_of_memory_above=None, frozen=True):
    """Gradients of one step of a small run with BN frozen, in micro-batches of `micro`."""
    args = hsic.get_args([*TINY, "--recipe", "demo", "--precision", "fp64"])
    run = common.Run.__new__(common.Run)
    run.args, run.device, run.micro = args, torch.device("cpu"), micro
    torch.manual_seed(0)
    net = common.prepare(hsic.Online(args), args, run.device)
    for module in net.modules() if frozen else ():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    sizes, forward = [], net.forward

    def limited(xs):
        sizes.append(len(xs[0]))
        if out_of_memory_above and len(xs[0]) > out_of_memory_above:
            raise torch.OutOfMemoryError("simulated")
        return forward(xs)

    net.forward = limited
    xs = [torch.randn(19, 3, size, size, dtype=torch.double) for size in (16, 16, 8)]
    loss, terms, h, zs = run.backward(net, xs, lambda zs: hsic.hsic_loss(zs, f=0))
    return [loss, h, zs, *(p.grad for p in net.parameters())], sizes, [b.clone() for b in net.buffers()]


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    whole, _, _ = gradients(0)
    for micro in (1, 4, 7, 18):
        parts, sizes, _ = gradients(micro)
        assert max(sizes) <= micro
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(parts, whole, strict=True))


def test_running_out_of_memory_halves_the_micro_batch_and_says_so(capfd):
    whole, _, _ = gradients(0)
    parts, sizes, _ = gradients(0, out_of_memory_above=5)
    assert sizes[:2] == [19, 7] and max(sizes[2:]) == 3  # 19 rows, then 9 or fewer, then 7 // 2
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(parts, whole, strict=True))
    assert "going on with --micro-batch" in capfd.readouterr().err


def test_a_compiled_network_has_the_same_gradient():
    """resnet18 on a CPU: most of a minute, for the compiler."""
    args, device, found = hsic.get_args([*TINY, "--recipe", "demo"]), torch.device("cpu"), []
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    for args.compile in (False, True):
        torch.manual_seed(0)
        net = common.prepare(common.resnet("resnet18")[0], args, device)
        common.parallel(net, args, device)(x).square().sum().backward()
        found.append([*(p.grad for p in net.parameters()), *net.buffers()])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all((a - b).abs().max() <= 1e-3 * b.abs().max() for a, b in zip(*found, strict=True))


def test_running_statistics_see_each_row_once():
    tracked = next(b for b in gradients(5, frozen=False)[2] if b.dtype == torch.long)
    assert tracked.item() == 4 * 3  # four micro-batches of three views: the pass without graph left no trace


def test_lars_scales_each_weight_by_its_norms():
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3))
    groups = [dict(params=[weight], weight_decay=0.1), dict(params=[bias], adapt=False)]
    lars, w, b, vw, vb = common.LARS(groups, 0.5), weight.detach().clone(), bias.detach().clone(), 0, 0
    for _ in range(3):
        weight.grad, bias.grad = torch.randn(3, 4), torch.randn(3)
        g = weight.grad + 0.1 * w
        vw = 0.9 * vw + g * 1e-3 * w.norm() / g.norm()
        vb = 0.9 * vb + bias.grad
        w, b = w - 0.5 * vw, b - 0.5 * vb
        lars.step()
    assert torch.allclose(weight, w, atol=1e-6) and torch.allclose(bias, b, atol=1e-6)


def test_effective_rank_and_knn_are_what_their_definitions_say():
    assert common.effective_rank(torch.eye(16).repeat(4, 1)) == pytest.approx(16)
    assert common.effective_rank(torch.ones(32, 8)) == pytest.approx(1)
    torch.manual_seed(0)
    bank, h = (torch.nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (50, 30))
    bank_y, y = torch.randint(0, 4, (50,)), torch.randint(0, 4, (30,))
    right = 0
    for query, label in zip(h, y, strict=True):
        votes = [0.0] * 4
        for i in sorted(range(50), key=lambda i, query=query: -(bank[i] @ query))[:5]:
            votes[bank_y[i]] += torch.exp(bank[i] @ query / 0.07)
        right += max(range(4), key=lambda c, votes=votes: votes[c]) == label
    assert common.knn_accuracy(bank, bank_y, h, y, k=5) == pytest.approx(right / 30)


# ------------------------------------------------------------------------------------------- images


def test_odd_images_load_and_unreadable_ones_are_skipped_and_named(tmp_path, capsys):
    data = make_folder(tmp_path / "data", 160, size=(30, 40), classes=("a",))
    train_a = data / "train" / "a"
    picture = Image.open(train_a / "000.jpg")
    picture.convert("CMYK").save(train_a / "cmyk.jpg")
    picture.convert("L").save(train_a / "gray.jpg")
    Image.new("I;16", (30, 20), 40000).save(train_a / "sixteen.png")
    picture.save(train_a / "png named.JPEG", format="PNG")
    Image.new("RGB", (1, 1), "red").save(train_a / "pixel.jpg")
    Image.new("RGB", (10000, 20), "blue").save(train_a / "wide.jpg")
    files = common.list_folder(data, tmp_path / "none").train
    assert all(
        image is not None and image.dtype == torch.uint8 and image.shape[0] == 3
        for image in map(files.read, range(166))
    )
    sixteen = next(i for i in range(166) if files.path(i).endswith("sixteen.png"))
    assert files.read(sixteen).unique().tolist() == [40000 >> 8]
    (train_a / "text.jpg").write_text("no image")
    flags = ["--data", data, "--recipe", "demo", "--epochs", "1"]
    assert train(*flags, "--out", tmp_path / "one") == 0
    text = capsys.readouterr().err
    assert text.count("unreadable, skipped") == 1 and "text.jpg" in text
    (train_a / "empty.jpg").write_bytes(b"")
    (train_a / "cut.jpg").write_bytes((train_a / "001.jpg").read_bytes()[:200])
    assert train(*flags, "--out", tmp_path / "three", "--workers", "2") == 2
    assert "more than 1 %" in capsys.readouterr().err
