"""The peers of each file as bench/speed.py runs them: their own model code at the asked size, AdamW, all else as it is.

    PEERS[file] = {name: make}       make(size, folder) -> loss(x, y), optimizer
    SPEAKERS[file] = {name: make}    make(folder of a checkpoint that our file saved) -> speak(x, n) -> n greedy tokens

transformers, diffusers, mambapy, rwkv are packages (pip); the others are checkouts in the folder of --peers: nanoGPT,
minGPT, DiT, torchscale, RWKV-LM (its model code around fla's plain recurrence: its own is for CUDA) with
flash-linear-attention.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

VOCAB = 65


def load(path, name):
    """A module from a file, without its folder on sys.path."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: not there; --peers names the folder of checkouts")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def mean_loss(logits, y):
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


# ---------------------------------------------------------------- gpt2.py
def nanogpt(size, peers):
    """As nanoGPT's train.py does it on a CPU: no dropout, biases off as in its character recipe."""
    m = load(Path(peers) / "nanoGPT" / "model.py", "nanogpt_model")
    c = m.GPTConfig(block_size=size["seq"], vocab_size=VOCAB, n_layer=size["layers"], n_head=size["heads"],
                    n_embd=size["dim"], dropout=0.0, bias=False)
    model = m.GPT(c)
    return lambda x, y: model(x, y)[1], model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")


def mingpt(size, peers):
    sys.path.insert(0, str(Path(peers) / "minGPT"))
    from mingpt.model import GPT
    from mingpt.trainer import Trainer

    c = GPT.get_default_config()
    c.model_type, c.vocab_size, c.block_size = None, VOCAB, size["seq"]
    c.n_layer, c.n_head, c.n_embd = size["layers"], size["heads"], size["dim"]
    c.embd_pdrop = c.resid_pdrop = c.attn_pdrop = 0.0
    model = GPT(c)
    return lambda x, y: model(x, y)[1], model.configure_optimizers(Trainer.get_default_config())


def transformers_gpt2(size, peers):
    from transformers import GPT2Config, GPT2LMHeadModel

    c = GPT2Config(n_layer=size["layers"], n_head=size["heads"], n_embd=size["dim"], n_positions=size["seq"],
                   vocab_size=VOCAB, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
    model = GPT2LMHeadModel(c)
    return lambda x, y: mean_loss(model(x).logits, y), adamw(model)


# ---------------------------------------------------------------- mamba.py
def mambapy(size, peers):
    """Its Mamba-2 is around CUDA kernels, which importing it needs: left out."""
    if "mambapy.mamba2" not in sys.modules:
        sys.modules["mambapy.mamba2"] = types.SimpleNamespace(Mamba2=None, Mamba2Config=None)
    from mambapy.lm import LM
    from mambapy.mamba import MambaConfig

    model = LM(MambaConfig(d_model=size["dim"], n_layers=size["layers"]), vocab_size=VOCAB)
    return lambda x, y: mean_loss(model(x), y), adamw(model)


def transformers_mamba(size, peers):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=size["dim"], num_hidden_layers=size["layers"], vocab_size=VOCAB,
                                         use_cache=False))
    return lambda x, y: mean_loss(model(x).logits, y), adamw(model)


def transformers_mamba2(size, peers):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    c = Mamba2Config(hidden_size=size["dim"], num_hidden_layers=size["layers"], vocab_size=VOCAB, head_dim=64,
                     num_heads=2 * size["dim"] // 64, n_groups=1, state_size=128, use_cache=False,
                     tie_word_embeddings=True)  # fmt: skip
    model = Mamba2ForCausalLM(c)
    return lambda x, y: mean_loss(model(x).logits, y), adamw(model)


# ---------------------------------------------------------------- rwkv.py
def rwkv_lm(size, peers):
    """The classes of RWKV-LM's rwkv_v7_demo.py; their operator is fla's plain recurrence, its arguments matched."""
    naive = load(Path(peers) / "flash-linear-attention/fla/ops/generalized_delta_rule/dplr/naive.py", "fla_naive")
    text = (Path(peers) / "RWKV-LM/RWKV-v7/rwkv_v7_demo.py").read_text()
    text = text[text.index("class RWKV_Tmix_x070") : text.index("# RWKV Inference")]

    def op(r, w, k, v, a, b):
        B, T, C = r.shape
        r, w, k, v, a, b = (t.view(B, T, -1, 64).transpose(1, 2) for t in (r, w, k, v, a, b))
        y, _ = naive.dplr_recurrence(r * 8, k, v, a, b, -w.exp())  # it divides r by sqrt(64)
        return y.transpose(1, 2).reshape(B, T, C)

    names = dict(torch=torch, nn=nn, F=F, MyModule=nn.Module, MyFunction=lambda f: f, RWKV7_OP=op,
                 D_DECAY_LORA=64, D_AAA_LORA=64, D_MV_LORA=32, D_GATE_LORA=128)  # fmt: skip
    exec(compile(text, "rwkv_v7_demo.py", "exec"), names)
    args = types.SimpleNamespace(n_layer=size["layers"], n_embd=size["dim"], dim_att=size["dim"],
                                 dim_ffn=4 * size["dim"], head_size_a=64, vocab_size=VOCAB)  # fmt: skip
    model = names["RWKV"](args)
    for p in model.parameters():  # its parameters come uninitialised: any numbers do
        nn.init.normal_(p, std=0.02)
    return lambda x, y: mean_loss(model(x), y), adamw(model)


