"""Submitted runs: errors of use, sweeps, the table; on SLURM, where `sinfo` answers, ranks and requeueing."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, read_log, script
from test_run import same, state_of, train

import common
import hsic
import music

RUN = [*TINY, "--recipe", "demo", "--epochs", "1"]


def table(capsys, top, by="run"):
    """The table's rows, by column, and its text."""
    capsys.readouterr()
    fresh()
    common.table([str(top)], by)
    text = capsys.readouterr().out
    head, *lines = text.splitlines()
    starts = [head.index(name) for name in head.split()] + [None]
    cells = [[line[a:b].strip() for a, b in zip(starts[:-1], starts[1:], strict=True)] for line in lines]
    rows = [dict(zip(head.split(), row, strict=True)) for row in cells]
    return {Path(row["run"]).name: row for row in rows}, text


def wait_for(condition, what, seconds=600):
    """Its first true value; generous, since the machine may be busy."""
    begun = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - begun < seconds, what
        time.sleep(0.1)
    return value


def submitted(name, *flags, env=()):
    """What `script` did, and the record of each run directory it made, by directory."""
    done = script(name, *flags, env=env)
    assert done.returncode == 0, done.stderr
    outs = [
        Path(line.split(": ")[1].split(", log")[0]) for line in done.stdout.splitlines() if line[:4] == "job "
    ]
    return done, {out: json.loads((out / "job.json").read_text()) for out in outs}


def fresh():
    """SLURM is asked anew."""
    getattr(common.queue, "cache_clear", bool)()


def over(*outs):
    def look():
        fresh()
        return all(common.state_of(out)[0] in ("done", "failed") for out in outs)

    return look


# ------------------------------------------------------------------------------------------- errors

BAD = {
    "no SLURM": ("--submit slurm", "no SLURM answers here"),
    "under torchrun": ("--submit slurm", "--submit under torchrun: start it with python"),
    "nodes without --submit": ("--nodes 2", "--nodes needs --submit"),
    "a sweep without --submit": ("--sweep lr=1,2", "--sweep needs --submit"),
    "a partition of this machine": ("--submit local --partition main", "--partition needs --submit slurm"),
    "tasks and GPUs": ("--submit local --gpus 2 --tasks 2", "each GPU has a rank"),
    "another scheduler": ("--submit pbs", "pbs"),
    "no nodes": ("--submit slurm --nodes 0", "0 is not between"),
    "bad value of the script's": ("--submit local --lr nan", "nan"),
    "a flag nobody has": ("--submit local --lrr 0.1", "the nearest is --lr"),
    "a sweep over one": ("--submit local --sweep gama=1,3", "the nearest is --gamma"),
    "a point twice": ("--submit local --sweep lr=0.1,0.2,0.1", "lr=0.1 is there twice"),
    "a point twice in other words": ("--submit local --sweep lr=0.1,1e-1", "lr=1e-1 is there twice"),
    "a flag twice": ("--submit local --sweep lr=0.1 lr=0.2", "give each flag once"),
    "no values": ("--submit local --sweep lr", "flag=value"),
    "an empty value": ("--submit local --sweep lr=1,,2", "flag=value"),
    "bad points only": ("--submit local --sweep lr=nan,-1", "--lr"),
    "a sweep into a run": ("--submit local --sweep lr=1,2 --out {run}", "holds a run"),
    "a run that is running": ("--submit local --out {running}", "is running already"),
    "a file in the way": ("--submit local --out {file}", "file"),
}


def tree(top):
    return {*top.rglob("*")}


@pytest.mark.parametrize("case", BAD)
def test_errors_of_launching_are_one_sentence_exit_2_and_leave_nothing(case, tmp_path, monkeypatch, capsys):
    flags, part = BAD[case]
    for name in ("run", "running"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "args.json").write_text("{}")
    (tmp_path / "running" / "job.json").write_text(json.dumps(dict(cluster="slurm", job="7", log="x")))
    flags = flags.format(**{name: tmp_path / name for name in ("run", "running", "file")}).split()
    out = [] if "--out" in flags else ["--out", str(tmp_path / "runs" / "out")]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "hsic.py"), *RUN, *out, *flags])
    monkeypatch.setattr(common, "queue", lambda: {"7": "RUNNING"})
    monkeypatch.setenv("PATH", "/no/such")
    if case == "under torchrun":
        monkeypatch.setenv("RANK", "0")
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as end:
        common.launch(hsic.main, hsic.get_args)
    said = capsys.readouterr().err.strip().splitlines()
    assert (
        end.value.code == 2 and len(said) == 1 and said[0].startswith("hsic.py: error: ") and part in said[0]
    )
    assert tree(tmp_path) == before


