"""rwkv.py against the official package `rwkv` and the recurrence that it states, and what is its own as a program."""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
from unittest import mock

import house
import pytest
import torch
import torch.nn.functional as F
from house import error, finish, overfit, randomised, start, tokens

import rwkv
from rwkv import Config, Model

TINY = dict(layers=3, dim=32, head_dim=16, vocab=50, decay_rank=8, a_rank=12, v_rank=4, gate_rank=20)


def package(name):
    """A module of the PyPI package, by its path: `import rwkv` is our file."""
    path = importlib.metadata.distribution("rwkv").locate_file(f"rwkv/{name}.py")
    spec = importlib.util.spec_from_file_location(f"official_{name}", path)
    module = importlib.util.module_from_spec(spec)
    plain = dict(ScriptModule=torch.nn.Module, script_method=lambda f: f, script=lambda f: f)  # it always asks for JIT
    with mock.patch.dict(os.environ, RWKV_V7_ON="1", RWKV_CUDA_ON="0"), mock.patch.multiple(torch.jit, **plain):
        spec.loader.exec_module(module)
    return module


def model(seed=0, **how):
    m = randomised(Model(Config(**TINY | how)))
    with torch.no_grad():
        for name, p in m.named_parameters():  # decays over their whole range, from exp(-0.6065) to nearly 1
            if name.endswith("w0"):
                p.mul_(10)
    return m


def official_tensors(m):
    """Our parameters as the package holds them, still connected to ours: head and products transposed, ln0 in emb."""
    z = {}
    for k, p in m.named_parameters():
        p = p.t() if k.endswith(".weight") and p.ndim == 2 and "emb" not in k else p.squeeze()
        z[k] = p.flatten() if k.endswith("r_k") else p
    ln0 = m.blocks[0].ln0
    z["emb.weight"] = F.layer_norm(z["emb.weight"], (m.cfg.dim,), ln0.weight, ln0.bias)
    return z


@pytest.mark.parametrize("layers", [3, 1])
def test_equals_the_official_package(tmp_path, layers):
    """It loads the .pth that we save; logits of a sequence, of single tokens; every gradient; fp32, relative error."""
    ours = model(layers=layers)
    ours.save_pretrained(tmp_path)
    theirs = package("model").RWKV_x070(str(tmp_path / "rwkv"), "cpu fp32")
    x = tokens(B=1, T=40)
    want, state = theirs.forward(x[0].tolist(), None, full_output=True)
    assert error(ours(x)[0], want) < 1e-5
    mine = ours.step(x, ours.init_state(1))[1]
    for i in range(layers):
        assert error(mine["S"][i][0], state[3 * i + 1]) < 1e-5
        assert error(mine["last"][i][:, 0], torch.stack([state[3 * i], state[3 * i + 2]])) < 1e-5
    for t in range(3):
        want, state = theirs.forward([t], state)
        logits, mine = ours.step(torch.tensor([[t]]), mine)
        assert error(logits[0], want) < 1e-5
    theirs.z |= official_tensors(ours)  # now its forward reaches our parameters
    x, want, state = x[:, :12], [], None
    with mock.patch.object(torch, "no_grad", contextlib.nullcontext):
        for t in x[0].tolist():  # its sequence form writes over what backward needs
            logits, state = theirs.forward([t], state)
            want.append(logits)
    want = torch.stack(want)
    up = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    want = torch.autograd.grad(want, [*ours.parameters()], up)
    got = torch.autograd.grad(ours(x)[0], [*ours.parameters()], up)
    for (name, _), a, b in zip(ours.named_parameters(), got, want):
        assert error(a, b) < 1e-4, name


def official_file(path, drop=(), **extra):
    """A checkpoint as BlinkDL publishes them: bf16, with v0, v1, v2 for block 0 that nothing uses."""
    t = {k: v.bfloat16() for k, v in model().state_dict().items()}
    t |= {k: torch.ones_like(t[k.replace(".0.", ".1.")]) for k in rwkv.UNUSED} | extra
    torch.save({k: v for k, v in t.items() if k not in drop}, path)
    return path


