import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TINY = ["--arch", "resnet18", "--stem", "imagenet", "--size", "16", "--batch-size", "16", "--epochs", "2",
        "--device", "cpu", "--precision", "fp32", "--hidden", "32", "--dim", "16", "--views", "byol",
        "--log-every", "1", "--knn-every", "0", "--warmup", "0.5", "--workers", "0"]  # fmt: skip


def script(name, *flags, timeout=240, env=()):
    """Runs a script as a user would, in its own process; its result with the text of stdout and stderr."""
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **dict(env)}
    return subprocess.run(command, cwd=ROOT, timeout=timeout, capture_output=True, text=True, env=env)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank, world, port, pipe):
    """A rank that does what it is sent until it is sent None."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while (work := pipe.recv()) is not None:
        try:
            pipe.send((True, _plain(work[0](*work[1]))))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


def _plain(value):
    """Tensors as arrays: they travel by value."""
    if isinstance(value, torch.Tensor):
        return value.detach().numpy()
    return type(value)(_plain(v) for v in value) if isinstance(value, (list, tuple)) else value


def _tensors(value):
    if isinstance(value, numpy.ndarray):
        return torch.tensor(value)
    return type(value)(_tensors(v) for v in value) if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="session")
def on_ranks():
    """on_ranks(function, world, *args): function(*args) on real processes with gloo; their results in rank
    order."""
    groups = {}

    def call(function, world, *args):
        if world not in groups:
            context, port, groups[world] = mp.get_context("spawn"), free_port(), []
            for rank in range(world):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(rank, world, port, there), daemon=True)
                process.start()
                groups[world].append((process, here))
        for _, pipe in groups[world]:
            pipe.send((function, args))
        answers = [pipe.recv() for _, pipe in groups[world]]
        for ok, value in answers:
            assert ok, value
        return [_tensors(value) for _, value in answers]

    yield call
    for group in groups.values():
        for process, pipe in group:
            pipe.send(None)
            process.join(10)


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def make_folder(root, count, size=(20, 24), splits=("train", "val"), classes=("a", "b")):
    """A folder of class folders of JPEGs of noise over a colour ramp."""
    generator = torch.Generator().manual_seed(0)
    for split in splits:
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = (
                    torch.rand(3, *size, generator=generator) * 0.5
                    + torch.linspace(0, 0.5, size[1]) * (c + 1) / 2
                )
                torchvision.io.write_jpeg(
                    (image.clamp(0, 1) * 255).byte(), str(root / split / name / f"{i:03}.jpg")
                )
    return root


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="session")
def big_folder(tmp_path_factory):
    """Larger than what is kept in memory: goes through the workers."""
    return make_folder(tmp_path_factory.mktemp("big"), 20, size=(140, 150))
