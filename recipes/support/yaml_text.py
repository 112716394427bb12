"""Reading YAMLs of settings, with every scalar as text."""

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError


def read_yaml_text(path: Path) -> Any:
    """
    Read a YAML file. All scalars, such as `no`, `null` and `5e-2`, are strings, to be parsed as on the command line.

    Raises:
        ValueError: if the file is not valid YAML in UTF-8, or sets a name twice.
        OSError: if it cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    try:
        return YAML(typ="base").load(text)
    except DuplicateKeyError as error:
        [name] = re.findall(r'duplicate key "(.*?)" with value', error.problem, re.DOTALL)
        line = error.problem_mark.line + 1
        raise ValueError(f"line {line} sets {name} a second time. Remove one of the two") from error
    except MarkedYAMLError as error:
        raise ValueError(f"line {error.problem_mark.line + 1}: {error.problem}") from error
    except YAMLError as error:  # a character that YAML does not allow
        raise ValueError(" ".join(str(error).split())) from error
