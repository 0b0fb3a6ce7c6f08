"""retnet.py against torchscale's RetNetDecoder (recorded by torchscale_retnet.py; live where torchscale is there), and
its three forms against each other. What every file does as a program is in test_house.py."""

import json
import sys
from pathlib import Path

import house
import pytest
import torch
import torch.nn.functional as F
import torchscale_retnet as reference
from house import ROOT, error, overfit, randomised, tokens
from safetensors.torch import load_file, save_file

import retnet
from retnet import FORMS, Config, Model

sys.path.append(str(ROOT / "bench"))
from memory import Tracker  # noqa: E402

TINY = dict(layers=2, heads=3, dim=24, value_dim=36, ffn_dim=40, vocab=50)
RECORDED = json.loads((Path(__file__).parent / "torchscale_retnet.json").read_text())


def folder_of(tmp, config, tensors):
    (tmp / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp / "model.safetensors")
    return tmp


def grads(model, x, y):
    model.zero_grad()
    model(x, y).backward()
    return {k: p.grad.clone() for k, p in model.named_parameters()}


# ---------------------------------------------------------------- torchscale
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RECORDED)
def test_equals_recorded_torchscale(tmp_path, name, form):
    """Logits, loss, every gradient's norm and product with a random direction; config.json in RetNetConfig's names."""
    want = RECORDED[name]
    assert want["config"] == reference.CASES[name], "the recording is of another configuration"
    cfg = dict(layers=2, heads=3, dim=24, value_dim=36, ffn_dim=40, vocab=20, tied="tied" in name)
    tensors = {k: v.clone() for k, v in Model(Config(**cfg)).state_dict().items()}  # for their names and shapes only
    model = Model.from_pretrained(folder_of(tmp_path, want["config"], tensors), form=form)
    assert (model.cfg.act, model.cfg.scale) == (("swish", True) if name == "examples" else ("gelu", False))
    reference.fill(model)
    x, y = reference.batch()
    tol = 1e-5 if form == "parallel" else 1e-4  # the parallel form has torchscale's second factor too
    assert error(model(x).flatten(), torch.tensor(want["logits"])) < tol
    loss = model(x, y)
    assert abs(loss.item() - want["loss"]) < 1e-5
    found = reference.gradients(model, loss)
    assert found.keys() == want["gradients"].keys()
    for k, (norm, along) in found.items():
        assert (abs(norm - want["gradients"][k][0]) < 1e-4 * norm
                and abs(along - want["gradients"][k][1]) < 1e-4 * norm), k


@pytest.mark.parametrize("config", reference.CASES.values(), ids=reference.CASES)
def test_live_torchscale(tmp_path, config):
    """Checkpoints both ways; logits and every gradient; its chunkwise form, and its recurrent form token by token."""
    try:
        theirs = reference.fill(reference.decoder(config))
    except ImportError as e:
        pytest.skip(f"{e}; see torchscale_retnet.py")
    ours = Model.from_pretrained(folder_of(tmp_path, config, {k: v.clone() for k, v in theirs.state_dict().items()}))
    x, y = reference.batch()
    assert error(ours(x), theirs(x)[0]) < 1e-4
    F.cross_entropy(theirs(x)[0].flatten(0, 1), y.flatten()).backward()
    want, found = dict(theirs.named_parameters()), grads(ours, x, y)
    assert found.keys() == want.keys()
    for k, g in found.items():
        assert error(g, want[k].grad) < 1e-4, k
    ours.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    again = reference.decoder(saved | dict(recurrent_chunk_size=4))
    again.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    assert torch.equal(again(x)[0], theirs(x)[0])
    again.chunkwise_recurrent = True
    assert error(ours(x), again(x)[0]) < 1e-3  # its chunks scale o down, so eps weighs more than in its parallel form
    again.chunkwise_recurrent, held, state = False, dict(is_first_step=False), ours.init_state(2)
    for n in range(x.shape[1]):
        logits, state = ours.step(x[:, n : n + 1], state)
        assert error(logits, again(x[:, : n + 1], incremental_state=held)[0][:, 0]) < 1e-4
    scale = held[1]["scale"].sqrt()[:, None, None]  # it holds S^T / sqrt(1 + g + ... + g^n)
    assert error(state["S"][1], (held[1]["prev_key_value"] * scale).mT) < 1e-5


