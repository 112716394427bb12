"""A recipe for the tests of comparisons, and what its results carry."""

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
