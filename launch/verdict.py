"""Compare the manifests of a published model and its reproduction: equal, within tolerance, or different, and why."""

from dataclasses import dataclass

from contract.manifest import Manifest

EQUAL = "equal"
WITHIN = "within tolerance"
DIFFERENT = "different"
UNKNOWN = "not known"
OTHER = "other bits"
LOSS = 0.01  # relative: another GPU, or another run on the same one, adds up in another order
NATS = 0.002  # absolute, the alternative to it: a loss near zero is made of few tokens
POINTS = 0.02  # of a score: with the loss two of a hundred answers may change, or one of fewer
HEADER = 4096  # bytes by which the header of a GGUF may differ: scores, names and hashes have other digits


@dataclass(frozen=True)
class Row:
    """One line of the comparison; verdict.json has these fields."""

    what: str
    published: str
    again: str
    verdict: str
    reason: str = ""


def rows(before: Manifest, after: Manifest) -> list[Row]:
    """Return the rows of the comparison: first those that decide, then the differences that may explain them."""
    why = surroundings(before, after)
    reason = "; ".join(f"other {row.what}" for row in why if row.verdict == DIFFERENT)
    decisive = [
        *data(before, after),
        *training(before, after, reason),
        *ladder(before, after, reason),
        *files(before, after, reason),
    ]
    return [*code(before, after), *decisive, *(row for row in why if row.verdict == DIFFERENT)]


def reproduced(found: list[Row]) -> bool:
    """Return whether no deciding row is different; rows about the environment decide nothing."""
    return not any(row.verdict == DIFFERENT for row in found if row.what not in SURROUNDINGS)


def exact(what: str, a, b, reason: str = "") -> Row:
    """Return the row of two values that have to be equal; UNKNOWN when one of the two manifests does not have it."""
    if a is None or b is None:
        return Row(what, _short(a), _short(b), UNKNOWN)
    return Row(what, _short(a), _short(b), EQUAL if a == b else DIFFERENT, "" if a == b else reason)


def near(what: str, a: float | None, b: float | None, relative: float, absolute: float, reason: str) -> Row:
    """Return the row of two numbers, which may differ by the larger of the two tolerances."""
    said = _short(a), _short(b)
    if not (isinstance(a, int | float) and isinstance(b, int | float)):
        return Row(what, *said, UNKNOWN)
    if a == b:
        return Row(what, *said, EQUAL)
    inside = abs(a - b) <= max(relative * abs(a), absolute)
    return Row(what, *said, WITHIN if inside else DIFFERENT, reason)


def code(before: Manifest, after: Manifest) -> list[Row]:
    """Return the row of the commits; UNKNOWN when one of the checkouts had changes that were not committed."""
    a, b = (made.provenance.get("git") or {} for made in (before, after))
    row = exact("code", a.get("commit"), b.get("commit"))
    if a.get("dirty") or b.get("dirty"):
        return [
            Row("code", row.published, row.again, UNKNOWN, "the checkout had changes that the commit does not have")
        ]
    return [row]


def data(before: Manifest, after: Manifest) -> list[Row]:
    """Return the rows of the data and of the base model."""
    return [
        exact("training rows", before.dataset.train_sha256, after.dataset.train_sha256),
        exact("held-out rows", before.dataset.split_hash, after.dataset.split_hash),
        exact("base model", before.base.revision, after.base.revision),
    ]


def training(before: Manifest, after: Manifest, reason: str) -> list[Row]:
    """Return the rows of the training's counts and of its final loss."""
    a, b = before.training, after.training
    counts = [
        exact(name, a.get(name), b.get(name), reason)
        for name in ("steps", "tokens", "train_batch_size", "learning_rate")
    ]
    return [*counts, near("final loss", a.get("final_loss"), b.get("final_loss"), LOSS, NATS, reason)]


