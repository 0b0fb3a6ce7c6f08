"""The data scripts, against a server on 127.0.0.1 that fails in planned ways. No network."""
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import types
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
import common  # noqa: E402

BODY = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))


def script(name):
    return importlib.import_module(name)


def sha(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tokens(folder, split, dtype="<u2"):
    return np.fromfile(folder / f"{split}.bin", dtype)


def meta(folder):
    return json.loads((folder / "meta.json").read_text())


@pytest.fixture
def server():
    """files: path -> bytes. Faults: cuts (bytes sent before each coming cut), ranges (False: Range is ignored;
    a number: answers begin that much later than asked for)."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.log.append((self.path, self.headers.get("Range")))
            if to := self.server.redirects.get(self.path):
                self.send_response(302)
                for k, v in to.items():
                    self.send_header(k, v)
                return self.end_headers()
            body = self.server.files.get(self.path)
            if body is None:
                return self.send_error(404)
            start, total = 0, len(body)
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if wanted and self.server.ranges is not False:
                start = int(wanted[1]) + self.server.ranges
                self.send_response(206 if start < total else 416)
                span = f"{start}-{total - 1}" if start < total else "*"
                self.send_header("Content-Range", f"bytes {span}/{total}")
            else:
                self.send_response(200)
            body = body[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = self.server.cuts.pop(0) if self.server.cuts else len(body)
            self.wfile.write(body[:cut])  # then the connection closes (HTTP/1.0)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        s.files, s.redirects, s.cuts, s.ranges, s.log = {"/file.bin": BODY}, {}, [], 0, []
        s.url = f"http://127.0.0.1:{s.server_address[1]}"
        threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield s
        s.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "WAIT", 0.0)
    monkeypatch.setattr(common, "HERE", tmp_path / "data")  # nothing is written into the repository
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)


@pytest.fixture
def tiny_gpt2(monkeypatch):
    """GPT-2's splitting pattern and end-of-text id over single bytes and a few merges: no table to download."""
    import tiktoken
    words = [bytes([i]) for i in range(256)] + [b"he", b"the", b" the", b"\n\n", b"  ", b" w", b"'s", b"ing"]
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    encoding = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks={w: i for i, w in enumerate(words)},
                                 special_tokens={"<|endoftext|>": common.EOT})
    monkeypatch.setattr(common, "gpt2_encoding", lambda: encoding)
    return encoding


