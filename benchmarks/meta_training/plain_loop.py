"""Meta-training as public PyTorch reproductions write it.

One task after the other; at every inner step, one call of the learned optimizer's `nn.LSTMCell`s for each parameter
tensor; the graph of the whole truncation is kept and differentiated once at its end. Inner gradients are detached,
or not where the meta-gradient is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.meta_training.workloads import SpeedWorkload
from learned_opt.rules.lstm import LSTMRuleConfig
from learned_opt.task import Tensors, draw_task, task_seed

Memory = dict[str, Any]


class PlainOptimizer(nn.Module):
    """The learned optimizer as a module: cells, and a linear read-out."""

    def __init__(self, config: LSTMRuleConfig) -> None:
        super().__init__()
        if config.inputs != "normalized" or config.dense_units or not config.output_tanh:
            raise ValueError("the plain loop has normalized inputs, no dense layer and a tanh output")
        self.config = config
        sizes = [2] + [config.hidden_size] * (config.num_layers - 1)
        self.cells = nn.ModuleList(nn.LSTMCell(size, config.hidden_size) for size in sizes)
        self.output = nn.Linear(config.hidden_size, 1)

    def load_theta(self, theta: Tensors) -> None:
        """Take over an `LSTMRule`'s theta; a cell has its gates in another order and its bias twice."""
        with torch.no_grad():
            for i, cell in enumerate(self.cells):
                weight, bias = (_reorder(theta[f"lstm.{i}.{name}"]) for name in ("weight", "bias"))
                cell.weight_ih.copy_(weight[:, : cell.input_size])
                cell.weight_hh.copy_(weight[:, cell.input_size :])
                cell.bias_ih.copy_(bias)
                cell.bias_hh.zero_()
            self.output.weight.copy_(theta["output.weight"])
            self.output.bias.copy_(theta["output.bias"])

    def theta_grads(self) -> Tensors:
        """The accumulated gradient, in the form of an `LSTMRule`'s theta."""
        grads: Tensors = {}
        for i, cell in enumerate(self.cells):
            grads[f"lstm.{i}.weight"] = _reorder(torch.cat([cell.weight_ih.grad, cell.weight_hh.grad], 1))
            grads[f"lstm.{i}.bias"] = _reorder(cell.bias_ih.grad)
        return {**grads, "output.weight": self.output.weight.grad, "output.bias": self.output.bias.grad}

    def start(self, params: torch.Tensor) -> Memory:
        """The memory of one parameter tensor."""
        zeros = params.new_zeros(params.numel(), 1)
        states = [(zeros.new_zeros(len(zeros), self.config.hidden_size),) * 2 for _ in self.cells]
        return {"m": zeros, "v": zeros, "step": 0, "states": states}

    def forward(self, grads: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """The update of one parameter tensor, and its new memory."""
        beta, column, step = self.config.beta, grads.reshape(-1, 1), memory["step"] + 1
        m = beta * memory["m"] + (1 - beta) * column
        v = beta * memory["v"] + (1 - beta) * column * column
        correction = 1 - beta**step
        active = v > 0
        root = torch.where(active, v / correction, 1.0).sqrt() + self.config.eps
        x, states = torch.cat([column / root, m / correction / root], 1), []
        for cell, state in zip(self.cells, memory["states"]):
            states.append(cell(x, state))
            x = states[-1][0]
        update = torch.where(active, self.config.output_scale * self.output(x).tanh(), 0.0)
        return update.view_as(grads), {"m": m, "v": v, "step": step, "states": states}


def _reorder(rows: torch.Tensor) -> torch.Tensor:
    """Swap the last two of four blocks of rows: (input, forget, output, candidate) and a cell's order, either way."""
    i, f, third, fourth = rows.chunk(4)
    return torch.cat([i, f, fourth, third])


class PlainTask:
    """One task under way: its parameters, their gradients, and the optimizer's memory of each."""

    def __init__(self, loop: PlainLoop, constants: Tensors, params: Tensors, rows: torch.Tensor) -> None:
        self.constants = {**constants, **loop.shared}
        self.params = {n: v.clone().requires_grad_() for n, v in params.items()}
        self.memory = {n: loop.optimizer.start(v) for n, v in params.items()}
        loss = loop.family.loss(self.params, self.constants, {"rows": rows})
        self.initial = float(loss.detach())
        self.grads = dict(zip(self.params, torch.autograd.grad(loss, list(self.params.values()))))

    def detach(self) -> None:
        """Cut the graph: the end of a truncation."""
        self.params = {n: v.detach().requires_grad_() for n, v in self.params.items()}
        self.grads = {n: v.detach() for n, v in self.grads.items()}
        for memory in self.memory.values():
            memory["m"], memory["v"] = memory["m"].detach(), memory["v"].detach()
            memory["states"] = [(h.detach(), c.detach()) for h, c in memory["states"]]


class PlainLoop:
    """One meta-training run.

    Args:
        workload: what to train.
        theta: initial meta-parameters.
        seed: of tasks, batches and perturbations.
    """

    def __init__(self, workload: SpeedWorkload, theta: Tensors, seed: int = 0) -> None:
        self.workload, self.family, self.trainer = workload, workload.family, workload.settings.trainer
        self.shared = self.family.shared_data()
        self.optimizer = PlainOptimizer(workload.rule.config)
        self.optimizer.load_theta(theta)
        self.meta_optimizer = torch.optim.Adam(self.optimizer.parameters(), lr=self.trainer.learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_done = 0
        self.tasks: list[list[PlainTask]] = [[] for _ in range(workload.num_particles)]
        self.seen = [[torch.zeros_like(p) for p in self.optimizer.parameters()] for _ in self.tasks]

    def step(self) -> int:
        """One truncation of one task (of one pair's two arms), and an update of theta after the last task."""
        count, work = len(self.tasks), self.workload
        outer, index = divmod(self.num_done, count)
        if outer % work.episode == 0:
            constants, params = draw_task(self.family, "meta_train", task_seed("meta_train", outer, index))
            rows = self.family.sample_batches(constants, 1, self.generator).get("rows", torch.zeros(1))[0]
            arms = 2 if work.pairs else 1
            self.tasks[index] = [PlainTask(self, constants, params, rows) for _ in range(arms)]
            self.seen[index] = [torch.zeros_like(p) for p in self.optimizer.parameters()]
        batches = self.family.sample_batches(self.tasks[index][0].constants, work.truncation, self.generator)
        rows = batches.get("rows", torch.zeros(work.truncation))
        if work.pairs:
            sigma = work.settings.estimator_settings["sigma"]
            noise = [torch.randn(p.shape, generator=self.generator) * sigma for p in self.optimizer.parameters()]
            self.pair(index, noise, rows)
        else:
            self.truncation(self.tasks[index][0], rows).backward()
            self.tasks[index][0].detach()
        self.num_done += 1
        if index == count - 1:
            nn.utils.clip_grad_norm_(self.optimizer.parameters(), self.trainer.clip_norm)
            self.meta_optimizer.step()
            self.meta_optimizer.zero_grad()
        return work.truncation

    def truncation(self, task: PlainTask, rows: torch.Tensor) -> torch.Tensor:
        """The task's share of the meta-loss, with the graph of all its steps."""
        total, meta, exact = torch.zeros(()), self.trainer.meta_loss, self.workload.exact
        for batch in rows:
            updates = {}
            for name, grads in task.grads.items():
                updates[name], task.memory[name] = self.optimizer(grads, task.memory[name])
            task.params = {n: v + updates[n] for n, v in task.params.items()}
            if not torch.is_grad_enabled():
                task.params = {n: v.requires_grad_() for n, v in task.params.items()}
            with torch.enable_grad():
                loss = self.family.loss(task.params, task.constants, {"rows": batch})
                inputs = list(task.params.values())
                grads = torch.autograd.grad(loss, inputs, retain_graph=True, create_graph=exact)
            task.grads = dict(zip(task.params, grads))
            ratio = (loss / task.initial).clamp(meta.floor, meta.clip)
            total = total + ratio.log() / (self.workload.truncation * self.workload.num_particles)
        return total

    @torch.no_grad()
    def pair(self, index: int, noise: list[torch.Tensor], rows: torch.Tensor) -> None:
        """Run both arms of a pair and add its share of the PES meta-gradient."""
        weights = list(self.optimizer.parameters())
        values = []
        for task, sign in zip(self.tasks[index], (1.0, -1.0)):
            for weight, change in zip(weights, noise):
                weight.add_(change, alpha=sign)
            values.append(float(self.truncation(task, rows)))
            task.detach()
            for weight, change in zip(weights, noise):
                weight.sub_(change, alpha=sign)
        sigma = self.workload.settings.estimator_settings["sigma"]
        difference = (values[0] - values[1]) / (2 * sigma**2)
        for weight, seen, change in zip(weights, self.seen[index], noise):
            seen.add_(change)
            share = seen * difference
            weight.grad = share if weight.grad is None else weight.grad + share
