"""A whole training by grpo.py and by TRL's GRPOTrainer: wall time, time to an accuracy, and both accuracies.

    python -m tests.benchmarks.whole_run --folder runs/against-trl --steps 300

The same built-in model, puzzles in the same order, reward, batch, learning rate and steps, on the CPU, one side after
the other; what is timed is the training, without loading. Time to an accuracy is that after which the mean of the last
ten steps' sampled accuracy is at least `--target`; at the end both models answer the same held-out puzzles greedily.

TRL gets an environment of its own in the folder; --trl-python names one that is there. Its processor is one of pictures
only: that of videos wants torchvision, built for the very torch that is there. Only puzzles whose prompts have one
length are taken, since TRL 1.16 with transformers 5.24 ends in its first step where questions of Qwen3-VL have several.
Vision tokens, which grpo.py never samples, are suppressed for TRL by hand.

Beside wall time stands the processor's for the whole command, which other work on the machine changes less.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from common.data.examples import load_examples
from common.data.messages import TEMPLATE
from common.data.prompts import batch_indices
from common.model.load import TINY, VISION_TOKENS, load_policy
from common.rewards.answers import score
from common.rewards.designs import REQUEST
from grpo import Args

ROOT = Path(__file__).parents[2]
WINDOW = 10  # steps whose mean accuracy is looked at


@dataclass
class Options:
    folder: Path
    """for data, models and TRL's environment"""
    steps: int = 300
    prompts: int = 8
    group: int = 8
    target: float = 0.6
    """sampled accuracy"""
    examples: int = 1000
    """puzzles to train on"""
    test_examples: int = 300
    threads: int = 1
    seed: int = 1
    trl_python: str = ""
    """interpreter that has trl (default: made in the folder)"""
    trl_only: bool = False
    """what that interpreter is started with"""


def write_puzzles(options: Options) -> None:
    """Puzzles of the commonest prompt length, as a data set in `folder`/data."""
    from common.data.lengths import prompt_length

    policy, data = load_policy("tiny"), options.folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", options.examples), ("test", options.test_examples)):
        by_length, length = defaultdict(list), 0
        for number, example in enumerate(load_examples("puzzles", split)):
            found = by_length[prompt_length(policy, example, TEMPLATE)]
            found.append((number, example))
            if len(found) == count:
                break
        length = max(by_length, key=lambda n: len(by_length[n]))
        rows = []
        for number, e in by_length[length]:
            e.images[0].save(data / f"{split}-{number}.png")
            rows.append({"image": f"{split}-{number}.png", "question": e.question, "answer": e.answer, "kind": e.kind})
        print(f"{split}: {len(rows)} puzzles whose prompts have {length} tokens", flush=True)
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(command: list[str], options: Options) -> float:
    """Seconds of the processor that a command takes, with as many threads as both sides have."""
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, env=os.environ | threads, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train_here(options: Options) -> tuple[list[float], list[float], float]:
    """Seconds and sampled accuracies of each step of grpo.py, and the processor's seconds."""
    out = options.folder / "grpo"
    shutil.rmtree(out, ignore_errors=True)
    flags = f"--steps {options.steps} --prompts-per-step {options.prompts} --group-size {options.group} --eval-every 0"
    flags += f" --test-examples 0 --save-every {options.steps} --no-preflight --seed {options.seed}"
    command = [sys.executable, "grpo.py", "--data", str(options.folder / "data"), "--out", str(out), *flags.split()]
    processor = run(command, options)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines], [line["accuracy"] for line in lines], processor


