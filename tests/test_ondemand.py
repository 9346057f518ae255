"""On-demand mode: what `admit` accepts, which rows it keeps, and everything that goes around it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcache as jc
from extent import examples
from jaxcache.traced_batches import TracedBatch
from on_demand import check_on_demand, check_residents, renewed

ROWS, DIM, SLOTS = 30, 2, 8
TABLES = {"user": jc.Table(ROWS, DIM, jc.uniform(0.5)), "item": jc.Table(ROWS, DIM, jc.uniform(0.5))}
AGAIN = {"again": jc.Feature("user")}


def make_store(optimizer=None) -> jc.HostStore:
    return jc.HostStore(TABLES, optax.sgd(0.25) if optimizer is None else optimizer, seed=1)


def int32(*values) -> np.ndarray:
    return np.array(values, np.int32)


def ones(cache, plan) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.ones_like, jc.lookup(cache, plan))


# What can be seen while tracing


def admitted(ids, cache=None, store=None, function=jc.admit, **arguments):
    store = make_store() if store is None else store
    cache = jc.init(store, SLOTS) if cache is None else cache
    return jax.eval_shape(lambda cache: function(cache, store, ids, **arguments), cache)


@pytest.mark.parametrize("function", [jc.admit, jc.prefetch])
@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        (np.zeros(3, np.int32), TypeError, "needs a mapping of feature names to ids, got ndarray"),
        ({}, TypeError, "needs a mapping of feature names to ids"),
        ({"user": np.zeros(3)}, TypeError, r"ids of feature 'user' are float64; ids must be integers \(ids.astype"),
        ({"user": np.array([True])}, TypeError, "ids of feature 'user' are bool"),
        ({"user": np.int32(3)}, ValueError, r"needs ids for each sample, \[B, ...\]; those of 'user' are a single"),
        ({"town": int32(3)}, KeyError, "no feature or table named 'town'"),
        (
            {"user": jc.Bags(int32(3), weights=np.ones((1, 1), np.float32))},
            ValueError,
            r"combiner",
        ),
        (
            {"bag": jc.Bags(np.zeros((2, 2), np.int32), weights=np.ones((2, 3), np.float32))},
            ValueError,
            r"the weights of feature 'bag' have shape \(2, 3\) and its ids \(2, 2\): give one weight an id",
        ),
        (
            {"bag": jc.Bags(np.zeros((2, 2), np.int32), int32(0, 1))},
            ValueError,
            r"feature 'bag' has ids of shape \(2, 2\) and offsets int32\[2\]: ragged ids are one axis \[N\]",
        ),
        (
            {"bag": jc.Bags(int32(1, 2), np.zeros(2))},
            ValueError,
            r"feature 'bag' has ids of shape \(2,\) and offsets float32\[2\]",
        ),
    ],
    ids=range(10),
)
def test_wrong_ids_are_errors_while_tracing(function, ids, error, text):
    with pytest.raises(error, match=text):
        admitted(ids, function=function, features={"bag": jc.Feature("user", "sum")})


@pytest.mark.parametrize("function", [jc.admit, jc.prefetch])
@pytest.mark.parametrize("name", ["unique_bound", "fetch_bound"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "3"])
def test_wrong_bounds_are_errors_while_tracing(function, name, value):
    text = rf"{function.__name__}\({name}={value!r}\): {name} must be a number of rows, at least 1"
    with pytest.raises(ValueError, match=text):
        admitted({"user": int32(1, 2)}, function=function, **{name: value})


def test_wrong_caches_and_stores_are_errors_while_tracing():
    store, ids = make_store(), {"user": int32(1)}
    with pytest.raises(ValueError, match=r"admit needs a cache for on-demand mode: make one with jc\.init"):
        admitted(ids, cache=jc.state.empty_cache(store, SLOTS))
    with pytest.raises(ValueError, match=r"jc\.on_demand\(cache, store\)"):
        jc.admit(3, store, ids)
    with pytest.raises(TypeError, match="admit needs the HostStore of the cache, got dict"):
        jc.admit(jc.init(store, SLOTS), TABLES, ids)
    with pytest.raises(ValueError, match="prefetch got a cache of other tables or optimizers"):
        jc.prefetch(jc.init(store, SLOTS), make_store(optax.adam(0.1)), ids)
    for function in (jc.flush, jc.on_demand):
        with pytest.raises(ValueError, match=f"{function.__name__} got a cache of other tables"):
            function(jc.init(store, SLOTS), make_store(optax.adam(0.1)))
        with pytest.raises(TypeError, match=f"{function.__name__} needs a CacheState such as init returns, got int"):
            function(3, store)
    with pytest.raises(ValueError, match=r"flush with the pipeline, ahead\.flush\(cache\)"):
        jc.flush(jc.state.empty_cache(store, SLOTS), store)


def test_init_says_what_it_cannot_do():
    store = make_store()
    with pytest.raises(ValueError, match="the store has 1 groups of tables"):
        jc.init(store, (3, 4))
    for policy, name in [(jc.scratchpipe(), "scratchpipe"), (jc.lookahead(), "lookahead"), ("lru", "str")]:
        with pytest.raises(ValueError, match=rf"got policy {name}: it has lru\(\), lfu\(\) and static\(counts\)"):
            jc.init(store, SLOTS, policy)
    large = jc.HostStore({"item": jc.Table(5, 2), "large": jc.Table(2**31, 2)}, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"table 'large' has 2,147,483,648 rows.*train it with LookAhead"):
        jc.init(large, 4)
    store.mark_behind()
    with pytest.raises(RuntimeError, match=r"a cache that was never flushed .* jc\.flush\(cache, store\)"):
        jc.init(store, SLOTS)


def test_the_largest_table_is_served_to_its_last_row():
    last = 2**31 - 2
    store = jc.HostStore({"large": jc.Table(2**31 - 1, DIM)}, optax.sgd(0.5))
    expected = store.rows("large", [last, 7])

    @jax.jit
    def step(cache):
        cache, plan = jc.admit(cache, store, {"large": int32(last, 7, last)})
        return jc.update(cache, plan, ones(cache, plan)), jc.lookup(cache, plan)

    cache, rows = step(jc.init(store, 4))
    np.testing.assert_array_equal(rows["large"], expected[[0, 1, 0]])
    cache = jc.flush(cache, store)
    check_on_demand(cache, store)
    np.testing.assert_array_equal(store.rows("large", [last, 7]), expected - np.array([[1.0], [0.5]], np.float32))


def test_vmap_over_ids_is_an_error():
    store = make_store()
    cache = jc.init(store, SLOTS)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cache)
    ids = jnp.zeros((2, 3), jnp.int32)
    for function in (jc.admit, jc.prefetch):
        for axes, arguments in [((None, 0), (cache, ids)), ((0, 0), (many, ids))]:
            mapped = jax.vmap(lambda cache, ids, function=function: function(cache, store, {"user": ids}), in_axes=axes)
            with pytest.raises(ValueError, match="under vmap, where there would be a cache for each of its entries"):
                jax.eval_shape(mapped, *arguments)
            with pytest.raises(ValueError, match="under vmap"):
                jax.eval_shape(jax.jit(mapped), *arguments)


@pytest.mark.parametrize("wrapped", [False, True])
def test_remat_is_an_error(wrapped):
    store = make_store()
    cache = jc.init(store, SLOTS)

    def loss(scale):
        new, plan = jc.admit(cache, store, {"user": int32(1, 2)})
        return jnp.sum(jc.lookup(new, plan)["user"] * scale)

    function = jax.jit(loss) if wrapped else loss
    with pytest.raises(ValueError, match=r"admit was called under jax.checkpoint \(remat\), which would run it twice"):
        jax.eval_shape(jax.grad(jax.checkpoint(function)), jnp.float32(1))
    with pytest.raises(ValueError, match=r"prefetch was called under jax\.checkpoint"):
        jax.eval_shape(jax.checkpoint(lambda x: (jc.prefetch(cache, store, {"user": int32(1)}), x)[1]), jnp.float32(1))
    if wrapped:  # a function that was traced before is none of ours to see, but JAX refuses it
        traced = jax.jit(loss)
        jax.eval_shape(traced, jnp.float32(1))
        with pytest.raises(NotImplementedError, match="Effects not supported"):
            jax.eval_shape(jax.grad(jax.checkpoint(traced)), jnp.float32(1))


def test_merge_and_tap_say_what_they_cannot_do():
    store = make_store()
    cache = jc.init(store, SLOTS)
    with pytest.raises(ValueError, match=r"merge got plans of the features \[\]: each needs a name of its own"):
        jc.merge(cache, [])
    _, plan = admitted({"user": int32(1)}, cache, store)
    with pytest.raises(ValueError, match=r"\['user', 'user'\]: each needs a name of its own"):
        jc.merge(cache, [plan, plan])
    with pytest.raises(ValueError, match=r"tap needs zeros of the shapes of the rows"):
        jc.tap({"user": jnp.ones((3, 2))}, {"user": jnp.ones((2, 3))})


# How ids are read

DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_of_every_dtype_are_read(dtype, ignores, on_device):
    if on_device and np.dtype(dtype).itemsize == 8:
        pytest.skip("JAX has no such arrays")
    tables = {"item": jc.Table(ROWS, DIM, out_of_range="ignore" if ignores else "error")}
    store = jc.HostStore(tables, optax.sgd(0.1))
    limits = np.iinfo(dtype)
    far = [2**31, 2**31 - 1, -(2**31), 2**32, 2**32 + 5, -(2**32) + 5, 2**40, -(2**40)]
    values = [0, 5, ROWS - 1, ROWS, ROWS + 1, -1, 100, 200, limits.min, limits.max, *far]
    values = [value for value in values if limits.min <= value <= limits.max]
    ids = np.array(values, dtype).reshape(-1, 1)
    for padding in (None, -1, 5, ROWS, 2**32 + 5, 300):
        feature = {"f": jc.Feature("item", "sum", padding)}
        given = jnp.asarray(ids) if on_device else ids
        (part,) = TracedBatch.read([rows.group for rows in store.groups], {"f": given}, feature, "admit").features
        present = [0 <= value < ROWS and value != padding for value in values]
        assert part.present.tolist() == present
        assert [i for i, there in zip(part.ids.tolist(), present, strict=True) if there] == [
            value for value, there in zip(values, present, strict=True) if there
        ]
        wrong = [value for value in values if not 0 <= value < ROWS and value != padding]
        number, first, broken = part.problems.tolist()
        assert (number, broken) == (0 if ignores else len(wrong), 0)
        if number and -(2**31) <= wrong[0] < 2**31:
            assert first == wrong[0]
        assert part.layout.shape == ids.shape and part.layout.combiner == "sum"


@pytest.mark.parametrize(
    "offsets", [[0, 2, 2, 5], [0, 0, 0], [0, 5], [0], [0, 2, 4], [0, 2, 1, 5], [1, 5], [0, 6], [5]]
)
def test_ragged_ids_are_read_up_to_the_last_offset(offsets):
    store = make_store()
    ids = np.array([3, 0, 4, 999, -5])
    (part,) = TracedBatch.read(
        [rows.group for rows in store.groups],
        {"f": jc.Bags(ids, np.array(offsets), np.arange(5.0))},
        {"f": jc.Feature("item", "sum", padding=0)},
        "admit",
    ).features
    sound = offsets[0] == 0 and offsets[-1] <= 5 and sorted(offsets) == offsets
    assert int(part.problems[2]) == (not sound)
    if sound:
        bags = [bag for bag, (a, b) in enumerate(pairwise(offsets)) for _ in range(a, b)]
        assert part.bags[: offsets[-1]].tolist() == bags and (part.bags[offsets[-1] :] >= len(offsets) - 1).all()
        assert part.present.tolist() == [n < offsets[-1] and ids[n] in (3, 4) for n in range(5)]
        assert int(part.problems[0]) == sum(ids[n] in (999, -5) for n in range(offsets[-1]))
    assert part.weights.tolist() == [0, 1, 2, 3, 4] and part.layout.bags == len(offsets) - 1


def test_features_keep_the_order_of_the_mapping_and_jit_sorts_it():
    store = make_store()
    cache = jc.init(store, SLOTS)
    ids = {"user": int32(1), "item": int32(2)}
    _, plan = admitted(ids, cache, store)
    assert [feature.name for feature in plan.features] == ["user", "item"]
    _, plan = jax.eval_shape(lambda cache, ids: jc.admit(cache, store, ids), cache, ids)
    assert [feature.name for feature in plan.features] == ["item", "user"]


def test_a_plan_is_what_its_docstring_says():
    """Unique rows in the order of their first lookups, features one behind the other; padding stands for nothing."""
    store = make_store()
    ids = {"f": np.array([[9, 4], [9, 0]]), "item": int32(7, 7)}
    cache, plan = jc.admit(jc.init(store, SLOTS), store, ids, {"f": jc.Feature("user", "sum", padding=0)})
    (part,) = plan.groups
    assert part.unique_slots.tolist() == [0, 1, 2, SLOTS, SLOTS, SLOTS] and part.inverse.tolist() == [0, 1, 0, 6, 2, 2]
    assert part.order.tolist() == [0, 2, 1, 4, 5, 3] and part.starts.tolist() == [0, 2, 3, 5, 5, 5, 5]
    assert int(plan.samples) == 2 and int(plan.step) == 0 and np.asarray(plan.mask).tolist() == [True, True]
    assert np.asarray(cache.groups[0].slot_table)[:4].tolist() == [[0, 0, 9], [0, 0, 4], [1, 0, 7], [-1, -1, -1]]
    rows = jc.lookup(cache, plan)
    user, item = store.groups[0].read(np.array([9, 4])).weights, store.groups[0].read(np.array([ROWS + 7])).weights
    np.testing.assert_array_equal(rows["f"], [user[0] + user[1], user[0]])
    np.testing.assert_array_equal(rows["item"], item[[0, 0]])


# Which rows stay: against a model of dicts and loops


class NaiveCache:
    """What on-demand mode keeps, row by row; slots are told by the cache itself, to break ties."""

    def __init__(self, policy: str, weights: dict):
        self.policy, self.weights = policy, weights
        self.last: dict = {}
        self.counts: dict = {}
        self.ranks: dict = {}
        self.admitted = self.evicted = self.pinned_after = self.fetched = 0

    def admit(self, rows, slot_of) -> None:
        wanted = dict.fromkeys(rows)
        missing = [row for row in wanted if row not in self.last]
        free = SLOTS - len(self.last)
        others = [row for row in self.last if row not in wanted and self.last[row] <= self.pinned_after]
        first = {"lru": lambda row: 0, "lfu": self.counts.get, "static": lambda row: self.ranks.get(row, 0)}[
            self.policy
        ]
        others.sort(key=lambda row: (first(row), self.last[row], slot_of[row]))
        victims = others[: max(0, len(missing) - free)]
        assert len(victims) == max(0, len(missing) - free)
        for row in victims:
            del self.last[row], self.counts[row]
            self.ranks.pop(row, None)
        self.counts.update(dict.fromkeys(missing, 0))
        self.admitted += 1
        self.last.update(dict.fromkeys(wanted, self.admitted))
        self.evicted += len(victims)
        self.fetched += len(missing)
        if self.policy == "lfu" and self.evicted >= 6 * SLOTS:
            self.evicted = 0
            self.counts = {row: count - count // 2 for row, count in self.counts.items()}

    def update(self, rows) -> None:
        for row, lookups in Counter(rows).items():
            self.counts[row] += lookups
            self.weights[row] = self.weights[row] - np.float32(0.25) * np.float32(lookups)
        self.pinned_after = self.admitted


MODEL_STORE = make_store()
STATIC = {name: np.arange(ROWS) % 5 * (np.arange(ROWS) > 24) for name in TABLES}
UPDATE, MERGE, RELEASE = range(3)


@partial(jax.jit, donate_argnums=0)
def model_step(cache, ids, again, kind):
    """An `admit`, and an update, another `admit` and an update of both, or neither."""
    cache, plan = jc.admit(cache, MODEL_STORE, ids, fetch_bound=2)

    def update(cache):
        return jc.update(cache, plan, ones(cache, plan))

    def update_both(cache):
        cache, other = jc.admit(cache, MODEL_STORE, again, AGAIN, fetch_bound=3)
        merged = jc.merge(cache, [plan, other])
        return jc.update(cache, merged, ones(cache, merged))

    return jax.lax.switch(kind, [update, update_both, jc.release], cache)


def slots_of(cache) -> dict:
    table = np.asarray(cache.groups[0].slot_table)[:, [0, 2]].tolist()
    return {tuple(row): slot for slot, row in enumerate(table) if row[0] != -1}


def check_against_model(policy: str, seed: int, steps: int, spread: int) -> None:
    random, store = np.random.default_rng(seed), renewed(MODEL_STORE, optax.sgd(0.25))
    weights = {(t, i): row for t, name in enumerate(TABLES) for i, row in enumerate(store.rows(name, np.arange(ROWS)))}
    model = NaiveCache(policy, weights)
    cache = jc.init(store, SLOTS, {"lru": jc.lru, "lfu": jc.lfu, "static": lambda: jc.static(STATIC)}[policy]())
    if policy == "static":  # the hottest rows, ties by key
        every = [(t, i) for t, name in enumerate(TABLES) for i in range(ROWS)]
        hottest = sorted(every, key=lambda row: -STATIC[list(TABLES)[row[0]]][row[1]])[:SLOTS]
        assert slots_of(cache) == {row: slot for slot, row in enumerate(hottest)}
        model.last, model.counts = dict.fromkeys(hottest, 0), dict.fromkeys(hottest, 0)
        model.ranks = {row: int(STATIC[list(TABLES)[row[0]]][row[1]]) for row in hottest}
    lookups = unique = 0
    for step in range(steps):
        ids = {name: (random.zipf(1.5, 3) % spread).astype(np.int32) for name in TABLES}
        again = {"again": random.integers(0, spread, 2).astype(np.int32)}
        kind = random.choice([UPDATE, UPDATE, MERGE, RELEASE])
        before = slots_of(cache)
        cache = model_step(cache, ids, again, kind)
        rows = [(t, i) for t, name in enumerate(TABLES) for i in ids[name].tolist()]
        model.admit(rows, before)
        lookups, unique = lookups + len(rows), unique + len(set(rows))
        if kind == MERGE:
            others = [(0, i) for i in again["again"].tolist()]
            model.admit(others, {row: slots_of(cache).get(row, before.get(row)) for row in model.last})
            lookups, unique = lookups + len(others), unique + len(set(others))
            rows += others
        if kind == RELEASE:
            model.pinned_after = model.admitted
        else:
            model.update(rows)
        slots = slots_of(cache)
        assert slots.keys() == model.last.keys()
        (state,), (residents,) = cache.groups, cache.on_demand.residents
        counts, stamps = np.asarray(state.counts), np.asarray(residents.stamps)
        assert {row: counts[slot] for row, slot in slots.items()} == model.counts
        assert {row: stamps[slot] for row, slot in slots.items()} == model.last
        if policy == "static":
            ranks = np.asarray(residents.ranks)
            assert {row: ranks[slot] for row, slot in slots.items()} == {row: model.ranks.get(row, 0) for row in slots}
        elif policy == "lfu":
            assert int(residents.evicted) == model.evicted
        if step % 20 == 0:
            cache = jc.flush(cache, store)
            check_on_demand(cache, store)
    check_residents(cache)
    report = jc.report(cache, store)
    assert (report.lookups, report.unique_rows, report.rows_fetched) == (lookups, unique, model.fetched)
    assert report.steps == model.admitted and report.policy == policy and f"policy {policy}" in str(report)
    cache = jc.flush(cache, store)
    check_on_demand(cache, store)
    found = {(t, i): row for t, name in enumerate(TABLES) for i, row in enumerate(store.rows(name, np.arange(ROWS)))}
    assert found.keys() == model.weights.keys()
    for row, expected in model.weights.items():
        np.testing.assert_array_equal(found[row], expected, str(row))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "lfu", "static"])
@pytest.mark.parametrize("spread", [12, ROWS])
def test_policies_against_dicts_and_loops(policy, spread):
    check_against_model(policy, 0, 80, spread)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lru", "lfu", "static"])
@settings(max_examples=examples(2, 10))
@given(seed=st.integers(0, 2**16), spread=st.sampled_from([9, 12, ROWS]))
def test_policies_against_dicts_and_loops_for_long(policy, seed, spread):
    check_against_model(policy, seed, 100, spread)


# Inside transformations


def sum_of_squares(rows) -> jax.Array:
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(rows))


@partial(jax.jit, donate_argnums=0)
def update(cache, plan):
    return jc.update(cache, plan, jax.grad(sum_of_squares)(jc.lookup(cache, plan)))


def plain(ids, steps: int) -> np.ndarray:
    """All rows of the two tables after steps of sgd on the sum of squares, with every row on the device."""
    store, batches = make_store(), [{"user": ids[step]} for step in range(steps)]

    with jc.LookAhead(store, batches, ids=lambda batch: batch, slots="100%") as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = update(ahead.exchange(cache, plan), plan)
        ahead.flush(cache)
    return store.rows("user", np.arange(ROWS))


SHARED = make_store()


def shared_store() -> jc.HostStore:
    """That of the programs below."""
    return renewed(SHARED, optax.sgd(0.25))


@partial(jax.jit, donate_argnums=0)
def train_step(cache, ids):
    return one_step(SHARED)(cache, ids)


@jax.jit
def admit(cache, ids):
    return jc.admit(cache, SHARED, {"user": ids})


FEW = 6
IDS = np.random.default_rng(3).integers(0, ROWS, (9, 4)).astype(np.int32)


def one_step(store):
    def step(cache, ids):
        cache, plan = jc.admit(cache, store, {"user": ids})
        return jc.update(cache, plan, jax.grad(sum_of_squares)(jc.lookup(cache, plan)))

    return step


def finished(cache, store) -> np.ndarray:
    cache = jc.flush(cache, store)
    check_on_demand(cache, store)
    return store.rows("user", np.arange(ROWS))


def test_a_while_loop_trains_until_it_has_enough():
    store = make_store()
    step = one_step(store)

    @partial(jax.jit, donate_argnums=0)
    def train(cache, ids):
        return jax.lax.while_loop(
            lambda state: state[0] < 7, lambda state: (state[0] + 1, step(state[1], ids[state[0]])), (0, cache)
        )[1]

    np.testing.assert_array_equal(finished(train(jc.init(store, 5), IDS), store), plain(IDS, 7))


def test_without_jit():
    store = make_store()
    cache = jc.init(store, 5)
    cache = one_step(store)(cache, IDS[0].astype(np.int64))
    np.testing.assert_array_equal(finished(cache, store), plain(IDS, 1))


def test_the_second_call_compiles_nothing_and_a_donated_cache_stays_in_place():
    store, before = shared_store(), train_step._cache_size()
    cache = jc.init(store, FEW)
    for ids in IDS[:5]:
        places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.groups[0].buffer)]
        cache = train_step(cache, ids)
        assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.groups[0].buffer)] == places
    cache = train_step(jc.on_demand(jc.flush(cache, store), store), IDS[5])
    cache = train_step(jc.release(cache), IDS[6])
    np.testing.assert_array_equal(finished(cache, store), plain(IDS, 7))
    cache = train_step(jc.init(store, FEW), IDS[7])
    assert int(cache.step) == 8 and train_step._cache_size() <= before + 1


def test_ids_computed_inside_the_loss():
    """The cache comes out of the differentiated function beside the loss, and gradients of rows by way of zeros."""
    store = make_store()
    choices = np.random.default_rng(4).normal(size=(6, 4, ROWS)).astype(np.float32)

    def loss(weight, zeros, cache, scores):
        ids = jnp.argmax(scores * weight, axis=-1).astype(jnp.int32)
        cache, plan = jc.admit(cache, store, {"user": ids})
        rows = jc.tap(jc.lookup(cache, plan), zeros)
        return sum_of_squares(rows) * weight, (cache, plan)

    @partial(jax.jit, donate_argnums=0)
    def train(cache, choices):
        def step(carry, scores):
            cache, weight = carry
            zeros = {"user": jnp.zeros((4, DIM))}
            (_, (cache, plan)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
                weight, zeros, cache, scores
            )
            return (jc.update(cache, plan, gradients[1]), weight), gradients[0]

        return jax.lax.scan(step, (cache, jnp.float32(1)), choices)

    (cache, _), of_weight = train(jc.init(store, 4), choices)
    np.testing.assert_array_equal(finished(cache, store), plain(choices.argmax(axis=-1), 6))
    first = make_store().rows("user", choices[0].argmax(axis=-1))
    np.testing.assert_allclose(of_weight[0], np.sum(first.astype(np.float64) ** 2), rtol=1e-6)


def test_what_goes_through_tap_is_as_it_was():
    rows = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}
    zeros = jax.tree.map(jnp.zeros_like, rows)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), jc.tap(rows, zeros), rows))
    gradient = jax.grad(lambda zeros, rows: sum_of_squares(jc.tap(rows, zeros)), argnums=0)(zeros, rows)
    assert jax.tree.all(jax.tree.map(lambda g, row: (g == 2 * row).all(), gradient, rows))


def test_a_row_of_two_plans_is_updated_once_with_the_sum_of_its_gradients():
    """With adagrad two updates would not be one of the sum. A third feature pools the same table in ragged bags."""
    features = {"first": jc.Feature("user"), "second": jc.Feature("user"), "bags": jc.Feature("user", "mean")}
    random = np.random.default_rng(5)
    batches = [
        {
            "first": random.integers(0, 6, 3).astype(np.int32),
            "second": random.integers(0, 6, (3, 2)).astype(np.int32),
            "bags": (random.integers(0, 6, 5).astype(np.int32), int32(0, 2, 2, 5), random.random(5, np.float32)),
        }
        for _ in range(6)
    ]

    def as_ids(batch):
        return {"first": batch["first"], "second": batch["second"], "bags": jc.Bags(*batch["bags"])}

    whole = make_store(optax.adagrad(0.3))
    with jc.LookAhead(whole, batches, ids=as_ids, features=features, slots="100%") as ahead:
        cache = ahead.start()
        for _, plan in ahead:
            cache = update(ahead.exchange(cache, plan), plan)
        ahead.flush(cache)

    store = make_store(optax.adagrad(0.3))

    @partial(jax.jit, donate_argnums=0)
    def step(cache, batch):
        plans = []
        for name, ids in as_ids(batch).items():
            cache, plan = jc.admit(cache, store, {name: ids}, features, fetch_bound=2)
            plans.append(plan)
        separate = {name: rows for plan in plans for name, rows in jc.lookup(cache, plan).items()}
        merged = jc.merge(cache, plans)
        rows = jc.lookup(cache, merged)
        return jc.update(cache, merged, jax.grad(sum_of_squares)(rows)), rows, separate

    cache = jc.init(store, 6)
    for batch in batches:
        cache, rows, separate = step(cache, batch)
        jax.tree.map(np.testing.assert_array_equal, rows, separate)
    np.testing.assert_allclose(finished(cache, store), whole.rows("user", np.arange(ROWS)), rtol=1e-6)


@pytest.mark.parametrize(("bound", "sizes"), [(1, [1, 1, 1, 1]), (3, [3, 1])])
def test_a_callback_moves_as_many_rows_as_fetch_bound_says(bound, sizes):
    store, seen = make_store(), []
    read = store.groups[0].read
    store.groups[0].read = lambda keys, size=None: (seen.append((len(keys), size)), read(keys, size))[1]
    jc.admit(jc.init(store, FEW), store, {"user": int32(4, 5, 4, 6, 7)}, fetch_bound=bound)
    store.raise_failure()
    assert seen == [(size, bound) for size in sizes]


def test_released_rows_may_go_and_their_plan_has_none():
    store = shared_store()
    cache, plan = admit(jc.init(store, FEW), int32(1, 2, 3, 4))
    cache = jc.release(cache)
    assert np.isnan(jc.lookup(cache, plan)["user"]).all()
    cache, plan = admit(cache, int32(5, 6, 7, 8))
    np.testing.assert_array_equal(jc.lookup(cache, plan)["user"], store.groups[0].read(np.arange(5, 9)).weights)
    cache = jc.flush(jc.release(cache), store)
    check_on_demand(cache, store)
    assert store.step == 0 and store.rows_written == 0
    store.raise_failure()


def test_flush_between_admit_and_update_saves_what_was_before_the_step():
    store = shared_store()
    cache, plan = admit(train_step(jc.init(store, FEW), IDS[0]), IDS[1])
    cache = jc.flush(cache, store)
    np.testing.assert_array_equal(store.groups[0].read(np.arange(ROWS)).weights, plain(IDS, 1))
    assert store.step == 1
    with pytest.raises(RuntimeError, match=r"jc\.flush\(cache, store\)"):
        store.rows("user", [0])
    np.testing.assert_array_equal(finished(update(cache, plan), store), plain(IDS, 2))


def test_nothing_of_the_buffers_size_is_copied():
    """From the compiled program's own account: the buffer is aliased, and temporaries are those of searches alone."""
    slots, dim = 2**17, 128
    store = jc.HostStore({"user": jc.Table(10**6, dim)}, jc.rowwise_adagrad(0.1))

    def train(cache, ids):
        def step(cache, ids):
            cache, plan = jc.admit(cache, store, {"user": ids})
            cache = jc.prefetch(cache, store, {"user": ids + 1})
            return jc.update(cache, plan, jc.lookup(cache, plan)), None

        return jax.lax.scan(step, cache, ids)[0]

    cache = jax.eval_shape(lambda: jc.init(store, slots))
    ids = jax.ShapeDtypeStruct((5, 64), jnp.int32)
    figures = jax.jit(train, donate_argnums=0).lower(cache, ids).compile().memory_analysis()
    buffer = slots * (dim + 1) * 4
    assert figures.alias_size_in_bytes >= buffer and figures.temp_size_in_bytes < buffer // 4
    assert figures.output_size_in_bytes - figures.alias_size_in_bytes < 2**20


