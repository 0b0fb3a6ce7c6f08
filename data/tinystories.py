"""
TinyStories, version 2 (arXiv:2305.07759): 2.7 million short stories that GPT-4 wrote in the words of a small child,
2.2 GB (CDLA-Sharing-1.0). The published train and valid files; <|endoftext|> after each story.

    python data/tinystories.py                  GPT-2 tokens
    python data/tinystories.py --tok byte

--url takes the address (or the folder) that holds the two files.
"""
import sys

import common

NAME, TOK = "tinystories", "gpt2"
URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
FILES = {
    "train": ("TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
              "sha256:6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
    "val": ("TinyStoriesV2-GPT4-valid.txt", 22_502_601,
            "sha256:6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
}


def main(argv=None):
    args = common.parser(__doc__, NAME, TOK).parse_args(argv)
    out, cache = common.folders(NAME, args)
    if args.tok == "gpt2":
        common.gpt2_encoding()  # fails before 2 GB are downloaded
    paths = {s: common.locate(args, URL, cache, size, digest, file) for s, (file, size, digest) in FILES.items()}
    common.write_bins(out, NAME, args.tok, {s: lambda p=p: common.stories(p) for s, p in paths.items()}, documents=True,
                      source=args.url or URL)


if __name__ == "__main__":
    sys.exit(common.run(main))
