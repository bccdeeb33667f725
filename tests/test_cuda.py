"""The code for GPUs, without one: tensors on torch's meta device (a shape, no values) claim to be on cuda:0.

Operands must be on one device; what ranks exchange must be there, and contiguous. In a hurry, kernels are
recorded, and waiting for the device fails; else all values from it are 1. NCCL and DDP are not simulated.
"""

from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from conftest import train
from torch import Tensor, cuda
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only

import common
import eval_linear

pytestmark = pytest.mark.filterwarnings("ignore")  # about meta tensors
CUDA, CPU, META = map(torch.device, ["cuda:0", "cpu", "meta"])
true_device, reduce_ex = Tensor.device.__get__, Tensor.__reduce_ex__


class Simulation(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args, kwargs):
        name = op.overloadpacket.__name__
        devices = {x.device for x in tree_leaves(args) if isinstance(x, Tensor) and (x.is_meta or x.ndim)}
        if META not in devices and kwargs.get("device", CPU) == CPU:
            return op(*args, **kwargs)
        sent = name in ("_to_copy", "copy_") and devices != {META}
        blocking = sent and not kwargs.get("non_blocking") or name == "_linalg_check_errors"
        mixed = len(devices) > 1 and not sent
        indexed = name == "index" and args[0].is_meta  # by a tensor on the CPU, which waits
        if self.hurry and (blocking or mixed) or mixed and not indexed:
            raise RuntimeError(f"{name} waits for the device, or has operands elsewhere")
        if self.hurry and not op.is_view and name != "_unsafe_view":
            self.kernels.append("copy" if sent else name)
        if name.startswith("batch_norm_"):  # over ranks, which only GPUs have
            sums = [args[0].new_empty(args[0].shape[1]) for _ in op._schema.returns]
            return torch.empty_like(args[0]) if name.endswith("elemt") else sums
        try:
            return op(*args, **tree_map_only(torch.device, lambda to: META if to == CUDA else to, kwargs))
        except RuntimeError:  # the operation needs values
            if self.hurry:
                raise
        ones = tree_map_only(Tensor, lambda x: torch.ones_like(x, device=CPU) if x.is_meta else x, args)
        return tree_map_only(Tensor, lambda x: x.to(kwargs.get("device", META)), op(*ones, **kwargs))


def device(x):
    return CUDA if x.is_meta and _get_current_dispatch_mode() else true_device(x)


def exchange(*tensors, group=None):
    on_cpus = group == "gloo"
    assert on_cpus or all(x.is_meta and x.is_contiguous() for x in tensors), "not contiguous on the device"


def new_group(backend, timeout):
    assert backend == "gloo", "a second NCCL group beside DDP's may hang, as torch documents"
    return backend


@pytest.fixture(params=[1, 8])
def gpu(request):
    """Simulate GPUs, and as many ranks as the parameter says."""
    with (
        patch.multiple(Tensor, device=property(device), __reduce_ex__=lambda x, how: reduce_ex(x.cpu(), how)),
        patch.multiple(cuda, device_count=lambda: 8, set_device=Mock(), _lazy_init=Mock()),
        patch.object(cuda, "is_bf16_supported"),
        patch.multiple(dist, is_initialized=Mock(), get_rank=lambda: 0, get_world_size=lambda: request.param),
        patch.multiple(dist, all_reduce=exchange, all_gather_single=exchange, create=True),  # new in 2.13
        patch.multiple(dist, broadcast_object_list=Mock(), destroy_process_group=Mock()),
        patch.object(dist, "new_group", new_group),
        patch.object(torch.nn.parallel, "DistributedDataParallel", lambda net, **_: net),
        Simulation() as simulation,
    ):
        torch._C._set_only_lift_cpu_tensors(True)  # numbers become tensors on the CPU, which are copied
        simulation.hurry = False
        yield simulation


STEPS = {  # of a method on some ranks: its flags, and the most kernels of such a step, with its views
    ("hsic", 1): ("", 740),
    ("hsic", 8): ("--features 64 --draws 16 --target --scale adam --local-crops 1 --micro-batch 8", 2700),
    ("corinfomax", 1): ("--optimizer sgd", 690),
    ("corinfomax", 8): ("--objective ldmi --micro-batch 8", 1500),
    ("music", 1): ("--local-crops 1 --micro-batch 8 --segment 4", 2300),
    ("music", 8): ("--segment 4", 1060),
    ("mmd_sphere", 1): ("--kernel rbf --log", 670),
    ("mmd_sphere", 8): ("--optimizer lars --local-crops 1 --micro-batch 8", 2220),
}


@pytest.mark.parametrize("name", ["hsic", "corinfomax", "music", "mmd_sphere"])
def test_a_step_without_log_or_save_does_not_wait(gpu, name, tmp_path, monkeypatch, folder, big_folder):
    """Tests the third of four steps, in a run and again as the first step of a resumed one."""
    batches = common.batches
    flags, most_kernels = STEPS[name, common.world()]
    if torch.__version__ < "2.14":  # whose simulated gradients have other strides, and are copied
        most_kernels += 40

    def until_third(train, args, device, start, _):
        yield from batches(train, args, device, start, 2)
        gpu.hurry, gpu.kernels = True, []
        for step, xs, labels in batches(train, args, device, 2, 3):
            assert len(gpu.kernels) <= 110 * len(xs)
            yield step, xs, labels
            assert len(gpu.kernels) <= most_kernels
            assert gpu.kernels.count("copy") <= 4 * len(xs) + 1
        gpu.hurry = False

    def save(content, file):
        assert "step" in content or {x.device for x in content.values()} == {CPU}  # backbone.pth
        write(content, file)

    write = torch.save
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(common, "batches", until_third)
    flags += " --device cuda --precision fp32 --subset 20 --log-every 99 --keep-every 1"
    data = big_folder if common.world() == 1 else folder  # files, or images in memory
    for _ in range(2):
        assert train(*flags.split(), "--data", data, "--out", tmp_path, module=__import__(name)) == 0


def test_every_evaluation_runs(gpu, folder, tmp_path, capsys):
    flags = "--backbone random --arch resnet18 --size 16 --epochs 1 --batch-size 32 --device cuda --workers 0"
    flags += f" --mode knn,cached,crops,lbfgs,finetune --data {folder} --out {tmp_path}"
    eval_linear.main(eval_linear.get_args(flags.split()))
    assert capsys.readouterr().out.count("resnet18 of random") == 5


def test_mistakes_are_noticed(gpu):
    y = torch.ones(3, 3)
    x = y.to(CUDA).mT
    gpu.hurry, gpu.kernels = True, []
    calls = [(dist.all_reduce, x), (dist.all_reduce, y), (x.mul, y), (y.to, CUDA), (Tensor.tolist, x)]
    for mistake, argument in calls:
        with pytest.raises((AssertionError, RuntimeError), match="device|[Mm]eta"):
            mistake(argument)
