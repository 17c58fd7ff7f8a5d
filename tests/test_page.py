"""The page of a run: whole, bounded, and safe to open whatever a model or a data set has written."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.run.cost import cost_card
from common.run.page import Args, charts, keep_pictures, main, page, smoothed, thinned, ticks, write_page
from common.run.rates import measure
from tests.small_models import picture

VOID = {"meta", "img", "path", "polyline", "circle"}


class Reader(HTMLParser):
    """Elements with their attributes, and the text, of a page; elements must be closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.text.append(text)


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def metrics(steps: int) -> list[dict]:
    return [
        {
            "step": step, "reward": 0.5 + 0.3 * math.sin(step), "accuracy": 0.5, "completions/mean_length": 40.0,
            "entropy": None if step % 7 == 0 else 0.5, "kl": 0.0, "grad_norm": 0.3, "seconds": 2.0,
            "seconds/sample": 1.5, "tokens_per_second": 5000.0, "cost/scored_tokens": 10, "cost/sampled_tokens": 5,
            **({"eval/accuracy": 0.4} if step % 100 == 99 else {}),
        }
        for step in range(steps)
    ]  # fmt: skip


def write_run(folder: Path, steps: int = 40, completion: str = "<answer>7</answer>", group: int = 4, **row) -> Path:
    """A run folder whose every tenth step has completions with a picture."""
    folder.mkdir()
    args = {"script": "grpo", "model": "tiny", "data": "puzzles", "steps": steps}
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "metrics.jsonl").write_text(lines_of(metrics(steps)))
    rows = []
    for step in range(0, steps, 10):
        names = keep_pictures(folder, step, [picture(64, 48, step)])
        base = {"step": step, "question": f"<image>How many at step {step}?", "answer": "7", "reward": 1.0}
        rows += [base | {"completion": completion, "advantage": -0.5, "pictures": names} | row for _ in range(group)]
    (folder / "completions.jsonl").write_text(lines_of(rows))
    remark = {"step": 12, "rule": "no_variance", "text": "Half of it. Pass --group-size 16."}
    (folder / "remarks.jsonl").write_text(lines_of([remark]))
    return folder


def test_a_page_shows_curves_remarks_completions_cost_and_configuration(tmp_path):
    folder = write_run(tmp_path / "grpo-tiny-seed1", terms={"think": 0.12})
    write_page(folder)
    reader = Reader((folder / "index.html").read_text())
    text = " ".join(" ".join(reader.text).split())
    for part in ("grpo-tiny-seed1", "40 of 40 steps in 1 min 20 s", "Half of it. Pass --group-size 16.", "step 12"):
        assert part in text, part
    for part in ("How many at step 30?", "reference 7", "advantage -0.50", "think 0.12", "tokens scored", "puzzles"):
        assert part in text, part
    tags = [tag for tag, _ in reader.elements]
    assert tags.count("details") == 4 and tags.count("img") == 4 and "script" not in tags
    titles = re.findall(r"<figcaption><b>(.*?)</b>", (folder / "index.html").read_text())
    assert any("Reward" in t for t in titles) and not any("Divergence" in t for t in titles)  # kl is 0 throughout


def test_a_page_needs_no_network(tmp_path):
    reader = Reader(page(write_run(tmp_path / "run")))
    links = [v for _, a in reader.elements for k, v in a.items() if k in ("src", "href", "srcset", "action", "data")]
    assert links and all(link.startswith("data:image/") for link in links)
    assert "url(" not in (Path(__file__).parents[1] / "common" / "run" / "page.css").read_text()


HOSTILE = (
    "</div></li></ol><script>alert(1)</script><img src=x onerror=alert(1)>\"'><style>*{display:none}</style>"
    "<!-- --><![CDATA[ &lt;b&gt; &#x3c;script&#x3e; \x00 \u202e \ud800 ]]>"
)


