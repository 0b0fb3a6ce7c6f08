"""Speed of a file against its peers: training steps and generation, in turns in one process, as a ratio with its spread.

    python bench/speed.py gpt2.py --peers ../peers          peers/nanoGPT and peers/minGPT are checkouts; transformers is a package
    python bench/speed.py gpt2.py --peers ../peers --only small      one of: small large generate

Each round runs every contestant for a few steps, in an order that changes; a contestant's time is its median step, the ratio
is taken within a round, and its median and its range over the rounds are printed. `peak` is the share of the machine's own
matrix product rate (1024 x 1024, same dtype) that the step's products reach. Nothing else may run on the machine meanwhile.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SIZES = dict(small=dict(layers=4, heads=4, dim=128, seq=64, batch=12), large=dict(layers=6, heads=6, dim=384, seq=256, batch=8))


def load(path, name):
    """A module from a file, without its folder on sys.path."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def matmul_peak(dtype):
    """Products per second of 1024 x 1024 matrices, FLOP/s."""
    a, times = torch.randn(1024, 1024).to(dtype), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def flops(c):
    """Of a training step's products: 6 per weight and token, and attention's, whole as the usual counts have it."""
    weights = 12 * c["layers"] * c["dim"] ** 2 + 65 * c["dim"]
    return c["batch"] * c["seq"] * (6 * weights + 12 * c["layers"] * c["dim"] * c["seq"])


def ours(size, file):
    """This file's step: forward, backward, clipping, optimizer."""
    module = load(ROOT / file, Path(file).stem)
    torch.manual_seed(0)
    cfg = module.Config(**size, vocab=65)
    model = module.Model(cfg)
    optimizers = module.make_optimizers(model, cfg)
    params = list(model.parameters())

    def step(x, y):
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)

    return step


def nanogpt(size, peers):
    """As nanoGPT's train.py does it on a CPU: no dropout, biases off as in its character recipe."""
    m = load(Path(peers) / "nanoGPT" / "model.py", "nanogpt_model")
    torch.manual_seed(0)
    c = m.GPTConfig(block_size=size["seq"], vocab_size=65, n_layer=size["layers"], n_head=size["heads"], n_embd=size["dim"], dropout=0.0, bias=False)
    model = m.GPT(c)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def step(x, y):
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def mingpt(size, peers):
    sys.path.insert(0, str(Path(peers) / "minGPT"))
    from mingpt.model import GPT
    from mingpt.trainer import Trainer

    torch.manual_seed(0)
    c = GPT.get_default_config()
    c.model_type, c.vocab_size, c.block_size = None, 65, size["seq"]
    c.n_layer, c.n_head, c.n_embd = size["layers"], size["heads"], size["dim"]
    c.embd_pdrop = c.resid_pdrop = c.attn_pdrop = 0.0
    model = GPT(c)
    optimizer = model.configure_optimizers(Trainer.get_default_config())

    def step(x, y):
        loss = model(x, y)[1]
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def huggingface(size):
    from transformers import GPT2Config, GPT2LMHeadModel

    c = GPT2Config(n_layer=size["layers"], n_head=size["heads"], n_embd=size["dim"], n_positions=size["seq"], vocab_size=65)
    torch.manual_seed(0)
    return GPT2LMHeadModel(c)


def transformers(size, peers):
    model = huggingface(size).train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    model.config.attn_pdrop = 0.0
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def step(x, y):
        logits = model(x).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def rounds(contestants, steps, n):
    """contestants: name -> function. Each round times `steps` calls of each in turn -> name -> list of medians (seconds)."""
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


def table(title, found, ours, unit, peak=None):
    print(f"\n{title}\n\n| | {unit} (median) | ours is faster by (range over rounds) |" + (" matmul peak |" if peak else ""))
    print("|---|---|---|" + ("---|" if peak else ""))
    for k, t in found.items():
        ratios = sorted(b / a for a, b in zip(found[ours], t))
        print(f"| {k} | {statistics.median(t) * 1e3:.1f} | {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
              + (f" {peak / statistics.median(t):.0%} |" if peak else ""), flush=True)  # fmt: skip


def train(name, file, peers, n, bf16):
    size = SIZES[name]
    x = torch.randint(65, (size["batch"], size["seq"]))
    y = x.roll(-1, 1)
    made = {file: ours(size, file)}
    if peers:
        made["nanoGPT"], made["minGPT"] = nanogpt(size, peers), mingpt(size, peers)
    made["transformers"] = transformers(size, peers)

    def call(step):
        with torch.autocast("cpu", torch.bfloat16, bf16):
            step(x, y)

    found = rounds({k: (lambda f=f: call(f)) for k, f in made.items()}, 20 if name == "small" else 4, n)
    dtype = torch.bfloat16 if bf16 else torch.float32
    shape = f"{size['layers']} x {size['dim']}, T = {size['seq']}, B = {size['batch']}, {'bf16 autocast' if bf16 else 'fp32'}"
    table(f"Training step, {shape}", found, file, "ms", flops(size) / matmul_peak(dtype))


def generate(file, n):
    """Greedy, batch 1, with the cache, 200 tokens after 20; the same weights, and the same tokens must come out."""
    size = SIZES["large"]
    theirs = huggingface(size).eval()
    module = load(ROOT / file, Path(file).stem)
    cfg = module.Config(**{k: v for k, v in size.items() if k != "batch"}, vocab=65, temp=0, tokens=200)
    model = module.Model(cfg)
    model.load_state_dict({k.removeprefix("transformer."): v for k, v in theirs.state_dict().items() if k != "lm_head.weight"})
    x, said = torch.randint(65, (1, 20)), {}

    def a():
        said["ours"] = [i for i, _ in module.generate(model, x, cfg)]

    def b():
        with torch.inference_mode():
            y = theirs.generate(x, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)
        said["theirs"] = y[0, 20:].tolist()

    found = rounds({file: a, "transformers": b}, 1, n)
    assert said["ours"] == said["theirs"], "not the same tokens"
    found = {k: [t / 200 for t in ts] for k, ts in found.items()}
    table("Generation, 6 x 384, batch 1, greedy, with the cache (same tokens)", found, file, "ms a token")
    print("\n" + ", ".join(f"{k}: {1 / statistics.median(t):.0f} tokens/s" for k, t in found.items()))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", choices=["gpt2.py"])
    p.add_argument("--peers", help="folder with checkouts of nanoGPT and minGPT")
    p.add_argument("--only", choices=["small", "large", "generate"])
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--bf16", action="store_true", help="bf16 autocast for all, where the CPU has bf16 units")
    a = p.parse_args()
    if a.peers and not (Path(a.peers) / "nanoGPT" / "model.py").is_file():
        p.exit(2, f"--peers {a.peers}: it has no nanoGPT/model.py\n")
    print(f"{torch.get_num_threads()} threads, matmul peak {matmul_peak(torch.float32) / 1e9:.0f} GFLOP/s in fp32, {matmul_peak(torch.bfloat16) / 1e9:.0f} in bf16")
    for name in [a.only] if a.only else ["small", "large", "generate"]:
        generate(a.file, a.rounds) if name == "generate" else train(name, a.file, a.peers, a.rounds, a.bf16)
