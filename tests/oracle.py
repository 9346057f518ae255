"""What the library must agree with, written with dicts, loops and plain optax. Imports nothing of the library."""

import math
from collections import Counter, OrderedDict, deque
from heapq import heappop, heappush
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np

ABSENT = -1
NEVER = float("inf")


class PlannerOracle:
    """Look-ahead planning of batches, each a list of hashable rows, with dicts, sets and scans of the window.

    Args:
        slots: capacity.
        order: how rows that no observed batch wants are ranked: "recency", "count", "rank" or "aged".
        counts: for "rank", lookups of each row in the data set.
        pinned: if given, all other rows pass through: they are fetched anew each time they are used.
        memory: for how many batches evictions are remembered.
        resident: triples of row, slot and lookups at the start, least recently used first; the slots are the first.
    """

    def __init__(self, slots, order="recency", counts=None, pinned=None, memory=0, resident=()):
        self.slots, self.order, self.counts, self.memory = slots, order, counts or {}, memory
        self.passes = pinned is not None
        self.window = deque()  # what is observed and not planned: of each batch the lookups of each row
        self.slot_of, self.last_use = {}, {}
        self.heat = {}  # for "count" and "aged"
        self.evicted = {}  # row -> the latest batch that evicted it
        self.planned = self.evictions = 0
        self.crowded = None  # the first plan for which the batches ahead held more rows than there were slots for
        for place, (row, slot, lookups) in enumerate(resident):
            self.slot_of[row], self.last_use[row], self.heat[row] = slot, (ABSENT, place), lookups
        self.pinned = set(self.slot_of) & set(pinned or ())

    def observe(self, batch):
        self.window.append(Counter(batch))  # whose keys are in order of first occurrence

    def next_use(self, row):
        return next((place for place, batch in enumerate(self.window) if row in batch), NEVER)

    def looks_far_enough(self):
        """The rule of window="auto": looking farther would change nothing, or little; or it is too early for that."""
        missing = len(set(self.window[0]) - set(self.slot_of))
        victims = missing - (self.slots - len(self.slot_of))
        ahead = set().union(*self.window)
        if victims <= 0:
            if self.crowded is None and len(ahead - set(self.slot_of)) > self.slots - len(self.slot_of):
                self.crowded = self.planned
            early = min(self.planned + 1, 64)
            opened = early if self.crowded is None else 64 + 16 * (self.planned - self.crowded)
            return len(self.window) >= opened or len(ahead) >= 4 * self.slots
        unwanted = sum(self.next_use(row) == NEVER for row in self.slot_of)
        return unwanted <= victims or len(ahead) >= 4 * self.slots

    def rank(self, row):
        if self.passes and row not in self.pinned:
            return ABSENT
        if self.order == "rank":
            return self.counts[row]
        if self.order == "count":
            return self.heat[row]
        return half_doublings(self.heat[row]) if self.order == "aged" else 0

    def retention(self, row):
        """What grows with the reasons to keep a row: a near next use; or, if none is seen, its rank and last use."""
        use = self.next_use(row)
        return (-use, self.rank(row), self.last_use[row]) if use == NEVER else (-use,)

    def plan(self, taken=None):
        """The decision on the oldest batch, as a dict of the planner's fields.

        Rows whose next uses are in one batch make equally good victims: `taken`, if given, are the victims to go on
        with, which must be as good as any.
        """
        for row, batch in list(self.evicted.items()):
            if batch < self.planned - self.memory:
                del self.evicted[row]
                if row not in self.slot_of and self.next_use(row) == NEVER:
                    self.heat.pop(row, None)
        lookups = self.window.popleft()
        rows = list(lookups)
        assert len(rows) <= self.slots
        missed = [row for row in rows if row not in self.slot_of]
        passing = [row for row in rows if self.passes and row in self.slot_of and row not in self.pinned]
        slots = list(range(len(self.slot_of), self.slots))[: len(missed)]  # those that are free come first

        others = sorted(set(self.slot_of) - set(rows), key=self.retention)
        victims = others[: len(missed) - len(slots)]
        if taken is not None:
            assert sorted(map(self.retention, taken[: len(victims)])) == list(map(self.retention, victims))
            assert len(set(taken)) == len(taken) and set(taken[: len(victims)]) <= set(others)
            victims = taken[: len(victims)]
        slots += [self.slot_of.pop(row) for row in victims] + [self.slot_of[row] for row in passing]
        wait_for = max([self.evicted.get(row, ABSENT) for row in missed] + [self.planned for _ in passing] + [ABSENT])
        for row in victims:
            self.evicted[row] = self.planned
            self.pinned.discard(row)
            if self.order == "count":
                del self.heat[row]
        self.slot_of.update(zip(missed + passing, slots, strict=True))

        weight = float32(2.0 ** (self.evictions / (6 * self.slots)))  # an "aged" use counts half after six turnovers
        for place, row in enumerate(rows):
            self.last_use[row] = (self.planned, place)
            self.heat[row] = float32(self.heat.get(row, 0) + (lookups[row] if self.order == "count" else weight))
        self.evictions += len(victims)
        self.planned += 1
        return {
            "unique_slots": [self.slot_of[row] for row in rows],
            "missed": [rows.index(row) for row in missed + passing],
            "fetched": missed + passing,
            "slots": slots,
            "victims": victims + passing,
            "wait_for": wait_for,
        }


