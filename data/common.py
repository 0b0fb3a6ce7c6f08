"""
What the data scripts share: a download that resumes and is checked, atomic files, and token files from text.

    download(url, path, size, digest)         path holds exactly what was asked for, or DataError
    write_bins(out, name, tok, splits, ...)   train.bin, val.bin and meta.json, in constant memory
    run(main)                                 every failure is one line on stderr and exit code 2

`requests` and `tiktoken` are imported where they are needed, torch never.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

HERE = Path(__file__).resolve().parent  # finished sets lie in HERE/<name>/<tok>/
EOT = 50256                             # GPT-2's <|endoftext|>
EOT_TEXT = b"<|endoftext|>"
CHUNK = 1 << 20                         # bytes read or encoded at a time
TIMEOUT = (10, 60)                      # seconds to connect, seconds without a byte
RETRIES, WAIT = 5, 1.0                  # tries in a row that brought nothing; seconds before the first of them


class DataError(Exception):
    """A failure that the user can act on; its text is one line."""


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(f"{message} (--help lists the flags)")


def parser(doc, name, tok=None, toks=("char", "byte", "gpt2")):
    """The flags of every data script. tok: the default tokenizer; None for a set without text (no --tok)."""
    p = Parser(prog=f"python data/{name}.py", description=doc, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    if tok:
        p.add_argument("--tok", default=tok, choices=toks, help=f"what a token is (default {tok})")
    p.add_argument("--out", type=Path, help="folder for all that is written (default: <set>/<tok>/ beside the script)")
    p.add_argument("--url", help="a mirror's address (checksums still hold), or a local path, taken as it is")
    return p


def folders(name, args):
    """Makes and tries the folders: (where the set goes, where its download is kept)."""
    tok = getattr(args, "tok", None)
    out = args.out or (HERE / name / tok if tok else HERE / name)
    cache = args.out or HERE / name
    try:
        out.mkdir(parents=True, exist_ok=True)
        for folder in {out, cache}:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise DataError(f"cannot write to {out}: {e.strerror}; --out FOLDER writes elsewhere") from None
    return out, cache


def run(main, argv=None):
    """main(argv), with failures as one line; returns the exit code."""
    try:
        main(argv)
        return 0
    except KeyboardInterrupt:
        line, code = "stopped; the same command goes on from here", 130
    except DataError as e:
        line, code = e, 2
    except OSError as e:  # no space left, no permission ...
        line, code = f"{e.strerror or e}" + (f": {e.filename}" if e.filename else ""), 2
    progress()
    print(f"data/{Path(main.__code__.co_filename).name}: {line}", file=sys.stderr)
    return code


def progress(text="", last=[0.0]):  # the list outlives the call: two lines a second at most, on a terminal only
    if sys.stderr.isatty() and (not text or time.monotonic() - last[0] > 0.5):
        last[0] = time.monotonic()
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic(path, mode="wb"):
    """A file that appears under its name only when it is whole and on the disk."""
    for old in path.parent.glob(path.name + ".tmp*"):  # left by a kill; a fresh one may be another process at work
        with contextlib.suppress(FileNotFoundError):  # which may have just renamed it
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
    tmp = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(tmp, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def checksum(path, algorithm="sha256"):
    h = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as f:
        while block := f.read(CHUNK):
            h.update(block)
    return h.hexdigest()


def verify(path, size=None, digest=None):
    """None, or what is wrong with the file. digest: "sha256:<hex>" (or md5, sha1)."""
    if size is not None and path.stat().st_size != size:
        return f"{path.stat().st_size:,} bytes instead of {size:,}"
    algorithm, _, want = (digest or "").partition(":")
    if want and (got := checksum(path, algorithm)) != want:
        return f"{algorithm} {got} instead of {want}"


def unzip(archive, member, path, size=None, digest=None):
    """One member of a zip file as `path`; a good earlier copy is kept."""
    if path.exists() and verify(path, size, digest) is None:
        return path
    try:
        with zipfile.ZipFile(archive) as z, atomic(path) as f:
            with z.open(member) as source:
                while block := source.read(CHUNK):
                    f.write(block)
            f.flush()
            if wrong := verify(Path(f.name), size, digest):
                raise DataError(f"{archive}: {member} has {wrong}")
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as e:  # RuntimeError: encrypted
        raise DataError(f"{archive}: not the expected zip file ({e})") from None
    return path


# ---------------------------------------------------------------- download


def locate(args, url, cache, size=None, digest=None, file=None):
    """
    The source file of a set: the local path in --url as it is, else downloaded into `cache`. For a set of several
    files, `file` is the name of one and the address is the folder that holds them.
    """
    url = (args.url or url) + (f"/{file}" if file else "")
    if "://" not in url:
        if not Path(url).is_file():
            raise DataError(f"--url {args.url}: no such file" + (f" as {url}" if file else ""))
        return Path(url)
    return download(url, cache / (unquote(urlsplit(url).path).rsplit("/", 1)[-1] or "download"), size, digest)


def download(url, path, size=None, digest=None):
    """
    `url` as the file `path`. What arrives is kept in `<path>.part` and asked for from there on (Range) after a cut or
    a kill; it gets its name only when size and digest agree. A file already there is used if they agree, else replaced.
    """
    part = path.with_name(path.name + ".part")
    if path.exists():
        if not (wrong := verify(path, size, digest)):
            return path
        print(f"{path} has {wrong}: downloading it again", file=sys.stderr)
        path.unlink()
        part.unlink(missing_ok=True)
    resumed = part.exists()
    total, linked = transfer(url, part)
    wrong = verify(part, total if size is None else size, digest or linked)
    if wrong and resumed:  # the old .part was of something else: once more, from the start
        part.unlink()
        total, linked = transfer(url, part)
        wrong = verify(part, total if size is None else size, digest or linked)
    if wrong:
        part.unlink()
        raise DataError(f"{url}: {wrong}; nothing was kept")
    os.replace(part, path)
    return path


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def transfer(url, part):
    """Fills `part` to its end; returns (total size or None, digest or None) as the server states them."""
    try:
        import requests
    except ImportError:
        raise DataError("downloading needs requests: pip install requests") from None
    best, failures = None, 0
    while True:
        had, why = size_of(part), "the connection was cut"
        try:
            total, digest = ask_for_rest(requests, url, part)
            if total is None or size_of(part) >= total:
                return total, digest
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as e:
            if best is None and size_of(part) == had:  # not a byte came: it is not worth trying again
                raise DataError(f"cannot reach {urlsplit(url).netloc} ({reason(e)}): is there a network?") from None
            if isinstance(e, requests.Timeout):
                why = "no answer in time"
        except requests.RequestException as e:  # a malformed address, too many redirects ...
            raise DataError(f"{url}: {reason(e)}") from None
        if best is None or size_of(part) > best:
            best, failures = size_of(part), 0
        else:  # nothing new; a server without Range starts anew each time
            failures += 1
        if failures == RETRIES:
            raise DataError(f"{url}: {why} at {size_of(part):,} bytes, {RETRIES} times; the same command tries again")
        time.sleep(WAIT * failures)


def ask_for_rest(requests, url, part):
    """One request for what `part` lacks, written behind it; returns (total size or None, digest or None)."""
    have = size_of(part)
    headers = {"Accept-Encoding": "identity"}  # as stored: a Range of a gzipped stream would mean other bytes
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as r:
        given = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", r.headers.get("Content-Range", ""))
        start, total = given.groups() if given else (None, None)
        if r.status_code == 416 and have:  # there is nothing behind what we have
            if total == str(have):
                return have, linked_digest(r)
            part.unlink()                  # it was no part of this file
            return ask_for_rest(requests, url, part)
        if r.status_code not in (200, 206):
            raise DataError(f"{url}: HTTP {r.status_code} {r.reason}")
        if r.status_code == 206 and start != str(have):
            raise DataError(f"{url}: asked for the bytes from {have} on, the server sent others; remove {part}")
        if r.status_code == 200:           # from the start: nothing was there, or the server ignores Range
            have, total = 0, r.headers.get("Content-Length")
        total = int(total) if total and total != "*" else None
        with open(part, "ab" if have else "wb") as f:
            for block in r.iter_content(1 << 14):  # a cut loses the block it falls in: small ones
                f.write(block)
                progress(f"{part.stem}: {f.tell() / 1e6:,.1f} MB" + (f" of {total / 1e6:,.1f}" if total else ""))
            f.flush()
            os.fsync(f.fileno())
        return total, linked_digest(r)


def reason(e):
    """The innermost cause of a network error, without the address that urllib3 puts before it."""
    while isinstance(inner := getattr(e, "reason", None) or (e.args[0] if e.args else None), Exception):
        e = inner
    return re.sub(r"^\w+\(host=.*?\): ", "", str(e) or type(e).__name__).splitlines()[0]


def linked_digest(r):
    """The Hugging Face hub states the sha256 of a large file in this header of its redirect."""
    for reply in [*r.history, r]:
        if re.fullmatch(r'"?[0-9a-f]{64}"?', tag := reply.headers.get("X-Linked-Etag", "")):
            return "sha256:" + tag.strip('"')


# ---------------------------------------------------------------- text


def pieces(path, start=0, stop=None):
    """
    The bytes start..stop of a file, a piece of about CHUNK at a time. A cut is put before a space or newline that
    follows a visible character: no GPT-2 token spans such a place, so the ids are those of the whole text, and no
    utf-8 character is split.
    """
    with open(path, "rb") as f:
        f.seek(start)
        left = (path.stat().st_size if stop is None else stop) - start
        rest = b""
        while left > 0 and (block := f.read(min(CHUNK, left))):
            left -= len(block)
            rest += block
            if cut := re.match(rb"(?s).*[!-~](?=[ \n])", rest):  # greedy: the last such place
                yield rest[:cut.end()]
                rest = rest[cut.end():]
        if rest:
            yield rest


def stories(path, separator=EOT_TEXT):
    """The documents of a file with a separator between them, stripped, empty ones left out."""
    with open(path, "rb") as f:
        rest = b""
        while block := f.read(CHUNK):
            *whole, rest = (rest + block).split(separator)
            yield from filter(None, (text.strip() for text in whole))
        if text := rest.strip():
            yield text


def held_out(key):
    """True for about one key in twenty, the same ones everywhere: what belongs to val."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 20 == 0


