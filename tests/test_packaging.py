"""The three lists of packages (pyproject, conda, lock) say the same, and no file names an index."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch": "torch"}
USER_FIXED = {"jupyter-book", "torch", "torchvision", "timm", "papermill", "seaborn", "ipywidgets"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_environment_yml_matches_pyproject():
    wanted = {
        r.name: str(r.specifier) for r in map(Requirement, project()["project"]["dependencies"])
    }
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = [e for e in entries if isinstance(e, str)]
    pip = [r for e in entries if isinstance(e, dict) for r in e["pip"]]
    found = {
        CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in map(Requirement, conda + pip)
    }
    python = found.pop("python")
    found.pop("pip")
    assert found == wanted
    assert set(python.split(",")) == set(project()["project"]["requires-python"].split(","))


def test_fixed_packages_are_dependencies():
    names = {Requirement(r).name for r in project()["project"]["dependencies"]}
    assert names >= USER_FIXED


def test_lock_satisfies_pyproject():
    text = (ROOT / "requirements.lock").read_text()
    locked: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.M):
        locked.setdefault(name, []).append(version)
    declared = project()["project"]["dependencies"]
    declared += [r for group in project()["dependency-groups"].values() for r in group]
    for requirement in map(Requirement, declared):
        versions = locked.get(requirement.name)
        assert versions, f"{requirement.name} is missing in requirements.lock: make lock"
        for version in versions:
            assert requirement.specifier.contains(version, prereleases=True), (
                f"{requirement.name}=={version} breaks {requirement.specifier}: make lock"
            )


@pytest.mark.parametrize("lock", ["requirements.lock", "weights.lock"])
def test_locks_have_hashes_and_no_index(lock):
    text = (ROOT / lock).read_text()
    assert "://" not in text
    assert "--index" not in text
    entries = re.split(r"\n(?=[a-z0-9])", text.strip())
    assert all("--hash=sha256:" in entry for entry in entries)


def test_no_tracked_file_is_heavy():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    heavy = [
        name
        for name in listed.stdout.split("\0")
        if name and (ROOT / name).is_file() and (ROOT / name).stat().st_size > 3_000_000
    ]
    assert not heavy
