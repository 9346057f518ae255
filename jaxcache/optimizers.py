"""Row optimizers: any optax transformation that treats rows alike and apart, applied to the touched rows alone.

Touching only the rows of a batch makes optimizers that move a row with zero gradient (momentum, adam, weight decay)
their *lazy* variants: a row rests, moments included, in the steps that do not use it. Sgd and adagrad leave such a row
alone anyway, so for them the result is that of the transformation on the whole dense table. `catch_up_adam` is adam
whose moments do not rest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax

from jaxcache.kernels import FUSED, Rule
from jaxcache.rounding import round_stochastically
from jaxcache.tables import Table

Scalars = tuple[Any, ...]


class RowWiseAdagradState(NamedTuple):
    """One accumulator a row, `float32[..., 1]`: the sum over updates of the gradient's mean square."""

    accumulator: Any


def rowwise_adagrad(
    learning_rate: optax.ScalarOrSchedule, eps: float = 1e-8, initial_accumulator: float = 0.0
) -> optax.GradientTransformation:
    """Adagrad with one accumulator a row, for parameters `[dim]` or `[rows, dim]`.

    The definition is FBGEMM's `EXACT_ROWWISE_ADAGRAD` (Khudia et al., arXiv 2101.05615; Duchi et al. 2011 an element):
    with g the summed gradient of the row, `s += mean(g**2)` and `w -= learning_rate * g / (sqrt(s) + eps)`.

    Args:
        learning_rate: a number, or an optax schedule of the number of updates done.
        eps: added to the square root of the accumulator.
        initial_accumulator: what the accumulator of every row starts from.

    >>> transformation = rowwise_adagrad(0.5)
    >>> row = jnp.array([1.0, 1.0])
    >>> step, _ = transformation.update(jnp.array([3.0, 1.0]), transformation.init(row))
    >>> [round(float(x), 4) for x in step]  # mean square 5: 0.5 * 3 / sqrt(5), 0.5 * 1 / sqrt(5)
    [-0.6708, -0.2236]
    """

    def init(parameters):
        return RowWiseAdagradState(
            jax.tree.map(lambda p: jnp.full((*p.shape[:-1], 1), initial_accumulator, jnp.float32), parameters)
        )

    def update(gradients, state, parameters=None):
        del parameters
        accumulator = jax.tree.map(lambda g, s: s + _mean_square(g.astype(jnp.float32)), gradients, state.accumulator)
        steps = jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), gradients, accumulator)
        return steps, RowWiseAdagradState(accumulator)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def _mean_square(rows: jax.Array) -> jax.Array:
    """Mean of the squares over the last axis, kept, summed by halving: one fixed order on every backend and shape."""
    total, dim = rows * rows, rows.shape[-1]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        paired = total[..., :half] + total[..., half : 2 * half]
        odd = total[..., 2 * half :]
        total = jnp.concatenate([paired, odd], axis=-1) if odd.shape[-1] else paired
    return total / dim


class CatchUpAdamState(NamedTuple):
    """What `catch_up_adam` keeps: adam's state, and when each row was updated.

    Attributes:
        count: `int32[]`, updates done.
        mu, nu: `float32[..., dim]`, first and second moment as of the row's latest update.
        last: `int32[..., 1]`, the value of `count` after that update; 0 before the first.
    """

    count: Any
    mu: Any
    nu: Any
    last: Any


