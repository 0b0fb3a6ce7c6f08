"""moe.py against transformers' Mixtral and Llama, against Grok-1 written out, against itself, and as a program. What
every language model file does as a program is in test_house.py."""

import json
import math
from pathlib import Path

import house
import pytest
import torch
import torch.nn.functional as F
from house import error, overfit, randomised, tokens
from safetensors.torch import load_file, save_file

import moe
from moe import Config, Model

TINY = dict(layers=2, heads=4, kv_heads=2, dim=16, ffn_dim=24, experts=4, vocab=50, seq=32)
GROK = dict(renorm=False, act="gelu", softcap=1.5, sandwich=True, embed_mult=4.0, logit_mult=0.577, theta=1e4,
            tied=True)


def oracle(folder=None, std=0.3):
    from transformers import MixtralConfig, MixtralForCausalLM

    if folder:
        return MixtralForCausalLM.from_pretrained(folder).eval()
    c = MixtralConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, num_local_experts=4, max_position_embeddings=32,
                      router_aux_loss_coef=0.02, bos_token_id=None, eos_token_id=None)  # fmt: skip
    return randomised(MixtralForCausalLM(c), std).eval()


def llama(folder, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    c = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
                    bos_token_id=None, eos_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(c).eval()
    model.save_pretrained(folder)
    (Path(folder) / "tok.json").write_text(json.dumps(dict(tok="char", chars="".join(chr(48 + i) for i in range(50)))))
    return model


# ---------------------------------------------------------------- Mixtral
@pytest.mark.parametrize("layout", ["saved", "fused"])
def test_equals_transformers(tmp_path, layout):
    """Logits, loss with the balancing loss, every gradient; for the folder that transformers saves, expert by expert,
    and for one with the fused tensors that it holds in memory. fp32, relative error."""
    theirs = oracle()
    theirs.save_pretrained(tmp_path)
    if layout == "fused":
        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    else:
        assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in load_file(tmp_path / "model.safetensors")
    ours = Model.from_pretrained(tmp_path, aux=0.02, z=0.0)
    x, y = tokens(), tokens().roll(-1, 1)
    assert error(ours(x), theirs(x).logits) < 1e-5
    y[0, :5] = -1
    loss = ours(x, y)
    out = theirs(x, output_router_logits=True)
    want = F.cross_entropy(out.logits.flatten(0, 1), y.flatten(), ignore_index=-1) + 0.02 * out.aux_loss
    assert abs(loss.item() - want.item()) < 1e-5 and abs(out.aux_loss.item() - ours.log[3].item()) < 1e-5
    ours.eval()
    assert abs(ours(x, y).item() - (want - 0.02 * out.aux_loss).item()) < 1e-5, "an evaluation has no router losses"
    loss.backward()
    want.backward()
    grads = {k: p.grad for k, p in theirs.named_parameters()}
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert error(p.grad, grads[name]) < 1e-4, name


def test_saves_what_transformers_loads(tmp_path):
    ours = randomised(Model(Config(**TINY))).eval()
    ours.save_pretrained(tmp_path)
    assert error(oracle(tmp_path)(tokens()).logits, ours(tokens())) < 1e-5
    again = Model.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[k], v) for k, v in ours.state_dict().items())


