"""Steps of the LSTM rule that are kept as they are taken, so that the way back need not take them again."""

from __future__ import annotations

import torch

from learned_opt.rules.context import Context
from learned_opt.rules.kernels.native_calls import NETWORK_STATE
from learned_opt.rules.lstm import LSTMRule
from learned_opt.rules.lstm_inplace import LSTMStep
from learned_opt.rules.lstm_tape import give_back, lend
from learned_opt.rules.lstm_torch import WayBack
from learned_opt.task import Tensors


class KeptSteps:
    """Steps of one theta, and one way back over them: all at once (`backward`), or one by one (`vjp`, then `finish`).

    Args:
        rule: the update rule.
        theta: its meta-parameters.
        num_coordinates, num_steps: how many of each there will be.
    """

    def __init__(self, rule: LSTMRule, theta: Tensors, num_coordinates: int, num_steps: int) -> None:
        self._rule, self._theta, self._num_steps = rule, theta, num_steps
        self._tape = tape = lend(rule.network, theta["output.bias"], num_steps, num_coordinates)
        self._step = LSTMStep(rule, theta, tape.num_blocks, tape.width, tape)
        self._way: WayBack | None = None

    def step(
        self, grads: torch.Tensor, params: torch.Tensor, state: Tensors, overwrite: bool, context: Context | None = None
    ) -> tuple[torch.Tensor, Tensors]:
        """One step, as of `inplace.stepper`.

        Only the averages that the inputs are made of are new after every step: the network's own state stays that of
        the beginning, and is new after the last one.
        """
        is_last = len(self._step.active) + 1 == self._num_steps
        after = {
            name: value.clone() if (is_last if name in NETWORK_STATE else not overwrite) else value
            for name, value in state.items()
        }
        update = self._step(grads, after)
        if "step" in after:
            after["step"] += 1
        return update, after

    def leave_out(self, columns: torch.Tensor) -> None:
        """Let coordinates not count on the way back, whatever became of them; their cotangents are to be 0.

        Args:
            columns: a mask [P] of equal stretches of the coordinates, one particle's after the other's.
        """
        self._tape.clear(columns.repeat_interleave(self._tape.num_blocks * self._tape.width // len(columns)))

    def backward(self, loss_grads: torch.Tensor) -> Tensors:
        """`UpdateRule.backward` of the steps that were taken, from loss_grads [steps, n]."""
        active = torch.stack(self._step.active).flatten(1)
        total = self._rule.backward_over(self._theta, self._tape, active, loss_grads)
        self.give_back()
        return total

    def vjp(
        self, index: int, grads: torch.Tensor, state: Tensors, d_update: torch.Tensor, d_state: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """`UpdateRule.vjp` of one step, the last one first; what theta gets adds up until `finish`.

        Args:
            index: which step: the last one, then one less every time.
            grads, state: what it was given; of the state, the averages are read.
            d_update, d_state: cotangents. Of the network's own state those after the last step are read, and those
                before the first are returned; in between they stay here.

        Returns:
            (Derivatives with respect to the gradients, and to the state.)
        """
        if self._way is None:
            self._way = WayBack(self._theta, self._tape, wants_inputs=True)
            self._way.begin(d_state["hidden"], d_state["cell"])
        _, active, pull = self._rule.pullable_rows(grads, state)
        with torch.no_grad():
            d_rows = self._way.step(index, self._rule.d_readouts(self._tape.readouts[index], d_update, active))
        assert d_rows is not None
        d_grads, d_averages = pull(d_rows, d_state)
        d_before = {**d_state, **d_averages}
        if index == 0:
            d_before["hidden"], d_before["cell"] = self._way.end()
        return d_grads, d_before

    def finish(self) -> Tensors:
        """What theta gets from all steps, after `vjp` of each."""
        assert self._way is not None
        total = self._way.theta()
        self.give_back()
        return total

    def give_back(self) -> None:
        """Let go of what was kept."""
        give_back(self._tape)