def gpt2_encoding():
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2")
    except ImportError:
        raise DataError("--tok gpt2 needs tiktoken: pip install tiktoken (or use --tok byte)") from None
    except (OSError, ValueError) as e:  # requests' errors are OSErrors; ValueError: a table with a wrong checksum
        raise DataError(f"--tok gpt2 needs tiktoken's GPT-2 table, which is neither cached here nor reachable "
                        f"({reason(e)}): use --tok byte") from None


def encode(texts, tok, chars="", documents=False):
    """The token ids of an iterable of utf-8 pieces, as arrays; `documents` ends each piece with <|endoftext|>."""
    if tok == "gpt2":
        encoding, batch, size = gpt2_encoding(), [], 0
        end = [EOT] if documents else []

        def ids():
            return np.array([i for row in encoding.encode_ordinary_batch(batch) for i in row + end], np.uint16)

        for text in texts:
            batch.append(text.decode("utf-8", "replace"))
            size += len(text)
            if size >= 8 * CHUNK:  # enough for tiktoken's threads
                yield ids()
                batch, size = [], 0
        yield ids()
    elif tok == "byte":
        for text in texts:
            yield np.frombuffer(text, np.uint8).astype(np.uint16)
    else:
        code = np.frombuffer(chars.encode("utf-32-le"), np.uint32)
        table = np.zeros(code.max(initial=0) + 1, np.uint32)  # code point -> id
        table[code] = np.arange(len(code))
        for text in texts:
            yield table[np.frombuffer(text.decode("utf-8", "replace").encode("utf-32-le"), np.uint32)]


