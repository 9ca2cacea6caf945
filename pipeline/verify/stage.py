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
from pathlib import Path
from typing import TYPE_CHECKING

from common import files, llama_runtime
from common.errors import UserError
from contract import chat_format, limits, manifest
from pipeline.config.schema import Config, Generation
from pipeline.run.run_folder import Run
from pipeline.scoring import quality_ladder
from pipeline.scoring.backends import Gguf, Reading, Torch, finish
from pipeline.scoring.heldout_scores import describe_interval, held_out, prompt_ids
from pipeline.toolchain import llama_tools, unsloth_loader
from pipeline.toolchain.finite_numbers import refuse_broken_losses
from pipeline.verify import prompt_parity, served_answers
from pipeline.verify.golden_prompts import golden

if TYPE_CHECKING:
    from llama_cpp import Llama

# A quantization that fails is followed by the next larger one.
LARGER = ("q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0")
COMPARED_ROWS = 8  # held-out rows of which the conversion gate compares every position, besides the golden prompts


def stage(config: Config, run: Run) -> dict:
    """Write verify/contract.json (chat format, golden and smoke prompts), verify/ladder.md and the record.

    Raises:
        UserError: A gate does not pass.
    """
    unsloth_loader.hush()
    folder = run.workspace("verify", "export")
    files.remove(folder / "evidence.json")  # left by an attempt that failed
    rows, used = held_out(run.output("data", "heldout"), config.evaluate)
    trained, files_ = as_trained(run, rows), {name: run.output("export", name) for name in ggufs(run)}
    sixteen = run.read("export")["sixteen"]
    turns, reasons, adds = prompts(files_, trained, folder)
    climb = Ladder(config, run, rows, folder)
    climb.start(files_[sixteen], sixteen, trained)
    for name, path in files_.items():
        if name != sixteen:
            climb.step(name, path)
    default, extra = choose(config, run, climb, run.read("export")["default"], sixteen)
    refuse_score(config, climb.scores, default)
    default_file, data = files_.get(default) or extra[default], run.read("data")
    as_served = served_answers.score(config, data, rows, default_file, climb.scores[default])
    smoke = smoke_prompts(default_file, data, config)
    contract, page = folder / "contract.json", folder / "ladder.md"
    chat_format = described(config, run, trained, adds) | {"turns": turns and turns.model_dump(), "embedded": reasons}
    parts = {"chat": chat_format, "golden": list(trained.golden), "smoke": smoke}
    manifest.refuse_invalid(parts)
    files.write_json(contract, parts)
    page.write_text(quality_ladder.table(climb.all_scores()) + "\n", encoding="utf-8")
    return run.write(
        "verify",
        ("data", "evaluate", "export"),
        {"contract": contract, "ladder": page, **extra},
        scores=climb.scores,
        default=default,
        as_served=as_served,
        used=used,
        conversion=climb.conversion,
        compared=climb.reference.positions,
        notes=climb.notes,
        sixteen=sixteen,
        template="derived" if turns and not reasons else "embedded",
        reasons=reasons,
    )


def ggufs(run: Run) -> list[str]:
    """Return the names of the exported GGUFs, such as f16 and q4_k_m."""
    return [name for name in run.read("export")["outputs"] if name != "imatrix"]


