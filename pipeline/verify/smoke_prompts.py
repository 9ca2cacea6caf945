"""The smoke prompts of the manifest: the answers of the default file here, for the Mac to compare with its own."""

from pathlib import Path
from typing import TYPE_CHECKING

from common import llama_runtime
from contract import chat_format, limits
from pipeline.config.schema import Config, Generation
from pipeline.run.records import DataRecord
from pipeline.toolchain.finite_numbers import refuse_broken_losses

if TYPE_CHECKING:
    from llama_cpp import Llama


def build_smoke_prompts(path: Path, data: DataRecord, config: Config) -> list[dict]:
    """Return what the default file answers to the config's messages, or to those of `data`, which look like rows."""
    max_answer_tokens = min(config.generation.max_tokens, limits.MAX_ANSWER_TOKENS)
    model = llama_runtime.load_model(path, config.base.max_seq_length + max_answer_tokens)
    messages = config.generation.smoke_prompts or data.smoke_prompts
    answers = [build_smoke_prompt(model, message, data.default_system, config.generation) for message in messages]
    model.close()
    return answers


def build_smoke_prompt(model: "Llama", message: str, system: str | None, generation: Generation) -> dict:
    """Return what a file answers to a synthetic message, with the log-probability of each token."""
    system_messages = [{"role": "system", "content": system}] if system else []
    prompt = chat_format.render_model_prompt(model, [*system_messages, {"role": "user", "content": message}])
    input_ids = llama_runtime.tokenize(model, prompt)
    max_tokens = min(generation.max_tokens, limits.MAX_ANSWER_TOKENS)
    answer_text_ids, end_ids = llama_runtime.generate_greedy(model, input_ids, max_tokens)
    answer_ids = answer_text_ids + end_ids
    log_probs = llama_runtime.answer_log_probs(model, input_ids, answer_ids)
    refuse_broken_losses(log_probs, "smoke prompts")
    return {
        "message": message,
        "ids": input_ids,
        "answer": llama_runtime.detokenize(model, answer_text_ids),
        "answer_ids": answer_ids,
        "log_probs": log_probs,
    }