def test_loads_official_files(tmp_path):
    """All sizes come from the shapes; a file, and a folder with one, give the package's logits."""
    path = official_file(tmp_path / "RWKV-x070-World-tiny.pth")
    theirs = package("model").RWKV_x070(str(path.with_suffix("")), "cpu fp32")
    x = tokens(B=1, T=20)
    want, _ = theirs.forward(x[0].tolist(), None, full_output=True)
    for source in (path, tmp_path):
        ours = Model.from_pretrained(source, seq=64)
        c = ours.cfg
        assert {k: getattr(c, k) for k in TINY} == TINY and c.seq == 64
        assert all(p.dtype == torch.float32 for p in ours.parameters()) and error(ours(x)[0], want) < 1e-5
    official_file(path, drop=rwkv.UNUSED)
    assert error(Model.from_pretrained(path)(x)[0], want) < 1e-5


def test_own_folder(tmp_path):
    """model.safetensors and rwkv.pth hold the same weights, to the bit; either loads back; there is one .pth."""
    m = model()
    m.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.pth")] == ["rwkv.pth"]
    for source in (tmp_path, tmp_path / "rwkv.pth", tmp_path / "model.safetensors"):
        back = Model.from_pretrained(source)
        assert back.cfg.dim == 32 and all(torch.equal(a, b) for a, b in zip(m.parameters(), back.parameters()))


def test_strict(tmp_path, capsys):
    """A missing, an unknown, a misshapen tensor, an older RWKV, a damaged file, two files: named and refused."""
    path = tmp_path / "x.pth"

    def refused(said):
        with pytest.raises(SystemExit) as e:
            Model.from_pretrained(tmp_path)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, err

    official_file(path, drop=["blocks.1.att.k_k"])
    refused("no tensor blocks.1.att.k_k")
    official_file(path, **{"blocks.1.ffn.s_emb.weight": torch.ones(1)})  # RWKV-7a
    refused("unknown tensor blocks.1.ffn.s_emb.weight")
    official_file(path, **{"ln_out.bias": torch.ones(31)})
    refused("ln_out.bias is (31,), but (32,) is asked for")
    torch.save({"emb.weight": torch.ones(50, 32), "blocks.0.att.time_decay": torch.ones(2, 16)}, path)
    refused("no RWKV-7")
    path.write_bytes(path.read_bytes()[:300])
    refused("damaged")
    official_file(path)
    official_file(tmp_path / "y.pth")
    refused("2 .pth files")


# ---------------------------------------------------------------- its forms
def inputs(B, T, H, N, dtype=torch.float64, slow=False):
    """As the model makes them: kappa of length 1, decays anywhere; slow: all at the fastest or all close to 1."""
    g = torch.Generator().manual_seed(4)
    r, k, v, kappa = torch.randn(4, B, T, H, N, generator=g, dtype=dtype)
    w = -math.exp(-0.5) * torch.sigmoid(3 * torch.randn(B, T, H, N, generator=g, dtype=dtype))
    if slow is not False:
        w = torch.full_like(w, slow)
    kappa = F.normalize(kappa, dim=-1)
    a = torch.rand(B, T, H, N, generator=g, dtype=dtype)
    S = torch.randn(B, H, N, N, generator=g, dtype=dtype)
    return [t.requires_grad_() for t in (r, w, k, v, -kappa, kappa * a, S)]


@pytest.mark.parametrize("slow", [False, -math.exp(-0.5), -1e-7])
def test_chunks_equal_the_recurrence(slow):
    """Outputs, final state, all gradients in fp64; in fp32 forward < 1e-5. 77 tokens: no whole number of chunks."""
    args = inputs(2, 77, 2, 16, slow=slow)
    results = []
    for f in (rwkv.chunkwise, rwkv.recurrence):
        y, S = f(*args)
        up = [torch.randn(t.shape, generator=torch.Generator().manual_seed(5), dtype=t.dtype) for t in (y, S)]
        results.append([y, S, *torch.autograd.grad([y, S], args, up)])
    for name, a, b in zip("y S dr dw dk dv da db dS".split(), *results):
        assert error(a, b) < 1e-10, name
    low = [t.detach().float() for t in args]
    for a, b in zip(rwkv.chunkwise(*low), results[1]):
        assert error(a, b) < 1e-5


