"""The command line: the verbs of LightningCLI, and `ask` and `export`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Set

import torch
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import PlainCLI
from lightning_ipu_bert.checkpoint_file import ORIGIN_KEY, PRECISION_KEY, read_checkpoint
from lightning_ipu_bert.commands import ask, export
from lightning_ipu_bert.commands.parser import Parser, exit_with
from lightning_ipu_bert.commands.run_folder import set_run_folder
from lightning_ipu_bert.data.squad import SquadDataModule
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.models.predictions import PredictionWriter
from lightning_ipu_bert.models.question_answering import BertForQuestionAnsweringModule

COMMANDS: Dict[str, Callable[[Sequence[str]], None]] = {"ask": ask.main, "export": export.main}
"""The verbs that do not use a Trainer."""

LIGHTNINGS_OWN = re.compile(r"(last|best|hpc)$|registry|.*://")
"""Values of --ckpt_path that Lightning resolves itself."""

WINDOWING = ("max_length", "doc_stride")

DESCRIPTION = (
    "Fine-tune BERT on SQuAD with PyTorch Lightning. Two more verbs: 'ask' a trained model, "
    "'export' it as a Hugging Face folder (each has its own --help). With --debug an error of a "
    "value shows its traceback."
)

DEBUG = "--debug"
"""Shows tracebacks: ValueErrors of other packages are printed in one line, too."""


def shipped_configs() -> Path:
    """Return the folder of the configs, in an installed package or in a checkout."""
    package = Path(__file__).parent
    return next(p for p in (package / "configs", package.parent / "configs") if p.is_dir())


def find_config(name: str) -> str:
    """Return the path of the shipped config `name`, unless `name` is a file."""
    shipped = shipped_configs() / Path(name).with_suffix(".yaml").name
    return str(shipped) if not Path(name).exists() and shipped.is_file() else name


class ConfigFile(ActionConfigFile):
    """Action of `--config`, for a file or the name of a shipped config."""

    @override
    def __call__(
        self, parser: object, cfg: object, values: Any, option_string: object = None
    ) -> None:
        """Apply a config file."""
        super().__call__(parser, cfg, find_config(values), option_string)  # type: ignore[no-untyped-call]


class QuestionAnsweringCLI(PlainCLI):
    """`fit`, `validate`, `test` and `predict`."""

    def __init__(self, args: List[str]) -> None:
        """Parse the arguments and run the verb."""
        self._parsers: List[Parser] = []
        self._first = args[0] if args else ""
        super().__init__(
            BertForQuestionAnsweringModule,
            SquadDataModule,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "prog": "python -m lightning_ipu_bert",
                "default_env": True,
                "description": DESCRIPTION,
            },
            args=args,
        )

    @override
    def subcommands(self) -> Dict[str, Set[str]]:  # type: ignore[override]  # static in Lightning
        """Return the verb that was given, or all: a parser of a verb takes a while to create."""
        verbs = LightningCLI.subcommands()
        return {self._first: verbs[self._first]} if self._first in verbs else verbs

    @override
    def init_parser(self, **kwargs: Any) -> Parser:
        """Return a parser that accepts names of shipped configs."""
        parser = Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ConfigFile, help="YAML file, or name of a shipped config."
        )
        parser.verbs = self._parsers
        self._parsers.append(parser)
        return parser

    @override
    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the options of `PredictionWriter`."""
        parser.add_lightning_class_args(PredictionWriter, "predictions")

    @override
    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the arguments, then override them by those of a checkpoint."""
        self.config = parser.parse_args(args)
        options = self.config[self.config.subcommand]
        data = options.data
        set_run_folder(options.trainer, bool(data.validation_file or data.dataset_name))
        path = options.get("ckpt_path")
        if path and not LIGHTNINGS_OWN.match(str(path)):
            defaults = self.defaults_of(self.config.subcommand)
            follow_checkpoint(options, defaults, str(path), self.config.subcommand)
        if options.data.tokenizer_name_or_path is None:
            options.data.tokenizer_name_or_path = options.model.model_name_or_path

    @override
    def instantiate_classes(self) -> None:
        """Create model, data and Trainer; their ValueErrors are errors of the user."""
        try:
            super().instantiate_classes()
        except (MisconfigurationException, ValueError) as error:
            raise UserError(str(error)) from error
        self.datamodule.read(self.subcommand)  # before ranks are started


def follow_precision(trainer: Any, checkpoint: Dict[str, Any]) -> None:
    """Evaluate in the precision of the training, unless another one is given.

    Args:
        trainer: The parsed options of the Trainer; modified in place.
        checkpoint: The checkpoint. IPUs have precisions of their own, and float16 needs a GPU.
    """
    precision = checkpoint.get(PRECISION_KEY)
    on_ipus = trainer.accelerator == "ipu" or "IPUStrategy" in str(trainer.strategy)
    usable = precision and (not precision.startswith("16") or torch.cuda.is_available())
    if usable and not on_ipus and trainer.precision is None:
        trainer.precision = precision
        rank_zero_info(f"Using precision={precision} of the checkpoint.")


def follow_checkpoint(options: Any, defaults: Any, path: str, verb: str) -> None:
    """Override model settings, windows and tokenizer by those of a checkpoint.

    Weights, optimizer state and schedule of a checkpoint require its own settings, which therefore
    take precedence over the command line, as in Lightning. Differences are printed.

    Args:
        options: The parsed options of a verb; modified in place.
        defaults: Their defaults; options with their default value are not reported.
        path: The checkpoint.
        verb: The verb; all but fit run in the precision of the checkpoint, too.
    """
    checkpoint = read_checkpoint(path)
    if verb != "fit":
        follow_precision(options.trainer, checkpoint)
    saved = checkpoint.get(BertForQuestionAnsweringModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    data = checkpoint.get(SquadDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
    known = {**saved, "model_name_or_path": checkpoint.get(ORIGIN_KEY)}
    different = []
    for group, values, names in (("model", known, list(known)), ("data", data, WINDOWING)):
        for name in names:
            given = options[group].get(name)
            if name not in values or name not in options[group]:
                continue
            if given != defaults[group].get(name) and not _agrees(given, values[name]):
                different.append(f"{name}={values[name]!r} (given: {given!r})")
            options[group][name] = saved.get(name) if group == "model" else values[name]
    if options.data.tokenizer_name_or_path is None:
        options.data.tokenizer_name_or_path = path
    if different:
        rank_zero_info(
            f"Using settings of the checkpoint: {', '.join(different)}. To train its weights with "
            "other settings, export it and pass the folder as --model.model_name_or_path."
        )


def _agrees(given: object, saved: object) -> bool:
    if isinstance(given, dict) and isinstance(saved, dict):
        return all(saved.get(name) == value for name, value in given.items())
    return bool(given == saved)


def main(args: Optional[Sequence[str]] = None) -> None:
    """Run a verb; errors of the user are printed in one line, with exit code 2."""
    words = list(sys.argv[1:] if args is None else args)
    debug = DEBUG in words
    words = [word for word in words if word != DEBUG]
    try:
        if words and words[0] in COMMANDS:
            COMMANDS[words[0]](words[1:])
        else:
            QuestionAnsweringCLI(words)
    except UserError as error:
        if debug:
            raise
        exit_with(str(error))