def write_bins(out, name, tok, splits, documents=False, **meta):
    """
    <split>.bin for each of `splits` (name -> function that returns an iterable of utf-8 pieces; called twice for
    char), then meta.json with `meta` added. While meta.json is there, the files belong together and are complete.
    """
    def texts(split):  # byte and char have no id for the end of a document: it is written out
        if documents and tok != "gpt2":
            return (text + b"\n" + EOT_TEXT + b"\n" for text in splits[split]())
        return splits[split]()

    found = set()
    if tok == "char":
        for split in splits:
            for text in texts(split):
                found.update(text.decode("utf-8", "replace"))
    chars = "".join(sorted(found))
    vocab_size = {"gpt2": EOT + 1, "byte": 256, "char": len(chars)}[tok]
    dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
    counts = {}
    with contextlib.ExitStack() as stack:  # all files are written before the first gets its name
        for split in splits:
            f = stack.enter_context(atomic(out / f"{split}.bin"))
            for ids in encode(texts(split), tok, chars, documents):
                f.write(ids.astype(dtype).tobytes())
                progress(f"{name}: {split}.bin, {f.tell() // dtype.itemsize:,} tokens")
            counts[split] = f.tell() // dtype.itemsize
            if not counts[split]:
                raise DataError(f"{name}: the source has no text for {split}.bin")
        (out / "meta.json").unlink(missing_ok=True)
    write_meta(out, name, tok, vocab_size, counts, {s: [f"{s}.bin"] for s in splits}, dtype.name,
               **({"chars": chars} if tok == "char" else {}), **meta)


