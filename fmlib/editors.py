"""Semantic edits by a generative editor: pictures and prompts in, a folder of edited pairs out.

An optional part (``pip install .[edit]``): pipelines are those of diffusers, by name. The folder
has the layout that :func:`edits.edited_folder` reads; what is in it is never made twice, so that a
run can be interrupted and resumed, or shared by several processes. No chapter needs this module: a
folder of pairs, however made, is a parameter there.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tqdm import tqdm

from . import store
from .images import ImageSet

__all__ = ["EDITORS", "Editor", "Report", "edit", "load", "prompts"]

ORIGINAL = "resized"  # the key of unedited pictures in Krey et al. (2026)


@dataclass(frozen=True)
class Editor:
    """A published editor: where its weights are, and with which settings it is called."""

    repository: str  #: on the hub, or a folder
    settings: Mapping[str, Any]  #: arguments of the pipeline's call
    dtype: str = "bfloat16"


#: Editors by name. Qwen's settings are those of Krey et al. (2026), §1.1 of their protocol.
EDITORS = {
    "instruct-pix2pix": Editor(
        "timbrooks/instruct-pix2pix",
        {"num_inference_steps": 50, "guidance_scale": 7.5, "image_guidance_scale": 1.5},
        dtype="float16",
    ),
    "qwen-image-edit": Editor(
        "Qwen/Qwen-Image-Edit-2511",
        {
            "num_inference_steps": 10,
            "guidance_scale": 1.0,
            "true_cfg_scale": 4.5,
            "negative_prompt": " ",
        },
    ),
}


@dataclass(frozen=True)
class Loaded:
    """A pipeline ready to edit, and what it is."""

    pipeline: Any
    name: str
    settings: Mapping[str, Any]


def load(name: str, *, device: str | torch.device = "cpu", **settings: Any) -> Loaded:
    """An editing pipeline of diffusers.

    Args:
        name: one of :data:`EDITORS`, or the folder of a pipeline saved by `save_pretrained`.
        device: where it runs. On a CPU weights are float32.
        settings: arguments of the pipeline's call, beside or instead of the published ones.

    Raises:
        ValueError: an unknown name (closest match named), or a folder without a pipeline.
        ImportError: diffusers is not installed; says how to.
        OSError: the weights can neither be found nor downloaded.
    """
    folder = Path(name)
    if name not in EDITORS and not folder.is_dir():
        close = difflib.get_close_matches(name, EDITORS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"no editor {name!r}{hint} Choose from {', '.join(EDITORS)}, or give a folder that "
            "holds a pipeline"
        )
    if name not in EDITORS and not (folder / "model_index.json").is_file():
        raise ValueError(f"{name}: no pipeline here, model_index.json is missing")
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(
            "a generative editor needs diffusers: pip install '.[edit]' in the project's folder"
        ) from error
    editor = EDITORS.get(name, Editor(str(folder), {}))
    on_cpu = torch.device(device).type == "cpu"
    dtype = torch.float32 if on_cpu else getattr(torch, editor.dtype)
    pipeline = DiffusionPipeline.from_pretrained(editor.repository, torch_dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return Loaded(pipeline, editor.repository, {**editor.settings, **settings})


def prompts(path: str | Path) -> dict[str, str]:
    """Edits and their prompts from a YAML file, a line ``name: prompt`` each.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a mapping, an empty prompt, or a name that cannot be part of a file's.
    """
    found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: expected lines 'name: prompt', found {type(found).__name__}")
    return _checked({str(name): prompt for name, prompt in found.items()}, str(path))


def _checked(found: Mapping[str, Any], where: str) -> dict[str, str]:
    for name, prompt in found.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == ORIGINAL:
            raise ValueError(
                f"{where}: {name!r} cannot name an edit: letters, digits, _ and -, not {ORIGINAL!r}"
            )
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where}: the prompt of {name!r} is empty or no text: {prompt!r}")
    return dict(found)


@dataclass(frozen=True)
class Report:
    """What a call of :func:`edit` did: numbers of edited pictures."""

    made: int
    kept: int  #: were there already
    taken: tuple[str, ...]  #: another process has them in work, or died at them: files' names


def edit(
    editor: Loaded,
    images: ImageSet,
    prompts: Mapping[str, str],
    directory: str | Path,
    *,
    size: int = 288,
    seed: int = 42,
    progress: bool = True,
) -> Report:
    """Edit every picture by every prompt: files ``<id>_<edit>.png`` beside ``<id>_resized.png``.

    Each picture is drawn with the same seed, so neither the order nor an interruption changes a
    result. A file that is there is kept. While one is made, a ``.claim`` beside it tells other
    processes; one that is left by a process that was killed must be deleted by hand.

    Args:
        editor: from :func:`load`.
        images: photographs; squares of `size` px are cut from them.
        prompts: edit -> prompt (:func:`prompts`).
        directory: the folder; made if it is missing.
        size: side of the pictures, px.
        seed: of the editor.
        progress: show a bar.

    Raises:
        ValueError: no images or prompts, names that cannot be files', or ids that make the same.
        store.MismatchError: the folder was made with another editor, settings, size or seed, or
            has an edit of the same name by another prompt.
    """
    prompts = _checked(prompts, "prompts")
    if not len(images) or not prompts:
        raise ValueError("give at least one picture and one prompt")
    names = [re.sub(r"\.[^./]+$", "", str(name)).replace("/", "-") for name in images.table["id"]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two pictures would both be written as {twice!r}: rename one")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "editor": editor.name,
        "settings": {key: editor.settings[key] for key in sorted(editor.settings)},
        "size": size,
        "seed": seed,
    }
    _agree(folder / "editor.json", identity, prompts)

    made, kept, taken = 0, 0, []
    with tqdm(total=len(names) * len(prompts), unit="edit", disable=not progress) as bar:
        for index, name in enumerate(names):
            source: Image.Image | None = None
            for edit_name, prompt in prompts.items():
                bar.update()
                path = folder / f"{name}_{edit_name}.png"
                if path.exists():
                    kept += 1
                    continue
                with _claim(path) as mine:
                    if not mine:
                        taken.append(path.name)
                        continue
                    if source is None:
                        source = _picture(images.batch(size, indices=[index])[0])
                        _write(folder / f"{name}_{ORIGINAL}.png", source)
                    _write(path, _edited(editor, source, prompt, seed))
                    made += 1
    return Report(made, kept, tuple(taken))


def _agree(path: Path, identity: dict[str, Any], prompts: Mapping[str, str]) -> None:
    """Enter this run in the folder's record, or refuse it."""
    known = store.read_json(path) if path.exists() else {**identity, "prompts": {}}
    wanted = {**identity, "prompts": {**known["prompts"], **prompts}}
    for key, value in wanted.items():
        before = known.get(key)
        if key == "prompts":
            changed = [name for name, text in known["prompts"].items() if value[name] != text]
            if changed:
                raise store.MismatchError(
                    f"{path.parent} has edits {changed[0]!r} by the prompt "
                    f"{known['prompts'][changed[0]]!r}, not {value[changed[0]]!r}"
                )
        elif before != value:
            raise store.MismatchError(
                f"{path.parent} was made with {key} {before!r}, not {value!r}: take another folder"
            )
    store.write_json(path, wanted)


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Whether the file is this process's to make; released when made, or when that fails."""
    claim = path.with_name(path.name + ".claim")
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        yield False
        return
    try:
        yield not path.exists()
    finally:
        claim.unlink(missing_ok=True)


def _picture(x: torch.Tensor) -> Image.Image:
    return Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _write(path: Path, picture: Image.Image) -> None:
    with store.atomic_path(path) as part:
        picture.save(part, format="PNG")


def _edited(editor: Loaded, source: Image.Image, prompt: str, seed: int) -> Image.Image:
    found = editor.pipeline(
        image=source,
        prompt=prompt,
        generator=torch.Generator().manual_seed(seed),
        **editor.settings,
    ).images[0]
    # Some editors answer at a size of their own.
    found = found.convert("RGB")
    same = found.size == source.size
    return found if same else found.resize(source.size, Image.Resampling.LANCZOS)
