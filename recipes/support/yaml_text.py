"""YAMLs of settings, every scalar of which stays the text that it is."""

from pathlib import Path
from typing import Any

import yaml


def read_yaml_text(path: Path) -> Any:
    """
    What a YAML holds: `no`, `null` and `5e-2` stay text, which means what it means on the command line.

    Raises:
        yaml.YAMLError: also for a name that is set twice, of which YAML would keep the last.
    """
    text = path.read_text(encoding="utf-8")
    content = yaml.load(text, Loader=yaml.BaseLoader)
    waiting, seen = [yaml.compose(text, Loader=yaml.BaseLoader)], set[int]()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for name, value in node.value:
                if name.value in names:
                    line = name.start_mark.line + 1
                    raise yaml.YAMLError(f"line {line} sets {name.value} a second time. Remove one of the two")
                names.add(name.value)
                waiting.append(value)
        else:
            waiting += node.value
    return content
