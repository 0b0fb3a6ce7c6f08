"""Speed of a file against its peers: training steps and generation, in turns in one process, as a ratio, with spread.

    python bench/speed.py gpt2.py --peers ../peers             what must be in that folder: bench/peers.py
    python bench/speed.py mamba.py --version 2 --only large    small, large or generate; the file's own flags may follow
    python bench/speed.py rwkv.py --only length                time per token and memory of a step against T; no peers

Each round runs every contestant for a few steps, in an order that changes; a contestant's time is its median step, the
ratio is taken within a round, and its median and its range over the rounds are printed. `peak` is the share of the
machine's own matrix product rate (1024 x 1024, same dtype) that the step's products reach; `MB` the most that tensors
hold during a step (peak_of in bench/memory.py), optimizer states included. Nothing else may run on the machine.
"""

import argparse
import ctypes
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from memory import Tracker, peak_of, pictures  # noqa: E402
from peers import PEERS, SPEAKERS, VOCAB, load  # noqa: E402

PICTURES = dict(layers=12, dim=384, heads=6, patch=4, size=32, channels=3, classes=10, cond="class",
                objective="ddpm", learn_sigma=False, batch=16)
UNET = dict(widths=[64, 128, 128], attn=[0, 0, 1], layers=2, heads=8, groups=32, size=32, channels=3, captions=8,
            features=128, batch=16)
SIZES = dict(small=dict(layers=4, dim=128, heads=4, seq=64, batch=12),
             large=dict(layers=6, dim=384, heads=6, seq=256, batch=8))
DTYPES = {False: torch.float32, True: torch.bfloat16}


def matmul_peak(dtype):
    """Products per second of 1024 x 1024 matrices, FLOP/s."""
    a, times = torch.randn(1024, 1024).to(dtype), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def configure(module, size, flags):
    """-> the file's Config at this size; heads are asked for where the file has them."""
    _, given = module.parse(flags)
    return module.Config(**{k: v for k, v in dict(vocab=VOCAB, optim="adamw", **size).items() if k in module.NAMES}
                         | given)


def stepper(loss, optimizers, bf16):
    """A training step: forward, backward, clipping, optimizer."""
    params = [p for o in optimizers for g in o.param_groups for p in g["params"]]

    def step(*batch):
        with torch.autocast("cpu", torch.bfloat16, bf16):
            value = loss(*batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)

    return step


def rounds(contestants, steps, n):
    """contestants: name -> function. A round times `steps` calls of each in turn -> name -> medians (seconds)."""
    names, found = list(contestants), {k: [] for k in contestants}
    for k in names:
        contestants[k]()
        contestants[k]()
    for i in range(n):
        for k in names if i % 2 == 0 else names[::-1]:
            times = []
            for _ in range(steps):
                start = time.perf_counter()
                contestants[k]()
                times.append(time.perf_counter() - start)
            found[k].append(statistics.median(times))
    return found


def table(title, found, ours, unit, more=None):
    """more: heading -> {name: text}."""
    more = more or {}
    print(f"\n{title}\n\n| | {unit} (median) | ours is faster by (range over rounds) |"
          + "".join(f" {k} |" for k in more))
    print("|---|---|---|" + "---|" * len(more))
    for k, t in found.items():
        ratios = sorted(b / a for a, b in zip(found[ours], t))
        cells = "".join(f" {m.get(k, '')} |" for m in more.values())
        print(f"| {k} | {statistics.median(t) * 1e3:.1f} "
              f"| {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) |{cells}", flush=True)


def train(name, module, me, flags, peers, n, bf16):
    images, made = hasattr(module, "Images"), {}  # dit.py and unet.py
    size = (UNET if "widths" in module.NAMES else PICTURES) if images else SIZES[name]
    cfg = configure(module, size, flags)
    x = torch.randint(VOCAB, (size["batch"], size.get("seq", 1)))
    batch = pictures(module, cfg, size["batch"]) if images else (x, x.roll(-1, 1))
    torch.manual_seed(0)
    model = module.Model(cfg)
    goal = model.objective() if images else model
    if hasattr(model, "prepare"):
        model.prepare(bf16)
    # no peer averages its weights
    made[me] = stepper(goal, [o for o in module.make_optimizers(model, cfg) if not hasattr(o, "swap")], bf16)
    for peer, make in PEERS.get(me, {}).items():
        torch.manual_seed(0)
        try:
            loss, optimizer = make(size | vars(cfg), peers or "peers")
        except (ImportError, FileNotFoundError) as e:
            print(f"left out: {peer} ({e})")
            continue
        made[peer] = stepper(loss, [optimizer], bf16)
    held = {k: f"{peak_of(lambda f=f: (f(*batch), f(*batch))) / 2**20:,.0f}" for k, f in made.items()}
    found = rounds({k: (lambda f=f: f(*batch)) for k, f in made.items()}, 10 if name == "small" else 3, n)
    with Flops() as flops:
        goal(*batch).backward()
    peak = flops.total / matmul_peak(DTYPES[bf16])
    shape = (f"{size['layers']} x {size['dim']}, T = {size['seq']}" if "seq" in size
             else f"{cfg.size} x {cfg.size} x {cfg.channels}")
    shape = f"{shape}, B = {size['batch']}, {'bf16 autocast' if bf16 else 'fp32'}"
    table(f"Training step, {shape}", found, me, "ms",
          {"MB": held, "matmul peak": {me: f"{peak / statistics.median(found[me]):.0%}"}})


