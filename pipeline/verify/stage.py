"""verify: prove that every file is what was trained. Nothing is published before its gates pass.

    parity       transformers, llama.cpp's own server and Ollama's TEMPLATE give the same prompt and token ids, with one
                 BOS and the trained end token
    conversion   the logits of the 16-bit GGUF in llama.cpp are those of the merged weights in Transformers, within a
                 bound
    quant        the default quantization costs at most so much; else the next larger one is made and is the default

The first two stop the run and write the evidence to verify/evidence.json.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from common import files, llama_runtime
from common.errors import UserError
from contract import chat_format, manifest
from contract.ollama_template import Turns
from pipeline.base_model.tokenizer import load_fast_tokenizer
from pipeline.config.schema import Config
from pipeline.run.records import DataRecord, EvaluateRecord, ExportRecord, Scores, VerifyRecord
from pipeline.run.run_folder import Run
from pipeline.scoring import quality_ladder
from pipeline.scoring.heldout_scores import describe_interval, prompt_ids, select_heldout_rows
from pipeline.toolchain import llama_tools, unsloth_loader
from pipeline.verify import prompt_parity, served_answers
from pipeline.verify.gate_error import write_gate_error
from pipeline.verify.golden_prompts import build_golden_prompts
from pipeline.verify.score_ladder import LadderScorer
from pipeline.verify.smoke_prompts import build_smoke_prompts

# A quantization that fails is followed by the next larger one.
QUANTIZATION_STEPS = ("q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0")


def run_verify(
    config: Config, data: DataRecord, evaluate: EvaluateRecord, export: ExportRecord, run: Run
) -> VerifyRecord:
    """Write verify/contract.json (chat format, golden and smoke prompts), verify/ladder.md and the record.

    Raises:
        UserError: A gate does not pass.
    """
    unsloth_loader.silence_libraries()
    folder = run.prepare_stage_folder("verify", "export")
    files.remove(folder / "evidence.json")  # left by an attempt that failed
    rows, rows_used = select_heldout_rows(data.output_path("heldout"), config.evaluate)
    trained = load_trained_format(data, run, rows)
    gguf_paths = {name: export.output_path(name) for name in export.outputs if name != "imatrix"}
    turns, reasons, adds_bos = verify_prompts(gguf_paths, trained, folder)
    scorer = LadderScorer(config, run.folder / "export" / "merged", rows, folder)
    score_files(scorer, gguf_paths, export.sixteen, trained)
    default, larger_ggufs = choose_default(config, export, scorer)
    refuse_low_score(config, scorer.scores, default)
    default_file = gguf_paths.get(default) or larger_ggufs[default]
    as_served = served_answers.score_as_served(config, data, rows, default_file, scorer.scores[default])
    chat = describe_chat_format(data, trained, adds_bos)
    chat |= {"turns": turns and turns.model_dump(), "embedded": reasons}
    contract_path, ladder_path = folder / "contract.json", folder / "ladder.md"
    write_contract(contract_path, chat, trained.golden, build_smoke_prompts(default_file, data, config))
    ladder_path.write_text(quality_ladder.format_as_markdown(evaluate.scores | scorer.scores) + "\n", encoding="utf-8")
    return run.write_record(
        VerifyRecord,
        ("data", "evaluate", "export"),
        {"contract": contract_path, "ladder": ladder_path, **larger_ggufs},
        scores=scorer.scores,
        default=default,
        as_served=as_served,
        used=rows_used,
        conversion=scorer.conversion,
        compared=scorer.reference.position_count,
        notes=scorer.notes,
        sixteen=export.sixteen,
        template="derived" if turns and not reasons else "embedded",
        reasons=reasons,
    )


def score_files(
    scorer: LadderScorer, gguf_paths: dict[str, Path], sixteen: str, trained: prompt_parity.TrainedFormat
) -> None:
    """Score the 16-bit GGUF of the name `sixteen`, the merged weights and the quantizations."""
    scorer.score_reference(gguf_paths[sixteen], sixteen, trained)
    for name, path in gguf_paths.items():
        if name != sixteen:
            scorer.score_gguf(name, path)


def write_contract(path: Path, chat: dict, golden: Sequence[dict], smoke: list[dict]) -> None:
    """Write the parts of the manifest that are known here. Raise UserError when a manifest cannot hold them."""
    parts = {"chat": chat, "golden": list(golden), "smoke": smoke}
    manifest.refuse_invalid_parts(parts)
    files.write_json(path, parts)


def load_trained_format(data: DataRecord, run: Run, rows: list[dict]) -> prompt_parity.TrainedFormat:
    """Load the tokenizer of a run and return the prompt format as it was trained."""
    tokenizer = load_fast_tokenizer(run.folder / "data" / "tokenizer")
    # llama.cpp does not normalize Unicode as some tokenizers do (Qwen): such a text has other ids there
    heldout_prompts = [
        (row["prompt"], prompt_ids(row)) for row in rows if unicodedata.is_normalized("NFC", row["prompt"])
    ]
    golden = build_golden_prompts(tokenizer, data.default_system)
    return prompt_parity.TrainedFormat(tokenizer, golden, data.chat.end, heldout_prompts)


def verify_prompts(
    paths: dict[str, Path], trained: prompt_parity.TrainedFormat, folder: Path
) -> tuple[Turns | None, list[str], bool]:
    """Run the parity gate on every file, then on Ollama's TEMPLATE.

    Returns:
        The Turns of the TEMPLATE or None, the reasons for what they leave out, and whether runtimes add a BOS.

    Raises:
        UserError: A file or the TEMPLATE does not give the trained prompts.
    """
    for name, path in paths.items():
        adds_bos = verify_file_prompts(name, path, trained, folder)
    turns, reasons = prompt_parity.derive_ollama_turns(trained, adds_bos)
    try:
        if turns:
            prompt_parity.verify_ollama_template(turns, trained, adds_bos)
    except prompt_parity.ParityError as error:
        raise write_gate_error("parity", str(error), folder, error.evidence, error.code) from error
    return turns, reasons, adds_bos


def verify_file_prompts(name: str, path: Path, trained: prompt_parity.TrainedFormat, folder: Path) -> bool:
    """Run the parity gate on a file, and return whether runtimes add a BOS to its prompts."""
    model = llama_runtime.load_model(path, vocab_only=True)
    try:
        prompt_parity.verify_gguf(path, model, trained)
        return prompt_parity.has_automatic_bos(model)
    except prompt_parity.ParityError as error:
        reason = f"the {name} GGUF differs from what was trained: {error}"
        raise write_gate_error("parity", reason, folder, error.evidence, error.code) from error
    finally:
        model.close()


def choose_default(config: Config, export: ExportRecord, scorer: LadderScorer) -> tuple[str, dict[str, Path]]:
    """Run the quant gate: return the name of the default file, and the larger quantizations that had to be made for it.

    Args:
        config: The config of the run.
        export: Names the default quantization and the 16-bit GGUF.
        scorer: Has the scores so far, and scores what is made here.
    """
    larger_ggufs: dict[str, Path] = {}
    name, base_gguf = export.default, export.output_path(export.sixteen)
    while fault := find_quantization_fault(config, scorer.scores[name], scorer.scores[export.sixteen]):
        larger = next_larger_quantization(name) or export.sixteen
        scorer.notes.append(f"{name} {fault}: {larger} is the default instead")
        name = larger
        if name not in scorer.scores:
            imatrix = export.output_path("imatrix") if "imatrix" in export.outputs else None
            larger_ggufs[name] = llama_tools.quantize_once(base_gguf, name, imatrix, scorer.folder)
            scorer.score_gguf(name, larger_ggufs[name])
    return name, larger_ggufs


def next_larger_quantization(name: str) -> str | None:
    """Return the quantization that follows one that fails; None after the largest."""
    bits = llama_tools.BITS_PER_WEIGHT
    return next((larger for larger in QUANTIZATION_STEPS if bits[larger] > bits[name]), None)


def find_quantization_fault(config: Config, scores: Scores, sixteen_bit_scores: Scores) -> str | None:
    """Return why a quantization may not be the default; None when it may."""
    extra_loss = scores.loss - sixteen_bit_scores.loss
    if not extra_loss <= config.verify.max_extra_loss:
        return f"costs {extra_loss:.3f} nats a token (verify.max_extra_loss {config.verify.max_extra_loss:g})"
    score_drop = (sixteen_bit_scores.score or 0) - (scores.score or 0)
    if score_drop <= max_score_drop(config, scores) + 1e-9:
        return None
    change = f"{describe_interval(sixteen_bit_scores)} before, {describe_interval(scores)} now"
    allowed = f"verify.max_score_drop {config.verify.max_score_drop:g}, or one answer"
    return f"costs {100 * score_drop:.1f} points of its score: {change} ({allowed})"


def max_score_drop(config: Config, scores: Scores) -> float:
    """Return the part of the score that may be lost: verify.max_score_drop, or one answer if that is more."""
    return max(config.verify.max_score_drop, 1 / scores.rows)


def refuse_low_score(config: Config, scores: dict[str, Scores], default: str) -> None:
    """Raise UserError when the default file scores below verify.min_score."""
    minimum, score = config.verify.min_score, scores[default].score or 0.0
    if minimum is not None and score < minimum:
        raise UserError(
            f"{default} answers {score:.0%} of the held-out rows correctly, verify.min_score is {minimum:.0%}",
            "train longer or on more rows (a new RUN=name), or lower verify.min_score",
            code="verify.low_score",
        )


def describe_chat_format(data: DataRecord, trained: prompt_parity.TrainedFormat, adds_bos: bool) -> dict:
    """Return the fields of the manifest's ChatFormat, as trained, except `turns` and `embedded`."""
    tokenizer = trained.tokenizer
    bos = tokenizer.bos_token
    return {
        "template": tokenizer.chat_template,
        "sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "stop": list(dict.fromkeys([tokenizer.eos_token, *trained.end_tokens])),
        "bos": bos,
        "bos_in_template": bool(bos) and trained.golden[0]["prompt"].startswith(bos),
        "adds_bos": adds_bos,
        "system": data.default_system,
        "input": chat_format.ALPACA_INPUT if data.has_input else None,
    }