def as_trained(run: Run, rows: list[dict]) -> prompt_parity.Trained:
    """Load the tokenizer of a run and return the prompt format as it was trained."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.folder / "data" / "tokenizer")
    # llama.cpp does not normalize Unicode as some tokenizers do (Qwen): such a text has other ids there
    held = [(row["prompt"], prompt_ids(row)) for row in rows if unicodedata.is_normalized("NFC", row["prompt"])]
    return prompt_parity.Trained(
        tokenizer, golden(tokenizer, run.read("data")["default_system"]), run.read("data")["chat"]["end"], held
    )


def prompts(paths: dict[str, Path], trained: prompt_parity.Trained, folder: Path):
    """Run the parity gate on every file, then on Ollama's TEMPLATE.

    Returns:
        The Turns of the TEMPLATE or None, the reasons for what they leave out, and whether runtimes add a BOS.

    Raises:
        UserError: A file or the TEMPLATE does not give the trained prompts.
    """
    for name, path in paths.items():
        model = llama_runtime.load(path, vocab_only=True)
        adds = prompt_parity.adds_bos(model)
        try:
            prompt_parity.gguf(path, model, trained)
        except prompt_parity.Different as error:
            raise stopped(
                "parity", f"the {name} GGUF is not what was trained: {error}", folder, error.evidence
            ) from error
        finally:
            model.close()
    turns, reasons = prompt_parity.ollama(trained, adds)
    try:
        if turns:
            prompt_parity.template(turns, trained, adds)
    except prompt_parity.Different as error:
        raise stopped("parity", str(error), folder, error.evidence) from error
    return turns, reasons, adds


def stopped(gate: str, why: str, folder: Path, evidence: dict) -> UserError:
    """Write the evidence of a failed gate to folder/evidence.json and return the error, which names that file."""
    path = folder / "evidence.json"
    files.write_json(path, {"gate": gate, **evidence})
    return UserError(why, f"do not use this file; read {path} and report it with the run's records")


class Ladder:
    """Scores the files of the quality ladder one by one; the log-probabilities to compare with stay on disk."""

    def __init__(self, config: Config, run: Run, rows: list[dict], folder: Path):
        """Prepare the ladder: `rows` are the held-out rows, `folder` is verify/ of the run."""
        self.config, self.run, self.rows, self.folder = config, run, rows, folder
        self.scores: dict[str, dict] = {}
        self.notes: list[str] = []

    def start(self, path: Path, name: str, trained: prompt_parity.Trained) -> None:
        """Score the 16-bit GGUF, with which all others are compared, then the merged weights; run the conversion gate.

        Raises:
            UserError: The conversion gate does not pass.
        """
        side = self.open(path)
        texts = [item["ids"] for item in trained.golden] + [row["input_ids"] for row in self.rows[:COMPARED_ROWS]]
        converted = quality_ladder.Conversion(self.folder, texts, side)
        most = self.config.verify.max_positions
        self.reference = quality_ladder.Reference(self.folder, self.rows, side.model.n_vocab(), most)
        readings = self.reference.fill(side, name)
        sixteen = self.measured(name, side, readings, {"kl": 0.0, "top1": 1.0}, path)
        side.model.close()
        merged = self.merged(trained)
        self.conversion = converted.compare(merged)
        self.refuse_conversion(name)
        self.scores = {
            "merged": self.measured("merged", merged, *self.reference.compare(merged, "merged")),
            name: sixteen,
        }
        merged.close()

    def refuse_conversion(self, name: str) -> None:
        """Raise UserError when the 16-bit GGUF is too far from the merged weights."""
        found, bound = self.conversion, self.config.verify.max_conversion_kl
        if not found["kl"] <= bound:
            raise stopped(
                "conversion",
                f"the {name} GGUF does not compute what the merged weights compute: "
                f"mean KL {found['kl']:.3g} nats, at most {bound:g}",
                self.folder,
                {"bound": bound, **found},
            )

    def merged(self, trained: prompt_parity.Trained) -> Torch:
        """Load the merged weights in Transformers.

        On a GPU they keep their own type, and the part that does not fit is placed in main memory. On a CPU they are
        float32.
        """
        import torch
        from transformers import AutoModelForCausalLM

        cuda = torch.cuda.is_available()
        where = {"dtype": "auto", "device_map": "auto"} if cuda else {"dtype": torch.float32}
        folder = self.run.folder / "export" / "merged"
        # eager, because torch's fused attention leaves out Gemma 2's soft cap
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **where).eval()
        return Torch(model, trained.tokenizer, self.config.evaluate.max_new_tokens, list(trained.ends))

    def open(self, path: Path) -> Gguf:
        """Load a GGUF with the context that will be served: some models compute differently in a longer one.

        One of them is Phi 3, because of its LongRoPE.
        """
        served = self.config.generation.num_ctx or self.config.base.max_seq_length
        longest = max(len(row["input_ids"]) for row in self.rows) + 64
        return Gguf(path, max(served, longest), self.config.evaluate.max_new_tokens)

    def step(self, name: str, path: Path) -> None:
        """Score a quantized GGUF and compare it with the 16-bit one."""
        side = self.open(path)
        self.scores[name] = self.measured(name, side, *self.reference.compare(side, name), path)
        side.model.close()

    def measured(
        self, name: str, side: Torch | Gguf, readings: list[Reading], near: dict, path: Path | None = None
    ) -> dict:
        """Return the scores of a backend from its row scores.

        Args:
            name: The name in the quality ladder.
            backend: The loaded model.
            row_scores: Its row scores.
            distance: {kl, top1}, its difference from the 16-bit GGUF.
            path: Its file, whose size belongs to the scores; None for the merged weights.
        """
        found, _ = finish(side, self.rows, readings, self.config.evaluate, name)
        size = {"megabytes": round(path.stat().st_size / 1e6, 1)} if path else {}
        return found | near | size

    def all_scores(self) -> dict[str, dict]:
        """Return the scores of `evaluate` and of this stage: the whole ladder."""
        return self.run.read("evaluate")["scores"] | self.scores


def choose(config: Config, run: Run, climb: Ladder, wanted: str, sixteen: str) -> tuple[str, dict[str, Path]]:
    """Run the quant gate: return the name of the default file, and the larger quantizations that had to be made for it.

    Args:
        config: The config of the run.
        run: The run.
        scorer: Has the scores so far, and scores what is made here.
        default: The quantization that `export` made the default.
        sixteen_bit_name: The name of the 16-bit GGUF, such as f16.
    """
    made: dict[str, Path] = {}
    name, base = wanted, run.output("export", sixteen)
    while why := too_coarse(config, climb.scores[name], climb.scores[sixteen]):
        larger = next((q for q in LARGER if llama_tools.BITS[q] > llama_tools.BITS[name]), sixteen)
        climb.notes.append(f"{name} {why}: {larger} is the default instead")
        name = larger
        if name not in climb.scores:
            matrix = run.output("export", "imatrix") if config.export.imatrix else None
            made[name] = llama_tools.quantized(base, name, matrix, climb.folder)
            climb.step(name, made[name])
    return name, made


def too_coarse(config: Config, scores: dict, sixteen: dict) -> str | None:
    """Return why a quantization may not be the default; None when it may."""
    extra = scores["loss"] - sixteen["loss"]
    if not extra <= config.verify.max_extra_loss:
        return f"costs {extra:.3f} nats a token (verify.max_extra_loss {config.verify.max_extra_loss:g})"
    drop = sixteen.get("score", 0) - scores.get("score", 0)
    if drop > allowed_drop(config, scores) + 1e-9:
        return (
            f"costs {100 * drop:.1f} points of its score: "
            f"{describe_interval(sixteen)} before, {describe_interval(scores)} now "
            f"(verify.max_score_drop {config.verify.max_score_drop:g}, or one answer)"
        )
    return None


def allowed_drop(config: Config, scores: dict) -> float:
    """Return the part of the score that may be lost: verify.max_score_drop, or one answer if that is more."""
    return max(config.verify.max_score_drop, 1 / scores["rows"])


def refuse_score(config: Config, scores: dict, default: str) -> None:
    """Raise UserError when the default file scores below verify.min_score."""
    wanted = config.verify.min_score
    if wanted is not None and scores[default]["score"] < wanted:
        raise UserError(
            f"{default} answers {scores[default]['score']:.0%} of the held-out rows, verify.min_score is {wanted:.0%}",
            "train longer or on more rows (a new RUN=name), or lower verify.min_score",
        )


def described(config: Config, run: Run, trained: prompt_parity.Trained, adds: bool) -> dict:
    """Return the fields of the manifest's ChatFormat, as trained, except `turns` and `embedded`."""
    tokenizer = trained.tokenizer
    bos = tokenizer.bos_token
    return {
        "template": tokenizer.chat_template,
        "sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "stop": list(dict.fromkeys([tokenizer.eos_token, *trained.ends])),
        "bos": bos,
        "bos_in_template": bool(bos) and trained.golden[0]["prompt"].startswith(bos),
        "adds_bos": adds,
        "system": run.read("data")["default_system"],
        "input": chat_format.ALPACA_INPUT if run.read("data")["has_input"] else None,
    }


