"""The Mosaic GPU kernels: by JAX's interpreter against `xla.py` and NumPy; lowered, and compiled, for an H100.

The interpreter runs programs one after the other and a warpgroup as one thread; memory that nothing has written is NaN
to it, and an access out of bounds an error. What it cannot show, that threads which hold copies of a row do not write
it before the others have read it, and which instructions become of the arithmetic, is read off the compiled kernels.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache import rounding
from jaxcache.kernels import BLOCK, FUSED, Bags, Gradients, Rule, Slots, add_counts, xla
from jaxcache.kernels.cases import CASES, Case, Equal, Problem, named
from oracle import tree_sum

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11 or later", allow_module_level=True)

from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcache.kernels import mosaic

TARGET = os.environ.get("JAXCACHE_TARGET_CONFIG")


def interpreted(function, *arguments):
    """The result of a function under jit, its kernels interpreted."""

    def run(*arguments):
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            return function(*arguments)

    return jax.jit(run)(*arguments)


def equal(found, expected):
    """The same bits, but for the sign of zero."""
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), found, expected)


# The cases that the interpreter can do in a second or two each.

WIDTHS = [
    dataclasses.replace(case, slots=30, rows=20, lookups=45)
    for case in CASES
    if not case.measured and case.name.startswith("dim ")
]
MORE_WIDTHS = [
    Case("dim 1, momentum", dim=1, slots=9, rows=5, lookups=12, optimizer="momentum"),
    Case("dim 127, float16, stochastic, rowwise adagrad", dim=127, dtype="float16", slots=9, rows=5, lookups=12,
         optimizer="rowwise_adagrad", rounding="stochastic"),
    Case("dim 255, float16, master, adam", dim=255, dtype="float16", slots=9, rows=5, lookups=12, optimizer="adam",
         rounding="master"),
    Case("dim 769", dim=769, slots=9, rows=5, lookups=12),
]  # fmt: skip
SKEWS = [
    named("all lookups of one row"),
    named("all lookups of one row, 5,000"),  # 74 blocks: more than BLOCK
    dataclasses.replace(named("all rows distinct"), lookups=70),
    dataclasses.replace(named("one row has 82 %"), lookups=600, rows=20),
    named("one lookup"),
    dataclasses.replace(named("nothing but padding"), lookups=70),
]
BAGS = [
    dataclasses.replace(case, slots=60, rows=30)
    for case in CASES
    if case.bags and not case.measured
    if case.name != "a bag of 10,000"
] + [dataclasses.replace(named("a bag of 10,000"), name="a bag of 4,500", bags=((2, 4500, 0, 1),), slots=9, rows=5)]
LARGE = [named("3 rows, 16,384 lookups"), named("a bag of 10,000")]


def over(*cases, slow=()):
    return pytest.mark.parametrize(
        "case",
        [*cases, *(pytest.param(case, marks=pytest.mark.slow) for case in slow)],
        ids=lambda case: case.name,
    )


@over(*WIDTHS, *MORE_WIDTHS, *SKEWS[2:3], *SKEWS[-2:])
def test_gather(case):
    problem = Problem(case)
    table = problem.kept.weights
    found = interpreted(mosaic.gather, table, problem.slots, problem.inverse, True)
    equal(found, jax.jit(xla.gather)(table, problem.slots, problem.inverse, True))


def pooled(problem, table, weights, accept=True):
    def pool(table, slots, inverse, weights, accept):
        return mosaic.pool(table, slots, inverse, problem.bags, weights, accept)

    return interpreted(pool, table, problem.slots, problem.inverse, weights, accept)


def bags_of(problem):
    """The positions of each bag's lookups."""
    start = 0
    for feature in problem.bags:
        if feature.owners is None:
            yield from start + np.arange(feature.lookups).reshape(feature.count, -1)
        else:
            yield from (start + np.flatnonzero(feature.owners == bag) for bag in range(feature.count))
        start += feature.lookups


@over(*BAGS[:-1], slow=(BAGS[-1], *LARGE[1:]))
def test_pool(case):
    problem = Problem(case)
    table = problem.kept.weights
    rows = np.asarray(jax.jit(xla.gather)(table, problem.slots, problem.inverse, True))
    weights = problem.weights
    if weights is not None:
        rows = rows * weights[:, None]
        weights = np.where(problem.inverse < len(problem.slots), weights, np.nan)  # the rest is not looked at
    equal(pooled(problem, table, weights), np.array([tree_sum(rows[bag]) for bag in bags_of(problem)]))


