import numpy as np

from asit_hf.data.randomness import sample_key


def test_sample_keys_are_distinct_and_fit_int64():
    keys = {
        sample_key(seed, epoch, index, attempt)
        for seed in range(3)
        for epoch in range(5)
        for index in range(200)
        for attempt in range(2)
    }
    assert len(keys) == 3 * 5 * 200 * 2
    assert all(0 <= key < 2**63 for key in keys)
    bits = np.array([[key >> bit & 1 for bit in range(63)] for key in keys])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.05
    assert sample_key(-1, 0, 2**40) == sample_key(np.int64(-1), np.int64(0), np.int64(2**40))
    # Pinned: a change would change the crops and masks of every run that is resumed.
    assert sample_key(0, 0, 0) == 1195769770526638388
