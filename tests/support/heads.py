"""Random problems for the heads, with loops that define the right answer."""

import math

import torch
from torch import Tensor

B, T, V, D, K = 2, 4, 11, 5, 3
FORMS = [
    {},
    {"temperature": 0.7},
    {"scale": 0.5, "temperature": 1.3},
    {"softcap": 1.5},
    {"softcap": 2.0, "scale": 1.7, "temperature": 0.6},
]


def problem(dtype=torch.float64, seed=0, v=V, d=D, lead=(B, T), k=K):
    """Random inputs; every token is in its support, at a random slot."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*lead, d, generator=g, dtype=torch.float64)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64)
    bias = torch.randn(v, generator=g, dtype=torch.float64)
    support = torch.rand(*lead, v, generator=g).argsort(-1)[..., :k].contiguous()
    slot = torch.randint(k, lead, generator=g)
    tokens = support.gather(-1, slot.unsqueeze(-1)).squeeze(-1)
    mask = torch.rand(*lead, generator=g) > 0.3
    mask[..., 0] = True
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), tokens, support, mask


def loop_logits(hidden, weight, bias=None, temperature=1.0, scale=1.0, softcap=None) -> list[float]:
    """Logits of one position, one float at a time."""
    out = []
    for v, row in enumerate(weight.tolist()):
        x = sum(a * b for a, b in zip(hidden.tolist(), row, strict=True)) + (
            0.0 if bias is None else float(bias[v])
        )
        x *= scale
        if softcap is not None:
            x = softcap * math.tanh(x / softcap)
        out.append(x / temperature)
    return out


def loop_score(logits: list[float], chosen: int, ids) -> tuple[float, float]:
    """Log-probability of one id and the entropy, under a softmax over some ids."""
    total = sum(math.exp(logits[v]) for v in ids)
    probabilities = [math.exp(logits[v]) / total for v in ids]
    return logits[chosen] - math.log(total), -sum(p * math.log(p) for p in probabilities)


def dense(hidden, weight, bias=None, temperature=1.0, scale=1.0, softcap=None) -> Tensor:
    """Logits [B, T, V] in one piece, for gradients by autograd."""
    x = (torch.einsum("...d,vd->...v", hidden, weight) + (0 if bias is None else bias)) * scale
    return (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature


def low_rank(r=2, v=V, d=D, dtype=torch.float64):
    g = torch.Generator().manual_seed(77)
    return [
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((r, d), (v, r))
    ]
