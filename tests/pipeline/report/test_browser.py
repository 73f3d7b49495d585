"""The report as a reader meets it: opened from disk in headless Chromium."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page

from pipeline.cli import main
from tests.support import small_world


@pytest.fixture(scope="module")
def report(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    names = ["sweep:trial", "again", "paused", "broken", "killed"]
    assert main(["compare", *names, "--outputs", str(outputs), "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """One page for the tests that do not need another."""
    with opened(browser, report, viewport={"width": 1280, "height": 900}, color_scheme="light") as page:
        yield page


@contextmanager
def opened(browser: Browser, report: Path, **options: Any) -> Iterator[Page]:
    """A page of its own; whatever it says on the console or asks of the network fails the test that opened it."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(5000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if is_foreign(request.url, report) else None)
    page.goto(report.as_uri())
    yield page
    context.close()
    assert complaints == []


def is_foreign(url: str, report: Path) -> bool:
    return url != report.as_uri() and not url.startswith("data:")


def column_of(page: Page, heading: str) -> list[str]:
    """A column of the results, from top to bottom."""
    return page.evaluate(
        """(heading) => {
            const table = document.querySelector("table.results");
            const heads = [...table.tHead.rows[0].cells];
            const place = heads.findIndex((cell) => cell.textContent.includes(heading) && !cell.hidden);
            return [...table.tBodies[0].rows].map((row) => row.cells[place].textContent.trim());
        }""",
        heading,
    )


def charts(page: Page) -> list[str]:
    page.locator("#charts .chart").first.scroll_into_view_if_needed()
    page.locator("#charts .u-over").first.wait_for()
    return page.locator("#charts .chart h3").all_inner_texts()


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(page: Page):
    heading = page.locator("table.results th", has=page.get_by_role("button", name="accuracy"))
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column_of(page, "run")[0] == "trial.0"
    assert column_of(page, "accuracy")[-3:] == ["", "", ""]  # what has none comes last
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column_of(page, "run")[0] == "trial.2"
    assert column_of(page, "accuracy")[-3:] == ["", "", ""]


def test_the_keyboard_sorts_too_and_shows_where_it_is(page: Page):
    button = page.locator("table.results thead button").first
    button.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    assert button.evaluate("button => button === document.activeElement")
    assert button.evaluate("button => getComputedStyle(button).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert column_of(page, "run") == ["again", "broken", "killed", "paused", "trial.0", "trial.1", "trial.2"]
    page.keyboard.press("Space")
    assert column_of(page, "run")[0] == "trial.2"
    assert "descending" in page.locator("#announcer").inner_text()


def test_the_best_is_marked_for_eyes_and_for_ears(page: Page):
    best = page.locator("table.results tr", has_text="trial.2").locator("td.best[data-stage=painter]", has_text="0.65")
    assert best.get_by_role("img").get_attribute("aria-label") == " best"


def test_columns_of_other_stages_and_metrics_come_when_asked_for(page: Page):
    is_shown = "heading => !heading.hidden"
    prepared = page.locator("table.results th[data-stage=prepare]", has_text="time")
    assert not prepared.evaluate(is_shown)
    page.get_by_label("prepare").check()
    assert prepared.evaluate(is_shown)
    assert page.locator("table.results th[data-stage=painter]", has_text="device hours").evaluate(is_shown)
    samples = page.locator("table.results th[data-stage=painter]", has_text="samples seen")
    assert not samples.evaluate(is_shown)
    page.get_by_label("all metrics").check()
    assert samples.evaluate(is_shown)


def test_hovering_over_a_curve_shows_every_run_s_value(page: Page):
    assert charts(page)[0] == "train/error"
    chart = page.locator("#charts .chart").first
    chart.locator(".u-over").hover()
    tip = chart.locator(".tip")
    assert "samples" in tip.inner_text()
    for name in ("trial.0", "trial.1, again", "trial.2", "paused"):
        assert name in tip.inner_text()


def test_a_curve_has_no_value_where_it_ended_or_had_not_begun(page: Page):
    chart = page.locator("#charts .chart").first
    chart.scroll_into_view_if_needed()
    chart.locator(".plot").focus()
    page.keyboard.press("End")
    tip = chart.locator(".tip")
    assert tip.inner_text().startswith("320 samples")
    assert "trial.0" in tip.inner_text()
    assert "paused" not in tip.inner_text()  # which was interrupted at 200 samples
    assert "killed" not in tip.inner_text()
    page.keyboard.press("Escape")


def test_ticks_of_small_numbers_keep_the_digits_that_tell_them_apart(page: Page):
    shown = page.evaluate("[0.00015, 0.0002, 0.00025, 0, 0.001, -0.00025].map(axisNumber)")
    assert shown == ["1.5e-4", "2e-4", "2.5e-4", "0", "0.001", "-2.5e-4"]


def shown_runs(page: Page) -> list[str]:
    return [label.inner_text() for label in page.locator("#legend label").all() if label.locator("input").is_checked()]


def test_runs_are_chosen_all_at_once_or_one_alone(page: Page):
    everyone = shown_runs(page)
    page.get_by_role("button", name="None", exact=True).click()
    assert shown_runs(page) == []
    assert page.locator("#charts .chart").count() == 0
    assert "No run is chosen." in page.locator("#curve-note").inner_text()
    page.get_by_role("button", name="All", exact=True).click()
    assert shown_runs(page) == everyone
    assert charts(page)[0] == "train/error"
    page.locator("#legend label", has_text="trial.2").click(modifiers=["Shift"])
    assert shown_runs(page) == ["trial.2"]
    page.locator("#legend").get_by_label("paused").click(modifiers=["Shift"])
    page.wait_for_function(
        "() => hiddenRuns.size === data.runs.length - 1 && !hiddenRuns.has(data.runs.indexOf('paused'))"
    )
    assert shown_runs(page) == ["paused"]
    page.locator("#legend").get_by_label("trial.0").focus()
    page.keyboard.press("Enter")
    assert shown_runs(page) == ["trial.0"]
    page.keyboard.press("Enter")
    assert shown_runs(page) == everyone


def sharing_of(page: Page, run: str) -> Locator:
    return page.locator("table.results tr", has_text=run).locator("td[data-stage=painter] details").first


def test_who_shares_a_stage_can_be_read_by_keyboard(page: Page):
    sharing = sharing_of(page, "trial.1")
    assert "with again" not in sharing.inner_text()
    sharing.locator("summary").focus()
    page.keyboard.press("Enter")
    assert "with again" in sharing.inner_text()
    page.keyboard.press("Enter")


def test_arrow_keys_read_the_values(page: Page):
    chart = page.locator("#charts .chart").first
    chart.scroll_into_view_if_needed()
    chart.locator(".plot").focus()
    page.keyboard.press("Home")
    tip = chart.locator(".tip")
    assert tip.inner_text().startswith("8 samples")
    page.keyboard.press("ArrowRight")
    assert tip.inner_text().startswith("16 samples")
    assert "0.65" in tip.inner_text()  # trial.2: 1.3 / 2
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_the_axis_switches_to_hours_by_keyboard(page: Page):
    page.get_by_role("radio", name="samples").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="hours").is_checked()
    charts(page)
    chart = page.locator("#charts .chart").first
    chart.locator(".plot").focus()
    page.keyboard.press("End")
    assert chart.locator(".tip").inner_text().startswith("1 h")
    page.get_by_role("radio", name="samples").check()


