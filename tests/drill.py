"""The faults that take minutes: what was done to runs, and what became of them; exit code 1 if one was lost.

python tests/drill.py [--only kill,leaks] [--times 30]
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import ROOT, TINY, make_folder, read_log

torch.set_num_threads(1)
FLAGS = [*TINY, "--recipe", "demo", "--size", "12", "--save-minutes", "0.001", "--workers", "1"]
LONG = ["--log-every", "50", "--save-minutes", "15", "--batch-size", "4"]
METHODS = {"hsic": "", "corinfomax": "", "music": "--segment 4", "mmd_sphere": ""}


def start(out, *flags, ranks=1, name="hsic", restarts=0):
    """A run in a session of its own; it says what it has to in out.txt."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        ranks,
        "--max-restarts",
        restarts,
    ]
    command = [sys.executable, *(torchrun if ranks > 1 else []), ROOT / f"{name}.py", *flags, "--out", out]
    with open(f"{out}.txt", "a") as said:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*map(str, command)], stdout=said, stderr=said, env=env, start_new_session=True
        )


def end(process, seconds=900):
    return process.wait(seconds)


def family(pid):
    """The process and all below it."""
    try:
        tasks = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
        below = [child for task in tasks for child in task.read_text().split()]
    except OSError:
        return []
    return [pid, *(p for child in below for p in family(int(child)))]


def kill(pids, number=signal.SIGKILL):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def alive(pids):
    return [pid for pid in pids if "State:\tZ" not in (status(pid) or "State:\tZ")]


def status(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def until(condition, seconds=300):
    begun = time.monotonic()
    while not condition() and time.monotonic() - begun < seconds:
        time.sleep(0.05)
    return time.monotonic() - begun


def steps(out):
    """Steps that the run has logged, so far."""
    text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    return max((int(step) for step in re.findall(r'"step": (\d+)', text)), default=0)


def equal(a, b):
    """Whether two runs ended in the same state, bit for bit."""
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (a, b))
    return str(torch.utils._pytree.tree_structure(a)) == str(torch.utils._pytree.tree_structure(b)) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(*map(torch.utils._pytree.tree_leaves, (a, b)), strict=True)
    )


def killed(top, data, times, ranks):
    """SIGKILL at random moments of a life, from its start to its exit; up to five lives a run."""
    flags, kills, runs, lost = [*FLAGS, "--data", data, "--epochs", "4"], 0, 0, 0
    begun = time.monotonic()
    whole = top / f"whole-{ranks}"
    assert end(start(whole, *flags, ranks=ranks)) == 0
    length = time.monotonic() - begun
    while kills < times:
        out, runs = top / f"kill-{ranks}-{runs}", runs + 1
        for _ in range(min(5, times - kills)):
            process = start(out, *flags, ranks=ranks)
            time.sleep(length * random.uniform(0.2, 1.05))
            if process.poll() is not None:
                break
            kills += 1
            kill(family(process.pid))
            process.wait()
        ok = end(start(out, *flags, ranks=ranks)) == 0 and equal(out, whole)
        lost += not ok
    return f"{kills} kills in {runs} runs of {length:.0f} s, {runs - lost} ended bit for bit alike", not lost


def dies(top, data, restarts):
    """SIGKILL of one of two ranks; with a restart, the run ends by itself, as one undisturbed."""
    out, flags = top / f"dies-{restarts}", [*FLAGS, "--data", data, "--epochs", "8"]
    process = start(out, *flags, ranks=2, restarts=restarts)
    until(lambda: steps(out) >= 4)
    workers = [pid for pid in family(process.pid)[1:] if f"\nPPid:\t{process.pid}\n" in status(pid)]
    kill(workers[-1:])
    seconds = until(lambda: not alive(workers))
    code, said = end(process), Path(f"{out}.txt").read_text()
    named = re.search(r"error: (rank \d: another one does not answer)", said)
    if not restarts:
        return f"all gone after {seconds:.0f} s: '{named and named[1]}'", bool(
            named
        ) and seconds < 60 and code != 0
    assert end(start(top / "undisturbed", *flags, ranks=2)) == 0
    ok = code == 0 and "resuming at step" in said and equal(out, top / "undisturbed")
    return (
        f"the others gone after {seconds:.0f} s, the restart ended with {code}, bit for bit alike: {ok}",
        ok,
    )


