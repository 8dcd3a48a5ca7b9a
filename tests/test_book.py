"""Staging, generated pages, verdicts, offline scripts and the call of Jupyter Book."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
from pathlib import Path

import nbformat
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fmlib import book

ROOT = Path(__file__).resolve().parent.parent

PARAMETERS = """\
seed: int = 0  # of everything random
encoder: str = "none"  # name of the encoder
layers: list[str] = ["stem", "head"]  # layers to read"""

STATE = {
    "application/vnd.jupyter.widget-state+json": {
        "state": {"1a": {"model_name": "HTMLModel"}},
        "version_major": 2,
        "version_minor": 0,
    }
}

HIDDEN = {"name": "share", "mime_prefix": "application/papermill.record/"}


def clean(title: str = "Shift maps") -> nbformat.NotebookNode:
    notebook = new_notebook(
        cells=[
            new_markdown_cell(f"# {title}\n\nWhat {title} says."),
            new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
            new_code_cell("work(seed)", metadata={"mystnb": {"image": {"alt": "a map"}}}),
            new_code_cell("runs.finish()", metadata={"tags": ["remove-cell"]}),
        ],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        },
    )
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
    return notebook


def executed(title: str = "Shift maps") -> nbformat.NotebookNode:
    """What the runner leaves: an injected cell, timings, hidden records, state of widgets."""
    notebook = clean(title)
    notebook.metadata["papermill"] = {"duration": 1.5, "input_path": "somewhere"}
    notebook.metadata["jupytext"] = {"formats": "ipynb,py"}
    notebook.metadata["widgets"] = STATE
    for cell in notebook.cells:
        cell.metadata["papermill"] = {"duration": 0.1, "status": "completed"}
    injected = new_code_cell(
        "# Parameters\nseed = 3\n", metadata={"tags": ["injected-parameters"], "papermill": {}}
    )
    notebook.cells.insert(2, injected)
    prefix = HIDDEN["mime_prefix"]
    notebook.cells[3].outputs = [
        new_output("display_data", {"text/plain": "a picture", "image/png": "aGk="}),
        new_output(
            "display_data",
            {
                f"{prefix}text/plain": "'0.20 [0.10, 0.30]'",
                f"{prefix}application/vnd.fmlib.metric+json": {"name": "share", "value": 0.2},
            },
            metadata={"scrapbook": HIDDEN},
        ),
    ]
    notebook.cells[4].outputs = [
        new_output("display_data", {f"{prefix}application/vnd.fmlib.notes+json": {"device": "cpu"}})
    ]
    return notebook


def metric(
    value: float = 0.2,
    low: float | None = 0.1,
    high: float | None = 0.3,
    n: int | None = 9,
    **more,
) -> dict:
    return {
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "unit": "",
        "encoder": "squeezenet1_1",
        "text": f"{value}",
    } | more


MANIFEST = {
    "notebook": "10_shift_maps.ipynb",
    "profile": "smoke",
    "parameters": {"seed": 3, "encoder": "none", "layers": ["stem", "a|b"]},
    "seed": 3,
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "versions": {"python": "3.12.1", "torch": "2.11.0", "absent": None},
    "device": "cpu",
    "threads": 2,
    "encoders": {"squeezenet1_1": "f" * 64},
    "images": {"objects": "e" * 64},
    "wall_seconds": 12.345,
    "peak_memory_mb": 678.9,
    "started": "2026-01-02T03:04:05+00:00",
}

CLAIM = {
    "id": "share",
    "paper": "lee2020",
    "claim": "The share is\n  below one half",
    "notebook": "10_shift_maps",
    "metric": "share",
    "supported_if": {"below": 0.5},
}


@pytest.fixture
def project(tmp_path) -> Path:
    """A repository with one chapter and its run, nothing executed."""
    root = tmp_path / "project"
    (root / "notebooks").mkdir(parents=True)
    (root / "book" / "_static").mkdir(parents=True)
    (root / "book" / "index.md").write_text("# Home\n")
    (root / "book" / "README.md").write_text("for those who write the book\n")
    (root / "book" / "_static" / "fmlib.css").write_text("img { filter: none }\n")
    (root / "book" / "claims.yml").write_text(yaml.safe_dump([CLAIM]))
    (root / "_config.yml").write_text("title: A book # comment\nsphinx: {config: {numfig: true}}\n")
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters:\n- file: notebooks/10_shift_maps\n"
        "- file: book/status\n- file: book/parameters\n- file: book/claims\n"
    )
    (root / "notebooks" / "profiles.yml").write_text("10_shift_maps: {smoke: {seed: 3}}\n")
    nbformat.write(clean(), root / "notebooks" / "10_shift_maps.ipynb")
    write_run(root)
    return root


