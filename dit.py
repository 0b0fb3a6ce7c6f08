"""
DiT: diffusion with a Transformer  Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", arXiv:2212.09748v2
and its text form, PixArt-alpha    Chen et al. 2023, arXiv:2310.00426v3

Special: a picture is a sequence of patches that all see each other; the condition decides each block's norms and gates.
    x_t     = a_t x_0 + s_t eps                                a picture, noisier with t; the model is asked for eps
                                                               (ddpm) or the way from picture to noise, eps - x_0 (flow)
    h       = patches of x_t, each a token, + positions
    (shift, scale, gate) x 2 = W silu(t_emb + label_emb) + b   adaLN; W = 0 at first: every block starts as the identity
    h      += gate1 Attention(LN(h) (1 + scale1) + shift1)
    h      += Attention(h, caption)                            --cond text only; there the W above is one for all blocks
    h      += gate2 MLP(LN(h) (1 + scale2) + shift2)

Run:     python dit.py                                trains on drawn shapes with captions, ends with a grid of pictures
         python dit.py --sample "a small red circle" --guidance 3    from out/dit
         python dit.py --data cifar10 --cond class    or mnist, fashion_mnist, a folder of pictures, an .npz
         python dit.py --init DiT-XL-2-256x256.pt --sample 207 --guidance 4 --vae stabilityai/sd-vae-ft-mse
                                                      Meta's weights (also PixArt-alpha's .pth, and diffusers' folders)
         torchrun --nproc_per_node=2 dit.py           the same run on two GPUs
Expect:  what the pictures show, losses and minutes are in bench/RESULTS.md, each with its command.
Alone:   this file needs PyTorch, numpy and safetensors (pillow for picture folders); faster with kernels/ beside it.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import inspect
import json
import math
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
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
    from kernels.matmul import linear
    from kernels.norm import add_modulate, modulate
except ModuleNotFoundError:  # this file alone: the same operations in plain PyTorch

    def attention(q, k, v, causal=True):  # softmax(q k^T / sqrt(D)) v
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def linear(x, w, b=None, act=None):
        y = F.linear(x, w, b)
        return F.gelu(y, approximate="tanh") if act == "gelu" else y

    def modulate(x, shift, scale, eps=1e-6):  # LN(x) (1 + scale) + shift; x (B, T, C), shift and scale (B, C)
        return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]

    def add_modulate(x, r, gate, shift, scale, eps=1e-6):  # s = x + gate r -> modulate(s), s
        s = x + gate[:, None] * r
        return modulate(s, shift, scale, eps), s


@dataclass
class Config:
    # the model
    layers: int = 12  # blocks
    heads: int = 6  # attention heads; the head size is dim / heads
    dim: int = 384  # width C of the residual stream
    patch: int = 4  # side of a patch; a picture is (size / patch)^2 tokens
    size: int = 0  # side of a picture; 0: the data's
    channels: int = 0  # 3 for colours, 1 for grey, 4 for a VAE's latents; 0: the data's
    cond: str = "text"  # none | class (DiT) | text (PixArt-alpha)
    classes: int = 0  # labels that --cond class knows; 0: as many as the data has
    captions: int = 32  # positions of a caption, for --cond text
    features: int = 0  # width of a caption's features where they come from elsewhere; 0: bytes, encoded in this file
    learn_sigma: bool = False  # predict the variance of a step, too, as the official models do (--objective ddpm)
    objective: str = "flow"  # ddpm | flow
    betas: str = "linear"  # noise levels of --objective ddpm: linear (DDPM, DiT) | scaled (Stable Diffusion) | cosine
    # the run
    preset: str = ""  # sizes and schedule together; default: cpu without a GPU, gpu with one
    data: str = "shapes"  # name in data/, an .npz (images; labels, captions or features), a folder of pictures and .txt
    flip: bool = False  # mirror half of the pictures of an .npz or a folder; sets in data/ know whether it is allowed
    batch: int = 64  # pictures per micro-step, over all processes together
    accum: int = 1  # micro-steps whose gradients are summed into one step
    steps: int = 1000  # optimizer steps
    lr: float = 1e-4  # peak learning rate
    lr_end: float = 1.0  # last learning rate, as a fraction of --lr; cosine in between
    warmup: int = 0  # steps of linear warm-up
    beta2: float = 0.999  # second moment's decay in AdamW
    wd: float = 0.0  # weight decay, on matrices only
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema: float = 0.9999  # decay of the averaged weights, which are what is saved and sampled from
    drop: float = 0.1  # conditions left out in training, for guidance
    optim: str = "adamw"  # adamw | muon (matrices; AdamW for embeddings, the last layer and vectors) | adamw8bit
    seed: int = 1337  # of weights, batches, noise and samples
    device: str = ""  # cpu | cuda | mps; default: the best there is
    dtype: str = "auto"  # auto (bf16 where it is faster here) | fp32 | bf16 (autocast)
    compile: bool = False  # torch.compile
    ckpt: bool = False  # recompute each block in backward instead of keeping its activations
    fsdp: bool = False  # under torchrun: shard parameters, gradients and optimizer (FSDP2) instead of copying them
    out: str = ""  # folder of the run; default out/<file>
    resume: bool = False  # go on with the run in --out, bit for bit
    init: str = ""  # start from a checkpoint: folder, file or hub name
    eval_every: int = 250  # steps between evaluations and saves
    eval_iters: int = 4  # batches of an evaluation; always the same ones, with the same noise
    log_every: int = 10  # steps between progress lines
    sample: str = ""  # draw this caption, class or number ("a | b": both), from --out or --init, instead of training
    number: int = 8  # how many of each
    sampler: str = ""  # ddpm | ddim | euler | heun; default: euler for flow, ddpm for ddpm
    sample_steps: int = 50  # steps of the sampler
    guidance: float = 3.0  # classifier-free guidance: 1 is none
    vae: str = ""  # where the model knows latents: the VAE that decodes them, a folder or hub name


XL = dict(layers=28, dim=1152, heads=16)
DIT = dict(size=32, channels=4, cond="class", classes=1000, objective="ddpm", learn_sigma=True, data="latents.npz",
           batch=256, steps=400_000, clip=0.0, eval_every=1000,
           sampler="ddpm", sample_steps=250, guidance=4.0)  # fmt: skip
SHAPES = {"S": dict(layers=12, dim=384, heads=6), "B": dict(layers=12, dim=768, heads=12),
          "L": dict(layers=24, dim=1024, heads=16), "XL": XL}  # fmt: skip
PRESETS = {
    # about five minutes on two cores
    "cpu": dict(layers=4, heads=4, dim=128, captions=24, batch=16, steps=1900, lr=7e-3, lr_end=0.0, warmup=20,
                optim="muon", ema=0.99, dtype="fp32", eval_every=950),
    # pixels of 32 to 64 a side on one 12 GB GPU
    "gpu": dict(layers=12, heads=6, dim=384, batch=256, steps=20_000, lr=4e-4, lr_end=0.0, warmup=200, beta2=0.99,
                ema=0.999, eval_every=1000),
    # the paper's sizes and recipe, in latents of 256 x 256 pictures: an .npz with images (N, 4, 32, 32)
    **{f"{s}/{p}": dict(patch=p, **SHAPES[s], **DIT) for s in SHAPES for p in (2, 4, 8)},
    # PixArt-alpha at 512 x 512, with T5's features of the captions in the .npz
    "PixArt-XL/2": dict(patch=2, **XL, **DIT | dict(size=64, cond="text", classes=0, captions=120, features=4096,
                        lr=2e-5, wd=0.03, warmup=1000, clip=0.01, batch=64, sample_steps=100, guidance=4.5)),
}  # fmt: skip


# ----- diffusion (shared) -----
LEVELS = 1000  # noise levels; a time is a number in [0, LEVELS)


def alpha_bar(kind):
    """The share of the picture in the variance of x_t, (LEVELS,) fp64: cumprod(1 - beta)."""
    if kind == "cosine":  # Nichol & Dhariwal 2021, eq. 17
        f = torch.cos((torch.arange(LEVELS + 1, dtype=torch.float64) / LEVELS + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)
    low, high, power = (0.00085, 0.012, 0.5) if kind == "scaled" else (1e-4, 0.02, 1)
    return (1 - torch.linspace(low**power, high**power, LEVELS, dtype=torch.float64) ** (1 / power)).cumprod(0)


def posterior(now, then):
    """q(x_then | x_now, x_0) of two alpha_bar -> its mean's factors of x_0 and x_now, beta~ and beta (DDPM, eq. 7)."""
    beta = 1 - now / then
    return (then**0.5 * beta / (1 - now), (now / then) ** 0.5 * (1 - then) / (1 - now),
            beta * (1 - then) / (1 - now), beta)


