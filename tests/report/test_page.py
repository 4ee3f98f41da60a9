"""The page: its content without a browser, its behaviour in a real one where there is one."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from layershare.errors import LayershareError
from layershare.report.figures import Point, describe_cell, frontier, points, sharing
from layershare.report.page import page, write_pages, write_report
from layershare.report.results import environment
from layershare.report.runs import Run
from tests.report.made_up import DELTAS, OTHER, SHARED, make_run

SPEED = {
    **environment(),
    "model": "small",
    "original": "someone/some-model",
    "engine": "vllm 0.32.0",
    "dtype": "float32",
    "device": "cpu",
    "batches": [1, 8],
    "prompt": 64,
    "new": 16,
    "rounds": 3,
    "rates": [
        {
            "phase": phase,
            "batch": batch,
            "model": 1234.0,
            "latency": 0.1,
            "original": 1000.0,
            "original_latency": 0.1234,
            "ratio": 1.234,
        }
        for batch in (1, 8)
        for phase in ("prefill", "decode")
    ],
    "memory": 10**8,
    "original_memory": 2 * 10**8,
}


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    """A page about three runs: one that shares, one with every other kind of edit, one that was not measured."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        make_run(folder / "shared", perplexity=12.5),
        make_run(folder / "other", edits=OTHER, keep=0.9, perplexity=11.0),
        make_run(folder / "unmeasured", keep=0.55, perplexity=None, method="svd"),
    ]
    (runs[0] / "speed.json").write_text(json.dumps(SPEED))
    write_report(runs, folder / "report.html")
    return folder / "report.html"


def markup(html: str) -> str:
    """The page without the content of its scripts."""
    return re.sub(r"(<script[^>]*>).*?</script>", r"\1", html, flags=re.DOTALL)


def test_the_page_refers_to_nothing_outside(html):
    text = markup(html.read_text(encoding="utf-8"))
    assert set(re.findall(r"""(?:src|href)\s*=\s*["']?([^"' >]*)""", text)) == {"data:,"}
    assert "url(" not in text
    assert "@import" not in text


def test_what_models_and_people_write_is_text_and_not_markup(html):
    text = html.read_text(encoding="utf-8")
    assert "&lt;b&gt;if&lt;/b&gt;" in text
    assert "&lt;/script&gt;&lt;i&gt;y" in text
    assert "&lt;books&gt; &amp; more" in text


def test_speed_is_shown_or_it_is_said_how_to_measure_it(html):
    text = markup(html.read_text(encoding="utf-8"))
    assert text.count("1.23 ×") == 4
    assert text.count("100.0 ms") == 4
    assert "In memory an engine held at most 100 MB (the original's: 200 MB)." in text.replace("&#39;", "'")
    assert "vllm 0.32.0, float32 on cpu" in text
    assert text.count("layershare bench") == 2


def test_the_title_of_one_run_is_its_story(tmp_path):
    run = Run.read(make_run(tmp_path / "run"), "run")
    title = (
        "someone/some-model at 80\N{NO-BREAK SPACE}%: 0.8 of 1 million parameters, perplexity 12.0 instead of 10.0 in "
        "blocks of 16 tokens"
    )
    assert f"<h1>{title}</h1>" in page([run])


def test_zero_shot_scores_stand_on_the_page(tmp_path):
    text = page([Run.read(make_run(tmp_path / "run", perplexity=None, tasks=True), "run")])
    assert "0.500 ± 0.025" in text
    assert "Quality was not measured" not in text


def test_the_frontier_is_what_nothing_else_beats():
    def point(size: int, perplexity: float) -> Point:
        return Point("", 1, size, 0.5, perplexity, 0.0)

    small, worse, dear, best, equal = point(1, 9), point(2, 10), point(4, 8), point(3, 7), point(5, 7)
    assert frontier([equal, worse, best, dear, small], lambda each: each.perplexity) == [small, best]


def test_only_what_was_measured_alike_is_compared(tmp_path):
    runs = [
        Run.read(make_run(tmp_path / name, tokens=tokens, model=f"m/{name[0]}"), name)
        for name, tokens in (("a1", "x"), ("a2", "x"), ("a3", "y"), ("b", "x"))
    ]
    assert [[point.name for point in comparable] for comparable in points(runs)] == [
        ["m/a", "a1", "a2"],
        ["m/a", "a3"],
        ["m/b", "b"],
    ]


