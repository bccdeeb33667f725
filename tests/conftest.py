"""What the tests share: tiny runs in this process, in others and on ranks, and folders of images."""

import contextlib
import json
import multiprocessing
import os
import pickle
import re
import runpy
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import music

ROOT = Path(music.__file__).parent
FORKSERVER = multiprocessing.get_context("forkserver")  # which imports torch once
FORKSERVER.set_forkserver_preload("torch torchvision torch.utils.tensorboard submitit pytest".split())
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # in other processes
TINY = """--recipe demo --arch resnet18 --stem imagenet --size 16 --batch-size 16 --epochs 2 --device cpu
    --hidden 32 --dim 16 --views byol --log-every 1 --knn-every 0 --warmup 0.5
    --workers 0""".split()
EVALUATION = """--backbone random --arch resnet18 --device cpu --precision fp32 --workers 0
    --batch-size 16 --epochs 2 --log-every 1""".split()


def exit_code(function):
    """Call a function as the last act of a script; the script's exit code."""
    try:
        function()
    except SystemExit as end:
        return end.code
    finally:
        common.leave_ranks()  # as the end of a process does
    return 0


def launch(path, *flags):
    """Run a script in this process as if from a shell; its exit code."""
    argv = patch.object(sys, "argv", list(map(str, [path, *flags])))
    children = patch.object(multiprocessing, "active_children", list)  # which are ranks of other tests
    with argv, children, patch.dict(os.environ):
        return exit_code(lambda: runpy.run_path(str(ROOT / path), run_name="__main__"))


def train(*flags, module=music, usual=TINY):
    """Make a tiny run of a method in this process; its exit code."""
    return exit_code(lambda: module.main(module.get_args([*usual, *map(str, flags)])))


def start(path, *flags):
    """Start a process that runs a script, with torch already imported."""
    process = FORKSERVER.Process(target=launch, args=(path, *TINY, *flags))
    process.start()
    return process


def forked(diff):
    """music.py with a diff applied, each hunk of which must match in exactly one place."""
    text = (ROOT / "music.py").read_text()
    for hunk in diff.split("@@\n"):
        before = re.sub(r"(?m)^(\+.*\n|[- ])", "", hunk)
        after = re.sub(r"(?m)^(-.*\n|[+ ])", "", hunk)
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def forks():
    """The source of each fork that README and RESULTS.md show."""
    names = ["sigreg", "barlow_twins", "vicreg", "simclr"]
    text = (ROOT / "README.md").read_text() + (ROOT / "tests/RESULTS.md").read_text()
    diffs = re.findall("(?s)```diff\n(.*?)```", text)
    return {name: forked(diff) for name, diff in zip(names, diffs, strict=True)}


def signals(number):
    """A context in which a run gets a signal in every step."""
    return patch.object(common.Log, "due", lambda *_: os.kill(os.getpid(), number))


def read_log(out, name="log.jsonl"):
    return [json.loads(line) for line in Path(out, name).read_text().splitlines()]


def state_of(out):
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)


def wait_for(out, step, key):
    """Wait until the last record of a run's log has `key`, at `step` or later."""
    for _ in range(6000):
        time.sleep(0.05)
        with contextlib.suppress(OSError, ValueError, IndexError):  # not there, or written right now
            record = read_log(out)[-1]
            if record["step"] >= step and key in record:
                return
    pytest.fail(f"{out} is not at step {step} after five minutes")


def same(a, b):
    """Whether two nested containers of tensors and numbers are equal to the bit."""
    a, b = tree_map_only(torch.Tensor, lambda x: x.numpy().tobytes(), [a, b])
    return a == b


def make_folder(root, count, size=(20, 24), splits=("train", "val"), classes=("a", "b")):
    """Make class folders of `count` JPEGs each: noise over a ramp whose height depends on the class."""
    generator = torch.Generator().manual_seed(0)
    for split in splits:
        for c, name in enumerate(classes):
            folder = Path(root, split, name)
            folder.mkdir(parents=True, exist_ok=True)
            ramp = torch.linspace(0, (c + 1) / 4, size[1])
            for i in range(count):
                image = torch.rand(3, *size, generator=generator) * 0.5 + ramp
                to_pil_image(image).save(folder / f"{i:03}.jpg")
    return root


def on_rank(rank, world, store, function, args):
    """Call a function in a new process group, in the process of a rank; its result, pickled."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    common.leave_ranks()  # of the call before
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        return pickle.dumps(tree_map_only(torch.Tensor, lambda x: x.detach().clone(), function(*args)))
    except BaseException:
        common.leave_ranks()  # so that the others do not wait for this one
        raise


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory):
    """on_ranks(function, world, *args): the results of function(*args) on real processes, in rank order."""
    processes = [ProcessPoolExecutor(1, FORKSERVER) for _ in range(4)]  # each starts when it is needed

    def call(function, world, *args):
        store = tmp_path_factory.mktemp("ranks") / "store"
        answers = []
        for rank in range(world):
            answers.append(processes[rank].submit(on_rank, rank, world, store, function, args))
        return [pickle.loads(answer.result()) for answer in answers]

    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="session")
def big_folder(tmp_path_factory):
    """Images that are too large to be kept in memory, so that they go through the workers."""
    return make_folder(tmp_path_factory.mktemp("big"), 20, size=(140, 150))