def catch_up_adam(
    learning_rate: optax.ScalarOrSchedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba, ICLR 2015) whose moments are averages over time, for parameters `[dim]` or `[rows, dim]`.

    A row that returns after k updates that left it out first has its moments multiplied by `b1**k` and `b2**k`, which
    is what adam on the whole dense table makes of them with k gradients of zero. So at every update of a row its
    moments are those of dense training, bias correction included, whereas with `optax.adam` they are averages over
    the row's own gradients, as if the steps between had not been. For a row updated in every step both are the same.
    Between its updates a row's weights rest with either; dense adam would go on moving them by the momentum left.

    Which is right depends on the rare rows. Bias correction counts the updates of the table, not of the row, so late
    in training it changes next to nothing. A row that returns after a long time, or comes for the first time, then has
    moments of `(1 - b1) * g` and `(1 - b2) * g**2`, and whatever the size of its gradient g a step of
    `(1 - b1) / sqrt(1 - b2)` learning rates, 3.2 with the defaults: the largest that there can be, which Kingma & Ba
    give for a gradient that was zero in all steps before. A row that comes every k updates with equal gradients
    settles at steps of half a learning rate for k near 12, of one for k near 100, of 3.2 for k far above
    `1 / (1 - b2)`. With `optax.adam` such a row starts with 3.2 too. Then, as b2 forgets more slowly than b1, its steps
    grow, to 6.6 at its 12th update, and are near one only after more than a thousand updates of its own. What it
    returns with counts in full, however old it is.

    Take `catch_up_adam` for moments that are those of dense training and do not go stale, as where rows come and go
    with time. Take `optax.adam` where every gradient of a rare row should count in full. Here a row that comes every k
    updates receives the share `(1 - b1) / (1 - b1**k)` of a gradient's momentum, a tenth for large k and the default
    b1, since what dense adam would have added in between is left out; `b1=0` leaves out nothing. A smaller b2, or a
    learning rate that warms up, bounds the large steps.

    Args:
        learning_rate: a number, or an optax schedule of the number of updates done.
        b1, b2: what the moments keep in a step, at least 0 and below 1.
        eps: added to the square root of the second moment.

    >>> [leaf.shape for leaf in RowOptimizer(catch_up_adam(0.1), 8).row_shapes]  # the moments, and when it was updated
    [(8,), (8,), (1,)]
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(parameters):
        state = adam.init(parameters)
        last = jax.tree.map(lambda p: jnp.zeros((*p.shape[:-1], 1), jnp.int32), parameters)
        return CatchUpAdamState(state.count, state.mu, state.nu, last)

    def update(gradients, state, parameters=None):
        del parameters
        now = optax.safe_increment(state.count)
        # The count stays at the largest integer once it is there.
        rested = jax.tree.map(lambda last: jnp.maximum(now - last - 1, 0).astype(jnp.float32), state.last)
        mu = jax.tree.map(lambda moment, steps: moment * b1**steps, state.mu, rested)
        nu = jax.tree.map(lambda moment, steps: moment * b2**steps, state.nu, rested)
        steps, new = adam.update(gradients, optax.ScaleByAdamState(state.count, mu, nu))
        last = jax.tree.map(lambda last: jnp.full_like(last, now), state.last)
        return steps, CatchUpAdamState(new.count, new.mu, new.nu, last)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


class Rows(NamedTuple):
    """Rows with what their optimizer keeps for them; the leading axis N is of slots, or of rows in flight.

    Attributes:
        weights: `[N, dim]` of the table's dtype.
        state: the optimizer's row leaves, `[N, ...]` each (see `RowOptimizer`).
    """

    weights: Any
    state: tuple[Any, ...]


