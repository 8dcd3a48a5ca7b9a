"""The rendered book in a real browser: a small book made for the test, and the real one if built.

The small book has what chapters have: parameters, metrics, mathematics, figures with captions,
a glued slider. It is executed, staged and rendered by the same code, offline.
"""

import functools
import http.server
import json
import shutil
import threading
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fmlib import book, runs

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on PATH for an offline book"),
]

SLIDER = """\
import numpy as np
from myst_nb import glue
from fmlib import widgets

shades = [np.full((3, 8, 8), level, dtype="float32") for level in (0.0, 0.5, 1.0)]
slider = widgets.slider_stack(
    shades, ["black", "grey", "white"], ["a black square", "a grey square", "a white square"],
    description="Brightness", width=160,
)
glue("brightness", slider, display=False)"""

FIGURE = """\
from io import BytesIO
from IPython.display import SVG, Image, display
import numpy as np
from PIL import Image as Pillow

buffer = BytesIO()
ramp = np.tile(np.arange(0, 256, 4, dtype="uint8"), (32, 1))
Pillow.fromarray(ramp).save(buffer, format="PNG")
Image(buffer.getvalue())"""

VECTOR = """\
SVG('<svg xmlns="http://www.w3.org/2000/svg" width="120" height="40">'
    '<path d="M5 35L60 5L115 35" stroke="black" fill="none"/></svg>')"""


def figure(source: str, name: str, alt: str):
    mystnb = {"figure": {"name": name, "caption": f"What {name} shows."}, "image": {"alt": alt}}
    return new_code_cell(source, metadata={"mystnb": mystnb})


def notebook(path: Path, title: str, cells: list) -> None:
    parameters = "seed: int = 0  # of everything random\nencoder: str = 'none'  # not used"
    content = new_notebook(
        cells=[
            new_markdown_cell(f"# {title}"),
            new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            *cells,
            new_code_cell("runs.finish()", metadata={"tags": ["remove-cell"]}),
        ],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
    )
    for index, cell in enumerate(content.cells):
        cell.id = f"cell-{index}"
    nbformat.write(content, path)


def small_book(root: Path) -> Path:
    """Write and execute the small book; its configuration and style are the real ones."""
    (root / "notebooks").mkdir(parents=True)
    shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
    shutil.copy(ROOT / "book" / "references.bib", root / "book" / "references.bib")
    shutil.copy(ROOT / "_config.yml", root / "_config.yml")
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nparts:\n- caption: Chapters\n  chapters:\n"
        "  - file: notebooks/00_slider\n  - file: notebooks/10_figures\n"
        "- caption: Reference\n  chapters:\n  - file: book/parameters\n  - file: book/status\n"
        "  - file: book/claims\n  - file: book/bibliography\n"
    )
    (root / "book" / "index.md").write_text(
        "# A small book\n\nIt starts with {doc}`/notebooks/00_slider`, Section {ref}`slider`.\n"
    )
    (root / "book" / "bibliography.md").write_text("# Bibliography\n\n```{bibliography}\n```\n")
    (root / "book" / "claims.yml").write_text(
        "- id: half\n  paper: lee2020\n  claim: The share is below one half.\n"
        "  notebook: 10_figures\n  metric: share\n  supported_if: {below: 0.5}\n"
    )
    (root / "notebooks" / "profiles.yml").write_text(
        "00_slider: {smoke: {seed: 3}}\n10_figures: {smoke: {}}\n"
    )
    notebook(
        root / "notebooks" / "00_slider.ipynb",
        "A slider",
        [
            new_code_cell("from fmlib import runs"),
            new_markdown_cell("(slider)=\n## Move it\n\nThe square $x^2$ of {cite:t}`lee2020`."),
            new_code_cell(SLIDER),
            new_markdown_cell(
                "```{glue:figure} brightness\n:name: fig-brightness\nA square.\n```\n\n"
                "See {numref}`fig-brightness`."
            ),
        ],
    )
    notebook(
        root / "notebooks" / "10_figures.ipynb",
        "Figures",
        [
            new_code_cell(
                "from fmlib import runs\nruns.metric('share', 0.2, low=0.1, high=0.3, n=9)"
            ),
            new_markdown_cell(
                "The share is {glue:text}`share`, see {numref}`fig-ramp`.\n\n"
                "$$\n\\int_0^1 x\\,dx = \\tfrac12\n$$ (integral)\n\n"
                "By {eq}`integral` and [the first chapter](00_slider.ipynb)."
            ),
            figure(FIGURE, "fig-ramp", "A ramp from black to white"),
            figure(VECTOR, "fig-roof", "Two lines that meet like a roof"),
        ],
    )
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        directory = root / "_build" / "runs" / "smoke" / path.stem
        runs.run(path, profile="smoke", directory=directory)
    return root


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    root = small_book(tmp_path_factory.mktemp("small"))
    scripts = ROOT / "_build" / "npm"
    if scripts.exists():  # a build of the real book has fetched them before
        shutil.copytree(scripts, root / "_build" / "npm")
    return book.build(profile="smoke", offline=True, root=root).html


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):  # noqa: A002 - the name is the standard library's
        pass


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="session", params=["small", "real"])
def site(request, tmp_path_factory):
    """Address of a served book and its folder. It is not served at the root, as on project pages."""
    if request.param == "small":
        html = request.getfixturevalue("small")
    else:
        html = ROOT / "_build" / "html"
        if not (html / "index.html").exists():
            pytest.skip("the real book is not built; make book")
    served = tmp_path_factory.mktemp(f"served-{request.param}")
    (served / "project").symlink_to(html, target_is_directory=True)
    handler = functools.partial(Quiet, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/project/", html
    server.shutdown()
    server.server_close()
    thread.join()


def offline(html: Path) -> bool:
    return (html / book.SCRIPT_FOLDER / "require.js").exists()


def documents(html: Path) -> list[str]:
    pages = sorted(path.relative_to(html).as_posix() for path in html.rglob("*.html"))
    return [page for page in pages if not page.startswith(("_static/", "_sources/"))]


class Visit:
    """One page opened in the browser, with everything that went wrong on the way."""

    def __init__(self, browser, address: str, *, scheme: str = "light"):
        self.page = browser.new_page(color_scheme=scheme, viewport={"width": 1400, "height": 900})
        self.problems: list[str] = []
        self.external: list[str] = []
        host = urlsplit(address).netloc
        self.page.on("console", self.console)
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("requestfailed", lambda r: self.problems.append(f"failed: {r.url}"))
        self.page.on("response", self.response)
        self.page.on(
            "request",
            lambda r: (
                self.external.append(r.url)
                if r.url.startswith("http") and urlsplit(r.url).netloc != host
                else None
            ),
        )
        self.page.goto(address, wait_until="networkidle")

    def console(self, message) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text}")

    def response(self, response) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.page.close()