@pytest.mark.parametrize("where", ["completion", "question", "answer", "tokens", "terms", "rule", "setting", "metric"])
def test_what_models_and_data_write_is_text(where, tmp_path):
    plain, hostile = write_run(tmp_path / "plain"), write_run(tmp_path / "hostile")
    rows = [json.loads(line) for line in (hostile / "completions.jsonl").read_text().splitlines()]
    if where in ("completion", "question", "answer"):
        rows = [row | {where: HOSTILE} for row in rows]
    if where == "tokens":
        rows = [row | {"tokens": [HOSTILE, "b"], "dependency": [1.0, 0.0]} for row in rows]
    if where == "terms":
        rows = [row | {"terms": {HOSTILE: 1.0}} for row in rows]
    (hostile / "completions.jsonl").write_text(lines_of(rows))
    if where == "rule":
        (hostile / "remarks.jsonl").write_text(lines_of([{"step": 3, "rule": HOSTILE, "text": HOSTILE}]))
    if where == "setting":
        (hostile / "args.json").write_text(json.dumps({"model": HOSTILE, "script": HOSTILE, HOSTILE: HOSTILE}))
    if where == "metric":
        named = [line | {f"rewards/{HOSTILE}/mean": 0.1, "rewards/b/mean": 0.5} for line in metrics(40)]
        (hostile / "metrics.jsonl").write_text(lines_of(named))
    write_page(hostile)  # which must be UTF-8
    reader, expected = Reader((hostile / "index.html").read_text()), Reader(page(plain))
    tags = {tag for tag, _ in reader.elements}
    assert tags <= {tag for tag, _ in expected.elements} | {"i", "p", "span"}
    assert not any(name.startswith("on") for _, attributes in reader.elements for name in attributes)
    assert "</div></li>" in "".join(reader.text)


