"""The page of `prerl report`, in a real browser."""

import re
import shutil

import pytest
from report_runs import HOSTILE, curve_run, write_metrics, write_run

from prerl_lightning.cli import main

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium or google-chrome here: apt install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A page on GRPO and DSRL, two seeds each, with one hostile sample."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        write_run(folder / "grpo" / f"version_{seed}", switch=0, seed=seed, speed=0.7, samples=2)
        write_run(folder / "dsrl" / f"version_{seed}", seed=seed, speed=1.4, samples=3, hostile=seed == 0)
    out = folder / "report.html"
    main(["report", str(folder / "grpo"), str(folder / "dsrl"), "-o", str(out)])
    return out


@pytest.fixture
def opened(browser):
    """Opens a file; at the end nothing has been said on the console, asked of a network, or raised."""
    said, contexts = [], []

    def open_page(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: said.append(f"error: {error}"))
        tab.on(
            "request", lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
        )
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def draw(tab, key: str, state: str = "step"):
    """Scrolls to a figure and waits until it is drawn with that x axis."""
    figure = tab.locator(f'[data-figure="{key}"]')
    figure.scroll_into_view_if_needed()
    tab.wait_for_selector(f'[data-figure="{key}"][data-drawn="{state}"] svg')
    return figure


def press(tab, place: str, label: str) -> None:
    tab.locator(f"#{place}").get_by_role("button", name=label, exact=True).click()


def count(tab) -> int:
    return int(tab.locator("#sample-count").inner_text().split()[0])


def test_every_figure_is_drawn(two, opened):
    tab = opened(two)
    keys = tab.eval_on_selector_all("main section:not(#other) [data-figure]", "all => all.map(f => f.dataset.figure)")
    assert {"accuracy", "reward", "thoughts-reflection", "cosine", "cosine-points", "entropy", "stack"} <= set(keys)
    for key in keys:
        figure = draw(tab, key)
        assert figure.locator("svg path").count() > 0
    assert draw(tab, "accuracy").locator("path[aria-roledescription='line mark']").count() == 2
    drawn_texts = draw(tab, "accuracy").locator("svg text").all_text_contents()
    assert {"dsrl", "grpo", "dsrl: NSR-PreRL", "reincarnation: GRPO"} <= set(drawn_texts)
    draw(tab, "stack").locator("select").select_option("dsrl")
    tab.wait_for_function("document.querySelector('[data-figure=stack] svg').textContent.includes('NSR-PreRL')")
    assert "reincarnation: GRPO" in draw(tab, "stack").locator("svg text").all_text_contents()
    assert "dsrl: NSR-PreRL → GRPO" in draw(tab, "reward").locator("svg text").all_text_contents()  # too narrow for two
    label = tab.locator('[data-figure="accuracy"] .plot').get_attribute("aria-label")
    assert "grpo: 0.365 at step 0" in label  # the mean of 0.36 and 0.37
    tab.locator("#other summary").click()
    draw(tab, "other-train/tokens")


def test_switches_redraw(two, opened):
    tab = opened(two)
    figure = draw(tab, "accuracy")
    press(tab, "axis", "samples")
    draw(tab, "accuracy", "samples")
    assert "responses sampled" in figure.locator("svg").text_content()
    press(tab, "axis", "time")
    draw(tab, "accuracy", "seconds")
    assert "seconds since the run began" in figure.locator("svg").text_content()
    press(tab, "axis", "steps")
    draw(tab, "accuracy")
    press(tab, "seeds", "each run")
    lines = "[data-figure=accuracy] path[aria-roledescription='line mark']"
    tab.wait_for_function(f'document.querySelectorAll("{lines}").length === 4')
    tab.locator("#legend").get_by_role("button", name="grpo").click()
    tab.wait_for_function(f'document.querySelectorAll("{lines}").length === 2')
    tab.locator("#legend").get_by_role("button", name="none").click()
    tab.wait_for_selector("[data-figure=accuracy][data-drawn=empty]")
    assert "nothing is selected" in figure.inner_text()
    tab.locator("#legend").get_by_role("button", name="all").click()
    thoughts = draw(tab, "thoughts-reflection")
    press(tab, "source", "training")
    press(tab, "measure", "per 1,000 tokens")
    press(tab, "split", "right and wrong")
    tab.wait_for_function(
        "document.querySelector('[data-figure=thoughts-reflection]').innerText.includes('per_1k/wrong')"
    )
    assert "wrong" in thoughts.locator("figcaption").inner_text()
    press(tab, "smoothing", "5")
    draw(tab, "reward")


