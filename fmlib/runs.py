"""Strict notebook runs: checked parameters, whole results, every number on record.

Floor 5. Two sides meet here. Inside a notebook, `metric` records a number that prose may quote and
`finish` closes the notebook; both put hidden outputs into the notebook, so that it carries its own
results under plain papermill and JupyterLab too. Outside, `run` executes a notebook with papermill
and accepts nothing less than every cell run to its end; it then harvests those outputs into
`metrics.json` and `manifest.json`, beside the executed notebook, in a folder that appears as a
whole or not at all.

Imports of this module are cheap on purpose: papermill, pandas and torch are loaded where needed.
"""

import ast
import contextlib
import datetime
import difflib
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

METRIC_MIME = "application/vnd.fmlib.metric+json"
NOTES_MIME = "application/vnd.fmlib.notes+json"
# myst-nb takes outputs with this prefix (and `scrapbook` metadata) out of the page: glued, not
# shown
GLUE_PREFIX = "application/papermill.record/"

PACKAGES = (
    "fmlib",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pandas",
    "papermill",
    "jupyter-book",
)
SCALARS: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
TYPES = (*SCALARS, *(f"list[{name}]" for name in SCALARS))


class BadCall(ValueError):
    """A run asked for wrongly: unknown notebook, profile, parameter or type. Nothing ran."""


class NotebookFailed(RuntimeError):
    """A notebook that did not run whole.

    Attributes:
        cell: index of the failing cell in the notebook as written, None if no one cell is to blame.
        source: that cell's code.
        directory: folder with the partly executed notebook, `error.txt` and `kernel.log`.

    """

    def __init__(
        self, message: str, *, cell: int | None = None, source: str = "", directory: Path
    ) -> None:
        super().__init__(message)
        self.cell = cell
        self.source = source
        self.directory = directory


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameter cell: `name: type = default  # description`."""

    name: str
    type: str
    default: Any
    description: str


@dataclass(frozen=True)
class RunResult:
    """A run that succeeded: its folder and what lies in it."""

    directory: Path
    notebook: Path
    metrics: dict[str, dict[str, Any]]
    manifest: dict[str, Any]


# ----------------------------------------------------------------------------- inside a notebook


def _display(data: dict[str, Any], name: str) -> None:
    """Put a hidden, glued output into the notebook; outside a kernel there is nowhere to put it."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import display

    if not InteractiveShell.initialized():
        return
    display(
        {GLUE_PREFIX + mime: content for mime, content in data.items()},
        raw=True,
        metadata={"scrapbook": {"name": name, "mime_prefix": GLUE_PREFIX}},
    )