def write_run(root: Path, stem: str = "10_shift_maps", *, metrics: dict | None = None) -> Path:
    directory = root / "_build" / "runs" / "smoke" / stem
    directory.mkdir(parents=True, exist_ok=True)
    nbformat.write(executed(), directory / "notebook.ipynb")
    found = {"share": metric()} if metrics is None else metrics
    (directory / "metrics.json").write_text(json.dumps({"metrics": found}))
    (directory / "manifest.json").write_text(json.dumps(MANIFEST))
    return directory


def stage(root: Path, **options) -> list[str]:
    target = root / "_build" / "stage"
    return book.stage(
        root / "_build" / "runs", target, **{"profile": "smoke", "root": root} | options
    )


def page(root: Path) -> nbformat.NotebookNode:
    path = root / "_build" / "stage" / "notebooks" / "10_shift_maps.ipynb"
    found = nbformat.read(path, as_version=4)
    nbformat.validate(found)
    return found


# --- staging ------------------------------------------------------------------------------------


def test_stage_mirrors_the_repository(project):
    written = stage(project)
    assert written == [
        "_config.yml",
        "_toc.yml",
        "book/_static/fmlib.css",
        "book/claims.md",
        "book/index.md",
        "book/parameters.md",
        "book/status.md",
        "notebooks/10_shift_maps.ipynb",
    ]


def test_stage_touches_only_what_changed(project):
    stage(project)
    staged = project / "_build" / "stage"
    for path in staged.rglob("*"):
        os.utime(path, (1, 1))
    assert stage(project) == []
    (project / "book" / "index.md").write_text("# Another home\n")
    assert stage(project) == ["book/index.md"]
    untouched = [p for p in staged.rglob("*") if p.is_file() and p.stat().st_mtime == 1]
    assert len(untouched) == 7


def test_stage_removes_what_went_away(project):
    (project / "book" / "old").mkdir()
    (project / "book" / "old" / "page.md").write_text("# Old\n")
    stage(project)
    assert (project / "_build" / "stage" / "book" / "old" / "page.md").exists()
    shutil.rmtree(project / "book" / "old")
    assert stage(project) == ["book/old/page.md"]
    assert not (project / "_build" / "stage" / "book" / "old").exists()


def test_page_is_free_of_the_runners_traces(project):
    stage(project)
    found = page(project)
    text = json.dumps(found)
    for trace in ("jupytext", "input_path", "duration", "vnd.fmlib", "# Parameters"):
        assert trace not in text
    assert found.metadata.widgets == STATE


def test_page_keeps_outputs_and_glued_values(project):
    stage(project)
    outputs = page(project).cells[3].outputs
    assert outputs[0].data["image/png"] == "aGk="
    # Glue finds its values by this metadata; without it {glue:text} breaks
    assert outputs[1].metadata.scrapbook == HIDDEN
    assert list(outputs[1].data) == ["application/papermill.record/text/plain"]


def test_page_folds_parameters_with_a_name(project):
    stage(project)
    own, injected = page(project).cells[1:3]
    assert own.metadata.tags == ["parameters", "hide-input"]
    assert injected.metadata.tags == ["injected-parameters", "hide-input"]
    assert "defaults" in own.metadata.mystnb.code_prompt_show
    assert "profile smoke" in injected.metadata.mystnb.code_prompt_show
    assert injected.source == "seed = 3\n"


def test_page_takes_captions_from_the_notebook_not_from_its_run(project):
    path = project / "notebooks" / "10_shift_maps.ipynb"
    changed = clean()
    changed.cells[2].metadata["mystnb"]["image"]["alt"] = "a better text"
    nbformat.write(changed, path)
    stage(project)
    assert page(project).cells[3].metadata.mystnb.image.alt == "a better text"


def test_named_figures_can_be_used_by_prose(project):
    directory = project / "_build" / "runs" / "smoke" / "10_shift_maps"
    notebook = executed()
    notebook.cells[3].metadata["mystnb"] = {"figure": {"name": "fig-map", "caption": "A map."}}
    nbformat.write(notebook, directory / "notebook.ipynb")
    assert "book/figures/fig-map.png" in stage(project)
    assert (project / "_build/stage/book/figures/fig-map.png").read_bytes() == b"hi"


