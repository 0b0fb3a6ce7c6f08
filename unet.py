"""
U-Net of Stable Diffusion 1.x       Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
                                    arXiv:2112.10752v2 (U-Net: Ronneberger et al. 2015, arXiv:1505.04597v1)

Special: convolutions. A picture is halved level by level and doubled again; on the way up each level sees, beside what
comes from below, what that level left on the way down. In between, all places attend to each other and the caption.
    residual block   x + conv(silu(GN(conv(silu(GN(x))) + W silu(e)))),   e = MLP(sinusoids of the time t)
    transformer      y += Attention(LN(y));  y += Attention(LN(y), caption);  y += GEGLU(LN(y))   y: places, as tokens
    way up           each residual block takes [x, what the way down left there]
    caption          CLIP's text encoder: a causal Transformer over the tokens of the caption
    latents          with --vae: z = scale (mean + std noise), which a VAE makes of a picture, takes the picture's place

Run:     python unet.py                               trains on drawn shapes with captions, ends with a grid of pictures
         python unet.py --sample "a small red circle" --guidance 3    from out/unet
         python unet.py --stage vae --data my.npz --out out/vae       first the VAE: pictures into latents and back,
         python unet.py --vae out/vae --data my.npz                   then the diffusion, in its latents
         python unet.py --init stable-diffusion-v1-5/stable-diffusion-v1-5 --sample castle --guidance 7.5 --sampler ddim
                                                      any folder or hub name with unet/, vae/, text_encoder/, tokenizer/
         torchrun --nproc_per_node=2 unet.py          the same run on two GPUs
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
    from kernels.norm import group_norm_silu, layer_norm
except ImportError:  # this file alone: the same operations in plain PyTorch

    def attention(q, k, v, causal=True):  # softmax(q k^T / sqrt(D)) v
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def group_norm_silu(x, w, b, groups, eps=1e-5, silu=True):
        y = F.group_norm(x, groups, w, b, eps)
        return F.silu(y) if silu else y

    def layer_norm(x, w, b=None, eps=1e-5):
        return F.layer_norm(x, w.shape, w, b, eps)


@dataclass
class Config:
    # the model
    widths: list = (320, 640, 1280, 1280)  # channels of each level; a level has half the side of the one before
    attn: list = (1, 1, 1, 0)  # for each level: 1 with transformers, 0 without
    layers: int = 2  # residual blocks of a level on the way down; on the way up there is one more
    heads: int = 8  # attention heads, at every level
    groups: int = 32  # of a group norm
    size: int = 0  # side of the pictures, of which latents are smaller; 0: the data's
    channels: int = 0  # its channels: 3 for colours, 1 for grey, those of the latents with a VAE; 0: the data's
    cond: str = "text"  # none | class | text
    classes: int = 0  # labels that --cond class knows; 0: as many as the data has
    captions: int = 32  # tokens of a caption
    features: int = 0  # width of a caption's features where they come from elsewhere; 0: the text encoder makes them
    dim: int = 768  # width of the text encoder
    text_layers: int = 12  # its layers
    text_heads: int = 12  # its attention heads
    vocab: int = 0  # its tokens; 0: bytes, or the classes and one more for none
    vae_widths: list = (128, 256, 512, 512)  # channels of each level of the VAE
    vae_layers: int = 2  # residual blocks of its levels; in the decoder there is one more
    latent: int = 4  # channels of its latents
    scale: float = 0.0  # factor that gives latents a variance of 1; 0: the pixels themselves are diffused
    objective: str = "flow"  # ddpm | flow
    betas: str = "linear"  # noise levels of --objective ddpm: linear (DDPM, DiT) | scaled (Stable Diffusion) | cosine
    # the run
    preset: str = ""  # sizes and schedule together; default: cpu without a GPU, gpu with one
    stage: str = "diffusion"  # diffusion | vae (what is trained)
    data: str = "shapes"  # name in data/, an .npz (images; labels, captions or features), a folder of pictures and .txt
    flip: bool = False  # mirror half of the pictures of an .npz or a folder; sets in data/ know whether it is allowed
    batch: int = 32  # pictures per micro-step, over all processes together
    accum: int = 1  # micro-steps whose gradients are summed into one step
    steps: int = 1000  # optimizer steps
    lr: float = 1e-4  # peak learning rate
    lr_end: float = 1.0  # last learning rate, as a fraction of --lr; cosine in between
    warmup: int = 0  # steps of linear warm-up
    beta2: float = 0.999  # second moment's decay in AdamW
    wd: float = 0.01  # weight decay, on matrices and convolutions only
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema: float = 0.9999  # decay of the averaged weights, which are what is saved and sampled from
    drop: float = 0.1  # conditions left out in training, for guidance
    kl: float = 1e-4  # weight of the divergence in --stage vae
    optim: str = "adamw"  # adamw | muon (convolutions and matrices inside blocks; AdamW for the rest) | adamw8bit
    seed: int = 1337  # of weights, batches, noise and samples
    device: str = ""  # cpu | cuda | mps; default: the best there is
    dtype: str = "auto"  # auto (bf16 where it is faster here) | fp32 | bf16 (autocast)
    compile: bool = False  # torch.compile
    ckpt: bool = False  # recompute each block in backward instead of keeping its activations
    fsdp: bool = False  # under torchrun: shard parameters, gradients and optimizer (FSDP2) instead of copying them
    out: str = ""  # folder of the run; default out/<file>
    resume: bool = False  # go on with the run in --out, bit for bit
    init: str = ""  # start from a checkpoint: folder or hub name
    eval_every: int = 250  # steps between evaluations and saves
    eval_iters: int = 4  # batches of an evaluation; always the same ones, with the same noise
    log_every: int = 10  # steps between progress lines
    sample: str = ""  # draw this caption, class or number ("a | b": both), from --out or --init, instead of training
    number: int = 8  # how many of each
    sampler: str = ""  # ddpm | ddim | euler | heun; default: euler for flow, ddpm for ddpm
    sample_steps: int = 50  # steps of the sampler
    guidance: float = 3.0  # classifier-free guidance: 1 is none
    vae: str = ""  # diffuse in the latents of this VAE, a folder or hub name

    def __post_init__(self):
        for name in ("widths", "attn", "vae_widths"):
            try:
                setattr(self, name, [int(n) for n in getattr(self, name)])
            except ValueError:
                bad(f"{flag(name)} {' '.join(getattr(self, name))}: whole numbers, one for each level")
            if name != "attn" and min(getattr(self, name), default=0) < 1:
                bad(f"{flag(name)} {' '.join(map(str, getattr(self, name)))}: positive numbers, one for each level")
        if self.stage == "vae":
            self.cond = "none"


PRESETS = {
    # pixels of 32 a side, about five minutes on two cores, in fp32: in bf16 the forms were right, the colours were not;
    # --stage vae: latents of half the side
    "cpu": dict(widths=(16, 32, 64), attn=(0, 0, 1), layers=1, heads=4, groups=8, captions=24, dim=64, text_layers=2,
                text_heads=4, vae_widths=(16, 32), vae_layers=1, batch=16, steps=1500, lr=7e-3, lr_end=0.0, warmup=20,
                optim="muon", ema=0.99, dtype="fp32", eval_every=750),
    # pixels or latents of 32 to 64 a side on one 12 GB GPU
    "gpu": dict(widths=(128, 256, 256), attn=(0, 1, 1), heads=8, dim=256, text_layers=4, text_heads=4,
                vae_widths=(64, 128, 256), batch=64, steps=20_000, lr=2e-4, lr_end=0.0, warmup=200, ema=0.999,
                eval_every=1000),
    # Stable Diffusion 1.x, to be fine-tuned with --init sd1 or a folder
    "sd1": dict(captions=77, vocab=49408, objective="ddpm", betas="scaled", scale=0.18215, size=512, channels=4,
                batch=4, accum=8, ckpt=True, steps=100_000, warmup=1000, sampler="ddim", guidance=7.5,
                optim="adamw8bit", eval_every=1000),
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


class GroupNorm(nn.Module):
    """GN(x), or silu(GN(x)): the C / groups channels of a group of one picture get mean 0 and variance 1."""

    def __init__(self, groups, C, eps, silu=True):
        super().__init__()
        self.groups, self.eps, self.silu = groups, eps, silu
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C))

    def forward(self, x):
        return group_norm_silu(x, self.weight, self.bias, self.groups, self.eps, self.silu)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)


class ResBlock(nn.Module):
    def __init__(self, C_in, C, time, groups, eps):
        super().__init__()
        self.norm1 = GroupNorm(groups, C_in, eps)
        self.conv1 = nn.Conv2d(C_in, C, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, C) if time else None
        self.norm2 = GroupNorm(groups, C, eps)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(C_in, C, 1) if C_in != C else None
        nn.init.zeros_(self.conv2.weight)  # as LDM, whose biases are 0, too: a block begins near the identity

    def forward(self, x, e=None):
        """x (B, C_in, h, w), e (B, time): silu of the time's embedding, or None -> (B, C, h, w)."""
        h = self.conv1(self.norm1(x))
        if e is not None:
            h.add_(self.time_emb_proj(e)[:, :, None, None])  # in place: backward does not need a convolution's output
        return self.conv2(self.norm2(h)).add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v; q of x, k and v of the context, which is x itself or the caption."""

    def __init__(self, C, context, heads, bias=False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(C, C, bias)
        self.to_k = nn.Linear(context, C, bias)
        self.to_v = nn.Linear(context, C, bias)
        self.to_out = nn.ModuleList([nn.Linear(C, C)])

    def forward(self, x, context=None, mask=None):
        """x (B, T, C), context (B, S, context), mask (B, S), True: a token to attend to -> (B, T, C)."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (u.unflatten(2, (self.heads, -1)).transpose(1, 2) for u in (q, k, v))  # each (B, H, T or S, D)
        if mask is None and q.shape[3] <= 128:
            o = attention(q, k, v, causal=False)
        else:
            o = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None].bool())
        return self.to_out[0](o.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """(a gelu(g)) W' + b' with [a, g] = x W + b and gelu(g) = g Phi(g)."""

    def __init__(self, C):
        super().__init__()
        self.net = nn.ModuleList([nn.ModuleDict(dict(proj=nn.Linear(C, 8 * C))), nn.Identity(), nn.Linear(4 * C, C)])

    def forward(self, x):
        a, g = self.net[0].proj(x).chunk(2, dim=-1)  # each (B, T, 4C)
        return self.net[2](a * F.gelu(g))


class TransformerBlock(nn.Module):
    def __init__(self, C, context, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = LayerNorm(C), LayerNorm(C), LayerNorm(C)
        self.attn1 = Attention(C, C, heads)
        self.attn2 = Attention(C, context, heads)
        self.ff = GEGLU(C)

    def forward(self, y, text, mask=None):
        y = y + self.attn1(self.norm1(y))
        y = y + self.attn2(self.norm2(y), text, mask)
        return y + self.ff(self.norm3(y))


class Transformer(nn.Module):
    """One TransformerBlock over the T = h w places of a picture."""

    def __init__(self, C, context, heads, groups):
        super().__init__()
        self.norm = GroupNorm(groups, C, 1e-6, silu=False)  # 1e-6 here and in the VAE, 1e-5 in the U-Net's ResBlocks
        self.proj_in = nn.Conv2d(C, C, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(C, context, heads)])
        self.proj_out = nn.Conv2d(C, C, 1)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x, text, mask=None):
        y = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, T, C)
        y = F.linear(y, self.proj_in.weight.flatten(1), self.proj_in.bias)  # a 1 x 1 convolution
        y = self.transformer_blocks[0](y, text, mask)
        y = F.linear(y, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # (B, C, h, w)


class Block(nn.Module):
    """One level: residual blocks, a transformer after each where the level attends, then half or twice the side."""

    def __init__(self, widths, C, cfg, time=0, transformer=None, down=False, up=False, eps=1e-6):
        """widths: channels that each residual block takes. Without time, and with eps 1e-6: a level of the VAE."""
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(n, C, time, cfg.groups, eps) for n in widths)
        self.attentions = nn.ModuleList(transformer(C) for _ in widths) if transformer else None
        self.downsamplers = nn.ModuleList([Resample(C, stride=2, padding=1 if time else 0)]) if down else None
        self.upsamplers = nn.ModuleList([Resample(C, stride=1, padding=1)]) if up else None
        self.ckpt = cfg.ckpt

    def layer(self, i, x, e, text, mask):
        x = self.resnets[i](x, e)
        return self.attentions[i](x, text, mask) if self.attentions else x

    def forward(self, x, e=None, text=None, mask=None, leave=None, take=None):
        """leave: a list where the way down puts what it makes; take: that list, used up from its end on the way up."""
        for i in range(len(self.resnets)):
            x = torch.cat([x, take.pop()], 1) if take else x
            args = i, x, e, text, mask
            x = checkpoint(self.layer, *args, use_reentrant=False) if self.ckpt and self.training else self.layer(*args)
            if leave is not None:
                leave.append(x)
        if self.downsamplers:
            x = self.downsamplers[0](x)
            if leave is not None:
                leave.append(x)
        return self.upsamplers[0](x) if self.upsamplers else x


