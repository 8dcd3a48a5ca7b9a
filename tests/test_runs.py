"""Strict runs: parameters, failures, whole results, manifest, glue, import closure."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fmlib import runs

PARAMETERS = """\
encoder: str = "tiny"  # which encoder, name
seed: int = 0  # of the noise, count
rate: float = 0.5  # share of it, ratio
fast: bool = True  # leave half out, flag
layers: list[str] = ["a", "b"]  # to be read, names
sizes: list[int] = [1]  # of the crops, px
"""
METRIC = "from fmlib import runs\nruns.metric('m', rate)"
FINISH = "from fmlib import runs\nruns.finish()"


def write_notebook(path: Path, *codes: str, parameters: str | None = PARAMETERS) -> Path:
    """A notebook of these code cells; a cell that starts with `#TAG` gets that tag."""
    notebook = new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "P", "language": "python"}}
    )
    notebook.cells = [new_markdown_cell("# Title")]
    if parameters is not None:
        notebook.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    for code in codes:
        tags = [code.splitlines()[0][1:]] if re.match(r"#\w", code) else []
        notebook.cells.append(new_code_cell(code, metadata={"tags": tags}))
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `notebooks/profiles.yml` and the notebook `n`, which is also where we are."""
    monkeypatch.chdir(tmp_path)
    write_notebook(tmp_path / "notebooks/n.ipynb", METRIC, FINISH)
    profiles = {"n": {"smoke": {"seed": 3, "rate": 1}, "broken": {"speed": 1}, "default": None}}
    (tmp_path / "notebooks/profiles.yml").write_text(yaml.safe_dump(profiles, sort_keys=False))
    return tmp_path


# ------------------------------------------------------------------------------------ parameters


def test_parameter_table(project: Path) -> None:
    table = runs.parameters("notebooks/n.ipynb")
    assert list(table.columns) == ["name", "type", "default", "description"]
    assert table["name"].tolist() == ["encoder", "seed", "rate", "fast", "layers", "sizes"]
    assert table["type"].tolist() == ["str", "int", "float", "bool", "list[str]", "list[int]"]
    assert table["default"].tolist() == ["tiny", 0, 0.5, True, ["a", "b"], [1]]
    assert table["description"].tolist()[0] == "which encoder, name"


def test_parameter_table_agrees_with_papermill(project: Path) -> None:
    import papermill

    seen = papermill.inspect_notebook("notebooks/n.ipynb")
    ours = runs.parameters("notebooks/n.ipynb").set_index("name")
    assert list(seen) == ours.index.tolist()
    for name, entry in seen.items():
        assert entry["inferred_type_name"] == ours.loc[name, "type"]
        assert entry["help"] == ours.loc[name, "description"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a = 1  # no type", "is not `name: type = default`"),
        ("a: int  # no default", "is not `name: type = default`"),
        ("import os", "is not `name: type = default`"),
        ("a: dict = {}  # x", "known: "),
        ("a: int = 1.5  # x", "must be int, got float 1.5"),
        ("a: int = True  # x", "must be int, got bool True"),
        ("a: list[int] = ['1']  # x", r"must be list\[int\]"),
        ("a: int = len('x')  # x", "not a literal"),
        ("a: int = 1  # x\na: int = 2  # x", "given twice"),
        ("a: int = ", "not valid Python"),
    ],
)
def test_parameter_cell_is_strict(tmp_path: Path, source: str, message: str) -> None:
    path = write_notebook(tmp_path / "n.ipynb", parameters=source)
    with pytest.raises(runs.BadCall, match=message):
        runs.parameters(path)


