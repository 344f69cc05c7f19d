import hashlib
import math

import numpy as np
import pytest

from refattn.errors import SpecError
from refattn.philox import identifier, normal12, philox4x32, words


def block(counter, key):
    """Philox4x32-10 again, one block at a time, on Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for n in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        ka, kb = (k0 + n * 0x9E3779B9) % 2**32, (k1 + n * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = (b // 2**32) ^ c1 ^ ka, b % 2**32, (a // 2**32) ^ c3 ^ kb, a % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter, key, answer):
    counter, key, answer = ([int(w, 16) for w in text.split()] for text in (counter, key, answer))
    assert [int(w) for w in philox4x32(counter, key)] == answer
    assert list(block(counter, key)) == answer


def test_arrays_agree_with_python_integers():
    rng = np.random.default_rng(3)
    counter = rng.integers(0, 2**32, (4, 5, 20), dtype=np.uint32)
    key = (0xDEADBEEF, 0x00000001)
    got = philox4x32(counter, key)
    assert all(w.dtype == np.uint32 and w.shape == (5, 20) for w in got)
    for at in np.ndindex(5, 20):
        assert [int(w[at]) for w in got] == list(block([int(c[at]) for c in counter], key))


def test_counters_broadcast():
    got = philox4x32((np.arange(3)[:, None], 0, np.arange(2), 7), (1, 2))
    assert all(w.shape == (3, 2) for w in got)
    assert [int(w[2, 1]) for w in got] == list(block((2, 0, 1, 7), (1, 2)))


def test_identifier_is_the_head_of_sha256():
    assert identifier("abc") == 0xBA7816BF  # the published digest of "abc" begins so
    assert identifier("∞") == int(hashlib.sha256(b"\xe2\x88\x9e").hexdigest()[:8], 16)


def test_counter_and_key_of_an_element():
    seed = 0x0123456789ABCDEF
    got = words(seed, "sdpa-0001", "q", 40)
    for i in (0, 1, 39):
        expected = block((i, 0, identifier("q"), identifier("sdpa-0001")), (0x89ABCDEF, 0x01234567))
        assert [int(w[i]) for w in got] == list(expected)


def test_an_element_depends_on_its_own_index_alone():
    long = words(7, "case", "k", 1000)
    for count in (0, 1, 999):
        for short, all_of_them in zip(words(7, "case", "k", count), long, strict=True):
            assert short.dtype == np.uint32
            np.testing.assert_array_equal(short, all_of_them[:count])


def test_seed_case_and_tensor_each_change_the_words():
    first = words(7, "case", "k", 8)
    for other in (words(8, "case", "k", 8), words(7 + 2**32, "case", "k", 8), words(7, "k", "case", 8)):
        assert all((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(SpecError, match=f"given {seed}"):
        words(seed, "case", "k", 1)


def test_normal12_sums_the_bytes_of_three_words():
    def k(*w):
        return int(normal12(tuple(np.array([x], np.uint32) for x in w))[0])

    full = 2**32 - 1
    assert k(0, 0, 0, full) == -1530
    assert k(full, full, full, 0) == 1530
    for place in range(3):
        for shift in (0, 8, 16, 24):
            w = [0, 0, 0, 0]
            w[place] = 200 << shift
            assert k(*w) == 200 - 1530
    assert normal12(words(1, "case", "q", 3)).dtype == np.int64


def test_moments_of_normal12():
    n = 100_000
    k = normal12(words(2024, "moments", "q", n)).astype(np.float64)
    # Twelve uniform bytes: variance 12·(256² − 1)/12, excess kurtosis −(6/5)·(256² + 1)/(256² − 1)/12; the spread of
    # the fourth sample moment needs the eighth, taken from the exact distribution.
    variance, kurtosis = 65535.0, 3 - 0.1 * 65537 / 65535
    exact = np.array([1.0])
    for _ in range(12):
        exact = np.convolve(exact, np.full(256, 1 / 256))
    support = np.arange(-1530, 1531)
    m2, m4, m8 = (float(exact @ support.astype(float) ** p) for p in (2, 4, 8))
    assert math.isclose(m2, variance, rel_tol=1e-12)
    assert math.isclose(m4 / m2**2, kurtosis, rel_tol=1e-12)
    # Five standard deviations each: a sound generator fails one seed in a million, and this seed is fixed.
    assert abs(k.mean()) < 5 * math.sqrt(m2 / n)
    assert abs((k**2).mean() - m2) < 5 * math.sqrt((m4 - m2**2) / n)
    assert abs((k**4).mean() - m4) < 5 * math.sqrt((m8 - m4**2) / n)
    for lag in (1, 2, 64):
        assert abs((k[lag:] * k[:-lag]).mean()) < 5 * m2 / math.sqrt(n - lag)
    other = normal12(words(2024, "moments", "k", n))
    assert abs((k * other).mean()) < 5 * m2 / math.sqrt(n)
