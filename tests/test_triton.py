"""The Triton backend without a GPU: what its kernels compute, what they are compiled to, and how XLA gets them.

What they compute is found out by Triton's interpreter, in a program of its own: `triton_interpreter.py`.
"""

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import types
import zlib
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

triton = pytest.importorskip("triton", reason="Triton is missing: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import triton_interpreter  # noqa: E402
from jaxcache import kernels  # noqa: E402
from jaxcache.kernels import triton as backend  # noqa: E402
from jaxcache.kernels.cases import CASES, Case, Equal, _bags, named  # noqa: E402
from jaxcache.kernels.xla import FUSED, Gradients, Rule, Slots  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# What they compute


@functools.cache
def interpreted(slow):
    """What the quick checks, or the slow ones, found wrong, by their names; and how the program ended."""
    names = [name for name in triton_interpreter.CHECKS if (name in triton_interpreter.SLOW) == slow]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, triton_interpreter.__file__, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {}, done.stderr[-3000:]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in triton_interpreter.SLOW else ())
        for name in triton_interpreter.CHECKS
    ],
)
def test_kernels_compute_what_is_defined(name):
    found, errors = interpreted(name in triton_interpreter.SLOW)
    assert found, errors
    assert found[name] == []


# Shapes of cases


def shaped(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def shapes(case):
    """The arguments of the operations: buffer, slots, gradients, coefficients, words, accept."""
    lookups, dim = case.total, case.dim
    unique = min(case.rows, lookups) + 2
    ids = shaped((lookups,), jnp.int32)
    features, _ = _bags(case)
    rows = sum(feature.count for feature in features) if features else lookups
    gradients = Gradients(
        shaped((rows, dim)),
        ids if features else None,
        shaped((lookups,)) if case.weighted else None,
        ids,
        ids,
        shaped((unique + 1,), jnp.int32),
    )
    kept = Slots(
        shaped((case.slots, dim), case.dtype),
        tuple(shaped((case.slots, *leaf)) for leaf in case.state_shapes),
        shaped((case.slots,), jnp.int32),
        shaped((case.slots,), jnp.bool_),
    )
    coefficients = tuple(shaped(()) for _ in case.coefficients)
    words = shaped((unique, dim), jnp.uint32) if case.rounding == "stochastic" else None
    return kept, shaped((unique,), jnp.int32), gradients, coefficients, words, shaped((), jnp.bool_), features


def operations(case):
    """Each operation on the shapes of a case: a function and its arguments, the first being what it changes."""
    kept, slots, gradients, coefficients, words, accept, features = shapes(case)
    incoming = jax.tree.map(lambda leaf: shaped((*slots.shape, *leaf.shape[1:]), leaf.dtype), kept)

    def update(kept, slots, gradients, coefficients, words, accept):
        rule = Rule(lambda g, w, s: (w, s), case.optimizer, coefficients, case.rounding == "master", words)
        return backend.update(kept, slots, gradients, rule, accept)

    def pool(table, slots, inverse, weights, accept):
        return backend.pool(table, slots, inverse, features, weights, accept)

    found = {
        "gather": (backend.gather, kept.weights, slots, gradients.inverse, accept),
        "sum_occurrences": (backend.sum_occurrences, gradients),
        "update": (update, kept, slots, gradients, coefficients, words, accept),
        "exchange": (backend.exchange, kept, slots, incoming, accept),
    }
    if features:
        found["pool"] = (pool, kept.weights, slots, gradients.inverse, gradients.weights, accept)
    return found


class Launch(NamedTuple):
    """What `_launch` got."""

    kernel: Any
    grid: tuple[int, int]
    tile: Any
    results: dict
    replaced: dict
    arguments: dict
    constants: dict


def recorded(function, *arguments):
    """The jaxpr of an operation, without kernels, and what it launches."""
    launches = []

    def launch(*given):
        launches.append(Launch(*given))
        results, replaced = launches[-1].results, launches[-1].replaced
        return [jnp.zeros(result.shape, result.dtype) for result in results.values()], list(replaced.values())

    with mock.patch.object(backend, "_launch", launch):
        return jax.make_jaxpr(lambda *given: function(*given))(*arguments), launches  # a new function: not traced yet


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.bags and case.name != "all bags empty"], ids=lambda case: case.name
)
def test_nothing_of_the_size_of_lookups_times_columns_is_made_of_bags(case):
    for name in "pool", "update":
        jaxpr, launches = recorded(*operations(case)[name])
        made = [value.aval for equation in jaxpr.eqns for value in equation.outvars]
        made += [result for launch in launches for result in launch.results.values()]
        assert launches
        assert max(math.prod(value.shape) for value in made) < case.total * case.dim


