"""The command line: exit status, messages, tables, start-up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from fmlib import runs
from fmlib.__main__ import main

PARAMETERS = 'layers: list[str] = ["a"]  # to be read, names\nseed: int = 0  # of noise, count'


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    book = new_notebook()
    book.cells = [
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell("from fmlib import runs\nruns.metric('m', seed)\nassert seed < 9"),
        new_code_cell("runs.finish()"),
    ]
    nbformat.write(book, "n.ipynb")
    return "n.ipynb"


def test_start_up_loads_nothing_heavy() -> None:
    heavy = ("torch", "pandas", "numpy", "papermill", "matplotlib", "IPython", "sphinx", "yaml")
    code = f"import sys, fmlib.__main__; print(sorted({{*{heavy}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "encoders"),
        ([], 2, "COMMAND"),
        (["rum"], 2, "invalid choice"),
        (["run"], 2, "NOTEBOOK"),
        (["run", "n.ipynb", "-p", "seed"], 2, "expected 2 arguments"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture, arguments, status: int, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == status
    out, err = capsys.readouterr()
    assert message in (out if status == 0 else err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "sed", "1"], "unknown parameter 'sed' of n.ipynb; did you mean 'seed'?"),
        (["-p", "seed", "x"], "parameter 'seed' must be int, got 'x'"),
        (["--profile", "paper"], "unknown profile 'paper' of n.ipynb. Valid profiles: default"),
        (["--timeout", "-1"], "timeout must be positive"),
    ],
)
def test_a_bad_call_is_status_2_and_writes_nothing(
    notebook: str, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(["run", notebook, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in Path().iterdir()] == [notebook]


def test_no_such_notebook(notebook: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["params", "m.ipynb"]) == 2
    assert "no notebook at m.ipynb; did you mean 'n.ipynb'?" in capsys.readouterr().err


def test_run_says_where_the_result_lies(notebook: str, capsys: pytest.CaptureFixture) -> None:
    import pandas as pd

    arguments = ["-p", "seed", "3", "-p", "layers", "b, c", "--table", "tables/m.parquet"]
    assert main(["run", notebook, *arguments]) == 0
    assert capsys.readouterr().out.startswith("_build/runs/default/n/notebook.ipynb: 1 metrics in ")
    manifest = json.loads(Path("_build/runs/default/n/manifest.json").read_text())
    assert manifest["parameters"] == {"layers": ["b", "c"], "seed": 3}
    table = pd.read_parquet("tables")
    assert table["value"].tolist() == table["parameters.seed"].tolist() == [3]
    assert table["parameters.layers"].tolist()[0].tolist() == ["b", "c"]


def test_a_failure_is_status_1_and_says_where_to_look(
    notebook: str, capsys: pytest.CaptureFixture
) -> None:
    options = ["--output", "out", "--failed", "remains", "--table", "m.parquet"]
    assert main(["run", notebook, "-p", "seed", "9", *options]) == 1
    error = capsys.readouterr().err
    assert "n.ipynb, cell 1: AssertionError" in error
    assert "assert seed < 9" in error
    assert "are in remains" in error
    assert Path("remains/notebook.ipynb").exists()
    assert not Path("out").exists()
    assert not Path("m.parquet").exists()


def test_params(notebook: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["params", notebook]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "name    type       default  description",
        "layers  list[str]  ['a']    to be read, names",
        "seed    int        0        of noise, count",
    ]
    assert main(["params", notebook, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert records == runs.parameters(notebook).to_dict("records")


def test_encoders_and_layers(capsys: pytest.CaptureFixture) -> None:
    assert main(["encoders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["name", "status"]
    assert lines[1].startswith("efficientnet_lite0 ")
    assert main(["layers", "random:squeezenet1_1", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {"layer", "channels", "stride", "receptive_field", "recommended"} <= set(records[0])
    assert any(record["recommended"] for record in records)
    assert main(["layers", "efficientnet_light0"]) == 2
    assert "efficientnet_lite0" in capsys.readouterr().err


def test_book_delegates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from fmlib import book

    calls = []

    def build(**options: object) -> SimpleNamespace:
        calls.append(options)
        return SimpleNamespace(html=Path("_build/html"), pages=3, changed=(), seconds=1.0)

    monkeypatch.setattr(book, "build", build)
    assert main(["book", "--profile", "smoke", "--offline"]) == 0
    assert calls == [{"profile": "smoke", "offline": True}]
    assert capsys.readouterr().out == "_build/html/index.html: 3 pages in 1.0 s\n"

    def fail(**_: object) -> None:
        raise book.BookError("a run is missing")

    monkeypatch.setattr(book, "build", fail)
    assert main(["book"]) == 1
    assert "a run is missing" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(notebook: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fmlib", "params", notebook]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
