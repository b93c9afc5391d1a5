"""Draws where the time of a weight update goes: by the layers of transformers, and as shipped.

    python scripts/plot_update_time.py --train_file T --model M --out update_time.svg
        [--precision 32-true]

Both train configs/squad_minilm.yaml by the shipped command, "before" with fast_kernels and
keep_freed_memory off. torch's profiler adds up what every operation takes by itself, over 20
updates after 10 of warm-up; it slows small operations. Time outside of operations is "other":
Python, reading and collating, logs, the progress bar.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Optional

import lightning.pytorch as pl
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import override
from update_clock import WARM_UP

from lightning_ipu_bert.ops import attention, dropout, parts
from lightning_ipu_bert.ops.masks import keep_mask

HERE = Path(__file__).parent
KINDS = {
    "products of linear layers": ("addmm", "mm", "linear", "_linear_pointwise"),
    "products of attention": ("bmm", "baddbmm", "matmul", "scaled_dot_product_attention"),
    "dropout": ("bernoulli_", "native_dropout", "dropout", "random_", "bitwise_and_"),
    "softmax": ("_softmax", "_softmax_backward_data", "softmax"),
    "GELU": ("gelu", "gelu_backward"),
    "LayerNorm": ("native_layer_norm", "native_layer_norm_backward", "layer_norm"),
    "embeddings": ("embedding", "embedding_dense_backward", "index_select", "zero_"),
    "casts and copies": ("copy_", "_to_copy", "to", "cat", "clone", "contiguous", "reshape"),
}
MASKS, CLIP, MODEL = "dropout masks", "clip gradients", "forward or backward"
OPTIMIZER = "optimizer and clipping"
OTHER_OPERATIONS, OTHER = "additions, products by element", "other"
BEFORE = ["--model.fast_kernels", "false", "--model.keep_freed_memory", "false"]
COLORS = "tab20"


class UpdateProfile(pl.Callback):
    """Profiles updates after the warm-up, writes the milliseconds by kind, and ends the fit."""

    def __init__(self, file: str, updates: int = 20) -> None:
        self.file, self.updates, self.count = file, updates, 0
        self.profile = profile(activities=[ProfilerActivity.CPU])

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the parts of an update, and numbers of NumPy, which are no operations."""
        for module in (attention, dropout, parts):
            vars(module)["keep_mask"] = named(MASKS, keep_mask)
        methods = {"clip_gradients": CLIP, "training_step": MODEL, "backward": MODEL}
        for method, name in methods.items():
            vars(pl_module)[method] = named(name, getattr(pl_module, method))

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.count += 1
        if self.count == WARM_UP:
            self.profile.start()
            self.begin = time.perf_counter()
        if self.count == WARM_UP + self.updates:
            seconds = time.perf_counter() - self.begin
            self.profile.stop()
            events: Any = self.profile.events  # untyped in torch
            found = milliseconds_by_kind(events() or [])
            found[OTHER] = 1000 * seconds - sum(found.values())
            shares = {kind: value / self.updates for kind, value in found.items()}
            Path(self.file).write_text(json.dumps(shares), "utf8")
            trainer.should_stop = True


def named(name: str, function: Any) -> Any:
    """Return a function whose calls are a range of the profile."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return run


def milliseconds_by_kind(events: List[Any]) -> Dict[str, float]:
    """Add up the time that events take by themselves, by the kind of the operation or its range."""
    found: Dict[str, float] = defaultdict(float)
    for event in events:
        found[kind_of(event)] += event.self_cpu_time_total / 1000
    return dict(found)


def kind_of(event: Any) -> str:
    """Return the kind of an event: that of the innermost part around it, or of its name."""
    around: Optional[Any] = event
    while around is not None and around.name != MODEL:
        if around.name == MASKS:
            return "dropout"
        # Lightning runs forward and backward within the step of the optimizer.
        if around.name == CLIP or around.name.startswith("Optimizer.step"):
            return OPTIMIZER
        around = around.cpu_parent
    name = event.name.split("::")[-1]
    kinds = [kind for kind, names in KINDS.items() if name in names]
    return kinds[0] if kinds else OTHER_OPERATIONS


def measure(options: argparse.Namespace, words: List[str]) -> Dict[str, float]:
    """Return the milliseconds of an update by kind, of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "profile.json"
        command = [
            *(sys.executable, "-m", "lightning_ipu_bert", "fit", "--config", "squad_minilm"),
            *("--model.model_name_or_path", options.model),
            *("--data.train_file", str(Path(options.train_file).resolve())),
            *("--trainer.precision", options.precision, "--trainer.default_root_dir", folder),
            *("--trainer.callbacks", "plot_update_time.UpdateProfile"),
            *("--trainer.callbacks.file", str(out), *words),
        ]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found: Dict[str, float] = json.loads(out.read_text("utf8"))
    return found


def draw(sides: Dict[str, Dict[str, float]], out: Path) -> None:
    """Draw a bar for each side, of the milliseconds by kind."""
    import matplotlib.pyplot as plt

    kinds = sorted({k for side in sides.values() for k in side}, key=list(order()).index)
    figure, axes = plt.subplots(figsize=(9, 2.9))
    left = dict.fromkeys(sides, 0.0)
    for number, kind in enumerate(kinds):
        values = [side.get(kind, 0.0) for side in sides.values()]
        color = plt.get_cmap(COLORS)(number)
        bars = axes.barh(list(sides), values, left=list(left.values()), label=kind, color=color)
        labels = [f"{value:.0f}" if value > 0.03 * total(sides) else "" for value in values]
        axes.bar_label(bars, labels, label_type="center", fontsize=8)
        left = {name: left[name] + value for name, value in zip(sides, values)}
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a weight update")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        ncols=4, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.47, -0.25)
    )
    figure.savefig(out, bbox_inches="tight")


def order() -> List[str]:
    """Return all kinds as they are drawn."""
    return [*KINDS, OTHER_OPERATIONS, OPTIMIZER, OTHER]


def total(sides: Dict[str, Dict[str, float]]) -> float:
    """Return the length of the longest bar."""
    return max(sum(side.values()) for side in sides.values())


def main() -> None:
    """Profile both sides, print and draw them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--model", required=True, help="folder or hub name of a BERT")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--out", type=Path, default=Path("update_time.svg"))
    options = parser.parse_args()
    sides = {"before": measure(options, BEFORE), "as shipped": measure(options, [])}
    for kind in order():
        values = "  ".join(f"{side.get(kind, 0.0):8.1f}" for side in sides.values())
        print(f"{kind:32} {values}")
    draw(sides, options.out)


if __name__ == "__main__":
    main()