# ---------------------------------------------------------------- the three forms
def inputs(size, T=70, H=2, K=8, V=12):
    """fp64; at size 0.1 no row of |A| sums to 1, at size 3 most do."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, H, n, dtype=torch.float64) for n in (K, K, V))
    a = torch.log(1 - 2.0 ** (-2 - torch.arange(H, dtype=torch.float64)))
    return [x.requires_grad_() for x in (q * size, k, v)], a, torch.randn(2, T, H, V, dtype=torch.float64)


def outputs(form, size, direction=False):
    """o, or the direction of each head's o, and the gradients."""
    leaves, a, w = inputs(size)
    o, _ = FORMS[form](*leaves, a)
    o = o / o.norm(dim=-1, keepdim=True) if direction else o
    return [o, *torch.autograd.grad((o * w).sum(), leaves)]


def test_forms_agree(monkeypatch):
    """fp64: the operations are the same function while no row of |A| sums to more than 1, and of the same direction
    always, which is all that the norm without its eps lets through; so it is with the gradients, for the parallel
    form's factor has none."""
    for chunk in (16, 128):  # 70 tokens: several chunks and a part of one; one part
        monkeypatch.setattr(sys.modules[retnet.retention.__module__], "CHUNK", chunk)
        for form in ("chunkwise", "parallel"):
            for size, direction in ((0.01, False), (3, True)):
                for a, b in zip(outputs(form, size, direction), outputs("recurrent", size, direction)):
                    assert error(a, b) < 1e-12
    assert error(outputs("parallel", 3)[0], outputs("recurrent", 3)[0]) > 0.5, "here the second factor acts"


def test_forms_agree_with_a_state():
    """Recurrent and chunkwise go on from a state, and leave the same one; a gradient comes back through both."""
    found = []
    for form in ("recurrent", "chunkwise"):
        leaves, a, w = inputs(1)
        S = torch.randn(2, 2, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        o, final = FORMS[form](*leaves, a, S)
        found.append([o, final, *torch.autograd.grad((o * w).sum() + final.square().sum(), [*leaves, S])])
    for a, b in zip(*found):
        assert error(a, b) < 1e-12


def test_models_agree():
    """fp32: logits and every gradient of the whole model. As initialised the forms are equal; with weights so large
    that the parallel form's second factor acts in most rows, up to its effect on norm's eps."""
    x, y = tokens(T=40), tokens(T=40).roll(-1, 1)
    for fill, tol in ((lambda m: m, 1e-5), (lambda m: randomised(m, 0.4), 1e-4)):
        torch.manual_seed(0)
        model, found = fill(Model(Config(**TINY))), {}
        for form in FORMS:
            for layer in model.layers:
                layer.retention.form = form
            found[form] = dict(logits=model(x).detach(), **grads(model, x, y))
        for form in ("chunkwise", "recurrent"):
            for k, want in found["parallel"].items():
                assert error(found[form][k], want) < tol, (form, k)


def test_step_equals_forward():
    """Prefill of any length, then one token at a time, then several: one forward's logits; the state does not grow."""
    model = randomised(Model(Config(**TINY))).eval()
    x = tokens(T=150)
    whole, sizes = model(x), set()
    for cuts in ([1] * 150, [5, 1, 1, 20, 123], [150], [149, 1]):
        state, at = model.init_state(3), 0
        for n in cuts:
            logits, state = model.step(x[:, at : at + n], state)
            at += n
            sizes.add(sum(v.nbytes for v in state.values() if torch.is_tensor(v)))
            assert error(logits, whole[:, at - 1]) < 1e-5
        assert state["t"] == 150
    assert sizes == {2 * 3 * 3 * 8 * 12 * 4}, "layers, batch, heads, K, V in fp32"


@pytest.mark.parametrize("form", FORMS)
def test_causal(form):
    model = randomised(Model(Config(**TINY, form=form))).eval()
    x = tokens(T=20)
    other = x.clone()
    other[:, 12] = (x[:, 12] + 1) % 50
    a, b = model(x), model(other)
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12:], b[:, 12:])


def test_head_that_never_forgets():
    """From head 20 on g is 1 in fp32, and 1 + g + ... + g^n is n + 1."""
    model = Model(Config(layers=1, heads=24, dim=48, value_dim=48, ffn_dim=16, vocab=50))
    assert model.retnet_rel_pos.decay[19] < 0 == model.retnet_rel_pos.decay[20]
    x = tokens(T=9)
    want = grads(model, x, x)
    for layer in model.layers:
        layer.retention.form = "parallel"
    for k, g in grads(model, x, x).items():
        assert g.isfinite().all() and error(g, want[k]) < 1e-5, k


