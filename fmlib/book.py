"""From executed notebooks to the rendered book.

Sphinx executes nothing here. The runs of one profile are staged into a tree that mirrors the
repository, pages that follow from the runs (parameters, status, claims) are written beside the
prose, and Jupyter Book turns the tree into HTML with every warning an error.
"""

from __future__ import annotations

import base64
import copy
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

__all__ = ["BookError", "Built", "build", "claims", "fetch_scripts", "stage", "verdict"]

ROOT = Path(__file__).resolve().parent.parent

SCRIPTS = {
    # name: (version, integrity of the package file as npm states it)
    "requirejs": (
        "2.3.7",
        "sha512-DouTG8T1WanGok6Qjg2SXuCMzszOo0eHeH9hDZ5Y4x8Je+9JB38HdTLT4/VA8OaUhBa0JPVHJ0pyBkM1z+pDsw==",
    ),
    "@jupyter-widgets/html-manager": (
        "1.0.15",
        "sha512-5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA==",
    ),
    "mathjax": (
        "3.2.2",
        "sha512-Bt+SSVU8eBG27zChVewOicYs7Xsdt40qm4+UpHyX7k0/O9NliPc+x77k1/FEsPsjKPZGJvtRZM1vO+geW0OhGw==",
    ),
}
"""The JavaScript of an offline book, by npm package."""

SCRIPT_FOLDER = "js"
ICONS = (".woff2", ".woff", ".ttf", ".svg")
MINIMUM_N = 5
VERDICTS = {"supported": "success", "not supported": "danger", "undecided": "secondary"}

SMOKE = (
    "This copy was made with the profile <b>smoke</b>: it shows that everything runs, and "
    "its numbers rest on a handful of images."
)

SETUP_JS = """\
// Modules that a page asks for by name are looked up beside this file, wherever the book lies:
// a web server's root, a sub-folder of it, or a folder opened from disk.
(function () {
  var here = document.currentScript.src.replace(/[^/]*$/, "");
  window.requirejs.config({ baseUrl: here });
})();
"""


class BookError(RuntimeError):
    """The book cannot be built; the message says what to do."""


@dataclass(frozen=True)
class Built:
    """What a build left behind.

    Attributes:
        html: Folder of the rendered book; its first page is ``index.html``.
        pages: Number of pages.
        changed: Staged files that differed from the last build's, relative to the stage.
        seconds: Wall time.
    """

    html: Path
    pages: int
    changed: tuple[str, ...]
    seconds: float


# --- building -----------------------------------------------------------------------------------


def build(
    *,
    profile: str = "default",
    offline: bool = False,
    runs: str | Path | None = None,
    root: str | Path = ROOT,
    output: str | Path | None = None,
) -> Built:
    """Stage the runs of ``profile`` and render them.

    Args:
        profile: Whose runs the book shows.
        offline: The rendered pages make no external request: their JavaScript is fetched from npm
            once and put beside them.
        runs: Folder of the runs, one folder per profile; ``<root>/_build/runs`` by default.
        root: The repository.
        output: Where ``_build`` goes; ``root`` by default.

    Returns:
        Where the HTML is. Nothing is rendered when nothing changed since the last build.

    Raises:
        BookError: A run is missing or older than its notebook, a claim names no metric, npm is
            missing (``offline``), or Jupyter Book warns; the message lists the warnings.
    """
    began = time.perf_counter()
    root = Path(root).resolve()
    made = Path(output or root).resolve() / "_build"
    html, doctrees, stamp = made / "html", made / ".doctrees", made / "book.json"
    scripts = fetch_scripts(made / "npm") if offline else None
    changed = stage(
        Path(runs) if runs else made / "runs",
        made / "stage",
        profile=profile,
        offline=offline,
        root=root,
        scripts=scripts,
    )
    state = _state(made / "stage")
    before = json.loads(stamp.read_text()) if stamp.exists() else {}
    if before != state or not (html / "index.html").exists():
        # Without the stamp a build that is interrupted or fails is not taken for a good one.
        stamp.unlink(missing_ok=True)
        if before.get("setup") != state["setup"]:
            # Pages that went away and settings Sphinx does not track would stay in the old output;
            # warnings of pages that were read before would stay silent.
            shutil.rmtree(html, ignore_errors=True)
            shutil.rmtree(doctrees, ignore_errors=True)
        _jupyter_book(made / "stage", made.parent, log=made / "book.log")
        stamp.write_text(json.dumps(state))
    pages = sum(1 for name in state["pages"] if (html / name).with_suffix(".html").exists())
    return Built(html, pages, tuple(changed), time.perf_counter() - began)