def test_foot_tells_how_the_results_were_made(project):
    stage(project)
    foot = page(project).cells[-1].source
    for part in (
        "python -m fmlib run notebooks/10_shift_maps.ipynb --profile smoke",
        "12.3 s",
        "679 MB",
        "cpu, 2 threads",
        "`0123456789ab` with uncommitted changes",
        "python 3.12.1, torch 2.11.0",
        "sha256 `ffffffffffffffff`",
        '`["stem", "a\\|b"]`',
        "0.20 [0.10, 0.30]",
    ):
        assert part in foot, part
    assert "absent" not in foot


def test_foot_copes_with_what_a_system_cannot_tell(project):
    path = project / "_build" / "runs" / "smoke" / "10_shift_maps" / "manifest.json"
    path.write_text(json.dumps(MANIFEST | {"git": None, "peak_memory_mb": None, "threads": None}))
    stage(project)
    foot = page(project).cells[-1].source
    assert "not under version control" in foot
    assert "unknown" in foot


def test_missing_run_names_notebook_and_command(project):
    shutil.rmtree(project / "_build" / "runs")
    with pytest.raises(book.BookError) as error:
        stage(project, profile="paper")
    assert "notebooks/10_shift_maps.ipynb" in str(error.value)
    command = "python -m fmlib run notebooks/10_shift_maps.ipynb --profile paper"
    assert command in str(error.value)
    assert not (project / "_build" / "stage").exists()


@pytest.mark.parametrize("part", ["code", "text", "cell"])
def test_run_older_than_its_notebook_is_refused(project, part):
    changed = clean()
    if part == "code":
        changed.cells[2].source = "work(seed + 1)"
    elif part == "text":
        changed.cells[0].source += " And more."
    else:
        changed.cells.append(new_markdown_cell("A last word."))
    nbformat.write(changed, project / "notebooks" / "10_shift_maps.ipynb")
    with pytest.raises(book.BookError, match=r"older than the notebook[\s\S]*fmlib run"):
        stage(project)


def test_damaged_run_is_named(project):
    (project / "_build" / "runs" / "smoke" / "10_shift_maps" / "metrics.json").write_text("{")
    with pytest.raises(book.BookError, match="10_shift_maps is damaged"):
        stage(project)


def test_toc_that_names_no_notebook_is_refused(project):
    toc = (project / "_toc.yml").read_text() + "- file: notebooks/99_none\n"
    (project / "_toc.yml").write_text(toc)
    with pytest.raises(book.BookError, match="99_none"):
        stage(project)


def test_offline_changes_the_configuration_only(project, tmp_path):
    scripts = tmp_path / "scripts"
    staged = project / "_build" / "stage"
    shutil.copytree(project / "_build/runs/smoke", project / "_build/runs/default")
    stage(project, profile="default")
    assert (staged / "_config.yml").read_text() == (project / "_config.yml").read_text()
    found = stage(project, profile="default", offline=True, scripts=scripts)
    assert found == ["_config.yml"]
    config = yaml.safe_load((staged / "_config.yml").read_text())["sphinx"]["config"]
    assert config["numfig"] is True
    (extra,) = config["html_extra_path"]
    assert (staged / extra).resolve() == scripts.resolve()
    addresses = [config["mathjax_path"], *config["nb_ipywidgets_js"]]
    # Relative to _static and out of it: absolute paths fail below a sub-folder and from disk
    assert all(address.startswith("../js/") for address in addresses)
    assert [Path(address).name for address in addresses[1:]] == [
        "require.js",
        "setup.js",
        "embed-amd.js",
    ]


def test_smoke_pages_say_that_they_are(project):
    stage(project)
    config = yaml.safe_load((project / "_build" / "stage" / "_config.yml").read_text())
    assert "smoke" in config["html"]["announcement"]
    assert config["sphinx"] == {"config": {"numfig": True}}


# --- generated pages ----------------------------------------------------------------------------


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for row in cells]


def staged(root: Path, name: str) -> str:
    stage(root)
    return (root / "_build" / "stage" / "book" / name).read_text()


def test_parameters_page(project):
    text = staged(project, "parameters.md")
    assert ["`seed`", "`int`", "`0`", "`3`", "of everything random"] in rows(text)
    assert ["`encoder`", "`str`", "`none`", "", "name of the encoder"] in rows(text)
    assert rows(text)[0] == ["name", "type", "default value", "in `smoke`", "what it is"]


