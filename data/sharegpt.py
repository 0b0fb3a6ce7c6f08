"""
Conversations in ShareGPT's form, from a file of yours (no copy of that set with a clear licence is known, so nothing is
downloaded): a JSON list or JSON lines of

    {"conversations": [{"from": "human" | "gpt" | "system", "value": "..."}, ...]}   or
    {"messages": [{"role": "user" | "assistant" | "system", "content": "..."}, ...]}

train.jsonl and val.jsonl hold {"messages": [...]} a line; train.bin and val.bin the same as text, each turn under
"### Instruction:" or "### Response:" as in Alpaca's format. About one conversation in twenty, chosen by a hash of its
first question, is val. Answers before the first question are dropped; conversations without an answer are left out.

    python data/sharegpt.py --file chats.json
"""
import sys
from pathlib import Path

import common

NAME, TOK = "sharegpt", "byte"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
         "bing": "assistant", "bard": "assistant", "system": "system"}
HEADS = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}


def messages(item):
    """[{"role", "content"}, ...] of one conversation, a question before the first answer; None if it is unusable."""
    turns = []
    try:
        for turn in item.get("conversations") or item.get("messages") or []:
            role = ROLES[(turn.get("from") or turn["role"]).lower()]
            content = common.clean(turn["value"] if "value" in turn else turn["content"]).strip()
            asked = any(t["role"] == "user" for t in turns)
            if content and (role != "assistant" or asked):
                turns.append({"role": role, "content": content})
    except (TypeError, KeyError, AttributeError):  # another form, an unknown speaker, a turn without text
        return None
    return turns if any(t["role"] == "assistant" for t in turns) else None


def main(argv=None):
    p = common.parser(__doc__, NAME, TOK)
    p.add_argument("--file", type=Path, help="the conversations, JSON or JSON lines")
    args = p.parse_args(argv)
    if not (args.file or args.url):
        raise common.DataError("--file is missing: a JSON or JSON-lines file of conversations (see --help)")
    if args.file and not args.file.is_file():
        raise common.DataError(f"--file {args.file}: no such file")
    out, cache = common.folders(NAME, args)
    path = args.file or common.locate(args, None, cache)
    found = [messages(item) for item in common.read_json(path)]
    rows = [{"messages": m} for m in found if m]
    if len(rows) < len(found):
        print(f"{path}: {len(found) - len(rows)} of {len(found)} conversations left out (unknown speaker or no answer)")
    common.write_dialogues(out, NAME, args.tok, rows,
                           key=lambda row: next(t["content"] for t in row["messages"] if t["role"] == "user"),
                           text=lambda row: "\n\n".join(HEADS[t["role"]] + t["content"] for t in row["messages"]),
                           source=str(args.file or args.url), sha256=common.checksum(path))


if __name__ == "__main__":
    sys.exit(common.run(main))
