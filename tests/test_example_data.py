"""The examples' data and models: the synthetic logs, the Criteo reader, the DLRM, the DIN, the AUC."""

import gzip
import itertools
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import criteo
import synthetic
from din import DIN
from dlrm import DLRM, auc

REAL_LOG = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "criteo_80k.tsv.gz"


def assert_equal_batches(left, right):
    assert left.keys() == right.keys()
    for name in left.keys() - {"ids"}:
        np.testing.assert_array_equal(left[name], right[name])
    assert list(left["ids"]) == list(right["ids"])
    for name, ids in left["ids"].items():
        np.testing.assert_array_equal(ids, right["ids"][name])


class TestSynthetic:
    def test_cardinalities_are_those_of_the_kaggle_log(self):
        assert len(synthetic.KAGGLE_CARDINALITIES) == 26
        assert sum(synthetic.KAGGLE_CARDINALITIES) == 33_762_577

    def test_batch_has_the_promised_arrays(self):
        batch = synthetic.ClickLog().batch(64, 0)
        for name, shape in {"dense": (64, 13), "label": (64,), "planted": (64,)}.items():
            assert batch[name].shape == shape
            assert batch[name].dtype == np.float32
            assert np.isfinite(batch[name]).all()
        assert list(batch["ids"]) == [f"C{i}" for i in range(1, 27)]
        for ids, rows in zip(batch["ids"].values(), synthetic.KAGGLE_CARDINALITIES, strict=True):
            assert ids.shape == (64,)
            assert ids.dtype == np.int64
            assert ids.min() >= 0
            assert ids.max() < rows
        assert set(np.unique(batch["label"])) <= {0.0, 1.0}

    def test_batch_is_a_function_of_seed_and_number(self):
        log = synthetic.ClickLog(seed=3)
        batches = list(log.batches(32, 5))
        later = next(synthetic.ClickLog(seed=3).batches(32, 1, start=4))
        assert_equal_batches(batches[4], later)
        assert not np.array_equal(batches[3]["label"], later["label"])
        other_seed = synthetic.ClickLog(seed=4).batch(32, 4)
        assert not np.array_equal(other_seed["ids"]["C3"], later["ids"]["C3"])

    def test_batches_are_fresh_arrays(self):
        log = synthetic.ClickLog()
        first, again = log.batch(8, 0), log.batch(8, 0)
        first["dense"][:] = first["ids"]["C1"][:] = -1
        assert_equal_batches(log.batch(8, 0), again)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("rows", [1, 2, 3, 10, 97, 1000, 4096])
    def test_permutation_is_a_bijection(self, rows, seed):
        log = synthetic.ClickLog((rows, rows + 1), seed)
        ranks = np.stack([np.arange(rows), np.arange(rows)])
        assert sorted(log.ids(ranks)[0]) == list(range(rows))
        assert len(set(log.ids(ranks)[1])) == rows

    def test_permutation_does_not_overflow_on_a_billion_rows(self):
        log = synthetic.ClickLog((2_000_000_000, 3))
        ids = log.ids(np.array([[1_999_999_999, 0], [0, 0]]))
        multiplier, offset = (int(part[0, 0]) for part in log._permutations)
        assert ids[0, 0] == (1_999_999_999 * multiplier + offset) % 2_000_000_000

    def test_ranks_follow_the_mixture_of_power_laws(self):
        """Compares the shares of ranks with sums over the two laws, computed the long way."""
        rows, draws = 50_000, 400_000
        log = synthetic.ClickLog((rows, 7))
        uniform = np.random.default_rng(0).random((2, draws))
        sampled = np.bincount(log.ranks(uniform)[0], minlength=rows) / draws
        popular, flat = log._laws
        expected = np.zeros(rows)
        for law, share in ((popular, 0.65), (flat, 0.35)):
            exponent = 1.0 - 1.0 / law.power[0, 0]
            last = (1.0 + law.span[0, 0]) ** law.power[0, 0]
            edges = np.minimum(np.arange(1, rows + 2), last) ** (1.0 - exponent)
            expected += share * np.diff(edges) / (edges[-1] - 1.0)
        assert expected.sum() == pytest.approx(1.0)
        for bounds in ((0, 1), (1, 2), (2, 10), (10, 100), (100, 1000), (1000, rows)):
            part = slice(*bounds)
            # Six standard deviations of a binomial share.
            error = 6 * math.sqrt(expected[part].sum() / draws)
            assert sampled[part].sum() == pytest.approx(expected[part].sum(), abs=error)

    def test_laws_lie_in_the_stated_ranges(self):
        popular, flat = synthetic.ClickLog(seed=5)._laws
        rows = np.array(synthetic.KAGGLE_CARDINALITIES)
        exponents = 1.0 - 1.0 / popular.power[:, 0]
        assert ((exponents >= 1.2) & (exponents <= 1.45)).all()
        exponents = 1.0 - 1.0 / flat.power[:, 0]
        assert ((exponents >= 0.92) & (exponents < 1.0)).all()
        last = (1.0 + popular.span[:, 0]) ** popular.power[:, 0] - 1.0
        assert (last <= np.minimum(1e5, rows) * 1.001).all()
        assert (last >= np.minimum(1e3, rows) * 0.999).all()

    def test_extreme_uniform_numbers_stay_inside(self):
        log = synthetic.ClickLog()
        extremes = np.array([0.0, 0.65, np.nextafter(0.65, 0), np.nextafter(1.0, 0)])
        ranks = log.ranks(np.tile(extremes, (26, 1)))
        assert (ranks >= 0).all()
        assert (ranks < np.array(synthetic.KAGGLE_CARDINALITIES)[:, None]).all()
        assert (ranks[:, :2] == 0).all()

    @pytest.mark.parametrize("seed", range(3))
    def test_labels_come_from_the_planted_logit(self, seed):
        log = synthetic.ClickLog(seed=seed)
        batches = list(log.batches(4096, 10, start=10**9))
        label = np.concatenate([batch["label"] for batch in batches])
        planted = np.concatenate([batch["planted"] for batch in batches]).astype(np.float64)
        assert 0.25 < label.mean() < 0.28
        assert 0.79 < auc(planted, label) < 0.84
        # Calibrated: among samples of like logit, the positive share is the logit's sigmoid.
        chance = 1.0 / (1.0 + np.exp(-planted))
        for part in np.array_split(np.argsort(planted), 10):
            assert label[part].mean() == pytest.approx(chance[part].mean(), abs=0.04)

    def test_scaled_cardinalities_sum_to_the_total(self):
        kaggle = synthetic.KAGGLE_CARDINALITIES
        assert synthetic.scaled_cardinalities(sum(kaggle)) == kaggle
        for total in (2001, 5000, 1_000_000, 1_000_000_000):
            scaled = synthetic.scaled_cardinalities(total)
            assert sum(scaled) == total
            for rows, before in zip(scaled, kaggle, strict=True):
                assert rows == before if before <= 100 else rows >= 100

    def test_too_few_rows_to_scale_to(self):
        with pytest.raises(ValueError, match=r"2000 rows are too few for 26 fields.* 2001"):
            synthetic.scaled_cardinalities(2000)

    @pytest.mark.parametrize("cardinalities", [(), (5,), (5, 0)])
    def test_useless_cardinalities(self, cardinalities):
        with pytest.raises(ValueError, match="two or more fields, of a row or more each"):
            synthetic.ClickLog(cardinalities)

    def test_fields_too_large_for_the_permutation(self):
        with pytest.raises(ValueError, match=r"fields of at most 2\*\*31 rows, got one of 2,147"):
            synthetic.ClickLog((2**31 + 1, 3))


