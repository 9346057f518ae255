"""Strict JAX and the hypothesis profile, for every test."""

import os

import jax
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("jaxcache", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("jaxcache")
