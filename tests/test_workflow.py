"""The workflow on a small copy of the project: what is re-run, what is not, what a kill leaves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = "seed: int = 0  # of noise, count\nwait: float = 0.0  # before the end, s"
NOTEBOOKS = {"a": "from fmlib import alpha", "b": "from fmlib import beta"}
BOOK = """
from pathlib import Path
from types import SimpleNamespace
from fmlib import runs

class BookError(RuntimeError): ...

def build(*, profile, offline):
    html = Path("_build/html")
    html.mkdir(parents=True, exist_ok=True)
    (html / "index.html").write_text(profile)
    return SimpleNamespace(html=html, pages=1, seconds=0.0)
"""
MODULES = {
    "alpha": "from fmlib import common",
    "beta": "from fmlib import upconv",
    "common": "",
    "upconv": "",
    "book": BOOK,
}


def write_notebook(path: Path, first: str) -> None:
    notebook = new_notebook()
    notebook.cells = [
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}, id="p"),
        new_code_cell(f"{first}\nfrom fmlib import runs\nruns.metric('m', seed)", id="m"),
        new_code_cell("import time, pathlib\npathlib.Path('begun').touch()", id="b"),
        new_code_cell("time.sleep(wait)", id="w"),
        new_code_cell("runs.finish()", id="f"),
    ]
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two notebooks and three modules, run. Tests put back what they change."""
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "workflow", project / "workflow")
    for folder in ("fmlib", "notebooks", "book/_static", "data/photos", "data/weights/upconv"):
        (project / folder).mkdir(parents=True)
    for name in ("__init__", "__main__", "runs", "store"):
        shutil.copy(ROOT / f"fmlib/{name}.py", project / "fmlib")
    for name, source in MODULES.items():
        (project / f"fmlib/{name}.py").write_text(f"{source}\n")
    for name, source in NOTEBOOKS.items():
        write_notebook(project / f"notebooks/{name}.ipynb", source)
    profiles = {name: {"smoke": {"seed": 1}, "slow": {"wait": 60}} for name in NOTEBOOKS}
    (project / "notebooks/profiles.yml").write_text(yaml.safe_dump(profiles))
    for name in (
        "book/_static/x.css",
        "data/photos/1.jpg",
        "data/weights/upconv/x.safetensors",
        "requirements.lock",
        "weights.lock",
        "_config.yml",
        "_toc.yml",
        "book/index.md",
    ):
        (project / name).write_text("x\n")
    assert executed(snakemake(project, "book")) == {"a", "b", "book"}
    # Snakemake compares times of whole seconds on some file systems
    time.sleep(1)
    return project


def command(*words: str, profile: str = "smoke", **config: object) -> list[str]:
    settings = [f"{name}={value}" for name, value in {"profile": profile, **config}.items()]
    snake = ["--snakefile", "workflow/Snakefile", "--workflow-profile", "workflow/profiles/local"]
    flags = [word for word in words if word.startswith("-")]
    targets = [word for word in words if not word.startswith("-")]
    return [*snake, *flags, "--cores", "2", "--config", *settings, "threads=1", "--", *targets]


def snakemake(project: Path, *words: str, ok: bool = True, **config) -> str:
    """What a call printed."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *command(*words, **config)],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


CALLS = """
import json, pathlib, sys
from snakemake.cli import main
for name, old, new, call in json.load(sys.stdin):
    path = pathlib.Path(name)
    before = path.read_text()
    path.write_text(before.replace(old, new))
    try:
        main(call)
    except SystemExit as end:
        print("status", end.code)
    path.write_text(before)
    print("files", *sorted(map(str, pathlib.Path("_build").rglob("*.*"))), sep="\\n")
    print("=== next ===", flush=True)
