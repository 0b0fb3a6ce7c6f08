"""data/shapes.py, the rules that judge samples, and the other sets of pictures as dit.py and unet.py read them."""

import gzip
import json
import struct
import sys
import tarfile

import numpy as np
import pytest
import torch
from house import ROOT
from shapes_judge import COLOURS, FORMS, judge

sys.path.insert(0, str(ROOT / "data"))
import cifar10  # noqa: E402
import fashion_mnist  # noqa: E402
import mnist  # noqa: E402
import shapes  # noqa: E402

import dit  # noqa: E402


@pytest.mark.parametrize("size", [32, 64])
def test_rules_know_real_pictures(size):
    """Colour, form and size of pictures of the set; the label and the caption say the same."""
    images, labels, captions, names = shapes.draw_shapes(200, size, seed=5)
    found = [judge(p) for p in images]
    right = sum(f is not None and f"{f[0]} {f[1]}" == names[k] for f, k in zip(found, labels))
    assert right >= 198, right
    for f, text, k in zip(found, captions, labels):
        assert text.endswith(names[k]) and text.split()[0] == "a"
        assert f is None or len(text.split()) == 3 or f[2] == text.split()[1], (f, text)


def test_rules_refuse_wrong_pictures():
    """Noise, an empty picture, halves of two shapes, a dissolved shape; another colour or form is told apart."""
    rng = np.random.default_rng(0)
    images, labels, _, names = shapes.draw_shapes(120, 32, seed=6)
    assert judge(np.full((32, 32, 3), 90, np.uint8)) is None
    assert all(judge(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)) is None for _ in range(20))
    dissolved = [np.where(rng.random((32, 32, 1)) < 0.5, im, im[0, 0]) for im in images]
    assert sum(judge(im) is None for im in dissolved) >= 110
    right = lambda ims: sum((f := judge(im)) is not None and f"{f[0]} {f[1]}" == names[k] for im, k in zip(ims, labels))
    assert right(images[:, :, :, [1, 2, 0]]) <= 2, "other colours"
    assert right(np.roll(images, 1, 0)) <= 12, "the neighbour's picture: only those alike by chance"
    halves = np.concatenate([images[:, :16], np.roll(images, 1, 0)[:, 16:]], 1)
    assert right(halves) <= 60


def test_set_on_disk(tmp_path, capsys):
    assert shapes.main(["--out", str(tmp_path / "s"), "--size", "16"]) is None
    z, meta = np.load(tmp_path / "s/val.npz"), json.loads((tmp_path / "s/meta.json").read_text())
    assert (z["images"].shape == (1000, 16, 16, 3) and z["images"].dtype == np.uint8 and meta["flip"]
            and len(meta["names"]) == len(COLOURS) * len(FORMS))
    assert shapes.common.run(shapes.main, ["--size", "3"]) == 2 and "at least 16" in capsys.readouterr().err


def idx(path, array):
    path.write_bytes(gzip.compress(struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()))


def test_mnist_and_fashion(tmp_path, capsys):
    """From a local folder, in the published format; a mirrored digit is no digit."""
    rng, source = np.random.default_rng(0), tmp_path / "source"
    source.mkdir()
    for split, n in (("train", 30), ("val", 10)):
        images, _, labels, _ = mnist.FILES[split]
        idx(source / images, rng.integers(0, 256, (n, 28, 28)).astype(np.uint8))
        idx(source / labels, (np.arange(n) % 10).astype(np.uint8))
    for module, caption, flip in ((mnist, "the digit three", False), (fashion_mnist, "a dress", True)):
        module.main(["--url", str(source), "--out", str(tmp_path / module.NAME)])
        cfg = dit.Config(data=str(tmp_path / module.NAME), cond="class")
        train, val, tok = dit.load_images(cfg, {}, None)
        assert (cfg.size, cfg.channels, cfg.classes, train.flip) == (28, 1, 10, flip) and len(train.pictures) == 30
        assert np.load(tmp_path / module.NAME / "val.npz")["captions"][3] == caption and tok.label(module.NAMES[3]) == 3
    (source / mnist.FILES["val"][0]).write_bytes(b"no gzip")
    assert (mnist.common.run(mnist.main, ["--url", str(source), "--out", str(tmp_path / "x")]) == 2
            and "no gzipped IDX" in capsys.readouterr().err)


