"""The compiled miss rate and its definition, side by side."""

import numpy as np

from hkd_d2.evaluation import evaluate_miss_rate


def assert_same_bits(*args, **kwargs):
    with np.errstate(all="ignore"):
        compiled = evaluate_miss_rate(*args, impl="compiled", **kwargs)
        reference = evaluate_miss_rate(*args, impl="reference", **kwargs)
    assert list(compiled) == list(reference)
    for name, expected in reference.items():
        result = compiled[name]
        assert result.setup == expected.setup
        for field in ("num_ground_truth", "num_detections"):
            assert getattr(result, field) == getattr(expected, field)
        for field in ("scores", "fppi", "miss", "reference_miss"):
            ours, theirs = getattr(result, field), getattr(expected, field)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.tobytes() == theirs.tobytes(), (name, field)
        assert np.float64(result.miss_rate).tobytes() == np.float64(expected.miss_rate).tobytes()
    return compiled
