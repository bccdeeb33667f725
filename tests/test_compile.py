"""--compile: one graph of the networks, the numbers of an uncompiled step, and what is refused."""

import signal

import pytest
import torch
from conftest import TINY, exit_code, read_log, same, signals, state_of, train
from torch._dynamo.utils import counters

import common
import hsic
import music

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["hsic", "corinfomax", "music", "mmd_sphere"])
def test_networks_of_all_views_are_one_graph(name):
    module = __import__(name)
    args = module.get_args(TINY)
    sides = (16, 16) if name == "corinfomax" else (16, 16, 9, 9)  # with local crops
    views = [torch.randn(2, 3, side, side) for side in sides]
    explained = torch._dynamo.explain(module.Online(args))(views)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def first_step(*flags):
    """Features h, and gradients of a function of h and z, in a first step of hsic.py's networks."""
    args = hsic.get_args([*TINY, "--views=simclr", "--size=20", *flags])
    torch.manual_seed(0)
    online = hsic.Online(args)
    train = common.draw_patterns(64, 0)
    _, xs, _ = next(common.batches(train, args, CPU, 0, 1))
    h, zs = common.parallel(online, args, CPU)(xs)
    (h.square().mean() + zs.square().mean()).backward()
    return [h.detach(), *[p.grad for p in online.parameters()]]


@pytest.mark.slow
def test_a_compiled_step_equals_an_eager_one():
    for value, compiled in zip(first_step(), first_step("--compile"), strict=True):
        assert (value - compiled).norm() < 1e-5 * (1 + value.norm())


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_bit_and_evaluates_eagerly(tmp_path):
    flags = ["--compile", "--subset=4", "--knn-every=1", "--views=simclr"]
    counters.clear()
    assert train(*flags, "--out", tmp_path / "one") == 0
    assert counters["stats"]["unique_graphs"] == 1 + 8  # the networks; crop, flip, jitter, gray, normalise
    with signals(signal.SIGTERM):
        assert train(*flags, "--out", tmp_path / "two") == 0
    assert len(read_log(tmp_path / "two")) == 1  # the evaluation before the first step
    assert train(*flags, "--out", tmp_path / "two") == 0
    assert same(*[state_of(tmp_path / out) for out in ("one", "two")])


@pytest.mark.parametrize(
    "name, value, message", [("PATH", "", "needs g++"), ("WORLD_SIZE", "2", "--compile on 2 ranks")]
)
def test_compile_is_refused_where_it_cannot_work(name, value, message, monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(name, value)
    args = music.get_args([*TINY, "--compile"])
    assert exit_code(lambda: common.start(args, __file__)) == 2
    assert message in capsys.readouterr().err