@functools.cache
def tables(kind, device):
    """a and s of x_t = a x_0 + s eps, the posterior's two factors, log beta~ and log beta: (6, LEVELS) fp32."""
    bar = alpha_bar(kind)
    c0, ct, small, beta = posterior(bar, F.pad(bar[:-1], (1, 0), value=1.0))
    small[0] = small[1]  # beta~_0 is 0: the official takes its neighbour's log
    return torch.stack([bar.sqrt(), (1 - bar).sqrt(), c0, ct, small.log(), beta.log()]).float().to(device)


def normal_kl(m1, v1, m2, v2):
    """KL(N(m1, e^v1) || N(m2, e^v2)), elementwise."""
    return 0.5 * (v2 - v1 - 1 + (v1 - v2).exp() + (m1 - m2) ** 2 * (-v2).exp())


def log_likelihood(x, mean, log_std):
    """log of the normal's mass in the bin of x, 1/255 to each side, the outer bins open.
    Phi is its tanh approximation, as in the official code."""
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    above, below = (cdf((x - mean + d) * (-log_std).exp()) for d in (1 / 255, -1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


class Diffusion(nn.Module):
    """From noise to a picture with forward(x_t, t, cond, mask=None, drop=None) -> prediction.

    x_t = a x_0 + s eps, t (B,) in [0, LEVELS).
    ddpm: a^2 = alpha_bar_t, s^2 = 1 - a^2; the prediction is eps (Ho et al. 2020, arXiv:2006.11239) and, with
    learn_sigma, where log sigma^2 lies between its bounds (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15).
    flow: a = 1 - t / LEVELS, s = t / LEVELS; the prediction is eps - x_0 (Liu et al. 2022, arXiv:2209.03003).
    """

    guided = None  # how many channels guidance acts on; None: all

    def loss(self, x0, cond, generator=None, mask=None):
        """x0 (B, c, h, w) in [-1, 1] -> the mean loss at random times with random noise."""
        device = generator.device if generator else x0.device
        u = torch.rand(len(x0), 2, generator=generator, device=device)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        return self.loss_at(x0, cond, u.to(x0.device), noise.to(x0.device), mask)

    def loss_at(self, x0, cond, u, noise, mask=None):
        """u (B, 2), uniform: the first number is the time, the second decides whether the condition is left out."""
        drop = u[:, 1] < self.cfg.drop if self.training else None
        t, c = LEVELS * u[:, 0], x0.shape[1]
        if self.cfg.objective == "flow":
            if self.training:  # most often past the middle, where forms are decided: logit-normal with mean 0.5,
                t = LEVELS * torch.sigmoid(torch.special.ndtri(u[:, 0]) + 0.5)  # Esser et al. 2024, 2403.03206, eq. 19
            s = (t / LEVELS).view(-1, 1, 1, 1)
            return F.mse_loss(self((1 - s) * x0 + s * noise, t, cond, mask, drop).float(), noise - x0)
        t = t.long().clamp(max=LEVELS - 1)
        a, s, c0, ct, low, high = tables(self.cfg.betas, x0.device)[:, t].view(6, -1, 1, 1, 1)
        xt = a * x0 + s * noise
        eps, v = self(xt, t, cond, mask, drop).float().tensor_split([c], 1)
        loss = F.mse_loss(eps, noise)
        if v.shape[1]:  # the variational bound, in bits; eps is detached, so that it teaches sigma alone
            log_var = (v + 1) / 2 * high + (1 - v) / 2 * low
            mean = c0 * (xt - s * eps.detach()) / a + ct * xt
            kl, nll = normal_kl(c0 * x0 + ct * xt, low, mean, log_var), -log_likelihood(x0, mean, log_var / 2)
            loss = loss + torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl).mean() / math.log(2)
        return loss

    def times(self, steps):
        """Times of a sampler: `steps` of 0..LEVELS-1, falling (the official respacing); flow: evenly from LEVELS on."""
        if self.cfg.objective == "flow":
            return [LEVELS * (1 - i / steps) for i in range(steps)]
        return sorted({round(i * (LEVELS - 1) / max(1, steps - 1)) for i in range(steps)}, reverse=True)

    @torch.no_grad()
    def sample(self, cond, steps=50, guidance=1.0, generator=None, sampler="",
               mask=None, noise=None, times=None, eta=0.0, clip=False):
        """cond (B, ...) as forward() takes it, or as the data has it -> pictures (B, c, h, w).

        ddim, euler   x' = a' x_0^ + s' eps^                   Song et al. 2020, arXiv:2010.02502, eq. 12 without noise;
                                                               for flow it is Euler's rule
        ddpm          x' = mean of q(x' | x, x_0^) + sigma z   DDPM, algorithm 2; sigma^2 is learned, or beta~
        heun          euler, again with the mean slope of both ends; Karras et al. 2022, arXiv:2206.00364, algorithm 1
        noise, times: x_T and the times, where they are given. eta: noise in ddim, 1 is as much as ddpm's.
        clip: keep x_0^ in [-1, 1], for pixels.
        """
        flow, was, B = self.cfg.objective == "flow", self.training, len(cond)
        sampler, times = sampler or ("euler" if flow else "ddpm"), self.times(steps) if times is None else list(times)
        device, shape = next(self.parameters()).device, (B, *self.noise_shape(self.cfg))
        randn = lambda: torch.randn(shape, generator=generator,
                                    device=generator.device if generator else device).to(device)
        self.eval()
        x, cond = randn() if noise is None else noise, self.encode(cond)
        twice = lambda v: None if v is None else torch.cat([v, v])
        drop = torch.arange(2 * B, device=device) >= B  # the second half goes without its condition
        bars = [*alpha_bar(self.cfg.betas).tolist(), 1.0]
        a_s = lambda t: (1 - t / LEVELS, t / LEVELS) if flow else (bars[t] ** 0.5, (1 - bars[t]) ** 0.5)

        def predict(x, now):
            """-> x_0^, eps^ and v, if it is learned; guidance: eps = eps_free + g (eps_cond - eps_free)
            (Ho & Salimans 2022, arXiv:2207.12598)."""
            (a, s), t, c = a_s(now), torch.full((B,), now, device=device), x.shape[1]
            if guidance == 1:
                out = self(x, t, cond, mask).float()
            else:
                out, free = self(twice(x), twice(t), twice(cond), twice(mask), drop).float().chunk(2)
                k = self.guided or c
                out = torch.cat([free[:, :k] + guidance * (out[:, :k] - free[:, :k]), out[:, k:]], 1)
            eps, v = out.tensor_split([c], 1)
            x0, eps = (x - s * eps, x + a * eps) if flow else ((x - s * eps) / a, eps)
            if clip:
                x0 = x0.clamp(-1, 1)
                eps = (x - a * x0) / s
            return x0, eps, v

        for now, then in zip(times, [*times[1:], None]):
            last = then is None
            (a, s), (a1, s1) = a_s(now), (1.0, 0.0) if last else a_s(then)
            x0, eps, v = predict(x, now)
            if sampler == "ddpm":
                c0, ct, small, beta = posterior(bars[now], 1.0 if last else bars[then])
                x = c0 * x0 + ct * x
                if not last:
                    log_var = ((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(small) if v.shape[1]
                               else torch.tensor(math.log(small)))
                    x = x + (log_var / 2).exp() * randn()
                continue
            sigma = eta * s1 / s * (1 - (a / a1) ** 2) ** 0.5 if eta else 0.0
            x = a1 * x0 + (s1**2 - sigma**2) ** 0.5 * eps + (sigma * randn() if sigma else 0.0)
            if sampler == "heun" and not last:
                x0_, eps_, _ = predict(x, then)
                if flow:  # the slope is eps - x_0, the step s' - s
                    x = x + ((eps_ - x0_) - (eps - x0)) / 2 * (s1 - s)
                else:  # x / a has the slope eps and the step s' / a' - s / a
                    x = x + (eps_ - eps) / 2 * (s1 - a1 * s / a)
        self.train(was)
        return x

    def encode(self, cond):
        """What sample() computes once of the data's conditions."""
        return cond

    def objective(self):
        return Objective(self)

    def averages(self):
        return [EMA([p for p in self.parameters() if p.requires_grad], self.cfg.ema)]

    def snapshot(self, asked, step):
        draw_grid(self.cfg, self, asked, f"{self.cfg.out}/grid_{step}.png")


class Objective(nn.Module):
    """What training minimises: a batch of Images -> the mean loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return self.model.loss_at(*batch)


class EMA(torch.optim.Optimizer):
    """average <- decay average + (1 - decay) weights after each step; last of the optimizers, it needs no gradient."""

    def __init__(self, params, decay):
        super().__init__(params, dict(lr=0.0, lr_scale=0.0, wd=0.0, weight_decay=0.0, decay=decay))
        for p in self.param_groups[0]["params"]:
            self.state[p]["average"] = p.detach().clone()

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        torch._foreach_lerp_([self.state[p]["average"] for p in group["params"]], group["params"], 1 - group["decay"])

    @torch.no_grad()
    def swap(self):
        """The averages become the weights, which are kept in their place; called again, it undoes that."""
        for p in self.param_groups[0]["params"]:
            kept, average = p.clone(), self.state[p]["average"]
            p.copy_(average)
            average.copy_(kept)


# ----- end -----


def sinusoids(t, n):
    """t (B,) -> [cos(t f), sin(t f)] (B, n), with f_j = 10000^(-j / (n / 2))."""
    f = torch.exp(-math.log(10_000) * torch.arange(n // 2, device=t.device) / (n // 2))
    return torch.cat([(t.float()[:, None] * f).cos(), (t.float()[:, None] * f).sin()], 1)


def positions(side, C, scale=1.0):
    """(1, side^2, C): half the channels tell the column, half the row, as [sin, cos]; the column runs fastest."""
    i = torch.arange(side, dtype=torch.float64) / scale
    f = 10_000 ** -(torch.arange(C // 4, dtype=torch.float64) / (C // 4))
    e = torch.cat([(i[:, None] * f).sin(), (i[:, None] * f).cos()], 1)  # (side, C / 2)
    return torch.cat([e.repeat(side, 1), e.repeat_interleave(side, 0)], 1)[None].float()


class Linear(nn.Linear):
    def forward(self, x, act=None):
        return linear(x, self.weight, self.bias, act)


class PatchEmbed(nn.Module):
    """A product with each patch of P x P pixels: proj is the official convolution of stride P."""

    def __init__(self, c, P, C):
        super().__init__()
        self.proj = nn.Conv2d(c, C, P, P)

    def forward(self, x):
        (B, c, h, w), P = x.shape, self.proj.stride[0]
        x = x.view(B, c, h // P, P, w // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, c * P * P)  # (B, T, c P P)
        return linear(x, self.proj.weight.flatten(1), self.proj.bias)  # (B, T, C)


class TimestepEmbedder(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.mlp = nn.Sequential(Linear(256, C), nn.SiLU(), Linear(C, C))

    def forward(self, t):
        return self.mlp(sinusoids(t, 256))  # (B, C)


class LabelEmbedder(nn.Module):
    """One row a class, and one for no class."""

    def __init__(self, classes, C):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, C)

    def forward(self, y, drop):
        y = y if drop is None else torch.where(drop, self.embedding_table.num_embeddings - 1, y)
        return F.embedding(y, self.embedding_table.weight)  # (B, C)


class MLP(nn.Module):
    def __init__(self, n_in, C, n_out):
        super().__init__()
        self.fc1, self.fc2 = Linear(n_in, C), Linear(C, n_out)

    def forward(self, x):
        return self.fc2(self.fc1(x, act="gelu"))  # gelu_tanh


class CaptionEmbedder(nn.Module):
    """A caption's features -> the width of the model; y_embedding stands for no caption."""

    def __init__(self, n, features, C):
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(n, features) / features**0.5)
        self.y_proj = MLP(features, C, C)

    def forward(self, y, drop):
        y = y if drop is None else torch.where(drop[:, None, None], self.y_embedding[: y.shape[1]].to(y.dtype), y)
        return self.y_proj(y)  # (B, S, C)


class CaptionEncoder(nn.Module):
    """Bytes (B, S) -> features (B, S, C): a convolution over seven bytes, which tells words apart, and a Transformer
    layer that sees the whole caption. (PixArt-alpha takes T5's features instead.)"""

    def __init__(self, n, C):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, C), nn.Embedding(n, C)
        self.conv, self.mix = nn.Conv1d(C, 2 * C, 7, padding=3), Linear(2 * C, C)
        self.layer, self.norm = (
            nn.TransformerEncoderLayer(C, 4, 4 * C, 0.0, "gelu", batch_first=True, norm_first=True), nn.LayerNorm(C))

    def forward(self, ids):
        x = self.wte(ids)  # (B, S, C)
        x = x + self.mix(F.gelu(self.conv(x.mT).mT)) + self.wpe.weight[: ids.shape[1]]
        return self.norm(self.layer(x))


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.qkv, self.proj = Linear(cfg.dim, 3 * cfg.dim), Linear(cfg.dim, cfg.dim)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        return self.proj(attention(q, k, v, causal=False).transpose(1, 2).reshape(B, T, C))