def _state(stage_directory: Path) -> dict[str, Any]:
    files = {
        path.relative_to(stage_directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(stage_directory.rglob("*"))
        if path.is_file()
    }
    pages = sorted(name for name in files if name.endswith((".md", ".ipynb")))
    titles = [_title(stage_directory / name) for name in pages]
    whole = [files["_config.yml"], files["_toc.yml"], pages, titles, sys.version]
    whole += [value for name, value in files.items() if name.startswith("book/_static/")]
    return {"setup": _digest(whole), "files": _digest(files), "pages": pages}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _title(path: Path) -> str:
    """First heading of a page: it stands in the navigation of all the others."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    found = re.search(r"^# +(.+)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else path.stem


# One of jsonschema's optional format checks compiles a grammar when it is imported, which takes as
# long as all of Sphinx; nothing here is checked with it.
JUPYTER_BOOK = """\
import sys
sys.modules["rfc3987_syntax"] = None
from jupyter_book.cli.main import main
main()
"""


def _jupyter_book(stage_directory: Path, output: Path, *, log: Path) -> None:
    command = [sys.executable, "-c", JUPYTER_BOOK, "build", str(stage_directory)]
    command += ["--path-output", str(output), "-W", "-n", "--keep-going"]
    # The log is read below, so colours and the width of a terminal are of no use in it.
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + "\n" + done.stderr)
    log.write_text(text, encoding="utf-8")
    if done.returncode == 0:
        return
    shutil.rmtree(output / "_build" / ".doctrees", ignore_errors=True)
    lines = [line.replace(f"{stage_directory}/", "") for line in text.splitlines()]
    wanted = [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL|Error)\b", line)]
    shown = list(dict.fromkeys(wanted))[:30] or lines[-30:]
    raise BookError("Jupyter Book failed:\n  " + "\n  ".join(shown) + f"\nThe whole log is {log}")


# --- staging ------------------------------------------------------------------------------------


def stage(
    runs_directory: str | Path,
    stage_directory: str | Path,
    *,
    profile: str = "default",
    offline: bool = False,
    root: str | Path = ROOT,
    scripts: str | Path | None = None,
) -> list[str]:
    """Lay out what Jupyter Book reads: a mirror of the repository with executed notebooks.

    Args:
        runs_directory: Holds ``<profile>/<notebook>/{notebook.ipynb,metrics.json,manifest.json}``.
        stage_directory: Written to. Files with the same content are left alone, so that Sphinx
            reads again only what changed; files that no longer belong are removed.
        profile: Which of the runs.
        offline: Point the pages at local JavaScript.
        root: The repository.
        scripts: Folder made by :func:`fetch_scripts`; needed when ``offline``.

    Returns:
        Names of the files written or removed, relative to the stage.

    Raises:
        BookError: A run is missing or older than its notebook, or the claims do not fit the runs.
    """
    root, stage_directory = Path(root), Path(stage_directory)
    folder = Path(runs_directory) / profile
    notebooks = _chapters(root)
    missing = [path for path in notebooks if not (folder / path.stem / "notebook.ipynb").exists()]
    if missing:
        raise BookError(
            f"no run of {_names(missing)} with the profile {profile!r}; make it with\n"
            + "\n".join(f"  {_command(path, profile)}" for path in missing)
        )
    runs = {path.stem: _Run.read(path, folder / path.stem) for path in notebooks}

    files: dict[str, bytes] = {
        "_toc.yml": (root / "_toc.yml").read_bytes(),
        "_config.yml": _config(
            root, profile=profile, offline=offline, scripts=scripts, stage=stage_directory
        ),
    }
    for path in sorted((root / "book").rglob("*")):
        name = path.relative_to(root).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.is_file() and not hidden and path.stem.upper() != "README":
            files[name] = path.read_bytes()
    files.pop("book/claims.yml", None)
    generated = {
        "book/parameters.md": _parameters_page(root, notebooks),
        "book/status.md": _status_page(runs, profile=profile, root=root),
        "book/claims.md": _claims_page(root, runs),
    }
    for path in notebooks:
        page = _chapter_page(path, runs[path.stem], profile=profile)
        generated[f"notebooks/{path.name}"] = page
    files |= {name: text.encode() for name, text in generated.items()}
    for run in runs.values():
        files |= _figures(run)
    return _write(stage_directory, files)


def _write(directory: Path, files: Mapping[str, bytes]) -> list[str]:
    changed = []
    for name, content in files.items():
        path = directory / name
        if path.is_file() and path.read_bytes() == content:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        changed.append(name)
    for path in sorted(directory.rglob("*"), reverse=True):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in files:
            path.unlink()
            changed.append(name)
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return sorted(changed)


def _chapters(root: Path) -> list[Path]:
    """Notebooks in the order of the table of contents."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    names: list[str] = []

    def walk(item: Any) -> None:
        if isinstance(item, dict):
            if "file" in item:
                names.append(str(item["file"]))
            for value in item.values():
                walk(value)
        elif isinstance(item, list):
            for value in item:
                walk(value)

    walk(toc)
    paths = [(root / name).with_suffix(".ipynb") for name in names]
    wanted = [path for path in paths if path.parent.name == "notebooks"]
    lost = [path for path in wanted if not path.exists()]
    if lost:
        raise BookError(f"_toc.yml names {_names(lost)}, which does not exist")
    return wanted


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(f"{path.parent.name}/{path.name}" for path in paths)


def _command(notebook: Path, profile: str) -> str:
    return f"python -m fmlib run notebooks/{notebook.name} --profile {profile}"


@dataclass(frozen=True)
class _Run:
    """One executed notebook with its measured numbers and its manifest."""

    source: Path
    notebook: nbformat.NotebookNode
    metrics: dict[str, dict[str, Any]]
    manifest: dict[str, Any]

    @classmethod
    def read(cls, source: Path, directory: Path) -> _Run:
        try:
            executed = nbformat.read(directory / "notebook.ipynb", as_version=4)
            metrics = json.loads((directory / "metrics.json").read_text())["metrics"]
            manifest = json.loads((directory / "manifest.json").read_text())
        except (OSError, ValueError, KeyError) as error:
            raise BookError(
                f"the run in {directory} is damaged ({error}); make it again"
            ) from error
        return cls(source, executed, metrics, manifest)

    @property
    def docname(self) -> str:
        return f"/notebooks/{self.source.stem}"


def _config(
    root: Path, *, profile: str, offline: bool, scripts: str | Path | None, stage: Path
) -> bytes:
    text = (root / "_config.yml").read_text(encoding="utf-8")
    if not offline and profile != "smoke":
        return text.encode()
    config = yaml.safe_load(text)
    if profile == "smoke":
        config.setdefault("html", {})["announcement"] = SMOKE
    if offline:
        _use_local_scripts(config, scripts, stage)
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()


def _use_local_scripts(config: dict[str, Any], scripts: str | Path | None, stage: Path) -> None:
    if scripts is None:
        raise BookError("an offline book needs the folder of its scripts, see book.fetch_scripts")
    extra = config.setdefault("sphinx", {}).setdefault("config", {})
    # Sphinx takes script names without a scheme as relative to _static and turns them into a path
    # relative to each page; climbing out of _static keeps Jupyter Book from loading every script
    # on every page, and a relative path works under any address and from disk.
    up = f"../{SCRIPT_FOLDER}"
    extra["html_extra_path"] = [
        *extra.get("html_extra_path", []),
        os.path.relpath(Path(scripts).resolve(), stage.resolve()),
    ]
    extra["mathjax_path"] = f"{up}/mathjax/tex-mml-chtml.js"
    # The order matters: setup.js configures require.js before the widgets' bundle uses it.
    extra["nb_ipywidgets_js"] = {
        f"{up}/require.js": {},
        f"{up}/setup.js": {},
        f"{up}/@jupyter-widgets/html-manager/dist/embed-amd.js": {},
    }


# --- chapters -----------------------------------------------------------------------------------


def _chapter_page(source: Path, run: _Run, *, profile: str) -> str:
    """The executed notebook as a page: the runner's traces out, its manifest at the foot."""
    clean = nbformat.read(source, as_version=4)
    page = copy.deepcopy(run.notebook)
    injected = [cell for cell in page.cells if "injected-parameters" in _tags(cell)]
    own = [cell for cell in page.cells if not any(cell is other for other in injected)]
    if [(c.cell_type, c.source) for c in own] != [(c.cell_type, c.source) for c in clean.cells]:
        raise BookError(
            f"the run of {_names([source])} is older than the notebook; make it again with\n"
            f"  {_command(source, profile)}"
        )
    for cell, original in zip(own, clean.cells, strict=True):
        cell.metadata = copy.deepcopy(original.metadata)
        if "parameters" in _tags(cell):
            _fold(cell, "the parameters and their defaults")
    for cell in injected:
        cell.metadata = nbformat.NotebookNode(tags=["injected-parameters"])
        cell.source = re.sub(r"\A# Parameters\n", "", cell.source)
        _fold(cell, f"the parameters of this run (profile {profile})")
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_for_readers, cell.outputs) if output]
    for key in ("jupytext", "papermill"):
        page.metadata.pop(key, None)
    foot = nbformat.v4.new_markdown_cell(_foot(run, profile=profile))
    foot.id = "provenance"
    page.cells.append(foot)
    page.nbformat, page.nbformat_minor = 4, 5
    return nbformat.writes(page) + "\n"


