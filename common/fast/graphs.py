"""CUDA graphs: the thousands of kernels of a pass are launched from Python once, and replayed with one call afterwards.

On a Kaggle or Colab CPU an SDXL LoRA step is bound by launching some 40,000 small kernels, not by the GPU.
"""

import functools
from collections.abc import Callable

import torch


@functools.lru_cache
def _side_stream(device):
    """One for the whole process: cuBLAS keeps 32 MiB for every stream that it has ever worked on."""
    return torch.cuda.Stream(device)


class Graphed:
    """A function of named tensors, captured once per set of shapes.

    The first call with new shapes runs the function as it is, which also warms it up; the second captures it; then it
    is replayed. The graphs share their memory, so only one result may be in use at a time.

    Args:
        function: dict of tensors -> tensor. It must not wait for the GPU, and what it reads besides its argument must
            stay in place. What it writes in place (gradients) is written by every call exactly once.
        say: prints the line that explains a fallback.
        has_smaller: whether the caller has something smaller to do when memory runs out during the capture, and wants
            to hear of it; otherwise the function is launched from Python from then on.
    """

    def __init__(
        self,
        function: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        device: torch.device,
        *,
        enabled: bool = True,
        say: Callable[[str], None] = print,
        has_smaller: bool = True,
    ) -> None:
        self.function = function
        self.device = device
        self.say = say
        self.has_smaller = has_smaller
        self.enabled = enabled and device.type == "cuda"
        self._seen = set()
        self._graphs = {}
        self._pool = None

    def __call__(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Copy `tensors` to the device without waiting, and run the function on them.

        Returns:
            its result, valid until the next call.
        """
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        if not self.enabled or shapes not in self._seen:
            self._seen.add(shapes)
            return self._warm_up({name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()})
        if shapes not in self._graphs and not self._capture(shapes, tensors):
            return self(tensors)
        graph, inputs, result = self._graphs[shapes]
        for name, tensor in tensors.items():
            inputs[name].copy_(tensor, non_blocking=True)
        graph.replay()
        return result

    def clear(self) -> None:
        """Give the graphs' memory back; the next calls capture them again."""
        self._seen = set()
        self._graphs = {}
        self._pool = None  # a pool does not outlive its last graph
        if self.enabled:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def _warm_up(self, tensors):
        if not self.enabled:
            return self.function(tensors)
        # cuBLAS and autograd set themselves up per stream. A capture may not: they do it here, beside the main stream.
        side = _side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = self.function(tensors)
        torch.cuda.current_stream().wait_stream(side)
        return result

    def _capture(self, shapes, tensors):
        inputs = {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}  # replays write to them
        graph = torch.cuda.CUDAGraph()

        try:
            # The outer context restores the stream, which a capture that fails at its end does not. The stream is
            # torch's own, not the warm-up's: there the graph would go on using a cuBLAS workspace outside of its pool.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
                result = self.function(inputs)
        except RuntimeError as error:
            # Not every library raises torch's own class
            if self.has_smaller and "out of memory" in str(error).lower():
                raise torch.OutOfMemoryError(str(error)) from error
            self.enabled = False
            self.say(f"no CUDA graph, launching from Python: {str(error).splitlines()[0]}")
            return False

        self._pool = self._pool or graph.pool()
        self._graphs[shapes] = graph, inputs, result
        return True
