"""
enwik8: the first 100,000,000 bytes of an English Wikipedia dump of 2006 (CC BY-SA and GFDL), the old benchmark of byte
models: 90 MB train, 5 MB val, 5 MB test.bin. Bits per byte = loss / ln 2.

    python data/enwik8.py                       bytes
    python data/enwik8.py --tok gpt2
"""
import sys

import common

NAME, TOK = "enwik8", "byte"
URL = "https://mattmahoney.net/dc/enwik8.zip"
SIZE, DIGEST = 36_445_475, "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
TEXT_SIZE, TEXT_DIGEST = 100_000_000, "sha256:2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"


def main(argv=None):
    args = common.parser(__doc__, NAME, TOK).parse_args(argv)
    out, cache = common.folders(NAME, args)
    archive = common.locate(args, URL, cache, SIZE, DIGEST)
    path = common.unzip(archive, "enwik8", cache / "enwik8.txt", TEXT_SIZE, TEXT_DIGEST)
    a, b = TEXT_SIZE * 90 // 100, TEXT_SIZE * 95 // 100
    common.write_bins(out, NAME, args.tok, {"train": lambda: common.pieces(path, 0, a),
                                            "val": lambda: common.pieces(path, a, b),
                                            "test": lambda: common.pieces(path, b)},
                      source=args.url or URL, sha256=TEXT_DIGEST.removeprefix("sha256:"))


if __name__ == "__main__":
    sys.exit(common.run(main))