# From one mode to the other


def ahead_steps(store, cache, batches):
    with jc.LookAhead(store, [{"user": ids} for ids in batches], ids=lambda batch: batch, slots=FEW) as ahead:
        cache = ahead.start(cache)
        for _, plan in ahead:
            cache = update(ahead.exchange(cache, plan), plan)
        return ahead.flush(cache)


def test_look_ahead_on_demand_and_back():
    store = shared_store()
    cache = jc.on_demand(ahead_steps(store, None, IDS[:2]), store)
    check_on_demand(cache, store)
    for ids in IDS[2:4]:
        cache = train_step(cache, ids)
    cache = ahead_steps(store, jc.flush(cache, store), IDS[4:6])
    cache = jc.on_demand(cache, store)
    for ids in IDS[6:8]:
        cache = train_step(cache, ids)
    np.testing.assert_array_equal(finished(cache, store), plain(IDS, 8))


def test_another_policy_for_a_cache_that_was_not_flushed():
    store = shared_store()
    cache = train_step(jc.init(store, FEW), IDS[0])
    cache = train_step(jc.on_demand(cache, store, jc.lfu()), IDS[1])
    cache = train_step(jc.on_demand(cache, store), IDS[2])
    np.testing.assert_array_equal(finished(cache, store), plain(IDS, 3))


