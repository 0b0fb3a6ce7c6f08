"""Records what facebookresearch/DiT (commit ed81ce2) computes, as tests/official_dit.json, for test_dit.py.

    git clone https://github.com/facebookresearch/DiT ../DiT && python tests/official_dit.py ../DiT

Its models.py takes three modules from timm, which wants torchvision: they are written out here, after what they are
there, with the same parameter names. Weights: filled(), by sorted name. Everything is fp32 on the CPU.
"""

import json
import sys
import types
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = dict(input_size=4, patch_size=2, hidden_size=24, depth=2, num_heads=4, num_classes=5)


def filled(model, std=0.2):
    """Every parameter N(0, std^2), by sorted name; adaLN and the last layer start at zero and would hide everything."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * std)
    return model


def inputs():
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 4, 4, 4, 4, generator=g)
    return x0.clamp(-1, 1), noise, torch.tensor([0, 1, 437, 999]), torch.tensor([3, 0, 4, 5])  # 5: no class


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True):
        super().__init__()
        self.patch_size, self.num_patches = (patch_size, patch_size), (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer, drop):
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            nn.Linear(in_features, hidden_features), act_layer(), nn.Linear(hidden_features, in_features))

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def official(folder):
    """-> the modules models and diffusion of the checkout."""
    stubs = ("timm", "timm.models", "timm.models.vision_transformer")
    for name in stubs:
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[stubs[-1]]).update(PatchEmbed=PatchEmbed, Attention=Attention, Mlp=Mlp)
    sys.path.insert(0, str(folder))
    import diffusion
    import models

    sys.path.remove(str(folder))
    for name in stubs:  # others ask whether timm is there
        del sys.modules[name]
    return models, diffusion


def main(folder):
    models, diffusion = official(folder)
    model = filled(models.DiT(**SIZES).eval())
    x0, noise, t, y = inputs()
    rounded = lambda v: [float(f"{f:.8g}") for f in v.detach().flatten().tolist()]
    process = diffusion.create_diffusion("")
    xt = process.q_sample(x0, t, noise)
    found = dict(prediction=rounded(model(xt, t, y)), pos_embed=rounded(model.pos_embed))
    terms = process.training_losses(model, x0, t, dict(y=y), noise)
    found |= {k: rounded(terms[k]) for k in ("loss", "mse", "vb")}
    terms["loss"].mean().backward()
    found["gradients"] = {n: float(f"{p.grad.norm():.8g}") for n, p in model.named_parameters() if p.grad is not None}
    two = torch.cat([noise[:2]] * 2)
    how = dict(clip_denoised=False, model_kwargs=dict(y=torch.tensor([3, 0, 5, 5]), cfg_scale=2.5), device="cpu")
    for name, steps, loop in (("ddpm", "7", "p_sample_loop"), ("ddim", "7", "ddim_sample_loop"),
                              ("ddim_5", "ddim5", "ddim_sample_loop")):
        torch.manual_seed(2)
        process = diffusion.create_diffusion(steps)
        x = getattr(process, loop)(model.forward_with_cfg, two.shape, two, **how)
        found[name] = rounded(x[:2])
        found[f"{name}_times"] = list(process.timestep_map)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
