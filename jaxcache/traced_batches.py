"""A batch whose ids are inside `jit`, read as far as tracing shows it: the counterpart of `batches.py`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcache import slot_index
from jaxcache.features import Bags, Feature, FeatureLayout, Features, check_combiner
from jaxcache.state import GroupPlan, Plan
from jaxcache.tables import Group

Array = Any


class TracedIds(NamedTuple):
    """The ids of one feature inside `jit`; L is their number.

    Attributes:
        layout: as in a plan.
        table: position of the table in its group.
        ids: `int32[L]`.
        present: `bool[L]`, which ones look up a row.
        problems: `int32[3]`: how many are out of range and must not be, one of them, whether offsets are wrong.
        weights, bags, offsets: as in a plan, or None.
    """

    layout: FeatureLayout
    table: int
    ids: Array
    present: Array
    problems: Array
    weights: Array | None
    bags: Array | None
    offsets: Array | None


@dataclass(frozen=True)
class TracedBatch:
    """The ids of a batch, by feature, in order."""

    features: tuple[TracedIds, ...]

    @classmethod
    def read(
        cls, groups: Sequence[Group], ids: Mapping[str, Any], features: Mapping[str, Feature] | None, where: str
    ) -> TracedBatch:
        """Checks what can be checked while tracing; what cannot is in `TracedIds.problems`.

        Raises:
            TypeError, ValueError, KeyError: for ids that are no mapping of features to integers or `Bags`; under `vmap`
                or `remat`.
        """
        if not isinstance(ids, Mapping) or not ids:
            raise TypeError(f"{where} needs a mapping of feature names to ids, got {type(ids).__name__}")
        _refuse_remat(where)
        known = Features(groups, features)
        parts = [_read_feature(name, value, known) for name, value in ids.items()]
        arrays = outside_vmap([part[2:] for part in parts])
        return cls(tuple(TracedIds(*part[:2], *new) for part, new in zip(parts, arrays, strict=True)))

    def lookups(self, group: int) -> tuple[Array, Array, Array]:
        """Table, id and presence of each lookup in a group: `int32[L]`, `int32[L]`, `bool[L]`."""
        none = jnp.zeros(0, jnp.int32)
        parts = [part for part in self.features if part.layout.group == group]
        tables = [jnp.full(len(part.ids), part.table, jnp.int32) for part in parts]
        return (
            jnp.concatenate([none, *tables]),
            jnp.concatenate([none, *(part.ids for part in parts)]),
            jnp.concatenate([none.astype(bool), *(part.present for part in parts)]),
        )

    def plan(self, groups: Sequence[GroupPlan], step: Array) -> Plan:
        """The plan of the batch, from that of each group."""
        return Plan(
            groups=tuple(groups),
            weights={part.layout.name: part.weights for part in self.features if part.weights is not None},
            bags={part.layout.name: part.bags for part in self.features if part.bags is not None},
            offsets={part.layout.name: part.offsets for part in self.features if part.offsets is not None},
            step=step,
            # Nothing that XLA knows while it compiles: it would round the loss behind a constant mask in another way.
            samples=self.features[0].layout.samples + jnp.minimum(step, 0),
            features=tuple(part.layout for part in self.features),
        )


def group_plan(unique_slots: Array, inverse: Array) -> GroupPlan:
    """The plan of a group from the slots of its unique rows and each lookup's position among them."""
    return GroupPlan(unique_slots, inverse, *slot_index.by_row(inverse, len(unique_slots)))


