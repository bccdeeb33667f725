"""Submitted runs and sweeps, by submitit's local executor and, if marked slurm, on a cluster."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, launch, same, state_of, train, wait_for

import common

RUN = [*TINY, "--epochs=1"]


def submitted(capsys, name, *flags):
    """Submit runs: the number of the job, the directory and the log of each."""
    assert launch(name, *flags) == 0
    return re.findall(r"job (.+): (.+), log (.+)", capsys.readouterr().out)


SWEEP = ["--sweep", "batch-size=4096,8", "weights=1 0 1", "zero-init=true"]  # the first of two runs fails


@pytest.mark.parametrize("submit", ["local", pytest.param("slurm", marks=pytest.mark.slurm)])
def test_a_swept_fork_runs_with_the_code_as_it_was_submitted(submit, tmp_path, folder, capsys):
    mine, out = tmp_path / "mine.py", tmp_path / "out"
    mine.write_text((ROOT / "music.py").read_text())
    flags = [*RUN, "--data", folder, "--out", out, *SWEEP]
    jobs = submitted(capsys, mine, *flags, "--submit", submit)
    assert len(jobs) == 2
    if submit == "slurm":
        assert len({number.split("_")[0] for number, _, _ in jobs}) == 1  # a job array
    mine.write_text("raise RuntimeError('changed since')")
    run = out / "batch-size=8,weights=1_0_1,zero-init=true"
    wait_for(run, 6, "knn")
    args = json.loads((run / "args.json").read_text())
    assert args["weights"] == [1, 0, 1] and args["zero_init"]
    assert "changed since" not in (run / "mine.py").read_text()


def test_help_shows_the_flags_of_script_and_launch(capsys):
    assert launch("music.py", "--help") == 0
    text = capsys.readouterr().out
    assert "--segment" in text and "--submit {slurm,local}" in text and text.count("usage:") == 1


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


LOCAL = "local --tasks 2", "pkill -USR2 -P", 2
SLURM = "slurm --nodes 2 --tasks 2 --minutes 30", "scancel --signal=USR2", 4


@pytest.mark.parametrize("job, warn, world", [LOCAL, pytest.param(*SLURM, marks=pytest.mark.slurm)])
def test_warned_ranks_resume_and_end_as_if_undisturbed(job, warn, world, tmp_path, folder, on_ranks, capsys):
    flags = [*RUN, "--data", folder, "--batch-size=12", "--epochs=4", "--out"]  # sixteen steps
    jobs = submitted(capsys, "music.py", *flags, tmp_path / "out", "--submit", *job.split())
    number, out, log = jobs[0]
    wait_for(out, 1, "loss")
    subprocess.run([*warn.split(), number], check=True)
    wait_for(out, 16, "knn")
    text = Path(log).read_text()
    assert "SIGUSR2: saved" in text and f"saved by {world} rank(s)" in text
    assert "unused parameters" not in text  # a warning of DDP's that means nothing here
    starts = json.loads(Path(out, "args.json").read_text())["starts"]
    assert {start["commit"] for start in starts} == {common.provenance(0)["commit"]} and len(starts) == 2
    assert on_ranks(train, world, *flags, tmp_path / "uncut") == [0] * world
    assert same(state_of(out), state_of(tmp_path / "uncut"))


@pytest.mark.slurm
def test_slurm_says_what_is_wrong_in_a_sentence_and_nothing_is_left(tmp_path, capsys):
    for wrong in ("--partition=nope", "--slurm=acount=me"):
        assert launch("music.py", *RUN, "--out", tmp_path / "out", "--submit=slurm", wrong) == 2
        assert "music.py: error: --submit slurm: " in capsys.readouterr().err
        assert not list((tmp_path / "out").rglob("*.py"))
