"""Weights from anybody's checkpoint, without running its code, and other backbones in a fork."""

import argparse
import functools
import io
import pickle
import signal
import sys
import zipfile

import numpy
import pytest
import torch
from conftest import exit_code, read_log, same, signals, state_of, train
from torch import nn
from torchvision.models import VisionTransformer

import common
import eval_linear as ev

NET, OTHER = common.resnet("resnet34", "cifar")[0], common.resnet("resnet18")[0]
CHILDREN = nn.Sequential(*NET.children())
LAYOUTS = {  # where in a file, under which prefix, are the published weights; and others
    "torchvision": "/",
    "moco": "state_dict/module.encoder_q. state_dict/module.encoder_k.",
    "moco v3": "state_dict/module.base_encoder. state_dict/module.momentum_encoder.",
    "dino": "teacher/backbone. student/module.backbone.",
    "lightly": "state_dict/backbone.",
    "our checkpoint": "average/ online/backbone.",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_published_resnet_is_found_in_a_checkpoint(name, tmp_path):
    published = CHILDREN if name == "lightly" else NET
    content = {"args": argparse.Namespace(lr=0.1), "student": {0: "text"}, "fc.weight": torch.zeros(3)}
    parts = list(zip((published, OTHER), LAYOUTS[name].split(), strict=False))
    for net, layout in reversed(parts):  # so that it is not merely the first in the file
        part, prefix = layout.split("/")
        net.state_dict(destination=content.setdefault(part, {}) if part else content, prefix=prefix)
    content.pop("bn1.num_batches_tracked", None)  # as in old files
    torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=name != "moco")
    (tmp_path / "args.json").write_text('{"size": 64}')
    args = ev.get_args(["--backbone", f"{tmp_path}/file"])
    assert same(ev.load_backbone(args)[0].state_dict(), NET.state_dict())
    assert (args.arch, args.stem, args.size) == ("resnet34", "cifar", 64)
    net, _ = common.resnet("resnet34", "cifar", init=tmp_path / "file")
    assert same(net.state_dict(), NET.state_dict())


class Attributes(dict):
    """Like objects of EasyDict, OmegaConf and others that checkpoints hold."""

    def __init__(self, **values):
        super().__init__(values)
        self.parent = self


class Items(list):
    """A list whose pickle calls an object, and then adds the items."""

    def __reduce__(self):
        return functools.partial(Items), (), None, iter(self)


CONTENTS = {
    "a whole model": NET,
    "a whole model for several GPUs, in a dict": {"model": nn.DataParallel(NET), "epoch": 3},
    "numpy": {"state_dict": NET.state_dict(), "best": numpy.float64(71.2), "seeds": numpy.arange(3)},
    "other objects": {"config": Attributes(lr=0.1), "key": {numpy.dtype("int8"): 1}, **NET.state_dict()},
    "an object that calls another": {"history": Items("ab"), **NET.state_dict()},
    "weights in an object": Attributes(**NET.state_dict()),
    "tensors with attributes": {**NET.state_dict(), "conv1.weight": nn.Parameter(NET.conv1.weight)},
}
CONTENTS["tensors with attributes"]["conv1.weight"].decay = False


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_weights_are_read_beside_any_objects(name, zipped, tmp_path, monkeypatch):
    torch.save(CONTENTS[name], tmp_path / "file", _use_new_zipfile_serialization=zipped)
    for missing in ("Attributes", "Items"):  # as in a project without these classes
        monkeypatch.delattr(sys.modules[__name__], missing)
    net, arch, stem, _ = common.find_resnet(common.load_weights(tmp_path / "file"))
    assert same(net.state_dict(), NET.state_dict()) and (arch, stem) == ("resnet34", "cifar")


def call(module, name, *args):
    """The pickle of a call to a function of a module."""
    names = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return names + b"\x93" + pickle.dumps(args, 2)[2:-1] + b"R"


