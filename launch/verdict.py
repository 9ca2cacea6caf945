"""Two manifests side by side: equal, within tolerance, or different, and why."""

from dataclasses import dataclass

from contract.manifest import Manifest

EQUAL, WITHIN, DIFFERENT, UNKNOWN, OTHER = "equal", "within tolerance", "different", "not known", "other bits"
LOSS = 0.01  # relative: kernels of another card, or of another run of the same one, add up in another order
NATS = 0.002  # absolute, beside it: a loss near zero is made of few tokens
POINTS = 0.02  # of a score: two of a hundred answers may turn with the loss, or one of fewer
HEADER = 4096  # bytes of a GGUF that say what it is: scores, names, hashes of other digits


@dataclass(frozen=True)
class Row:
    what: str
    published: str
    again: str
    verdict: str
    reason: str = ""


def rows(before: Manifest, after: Manifest) -> list[Row]:
    """What decides, then what explains."""
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
    """The rows that only explain decide nothing."""
    return not any(row.verdict == DIFFERENT for row in found if row.what not in SURROUNDINGS)


def exact(what: str, a, b, reason: str = "") -> Row:
    """None: one of the two does not say."""
    if a is None or b is None:
        return Row(what, _short(a), _short(b), UNKNOWN)
    return Row(what, _short(a), _short(b), EQUAL if a == b else DIFFERENT, "" if a == b else reason)


def near(what: str, a: float | None, b: float | None, relative: float, absolute: float, reason: str) -> Row:
    """Equal as they are printed, or not further apart than the larger of the two tolerances."""
    said = _short(a), _short(b)
    if not (isinstance(a, int | float) and isinstance(b, int | float)):
        return Row(what, *said, UNKNOWN)
    if a == b:
        return Row(what, *said, EQUAL)
    inside = abs(a - b) <= max(relative * abs(a), absolute)
    return Row(what, *said, WITHIN if inside else DIFFERENT, reason)


def code(before: Manifest, after: Manifest) -> list[Row]:
    a, b = (made.provenance.get("git") or {} for made in (before, after))
    row = exact("code", a.get("commit"), b.get("commit"))
    if a.get("dirty") or b.get("dirty"):
        return [
            Row("code", row.published, row.again, UNKNOWN, "the checkout had changes that the commit does not have")
        ]
    return [row]


def data(before: Manifest, after: Manifest) -> list[Row]:
    return [
        exact("training rows", before.dataset.train_sha256, after.dataset.train_sha256),
        exact("held-out rows", before.dataset.split_hash, after.dataset.split_hash),
        exact("base model", before.base.revision, after.base.revision),
    ]


def training(before: Manifest, after: Manifest, reason: str) -> list[Row]:
    a, b = before.training, after.training
    counts = [
        exact(name, a.get(name), b.get(name), reason)
        for name in ("steps", "tokens", "train_batch_size", "learning_rate")
    ]
    return [*counts, near("final loss", a.get("final_loss"), b.get("final_loss"), LOSS, NATS, reason)]


def ladder(before: Manifest, after: Manifest, reason: str) -> list[Row]:
    """Held-out loss and score of every system that one of them has."""
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
    """The default GGUF: its type and its size; its bytes are those of the same weights only."""
    a, b = before.default(), after.default()
    return [
        exact("GGUF", a.quantization, b.quantization, reason),
        exact("its tensors", _types(a.tensor_types), _types(b.tensor_types), reason),
        near("its size", a.bytes, b.bytes, 0, HEADER, "its header holds the scores" if a.bytes != b.bytes else ""),
        bits(a.weights_sha256, b.weights_sha256),
    ]  # fmt: skip


def bits(a: str | None, b: str | None) -> Row:
    """The proof, where it is one: the same weights to the last bit. Other kernels add up in another order, so it decides
    nothing where they differ."""
    row = exact("its weights", a, b)
    return row if row.verdict != DIFFERENT else Row(row.what, row.published, row.again, OTHER)


SURROUNDINGS = ("device", "driver", "platform", "python", "image", "llama.cpp", "locked environment", "packages")


def surroundings(before: Manifest, after: Manifest) -> list[Row]:
    """Where the two were made."""
    a, b = before.provenance, after.provenance
    image = [(made.get("image") or {}).get("sources") or "none" for made in (a, b)]
    packages = [", ".join(f"{k} {v}" for k, v in sorted((made.get("packages") or {}).items())) for made in (a, b)]
    pairs = (
        ("device", before.training.get("device"), after.training.get("device")), ("driver", a.get("driver"), b.get("driver")),
        ("platform", a.get("platform"), b.get("platform")), ("python", a.get("python"), b.get("python")), ("image", *image),
        ("llama.cpp", a.get("llama_cpp"), b.get("llama_cpp")), ("locked environment", str(a.get("lock_sha256")), str(b.get("lock_sha256"))),
        ("packages", *packages),
    )  # fmt: skip
    return [exact(what, one, other) for what, one, other in pairs]


def _types(types: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(types.items()))


def _short(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    text = str(value)
    return text if len(text) <= 26 else f"{text[:12]}..." if " " not in text else f"{text[:23]}..."


def page(found: list[Row], repo: str) -> str:
    """The table, and the verdict in words."""
    widths = [max(len(getattr(row, name)) for row in found) for name in ("what", "published", "again")]
    lines = [f"  {'':<{widths[0]}}  {'published':<{widths[1]}}  {'again':<{widths[2]}}"]
    lines += [
        f"  {row.what:<{widths[0]}}  {row.published:<{widths[1]}}  {row.again:<{widths[2]}}  {row.verdict}{f': {row.reason}' if row.reason else ''}"
        for row in found
    ]
    wrong = [row.what for row in found if row.verdict == DIFFERENT and row.what not in SURROUNDINGS]
    return "\n".join([*lines, f"{repo}: reproduced" if not wrong else f"{repo}: not reproduced: {', '.join(wrong)}"])