def _figures(run: _Run) -> dict[str, bytes]:
    """Named figures as files, for prose pages: ``book/figures/<name>.png`` or ``.svg``."""
    files: dict[str, bytes] = {}
    for cell in run.notebook.cells:
        name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        for output in cell.get("outputs", []) if name else []:
            data = output.get("data", {})
            if "image/png" in data:
                files[f"book/figures/{name}.png"] = base64.b64decode(data["image/png"])
            if "image/svg+xml" in data:
                files[f"book/figures/{name}.svg"] = "".join(data["image/svg+xml"]).encode()
    return files


def _tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _fold(cell: nbformat.NotebookNode, what: str) -> None:
    cell.metadata["tags"] = [*_tags(cell), "hide-input"]
    cell.metadata["mystnb"] = dict(cell.metadata.get("mystnb", {})) | {
        "code_prompt_show": f"Show {what}",
        "code_prompt_hide": f"Hide {what}",
    }


def _for_readers(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """An output without the records that are meant for the runner."""
    if "data" not in output:
        return output
    kept = {kind: value for kind, value in output["data"].items() if "vnd.fmlib." not in kind}
    if not kept:
        return None
    output["data"] = nbformat.NotebookNode(kept)
    return output


def _foot(run: _Run, *, profile: str) -> str:
    manifest = run.manifest
    git = manifest.get("git") or {}
    facts = [
        ("profile", f"`{manifest['profile']}`"),
        ("started", str(manifest["started"])),
        ("wall time", f"{manifest['wall_seconds']:.1f} s"),
        ("peak memory", _megabytes(manifest) + " MB"),
        ("device", f"{manifest['device']}, {manifest['threads']} threads"),
        ("commit", _commit(git)),
        ("seed", f"`{manifest['seed']}`"),
        *((f"parameter `{name}`", _code(value)) for name, value in manifest["parameters"].items()),
        *(
            (f"encoder `{name}`", f"sha256 `{value[:16]}`")
            for name, value in manifest["encoders"].items()
        ),
        *(
            (f"images `{name}`", f"sha256 `{value[:16]}`")
            for name, value in manifest["images"].items()
        ),
        ("versions", _versions(manifest)),
    ]
    blocks = [
        f"""\
:::{{admonition}} Run this chapter yourself
:class: tip dropdown
This page, again:
```bash
{_command(run.source, profile)}
```
With a setting of your own, any of {", ".join(f"`{name}`" for name in manifest["parameters"])}
(see {{doc}}`/book/parameters`):
```bash
python -m fmlib run notebooks/{run.source.name} -p NAME VALUE
```
:::""",
        _dropdown("How these results were made", _table(("what", "value"), facts)),
    ]
    if run.metrics:
        rows = [
            (f"`{name}`", _number(metric), _cell(metric.get("n")), _cell(metric.get("encoder")))
            for name, metric in run.metrics.items()
        ]
        heads = ("metric", "value", "n", "encoder")
        blocks.append(_dropdown("Every number of this chapter", _table(heads, rows)))
    return "\n\n".join(blocks)


def _versions(manifest: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in manifest["versions"].items() if value)


def _megabytes(manifest: Mapping[str, Any]) -> str:
    peak = manifest.get("peak_memory_mb")
    return "unknown" if peak is None else f"{peak:.0f}"


def _commit(git: Mapping[str, Any]) -> str:
    if not git.get("commit"):
        return "not under version control"
    return f"`{git['commit'][:12]}`" + (" with uncommitted changes" if git.get("dirty") else "")


# --- generated pages ----------------------------------------------------------------------------


def _parameters_page(root: Path, notebooks: Sequence[Path]) -> str:
    from fmlib import runs

    file = root / "notebooks" / "profiles.yml"
    profiles = runs.profiles(file) if file.exists() else {}
    parts = [
        "# Parameters\n",
        "Each chapter has one cell of parameters. Set any of them when you run it:\n",
        "```bash\npython -m fmlib run notebooks/NAME.ipynb --profile smoke -p NAME VALUE\n```\n",
        "A profile is a named set of values: `smoke` proves within seconds that a chapter runs, "
        "`default` is what this book shows unless its {doc}`status page </book/status>` says "
        "otherwise, `paper` is as large as the original experiment. "
        "Where a profile's cell is empty, it keeps the default value.\n",
    ]
    for notebook in notebooks:
        # Merging checks names and types, so a profile that no run could use is found here.
        own = {name: runs.merge(notebook, profile=name) for name in profiles.get(notebook.stem, {})}
        rows = [
            (
                f"`{row['name']}`",
                f"`{row['type']}`",
                _code(row["default"]),
                *(
                    _code(values[row["name"]]) if values[row["name"]] != row["default"] else ""
                    for values in own.values()
                ),
                str(row["description"] or ""),
            )
            for row in runs.parameters(notebook).to_dict("records")
        ]
        heads = ("name", "type", "default value", *(f"in `{name}`" for name in own), "what it is")
        parts += [
            f"## {_title(notebook)}\n",
            f"{{doc}}`/notebooks/{notebook.stem}`: `notebooks/{notebook.name}`\n",
            _table(heads, rows) + "\n",
        ]
    return "\n".join(parts)


def _status_page(runs: Mapping[str, _Run], *, profile: str, root: Path) -> str:
    manifests = [run.manifest for run in runs.values()]
    devices = sorted({str(manifest["device"]) for manifest in manifests})
    commits = list(dict.fromkeys(_commit(manifest.get("git") or {}) for manifest in manifests))
    started = sorted(str(manifest["started"])[:10] for manifest in manifests)
    facts = [
        ("profile", f"`{profile}`"),
        ("device", ", ".join(devices)),
        ("threads", ", ".join(sorted({_cell(m["threads"]) for m in manifests} - {""}))),
        ("run on", " to ".join(dict.fromkeys((started[0], started[-1]))) if started else ""),
        ("commit", ", ".join(commits)),
        ("versions", _versions(manifests[0]) if manifests else ""),
    ]
    rows = [
        (
            f"{{doc}}`{run.docname}`",
            f"{run.manifest['wall_seconds']:.1f}",
            _megabytes(run.manifest),
            str(len(run.metrics)),
        )
        for run in runs.values()
    ]
    total = sum(run.manifest["wall_seconds"] for run in runs.values())
    rows.append(("all", f"{total:.1f}", "", str(sum(len(run.metrics) for run in runs.values()))))
    heads = ("chapter", "wall time, s", "peak memory, MB", "metrics")
    parts = [
        "# Status\n",
        "How the pages you are reading were made. Every number in the prose comes from these "
        "runs; none is typed by hand.\n",
        _table(("what", "value"), facts) + "\n",
        "## Chapters\n",
        _table(heads, rows) + "\n",
    ]
    benchmarks = sorted((root / "results" / "benchmarks").glob("*.json"))
    if benchmarks:
        parts.append("## Benchmarks\n")
        parts.append(
            "Ratios measured within one run of `make bench`, against the plain way to do the same "
            "work on the same machine. They are kept with the repository, not measured anew with "
            "each build.\n"
        )
        for path in benchmarks:
            parts += [f"### {path.stem.replace('_', ' ').capitalize()}\n", _benchmark(path)]
    return "\n".join(parts)


def _benchmark(path: Path) -> str:
    """Tables of a benchmark's file: its ``rows``, then everything else that is a plain value.

    A row holds plain values, which name it, and dictionaries of way -> number; each of these
    becomes a table of its own. Longer things (profiles) stay in the file.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = content.pop("rows", [])
    parts = []
    quantities = dict.fromkeys(k for row in rows for k, v in row.items() if _is_plain_dict(v))
    varying = [
        name
        for name in dict.fromkeys(key for row in rows for key in row)
        if all(isinstance(row.get(name), (str, int)) for row in rows)
        and (len({row[name] for row in rows}) > 1 or name == "encoder")
    ]
    for quantity in quantities:
        ways = list(dict.fromkeys(way for row in rows for way in row.get(quantity, {})))
        cells = [
            [*(_cell(row[name]) for name in varying)]
            + [_cell(row.get(quantity, {}).get(way)) for way in ways]
            for row in rows
        ]
        parts += [
            f"**{_spaced(quantity)}**\n",
            _table([*map(_spaced, [*varying, *ways])], cells) + "\n",
        ]
    facts = [
        (_spaced(name), ", ".join(f"{k} {_cell(v)}" for k, v in value.items()))
        if _is_plain_dict(value)
        else (_spaced(name), _cell(value))
        for name, value in content.items()
        if not isinstance(value, list)
    ]
    if facts:
        parts.append(_table(("what", "value"), facts) + "\n")
    return "\n".join(parts)


def _is_plain_dict(value: Any) -> bool:
    plain = (str, int, float, type(None))
    return isinstance(value, dict) and all(isinstance(item, plain) for item in value.values())


def _spaced(name: str) -> str:
    return name.replace("_", " ")


# --- claims -------------------------------------------------------------------------------------


def verdict(
    metric: Mapping[str, Any], supported_if: Mapping[str, float], *, minimum_n: int = MINIMUM_N
) -> str:
    """What a measured interval says about a claim.

    Args:
        metric: ``value`` with ``low``, ``high`` and ``n``, as in ``metrics.json``.
        supported_if: ``{"below": threshold}`` or ``{"above": threshold}``.
        minimum_n: With fewer images or objects an interval is not trusted.

    Returns:
        ``"supported"`` when the whole interval lies on the claim's side of the threshold, ``"not
        supported"`` when the whole of it lies on the other, ``"undecided"`` otherwise: also
        without an interval, and with ``n`` unknown or too small.

    Raises:
        ValueError: ``supported_if`` is not one of the two forms.
    """
    if len(supported_if) != 1 or not set(supported_if) <= {"below", "above"}:
        raise ValueError(f"supported_if is {{below: number}} or {{above: number}}: {supported_if}")
    ((side, threshold),) = supported_if.items()
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise ValueError(f"the threshold of supported_if is a number, not {threshold!r}")
    low, high, n = metric.get("low"), metric.get("high"), metric.get("n")
    if low is None or high is None or n is None or n < minimum_n:
        return "undecided"
    if not (math.isfinite(low) and math.isfinite(high)):
        return "undecided"
    if side == "below":
        inside, outside = high < threshold, low >= threshold
    else:
        inside, outside = low > threshold, high <= threshold
    return "supported" if inside else "not supported" if outside else "undecided"


def claims(
    ledger: str | Path, metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Judge every claim of a ledger by the metrics that decide it.

    Args:
        ledger: YAML list of ``{id, paper, claim, notebook, metric, supported_if, note}``, with
            ``minimum_n`` at will.
        metrics: For each notebook (its stem), name -> metric as in ``metrics.json``.

    Returns:
        The claims in their order, each with ``measured`` (the metric) and ``verdict`` added.

    Raises:
        BookError: A claim is incomplete, repeats an id, or names a notebook or a metric that is
            not there; the message names both and the closest match.
    """
    ledger = Path(ledger)
    entries = yaml.safe_load(ledger.read_text(encoding="utf-8")) or []
    needed = {"id", "paper", "claim", "notebook", "metric", "supported_if"}
    judged: list[dict[str, Any]] = []
    for entry in entries:
        where = f"{ledger.name}: claim {entry.get('id', '?')!r}"
        lacking = sorted(needed - set(entry))
        unknown = sorted(set(entry) - needed - {"note", "minimum_n"})
        if lacking or unknown:
            raise BookError(f"{where} lacks {lacking} and has the unknown keys {unknown}")
        if any(entry["id"] == other["id"] for other in judged):
            raise BookError(f"{where} stands there twice")
        if entry["notebook"] not in metrics:
            raise BookError(
                f"{where} names the notebook {entry['notebook']!r}, which is not in the book"
                f"{_closest(entry['notebook'], metrics)}"
            )
        measured = metrics[entry["notebook"]].get(entry["metric"])
        if measured is None:
            raise BookError(
                f"{where} is decided by the metric {entry['metric']!r}, which the run of "
                f"notebooks/{entry['notebook']}.ipynb does not report"
                f"{_closest(entry['metric'], metrics[entry['notebook']])}"
            )
        try:
            found = verdict(
                measured, entry["supported_if"], minimum_n=entry.get("minimum_n", MINIMUM_N)
            )
        except ValueError as error:
            raise BookError(f"{where}: {error}") from error
        judged.append(dict(entry) | {"measured": dict(measured), "verdict": found})
    return judged


def _closest(name: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {sorted(valid)}" if valid else "; there are none"


def _claims_page(root: Path, runs: Mapping[str, _Run]) -> str:
    ledger = root / "book" / "claims.yml"
    judged = claims(ledger, {stem: run.metrics for stem, run in runs.items()})
    parts = [
        "# Claims\n",
        "What the papers claim, in our words, beside what was measured for this book. The verdict "
        "is computed: *supported* when the whole interval lies on the claim's side of the stated "
        "threshold, *not supported* when the whole of it lies on the other side, *undecided* "
        f"otherwise, and whenever there is no interval or it rests on fewer than {MINIMUM_N} "
        "images or objects. A verdict holds for the encoder and the images named, not for "
        "networks at large.\n",
    ]
    counts = {name: sum(claim["verdict"] == name for claim in judged) for name in VERDICTS}
    parts.append(", ".join(f"{count} {name}" for name, count in counts.items()) + ".\n")
    badges = {name: f"{{bdg-{colour}}}`{name}`" for name, colour in VERDICTS.items()}
    rows = [
        (
            f"[{_text(claim['claim'])}](#claim-{claim['id']})",
            f"{{cite:t}}`{claim['paper']}`",
            _number(claim["measured"]).replace(" ", "\N{NO-BREAK SPACE}"),
            badges[claim["verdict"]],
        )
        for claim in judged
    ]
    parts.append(_table(("claim", "paper", "measured", "verdict"), rows) + "\n")
    parts.append("## One by one\n")
    for claim in judged:
        measured = claim["measured"]
        ((side, threshold),) = claim["supported_if"].items()
        facts = [
            f"Measured: **{_number(measured)}**",
            f"encoder `{measured['encoder']}`" if measured.get("encoder") else "",
            _n(claim),
        ]
        parts += [
            f"(claim-{claim['id']})=\n### {_text(claim['claim'])}\n",
            f"{badges[claim['verdict']]} {{cite:p}}`{claim['paper']}`\n",
            f"{', '.join(filter(None, facts))}. Supported if {side} {threshold:g}.\n",
        ]
        if claim.get("note"):
            parts.append(_text(claim["note"]) + "\n")
        parts.append(f"From {{doc}}`/notebooks/{claim['notebook']}`, metric `{claim['metric']}`.\n")
    return "\n".join(parts)


# --- text ---------------------------------------------------------------------------------------


def _number(metric: Mapping[str, Any]) -> str:
    """A metric as ``0.83 [0.80, 0.86] unit``."""
    from fmlib import runs

    value, low, high = metric["value"], metric.get("low"), metric.get("high")
    unit = f" {metric['unit']}" if metric.get("unit") else ""
    if low is None or high is None:
        return _cell(value) + unit
    return runs.format_interval(value, low, high) + unit


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (dict, list)):
        return f"`{json.dumps(value)}`"
    return str(value)


def _n(claim: Mapping[str, Any]) -> str:
    n, needed = claim["measured"].get("n"), claim.get("minimum_n", MINIMUM_N)
    if n is None:
        return ""
    return f"n = {n}" + (f" (at least {needed} needed)" if n < needed else "")


def _text(value: Any) -> str:
    """A text that the ledger may have broken over lines, on one."""
    return " ".join(str(value).split())


def _code(value: Any) -> str:
    """A value as one would type it, in code; the empty text is shown as such."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return f"`{text}`"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        # Line breaks would end the row; spaces that do not break are kept.
        return (
            "| " + " | ".join(re.sub(r"[ \n]+", " ", c.replace("|", "\\|")) for c in cells) + " |"
        )

    return "\n".join([line(heads), "|" + " --- |" * len(heads), *map(line, rows)])


def _dropdown(title: str, body: str) -> str:
    return f":::{{admonition}} {title}\n:class: dropdown\n{body}\n:::"


# --- scripts ------------------------------------------------------------------------------------


def fetch_scripts(directory: str | Path) -> Path:
    """Fetch the JavaScript of an offline book with ``npm``, once.

    The packages are named and pinned in :data:`SCRIPTS`; a package file whose sha512 differs is
    refused. No package script is run.

    Args:
        directory: Where the package files and the unpacked scripts are kept.

    Returns:
        A folder whose content belongs at the root of the rendered book.

    Raises:
        BookError: ``npm`` is not installed, cannot reach its registry, or fetched something else.
    """
    directory = Path(directory)
    site = directory / "site"
    wanted = _digest([SCRIPTS, SETUP_JS, "icons beside both modules"])
    mark = directory / "complete"
    if mark.exists() and mark.read_text() == wanted and site.is_dir():
        return site
    npm = shutil.which("npm")
    if npm is None:
        raise BookError(
            "an offline book takes its JavaScript from npm, and there is no npm here; install "
            "Node.js (Debian, Ubuntu: apt install npm), or build without --offline"
        )
    directory.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    shutil.rmtree(site, ignore_errors=True)
    folder = site / SCRIPT_FOLDER
    packages = {name: _package(npm, name, directory) for name in SCRIPTS}
    _unpack(packages["requirejs"], {"require.js": folder / "require.js"})
    widgets = folder / "@jupyter-widgets"
    _unpack(
        packages["@jupyter-widgets/html-manager"],
        {"dist/embed-amd.js": widgets / "html-manager" / "dist" / "embed-amd.js"},
    )
    # Icons are asked for beside the module that shows them: ".../html-manager/dist/libembed-amd"
    # and "@jupyter-widgets/controls".
    for beside in (widgets / "html-manager" / "dist", widgets):
        _unpack(packages["@jupyter-widgets/html-manager"], {"dist/": beside}, suffixes=ICONS)
    _unpack(
        packages["mathjax"],
        {
            "es5/tex-mml-chtml.js": folder / "mathjax" / "tex-mml-chtml.js",
            "es5/output/chtml/fonts/": folder / "mathjax" / "output" / "chtml" / "fonts",
            "es5/input/tex/extensions/": folder / "mathjax" / "input" / "tex" / "extensions",
            "es5/a11y/": folder / "mathjax" / "a11y",
            "es5/ui/": folder / "mathjax" / "ui",
            "es5/sre/mathmaps/base.json": folder / "mathjax" / "sre" / "mathmaps" / "base.json",
            "es5/sre/mathmaps/en.json": folder / "mathjax" / "sre" / "mathmaps" / "en.json",
        },
    )
    (folder / "setup.js").write_text(SETUP_JS)
    mark.write_text(wanted)
    return site


def _package(npm: str, name: str, directory: Path) -> Path:
    version, integrity = SCRIPTS[name]
    path = directory / f"{name.replace('@', '').replace('/', '-')}-{version}.tgz"

    def found() -> str:
        digest = hashlib.sha512(path.read_bytes()).digest()
        return "sha512-" + base64.b64encode(digest).decode()

    if path.exists() and found() == integrity:
        return path
    command = [npm, "pack", "--silent", "--ignore-scripts", f"{name}@{version}"]
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=300, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BookError(f"npm did not deliver {name}@{version} within 300 s") from error
    if done.returncode or not path.exists():
        raise BookError(f"npm could not deliver {name}@{version}:\n{done.stderr.strip()[-2000:]}")
    if found() != integrity:
        path.unlink()
        raise BookError(f"{name}@{version} is not the file this book was made with (sha512)")
    return path


def _unpack(
    package: Path,
    targets: Mapping[str, Path],
    *,
    suffixes: tuple[str, ...] = ("",),
) -> None:
    """Copy the named files and folders (ending in ``/``) of an npm package file."""
    done = set()
    with tarfile.open(package) as archive:
        for member in archive:
            inner = member.name.partition("/")[2]  # below "package/"
            for source, target in targets.items():
                if source.endswith("/"):
                    if not inner.startswith(source):
                        continue
                    if not inner.endswith(suffixes):
                        continue
                    path = target / inner.removeprefix(source)
                elif inner == source:
                    path = target
                else:
                    continue
                if not member.isfile() or ".." in Path(inner).parts:
                    continue
                stream = archive.extractfile(member)
                if stream is None:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stream.read())
                done.add(source)
    lost = sorted(set(targets) - done)
    if lost:
        raise BookError(f"{package.name} holds no {lost}")
