"""unet.py against diffusers and transformers, itself in every form, and as a program: started, stopped, misused."""

import copy
import json
import re
import shutil
from pathlib import Path

import house
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from house import ROOT, error, finish, losses, randomised, start
from safetensors.torch import load_file, save_file

import unet
from unet import VAE, Config, Model, TextEncoder

TINY = dict(widths=(16, 32), attn=(0, 1), layers=1, heads=2, groups=8, size=8, channels=3, dim=16, text_layers=1,
            text_heads=2, captions=8)
RUN = ("--widths 16 32 --attn 0 1 --layers 1 --heads 2 --groups 8 --dim 16 --text-layers 1 --text-heads 2 "
       "--vae-widths 16 16 --vae-layers 1").split()
RUN += "--batch 4 --eval-iters 1 --sample-steps 2 --number 2 --warmup 2 --ema 0.5 --log-every 1 --dtype fp32".split()


def pictures(n=2, side=8, channels=3, seed=1):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """-> a folder as Stable Diffusion's, saved by diffusers and transformers, and their models; all weights random."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("sd")
    net = UNet2DConditionModel(sample_size=16, cross_attention_dim=24, block_out_channels=(16, 32, 32, 32),
                               norm_num_groups=8, attention_head_dim=4)
    n = 4
    vae = AutoencoderKL(in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * n,
                        up_block_types=("UpDecoderBlock2D",) * n, block_out_channels=(16, 32, 32, 32),
                        layers_per_block=2, latent_channels=4, norm_num_groups=8)  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(vocab_size=60, hidden_size=24, intermediate_size=96, num_hidden_layers=2,
                                        num_attention_heads=4, bos_token_id=58, eos_token_id=59))  # fmt: skip
    models = dict(unet=net, vae=vae, text_encoder=text)
    for name, m in models.items():
        randomised(m, 0.15).eval().save_pretrained(folder / name)
    return folder, models


def compare(ours, theirs, names):
    """One output against the other, and the gradients of a random functional of it."""
    assert error(ours, theirs) < 1e-4
    d = pictures(*[1] * 3).new_tensor(np.random.default_rng(0).standard_normal(ours.shape))
    (ours * d).sum().backward()
    (theirs * d).sum().backward()
    a, b = (dict(m.named_parameters()) for m in names)
    assert a.keys() == b.keys()
    most = max(p.grad.norm() for p in b.values())
    for k in a:  # a key's bias shifts all scores of a query alike, so its gradient is rounding
        if k.endswith(("to_k.bias", "k_proj.bias")):
            assert a[k].grad.norm() < 1e-6 * most and b[k].grad.norm() < 1e-6 * most, k
        else:
            assert error(a[k].grad, b[k].grad) < 1e-4, k


# ---------------------------------------------------------------- the model
def test_equals_diffusers(official):
    """The U-Net's output and every gradient, with as many tokens as one likes; fp32, relative error."""
    folder, theirs = official
    ours, theirs = Model.from_pretrained(folder / "unet").eval(), copy.deepcopy(theirs["unet"])
    x, t, text = (pictures(side=16, channels=4), torch.tensor([3, 700]),
                  torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2)))
    compare(ours(x, t, text), theirs(x, t, text).sample, (ours, theirs))
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    assert error(ours(x, t, text, mask), theirs(x, t, text, encoder_attention_mask=mask).sample) < 1e-4


def test_vae_equals_diffusers(official):
    """mean and logvar of pictures that are no multiple of the attention's block, and what is decoded."""
    folder, theirs = official
    ours, theirs = VAE.from_pretrained(folder / "vae").eval(), copy.deepcopy(theirs["vae"])
    x = pictures(side=24)
    q = theirs.encode(x).latent_dist
    mean, logvar = ours.encode(x)
    assert error(mean, q.mean) < 1e-4 and error(logvar, q.logvar) < 1e-4
    z, w = mean + (logvar / 2).exp(), q.mean + q.std
    compare(ours.decode(z), theirs.decode(w).sample, (ours, theirs))


def test_text_encoder_equals_transformers(official):
    folder, theirs = official
    ours, theirs = TextEncoder.from_pretrained(folder / "text_encoder").eval(), copy.deepcopy(theirs["text_encoder"])
    ids = torch.randint(60, (2, 77), generator=torch.Generator().manual_seed(0))
    wrapped = torch.nn.ModuleDict(dict(text_model=theirs))  # the names on the hub have this prefix
    compare(ours(ids), theirs(ids).last_hidden_state, (ours, wrapped))