def test_status_page(project):
    text = staged(project, "status.md")
    assert ["{doc}`/notebooks/10_shift_maps`", "12.3", "679", "1"] in rows(text)
    assert ["all", "12.3", "", "1"] in rows(text)
    assert ["run on", "2026-01-02"] in rows(text)
    assert "Benchmarks" not in text


def test_status_page_shows_benchmarks(project):
    (project / "results" / "benchmarks").mkdir(parents=True)
    rows_ = [
        {"encoder": name, "images": 32, "speed_up": {"a_b": ratio, "c": 1.0}, "profile": {"c": []}}
        for name, ratio in (("one", 2.34567), ("two", 3.0))
    ]
    results = {"machine": {"cpu": "AVX2", "threads": 2}, "repeats": 3, "rows": rows_}
    (project / "results" / "benchmarks" / "extract.json").write_text(json.dumps(results))
    text = staged(project, "status.md")
    assert "### Extract" in text
    assert "**speed up**" in text
    assert ["encoder", "a b", "c"] in rows(text)  # all have 32 images, so that names no row
    assert ["one", "2.346", "1"] in rows(text)
    assert ["machine", "cpu AVX2, threads 2"] in rows(text)
    assert "profile" not in text.split("Benchmarks")[1]


def test_claims_page(project):
    text = staged(project, "claims.md")
    assert "(claim-share)=\n### The share is below one half\n" in text
    link = "[The share is below one half](#claim-share)"
    badge = "{bdg-success}`supported`"
    interval = "0.20 [0.10, 0.30]".replace(" ", "\N{NO-BREAK SPACE}")
    assert [link, "{cite:t}`lee2020`", interval, badge] in rows(text)
    assert "1 supported, 0 not supported, 0 undecided." in text
    assert "encoder `squeezenet1_1`, n = 9. Supported if below 0.5." in text


def test_claims_page_says_what_is_too_few(project):
    (project / "book" / "claims.yml").write_text(yaml.safe_dump([CLAIM | {"minimum_n": 10}]))
    text = staged(project, "claims.md")
    assert "n = 9 (at least 10 needed). Supported" in text
    assert "0 supported, 0 not supported, 1 undecided." in text


def test_pages_do_not_change_without_a_reason(project):
    first = staged(project, "status.md"), staged(project, "claims.md")
    assert first == (staged(project, "status.md"), staged(project, "claims.md"))


# --- claims -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "rule", "expected"),
    [
        (metric(low=0.1, high=0.3), {"below": 0.5}, "supported"),
        (metric(low=0.6, high=0.7), {"below": 0.5}, "not supported"),
        (metric(low=0.4, high=0.6), {"below": 0.5}, "undecided"),
        (metric(low=0.6, high=0.7), {"above": 0.5}, "supported"),
        (metric(low=0.1, high=0.3), {"above": 0.5}, "not supported"),
        (metric(low=0.4, high=0.6), {"above": 0.5}, "undecided"),
        # "below" is strict: an interval that ends on the threshold does not decide for it
        (metric(low=0.4, high=0.5), {"below": 0.5}, "undecided"),
        (metric(low=0.5, high=0.5), {"below": 0.5}, "not supported"),
        (metric(low=0.5, high=0.6), {"above": 0.5}, "undecided"),
        (metric(low=None, high=None), {"below": 0.5}, "undecided"),
        (metric(n=None), {"below": 0.5}, "undecided"),
        (metric(n=4), {"below": 0.5}, "undecided"),
        (metric(n=5), {"below": 0.5}, "supported"),
        (metric(low=float("nan"), high=0.1), {"below": 0.5}, "undecided"),
        (metric(low=float("-inf"), high=0.1), {"below": 0.5}, "undecided"),
    ],
)
def test_verdict(found, rule, expected):
    assert book.verdict(found, rule) == expected


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(-1, 1))
def test_verdict_of_a_claim_and_its_opposite(low, width, threshold):
    found = metric(low=low, high=low + width)
    opposite = {"supported": "not supported", "not supported": "supported"}
    below, above = (book.verdict(found, {side: threshold}) for side in ("below", "above"))
    if threshold not in (low, low + width):
        assert above == opposite.get(below, "undecided")
    assert not (below == above == "supported")


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(-1, 1), st.floats(0.01, 1))
def test_wider_interval_never_turns_a_verdict(low, width, threshold, more):
    narrow = book.verdict(metric(low=low, high=low + width), {"below": threshold})
    wide = book.verdict(metric(low=low - more, high=low + width + more), {"below": threshold})
    assert wide in (narrow, "undecided")


