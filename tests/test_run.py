"""A run as a user meets it: wrong use, what it leaves, kill and resume, what is not finite, forks."""

import importlib
import json
import os
import runpy
import signal
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torchvision
from conftest import FORKSERVER, ROOT, TINY, read_log, same, script, state_of, train, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import music

FLAGS = ["--segment", "4", "--epochs", "1"]
EVALUATION = "--backbone random --arch resnet18 --size 16 --device cpu --batch-size 16".split()
WRONG = {
    "music --data /no/such": "/no/such",
    "music --data {tmp}/empty": "no images",
    "music --data {folder} --batch-size 4096": "4096 is more than the 48",
    "music --batch-size 1": "1 is not between 2",
    "music --lr nan": "nan",
    "music --data=": "--data is empty",
    "music --recipe nope": "nope",
    "music --data cifar10:{tmp}/file": "cifar10",
    "music --arch vit_b_16": "vit_b_16",
    "music --device cuda:7": "cuda:7",
    "music --epoch 3": "--epoch",
    "music --segment 5": "16 is not a multiple of --segment 5",
    "music --compile --micro-batch 4": "--micro-batch 4",
    "music --out {folder}": "neither empty nor a run",
    "music --out {tmp}/file": "neither empty nor a run",
    "music --init {tmp}/file": "--init",
    "music --sweep lr": "give flag=value,value",
    "music --sweep lr=0.1,nan": "nan",
    "music --submit local --nodes 2": "only one node",
    "music --gpus 8": "--gpus 8 is for jobs",
    "eval_linear --data {folder}/train": "has no test images",
    "eval_linear --backbone {tmp}/none": "No such file",
    "eval_linear --backbone {tmp}/bomb": "cannot be read as weights (UnpicklingError",
    "eval_linear --backbone {tmp}/another": "no whole ResNet of torchvision: 'features.0.weight'",
    "eval_linear --backbone {tmp}/damaged": "wrong checksum",
    "eval_linear --arch vit_b_16": "vit_b_16",
    "eval_linear --mode knn,linear": "--mode knn,linear: choose from",
    "eval_linear --data {folder} --labels many": "--labels many is neither",
    "eval_linear --data {folder} --mode cached --batch-size 46": "46 is more than the 44 images",
    "eval_linear --data {folder} --mode cached --labels 5 --batch-size 2": "leaves none to choose on",
    "eval_linear --out {folder}": "neither empty nor a run",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_use_is_one_sentence_exit_2_and_nothing_left(command, tmp_path, folder, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    torch.save(os.system, tmp_path / "bomb")
    torch.save({"features.0.weight": torch.zeros(999)}, tmp_path / "another")
    content = (tmp_path / "another").read_bytes()
    (tmp_path / "damaged").write_bytes(content.replace(bytes(999), b"1" * 999, 1))
    name, *flags = command.format(folder=folder, tmp=tmp_path).split()
    module = importlib.import_module(name)
    usual = [*TINY, "--segment", "4"] if module is music else EVALUATION
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *usual, "--out", f"{tmp_path}/out", *flags])
    monkeypatch.setattr(common.multiprocessing, "active_children", list)  # ranks of other tests
    with pytest.raises(SystemExit, match="2"):
        common.launch(module.main, module.get_args)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"{name}.py: error: ") and WRONG[command] in last
    assert {path.name for path in tmp_path.rglob("*")} == {"empty", "file", "bomb", "another", "damaged"}


