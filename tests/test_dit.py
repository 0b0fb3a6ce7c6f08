"""dit.py against Meta's DiT (recorded), diffusers' DiT, PixArt-alpha and schedulers, against itself, as a program."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import official_dit
import pytest
import torch
from house import ROOT, error, finish, losses, start
from safetensors.torch import load_file

import dit
from dit import Config, Model

OFFICIAL = dict(layers=2, dim=24, heads=4, patch=2, size=4, channels=4, cond="class", classes=5, objective="ddpm",
                learn_sigma=True, drop=0.0)
TEXT = dict(layers=2, dim=24, heads=4, patch=2, size=8, channels=4, cond="text", captions=6, features=10,
            objective="ddpm", learn_sigma=True)
RUN = "--layers 2 --heads 2 --dim 32 --batch 8 --eval-iters 1 --sample-steps 2 --number 2 --dtype fp32".split()


def recorded(key, like):
    return torch.tensor(json.loads(Path(official_dit.__file__).with_suffix(".json").read_text())[key]).view_as(like)


# ---------------------------------------------------------------- the model
def test_equals_metas_dit():
    """Positions, prediction, the three terms of the loss and every gradient; fp32, relative error."""
    model = official_dit.filled(Model(Config(**OFFICIAL)))
    x0, noise, t, y = official_dit.inputs()
    assert torch.allclose(model.pos_embed, recorded("pos_embed", model.pos_embed), atol=1e-6)
    a, s = dit.tables("linear", x0.device)[:2][:, t].view(2, -1, 1, 1, 1)
    out = model(a * x0 + s * noise, t, y)
    assert error(out, recorded("prediction", out)) < 1e-5
    u = torch.stack([(t + 0.5) / dit.LEVELS, torch.ones(4)], 1)
    loss = model.loss_at(x0, y, u, noise)
    assert abs(loss / recorded("loss", t).mean() - 1) < 1e-5
    mse = (out[:, :4] - noise).square().mean()
    assert abs(mse / recorded("mse", t).mean() - 1) < 1e-5 and abs((loss - mse) / recorded("vb", t).mean() - 1) < 1e-4
    loss.backward()
    want = json.loads(Path(official_dit.__file__).with_suffix(".json").read_text())["gradients"]
    grads = {n: p.grad.norm().item() for n, p in model.named_parameters()}
    assert grads.keys() == want.keys()
    assert all(abs(grads[n] - want[n]) < 1e-4 * want[n] + 1e-7 for n in want)


@pytest.mark.parametrize("name, sampler", [("ddpm", "ddpm"), ("ddim", "ddim"), ("ddim_5", "ddim")])
def test_sampling_equals_metas(monkeypatch, name, sampler):
    """Trajectories with guidance on three channels, learned variances, respaced times; noise as the official code's."""
    model = official_dit.filled(Model(Config(**OFFICIAL)))
    _, noise, _, _ = official_dit.inputs()
    times = json.loads(Path(official_dit.__file__).with_suffix(".json").read_text())[f"{name}_times"][::-1]
    assert name == "ddim_5" or times == model.times(7)
    torch.manual_seed(2)
    drawn = iter([torch.randn(4, 4, 4, 4)[:2] for _ in times])
    monkeypatch.setattr(torch, "randn", lambda *a, **k: next(drawn))
    x = model.sample(torch.tensor([3, 0]), guidance=2.5, sampler=sampler, noise=noise[:2], times=times)
    assert error(x, recorded(name, x)) < 1e-4


@pytest.mark.skipif("DIT" not in os.environ, reason="DIT names a checkout of facebookresearch/DiT")
def test_equals_metas_dit_live():
    models, _ = official_dit.official(os.environ["DIT"])
    theirs, ours = official_dit.filled(models.DiT(**official_dit.SIZES).eval()), Model(Config(**OFFICIAL)).eval()
    ours.load_state_dict(theirs.state_dict())
    x, _, t, y = official_dit.inputs()
    assert error(ours(x, t, y), theirs(x, t, y)) < 1e-5


