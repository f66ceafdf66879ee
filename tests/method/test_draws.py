"""Laws of what is drawn: the distribution of each number, and that no two hang together.

Seeds are fixed where numbers are counted, and a right draw breaks a bound less than once in a million: a p-value under
1e-6, or 6 standard errors off.
"""

import itertools

import numpy as np
import pytest
import torch
from conftest import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from tinytwinflow import TwinFlowLoss
from tinytwinflow.method import draws

N = 20_000
printed = TwinFlowLoss.paper


def drawn(n=N, seed=0, turns=None, **changes):
    """The draws of a batch of n numbers, rows in parts as the loss divides them."""
    generator = torch.Generator().manual_seed(seed)
    return draws.draw_for(printed(**changes), torch.zeros(n, 1).double(), generator, turns)


def follows(values, law="uniform"):
    """Numbers follow a law, by Kolmogorov and Smirnov, each drawn afresh: no number tells the next."""
    values = values.flatten().numpy()
    assert kstest(values, law).pvalue > 1e-6
    unrelated(values[1:], values[:-1])


def unrelated(a, b):
    """Two rows of numbers have no correlation, neither they nor their distances from the middle."""
    a, b = (np.asarray(values, float).flatten() for values in (a, b))
    for of in (lambda v: v, lambda v: (v - v.mean()) ** 2):
        assert abs(np.corrcoef(of(a), of(b))[0, 1]) < 6 / len(a) ** 0.5


def test_both_noises_are_normal_and_have_nothing_to_do_with_each_other_or_with_the_times():
    own = drawn(share=0.5, one_step_share=0.3)
    for noise in (own.z, own.z_new):
        follows(noise, "norm")
    for a, b in itertools.combinations((own.z, own.z_new, own.t), 2):
        unrelated(a, b)
        unrelated(a[1:], b[:-1])


@pytest.mark.parametrize("a, b", [(1.0, 1.0), (0.6, 2.5)])
def test_times_of_each_part(a, b):
    """Kumaraswamy's law, P(t <= s) = 1 - (1 - s^a)^b, in the flow rows, and carried to [dt, 1] in the any-step rows;
    r ~ U(0, t - dt) there, r = t elsewhere; t' ~ U(0, 1) in the two twin parts."""
    own = drawn(share=0.5, flow_share=0.5, times=(a, b), dt=0.1)
    any_step, flow, adversarial, rectify = own.slices()
    law = lambda s: 1 - (1 - s**a) ** b  # noqa: E731
    follows((own.t[any_step] - 0.1) / 0.9, law)
    follows(own.t[flow], law)
    jumps = own.r[any_step] / (own.t[any_step] - 0.1)
    follows(jumps)
    unrelated(jumps, own.t[any_step])
    for part in (adversarial, rectify):
        follows(own.t[part])
    rest = slice(flow.start, None)
    assert torch.equal(own.r[rest], own.t[rest])


def test_teachers_times_follow_one_after_the_other():
    """t_i ~ U(r, t_{i-1}), t_0 = t - dt, each with nothing to do with the others."""
    own = drawn(share=0.0, flow_share=0.0, order=4, even_inner=False)
    times = [own.t - 0.01, *own.inner]
    places = [(b - own.r) / (a - own.r) for a, b in itertools.pairwise(times)]
    assert len(places) == 3
    for place in places:
        follows(place)
    for a, b in itertools.combinations([*places, own.t, own.r / times[0]], 2):
        unrelated(a, b)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_share_of_the_any_step_rows_is_the_jump_of_one_step_sampling(share):
    """Each row with that probability; the others' times are those without it."""
    own = drawn(share=0.0, flow_share=0.2, one_step_share=share)
    any_step = own.slices()[0]
    one = (own.t[any_step] == 1) & (own.r[any_step] == 0)
    n = len(one)
    assert abs(one.double().mean() - share) < 6 * (share * (1 - share) / n) ** 0.5
    unrelated(one[1:], one[:-1])
    t, r = own.t[any_step][~one], own.r[any_step][~one]
    follows((t - 0.01) / 0.99)
    follows(r / (t - 0.01))
    assert torch.equal(own.t[own.slices()[1]], own.r[own.slices()[1]]) and own.t[own.slices()[1]].max() < 1


def test_each_sample_comes_in_each_part_equally_often():
    """The rows are a permutation, all 24 of four samples equally likely."""
    generator, loss, x = torch.Generator().manual_seed(0), printed(share=0.5), torch.zeros(4, 1)
    orders = [tuple(draws.draw_for(loss, x, generator).rows.tolist()) for _ in range(4800)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == 4800
    assert max(abs(count - 200) for count in counts) < 6 * (200 * 23 / 24) ** 0.5


divided = st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any)


@given(divided, st.integers(1, 60), seeds)
def test_a_batch_with_a_row_for_every_part_is_always_divided_alike(weights, n, seed):
    """Nothing is drawn. Every part that has a share has rows, n times its share to within one, or within as many as the
    others need for their first; each is divided by its own."""
    shares = [weight / sum(weights) for weight in weights]
    live = [share for share in shares if share]
    n += len(live)
    generator = torch.Generator().manual_seed(seed)
    before = generator.get_state()
    counts, divisors = draws.split(n, shares, generator)
    assert torch.equal(generator.get_state(), before)
    assert (
        sum(counts) == n
        and counts == divisors
        and all((rows > 0) == (share > 0) for rows, share in zip(counts, shares))
    )
    lifted = sum(max(0.0, 1 - n * share) for share in live)
    assert all(-1 - lifted < rows - n * share < 1 for rows, share in zip(counts, shares))