@pytest.mark.parametrize(
    "rule", [{}, {"over": 1}, {"below": 1, "above": 2}, {"below": "1"}, {"below": True}]
)
def test_verdict_refuses_other_rules(rule):
    with pytest.raises(ValueError, match="supported_if"):
        book.verdict(metric(), rule)


def judged(tmp_path, *entries, metrics=None):
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump(list(entries)))
    return book.claims(path, {"10_shift_maps": {"share": metric()} if metrics is None else metrics})


def test_claims_are_judged_in_order(tmp_path):
    other = CLAIM | {"id": "other", "supported_if": {"above": 0.5}}
    found = judged(tmp_path, CLAIM, other, CLAIM | {"id": "few", "minimum_n": 10})
    verdicts = [(claim["id"], claim["verdict"]) for claim in found]
    assert verdicts == [("share", "supported"), ("other", "not supported"), ("few", "undecided")]
    assert found[0]["measured"]["encoder"] == "squeezenet1_1"


def test_claim_without_its_metric_names_both_and_the_closest(tmp_path):
    with pytest.raises(book.BookError) as error:
        judged(tmp_path, CLAIM, metrics={"shares": metric()})
    for part in ("'share'", "notebooks/10_shift_maps.ipynb", "did you mean 'shares'?"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"notebook": "10_shift_map"}, "did you mean '10_shift_maps'"),
        ({"verdict": "supported"}, r"unknown keys \['verdict'\]"),
        ({"supported_if": {"over": 1}}, "claim 'share': supported_if"),
    ],
)
def test_wrong_claim_is_named(tmp_path, change, message):
    with pytest.raises(book.BookError, match=message):
        judged(tmp_path, CLAIM | change)


def test_incomplete_and_repeated_claims_are_named(tmp_path):
    with pytest.raises(book.BookError, match=r"claim 'share' lacks \['metric'\]"):
        judged(tmp_path, {key: value for key, value in CLAIM.items() if key != "metric"})
    with pytest.raises(book.BookError, match="claim 'share' stands there twice"):
        judged(tmp_path, CLAIM, CLAIM)


def test_the_real_ledger_is_well_formed():
    entries = yaml.safe_load((ROOT / "book" / "claims.yml").read_text(encoding="utf-8"))
    metrics: dict = {}
    for entry in entries:
        metrics.setdefault(entry["notebook"], {})[entry["metric"]] = metric()
    assert len(book.claims(ROOT / "book" / "claims.yml", metrics)) == len(entries)
    keys = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "book/references.bib").read_text(), re.M))
    assert {entry["paper"] for entry in entries} <= keys
    assert {entry["notebook"] for entry in entries} <= {
        path.stem for path in (ROOT / "notebooks").glob("*.ipynb")
    }


def test_every_notebook_and_page_is_in_the_table_of_contents():
    toc = (ROOT / "_toc.yml").read_text()
    listed = set(re.findall(r"^\s*(?:- )?(?:file|root): (\S+)", toc, re.M))
    pages = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    prose = (ROOT / "book").glob("*.md")
    pages |= {f"book/{path.stem}" for path in prose if path.stem != "README"}
    assert listed == pages | {"book/parameters", "book/status", "book/claims"}


# --- scripts ------------------------------------------------------------------------------------