# ---------------------------------------------------------------- retnet.py
def torchscale(size, peers):
    """fairscale, timm and einops, which it imports for other models, are stubs."""
    for name in ("fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers", "einops"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["fairscale.nn"].checkpoint_wrapper = sys.modules["fairscale.nn"].wrap = lambda m, *a, **k: m
    sys.modules["timm.models.layers"].drop_path = sys.modules["einops"].rearrange = lambda x, *a, **k: x
    sys.path.insert(0, str(Path(peers) / "torchscale"))
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    c = RetNetConfig(vocab_size=VOCAB, decoder_embed_dim=size["dim"], decoder_value_embed_dim=size["value_dim"],
                     decoder_ffn_embed_dim=size["ffn_dim"], decoder_retention_heads=size["heads"],
                     decoder_layers=size["layers"], activation_fn="swish", dropout=0.0)  # fmt: skip
    model = RetNetDecoder(c, embed_tokens=nn.Embedding(VOCAB, size["dim"]))
    return lambda x, y: mean_loss(model(x)[0], y), adamw(model)


# ---------------------------------------------------------------- bitnet.py, moe.py
def transformers_llama(size, peers):
    """A dense model of full precision: what ternary weights, or experts, are measured against."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = LlamaConfig(hidden_size=size["dim"], num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
                    num_key_value_heads=size["kv_heads"], intermediate_size=size["ffn_dim"], vocab_size=VOCAB,
                    use_cache=False)  # fmt: skip
    model = LlamaForCausalLM(c)
    return lambda x, y: mean_loss(model(x).logits, y), adamw(model)


def transformers_bitnet(size, peers):
    from transformers import BitNetConfig, BitNetForCausalLM
    from transformers.integrations.bitnet import AutoBitLinear

    c = BitNetConfig(hidden_size=size["dim"], num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
                     num_key_value_heads=size["kv_heads"], intermediate_size=size["ffn_dim"], vocab_size=VOCAB,
                     use_cache=False, tie_word_embeddings=True)  # fmt: skip
    model = BitNetForCausalLM(c)
    for module in list(model.model.modules()):  # quantise online, as its quantisation_config asks for
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                new = AutoBitLinear(child.in_features, child.out_features, bias=False, online_quant=True)
                new.weight = child.weight
                setattr(module, name, new)
    return lambda x, y: mean_loss(model(x).logits, y), adamw(model)


def bitnet_twin(size, peers):
    """bitnet.py --bits 16: the same model without rounding, which says what ternary training costs."""
    m = load(Path(__file__).parent.parent / "bitnet.py", "bitnet_twin")
    cfg = m.Config(**{k: v for k, v in size.items() if k in m.NAMES} | dict(bits=16))
    model = m.Model(cfg)
    return lambda x, y: model(x, y), m.make_optimizers(model, cfg)[0]


def transformers_mixtral(size, peers):
    from transformers import MixtralConfig, MixtralForCausalLM

    c = MixtralConfig(hidden_size=size["dim"], num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
                      num_key_value_heads=size["kv_heads"], intermediate_size=size["ffn_dim"],
                      num_local_experts=size["experts"], num_experts_per_tok=size["top_k_experts"],
                      vocab_size=VOCAB, use_cache=False)  # fmt: skip
    model = MixtralForCausalLM(c)
    return lambda x, y: mean_loss(model(x).logits, y), adamw(model)


# ---------------------------------------------------------------- dit.py: a batch is (x_0, labels, uniforms, noise)
def meta_dit(size, peers):
    """Its own model and training loss; timm's three modules as tests/official_dit.py has them."""
    models, diffusion = load(Path(__file__).parent.parent / "tests" / "official_dit.py",
                             "official_dit").official(Path(peers) / "DiT")
    model = models.DiT(input_size=size["size"], patch_size=size["patch"], in_channels=size["channels"],
                       hidden_size=size["dim"], depth=size["layers"], num_heads=size["heads"],
                       num_classes=size["classes"], learn_sigma=False)  # fmt: skip
    process = diffusion.create_diffusion("", learn_sigma=False)
    loss = lambda x0, y, u, noise: process.training_losses(
        model, x0, (1000 * u[:, 0]).long(), dict(y=y), noise)["loss"].mean()
    return loss, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)


