"""Faults and hostile input: arguments, paths, images, disks, checkpoints, numbers, ranks. tests/drill.py has
those that take longer."""

import contextlib
import io
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib

import pytest
import torch
from conftest import TINY, make_folder, read_log
from PIL import Image
from test_run import run_until, same, state_of, train

import common
import corinfomax
import eval_linear
import hsic
import mmd_sphere
import music

METHODS = {hsic: [], corinfomax: [], music: ["--segment", "4"], mmd_sphere: []}
SCRIPTS = {
    **METHODS,
    eval_linear: ["--knn", "--k", "1", "--backbone", "random", "--features", "{out}/kept"],
}
QUICK = [*TINY, "--recipe", "demo", "--size", "12", "--batch-size", "48", "--epochs", "1"]
EVAL = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
root = pytest.mark.skipif(os.geteuid() > 0, reason="needs root")


def call(module, flags, capsys):
    """main(get_args(flags)) as it is run, without the capabilities of root; exit code, stderr."""
    sys.argv = [f"{module.__name__}.py"]
    own, code = os.geteuid(), 0
    capsys.readouterr()
    try:
        if own == 0:
            os.seteuid(65534)
        module.main(module.get_args([str(flag) for flag in flags]))
    except SystemExit as end:
        code = end.code
    finally:
        os.seteuid(own)
    return code, capsys.readouterr().err


def refused(module, flags, capsys):
    """Its last sentence, where the run was refused as it should be."""
    code, text = call(module, flags, capsys)
    *_, last = text.strip().splitlines()
    assert code == 2 and last.startswith(f"{module.__name__}.py: error: ") and "Traceback" not in text, text
    return last


def few_weights(*_):
    """In place of a ResNet: 30 times as fast."""
    layers = (
        torch.nn.Conv2d(3, 8, 3, 2),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
    )
    return torch.nn.Sequential(*layers, torch.nn.Flatten()), 8


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(common, "resnet", few_weights)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder):
    """A finished run; also loads what later cannot be imported without root's rights."""
    out = tmp_path_factory.mktemp("runs") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "resnet", few_weights)
        assert train("--data", folder, "--recipe", "demo", "--epochs", "1", "--out", out) == 0
    return out


# ---------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_numbers_that_make_no_sense_are_refused_and_zeros_that_do_work(
    module, tmp_path, folder, fast, capsys, monkeypatch
):
    seen, parse_args = [], common.Parser.parse_args
    monkeypatch.setattr(common.Parser, "parse_args", lambda p, *a: seen.append(p) or parse_args(p, *a))
    out = tmp_path / "out"
    flags = [flag.format(out=out) for flag in SCRIPTS[module]]
    flags = [*(EVAL if module is eval_linear else QUICK), *flags]
    module.get_args(flags)
    zeros = []
    for action in (a for a in seen[-1]._actions if a.type):
        name, times = action.option_strings[-1], action.nargs if isinstance(action.nargs, int) else 1
        for value in ("-1", "nan", "1e30", "-inf", "many", ""):
            assert name in refused(module, [*flags, name, *[value] * times], capsys)
        with contextlib.suppress(SystemExit):
            module.get_args([*flags, name, *["0"] * times])
            zeros += [name, *["0"] * times]
    assert len(zeros) > 3 and "--workers" in zeros
    module.main(module.get_args([*flags, *zeros, "--data", str(folder), "--out", str(out)]))
    assert (out / "log.jsonl").exists() or (out / "results.jsonl").exists()


@pytest.fixture(scope="module")
def paths(tmp_path_factory, folder, trained):
    """Paths that nothing can be done with."""
    top = tmp_path_factory.mktemp("paths")
    for path in (top, *top.parents[:2], folder, trained.parent):
        path.chmod(0o755)
    (top / "empty").mkdir()
    (top / "file").write_bytes(b"\xff\xd8")
    for name in ("closed", "half"):
        shutil.copytree(folder, top / name)
    (top / "secret").write_text("a.jpg")
    for name in ("closed", "half/val/b", "secret"):
        (top / name).chmod(0)
    (top / "loop").symlink_to("loop")
    os.mkfifo(top / "pipe")
    yield top
    for name in ("closed", "half/val/b"):
        (top / name).chmod(0o755)


KINDS = [
    "missing",
    "empty",
    "file",
    "closed",
    "closed/below",
    "half",
    "secret",
    "loop",
    "pipe",
    "x" * 300,
    "",
]
FLAGS = [
    (hsic, "--data"),
    (hsic, "--out"),
    *((eval_linear, f"--{x}") for x in "data out backbone labels".split()),
]