class CrossAttention(nn.Module):
    """Queries from the picture, keys and values from the caption y (B, S, C); mask (B, S): its real tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.q_linear, self.kv_linear, self.proj = (Linear(cfg.dim, n * cfg.dim) for n in (1, 2, 1))

    def forward(self, x, y, mask):
        B, T, C = x.shape
        q = self.q_linear(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D)
        k, v = self.kv_linear(y).view(B, y.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, S, D)
        if mask is None:
            o = attention(q, k, v, causal=False)
        else:
            o = F.scaled_dot_product_attention(q, k, v, mask[:, None, None].bool())
        return self.proj(o.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """adaLN-zero (DiT), or adaLN-single and the caption (PixArt-alpha)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.dim
        self.attn, self.mlp = Attention(cfg), MLP(C, 4 * C, C)
        if cfg.cond == "text":
            self.cross_attn = CrossAttention(cfg)
            self.scale_shift_table = nn.Parameter(torch.randn(6, C) / C**0.5)
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(C, 6 * C))

    def forward(self, x, c, y=None, mask=None):
        """x (B, T, C); c (B, C) of time and label, or (B, 6, C) of time, the same for all blocks;
        y (B, S, C), mask (B, S): the caption."""
        m = self.adaLN_modulation(c).view(len(x), 6, -1) if y is None else self.scale_shift_table + c
        shift1, scale1, gate1, shift2, scale2, gate2 = m.unbind(1)  # each (B, C)
        a = self.attn(modulate(x, shift1, scale1))
        if y is None:
            h, x = add_modulate(x, a, gate1, shift2, scale2)  # x = x + gate1 a, h = LN(x) (1 + scale2) + shift2
        else:
            x = torch.addcmul(x, gate1[:, None], a)
            x = x + self.cross_attn(x, y, mask)
            h = modulate(x, shift2, scale2)
        return torch.addcmul(x, gate2[:, None], self.mlp(h))


