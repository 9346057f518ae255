"""How many rows of each group the cache holds: from what the caller asks for to a number of slots a group."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcache.planner import TooFewSlots
from jaxcache.tables import Group

SLOT_BYTES = 17
"""Bytes of a slot beside its row: 12 for the slot table, 4 for the count of lookups, 1 for whether it is dirty."""

MEASURED_BATCHES = 8  # drawn to find the unique rows per batch of each group
_MOST_SLOTS = 2**31 - 2  # a slot is an int32, and the number of slots is padding
_UNITS = {"": 1, "b": 1} | {
    unit + suffix: base**power for power, unit in enumerate("kmgt", 1) for suffix, base in (("b", 1000), ("ib", 1024))
}


@dataclass(frozen=True)
class Capacity:
    """What the caller asks for.

    Attributes:
        groups: the groups of the store.
        slots: slots of each group, where that is known beforehand; else None, and the budget is to be split.
        budget: what all groups may take together.
        costs: what a slot of each group takes of the budget: 1, or its bytes.
        asked: the argument as it was given, for messages.
    """

    groups: tuple[Group, ...]
    slots: tuple[int, ...] | None
    budget: int
    costs: tuple[int, ...]
    asked: str

    @classmethod
    def parse(
        cls,
        groups: Sequence[Group],
        row_bytes: Sequence[int],
        fixed_bytes: int,
        slots: int | str | Mapping[str, int | str] | None,
        device_bytes: int | str | None,
    ) -> Capacity:
        """Reads `LookAhead(slots=..., device_bytes=...)`, of which one must be given.

        Args:
            groups: of the store.
            row_bytes: bytes of a row of each group.
            fixed_bytes: bytes of a cache without slots: scalars and constants of the optimizers.
            slots, device_bytes: see `LookAhead`.

        Raises:
            ValueError: for anything that is no such number, share, mapping or size.
            KeyError: for a mapping with an unknown table.
        """
        if (slots is None) == (device_bytes is None):
            raise ValueError('LookAhead needs one of slots= (rows, or a share such as "1.5%") and device_bytes=')
        costs = (1,) * len(groups)
        if device_bytes is not None:
            asked, budget = f"LookAhead(device_bytes={device_bytes!r})", _parse_bytes(device_bytes) - fixed_bytes
            costs = tuple(size + SLOT_BYTES for size in row_bytes)
        elif isinstance(slots, Mapping):
            asked = f"LookAhead(slots={dict(slots)!r})"
            numbers = parse_mapping(slots, groups, asked)
            return cls(tuple(groups), numbers, sum(numbers), costs, asked)
        else:
            asked = f"LookAhead(slots={slots!r})"
            budget = parse_slots(slots, sum(group.rows for group in groups), asked)
        every = tuple(group.rows for group in groups)
        if budget >= sum(cost * rows for cost, rows in zip(costs, every, strict=True)):
            known: tuple[int, ...] | None = every
        else:
            known = (budget // costs[0],) if len(groups) == 1 else None
        if known is not None and max(known) > _MOST_SLOTS:
            raise ValueError(f"{asked} asks for {max(known):,} slots: a cache holds fewer than 2**31 - 1")
        if known is not None and min(known) < 1:
            raise ValueError(f"{asked} does not hold a single row, which takes {costs[0]:,} bytes")
        return cls(tuple(groups), known, budget, costs, asked)

    def holds(self, slots: Sequence[int]) -> bool:
        """Whether a cache of so many slots of each group is what was asked for, or within the budget."""
        if self.slots is not None:
            return tuple(slots) == self.slots
        return sum(cost * number for cost, number in zip(self.costs, slots, strict=True)) <= self.budget

    def split(self, unique: np.ndarray) -> tuple[int, ...]:
        """The slots of each group, in proportion to its unique rows per batch.

        Each group gets what the largest batch needs, and an eighth more if there is room, and no more than its rows.

        Args:
            unique: `int64[batches, groups]`, unique rows of some batches.

        Raises:
            TooFewSlots: if the budget does not hold the largest of the batches.

        >>> from jaxcache.tables import Table
        >>> groups = [Group.stack({"user": Table(900, 4)}), Group.stack({"city": Table(50, 2)})]
        >>> Capacity.parse(groups, [16, 8], 0, slots=200, device_bytes=None).split(np.array([[30, 10], [50, 10]]))
        (160, 40)
        """
        if self.slots is not None:
            return self.slots
        costs = np.array(self.costs, float)
        most = np.array([min(group.rows, _MOST_SLOTS) for group in self.groups], float)
        needed = np.minimum(np.maximum(unique.max(axis=0, initial=1), 1), most)
        if (costs @ needed) > self.budget:
            each = ", ".join(
                f"{int(number):,} for {group.name!r}" for group, number in zip(self.groups, needed, strict=True)
            )
            raise TooFewSlots(
                f"{self.asked} is too small for the groups of tables: a batch needs slots for its unique rows, {each} "
                f"and the tables stacked with these, which takes {int(costs @ needed):,} and there are {self.budget:,}"
                + (" bytes" if max(self.costs) > 1 else "")
                + ": ask for more, or take smaller batches"
            )
        roomy = np.minimum(needed + needed // 8, most)
        least = roomy if (costs @ roomy) <= self.budget else needed
        weights = np.maximum(unique.mean(axis=0), 1e-9) if len(unique) else np.ones(len(costs))

        def slots_at(factor: float) -> np.ndarray:
            return np.clip(np.floor(factor * weights), least, most)

        low, high = 0.0, self.budget / weights.min()
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if costs @ slots_at(middle) <= self.budget else (low, middle)
        slots = tuple(int(number) for number in slots_at(low))
        if _MOST_SLOTS in slots:
            raise ValueError(f"{self.asked} gives a group {_MOST_SLOTS:,} slots: a cache holds fewer than 2**31 - 1")
        return slots


def rows_of(capacity: Any, rows: int) -> int | None:
    """A number of rows from a number, or from a share of `rows` such as "1.5%"; None if `capacity` is neither.

    >>> rows_of("1.5%", 1000), rows_of(20, 1000), rows_of("many", 1000)
    (15, 20, None)
    """
    if isinstance(capacity, str) and capacity.endswith("%"):
        try:
            share = float(capacity[:-1])
        except ValueError:
            return None
        return math.ceil(rows * share / 100) if 0 < share <= 100 else None
    whole = isinstance(capacity, int | np.integer) and not isinstance(capacity, bool) and capacity >= 1
    return int(capacity) if whole else None


def parse_slots(slots: Any, rows: int, asked: str) -> int:
    """A number of slots from a number, or from a share of `rows`; at most `rows`. Errors say who `asked`."""
    found = rows_of(slots, rows)
    if found is None:
        raise ValueError(f'{asked}: slots must be a positive number of rows or a share such as "1.5%"')
    return min(found, rows)


def parse_mapping(slots: Mapping[str, Any], groups: Sequence[Group], asked: str) -> tuple[int, ...]:
    """The slots of each group, from a mapping by one of its tables. Errors say who `asked`."""
    group_of = {name: number for number, group in enumerate(groups) for name in group.names}
    found: dict[int, str] = {}
    for name in slots:
        if name not in group_of:
            raise KeyError(f"{asked} names an unknown table {name!r}: the store has {', '.join(group_of)}")
        if group_of[name] in found:
            raise ValueError(
                f"{asked} names {found[group_of[name]]!r} and {name!r}, which share one buffer: name one table of each "
                "group, and give it the slots of all"
            )
        found[group_of[name]] = name
    if missing := [group.name for number, group in enumerate(groups) if number not in found]:
        raise ValueError(f"{asked} has no slots for the group of table {missing[0]!r}: name one table of each group")
    numbers = tuple(parse_slots(slots[found[number]], group.rows, asked) for number, group in enumerate(groups))
    if max(numbers) > _MOST_SLOTS:
        raise ValueError(f"{asked} asks for {max(numbers):,} slots: a cache holds fewer than 2**31 - 1")
    return numbers


def _parse_bytes(size: Any) -> int:
    found = None
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", size.lower())
        if match and match[2] in _UNITS:
            found = int(float(match[1]) * _UNITS[match[2]])
    elif isinstance(size, int | np.integer) and not isinstance(size, bool):
        found = int(size)
    if found is None or found < 1:
        raise ValueError(
            f"LookAhead(device_bytes={size!r}): device_bytes must be a positive number of bytes, or a size such as "
            '"4GiB"'
        )
    return found