"""


def calls(project: Path, *edits: tuple[str, str, str, list[str]]) -> list[str]:
    """What is printed by calls, each after an edit (file, old, new) that is then undone.

    One process for all of them: Snakemake takes seconds to start and a moment to look. With each
    call's output come its exit status and the names of all files built by then.
    """
    for file, old, _, _ in edits:
        assert old in (project / file).read_text()
    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        input=json.dumps(edits),
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=200,
    )
    logs = done.stdout.split("=== next ===")[:-1]
    assert len(logs) == len(edits), done.stdout
    return logs


def executed(log: str) -> set[str]:
    """What a log says was (or, in a dry run, would be) executed: notebooks and the book."""
    found = set(re.findall(r"Job \d+: notebook (\w+), profile", log))
    return found | set(re.findall(r"Job \d+: (book), profile", log))


def test_runs_appear_as_whole_folders(built: Path) -> None:
    for name in NOTEBOOKS:
        folder = built / "_build/runs/smoke" / name
        found = {p.name for p in folder.iterdir()}
        assert found == {"notebook.ipynb", "metrics.json", "manifest.json"}
        assert json.loads((folder / "metrics.json").read_text())["metrics"]["m"]["value"] == 1


CHANGES = {
    "nothing": ("notebooks/a.ipynb", "x", "x", set()),  # written anew, as it was
    "a notebook": ("notebooks/a.ipynb", "import time", "import time as t, time", {"a", "book"}),
    "a module of one": ("fmlib/alpha.py", "common", "common as c", {"a", "book"}),
    "a module behind it": ("fmlib/common.py", "\n", "x = 1\n", {"a", "book"}),
    "the other's module": ("fmlib/beta.py", "upconv", "upconv as u", {"b", "book"}),
    "the runner": ("fmlib/runs.py", '"""Strict', '"""Very strict', {"a", "b", "book"}),
    "the locked versions": ("requirements.lock", "x", "y", {"a", "b", "book"}),
    "a profile's value": ("notebooks/profiles.yml", "seed: 1", "seed: 2", {"a", "b", "book"}),
    "another profile's": ("notebooks/profiles.yml", "wait: 60", "wait: 50", set()),
    "the book's builder": ("fmlib/book.py", "pages=1", "pages=2", {"book"}),
    "the prose": ("book/index.md", "x", "y", {"book"}),
    "the style sheet": ("book/_static/x.css", "x", "y", {"book"}),
    "the contents": ("_toc.yml", "x", "y", {"book"}),
    "a trained decoder": ("data/weights/upconv/x.safetensors", "x", "y", {"b", "book"}),
    "a picture": ("data/photos/1.jpg", "x", "y", set()),  # of a set that neither reads
}


def test_a_change_reruns_what_rests_on_it(built: Path) -> None:
    """And nothing else, although undoing the changes before leaves newer files behind."""
    call = command("--dry-run", "book")
    edits = [(file, old, new, call) for file, old, new, _ in CHANGES.values()]
    *logs, offline = calls(built, *edits, (*edits[0][:3], command("-n", "book", offline=1)))
    found = {what: executed(log) for what, log in zip(CHANGES, logs, strict=True)}
    assert found == {what: entry[3] for what, entry in CHANGES.items()}
    assert "Nothing to be done" in logs[0]
    assert executed(offline) == {"book"}


def test_a_changed_notebook_is_rerun_alone(built: Path) -> None:
    kept = (built / "_build/runs/smoke/a/manifest.json").read_bytes()
    failing, mended = calls(
        built,
        ("notebooks/b.ipynb", "'m', seed", "'m', None", command("runs")),
        ("notebooks/b.ipynb", "'m', seed", "'m', seed + 1", command("runs")),
    )
    # nothing counts as done, the remains are where the message says
    assert "status 1" in failing
    assert "metric 'm': value is None" in failing
    assert "log are in _build/failed/smoke/b" in failing
    assert "\n_build/failed/smoke/b/notebook.ipynb" in failing
    assert "\n_build/runs/smoke/b/" not in failing
    assert "status 0" in mended
    assert executed(mended) == {"b"}
    metrics = json.loads((built / "_build/runs/smoke/b/metrics.json").read_text())
    assert metrics["metrics"]["m"]["value"] == 2
    assert "\n_build/failed/" not in mended
    assert (built / "_build/runs/smoke/a/manifest.json").read_bytes() == kept


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
def test_a_killed_build_leaves_nothing_that_counts(built: Path) -> None:
    target = "_build/runs/slow/a/metrics.json"
    (built / "begun").unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", *command(target, profile="slow")],
        cwd=built,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 180
    while not (built / "begun").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)  # the kernel is not in the group: it has to notice
    process.wait()
    left = built / "_build/runs/slow"
    assert [p for p in left.rglob("*") if p.is_file()] == []
    profiles = built / "notebooks/profiles.yml"
    before = profiles.read_text()
    profiles.write_text(before.replace("wait: 60", "wait: 0"))
    assert executed(snakemake(built, target, profile="slow")) == {"a"}
    profiles.write_text(before)
    assert (left / "a/manifest.json").exists()


def test_a_sweep_is_a_data_set_and_resumes(built: Path) -> None:
    import pandas as pd

    sweep = {"notebook": "a", "profile": "smoke", "grid": {"seed": [3, 4], "wait": [0]}}
    (built / "tiny.yml").write_text(yaml.safe_dump(sweep, default_flow_style=True))
    call = command("sweep", sweep="tiny.yml")
    dry = command("--dry-run", "sweep", sweep="tiny.yml")
    done, settled, grown, wrong = calls(
        built,
        ("tiny.yml", "a", "a", call),
        ("tiny.yml", "a", "a", dry),
        ("tiny.yml", "[3, 4]", "[3, 4, 5]", dry),
        ("tiny.yml", "seed:", "sead:", dry),
    )
    assert "status 0" in done
    table = pd.read_parquet(built / "_build/sweeps/tiny/metrics")
    assert sorted(table["value"]) == sorted(table["parameters.seed"]) == [3, 4]
    jobs = [
        sorted(re.findall(r"Job \d+: tiny: (.*)", log)) for log in (done, settled, grown, wrong)
    ]
    both = ["-p seed 3 -p wait 0", "-p seed 4 -p wait 0"]
    assert jobs == [both, [], ["-p seed 5 -p wait 0"], []]
    # a mistake in the grid shows before anything runs
    assert "unknown parameter 'sead' of a.ipynb; did you mean 'seed'?" in wrong


def test_the_real_graph_can_be_drawn() -> None:
    """Every notebook that profiles.yml names exists, and its parameters merge."""
    known = yaml.safe_load((ROOT / "notebooks/profiles.yml").read_text())
    assert executed(snakemake(ROOT, "runs", "--dry-run", "--forceall")) == set(known)


def test_profiles_hold_options_of_snakemake() -> None:
    call = [sys.executable, "-m", "snakemake", "--help"]
    text = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    for name in ("local", "slurm"):
        options = yaml.safe_load((ROOT / f"workflow/profiles/{name}/config.yaml").read_text())
        assert [name for name in options if not re.search(rf"--{name}[ ,\n]", text)] == []
