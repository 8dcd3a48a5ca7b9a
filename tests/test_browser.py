"""The rendered book in a real browser: a small book made for the test, and the real one if built.

The small book has what chapters have: parameters, metrics, mathematics, figures with captions,
a glued slider. It is executed, staged and rendered by the same code, offline.
"""

import contextlib
import dataclasses
import functools
import http.server
import io
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlsplit

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image as Pillow

from fmlib import book, runs

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on PATH for an offline book"),
]

SLIDER = """\
import numpy as np
from myst_nb import glue
from fmlib import runs, widgets

shades = [np.full((3, 8, 8), level, dtype="float32") for level in (0.0, 0.5, 1.0)]
names = ["black", "grey", "white"]
slider = widgets.slider_stack(
    shades, names, [f"a {name} square" for name in names], description="Brightness", width=160
)
glue("brightness", slider, display=False)
runs.metric("share", 0.2, low=0.1, high=0.3, n=9)"""

RAMP = """\
from io import BytesIO
from IPython.display import SVG, Image
from PIL import Image as Pillow

buffer = BytesIO()
ramp = np.tile(np.arange(0, 256, 4, dtype="uint8"), (32, 1))
Pillow.fromarray(ramp).save(buffer, format="PNG")
Image(buffer.getvalue())"""

ROOF = """\
SVG('<svg xmlns="http://www.w3.org/2000/svg" width="120" height="40">'
    '<path d="M5 35L60 5L115 35" stroke="black" fill="none"/></svg>')"""

TEXT = """\
## Of everything

(slider)=
### A slider

The square $x^2$ of {cite:t}`lee2020`, in {numref}`fig-brightness`; the share is
{glue:text}`share`, see {numref}`fig-ramp`.

$$
\\int_0^1 x\\,dx = \\tfrac12
$$ (integral)

By {eq}`integral` and [the other chapter](10_text.ipynb)."""

FIGURE = """\
```{glue:figure} brightness
:name: fig-brightness
A square, see [](#slider).
```"""


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
        "  - file: notebooks/00_all\n  - file: notebooks/10_text\n"
        "- caption: Reference\n  chapters:\n  - file: book/parameters\n  - file: book/status\n"
        "  - file: book/claims\n  - file: book/bibliography\n"
    )
    (root / "book" / "index.md").write_text(
        "# A small book\n\nIt starts with {doc}`/notebooks/00_all`, Section {ref}`slider`.\n"
    )
    (root / "book" / "bibliography.md").write_text("# Bibliography\n\n```{bibliography}\n```\n")
    (root / "book" / "claims.yml").write_text(
        "- id: half\n  paper: lee2020\n  claim: The share is below one half.\n"
        "  notebook: 00_all\n  metric: share\n  supported_if: {below: 0.5}\n"
    )
    (root / "notebooks" / "profiles.yml").write_text(
        "00_all: {smoke: {seed: 3}}\n10_text: {smoke: {}}\n"
    )
    chapter, text = root / "notebooks" / "00_all.ipynb", root / "notebooks" / "10_text.ipynb"
    notebook(
        chapter,
        "All that chapters have",
        [
            new_markdown_cell(TEXT),
            new_code_cell(SLIDER),
            new_markdown_cell(FIGURE),
            figure(RAMP, "fig-ramp", "A ramp from black to white"),
            figure(ROOF, "fig-roof", "Two lines that meet like a roof"),
            new_code_cell("runs.finish()", metadata={"tags": ["remove-cell"]}),
        ],
    )
    notebook(text, "Text alone", [new_markdown_cell("As {doc}`/notebooks/00_all` says.")])
    made = root / "_build" / "runs" / "smoke"
    runs.run(chapter, profile="smoke", directory=made / chapter.stem)
    # Text needs no kernel, whose start takes longer than all the pages.
    (made / text.stem).mkdir()
    shutil.copy(text, made / text.stem / "notebook.ipynb")
    shutil.copy(made / chapter.stem / "manifest.json", made / text.stem / "manifest.json")
    (made / text.stem / "metrics.json").write_text('{"metrics": {}}')
    return root


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    root = small_book(tmp_path_factory.mktemp("small"))
    scripts = ROOT / "_build" / "npm"
    if scripts.exists():  # a build of the real book has fetched them before
        shutil.copytree(scripts, root / "_build" / "npm")
    return book.build(profile="smoke", offline=True, root=root).html


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def serve(folder: Path):
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


def documents(html: Path) -> list[str]:
    pages = sorted(path.relative_to(html).as_posix() for path in html.rglob("*.html"))
    return [page for page in pages if not page.startswith(("_static/", "_sources/"))]