def ladder(before: Manifest, after: Manifest, reason: str) -> list[Row]:
    """Return the rows of held-out loss and score, for every step of the quality ladder that one of the two has."""
    a, b = (made.scores.get("heldout", {}) for made in (before, after))
    found = []
    for name in dict.fromkeys([*a, *b]):
        if name not in a or name not in b:
            found.append(exact(f"{name}", "scored" if name in a else "-", "scored" if name in b else "-", reason))
            continue
        found.append(near(f"{name}: loss", a[name]["loss"], b[name]["loss"], LOSS, NATS, reason))
        if "score" in a[name] and "score" in b[name]:
            one = 1 / max(1, a[name].get("rows", 1))
            found.append(near(f"{name}: score", a[name]["score"], b[name]["score"], 0, max(POINTS, one) + 1e-9, reason))
    return found


def files(before: Manifest, after: Manifest, reason: str) -> list[Row]:
    """Return the rows of the default GGUF: quantization, tensors, size, weights."""
    a, b = before.default(), after.default()
    return [
        exact("GGUF", a.quantization, b.quantization, reason),
        exact("its tensors", _types(a.tensor_types), _types(b.tensor_types), reason),
        near("its size", a.bytes, b.bytes, 0, HEADER, "its header holds the scores" if a.bytes != b.bytes else ""),
        bits(a.weights_sha256, b.weights_sha256),
    ]


def bits(a: str | None, b: str | None) -> Row:
    """Return the row of the weights' sha256: equal ones prove that the weights agree in every bit.

    Different ones decide nothing (OTHER_BITS), because other kernels add up in another order.
    """
    row = exact("its weights", a, b)
    return row if row.verdict != DIFFERENT else Row(row.what, row.published, row.again, OTHER)


SURROUNDINGS = ("device", "driver", "platform", "python", "image", "llama.cpp", "locked environment", "packages")


def surroundings(before: Manifest, after: Manifest) -> list[Row]:
    """Return the rows of the machines and the environments in which the two models were made."""
    a, b = before.provenance, after.provenance
    image = [(made.get("image") or {}).get("sources") or "none" for made in (a, b)]
    packages = [", ".join(f"{k} {v}" for k, v in sorted((made.get("packages") or {}).items())) for made in (a, b)]
    pairs = (
        ("device", before.training.get("device"), after.training.get("device")),
        ("driver", a.get("driver"), b.get("driver")),
        ("platform", a.get("platform"), b.get("platform")),
        ("python", a.get("python"), b.get("python")),
        ("image", *image),
        ("llama.cpp", a.get("llama_cpp"), b.get("llama_cpp")),
        ("locked environment", str(a.get("lock_sha256")), str(b.get("lock_sha256"))),
        ("packages", *packages),
    )
    return [exact(what, one, other) for what, one, other in pairs]


def _types(types: dict[str, int]) -> str:
    """Return the number of tensors of each type, such as '60 F32, 211 Q4_K'."""
    return ", ".join(f"{count} {name}" for name, count in sorted(types.items()))


def _short(value) -> str:
    """Return a value for the table: five digits of a float, at most 26 characters of a text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = str(value)
    return text if len(text) <= 26 else f"{text[:12]}..." if " " not in text else f"{text[:23]}..."


def page(found: list[Row], repo: str) -> str:
    """Return the table of rows, with the verdict as its last line."""
    widths = [max(len(getattr(row, name)) for row in found) for name in ("what", "published", "again")]
    lines = [f"  {'':<{widths[0]}}  {'published':<{widths[1]}}  {'again':<{widths[2]}}"]
    lines += [
        f"  {row.what:<{widths[0]}}  {row.published:<{widths[1]}}  {row.again:<{widths[2]}}  {row.verdict}"
        f"{f': {row.reason}' if row.reason else ''}"
        for row in found
    ]
    wrong = [row.what for row in found if row.verdict == DIFFERENT and row.what not in SURROUNDINGS]
    return "\n".join([*lines, f"{repo}: reproduced" if not wrong else f"{repo}: not reproduced: {', '.join(wrong)}"])
