"""What the tests share: tiny runs in this process, in others and on ranks, and folders of images."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import music

ROOT = Path(music.__file__).parent
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
TINY = """--recipe demo --arch resnet18 --stem imagenet --size 16 --batch-size 16 --epochs 2 --device cpu
    --precision fp32 --hidden 32 --dim 16 --views byol --log-every 1 --knn-every 0 --warmup 0.5
    --workers 0""".split()


def script(name, *flags, timeout=240, env=()):
    """Run a script as a user would, in its own process; the result has the text of stdout and stderr."""
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}
    return subprocess.run(command, cwd=ROOT, timeout=timeout, capture_output=True, text=True, env=env)


def train(*flags, module=music):
    """A tiny run of a method in this process; its exit code, or 0."""
    try:
        module.main(module.get_args([*TINY, *map(str, flags)]))
    except SystemExit as end:
        return end.code
    finally:
        leave_group()
    return 0


def leave_group():
    """As the end of a process does: the other ranks are not to wait for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def read_log(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def state_of(out):
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)


def same(a, b):
    """Whether two nested containers of tensors and numbers are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def make_folder(root, count, size=(20, 24), splits=("train", "val"), classes=("a", "b")):
    """Class folders of `count` JPEGs each, of noise over a ramp whose height is that of the class."""
    generator = torch.Generator().manual_seed(0)
    for split in splits:
        for c, name in enumerate(classes):
            folder = Path(root, split, name)
            folder.mkdir(parents=True, exist_ok=True)
            ramp = torch.linspace(0, 0.5, size[1]) * min(1, (c + 1) / 2)
            for i in range(count):
                image = torch.rand(3, *size, generator=generator) * 0.5 + ramp
                to_pil_image(image).save(folder / f"{i:03}.jpg")
    return root


def serve(rank, world, pipe):
    """A rank, which calls the functions it is sent, each in a new process group, and sends their results."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    while True:
        store, function, args = pipe.recv()
        leave_group()
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        try:
            result = tree_map_only(torch.Tensor, torch.Tensor.detach, function(*args))
            pipe.send((True, pickle.dumps(result)))  # by value
        except BaseException:
            leave_group()
            pipe.send((False, traceback.format_exc()))


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory):
    """on_ranks(function, world, *args): the results of function(*args) on real processes, in rank order."""
    context = multiprocessing.get_context("forkserver")  # which imports torch once
    context.set_forkserver_preload(["torch", "torchvision", "torch.utils.tensorboard", "submitit"])
    ranks = {}

    def call(function, world, *args):
        if world not in ranks:
            ranks[world] = []
            for rank in range(world):
                here, there = context.Pipe()
                process = context.Process(target=serve, args=(rank, world, there), daemon=True)
                process.start()
                ranks[world].append((process, here))
        store = tmp_path_factory.mktemp("ranks") / "store"
        for _, pipe in ranks[world]:
            pipe.send((store, function, args))
        answers = [pipe.recv() for _, pipe in ranks[world]]
        for succeeded, answer in answers:
            assert succeeded, answer
        return [pickle.loads(answer) for _, answer in answers]

    yield call
    for process, _ in sum(ranks.values(), []):
        process.kill()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="session")
def big_folder(tmp_path_factory):
    """Of images larger than those that are kept in memory: they go through the workers."""
    return make_folder(tmp_path_factory.mktemp("big"), 20, size=(140, 150))