def test_stale_caches_are_refused_by_either_mode():
    store = shared_store()
    ahead = ahead_steps(store, None, IDS[:2])
    kept = jax.tree.map(jnp.array, ahead)
    warm = jc.on_demand(ahead, store)
    old = jax.tree.map(jnp.array, warm)
    cache = jc.flush(train_step(warm, IDS[2]), store)
    for call in (jc.flush, jc.on_demand):
        with pytest.raises(RuntimeError, match=f"{call.__name__} got a cache that was donated to an earlier call"):
            call(warm, store)
    for stale in (old, kept):
        with pytest.raises(ValueError, match="on_demand got a stale cache, of step 2"):
            jc.on_demand(stale, store)
    with pytest.raises(RuntimeError, match="flush got a stale cache, of step 2"):
        jc.flush(old, store)
    with jc.LookAhead(store, [], ids=lambda batch: batch, slots=FEW) as pipeline:
        with pytest.raises(ValueError, match="is of step 2 and the newest one of step 3"):
            pipeline.start(kept)
        with pytest.raises(ValueError, match="comes from on-demand mode and is not the newest"):
            pipeline.start(old)
        pipeline.start()
    for stale in (cache, old):  # a pipeline had the store
        with pytest.raises(RuntimeError, match=r"flush got a stale cache.*init a new one"):
            jc.flush(stale, store)
        with pytest.raises(ValueError, match=r"on_demand got a stale cache.*init a new one"):
            jc.on_demand(stale, store)
    cache = train_step(jc.init(store, FEW), IDS[2])
    with jc.LookAhead(store, [], ids=lambda batch: batch, slots=FEW) as pipeline:
        for given in (None, cache):
            with pytest.raises(RuntimeError, match="holds newer rows than the store"):
                pipeline.start(given)


