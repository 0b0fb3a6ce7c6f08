"""
LoRA: fine-tune a language model through low-rank updates                              Hu et al. 2021, arXiv:2106.09685
      QLoRA: the base in 4 bits                                                   Dettmers et al. 2023, arXiv:2305.14314
      LLaMA-Adapter: learned prompts with a gate that starts at zero                Zhang et al. 2023, arXiv:2303.16199

Special: the base Llama (Touvron et al. 2023, arXiv:2302.13971) is frozen; a few million numbers are trained and saved.
    x      += W_o softmax(rope(q) rope(k)^T / sqrt(D) + mask) v      q, k, v = W_q h, W_k h, W_v h, h = RMSNorm(x)
    x      += W_down (silu(W_gate h) * W_up h)                       h = RMSNorm(x)
    lora    y = W h + (alpha / rank) B A h                           A (rank, in), B (out, rank) = 0 at first
    qlora   the same, W = NF4 levels times a scale per 64 weights    4.127 bits a weight (4.5 without kernels/)
    adapter y = Attention(h) + gate softmax(q (W_k p)^T / sqrt(D)) W_v p   prompts p (K, C), gate = 0 at first (PEFT)

Run:     python lora_finetune.py                                       no base needed: trains a tiny one, then adapts it
         python lora_finetune.py --init HuggingFaceTB/SmolLM2-135M-Instruct --data alpaca   any Llama or Mistral folder
         python lora_finetune.py --init meta-llama/Llama-2-7b-hf --method qlora --data my.jsonl --ckpt
         python lora_finetune.py --sample "Name three colours."        from out/lora_finetune: base and adapter
         python lora_finetune.py --merge out/merged                    one plain Hugging Face folder, without adapter
Data:    rows of {"text"}, {"instruction", "input", "output"}, {"messages": [{"role", "content"}]} or
         {"conversations": [{"from", "value"}]}, as JSON list or JSON lines; alpaca and sharegpt of data/; or a .txt.
         Only answers are in the loss.
Expect:  figures are in bench/RESULTS.md, each with its command.
Alone:   this file needs PyTorch, numpy and safetensors (tokenizers for a real base); faster with kernels/ beside it.
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
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
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
    from kernels.activation import swiglu
    from kernels.attention import attention
    from kernels.cross_entropy import linear_cross_entropy
    from kernels.matmul import linear
    from kernels.nf4 import dequantize_nf4, nf4_linear, quantize_nf4
    from kernels.norm import add_rms_norm, rms_norm
except ModuleNotFoundError:  # this file alone: the same operations in plain PyTorch

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

    def add_rms_norm(x, r, w, eps=1e-6):
        s = x + r
        return rms_norm(s, w, eps), s

    def swiglu(gate, up):
        return F.silu(gate) * up

    NF4 = torch.tensor([  # the quantiles of a normal distribution that QLoRA's appendix E defines
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ])  # fmt: skip

    def quantize_nf4(w):
        """Blocks of 64 weights, each the nearest level times the block's largest; here that scale stays in fp32."""
        blocks = w.detach().float().reshape(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        levels = torch.bucketize(blocks / absmax.clamp(min=1e-30), (NF4[1:] + NF4[:-1]) / 2).to(torch.uint8)
        return dict(packed=levels[:, ::2] << 4 | levels[:, 1::2], absmax=absmax, shape=w.shape)

    def dequantize_nf4(q, dtype=torch.float32):
        pairs = torch.stack([q["packed"] >> 4, q["packed"] & 15], 2).long()  # (blocks, 32, 2)
        return (NF4.to(pairs.device)[pairs].flatten(1) * q["absmax"]).view(q["shape"]).to(dtype)

    def nf4_linear(x, q):
        """x W^T; W is decoded again in backward instead of being kept."""
        return checkpoint(lambda x: F.linear(x, dequantize_nf4(q, x.dtype)), x, use_reentrant=False)


@dataclass
class Config:
    # the model: a Llama, as config.json describes it
    layers: int = 4  # blocks
    heads: int = 4  # query heads
    kv_heads: int = 2  # key and value heads, each shared by heads / kv_heads queries
    head_dim: int = 0  # head size D; 0: dim / heads
    dim: int = 128  # width C of the residual stream
    ffn: int = 344  # width inside the MLP
    vocab: int = 0  # rows of the embedding; 0: as many as the tokenizer has
    positions: int = 2048  # the longest sequence that the base was made for
    eps: float = 1e-5  # of RMSNorm
    theta: float = 10000.0  # base of the rotary frequencies
    rope: str = ""  # Llama 3.1's scaling as factor,low,high,original length; empty: none
    tied: bool = True  # the head is the embedding
    # the run
    preset: str = ""  # sizes and schedule together; default: cpu without a GPU, gpu with one
    method: str = "lora"  # lora | qlora (base in NF4) | adapter (LLaMA-Adapter) | full
    rank: int = 8  # of A and B
    alpha: float = 16.0  # the update is scaled by alpha / rank, with --rslora by alpha / sqrt(rank)
    rslora: bool = False  # Kalajdzievski 2023, arXiv:2312.03732
    targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # the layers that get A and B
    dropout: float = 0.0  # of what A sees
    prompts: int = 10  # --method adapter: prompts K a layer
    prompt: str = ""  # how a question is put: chat (tokenizer's template) | alpaca | plain; default: first that fits
    seq: int = 256  # tokens of a training row; short examples share one, longer ones are cut
    data: str = "docstrings"  # docstrings (of Python's library) | alpaca | sharegpt | .json, .jsonl, .txt file | shards
    tok: str = ""  # char | byte | gpt2 | a tokenizer.json, or its hub name; default: the base's
    batch: int = 16  # rows per micro-step, over all processes together
    accum: int = 1  # micro-steps whose gradients are summed into one step
    steps: int = 200  # optimizer steps
    lr: float = 2e-4  # peak learning rate
    lr_end: float = 0.0  # last learning rate, as a fraction of --lr; cosine in between
    warmup: int = 10  # steps of linear warm-up
    beta2: float = 0.999  # second moment's decay in AdamW
    wd: float = 0.0  # weight decay, on matrices only
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    optim: str = "adamw"  # adamw | muon (--method full: matrices inside blocks; AdamW for the rest) | adamw8bit
    seed: int = 1337  # of weights, batches and samples
    device: str = ""  # cpu | cuda | mps; default: the best there is
    dtype: str = "auto"  # auto (bf16 where it is faster here) | fp32 | bf16 (autocast, and the frozen base)
    compile: bool = False  # torch.compile
    ckpt: bool = False  # recompute each block in backward instead of keeping its activations
    fsdp: bool = False  # under torchrun: shard parameters, gradients and optimizer (FSDP2) instead of copying them
    out: str = ""  # folder of the run; default out/<file>
    resume: bool = False  # go on with the run in --out, bit for bit
    init: str = ""  # the base, or an adapter (ours or PEFT's): folder, file or hub name; tiny: one trained here and now
    eval_every: int = 100  # steps between evaluations and saves
    eval_iters: int = 16  # batches of an evaluation; always the same ones
    log_every: int = 10  # steps between progress lines
    merge: str = ""  # write the model of --out or --init, adapter merged into the base, to this folder
    sample: str = ""  # answer this, from --out or --init, instead of training
    tokens: int = 200  # how many to generate at most
    temp: float = 0.0  # temperature; 0: the most likely token
    top_k: int = 0  # draw from the k most likely; 0: from all
    top_p: float = 1.0  # draw from the most likely that make up this probability

    def __post_init__(self):
        if self.method not in ("lora", "qlora", "adapter", "full"):
            bad(f"--method {self.method}: one of lora, qlora, adapter, full")


REAL = dict(data="alpaca", rank=16, batch=1, accum=16, seq=1024, steps=1000, warmup=30, ckpt=True, optim="adamw8bit")
PRESETS = {
    "cpu": dict(init="tiny", batch=8, steps=150, lr=2e-3),  # a tiny base is trained first, for about a minute
    "gpu": dict(init="tiny", batch=4, accum=4, seq=1024, steps=1000, optim="adamw8bit"),
    # real bases; what a step of each needs: python bench/memory.py lora_finetune.py --preset 7B
    "135M": dict(init="HuggingFaceTB/SmolLM2-135M-Instruct", layers=30, heads=9, kv_heads=3, dim=576, ffn=1536,
                 vocab=49152, positions=8192, theta=1e5, **REAL),
    "3B": dict(init="meta-llama/Llama-3.2-3B", layers=28, heads=24, kv_heads=8, dim=3072, ffn=8192, vocab=128256,
               positions=131072, theta=5e5, rope="32,1,4,8192", **REAL),
    "7B": dict(init="meta-llama/Llama-2-7b-hf", layers=32, heads=32, kv_heads=32, dim=4096, ffn=11008, vocab=32000,
               positions=4096, tied=False, method="qlora", **REAL),
    # the tiny base: the whole model from random numbers, on the source of Python's own library
    "base": dict(method="full", layers=4, heads=4, kv_heads=2, dim=128, ffn=344, data="stdlib", tok="byte", seq=256,
                 batch=8, steps=400, lr=1e-2, wd=0.1, beta2=0.95, optim="muon", eval_every=400, tokens=100, temp=0.8),
}  # fmt: skip


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, C, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """y = W x + s B A dropout(x). W (out, in): fp32, bf16, or NF4 (then weight is None); B A only after add_lora()."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.nf4 = self.lora_A = self.lora_B = None

    def quantize(self):
        self.nf4, self.weight = quantize_nf4(self.weight.data), None

    def _apply(self, fn, recurse=True):  # .to(device) takes the NF4 tensors along
        super()._apply(fn, recurse)
        self.nf4 = self.nf4 and {k: fn(v) if torch.is_tensor(v) else v for k, v in self.nf4.items()}
        return self

    def add_lora(self, rank, scale, dropout):
        n_out, n_in = self.shape()
        self.scale, self.dropout = scale, dropout
        self.lora_A, self.lora_B = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)  # the first step is the base's

    def shape(self):
        return self.weight.shape if self.nf4 is None else self.nf4["shape"]

    def forward(self, x):
        rows = x.flatten(0, -2)  # (N, in), and y (N, out) is no view: a sum into a view would be copied in backward
        y = linear(rows, self.weight.to(x.dtype)) if self.nf4 is None else nf4_linear(rows, self.nf4)
        if self.lora_A is not None:
            h = F.linear(F.dropout(rows, self.dropout, self.training), self.lora_A.weight.to(x.dtype))  # (N, r)
            y.addmm_(h, self.lora_B.weight.to(h.dtype).t(), alpha=self.scale)  # no second (N, out) is made
        return y.view(*x.shape[:-1], -1)


def frequencies(cfg):
    """-> theta^(-2j / D) (D / 2), fp32; Llama 3.1: wavelengths beyond original length / low are stretched by factor."""
    D = cfg.head_dim or cfg.dim // cfg.heads
    f = cfg.theta ** (-torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    if cfg.rope:
        factor, low, high, length = map(float, cfg.rope.split(","))
        s = ((length * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: as it is, else blended
        f = (1 - s) * f / factor + s * f
    return f


def rotate(x, cos, sin):
    """x (B, T, H, D), pairs (x_j, x_{j + D/2}) turned by their position's angle; cos, sin (B or 1, T, 1, D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.D = cfg.head_dim or cfg.dim // cfg.heads
        self.q_proj = Linear(cfg.dim, cfg.heads * self.D)
        self.k_proj = Linear(cfg.dim, cfg.kv_heads * self.D)
        self.v_proj = Linear(cfg.dim, cfg.kv_heads * self.D)
        self.o_proj = Linear(cfg.heads * self.D, cfg.dim)
        self.adaption_prompt = None

    def add_adapter(self, K, C):
        self.adaption_prompt = nn.Parameter(torch.randn(1, K, C))
        self.adaption_gate = nn.Parameter(torch.zeros(1))  # the first step is the base's

    def forward(self, x, cos, sin, mask=None, cache=None, t=0):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.D) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (u.transpose(1, 2) for u in (rotate(q, cos, sin), rotate(k, cos, sin), v))  # (B, H or Hkv, T, D)
        if cache is not None:  # (2, B, Hkv, room, D): keys and values of the t tokens before x
            cache[0, :, :, t : t + T], cache[1, :, :, t : t + T] = k, v
            k, v = cache[:, :, :, : t + T].to(q.dtype)
        if mask is None:
            y = attention(q, k, v)
        else:
            k, v = (u.repeat_interleave(q.shape[1] // u.shape[1], 1) for u in (k, v))  # masked forms know no groups
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.adaption_prompt is not None:
            p = self.adaption_prompt.to(x.dtype)  # (1, K, C): no positions, every token sees all of them
            k, v = (f(p).view(1, p.shape[1], -1, self.D).transpose(1, 2).expand(B, -1, -1, -1)
                    for f in (self.k_proj, self.v_proj))
            y = y + self.adaption_gate.to(y.dtype) * F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = Linear(cfg.dim, cfg.ffn)
        self.up_proj = Linear(cfg.dim, cfg.ffn)
        self.down_proj = Linear(cfg.ffn, cfg.dim)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.dim, cfg.eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.eps)
        self.mlp = MLP(cfg)

    def forward(self, x, cos, sin, mask=None, cache=None, t=0):
        a = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, t)
        norm = self.post_attention_layernorm
        h, x = add_rms_norm(x, a, norm.weight, norm.eps)  # x = x + a, h = norm(x), in one pass
        return x + self.mlp(h)


