"""A GPU's name and capability -> why this PyTorch cannot compute on it, or None. Nothing here imports torch."""

import re


def unsupported_card(name: str, capability: tuple[int, int], built_for: list[str]) -> str | None:
    """Why PyTorch cannot compute on a card, and what to do, in one line; None when it can.

    Code for sm_XY runs on cards of the same X and at least that Y. Code for compute_XY runs on every later one
    (CUDA C++ programming guide, application compatibility). Builds for other makers' cards name neither: not judged.

    Args:
        name, capability, built_for: of torch.cuda.get_device_name, get_device_capability and get_arch_list.
    """
    matches = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture) for architecture in built_for]
    codes = [(match[1], (int(match[2]), int(match[3]))) for match in matches if match]
    if not codes or any(_runs(kind, built, capability) for kind, built in codes):
        return None
    oldest = min(built for _, built in codes)
    return (
        f"{name} (sm_{capability[0]}{capability[1]}): this PyTorch has no code for it,"
        f" only for sm_{oldest[0]}{oldest[1]} and other cards; choose another GPU (Kaggle: choose GPU T4 x2)"
    )


def _runs(kind, built, capability):
    return built <= capability if kind == "compute" else built[0] == capability[0] and built[1] <= capability[1]
