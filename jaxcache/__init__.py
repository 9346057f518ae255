"""jaxcache: train JAX models whose embedding tables do not fit on the accelerator."""

from jaxcache.check import check
from jaxcache.optimizers import RowOptimizer, Rows, rowwise_adagrad
from jaxcache.pipeline import LookAhead
from jaxcache.planner import TooFewSlots
from jaxcache.report import Report, Stage
from jaxcache.state import CacheState, Plan, init, lookup, update
from jaxcache.store import HostStore
from jaxcache.tables import Group, Initializer, Table, normal, uniform

__version__ = "0.1.0"

__all__ = [
    "CacheState",
    "Group",
    "HostStore",
    "Initializer",
    "LookAhead",
    "Plan",
    "Report",
    "RowOptimizer",
    "Rows",
    "Stage",
    "Table",
    "TooFewSlots",
    "check",
    "init",
    "lookup",
    "normal",
    "rowwise_adagrad",
    "uniform",
    "update",
]
