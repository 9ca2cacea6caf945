"""Score the files of the quality ladder, and run the conversion gate."""

from pathlib import Path

from pipeline.config.schema import Config
from pipeline.run.records import Conversion, Scores
from pipeline.scoring import quality_ladder
from pipeline.scoring.backends import LlamaCppBackend, RowScore, TorchBackend, answer_and_score
from pipeline.verify import prompt_parity
from pipeline.verify.gate_error import write_gate_error

Backend = TorchBackend | LlamaCppBackend
COMPARED_ROWS = 8  # held-out rows of which the conversion gate compares every position, besides the golden prompts


class LadderScorer:
    """Scores the files of the quality ladder one by one; the log-probabilities to compare with stay on disk."""

    conversion: Conversion
    reference: quality_ladder.ReferenceLogProbs
    """Both are set by `score_reference`, which is called first."""

    def __init__(self, config: Config, merged_folder: Path, rows: list[dict], folder: Path):
        """Prepare the ladder: `rows` are the held-out rows, `folder` is verify/ of the run."""
        self.config, self.merged_folder, self.rows, self.folder = config, merged_folder, rows, folder
        self.scores: dict[str, Scores] = {}
        self.notes: list[str] = []

    def score_reference(self, path: Path, name: str, trained: prompt_parity.TrainedFormat) -> None:
        """Score the 16-bit GGUF, with which all others are compared, then the merged weights; run the conversion gate.

        Raises:
            UserError: The conversion gate does not pass.
        """
        conversion_check, sixteen_bit_scores = self._score_sixteen_bit(path, name, trained)
        merged_scores = self._score_merged(conversion_check, name, trained)
        self.scores = {"merged": merged_scores, name: sixteen_bit_scores}

    def _score_sixteen_bit(
        self, path: Path, name: str, trained: prompt_parity.TrainedFormat
    ) -> tuple[quality_ladder.ConversionCheck, Scores]:
        """Return the scores of the 16-bit GGUF, and its log-probabilities for the conversion gate."""
        backend = self.open_gguf(path)
        compared_rows = [row["input_ids"] for row in self.rows[:COMPARED_ROWS]]
        token_sequences = [item["ids"] for item in trained.golden] + compared_rows
        conversion_check = quality_ladder.ConversionCheck(self.folder, token_sequences, backend)
        self.reference = quality_ladder.ReferenceLogProbs(
            self.folder, self.rows, backend.model.n_vocab(), self.config.verify.max_positions
        )
        row_scores = self.reference.score_and_store(backend, name)
        scores = self.combine_scores(name, backend, row_scores, {"kl": 0.0, "top1": 1.0}, path)
        backend.model.close()
        return conversion_check, scores

    def _score_merged(
        self, conversion_check: quality_ladder.ConversionCheck, name: str, trained: prompt_parity.TrainedFormat
    ) -> Scores:
        """Return the scores of the merged weights. Raise UserError when the 16-bit GGUF `name` differs from them."""
        merged = self.load_merged(trained)
        self.conversion = conversion_check.compare_merged(merged)
        self.refuse_bad_conversion(name)
        scores = self.combine_scores("merged", merged, *self.reference.score_and_compare(merged, "merged"))
        merged.close()
        return scores

    def refuse_bad_conversion(self, name: str) -> None:
        """Raise UserError when the 16-bit GGUF is too far from the merged weights."""
        conversion, bound = self.conversion, self.config.verify.max_conversion_kl
        if not conversion.kl <= bound:
            raise write_gate_error(
                "conversion",
                f"the {name} GGUF does not compute what the merged weights compute: "
                f"mean KL {conversion.kl:.3g} nats, at most {bound:g}",
                self.folder,
                {"bound": bound, **conversion.model_dump()},
                code="conversion.kl_too_high",
            )

    def load_merged(self, trained: prompt_parity.TrainedFormat) -> TorchBackend:
        """Load the merged weights in Transformers.

        On a GPU they keep their own type, and the part that does not fit is placed in main memory. On a CPU they are
        float32.
        """
        import torch
        from transformers import AutoModelForCausalLM

        has_gpu = torch.cuda.is_available()
        placement = {"dtype": "auto", "device_map": "auto"} if has_gpu else {"dtype": torch.float32}
        # eager, because torch's fused attention leaves out Gemma 2's soft cap
        model = AutoModelForCausalLM.from_pretrained(
            self.merged_folder, attn_implementation="eager", **placement
        ).eval()
        return TorchBackend(model, trained.tokenizer, self.config.evaluate.max_new_tokens, list(trained.end_tokens))

    def open_gguf(self, path: Path) -> LlamaCppBackend:
        """Load a GGUF with the context that will be served: some models compute differently in a longer one.

        One of them is Phi 3, because of its LongRoPE.
        """
        served_context = self.config.generation.num_ctx or self.config.base.max_seq_length
        longest_row = max(len(row["input_ids"]) for row in self.rows) + 64
        return LlamaCppBackend(path, max(served_context, longest_row), self.config.evaluate.max_new_tokens)

    def score_gguf(self, name: str, path: Path) -> None:
        """Score a quantized GGUF and compare it with the 16-bit one."""
        backend = self.open_gguf(path)
        row_scores, distance = self.reference.score_and_compare(backend, name)
        self.scores[name] = self.combine_scores(name, backend, row_scores, distance, path)
        backend.model.close()

    def combine_scores(
        self, name: str, backend: Backend, row_scores: list[RowScore], distance: dict, path: Path | None = None
    ) -> Scores:
        """Return the scores of a backend.

        Args:
            name: The name in the quality ladder.
            backend: The loaded model.
            row_scores: Its row scores.
            distance: {kl, top1}, its difference from the 16-bit GGUF.
            path: Its file, whose size belongs to the scores; None for the merged weights.
        """
        scores, _ = answer_and_score(backend, self.rows, row_scores, self.config.evaluate, name)
        size = {"megabytes": round(path.stat().st_size / 1e6, 1)} if path else {}
        return scores.model_copy(update=distance | size)