def test_no_counts_with_a_row_for_every_part_are_nearer_to_the_shares():
    """All of a grid of shares and small batches, in which some parts get their only row from others: no row that goes
    over from one part to another makes the sum of squares smaller."""
    for weights in itertools.product((1, 3, 8, 40), repeat=4):
        shares = np.array(weights) / sum(weights)
        for n in range(4, 24):
            counts, divisors = draws.split(n, shares.tolist())
            assert sum(counts) == n and min(counts) > 0 and counts == divisors
            over = np.array(counts) - n * shares
            gives, takes = np.where(np.array(counts) > 1, over, -np.inf).max(), over.min()
            assert (gives - 1) ** 2 + (takes + 1) ** 2 >= gives**2 + takes**2 - 1e-9


@given(st.integers(1, 30))
def test_whole_shares_of_a_batch_are_the_counts(n):
    assert draws.split(6 * n, (1 / 3, 1 / 3, 1 / 6, 1 / 6))[0] == (2 * n, 2 * n, n, n)
    assert draws.split(10 * n, (0.7, 0.0, 0.3))[0] == (7 * n, 0, 3 * n)


@pytest.mark.parametrize("share, n", [(0.3, 1), (0.7, 1), (0.3, 2), (0.7, 3)])
def test_with_fewer_rows_than_parts_these_take_turns(share, n):
    """n times (1 - share) / 2 twice and n times share / 2 twice, to within one, and in the mean exactly. By those
    numbers sums are divided, so that in the mean each part has its weight."""
    generator, x = torch.Generator().manual_seed(0), torch.zeros(n, 1)
    found = [draws.draw_for(printed(share=share, flow_share=0.5), x, generator) for _ in range(4000)]
    due = n * np.array([1 - share, 1 - share, share, share]) / 2
    away = np.array([one.counts for one in found]) - due
    assert np.abs(away).max() < 1 and all(one.divisors == pytest.approx(due) for one in found[:9])
    assert (np.abs(away.mean(0)) < 6 * away.std(0) / 4000**0.5 + 1e-12).all()


@settings(max_examples=20)
@given(seeds, seeds)
def test_processes_whose_turns_are_drawn_alike_have_the_same_counts_and_their_own_noise(seed, other):
    """Two draws from one generator are two; the counts are those of `turns` alone."""
    a, b = (drawn(2, s, torch.Generator().manual_seed(seed), share=0.4) for s in (seed, seed + 1))
    assert a.counts == b.counts and not torch.equal(a.z, b.z)
    counts = {drawn(2, seed, torch.Generator().manual_seed(other + i), share=0.4).counts for i in range(40)}
    assert len(counts) > 1
    alone = set()
    for i in range(10):  # without turns the noise's generator draws them, not torch's own
        torch.manual_seed(i)
        alone.add(drawn(2, seed, share=0.4).counts)
    assert len(alone) == 1
    generator = torch.Generator().manual_seed(seed)
    one, two = (draws.draw_for(printed(), torch.zeros(4, 1), generator) for _ in range(2))
    assert not torch.equal(one.z, two.z) and not torch.equal(one.t, two.t)


@given(seeds, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_every_number_is_that_of_the_generator_and_times_are_at_least_float32(seed, dtype):
    x = torch.zeros(9, 2, dtype=dtype)
    first, again = (draws.draw_for(printed(order=3), x, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert first.z.dtype == first.z_new.dtype == dtype
    assert {time.dtype for time in (first.t, first.r, *first.inner)} == {torch.promote_types(dtype, torch.float32)}
    for name in ("rows", "z", "z_new", "t", "r"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.counts == again.counts and all(map(torch.equal, first.inner, again.inner))


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=4), st.integers(0, 3))
def test_a_seeded_stream_depends_on_every_number_of_its_key(key, place):
    """The same key the same stream, one number changed another; a known value, for resumed runs need it to stay."""
    own = draws.seeded(*key)
    assert own.initial_seed() == draws.seeded(*key).initial_seed() < 2**63
    key[place % len(key)] += 1
    assert own.initial_seed() != draws.seeded(*key).initial_seed()
    assert draws.seeded(0).initial_seed() == np.random.SeedSequence(0).generate_state(1, np.uint64)[0] // 2


@given(seeds, st.floats(-2, 2), st.floats(0.1, 3))
def test_uniform_numbers_lie_where_they_are_asked_to(seed, low, width):
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    values = draws.uniform(torch.zeros(50, 3).double(), generators[0], low, low + width)
    expected = torch.rand(50, generator=generators[1], dtype=torch.float64)
    torch.testing.assert_close(values, low + width * expected)
    follows(draws.uniform(torch.zeros(N, 1), torch.Generator().manual_seed(1)))


def test_the_mean_of_a_part_is_its_sum_by_its_divisor():
    values = torch.tensor([1.0, 2.0, 6.0])
    assert draws.mean(values, 4.5) == 2 and draws.mean(values[:0], 0.0) == 0 and draws.mean(values[:0], 0.5) == 0