def test_gradients_against_the_recurrence():
    """The file alone, its recurrence and fp64: the paper's model. Loss and every gradient of the fast one in fp32."""
    alone, ours = house.alone("rwkv.py"), model()
    exact = alone.Model(alone.Config(**TINY))
    exact.load_state_dict(ours.state_dict())
    x, y = tokens(T=40), tokens(T=40).roll(-1, 1)
    y[0, :5] = -1
    with mock.patch.object(alone, "wkv7", alone.recurrence):
        want = F.cross_entropy(exact.double()(x).flatten(0, 1), y.flatten(), ignore_index=-1)
        want.backward()
    got = ours(x, y)
    got.backward()
    assert abs(got.item() - want.item()) < 1e-5
    for (name, p), q in zip(ours.named_parameters(), exact.parameters()):
        assert error(p.grad.double(), q.grad) < 1e-4, name


def test_alone_gives_the_same_losses():
    """The definitions in the file and the operations in kernels/ are the same maths."""
    alone, ours = house.alone("rwkv.py"), model()
    other = alone.Model(alone.Config(**TINY))
    other.load_state_dict(ours.state_dict())
    x, y = tokens(T=40), tokens(T=40).roll(-1, 1)
    a, b = ours(x, y), other(x, y)
    a.backward()
    b.backward()
    assert abs(a.item() - b.item()) < 1e-5
    for (name, p), q in zip(ours.named_parameters(), other.parameters()):
        assert error(q.grad, p.grad) < 1e-4, name


def test_step_equals_forward():
    """Prefill of any length, then one token at a time, then several: the same logits as one forward."""
    m = model().eval()
    x = tokens(T=48)
    whole = m(x)
    for cuts in ([1] * 48, [5, 1, 1, 40, 1], [48]):
        state, at = m.init_state(3), 0
        for n in cuts:
            logits, state = m.step(x[:, at : at + n], state)
            at += n
            assert error(logits, whole[:, at - 1]) < 1e-5


def test_the_state_does_not_grow():
    """The bytes that a sample prints are the first token's, however long the text: 1,500 tokens, two prefill parts."""
    m = model(layers=1)
    size = lambda s: sum(t.nbytes for t in s.values())
    state = m.init_state(1)
    before = size(state)
    assert before == 4 * (2 * 32 + 2 * 16 * 16)
    whole = m(x := tokens(B=1, T=1500))[:, -1]
    logits, state = m.step(x, state)
    assert size(state) == before and error(logits, whole) < 1e-5
    seen = [size(s) for _, s in rwkv.generate(m, x[:, :3], Config(tokens=100, temp=0))]
    assert len(seen) == 100 and set(seen) == {before}


def test_checkpointing():
    """--ckpt recomputes each block: equal loss and gradients."""
    x, y = tokens(), tokens().roll(-1, 1)
    found = []
    for ckpt in (False, True):
        m = model(ckpt=ckpt)
        loss = m(x, y)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in m.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


