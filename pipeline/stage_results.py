"""Run each stage and show what came of it, in at most 80 columns."""

from collections.abc import Callable

from common import console
from contract import files
from pipeline.record import Run
from pipeline.score import describe_interval


def run_data(run: Run, processes: str | None = None) -> None:
    from pipeline.data import report
    from pipeline.data import stage as data

    record = data.stage(run.config(), run, int(processes) if processes else None)
    for warning in record["warnings"]:
        console.note(warning)
    console.show(report.table(record))


def run_finetune(run: Run) -> None:
    from pipeline.finetune import stage as finetune

    config = run.config()
    record = finetune.stage(config.base, config.finetune, run)
    console.show(
        f"  {record['steps']:,} steps in {console.format_duration(record['seconds'])}, final loss {record['final_loss']:.4f}, "
        f"peak memory {record['peak_memory_gb']} GB\n  on {record['device']}"
    )


def run_evaluate(run: Run) -> None:
    from pipeline import evaluate, ladder

    record = evaluate.stage(run.config(), run)
    console.show(f"{console.wrap(record['used'], 2)}\n{ladder.format_for_terminal(record['scores'])}")
    console.show(format_samples(files.read_rows(run.output("evaluate", "answers"))))
    if record["training"]["warning"]:
        console.note(record["training"]["warning"])


def format_samples(answers: list[dict], count: int = 3) -> str:
    """The first answers before and after training, whole."""
    lines = []
    for row in answers[:count]:
        lines += ["", *console.quote("> ", row["question"]), *console.quote("before  ", row["before"])]
        lines += console.quote("after   ", row["after"])
        lines += console.quote("wanted  ", row["reference"]) if row["reference"] != row["after"] else []
    return "\n".join(lines)


def run_export(run: Run) -> None:
    from pipeline.export import stage as export

    outputs = export.stage(run.config(), run)["outputs"]
    console.show("\n".join(f"  {name:<16}{item['bytes'] / 1e6:>10,.1f} MB" for name, item in outputs.items()))


def run_verify(run: Run) -> None:
    from pipeline import ladder
    from pipeline.verify import stage as verify

    record = verify.stage(run.config(), run)
    for text in record["notes"]:
        console.note(text)
    console.show(console.wrap(record["used"], 2))
    console.show(ladder.format_for_terminal(run.read("evaluate")["scores"] | record["scores"]))
    console.show("\n".join(console.wrap(line) for line in describe_gates(record)))


def describe_gates(record: dict) -> list[str]:
    """What verify has shown, a line a gate."""
    conversion = record["conversion"]
    template = "derived, equal on all golden conversations"
    if record["template"] != "derived":
        template = f"the one inside the GGUF; {'; '.join(record['reasons'])}"
    parity = "Transformers, llama.cpp's server and every file agree on all golden conversations, text and token ids"
    positions = (
        f"{conversion['positions']} positions of the merged weights in torch and {record['sixteen']} in llama.cpp"
    )
    return [
        f"prompts     {parity}",
        f"conversion  mean KL {conversion['kl']:.2g} nats over {positions}, same top-1 {conversion['top1']:.1%}",
        f"TEMPLATE    {template}",
        f"default     {record['default']}",
        f"as served   {describe_served(record['as_served'])}",
    ]


def describe_served(served: dict) -> str:
    """How the default file answers with the prompts that runtimes send."""
    if served["same_prompts"] == served["rows"]:
        return f"runtimes send the prompts that were scored, all {served['rows']}"
    result = describe_interval(served) if "score" in served else f"held-out loss {served['loss']:.3f}"
    other = served["rows"] - served["same_prompts"]
    return f"{result}; runtimes send another prompt than the row's for {other} of {served['rows']}"


def run_publish(run: Run) -> None:
    from pipeline.publish import stage as publish

    record = publish.stage(run.config(), run)
    console.show(f"  {published_name(record)}\n  on your Mac: make deploy-mac REPO={published_name(record)}")


def published_name(record: dict) -> str:
    """What `make deploy-mac REPO=` takes."""
    return f"{record['repo']}@{record['tag']}" if "tag" in record else record["repo"]


RUN: dict[str, Callable[..., None]] = {
    "data": run_data, "finetune": run_finetune, "evaluate": run_evaluate, "export": run_export, "verify": run_verify,
    "publish": run_publish,
}  # fmt: skip
