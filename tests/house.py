"""What the tests of all model files use: random weights and tokens, relative errors, runs as a user starts them."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def randomised(model, std=0.3):
    """Biases and norms too: the usual initialisation leaves them 0 and 1, which hides errors."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * std)
    return model


def tokens(B=3, T=17, V=50):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def error(a, b):
    """Relative, in the norm."""
    return ((a - b).norm() / b.norm()).item()


def overfit(file, n=10, B=4, T=32, **flags):
    """file: a model's module. Losses of n steps on one batch of 65 kinds of tokens, from the weights of seed 0."""
    torch.manual_seed(0)
    cfg = file.Config(**dict(layers=2, dim=16, seq=T, vocab=65, lr=1e-2, warmup=2, steps=3 * n) | flags)
    model = file.Model(cfg)
    optimizers = file.make_optimizers(model, cfg)
    x = torch.randint(65, (B, T), generator=torch.Generator().manual_seed(2))
    found = []
    for step in range(n):
        file.set_lr(optimizers, step, cfg)
        loss = model(x, x.roll(-1, 1))
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        found.append(loss.item())
    return found


def start(args, file="gpt2.py", cwd=ROOT, env=None, torchrun=0, **how):
    head = ([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={torchrun}"] if torchrun
            else [sys.executable])
    env = ({k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNELS")}
           | {"OMP_NUM_THREADS": "1"} | (env or {}))
    return subprocess.Popen([*head, file, *args], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **how)


def finish(process):
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    return out


def losses(folder):
    """log.csv: step -> (loss, val) as written, to the last bit."""
    return {int(r["step"]): (r["loss"], r["val"]) for r in csv.DictReader(open(Path(folder) / "log.csv"))}


def alone(file):
    """The module of a model file as it is without kernels/ beside it."""
    spec = importlib.util.spec_from_file_location(f"{file.removesuffix('.py')}_alone", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    hidden = {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == "kernels"}
    sys.modules |= {"kernels": None, spec.name: module}  # None: an import of it fails
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["kernels"]
        sys.modules.update(hidden)
    return module
