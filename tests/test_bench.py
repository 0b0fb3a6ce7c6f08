"""bench/memory.py's plans against real steps, and what the bench scripts say to bad input."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


memory = script("memory")
SMALL = "--preset cpu --batch 8 --vocab 65 --optim adamw".split()  # 4 layers, dim 128, seq 128


@pytest.fixture(scope="module")
def gpt2():
    path = list(sys.path)
    yield memory.load(ROOT / "gpt2.py")
    sys.path[:] = path


def test_tracker_counts_by_hand():
    x = torch.zeros(1000)  # 4000 bytes, before

    def step():
        y = x + 1  # 8000
        z = y.view(10, 100)[1]  # a view is free
        del y  # ... and keeps its storage
        w = z * 2  # 8400
        del z  # 4400
        return w, torch.zeros(500)  # 6400

    assert memory.peak_of(step) == 8400
    assert memory.peak_of(lambda: x.add_(1)) == 4000


# in bf16 PyTorch's attention has about 1 MB of its own, which no plan sees: a batch at which that is little
@pytest.mark.parametrize("more", ["", "--ckpt", "--accum 3 --optim adamw8bit",
                                  "--optim muon --dtype bf16 --layers 1 --batch 64"])
def test_plan_is_what_a_real_step_allocates(gpt2, more):
    cfg, device = memory.configure(gpt2, [*SMALL, "--device", "cpu", *more.split()])
    planned = memory.Run(gpt2, cfg, device).peak(cfg.batch)
    tracked, allocated = memory.measure(gpt2, cfg)
    assert planned == pytest.approx(tracked, rel=0.05)
    assert planned == pytest.approx(allocated, rel=0.05)


OTHERS = ["mamba.py --version 1", "mamba.py --version 2", "rwkv.py", "retnet.py", "bitnet.py", "moe.py",
          "lora_finetune.py", "dit.py", "unet.py"]


@pytest.mark.parametrize("command", OTHERS)
def test_the_plan_of_each_file(command, monkeypatch):
    """The other eight's preset cpu, a small batch: the plan, without computing, against what the allocator held."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "model_file", None)  # gpt2.py's comes back after this test
    file, *flags = command.split()
    module = memory.load(ROOT / file)
    cfg, device = memory.configure(
        module, ["--preset", "cpu", "--batch", "4", "--dtype", "fp32", "--device", "cpu", *flags])
    planned = memory.Run(module, cfg, device).peak(cfg.batch)
    tracked, allocated = memory.measure(module, cfg)
    assert planned == pytest.approx(tracked, rel=0.05)
    assert planned == pytest.approx(allocated, rel=0.05)


def test_fixed_parts(gpt2):
    cfg, device = memory.configure(gpt2, [*SMALL, "--device", "cpu"])
    run = memory.Run(gpt2, cfg, device)
    n = sum(p.numel() for p in run.model.parameters())
    states = 4 * len(run.params)  # a step each
    assert run.fixed() == (4 * n, 4 * n, 8 * n + states)


def test_cuda_plan_has_cudas_operations(gpt2):
    """Flash attention: scores of T x T are never there, with dropout neither. Dropout keeps bytes. Autocast's list."""
    T, flags = 2048, "--layers 1 --heads 4 --dim 32 --batch 1 --seq 2048 --vocab 65 --optim adamw".split()
    for dropout in ("0", "0.1"):
        cfg, device = memory.configure(gpt2, [*flags, "--dropout", dropout])
        assert device == "cuda" and cfg.preset == "gpu"
        assert memory.Run(gpt2, cfg, device).peak(1) < 4 * T * T  # heads x T x T bytes
    x = torch.ones(1000, requires_grad=True)
    with memory.LikeCuda():
        assert memory.peak_of(lambda: F.dropout(x, 0.1)) == 4000 + 4000 + 1000  # x, y, mask
        with torch.autocast("cpu", torch.bfloat16):
            y = x.view(10, 100) @ x.view(100, 10)
            assert y.dtype == torch.bfloat16 and y.softmax(-1).dtype == torch.float32


def test_cuda_plan_of_what_is_computed_again(gpt2):
    """--ckpt: backward's second forward is CUDA's, too: dropout keeps its mask there, attention no scores of T x T."""
    flags, peaks = "--layers 4 --heads 4 --dim 32 --seq 1024 --vocab 65 --optim adamw --dropout 0.1".split(), []
    for more in ([], ["--ckpt"]):
        cfg, device = memory.configure(gpt2, [*flags, *more])
        peaks.append(memory.Run(gpt2, cfg, device).peak(1))
    assert peaks[1] < 0.6 * peaks[0] and peaks[1] < 4 * 1024 * 1024