def write_meta(out, name, tok, vocab_size, counts, files, dtype, **meta):
    with atomic(out / "meta.json", "w") as f:
        json.dump({"name": name, "tok": tok, "vocab_size": vocab_size, "dtype": dtype, "files": files,
                   **{f"{s}_tokens": n for s, n in counts.items()}, **meta}, f, indent=1)
        f.write("\n")
    progress()
    print(f"{out}: " + ", ".join(f"{s} {n:,} tokens" for s, n in counts.items()) + f", vocabulary {vocab_size:,}")


# ---------------------------------------------------------------- pictures


def write_pictures(out, name, splits, names, flip, **meta):
    """<split>.npz: images uint8 (N, h, w, c), labels (N,), captions (N,); then meta.json. flip: mirrored is as good."""
    (out / "meta.json").unlink(missing_ok=True)
    for split, arrays in splits.items():
        with atomic(out / f"{split}.npz") as f:
            np.savez(f, **arrays)
    counts = {s: len(arrays["images"]) for s, arrays in splits.items()}
    with atomic(out / "meta.json", "w") as f:
        json.dump({"name": name, "names": list(names), "flip": flip, **counts, **meta}, f, indent=1)
        f.write("\n")
    progress()
    print(f"{out}: " + ", ".join(f"{s} {n:,} pictures" for s, n in counts.items()) + f", {len(names)} classes")


# ---------------------------------------------------------------- dialogues


def read_json(path):
    """The items of a JSON list or of a JSON-lines file."""
    try:
        text = path.read_text("utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as e:  # also a file that is not utf-8
        raise DataError(f"{path}: neither a JSON list nor JSON lines ({e})") from None


def clean(text):
    """Half a surrogate pair, which JSON can hold and utf-8 cannot, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def write_dialogues(out, name, tok, rows, key, text, **meta):
    """train.jsonl and val.jsonl of `rows`, and their text as token files. key(row): what decides the split."""
    val = [row for row in rows if held_out(key(row))]
    train = [row for row in rows if not held_out(key(row))]
    if len(rows) < 2:
        raise DataError(f"{name}: {len(rows)} usable items; it takes two, one of them for val")
    if not val or not train:  # very few items: the last one is val
        train, val = rows[:-1], rows[-1:]
    splits = {"train": train, "val": val}
    (out / "meta.json").unlink(missing_ok=True)
    for split, part in splits.items():
        with atomic(out / f"{split}.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in part)
    write_bins(out, name, tok, {s: lambda p=p: (text(row).encode() for row in p)
                                for s, p in splits.items()}, documents=True, **meta)