def _number(name: str, part: str, value: Any) -> int | float:
    """`value` as a finite plain number, or an error that names the metric."""
    if hasattr(value, "item"):  # NumPy scalar, 0-d array, one-element tensor
        try:
            value = value.item()
        except (RuntimeError, ValueError):
            raise ValueError(f"metric {name!r}: {part} is an array, not one number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"metric {name!r}: {part} is {value!r}, not a number")
    if not math.isfinite(value):
        raise ValueError(f"metric {name!r}: {part} is {value}, not finite")
    return value


def format_interval(value: float, low: float, high: float) -> str:
    """`0.83 [0.80, 0.86]`: decimals as the half-width warrants, at least two below ten."""
    half = (high - low) / 2
    if half <= 1e-6 * max(abs(low), abs(high)):  # no interval, or one of rounding errors
        return f"{value:.4g} [{low:.4g}, {high:.4g}]"
    decimals = max(-math.floor(math.log10(half)), 2 if max(abs(low), abs(high)) < 10 else 0, 0)
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def metric(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    n: int | None = None,
    unit: str = "",
    encoder: str | None = None,
    text: str | None = None,
) -> None:
    """Record a number of this notebook: glued for prose, harvested into `metrics.json` by `run`.

    Prose quotes it with myst-nb's glue roles. `{glue:text}`NAME`` gives `text` if given, else
    `0.83 [0.80, 0.86]` if there is an interval, else the bare value, to which a format may be put:
    `{glue:text}`NAME:.2f``. The parts are glued as well, unrounded: `NAME.value`, and if known
    `NAME.low`, `NAME.high` and `NAME.n`, for `{glue:text}`NAME.value:.2f``. The reader of the
    notebook sees nothing.

    Args:
        name: letters, digits, `_`, `-` and `.`; once per notebook.
        value: one finite number (plain, NumPy or a one-element tensor), or a `stats.Interval`,
            whose bounds and n are then used.
        low: lower bound of the interval; with `high`.
        high: upper bound of the interval; with `low`.
        n: how many images or objects the value rests on.
        unit: unit of the value, e.g. "px"; empty for a ratio.
        encoder: name of the encoder it was measured on.
        text: what `{glue:text}`NAME`` gives, instead of the default.

    Raises:
        ValueError: bad name; a value or bound that is not one finite number (named); one bound
            alone, or the bounds swapped.

    """
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name, flags=re.ASCII):
        raise ValueError(f"metric name {name!r}: use letters, digits, '_', '-' and '.'")
    if hasattr(value, "low") and hasattr(value, "high"):
        low, high = (value.low if low is None else low), (value.high if high is None else high)
        n = getattr(value, "n", None) if n is None else n
        value = value.value
    value = _number(name, "value", value)
    if (low is None) != (high is None):
        raise ValueError(f"metric {name!r}: give both low and high, or neither")
    if low is not None and high is not None:
        low, high = float(_number(name, "low", low)), float(_number(name, "high", high))
        if low > high:
            raise ValueError(f"metric {name!r}: low {low} is above high {high}")
    if n is not None:
        n = int(_number(name, "n", n))
    plain = repr(value)  # a literal, so that myst-nb can apply a number format to it
    if text is not None:
        plain = repr(text)
    elif low is not None and high is not None:
        text = format_interval(value, low, high)
        plain = repr(text)
    else:
        text = str(value) if isinstance(value, int) else f"{value:.4g}"
    record = {
        "name": name,
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        "unit": unit,
        "encoder": encoder,
        "text": text,
    }
    _display({"text/plain": plain, METRIC_MIME: record}, name)
    for part in ("value", "low", "high", "n"):
        if record[part] is not None:
            _display({"text/plain": repr(record[part])}, f"{name}.{part}")


def _peak_memory_mb() -> float | None:
    """Largest resident memory this process has had so far, in MB (10^6 bytes)."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def _device() -> tuple[str, int | None]:
    """The device this process computed on, as text, and torch's thread count."""
    torch = sys.modules.get("torch")
    if torch is None:
        return "cpu", None
    device = "cpu"
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        device = f"cuda ({torch.cuda.get_device_name()})"
    elif torch.backends.mps.is_available() and torch.mps.driver_allocated_memory() > 0:
        device = "mps"
    return device, torch.get_num_threads()


def finish() -> None:
    """Close a notebook: its last cell. Shows nothing.

    Leaves in the notebook what only its own process knows: the encoders and image sets it loaded
    with their hashes (`store.NOTES`), device, threads and peak memory. `run` takes a notebook
    without this as not having come to its end.
    """
    # Notes exist only if something took them; importing the store here would load torch for nothing
    store = sys.modules.get("fmlib.store")
    device, threads = _device()
    notes = {
        "notes": store.NOTES if store is not None else {},
        "device": device,
        "threads": threads,
        "peak_memory_mb": _peak_memory_mb(),
    }
    _display({NOTES_MIME: notes}, "fmlib-notes")


# ------------------------------------------------------------------------------------ parameters


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error message's sentence: `; did you mean X?`, or a stop if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def import_nbformat() -> Any:
    """The nbformat module, two seconds sooner.

    It imports jsonschema, which, where the package rfc3987-syntax is installed, compiles a grammar
    for checking IRIs. Notebooks hold none, and jsonschema does without if the import fails.
    """
    grammar = "rfc3987_syntax"
    if grammar not in sys.modules:
        sys.modules[grammar] = None  # pyright: ignore[reportArgumentType]
    try:
        import nbformat
    finally:
        if sys.modules[grammar] is None:
            del sys.modules[grammar]
    return nbformat