def diffusers_dit():
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=6, in_channels=4, out_channels=8, num_layers=2, sample_size=4,
        patch_size=2, num_embeds_ada_norm=5, norm_num_groups=1, norm_eps=1e-6)  # fmt: skip
    theirs = official_dit.filled(theirs).eval()
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # it has 1, Meta's DiT 0
        block.norm1.emb.load_state_dict(first.state_dict())  # a checkpoint holds the same embedders in each block
    return theirs


def diffusers_pixart():
    from diffusers import PixArtTransformer2DModel

    theirs = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=6, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, sample_size=8, patch_size=2, caption_channels=10, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, attention_bias=True,
        use_additional_conditions=False, interpolation_scale=2)  # fmt: skip
    return official_dit.filled(theirs).eval()


def same_gradients(ours, theirs, config):
    """Gradients of theirs, put under our names as weights are, against ours."""
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in theirs.named_parameters()}
    for n in [n for n in grads if ".norm1.emb." in n]:  # the embedders of all blocks are one of ours
        part = n.split(".norm1.")[1]
        grads[n] = (sum(g for m, g in grads.items() if m.endswith(f".norm1.{part}"))
                    if n.startswith("transformer_blocks.0.") else grads[n])
    want = dit.from_diffusers(grads, config)
    for n, p in ours.named_parameters():
        assert error(p.grad, want[n]) < 1e-4, n


def test_equals_diffusers_dit(tmp_path):
    theirs = diffusers_dit()
    theirs.save_pretrained(tmp_path / "transformer")
    ours = Model.from_pretrained(tmp_path).eval()
    assert ({k: getattr(ours.cfg, k) for k in OFFICIAL if k != "drop"}
            == {k: v for k, v in OFFICIAL.items() if k != "drop"})
    x, _, t, y = official_dit.inputs()
    a, b = ours(x, t, y), theirs(x, t, class_labels=y).sample
    assert error(a, b) < 1e-5
    (a * a.detach()).sum().backward()
    (b * b.detach()).sum().backward()
    same_gradients(ours, theirs, theirs.config)


def test_equals_diffusers_pixart(tmp_path):
    """With a mask over the captions' tokens; positions are scaled."""
    theirs = diffusers_pixart()
    theirs.save_pretrained(tmp_path)
    ours = Model.from_pretrained(tmp_path).eval()
    g = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(3, 4, 8, 8, generator=g), torch.tensor([0, 500, 999]), torch.randn(3, 6, 10, generator=g)
    mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [1] * 5 + [0]])
    a, b = ours(x, t, y, mask), theirs(x, y, t, encoder_attention_mask=mask,
                                       added_cond_kwargs=dict(resolution=None, aspect_ratio=None)).sample
    assert error(a, b) < 1e-5
    (a * a.detach()).sum().backward()
    (b * b.detach()).sum().backward()
    same_gradients(ours, theirs, theirs.config)


def test_official_files(tmp_path, capsys):
    """A plain state dict, the training script's (EMA, argparse's flags), safetensors, PixArt-alpha's; what is none."""
    import argparse

    model = official_dit.filled(Model(Config(**OFFICIAL | dict(dim=64, heads=1))))
    tensors = model.state_dict()
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save(dict(model={}, ema=tensors, opt={}, args=argparse.Namespace(lr=1)), tmp_path / "training.pt")
    text = official_dit.filled(Model(Config(**TEXT | dict(dim=64, heads=1))))
    torch.save(dict(state_dict=text.state_dict()), tmp_path / "pixart.pth")
    model.save_pretrained(tmp_path / "folder")
    for name, want in (("plain.pt", model), ("training.pt", model), ("folder", model),
                       ("folder/model.safetensors", model), ("pixart.pth", text)):
        found = Model.from_pretrained(tmp_path / name)
        assert found.cfg.cond == want.cfg.cond and found.cfg.heads == 1
        assert all(torch.equal(v, want.state_dict()[k]) for k, v in found.state_dict().items())
    broken = dict(tensors)
    del broken["blocks.1.mlp.fc2.bias"]
    torch.save(broken, tmp_path / "broken.pt")
    Path(tmp_path / "text.pt").write_text("no checkpoint")
    for name, words in (("broken.pt", "no tensor blocks.1.mlp.fc2.bias"), ("text.pt", "damaged, or not a checkpoint")):
        with pytest.raises(SystemExit):
            Model.from_pretrained(tmp_path / name)
        assert words in capsys.readouterr().err


