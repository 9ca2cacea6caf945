"""Report on prepared rows: counts, lengths, packing, steps, warnings, refusals, and previews of single rows."""

import math
from bisect import bisect_right
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import console
from common.errors import UserError
from contract.ollama_template import unsayable
from pipeline.config.schema import Clean, Config, Finetune
from pipeline.data.drop_reasons import BROKEN, REASONS
from pipeline.run.training_rows import IGNORED

if TYPE_CHECKING:
    from pipeline.data.chat_template import Chat
    from pipeline.data.process_rows import Tally
    from pipeline.data.row_store import Spool
    from pipeline.data.system_prompt import SystemPrompt

BARS = " ▏▎▍▌▋▊▉█"


def refuse_broken(tally: "Tally", clean: Clean, rejected: Path) -> None:
    """Raise UserError when more rows are broken than clean.max_rejected allows."""
    broken = {reason: count for reason, count in tally.dropped.items() if reason in BROKEN}
    count = sum(broken.values())
    if count > clean.max_rejected * tally.rows or count == tally.rows:
        lines = [
            f"  {number} {reason} ({BROKEN[reason]}): {list_places(tally.places[reason], number)}; "
            f"the first: {tally.examples[reason].partition(': ')[2]}"
            for reason, number in Counter(broken).most_common()
        ]
        raise UserError(
            f"{count} of {tally.rows} rows cannot be used:\n" + "\n".join(lines),
            f"correct them (each is listed in {rejected}), or allow more with clean.max_rejected, a share of the rows",
        )


def list_places(places: list[str], count: int) -> str:
    """Return places of rows as text, each file's name once, such as `rows.jsonl:3, 7-12`."""
    by_file: dict[str, list[int]] = {}
    for place in places:
        name, _, line = place.rpartition(":")
        by_file.setdefault(name, []).append(int(line))
    text = "; ".join(f"{name}:{', '.join(runs_of(lines))}" for name, lines in by_file.items())
    return text + (f" and {count - len(places)} more" if count > len(places) else "")


def runs_of(lines: list[int]) -> list[str]:
    """Return line numbers with runs joined: [3, 7, 8, 9] as 3 and 7-9."""
    runs: list[list[int]] = []
    for line in lines:
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]


def describe_system(system: "SystemPrompt", chat: "Chat") -> list[str]:
    """Return sentences about the default system prompt that a user should know."""
    said = [system.note] if system.note else []
    if system.default and not chat.system:
        said.append("the chat template drops system prompts, so the default one has no effect")
    if system.default and (why := unsayable(system.default)):
        said.append(
            f"Ollama's Modelfile {why}: the default system prompt needs a chat template "
            "that a TEMPLATE can hold (docs/templates.md)"
        )
    return said


def refuse_empty(rows: "Spool", config: Config) -> None:
    """Raise UserError when no training row or no held-out row is left."""
    train, held = int((rows.kept & ~rows.held).sum()), int((rows.kept & rows.held).sum())
    if not train or not held:
        questions = len(np.unique(rows.questions))
        raise UserError(
            f"{train} training and {held} held-out rows are left of {rows.tally.rows} "
            f"({questions} different questions; dropped: {_counts(rows.tally.dropped) or 'none'})",
            "more rows, a larger data.validation_share (a question never stands on both sides), or data.validation",
        )


def facts(rows: "Spool", config: Config) -> dict:
    """Return the numbers that the record holds."""
    train = rows.kept & ~rows.held
    lengths = np.sort(rows.lengths[train])
    total, learned = int(lengths.sum()), int(rows.learned[train].sum())
    limit, packs = config.base.max_seq_length, packed(lengths, config.base.max_seq_length)
    return {
        "rows": {
            "read": rows.tally.rows,
            "train": len(lengths),
            "heldout": int((rows.kept & rows.held).sum()),
            "dropped": sum(rows.tally.dropped.values()),
        },
        "dropped": dict(rows.tally.dropped.most_common()),
        "changed": dict(rows.tally.changed.most_common()),
        "findings": dict(rows.tally.findings.most_common()),
        "unused": dict(rows.tally.unused.most_common()),
        "truncated": dict(rows.tally.truncated),
        "tokens": {
            "train": total,
            "loss": learned,
            "p50": int(_at(lengths, 0.5)),
            "p95": int(_at(lengths, 0.95)),
            "max": int(lengths[-1]),
        },
        "packing": {
            "packs": packs,
            "full": round(total / (packs * limit), 4),
            "unpacked_full": round(total / (len(lengths) * limit), 4),
        },
        "steps": steps(config.finetune, len(lengths)),
        "max_seq_length": limit,
        "histogram": histogram(lengths),
    }


def _at(lengths: np.ndarray, share: float) -> int:
    """Return the length that `share` of the rows do not exceed; `lengths` are sorted."""
    return lengths[min(len(lengths) - 1, math.ceil(share * len(lengths)) - 1)]