# ---------------------------------------------------------------- sizes, initialisation, training
def test_official_sizes():
    """torchscale's examples: heads of 256, widths 27/16 of dim where they are; the paper's recipe."""
    sizes = {"1.3B": (24, 2048, 3456, 3456, 8), "2.7B": (32, 2560, 4280, 4280, 10), "6.7B": (32, 4096, 6912, 6912, 16)}
    with torch.device("meta"):
        for name, (layers, C, E, W, H) in sizes.items():
            cfg = Config(**retnet.PRESETS[name] | dict(layers=1))
            n = sum(p.numel() for p in Model(cfg).parameters())
            assert (retnet.PRESETS[name]["layers"], cfg.dim, cfg.value_dim, cfg.ffn_dim, cfg.heads,
                    cfg.dim // cfg.heads) == (layers, C, E, W, H, 256)
            assert n == 2 * C * C + 3 * C * E + 3 * C * W + 2 * C + 2 * 50257 * C + C
            assert 3.5e6 < cfg.batch * cfg.accum * cfg.seq < 4.5e6
    state = Model(Config(**TINY)).state_dict()
    gamma = state["retnet_rel_pos.decay"].exp()
    torch.testing.assert_close(gamma, torch.tensor([0.96875, 0.984375, 0.9921875]))
    torch.testing.assert_close(state["retnet_rel_pos.angle"][[0, 1, 6, 7]], torch.tensor([1, 1, 1e-4, 1e-4]))


def test_initialisation_and_groups():
    model = Model(Config(layers=2, heads=2, dim=192, vocab=500))
    std = {k.split(".", 2)[-1]: p.std().item() for k, p in model.named_parameters() if p.ndim == 2}
    xavier = lambda n_in, n_out, gain: gain * (2 / (n_in + n_out)) ** 0.5
    want = {f"retention.{k}_proj.weight": xavier(192, 192, 2**-2.5) for k in "qk"}
    want |= {f"retention.{k}_proj.weight": xavier(192, 324, 2**-2.5) for k in "vg"}
    want |= {"retention.out_proj.weight": xavier(324, 192, 0.5), "ffn.fc1.weight": (3 * 192) ** -0.5,
             "ffn.fc2.weight": (3 * 324) ** -0.5}
    want |= {"weight": 192**-0.5}  # embedding and head
    for k, s in want.items():
        assert abs(std[k] / s - 1) < 0.05, k
    decay, ends, rest = model.param_groups(0.05)
    assert sum(len(g["params"]) for g in (decay, ends, rest)) == len(list(model.parameters()))
    assert len(decay["params"]) == 2 * 8 and decay["matrix"] and len(ends["params"]) == 2 and rest["weight_decay"] == 0
    assert len(Model(Config(**TINY, tied=True)).param_groups(0.1)[1]["params"]) == 1


def test_overfits_as_recorded():
    """Ten losses of one batch, with each optimizer."""
    for optim, want in OVERFIT.items():
        found = overfit(retnet, heads=2, optim=optim)
        assert all(abs(a - b) < 2e-3 for a, b in zip(found, want, strict=True)), (optim, found)


OVERFIT = {
    "adamw": [4.7996, 4.6701, 4.4386, 4.1355, 3.8570, 3.5976, 3.3591, 3.1416, 2.9403, 2.7535],
    "muon": [4.7996, 4.7227, 4.5729, 4.3593, 4.1608, 3.9781, 3.8106, 3.6571, 3.5163, 3.3881],
}


def test_dropout_and_checkpointing():
    """Activation checkpointing recomputes with the same dropout: equal loss and gradients."""
    x, y, found = tokens(), tokens().roll(-1, 1), []
    for ckpt in (False, True):
        torch.manual_seed(0)
        model = Model(Config(**TINY, dropout=0.2, ckpt=ckpt))
        torch.manual_seed(1)
        found.append(grads(model, x, y))
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values()))


def test_bf16():
    """Autocast: decays, sums and the state stay fp32, so that loss and gradients are near fp32's; the forms too."""
    torch.manual_seed(0)
    model, x, y = Model(Config(**TINY)), tokens(T=150), tokens(T=150).roll(-1, 1)
    want, loss = grads(model, x, y), model(x, y)
    for form in FORMS:
        for layer in model.layers:
            layer.retention.form = form
        with torch.autocast("cpu", torch.bfloat16):
            assert abs(model(x, y).item() - loss.item()) < 1e-2
            got = grads(model, x, y)
        assert all(error(got[k], want[k]) < 5e-2 for k in want), form