class Model(nn.Module):
    """A Llama with the names of transformers' LlamaForCausalLM, and what --method adds to it."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.heads % cfg.kv_heads:
            bad(f"--kv-heads {cfg.kv_heads}: --heads {cfg.heads} must be divisible by it")
        if not cfg.head_dim and cfg.dim % (2 * cfg.heads):
            bad(f"--heads {cfg.heads}: --dim {cfg.dim} must be divisible by twice that (pairs are rotated)")
        if cfg.rope and not re.fullmatch(r"([\d.]+,){3}[\d.]+", cfg.rope):
            bad(f"--rope {cfg.rope}: four numbers as 8,1,4,8192 (factor, low, high, original length), or nothing")
        self.cfg, self.context, self.stop, self.base, self.config, self.world = cfg, cfg.positions, set(), "", {}, 1
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(cfg.vocab, cfg.dim)
        self.model.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.model.norm = RMSNorm(cfg.dim, cfg.eps)
        if not cfg.tied:
            self.lm_head = Linear(cfg.dim, cfg.vocab)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.layers)
                                       if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02)
        self.adapt(cfg)

    def head(self):
        return (self.model.embed_tokens if self.cfg.tied else self.lm_head).weight

    def blocks(self, tokens, segments=None, caches=None, t=0):
        """tokens (B, T) at positions t..t+T-1 -> the normed stream (B, T, C). segments (B, T): the example that each
        belongs to, when several share a row; positions then begin again with each, and attention stays inside."""
        B, T = tokens.shape
        at, mask = torch.arange(t, t + T, device=tokens.device), None
        if segments is not None:
            new = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
            at = at - torch.where(new, at, 0).cummax(1).values  # (B, T)
            mask = (segments[:, None, :] == segments[:, :, None]).tril()[:, None]  # (B, 1, T, T)
        angle = at.view(-1, T, 1, 1) * frequencies(self.cfg).to(tokens.device, non_blocking=True)  # (B or 1, T, 1, D/2)
        cos, sin = angle.cos(), angle.sin()
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        for i, block in enumerate(self.model.layers):
            if self.cfg.ckpt and self.training:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, None if caches is None else caches[i], t)
        return self.model.norm(x)

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, V); with targets (B, T), where -1 is ignored: the mean loss, a fp32 scalar.
        tokens may be (B, 2, T): with the segments of blocks()."""
        x = self.blocks(*(tokens.unbind(1) if tokens.ndim == 3 else [tokens]))
        if targets is None:
            return linear(x, self.head().to(x.dtype))
        share = 1.0
        if self.training and self.world > 1:  # the mean over the answers of all processes, whose gradients are averaged
            own = (targets != -1).sum()
            dist.all_reduce(total := own.clone())
            share = own * self.world / total.clamp(min=1)
        # questions are not in the loss: no logits for them (a GPU would have to wait for their number)
        if not x.is_cuda and targets.min().item() < 0:
            x, targets = x[targets != -1], targets[targets != -1]
        return linear_cross_entropy(x, self.head(), targets) * share

    def init_state(self, batch):
        """A cache (L, 2, B, Hkv, room, D) that grows by doubling, and the number of tokens in it."""
        c, p = self.cfg, self.model.embed_tokens.weight
        return {"kv": torch.zeros(c.layers, 2, batch, c.kv_heads, 64, c.head_dim or c.dim // c.heads,
                                  dtype=p.dtype, device=p.device), "t": 0}

    def step(self, tokens, state):
        """The next tokens (B, T') -> logits (B, V) after the last of them, and the state."""
        t, end, room = state["t"], state["t"] + tokens.shape[1], state["kv"].shape[4]
        if end > self.context:
            raise ValueError(f"{end} tokens do not fit the {self.context} positions")
        if end > room:
            state["kv"] = F.pad(state["kv"], (0, 0, 0, max(end, 2 * room) - room))
        x = self.blocks(tokens, None, state["kv"], t)
        state["t"] = end
        return linear(x[:, -1], self.head().to(x.dtype)), state

    def adapt(self, cfg, layers=0):
        """Freeze the base and add what cfg.method trains; layers: how many of the last ones get prompts, 0: all."""
        if cfg.method == "full":
            return
        self.requires_grad_(False)
        if cfg.rank < 1 or cfg.prompts < 1:
            bad(f"--rank {cfg.rank}, --prompts {cfg.prompts}: must be positive")
        if cfg.method == "adapter":
            self.adapter = dict(peft_type="ADAPTION_PROMPT", adapter_len=cfg.prompts,
                                adapter_layers=layers or cfg.layers)
            for block in self.model.layers[-self.adapter["adapter_layers"] :]:
                block.self_attn.add_adapter(cfg.prompts, cfg.dim)
            return
        names = cfg.targets.split(",")
        how = dict(r=cfg.rank, lora_alpha=cfg.alpha, use_rslora=cfg.rslora, lora_dropout=cfg.dropout,
                   target_modules=names)
        self.adapter = dict(peft_type="LORA", bias="none", fan_in_fan_out=False) | how
        found = {n: m for n, m in self.model.named_modules() if isinstance(m, Linear)}
        for name in names:
            if not any(n.endswith("." + name) for n in found):
                bad(f"--targets {name}: one or more of {','.join(sorted({n.split('.')[-1] for n in found}))}")
        for n, m in found.items():
            if cfg.method == "qlora" and m.nf4 is None:
                m.quantize()
            if n.split(".")[-1] in names:
                m.add_lora(cfg.rank, cfg.alpha / (cfg.rank**0.5 if cfg.rslora else cfg.rank), cfg.dropout)

    def prepare(self, cast):
        """Called when the run's dtype is known: a frozen base is held in bf16 then, not cast at each use."""
        if self.cfg.seq > self.context:
            bad(f"--seq {self.cfg.seq}: the base was made for {self.context} tokens at most")
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        for p in self.parameters() if cast else ():
            if not p.requires_grad:
                p.data = p.data.bfloat16()

    def param_groups(self, weight_decay):
        """What is trained: matrices decay, vectors do not."""
        own = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        inner = [p for n, p in own if p.ndim == 2 and ".layers." in n]
        outer = [p for n, p in own if p.ndim == 2 and ".layers." not in n]
        return [
            dict(params=inner, weight_decay=weight_decay, matrix=not hasattr(self, "adapter")),
            dict(params=outer, weight_decay=weight_decay),
            dict(params=[p for _, p in own if p.ndim != 2], weight_decay=0.0),
        ]

    def hf_config(self):
        """config.json as transformers' LlamaForCausalLM reads it; of a loaded base, its own with the dtype of now."""
        if self.config:
            return ({k: v for k, v in self.config.items() if k != "dtype"}
                    | dict(torch_dtype=str(self.head().dtype).removeprefix("torch.")))
        c, rope = self.cfg, dict(rope_theta=self.cfg.theta, rope_type="default")
        if c.rope:
            factor, low, high, length = map(float, c.rope.split(","))
            rope |= dict(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
                         original_max_position_embeddings=int(length))
        return dict(
            model_type="llama", architectures=["LlamaForCausalLM"], num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim or c.dim // c.heads,
            hidden_size=c.dim, intermediate_size=c.ffn, vocab_size=c.vocab, max_position_embeddings=c.positions,
            rms_norm_eps=c.eps, rope_theta=c.theta, rope_parameters=rope, tie_word_embeddings=c.tied,
            rope_scaling=rope if c.rope else None, hidden_act="silu", attention_bias=False, mlp_bias=False,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, source, method="full", **overrides):
        """source: a Hugging Face folder or hub name of a Llama or Mistral, or of an adapter, which names its base.
        method and the Config fields of adapters (rank, alpha, targets, ...): what to add; "full": nothing. Tensors are
        read one by one, for "qlora" quantised one by one; on a GPU, or with dtype="bf16", a frozen base is in bf16."""
        path = find_checkpoint(source)
        adapter = read_json(path / "adapter_config.json") if is_adapter(path) else None
        base = source if adapter is None else adapter.get("base_model_name_or_path")
        if not base or not isinstance(base, str | Path):
            bad(f"{path}: adapter_config.json does not name its base (base_model_name_or_path)")
        frozen = adapter is not None or method != "full"
        model = cls.read_base(find_checkpoint(base), dict(method=method) | overrides, frozen)
        model.base = str(base)
        if adapter is None:
            model.adapt(model.cfg)
            return model
        model.load_adapter(path)
        if not [f for f in ("tok.json", "tokenizer.json") if (path / f).is_file()]:
            HUB[source] = base  # where its tokenizer is
        return model

    @classmethod
    def read_base(cls, path, overrides, frozen):
        """A folder's model, tensor by tensor, without what --method adds. --merge: as on disk, mapped, not read."""
        config = read_json(path / "config.json")
        cfg = dataclasses.replace(llama_config(config, path), **overrides)
        on_gpu = cfg.device == "cuda" or not cfg.device and torch.cuda.is_available()
        dtype = torch.bfloat16 if frozen and (cfg.dtype == "bf16" or cfg.dtype == "auto" and on_gpu) else torch.float32
        with torch.device("meta"):
            model = cls(dataclasses.replace(cfg, method="full"))
        model.cfg, model.config, model.stop = cfg, config, stop_ids(path)
        modules, missing = dict(model.named_modules()), {n for n, _ in model.named_parameters()}
        for name, tensor in tensors_of(path):
            if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight" and cfg.tied:
                continue
            if name not in missing:
                bad(f"{path}: unknown tensor {name}")
            missing.remove(name)
            where, _, what = name.rpartition(".")
            module = modules[where]
            if tensor.shape != getattr(module, what).shape:
                bad(f"{path}: {name} is {tuple(tensor.shape)}, but {tuple(getattr(module, what).shape)} is asked for")
            setattr(module, what, nn.Parameter(tensor if cfg.merge or cfg.method == "qlora" else tensor.to(dtype)))
            if cfg.method == "qlora" and not cfg.merge:
                module.quantize() if isinstance(module, Linear) and where != "lm_head" else module.to(dtype)
        if missing:
            bad(f"{path}: no tensor {min(missing)}")
        return model.requires_grad_(not frozen)

    def save_pretrained(self, folder, tensors=None, **how):
        """An adapter in PEFT's form (adapter_model.safetensors, adapter_config.json),
        or the whole model as LlamaForCausalLM reads it."""
        tensors = self.state_dict() if tensors is None else tensors
        if not hasattr(self, "adapter"):
            write_weights(folder, tensors, self.hf_config(), **how)
            return None if how.get("new") else drop_adapter(folder)  # new: they are not in their place yet; see save()
        own = {n for n, p in self.named_parameters() if p.requires_grad}
        tensors = {f"base_model.model.{k}": v for k, v in tensors.items() if k in own}
        config = dict(base_model_name_or_path=self.base, task_type="CAUSAL_LM", inference_mode=True) | self.adapter
        write_weights(folder, tensors, config, name="adapter_model", **how)

    def save_adapter(self, folder):
        """adapter_model.safetensors, adapter_config.json: peft.PeftModel.from_pretrained(base, folder) loads them."""
        self.save_pretrained(folder)

    def load_adapter(self, folder):
        """An adapter of ours or of PEFT's (LoRA or adaption prompt) onto this base;
        what it says and holds must fit, by name and shape."""
        path = Path(folder)
        config = read_json(path / "adapter_config.json")
        unknown = {k: config[k] for k in ("use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias")
                   if config.get(k)}
        if (unknown or config.get("bias", "none") != "none"
                or config.get("peft_type") not in ("LORA", "ADAPTION_PROMPT")):
            bad(f"{path}: adapter_config.json asks for {unknown or config.get('peft_type')}, "
                f"bias {config.get('bias')}, which this file does not have")
        prompts, number = config["peft_type"] == "ADAPTION_PROMPT", lambda v: type(v) in (int, float) and v > 0
        for key in ("adapter_len", "adapter_layers") if prompts else ("lora_alpha",):
            if not number(v := config.get(key)) or prompts and type(v) is not int:
                bad(f"{path}: {key} is {v!r} in adapter_config.json; a {'whole ' * prompts}number above 0 is asked for")
        alphas, dropout = config.get("alpha_pattern") or {}, config.get("lora_dropout") or 0.0
        if not isinstance(alphas, dict) or not all(map(number, alphas.values())):
            bad(f"{path}: alpha_pattern is {alphas!r} in adapter_config.json; names with a number each are asked for")
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            bad(f"{path}: lora_dropout is {dropout!r} in adapter_config.json; it must be at least 0 and less than 1")
        try:
            files = [f for f in (path / "adapter_model.safetensors", path / "adapter_model.bin") if f.is_file()]
            found = (load_file(files[0]) if files[0].suffix == ".safetensors"
                     else torch.load(files[0], map_location="cpu", weights_only=True))
            found = {k.removeprefix("base_model.model."): v for k, v in found.items()}
        except Exception as e:
            bad(f"{path}: no adapter_model.safetensors, or it is damaged ({type(e).__name__})")
        if prompts:
            self.adapt(dataclasses.replace(self.cfg, method="adapter", prompts=config["adapter_len"]),
                       config["adapter_layers"])
        else:
            self.requires_grad_(False)
            modules = {n: m for n, m in self.named_modules() if isinstance(m, Linear)}
            for k, A in found.items():  # which modules, and of which rank: the file knows, whatever patterns made it
                name = k.removesuffix(".lora_A.weight")
                if name in modules and name != k:
                    if A.ndim != 2 or not len(A):
                        bad(f"{path}: {k} is {tuple(A.shape)}; (rank, in) is asked for")
                    alpha = next((v for p, v in alphas.items() if re.match(rf"(.*\.)?({p})$", name)),
                                 config["lora_alpha"])
                    modules[name].add_lora(len(A), alpha / (len(A) ** 0.5 if config.get("use_rslora") else len(A)),
                                           dropout)
        self.adapter = config
        own = {n: p for n, p in self.named_parameters() if p.requires_grad}
        for k in sorted(own.keys() | found.keys()):
            if k not in found or k not in own:
                bad(f"{path}: {'no tensor' if k in own else 'unknown tensor'} {k}; is it an adapter of another base?")
            if found[k].shape != own[k].shape:
                bad(f"{path}: {k} is {tuple(found[k].shape)}, but the base asks for {tuple(own[k].shape)}: "
                    "an adapter of another base")
            own[k].data = found[k].float()