class RowOptimizer:
    """An optax transformation taken apart for use on rows of `dim` weights, and how these are kept.

    Its state falls into *row leaves*, one value a row, stored with the row; and *scalars*, one value for the table,
    such as step counts. The transformation's arithmetic is recorded once as a jaxpr. The float constants found in it
    (rates, decays, the constants of schedules) are lifted out as *hyperparameters* and become traced inputs, so that
    a changed rate recompiles nothing; what is left is compared by value, so that an equal optimizer built anew
    recompiles nothing either.

    The transformation always sees float32 weights and gradients, and its state is what optax makes for such. Weights
    of 16 bits are widened for it and its result is rounded; with a master copy it works on that.

    Args:
        transformation: an optax transformation; None for rows that are never trained, which have no state.
        dim: weights a row.
        dtype, rounding, master_copy: how the weights are kept, see `Table`.

    Attributes:
        dim, dtype, rounding, master_copy: as given, `dtype` a NumPy dtype.
        frozen: whether there is no transformation.
        draws: whether `update` needs random words.
        row_shapes: shape and dtype of each row leaf, for one row; the master copy, if there is one, comes first.
        scalars: initial values of the scalars, NumPy.
        hyperparameters: values of the lifted constants, NumPy.

    Raises:
        ValueError: at construction, if the transformation mixes rows (clipping by global norm, lamb, adafactor,
            `apply_if_finite`), which is found out by updating rows together and apart, or if it needs more than
            gradients, state and parameters; or if `Table` would refuse the other arguments.
        TypeError: for what is neither None nor a transformation.

    >>> RowOptimizer(optax.adam(0.1), 8) == RowOptimizer(optax.adam(0.2), 8) != RowOptimizer(optax.sgd(0.1), 8)
    True
    """

    def __init__(
        self,
        transformation: optax.GradientTransformation | None,
        dim: int,
        dtype: Any = np.float32,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        master_copy: bool = False,
    ):
        if transformation is not None and not (hasattr(transformation, "init") and hasattr(transformation, "update")):
            raise TypeError(f"optimizer must be an optax transformation such as optax.sgd(0.1), got {transformation!r}")
        self.frozen = transformation is None
        # A table of such rows knows which of these go together.
        kept = Table(1, dim, dtype=dtype, rounding=rounding, master_copy=master_copy, frozen=self.frozen)
        self.dim, self.dtype, self.rounding, self.master_copy = dim, kept.dtype, rounding, master_copy
        self.draws = rounding == "stochastic"
        self._identity: tuple = (dim, str(self.dtype), rounding, master_copy)
        self.row_shapes: tuple[jax.ShapeDtypeStruct, ...] = ()
        self.scalars: tuple[np.ndarray, ...] = ()
        self.hyperparameters: tuple[np.ndarray, ...] = ()
        if transformation is None:
            return
        self._transformation = transformation
        row = jax.ShapeDtypeStruct((dim,), jnp.float32)
        # Optax computes with Python numbers and integer counts: it needs JAX's default promotions.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            self._take_apart(row)
            self._fused = _known_rule(self)
            # A rule is known by its constants too, of which some are no coefficients.
            known = None if self._fused is None else self._fused[0]
            self._identity += (str(self._treedef), self._is_row, _canonical(self._recorded), known)
            self._initial_rows = jax.jit(
                jax.vmap(lambda weights: self._split(jax.tree.leaves(transformation.init(weights)))[0])
            )
            self._initial = self._constant_state()
            self._refuse_mixing()
        if master_copy:
            self.row_shapes = (row, *self.row_shapes)

    def _take_apart(self, row):
        transformation, dim = self._transformation, self.dim
        try:
            one, self._treedef = jax.tree.flatten(jax.eval_shape(transformation.init, row))
            many, many_treedef = jax.tree.flatten(
                jax.eval_shape(transformation.init, jax.ShapeDtypeStruct((_PROBED, dim), jnp.float32))
            )
        except Exception as error:
            raise ValueError(f"the optimizer cannot start on rows of {dim} weights: {error}") from error
        self._is_row = tuple(
            len(stacked.shape) > 0 and stacked.shape == (_PROBED, *single.shape)
            for single, stacked in zip(one, many, strict=False)
        )
        if many_treedef != self._treedef or any(
            not is_row and leaf.shape != () for is_row, leaf in zip(self._is_row, many, strict=True)
        ):
            raise ValueError(
                "the optimizer's state is neither one value a row nor one for the table (adafactor is such a one): "
                f"its leaves for {_PROBED} rows of {dim} weights are {[leaf.shape for leaf in many]}"
            )
        self.row_shapes = tuple(leaf for leaf, is_row in zip(one, self._is_row, strict=True) if is_row)
        state = transformation.init(jnp.zeros(dim, jnp.float32))
        if _accumulates_steps(state):
            raise ValueError(
                "the optimizer saves gradients up for a later step (optax.MultiSteps, optax.apply_every): a row that "
                "no later batch uses would lose them. Use larger batches, or sum the gradients of several before update"
            )
        if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
            raise ValueError("the optimizer draws random numbers, which a row would get by its place in the batch")
        self.scalars = tuple(np.asarray(leaf) for leaf in self._split(jax.tree.leaves(state))[1])
        try:
            self._recorded = jax.make_jaxpr(self._update_row)(
                row, row, self.row_shapes, tuple(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in self.scalars)
            )
        except Exception as error:
            raise ValueError(f"the optimizer cannot update a row from its gradient alone: {error}") from error
        self.hyperparameters = tuple(
            np.asarray(value)
            for value in [
                *self._recorded.consts,
                *(_value(v) for e in self._recorded.jaxpr.eqns for v in e.invars if _is_constant(v)),
                *(_value(v) for v in self._recorded.jaxpr.outvars if _is_constant(v)),
            ]
        )

    def __eq__(self, other):
        return isinstance(other, RowOptimizer) and self._identity == other._identity

    def __hash__(self):
        return hash(self._identity)

    def __repr__(self):
        kept = f", dtype={self.dtype}" if self.dtype != np.float32 else ""
        kept += ", stochastic rounding" * self.draws + ", master copy" * self.master_copy + ", frozen" * self.frozen
        return f"RowOptimizer(dim={self.dim}, row_leaves={len(self.row_shapes)}, scalars={len(self.scalars)}{kept})"

    @property
    def leaf_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the row leaves and of the scalars, by their place in optax's state: `0.sum_of_squares`."""
        if self.frozen:
            return (), ()
        paths, _ = jax.tree_util.tree_flatten_with_path(self._treedef.unflatten(self._is_row))
        rows, scalars = self._split([jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths])
        return ("master_copy",) * self.master_copy + rows, scalars

    def _split(self, leaves):
        rows = tuple(leaf for leaf, is_row in zip(leaves, self._is_row, strict=True) if is_row)
        return rows, tuple(leaf for leaf, is_row in zip(leaves, self._is_row, strict=True) if not is_row)

    def _join(self, rows, scalars):
        rows, scalars = iter(rows), iter(scalars)
        return self._treedef.unflatten([next(rows if is_row else scalars) for is_row in self._is_row])

    def _update_row(self, gradient, weights, row_state, scalars):
        steps, state = self._transformation.update(gradient, self._join(row_state, scalars), weights)
        return weights + steps, *self._split(jax.tree.leaves(state))

    def initial_state(self, weights: np.ndarray) -> tuple[np.ndarray, ...]:
        """The row leaves, `[N, ...]` each, of untrained rows with the given `float32[N, dim]` weights."""
        if self.frozen:
            return ()
        master = (np.array(weights, np.float32),) if self.master_copy else ()
        return (*master, *self._initial_leaves(weights))

    def _initial_leaves(self, weights):
        if self._initial is not None:
            return tuple(np.tile(leaf, (len(weights),) + (1,) * leaf.ndim) for leaf in self._initial)
        # State that starts from the weights, such as a slow copy of them. Sizes are rounded up to bound compilations.
        padded = np.zeros((1 << max(len(weights) - 1, 15).bit_length(), self.dim), np.float32)
        padded[: len(weights)] = weights
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return tuple(np.asarray(leaf)[: len(weights)] for leaf in self._initial_rows(padded))

    def _constant_state(self):
        """The initial row leaves of one row, where they do not depend on its weights; else None."""
        probes = np.random.default_rng(0).normal(size=(_PROBED, self.dim)).astype(np.float32)
        leaves = [np.asarray(leaf) for leaf in self._initial_rows(probes)]
        if all((leaf == leaf[:1]).all() for leaf in leaves):
            return [leaf[0] for leaf in leaves]
        return None

    def update(
        self,
        gradients: jax.Array,
        weights: jax.Array,
        row_state: tuple[jax.Array, ...],
        scalars: Scalars,
        hyperparameters: Scalars,
        words: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, ...], Scalars]:
        """Updates rows, each by itself.

        Args:
            gradients: `float32[N, dim]`.
            weights: `dtype[N, dim]`; not looked at where there is a master copy.
            row_state: row leaves, `[N, ...]` each.
            scalars, hyperparameters: 0-dimensional arrays, as `self.scalars` and `self.hyperparameters`.
            words: `uint32[N, dim]`, random bits for stochastic rounding (see `draws`), as from `random_words`.

        Returns:
            New weights, row leaves and scalars. The scalars advance once, whatever N is.

        Raises:
            ValueError: while tracing, for a frozen table, or if `words` are missing or given in vain.
        """
        if self.frozen:
            raise ValueError("update of a frozen table, which has no optimizer: train it with Table(frozen=False)")
        if (words is not None) != self.draws:
            raise ValueError(
                f"update got {'no words' if words is None else 'words'} for rounding={self.rounding!r}: "
                "stochastic rounding needs words=random_words(...), and no other does"
            )
        if self.dtype == np.float32:
            return self._update_float32(gradients, weights, row_state, scalars, hyperparameters)
        if self.master_copy:
            weights, row_state = row_state[0], row_state[1:]
        updated, row_state, scalars = self._update_float32(
            gradients, weights.astype(jnp.float32), row_state, scalars, hyperparameters
        )
        # Whatever XLA makes of the arithmetic, what is rounded and what is kept as master copy are the same bits.
        updated = jax.lax.optimization_barrier(updated)
        if self.master_copy:
            row_state = (updated, *row_state)
        if words is None:
            return updated.astype(self.dtype), row_state, scalars
        return round_stochastically(updated, words, self.dtype), row_state, scalars

    def advance(self, scalars: Scalars, hyperparameters: Scalars) -> Scalars:
        """The scalars after an update, which do not depend on rows."""
        none = jnp.zeros((0, self.dim), jnp.float32)
        row_shapes = self.row_shapes[self.master_copy :]
        row_state = tuple(jnp.zeros((0, *leaf.shape), leaf.dtype) for leaf in row_shapes)
        return self._update_float32(none, none, row_state, scalars, hyperparameters)[2]

    def rule(self, scalars: Scalars, hyperparameters: Scalars, words: jax.Array | None = None) -> Rule:
        """`update` as the kernels take it; those that know the optimizer have it built in.

        Args: as for `update`.

        >>> optimizer = RowOptimizer(optax.sgd(0.5), 8)
        >>> rule = optimizer.rule(optimizer.scalars, optimizer.hyperparameters)
        >>> rule.name, [float(value) for value in rule.coefficients]
        ('sgd', [-0.5])
        """

        def apply(summed, weights, row_state):
            return self.update(summed, weights, row_state, scalars, hyperparameters, words)[:2]

        if self._fused is None:
            return Rule(apply, master_copy=self.master_copy, words=words)
        name, places = self._fused
        values = {coefficient: hyperparameters[place] for coefficient, place in places.items()}
        if name == "adam":
            # As optax has it; once for all rows.
            updates = optax.safe_increment(scalars[0]).astype(jnp.float32)
            values["correction1"] = 1 - values["b1"] ** updates
            values["correction2"] = 1 - values["b2"] ** updates
        coefficients = tuple(jnp.asarray(values[coefficient], jnp.float32) for coefficient in FUSED[name])
        return Rule(apply, name, coefficients, self.master_copy, words)

    def _update_float32(self, gradients, weights, row_state, scalars, hyperparameters):
        def one(gradient, weights, row_state):
            return self._replay(hyperparameters, gradient, weights, row_state, scalars)

        # No output of a scalar may depend on a row: vmap itself refuses that.
        return jax.vmap(one, out_axes=(0, 0, None))(gradients, weights, row_state)

    def _replay(self, hyperparameters, *arguments):
        """Evaluates the recorded jaxpr with `hyperparameters` in the place of its constants."""
        jaxpr = self._recorded.jaxpr
        values: dict[Any, Any] = {}
        lifted = iter(hyperparameters)
        for variable in jaxpr.constvars:
            values[variable] = next(lifted)
        values.update(zip(jaxpr.invars, jax.tree.leaves(arguments), strict=True))

        def read(variable):
            if _is_constant(variable):
                return next(lifted)
            return variable.val if isinstance(variable, jex.Literal) else values[variable]

        for equation in jaxpr.eqns:
            inputs = [read(variable) for variable in equation.invars]
            parameters = equation.primitive.get_bind_params(equation.params)
            outputs = equation.primitive.bind(*inputs, **parameters)
            if not equation.primitive.multiple_results:
                outputs = [outputs]
            values.update(zip(equation.outvars, outputs, strict=True))
        outputs = [read(variable) for variable in jaxpr.outvars]
        weights, rest = outputs[0], outputs[1:]
        rows = sum(self._is_row)
        return weights, tuple(rest[:rows]), tuple(rest[rows:])

    def _refuse_mixing(self):
        """Updates a few rows together and apart, from gradients of very different sizes, twice in a row."""
        random = np.random.default_rng(0)
        weights = random.normal(size=(_PROBED, self.dim)).astype(np.float32)
        sizes = np.array([1e-3, 1.0, 1e6, np.nan], np.float32)[:, None]
        gradients = random.normal(size=(_PROBED, self.dim)).astype(np.float32) * sizes
        together, state = jnp.asarray(weights), self._transformation.init(jnp.asarray(weights))
        apart: Any = together
        row_state: Any = self._initial_leaves(weights)
        scalars: Any = self.scalars
        for _ in range(2):
            steps, state = self._transformation.update(jnp.asarray(gradients), state, together)
            together = together + steps
            try:
                apart, row_state, scalars = self._update_float32(
                    jnp.asarray(gradients), apart, row_state, scalars, self.hyperparameters
                )
            except ValueError as error:
                raise ValueError(f"{_MIXES} (a scalar of its state depends on the rows: {error})") from error
        expected = [together, *self._split(jax.tree.leaves(state))[0]]
        for one, other in zip(expected, [apart, *row_state], strict=True):
            finite = slice(0, _PROBED - 1)  # the NaN gradient may spoil its own row, and no other
            one, other = np.asarray(one, np.float64)[finite], np.asarray(other, np.float64)[finite]
            if not np.allclose(one, other, rtol=1e-3, atol=1e-6, equal_nan=True):
                raise ValueError(_MIXES)