def test_a_look_ahead_cache_is_stale_once_another_was_trained_on_demand():
    """Before the other is flushed, too: it would be trained from rows that are not the newest."""
    store = shared_store()
    kept = jax.tree.map(jnp.array, ahead_steps(store, None, IDS[:2]))
    cache = train_step(jc.init(store, FEW), IDS[2])
    with pytest.raises(ValueError, match="on_demand got a stale cache"):
        jc.on_demand(kept, store)
    pipeline = jc.LookAhead(store, [], ids=lambda batch: batch, slots=FEW)
    with pipeline, pytest.raises(ValueError, match="the newest one is that of on-demand mode"):
        pipeline.start(kept)
    assert jc.flush(cache, store) and store.step == 3


def test_rows_loaded_before_an_evaluation_on_demand_make_a_look_ahead_cache_stale():
    store = shared_store()
    kept = jax.tree.map(jnp.array, ahead_steps(store, None, IDS[:2]))
    store.load("user", np.full((ROWS, DIM), 3.0))
    cache, _ = admit(jc.init(store, FEW), IDS[0])
    jc.flush(jc.release(cache), store)
    pipeline = jc.LookAhead(store, [], ids=lambda batch: batch, slots=FEW)
    with pipeline, pytest.raises(ValueError, match="rows were loaded into the store"):
        pipeline.start(kept)