def test_a_notebook_may_have_no_parameters_but_not_two_cells_of_them(tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "n.ipynb", parameters=None)
    assert len(runs.parameters(path)) == 0
    path = write_notebook(tmp_path / "n.ipynb", "#parameters\nb: int = 1  # x")
    with pytest.raises(runs.BadCall, match="2 cells tagged"):
        runs.parameters(path)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("encoder", "1", "1"),
        ("encoder", "[a", "[a"),
        ("encoder", "", ""),
        ("seed", "010", 10),  # YAML 1.1 reads eight
        ("seed", "-3", -3),
        ("rate", "1e-3", 1e-3),  # YAML 1.1 reads text
        ("rate", "2", 2.0),
        ("fast", "no", False),
        ("fast", "true", True),
        ("layers", "a, b.1", ["a", "b.1"]),
        ("layers", "[1, x]", ["1", "x"]),
        ("layers", '["a,b", "c"]', ["a,b", "c"]),
        ("layers", "", []),
        ("sizes", "[1, 2]", [1, 2]),
        ("sizes", "3", [3]),
    ],
)
def test_text_becomes_the_annotated_type(project: Path, name: str, text: str, value: object):
    found = runs.from_text("notebooks/n.ipynb", [(name, text)])[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seed", "1.5"),
        ("seed", "one"),
        ("seed", "true"),
        ("rate", "fast"),
        ("rate", "nan"),
        ("rate", "inf"),
        ("fast", "2"),
        ("fast", "maybe"),
        ("sizes", "[1, x]"),
        ("sizes", "[1"),
        ("sizes", "[[1]]"),
    ],
)
def test_text_of_another_type_is_refused(project: Path, name: str, text: str) -> None:
    with pytest.raises(runs.BadCall, match=f"parameter '{name}' must be"):
        runs.from_text("notebooks/n.ipynb", [(name, text)])


def test_a_parameter_given_twice_is_refused(project: Path) -> None:
    with pytest.raises(runs.BadCall, match="'seed' is given twice"):
        runs.from_text("notebooks/n.ipynb", [("seed", "1"), ("seed", "2")])


@settings(max_examples=50)
@given(
    encoder=st.text(),
    seed=st.integers(),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    fast=st.booleans(),
    sizes=st.lists(st.integers()),
    layers=st.lists(st.text(alphabet=st.characters(codec="ascii", exclude_categories=["C"]))),
)
def test_arguments_are_read_back_unchanged(tmp_path_factory, **values: object) -> None:
    path = tmp_path_factory.getbasetemp() / "arguments.ipynb"
    if not path.exists():
        write_notebook(path)
    words = runs.arguments(values)
    assert words[0::3] == ["-p"] * len(values)
    assert runs.from_text(path, zip(words[1::3], words[2::3], strict=True)) == values


def test_values_merge_in_order(project: Path) -> None:
    assert runs.merge("notebooks/n.ipynb")["seed"] == 0
    assert runs.merge("notebooks/n.ipynb", profile="smoke")["seed"] == 3
    merged = runs.merge("notebooks/n.ipynb", profile="smoke", parameters={"seed": 5})
    assert merged["seed"] == 5
    assert type(merged["rate"]) is float  # the profile's 1, an int, is fine for a float
    assert list(merged) == ["encoder", "seed", "rate", "fast", "layers", "sizes"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"parameters": {"enconder": "x"}}, "'enconder'.*did you mean 'encoder'.*Valid.*seed"),
        ({"parameters": {"seed": "1"}}, "'seed' must be int, got str '1'"),
        ({"parameters": {"seed": True}}, "'seed' must be int, got bool"),
        ({"parameters": {"encoder": 1}}, "'encoder' must be str, got int"),
        ({"parameters": {"fast": 1}}, "'fast' must be bool"),
        ({"parameters": {"layers": "a"}}, r"'layers' must be list\[str\]"),
        ({"parameters": {"rate": float("nan")}}, "'rate' must be finite"),
        ({"profile": "smok"}, "did you mean 'smoke'.*Valid profiles: default, smoke, broken"),
        ({"profile": "broken"}, "profile 'broken': unknown parameter 'speed'.*'seed'"),
        ({"notebook": "notebooks/m.ipynb"}, "no notebook at .*did you mean 'n.ipynb'"),
        ({"notebook": "notebooks/profiles.yml"}, "is not a notebook"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"directory": "notebooks/n.ipynb"}, "exists and is not a folder"),
    ],
)
def test_a_bad_call_writes_nothing(project: Path, call: dict, message: str) -> None:
    before = tree(project)
    with pytest.raises(runs.BadCall, match=message):
        runs.run(**{"notebook": "notebooks/n.ipynb", **call})
    assert tree(project) == before


