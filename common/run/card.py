"""A trained model on the hub: its card is made of what the run's folder holds.

python -m common.run.card --run runs/grpo-tiny-seed1                      # print the card
python -m common.run.card --run runs/grpo-tiny-seed1 --repo owner/name    # upload the newest checkpoint with it
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from common.model.load import newest_checkpoint
from common.run.page import read_lines

SHOWN = ("reward", "accuracy", "eval/accuracy", "completions/mean_length", "entropy", "kl")


@dataclass
class Args:
    run: str
    """run folder"""
    repo: str = ""
    """hub id owner/name to upload to (default: print the card)"""


def card(folder: Path) -> str:
    """The model card of a run: a header that the hub reads, accuracy before and after training, and all settings."""
    settings = json.loads((folder / "args.json").read_text())
    lines = read_lines(folder / "metrics.jsonl")
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").is_file() else {}
    model, script = settings["model"], settings["script"]
    header = ["pipeline_tag: image-text-to-text", "library_name: peft" if settings["lora_rank"] else ""]
    header[1] = header[1] or "library_name: transformers"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists():
        header.append(f"base_model: {model}")
    header += ["tags:", f"- {script}", "- reinforcement-learning"]
    text = ["---", *header, "---", "", f"# {folder.name}", ""]
    text += [f"`{model}` trained by `{script}.py` on `{settings['data']}` for {len(lines)} steps.", ""]
    if evaluated := {name: summary[name] for name in ("before", "after") if name in summary}:
        text += ["| | accuracy | 95 % interval | examples |", "| --- | --- | --- | --- |"]
        for name, r in evaluated.items():
            interval = f"{100 * r['ci_low']:.1f} to {100 * r['ci_high']:.1f}"
            text.append(f"| {name} | {100 * r['accuracy']:.1f} % | {interval} | {r['count']} |")
        text += ["", f"Greedy, on the split `{settings['test_split']}`.", ""]
    if lines:
        found = [(name, value) for name in SHOWN for value in [lines[-1].get(name)] if value is not None]
        text += ["Last step: " + ", ".join(f"{name} {value:.4g}" for name, value in found) + ".", ""]
    text += ["What the model was asked in training:", "", "```", settings["prompt_template"], "```", ""]
    text += ["Settings:", "", "```json", json.dumps(settings, indent=1), "```", ""]
    return "\n".join(text)


def check_hub(repo: str, flag: str = "--push-to-hub") -> None:
    """Stop with one line where `repo`, given as `flag`, cannot be uploaded to, before anything long starts."""
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise SystemExit(f"{flag} {repo}: must be a hub id owner/name")
    try:
        HfApi().whoami()
    except Exception as error:  # not logged in, or whatever the network's layers raise
        line = " ".join(str(error).split())[:160]
        raise SystemExit(f"{flag} {repo}: run `hf auth login` first, where there is a network ({line})") from None


def upload(folder: Path, repo: str) -> str:
    """Upload the newest checkpoint of a run with its card, without the trainer's state; returns a line to say.

    The repository is private where it is new. What goes wrong is said and not raised: the run has ended and is kept.
    """
    from huggingface_hub import HfApi

    checkpoint = newest_checkpoint(str(folder))
    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=checkpoint, ignore_patterns=["trainer.pt", "complete", "README.md"])
        api.upload_file(repo_id=repo, path_or_fileobj=card(folder).encode(), path_in_repo="README.md")
    except Exception as error:  # whatever the hub's client and the network raise
        again = f"python -m common.run.card --run {folder} --repo {repo}"
        return f"--push-to-hub {repo}: not uploaded ({' '.join(str(error).split())[:160]}); again by `{again}`"
    return f"uploaded {checkpoint} to {repo} on the hub"


def main(args: Args) -> None:
    folder = Path(args.run)
    if not (folder / "args.json").is_file():
        raise SystemExit(f"--run {args.run}: no run there (args.json is missing)")
    if args.repo:
        check_hub(args.repo, "--repo")
    print(upload(folder, args.repo) if args.repo else card(folder))


if __name__ == "__main__":
    main(tyro.cli(Args))
