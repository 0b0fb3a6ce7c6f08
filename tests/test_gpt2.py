"""gpt2.py against transformers' GPT-2, against itself in every form, and as a program: started, stopped, misused."""

import dataclasses
import io
import json
import math
import os
import shutil
import signal
import types
from pathlib import Path

import house
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from house import ROOT, error, finish, losses, overfit, randomised, start, tokens
from safetensors.torch import load_file, save_file

import gpt2
from gpt2 import Config, Model

TINY = dict(layers=2, heads=2, dim=16, seq=32, vocab=50)
RUN = ["--layers", "2", "--heads", "2", "--dim", "32", "--seq", "32", "--batch", "4", "--eval-iters", "2",
       "--tokens", "20", "--dtype", "fp32"]


def oracle(folder=None):
    from transformers import GPT2Config, GPT2LMHeadModel

    if folder:
        return GPT2LMHeadModel.from_pretrained(folder).eval()
    c = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=1)
    return randomised(GPT2LMHeadModel(c)).eval()


# ---------------------------------------------------------------- the model
def test_equals_transformers(tmp_path):
    """Logits, loss and every gradient, for a folder that transformers saved; fp32, relative error."""
    theirs = oracle()
    theirs.save_pretrained(tmp_path)
    ours = Model.from_pretrained(tmp_path)
    x, y = tokens(), tokens().roll(-1, 1)
    assert error(ours(x), theirs(x).logits) < 1e-5
    y[0, :5] = -1
    loss = ours(x, y)
    want = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    assert abs(loss.item() - want.item()) < 1e-5
    loss.backward()
    want.backward()
    grads = {k.removeprefix("transformer."): p.grad for k, p in theirs.named_parameters()}
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert error(p.grad, grads[name]) < 1e-4, name


def test_saves_what_transformers_loads(tmp_path):
    ours = randomised(Model(Config(**TINY))).eval()
    ours.save_pretrained(tmp_path)
    assert error(oracle(tmp_path)(tokens()).logits, ours(tokens())) < 1e-5