@pytest.mark.parametrize("text", ["n: [1]", "n: {smoke: 1}", "- n", "n: {"])
def test_malformed_profiles_are_refused(project: Path, text: str) -> None:
    (project / "notebooks/profiles.yml").write_text(text)
    with pytest.raises(runs.BadCall, match="profiles"):
        runs.merge("notebooks/n.ipynb", profile="smoke")


# ----------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_notebook_metrics_and_manifest(project: Path, monkeypatch, capfd) -> None:
    # What a user's machine may have lying about, none of which may reach the kernel
    (project / "home/profile_default/startup").mkdir(parents=True)
    (project / "home/profile_default/startup/0.py").write_text("stray = 1")
    (project / "startup.py").write_text("stray = 1")
    spec = project / "share/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    argv = ["/bin/false", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    monkeypatch.setenv("IPYTHONDIR", str(project / "home"))
    monkeypatch.setenv("PYTHONSTARTUP", str(project / "startup.py"))
    monkeypatch.setenv("JUPYTER_PATH", str(project / "share"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (project / "requirements.lock").write_text("a==1")
    source = write_notebook(
        project / "notebooks/n.ipynb",
        "import os, sys\nfrom fmlib import runs",
        "assert 'stray' not in dir()\nassert (seed, rate, encoder) == (3, 1.0, 'other')",
        f"assert sys.executable == {sys.executable!r}\nassert os.getcwd() == {str(project)!r}",
        "assert os.environ['MPLBACKEND'].endswith('inline')",
        "assert os.environ['OMP_NUM_THREADS'] == '1'",
        "runs.metric('cosine', 0.83, low=0.8, high=0.86, n=12, encoder=encoder)\n"
        "runs.metric('shift', 4.25, unit='px')\n"
        "runs.metric('count', 7, text='seven')",
        "from fmlib import store\nstore.note('encoder', 'tiny', 'abc')\n"
        "store.note('images', 'photos', 'def')",
        FINISH,
    )
    before = source.read_bytes()
    result = runs.run(source, profile="smoke", parameters={"encoder": "other"}, progress=True)

    assert source.read_bytes() == before
    assert "n: " in capfd.readouterr().err  # the bar of cells
    assert result.directory == project / "_build/runs/smoke/n"
    names = {"notebook.ipynb", "metrics.json", "manifest.json"}
    assert {p.name for p in result.directory.iterdir()} == names
    assert {p.name for p in (project / "_build").iterdir()} == {"runs"}
    assert json.loads((result.directory / "metrics.json").read_text()) == {
        "metrics": result.metrics
    }
    assert result.metrics == {
        "cosine": {
            "value": 0.83,
            "low": 0.8,
            "high": 0.86,
            "n": 12,
            "unit": "",
            "encoder": "other",
            "text": "0.83 [0.80, 0.86]",
        },
        "shift": dict.fromkeys(("low", "high", "n", "encoder"))
        | {"value": 4.25, "unit": "px", "text": "4.25"},
        "count": dict.fromkeys(("low", "high", "n", "encoder"))
        | {"value": 7, "unit": "", "text": "seven"},
    }
    manifest = json.loads((result.directory / "manifest.json").read_text())
    assert manifest == result.manifest
    assert manifest["notebook"] == "n.ipynb"
    assert manifest["profile"] == "smoke"
    expected = runs.merge(source, profile="smoke", parameters={"encoder": "other"})
    assert manifest["parameters"] == expected
    assert manifest["seed"] == 3
    assert manifest["git"] is None  # no checkout
    assert manifest["encoders"] == {"tiny": "abc"}
    assert manifest["images"] == {"photos": "def"}
    assert manifest["versions"]["python"] == sys.version.split()[0]
    assert manifest["versions"]["numpy"] == np.__version__
    assert all(manifest["versions"].values())
    assert all(len(value) == 64 for value in manifest["hashes"].values())
    assert manifest["threads"] is None  # torch's, which this notebook does without
    assert manifest["device"].startswith(("cpu", "cuda", "mps"))
    assert manifest["wall_seconds"] > 0
    assert 20 < manifest["peak_memory_mb"] < 20_000

    executed = nbformat.read(result.notebook, as_version=4)
    nbformat.validate(executed)
    assert str(project) not in json.dumps(executed.metadata)
    injected = [
        c.source for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])
    ]
    assert injected == ['# Parameters\nencoder = "other"\nseed = 3\nrate = 1.0\n']

    # myst-nb finds the numbers, can format them, and leaves nothing of them on the page
    from myst_nb.core.variables import format_plain_text
    from myst_nb.ext.glue import GLUE_PREFIX, extract_glue_data_cell

    assert GLUE_PREFIX == runs.GLUE_PREFIX
    glued = {}
    for cell in executed.cells:
        if cell.cell_type == "code":
            glued |= dict(extract_glue_data_cell(cell))
            assert cell.outputs == []

    def text(name: str, form: str = "s") -> str:
        return format_plain_text(glued[name]["data"]["text/plain"], form)

    assert text("cosine") == "0.83 [0.80, 0.86]"
    assert text("cosine.low", ".1f") == "0.8"
    assert text("cosine.n") == "12"
    assert text("shift", ".3f") == "4.250"
    assert text("shift") == "4.25"
    assert text("count") == "seven"
    assert text("count.value", "d") == "7"


