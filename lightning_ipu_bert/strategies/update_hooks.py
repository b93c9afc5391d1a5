"""What happens between an optimizer's closure and its update."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Tuple

from torch.optim import Optimizer

Arguments = Tuple[Tuple[Any, ...], Dict[str, Any]]


def around_update(
    optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Call functions right before and after an optimizer's updates.

    Lightning runs training step, backward, hooks and clipping in the closure that it gives to
    `Optimizer.step`. `before` is called after them, so that only the update itself sees what it
    changes. The closure is called once: optimizers that call it several times are not supported.

    Args:
        optimizer: Gets hooks by `register_step_pre_hook` and `register_step_post_hook`.
        before: E.g. gives other parameters to the optimizer.
        after: E.g. takes them back.

    Returns:
        A function that removes the hooks.
    """

    def before_step(
        _: Optimizer, args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Optional[Arguments]:
        closure = kwargs.get("closure") or next(iter(args[1:]), None)
        if closure is None:  # a GradScaler has called it
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
