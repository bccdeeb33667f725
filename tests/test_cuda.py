"""The path to a GPU, without one: tensors that say cuda:0 and have their values in the memory of the CPU.

Operands must be on one device; what ranks exchange, there and contiguous. Kernels, copies and where the host
waits are counted. The other ranks hold what rank 0 holds; NCCL and DDP are not simulated.
"""

import os
import sys
from collections import Counter
from importlib import import_module
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, read_log, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import common
import eval_linear

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_linalg_check_errors"}
counts = Counter()  # of kernels, copies and, as FILE:LINE, waits


def wait():
    frame = sys._getframe()
    while frame and os.path.dirname(frame.f_code.co_filename) != str(ROOT):
        frame = frame.f_back
    counts[f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else "a test"] += 1


class Simulated(Tensor):
    """To Python it says cuda:0. For C++, which would look for a driver, it is on the CPU."""

    device = CUDA
    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(lambda *_: pytest.fail("outside of Mode"))
    __repr__ = lambda self, **_: "simulated"
    __reduce_ex__ = lambda self, protocol: self.values.__reduce_ex__(protocol)
    cpu = lambda self: self.to(CPU)
    tolist = lambda self: self.cpu().tolist()

    def __new__(cls, values):
        layout = dict(strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype)
        tensor = Tensor._make_wrapper_subclass(cls, values.size(), device="cpu", **layout)
        tensor.values = values
        return tensor

    def to(self, *args, **kwargs):
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device == CPU:
            wait()
            return self.values.detach().clone()
        return super().to(dtype=dtype or self.dtype, memory_format=memory_format or torch.preserve_format)


# Kernels of BN over ranks that CPUs do not have, by those of one rank: the others are like this one.


def batch_norm_stats(x, eps):
    return torch.native_batch_norm(x.float(), None, None, None, None, True, 0.0, eps)[1:]


def batch_norm_gather_stats_with_counts(x, mean, invstd, running_mean, running_var, momentum, eps, counts):
    torch.native_batch_norm(x.float(), None, None, running_mean, running_var, True, momentum, eps)
    return mean[0].clone(), invstd[0].clone()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    return F.batch_norm(x, mean, invstd**-2 - eps, weight, bias, False, 0.0, eps)


def backward(grad, x, weight, mean, invstd):
    rest = (weight, None, None, mean, invstd, True, 0.0, [True, True, True])
    return torch.ops.aten.native_batch_norm_backward(grad.float(), x.float(), *rest)


def batch_norm_backward_reduce(grad, x, mean, invstd, weight, of_x, of_weight, of_bias):
    _, along, total = backward(grad, x, torch.ones_like(mean), mean, invstd)
    return total, along / invstd, along if of_weight else None, total.clone() if of_bias else None


def batch_norm_backward_elemt(grad, x, mean, invstd, weight, total, along, counts):
    grad_x, *sums = backward(grad, x, torch.ones_like(mean) if weight is None else weight, mean, invstd)
    torch.testing.assert_close([along * invstd, total], [len(counts) * part for part in sums])
    return grad_x.to(x.dtype)


FOR_GPUS_ONLY = {name: function for name, function in globals().items() if name.startswith("batch_norm_")}


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        """Do an operation on the values, and check and count what a GPU would do."""
        here, there, known, on_cuda = [], [], {}, []

        def plain(x):
            if isinstance(x, Simulated):
                there.append(x)
                known[id(x.values)] = x
                return x.values
            if isinstance(x, Tensor) and x.ndim:
                here.append(x.shape)
            on_cuda.append(isinstance(x, torch.device) and x.type == "cuda")
            return CPU if on_cuda[-1] else x

        plain_args, options = tree_map(plain, (args, kwargs or {}))
        name, to_cpu = op._schema.name.removeprefix("aten::"), not isinstance((*args, None)[0], Simulated)
        result = FOR_GPUS_ONLY.get(name, op)(*plain_args, **options)
        if not there and not any(on_cuda):
            return result
        indexing = not to_cpu and name in ("index", "index_put_", "_index_put_impl_")
        if name == "_to_copy" and not there or name == "copy_" and (here or to_cpu):
            counts["copies"] += 1
            if not options.get("non_blocking") and args[2:] != (True,):
                wait()
        elif here and there and not indexing:
            raise RuntimeError(f"{name}: not all are on one device, {here} are on the CPU")
        if name in WAITS or indexing and (here or any(x.dtype == torch.bool for x in there[1:])):
            wait()
        view = any(x.alias_info and not x.alias_info.is_write for x in op._schema.returns)
        counts["kernels"] += not view and "empty" not in name and name != "_unsafe_view"
        wrap = lambda x: known.get(id(x)) if id(x) in known else Simulated(x) if isinstance(x, Tensor) else x
        return result if name == "copy_" and to_cpu else tree_map(wrap, result)


@pytest.fixture
def world(request, monkeypatch):
    """There are GPUs, few images and, with more than one rank, others that hold the same as this one."""

    def exchange(out, x):
        if {type(out), type(x)} != {Simulated} or not (out.is_contiguous() and x.is_contiguous()):
            raise RuntimeError(f"{x.shape} is exchanged, and not contiguous or not on the device")
        out.view(-1, x.numel()).copy_(x.flatten() if out is not x else request.param * x.flatten())

    def fake(where, **values):
        for name, value in values.items():
            patched = value if callable(value) else Mock(return_value=value)
            monkeypatch.setattr(where, name, patched, raising=False)  # torch before 2.13 has other names

    fake(torch.cuda, is_available=True, device_count=8, is_bf16_supported=True, get_device_name="simulated")
    fake(torch.cuda, set_device=None, manual_seed_all=None, _lazy_init=None)
    fake(Tensor, pin_memory=lambda self, *_: self)
    if request.param > 1:
        fake(dist, is_initialized=True, get_rank=0, get_world_size=request.param, broadcast_object_list=None)
        fake(dist, init_process_group=None, destroy_process_group=None, all_gather_single=exchange)
        fake(dist, all_reduce=lambda x, op=None, group=None: None if group else exchange(x, x))
        fake(nn.parallel, DistributedDataParallel=lambda net, **_: net)
    draw_patterns = common.draw_patterns
    fake(common, cpu_group="gloo", draw_patterns=lambda n, split: draw_patterns(n // 78, split))
    fake(torch.optim.Optimizer, _accelerator_graph_capture_health_check=None)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    torch._C._set_only_lift_cpu_tensors(True)
    with Mode():
        yield request.param
    torch._C._set_only_lift_cpu_tensors(False)
    common.constant.cache_clear()


def costs_of(steps, monkeypatch, name, *flags):
    """Run up to so many steps; for each the counts of making its views, and of all of it."""
    costs, batches = [], common.batches

    def counted(*args):
        counts.clear()
        for batch in batches(*args):
            views = counts.copy()
            yield batch
            costs.append((views, counts.copy()))
            counts.clear()
            if len(costs) == steps:
                return

    with monkeypatch.context() as patch:
        patch.setattr(common, "batches", counted)
        flags = ["--device", "cuda", "--batch-size", 32, "--log-every", 100, *flags]
        assert train(*flags, module=import_module(name)) == 0
    return costs


CROPS = "--local-crops 1 --micro-batch"
RUNS = [
    (1, "hsic", ""),
    (8, "hsic", f"--features 64 --draws 16 --target --scale adam --optimizer lars {CROPS} 2"),
    (1, "corinfomax", "--optimizer sgd"),
    (8, "corinfomax", "--objective ldmi --micro-batch 2"),
    (1, "music", f"--segment 4 {CROPS} 16"),
    (8, "music", "--segment 4"),
    (1, "mmd_sphere", "--kernel rbf --log"),
    (8, "mmd_sphere", f"{CROPS} 2"),
    (1, "music", "--segment 4 --batch-size 16 --data {big_folder}"),
]


@pytest.mark.parametrize("world, name, flags", RUNS, indirect=["world"])
def test_a_step_does_not_wait_for_the_device_nor_does_a_resumed_one(
    world, name, flags, tmp_path, monkeypatch, big_folder
):
    """Of two epochs of two steps the third neither logs nor saves."""
    run = [monkeypatch, name, *flags.format(big_folder=big_folder).split(), "--out", tmp_path]
    views = 3 if CROPS in flags else 2
    for making, all_of_it in (costs_of(3, *run)[2], costs_of(1, *run)[0]):
        assert all_of_it.keys() == {"kernels", "copies"}  # else it names where the host waits
        assert making["kernels"] <= 150 * views and all_of_it["copies"] <= 4 * views
    assert 0 <= read_log(tmp_path)[-1]["knn"] <= 1


@pytest.mark.parametrize("world", [8], indirect=True)
def test_mistakes_are_noticed(world):
    x = torch.ones(2, 3, device=CUDA)
    for mistake in [
        lambda: common.all_gather(torch.arange(3)),
        lambda: (x * torch.ones(3)).sum(),
        lambda: torch.ones(3)[x[0].long()],
        lambda: dist.all_gather_single(x.new_empty(24, 2), x.mT),
    ]:
        with pytest.raises(RuntimeError, match="device"):
            mistake()
    counts.clear()
    waiting = [x.sum().item(), x[x > 2], x[torch.arange(1)], torch.tensor([1.0], device=CUDA)]
    torch.ones(3).to(CUDA, non_blocking=True)
    assert counts["a test"] == len(waiting) and counts["copies"] == 2


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("world", [8], indirect=True)
def test_batch_norm_of_ranks_that_are_alike_is_that_of_one(world, affine):
    x = torch.randn(6, 4, 3, 3)
    results = []
    for norm, device in ((nn.BatchNorm2d(4, affine=affine), CPU), (common.BatchNorm(4, affine=affine), CUDA)):
        rows = x.detach().to(device).requires_grad_()
        y = norm.to(device)(rows)
        (y**3).sum().backward()
        tensors = [y, rows.grad, norm.running_mean, *(p.grad for p in norm.parameters())]
        results.append([tensor.cpu() for tensor in tensors])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


MODES = "knn,cached,crops,lbfgs,finetune"


@pytest.mark.parametrize("world", [1, 8], indirect=True)
def test_every_evaluation_runs(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "logspace", lambda *_: torch.tensor([1.0, 0.1]))  # penalties of lbfgs
    flags = (
        f"--backbone random --arch resnet18 --size 16 --mode {MODES} --epochs 1 --batch-size 32 --device cuda"
    )
    args = eval_linear.get_args([*flags.split(), "--workers", "0", "--out", str(tmp_path)])
    eval_linear.main(args)
    assert capsys.readouterr().out.count("resnet18 of random") == 7
