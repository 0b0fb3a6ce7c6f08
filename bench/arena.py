"""The arena: the language models side by side, same data, same parameters, same tokens; then the same time.

    python bench/arena.py run --size 1M --data my.txt            every row, one after the other: trains it, measures it
    python bench/arena.py run --size 1M --row retnet --seed 2    one row, one seed: a stranger can repeat it
    python bench/arena.py run --size 1M --seconds 120            the steps that fit, by the speed of runs over tokens
    python bench/arena.py table --size 1M                        a table; its curves by tokens, by time: arena-1M.png
    python bench/arena.py recall                                 data/recall.py: what is looked up, by number of pairs
    python bench/arena.py states                                 data/states.py: a product of permutations, by length

A run is the file's own command line, so it resumes and leaves what every run leaves, in out/arena/<size>-<seed>/<row>;
a run that is there is not made again. Sizes count parameters without embedding and head and agree within 5%
(tests/test_arena.py). `MB` is the most that tensors hold in a training step, `state` what generation carries after so
many tokens; its speed is that of step(), batch 1. Speeds, and `s`, the training's time at that speed, are those of the
fastest seed: what else ran on the machine can only have slowed the others.
"""

import argparse
import csv
import importlib.util
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from memory import peak_of  # noqa: E402
from speed import stepper  # noqa: E402

# row -> its command line; bitnet.py has the two stages of its paper in place of a cosine
ROWS = {
    "gpt2": "gpt2.py --lr-end 0.1",
    "mamba-1": "mamba.py --version 1 --lr-end 0.1",
    "mamba-2": "mamba.py --version 2 --lr-end 0.1",
    "rwkv": "rwkv.py --lr-end 0.1",
    "retnet": "retnet.py --lr-end 0.1",
    "bitnet": "bitnet.py",
    "moe": "moe.py --lr-end 0.1",
}
# what makes the rows equal in parameters; moe counts those that a token passes through
SIZES = {
    "1M": {
        "gpt2": "--layers 5 --dim 128 --heads 4",
        "mamba-1": "--layers 8 --dim 132",
        "mamba-2": "--layers 7 --dim 144 --state 64 --head-dim 32",
        "rwkv": "--layers 4 --dim 128 --head-dim 32",
        "retnet": "--layers 5 --dim 128 --heads 2",
        "bitnet": "--layers 5 --dim 128 --heads 4 --ffn-dim 408",
        "moe": "--layers 5 --dim 128 --heads 4 --ffn-dim 176",
    },
    "10M": {
        "gpt2": "--layers 6 --dim 372 --heads 6",
        "mamba-1": "--layers 10 --dim 384",
        "mamba-2": "--layers 10 --dim 384 --state 128 --head-dim 32",
        "rwkv": "--layers 5 --dim 384 --head-dim 64",
        "retnet": "--layers 6 --dim 384 --heads 3 --value-dim 600 --ffn-dim 600",
        "bitnet": "--layers 6 --dim 384 --heads 6 --ffn-dim 1152",
        "moe": "--layers 6 --dim 384 --heads 6 --ffn-dim 464",
    },
}
TRAIN = {
    "1M": "--batch 16 --seq 128 --steps 1000 --lr 3e-3 --warmup 50 --optim adamw --dtype fp32 --eval-every 125",
    "10M": "--batch 8 --seq 256 --steps 500 --lr 1e-3 --warmup 50 --optim adamw --dtype auto --eval-every 125",
}
# the models of recall and states, 64 wide: about 100,000 parameters, rwkv 130,000, moe with all its experts 430,000
# (two blocks of Mamba are about one of the others)
TASK = {row: "--layers 2 --dim 64 --heads 2" for row in ("gpt2", "retnet", "bitnet", "moe")}
TASK |= {"mamba-1": "--layers 3 --dim 64", "mamba-2": "--layers 3 --dim 64 --state 64 --head-dim 32",
         "rwkv": "--layers 2 --dim 64 --head-dim 32"}
EMBEDDING = re.compile(r"wte|wpe|emb|head\.weight|output_projection")  # names of what has a row per token or position