def test_sizes_of_the_paper():
    """Parameters of table 1's models with 1,000 classes, in millions, as Meta's code counts them."""
    for name, want in (("S/2", 33.0), ("B/4", 130.7), ("L/8", 459.8), ("XL/2", 675.1)):
        with torch.device("meta"):
            cfg = Config(**dict(dit.PRESETS[name]))
            n = sum(p.numel() for p in Model(cfg).parameters())
        assert abs(n / 1e6 - want) < 0.006 * want, (name, n)


def test_alone_equals_with_kernels():
    import house

    alone = house.alone("dit.py")
    for cfg in (OFFICIAL, TEXT | dict(features=0)):
        ours, plain = (official_dit.filled(m.Model(m.Config(**cfg))) for m in (dit, alone))
        x, noise = torch.randn(2, 4, *Model.noise_shape(ours.cfg))
        cond, u = torch.randint(5, (4,)) if cfg is OFFICIAL else torch.randint(256, (4, 6)), torch.rand(4, 2)
        plain.load_state_dict(ours.state_dict())
        a, b = ours.loss_at(x, cond, u, noise), plain.loss_at(x, cond, u, noise)
        assert abs(a / b - 1) < 1e-5
        a.backward()
        b.backward()
        for (n, p), q in zip(ours.named_parameters(), plain.parameters()):
            assert error(p.grad, q.grad) < 1e-4, n


# ---------------------------------------------------------------- samplers
class Toy(dit.Diffusion):
    """A prediction that depends on x and t, cheap and smooth."""

    def __init__(self, **cfg):
        super().__init__()
        self.cfg, self.w = Config(size=4, channels=3, **cfg), torch.nn.Parameter(torch.ones(()))

    @staticmethod
    def noise_shape(cfg):
        return cfg.channels, cfg.size, cfg.size

    def forward(self, x, t, cond, mask=None, drop=None):
        out = torch.tanh(0.7 * x + (t.view(-1, 1, 1, 1) / 300).sin()) * self.w
        return torch.cat([out, out.cos()], 1) if self.cfg.learn_sigma else out


def follow(scheduler, model, noise, times=None):
    """diffusers' own loop."""
    x = noise
    for t in scheduler.timesteps:
        out = model(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x,
                    torch.as_tensor(t).expand(len(x)), None)
        x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm learned", "ddim", "euler", "heun", "flow euler", "flow heun"])