def packed(lengths: np.ndarray, limit: int) -> int:
    """Return how many sequences of at most `limit` tokens the rows fill, packed longest first, best fit."""
    left = Counter(lengths.tolist())
    there, packs = sorted(left), 0
    while there:
        room = limit
        packs += 1
        while at := bisect_right(there, room):
            longest = there[at - 1]
            count = min(left[longest], room // longest)
            room -= count * longest
            left[longest] -= count
            if not left[longest]:
                del there[at - 1]
    return packs


def steps(tune: Finetune, rows: int) -> int | None:
    """Return the number of optimizer steps; None where the global batch size depends on the GPU."""
    if tune.max_steps or tune.train_batch_size == "auto":
        return tune.max_steps
    return math.ceil(math.ceil(tune.num_train_epochs * rows) / tune.train_batch_size)


def histogram(lengths: np.ndarray) -> list[list[int]]:
    """Return [from, to, rows] of up to 12 bins of a round width in tokens; `lengths` are sorted."""
    width = max(1, math.ceil(int(lengths[-1]) / 12))
    width = next(w for w in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 1 << 62) if w >= width)
    bins = enumerate(np.bincount(lengths // width))
    return [[i * width, (i + 1) * width - 1, int(count)] for i, count in bins if i >= lengths[0] // width]


def cautions(facts: dict, config: Config, chat: "Chat") -> list[str]:
    """Return warnings, with numbers, that a user should know before paying for a training."""
    rows, cut, said = facts["rows"], facts["truncated"], []
    if cut:
        tokens = cut["tokens"] / (cut["tokens"] + facts["tokens"]["train"])
        said.append(
            f"{cut['rows']} rows ({cut['rows'] / rows['read']:.1%}; {tokens:.1%} of the tokens) "
            f"are cut at {facts['max_seq_length']} tokens and lose their end token"
        )
    if chat.ends[0] != chat.eos:
        said.append(
            f"answers end with {chat.ends[0]}, the tokenizer's end token is {chat.eos or 'none'}: "
            "runtimes must stop at the first"
        )
    if chat.scaffolds[0].strip():
        said.append(f"the model learns to write {chat.scaffolds[0]!r} before each answer: the template has it there")
    if chat.joined and config.data.labels == "all":
        said.append(
            "only the last answer of a row is trained: this template writes earlier turns otherwise than it serves them"
        )
    if facts["findings"]:
        said.append(
            f"found in rows: {_counts(facts['findings'])}; "
            "clean.secrets and clean.personal: mask or drop takes them out"
        )
    if facts["unused"]:
        said.append(f"not trained on: {_counts(facts['unused'])}; the rows are used without them")
    too_long = facts["dropped"].get("too_long", 0)
    if too_long:
        said.append(
            f"{too_long} rows ({too_long / rows['read']:.1%}) are longer than {facts['max_seq_length']} tokens "
            "and were dropped: raise base.max_seq_length, or set clean.too_long to truncate"
        )
    return said


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items() if count)


def table(record: dict) -> str:
    """Return the numbers of a record as lines for a terminal."""
    rows, tokens, packing, limit = record["rows"], record["tokens"], record["packing"], record["max_seq_length"]
    width = max(map(len, [*record["dropped"], ""]))
    lines = [("format", text) for text in record["formats"]]
    lines.append(("read", f"{rows['read']:,} rows"))
    lines += [
        ("dropped" if not i else "", f"{count:,} {name:{width}}  {REASONS[name]}")
        for i, (name, count) in enumerate(record["dropped"].items())
    ]
    lines += [("changed", f"rows, by what was changed: {_counts(record['changed'])}")] if record["changed"] else []
    lines.append(("kept", f"{rows['train']:,} to train on, {rows['heldout']:,} held out"))
    lines.append(
        (
            "tokens",
            (
                f"{tokens['train']:,}, {tokens['loss'] / tokens['train']:.0%} carry loss; "
                f"a row: p50 {tokens['p50']}, p95 {tokens['p95']}, longest {tokens['max']}"
            ),
        )
    )
    lines.append(
        (
            "packing",
            (
                f"{packing['packs']:,} sequences of {limit} tokens, {packing['full']:.1%} full; "
                f"{packing['unpacked_full']:.1%} full one row each"
            ),
        )
    )
    lines.append(
        (
            "steps",
            f"{record['steps']:,} optimizer steps"
            if record["steps"]
            else "as the card allows (finetune.train_batch_size: auto)",
        )
    )
    wrapped = [
        console.wrap(f"  {name:8} {text}", 11) if len(text) > 69 else f"  {name:8} {text}" for name, text in lines
    ]
    return "\n".join([*wrapped, *bars(record["histogram"])])


def bars(histogram: list[list[int]]) -> list[str]:
    """Return a histogram of the rows' tokens as bars of text."""
    most = max(count for _, _, count in histogram)
    lines = []
    for first, last, count in histogram:
        eighths = math.ceil(count / most * 40 * 8)
        bar = "█" * (eighths // 8) + BARS[eighths % 8].strip()
        lines.append(f"  {f'{first}-{last}':>11} {bar} {count:,}")
    return ["  tokens a row:", *lines]


def preview(rows: list[dict], tokenizer) -> str:
    """Return rows as text, in which the tokens that carry loss are green and between »«."""

    def shown(row: dict, number: int) -> str:
        pieces = []
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        for learned, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
            text = tokenizer.decode([token for token, _ in group])
            pieces.append(console.style(f"»{text}«", "green") if learned else text)
        learned = sum(label != IGNORED for label in row["labels"])
        return f"--- row {number}: {len(row['input_ids'])} tokens, {learned} carry loss (»green«)\n" + "".join(
            pieces
        ).rstrip("\n")

    return "\n".join(shown(row, i) for i, row in enumerate(rows, 1))
