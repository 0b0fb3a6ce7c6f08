"""What every language model file does as a program, whatever its architecture; test_gpt2.py goes deeper."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from house import ROOT, error, finish, losses, start
from safetensors.torch import load_file

SMALL = "--layers 2 --dim 32 --seq 32 --batch 8 --eval-iters 2 --tokens 20".split()
FP32 = ["--dtype", "fp32"]  # where two runs are compared: auto measures, and may decide differently in each
# file -> what makes it small, and the flags of the run that is interrupted
FILES = {
    "mamba.py": ["--version 1 --state 4", "--optim adamw"],
    "mamba.py --version 2": ["--version 2 --state 8 --head-dim 16", "--optim muon"],
    "rwkv.py": ["--head-dim 16", "--optim adamw --accum 2"],
    "retnet.py": ["--heads 2", "--optim muon"],
    "bitnet.py": ["--heads 2", "--optim adamw"],
    "moe.py": ["--heads 2", "--optim muon --accum 2"],
}


@pytest.fixture(params=FILES)
def file(request):
    name, flags = request.param.split()[0], [f.split() for f in FILES[request.param]]
    return name, [*SMALL, *flags[0]], flags[1]


def test_learns_and_resumes_after_kill(tmp_path, text, file):
    """A short real run learns; kill -9 and --resume give the same losses and weights to the last bit."""
    name, small, flags = file
    args = [*small, *flags, "--lr", "5e-3", "--warmup", "5", "--data", text, "--steps", "60", "--eval-every", "20",
            "--log-every", "1", *FP32]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    finish(start([*args, "--out", one], name))
    cut = start([*args, "--out", two], name)
    for line in cut.stdout:
        if line.startswith("step 30/"):  # past the save at step 20
            break
    cut.kill()
    cut.wait()
    assert max(losses(two)) < 60, "it was cut"
    finish(start(["--resume", "--out", two, "--log-every", "1"], name))
    a, b = losses(one), losses(two)
    assert float(a[60][1]) < 2.3, "the letters' frequencies alone give 2.6"
    assert {s: a[s] for s in range(21, 61)} == {s: b[s] for s in range(21, 61)}
    one, two = load_file(Path(one, "model.safetensors")), load_file(Path(two, "model.safetensors"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_two_processes_equal_one(tmp_path, text, file):
    """Same global batch: losses over 20 steps within 1e-5."""
    name, small, _ = file
    small = [*small, "--bits", "16"] if name == "bitnet.py" else small  # the last bit of a sum tips a ternary rounding
    args = [*small, "--optim", "adamw", "--lr", "1e-3", "--data", text, "--steps", "20", "--eval-every", "20",
            "--log-every", "1", *FP32]
    finish(start([*args, "--out", str(tmp_path / "one")], name))
    finish(start([*args, "--out", str(tmp_path / "two")], name, torchrun=2))
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert a.keys() == b.keys() and all(abs(float(a[s][0]) - float(b[s][0])) < 1e-5 for s in a)
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in ("one", "two"))
    assert all(error(one[k].float(), two[k].float()) < 1e-3 or (one[k] - two[k]).abs().max() < 1e-4 for k in one)


def test_alone(tmp_path, text, file):
    """Copied into an empty folder: trains, resumes and samples in plain PyTorch."""
    name, small, _ = file
    shutil.copy(ROOT / name, tmp_path)
    out = finish(start([*small, "--data", text, "--steps", "4", "--out", "o"], name, cwd=tmp_path))
    assert "plain PyTorch" in out and "final val loss" in out
    kept = torch.load(tmp_path / "o/train_state.pt", weights_only=True)["config"]["dtype"]
    assert kept == ("bf16" if "| bf16 (auto" in out else "fp32"), "what auto decided is the run's from now on"
    finish(start(["--resume", "--out", "o", "--steps", "6"], name, cwd=tmp_path))
    out = finish(start(["--sample", "3 times", "--out", "o", "--tokens", "10"], name, cwd=tmp_path))
    assert out.startswith("3 times") and "bytes of state" in out


def test_compiles(file):
    """torch.compile sees one graph (not in moe.py, whose CPU form asks for counts), which gives the same gradients."""
    name, small, _ = file
    module = importlib.import_module(name.removesuffix(".py"))
    torch.manual_seed(0)
    model = module.Model(module.Config(**module.parse(small)[1] | dict(vocab=50, layers=1)))
    compiled = torch.compile(model, fullgraph=name != "moe.py", backend="aot_eager")
    x = torch.randint(50, (2, 8))
    (want, grads), (loss, found) = ((y, torch.autograd.grad(y, list(model.parameters()), allow_unused=True))
                                    for y in (f(x, x.roll(-1, 1)) for f in (model, compiled)))
    bound = 0.05 if name == "bitnet.py" else 1e-4  # the last bit of a sum tips a ternary rounding
    assert abs(loss - want) < bound / 10
    assert all(error(g, w) < bound for g, w in zip(found, grads) if w is not None and w.norm() > 0)
