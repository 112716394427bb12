"""Recipes for the tests of comparisons, and what their results carry."""

STAMP = {"commit": "abc", "versions": {"torch": "2"}, "machine": "here"}

# A recipe that trains nothing: its accuracy is `value` and a little for the seed. It waits while `hold` exists.
RECIPE = """
import json, pathlib, sys, time, yaml
settings = yaml.safe_load(open(sys.argv[1]))
resumed = sys.argv[2:] == ["--resume_from_checkpoint", "true"]
out, root = pathlib.Path(settings["output_dir"]), pathlib.Path(__file__).parent
value, seed = float(settings["value"]), settings["seed"]
with open(root / "calls", "a") as calls:
    print(settings["value"], seed, "resumed" if resumed else "anew", file=calls)
if value == 13:
    sys.exit("no luck")
for name in ("checkpoint-2", "checkpoint-4"):
    (out / name).mkdir(parents=True, exist_ok=True)
(out / "checkpoint-2" / "trainer_state.json").write_text("{}")
(out / "model.safetensors").touch()
start = time.monotonic()
while (root / "hold").exists() and seed == 1 and time.monotonic() < start + 20:
    time.sleep(0.02)
result = {"eval_accuracy": 1 - abs(value - 2) / 10, "train_runtime": 9.0 * value, "train_step_seconds": value,
          "train_peak_memory_mib": 500.0 + seed}
if settings.get("do_predict") != "false":
    result["predict_accuracy"] = value / 10 + seed / 100
(out / "all_results.json").write_text(json.dumps(result))
log = [{"step": 2, "loss": 0.7}, {"step": 2, "eval_accuracy": value / 10, "eval_runtime": 1.5},
       {"step": 2, "sharpness/seconds": 0.5}]
(out / "trainer_state.json").write_text(json.dumps({"log_history": log, "total_flos": 100.0 * value}))
(out / "lsam_blocks.jsonl").write_text(json.dumps({"step": 2, "steps": 2, "counts": {"a": 1}}) + chr(10))
"""

# One whose log holds what figures are drawn from. With value v and seed s: loss v / step + s, gradient norm
# v * step + s, and 10 * v + layer + s for layers 2 and 10.
LOGGING_RECIPE = """
import json, pathlib, sys, yaml
settings = yaml.safe_load(open(sys.argv[1]))
out, kind, seed, v = pathlib.Path(settings["output_dir"]), settings["kind"], settings["seed"], float(settings["value"])
out.mkdir(parents=True)
log, rows = [], []
for step in range(1, 7):
    measured = {f"sharpness/gradient_norm/layer.{n}": 10 * v + n + seed for n in (10, 2)}
    measured["sharpness/gradient_norm/all"] = 100 * v + step + seed
    log += [{"step": step, "sharpness/seconds": 0.0, **measured}]
    log += [{"step": step, "loss": v / step + seed, "grad_norm": v * step + seed}]
    log += [{"step": step, "eval_accuracy": v / 10 + seed / 100, "eval_runtime": 0.0}] * (step % 3 == 0)
    counts = {"all": 1} if kind == "all" else {"layer.2": 1, "layer.10": int(step > 4)}
    norms = {} if step < 3 else {name: v * step + seed for name in counts}
    rows += [{"step": step, "steps": 1, "perturbed": 1, "counts": counts, "norms": norms}]
if kind != "none":
    (out / "lsam_blocks.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
places = [-1.0, 0.0, 1.0]
landscape = {name: {"places": places, "losses": [v, seed, v]} for name in ("layer.2", "layer.10", "all")}
(out / "landscapes.json").write_text(json.dumps(landscape))
(out / "trainer_state.json").write_text(json.dumps({"log_history": log, "total_flos": v * 10}, sort_keys=True))
result = {"predict_accuracy": v / 10 + seed / 100, "train_runtime": v * (1 + seed), "train_step_seconds": v,
          "train_peak_memory_mib": 1.0}
(out / "all_results.json").write_text(json.dumps(result))
"""


def unmeasured(run: dict) -> None:
    """Leave of a run what it holds without measurements, in the form that results had before there were any."""
    run["curve"] = [line for line in run["curve"] if "sharpness/seconds" not in line]
    del run["landscapes"]