def test_memory_is_linear_in_time():
    """Twice the tokens, at most 2.1 times what a step holds beside the weights; the parallel form holds T x T."""
    def held(form, T):
        model, x = Model(Config(layers=2, heads=2, dim=32, vocab=50, form=form)), tokens(B=1, T=T)
        with Tracker() as tracker:
            model(x, x).backward()
        return tracker.peak - 2 * sum(p.nbytes for p in model.parameters())

    assert held("chunkwise", 2048) < 2.1 * held("chunkwise", 1024)
    assert held("parallel", 1024) > 3 * held("parallel", 512)


def test_alone_gives_the_same():
    """The file's definitions and the operations in kernels/ agree, also across chunks, with and without a state."""
    alone = house.alone("retnet.py")
    model, x, y = randomised(Model(Config(**TINY)), 0.2), tokens(T=150), tokens(T=150).roll(-1, 1)
    other = alone.Model(alone.Config(**TINY))
    other.load_state_dict(model.state_dict())
    want = grads(model, x, y)
    for k, g in grads(other, x, y).items():
        assert error(g, want[k]) < 1e-5, k
    for n in (140, 1, 9):
        results = [m.step(x[:, :n], m.init_state(3)) for m in (model, other)]
        results = [m.step(x[:, n : n + 2], s)[0] for m, (_, s) in zip((model, other), results)]
        assert error(*results) < 1e-5


# ---------------------------------------------------------------- checkpoints and the command line
def test_saves_and_reads(tmp_path):
    """The same logits from model.safetensors, from torchscale's state dict as a .bin, and with a tied head."""
    for tied in (False, True):
        model, folder = randomised(Model(Config(**TINY, tied=tied, act="gelu", scale=False))), tmp_path / str(tied)
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["decoder_value_embed_dim"] == 36 and config["share_decoder_input_output_embed"] == tied
        again = Model.from_pretrained(folder)
        assert (torch.equal(again(tokens()), model(tokens()))
                and len(list(again.parameters())) == len(list(model.parameters())))
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        assert torch.equal(Model.from_pretrained(folder)(tokens()), model(tokens()))


def test_strict(tmp_path, capsys):
    """A missing, an unknown, a misshapen tensor, another model, an option that this file has not: named and refused."""
    Model(Config(**TINY)).save_pretrained(tmp_path)
    good, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    cases = [
        ({k: v for k, v in good.items() if k != "layer_norm.weight"}, config, "no tensor layer_norm.weight"),
        (good | {"layers.0.extra": torch.ones(1)}, config, "unknown tensor layers.0.extra"),
        (good | {"layer_norm.weight": torch.ones(23)}, config, "layer_norm.weight is (23,), but (24,)"),
        (good, config | {"deepnorm": True}, "deepnorm = True in config.json; this file has False"),
        (good, config | {"activation_fn": "relu"}, "--act relu: one of swish, gelu"),
        (good, {"hidden_size": 3}, "no RetNet of torchscale"),
    ]
    for tensors, c, said in cases:
        folder_of(tmp_path, c, tensors)
        with pytest.raises(SystemExit) as e:
            Model.from_pretrained(tmp_path)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, err


def test_bad_inputs(text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, said in (
        ("--form spiral", "--form spiral: one of chunkwise, parallel, recurrent"),
        ("--act relu", "--act relu: one of swish, gelu"),
        ("--dim 30 --heads 4", "--heads 4: --dim 30 must be divisible by it"),
        ("--dim 32 --heads 4 --value-dim 30", "--heads 4: --value-dim 30 must be divisible by it"),
        ("--dim 12 --heads 4", "--heads 4: --dim 12 / 4 must be even"),
        ("--preset 13B", "--preset 13B: one of cpu, gpu, 1.3B, 2.7B, 6.7B"),
    ):
        with pytest.raises(SystemExit) as e:
            retnet.main([*flags.split(), "--data", text])
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.startswith("retnet.py: ") and err.count("\n") == 1, err


def test_form_is_a_flag(text, tmp_path, capsys):
    """The same run in each form; then another form goes on with it, and it speaks."""
    args = ("--layers 1 --heads 2 --dim 16 --seq 16 --batch 2 --steps 4 --dtype fp32 --eval-iters 1 --tokens 3 "
            f"--data {text}").split()
    found = [retnet.main([*args, "--form", form, "--out", str(tmp_path / form)]) for form in FORMS]
    assert max(found) - min(found) < 1e-4
    retnet.main(["--resume", "--form", "parallel", "--steps", "6", "--out", str(tmp_path / "recurrent")])
    capsys.readouterr()
    retnet.main(["--sample", "3 times", "--tokens", "4", "--out", str(tmp_path / "recurrent")])
    said = capsys.readouterr()
    assert said.out.startswith("3 times") and f"{2 * 8 * 13 * 4:,} bytes of state" in said.err, "heads, K, V in fp32"
