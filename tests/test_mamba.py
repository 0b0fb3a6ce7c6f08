"""mamba.py against transformers' Mamba and Mamba2, itself in every form, and what is its own on the command line."""

import json

import house
import pytest
import torch
import torch.nn.functional as F
from house import error, finish, overfit, randomised, start, tokens
from safetensors.torch import load_file, save_file

import mamba
from mamba import Config, Model

# the second has two groups of heads, and the third none of the usual sizes
TINY = {
    1: dict(version=1, layers=2, dim=16, state=4, vocab=50, vocab_multiple=1),
    2: dict(version=2, layers=2, dim=16, state=6, head_dim=4, groups=2, vocab=50, vocab_multiple=1),
}
both = pytest.mark.parametrize("version", [1, 2])


def oracle(version, folder=None):
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    kind = MambaForCausalLM if version == 1 else Mamba2ForCausalLM
    if folder:
        return kind.from_pretrained(folder).eval()
    same = dict(hidden_size=16, num_hidden_layers=2, vocab_size=50, tie_word_embeddings=True)
    if version == 1:
        c = MambaConfig(**same, state_size=4)
    else:
        c = Mamba2Config(**same, state_size=6, num_heads=8, head_dim=4, n_groups=2, chunk_size=4)
    return randomised(kind(c)).eval()


# ---------------------------------------------------------------- the model
@both
def test_equals_transformers(tmp_path, version):
    """Logits, loss and every gradient, for a folder that transformers saved; fp32, relative error."""
    theirs = oracle(version)
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
    grads = {k: p.grad for k, p in theirs.named_parameters()}
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert error(p.grad, grads[name]) < 1e-4, name


@both
def test_saves_what_transformers_loads(tmp_path, version):
    ours = randomised(Model(Config(**TINY[version] | dict(vocab=45, vocab_multiple=10)))).eval()
    ours.save_pretrained(tmp_path)
    assert error(oracle(version, tmp_path)(tokens(V=45)).logits, ours(tokens(V=45))) < 1e-5
    again = Model.from_pretrained(tmp_path)
    assert again.cfg.vocab == 50 and torch.equal(again(tokens(V=45)), ours(tokens(V=45)))


