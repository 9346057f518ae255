"""Factorize a matrix of clicks, users x items, many steps in one dispatch, with both tables behind a cache of rows.

    python examples/matrix_factorization.py
    python examples/matrix_factorization.py --policy lfu --prefetch
    python examples/matrix_factorization.py --data clicks.npz

A user's and an item's vector are trained to have a large dot product where the user has clicked on the item, against
items drawn at random. Clicks and negatives are drawn on the device, inside a `jax.lax.scan` over steps. No loader knows
these ids, so there is nothing to look ahead at: `jc.admit` brings the rows in when the program asks for them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcache as jc
from common import (
    POLICIES,
    DispatchProgress,
    add_on_demand_flags,
    positive_integer,
    write_summary,
)
from jaxcache.traces import load_trace

USERS, ITEMS = 60_000, 20_000
STEPS = 2500
RATE, L2 = 0.2, 0.05
TEST_USERS = 4000

# The planted model: an item belongs to a genre, and a user has a taste, a distribution over genres.
GENRES = 64
TASTE_CONCENTRATION = 0.02  # of the Dirichlet distribution of tastes: most users like one to three genres
ANY_GENRE = 0.1  # share of the clicks that fall on any genre
POPULARITY_EXPONENT = 0.7
FEWEST_CLICKS, MEAN_CLICKS = 3, 15  # of a user

FEATURES = {"user": jc.Feature("user"), "item": jc.Feature("item"), "negative": jc.Feature("item")}


@dataclass(frozen=True, eq=False)
class Clicks:
    """Clicks of users on items, each pair once.

    Attributes:
        users, items: their numbers.
        train: int32 [N, 2], pairs of user and item.
        test: int32 [T, 2], one pair of each test user, which is not in `train`, by user.
        planted: the score that the clicks were drawn from, for users [B], as [B, items]; None for real ones.
    """

    users: int
    items: int
    train: np.ndarray
    test: np.ndarray
    planted: Callable[[np.ndarray], np.ndarray] | None = None


def planted_clicks(users: int, items: int, seed: int) -> Clicks:
    """Draw clicks from a planted matrix of low rank, P(item | user) = tastes @ genres."""
    random = np.random.default_rng(seed)
    number = min(GENRES, items)
    tastes = random.dirichlet(np.full(number, TASTE_CONCENTRATION), users)
    tastes = ((1 - ANY_GENRE) * tastes + ANY_GENRE / number).astype(np.float32)
    popularity = random.permutation(np.arange(1, items + 1) ** -POPULARITY_EXPONENT)
    genres = popularity * (np.arange(items) % number == np.arange(number)[:, None])
    genres = (genres / genres.sum(axis=1, keepdims=True)).astype(np.float32)

    # Some users click much more often than others.
    clicks = FEWEST_CLICKS + (MEAN_CLICKS - FEWEST_CLICKS) * random.pareto(2.0, users)
    user = random.permutation(np.repeat(np.arange(users), clicks.astype(np.int64)))
    genre = (random.random((len(user), 1)) > np.cumsum(tastes[:, :-1], axis=1)[user]).sum(axis=1)
    item = np.empty_like(user)
    for liked, shares in enumerate(genres):
        chosen = genre == liked
        item[chosen] = random.choice(items, np.count_nonzero(chosen), p=shares / shares.sum(dtype=np.float64))
    pairs = np.stack([user, item], axis=1)
    return split(pairs, users, items, random, lambda part: tastes[part] @ genres)


def read_clicks(path: Path, seed: int) -> Clicks:
    """Read clicks from a file of any format of `load_trace`: its first field is the user and its second the item.

    A `.npz` file with one field, the item, has the user in its array `session`.
    """
    trace = load_trace(path)
    columns = [ids[:, 0] for ids in trace.ids.values()]
    if len(columns) == 1 and path.suffix == ".npz":
        with np.load(path) as file:
            if "session" in file:
                columns.insert(0, np.unique(file["session"], return_inverse=True)[1])
    if len(columns) < 2:
        raise ValueError(f"{path}: expected two fields, user and item, or one and an array 'session'")
    users, items = (int(column.max()) + 1 for column in columns[:2])
    return split(np.stack(columns[:2], axis=1), users, items, np.random.default_rng(seed))


def split(
    pairs: np.ndarray,
    users: int,
    items: int,
    random: np.random.Generator,
    planted: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Clicks:
    """Hold out the last click of some of the users that have three or more; `pairs` [N, 2] are in order of time."""
    _, first = np.unique(pairs @ np.array([items, 1]), return_index=True)
    pairs = pairs[np.sort(first)].astype(np.int32)
    user = pairs[:, 0]
    last = np.zeros(users, np.int64)
    last[user] = np.arange(len(pairs))  # of several clicks of a user NumPy keeps the last
    candidates = np.flatnonzero(np.bincount(user, minlength=users) >= 3)
    if len(candidates) == 0:
        raise ValueError("no user has three clicks on different items, of which one could be held out")
    test = last[np.sort(random.permutation(candidates)[:TEST_USERS])]
    return Clicks(users, items, np.delete(pairs, test, axis=0), pairs[test], planted)


def make_train(store: jc.HostStore, clicks: Clicks, batch_size: int, prefetch: bool) -> Callable[..., Any]:
    """Return `train(cache, pairs, keys) -> (cache, losses)`, which makes a step for each key but the last.

    `pairs` are the training clicks, int32 [N, 2]. The last key is that of the step to come, for the prefetch.
    """

    def draw(pairs: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        """The ids of a step, [B] each: clicks, and as many items to tell them from."""
        of_click, of_item = jax.random.split(key)
        clicked = pairs[jax.random.randint(of_click, (batch_size,), 0, len(pairs))]
        negative = jax.random.randint(of_item, (batch_size,), 0, clicks.items)
        return {"user": clicked[:, 0], "item": clicked[:, 1], "negative": negative}

    def loss_of(rows: dict[str, jax.Array]) -> jax.Array:
        """Sampled softmax: the item clicked on against all negatives of the batch, which stand for all items."""
        clicked = jnp.sum(rows["user"] * rows["item"], axis=1)
        others = jax.nn.logsumexp(rows["user"] @ rows["negative"].T, axis=1) + np.log(clicks.items / batch_size)
        squares = sum(jnp.mean(jnp.sum(vectors**2, axis=1)) for vectors in rows.values())
        return jnp.mean(jnp.logaddexp(clicked, others) - clicked) + L2 * squares

    @partial(jax.jit, donate_argnums=0)
    def train(cache: jc.CacheState, pairs: jax.Array, keys: jax.Array) -> tuple[jc.CacheState, jax.Array]:
        def step(cache: jc.CacheState, keys: tuple[jax.Array, jax.Array]) -> tuple[jc.CacheState, jax.Array]:
            now, later = keys
            cache, plan = jc.admit(cache, store, draw(pairs, now), FEATURES)
            if prefetch:  # the host reads the rows of the next step while the device computes this one
                cache = jc.prefetch(cache, store, draw(pairs, later), FEATURES)
            loss, row_gradients = jax.value_and_grad(loss_of)(jc.lookup(cache, plan))
            return jc.update(cache, plan, row_gradients), loss

        return jax.lax.scan(step, cache, (keys[:-1], keys[1:]))

    return train


def recall(clicks: Clicks, k: int, scores_of: Callable[[np.ndarray], np.ndarray]) -> float:
    """Share of test users whose held-out item is among the k of highest score that they have not clicked in training.

    `scores_of` maps users [B] to scores [B, items].
    """
    found = 0
    for part in np.array_split(clicks.test, -(-len(clicks.test) // 512)):
        users, items = part.T
        scores = np.array(scores_of(users))
        seen = clicks.train[np.isin(clicks.train[:, 0], users)]
        target = scores[np.arange(len(part)), items][:, None]
        scores[np.searchsorted(users, seen[:, 0]), seen[:, 1]] = -np.inf
        above = ~(scores < target)  # and the item itself: a tie counts against it, and so does a NaN
        found += int(np.count_nonzero(above.sum(axis=1) <= k))
    return found / len(clicks.test)


def run(arguments: argparse.Namespace, clicks: Clicks) -> dict[str, Any]:
    """Train and test, print the figures, and return them as `--summary` writes them."""
    # Tables of one width share the slots: the one that needs them gets them.
    tables = {
        "user": jc.Table(clicks.users, arguments.dim, initializer=jc.normal(0.1)),
        "item": jc.Table(clicks.items, arguments.dim, initializer=jc.normal(0.1)),
    }
    store = jc.HostStore(tables, jc.rowwise_adagrad(RATE), seed=arguments.seed)
    rows = clicks.users + clicks.items
    print(f"{clicks.users:,} users, {clicks.items:,} items, {len(clicks.train):,} clicks to train on")
    train = make_train(store, clicks, arguments.batch_size, arguments.prefetch)
    pairs = jnp.asarray(clicks.train)
    # What a step draws depends on its number alone, and not on how many steps make a dispatch.
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(arguments.seed)))(jnp.arange(arguments.steps + 1))
    progress = DispatchProgress(store)
    with store:
        cache = jc.init(store, arguments.slots, POLICIES[arguments.policy]())
        (slots,) = cache.slots
        print(f"{rows:,} rows in the tables, {slots:,} on the device: {rows / slots:.1f} times fewer")
        for first in range(0, arguments.steps, arguments.steps_per_dispatch):
            last = min(first + arguments.steps_per_dispatch, arguments.steps)
            cache, losses = train(cache, pairs, keys[first : last + 1])
            losses = np.asarray(losses)  # waits for the dispatch
            store.raise_failure()  # too few slots, Ctrl-C: what cannot be raised inside the program
            progress.dispatch(cache, losses)
        cache = jc.flush(cache, store)  # the store now holds everything

    items = store.rows("item", np.arange(clicks.items))
    popularity = np.bincount(clicks.train[:, 1], minlength=clicks.items).astype(np.float32)
    recalls = {
        "recall": recall(clicks, arguments.k, lambda users: store.rows("user", users) @ items.T),
        "popularity": recall(clicks, arguments.k, lambda users: np.tile(popularity, (len(users), 1))),
        "ceiling": recall(clicks, arguments.k, clicks.planted) if clicks.planted else None,
    }
    summary = recalls | progress.summary()
    print(f"\n{summary['steps_per_second']:,.0f} steps/s, hit rate {summary['hit_rate']:.1%}")
    print(f"bytes on the device {summary['device_bytes']:,}, of the whole tables {summary['table_bytes']:,}")
    ceiling = f", ceiling (the planted factors' own) {recalls['ceiling']:.4f}" if clicks.planted else ""
    print(
        f"recall@{arguments.k} of {len(clicks.test):,} held-out clicks {recalls['recall']:.4f}, "
        f"of the most popular items {recalls['popularity']:.4f}{ceiling}"
    )
    return summary


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="clicks to train on instead of planted ones, see read_clicks")
    add("--users", type=positive_integer, default=USERS, help="users of the planted clicks (%(default)s)")
    add("--items", type=positive_integer, default=ITEMS, help="and items (%(default)s)")
    add("--dim", type=positive_integer, default=32, help="width of the vectors (%(default)s)")
    add("--batch-size", type=positive_integer, default=1024, help="clicks a step, and negatives (%(default)s)")
    add("--k", type=positive_integer, default=20, help="items that are recommended in the test (%(default)s)")
    add_on_demand_flags(parser, slots="10%", steps=STEPS, steps_per_dispatch=250)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line `argv` and return the figures; bad arguments exit with one line."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.summary and not arguments.summary.parent.is_dir():
        parser.error(f"argument --summary: no folder {arguments.summary.parent}")
    try:
        if arguments.data:
            clicks = read_clicks(arguments.data, arguments.seed)
        else:
            clicks = planted_clicks(arguments.users, arguments.items, arguments.seed)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(f"argument --data: {error}" if arguments.data else f"argument --users or --items: {error}")
    try:
        summary = run(arguments, clicks)
    except jc.TooFewSlots as error:
        parser.error(f"argument --slots: {error}")
    if arguments.summary:
        write_summary(arguments.summary, summary)
    return summary


if __name__ == "__main__":
    main()
