"""Gather, update and exchange of rows: arrays in, arrays out, with no knowledge of caches or plans.

`xla.py` is the definition of every operation and runs everywhere. `triton.py` and `mosaic.py` have versions for GPUs
and refuse, with NotImplementedError and only so, what they cannot do. Which backend runs what is decided here and
nowhere else: `choose` makes a `Choice`, and the operations below try the backends that it names, in its order; where
others refuse and XLA is left, they warn.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from . import xla
from .xla import BLOCK, FUSED, LEVELS, Bags, Gradients, Rule, Slots, add_counts, read, rewrite

__all__ = [
    "BACKENDS",
    "BLOCK",
    "ENVIRONMENT",
    "FUSED",
    "LEVELS",
    "SPEEDS",
    "XLA",
    "Bags",
    "Choice",
    "Gradients",
    "Rule",
    "Slots",
    "add_counts",
    "choose",
    "describe",
    "exchange",
    "gather",
    "obstacle",
    "pool",
    "read",
    "rewrite",
    "sum_occurrences",
    "update",
]

BACKENDS = ("triton", "mosaic", "xla")
ENVIRONMENT = "JAXCACHE_KERNELS"

# What each backend has, beside XLA, which has everything.
_OPERATIONS = {"triton": ("gather", "update", "exchange"), "mosaic": ("gather", "update")}
_CAPABILITY = {"triton": 8.0, "mosaic": 9.0}
_VERSION = (0, 11)

# Of a kind of device, as `jax.Device.device_kind` names it, and an operation the backends that were measured there by
# `benchmarks/gpu.py`, the fastest first. Where nothing is noted the order is that of BACKENDS.
SPEEDS: dict[str, dict[str, tuple[str, ...]]] = {}


class Choice(NamedTuple):
    """The backends to try for each operation, in order; all but the last may refuse. Static: it can be compared."""

    gather: tuple[str, ...]
    update: tuple[str, ...]
    exchange: tuple[str, ...]


XLA = Choice(("xla",), ("xla",), ("xla",))


def choose(request: str | Mapping[str, str] | Choice | None = None, device: jax.Device | None = None) -> Choice:
    """Decides which backends run what on a device.

    Args:
        request: a backend for all operations, "triton"; or for some, "gather=mosaic,update=triton" or a mapping. A
            backend that is asked for is the only one for its operation, but for operations that it does not have when
            it was asked for all. None: what the environment variable JAXCACHE_KERNELS says, in the same words. What is
            open after that is decided by what runs on the device, the fastest that was measured on its kind first; but
            XLA, which on a GPU adds in no fixed order, sums only what no other can. A `Choice` is returned as it is.
        device: the default one if None.

    Raises:
        ValueError: for names of no backend or operation, or an operation that the backend does not have.
        NotImplementedError: for a backend that does not run on the device.

    >>> choose("gather=xla", jax.devices("cpu")[0]).gather
    ('xla',)
    """
    if isinstance(request, Choice):
        return request
    if request is None:
        request, source = os.environ.get(ENVIRONMENT), f"the environment variable {ENVIRONMENT}"
    else:
        source = "backends"
    asked = _parse(request, source)
    device = _default_device() if device is None else device
    obstacles = {name: obstacle(name, device) for name in BACKENDS}
    for name in asked.values():
        if obstacles[name] is not None:
            raise NotImplementedError(f"{source}: {name} {obstacles[name]}; leave it out, or ask for xla")
    usable = [name for name in BACKENDS if obstacles[name] is None]
    speeds = SPEEDS.get(device.device_kind, {})

    def order(operation: str) -> tuple[str, ...]:
        if operation in asked:
            return (asked[operation],)
        able = [name for name in usable if name == "xla" or operation in _OPERATIONS[name]]
        fastest = [name for name in speeds.get(operation, ()) if name in able]
        names = [*fastest, *(name for name in able if name not in fastest)]
        if operation != "exchange":
            # XLA scatters sums on a GPU in no fixed order, those of ragged bags too.
            names = [*(name for name in names if name != "xla"), "xla"]
        return tuple(names[: names.index("xla") + 1])  # it never refuses: none behind it is reached

    return Choice(*map(order, Choice._fields))


def _parse(request: str | Mapping[str, str] | None, source: str) -> dict[str, str]:
    """The backend of each operation that is named."""
    if not request:
        return {}
    if isinstance(request, str) and request in BACKENDS:
        return {
            operation: request if request == "xla" or operation in _OPERATIONS[request] else "xla"
            for operation in Choice._fields
        }
    if isinstance(request, str):
        split = (part.partition("=") for part in request.replace(" ", "").split(","))
        pairs = {operation: backend for operation, _, backend in split}
    else:
        pairs = dict(request)
    for operation, backend in pairs.items():
        if operation not in Choice._fields or backend not in BACKENDS:
            raise ValueError(
                f"{source}: got {request!r}, expected one of {', '.join(BACKENDS)}, or pairs such as "
                f"'gather=triton,update=xla' of the operations {', '.join(Choice._fields)}"
            )
        if backend != "xla" and operation not in _OPERATIONS[backend]:
            raise ValueError(f"{source}: {backend} has no {operation}: use one of the others, {BACKENDS}")
    return pairs


def obstacle(backend: str, device: jax.Device) -> str | None:
    """Why a backend cannot run on a device; None if it can."""
    if backend == "xla":
        return None
    if device.platform not in ("gpu", "cuda") or "nvidia" not in device.device_kind.lower():
        return f"needs an NVIDIA GPU, this is {device.device_kind}"
    capability = getattr(device, "compute_capability", None)
    if capability is None or float(capability) < _CAPABILITY[backend]:
        return f"needs compute capability {_CAPABILITY[backend]}, this device has {capability}"
    if jax.__version_info__ < _VERSION:
        return f"needs JAX {'.'.join(map(str, _VERSION))} or later, this is {jax.__version__}"
    try:
        # What a backend needs to run, though not to be imported, it imports in `load`.
        getattr(_module(backend), "load", lambda: None)()
    except ImportError as error:
        return f"needs what cannot be imported: {error}; it comes with pip install 'jaxcache[cuda12]' or [cuda13]"
    return None


def describe(request: str | Mapping[str, str] | None = None, device: jax.Device | None = None) -> str:
    """What `choose` decides and why, in lines to be read.

    >>> print(describe("xla", jax.devices("cpu")[0]).splitlines()[1])
    gather    xla
    """
    device = _default_device() if device is None else device
    choice = choose(request, device)
    lines = [f"{device.platform}: {device.device_kind}, JAX {jax.__version__}"]
    lines += [f"{name:9} {', then '.join(backends)}" for name, backends in choice._asdict().items()]
    for backend in BACKENDS:
        reason = obstacle(backend, device)
        operations = ", ".join(_OPERATIONS.get(backend, Choice._fields))
        lines.append(f"{backend:9} {f'runs here: {operations}' if reason is None else reason}")
    if device.platform != "cpu" and "xla" in (choice.gather[0], choice.update[0]):
        lines.append("XLA adds in no fixed order here, unless XLA_FLAGS has --xla_gpu_deterministic_ops=true")
    if request is not None:
        lines.append("asked for: " + str(request))
    elif os.environ.get(ENVIRONMENT):
        lines.append(f"{ENVIRONMENT}: {os.environ[ENVIRONMENT]}")
    known = device.device_kind in SPEEDS
    lines.append(f"measured: {SPEEDS[device.device_kind] if known else 'nothing on this kind of device'}")
    return "\n".join(lines)


def _default_device() -> jax.Device:
    device = getattr(jax.config, "jax_default_device", None) or jax.local_devices()[0]
    return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def _module(backend: str) -> Any:
    return xla if backend == "xla" else importlib.import_module(f"{__name__}.{backend}")


def _dispatch(backends: Sequence[str], operation: str, *arguments: Any) -> Any:
    reasons: list[str] = []
    refusal: NotImplementedError | None = None
    for name in backends:
        if reasons and name == "xla":
            warnings.warn(f"XLA does this {operation} instead of {'; '.join(reasons)}", stacklevel=3)
        try:
            return getattr(_module(name), operation)(*arguments)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
            refusal = error
    raise NotImplementedError(f"no backend of {backends} can do this {operation}; {'; '.join(reasons)}") from refusal


def gather(table: Any, slots: Any, inverse: Any, accept: Any, *, choice: Choice = XLA) -> jax.Array:
    """The row of every lookup: see `xla.gather`."""
    return _dispatch(choice.gather, "gather", table, slots, inverse, accept)


def pool(
    table: Any,
    slots: Any,
    inverse: Any,
    bags: Sequence[Bags],
    weights: Any | None,
    accept: Any,
    *,
    choice: Choice = XLA,
) -> jax.Array:
    """The weighted sums of bags of rows: see `xla.pool`."""
    return _dispatch(choice.gather, "pool", table, slots, inverse, bags, weights, accept)


def sum_occurrences(gradients: Gradients, *, choice: Choice = XLA) -> jax.Array:
    """The sum of the gradients of each unique row's lookups: see `xla.sum_occurrences`."""
    return _dispatch(choice.update, "sum_occurrences", gradients)


def update(kept: Slots, slots: Any, gradients: Gradients, rule: Rule, accept: Any, *, choice: Choice = XLA) -> Slots:
    """Sums the gradients of each unique row and applies a row optimizer: see `xla.update`."""
    return _dispatch(choice.update, "update", kept, slots, gradients, rule, accept)


def exchange(buffer: Any, slots: Any, incoming: Any, accept: Any, *, choice: Choice = XLA) -> tuple[Any, Any]:
    """Takes rows out of the buffer and puts others in their place: see `xla.exchange`."""
    return _dispatch(choice.exchange, "exchange", buffer, slots, incoming, accept)