def test_a_log_scale_says_what_it_cannot_show(page: Page):
    assert "train/score" in charts(page)
    page.get_by_label("log scale").check()
    assert "train/score" not in charts(page)
    assert (
        "A log scale leaves out what is not positive, here in train/score." in page.locator("#curve-note").inner_text()
    )
    page.get_by_label("log scale").uncheck()


def test_a_run_that_is_unchecked_leaves_the_curves(page: Page):
    page.locator("#legend").get_by_label("paused").uncheck()
    charts(page)
    chart = page.locator("#charts .chart").first
    chart.locator(".u-over").hover()
    assert "trial.2" in chart.locator(".tip").inner_text()
    assert "paused" not in chart.locator(".tip").inner_text()
    page.locator("#legend").get_by_label("paused").check()


def test_the_effect_of_the_sweep_follows_the_chosen_metric(page: Page):
    effects = page.locator("#effects")
    assert "stage.painter.weight" in effects.inner_text()
    assert effects.locator("td.best").inner_text().startswith("0.65")
    page.locator("#effect-metric").select_option("painter.error")
    assert effects.locator("td.best").inner_text().startswith("0.025")
    effects.locator(".u-over").hover()
    tip = effects.locator(".tip").inner_text()
    assert tip.startswith("stage.painter.weight = 0.1")
    assert "trial.1" in tip
    assert "trial.0" not in tip


def test_captions_are_text_and_pictures_have_words(page: Page):
    rows = page.locator("table.pictures th[scope=row]").all_inner_texts()
    assert small_world.HARM in rows[1]
    assert page.get_by_role("img", name="sample of trial.0: a red").count() == 1
    loaded = page.locator("table.pictures img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert set(loaded) == {small_world.CELL // 4}


def test_the_graph_lights_the_lines_of_the_box_in_focus(page: Page):
    page.mouse.move(0, 0)
    page.locator(".graph .box").first.focus()
    assert page.locator("#graph-note").inner_text().startswith("Of trial.0, trial.1, trial.2, again")
    assert page.locator(".graph .edge.lit").count() == page.locator(".graph .edge").count() > 0
    page.locator(".graph .box").first.blur()
    assert page.locator(".graph .edge.lit").count() == 0


def test_a_phone_scrolls_tables_and_never_the_page(browser: Browser, report: Path):
    phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with opened(browser, report, **phone) as page:
        charts(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("window.visualViewport.scale") == 1
        sharing = sharing_of(page, "trial.1")
        sharing.locator("summary").tap()
        assert "with again" in sharing.inner_text()


def test_dark_is_dark_in_page_and_charts_and_follows_a_change(browser: Browser, report: Path):
    look = """() => {
        const page = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number);
        const canvas = document.querySelector("#charts canvas");
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const drawn = new Set();
        for (let at = 0; at < pixels.length; at += 4) drawn.add([...pixels.slice(at, at + 3)].join());
        return [Math.max(...page), [...drawn]];
    }"""
    with opened(browser, report, color_scheme="dark") as page:
        charts(page)
        page_in_dark, drawn_in_dark = page.evaluate(look)
        old = page.locator("#charts canvas").first.element_handle()
        page.emulate_media(color_scheme="light")
        page.wait_for_function("canvas => !canvas.isConnected", arg=old)
        charts(page)
        page_in_light, drawn_in_light = page.evaluate(look)
    assert page_in_dark < 60 < 200 < page_in_light
    assert "98,174,255" in set(drawn_in_dark) - set(drawn_in_light)  # the first run's blue in either scheme
    assert "10,102,194" in set(drawn_in_light) - set(drawn_in_dark)