class FinalLayer(nn.Module):
    def __init__(self, cfg, n_out):
        super().__init__()
        C = cfg.dim
        self.linear = Linear(C, n_out)
        if cfg.cond == "text":
            self.scale_shift_table = nn.Parameter(torch.randn(2, C) / C**0.5)
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(C, 2 * C))

    def forward(self, x, c, text):
        m = self.scale_shift_table + c[:, None] if text else self.adaLN_modulation(c).view(len(x), 2, -1)
        return self.linear(modulate(x, *m.unbind(1)))


class Model(Diffusion):
    """DiT with the parameter names of Meta's checkpoints; with cond="text" PixArt-alpha with those of its own."""

    def __init__(self, cfg):
        super().__init__()
        for name, n, why in (("heads", cfg.dim, "--dim"), ("patch", cfg.size, "the pictures' side")):
            if n % getattr(cfg, name):
                bad(f"--{name} {getattr(cfg, name)}: {why} {n} must be divisible by it")
        if cfg.dim % 4:
            bad(f"--dim {cfg.dim}: must be divisible by 4, the kinds of sinusoids in a position")
        self.cfg, C, P = cfg, cfg.dim, cfg.patch
        self.guided = 3 if cfg.cond == "class" and cfg.channels == 4 else None  # as the official DiT; latents have 4
        self.out = cfg.channels * (1 + cfg.learn_sigma)
        self.register_buffer("pos_embed", positions(cfg.size // P, C))
        self.x_embedder = PatchEmbed(cfg.channels, P, C)
        self.t_embedder = TimestepEmbedder(C)
        if cfg.cond == "class":
            self.y_embedder = LabelEmbedder(cfg.classes, C)
        if cfg.cond == "text":
            self.t_block = nn.Sequential(nn.SiLU(), Linear(C, 6 * C))
            self.y_embedder = CaptionEmbedder(cfg.captions, cfg.features or C, C)
            if not cfg.features:
                self.caption_encoder = CaptionEncoder(cfg.captions, C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.final_layer = FinalLayer(cfg, P * P * self.out)
        self.initialise()
        if cfg.vae:  # for grids; it is no part of the model
            object.__setattr__(self, "vae", load_vae(cfg))

    def initialise(self):
        """Xavier's uniform for products, 0.02 for times and labels, 1 for bytes;
        zero for what would let a block, or the output, do anything at first."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif re.search(r"adaLN_modulation|final_layer\.linear|cross_attn\.proj", name):
                nn.init.zeros_(p)
            elif re.search(r"embedding_table|t_embedder|t_block" + "|y_proj" * bool(self.cfg.features), name):
                nn.init.normal_(p, std=0.02)
            elif re.search(r"\.wte|\.wpe", name):
                nn.init.normal_(p)
            elif p.ndim > 1 and "table" not in name:
                nn.init.xavier_uniform_(p.view(len(p), -1))

    @staticmethod
    def noise_shape(cfg):
        return cfg.channels, cfg.size, cfg.size

    def encode(self, cond):
        """Bytes of captions (B, S) -> features (B, S, C); anything else as it is."""
        return self.caption_encoder(cond.long()) if self.cfg.cond == "text" and cond.ndim == 2 else cond

    def forward(self, x, t, cond=None, mask=None, drop=None):
        """x (B, c, h, w), t (B,), cond: labels (B,), bytes (B, S) or features (B, S, C), mask (B, S)
        -> (B, c or 2 c, h, w); drop (B,): no condition there."""
        (B, _, h, w), P, text = x.shape, self.cfg.patch, self.cfg.cond == "text"
        x = self.x_embedder(x) + self.pos_embed  # (B, T, C)
        c = self.t_embedder(t)  # (B, C)
        y, m = None, c
        if text:
            y, m = self.y_embedder(self.encode(cond), drop), self.t_block(c).view(B, 6, -1)
        elif self.cfg.cond == "class":
            m = c = c + self.y_embedder(cond, drop)
        for block in self.blocks:
            if self.cfg.ckpt and self.training:
                x = checkpoint(block, x, m, y, mask, use_reentrant=False)
            else:
                x = block(x, m, y, mask)
        x = self.final_layer(x, c, text)  # (B, T, P P out)
        return x.view(B, h // P, w // P, P, P, self.out).permute(0, 5, 1, 3, 2, 4).reshape(B, self.out, h, w)

    def param_groups(self, weight_decay):
        """Matrices decay, vectors do not; `matrix` marks what Muon may orthogonalise."""
        own = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        inner = [p for n, p in own if p.ndim == 2 and not re.search(r"table|wte|wpe|final_layer\.linear", n)]
        held = {id(p) for p in inner}
        return [
            dict(params=inner, weight_decay=weight_decay, matrix=True),
            dict(params=[p for _, p in own if p.ndim > 1 and id(p) not in held], weight_decay=weight_decay),
            dict(params=[p for _, p in own if p.ndim < 2], weight_decay=0.0),
        ]

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """source: a folder of ours or of diffusers (DiTTransformer2DModel, PixArtTransformer2DModel),
        or Meta's or PixArt-alpha's file."""
        source = HUB.get(source, source)
        if not Path(source).exists() and source.count("/") == 1:  # on the hub: the part of a pipeline that is the model
            find_checkpoint(f"{source}/transformer/config.json")
            source = find_checkpoint(f"{source}/transformer/diffusion_pytorch_model.safetensors").parent
        path = find_checkpoint(source)
        config, tensors = read_model(path)
        if config.keys() - set(SIZES) or not {"layers", "heads", "dim", "size"} <= config.keys():
            bad(f"{path}: config.json is not that of a DiT")
        cfg = Config(**config | overrides)
        model = cls(cfg)
        load_strict(model, tensors, path)
        return model

    def save_pretrained(self, folder, tensors=None, **how):
        """model.safetensors with the official names, which the official class loads, and config.json with the sizes."""
        config = dict(model_type="dit", **{k: getattr(self.cfg, k) for k in SIZES})
        write_weights(folder, self.state_dict() if tensors is None else tensors, config, **how)


HUB = {f"DiT-XL-2-{n}": f"facebook/DiT-XL-2-{n}" for n in (256, 512)}


DIFFUSERS = [  # its names -> the official ones, of DiT and of PixArt-alpha
    (r"^transformer_blocks\.", "blocks."), (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^caption_projection\.linear_", "y_embedder.y_proj.fc"),
    (r"^(?:blocks\.0\.norm1|adaln_single)\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^(?:blocks\.0\.norm1|adaln_single)\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^adaln_single\.linear", "t_block.1"), (r"^blocks\.0\.norm1\.emb\.class_embedder", "y_embedder"),
    (r"\.norm1\.linear", ".adaLN_modulation.1"), (r"\.ff\.net\.0\.proj", ".mlp.fc1"), (r"\.ff\.net\.2", ".mlp.fc2"),
    (r"^proj_out_1", "final_layer.adaLN_modulation.1"), (r"^proj_out(_2)?\.", "final_layer.linear."),
    (r"^scale_shift_table", "final_layer.scale_shift_table"), (r"\.attn2\.to_q", ".cross_attn.q_linear"),
    (r"\.(attn\d)\.to_out\.0", r".\1.proj"),
]  # fmt: skip


def from_diffusers(tensors, config):
    """DiTTransformer2DModel's or PixArtTransformer2DModel's tensors under official names; q, k, v are one product."""
    found = {}
    for k, t in tensors.items():
        for pattern, name in DIFFUSERS:
            k = re.sub(pattern, name, k)
        if not re.search(r"\.norm1\.emb\.", k):  # each block of DiT holds the embedders again
            found[k] = t
    for k in [k for k in found if k.endswith(("attn1.to_q.weight", "attn1.to_q.bias"))]:
        found[k.replace("attn1.to_q", "attn1.qkv")] = torch.cat([found.pop(k.replace("to_q", n))
                                                                 for n in ("to_q", "to_k", "to_v")])
    for k in [k for k in found if ".attn2.to_k" in k]:
        found[k.replace("attn2.to_k", "cross_attn.kv_linear")] = torch.cat([found.pop(k),
                                                                            found.pop(k.replace("to_k", "to_v"))])
    found = {k.replace(".attn1.", ".attn.").replace(".attn2.", ".cross_attn."): t for k, t in found.items()}
    C, P = found["x_embedder.proj.weight"].shape[0], config["patch_size"]
    scale = config.get("interpolation_scale") or max(config["sample_size"] // 64, 1)
    found["pos_embed"] = positions(config["sample_size"] // P, C, scale if "t_block.1.weight" in found else 1)
    if "t_block.1.weight" in found:  # no caption is the encoding of "" there, which is not in the file
        found["y_embedder.y_embedding"] = torch.zeros(120, found["y_embedder.y_proj.fc1.weight"].shape[1])
    return found


def sizes(tensors, heads=0):
    """The Config fields that official tensors tell."""
    C, c, P, _ = tensors["x_embedder.proj.weight"].shape
    found = dict(dim=C, channels=c, patch=P, size=P * math.isqrt(tensors["pos_embed"].shape[1]), objective="ddpm",
                 cond="none", layers=1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks.")),
                 heads=heads or (16 if C == 1152 else C // 64),
                 learn_sigma=len(tensors["final_layer.linear.bias"]) == 2 * c * P * P)  # fmt: skip
    if "y_embedder.embedding_table.weight" in tensors:
        found |= dict(cond="class", classes=len(tensors["y_embedder.embedding_table.weight"]) - 1)
    if "y_embedder.y_embedding" in tensors:
        captions, features = tensors["y_embedder.y_embedding"].shape
        found |= dict(cond="text", captions=captions, features=features)
    return found


def read_model(path):
    """-> (Config fields, official tensors) of a folder of ours or of diffusers, or of Meta's or PixArt-alpha's file."""
    path = path / "transformer" if (path / "transformer").is_dir() else path
    weights = path / "diffusion_pytorch_model.safetensors"
    try:
        if path.is_dir() and not weights.is_file() and not weights.with_suffix(".bin").is_file():
            config, tensors = read_checkpoint(path)
            return {k: v for k, v in config.items() if k != "model_type"}, tensors
        if path.is_dir():
            config, weights = (json.loads((path / "config.json").read_text()),
                               weights if weights.is_file() else weights.with_suffix(".bin"))
            tensors = (load_file(weights) if weights.suffix == ".safetensors"
                       else torch.load(weights, map_location="cpu", weights_only=True))
            tensors = from_diffusers(tensors, config)
            return sizes(tensors, config["num_attention_heads"]), tensors
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the flags of the official training script
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        for k in ("ema", "state_dict_ema", "state_dict", "model"):
            tensors = tensors.get(k) or tensors
        return sizes(tensors), tensors
    except KeyError as e:
        bad(f"{path}: has no {e}, so this is no DiT")
    except Exception as e:  # damaged JSON, safetensors, zip: each library has its own exceptions
        bad(f"{path}: damaged, or not a checkpoint ({first_line(e)})")


def picture_size(cfg, seen):
    """What the model works on, for data of (h, w, c) = seen -> side, channels; a mistake is a line."""
    h, w, c = seen
    if h != w:
        bad(f"--data {cfg.data}: its pictures are {h} x {w}, and a square is needed")
    if cfg.size not in (0, h) or cfg.channels not in (0, c):
        bad(f"--size {cfg.size} --channels {cfg.channels}: --data {cfg.data} is {h} x {w} with {c} channels")
    return h, c


def load_vae(cfg):
    """--vae, whose latents must be what the model draws."""
    try:
        import unet
    except ImportError:
        bad("--vae: the VAE is in unet.py, which must lie beside this file")
    unet.ME = ME  # what it says of a bad --vae is said by this program
    vae = unet.VAE.from_pretrained(cfg.vae).eval()
    if vae.cfg.latent != cfg.channels:
        bad(f"--vae {cfg.vae}: its latents have {vae.cfg.latent} channels, what this model draws has {cfg.channels}")
    return vae


def decode(cfg, model, x):
    """Latents -> pixels with --vae; pixels as they are."""
    if not cfg.vae:
        return x
    with torch.no_grad():
        return torch.cat([model.vae.to(x.device).decode(z / 0.18215) for z in x.split(1)])


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


# ----- shapes (shared) -----
COLOURS = dict(red=(220, 40, 40), green=(40, 180, 60), blue=(50, 80, 230), yellow=(235, 210, 30),
               purple=(170, 50, 200), cyan=(30, 200, 210))  # fmt: skip
FORMS = ("circle", "square", "triangle", "ring", "cross")


def outside(form, x, y, r):
    """How far (x, y) lies outside a form of radius r around 0, in pixels; negative inside."""
    if form == "circle":
        return np.hypot(x, y) - r
    if form == "ring":
        return abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r
    if form == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * r
    if form == "triangle":
        return np.maximum(abs(x) * 0.866 - y * 0.5 - 0.5 * r, y - 0.5 * r)
    return np.minimum(np.maximum(abs(x) - r, abs(y) - 0.33 * r), np.maximum(abs(y) - r, abs(x) - 0.33 * r))  # cross


def draw_shapes(n, size, seed):
    """n pictures of a shape each -> images (n, size, size, 3) uint8, labels (n,), captions (n,), the labels' names."""
    rng = np.random.default_rng((seed, size))
    names = [f"{c} {f}" for c in COLOURS for f in FORMS]
    labels, large, told = rng.integers(len(names), size=n), rng.random(n) < 0.5, rng.random(n) < 0.75
    r = size * np.where(large, rng.uniform(0.36, 0.38, n), rng.uniform(0.22, 0.235, n))
    x, y = size * rng.uniform(0.47, 0.53, (2, n))  # the centre, near the picture's: what can be learned in minutes
    grey = 255 * np.where(rng.random(n) < 0.5, rng.uniform(0, 0.2, n), rng.uniform(0.8, 1, n))
    colour = np.array(list(COLOURS.values()))[labels // len(FORMS)] + rng.uniform(-15, 15, (n, 3))  # (n, 3)
    at = np.arange(size) + 0.5
    images = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        d = outside(FORMS[labels[i] % len(FORMS)], at[None, :] - x[i], at[:, None] - y[i], r[i])
        cover = np.clip(0.5 - d, 0, 1)[..., None]  # an edge that passes through a pixel covers a part of it
        images[i] = (grey[i] + cover * (colour[i] - grey[i])).clip(0, 255)
    captions = [f"a {('large ' if big else 'small ') if t else ''}{names[k]}" for k, big, t in zip(labels, large, told)]
    return images, labels, np.array(captions), names


# ----- end -----


# ----- images (shared) -----
CHOSEN = dict(cond=("none", "class", "text"), objective=("ddpm", "flow"), betas=("linear", "scaled", "cosine"),
              sampler=("", "ddpm", "ddim", "euler", "heun"))  # fmt: skip


def check(cfg, tok=None):
    """Flags that name one of a few things, counts, and the condition that a checkpoint was made for."""
    for k, names in CHOSEN.items():
        if getattr(cfg, k) not in names:
            bad(f"{flag(k)} {getattr(cfg, k)}: one of {', '.join(filter(None, names))}")
    if cfg.objective == "flow" and cfg.sampler in ("ddpm", "ddim"):
        bad(f"--sampler {cfg.sampler}: --objective flow has euler and heun")
    for k in ("ema", "drop"):
        if not 0 <= getattr(cfg, k) < 1:
            bad(f"{flag(k)} {getattr(cfg, k)}: at least 0 and less than 1")
    for k in ("number", "sample_steps"):
        if getattr(cfg, k) < 1:
            bad(f"{flag(k)} {getattr(cfg, k)}: must be positive")
    made = dict(byte="text", clip="text").get(tok.kind, tok.kind) if tok else cfg.cond
    if cfg.cond not in ("none", made):
        bad(f"--cond {cfg.cond}: the checkpoint was made with --cond {made}")


class Tokenizer:
    """Conditions as numbers. kind none: 0. class: a place in the names `chars`. byte: a caption's utf-8, then zeros."""

    def __init__(self, kind, chars=()):
        self.kind, self.chars = kind, list(chars)

    def encode(self, texts, n):
        """A list of texts -> (B,) int64 labels, or (B, n) int64 bytes."""
        if self.kind == "class":
            return np.array([self.label(t) for t in texts], np.int64)
        if self.kind == "none":
            return np.zeros(len(texts), np.int64)
        ids = np.zeros((len(texts), n), np.int64)
        for row, t in zip(ids, texts):
            b = np.frombuffer(t.encode(errors="replace")[:n], np.uint8)  # half a surrogate pair has no utf-8
            row[: len(b)] = b
        return ids

    def label(self, text):
        if text in self.chars:
            return self.chars.index(text)
        if text.isdigit() and int(text) < len(self.chars):
            return int(text)
        shown = ", ".join(self.chars[:20]) + (", ..." if len(self.chars) > 20 else "")
        bad(f"{text!r} is no class of this model; a number below {len(self.chars)}, or one of {shown}")

    def decode(self, row):
        """A row of encode() -> text."""
        return (bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") if self.kind == "byte"
                else self.chars[int(row)] if self.chars else "")


class Images:
    """Pictures of a split with their conditions: uint8 (N, h, w, c), or float latents (N, c, h, w), as on the disk."""

    unit = "picture"

    def __init__(self, pictures, cond, mask, cfg, flip):
        self.pictures, self.cond, self.mask, self.flip, self.shape = pictures, cond, mask, flip, Model.noise_shape(cfg)

    def about(self):
        N, *shape = self.pictures.shape
        return f"{N:,} training pictures of {' x '.join(map(str, shape))}{', mirrored too' * self.flip}"

    def pack(self, numbers, mirrored, u, noise):
        """-> x_0 in [-1, 1] (n, c, h, w), conditions, two uniform numbers and noise of each; with features, a mask."""
        x = torch.from_numpy(np.ascontiguousarray(self.pictures[numbers]))
        x = x.permute(0, 3, 1, 2).float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x).contiguous()
        cond = torch.from_numpy(self.cond[numbers])
        cond = cond.float() if cond.is_floating_point() else cond
        return (x, cond, u, noise) if self.mask is None else (x, cond, u, noise, torch.from_numpy(self.mask[numbers]))

    def batch(self, cfg, step, micro, rank, world):
        """A pure function of (seed, step, micro), noise too, split over processes: any number sees the same data."""
        rng = np.random.default_rng((cfg.seed, step, micro))
        numbers, mirrored = rng.integers(len(self.pictures), size=cfg.batch), rng.random(cfg.batch) < 0.5 * self.flip
        g = torch.Generator().manual_seed(int(rng.integers(2**62)))
        u, noise, mine = (torch.rand(cfg.batch, 2, generator=g), torch.randn(cfg.batch, *self.shape, generator=g),
                          slice(rank, None, world))
        return self.pack(numbers[mine], torch.from_numpy(mirrored[mine]), u[mine], noise[mine])

    def windows(self, numbers):
        """For evaluation: a picture's noise depends on its number alone, and its times fill [0, 1) evenly
        (multiples of the golden ratio)."""
        n = torch.as_tensor(numbers, dtype=torch.float64)
        u = torch.stack([n * 0.6180339887498949 % 1, torch.ones(len(n))], 1).float()
        noise = torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(int(i))) for i in numbers])
        return self.pack(np.asarray(numbers), torch.zeros(len(n), dtype=torch.bool), u, noise)

    def fixed(self, cfg):
        return np.arange(min(len(self.pictures), cfg.eval_iters * cfg.batch))

    def start(self):
        """The conditions of the grid at the end of a run: eight of this split, as different as its first ones are."""
        _, first = np.unique(self.cond[:256], axis=0, return_index=True)
        at = np.sort(first)[:8]
        return self.cond[at], None if self.mask is None else self.mask[at]