def test_an_open_look_ahead_has_the_store_to_itself():
    store = shared_store()
    cache = jc.init(store, FEW)
    with jc.LookAhead(store, [], ids=lambda batch: batch, slots=FEW):
        marked, _ = admit(cache, IDS[0])
        assert int(marked.fault) == jc.CacheState.ADMIT_FAILED
        with pytest.raises(RuntimeError, match="the store serves an open LookAhead"):
            store.raise_failure()
    assert not store.behind


def test_a_plan_of_a_released_step_fits_no_later_one():
    store = shared_store()
    cache, old = admit(jc.init(store, FEW), IDS[0])
    cache, new = admit(jc.release(cache), IDS[1])
    assert np.isnan(jc.lookup(cache, old)["user"]).all() and not np.isnan(jc.lookup(cache, new)["user"]).any()


def test_features_of_one_admit_may_have_different_numbers_of_ids():
    store = shared_store()
    cache, plan = jc.admit(jc.init(store, FEW), store, {"user": int32(3), "item": int32(3, 4)})
    assert {name: rows.shape for name, rows in jc.lookup(cache, plan).items()} == {"user": (1, DIM), "item": (2, DIM)}


def test_slots_may_be_shares_or_mappings():
    tables = {"user": jc.Table(1000, 4), "item": jc.Table(500, 4), "city": jc.Table(40, 2)}
    store = jc.HostStore(tables, optax.sgd(0.1))
    assert jc.init(store, "10%").slots == (150, 4)
    assert jc.init(store, {"item": 20, "city": "50%"}).slots == (20, 20)
    for slots in (2.5, "many", {"user": 3}, [3, 0], [True, 2], [3], 3):
        with pytest.raises(ValueError, match=r"init\(slots="):
            jc.init(store, slots)


