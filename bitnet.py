"""
BitNet b1.58: a Transformer whose weights are -1, 0 or 1      Ma et al. 2024, "The Era of 1-bit LLMs: All Large Language
                                                              Models are in 1.58 Bits", arXiv:2402.17764;
                                                              2025, "BitNet b1.58 2B4T Technical Report",
                                                              arXiv:2504.12285 (this architecture)

Special: every matrix in a block is a BitLinear. It trains full-precision master weights W, but multiplies with
    W~ = s clip(round(W / s), -1, 1),   s = mean |W|                one s a matrix                       (eq. 1 to 3)
    x~ = round(a x) / a,                a = 127 / max |x|           8 bits, one a token
and backward takes both roundings for the identity (straight-through). Such a product needs no multiplications, and
once trained a weight is log2(3) = 1.58 bits; stored in 2, 1/8 of bf16. Around it a Llama, with two norms more, since
quantised inputs want to be normed right before:
    x += O(RMSNorm(attention(rope(Q n), rope(K n), V n))),  n = RMSNorm(x)  H query heads share kv_heads keys and values
    x += D(RMSNorm(relu(G n)^2 * U n)),                     n = RMSNorm(x)
    logits = RMSNorm(x) E^T                                 the embedding E, not ternary, is the head

Run:     python bitnet.py                                     trains on tiny Shakespeare, then prints a sample
         python bitnet.py --bits 16 --out out/twin            the same model without rounding: what ternary costs
         python bitnet.py --pack                              out/bitnet (or --init) in 2 bits, Hugging Face's packing
         python bitnet.py --init out/bitnet/packed --sample "ROMEO:"  generates straight from them: the same tokens
         python bitnet.py --init microsoft/bitnet-b1.58-2B-4T --sample "The Eiffel tower"
                                                              (packed; the master weights, ...-2B-4T-bf16, train on)
Expect:  validation losses and minutes are in bench/RESULTS.md, each with its command.
Alone:   this file needs PyTorch, numpy and safetensors; with kernels/ beside it, it is faster.
"""

import argparse
import ast
import contextlib
import csv
import ctypes
import dataclasses
import functools
import glob
import inspect
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

try:
    from kernels.activation import relu2glu
    from kernels.attention import attention
    from kernels.bitlinear import bit_linear, pack, packed_linear, quantize_weight, unpack
    from kernels.cross_entropy import linear_cross_entropy
    from kernels.matmul import linear
    from kernels.norm import rms_norm
    from kernels.rope import rope
except ModuleNotFoundError:  # this file alone: the same operations in plain PyTorch

    def quantize_weight(w):
        """W (N, K) -> clip(round(W / s), -1, 1) int8, and s."""
        s = w.detach().float().abs().mean().clamp(min=1e-5)
        return (w.detach() * (1 / s)).round().clamp(-1, 1).to(torch.int8), s

    def quantize(x):
        """x (..., K) -> round(a x), and a (..., 1)."""
        a = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return (x * a).round(), a

    def bit_linear(x, g, weights, eps=1e-5):
        """RMSNorm(x) g, quantised, through several quantised W. v + (v~ - v).detach() is v~ with the gradient of v."""
        h = rms_norm(x, g, eps).float()
        xq, a = quantize(h.detach())
        h, out = h + (xq / a - h).detach(), []
        for w in weights:
            wq, s = quantize_weight(w)
            out.append(F.linear(h, w + (wq * s - w).detach()))
        return tuple(out)

    def pack(wq):
        """(N, K) -> (N / 4, K) bytes: row r holds Wq + 1 of rows r, r + N/4, r + 2N/4, r + 3N/4, lowest bits first."""
        a, b, c, d = (wq + 1).to(torch.uint8).chunk(4)
        return a | b << 2 | c << 4 | d << 6

    def unpack(packed):
        return torch.cat([(packed >> 2 * j & 3).to(torch.int8) - 1 for j in range(4)])

    def packed_linear(x, g, packs, eps=1e-5):
        """bit_linear for packed weights, pairs (bytes, s): integers are multiplied, and s / a comes last."""
        xq, a = quantize(rms_norm(x, g, eps).float())
        return tuple((F.linear(xq, unpack(p).float()) * (s / a)).to(x.dtype) for p, s in packs)

    def relu2glu(gate, up):
        return F.relu(gate).square() * up

    def attention(q, k, v):  # softmax(q k^T / sqrt(D)) v; query i sees keys up to i + Tk - Tq
        Tq, Tk = q.shape[2], k.shape[2]
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq) if 1 < Tq < Tk else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=Tq == Tk, enable_gqa=True)

    def linear_cross_entropy(x, w, targets, ignore_index=-1):
        """mean of -log softmax(x w^T)[target], 2048 rows at a time, again in backward: the logits are never whole."""
        x, targets = x.flatten(0, -2), targets.flatten()
        total = x.new_zeros((), dtype=torch.float32)
        for xs, ts in zip(x.split(2048), targets.split(2048)):
            part = lambda xs, ts: F.cross_entropy(
                F.linear(xs, w).float(), ts, ignore_index=ignore_index, reduction="sum"
            )
            total = total + checkpoint(part, xs, ts, use_reentrant=False)
        return total / (targets != ignore_index).sum().clamp(min=1)

    def linear(x, w):
        return F.linear(x, w)

    def rms_norm(x, w, eps=1e-6):
        return F.rms_norm(x, w.shape, w, eps)

    def rope(x, cos, sin):  # x (B, T, H, D): pairs (x_j, x_{j + D/2}) turned by the position's angle; cos, sin (T, D/2)
        (a, b), cos, sin = x.chunk(2, -1), cos[:, None], sin[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@dataclass
class Config:
    # the model
    layers: int = 12  # blocks
    heads: int = 12  # query heads; the head size D is dim / heads
    kv_heads: int = 0  # heads of keys and values; 0: a quarter of --heads
    dim: int = 768  # width C of the residual stream
    ffn_dim: int = 0  # inner width F of the feed-forward layer; 0: 8/3 of --dim, rounded up to a multiple of 64
    seq: int = 2048  # context length T
    vocab: int = 0  # rows of the embedding; 0: as many as the tokenizer has
    theta: float = 500000.0  # base of the rotary angles
    bits: int = 2  # of a weight in a block: 2 (ternary; 8-bit activations) | 16 (the full-precision twin, unrounded)
    # the run
    preset: str = ""  # sizes and schedule together; default: cpu without a GPU, gpu with one
    data: str = "shakespeare"  # name in data/, .txt or .jsonl file, folder or glob of token shards (nanoGPT's, llm.c's)
    tok: str = ""  # char | byte | gpt2 | a tokenizer.json | a RWKV vocabulary file; default: what suits the data
    batch: int = 16  # sequences per micro-step, over all processes together
    accum: int = 1  # micro-steps whose gradients are summed into one step
    steps: int = 1000  # optimizer steps
    lr: float = 6e-4  # peak learning rate
    lr2: float = 0.667  # peak learning rate of the second half, as a fraction of --lr
    warmup: int = 0  # steps of linear warm-up
    beta2: float = 0.95  # second moment's decay in AdamW
    wd: float = 0.1  # weight decay of the first half, on matrices only; the second has none
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    optim: str = "adamw"  # adamw | muon (matrices inside blocks; AdamW for the rest) | adamw8bit
    seed: int = 1337  # of weights, batches and samples
    device: str = ""  # cpu | cuda | mps; default: the best there is
    dtype: str = "auto"  # auto (bf16 where it is faster here) | fp32 | bf16 (autocast)
    compile: bool = False  # torch.compile
    ckpt: bool = False  # recompute each block in backward instead of keeping its activations
    fsdp: bool = False  # under torchrun: shard parameters, gradients and optimizer (FSDP2) instead of copying them
    out: str = ""  # folder of the run; default out/<file>
    resume: bool = False  # go on with the run in --out, bit for bit
    init: str = ""  # start from a checkpoint: folder, file or hub name
    eval_every: int = 250  # steps between evaluations and saves
    eval_iters: int = 64  # batches of an evaluation; always the same ones
    log_every: int = 10  # steps between progress lines
    pack: bool = False  # write the weights of --out or --init, 2 bits each, into the folder packed of --out
    sample: str = ""  # generate after this text, from --out or --init, instead of training
    tokens: int = 300  # how many to generate
    temp: float = 0.8  # temperature; 0: the most likely token
    top_k: int = 0  # draw from the k most likely; 0: from all
    top_p: float = 1.0  # draw from the most likely that make up this probability


# The published runs of b1.58 ("Training Tips, Code and FAQ": 100B tokens, here about 0.5M a step) in this architecture
B158 = dict(seq=2048, tok="gpt2", data="openwebtext",
            steps=200_000, warmup=375, lr2=2 / 3, eval_every=1000, ckpt=True, optim="adamw8bit")
PRESETS = {
    # one to two minutes on two cores; what else was tried is in bench/RESULTS.md
    "cpu": dict(layers=4, heads=3, kv_heads=1, dim=96, seq=128,
                batch=16, steps=900, lr=1e-2, optim="muon", eval_every=450),
    # characters, for one 12 GB GPU
    "gpu": dict(layers=6, heads=6, kv_heads=2, dim=384, seq=256, batch=64, steps=5000, lr=3e-3, warmup=100),
    "700M": dict(layers=24, heads=24, kv_heads=24, dim=1536, ffn_dim=4096, batch=4, accum=60, lr=1.5e-3, **B158),
    "1.3B": dict(layers=24, heads=32, kv_heads=32, dim=2048, ffn_dim=5460, batch=2, accum=120, lr=1.2e-3, **B158),
    "3B": dict(layers=26, heads=32, kv_heads=32, dim=3200, ffn_dim=8640, batch=1, accum=240, lr=1.2e-3, **B158),
    # BitNet b1.58 2B4T: microsoft/bitnet-b1.58-2B-4T
    "2B": dict(layers=30, heads=20, kv_heads=5, dim=2560, ffn_dim=6912, vocab=128256,
               batch=1, accum=120, lr=1.2e-3, **B158 | dict(seq=4096)),
}  # fmt: skip
EPS = 1e-5


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))


