"""Workers in processes of their own do together what threads do in the other tests."""

import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist

from attention.training.ranks import DistributedRanks

WORLD = 3


def _meet(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=WORLD)
    ranks = DistributedRanks()
    assert (ranks.rank, ranks.world) == (rank, WORLD)
    assert ranks.gather("") == [""] * WORLD
    assert ranks.gather("x" * rank + "ü") == ["ü", "xü", "xxü"]
    tensors = [torch.full((2, 3), float(rank + 1)), torch.tensor([10.0 * rank]), torch.ones(4)[::2]]
    ranks.sum(tensors)
    assert [tensor.flatten().tolist() for tensor in tensors] == [[6.0] * 6, [30.0], [3.0, 3.0]]
    given = [torch.tensor([float(rank)]), torch.full((2, 4), float(10 * rank))[:, ::2], torch.full((3,), float(-rank))]
    ranks.broadcast(given, 2)
    assert [tensor.flatten().tolist() for tensor in given] == [[2.0], [20.0] * 4, [-2.0] * 3]
    ranks.broadcast(given[:1], 0)
    assert given[0].item() == 2.0
    dist.destroy_process_group()


def test_sums_broadcasts_and_messages_over_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_meet, args=(rank, str(tmp_path))) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * WORLD