FAILURES = {
    "raises": (["x = 1", "#\n1 / 0", FINISH], 3, "ZeroDivisionError: division by zero"),
    "exits": (["import sys\nsys.exit(0)", FINISH], 2, "SystemExit: 0"),
    "dies": (["import os\nos._exit(0)", FINISH], 2, "the kernel died, exit status 0"),
    "is killed": (["import os\nos.kill(os.getpid(), 9)"], 2, "exit status -9 .*memory"),
    "quits": (["exit()", "x = 1", FINISH], 2, "the cell ended the kernel"),
    "is skipped": (["#skip-execution\nx = 1", FINISH], 2, "was not executed"),
    "may raise": (["#raises-exception\n1 / 0", FINISH], 2, "ZeroDivisionError"),
    "does not finish": (["x = 1"], 2, "must call runs.finish"),
    "goes on": ([FINISH, "x = 1"], 3, "must call runs.finish"),
    "repeats a metric": ([METRIC, METRIC, FINISH], None, "metric 'm' is recorded twice"),
    "is not finite": (["from fmlib import runs\nruns.metric('m', rate / 1e-320)"], 2, "'m'.*inf"),
    "takes too long": (["import time\ntime.sleep(60)", FINISH], 2, "no end after 1 s"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_run_that_is_not_whole_fails(project: Path, name: str) -> None:
    codes, cell, message = FAILURES[name]
    write_notebook(project / "notebooks/n.ipynb", *codes)
    timeout = 1 if name == "takes too long" else None
    with pytest.raises(runs.NotebookFailed, match=message) as caught:
        runs.run("notebooks/n.ipynb", profile="smoke", timeout=timeout)
    error = caught.value
    assert not (project / "_build/runs").exists() or not any((project / "_build/runs").rglob("*.*"))
    assert error.directory == project / "_build/failed/smoke/n"
    assert str(Path("_build/failed/smoke/n")) in str(error)
    remains = {p.name for p in error.directory.iterdir()}
    assert remains == {"notebook.ipynb", "error.txt", "kernel.log"}
    assert str(error).splitlines()[0] in (error.directory / "error.txt").read_text()
    if cell is not None:  # counted in the notebook as written, without the injected cell
        assert error.cell == cell
        assert error.source == codes[cell - 2]
        assert error.source.splitlines()[-1] in str(error)


def test_a_failure_keeps_the_earlier_result_and_a_success_clears_the_failure(
    project: Path,
) -> None:
    (project / "switch").write_text("1")
    write_notebook(
        project / "notebooks/n.ipynb", "assert int(open('switch').read())", METRIC, FINISH
    )
    result = runs.run("notebooks/n.ipynb", directory="out")
    good = tree(result.directory)
    (project / "switch").write_text("0")
    with pytest.raises(runs.NotebookFailed) as caught:
        runs.run("notebooks/n.ipynb", directory="out")
    assert caught.value.directory == Path("out.failed")
    assert caught.value.directory.is_dir()
    assert tree(result.directory) == good
    (project / "switch").write_text("1")
    runs.run("notebooks/n.ipynb", directory="out")
    assert not caught.value.directory.exists()


def start(notebook: str, output: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fmlib", "run", notebook, "--output", output]

    def heed_interrupts() -> None:
        # A background job of a shell, as a test run may be, ignores SIGINT and hands that on.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(
        command,
        stdout=-1,
        stderr=-1,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts if os.name == "posix" else None,
    )


def test_runs_side_by_side_are_whole_and_bit_identical(project: Path) -> None:
    write_notebook(
        project / "notebooks/n.ipynb",
        "import numpy as np\nfrom fmlib import runs",
        "noise = np.random.default_rng(seed).normal(size=1000)",
        "runs.metric('mean', noise.mean(), low=noise.min(), high=noise.max(), n=noise.size)",
        "runs.metric('order', hash(str(sorted({'a', 'b', 'c'}, key=hash))))",
        FINISH,
    )
    both = [start("notebooks/n.ipynb", name) for name in ("a", "b")]
    for process in both:
        _, error = process.communicate(timeout=90)
        assert process.returncode == 0, error
    first, second = (Path(name, "metrics.json").read_bytes() for name in ("a", "b"))
    assert first == second
    mean = np.random.default_rng(0).normal(size=1000).mean()
    assert json.loads(first)["metrics"]["mean"]["value"] == mean


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_an_interrupt_stops_the_kernel_and_leaves_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    monkeypatch.setenv("TMPDIR", str(project / "tmp"))
    (project / "tmp").mkdir()
    write_notebook(
        project / "notebooks/n.ipynb",
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))",
        "time.sleep(60)",
        FINISH,
    )
    before = {*tree(project), "pid"}
    process = start("notebooks/n.ipynb", "out")
    deadline = time.monotonic() + 180
    while not (Path("pid").exists() and Path("pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # into the sleeping cell
    process.send_signal(signum)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert set(tree(project)) == before
    assert list(Path("tmp").iterdir()) == []
    kernel = int(Path("pid").read_text())
    while time.monotonic() < deadline:
        try:
            os.kill(kernel, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the kernel outlived its runner")


def test_plain_papermill_runs_it_and_the_notebook_carries_its_metrics(project: Path) -> None:
    import papermill

    papermill.execute_notebook(
        "notebooks/n.ipynb", "out.ipynb", parameters={"rate": 0.25}, progress_bar=False
    )
    assert runs.harvest("out.ipynb")["m"]["value"] == 0.25


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_manifest_names_commit_and_dirt(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "n")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "n@example.org")

    def git(*words: str) -> str:
        command = ["git", "-c", "commit.gpgsign=false", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert runs._git(project) is None  # no commit yet
    git("add", ".")
    git("commit", "-q", "-m", "c")
    assert runs._git(project) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (project / "new.txt").touch()
    state = runs._git(project)
    assert state is not None
    assert state["dirty"] is True


# --------------------------------------------------------------------------------------- metrics


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """What `metric` and `finish` put into the notebook, by glue key."""
    found: dict[str, dict] = {}
    monkeypatch.setattr(runs, "_display", lambda data, name: found.update({name: data}))
    return found


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.83, 0.80, 0.86, "0.83 [0.80, 0.86]"),
        (0.5, 0.05, 0.95, "0.50 [0.05, 0.95]"),
        (0.99912, 0.99901, 0.99921, "0.9991 [0.9990, 0.9992]"),
        (1234.5, 1184.2, 1284.9, "1234 [1184, 1285]"),
        (34.51, 33.9, 35.2, "34.5 [33.9, 35.2]"),
        (-0.1, -0.3, 0.1, "-0.10 [-0.30, 0.10]"),
        (1.0, 1.0, 1.0, "1 [1, 1]"),
        (0.0, 0.0, 0.0, "0 [0, 0]"),
        (1.0, 1 - 1e-14, 1.0, "1 [1, 1]"),
    ],
)
def test_intervals_are_given_to_the_digits_they_warrant(shown, value, low, high, text) -> None:
    runs.metric("m", value, low=low, high=high)
    assert shown["m"][runs.METRIC_MIME]["text"] == text
    assert shown["m"]["text/plain"] == repr(text)