def test_saves_what_the_libraries_load(official, tmp_path):
    """The whole folder is read, saved, and read back by diffusers and transformers without a change."""
    folder, theirs = official
    Model.from_pretrained(folder).save_pretrained(tmp_path)
    for name, m in theirs.items():
        again = type(m).from_pretrained(tmp_path / name).state_dict()
        assert (again.keys() == m.state_dict().keys()
                and all(torch.equal(v, again[k]) for k, v in m.state_dict().items())), name
    again = Model.from_pretrained(tmp_path)
    assert (again.cfg.scale == 0.18215 and again.cfg.size == 128
            and again.cfg.betas == "scaled" and again.cfg.channels == 4)


def test_older_names(official, tmp_path):
    """Old files call the VAE's projections otherwise, and CLIP's hold a buffer; the hub's prefix text_model."""
    folder, theirs = official
    shutil.copytree(folder, tmp_path / "sd")
    path = tmp_path / "sd/vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    save_file({re.sub(r"to_[qkv]|to_out\.0", lambda m: old[m[0]], k): v for k, v in load_file(path).items()}, path)
    path = tmp_path / "sd/text_encoder/model.safetensors"
    tensors = {f"text_model.{k}": v for k, v in load_file(path).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    ours = Model.from_pretrained(tmp_path / "sd")
    assert torch.equal(ours.vae.state_dict()["decoder.mid_block.attentions.0.to_q.weight"],
                       theirs["vae"].decoder.mid_block.attentions[0].to_q.weight)


def test_official_sizes():
    with torch.device("meta"):
        cfg = Config(**unet.PRESETS["sd1"])
        model, vae = Model(cfg), VAE(cfg)
    text = model.text_encoder
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(model) - count(text), count(vae), count(text)) == (859_520_964, 83_653_863, 123_060_480)
    assert (len(model.state_dict()) - len(text.state_dict()), len(vae.state_dict())) == (686, 248)


def test_strict(official, tmp_path, capsys):
    """A missing, an unknown, a misshapen tensor, another architecture, a damaged file: named and refused."""
    folder, _ = official
    shutil.copytree(folder / "unet", tmp_path / "unet")
    file, path = tmp_path / "unet/diffusion_pytorch_model.safetensors", tmp_path / "unet/config.json"
    good, config = load_file(file), json.loads(path.read_text())
    cases = [
        ({k: v for k, v in good.items() if k != "conv_out.bias"}, config, "no tensor conv_out.bias"),
        (good | {"conv_out.extra": torch.ones(1)}, config, "unknown tensor conv_out.extra"),
        (good | {"conv_out.bias": torch.ones(5)}, config, "conv_out.bias is (5,), but (4,)"),
        (good, config | {"use_linear_projection": True}, "use_linear_projection = True"),
        (good, config | {"_class_name": "UNet2DModel"}, "_class_name = 'UNet2DModel'"),
        (good, {"_class_name": "UNet2DConditionModel"}, "no Model of Stable Diffusion 1.x"),
    ]
    for tensors, c, said in cases:
        save_file(tensors, file)
        path.write_text(json.dumps(c))
        with pytest.raises(SystemExit) as e:
            Model.from_pretrained(tmp_path / "unet")
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, err
    path.write_text(json.dumps(config))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(SystemExit):
        Model.from_pretrained(tmp_path)
    assert "damaged" in capsys.readouterr().err