class Flops(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the FLOPs of matrix products and of PyTorch's attention (a loop in C is not seen)."""

    def __init__(self):
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.total, self.registry = 0, dict(flop_registry)
        if torch.backends.mkldnn.is_available():  # kernels/matmul.py calls oneDNN by this name
            self.registry[torch.ops.mkldnn._linear_pointwise] = lambda x, w, *_, out_val: 2 * x.numel() * w.shape[0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in self.registry:
            self.total += self.registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def generate(module, me, flags, n, count=200):
    """Greedy, batch 1, with cache or state, 200 tokens after 20; same weights, and the same tokens must come out."""
    cfg = configure(module, SIZES["large"], flags)
    cfg.temp, cfg.tokens = 0, count
    torch.manual_seed(0)
    model = module.Model(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:  # louder than the initialisation, so that the most likely token is not a matter of rounding
                p.mul_(2)
    x, said, made = torch.randint(VOCAB, (1, 20)), {}, {}

    def ours():
        said[me] = [i for i, _ in module.generate(model, x, cfg)]

    made[me] = ours
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for peer, make in SPEAKERS.get(me, {}).items():
            try:
                speak = make(folder)
            except ImportError as e:
                print(f"left out: {peer} ({e})")
                continue
            made[peer] = lambda peer=peer, speak=speak: said.__setitem__(peer, speak(x, count))
        found = rounds(made, 1, n)
    agree = {k: next((i for i, (a, b) in enumerate(zip(v, said[me])) if a != b), "all") for k, v in said.items()}
    speed = {k: f"{count / statistics.median(t):,.0f}" for k, t in found.items()}
    found = {k: [t / count for t in ts] for k, ts in found.items()}
    table("Generation, 6 x 384, batch 1, greedy, with the cache or state", found, me, "ms a token",
          {"tokens/s": speed, "equal tokens": agree})


def length(module, me, flags, n):
    """2,048 tokens a step (4,096 at T = 4,096), in turns: what grows with T shows in time per token; MB at batch 1."""
    steps, tokens, activations = {}, {}, {}
    for T in (256, 512, 1024, 2048, 4096):
        cfg = configure(module, SIZES["large"] | dict(seq=T, batch=max(1, 2048 // T)), flags)
        torch.manual_seed(0)
        model, x = module.Model(cfg), torch.randint(VOCAB, (cfg.batch, T))
        with Tracker() as held:
            loss = model(x[:1], x[:1].roll(-1, 1))
        activations[T] = held.live - sum(p.nbytes for p in model.parameters())
        del loss
        step = stepper(model, module.make_optimizers(model, cfg), False)
        steps[T], tokens[T] = (lambda step=step, x=x: step(x, x.roll(-1, 1))), x.numel()
    found = rounds(steps, 1, n)
    per_token = {T: [t / tokens[T] * 1e6 for t in times] for T, times in found.items()}
    print(f"\nA training step of {me}, 6 x 384, fp32\n\n| T | us a token | of T = 256 (range over rounds) "
          "| MB of activations at batch 1, between forward and backward |\n|---|---|---|---|")
    for T, times in per_token.items():
        ratios = sorted(t / first for t, first in zip(times, per_token[256]))
        print(f"| {T:,} | {statistics.median(times):.0f} | {statistics.median(ratios):.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {activations[T] / 2**20:,.1f} |")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", choices=sorted({k.split()[0] for k in PEERS}))
    p.add_argument("--peers", help="folder with checkouts")
    p.add_argument("--only", choices=["small", "large", "generate", "length"])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--bf16", action="store_true", help="bf16 autocast for all, where the CPU has bf16 units")
    a, flags = p.parse_known_args()
    module, me = load(ROOT / a.file, Path(a.file).stem), a.file
    me = next((k for k in PEERS if k == f"{a.file} {' '.join(flags)}"), a.file)
    if sys.platform == "linux":  # for all, what train() does for ours: freed memory is kept for the next step
        ctypes.CDLL(None).mallopt(-1, 1 << 30)
        ctypes.CDLL(None).mallopt(-3, 1 << 30)
    print(f"{torch.get_num_threads()} threads, matmul peak {matmul_peak(torch.float32) / 1e9:.0f} GFLOP/s in fp32, "
          f"{matmul_peak(torch.bfloat16) / 1e9:.0f} in bf16")
    for name in [a.only] if a.only else ["large"] if hasattr(module, "Images") else ["small", "large", "generate"]:
        if name == "generate":
            generate(module, me, flags, a.rounds)
        elif name == "length":
            length(module, me, flags, a.rounds)
        else:
            train(name, module, me, flags, a.peers, a.rounds, a.bf16)