def test_the_map_shows_whose_weight_is_shared_and_where_a_delta_is_added(tmp_path):
    run = Run.read(make_run(tmp_path / "run", edits=[*DELTAS, SHARED[0]]), "run")
    (heatmap,) = sharing(run).data
    words = dict(zip(heatmap.y, heatmap.text, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
    assert list(words["up"]) == ["", "A", "Aδ", "", "Aδ", ""]
    assert list(words["down"]) == ["", "Aδ", "Aδ", "", "", ""]
    assert list(words["q"]) == ["A", "", "A", "", "", ""]
    assert "weight shared by layers 1, 2, 4, and a delta of its own" in describe_cell(run.cells["up", 2])
    text = page([run])
    assert "or one weight, to which those with δ add a delta of their own" in text
    assert "shared by layers 1, 2, 4, with a delta" in text
    assert "with δ" not in page([Run.read(make_run(tmp_path / "other"), "run")])


def test_mistakes_are_one_sentence(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(LayershareError, match=r"cannot be written \(is a directory"):
        write_report([run], tmp_path)
    with pytest.raises(LayershareError, match=r"cannot be written \(no such file or directory"):
        write_report([run], tmp_path / "nowhere" / "report.html")
    with pytest.raises(LayershareError, match="is no finished run"):
        write_report([run, tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_without_the_extra_there_is_a_card_and_word_of_how_to_get_a_page(tmp_path, commands):
    run = make_run(tmp_path / "run")
    script = f"""
import sys, warnings
from pathlib import Path
import layershare.run
from layershare.errors import LayershareError
from layershare.report.page import write_pages, write_report
assert "plotly" not in sys.modules
sys.modules["plotly"] = None  # as if it were not installed
run = Path({str(run)!r})
with warnings.catch_warnings(record=True) as caught:
    write_pages(run, "run")
print(*[each.message for each in caught])
try:
    write_report([run], run / "report.html")
except LayershareError as error:
    print(error)
"""
    done = subprocess.run([commands / "python", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "To get report.html in every run: `pip install '.[report]'` in a checkout of layershare.",
        "The report needs jinja2 and plotly: `pip install '.[report]'` in a checkout of layershare.",
    ]
    assert (run / "README.md").is_file()
    assert not (run / "report.html").exists()


def test_a_run_s_own_pages(tmp_path):
    run = make_run(tmp_path / "run")
    write_pages(run, "small")
    text = (run / "report.html").read_text(encoding="utf-8")
    assert "folder = &#39;small&#39;" in text
    assert "library_name: transformers\n" in (run / "README.md").read_text(encoding="utf-8")
    # Who shares, kept, rank, error and the spectra of two roles, drawn once for all.
    assert text.count("<svg ") == text.count('<figure class="drawn"') == 4 + 2
    assert len(text) < 100_000


@pytest.mark.parametrize("spoiled", ["results.json", "plan.json", "no room", "template", "card"])
def test_pages_that_fail_are_a_warning(spoiled, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    expected = {"README.md", "report.html"}
    if spoiled == "no room":  # for one of them
        (run / "README.md").mkdir()
        expected = {"report.html"}
    elif spoiled == "template":
        monkeypatch.setattr("layershare.report.page._title", lambda runs: 1 / 0)
        expected = {"README.md"}
    elif spoiled == "card":
        monkeypatch.setattr("layershare.report.card.citation", lambda method: {}[method])
        expected = {"report.html"}
    else:
        (run / spoiled).write_text("{}")
        expected = set()
    with pytest.warns(UserWarning, match="The result has no") as caught:
        write_pages(run, "run")
    said = [re.findall(r"^The result has no (\S+) \(.*\), but all else\.$", str(each.message)) for each in caught]
    assert said == [[name] for name in ("README.md", "report.html") if name not in expected]
    assert {name for name in ("README.md", "report.html") if (run / name).is_file()} == expected


def drawn(edits: list[dict[str, Any]], folder: Path) -> list[ElementTree.Element]:
    """The drawings of a run's own page."""
    text = page([Run.read(make_run(folder, edits=edits), "run")], interactive=False)
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]


def test_drawings_show_what_the_interactive_charts_show(tmp_path):
    sharing, kept, rank, error, *spectra = drawn(SHARED, tmp_path / "run")
    words = [text.text for text in sharing.iter("text") if text.get("class") == "word"]
    assert words == ["A", "B", "A", "B"]
    values = {text.text for text in kept.iter("text") if text.get("class") == "word"}
    assert values == {"47", "56", "31", "100"}
    assert {text.text for text in rank.iter("text")} >= {"6", "5", "3", "layer", "q", "down"}
    assert {text.text for text in error.iter("text")} >= {"1%", "10%"}
    assert [len(list(each.iter("circle"))) for each in spectra] == [2, 1]  # a cut for each group


@pytest.mark.parametrize("edits", [OTHER, DELTAS, [], [{"kind": "slice", "width": 8}]], ids=str)
def test_every_kind_of_edit_can_be_drawn(edits, tmp_path):
    assert drawn(edits, tmp_path / "run")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """The system's Chromium, without network."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("there is no chromium with its chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture
def opened(browser, html) -> webdriver.Chrome:
    """The page, freshly opened on a desk's screen in the light."""
    screen(browser, 1200, 900, "light")
    browser.get(html.as_uri())
    return browser


def screen(browser: webdriver.Chrome, width: int, height: int, scheme: str) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def open_all(browser: webdriver.Chrome) -> None:
    browser.execute_async_script(
        "document.querySelectorAll('details').forEach((part) => part.open = true); setTimeout(arguments[0], 100)"
    )


def test_every_chart_is_drawn_and_nothing_is_complained_about_or_fetched(opened):
    drawn = "return document.querySelectorAll('figure.chart .main-svg').length > 0 &&"
    missing = "[...document.querySelectorAll('figure.chart')].filter((each) => !each.querySelector('.main-svg')).length"
    # Closed runs are drawn when they are opened.
    assert opened.execute_script(f"{drawn} {missing} > 0")
    open_all(opened)
    assert opened.execute_script(f"return {missing}") == 0
    # 2 comparisons; 3 maps of who shares; kept for each, rank and error for the two with factors; spectra of two roles.
    assert len(opened.find_elements(By.CSS_SELECTOR, "figure.chart")) == 2 + 3 + 3 + 4 + 2 * 2
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_a_cell_tells_its_values_when_pointed_at(opened):
    chart = opened.find_element(By.CSS_SELECTOR, "figure[aria-label^='map of layers']")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    webdriver.ActionChains(opened).move_to_element_with_offset(chart, -chart.size["width"] // 3, -68).perform()
    label = opened.execute_async_script(
        "const [chart, done] = arguments; setTimeout(() => done(chart.querySelector('.hoverlayer').textContent), 300)",
        chart,
    )
    assert re.match(r"q, layer \d.*basis shared by layers [\d, ]+ \(input side\)rank \d.*relative error", label)


def column(browser: webdriver.Chrome, number: int) -> list[str]:
    cells = browser.find_elements(By.CSS_SELECTOR, f"#comparison tbody tr > :nth-child({number})")
    return [cell.text for cell in cells]


def test_a_click_sorts_the_table(opened):
    names = column(opened, 1)
    heading = opened.find_element(By.XPATH, "//table[@id='comparison']//th[contains(., 'perplexity')]")
    button = heading.find_element(By.TAG_NAME, "button")
    button.click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(opened, 7) == ["10.00 (16)", "11.00 (16)", "12.50 (16)", "–"]
    button.click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(opened, 7) == ["12.50 (16)", "11.00 (16)", "10.00 (16)", "–"]  # what was not measured stays last
    opened.find_element(By.XPATH, "//table[@id='comparison']//button[.='model']").click()
    assert heading.get_attribute("aria-sort") == "none"
    assert column(opened, 1) == sorted(names)


def colours(browser: webdriver.Chrome) -> Any:
    return browser.execute_script(
        "const style = getComputedStyle(document.body);"
        "return [style.backgroundColor, getComputedStyle(document.querySelector('.xtick text')).fill]"
    )


def test_charts_follow_light_and_dark(opened):
    light = colours(opened)
    screen(opened, 1200, 900, "dark")
    dark = opened.execute_async_script("setTimeout(arguments[0], 300)") or colours(opened)
    assert light[0] == "rgb(252, 252, 250)"
    assert dark[0] == "rgb(21, 23, 27)"
    assert light[1] != dark[1]


@pytest.mark.parametrize("width", [320, 420])
def test_a_phone_need_not_scroll_sideways(width, opened, tmp_path):
    screen(opened, width, 844, "light")
    opened.refresh()
    open_all(opened)
    assert opened.execute_script("return document.documentElement.scrollWidth") == width
    visible = [each.text for each in opened.find_elements(By.CSS_SELECTOR, "#comparison thead th") if each.text]
    assert visible == ["model", "kept", "perplexity", "top‑1"]
    run = make_run(tmp_path / ("a-long-name" * 10), tasks=True)
    (run / "speed.json").write_text(json.dumps(SPEED))
    write_pages(run, run.name)
    opened.get((run / "report.html").as_uri())
    open_all(opened)
    assert opened.execute_script("return document.documentElement.scrollWidth") == width
    outside = "const right = (each) => each.getBoundingClientRect().right;"
    outside += "return [...document.querySelectorAll('svg text')].filter((each) => right(each) > innerWidth).length"
    assert opened.execute_script(outside) == 0
    assert opened.get_log("browser") == []