def test_values_under_the_pointer(two, opened):
    tab = opened(two)
    box = draw(tab, "accuracy").locator(".plot").bounding_box()
    tab.mouse.move(box["x"] + 40, box["y"] + 150)
    tip = tab.locator(".tip").inner_text()
    assert "step 0" in tip
    assert "0.365 [0.36, 0.37], 2 runs" in tip


def test_values_by_keys_and_by_a_finger(two, opened):
    tab = opened(two, has_touch=True)
    draw(tab, "accuracy").locator(".plot").focus()
    tip = tab.locator(".tip")
    for key, step in (("ArrowRight", 0), ("ArrowRight", 10), ("ArrowRight", 20), ("ArrowLeft", 10)):
        tab.keyboard.press(key)
        assert tip.inner_text().startswith(f"step {step}\n")
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    press(tab, "smoothing", "15")
    figure = draw(tab, "reward")
    tab.wait_for_function("document.querySelector('[data-figure=reward]').innerText.includes('mean of 15 points')")
    box = figure.locator(".plot").bounding_box()
    tab.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + 80)
    assert re.match(r"step \d+, mean of 15 points", tip.inner_text())


def test_a_band_has_its_points_without_spread_and_runs_that_end_early_bend_nothing(tmp_path, opened):
    """Both at 0.3 at step 10; 2 and 4 seconds a step, but the second ends at step 20 of 30."""
    curve_run(tmp_path / "a" / "version_0", 10, 0, {0: 0.1, 10: 0.3, 20: 0.5, 30: 0.6}, 2.0)
    curve_run(tmp_path / "a" / "version_1", 10, 1, {0: 0.2, 10: 0.3, 20: 0.4}, 4.0)
    (tmp_path / "a" / "version_1" / "config.yaml").write_text(
        (tmp_path / "a" / "version_0" / "config.yaml").read_text().replace("seed_everything: 0", "seed_everything: 1")
    )
    main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "a.html")])
    tab = opened(tmp_path / "a.html")
    draw(tab, "accuracy")
    spec = "lineSpec(DATA.figures.accuracy, seriesOf(DATA.figures.accuracy).series, 800, true)"
    areas = tab.evaluate(f"{spec}.layer.filter(l => l.mark.type === 'area').map(l => l.data.values)")
    assert [[(p["step"], p["lo"], p["hi"]) for p in area] for area in areas] == [
        [(0, 0.1, 0.2), (10, 0.3, 0.3), (20, 0.4, 0.5), (30, 0.6, 0.6)]
    ]
    press(tab, "axis", "time")
    draw(tab, "accuracy", "seconds")
    assert tab.evaluate("seriesOf(DATA.figures.accuracy).series[0].points.map(p => p.x)") == [0, 20, 40, 60]
    assert tab.evaluate("livesOf([0]).lines.map(l => l.x)") == [20]


