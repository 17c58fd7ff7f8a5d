"""docs/settings.md from the settings' own lines: `python -m tests.settings_page` writes it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ["common/run/settings.py", "grpo.py", "roma.py", "vppo.py", "vgpo.py", "noisy_grpo.py"]
FILES += [f"common/evaluation/{name}.py" for name in ("__main__", "look", "probes", "gradients", "study")]
FILES += ["common/run/plot.py", "common/run/card.py", "common/corruptions.py", "common/tiny/recipe.py"]


def rows(file: str) -> list[str]:
    """A table row for each field of the file's settings: flag, default, and the comment or docstring behind it."""
    text = (ROOT / file).read_text()
    lines = text.splitlines()
    body = next(n.body for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name in ("Args", "Settings"))
    found = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            reason = after.value.value if doc else lines[node.end_lineno - 1].partition("  # ")[2]
            default = ast.unparse(node.value) if node.value else "required"
            cells = f"`--{node.target.id.replace('_', '-')}`", f"`{default}`", " ".join(reason.split())
            found.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return found


def page() -> str:
    text = "# Settings\n\nMade by `python -m tests.settings_page` from the code.\n"
    for file in FILES:
        text += f"\n## {file}\n\n| flag | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows(file)) + "\n"
    return text


if __name__ == "__main__":
    (ROOT / "docs/settings.md").write_text(page())
