"""Renders types and references of the docstrings, which are written as those of transformers are, and long names."""

import re

# The type of an argument, and the default of the signature, which the docstring gives as well.
TYPE = re.compile(r"\(<code>([^<]*`[^<]*)</code>(?:,\s*default:\s*<code>(?:(?!</code>).)*</code>)?\s*\)", re.DOTALL)
# Such as [`LSAMConfig`] or [`~transformers.Trainer`].
REFERENCE = re.compile(r"\[<code>([\w.~]+)</code>\]")
# Such as `hf_lsam/step.py::LSAMStep`.
PLACE = re.compile(r"(<code>[\w/]+\.py)::")


def on_page_content(html: str, **_) -> str:
    """
    Types as code and text; references as links to where their target is on the same page, or as code; and places in
    the code, which are long, may be broken before the name.
    """
    targets = {identifier.rpartition(".")[2]: identifier for identifier in re.findall(r'id="(hf_lsam[\w.]+)"', html)}

    def write_type(found: re.Match) -> str:
        text = re.sub("`([^`]*)`", r"<code>\1</code>", found[1].replace("*", ""))
        return f"({text})"

    def write_reference(found: re.Match) -> str:
        name = found[1].lstrip("~").rpartition(".")[2]
        code = f"<code>{name}</code>"
        return f'<a href="#{targets[name]}">{code}</a>' if name in targets else code

    return PLACE.sub(r"\1<wbr>::", REFERENCE.sub(write_reference, TYPE.sub(write_type, html)))
