"""The verbs of LightningCLI: `fit`, `validate`, `test` and `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Set

from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_ipu_bert._compat.lightning import PlainCLI
from lightning_ipu_bert.commands.checkpoint_settings import LIGHTNINGS_OWN, follow_checkpoint
from lightning_ipu_bert.commands.parser import Parser
from lightning_ipu_bert.commands.run_folder import set_run_folder
from lightning_ipu_bert.data.squad import SquadDataModule
from lightning_ipu_bert.errors import UserError
from lightning_ipu_bert.models.predictions import PredictionWriter
from lightning_ipu_bert.models.question_answering import BertForQuestionAnsweringModule

DESCRIPTION = (
    "Fine-tune BERT on SQuAD with PyTorch Lightning. Two more verbs: 'ask' a trained model, "
    "'export' it as a Hugging Face folder (each has its own --help). With --debug an error of a "
    "value shows its traceback."
)


def shipped_configs() -> Path:
    """Return the folder of the configs, in an installed package or in a checkout."""
    package = Path(__file__).parents[1]
    return next(p for p in (package / "configs", package.parent / "configs") if p.is_dir())


def find_config(name: str) -> str:
    """Return the path of the shipped config `name`, unless `name` is a file."""
    shipped = shipped_configs() / Path(name).with_suffix(".yaml").name
    return str(shipped) if not Path(name).exists() and shipped.is_file() else name


class TrainerParser(Parser, LightningArgumentParser):
    """Parser of LightningCLI with errors of one line."""


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
    def init_parser(self, **kwargs: Any) -> TrainerParser:
        """Return a parser that accepts names of shipped configs."""
        parser = TrainerParser(**kwargs)
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