def doubled(x, w, b):
    """A 3 x 3 convolution of x with every pixel four times, computed at the small size. An even row of the result sees
    rows i - 1 and i, with weights w_0 and w_1 + w_2, an odd row i and i + 1, with w_0 + w_1 and w_2; so do columns:
    4 products a pixel where 9 were."""
    (B, _, h, n), O = x.shape, len(w)
    halves = lambda w, d: [torch.stack(k, d) for w0, w1, w2 in [w.unbind(d)] for k in ((w0, w1 + w2), (w0 + w1, w2))]
    p, rows = F.pad(x, (1, 1, 1, 1)), []
    for i, k in enumerate(halves(w, 2)):
        pair = [F.conv2d(p[:, :, i : i + h + 1, j : j + n + 1], q, b) for j, q in enumerate(halves(k, 3))]
        rows.append(torch.stack(pair, 4))  # (B, O, h, n, 2)
    return torch.stack(rows, 3).reshape(B, O, 2 * h, 2 * n).contiguous(memory_format=torch.channels_last)


class Resample(nn.Module):
    """Half the side: a convolution with stride 2. Twice the side: each pixel four times, then a convolution."""

    def __init__(self, C, stride, padding):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, stride, padding)

    def forward(self, x):
        if self.conv.stride[0] == 1:
            return doubled(x, self.conv.weight, self.conv.bias)
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))  # the VAE pads right and below only


