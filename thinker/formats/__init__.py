"""Models of every format under Thinker's names: `open_model` tells which it is and has its room read it.

The tables of names are in `huggingface.py` and `gguf.py`, what is opened in `model_files.py`. Importing this package is
light: the rooms are loaded when a file of theirs is opened.
"""

from __future__ import annotations

from pathlib import Path

from .model_files import Modality, ModelFiles
from .q8 import Q8Tensor

__all__ = ["Modality", "ModelFiles", "Q8Tensor", "open_model"]


def open_model(path: str | Path) -> ModelFiles:
    """Open a Thinker directory, a Hugging Face folder of one of the five classes, or a GGUF file of the same families.

    What can't be opened, or not be computed rightly, raises a `ValueError` of one line that names the file, the reason
    and the remedy. The tensors are read, and checked for NaN, when they are asked for.
    """
    from ..checkpoint.publish import is_run, open_run
    from ..checkpoint.reader import refuse_pickle
    from .huggingface import open_folder

    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        refuse_pickle(path)
        if path.suffix == ".gguf" or _begins_as_gguf(path):
            from .gguf import open_gguf

            return open_gguf(path)
        if path.suffix == ".json" and not (path.parent / "config.json").exists():
            raise ValueError(
                f"{path}: holds no weights; if it describes a model, train it: thinker train {path} "
                "(with --dry-run to see what that takes)"
            )
        if path.suffix in (".safetensors", ".json"):
            raise ValueError(f"{path}: give the folder {path.parent} instead, which says what its tensors mean")
        raise ValueError(f"{path}: is no model; give a folder with config.json and safetensors, or a .gguf file")
    if is_run(path):
        return open_run(path)
    if (path / "config.json").exists():
        return open_folder(path)
    names = sorted(item.name for item in path.iterdir())
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        raise ValueError(f"{path}: has no config.json; to open {gguf[0]} give its own path")
    for name in names:
        refuse_pickle(path / name)
    raise ValueError(f"{path}: has no config.json, so it is no model")


def _begins_as_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"