HUB = {}
TOK = {}


def is_adapter(path):
    """Whether a folder is an adapter's. adapter_config.json beside a whole model and without weights of its own is of
    a run that ended before its first save was done."""
    weights = (path / "adapter_model.safetensors").is_file() or (path / "adapter_model.bin").is_file()
    return (path / "adapter_config.json").is_file() and (weights or not (path / "config.json").is_file())


def drop_adapter(folder):
    """Where a whole model was saved into an adapter's folder: the adapter, which would be preferred, goes."""
    for f in ("adapter_config.json", "adapter_model.safetensors"):
        Path(folder, f).unlink(missing_ok=True)


def read_json(path):
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        bad(f"{path}: not found; a base is a folder with config.json and model.safetensors, "
            "an adapter one with adapter_config.json")
    except OSError as e:
        bad(f"{path}: {e.strerror}")
    except ValueError as e:
        bad(f"{path}: damaged ({e})")
    if not isinstance(found, dict):
        bad(f"{path}: damaged (a {type(found).__name__}, where an object was expected)")
    return found


def llama_config(c, path):
    """config.json -> Config; what is no Llama is named and refused."""
    c = {k: v for k, v in c.items() if v is not None}
    if c.get("model_type") not in ("llama", "mistral"):
        bad(f"{path}: model_type is {c.get('model_type')!r}; this file knows llama and mistral")
    for key, value in dict(hidden_act="silu", attention_bias=False, mlp_bias=False).items():
        if c.get(key, value) != value:
            bad(f"{path}: {key} = {c[key]!r} in config.json; a Llama has {value!r}")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        bad(f"{path}: rope_parameters, or rope_scaling, is {rope!r} in config.json; an object was expected")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        bad(f"{path}: rope_type {kind!r} in config.json; default and llama3 are known")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    whole = ("num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_size intermediate_size "
             "vocab_size max_position_embeddings sliding_window").split()
    numbers = dict.fromkeys(whole, (int,)) | dict.fromkeys(("rms_norm_eps", "rope_theta", *keys), (int, float))
    for key, v in [*c.items(), *rope.items()]:
        if key in numbers and (type(v) not in numbers[key] or v <= 0):
            bad(f"{path}: {key} is {v!r} in config.json; a {'whole ' * (key in whole)}number above 0 is asked for")
    try:
        return Config(
            layers=c["num_hidden_layers"], heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"], head_dim=c.get("head_dim") or 0,
            dim=c["hidden_size"], ffn=c["intermediate_size"], vocab=c["vocab_size"],
            positions=min(c.get("max_position_embeddings", 2048), c.get("sliding_window") or 2**31),
            eps=c["rms_norm_eps"], theta=float(c.get("rope_theta") or rope.get("rope_theta", 10000.0)),
            tied=bool(c.get("tie_word_embeddings", False)),
            rope=",".join(f"{rope[k]:g}" for k in keys) if kind == "llama3" else "",
        )  # fmt: skip
    except KeyError as e:
        bad(f"{path}: config.json has no {e}, so this is no Llama")