class Middle(nn.Module):
    """At the lowest level: residual block, attention, residual block."""

    def __init__(self, C, cfg, attention, time=0, eps=1e-6):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(C, C, time, cfg.groups, eps) for _ in range(2))
        self.attentions = nn.ModuleList([attention])

    def forward(self, x, e=None, *text):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, e), *text), e)


def sinusoids(t, C):
    """t (B) -> (B, C): cos(t f_j), then sin(t f_j), with f_j = 10000^(-2j / C)."""
    f = torch.exp(torch.arange(C // 2, device=t.device) * (-2 * math.log(10000) / C))
    a = t.float()[:, None] * f
    return torch.cat([a.cos(), a.sin()], 1)


class Model(Diffusion):
    """The U-Net, with the names of diffusers' UNet2DConditionModel. Parts: text_encoder, and vae where there is one."""

    def __new__(cls, cfg, *parts):  # Model(cfg) is what train() trains
        return VAE(cfg) if cfg.stage == "vae" else super().__new__(cls)

    def __init__(self, cfg, vae=None, text_encoder=None):
        super().__init__()
        widths, C, time, last = cfg.widths, cfg.widths[0], 4 * cfg.widths[0], len(cfg.widths) - 1
        self.cfg, context = cfg, cfg.features or cfg.dim
        if len(cfg.attn) != len(widths):
            bad(f"--attn {' '.join(map(str, cfg.attn))}: 0 or 1 for each of the {len(widths)} levels of --widths")
        for name, n in (("heads", cfg.heads), ("groups", cfg.groups)):
            if any(w % n for w in widths):
                bad(f"--{name} {n}: each of --widths {' '.join(map(str, widths))} must be divisible by it")
        if self.noise_shape(cfg)[1] % 2**last:
            bad(f"--widths {' '.join(map(str, widths))}: "
                f"halves {last} times what has a side of {self.noise_shape(cfg)[1]}")
        transformer = functools.partial(Transformer, context=context, heads=cfg.heads, groups=cfg.groups)
        block = functools.partial(Block, cfg=cfg, time=time, eps=1e-5)
        self.time_embedding = nn.ModuleDict(dict(linear_1=nn.Linear(C, time), linear_2=nn.Linear(time, time)))
        self.conv_in = nn.Conv2d(cfg.channels, C, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        left = [C]  # channels of all that the way down leaves
        for i, w in enumerate(widths):
            n = [C] + [w] * (cfg.layers - 1)
            self.down_blocks.append(block(n, w, transformer=transformer if cfg.attn[i] else None, down=i < last))
            left, C = left + [w] * (cfg.layers + (i < last)), w
        self.mid_block = Middle(C, cfg, transformer(C), time, 1e-5)
        for i, w in reversed([*enumerate(widths)]):
            n = [c + left.pop() for c in [C] + [w] * cfg.layers]
            self.up_blocks.append(block(n, w, transformer=transformer if cfg.attn[i] else None, up=i > 0))
            C = w
        self.conv_norm_out = GroupNorm(cfg.groups, C, 1e-5)
        self.conv_out = nn.Conv2d(C, cfg.channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        self.text_encoder = text_encoder or (None if cfg.features else TextEncoder(cfg))
        self.vae = vae or (VAE.from_pretrained(cfg.vae) if cfg.vae else None)
        if self.vae:
            self.vae.requires_grad_(False)
        if self.text_encoder and cfg.vocab == CLIP:
            self.text_encoder.requires_grad_(False)  # Stable Diffusion's training leaves CLIP as it is

    @staticmethod
    def noise_shape(cfg):
        side = cfg.size >> (len(cfg.vae_widths) - 1 if cfg.scale or cfg.stage == "vae" else 0)
        return cfg.channels, side, side

    def encode(self, cond):
        """Tokens (B, S) or labels (B,) -> features (B, S, dim); features as they are."""
        return cond if cond.is_floating_point() else self.text_encoder(cond.view(len(cond), -1))

    def nothing(self, S, device):
        """Tokens (1, S) of no caption: no bytes, the label after the last, or CLIP's begin and ends."""
        vocab = len(self.text_encoder.text_model.embeddings.token_embedding.weight)
        fill = vocab - 1 if self.cfg.cond == "class" or vocab == CLIP else 0
        ids = torch.full((1, S), fill, device=device)
        ids[0, 0] -= int(vocab == CLIP)
        return ids

    def forward(self, x, t, cond, mask=None, drop=None):
        """x (B, c, h, w), t (B,), cond: tokens (B, S), labels (B,) or features (B, S, C), mask (B, S): the tokens to
        attend to, None: all, as Stable Diffusion does -> (B, c, h, w); drop (B,): no condition there."""
        text = self.encode(cond)  # (B, S, C)
        if drop is not None:  # the features of no caption; zeros, where features come from elsewhere
            none = self.encode(self.nothing(text.shape[1], x.device)) if self.text_encoder else torch.zeros_like(text)
            text = torch.where(drop[:, None, None], none.to(text.dtype), text)
        e = sinusoids(t, self.cfg.widths[0])
        e = F.silu(self.time_embedding.linear_2(F.silu(self.time_embedding.linear_1(e))))  # (B, 4 widths[0])
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down_blocks:
            x = block(x, e, text, mask, leave=skips)
        x = self.mid_block(x, e, text, mask)
        for block in self.up_blocks:
            x = block(x, e, text, mask, take=skips)
        return self.conv_out(self.conv_norm_out(x))

    def loss_at(self, x0, cond, u, noise, mask=None):
        if self.vae and x0.shape != noise.shape:  # pixels: the VAE makes latents, the dice for them come from the noise
            with torch.no_grad():
                mean, logvar = self.vae.encode(x0)
                x0 = self.cfg.scale * (mean + (logvar / 2).exp() * noise.flip(0, 2, 3))
        return super().loss_at(x0, cond, u, noise, mask)

    def prepare(self, cast):
        """Before training: the weights of convolutions with their channels last, as the pictures lie."""
        for p in (p for p in self.parameters() if p.ndim == 4):
            p.data = p.data.contiguous(memory_format=torch.channels_last)

    def param_groups(self, weight_decay):
        """Matrices and convolutions decay, vectors do not; `matrix` marks what Muon may orthogonalise."""
        kinds = ResBlock, Resample, Transformer, TextLayer
        inner = [p for m in self.modules() if isinstance(m, kinds)
                 for p in m.parameters() if p.ndim > 1 and p.requires_grad]
        held = {id(p) for p in inner}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in held]
        return [
            dict(params=inner, weight_decay=weight_decay, matrix=True),
            dict(params=[p for p in rest if p.ndim > 1], weight_decay=weight_decay),
            dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0),
        ]

    def hf_config(self):
        """config.json as diffusers' UNet2DConditionModel reads it."""
        c, kinds = self.cfg, ["CrossAttn" * bool(a) for a in self.cfg.attn]
        return dict(
            _class_name="UNet2DConditionModel", sample_size=self.noise_shape(c)[1], in_channels=c.channels,
            out_channels=c.channels, block_out_channels=c.widths, down_block_types=[f"{k}DownBlock2D" for k in kinds],
            up_block_types=[f"{k}UpBlock2D" for k in reversed(kinds)], mid_block_type="UNetMidBlock2DCrossAttn",
            layers_per_block=c.layers, attention_head_dim=c.heads, cross_attention_dim=c.features or c.dim,
            norm_num_groups=c.groups, norm_eps=1e-5, act_fn="silu", downsample_padding=1, flip_sin_to_cos=True,
            freq_shift=0, use_linear_projection=False, num_attention_heads=None, class_embed_type=None,
            addition_embed_type=None, encoder_hid_dim_type=None, transformer_layers_per_block=1,
            only_cross_attention=False, dual_cross_attention=False, resnet_time_scale_shift="default",
            center_input_sample=False, upcast_attention=False, time_embedding_dim=None,
        )  # fmt: skip

    @staticmethod
    def sizes(c):
        """config.json -> fields of Config."""
        attn = [int(t.startswith("CrossAttn")) for t in c["down_block_types"]]
        return dict(widths=c["block_out_channels"], attn=attn, layers=c["layers_per_block"],
                    heads=c["attention_head_dim"], size=c["sample_size"], groups=c["norm_num_groups"],
                    channels=c["in_channels"], features=c["cross_attention_dim"])  # fmt: skip

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """source: a folder or hub name (owner/name) with unet/, vae/, text_encoder/ and scheduler/, all but the first
        optional; or a U-Net's own folder; or a VAE's, which is returned. overrides: fields of Config."""
        source = HUB.get(source, source)
        config, noise = (json.loads(f.read_text()) if f.is_file() else {}
                         for f in (Path(source, "config.json"), Path(source, "scheduler", "scheduler_config.json")))
        if noise.get("prediction_type", "epsilon") != "epsilon":
            bad(f"{source}: its scheduler has prediction_type {noise['prediction_type']!r}; this file has epsilon")
        if config.get("_class_name") == "AutoencoderKL" or overrides.get("stage") == "vae":
            return VAE.from_pretrained(source if config else f"{source}/vae", **overrides)
        run = overrides | dict(vae="")
        if "_class_name" in config:
            return load_part(cls, source, WEIGHTS, run)
        there = lambda part: Path(source, part).is_dir() or not Path(source).exists()
        kept = {k: v for k, v in config.items() if k in SIZES}  # of a run of this file
        # its folder may hold parts of an earlier run: what its own sizes ask for is taken
        latents, captions = kept.get("scale", 1), not kept.get("features")
        vae = VAE.from_pretrained(f"{source}/vae") if latents and there("vae") else None
        text = TextEncoder.from_pretrained(f"{source}/text_encoder") if captions and there("text_encoder") else None
        if text and not kept:  # Stable Diffusion 1.x
            kept = dict(cond="text", captions=text.cfg.captions, objective="ddpm", betas="scaled")
        if text:
            kept |= {k: getattr(text.cfg, k) for k in ("dim", "text_layers", "text_heads", "vocab")} | dict(features=0)
        if vae:
            kept |= {k: getattr(vae.cfg, k) for k in ("vae_widths", "vae_layers", "latent", "scale")}
        return load_part(cls, f"{source}/unet", WEIGHTS, kept | run, vae, text)

    def save_pretrained(self, folder, tensors=None, **how):
        """unet/, text_encoder/ and vae/, as diffusers and transformers load them, and the sizes as config.json.
        tensors: the state dict where it was gathered elsewhere; how: see write_weights."""
        tensors = dict(self.state_dict() if tensors is None else tensors)
        for name in ("vae", "text_encoder"):
            own = {k.removeprefix(f"{name}."): tensors.pop(k) for k in [*tensors] if k.startswith(f"{name}.")}
            if own:
                getattr(self, name).save_pretrained(f"{folder}/{name}", own, **how)
        write_weights(f"{folder}/unet", tensors, self.hf_config(), WEIGHTS, **how)
        Path(folder, "scheduler").mkdir(exist_ok=True)
        config = dict(model_type="unet", **{k: getattr(self.cfg, k) for k in SIZES})
        for name, c in (("config.json", config), ("scheduler/scheduler_config.json", self.scheduler())):
            write_file(f"{folder}/{name}", lambda tmp, c=c: Path(tmp).write_text(json.dumps(c, indent=2)))

    def scheduler(self):
        """scheduler_config.json as diffusers' DDIMScheduler or FlowMatchEulerDiscreteScheduler reads it."""
        if self.cfg.objective == "flow":
            return dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=LEVELS, shift=1.0)
        kind = dict(linear="linear", scaled="scaled_linear", cosine="squaredcos_cap_v2")[self.cfg.betas]
        low, high = (0.00085, 0.012) if self.cfg.betas == "scaled" else (1e-4, 0.02)
        return dict(_class_name="DDIMScheduler", num_train_timesteps=LEVELS, beta_schedule=kind, beta_start=low,
                    beta_end=high, clip_sample=self.cfg.channels in (1, 3), prediction_type="epsilon")  # fmt: skip


class Coder(nn.Module):
    """The VAE's encoder (down) or decoder."""

    def __init__(self, n_in, n_out, cfg, down):
        super().__init__()
        widths, layers, blocks = cfg.vae_widths[:: 1 if down else -1], cfg.vae_layers + (not down), nn.ModuleList()
        C, last = widths[0], len(widths) - 1
        self.conv_in = nn.Conv2d(n_in, C, 3, padding=1)
        for i, w in enumerate(widths):
            blocks.append(Block([C] + [w] * (layers - 1), w, cfg, down=down and i < last, up=not down and i < last))
            C = w
        low = cfg.vae_widths[-1]
        self.mid_block = Middle(low, cfg, PlaceAttention(low, cfg.groups))
        self.down_blocks, self.up_blocks = (blocks, None) if down else (None, blocks)
        self.conv_norm_out = GroupNorm(cfg.groups, C, 1e-6)
        self.conv_out = nn.Conv2d(C, n_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for part in [*self.down_blocks, self.mid_block] if self.down_blocks else [self.mid_block, *self.up_blocks]:
            x = part(x)
        return self.conv_out(self.conv_norm_out(x))


class PlaceAttention(Attention):
    """x + Attention(GN(x)), with one head over all places."""

    def __init__(self, C, groups):
        super().__init__(C, C, 1, bias=True)
        self.group_norm = GroupNorm(groups, C, 1e-6, silu=False)

    def forward(self, x):
        y = super().forward(self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B, h w, C)
        return x + y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class VAE(nn.Module):
    """q(z | x) = N(mean, exp(logvar)), named as diffusers' AutoencoderKL; each level but the last halves the side."""

    objective, averages, snapshot, prepare = Diffusion.objective, Diffusion.averages, Diffusion.snapshot, Model.prepare

    def __init__(self, cfg):
        super().__init__()
        if any(w % cfg.groups for w in cfg.vae_widths):
            bad(f"--groups {cfg.groups}: "
                f"each of --vae-widths {' '.join(map(str, cfg.vae_widths))} must be divisible by it")
        self.cfg, n = cfg, cfg.latent
        self.encoder = Coder(3, 2 * n, cfg, down=True)
        self.decoder = Coder(n, 3, cfg, down=False)
        self.quant_conv = nn.Conv2d(2 * n, 2 * n, 1)
        self.post_quant_conv = nn.Conv2d(n, n, 1)
        self.spread = None  # z's deviation in training, a running mean
        self.errors, self.seen = [], None  # mean squared errors of the evaluation at hand, and its last pictures

    def encode(self, x):
        """x (B, 3 or 1, h, w) in [-1, 1] -> mean and logvar (B, latent, h', w'), not scaled."""
        h = self.encoder(x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last))
        mean, logvar = self.quant_conv(h).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """z, not scaled -> x (B, 3, h, w)."""
        return self.decoder(self.post_quant_conv(z.contiguous(memory_format=torch.channels_last)))

    def loss_at(self, x0, cond, u, noise, mask=None):
        """The squared error of a sample from q, and a little of KL(q || N(0, 1)) (Kingma & Welling 2013,
        arXiv:1312.6114v11, eq. 10). In evaluation the error alone, of the mean."""
        mean, logvar = self.encode(x0)
        if not self.training:
            x = self.decode(mean).float()
            self.seen, self.errors = (x0, x), [*self.errors, (x.clamp(-1, 1) - x0).square().mean((1, 2, 3))]
            return F.mse_loss(x, x0.expand_as(x))
        self.errors = []
        z = mean + (logvar / 2).exp() * noise
        std = z.detach().float().std()
        before = (self.spread if self.spread is not None
                  else std if not self.cfg.scale else torch.full_like(std, 1 / self.cfg.scale))
        self.spread = before.lerp(std, 0.01)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(self.decode(z).float(), x0.expand(-1, 3, -1, -1)) + self.cfg.kl * kl

    def report(self):
        """PSNR of the last evaluation: 10 log10(2^2 / mean squared error) of each picture, on average."""
        return (f"PSNR {10 * (4 / torch.cat(self.errors)).log10().mean():.2f} dB" if self.errors
                else f"spread {self.spread:.2f}")

    def sample(self, cond, *args, **kwargs):
        """For the grid: pictures of the last evaluation, each with what became of it beside it."""
        if self.seen is None:
            bad("--sample: this is a VAE alone, from which nothing can be drawn; "
                "--vae takes it for a diffusion in its latents")
        x0, x = self.seen
        return torch.stack([x0.expand_as(x), x], 1).flatten(0, 1)[: len(cond)]


    def param_groups(self, weight_decay):
        matrices, vectors = ([p for p in self.parameters() if (p.ndim > 1) is m] for m in (True, False))
        return [dict(params=matrices, weight_decay=weight_decay, matrix=True), dict(params=vectors, weight_decay=0.0)]

    def hf_config(self):
        """config.json as diffusers' AutoencoderKL reads it."""
        c, n = self.cfg, len(self.cfg.vae_widths)
        return dict(
            _class_name="AutoencoderKL", in_channels=3, out_channels=3, latent_channels=c.latent,
            block_out_channels=c.vae_widths, down_block_types=["DownEncoderBlock2D"] * n,
            up_block_types=["UpDecoderBlock2D"] * n, layers_per_block=c.vae_layers, norm_num_groups=c.groups,
            act_fn="silu", sample_size=c.size, use_quant_conv=True,
            scaling_factor=(c.scale or 1.0) if self.spread is None else 1 / self.spread.item(),
            use_post_quant_conv=True, mid_block_add_attention=True,
            shift_factor=None, latents_mean=None, latents_std=None,
        )  # fmt: skip

    @staticmethod
    def sizes(c):
        """config.json -> fields of Config."""
        return dict(vae_widths=c["block_out_channels"], vae_layers=c["layers_per_block"], groups=c["norm_num_groups"],
                    size=c["sample_size"], latent=c["latent_channels"], channels=c["latent_channels"],
                    scale=c.get("scaling_factor", 0.18215), stage="vae")  # fmt: skip

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """source: the VAE's own folder, or its name on the hub (owner/name, owner/name/vae)."""
        return load_part(cls, source, WEIGHTS, overrides)

    def save_pretrained(self, folder, tensors=None, **how):
        write_weights(folder, self.state_dict() if tensors is None else tensors, self.hf_config(), WEIGHTS, **how)


class TextLayer(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.self_attn = nn.ModuleDict({k: nn.Linear(C, C) for k in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm1, self.layer_norm2 = LayerNorm(C), LayerNorm(C)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(C, 4 * C), fc2=nn.Linear(4 * C, C)))

    def forward(self, x):
        a, h = self.self_attn, self.layer_norm1(x)
        q, k, v = (f(h).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for f in (a.q_proj, a.k_proj, a.v_proj))  # each (B, H, S, D)
        x = x + a.out_proj(attention(q, k, v, causal=True).transpose(1, 2).flatten(2))
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))  # CLIP's quick GELU


