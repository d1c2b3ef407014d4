"""Ways to run a decoded step: eagerly, or compiled, which on a GPU is also replayed as a CUDA graph.

All run the same function, whose state lies in buffers at fixed addresses.  One compilation serves all lengths of keys; a graph
serves the steps that read as many keys and predict the same streams.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor

from utils.devices import SYMBOLIC_SIZES

# (model, state, keys [S] that attention reads, streams to predict): advances the state in place.
Step = Callable[[Any, Any, Tensor, tuple[int, ...]], None]

_MULTIPLE = 64  # of the keys that are read: attention kernels want multiples of 8, and each length costs a graph


def eager(step: Step, device: torch.device) -> Step:
    """The function itself."""
    return step


def compiled(step: Step, device: torch.device) -> Step:
    """The function compiled as a whole, at its first call for each choice of streams; on a GPU captured as well."""
    whole = torch.compile(step, fullgraph=True, options=SYMBOLIC_SIZES)

    def run(model: Any, state: Any, keys: Tensor, streams: tuple[int, ...]) -> None:
        torch._dynamo.maybe_mark_dynamic(keys, 0)  # else a second number of keys would be compiled again
        whole(model, state, keys, streams)

    return CapturedSteps(run) if device.type == "cuda" else run


class CapturedSteps:
    """Replays a step as a CUDA graph, one for each length of keys and choice of streams; all draw on one pool of memory.

    Serves one model and one state, whose buffers the graphs know by address.
    """

    def __init__(self, step: Step) -> None:
        self.step, self.pool = step, torch.cuda.graph_pool_handle()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, model: Any, state: Any, keys: Tensor, streams: tuple[int, ...]) -> None:
        """Advance the state by one step."""
        kind = len(keys), streams
        if kind not in self.graphs:  # the first of its kind runs by itself: it compiles, loads kernels and makes workspaces
            self.step(model, state, keys, streams)
            self.graphs[kind] = None
            return
        graph = self.graphs[kind]
        if graph is None:
            graph = self.graphs[kind] = torch.cuda.CUDAGraph()
            # Other threads, those of nccl or of a writer, may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step(model, state, keys, streams)
        graph.replay()


class Mode(NamedTuple):
    """How steps are run."""

    prepare: Callable[[Step, torch.device], Step]
    once: Callable[..., Callable[..., Tensor]]
    """The same for a function that is called once for a batch."""
    exact_on_cpu: bool
    """Whether a CPU reads exactly the keys that are written, because another number of keys costs nothing."""
    packs: bool
    """Whether linear layers may multiply with packed weights; the compiler does not know that operator's layouts."""

    def multiple(self, device: torch.device) -> int:
        """What the number of keys is rounded up to."""
        return 1 if self.exact_on_cpu and device.type == "cpu" else _MULTIPLE


MODES = {"eager": Mode(eager, lambda function: function, exact_on_cpu=True, packs=True),
         "compiled": Mode(compiled, partial(torch.compile, fullgraph=True, options=SYMBOLIC_SIZES), exact_on_cpu=False,
                          packs=False)}


def find_mode(name: str, device: torch.device) -> Mode:
    """A row of MODES by its name, or the better one where that is "auto".

    On a GPU, launching the kernels of a cell takes longer than running them; a CPU spends its time in products anyway.
    """
    return MODES[name if name != "auto" else "compiled" if device.type == "cuda" else "eager"]
