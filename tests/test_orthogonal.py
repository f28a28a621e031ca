"""Muon's orthogonal matrices: compiled, and shared out between processes."""

import copy
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from children import forked, run_child, run_ranks
from conftest import tiny_model
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_nanogpt import MuonAdamW, NanoGPTTrainer, NanoGPTTrainingArguments
from hf_nanogpt.training import orthogonal

pytestmark = forked

SHAPES = [(48, 48)] * 5 + [(96, 32), (32, 96), (7, 13)] * 3 + [(1, 16)]
STEPS = 3


def train_matrices(shapes: list[tuple[int, int]], group: dist.ProcessGroup | None) -> list:
    """Step matrices along gradients that are the same in every process; return all that changed."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    groups = [{"params": params, "algorithm": "muon"}]
    optimizer = MuonAdamW(groups, lr=0.1, momentum_warmup=2, weight_decay=0.5, process_group=group)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in params] + [s["momentum_buffer"] for s in optimizer.state.values()]


def count_matrices() -> list[int]:
    """Return a list to which every later product adds how many matrices it takes."""
    counts, iterate = [], orthogonal._iterate

    def counting(matrices: torch.Tensor) -> torch.Tensor:
        counts.append(len(matrices))
        return iterate(matrices)

    orthogonal._iterate = counting
    return counts


def share_matrices(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    counts, results = count_matrices(), {}
    for name, shapes in (("many", SHAPES), ("one", [(48, 48)])):
        group = orthogonal.find_sharing_group()
        results[name] = (train_matrices(shapes, group), sum(counts))
        counts.clear()
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_that_share_the_matrices_end_with_the_same_bits_as_one(ranks, tmp_path):
    for done in run_ranks(ranks, share_matrices, tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for name, shapes in (("many", SHAPES), ("one", [(48, 48)])):
        alone = train_matrices(shapes, None)
        for tensors, _ in (result[name] for result in found):
            for ours, first, expected in zip(tensors, found[0][name][0], alone, strict=True):
                assert ours.equal(first)
                torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
        counts = [count for _, count in (result[name] for result in found)]
        assert sum(counts) == len(shapes) * STEPS
        assert max(counts) - min(counts) <= STEPS


def create_optimizer(folder: Path) -> torch.optim.Optimizer:
    arguments = NanoGPTTrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", eval_strategy="no"
    )
    return NanoGPTTrainer(tiny_model("nano"), arguments).create_optimizer()


def check_optimizer(folder: Path) -> None:
    optimizer = create_optimizer(folder)
    assert optimizer.process_group is dist.group.WORLD
    # A copy, as some tools make, works alone.
    assert copy.deepcopy(optimizer).process_group is None
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_trainer_shares_the_matrices_under_ddp(tmp_path):
    for done in run_ranks(2, check_optimizer, tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]


def test_the_trainer_of_one_process_shares_with_nobody(tmp_path):
    assert create_optimizer(tmp_path).process_group is None


def find_group_size(ranks: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    group = orthogonal.find_sharing_group()
    print(group.size() if group else 1)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "size"), [(1, 1), (6, 6), (9, 1), (12, 4), (64, 8)])
def test_of_many_processes_eight_neighbours_share(ranks, size):
    assert run_child(find_group_size, ranks).stdout.split() == [str(size)]


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 24, 24), (4, 32, 8), (4, 8, 32)])
def test_the_iterations_compile_to_one_graph_that_gives_the_same_matrices(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(
        orthogonal._iterate, backend="aot_eager", fullgraph=True, dynamic=False
    )
    torch.testing.assert_close(compiled(matrices), orthogonal._iterate(matrices), rtol=0, atol=1e-5)


def run_without_a_compiler() -> None:
    matrices = torch.randn(4, 24, 24)
    for _ in range(2):
        assert orthogonal._run_compiled(matrices).equal(orthogonal._iterate(matrices))
    assert orthogonal._compiled is orthogonal._iterate


@pytest.mark.slow
def test_without_a_compiler_muon_says_so_once_and_goes_on(tmp_path):
    missing = {"PATH": str(tmp_path), "CXX": "none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = run_child(run_without_a_compiler, env=os.environ | missing)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Muon is slower than it could be: torch.compile failed (") == 1
