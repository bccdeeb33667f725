"""Sweeps and submitted runs: here, by submitit's local executor and, if marked slurm, on a cluster."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
from conftest import ROOT, TINY, read_log, same, script, state_of, train

import common
import music

RUN = [*TINY, "--segment", "4", "--epochs", "1"]


def wait_for(condition, what, seconds=300):
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, what
        time.sleep(0.2)


def submitted(name, *flags):
    """What `script` printed, and for each line of a job its number, run directory and log."""
    done = script(name, *flags)
    assert done.returncode == 0, done.stderr
    jobs = []
    for line in done.stdout.splitlines():
        if not line.startswith("job "):
            continue
        number, rest = line.removeprefix("job ").split(": ")
        out, log = rest.split(", log ")
        jobs.append((number, out, log))
    return jobs


def steps_of(out):
    path = os.path.join(out, "log.jsonl")
    return len([record for record in read_log(out) if "loss" in record]) if os.path.exists(path) else 0


def finished(out, steps):
    """Whether the run has logged its last evaluation."""
    path = os.path.join(out, "log.jsonl")
    return os.path.exists(path) and read_log(out)[-1].get("knn") is not None and steps_of(out) == steps


def fork(folder):
    for name in ("music.py", "common.py"):
        shutil.copy(ROOT / name, folder)
    text = (folder / "music.py").read_text()
    (folder / "mine.py").write_text(
        text + "\n    import os\n    print('sees', os.environ.get('CUDA_VISIBLE_DEVICES'))\n"
    )
    return folder / "mine.py"


SWEEP = ["--sweep", "lr=1e-3,2e-3", "weights=1 0 1", "zero-init=true"]


@pytest.mark.parametrize("submit", ["", "local", pytest.param("slurm", marks=pytest.mark.slurm)])
def test_a_sweep_of_a_fork_runs_every_point_with_the_code_as_it_was(submit, tmp_path, folder, monkeypatch):
    mine, out = fork(tmp_path), tmp_path / "out"
    flags = [*RUN, "--data", folder, "--out", out, *SWEEP]
    if submit:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
        jobs = submitted(mine, *flags, "--submit", submit)
        assert len({number.split("_")[0] for number, _, _ in jobs}) == 1  # a job array, or one job
        mine.write_text("raise RuntimeError('changed since')")
    else:
        monkeypatch.setattr(sys, "argv", [str(mine), *map(str, flags)])
        common.launch(music.main, music.get_args)
    for lr in ("1e-3", "2e-3"):
        point = out / f"lr={lr},weights=1_0_1,zero-init=true"
        wait_for(lambda point=point: finished(point, 3), point)
        args = json.loads((point / "args.json").read_text())
        assert args["lr"] == float(lr) and args["weights"] == [1, 0, 1] and args["zero_init"]
        assert "changed since" not in (point / "mine.py").read_text()
    if submit == "local":  # submitit would show it GPU 0, whatever its caller sees
        wait_for(lambda: open(jobs[0][2]).read().count("sees 5,3") == 2, "the GPUs of the caller")


def test_help_shows_the_flags_of_script_and_launch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["music.py", "--help"])
    common.launch(music.main, music.get_args)
    text = capsys.readouterr().out
    assert "--segment" in text and "--submit {slurm,local}" in text and text.count("usage:") == 1


def test_ctrl_c_in_a_sweep_here_is_left_to_the_run_and_ends_the_sweep(tmp_path, monkeypatch):
    def interrupted(command):
        os.kill(os.getpid(), signal.SIGINT)
        return Mock(returncode=130)

    run = Mock(side_effect=interrupted)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["music.py", *RUN, "--out", str(tmp_path), *SWEEP])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="130"):
        common.launch(music.main, music.get_args)
    signal.signal(signal.SIGINT, before)
    assert run.call_count == 1


def test_local_ranks_that_are_warned_save_come_back_and_end_as_if_undisturbed(tmp_path, folder, on_ranks):
    """In a sweep: they come back to the same point, and then go on to the next."""
    flags = [*RUN, "--data", folder, "--epochs", "2", "--out"]
    local = ["--submit", "local", "--tasks", "2", "--sweep", "lr=1e-3,2e-3"]
    [(number, out, log), (_, next_out, _)] = submitted("music.py", *flags, tmp_path / "out", *local)
    wait_for(lambda: steps_of(out) >= 2, "two steps")
    children = subprocess.run(["pgrep", "-P", number], capture_output=True, text=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGUSR2)
    wait_for(lambda: finished(out, 6), "the end")
    wait_for(lambda: finished(next_out, 6), "the next point")
    assert open(log).read().count("Starting with JobEnvironment") == 2
    assert on_ranks(train, 2, *flags, tmp_path / "whole", "--lr", "1e-3") == [0, 0]
    assert same(state_of(out), state_of(tmp_path / "whole"))


# -------------------------------------------------------------------------------------------- SLURM


def ask(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.slurm
def test_slurm_says_what_is_wrong_in_a_sentence_and_nothing_is_left(tmp_path):
    for wrong in (["--partition", "nope"], ["--slurm", "acount=me"]):
        done = script("music.py", *RUN, "--out", tmp_path / "out", "--submit", "slurm", *wrong)
        assert done.returncode == 2 and "music.py: error: --submit slurm: " in done.stderr
        assert "Traceback" not in done.stderr and not list((tmp_path / "out").rglob("*.py"))


@pytest.mark.slurm
def test_four_ranks_on_two_nodes_are_requeued_and_end_as_one_undisturbed_under_torchrun(tmp_path, folder):
    flags = [*RUN, "--data", folder, "--epochs", "8", "--out"]
    cluster = ["--submit", "slurm", "--nodes", "2", "--tasks", "2", "--minutes", "30"]
    [(number, out, log)] = submitted("music.py", *flags, tmp_path / "out", *cluster)
    wait_for(lambda: steps_of(out) >= 3, "three steps")
    ask("scancel", "--signal=USR2", number)
    wait_for(lambda: finished(out, 24), "the end")
    assert "SIGUSR2: saved" in open(log).read()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    command = [*torchrun, str(ROOT / "music.py"), *map(str, flags), str(tmp_path / "whole")]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0
    assert state_of(out)["world"] == 4 and same(state_of(out), state_of(tmp_path / "whole"))