def test_pages_load_without_errors_or_external_requests(browser, site):
    address, html = site
    for name in documents(html):
        with Visit(browser, address + name) as visit:
            if offline(html):
                assert visit.external == [], name
            assert visit.problems == [], name


def test_small_book_is_offline(small):
    assert offline(small)


def test_small_book_opens_from_disk(browser, small):
    for name in ("book/index.html", "notebooks/00_slider.html", "notebooks/10_figures.html"):
        with Visit(browser, (small / name).as_uri()) as visit:
            assert visit.external == [] and visit.problems == [], name
            if name == "notebooks/00_slider.html":
                assert visit.page.locator(".widget-slider").count() == 1
                assert visit.page.locator("mjx-container").count() > 0


def visible(page) -> list[str]:
    images = page.locator(".fm-slider-stack").first.locator("img.fm-frame")
    return [
        images.nth(i).get_attribute("alt")
        for i in range(images.count())
        if images.nth(i).is_visible()
    ]


def test_sliders_answer_the_keyboard(browser, site):
    address, html = site
    pages = [n for n in documents(html) if "fm-slider-stack" in (html / n).read_text("utf-8")]
    assert pages, "no page has a slider"
    for name in pages:
        with Visit(browser, address + name) as visit:
            page = visit.page
            page.wait_for_selector(".fm-slider-stack img.fm-frame")
            stacks = (html / name).read_text("utf-8").count('"fm-slider-stack"')
            assert page.locator(".fm-slider-stack").count() == stacks  # none is rendered twice
            handle = page.locator(".fm-slider-stack [role=slider]").first
            assert handle.get_attribute("aria-label")
            before, told = visible(page), handle.get_attribute("aria-valuetext")
            assert len(before) == 1
            handle.focus()
            page.keyboard.press("Home")
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowRight")
            after = visible(page)
            assert len(after) == 1 and after != before
            assert handle.get_attribute("aria-valuetext") not in (None, "", told)


