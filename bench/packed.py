"""One token through BitNet's packed layer (2 bits a weight) against F.linear of its shape in fp32 and bf16, in turns.

    python bench/packed.py    N x K of BitNet b1.58 2B4T's layers and 2048 x 2048; us a token, median (least)

Copies of each matrix go round, 64 MB of packed bytes and more of the others: generation finds its weights in memory.
`slices` is the form without a C compiler.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
from kernels import bitlinear  # noqa: E402

SHAPES = [(2048, 2048), (2560, 2560), (6912, 2560), (2560, 6912)]


def contestants(N, K, copies):
    """name -> the layer's copies, each a function of nothing; packed_linear has the norm and the quantisation too."""
    x, g = torch.randn(1, K), torch.rand(K)
    weights = [torch.randn(N, K) for _ in range(copies)]
    packs = [(bitlinear.pack(bitlinear.quantize_weight(w)[0]), torch.tensor(1.0)) for w in weights]
    low, x16 = [w.bfloat16() for w in weights], x.bfloat16()
    packed = [lambda p=p: bitlinear.packed_linear(x, g, [p]) for p in packs]
    compiled = bitlinear.compiled

    def without(f):
        def run():
            bitlinear.compiled = lambda source: None
            try:
                return f()
            finally:
                bitlinear.compiled = compiled

        return run

    return {
        "packed_linear": packed,
        "F.linear fp32": [lambda w=w: F.linear(x, w) for w in weights],
        "F.linear bf16": [lambda w=w: F.linear(x16, w) for w in low],
        "slices": [without(f) for f in packed],
    }


@torch.inference_mode()
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=30)
    rounds = p.parse_args(argv).rounds
    if bitlinear.compiled(bitlinear.SOURCE) is None:
        print("no C compiler here (CC, gcc, clang): packed_linear is the form in slices")
    for i, (N, K) in enumerate(SHAPES):
        made = contestants(N, K, 2**28 // (N * K))
        if not i:
            print(f"| N x K | {' | '.join(made)} |\n" + "|---" * (1 + len(made)) + "|")
        times = {name: [] for name in made}
        for _ in range(rounds):
            for name, layers in made.items():
                start = time.perf_counter()
                for layer in layers:
                    layer()
                times[name].append((time.perf_counter() - start) / len(layers) * 1e6)
        print(f"| {N} x {K} | "
              f"{' | '.join(f'{statistics.median(t[1:]):,.0f} ({min(t[1:]):,.0f})' for t in times.values())} |",
              flush=True)


if __name__ == "__main__":
    main()