def tensors_of(path):
    """The tensors of a folder's safetensors files one by one -> name, tensor."""
    index = path / "model.safetensors.index.json"
    try:
        files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        files = [str(Path(f)) for f in files]
    except (KeyError, AttributeError, TypeError) as e:
        bad(f"{index}: damaged ({e})")
    for f in files:
        try:
            tensors = safe_open(path / f, "pt")
        except FileNotFoundError:
            bad(f"{path / f}: not found" + ("; the index names it: a shard is missing" if index.is_file() else ""))
        except Exception as e:  # each library has its own
            bad(f"{path / f}: damaged ({first_line(e)})")
        with tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)


def stop_ids(folder):
    """The tokens that end an answer, as the base's own files name them; byte 0 in a base of bytes."""
    found = {0} if (folder / "tok.json").is_file() and read_json(folder / "tok.json").get("tok") == "byte" else set()
    for f in ("generation_config.json", "config.json"):
        if (folder / f).is_file():
            ids = read_json(folder / f).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(type(i) is int for i in ids):
                bad(f"{folder / f}: eos_token_id is {ids}; a token's number, or a list of them, is asked for")
            found |= set(ids)
    return found


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


# ----- instructions: what this file has of its own between the shared sections -----
ROLES = dict(human="user", user="user", gpt="assistant", assistant="assistant", system="system")