def package(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    return buffer.getvalue()


PACKAGES = {
    "requirejs": package({"package/require.js": "require", "package/bin/r.js": "not wanted"}),
    "@jupyter-widgets/html-manager": package(
        {
            "package/dist/embed-amd.js": "embed",
            "package/dist/libembed-amd.js": "not wanted",
            "package/dist/icons.woff2": "font",
        }
    ),
    "mathjax": package(
        {
            f"package/es5/{name}": "math"
            for name in (
                "tex-mml-chtml.js",
                "output/chtml/fonts/woff-v2/MathJax_Main-Regular.woff",
                "input/tex/extensions/color.js",
                "a11y/assistive-mml.js",
                "ui/menu.js",
                "sre/mathmaps/base.json",
                "sre/mathmaps/en.json",
            )
        }
    ),
}


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm on PATH that delivers the packages above, and a log of its calls."""
    store, folder = tmp_path / "store", tmp_path / "bin"
    store.mkdir()
    folder.mkdir()
    scripts = {}
    for name, content in PACKAGES.items():
        file = f"{name.replace('@', '').replace('/', '-')}-1.0.tgz"
        (store / file).write_bytes(content)
        digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
        scripts[name] = ("1.0", f"sha512-{digest}")
    log = tmp_path / "calls"
    program = folder / "npm"
    program.write_text(
        "#!/bin/sh\nset -e\n"
        f'echo "$@" >> {log}\n'
        f"[ ! -e {tmp_path}/broken ] || {{ echo 'no route to host' >&2; exit 1; }}\n"
        'for last; do :; done\nfile=$(echo "$last" | sed "s/^@//; s|/|-|; s/@/-/").tgz\n'
        f'cp {store}/"$file" .\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(book, "SCRIPTS", scripts)
    return tmp_path


def test_scripts_are_fetched_once_and_laid_out(npm):
    site = book.fetch_scripts(npm / "npm")
    js = site / "js"
    assert (js / "require.js").read_text() == "require"
    assert (js / "@jupyter-widgets/html-manager/dist/embed-amd.js").read_text() == "embed"
    assert (js / "@jupyter-widgets/html-manager/dist/icons.woff2").exists()
    assert (js / "@jupyter-widgets/icons.woff2").exists()  # what the controls ask for
    assert (js / "mathjax/tex-mml-chtml.js").exists()
    assert (js / "mathjax/output/chtml/fonts/woff-v2/MathJax_Main-Regular.woff").exists()
    assert "baseUrl" in (js / "setup.js").read_text()
    assert not [path for path in site.rglob("*") if path.is_file() and "not wanted" in read(path)]
    assert book.fetch_scripts(npm / "npm") == site
    calls = (npm / "calls").read_text().splitlines()
    assert len(calls) == 3
    assert all("--ignore-scripts" in call for call in calls)


def read(path: Path) -> str:
    return path.read_text(errors="replace")


def test_package_of_another_content_is_refused(npm, monkeypatch):
    other = {name: (version, "sha512-AAAA") for name, (version, _) in book.SCRIPTS.items()}
    monkeypatch.setattr(book, "SCRIPTS", other)
    with pytest.raises(book.BookError, match=r"requirejs@1\.0 is not the file"):
        book.fetch_scripts(npm / "npm")
    assert not list((npm / "npm").glob("*.tgz"))
    assert not (npm / "npm" / "complete").exists()


def test_failing_npm_is_reported_and_not_taken_for_done(npm):
    (npm / "broken").touch()
    with pytest.raises(book.BookError, match=r"requirejs@1\.0[\s\S]*no route to host"):
        book.fetch_scripts(npm / "npm")
    (npm / "broken").unlink()
    assert (book.fetch_scripts(npm / "npm") / "js" / "require.js").exists()


def test_no_npm_says_what_to_do(npm, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(book.BookError, match=r"npm[\s\S]*without --offline"):
        book.fetch_scripts(npm / "npm")


# --- building -----------------------------------------------------------------------------------


def test_warnings_fail_the_build_until_they_are_mended(project):
    """Sphinx warns of a page when it reads it, and does not read an unchanged page again."""
    shutil.copy(ROOT / "_config.yml", project / "_config.yml")
    shutil.copytree(ROOT / "book" / "_static", project / "book" / "_static", dirs_exist_ok=True)
    shutil.copy(ROOT / "book" / "references.bib", project / "book" / "references.bib")
    index = project / "book" / "index.md"
    home = "# Home\n\n```{bibliography}\n```\n"
    index.write_text(home + "\nSee [](#nowhere).\n")
    with pytest.raises(book.BookError) as error:
        book.build(profile="smoke", root=project)
    assert "book/index.md:6: WARNING" in str(error.value)
    assert "nowhere" in str(error.value)
    assert str(project / "_build" / "stage") not in str(error.value).split("The whole log")[0]
    # What the failed build has read must be read again, or the next one would pass in silence.
    assert not (project / "_build" / ".doctrees").exists()
    assert not (project / "_build" / "book.json").exists()

    index.write_text(home)
    built = book.build(profile="smoke", root=project)
    assert built.html == project / "_build" / "html"
    assert built.pages == 5
    assert (built.html / "notebooks" / "10_shift_maps.html").exists()

    def refuse(*_, **__):
        raise AssertionError("nothing changed, so there is nothing to render")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book, "_jupyter_book", refuse)
        again = book.build(profile="smoke", root=project)
    assert again.changed == ()
    assert again.pages == 5


def test_build_without_runs_leaves_nothing(project):
    shutil.rmtree(project / "_build")
    with pytest.raises(book.BookError, match="no run of notebooks/10_shift_maps"):
        book.build(profile="smoke", root=project)
    assert not (project / "_build" / "html").exists()