class TextEncoder(nn.Module):
    """CLIP's (Radford et al. 2021, arXiv:2103.00020), with the names of transformers' CLIPTextModel.
    A label is a caption of one token."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, C = cfg, cfg.dim
        if C % cfg.text_heads:
            bad(f"--text-heads {cfg.text_heads}: --dim {C} must be divisible by it")
        rows, places = (cfg.vocab or dict(none=1, text=256).get(cfg.cond, cfg.classes + 1),
                        cfg.captions if cfg.cond == "text" else 1)
        # N(0, 1), PyTorch's: CLIP's own 0.02 drowns in the first layers' output, and it takes long to tell words apart
        embeddings = nn.ModuleDict(dict(token_embedding=nn.Embedding(rows, C),
                                        position_embedding=nn.Embedding(places, C)))
        encoder = nn.ModuleDict(dict(layers=nn.ModuleList(TextLayer(C, cfg.text_heads)
                                                          for _ in range(cfg.text_layers))))
        self.text_model = nn.ModuleDict(dict(embeddings=embeddings, encoder=encoder, final_layer_norm=LayerNorm(C)))

    def forward(self, tokens):
        """tokens (B, S) -> the last hidden state, after the norm (B, S, dim)."""
        m = self.text_model
        x = m.embeddings.token_embedding(tokens) + m.embeddings.position_embedding.weight[: tokens.shape[1]]
        for layer in m.encoder.layers:
            x = layer(x)
        return m.final_layer_norm(x)

    def hf_config(self):
        """config.json as transformers' CLIPTextModel reads it."""
        c, e = self.cfg, self.text_model.embeddings
        rows, places = len(e.token_embedding.weight), len(e.position_embedding.weight)
        return dict(
            model_type="clip_text_model", architectures=["CLIPTextModel"], vocab_size=rows,
            max_position_embeddings=places, hidden_size=c.dim, intermediate_size=4 * c.dim,
            num_hidden_layers=c.text_layers, num_attention_heads=c.text_heads, hidden_act="quick_gelu",
            layer_norm_eps=1e-5, bos_token_id=max(0, rows - 2), eos_token_id=rows - 1, pad_token_id=rows - 1,
        )  # fmt: skip

    @staticmethod
    def sizes(c):
        """config.json -> fields of Config."""
        return dict(dim=c["hidden_size"], text_layers=c["num_hidden_layers"], text_heads=c["num_attention_heads"],
                    vocab=c["vocab_size"], captions=c["max_position_embeddings"], cond="text")  # fmt: skip

    @classmethod
    def from_pretrained(cls, source):
        """source: the text encoder's own folder, or its name on the hub (owner/name/text_encoder)."""
        return load_part(cls, source, "model", {})

    def save_pretrained(self, folder, tensors=None, **how):
        write_weights(folder, self.state_dict() if tensors is None else tensors, self.hf_config(), **how)


