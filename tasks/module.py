"""Tasks of your own: any `torch.nn.Module`, a loss, and data grouped by a column or sampled by a function.

The module runs through `torch.func.functional_call`, so many copies of it with parameters of their own run as one
batched program. That asks two things of it: the same outputs for the same inputs (no dropout), and nothing changed in
place (batch normalization in train mode takes the statistics of the rows at hand instead). Both are checked when the
family is made. Tasks of a module that branches on the values of tensors run one by one instead.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.parameter import UninitializedParameter

from learned_opt.task import TaskFamily, Tensors, check_split, draw_batches, draw_task, stack
from tasks.batch_statistics import COUNTS, RowStatistics, use_row_statistics
from tasks.data.grouped import GroupedData, as_tensor
from tasks.data.rows import RowRange, draw_rows, num_held_out
from tasks.supervised import check_judge

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SampleFunction = Callable[[str, torch.Generator], tuple[Any, Any]]

_CONSTANT = "constant:"
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class ModuleFamily(TaskFamily):
    """Tasks that train copies of a module, each on data of its own.

    Args:
        module: a module, or a function without arguments that makes one with fresh weights. The module's own mode
            (train or eval) is kept, and parameters with requires_grad=False stay as they are in all tasks, like
            buffers.
        loss: (outputs, targets) to a scalar, the mean over the rows, such as `torch.nn.functional.mse_loss`.
        data: `GroupedData`, one task per group, groups dealt out disjointly to meta-train, meta-validation and
            meta-test; or a function (split, generator) to (inputs [rows, …], targets [rows, …]) that samples a task's
            data, the same shapes each time.
        batch_size: rows per mini-batch, drawn with replacement from the task's training rows; at least 1.
        init: "reset" draws new initial parameters for every task, by the `reset_parameters` methods of the module's
            layers or by calling the function that makes it; "module" starts every task from the weights of the given
            module.
        test_share: of sampled data, the share of the rows to hold out (the last ones), strictly between 0 and 1.
            Grouped data has its own.
        judge: which rows the meta-loss is of: "support", those that the task trains on, or "query", those held out of
            it, for an optimizer that is to lower the loss on rows never trained on. Inner gradients are of training
            rows either way.

    Raises:
        ValueError: whatever does not fit together: a loss that is not a scalar, targets of the wrong type or shape, a
            module with dropout or other randomness. The message names the remedy.
    """

    name: ClassVar[str] = "module"

    def __init__(
        self,
        module: nn.Module | Callable[[], nn.Module],
        loss: LossFunction,
        data: GroupedData | SampleFunction,
        *,
        batch_size: int = 32,
        init: str = "reset",
        test_share: float = 0.25,
        judge: str = "support",
    ) -> None:
        check_judge(judge)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if init not in ("reset", "module"):
            raise ValueError(f"init must be reset or module; got {init!r}")
        if not 0 < test_share < 1:
            raise ValueError(f"test_share must lie strictly between 0 and 1; got {test_share}")
        if not isinstance(data, GroupedData) and not callable(data):
            raise ValueError(
                "data must be a GroupedData or a function (split, generator) -> (inputs, targets); got "
                f"{type(data).__name__}. Wrap arrays as GroupedData(inputs, targets, groups) and tables by "
                "GroupedData.from_frame(frame, group=…, target=…)"
            )
        if not callable(loss) or isinstance(loss, type):
            raise ValueError(
                f"loss must be a function (outputs, targets) -> scalar, such as F.mse_loss or nn.MSELoss(); got "
                f"{loss!r}"
            )
        self.batch_size, self.init, self.test_share, self.judge = batch_size, init, test_share, judge
        self._data, self._loss = data, loss
        self._loss_branches = False
        self._make = None if isinstance(module, nn.Module) else module
        # A copy: replacing batch normalization and re-drawing parameters must not touch the caller's module.
        self._module = copy.deepcopy(module) if isinstance(module, nn.Module) else _make_module(module, 0)
        lazy = [n for n, p in self._module.named_parameters() if isinstance(p, UninitializedParameter)]
        if lazy:
            raise ValueError(
                f"module has a parameter of unknown shape, {lazy[0]!r}; give its layer its number of inputs, as "
                "nn.Linear asks for"
            )
        self._module = self._module.to("cpu", torch.float32)
        _check_layers(self._module)
        self._start = {n: p.detach().clone() for n, p in self._module.named_parameters() if p.requires_grad}
        if not self._start:
            raise ValueError("module must have at least one parameter with requires_grad=True; it has none")
        self._module, mixes_rows = use_row_statistics(self._module)
        if mixes_rows:
            self._check_batch_statistics()
        self._row_counts = {
            f"{n}.{COUNTS}".lstrip(".") for n, m in self._module.named_modules() if isinstance(m, RowStatistics)
        }
        frozen = [(n, p) for n, p in self._module.named_parameters() if not p.requires_grad]
        self._constants = {n: t.detach().clone() for n, t in [*self._module.named_buffers(), *frozen]}
        if init == "reset":
            self._check_redraw()
        self._probe()

    def shared_data(self) -> Tensors:
        constants = {_CONSTANT + name: value for name, value in self._constants.items()}
        if isinstance(self._data, GroupedData):
            return {"inputs": self._data.inputs, "targets": self._data.targets, **constants}
        return constants

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        if isinstance(self._data, GroupedData):
            ranges = self._data.ranges[check_split(split)]
            chosen = ranges[int(torch.randint(len(ranges), (), generator=generator))]
            return {**chosen.as_task(), "num_test": torch.tensor(chosen.num_test)}
        drawn = self._data(check_split(split), generator)
        if not isinstance(drawn, tuple) or len(drawn) != 2:
            raise ValueError(
                f"the function that samples data must return a tuple (inputs, targets); got {type(drawn).__name__}"
            )
        inputs, targets = as_tensor("sampled inputs", drawn[0]), as_tensor("sampled targets", drawn[1])
        num_rows = len(inputs)
        if len(targets) != num_rows or num_rows < 2:
            raise ValueError(
                f"sampled inputs and targets must have the same number of rows, at least 2; got {num_rows} and "
                f"{len(targets)}"
            )
        num_test = num_held_out(num_rows, self.test_share)
        rows = RowRange(0, num_rows - num_test, num_test)
        return {**rows.as_task(), "num_test": torch.tensor(num_test), "inputs": inputs, "targets": targets}

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        if self.init == "module":
            return {name: value.clone() for name, value in self._start.items()}
        return self._redraw(int(torch.randint(2**31, (), generator=generator)))

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        batches = {"rows": draw_rows(task, num_steps, self.batch_size, generator)}
        if self.judge == "query":
            held_out = RowRange(int(task["first_row"] + task["num_rows"]), int(task["num_test"]), 0).as_task()
            batches["query_rows"] = draw_rows(held_out, num_steps, self.batch_size, generator)
        return batches

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        return self._on_rows(params, task, batch["rows"])

    def query_loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor | None:
        return None if self.judge == "support" else self._on_rows(params, task, batch["query_rows"])

    def _on_rows(self, params: Tensors, task: Tensors, rows: torch.Tensor) -> torch.Tensor:
        return self._loss(self.outputs(params, task, task["inputs"][rows]), task["targets"][rows])

    def outputs(
        self, params: Tensors, task: Tensors, inputs: torch.Tensor, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the module says to inputs [rows, …]; where `counts` [rows] is 0, batch normalization ignores a row."""
        constants = {name: task[_CONSTANT + name] for name in self._constants}
        if counts is not None:
            constants |= {name: counts for name in constants if name in self._row_counts}
        return functional_call(self._module, {**params, **constants}, (inputs,))

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """The "test_loss", and for class scores and integer targets the "test_accuracy", of the held-out rows.

        Both are means over rows, each row's loss taken by itself. Groups hold out different numbers of rows and are
        evaluated together, so short ones are padded with rows of their own that do not count, neither in the means nor
        in the statistics of batch normalization.
        """
        sampled_test = num_held_out(len(task["inputs"]), self.test_share)
        most = self._data.most_test if isinstance(self._data, GroupedData) else sampled_test
        index = torch.arange(most, device=task["num_test"].device)
        rows = task["first_row"] + task["num_rows"] + index % task["num_test"]
        counts = index < task["num_test"]
        targets = task["targets"][rows]
        outputs = self.outputs(params, task, task["inputs"][rows], counts.to(next(iter(params.values())).dtype))
        losses = self._row_losses(outputs, targets)

        def mean(values: torch.Tensor) -> torch.Tensor:
            return torch.where(counts, values, 0.0).sum() / task["num_test"]

        metrics = {"test_loss": mean(losses)}
        if not targets.is_floating_point() and outputs.dim() == targets.dim() + 1:
            right = (outputs.argmax(1) == targets).to(outputs.dtype)
            metrics["test_accuracy"] = mean(right.reshape(most, -1).mean(1))
        return metrics

    def _row_losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self._loss_branches:
            return torch.stack([self._loss(o.unsqueeze(0), t.unsqueeze(0)) for o, t in zip(outputs, targets)])
        return vmap(lambda o, t: self._loss(o.unsqueeze(0), t.unsqueeze(0)))(outputs, targets)

    def config(self) -> dict[str, Any]:
        """What identifies the family in logs and files; a module and a data set cannot be rebuilt from it."""
        text = f"{self._module}"
        config: dict[str, Any] = {
            "module": type(self._module).__name__,
            "module_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
            "loss": getattr(self._loss, "__name__", type(self._loss).__name__),
            "batch_size": self.batch_size,
            "init": self.init,
            "test_share": self.test_share,
            "judge": self.judge,
        }
        if isinstance(self._data, GroupedData):
            digest = hashlib.sha256(self._data.inputs.numpy().tobytes() + self._data.targets.numpy().tobytes())
            config |= {"data_hash": digest.hexdigest()[:16], "num_groups": sum(map(len, self._data.ranges.values()))}
        else:
            config["data"] = getattr(self._data, "__name__", type(self._data).__name__)
        return config

    def _redraw(self, seed: int) -> Tensors:
        if self._make is not None:
            module = _make_module(self._make, seed).to("cpu", torch.float32)
        else:
            module = self._module
            with _seeded(seed):
                # Children first: a parent's reset_parameters may then set what it wants of them.
                for layer in reversed(list(module.modules())):
                    reset = getattr(layer, "reset_parameters", None)
                    if callable(reset):
                        reset()
        return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}

    def _check_batch_statistics(self) -> None:
        ranges = (
            [r for split in self._data.ranges.values() for r in split] if isinstance(self._data, GroupedData) else []
        )
        fewest = min((r.num_test for r in ranges), default=2)
        if fewest < 2 or self.batch_size < 2:
            raise ValueError(
                "module has batch normalization, which here uses the statistics of the rows at hand: batch_size and "
                f"every group's held-out rows must be at least 2; got {self.batch_size} and {fewest}. Raise "
                "batch_size or "
                "test_share, or use nn.LayerNorm"
            )

    def _check_redraw(self) -> None:
        if self._make is None:
            for name, layer in self._module.named_modules():
                own = [n for n, p in layer.named_parameters(recurse=False) if p.requires_grad]
                if own and not hasattr(layer, "reset_parameters"):
                    raise ValueError(
                        f"init='reset' cannot re-draw {own[0]!r} of {name or 'module'!r} ({type(layer).__name__} has "
                        "no "
                        "reset_parameters); give a function that makes the module, or init='module' to start from its "
                        "weights"
                    )
        first, second = self._redraw(1), self._redraw(1)
        if list(first) != list(second) or any(not torch.equal(first[n], second[n]) for n in first):
            raise ValueError(
                "module must make the same weights from the same torch seed; its initialization uses randomness from "
                "elsewhere, "
                "such as numpy.random. Draw it with torch, or use init='module'"
            )

    def _probe(self) -> None:
        """One evaluation as BatchedFamily will make it, with messages that say what is wrong."""
        tasks, params = zip(*(draw_task(self, "meta_train", seed) for seed in (0, 3)))
        shared = self.shared_data()
        batches = [{n: v[0] for n, v in draw_batches(self, task, 0, 0, 1).items()} for task in tasks]
        task, rows = {**tasks[0], **shared}, batches[0]["rows"]
        shapes = [{n: tuple(v.shape) for n, v in t.items()} for t in tasks]
        if shapes[0] != shapes[1]:
            raise ValueError(f"sampled data must have the same shape for every task; got {shapes[0]} and {shapes[1]}")
        self._probe_one(params[0], task, task["inputs"][rows], task["targets"][rows])

        def batched(params: Tensors, task: Tensors, batch: Tensors) -> Any:
            return grad_and_value(lambda p: self.loss(p, {**task, **shared}, batch))(params)

        try:
            vmap(batched)(stack(params), stack(tasks), stack(batches))
        except RuntimeError as refused:
            # `BatchedFamily` will run the tasks one by one, and says so; here only that this can be done.
            state = torch.get_rng_state()
            try:
                batched(params[0], tasks[0], batches[0])
            except RuntimeError as error:
                raise ValueError(
                    f"module or loss can neither be batched by torch.func.vmap ({_first_line(refused)}) nor "
                    f"differentiated by torch.func.grad ({_first_line(error)}); write it in operations of torch alone"
                ) from error
            if not torch.equal(state, torch.get_rng_state()):
                raise ValueError(
                    "module or loss draws random numbers when it runs, but a task's loss must be the same function at "
                    "every evaluation; remove what draws them or call module.eval()"
                ) from refused

    def _probe_one(self, params: Tensors, task: Tensors, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        constants = {name: value.clone() for name, value in self._constants.items()}
        given, wanted = _form(inputs), _form(targets)
        try:
            with torch.no_grad():
                outputs = functional_call(self._module, {**params, **constants}, (inputs,))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            hint = "" if inputs.is_floating_point() else "; layers other than embeddings want floating-point inputs"
            raise ValueError(f"module failed on a batch of inputs, {given}: {_first_line(error)}{hint}") from error
        if not isinstance(outputs, torch.Tensor) or outputs.dim() == 0 or len(outputs) != len(inputs):
            got = _form(outputs) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise ValueError(f"module must return one tensor with one row per row of inputs ({given}); got {got}")
        changed = [n for n, v in constants.items() if not torch.equal(v, self._constants[n])]
        if changed:
            raise ValueError(
                f"module changes its buffer {changed[0]!r} when it runs, which tasks that run together cannot do; "
                "call module.eval(), "
                "or make the layer keep no running statistics"
            )
        floats = targets.is_floating_point() and outputs.is_floating_point()
        if floats and outputs.shape != targets.shape and outputs.numel() == targets.numel():
            raise ValueError(
                f"outputs, {_form(outputs)}, and targets, {wanted}, have equally many numbers in different shapes, "
                "which most losses "
                "would broadcast wrongly; reshape the targets or end the module with nn.Flatten(0)"
            )
        try:
            loss = self._loss(outputs, targets)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"loss failed on outputs, {_form(outputs)}, and targets, {wanted}: {_first_line(error)}. Class losses "
                "want integer "
                "targets, regression and binary losses floating-point ones"
            ) from error
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"loss must return a scalar tensor; got {got}. Reduce it, e.g. with .mean()")
        if not loss.is_floating_point():
            raise ValueError(f"loss must be a floating-point scalar; got {loss.dtype}")
        try:
            self._row_losses(outputs, targets)
        except RuntimeError:  # rows then follow each other, as the tasks will
            self._loss_branches = True


