"""What the licence of a base model asks of anyone who publishes a model made from it.

These are hints for a careful user, not legal advice: a licence binds by its own text. The table below repeats, for the
Hub's licence identifiers, what that text says about passing on a changed model. `allows_derivatives` is None where the
text does not say, or where we have not read it. The result is published under the licence of the base model, which is
what share-alike licences (GPL, CC BY-SA) ask as well.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from contract import manifest

if TYPE_CHECKING:
    from huggingface_hub import CardData

MAX_BYTES = 1_000_000  # a licence is text of 1 to 40 KB; anything far larger is something else
LICENCE_FILE_NAME = re.compile(r"(licen[sc]e|copying|notice|use_policy)", re.IGNORECASE)


@dataclass(frozen=True)
class LicenceTerms:
    """What one licence allows and asks."""

    allows_derivatives: bool | None
    """Whether a changed model may be passed on; None where we do not know."""
    requires_copy: bool = False
    """Whether a copy of the licence must be published with the model."""
    notice: str | None = None
    """A text that must be published in a NOTICE file."""
    credit: str | None = None
    """A text that must be displayed prominently."""
    name_prefix: str | None = None
    """How the name of the model must begin."""
    allows_commercial_use: bool = True
    """False where it forbids commercial use."""
    use_restrictions: str | None = None
    """Where its use restrictions are written down; they bind whoever receives the model, who must be told."""
    link: str | None = None
    """The URL of its text."""


UNKNOWN = LicenceTerms(None)
NO_CONDITIONS, WITH_COPY = LicenceTerms(True), LicenceTerms(True, requires_copy=True)
RESEARCH_ONLY = LicenceTerms(None, allows_commercial_use=False)
RAIL = LicenceTerms(
    True, requires_copy=True, use_restrictions="the use-based restrictions in an attachment of the licence"
)


def _creative_commons_terms(name: str) -> LicenceTerms:
    """Return the terms of cc-by-nc-sa-4.0 and the like; with ND a changed work may be made but not shared."""
    kind, version = name.removeprefix("cc-").rsplit("-", 1)
    link = f"https://creativecommons.org/licenses/{kind}/{version}/"
    return LicenceTerms("nd" not in kind.split("-"), allows_commercial_use="nc" not in kind.split("-"), link=link)


def _llama_terms(title: str, folder: str, credit: str = "Built with Llama", prefix: str = "Llama") -> LicenceTerms:
    """Return the terms of a Llama 3 or Llama 4 licence.

    Source: section 1.b of https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/LICENSE and of the
    licences beside it. The use policy (1.b.iv) is part of each. With more than 700 million users a month one has to ask
    Meta (section 2).
    """
    url = f"https://www.llama.com/{folder}"
    return LicenceTerms(
        True,
        requires_copy=True,
        credit=credit,
        name_prefix=prefix,
        use_restrictions=f"Meta's Acceptable Use Policy, {url}/use-policy",
        link=f"{url}/license",
        notice=(
            f"{title} is licensed under the {title} Community License, "
            "Copyright © Meta Platforms, Inc. All Rights Reserved."
        ),
    )


# Every identifier of https://huggingface.co/docs/hub/repositories-licenses, grouped by what its licence asks.
FAMILIES = (
    (NO_CONDITIONS, "cc0-1.0 pddl unlicense wtfpl"),  # public domain, or as good as
    (replace(WITH_COPY, link="https://www.apache.org/licenses/LICENSE-2.0"), "apache-2.0"),  # section 4
    (replace(WITH_COPY, link="https://opensource.org/license/mit"), "mit"),
    (WITH_COPY, ("bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear isc bsl-1.0 ncsa postgresql zlib ms-pl afl-3.0 "
                 "ecl-2.0")),
    (WITH_COPY, "artistic-2.0 ofl-1.1 lppl-1.3c openmdw-1.0 openmdw-1.1"),
    (WITH_COPY, "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr agpl-3.0 gfdl"),
    (WITH_COPY, "mpl-2.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 osl-3.0"),
    (WITH_COPY, "cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 odc-by odbl etalab-2.0"),  # made for data
    # Changed models may be passed on with the use restrictions of the licence: https://huggingface.co/blog/open_rail
    (RAIL, ("openrail openrail++ bigscience-openrail-m bigscience-bloom-rail-1.0 creativeml-openrail-m "
            "bigcode-openrail-m")),
    # Section 1.b of its LICENSE (https://huggingface.co/facebook/cwm): under the same terms and with a copy of them.
    (LicenceTerms(True, requires_copy=True, allows_commercial_use=False,
           use_restrictions="Meta's Acceptable Use Policy in the licence"),
     "fair-noncommercial-research-license"),
    # https://huggingface.co/apple/AIM/blob/main/LICENSE: for research only, which excludes commerce and products.
    (LicenceTerms(True, requires_copy=True, allows_commercial_use=False,
           use_restrictions="the limit to research purposes in the licence",
           notice="Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model "
                  "License Agreement."),
     "apple-amlr"),
    # Research licences that we have not read.
    (RESEARCH_ONLY, "deepfloyd-if-license h-research intel-research"),
    # A family with "no derivatives" among its members, a licence for computing on data, two that we have not read, and
    # no licence.
    (UNKNOWN, "cc c-uda apple-ascl grok2-community other unknown"),
)  # fmt: skip

# A link replaces a copy of these: section 3(a) of https://creativecommons.org/licenses/by/4.0/legalcode.
CREATIVE_COMMONS = (
    "cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0"
)

TERMS_BY_LICENCE: dict[str, LicenceTerms] = {
    **{name: terms for terms, names in FAMILIES for name in names.split()},
    **{name: _creative_commons_terms(name) for name in CREATIVE_COMMONS.split()},
    # Section 1.b of https://ai.meta.com/llama/license/: a copy and a notice; no credit and no name prefix yet.
    "llama2": LicenceTerms(
        True, requires_copy=True, use_restrictions="Meta's Acceptable Use Policy, https://ai.meta.com/llama/use-policy",
        link="https://ai.meta.com/llama/license/",
        notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
               "All Rights Reserved.",
    ),
    # Only this one asks for "Built with Meta Llama 3", and for "Llama 3" at the beginning of the name.
    "llama3": _llama_terms("Meta Llama 3", "llama3", "Built with Meta Llama 3", "Llama 3"),
    "llama3.1": _llama_terms("Llama 3.1", "llama3_1"),
    "llama3.2": _llama_terms("Llama 3.2", "llama3_2"),
    "llama3.3": _llama_terms("Llama 3.3", "llama3_3"),
    "llama4": _llama_terms("Llama 4", "llama4"),
    # Section 3.1 of https://ai.google.dev/gemma/terms. (Gemma 4 is apache-2.0.)
    "gemma": LicenceTerms(
        True, requires_copy=True, link="https://ai.google.dev/gemma/terms",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
        use_restrictions="section 3.2 of the Gemma Terms of Use and the Prohibited Use Policy, "
            "https://ai.google.dev/gemma/prohibited_use_policy",
    ),
}  # fmt: skip


def find_terms(license: str | None) -> LicenceTerms:
    """Return the terms of a Hub identifier, in upper or lower case; UNKNOWN for every other name and for None."""
    return TERMS_BY_LICENCE.get((license or "").strip().lower(), UNKNOWN)


def review_licence(
    license: str | None,
    model: str,
    is_private: bool,
    is_licence_named: bool,
    *,
    repo: str | None = None,
    copy_count: int = 0,
) -> list[str]:
    """Return the notes to print before a model made from `model` is published on the Hub.

    Args:
        license: The licence of the base model, as a Hub identifier.
        model: The base model.
        is_private: Whether the repo is private.
        is_licence_named: Whether base.license in the config names the licence.
        repo: The name of the repo, to compare with the prefix that the licence asks for.
        copy_count: The number of licence files that are published too.

    Raises:
        UserError: The licence forbids passing on a changed model; or the repo is public, this is not known, and the
            user has not named the licence. (TERMS_BY_LICENCE has the sources.)
    """
    terms, label = find_terms(license), f"the licence {license}" if license else "no licence"
    if terms.allows_derivatives is False:
        raise UserError(
            f"{model} has {label}, which forbids publishing a modified model", LOCAL_HINT, code="licence.no_derivatives"
        )
    if terms.allows_derivatives is None and not is_private and not is_licence_named:
        raise UserError(
            f"{model} has {label}, and Ferry does not know whether a modified model may be published",
            f"read its licence, then set base.license (other, if the Hub has no name for it); or {LOCAL_HINT}",
            code="licence.unknown",
        )
    return _list_notes(terms, label, model, repo, copy_count)


LOCAL_HINT = "keep the model on this machine: publish.repo=./hub/{run}"


def _list_notes(terms: LicenceTerms, label: str, model: str, repo: str | None, copy_count: int) -> list[str]:
    has_prefix = _normalize_name((repo or "").split("/")[-1]).startswith(_normalize_name(terms.name_prefix or ""))
    notes = [
        (
            terms.allows_derivatives is None,
            f"{model} has {label}: check whether a modified model may be published",
        ),
        (not terms.allows_commercial_use, f"{model} has {label}, which forbids commercial use"),
        (
            not has_prefix,
            f"{label} requires that the model's name begins with {terms.name_prefix}: rename publish.repo",
        ),
        (
            terms.requires_copy and not copy_count,
            f"{label} requires that a copy of it is published, and {model} has none: add it as LICENSE",
        ),
        (bool(terms.use_restrictions), f"{label} binds everyone who receives the model: {terms.use_restrictions}"),
    ]
    return [text for applies, text in notes if applies]


def _normalize_name(name: str) -> str:
    """Return a name in lower case without separators: a repo may write Llama 3 as Llama-3, Llama_3 or llama3."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_licence_files(base: Path) -> list[Path]:
    """Return the licence files of a base model, each name once, and only names that a manifest accepts.

    Args:
        base: A model folder (links in a Hub snapshot keep their names), or a GGUF. The licences of a GGUF inside an
            unpacked wheel are in *.dist-info:
            https://packaging.python.org/en/latest/specifications/core-metadata/#license-file

    Raises:
        OSError: A folder cannot be listed.
    """
    folders = [base] if base.is_dir() else _find_dist_info(base.absolute()) or [base.parent]
    licence_files: dict[str, Path] = {}
    for path in (path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())):
        is_licence_name = LICENCE_FILE_NAME.match(path.name) and manifest.is_safe_name(path.name)
        if is_licence_name and path.is_file() and path.stat().st_size < MAX_BYTES:
            licence_files.setdefault(path.name.lower(), path)
    return list(licence_files.values())


