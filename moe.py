"""
MoE: a Transformer whose MLPs are mixtures of experts      Shazeer et al. 2017, arXiv:1701.06538;
                                                           Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088v1;
                                                           xAI's Grok-1 by its numbers

Special: each layer has E MLPs, the experts, and each token runs through K of them. A router, one row of weights per
expert, says which: 8 experts, 2 a token, is 4 times the parameters of the dense model at the same work for a token.
    p       = softmax(W_g h) over the E experts             h = RMSNorm(x); the softmax in fp32
    x      += sum over the K largest of p'_e MLP_e(h)       p' = p / their sum (Mixtral), or p itself (Grok-1)
    MLP_e   = w2_e (act(w1_e h) * w3_e h)                   act = silu, or gelu
    loss   += aux E sum_e f_e P_e                           f_e = choices of e per token, P_e = mean p: even loads
            + z mean(logsumexp(W_g h)^2)                    (Fedus et al. 2021, arXiv:2101.03961, eq. 4); ST-MoE
No token is dropped (but by --capacity) and nothing is padded: tokens are sorted by expert, and each product has as
many rows as it has tokens. Around it a Llama decoder: RMSNorm, rotary positions, grouped key and value heads; in
Grok-1 a soft cap on the attention's scores, norms after attention and experts too, and factors on embedding and output.

Run:     python moe.py                                          trains on tiny Shakespeare, then prints a sample
         python moe.py --experts 1 --top-k-experts 1 --ffn-dim N       its dense twin
         python moe.py --show-routing "To be, or not to be"     each token in its experts' colours, and a picture
         python moe.py --init mistralai/Mixtral-8x7B-v0.1 --sample "..."  Mixtral, Grok-1: a Hugging Face folder or name
         python moe.py --upcycle DENSE                          experts begin as copies of a Llama's or Mistral's MLPs
         python moe.py --merge A B C --prompts FILE             experts: the MLPs of A, B, C; a blank line in FILE ends
                                                                one's prompts; gates from hidden states (mergekit-moe)
         torchrun --nproc_per_node=2 moe.py                     the same run on two GPUs
Expect:  validation losses and minutes are in bench/RESULTS.md, each with its command.
Alone:   this file needs PyTorch, numpy and safetensors (pillow for the picture); with kernels/ beside it, it is faster.
"""

import argparse
import ast
import colorsys
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
    from kernels.attention import attention
    from kernels.cross_entropy import linear_cross_entropy
    from kernels.grouped_gemm import expert_mlp
    from kernels.matmul import linear
    from kernels.norm import add_rms_norm, rms_norm
    from kernels.rope import rope