@over(*SKEWS[:1], *SKEWS[2:4], *BAGS[-3:-1], slow=(SKEWS[1], *BAGS[:-3], *LARGE))
def test_sum_occurrences(case):
    gradients = Problem(case).gradients
    equal(interpreted(mosaic.sum_occurrences, gradients), jax.jit(xla.sum_occurrences)(gradients))


def test_the_tree_has_all_its_levels_somewhere():
    """Else the cases above would not show it."""
    longest = [np.diff(Problem(case).starts).max() for case in SKEWS]
    assert any(BLOCK < n <= BLOCK * BLOCK for n in longest) and any(n >= (BLOCK + 1) * BLOCK for n in longest)


def formulas(name, c, g, w, state, total=None):
    """The rules of FUSED in NumPy: float32, every operation rounded. `total`: rowwise adagrad's new accumulator."""
    match name:
        case "sgd":
            return w + c["rate"] * g, ()
        case "momentum":
            m = g + c["decay"] * state[0]
            return w + c["rate"] * m, (m,)
        case "adagrad":
            s = state[0] + g * g
            return w + c["rate"] * np.where(s > 0, g / np.sqrt(s + c["eps"]), np.float32(0)), (s,)
        case "rowwise_adagrad":
            return w + c["rate"] * (g / (np.sqrt(total) + c["eps"])), (total,)
        case "adam":
            m = c["b1"] * state[0] + c["one_minus_b1"] * g
            v = c["b2"] * state[1] + c["one_minus_b2"] * (g * g)
            step = (m / c["correction1"]) / (np.sqrt(v / c["correction2"] + c["eps_root"]) + c["eps"])
            return w + c["rate"] * step, (m, v)


def updated(problem, accept=True):
    """What the kernels make of everything that is kept."""
    case = problem.case
    coefficients = tuple(np.float32(value) for value in case.coefficients)

    def update(kept, slots, gradients, coefficients, words, accept):
        rule = Rule(None, case.optimizer, coefficients, case.rounding == "master", words)
        return mosaic.update(kept, slots, gradients, rule, accept)

    return interpreted(
        update, problem.kept, problem.slots, problem.gradients, coefficients, problem.words, np.bool(accept)
    )


