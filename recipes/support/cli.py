"""The command `hf-lsam`, which runs a recipe by its name."""

import importlib.metadata
import sys
from collections.abc import Callable

from hf_lsam_recipes.support.shipped import RECIPES, did_you_mean, shipped_yamls

# What each command does, and an example.
COMMANDS = {
    "glue": ("fine-tune a text classification or regression model", "hf-lsam glue rte --rho 0.1"),
    "clm": ("fine-tune a causal language model", "hf-lsam clm gsm8k_lora --rho 0.1"),
    "images": ("train an image classifier", "hf-lsam images cifar10_resnet20 --rho 0.1"),
    "compare": ("compare methods over tasks and seeds", "hf-lsam compare glue_small --seeds 0 1 2"),
    "plot": ("draw the figures of a comparison", "hf-lsam plot outputs/compare/glue_small figures/"),
    "benchmark": ("measure what a step costs", "hf-lsam benchmark --methods plain,sam,last-2"),
    "demo": ("compare AdamW, SAM and layer-wise SAM on real text", "hf-lsam demo --seeds 0"),
}
# Where the YAMLs of a command are.
FOLDERS = ("glue", "clm", "images", "compare")


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(f"hf-lsam {importlib.metadata.version('hf-lsam')}")
        return
    name = arguments[0]
    if name not in COMMANDS:
        near = did_you_mean(name, list(COMMANDS))
        sys.exit(
            f"hf-lsam: error: there is no command {name!r}.{near} The commands are {', '.join(COMMANDS)}; "
            "hf-lsam --help has an example of each."
        )
    sys.argv = [f"hf-lsam {name}", *arguments[1:]]
    try:
        script = find_script(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("hf_lsam", "hf_lsam_recipes"):
            raise
        sys.exit(
            f"hf-lsam: error: hf-lsam {name} needs {error.name}, which is not installed: "
            "pip install 'hf-lsam[recipes]' installs everything that the commands need."
        )
    script()


def find_script(name: str) -> Callable[[], None]:
    """Import the entry point of a command, which reads `sys.argv`. Other commands are not imported."""
    match name:
        case "glue":
            from hf_lsam_recipes.run_glue import script
        case "clm":
            from hf_lsam_recipes.run_clm import script
        case "images":
            from hf_lsam_recipes.run_image_classification import script
        case "compare":
            from hf_lsam_recipes.compare import script
        case "plot":
            from hf_lsam_recipes.plot import script
        case "benchmark":
            from hf_lsam_recipes.benchmark import script
        case "demo":
            from hf_lsam_recipes.demo import script
    return script


def usage() -> str:
    """The text of `hf-lsam --help`."""
    commands = [f"  {name:<10} {does}\n             {example}" for name, (does, example) in COMMANDS.items()]
    yamls = [f"  {name:<10} {', '.join(shipped_yamls(name))}" for name in FOLDERS]
    return "\n".join(
        [
            "usage: hf-lsam COMMAND [settings.yaml or NAME] [--setting value ...]",
            "",
            "Layer-wise sharpness-aware minimization for the Hugging Face Trainer.",
            "",
            "Commands, each with an example; hf-lsam COMMAND --help lists its settings:",
            *commands,
            "",
            "The first argument may be a YAML of settings: the path of your own file, or the name of a shipped one.",
            f"Later arguments override it. The shipped ones are in {RECIPES}:",
            *yamls,
            "",
            "To run in several processes (also hf_lsam_recipes.run_clm and hf_lsam_recipes.run_image_classification):",
            "  accelerate launch --num_processes 2 -m hf_lsam_recipes.run_glue rte --rho 0.1",
            "",
            "hf-lsam --version prints the version.",
        ]
    )
