"""A model card from a run's files, and what goes to the hub with it."""

import json

import pytest

import grpo
from common.run.card import Args, card, main
from common.run.settings import parse
from tests.test_training import train


class Hub:
    """In place of the hub's client: what it was asked to do."""

    asked, error = [], None

    def whoami(self):
        if self.error:
            raise self.error

    def __getattr__(self, name):
        return lambda *args, **settings: self.asked.append((name, args, settings))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    return Hub


def test_a_run_uploads_its_last_checkpoint_with_a_card(hub, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    train(folder, "--steps", "1", "--test-examples", "4", "--push-to-hub", "me/mine")
    (made, repo, settings), (uploaded, _, what), (_, _, text) = hub.asked
    assert (made, repo, settings["private"]) == ("create_repo", ("me/mine",), True)
    assert uploaded == "upload_folder" and what["folder_path"] == str(folder / "checkpoints/step-000001")
    assert "trainer.pt" in what["ignore_patterns"] and text["path_in_repo"] == "README.md"
    written = text["path_or_fileobj"].decode()
    assert written == card(folder) and "uploaded" in capsys.readouterr().out

    after = json.loads((folder / "summary.json").read_text())["after"]
    assert f"| after | {100 * after['accuracy']:.1f} % |" in written and "| 4 |" in written
    _, header, body = written.split("---\n", 2)
    assert "library_name: transformers" in header and "base_model" not in header, "the built-in model is not on the hub"
    settings = json.loads(body.split("```json\n")[1].split("```")[0])
    assert settings["push_to_hub"] == "me/mine" and settings["script"] == "grpo"

    main(Args(run=str(folder)))
    assert capsys.readouterr().out == written + "\n"
    monkeypatch.setattr(hub, "create_repo", lambda self, *a, **k: (_ for _ in ()).throw(ConnectionError("gone")), False)
    main(Args(run=str(folder), repo="me/mine"))
    with pytest.raises(SystemExit, match=r"^--repo mine: must be a hub id owner/name"):
        main(Args(run=str(folder), repo="mine"))
    assert f"not uploaded (gone); again by `python -m common.run.card --run {folder} --repo me/mine`" in (
        capsys.readouterr().out
    )


def test_a_run_that_could_not_upload_does_not_begin(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "error", OSError("no token"))
    with pytest.raises(SystemExit, match=r"--push-to-hub me/mine: run `hf auth login` first, .* \(no token\)"):
        train(tmp_path / "run", "--push-to-hub", "me/mine")
    with pytest.raises(SystemExit, match="--push-to-hub mine: must be a hub id owner/name"):
        train(tmp_path / "run", "--push-to-hub", "mine")
    assert not (tmp_path / "run").exists() and parse(grpo.Args, []).push_to_hub == ""