class BitLinear(nn.Module):
    """W (n_out, n_in): master weights, or after pack() bytes (n_out / 4, n_in) and s, as on the hub; see project()."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.ternary = None  # of master weights, for inference: bytes and s

    def quantize(self):
        if self.weight.dtype != torch.uint8:
            wq, s = quantize_weight(self.weight)
            self.ternary = pack(wq), s.view(1)

    def pack(self):
        if self.weight.dtype == torch.uint8:
            return
        self.quantize()
        (packed, s), self.weight, self.ternary = self.ternary, None, None
        del self.weight
        self.weight, self.weight_scale = nn.Buffer(packed), nn.Buffer(s)

    def packed(self):
        return self.ternary or (self.weight, self.weight_scale)


def project(x, norm, layers, bits, packed=False):
    """x (B, T, C) -> the outputs of all BitLinear layers that read RMSNorm(x), which is quantised once for them."""
    if bits == 16:
        h = rms_norm(x, norm.weight, EPS)
        return [linear(h, f.weight) for f in layers]
    if packed or layers[0].weight.dtype == torch.uint8:
        return packed_linear(x, norm.weight, [f.packed() for f in layers], EPS)
    return bit_linear(x, norm.weight, [f.weight for f in layers], EPS)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.bits, self.D = cfg.bits, cfg.dim // cfg.heads
        self.q_proj = BitLinear(cfg.dim, cfg.dim)
        self.k_proj = BitLinear(cfg.dim, cfg.kv_heads * self.D)
        self.v_proj = BitLinear(cfg.dim, cfg.kv_heads * self.D)
        self.o_proj = BitLinear(cfg.dim, cfg.dim)
        self.attn_sub_norm = RMSNorm(cfg.dim)

    def forward(self, x, norm, cos, sin, cache=None, t=0):
        B, T, C = x.shape
        qkv = project(x, norm, [self.q_proj, self.k_proj, self.v_proj], self.bits, cache is not None)
        q, k, v = (u.view(B, T, -1, self.D) for u in qkv)  # (B, T, H or Hkv, D)
        q, k, v = (u.transpose(1, 2) for u in (rope(q, cos, sin), rope(k, cos, sin), v))
        if cache is not None:  # (2, B, Hkv, room, D): keys and values of the t tokens before x
            cache[0, :, :, t : t + T], cache[1, :, :, t : t + T] = k, v
            k, v = cache[:, :, :, : t + T]
        y = attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        return project(y, self.attn_sub_norm, [self.o_proj], self.bits, cache is not None)[0]


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.bits = cfg.bits
        self.gate_proj = BitLinear(cfg.dim, cfg.ffn_dim)
        self.up_proj = BitLinear(cfg.dim, cfg.ffn_dim)
        self.down_proj = BitLinear(cfg.ffn_dim, cfg.dim)
        self.ffn_sub_norm = RMSNorm(cfg.ffn_dim)

    def forward(self, x, norm, packed):
        gate, up = project(x, norm, [self.gate_proj, self.up_proj], self.bits, packed)  # (B, T, F) each
        return project(relu2glu(gate, up), self.ffn_sub_norm, [self.down_proj], self.bits, packed)[0]


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.dim)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.dim)
        self.mlp = MLP(cfg)

    def forward(self, x, cos, sin, cache=None, t=0):
        x = x + self.self_attn(x, self.input_layernorm, cos, sin, cache, t)
        return x + self.mlp(x, self.post_attention_layernorm, cache is not None)


class Model(nn.Module):
    """BitNet b1.58 with the parameter names of microsoft/bitnet-b1.58-2B-4T on the hub (head tied to the embedding)."""

    def __init__(self, cfg):
        super().__init__()
        cfg.kv_heads = cfg.kv_heads or max(1, cfg.heads // 4)
        cfg.ffn_dim = cfg.ffn_dim or -(-8 * cfg.dim // 3 // 64) * 64
        if cfg.bits not in (2, 16):
            bad(f"--bits {cfg.bits}: 2 (ternary weights) or 16 (the full-precision twin)")
        if cfg.dim % (2 * cfg.heads):
            bad(f"--heads {cfg.heads}: --dim {cfg.dim} must be divisible by twice that (pairs are rotated)")
        if cfg.heads % cfg.kv_heads:
            bad(f"--kv-heads {cfg.kv_heads}: --heads {cfg.heads} must be divisible by it")
        for k, n in dict(dim=cfg.dim, ffn_dim=cfg.ffn_dim, kv_heads=cfg.kv_heads * cfg.dim // cfg.heads).items():
            if n % 4 and cfg.bits == 2:
                bad(f"{flag(k)} {getattr(cfg, k)}: {n} rows of a matrix; four share a byte, so a multiple of 4")
        self.cfg = cfg
        self.context, self.stop = cfg.seq, set()  # step() holds at most so many tokens; ids that end an answer
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(cfg.vocab, cfg.dim)
        self.model.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.model.norm = RMSNorm(cfg.dim)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def bit_linears(self):
        return {name: m for name, m in self.named_modules() if isinstance(m, BitLinear)}

    def blocks(self, tokens, caches=None, t=0):
        """tokens (B, T) at positions t..t+T-1 -> the normed residual stream (B, T, C)."""
        c = self.cfg
        D, at = c.dim // c.heads, torch.arange(t, t + tokens.shape[1], dtype=torch.float32, device=tokens.device)
        angle = at[:, None] * c.theta ** (-torch.arange(0, D, 2, dtype=torch.float32, device=tokens.device) / D)
        cos, sin = angle.cos(), angle.sin()  # (T, D / 2)
        x = F.embedding(tokens, self.model.embed_tokens.weight).float()  # (B, T, C)
        for i, block in enumerate(self.model.layers):
            if c.ckpt and self.training and caches is None:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, None if caches is None else caches[i], t)  # caches: inference, packed weights
        return rms_norm(x, self.model.norm.weight, EPS)

    def head(self, x):
        E = self.model.embed_tokens.weight
        return linear(x.to(E.dtype), E).float()

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, V); with targets (B, T), where -1 is ignored: the mean loss, a fp32 scalar."""
        x = self.blocks(tokens)
        return self.head(x) if targets is None else linear_cross_entropy(x, self.model.embed_tokens.weight, targets)

    def init_state(self, batch):
        """An empty cache (L, 2, B, Hkv, room, D) that doubles when it is full, and the number of tokens in it. Master
        weights are quantised here: step() multiplies with their packed form."""
        c, D = self.cfg, self.cfg.dim // self.cfg.heads
        for f in self.bit_linears().values() if c.bits == 2 else ():
            f.quantize()
        device = self.model.embed_tokens.weight.device
        return {"kv": torch.zeros(c.layers, 2, batch, c.kv_heads, min(c.seq, 64), D, device=device), "t": 0}

    def step(self, tokens, state):
        """The next tokens (B, T') -> logits (B, V) after the last of them, and the state."""
        t, end, room = state["t"], state["t"] + tokens.shape[1], state["kv"].shape[4]
        if end > self.context:
            raise ValueError(f"{end} tokens do not fit the {self.context} positions")
        if end > room:
            state["kv"] = F.pad(state["kv"], (0, 0, 0, max(end, 2 * room) - room))
        x = self.blocks(tokens, state["kv"], t)
        state["t"] = end
        return self.head(x[:, -1]), state

    def prepare(self, cast):
        if self.is_packed():
            bad(f"--init {self.cfg.init}: packed weights do not train; the master weights they come from do")

    def param_groups(self, weight_decay):
        """Matrices decay, norms do not; `matrix` marks what Muon may orthogonalise."""
        return [
            dict(params=[f.weight for f in self.bit_linears().values()], weight_decay=weight_decay, matrix=True),
            dict(params=[self.model.embed_tokens.weight], weight_decay=weight_decay),
            dict(params=[p for p in self.parameters() if p.ndim < 2], weight_decay=0.0),
        ]

    def pack(self):
        """From now on there is only the packed form: an eighth of bf16, for inference."""
        for f in self.bit_linears().values():
            f.pack()
        return self

    def is_packed(self):
        return any(f.weight.dtype == torch.uint8 for f in self.bit_linears().values())

    def hf_config(self):
        """config.json as transformers' BitNetForCausalLM reads it; the full-precision twin: no quantization_config."""
        c = self.cfg
        how = dict(quant_method="bitnet", linear_class="autobitlinear",
                   quantization_mode="offline" if self.is_packed() else "online",
                   modules_to_not_convert=["lm_head"], use_rms_norm=False)  # fmt: skip
        config = dict(
            model_type="bitnet", architectures=["BitNetForCausalLM"], num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, hidden_size=c.dim, intermediate_size=c.ffn_dim,
            vocab_size=c.vocab, max_position_embeddings=c.seq, rms_norm_eps=EPS, rope_theta=c.theta,
            rope_parameters=dict(rope_theta=c.theta, rope_type="default"), hidden_act="relu2", attention_bias=False,
            tie_word_embeddings=True, initializer_range=0.02, bos_token_id=None, eos_token_id=None,
            dtype=str(self.model.embed_tokens.weight.dtype).removeprefix("torch."),
        )  # fmt: skip
        return config | (dict(quantization_config=how) if c.bits == 2 else {})

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """source: a folder or hub name, master weights or packed ones (inference only); overrides: Config fields."""
        path = find_checkpoint(source)
        config, tensors = read_checkpoint(path)
        if config.get("model_type") != "bitnet":
            bad(f"{path}: model_type is {config.get('model_type')!r} in config.json; this file knows bitnet")
        how = config.get("quantization_config")
        rope_type = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
        same = dict(hidden_act="relu2", attention_bias=False, tie_word_embeddings=True, rms_norm_eps=EPS)
        for key, value in same.items():
            if config.get(key, value) != value:
                bad(f"{path}: {key} = {config[key]!r} in config.json; BitNet b1.58 2B4T has {value!r}")
        if rope_type != "default" or (how or {}).get("use_rms_norm"):
            bad(f"{path}: scaled rotary angles or norms inside the layers (use_rms_norm) in config.json; "
                "BitNet b1.58 2B4T has none")
        try:
            cfg = Config(
                layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
                kv_heads=config["num_key_value_heads"], dim=config["hidden_size"], ffn_dim=config["intermediate_size"],
                seq=config["max_position_embeddings"], vocab=config["vocab_size"], bits=2 if how else 16,
                theta=float(config.get("rope_theta")
                            or (config.get("rope_parameters") or {}).get("rope_theta", 500000.0)),
            )  # fmt: skip
        except KeyError as e:
            bad(f"{path}: config.json has no {e}, so this is no BitNet")
        cfg = dataclasses.replace(cfg, **overrides)
        with torch.device("meta"):  # no time for random numbers that the file's replace
            model = cls(cfg)
        tensors.pop("lm_head.weight", None)  # the tied head
        packed = any(k.endswith(".weight_scale") for k in tensors)
        if packed and cfg.bits == 16:
            bad(f"--bits 16: the weights in {path} are packed, their full precision is lost")
        dtype = (tensors["model.embed_tokens.weight"].dtype if packed and "model.embed_tokens.weight" in tensors
                 else torch.float32)
        for p in model.parameters():
            p.data = p.data.to(dtype)
        if packed:
            model.pack()
            for k in tensors:  # transformers' other class of layer, bitlinear, divides by the scale that it stores
                if k.endswith(".weight_scale"):
                    tensors[k] = (tensors[k].float() if how.get("linear_class") == "autobitlinear"
                                  else 1 / tensors[k].float())
        load_strict(model.to_empty(device="cpu"), tensors, path)
        end = config.get("eos_token_id")
        model.stop = set(end if isinstance(end, list) else [end]) - {None}
        return model

    def save_pretrained(self, folder, tensors=None, **how):
        """model.safetensors and config.json, as on the hub: BitNetForCausalLM.from_pretrained(folder) loads them.
        tensors: the state dict where it was gathered elsewhere; how: see write_weights."""
        write_weights(folder, self.state_dict() if tensors is None else tensors, self.hf_config(), **how)