def _read_notebook(path: Path) -> dict[str, Any]:
    """The notebook's JSON, its multi-line sources joined."""
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        hint = closest(path.name, (p.name for p in sorted(folder.glob("*.ipynb"))))
        raise BadCall(f"no notebook at {path}{hint}")
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
            cell.setdefault("metadata", {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCall(f"{path} is not a notebook of format 4: {error}") from error
    return notebook


def _check(value: Any, type_: str, what: str, *, wrong: str | None = None) -> Any:
    """`value` if it is of the annotated type (an int passes for a float), else `BadCall`."""
    error = BadCall(wrong or f"{what} must be {type_}, got {type(value).__name__} {value!r}")
    if type_.startswith("list["):
        if not isinstance(value, list | tuple):
            raise error
        return [_check(item, type_[5:-1], what, wrong=str(error)) for item in value]
    if type_ == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not SCALARS[type_]:
        raise error
    if isinstance(value, float) and not math.isfinite(value):
        raise BadCall(f"{what} must be finite, got {value}")
    return value


def _from_text(text: str, type_: str, what: str) -> Any:
    """A parameter's value from the text of a command line."""
    import yaml

    wrong = f"{what} must be {type_}, got {text!r}"
    if type_ == "str":
        return text
    if type_ in ("int", "float"):
        # Not YAML's numbers: to YAML 1.1, 1e-3 is text, 010 is eight and 1:30 is ninety
        try:
            return _check(SCALARS[type_](text), type_, what)
        except ValueError as error:
            raise error if isinstance(error, BadCall) else BadCall(wrong) from None
    try:
        if type_ == "bool":
            value = yaml.safe_load(text)
        elif text.lstrip().startswith("["):
            value = yaml.load(text, Loader=yaml.BaseLoader)  # every item stays text
        else:
            value = [item.strip() for item in text.split(",")] if text.strip() else []
    except yaml.YAMLError:
        raise BadCall(wrong) from None
    if type_ == "bool":
        return _check(value, type_, what, wrong=wrong)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadCall(wrong)
    return [_from_text(item, type_[5:-1], what) for item in value]


def _parameters(path: Path, notebook: dict[str, Any]) -> dict[str, Parameter]:
    """The parameter cell's lines by name, in order; none if there is no such cell."""
    cells = [
        cell
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and "parameters" in cell["metadata"].get("tags", [])
    ]
    if not cells:
        return {}
    if len(cells) > 1:
        raise BadCall(f"{path} has {len(cells)} cells tagged 'parameters'; one is allowed")
    source = cells[0]["source"]
    try:
        statements = ast.parse(source).body
        comments = {
            token.start[0]: token.string.lstrip("# ").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
    except (SyntaxError, tokenize.TokenError) as error:
        raise BadCall(f"{path}: the parameter cell is not valid Python: {error}") from error
    found: dict[str, Parameter] = {}
    for statement in statements:
        line = ast.get_source_segment(source, statement) or ""
        if not (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and statement.value is not None
        ):
            raise BadCall(f"{path}: parameter line {line!r} is not `name: type = default`")
        name, type_ = statement.target.id, ast.unparse(statement.annotation)
        if type_ not in TYPES:
            raise BadCall(f"{path}: parameter {name!r} has type {type_!r}; known: {list(TYPES)}")
        if name in found:
            raise BadCall(f"{path}: parameter {name!r} is given twice")
        try:
            default = ast.literal_eval(statement.value)
        except ValueError as error:
            raise BadCall(f"{path}: the default of {name!r} is not a literal") from error
        found[name] = Parameter(
            name=name,
            type=type_,
            default=_check(default, type_, f"{path}: the default of {name!r}"),
            description=comments.get(statement.end_lineno or 0, ""),
        )
    return found


def parameters(notebook: str | os.PathLike[str]) -> "pd.DataFrame":
    """The parameters a notebook takes: a table with columns name, type, default, description.

    Raises:
        BadCall: no such notebook, or its parameter cell breaks the rule `name: type = default  #
            text`.

    """
    path = Path(notebook)
    rows = [vars(p) for p in _parameters(path, _read_notebook(path)).values()]
    import pandas as pd

    return pd.DataFrame(rows, columns=pd.Index(["name", "type", "default", "description"]))


def from_text(notebook: str | os.PathLike[str], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Values of parameters given as text (a command line), by the notebook's annotations.

    A `str` is kept as it is; numbers are Python's (`1e-3`); booleans are YAML's (`true`, `no`);
    lists are `[a, b]` or `a,b`.

    Raises:
        BadCall: unknown parameter, given twice, or text that does not read as its type.

    """
    path = Path(notebook)
    known = _parameters(path, _read_notebook(path))
    values: dict[str, Any] = {}
    for name, text in pairs:
        if name in values:
            raise BadCall(f"parameter {name!r} is given twice")
        _require_known(name, known, path)
        values[name] = _from_text(text, known[name].type, f"parameter {name!r}")
    return values


def _require_known(name: str, known: Mapping[str, Parameter], path: Path, where: str = "") -> None:
    if name not in known:
        raise BadCall(
            f"{where}unknown parameter {name!r} of {path.name}{closest(name, known)} "
            f"Valid parameters: {', '.join(known) or 'none'}"
        )


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Parameters as arguments of `python -m fmlib run`; `from_text` reads them back unchanged."""
    words: list[str] = []
    for name, value in values.items():
        words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    return words


def key(values: Mapping[str, Any]) -> str:
    """A short name for a set of parameters, the same in any order and process."""
    text = json.dumps(dict(values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def profiles(path: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Read a `profiles.yml`: notebook stem -> profile -> parameter -> value.

    Raises:
        BadCall: no such file, or not of this shape.

    """
    import yaml

    path = Path(path)
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise BadCall(f"cannot read the profiles in {path}: {error}") from error
    shaped = isinstance(table, dict) and all(
        isinstance(entry, dict)
        and all(values is None or isinstance(values, dict) for values in entry.values())
        for entry in table.values()
    )
    if not shaped:
        raise BadCall(f"{path}: expected notebook -> profile -> parameters")
    return {
        str(stem): {str(name): dict(values or {}) for name, values in entry.items()}
        for stem, entry in table.items()
    }


def merge(
    notebook: str | os.PathLike[str],
    *,
    profile: str = "default",
    parameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All parameters of a run: the notebook's defaults, then the profile's, then those given.

    The profile comes from `profiles.yml` in the notebook's folder; a notebook that is not in there
    has the profile "default" only, which changes nothing.

    Raises:
        BadCall: unknown profile or parameter (names the valid ones and the closest), wrong type.

    """
    path = Path(notebook)
    return _merge(path, _parameters(path, _read_notebook(path)), profile, parameters or {})


def _merge(
    path: Path, known: Mapping[str, Parameter], profile: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    file = path.parent / "profiles.yml"
    table = (profiles(file) if file.is_file() else {}).get(path.stem, {})
    choices = {"default": {}} | table
    if profile not in choices:
        raise BadCall(
            f"unknown profile {profile!r} of {path.name}{closest(profile, choices)} "
            f"Valid profiles: {', '.join(choices)}"
        )
    values = {name: parameter.default for name, parameter in known.items()}
    for where, layer in ((f"profile {profile!r}: ", choices[profile]), ("", given)):
        for name, value in layer.items():
            _require_known(str(name), known, path, where)
            values[name] = _check(value, known[name].type, f"{where}parameter {name!r}")
    return values


# ------------------------------------------------------------------------------------------- run


def root(notebook: str | os.PathLike[str]) -> Path:
    """The project of a notebook: above its folder if that has a `profiles.yml`, else here."""
    folder = Path(notebook).resolve().parent
    return folder.parent if (folder / "profiles.yml").is_file() else Path.cwd()


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of a checkout, or None if it is not one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str | None]:
    from importlib import metadata

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


#: What starts a kernel; the tests fork theirs from a process that has done the imports.
_LAUNCHER = (sys.executable, "-m", "ipykernel_launcher")


def _kernel_environment(scratch: Path) -> dict[str, str]:
    """What is set for the kernel, beside the caller's environment (thread counts pass through)."""
    return {
        # An empty IPython folder: no start-up files, no configuration, no history of the user's
        "IPYTHONDIR": str(scratch / "ipython"),
        "PYTHONSTARTUP": "",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        # The order of sets, and cuBLAS sums, would otherwise differ from run to run
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # Progress bars of library calls have no place in a published notebook
        "TQDM_DISABLE": "1",
        # Frozen modules make the debugger print a warning into the kernel's log
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def _kernel_manager(scratch: Path, processes: list[Any], log: Any) -> type:
    """A kernel manager for one run: this interpreter, sockets in a private folder.

    Installed kernelspecs are not consulted: a `python3` kernel may belong to another environment.
    Over ipc, kernels started at the same moment cannot snatch each other's ports, as they can over
    tcp.
    """
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class Specs(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(
                argv=[*_LAUNCHER, "-f", "{connection_file}"],
                display_name="Python 3",
                language="python",
                env=_kernel_environment(scratch),
            )

    connection = str(scratch / "kernel.json")
    # A socket's path may have some hundred characters; Windows has no ipc
    ipc = os.name == "posix" and len(connection) < 90

    class Manager(AsyncKernelManager):
        def __init__(self, **kwargs: Any) -> None:
            kwargs |= {"connection_file": connection, "kernel_spec_manager": Specs()}
            super().__init__(transport="ipc" if ipc else "tcp", **kwargs)
            self.shutdown_wait_time = 2.0

        async def start_kernel(self, **kwargs: Any) -> None:  # pyright: ignore
            await super().start_kernel(**{**kwargs, "stdout": log, "stderr": log})
            processes.append(getattr(self.provisioner, "process", None))

    return Manager


def _excerpt(source: str, lines: int = 6) -> str:
    kept = source.strip().splitlines()
    return "\n".join([f"    {line}" for line in kept[:lines]] + ["    ..."] * (len(kept) > lines))


def _outputs(cell: Mapping[str, Any], mime: str) -> list[dict[str, Any]]:
    """Records of a kind among a cell's outputs."""
    bundles = [output.get("data", {}) for output in cell.get("outputs", [])]
    return [data[GLUE_PREFIX + mime] for data in bundles if GLUE_PREFIX + mime in data]


def harvest(notebook: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Metrics of an executed notebook: name -> value, low, high, n, unit, encoder, text.

    Raises:
        ValueError: a name recorded twice.

    """
    return _harvest(_read_notebook(Path(notebook)))


def _harvest(notebook: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    metrics: dict[str, dict[str, Any]] = {}
    for cell in notebook["cells"]:
        for record in _outputs(cell, METRIC_MIME):
            record = dict(record)
            name = record.pop("name")
            if name in metrics:
                raise ValueError(f"metric {name!r} is recorded twice")
            metrics[name] = record
    return metrics


class _Incomplete(Exception):
    """Why an execution does not count; becomes `NotebookFailed` once its remains are put away."""

    def __init__(self, reason: str, cell: int | None = None, details: str = "") -> None:
        super().__init__(reason)
        self.cell = cell  # in the executed notebook
        self.details = details


def _execute(
    path: Path,
    target: Path,
    values: Mapping[str, Any],
    *,
    timeout: float | None,
    progress: bool,
    scratch: Path,
) -> Any:
    """Run a notebook with papermill to `target`; the executed notebook, or `_Incomplete`."""
    nbformat = import_nbformat()
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    processes: list[Any] = []
    exits: list[int] = []

    def after_cell(*, cell_index: int, execute_reply: Mapping[str, Any], **_: Any) -> None:
        # `exit()` ends the kernel a moment later, perhaps after the last cell, perhaps before
        payloads = execute_reply["content"].get("payload", [])
        if any(payload.get("source") == "ask_exit" for payload in payloads):
            exits.append(cell_index)

    def last_started() -> int | None:
        if not target.is_file():
            return None
        cells = nbformat.read(target, as_version=4).cells
        begun = [
            i for i, c in enumerate(cells) if c.metadata.get("papermill", {}).get("start_time")
        ]
        return begun[-1] if begun else None

    with open(scratch / "kernel.log", "wb") as log:
        try:
            executed = papermill.execute_notebook(
                str(path),
                str(target),
                parameters=dict(values),
                kernel_name="python3",
                language="python",
                progress_bar={  # pyright: ignore
                    "desc": path.stem,
                    "file": sys.stderr,
                    "leave": False,
                    "disable": not progress,
                },
                start_timeout=180,
                execution_timeout=timeout,
                kernel_manager_class=_kernel_manager(scratch, processes, log),
                on_cell_executed=after_cell,
            )
        except PapermillExecutionError as error:
            reason = f"{error.ename}: {error.evalue}"
            raise _Incomplete(reason, error.cell_index, "\n".join(error.traceback)) from None
        except CellTimeoutError:
            raise _Incomplete(f"no end after {timeout:g} s", last_started()) from None
        except DeadKernelError:
            if exits:
                raise _Incomplete("the cell ended the kernel", exits[0]) from None
            code = next((p.poll() for p in processes if p is not None), None)
            hint = " (killed: out of memory?)" if code == -9 else ""
            raise _Incomplete(
                f"the kernel died, exit status {code}{hint}", last_started()
            ) from None
        except RuntimeError as error:  # the kernel never answered
            raise _Incomplete(f"the kernel did not start: {error}") from None
    if exits:
        raise _Incomplete("the cell ended the kernel", exits[0])
    return executed


def _require_whole(executed: Any) -> None:
    """Every code cell ran to its end without an error; papermill lets `sys.exit(0)` pass."""
    codes = [
        (i, c) for i, c in enumerate(executed.cells) if c.cell_type == "code" and c.source.strip()
    ]
    for index, cell in codes:
        for output in cell.outputs:
            if output.output_type == "error":
                reason = f"{output.ename}: {output.evalue}"
                raise _Incomplete(reason, index, "\n".join(output.traceback))
        if cell.execution_count is None:
            raise _Incomplete("the cell was not executed", index)
    if not codes or not _outputs(codes[-1][1], NOTES_MIME):
        last = codes[-1][0] if codes else None
        raise _Incomplete("the last code cell must call runs.finish()", last)


def _manifest(
    path: Path,
    executed: Any,
    values: Mapping[str, Any],
    *,
    profile: str,
    started: datetime.datetime,
    wall_seconds: float,
) -> dict[str, Any]:
    from fmlib import store

    project = root(path)
    last = [cell for cell in executed.cells if _outputs(cell, NOTES_MIME)][-1]
    notes = _outputs(last, NOTES_MIME)[-1]
    lock = project / "requirements.lock"
    source = _read_notebook(path)
    return {
        "notebook": path.name,
        "profile": profile,
        "parameters": dict(values),
        "seed": values.get("seed"),
        "git": _git(project),
        "versions": _versions(),
        "device": notes["device"],
        "threads": notes["threads"],
        "encoders": notes["notes"].get("encoder", {}),
        "images": notes["notes"].get("images", {}),
        "hashes": {
            "notebook": store.digest([(c["cell_type"], c["source"]) for c in source["cells"]]),
            "parameters": store.digest(dict(values)),
            "requirements.lock": store.sha256_file(lock) if lock.is_file() else None,
        },
        "wall_seconds": round(wall_seconds, 2),
        "peak_memory_mb": notes["peak_memory_mb"],
        "started": started.isoformat(timespec="seconds"),
    }


def run(
    notebook: str | os.PathLike[str],
    *,
    profile: str = "default",
    parameters: Mapping[str, Any] | None = None,
    directory: str | os.PathLike[str] | None = None,
    failed: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    progress: bool | None = None,
) -> RunResult:
    """Execute a notebook whole, or fail.

    The kernel is this very interpreter, in the caller's working folder, without the user's start-up
    files. The result, `notebook.ipynb`, `metrics.json` and `manifest.json`, appears as one folder;
    an earlier result there is replaced by success only. A failure leaves the partly executed
    notebook, `error.txt` and `kernel.log` under `failed` and nothing elsewhere; an interrupt leaves
    nothing and stops the kernel.

    Args:
        notebook: the `.ipynb` to run; it is not changed.
        profile: which of the notebook's entries in `profiles.yml` to apply.
        parameters: values that go before the profile's.
        directory: folder of the result; `_build/runs/PROFILE/STEM` of the project by default.
        failed: folder for the remains of a failure; `_build/failed/PROFILE/STEM` by default, or
            beside `directory` with the ending `.failed` if that was given.
        timeout: seconds that one cell may take; no limit by default.
        progress: a bar of cells on stderr; by default where stderr is a terminal.

    Raises:
        BadCall: before anything is written, see `merge`.
        NotebookFailed: a cell raised, exited or timed out, the kernel died, a code cell was not
            executed, a metric was recorded twice or the notebook did not end with `finish`.

    """
    path = Path(notebook)
    known = _parameters(path, _read_notebook(path))
    values = _merge(path, known, profile, parameters or {})
    build = root(path) / "_build"
    if failed is None:
        failed = (
            build / "failed" / profile / path.stem
            if directory is None
            else Path(directory).with_name(Path(directory).name + ".failed")
        )
    failed = Path(failed)
    directory = build / "runs" / profile / path.stem if directory is None else Path(directory)
    if directory.exists() and not directory.is_dir():
        raise BadCall(f"{directory} exists and is not a folder")
    if timeout is not None and timeout <= 0:
        raise BadCall(f"timeout must be positive, got {timeout}")
    bar = sys.stderr.isatty() if progress is None else progress

    from fmlib import store

    scratch = Path(tempfile.mkdtemp(prefix="fmlib-"))
    target = scratch / "notebook.ipynb"
    started = datetime.datetime.now(datetime.UTC)
    clock = time.perf_counter()
    try:
        try:
            # Injecting only what differs keeps the cell that readers see short
            changed = {name: v for name, v in values.items() if v != known[name].default}
            executed = _execute(
                path, target, changed, timeout=timeout, progress=bar, scratch=scratch
            )
            _require_whole(executed)
            try:
                metrics = _harvest(executed)
            except ValueError as error:
                raise _Incomplete(str(error)) from None
        except _Incomplete as error:
            raise _put_away(error, path, target, scratch, failed) from None
        wall_seconds = time.perf_counter() - clock
        manifest = _manifest(
            path, executed, values, profile=profile, started=started, wall_seconds=wall_seconds
        )
        # papermill notes where it read and wrote: paths of this machine, of no use to a reader
        executed.metadata.papermill.update(input_path=path.name, output_path="notebook.ipynb")
        nbformat = import_nbformat()
        with store.atomic_directory(directory) as whole:
            nbformat.write(executed, whole / "notebook.ipynb")
            store.write_json(whole / "metrics.json", {"metrics": metrics})
            store.write_json(whole / "manifest.json", manifest)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(failed, ignore_errors=True)  # what an earlier attempt left is answered now
    return RunResult(directory, directory / "notebook.ipynb", metrics, manifest)


def _put_away(
    error: _Incomplete, path: Path, target: Path, scratch: Path, failed: Path
) -> NotebookFailed:
    """Keep the remains of a failed execution under `failed` and word the error."""
    from fmlib import store

    nbformat = import_nbformat()
    source, index = "", error.cell
    if index is not None and target.is_file():
        cells = nbformat.read(target, as_version=4).cells
        # papermill puts marker cells before the failing one, and the injected one before those
        marker = "papermill-error-cell-tag"
        cells = [c for c in cells if marker not in c.metadata.get("tags", [])]
        source = cells[index].source
        tags = [c.metadata.get("tags", []) for c in cells[:index]]
        if "injected-parameters" not in cells[index].metadata.get("tags", []):
            index -= sum("injected-parameters" in t for t in tags)
    place = f", cell {index}" if index is not None else ""
    message = f"{path.name}{place}: {error}"
    if source:
        message += f"\n{_excerpt(source)}"
    with store.atomic_directory(failed) as remains:
        details = re.sub(r"\x1b\[[0-9;]*m", "", error.details)  # colour codes of the traceback
        (remains / "error.txt").write_text(f"{message}\n\n{details}\n", encoding="utf-8")
        for name in ("notebook.ipynb", "kernel.log"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(scratch / name, remains / name)
    shown = failed.relative_to(Path.cwd()) if failed.is_relative_to(Path.cwd()) else failed
    message += f"\nThe partly executed notebook and the log are in {shown}"
    return NotebookFailed(message, cell=index, source=source, directory=failed)


# ----------------------------------------------------------------------------- results as tables


def table(directories: Sequence[str | os.PathLike[str]]) -> "pd.DataFrame":
    """Metrics of runs as one long table.

    One row per run and metric: notebook, profile, one column `parameters.NAME` per parameter,
    metric, value, low, high, n, unit, encoder. Columns keep their type where values are missing, so
    that tables of single runs can be written to Parquet and read together.

    Raises:
        FileNotFoundError: a folder without a run.

    """
    import pandas as pd

    from fmlib import store

    rows = []
    for directory in map(Path, directories):
        manifest = store.read_json(directory / "manifest.json")
        head = {"notebook": manifest["notebook"], "profile": manifest["profile"]}
        head |= {f"parameters.{name}": value for name, value in manifest["parameters"].items()}
        for name, record in store.read_json(directory / "metrics.json")["metrics"].items():
            keep = ("value", "low", "high", "n", "unit", "encoder")
            rows.append(head | {"metric": name} | {key: record[key] for key in keep})
    types = {"value": "float64", "low": "float64", "high": "float64", "n": "Int64"}
    types |= {"metric": "string", "unit": "string", "encoder": "string"}
    frame = pd.DataFrame(rows)
    return frame.astype({k: v for k, v in types.items() if k in frame.columns})


# ---------------------------------------------------------------------------------- dependencies


def _imported(tree: ast.AST, package: str, files: Mapping[str, Path], inside: str) -> set[str]:
    """Modules of `package` that a syntax tree imports, wherever it does (inside functions too)."""
    found: set[str] = set()

    def add(name: str) -> None:
        # a.b.c also runs a and a.b; what is not a module is a name inside one
        parts = name.split(".")
        found.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = inside.split(".")
                is_package = files.get(inside, Path()).name == "__init__.py"
                up = node.level - (1 if is_package else 0)
                parents = parents[: len(parents) - up]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            if base.split(".")[0] == package:
                for alias in node.names:
                    add(f"{base}.{alias.name}")
        elif isinstance(node, ast.Attribute):
            # `import fmlib`, later `fmlib.taps.read`
            dotted = ast.unparse(node)
            if dotted.split(".")[0] == package:
                add(dotted)
    return {name for name in found if name in files}


def dependencies(
    source: str | os.PathLike[str], *, package: str | os.PathLike[str] | None = None
) -> tuple[Path, ...]:
    """Files of the package that a notebook or Python file imports, directly or not, sorted.

    Read from the syntax trees; nothing is imported or run. Imports inside functions count, since
    they may happen. The file itself is included if it belongs to the package.

    Args:
        source: a notebook or a `.py` file.
        package: the package's folder; this one by default.

    Raises:
        BadCall: a notebook or code that cannot be read.

    """
    folder = Path(package) if package is not None else Path(__file__).parent
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.py")):
        parts = [folder.name, *file.relative_to(folder).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    names = {file.resolve(): name for name, file in files.items()}

    path = Path(source)
    trees = [_tree(path)]
    todo: set[str] = set()
    own = names.get(path.resolve())
    if own is not None:
        todo.add(own)
    for tree in trees:
        todo |= _imported(tree, folder.name, files, own or "")
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= _imported(_tree(files[name]), folder.name, files, name) | {folder.name}
        todo = {n for n in todo if n in files} - seen
    return tuple(sorted(files[name] for name in seen))


def _tree(path: Path) -> ast.Module:
    """Syntax tree of a Python file, or of a notebook's code cells without IPython's own syntax."""
    if path.suffix == ".ipynb":
        codes = [c["source"] for c in _read_notebook(path)["cells"] if c["cell_type"] == "code"]
        lines = [line for code in codes for line in code.splitlines()]
        code = "\n".join("" if re.match(r"\s*[%!?]", line) else line for line in lines)
    else:
        code = path.read_text(encoding="utf-8")
    try:
        return ast.parse(code)
    except SyntaxError as error:
        raise BadCall(f"{path} is not valid Python: {error}") from error