@both
def test_reads_the_original_form(tmp_path, version):
    """pytorch_model.bin beside a config.json of mamba_ssm: 45 tokens in 48 rows, the head stored too or not."""
    ours = randomised(Model(Config(**TINY[version] | dict(vocab=45, vocab_multiple=8))))
    theirs = {k.replace("embeddings.", "embedding."): v.half() for k, v in ours.state_dict().items()}
    ssm = {} if version == 1 else dict(layer="Mamba2", headdim=4, ngroups=2)
    config = dict(d_model=16, n_layer=2, vocab_size=45, ssm_cfg=dict(ssm, d_state=TINY[version]["state"]),
                  rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for head in ({}, {"lm_head.weight": theirs["backbone.embedding.weight"]}):
        torch.save(theirs | head, tmp_path / "pytorch_model.bin")
        read = Model.from_pretrained(tmp_path, seq=20)
        assert (read.cfg.seq, len(read.backbone.embeddings.weight)) == (20, 48)
        for k, v in read.state_dict().items():
            assert torch.equal(v, ours.state_dict()[k].half().float()), k


def test_strict(tmp_path, capsys):
    """A missing, an unknown, a misshapen tensor, another architecture: named and refused."""
    Model(Config(**TINY[2])).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good, config = load_file(file), json.loads((tmp_path / "config.json").read_text())
    cases = [
        ({k: v for k, v in good.items() if k != "backbone.norm_f.weight"}, config, "no tensor backbone.norm_f.weight"),
        (good | {"backbone.extra": torch.ones(1)}, config, "unknown tensor backbone.extra"),
        (good | {"backbone.layers.0.mixer.D": torch.ones(3)}, config, "backbone.layers.0.mixer.D is (3,), but (8,)"),
        (good, config | {"use_bias": True}, "use_bias = True"),
        (good, config | {"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        (good, config | {"model_type": "llama"}, "another value than a Mamba's"),
        (good, dict(d_model=16, n_layer=2, vocab_size=50, ssm_cfg=dict(layer="Mamba2"), attn_layer_idx=[1]),
         "attn_layer_idx"),
    ]
    for tensors, c, said in cases:
        save_file(tensors, file)
        (tmp_path / "config.json").write_text(json.dumps(c))
        with pytest.raises(SystemExit) as e:
            Model.from_pretrained(tmp_path)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, err


def test_bad_sizes(capsys):
    for wrong, said in (
        (dict(version=3), "--version 3: 1 (Mamba) or 2 (Mamba-2)"),
        (dict(version=2, dim=16, head_dim=24), "--head-dim 24: --expand 2 x --dim 16 = 32"),
        (dict(version=2, dim=16, head_dim=8, groups=3), "--groups 3: the 4 heads"),
    ):
        with pytest.raises(SystemExit):
            Model(Config(layers=1, vocab=8, **wrong))
        assert said in capsys.readouterr().err


# ---------------------------------------------------------------- the forms
def operands(version, T, dtype=torch.float32):
    """What the recurrences take, with decays from nearly 0 to nearly 1: x, dt, A, B, C, D, and a state."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    if version == 1:
        E, N = 6, 5
        x, s, A, D, B, C = normal(2, T, E), normal(2, E, N), normal(E, N), normal(E), normal(2, T, N), normal(2, T, N)
    else:
        H, P, N, G = 4, 3, 5, 2
        x, s, A, D, B, C = (normal(2, T, H, P), normal(2, H, P, N), normal(H), normal(H),
                            normal(2, T, G, N), normal(2, T, G, N))
    dt = F.softplus(2 * normal(*x.shape[:3]) - 1)
    return [u.requires_grad_() for u in (x, dt, -torch.exp(A), B, C, D, s)]


def forms(version, file=mamba):
    """The fast form with the arguments of the recurrence: dt is given, and there is no gate."""
    if version == 2:
        return file.ssd
    inverse = lambda dt: dt + torch.log(-torch.expm1(-dt))  # of the softplus

    def scan(x, dt, A, B, C, D, s):
        return file.selective_scan(x, inverse(dt), A, B, C, D, z=torch.full_like(x, 1.2784645),  # silu(z) = 1
                                   dt_bias=torch.zeros_like(D), initial=s)

    return scan


@both
@pytest.mark.parametrize("T", [1, 7, 64, 150])
def test_the_fast_form_equals_the_recurrence(version, T):
    """Output, last state and every gradient, with and without kernels/, from zeros and from a state."""
    args = operands(version, T)
    exact = [u.detach().double().requires_grad_() for u in args]
    recurrence = mamba.recurrence_1 if version == 1 else mamba.recurrence_2

    def results(f, args):
        y, s = f(*args)
        return [y, s, *torch.autograd.grad(
            (y * torch.sin(torch.arange(y.numel()).view_as(y))).sum() + (s * s).sum(), args)]

    want = results(recurrence, exact)
    for f in (recurrence, forms(version), forms(version, house.alone("mamba.py"))):
        for i, (a, b) in enumerate(zip(results(f, args), want)):
            assert error(a.double(), b) < 1e-5, (f, i)
    zeros = torch.zeros_like(args[-1])
    for a, b in zip(forms(version)(*args[:-1], None), recurrence(*args[:-1], zeros)):
        assert error(a, b) < 1e-5


@both
def test_step_equals_forward(version):
    """Prefill of any length, then one token at a time, then several: one forward's logits, and a state of one size."""
    model = randomised(Model(Config(**TINY[version]))).eval()
    x = tokens(T=70)
    whole = model(x)
    for cuts in ([1] * 12, [2, 1, 1, 60, 6], [70]):
        state, at = model.init_state(3), 0
        sizes = {k: v.nbytes for k, v in state.items()}
        for n in cuts:
            logits, state = model.step(x[:, at : at + n], state)
            at += n
            assert error(logits, whole[:, at - 1]) < 1e-5
        assert sizes == {k: v.nbytes for k, v in state.items()}


@both
def test_greedy_equals_transformers(tmp_path, version):
    theirs = oracle(version)
    theirs.save_pretrained(tmp_path)
    x = tokens(B=1, T=6)
    want = theirs.generate(x, max_new_tokens=28, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 6:].tolist()
    cfg = Config(temp=0, tokens=28)
    assert [i for i, _ in mamba.generate(Model.from_pretrained(tmp_path), x, cfg)] == want


@both
def test_alone_gives_the_same_losses(version):
    """The definitions in the file and the operations in kernels/ are the same maths."""
    alone = house.alone("mamba.py")
    model = randomised(Model(Config(**TINY[version])), 0.1)
    other = alone.Model(alone.Config(**TINY[version]))
    other.load_state_dict(model.state_dict())
    x, y = tokens(T=70), tokens(T=70).roll(-1, 1)
    a, b = model(x, y), other(x, y)
    a.backward()
    b.backward()
    assert abs(a.item() - b.item()) < 1e-6
    for (k, p), q in zip(model.named_parameters(), other.parameters()):
        assert error(q.grad, p.grad) < 1e-5, k


@both
def test_checkpointing_changes_nothing(version):
    x, y, found = tokens(), tokens().roll(-1, 1), []
    for ckpt in (False, True):
        torch.manual_seed(0)
        model = Model(Config(**TINY[version], ckpt=ckpt))
        loss = model(x, y)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- sizes, initial values, groups
def test_official_sizes():
    """Parameters of the released models; the vocabulary is padded to 50,280 and 50,288 rows."""
    sizes = {
        1: {"130M": 129_135_360, "370M": 371_516_416, "790M": 793_204_224, "1.4B": 1_372_178_432,
            "2.8B": 2_768_345_600},
        2: {"130M": 128_989_632, "370M": 368_346_624, "790M": 780_161_280, "1.4B": 1_343_757_312,
            "2.8B": 2_702_599_680},
    }
    with torch.device("meta"):
        for version, of in sizes.items():
            for name, n in of.items():
                assert sum(p.numel() for p in Model(
                    Config(**mamba.PRESETS[name] | dict(version=version))).parameters()) == n, (version, name)


@both
def test_initial_values_and_groups(version):
    torch.manual_seed(0)
    model = Model(Config(**TINY[version] | dict(dim=256, layers=4, head_dim=4)))
    p = dict(model.named_parameters())
    mixer = {k.removeprefix("backbone.layers.2.mixer."): v.detach() for k, v in p.items() if ".2.mixer." in k}
    uniform = lambda w: w.abs().max() * 3**-0.5 / w.std()  # 1 for a uniform distribution
    C, E = 256, 512
    assert abs(p["backbone.embeddings.weight"].std() / 0.02 - 1) < 0.05
    for name, bound in (("in_proj.weight", C**-0.5), ("out_proj.weight", E**-0.5 / 2), ("conv1d.weight", 4**-0.5)):
        assert abs(mixer[name].abs().max() / bound - 1) < 0.01 and abs(uniform(mixer[name]) - 1) < 0.05, name
    dt = F.softplus(mixer["dt_proj.bias" if version == 1 else "dt_bias"])
    assert (0.001 < dt.min() < 0.0015 and 0.08 < dt.max() < 0.1
            and abs(dt.log().mean() - 0.5 * (torch.tensor(1e-4)).log()) < 0.3)
    if version == 1:
        assert abs(mixer["dt_proj.weight"].abs().max() * 4 - 1) < 0.01
        assert torch.equal(mixer["A_log"].exp().round(), torch.arange(1.0, 5).repeat(E, 1))
    else:
        assert 1 < mixer["A_log"].exp().min() < 2 and 15 < mixer["A_log"].exp().max() < 16
    decay = {id(q) for g in model.param_groups(0.1) if g["weight_decay"] for q in g["params"]}
    kept = sorted({k.split(".")[-2] + "." + k.split(".")[-1] for k, q in p.items() if id(q) not in decay})
    assert kept == sorted({k.split(".")[-2] + "." + k.split(".")[-1]
                           for k, q in p.items() if q.ndim == 1 or k.endswith("A_log")})
    muon = [k for k, q in p.items()
            if any(q is r for g in model.param_groups(0.1) if g.get("matrix") for r in g["params"])]
    assert all("_proj.weight" in k for k in muon) and len(muon) == 4 * (4 if version == 1 else 2)


# ---------------------------------------------------------------- training
RECORDED = {
    1: [4.1853, 4.1265, 4.0536, 3.9762, 3.8969, 3.8095, 3.7173, 3.6225, 3.5287, 3.4363],
    2: [4.1732, 4.1131, 4.0482, 3.9685, 3.8855, 3.7974, 3.7070, 3.6120, 3.5150, 3.4189],
}


@both
def test_recorded_losses(version):
    """Ten steps on one batch, as recorded: a change of the maths, the initialisation or the schedule shows here."""
    found = overfit(mamba, **{k: v for k, v in TINY[version].items() if k not in ("vocab", "layers", "dim")})
    assert all(abs(a - b) < 2e-4 for a, b in zip(found, RECORDED[version], strict=True)), found


def test_command_line(tmp_path, text):
    """--version 2 trains, is what --init and --sample then find, and a wrong one is refused."""
    out = str(tmp_path / "o")
    small = "--layers 1 --dim 16 --state 4 --head-dim 8 --seq 16 --batch 2 --eval-iters 1 --steps 2 --tokens 5".split()
    assert "final val loss" in finish(start([*small, "--version", "2", "--data", text, "--out", out], "mamba.py"))
    assert "bytes of state" in finish(start(["--init", out, "--sample", "3 times", "--tokens", "5"], "mamba.py"))
    p = start(["--version", "3", "--data", text, "--out", out], "mamba.py")
    assert "--version 3" in p.communicate(timeout=60)[0] and p.returncode == 2