def elastic(top, data):
    """SIGTERM at 2 ranks, on with 1, SIGTERM, on with 2."""
    out, flags = top / "elastic", [*FLAGS, "--data", data, "--epochs", "6"]
    for ranks, stop in ((2, 4), (1, 8), (2, None)):
        process = start(out, *flags, ranks=ranks)
        if stop:
            until(lambda stop=stop: steps(out) >= stop)
            process.terminate()
        end(process)
    said = re.findall(
        r"resuming at step (\d+) of 12, saved on (\d) ranks, now (\d)", Path(f"{out}.txt").read_text()
    )
    ok = [place[1:] for place in said] == [("2", "1"), ("1", "2")] and steps(out) == 12
    return (
        f"{', '.join(f'from step {s}: {a} -> {b} ranks' for s, a, b in said)}; ended at step {steps(out)}",
        ok,
    )


def interrupt(top, data, times=5):
    """Ctrl-C, which all processes of a terminal get, at random moments."""
    left = codes = ""
    for i in range(times):
        out = top / f"interrupt-{i}"
        process = start(out, *FLAGS, "--data", data, "--epochs", "99", "--workers", "2")
        until(lambda out=out: steps(out) >= 1)
        time.sleep(random.random())
        pids = family(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        codes += f" {end(process, 120)}"
        left += " ".join(map(str, alive(pids)))
    return (
        f"{times} times, exit codes{codes}, processes left: {left or 'none'}",
        not left and codes == " 130" * times,
    )


def leaks(top, data, epochs=40):
    """Memory, handles and threads of a run with two workers; over its second and its last quarter."""
    out, seen = top / "leaks", []
    data = make_folder(top / "many", 100, size=(140, 150))
    flags = [*FLAGS, *LONG, "--data", data, "--epochs", epochs, "--knn-every", "1", "--workers", "2"]
    process = start(out, *flags)
    while process.poll() is None:
        text, now = status(process.pid), steps(out)
        if now and text and "VmRSS" in text:
            memory, threads = (int(re.search(rf"{key}:\s+(\d+)", text)[1]) for key in ("VmRSS", "Threads"))
            try:
                handles = len(os.listdir(f"/proc/{process.pid}/fd"))
            except OSError:
                break
            seen.append((now, memory / 1024, handles, threads, len(family(process.pid)) - 1))
        time.sleep(0.5)
    total = steps(out)
    quarters = [[row for row in seen if a <= row[0] / total < a + 0.25] for a in (0.25, 0.75)]
    before, after = ([max(column) for column in zip(*rows, strict=True)][1:] for rows in quarters)
    names = ("MB", "handles", "threads", "processes below")
    shown = ", ".join(f"{a:.0f} -> {b:.0f} {name}" for a, b, name in zip(before, after, names, strict=True))
    ok = (
        end(process) == 0
        and after[0] < 1.05 * before[0]
        and all(b <= a + 2 for a, b in zip(before, after, strict=True) if a < 500)
    )
    return f"{total} steps, {epochs} kNN tests and checkpoints: {shown}", ok


def bf16(top, data):
    """1,000 steps of each method on the built-in images."""
    found, said = [], []
    for name, more in METHODS.items():
        flags = [*FLAGS, *LONG, "--precision", "bf16", "--epochs", "1", "--batch-size", "5", "--workers", "0"]
        out, begun = top / name, time.monotonic()
        found.append(end(start(out, *flags, *more.split(), name=name), 1800) == 0 and steps(out) == 1000)
        losses = [record["loss"] for record in read_log(out) if "loss" in record]
        seconds = time.monotonic() - begun
        said.append(f"{name} {steps(out)} steps, loss {losses[0]:.3g} -> {losses[-1]:.3g}, {seconds:.0f} s")
    return "; ".join(said), all(found)


CASES = {
    "kill": lambda top, data, times: killed(top, data, times, 1),
    "kill-ranks": lambda top, data, times: killed(top, data, times, 2),
    "rank-dies": lambda top, data, _: dies(top, data, 0),
    "restart": lambda top, data, _: dies(top, data, 1),
    "elastic": lambda top, data, _: elastic(top, data),
    "ctrl-c": lambda top, data, _: interrupt(top, data),
    "leaks": lambda top, data, _: leaks(top, data),
    "bf16": lambda top, data, _: bf16(top, data),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CASES), help="cases, of %(default)s")
    parser.add_argument("--times", type=int, default=30, help="kills of a case")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    random.seed(args.seed)
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        data = make_folder(Path(folder) / "data", 20, size=(140, 150))  # too large for memory: has workers
        for case in args.only.split(","):
            (top := Path(folder) / case).mkdir()
            begun = time.monotonic()
            try:
                text, ok = CASES[case](top, data, args.times)
            except Exception as error:
                text, ok = f"{type(error).__name__}: {error}", False
            lost += not ok
            print(f"{case:12}{'ok' if ok else 'LOST':6}{time.monotonic() - begun:5.0f} s  {text}", flush=True)
    raise SystemExit(lost > 0)
