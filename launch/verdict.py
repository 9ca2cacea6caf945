"""Compare the manifests of a published model and its reproduction: equal, within tolerance, or different, and why."""

from dataclasses import dataclass

from contract.manifest import Manifest, Score

EQUAL = "equal"
WITHIN_TOLERANCE = "within tolerance"
DIFFERENT = "different"
UNKNOWN = "not known"
OTHER_BITS = "other bits"
LOSS_TOLERANCE = 0.01  # relative: another GPU, or another run on the same one, adds up in another order
NATS_TOLERANCE = 0.002  # absolute, the alternative to it: a loss near zero is made of few tokens
SCORE_TOLERANCE = 0.02  # of a score: with the loss two of a hundred answers may change, or one of fewer
HEADER_BYTES = 4096  # bytes by which the header of a GGUF may differ: scores, names and hashes have other digits


@dataclass(frozen=True)
class VerdictRow:
    """One line of the comparison; verdict.json has these fields."""

    what: str
    published: str
    again: str
    verdict: str
    reason: str = ""


def compare_manifests(before: Manifest, after: Manifest) -> list[VerdictRow]:
    """Return the rows of the comparison: first those that decide, then the differences that may explain them."""
    environment_rows = compare_environments(before, after)
    reason = "; ".join(f"different {row.what}" for row in environment_rows if row.verdict == DIFFERENT)
    decisive = [
        *compare_data(before, after),
        *compare_training(before, after, reason),
        *compare_quality_ladder(before, after, reason),
        *compare_default_gguf(before, after, reason),
    ]
    return [*compare_code(before, after), *decisive, *(row for row in environment_rows if row.verdict == DIFFERENT)]


def is_reproduced(rows: list[VerdictRow]) -> bool:
    """Return whether no deciding row is different; rows about the environment decide nothing."""
    return not any(row.verdict == DIFFERENT for row in rows if row.what not in ENVIRONMENT_ROWS)


def compare_exact(title: str, published: object, again: object, reason: str = "") -> VerdictRow:
    """Return the row of two values that have to be equal; UNKNOWN when one of the two manifests does not have it."""
    texts = _shorten(published), _shorten(again)
    if published is None or again is None:
        return VerdictRow(title, *texts, UNKNOWN)
    return VerdictRow(title, *texts, EQUAL) if published == again else VerdictRow(title, *texts, DIFFERENT, reason)


def compare_numbers(
    title: str, published: float | None, again: float | None, relative: float, absolute: float, reason: str
) -> VerdictRow:
    """Return the row of two numbers, which may differ by the larger of the two tolerances."""
    texts = _shorten(published), _shorten(again)
    if not (isinstance(published, int | float) and isinstance(again, int | float)):
        return VerdictRow(title, *texts, UNKNOWN)
    if published == again:
        return VerdictRow(title, *texts, EQUAL)
    is_within = abs(published - again) <= max(relative * abs(published), absolute)
    return VerdictRow(title, *texts, WITHIN_TOLERANCE if is_within else DIFFERENT, reason)


def compare_code(before: Manifest, after: Manifest) -> list[VerdictRow]:
    """Return the row of the commits; UNKNOWN when one of the checkouts had changes that were not committed."""
    published, again = (manifest.provenance.get("git") or {} for manifest in (before, after))
    row = compare_exact("code", published.get("commit"), again.get("commit"))
    if published.get("dirty") or again.get("dirty"):
        return [VerdictRow("code", row.published, row.again, UNKNOWN, "the checkout had uncommitted changes")]
    return [row]


def compare_data(before: Manifest, after: Manifest) -> list[VerdictRow]:
    """Return the rows of the data and of the base model."""
    return [
        compare_exact("training rows", before.dataset.train_sha256, after.dataset.train_sha256),
        compare_exact("held-out rows", before.dataset.split_hash, after.dataset.split_hash),
        compare_exact("base model", before.base.revision, after.base.revision),
    ]


def compare_training(before: Manifest, after: Manifest, reason: str) -> list[VerdictRow]:
    """Return the rows of the training's counts and of its final loss."""
    published, again = before.training, after.training
    names = ("steps", "tokens", "train_batch_size", "learning_rate")
    counts = [compare_exact(name, published.get(name), again.get(name), reason) for name in names]
    return [*counts, compare_losses("final loss", published.get("final_loss"), again.get("final_loss"), reason)]


