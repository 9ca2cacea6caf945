"""evaluate: the base and the adapter on held-out rows, in torch through Unsloth."""

from pathlib import Path
from typing import TYPE_CHECKING

from contract import files
from pipeline import unsloth
from pipeline.config import Base, Evaluate
from pipeline.record import Run
from pipeline.score import response_positions, score

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

BATCH_TOKENS = 4096  # 1 GB for the demo on a CPU; larger batches were no faster there


def stage(base: Base, rule: Evaluate, run: Run) -> dict:
    """Write evaluate/answers.jsonl (question, reference, before, after) and the record with both scores."""
    rows = files.read_rows(run.output("data", "heldout"))[: rule.max_rows]
    model, tokenizer = unsloth.load(run.output("finetune", "adapter").parent, base)
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    systems = Torch(model, tokenizer, rule.max_new_tokens, run.read("data")["chat"]["end"])
    with model.disable_adapter():
        before = score(rows, rule, systems.answer, systems.loss, "base", BATCH_TOKENS)
    after = score(rows, rule, systems.answer, systems.loss, "adapter", BATCH_TOKENS)
    outputs = write_answers(run.folder / "evaluate" / "answers.jsonl", rows, before, after)
    return run.write(
        "evaluate", ("data", "finetune"), outputs, rule=rule.rule, scores={"base": before, "adapter": after}
    )


class Torch:
    """A torch model as the scorer wants it."""

    def __init__(self, model: "PeftModel", tokenizer: "PreTrainedTokenizerFast", max_new_tokens: int, ends: list[str]):
        """ends: the tokens that end an answer, besides EOS (a chat template may end turns with another one)."""
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.ends = sorted({tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(ends)})
        # generate() hands the last position as a strided view, for which torch copies the head's weights once a row:
        # measured 9.6 s against 4.8 to 5.9 s, and 2.2 GB more, for 40 rows of the demo on a CPU.
        model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))

    def answer(self, prompts: list[list[int]]) -> list[str]:
        """Greedy answers to several prompts at once."""
        import torch

        ids, mask, longest = self._padded(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.ends,
            )
        return [self.tokenizer.decode(self._until_end(row[longest:].tolist())) for row in out]

    def loss(self, rows: list[dict]) -> list[float]:
        """For each row the sum of losses over its response positions."""
        import torch

        ids, mask, longest = self._padded([row["input_ids"] for row in rows])
        with torch.inference_mode():
            # position_ids: padding on the left must not shift a row's positions
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)
            ).logits
        return [self._row_loss(logits[i, longest - len(row["input_ids"]) :], row) for i, row in enumerate(rows)]

    def _row_loss(self, logits: "torch.Tensor", row: dict) -> float:
        """logits: shape (tokens of the row, vocabulary)."""
        import torch

        positions = response_positions(row)
        wanted = torch.tensor([row["input_ids"][p] for p in positions], device=logits.device)
        picked = logits[[p - 1 for p in positions]].float().log_softmax(-1)
        return -picked.gather(1, wanted[:, None]).sum().item()

    def _padded(self, rows: list[list[int]]) -> tuple["torch.Tensor", "torch.Tensor", int]:
        """ids and attention mask, padded on the left, each of shape (rows, longest); and longest."""
        import torch

        longest = max(map(len, rows))
        ids = [[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device), longest

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids))]


def write_answers(path: Path, rows: list[dict], before: dict, after: dict) -> dict[str, Path]:
    """The answers move out of the scores into a file of their own."""
    blank = [None] * len(rows)
    pairs = zip(rows, before.pop("answers", blank), after.pop("answers", blank), strict=True)
    files.write_rows(
        path, [{"prompt": row["prompt"], "reference": row["answer"], "before": b, "after": a} for row, b, a in pairs]
    )
    return {"answers": path}
