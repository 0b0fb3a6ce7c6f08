"""
State tracking: follow a product of permutations
    Merrill, Petty & Sabharwal 2024, "The Illusion of State in State-Space Models", arXiv:2404.08819v3, section 4

Each token is a permutation of `objects` things; after each, the model must say how the things lie now, that is the
product of all so far, again one of the factorial(objects) permutations. With 2 objects that is parity, with 5 the word
problem of the group S5: no diagonal recurrence, nor attention, of fixed depth does it at every length; a state whose
update is a full matrix can.
    tokens   p1  p2      p3 ...
    targets  p1  p2 p1   p3 p2 p1 ...

Examples are drawn from a seed, never stored: bench/arena.py trains and tests on them.

    python data/states.py                   prints one
"""
import functools
import itertools
import sys

import numpy as np


@functools.lru_cache
def group(objects):
    """-> (elements (n!, objects) in lexical order, table (n!, n!): table[p, q] is the number of `p after q`)."""
    elements = np.array(list(itertools.permutations(range(objects))))
    place = {tuple(e): i for i, e in enumerate(elements)}
    return elements, np.array([[place[tuple(p[q])] for q in elements] for p in elements])


def examples(rng, n, length, objects):
    """-> tokens, targets (n, length) int64, each below factorial(objects)."""
    elements, table = group(objects)
    tokens = rng.integers(len(elements), size=(n, length))
    targets = tokens.copy()
    for t in range(1, length):
        targets[:, t] = table[tokens[:, t], targets[:, t - 1]]
    return tokens, targets


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("data/states.py: takes no arguments and is no --data set: "
                 "its examples are made as they are needed, by bench/arena.py")
    elements, _ = group(3)
    for name, row in zip(("tokens ", "targets"), examples(np.random.default_rng(0), 1, 8, 3)):
        print(name, *("".join(map(str, elements[i])) for i in row[0]))
