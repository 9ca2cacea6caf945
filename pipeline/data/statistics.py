"""Report on prepared rows: counts, lengths, packing, steps, warnings, refusals, and previews of single rows."""

import math
from bisect import bisect_right
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import console
from common.errors import UserError
from contract.ollama_template import find_modelfile_fault
from pipeline.config.schema import Clean, Config, Finetune
from pipeline.data.drop_reasons import BROKEN_REASONS, DROP_REASONS
from pipeline.run.records import DataFacts, DataRecord, Packing, RowCounts, TokenCounts
from pipeline.run.training_rows import IGNORED_LABEL, decode_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipeline.data.chat_template import ChatFormat
    from pipeline.data.process_rows import Tally
    from pipeline.data.row_store import RowSpool
    from pipeline.data.system_prompt import SystemPrompt

ROUND_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 1 << 62)  # of a bin, in tokens
BAR_PARTS = " ▏▎▍▌▋▊▉█"


def refuse_broken_rows(tally: "Tally", clean: Clean, rejected: Path) -> None:
    """Raise UserError when more rows are broken than clean.max_rejected allows."""
    broken = {reason: count for reason, count in tally.dropped.items() if reason in BROKEN_REASONS}
    count = sum(broken.values())
    if count > clean.max_rejected * tally.rows or count == tally.rows:
        lines = [_describe_broken_rows(tally, *item) for item in Counter(broken).most_common()]
        raise UserError(
            f"{count} of {tally.rows} rows cannot be used:\n" + "\n".join(lines),
            f"correct them (each is listed in {rejected}), or allow more with clean.max_rejected, a share of the rows",
            code="data.too_many_broken_rows",
        )


def _describe_broken_rows(tally: "Tally", reason: str, count: int) -> str:
    """Return where the rows are that are broken for one reason, and what is wrong with the first of them."""
    places, first = list_places(tally.places[reason], count), tally.examples[reason].partition(": ")[2]
    return f"  {count} {reason} ({BROKEN_REASONS[reason]}): {places}; the first: {first}"


def list_places(places: list[str], count: int) -> str:
    """Return places of rows as text, each file's name once, such as `rows.jsonl:3, 7-12`."""
    by_file: dict[str, list[int]] = {}
    for place in places:
        name, _, line = place.rpartition(":")
        by_file.setdefault(name, []).append(int(line))
    text = "; ".join(f"{name}:{', '.join(format_line_runs(lines))}" for name, lines in by_file.items())
    return text + (f" and {count - len(places)} more" if count > len(places) else "")


def format_line_runs(lines: list[int]) -> list[str]:
    """Return line numbers with runs joined: [3, 7, 8, 9] as 3 and 7-9."""
    runs: list[list[int]] = []
    for line in lines:
        if runs and line == runs[-1][1] + 1:
            runs[-1][1] = line
        else:
            runs.append([line, line])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]


def describe_system_prompt(system: "SystemPrompt", chat: "ChatFormat") -> list[str]:
    """Return sentences about the default system prompt that a user should know."""
    sentences = [system.note] if system.note else []
    if system.default and not chat.supports_system:
        sentences.append("the chat template drops system prompts, so the default one has no effect")
    if system.default and (reason := find_modelfile_fault(system.default)):
        sentences.append(
            f"Ollama's Modelfile {reason}: the default system prompt needs a chat template "
            "that a TEMPLATE can hold (docs/templates.md)"
        )
    return sentences


def refuse_empty_sets(spool: "RowSpool", config: Config) -> None:
    """Raise UserError when no training row or no held-out row is left."""
    train_count, heldout_count = int((spool.kept & ~spool.held).sum()), int((spool.kept & spool.held).sum())
    if not train_count or not heldout_count:
        question_count = len(np.unique(spool.questions))
        raise UserError(
            f"{train_count} training and {heldout_count} held-out rows are left of {spool.tally.rows} "
            f"({question_count} different questions; dropped: {_format_counts(spool.tally.dropped) or 'none'})",
            "add rows, raise data.validation_share (a question is never on both sides), or set data.validation",
            code="data.empty_set",
        )