def test_a_life_that_ended_by_a_condition_says_so_and_runs_that_differ_have_a_line_each(tmp_path, opened):
    why = "reward/mean is 0.2, after 0.3 at step 8"
    write_run(tmp_path / "one" / "version_0", endings={"1": why})
    for seed, first in enumerate((10, 14)):
        lives = [["NSRPreRL", 0], ["GRPO", first]]
        write_run(tmp_path / "two" / f"version_{seed}", seed=seed, lives=lives, endings={"1": why})
    labels = {}
    for name in ("one", "two"):
        main(["report", str(tmp_path / name), "-o", str(tmp_path / f"{name}.html")])
        tab = opened(tmp_path / f"{name}.html")
        labels[name] = draw(tab, "accuracy").locator("svg text").all_text_contents()
    assert f"reincarnation: GRPO, as {why}" in labels["one"]
    assert "reincarnations of the runs: GRPO" in labels["two"]
    assert tab.evaluate("livesOf([0]).lines.map(l => l.x)") == [10, 14]


def test_samples_are_filtered_and_walked(two, opened):
    tab = opened(two)
    assert count(tab) == 4 * 2 * 2 + 4 * 3 * 2 + 1
    tab.select_option("#f-right", "wrong")
    wrong = count(tab)
    tab.select_option("#f-right", "right")
    assert wrong + count(tab) == 41
    assert "right" in tab.locator("#sample h3").inner_text()
    assert tab.locator("#sample-list .of").first.inner_text() == "grpo version_0"
    tab.select_option("#f-right", "")
    for select, value, expected in (
        ("#f-step", "20", 10), ("#f-kind", "held_out", 8), ("#f-life", "2", 19), ("#f-run", "0", 8),
        ("#f-thought", "reflection", 16),
    ):  # fmt: skip
        tab.select_option(select, value)
        assert count(tab) == expected, select
        tab.select_option(select, "")
    tab.fill("#f-text", "no such text")
    assert "No sample fits" in tab.locator("#sample").inner_text()
    tab.fill("#f-text", "HACKED")
    assert count(tab) == 1
    tab.fill("#f-text", "")


def test_thoughts_and_changes_are_marked_by_code_points(two, opened):
    tab = opened(two)
    tab.select_option("#f-step", "20")
    tab.select_option("#f-run", "2")
    marks = tab.locator("#sample .text-block mark").all_inner_texts()
    assert marks == ["wait"]  # behind a character of two UTF-16 units
    assert "Against its answer at step 10 (reward 0)" in tab.locator("#sample").inner_text()
    # 70+70=130#130 became 🙂 70+70=130 wait 70+70=140#140
    assert "".join(tab.locator("#sample ins").nth(1).all_inner_texts()) == "\U0001f642 "
    changed = tab.locator("#sample .text-block").last
    texts = changed.evaluate("e => [...e.childNodes].map(n => [n.nodeName, n.textContent])")
    assert "".join(text for kind, text in texts if kind != "INS") == "70+70=130#130"
    assert "".join(text for kind, text in texts if kind != "DEL") == "\U0001f642 70+70=130 wait 70+70=140#140"


def test_hostile_text_does_nothing(two, opened):
    tab = opened(two)
    tab.fill("#f-text", "hacked")
    blocks = tab.locator("#sample .text-block").evaluate_all("all => all.map(e => e.textContent)")
    assert blocks[:3] == [HOSTILE] * 3  # the fourth is its difference to an earlier answer
    tab.wait_for_timeout(100)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("#sample img, #sample script").count() == 0
    policy = tab.locator('meta[http-equiv="Content-Security-Policy"]').get_attribute("content")
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy


def test_what_gets_past_escaping_is_stopped_by_the_policy(two, browser):
    tab = browser.new_page()
    tab.goto(two.as_uri())
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"window.hacked = 3\">')")
    refused = tab.evaluate("fetch('https://example.org').then(() => 'reached', () => 'refused')")
    assert refused == "refused"
    assert tab.evaluate("window.hacked") is None
    tab.close()


