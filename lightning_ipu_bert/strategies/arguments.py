"""Constructor arguments of strategies: suggestions for misspelled names, and fields of the plan."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple, TypeVar, Union

from typing_extensions import Concatenate, ParamSpec

from lightning_ipu_bert.pipeline.config import PipelineConfig
from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.ipu.fields import PLAN_FIELDS, READ_BY_RANKS, select
from lightning_ipu_bert.pipeline.ipu.file import read_values
from lightning_ipu_bert.pipeline.rules import enforce, nearest

P = ParamSpec("P")
S = TypeVar("S")


def suggest_names(init: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """Suggest the nearest argument for a misspelled one, as Python 3.13 does itself.

    The signature of the constructor is preserved for `--help` and editors.
    """
    known = list(inspect.signature(init).parameters)[1:]

    @wraps(init)
    def checked(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} has no argument {name!r}. "
                    f"Did you mean {nearest(name, known)!r}?"
                )
        init(self, *args, **kwargs)

    return checked


def plan_fields(arguments: Mapping[str, object], names: Iterable[str]) -> Dict[str, object]:
    """Return the fields of the plan from the arguments of a constructor."""
    return {name: arguments[name] for name in names}


def pipeline_config(
    given: Mapping[str, Any],
    ipu_config: Union[str, Mapping[str, object], None],
    pod_type: Optional[str],
) -> Tuple[PipelineConfig, List[str]]:
    """Return the configuration of a pipeline of ranks, and the names of ignored fields.

    Args:
        given: Fields of `PipelineConfig`; those that are None are taken from `ipu_config`.
        ipu_config: As for `IPUStrategy`.
        pod_type: Selects from values by pod type.

    Raises:
        UserError: If a field is unknown or a value is invalid.
    """
    values = read_values(ipu_config)
    fields = IPUConfig.from_dict(values, pod_type, plan_fields(given, PLAN_FIELDS))
    written = select(values, vars(fields), pod_type)
    merged = {name: value for name, value in given.items() if value is not None}
    for graphcore_name, name in READ_BY_RANKS.items():
        if graphcore_name in written:
            merged[name] = fields.plan_fields()[name]
    config = PipelineConfig(**merged)
    enforce(config.value_rules())
    return config, [name for name in written if name not in READ_BY_RANKS]
