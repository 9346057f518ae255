"""The whole train step and the exchange as programs for a GPU, made on a machine without one.

They are lowered for CUDA where JAX's plugin is installed, and compiled for an H100 where all of CUDA is, and
`JAXCACHE_TARGET_CONFIG` is the path of a description of that device as XLA writes it.
"""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcache as jc
from jaxcache import kernels
from jaxcache.features import FeatureLayout
from jaxcache.optimizers import Rows
from jaxcache.state import Counters, GroupExchange, GroupPlan, empty_cache, exchange_group

SLOTS, UNIQUE, SAMPLES, LENGTH, WORDS = 1_000_000, 4096, 512, 20, 3000
CHOICES = {
    "xla": kernels.XLA,
    "triton": kernels.Choice(("triton",), ("triton",), ("triton",)),
    "mosaic": kernels.Choice(("mosaic", "triton"), ("mosaic", "triton"), ("triton",)),
}
GROUPS = {
    "float32, dim 128, adam": (jc.Table(10**9, 128), optax.adam(0.1)),
    "float32, dim 100, rowwise adagrad": (jc.Table(10**9, 100), jc.rowwise_adagrad(0.1)),
    "bfloat16, dim 64, stochastic, adagrad": (
        jc.Table(10**9, 64, dtype=jnp.bfloat16, rounding="stochastic"),
        optax.adagrad(0.1),
    ),
    "float16, dim 32, master copy, momentum": (
        jc.Table(10**9, 32, dtype=jnp.float16, master_copy=True),
        optax.sgd(0.1, 0.9),
    ),
    "float32, dim 16, a chain": (jc.Table(10**9, 16), optax.chain(optax.clip(1.0), optax.sgd(0.1))),
}


def shape(dimensions=(), dtype=jnp.int32):
    return jax.ShapeDtypeStruct(dimensions, dtype)


@cache
def programs(group: str, choice: str):
    """The step and the exchange: functions with their arguments."""
    table, optimizer = GROUPS[group]
    store = jc.HostStore({"table": table}, optimizer=optimizer)
    cache = jax.eval_shape(lambda: empty_cache(store, SLOTS, backends=CHOICES[choice]))
    features = (
        FeatureLayout("history", 0, "mean", (SAMPLES, LENGTH)),
        FeatureLayout("words", 0, "mean", (WORDS,), bags=SAMPLES, weighted=True),
        FeatureLayout("city", 0, None, (SAMPLES,)),
    )
    lookups = sum(feature.lookups for feature in features)
    part = GroupPlan(shape((UNIQUE,)), shape((lookups,)), shape((lookups,)), shape((UNIQUE + 1,)))
    plan = jc.Plan(
        groups=(part,),
        weights={"words": shape((WORDS,), jnp.float32)},
        bags={"words": shape((WORDS,))},
        offsets={"words": shape((SAMPLES + 1,))},
        step=shape(),
        samples=shape(),
        features=features,
    )

    def step(cache, plan, dense):
        rows = jc.lookup(cache, plan)

        def loss(dense, rows):
            x = rows["history"] + rows["words"] + rows["city"]
            return jnp.mean(jnp.where(plan.mask, jnp.tanh(x @ dense), 0.0))

        value, (slope, gradients) = jax.value_and_grad(loss, argnums=(0, 1))(dense, rows)
        return jc.update(cache, plan, gradients), dense - slope, value

    (state,) = cache.groups
    rows = Rows(*jax.tree.map(lambda leaf: shape((UNIQUE, *leaf.shape[1:]), leaf.dtype), tuple(state.buffer)))
    exchange = GroupExchange(shape((UNIQUE,)), shape((UNIQUE, 3)), rows)
    counters = Counters(shape(), shape(), shape())
    dense = shape((table.dim,), jnp.float32)
    return {
        "step": (step, (cache, plan, dense), cache),
        "exchange": (
            partial(exchange_group, choice=CHOICES[choice]),
            (state.contents, counters, exchange, shape()),
            state.contents,
        ),
    }