def test_themes(two, opened):
    tab = opened(two, color_scheme="dark")
    shade = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(shade) == "rgb(23, 22, 19)"
    press(tab, "theme", "light")
    assert tab.evaluate(shade) == "rgb(252, 251, 248)"
    label = "getComputedStyle(document.querySelector('[data-figure=accuracy] svg text')).fill"
    draw(tab, "accuracy")
    assert tab.evaluate(label) == "rgb(98, 96, 90)"
    press(tab, "theme", "dark")
    assert tab.evaluate(label) == "rgb(165, 161, 152)"
    tab.emulate_media(media="print")
    assert tab.evaluate(label) == "rgb(85, 83, 77)"
    assert tab.evaluate(shade) == "rgb(255, 255, 255)"


def test_a_phone_has_no_horizontal_scroll(two, opened):
    tab = opened(two, viewport={"width": 360, "height": 740})
    draw(tab, "stack")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    assert draw(tab, "accuracy").locator("svg").bounding_box()["width"] <= 360


def test_the_keyboard_reaches_everything(two, opened):
    tab = opened(two)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    tab.keyboard.press("/")  # jumps to the search
    assert tab.evaluate("document.activeElement.id") == "f-text"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "sample-list"
    selected = "document.querySelector('#sample-list [aria-selected=true]').id"
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate(selected) == "sample-2"
    assert tab.locator("#sample-list").get_attribute("aria-activedescendant") == "sample-2"
    tab.keyboard.press("k")
    assert tab.evaluate(selected) == "sample-1"
    tab.keyboard.press("End")
    assert tab.evaluate(selected) == "sample-40"
    reached = set()
    for _ in range(140):
        tab.keyboard.press("Shift+Tab")
        reached.add(tab.evaluate("document.activeElement.parentElement?.id"))
    assert {"axis", "seeds", "smoothing", "theme", "legend", "measure"} <= reached
    named = "e => e.innerText || e.labels?.length || e.ariaLabel"
    assert all(tab.eval_on_selector_all("button, select, input", f"all => all.map({named})"))


def test_without_javascript_the_tables_are_there(two, browser):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(two.as_uri())
    text = tab.locator("body").inner_text()
    assert "To 50, 80 and 95 % of grpo's gain" in text
    assert "NSR-PreRL → GRPO" in text
    assert "Figures and samples need JavaScript" in text
    assert not tab.locator(".controls").is_visible()
    context.close()


def test_one_run_after_one_step_and_a_failed_one(tmp_path, opened):
    one = write_run(tmp_path / "one", steps=1, every=10)
    main(["report", str(one), "-o", str(tmp_path / "one.html")])
    tab = opened(tmp_path / "one.html")
    assert draw(tab, "reward").locator("path[aria-roledescription='point']").count() == 1
    failed = write_run(tmp_path / "b", steps=7, end="0,1,2", status="failed", error="CUDA <b>out</b> of memory")
    main(["report", str(failed), "-o", str(tmp_path / "b.html")])
    tab = opened(tmp_path / "b.html")
    assert "failed at step 7 of 7: CUDA <b>out</b> of memory" in tab.locator("header").inner_text()
    bare = write_run(tmp_path / "bare", files=())
    write_metrics(bare, [])
    main(["report", str(bare), "-o", str(tmp_path / "bare.html")])
    assert "nothing but its configuration yet" in opened(tmp_path / "bare.html").locator("header").inner_text()


def test_fifty_runs_are_below_five_megabytes(tmp_path, opened):
    for i in range(50):
        folder = tmp_path / "many" / f"version_{i}"
        write_run(folder, steps=100, seed=i % 2, lr=1e-5 * (1 + i // 2), samples=4)
    out = tmp_path / "report.html"
    main(["report", str(tmp_path / "many"), "-o", str(out)])
    assert out.stat().st_size < 5e6
    tab = opened(out)
    assert tab.locator("#legend button").count() == 25 + 2
    assert draw(tab, "accuracy").locator("path[aria-roledescription='line mark']").count() == 25
    assert "point is drawn" in tab.locator("header").inner_text()
