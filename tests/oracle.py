"""What the library must agree with, written with dicts, loops and plain optax. Imports nothing of the library."""

from collections import deque
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np

ABSENT = -1
NEVER = float("inf")


class PlannerOracle:
    """Look-ahead planning of batches, each a list of hashable rows, by a dict of slots and scans of the window.

    Args:
        slots: capacity.
        memory: for how many batches `wait_for` remembers evictions.
        resident: pairs of row and slot at the start, least recently used first; the slots are the first ones.
    """

    def __init__(self, slots, memory=0, resident=()):
        self.slots, self.memory = slots, memory
        self.window = deque()
        self.slot_of = {}
        self.listed = {}  # when a resident row took its next use: when it was planned, or when that use was observed
        self.evicted = {}  # row -> the latest batch that evicted it
        self.planned = self.clock = 0
        for row, slot in resident:
            self.slot_of[row] = slot
            self.list(row)

    def list(self, row):
        self.clock += 1
        self.listed[row] = self.clock

    def next_use(self, row):
        return next((place for place, (_, rows) in enumerate(self.window) if row in rows), NEVER)

    def observe(self, batch):
        rows = dict.fromkeys(batch)  # in order of first occurrence
        for row in rows:
            if row in self.slot_of and self.next_use(row) == NEVER:
                self.list(row)
        self.window.append((batch, rows))

    def plan(self):
        """The decision on the oldest batch, as a dict of the planner's fields."""
        batch, wanted = self.window.popleft()
        rows = list(wanted)
        assert len(rows) <= self.slots
        missed = [place for place, row in enumerate(rows) if row not in self.slot_of]
        slots, victims, wait_for = [], [], ABSENT
        for place in missed:
            if len(self.slot_of) < self.slots:
                slot = len(self.slot_of)
            else:
                # Farthest next use first, never before all others; among equals, the one that was listed first.
                others = [row for row in self.slot_of if row not in wanted]
                victim = min(others, key=lambda row: (-self.next_use(row), self.listed[row]))
                slot = self.slot_of.pop(victim)
                self.evicted[victim] = self.planned
                victims.append(victim)
            self.slot_of[rows[place]] = slot
            slots.append(slot)
            if rows[place] in self.evicted and self.evicted[rows[place]] >= self.planned - self.memory:
                wait_for = max(wait_for, self.evicted[rows[place]])
        for row in rows:
            self.list(row)
        self.planned += 1
        return {
            "inverse": [rows.index(row) for row in batch],
            "occurrences": [batch.count(row) for row in rows],
            "unique_slots": [self.slot_of[row] for row in rows],
            "missed": missed,
            "fetched": [rows[place] for place in missed],
            "slots": slots,
            "victims": victims,
            "wait_for": wait_for,
        }


def fewest_fetches(batches, slots):
    """The fewest rows that any policy can move in for `batches`, by trying every set of rows to keep.

    A row is kept as long as there is room: it costs nothing.
    """
    cost = {frozenset(): 0}
    for batch in batches:
        needed, following = frozenset(batch), {}
        for resident, fetched in cost.items():
            fetched += len(needed - resident)
            spare = resident - needed
            for chosen in combinations(sorted(spare), min(len(spare), slots - len(needed))):
                kept = needed.union(chosen)
                following[kept] = min(fetched, following.get(kept, NEVER))
        cost = following
    return min(cost.values())


class PlainTable:
    """A table as one plain array, trained by plain optax with its usual promotions.

    Args:
        transformation: an optax transformation.
        weights: `float32[rows, dim]`.
    """

    def __init__(self, transformation, weights):
        self.transformation = transformation
        self.weights = jnp.asarray(weights)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            self.state = transformation.init(self.weights)

    def _is_row(self, leaf):
        return leaf.ndim > 0 and leaf.shape[0] == len(self.weights)

    def row_leaves(self):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(self.state) if self._is_row(leaf)]

    def scalars(self):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(self.state) if not self._is_row(leaf)]

    def update_touched(self, rows, gradients):
        """Optax on the distinct `rows` alone, which are handed to it as if they were the whole table."""
        weights = self.weights[rows]
        state = jax.tree.map(lambda leaf: leaf[rows] if self._is_row(leaf) else leaf, self.state)
        weights, state = self._apply(weights, state, gradients)
        self.weights = self.weights.at[rows].set(weights)
        self.state = jax.tree.map(
            lambda old, new: old.at[rows].set(new) if self._is_row(old) else new, self.state, state
        )

    def update_dense(self, ids, gradients):
        """Optax on the whole table, the gradients of equal ids summed and those of other rows zero."""
        summed = np.zeros(self.weights.shape, np.float32)
        for row, gradient in zip(ids, gradients, strict=True):
            summed[row] += gradient
        self.weights, self.state = self._apply(self.weights, self.state, summed)

    def _apply(self, weights, state, gradients):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            steps, state = self.transformation.update(jnp.asarray(gradients), state, weights)
            return weights + steps, state


class RowWiseAdagrad:
    """The definition in NumPy and double precision: s += mean(g**2), w -= rate * g / (sqrt(s) + eps)."""

    def __init__(self, weights, rate, eps=1e-8, initial_accumulator=0.0):
        self.weights = np.asarray(weights, np.float64).copy()
        self.accumulator = np.full(len(weights), float(initial_accumulator))
        self.rate, self.eps = rate, eps

    def update(self, rows, gradients):
        for row, gradient in zip(rows, np.asarray(gradients, np.float64), strict=True):
            self.accumulator[row] += sum(g * g for g in gradient) / len(gradient)
            for place, g in enumerate(gradient):
                self.weights[row, place] -= self.rate * g / (np.sqrt(self.accumulator[row]) + self.eps)
