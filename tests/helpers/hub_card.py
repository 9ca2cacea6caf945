"""What the Hub accepts as the front matter of a model card: the answer of its api/validate-yaml, as far as it is known."""

import json
import re
from collections.abc import Iterator

import yaml


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# docs/hub/repositories-licenses.md of huggingface/hub-docs, with the ids added to it since.
LICENSES = words("""
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql
ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""")
PIPELINES = words("""
text-classification token-classification table-question-answering question-answering zero-shot-classification
translation summarization feature-extraction text-generation fill-mask sentence-similarity text-to-speech text-to-audio
automatic-speech-recognition audio-to-audio audio-classification image-classification object-detection text-to-image
image-segmentation image-to-text image-to-image image-text-to-text visual-question-answering text-ranking any-to-any
""")


def card(text: str) -> dict:
    """A README's front matter; {} without one. Raises ValueError when it is no YAML mapping."""
    found = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r\n|\r|\n|$)", text, re.DOTALL)
    if not found:
        return {}
    try:
        data = dict(yaml.safe_load(found[1]) or {})
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"the front matter is no YAML mapping: {error}") from None
    return json.loads(json.dumps(data, default=str))  # a date is no JSON


def many(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def faults_of_card(data: dict) -> Iterator[str]:
    """What the Hub refuses in a card's front matter, in its words."""
    for value in many(data.get("license")):
        if str(value) not in LICENSES:
            yield f'"license" must be one of [{", ".join(sorted(LICENSES))}]'
    name, link = data.get("license_name"), data.get("license_link")
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", str(name)):
        yield f'"license_name" with value "{name}" must be a lowercase id of letters, digits, dots and dashes'
    if link is not None and not re.fullmatch(r"LICENSE(\.md|\.txt)?|https?://\S+", str(link)):
        yield f'"license_link" with value "{link}" must be LICENSE, LICENSE.md or an URI'
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        for value in many(data.get(key)):
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(value)) or ".." in str(value):
                yield f'"{key}" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
    if data.get("base_model_relation", "adapter") not in ("adapter", "merge", "quantized", "finetune"):
        yield '"base_model_relation" must be one of [adapter, merge, quantized, finetune]'
    for value in many(data.get("language")):
        if not re.fullmatch(r"[a-z]{2,3}|multilingual|code", str(value)):
            yield f'"language" with value "{value}" must be an ISO 639-1, 639-2 or 639-3 code (two/three letters)'
    if not isinstance(data.get("tags", []), list) or not all(isinstance(tag, str) for tag in data.get("tags", [])):
        yield '"tags" must be an array of strings'
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            yield f'"{key}" must be a string'


def validate(text: str) -> dict:
    """The answer of api/validate-yaml."""
    try:
        data = card(text)
    except ValueError as error:
        return {"errors": [{"message": str(error)}], "warnings": []}
    warnings = [] if data else ["empty or missing yaml metadata in repo card"]
    if str(data.get("pipeline_tag", "text-generation")) not in PIPELINES:
        warnings.append(f'The pipeline tag "{data["pipeline_tag"]}" is not in the official list')
    return {
        "errors": [{"message": message} for message in faults_of_card(data)],
        "warnings": [{"message": message} for message in warnings],
    }
