"""
OpenWebText: 8 million pages that Reddit linked to, an open copy of GPT-2's WebText (CC0 for the collection; the pages
are their owners'). nanoGPT's split and order: 9,035,582,198 + 4,434,897 GPT-2 tokens, 17 GB; about 54 GB more in the
cache of the `datasets` package, which does the downloading.

    pip install datasets && python data/openwebtext.py

--url takes another data set of the hub, or a folder, with a column `text`.
"""
import sys

import common

NAME, TOK = "openwebtext", "gpt2"
URL = "Skylion007/openwebtext"


def main(argv=None):
    args = common.parser(__doc__, NAME, TOK).parse_args(argv)
    out, _ = common.folders(NAME, args)
    try:
        import datasets
    except ImportError:
        raise common.DataError("openwebtext needs the package datasets: pip install datasets") from None
    if args.tok == "gpt2":
        common.gpt2_encoding()  # fails before 54 GB are downloaded
    source = args.url or URL
    try:
        pages = datasets.load_dataset(source, split="train")
        split = pages.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    except Exception as e:  # the package has no common class for its errors
        raise common.DataError(f"datasets could not load {source}: {(str(e) or repr(e)).splitlines()[0]}") from None

    def texts(pages):
        for batch in pages.iter(batch_size=1000):
            yield from (common.clean(text).encode() for text in batch["text"])

    splits = {"train": lambda: texts(split["train"]), "val": lambda: texts(split["test"])}
    common.write_bins(out, NAME, args.tok, splits, documents=True, source=source)


if __name__ == "__main__":
    sys.exit(common.run(main))