except ModuleNotFoundError:  # this file alone: the same operations in plain PyTorch

    def expert_mlp(x, w13, w2, chosen, weights, act="silu"):
        """sum_k weights_k MLP_chosen_k(x): x (N, C), w13 (E, 2F, C), w2 (E, C, F), chosen, weights (N, K) -> (N, C)."""
        order = chosen.flatten().argsort(stable=True)  # (N K): the choices, sorted by expert
        sizes = chosen.flatten().bincount(minlength=len(w2)).tolist()
        rows = []
        for x_e, w13_e, w2_e in zip(x[order // chosen.shape[1]].split(sizes), w13, w2):
            gate, up = F.linear(x_e, w13_e).chunk(2, -1)  # (n_e, F)
            rows.append(F.linear((F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")) * up, w2_e))
        y = torch.cat(rows)[order.argsort()]  # (N K, C), in the order of the choices again
        return (y.view(*chosen.shape, -1) * weights[..., None]).sum(1).to(y.dtype)

    def attention(q, k, v, softcap=0.0):  # softmax(q k^T / sqrt(D)) v; query i sees keys up to i + Tk - Tq
        Tq, Tk = q.shape[2], k.shape[2]
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
        if not softcap:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if 1 < Tq < Tk else None,
                                                  is_causal=Tq == Tk, enable_gqa=True)
        k, v = (u.repeat_interleave(q.shape[1] // u.shape[1], 1) for u in (k, v))
        s = softcap * torch.tanh((q @ k.mT).float() / (softcap * q.shape[3] ** 0.5))
        return s.masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype) @ v

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

    def rope(x, cos, sin):  # x (B, T, H, D): pairs (x_j, x_{j + D/2}) turned by the position's angle; cos, sin (T, D/2)
        (a, b), cos, sin = x.chunk(2, -1), cos[:, None], sin[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@dataclass
class Config:
    # the model
    layers: int = 6  # blocks
    heads: int = 6  # query heads
    kv_heads: int = 0  # key and value heads, each shared by heads / kv_heads queries; 0: as many as heads
    head_dim: int = 0  # head size D; 0: dim / heads
    dim: int = 384  # width C of the residual stream
    experts: int = 8  # MLPs E of a layer; 1: a dense model
    top_k_experts: int = 2  # experts K that a token runs through
    ffn_dim: int = 0  # width F inside an expert; 0: 8/3 of dim, up to a multiple of 32
    vocab: int = 0  # rows of the embedding; 0: as many as the tokenizer has
    positions: int = 0  # longest sequence that is sampled; 0: as --seq
    eps: float = 1e-5  # of RMSNorm
    theta: float = 1e6  # base of the rotary frequencies
    renorm: bool = True  # the K weights sum to 1: softmax over the chosen K logits (Mixtral); else over all E (Grok-1)
    act: str = "silu"  # silu | gelu (Grok-1)
    softcap: float = 0.0  # attention's scores stay within +- this (Grok-1: 30); 0: no cap
    sandwich: bool = False  # norms after attention and experts too (Grok-1)
    embed_mult: float = 1.0  # factor on the embedding (Grok-1: sqrt(C))
    logit_mult: float = 1.0  # factor on the logits (Grok-1: 1 / sqrt(3))
    tied: bool = False  # the head is the embedding
    bias_rate: float = 0.0  # loss-free balancing: step of a bias on the choice, say 0.001 with --aux 0; 0: none
    # the run
    preset: str = ""  # sizes and schedule together; default: cpu without a GPU, gpu with one
    aux: float = 0.01  # weight of the load-balancing loss
    z: float = 0.001  # weight of the router's z-loss
    capacity: float = 0.0  # an expert takes at most this times N K / E choices in training, the rest is dropped; 0: all
    seq: int = 256  # context length T in training
    data: str = "shakespeare"  # name in data/, .txt or .jsonl file, folder or glob of token shards (nanoGPT's, llm.c's)
    tok: str = ""  # char | byte | gpt2 | a tokenizer.json | a RWKV vocabulary file; default: what suits the data
    batch: int = 16  # sequences per micro-step, over all processes together
    accum: int = 1  # micro-steps whose gradients are summed into one step
    steps: int = 1000  # optimizer steps
    lr: float = 6e-4  # peak learning rate
    lr_end: float = 0.0  # last learning rate, as a fraction of --lr; cosine in between
    warmup: int = 0  # steps of linear warm-up
    beta2: float = 0.95  # second moment's decay in AdamW
    wd: float = 0.1  # weight decay, on matrices only
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
    upcycle: str = ""  # start from a dense checkpoint, --experts copies of its MLPs and a new router
    merge: list = None  # start from several: attention of the first, an expert of each
    prompts: str = ""  # file for --merge: what each expert is for
    eval_every: int = 250  # steps between evaluations and saves
    eval_iters: int = 64  # batches of an evaluation; always the same ones
    log_every: int = 10  # steps between progress lines
    show_routing: str = ""  # show which experts the tokens of this text run through, in --out or --init
    sample: str = ""  # generate after this text, from --out or --init, instead of training
    tokens: int = 300  # how many to generate
    temp: float = 0.8  # temperature; 0: the most likely token
    top_k: int = 0  # draw from the k most likely; 0: from all
    top_p: float = 1.0  # draw from the most likely that make up this probability

    def __post_init__(self):
        self.kv_heads = self.kv_heads or self.heads
        self.head_dim = self.head_dim or self.dim // self.heads
        self.ffn_dim = self.ffn_dim or -(-self.dim * 8 // 96) * 32
        self.positions = self.positions or self.seq


MIXTRAL = dict(vocab=32000, positions=32768, seq=2048, batch=1, ckpt=True, optim="adamw8bit", lr=1e-5, warmup=100)
PRESETS = {
    "cpu": dict(layers=4, heads=3, dim=96, ffn_dim=128, seq=128,
                batch=16, steps=1000, lr=1e-2, optim="muon", eval_every=500),
    # a character model for one 12 GB GPU
    "gpu": dict(layers=6, heads=6, dim=384, ffn_dim=512, seq=256,
                batch=64, steps=5000, lr=1e-3, lr_end=0.1, warmup=100, beta2=0.99),
    # 0.3B of which 0.1B work for a token, on one 12 GB GPU
    "300M": dict(layers=12, heads=12, kv_heads=4, dim=768, ffn_dim=1024, seq=1024, tok="gpt2", data="openwebtext",
                 batch=8, accum=60, steps=100_000, lr=6e-4, lr_end=0.1, warmup=2000, eval_every=1000),
    # the official sizes; they need many GPUs
    "8x7B": dict(layers=32, heads=32, kv_heads=8, dim=4096, ffn_dim=14336, **MIXTRAL),
    "8x22B": dict(layers=56, heads=48, kv_heads=8, dim=6144, ffn_dim=16384, **MIXTRAL | dict(positions=65536)),
    "grok-1": dict(layers=64, heads=48, kv_heads=8, dim=6144, ffn_dim=32768, theta=1e4, renorm=False, act="gelu",
                   softcap=30.0, sandwich=True, embed_mult=78.38367176906169, logit_mult=0.5773502691896257,
                   tied=True, **MIXTRAL | dict(vocab=131072, positions=8192)),
}  # fmt: skip


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, cfg):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(cfg.dim)), cfg.eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x):
        return linear(x, self.weight)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.D, self.softcap = cfg.head_dim, cfg.softcap
        self.q_proj = Linear(cfg.dim, cfg.heads * self.D)
        self.k_proj = Linear(cfg.dim, cfg.kv_heads * self.D)
        self.v_proj = Linear(cfg.dim, cfg.kv_heads * self.D)
        self.o_proj = Linear(cfg.heads * self.D, cfg.dim)

    def forward(self, x, cos, sin, cache=None, t=0):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.D) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (u.transpose(1, 2) for u in (rope(q, cos, sin), rope(k, cos, sin), v))  # (B, H or Hkv, T, D)
        if cache is not None:  # (2, B, Hkv, room, D): keys and values of the t tokens before x, and room for more
            cache[0, :, :, t : t + T], cache[1, :, :, t : t + T] = k, v
            k, v = cache[:, :, :, : t + T]  # (B, Hkv, t+T, D)
        y = attention(q, k, v, softcap=self.softcap)  # softcap c: softmax(c tanh(s / c))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Router(nn.Module):
    """Which K experts each token takes, and with which weights."""

    def __init__(self, cfg):
        super().__init__()
        self.K, self.renorm, self.capacity = cfg.top_k_experts, cfg.renorm, cfg.capacity
        self.weight = nn.Parameter(torch.empty(cfg.experts, cfg.dim))
        if cfg.bias_rate:
            self.register_buffer("e_score_correction_bias", torch.zeros(cfg.experts))

    def forward(self, h, bias):
        """h (N, C), bias (E,) or None -> experts and their weights (N, K), and what the losses and the log need: the
        choices per expert and the sum of p (E,), sum of logsumexp^2, sum of the entropies of p, choices dropped."""
        logits = F.linear(h, self.weight).float()  # (N, E)
        lse = logits.logsumexp(-1)
        p = (logits - lse[:, None]).exp()
        # loss-free balancing (Wang et al. 2024, arXiv:2408.15664): the bias shifts the choice, not the weights
        chosen = (p if bias is None else p + bias).topk(self.K).indices  # (N, K)
        weights = p.gather(1, chosen)
        if self.renorm:
            weights = weights / weights.sum(-1, keepdim=True)
        load = p.new_zeros(p.shape[1]).scatter_add_(0, chosen.flatten(), weights.new_ones(chosen.numel()))  # (E,)
        dropped = load.new_zeros(())
        if self.capacity and self.training:
            weights, dropped = self.drop(chosen, weights, load)
        entropy = (lse[:, None] * p - logits * p).detach().sum()
        return chosen, weights, (load, p.sum(0), lse.square().sum(), entropy, dropped)

    def drop(self, chosen, weights, load):
        """An expert takes its first choices only: first those of tokens whose first choice it is, in their order."""
        most = math.ceil(self.capacity * chosen.numel() / len(load))
        flat = chosen.t().flatten()  # (K N)
        order = flat.argsort(stable=True)
        place = torch.empty_like(order)  # of a choice among those of its expert
        place[order] = torch.arange(len(flat), device=flat.device) - (load.cumsum(0) - load).long()[flat[order]]
        kept = (place < most).view(chosen.shape[1], -1).t()  # (N, K)
        return weights * kept, (~kept).sum()


class Experts(nn.Module):
    """All experts of a layer: w1 and w3 of each, one below the other, and w2."""

    def __init__(self, cfg):
        super().__init__()
        self.act = cfg.act
        self.gate_up_proj = nn.Parameter(torch.empty(cfg.experts, 2 * cfg.ffn_dim, cfg.dim))
        self.down_proj = nn.Parameter(torch.empty(cfg.experts, cfg.dim, cfg.ffn_dim))

    def forward(self, h, chosen, weights):
        return expert_mlp(h, self.gate_up_proj, self.down_proj, chosen, weights, self.act)  # (N, C)


class MoE(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate = Router(cfg)
        self.experts = Experts(cfg)

    def forward(self, h, bias):
        rows = h.flatten(0, 1)  # (N, C)
        self.chosen, weights, counts = self.gate(rows, bias)  # chosen is kept for --show-routing
        return self.experts(rows, self.chosen, weights).view(h.shape), counts


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg)  # before the experts, whatever its name says
        self.mlp = MoE(cfg)
        self.sandwich = cfg.sandwich
        if cfg.sandwich:
            self.post_attn_norm, self.post_moe_norm = RMSNorm(cfg), RMSNorm(cfg)

    def forward(self, x, cos, sin, bias=None, cache=None, t=0):
        a = self.self_attn(self.input_layernorm(x), cos, sin, cache, t)
        a = self.post_attn_norm(a) if self.sandwich else a
        norm = self.post_attention_layernorm
        h, x = add_rms_norm(x, a, norm.weight, norm.eps)  # x = x + a, h = norm(x), in one pass
        m, counts = self.mlp(h, bias)
        return x + (self.post_moe_norm(m) if self.sandwich else m), counts


class Model(nn.Module):
    """Mixtral with the parameters of transformers' MixtralForCausalLM; with --sandwich, Grok-1."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.heads % cfg.kv_heads:
            bad(f"--kv-heads {cfg.kv_heads}: --heads {cfg.heads} must be divisible by it")
        if cfg.top_k_experts > cfg.experts:
            bad(f"--top-k-experts {cfg.top_k_experts}: there are --experts {cfg.experts}")
        if cfg.head_dim % 2 or cfg.head_dim == cfg.dim // cfg.heads and cfg.dim % cfg.heads:
            bad(f"--heads {cfg.heads}: --dim {cfg.dim} must be divisible by twice that (pairs are rotated)")
        if cfg.act not in ("silu", "gelu"):
            bad(f"--act {cfg.act}: one of silu, gelu")
        self.cfg, self.context, self.stop, self.log, self.spread = cfg, cfg.positions, set(), None, False
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(cfg.vocab, cfg.dim)
        self.model.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.model.norm = RMSNorm(cfg)
        if not cfg.tied:
            self.lm_head = Linear(cfg.dim, cfg.vocab)
        for name, p in self.named_parameters():
            if p.ndim > 1:  # the 2L products that are added to the stream start smaller
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.layers) if re.search(r"(o|down)_proj", name) else 0.02)

    def head(self):
        return (self.model.embed_tokens if self.cfg.tied else self.lm_head).weight

    def blocks(self, tokens, caches=None, t=0, inputs=None):
        """tokens (B, T) at positions t..t+T-1 -> the normed stream (B, T, C), each layer's counts. inputs: a list
        that gets what goes into each layer."""
        c, layers = self.cfg, self.model.layers
        at = torch.arange(t, t + tokens.shape[1], device=tokens.device)
        angle = at[:, None] * frequencies(c).to(tokens.device, non_blocking=True)  # (T, D / 2)
        cos, sin, all_counts = angle.cos(), angle.sin(), []  # (T, D / 2)
        x = F.embedding(tokens, self.model.embed_tokens.weight)  # (B, T, C)
        x = x * c.embed_mult if c.embed_mult != 1 else x
        for i, block in enumerate(layers):
            if inputs is not None:
                inputs.append(x)
            # a copy: forward() moves the bias, and with --ckpt backward must choose the same experts again
            bias = block.mlp.gate.e_score_correction_bias.clone() if c.bias_rate else None
            if c.ckpt and self.training:
                x, counts = checkpoint(block, x, cos, sin, bias, use_reentrant=False)
            else:
                x, counts = block(x, cos, sin, bias, None if caches is None else caches[i], t)
            all_counts.append(counts)
        x = self.model.norm(x)
        return x * c.logit_mult if c.logit_mult != 1 else x, all_counts

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, V); with targets (B, T), where -1 is ignored: the mean loss, a fp32 scalar,
        in training with the router's losses."""
        x, counts = self.blocks(tokens)
        if targets is None:
            return linear(x, self.head())
        loss = linear_cross_entropy(x, self.head(), targets)
        return loss + self.router_losses(counts, tokens.numel()) if self.training else loss

    def router_losses(self, counts, N):
        """aux E sum_e f_e P_e + z mean(logsumexp^2), f, P over all layers and tokens as in transformers' Mixtral."""
        c = self.cfg
        load, p, z, entropy, dropped = (torch.stack(u) for u in zip(*counts))  # (L, E), (L, E), (L,), (L,), (L,)
        if self.spread:  # the loads of the whole batch: any number of processes computes the same loss
            dist.all_reduce(load)
        share = load / load.sum(1, keepdim=True)
        balance = c.experts * c.top_k_experts * (share.mean(0) * p.sum(0) / (c.layers * N)).sum()
        with torch.no_grad():  # balance: K where loads or p are even
            self.log = (share, entropy.sum() / (c.layers * N),
                        dropped.sum() / (c.layers * N * c.top_k_experts), balance.detach())
            for block, s in zip(self.model.layers, share) if c.bias_rate else ():  # too little load: chosen more
                block.mlp.gate.e_score_correction_bias += c.bias_rate / c.accum * (1 / c.experts - s).sign()
        return c.aux * balance + c.z * z.sum() / (c.layers * N)

    def prepare(self, cast):
        """Called when a training is about to start."""
        self.spread = dist.is_initialized()

    def report(self):
        """For the progress line: the last micro-step's least and most loaded expert of any layer, the mean entropy of
        p as a part of its most, the balance (1: even), choices dropped."""
        if self.log is None:
            return "no step yet"
        share, entropy, dropped, balance = self.log
        text = (f"load {share.min():.1%} to {share.max():.1%}, "
                f"entropy {entropy / math.log(max(2, self.cfg.experts)):.2f}")
        return f"{text}, balance {balance / self.cfg.top_k_experts:.3f}, dropped {dropped:.1%}"

    def init_state(self, batch):
        """A cache (L, 2, B, Hkv, room, D) that grows by doubling, and the number of tokens in it."""
        c, p = self.cfg, self.model.embed_tokens.weight
        return {"kv": torch.zeros(c.layers, 2, batch, c.kv_heads, min(64, self.context), c.head_dim,
                                  dtype=p.dtype, device=p.device), "t": 0}

    def step(self, tokens, state):
        """The next tokens (B, T') -> logits (B, V) after the last of them, and the state."""
        t, end, room = state["t"], state["t"] + tokens.shape[1], state["kv"].shape[4]
        if end > self.context:
            raise ValueError(f"{end} tokens do not fit the {self.context} positions")
        if end > room:
            state["kv"] = F.pad(state["kv"], (0, 0, 0, max(end, 2 * room) - room))
        x, _ = self.blocks(tokens, state["kv"], t)
        state["t"] = end
        return linear(x[:, -1], self.head()), state

    def param_groups(self, weight_decay):
        """Matrices decay, vectors do not; `matrix` marks what Muon may orthogonalise."""
        own = list(self.named_parameters())  # .gate.: a router's rows are no map, each is for itself
        inner = [p for n, p in own if p.ndim > 1 and ".layers." in n and ".gate." not in n]
        outer = [p for n, p in own if p.ndim > 1 and not (".layers." in n and ".gate." not in n)]
        return [
            dict(params=inner, weight_decay=weight_decay, matrix=True),
            dict(params=outer, weight_decay=weight_decay),
            dict(params=[p for _, p in own if p.ndim == 1], weight_decay=0.0),
        ]

    def hf_config(self):
        """config.json as transformers' MixtralForCausalLM reads it; what it has no name for makes it a grok-1."""
        c = self.cfg
        more = any(getattr(c, k) != getattr(Config, k) for k in GROK)
        return dict(
            model_type="grok-1" if more else "mixtral",
            architectures=["Grok1ModelForCausalLM" if more else "MixtralForCausalLM"], num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, hidden_size=c.dim,
            intermediate_size=c.ffn_dim, num_local_experts=c.experts, num_experts_per_tok=c.top_k_experts,
            vocab_size=c.vocab, max_position_embeddings=c.positions, rms_norm_eps=c.eps, rope_theta=c.theta,
            rope_parameters=dict(rope_type="default", rope_theta=c.theta), tie_word_embeddings=c.tied,
            router_aux_loss_coef=c.aux, router_jitter_noise=0.0, sliding_window=None, attention_dropout=0.0,
            hidden_act=c.act, initializer_range=0.02, bos_token_id=None, eos_token_id=min(self.stop, default=None),
        ) | ({name: getattr(c, k) for k, name in GROK.items()} if more else {})  # fmt: skip

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """source: a Hugging Face folder or hub name of a Mixtral (expert by expert, or fused as transformers 5 holds
        it) or a Grok-1; overrides: Config fields such as seq."""
        path = find_checkpoint(source)
        return cls.build(*read_decoder(path), path, **overrides)

    @classmethod
    def build(cls, config, tensors, path, **overrides):
        """config and tensors as read_decoder gives them -> the model."""
        own = {k: v for k, v in config.items() if k != "stop"} | dict(seq=min(Config.seq, config["positions"]))
        cfg = dataclasses.replace(Config(**own), **overrides)
        model = cls(cfg)
        model.stop = config["stop"]
        if cfg.bias_rate:  # a checkpoint that was balanced otherwise has no bias yet
            tensors = {k: v for k, v in model.state_dict().items() if k.endswith("_bias")} | tensors
        load_strict(model, tensors, path)
        return model

    @classmethod
    def upcycle(cls, source, **overrides):
        """A dense Llama, Mistral or --experts 1 model -> its MLPs copied to all experts, a new router (Komatsuzaki et
        al. 2022, arXiv:2212.05055). With renorm the K weights sum to 1, so the first loss is the dense model's."""
        path = find_checkpoint(source)
        config, tensors = read_decoder(path)
        dense_only(config, path, "--upcycle")
        config |= dict(experts=overrides.pop("experts", Config.experts),
                       top_k_experts=overrides.pop("top_k_experts", Config.top_k_experts))
        generator = torch.Generator().manual_seed(overrides.get("seed", 0))
        for k in [k for k in tensors if ".mlp." in k]:
            if ".experts." in k:
                tensors[k] = tensors[k].expand(config["experts"], -1, -1)
            else:
                tensors[k] = torch.randn(config["experts"], config["dim"], generator=generator) * 0.02
        return cls.build(config, tensors, path, **overrides)

    @classmethod
    def merge(cls, sources, prompts="", **overrides):
        """Several dense models of one shape -> all but the MLPs from the first, an expert from each. The gate's row
        for an expert is the mean of what enters the layer at the last token of the prompts for it, less that for its
        !prompts, at length 1 (mergekit-moe, which puts a begin-of-text token before each)."""
        paths = [find_checkpoint(s) for s in sources]
        found = [read_decoder(p) for p in paths]
        for (config, tensors), path in zip(found, paths):
            dense_only(config, path, "--merge")
            other = {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in found[0][1].items()}
            if other or config["theta"] != found[0][0]["theta"]:
                bad(f"--merge {path}: its shapes, or its rotary base, are not those of {paths[0]}")
        config, tensors = found[0]
        wanted = read_prompts(prompts, len(sources))
        tok = load_tokenizer(paths[0], config["vocab"]) or bad(
            f"--merge {paths[0]}: no tokenizer.json or tok.json beside it to read --prompts with")
        base = cls.build(config | dict(experts=1, top_k_experts=1), dict(tensors), paths[0]).eval()
        wanted = [[[tok.encode(p) for p in lines] for lines in block] for block in wanted]
        if not all(len(ids) for block in wanted for lines in block for ids in lines):
            bad(f"--prompts {prompts}: a line without any text, or only a !; each is a prompt, or ! and a prompt")
        gates = torch.stack([base.gate_rows(good, poor) for good, poor in wanted], 1)  # (L, E, C)
        for k in [k for k in tensors if ".mlp." in k]:
            layer = int(k.split(".")[2])
            tensors[k] = torch.cat([t[k] for _, t in found]) if ".experts." in k else gates[layer]
        config |= dict(experts=len(sources),
                       top_k_experts=overrides.pop("top_k_experts", min(Config.top_k_experts, len(sources))))
        overrides.pop("experts", None)
        return cls.build(config, tensors, paths[0], **overrides)

    @torch.no_grad()
    def gate_rows(self, good, poor):
        """Token arrays of prompts -> (L, C)."""

        def mean(prompts):
            rows = []
            for ids in prompts:
                self.blocks(torch.from_numpy(ids.astype(np.int64))[None], inputs=(inputs := []))
                rows.append(torch.stack([x[0, -1] for x in inputs]))
            return torch.stack(rows).mean(0) if rows else 0

        return F.normalize(mean(good) - mean(poor), dim=-1)

    def save_pretrained(self, folder, tensors=None, **how):
        """model.safetensors and config.json as on the hub, expert by expert: MixtralForCausalLM loads them."""
        config = self.hf_config()
        write_weights(folder, to_hub(self.state_dict() if tensors is None else tensors,
                                     config["model_type"] == "grok-1"), config, **how)


def frequencies(cfg):
    """-> theta^(-2j / D) (D / 2,), fp32."""
    return cfg.theta ** (-torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu") / cfg.head_dim)


HUB, TOK = {}, {}
# Config fields that Mixtral has no name for: what a Grok-1's config.json calls them
GROK = dict(
    renorm="norm_topk_prob", act="hidden_act", softcap="max_attn_value", sandwich="sandwich_norm",
    embed_mult="embedding_multiplier_scale", logit_mult="output_multiplier_scale", bias_rate="router_bias_rate",
)  # fmt: skip
# (a name on the hub, ours); the hub's first, so that the first match is what is written
NAMES_GROK = [
    (".attn.", ".self_attn."), (".moe_block.", ".mlp."), ("model.norm.scale", "model.norm.weight"),
    (".pre_attn_norm.scale", ".input_layernorm.weight"), (".post_attn_norm.scale", ".post_attn_norm.weight"),
    (".pre_moe_norm.scale", ".post_attention_layernorm.weight"), (".post_moe_norm.scale", ".post_moe_norm.weight"),
    (".linear.weight", ".w1.weight"), (".linear_1.weight", ".w2.weight"), (".linear_v.weight", ".w3.weight"),
    (".block_sparse_moe.", ".mlp."), (".pre_attn_norm.", ".input_layernorm."),
    (".pre_moe_norm.", ".post_attention_layernorm."),
]  # fmt: skip
NAMES_MIXTRAL = [(".block_sparse_moe.", ".mlp.")]
NAMES_DENSE = [(".mlp.gate_proj.", ".mlp.experts.0.w1."), (".mlp.up_proj.", ".mlp.experts.0.w3."),
               (".mlp.down_proj.", ".mlp.experts.0.w2.")]


def renamed(name, pairs, back=False):
    for theirs, ours in pairs:
        name = name.replace(ours, theirs) if back else name.replace(theirs, ours)
    return name


def to_hub(tensors, grok):
    """Our names -> the hub's: each expert for itself."""
    out = {}
    for k, v in tensors.items():
        if k.endswith("experts.gate_up_proj"):
            for e, both in enumerate(v):
                out |= {k.replace("gate_up_proj", f"{e}.{w}.weight"): half.clone()
                        for w, half in zip(("w1", "w3"), both.chunk(2))}
        elif k.endswith("experts.down_proj"):
            out |= {k.replace("down_proj", f"{e}.w2.weight"): w2.clone() for e, w2 in enumerate(v)}
        else:
            out[k] = v
    return {renamed(k, NAMES_GROK if grok else NAMES_MIXTRAL, back=True): v for k, v in out.items()}


def read_decoder(path):
    """A Mixtral, a Grok-1, or a dense Llama or Mistral (one expert) -> Config's fields, tensors by our names."""
    config, tensors = read_checkpoint(path)
    kind = config.get("model_type")
    if kind not in ("mixtral", "grok-1", "llama", "mistral"):
        bad(f"{path}: config.json says model_type {kind!r}; this file reads mixtral, grok-1, "
            "and as dense ones llama, mistral")
    dense = kind in ("llama", "mistral")
    try:
        c = dict(layers=config["num_hidden_layers"], heads=config["num_attention_heads"], dim=config["hidden_size"],
                 vocab=config["vocab_size"], ffn_dim=config["intermediate_size"],
                 positions=config["max_position_embeddings"], eps=config["rms_norm_eps"])
        c |= dict(experts=1, top_k_experts=1) if dense else dict(
            experts=config["num_local_experts"] if "num_local_experts" in config else config["num_experts"],
            top_k_experts=config["num_experts_per_tok"])  # fmt: skip
    except KeyError as e:
        bad(f"{path}: config.json has no {e}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    end = config.get("eos_token_id")
    c |= dict(kv_heads=config.get("num_key_value_heads") or c["heads"],
              head_dim=config.get("head_dim") or c["dim"] // c["heads"],
              theta=float(config.get("rope_theta") or rope.get("rope_theta", 1e4 if kind != "mixtral" else 1e6)),
              tied=bool(config.get("tie_word_embeddings", kind == "grok-1")),
              stop=set(end) if isinstance(end, list) else {end} - {None})
    if kind == "grok-1":  # xAI's numbers, where the file does not say otherwise
        c |= {k: config.get(name, PRESETS["grok-1"].get(k, getattr(Config, k))) for k, name in GROK.items()}
        c["act"] = c["act"].split("_")[0]
        scale = config.get("attn_output_multiplier", c["head_dim"] ** -0.5)
        if abs(scale * c["head_dim"] ** 0.5 - 1) > 1e-3:
            bad(f"{path}: attn_output_multiplier = {scale}; this file scales by 1 / sqrt({c['head_dim']})")
    elif config.get("hidden_act", "silu") != "silu":
        bad(f"{path}: hidden_act = {config['hidden_act']!r} in config.json; this file has silu")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        bad(f"{path}: rope_type = {rope.get('rope_type', rope.get('type'))!r} in config.json; "
            "this file has the plain one")
    window = config.get("sliding_window")
    if window and window < c["positions"]:
        c["positions"] = window  # up to here both are the same
    pairs = NAMES_DENSE if dense else NAMES_GROK if kind == "grok-1" else NAMES_MIXTRAL
    tensors = {renamed(k, pairs): v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    if c["tied"]:
        tensors.pop("lm_head.weight", None)
    for i in range(c["layers"] if dense else 0):
        tensors[f"model.layers.{i}.mlp.gate.weight"] = torch.zeros(1, c["dim"])
    for i in range(c["layers"]):
        head = f"model.layers.{i}.mlp.experts."
        if f"{head}0.w1.weight" in tensors:
            try:
                w1, w2, w3 = (torch.stack([tensors.pop(f"{head}{e}.{w}.weight") for e in range(c["experts"])])
                              for w in ("w1", "w2", "w3"))
                tensors |= {f"{head}gate_up_proj": torch.cat([w1, w3], 1), f"{head}down_proj": w2}
            except (KeyError, RuntimeError) as e:
                bad(f"{path}: the experts of layer {i} are incomplete or of different shapes ({e})")
    return c, tensors


def dense_only(config, path, flag):
    if config["experts"] != 1:
        bad(f"{flag} {path}: it has {config['experts']} experts already; "
            "a dense Llama, Mistral or --experts 1 model is asked for")


def read_prompts(path, E):
    """Blocks of lines, a blank line between them, one for each expert -> [(prompts, those that began with !)]."""
    if not path:
        bad("--prompts (none): --merge needs a text file with a block of lines for each model")
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as e:
        bad(f"--prompts {path}: {getattr(e, 'strerror', None) or 'not UTF-8'}; "
            "a text file with a block of lines for each model of --merge")
    blocks = [b.split("\n") for b in re.split(r"\n\s*\n", text)] if text else []
    found = [([p for p in b if p[0] != "!"], [p[1:] for p in b if p[0] == "!"]) for b in blocks]
    if len(found) != E or not all(good for good, _ in found):
        bad(f"--prompts {path}: {len(found)} blocks of lines for the {E} models of --merge, "
            "and each needs a line without !")
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


# ----- load (shared) -----
load_data = load_text


# ----- end -----


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


# ----- routing -----
@torch.inference_mode()
def show_routing(cfg, model, tok):
    """Print each layer's tokens, first expert as background, second as foreground; draw the shares of the experts."""
    if tok is None or not len(ids := tok.encode(cfg.show_routing)):
        bad("--show-routing: the text is empty" if tok
            else "--show-routing: the checkpoint has no tokenizer; --tok names one")
    path = Path(cfg.out, "routing.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        bad(f"--out {cfg.out}: {e.strerror}")
    model.eval()
    model(torch.from_numpy(ids.astype(np.int64))[None, : model.context].to(next(model.parameters()).device))
    words, E = [tok.decode([i]).replace("\n", "\u23ce") for i in ids.tolist()], cfg.experts
    hue = lambda e, light: [round(255 * c) for c in colorsys.hls_to_rgb(e / E, light, 0.8)]
    paint = lambda e, f, word: (
        "\x1b[48;2;{};{};{}m\x1b[38;2;{};{};{}m".format(*hue(e, 0.78), *hue(f, 0.22)) + word + "\x1b[0m")
    print("experts: " + " ".join(paint(e, e, f" {e} ") for e in range(E))
          + "   background: first choice, letters: second")
    shares = []
    for i, block in enumerate(model.model.layers):
        chosen = block.mlp.chosen.cpu()  # (T, K)
        print(f"layer {i:>2}: " + "".join(paint(e[0], e[min(1, len(e) - 1)], w)
                                          for e, w in zip(chosen.tolist(), words)))
        shares.append(chosen.flatten().bincount(minlength=E) / chosen.numel())
    draw_shares(torch.stack(shares).tolist(), hue, path)
    print(f"the share of each expert per layer is in {path}")


def draw_shares(shares, hue, path):
    """A row per layer, a bar per expert as high as its share; the line is an even load."""
    try:
        from PIL import Image, ImageDraw
    except ModuleNotFoundError:
        bad("--show-routing: the picture needs pillow (pip install pillow)")
    L, E, w, h = len(shares), len(shares[0]), 60, 48
    picture = Image.new("RGB", (70 + E * w, 24 + L * h), "white")
    pen, most = ImageDraw.Draw(picture), max(map(max, shares))
    for e in range(E):
        pen.text((70 + e * w, 6), f"expert {e}", "black")
    for i, row in enumerate(shares):
        foot = 20 + (i + 1) * h
        pen.text((6, foot - 14), f"layer {i}", "black")
        for e, s in enumerate(row):
            pen.rectangle((70 + e * w, foot - s / most * (h - 8), 62 + (e + 1) * w, foot), tuple(hue(e, 0.6)))
            pen.text((74 + e * w, foot - 14), f"{s:.0%}", "black")
        even = foot - 1 / E / most * (h - 8)
        pen.line((70, even, 62 + E * w, even), "black")
    try:
        picture.save(path)
    except OSError as e:
        bad(f"--out {path.parent}: {e.strerror}")


SOURCES |= dict(upcycle=Model.upcycle, merge=Model.merge)
ACTIONS |= dict(show_routing=show_routing)


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