class Visit:
    """One page opened in the browser, with everything that went wrong on the way."""

    def __init__(self, browser, address: str, *, scheme: str = "light"):
        self.address = address
        self.page = browser.new_page()
        self.page.set_viewport_size({"width": 1400, "height": 900})
        self.page.emulate_media(color_scheme=scheme)
        self.problems: list[str] = []
        self.external: list[str] = []
        self.page.on("console", self.console)
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("requestfailed", lambda r: self.problems.append(f"failed: {r.url}"))
        self.page.on("response", self.response)
        self.page.on("request", self.request)
        self.page.goto(address, wait_until="networkidle")

    def console(self, message) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text}")

    def response(self, response) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")

    def request(self, request) -> None:
        there, here = urlsplit(request.url), urlsplit(self.address)
        if there.scheme in ("http", "https", "ws", "wss") and there.netloc != here.netloc:
            self.external.append(request.url)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.page.close()


IMAGES = """() => {
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  const kinds = "img, svg[role=img]:not([aria-hidden=true]), object, embed";
  return [...document.querySelectorAll(kinds)].map(node => ({
    text: (node.getAttribute("alt") ?? node.getAttribute("aria-label")
      ?? document.getElementById(node.getAttribute("aria-labelledby"))?.textContent ?? "").trim(),
    broken: node.tagName === "IMG" && node.complete && node.naturalWidth === 0,
    html: node.outerHTML.slice(0, 200),
  }));
}"""

ALTERATIONS = """() => [...document.querySelectorAll(".bd-content img")].flatMap(image => {
  const seen = [];
  for (let node = image; node && node !== document.documentElement; node = node.parentElement) {
    const style = getComputedStyle(node);
    if (style.filter !== "none") seen.push(style.filter);
    if (style.mixBlendMode !== "normal") seen.push(style.mixBlendMode);
    if (Number(style.opacity) < 1) seen.push("opacity " + style.opacity);
  }
  return seen;
})"""

UNTYPESET = """() => [...document.querySelectorAll(".math")]
  .filter(node => !node.querySelector("mjx-container") || node.querySelector("mjx-merror"))
  .map(node => node.textContent)"""


@dataclasses.dataclass
class Report:
    """What one page looked like in the browser."""

    problems: list[str]
    external: list[str]
    images: list[dict]
    alterations: dict[str, list[str]]
    formulas: int
    untypeset: list[str]
    links: list[str]
    anchors: set[str]
    narrow: int


def report(browser, address: str) -> Report:
    with Visit(browser, address) as visit:
        page = visit.page
        alterations = {}
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")
            alterations[scheme] = page.evaluate(ALTERATIONS)
        links = "nodes => nodes.map(n => n.getAttribute('href'))"
        found = Report(
            problems=visit.problems,
            external=visit.external,
            images=page.evaluate(IMAGES),
            alterations=alterations,
            formulas=page.locator(".math").count(),
            untypeset=page.evaluate(UNTYPESET),
            links=page.eval_on_selector_all("a[href]", links),
            anchors=set(page.eval_on_selector_all("[id]", "nodes => nodes.map(n => n.id)")),
            narrow=0,
        )
        page.set_viewport_size({"width": 400, "height": 800})
        found.narrow = page.evaluate("document.documentElement.scrollWidth")
        return found


@dataclasses.dataclass
class Site:
    address: str
    html: Path
    pages: dict[str, Report]


def real_book(folder: Path, scripts: Path) -> Path:
    """The pages of the real book, offline: as they are, or made from the runs that are there."""
    html = ROOT / "_build" / "html"
    if (html / book.SCRIPT_FOLDER / "require.js").exists():
        return html
    shutil.copytree(scripts, folder / "_build" / "npm")
    reasons = []
    for profile in ("default", "smoke"):
        try:
            return book.build(
                profile=profile,
                offline=True,
                root=ROOT,
                output=folder,
                runs=ROOT / "_build" / "runs",
            ).html
        except book.BookError as error:
            if not any(reason in str(error) for reason in ("no run of", "older than")):
                raise
            reasons.append(str(error).partition("; make it")[0])
    pytest.skip("the real book cannot be shown: " + "; ".join(reasons))


@pytest.fixture(scope="session", params=["small", "real"])
def site(request, browser, tmp_path_factory):
    """A book served below a folder, as on project pages, with a report of each of its pages."""
    small = request.getfixturevalue("small")
    if request.param == "small":
        html = small
    else:
        html = real_book(tmp_path_factory.mktemp("real"), small.parent / "npm")
    served = tmp_path_factory.mktemp(f"served-{request.param}")
    (served / "project").symlink_to(html, target_is_directory=True)
    with serve(served) as root:
        address = f"{root}project/"
        # index.html only leads on to the first page, whose report it would repeat.
        names = [name for name in documents(html) if name != "index.html"]
        pages = {name: report(browser, address + name) for name in names}
        yield Site(address, html, pages)


def test_pages_load_without_errors(site):
    assert {name: page.problems for name, page in site.pages.items() if page.problems} == {}


def test_offline_pages_make_no_external_request(site):
    assert {name: page.external for name, page in site.pages.items() if page.external} == {}


def test_images_have_alternative_text_and_are_loaded(site):
    images = [(name, image) for name, page in site.pages.items() for image in page.images]
    assert images
    assert [(name, image["html"]) for name, image in images if not image["text"]] == []
    assert [(name, image["html"]) for name, image in images if image["broken"]] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_leave_images_unaltered(site, scheme):
    altered = {name: page.alterations[scheme] for name, page in site.pages.items()}
    assert {name: found for name, found in altered.items() if found} == {}