def test_a_picture_is_only_taken_from_the_run(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = write_run(tmp_path / "run", pictures=["../secret.png", "../../secret.png", 7, "/etc/passwd", "no.png"])
    assert not [tag for tag, _ in Reader(page(folder)).elements if tag == "img"]


def test_a_page_of_a_long_run_with_long_completions_stays_small(tmp_path):
    """2,000 steps; of 40 there are 9 completions of 60,000 characters with coloured tokens, and a large picture."""
    folder = write_run(tmp_path / "run", 2000)
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    long = {"completion": "word " * 12_000, "tokens": ["word "] * 12_000, "focus": [0.1, 0.9] * 6_000}
    rows = [row | long for row in rows[::20] for _ in range(9)]
    (folder / "completions.jsonl").write_text(lines_of(rows))
    photo = Image.effect_noise((2000, 1500), 90)
    size = sum((folder / "pictures" / name).stat().st_size for name in keep_pictures(folder, 0, [photo]))
    assert size < 100_000
    text = page(folder)
    assert len(text) < 6_000_000
    reader = Reader(text)
    assert [tag for tag, _ in reader.elements].count("details") == 24
    points = [len(a["points"].split()) for tag, a in reader.elements if tag == "polyline"]
    assert max(points) <= 240


def test_a_run_that_just_began_or_that_is_torn_has_a_page(tmp_path):
    folder = write_run(tmp_path / "run", 1)
    assert "1 of 1 steps" in page(folder)
    for name in ("metrics.jsonl", "completions.jsonl", "remarks.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 1, "rew')
    (folder / "summary.json").write_text("{")
    assert "under way" in page(folder)
    for name in ("metrics.jsonl", "completions.jsonl", "remarks.jsonl"):
        (folder / name).unlink()
    Reader(page(folder))


def test_the_command_makes_the_page_of_any_run(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    main(Args(str(folder)))
    assert (folder / "index.html").is_file() and "index.html" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no run there"):
        main(Args(str(tmp_path)))


def test_curves_are_drawn_where_their_values_are():
    lines = [{"step": step, "reward": value} for step, value in enumerate([0.0, 1.0, 0.5])]
    drawn = charts(lines, [{"step": 1}])
    (points,) = re.findall(r"<polyline class=s0 points='(.*?)'", drawn)
    xs, ys = zip(*(map(float, point.split(",")) for point in points.split()), strict=True)
    assert xs[1] - xs[0] == xs[2] - xs[1] > 0
    assert ys[0] - ys[1] == pytest.approx(2 * (ys[0] - ys[2])) and ys[1] < ys[0]
    assert f"<path class=mark d='M{xs[1]:.1f} " in drawn  # the remark stands at its step


def test_thinned_and_smoothed_curves_keep_their_level():
    points = [(float(x), float(x % 2)) for x in range(1000)]
    assert len(thinned(points)) <= 240 and thinned(points[:100]) == points[:100]
    assert all(y == pytest.approx(0.5, abs=0.1) for _, y in smoothed(points))
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1] and ticks(-0.2, 0.1) == [-0.2, -0.1, 0, 0.1]


def test_pictures_are_kept_small_and_sharp_where_they_are_drawn(tmp_path):
    drawn = Image.new("RGB", (128, 128), "white")
    assert keep_pictures(tmp_path, 7, [drawn, picture(900, 300, 0)]) == ["000007-0.png", "000007-1.jpg"]
    assert Image.open(tmp_path / "pictures" / "000007-1.jpg").size == (320, 107)
    assert drawn.size == (128, 128)


def test_the_cost_card_adds_up():
    lines = [
        {"seconds": 2.0, "seconds/sample": 1.5, "cost/scored_tokens": 300, "cost/sampled_tokens": 100, "cost/rows": 8,
         "cost/repeated_rows": 2, "cost/forwards": 3, "cost/images": 4, "memory_gib": peak}
        for peak in (1.0, 1.25)
    ]  # fmt: skip
    card = cost_card(lines)
    assert card["time in steps"] == "4.0 s (2 s a step)" and card["— sample"] == "3.0 s (75%)"
    assert card["tokens sampled"] == "200 (50 a second)"
    assert card["tokens scored"] == "600 (3.00 a sampled one)"
    assert card["completions scored"] == "16, 4 as copies"
    assert card["forwards"] == "6 (3 a step)" and card["memory at most"] == "1.25 GiB a process"
    machine = {
        "processes": 2,
        "operations": 1e6,
        "operations_a_token": 6000,
        "bytes": 1e5,
        "bytes_a_decoding_step": 500,
    }
    steps = [{**line, "seconds/update": 0.5, "cost/trained_tokens": 40, "cost/decode_steps": 30} for line in lines]
    card = cost_card(steps, machine)
    # 80 tokens of 6,000 operations on two devices in 1 s; 60 steps of 500 bytes on two in 3 s.
    assert card["operations in update"] == "0.00024 G a second, 24.0% of a matrix product's"
    assert card["bytes in sample"] == "5e-06 G a second, 5.0% of a copy's"
    assert not [name for name in cost_card(steps) if " in " in name and name != "time in steps"], "not measured"
    assert cost_card([]) == {} and "forwards" not in cost_card([{"seconds": 1.0}])


def test_a_run_is_compared_with_grpos_beside_it(tmp_path):
    """Of the same model, data and batch, that has ended; twice the time and thrice the tokens a step."""
    folder = write_run(tmp_path / "roma", 40)
    for name, script, changed, ended in (
        ("a", "grpo", {"data": "other"}, True), ("b", "roma", {}, True), ("c", "grpo", {}, False),
    ):  # fmt: skip
        other = write_run(tmp_path / name, 40)
        (other / "args.json").write_text(json.dumps({"script": script, "model": "tiny", "data": "puzzles"} | changed))
        if ended:
            (other / "summary.json").write_text("{}")
    (folder / "args.json").write_text(json.dumps({"script": "roma", "model": "tiny", "data": "puzzles"}))
    assert "against" not in page(folder)
    (tmp_path / "c" / "summary.json").write_text("{}")
    half = [line | {"seconds": 1.0, "cost/scored_tokens": 10 / 3} for line in metrics(20)]
    (tmp_path / "c" / "metrics.jsonl").write_text(lines_of(half))
    assert "against c</dt><dd>2.00 times its seconds a step, 3.00 times its tokens scored</dd>" in page(folder)
    assert "against" not in page(tmp_path / "c")


def test_rates_are_measured_without_a_random_number():
    before = torch.get_rng_state()
    found = measure(torch.device("cpu"), torch.float32, side=64, size=2**16)
    assert found["operations"] > 0 and found["bytes"] > 0 and torch.equal(torch.get_rng_state(), before)
