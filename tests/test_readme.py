"""The README's diffs: both sides run, the new side trains, and at most 12 lines are new."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxcache as jc

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
USERS, ITEMS, STEPS = 40_000, 500, 150


def diff_of(name: str) -> list[str]:
    found = re.search(rf"<!-- tested: {name} -->\n```diff\n(.*?)```", README, re.DOTALL)
    assert found, f"no tested diff for {name}"
    return found.group(1).splitlines()


def side(lines: list[str], sign: str) -> str:
    return "\n".join(line[1:] for line in lines if line[:1] in (sign, " ", ""))


def make_loader():
    random = np.random.default_rng(0)
    taste = {"user": random.normal(size=USERS), "item": random.normal(size=ITEMS)}
    for _ in range(STEPS):
        ids = {"user": random.integers(0, 40, 64) ** 2, "item": random.integers(0, ITEMS, 64)}
        label = (sum(taste[name][ids[name]] for name in ids) > 0).astype(np.float32)
        yield {"ids": ids, "label": label}


def cross_entropy(logits, batch):
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, batch["label"]))


class NNXTop(nnx.Module):
    def __init__(self, rngs, tables: bool):
        if tables:
            self.user, self.item = nnx.Embed(USERS, 16, rngs=rngs), nnx.Embed(ITEMS, 16, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, rows):
        return self.out(jnp.concatenate([rows["user"], rows["item"]], axis=-1))[:, 0]


def nnx_names(cached: bool) -> dict:
    def with_tables(model, batch):
        rows = {"user": model.user(batch["ids"]["user"]), "item": model.item(batch["ids"]["item"])}
        return cross_entropy(model(rows), batch)

    def with_rows(model, rows, batch):
        return cross_entropy(model(rows), batch)

    model = NNXTop(nnx.Rngs(0), tables=not cached)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    return {"nnx": nnx, "model": model, "optimizer": optimizer, "loss_fn": with_rows if cached else with_tables}


class LinenTop(nn.Module):
    tables: bool

    @nn.compact
    def __call__(self, rows):
        if self.tables:
            rows = {"user": nn.Embed(USERS, 16)(rows["user"]), "item": nn.Embed(ITEMS, 16)(rows["item"])}
        return nn.Dense(1)(jnp.concatenate([rows["user"], rows["item"]], axis=-1))[:, 0]


def linen_names(cached: bool) -> dict:
    model = LinenTop(tables=not cached)
    rows = {name: jnp.zeros((2, 16)) if cached else jnp.zeros(2, jnp.int32) for name in ("user", "item")}
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), rows), tx=optax.adam(0.01))

    def with_tables(params, batch):
        return cross_entropy(model.apply(params, batch["ids"]), batch)

    def with_rows(params, rows, batch):
        return cross_entropy(model.apply(params, rows), batch)

    return {"state": state, "loss_fn": with_rows if cached else with_tables}


@pytest.mark.parametrize(("name", "names"), [("nnx", nnx_names), ("linen", linen_names)])
def test_both_sides_of_the_diff_train(name, names):
    lines = diff_of(name)
    assert sum(line.startswith("+") and len(line) > 1 for line in lines) <= 12
    losses = {}
    for sign, cached in (("-", False), ("+", True)):
        scope = {"jax": jax, "jc": jc, "partial": partial, "USERS": USERS, "ITEMS": ITEMS, **names(cached)}
        scope["loader"] = recorded = Recorded(make_loader(), scope)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # Flax and optax rely on both
            exec(compile(side(lines, sign), f"README.md, {name}, {sign}", "exec"), scope)
        losses[sign] = (recorded.first_loss, float(scope["loss"]))
    for first, last in losses.values():
        assert abs(first - np.log(2)) < 0.35 and last < 0.6
    jc.check(scope["cache"], scope["store"])
    assert scope["store"].step == STEPS and scope["store"].rows_written > 0


class Recorded:
    """A loader that notes the loss of the script's first step."""

    def __init__(self, batches, scope):
        self._batches, self._scope, self.first_loss = batches, scope, 0.7

    def __iter__(self):
        for batch in self._batches:
            yield batch
            if "loss" in self._scope and self.first_loss == 0.7:
                self.first_loss = float(self._scope["loss"])