def in_order(terms):
    """The sum over the first axis, one term after the other, from zero."""
    total = np.zeros(terms.shape[1:], terms.dtype)
    for term in terms:
        total = total + term
    return total


def tree_sum(terms, levels=2):
    """The sum over the first axis by the tree that all kernels follow: full blocks of 64, blocks of those, the rest."""
    blocks = len(terms) // 64
    if len(terms) <= 64 or not levels:
        return in_order(terms)
    sums = np.stack([in_order(terms[64 * block : 64 * (block + 1)]) for block in range(blocks)])
    return tree_sum(sums, levels - 1) + in_order(terms[64 * blocks :])


def float32(x):
    """`x` rounded to the 24 bits of a float32, whatever its exponent: planners rescale before theirs is too large."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def half_doublings(heat):
    """The level of `heat`, of which there are two a doubling: 1 and 1.49 share one, 1.5 and 1.99, 2 and 2.99, ..."""
    mantissa, exponent = math.frexp(heat)  # heat = mantissa * 2**exponent, 0.5 <= mantissa < 1
    return 2 * exponent + (mantissa >= 0.75) if heat else -NEVER


# How many rows well-known policies fetch, each in a few lines of its own. A batch's rows are all needed at once.


def lru_fetches(batches, slots):
    """The least recently used row goes first."""
    resident, fetched = OrderedDict(), 0
    for batch in batches:
        for row in dict.fromkeys(batch):
            fetched += row not in resident
            resident[row] = None
            resident.move_to_end(row)
        while len(resident) > slots:
            resident.popitem(last=False)
    return fetched


def lfu_fetches(batches, slots):
    """The row with the fewest lookups since it came in goes first, the least recently used one of several."""
    uses, queue, clock, fetched = {}, [], 0, 0  # `uses`: lookups and last use of the rows that are resident
    for batch in batches:
        needed = {row: (lookups, *uses.pop(row, (0, 0))) for row, lookups in Counter(batch).items()}
        while len(uses) + len(needed) > slots:
            *use, row = heappop(queue)
            if uses.get(row) == tuple(use):  # or else this use was not its last
                del uses[row]
        for row, (lookups, before, _) in needed.items():
            clock += 1
            fetched += before == 0
            uses[row] = (before + lookups, clock)
            heappush(queue, (*uses[row], row))
    return fetched


def min_fetches(batches, slots):
    """Belady's MIN, which knows the whole future: the row whose next use is farthest goes first."""
    batches, following, next_uses = list(map(set, batches)), {}, []
    for number, batch in reversed(list(enumerate(batches))):
        next_uses.append({row: following.get(row, NEVER) for row in batch})
        following.update(dict.fromkeys(batch, number))
    resident, queue, fetched = {}, [], 0  # `resident`: row -> its next use
    for batch, next_use in zip(batches, reversed(next_uses), strict=True):
        fetched += sum(resident.pop(row, None) is None for row in batch)
        while len(resident) + len(batch) > slots:
            use, row = heappop(queue)
            if resident.get(row) == -use:
                del resident[row]
        for row, use in next_use.items():
            resident[row] = use
            heappush(queue, (-use, row))
    return fetched


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


# Features: ids pooled into what a model sees, its gradients spread back to rows, and rows updated, in double precision.


class Sgd:
    """w -= rate * g."""

    def __init__(self, rate):
        self.rate = rate

    def start(self, dim):
        return ()

    def update(self, weights, gradient, state, step):
        return [w - self.rate * g for w, g in zip(weights, gradient, strict=True)], state


class Adagrad:
    """As optax has it: s += g**2, w -= rate * g / sqrt(s + eps), from s = 0.1."""

    def __init__(self, rate, initial=0.1, eps=1e-7):
        self.rate, self.initial, self.eps = rate, initial, eps

    def start(self, dim):
        return [self.initial] * dim

    def update(self, weights, gradient, state, step):
        state = [s + g * g for s, g in zip(state, gradient, strict=True)]
        terms = zip(weights, gradient, state, strict=True)
        return [w - self.rate * g / math.sqrt(s + self.eps) for w, g, s in terms], state