def test_greedy_equals_transformers(tmp_path):
    theirs = oracle(std=0.5)
    theirs.save_pretrained(tmp_path)
    x = tokens(B=1, T=4)
    want = theirs.generate(x, max_new_tokens=28, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    assert [i for i, _ in moe.generate(Model.from_pretrained(tmp_path), x, Config(temp=0, tokens=28))] == want


def test_strict(tmp_path, capsys):
    """A missing, an unknown, a misshapen tensor, half an expert, another architecture: named and refused."""
    Model(Config(**TINY)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good, config = load_file(file), json.loads((tmp_path / "config.json").read_text())
    w2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    cases = [
        ({k: v for k, v in good.items() if k != "model.norm.weight"}, config, "no tensor model.norm.weight"),
        (good | {"model.extra": torch.ones(1)}, config, "unknown tensor model.extra"),
        (good | {"lm_head.weight": torch.ones(49, 16)}, config, "lm_head.weight is (49, 16), but (50, 16)"),
        ({k: v for k, v in good.items() if k != w2}, config, "the experts of layer 1 are incomplete"),
        (good, config | dict(hidden_act="relu"), "hidden_act = 'relu'"),
        (good, config | dict(model_type="gpt2"), "model_type 'gpt2'"),
        (good, config | dict(rope_parameters=dict(rope_type="yarn")), "rope_type = 'yarn'"),
        (good, {"model_type": "mixtral"}, "config.json has no"),
    ]
    for tensors, c, said in cases:
        save_file(tensors, file)
        (tmp_path / "config.json").write_text(json.dumps(c))
        with pytest.raises(SystemExit) as e:
            Model.from_pretrained(tmp_path)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, err


# ---------------------------------------------------------------- Grok-1
def grok_ref(w, x, H=4, Hk=2, K=2, mult=4.0, out=0.577, cap=1.5, eps=1e-5):
    """Grok-1 as xAI's model.py computes it, token by token, by its Hugging Face port's names of tensors. x (B, T)."""

    def rms(x, scale):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale

    def rope(x):  # (B, T, heads, D)
        half = x.shape[3] // 2
        angle = torch.arange(x.shape[1])[:, None] / 1e4 ** (torch.arange(half) / half)  # (T, D / 2)
        cos, sin = (f(torch.cat([angle, angle], 1))[:, None] for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    h = w["model.embed_tokens.weight"][x] * mult
    (B, T), C = x.shape, h.shape[2]
    for i in range(2):
        g = {k.removeprefix(f"model.layers.{i}."): v for k, v in w.items() if k.startswith(f"model.layers.{i}.")}
        n = rms(h, g["pre_attn_norm.scale"])
        q, k, v = ((n @ g[f"attn.{p}_proj.weight"].t()).view(B, T, -1, C // H) for p in "qkv")
        q, k = rope(q), rope(k)
        a = torch.zeros(B, T, H, C // H)
        for head in range(H):
            s = cap * torch.tanh(
                torch.einsum("btd,bsd->bts", q[:, :, head], k[:, :, head // (H // Hk)]) * (C // H) ** -0.5 / cap)
            s = torch.where(torch.ones(T, T).tril().bool(), s, -1e30)
            a[:, :, head] = s.softmax(-1) @ v[:, :, head // (H // Hk)]
        h = h + rms(a.reshape(B, T, C) @ g["attn.o_proj.weight"].t(), g["post_attn_norm.scale"])
        n, m = rms(h, g["pre_moe_norm.scale"]), torch.zeros_like(h)
        for b in range(B):
            for t in range(T):
                p = (g["moe_block.gate.weight"] @ n[b, t]).softmax(0)
                for e in p.argsort(descending=True)[:K].tolist():
                    u, v, d = (g[f"moe_block.experts.{e}.{name}.weight"] for name in ("linear", "linear_v", "linear_1"))
                    m[b, t] += p[e] * (d @ (F.gelu(u @ n[b, t], approximate="tanh") * (v @ n[b, t])))
        h = h + rms(m, g["post_moe_norm.scale"])
    return rms(h, w["model.norm.scale"]) @ w["model.embed_tokens.weight"].t() * out


def test_equals_grok(tmp_path):
    """A folder as the Hugging Face port has it: loaded, saved with the same names; also with another port's names."""
    ours = randomised(Model(Config(**TINY | GROK))).eval()
    ours.save_pretrained(tmp_path)
    saved, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "grok-1" and len(saved) == 2 * (8 + 1 + 3 * 4) + 2
    x = tokens(T=9)
    assert error(ours(x), grok_ref(saved, x)) < 1e-5
    for k in ("norm_topk_prob", "sandwich_norm", "hidden_act"):  # xAI's numbers where config.json is silent
        del config[k]
    config["num_experts"] = config.pop("num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert error(Model.from_pretrained(tmp_path)(x), ours(x)) < 1e-6
    other = [(".attn.", ".self_attn."), (".moe_block.", ".block_sparse_moe."), (".linear.", ".w1."),
             (".linear_v.", ".w3."), (".linear_1.", ".w2."), (".scale", ".weight")]
    for a, b in other:
        saved = {k.replace(a, b): v for k, v in saved.items()}
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):  # its post_attn_norm.weight and model.norm.weight are ours too: nothing is left
        save_file(saved | {"model.layers.0.post_mlp_norm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
        Model.from_pretrained(tmp_path)
    save_file(saved, tmp_path / "model.safetensors")
    assert error(Model.from_pretrained(tmp_path)(x), ours(x)) < 1e-6


def test_equals_xai(tmp_path):
    """The logits of xAI's own model.py, recorded by grok1.py, to the five places that it kept."""
    import grok1

    config = dict(model_type="grok-1", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  hidden_size=32, intermediate_size=48, num_experts=8, num_experts_per_tok=2, vocab_size=29,
                  max_position_embeddings=32, rms_norm_eps=1e-5, max_attn_value=30.0,
                  embedding_multiplier_scale=32**0.5, output_multiplier_scale=0.5773502691896257)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({k: torch.from_numpy(v) for k, v in grok1.weights().items()}, tmp_path / "model.safetensors")
    logits = Model.from_pretrained(tmp_path)(torch.from_numpy(grok1.tokens()))
    assert (logits - torch.tensor(json.loads(grok1.FILE.read_text())["logits"])).abs().max() < 2e-5


def test_official_sizes():
    C, F, V = 6144, 32768, 131072  # Grok-1's 770 tensors
    grok = 64 * (2 * C * C + 2 * C * 1024 + 4 * C + 8 * C + 8 * 3 * C * F) + V * C + C
    with torch.device("meta"):
        for name, n in {"8x7B": 46_702_792_704, "grok-1": grok}.items():
            model = Model(Config(**moe.PRESETS[name]))
            assert sum(p.numel() for p in model.parameters()) == n, name


# ---------------------------------------------------------------- the mixture
def test_mixture():
    """Equal experts are a dense MLP; experts may swap places, router rows too; K = E is a softmax mixture of all."""
    x = tokens()
    model = randomised(Model(Config(**TINY))).eval()
    want = model(x)
    turn = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for block in model.model.layers:
            for p in block.mlp.parameters():
                p.copy_(p[turn])
    assert error(model(x), want) < 1e-6
    layer = model.model.layers[0].mlp
    h = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3))
    dense = lambda w13, w2: (F.silu(h @ w13[:24].t()) * (h @ w13[24:].t())) @ w2.t()
    with torch.no_grad():
        w13, w2 = layer.experts.gate_up_proj, layer.experts.down_proj
        layer.gate.K = 4
        p = (h @ layer.gate.weight.t()).softmax(-1)
        assert error(layer(h, None)[0], sum(p[..., e, None] * dense(w13[e], w2[e]) for e in range(4))) < 1e-5
        layer.gate.K = 2
        w13[1:], w2[1:] = w13[0], w2[0]
        assert error(layer(h, None)[0], dense(w13[0], w2[0])) < 1e-6


def test_balance():
    """The balancing loss is K when all p are equal, whatever ties choose, and E when one expert has everything."""
    model = Model(Config(**TINY, top_k_experts=1))
    x, gates = tokens(), [b.mlp.gate.weight for b in model.model.layers]
    with torch.no_grad():
        for w in gates:
            w.zero_()
        model(x, x)
        assert abs(model.log[3] - 1) < 1e-6 and abs(model.log[1] - math.log(4)) < 1e-5
        for block, w in zip(model.model.layers, gates):
            block.post_attention_layernorm.weight.abs_()
            w[2] = 0
        model.model.embed_tokens.weight.abs_()  # all rows alike: one direction wins
        model.model.embed_tokens.weight[:] = model.model.embed_tokens.weight[0]
        for block, w in zip(model.model.layers, gates):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.experts.down_proj.zero_()
            w[2] = 100 * model.model.embed_tokens.weight[0] / model.model.embed_tokens.weight[0].norm()
        model(x, x)
    assert (abs(model.log[3] - 4) < 1e-4 and "load 0.0% to 100.0%" in model.report()
            and "balance 4.000" in model.report())


def test_capacity():
    """First choices come first, in the order of the tokens; the rest is dropped and counted; none in evaluation."""
    gate = Model(Config(**TINY, capacity=0.5)).model.layers[0].mlp.gate
    h = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    gate.weight.data[0] += 0.3 * h.mean(0) + 0.5
    chosen, weights, (load, *_, dropped) = gate(h, None)
    taken, want = [0] * 4, torch.zeros(40, 2)
    for k in range(2):
        for n, e in enumerate(chosen[:, k].tolist()):
            taken[e] += 1
            want[n, k] = taken[e] <= math.ceil(0.5 * 80 / 4)
    assert torch.equal(weights > 0, want > 0) and dropped == (want == 0).sum() > 0 and load.tolist() == taken
    gate.eval()
    assert (gate(h, None)[1].sum(1) - 1).abs().max() < 1e-6


def test_bias_balances(tmp_path):
    """Without a balancing loss the bias alone evens the loads out; it is saved; with --ckpt gradients are the same."""
    torch.manual_seed(0)
    model = Model(Config(**TINY, bias_rate=0.04, aux=0.0, z=0.0))
    x, found = tokens(B=4, T=32), []
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight *= 20
            block.mlp.gate.e_score_correction_bias[1] = 0.5  # a start from which all choose expert 1
        for _ in range(25):
            model(x, x)
            found.append(model.log[0].max().item())
    assert found[0] > 0.45 and found[-1] < 0.33, found  # a step of 0.04 ripples
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    bias = again.model.layers[1].mlp.gate.e_score_correction_bias
    assert again.cfg.bias_rate == 0.04 and bias.abs().max() > 0 and error(again.eval()(x), model.eval()(x)) < 1e-6
    before = bias.clone()
    moe.bf16_pays(torch.device("cpu"), again.train(), (x, x))  # --dtype auto tries steps, which must leave no trace
    assert torch.equal(bias, before)
    grads = []
    for ckpt in (False, True):
        m = Model.from_pretrained(tmp_path, ckpt=ckpt, bias_rate=0.5)
        m(x, x).backward()
        grads.append([p.grad for p in m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("more", [{}, GROK], ids=["mixtral", "grok"])
def test_step_equals_forward(more):
    """Prefill of any length, then token by token, then several: one forward's logits; the cache grows on the way."""
    model = randomised(Model(Config(**TINY | more | dict(positions=80, seq=80)))).eval()
    x = tokens(T=80)
    whole = model(x)
    for cuts in ([5, 1, 1, 60, 13], [80]):
        state, at = model.init_state(3), 0
        for n in cuts:
            logits, state = model.step(x[:, at : at + n], state)
            at += n
            assert error(logits, whole[:, at - 1]) < 1e-5
    with pytest.raises(ValueError, match="81 tokens do not fit the 80"):
        model.step(x[:, :1], state)


def test_checkpointing_and_groups():
    x, y, found = tokens(), tokens().roll(-1, 1), []
    for ckpt in (False, True):
        torch.manual_seed(0)
        model = Model(Config(**TINY, ckpt=ckpt))
        loss = model(x, y)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    inner, outer, rest = model.param_groups(0.1)
    assert (inner["matrix"] and len(inner["params"]) == 2 * 6
            and len(outer["params"]) == 2 + 2 and len(rest["params"]) == 2 * 2 + 1)


def test_alone_gives_the_same_losses():
    """The definitions in the file and the operations in kernels/ are the same maths."""
    alone = house.alone("moe.py")
    for more in ({}, GROK):
        model = randomised(Model(Config(**TINY | more)), 0.2)
        other = alone.Model(alone.Config(**TINY | more))
        other.load_state_dict(model.state_dict())
        x, y = tokens(), tokens().roll(-1, 1)
        a, b = model(x, y), other(x, y)
        a.backward()
        b.backward()
        assert abs(a.item() - b.item()) < 1e-5
        for (k, p), q in zip(model.named_parameters(), other.parameters()):
            assert error(q.grad, p.grad) < 1e-4, k


# ---------------------------------------------------------------- from dense models
def test_upcycle(tmp_path):
    """A Llama, and a dense model of this file: the first loss is the dense one's, whatever the router says."""
    dense = llama(tmp_path / "llama")
    model = Model.upcycle(tmp_path / "llama", experts=3, seed=1).eval()
    assert model.cfg.experts == 3 and error(model(tokens()), dense(tokens()).logits) < 1e-5
    gates = [b.mlp.gate.weight for b in model.model.layers]
    assert all(0.01 < g.std() < 0.03 for g in gates) and not torch.equal(gates[0], gates[1])
    mine = randomised(Model(Config(**TINY | dict(experts=1, top_k_experts=1)))).eval()
    mine.save_pretrained(tmp_path / "mine")
    model = Model.upcycle(tmp_path / "mine", experts=4, top_k_experts=3).eval()
    assert model.model.layers[0].mlp.gate.K == 3 and error(model(tokens()), mine(tokens())) < 1e-5


def test_merge(tmp_path):
    """Attention of the first, an expert from each; a router row is the mean of what transformers says enters the layer
    at the last token of a prompt, less the same for the ! prompts, at length 1."""
    names = [str(tmp_path / n) for n in "ab"]
    a, b = (llama(n, seed) for seed, n in enumerate(names))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ABC\nDEFG\n!HI\n\nQRST\n")
    model = Model.merge(names, prompts=str(prompts)).eval()
    assert (model.cfg.experts, model.cfg.top_k_experts) == (2, 2)

    def entering(text):
        ids = torch.tensor([[ord(c) - 48 for c in text]])
        return torch.stack([h[0, -1] for h in a(ids, output_hidden_states=True).hidden_states[:2]])

    want = [(entering("ABC") + entering("DEFG")) / 2 - entering("HI"), entering("QRST")]
    for i, block in enumerate(model.model.layers):
        for e in range(2):
            assert error(block.mlp.gate.weight[e], want[e][i] / want[e][i].norm()) < 1e-5
            mlp = (a, b)[e].model.layers[i].mlp
            assert torch.equal(block.mlp.experts.gate_up_proj[e], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            assert torch.equal(block.mlp.experts.down_proj[e], mlp.down_proj.weight)
        assert torch.equal(block.self_attn.k_proj.weight, a.model.layers[i].self_attn.k_proj.weight)


# ---------------------------------------------------------------- as a program
RUN = ("--layers 2 --heads 2 --dim 16 --ffn-dim 32 --experts 4 --seq 32 --batch 4 --eval-iters 2 --tokens 5 "
       "--eval-every 4 --optim adamw --lr 1e-3 --dtype fp32").split()


def test_from_dense_to_routing(tmp_path, text, capsys):
    """A dense run, upcycled, trained on and resumed, two of them merged, the routing shown."""
    d, run = str(tmp_path), lambda *args: moe.main([*RUN, "--data", text, *args])
    for seed in ("1", "2"):
        run("--experts", "1", "--top-k-experts", "1", "--steps", "8", "--seed", seed, "--out", f"{d}/dense{seed}")
    dense = house.losses(f"{d}/dense1")
    run("--upcycle", f"{d}/dense1", "--steps", "4", "--warmup", "4", "--out", f"{d}/up", "--log-every", "1",
        "--aux", "0", "--z", "0")
    assert abs(float(house.losses(f"{d}/up")[4][1]) - float(dense[8][1])) < 0.1, "it goes on where the dense model was"
    moe.main(["--resume", "--out", f"{d}/up", "--steps", "6"])
    capsys.readouterr()
    Path(d, "p.txt").write_text("3 times\n\n4 is\n")
    run("--merge", f"{d}/dense1", f"{d}/dense2", "--prompts", f"{d}/p.txt", "--steps", "4", "--out", f"{d}/merged")
    out = capsys.readouterr().out
    assert "load " in out and "entropy " in out and "dropped 0.0%" in out and "final val loss" in out
    moe.main(["--show-routing", "3 times 4", "--out", f"{d}/up"])
    out = capsys.readouterr().out
    assert out.count("\nlayer ") == 2 and out.count("\x1b[48;2;") == 4 + 2 * len("3 times 4")
    from PIL import Image

    assert Image.open(f"{d}/up/routing.png").size == (70 + 4 * 60, 24 + 2 * 48)


RECORDED = [4.2007, 4.1423, 4.0402, 3.9199, 3.8138, 3.704, 3.5856, 3.4708, 3.353, 3.2384]


def test_overfits_one_batch():
    """Ten steps on one batch from seed 0: losses as recorded with torch 2.13 on a CPU."""
    found = overfit(moe, heads=2, experts=4, ffn_dim=32)
    assert all(abs(a - b) < 2e-3 for a, b in zip(found, RECORDED, strict=True)), found


def bad_inputs(d, text):
    data = ["--data", text]
    yield ["--heads", "6", "--dim", "20", *data], "--heads 6: --dim 20 must be divisible"
    yield ["--kv-heads", "2", "--heads", "3", "--dim", "24", *data], "--kv-heads 2: --heads 3 must be divisible"
    yield ["--top-k-experts", "9", *data], "--top-k-experts 9: there are --experts 8"
    yield ["--experts", "0", *data], "--experts 0: must be positive"
    yield ["--act", "relu", *data], "--act relu: one of silu, gelu"
    yield ["--capacity=-1", *data], "--capacity -1.0: must be 0 or more"
    yield ["--upcycle", f"{d}/none"], "no such file or folder"
    yield ["--upcycle", f"{d}/moe"], "it has 4 experts already"
    yield ["--merge", f"{d}/a", f"{d}/b"], "--prompts (none): --merge needs a text file"
    yield ["--merge", f"{d}/a", f"{d}/b", "--prompts", f"{d}/mark.txt"], "mark.txt: a line without any text"
    yield ["--merge", f"{d}/a", f"{d}/b", "--prompts", f"{d}/empty.txt"], "0 blocks of lines for the 2 models"
    yield ["--merge", f"{d}/a", f"{d}/b", "--prompts", f"{d}/one.txt"], "1 blocks of lines for the 2 models"
    yield ["--merge", f"{d}/a", f"{d}/wide", "--prompts", f"{d}/one.txt"], (
        "its shapes, or its rotary base, are not those of")
    yield ["--show-routing", "a", "--out", f"{d}/none"], "--show-routing: no run in"
    yield ["--show-routing", "a", "--init", f"{d}/moe"], "--show-routing: the checkpoint has no tokenizer"
    yield ["--show-routing", "ABC", "--init", f"{d}/a", "--out", f"{d}/one.txt/o"], "one.txt/o: Not a directory"
    yield ["--show-routing", "ABC", "--init", f"{d}/a", "--out", f"{d}/shown"], "shown: Is a directory"


def test_bad_inputs(tmp_path, text, capsys, monkeypatch):
    """Each is one line that names the flag or the file and what would be right, exit code 2."""
    monkeypatch.chdir(tmp_path)
    llama("a")
    llama("b")
    Model(Config(**TINY)).save_pretrained("moe")
    Model(Config(**TINY | dict(experts=1, top_k_experts=1, dim=32))).save_pretrained("wide")
    Path("one.txt").write_text("ABC\n")
    Path("mark.txt").write_text("ABC\n!\n\nDEF\n")
    Path("empty.txt").write_text("\n")
    Path("shown/routing.png").mkdir(parents=True)
    capsys.readouterr()
    for args, said in bad_inputs(tmp_path, text):
        with pytest.raises(SystemExit) as e:
            moe.main(args)
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.startswith("moe.py: ") and err.count("\n") == 1, (args, err)