def test_loading_rows_makes_caches_stale():
    store = shared_store()
    cache, _ = admit(jc.init(store, FEW), IDS[0])
    cache = jc.flush(jc.release(cache), store)
    store.load("user", np.full((ROWS, DIM), 3.0))
    marked, plan = admit(cache, IDS[0])
    assert int(marked.fault) == jc.CacheState.ADMIT_FAILED and np.isnan(jc.lookup(marked, plan)["user"]).all()
    with pytest.raises(RuntimeError, match=r"admit got a cache that is not the newest.*after rows were loaded"):
        store.raise_failure()
    for call in (jc.flush, jc.on_demand):
        with pytest.raises((RuntimeError, ValueError), match="stale cache"):
            call(cache, store)
    cache, plan = admit(jc.init(store, FEW), IDS[0])
    assert (np.asarray(jc.lookup(cache, plan)["user"]) == 3).all()
    store.raise_failure()


def test_a_state_from_before_the_last_flush_is_refused():
    """One update would be lost: that which was made from the same state, and saved."""
    store = shared_store()
    cache, plan = admit(jc.init(store, FEW), IDS[0])
    older = jc.release(cache)
    rows = jc.lookup(cache, plan)
    jc.flush(jc.update(cache, plan, rows), store)
    marked, _ = admit(older, IDS[1])
    assert int(marked.fault) == jc.CacheState.ADMIT_FAILED
    with pytest.raises(RuntimeError, match="admit got a cache that is not the newest, of step 0"):
        store.raise_failure()