def test_lists_are_cut_only_where_they_can_be_long():
    def kernels(name, case):
        return [
            (launch.kernel.__name__, launch.constants.get("LEVEL")) for launch in recorded(*operations(case)[name])[1]
        ]

    blocks, superblocks = ("_sum_blocks", 0), ("_sum_blocks", 1)
    write, update = ("_write_sums", None), ("_update_rows", None)
    for lookups, before in (64, []), (65, [blocks]), (4159, [blocks]), (4160, [blocks, superblocks]):
        assert kernels("update", Case("", lookups=lookups)) == [*before, update]
        assert kernels("sum_occurrences", Case("", lookups=lookups)) == [*before, write]
        assert kernels("pool", Case("", bags=(Equal(9, lookups), Equal(9, lookups)))) == [*before, write]
        assert kernels("pool", Case("", bags=(Equal(500, 64), Equal(9, lookups)))) == [*before, write]
    assert kernels("pool", Case("", bags=((60,), (60,)))) == [blocks, write]  # with padding, one could have 66
    assert kernels("pool", Case("", bags=((6,), (6,)))) == [write]


def test_sizes_of_buffers_and_batches_are_no_constants_of_kernels():
    """So that no other size compiles a kernel anew."""
    small = operations(Case("", bags=(Equal(300, 70), (700, 5000)), optimizer="adam"))
    large = operations(Case("", bags=(Equal(900, 80), (7000, 5)), optimizer="adam", slots=9000, rows=800))
    for name in small:
        kernels = [
            [(launch.kernel, launch.tile, launch.constants) for launch in recorded(*case[name])[1]]
            for case in (small, large)
        ]
        assert kernels[0] == kernels[1]


# What they are compiled to


def compiled(launch, capability, ptx_version=87):
    """As jax-triton compiles it; and what it takes, from Triton's assembler. That of Triton 3.6 takes no later PTX."""
    given = {**launch.arguments, **launch.replaced, **launch.results}
    constants = {**launch.constants, "ROWS": launch.tile.rows, "COLUMNS": launch.tile.columns}
    signature, attributes = {}, {}
    for number, name in enumerate(launch.kernel.arg_names):
        value = given.get(name)
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, int):
            signature[name] = "i32"
        else:
            signature[name] = "*" + triton_interpreter.short_name(value.dtype)
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = launch.tile.options | {"ptx_version": ptx_version}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        done = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    used = {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", done.stdout)}
    return kernel.asm["ptx"], used


@pytest.fixture(scope="module", autouse=True)
def no_old_kernels(tmp_path_factory):
    """Kernels that an earlier run compiled are not used again."""
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))):
        yield


