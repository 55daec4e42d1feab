"""How large a report is, and how fast it opens in a real headless Chromium. The answers are random.

    python benchmarks/report_page.py                          200 answers of 4,000 tokens
    python benchmarks/report_page.py --answers 20 --tokens 30000
    python benchmarks/report_page.py --of-run                 with what a training run dumps

Half of the entropies are near zero and the others are spread out, as the paper describes. Random numbers compress worse
than a model's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from playwright.sync_api import Page, sync_playwright

from entropy_fork.common.progress import task, track
from entropy_fork.report import page as report_page
from entropy_fork.tokens.store import AnswerTokens, write_manifest, write_part

VOCABULARY = 30_000
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]

#: JavaScript: milliseconds from an event to the frame that shows its effect
TO_FRAME = """async (event) => {
    const began = performance.now();
    const slider = document.getElementById("ratio"), score = document.getElementById("by");
    const title = document.getElementById("answer-title").textContent;
    if (event === "next") document.getElementById("next").click();
    if (event === "slider") {
        slider.value = slider.value === "19" ? "59" : "19";
        slider.dispatchEvent(new Event("input"));
    }
    if (event === "score") {
        score.selectedIndex = (score.selectedIndex + 1) % score.options.length;
        score.dispatchEvent(new Event("change"));
    }
    while (event === "next" && document.getElementById("answer-title").textContent === title)
        await new Promise(requestAnimationFrame);
    document.getElementById("view").getBoundingClientRect(); // styles and layout are done now, not later
    await new Promise(requestAnimationFrame);
    return performance.now() - began;
}"""


def make(folder: Path, num_answers: int, num_tokens: int, of_run: bool) -> None:
    """Write a folder of tokens in the form of 'entropy-fork analyze', or of a run with ``dump_every``."""
    random = np.random.default_rng(0)
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    write_manifest(folder, {"source": "model", "model": "random numbers"})
    for number in range(num_answers):
        ids = random.choice(VOCABULARY, size=num_tokens, p=frequency / frequency.sum()).astype(np.int32)
        calm, spread = random.exponential(0.003, num_tokens), random.gamma(0.6, 0.7, num_tokens)
        entropy = np.where(random.random(num_tokens) < 0.5, calm, spread).astype(np.float32)
        log_prob = (-entropy * random.exponential(1, num_tokens)).astype(np.float32)
        rank = np.where(log_prob > -0.7, 0, random.integers(0, 20, num_tokens)).astype(np.int32)
        pieces = [f" word{word}" for word in ids.tolist()]
        answer = AnswerTokens(f"question {number}", "", ids, pieces, entropy, log_prob, rank, entropy > 0.67, number)
        if of_run:
            advantage = np.full(num_tokens, random.normal(), dtype=np.float32)
            noise = random.normal(0, 1e-3, num_tokens).astype(np.float32)
            answer = replace(answer, rank=None, advantage=advantage, rollout_log_prob=log_prob + noise)
        write_part(folder, number, [answer])


def ready(page: Page, file: Path) -> float:
    """Milliseconds from the navigation to the first answer in the document."""
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    return page.evaluate("performance.getEntriesByName('ready')[0].startTime")


def main(
    answers: Annotated[int, typer.Option(help="Answers.")] = 200,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 4000,
    browser: Annotated[str, typer.Option(help="The browser's program.")] = "/usr/bin/chromium",
    repeats: Annotated[int, typer.Option(help="How often each is measured.")] = 5,
    of_run: Annotated[bool, typer.Option("--of-run", help="With advantages and rollout log-probabilities.")] = False,
) -> None:
    """Write a report, open it, and print its size and times."""
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        file = Path(place) / "report.html"
        make(Path(place) / "tokens", answers, tokens, of_run)
        began = time.process_time()
        with task("report") as shown:
            settings = report_page.ReportSettings(file, tokens=[Path(place) / "tokens"], answers=answers)
            report_page.write(settings, shown.say)
        print(f"{answers} answers of {tokens:,} tokens: {file.stat().st_size / 1e6:.1f} MB")
        print(f"written in {time.process_time() - began:.1f} s of CPU")
        opened = playwright.chromium.launch(executable_path=browser, args=FLAGS)
        page = opened.new_page()
        loads = [ready(page, file) for _ in track("opening it", range(repeats))]
        print(f"first answer shown after {statistics.median(loads):.0f} ms ({min(loads):.0f} to {max(loads):.0f})")
        events = {"next": "another answer shown", "slider": "slider to recoloured", "score": "score to recoloured"}
        for event, what in events.items():
            taken = [page.evaluate(TO_FRAME, event) for _ in range(min(repeats, answers - 1))]
            print(f"{what} after {statistics.median(taken):.0f} ms")
        nodes = page.evaluate("document.querySelectorAll('*').length")
        print(f"{nodes:,} elements in the document")
        opened.close()


if __name__ == "__main__":
    typer.run(main)
