"""The pages in a real browser: complete, quiet, alone on the network, and within the window."""

import json
from pathlib import Path

import pytest
import report_samples as samples

from surefoot.report import write_report

pytestmark = pytest.mark.browser

RUN = ("fig-regimes", "fig-loss", "fig-evals", "fig-norm", "fig-multiplier", "fig-step-length")
COMPARISON = ("fig-loss", "fig-metric", "arms")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Of every page its file and the ids that it must show."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = samples.run(30)
    hostile["title"] = "<script>document.title = 'owned'; fetch('http://localhost:9/')</script>"
    hostile["notes"] = ["<img src=x onerror=\"document.title='owned'\">", "word" * 200]
    hostile["config"]["optimizer"] = "</style><script>document.title='owned'</script>"
    hostile["evals"]["</text><script>document.title='owned'</script>"] = hostile["evals"]["test_loss"]
    diverged = samples.run(60, optimizer="adamw", gamma=None, delta=None, evals=False)
    diverged |= {"status": "diverged", "message": "The loss was not finite at step 60."}
    documents = {
        "run": (samples.run(skipped=(300, 301)), RUN),
        "hostile": (hostile, RUN),
        "diverged": (diverged, tuple(i for i in RUN if i != "fig-evals")),
        "comparison": (samples.comparison(), COMPARISON),
        "crowd": (samples.comparison(10, seeds=1, steps=60), COMPARISON),
    }
    return {name: (write_report(doc, folder / f"{name}.html"), ids) for name, (doc, ids) in documents.items()}


@pytest.mark.parametrize("name", ["run", "hostile", "diverged", "comparison", "crowd"])
def test_page_is_whole_and_alone(browser, pages, name):
    path, ids = pages[name]
    browser.open(path)
    assert browser.console() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [path.as_uri()]
    assert browser.script("return document.scripts.length") == 0
    assert browser.script("return document.title") != "owned"
    assert browser.script("return document.querySelectorAll('main img').length") == 0
    repeated = "const i = [...document.querySelectorAll('[id]')].map(e => e.id); return i.length - new Set(i).size"
    assert browser.script(repeated) == 0
    for width in (1280, 900, 700, 390):
        for scheme in ("light", "dark"):
            browser.open(path, width=width, scheme=scheme)
            assert browser.script("return innerWidth") == width
            assert browser.script("return document.documentElement.scrollWidth") <= width, (width, scheme)
            for figure in ids:
                box = browser.script(
                    f"const b = document.getElementById('{figure}').getBoundingClientRect(); return [b.width, b.height]"
                )
                assert min(box) > 50, (figure, width, box)
            # One of the two drawings is to be seen, never both or neither.
            shown = browser.script(
                "return [...document.querySelectorAll('figure')].map(f => "
                "[...f.querySelectorAll(':scope > svg')].filter(s => s.getBoundingClientRect().height > 0).length)"
            )
            assert set(shown) == {1}
    assert browser.console() == []


def test_first_screen_tells_what_and_whether_it_worked(browser, pages):
    browser.open(pages["run"][0], width=1280, height=800)
    for selector in (".subject", ".formula", ".tile.hero", "#fig-regimes .sentence"):
        assert browser.script(f"return document.querySelector('{selector}').getBoundingClientRect().bottom") <= 800


def test_text_of_the_figures_stays_inside_them(browser, pages):
    """No tick or label reaches past its drawing, in either size."""
    for width in (1280, 390):
        browser.open(pages["run"][0], width=width)
        over = browser.script(
            """
            return [...document.querySelectorAll('figure > svg:not(.bar)')].flatMap(svg => {
              const s = svg.getBoundingClientRect(), card = svg.parentElement.getBoundingClientRect();
              if (!s.height) return [];
              return [...svg.querySelectorAll('text')].filter(t => {
                const b = t.getBoundingClientRect();
                return b.left < card.left || b.right > card.right || b.top < s.top - 2 || b.bottom > s.bottom + 2;
              }).map(t => t.textContent);
            });
            """
        )
        assert over == []


def test_contrast_in_both_schemes(browser, pages):
    """Text has a contrast of 4.5 to the card, lines and areas one of 3."""
    names = ["ink", "muted", "accent", "alarm", "warn", "guide", "series", "unclipped", "clipped", "floored", "skipped"]
    names += [f"arm-{i}" for i in range(8)]
    for scheme in ("light", "dark"):
        browser.open(pages["run"][0], scheme=scheme)
        colours = browser.script(
            f"const s = getComputedStyle(document.documentElement); return {json.dumps([*names, 'card', 'page'])}"
            ".map(n => s.getPropertyValue('--' + n).trim())"
        )
        found = dict(zip([*names, "card", "page"], colours))
        for name in names:
            needed = 4.5 if name in ("ink", "muted", "accent", "alarm", "warn", "guide") else 3
            assert _contrast(found[name], found["card"]) >= needed, (scheme, name)
        assert _contrast(found["muted"], found["page"]) >= 4.5
        drawn = browser.script("return getComputedStyle(document.querySelector('#fig-loss > svg')).color")
        red, green, blue = (int(part) for part in drawn.removeprefix("rgb(").removesuffix(")").split(","))
        assert f"#{red:02x}{green:02x}{blue:02x}" == found["ink"]


def test_prints(browser, pages, tmp_path: Path):
    browser.open(pages["comparison"][0])
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    metrics = {"width": 700, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert browser.script("return document.documentElement.scrollWidth") <= 700
    assert browser.script("return getComputedStyle(document.querySelector('figure svg.wide')).display") == "block"


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