def check_machine_code(case, capability, names=None):
    seen = set()
    for name, (function, *arguments) in operations(case).items():
        if names and name not in names:
            continue
        for launch in recorded(function, *arguments)[1]:
            ptx, used = compiled(launch, capability)
            seen.add(launch.kernel.__name__)
            assert used["STACK"] == used["LOCAL"] == 0, (name, used)
            assert used["REG"] <= 128
            # Rounded after every operation, and correctly.
            arithmetic = set(re.findall(r"\b((?:add|sub|mul|div|sqrt|fma|mad)\.\S*f32)\b", ptx))
            assert arithmetic <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
            if case.dim % 4 == 0 and case.dtype == "float32" and name != "exchange":
                assert re.search(r"ld\.global\S*\.v4\.b32", ptx) and re.search(r"st\.global\S*\.v4\.b32", ptx)
    return seen


WIDTHS = (4, 5, 48, 100, 128, 1000, 1024)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code(capability):
    case = Case(
        "", dim=128, bags=(Equal(3, 5000),), weighted=True, optimizer="adam", rounding="stochastic", dtype="bfloat16"
    )
    assert check_machine_code(case, capability) == {
        "_gather_rows", "_sum_blocks", "_write_sums", "_update_rows", "_exchange_rows"
    }  # fmt: skip
    check_machine_code(Case("", dim=100, lookups=60, optimizer="rowwise_adagrad"), capability, ("update",))


