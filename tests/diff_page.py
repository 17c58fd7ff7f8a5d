"""`python -m tests.diff_page` writes docs/side_by_side.html, each method's diff from grpo.py with its objective's terms
beside the lines that compute them, the counts in README.md, and the line numbers in the pages' links to functions."""

import ast
import difflib
import re
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
METHODS = ("roma", "vppo", "vgpo", "noisy_grpo")
CONTEXT = 2  # lines that are the same, shown around those that are not
STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#6a6f76;--line:#e4e5e8;--ground:#fff;--panel:#f7f7f8;--link:#2463c7;
--new:#e6f4ea;--old:#fbe9e7}
@media(prefers-color-scheme:dark){:root{--ink:#e4e6e9;--soft:#969ca5;--line:#2e3238;--ground:#15171a;--panel:#1d2024;
--link:#7fb0ff;--new:#16301f;--old:#3a1f1d}}
body{margin:0 auto;max-width:92rem;padding:2rem 1.2rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
a{color:var(--link)}h2{margin-top:3rem}h3{margin:1.6rem 0 .4rem;font-size:1rem}
table{border-collapse:collapse;width:100%;table-layout:fixed}td{vertical-align:top;padding:0 .5rem}
td.number{width:2.4rem;text-align:right;color:var(--soft);font-size:12px;user-select:none}
td.code{font:12.5px/1.5 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
td.term{width:19rem;font-size:13px;color:var(--soft);border-left:1px solid var(--line)}td.term b{color:var(--ink)}
tr.new td.code{background:var(--new)}tr.old td.code{background:var(--old)}tr.same td.code{color:var(--soft)}
tr.gap td{border-top:1px dashed var(--line)}
@media(max-width:50rem){td.term{width:8rem}}
"""


class Line(NamedTuple):
    kind: str  # new, old, same
    number: int  # in the method's script; of `old` in grpo.py
    text: str
    section: str


def text_of(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


def sections(script: str) -> list[str]:
    """For each line of a script the part it belongs to: a section of `main`, a function, `Args`, ..."""
    text = text_of(script)
    found = ["Imports"] * len(text.splitlines())
    for node in ast.parse(text).body:
        lines = range(min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1, node.end_lineno)
        if isinstance(node, ast.Expr):
            name = "What it computes"
        elif isinstance(node, ast.ClassDef):
            name = "Settings"
        elif isinstance(node, ast.FunctionDef):
            name = f"{node.name}()"
        else:
            continue
        for n in lines:
            if name.startswith(("main", "In the loop")) and (
                title := re.match(r" +# === (.+?)(:| ===)", text_line(text, n))
            ):
                name = f"In the loop: {title[1]}"
            found[n] = name
    for n, line in reversed(list(enumerate(text.splitlines()[:-1]))):
        if not line:  # belongs to what it stands before
            found[n] = found[n + 1]
    return found


def text_line(text: str, number: int) -> str:
    return text.splitlines()[number]


def counts(script: str) -> tuple[int, int, int]:
    """Lines of a script, and how many of them `diff grpo.py SCRIPT.py` adds and removes."""
    lines = text_of(script).splitlines()
    kinds = [line.kind for line in difference(script)]
    return len(lines), kinds.count("new"), kinds.count("old")


def difference(script: str) -> list[Line]:
    """All lines of grpo.py and the script in order, as `difflib` matches them."""
    one, other = text_of("grpo").splitlines(), text_of(script).splitlines()
    theirs, ours = sections("grpo"), sections(script)
    found = []
    for how, a, b, c, d in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if how == "equal":
            found += [Line("same", n + 1, other[n], ours[n]) for n in range(c, d)]
        else:
            found += [Line("old", n + 1, one[n], theirs[n]) for n in range(a, b)]
            found += [Line("new", n + 1, other[n], ours[n]) for n in range(c, d)]
    return found


def terms(script: str) -> list[tuple[str, str, list[str]]]:
    """Terms of a method's objective by its page: name, formula, and the names in the code that compute it."""
    objective = (ROOT / f"docs/{script}.md").read_text().partition("## Objective")[2].partition("\n## ")[0]
    found = []
    for term, formula, where in re.findall(r"^\| (.+?) \| (.+) \| (\[.+) \|$", objective, re.M):
        names = [name for name in re.findall(r"\[`(\w+)`\]", where) if name != "main"]
        found.append((term, formula, names or re.findall(r"\b\w+_\w+\b", formula)))
    return found


def notes(line: Line, known: list[tuple[str, str, list[str]]]) -> str:
    """The terms that a line computes: with their formulas where they are defined, by name where they are used."""
    found = []
    for term, formula, names in known:
        for name in names:
            if re.search(rf"\bdef {name}\b", line.text):
                found.append(f"<b>{escape(term)}</b> {escape(formula.replace('`', ''))}")
            elif re.search(rf"\b{name}\(|\bargs\.{name}\b", line.text):
                found.append(f"<b>{escape(term)}</b>")
    return "<br>".join(found) if line.kind != "old" else ""


def method_part(script: str) -> str:
    lines, known = difference(script), terms(script)
    changed = [n for n, line in enumerate(lines) if line.kind != "same"]
    shown = sorted({m for n in changed for m in range(n - CONTEXT, n + CONTEXT + 1) if 0 <= m < len(lines)})
    size, added, removed = counts(script)
    title = ast.get_docstring(ast.parse(text_of(script))).splitlines()[0].partition(" Page:")[0]
    html = (
        f'<h2 id="{script}">{escape(title)}</h2>\n<p><a href="../{script}.py">{script}.py</a>, {size} lines, of which '
    )
    html += f'{added} are not in grpo.py; {removed} of grpo.py are not in it. <a href="{script}.md">Its page</a>.</p>\n'
    # A change belongs to the part that its first line is in, and so do the lines shown around it.
    parts, last = {}, 0
    for n in shown:
        near = min(changed, key=lambda c: abs(c - n))
        section = lines[near].section
        parts.setdefault(section, []).append(
            (lines[n], last is not None and n != last + 1 and bool(parts.get(section)))
        )
        last = n
    for section, rows in parts.items():
        html += f"<h3>{escape(section)}</h3>\n<table>\n"
        for line, gap in rows:
            if gap:
                html += '<tr class="gap"><td></td><td></td><td></td></tr>\n'
            html += f'<tr class="{line.kind}"><td class="number">{line.number}</td><td class="code">'
            sign = {"new": "+", "old": "-", "same": " "}[line.kind]
            html += f'{sign} {escape(line.text)}</td><td class="term">{notes(line, known)}</td></tr>\n'
        html += "</table>\n"
    return html


def page() -> str:
    links = ", ".join(f'<a href="#{script}">{script}.py</a>' for script in METHODS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>What each method adds to grpo.py</title><style>{STYLE}</style></head><body>
<h1>What each method adds to grpo.py</h1>
<p>{links}. Lines that are not in <a href="../grpo.py">grpo.py</a> are marked +, those of grpo.py that a method leaves
out -, and every line that is not shown is the same in both. At the right stand the terms of the objective that a line
computes. Made by <code>python -m tests.diff_page</code> from the scripts and the pages.</p>
{"".join(map(method_part, METHODS))}</body></html>
"""


def readme(text: str) -> str:
    """README.md with the scripts' counts in its table."""
    lines = text.split("\n")
    for script in ("grpo", *METHODS):
        size, added, removed = counts(script)
        (n,) = (n for n, line in enumerate(lines) if line.startswith(f"| `{script}.py` |"))
        cells = lines[n].split(" | ")
        cells[3:5] = [str(size), f"{added} / {removed}" if script != "grpo" else ""]
        lines[n] = " | ".join(cells)
    return "\n".join(lines)


def with_lines(text: str) -> str:
    """A page of docs/ whose links to functions, [`name`](../script.py), lead to the lines where these begin."""

    def link(match: re.Match) -> str:
        begins = re.search(rf"^def {match[1]}\b", text_of(match[2]), re.M)
        number = text_of(match[2])[: begins.start()].count("\n") + 1
        return f"[`{match[1]}`](../{match[2]}.py#L{number})"

    return re.sub(r"\[`(\w+)`\]\(\.\./(\w+)\.py(?:#L\d+)?\)", link, text)


if __name__ == "__main__":
    for script in ("grpo", *METHODS):
        path = ROOT / f"docs/{script}.md"
        path.write_text(with_lines(path.read_text()))
    (ROOT / "docs/side_by_side.html").write_text(page())
    (ROOT / "README.md").write_text(readme((ROOT / "README.md").read_text()))
