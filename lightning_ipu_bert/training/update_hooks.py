"""Hooks between the closure and the update of an optimizer."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Tuple

from torch.optim import Optimizer

Arguments = Tuple[Tuple[object, ...], Dict[str, object]]


def around_update(
    optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Call functions immediately before and after the updates of an optimizer.

    Lightning runs training step, backward, hooks and clipping in the closure passed to
    `Optimizer.step`. `before` is called after the closure, so that its changes affect only the
    update. The closure is called once: optimizers that call it repeatedly are not supported.

    Args:
        optimizer: Receives a step pre-hook and a step post-hook.
        before: E.g. replaces the parameters of the optimizer.
        after: E.g. restores them.

    Returns:
        A function that removes the hooks.
    """

    def before_step(
        _: Optimizer, args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Optional[Arguments]:
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if closure is None:  # already called by a GradScaler
            before()
            return None
        result = closure()
        before()
        return args[:1], {**kwargs, "closure": lambda: result}

    def after_step(*_: Any) -> None:
        after()

    handles = (
        optimizer.register_step_pre_hook(before_step),
        optimizer.register_step_post_hook(after_step),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove
