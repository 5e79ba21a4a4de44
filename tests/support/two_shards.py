"""Run by `test_sharded_rows.py`: heads over a weight in two shards, against the same weight in one piece.

python two_shards.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_mpo.functional.sharded_rows import gather_rows
from tests.support.builders import seeded
from tests.support.head_options import full_logprobs, full_ranks, full_top_k, support_logprobs

B, T, D, V, K = 3, 4, 8, 13, 5


def problem(rank: int) -> tuple[torch.Tensor, ...]:
    """Return hidden states, tokens and supports of one process: the second has no token at all in its mask."""
    g = seeded(10 + rank)
    hidden = torch.randn(B, T, D, generator=g, dtype=torch.float64)
    support = torch.rand(B, T, V, generator=g).argsort(-1)[..., :K].int()
    tokens = support.gather(2, torch.randint(K, (B, T, 1), generator=g)).squeeze(2).long()
    return hidden, tokens, support


def weights(vocabulary: int = V) -> tuple[torch.Tensor, torch.Tensor]:
    g = seeded(3)
    return (
        torch.randn(vocabulary, D, generator=g, dtype=torch.float64),
        torch.randn(vocabulary, generator=g, dtype=torch.float64),
    )


def run(kind: str, rank: int, weight, bias, empty: bool = False) -> list[torch.Tensor]:
    """Return values and the gradient of the hidden states; weight and bias get theirs in place."""
    hidden, tokens, support = problem(rank)
    hidden.requires_grad_()
    mask = torch.full((B, T), not (empty and rank == 1))
    options = {"temperature": 0.7, "bias_V": bias, "mask_BT": mask, "entropy_grad": True}
    if kind == "support":
        logprobs, entropy = support_logprobs(hidden, weight, tokens, support, **options)
    else:
        logprobs, entropy = full_logprobs(hidden, weight, tokens, **options)
    (logprobs.sin().sum() + entropy.sum()).backward()
    return [logprobs.detach(), entropy.detach(), hidden.grad]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found: dict = {}
    for trained in (True, False):
        for kind in ("support", "full"):
            for empty in (False, True):
                parts = [
                    distribute_tensor(w, mesh, [Shard(0)]).requires_grad_(trained)
                    for w in weights()
                ]
                values = run(kind, rank, *parts, empty=empty)
                grads = [part.grad.full_tensor() for part in parts] if trained else []
                found[kind, trained, empty] = values + grads
    weight = distribute_tensor(weights()[0], mesh, [Shard(0)])
    hidden, tokens, _ = problem(rank)
    found["ranks"] = [full_ranks(hidden, weight, tokens), full_top_k(hidden, weight, 3)]
    found["rows"] = [gather_rows(weight, torch.tensor([[2, 7, 12], [7]][rank]))]
    few = distribute_tensor(weights(1)[0], mesh, [Shard(0)])  # one row: the second process has none
    found["one"] = [gather_rows(few, torch.tensor([0]))]
    found["refused"] = []
    for placement in (Shard(1), Replicate()):
        try:
            gather_rows(distribute_tensor(weights()[0], mesh, [placement]), torch.tensor([0]))
        except ValueError as error:
            found["refused"].append(str(error))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()  # no process leaves while another still talks to it
    dist.destroy_process_group()
    os._exit(
        0
    )  # an interpreter that shuts down on a busy machine now and then trips over gloo's threads


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
