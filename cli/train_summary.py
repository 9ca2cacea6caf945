"""The summary that `make train` ends with: time, cost, scores, files, and the next command."""

from common import console
from pipeline.plan import gpu_table
from pipeline.run.records import EvaluateRecord, FinetuneRecord, PublishRecord, Scores, VerifyRecord
from pipeline.run.run_folder import STAGES, Run


def summarize(run: Run) -> str:
    """Return the summary of a finished run."""
    publish, verify = run.read_record(PublishRecord), run.read_record(VerifyRecord)
    evaluate, default = run.read_record(EvaluateRecord), publish.default
    lines = [
        ("time", describe_time(run)),
        ("score", describe_score(evaluate.scores | verify.scores, verify.default, evaluate.rule)),
        ("file", f"{default['file']}, {default['bytes'] / 1e6:,.1f} MB"),
        ("hub", publish.repo_with_tag),
        ("logs", str(run.log_file("data").parent)),
        ("next", f"make deploy-mac REPO={publish.repo_with_tag}"),
    ]
    return "\n".join(
        ["", f"{run.model_name} is trained", *(console.wrap_text(f"  {name:<8}{text}", 10) for name, text in lines)]
    )


def describe_time(run: Run) -> str:
    """Return how long each stage took, and what a GPU like this one costs for that time."""
    seconds = {stage: run.read_stage_record(stage).seconds for stage in STAGES}
    parts = ", ".join(f"{stage} {console.format_duration(value)}" for stage, value in seconds.items())
    total = sum(seconds.values())
    _, price = gpu_table.find_speed_and_price(run.read_record(FinetuneRecord).device)
    cost = f", about ${total / 3600 * price:.2f}" if price else ""
    return f"{console.format_duration(total)}{cost} ({parts})"


def describe_score(scores: dict[str, Scores], default: str, rule: str) -> str:
    """Return the scores of the base model and of the result, by the task's rule or as held-out loss."""
    before, after = scores["base"], scores[default]
    change = f"held-out loss {before.loss:.3f} -> {after.loss:.3f}"
    if after.score is not None:
        change = f"{before.score:.0%} -> {after.score:.0%} of {after.rows} held-out rows right ({rule})"
    return f"{change}, {default} in llama.cpp"