def test_reads_the_hub_form(tmp_path):
    """OpenAI's files: no prefix, mask buffers, maybe a copy of the head; a shorter context takes fewer positions."""
    theirs = oracle()
    theirs.save_pretrained(tmp_path)
    plain = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    plain |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "lm_head.weight": plain["wte.weight"].clone()}
    save_file(plain, tmp_path / "model.safetensors")
    assert error(Model.from_pretrained(tmp_path)(tokens()), theirs(tokens()).logits) < 1e-5
    assert error(Model.from_pretrained(tmp_path, seq=20)(tokens()), theirs(tokens()).logits) < 1e-5
    torch.save(plain, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert error(Model.from_pretrained(tmp_path)(tokens()), theirs(tokens()).logits) < 1e-5


@pytest.mark.parametrize("version", [3, 5])
def test_reads_llmc(tmp_path, version):
    """llm.c's file, written here by its description: padded vocabulary, products as (out, in), layers stacked."""
    model = randomised(Model(Config(**TINY)))
    t = model.state_dict()
    kinds = ("ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight attn.c_proj.bias "
             "ln_2.weight").split()
    kinds += "ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias".split()
    parts = [F.pad(t["wte.weight"], (0, 0, 0, 78)), t["wpe.weight"]]
    for k in kinds:
        parts += [w.t() if w.ndim == 2 else w for w in (t[f"h.{i}.{k}"] for i in range(2))]
    body = torch.cat([p.flatten() for p in parts + [t["ln_f.weight"], t["ln_f.bias"]]])
    body = body if version == 3 else body.bfloat16().view(torch.int16)
    head = np.zeros(256, dtype="<i4")
    head[:8] = 20240326, version, 32, 50, 2, 2, 16, 128
    path = tmp_path / "gpt2_tiny.bin"
    path.write_bytes(head.tobytes() + body.numpy().tobytes())
    read = Model.from_pretrained(path)
    for k, v in read.state_dict().items():
        assert torch.equal(v, t[k] if version == 3 else t[k].bfloat16().float()), k


def test_strict(tmp_path, capsys):
    """A missing, an unknown, a misshapen tensor, another architecture, a damaged file: named and refused."""
    Model(Config(**TINY)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good, config = load_file(file), json.loads((tmp_path / "config.json").read_text())
    cases = [
        ({k: v for k, v in good.items() if k != "ln_f.bias"}, config, "no tensor ln_f.bias"),
        (good | {"h.0.extra": torch.ones(1)}, config, "unknown tensor h.0.extra"),
        (good | {"wpe.weight": torch.ones(31, 16)}, config, "wpe.weight is (31, 16), but (32, 16)"),
        (good, config | {"activation_function": "relu"}, "activation_function"),
        (good, {"hidden_size": 3}, "no GPT-2"),
    ]
    for tensors, c, said in cases:
        save_file(tensors, file)
        (tmp_path / "config.json").write_text(json.dumps(c))
        with pytest.raises(SystemExit) as e:
            Model.from_pretrained(tmp_path)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, err
    (tmp_path / "config.json").write_text(json.dumps(config))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(SystemExit):
        Model.from_pretrained(tmp_path)
    assert "damaged" in capsys.readouterr().err


def test_step_equals_forward():
    """Prefill of any length, then one token at a time, then several: the same logits as one forward."""
    model = randomised(Model(Config(**TINY))).eval()
    x = tokens(T=32)
    whole = model(x)
    for cuts in ([1] * 32, [5, 1, 1, 20, 5], [32]):
        state, at = model.init_state(3), 0
        for n in cuts:
            logits, state = model.step(x[:, at : at + n], state)
            at += n
            assert error(logits, whole[:, at - 1]) < 1e-5
    with pytest.raises(ValueError, match="33 tokens do not fit the 32"):
        model.step(x[:, :1], state)


def test_greedy_equals_transformers(tmp_path):
    theirs = oracle()
    theirs.save_pretrained(tmp_path)
    x = tokens(B=1, T=4)
    want = theirs.generate(x, max_new_tokens=28, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    cfg = Config(temp=0, tokens=28)
    assert [i for i, _ in gpt2.generate(Model.from_pretrained(tmp_path), x, cfg)] == want


def test_generates_past_the_context():
    model = randomised(Model(Config(**TINY)))
    ids = [i for i, _ in gpt2.generate(model, tokens(B=1, T=40), Config(tokens=100, seed=3))]
    assert len(ids) == 100 and max(ids) < 50
    assert ids == [i for i, _ in gpt2.generate(model, tokens(B=1, T=40), Config(tokens=100, seed=3))], (
        "a seed gives one sample")


def test_draw():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    g = torch.Generator().manual_seed(0)

    def drawn(**how):
        return {gpt2.draw(logits, Config(temp=1.0, **how), g).item() for _ in range(200)}

    assert (drawn() == {0, 1, 2, 3} and drawn(top_k=2) == {2, 3}
            and drawn(top_p=0.5) == {2, 3} and drawn(top_p=0.3) == {3})
    assert gpt2.draw(logits, Config(temp=0), g).item() == gpt2.draw(logits, Config(temp=1e-40), g).item() == 3


def test_official_sizes():
    with torch.device("meta"):
        for name, n in {"124M": 124_439_808, "350M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}.items():
            cfg = Config(**{k: v for k, v in gpt2.PRESETS[name].items()})
            assert sum(p.numel() for p in Model(cfg).parameters()) == n


def test_parameter_groups():
    """124M: 50 tensors decay, 98 do not; weights start as GPT-2's do."""
    model = Model(Config(**TINY | dict(layers=12, dim=96, heads=12)))
    groups = model.param_groups(0.1)
    assert sum(len(g["params"]) for g in groups if g["weight_decay"]) == 50
    assert sum(len(g["params"]) for g in groups if not g["weight_decay"]) == 98
    std = {k: p.std().item() for k, p in model.named_parameters() if p.ndim == 2}
    for k, s in std.items():
        want = 0.02 / math.sqrt(24) if k.endswith("c_proj.weight") else 0.02
        assert abs(s / want - 1) < 0.06, k


def test_checkpointing_with_dropout():
    """Activation checkpointing recomputes with the same dropout: equal loss and gradients."""
    x, y = tokens(), tokens().roll(-1, 1)
    found = []
    for ckpt in (False, True):
        torch.manual_seed(0)
        model = Model(Config(**TINY, dropout=0.2, ckpt=ckpt))
        torch.manual_seed(1)
        loss = model(x, y)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_muon():
    """torch.optim.Muon does the same in bf16: the updates agree to bf16's precision."""
    g = torch.Generator().manual_seed(0)
    for shape in ((16, 48), (48, 16), (16, 16)):
        p = torch.randn(3, *shape, generator=g)
        ours, theirs = ([torch.nn.Parameter(w.clone()) for w in p] for _ in range(2))
        a = gpt2.Muon(ours, lr=0.1, weight_decay=0.1)
        b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            for q, r in zip(ours, theirs):
                q.grad = torch.randn(shape, generator=g)
                r.grad = q.grad.clone()
            a.step()
            b.step()
        for w, q, r in zip(p, ours, theirs):
            assert error(q - w, r - w) < 0.02, shape


# ---------------------------------------------------------------- training
RECORDED = dict(
    adamw=[4.1791, 4.1157, 4.0433, 3.9639, 3.8733, 3.7754, 3.6832, 3.5880, 3.4920, 3.3991],
    muon=[4.1791, 4.1262, 4.0560, 3.9586, 3.8677, 3.7792, 3.6848, 3.5891, 3.4971, 3.4072],
)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_recorded_losses(optim):
    """Ten steps on one batch, as recorded: a change of the maths, the initialisation or the schedule shows here."""
    found = overfit(gpt2, heads=2, optim=optim)
    assert all(abs(a - b) < 2e-4 for a, b in zip(found, RECORDED[optim], strict=True)), found


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Which of PyTorch's own operations multiply matrices, normalise, activate or take a softmax."""

    NAMES = ("mm bmm addmm baddbmm linear gelu gelu_backward native_layer_norm native_layer_norm_backward "
             "_softmax").split()
    NAMES += ["_log_softmax", "_fused_adamw_", "_foreach_addcdiv_", "addcdiv_",
              "_scaled_dot_product_flash_attention_for_cpu"]

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (func.namespace == "mkldnn"
                or func.namespace == "aten" and func._schema.name.removeprefix("aten::") in self.NAMES):
            self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_every_flop_in_our_kernels(monkeypatch):
    """With KERNELS=triton ten steps, optimizer included, give plain PyTorch's losses and call none of its products."""
    small = dict(B=2, T=16, heads=2, optim="adamw")
    with Products() as products:
        plain = overfit(gpt2, **small)
    import kernels.adamw
    import kernels.attention
    import kernels.cross_entropy
    import kernels.matmul
    import kernels.norm

    forward = "mkldnn::_linear_pointwise" if kernels.matmul.MKL_IS_SLOW else "aten::addmm"
    assert {forward, "aten::mm", "aten::_fused_adamw_"} <= products.seen, "the check sees PyTorch's own"
    for op in (kernels.adamw, kernels.attention, kernels.cross_entropy, kernels.matmul, kernels.norm):
        monkeypatch.setattr(op, "KERNELS", "triton")
    with Products() as products:
        ours = overfit(gpt2, **small)
    assert not products.seen, products.seen
    assert all(abs(a - b) < 1e-4 for a, b in zip(ours, plain, strict=True)), (ours, plain)


def test_learns(tmp_path, text):
    """A short real run: the loss of one that learns nothing but the letters' frequencies is 2.6."""
    finish(start([*RUN, "--data", text, "--steps", "150", "--batch", "16", "--eval-every", "150",
                  "--out", str(tmp_path / "o")]))
    assert float(losses(tmp_path / "o")[150][1]) < 1.0


def test_a_text_without_newlines(tmp_path):
    """The sample at the end begins with a token that the data has, whatever the characters are."""
    path = tmp_path / "t.txt"
    path.write_text("0123456789" * 100)
    out = finish(start([*RUN, "--data", str(path), "--steps", "1", "--out", str(tmp_path / "o")]))
    assert "final val loss" in out and "log.csv are in" in out


@pytest.mark.parametrize("flags", [
    ["--optim", "muon"], ["--optim", "adamw", "--dropout", "0.1", "--accum", "2"], ["--optim", "adamw8bit"]])
def test_resume_after_kill(tmp_path, text, flags):
    """kill -9, then --resume: the next losses are the same to the last bit, and so are the weights."""
    args = [*RUN, *flags, "--data", text, "--steps", "60", "--eval-every", "20", "--log-every", "1"]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    whole = start([*args, "--out", one])
    cut = start([*args, "--out", two])
    for line in cut.stdout:
        if line.startswith("step 30/"):  # past the save at step 20
            break
    cut.kill()
    cut.wait()
    finish(whole)
    assert max(losses(two)) < 60, "it was cut"
    shutil.copy(Path(two, "model.safetensors"), Path(two, "model.safetensors.tmp"))  # what a kill while saving leaves
    finish(start(["--resume", "--out", two, "--log-every", "1"]))
    a, b = losses(one), losses(two)
    assert {s: a[s] for s in range(21, 61)} == {s: b[s] for s in range(21, 61)}
    one, two = load_file(Path(one, "model.safetensors")), load_file(Path(two, "model.safetensors"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_kill_between_the_two_renames(tmp_path, text):
    """train_state.pt is new, the weights still carry their other name: load_run ends what the kill interrupted."""
    out = tmp_path / "o"
    finish(start([*RUN, "--data", text, "--steps", "4", "--eval-every", "2", "--out", str(out)]))
    weights = (out / "model.safetensors").read_bytes()
    os.replace(out / "model.safetensors", out / "model.safetensors.new")
    assert gpt2.load_run(out)["step"] == 4 and (out / "model.safetensors").read_bytes() == weights
    stale = load_file(out / "model.safetensors")
    save_file(stale, out / "model.safetensors.new", metadata={"step": "2"})  # of an interrupted save before: not taken
    gpt2.load_run(out)
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("flags", [[], ["--fsdp"]])
def test_two_processes_equal_one(tmp_path, text, flags):
    """Same global batch: losses over 20 steps within 1e-5, DDP and FSDP2; the sharded run saves a whole checkpoint."""
    args = [*RUN, "--optim", "adamw", "--lr", "1e-3", "--accum", "2", "--data", text, "--steps", "20",
            "--eval-every", "10", "--log-every", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start([*args, "--out", str(one)]))
    finish(start([*args, *flags, "--out", str(two)], torchrun=2))
    a, b = losses(one), losses(two)
    assert a.keys() == b.keys() and all(abs(float(a[s][0]) - float(b[s][0])) < 1e-5 for s in a)
    assert abs(float(a[20][1]) - float(b[20][1])) < 1e-5
    one, two = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert all(error(one[k], two[k]) < 1e-3 or (one[k] - two[k]).abs().max() < 1e-4 for k in one)
    finish(start(["--resume", "--steps", "22", *flags, "--out", str(tmp_path / "two")], torchrun=2))


def test_stops_on_a_signal(tmp_path, text):
    """SIGTERM: the step ends, the run is saved, and it can go on."""
    out = str(tmp_path / "o")
    p = start([*RUN, "--data", text, "--steps", "100000", "--eval-every", "100000", "--log-every", "1", "--out", out])
    for line in p.stdout:
        if line.startswith("step 3/"):
            p.send_signal(signal.SIGTERM)
            break
    rest = p.stdout.read()
    assert p.wait(timeout=60) == 0 and "stopped after step" in rest and "Traceback" not in rest
    done = gpt2.load_run(out)["step"]
    assert done >= 3
    p = start(["--resume", "--steps", str(done + 1), "--tokens", "1000000", "--out", out])
    for line in p.stdout:
        if line.startswith("final val loss"):  # what follows is the sample: Ctrl-C ends it
            p.send_signal(signal.SIGINT)
            break
    rest = p.communicate(timeout=60)[0]
    assert p.returncode == 130 and "Traceback" not in rest and gpt2.load_run(out)["step"] == done + 1


def test_loss_that_is_not_finite(tmp_path, text):
    """The run stops, names the step and the last good checkpoint; that one is left alone."""
    out = str(tmp_path / "o")
    args = [*RUN, "--optim", "adamw", "--data", text, "--steps", "40", "--eval-every", "5", "--out", out]
    finish(start([*args[:-4], "--steps", "40", "--eval-every", "5", "--out", out, "--steps", "5"]))
    p = start(["--resume", "--out", out, "--steps", "40", "--lr", "1e30", "--clip", "0"])
    said = p.communicate(timeout=60)[0]
    assert (p.returncode == 2 and "the loss is not finite; the last good checkpoint is step 5" in said
            and "Traceback" not in said), said
    assert gpt2.load_run(out)["step"] == 5


def test_alone(tmp_path, text):
    """In an empty folder it trains, resumes and samples in plain PyTorch; without --data on Python's own library."""
    shutil.copy(ROOT / "gpt2.py", tmp_path)
    out = finish(start([*RUN, "--data", text, "--steps", "4", "--out", "o"], cwd=tmp_path))
    assert "plain PyTorch" in out and "final val loss" in out
    finish(start(["--resume", "--out", "o", "--steps", "6"], cwd=tmp_path))
    assert finish(start(["--sample", "3 times", "--out", "o", "--tokens", "10"], cwd=tmp_path)).startswith("3 times")
    assert "Python's own library" in finish(start([*RUN, "--steps", "2", "--eval-iters", "1"], cwd=tmp_path))
    p = start([*RUN, "--optim", "adamw8bit", "--data", text], cwd=tmp_path)
    assert "needs the folder kernels/" in p.communicate(timeout=60)[0] and p.returncode == 2


def test_alone_gives_the_same_losses(text):
    """The definitions in the file and the operations in kernels/ are the same maths."""
    alone = house.alone("gpt2.py")
    model = randomised(Model(Config(**TINY)), 0.1)
    other = alone.Model(alone.Config(**TINY))
    other.load_state_dict(model.state_dict())
    x, y = tokens(), tokens().roll(-1, 1)
    a, b = model(x, y), other(x, y)
    a.backward()
    b.backward()
    assert abs(a.item() - b.item()) < 1e-6
    for (k, p), q in zip(model.named_parameters(), other.parameters()):
        assert error(q.grad, p.grad) < 1e-5, k


# ---------------------------------------------------------------- data
def test_token_files(tmp_path):
    """nanoGPT's .bin with and without meta, llm.c's shards: what is read, how it is split, which windows there are."""
    cfg = lambda **k: Config(seq=8, batch=4, data=str(tmp_path), **k)
    ids = np.arange(2000, dtype=np.uint16) % 65
    ids.tofile(tmp_path / "train.bin")
    ids[:100].tofile(tmp_path / "val.bin")
    import pickle

    chars = "".join(chr(48 + i) for i in range(65))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(
        dict(vocab_size=65, itos=dict(enumerate(chars)), stoi={c: i for i, c in enumerate(chars)})))
    train, val, tok = gpt2.load_data(c := cfg(), {}, None)
    assert (c.tok, c.vocab, tok.decode([0, 1]), train.tokens, val.tokens) == ("char", 65, "01", 2000, 100)
    x, y = train.batch(c, 3, 0, 0, 1)
    assert x.shape == (4, 8) and torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y[:, -1], (x[:, -1] + 1) % 65)
    parts = [train.batch(c, 3, 0, r, 2)[0] for r in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), x), "the processes share one batch"
    assert not torch.equal(train.batch(c, 4, 0, 0, 1)[0], x) and not torch.equal(train.batch(c, 3, 1, 0, 1)[0], x)
    assert [int(i) for i in val.fixed(c)] == list(range(0, 92, 8)), "every window that fits, once"
    for f in tmp_path.iterdir():
        f.unlink()
    for i, n in enumerate((500, 300)):
        head = np.zeros(256, "<i4")
        head[:3] = 20240520, 1, n
        (tmp_path / f"fineweb_train_{i}.bin").write_bytes(
            head.tobytes() + (np.arange(n, dtype="<u2") + 1000 * i).tobytes())
    train, val, _ = gpt2.load_data(c := cfg(tok="byte", vocab=2000), {}, None)
    assert (train.tokens, val.tokens) == (500 + 270, 30)
    for i in range(train.first[-1]):  # no window crosses from one shard into the next
        x, y = train.windows([i])
        assert torch.equal(y, x + 1)
    with pytest.raises(SystemExit):  # a header that promises more than there is
        (tmp_path / "fineweb_train_0.bin").write_bytes(head.tobytes())
        gpt2.load_data(cfg(tok="byte"), {}, None)


def test_meta_pkl_runs_no_code(tmp_path, capsys):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Evil()))
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(SystemExit):
        gpt2.load_data(Config(seq=8, data=str(tmp_path)), {}, None)
    assert not (tmp_path / "ran").exists() and "meta.pkl" in capsys.readouterr().err


def test_tokenizers(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    hf = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.save(str(tmp_path / "tokenizer.json"))
    tok = gpt2.Tokenizer(str(tmp_path / "tokenizer.json"))
    assert tok.encode("hello world").tolist() == [1, 2] and tok.vocab == 3 and tok.decode([1, 2]) == "hello world"
    rwkv = tmp_path / "vocab.txt"
    words = [bytes([i]) for i in range(256)] + [b"ab", b"abc", "\u00e9".encode(), b"a b"]
    lines = [f"{i + 1} {w!r} {len(w)}" for i, w in enumerate(words)]
    rwkv.write_text("\n".join(lines) + "\n")
    tok = gpt2.Tokenizer(str(rwkv))
    assert tok.encode("abcab\u00e9a b").tolist() == [258, 257, 259, 260] and tok.vocab == 512
    assert tok.decode(tok.encode("zab\u00e9\n")) == "zab\u00e9\n"
    tok = gpt2.Tokenizer("char", "abc")
    assert tok.encode("cab").tolist() == [2, 0, 1] and tok.decode([2, 0]) == "ca"
    with pytest.raises(SystemExit):
        tok.encode("abd")
    assert "the character 'd' is not in the training text" in capsys.readouterr().err
    tok = gpt2.Tokenizer("byte")
    assert tok.decode(tok.encode("h\u00e9")) == "h\u00e9" and tok.decode([255]) == "\ufffd"


def test_jsonl(tmp_path):
    """A line ends at a newline and nowhere else; splitlines() would cut at U+2028, which JSON allows in a string."""
    path = tmp_path / "t.jsonl"
    lines = [json.dumps({"text": f"line {i}\u2028"}, ensure_ascii=False) for i in range(50)]
    path.write_text("".join(line + "\n" for line in lines))
    train, val, tok = gpt2.load_data(Config(seq=8, data=str(path)), {}, None)
    assert tok.decode(train.windows([0])[0][0]) == "line 0\u2028\n"


# ---------------------------------------------------------------- misuse
def pickled(x):
    torch.save(x, file := io.BytesIO())
    return file.getvalue()


def bad_inputs(tmp, text):
    (tmp / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp / "no_text.jsonl").write_text('{"a": 1}\n')
    (tmp / "file").write_text("")
    (tmp / "broken").mkdir()
    (tmp / "broken" / "train_state.pt").write_bytes(b"PK nonsense")
    (tmp / "big").mkdir()
    np.full(4000, 60000, dtype=np.uint16).tofile(tmp / "big" / "train.bin")
    for name, words in dict(odd=b"abc", only_test=b"abcd").items():
        (tmp / name).mkdir()
        (tmp / name / ("test.bin" if "test" in name else "train.bin")).write_bytes(words)
    for name, state in dict(empty=b"", list=pickled([]), foreign=pickled({"a": 1})).items():
        (tmp / name).mkdir()
        (tmp / name / "train_state.pt").write_bytes(state)
    d = ["--data", text]
    yield ["--tok", "byte", "--data", str(tmp / "odd")], "3 bytes are no whole number of tokens"
    yield ["--tok", "byte", "--data", str(tmp / "only_test")], "only val and test shards"
    yield ["--resume", "--out", str(tmp / "empty")], "train_state.pt: damaged"
    yield ["--resume", "--out", str(tmp / "list")], "train_state.pt: damaged"
    yield ["--resume", "--out", str(tmp / "foreign")], "train_state.pt: damaged"
    yield ["--out", "", *d], "--out: its value is empty"
    yield ["--seed", "9" * 25, *d], "must be below 2^63"
    yield ["--preset", "huge"], "--preset huge: one of cpu, gpu"
    yield ["--dim", "30", "--heads", "4", *d], "--heads 4: --dim 30 must be divisible"
    yield ["--batch", "0"], "--batch 0: must be positive"
    yield ["--steps", "many"], "--steps: invalid int value: 'many'"
    yield ["--lr", "nan"], "--lr nan: must be positive"
    yield ["--lr=-1"], "--lr -1.0: must be positive"
    yield ["--dropout", "1"], "--dropout 1.0: must be between 0 and 1"
    yield ["--top-p", "0"], "--top-p 0.0: must be between 0 and 1"
    yield ["--optim", "sgd"], "--optim sgd: one of adamw, muon, adamw8bit"
    yield ["--colour", "red"], "unrecognized arguments: --colour red"
    yield ["--seq", "1000000", *d], "--seq 1000000: the train split"
    yield ["--data", "nowhere.txt"], "--data nowhere.txt: No such file"
    yield ["--data", "nowhere"], "--data nowhere: no .txt"
    yield ["--data", str(tmp / "latin.txt")], "not UTF-8"
    yield ["--data", str(tmp / "no_text.jsonl")], 'a line without {"text"'
    yield ["--tok", "klingon", *d], "--tok klingon: one of char, byte, gpt2"
    yield ["--tok", str(tmp / "latin.txt"), *d], "cannot be used"
    yield ["--vocab", "3", *d], "--vocab 3: the tokenizer char has"
    yield ["--data", str(tmp / "big"), "--tok", "byte", "--seq", "8", "--dim", "16", "--heads", "2",
           "--layers", "1"], "token id 60000 is outside the vocabulary of 256"
    yield ["--out", str(tmp / "file" / "x"), *d], "--out"
    yield ["--resume", "--out", str(tmp / "none")], "--resume: no run in"
    yield ["--resume", "--out", str(tmp / "broken")], "train_state.pt: damaged"
    yield ["--resume", "--init", "x"], "--resume: --init starts another run"
    yield ["--sample", "a", "--out", str(tmp / "none")], "--sample: no run in"
    yield ["--init", str(tmp / "broken")], "not found; a checkpoint is a folder with"
    yield ["--init", str(tmp / "nothing" / "here" / "at" / "all")], "no such file or folder"
    yield ["--fsdp", *d], "--fsdp: start it with torchrun"
    if not torch.cuda.is_available():
        yield ["--device", "cuda", *d], "--device cuda: this machine"


def test_bad_inputs(tmp_path, text, capsys, monkeypatch):
    """Each is one line that names the flag or file and what would be right, exit code 2; nothing is half-written."""
    monkeypatch.chdir(tmp_path)
    for args, said in bad_inputs(tmp_path, text):
        with pytest.raises(SystemExit) as e:
            gpt2.main(args)
        out, err = capsys.readouterr()
        assert e.value.code == 2 and said in err and err.startswith("gpt2.py: ") and err.count("\n") == 1, (args, err)
    assert not list(tmp_path.glob("**/model.safetensors*"))


def test_wrong_use_of_a_run(tmp_path, text, capsys):
    out = str(tmp_path / "o")
    finish(start([*RUN, "--data", text, "--steps", "2", "--out", out]))
    other = tmp_path / "other.txt"
    other.write_text("ABC" * 1000)
    for args, said in (
        (["--resume", "--dim", "64", "--out", out], "the run in"),
        (["--resume", "--heads", "1", "--out", out], "--heads 1: the run in"),
        (["--resume", "--optim", "adamw8bit", "--out", out], "--optim adamw8bit: the run in"),
        (["--init", out, "--tok", "byte", "--data", text], "the tokenizer byte has 256"),
        (["--sample", "\ud83d", "--out", out], "is not in the training text"),
        (["--resume", "--data", str(other), "--out", out], "is not in the training text"),
        (["--sample", "\u00e9", "--out", out], "is not in the training text"),
        (["--sample", "", "--out", out], "--sample: the text is empty"),
    ):
        with pytest.raises(SystemExit) as e:
            gpt2.main(args)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, (args, err)
    for damaged in ("[]", "{", '{"tok": "char"}'):
        Path(out, "tok.json").write_text(damaged)
        with pytest.raises(SystemExit) as e:
            gpt2.main(["--sample", "a", "--out", out])
        assert e.value.code == 2 and "tok.json: damaged" in capsys.readouterr().err


def test_another_run_inside(tmp_path):
    """What a run in a folder below has written and not renamed is not this run's."""
    for folder in (tmp_path, tmp_path / "unet", tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors.new").touch()
    assert {f.parent for f in gpt2.not_renamed(tmp_path)} == {tmp_path, tmp_path / "unet"}


def test_no_network_trains_on_stdlib(tmp_path):
    """The default set cannot be downloaded: one loud line, and Python's own library instead."""
    for f in ("gpt2.py", "kernels", "data"):
        src = ROOT / f
        (shutil.copytree if src.is_dir() else shutil.copy)(src, tmp_path / f, **(
            dict(ignore=lambda d, names: [n for n in names if (Path(d) / n).is_dir()]) if src.is_dir() else {}))
    env = {k: "http://127.0.0.1:9" for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
    out = finish(start([*RUN, "--steps", "2", "--eval-iters", "1"], cwd=tmp_path, env=env))
    assert "!!!" in out and "--data stdlib" in out and "stdlib:" in out


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        gpt2.parse(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and all(gpt2.flag(f.name) in text for f in dataclasses.fields(Config))


@pytest.mark.parametrize("seconds,want,words", [
    ((1, 2, 4, 3), True, "a micro-step takes 4000 ms in fp32, 3000 ms in bf16"),
    ((1, 2, 3, 4), False, "a micro-step takes 3000 ms in fp32, 4000 ms in bf16"),
    ((2, 1), False, "matrices multiply more slowly in bf16 here")])
def test_bf16_is_chosen_by_measuring(seconds, want, words, monkeypatch):
    """auto asks the machine, and says why. By this clock products take seconds[:2] in bf16 and fp32, then a step in
    fp32 and bf16 the others."""
    ticks = iter(np.cumsum([t for s in seconds for t in 3 * (0, s)]).tolist())
    monkeypatch.setattr(gpt2, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    model = Model(Config(**TINY))
    cast, why = gpt2.bf16_pays(torch.device("cpu"), model, (tokens(), tokens()))
    assert cast is want and why.startswith("auto: ") and words in why and next(ticks, None) is None
    assert all(p.grad is None for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens(), tokens()).dtype == torch.float32