def histories(batch):
    """The clicks of each history, as lists."""
    return [row[row >= 0].tolist() for row in batch["history"]]


class TestSequences:
    def test_batch_has_the_promised_arrays(self):
        log = synthetic.SequenceLog(users=1000, items=500, categories=30, longest=6)
        batch = log.batch(256, 0)
        clicks = len(batch["history_categories"])
        shapes = {"user": (256,), "item": (256,), "category": (256,), "history": (256, 6)}
        shapes |= {"history_categories": (clicks,), "history_offsets": (257,), "label": (256,), "planted": (256,)}
        assert {name: array.shape for name, array in batch.items()} == shapes
        for name, array in batch.items():
            assert array.dtype == (np.float32 if name in ("label", "planted") else np.int64)
        for name, rows in (("user", 1000), ("item", 500), ("category", 30), ("history_categories", 30)):
            assert batch[name].min() >= 0 and batch[name].max() < rows
        assert batch["history"].max() < 500
        assert np.isfinite(batch["planted"]).all() and set(np.unique(batch["label"])) == {0.0, 1.0}

    def test_histories_are_padded_behind_their_clicks_and_their_categories_are_ragged(self):
        log = synthetic.SequenceLog(items=5000, categories=40, longest=5)
        batch = log.batch(512, 3)
        offsets = batch["history_offsets"]
        for row, clicks, start, stop in zip(batch["history"], histories(batch), offsets[:-1], offsets[1:], strict=True):
            assert row.tolist() == clicks + [-1] * (5 - len(clicks))
            assert batch["history_categories"][start:stop].tolist() == [item % 40 for item in clicks]
        assert offsets[0] == 0 and offsets[-1] == len(batch["history_categories"])
        np.testing.assert_array_equal(batch["category"], batch["item"] % 40)
        # Each of the 6 numbers of clicks comes 85 times in 512; six deviations are 51.
        assert (np.abs(np.bincount(np.diff(offsets), minlength=6) - 512 / 6) < 51).all()

    def test_batch_is_a_function_of_seed_and_number(self):
        def equal(left, right):
            return all(np.array_equal(left[name], right[name]) for name in left.keys() | right.keys())

        batches = list(synthetic.SequenceLog(seed=3).batches(32, 5))
        (later,) = synthetic.SequenceLog(seed=3).batches(32, 1, start=4)
        assert equal(batches[4], later)
        assert not np.array_equal(batches[3]["user"], later["user"])
        assert not np.array_equal(synthetic.SequenceLog(seed=4).batch(32, 4)["user"], later["user"])
        for array in later.values():
            array[:] = -1
        assert equal(batches[4], synthetic.SequenceLog(seed=3).batch(32, 4))

    def test_clicks_come_from_the_interests(self):
        log = synthetic.SequenceLog(users=100_000, items=100_000, categories=100)
        batch = log.batch(4096, 0)
        interests = log.interests(batch["user"])
        assert interests.shape == (4096, 3) and interests.min() == 0 and interests.max() == 99
        owner = np.repeat(np.arange(4096), np.diff(batch["history_offsets"]))
        # Of the categories that interests have no part in, 1 in 100 is one of them all the same, for each interest.
        for interest, share in enumerate((0.5, 0.3, 0.2)):
            clicked = (batch["history_categories"] == interests[owner, interest]).mean()
            expected = 0.8 * (share + (1 - share) / 100) + 0.2 / 100
            assert clicked == pytest.approx(expected, abs=0.015)  # six deviations, of 40,000 clicks
        offered = (batch["category"][:, None] == interests).any(axis=1).mean()
        assert offered == pytest.approx(0.5 + 0.5 * 3 / 100, abs=0.05)

    def test_users_and_items_follow_power_laws(self):
        log = synthetic.SequenceLog(users=100_000, items=20_000, categories=10)
        batches = [log.batch(4096, number) for number in range(8)]
        users = np.concatenate([batch["user"] for batch in batches])
        ranks = np.concatenate([batch["history"][batch["history"] >= 0] for batch in batches]) // 10
        for sample, rows, exponent in ((users, 100_000, 0.8), (ranks, 2000, 1.2)):
            edges = np.array([1, 2, 3, 10, 30, 100, 1000, rows + 1]) ** (1 - exponent)
            expected = np.diff(edges) / (edges[-1] - edges[0])
            counts, _ = np.histogram(sample, [0, 1, 2, 9, 29, 99, 999, rows])
            error = 6 * np.sqrt(expected / len(sample))
            assert (np.abs(counts / len(sample) - expected) < error).all()

    def test_items_of_categories_of_unequal_size_are_all_clicked(self):
        log = synthetic.SequenceLog(users=50, items=23, categories=5, longest=10)
        items = np.concatenate([batch["history"] for batch in log.batches(512, 4)])
        np.testing.assert_array_equal(np.unique(items), np.arange(-1, 23))

    @pytest.mark.parametrize("seed", range(2))
    def test_labels_come_from_the_planted_logit(self, seed):
        batches = list(synthetic.SequenceLog(seed=seed).batches(4096, 8, start=10**9))
        label, planted, user, item = (
            np.concatenate([batch[name] for batch in batches]) for name in ("label", "planted", "user", "item")
        )
        assert 0.24 < label.mean() < 0.28
        assert 0.82 < auc(planted, label) < 0.86
        # Calibrated: among samples of like logit, the positive share is the logit's sigmoid.
        chance = 1.0 / (1.0 + np.exp(-planted.astype(np.float64)))
        for part in np.array_split(np.argsort(planted), 8):
            assert label[part].mean() == pytest.approx(chance[part].mean(), abs=0.04)
        # Affinity, the share of the interests that is the item's category, tells positives apart.
        log = synthetic.SequenceLog(seed=seed)
        affinity = (log.interests(user) == log.category(item)[:, None]) @ np.array([0.5, 0.3, 0.2])
        assert auc(affinity, label) > 0.8

    @pytest.mark.parametrize("sizes", [{"users": 0}, {"categories": 0}, {"longest": 0}, {"items": 9, "categories": 10}])
    def test_useless_sizes(self, sizes):
        with pytest.raises(ValueError, match="1 or more, and items as many as categories"):
            synthetic.SequenceLog(**sizes)