def test_images_have_alternative_text_and_are_loaded(browser, site):
    address, html = site
    count = 0
    for name in documents(html):
        with Visit(browser, address + name) as visit:
            visit.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            found = visit.page.eval_on_selector_all(
                "img, svg[role=img], object, embed",
                """nodes => nodes.map(n => ({
                     text: n.getAttribute('alt') ?? n.getAttribute('aria-label') ?? '',
                     broken: n.tagName === 'IMG' && n.complete && n.naturalWidth === 0,
                     html: n.outerHTML.slice(0, 200)}))""",
            )
            count += len(found)
            assert [item["html"] for item in found if not item["text"].strip()] == [], name
            assert [item["html"] for item in found if item["broken"]] == [], name
    assert count


FILTERS = """() => [...document.querySelectorAll('.bd-content img')].map(node => {
  const seen = [];
  for (let n = node; n && n !== document.documentElement; n = n.parentElement) {
    const style = getComputedStyle(n);
    if (style.filter !== 'none') seen.push(style.filter);
    if (style.mixBlendMode !== 'normal') seen.push(style.mixBlendMode);
    if (Number(style.opacity) < 1) seen.push('opacity ' + style.opacity);
  }
  return seen.join(' ');
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_leave_images_unaltered(browser, site, scheme):
    address, html = site
    for name in documents(html):
        with Visit(browser, address + name, scheme=scheme) as visit:
            assert visit.page.evaluate("document.documentElement.dataset.theme") == scheme
            assert set(visit.page.evaluate(FILTERS)) <= {""}, name


def test_pixels_are_the_same_in_both_themes(browser, small):
    seen = {}
    for scheme in ("light", "dark"):
        address = (small / "notebooks" / "10_figures.html").as_uri()
        with Visit(browser, address, scheme=scheme) as visit:
            image = visit.page.locator("img[alt='A ramp from black to white']")
            seen[scheme] = image.screenshot(), visit.page.locator("img[alt*='roof']").screenshot()
    assert seen["light"] == seen["dark"]


def test_mathematics_is_typeset(browser, site):
    address, html = site
    pages = [name for name in documents(html) if 'class="math' in (html / name).read_text("utf-8")]
    if not offline(html):
        pytest.skip("the mathematics of an online book comes from elsewhere")
    assert pages
    for name in pages:
        with Visit(browser, address + name) as visit:
            visit.page.wait_for_selector("mjx-container", state="attached")
            assert visit.page.locator("mjx-merror").count() == 0, name
            raw = visit.page.locator(".math").evaluate_all(
                "nodes => nodes.filter(n => !n.querySelector('mjx-container')).length"
            )
            assert raw == 0, name


def test_links_lead_somewhere(browser, site):
    address, html = site
    targets: dict[str, set[str]] = {}
    links: list[tuple[str, str]] = []
    for name in documents(html):
        with Visit(browser, address + name) as visit:
            targets[address + name] = set(
                visit.page.eval_on_selector_all("[id]", "nodes => nodes.map(n => n.id)")
            )
            hrefs = visit.page.eval_on_selector_all(
                "a[href]", "nodes => nodes.map(n => n.getAttribute('href'))"
            )
            links += [(name, urljoin(address + name, href)) for href in hrefs]
    assert links
    for name, link in links:
        page, anchor = urldefrag(link)
        if not page.startswith(address):
            assert not page.startswith(address.removesuffix("project/")), f"{name}: {link}"
            continue
        path = html / page.removeprefix(address)
        assert path.exists(), f"{name}: {link}"
        if anchor and page in targets:
            assert anchor in targets[page], f"{name}: {link}"


def test_narrow_page_does_not_scroll_sideways(browser, site):
    address, html = site
    for name in documents(html):
        with Visit(browser, address + name) as visit:
            visit.page.set_viewport_size({"width": 400, "height": 800})
            wide = visit.page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 401, name


def test_chapter_shows_its_origin_and_numbers(browser, small):
    with Visit(browser, (small / "notebooks" / "10_figures.html").as_uri()) as visit:
        text = visit.page.locator("main").text_content() or ""
        assert "0.20 [0.10, 0.30]" in text
        assert "python -m fmlib run notebooks/10_figures.ipynb --profile smoke" in text
        assert "vnd.fmlib" not in text and "application/papermill" not in text
        folded = visit.page.locator(".admonition.dropdown").filter(has_text="How these results")
        row = folded.locator("td", has_text="wall time")
        assert not row.is_visible()
        folded.locator("button, .admonition-title").first.click()
        row.wait_for(state="visible")
    with Visit(browser, (small / "notebooks" / "00_slider.html").as_uri()) as visit:
        folds = visit.page.locator("details", has_text="seed")
        assert folds.count() == 2  # defaults, and what this profile sets
        assert "Parameters" not in json.dumps(folds.nth(1).locator("pre").text_content())