def test_metric_takes_scalars_of_any_library_and_intervals(shown) -> None:
    runs.metric("a", np.float32(0.5), n=np.int64(3))  # pyright: ignore[reportArgumentType]
    runs.metric("b", np.array(2))
    runs.metric("c", SimpleNamespace(value=1.0, low=0.0, high=2.0, n=4))
    records = {name: data.get(runs.METRIC_MIME) for name, data in shown.items()}
    assert (records["a"]["value"], records["a"]["n"]) == (0.5, 3)
    assert records["b"]["value"] == 2
    assert [records["c"][key] for key in ("value", "low", "high", "n")] == [1.0, 0.0, 2.0, 4]
    assert json.loads(json.dumps(records["a"])) == records["a"]
    assert shown["a"]["text/plain"] == "0.5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": float("nan")}, "'m': value is nan, not finite"),
        ({"value": np.inf}, "'m': value is inf"),
        ({"value": 1.0, "low": 0.0, "high": np.nan}, "'m': high is nan"),
        ({"value": 1.0, "low": 0.0}, "'m': give both"),
        ({"value": 1.0, "low": 2.0, "high": 1.0}, "'m': low 2.0 is above"),
        ({"value": np.ones(3)}, "'m': value is an array"),
        ({"value": "tabby"}, "'m': value is 'tabby', not a number"),
        ({"value": True}, "'m': value is True"),
        ({"value": None}, "'m': value is None"),
        ({"name": "a:b", "value": 1}, "metric name 'a:b'"),
        ({"name": "", "value": 1}, "metric name ''"),
        ({"name": "a b", "value": 1}, "metric name 'a b'"),
    ],
)
def test_metric_refuses_what_is_not_one_finite_number(shown, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        runs.metric(**{"name": "m", **arguments})
    assert shown == {}


def test_outside_a_kernel_metrics_go_nowhere(capsys: pytest.CaptureFixture) -> None:
    runs.metric("m", 1.0)
    runs.finish()
    assert capsys.readouterr() == ("", "")


def test_table_of_runs_can_be_written_and_read_together(tmp_path: Path) -> None:
    import pandas as pd

    part = {"value": 1, "low": None, "high": None, "n": None, "unit": "", "encoder": None}
    for i, n in enumerate((None, 7)):
        folder = tmp_path / f"run{i}"
        folder.mkdir()
        parameters = {"seed": i, "layers": ["a"]}
        manifest = {"notebook": "n.ipynb", "profile": "default", "parameters": parameters}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        metrics = {"m": part | {"n": n, "text": "1"}, "k": part | {"value": 0.5, "text": ""}}
        (folder / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    (tmp_path / "set").mkdir()
    for i in (0, 1):
        one = runs.table([tmp_path / f"run{i}"])
        one.to_parquet(tmp_path / f"set/{i}.parquet", index=False)
    read = pd.read_parquet(tmp_path / "set")
    both = runs.table([tmp_path / "run0", tmp_path / "run1"])
    assert read["value"].tolist() == both["value"].tolist() == [1.0, 0.5, 1.0, 0.5]
    assert read["parameters.seed"].tolist() == [0, 0, 1, 1]
    assert read["metric"].tolist() == ["m", "k", "m", "k"]
    assert read["n"].isna().tolist() == [True, True, False, True]


def test_key_depends_on_the_parameters_alone() -> None:
    assert runs.key({"a": 1, "b": [2]}) == runs.key({"b": [2], "a": 1})
    assert len({runs.key({"a": value}) for value in (1, 2, "1", [1], True)}) == 5


# ---------------------------------------------------------------------------------- dependencies


def write_package(folder: Path, files: dict[str, str]) -> Path:
    for name, source in {"__init__.py": "", **files}.items():
        (folder / "fmlib" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "fmlib" / name).write_text(source)
    return folder / "fmlib"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import numpy", ""),
        ("import fmlib", "__init__.py"),
        ("import fmlib.leaf", "__init__.py leaf.py"),
        ("import fmlib\nfmlib.leaf.f()", "__init__.py leaf.py"),
        ("from fmlib import leaf as x", "__init__.py leaf.py"),
        ("from fmlib.leaf import f", "__init__.py leaf.py"),
        ("def f():\n    from fmlib import middle", "__init__.py leaf.py middle.py"),
        ("from fmlib import relative", "__init__.py leaf.py relative.py"),
        ("from fmlib.sub.deep import f", "__init__.py leaf.py sub/__init__.py sub/deep.py"),
        ("from fmlib import ring", "__init__.py ring.py ring2.py"),
        ("%matplotlib inline\n!ls\nfrom fmlib import leaf", "__init__.py leaf.py"),
        ("from fmlibrary import leaf", ""),
    ],
)
def test_dependencies_are_found(tmp_path: Path, source: str, expected: str) -> None:
    package = write_package(
        tmp_path,
        {
            "leaf.py": "def f(): ...",
            "other.py": "",
            "middle.py": "import fmlib.leaf",
            "relative.py": "from . import leaf",
            "ring.py": "from .ring2 import x",
            "ring2.py": "def f():\n    from fmlib.ring import y",
            "sub/__init__.py": "",
            "sub/deep.py": "from ..leaf import f",
        },
    )
    found = runs.dependencies(write_notebook(tmp_path / "n.ipynb", source), package=package)
    assert [p.relative_to(package).as_posix() for p in found] == expected.split()


@settings(max_examples=20)
@given(st.lists(st.sets(st.integers(0, 7), max_size=3), min_size=8, max_size=8))
def test_dependencies_are_what_can_be_reached(tmp_path_factory, edges: list[set[int]]) -> None:
    folder = tmp_path_factory.mktemp("package")
    files = {
        f"m{i}.py": "\n".join(f"from fmlib import m{j}" for j in sorted(targets))
        for i, targets in enumerate(edges)
    }
    package = write_package(folder, files)
    # Warshall's closure of the adjacency matrix
    reach = np.eye(8, dtype=bool)
    for i, targets in enumerate(edges):
        reach[i, list(targets)] = True
    for k in range(8):
        reach |= np.outer(reach[:, k], reach[k])
    for i in range(8):
        found = {p.name for p in runs.dependencies(package / f"m{i}.py", package=package)}
        assert found == {"__init__.py", *(f"m{j}.py" for j in np.flatnonzero(reach[i]))}


def test_this_package_keeps_its_floors() -> None:
    """Every notebook imports `runs`: what it imports re-runs every notebook."""
    names = {p.name for p in runs.dependencies(Path(runs.__file__))}
    assert names == {"__init__.py", "runs.py", "store.py"}
