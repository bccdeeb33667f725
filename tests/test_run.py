"""A run as a user meets it: wrong use, what it leaves, kill and resume, what is not finite, forks."""

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
from conftest import ROOT, TINY, read_log, same, script, state_of, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import hsic
import music

WRONG = {
    "no such folder": ("--data /no/such", "/no/such"),
    "no images": ("--data {empty}", "no images"),
    "fewer images than a batch": ("--data {folder} --batch-size 4096", "4096 is more than the 48"),
    "batch of 1": ("--batch-size 1", "1 is not between 2"),
    "learning rate nan": ("--lr nan", "nan"),
    "epochs text": ("--epochs many", "many"),
    "an empty value": ("--data=", "--data is empty"),
    "unknown recipe": ("--recipe nope", "nope"),
    "unknown data set": ("--data cifar11", "cifar11"),
    "data set not there": ("--data cifar10:{file}", "cifar10"),
    "unknown arch": ("--arch vit_b_16", "vit_b_16"),
    "unknown device": ("--device tpu", "tpu"),
    "absent device": ("--device cuda:7", "cuda:7"),
    "abbreviated flag": ("--epoch 3", "--epoch"),
    "segments that do not fit": ("--segment 5", "16 is not a multiple of --segment 5"),
    "compiled micro-batches": ("--compile --micro-batch 4", "--micro-batch 4"),
    "foreign directory": ("--out {folder}", "neither empty nor a run"),
    "out is a file": ("--out {file}", "neither empty nor a run"),
    "not a backbone": ("--init {file}", "--init"),
    "a sweep over nothing": ("--sweep lr", "give flag=value,value"),
    "a sweep over one bad value": ("--sweep lr=0.1,nan", "nan"),
    "two nodes here": ("--submit local --nodes 2", "only one node"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_sentence_with_the_value_exit_2_and_nothing_left(
    case, tmp_path, folder, capsys, monkeypatch
):
    flags, part = WRONG[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {name: tmp_path / name for name in ("empty", "file")}
    flags = ["--out", str(tmp_path / "out"), *flags.format(folder=folder, **places).split()]
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["music.py", *TINY, "--segment", "4", *flags])
    monkeypatch.setattr(common.multiprocessing, "active_children", list)  # ranks of other tests
    with pytest.raises(SystemExit) as end:
        common.launch(music.main, music.get_args)
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and said[-1].startswith("music.py: error: ") and part in said[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_run_leaves_and_that_the_same_command_changes_nothing(tmp_path, folder, capsys):
    out, flags = tmp_path / "out", ["--data", folder, "--segment", "4", "--keep-every", "1"]
    assert train(*flags, "--out", out) == 0
    assert "kNN accuracy" in capsys.readouterr().out
    names = {"args.json", "log.jsonl", "token", "checkpoint.pt", "checkpoint-previous.pt", "backbone.pth"}
    assert names | {"music.py", "common.py", "backbone-1.pth", "backbone-2.pth"} <= set(os.listdir(out))
    log = read_log(out)
    assert log[0]["step"] == 0 and 0 <= log[0]["knn"] <= 1 and log[-1]["step"] == 6 and "probe" in log[-1]
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    measured = {"lr", "gradient_norm", "rank_h", "rank_z", "std_h", "std_z", "images_per_second"}
    assert measured | {"seconds_waiting", "within", "invariance"} <= steps[0].keys()
    assert {"commit", "command", "versions", "hardware"} <= json.loads((out / "args.json").read_text())[
        "surroundings"
    ].keys()

    board = EventAccumulator(str(out))
    board.Reload()
    assert {"train/loss", "eval/knn"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] and "train/spectrum_z_log10" in board.Tags()["histograms"]
    assert "hparams" in str(board.summary_metadata)

    net = torchvision.models.resnet18()
    net.fc = torch.nn.Identity()
    net.load_state_dict(torch.load(out / "backbone.pth", weights_only=True))
    assert train(*flags, "--out", out) == 0 and read_log(out) == log
    assert train(*flags, "--out", out, "--lr", "0.1") == 2
    assert "lr 0.002 -> 0.1" in capsys.readouterr().err
    assert train(*flags, "--out", tmp_path / "more", "--init", out / "backbone.pth", "--lr", "0") == 0
    weights = [torch.load(run / "backbone.pth")["conv1.weight"] for run in (out, tmp_path / "more")]
    assert torch.equal(*weights)


def fork_of(source, old, new, folder):
    """A module from a copy of a script in which one text is replaced."""
    text = (ROOT / source).read_text()
    assert text.count(old) == 1
    (folder / "mine.py").write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mine", folder / "mine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_a_process(*flags, module):
    """Start a run in a forked process; its number."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os._exit(train(*flags, module=module))
    return pid


def test_a_fork_that_clips_killed_at_ten_moments_ends_bit_for_bit_as_one_never_stopped(tmp_path, big_folder):
    """With and without workers in turn."""
    backward = "        loss.backward()\n"
    clip = backward + "        nn.utils.clip_grad_norm_(online.parameters(), 0.1)\n"
    mine = fork_of("music.py", backward, clip, tmp_path)
    flags = ["--data", big_folder, "--segment", "4", "--save-minutes", "0.001"]
    assert train(*flags, "--out", tmp_path / "whole", module=mine) == 0
    random.seed(0)
    for kill in range(10):
        pid = in_a_process(*flags, "--out", tmp_path / "out", "--workers", kill % 2, module=mine)
        time.sleep(0.2 + 0.5 * random.random())
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert train(*flags, "--out", tmp_path / "out", module=mine) == 0
    assert same(state_of(tmp_path / "out"), state_of(tmp_path / "whole"))
    logs = [[record["step"] for record in read_log(tmp_path / run)] for run in ("out", "whole")]
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


FLAGS = ["--segment", "4", "--epochs", "1"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGUSR2, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_step_and_leaves(number, code, tmp_path, folder, monkeypatch, capsys):
    flags = ["--data", folder, *FLAGS, "--out"]
    with monkeypatch.context() as patch:
        at_step(2, lambda net: os.kill(os.getpid(), number), patch)
        assert train(*flags, tmp_path / "out") == code
    assert state_of(tmp_path / "out")["step"] == 2 and "the same command resumes" in capsys.readouterr().err
    assert train(*flags, tmp_path / "out") == train(*flags, tmp_path / "whole") == 0
    assert same(state_of(tmp_path / "out"), state_of(tmp_path / "whole"))


def spoil_gradient(net):
    next(net.parameters()).grad[0] = torch.nan


def start_another(out):
    (out / "token").write_text("another's")


FAULTS = {
    "a gradient that is not finite": (lambda out: spoil_gradient, "is not finite"),
    "another start on the directory": (lambda out: lambda net: start_another(out), "another run was started"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_refuses_what_is_not_this_runs_or_not_finite(fault, tmp_path, folder, monkeypatch, capsys):
    make_act, part = FAULTS[fault]
    flags = ["--data", folder, *FLAGS, "--save-minutes", "0.001", "--out", tmp_path / "out"]
    at_step(3, make_act(tmp_path / "out"), monkeypatch)
    assert train(*flags) == 2
    assert state_of(tmp_path / "out")["step"] == 2
    assert part in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_named_with_its_terms(tmp_path, folder, monkeypatch, capsys):
    loss_of = music.music_loss

    def spoilt(*args):
        loss, terms = loss_of(*args)
        return loss * torch.nan, terms

    monkeypatch.setattr(music, "music_loss", spoilt)
    assert train("--data", folder, *FLAGS, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "step 3" in said and "within" in said and not (tmp_path / "out" / "checkpoint.pt").exists()


def test_damaged_checkpoints_fall_back_or_are_refused(tmp_path, folder, capsys):
    out, flags = tmp_path / "out", ["--data", folder, "--segment", "4", "--out", tmp_path / "out"]
    assert train(*flags) == 0
    whole, data = state_of(out), bytearray((out / "checkpoint.pt").read_bytes())
    data[data.index(whole["online"]["projector.0.weight"].numpy().tobytes())] ^= 1
    (out / "checkpoint.pt").write_bytes(data)
    assert train(*flags) == 0
    assert "checkpoint.pt is damaged" in capsys.readouterr().err and same(state_of(out), whole)
    torch.save({"step": 0, "data": whole["data"]}, out / "checkpoint.pt")
    assert train(*flags) == 2 and "holds no 'online'" in capsys.readouterr().err
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (out / name).write_bytes(data[:1000])
    assert train(*flags) == 2 and "none before it" in capsys.readouterr().err


def test_a_run_that_collapses_says_so(tmp_path, folder, capsys, monkeypatch):
    flags = ["--data", folder, "--segment", "4", "--weights", "0", "0", "1", "--lr", "0.1", "--epochs", "6"]
    assert train(*flags, "--out", tmp_path / "out") == 0
    assert "collapse: the effective rank of the embeddings is" in capsys.readouterr().err
    assert common.effective_rank(torch.eye(16).repeat(4, 1)) == pytest.approx(16)
    assert common.effective_rank(torch.ones(32, 8)) == pytest.approx(1)


def test_sigterm_to_torchrun_saves_on_all_ranks_and_leaves_no_process(tmp_path, big_folder):
    flags = [*TINY, *FLAGS, "--data", big_folder, "--workers", "1", "--epochs", "90"]
    flags += ["--out", tmp_path / "out"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "music.py"]
    command = list(map(str, [sys.executable, *ranks, *flags]))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "out" / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saved" in process.communicate(timeout=60)[1] and state_of(tmp_path / "out")["world"] == 2
    time.sleep(1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


WAYS = [
    "--target --draws 2 --features 16 --scale adam",
    "--kernel linear",
    "--kernel gaussian --micro-batch 6",
]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running_hsic_trains(way, tmp_path, folder):
    flags = ["--data", folder, "--epochs", "1", "--local-crops", "1", "--optimizer", "lars"]
    assert train(*flags, *way.split(), "--out", tmp_path / "out", module=hsic) == 0
    assert read_log(tmp_path / "out")[-1]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hsic", "corinfomax", "music", "mmd_sphere"])
def test_the_demo_tells_patterns_apart_far_better_than_at_initialisation(name, tmp_path):
    done = script(f"{name}.py", "--out", tmp_path / "out", timeout=600, env=dict(OMP_NUM_THREADS="2"))
    assert done.returncode == 0 and "tensorboard" in done.stdout, done.stderr
    accuracy = [record["knn"] for record in read_log(tmp_path / "out") if "knn" in record]
    assert accuracy[0] < 0.46 and accuracy[-1] > accuracy[0] + 0.2


def patched(text, diff):
    """The text with each hunk of a diff applied, which must stand there once."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        assert text.count(old) == 1, old
        text = text.replace(old, "".join(line[1:] for line in lines if line[0] != "-"))
    return text


@pytest.mark.slow
def test_the_fork_of_the_readme_learns_with_sigreg_and_does_not_collapse(tmp_path):
    diff = (ROOT / "README.md").read_text().split("```diff\n")[1].split("```")[0]
    (tmp_path / "mine.py").write_text(patched((ROOT / "music.py").read_text(), diff))
    env = dict(OMP_NUM_THREADS="2", PYTHONPATH=str(ROOT))
    done = script(tmp_path / "mine.py", "--out", tmp_path / "out", timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "out")
    assert log[-1]["knn"] > log[0]["knn"] + 0.15 and log[-2]["rank_z"] > 16