def train_trl(options: Options) -> None:
    """In TRL's environment: train, and write seconds and accuracies of each step, and the weights."""
    from datasets import Dataset, Image
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil, TrainerCallback
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    train, usual = load_examples(str(options.folder / "data"), "train"), Args()
    numbers = [
        n for step in range(options.steps) for n in batch_indices(options.seed, step, options.prompts, len(train))
    ]
    files = [json.loads(line)["image"] for line in (options.folder / "data/train.jsonl").read_text().splitlines()]
    rows = []
    for n in numbers:
        text = train[n].question.replace("<image>", "") + "\n\n" + REQUEST
        rows.append(
            {
                "prompt": [{"role": "user", "content": text}],
                "image": str(options.folder / "data" / files[n]),
                "number": n,
            }
        )
    data = Dataset.from_list(rows).cast_column("image", Image())
    seconds, accuracies = [], []

    def reward(completions, number, **_):
        texts = [completion[0]["content"] for completion in completions]
        right, _ = score(texts, [train[n] for n in number])
        accuracies.append(sum(right) / len(right))
        return right

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)

    class Processor(Qwen3VLProcessor):  # what it is made of is read from the names here
        def __init__(self, image_processor, tokenizer, chat_template=None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    processor = Processor(Qwen2VLImageProcessorPil.from_pretrained(TINY), tokenizer, tokenizer.chat_template)
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    batch = options.prompts * options.group
    config = GRPOConfig(
        output_dir=str(options.folder / "trl-out"), max_steps=options.steps, per_device_train_batch_size=batch,
        num_generations=options.group, max_completion_length=usual.max_completion_length, shuffle_dataset=False,
        learning_rate=usual.learning_rate, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, beta=0.0,
        temperature=1.0, top_p=1.0, top_k=0, epsilon=usual.clip_low, epsilon_high=usual.clip_high, loss_type="dapo",
        scale_rewards="group", optim="adamw_torch_fused", use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to=[], save_strategy="no", seed=options.seed, disable_tqdm=True, logging_steps=options.steps,
        generation_kwargs={"suppress_tokens": tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=data,
        processing_class=processor,
        callbacks=[Clock()],
    )
    trainer.train()
    shutil.copytree(TINY, options.folder / "trl", dirs_exist_ok=True)
    model.save_pretrained(options.folder / "trl")
    (options.folder / "trl.json").write_text(json.dumps([seconds, accuracies]))


def make_environment(options: Options) -> str:
    """An interpreter with TRL and what this project needs, in the folder; taken again where it is there."""
    python = options.folder / "venv/bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", options.folder / "venv"], check=True)
        packages = ["trl", "-r", "requirements.txt"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], cwd=ROOT, check=True)
    return str(python)


def time_to(target: float, seconds: list[float], accuracies: list[float]) -> str:
    """
    >>> time_to(0.5, [2.0] * 12, [0.0] * 6 + [1.0] * 6)
    '22 s'
    """
    for step in range(WINDOW, len(accuracies) + 1):
        if sum(accuracies[step - WINDOW : step]) / WINDOW >= target:
            return f"{sum(seconds[:step]):.0f} s"
    return "never"


def main(options: Options) -> None:
    options.folder = options.folder.resolve()
    if options.trl_only:
        return train_trl(options)
    from common.evaluation.accuracy import evaluate

    torch.set_num_threads(options.threads)
    write_puzzles(options)
    found = {"grpo.py": train_here(options)}
    python = options.trl_python or make_environment(options)
    flags = [
        f"--{name}={getattr(options, name)}" for name in ("folder", "steps", "prompts", "group", "threads", "seed")
    ]
    command = [python, "-m", "tests.benchmarks.whole_run", "--trl-only", *flags]
    processor = run(command, options)
    found["TRL"] = (*json.loads((options.folder / "trl.json").read_text()), processor)
    models = {"grpo.py": sorted((options.folder / "grpo/checkpoints").iterdir())[-1], "TRL": options.folder / "trl"}
    test = load_examples(str(options.folder / "data"), "test")
    asked = {"template": TEMPLATE.replace("{request}", REQUEST), "max_new_tokens": Args().max_completion_length}
    columns = f"{'seconds':>9}{'processor':>11}{'a step':>8}"
    columns += f"{f'to {options.target:.0%}':>9}{'sampled, last steps':>21}"
    print(f"{'':10}{columns}{'held out, greedy':>18}")
    for name, (seconds, accuracies, processor) in found.items():
        result = evaluate(load_policy(str(models[name])), test, **asked)
        last = accuracies[-WINDOW:]
        print(
            f"{name:10}{sum(seconds):9.0f}{processor:11.0f}{sorted(seconds)[len(seconds) // 2]:8.2f}"
            f"{time_to(options.target, seconds, accuracies):>9}{sum(last) / len(last):21.1%}{result['accuracy']:18.1%}"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