@over(*WIDTHS, *MORE_WIDTHS, *SKEWS[:2], *SKEWS[4:], BAGS[0], slow=(SKEWS[3], *LARGE))
def test_update(case):
    problem = Problem(case)
    kept, real = problem.kept, problem.slots < case.slots
    places = problem.slots[real]
    found = jax.tree.map(np.asarray, updated(problem))
    summed = np.asarray(jax.jit(xla.sum_occurrences)(problem.gradients))[real]
    old = jax.tree.map(lambda leaf: leaf[places], kept)

    c = dict(zip(FUSED[case.optimizer], map(np.float32, case.coefficients), strict=True))
    w, state = old.weights.astype(np.float32), old.state
    if case.rounding == "master":
        w, *state = state
    total = None
    if case.optimizer == "rowwise_adagrad":
        # The order of the mean's sum is the compiler's: the new accumulator within 4 units in the last place, and what
        # follows from it exactly.
        total = found.state[-1][places]
        mean = np.mean(summed.astype(np.float64) ** 2, axis=1, keepdims=True)
        np.testing.assert_allclose(total, state[-1] + mean, rtol=4 * 2.0**-23)
    w, state = formulas(case.optimizer, c, summed, w, state, total)
    if case.rounding == "stochastic":
        rounded = np.asarray(rounding.round_stochastically(jnp.asarray(w), problem.words[real], kept.weights.dtype))
    else:
        rounded = w.astype(kept.weights.dtype)
    if case.rounding == "master":
        state = (w, *state)
    counts = np.asarray(add_counts(jnp.asarray(old.counts), np.diff(problem.starts)[real]))
    expected = jax.tree.map(np.copy, kept)
    for leaf, rows in zip(jax.tree.leaves(expected), [rounded, *state, counts, True], strict=True):
        leaf[places] = rows
    equal(found, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_of_all_sizes(dtype):
    """Subnormal numbers, the largest, infinities and NaN, by an update that changes nothing but the dtype."""
    exponents = np.arange(0, 256, dtype=np.uint32)
    random = np.random.default_rng(0)
    bits = (exponents[:, None] << 23) | random.integers(0, 2**23, (256, 8), dtype=np.uint32)
    bits = (bits | (random.integers(0, 2, bits.shape, dtype=np.uint32) << 31)).reshape(16, 128)
    bits[0, :6] = np.array([0, 1, 0x7F800000, 0x80000000, 0x33000000, 0x477FF000], np.uint32)
    words = random.integers(0, 2**32, bits.shape, dtype=np.uint32)
    values = jnp.asarray(bits.view(np.float32))

    def kernel(values, words, out):
        (value,), (word,) = (
            mosaic._load(values, jax.lax.axis_index("row")),
            mosaic._load(words, jax.lax.axis_index("row")),
        )
        mosaic._store(out, jax.lax.axis_index("row"), (mosaic._round_stochastically(value, word, jnp.dtype(dtype)),))

    out = jax.ShapeDtypeStruct(values.shape, dtype)
    run = plgpu.kernel(kernel, out_type=out, grid=(16,), grid_names=("row",))
    found = np.asarray(interpreted(run, values, words)).astype(np.float32)
    expected = np.asarray(rounding.round_stochastically(values, words, dtype)).astype(np.float32)
    equal(found, expected)


def test_nothing_changes_where_accept_is_false():
    problem = Problem(dataclasses.replace(WIDTHS[1], bags=(Equal(5, 3), (2, 0, 1)), optimizer="rowwise_adagrad"))
    equal(updated(problem, accept=False), problem.kept)
    table = problem.kept.weights
    found = interpreted(mosaic.gather, table, problem.slots, problem.inverse, np.bool(False))
    assert np.isnan(found).all() and found.shape == (problem.case.total, 5)
    assert np.isnan(pooled(problem, table, None, np.bool(False))).all()


def test_a_rule_without_a_name_is_applied_by_its_definition():
    problem = Problem(WIDTHS[0])

    def halve(summed, weights, state):
        return weights * 0.5 + summed, state

    arguments = (problem.kept, problem.slots, problem.gradients)
    found = interpreted(lambda *a: mosaic.update(*a, Rule(halve), True), *arguments)
    equal(found, jax.jit(lambda *a: xla.update(*a, Rule(halve), True))(*arguments))


def test_padding_in_all_places():
    """Padding before a real slot; lookups of it and of none, one beyond the last and far beyond."""
    table = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    slots, inverse = np.array([3, 1, 99, 3, 2], np.int32), np.array([4, 0, 1, 2, 5, 77, 1], np.int32)
    expected = table[[2, 0, 1, 0, 0, 0, 1]] * (np.array([1, 0, 1, 0, 0, 0, 1], np.float32)[:, None])
    equal(interpreted(mosaic.gather, table, slots, inverse, True), expected)
    order = np.argsort(inverse, kind="stable").astype(np.int32)
    starts = np.searchsorted(inverse[order], np.arange(6)).astype(np.int32)
    gradients = Gradients(np.ones((7, 4), np.float32), None, None, inverse, order, starts)
    kept = Slots(table, (table,), np.zeros(3, np.int32), np.zeros(3, bool))

    def update(kept):
        rule = Rule(None, "momentum", (jnp.float32(0.5), jnp.float32(-1)))
        return mosaic.update(kept, slots, gradients, rule, True)

    momentum = table.copy()
    momentum[1:] = 0.5 * momentum[1:] + np.float32([[2], [1]])
    weights = table - np.float32([[0], [1], [1]]) * momentum
    expected = Slots(weights, (momentum,), np.array([0, 2, 1], np.int32), np.array([False, True, True]))
    equal(interpreted(update, kept), expected)


def test_nothing_to_look_up():
    table, none = np.ones((3, 5), np.float32), np.zeros(0, np.int32)
    slots, far = np.array([2, 0], np.int32), np.array([7, 0], np.int32)
    assert interpreted(mosaic.gather, table, slots, none, True).shape == (0, 5)
    equal(interpreted(mosaic.gather, table, none, far, True), np.zeros((2, 5), np.float32))
    bags = (Bags(0, 0), Bags(2, 0), Bags(1, 0, none, np.zeros(2, np.int32)))
    found = interpreted(lambda t, s, i: mosaic.pool(t, s, i, bags, None, True), table, slots, none)
    equal(found, np.zeros((3, 5), np.float32))
    assert interpreted(lambda t, s, i: mosaic.pool(t, s, i, (), None, True), table, slots, none).shape == (0, 5)
    nothing = Gradients(np.zeros((0, 5), np.float32), None, None, none, none, np.zeros(3, np.int32))
    equal(interpreted(mosaic.sum_occurrences, nothing), np.zeros((2, 5), np.float32))
    kept = Slots(table, (2 * table,), np.zeros(3, np.int32), np.zeros(3, bool))

    def update(kept, slots, gradients):
        rule = Rule(None, "momentum", (jnp.float32(0.5), jnp.float32(-1)))
        return mosaic.update(kept, slots, gradients, rule, True)

    expected = Slots(
        table - [[1], [0], [1]], (1 + np.float32([[0], [1], [0]]) * table,), kept.counts, np.array([True, False, True])
    )
    found = interpreted(update, kept, slots, nothing)
    equal(found, jax.tree.map(lambda new, old: new.astype(old.dtype), expected, kept))
    equal(interpreted(update, kept, none, nothing._replace(starts=np.zeros(1, np.int32))), kept)


def test_pieces_make_up_a_row_and_vectors_are_aligned():
    for dim in range(1, 1025):
        pieces = mosaic._pieces(dim)
        assert [*itertools.chain.from_iterable(range(first, first + size) for first, size in pieces)] == [*range(dim)]
        for first, size in pieces:
            if size > 1:
                layout = mosaic._layout(dim, size).to_mgpu()
                vector = getattr(layout, "vec_size", None) or layout.vector_length
                assert dim % vector == 0 and first % vector == 0 and vector <= 4


# Lowering


def shapes_of(case, shape):
    """The arrays of a case, by `shape(shape, dtype)`: kept, slots, inverse, bags' arrays, weights, gradients and the
    rest of a rule."""
    real = min(case.rows, case.total)
    unique, lookups = real + 2, case.total
    ints = functools.partial(shape, dtype=np.int32)
    bags = []
    for bag in case.bags:
        if isinstance(bag, Equal):
            bags.append(Bags(bag.bags, bag.bags * bag.lookups))
        else:
            size = dataclasses.replace(case, bags=(bag,)).total
            bags.append(Bags(len(bag), size, ints((size,)), ints((len(bag) + 1,))))
    count = sum(bag.count for bag in bags) if bags else lookups
    weights = shape((lookups,), np.float32) if case.weighted else None
    kept = Slots(
        shape((case.slots, case.dim), jnp.dtype(case.dtype)),
        tuple(shape((case.slots, *s), np.float32) for s in case.state_shapes),
        ints((case.slots,)),
        shape((case.slots,), np.bool),
    )
    gradients = Gradients(
        shape((count, case.dim), np.float32),
        ints((lookups,)) if bags else None,
        weights,
        ints((lookups,)),
        ints((lookups,)),
        ints((unique + 1,)),
    )
    coefficients = tuple(shape((), np.float32) for _ in FUSED[case.optimizer])
    words = shape((unique, case.dim), np.uint32) if case.rounding == "stochastic" else None
    return kept, ints((unique,)), bags, gradients, (coefficients, words), shape((), np.bool)


def operations(case, shape):
    """Each operation of a case, as a function and its arguments: gather or pool, sum_occurrences, update."""
    kept, slots, bags, gradients, rule, accept = shapes_of(case, shape)
    sizes = [(bag.count, bag.lookups) for bag in bags]
    ragged = [(bag.owners, bag.offsets) for bag in bags]

    def pool(table, slots, inverse, ragged, weights, accept):
        bags = [Bags(*size, *arrays) for size, arrays in zip(sizes, ragged, strict=True)]
        return mosaic.pool(table, slots, inverse, bags, weights, accept)

    def update(kept, slots, gradients, rule, accept):
        coefficients, words = rule
        rule = Rule(None, case.optimizer, coefficients, case.rounding == "master", words)
        return mosaic.update(kept, slots, gradients, rule, accept)

    if bags:
        yield pool, (kept.weights, slots, gradients.inverse, ragged, gradients.weights, accept)
    else:
        yield mosaic.gather, (kept.weights, slots, gradients.inverse, accept)
    yield mosaic.sum_occurrences, (gradients,)
    yield update, (kept, slots, gradients, rule, accept)


def lowered(function, *arguments):
    """As text, for a GPU that is not here."""
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu"),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def launches(lookups):
    """Of the sum of lists of up to so many terms."""
    return 1 + (lookups > BLOCK) + (lookups // BLOCK > BLOCK)


@over(
    *(case for case in CASES if case.measured or case.bags or case.name.startswith("dim ")),
    slow=(*(case for case in CASES if not (case.measured or case.bags or case.name.startswith("dim "))), *MORE_WIDTHS),
)
def test_every_case_lowers(case):
    longest = max((bag.lookups if isinstance(bag, Equal) else sum(bag) for bag in case.bags), default=0)
    sums = launches(case.total)
    expected = [launches(longest) if case.bags else 1, sums, sums]
    for (function, arguments), count in zip(operations(case, jax.ShapeDtypeStruct), expected, strict=True):
        text = lowered(function, *arguments)
        assert len(re.findall(r"custom_call @mosaic_gpu", text)) == count, function.__name__


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_dims_lower(dtype):
    for dim in [
        *range(1, 36),
        63,
        64,
        65,
        96,
        127,
        129,
        192,
        200,
        256,
        257,
        300,
        511,
        512,
        513,
        640,
        700,
        900,
        1023,
        1024,
    ]:
        case = Case(f"dim {dim}", dim=dim, dtype=dtype)
        function, arguments = next(operations(case, jax.ShapeDtypeStruct))
        lowered(function, *arguments)


def refused(case, **changes):
    """The message with which an update is refused."""
    kept, slots, _, gradients, (coefficients, words), accept = shapes_of(case, jnp.zeros)
    rule = Rule(None, case.optimizer, coefficients, case.rounding == "master", words)
    arguments = {"kept": kept, "slots": slots, "gradients": gradients, "rule": rule, "accept": accept}
    with pytest.raises(NotImplementedError) as raised:
        lowered(lambda: mosaic.update(**arguments | {key: change(arguments[key]) for key, change in changes.items()}))
    return str(raised.value)


def test_what_is_refused():
    case, ints = dataclasses.replace(WIDTHS[0], optimizer="momentum"), np.zeros(3, np.int32)
    assert refused(dataclasses.replace(case, dim=1025)).startswith("a table of 1025 columns")
    assert refused(case, rule=lambda rule: rule._replace(name="lion")).startswith("the rule 'lion'")
    assert "a state of [float32[4]]" in refused(case, rule=lambda rule: rule._replace(name="adam"))
    state = lambda kept: kept._replace(state=(kept.state[0].astype(jnp.bfloat16),))  # noqa: E731
    assert "a state of [bfloat16[4]]" in refused(case, kept=state)
    words = dataclasses.replace(case, rounding="stochastic")
    assert refused(words).startswith("random bits to round float32")
    rows = lambda gradients: gradients._replace(rows=gradients.rows.astype(jnp.bfloat16))  # noqa: E731
    assert refused(case, gradients=rows).startswith("gradients of bfloat16")
    for table, message in [
        (np.zeros((3, 1025), np.float32), "a table of 1025 columns"),
        (np.zeros((3, 4), np.int8), "a table of int8"),
        (np.zeros((0, 4), np.float32), "a table without rows"),
        (np.zeros((3, 4, 2), np.float32), "a table of 3 axes"),
    ]:
        with pytest.raises(NotImplementedError, match=message):
            mosaic.gather(table, ints, ints, True)


# Compiled for an H100


@pytest.fixture(scope="module")
def on_h100():
    """Makes `jax.ShapeDtypeStruct`s on a GPU that is not here."""
    from jax.experimental import topologies

    if TARGET is None:
        pytest.skip("JAXCACHE_TARGET_CONFIG names no file with the description of an H100")
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=pathlib.Path(TARGET).read_text(), topology="1x1x1"
        )
    except Exception as error:
        pytest.skip(f"jax[cuda13] is not here: {error}")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    return functools.partial(jax.ShapeDtypeStruct, sharding=sharding)


@pytest.fixture
def compiled(on_h100, tmp_path, monkeypatch):
    """Compiles an operation of a case; gives it with the PTX of its kernels and what ptxas says of them."""
    # No GPU is needed for this, nor its disassembler, the lack of which is reported.
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def compile(case, operation):
        function, arguments = list(operations(case, on_h100))[operation]
        donated = (0,) if operation == 2 else ()
        program = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
        texts = [
            [path.read_text(errors="ignore") for path in sorted(tmp_path.glob(f"*.{kind}"))]
            for kind in ("ptx", "ptxas")
        ]
        return program, *texts

    return compile


def check_arithmetic(ptx):
    """Quotients and roots are rounded correctly, and what is fused is a product with the same number: one."""
    assert not re.search(r"\b(div|sqrt|rcp|rsqrt)\.(full|approx)\.", ptx)
    factors = [set(pair) for pair in re.findall(r"fma\.rn\.f32\s+%\w+, (%\w+), (%\w+),", ptx)]
    assert len(factors) == len(re.findall(r"\bfma\.", ptx))
    assert not factors or set.intersection(*factors)


@pytest.mark.slow
@over(*(case for case in CASES if case.measured and not case.bags), *WIDTHS, *MORE_WIDTHS)
def test_update_compiles_in_place(case, compiled):
    slots, lookups = 2_000_000, 200_000
    program, ptx, reports = compiled(dataclasses.replace(case, slots=slots, rows=100_000, lookups=lookups), 2)
    memory = program.memory_analysis()
    kept = slots * (case.dim * jnp.dtype(case.dtype).itemsize + 4 * sum(s for (s,) in case.state_shapes) + 5)
    assert memory.alias_size_in_bytes == kept
    blocks = lookups / BLOCK * (1 + 1 / BLOCK) + 1  # one row of float32 for each, and some integers
    assert memory.temp_size_in_bytes < blocks * 4 * (case.dim + 8) + 4 * 4 * 100_000
    assert 1 <= len(ptx) == len(reports) <= launches(lookups)  # an equal kernel is compiled once in a process
    for report in reports:
        assert "0 bytes spill stores, 0 bytes spill loads" in report
    (update,) = (text for text in ptx if ".entry update" in text)
    if case.optimizer == "adam":  # the others have few products, so any may have a factor in common
        check_arithmetic(update)
    assert not re.search(r"\b(div|sqrt|rcp|rsqrt)\.(full|approx)\.", update)
    # A barrier stands between any read of memory and the next store to it.
    steps = re.findall(r"^\s+(?:@!?%p\d+ )?((?:ld|st)(?:\.global)?|bar)\.(?!param|shared)", update, re.MULTILINE)
    steps = [step[:2] for step in steps]
    assert steps.count("st") >= 3 and ("ld", "st") not in itertools.pairwise(steps)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [100, 255, 1023])
