"""
Multi-query associative recall: what a model can look up in its own past
    Arora et al. 2023, "Zoology", arXiv:2312.04927v1, section 4

An example is `pairs` keys, each with its value, then every key once more in another order; after each of these the
value must follow. Attention looks the key up. A state of fixed size must have kept all pairs; it forgets when there are
more than it holds.
    k1 v1 k2 v2 k3 v3 | k2 v2 k1 v1 k3    targets: the value after each key of the second half, -1 (ignored) elsewhere

Examples are drawn from a seed, never stored: bench/arena.py trains and tests on them.

    python data/recall.py                   prints one
"""
import sys

import numpy as np

VOCAB = 32  # keys are the first half of the ids, values the second


def examples(rng, n, pairs):
    """-> tokens, targets (n, 4 pairs - 1) int64; targets are -1 but after a key of the second half: there its value."""
    half = VOCAB // 2
    if not 0 < pairs <= half:
        raise ValueError(f"pairs {pairs}: 1 to {half}, each key stands once")
    keys = rng.permuted(np.tile(np.arange(half), (n, 1)), axis=1)[:, :pairs]  # (n, pairs)
    values = rng.integers(half, VOCAB, (n, pairs))
    order = rng.permuted(np.tile(np.arange(pairs), (n, 1)), axis=1)
    asked, answers = np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)
    sequence = np.stack([np.concatenate([keys, asked], 1),
                         np.concatenate([values, answers], 1)], 2).reshape(n, -1)  # (n, 4 pairs)
    targets = np.full((n, 4 * pairs - 1), -1)
    targets[:, 2 * pairs :: 2] = answers
    return sequence[:, :-1], targets


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("data/recall.py: takes no arguments and is no --data set: "
                 "its examples are made as they are needed, by bench/arena.py")
    tokens, targets = examples(np.random.default_rng(0), 1, 4)
    print("tokens ", *(f"{t:4}" for t in tokens[0]))
    print("targets", *(f"{t:4}" if t >= 0 else "   ." for t in targets[0]))