CLIP = 49408  # words of CLIP's tokenizer, the last two of which are begin and end
HUB = {"sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
WEIGHTS = "diffusion_pytorch_model"  # diffusers' name for a file of weights
# of config.json: nothing depends on them here
FREE = "sample_size bos_token_id eos_token_id pad_token_id architectures scaling_factor".split()


def load_part(cls, source, name, overrides, *parts):
    """source: a folder with config.json and <name>.safetensors, or such a folder on the hub -> cls with its weights."""
    if Path(source).exists():
        files = [Path(source, name + end) for end in (".safetensors", ".fp16.safetensors", ".bin")]
        path = next((f for f in files if f.is_file()), files[0])
    else:
        find_checkpoint(f"{source}/config.json")
        path = find_checkpoint(f"{source}/{name}.safetensors")
    config, tensors = read_checkpoint(path)
    try:
        cfg = Config(**cls.sizes(config) | overrides)
        if overrides.get("scale") and "size" not in overrides:  # sample_size is the latents' side
            cfg.size <<= len(cfg.vae_widths) - 1
        model = cls(cfg, *parts)
    except (KeyError, TypeError) as e:
        bad(f"{path.parent}: config.json has no fitting {e}, so this is no {cls.__name__} of Stable Diffusion 1.x")
    own = model.hf_config()
    for key in own.keys() & config.keys() - set(FREE):
        if config[key] != own[key]:
            bad(f"{path.parent}: {key} = {config[key]!r} in config.json, where {own[key]!r} is computed here")
    # transformers >= 5 saves without prefix; position_ids is no parameter; the VAE's attention had other names once
    tensors = {k: v for k, v in tensors.items() if not k.endswith("position_ids")}
    if cls is TextEncoder:
        tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in tensors.items()}
    old = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")
    tensors = {re.sub(r"(attentions\.0\.)(query|key|value|proj_attn)\b", lambda m: m[1] + old[m[2]], k): v
               for k, v in tensors.items()}
    held = {k: v for k, v in model.state_dict().items() if k.startswith(("vae.", "text_encoder."))}  # loaded already
    load_strict(model, tensors | held, path)
    return model