def test_nothing_spills(dim, compiled):
    """The update of the widths above does not; here the others."""
    case = Case("large", dim=dim, dtype="float16", bags=(Equal(100, 5), (9, 10_000)), weighted=True)
    for operation in (0, 1):
        _, _, reports = compiled(case, operation)
        assert reports and all("0 bytes spill stores, 0 bytes spill loads" in report for report in reports)
    _, _, reports = compiled(dataclasses.replace(case, bags=()), 0)
    assert all("0 bytes spill stores, 0 bytes spill loads" in report for report in reports)


@pytest.mark.slow
def test_weighted_sums_are_not_fused(compiled):
    _, ptx, _ = compiled(Case("weighted", dim=128, bags=(Equal(100, 100),), weighted=True), 0)
    for kernel in ptx:
        check_arithmetic(kernel)


@pytest.mark.slow
def test_places_are_of_64_bits(compiled):
    """A table of 2**31 elements and more is addressed with 64 bits: a place of 32 is widened when it is multiplied."""
    _, (ptx,), _ = compiled(Case("large", dim=128, slots=20_000_000, rows=99, lookups=999), 0)
    assert len(re.findall(r"mul\.wide\.s32\s+%rd\d+, %r\d+, 512;", ptx)) == mosaic._in_flight(128)