def compute_facts(spool: "RowSpool", config: Config) -> DataFacts:
    """Return the numbers of the rows."""
    is_training = spool.kept & ~spool.held
    lengths = np.sort(spool.lengths[is_training])
    total_tokens, loss_tokens = int(lengths.sum()), int(spool.learned[is_training].sum())
    limit, pack_count = config.base.max_seq_length, count_packs(lengths, config.base.max_seq_length)
    return DataFacts(
        rows=RowCounts(
            read=spool.tally.rows,
            train=len(lengths),
            heldout=int((spool.kept & spool.held).sum()),
            dropped=sum(spool.tally.dropped.values()),
        ),
        dropped=dict(spool.tally.dropped.most_common()),
        changed=dict(spool.tally.changed.most_common()),
        findings=dict(spool.tally.findings.most_common()),
        unused=dict(spool.tally.unused.most_common()),
        truncated=dict(spool.tally.truncated),
        tokens=TokenCounts(
            train=total_tokens,
            loss=loss_tokens,
            p50=_length_quantile(lengths, 0.5),
            p95=_length_quantile(lengths, 0.95),
            max=int(lengths[-1]),
        ),
        packing=Packing(
            packs=pack_count,
            full=round(total_tokens / (pack_count * limit), 4),
            unpacked_full=round(total_tokens / (len(lengths) * limit), 4),
        ),
        steps=count_steps(config.finetune, len(lengths)),
        max_seq_length=limit,
        histogram=build_histogram(lengths),
    )


def _length_quantile(lengths: np.ndarray, share: float) -> int:
    """Return the length that `share` of the rows do not exceed; `lengths` are sorted."""
    return int(lengths[min(len(lengths) - 1, math.ceil(share * len(lengths)) - 1)])


