"""
What xAI's own Grok-1 computes at a tiny size, recorded in grok1.json for test_moe.py

    git clone https://github.com/xai-org/grok-1 && pip install jax==0.10.2 dm-haiku==0.0.17
    python tests/grok1.py grok-1/model.py

The weights are weights() below, in fp32. model.py runs as it is on one device but for what is replaced in its text:
options and modules of jax that are gone, with the sharding constraints, shard_map and the sum over devices (there is
one), and two casts of the experts' output to bf16. Its experts must come as QuantizedWeight8bit; here that holds
floats, and scales of 1.
"""
import json
import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")


def weights():
    """name in the Hugging Face port -> array (out, in), from seed 0."""
    g, (C, F, D) = np.random.RandomState(0), (32, 48, 8)
    shapes = {"model.embed_tokens.weight": (29, C), "model.norm.scale": (C,)}
    for i in range(2):
        h = f"model.layers.{i}."
        shapes |= {h + f"{n}_norm.scale": (C,) for n in ("pre_attn", "post_attn", "pre_moe", "post_moe")}
        shapes |= {h + "attn.q_proj.weight": (4 * D, C), h + "attn.k_proj.weight": (2 * D, C),
                   h + "attn.v_proj.weight": (2 * D, C)}
        shapes |= {h + "attn.o_proj.weight": (C, 4 * D), h + "moe_block.gate.weight": (8, C)}
        for e in range(8):
            p = h + f"moe_block.experts.{e}."
            shapes |= {p + "linear.weight": (F, C), p + "linear_v.weight": (F, C), p + "linear_1.weight": (C, F)}
    return {k: (g.randn(*s) * 0.4 + (len(s) == 1)).astype(np.float32) for k, s in shapes.items()}


def tokens():
    return np.random.RandomState(1).randint(1, 29, size=(2, 12))  # 0 is padding


def main(path):
    import haiku as hk
    import jax
    import jax.numpy as jnp

    source = Path(path).read_text()
    for a, b in (
        ("import jax.experimental.maps\n", ""),
        ('config.update("jax_spmd_mode", "allow_all")\n', ""),
        ("from jax.experimental.shard_map import shard_map", "def shard_map(f, **_):\n    return f"),
        ("    if jax.experimental.maps.thread_resources.env.physical_mesh.empty:", "    if True:"),
        ('jax.lax.psum(output, axis_name="model")', "output"),
        ("expert_gate[:, :, :, None].astype(jnp.bfloat16) * out", "expert_gate[:, :, :, None] * out"),
        ("            out = out.astype(jnp.bfloat16)\n", ""),
    ):
        assert source.count(a) == 1, a
        source = source.replace(a, b)
    module = type(sys)("grok_model")
    sys.modules["grok_model"] = module
    exec(compile(source, path, "exec"), module.__dict__)
    how = module.TransformerConfig(
        emb_size=32, widening_factor=2, key_size=8, num_q_heads=4, num_kv_heads=2, num_layers=2,
        attn_output_multiplier=8**-0.5, shard_activations=False, num_experts=8, num_selected_experts=2,
        data_axis="data", model_axis="model")  # fmt: skip
    cfg = module.LanguageModelConfig(
        how, vocab_size=29, pad_token=0, eos_token=2, sequence_len=12, embedding_multiplier_scale=32**0.5,
        output_multiplier_scale=0.5773502691896257, fprop_dtype=jnp.float32)  # fmt: skip
    net = hk.transform(lambda x: cfg.make()(x).logits)
    x, w = jnp.asarray(tokens()), weights()
    params = net.init(jax.random.PRNGKey(0), x)
    filled, used = {}, set()

    def take(name, transpose=True):
        used.add(name)
        return w[name].T if transpose else w[name]

    names = dict(query="q_proj", key="k_proj", value="v_proj", linear="o_proj")
    norms = {"rms_norm": "pre_attn", "rms_norm_1": "post_attn", "rms_norm_2": "pre_moe", "rms_norm_3": "post_moe"}
    for module_name, leaves in params.items():
        for leaf, old in leaves.items():
            parts = module_name.split("/")
            layer = next((p.rsplit("_", 1)[1] for p in parts if p.startswith("decoder_layer_")), None)
            h, last = f"model.layers.{layer}.", parts[-1]
            if last == "in_out_embed":
                new = take("model.embed_tokens.weight", False)
            elif layer is None:
                new = take("model.norm.scale")
            elif "moe" in parts:
                new = np.stack([take(f"{h}moe_block.experts.{e}.{last}.weight") for e in range(8)])
            elif last == "router":
                new = take(h + "moe_block.gate.weight")
            elif last in norms:
                new = take(h + norms[last] + "_norm.scale")
            else:
                new = take(h + f"attn.{names[last]}.weight")
            assert new.shape == old.shape, (module_name, leaf, new.shape, old.shape)
            new = jnp.asarray(new)
            filled.setdefault(module_name, {})[leaf] = (
                module.QuantizedWeight8bit(new, jnp.ones((8, 1, 1))) if "moe" in parts else new)
    assert used == w.keys(), w.keys() - used
    logits = np.asarray(net.apply(filled, None, x))
    FILE.write_text(json.dumps(
        dict(made_by=__doc__.split("\n\n")[1], jax=jax.__version__, logits=np.round(logits, 5).tolist())))
    print(f"{FILE}: logits {logits.shape}, from {logits.min():.2f} to {logits.max():.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