def picture_size(cfg, seen):
    """What pictures the model makes, for data of (h, w, c) = seen -> side, diffused channels; a mistake is a line."""
    h, w, c = seen
    if h != w:
        bad(f"--data {cfg.data}: its pictures are {h} x {w}, and a square is needed")
    if cfg.vae and not cfg.scale:
        found = VAE.from_pretrained(cfg.vae).cfg
        cfg.vae_widths, cfg.vae_layers, cfg.latent, cfg.scale = (found.vae_widths, found.vae_layers,
                                                                 found.latent, found.scale)
    if cfg.scale or cfg.stage == "vae":
        halvings = len(cfg.vae_widths) - 1
        if c == cfg.latent:  # the data are latents already
            h <<= halvings
        elif h % 2**halvings:
            bad(f"--data {cfg.data}: its pictures' side {h} is not divisible by {2**halvings}, as the VAE needs it")
        c = cfg.latent
    if cfg.size not in (0, h) or cfg.channels not in (0, c):
        bad(f"--size {cfg.size} --channels {cfg.channels}: --data {cfg.data} gives {h} x {h} and {c} channels")
    return h, c


def decode(cfg, model, x):
    """Latents -> pixels; pixels as they are."""
    vae = getattr(model, "vae", None)
    with torch.no_grad():
        return torch.cat([vae.decode(z / cfg.scale) for z in x.split(8)]) if vae else x


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


