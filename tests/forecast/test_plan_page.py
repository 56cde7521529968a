"""`kit plan`'s page, stage picture and explanation: as a browser shows the page, and by numbers that are known."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_memory import ALL, LLAMA_8B, LORA, step, zero
from test_plan import STOCK, run_plan

from kit.explain.plan_page import PAGE, render_page
from kit.explain.plan_text import describe_stages, durations, gb, phase_bars, stack_terms
from kit.forecast.memory import Sizes, forecast_memory, measure_sizes
from kit.forecast.stages import stage_picture, states_of_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
RUN = [*STOCK, "hardware=2x4090_128gb", "trainer.max_steps=1000", "--price", "0.4"]
TOO_LARGE = [*STOCK, "hardware=8xh100", "peft=none", "trainer.max_steps=1000", "--price", "2"]
HOSTILE = "</script><script>window.harm=1</script><img src=x onerror='window.harm=1'>\"'&<!--<script>"


def plan_page(capsys: pytest.CaptureFixture[str], file: Path, *words: str) -> tuple[str, Any]:
    """The page that the verb writes, and what it prints with --json."""
    _, out = run_plan(capsys, *words, "--html", str(file), "--json")
    return file.read_text(encoding="utf-8"), json.loads(out)


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(run_plan(capsys, *RUN, "--json")[1])


class StrictParser(HTMLParser):
    """Collects what is on a page; an element that is not closed in its place is an error."""

    VOID = {"meta", "link", "br", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figure: str | None = None
        self.tags: list[str] = []
        self.shown: dict[str, str] = {}  # data-figure -> text
        self.links: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute of {tag} is there twice"
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        self.figure = found.get("data-figure")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
        self.figure = None

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.figure:
            self.shown[self.figure] = data


def parse_page(text: str) -> StrictParser:
    parser = StrictParser()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def value_of(figures: Any, path: str) -> Any:
    for key in path.split("."):
        figures = figures[int(key)] if isinstance(figures, list) else figures[key]
    return figures


def shown_as(path: str, value: Any) -> str:
    if path == "total.seconds":
        return durations(value)
    if path == "total.cost":
        return f"{value[0]:,.2f} to {value[1]:,.2f}"
    return f"{value:.2f}" if path.startswith("step.") else gb(value)


@pytest.mark.parametrize("words", [RUN, TOO_LARGE, [*STOCK, "hardware=t4", "quantization=nf4"]])
def test_the_page_is_whole_and_says_what_json_says(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path):
    text, found = plan_page(capsys, tmp_path / "plan.html", *words)
    page = parse_page(text)
    assert json.loads(page.scripts[0]) == found and len(text.encode()) < 200_000
    assert {p: shown_as(p, value_of(found, p)) for p in page.shown} == page.shown
    terms = [
        f"{part}.terms.{n}.bytes"
        for part in ("memory", "host_memory", "disk")
        for n in range(len(found[part]["terms"]))
    ]
    assert {"memory.needed", "memory.usable", "memory.outside_allocator", "disk.needed", *terms} <= page.shown.keys()
    assert page.links == ["data:,"] and not re.search(r"https?:|@import|url\(", text)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.html"]


def test_a_comparison_is_on_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Beside the run itself; with --compare hardware=... and no machine the run is on the first of them."""
    text, rows = plan_page(capsys, tmp_path / "a.html", *TOO_LARGE, "--compare", "deepspeed=zero2,zero3,zero9")
    page = parse_page(text)
    embedded = json.loads(page.scripts[0])
    assert embedded["compare"] == rows and embedded["changes"] and "there is no deepspeed named" in text
    assert page.shown["compare.1.needed"] == gb(rows[1]["needed"]) != page.shown["memory.needed"]
    text, _ = plan_page(capsys, tmp_path / "b.html", *STOCK, "--compare", "hardware=h100,t4")
    assert json.loads(parse_page(text).scripts[0])["host"]["gpu"] == "H100 SXM"


@pytest.mark.parametrize("words, said", [
    (["--html", "no/such/folder/plan.html"], "cannot be written"),
    (["--explain", "--compare", "deepspeed=zero2,zero3"], "is of one run"),
])  # fmt: skip
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    code, text = run_plan(capsys, *RUN, *words)
    assert code == 2 and said in text and "fix:" in text