def test_samplers_equal_diffusers(sampler, monkeypatch):
    import diffusers as D

    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    learned, flow = sampler == "ddpm learned", sampler.startswith("flow")
    model = Toy(objective="flow" if flow else "ddpm", learn_sigma=learned)
    how = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    times, begin = model.times(6), noise
    with torch.no_grad():
        if sampler.startswith("ddpm"):
            s = D.DDPMScheduler(**how, variance_type="learned_range" if learned else "fixed_small", clip_sample=False)
            s.set_timesteps(timesteps=times)
        elif sampler == "ddim":  # leading: regular steps, the last of them to the picture
            s = D.DDIMScheduler(**how, clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True)
            s.set_timesteps(6)
            times = s.timesteps.tolist()
        elif flow:
            s = (D.FlowMatchEulerDiscreteScheduler if sampler == "flow euler" else D.FlowMatchHeunDiscreteScheduler)()
            if sampler == "flow euler":
                s.set_timesteps(sigmas=[t / 1000 for t in times])
            else:
                s.set_timesteps(6)
                times = list(dict.fromkeys(s.timesteps.tolist()))
        else:
            s = (D.EulerDiscreteScheduler if sampler == "euler" else D.HeunDiscreteScheduler)(**how)
            s.set_timesteps(timesteps=times)
            bar = dit.alpha_bar("linear")[times[0]].item()
            begin = noise / bar**0.5  # theirs is x / a
        drawn = torch.Generator().manual_seed(3)
        if sampler.startswith("ddpm"):
            z = [torch.randn(noise.shape, generator=drawn) for _ in times]
            pile = iter(z)
            monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(pile))
        want = follow(s, model, begin)
        drawn.manual_seed(3)
        got = model.sample(torch.zeros(2), noise=noise, times=times,
                           sampler=sampler.split()[-1] if flow else sampler.split()[0], generator=drawn)
    assert error(got, want) < 1e-4


# ---------------------------------------------------------------- the program
@pytest.fixture
def pictures(tmp_path):
    """An .npz of 8 x 8 pictures: two classes that differ in colour, with captions."""
    rng, labels = np.random.default_rng(0), np.arange(120) % 2
    images = rng.integers(0, 60, (120, 8, 8, 3)) + np.array([[150, 0, 0], [0, 0, 150]])[labels][:, None, None]
    np.savez(tmp_path / "p.npz", images=images.astype(np.uint8), labels=np.array(["red", "blue"])[labels],
             captions=np.array(["all red", "all blue"])[labels])
    return str(tmp_path / "p.npz")


@pytest.mark.parametrize("objective, cond", [("flow", "text"), ("ddpm", "class")])
def test_loss_falls_and_resumes_bit_for_bit(tmp_path, pictures, objective, cond, capsys):
    """Forty steps beat predicting nothing; kill -9 and --resume give the same run; averages are saved and sampled."""
    args = [*RUN, "--objective", objective, "--cond", cond, "--patch", "2", "--data", pictures, "--lr", "1e-2",
            "--ema", "0.8", "--eval-every", "20", "--log-every", "1", "--optim", "adamw",
            "--device", "cpu", "--dtype", "fp32"]  # fmt: skip
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    dit.main([*args, "--steps", "40", "--out", one])
    a = losses(one)
    # nothing: 1 for eps, 1 + about 1/3 for eps - x_0; below, the colour and little else is learnt
    assert float(a[1][0]) > 0.9 and float(a[40][1]) < (0.75 if objective == "flow" else 0.8)
    cut = start([*args, "--steps", "40", "--out", two], "dit.py")
    for line in cut.stdout:
        if line.startswith("step 23"):
            break
    cut.kill()
    cut.wait()
    finish(start(["--resume", "--out", two, "--log-every", "1"], "dit.py"))
    b = losses(two)
    near = lambda u, v: abs(float(u) - float(v)) < 1e-4  # the other process has other threads
    assert all(near(a[s][0], b[s][0]) for s in range(1, 41)) and near(a[40][1], b[40][1])
    state = torch.load(Path(one, "train_state.pt"), weights_only=True)
    weights, raw = load_file(Path(one, "model.safetensors")), state["optimizers"][-1]["state"]
    assert all(Path(one, f"grid_{s}.png").is_file() for s in (20, 40)) and Path(one, "grid.png").is_file()
    names = [k for k, _ in Model.from_pretrained(one).named_parameters()]
    assert len(raw) == len(names)  # the files have the averages, the state has the weights that training goes on with
    assert any((raw[i]["average"] - weights[k]).abs().max() > 1e-4 for i, k in enumerate(names))
    dit.main(["--out", one, "--sample", "red | blue" if cond == "class" else "all red | all blue",
              "--guidance", "2", "--number", "3", "--sample-steps", "3"])
    assert "6 pictures, 3 in a row" in capsys.readouterr().out and Path(one, "sample.png").is_file()


