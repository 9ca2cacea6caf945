"""A small repo as `publish` lays one out, made in a moment: real GGUF, no trained weights in it."""

import json
import random
from pathlib import Path

from common import files
from contract import chat_format, manifest

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]
CARD = "---\nlicense: apache-2.0\nlibrary_name: gguf\ntags:\n- ferry\n---\n# tiny\n"


def make(folder: Path, size: int = 6 << 20, seed: int = 1, name: str = "tiny", template: str = TEMPLATE) -> Path:
    """A folder hub. size: bytes of its GGUF, about; seed: another one is another version."""
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / f"{name}.q4_k_m.gguf", size, seed, template)
    write_rest(folder, seed)
    files.write_json(folder / manifest.FILE_NAME, described(folder, name, template))
    return folder


def write_rest(folder: Path, seed: int) -> None:
    """What stands beside the GGUF."""
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(random.Random(seed).randbytes(100_000))
    (folder / "README.md").write_text(CARD + f"version {seed}\n")
    (folder / "LICENSE").write_text("as free as the wind\n")


def write_gguf(path: Path, size: int, seed: int, template: str = TEMPLATE) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|im_start|>", "<|im_end|>", *map(chr, range(97, 123))])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(template)
    writer.add_tensor(
        "blk.0.ffn_up.weight", np.random.default_rng(seed).random((size // 4096 or 1, 1024), dtype=np.float32)
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def described(folder: Path, name: str = "tiny", template: str = TEMPLATE) -> dict:
    """Its manifest, as JSON."""

    def file(path: str, **more) -> dict:
        return {"file": path, "sha256": files.sha256(folder / path), "bytes": (folder / path).stat().st_size} | more

    made = manifest.Manifest.model_validate({
        "name": name,
        "base": {"model": "you/base", "revision": "0" * 40, "license": "apache-2.0", "architecture": "LlamaForCausalLM", "name": "base"},
        "dataset": {"source": "rows.jsonl", "revision": None, "sha256": {}, "rows": {"train": 9}, "split": "none", "split_hash": "0" * 64},
        "chat": {"template": template, "sha256": files.sha256_bytes(template.encode()), "stop": ["<|im_end|>"], "bos": None, "bos_in_template": False, "system": None},
        "generation": {"temperature": 0.5, "top_p": 0.9, "num_ctx": 256, "max_tokens": 16},
        "artifacts": [
            file(f"{name}.q4_k_m.gguf", kind="gguf", quantization="q4_k_m", tensor_types={"F32": 1}, default=True),
            file("adapter/adapter_model.safetensors", kind="adapter", quantization=None),
        ],
        "files": [file("README.md"), file("LICENSE")],
        "config": {}, "training": {}, "scores": {}, "provenance": {},
        "golden": [{"messages": HELLO, "prompt": chat_format.render(TEMPLATE, HELLO), "ids": [0, 1]}],
        "smoke": [],
    })  # fmt: skip
    return made.model_dump(mode="json")


def rewrite(folder: Path, change) -> Path:
    """Change the manifest's JSON. change: a function of it."""
    path = folder / manifest.FILE_NAME
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))
    return folder


def real(
    folder: Path, source: Path, name: str = "real", system: str | None = None, seed: int = 0, smoke: int = 3
) -> Path:
    """A folder hub with a model that answers: `source`, a real GGUF, under a manifest as `publish` would write it.

    seed: another one is another version, of the same weights.
    """
    from common import llama_runtime
    from pipeline.config.schema import Generation
    from pipeline.verify import derive_template, golden_prompts, smoke_prompts

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.q4_k_m.gguf"
    path.write_bytes(source.read_bytes())
    write_rest(folder, seed)
    model = llama_runtime.load_model(path, 2048)
    template, bos, eos = (
        chat_format.embedded_template(model),
        chat_format.special_token_text(model, "bos"),
        chat_format.special_token_text(model, "eos"),
    )

    def render(messages, asks=True):
        return chat_format.render(template, messages, bos, eos, asks)

    rows = [
        {"messages": messages, "add_generation_prompt": asks, "prompt": render(messages, asks)}
        for messages in golden_prompts.build_conversations(eos) for asks in (True, False)
    ]  # fmt: skip
    turns, left_out = derive_template.derive_turns(
        render, template, [row for row in rows if row["add_generation_prompt"]]
    )
    generation = Generation(max_tokens=24, num_ctx=1024, temperature=0)
    value = described(folder, name, template) | {
        "golden": [row | {"ids": llama_runtime.tokenize(model, row["prompt"])} for row in rows],
        "smoke": [smoke_prompts.build_smoke_prompt(model, m, system, generation) for m in SMOKE[:smoke]],
        "scores": {"rule": "exact", "used": "none", "heldout": {}, "notes": []},
        "training": {"seed": seed},
    }
    value["chat"] |= {
        "stop": [eos], "bos": bos, "system": system, "turns": turns and turns.model_dump(mode="json"), "embedded": left_out,
    }  # fmt: skip
    value["generation"] |= {"num_ctx": 1024, "temperature": 0.0, "max_tokens": 24}
    value["artifacts"][0] |= {"tensor_types": {}}
    model.close()
    files.write_json(folder / manifest.FILE_NAME, value)
    return folder


SMOKE = ("What is the capital of France?", "Say hello.", "Name three colours.")
