"""Laws of the HTML page in a real browser: Debian's Chromium, driven by Playwright; skipped where there is none."""

import shutil

import pytest

from nmbench.results.results import load_results
from nmbench_plugins.publish.page.document import document
from reference.run_directory import record_of, write_masks, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed: no charts")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
LONG = "a-label-that-is-longer-than-any-label-should-be-on-a-phone"


def rows(protocol, model):
    """Rows of one protocol: two patterns, two seeds, a learner, layers, a failure."""
    shared = {"protocol_digest": protocol * 16, "model": model}
    detail = {f"model.layers.{n}.mlp.{kind}_proj": 0.1 * n for n in range(6) for kind in ("up", "down")}
    layers = {"value": 0.2, "stderr": 0.01, "n": 12, "lower_is_better": True, "detail": detail}
    found = [record_of("dense", None, None, **shared)]
    for place, label in enumerate(("magnitude", "wanda", "sparsegpt", "soft", LONG)):
        for pattern in ("2:4", "4:8"):
            for seed in (0, 1):
                curve = [{"step": n, "held_out": 4 - n / 100} for n in range(9)] if label == "soft" else []
                about = {"level": 0.8 / (place + 1), "prune": 0.3 * 9**place, "curve": curve, **shared}
                found.append(record_of(label, pattern, seed, **about))
    found[1:] = [{**row, "metrics": {**row["metrics"], "layers:plays@64": layers}} for row in found[1:]]
    return [*found, record_of("bad", status="failed", error="it broke", traceback="errors/bad.txt", **shared)]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a page of two protocols."""
    folder = tmp_path_factory.mktemp("page")
    paths = [write_run(folder / name, rows(name, f"/models/{name}/long-name-of-a-model")) for name in "ab"]
    for seed, label in enumerate(("wanda", "soft")):
        write_masks(paths[0], record_of(label), seed)
    path = folder / "report.html"
    path.write_text(document(load_results(*paths)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def messages():
    """Every message of the console, and every request to a network, since the last test."""
    return []


@pytest.fixture
def quiet(messages):
    """No page says anything on the console or asks for anything during the test."""
    yield
    assert messages == []


def open_page(browser, address, messages, width=1440, scheme="light"):
    """Return the page at `address`, off the network."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, accept_downloads=True
    )
    page = context.new_page()
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: messages.append(request.url) if request.url.startswith("http") else None)
    page.goto(address)
    return page


@pytest.fixture
def opened(browser, address, messages, quiet):
    """Open a page of the test's own."""
    contexts = []

    def opened_page(**given):
        page = open_page(browser, address, messages, **given)
        contexts.append(page.context)
        return page

    yield opened_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def shared(browser, address, messages):
    page = open_page(browser, address, messages)
    yield page
    page.context.close()


@pytest.fixture
def desk(shared, quiet):
    """The page on a desk, in light, with charts that are drawn once for all tests; the table shows all rows again."""
    yield shared
    shared.fill("#filter", "")
    for select in ("#pattern", "#each", "#metric"):
        shared.select_option(select, index=0)


def shown(page, column=0):
    """The texts of a column of the visible rows, by protocol."""
    return page.evaluate(
        """column => [...document.querySelector('#rows').tBodies].map(body =>
        [...body.rows].filter(row => !row.hidden && !row.classList.contains('group'))
        .map(row => row.cells[column]?.dataset.v ?? row.cells[column]?.textContent ?? ''))""",
        column,
    )


def draw_all(page):
    """Wait until every visible chart is drawn; return the number of charts."""
    page.wait_for_function(
        "[...document.querySelectorAll('.vega')].filter(p => p.offsetParent).every(p => p.querySelector('svg'))",
        timeout=120_000,
    )
    return page.locator(".vega svg").count()


def test_sorting_and_filtering(desk):
    """Rows sort within their protocol, both ways; words, patterns and seeds choose rows, and the count says so."""
    page = desk
    page.locator("#rows thead button", has_text="seconds").click()
    column = page.evaluate("[...document.querySelectorAll('#rows thead th')].findIndex(h => h.ariaSort)")
    for found in shown(page, column):
        numbers = [float(text) for text in found if text not in ("-", "")]
        assert numbers == sorted(numbers) and len(numbers) == 10
    page.locator("#rows thead button", has_text="seconds").click()
    numbers = [float(text) for text in shown(page, column)[1] if text not in ("-", "")]
    assert numbers == sorted(numbers, reverse=True)
    page.fill("#filter", "soft")
    page.select_option("#pattern", "4:8")
    assert shown(page) == [["soft"], ["soft"]] and page.inner_text("#count") == "2 of 24 rows"
    page.select_option("#each", "seed")
    assert shown(page) == [["soft", "soft"], ["soft", "soft"]]
    page.select_option("#metric", "1")
    assert page.locator("#rows tbody tr:visible td.m1:visible").count() == 4
    assert page.locator("#rows td.m0:visible").count() == 0


def check_widths(page, width):
    """Check that the page does not scroll sideways, and that its charts are drawn and fit."""
    assert draw_all(page) >= 6
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(
        "[...document.querySelectorAll('.vega svg')].every(s => s.getBoundingClientRect().right <= innerWidth)"
    )


def test_nothing_is_wider_than_a_phone(opened):
    """No horizontal scroll on a phone; charts are drawn and fit."""
    check_widths(opened(width=390), 390)


def test_nothing_is_wider_than_a_desk(desk):
    """No horizontal scroll on a desk; charts are drawn and fit."""
    check_widths(desk, 1440)


def test_charts_for_each_kind_of_cost(desk):
    """A button shows the charts of another cost, which are drawn then."""
    page = desk
    draw_all(page)
    assert page.locator("#cost .vega:visible svg").count() == 4
    page.locator("#cost button", has_text="tokens").click()
    draw_all(page)
    assert page.locator("#cost .vega:visible svg").count() == 4
    assert "forward" in page.locator("#cost .vega:visible svg").first.text_content()


def test_dark_and_paper(opened):
    """A dark screen has a dark page with light axes; paper is white, without controls, with the same charts."""
    page = opened(scheme="dark")
    draw_all(page)
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    assert page.evaluate(brightness) < 150
    page.emulate_media(media="print", color_scheme="light")
    assert page.evaluate(brightness) == 3 * 255
    assert not page.locator(".controls").is_visible() and page.locator(".vega svg").count() >= 6
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_links_and_files(desk, tmp_path):
    """The link of a row opens how it is repeated; a button saves the same CSV as the reporter."""
    page = desk
    page.locator("#rows a:visible", has_text="how").nth(1).click()
    assert page.locator("details:target pre").first.is_visible()
    assert "nmbench run --config" in page.locator("details:target pre").first.inner_text()
    with page.expect_download() as download:
        page.locator("button", has_text="report.csv").click()
    download.value.save_as(tmp_path / "report.csv")
    assert (tmp_path / "report.csv").read_text().startswith("format,label,")
