"""Gather, update and exchange of rows: arrays in, arrays out, with no knowledge of caches or plans.

`xla.py` is the definition of every operation. Other backends will override single operations here, in this one place.
"""

from .xla import exchange, gather, read, sum_occurrences, update

__all__ = ["exchange", "gather", "read", "sum_occurrences", "update"]