def read_pictures(folder, size):
    """A folder of pictures -> uint8 (N, size, size, 3), captions (.txt beside one, or its name), labels (subfolder)."""
    try:
        from PIL import Image
    except ImportError:
        bad(f"--data {folder}: pictures are read with pillow: pip install pillow")
    paths = sorted(p for p in folder.rglob("*")
                   if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"))
    if not paths:
        bad(f"--data {folder}: no pictures (.png .jpg .jpeg .webp .bmp .gif) in it, nor train.npz")
    images, captions = [], []
    for p in paths:
        try:
            with Image.open(p) as im:  # ADM's crop: halve while twice too large, the shorter side to size, the centre
                im = im.convert("RGB")
                while min(im.size) >= 2 * size:
                    im = im.resize([s // 2 for s in im.size], Image.Resampling.BOX)
                im = im.resize([max(size, round(s * size / min(im.size))) for s in im.size], Image.Resampling.BICUBIC)
                x, y = ((s - size) // 2 for s in im.size)
                images.append(np.asarray(im.crop((x, y, x + size, y + size))))
        except OSError as e:
            bad(f"{p}: no picture that can be read ({e})")
        note = p.with_suffix(".txt")
        captions.append(note.read_text(errors="replace").strip() if note.is_file() else p.stem.replace("_", " "))
    return dict(images=np.stack(images), captions=np.array(captions), labels=np.array([p.parent.name for p in paths]))


def read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as z:
            arrays = {k: z[k] for k in z.files}
    except Exception as e:  # a damaged zip, an array of objects, no file
        bad(f"--data {path}: cannot be read as .npz ({first_line(e)})")
    images = arrays.get("images", arrays.get("latents"))
    if images is None or images.ndim not in (3, 4) or images.dtype != np.uint8 and images.dtype.kind != "f":
        bad(f"--data {path}: needs images, uint8 (N, h, w) or (N, h, w, c), or latents as floats (N, c, h, w); "
            f"it has {', '.join(arrays) or 'nothing'}")
    for k, v in arrays.items():
        if k in ("labels", "groups", "captions", "features", "mask") and (not v.ndim or len(v) != len(images)):
            bad(f"--data {path}: {len(v) if v.ndim else 1} {k} for {len(images)} images")
        if k in ("labels", "groups", "captions") and v.dtype.kind == "S":
            arrays[k] = np.char.decode(v, "utf-8", "replace")
    return arrays | dict(images=images if images.ndim == 4 else images[..., None])


def load_images(cfg, given, tok):
    """-> (training Images, validation Images, Tokenizer); sets cfg.size, cfg.channels and cfg.classes.
    tok: a checkpoint's, which must fit."""
    check(cfg, tok)
    folder, meta, path = Path(__file__).parent / "data", {}, Path(cfg.data)
    sets = [f.stem for f in folder.glob("*.py") if "NAME, PICTURES = " in f.read_text()]
    if cfg.data == "shapes" and not (folder / "shapes.py").is_file():  # this file alone
        print("!!! no data/ beside this file: drawing shapes; --data takes an .npz or a folder of pictures")
        parts = {s: dict(zip(("images", "labels", "captions", "names"), draw_shapes(n, cfg.size or 32, k)))
                 for k, (s, n) in enumerate(dict(train=10_000, val=500).items())}
        meta = dict(names=parts["train"].pop("names"), flip=True)
    else:
        if cfg.data in sets:
            path = folder / cfg.data
            size = ["--size", str(cfg.size)] if cfg.data == "shapes" and cfg.size not in (0, 32) else []
            path = path / str(cfg.size) if size else path
            if not (path / "meta.json").is_file():
                r = subprocess.run([sys.executable, folder / f"{cfg.data}.py", *size],
                                   stderr=subprocess.PIPE, text=True)
                if r.returncode:
                    bad((r.stderr.strip().splitlines() or ["it failed"])[-1] + "; --data shapes needs no network")
        if (path / "train.npz").is_file():
            parts = {s: read_npz(path / f"{s}.npz") for s in ("train", "val")}
            meta = json.loads((path / "meta.json").read_text()) if (path / "meta.json").is_file() else {}
        elif path.is_dir() or path.is_file() and path.suffix == ".npz":  # no split: one in ten, at most 1,000
            whole = read_pictures(path, cfg.size or 64) if path.is_dir() else read_npz(path)
            N = len(whole["images"])
            order = np.random.default_rng(0).permutation(N)
            cut = min(1000, max(1, N // 10))
            if N < 2:
                bad(f"--data {cfg.data}: {N} pictures; it takes two, one of them for validation")
            parts = dict(train={k: v[order[cut:]] for k, v in whole.items()},
                         val={k: v[order[:cut]] for k, v in whole.items()})
        else:
            bad(f"--data {cfg.data}: no .npz, no folder of pictures, nor one of {', '.join(sorted(sets))}")
    train = parts["train"]["images"]
    seen = train.shape[1:3] + train.shape[3:] if train.dtype == np.uint8 else train.shape[2:] + train.shape[1:2]
    cfg.size, cfg.channels = picture_size(cfg, seen)  # seen: h, w, c

    def class_numbers(labels, most=math.inf):
        """Labels that are numbers, checked."""
        if labels.ndim != 1 or labels.dtype.kind not in "biu" or labels.min() < 0 or labels.max() >= most:
            shown = f"{labels.dtype}, {labels.min()} to {labels.max()}" if labels.dtype.kind in "biuf" else labels.dtype
            bad(f"--data {cfg.data}: its labels ({shown}) must be texts, or whole numbers from 0"
                + f" to {most - 1}" * (most < math.inf))
        return labels.astype(np.int64)

    def conditions(part):
        """-> what the model gets of each picture, its mask, and the names of classes."""
        labels, names = part.get("labels", part.get("groups")), meta.get("names")
        if cfg.cond == "none":
            return np.zeros(len(part["images"]), np.int64), None, []
        if cfg.cond == "class":
            if labels is None:
                bad(f"--cond class: --data {cfg.data} has no labels; --cond text or none")
            if labels.dtype.kind in "US" and labels.ndim == 1:
                names = tok.chars if tok else sorted(set(np.concatenate(
                    [p.get("labels", p.get("groups")) for p in parts.values()]).tolist()))
                labels = Tokenizer("class", names).encode(labels.tolist(), 0)
            labels = class_numbers(labels)
            return labels, None, names or [str(i) for i in range(int(labels.max()) + 1)]
        if cfg.features:
            if part.get("features") is None or part["features"].shape[1:] != (cfg.captions, cfg.features):
                bad(f"--features {cfg.features}: --data {cfg.data} must have "
                    f"features (N, {cfg.captions}, {cfg.features}), and mask (N, {cfg.captions})")
            return part["features"], part.get("mask"), []
        captions = part.get("captions")
        if captions is None and labels is not None and labels.dtype.kind in "US":
            captions = labels
        if captions is None and labels is not None and names:
            captions = np.array(names)[class_numbers(labels, len(names))]
        if captions is None:
            bad(f"--cond text: --data {cfg.data} has no captions; --cond class or none")
        if captions.ndim != 1 or captions.dtype.kind != "U":
            bad(f"--data {cfg.data}: its captions ({captions.dtype}) must be texts, one for each picture")
        return (tok or Tokenizer("byte")).encode(captions.tolist(), cfg.captions), None, []

    found = {s: conditions(part) for s, part in parts.items()}
    names = max((names for *_, names in found.values()), key=len)
    if cfg.cond == "class":
        cfg.classes = cfg.classes or len(names)
        most = max(int(cond.max()) for cond, *_ in found.values())
        if most >= cfg.classes:
            bad(f"--classes {cfg.classes}: --data {cfg.data} has a label {most}")
        names = names if len(names) == cfg.classes else [str(i) for i in range(cfg.classes)]
    tok = tok or Tokenizer(dict(text="byte").get(cfg.cond, cfg.cond), names)
    flip = bool(meta.get("flip", cfg.flip))
    train, val = (Images(parts[s]["images"], *found[s][:2], cfg, flip and s == "train") for s in ("train", "val"))
    return train, val, tok


def write_png(path, pixels):
    """pixels (h, w, 3) uint8."""
    h, w, _ = pixels.shape
    rows = np.concatenate([np.zeros((h, 1), np.uint8), pixels.reshape(h, -1)], 1)  # before each row its filter, 0: none
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    head = struct.pack(">2I5B", w, h, 8, 2, 0, 0, 0)
    png = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows.tobytes()))
           + chunk(b"IEND", b""))
    write_file(path, lambda tmp: Path(tmp).write_bytes(png))


def grid(x, columns, scale=1):
    """Pictures (n, c, h, w) in [-1, 1] -> one (h', w', 3) uint8 with so many in a row, lines between them."""
    x = ((x.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    x = F.pad(x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x[:, :3], (1, 1, 1, 1), value=128)
    n, _, h, w = x.shape
    x = F.pad(x, (0, 0) * 3 + (0, -n % columns), value=128).view(-1, columns, 3, h, w)
    x = x.permute(0, 3, 1, 4, 2).reshape(-1, columns * w, 3).numpy()
    return x.repeat(scale, 0).repeat(scale, 1)


def draw_grid(cfg, model, asked, path):
    """A row of cfg.number pictures for each condition asked = (conditions (n, ...), mask or None) -> path, a PNG."""
    device = next(model.parameters()).device
    cond, mask = (None if v is None else torch.as_tensor(v).repeat_interleave(cfg.number, 0).to(device) for v in asked)
    cond = cond.float() if cond.is_floating_point() else cond
    g = torch.Generator().manual_seed(cfg.seed)
    guidance = 1.0 if cfg.cond == "none" else cfg.guidance
    pixels = cfg.channels in (1, 3)
    x = torch.cat([
        decode(cfg, model, model.sample(c, cfg.sample_steps, guidance, g, cfg.sampler, m, clip=pixels))
        for c, m in zip(cond.split(64), [None] * len(cond) if mask is None else mask.split(64))
    ])  # fmt: skip
    write_png(path, grid(x, cfg.number, max(1, 96 // x.shape[-1])))
    return x


def show(cfg, model, tok, asked):
    """At the end of a run: a grid, and what its rows were asked to be."""
    path = f"{cfg.out}/grid.png"
    draw_grid(cfg, model, asked, path)
    rows = [tok.decode(row) for row in asked[0]] if asked[0].ndim < 3 and cfg.cond != "none" else []
    print(f"{path}: {cfg.number} pictures of each condition, a row for each" + "".join(f"\n    {row}" for row in rows))


def sample(cfg, model, tok):
    check(cfg, tok)
    if cfg.features and cfg.cond == "text":
        if not cfg.sample.endswith(".npz"):
            bad(f"--sample {cfg.sample}: this model's captions are another encoder's features; "
                f"an .npz with features (n, {cfg.captions}, {cfg.features}), and mask")
        try:
            z = np.load(cfg.sample, allow_pickle=False)
            asked, rows = (z["features"], z["mask"] if "mask" in z else None), z["features"]
        except (OSError, KeyError, ValueError) as e:
            bad(f"--sample {cfg.sample}: no .npz with features ({e})")
    else:
        tok = tok or Tokenizer("class" if cfg.cond == "class" else "byte", [str(i) for i in range(cfg.classes)])
        rows = [text.strip() for text in cfg.sample.split("|")]
        asked = tok.encode(rows, cfg.captions), None
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        bad(f"--out {cfg.out}: {e.strerror}")
    start, path = time.perf_counter(), f"{cfg.out}/sample.png"
    draw_grid(cfg, model, asked, path)
    n, seconds = len(rows) * cfg.number, time.perf_counter() - start
    print(f"{path}: {n} pictures, {cfg.number} in a row "
          f"[{cfg.sample_steps} steps, guidance {cfg.guidance:g}, {seconds:.1f} s]")


load_data = load_images
TOK = {}  # tokenizers of checkpoints that bring none, as in the language models: here made from the number of classes
SOURCES = dict(init=Model.from_pretrained)  # flags that name where a model comes from; flags that ask something of it
ACTIONS = dict(sample=sample)


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