@pytest.mark.parametrize("capability, architecture", [(80, "sm_80"), (90, "sm_90a"), (100, "sm_100a")])
def test_the_oldest_assembler_that_jax_brings_takes_the_kernels(capability, architecture, tmp_path):
    """That of jax[cuda12], from the wheel nvidia-cuda-nvcc-cu12."""
    found = [path for place in sys.path if (path := Path(place) / "nvidia/cuda_nvcc/bin/ptxas").exists()]
    if not found:
        pytest.skip("the wheel nvidia-cuda-nvcc-cu12 is not installed")
    case = Case(
        "", dim=100, bags=(Equal(3, 5000),), weighted=True, optimizer="adam", rounding="master", dtype="float16"
    )
    for name, (function, *arguments) in operations(case).items():
        for launch in recorded(function, *arguments)[1]:
            version = launch.tile.options["ptx_version"]
            file = tmp_path / f"{name}.ptx"
            file.write_text(compiled(launch, capability, version)[0])
            command = [found[0], "-v", f"-arch={architecture}", file, "-o", tmp_path / "out.cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            spills = re.findall(r"(\d+) bytes spill", done.stderr)
            assert spills and set(spills) == {"0"}, done.stderr


@pytest.mark.parametrize("dim", [130, 1024])
def test_all_warps_of_a_row_read_its_accumulator_before_it_is_written(dim):
    case = Case("", dim=dim, lookups=60, optimizer="rowwise_adagrad")
    [update] = recorded(*operations(case)["update"])[1]
    ptx, _ = compiled(update, 90)
    read, barrier, written = ptx.index("sqrt.rn.f32"), ptx.rindex("bar.sync"), ptx.index("st.global")
    assert read < barrier < written


@pytest.mark.parametrize("dim", [1, 5, 128])
def test_all_threads_read_what_leaves_before_one_writes_what_comes(dim):
    for launch in recorded(*operations(Case("", dim=dim))["exchange"])[1]:
        ptx, _ = compiled(launch, 90)
        before, after = ptx.split("bar.sync")
        assert len(re.findall(r"ld\.global", before)) >= 2 and "st.global" in before  # slots, and what leaves
        assert "st.global" in after and "ld.param" not in after


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("dim", WIDTHS)
def test_machine_code_of_all_rules(dim, optimizer):
    check_machine_code(Case("", dim=dim, lookups=5000, optimizer=optimizer), 90, ("update",))
    case = Case("", dim=dim, lookups=5000, optimizer=optimizer, dtype="float16", rounding="stochastic", weighted=True)
    check_machine_code(case, 80, ("update",))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", WIDTHS)
def test_machine_code_of_all_widths(dim, dtype):
    case = Case("", dim=dim, dtype=dtype, bags=((5000, 2),), rounding="master", optimizer="momentum")
    check_machine_code(case, 90, ("gather", "pool", "sum_occurrences", "exchange"))


# How XLA gets them


@contextlib.contextmanager
def device(kind):
    """Lowers for a GPU that is not there."""
    abstract = jax.sharding.AbstractDevice(kind, None, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def obstacle():
    """Why kernels cannot be lowered here."""
    try:
        backend.load()
        from jaxlib.gpu_triton import TritonKernel  # noqa: F401
    except ImportError as error:
        return f"{error}: needs jax-triton >= 0.4.1 and the wheel of JAX's plugin for CUDA"
    return None


def targets(text):
    """Version of PTX, and kind of GPU, of the kernels in a program: PTX is in their compressed configuration."""
    found = set()
    for call in re.findall(r"@triton_kernel_call_ffi.*?opaque = \"(.*?)\"", text):
        call = call.replace(r"\\", r"\5C").encode()
        escaped = re.sub(rb"\\([0-9A-F]{2})", lambda code: bytes([int(code[1], 16)]), call)
        found |= set(re.findall(rb"\.version (\S+)\s+\.target (\w+)", zlib.decompress(escaped)))
    return found


def test_without_jax_triton_the_backend_is_not_chosen():
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    backend.load.cache_clear()
    with mock.patch.dict(sys.modules, jax_triton=None), mock.patch.object(kernels, "_VERSION", (0, 0)):
        assert "jax_triton" in kernels.obstacle("triton", gpu)
        assert kernels.choose("exchange=xla", gpu).gather[0] != "triton"


lowering = pytest.mark.skipif(obstacle() is not None, reason=obstacle() or "")

# To lower one takes seconds.
QUICK = ("dim 100, bfloat16, stochastic, adam", "features of all kinds", "DLRM, dim 128")


@lowering
@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, kind) for name in QUICK for kind in ("NVIDIA A100", "NVIDIA H100")),
        *(pytest.param(case.name, "NVIDIA H100", marks=pytest.mark.slow) for case in CASES if case.name not in QUICK),
    ],
)
def test_lowers_in_place(name, kind):
    case = named(name)
    kept = 3 + len(case.state_shapes)
    for operation, (function, *arguments) in operations(case).items():
        with device(kind):
            donated = (0,) if operation in ("update", "exchange") else ()
            lowered = jax.jit(function, donate_argnums=donated).trace(*arguments).lower(lowering_platforms=("cuda",))
        text = lowered.as_text()
        assert targets(text) == {(b"8.8", b"sm_80" if "A100" in kind else b"sm_90a")}
        aliased = kept if operation in ("update", "exchange") else 0
        assert text.count("#stablehlo.output_operand_alias<") == aliased
        assert text.count("tf.aliasing_output") == aliased


@lowering
@pytest.mark.slow
@pytest.mark.parametrize("name", ["update", "exchange"])
@pytest.mark.parametrize("case", ["DLRM, dim 128, bfloat16", "DLRM, dim 16", "DLRM, dim 100, adam"])
def test_a_donated_buffer_is_changed_in_place(case, name):
    """In what XLA makes of it for a GPU of compute capability 9.0 that the environment variable describes."""
    config = os.environ.get("JAXCACHE_TARGET_CONFIG")
    if config is None:
        pytest.skip("JAXCACHE_TARGET_CONFIG does not name a file with XLA's description of a GPU")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=Path(config).read_text(), topology="1x1x1"
        )
    except Exception as error:
        pytest.skip(f"no compiler for this GPU here: {error}")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    function, *arguments = operations(named(case))[name]
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments[0]))
    # It does not say by itself what the kernels are to be compiled for.
    call = functools.partial(backend.load().triton_call, compute_capability=90)
    with mock.patch.object(backend.load(), "triton_call", call):
        figures = jax.jit(function, donate_argnums=0).lower(*arguments).compile().memory_analysis()
    assert figures.alias_size_in_bytes >= size
    assert figures.temp_size_in_bytes < size / 20