HUB = {}
TOK = {50257: "gpt2"}  # tokenizer of a checkpoint that brings none, by its rows


# ----- cli (shared) -----
ME = Path(__file__).stem
CHOICES = dict(optim=["adamw", "muon", "adamw8bit"], dtype=["auto", "fp32", "bf16"], device=["cpu", "cuda", "mps"])
NAMES = [f.name for f in fields(Config)]
SIZES = NAMES[: NAMES.index("preset")]  # the fields that describe the model; the others describe the run
POSITIVE = "seq batch accum steps lr eval_every eval_iters log_every tokens".split()
POSITIVE += [f.name for f in fields(Config) if f.name in SIZES and f.default]
FRACTION = "dropout beta2 lr_end".split()


def bad(message):
    """A user's mistake: one line that says what is wrong and what would be right, exit code 2."""
    print(f"{ME}.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def flag(name):
    return "--" + name.replace("_", "-")


def parse(argv=None):
    """The flags are Config's fields, their help the comments there. -> (the preset's values, the flags given)."""
    notes = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.+)$", inspect.getsource(Config), re.M))
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    p.error = bad
    for f in fields(Config):
        how = dict(type=f.type, metavar="X") if f.type is not list else dict(nargs="+", metavar="X")
        how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else how
        p.add_argument(flag(f.name), default=argparse.SUPPRESS, help=f"{notes[f.name]}  [{f.default!r}]", **how)
    given = vars(p.parse_args(argv))
    for k, v in given.items():
        if k in CHOICES and v not in CHOICES[k]:
            bad(f"{flag(k)} {v}: one of {', '.join(CHOICES[k])}")
        if type(v) in (int, float) and not (0 < v < math.inf if k in POSITIVE else 0 <= v < math.inf):
            bad(f"{flag(k)} {v}: must be {'positive' if k in POSITIVE else '0 or more'}")
        if k == "seed" and v >= 2**63:
            bad(f"--seed {v}: must be below 2^63")
        if k in ("data", "out") and not v:
            bad(f"{flag(k)}: its value is empty")
        if k in FRACTION and v > 1 or k in ("dropout", "beta2") and v == 1 or k == "top_p" and not 0 < v <= 1:
            bad(f"{flag(k)} {v}: must be between 0 and 1")
    preset = given.get("preset") or ("gpu" if torch.cuda.is_available() else "cpu")
    if preset not in PRESETS:
        bad(f"--preset {preset}: one of {', '.join(PRESETS)}")
    return dict(out=f"out/{ME}") | PRESETS[preset] | dict(preset=preset), given


