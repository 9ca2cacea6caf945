"""export: adapter -> merged 16-bit weights -> 16-bit GGUF -> importance matrix -> quantized GGUFs.

Only the pinned llama.cpp is used: nothing is downloaded, cloned or installed here.
"""

import json
import re
import shutil
from pathlib import Path

from common import files
from common.errors import UserError
from pipeline.config import references
from pipeline.config.schema import Config, Export
from pipeline.export import merge
from pipeline.run import training_rows
from pipeline.run.run_folder import Run
from pipeline.toolchain import git, llama_tools
from pipeline.toolchain.finite_numbers import refuse_broken_adapter

KINDS = {"float16": "f16", "bfloat16": "bf16"}
IMATRIX_SHARE = 0.1  # the share of the training time that the importance matrix may take without a GPU


def stage(config: Config, run: Run) -> dict:
    """Write export/merged/, the 16-bit GGUF, imatrix.gguf, the quantized GGUFs and the record.

    With an importance matrix each quantization has a static twin, which was made without it.

    Raises:
        UserError: The disk is too small, or the merged weights are not W + scale * B @ A.
    """
    export = config.export
    kind, folder = KINDS[export.dtype], run.workspace("export", "finetune", dtype=export.dtype)
    remove_outdated_ggufs(run, export, folder)
    weights, adapter = Path(run.read("finetune")["weights"]), run.output("finetune", "adapter").parent
    refuse_broken_adapter(run.output("finetune", "adapter"))
    files.remove(folder / "evidence.json")  # left by an attempt that failed
    refuse_full_disk(weights, folder, export)
    merged = merged_weights(weights, adapter, run.folder / "data" / "tokenizer", folder, export.dtype)
    base = folder / f"{run.model}.{kind}.gguf"
    metadata, keys = described(config, run, merged, folder)
    files.once(base, lambda part: llama_tools.convert(merged, part, kind, metadata, keys, folder / "convert.log"))
    outputs = {kind: base}
    matrix = importance_matrix(base, run, folder, imatrix_tokens(run, export)) if export.imatrix else None
    for name in export.quantizations:
        outputs[name] = llama_tools.quantized(base, name, matrix, folder)
        if matrix:
            outputs[name + llama_tools.STATIC] = llama_tools.quantized(base, name + llama_tools.STATIC, None, folder)
    return run.write(
        "export",
        ("finetune", "evaluate"),
        outputs | ({"imatrix": matrix} if matrix else {}),
        llama_cpp=llama_tools.version(),
        default=export.quantizations[0],
        sixteen=kind,
        id=identity(run),
        imatrix=files.sha256(matrix) if matrix else None,
    )


def remove_outdated_ggufs(run: Run, export: Export, folder: Path) -> None:
    """Remove GGUFs made with another importance matrix, or with the scores of another evaluation in their header."""
    begun = folder / "ggufs.json"
    now = {"evaluate": files.sha256(run.path("evaluate"))} | export.model_dump(include={"imatrix", "imatrix_tokens"})
    if begun.is_file() and files.read_json(begun) != now:
        for path in folder.glob("*.gguf"):
            files.remove(path)
    files.write_json(begun, now)


def merged_weights(weights: Path, adapter: Path, tokenizer: Path, folder: Path, dtype: str) -> Path:
    """Write folder/merged, with the trained tokenizer and its template, unless it exists; return its path.

    Raises:
        UserError: The merge gate found a fault; folder/evidence.json has the details.
    """

    def write(part: Path) -> None:
        merge.merge(weights, adapter, part, dtype)
        copy_tokenizer(tokenizer, part)
        if faults := merge.check(weights, adapter, part, dtype):
            evidence = folder / "evidence.json"
            files.write_json(evidence, {"gate": "merge", "faults": faults})
            raise UserError(
                f"the merge is wrong in {len(faults)} tensors, the first is {faults[0]['tensor']}: {faults[0]['what']}",
                f"read {evidence}; the adapter itself is untouched: report it, or run the same command again",
            )

    return files.once(folder / "merged", write)


def copy_tokenizer(tokenizer: Path, target: Path) -> None:
    """Copy the trained tokenizer, and add settings that the converter reads and transformers 5 no longer writes.

    Without added_tokens_decoder Gemma's <start_of_turn> becomes an ordinary word of the GGUF. Without add_bos_token
    llama.cpp gives Phi 3 a BOS that it was not trained with.
    """
    from transformers import AutoTokenizer

    for file in tokenizer.iterdir():
        files.copy(file, target / file.name)
    ours = AutoTokenizer.from_pretrained(tokenizer)
    added = {
        str(i): {"content": t.content, "special": t.special}
        | {k: getattr(t, k) for k in ("lstrip", "rstrip", "normalized", "single_word")}
        for i, t in ours.added_tokens_decoder.items()
    }
    ids = ours("").input_ids
    facts = {"add_bos_token": ours.bos_token_id in ids, "add_eos_token": bool(ids) and ids[-1] == ours.eos_token_id}
    path = target / "tokenizer_config.json"
    files.write_json(path, files.read_json(path) | {"added_tokens_decoder": added} | facts)


