"""Dropout against its documented layout, written out again in plain integers, and against chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cuflash.dropout import Dropout, dropout_mask, keep_mask, philox_4x32

SEED = 0x0123_4567_89AB_CDEF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(rounds):
        product = MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]
        c = [product[1] >> 32 ^ c[1] ^ k[0], product[1] & WORD, product[0] >> 32 ^ c[3] ^ k[1], product[0] & WORD]
        k = [(k[0] + WEYL[0]) & WORD, (k[1] + WEYL[1]) & WORD]
    return c


def keep_by_hand(dropout: Dropout, b: int, h: int, i: int, j: int) -> bool:
    counter = (i // 16) * 8 + i % 8, (j // 16) * 4 + (j % 8) // 2, h | b << 16, dropout.offset
    words = philox_by_hand(counter, (dropout.seed & WORD, dropout.seed >> 32), rounds=7)
    bits = words[2 * (j % 2) + (j // 8) % 2] >> (16 * ((i // 8) % 2)) & 0xFFFF
    return bits >= dropout.threshold


# Counter 0 and key 0; counter and key all ones; digits of pi: vectors of the Random123 distribution.
ONES = (WORD,) * 4
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    "rounds, counter, key, expected",
    [
        (7, (0, 0, 0, 0), (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (10, (0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, ONES, ONES[:2], "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, *PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(rounds, counter, key, expected):
    assert [f"{int(word):08x}" for word in philox_4x32(counter, key, rounds)] == expected.split()


def test_philox_broadcasts_its_counter_words():
    counter = np.arange(3)[:, None], np.arange(5), 7, 11
    words = philox_4x32(counter, (13, 17))
    for i, j in np.ndindex(3, 5):
        assert [int(word[i, j]) for word in words] == philox_by_hand((i, j, 7, 11), (13, 17), rounds=7)


@pytest.mark.parametrize("batch, head, offset", [(0, 0, 0), (3, 5, 9), (65534, 65534, WORD)])
def test_keep_mask_has_the_documented_layout(batch, head, offset):
    dropout = Dropout(0.4, SEED, offset)
    i, j = np.array([0, 1, 7, 8, 9, 15, 16, 31, 40, 1_000_003]), np.array([0, 1, 2, 7, 8, 9, 14, 15, 16, 25, 2_000_005])
    mask = keep_mask(dropout, batch, head, i, j)
    expected = [[keep_by_hand(dropout, batch, head, int(row), int(column)) for column in j] for row in i]
    np.testing.assert_array_equal(mask, expected)


def test_a_tile_is_a_part_of_the_whole_in_any_order():
    whole = dropout_mask((2, 3, 77, 91), 0.3, SEED, offset=5)
    i, j = np.array([5, 70, 6, 33]), np.arange(90, 3, -1)
    np.testing.assert_array_equal(keep_mask(Dropout(0.3, SEED, 5), 1, 2, i, j), whole[1, 2][i[:, None], j])


def test_an_empty_tile():
    assert keep_mask(Dropout(0.3, SEED), 0, 0, np.arange(0), np.arange(4)).shape == (0, 4)
    assert dropout_mask((1, 1, 3, 0), 0.3, SEED).shape == (1, 1, 3, 0)


@pytest.mark.parametrize("p", [0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.9999])
def test_the_realised_rate_is_the_threshold(p):
    dropout = Dropout(p, SEED)
    mask = dropout_mask((2, 2, 512, 512), p, SEED)
    kept = 1 - dropout.threshold / 65536
    assert stats.binomtest(int(mask.sum()), mask.size, kept).pvalue > 1e-4
    assert dropout.scale * kept == 1
    assert abs(kept - (1 - p)) <= 0.5 / 65536


def test_the_rate_is_never_rounded_to_dropping_everything():
    dropout = Dropout(1 - 1e-9, SEED)
    assert dropout.threshold == 65535
    assert np.isfinite(dropout.scale)


def test_thresholds_cut_the_scores_into_equal_shares():
    i = np.arange(256)
    shares = sum(keep_mask(Dropout(step / 64, SEED), 0, 0, i, i).astype(int) for step in range(64))
    assert stats.chisquare(np.bincount(shares.ravel() - 1, minlength=64)).pvalue > 1e-4


@pytest.mark.parametrize("byte", range(4))
@pytest.mark.parametrize("word", range(4))
def test_every_byte_of_the_words_is_uniform(word, byte):
    words = philox_4x32((np.arange(512)[:, None], np.arange(128), 0, 0), (SEED & WORD, SEED >> 32))[word]
    values = words >> np.uint32(8 * byte) & np.uint32(0xFF)
    assert stats.chisquare(np.bincount(values.ravel(), minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize("step", [(0, 1), (0, 2), (0, 8), (1, 0), (8, 0), (8, 8), (8, 1), (0, 16), (16, 0)])
def test_neighbours_are_independent(step):
    mask = dropout_mask((1, 1, 1024, 512), 0.5, SEED)[0, 0]
    rows, columns = mask.shape[0] - step[0], mask.shape[1] - step[1]
    pairs = stats.contingency.crosstab(mask[:rows, :columns].ravel(), mask[step[0] :, step[1] :].ravel()).count
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


@pytest.mark.parametrize(
    "other", [{"seed": SEED + 1}, {"seed": SEED ^ 1 << 63}, {"offset": 1}, {"batch": 1}, {"head": 1}], ids=str
)
def test_every_part_of_the_key_gives_another_mask(other):
    call = {"seed": SEED, "offset": 0, "batch": 0, "head": 0}

    def mask(seed: int, offset: int, batch: int, head: int) -> np.ndarray:
        return keep_mask(Dropout(0.5, seed, offset), batch, head, np.arange(256), np.arange(256))

    agreement = int((mask(**call) == mask(**call | other)).sum())
    assert stats.binomtest(agreement, 256 * 256, 0.5).pvalue > 1e-4


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (((1, 1, 4), 0.1, 0), ValueError, r"shape is \(1, 1, 4\)"),
        (((1, 1, -4, 4), 0.1, 0), ValueError, "none negative"),
        (((1, 1.5, 4, 4), 0.1, 0), TypeError, "shape is"),
        ((7, 0.1, 0), TypeError, "shape is 7"),
        (((1 << 16, 1, 1, 1), 0.1, 0), ValueError, "below 65536"),
        (((1, 1, 4, 4), 1.0, 0), ValueError, "dropout_p is 1.0"),
        (((1, 1, 4, 4), -0.1, 0), ValueError, "dropout_p is -0.1"),
        (((1, 1, 4, 4), float("nan"), 0), ValueError, "dropout_p is nan"),
        (((1, 1, 4, 4), 0.1, 0.5), TypeError, "seed is 0.5"),
        (((1, 1, 4, 4), 0.1, 1 << 64), ValueError, "seed is 18446744073709551616"),
        (((1, 1, 4, 4), 0.1, -1), ValueError, "seed is -1"),
        (((1, 1, 4, 4), 0.1, 0, 1 << 32), ValueError, "offset is 4294967296"),
    ],
)
def test_dropout_mask_names_a_wrong_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        dropout_mask(*arguments)