def test_flush_leaves_a_cache_where_it_is():
    store = shared_store()
    for cache in (jc.init(store, FEW), jax.device_put(jc.init(store, FEW), jax.devices()[0])):
        flushed = jc.flush(cache, store)
        assert [leaf.committed for leaf in jax.tree.leaves(flushed)] == [
            leaf.committed for leaf in jax.tree.leaves(cache)
        ]


@pytest.mark.parametrize(
    "ids", [np.array([2**32 + 5, 1]), np.array([1, 3_000_000_000], np.uint32), np.array([2**63 - 1, 0])]
)
def test_ids_beyond_32_bits_are_not_reported_as_others(ids):
    store = shared_store()
    cache, _ = jc.admit(jc.init(store, FEW), store, {"user": ids})
    assert int(cache.fault) == jc.CacheState.ADMIT_FAILED
    with pytest.raises(ValueError, match="feature 'user' has id 2147483647 or beyond; ids must lie in 0 to"):
        store.raise_failure()


def test_with_64_bit_types_the_same_is_trained():
    def trained():
        store = jc.HostStore({"user": jc.Table(30, 4)}, optax.sgd(0.1))

        @jax.jit
        def step(cache, ids):
            cache, plan = jc.admit(cache, store, {"user": ids})
            cache = jc.prefetch(cache, store, {"user": ids})
            return jc.update(cache, plan, jc.lookup(cache, plan))

        cache = jc.init(store, 5)
        for ids in ([3, 4, 3], [5, 6, 7], [3, 8, 9]):
            cache = step(cache, np.array(ids))
        jc.check(jc.flush(cache, store), store)
        return store.rows("user", np.arange(30))

    expected = trained()
    jax.config.update("jax_enable_x64", True)
    try:
        np.testing.assert_array_equal(trained(), expected)
    finally:
        jax.config.update("jax_enable_x64", False)
