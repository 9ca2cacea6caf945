"""Find secrets and personal data in text.

Secrets are found with the patterns of detect-secrets, check digits are verified with python-stdnum, and telephone
numbers are found with the numbering plans of phonenumbers.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

# Every secret that is searched for has one of these: a long run of such characters, a URL or a PEM header. Nearly all
# rows have none and cost only this one pass; the single patterns take ten times as long.
# tests/pipeline/data/test_bad_data.py holds a secret of each kind.
SECRET_HINT = re.compile(r"(?<![\w+/=.-])[\w+/=.-]{20}|://|BEGIN |PuTTY")
NUMBER_HINT = re.compile(r"\d\d[ -]?\d")  # every number that is searched for has this
# Plugins that are not used: entropy and keyword plugins, which take hex ids and prose for secrets; Artifactory (its
# AP... matches APPLICATIONS); public IP addresses, which are seldom secret; IBM's, SoftLayer's and Cloudant's, whose
# patterns take cubic time on a run of spaces; and three that take quadratic time on one long word, for which
# EXTRA_SECRET_PATTERNS has other patterns.
SKIPPED_PLUGINS = (
    "ArtifactoryDetector", "IPPublicDetector", "KeywordDetector", "IbmCloudIamDetector", "IbmCosHmacDetector",
    "SoftlayerDetector", "CloudantDetector", "NpmDetector", "JwtTokenDetector", "OpenAIDetector",
)  # fmt: skip
# Keys that people who train models have and that are newer than detect-secrets 1.5, and those of which its patterns
# match only a part.
EXTRA_SECRET_PATTERNS = {
    "Private Key": (  # the whole block
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----|\Z)"
    ),
    "JSON Web Token": r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?",  # signature included
    "NPM tokens": r"\bnpm_[A-Za-z0-9]{36}|_authToken=\s*[\w-]{36}",
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{34,}\b",
    "Anthropic key": r"\bsk-ant-[A-Za-z0-9_-]{24,}",
    "OpenAI Token": r"(?<![\w-])sk-(?:(?:proj|svcacct|admin)-[\w-]{32,}|[\w-]{20,}?T3BlbkFJ[\w-]{20,})",
    "Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "Weights & Biases key": r"\bwandb_v1_[A-Za-z0-9_]{40,}",
}
EMAIL = re.compile(r"\b[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
CARD_NUMBER = re.compile(r"(?<![\d.-])(?:\d[ -]?){12,18}\d(?![\d.-]*\d)")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
# Every telephone number that is searched for has one of these.
PHONE_HINT = re.compile(r"\+\d|\(\d{3}\)|\d{3}[-. ]\d{3}[-. ]\d{4}")
SSN = re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])")


class Finding(NamedTuple):
    """A secret or a piece of personal data: its kind, and its characters from `start` to `end`."""

    kind: str
    start: int
    end: int


@functools.cache
def secret_patterns() -> list[tuple[str, re.Pattern[str]]]:
    """Return (kind, pattern) of every secret that is searched for."""
    extra_patterns = [(kind, re.compile(text, re.DOTALL)) for kind, text in EXTRA_SECRET_PATTERNS.items()]
    return [*extra_patterns, *_iter_plugin_patterns()]


def _iter_plugin_patterns() -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield (kind, pattern) of the plugins of detect-secrets that are used."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import BasePlugin, RegexBasedDetector

    plugins: Mapping[str, type[BasePlugin]] = get_mapping_from_secret_type_to_class()
    for kind, plugin in plugins.items():
        if issubclass(plugin, RegexBasedDetector) and plugin.__name__ not in SKIPPED_PLUGINS:
            yield from ((kind, pattern) for pattern in plugin().denylist)


def find_secrets(text: str) -> list[Finding]:
    """Return the keys, tokens and passwords in a text, also those in URLs."""
    if not SECRET_HINT.search(text):
        return []
    return _drop_overlaps(
        Finding(kind, *match.span()) for kind, pattern in secret_patterns() for match in pattern.finditer(text)
    )


def find_personal_data(text: str) -> list[Finding]:
    """Return the personal data in a text.

    E-mail addresses, telephone numbers, and card numbers, IBANs and US social security numbers that are valid.
    """
    return _drop_overlaps(_match_personal_data(text))


def _match_personal_data(text: str) -> Iterator[Finding]:
    from stdnum import iban, luhn
    from stdnum.us import ssn

    if "@" in text:
        yield from (Finding("e-mail address", *match.span()) for match in EMAIL.finditer(text))
    if not NUMBER_HINT.search(text):
        return
    for match in CARD_NUMBER.finditer(text):
        digits = re.sub(r"[ -]", "", match[0])
        if luhn.is_valid(digits) and len(set(digits)) > 1 and digits[0] in "3456":  # the networks' first digits
            yield Finding("card number", *match.span())
    yield from (Finding("IBAN", *match.span()) for match in IBAN.finditer(text) if iban.is_valid(match[0]))
    yield from (
        Finding("social security number", *match.span()) for match in SSN.finditer(text) if ssn.is_valid(match[0])
    )
    if PHONE_HINT.search(text):
        yield from _match_phone_numbers(text)


def _match_phone_numbers(text: str) -> Iterator[Finding]:
    """Yield international numbers (+49 ...), and North American ones that are written with separators.

    Ten digits without a separator may be an id.
    """
    from phonenumbers import Leniency, PhoneNumberMatcher

    for match in PhoneNumberMatcher(text, "US", Leniency.STRICT_GROUPING):
        if match.raw_string.startswith("+") or re.search(r"[ ().-]", match.raw_string):
            # A bracket that the number does not close belongs to the sentence.
            has_open_bracket = match.raw_string.startswith("(") and ")" not in match.raw_string
            yield Finding("phone number", match.start + has_open_bracket, match.end)


def _drop_overlaps(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings in order of place, without those that overlap an earlier one."""
    kept: list[Finding] = []
    for finding in sorted(findings, key=lambda f: (f.start, -f.end)):
        if not kept or finding.start >= kept[-1].end:
            kept.append(finding)
    return kept


def mask_findings(text: str, findings: list[Finding]) -> str:
    """Return the text with each finding replaced by its kind, such as [E-MAIL ADDRESS]."""
    for finding in reversed(findings):
        text = f"{text[: finding.start]}[{finding.kind.upper()}]{text[finding.end :]}"
    return text