def test_cifar10(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = {f: np.concatenate([np.full((4, 1), 3), rng.integers(0, 256, (4, 3072))], 1).astype(np.uint8)
            for fs in cifar10.FILES.values() for f in fs}
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        for f, r in rows.items():
            (tmp_path / f).write_bytes(r.tobytes())
            tar.add(tmp_path / f, f"cifar-10-batches-bin/{f}")
    cifar10.main(["--url", str(tmp_path / "c.tar.gz"), "--out", str(tmp_path / "c")])
    z = np.load(tmp_path / "c/train.npz")
    assert z["images"].shape == (20, 32, 32, 3) and z["captions"][0] == "a cat"
    assert (z["images"][1, 2, 5] == rows["data_batch_1.bin"][1, 1:].reshape(3, 32, 32)[:, 2, 5]).all(), (
        "red, green and blue of a pixel")
    (tmp_path / "bad.tar.gz").write_bytes(b"x")
    assert cifar10.common.run(cifar10.main, ["--url", str(tmp_path / "bad.tar.gz"), "--out", str(tmp_path / "d")]) == 2
    assert "no tar archive" in capsys.readouterr().err


def test_folder_of_pictures(tmp_path):
    """Cropped to a square of --size; captions from .txt beside them or from names; labels are subfolders."""
    from PIL import Image

    for i, kind in enumerate(("cat", "dog", "cat", "dog")):
        (tmp_path / kind).mkdir(exist_ok=True)
        Image.new("RGB", (200, 90 + i), (10 * i, 0, 0)).save(tmp_path / kind / f"a_{kind}_{i}.png")
    (tmp_path / "cat/a_cat_0.txt").write_text("a black cat\n")
    found = dit.read_pictures(tmp_path, 32)
    assert (found["images"].shape == (4, 32, 32, 3)
            and found["captions"].tolist() == ["a black cat", "a cat 2", "a dog 1", "a dog 3"])
    assert found["images"][:, 0, 0, 0].tolist() == [0, 20, 10, 30]
    cfg = dit.Config(data=str(tmp_path), cond="class", size=16, flip=True)
    train, val, tok = dit.load_images(cfg, {}, None)
    assert tok.chars == ["cat", "dog"] and (cfg.size, cfg.classes, train.flip, val.flip) == (16, 2, True, False)
    assert len(train.pictures) == 3 and len(val.pictures) == 1


def test_npz_and_batches(tmp_path):
    """uint8 becomes [-1, 1], latents stay; (seed, step, micro) make the batch of all processes; evaluation is fixed."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8), rng.integers(0, 4, 40)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    cfg = dit.Config(data=str(tmp_path / "a.npz"), cond="class", batch=6, seed=3, flip=True)
    train, val, _ = dit.load_images(cfg, {}, None)
    one = train.batch(cfg, 5, 0, 0, 1)
    two = [train.batch(cfg, 5, 0, rank, 2) for rank in (0, 1)]
    for whole, *halves in zip(one, *two):
        assert torch.equal(whole[0::2], halves[0]) and torch.equal(whole[1::2], halves[1])
    assert (not torch.equal(one[3], train.batch(cfg, 6, 0, 0, 1)[3])
            and not torch.equal(one[3], train.batch(cfg, 5, 1, 0, 1)[3]))
    pixels = ((one[0] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    known = {im.tobytes(): k for im, k in zip(images, labels)}
    mirrored = {im[:, ::-1].tobytes(): k for im, k in zip(images, labels)}
    assert all((known | mirrored)[p.tobytes()] == k for p, k in zip(pixels, one[1].tolist()))
    many = torch.cat([train.batch(cfg, s, 0, 0, 1)[0] for s in range(10)])
    share = np.mean([((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().tobytes() in mirrored for p in many])
    assert 0.25 < share < 0.75 and not val.flip
    a, b = val.windows(np.arange(4)), val.windows(np.arange(2, 4))
    assert all(torch.equal(u[2:], v) for u, v in zip(a, b)) and (a[2][:, 1] == 1).all()
    latents = rng.standard_normal((20, 4, 8, 8)).astype(np.float16)
    np.savez(tmp_path / "l.npz", latents=latents, features=rng.standard_normal((20, 5, 7)).astype(np.float16),
             mask=np.ones((20, 5), bool))
    cfg = dit.Config(data=str(tmp_path / "l.npz"), cond="text", features=7, captions=5)
    train, *_ = dit.load_images(cfg, {}, None)
    x, cond, u, noise, mask = train.batch(cfg, 0, 0, 0, 1)
    assert ((cfg.size, cfg.channels) == (8, 4) and cond.shape == (64, 5, 7)
            and mask.shape == (64, 5) and noise.shape == x.shape)
    assert x[0].half().numpy().tobytes() in {v.tobytes() for v in latents}


def test_png(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    dit.write_png(str(tmp_path / "a.png"), pixels)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == pixels).all()
    x = torch.full((3, 1, 4, 4), -1.0)
    g = dit.grid(x, 2)
    assert g.shape == (12, 12, 3) and (g[1:5, 1:5] == 0).all() and (g[7:, 7:] == 128).all()
