import transformers
from packaging import version

# These need a newer version than the library: older ones lack training arguments of the YAMLs, pass no
# momentum to SGD, and report to whatever is installed.
RECIPES = (
    "adapters benchmark calibration cli clm_data clm_metrics common compare compare_check compare_glue "
    "compare_report convergence demo demo_assets early_errors glue_data glue_lengths glue_metric glue_sampling "
    "hints host_cost image_data launch measures model_card resnets robustness run_clm run_glue "
    "run_glue_no_trainer run_image_classification security soak staleness yaml_text yamls"
)
if version.parse(transformers.__version__) < version.parse("5.19"):
    collect_ignore = [f"test_{name}.py" for name in RECIPES.split()]
