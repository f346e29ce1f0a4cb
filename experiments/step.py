"""One training step, on a GPU as a CUDA graph.

A step of a small model is hundreds of short kernels, and launching them one by one takes longer than running them. A
graph launches them all at once. The first steps run as they are, which compiles kernels and fills the optimiser's
state; then one is recorded; all later ones are replayed with new data in the recorded inputs.

The blocks of the model are compiled, which fuses what lies between matrix products and attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.models.blocks import Block
from experiments.tasks import Batch, Task

#: Steps that run as they are before one is recorded.
EAGER_STEPS = 4


class TrainStep:
    """Forward, backward, clipping, update.

    Args:
        task: gives the loss.
        model: in training mode wherever this is called.
        optimiser: on a GPU with ``capturable`` and a tensor as learning rate.
        clip: norm of the gradient at most.
        precision: "bfloat16" for autocast, or "float32".
        graph: records a CUDA graph; only on a GPU, for batches of one shape.
        compiled: compiles the blocks; only on a GPU.
        keep_compiled: uses code that is compiled already, of a model that differs in nothing but numbers.

    Attributes:
        graph_state: "off", "recorded", or why recording failed, for the result.
        compile_state: "off", "compiled", or why it failed, likewise.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        clip: float,
        precision: str,
        *,
        graph: bool,
        compiled: bool,
        keep_compiled: bool = False,
    ) -> None:
        self.task, self.model, self.optimiser, self.clip = task, model, optimiser, clip
        self.device = next(model.parameters()).device
        self.bfloat16 = precision == "bfloat16"
        on_gpu = self.device.type == "cuda"
        self.wanted = graph and on_gpu
        self.graph_state = self.compile_state = "off"
        if compiled and on_gpu:
            self.compile_blocks(keep_compiled)
        self._done = 0
        self._side: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._loss: Tensor | None = None

    def autocast(self) -> torch.autocast:
        """What forward passes run under."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)

    def compile_blocks(self, keep: bool = False) -> None:
        """Compiles every block; they are alike, so that one compilation serves all: with ``keep`` an earlier one."""
        if not keep:
            torch._dynamo.reset()  # models of earlier runs in this process count against the limit of recompilations
        for module in self.model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)
        self.compile_state = "compiled"

    def __call__(self, batch: Batch) -> Tensor:
        """One step; returns the loss."""
        if not self._done and self.compile_state == "compiled":
            self._try_compiled(batch)
        if self.wanted and self._done == EAGER_STEPS:
            self._record(batch)
        self._done += 1
        if self._graph is not None:
            return self._replay(batch)
        if not self.wanted:
            return self._run(batch)
        if self._side is None:  # recording wants what came before on a stream of its own
            self._side = torch.cuda.Stream()
        side = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = self._run(batch)
        torch.cuda.current_stream().wait_stream(side)
        return loss

    def _try_compiled(self, batch: Batch) -> None:
        """Forward and backward without an update; where compiling fails, blocks run as they are and the result says so.

        The random state is as before afterwards.
        """
        before = torch.get_rng_state(), torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        try:
            with self.autocast():
                loss = self.task.loss(self.model, batch)
            loss.backward()
        except Exception as error:  # whatever the compiler raises
            self.compile_state = f"failed: {error}"[:300]
            print(f"blocks are not compiled: {error}", flush=True)
            for module in self.model.modules():
                module._compiled_call_impl = None
        self.optimiser.zero_grad(set_to_none=True)
        torch.set_rng_state(before[0])
        if before[1] is not None:
            torch.cuda.set_rng_state(before[1])

    def _run(self, batch: Batch) -> Tensor:
        with self.autocast():
            loss = self.task.loss(self.model, batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimiser.step()
        return loss.detach()

    def _record(self, batch: Batch) -> None:
        """Records a step without running it; where that fails, steps go on as before and the result says why.

        On this step's own stream: matrix products get their working memory by stream, and torch's default one for
        recordings would give the same to all that are replayed at once.
        """
        padding = None if batch.padding is None else batch.padding.clone()
        static = Batch(batch.inputs.clone(), batch.targets.clone(), padding)
        self.optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                loss = self._run(static)
        except RuntimeError as error:
            self.wanted = False
            self.graph_state = f"failed: {error}"[:300]
            print(f"steps are not recorded as a CUDA graph: {error}", flush=True)
            return
        self._graph, self._batch, self._loss, self.graph_state = graph, static, loss, "recorded"

    def _replay(self, batch: Batch) -> Tensor:
        assert self._graph is not None
        assert self._batch is not None
        assert self._loss is not None
        self._batch.inputs.copy_(batch.inputs)
        self._batch.targets.copy_(batch.targets)
        if self._batch.padding is not None and batch.padding is not None:
            self._batch.padding.copy_(batch.padding)
        self._graph.replay()
        return self._loss.clone()