def missing(choice: str) -> str | None:
    """Why programs with these kernels cannot be made here."""
    if choice == "xla":
        return None
    if jax.__version_info__ < (0, 11):
        return "kernels for GPUs need JAX 0.11"
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return "JAX's CUDA plugin is not installed"
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed"
    return None


choices = pytest.mark.parametrize("choice", CHOICES)
groups = pytest.mark.parametrize("group", GROUPS)
both = pytest.mark.parametrize("program", ["step", "exchange"])


# Lowered


@both
@pytest.mark.parametrize(
    "choice, device",
    [("xla", "NVIDIA H100"), ("triton", "NVIDIA A100"), ("triton", "NVIDIA H100"), ("mosaic", "NVIDIA H100")],
)
@groups
def test_step_and_exchange_are_lowered_for_cuda(group, choice, device, program):
    if reason := missing(choice):
        pytest.skip(reason)
    function, arguments, donated = programs(group, choice)[program]
    with on_device(device):
        lowered = jax.jit(function, donate_argnums=0).trace(*arguments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    calls = set(re.findall(r"stablehlo\.custom_call @([\w.$]+)", text))
    expected = {"xla": [], "triton": ["triton"], "mosaic": ["triton" if program == "exchange" else "mosaic"]}[choice]
    assert [backend for backend in ("triton", "mosaic") if any(backend in call for call in calls)] == expected
    # Only XLA adds where it scatters, which on a GPU has no fixed order.
    scatters = re.findall(r'"stablehlo\.scatter".*?\}\) :', text, re.DOTALL)
    assert any("stablehlo.add" in scatter for scatter in scatters) == (choice == "xla" and program == "step")
    # Every array of the cache is given back in its own place.
    assert text.count("tf.aliasing_output") >= len(jax.tree.leaves(donated))


def on_device(kind: str):
    """Kernels are lowered for a device of that kind, as JAX names it."""
    device = jax.sharding.AbstractDevice(kind, None, "gpu")
    auto = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), auto, abstract_device=device))


# Compiled


@pytest.fixture(scope="module")
def h100():
    """A sharding on an H100 that is not there."""
    path = os.environ.get("JAXCACHE_TARGET_CONFIG")
    if path is None:
        pytest.skip("JAXCACHE_TARGET_CONFIG does not name a description of the device")
    if "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" not in os.environ:
        pytest.skip("JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 is not set")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=Path(path).read_text(), topology="1x1x1")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


@pytest.mark.slow
@both
@choices
@groups
def test_nothing_of_the_size_of_the_cache_is_copied_on_an_h100(group, choice, program, h100, record_property):
    if reason := missing(choice):
        pytest.skip(reason)
    function, arguments, donated = programs(group, choice)[program]
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=h100), arguments)
    with on_device("NVIDIA H100"):
        figures = jax.jit(function, donate_argnums=0).lower(*placed).compile().memory_analysis()
    size = sum(np.prod(leaf.shape, dtype=int) * leaf.dtype.itemsize for leaf in jax.tree.leaves(donated))
    print(
        f"{program}, {group}, {choice}: MiB in the cache {size / 2**20:.1f}, "
        f"in place {figures.alias_size_in_bytes / 2**20:.1f}, temporary {figures.temp_size_in_bytes / 2**20:.1f}"
    )
    assert figures.alias_size_in_bytes >= 0.999 * size
    row, lookups = 4 * GROUPS[group][0].dim, SAMPLES * (LENGTH + 1) + WORDS
    if choice == "xla":
        assert figures.temp_size_in_bytes < 5 * row * (UNIQUE + lookups) < size / 2
    else:
        # Summed gradients, where the optimizer is not built in, sums of blocks, and what is of samples; two integers of
        # each lookup, but never a row of each.
        most = row * (UNIQUE + 6 * SAMPLES + lookups // 32) + 8 * lookups
        assert figures.temp_size_in_bytes < most < row * lookups / 1.4
