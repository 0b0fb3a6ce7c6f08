"""Loss curves of runs in one picture.

    python bench/plot.py out/gpt2/log.csv other/log.csv              curves.png; a run's name is its folder
    python bench/plot.py out/*/log.csv --x seconds --out time.png    --x: tokens, seconds or step

Thin lines: the training loss as logged, and its mean over a twentieth of the run. Marked lines: validation loss.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402


def bad(message):
    print(f"plot.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def read(path, x):
    """log.csv -> [(x, loss)], [(x, val)]."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        x = "pictures" if x == "tokens" and rows and "pictures" in rows[0] else x
        train = [(float(r[x]), float(r["loss"])) for r in rows]
        val = [(float(r[x]), float(r["val"])) for r in rows if r["val"]]
    except OSError as e:
        bad(f"{path}: {e.strerror}")
    except (KeyError, ValueError, TypeError, csv.Error):  # TypeError: a row that ends early
        bad(f"{path}: no log.csv of a run (columns step, tokens, seconds, loss, val, ...)")
    if not rows:
        bad(f"{path}: the run has logged nothing yet")
    return train, val


def labels(paths):
    """The folders' names, with as many parents as it takes to tell them apart."""
    parts = [p.resolve().parent.parts for p in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return names  # a file given twice


def smooth(points):
    """Mean over a twentieth of the run around each point, less at the ends: it does not lag behind."""
    half, out = len(points) // 40, []
    for i, (x, _) in enumerate(points):
        n = min(half, i, len(points) - 1 - i)
        near = [y for _, y in points[i - n : i + n + 1]]
        out.append((x, sum(near) / len(near)))
    return out


def draw(runs, x, out):
    """runs: [(name, train, val)] -> the picture."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    shown = []
    for i, (name, train, val) in enumerate(runs):
        color = f"C{i % 10}"
        axes.plot(*zip(*train), color=color, alpha=0.15, linewidth=0.7)
        axes.plot(*zip(*smooth(train)), color=color, alpha=0.4, linewidth=1, label=None if val else name)
        if val:
            last = f"{name}: val {val[-1][1]:.3f}"
            axes.plot(*zip(*val), color=color, marker="o", markersize=4, linewidth=1.6, label=last)
        shown += [y for _, y in smooth(train) + val]
    # a noisy first loss must not flatten the rest
    shown = [y for y in shown if math.isfinite(y)]
    if shown and (low := min(shown)) < (high := max(shown)):
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xlabel({"tokens": "training tokens (pictures)", "seconds": "seconds of training", "step": "step"}[x])
    axes.set_ylabel("loss")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="marked: validation, thin: training")
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as e:  # ValueError: no format of that name
        bad(f"--out {out}: {e}")
    plt.close(figure)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = bad
    p.add_argument("logs", nargs="+", type=Path, metavar="log.csv")
    p.add_argument("--x", default="tokens", choices=["tokens", "seconds", "step"])
    p.add_argument("--out", default="curves.png")
    a = p.parse_args(argv)
    read_all = [read(path, a.x) for path in a.logs]
    draw([(name, *curves) for name, curves in zip(labels(a.logs), read_all)], a.x, a.out)
    print(f"{len(a.logs)} run{'s' * (len(a.logs) > 1)} in {a.out}")


if __name__ == "__main__":
    main()
