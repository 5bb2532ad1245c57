"""The projection: published vectors for Philox, slabs, distribution, equality across processes."""

import hashlib
import math
import statistics
import subprocess
import sys

import pytest
import torch

from apollo_dist.kernels.philox import philox_4x32_10
from apollo_dist.projections.gaussian import gaussian

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    words = philox_4x32_10(tuple(torch.tensor([c, c]) for c in counter), tuple(map(torch.tensor, key)))
    assert tuple(int(w[0]) for w in words) == result
    assert tuple(int(w[1]) for w in words) == result


def philox_by_the_paper(counter, key):
    """The same generator on Python's integers."""
    (a, b, c, d), (k, q) = counter, key
    for _ in range(10):
        p, r = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (r >> 32) ^ b ^ k, r & (2**32 - 1), (p >> 32) ^ d ^ q, p & (2**32 - 1)
        k, q = (k + 0x9E3779B9) % 2**32, (q + 0xBB67AE85) % 2**32
    return a, b, c, d


def entry(seed, name, refresh, row, column, kind):
    """One entry of P, unscaled, from the definition."""
    digest = hashlib.blake2b(f"apollo_dist projection\0{seed}\0{refresh}\0{name}".encode(), digest_size=16).digest()
    k0, k1, c2, c3 = (int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))
    calls = {"gaussian": 8, "rademacher": 128}[kind]
    words = philox_by_the_paper((column, row // calls, c2, c3), (k0, k1))
    bits = sum(word << 32 * i for i, word in enumerate(words))
    if kind == "rademacher":
        return -1.0 if bits >> row % 128 & 1 else 1.0
    return statistics.NormalDist().inv_cdf(((bits >> 16 * (row % 8)) % 2**16 + 0.5) / 2**16)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_entries_are_those_of_the_definition(kind):
    rank, size = 300, 4000
    for dtype in (torch.float32, torch.float64):
        found = gaussian(7, "layers.1.w", 3, rank, size, dtype=dtype, kind=kind) * math.sqrt(rank)
        for row, column in [(0, 0), (0, 3999), (7, 1), (8, 1), (127, 70), (128, 70), (255, 2100), (299, 3998)]:
            # Of a normal number 8 bits are kept.
            assert float(found[row, column]) == pytest.approx(
                entry(7, "layers.1.w", 3, row, column, kind), rel=2.0**-8 * 1.001 if kind == "gaussian" else 1e-6
            )


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [1, 3, 4, 130])
def test_slabs_equal_slices_bit_for_bit(rank, kind):
    size = 5000
    for dtype in (torch.float32, torch.float64):
        whole = gaussian(3, "layers.0.w", 2, rank, size, dtype=dtype, kind=kind)
        assert whole.shape == (rank, size) and whole.is_contiguous() and whole.dtype == dtype
        for start, stop in [(0, 0), (0, 1), (7, 24), (1023, 3001), (4999, 5000), (0, size)]:
            slab = gaussian(3, "layers.0.w", 2, rank, size, start, stop, dtype=dtype, kind=kind)
            assert torch.equal(slab, whole[:, start:stop])


def test_float32_is_float64_rounded():
    assert torch.equal(gaussian(0, "a", 0, 8, 1000), gaussian(0, "a", 0, 8, 1000, dtype=torch.float64).float())


def test_distribution():
    rank, size = 64, 40000
    x = gaussian(0, "w", 0, rank, size, dtype=torch.float64) * rank**0.5
    n = x.numel()
    # Five standard errors of each estimate.
    assert abs(float(x.mean())) < 5 / n**0.5
    assert abs(float(x.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((x**3).mean())) < 5 * (15 / n) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 5 * (96 / n) ** 0.5
    # Half way between two bf16 numbers, so that rounding to them moves nothing over a bound.
    for bound in (1 + 2.0**-8, 2 + 2.0**-7, 3 + 2.0**-7):
        probability = math.erfc(bound / 2**0.5)
        found = float((x.abs() > bound).double().mean())
        assert abs(found - probability) < 5 * (probability / n) ** 0.5
    # Rows and neighbouring columns are uncorrelated.
    correlation = (x @ x.T) / size - torch.eye(rank, dtype=torch.float64)
    assert float(correlation.abs().max()) < 6 / size**0.5
    assert abs(float((x[:, 1:] * x[:, :-1]).mean())) < 5 / n**0.5


def test_signs_are_even_and_independent():
    rank, size = 256, 10000
    x = gaussian(0, "w", 0, rank, size, dtype=torch.float64, kind="rademacher") * rank**0.5
    assert torch.equal(x.abs(), torch.ones_like(x))
    assert abs(float(x.mean())) < 5 / x.numel() ** 0.5
    correlation = (x @ x.T) / size - torch.eye(rank, dtype=torch.float64)
    assert float(correlation.abs().max()) < 6 / size**0.5
    assert abs(float((x[:, 1:] * x[:, :-1]).mean())) < 5 / x.numel() ** 0.5


def test_identity_is_seed_name_and_refresh():
    base = gaussian(0, "a", 0, 4, 50)
    for other in [gaussian(1, "a", 0, 4, 50), gaussian(0, "b", 0, 4, 50), gaussian(0, "a", 1, 4, 50)]:
        assert float((base * other).sum()) / 50 < 0.5
        # Of 65,536 values two are seldom the same one.
        assert int(torch.isclose(base, other).sum()) < 5
    assert torch.equal(base, gaussian(0, "a", 0, 4, 50))


def test_another_process_draws_the_same():
    code = (
        "import hashlib, torch; from apollo_dist.projection import gaussian; torch.manual_seed(9); torch.rand(3);"
        "print(hashlib.sha256(gaussian(5, 'm', 7, 6, 333).numpy().tobytes()).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == hashlib.sha256(gaussian(5, "m", 7, 6, 333).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    "arguments",
    [(0, "a", 0, 0, 5), (0, "a", -1, 2, 5), (0, "a", 0, 2, 5, 3, 2), (0, "a", 0, 2, 5, 0, 6), (0, "a", 0, 2, 5, -1, 2)],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=r"must be|need"):
        gaussian(*arguments)


def test_bad_dtype_and_kind():
    with pytest.raises(ValueError, match="bfloat16"):
        gaussian(0, "a", 0, 2, 5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="kind must be one of gaussian, rademacher, got 'std'"):
        gaussian(0, "a", 0, 2, 5, kind="std")
