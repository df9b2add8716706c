"""Kaplan-Meier, log-rank and Cox beside lifelines, scipy and statsmodels."""

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.statistics import logrank_test
from lifelines.utils import median_survival_times

from braindino.downstream.survival import compare_risk_groups, fit_cox, kaplan_meier, log_rank, risk_cut

AGES = np.array([71, 54, 66, 48, 79, 62, 58, 73, 45, 69, 61, 50, 77, 64, 56, 68, 59, 74, 52, 63.0])
SEX = np.array([1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0.0])
TIMES = np.array([3, 9, 5, 12, 2, 7, 9, 3, 12, 5, 7, 10, 4, 7, 12, 6, 9, 3, 10, 5.0])
EVENTS = np.array([1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1], dtype=bool)


def names(count: int) -> list[str]:
    return [f"s{i:03d}" for i in range(count)]


def cohort(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariates, times with ties, events."""
    rng = np.random.default_rng(seed)
    x = np.stack([rng.normal(60, 10, count), rng.integers(0, 2, count)], axis=1)
    times = np.ceil(rng.exponential(30 * np.exp(-0.04 * (x[:, 0] - 60))))
    return x, times, rng.random(count) < 0.65


@pytest.mark.parametrize("seed", range(4))
def test_the_kaplan_meier_curve_its_interval_and_its_median_equal_lifelines(seed: int):
    _, times, events = cohort(seed)
    curve = kaplan_meier(times, events, names(60), what="all")
    reference = KaplanMeierFitter().fit(times, events)
    # lifelines starts at time 0, where nobody leaves.
    np.testing.assert_allclose(curve.times, reference.survival_function_.index[1:])
    np.testing.assert_allclose(curve.survival, reference.survival_function_.to_numpy()[1:, 0], atol=1e-12)
    np.testing.assert_array_equal(curve.at_risk, reference.event_table["at_risk"].to_numpy()[1:])
    np.testing.assert_array_equal(curve.num_events, reference.event_table["observed"].to_numpy()[1:])
    ends = reference.confidence_interval_.to_numpy()[1:]
    alive = curve.survival > 0
    np.testing.assert_allclose(np.stack([curve.low, curve.high], axis=1)[alive], ends[alive], atol=1e-10)
    assert curve.median == reference.median_survival_time_
    median_ends = median_survival_times(reference.confidence_interval_).to_numpy()[0]
    assert (curve.median_low, curve.median_high) == tuple(median_ends)
    assert (curve.what, curve.n) == ("all", 60)


def test_the_interval_equals_scipys_as_well():
    curve = kaplan_meier(TIMES, EVENTS, names(20), what="all")
    reference = scipy.stats.ecdf(scipy.stats.CensoredData.right_censored(TIMES, ~EVENTS)).sf
    interval = reference.confidence_interval(0.95, method="log-log")
    at = np.searchsorted(reference.quantiles, curve.times)
    np.testing.assert_allclose(curve.survival, reference.probabilities[at], atol=1e-12)
    np.testing.assert_allclose(curve.low, interval.low.probabilities[at], atol=1e-10)
    np.testing.assert_allclose(curve.high, interval.high.probabilities[at], atol=1e-10)


def test_censored_cases_count_until_they_leave():
    """Events at 1 and 3, one left at 2, one at 4: S = 3/4, 3/4, 3/8, 3/8."""
    curve = kaplan_meier(np.array([3.0, 1, 4, 2]), np.array([1, 1, 0, 0]), names(4), what="four")
    assert curve.survival.tolist() == [0.75, 0.75, 0.375, 0.375]
    assert curve.at_risk.tolist() == [4, 3, 2, 1]
    assert curve.median == 3 and np.median([3, 1, 4, 2]) == 2.5, "not the median of the times"
    assert "2 events" in curve.method


def test_a_median_that_is_never_reached_is_infinite_and_nobody_left_alive_has_no_interval():
    curve = kaplan_meier(np.array([1.0, 2, 3]), np.array([0, 1, 0]), names(3), what="three")
    assert curve.survival.tolist() == [1, 0.5, 0.5] and curve.median == 2 and curve.median_high == np.inf
    censored = kaplan_meier(np.array([1.0, 2]), np.array([0, 0]), names(2), what="two")
    assert (censored.median, censored.median_low, censored.median_high) == (np.inf,) * 3
    assert censored.low.tolist() == censored.high.tolist() == [1, 1]
    dead = kaplan_meier(np.array([1.0, 2]), np.array([1, 1]), names(2), what="two")
    assert dead.survival.tolist() == [0.5, 0] and np.isnan([dead.low[1], dead.high[1]]).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_log_rank_test_equals_lifelines(seed: int):
    x, times, events = cohort(seed)
    high = x[:, 0] > 60
    ours = log_rank(times, events, high, names(60), what="older against younger")
    reference = logrank_test(times[high], times[~high], events[high], events[~high])
    assert ours.statistic == pytest.approx(reference.test_statistic, rel=1e-10)
    assert ours.p == pytest.approx(reference.p_value, rel=1e-9)
    assert (ours.n, ours.what) == (60, "older against younger")


def test_groups_that_cannot_be_compared_have_no_p():
    times, events = np.array([1.0, 2, 5, 6]), np.array([1, 1, 0, 0])
    everybody = log_rank(times, events, np.ones(4, dtype=bool), names(4), what="all against none")
    no_event = log_rank(times, np.zeros(4), np.array([1, 0, 1, 0], dtype=bool), names(4), what="x")
    apart = log_rank(np.array([1.0, 2, 5]), np.array([0, 0, 1]), np.array([1, 1, 0], dtype=bool), names(3), what="x")
    for test in (everybody, no_event, apart):
        assert np.isnan([test.statistic, test.p]).all() and "no event while both groups" in test.method


def test_test_cases_are_divided_at_the_median_of_the_training_risks():
    train = np.array([0.0, 1.0, 2.0, 9.0])
    risks = np.array([1.5, 1.6, 5.0, -1.0, 3.0, 0.0])
    times, events = np.array([8.0, 4, 1, 9, 2, 5]), np.array([1, 1, 1, 0, 0, 1])
    assert risk_cut(train) == 1.5
    groups = compare_risk_groups(times, events, risks, names(6), cut=risk_cut(train))
    high = risks > 1.5
    assert high.sum() == 3, "the median of the test risks would be another cut: 1.55"
    assert (groups.cut, groups.high_risk.n, groups.low_risk.n) == (1.5, 3, 3)
    assert groups.high_risk.median == KaplanMeierFitter().fit(times[high], events[high]).median_survival_time_
    assert groups.low_risk.median == KaplanMeierFitter().fit(times[~high], events[~high]).median_survival_time_
    reference = logrank_test(times[high], times[~high], events[high], events[~high])
    assert groups.log_rank.p == pytest.approx(reference.p_value)
    alone = compare_risk_groups(times, events, risks, names(6), cut=10.0)
    assert alone.high_risk is None and alone.low_risk.n == 6 and np.isnan(alone.log_rank.p)
    with pytest.raises(ValueError, match="1 finite of 2 training risks"):
        risk_cut(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="0 finite of 0 training risks"):
        risk_cut(np.array([]))


@pytest.mark.parametrize("seed", range(3))
def test_cox_equals_lifelines_where_no_times_are_tied(seed: int):
    x, times, events = cohort(seed)
    times = times + np.linspace(0, 0.5, 60)
    ours = fit_cox(x, times, events, names=("age", "sex"), subjects=names(60))
    frame = pd.DataFrame({"age": x[:, 0], "sex": x[:, 1], "time": times, "event": events})
    reference = CoxPHFitter().fit(frame, "time", "event", fit_options={"precision": 1e-12})
    np.testing.assert_allclose(ours.coefficients, reference.params_.to_numpy(), rtol=1e-5)
    np.testing.assert_allclose(ours.standard_errors, reference.standard_errors_.to_numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.p, reference.summary["p"].to_numpy(), rtol=1e-5)
    ends = reference.confidence_intervals_.to_numpy()
    np.testing.assert_allclose(np.stack([ours.low, ours.high], axis=1), ends, rtol=1e-5)
    np.testing.assert_allclose(ours.risks(x), reference.predict_log_partial_hazard(frame).to_numpy(), atol=1e-6)
    assert ours.log_likelihood == pytest.approx(reference.log_likelihood_, rel=1e-10)
    assert (ours.names, ours.n, ours.num_events) == (("age", "sex"), 60, int(events.sum()))


def test_cox_with_tied_times_equals_statsmodels():
    """statsmodels 0.15.0, ``PHReg(times, x, status, ties="breslow").fit(method="newton", tol=1e-14)``."""
    ours = fit_cox(np.stack([AGES, SEX], axis=1), TIMES, EVENTS)
    np.testing.assert_allclose(ours.coefficients, [0.2272105095, -0.2821270071], rtol=1e-8)
    np.testing.assert_allclose(ours.standard_errors, [0.06709182081, 0.6041443491], rtol=1e-8)
    np.testing.assert_allclose(ours.p, [0.0007077467221, 0.6405098305], rtol=1e-7)
    assert ours.log_likelihood == pytest.approx(-22.08735629, abs=1e-7)
    assert ours.names == ("covariate 1", "covariate 2")


def test_cox_finds_the_maximum_of_equation_11_with_ties_whatever_the_scale():
    x, times, events = cohort(7)
    ours = fit_cox(x * [1000, 1] + [0, 1e6], times, events)
    b = ours.coefficients * [1000, 1]
    np.testing.assert_allclose(b, fit_cox(x, times, events).coefficients, rtol=1e-6)

    def loss(b):
        risks = x @ b
        return sum(risks[i] - np.log(np.exp(risks[times >= times[i]]).sum()) for i in np.flatnonzero(events))

    assert ours.log_likelihood == pytest.approx(loss(b), abs=1e-8)
    for step in ([0.003, 0], [-0.003, 0], [0, 0.05], [0, -0.05]):
        assert loss(b + step) < loss(b)


def test_cox_finds_the_maximum_where_a_full_newton_step_jumps_over_it():
    """One case has a covariate far from all others; scipy's bounded search is the reference."""
    x = np.array([164.4, 0.0, 2.84, 0.24, 0.32, 0.58, 0.01, 0.56, 0.11, 4054.16, 1.76, 0.41])
    times = np.array([6.0, 3, 4, 10, 7, 5, 9, 8, 11, 2, 12, 1])
    events = np.array([0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1])

    def loss(b):
        return sum(np.log(np.exp(b * (x[times >= times[i]] - x[i])).sum()) for i in np.flatnonzero(events))

    reference = scipy.optimize.minimize_scalar(loss, bounds=(0, 0.01), method="bounded", options={"xatol": 1e-12})
    assert fit_cox(x[:, None], times, events).coefficients[0] == pytest.approx(reference.x, rel=1e-4)


def test_cox_says_what_it_cannot_fit():
    age = np.arange(10.0)[:, None]
    times, events = np.arange(10.0, 0, -1), np.ones(10, dtype=bool)
    with pytest.raises(ValueError, match="no finite coefficients fit best; age, or it with the others, separates"):
        fit_cox(age, times, events, names=["age"])
    with pytest.raises(ValueError, match="no event among 10 cases"):
        fit_cox(age, times, np.zeros(10), names=["age"])
    with pytest.raises(ValueError, match="age is the same in all 10 cases; leave it out"):
        fit_cox(np.full((10, 1), 63.2), times, events, names=["age"])
    with pytest.raises(ValueError, match="among age, months one follows from the others in these 10 cases"):
        fit_cox(np.hstack([age, 12 * age]), times, events, names=["age", "months"])
    with pytest.raises(ValueError, match="age of subject number 3 is nan; expected a number"):
        fit_cox(np.where(age == 3, np.nan, age), times, events, names=["age"])
    with pytest.raises(ValueError, match=r"covariates of shape \(10, 1\) for 10 cases and the names age, sex"):
        fit_cox(age, times, events, names=["age", "sex"])


def test_a_group_without_events_does_not_pass_for_a_fit():
    rng = np.random.default_rng(0)
    times, events = rng.exponential(5, 30), rng.random(30) < 0.7
    group = (np.arange(30) < 10).astype(float)
    with pytest.raises(ValueError, match="group, or it with the others, separates"):
        fit_cox(group[:, None], times, events & (group == 0), names=["group"])


def test_a_subject_has_one_survival_and_times_are_times():
    times, events = np.array([3.0, 4, 5]), np.array([1, 0, 1])
    with pytest.raises(ValueError, match="subject b has 2 cases; expected one a subject"):
        kaplan_meier(times, events, ["a", "b", "b"], what="x")
    with pytest.raises(ValueError, match="subject b has 2 cases; expected one a subject"):
        log_rank(times, events, events == 1, ["a", "b", "b"], what="x")
    with pytest.raises(ValueError, match="subject b has 2 cases; expected one a subject"):
        fit_cox(times[:, None], times, events, subjects=["a", "b", "b"])
    with pytest.raises(ValueError, match="subject c has time -5 and event 1; expected a time of 0 or more"):
        kaplan_meier(np.array([3.0, 4, -5]), events, ["a", "b", "c"], what="x")
    with pytest.raises(ValueError, match="subject a has time 3 and event 2; expected"):
        kaplan_meier(times, np.array([2, 0, 1]), ["a", "b", "c"], what="x")
    with pytest.raises(ValueError, match="0 times, 0 events, 0 subjects"):
        kaplan_meier(np.array([]), np.array([]), [], what="x")
