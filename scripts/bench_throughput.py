"""Training throughput of `fit` as shipped, beside the Trainer of Hugging Face.

    python scripts/bench_throughput.py --train_file T --model M
        [--against best compiled recipe stages]
        [--precision bf16 float32] [--pairs 5] [--updates 60]

best, compiled and recipe are the Trainer of Hugging Face (throughput_sides.py); stages is
configs/squad_minilm_pipeline.yaml, two ranks beside one process with two threads.

Both sides train configs/squad_minilm.yaml: the same features in the same order, dropout, clipping
and precision, nothing frozen, a line of logs every 25 updates. Each run is a process of its own;
those of a pair follow each other. The clock starts after 10 updates and covers everything from then
on, reading and collating included. Nothing else should run beside it.

The share of the peak counts the matrix products of real tokens, forward and backward, without
padding; the peak is the best square product of the type in a process with the same settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from transformers import BertConfig

HERE = Path(__file__).parent
BATCH = 16
PRECISIONS = {"bf16": "bf16-mixed", "float32": "32-true"}


class Side(NamedTuple):
    """A run of one side."""

    seconds: float
    updates: int
    lengths: List[List[int]]
    """Tokens of every feature of every update, without padding."""

    @property
    def examples_per_second(self) -> float:
        return BATCH * self.updates / self.seconds


def run(words: Sequence[str], out: Path, quiet: bool = True) -> Any:
    """Run a process and return what it wrote to a file."""
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=HERE, capture_output=quiet, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return json.loads(out.read_text("utf8"))


def fit(
    options: argparse.Namespace, precision: str, out: Path, config: str = "squad_minilm"
) -> Side:
    """Train by the shipped command with a shipped config."""
    clock = "--trainer.callbacks"
    result = run(
        [
            *("-m", "lightning_ipu_bert", "fit", "--config", config),
            *("--model.model_name_or_path", options.model),
            *("--data.train_file", options.train_file),
            *("--trainer.precision", PRECISIONS[precision]),
            *("--trainer.default_root_dir", str(out.parent)),
            *(clock, "update_clock.LightningClock"),
            *(f"{clock}.file", str(out), f"{clock}.updates", str(options.updates)),
        ],
        out,
    )
    return Side(**result)


def other(name: str, options: argparse.Namespace, precision: str, out: Path) -> Side:
    """Train by another side: `fit` on two stages, or one of throughput_sides.py."""
    if name == "stages":
        return fit(options, precision, out, config="squad_minilm_pipeline")
    return Side(**run(side_words(name, options, precision, out), out))


def side_words(name: str, options: argparse.Namespace, precision: str, out: Path) -> List[str]:
    given = {**vars(options), "bf16": precision == "bf16"}
    return [str(HERE / "throughput_sides.py"), name, str(out), json.dumps(given)]


def training_flops(config: BertConfig, lengths: Sequence[int]) -> float:
    """Return the floating point operations of the matrix products of features, without padding.

    Two per weight and token forward, twice that backward; likewise for both products of attention.
    """
    size, inner = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (4 * size * size + 2 * size * inner)
    squares = config.num_hidden_layers * 2 * size
    return float(sum(6 * weights * n + 6 * squares * n * n for n in lengths))


def compare(
    options: argparse.Namespace, precision: str, name: str, peak: float, folder: Path
) -> None:
    """Let both sides train in turn; print the ratio of their speeds, and the share of the peak."""
    config = BertConfig.from_pretrained(options.model)
    ratios, speeds, shares = [], [], []
    for pair in range(options.pairs):
        order = ("fit", name) if pair % 2 == 0 else (name, "fit")
        sides: Dict[str, Side] = {}
        for side in order:
            out = folder / f"{side}.json"
            out.unlink(missing_ok=True)
            make = fit if side == "fit" else lambda *a: other(name, *a)
            sides[side] = make(options, precision, out)
        ours, theirs = sides["fit"], sides[name]
        assert ours.lengths == theirs.lengths, "the sides trained on different features"
        ratios.append(ours.examples_per_second / theirs.examples_per_second)
        speeds.append(ours.examples_per_second)
        timed = [n for update in ours.lengths[-ours.updates :] for n in update]
        shares.append(100 * training_flops(config, timed) / ours.seconds / peak)
        print(
            f"  pair {pair}: fit {ours.examples_per_second:.2f}, {name} "
            f"{theirs.examples_per_second:.2f} examples/s, ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(
        f"{precision}: fit / {name}: median {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} .. {max(ratios):.2f}) over {len(ratios)} pairs; "
        f"fit {statistics.median(speeds):.2f} examples/s, "
        f"{statistics.median(shares):.1f} % of the peak",
        flush=True,
    )


def main() -> None:
    """Compare `fit` with the other sides."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--model", required=True, help="folder or hub name of a BERT")
    parser.add_argument("--against", nargs="+", default=["best"])
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--updates", type=int, default=60, help="timed, after 10 of warm-up")
    options = parser.parse_args()
    options.train_file = str(Path(options.train_file).resolve())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for precision in options.precision:
            out = folder / "peak.json"
            peak = run(side_words("peak", options, precision, out), out)
            print(f"{precision}: peak {peak / 1e9:.0f} GFLOP/s", flush=True)
            for side in options.against:
                compare(options, precision, side, peak, folder)


if __name__ == "__main__":
    main()