def compare_quality_ladder(before: Manifest, after: Manifest, reason: str) -> list[VerdictRow]:
    """Return the rows of held-out loss and score, for every step of the quality ladder that one of the two has."""
    published, again = (manifest.scores.get("heldout", {}) for manifest in (before, after))
    rows = []
    for name in dict.fromkeys([*published, *again]):
        if name in published and name in again:
            rows += compare_scores(name, published[name], again[name], reason)
        else:
            old_text, new_text = ("scored" if name in scores else "-" for scores in (published, again))
            rows.append(compare_exact(name, old_text, new_text, reason))
    return rows


def compare_scores(name: str, published: Score, again: Score, reason: str) -> list[VerdictRow]:
    """Return the rows of held-out loss and score of one step of the quality ladder."""
    rows = [compare_losses(f"{name}: loss", published["loss"], again["loss"], reason)]
    if "score" in published and "score" in again:
        tolerance = max(SCORE_TOLERANCE, 1 / max(1, published.get("rows", 1))) + 1e-9  # at least one held-out row
        rows.append(compare_numbers(f"{name}: score", published["score"], again["score"], 0, tolerance, reason))
    return rows


def compare_losses(title: str, published: float | None, again: float | None, reason: str) -> VerdictRow:
    """Return the row of two losses in nats."""
    return compare_numbers(title, published, again, LOSS_TOLERANCE, NATS_TOLERANCE, reason)


def compare_default_gguf(before: Manifest, after: Manifest, reason: str) -> list[VerdictRow]:
    """Return the rows of the default GGUF: quantization, tensors, size, weights."""
    published, again = before.default_artifact(), after.default_artifact()
    old_types, new_types = (_format_tensor_types(artifact.tensor_types) for artifact in (published, again))
    return [
        compare_exact("GGUF", published.quantization, again.quantization, reason),
        compare_exact("its tensors", old_types, new_types, reason),
        compare_numbers("its size", published.bytes, again.bytes, 0, HEADER_BYTES, "its header contains the scores"),
        compare_weights(published.weights_sha256, again.weights_sha256),
    ]


def compare_weights(published: str | None, again: str | None) -> VerdictRow:
    """Return the row of the weights' sha256: equal ones prove that the weights agree in every bit.

    Different ones decide nothing (OTHER_BITS), because other kernels add up in another order.
    """
    row = compare_exact("its weights", published, again)
    return row if row.verdict != DIFFERENT else VerdictRow(row.what, row.published, row.again, OTHER_BITS)


ENVIRONMENT_ROWS = ("device", "driver", "platform", "python", "image", "llama.cpp", "locked environment", "packages")


def compare_environments(before: Manifest, after: Manifest) -> list[VerdictRow]:
    """Return the rows of the machines and the environments in which the two models were made."""
    published, again = before.provenance, after.provenance
    image = [(provenance.get("image") or {}).get("sources") or "none" for provenance in (published, again)]
    packages = [
        ", ".join(f"{name} {version}" for name, version in sorted((provenance.get("packages") or {}).items()))
        for provenance in (published, again)
    ]
    pairs = (
        ("device", before.training.get("device"), after.training.get("device")),
        ("driver", published.get("driver"), again.get("driver")),
        ("platform", published.get("platform"), again.get("platform")),
        ("python", published.get("python"), again.get("python")),
        ("image", *image),
        ("llama.cpp", published.get("llama_cpp"), again.get("llama_cpp")),
        ("locked environment", str(published.get("lock_sha256")), str(again.get("lock_sha256"))),
        ("packages", *packages),
    )
    return [compare_exact(title, old_value, new_value) for title, old_value, new_value in pairs]


def _format_tensor_types(types: dict[str, int]) -> str:
    """Return the number of tensors of each type, such as '60 F32, 211 Q4_K'."""
    return ", ".join(f"{count} {name}" for name, count in sorted(types.items()))


def _shorten(value: object) -> str:
    """Return a value for the table: five digits of a float, at most 26 characters of a text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = str(value)
    return text if len(text) <= 26 else f"{text[:12]}..." if " " not in text else f"{text[:23]}..."


def format_verdict(rows: list[VerdictRow], repo: str) -> str:
    """Return the table of rows, with the verdict as its last line."""
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("what", "published", "again")]
    lines = [f"  {'':<{widths[0]}}  {'published':<{widths[1]}}  {'again':<{widths[2]}}"]
    lines += [
        f"  {row.what:<{widths[0]}}  {row.published:<{widths[1]}}  {row.again:<{widths[2]}}  {row.verdict}"
        f"{f': {row.reason}' if row.reason else ''}"
        for row in rows
    ]
    different_titles = [row.what for row in rows if row.verdict == DIFFERENT and row.what not in ENVIRONMENT_ROWS]
    return "\n".join(
        [
            *lines,
            f"{repo}: reproduced" if not different_titles else f"{repo}: not reproduced: {', '.join(different_titles)}",
        ]
    )