def count_packs(lengths: np.ndarray, limit: int) -> int:
    """Return how many sequences of at most `limit` tokens the rows fill, packed longest first, best fit."""
    rows_left = Counter(lengths.tolist())
    lengths_left, pack_count = sorted(rows_left), 0
    while lengths_left:
        free_tokens = limit
        pack_count += 1
        while position := bisect_right(lengths_left, free_tokens):
            longest = lengths_left[position - 1]
            count = min(rows_left[longest], free_tokens // longest)
            free_tokens -= count * longest
            rows_left[longest] -= count
            if not rows_left[longest]:
                del lengths_left[position - 1]
    return pack_count


def count_steps(tune: Finetune, row_count: int) -> int | None:
    """Return the number of optimizer steps; None where the global batch size depends on the GPU."""
    if tune.max_steps or tune.train_batch_size == "auto":
        return tune.max_steps
    return math.ceil(math.ceil(tune.num_train_epochs * row_count) / tune.train_batch_size)


def build_histogram(lengths: np.ndarray) -> list[list[int]]:
    """Return [from, to, rows] of up to 12 bins of a round width in tokens; `lengths` are sorted."""
    width = next(width for width in ROUND_WIDTHS if width >= math.ceil(int(lengths[-1]) / 12))
    bins = list(enumerate(np.bincount(lengths // width)))[lengths[0] // width :]
    return [[index * width, (index + 1) * width - 1, int(count)] for index, count in bins]


def list_data_warnings(facts: DataFacts, config: Config, chat: "ChatFormat") -> list[str]:
    """Return warnings, with numbers, that a user should know before paying for a training."""
    rows, truncated, warnings = facts.rows, facts.truncated, []
    if truncated:
        cut_share = truncated["tokens"] / (truncated["tokens"] + facts.tokens.train)
        warnings.append(
            f"{truncated['rows']} rows ({truncated['rows'] / rows.read:.1%}; {cut_share:.1%} of the tokens) "
            f"are cut at {facts.max_seq_length} tokens and lose their end token"
        )
    if chat.end_tokens[0] != chat.eos:
        warnings.append(
            f"answers end with {chat.end_tokens[0]}, the tokenizer's end token is {chat.eos or 'none'}: "
            "runtimes must stop at the first"
        )
    if chat.scaffolds[0].strip():
        warnings.append(f"the model learns to write {chat.scaffolds[0]!r} before each answer, as the template does")
    if chat.is_joined and config.data.labels == "all":
        warnings.append(
            "only the last answer of a row is trained: "
            "the chat template renders earlier turns differently than their prompts"
        )
    if facts.findings:
        warnings.append(
            f"found in rows: {_format_counts(facts.findings)}; "
            "to remove them, set clean.secrets and clean.personal to mask or drop"
        )
    if facts.unused:
        warnings.append(f"fields that are not trained on: {_format_counts(facts.unused)}")
    too_long = facts.dropped.get("too_long", 0)
    if too_long:
        warnings.append(
            f"{too_long} rows ({too_long / rows.read:.1%}) are longer than {facts.max_seq_length} tokens "
            "and were dropped: raise base.max_seq_length, or set clean.too_long to truncate"
        )
    return warnings


def _format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items() if count)


def format_record(record: DataRecord) -> str:
    """Return the numbers of a record as lines for a terminal."""
    rows, tokens = record.rows, record.tokens
    width = max(map(len, [*record.dropped, ""]))
    lines = [("format", text) for text in record.formats]
    lines.append(("read", f"{rows.read:,} rows"))
    lines += [
        ("dropped" if not index else "", f"{count:,} {name:{width}}  {DROP_REASONS[name]}")
        for index, (name, count) in enumerate(record.dropped.items())
    ]
    lines += [("changed", f"rows, by what was changed: {_format_counts(record.changed)}")] if record.changed else []
    lines.append(("kept", f"{rows.train:,} to train on, {rows.heldout:,} held out"))
    quantiles = f"a row: p50 {tokens.p50}, p95 {tokens.p95}, longest {tokens.max}"
    lines.append(("tokens", f"{tokens.train:,}, {tokens.loss / tokens.train:.0%} carry loss; {quantiles}"))
    lines.append(("packing", _describe_packing(record.packing, record.max_seq_length)))
    auto_note = "depend on the GPU (finetune.train_batch_size: auto)"
    lines.append(("steps", f"{record.steps:,} optimizer steps" if record.steps else auto_note))
    return "\n".join([*(_format_line(*line) for line in lines), *format_histogram(record.histogram)])


def _describe_packing(packing: Packing, limit: int) -> str:
    sequences = f"{packing.packs:,} sequences of {limit} tokens, {packing.full:.1%} full"
    return f"{sequences}; {packing.unpacked_full:.1%} full one row each"


def _format_line(name: str, text: str) -> str:
    """Return a name and a text as a line, wrapped where it has more than 80 columns."""
    line = f"  {name:8} {text}"
    return console.wrap_text(line, 11) if len(text) > 69 else line


def format_histogram(histogram: list[list[int]]) -> list[str]:
    """Return a histogram of the rows' tokens as bars of text."""
    max_count = max(count for _, _, count in histogram)
    bars = [f"  {f'{first}-{last}':>11} {_draw_bar(count / max_count)} {count:,}" for first, last, count in histogram]
    return ["  tokens a row:", *bars]


def _draw_bar(share: float) -> str:
    """Return a bar of 40 blocks for a share of 1, drawn in eighths of a block."""
    eighths = math.ceil(share * 40 * 8)
    return "█" * (eighths // 8) + BAR_PARTS[eighths % 8].strip()


def format_preview(rows: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return rows as text, in which the tokens that carry loss are green and between »«."""
    return "\n".join(_format_row(row, number, tokenizer) for number, row in enumerate(rows, 1))


def _format_row(row: dict[str, Any], number: int, tokenizer: "PreTrainedTokenizerFast") -> str:
    learned = sum(label != IGNORED_LABEL for label in row["labels"])
    heading = f"--- row {number}: {len(row['input_ids'])} tokens, {learned} carry loss (»green«)"
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    text = ""
    for is_learned, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED_LABEL):
        piece = decode_tokens(tokenizer, [token for token, _ in group])
        text += console.style(f"»{piece}«", "green") if is_learned else piece
    return heading + "\n" + text.rstrip("\n")
