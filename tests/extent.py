"""How much is tried: as much as CI can wait for, or with JAXCACHE_TESTS=long everything, which takes twice as long."""

import os

import pytest

LONG = os.environ.get("JAXCACHE_TESTS") == "long"


def long(reason):
    """Leaves a test, or some of its parameters, to JAXCACHE_TESTS=long; `reason` says what CI tries instead."""
    return pytest.mark.skipif(not LONG, reason=f"for JAXCACHE_TESTS=long: {reason}")


def examples(few, many):
    """How many examples hypothesis draws."""
    return many if LONG else few