def hostile(figures: Any) -> Any:
    """The figures with markup in every text of them."""
    if isinstance(figures, dict):
        return {k: v if k == "phase" else hostile(v) for k, v in figures.items()}
    if isinstance(figures, list):
        return [hostile(value) for value in figures]
    return HOSTILE + figures if isinstance(figures, str) else figures


def with_markup(figures: Any) -> Any:
    found = hostile(figures)
    for stage, real in zip(found["stages"], figures["stages"], strict=True):
        stage["name"] = real["name"]
    refused = {"value": HOSTILE, "refused": HOSTILE}
    return found | {"compare": [refused], "changes": [{"overrides": [HOSTILE], "needed": 1e9, "seconds": [1, 2]}]}


def test_markup_in_a_name_is_text(figures: Any):
    plain, page = parse_page(render_page(figures)), parse_page(render_page(with_markup(figures)))
    assert page.tags.count("script") == plain.tags.count("script") == 2 and "img" not in page.tags
    assert json.loads(page.scripts[0])["run"]["model"].startswith(HOSTILE)


def test_the_template_says_what_it_is_for():
    """Dark, narrow and printed."""
    for word in ("prefers-color-scheme: dark", "max-width: 40rem", "@media print", 'lang="en"', "viewport"):
        assert word in PAGE.read_text()