def test_mathematics_is_typeset(site):
    assert sum(page.formulas for page in site.pages.values())
    assert {name: page.untypeset for name, page in site.pages.items() if page.untypeset} == {}


def test_links_lead_somewhere(site):
    broken = []
    for name, page in site.pages.items():
        for link in page.links:
            target, anchor = urldefrag(urljoin(site.address + name, link))
            if not target.startswith(site.address):
                if urlsplit(target).netloc == urlsplit(site.address).netloc:
                    broken.append((name, link))  # climbs out of the book
                continue
            file = target.removeprefix(site.address) or "index.html"
            anchors = site.pages[file].anchors if file in site.pages else {anchor}
            if not (site.html / file).is_file() or (anchor and anchor not in anchors):
                broken.append((name, link))
    assert broken == []


def test_narrow_pages_do_not_scroll_sideways(site):
    assert {name: page.narrow for name, page in site.pages.items() if page.narrow > 401} == {}


def test_sliders_answer_the_keyboard(browser, site):
    pages = [n for n in site.pages if '"fm-slider-stack"' in (site.html / n).read_text("utf-8")]
    assert pages
    for name in pages:
        stacks = (site.html / name).read_text("utf-8").count('"fm-slider-stack"')
        with Visit(browser, site.address + name) as visit:
            boxes = visit.page.locator(".fm-slider-stack")
            boxes.first.locator("img.fm-frame").first.wait_for(state="attached")
            assert boxes.count() == stacks, f"{name}: a slider is missing or rendered twice"
            for index in range(stacks):
                press_through(visit.page, boxes.nth(index))


def press_through(page, box) -> None:
    def shown() -> list[str]:
        images = box.locator("img.fm-frame").all()
        return [image.get_attribute("alt") for image in images if image.is_visible()]

    handle = box.locator("[role=slider]")
    assert handle.get_attribute("aria-label")
    handle.focus()
    page.keyboard.press("Home")
    first, told = shown(), handle.get_attribute("aria-valuetext")
    assert len(first) == 1
    page.keyboard.press("ArrowRight")
    second = shown()
    assert len(second) == 1
    assert second != first
    assert handle.get_attribute("aria-valuetext") not in (None, "", told)
    page.keyboard.press("ArrowLeft")
    assert shown() == first


def test_small_book_opens_from_disk(browser, small):
    for name in ("book/index.html", "notebooks/00_all.html", "notebooks/10_text.html"):
        with Visit(browser, (small / name).as_uri()) as visit:
            assert visit.external == [], name
            assert visit.problems == [], name
            if name == "notebooks/00_all.html":
                assert visit.page.locator(".widget-slider").count() == 1
                assert visit.page.locator("mjx-container").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pixels_are_as_stored(browser, small, scheme):
    address = (small / "notebooks" / "00_all.html").as_uri()
    with Visit(browser, address, scheme=scheme) as visit:
        image = visit.page.locator("img[alt='A ramp from black to white']")
        # In the corner it lies on whole pixels, and nothing else is in the clip.
        style = "position:fixed;left:0;top:0;border-radius:0;z-index:99999"
        image.evaluate(f"node => {{ node.style.cssText += ';{style}'; }}")
        shot = visit.page.screenshot(clip={"x": 0, "y": 0, "width": 64, "height": 32})
    found = np.asarray(Pillow.open(io.BytesIO(shot)).convert("L")).astype(int)
    assert np.abs(found - np.arange(0, 256, 4)).max() <= 1


def test_chapter_shows_its_origin_and_numbers(browser, small):
    with Visit(browser, (small / "notebooks" / "00_all.html").as_uri()) as visit:
        text = visit.page.locator("main").text_content() or ""
        assert "0.20 [0.10, 0.30]" in text
        assert "python -m fmlib run notebooks/00_all.ipynb --profile smoke" in text
        assert visit.page.get_by_text("made with the profile smoke").is_visible()
        assert "vnd.fmlib" not in text
        assert "application/papermill" not in text
        folded = visit.page.locator(".admonition.dropdown").filter(has_text="How these results")
        row = folded.locator("td", has_text="wall time")
        assert not row.is_visible()
        folded.locator("button, .admonition-title").first.click()
        row.wait_for(state="visible")
        folds = visit.page.locator("details", has_text="seed")
        assert folds.count() == 2  # defaults, and what this profile sets
        assert "# Parameters" not in (folds.nth(1).locator("pre").text_content() or "")


def test_dark_widgets_can_be_read(browser, small):
    address = (small / "notebooks" / "00_all.html").as_uri()
    with Visit(browser, address, scheme="dark") as visit:
        label = visit.page.locator(".fm-slider-stack .widget-label").first
        label.wait_for(state="visible")
        colour = label.evaluate("node => getComputedStyle(node).color")
        brightness = [int(part) for part in re.findall(r"[0-9]+", colour)[:3]]
        assert min(brightness) > 150, colour