def test_resumes_exactly(tmp_path, pictures):
    """In one process, to the last bit: weights, averages and losses."""
    args = [*RUN, "--patch", "2", "--data", pictures, "--eval-every", "3", "--log-every", "1", "--optim", "muon",
            "--lr", "1e-2", "--ema", "0.9", "--device", "cpu"]
    dit.main([*args, "--steps", "6", "--out", str(tmp_path / "one")])
    dit.main([*args, "--steps", "3", "--lr-end", "1", "--out", str(tmp_path / "two")])
    dit.main(["--resume", "--steps", "6", "--out", str(tmp_path / "two")])
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert a == b
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in ("one", "two"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_average(tmp_path):
    model = official_dit.filled(Model(Config(**OFFICIAL)))
    (ema,) = model.averages()
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.param_groups[0]["decay"] = 0.75
    ema.step()
    ema.swap()
    assert all(torch.allclose(p, b + 0.25, atol=1e-6) for p, b in zip(model.parameters(), before))
    ema.swap()
    assert all(torch.allclose(p, b + 1) for p, b in zip(model.parameters(), before))


def test_two_processes_equal_one(tmp_path, pictures):
    """Noise and times come with the pictures, so the same global batch gives the same losses."""
    args = [*RUN, "--patch", "2", "--data", pictures, "--steps", "6", "--optim", "adamw", "--lr", "1e-3",
            "--log-every", "1", "--device", "cpu", "--dtype", "fp32"]
    dit.main([*args, "--out", str(tmp_path / "one")])
    finish(start([*args, "--out", str(tmp_path / "two")], "dit.py", torchrun=2))
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert a.keys() == b.keys() and all(abs(float(a[s][0]) - float(b[s][0])) < 1e-5 for s in a)


def test_alone(tmp_path):
    """Copied into an empty folder it draws its shapes itself, trains, and samples."""
    shutil.copy(ROOT / "dit.py", tmp_path)
    out = finish(start([*RUN, "--steps", "2", "--patch", "8", "--out", "o"], "dit.py", cwd=tmp_path))
    assert "plain PyTorch" in out and "drawing shapes" in out and "final val loss" in out
    out = finish(start(["--sample", "a small red circle", "--out", "o", "--number", "2", "--sample-steps", "2"],
                       "dit.py", cwd=tmp_path))
    assert "2 pictures" in out


@pytest.mark.parametrize("flags, words", [
    ("--cond picture", "--cond picture: one of none, class, text"),
    ("--sampler ddpm", "--sampler ddpm: --objective flow has euler and heun"),
    ("--ema 1", "--ema 1.0: at least 0 and less than 1"),
    ("--heads 5", "--heads 5: --dim 32 must be divisible"),
    ("--patch 3", "--patch 3: the pictures' side 8 must be divisible"),
    ("--size 9", "--size 9 --channels 0: --data"),
    ("--data nothing.npz",
     "--data nothing.npz: no .npz, no folder of pictures, nor one of cifar10, fashion_mnist, mnist, shapes"),
    ("--features 7", "must have features"),
    ("--cond class --classes 1", "--classes 1: --data"),
    ("--sample red", "no run in"),
    ("--number 0", "--number 0: must be positive"),
    ("--sample-steps 0", "--sample-steps 0: must be positive"),
    ("--vae no/where/x", "dit.py: no/where/x"),
    ("--steps 0", "--steps 0: must be positive"),
])  # fmt: skip
def test_bad_input(tmp_path, pictures, capsys, flags, words):
    data = [] if "--data" in flags else ["--data", pictures]
    with pytest.raises(SystemExit) as e:
        dit.main([*RUN, "--patch", "2", *data, "--out", str(tmp_path / "o"), *flags.split()])
    said = capsys.readouterr().err.strip()
    assert e.value.code == 2 and words in said and said.count("\n") == 0


def test_a_vae_of_other_channels(tmp_path, pictures, capsys):
    """Before anything is drawn, in training and sampling; one that fits decodes."""
    import unet

    args = [*RUN, "--patch", "2", "--steps", "1", "--eval-iters", "1", "--number", "1", "--sample-steps", "1"]
    out, vae = str(tmp_path / "o"), str(tmp_path / "vae")
    unet.VAE(unet.Config(vae_widths=[8, 8], vae_layers=1, groups=4, stage="vae")).save_pretrained(vae)
    dit.main([*args, "--data", pictures, "--out", out])
    for call in ([*args, "--data", pictures, "--out", out], ["--sample", "all red", "--out", out]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            dit.main([*call, "--vae", vae])
        err = capsys.readouterr().err
        said = f"dit.py: --vae {vae}: its latents have 4 channels, what this model draws has 3\n"
        assert e.value.code == 2 and err == said
    np.savez(tmp_path / "l.npz", latents=np.zeros((4, 4, 8, 8), np.float32), captions=np.array(["a"] * 4))
    dit.main([*args, "--data", str(tmp_path / "l.npz"), "--vae", vae, "--out", str(tmp_path / "l")])
    assert "final val loss" in capsys.readouterr().out
    assert not any("vae" in k for k in load_file(tmp_path / "l" / "model.safetensors"))


def test_captions_that_are_no_utf_8():
    """Half a surrogate pair, as JSON and the shell can give it."""
    tok = dit.Tokenizer("byte")
    assert tok.decode(tok.encode(["a \udcff b\ud800"], 9)[0]) == "a ? b?"


@pytest.mark.parametrize("cond, arrays, words", [
    ("class", dict(labels=np.array([0, 1, -1, -1])), "its labels (int64, -1 to"),
    ("class", dict(labels=np.array([0, 1.5, 1, 0])), "its labels (float64, 0.0 to 1.5) must be texts"),
    ("class", dict(labels=np.zeros((4, 2), int)), "its labels (int64, 0 to 0) must be"),
    ("class", dict(labels=np.full((4, 2), "a")), "its labels (<U1) must be"),
    ("class", dict(labels=np.array(3)), "1 labels for 4 images"),
    ("text", dict(captions=np.arange(4)), "its captions (int64) must be texts, one for each picture"),
    ("class", dict(labels=np.array([b"red", b"blue"] * 2)), None),
    ("text", dict(captions=np.array([b"red", b"blue"] * 2), labels=np.array([-1.0] * 4)), None),
])  # fmt: skip
def test_arrays_of_conditions(tmp_path, capsys, cond, arrays, words):
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8, 3), np.uint8), **arrays)
    cfg = Config(data=str(tmp_path / "a.npz"), cond=cond)
    if words is None:
        train, _, tok = dit.load_data(cfg, {}, None)
        assert tok.chars == ["blue", "red"] if cond == "class" else tok.decode(train.cond[0]) in ("red", "blue")
        return
    with pytest.raises(SystemExit) as e:
        dit.load_data(cfg, {}, None)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1


def test_bad_arrays(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 6, 3), np.uint8), captions=np.array(["a"] * 4))
    np.savez(tmp_path / "b.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.zeros(3, int))
    np.savez(tmp_path / "c.npz", pictures=np.zeros(3))
    np.savez(tmp_path / "d.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    (tmp_path / "e.npz").write_text("x")
    for name, words in (("a", "8 x 6, and a square"), ("b", "3 labels for 4 images"), ("c", "needs images"),
                        ("d", "no captions"), ("e", "cannot be read")):
        with pytest.raises(SystemExit):
            dit.main([*RUN, "--data", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / "o")])
        assert words in capsys.readouterr().err
