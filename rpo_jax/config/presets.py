"""The presets that come with the package, by name: what a checkout has in configs/ is rpo_jax/presets of a wheel."""

from __future__ import annotations

import difflib
from pathlib import Path

_STUDY = ("compare_", "frontier")  # so begin the names of files for rpo_jax.compare
_CHECKOUT = "configs"  # the folder's name in a checkout, and in the paths and commands of presets and documentation


def preset_folder() -> Path:
    """Folder of the presets and of the data that they name."""
    package = Path(__file__).parents[1]
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / _CHECKOUT


def preset_names(*, studies: bool = False) -> list[str]:
    """Names of all presets of runs, or of studies of many runs."""
    names = sorted(path.stem for path in preset_folder().glob("*.yaml"))
    return [name for name in names if name.startswith(_STUDY) == studies]


def packaged(path: str) -> str:
    """A path; where it begins with `configs/` and is not there, that of the file of this name in the package."""
    first, _, rest = path.partition("/")
    own = preset_folder() / rest
    return str(own) if first == _CHECKOUT and rest and not Path(path).exists() and own.exists() else path


def config_file(name: str, *, studies: bool = False) -> Path:
    """The YAML file of that path, or the preset of that name.

    Raises ValueError where there is neither, naming the nearest preset.
    """
    path = Path(packaged(name)).expanduser()
    if path.is_file():
        return path
    names = preset_names(studies=studies)
    if name in names:
        return preset_folder() / f"{name}.yaml"
    near = difflib.get_close_matches(Path(name).stem, names, n=1)
    hint = f"did you mean the preset {near[0]}? There are" if near else "the presets that come with the package are"
    kind = "study" if studies else "configuration file"
    raise ValueError(f"No {kind} at {path}; {hint} {', '.join(names)}.")