_PROBED = 4
_MIXES = (
    "the optimizer mixes rows: updating rows together and apart gives different results, as with clipping by global "
    "norm, lamb, adafactor or apply_if_finite. The rows of a cached table are updated a batch at a time, so only "
    "transformations that treat each row by itself can work: optax.clip instead of clip_by_global_norm, for one"
)


def _known_rule(optimizer: RowOptimizer) -> tuple[str, dict[str, int]] | None:
    """Which rule of `kernels.FUSED` an optimizer is, and where its coefficients are among the hyperparameters.

    It is one if it was recorded as the same function, of as many scalars (there, one for each row looks the same), and
    its constants are those of the rule but for coefficients.
    """
    canonical = len(optimizer.scalars), _canonical(optimizer._recorded)
    for name, values, recorded, constants in _known_rules(optimizer.dim):
        if recorded != canonical:
            continue
        found: dict[str, int] = {}
        for place, (constant, value) in enumerate(zip(constants, optimizer.hyperparameters, strict=True)):
            coefficient = next((c for c, v in values.items() if np.float32(v) == constant), None)
            if coefficient is None:
                if constant != value:
                    return None
            elif optimizer.hyperparameters[found.setdefault(coefficient, place)] != value:
                return None
        return name, found
    return None


@functools.cache
def _known_rules(dim: int) -> list[tuple[str, dict[str, float], tuple[int, str], tuple[np.ndarray, ...]]]:
    """The rules of `kernels.FUSED`: values of their coefficients, all different, and what is recorded with these, after
    the number of scalars."""
    rate, decay, b1, b2, eps, root = 0.37, 0.83, 0.71, 0.59, 0.013, 0.0017
    common = {"rate": -rate, "eps": eps}
    adam = {"b1": b1, "one_minus_b1": 1 - b1, "b2": b2, "one_minus_b2": 1 - b2, "eps_root": root}
    rules = [
        ("sgd", {"rate": -rate}, optax.sgd(rate)),
        ("momentum", {"rate": -rate, "decay": decay}, optax.sgd(rate, decay)),
        ("adagrad", common, optax.adagrad(rate, eps=eps)),
        ("rowwise_adagrad", common, rowwise_adagrad(rate, eps)),
        ("adam", common | adam, optax.adam(rate, b1, b2, eps, root)),
    ]
    known = []
    for name, values, transformation in rules:
        recorder = object.__new__(RowOptimizer)  # taken apart and nothing else
        recorder.dim, recorder._transformation = dim, transformation
        recorder._take_apart(jax.ShapeDtypeStruct((dim,), jnp.float32))
        canonical = len(recorder.scalars), _canonical(recorder._recorded)
        known.append((name, values, canonical, recorder.hyperparameters))
    return known