def make_line(label="1", integers=None, categories=None):
    integers = ["5"] * 13 if integers is None else integers
    categories = ["0a1b2c3d"] * 26 if categories is None else categories
    return "\t".join([label, *integers, *categories])


def write(path, lines, end="\n"):
    text = "".join(line + end for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def changed(values, position, value):
    return [*values[:position], value, *values[position + 1 :]]


@pytest.fixture
def lines():
    """Ten lines with values that repeat, differ in case, and miss."""
    return [
        make_line(
            label=str(i % 2),
            integers=["", "-2", "0", str(i), *["7"] * 9],
            categories=["", f"{i % 3:08x}", f"{i:08X}", *["68fd1e64"] * 23],
        )
        for i in range(10)
    ]


class TestCriteo:
    def test_values_become_numbers(self, tmp_path, lines):
        log = criteo.read_criteo(write(tmp_path / "log.tsv", lines))
        assert len(log) == 10
        np.testing.assert_array_equal(log.label, np.arange(10) % 2)
        np.testing.assert_array_equal(log.dense[:, :3], 0.0)  # missing, negative, zero
        np.testing.assert_allclose(log.dense[:, 3], np.log(1.0 + np.arange(10)), rtol=1e-6)
        np.testing.assert_allclose(log.dense[:, 4:], np.log(8.0), rtol=1e-6)

    def test_values_are_enumerated_as_they_appear(self, tmp_path, lines):
        log = criteo.read_criteo(write(tmp_path / "log.tsv", lines))
        assert log.cardinalities == (1, 4, 11, *[2] * 23)
        assert log.ids[0].tolist() == [0] * 10
        assert log.ids[1].tolist() == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]
        assert log.ids[2].tolist() == list(range(1, 11))

    def test_letter_case_of_a_value_does_not_matter(self, tmp_path):
        low, high = (make_line(categories=[text] * 26) for text in ("00abcdef", "00ABCDEF"))
        path = write(tmp_path / "log.tsv", [low, high])
        for hashed_rows in (None, [1000] * 26):
            ids = criteo.read_criteo(path, hashed_rows).ids
            np.testing.assert_array_equal(ids[:, 0], ids[:, 1])

    def test_hashing_keeps_equal_values_equal_and_spreads_others(self, tmp_path):
        values = [*(f"{i:08x}" for i in range(2000)), ""] * 2
        path = write(tmp_path / "log.tsv", [make_line(categories=[v] * 26) for v in values])
        enumerated = criteo.read_criteo(path)
        hashed = criteo.read_criteo(path, [*[2**31 - 1] * 25, 101])
        assert hashed.cardinalities == (*[2**31 - 1] * 25, 101)
        np.testing.assert_array_equal(hashed.ids[:, :2001], hashed.ids[:, 2001:])
        # In a huge table no two of 2000 values meet, so hashing is enumeration under other names.
        assert len(np.unique(hashed.ids[0])) == len(np.unique(enumerated.ids[0])) == 2001
        np.testing.assert_array_equal(hashed.ids == 0, enumerated.ids == 0)
        counts = np.bincount(hashed.ids[25, :2000], minlength=101)
        assert counts[0] == 0
        assert counts[1:].min() > 4  # 20 expected
        assert counts.max() < 45

    def test_gzip_and_plain_files_give_the_same(self, tmp_path, lines):
        plain = criteo.read_criteo(write(tmp_path / "log.tsv", lines))
        for path in (
            write(tmp_path / "log.tsv.gz", lines),
            write(tmp_path / "windows.tsv", lines, end="\r\n"),
            write(tmp_path / "misnamed.gz", lines).rename(tmp_path / "misnamed.tsv"),
        ):
            other = criteo.read_criteo(path)
            assert other.cardinalities == plain.cardinalities
            for name in ("dense", "ids", "label"):
                np.testing.assert_array_equal(getattr(other, name), getattr(plain, name))

    def test_last_line_needs_no_end(self, tmp_path, lines):
        path = tmp_path / "log.tsv"
        path.write_text("\n".join(lines))
        assert len(criteo.read_criteo(path)) == 10

    def test_batches_cover_the_split(self, tmp_path, lines):
        log = criteo.read_criteo(write(tmp_path / "log.tsv", lines))
        assert log.train_lines == range(8)
        assert log.test_lines == range(8, 10)
        batches = list(log.batches(3, log.train_lines))
        assert [len(batch["label"]) for batch in batches] == [3, 3, 2]
        assert list(batches[0]["ids"]) == list(criteo.FEATURES)
        assert {ids.dtype for ids in batches[0]["ids"].values()} == {np.dtype(np.int64)}
        ids = np.concatenate([batch["ids"]["C3"] for batch in batches])
        np.testing.assert_array_equal(ids, log.ids[2, :8])
        batches[0]["dense"][:] = batches[0]["ids"]["C3"][:] = -1
        assert log.dense.min() >= 0
        assert log.ids.min() >= 0

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("", "expected 40 columns separated by tabs, found 1"),
            (make_line() + "\t", "expected 40 columns separated by tabs, found 41"),
            (make_line().split("\t", 1)[1], "expected 40 columns separated by tabs, found 39"),
            (make_line(label="2"), r"expected 0 or 1 in column 1 \(label\), found '2'"),
            (make_line(label=""), r"expected 0 or 1 in column 1 \(label\), found ''"),
            (
                make_line(integers=changed(["5"] * 13, 1, "1.5")),
                r"expected an integer or nothing in column 3 \(I2\), found '1.5'",
            ),
            (
                make_line(integers=changed(["5"] * 13, 12, "9" * 19)),
                r"expected an integer or nothing in column 14 \(I13\), found '9{19}'",
            ),
            (
                make_line(categories=changed(["0a"] * 26, 25, "xyz")),
                r"expected 1 to 16 hexadecimal digits or nothing in column 40 \(C26\), "
                "found 'xyz'",
            ),
            (
                make_line(categories=changed(["0a"] * 26, 0, "0x1f")),
                r"in column 15 \(C1\), found '0x1f'",
            ),
            (make_line(categories=changed(["0a"] * 26, 0, "é")), "in column 15 .* found 'é'"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["tsv", "tsv.gz"])
    def test_malformed_line(self, tmp_path, line, message, suffix):
        path = write(tmp_path / f"log.{suffix}", [make_line(), make_line(), line, make_line()])
        with pytest.raises(ValueError, match=rf"log\.{suffix}: line 3: .*{message}"):
            criteo.read_criteo(path)

    def test_truncated_gzip(self, tmp_path):
        random = np.random.default_rng(0)
        lines = [
            make_line(categories=[f"{value:08x}" for value in random.integers(2**32, size=26)]) for _ in range(1000)
        ]
        path = write(tmp_path / "log.tsv.gz", lines)
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(ValueError, match=r"log\.tsv\.gz: line \d+: .* truncated") as caught:
            criteo.read_criteo(path)
        number = int(str(caught.value).split("line ")[1].split(":")[0])
        assert 500 < number < 1000

    def test_damaged_gzip(self, tmp_path, lines):
        path = write(tmp_path / "log.tsv.gz", lines)
        data = bytearray(path.read_bytes())
        data[30] ^= 0xFF
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"log\.tsv\.gz: line \d+: "):
            criteo.read_criteo(path)

    def test_empty_file(self, tmp_path):
        path = write(tmp_path / "log.tsv", [])
        with pytest.raises(ValueError, match=r"log\.tsv: line 1: .* found the end of the file"):
            criteo.read_criteo(path)

    @pytest.mark.parametrize("hashed_rows", [[100] * 25, [*[100] * 25, 1]])
    def test_useless_hashed_rows(self, tmp_path, lines, hashed_rows):
        path = write(tmp_path / "log.tsv", lines)
        with pytest.raises(ValueError, match="hashed_rows must be 26 numbers of 2 or more"):
            criteo.read_criteo(path, hashed_rows)

    @pytest.mark.skipif(not REAL_LOG.exists(), reason="the 80,000 real rows are not here")
    def test_real_log(self):
        log = criteo.read_criteo(REAL_LOG)
        assert len(log) == 80_000
        assert log.label.sum() == 17_958
        assert sum(log.cardinalities) == 200_051
        assert (log.ids >= 0).all()
        assert (log.ids.max(axis=1) == np.array(log.cardinalities) - 1).all()


