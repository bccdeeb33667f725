"""A run as a user sees it: wrong use, files, kill and resume, values that are not finite, forks."""

import json
import os
import signal
import time
from unittest.mock import patch

import pytest
import torch
from conftest import (
    EVALUATION,
    TINY,
    forked,
    forks,
    launch,
    read_log,
    same,
    signals,
    start,
    state_of,
    train,
    wait_for,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import music

WRONG = {
    "music --data /no/such": "/no/such does not exist",
    "music --data {folder} --batch-size 4096": "4096 is more than the 48",
    "music --data=": "--data is empty",
    "music --recipe nope": "nope",
    "music --data cifar10:{tmp}/file": "give --data cifar10:/path/to/it",
    "music --arch vit_b_16": "vit_b_16",
    "hsic --features 0 --draws 4": "--draws 4",
    "mmd_sphere --log": "--log needs --kernel rbf or quadratic",
    "mmd_sphere --tau 3": "--tau 3 has no effect with --kernel legendre",
    "music --epoch 3": "--epoch",
    "music --segment 5": "16 is not a multiple of --segment 5",
    "music --compile --micro-batch 4": "--micro-batch 4",
    "music --init {tmp}/file": "--init",
    "music --precision bf16": "wrong gradients for views of 16 pixels",
    "music --precision bf16 --size 32 --local-crops 1": "wrong gradients for views of 14 pixels",
    "music --submit local --sweep lr": "give flag=value,value",
    "music --submit local --sweep lr=0.1,nan": "nan is not between 0",
    "music --submit local --nodes 2": "only one node",
    "music --sweep lr=0.1,0.2": "--sweep is for jobs",
    "eval_linear --data {folder}/train": "has no test images",
    "eval_linear --backbone {tmp}/another": "no complete ResNet of torchvision; its first tensors are ['feat",
    "eval_linear --backbone {tmp}/damaged": "wrong checksum",
    "eval_linear --backbone {tmp}": "cannot be read as weights",
    "eval_linear --backbone .": "cannot be read as weights",
    "eval_linear --mode crops --steps 1 --warmup-steps 9": "--steps replaces: omit them",
    "eval_linear --mode finetune --lr 0.1": "finetune has --lr-head",
    "eval_linear --mode knn,linear": "--mode knn,linear: choose from",
    "eval_linear --data {folder} --labels 101": "--labels 101 is neither",
    "eval_linear --data {folder} --mode cached --batch-size 46": "46 is more than the 44 images",
    "eval_linear --data {folder} --mode cached --labels 5 --batch-size 2": "2 training images are too few",
    "eval_linear --out {folder}": "neither empty nor a run",
    "eval_linear --mode segment,knn": "segment has data of its own",
    "eval_linear --mode segment --labels 10": "--labels 10 is for labels of images",
    "eval_linear --mode segment --data voc2012:/nowhere": "voc2012 is not in /nowhere",
    "eval_linear --mode depth": "--mode depth needs --data",
    "eval_linear --mode depth --data {folder}": "there are no images in",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_use_is_one_sentence_exit_2_and_nothing_left(command, tmp_path, folder, capsys):
    (tmp_path / "file").write_text("")
    torch.save({"features.0.weight": torch.zeros(999)}, tmp_path / "another")
    content = (tmp_path / "another").read_bytes()
    (tmp_path / "damaged").write_bytes(content.replace(bytes(999), b"1" * 999))
    name, *flags = command.format(folder=folder, tmp=tmp_path).split()
    usual = EVALUATION if name == "eval_linear" else TINY
    assert launch(f"{name}.py", *usual, "--out", tmp_path / "out", *flags) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"{name}.py: error: ") and WRONG[command] in last
    assert set(os.listdir(tmp_path)) == {"file", "another", "damaged"}


def test_what_a_run_leaves_and_that_the_same_command_changes_nothing(tmp_path, folder, capsys):
    out, more = tmp_path / "out", tmp_path / "more"
    flags = ["--data", folder, "--keep-every=1", "--out"]
    assert train(*flags, out) == 0 and "kNN accuracy" in capsys.readouterr().out
    names = "args.json log.jsonl token checkpoint.pt checkpoint-previous.pt backbone.pth music.py common.py"
    written = {name.partition(".out")[0] for name in os.listdir(out)}
    assert written == {*names.split(), "backbone-1.pth", "backbone-2.pth", "events"}
    log = read_log(out)
    assert [record["step"] for record in log] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert log[0].keys() == log[-1].keys() == {"step", "knn", "probe"} and log[0]["knn"] <= 1
    measured = "loss within invariance lr gradient_norm rank_h rank_z std_h std_z".split()
    assert {*measured, "images_per_second", "seconds_waiting"} <= log[1].keys()
    first = json.loads((out / "args.json").read_text())["starts"][0]
    assert {"step", "commit", "command", "versions", "hardware", "ranks"} == first.keys()

    board = EventAccumulator(str(out))
    board.Reload()
    shown = f"{board.Tags()} {board.summary_metadata}"
    assert all(tag in shown for tag in ("train/loss", "eval/knn", "'views'", "spectrum_z_log10", "hparams"))

    assert train(*flags, out) == 0 and read_log(out) == log
    assert train(*flags, out, "--lr=0.1") == 2 and "lr 0.002 -> 0.1" in capsys.readouterr().err
    settings = (out / "args.json").read_text()
    (out / "args.json").write_text(settings.replace('"fp32"', '"bf16"'))  # as of a GPU, where it began
    assert train(*flags, out) == 2 and "--precision bf16 on a CPU" in capsys.readouterr().err
    assert train(*flags, more, "--init", out / "backbone.pth", "--lr=0") == 0
    weights = [torch.load(run / "backbone.pth")["conv1.weight"] for run in (out, more)]
    assert torch.equal(*weights)


FIRST_MOMENTS = {"os.fsync": f"args.json.{common.TOKEN}.tmp", "pathlib.Path.write_text": "args.json"}


@pytest.mark.parametrize("call", FIRST_MOMENTS)
def test_a_run_killed_at_its_first_moment_starts_again(call, tmp_path, folder, monkeypatch):
    """It is killed before args.json has its name, or before there is a token."""
    flags = ["--data", folder, "--epochs=1", "--out", tmp_path / "out"]
    with patch(call, side_effect=SystemExit(9)):
        assert train(*flags) == 9
    assert os.listdir(tmp_path / "out") == [FIRST_MOMENTS[call]]
    monkeypatch.setattr(common, "TOKEN", "another process's")
    assert train(*flags) == 0 and not list((tmp_path / "out").glob("*.tmp"))


CLIP = """         loss.backward()
+        nn.utils.clip_grad_norm_(online.parameters(), 0.1)
"""


def test_a_clipping_fork_killed_six_times_ends_as_if_undisturbed(tmp_path, folder):
    """Each process is killed a little after one more step, or at its start."""
    mine = tmp_path / "mine.py"
    mine.write_text(forked(CLIP))
    flags = ["--data", folder, "--epochs=3", "--optimizer=sgd", "--save-minutes=0", "--out"]
    out, uncut = tmp_path / "out", tmp_path / "uncut"
    for kill in range(6):
        process = start(mine, *flags, out)
        wait_for(out, kill, "step")
        time.sleep(kill / 36)
        process.kill()
        process.join()
    for process in [start(mine, *flags, run) for run in (out, uncut)]:
        process.join()
    logs = [
        [{**record, "images_per_second": 0, "seconds_waiting": 0} for record in read_log(run)]
        for run in (out, uncut)
    ]
    assert logs[0] == logs[1] and same(state_of(out), state_of(uncut))


def test_three_signals_save_at_once_and_the_run_ends_as_if_undisturbed(tmp_path, folder):
    out, uncut = tmp_path / "out", tmp_path / "uncut"
    flags = ["--data", folder, "--epochs=1", "--batch-size=12", "--out"]  # four steps
    for number, code, step in ((signal.SIGTERM, 0, 1), (signal.SIGUSR2, 0, 2), (signal.SIGINT, 130, 3)):
        with signals(number):
            assert train(*flags, out) == code
        assert state_of(out)["step"] == step
    assert train(*flags, out) == train(*flags, uncut) == 0
    assert same(state_of(out), state_of(uncut))


def test_a_resume_with_changed_code_says_so_and_keeps_the_old_copy(tmp_path, folder, capsys):
    mine, out = tmp_path / "mine.py", tmp_path / "out"
    flags = [*TINY, "--data", folder, "--out", out]
    old = forked(CLIP)
    mine.write_text(old)
    with signals(signal.SIGTERM):
        assert launch(mine, *flags) == 0
    mine.write_text(old.replace("0.1)", "0.2)"))
    assert launch(mine, *flags) == 0
    assert "mine.py has changed since step 1" in capsys.readouterr().err
    assert (out / "mine-until-1.py").read_text() == old != (out / "mine.py").read_text()
    assert [start["step"] for start in json.loads((out / "args.json").read_text())["starts"]] == [0, 1]


FAULTS = {  # the message, and what happens before a save
    "online.backbone.bn1.weight is not finite": lambda out, net, loss: net.bn1.weight.data.fill_(torch.nan),
    "the loss (with terms {'within'": lambda out, net, loss: loss.data.fill_(torch.nan),
    "another run was started": lambda out, net, loss: (out / "token").write_text("another's"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_save_refuses_what_is_not_finite_or_not_this_runs(message, tmp_path, folder, monkeypatch, capsys):
    save = common.save

    def save_after_fault(args, step, state, net, loss, terms):
        if step == 6:
            FAULTS[message](tmp_path, net, loss)
        save(args, step, state, net, loss, terms)

    monkeypatch.setattr(common, "save", save_after_fault)
    assert train("--data", folder, "--keep-every=1", "--out", tmp_path) == 2  # saves at steps 3 and 6
    assert state_of(tmp_path)["step"] == 3 and f"step 6: {message}" in capsys.readouterr().err


WRONG_LOSSES = {  # of embeddings zs, and its terms
    "step 1: the loss (with terms {}) is not finite": lambda zs, _: (zs.sum() * torch.nan, {}),
    "a term named 'lr', which the log uses itself": lambda zs, _: (zs.sum(), dict(lr=zs.sum())),
}


@pytest.mark.parametrize("message", WRONG_LOSSES)
def test_a_record_refuses_a_loss_that_is_not_finite_and_taken_names(message, tmp_path, folder, capsys):
    with patch.object(music, "loss_of", WRONG_LOSSES[message]):
        assert train("--data", folder, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "checkpoint.pt").exists()


def test_damaged_checkpoints_fall_back_or_are_refused(tmp_path, folder, capsys):
    flags = ["--data", folder, "--optimizer=sgd", "--keep-every=1", "--out", tmp_path]
    assert train(*flags) == 0
    intact = state_of(tmp_path)
    data = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    data[data.index(intact["online"]["projector.0.weight"].numpy().tobytes())] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(data)
    assert train(*flags) == 0
    assert "checkpoint.pt is damaged" in capsys.readouterr().err and same(state_of(tmp_path), intact)
    assert (tmp_path / "checkpoint-damaged.pt").read_bytes() == data
    torch.save({"step": 0}, tmp_path / "checkpoint.pt")
    assert train(*flags) == 2 and "has no 'data'" in capsys.readouterr().err
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (tmp_path / name).write_bytes(data[:1000])
    assert train(*flags) == 2 and "no earlier one" in capsys.readouterr().err


def test_a_run_that_collapses_says_so(tmp_path, folder, capsys):
    flags = ["--data", folder, *"--segment 4 --weights 0 0 1 --lr 0.3 --epochs 3".split()]
    assert train(*flags, "--out", tmp_path) == 0
    assert capsys.readouterr().err.count("collapse: the effective rank of the embeddings is") == 1
    assert common.effective_rank(torch.eye(16).repeat(4, 1)) == pytest.approx(16)


DEMOS = dict(hsic=0.2, corinfomax=0.2, music=0.2, mmd_sphere=0.2)  # and what kNN gains
DEMOS |= dict(sigreg=0.15, barlow_twins=0.15, vicreg=0.15, simclr=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_demos_and_forks_tell_patterns_apart_far_better_than_at_first(name, tmp_path, capsys):
    path = f"{name}.py"
    if name in forks():
        path = tmp_path / path
        path.write_text(forks()[name])
    assert launch(path, "--out", tmp_path / "out") == 0 and "tensorboard" in capsys.readouterr().out
    log = read_log(tmp_path / "out")
    assert log[0]["knn"] < 0.46 and log[-2]["rank_z"] > (16 if name == "sigreg" else 8)
    assert log[-1]["knn"] > log[0]["knn"] + DEMOS[name]