def _accumulates_steps(state: Any) -> bool:
    kinds = (optax.MultiStepsState, optax.ApplyEvery)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return any(isinstance(node, kinds) for node in nodes)


def _is_constant(variable: Any) -> bool:
    """Whether an input of an equation is a float constant that is worth tracing."""
    if not isinstance(variable, jex.Literal):
        return False
    shaped: Any = variable.aval
    return jnp.issubdtype(shaped.dtype, jnp.floating)


def _value(literal) -> np.ndarray:
    return np.asarray(literal.val, literal.aval.dtype)


def _canonical(recorded) -> str:
    """The text of a jaxpr with its lifted constants left out: equal texts compute the same function of them."""
    names: dict[Any, str] = {}

    def name(variable):
        if _is_constant(variable):
            return f"constant:{variable.aval.dtype}"
        if isinstance(variable, jex.Literal):
            return f"{variable.val}:{variable.aval}"
        return f"{names.setdefault(variable, str(len(names)))}:{variable.aval}"

    jaxpr = recorded.jaxpr
    lines = [" ".join(map(name, [*jaxpr.constvars, *jaxpr.invars]))]
    for equation in jaxpr.eqns:
        inputs, outputs = " ".join(map(name, equation.invars)), " ".join(map(name, equation.outvars))
        lines.append(f"{outputs} = {equation.primitive} {sorted(equation.params.items())} {inputs}")
    lines.append(" ".join(map(name, jaxpr.outvars)))
    lines += [f"{value.dtype}{value.shape} {value.tobytes().hex()}" for value in _nested_constants(jaxpr)]
    return "\n".join(lines)


def _nested_constants(jaxpr) -> Iterator[np.ndarray]:
    """The arrays that jitted functions inside a jaxpr close over: they are not lifted, and its text only names them."""
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(tuple(equation.params.values())):
            if isinstance(parameter, jex.ClosedJaxpr):
                yield from map(np.asarray, parameter.consts)
                yield from _nested_constants(parameter.jaxpr)
            elif isinstance(parameter, jex.Jaxpr):
                yield from _nested_constants(parameter)