def _find_dist_info(gguf: Path) -> list[Path]:
    """Return the metadata folders of the wheel that contained a GGUF; an empty list if it is not from a wheel."""
    for parent in gguf.parents[:3]:
        if infos := sorted(parent.glob("*.dist-info")):
            owners = [info for info in infos if len(infos) == 1 or _has_wheel_file(info, gguf.relative_to(parent))]
            return [folder for info in owners for folder in (info, info / "licenses")]
    return []


def _has_wheel_file(info: Path, wheel_path: Path) -> bool:
    """Return whether a wheel contains a file; an environment holds hundreds of other packages side by side."""
    record = info / "RECORD"
    return record.is_file() and f"{wheel_path.as_posix()}," in record.read_text(encoding="utf-8", errors="replace")


def read_card_licence(folder: Path) -> dict[str, str]:
    """Return license, license_name and license_link of a model card, as far as it has them; {} without a model card.

    A list of several licences becomes `other` with all their names, because the model card does not say whether one may
    choose, or all of them bind. A broken model card gives {} and raises nothing, because it is someone else's text.
    Source: https://huggingface.co/docs/hub/model-cards#model-card-metadata.
    """
    data = _read_card_data(folder)
    facts = {key: data.get(key) for key in ("license", "license_name", "license_link")} if data else {}
    if isinstance(facts.get("license"), list):
        facts |= _join_licences([name for name in facts["license"] if isinstance(name, str)])
    return {key: value.strip() for key, value in facts.items() if isinstance(value, str) and value.strip()}


def _read_card_data(folder: Path) -> "CardData | None":
    """Return the metadata of a folder's model card; None where it has none, or a broken one."""
    from huggingface_hub import ModelCard

    try:
        with (folder / "README.md").open(encoding="utf-8-sig") as file:
            text = file.read(MAX_BYTES)
        has_metadata = text.lstrip().startswith("---")  # ModelCard would warn without
        return ModelCard(text, ignore_metadata_errors=True).data if has_metadata else None
    except Exception:  # noqa: BLE001 YAML, ModelCard and the disk each raise their own errors
        return None


def _join_licences(names: list[str]) -> dict[str, str | None]:
    """Return the license of a list of several, and the license_name where it is more than one."""
    if len(names) > 1:
        return {"license": "other", "license_name": " and/or ".join(names)}
    return {"license": names[0] if names else None}