def test_a_sweep_is_the_product_of_its_values_switches_and_lists_too(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["music.py"])
    sweep = ["compile=true,false", "weights=1 0 1,1 1 1"]
    out, points = common.sweep_points(sweep, ["--out", "there"], music.get_args)
    assert (
        out == Path("there")
        and points["compile=false,weights=1_0_1"] == "--no-compile --weights 1 0 1".split()
    )
    assert len(points) == 4 and points["compile=true,weights=1_1_1"] == "--compile --weights 1 1 1".split()


def test_help_shows_the_flags_of_script_and_launch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hsic.py", "--help"])
    common.launch(hsic.main, hsic.get_args)
    text = capsys.readouterr().out
    assert "--gamma" in text and "--submit {slurm,local}" in text and text.count("usage:") == 1


# -------------------------------------------------------------------------------------------- local


def fork(folder):
    """music.py with one line changed."""
    text = (ROOT / "music.py").read_text()
    assert "wd=1e-4, warmup=0.4" in text
    (folder / "mine.py").write_text(text.replace("wd=1e-4, warmup=0.4", "wd=2e-4, warmup=0.4"))
    (folder / "common.py").write_text((ROOT / "common.py").read_text())
    return folder / "mine.py"


def check_sweep(where, folder, capsys, *extra):
    """A fork's sweep: one run with its values, one that fails alone, both of the code as it was submitted."""
    mine, out = fork(where), where / "out"
    sweep = ["--sweep", "lr=1e-3,nan", "weights=1 0 1"]
    done, jobs = submitted(mine, *RUN, "--data", folder, "--out", out, *sweep, *extra)
    mine.write_text("raise RuntimeError('changed since')")
    good, bad = out / "lr=1e-3,weights=1_0_1", out / "lr=nan,weights=1_0_1"
    assert jobs.keys() == {good, bad} and "follow: tail -f" in done.stdout
    wait_for(over(*jobs), done.stdout)
    args = json.loads((good / "args.json").read_text())
    assert args["lr"] == 1e-3 and args["weights"] == [1, 0, 1] and args["wd"] == 2e-4
    assert not {"submit", "sweep", "tasks", "cpus"} & args.keys() and not (bad / "args.json").exists()
    assert "2e-4" in (good / "mine.py").read_text() and "changed since" not in (good / "mine.py").read_text()
    rows, text = table(capsys, out, "loss")
    done, failed = rows[good.name], rows[bad.name]
    assert done["state"] == "done" and done["step"] == "3/3" and done["lr"] == "0.001"
    assert float(done["loss"]) and float(done["knn"]) >= 0
    assert failed["state"] == "failed" and failed["lr"] == "nan" and failed["loss"] == ""
    assert "  argument --lr: nan is not between 0 and 1e+06\n" in text


def test_a_forks_local_sweep_runs_every_point_and_one_fails_alone(tmp_path, folder, capsys):
    check_sweep(tmp_path, folder, capsys, "--submit", "local", "--cpus", "1")