# ----- end -----


# ----- data (shared) -----
class Tokenizer:
    """encode: str -> array of ids, decode: ids -> str.
    kind: char | byte | gpt2 | a tokenizer.json, or its hub name | a RWKV vocabulary."""

    def __init__(self, kind, chars=""):
        self.kind, self.chars = kind, chars  # chars: the sorted characters of kind char; an id is a place among them
        try:
            if kind == "char" and not chars:
                bad("--tok char: no text, and no tok.json of a run, says which characters there are")
            elif kind == "char":
                self.vocab, self.encode, self.decode = (len(chars), self.places,
                                                        lambda ids: "".join(chars[i] for i in ids))
            elif kind == "byte":
                self.vocab, self.encode = 256, lambda text: np.frombuffer(text.encode(errors="replace"), np.uint8)
                self.decode = lambda ids: bytes(ids).decode(errors="replace")
            elif kind == "gpt2":
                import tiktoken

                bpe = tiktoken.get_encoding("gpt2")
                self.vocab, self.decode = bpe.n_vocab, bpe.decode
                self.encode = lambda text: np.array(bpe.encode_ordinary(text), np.int64)
            elif kind.endswith(".json") or re.fullmatch(r"[\w.-]+/[\w.-]+", kind) and not Path(kind).exists():
                import tokenizers

                hf = (tokenizers.Tokenizer.from_file if kind.endswith(".json")
                      else tokenizers.Tokenizer.from_pretrained)(kind)
                self.vocab, self.decode = hf.get_vocab_size(), hf.decode
                self.encode = lambda text: np.array(hf.encode(text, add_special_tokens=False).ids, np.int64)
            elif Path(kind).is_file():  # RWKV: each line is an id, the token as a Python literal, and its length
                lines = [re.match(r"(\d+) (.+) \d+$", s).groups() for s in open(kind, encoding="utf-8")]
                words = {int(i): w if isinstance(w := ast.literal_eval(s), bytes) else w.encode() for i, s in lines}
                self.vocab, self.ids = 1 << max(words).bit_length(), {w: i for i, w in words.items()}
                self.encode = self.longest
                self.decode = lambda ids: b"".join(words.get(i, b"") for i in ids).decode(errors="replace")
            else:
                bad(f"--tok {kind}: one of char, byte, gpt2, or the path of a tokenizer.json or a RWKV vocabulary")
        except Exception as e:  # each library has its own exceptions, for a damaged file as for a missing network
            hint = "; its table is not cached and not to be had: --tok byte needs none" if kind == "gpt2" else ""
            bad(f"--tok {kind}: cannot be used{hint} ({type(e).__name__})")

    def places(self, text):
        known = np.array([ord(c) for c in self.chars])
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = np.searchsorted(known, codes).clip(max=len(known) - 1)
        if (wrong := codes[known[ids] != codes]).size:
            bad(f"the character {chr(wrong[0])!r} is not in the training text (--tok char); "
                "--tok byte knows every text")
        return ids

    def longest(self, text):  # greedy: the longest word that the text goes on with
        raw, ids, at, most = text.encode(errors="replace"), [], 0, max(map(len, self.ids))
        while at < len(raw):
            n = next(n for n in range(most, 0, -1) if raw[at : at + n] in self.ids)
            ids.append(self.ids[raw[at : at + n]])
            at += n
        return np.array(ids, np.int64)


class Stream:
    """The tokens of one split: shards end to end. A window of seq + 1 tokens never crosses the end of a shard."""

    def __init__(self, shards, cfg, name):
        self.shards = [s for s in shards if len(s) > cfg.seq]
        self.name = f"the {name} split of --data {cfg.data}"
        if not self.shards:
            bad(f"--seq {cfg.seq}: {self.name} has only {max(map(len, shards), default=0):,} tokens in a piece")
        self.seq, self.vocab, self.tokens = cfg.seq, cfg.vocab, sum(map(len, shards))
        # the number of each shard's first window, and at the end that of all windows
        self.first = np.cumsum([0] + [len(s) - cfg.seq for s in self.shards])

    def windows(self, numbers):
        """Window numbers (n) -> inputs and targets (n, seq) int64; a target is the token after its input."""
        rows = []
        for i in numbers:
            s = np.searchsorted(self.first, i, side="right") - 1
            rows.append(self.shards[s][i - self.first[s] :][: self.seq + 1])
        w = torch.from_numpy(np.stack(rows).astype(np.int64))
        if w.max() >= self.vocab:
            bad(f"{self.name}: token id {w.max()} is outside the vocabulary of {self.vocab}; "
                "--tok must be the data's own")
        return w[:, :-1].contiguous(), w[:, 1:].contiguous()

    def batch(self, cfg, step, micro, rank, world):
        """A pure function of (seed, step, micro), split over the processes: any number of them sees the same data."""
        numbers = np.random.default_rng((cfg.seed, step, micro)).integers(self.first[-1], size=cfg.batch)
        return self.windows(numbers[rank::world])

    def start(self):
        """What the sample at the end of a run begins with: the first token."""
        return self.shards[0][:1]

    def fixed(self, cfg):
        """The evaluation's windows: all that fit without overlap, or eval_iters batches spread evenly."""
        whole = np.arange(0, self.first[-1], self.seq)
        n = cfg.eval_iters * cfg.batch
        return whole if len(whole) <= n else np.linspace(0, self.first[-1] - 1, n).astype(np.int64)


def shard(path):
    """nanoGPT's .bin (no header, uint16, uint32 above 65,536 words) or llm.c's (1024-byte header) -> mapped tokens."""
    head = np.fromfile(path, "<i4", 256)
    if len(head) == 256 and head[0] in (20240520, 20240801):
        tokens = np.memmap(path, "<u2" if head[0] == 20240520 else "<u4", "r", offset=1024)
        if len(tokens) != head[2]:
            bad(f"{path}: {len(tokens):,} tokens where its header says {head[2]:,}: the file is cut or damaged")
        return tokens
    meta, size = path.parent / "meta.json", path.stat().st_size
    kind = np.dtype("<u4" if meta.is_file() and json.loads(meta.read_text())["vocab_size"] > 65536 else "<u2")
    if size % kind.itemsize:
        bad(f"{path}: {size:,} bytes are no whole number of tokens of {kind.itemsize}: the file is cut or damaged")
    return np.memmap(path, kind, "r") if size else np.empty(0, kind)