def docstrings():
    """Instructions that every machine has: functions of Python's library, and the first line of their docstrings."""
    seen = set()
    for f in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with contextlib.suppress(SyntaxError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for node in ast.walk(ast.parse(f.read_text(errors="replace"))):
                if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
                    row = f"def {node.name}({ast.unparse(node.args)}):", doc.splitlines()[0]
                    if row not in seen and len("".join(row)) < 200:
                        seen.add(row)
                        yield dict(instruction="What does this Python function do?", input=row[0], output=row[1])


def read_rows(path):
    """A JSON list, or JSON lines -> (where a row stands, the row)."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # some editors begin a file with a mark
    except OSError as e:
        bad(f"--data {path}: {e.strerror}")
    except UnicodeDecodeError:
        bad(f"--data {path}: not UTF-8")
    try:
        if text.lstrip().startswith("["):
            return [(f"item {i}", row) for i, row in enumerate(json.loads(text))]
        rows, i = [], 0
        for i, line in enumerate(text.split("\n"), 1):  # splitlines() would cut strings at U+2028 and others
            rows += [(f"line {i}", json.loads(line))] if line.strip() else []
        return rows
    except ValueError as e:
        bad(f"--data {path}: {'' if text.lstrip().startswith('[') else f'line {i}: '}no JSON ({e})")


def conversation(row, where):
    """A row in any form -> [{"role", "content"}, ...] that ends with an answer; {"text"} is one without a question."""
    if not isinstance(row, dict):
        bad(f"{where}: a {type(row).__name__}, where an object was expected")
    try:
        if "text" in row:
            turns = [dict(role="assistant", content=row["text"])]
        elif "output" in row:
            turns = [dict(role="user", content=row["instruction"], input=row.get("input", "")),
                     dict(role="assistant", content=row["output"])]
        elif "messages" in row:
            turns = [dict(role=ROLES[t["role"]], content=t["content"]) for t in row["messages"]]
        elif "conversations" in row:
            turns = [dict(role=ROLES[t["from"]], content=t["value"]) for t in row["conversations"]]
        else:
            bad(f"{where}: a row has instruction and output, or messages, or conversations, or text; "
                f"this one has {', '.join(row) or 'nothing'}")
    except (KeyError, TypeError) as e:
        bad(f"{where}: {e} is missing, or unknown as a role")
    if not all(isinstance(v, str) for t in turns for v in t.values()):
        bad(f"{where}: a text in it is no string")
    while len(turns) > 1 and turns[0]["role"] == "assistant":  # as Vicuna does: nothing was asked
        turns = turns[1:]
    last = max((i for i, t in enumerate(turns) if t["role"] == "assistant" and t["content"]), default=None)
    if last is None:
        bad(f"{where}: there is no answer in it")
    return turns[: last + 1]


class Prompts:
    """How a conversation becomes tokens: chat (the tokenizer's Jinja template), alpaca (Taori et al. 2023) or plain."""

    def __init__(self, tok, how, stop=()):
        self.tok, self.begin, self.chat, folder = tok, [], None, Path(tok.kind).parent
        config, stop = {}, set(stop) or ({0} if tok.kind == "byte" else set())
        if tok.kind.endswith(".json"):
            import tokenizers

            hf = tokenizers.Tokenizer.from_file(tok.kind)
            self.begin = hf.encode("").ids  # what its post-processor puts first
            config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
            config = {k: v["content"] if isinstance(v, dict) and "content" in v else v for k, v in config.items()}
            stop = stop or stop_ids(folder) or {hf.token_to_id(config.get("eos_token") or "")} - {None}
            if (folder / "chat_template.jinja").is_file():
                self.chat = (folder / "chat_template.jinja").read_text()
            elif isinstance(config.get("chat_template"), str):
                self.chat = config["chat_template"]
        self.how = how or ("chat" if self.chat else "plain" if tok.kind == "byte" else "alpaca")
        if self.how not in ("chat", "alpaca", "plain"):
            bad(f"--prompt {how}: one of chat, alpaca, plain")
        if self.how == "chat" and not self.chat:
            bad(f"--prompt chat: the tokenizer {tok.kind} has no chat template; --prompt alpaca needs none")
        self.special = {k: config.get(k) or "" for k in ("bos_token", "eos_token", "unk_token", "pad_token")}
        if not stop:
            bad(f"--tok {tok.kind}: no token ends an answer (eos_token_id in the base's config.json); "
                "--tok byte has byte 0")
        self.stop, self.end = stop, min(stop)

    @functools.cached_property
    def template(self):
        from jinja2 import TemplateError, sandbox

        def refuse(message):
            raise TemplateError(message)

        world = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                      extensions=["jinja2.ext.loopcontrols"])
        world.globals |= dict(raise_exception=refuse, strftime_now=time.strftime)
        world.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        return world.from_string(self.chat)

    def render(self, turns, ask):
        said = [dict(role=t["role"], content="\n".join(filter(None, (t["content"], t.get("input"))))) for t in turns]
        try:
            return self.template.render(messages=said, add_generation_prompt=ask, tools=None, documents=None,
                                        **self.special)
        except Exception as e:  # a template is a program
            bad(f"--prompt chat: the tokenizer's template refuses a conversation ({e}); --prompt alpaca takes any")

    def pieces(self, turns):
        """-> (text, whether it is an answer, whether the end token follows) in order; an open question may be last."""
        if self.how == "chat" and turns[0]["role"] != "assistant":
            done = ""
            for i in range(1, len(turns) + 1):
                answered = i < len(turns) and turns[i]["role"] == "assistant"
                if answered or i == len(turns) and turns[-1]["role"] != "assistant":
                    ask = self.render(turns[:i], True)
                    whole = self.render(turns[: i + 1], False) if answered else ask
                    if not ask.startswith(done) or not whole.startswith(ask):
                        bad("--prompt chat: the tokenizer's template rewrites what was said before; "
                            "--prompt alpaca does not")
                    yield ask.removeprefix(done), False, False
                    yield whole.removeprefix(ask), True, False  # the template has its own end
                    done = whole
            return
        for i, t in enumerate(turns):
            given = t.get("input", "")
            if t["role"] == "assistant":
                yield t["content"], True, True
            elif self.how == "plain" or t["role"] == "system":
                yield "\n".join(filter(None, (t["content"], given))) + "\n", False, False
            else:
                task = ("Below is an instruction that describes a task"
                        + (", paired with an input that provides further context" if given else ""))
                task = (f"{task}. Write a response that appropriately completes the request.\n\n" if i == 0
                        else "\n\n")
                given = f"### Input:\n{given}\n\n" if given else ""
                yield f"{task}### Instruction:\n{t['content']}\n\n{given}### Response:", False, False

    def encode(self, turns):
        """-> ids, and which are answers: pieces are encoded one by one, as they are when a question is really asked."""
        begin = [] if self.how == "chat" and turns[0]["role"] != "assistant" else self.begin  # a template has its own
        ids, answer = list(begin), [False] * len(begin)
        for text, is_answer, ends in self.pieces(turns):
            new = [*self.tok.encode(text).tolist(), *[self.end] * ends]
            ids, answer = ids + new, answer + [is_answer] * len(new)
        return np.array(ids, np.int32), np.array(answer)


class Examples:
    """Encoded conversations in rows of seq tokens: whole ones share a row as they fit, each with its segment number."""

    def __init__(self, encoded, cfg, name):
        self.first = encoded[0]
        order = np.random.default_rng(cfg.seed).permutation(len(encoded))
        rows, room, dropped = [], 0, 0
        for i in order:
            ids, answer = (part[: cfg.seq + 1] for part in encoded[i])
            if answer[1:].any():  # one whose question fills the row teaches nothing
                if len(ids) - 1 > room:
                    rows, room = [*rows, []], cfg.seq
                rows[-1].append((ids, answer))
                room -= len(ids) - 1
            else:
                dropped += 1
        if not rows:
            bad(f"--seq {cfg.seq}: no answer of the {name} split of --data {cfg.data} begins within it")
        if dropped:
            print(f"{dropped:,} of {len(encoded):,} examples for {name} are left out: "
                  f"the question alone fills --seq {cfg.seq}")
        self.x, self.y = np.zeros((len(rows), 2, cfg.seq), np.int32), np.full((len(rows), cfg.seq), -1, np.int32)
        self.x[:, 1] = -1
        for row, x, y in zip(rows, self.x, self.y):
            at = 0
            for n, (ids, answer) in enumerate(row):
                end = at + len(ids) - 1
                x[0, at:end], x[1, at:end], y[at:end] = ids[:-1], n, np.where(answer[1:], ids[1:], -1)
                at = end
        self.tokens = int((self.y >= 0).sum())

    def windows(self, numbers):
        """Row numbers (n) -> tokens with their segments (n, 2, T), targets (n, T) with -1 where no answer is, int64.
        Where no row holds two examples, tokens alone (n, T): what fills a row comes after all that is in the loss."""
        x, y = self.x[numbers].astype(np.int64), self.y[numbers].astype(np.int64)
        return torch.from_numpy(x if x[:, 1].max() > 0 else x[:, 0].copy()), torch.from_numpy(y)

    def batch(self, cfg, step, micro, rank, world):
        """A pure function of (seed, step, micro): epoch after epoch, each row once in an order of its own."""
        n = (step * cfg.accum + micro) * cfg.batch + np.arange(cfg.batch)
        orders = {e: np.random.default_rng((cfg.seed, e)).permutation(len(self.x)) for e in set(n // len(self.x))}
        return self.windows([orders[i // len(self.x)][i % len(self.x)] for i in n[rank::world]])

    def fixed(self, cfg):
        return np.arange(min(len(self.x), cfg.eval_iters * cfg.batch))

    def start(self):
        """The first question; of a text without one, its first token."""
        ids, answer = self.first
        return ids[: max(1, int(answer.argmax()))]


def load_data(cfg, given, tok):
    """Instruction data -> (training Examples, validation Examples, Tokenizer); anything else as other files read it."""
    if not (cfg.data in ("docstrings", "alpaca", "sharegpt") or cfg.data.endswith((".json", ".jsonl"))):
        return load_text(cfg, given, tok)
    if tok is None and not cfg.tok:
        bad(f"--data {cfg.data}: the base brings no tokenizer; --tok names one")
    tok = tok or Tokenizer(cfg.tok)
    cfg.tok, cfg.vocab = tok.kind, cfg.vocab or tok.vocab
    if cfg.data == "docstrings":
        rows = [(f"docstring {i}", row) for i, row in enumerate(docstrings())]
    elif cfg.data.endswith((".json", ".jsonl")):
        rows = read_rows(cfg.data)
    else:
        folder = prepared(dataclasses.replace(cfg, tok="byte"), given, tok)
        parts = [read_rows(folder / f"{split}.jsonl") for split in ("train", "val")]
        parts = [[r for r in part if r[1].get("output", True)] for part in parts]  # some of Stanford's have no answer
        rows = sum(parts, [])
    prompts = Prompts(tok, cfg.prompt)
    encoded = [prompts.encode(conversation(row, f"--data {cfg.data}: {where}")) for where, row in rows]
    if len(encoded) < 2:
        bad(f"--data {cfg.data}: {len(encoded)} rows, at least 2 are needed: the last tenth is for validation")
    if max(int(ids.max()) for ids, _ in encoded) >= cfg.vocab:
        bad(f"--tok {tok.kind}: it has tokens that the base, of {cfg.vocab:,}, does not know")
    cut = len(parts[0]) if cfg.data in ("alpaca", "sharegpt") else min(len(encoded) - 1, math.ceil(len(encoded) * 0.9))
    return Examples(encoded[:cut], cfg, "train"), Examples(encoded[cut:], cfg, "val"), tok


# ----- schedule (shared) -----
def schedule(step, cfg):
    """-> factors of --lr and --wd: linear warm-up to 1, then half a cosine down to lr_end; the decay stays."""
    r = min(1.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup))
    lr = (step + 1) / (cfg.warmup + 1) if r < 0 else cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * r))
    return lr, 1.0


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


# ----- what can be asked of a fine-tuned model -----
def save(cfg, model, *how, shared=save):
    """Last, as until then the folder is the old run: an adapter in it goes when a whole model was saved there."""
    shared(cfg, model, *how)
    if int(os.environ.get("RANK", 0)) == 0 and not hasattr(model, "adapter"):
        drop_adapter(cfg.out)


def load_run(out, shared=load_run):
    """What save() left; a kill may have come before its last step."""
    state = shared(out)
    if state and state["config"].get("method") == "full":
        drop_adapter(out)
    return state


ASKED = {}  # the flags that were given


def parse(argv=None, shared=parse):
    preset, given = shared(argv)
    ASKED.clear()
    ASKED.update(given)
    return preset, given


# what an adapter says of itself, as flags: one that says otherwise is a mistake
OWN = dict(rank="r", alpha="lora_alpha", rslora="use_rslora", targets="target_modules", dropout="lora_dropout",
           prompts="adapter_len")


def check_asked(asked, adapter, source):
    """Flags that were given with an adapter, which was made with others: they would change nothing."""
    methods = ["adapter"] if adapter.get("peft_type") == "ADAPTION_PROMPT" else ["lora", "qlora"]
    if asked.get("method", methods[0]) not in methods:
        bad(f"--method {asked['method']}: {source} is an adapter, made with --method {methods[0]}; "
            "without that flag it is used as it is")
    for k, name in OWN.items():
        has, want = adapter.get(name), asked.get(k)
        if k == "targets" and isinstance(has, list) and want:
            has, want = ",".join(sorted(has)), ",".join(sorted(want.split(",")))
        if k in asked and name in adapter and want != (bool(has) if k == "rslora" else has):
            bad(f"{flag(k)} {asked[k]}: {source} is an adapter, made with {has}; without that flag it is used as it is")


def base_or_adapter(source, **overrides):
    """--init; "tiny" is a base made on the spot, so that the file runs on a machine that has none and reaches none."""
    method, out, asked = overrides.get("method", Config.method), overrides.get("out"), dict(ASKED)
    if overrides.get("optim") == "muon" and method != "full":
        bad("--optim muon: it is for whole matrices (--method full); adamw and adamw8bit train adapters")
    if source == "tiny":
        source = HUB["tiny"] = f"{out}/base"
        if "RANK" in os.environ:
            bad("--init tiny: under torchrun name a base, a folder or a hub name")
        made = load_run(source)
        if made is None or made["step"] < made["config"]["steps"]:
            print(f"!!! no --init: training a tiny base first, into {source}; "
                  "--init HuggingFaceTB/SmolLM2-135M-Instruct would name a real one")
            how = ["--preset", "base"] if made is None else ["--resume"]
            main([*how, "--out", source, *(["--device", overrides["device"]] if overrides.get("device") else [])])
            if load_run(source)["step"] < PRESETS["base"]["steps"]:  # somebody stopped it
                raise SystemExit(0)
            print(f"!!! the base is made; now --method {method} adapts it to --data {overrides.get('data')}")
    torch.manual_seed(overrides.get("seed", Config.seed))  # A is random
    if is_adapter(path := find_checkpoint(source)):
        if method == "full":
            bad(f"--method full: {source} is an adapter; --merge it first, then --init the merged folder")
        check_asked(asked, read_json(path / "adapter_config.json"), source)
    model = Model.from_pretrained(source, **dict(method=method) | overrides)
    if overrides.get("merge"):
        model.to = lambda device: model  # the base may be larger than a GPU: merging stays on the CPU
    elif hasattr(model, "adapter") and not overrides.get("sample"):
        weights = ([(p.numel(), p.requires_grad) for p in model.parameters()]
                   + [(math.prod(m.nf4["shape"]), False) for m in model.modules() if getattr(m, "nf4", None)])
        rank = f", rank {model.adapter['r']}" if "r" in model.adapter else ""
        print(f"{model.base}: {sum(n for n, own in weights if not own):,} parameters, frozen; "
              f"{sum(n for n, own in weights if own):,} are trained ({method}{rank})")
    return model


def answer(cfg, model, tok):
    """--sample: the text as a question, in the form that the training had; ends with the base's end token."""
    if tok is None:
        bad("--sample: the base has no tokenizer; --tok names one")
    prompts = Prompts(tok, cfg.prompt, model.stop)
    model.stop = prompts.stop
    show(cfg, model, tok, prompts.encode([dict(role="user", content=cfg.sample)])[0])


@torch.no_grad()
def merge(cfg, model, tok):
    """--merge: W + s B A for every adapted W, one at a time, written in the base files' dtype; the rest is copied."""
    if getattr(model, "adapter", {}).get("peft_type") == "ADAPTION_PROMPT":
        bad("--merge: prompts of LLaMA-Adapter are no part of any weight; only lora and qlora can be merged")
    folder, base = Path(cfg.merge), find_checkpoint(model.base)
    if not cfg.merge:
        bad("--merge: its value is empty; the folder to write to is asked for")
    if folder.is_dir() and folder.samefile(base):
        bad(f"--merge {folder}: the base itself is there, and would be overwritten; another folder is asked for")
    if (folder / "adapter_config.json").exists():
        bad(f"--merge {folder}: it holds an adapter, as which it would be read; another folder is asked for")
    modules, weights = dict(model.named_modules()), {n: p for n, p in model.named_parameters() if ".lora_" not in n}
    names, header, end = ({torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
                          {"__metadata__": {"format": "pt"}}, 0)
    for n, p in weights.items():
        header[n] = dict(dtype=names[p.dtype], shape=list(p.shape), data_offsets=[end, end := end + p.nbytes])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)

    def write(tmp):  # safetensors' format: the header's length, the header, tensors; save_file would need all at once
        with open(tmp, "wb") as f:
            f.write(len(head).to_bytes(8, "little") + head)
            for n, p in weights.items():
                m = modules[n.removesuffix(".weight")]
                if getattr(m, "lora_A", None) is not None:
                    p = (p.float() + m.scale * m.lora_B.weight @ m.lora_A.weight).to(p.dtype)
                f.write(p.data.contiguous().view(torch.uint8).numpy())

    try:
        Path(cfg.merge).mkdir(parents=True, exist_ok=True)
        write_file(f"{cfg.merge}/model.safetensors", write)
    except OSError as e:
        bad(f"--merge {cfg.merge}: {e.strerror}")
    config = model.hf_config() | dict(torch_dtype=str(p.dtype).removeprefix("torch."))
    write_file(f"{cfg.merge}/config.json", lambda tmp: Path(tmp).write_text(json.dumps(config, indent=2)))
    files = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
             "chat_template.jinja", "tok.json")
    own = [Path(tok.kind).parent] if tok and tok.kind.endswith(".json") else []
    for f in [folder / f for folder in (base, *own) for f in files]:
        if f.is_file() and not (f.name == "tok.json" and Path(cfg.merge, "tokenizer.json").is_file()):
            shutil.copy(f, cfg.merge)
    print(f"{sum(p.numel() for p in weights.values()):,} parameters in {cfg.merge}; "
          f"transformers and --init {cfg.merge} load them")


SOURCES["init"] = base_or_adapter
ACTIONS |= dict(sample=answer, merge=merge)


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
