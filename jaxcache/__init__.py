"""jaxcache: train JAX models whose embedding tables do not fit on the accelerator."""

from jaxcache.check import check
from jaxcache.checkpoint import Checkpoint, SaveFigures
from jaxcache.counts import count_ids, hottest_rows
from jaxcache.features import Bags, Feature
from jaxcache.ondemand import admit, flush, init, merge, on_demand, prefetch, report, tap
from jaxcache.optimizers import RowOptimizer, Rows, catch_up_adam, rowwise_adagrad
from jaxcache.pipeline import LookAhead
from jaxcache.planner import TooFewSlots
from jaxcache.policies import Policy, frequency, lfu, lookahead, lru, no_cache, scratchpipe, static
from jaxcache.report import GroupReport, Report, Stage
from jaxcache.saved_tables import SavedTable, SavedTables
from jaxcache.schedule import HotReport, hot_batches
from jaxcache.state import CacheState, GroupCache, GroupPlan, Plan, lookup, release, update
from jaxcache.store import HostStore, RowStore
from jaxcache.tables import Group, Initializer, Table, normal, uniform

__version__ = "0.1.0"

__all__ = [
    "Bags",
    "CacheState",
    "Checkpoint",
    "Feature",
    "Group",
    "GroupCache",
    "GroupPlan",
    "GroupReport",
    "HostStore",
    "HotReport",
    "Initializer",
    "LookAhead",
    "Plan",
    "Policy",
    "Report",
    "RowOptimizer",
    "RowStore",
    "Rows",
    "SaveFigures",
    "SavedTable",
    "SavedTables",
    "Stage",
    "Table",
    "TooFewSlots",
    "admit",
    "catch_up_adam",
    "check",
    "count_ids",
    "flush",
    "frequency",
    "hot_batches",
    "hottest_rows",
    "init",
    "lfu",
    "lookahead",
    "lookup",
    "lru",
    "merge",
    "no_cache",
    "normal",
    "on_demand",
    "prefetch",
    "release",
    "report",
    "rowwise_adagrad",
    "scratchpipe",
    "static",
    "tap",
    "uniform",
    "update",
]
