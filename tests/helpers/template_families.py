"""The chat templates that llama.cpp carries and Ferry's own, each with the vocabulary that it was written for."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pipeline.toolchain import llama_tools

DAY = date(2024, 7, 26)


@dataclass(frozen=True)
class Family:
    """A tokenizer and what the labels of its rows must read."""

    vocabulary: str
    end: str
    """What follows an answer, with the token that ends it."""
    specials: str = ""
    """Special tokens that the vocabulary lacks, apart by a space; ends are always special."""
    scaffold: str = ""
    """What the model writes before its answer."""
    last: str = ""
    """What follows the last answer, where that is something else."""
    bos: str = ""
    """Put before a text, instead of the vocabulary's own."""
    eos: str = ""
    """Where it is not the token that ends the last answer."""
    words: str = ""
    """Tokens that are not special."""
    turns: str = "every"
    """last: history is written otherwise than it was prompted; joined: the prompt is in no whole conversation."""
    system: bool = True
    """Whether the template says a system prompt."""

    @property
    def stop(self) -> str:
        return self.eos or self.last or self.end.strip()

    @property
    def added(self) -> tuple[str, ...]:
        return tuple(filter(None, [self.end.strip(), self.last, self.eos, self.bos, *self.specials.split()]))


THINK, CALL = "<think> </think>", "<tool_call> </tool_call>"


REASONS = f"{THINK} {CALL}"


CHATML = "<|im_start|> <|im_end|>"


MISTRAL = "[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS]"


GRANITE = "<|start_of_role|> <|end_of_role|>"


KIMI = "<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|>"


DEEPSEEK = "<｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜>"


GLM = "[gMASK] <sop> <|system|> <|assistant|> <|observation|>"


LAGUNA = "〈|EOS|〉"


HY = " ".join(
    f"<｜{name}:opensource｜>" for name in ("hy_begin_of_sentence", "hy_User", "hy_Assistant", "reasoning_mode")
)


# Its own vocabulary: the model was made with it, or with it and a few special tokens more.
OWN = {
    "meta-llama-Llama-3.1-8B-Instruct": Family("llama-bpe", "<|eot_id|>"),
    "meta-llama-Llama-3.2-3B-Instruct": Family("llama-bpe", "<|eot_id|>"),
    "meta-llama-Llama-3.3-70B-Instruct": Family("llama-bpe", "<|eot_id|>"),
    "meetkai-functionary-medium-v3.1": Family("llama-bpe", "<|eot_id|>"),
    "meetkai-functionary-medium-v3.2": Family("llama-bpe", "<|eot_id|>", scaffold="all\n"),
    "HuggingFaceTB-SmolLM3-3B": Family("llama-bpe", "<|im_end|>", CHATML, words=THINK),
    "Qwen-Qwen2.5-7B-Instruct": Family("qwen2", "<|im_end|>", words=REASONS),
    "Qwen-Qwen3-0.6B": Family("qwen2", "<|im_end|>", words=REASONS, turns="last"),
    "Qwen-QwQ-32B": Family("qwen2", "<|im_end|>", words=REASONS, turns="joined"),
    "Qwen3-Coder": Family("qwen2", "<|im_end|>", words=REASONS),
    "MiMo-VL": Family("qwen2", "<|im_end|>", words=REASONS),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": Family(
        "qwen2",
        "<｜end▁of▁sentence｜>",
        DEEPSEEK,
        bos="<｜begin▁of▁sentence｜>",
        words=THINK,
        turns="joined",
    ),
    "Qwen3.5-4B": Family("qwen35", "<|im_end|>", words=REASONS, turns="last"),
    "microsoft-Phi-3.5-mini-instruct": Family("phi-3", "<|end|>"),
    "google-gemma-4-31B-it": Family("gemma-4", "<turn|>", turns="joined"),
    "google-gemma-4-31B-it-interleaved": Family("gemma-4", "<turn|>", turns="joined"),
    "ibm-granite-granite-3.3-2B-Instruct": Family("starcoder", "<|end_of_text|>", GRANITE),
}