def test_what_a_run_leaves_and_that_the_same_command_changes_nothing(tmp_path, folder, capsys):
    out, more = tmp_path / "out", tmp_path / "more"
    flags = ["--data", folder, "--segment", "4", "--keep-every", "2", "--out"]
    assert train(*flags, out) == 0 and "kNN accuracy" in capsys.readouterr().out
    names = "args.json log.jsonl token checkpoint.pt checkpoint-previous.pt backbone.pth music.py common.py"
    written = {name.partition(".out")[0] for name in os.listdir(out)}
    assert written == {*names.split(), "backbone-2.pth", "events"}
    log = read_log(out)
    assert [record["step"] for record in log] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert log[0].keys() == log[-1].keys() == {"step", "knn", "probe"} and 0 <= log[0]["knn"] <= 1
    measured = "loss within invariance lr gradient_norm rank_h rank_z std_h std_z images_per_second"
    assert {*measured.split(), "seconds_waiting"} <= log[1].keys()
    surroundings = json.loads((out / "args.json").read_text())["surroundings"]
    assert {"commit", "command", "versions", "hardware"} <= surroundings.keys()

    board = EventAccumulator(str(out))
    board.Reload()
    shown = f"{board.Tags()} {board.summary_metadata}"
    assert all(tag in shown for tag in ("train/loss", "eval/knn", "views", "spectrum_z_log10", "hparams"))

    net = torchvision.models.resnet18()
    net.fc = torch.nn.Identity()
    weights = torch.load(out / "backbone.pth", weights_only=True)
    net.load_state_dict(weights)
    assert train(*flags, out) == 0 and read_log(out) == log
    assert train(*flags, out, "--lr", "0.1") == 2 and "lr 0.002 -> 0.1" in capsys.readouterr().err
    assert train(*flags, more, "--init", out / "backbone.pth", "--lr", "0") == 0
    assert torch.equal(torch.load(more / "backbone.pth")["conv1.weight"], weights["conv1.weight"])


@pytest.mark.parametrize("left", [f"args.json.{common.TOKEN}.tmp", "args.json"])
def test_a_run_killed_at_its_first_moment_starts_again(left, tmp_path, folder, monkeypatch):
    """Before args.json has its name, or before there is a token."""
    flags = ["--data", folder, *FLAGS, "--out", tmp_path / "out"]
    next_call = "pathlib.Path.write_text" if left == "args.json" else "os.fsync"
    with monkeypatch.context() as patch:
        patch.setattr(next_call, Mock(side_effect=SystemExit(9)))
        assert train(*flags) == 9
    assert os.listdir(tmp_path / "out") == [left]
    monkeypatch.setattr(common, "TOKEN", "another process's")
    assert train(*flags) == 0 and not list((tmp_path / "out").glob("*.tmp"))


def fork(folder, diff):
    """The path of a copy of music.py with each hunk of a diff applied, which must stand there once."""
    text = (ROOT / "music.py").read_text()
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        assert text.count(old) == 1, old
        text = text.replace(old, "".join(line[1:] for line in lines if line[0] != "-"))
    (folder / "mine.py").write_text(text)
    return folder / "mine.py"


CLIP = """         loss.backward()
+        nn.utils.clip_grad_norm_(online.parameters(), 0.1)
"""


def live(path, *flags):
    """Run a script in this process, with one thread, as others may be busy."""
    torch.set_num_threads(1)
    train(*flags, module=SimpleNamespace(**runpy.run_path(path)))


def test_a_fork_that_clips_killed_ten_times_ends_bit_for_bit_as_one_never_stopped(tmp_path, folder):
    """Each life is killed a little after one more step, or at its start."""
    mine = fork(tmp_path, CLIP)
    flags = ["--data", folder, *FLAGS, "--epochs", "4", "--optimizer", "sgd", "--out"]
    out, whole = tmp_path / "out", tmp_path / "whole"
    for kill in range(10):
        life = FORKSERVER.Process(target=live, args=(mine, *flags, out))
        life.start()
        wait_for(out, kill, "step")
        time.sleep(kill / 30)
        life.kill()
        life.join()
    for run in (out, whole):
        life = FORKSERVER.Process(target=live, args=(mine, *flags, run))
        life.start()
        life.join()
    assert same(state_of(out), state_of(whole))
    measured = "step", "loss", "knn", "probe"
    logs = [[[record.get(key) for key in measured] for record in read_log(run)] for run in (out, whole)]
    assert logs[0] == logs[1]


def at_step(step, act, monkeypatch):
    """Let act() happen in a run after the gradient of the step that leads to `step` is known."""
    norm, calls = common.gradient_norm, []

    def acting(net):
        calls.append(net)
        if len(calls) == step:
            act(net)
        return norm(net)

    monkeypatch.setattr(common, "gradient_norm", acting)


