"""Generation by transformers alone as a contestant: `generate`, or its continuous batching.

python peer_transformers.py --batch 128
python peer_transformers.py --continuous
"""

import argparse

import torch
import torch_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from jaxrl_reason.bench.worker import Work, serve
from jaxrl_reason.bench.workloads import PAD_ID, Shape, Workload, kept_length, prompts, stop_ids


class Generate:
    """All completions of a repeat, sampled at temperature 1 without truncation."""

    def __init__(self, workload: Workload, shape: Shape, options: argparse.Namespace):
        self.workload, self.shape, self.options = workload, shape, options
        self.model = torch_model.model(shape).eval()
        stops = stop_ids(workload, shape)
        self.stops = frozenset(stops)
        self.config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=workload.max_new_tokens,
            eos_token_id=stops or (-1 if options.continuous else None),
            pad_token_id=PAD_ID,
            disable_compile=True,
        )
        self.info = torch_model.versions() | {
            "how": "generate_batch" if options.continuous else f"generate, {options.batch} rows",
            "num_parameters": self.model.num_parameters(),
        }

    def run(self, repeat: int) -> Work:
        """Complete the prompts of the repeat."""
        todo = [
            prompt
            for prompt in prompts(self.workload, self.shape, repeat)
            for _ in range(self.workload.num_generations)
        ]
        if self.options.continuous:
            return self._continuous(todo)
        useful = computed = 0
        for at in range(0, len(todo), self.options.batch):
            completions = self._generate(todo[at : at + self.options.batch])
            useful += sum(kept_length(row, self.stops) for row in completions)
            computed += sum(map(len, completions))
        return Work(useful_tokens=useful, computed_tokens=computed)

    def _generate(self, todo: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, todo))
        left = [[PAD_ID] * (longest - len(prompt)) for prompt in todo]
        rows = [pad + prompt for pad, prompt in zip(left, todo, strict=True)]
        mask = [[0] * len(pad) + [1] * (longest - len(pad)) for pad in left]
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=torch.tensor(rows, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                generation_config=self.config,
            )
        return out[:, longest:].tolist()

    def _continuous(self, todo: list[list[int]]) -> Work:
        outputs = self.model.generate_batch(
            todo,
            generation_config=self.config,
            continuous_batching_config=ContinuousBatchingConfig(
                max_memory_percent=self.options.memory
            ),
            progress_bar=False,
        )
        rows = [output.generated_tokens for output in outputs.values()]
        if len(rows) != len(todo):
            raise RuntimeError(f"{len(rows)} of {len(todo)} requests came back")
        useful = sum(kept_length(row, self.stops) for row in rows)
        return Work(useful_tokens=useful, computed_tokens=sum(map(len, rows)))


def main() -> None:
    """Serve the driver."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=128, help="rows in one call of generate")
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--memory", type=float, default=0.1, help="share of memory for the cache")
    options = parser.parse_args()
    serve(lambda workload, shape: Generate(workload, shape, options))


if __name__ == "__main__":
    main()
