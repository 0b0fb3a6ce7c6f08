"""torchscale's RetNetDecoder, the reference for retnet.py; as a script it records what test_retnet.py compares with.

    git clone https://github.com/microsoft/torchscale
    git -C torchscale checkout 4d1e0e82e5adf86dd424f1463192635b73fc8efc
    PYTHONPATH=torchscale python tests/torchscale_retnet.py > tests/torchscale_retnet.json

Recorded with torch 2.13.0 on a CPU. Only the modules of RetNet are wanted: fairscale, timm and einops, which torchscale
imports for other models, are stubs here where they are not installed. PyPI's torchscale 0.3.0 is older: it divides the
rows of q k^T by another sum, and is refused.
"""

import importlib.util
import inspect
import json
import sys
import types

import torch
import torch.nn as nn
import torch.nn.functional as F

SMALL = dict(vocab_size=20, decoder_embed_dim=24, decoder_value_embed_dim=36, decoder_retention_heads=3,
             decoder_ffn_embed_dim=40, decoder_layers=2)
CASES = {  # the language models of its examples, and RetNetConfig's defaults with a tied head
    "examples": dict(SMALL, activation_fn="swish", no_scale_embedding=False),
    "defaults, tied": dict(SMALL, share_decoder_input_output_embed=True),
}


def decoder(config):
    """-> RetNetDecoder in eval mode. ImportError: torchscale is not there, or not this version."""
    stubs = {}
    for name in ("fairscale", "timm", "einops"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            stubs |= {n: types.ModuleType(n) for n in (name, f"{name}.nn", f"{name}.models", f"{name}.models.layers")}
    for stub in stubs.values():
        stub.checkpoint_wrapper = stub.wrap = stub.drop_path = stub.rearrange = lambda x, *a, **k: x
    sys.modules |= stubs
    try:
        from torchscale.architecture.config import RetNetConfig
        from torchscale.architecture.retnet import RetNetDecoder
        from torchscale.component.multiscale_retention import MultiScaleRetention
    finally:
        for name in stubs:  # others ask whether timm is there (diffusers, when it is imported)
            del sys.modules[name]

    if "max=5e4" not in inspect.getsource(MultiScaleRetention):
        raise ImportError("torchscale 0.3.0 is older than the reference")
    return RetNetDecoder(
        RetNetConfig(**config), embed_tokens=nn.Embedding(config["vocab_size"], config["decoder_embed_dim"])).eval()


def fill(model, std=0.3):
    """The recipe of the weights: by name, so that the order of the modules does not matter."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=g) * std)
    return model


def batch():
    """-> tokens, targets (2, 13)"""
    x = torch.randint(20, (2, 14), generator=torch.Generator().manual_seed(1))
    return x[:, :-1], x[:, 1:]


def gradients(model, loss):
    """Name -> the gradient's norm and product with a random direction: together they see a wrong factor or place."""
    g, found = torch.Generator().manual_seed(2), {}
    loss.backward()
    for name, p in sorted(model.named_parameters()):
        found[name] = [p.grad.norm().item(), (p.grad * torch.randn(p.shape, generator=g)).sum().item()]
    return found


def record(config):
    model, (x, y) = fill(decoder(config)), batch()
    logits = model(x)[0]
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return dict(config=config, logits=logits.flatten().tolist(), loss=loss.item(), gradients=gradients(model, loss))


if __name__ == "__main__":
    rounded = json.loads(json.dumps({k: record(c) for k, c in CASES.items()}),
                         parse_float=lambda s: float(f"{float(s):.8g}"))
    print("{" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in rounded.items()) + "}")