@pytest.mark.parametrize("module, flag", FLAGS, ids=lambda x: x if isinstance(x, str) else x.__name__)
@root
def test_paths_that_cannot_be_used_are_refused_in_a_sentence(
    module, flag, paths, tmp_path, folder, fast, capsys
):
    given = {"--data": folder, "--out": tmp_path / "out", "--features": tmp_path / "kept"}
    tiny = QUICK
    if module is eval_linear:
        given["--backbone"], tiny = "random", [*EVAL, "--knn", "--k", "1"]
    else:
        del given["--features"]
    before = sorted(paths.iterdir())
    for kind in KINDS if flag != "--out" else [*KINDS[2:], os.fsdecode(b"\xff")]:
        path = paths / kind if kind else ""
        flags = [x for pair in {**given, flag: path}.items() for x in pair]
        said = refused(module, [*tiny, *flags], capsys)
        assert flag in said or "paths" in said, said
    assert sorted(paths.iterdir()) == before and not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------------- images


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side, data=b"\0" * 1000):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(side):
    """That declares `side` x `side` pixels."""
    data = bytearray(encoded(Image.new("RGB", (50, 50)), "JPEG"))
    at = data.find(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def in_a_process(function):
    """function() in a process of its own, which may die: its exit code, and its peak memory in MB."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024


def listed(folder):
    return common.list_split(folder, [])


def test_200_mutated_images_are_loaded_or_skipped(tmp_path):
    random.seed(0)
    image = Image.effect_noise((8, 6), 90).convert("RGB").resize((50, 40))
    sources = {
        "plain.jpg": encoded(image, "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "rgb.png": encoded(image, "PNG"),
        "sixteen.png": encoded(Image.new("I;16", (20, 20), 40000), "PNG"),
        "animated.gif": encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "two.webp": encoded(image, "WEBP"),
    }
    for i in range(200):
        name, data = random.choice([*sources.items()])
        data, place = bytearray(data), random.randrange(len(data))
        if i % 4 == 0:
            del data[place:]
        for _ in range((0, 1, 30, 10)[i % 4]):
            data[random.randrange(min(len(data), 1000 if i % 4 < 3 else 100))] ^= 1 << random.randrange(8)
        (tmp_path / f"{i:03} {name}").write_bytes(data)
    (tmp_path / "short.png").write_bytes(png(30, b"\0" * 10))  # torchvision's decoder dies of it
    files = listed(tmp_path)

    def read():
        found = [files.read(i) for i in range(201)]
        assert 20 < sum(image is None for image in found) < 180
        assert all(x is None or (x.dtype == torch.uint8 and x.shape[0] == 3 and x.ndim == 3) for x in found)

    assert in_a_process(read)[0] == 0


def test_huge_declared_sizes_take_no_memory(tmp_path):
    for side in (30_000, 10**6, 2**31 - 1):
        (tmp_path / f"{side}.png").write_bytes(png(side))
    for side in (20_000, 65_500):
        (tmp_path / f"{side}.jpg").write_bytes(jpeg(side))
    files = listed(tmp_path)

    def read():
        assert [files.read(i) for i in range(len(files.labels))] == [None] * len(files.labels)

    _, before = in_a_process(lambda: None)
    code, peak = in_a_process(read)
    assert code == 0 and peak < before + 100


def test_odd_names_loops_and_pipes(tmp_path, fast, capsys):
    data = make_folder(tmp_path / "data", 60, classes=("a", "b c"))
    names = [
        b" .jpg",
        b"new\nline.jpg",
        b"\xff\xfe.jpg",
        "ünï.jpg".encode(),
        b"-x.jpg",
        b"'\".jpg",
        b"%s{0}.jpg",
    ]
    for name in names:
        shutil.copy(data / "train" / "a" / "000.jpg", os.path.join(os.fsencode(data / "train" / "a"), name))
    (data / "train" / "a" / "loop").symlink_to(data / "train")
    (data / "train" / "a" / "self").symlink_to("self")
    flags = ["--data", data, "--recipe", "demo", "--epochs", "1", "--batch-size", "120", "--size", "12"]
    files = common.list_folder(data, tmp_path / "none").train
    assert {*names} <= {os.path.basename(os.fsencode(files.path(i))) for i in range(len(files.labels))}
    assert len(files.labels) == 127 and all(files.read(i) is not None for i in range(127))
    os.mkfifo(data / "train" / "b c" / "pipe.jpg")
    assert train(*flags, "--out", tmp_path / "out put", "--workers", "1") == 0
    assert "unreadable, skipped (1 so far)" in (said := capsys.readouterr().err) and "pipe.jpg" in said
    (data / "val" / "a" / "nowhere.jpg").symlink_to("nothing")
    assert common.list_folder(data, tmp_path / "none").test.read(60) is None
    assert len(eval_linear.fingerprint(common.list_folder(data, tmp_path / "none").test)) == 16


def test_fifty_thousand_files_are_listed_in_seconds(tmp_path):
    for i in range(20):
        (folder := tmp_path / str(i)).mkdir()
        for j in range(2500):
            os.mknod(f"{folder}/{j}.jpg")
    begun = time.monotonic()
    assert len(common.list_folder(tmp_path, tmp_path / "none").train.labels) == 50_000
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("fault", ["hangs", "dies"])
def test_a_worker_that_hangs_or_dies_ends_the_run_with_the_files_name(
    fault, tmp_path, big_folder, fast, capsys, monkeypatch
):
    read = common.Files.read

    def stalled(files, i):
        if files.path(i).endswith("train/a/007.jpg") and multiprocessing.parent_process():
            time.sleep(600) if fault == "hangs" else os._exit(9)
        return read(files, i)

    monkeypatch.setattr(common.Files, "read", stalled)
    monkeypatch.setattr(common, "STALL", 2)
    others = {*multiprocessing.active_children()}  # ranks of other tests
    assert train("--data", big_folder, "--recipe", "demo", "--out", tmp_path / "out", "--workers", "2") == 2
    said = next(line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert "train/a/007.jpg'" in said and ("timed out after 2 s" in said or "exited unexpectedly" in said)
    assert {*multiprocessing.active_children()} == others


# ------------------------------------------------------------------------------ checkpoints, disks


def small_run(out, step=0):
    """A run of a tiny network, without data, at `step`: for its checkpoints alone."""
    run = common.Run.__new__(common.Run)
    run.out, run.device, run.step, run.total, run.knn, run.pending = (
        out,
        torch.device("cpu"),
        step,
        9,
        [],
        None,
    )
    run.backbone = torch.nn.Linear(30, 30)
    torch.nn.init.constant_(run.backbone.weight, step)
    run.state = dict(net=run.backbone)
    out.mkdir(exist_ok=True)
    return run


class Malice:
    def __reduce__(self):
        return os.mkdir, ("taken",)


def damages(data):
    """Of a checkpoint: cut at 20 places, a bit flipped at 20, other things in its place."""
    random.seed(0)
    places = sorted(random.randrange(len(data)) for _ in range(20))
    yield from (data[:place] for place in places)
    for place in places:
        yield data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]
    yield from (pickle.dumps(Malice()), pickle.dumps(dict(step=8)), b"PK\5\6" + b"\0" * 18, b"x" * 1000)
    file = io.BytesIO()
    torch.save(dict(net=Malice(), step=8, knn=[], world=1), file)
    yield file.getvalue()


def test_a_damaged_or_malicious_checkpoint_falls_back_or_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (3, 6):
        small_run(tmp_path / "out", step).save()
    names = [tmp_path / "out" / name for name in ("checkpoint.pt", "checkpoint-previous.pt")]
    last, before = (path.read_bytes() for path in names)
    silent = 0
    for data in damages(last):
        for path, content in zip(names, (data, before), strict=True):
            path.write_bytes(content)
        (run := small_run(tmp_path / "out"))._resume()
        said = capsys.readouterr().err
        assert "checkpoint.pt is damaged" in said or run.step == 6, said  # a bit that nothing reads
        assert run.step == run.backbone.weight.unique().item() == (3 if "is damaged" in said else 6)
        silent += run.step == 6
        names[0].write_bytes(data)
        names[1].unlink(missing_ok=True)
        if run.step == 3:
            with pytest.raises(SystemExit, match="2"):
                small_run(tmp_path / "out")._resume()
            assert "nothing to resume from" in capsys.readouterr().err
    assert silent <= 10 and not (tmp_path / "taken").exists()


def test_a_malicious_or_damaged_backbone_is_refused(tmp_path, trained, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = (trained / "backbone.pth").read_bytes()
    contents = [*damages(data[:1000])][40:] + [data[: len(data) // 2], data[:2000] + b"xyz" + data[2003:]]
    for content in contents:
        (tmp_path / "backbone.pth").write_bytes(content)
        flags = [*EVAL, "--knn", "--backbone", tmp_path / "backbone.pth", "--out", tmp_path / "out"]
        with pytest.raises(SystemExit, match="2"):
            eval_linear.main(eval_linear.get_args([str(flag) for flag in flags]))
        assert "is no checkpoint of weights alone" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [tmp_path / "backbone.pth"]


def test_a_damaged_listing_of_files_is_named(tmp_path, folder, trained, fast, capsys):
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out" / "files.pt").write_bytes(b"x")
    flags = ["--data", folder, "--recipe", "demo", "--epochs", "1", "--out", tmp_path / "out"]
    assert train(*flags) == 2 and "files.pt is damaged" in capsys.readouterr().err


@pytest.fixture
def disk(tmp_path):
    """A disk of 64 MB."""
    (disk := tmp_path / "disk").mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk]).returncode:
        pytest.skip("a disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def remount(disk, option):
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def leave(room, run):
    """On the disk of the run, that many bytes; none behind the end of its log."""
    with open(run.out / "log.jsonl", "a") as file:
        file.write("\n" * (4096 - file.tell() % 4096))
    found = os.statvfs(run.out)
    remount(run.out.parent, f"size={(found.f_blocks - found.f_bfree) * found.f_frsize + room}")


def at_step(monkeypatch, step, action):
    """action(run) after the log of `step`, counted from 0."""
    log = common.Run.log

    def logged(self, *args):
        log(self, *args)
        if self.step == step:
            action(self)

    monkeypatch.setattr(common.Run, "log", logged)


WAYS = {
    "full when saving": (lambda run: leave(2**18, run), "cannot be saved"),
    "full when logging": (lambda run: leave(0, run), "log.jsonl cannot be written (No space left on device)"),
    "deleted": (
        lambda run: shutil.rmtree(run.out),
        "log.jsonl cannot be written (No such file or directory)",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_fails_under_a_run_is_named_and_the_checkpoint_kept(
    way, disk, folder, fast, capsys, monkeypatch
):
    action, part = WAYS[way]
    flags = ["--data", folder, "--recipe", "demo", "--hidden", "4096", "--out", disk / "out"]
    with monkeypatch.context() as patch:
        at_step(patch, 3, action)
        assert train(*flags) == 2
    said = capsys.readouterr().err
    assert part in said and "Traceback" not in said, said
    if way != "deleted":
        assert state_of(disk / "out")["step"] == 3
        remount(disk, "size=64m")
        assert train(*flags) == 0 and state_of(disk / "out")["step"] == 6
        remount(disk, "ro")
        assert train(*flags) == 2 and "is not a folder that can be written" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ numbers, ranks


def spoil_input(batches):
    for i, (xs, y) in enumerate(batches):
        yield [x * float("nan") if i == 4 else x for x in xs], y


@pytest.mark.parametrize("module", METHODS, ids=lambda module: module.__name__)
def test_nan_in_input_or_weights_is_named_within_its_step(
    module, tmp_path, folder, fast, capsys, monkeypatch
):
    tiny = [*QUICK, *METHODS[module], "--batch-size", "16", "--epochs", "2", "--data", str(folder)]
    batches, out = common.Run.batches, tmp_path / "out"

    def spoil(run):
        next(run.state["online"].parameters()).data[:] = float("nan")

    for step, spoiled in ((4, "input"), (4, "weights"), (5, "weights")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
            if spoiled == "input":
                patch.setattr(common.Run, "batches", lambda run: spoil_input(batches(run)))
            else:
                at_step(patch, step - 1 if step == 4 else 5, spoil)
            module.main(module.get_args([*tiny, "--out", str(out)]))
        said = capsys.readouterr().err
        assert ("step 6: " if step == 5 else "step 4: the loss is not finite (loss nan") in said, said
        assert state_of(out)["step"] == 3 and "the last checkpoint" in said
        shutil.rmtree(out)


def heard(step, flags):
    """run_until on a rank, and what it said."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "resnet", few_weights)
        return run_until(step, flags), said.getvalue()


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_saved_on_some_ranks_goes_on_with_others(first, then, on_ranks, tmp_path, folder, fast):
    flags = ["--data", folder, "--recipe", "demo", "--precision", "fp64", "--size", "12", "--out"]

    def go(world, step, out):
        if world > 1:
            return on_ranks(heard, 2, step, [*flags, out])[0]
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, step, lambda run: setattr(run, "stop", 15))
            with contextlib.redirect_stderr(io.StringIO()) as said:
                return train(*flags, out), said.getvalue()

    assert go(first, 2, tmp_path / "out")[0] == 0 and state_of(tmp_path / "out")["step"] == 3
    code, said = go(then, -1, tmp_path / "out")
    assert code == 0 and f"resuming at step 3 of 6, saved on {first} ranks, now {then}" in said
    assert go(first, -1, tmp_path / "whole")[0] == 0
    ended, whole = (state_of(tmp_path / name)["online"] for name in ("out", "whole"))
    assert not same(ended, whole)  # they do round differently
    norm = sum(float(t.double().square().sum()) for t in whole.values()) ** 0.5
    assert sum(float((ended[k] - whole[k]).square().sum()) for k in whole) ** 0.5 < 1e-9 * norm
    losses = [[r["loss"] for r in read_log(tmp_path / name) if "loss" in r] for name in ("out", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and len(losses[0]) == 6
