"""Train a small sequence model with a product-key memory layer, whose table of values lives behind a cache of rows.

    python examples/memory_layer.py
    python examples/memory_layer.py --pairs 16384 --steps 3000

The layer is that of Lample et al. 2019 (arXiv 1907.05242), as in "Memory Layers at Scale" (Berges et al. 2024, arXiv
2412.09764): the model computes a query, the best of n * n keys for it are found through two sets of n sub-keys, and the
rows of these keys' values are read. The ids come out of the forward pass, so that no loader could know them: `jc.admit`
is called inside the loss. The task is to recall pairs, more than the model has room for without the memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxcache as jc
from common import (
    POLICIES,
    DenseState,
    DispatchProgress,
    add_on_demand_flags,
    positive_integer,
    write_summary,
)

TOKENS, LENGTH = 16, 4  # of a key: 65,536 different ones
PAIRS, VALUES = 8192, 256
WIDTH = 32
SUB_KEYS = 256  # of each half of a query: 65,536 rows of the table
HEADS, BEST = 2, 4  # of the memory layer: queries, and rows that each reads
MOST_SUB_KEYS = 46_340  # inside jit ids have 32 bits
STEPS = 1000
RATE, ROW_RATE = 1e-3, 0.3  # of adam for the dense part, and of row-wise adagrad for the memory


class Pairs(NamedTuple):
    """What is to be recalled: keys, int32 [N, LENGTH] tokens, all different, and the value of each, int32 [N]."""

    keys: jax.Array
    values: jax.Array


def make_pairs(number: int, seed: int) -> Pairs:
    """Draw keys and values at random: nothing about them can be learnt but the pairs themselves."""
    random = np.random.default_rng(seed)
    codes = random.choice(TOKENS**LENGTH, number, replace=False)
    keys = codes[:, None] // TOKENS ** np.arange(LENGTH) % TOKENS
    return Pairs(jnp.asarray(keys, jnp.int32), jnp.asarray(random.integers(VALUES, size=number), jnp.int32))


class MemoryModel(nnx.Module):
    """A transformer block that reads a key's tokens, a memory layer behind it, and logits for the value.

    The rows of the memory are looked up between its methods: `query` says which ones, `answer` takes them.

    Args:
        sub_keys: n, of each of the two sets of a head, for a table of n * n rows; 0 for a model without memory.
        rngs: source of the initial weights.
    """

    def __init__(self, sub_keys: int, *, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=WIDTH, decode=False, rngs=rngs)
        self.hidden_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.wide = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.narrow = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.logits = nnx.Linear(WIDTH, VALUES, rngs=rngs)
        if sub_keys:
            self.query_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.to_query = nnx.Linear(WIDTH, HEADS * 2 * WIDTH, rngs=rngs)
            self.half_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.sub_keys = nnx.Param(jax.random.normal(rngs.params(), (HEADS, 2, sub_keys, WIDTH)) / WIDTH**0.5)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """Map keys [B, LENGTH] to what is known at their last token, [B, WIDTH]."""
        hidden = self.embedding(tokens) + self.positions
        hidden = (hidden + self.attention(self.attention_norm(hidden)))[:, -1]
        return hidden + self.narrow(nnx.relu(self.wide(self.hidden_norm(hidden))))

    def query(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map hidden [B, WIDTH] to ids of rows and their weights, [B, HEADS * BEST] each.

        The score of key (i, j) is that of sub-key i for one half of the query plus that of j for the other. So the best
        of all n * n keys are among the combinations of the best of either n.
        """
        halves = self.half_norm(self.to_query(self.query_norm(hidden)).reshape(-1, HEADS, 2, WIDTH))
        scores = jnp.einsum("bhsd,hsnd->bhsn", halves, self.sub_keys[...])
        # Not one top_k whose result is parted: XLA would sort everything for it, on a CPU 20 times as slow.
        (one, i), (other, j) = (jax.lax.top_k(scores[:, :, half], BEST) for half in (0, 1))
        sums = one[:, :, :, None] + other[:, :, None, :]
        scores, pairs = jax.lax.top_k(sums.reshape(-1, HEADS, BEST * BEST), BEST)
        i, j = jnp.take_along_axis(i, pairs // BEST, axis=2), jnp.take_along_axis(j, pairs % BEST, axis=2)
        ids = i * self.sub_keys.shape[2] + j
        return ids.reshape(-1, HEADS * BEST), nnx.softmax(scores).reshape(-1, HEADS * BEST)

    def answer(self, hidden: jax.Array, weights: jax.Array | None = None, rows: jax.Array | None = None) -> jax.Array:
        """Map hidden [B, WIDTH] and what was read, weights [B, R] and rows [B, R, WIDTH], to logits [B, VALUES]."""
        if rows is not None:
            hidden = hidden + jnp.einsum("br,brd->bd", weights, rows)
        return self.logits(hidden)


def cross_entropy(logits: jax.Array, values: jax.Array) -> jax.Array:
    """Return the mean loss [] of logits [B, VALUES] for values [B]."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, values))


def draw(pairs: Pairs, key: jax.Array, batch_size: int) -> Pairs:
    """Draw the pairs of a step, on the device."""
    chosen = jax.random.randint(key, (batch_size,), 0, len(pairs.values))
    return Pairs(pairs.keys[chosen], pairs.values[chosen])


def in_batches(keys: jax.Array, batch_size: int) -> jax.Array:
    """Return keys [N, LENGTH] in batches, int32 [batches, B, LENGTH]; the last one starts over."""
    batches = -(-len(keys) // batch_size)
    return jnp.resize(keys, (batches, batch_size, LENGTH))


def accuracy(logits: jax.Array, pairs: Pairs) -> float:
    """Return the share of pairs that are recalled, from the logits of `in_batches`, [batches, B, VALUES]."""
    best = np.argmax(np.asarray(logits).reshape(-1, VALUES), axis=1)[: len(pairs.values)]
    return float(np.mean(best == np.asarray(pairs.values)))


def train_plain(arguments: argparse.Namespace, pairs: Pairs, keys: jax.Array) -> float:
    """Train the model without memory, all steps in one dispatch, and return its accuracy."""
    definition, parameters = nnx.split(MemoryModel(0, rngs=nnx.Rngs(arguments.seed)))
    optimizer = optax.adam(RATE)

    def logits_of(parameters: nnx.State, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(definition, parameters)
        return model.answer(model.hidden(tokens))

    def loss_of(parameters: nnx.State, batch: Pairs) -> jax.Array:
        return cross_entropy(logits_of(parameters, batch.keys), batch.values)

    @jax.jit
    def train(state: DenseState, keys: jax.Array) -> DenseState:
        def step(state: DenseState, key: jax.Array) -> tuple[DenseState, None]:
            gradients = jax.grad(loss_of)(state.parameters, draw(pairs, key, arguments.batch_size))
            return stepped(optimizer, state, gradients), None

        return jax.lax.scan(step, state, keys)[0]

    state = train(DenseState(parameters, optimizer.init(parameters)), keys[:-1])
    logits = jax.lax.map(partial(logits_of, state.parameters), in_batches(pairs.keys, arguments.batch_size))
    return accuracy(logits, pairs)


def stepped(optimizer: optax.GradientTransformation, state: DenseState, gradients: nnx.State) -> DenseState:
    """Return the state after an update of the dense parameters."""
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state)
    return DenseState(optax.apply_updates(state.parameters, updates), optimizer_state)


def train_with_memory(arguments: argparse.Namespace, pairs: Pairs, keys: jax.Array) -> tuple[float, dict[str, Any]]:
    """Train the model with memory, and return its accuracy and the figures of the run."""
    batch_size, rows = arguments.batch_size, arguments.sub_keys**2
    store = jc.HostStore(
        {"memory": jc.Table(rows, WIDTH, initializer=jc.normal(0.02))},
        jc.rowwise_adagrad(ROW_RATE),
        seed=arguments.seed,
    )
    definition, parameters = nnx.split(MemoryModel(arguments.sub_keys, rngs=nnx.Rngs(arguments.seed)))
    optimizer = optax.adam(RATE)

    def loss_of(
        parameters: nnx.State, zeros: dict[str, jax.Array], cache: jc.CacheState, batch: Pairs, later: Pairs
    ) -> tuple[jax.Array, tuple[jc.CacheState, jc.Plan]]:
        model = nnx.merge(definition, parameters)
        hidden = model.hidden(batch.keys)
        ids, weights = model.query(hidden)
        cache, plan = jc.admit(cache, store, {"memory": ids})
        if arguments.prefetch:  # a guess, by the parameters before this step: whatever it is, the result is the same
            cache = jc.prefetch(cache, store, {"memory": model.query(model.hidden(later.keys))[0]})
        rows = jc.tap(jc.lookup(cache, plan), zeros)
        return cross_entropy(model.answer(hidden, weights, rows["memory"]), batch.values), (cache, plan)

    @partial(jax.jit, donate_argnums=(0, 1))
    def train(
        cache: jc.CacheState, state: DenseState, keys: jax.Array
    ) -> tuple[tuple[jc.CacheState, DenseState], jax.Array]:
        def step(carry, keys):
            cache, state = carry
            batch, later = (draw(pairs, key, batch_size) for key in keys)
            # The rows are looked up inside the loss: their gradient is that of zeros which `tap` ties to them.
            zeros = {"memory": jnp.zeros((batch_size, HEADS * BEST, WIDTH))}
            value_and_grad = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
            (loss, (cache, plan)), (gradients, row_gradients) = value_and_grad(
                state.parameters, zeros, cache, batch, later
            )
            return (jc.update(cache, plan, row_gradients), stepped(optimizer, state, gradients)), loss

        return jax.lax.scan(step, (cache, state), (keys[:-1], keys[1:]))

    @partial(jax.jit, donate_argnums=0)
    def test(cache: jc.CacheState, state: DenseState, batches: jax.Array) -> tuple[jc.CacheState, jax.Array]:
        def step(cache, tokens):
            model = nnx.merge(definition, state.parameters)
            hidden = model.hidden(tokens)
            ids, weights = model.query(hidden)
            cache, plan = jc.admit(cache, store, {"memory": ids})
            logits = model.answer(hidden, weights, jc.lookup(cache, plan)["memory"])
            return jc.release(cache), logits  # a step that trains nothing

        return jax.lax.scan(step, cache, batches)

    state = DenseState(parameters, optimizer.init(parameters))
    progress = DispatchProgress(store)
    with store:
        cache = jc.init(store, arguments.slots, POLICIES[arguments.policy]())
        (slots,) = cache.slots
        print(f"{rows:,} rows in the memory's table, {slots:,} on the device: {rows / slots:.1f} times fewer")
        for first in range(0, arguments.steps, arguments.steps_per_dispatch):
            last = min(first + arguments.steps_per_dispatch, arguments.steps)
            (cache, state), losses = train(cache, state, keys[first : last + 1])
            losses = np.asarray(losses)  # waits for the dispatch
            store.raise_failure()  # too few slots, Ctrl-C: what cannot be raised inside the program
            progress.dispatch(cache, losses)
        cache, logits = test(cache, state, in_batches(pairs.keys, batch_size))
        cache = jc.flush(cache, store)  # the store now holds everything
    return accuracy(logits, pairs), progress.summary()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and test with memory and without, print the figures, and return them as `--summary` writes them."""
    pairs = make_pairs(arguments.pairs, arguments.seed)
    print(f"{arguments.pairs:,} keys of {LENGTH} tokens, each with one of {VALUES} values")
    # What a step draws depends on its number alone, and not on how many steps make a dispatch.
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(arguments.seed)))(jnp.arange(arguments.steps + 1))
    with_memory, figures = train_with_memory(arguments, pairs, keys)
    without = train_plain(arguments, pairs, keys)
    print(f"\n{figures['steps_per_second']:,.0f} steps/s, hit rate {figures['hit_rate']:.1%}")
    print(f"bytes on the device {figures['device_bytes']:,}, of the whole table {figures['table_bytes']:,}")
    print(f"pairs recalled with memory {with_memory:.1%}, by the same model without {without:.1%}")
    return {"with_memory": with_memory, "without": without, **figures}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--pairs", type=positive_integer, default=PAIRS, help="to be recalled, at most 65536 (%(default)s)")
    add("--sub-keys", type=positive_integer, default=SUB_KEYS, help="n, for a table of n * n rows (%(default)s)")
    add("--batch-size", type=positive_integer, default=256, help="pairs a step (%(default)s)")
    add_on_demand_flags(parser, slots="10%", steps=STEPS, steps_per_dispatch=100)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line `argv` and return the figures; bad arguments exit with one line."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.summary and not arguments.summary.parent.is_dir():
        parser.error(f"argument --summary: no folder {arguments.summary.parent}")
    if arguments.pairs > TOKENS**LENGTH:
        parser.error(f"argument --pairs: there are {TOKENS**LENGTH} keys of {LENGTH} tokens")
    if not BEST <= arguments.sub_keys <= MOST_SUB_KEYS:
        parser.error(f"argument --sub-keys: expected {BEST} to {MOST_SUB_KEYS}")
    try:
        summary = run(arguments)
    except jc.TooFewSlots as error:
        parser.error(f"argument --slots: {error}")
    if arguments.summary:
        write_summary(arguments.summary, summary)
    return summary


if __name__ == "__main__":
    main()
