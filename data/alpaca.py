"""
Alpaca: 52,002 instructions with answers by text-davinci-003 (CC BY-NC 4.0, for research). train.jsonl and val.jsonl
hold {"instruction", "input", "output"} a line; train.bin and val.bin the same as text, in Alpaca's prompt format. About
one instruction in twenty, chosen by a hash of it, is val: the same question is never in both.

    python data/alpaca.py                       bytes (the .jsonl files do not depend on --tok)
    python data/alpaca.py --url my.json         your own file in this form, as a JSON list or JSON lines
"""
import sys

import common

NAME, TOK = "alpaca", "byte"
URL = ("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/"
       "761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json")
DIGEST = "sha256:2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419"
FIELDS = ("instruction", "input", "output")


def prompt(row):
    """The prompt that the Alpaca models were trained on; the answer follows it."""
    task = ("Below is an instruction that describes a task, paired with an input that provides further context. "
            if row["input"] else "Below is an instruction that describes a task. ")
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return (f"{task}Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n")


def main(argv=None):
    args = common.parser(__doc__, NAME, TOK).parse_args(argv)
    out, cache = common.folders(NAME, args)
    path = common.locate(args, URL, cache, digest=DIGEST)
    rows = []
    for i, item in enumerate(common.read_json(path)):
        try:
            rows.append({k: common.clean(item.get(k, "") if k == "input" else item[k]) for k in FIELDS})
        except (TypeError, KeyError, AttributeError):
            raise common.DataError(f"{path}: item {i} lacks a text field instruction or output") from None
    common.write_dialogues(out, NAME, args.tok, rows, key=lambda row: row["instruction"] + "\n" + row["input"],
                           text=lambda row: prompt(row) + row["output"],
                           source=args.url or URL, sha256=common.checksum(path))


if __name__ == "__main__":
    sys.exit(common.run(main))