def diffusers_dit(size, peers):
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=size["heads"], attention_head_dim=size["dim"] // size["heads"],
                                  in_channels=size["channels"], out_channels=size["channels"],
                                  num_layers=size["layers"], sample_size=size["size"], patch_size=size["patch"],
                                  num_embeds_ada_norm=size["classes"])  # fmt: skip
    process = DDPMScheduler(1000, 1e-4, 0.02)

    def loss(x0, y, u, noise):
        t = (1000 * u[:, 0]).long()
        return F.mse_loss(model(process.add_noise(x0, noise, t), t, class_labels=y).sample, noise)

    return loss, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)


# ---------------------------------------------------------------- unet.py
# a batch is x0, the caption's features, u, noise (example() in bench/memory.py)
def flow_loss(predict):
    def loss(x0, cond, u, noise):
        s = u[:, :1, None, None]
        return F.mse_loss(predict((1 - s) * x0 + s * noise, 1000 * u[:, 0], cond), noise - x0)

    return loss


def diffusers_unet(size, peers):
    """Without captions: attention instead of transformers at the levels that attend, which is less work than ours."""
    from diffusers import UNet2DModel

    down, up = (["Attn" * a + f"{way}Block2D" for a in size["attn"]] for way in ("Down", "Up"))
    model = UNet2DModel(sample_size=size["size"], block_out_channels=size["widths"], layers_per_block=size["layers"],
                        norm_num_groups=size["groups"], down_block_types=down, up_block_types=up[::-1])  # fmt: skip
    return flow_loss(lambda x, t, cond: model(x, t).sample), adamw(model)


def diffusers_unet_condition(size, peers):
    """The same architecture as ours."""
    from diffusers import UNet2DConditionModel

    down, up = (["CrossAttn" * a + f"{way}Block2D" for a in size["attn"]] for way in ("Down", "Up"))
    model = UNet2DConditionModel(sample_size=size["size"], in_channels=3, out_channels=3,
                                 block_out_channels=size["widths"], layers_per_block=size["layers"],
                                 norm_num_groups=size["groups"], attention_head_dim=size["heads"],
                                 cross_attention_dim=size["features"],
                                 down_block_types=down, up_block_types=up[::-1])  # fmt: skip
    return flow_loss(lambda x, t, cond: model(x, t, cond).sample), adamw(model)


PEERS = {
    "gpt2.py": {"nanoGPT": nanogpt, "minGPT": mingpt, "transformers": transformers_gpt2},
    "mamba.py": {"mambapy": mambapy, "transformers": transformers_mamba},
    "mamba.py --version 2": {"transformers": transformers_mamba2},
    "rwkv.py": {"RWKV-LM with fla's recurrence": rwkv_lm},
    "retnet.py": {"torchscale": torchscale},
    "bitnet.py": {"transformers BitNet": transformers_bitnet, "transformers Llama": transformers_llama,
                  "bitnet.py --bits 16": bitnet_twin},
    "moe.py": {"transformers Mixtral": transformers_mixtral},
    "dit.py": {"facebookresearch DiT": meta_dit, "diffusers": diffusers_dit},
    "unet.py": {"diffusers UNet2DModel": diffusers_unet, "diffusers UNet2DConditionModel": diffusers_unet_condition},
}


# ---------------------------------------------------------------- generation
def transformers_speaks(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def speak(x, n):
        with torch.inference_mode():
            said = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=n, do_sample=False,
                                  eos_token_id=None, pad_token_id=0)
            return said[0, x.shape[1] :].tolist()

    return speak


def rwkv_speaks(folder):
    """The PyPI package; our rwkv.py must not hide it."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    root, ours, path = str(Path(__file__).parent.parent), sys.modules.pop("rwkv", None), list(sys.path)
    sys.path[:] = [p for p in path if Path(p or ".").resolve() != Path(root).resolve()]
    try:
        from rwkv.model import RWKV_x070
    finally:
        sys.path[:] = path
        if ours:
            sys.modules["rwkv"] = ours
    model = RWKV_x070(str(next(Path(folder).glob("*.pth")).with_suffix("")), "cpu fp32")

    def speak(x, n):
        logits, state = model.forward(x[0].tolist(), None)
        said = []
        for _ in range(n):
            said.append(int(logits.argmax()))
            logits, state = model.forward(said[-1:], state)
        return said

    return speak


SPEAKERS = {
    "gpt2.py": {"transformers": transformers_speaks},
    "mamba.py": {"transformers": transformers_speaks},
    "mamba.py --version 2": {"transformers": transformers_speaks},
    "rwkv.py": {"rwkv": rwkv_speaks},
    "bitnet.py": {"transformers": transformers_speaks},
    "moe.py": {"transformers": transformers_speaks},
}