def test_three_signals_save_at_the_step_and_the_end_is_as_undisturbed(tmp_path, folder, monkeypatch, capsys):
    flags = ["--data", folder, *FLAGS, "--batch-size", "12", "--out"]  # four steps
    for step, number in enumerate([signal.SIGTERM, signal.SIGUSR2, signal.SIGINT], 1):
        with monkeypatch.context() as patch:
            at_step(1, lambda net, number=number: os.kill(os.getpid(), number), patch)
            assert train(*flags, tmp_path / "out") == (130 if number == signal.SIGINT else 0)
        assert state_of(tmp_path / "out")["step"] == step
        assert f"{number.name}: saved" in capsys.readouterr().err
    assert train(*flags, tmp_path / "out") == train(*flags, tmp_path / "whole") == 0
    assert same(state_of(tmp_path / "out"), state_of(tmp_path / "whole"))


FAULTS = {  # what is said; the step, and what happens in it
    "step 3: online.backbone.conv1.weight is not finite": (
        3,
        lambda net, out: net.backbone.conv1.weight.grad.fill_(torch.nan),
    ),
    "step 3: the loss (with terms {'within'": (
        2,
        lambda net, out: net.register_forward_hook(lambda net, xs, made: (made[0], made[1] * torch.nan)),
    ),
    "another run was started": (3, lambda net, out: (out / "token").write_text("another's")),
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_save_refuses_what_is_not_finite_or_not_this_runs(said, tmp_path, folder, monkeypatch, capsys):
    step, fault = FAULTS[said]
    at_step(step, lambda net: fault(net, tmp_path), monkeypatch)
    flags = ["--data", folder, "--segment", "4", "--batch-size", "48", "--epochs", "4"]  # a save each step
    assert train(*flags, "--out", tmp_path) == 2
    assert state_of(tmp_path)["step"] == 2 and said in capsys.readouterr().err


def test_damaged_checkpoints_fall_back_or_are_refused(tmp_path, folder, capsys):
    out, flags = tmp_path / "out", ["--data", folder, "--segment", "4", "--out", tmp_path / "out"]
    assert train(*flags) == 0
    whole, data = state_of(out), bytearray((out / "checkpoint.pt").read_bytes())
    data[data.index(whole["online"]["projector.0.weight"].numpy().tobytes())] ^= 1
    (out / "checkpoint.pt").write_bytes(data)
    assert train(*flags) == 0
    assert "checkpoint.pt is damaged" in capsys.readouterr().err and same(state_of(out), whole)
    assert (out / "checkpoint-damaged.pt").read_bytes() == data
    torch.save({"step": 0, "data": whole["data"]}, out / "checkpoint.pt")
    assert train(*flags) == 2 and "holds no 'online'" in capsys.readouterr().err
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (out / name).write_bytes(data[:1000])
    assert train(*flags) == 2 and "none before it" in capsys.readouterr().err


def test_a_run_that_collapses_says_so(tmp_path, folder, capsys):
    flags = ["--data", folder, "--segment", "4", "--weights", "0", "0", "1", "--lr", "0.1", "--epochs", "6"]
    assert train(*flags, "--out", tmp_path) == 0
    assert "collapse: the effective rank of the embeddings is" in capsys.readouterr().err
    assert common.effective_rank(torch.eye(16).repeat(4, 1)) == pytest.approx(16)


DEMOS = dict(hsic=0.2, corinfomax=0.2, music=0.2, mmd_sphere=0.2, sigreg=0.15)  # and what kNN gains


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_demos_and_the_fork_of_the_readme_tell_patterns_apart_far_better_than_at_initialisation(
    name, tmp_path
):
    path = f"{name}.py"
    if name == "sigreg":
        path = fork(tmp_path, (ROOT / "README.md").read_text().split("```diff\n")[1].split("```")[0])
    env = dict(OMP_NUM_THREADS="2", PYTHONPATH=str(ROOT))
    done = script(path, "--out", tmp_path / "out", timeout=600, env=env)
    assert done.returncode == 0 and "tensorboard" in done.stdout, done.stderr
    log = read_log(tmp_path / "out")
    assert log[0]["knn"] < 0.46 and log[-1]["knn"] > log[0]["knn"] + DEMOS[name] and log[-2]["rank_z"] > 16
