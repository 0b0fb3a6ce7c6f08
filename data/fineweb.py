"""
FineWeb in GPT-2 tokens, as llm.c's shards of 100 million tokens (200 MB) each: filtered web pages (ODC-By 1.0). `edu`
is the educational subset, 1,001 shards; `10B` is a sample of all of it, 103 shards. Shard 0 is val. <|endoftext|>
stands before each page.

    python data/fineweb.py --shards 10          edu: 1 billion tokens, 2 GB, into data/fineweb/gpt2/
    python data/fineweb.py --set 10B            into data/fineweb10B/gpt2/

Shards that are there are kept, so a larger --shards adds to them. --url takes the address that holds them.
"""
import struct
import sys

import common

NAME, TOK = "fineweb", "gpt2"
HUB = "https://huggingface.co/datasets/{}/resolve/main"
SETS = {  # id on the hub, first part of the file names, train shards
    "edu": ("karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb", 1001),
    "10B": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
}


def read_header(path):
    """(tokens, None or what is wrong) of a shard: 256 int32 = magic, version, number of tokens, 0 ...; then uint16."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        magic, version, n = struct.unpack("<3i", f.read(12).ljust(12, b"\0"))
    if (magic, version) != (20240520, 1):
        return 0, "not a shard of GPT-2 tokens in llm.c's format (magic 20240520, version 1)"
    return n, None if size == 1024 + 2 * n else f"{size:,} bytes, but {1024 + 2 * n:,} by its header"


def main(argv=None):
    p = common.parser(__doc__, NAME, TOK, toks=("gpt2",))
    p.add_argument("--set", default="edu", choices=SETS)
    p.add_argument("--shards", type=int, default=1, help="how many train shards (default 1)")
    args = p.parse_args(argv)
    repo, stem, most = SETS[args.set]
    if not 1 <= args.shards <= most:
        raise common.DataError(f"--shards {args.shards}: {args.set} has 1 to {most}")
    out, _ = common.folders(NAME if args.set == "edu" else "fineweb10B", args)
    if args.url and "://" not in args.url:
        raise common.DataError(f"--url {args.url}: not an address; shards on this disk are read with --data FOLDER")
    train = [f"{stem}_train_{i:06d}.bin" for i in range(1, args.shards + 1)]
    files = {"train": train, "val": [f"{stem}_val_000000.bin"]}
    counts = {"train": 0, "val": 0}
    for split, names in files.items():
        for name in names:
            path = out / name
            if path.exists() and (wrong := read_header(path)[1]):
                print(f"{path}: {wrong}: downloading it again", file=sys.stderr)
                path.unlink()
            common.locate(args, HUB.format(repo), out, file=name)
            tokens, wrong = read_header(path)
            if wrong:
                path.unlink()
                raise common.DataError(f"{name}, as downloaded: {wrong}; it was not kept")
            counts[split] += tokens
    common.write_meta(out, NAME, TOK, common.EOT + 1, counts, files, "uint16", source=args.url or HUB.format(repo))


if __name__ == "__main__":
    sys.exit(common.run(main))
