"""
tiny Shakespeare: 1.1 MB of the plays, the usual first text (public domain). nanoGPT's split: the first 90% of the
characters train.

    python data/shakespeare.py                  char level: 1,003,854 + 111,540 tokens, vocabulary 65
    python data/shakespeare.py --tok gpt2       301,966 + 36,059 tokens
"""
import sys

import common

NAME, TOK = "shakespeare", "char"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE, DIGEST = 1_115_394, "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main(argv=None):
    args = common.parser(__doc__, NAME, TOK).parse_args(argv)
    out, cache = common.folders(NAME, args)
    path = common.locate(args, URL, cache, SIZE, DIGEST)
    text = path.read_bytes().decode("utf-8", "replace")
    cut = int(0.9 * len(text))
    splits = {"train": lambda: [text[:cut].encode()], "val": lambda: [text[cut:].encode()]}
    common.write_bins(out, NAME, args.tok, splits, source=args.url or URL, sha256=common.checksum(path))


if __name__ == "__main__":
    sys.exit(common.run(main))