def _check_layers(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        rate = layer.p if isinstance(layer, _DROPOUTS) else getattr(layer, "dropout", 0.0)
        if layer.training and isinstance(rate, (int, float)) and rate > 0:
            raise ValueError(
                f"module has dropout in {name!r} ({type(layer).__name__}, rate {rate}), but a task's loss must be the "
                "same function at "
                "every evaluation; set the rate to 0 or call module.eval()"
            )
        if isinstance(layer, nn.RNNBase):
            raise ValueError(
                f"{type(layer).__name__} in {name!r} cannot be batched by torch.func.vmap; loop over time steps with "
                f"nn.{type(layer).__name__}Cell instead"
            )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Layers draw from torch's global generator: give them this seed, and put the generator back."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _make_module(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    if not callable(make):
        raise ValueError(f"module must be a torch.nn.Module or a function that makes one; got {type(make).__name__}")
    with _seeded(seed):
        try:
            module = make()
        except TypeError as error:
            raise ValueError(
                f"the function that makes the module failed when called without arguments: {_first_line(error)}. Bind "
                "them, for example lambda: Network(3, 4)"
            ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"the function that makes the module must return a torch.nn.Module; got {type(module).__name__}"
        )
    return module


def _form(tensor: torch.Tensor) -> str:
    return f"shape {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
