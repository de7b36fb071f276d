"""The sampler's counter-based noise in numpy, against which ``counter_uniform`` of the kernels is held."""

import numpy as np

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def _mix(x):
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014) on uint64 arrays."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def numpy_uniform(seed, prompt_index, group_index, position):
    """Float64 uniforms in (0, 1) keyed by (seed, prompt, member of the group, position): arrays that broadcast."""
    with np.errstate(over="ignore"):
        state = np.uint64(seed & int(_MASK))
        for key in (prompt_index, group_index, position):
            counter = np.asarray(key, dtype=np.uint64) + np.uint64(1)
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) * counter)
        # 52 bits: with 53 the half would be rounded, and the largest draw to 1.
        return ((_mix(state) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