class PlainPickle(pickle.Unpickler):
    """For nanoGPT's meta.pkl: dicts, strings and numbers only. It can name no class or function, so no code can run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def prepared(cfg, given, tok):
    """The folder of a set in data/, made once by data/<name>.py. Without a network stdlib stands in for the default."""
    script = Path(__file__).parent / "data" / f"{cfg.data}.py"
    kind = cfg.tok or re.search(r'^NAME, TOK = "\w+", "(\w+)"', script.read_text(), re.M).group(1)
    folder = script.with_suffix("") / kind
    if not (folder / "meta.json").is_file():
        r = subprocess.run([sys.executable, script, "--tok", kind], stderr=subprocess.PIPE, text=True)
        said = (r.stderr.strip().splitlines() or ["it failed"])[-1]
        if r.returncode and cfg.data == "shakespeare" and not given.keys() & {"data", "resume"} and not tok:
            print(f"!!! {said}\n!!! training on the source of Python's own library instead: --data stdlib --tok byte")
            cfg.data, cfg.tok = "stdlib", "byte"
            return prepared(cfg, given, tok)
        if r.returncode:
            bad(said)
    return folder


def load_text(cfg, given, tok):
    """-> training and validation Stream, Tokenizer; sets cfg.tok and cfg.vocab. tok: a checkpoint's, which must fit."""
    folder, text = Path(__file__).parent / "data", None
    cfg.tok = cfg.tok or (tok.kind if tok else "")
    if not folder.is_dir() and cfg.data in ("shakespeare", "stdlib") and "data" not in given:  # this file alone
        print("!!! no data/ beside this file: training on the source of Python's own library; "
              "--data my.txt for your text")
        root = Path(sysconfig.get_paths()["stdlib"])
        text = "\n".join(f.read_text(errors="replace") for f in sorted([*root.glob("*.py"), *root.glob("*/*.py")]))
        cfg.data, cfg.tok = "stdlib", "byte"
    elif cfg.data.endswith((".txt", ".jsonl")):
        try:
            text = Path(cfg.data).read_bytes().decode()  # bytes: no newline is translated
            if cfg.data.endswith(".jsonl"):
                text = "\n".join(json.loads(line)["text"] for line in text.split("\n") if line.strip())
        except OSError as e:
            bad(f"--data {cfg.data}: {e.strerror}")
        except (ValueError, KeyError, TypeError) as e:
            bad(f'--data {cfg.data}: not UTF-8, or a line without {{"text": "..."}} ({type(e).__name__}: {e})')
    if text is not None:
        kind = cfg.tok = cfg.tok or "char"
        chars = tok.chars if tok else "".join(sorted(set(text)))
        tok = tok or Tokenizer(kind, chars if kind == "char" else "")
        cut = int(len(text) * 0.9)  # nanoGPT's split: the last tenth of the characters
        parts = dict(train=[tok.encode(text[:cut])], val=[tok.encode(text[cut:])])
    else:
        texts = [f.stem for f in folder.glob("*.py") if "NAME, TOK = " in f.read_text()]  # the others are pictures
        where = prepared(cfg, given, tok) if cfg.data in texts else Path(cfg.data)
        files = sorted(where.glob("*.bin")) if where.is_dir() else [Path(f) for f in sorted(glob.glob(str(where)))]
        files = [f for f in files if f.suffix == ".bin"]
        if not files:
            names = ", ".join(sorted(texts))
            bad(f"--data {cfg.data}: no .txt, .jsonl, folder or glob of .bin shards"
                + (f", nor one of {names}" if names else ""))
        meta, old = files[0].parent / "meta.json", files[0].parent / "meta.pkl"
        kind, chars = cfg.tok or "gpt2", ""
        try:
            if meta.is_file():
                m = json.loads(meta.read_text())
                kind, chars, _ = m["tok"], m.get("chars", ""), int(m["vocab_size"])  # shard() needs the last
            elif old.is_file():
                m = PlainPickle(open(old, "rb")).load()
                kind, chars = "char", "".join(m["itos"][i] for i in range(m["vocab_size"]))
        except Exception as e:  # JSON and pickle have many
            bad(f"{files[0].parent}: meta.json or meta.pkl is damaged ({e})")
        if tok and (tok.kind, tok.chars) != (kind, chars) or cfg.tok and cfg.tok != kind:
            bad(f"--data {cfg.data}: its tokens are {kind}, but {tok.kind if tok else cfg.tok} is asked for, "
                "or other characters")
        cfg.tok, tok = kind, tok or Tokenizer(kind, chars)
        val = [f for f in files if "val" in f.name]
        parts = dict(train=[shard(f) for f in files if "val" not in f.name and "test" not in f.name],
                     val=[shard(f) for f in val])
        if not parts["train"]:
            bad(f"--data {cfg.data}: only val and test shards; the others are what it trains on")
        if not val:  # shards without a split: the last tenth of the last one
            *rest, last = parts["train"]
            parts = dict(train=[*rest, last[: len(last) * 9 // 10]], val=[last[len(last) * 9 // 10 :]])
    if cfg.vocab and cfg.vocab < tok.vocab:
        bad(f"--vocab {cfg.vocab}: the tokenizer {cfg.tok} has {tok.vocab:,} tokens")
    cfg.vocab = cfg.vocab or tok.vocab
    return Stream(parts["train"], cfg, "train"), Stream(parts["val"], cfg, "val"), tok


# ----- end -----


# ----- load (shared) -----
load_data = load_text


# ----- end -----


# ----- schedule: of this file, since ternary weights learn by a rule of their own (two stages) -----
def schedule(step, cfg):
    """-> factors of --lr and --wd: warm-up, then linearly to 0 at the end; from half way on times lr2, without decay.
    (Ternary weights bear and want a high rate; a lower one and no decay let them settle: b1.58's "Training Tips".)"""
    late = step >= cfg.steps / 2
    lr = min((step + 1) / (cfg.warmup + 1), 1 - step / cfg.steps)
    return lr * (cfg.lr2 if late else 1.0), float(not late)


# ----- end -----


# ----- optimizer (shared) -----
class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), at AdamW's size of step (Liu et al. 2025, arXiv:2502.16982).

    X <- a X + b (X X^T) X + c (X X^T)^2 X, five times, drives all singular values of X = M / |M| toward 1; a step is
    0.2 sqrt(max(m, n)) X. torch.optim.Muon iterates in bf16, which a CPU without bf16 units does at 1/100 of its
    speed; here in the dtype of the run, matrices of a shape at once.
    """

    def __init__(self, params, lr, weight_decay, dtype=torch.float32, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
                    self.state[p].setdefault("momentum", torch.zeros_like(p))
            for shape, ps in shapes.items():
                m, n = shape[-2:] if len(shape) < 4 else (shape[0], shape[1:].numel())  # a convolution: a row a channel
                grads, M = [p.grad for p in ps], [self.state[p]["momentum"] for p in ps]
                torch._foreach_lerp_(M, grads, 1 - group["momentum"])
                X = torch.stack(torch._foreach_lerp(grads, M, group["momentum"])).reshape(-1, m, n)  # Nesterov momentum
                X = (X.mT if m > n else X).to(self.dtype)
                X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    A = X @ X.mT
                    X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), X, beta=3.4445)
                X = X.mT if m > n else X
                torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(ps, list(X.to(ps[0].dtype).reshape(-1, *shape)),
                                    alpha=-group["lr"] * 0.2 * max(m, n) ** 0.5)


def make_optimizers(model, cfg):
    """[AdamW], or [Muon for the groups that the model marks as `matrix`, AdamW for the rest]."""
    groups = [{"lr_scale": 1.0, "matrix": False, "wd": g["weight_decay"]} | g for g in model.param_groups(cfg.wd)]
    held = sorted(id(p) for g in groups for p in g["params"])
    assert held == sorted(id(p) for p in model.parameters() if p.requires_grad), "every parameter is in one group"
    how = dict(lr=cfg.lr, betas=(0.9, cfg.beta2))
    if cfg.fsdp and cfg.optim != "adamw":
        bad(f"--optim {cfg.optim}: it needs whole tensors, and --fsdp splits them; --optim adamw does not")
    try:
        from kernels.adamw import AdamW, AdamW8bit
    except ModuleNotFoundError:
        if cfg.optim == "adamw8bit":
            bad("--optim adamw8bit: it needs the folder kernels/ beside this file")
        AdamW = functools.partial(torch.optim.AdamW, fused=True)
    averages = model.averages() if hasattr(model, "averages") else []
    if cfg.optim == "adamw8bit":
        return [AdamW8bit(groups, **how), *averages]
    if cfg.optim == "adamw":
        return [AdamW(groups, **how), *averages]
    matrices, others = ([g for g in groups if g["matrix"] is m] for m in (True, False))
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    return [Muon(matrices, cfg.lr, cfg.wd, dtype), AdamW(others, **how), *averages]


def swap(optimizers):
    """Averages of the weights, where a model asks for them, take the weights' place; or make way for them again."""
    for o in optimizers:
        if hasattr(o, "swap"):
            o.swap()


def set_lr(optimizers, step, cfg):
    """lr and weight decay of this step: the initial ones times schedule(); a group's lr_scale multiplies its lr."""
    lr, wd = schedule(step, cfg)
    for group in (g for o in optimizers for g in o.param_groups):
        group["lr"], group["weight_decay"] = cfg.lr * lr * group["lr_scale"], group["wd"] * wd
    return cfg.lr * lr


# ----- end -----


# ----- checkpoint (shared) -----
def write_file(path, write):
    """write(a temporary path), onto the disk, rename: at any instant path is the whole old or the whole new file."""
    tmp = f"{path}.tmp"
    write(tmp)
    with open(tmp, "rb") as f:
        os.fsync(f.fileno())
    os.replace(tmp, path)


def write_weights(folder, tensors, config, name="model", new="", step=None):
    """<name>.safetensors and its config, as the family's own library loads them. new, step: see save()."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    config_name = "adapter_config.json" if name == "adapter_model" else "config.json"
    write_file(f"{folder}/{config_name}", lambda tmp: Path(tmp).write_text(json.dumps(config, indent=2)))
    tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
    write_file(f"{folder}/{name}.safetensors{new}",
               lambda tmp: save_file(tensors, tmp, metadata={"format": "pt", "step": str(step)}))


def find_checkpoint(source):
    """A folder, a file, or a name on the Hugging Face hub (owner/name, owner/name/file), downloaded once -> Path."""
    if Path(source).exists():
        return Path(source)
    try:
        from huggingface_hub import hf_hub_download, snapshot_download

        if len(parts := source.split("/")) > 2:
            return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
        path = Path(snapshot_download(source, allow_patterns=["*.json", "model*.safetensors"]))
        return (path if [*path.glob("*.safetensors")]
                else Path(snapshot_download(source, allow_patterns=["*.json", "pytorch_model*"])))
    except Exception as e:  # no such name, no network, no library
        bad(f"{source}: no such file or folder, and the hub does not give it ({type(e).__name__}); "
            "a hub name is owner/name")


def first_line(e):
    return (str(e) or type(e).__name__).splitlines()[0][:120]


def sharded():
    """With --fsdp every process holds a part: these make and take whole state dicts on the first one."""
    from torch.distributed.checkpoint import state_dict as D

    return D, D.StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(cfg, model, optimizers, tok, step, best):
    """The run's folder. Both large files are whole on the disk before the first rename, which decides
    (load_run ends the second)."""
    weights, states = model.state_dict, [o.state_dict for o in optimizers]
    if cfg.fsdp:
        D, how = sharded()
        weights = functools.partial(D.get_model_state_dict, model, options=how)
        states = [functools.partial(D.get_optimizer_state_dict, model, o, options=how) for o in optimizers]
    weights, states = weights(), [s() for s in states]
    if int(os.environ.get("RANK", 0)) == 0:
        model.save_pretrained(cfg.out, weights, new=".new", step=step)
        kind = dict(tok=tok.kind, chars=tok.chars)
        write_file(f"{cfg.out}/tok.json", lambda tmp: Path(tmp).write_text(json.dumps(kind)))
        state = dict(config=asdict(cfg), optimizers=states, step=step, best=best)
        write_file(f"{cfg.out}/train_state.pt", lambda tmp: torch.save(state, tmp))
        for new in not_renamed(cfg.out):
            os.replace(new, new.with_suffix(""))


def not_renamed(out):
    """The weights in the run's folder, and in those of unet.py's parts, that save() has written but not renamed."""
    return [f for part in ("", "unet", "vae", "text_encoder") for f in Path(out, part).glob("*.safetensors.new")]


def load_run(out):
    """What save() left in train_state.pt, or None."""
    path = Path(out, "train_state.pt")
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k: state[k] for k in ("config", "optimizers", "step", "best")}
        for new in not_renamed(out):
            with safe_open(new, "pt") as f:  # a kill between the renames leaves the weights of state's step here
                if f.metadata()["step"] == str(state["step"]):
                    os.replace(new, new.with_suffix(""))
        return state
    except Exception as e:  # a damaged zip, a foreign pickle, a file that is no dict
        bad(f"{path}: damaged, or not of this program ({first_line(e)})")


def load_tokenizer(path, vocab):
    """The tokenizer beside a checkpoint; without one the family's, where the vocabulary is its; or None."""
    folder = path if path.is_dir() else path.parent
    if (folder / "tok.json").is_file():
        try:
            kind = json.loads((folder / "tok.json").read_text())
            kind, chars = kind["tok"], kind["chars"]
        except (ValueError, KeyError, TypeError) as e:
            bad(f"{folder / 'tok.json'}: damaged ({first_line(e)})")
        return Tokenizer(kind, chars)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(str(folder / "tokenizer.json"))
    return Tokenizer(TOK[vocab]) if vocab in TOK else None


# ----- end -----


# ----- read (shared) -----
def read_checkpoint(path):
    """A folder or a weights file in one -> config.json as a dict, tensors by name. Only plain tensors are unpickled."""
    folder = path if path.is_dir() else path.parent
    try:
        config, index = json.loads((folder / "config.json").read_text()), folder / "model.safetensors.index.json"
        if not isinstance(config, dict):
            raise TypeError("config.json holds no names")
        if path.is_file():
            files = [path]
        elif index.is_file():
            files = [folder / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            files = [folder / ("model.safetensors" if (folder / "model.safetensors").is_file()
                               else "pytorch_model.bin")]
        tensors = {}
        for f in files:
            tensors |= (load_file(f) if f.suffix == ".safetensors"
                        else torch.load(f, map_location="cpu", weights_only=True))
        return config, tensors
    except FileNotFoundError as e:
        bad(f"{e.filename or path}: not found; a checkpoint is a folder with config.json and model.safetensors")
    except Exception as e:  # damaged JSON, safetensors, zip: each library has its own exceptions
        bad(f"{path}: damaged, or not a checkpoint ({first_line(e)})")


def load_strict(model, tensors, path):
    """Copy tensors into the model; one that is missing, left over or of another shape is named and refused."""
    own = model.state_dict()
    for k in sorted(own.keys() | tensors.keys()):
        if k not in tensors or k not in own:
            bad(f"{path}: {'no tensor' if k in own else 'unknown tensor'} {k}")
        if tensors[k].shape != own[k].shape:
            bad(f"{path}: {k} is {tuple(tensors[k].shape)}, but {tuple(own[k].shape)} is asked for")
    model.load_state_dict(tensors)


# ----- end -----


# ----- train (shared) -----
def pick_device(cfg):
    """-> (device, rank, world size); under torchrun each process takes its own GPU."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, rank, world = cfg.device or best, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind != "cpu" and kind != best:
        bad(f"--device {kind}: this machine, or this PyTorch, has none; --device cpu works everywhere")
    if cfg.batch % world:
        bad(f"--batch {cfg.batch}: must be divisible by the {world} processes that share it")
    if cfg.fsdp and "RANK" not in os.environ:
        bad("--fsdp: start it with torchrun --nproc_per_node=N")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    elif sys.platform == "linux":  # glibc: keep freed pages for the next step, which saves 4 to 8% of it
        ctypes.CDLL(None).mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device, rank, world


def bf16_pays(device, model, batch):
    """--dtype auto -> (whether to cast, why). A CPU is asked: matrices first, then, if faster, a whole micro-step."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False), "auto"

    def fastest(run):
        times = [(time.perf_counter(), run(), time.perf_counter()) for _ in range(3)]
        return min(end - start for start, _, end in times)

    def step(enabled):
        with torch.autocast(device.type, torch.bfloat16, enabled):
            loss = model(*batch)
        loss.backward()
        model.zero_grad()

    a = torch.randn(256, 256, device=device)
    b = a.bfloat16()
    if fastest(lambda: b @ b) > fastest(lambda: a @ a):
        return False, "auto: matrices multiply more slowly in bf16 here"
    buffers = [(b, b.clone()) for b in model.buffers()]  # a step may move them
    fp32, bf16 = fastest(lambda: step(False)), fastest(lambda: step(True))
    for b, before in buffers:
        b.copy_(before)
    return bf16 < fp32, f"auto: a micro-step takes {fp32 * 1e3:.0f} ms in fp32, {bf16 * 1e3:.0f} ms in bf16"


@torch.no_grad()
def evaluate(model, stream, cfg, device, cast):
    """Mean loss over the split's fixed windows. Every process does them all, so it does not depend on how many."""
    model.eval()
    total, numbers = 0.0, stream.fixed(cfg)
    for i in range(0, len(numbers), cfg.batch):
        batch = [t.to(device) for t in stream.windows(numbers[i : i + cfg.batch])]
        with torch.autocast(device.type, torch.bfloat16, cast):
            total += model(*batch).item() * len(batch[0])
    model.train()
    return total / len(numbers)


def train(cfg, given, model, tok, state):
    """model, tok: of a checkpoint, or None; state: load_run()'s of the run that goes on, or None. -> last val loss."""
    device, rank, world = pick_device(cfg)
    say = print if rank == 0 else lambda *a, **k: None
    if rank:
        dist.barrier()  # the first process downloads and prepares, the others find it done
    train_data, val_data, tok = load_data(cfg, given, tok)
    if world > 1 and not rank:
        dist.barrier()
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        Path(cfg.out, "log.csv").open("a").close()
    except OSError as e:
        bad(f"--out {cfg.out}: {e.strerror}")
    torch.manual_seed(cfg.seed)
    model = (model or Model(cfg)).to(device)
    model.cfg = cfg
    run = model.objective() if hasattr(model, "objective") else model  # a batch -> the loss
    cast, why = cfg.dtype == "bf16", "asked for"
    if cfg.dtype == "auto":
        cast, why = bf16_pays(device, run, [t.to(device) for t in train_data.batch(cfg, 0, 0, rank, world)])
    if world > 1:
        shared = [(cast, why)]
        dist.broadcast_object_list(shared)
        cast, why = shared[0]
    cfg.dtype = "bf16" if cast else "fp32"  # --resume stays with it: measured again, it could come out otherwise
    if hasattr(model, "prepare"):
        model.prepare(cast)
    if cfg.fsdp:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
        for part in [*(m for m in model.modules() if isinstance(m, Block)), model]:
            fully_shard(part, mesh=mesh)
    optimizers = make_optimizers(model, cfg)
    step, best, val, rows = 0, math.inf, None, []
    if state:
        rows = [r for r in csv.reader(open(f"{cfg.out}/log.csv", newline=""))
                if r and r[0].isdigit() and int(r[0]) <= state["step"]]
        # it was saved before its last evaluation
        step, best = state["step"], min([state["best"], *(float(r[4]) for r in rows if r[4])])
        for o, s in zip(optimizers, state["optimizers"]):
            if cfg.fsdp:
                D, how = sharded()
                D.set_optimizer_state_dict(model, o, s, options=how)
            else:
                try:
                    o.load_state_dict(s)
                except ValueError as e:
                    bad(f"--resume: the optimizer's state in {cfg.out} is of other tensors ({first_line(e)})")
        swap(optimizers)  # the weights on the disk are the averages
    run = run if cfg.fsdp or world == 1 else nn.parallel.DistributedDataParallel(run)
    run = torch.compile(run) if cfg.compile else run

    unit, seq = getattr(train_data, "unit", "token"), getattr(cfg, "seq", 1)
    per_step, params = cfg.batch * cfg.accum * seq, [p for p in model.parameters() if p.requires_grad]
    ops = sys.modules.get("kernels.norm")
    form = "plain PyTorch" if ops is None else f"kernels/ ({ops.form(params[0])})"
    about = (train_data.about() if unit != "token"
             else f"{train_data.tokens:,} training tokens, {cfg.tok}, vocabulary {cfg.vocab:,}")
    say(f"{ME}: {sum(p.numel() for p in params):,} trained parameters | {cfg.data}: {about}")
    say(f"{cfg.batch} x {seq} x {cfg.accum} = {per_step:,} {unit}s a step, {cfg.steps:,} steps | "
        f"{cfg.optim}, lr {cfg.lr:g}, seed {cfg.seed}")
    say(f"{device.type} x {world}, {torch.get_num_threads()} threads | {'bf16' if cast else 'fp32'} ({why}) | "
        f"{form}{' | compiled' * cfg.compile}")

    log = csv.writer(open(f"{cfg.out}/log.csv" if rank == 0 else os.devnull, "w", buffering=1, newline=""))
    log.writerows([("step", f"{unit}s", "seconds", "loss", "val", "lr", "norm", f"{unit[:3]}_s"), *rows])
    stop, before = [], float(rows[-1][2]) if rows else 0.0
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda *_: stop.append(1))
    wrong = torch.full((), -1, device=device)  # the first step whose loss or gradient was not finite
    halt = False  # stop, read once a step: a signal that comes later waits for the next
    begun, saved, start, mark = step, step if state else None, time.perf_counter(), (time.perf_counter(), step)
    while step < cfg.steps and not halt:
        lr, total = set_lr(optimizers, step, cfg), 0.0
        for micro in range(cfg.accum):
            batch = [t.to(device, non_blocking=True) for t in train_data.batch(cfg, step, micro, rank, world)]
            torch.manual_seed(hash((cfg.seed, step, micro, rank)) % 2**63)  # dropout is a function of the step, too
            last = micro == cfg.accum - 1
            if cfg.fsdp:
                model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or world == 1 or cfg.fsdp else run.no_sync():
                with torch.autocast(device.type, torch.bfloat16, cast):
                    loss = run(*batch) / cfg.accum
                loss.backward()
            total = total + loss.detach()
        norm = nn.utils.clip_grad_norm_(params, cfg.clip or math.inf)
        norm = norm.full_tensor() if cfg.fsdp else norm
        wrong = torch.where((wrong < 0) & ~(total + norm).isfinite(), step + 1, wrong)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        if world > 1:  # the mean loss; and all processes stop after the same step
            both = torch.stack([total / world, torch.full_like(total, len(stop))])
            dist.all_reduce(both)
            total, halt = both[0], both[1].item() > 0
        else:
            halt = bool(stop)
        due = step % cfg.eval_every == 0 or step == cfg.steps or halt
        if not (due or step % cfg.log_every == 0 or step == begun + 1 or device.type == "cpu"):
            continue  # from here on the GPU is waited for
        if wrong.item() >= 0:
            good = ("no checkpoint yet" if saved is None
                    else f"the last good checkpoint is step {saved} (--resume --out {cfg.out})")
            bad(f"step {wrong.item()}: the loss is not finite; {good}; a smaller --lr helps")
        if due:
            swap(optimizers)
            save(cfg, model, optimizers, tok, step, best)  # before evaluating: whatever happens there, the work is kept
            saved = step
        if due and not halt:
            val = evaluate(run, val_data, cfg, device, cast)
            best = min(best, val)
            if hasattr(model, "snapshot") and rank == 0 and not cfg.fsdp:
                model.snapshot(val_data.start(), step)
        if due:
            swap(optimizers)
        if due or step % cfg.log_every == 0 or step == begun + 1:
            now = time.perf_counter()
            speed, mark = per_step * (step - mark[1]) / (now - mark[0]), (now, step)
            left = (now - start) / (step - begun) * (cfg.steps - step)
            peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_mb()
            v = repr(val) if due and not halt else ""
            log.writerow((step, step * per_step, f"{before + now - start:.3f}", repr(total.item()), v, lr,
                          repr(norm.item()), f"{speed:.0f}"))
            shown = (f" | val {val:.4f}" if v else "") + (f" | {model.report()}" if hasattr(model, "report") else "")
            say(f"step {step}/{cfg.steps} | loss {total.item():.4f}{shown} | lr {lr:.1e} | norm {norm.item():.2f} | "
                f"{speed:,.0f} {unit[:3]}/s | {peak:,.0f} MB | {left:.0f} s left", flush=True)  # fmt: skip
    signal.signal(signal.SIGINT, signal.default_int_handler)  # everything is saved: from here on they end the program
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if halt:
        say(f"stopped after step {step}, saved: python {ME}.py --resume --out {cfg.out}")
    else:
        swap(optimizers)
        val = evaluate(run, val_data, cfg, device, cast) if val is None else val  # a run that had ended has none yet
        say(f"final val loss {val:.4f}, best {min(best, val):.4f}, "
            f"after {before + time.perf_counter() - start:.0f} s of training")
        if not cfg.fsdp and rank == 0:
            show(cfg, model, tok, val_data.start())
        say(f'the weights, train_state.pt and log.csv are in {cfg.out}; python {ME}.py --out {cfg.out} --sample "..."')
    if "RANK" in os.environ:
        dist.destroy_process_group()
    return val


def peak_mb():
    """The process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ----- end -----


# ----- sample (shared) -----
def draw(logits, cfg, generator):
    """logits (B, V) -> tokens (B, 1): the most likely, or drawn after temperature, top-k and top-p."""
    if cfg.temp < 1e-6:
        return logits.argmax(-1, keepdim=True)
    p = F.softmax(logits.float() / cfg.temp, dim=-1)
    if 0 < cfg.top_k < p.shape[-1]:
        p = p.where(p >= p.topk(cfg.top_k).values[:, -1:], 0)
    if cfg.top_p < 1:
        q, order = p.sort(dim=-1, descending=True)
        q = q.where(q.cumsum(-1) - q <= cfg.top_p * q.sum(-1, keepdim=True), 0)  # the one that crosses the line is kept
        p = torch.zeros_like(p).scatter(-1, order, q)
    return torch.multinomial(p, 1, generator=generator)


@torch.inference_mode()
def generate(model, tokens, cfg):
    """tokens (1, T) -> yields cfg.tokens times the next id and the cache or state; each costs one step()."""
    model.eval()
    generator = torch.Generator(tokens.device).manual_seed(cfg.seed)
    limit = model.context or math.inf  # a recurrent model has none
    seen, new, held, state, stop = tokens, tokens, 0, model.init_state(1), getattr(model, "stop", ())  # end-of-text ids
    for _ in range(cfg.tokens):
        if held + new.shape[1] > limit:  # the context is full: begin again with its later half
            held, new, state = 0, seen[:, -max(1, limit // 2) :], model.init_state(1)
        logits, state = model.step(new, state)
        held += new.shape[1]
        new = draw(logits, cfg, generator)
        seen = torch.cat([seen, new], 1) if model.context else new
        if new.item() in stop:
            break
        yield new.item(), state
    model.train()


def show(cfg, model, tok, ids):
    """Print what follows the array ids, as it is made; ids wait until they end a character."""
    if not len(ids) or ids.max() >= model.cfg.vocab:
        bad("--sample: the text is empty, or has a token that the model does not know")
    print(tok.decode(ids.tolist()), end="", flush=True)
    ids = torch.from_numpy(ids.astype(np.int64))[None]  # (1, T)
    waiting, count, state, start = [], 0, {}, time.perf_counter()
    for count, (i, state) in enumerate(generate(model, ids.to(next(model.parameters()).device), cfg), 1):
        waiting += [i] if i < tok.vocab else []  # a padded head can name tokens that do not exist
        if not (piece := tok.decode(waiting)).endswith("\ufffd") or len(waiting) > 8:
            print(piece, end="", flush=True)
            waiting = []
    print(tok.decode(waiting), flush=True)
    size, speed = sum(v.nbytes for v in state.values() if torch.is_tensor(v)), count / (time.perf_counter() - start)
    print(f"[{count:,} tokens, {speed:,.0f} a second, {size:,} bytes of state]", file=sys.stderr)


def sample(cfg, model, tok):
    if tok is None:
        bad("--sample: the checkpoint has no tokenizer; --tok names one")
    show(cfg, model, tok, tok.encode(cfg.sample))


SOURCES = dict(init=Model.from_pretrained)  # flags that name where a model comes from; flags that ask something of it
ACTIONS = dict(sample=sample)


# ----- end -----


# ----- packed weights: what this file can do with a model beside sampling -----
def packed_bytes(model):
    """-> a line of what the ternary weights take, and what else there is."""
    held = [t.nbytes for f in model.bit_linears().values() for t in f.packed()]
    bf16 = sum(8 * f.weight.numel() for f in model.bit_linears().values())
    return (f"ternary weights: {sum(held):,} bytes, 1/{bf16 / sum(held):.2f} of bf16; "
            f"embedding and norms: {sum(p.nbytes for p in model.parameters()):,} bytes")


def write_packed(cfg, model, tok):
    """--pack: the folder <out>/packed, which this file and transformers load."""
    if cfg.bits == 16:
        bad("--pack: a model of --bits 16 has no ternary weights")
    if model.is_packed():
        bad(f"--pack: the weights of {cfg.init or cfg.out} are packed already")
    folder = f"{cfg.out}/packed"
    try:
        model.pack().save_pretrained(folder)
    except OSError as e:
        bad(f"--out {cfg.out}: {e.strerror}")
    if tok:
        write_file(f"{folder}/tok.json",
                   lambda tmp: Path(tmp).write_text(json.dumps(dict(tok=tok.kind, chars=tok.chars))))
    size = Path(folder, "model.safetensors").stat().st_size
    print(f"{packed_bytes(model)}\n{folder}/model.safetensors: {size:,} bytes; "
          f'python {ME}.py --init {folder} --sample "..."')


def sample_packed(cfg, model, tok):
    """--sample: master weights are packed first, and are gone."""
    sample(cfg, model.pack() if cfg.bits == 2 else model, tok)
    if cfg.bits == 2:
        print(f"[in memory: {packed_bytes(model)}]", file=sys.stderr)


ACTIONS |= dict(sample=sample_packed, pack=write_packed)
# ----- end -----


# ----- main (shared) -----
def main(argv=None):
    preset, given = parse(argv)
    origins, actions = [k for k in SOURCES if given.get(k)], [k for k in ACTIONS if given.get(k, False) is not False]
    if len(origins) > 1 or len(actions) > 1:
        bad(f"{' and '.join(map(flag, origins if len(origins) > 1 else actions))}: one at a time")
    origin, action = next(iter(origins), None), next(iter(actions), None)
    out, model, tok, state = given.get("out", preset["out"]), None, None, None
    if given.get("resume") or action and not origin:
        state, wanted = load_run(out), "resume" if given.get("resume") else action
        if origin or state is None and (wanted == "resume" or not Path(out, "config.json").is_file()):
            reason = (f"{flag(origin)} starts another run: one of the two" if origin
                      else f"no run in {out}; --out names its folder")
            bad(f"{flag(wanted)}: {reason}")
        kept = {k: v for k, v in (state or {}).get("config", {}).items()
                if k in NAMES and k not in {*SOURCES, *ACTIONS, "resume"}}
        for k in [k for k in (*SIZES, "optim") if given.get("resume") and k in given and k in kept]:
            if (value := getattr(Config(**{k: given[k]}), k)) != kept[k]:
                bad(f"{flag(k)} {value}: the run in {out} has {kept[k]}; --init {out} starts another one")
        origin, source, preset = "init", out, preset | kept | dict(out=out)
    else:
        origin = origin or next((k for k in SOURCES if preset.get(k)), None)
        source = (preset | given).get(origin)
    if source:
        model = SOURCES[origin](source, **{k: v for k, v in (preset | given).items()
                                           if k not in SOURCES and (k in given or k not in SIZES)})
        source = source if isinstance(source, str) else source[0]
        tok = load_tokenizer(find_checkpoint(HUB.get(source, source)), getattr(model.cfg, "vocab", 0))
        tok = Tokenizer(given["tok"]) if tok and given.get("tok", tok.kind) != tok.kind else tok
        preset |= {k: getattr(model.cfg, k) for k in SIZES}
    cfg = Config(**preset | given)
    if not action:
        return train(cfg, given, model, tok, state if cfg.resume else None)
    device, rank, _ = pick_device(cfg)
    if rank == 0:
        ACTIONS[action](cfg, model.to(device), tok or (Tokenizer(cfg.tok) if getattr(cfg, "tok", "") else None))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
# ----- end -----
