"""The table of expected speeds on many GPUs: its arithmetic, by hand and as torch counts it."""

import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from hf_nanogpt.training.orthogonal import _iterate

sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_flops_of_muon_are_those_that_torch_counts(shape):
    with FlopCounterMode(display=False) as counter:
        _iterate(torch.randn(3, *shape))
    assert 3 * scaling.muon_flops(*shape) == counter.get_total_flops()


def test_gathering_takes_the_time_of_the_bytes_that_arrive():
    size = 8e9
    assert scaling.gather_seconds(size, 1) == 0
    assert scaling.gather_seconds(size, 2) == pytest.approx(4e9 / 450e9)
    assert scaling.gather_seconds(size, 8) == pytest.approx(7e9 / 450e9)
    # Of two machines, each lacks half: 4e9 bytes through 8 connections of 50e9 bytes/s.
    assert scaling.gather_seconds(size, 16) == pytest.approx(4e9 / 8 / 50e9 + 7e9 / 450e9)


def test_gpt2_small_has_its_weights_and_matrices():
    model = scaling.read_preset("gpt2")
    assert model.weights == 124_439_808  # of the published checkpoint
    assert model.shapes == {(768, 768): 48, (768, 3072): 24}
    assert model.in_matrices == 12 * 12 * 768**2


def test_one_gpu_waits_for_nothing_and_runs_at_the_assumed_share():
    model = scaling.read_preset("gpt2")
    times = scaling.step(model, 2**19, 1, 0.5, sharded=False)
    assert (times["network"], times["waiting"]) == (0, 0)
    speed = 2**19 / (times["compute"] + times["muon"])
    assert times["tokens_per_second"] == pytest.approx(speed)
    assert model.flops * 2**19 / times["compute"] == pytest.approx(0.5 * 989e12)


def test_ddp_waits_for_what_the_last_backward_pass_does_not_hide():
    model = scaling.read_preset("gpt2")
    times = scaling.step(model, 2**19, 512, 0.4, sharded=False)
    gradients = 2 * scaling.gather_seconds(4 * model.weights, 512)
    assert times["network"] == pytest.approx(gradients)
    assert times["waiting"] == pytest.approx(gradients - times["compute"] * 2 / 3)


def test_muon_of_eight_gpus_takes_an_eighth_of_the_products():
    model, rate = scaling.read_preset("gpt2"), 1e14
    alone = scaling.muon_seconds(model, 1, rate, sharded=False)
    shared = scaling.muon_seconds(model, 8, rate, sharded=False)
    gathered = 2 * model.in_matrices * 7 / 8 / 450e9
    assert shared == pytest.approx(alone / 8 + gathered)


def test_the_table_says_what_does_not_fit():
    rows = scaling.rows(0.4)
    assert len(rows) == 3 * (1 + 3 * 2)
    assert {tuple(row[:3]) for row in rows if row[3] == "does not fit"} == {
        ("qwen3-8b", "1", "alone"),
        *(("qwen3-8b", gpus, "DDP") for gpus in ("8", "64", "512")),
    }