@pytest.mark.skipif(memory.triton is None, reason="the bodies hold Triton launches")
def test_cuda_plan_sees_inside_the_ops(gpt2):
    cfg, _ = memory.configure(gpt2, "--layers 1 --heads 1 --dim 32 --seq 64 --vocab 8192 --optim adamw".split())
    run, peaks = memory.Run(gpt2, cfg, "cuda"), []
    for inside in (False, True):
        with run.world(), memory.Tracker(fake=True, inside=inside, unit=512) as tracker:
            run.step(16)
        peaks.append(tracker.peak)
    dz = 16 * 64 * 8192 * 2  # the loss holds this slice of bf16 dlogits; the gradient of no other op is as large
    assert dz < peaks[1] < peaks[0] + 2 * dz and peaks[1] - peaks[0] > dz // 2


PEAKS = [lambda b: 10 + 3 * b, lambda b: max(50, 2 * b), lambda b: b * b, lambda b: 7 + b // 4]


@pytest.mark.parametrize("peak", PEAKS)
@pytest.mark.parametrize("room", [9, 55, 1000])
@pytest.mark.parametrize("start", [1, 16])
def test_largest_batch(peak, room, start):
    assert memory.largest(peak, room, start) == next(b for b in range(10**4) if peak(b + 1) > room)


def test_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(memory, "CARDS", (8, 24))
    flags = "--layers 1 --heads 1 --dim 64 --seq 64 --batch 2 --device cpu --optim adamw"
    memory.plan(str(ROOT / "gpt2.py"), flags.split())
    out = capsys.readouterr().out
    assert "vocabulary 65" in out and "a dry run for cpu" in out and "0.5 GB of each" in out
    rows = [line.split() for line in out.splitlines() if " GB    " in line]
    assert [r[0] for r in rows] == ["8", "24"] and all(r[2] == "fits" for r in rows)
    assert int(rows[0][3]) < int(rows[1][3])
    assert all(0.99 * (float(r[0]) - 0.5) < float(r[4]) <= float(r[0]) - 0.5 for r in rows)  # and it is used


@pytest.mark.parametrize("argv, says", [
    (["none.py"], "no such file"),
    (["README.md"], "no Python file"),
    (["bench/plot.py"], "no model of this collection"),
    (["gpt2.py", "--layers", "0"], "--layers 0: must be positive"),
    (["gpt2.py", "--preset", "125M"], "--preset 125M: one of"),
    (["gpt2.py", "--device", "mps"], "--device mps: cuda or cpu"),
    (["gpt2.py", "--init", "gpt2"], "--init"),
])  # fmt: skip
def test_memory_refuses(argv, says, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as e:
        memory.plan(str(ROOT / argv[0]), argv[1:])
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count("\n") == 1


HEAD = "step,tokens,seconds,loss,val,lr,norm,tok_s\n"


@pytest.fixture
def plot():
    pytest.importorskip("matplotlib")
    return script("plot")


def test_plot(plot, tmp_path, capsys):
    logs, val = [], lambda s: 3 / s if s % 5 == 0 else ""
    rows = [f"{s},{s * 10},{s / 2},{4 / s},{val(s)},1,1,1\n" for s in range(1, 21)]
    for name in ("a/gpt2", "b/gpt2"):
        logs.append(tmp_path / name / "log.csv")
        logs[-1].parent.mkdir(parents=True)
        logs[-1].write_text(HEAD + "".join(rows))
    assert plot.labels(logs) == ["a/gpt2", "b/gpt2"]
    train, val = plot.read(logs[0], "seconds")
    assert train[1] == (1.0, 2.0) and val == [(2.5, 0.6), (5.0, 0.3), (7.5, 0.2), (10.0, 0.15)]
    plot.main([*map(str, logs), "--out", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG" and "2 runs in" in capsys.readouterr().out


def test_plot_smooths_without_lag(plot):
    line = [(i, 2.0 * i) for i in range(100)]
    assert plot.smooth(line) == line
    noisy = plot.smooth([(i, i % 2) for i in range(400)])
    assert all(0.4 < y < 0.6 for _, y in noisy[10:-10])


@pytest.mark.parametrize("text, more, says", [
    (None, [], "No such file"),
    ("a,b\n1,2\n", [], "no log.csv"),
    (HEAD + "1,2,3,x,,1,1,1\n", [], "no log.csv"),
    (HEAD + "1,2\n", [], "no log.csv"),
    (HEAD, [], "logged nothing"),
    (HEAD + "1,2,3,4,,1,1,1\n", ["--x", "hours"], "--x"),
    (HEAD + "1,2,3,4,,1,1,1\n", ["--out", "nowhere/c.png"], "--out nowhere/c.png"),
    (HEAD + "1,2,3,4,,1,1,1\n", ["--out", "c.xyz"], "--out c.xyz"),
])  # fmt: skip
def test_plot_refuses(plot, text, more, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("log.csv").write_text(text)
    with pytest.raises(SystemExit) as e:
        plot.main(["log.csv", *more])
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count("\n") == 1