# ---------------------------------------------------------------- training
def test_initial_values():
    """Each rule of RWKV-LM's trainer, computed here channel by channel as it states them."""
    torch.manual_seed(0)
    L, C, N, V = 3, 64, 16, 200
    m = Model(Config(layers=L, dim=C, head_dim=N, vocab=V))
    t = m.state_dict()
    assert t["emb.weight"].abs().max() <= 1e-4 and t["emb.weight"].std() > 5e-5
    gain = lambda w: (w.T @ w if w.shape[0] > w.shape[1] else w @ w.T).diagonal().sqrt()  # of an orthogonal matrix
    assert (gain(t["head.weight"]) - 0.5 * math.sqrt(V / C)).abs().max() < 1e-5
    for i in range(L):
        g = lambda name: t[f"blocks.{i}.{name}"]
        zero_to_one, one_to_zero = i / (L - 1), 1 - i / L
        for n in (0, 1, 17, 40, 63):
            d, line = n / C, n / (C - 1) - 0.5
            z = (n % N - (N - 1) / 2) / ((N - 1) / 2)
            z *= abs(z)
            want = {f"att.x_{k}": 1 - d ** (p * one_to_zero)
                    for k, p in dict(r=0.2, w=0.9, k=0.7, v=0.7, a=0.9, g=0.2).items()}
            want |= {"ffn.x_k": 1 - d ** one_to_zero**4, "att.k_k": 0.71 - 0.1 * line, "att.k_a": 1.02,
                     "att.a0": -0.19 + 0.3 * z + 0.4 * line}
            want["att.w0"] = -6 + 6 * (n / (C - 1)) ** (1 + zero_to_one**0.3) + 0.5 + 2.5 * z
            want |= {"att.v0": 0.73 - 0.4 * line} if i else {}
            for name, value in want.items():
                assert abs(g(name).flatten()[n].item() - value) < 1e-5, (i, n, name)
        assert (g("att.r_k") == -0.04).all() and (g("att.ln_x.weight") - ((1 + i) / L) ** 0.7).abs().max() < 1e-6
        for k in "wag" + "v" * (i > 0):
            assert not g(f"att.{k}1").any() and (gain(g(f"att.{k}2")) - 0.1).abs().max() < 1e-5, k
        assert not g("att.output.weight").any() and not g("ffn.value.weight").any()
        for name, want in {"att.receptance": 1, "att.value": 1, "att.key": 0.1, "ffn.key": 1}.items():
            assert (gain(g(f"{name}.weight")) - want).abs().max() < 1e-5, name
    assert "blocks.0.att.v0" not in t


def test_parameter_groups():
    """RWKV-LM's: w0 at twice the rate; only .weight matrices decay, not low-rank maps; eps 1e-18, beta 0.9, beta2."""
    m = model()
    names = {id(p): k for k, p in m.named_parameters()}
    (o,) = rwkv.make_optimizers(m, cfg := Config(**TINY, wd=0.1, lr=1e-3, warmup=0, beta2=0.99))
    rwkv.set_lr([o], 0, cfg)
    seen = set()
    for g in o.param_groups:
        assert g["eps"] == 1e-18 and g["betas"] == (0.9, 0.99)
        for p in g["params"]:
            k = names[id(p)]
            seen.add(k)
            assert g["weight_decay"] == (0.1 if k.endswith(".weight") and p.ndim == 2 else 0), k
            assert g["lr"] == (2e-3 if k.endswith("att.w0") else 1e-3), k
            assert g.get("matrix", False) == (k.endswith(".weight") and p.ndim == 2 and k.startswith("blocks")), k
    assert seen == set(names.values())


def test_l2wrap():
    """RWKV-LM's: the loss is the same number, each row's largest logit gets 1e-4 / (B T) of itself more gradient."""
    m = model(l2wrap=1e-4)
    x, y = tokens(), tokens().roll(-1, 1)
    loss = m(x, y)
    loss.backward()
    got = m.head.weight.grad.clone()
    m.zero_grad()
    logits = m(x)
    plain = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert abs(loss.item() - plain.item()) < 1e-6
    (plain + 0.5e-4 * logits.max(-1).values.square().mean()).backward()
    assert error(got, m.head.weight.grad) < 1e-5
    assert abs(m.eval()(x, y).item() - plain.item()) < 1e-6


def test_official_sizes():
    """The presets, built, have the released checkpoints' shapes (their names say 0.1B 0.4B 1.5B 2.9B)."""
    with torch.device("meta"):
        for name, (n, r) in {
            "0.1B": (191_034_624, (64, 64, 32, 128)), "0.4B": (450_767_872, (64, 64, 32, 128)),
            "1.5B": (1_527_404_544, (96, 96, 64, 256)), "2.9B": (2_947_735_040, (96, 96, 64, 320)),
        }.items():  # fmt: skip
            cfg = Config(**rwkv.PRESETS[name])
            assert rwkv.ranks(cfg) == r and sum(p.numel() for p in Model(cfg).parameters()) == n, name