def fails(capsys, module, argv, *words):
    """The script fails with one line that holds all the words, and exit code 2."""
    capsys.readouterr()
    assert common.run(script(module).main, [str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"data/{module}.py: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


# ---------------------------------------------------------------- download


@pytest.mark.parametrize("digest", [sha(BODY), None], ids=["checksum", "none"])
def test_resumes_after_a_cut(server, tmp_path, digest):
    server.cuts = [6 << 14, 3 << 14]  # whole blocks of what is read at a time
    path = common.download(server.url + "/file.bin", tmp_path / "f", digest=digest)
    assert path.read_bytes() == BODY
    assert server.log == [("/file.bin", None), ("/file.bin", f"bytes={6 << 14}-"), ("/file.bin", f"bytes={9 << 14}-")]
    assert os.listdir(tmp_path) == ["f"]


def test_server_without_range_starts_anew(server, tmp_path):
    server.ranges, server.cuts = False, [6 << 14, 100_000]
    assert common.download(server.url + "/file.bin", tmp_path / "f", len(BODY), sha(BODY)).read_bytes() == BODY
    assert [r for _, r in server.log] == [None, f"bytes={6 << 14}-", f"bytes={6 << 14}-"]


def test_gives_up_when_nothing_new_comes(server, tmp_path):
    server.ranges, server.cuts = False, [1 << 14] * 100
    with pytest.raises(common.DataError, match="connection was cut at 16,384 bytes"):
        common.download(server.url + "/file.bin", tmp_path / "f", len(BODY), sha(BODY))
    assert len(server.log) == 1 + common.RETRIES
    assert os.listdir(tmp_path) == ["f.part"]  # kept for the next run


def test_server_that_sends_another_range(server, tmp_path):
    (tmp_path / "f.part").write_bytes(BODY[:1000])
    server.ranges = 7
    with pytest.raises(common.DataError, match="from 1000 on, the server sent others"):
        common.download(server.url + "/file.bin", tmp_path / "f", len(BODY), sha(BODY))


@pytest.mark.parametrize("stale", [BODY[:1234], BODY, BODY + b"more", b"other bytes" * 50])
def test_part_file_of_an_earlier_run(server, tmp_path, stale):
    """A kill left a beginning; everything but the rename; too much; or the beginning of another file."""
    (tmp_path / "f.part").write_bytes(stale)
    assert common.download(server.url + "/file.bin", tmp_path / "f", len(BODY), sha(BODY)).read_bytes() == BODY
    assert server.log[0] == ("/file.bin", f"bytes={len(stale)}-")
    assert len(server.log) == (1 if BODY.startswith(stale) else 2)
    assert os.listdir(tmp_path) == ["f"]


def test_wrong_checksum_or_size_leaves_nothing(server, tmp_path):
    for size, digest, words in [(None, sha(b""), "sha256 .* instead of e3b0c4"), (5, None, "300,000 .* instead of 5")]:
        with pytest.raises(common.DataError, match=words):
            common.download(server.url + "/file.bin", tmp_path / "f", size, digest)
        assert os.listdir(tmp_path) == []


def test_cached_file(server, tmp_path, capsys):
    path = tmp_path / "f"
    path.write_bytes(BODY)
    common.download(server.url + "/file.bin", path, len(BODY), sha(BODY))
    assert server.log == []  # right: used as it is
    path.write_bytes(BODY[:-1] + b"x")  # right size, wrong hash
    (tmp_path / "f.part").write_bytes(BODY[:10])
    common.download(server.url + "/file.bin", path, len(BODY), sha(BODY))
    assert path.read_bytes() == BODY and len(server.log) == 1
    assert "downloading it again" in capsys.readouterr().err


def test_checksum_of_the_hub(server, tmp_path):
    for digest in (hashlib.sha256(BODY).hexdigest(), "0" * 64):
        server.redirects = {"/hub": {"Location": "/file.bin", "X-Linked-Etag": f'"{digest}"'}}
        if digest.startswith("0000"):
            with pytest.raises(common.DataError, match="instead of 0000"):
                common.download(server.url + "/hub", tmp_path / "f2")
        else:
            assert common.download(server.url + "/hub", tmp_path / "f1").read_bytes() == BODY
    assert os.listdir(tmp_path) == ["f1"]


def test_command_line_failures(server, tmp_path, capsys):
    out, bad = tmp_path / "out", server.url + "/file.bin"
    fails(capsys, "shakespeare", ["--out", out, "--url", server.url + "/none"], "HTTP 404", "/none")
    fails(capsys, "shakespeare", ["--out", out, "--url", bad], "300,000 bytes instead of 1,115,394")
    fails(capsys, "alpaca", ["--out", out, "--url", bad], "instead of 2eddafc6", "nothing was kept")
    fails(capsys, "shakespeare", ["--out", out, "--url", "http://127.0.0.1:1/x"], "cannot reach 127.0.0.1:1", "refused")
    fails(capsys, "shakespeare", ["--out", out, "--url", "ftp://host/x"], "ftp://host/x")
    fails(capsys, "shakespeare", ["--out", out, "--url", tmp_path / "no.txt"], "no such file")
    fails(capsys, "tinystories", ["--out", out, "--tok", "byte", "--url", tmp_path], "no such file", "V2-GPT4-train")
    fails(capsys, "sharegpt", ["--out", out], "--file is missing")
    fails(capsys, "sharegpt", ["--out", out, "--file", tmp_path / "no"], "no such file")
    fails(capsys, "shakespeare", ["--tok", "bpe"], "'bpe'", "gpt2")
    fails(capsys, "fineweb", ["--tok", "byte"], "'byte'", "gpt2")
    fails(capsys, "fineweb", ["--shards", "104", "--set", "10B"], "--shards 104", "1 to 103")
    fails(capsys, "fineweb", ["--out", out, "--url", tmp_path], "--data FOLDER")
    fails(capsys, "stdlib", ["--out", out, "--url", tmp_path], "no .py files")
    assert os.listdir(out) == []
    (tmp_path / "a_file").write_text("")
    for where in (tmp_path / "a_file", tmp_path / "a_file/below"):
        fails(capsys, "stdlib", ["--out", where], "cannot write to", "--out FOLDER")


def test_missing_packages_and_tables(tmp_path, capsys, monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("Failed to resolve")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for name in ("stdlib", "tinystories"):
        fails(capsys, name, ["--out", tmp_path, "--tok", "gpt2"], "--tok byte", "Failed to resolve")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    fails(capsys, "stdlib", ["--out", tmp_path, "--tok", "gpt2"], "pip install tiktoken", "--tok byte")
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails(capsys, "openwebtext", ["--out", tmp_path], "pip install datasets")
    monkeypatch.setitem(sys.modules, "requests", None)
    fails(capsys, "shakespeare", ["--out", tmp_path], "pip install requests")
    assert os.listdir(tmp_path) == []


def test_as_a_process(tmp_path):
    """From the root and from data/; torch and requests are not even imported for a set that needs neither."""
    env = dict(os.environ, no_proxy="127.0.0.1")
    argv = ["--out", tmp_path / "a", "--url", "http://127.0.0.1:1/x"]
    r = subprocess.run([sys.executable, "data/shakespeare.py", *argv], cwd=DATA.parent, env=env, capture_output=True,
                       text=True)
    assert r.returncode == 2 and r.stdout == "" and r.stderr.count("\n") == 1, r.stderr
    assert r.stderr.startswith("data/shakespeare.py: cannot reach 127.0.0.1:1")
    (tmp_path / "lib").mkdir()
    for i in range(60):
        (tmp_path / f"lib/m{i}.py").write_text(f"x = {i}\n")
    code = ("import sys, common, stdlib; code = common.run(stdlib.main, sys.argv[1:]);"
            "print(code, {'torch', 'requests', 'tiktoken'} & set(sys.modules))")
    r = subprocess.run([sys.executable, "-c", code, "--out", tmp_path / "b", "--url", tmp_path / "lib"],
                       cwd=DATA, env=env, capture_output=True, text=True)
    assert r.stdout.endswith("\n0 set()\n"), r.stdout + r.stderr


# ---------------------------------------------------------------- files


def test_atomic_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with common.atomic(path, "w") as f:
            f.write("half")
            raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]
    left = tmp_path / "f.tmp123"
    left.write_text("left by a kill")
    os.utime(left, (0, 0))
    with common.atomic(path, "w") as f:
        f.write("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["f"]


def test_a_failed_build_is_not_taken_for_a_set(tmp_path):
    """A set that was complete stays complete when building it again fails."""
    common.write_bins(tmp_path, "x", "byte", {"train": lambda: [b"abc"], "val": lambda: [b"d"]})
    with pytest.raises(common.DataError, match="no text for val.bin"):
        common.write_bins(tmp_path, "x", "byte", {"train": lambda: [b"xyz"], "val": lambda: []})
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "train.bin", "val.bin"]
    assert tokens(tmp_path, "train").tolist() == [97, 98, 99]


def test_a_kill_between_two_files(tmp_path, monkeypatch):
    """New and old files may lie together then, but not under a meta.json that says they belong together."""
    common.write_bins(tmp_path, "x", "byte", {"train": lambda: [b"abc"], "val": lambda: [b"d"]})
    replace, left = os.replace, [1]

    def replace_once(*names):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        replace(*names)
    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        common.write_bins(tmp_path, "x", "byte", {"train": lambda: [b"xyz"], "val": lambda: [b"w"]})
    assert sorted(os.listdir(tmp_path)) == ["train.bin", "val.bin"]


# ---------------------------------------------------------------- tokens

TEXT = ("The king's men,  they're going\n\n\nhome:  the 3rd time\t of the  thing.\n  \n Ünïcode — «the» naïve"
        "\u2003x \ntail\r\nwith the end \n\n")


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_pieces_do_not_change_the_tokens(tmp_path, monkeypatch, tiny_gpt2, chunk):
    monkeypatch.setattr(common, "CHUNK", chunk)
    path = tmp_path / "f"
    path.write_bytes(data := (TEXT * 5).encode())
    parts = list(common.pieces(path))
    assert b"".join(parts) == data and (len(parts) > 5 or chunk == 1000)
    ids = np.concatenate(list(common.encode(parts, "gpt2")))
    assert ids.tolist() == tiny_gpt2.encode_ordinary(TEXT * 5)
    assert b"".join(common.pieces(path, 10, 100)) == data[10:100]


def test_tokenizers(tmp_path, tiny_gpt2):
    def build(tok, documents):
        splits = {"train": lambda: (t.encode() for t in ("héé", "<|endoftext|>")), "val": lambda: [b"b\xff"]}
        common.write_bins(tmp_path, "x", tok, splits, documents=documents, source="s")
        return tokens(tmp_path, "train").tolist(), tokens(tmp_path, "val").tolist(), meta(tmp_path)

    train, val, m = build("byte", False)
    assert bytes(train) == "héé<|endoftext|>".encode() and bytes(val) == b"b\xff"
    assert m == {"name": "x", "tok": "byte", "vocab_size": 256, "dtype": "uint16", "train_tokens": 18, "val_tokens": 2,
                 "files": {"train": ["train.bin"], "val": ["val.bin"]}, "source": "s"}
    train, val, m = build("byte", True)
    assert bytes(train) == "héé\n<|endoftext|>\n<|endoftext|>\n<|endoftext|>\n".encode()
    train, val, m = build("char", False)
    assert m["chars"] == "".join(sorted(set("héé<|endoftext|>b\ufffd"))) and m["vocab_size"] == len(m["chars"])
    assert "".join(m["chars"][i] for i in train) == "héé<|endoftext|>"
    assert "".join(m["chars"][i] for i in val) == "b\ufffd"
    train, val, m = build("gpt2", True)
    plain = tiny_gpt2.encode_ordinary("<|endoftext|>")  # in a text it is text, not the special token
    assert train == tiny_gpt2.encode_ordinary("héé") + [50256] + plain + [50256] and len(plain) > 1
    assert m["vocab_size"] == 50257 and m["train_tokens"] == len(train)


def test_large_vocabulary_takes_uint32(tmp_path):
    text = "".join(chr(i) for i in range(0x4E00, 0x4E00 + 70_000) if not 0xD800 <= i < 0xE000)
    common.write_bins(tmp_path, "x", "char", {"train": lambda: [text.encode()], "val": lambda: [b"z"]})
    m = meta(tmp_path)
    assert m["dtype"] == "uint32" and m["vocab_size"] == len(text) + 1 > 65536
    assert "".join(m["chars"][i] for i in tokens(tmp_path, "train", "<u4")) == text


# ---------------------------------------------------------------- the sets


def test_shakespeare(server, monkeypatch):
    module = script("shakespeare")
    text = ("To be, or not to be: that is the question.\n" * 300).encode()
    monkeypatch.setattr(module, "SIZE", len(text))
    monkeypatch.setattr(module, "DIGEST", sha(text))
    server.files["/a%20b/input.txt"] = text
    module.main(["--url", server.url + "/a%20b/input.txt"])
    out = common.HERE / "shakespeare/char"  # the default place, with the download beside it
    assert (common.HERE / "shakespeare/input.txt").read_bytes() == text
    m = meta(out)
    assert (m["name"], m["tok"], m["chars"]) == ("shakespeare", "char", "".join(sorted(set(text.decode()))))
    assert m["train_tokens"] == int(0.9 * len(text)) and m["train_tokens"] + m["val_tokens"] == len(text)
    both = np.concatenate([tokens(out, "train"), tokens(out, "val")])
    assert "".join(m["chars"][i] for i in both) == text.decode()
    assert "sha256:" + m["sha256"] == sha(text)
    module.main(["--url", server.url + "/a%20b/input.txt", "--tok", "byte"])
    assert len(server.log) == 1 and tokens(common.HERE / "shakespeare/byte", "train").max() < 128


def test_stdlib(tmp_path):
    """Built for real: large, the same each time, val from many packages, nothing of test suites or other packages."""
    module = script("stdlib")
    for out in ("a", "b"):
        module.main(["--out", str(tmp_path / out)])
    m = meta(tmp_path / "a")
    assert m == meta(tmp_path / "b") and m["tok"] == "byte"
    assert m["train_tokens"] > 5_000_000 and 0.02 < m["val_tokens"] / m["train_tokens"] < 0.1
    train, val = (tokens(tmp_path / "a", s).astype(np.uint8).tobytes() for s in ("train", "val"))
    ends = b"\n<|endoftext|>\n"
    assert train.endswith(ends) and val.endswith(ends) and len(set(val.split(ends)) & set(train.split(ends))) <= 3
    files = int(re.search(r"(\d+) files", m["source"])[1])
    assert (train + val).count(ends) >= files > 300


def test_enwik8(server, monkeypatch, tmp_path, capsys):
    module = script("enwik8")
    text = "".join(f"<page>{i} Ünïcode</page>\n" for i in range(400)).encode()[:10_000]
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("enwik8", text)
    server.files["/enwik8.zip"] = raw.getvalue()
    for name, value in {"SIZE": len(raw.getvalue()), "DIGEST": sha(raw.getvalue()), "TEXT_SIZE": 10_000,
                        "TEXT_DIGEST": sha(text)}.items():
        monkeypatch.setattr(module, name, value)
    module.main(["--out", str(tmp_path), "--url", server.url + "/enwik8.zip"])
    got = [tokens(tmp_path, s).astype(np.uint8).tobytes() for s in ("train", "val", "test")]
    assert got == [text[:9000], text[9000:9500], text[9500:]]
    assert meta(tmp_path)["test_tokens"] == 500 and meta(tmp_path)["files"]["test"] == ["test.bin"]
    (tmp_path / "enwik8.txt").write_bytes(b"x" * 10_000)  # a damaged copy is unpacked anew
    module.main(["--out", str(tmp_path), "--url", server.url + "/enwik8.zip"])
    assert tokens(tmp_path, "val").astype(np.uint8).tobytes() == text[9000:9500]
    (tmp_path / "enwik8.txt").unlink()
    monkeypatch.setattr(module, "TEXT_DIGEST", sha(b""))
    fails(capsys, "enwik8", ["--out", tmp_path, "--url", server.url + "/enwik8.zip"], "enwik8 has sha256")
    assert not (tmp_path / "enwik8.txt").exists()
    (tmp_path / "no.zip").write_bytes(b"not a zip file")
    fails(capsys, "enwik8", ["--out", tmp_path, "--url", tmp_path / "no.zip"], "not the expected zip file")


def test_tinystories(server, monkeypatch, tmp_path, tiny_gpt2):
    module = script("tinystories")
    stories = [f"The {i}th cat the dog saw.\nIt ran." for i in range(50)]
    files = {}
    for split, part in (("train", stories), ("val", stories[:3])):
        name, *_ = module.FILES[split]
        text = "\n<|endoftext|>\n".join(part).encode() + b"\n<|endoftext|>\n"
        server.files["/ts/" + name] = text
        files[split] = (name, len(text), sha(text))
    monkeypatch.setattr(module, "FILES", files)
    monkeypatch.setattr(common, "CHUNK", 100)  # separators lie across reads
    module.main(["--out", str(tmp_path), "--url", server.url + "/ts"])
    expected = [i for story in stories for i in [*tiny_gpt2.encode_ordinary(story), 50256]]
    assert tokens(tmp_path, "train").tolist() == expected
    module.main(["--out", str(tmp_path), "--url", server.url + "/ts", "--tok", "byte"])
    written = "".join(story + "\n<|endoftext|>\n" for story in stories)
    assert tokens(tmp_path, "train").astype(np.uint8).tobytes() == written.encode()


def test_fineweb(server, tmp_path, capsys, monkeypatch):
    def shard(n, magic=20240520, version=1, count=None):
        head = np.zeros(256, "<i4")
        head[:3] = magic, version, n if count is None else count
        return head.tobytes() + np.arange(n, dtype="<u2").tobytes()

    names = ["edu_fineweb_val_000000.bin", "edu_fineweb_train_000001.bin", "edu_fineweb_train_000002.bin"]
    server.files.update({f"/fw/{name}": shard(100 + i) for i, name in enumerate(names)})
    run = ["--url", server.url + "/fw"]
    script("fineweb").main(run)
    out = common.HERE / "fineweb/gpt2"
    assert meta(out) == {"name": "fineweb", "tok": "gpt2", "vocab_size": 50257, "dtype": "uint16",
                         "train_tokens": 101, "val_tokens": 100, "source": server.url + "/fw",
                         "files": {"train": names[1:2], "val": names[:1]}}
    assert (out / names[1]).read_bytes() == shard(101)  # as it came, with its header
    (out / names[1]).write_bytes(shard(101)[:-2])       # a damaged shard is fetched again, a good one kept
    server.log.clear()
    script("fineweb").main(run + ["--shards", "2"])
    assert [path for path, _ in server.log] == [f"/fw/{names[1]}", f"/fw/{names[2]}"]
    assert meta(out)["train_tokens"] == 203 and meta(out)["files"]["train"] == names[1:]
    for bad, words in ((shard(5, magic=20240801), "llm.c"), (shard(5, version=7), "llm.c"), (b"html", "llm.c"),
                       (shard(5, count=6), "1,034 bytes, but 1,036")):
        server.files[f"/fw/{names[1]}"] = bad
        fails(capsys, "fineweb", run + ["--out", tmp_path / "bad"], words)
        assert names[1] not in os.listdir(tmp_path / "bad")


def test_openwebtext(tmp_path, monkeypatch, tiny_gpt2, capsys):
    """nanoGPT's call of the datasets package, with a stand-in for it."""
    class Pages(list):
        def train_test_split(self, **how):
            assert how == dict(test_size=0.0005, seed=2357, shuffle=True)
            return {"train": Pages(self[1:]), "test": Pages(self[:1])}

        def iter(self, batch_size):
            return ({"text": self[i:i + 2]} for i in range(0, len(self), 2))

    def load_dataset(name, split):
        if name != "Skylion007/openwebtext" or split != "train":
            raise RuntimeError("no such set\nwith a long story")
        return Pages(["the first", "the \ud83dsecond", "third", "4"])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    script("openwebtext").main(["--out", str(tmp_path)])
    assert tokens(tmp_path, "val").tolist() == tiny_gpt2.encode_ordinary("the first") + [50256]
    expected = [i for text in ("the ?second", "third", "4") for i in [*tiny_gpt2.encode_ordinary(text), 50256]]
    assert tokens(tmp_path, "train").tolist() == expected
    fails(capsys, "openwebtext", ["--out", tmp_path, "--url", "other"], "could not load other: no such set")


def test_alpaca(server, tmp_path, monkeypatch, capsys):
    module = script("alpaca")
    rows = [{"instruction": f"Add {i} and 1.", "input": "", "output": str(i + 1)} for i in range(100)]
    rows += [{"instruction": "Add.", "input": "1\u20282", "output": "3 \ud83d"}]
    rows += [dict(row, output=f"another {i}") for i, row in enumerate(rows[:99])]
    server.files["/alpaca_data.json"] = json.dumps(rows).encode()
    monkeypatch.setattr(module, "DIGEST", sha(server.files["/alpaca_data.json"]))
    module.main(["--out", str(tmp_path), "--url", server.url + "/alpaca_data.json"])
    train, val = ([json.loads(line) for line in (tmp_path / f"{s}.jsonl").open()] for s in ("train", "val"))
    assert len(train) + len(val) == 200 and 1 <= len(val) <= 30
    assert {frozenset(r) for r in train + val} == {frozenset(module.FIELDS)}
    assert not {r["instruction"] for r in train} & {r["instruction"] for r in val}  # a repeated one: one split
    assert [r["output"] for r in train + val if "3" in r["output"] and r["input"]] == ["3 ?"]
    text = tokens(tmp_path, "train").astype(np.uint8).tobytes().decode().split("\n<|endoftext|>\n")
    assert len(text) == len(train) + 1 and text[-1] == ""
    i = next(i for i, r in enumerate(train) if not r["input"])
    assert text[i].startswith("Below is an instruction that describes a task. Write a response")
    assert text[i].endswith(f"### Instruction:\n{train[i]['instruction']}\n\n### Response:\n{train[i]['output']}")
    assert "### Input:\n1\u20282\n\n### Response:\n3 ?" in "".join(text)
    for bad, words in (("[1]", "item 0"), ('[{"instruction": "x"}]', "item 0"), ("{", "JSON"), ("[]", "0 usable")):
        (tmp_path / "own.json").write_text(bad)
        fails(capsys, "alpaca", ["--out", tmp_path / "own", "--url", tmp_path / "own.json"], words)


def test_sharegpt(tmp_path, capsys):
    chats = [{"conversations": [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": f"What is {i}?"},
                                {"from": "gpt", "value": f"A number\u2028{i}."}]} for i in range(60)]
    chats.append({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
                               {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]})
    unusable = [{"conversations": []}, {"conversations": [{"from": "human", "value": "no answer"}]}, 7, {"x": 1},
                {"conversations": [{"from": "human", "value": "q"}, {"from": "robot", "value": "a"}]},
                {"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "a"}]}]
    path, found = tmp_path / "chats", {}
    for form, text in (("list", json.dumps(chats + unusable)),
                       ("lines", "\n".join(json.dumps(c, ensure_ascii=False) for c in chats + unusable))):
        path.write_text(text, "utf-8")
        script("sharegpt").main(["--file", str(path), "--out", str(tmp_path / form)])
        assert "6 of 67 conversations left out" in capsys.readouterr().out
        found[form] = [[json.loads(line)["messages"] for line in (tmp_path / form / f"{s}.jsonl").open()]
                       for s in ("train", "val")]
    assert found["list"] == found["lines"]
    train, val = found["list"]
    assert len(train) + len(val) == 61 and 1 <= len(val) <= 10
    roles = [[turn["role"] for turn in m] for m in train + val]
    assert roles.count(["user", "assistant"]) == 60  # the greeting before the question is gone
    assert chats[-1]["messages"] in train + val
    text = "".join(tokens(tmp_path / "list", s).astype(np.uint8).tobytes().decode() for s in ("train", "val"))
    assert "Be brief.\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nc\n<|endoftext|>\n" in text
    path.write_text('{"a": 1}\n{oops\n')
    fails(capsys, "sharegpt", ["--file", path, "--out", tmp_path / "x"], "neither a JSON list nor JSON lines")
    assert not list((tmp_path / "x").iterdir())
