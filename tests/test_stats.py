"""Intervals against SciPy and brute force, coverage, determinism; error measures by hand."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import r2_score

from fmlib import stats

finite = st.floats(-100, 100, allow_nan=False)


class TestBootstrap:
    @pytest.mark.parametrize("statistic", ["mean", "median"])
    def test_agrees_with_scipy(self, statistic: str) -> None:
        values = np.random.default_rng(0).gamma(2, size=60)
        ours = stats.bootstrap(values, statistic=statistic, n_resamples=20_000)
        theirs = scipy.stats.bootstrap(
            (values,),
            getattr(np, statistic),
            n_resamples=20_000,
            method="percentile",
            rng=np.random.default_rng(1),
        ).confidence_interval
        width = theirs.high - theirs.low
        assert ours.value == pytest.approx(getattr(np, statistic)(values))
        assert abs(ours.low - theirs.low) < 0.04 * width
        assert abs(ours.high - theirs.high) < 0.04 * width

    def test_covers_the_truth_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(0)
        for level in (0.8, 0.95):
            hits = 0
            for seed in range(400):
                interval = stats.bootstrap(
                    rng.normal(3, 2, size=50), level=level, n_resamples=400, seed=seed
                )
                hits += interval.low <= 3 <= interval.high
            # percentile intervals at n = 50 fall short by a point or two; 3 standard errors beside
            slack = 3 * (level * (1 - level) / 400) ** 0.5
            assert level - 0.02 - slack < hits / 400 < level + slack

    def test_clusters_widen_the_interval_to_the_right_coverage(self) -> None:
        rng = np.random.default_rng(1)
        groups = np.repeat(np.arange(40), 5)
        naive = clustered = 0
        for seed in range(200):
            values = np.repeat(rng.normal(size=40), 5) + 0.1 * rng.normal(size=200)
            a = stats.bootstrap(values, n_resamples=300, seed=seed)
            b = stats.bootstrap(values, groups=groups.tolist(), n_resamples=300, seed=seed)
            naive += a.low <= 0 <= a.high
            clustered += b.low <= 0 <= b.high
            assert b.n == 40
            assert a.n == 200
        assert clustered / 200 > 0.88
        # the trap: taking crops of one picture for independent pictures
        assert naive / 200 < 0.75

    @given(
        hnp.arrays(np.float64, st.tuples(st.integers(2, 12), st.integers(1, 3)), elements=finite),
        st.data(),
    )
    @settings(max_examples=40, deadline=None)
    def test_fast_paths_equal_the_slow_one(self, values: np.ndarray, data: st.DataObject) -> None:
        groups = data.draw(
            st.lists(st.sampled_from("abcd"), min_size=len(values), max_size=len(values))
        )
        for name, function in (("mean", np.mean), ("median", np.median)):
            fast = stats.bootstrap(values, groups=groups, statistic=name, n_resamples=50)
            slow = stats.bootstrap(
                values, groups=groups, statistic=lambda x, f=function: f(x, axis=0), n_resamples=50
            )
            for field in ("value", "low", "high"):
                np.testing.assert_allclose(getattr(fast, field), getattr(slow, field), atol=1e-9)

    @given(hnp.arrays(np.float64, st.integers(2, 30), elements=finite), st.integers(0, 9))
    @settings(max_examples=40, deadline=None)
    def test_moves_and_scales_with_the_data(self, values: np.ndarray, seed: int) -> None:
        plain = stats.bootstrap(values, n_resamples=100, seed=seed)
        moved = stats.bootstrap(-2 * values + 5, n_resamples=100, seed=seed)
        assert plain.low <= plain.high
        np.testing.assert_allclose(
            [moved.value, moved.low, moved.high],
            [5 - 2 * plain.value, 5 - 2 * plain.high, 5 - 2 * plain.low],
            atol=1e-9,
        )

    def test_order_of_groups_and_their_names_do_not_matter(self) -> None:
        values = np.arange(6.0)
        a = stats.bootstrap(values, groups=list("aabbcc"))
        b = stats.bootstrap(values, groups=[7, 7, 3, 3, 5, 5])
        assert a == b

    def test_seed_decides(self) -> None:
        values = np.random.default_rng(0).normal(size=20)
        assert stats.bootstrap(values, seed=3) == stats.bootstrap(values, seed=3)
        assert stats.bootstrap(values, seed=3).low != stats.bootstrap(values, seed=4).low

    @pytest.mark.parametrize("statistic", ["mean", "median"])
    def test_chunks_do_not_change_the_result(
        self, monkeypatch: pytest.MonkeyPatch, statistic: str
    ) -> None:
        values = np.random.default_rng(0).normal(size=(9, 4, 3))
        whole = stats.bootstrap(values, statistic=statistic, n_resamples=101)
        monkeypatch.setattr(stats, "_CELLS", 250)
        pieces = stats.bootstrap(values, statistic=statistic, n_resamples=101)
        np.testing.assert_allclose(pieces.low, whole.low, rtol=1e-12)
        np.testing.assert_allclose(pieces.high, whole.high, rtol=1e-12)

    def test_maps_are_resampled_by_image_never_by_pixel(self) -> None:
        # every pixel of an image alike: the interval must not shrink with the number of pixels
        per_image = np.random.default_rng(0).normal(size=12)
        scalar = stats.bootstrap(per_image)
        maps = stats.bootstrap(np.broadcast_to(per_image[:, None, None], (12, 5, 7)))
        assert maps.low.shape == (5, 7)
        np.testing.assert_allclose(maps.low, scalar.low)
        np.testing.assert_allclose(maps.high, scalar.high)
        assert maps.n == 12

    def test_one_unit_has_no_interval(self) -> None:
        for groups, values in ((None, [2.0]), (["a", "a"], [1.0, 3.0])):
            interval = stats.bootstrap(values, groups=groups)
            assert interval.value == 2
            assert np.isnan([interval.low, interval.high]).all()
            assert interval.n == 1

    def test_takes_tensors_booleans_and_half_precision(self) -> None:
        assert stats.bootstrap(torch.tensor([True, False])).value == 0.5
        assert stats.bootstrap(torch.ones(3, dtype=torch.bfloat16)).value == 1
        assert isinstance(stats.bootstrap([1, 2]).low, float)

    def test_non_finite_value_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"values\[2\] is nan"):
            stats.bootstrap([0, 1, np.nan, np.inf])
        with pytest.raises(ValueError, match=r"values\[\(1, 0\)\] is inf"):
            stats.bootstrap([[0, 1], [np.inf, 1]])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"level": 95}, "level must lie between"),
            ({"n_resamples": 0}, "n_resamples"),
            ({"groups": ["a"]}, "groups has 1 entries for 2 values"),
            ({"statistic": "medain"}, "did you mean 'median'"),
        ],
    )
    def test_bad_options(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            stats.bootstrap([1.0, 2.0], **options)

    @pytest.mark.parametrize("values", [[], 3.0])
    def test_no_units(self, values: object) -> None:
        with pytest.raises(ValueError, match="at least one unit"):
            stats.bootstrap(values)

    def test_text(self) -> None:
        assert str(stats.Interval(0.8312, 0.7991, 0.8633, 9)) == "0.831 [0.799, 0.863]"


class TestPairedDifference:
    def test_pairing_removes_what_is_common(self) -> None:
        rng = np.random.default_rng(0)
        common = 10 * rng.normal(size=30)
        a, b = common + 0.5 + 0.1 * rng.normal(size=30), common
        interval = stats.paired_difference(a, b)
        assert interval.low > 0.4
        assert interval.high < 0.6

    def test_shapes_must_match(self) -> None:
        with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
            stats.paired_difference([1, 2], [1, 2, 3])
        with pytest.raises(ValueError, match=r"b\[0\]"):
            stats.paired_difference([1, 2], [np.nan, 2])


class TestErrors:
    def test_cosine_by_hand(self) -> None:
        x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
        y = torch.tensor([[0.0, 2.0], [2.0, 0.0], [1.0, 0.0]])
        found = stats.cosine_similarity(x, y, dim=1)
        torch.testing.assert_close(found, torch.tensor([0.0, 0.5**0.5, 0.0]))

    def test_cosine_of_long_half_vectors_stays_finite(self) -> None:
        # the squared norm overflows float16
        x = torch.full((1, 4096), 60.0, dtype=torch.float16)
        assert float(stats.cosine_similarity(x, x, dim=1)) == pytest.approx(1, abs=1e-5)

    def brute(self, x: torch.Tensor, power: int) -> float:
        flat = x.double().reshape(len(x), -1).numpy()
        pairs = [(i, j) for i in range(len(x)) for j in range(i)]
        return float(np.mean([np.linalg.norm(flat[i] - flat[j]) ** power for i, j in pairs]))

    @pytest.mark.parametrize("squared", [False, True])
    def test_pairwise_distance_by_brute_force(
        self, squared: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = torch.randn(11, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 100
        expected = self.brute(x, 2 if squared else 1)
        assert stats.mean_pairwise_distance(x, squared=squared) == pytest.approx(expected)
        monkeypatch.setattr(stats, "_CELLS", 20)
        assert stats.mean_pairwise_distance(x, squared=squared) == pytest.approx(expected)

    def test_pairwise_distance_of_numbers_and_of_too_few(self) -> None:
        assert stats.mean_pairwise_distance(torch.tensor([0.0, 3.0])) == 3
        with pytest.raises(ValueError, match="at least two"):
            stats.mean_pairwise_distance(torch.ones(1, 5))

    @pytest.mark.parametrize("squared", [False, True])
    def test_normalised_error_by_brute_force(self, squared: bool) -> None:
        g = torch.Generator().manual_seed(0)
        x, y, reference = (torch.randn(n, 2, 3, generator=g) for n in (4, 4, 9))
        power = 2 if squared else 1
        norms = [float((x[i] - y[i]).norm()) ** power for i in range(4)]
        expected = torch.tensor(norms) / self.brute(reference, power)
        found = stats.normalised_error(x, y, reference=reference, squared=squared)
        torch.testing.assert_close(found, expected)
        scale = stats.mean_pairwise_distance(reference, squared=squared)
        again = stats.normalised_error(x, y, reference=scale, squared=squared)
        torch.testing.assert_close(again, expected)

    def test_a_random_other_item_is_one_away(self) -> None:
        x = torch.randn(60, 500, generator=torch.Generator().manual_seed(0))
        error = stats.normalised_error(x, x.roll(1, 0), reference=x)
        assert float(error.mean()) == pytest.approx(1, abs=0.02)

    def test_the_two_normalisations_differ(self) -> None:
        # the trap: the paper's words and its code are not the same number
        x = torch.tensor([[0.0], [1.0], [5.0]])
        plain = stats.normalised_error(x, x + 2, reference=x)
        squared = stats.normalised_error(x, x + 2, reference=x, squared=True)
        assert float(plain[0]) == pytest.approx(2 / (10 / 3))
        assert float(squared[0]) == pytest.approx(4 / 14)

    def test_normalised_error_can_be_optimised(self) -> None:
        x = torch.ones(2, 3, requires_grad=True)
        stats.normalised_error(x, torch.zeros(2, 3), reference=2.0).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.full((2, 3), 1 / (2 * 3**0.5)))

    @pytest.mark.parametrize(
        ("x", "y", "reference", "message"),
        [
            (torch.ones(2, 3), torch.ones(2, 4), 1.0, "differ in shape"),
            (torch.ones(2, 3), torch.ones(2, 3), torch.ones(5, 4), "reference items have shape"),
            (torch.ones(2, 3), torch.ones(2, 3), torch.ones(5, 3), "must differ"),
        ],
    )
    def test_normalised_error_refuses(
        self, x: torch.Tensor, y: torch.Tensor, reference: torch.Tensor, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            stats.normalised_error(x, y, reference=reference)

    def test_r_squared_against_scikit_learn(self) -> None:
        g = torch.Generator().manual_seed(0)
        target = torch.randn(20, 5, generator=g) * torch.arange(1.0, 6) + 3
        prediction = target + torch.randn(20, 5, generator=g)
        expected = r2_score(target.numpy(), prediction.numpy(), multioutput="variance_weighted")
        assert stats.r_squared(target, prediction) == pytest.approx(float(expected), abs=1e-6)

    def test_r_squared_floors(self) -> None:
        target = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        assert stats.r_squared(target, target) == 1
        assert stats.r_squared(target, target.mean(0, keepdim=True).expand(2, 2)) == 0
        unedited = target + 1
        assert stats.r_squared(target, unedited, floor=unedited) == 0
        assert stats.r_squared(target, target + 0.5, floor=unedited) == pytest.approx(0.75)
        assert stats.r_squared(target, torch.zeros(2, 2), floor=0.0) == 0
        with pytest.raises(ValueError, match="undefined"):
            stats.r_squared(torch.ones(3, 2), torch.ones(3, 2))
        with pytest.raises(ValueError, match="differ in shape"):
            stats.r_squared(torch.ones(3, 2), torch.ones(2))
