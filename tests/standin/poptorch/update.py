"""The update of the weights, as PopART compiles it; state by PopART's names.

Source: PopART, patterns/adamdecompose.cpp, adamupdater, lamb; sgd2decompose.cpp.
"""

import torch

ADAM_FAMILY = ("Adam", "AdamW", "LAMB")


def initial_state(kind, optimizer, weights):
    """Zeros of every weight that is trained."""
    state = {}
    for name, weight in weights.items():
        if kind in ADAM_FAMILY:
            first, second = (  # torch's own optimizers have none
                getattr(optimizer, f"{which}_order_momentum_accum_type", torch.float32)
                for which in ("first", "second")
            )
            state[f"Accl1___{name}"] = torch.zeros(weight.shape, dtype=first)
            state[f"Accl2___{name}"] = torch.zeros(weight.shape, dtype=second)
            state[f"Step___{name}"] = torch.zeros((), dtype=torch.float32)
        elif kind == "SGD" and optimizer.param_groups[0]["momentum"]:
            state[f"Accl1___{name}"] = torch.zeros(weight.shape, dtype=torch.float32)
    return state


def clipped(gradients, limit):
    """Scale gradients down to a global norm."""
    if limit == float("inf"):
        return gradients
    norm = torch.stack([g.float().square().sum() for g in gradients.values()]).sum().sqrt()
    factor = limit / max(limit, float(norm))
    return {name: g * factor for name, g in gradients.items()}


def update(kind, numbers, weight, gradient, state, name, loss_scaling=1.0):
    """Change one weight and its state in place. SGD's velocity is kept times the loss scaling."""
    value = {k: v for k, (v, _) in numbers.items()}
    gradient, w = gradient.float(), weight.float()
    if kind in ADAM_FAMILY:
        if kind == "Adam":
            gradient = gradient + value["weight_decay"] * w
        step = _adam(value, gradient, state, name)
        if kind != "Adam":
            step = step + value["weight_decay"] * w
        if kind == "LAMB":
            trust = min(float(w.norm()), value["max_weight_norm"]) / max(float(step.norm()), 1e-12)
            step = step * (trust if float(w.norm()) > 0 else 1.0)
    else:
        assert kind == "SGD"
        step = gradient + value["weight_decay"] * w
        if f"Accl1___{name}" in state:
            velocity = state[f"Accl1___{name}"]
            fresh = step * (1 - value["dampening"]) * loss_scaling
            velocity.mul_(value["momentum"]).add_(fresh)
            step = velocity / loss_scaling
    weight.copy_(w - value["lr"] * step)


def _adam(value, gradient, state, name):
    b1, b2 = value["betas"]
    first, second = state[f"Accl1___{name}"], state[f"Accl2___{name}"]
    count = state[f"Step___{name}"].add_(1)
    first.copy_(b1 * first.float() + (1 - b1) * gradient)
    second.copy_(b2 * second.float() + (1 - b2) * gradient.square())
    unbiased = second.float() / (1 - b2 ** float(count))
    return first.float() / (1 - b1 ** float(count)) / (unbiased.sqrt() + value["eps"])