def _read_feature(name: str, value: Any, known: Features) -> TracedIds:
    feature, group, position = known.locate(name)
    table = known.groups[group].tables[position]
    bags = value if isinstance(value, Bags) else Bags(value)
    # 64-bit ids of NumPy would be cut to 32 on their way into JAX.
    array = bags.ids if isinstance(bags.ids, jax.Array) else np.asarray(bags.ids)
    if array.size == 0:
        array = jnp.zeros(array.shape, jnp.int32)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"ids of feature {name!r} are {array.dtype}; ids must be integers (ids.astype(np.int32))")
    if array.ndim == 0:
        raise ValueError(f"every feature needs ids for each sample, [B, ...]; those of {name!r} are a single number")
    check_combiner(name, feature, bags.offsets is not None, bags.weights is not None)
    flat = array.reshape(-1)
    if flat.dtype.itemsize < 4:
        flat = flat.astype(np.int32)
    in_range = (flat >= 0) & (flat <= np.asarray(min(int(table.rows) - 1, jnp.iinfo(flat.dtype).max), flat.dtype))
    present, wrong = in_range, ~in_range
    limits = jnp.iinfo(array.dtype)
    if feature.padding is not None and limits.min <= feature.padding <= limits.max:
        padding = flat == np.asarray(feature.padding, flat.dtype)
        present, wrong = present & ~padding, wrong & ~padding
    # Those beyond 32 bits are reported as the last one that fits.
    narrow = flat.clip(max(limits.min, -(2**31)), min(limits.max, 2**31 - 1)).astype(np.int32)
    flat, present, wrong = jnp.asarray(narrow), jnp.asarray(present), jnp.asarray(wrong)
    number, owners, offsets, broken = None, None, None, jnp.zeros((), jnp.int32)
    if bags.offsets is not None:
        offsets = jnp.asarray(bags.offsets)
        if flat.shape != array.shape or offsets.ndim != 1 or not jnp.issubdtype(offsets.dtype, jnp.integer):
            raise ValueError(
                f"feature {name!r} has ids of shape {array.shape} and offsets {offsets.dtype}{list(offsets.shape)}: "
                "ragged ids are one axis [N], and offsets integers [B + 1], where each bag starts, and the end"
            )
        offsets, number = offsets.astype(jnp.int32), len(offsets) - 1
        owners = jnp.searchsorted(offsets[1:], jnp.arange(len(flat), dtype=jnp.int32), side="right").astype(jnp.int32)
        sound = (offsets[0] == 0) & (offsets[-1] <= len(flat)) & (offsets[1:] >= offsets[:-1]).all()
        broken = (~sound).astype(jnp.int32)
        present, wrong = present & (owners < number), wrong & (owners < number)
    weights = None
    if bags.weights is not None:
        weights = jnp.asarray(bags.weights, jnp.float32)
        if weights.shape != array.shape:
            raise ValueError(
                f"the weights of feature {name!r} have shape {weights.shape} and its ids {array.shape}: give one "
                "weight an id"
            )
        weights = weights.reshape(-1)
    if table.out_of_range == "ignore":
        wrong = jnp.zeros_like(wrong)
    if len(flat):
        problems = jnp.stack([jnp.sum(wrong, dtype=jnp.int32), flat[jnp.argmax(wrong)], broken])
    else:
        problems = jnp.stack([jnp.zeros((), jnp.int32)] * 2 + [broken])
    layout = FeatureLayout(name, group, feature.combiner, array.shape, number, weights is not None)
    return TracedIds(layout, position, flat, present, problems, weights, owners, offsets)


@jax.custom_batching.custom_vmap
def outside_vmap(arrays: Any) -> Any:
    """The arrays; an error if one of them is mapped by `vmap`."""
    return arrays


@outside_vmap.def_vmap
def _refuse_vmap(axis_size: int, in_batched: Any, arrays: Any) -> Any:
    raise ValueError(
        "admit and prefetch were called under vmap, where there would be a cache for each of its entries: call them "
        "outside, with the ids of all entries, and map what becomes of the rows"
    )


def _refuse_remat(where: str) -> None:
    """Raises where a function that is to be run twice, by remat, is being traced; JAX has no other way to know."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == jax.checkpoint.__module__:
            raise ValueError(
                f"{where} was called under jax.checkpoint (remat), which would run it twice: call it outside, and give "
                "the rows to the function that is checkpointed"
            )
        frame = frame.f_back