def dense_layers(perceptron):
    return [(np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])) for layer in perceptron.layers]


def numpy_dlrm(model, dense, rows):
    """The model, one sample and one pair at a time."""
    logits = []
    for sample in range(len(dense)):
        bottom = dense[sample]
        for kernel, bias in dense_layers(model.bottom):
            bottom = np.maximum(bottom @ kernel + bias, 0.0)
        vectors = [bottom, *(rows[name][sample] for name in model.features)]
        dots = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)]
        top = np.concatenate([bottom, dots])
        *hidden, (last_kernel, last_bias) = dense_layers(model.top)
        for kernel, bias in hidden:
            top = np.maximum(top @ kernel + bias, 0.0)
        logits.append((top @ last_kernel + last_bias)[0])
    return np.array(logits)


class TestDLRM:
    @pytest.mark.parametrize("dim", [4, 16])
    def test_equals_a_plain_computation(self, dim):
        features = ("C1", "C2", "C3")
        model = DLRM(features, dim, rngs=nnx.Rngs(0))
        random = np.random.default_rng(0)
        dense = random.standard_normal((5, 13)).astype(np.float32)
        # In another order than the model's: the names decide, not the order.
        rows = {name: random.standard_normal((5, dim)).astype(np.float32) for name in features[::-1]}
        logits = model(jnp.asarray(dense), {name: jnp.asarray(row) for name, row in rows.items()})
        assert logits.shape == (5,)
        np.testing.assert_allclose(logits, numpy_dlrm(model, dense, rows), rtol=1e-4, atol=1e-5)

    def test_layers_have_the_published_widths(self):
        model = DLRM(criteo.FEATURES, 16, rngs=nnx.Rngs(0))
        assert [kernel.shape for kernel, _ in dense_layers(model.bottom)] == [
            (13, 512), (512, 256), (256, 64), (64, 16),
        ]  # fmt: skip
        assert [kernel.shape for kernel, _ in dense_layers(model.top)] == [
            (16 + 27 * 26 // 2, 512), (512, 256), (256, 1),
        ]  # fmt: skip


def numpy_din(model, rows, present):
    """The model, one sample and one click at a time."""

    def perceptron(layers, vector):
        *hidden, (last_kernel, last_bias) = layers
        for kernel, bias in hidden:
            vector = np.maximum(vector @ kernel + bias, 0.0)
        return vector @ last_kernel + last_bias

    logits = []
    for sample, clicked in enumerate(present):
        item, category, mean = (rows[name][sample] for name in ("item", "category", "history_categories"))
        interest = np.zeros_like(item)
        for click in rows["history"][sample][clicked]:
            interest += perceptron(dense_layers(model.attention), np.concatenate([item, click, item * click])) * click
        vectors = [rows["user"][sample], item, interest, item * interest, category, mean, category * mean]
        logits.append(perceptron(dense_layers(model.top), np.concatenate(vectors))[0])
    return np.array(logits)


class TestDIN:
    def test_equals_a_plain_computation(self):
        model = DIN(item_dim=6, category_dim=4, user_dim=5, rngs=nnx.Rngs(0))
        random = np.random.default_rng(0)
        present = np.array([[True, True, False], [False, False, False], [True, True, True], [True, False, False]])
        shapes = {
            "user": (4, 5),
            "item": (4, 6),
            "history": (4, 3, 6),
            "category": (4, 4),
            "history_categories": (4, 4),
        }
        rows = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        logits = model({name: jnp.asarray(row) for name, row in rows.items()}, jnp.asarray(present))
        assert logits.shape == (4,)
        np.testing.assert_allclose(logits, numpy_din(model, rows, present), rtol=1e-4, atol=1e-5)


class TestAuc:
    @pytest.mark.parametrize("values", [2, 5, 1000])
    def test_equals_the_count_of_pairs(self, values):
        random = np.random.default_rng(values)
        scores = random.integers(values, size=60).astype(np.float32)
        labels = (random.random(60) < 0.3).astype(np.float32)
        pairs = itertools.product(scores[labels == 1], scores[labels == 0])
        points = [1.0 if good > bad else 0.5 if good == bad else 0.0 for good, bad in pairs]
        assert auc(scores, labels) == pytest.approx(np.mean(points), abs=1e-12)

    def test_extremes(self):
        labels = np.array([0, 0, 1, 1])
        assert auc(np.array([1, 2, 3, 4]), labels) == 1.0
        assert auc(np.array([4, 3, 2, 1]), labels) == 0.0
        assert auc(np.array([5, 5, 5, 5]), labels) == 0.5

    @pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]])
    def test_one_class_alone_has_none(self, labels):
        assert math.isnan(auc(np.arange(len(labels)), np.array(labels)))

    def test_broken_scores_have_none(self):
        assert math.isnan(auc(np.array([0.1, np.nan]), np.array([0, 1])))
