"""Options of a run that are not in the IPU config, and the `poptorch.Options` of its programs."""

from __future__ import annotations

import os
from typing import Callable, NamedTuple, Optional

from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.strategies.ipu.loaders import LoaderMode
from lightning_ipu_bert.strategies.ipu.program.options import OptionsContext, ipu_options


class RunOptions(NamedTuple):
    """Options of a run that are not in the IPU config; see `IPUStrategy`."""

    loss_scaling: Optional[float] = None
    lamb: bool = False
    loader_mode: LoaderMode = "sync"
    auto_round_num_ipus: bool = False
    compile_only: bool = False
    edit_options: Optional[Callable[[object, bool], None]] = None


def program_options(
    config: IPUConfig,
    training: bool,
    options: RunOptions,
    initializers_file: Optional[str] = None,
    returns_output: bool = False,
) -> object:
    """Return the `poptorch.Options` of a program, as edited by the user.

    Args:
        config: The configuration.
        training: Whether it is the training program.
        options: Other options of the strategy.
        initializers_file: File for initial weights, of a program.
        returns_output: Whether the training program returns the output, too.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    context = OptionsContext(
        seed=int(seed) if seed else None,
        initializers_file=initializers_file,
        offline=options.compile_only,
        auto_round_num_ipus=options.auto_round_num_ipus,
        returns_output=returns_output,
    )
    made = ipu_options(config, training, context)
    if options.edit_options is not None:
        options.edit_options(made, training)
    return made
