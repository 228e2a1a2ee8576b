"""Rows of a data file, checked: JSONL in, plain dicts out. Every mistake is reported by file and line.

    {"messages": [turns]}                          a conversation; the last turn is the answer
    {"messages": ..., "text": ..., "code": ...}    and views of its own: these are encoded, messages is trained on
    {"prompt": ..., "completion": ...}             a question and its answer, as strings or turns (the format of TRL)
    {"text": ..., "code": ...}                     the same
    {"text": ...}                                  plain text, for --train_on all
    {..., "group": 7}                              paraphrases: the Code of each row is the next row of its group

A turn is {"role": "system" | "user" | "assistant", "content": "..."}. `data.py` makes examples of what comes out here.
"""

import json
import sys
from pathlib import Path

from support.cli import UserError

VIEWS = {"text": "user", "code": "assistant"}  # who says a view that is given as a string
PAIR = {"prompt": "user", "completion": "assistant"}
BOM = b"\xef\xbb\xbf"  # some editors begin a UTF-8 file with it


def read(path):
    """One dict {"messages", "where", "text", "code"} per row, one at a time: a file may be larger than the memory. The
    views are None where a row has none of its own. UserError: file, line and what is wrong."""
    path, empty = Path(path), True
    try:
        with open(path, "rb") as file:
            lines = ((f"{path}:{number}", line) for number, line in enumerate(file, 1))
            found = (check(line, where) for where, line in lines if line.removeprefix(BOM).strip())
            for row in paraphrased(found):
                empty = False
                yield row
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror}; give a JSONL file with one conversation a line") from None
    if empty:
        raise UserError(f"{path}: the file has no rows")


def paraphrased(found):
    """The same rows. In each group the Code of every row is the next one's last turn, of the last row the first's."""
    held, groups = [], {}  # held: all rows from the first on that has a group
    for row in found:
        group = row.pop("group")
        if group is None and not held:
            yield row
            continue
        held.append(row)
        if group is not None:
            groups.setdefault(group, []).append(row)
    for group, members in groups.items():
        if len(members) < 2:
            where = members[0]["where"]
            raise UserError(f"{where}: no other row has the group {group!r}; a paraphrase needs a partner")
        for member, partner in zip(members, members[1:] + members[:1], strict=True):
            member["code"] = partner["messages"][-1:]
    yield from held


def check(line, where):
    """One line of a file as a dict."""
    try:
        row = json.loads(line.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as failure:
        raise UserError(f"{where}: not UTF-8 (byte {failure.start} of the line); save the file as UTF-8") from None
    except (ValueError, RecursionError) as failure:
        raise UserError(f"{where}: not JSON ({failure}); each line must be one JSON object") from None
    if isinstance(row, dict):  # null, or pandas' NaN, is a missing column
        row = {name: value for name, value in row.items() if value is not None and value == value}
    known = isinstance(row, dict) and (isinstance(row.get("messages"), list) or isinstance(row.get("text"), str)
                                       or PAIR.keys() <= row.keys() or VIEWS.keys() <= row.keys())
    if not known:
        raise UserError(f'{where}: needs {{"messages": [...]}}, a list of turns with "role" and "content", or '
                        '{"prompt": ..., "completion": ...}')
    text, code = (turns(row[name], role, where) if name in row else None for name, role in VIEWS.items())
    group = row.get("group")
    if group is not None and not isinstance(group, (str, int, float)):
        raise UserError(f"{where}: a group must be a string or a number")
    if group is not None and code is not None:
        raise UserError(f"{where}: has a group and a code; the Code of a paraphrase is the next row of its group")
    if "messages" in row:
        messages = turns(row["messages"], None, where)
    elif PAIR.keys() <= row.keys():
        messages = [turn for name, role in PAIR.items() for turn in turns(row[name], role, where)]
    elif code is None:
        return {"messages": text, "where": where, "text": None, "code": None, "group": group}
    else:
        messages, text, code = text + code, None, None
    if (text is None) != (code is None):
        raise UserError(f'{where}: has one of "text" and "code"; give both views, or neither')
    check_roles([message["role"] for message in messages], where, group)
    return {"messages": messages, "where": where, "text": text, "code": code, "group": group}


def check_roles(roles, where, group):
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    pairs = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != (pairs + ["user"] if group is not None else pairs):
        some = f"{roles[:6]}" + (f" and {len(roles) - 6} more" if roles[6:] else "")
        more = ", and for a group the user last" if group is not None else ""
        raise UserError(f"{where}: roles are {some}; wanted: system (optional), then user, assistant in turn{more}")


def turns(value, role, where):
    """Turns of a conversation (role None) or a view; the last user's and the last assistant's must not be empty."""
    messages = [{"role": role, "content": value}] if role and isinstance(value, str) else value
    if not isinstance(messages, list) or not messages and role:
        raise UserError(f'{where}: a view must be a string or a list of turns with "role" and "content"')
    messages = [turn(message, where) for message in messages]
    for message in messages[-2:]:
        system = message["role"] == "system" and not (role and message is messages[-1])  # a view is encoded at its end
        if not system and not message["content"].strip():
            raise UserError(f"{where}: the {message['role']}'s last turn is empty; nothing can be learnt from it")
    return messages


def turn(message, where):
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise UserError(f'{where}: a turn must be {{"role": system, user or assistant, "content": "..."}}')
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: a lone surrogate (half of a \\ud83d\\ude00) is not text; mend the row") from None
    return {"role": role, "content": content}


def fitting(conversations, make, needs, limit, too_long):
    """(conversation, example) of each row that needs at most `limit` tokens. Others are refused, or with "skip" left
    out and reported; None: refused without a word of that flag. make: conversation -> example. needs: its tokens."""
    kept, skipped = 0, []
    for conversation in conversations:
        try:
            made = make(conversation)
        except UserError as mistake:
            if str(mistake).startswith(conversation.where):
                raise
            raise UserError(f"{conversation.where}: {mistake}") from None
        if needs(made) <= limit:
            kept += 1
            yield conversation, made
        elif too_long == "skip":
            skipped.append(conversation.where)
        else:
            raise UserError(f"{conversation.where}: needs {needs(made)} tokens, the model has room for {limit}; take a "
                            f"model with more room{', or leave such rows out with --too_long skip' * bool(too_long)}")
    if skipped:
        some = ", ".join(skipped[:5]) + (", ..." if skipped[5:] else "")
        print(f"skipped {len(skipped)} rows longer than {limit} tokens: {some}", file=sys.stderr)
    if not kept:
        raise UserError(f"{skipped[0]}: neither this row nor any other fits into {limit} tokens")