def smoke_prompts(path: Path, data: dict, config: Config) -> list[dict]:
    """Return the smoke prompts: what the default file answers to the config's messages.

    Without such messages those in the record of `data` are used, which look like the rows.
    """
    longest = min(config.generation.max_tokens, limits.MAX_ANSWER_TOKENS)
    model = llama_runtime.load(path, config.base.max_seq_length + longest)
    messages = config.generation.smoke_prompts or data["smoke_prompts"]
    answers = [smoke_prompt(model, message, data["default_system"], config.generation) for message in messages]
    model.close()
    return answers


def smoke_prompt(model: "Llama", message: str, system: str | None, generation: Generation) -> dict:
    """Return what a file answers to a synthetic message, with the log-probability of each token."""
    before = [{"role": "system", "content": system}] if system else []
    ids = llama_runtime.tokenize(model, chat_format.prompt(model, [*before, {"role": "user", "content": message}]))
    said, ended = llama_runtime.greedy(model, ids, min(generation.max_tokens, limits.MAX_ANSWER_TOKENS))
    answer = said + ended
    log_probs = llama_runtime.answer_log_probs(model, ids, answer)
    refuse_broken_losses(log_probs, "smoke prompts")
    return {
        "message": message,
        "ids": ids,
        "answer": llama_runtime.text(model, said),
        "answer_ids": answer,
        "log_probs": log_probs,
    }
