"""Output of a run on IPUs before it starts."""

from __future__ import annotations

from typing import Dict, Iterator, Mapping, Optional, Tuple

from lightning_ipu_bert.pipeline.ipu.config import IPUConfig
from lightning_ipu_bert.pipeline.ipu.fields import SPELLINGS, WITHOUT_EFFECT, select
from lightning_ipu_bert.pipeline.plan import Plan


def plan_lines(config: IPUConfig, plan: Plan, overridden: Mapping[str, object]) -> Iterator[str]:
    """Yield overridden and ignored fields, and the table "Device Allocation".

    Args:
        config: The configuration.
        plan: The plan of the run.
        overridden: Values that override an IPU config, by name.
    """
    for name, value in overridden.items():
        yield f"Overriding IPU config: {name}={value}"
    for field, reason in ignored_fields(config):
        yield f"IPU config: {field} has no effect: {reason}."
    yield from plan.lines()


def overridden_fields(
    given: Mapping[str, object], values: Mapping[str, object], pod_type: Optional[str]
) -> Dict[str, object]:
    """Return the arguments that differ from the values of an IPU config."""
    written = select(values, vars(IPUConfig()), pod_type)
    return {
        name: value
        for name, value in given.items()
        if value is not None and written.get(SPELLINGS.get(name, name), value) != value
    }


def ignored_fields(config: IPUConfig) -> Iterator[Tuple[str, str]]:
    """Yield the fields that are set and have no effect, with the reason."""
    defaults = vars(IPUConfig())
    for name, reason in WITHOUT_EFFECT.items():
        value = vars(config)[name]
        if value != defaults[name] and repr(value) != "1":  # a serialization factor of 1 is none
            yield f"{name}={value!r}", reason
