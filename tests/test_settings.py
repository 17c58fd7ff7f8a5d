"""What a run takes from its model, from the run that it continues, and from the command line."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

import grpo
import noisy_grpo
from common.model.load import TINY, is_tiny
from common.run.checkpoints import settings_of
from common.run.settings import command_line, launch, parse
from tests.small_models import small_folder


def folder_of_a_run(folder: Path, *steps: int, settings: grpo.Args | None = None) -> str:
    """A run's folder with checkpoints of the built-in model, as far as settings look at them."""
    for step in steps:
        checkpoint = folder / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        shutil.copy(TINY / "config.json", checkpoint)
        (checkpoint / "complete").write_text("{}")
    held = {"script": "grpo", **asdict(settings or grpo.Args())}
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text(json.dumps(held))
    return str(folder)


def test_what_was_trained_from_the_built_in_model_gets_its_defaults(tmp_path):
    run = folder_of_a_run(tmp_path / "run", 2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(TINY)}))
    for model in (f"{run}/checkpoints/step-000002", run, str(adapter), str(TINY)):
        args = grpo.Args(model=model)
        assert (args.data, args.learning_rate, args.max_completion_length) == ("puzzles", 3e-5, 72), model
        assert args.prompt_template == grpo.Args().prompt_template
    assert settings_of(str(adapter))["max_completion_length"] == 72


def test_a_model_is_not_the_built_in_one_for_its_name(tmp_path):
    other = tmp_path / "tiny"
    shutil.copytree(small_folder("qwen3_vl"), other)
    args = grpo.Args(model=str(other))
    assert (args.data, args.learning_rate, args.max_completion_length) == ("hiyouga/geometry3k", 1e-6, 2048)
    (other / "config.json").write_text("[]")
    assert not is_tiny(str(other)) and not is_tiny("Qwen/Qwen3-VL-4B")


def test_a_run_as_model_is_its_newest_checkpoint(tmp_path):
    run = folder_of_a_run(tmp_path / "run", 100, 20)
    copy = tmp_path / "run" / "checkpoints" / "step-000300 copy"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000100", copy)
    assert grpo.Args(model=run).model.endswith("step-000100"), "a copied folder is not of the run"
    with pytest.raises(SystemExit, match=r"--model .*begun: the run has no complete checkpoint yet"):
        grpo.Args(model=folder_of_a_run(tmp_path / "begun"))


def test_a_run_is_continued_by_its_own_settings(tmp_path):
    began = noisy_grpo.Args(steps=700, learning_rate=0.0, noise_levels=(0.0, 0.2), anneal=True, out="elsewhere")
    run = folder_of_a_run(tmp_path / "run", settings=began)
    args = parse(noisy_grpo.Args, ["--resume", run])
    assert asdict(args) == {**asdict(began), "resume": run, "out": ""}, "where it lies now, it goes on"
    given = parse(noisy_grpo.Args, ["--resume", run, "--steps", "800", "--no-anneal", "--noise-levels", "0.1"])
    assert (given.steps, given.anneal, given.noise_levels, given.learning_rate) == (800, False, (0.1,), 0.0)


@pytest.mark.parametrize(
    ("held", "line"),
    [
        (None, "no run there (args.json is missing)"),
        ("", "it is not JSON"),
        ('{"steps": 3', "it is not JSON"),
        ("[1, 2]", "it holds no settings"),
        ('{"steps": "many"}', "args.json is damaged (steps is 'many')"),
        ('{"temperature": null}', "args.json is damaged (temperature is None)"),
        ("[" * 10_000, "it is not JSON"),
    ],
)
def test_a_run_that_cannot_be_read_is_one_line(held, line, tmp_path):
    if held is not None:
        (tmp_path / "args.json").write_text(held)
    with pytest.raises(SystemExit) as error:
        parse(grpo.Args, ["--resume", str(tmp_path)])
    assert str(error.value).startswith(f"--resume {tmp_path}: ") and line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_second_interrupt_is_a_line_with_the_shell_s_exit_code(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["grpo.py"])
    for call in (lambda: launch(interrupted, grpo.Args), lambda: command_line(interrupted, grpo.Args)):
        with pytest.raises(SystemExit) as end:
            call()
        said = capsys.readouterr().err
        assert end.value.code == 130 and said.startswith("interrupted") and said.count("\n") == 1