def bad(message):
    print(f"arena.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def load(path):
    spec = importlib.util.spec_from_file_location(f"arena_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def model_of(row, flags, **fields):
    """-> the row's module, its Config and a model with random weights."""
    file, *own = ROWS[row].split()
    module = load(file)
    preset, given = module.parse([*own, *flags.split()])
    cfg = module.Config(**{k: v for k, v in {**preset, **given, **fields}.items() if k in module.NAMES})
    torch.manual_seed(cfg.seed)
    return module, cfg, module.Model(cfg)


def body(model):
    """Parameters without embedding and head; of a layer's experts only those that a token passes through."""
    held = [(n, p.numel()) for n, p in model.named_parameters() if not EMBEDDING.search(n)]
    cfg, total = model.cfg, sum(n for _, n in held)
    if hasattr(cfg, "experts"):
        total -= sum(n for name, n in held if "experts" in name) * (cfg.experts - cfg.top_k_experts) // cfg.experts
    return total


def folder(size, seed, row, seconds):
    return ROOT / "out" / "arena" / f"{size}-{seed}{f'-{seconds}s' if seconds else ''}" / row


def rows_of(path):
    with open(path / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def run(row, size, seed, data, seconds=0):
    out = folder(size, seed, row, seconds)
    if (out / "arena.json").is_file():
        return print(f"{row}: done, in {out}")
    file, *own = ROWS[row].split()
    flags = [*own, *SIZES[size][row].split(), *TRAIN[size].split(), "--data", data, "--seed", str(seed),
             "--out", str(out)]
    if seconds:
        first = [json.loads(p.read_text()) for p in (ROOT / "out" / "arena").glob(f"{size}-*/{row}/arena.json")
                 if not p.parts[-3].endswith("s")]
        if not first:
            bad(f"--seconds {seconds}: needs the speed of {row}'s run over tokens; run it without --seconds first")
        result = max(first, key=lambda r: r["tok_s"])
        steps = max(100, round(seconds * result["tok_s"] / result["tokens"] * result["steps"]))
        flags += ["--steps", str(steps), "--eval-every", str(max(10, steps // 8))]
    command = [sys.executable, str(ROOT / file),
               *(["--resume", "--out", str(out)] if (out / "train_state.pt").is_file() else flags)]
    print("$", *command[1:], flush=True)
    if subprocess.run(command).returncode:
        bad(f"{row}: its run failed")
    log = rows_of(out)
    result = dict(row=row, steps=int(log[-1]["step"]), tokens=int(log[-1]["tokens"]), seconds=float(log[-1]["seconds"]),
                  tok_s=statistics.median(float(r["tok_s"]) for r in log), val=float(log[-1]["val"]),
                  command=command[1:])  # fmt: skip
    _, cfg, model = model_of(row, SIZES[size][row],
                             vocab=json.loads((out / "config.json").read_text())["vocab_size"])
    result |= dict(body=body(model), held=held(row, size, cfg.vocab), **speaking(row, size, cfg.vocab))
    (out / "arena.json").write_text(json.dumps(result, indent=2))


def held(row, size, vocab):
    """The most bytes that tensors hold during a training step, weights and optimizer states with them."""
    module, cfg, model = model_of(row, f"{SIZES[size][row]} {TRAIN[size]}", vocab=vocab)
    step, x = (stepper(model, module.make_optimizers(model, cfg), False),
               torch.zeros(cfg.batch, cfg.seq, dtype=torch.int64))
    step(x, x)  # makes the optimizer's states
    return peak_of(lambda: step(x, x))


@torch.inference_mode()
def speaking(row, size, vocab, contexts=(1024, 16384), count=32):
    """Tokens a second after so much context, and the bytes that are carried then."""
    found = {}
    for T in contexts:
        _, cfg, model = model_of(row, SIZES[size][row], vocab=vocab, seq=T + count)
        model.eval()
        state, token = model.init_state(1), torch.zeros(1, 1, dtype=torch.int64)
        for part in torch.zeros(1, T, dtype=torch.int64).split(1024, 1):
            _, state = model.step(part, state)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            _, state = model.step(token, state)
            times.append(time.perf_counter() - start)
        carried = sum(v.nbytes for v in state.values() if torch.is_tensor(v))
        found[f"speed_{T}"], found[f"state_{T}"] = 1 / statistics.median(times), carried
    return found


def spread(values, digits=3):
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(size, seconds=0):
    done = {}
    for path in sorted((ROOT / "out" / "arena").glob(f"{size}-*/*/arena.json")):
        if path.parts[-3].endswith("s") == bool(seconds):
            result = json.loads(path.read_text()) | dict(path=path.parent)
            done.setdefault(result["row"], []).append(result)
    if not done:
        bad(f"--size {size}: nothing has run yet; python bench/arena.py run --size {size}")
    print("| | parameters | val loss | seeds | tokens | training tok/s | s | MB | generation tok/s at 1k, 16k "
          "| state at 1k, 16k |\n" + "|---" * 10 + "|")
    for row in (r for r in ROWS if r in done):
        d, best = done[row], lambda key: max(r[key] for r in done[row])
        print(f"| {row} | {d[0]['body']:,} | {spread([r['val'] for r in d])} | {len(d)} | {d[0]['tokens'] / 1e6:.2f}M "
              f"| {best('tok_s'):,.0f} | {d[0]['tokens'] / best('tok_s'):.0f} | {d[-1]['held'] / 2**20:,.0f} "
              f"| {best('speed_1024'):,.0f}, {best('speed_16384'):,.0f} "
              f"| {d[0]['state_1024']:,}, {d[0]['state_16384']:,} |")  # fmt: skip
    name = f"arena-{size}{'-time' if seconds else ''}.png"
    picture({row: done[row] for row in ROWS if row in done}, name)
    print(f"\n{name}: the validation losses")


def picture(done, out):
    """Validation loss by tokens, and by time at the speed in the table; a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for i, (row, results) in enumerate(done.items()):
        speed = max(r["tok_s"] for r in results)
        label = f"{row}: {statistics.mean(r['val'] for r in results):.3f}"
        for result in results:
            points = [(int(r["tokens"]), float(r["val"])) for r in rows_of(result["path"]) if r["val"]]
            for axes, unit in zip(panels, (1e6, speed)):
                axes.plot([t / unit for t, _ in points], [v for _, v in points], f"C{i}o-", markersize=3,
                          linewidth=1.2, label=label)
            label = None  # one entry of the legend for all seeds
    for axes, x in zip(panels, ("million training tokens", "seconds of training")):
        axes.set_xlabel(x)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[1].legend(frameon=False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def learn(row, examples, tests, vocab, steps, seed):
    """Trains a small model on examples(rng, n) and returns its accuracy on each of tests (name -> examples)."""
    longest = max(e(np.random.default_rng(0), 1)[0].shape[1] for e in tests.values())
    module, cfg, model = model_of(row, TASK[row], vocab=vocab, seq=longest, steps=steps, warmup=steps // 10, lr=2e-3,
                                  wd=0.1, optim="adamw", seed=seed)
    optimizers = module.make_optimizers(model, cfg)
    for step in range(steps):
        module.set_lr(optimizers, step, cfg)
        x, y = (torch.from_numpy(a) for a in examples(np.random.default_rng((seed, step)), 64))
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
    model.eval()
    found = {}
    for name, test in tests.items():
        x, y = (torch.from_numpy(a) for a in test(np.random.default_rng((seed, 65535)), 64))
        with torch.inference_mode():
            said = model(x).argmax(-1)
        found[name] = (said == y)[y >= 0].float().mean().item()
    return found, sum(p.numel() for p in model.parameters())


def tasks(which, rows, steps, seed):
    """Trained on a mixture of sizes, tested on each: a row of accuracies, beside the number of parameters."""
    task = load(f"data/{which}.py")
    if which == "recall":
        sizes, vocab = (2, 4, 8, 16), task.VOCAB
        draw = lambda size: lambda rng, n: task.examples(rng, n, size)
        heading = "pairs"
    else:
        sizes, vocab = (4, 8, 16, 32), math.factorial(3)
        draw = lambda size: lambda rng, n: task.examples(rng, n, size, 3)
        heading = "length, permutations of 3"
    mixture = lambda rng, n: draw(sizes[rng.integers(len(sizes))])(rng, n)
    print(f"Accuracy after {steps:,} steps of 64, seed {seed}, by {heading}\n")
    print(f"| | parameters | {' | '.join(map(str, sizes))} |\n" + "|---" * (2 + len(sizes)) + "|")
    for row in rows:
        found, count = learn(row, mixture, {s: draw(s) for s in sizes}, vocab, steps, seed)
        print(f"| {row} | {count:,} | {' | '.join(f'{found[s]:.2f}' for s in sizes)} |", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = bad
    p.add_argument("what", choices=["run", "table", "recall", "states"])
    p.add_argument("--size", default="1M", choices=list(SIZES))
    p.add_argument("--row", choices=list(ROWS), help="default: all")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--data", default="shakespeare", help="as the files' own --data")
    p.add_argument("--seconds", type=int, default=0, help="run and table: the same time instead of the same tokens")
    p.add_argument("--steps", type=int, default=2000, help="of recall and states")
    a = p.parse_args(argv)
    rows = [a.row] if a.row else list(ROWS)
    if a.what == "run":
        for row in rows:
            run(row, a.size, a.seed, a.data, a.seconds)
    elif a.what == "table":
        table(a.size, a.seconds)
    else:
        tasks(a.what, rows, a.steps, a.seed)


if __name__ == "__main__":
    main()