class Tokenizer(Tokenizer):
    """The same, and kind clip: CLIP's byte-pair words. chars: that tokenizer as JSON, all of it in a run's tok.json."""

    def __init__(self, kind, chars=()):
        super().__init__(kind, chars)
        if kind == "clip":
            import tokenizers

            self.chars, self.words = chars, tokenizers.Tokenizer.from_str(chars)

    def encode(self, texts, n):
        """kind clip: begin, the caption's words, and ends up to n; a caption that is too long is cut."""
        if self.kind != "clip":
            return super().encode(texts, n)
        begin, end = CLIP - 2, CLIP - 1
        texts = [t.encode(errors="replace").decode() for t in texts]  # half a surrogate pair has no utf-8
        rows = [[begin, *self.words.encode(t, add_special_tokens=False).ids[: n - 2], end] for t in texts]
        return np.array([row + [end] * (n - len(row)) for row in rows], np.int64)

    def decode(self, row):
        if self.kind != "clip":
            return super().decode(row)
        return self.words.decode([int(i) for i in row if i < CLIP - 2]).replace("</w>", " ").strip()


def clip_words(cfg):
    """CLIP's tokenizer from --init's tokenizer/, if any: lower case, words and marks apart, merged by byte pairs."""
    if cfg.vocab != CLIP or cfg.cond != "text" or cfg.features:
        return None
    if not cfg.init:
        bad(f"--vocab {CLIP}: CLIP's words and weights come from a checkpoint, and --init names none (--init sd1)")
    try:
        here = (Path(cfg.init, "tokenizer") if Path(cfg.init).exists()
                else find_checkpoint(f"{cfg.init}/tokenizer/vocab.json").parent)
        from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Words

        files = str(here / "vocab.json"), str(here / "merges.txt")
        words = Words(models.BPE.from_file(*files, end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    except Exception as e:  # the library has its own, for a damaged file as for a missing one
        bad(f"--init {cfg.init}: no usable tokenizer/vocab.json and merges.txt, which captions need ({e})")
    split = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "),
                                             normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "removed", invert=True),
                                                   pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words.decoder = decoders.ByteLevel()
    return Tokenizer("clip", words.to_str())


CHOSEN["stage"] = ("diffusion", "vae")
load_data = lambda cfg, given, tok: load_images(cfg, given, tok or clip_words(cfg))
ACTIONS = dict(sample=lambda cfg, model, tok: sample(cfg, model, tok or clip_words(cfg)))


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
