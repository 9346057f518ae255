"""PyTorch's EmbeddingBag with sparse gradients on a GPU; a program of its own, that JAX is not in the process.

    python benchmarks/on_gpu/pytorch.py '{"tables": 8, "rows": 1000000, "dim": 32, "batch": 2048, "ids": 4, ...}'

Reads one JSON object, writes one: ms a step by optimizer. Ids come as NumPy arrays, as they do for the others.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    "adam": lambda parameters: torch.optim.SparseAdam(parameters, lr=0.05),
}


def main(given: dict) -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # [batches, tables, B, ids]; ids are pooled to their sum.
    ids = [torch.from_numpy(every.astype(np.int64)) for every in np.load(given["ids"])]
    found = {}
    for name in given["optimizers"]:
        until = time.time() + given["seconds"] / len(given["optimizers"])
        bags = [
            torch.nn.EmbeddingBag(
                given["rows"], given["dim"], mode="sum", sparse=True, device=device,
                _weight=torch.zeros(given["rows"], given["dim"], device=device),
            )
            for _ in range(given["tables"])
        ]  # fmt: skip
        optimizer = OPTIMIZERS[name]([bag.weight for bag in bags])

        def step(every: torch.Tensor, bags: list = bags, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            every = every.to(device, non_blocking=True)
            loss = sum(((1 - bag(of_table)) ** 2).mean() for bag, of_table in zip(bags, every, strict=True))
            loss.backward()
            optimizer.step()
            return loss.detach()

        def turn(number: int, step=step) -> float:
            start = time.perf_counter()
            for place in range(number):
                loss = step(ids[place % len(ids)])
            loss.item()  # waits
            return (time.perf_counter() - start) / number

        turn(3)
        once = turn(3)
        number = max(3, min(50, int((until - time.time()) / 6 / max(once, 1e-6))))
        times = []
        while len(times) < 5 and (time.time() < until or not times):
            times.append(turn(number))
        found[name] = {"ms": 1e3 * float(np.median(times)), "steps": number * len(times)}
        del bags, optimizer
    return {"version": torch.__version__, "device": str(device), "optimizers": found}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
