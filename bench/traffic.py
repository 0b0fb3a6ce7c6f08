"""
What each op's kernels move and need, found without a GPU: one row for its forward, one for its backward

    python bench/traffic.py              every file of kernels/
    python bench/traffic.py norm matmul  some of them
    python bench/traffic.py --table      with the heading that bench/RESULTS.md wants

The cases are bench_cases() of tests/test_<op>.py (see tests/kernelcheck.py), small enough for Triton's interpreter.
"""
import argparse
import datetime
import glob
import importlib
import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # this process counts; the one that imports this file compiles
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import kernelcheck as K  # noqa: E402

BANDWIDTH = 504e9  # an RTX 4070, bytes/s
FLOPS = {"fp32": 29e12, "fp16": 58e12, "bf16": 58e12, "int8": 117e12}  # and FLOP/s of tl.dot (fp32, int32 accumulation)
LEGEND = """\
Bytes: as the kernels, and PyTorch around them, ask for; in brackets each address once per launch (a perfect cache).
Floor: each input read once, each output written once. FLOPs: of tl.dot. Registers, shared memory, spills, occupancy:
the worst launch on sm_89. Roofline: the least time on an RTX 4070, of the bytes in brackets at 504 GB/s or the FLOPs at
58 TFLOP/s (fp32: 29); no latency, no launch cost, no other arithmetic. Nothing was timed."""
HEAD = ("op", "pass", "bytes / floor", "floor (MB)", "FLOPs (M)", "launches", "registers", "smem", "spills",
        "occupancy", "roofline")


def bench_cases(op):
    path = os.path.join(ROOT, "tests", f"test_{op}.py")
    return getattr(importlib.import_module(f"test_{op}"), "bench_cases", list)() if os.path.exists(path) else []


def launches(op):
    """Runs in the compiling process: the launches of each pass, under its name."""
    for name, forward, backward, _, _ in bench_cases(op):
        K.label = name + " forward"
        out = forward()
        K.label = name + " backward"
        if backward is not None:
            backward(out)


def row(name, which, t, floor, machine):
    """One line of the table, from the counters of a pass and the machine code of its launches."""
    assert not t.faults, t.faults
    assert machine and not any("error" in m for m in machine), machine
    by_dot = sum(n / FLOPS[kind] for kind, n in t.flops.items())
    seconds, bound = max((t.once / BANDWIDTH, "memory"), (by_dot, "tl.dot"))
    worst = lambda key, pick=max: pick(m[key] for m in machine)
    return (name, which, f"{t.bytes / floor:.2f} ({t.once / floor:.2f})", f"{floor / 1e6:.2f}",
            f"{sum(t.flops.values()) / 1e6:.0f}", len(t.kernels), worst("regs"), worst("smem"), worst("spills"),
            f"{worst('occupancy', min):.0%}", f"{seconds * 1e6:.1f} us, {bound}")


def rows(op):
    cases = bench_cases(op)
    machine = K.compiled("traffic", "launches", (89,), (op,)) if cases else []
    for name, forward, backward, forward_floor, backward_floor in cases:
        code = lambda which: [m for m in machine if m["label"] == f"{name} {which}"]
        with K.count() as t:
            out = forward()
        yield row(name, "forward", t, forward_floor, code("forward"))
        if backward is not None:
            with K.count() as t:
                backward(out)
            yield row(name, "backward", t, backward_floor, code("backward"))


def main():
    ops = sorted(os.path.basename(f)[:-3] for f in glob.glob(os.path.join(ROOT, "kernels", "[a-z]*.py")))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ops", nargs="*", help=f"kernel files; all by default: {' '.join(ops)}")
    p.add_argument("--table", action="store_true", help="print heading, date and legend too")
    a = p.parse_args()
    unknown = [op for op in a.ops if op not in ops]
    if unknown:
        p.error(f"no kernels/{unknown[0]}.py; there are {' '.join(ops)}")
    os.environ["PYTHONPATH"] = os.path.join(ROOT, "bench")  # where the compiling process finds this file
    if a.table:
        print(f"## Kernel traffic\n\n`python bench/traffic.py --table`, {datetime.date.today()}, "
              f"Triton {K.triton.__version__}, PyTorch {K.torch.__version__}.\n\n{LEGEND}\n")
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
    for op in a.ops or ops:
        for line in rows(op):
            print("| " + " | ".join(map(str, line)) + " |", flush=True)


if __name__ == "__main__":
    main()
