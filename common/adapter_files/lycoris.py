"""What a layer's tensors in a kohya or LyCORIS file say: the change of its weight as one pair of matrices.

The formulas are those of https://github.com/KohakuBlueleaf/LyCORIS (lycoris/functional). A change of a weight W [N, K],
for a convolution K = channels x height x width, is s U D with U [N, R], D [R, K] and a scale s. Kronecker and Hadamard
products of such pairs are pairs again. So every algorithm is exactly a LoRA of some rank R: it loads, scales, mixes and
merges as one.
"""

from typing import NamedTuple

import torch


class Pair(NamedTuple):
    """The change s U D of a weight, see above."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float = 1.0

    def product(self) -> torch.Tensor:
        """The change itself, [N, K], fp32."""
        return self.scale * (self.up.float() @ self.down.float())


def read_pair(tensors: dict, alpha: float | None) -> Pair | None:
    """The change that {kind: tensor} of one layer means; None when they are not exactly those of an algorithm.

    `alpha` is the layer's, None where the file has none: then the scale is 1. Linear layers and convolutions alike.
    """
    read = _ALGORITHMS.get(frozenset(tensors))
    if read is None:
        return None
    try:
        (up, down), rank = read(tensors)
    except RuntimeError:  # their shapes do not go together
        return None
    return Pair(up, down.flatten(1), 1.0 if alpha is None or rank is None else alpha / rank)


def smallest(pair: Pair, weight: torch.Tensor, identities: dict) -> Pair:
    """The same change, as `full_rank` where that is fewer numbers than a pair of high rank."""
    (n, rank), k = pair.up.shape, pair.down.shape[1]
    return pair if rank * (n + k) <= n * k else full_rank(pair.product(), weight, identities)


def full_rank(change: torch.Tensor, weight: torch.Tensor, identities: dict) -> Pair:
    """Any change [N, K] as a pair: itself, and an identity on its shorter side.

    In the dtype and on the device of `weight`.
    `identities` {size: matrix} is filled: layers share them, or they would take as much memory as the changes do.
    """
    size = min(change.shape)
    if size not in identities:
        identities[size] = torch.eye(size, dtype=weight.dtype, device=weight.device)
    change = change.to(weight)
    return Pair(identities[size], change) if len(change) == size else Pair(change, identities[size])


def column_dora(weight: torch.Tensor, pair: Pair, dora_scale: torch.Tensor) -> torch.Tensor:
    """What a DoRA over input columns changes, [N, K]: (W + d) dora_scale / ||W + d|| - W, norms over columns.

    lycoris/modules/locon.py with wd_on_output off; ComfyUI's weight_decompose does the same. `dora_scale` is
    [1, channels], with more axes of 1 for a convolution.
    """
    weight = weight.detach().float()
    merged = weight + pair.product().to(weight).view(weight.shape)
    norms = merged.transpose(0, 1).flatten(1).norm(dim=1)
    gains = (dora_scale.to(weight).flatten() / norms).view(1, -1, *[1] * (weight.dim() - 2))
    return (merged * gains - weight).flatten(1)


# One function per algorithm: {kind: tensor} -> ((U, D), rank that divides alpha).


def _lora(t):
    """U D; a mid [R, R, height, width] is Tucker's core between them (LoCon, lora_mid)."""
    up, down = t["lora_up.weight"].flatten(1), t["lora_down.weight"]
    if "lora_mid.weight" in t:
        up, down = up.float(), _around(t["lora_mid.weight"], down.flatten(1))
    return (up, down), up.shape[1]


def _loha(t):
    """(w1_a w1_b) o (w2_a w2_b), element by element: of two sums of R outer products a sum of R x R."""
    up1, down1 = _factor(t, "hada_w1", "hada_t1")
    up2, down2 = _factor(t, "hada_w2", "hada_t2")
    up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
    down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
    return (up, down), len(t["hada_w1_b"])


def _lokr(t):
    """kron(w1, w2). alpha counts only where a factor is decomposed; of two ranks w2's divides it, as in ComfyUI."""
    up1, down1 = _factor(t, "lokr_w1")
    up2, down2 = _factor(t, "lokr_w2", "lokr_t2")
    rank = next((len(t[kind]) for kind in ("lokr_w2_b", "lokr_w1_b") if kind in t), None)
    return (torch.kron(up1, up2), torch.kron(down1, down2)), rank


def _factor(t, name, core=None):
    """One factor as U [n, r], D [r, k]: whole beside an identity, or w_a w_b, or w_a and w_b around a Tucker core."""
    if name in t:
        whole = t[name].float().flatten(1)
        return full_rank(whole, whole, {})[:2]
    a, b = t[f"{name}_a"].float(), t[f"{name}_b"].float()
    return (a.t().contiguous(), _around(t[core], b)) if core in t else (a, b.flatten(1))


def _around(core, b):
    """A Tucker core [R, R, height, width] times b [R, channels] -> [R, channels x height x width]."""
    return torch.einsum("ijhw,jk->ikhw", core.float(), b.float()).flatten(1).contiguous()


def _decomposed(name, core=None):
    return [f"{name}_a", f"{name}_b", *([core] if core else [])]


_LORA = ["lora_up.weight", "lora_down.weight"]
_ALGORITHMS = {
    frozenset(_LORA): _lora,
    frozenset([*_LORA, "lora_mid.weight"]): _lora,
    frozenset(_decomposed("hada_w1") + _decomposed("hada_w2")): _loha,
    frozenset(_decomposed("hada_w1", "hada_t1") + _decomposed("hada_w2", "hada_t2")): _loha,
    **{
        frozenset(w1 + w2): _lokr
        for w1 in (["lokr_w1"], _decomposed("lokr_w1"))
        for w2 in (["lokr_w2"], _decomposed("lokr_w2"), _decomposed("lokr_w2", "lokr_t2"))
    },
}
KINDS = frozenset().union(*_ALGORITHMS)
