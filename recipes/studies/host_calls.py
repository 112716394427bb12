"""Counts of Python calls: by the file that made them, and by the part of a pass that they belong to."""

from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

# Parts of a pass: the end of a file's name, the beginning of a function's name, and the part. The first match counts;
# calls without a match belong to the loop.
PARTS = (
    ("hf_lsam/held.py", "RandomState", "random states"),
    ("hf_lsam/pass_state.py", "", "snapshots"),
    ("hf_lsam/held.py", "", "snapshots"),
    ("hf_lsam/kinds.py", "", "snapshots"),
    ("hf_lsam/bulk.py", "", "snapshots"),
    ("hf_lsam/visitor.py", "", "snapshots"),
    ("hf_lsam/stamps.py", "", "snapshots"),
    ("hf_lsam/replay.py", "", "hooks on blocks"),
    ("hf_lsam/passes.py", "copy_of", "copies of the batch"),
    ("hf_lsam/passes.py", "Standin", "hooks on blocks"),
    ("hf_lsam/passes.py", "modes_kept", "training_step"),
    ("hf_lsam/passes.py", "weights_counted_once", "count of operations"),
    ("hf_lsam/passes.py", "", "gradients of a few weights"),
    ("hf_lsam/perturbation.py", "", "moves and norms"),
    ("hf_lsam/rounding.py", "", "moves and norms"),
    ("hf_lsam/ascent.py", "", "selection"),
    ("hf_lsam/selection.py", "", "selection"),
    ("hf_lsam/costs.py", "", "costs"),
    ("hf_lsam/step_log.py", "", "logging"),
    ("hf_lsam/trainer.py", "LSAMMixin.log", "logging"),
    ("hf_lsam/trainer.py", "LSAMMixin.training_step", "around the passes"),
    ("hf_lsam/trainer.py", "LSAMMixin.train", "loop"),
    ("hf_lsam/trainer.py", "", "around the passes"),
    ("hf_lsam/", "", "step"),
    ("peers.py", "", "step"),
    ("transformers/masking_utils.py", "", "masks"),
    ("modeling_bert.py", "BertEmbeddings", "embeddings"),
    ("modeling_bert.py", "BertLayer", "blocks"),
    ("modeling_bert.py", "Bert", "model around blocks"),
    ("transformers/trainer.py", "Trainer.training_step", "training_step"),
    ("transformers/trainer.py", "Trainer.compute_loss", "training_step"),
    ("transformers/trainer.py", "Trainer.floating_point_ops", "count of operations"),
    ("torch/_tensor.py", "Tensor.backward", "backward"),
)


class CallCounter:
    """For `sys.setprofile`: counts calls by the file that made them and by the part that they belong to."""

    def __init__(self):
        self.total = 0
        self.files: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self._file_of: dict[CodeType, str] = {}
        self._part_of: dict[CodeType, str | None] = {}

    def __call__(self, frame: FrameType, event: str, _) -> None:
        if event not in ("call", "c_call"):
            return
        self.total += 1
        self.files[self._file(frame.f_code)] += 1
        self.parts[self._part(frame)] += 1

    def _file(self, code: CodeType) -> str:
        if code not in self._file_of:
            path = Path(code.co_filename)
            known = [name for name in ("torch", "transformers", "accelerate") if name in path.parts]
            own = f"hf_lsam/{path.name}" if path.parent.name == "hf_lsam" else "other"
            self._file_of[code] = known[0] if known else own
        return self._file_of[code]

    def _part(self, frame: FrameType | None) -> str:
        while frame is not None:
            code = frame.f_code
            if code not in self._part_of:
                # Before Python 3.11, code objects have no qualified name, so the classes of a file are not told apart.
                path, own = Path(code.co_filename).as_posix(), getattr(code, "co_qualname", code.co_name)
                found = (part for end, name, part in PARTS if _fits(path, end) and own.startswith(name))
                self._part_of[code] = next(found, None)
            part = self._part_of[code]
            if part is not None:
                return part
            frame = frame.f_back
        return "loop"


def _fits(path: str, end: str) -> bool:
    return f"/{end}" in path if end.endswith("/") else path.endswith(f"/{end}")
