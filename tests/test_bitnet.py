"""bitnet.py against transformers' BitNet (master, packed, full-precision weights), against itself, and as a program."""

import json
import os
import re

import house
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from house import error, finish, overfit, randomised, start, tokens
from safetensors.torch import load_file, save_file

import bitnet
from bitnet import Config, Model

TINY = dict(layers=2, heads=4, kv_heads=2, dim=16, ffn_dim=24, seq=64, vocab=50)
RUN = ["--layers", "2", "--heads", "2", "--dim", "32", "--seq", "32", "--batch", "4", "--eval-iters", "2",
       "--tokens", "40", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def eager():
    """transformers compiles its quantisers, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def oracle(online=True):
    from transformers import BitNetConfig, BitNetForCausalLM
    from transformers.integrations.bitnet import AutoBitLinear

    c = BitNetConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=50, max_position_embeddings=64, bos_token_id=1,
                     eos_token_id=None, tie_word_embeddings=True)  # fmt: skip
    model = BitNetForCausalLM(c)
    for module in list(model.model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and online:
                setattr(module, name,
                        AutoBitLinear(child.in_features, child.out_features, bias=False, online_quant=True))
    return randomised(model).eval()


def theirs(folder):
    """transformers' own way from a folder to a model; it asks for accelerate."""
    from transformers import BitNetForCausalLM

    return BitNetForCausalLM.from_pretrained(folder).eval()


# ---------------------------------------------------------------- the model
@pytest.mark.parametrize("bits", [2, 16])
def test_equals_transformers(bits):
    """Logits, loss and every gradient, ternary and in full precision; fp32, relative error."""
    other = oracle(bits == 2)
    ours = Model(Config(**TINY, bits=bits))
    ours.load_state_dict({k: v for k, v in other.state_dict().items() if k != "lm_head.weight"})
    x, y = tokens(), tokens().roll(-1, 1)
    assert error(ours(x), other(x).logits) < 1e-5
    y[0, :5] = -1
    loss = ours(x, y)
    want = F.cross_entropy(other(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    assert abs(loss.item() - want.item()) < 1e-5
    loss.backward()
    want.backward()
    grads = {k: p.grad for k, p in other.named_parameters()}
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert error(p.grad, grads[name]) < 1e-4, name


def test_quantised_values_equal_transformers():
    from transformers.integrations.bitnet import ActQuant, WeightQuant, pack_weights

    w, x = torch.randn(24, 16), torch.randn(40, 16)
    wq, s = bitnet.quantize_weight(w)
    assert torch.equal(wq, (WeightQuant.apply(w) / s).round().to(torch.int8))
    assert torch.equal(bitnet.pack(wq), pack_weights(wq.clone().float()))
    from kernels.bitlinear import quantize_ref, quantize_torch

    h = F.rms_norm(x, (16,), eps=1e-5)  # a vector of ones as weight
    for q, a_inv in (quantize_ref(x, torch.ones(16)), quantize_torch(x, torch.ones(16), 1e-5)[:2]):
        assert torch.equal(q.float(), (ActQuant.apply(h) / a_inv).round())


def test_saves_what_transformers_loads(tmp_path):
    """Master weights, packed ones, the twin: equal logits after transformers' from_pretrained; what we load back."""
    x = tokens()
    for bits in (2, 16):
        ours = randomised(Model(Config(**TINY, bits=bits))).eval()
        want = ours(x)
        ours.save_pretrained(tmp_path)
        assert error(theirs(tmp_path)(x).logits, want) < 1e-5
        again = Model.from_pretrained(tmp_path)
        assert again.cfg.bits == bits and torch.equal(again(x), want)
        if bits == 2:
            ours.pack().save_pretrained(tmp_path / "packed")
            other = theirs(tmp_path / "packed")
            layer = other.model.layers[0].mlp.up_proj
            assert not layer.online_quant and sorted(layer.weight.unique().tolist()) == [-1, 0, 1]
            assert error(other(x).logits, want) < 1e-5
            packed = Model.from_pretrained(tmp_path / "packed")
            logits, _ = packed.step(x, packed.init_state(3))
            assert error(logits, want[:, -1]) < 1e-5


def test_reads_the_hub_forms(tmp_path):
    """The published file: all but the bytes in bf16, the scale too; transformers' other class of layer stores 1 / s."""
    ours = randomised(Model(Config(**TINY))).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(p.bfloat16())
    want, x = ours(tokens()), tokens()
    ours.pack().save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    plain = load_file(file)
    names = [k for k in plain if k.endswith(".weight_scale")]
    assert len(names) == 14 and all(plain[k.removesuffix("_scale")].dtype == torch.uint8 for k in names)
    assert plain["model.layers.0.mlp.gate_proj.weight"].shape == (6, 16)
    save_file({k: v if v.dtype == torch.uint8 else v.bfloat16() for k, v in plain.items()}, file)
    model = Model.from_pretrained(tmp_path)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert error(model.step(x, model.init_state(3))[0], want[:, -1]) < 5e-2  # a scale in bf16 is 0.4% off
    config["quantization_config"]["linear_class"] = "bitlinear"
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(plain | {k: 1 / plain[k] for k in names}, file)
    model = Model.from_pretrained(tmp_path)
    assert error(model.step(x, model.init_state(3))[0], want[:, -1]) < 1e-4


def test_strict(tmp_path, capsys):
    """A missing, unknown or misshapen tensor, another architecture, packed weights for full ones: named and refused."""
    Model(Config(**TINY)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good, config = load_file(file), json.loads((tmp_path / "config.json").read_text())
    packed = {k: v for k, v in Model(Config(**TINY)).pack().state_dict().items()}
    name = "model.layers.1.mlp.down_proj.weight"
    cases = [
        ({k: v for k, v in good.items() if k != "model.norm.weight"}, config, {}, "no tensor model.norm.weight"),
        (good | {"model.extra": torch.ones(1)}, config, {}, "unknown tensor model.extra"),
        (good | {name: torch.ones(4, 24)}, config, {}, f"{name} is (4, 24), but (16, 24)"),
        (packed | {name: torch.ones(16, 24, dtype=torch.uint8)}, config, {}, f"{name} is (16, 24), but (4, 24)"),
        ({k: v for k, v in packed.items() if k != f"{name}_scale"}, config, {}, f"no tensor {name}_scale"),
        (packed, config, dict(bits=16), "--bits 16: the weights in"),
        (good, config | {"hidden_act": "silu"}, {}, "hidden_act = 'silu'"),
        (good, config | {"tie_word_embeddings": False}, {}, "tie_word_embeddings = False"),
        (good, config | {"model_type": "llama"}, {}, "model_type is 'llama'"),
        (good, {"model_type": "bitnet"}, {}, "has no 'num_hidden_layers'"),
    ]
    for tensors, c, flags, said in cases:
        save_file(tensors, file)
        (tmp_path / "config.json").write_text(json.dumps(c))
        with pytest.raises(SystemExit) as e:
            Model.from_pretrained(tmp_path, **flags)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, err


@pytest.mark.parametrize("bits", [2, 16])
def test_step_equals_forward(bits):
    """Prefill of any length, then one token at a time, then several, past the cache's 64 places: one forward's logits.
    Of the ternary model nine in ten agree to rounding; else an activation tips, 1/127 of its token's largest."""
    model = randomised(Model(Config(**TINY | dict(seq=80), bits=bits))).eval()
    x = tokens(T=80)
    with torch.no_grad():
        whole = model(x)
        for cuts in ([1] * 80, [5, 1, 1, 70, 3], [80]):
            state, at, errors = model.init_state(3), 0, []
            for n in cuts:
                logits, state = model.step(x[:, at : at + n], state)
                at += n
                errors += [error(a, b) for a, b in zip(logits, whole[:, at - 1])]
            errors.sort()
            assert errors[len(errors) * 9 // 10 - 1] < 1e-5 and errors[-1] < (1e-2 if bits == 2 else 1e-5), errors
        with pytest.raises(ValueError, match="81 tokens do not fit the 80"):
            model.step(x[:, :1], state)


def test_greedy_equals_transformers(tmp_path):
    """Packed weights here, master weights there: the same tokens."""
    other = oracle()
    model = Model(Config(**TINY))
    model.load_state_dict({k: v for k, v in other.state_dict().items() if k != "lm_head.weight"})
    x = tokens(B=1, T=4)
    want = other.generate(x, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    cfg = Config(temp=0, tokens=50)
    assert ([i for i, _ in bitnet.generate(model, x, cfg)] == want
            == [i for i, _ in bitnet.generate(model.pack(), x, cfg)])


def test_official_sizes():
    """2B4T has 2,412,820,480 parameters, 521 MB of packed weights; a 3B's are under 1 GB packed, an eighth of bf16."""
    with torch.device("meta"):
        model = Model(Config(**bitnet.PRESETS["2B"]))
        assert sum(p.numel() for p in model.parameters()) == 2_412_820_480
        ternary = [f.weight.numel() for f in model.bit_linears().values()]
        assert sum(ternary) == 2_084_044_800 and len(ternary) == 210
        held = sum(t.nbytes for f in model.pack().bit_linears().values() for t in f.packed())
        assert 520e6 < held < 522e6 and held * 7.99 < 2 * sum(ternary)
        assert sum(f.weight.numel()
                   for f in Model(Config(**bitnet.PRESETS["3B"] | dict(vocab=32000))).bit_linears().values()) / 4 < 1e9


def test_two_stages():
    """--lr falls toward 0 in a line, drops to lr2 of it half way; --wd ends there."""
    cfg = Config(steps=100, warmup=10, lr2=0.6)
    assert bitnet.schedule(0, cfg) == (1 / 11, 1.0) and bitnet.schedule(20, cfg) == (0.8, 1.0)
    assert bitnet.schedule(49, cfg) == (0.51, 1.0) and bitnet.schedule(50, cfg) == (0.3, 0.0)
    assert bitnet.schedule(99, cfg) == (pytest.approx(0.006), 0.0)


def test_recorded_losses():
    """Ten steps on one batch, seed 0; a change in initialisation, maths or optimizer shows here. In fp64: in fp32 the
    last bit of a sum, which differs between CPUs, tips a rounding to another integer within a few steps."""
    torch.set_default_dtype(torch.float64)
    try:
        found = overfit(bitnet, heads=2)
    finally:
        torch.set_default_dtype(torch.float32)
    want = [4.171690, 4.142799, 4.113258, 4.069625, 4.019146, 3.969865, 3.920440, 3.871804, 3.839071, 3.796035]
    assert found == pytest.approx(want, abs=1e-5), found


def test_masters_drift_while_few_ternary_weights_change():
    torch.manual_seed(0)
    cfg = Config(**TINY, lr=1e-3, steps=10)
    model = Model(cfg)
    (optimizer,) = bitnet.make_optimizers(model, cfg)
    weights = {k: f.weight.detach().clone() for k, f in model.bit_linears().items()}
    before = {k: bitnet.quantize_weight(w)[0] for k, w in weights.items()}
    for _ in range(3):
        model(tokens(), tokens().roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = [(bitnet.quantize_weight(f.weight)[0] != before[k]).float().mean()
               for k, f in model.bit_linears().items()]
    assert all((f.weight != weights[k]).all() for k, f in model.bit_linears().items())
    assert 0 < torch.stack(changed).mean() < 0.1


def test_inference_follows_the_weights():
    """A state begun after a training step has that step's weights."""
    model = randomised(Model(Config(**TINY))).eval()
    x = tokens()
    first, _ = model.step(x, model.init_state(3))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    second, _ = model.step(x, model.init_state(3))
    assert error(second, model(x)[:, -1]) < 1e-3 < error(second, first)


def test_checkpointing_changes_nothing():
    x, y = tokens(), tokens().roll(-1, 1)
    found = []
    for ckpt in (False, True):
        torch.manual_seed(0)
        model = Model(Config(**TINY, ckpt=ckpt))
        loss = model(x, y)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_alone_gives_the_same_losses():
    """The definitions in the file and the operations in kernels/ are the same maths; packed weights too."""
    alone = house.alone("bitnet.py")
    model = randomised(Model(Config(**TINY)), 0.1)
    other = alone.Model(alone.Config(**TINY))
    other.load_state_dict(model.state_dict())
    x, y = tokens(), tokens().roll(-1, 1)
    a, b = model(x, y), other(x, y)
    a.backward()
    b.backward()
    assert abs(a.item() - b.item()) < 1e-5
    for (k, p), q in zip(model.named_parameters(), other.parameters()):
        assert error(q.grad, p.grad) < 1e-4, k
    with torch.no_grad():
        assert error(other.step(x, other.init_state(3))[0], model.step(x, model.init_state(3))[0]) < 1e-4
        assert torch.equal(other.pack().state_dict()["model.layers.0.mlp.up_proj.weight"],
                           model.pack().state_dict()["model.layers.0.mlp.up_proj.weight"])


# ---------------------------------------------------------------- the program
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bitnet")
    text = folder / "text.txt"
    text.write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(60) for b in range(20)))
    finish(start([*RUN, "--data", str(text), "--lr", "5e-3", "--steps", "30", "--out", str(folder / "o")], "bitnet.py"))
    return folder


def call(capsys, *args):
    bitnet.main([*args])
    return capsys.readouterr()


def test_pack_and_sample(run, capsys):
    """--pack writes an eighth of bf16; from it the same tokens come as from the master weights; the bytes are told."""
    out, packed = str(run / "o"), str(run / "o" / "packed")
    want = call(capsys, "--sample", "3 times", "--out", out, "--temp", "0", "--tokens", "40")
    said = call(capsys, "--pack", "--out", out)
    assert float(re.search(r"1/([\d.]+) of bf16", said.out)[1]) > 7 and "model.safetensors: " in said.out
    got = call(capsys, "--sample", "3 times", "--init", packed, "--temp", "0", "--tokens", "40")
    assert got.out == want.out and got.out.startswith("3 times") and "ternary weights: " in got.err
    tensors = load_file(f"{packed}/model.safetensors")
    held = sum(v.nbytes for k, v in tensors.items() if v.dtype == torch.uint8 or k.endswith("_scale"))
    assert (f"{held:,} bytes" in said.out
            and held < sum(2 * 4 * v.numel() for v in tensors.values() if v.dtype == torch.uint8) / 7)
    with pytest.raises(SystemExit):
        bitnet.main(["--pack", "--init", packed, "--out", str(run / "p")])
    assert "are packed already" in capsys.readouterr().err


def test_packed_weights_do_not_train(run, capsys):
    with pytest.raises(SystemExit) as e:
        bitnet.main(["--init", str(run / "o" / "packed"), "--data", str(run / "text.txt"), "--out", str(run / "q")])
    assert e.value.code == 2 and "packed" in capsys.readouterr().err


def test_bad_inputs(tmp_path, run, capsys):
    d = ["--data", str(run / "text.txt"), "--out", str(tmp_path / "o")]
    cases = [
        (["--bits", "8", *d], "--bits 8: 2 (ternary weights) or 16"),
        (["--dim", "30", "--heads", "4", *d], "--heads 4: --dim 30 must be divisible by twice that"),
        (["--heads", "4", "--kv-heads", "3", "--dim", "32", *d], "--kv-heads 3: --heads 4 must be divisible by it"),
        (["--heads", "3", "--kv-heads", "1", "--dim", "18", *d], "--dim 18: 18 rows of a matrix; four share a byte"),
        (["--ffn-dim", "0.5", *d], "--ffn-dim: invalid int value"),
        (["--pack", "--out", str(tmp_path / "none")], "--pack: no run in"),
    ]
    for args, said in cases:
        with pytest.raises(SystemExit) as e:
            bitnet.main(args)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.startswith("bitnet.py: ") and err.count("\n") == 1, (args, err)
    assert not os.path.exists(tmp_path / "o" / "model.safetensors")


def test_twin_does_not_pack(tmp_path, capsys):
    Model(Config(**TINY, bits=16)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        bitnet.main(["--pack", "--init", str(tmp_path), "--out", str(tmp_path / "o")])
    assert "--pack: a model of --bits 16 has no ternary weights" in capsys.readouterr().err