def general_name(run: Run, merged: Path) -> str:
    """Return the value of general.name: the run's name, and 'phi-3' for Phi 3 alone.

    llama.cpp reads Phi 3's token rules off general.name, so the word must be in its files and in no others.
    """
    tokens = files.read_json(merged / "tokenizer_config.json")["added_tokens_decoder"].values()
    stripping = any(token["rstrip"] and token["special"] for token in tokens)
    name = re.sub(r"(?i)phi-?3", "phi 3", run.model)
    return f"{name} (phi-3)" if stripping and any(token["content"] == "<|endoftext|>" for token in tokens) else name


def identity(run: Run) -> str:
    """Return the id that the manifest and the GGUFs share: the sha256 of the record of `evaluate`.

    It is known before either of them is written.
    """
    return files.sha256(run.path("evaluate"))


def described(config: Config, run: Run, merged: Path, folder: Path) -> tuple[Path, Path]:
    """Write metadata.json (general.*, as the GGUF specification names them) and keys.json (Ferry's own key-values).

    Returns:
        The paths of both files.
    """
    data, base = run.read("data"), config.base.model
    about = {"name": data["base"]["name"]}
    if references.is_hub_model(base):
        about["repo_url"] = f"https://huggingface.co/{base}"
    metadata = {
        "general.name": general_name(run, merged),
        "general.base_models": [about],
        "general.datasets": [{"name": config.data.source}],
    }
    scores = run.read("evaluate")
    keys = {
        # the converter takes a licence from a model card only
        "general.license": data["base"]["license"],
        "ferry.run": run.folder.name,
        "ferry.manifest_id": identity(run),
        "ferry.base": base,
        "ferry.base.revision": data["base"]["revision"] or "",
        "ferry.data": config.data.source,
        "ferry.data.heldout_sha256": data["outputs"]["heldout"]["sha256"],
        "ferry.config_sha256": files.sha256(run.config_file),
        "ferry.code": git.checkout()["commit"],
        "ferry.scores": json.dumps({"rule": scores["rule"], **scores["scores"]}),
    }
    places = folder / "metadata.json", folder / "keys.json"
    for place, value in zip(places, (metadata, keys), strict=True):
        files.write_json(place, {k: v for k, v in value.items() if v is not None})
    return places


def importance_matrix(base: Path, run: Run, folder: Path, tokens: int) -> Path:
    """Write imatrix.gguf from the run's own training rows, rendered as trained, unless it exists; return its path.

    Held-out rows are never used.
    """
    text = folder / "imatrix.txt"
    text.write_text(training_text(run, tokens), encoding="utf-8")
    return files.once(
        folder / "imatrix.gguf", lambda part: llama_tools.importance(base, text, part, tokens, folder / "imatrix.log")
    )


def imatrix_tokens(run: Run, export: Export) -> int:
    """Return the number of tokens for the importance matrix: as configured, at most as many as the training rows hold.

    On a CPU it is also at most as many as can be read in a tenth of the training time. (Training takes about three
    times as long for a token: forward, and backward through it.) The number is at least one chunk.
    """
    tune = run.read("finetune")
    most = [export.imatrix_tokens, run.read("data")["tokens"]["train"]]
    most += [int(IMATRIX_SHARE * 3 * tune["tokens"])] if tune["device"].startswith("CPU") else []
    return max(llama_tools.CHUNK, min(most))


def training_text(run: Run, tokens: int) -> str:
    """Return the text of evenly spaced training rows, at least `min_tokens` tokens long; too few rows are repeated."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.folder / "data" / "tokenizer")
    table = training_rows.read(run.output("data", "train"))["input_ids"]
    mean = sum(map(len, table)) / len(table)
    step = max(1, int(len(table) * mean / tokens))
    texts, count, place = [], 0, 0
    while count < tokens + llama_tools.CHUNK:
        ids = table[place % len(table)].as_py()
        texts.append(tokenizer.decode(ids))
        count, place = count + len(ids), place + step
    return "".join(texts)


def refuse_full_disk(weights: Path, folder: Path, export) -> None:
    """Raise UserError when the disk cannot hold the peak of the export.

    Besides the base model these are the merged weights, the 16-bit GGUF, and every quantization (twice with an
    importance matrix).
    """
    sixteen = merge.sixteen_bits(merge.safetensors_of(weights))
    quants = sum(llama_tools.BITS[kind] / 16 for kind in export.quantizations) * sixteen * (2 if export.imatrix else 1)
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    need, free = 2 * sixteen + quants - there, shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"export needs {need / 1e9:.1f} GB in {folder} "
            f"(merged weights and 16-bit GGUF {sixteen / 1e9:.1f} GB each, "
            f"quantized {quants / 1e9:.1f} GB), {free / 1e9:.1f} GB are free",
            "free some disk, then run the same command again",
        )