def processes(job):
    """Process numbers of the tasks of a local job, in rank order."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            env = dict(item.partition(b"=")[::2] for item in path.read_bytes().split(b"\0"))
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if env.get(b"SUBMITIT_LOCAL_JOB_ID") == job.encode() and parent == int(job):
            found[int(env[b"SUBMITIT_LOCAL_GLOBALID"])] = int(path.parent.name)
    return [found[rank] for rank in sorted(found)]


def steps_of(out):
    try:
        return max((record["step"] for record in read_log(out)), default=0)
    except (OSError, ValueError):
        return 0


def test_a_local_run_warned_on_one_rank_requeues_and_ends_as_one_undisturbed(tmp_path, folder, on_ranks):
    flags = ["--data", folder, "--recipe", "demo", "--epochs", "4", "--out"]
    out = tmp_path / "out"
    _, jobs = submitted("hsic.py", *TINY, *flags, out, "--submit", "local", "--tasks", "2", "--cpus", "1")
    wait_for(lambda: steps_of(out) >= 3, "three steps")
    os.kill(processes(jobs[out]["job"])[1], signal.SIGUSR2)
    os.kill(processes(jobs[out]["job"])[0], signal.SIGUSR2)
    wait_for(over(out), "its end")
    log = Path(jobs[out]["log"]).read_text()
    assert common.state_of(out)[0] == "done", log
    assert log.count("SIGUSR2: saved") == 1 and log.count("Starting with JobEnvironment") == 2
    assert on_ranks(train, 2, *flags, tmp_path / "whole") == [0, 0]
    assert same(state_of(out), state_of(tmp_path / "whole"))


# -------------------------------------------------------------------------------------------- table


def test_the_table_says_what_differs_and_how_each_run_stands(tmp_path, capsys, monkeypatch):
    def run(name, lr, steps, knn=None, job=None, log="", **more):
        out = tmp_path / name
        out.mkdir(parents=True)
        (out / "args.json").write_text(json.dumps(dict(lr=lr, gamma=3.0, out=name, workers=steps, **more)))
        lines = [dict(step=0, steps=8, knn=0.1), *(dict(step=i + 1, steps=8, loss=-i) for i in range(steps))]
        lines += [dict(step=steps, steps=8, knn=knn)] if knn else []
        (out / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"torn')
        if job:
            (out / "job.log").write_text(log)
            record = dict(cluster="slurm", job=job, log=str(out / "job.log"))
            (out / "job.json").write_text(json.dumps(record))
        return out

    whole = run("whole", 0.1, 8, knn=0.5)
    (whole / "linear").mkdir()
    (whole / "linear" / "args.json").write_text("{}")  # an evaluation within: no row
    results = [dict(mode="linear", top1=61.0), dict(mode="knn", top1=90.0), dict(mode="linear", top1=60.0)]
    (whole / "linear" / "results.jsonl").write_text("\n".join(map(json.dumps, results)))
    better = run("better", 0.2, 8, knn=0.7, local_crops=2)
    (better / "results.jsonl").write_text(json.dumps(dict(mode="cached", top1=59.0)))
    run("waits", 0.1, 0, job="7_0")
    run("runs", 0.1, 2, job="7_1")
    error = "hsic.py: error: step 3: the loss is not finite (loss nan)\n"
    noise = "srun: error: n1: task 0: Exited with exit code 2\n"
    noise += "slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED\n"
    run("fails", 0.1, 2, job="7_2", log="10%|#\rsubmitit INFO starts\n" + error + noise)
    run("stops", 0.1, 5)
    held = run("held", 0.1, 5)
    monkeypatch.setattr(common, "ask", lambda *command: "7_0 PENDING\n7_1 RUNNING\n")
    holds = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True)"
    holds += "; input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", holds, str(held / ".lock")], **pipes) as holder:
        holder.stdout.readline()
        rows, text = table(capsys, tmp_path, "knn")
        holder.communicate(b"\n")
    assert list(rows)[:2] == ["better", "whole"]  # from the best down
    states = dict(whole="done", better="done", waits="waiting", runs="running", held="running")
    states.update(fails="failed", stops="stopped")
    assert {name: row["state"] for name, row in rows.items()} == states
    assert rows["whole"]["linear"] == "61.0" and rows["better"]["linear"] == "59.0"
    assert (
        rows["whole"]["knn"] == "50.0"
        and rows["whole"]["loss"] == "-7.0000"
        and rows["runs"]["step"] == "2/8"
    )
    assert rows["better"]["lr"] == "0.2" and {"gamma", "workers", "out"}.isdisjoint(rows["whole"])
    assert "  step 3: the loss is not finite (loss nan)\n" in text
    for where, by, part in (
        (tmp_path, "speed", "choose from run, lr"),
        (held / "none", "run", "no runs below"),
    ):
        with pytest.raises(SystemExit):
            common.table([str(where)], by)
        assert part in capsys.readouterr().err
    fresh()


# -------------------------------------------------------------------------------------------- SLURM


@pytest.fixture(scope="module")
def slurm():
    if not common.ask("sinfo", "-h"):
        pytest.skip("no SLURM: sinfo does not answer")
    before = {*common.ask("squeue", "-h", "-r", "-o", "%i").split()}
    yield
    for job in {*common.ask("squeue", "-h", "-r", "-o", "%i").split()} - before:
        common.ask("scancel", job)


def undisturbed(name, ranks, *flags, env=()):
    """The same under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}
    command += [str(ROOT / name), *map(str, flags)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr


def test_slurm_refuses_in_a_sentence_what_it_cannot_run(slurm, tmp_path, monkeypatch, capfd):
    for flags, part in {
        "--partition nope": "--partition nope: the cluster has",
        "--nodes 99": "--nodes 99: partition",
        "--slurm acount=me": "--submit slurm: sbatch: unrecognized option '--acount=me'",
    }.items():
        flags = [*RUN, "--out", str(tmp_path / "runs" / "out"), "--submit", "slurm", *flags.split()]
        monkeypatch.setattr(sys, "argv", [str(ROOT / "hsic.py"), *flags])
        with pytest.raises(SystemExit) as end:
            common.launch(hsic.main, hsic.get_args)
        said = capfd.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and len(said) == 1 and part in said[0], said
        assert not tree(tmp_path)


def test_four_ranks_on_two_nodes_are_torchruns_and_one_process(slurm, tmp_path):
    """The built-in images. A fork keeps the parameters after the first step and the third: in float32, ranks
    that sum in another order part soon after."""
    line = "        scale.optimizer.step()\n"
    keep = "        if common.rank() == 0 and run.step in (0, 2):\n"
    keep += '            torch.save([*online.parameters()], f"{args.out}/{run.step}.pt")\n'
    text = (ROOT / "hsic.py").read_text()
    assert text.count(line) == 1
    (tmp_path / "mine.py").write_text(text.replace(line, line + keep))
    (tmp_path / "common.py").write_text((ROOT / "common.py").read_text())
    flags = [*RUN, "--batch-size", "128", "--out"]
    cluster = ["--submit", "slurm", "--nodes", "2", "--tasks", "2"]
    done, jobs = submitted(tmp_path / "mine.py", *flags, tmp_path / "slurm", *cluster)
    assert script(tmp_path / "mine.py", *flags, tmp_path / "one").returncode == 0
    undisturbed(tmp_path / "mine.py", 4, *flags, tmp_path / "torchrun")
    wait_for(over(*jobs), "the job's end")
    ranks = sorted((tmp_path / "slurm" / "submit").glob("*_log.out"))
    assert len(ranks) == 4 and f"global_rank=3({4})" in ranks[3].read_text()
    found = state_of(tmp_path / "slurm")
    assert found["world"] == 4 and found["step"] > 30 and same(found, state_of(tmp_path / "torchrun"))
    first, one, four = (
        torch.cat([p.detach().flatten().double() for p in torch.load(path, weights_only=True)])
        for path in (tmp_path / "one" / "0.pt", tmp_path / "one" / "2.pt", tmp_path / "slurm" / "2.pt")
    )
    assert (four - one).norm() < 1e-4 * one.norm()
    assert (one - first).norm() > 10 * (four - one).norm() and (one - first).norm() > 1e-3 * one.norm()


def test_a_forks_sweep_is_a_job_array(slurm, tmp_path, folder, capsys):
    check_sweep(tmp_path, folder, capsys, "--submit", "slurm")
    jobs = [json.loads(path.read_text())["job"] for path in (tmp_path / "out").glob("*/job.json")]
    assert len({job.partition("_")[0] for job in jobs}) == 1 and {job.partition("_")[2] for job in jobs} == {
        "0",
        "1",
    }


LONG = [*RUN, "--optimizer", "sgd", "--scale", "adam", "--features", "16", "--epochs", "8"]


@pytest.fixture(scope="module")
def slow_fork(tmp_path_factory):
    """hsic.py with a pause after each step, and PAUSE seconds are long."""
    folder, text = tmp_path_factory.mktemp("fork"), (ROOT / "hsic.py").read_text()
    assert text.count("        run.log(") == 1 and text.count("import copy\n") == 1
    text = text.replace("import copy\n", "import copy\nimport os\nimport time\n")
    text = text.replace(
        "        run.log(", "        time.sleep(float(os.environ['PAUSE']))\n        run.log("
    )
    (folder / "slow.py").write_text(text)
    (folder / "common.py").write_text((ROOT / "common.py").read_text())
    return folder / "slow.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, slow_fork, big_folder):
    out = tmp_path_factory.mktemp("whole") / "out"
    undisturbed(slow_fork, 2, *LONG, "--data", big_folder, "--out", out, env=dict(PAUSE="0"))
    return state_of(out)


def kill_rank_1(job):
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            env, command = path.read_bytes().split(b"\0"), (path.parent / "cmdline").read_bytes()
            parent = (path.parent / "stat").read_text().rpartition(")")[2].split()[1]
            step = (Path("/proc") / parent / "comm").read_text().startswith("slurmstepd")
        except OSError:
            continue
        if (
            f"SLURM_JOB_ID={job}".encode() in env
            and b"SLURM_PROCID=1" in env
            and b"submitit" in command
            and step
        ):
            return os.kill(int(path.parent.name), signal.SIGKILL)
    raise AssertionError("no rank 1")


def node_dies(job):
    node = common.ask("squeue", "-h", "-j", job, "-o", "%B").strip()
    common.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(2)
    common.ask("scontrol", "update", f"nodename={node}", "state=resume")


def warned_by_sigterm(job):
    """As where a cluster preempts without its users' signals: the run waits for its end, and comes back."""
    common.ask("scancel", "--signal=TERM", job)
    wait_for(lambda: "SIGTERM: saved" in Path(common_log(job)).read_text(), "the save")
    time.sleep(3)
    assert common.ask("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING"
    common.ask("scontrol", "requeue", job)


def common_log(job):
    text = common.ask("scontrol", "-o", "show", "job", job)
    return next(word.partition("=")[2] for word in text.split() if word.startswith("StdOut="))


HOW = {
    "usr2": lambda job: common.ask("scancel", "--signal=USR2", job),
    "killed": kill_rank_1,
    "all killed": lambda job: common.ask("scancel", "--signal=KILL", f"{job}.0"),
    "requeued": lambda job: common.ask("scontrol", "requeue", job),
    "preempted": lambda job: common.ask(
        "sbatch", "-p", "urgent", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3"
    ),
    "node": node_dies,
    "sigterm": warned_by_sigterm,
    "timeout": lambda job: None,
}
CASES = list(itertools.product(HOW, (0, 2)))


def begin(how, workers, out, slow_fork, big_folder):
    flags = [*LONG, "--data", big_folder, "--out", out, "--workers", workers, "--partition", "main"]
    flags += ["--submit", "slurm", "--nodes", "2", "--minutes", 2 if how == "timeout" else 30]
    return submitted(slow_fork, *flags, env=dict(PAUSE="8" if how == "timeout" else "0.5"))[1][out]


def check(how, out, job, logged, whole):
    """What the job left, disturbed after step `logged`: all of an undisturbed run, by one requeue a life."""
    text, other = (Path(job["log"].replace("_0_log", f"_{rank}_log")).read_text() for rank in (0, 1))
    assert common.state_of(out)[0] == "done", text
    assert same(state_of(out), whole)
    found = {
        word: [line for line in text.splitlines() if word in line] for word in ("resuming at", ": saved")
    }
    resumed, saved = (
        [int(line.split("at step ")[1].split()[0]) for line in lines] for lines in found.values()
    )
    requeues = text.count("Starting with JobEnvironment") - 1
    requeued = (text + other).count("Calling checkpoint method")  # by rank 0 alone, and by no worker of its
    assert (
        how == "timeout" or "I am a slave" not in text + other
    )  # submitit's handler, until the run has its own
    if how in ("usr2", "preempted", "timeout"):
        assert resumed and saved == resumed and requeued == requeues  # some while it was starting
    else:
        assert (
            resumed[0] >= logged - 2 and requeued == 0 and requeues == 1
        )  # the last save: two steps are an epoch
    assert [record["step"] for record in read_log(out) if "loss" in record] == list(range(1, 17))
    return resumed


@pytest.mark.slow
@pytest.mark.parametrize("how, workers", CASES)
def test_a_disturbed_job_comes_back_and_ends_as_one_undisturbed(
    how, workers, slurm, tmp_path, big_folder, slow_fork, whole
):
    out = tmp_path / "out"
    job = begin(how, workers, out, slow_fork, big_folder)
    wait_for(lambda: steps_of(out) >= 3, "three steps")
    HOW[how](job["job"])
    logged = steps_of(out)
    wait_for(over(out), "its end")
    check(how, out, job, logged, whole)