RECORDED = dict(
    adamw=[4.2678, 3.3836, 3.3217, 3.2327, 3.1360, 3.0306, 2.9177, 2.7979, 2.6731, 2.5460],
    muon=[4.2678, 3.3835, 3.3233, 3.2403, 3.1543, 3.0651, 2.9739, 2.8818, 2.7894, 2.6974],
)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_recorded_losses(optim):
    """Ten steps on one batch, as recorded: a change of the maths, the initialisation or the schedule shows here."""
    found = overfit(rwkv, head_dim=8, optim=optim)
    assert all(abs(a - b) < 2e-4 for a, b in zip(found, RECORDED[optim], strict=True)), found


# ---------------------------------------------------------------- the World tokenizer, and misuse
def test_world_tokenizer(tmp_path):
    """A vocabulary in the official form: the longest word wins, as in the package's own tokenizer."""
    words = ([bytes([i]) for i in range(256)]
             + [b"ab", b"abc", "\u00e9", b"\xe4\xbd", "\u4f60", b"a b", b"\n\n", b"'", b'"\\'])
    size = lambda w: len(w if isinstance(w, bytes) else w.encode())
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{i + 1} {w!r} {size(w)}\n" for i, w in enumerate(words)), encoding="utf-8")
    official, tok = package("rwkv_tokenizer").TRIE_TOKENIZER(str(path)), rwkv.Tokenizer(str(path))
    for text in ("abcab\u00e9a b", "\u4f60\u4f61 \n\n\n", "\"\\'x\U0001f600"):
        ids = tok.encode(text).tolist()
        assert ids == official.encode(text) and tok.decode(ids) == text
    assert tok.vocab == 512


def test_a_run(tmp_path, text):
    """Trains with a World vocabulary, prints the state's bytes; the package loads what it leaves, --init goes on."""
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)) + "257 b' times ' 7\n")
    out = tmp_path / "o"
    run = ("--layers 2 --dim 32 --head-dim 16 --seq 32 --batch 4 --eval-iters 2 --tokens 20 --steps 3 "
           "--l2wrap 1e-4 --ckpt").split()
    said = finish(start([*run, "--data", text, "--tok", str(vocab), "--out", str(out)], "rwkv.py"))
    size = 4 * 2 * (2 * 32 + 2 * 16 * 16)
    assert "final val loss" in said and f"{size:,} bytes of state" in said
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 512
    ours = Model.from_pretrained(out)
    theirs = package("model").RWKV_x070(str(out / "rwkv"), "cpu fp32")
    x = tokens(B=1, T=9)
    assert error(ours(x)[0], theirs.forward(x[0].tolist(), None, full_output=True)[0]) < 1e-4
    said = finish(start(["--init", str(out / "rwkv.pth"), "--tok", str(vocab), "--sample", "3 times",
                         "--tokens", "5"], "rwkv.py"))
    assert said.startswith("3 times") and f"{size:,} bytes of state" in said


def test_bad_inputs(tmp_path, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    official_file(tmp_path / "a.pth")
    for args, said in (
        (["--dim", "30", "--head-dim", "16", "--data", text], "--head-dim 16: --dim 30 must be divisible by it"),
        (["--dim", "32", "--head-dim", "1", "--data", text], "--head-dim 1: "),
        (["--preset", "7B"], "--preset 7B: one of cpu, gpu, 0.1B, 0.4B, 1.5B, 2.9B"),
        (["--l2wrap=-1", "--data", text], "--l2wrap -1.0: must be 0 or more"),
        (["--init", "a.pth", "--sample", "x"], "--tok names one"),
        (["--init", "a.pth", "--dim", "64", "--sample", "x"], "is asked for"),
        (["--init", str(tmp_path / "none.pth")], "no such file or folder"),
    ):
        with pytest.raises(SystemExit) as e:
            rwkv.main(args)
        out, err = capsys.readouterr()
        assert e.value.code == 2 and said in err and err.startswith("rwkv.py: ") and err.count("\n") == 1, (args, err)
