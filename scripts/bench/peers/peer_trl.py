"""TRL as a contestant: GRPOTrainer with generation by transformers (W1, W2), SFTTrainer (W3).

    python peer_trl.py --rows-per-pass 64
    python peer_trl.py --packing wrapped --rows-per-pass 4

Float32, no gradient checkpointing, `beta = 0`, one update per rollout; TRL's other defaults stay.
`--rows-per-pass` is `per_device_train_batch_size`; the rest of a step is gradient accumulation.
"""

import argparse
import tempfile
import time

import torch_model
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from jaxrl_reason.bench.worker import Turns, Work, serve
from jaxrl_reason.bench.workloads import Shape, Workload, documents, prompts, reward, stop_ids

MAX_STEPS = 64


class _Pause(TrainerCallback):
    """Hands each step of a trainer's loop to the driver."""

    def on_train_begin(self, *_, **__):
        self.pause()

    def on_step_end(self, *_, **__):
        self.pause()

    def turns(self, trainer) -> Turns:
        """The steps of a trainer that has this callback."""

        def loop(pause):
            self.pause = pause
            trainer.train()

        return Turns(loop)


def _common(workload: Workload, rows: int, rows_per_pass: int) -> dict:
    if rows % rows_per_pass:
        raise SystemExit(f"--rows-per-pass {rows_per_pass} does not divide {rows} rows a step")
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": rows_per_pass,
        "gradient_accumulation_steps": rows // rows_per_pass,
        "max_steps": MAX_STEPS,
        "learning_rate": 1e-6,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch_model.on_gpu(),
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


class GRPO:
    """One step of GRPOTrainer a repeat: generation, rewards, loss, AdamW."""

    def __init__(self, workload: Workload, shape: Shape, options: argparse.Namespace):
        stops = stop_ids(workload, shape)
        model, tokenizer = torch_model.model(shape), torch_model.tokenizer(shape, stops)
        model.generation_config.eos_token_id = stops or None
        rows = workload.num_completions
        rows_per_pass = min(options.rows_per_pass, rows)
        config = GRPOConfig(
            **_common(workload, rows, rows_per_pass),
            num_generations=workload.num_generations,
            max_completion_length=workload.max_new_tokens,
            num_iterations=1,
            beta=0.0,
            temperature=1.0,
            shuffle_dataset=False,
            use_transformers_continuous_batching=options.continuous_batching,
        )
        texts = [
            " ".join(map(str, prompt))
            for step in range(MAX_STEPS)
            for prompt in prompts(workload, shape, step)
        ]
        self.seen: dict = {}
        callback = _Pause()
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=[self._reward],
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        self.info = torch_model.versions() | {
            "rows_per_pass": rows_per_pass,
            "loss_type": config.loss_type,
            "num_parameters": model.num_parameters(),
        }
        self._time("_generate_single_turn", "rollout")
        self.turns = callback.turns(self.trainer)

    def _reward(self, completion_ids, **_) -> list[float]:
        start = time.perf_counter()
        lengths = [len(ids) for ids in completion_ids]
        self.seen |= {"useful": sum(lengths), "computed": max(lengths) * len(lengths)}
        rewards = [reward(ids) for ids in completion_ids]
        self.seen["rewards"] = time.perf_counter() - start
        return rewards

    def _time(self, method: str, part: str) -> None:
        inner = getattr(self.trainer, method)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            self.seen[part] = time.perf_counter() - start
            return result

        setattr(self.trainer, method, timed)

    def run(self, repeat: int) -> Work:
        """One step."""
        start = time.perf_counter()
        self.turns.step()
        parts = {name: self.seen[name] for name in ("rollout", "rewards")}
        parts["update"] = time.perf_counter() - start - sum(parts.values())
        return Work(
            useful_tokens=self.seen["useful"], computed_tokens=self.seen["computed"], parts=parts
        )


class SFT:
    """One step of SFTTrainer on packed rows a repeat."""

    def __init__(self, workload: Workload, shape: Shape, options: argparse.Namespace):
        rows_per_pass = min(options.rows_per_pass, workload.num_rows)
        model = torch_model.model(shape)
        callback = _Pause()
        self.useful = self.computed = 0
        self.trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **_common(workload, workload.num_rows, rows_per_pass),
                packing=True,
                packing_strategy=options.packing,
                max_length=workload.row_length,
            ),
            train_dataset=Dataset.from_dict(
                {"input_ids": documents(workload, shape, steps=MAX_STEPS)}
            ),
            processing_class=torch_model.tokenizer(shape, []),
            callbacks=[callback],
        )
        self.info = torch_model.versions() | {
            "rows_per_pass": rows_per_pass,
            "packing": options.packing,
            "packed_rows": len(self.trainer.train_dataset),
            "num_parameters": model.num_parameters(),
        }
        inner = self.trainer.training_step

        def counted(model, inputs, *args, **kwargs):
            tokens = inputs["input_ids"].numel()
            mask = inputs.get("attention_mask")
            self.useful += tokens if mask is None else int(mask.sum())
            self.computed += tokens
            return inner(model, inputs, *args, **kwargs)

        self.trainer.training_step = counted
        self.turns = callback.turns(self.trainer)

    def run(self, repeat: int) -> Work:
        """One step."""
        self.useful = self.computed = 0
        self.turns.step()
        return Work(useful_tokens=self.useful, computed_tokens=self.computed)


def main() -> None:
    """Serve the driver."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows-per-pass", type=int, default=8)
    parser.add_argument("--packing", default="bfd", choices=("bfd", "bfd_split", "wrapped"))
    parser.add_argument("--continuous-batching", action="store_true")
    options = parser.parse_args()
    kinds = {"grpo": GRPO, "sft": SFT}
    serve(lambda workload, shape: kinds[workload.kind](workload, shape, options))


if __name__ == "__main__":
    main()