HOSTILE = {  # each leaves an object on the pickle's stack
    "reduce": call("evil", "strike"),
    "exec": call("builtins", "exec", "import evil; evil.strike()"),
    "dotted": call("torch", "serialization.os.system", "python -c 'import evil; evil.strike()'"),
    "build": b"cevil\nEvil\n)\x81}b",
    "inst": b"(ievil\nEvil\n",
    "obj": b"(cevil\nEvil\no",
    "by a tensor's function": b"ctorch._tensor\n_rebuild_from_type_v2\n(cevil\nstrike\nN)Nt" + b"R",
    "twice": b"cevil\nstrike\n)R)R",
    "through partial": b"cfunctools\npartial\n(cevil\nstrike\ntR)R",
    "a hook": b"cevil\nEvil\n)\x81K\x00cevil\nstrike\ns",
    "storage": b"(\x8c\x07storagecevil\nEvil\n\x8c\x010\x8c\x03cpuK\x01tQ",
    "module": b"(\x8c\x06modulecevil\nEvil\n\x8c\x01f\x8c\x01stQ",
    "attributes": b"ctorch._utils\n_rebuild_tensor_v2\nN}\x8c\x0c__defaults__cevil\nstrike\n\x85s\x86b",
}
EVIL = """
open({mark!r}, "a").write("imported")
def strike(*_):
    open({mark!r}, "a").write("called")
class Evil:
    def __new__(cls, *_):
        strike()
        return super().__new__(cls)
    def __setstate__(self, _):
        strike()
"""


def old_file(position, payload):
    """A file as torch.save wrote it before 1.6: five pickles, one of which is the payload."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    parts[position] = payload
    return b"".join(parts)


def zip_file(payload):
    """A file of torch.save whose pickle is the payload."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": payload, "version": b"3\n", "data/0": bytes(64)}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_a_hostile_checkpoint_names_is_imported_or_called(name, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(EVIL.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    monkeypatch.chdir(tmp_path)
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    payload = b"\x80\x04" + HOSTILE[name] + b"."
    files = [zip_file(payload), payload, *[old_file(position, payload) for position in range(5)]]
    for content in files:
        (tmp_path / "file").write_bytes(content)
        assert exit_code(lambda: common.load_weights(tmp_path / "file")) in (0, 2)
    assert "evil" not in sys.modules and not mark.exists() and not list(tmp_path.glob("*.patch"))
    assert torch._utils._rebuild_tensor_v2.__defaults__ is defaults


@pytest.mark.filterwarnings("ignore")  # torch is to lose it
def test_a_torchscript_program_is_refused(tmp_path, capsys):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "file.pt")
    assert exit_code(lambda: common.resnet("resnet18", init=tmp_path / "file.pt")) == 2
    assert "file.pt is a TorchScript program: save the state_dict()" in capsys.readouterr().err


def test_another_backbone_in_a_fork_trains_resumes_and_is_saved(tmp_path, monkeypatch, capsys):
    def vision_transformer(*_):
        net = VisionTransformer(16, 8, 1, 2, 32, 64)  # image, patch, layers, heads, width, MLP
        net.heads = nn.Identity()
        return net, 32

    monkeypatch.setattr(common, "resnet", vision_transformer)
    out, uncut = tmp_path / "out", tmp_path / "uncut"
    flags = ["--subset=4", "--batch-size=8", "--knn-every=1", "--micro-batch=3", "--out"]
    assert train(*flags, uncut) == 0
    assert "eval_linear.py" not in capsys.readouterr().out  # which would refuse it
    with signals(signal.SIGTERM):
        assert train(*flags, out) == 0 and state_of(out)["step"] == 1
    assert train(*flags, out) == 0
    assert same(state_of(out), state_of(uncut)) and read_log(out)[-1]["knn"] >= 0
    saved = torch.load(out / "backbone.pth", weights_only=True)
    vision_transformer()[0].load_state_dict(saved)
