"""The path to a GPU, without one: tensors on torch's meta device, of a shape and no values, that say cuda:0.

Operands must be on one device; what ranks exchange, there and contiguous. Kernels and copies are counted, and
who waits for the device in a hurry is stopped. What comes back from it is 1. NCCL and DDP are not simulated.
"""

from collections import Counter
from importlib import import_module
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from conftest import train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

import common
import eval_linear

pytestmark = pytest.mark.filterwarnings("ignore")  # about meta tensors
CUDA, CPU, META = torch.device("cuda", 0), torch.device("cpu"), torch.device("meta")
WITH_VALUES = {"_local_scalar_dense", "equal", "_unique2"}  # other operations of this kind are errors
true_device, reduce_ex = Tensor.device.__get__, Tensor.__reduce_ex__


def on_meta(x):
    if isinstance(x, Tensor):
        return x.to(META)
    return META if x == CUDA else x


def on_cpu(x):
    return torch.ones_like(x, device=CPU) if isinstance(x, Tensor) and x.is_meta else x


def batch_norm_of_ranks(name, x):
    """Results of the kernels of BN over ranks, which only GPUs have."""
    if name.endswith("elemt"):
        return torch.empty_like(x)
    return [x.new_empty(x.shape[1], dtype=torch.float) for _ in range(4 if name.endswith("reduce") else 2)]


class Simulation(TorchDispatchMode):
    hurry = False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        there = [x for x in tensors if x.is_meta]
        here = [x for x in tensors if not x.is_meta and x.ndim]
        if not there and not any(isinstance(x, torch.device) and x != CPU for x in leaves):
            return op(*args, **kwargs)
        name = op._schema.name.removeprefix("aten::")
        home = kwargs.get("device") == CPU or name == "copy_" and not args[0].is_meta
        indexing = name == "index" and args[0].is_meta and (here or any(x.dtype == torch.bool for x in there))
        sent = name in ("_to_copy", "copy_") and (here or not there) and not home
        blocking = sent and not kwargs.get("non_blocking") and args[2:] != (True,)
        values = home or indexing or name in WITH_VALUES
        if self.hurry and (values or blocking or name == "_linalg_check_errors"):
            raise RuntimeError(f"{name} waits for the device")
        if values:
            result = op(*tree_map(on_cpu, args), **kwargs)
            return result if home else tree_map(on_meta, result)
        if here and there and not sent:
            raise RuntimeError(f"{name}: not all are on one device")
        view = any(x.alias_info and not x.alias_info.is_write for x in op._schema.returns)
        self.counts["kernels"] += not view and "empty" not in name and name != "_unsafe_view"
        self.counts["copies"] += bool(sent)
        if name.startswith("batch_norm_"):
            return batch_norm_of_ranks(name, args[0])
        args, kwargs = tree_map(on_meta, (args, kwargs))
        return op(*args, **kwargs)


@pytest.fixture(params=[1, 8])
def gpu(request, monkeypatch):
    """There are GPUs, few images and as many ranks as the parameter says."""

    def fake(where, **values):
        for name, value in values.items():
            monkeypatch.setattr(where, name, value, raising=False)  # torch before 2.13 has other names

    def device(x):
        return CUDA if x.is_meta and _get_current_dispatch_mode() else true_device(x)

    def exchange(*tensors, group=None):
        if not group and not all(x.is_meta and x.is_contiguous() for x in tensors):
            raise RuntimeError("what is exchanged is not contiguous or not on the device")

    fake(Tensor, device=property(device), __reduce_ex__=lambda x, protocol: reduce_ex(x.cpu(), protocol))
    fake(torch.cuda, device_count=lambda: 8, set_device=Mock(), is_bf16_supported=Mock(), _lazy_init=Mock())
    draw_patterns = common.draw_patterns
    fake(common, cpu_group=Mock(), draw_patterns=lambda n, split: draw_patterns(n // 78, split))
    if request.param > 1:
        fake(dist, is_initialized=Mock(), get_rank=lambda: 0, get_world_size=lambda: request.param)
        fake(dist, all_gather_single=exchange, all_reduce=exchange)
        fake(dist, broadcast_object_list=Mock(), destroy_process_group=Mock())
        fake(nn.parallel, DistributedDataParallel=lambda net, **_: net)
    torch._C._set_only_lift_cpu_tensors(True)
    with Simulation() as simulation:
        simulation.counts = Counter()
        yield simulation
    torch._C._set_only_lift_cpu_tensors(False)


CROPS = "--local-crops 1 --micro-batch 16"
RUNS = [
    (1, "hsic", ""),
    (8, "hsic", f"--features 64 --draws 16 --target --scale adam --optimizer lars {CROPS}"),
    (1, "corinfomax", "--optimizer sgd"),
    (8, "corinfomax", "--objective ldmi --micro-batch 16"),
    (1, "music", f"--segment 4 {CROPS}"),
    (8, "music", "--segment 4"),
    (1, "mmd_sphere", "--kernel rbf --log"),
    (8, "mmd_sphere", CROPS),
    (1, "music", "--segment 4 --batch-size 16 --data {big_folder}"),
]


@pytest.mark.parametrize("gpu, name, flags", RUNS, indirect=["gpu"])
def test_a_step_that_only_steps_does_not_wait(gpu, name, flags, tmp_path, monkeypatch, big_folder):
    """The third of two epochs neither logs nor saves, nor does it as the first of a resumed run."""
    batches, kernels = common.batches, []

    def until_third(train, args, device, start, _):
        yield from batches(train, args, device, start, 2)
        gpu.counts.clear()
        gpu.hurry = True
        for step, xs, labels in batches(train, args, device, 2, 3):
            kernels.append(gpu.counts["kernels"] / len(xs))
            yield step, xs, labels
            assert kernels[-1] <= 150 and gpu.counts["copies"] <= 4 * len(xs)
        gpu.hurry = False

    monkeypatch.setattr(common, "batches", until_third)
    run = ["--device", "cuda", "--batch-size", 32, "--log-every", 100, "--out", tmp_path]
    for _ in range(2):
        assert train(*run, *flags.format(big_folder=big_folder).split(), module=import_module(name)) == 0
    assert len(kernels) == 2


def test_every_evaluation_runs(gpu, tmp_path, capsys):
    flags = "--backbone random --arch resnet18 --size 16 --epochs 1 --batch-size 32 --device cuda --workers 0"
    modes = ["--mode", "knn,cached,crops,lbfgs,finetune", "--out", str(tmp_path)]
    eval_linear.main(eval_linear.get_args([*flags.split(), *modes]))
    assert capsys.readouterr().out.count("resnet18 of random") == 7


MISTAKES = [
    lambda x: common.all_gather(torch.arange(3)),
    lambda x: dist.all_reduce(x.mT),
    lambda x: x * torch.ones(3),
    lambda x: torch.ones(3)[x[0].long()],
    lambda x: x.sum().item(),
    lambda x: x[x > 2],
    lambda x: x[torch.arange(1)],
    lambda x: torch.tensor([1.0], device=CUDA),
    lambda x: x.cpu(),
]


@pytest.mark.parametrize("gpu", [8], indirect=True)
def test_mistakes_are_noticed(gpu):
    x = torch.ones(2, 3).to(CUDA, non_blocking=True) + 1
    assert gpu.counts == dict(kernels=2, copies=1)
    gpu.hurry = True
    for mistake in MISTAKES:
        with pytest.raises(RuntimeError, match="device"):
            mistake(x)