def test_clip_tokenizer(tmp_path):
    """As transformers' CLIPTokenizer, from vocab.json and merges.txt, filled up and cut as Stable Diffusion does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", initial_alphabet=letters,
                                  show_progress=False)
    bpe.train_from_iterator(["a small red circle and the large blue square, it's here " * 5, " ".join(letters)],
                            trainer)
    bpe.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab |= {"<|startoftext|>": unet.CLIP - 2, "<|endoftext|>": unet.CLIP - 1}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    theirs = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    cfg = Config(init=str(tmp_path), vocab=unet.CLIP)
    ours = unet.clip_words(cfg)
    texts = ["A small  red circle!", "", "it's 42 large, blue\nsquares", "caf\u00e9 \u4f60\u597d", "the square " * 60]
    want = theirs(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert ours.encode(texts, 77).tolist() == want
    again = unet.Tokenizer(ours.kind, ours.chars)  # as tok.json keeps it
    assert again.encode(texts, 77).tolist() == want and again.decode(want[0]) == "a small red circle !"
    model = Model(Config(**TINY | dict(captions=77, vocab=unet.CLIP)))
    assert model.nothing(77, "cpu").tolist() == [want[1]], "no caption is the empty one"


def test_conditions():
    """A dropped condition is that of no caption; what is prepared once by encode() gives the same."""
    for more, cond in ((dict(cond="text"), torch.randint(1, 256, (2, 8))),
                       (dict(cond="class", classes=5), torch.tensor([3, 0])),
                       (dict(features=12), torch.randn(2, 7, 12))):  # fmt: skip
        model = randomised(Model(Config(**TINY | more)), 0.2).eval()
        x, t = pictures(), torch.tensor([10.0, 900.0])
        with torch.no_grad():
            whole, drop = model(x, t, cond), torch.tensor([True, False])
            assert error(model(x, t, model.encode(cond)), whole) < 1e-6
            if more.get("features"):
                none = torch.zeros_like(cond)
            else:
                none = model.nothing(8 if cond.ndim == 2 else 1, "cpu").expand(2, -1)
            free, mixed = model(x, t, none), model(x, t, cond, drop=drop)
        assert error(mixed[0], free[0]) < 1e-6 and error(mixed[1], whole[1]) < 1e-6 and error(free, whole) > 1e-3


def test_checkpointing_changes_no_gradient():
    found = []
    for ckpt in (False, True):
        model = randomised(Model(Config(**TINY, ckpt=ckpt)), 0.2)
        x = pictures()
        loss = model.loss_at(x, torch.full((2, 8), 97), torch.tensor([[0.3, 0.9], [0.8, 0.01]]), pictures(seed=2))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_alone_gives_the_same():
    """The definitions in the file and the operations in kernels/ are the same maths."""
    alone = house.alone("unet.py")
    model = randomised(Model(Config(**TINY)), 0.2)
    other = alone.Model(alone.Config(**TINY))
    other.load_state_dict(model.state_dict())
    args = pictures(), torch.full((2, 8), 97), torch.tensor([[0.3, 0.9], [0.8, 0.01]]), pictures(seed=2)
    a, b = model.loss_at(*args), other.loss_at(*args)
    a.backward()
    b.backward()
    assert abs(a.item() - b.item()) < 1e-5
    for (k, p), q in zip(model.named_parameters(), other.parameters()):
        if k.endswith("k_proj.bias"):  # the softmax does not feel it: 0, but for rounding
            assert max(p.grad.abs().max(), q.grad.abs().max()) < 1e-9
        else:
            assert error(q.grad, p.grad) < 1e-4, k


# ---------------------------------------------------------------- training
def overfit(cfg, batch, n=10):
    """Losses of n steps on one batch."""
    torch.manual_seed(0)
    model = Model(cfg)
    objective, optimizers, found = model.objective(), unet.make_optimizers(model, cfg), []
    for step in range(n):
        unet.set_lr(optimizers, step, cfg)
        loss = objective(*batch)
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        found.append(loss.item())
    return found


RECORDED = dict(
    diffusion=[2.2605, 2.2315, 2.1523, 2.0019, 1.9434, 1.7550, 1.6587, 1.5424, 1.4426, 1.3547],
    vae=[1.4688, 1.1651, 0.9296, 0.7680, 0.6687, 0.5781, 0.4986, 0.4473, 0.3897, 0.3484],
)


@pytest.mark.parametrize("name", ["diffusion", "vae"])
def test_recorded_losses(name):
    """Ten steps on one batch, as recorded: a change of the maths, the initialisation or the schedule shows here."""
    side = 4 if name == "vae" else 8
    more = dict(stage="vae", vae_widths=(16, 16), vae_layers=1, channels=4) if name == "vae" else {}
    cfg = Config(**TINY | more, lr=3e-3, warmup=2, steps=30, lr_end=0.0)
    x = F.interpolate(pictures(4, 2, seed=5), 8)
    noise = pictures(4, side, cfg.channels, seed=6)
    batch = x, torch.arange(32).view(4, 8) + 65, torch.tensor([[0.1, 0.5], [0.4, 0.05], [0.6, 0.5], [0.9, 0.9]]), noise
    found = overfit(cfg, batch)
    assert found[-1] < found[0] and all(abs(a - b) < 3e-4 for a, b in zip(found, RECORDED[name], strict=True)), found


@pytest.fixture(scope="module")
def set_of_pictures(tmp_path_factory):
    """An .npz of 40 captioned pictures of 16 x 16."""
    images, labels, captions, _ = unet.draw_shapes(40, 16, 0)
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    np.savez(path, images=images, labels=labels, captions=captions)
    return str(path)


ARGS = [*RUN, "--steps", "8", "--eval-every", "4"]


@pytest.fixture(scope="module")
def one(tmp_path_factory, set_of_pictures):
    """The folder of a run in this process, on one thread as the others."""
    threads, out = torch.get_num_threads(), str(tmp_path_factory.mktemp("run") / "one")
    torch.set_num_threads(1)
    unet.main([*ARGS, "--lr", "1e-3", "--data", set_of_pictures, "--out", out])
    yield Path(out)
    torch.set_num_threads(threads)


def test_resume_after_kill(tmp_path, set_of_pictures, one, capsys):
    """kill -9, then --resume: the next losses and the weights are the same to the last bit; it leaves its pictures."""
    two = tmp_path / "two"
    cut = start([*ARGS, "--lr", "1e-3", "--data", set_of_pictures, "--out", str(two)], "unet.py")
    for line in cut.stdout:
        if line.startswith("step 6"):  # past the save at step 4
            break
    cut.kill()
    cut.wait()
    unet.main(["--resume", "--out", str(two), "--log-every", "1"])
    a, b = losses(one), losses(two)
    assert {s: a[s] for s in range(5, 9)} == {s: b[s] for s in range(5, 9)}
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        x, y = (load_file(d / f"{part}.safetensors") for d in (one, two))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert (one / "grid.png").stat().st_size > 500 and (one / "grid_4.png").is_file()
    unet.main(["--sample", "a red circle | a blue ring", "--number", "3", "--sample-steps", "2", "--out", str(one)])
    assert "6 pictures" in capsys.readouterr().out and (one / "sample.png").is_file()


def test_two_processes_equal_one(tmp_path, set_of_pictures, one):
    """Same global batch: losses within 1e-5."""
    finish(start([*ARGS, "--lr", "1e-3", "--data", set_of_pictures, "--out", str(tmp_path / "two")],
                 "unet.py", torchrun=2))
    a, b = losses(one), losses(tmp_path / "two")
    assert a.keys() == b.keys() and all(abs(float(a[s][0]) - float(b[s][0])) < 1e-5 for s in a)
    x, y = (load_file(d / "unet/diffusion_pytorch_model.safetensors") for d in (one, tmp_path / "two"))
    assert all(error(x[k], y[k]) < 1e-3 or (x[k] - y[k]).abs().max() < 1e-4 for k in x)


def test_vae_then_latents(tmp_path, set_of_pictures, capsys):
    """--stage vae, resumed; then diffusion in its latents, the VAE in its folder; both load in diffusers; resumed."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    v, d = tmp_path / "vae", tmp_path / "latent"
    unet.main([*RUN, "--stage", "vae", "--data", set_of_pictures, "--steps", "4", "--eval-every", "2", "--out", str(v)])
    unet.main(["--resume", "--steps", "6", "--out", str(v)])
    assert "PSNR" in capsys.readouterr().out and (v / "grid.png").is_file()
    unet.main([*RUN, "--vae", str(v), "--data", set_of_pictures, "--steps", "2", "--out", str(d)])
    a, b = (load_file(v / "diffusion_pytorch_model.safetensors"),
            load_file(d / "vae/diffusion_pytorch_model.safetensors"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    model, theirs = Model.from_pretrained(d), AutoencoderKL.from_pretrained(d / "vae")
    assert model.cfg.scale == theirs.config.scaling_factor and model.cfg.scale not in (0, 1, 0.18215)
    assert error(model.vae.decode(pictures(channels=4)), theirs.decode(pictures(channels=4)).sample) < 1e-4
    assert UNet2DConditionModel.from_pretrained(d / "unet").config.sample_size == 8
    unet.main(["--resume", "--steps", "3", "--out", str(d)])


def test_parts_of_an_earlier_run(tmp_path, set_of_pictures, capsys):
    """A folder that held a run in latents, then one in pixels, then one with features: each takes its own parts."""
    v, o = str(tmp_path / "v"), tmp_path / "o"
    args = [*RUN, "--data", set_of_pictures, "--steps", "1"]
    ask = ["--sample", "a red circle", "--number", "1", "--sample-steps", "1", "--out", str(o)]
    unet.main([*args, "--stage", "vae", "--out", v])
    unet.main([*args, "--vae", v, "--out", str(o)])
    unet.main([*args, "--out", str(o)])
    assert (o / "vae").is_dir() and Model.from_pretrained(o).vae is None
    unet.main(ask)
    unet.main(["--resume", "--steps", "2", "--out", str(o)])
    assert capsys.readouterr().out.count("1 pictures") == 1
    with np.load(set_of_pictures) as z:
        np.savez(tmp_path / "f.npz", images=z["images"], features=np.ones((40, 8, 12), np.float32))
    unet.main([*args, "--data", str(tmp_path / "f.npz"), "--features", "12", "--captions", "8", "--out", str(o)])
    assert (o / "text_encoder").is_dir() and Model.from_pretrained(o).text_encoder is None
    unet.main([*args, "--vae", v, "--out", str(o)])
    unet.main(ask)
    model = Model.from_pretrained(o)
    assert model.vae is not None and model.text_encoder is not None


def test_another_condition_than_the_checkpoint_s(one, set_of_pictures, tmp_path, capsys):
    data, out = ["--data", set_of_pictures], ["--out", str(tmp_path / "o")]
    for args in (["--resume", "--out", str(one)], ["--init", str(one), *data, *out],
                 ["--init", str(one), "--sample", "0", *out]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            unet.main([*args, "--cond", "class"])
        err = capsys.readouterr().err
        assert e.value.code == 2 and "--cond class: the " in err and "text" in err and err.count("\n") == 1


def test_captions_that_are_no_utf_8(one, capsys):
    """What the shell passes for the byte 0xff, and a tokenizer of CLIP's kind."""
    unet.main(["--sample", "\udcff", "--number", "1", "--sample-steps", "1", "--out", str(one)])
    assert "1 pictures" in capsys.readouterr().out
    from tokenizers import Tokenizer as Words
    from tokenizers import models

    words = Words(models.BPE(vocab={"?": 0}, merges=[])).to_str()
    assert (unet.Tokenizer("clip", words).encode(["\ud800"], 3) == [[unet.CLIP - 2, 0, unet.CLIP - 1]]).all()


def test_alone(tmp_path):
    """Copied into an empty folder: draws its shapes, trains and samples in plain PyTorch."""
    shutil.copy(ROOT / "unet.py", tmp_path)
    args = [*RUN, "--size", "16", "--cond", "class", "--steps", "2", "--out", "o"]
    out = finish(start(args, "unet.py", cwd=tmp_path))
    assert "plain PyTorch" in out and "drawing shapes" in out and "final val loss" in out
    assert "sample.png" in finish(start(
        ["--sample", "red circle", "--out", "o", "--number", "1", "--sample-steps", "2"], "unet.py", cwd=tmp_path))


# ---------------------------------------------------------------- misuse
def bad_inputs(tmp, data):
    d = ["--data", data]
    yield ["--preset", "huge"], "--preset huge: one of cpu, gpu, sd1"
    yield [*RUN, "--widths", "16", "0", *d], "--widths 16 0: positive numbers, one for each level"
    yield [*RUN, "--vae-widths", "-8", "8", *d], "--vae-widths -8 8: positive numbers"
    yield [*RUN, "--number", "0", *d], "--number 0: must be positive"
    yield [*RUN, "--sample-steps", "0", *d], "--sample-steps 0: must be positive"
    yield ["--widths", "16", "many", *d], "--widths 16 many: whole numbers, one for each level"
    yield [*RUN, "--attn", "1", *d], "--attn 1: 0 or 1 for each of the 2 levels"
    yield [*RUN, "--groups", "5", *d], "--groups 5: each of --widths 16 32 must be divisible"
    yield [*RUN, "--heads", "3", *d], "--heads 3: each of --widths 16 32 must be divisible"
    yield [*RUN, "--stage", "text", *d], "--stage text: one of diffusion, vae"
    yield [*RUN, "--vae", "no/where/x", *d], "no/where/x"
    yield [*RUN, "--vae", str(tmp), *d], f"{tmp}"
    yield [*RUN, "--size", "8", *d], "--size 8 --channels 0: --data"
    yield [*RUN, "--text-heads", "3", *d], "--text-heads 3: --dim 16 must be divisible"
    yield ["--widths", *["16"] * 6, "--attn", *"000000", "--groups", "8", *d], "halves 5 times what has a side of 16"
    yield ["--sample", "x", "--out", str(tmp)], "no run in"
    yield ["--data", str(tmp / "none")], "no .npz, no folder of pictures"


def test_bad_inputs(tmp_path, set_of_pictures, capsys):
    """Each gives one line that says what would be right, exit code 2 and no traceback."""
    for args, said in bad_inputs(tmp_path, set_of_pictures):
        with pytest.raises(SystemExit) as e:
            unet.main(args if "--out" in args else [*args, "--out", str(tmp_path / "o")])
        err = capsys.readouterr().err
        assert e.value.code == 2 and said in err and err.count("\n") == 1, (args, err)
