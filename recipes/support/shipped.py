"""The YAMLs that ship with the recipes, which can be given by name: `rte` for `glue/rte.yaml`."""

import difflib
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1]


def shipped_yamls(folder: str) -> dict[str, Path]:
    """The paths of the YAMLs in `folder`, such as `glue`, by name without suffix."""
    return {path.stem: path for path in sorted((RECIPES / folder).glob("*.yaml"))}


def find_yaml(name: str, folder: str) -> Path:
    """
    Find a YAML: `name` is a path or, if no such file exists, the name of a YAML that ships in `folder`.

    Raises:
        ValueError: if it is neither; the message suggests similar names.
    """
    path, shipped = Path(name), shipped_yamls(folder)
    if path.is_file():
        return path
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    if path.name == name and stem in shipped:
        return shipped[stem]
    own = sorted(str(other) for suffix in ("yaml", "yml") for other in path.parent.glob(f"*.{suffix}"))
    near = did_you_mean(stem, list(shipped)) or did_you_mean(str(path), own)
    raise ValueError(
        f"{name} is not a file, and no YAML of that name ships with this recipe.{near} Name a file of your own or one "
        f"of {', '.join(shipped)}, which are in {RECIPES / folder}; settings start with --."
    )


def did_you_mean(name: str, names: list[str]) -> str:
    """` Did you mean X or Y?` with up to three of `names` that begin with or resemble `name`; empty if none does."""
    lower = {other.lower(): other for other in names}
    near = [other for other in lower if other.startswith(name.lower())]
    near = near or difflib.get_close_matches(name.lower(), list(lower), cutoff=0.7)
    return f" Did you mean {' or '.join(lower[other] for other in near[:3])}?" if near else ""