# A real vocabulary stands in for the model's own, which is not here; its special tokens are added.
STAND_INS = {
    "Apertus-8B-Instruct": Family(
        "falcon", "<|assistant_end|>", "<|system_start|> <|system_end|> <|developer_start|> <|developer_end|> "
        "<|user_start|> <|user_end|> <|assistant_start|>",
    ),
    "Apriel-1.6-15b-Thinker-fixed": Family(
        "deepseek-coder", "\n<|end|>", "<|begin_system|> <|begin_user|> <|begin_assistant|> <|begin_content|>", turns="joined"
    ),
    "Bielik-11B-v3.0-Instruct": Family("llama-spm", "<|im_end|>", CHATML, words=REASONS),
    "ByteDance-Seed-OSS": Family("starcoder", "<seed:eos>", "<seed:bos> <seed:think> </seed:think>"),
    "GLM-4.6": Family("refact", "<|user|>", GLM, scaffold="\n", eos="<|endoftext|>", words=REASONS),
    "GLM-4.7-Flash": Family("refact", "<|user|>", GLM, eos="<|endoftext|>", words=REASONS),
    "GigaChat3-10B-A1.8B": Family("gpt-2", "<|message_sep|>", "<|role_sep|>"),
    "GigaChat3.1-10B-A1.8B": Family("gpt-2", "<|message_sep|>", "<|role_sep|>"),
    "Kimi-K2-Instruct": Family("mpt", "<|im_end|>", KIMI),
    "Kimi-K2-Thinking": Family("mpt", "<|im_end|>", KIMI, scaffold="<think></think>", words=THINK),
    "Kimi-K3": Family("mpt", "<|close|>", "<|open|> <|sep|>", eos="<|end_of_msg|>"),
    "LFM2-8B-A1B": Family("deepseek-coder", "<|im_end|>", CHATML),
    "LFM2.5-8B-A1B": Family("deepseek-coder", "<|im_end|>", CHATML, words=THINK),
    "LFM2.5-Instruct": Family("deepseek-coder", "<|im_end|>", CHATML, words=THINK),
    "MiniMax-M1": Family("refact", "<end_of_sentence>", "<begin_of_document> <beginning_of_sentence>"),
    "MiniMax-M3": Family("refact", "[e~[", "]~b]", scaffold="</mm:think>", words="<mm:think> </mm:think>"),
    "Mistral-Small-3.2-24B-Instruct-2506": Family("llama-bpe", "</s>", MISTRAL),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Family("starcoder", "<|im_end|>", CHATML, words=REASONS),
    "NVIDIA-Nemotron-Nano-v2": Family("starcoder", "\n<SPECIAL_12>", "<SPECIAL_10> <SPECIAL_11>", words=REASONS, turns="last"),
    "Reka-Edge": Family("gpt-2", "\n\n<sep>", scaffold=" "),
    "Spark2.5": Family("starcoder", "<｜end▁of▁sentence｜>", "<|System|> <|User|> <|Bot|>", words=REASONS),
    "deepseek-ai-DeepSeek-V3.1": Family("deepseek-llm", "<｜end▁of▁sentence｜>", DEEPSEEK, words=THINK),
    "deepseek-ai-DeepSeek-V4": Family("deepseek-coder", "<｜end▁of▁sentence｜>", DEEPSEEK, words=THINK),
    "deepseek-ai-DeepSeek-V4-Flash-0731": Family("deepseek-coder", "<｜end▁of▁sentence｜>", DEEPSEEK, words=THINK),
    "google-gemma-2-2b-it": Family("llama-spm", "<end_of_turn>", "<start_of_turn>", system=False),
    "ibm-granite-granite-4.0": Family("starcoder", "<|end_of_text|>", GRANITE, words=REASONS),
    "ibm-granite-granite-4.1": Family("starcoder", "<|end_of_text|>", GRANITE, words=REASONS),
    "inclusionai-ling-3.0-flash": Family("starcoder", "<|role_end|>", words=REASONS),
    "mistralai-Ministral-3-14B-Reasoning-2512": Family("llama-bpe", "</s>", f"{MISTRAL} [THINK] [/THINK]"),
    "mistralai-Mistral-Nemo-Instruct-2407": Family("llama-bpe", "</s>", MISTRAL, system=False),
    "moonshotai-Kimi-K2": Family("mpt", "<|im_end|>", KIMI),
    "muse-glimmer": Family("falcon", "<|eot|>", "<|start|> <|message|> <|eom|>", scaffold=" to=user<|message|>"),
    "openai-gpt-oss-120b": Family(
        "gpt-2", "<|end|>", "<|start|> <|message|> <|channel|>", scaffold="<|channel|>final<|message|>", last="<|return|>"
    ),
    "openbmb-MiniCPM5-1B": Family("llama-spm", "<|im_end|>", CHATML, words=REASONS, turns="joined"),
    "poolside-Laguna-S-2.1": Family("starcoder", "</assistant>", LAGUNA, words=REASONS),
    "poolside-Laguna-XS-2.1": Family("starcoder", "\n</assistant>", LAGUNA, scaffold="\n", words=REASONS),
    "poolside-Laguna-XS.2": Family("starcoder", "\n</assistant>", LAGUNA, scaffold="\n", words=REASONS),
    "tencent-Hy3": Family("starcoder", "<｜hy_eos:opensource｜>", HY, words="<think:opensource> </think:opensource>"),
    "unsloth-Apriel-1.5": Family("deepseek-coder", "\n<|end|>", "<|system|> <|user|> <|assistant|> <|content|>"),
    "unsloth-mistral-Devstral-Small-2507": Family("llama-bpe", "</s>", MISTRAL),
    "upstage-Solar-Open-100B": Family("starcoder", "<|end|>", "<|begin|> <|content|> <|think|>", scaffold="<|content|>"),
}  # fmt: skip