class LazyAdam:
    """Adam (Kingma & Ba 2015) where a row that a step does not use rests, moments included; `step` counts from 1."""

    def __init__(self, rate, b1=0.9, b2=0.999, eps=1e-8):
        self.rate, self.b1, self.b2, self.eps = rate, b1, b2, eps

    def start(self, dim):
        return [(0.0, 0.0)] * dim

    def update(self, weights, gradient, state, step):
        new, moments = [], []
        for w, g, (m, v) in zip(weights, gradient, state, strict=True):
            m = self.b1 * m + (1 - self.b1) * g
            v = self.b2 * v + (1 - self.b2) * g * g
            corrected = math.sqrt(v / (1 - self.b2**step))
            new.append(w - self.rate * m / (1 - self.b1**step) / (corrected + self.eps))
            moments.append((m, v))
        return new, moments


class DictTable:
    """A table as a dict from id to weights, trained by one of the rules above.

    Args:
        weights: `[rows, dim]`, the initial weights.
        rule: an instance of `Sgd`, `Adagrad` or `LazyAdam`; None for a frozen table.
        ignores: whether ids that are not in the table are left out, or an error.
    """

    def __init__(self, weights, rule, ignores=False):
        self.rows = {row: list(map(float, values)) for row, values in enumerate(weights)}
        self.dim, self.rule, self.ignores = len(weights[0]), rule, ignores
        self.state = {row: rule.start(self.dim) for row in self.rows} if rule else {}

    def has(self, row):
        assert self.ignores or row in self.rows
        return row in self.rows

    def update(self, gradients, step):
        """Updates the rows of `gradients`, a dict from id to gradient, which may be zero."""
        if self.rule:
            for row, gradient in gradients.items():
                self.rows[row], self.state[row] = self.rule.update(self.rows[row], gradient, self.state[row], step)


class DictFeature:
    """A feature of a `DictTable`: which lookups count, how a bag of them is pooled, and the gradients spread again.

    Args:
        table: the table.
        combiner: "sum", "mean" or None.
        padding: the id that stands for nothing, or None.
    """

    def __init__(self, table, combiner, padding):
        self.table, self.combiner, self.padding = table, combiner, padding

    def is_there(self, row):
        return row != self.padding and self.table.has(row)

    def shares(self, bag, weights):
        """Pairs of row and factor with which it enters the pooled bag, of the lookups that count."""
        pairs = [(row, w) for row, w in zip(bag, weights or [1.0] * len(bag), strict=True) if self.is_there(row)]
        if self.combiner == "mean":
            total = sum(w for _, w in pairs)
            # Rows of a bag whose weights are all zero are looked up, with nothing to learn from it.
            pairs = [(row, w / total if total else 0.0) for row, w in pairs]
        return pairs

    def outputs(self, ids, weights):
        """What the model sees, one after the other: lists of pairs of row and factor, whose weighted sum it is.

        Args:
            ids: a list with an entry for each sample: an int, or lists of them to any depth, of which the innermost are
                the bags of a combiner.
            weights: the same with floats, or None.
        """
        found = []
        for part, of_part in zip(ids, [None] * len(ids) if weights is None else weights, strict=True):
            if isinstance(part, int):
                found.append(self.shares([part], None if of_part is None else [of_part]))
            elif self.combiner and all(isinstance(row, int) for row in part):
                found.append(self.shares(part, of_part))
            else:
                found += self.outputs(part, of_part)
        return found


def train_in_double(tables, features, batches, coefficients, scale):
    """Trains on `loss = scale / 2 * sum of coefficients * output**2`, over all features and all outputs of them.

    Args:
        tables: names and `DictTable`s, which are trained in place.
        features: names and `DictFeature`s.
        batches: of each a dict from feature name to a pair of ids and weights, a list of one entry for each sample.
        coefficients: for each feature the `[dim]` coefficients.
        scale: a number.

    Returns:
        The losses.
    """
    losses, names = [], {id(table): name for name, table in tables.items()}
    for step, batch in enumerate(batches, start=1):
        loss, gradients = 0.0, {name: {} for name in tables}
        for name, (ids, weights) in batch.items():
            table, factors = features[name].table, [scale * float(c) for c in coefficients[name]]
            summed = gradients[names[id(table)]]
            for pairs in features[name].outputs(ids, weights):
                for row, _ in pairs:
                    summed.setdefault(row, [0.0] * table.dim)
                for column, factor in enumerate(factors):
                    output = sum(share * table.rows[row][column] for row, share in pairs)
                    loss += factor / 2 * output**2
                    for row, share in pairs:
                        summed[row][column] += factor * output * share
        for name, table in tables.items():
            table.update(gradients[name], step)
        losses.append(loss)
    return losses
