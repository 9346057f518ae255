"""The examples in the docstrings of every module give what they show."""

import doctest
import importlib.util
import pkgutil

import pytest

import jaxcache

NEEDS = {"jaxcache.kernels.triton": "triton"}  # modules that cannot be imported everywhere, and what they need


def module_names():
    names = ["jaxcache", *(module.name for module in pkgutil.walk_packages(jaxcache.__path__, "jaxcache."))]
    return [name for name in names if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]


def examples():
    """Every docstring with examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [
        test for name in module_names() for test in finder.find(importlib.import_module(name), name) if test.examples
    ]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_example(example):
    runner, output = doctest.DocTestRunner(), []
    results = runner.run(example, out=output.append)
    assert results.attempted == len(example.examples) and not results.failed, "".join(output)


def test_every_module_is_searched():
    """The kernels, which live in a folder of their own, among them."""
    assert {"jaxcache", "jaxcache.pipeline", "jaxcache.kernels", "jaxcache.kernels.xla"} <= set(module_names())
    names = {example.name for example in examples()}
    assert {"jaxcache.pipeline.LookAhead", "jaxcache.tables.Group", "jaxcache.store.HostStore"} <= names