# What comes with Ferry, in a tokenizer that it fits.
NAMED = {
    "alpaca": Family("starcoder", "<|endoftext|>"),
    "chatml": Family("qwen2", "<|im_end|>", words=REASONS),
    "completion": Family("deepseek-coder", "<｜end▁of▁sentence｜>"),
    "gemma": Family("llama-spm", "<end_of_turn>", "<start_of_turn>", system=False),
    "llama-3": Family("llama-bpe", "<|eot_id|>"),
    "mistral": Family("llama-spm", "</s>", scaffold=" ", system=False),
    "phi-3": Family("phi-3", "<|end|>"),
    "vicuna": Family("llama-spm", "</s>", scaffold=" "),
    "zephyr": Family("llama-spm", "</s>"),
}


# The templates inside the vocabularies' own files.
EMBEDDED = {
    "qwen2": Family("qwen2", "<|im_end|>", words=REASONS),
    "phi-3": Family("phi-3", "<|end|>"),
    "command-r": Family("command-r", "<|END_OF_TURN_TOKEN|>"),
}


# A template that no row could be trained with faithfully: (code, value in the message).
REFUSED = {
    "Cohere2MoE": ("template.prompt_mismatch", "<|START_THINKING|>'"),
    "CohereForAI-c4ai-command-r-plus-tool_use": ("template.refused", "'NoneType' object is not iterable"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("template.prompt_mismatch", "<|END_THINKING|>'"),
    "MiniMax-M2": ("template.prompt_mismatch", r"<think>\n'"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("template.refused", "'NoneType' object is not iterable"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("template.refused", "'NoneType' object is not iterable"),
    "StepFun3.5-Flash": ("template.prompt_mismatch", r"<think>\n'"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("template.prompt_mismatch", r"<think>\n'"),
    "deepseek-ai-DeepSeek-V3.2": ("template.prompt_mismatch", "<think></think>'"),
    "fireworks-ai-llama-3-firefunction-v2": ("template.refused", "'functions' is undefined"),
    "llama-cpp-deepseek-r1": ("template.prompt_mismatch", r"<think>\n'"),
    "llama-cpp-rwkv-world": ("template.no_end_token", "special token"),
}


# Every end token is special in it, so the template alone is at fault.
WILLING = Family("starcoder", "<|im_end|>", f"{CHATML} {DEEPSEEK} <|eot_id|> <|END_OF_TURN_TOKEN|> [e~[")


def folder() -> Path:
    return llama_tools.require_folder() / "models" / "templates"


def stems() -> list[str]:
    """Every template; without llama.cpp the tests that need them say so."""
    return sorted(path.stem for path in folder().glob("*.jinja")) if llama_tools.is_set_up() else [*OWN, *STAND_INS]


def source(stem: str) -> str:
    return (folder() / f"{stem}.jinja").read_text(encoding="utf-8")