class Browser:
    """Headless Chromium, spoken to in its DevTools protocol over two pipes."""

    def __init__(self, program: str, home: Path) -> None:
        to_read, self.out = os.pipe()
        self.into, to_write = os.pipe()
        argv = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                "--remote-debugging-pipe", f"--user-data-dir={home}", "--no-first-run"]  # fmt: skip
        line = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", *argv]
        self.process = subprocess.Popen(line, pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.rest, self.sent, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self) -> Any:
        while b"\0" not in self.rest:
            more = os.read(self.into, 1 << 16)
            assert more, "the browser ended"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params: Any) -> Any:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.sent:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path, width: int, **media: Any) -> None:
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", **media)
        self.call("Page.navigate", url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def evaluate(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self, file: Path) -> list[Any]:
        """Errors, console lines, and what was asked of a network."""
        said = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [e for e in self.events if e["method"] in said] + [
            u for u in asked if u not in (file.as_uri(), "data:,")
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser here ({', '.join(BROWSERS)}): the page was parsed, not opened")
    found = Browser(program, tmp_path_factory.mktemp("browser"))
    yield found
    os.close(found.out)  # the browser ends with its pipe
    found.process.wait(20)
    os.close(found.into)


SHOWN = "Array.from(document.querySelectorAll('[data-figure]'), e => [e.dataset.figure, e.textContent])"
BARS = "Array.from(document.querySelectorAll('[data-bar]'), e => [e.dataset.bar, e.getBoundingClientRect().width])"
TOO_WIDE = "document.documentElement.scrollWidth - window.innerWidth"
# Elements whose text is wider than they are, or that reach out of the window.
CUT = """Array.from(document.querySelectorAll('main *')).filter(e => e.getClientRects().length && (
  e.getBoundingClientRect().right > innerWidth + 1 ||
  e.scrollWidth > e.clientWidth + 4 && e.clientWidth > 0 && !e.matches('.bar'))
).map(e => e.outerHTML.slice(0, 200))"""


def test_a_browser_shows_the_figures(browser: Browser, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "plan.html"
    _, found = plan_page(capsys, file, *TOO_LARGE)
    browser.open(file, 1100)
    assert browser.complaints(file) == []
    assert json.loads(browser.evaluate("document.getElementById('figures').textContent")) == found
    shown = browser.evaluate(SHOWN)
    assert len(shown) > 20 and [text for _, text in shown] == [shown_as(p, value_of(found, p)) for p, _ in shown]
    assert browser.evaluate("document.querySelector('.verdict strong').textContent") == "Does not fit"
    bars = [(path.split(".")[0], width, value_of(found, path)) for path, width in browser.evaluate(BARS)]
    drawn = sum(len(terms) for terms in stack_terms(found["memory"]).values())
    assert [part for part, *_ in bars].count("memory") == drawn
    for kind in ("memory", "stages"):  # bars of one picture have one scale
        largest = max((b for b in bars if b[0] == kind), key=lambda b: b[2])
        for _, width, size in (b for b in bars if b[0] == kind):
            assert width == pytest.approx(size * largest[1] / largest[2], abs=0.1)


@pytest.mark.parametrize("width, media", [
    (400, {"media": "screen"}), (1100, {"media": "screen"}), (700, {"media": "print"}),
    (400, {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}),
])  # fmt: skip
def test_nothing_is_cut_off(browser: Browser, figures: Any, tmp_path: Path, width: int, media: Any):
    """A comparison and a long path are on the page too."""
    rows = [{"value": "deepspeed=zero9", "refused": "no such"}]
    figures["run"]["model"] = "/models/" + 40 * "long_name"
    file = tmp_path / "plan.html"
    file.write_text(render_page(figures | {"compare": rows}))
    browser.open(file, width, **media)
    browser.evaluate("document.querySelector('details').open = true")
    assert browser.evaluate(TOO_WIDE) <= 0 and browser.evaluate(CUT) == []
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 100")
    assert dark is ("features" in media)


def test_markup_does_nothing_in_a_browser(browser: Browser, figures: Any, tmp_path: Path):
    file = tmp_path / "plan.html"
    file.write_text(render_page(with_markup(figures)))
    browser.open(file, 400)
    assert browser.evaluate("window.harm") is None and browser.complaints(file) == []
    assert browser.evaluate("document.querySelector('h1').textContent").startswith(HOSTILE)
    assert browser.evaluate("document.images.length") == 0 and browser.evaluate(TOO_WIDE) <= 0


def test_the_table_is_sorted_by_a_click(browser: Browser, figures: Any, tmp_path: Path):
    file = tmp_path / "plan.html"
    file.write_text(render_page(figures))
    browser.open(file, 1100)
    cells = "Array.from(document.querySelectorAll('section.long tbody tr'), r => Number(r.cells[1].dataset.value))"
    before = [size for size in browser.evaluate(cells) if size is not None]
    browser.evaluate("document.querySelectorAll('section.long th')[1].click()")
    after = [size for size in browser.evaluate(cells) if size is not None]
    assert after == sorted(before, reverse=True) != before


def picture(parameters: float, processes: int) -> dict[str, tuple[float, float]]:
    n = int(parameters)
    base = Sizes(LLAMA_8B, n, n, n, 32, n // 40, n // 40, n // 40)
    found = stage_picture(step(None, processes=processes, trainer=ALL), base)
    return {stage.name: (round(stage.bytes / 1e9, 1), stage.speed) for stage in found}


def test_the_zero_papers_picture():
    """7.5 billion parameters on 64 GPUs (Rajbhandari et al. 2020, figure 1); the split is as small, and slow."""
    assert picture(7.5e9, 64) == {
        "data parallel": (120.0, 1), "ZeRO-1": (31.4, 1), "ZeRO-2": (16.6, 1), "ZeRO-3": (1.9, 1),
        "layer split": (1.9, 1 / 64),
    }  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_picture_is_of_the_forecasts_own_terms(stage: int):
    """What a run keeps under a stage is that stage's entry; an offloaded optimizer is the run's alone."""
    base = measure_sizes(LLAMA_8B, LORA)
    assert base
    run = step(deepspeed=zero(stage), processes=8, trainer=ALL)
    assert states_of_run(run, base).bytes == stage_picture(run, base)[stage].bytes
    terms = {term.name: term.bytes for term in forecast_memory(run, base).terms}
    assert {name: terms[name] for name in states_of_run(run, base).parts} == states_of_run(run, base).parts
    offloaded = step(deepspeed=zero(stage, True), processes=8, trainer=ALL)
    assert stage_picture(offloaded, base) == stage_picture(run, base)


def test_lora_gains_almost_nothing_before_zero_3(figures: Any, capsys: pytest.CaptureFixture[str]):
    sizes = {stage["name"]: stage["bytes"] for stage in figures["stages"]}
    assert sizes["ZeRO-2"] > 0.97 * sizes["data parallel"] and sizes["ZeRO-3"] == sizes["data parallel"] / 2
    assert "the frozen base stays whole" in describe_stages(figures)
    _, text = run_plan(capsys, *RUN)
    for name, size in sizes.items():
        assert re.search(rf"{name} +{re.escape(gb(size))} GB", text)
    assert "the frozen base stays" in text and "1/2 speed" in text
    _, alone = run_plan(capsys, *STOCK, "hardware=h100")
    assert "ZeRO-1" not in alone


@pytest.mark.parametrize("words", [RUN, TOO_LARGE, [*STOCK, "hardware=8xh100", "peft=none", "deepspeed=zero3"]])
def test_bars_of_the_phases(words: list[str], capsys: pytest.CaptureFixture[str]):
    """80 columns; each as long as its phase's bytes, and over the bracket just where they are more than the card."""
    memory = json.loads(run_plan(capsys, *words, "--json")[1])["memory"]
    lines = phase_bars(memory)
    assert max(map(len, lines)) <= 80
    inside = {line.split()[0]: line for line in lines if "[" in line}
    assert inside.keys() == memory["peaks"].keys()
    scale = 44 / max(memory["usable"], memory["needed"])
    for phase, peak in memory["peaks"].items():
        bar, beyond = re.search(r"\[(.*?)\](\S*) ", inside[phase]).groups()  # type: ignore[union-attr]
        total = peak + memory["outside_allocator"]
        assert len(bar.strip() + beyond) == round(scale * total) and gb(total) in inside[phase]
        assert bool(beyond) is (total > memory["usable"] * (1 + 0.5 / 44)), (phase, inside[phase])
    calibrated = phase_bars(memory | {"needed": 1e9, "forecast": memory["needed"]})
    assert gb(memory["needed"]) in calibrated[0] and calibrated[1:] == lines
    assert "# " + max(memory["terms"], key=lambda t: t["bytes"])["name"] in "\n".join(lines)


def explain(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, str], Any, str]:
    found = json.loads(run_plan(capsys, *words, "--explain", "--json")[1])
    _, text = run_plan(capsys, *words, "--explain")
    return {line["topic"]: line["here"] for line in found["arithmetic"]}, found, text


def test_the_explanation_has_the_runs_own_numbers(capsys: pytest.CaptureFixture[str]):
    here, found, text = explain(capsys, *RUN)
    assert "7.50 billion" in here["operations"] and " 4.03 N" in here["operations"]
    assert "2.01 N" in here["recomputed"] and "23.17 to 42.48 s" in here["time"]
    assert "16.1 GB" in here["weights"] and "x 2.00 bytes" in here["weights"]
    assert "41,943,040 of 8,030,261,248" in here["optimizer"] and "16.0 bytes" in here["Adam"]
    kept = sum(t["bytes"] for t in found["memory"]["terms"] if t["name"] in ("layer inputs", "embedding, norm"))
    assert f"{gb(kept)} GB as it is" in here["activations"] and "8,192 tokens x 32 layers" in here["activations"]
    assert "41,943,040 x 4" in here["bucket"] and "4 micro-steps" in here["accumulation"]
    assert (
        "65,536,000 tokens of the run: 275 to 334 MB of Chinese" in here["text"]
    )  # 1.4 and 1.7 characters of 3 bytes
    flat = " ".join(text.split())
    assert all(" ".join(line.split()) in flat for line in here.values())
    assert max(map(len, text[text.index("rules of thumb") :].splitlines())) <= 80


@pytest.mark.parametrize("words, topic, said", [
    (["hardware=8xh100", "peft=none"], "operations", " 6.00 N"),
    (["hardware=8xh100", "peft=none", "deepspeed=zero3"], "recomputed", "no matmul is computed again"),
    (["hardware=h100", "peft=none", "deepspeed=zero2"], "Adam", "20.0 bytes each"),
    (["hardware=h100"], "bucket", "none"), (["hardware=h100", "quantization=nf4"], "weights", "x 0."),
    (["hardware=h100"], "data", "trainer.max_steps=N"),
])  # fmt: skip
def test_other_runs_have_other_numbers(words: list[str], topic: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert said in explain(capsys, *STOCK, *words)[0][topic]


def test_the_corrections_are_said(capsys: pytest.CaptureFixture[str]):
    flat = " ".join(explain(capsys, *RUN)[2].split())
    for words in ("2N forward and 4N backward", "LoRA has 4N in all", "2N more", "4 in the step: 20 GB",
                  "3 bytes in UTF-8", "4.2 to 5.1 GB", "gradient bucket is a buffer"):  # fmt: skip
        assert words in flat
