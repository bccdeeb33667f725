"""Sweeps and submitted runs: here, by submitit's local executor and, if marked slurm, on a cluster."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
from conftest import ROOT, TINY, launch, same, state_of, train, wait_for

import common

RUN = [*TINY, "--epochs=1"]


def submitted(capsys, name, *flags):
    """For each run of a submission the number of its job, its directory and its log."""
    assert launch(name, *flags) == 0
    return re.findall(r"job (.+): (.+), log (.+)", capsys.readouterr().out)


SEES = "import os\nprint('sees', os.environ.get('CUDA_VISIBLE_DEVICES'))\n"
SWEEP = ["--sweep", "batch-size=4096,8", "weights=1 0 1", "zero-init=true"]  # the first of two points fails


@pytest.mark.parametrize("submit", ["", "local", pytest.param("slurm", marks=pytest.mark.slurm)])
def test_a_swept_fork_runs_every_point_with_the_code_as_it_was(submit, tmp_path, folder, monkeypatch, capsys):
    mine, out = tmp_path / "mine.py", tmp_path / "out"
    mine.write_text(SEES + (ROOT / "music.py").read_text())
    flags = [*RUN, "--data", folder, "--out", out, *SWEEP]
    if submit:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
        jobs = submitted(capsys, mine, *flags, "--submit", submit)
        assert len({number.split("_")[0] for number, _, _ in jobs}) == 1  # a job array, or one job
        mine.write_text("raise RuntimeError('changed since')")
    else:
        here = Mock(wraps=subprocess, run=lambda command: Mock(returncode=launch(*command[1:])))
        monkeypatch.setattr(common, "subprocess", here)
        assert launch(mine, *flags) == 1
    point = out / "batch-size=8,weights=1_0_1,zero-init=true"
    wait_for(point, 6, "knn")
    args = json.loads((point / "args.json").read_text())
    assert args["weights"] == [1, 0, 1] and args["zero_init"]
    assert "changed since" not in (point / "mine.py").read_text()
    if submit == "local":  # submitit would show it GPU 0, whatever its caller sees
        assert Path(jobs[0][2]).read_text().count("sees 5,3") == 2


def test_help_shows_the_flags_of_script_and_launch(capsys):
    assert launch("music.py", "--help") == 0
    text = capsys.readouterr().out
    assert "--segment" in text and "--submit {slurm,local}" in text and text.count("usage:") == 1


def test_ctrl_c_in_a_sweep_here_is_left_to_the_run_and_ends_the_sweep(tmp_path):
    def interrupted(_):
        os.kill(os.getpid(), signal.SIGINT)
        return Mock(returncode=130)

    before = signal.getsignal(signal.SIGINT)
    with patch.object(subprocess, "run", side_effect=interrupted) as run:
        assert launch("music.py", *RUN, "--out", tmp_path, *SWEEP) == 130
    signal.signal(signal.SIGINT, before)
    run.assert_called_once()


def test_sigterm_to_torchrun_saves_on_all_ranks_and_leaves_no_process(tmp_path, big_folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "music.py", *RUN, "--data", big_folder, "--workers=1", "--epochs=9", "--out", tmp_path]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path, 2, "loss")
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saved" in process.communicate(timeout=60)[1] and state_of(tmp_path)["world"] == 2
    time.sleep(1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


LOCAL = "local --tasks 2 --sweep epochs=2,1", "pkill -USR2 -P", 2, 2
SLURM = "slurm --nodes 2 --tasks 2 --minutes 30 --sweep epochs=4", "scancel --signal=USR2", 4, 4


@pytest.mark.parametrize("job, warn, world, epochs", [LOCAL, pytest.param(*SLURM, marks=pytest.mark.slurm)])
def test_warned_ranks_resume_and_end_the_same(job, warn, world, epochs, tmp_path, folder, on_ranks, capsys):
    """In a sweep here they come back to the same point, and then go on to the next."""
    flags = [*RUN, "--data", folder, "--batch-size=12", "--out"]  # four steps an epoch
    jobs = submitted(capsys, "music.py", *flags, tmp_path / "out", "--submit", *job.split())
    number, out, log = jobs[0]
    wait_for(out, 1, "loss")
    subprocess.run([*warn.split(), number], check=True)
    wait_for(out, 4 * epochs, "knn")
    wait_for(jobs[-1][1], 4, "knn")
    text = Path(log).read_text()
    assert "SIGUSR2: saved" in text and f"saved by {world} rank(s)" in text
    commit = json.loads(Path(out, "args.json").read_text())["surroundings"]["commit"]
    assert commit == common.surroundings()["commit"]
    assert on_ranks(train, world, *flags, tmp_path / "whole", f"--epochs={epochs}") == [0] * world
    assert same(state_of(out), state_of(tmp_path / "whole"))


@pytest.mark.slurm
def test_slurm_says_what_is_wrong_in_a_sentence_and_nothing_is_left(tmp_path, capsys):
    for wrong in ("--partition=nope", "--slurm=acount=me"):
        assert launch("music.py", *RUN, "--out", tmp_path / "out", "--submit=slurm", wrong) == 2
        assert "music.py: error: --submit slurm: " in capsys.readouterr().err
        assert not list((tmp_path / "out").rglob("*.py"))
