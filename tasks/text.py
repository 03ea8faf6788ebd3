"""Character-level language models, feed-forward, recurrent and a small transformer, on text that is always there.

A batch is a number of windows of the text; each character is predicted from those before it in the window. Recurrences
are written out, since PyTorch's own layers cannot be batched over tasks.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch.nn import functional as F

from learned_opt.task import TaskFamily, Tensors, check_split
from tasks.activations import ACTIVATIONS
from tasks.data.text import NUM_CHARACTERS, load_text
from tasks.supervised import check_label_noise, cross_entropy, with_noise

_TEST_WINDOWS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharacterModel(TaskFamily):
    """Mean cross-entropy of the next character, in nats, on windows of a text.

    A task is an initialization and a random order of windows; splits use different files of the standard library, or
    different stretches of `text_file`. `eval_metrics` reports "test_loss" and "test_accuracy" on 32 windows of text
    that no task trains on. Reference: ln 96 = 4.564 is the loss of a uniform guess; the infimum is the entropy of the
    text, which nobody knows.

    Attributes:
        text_file: path of a text file; empty for the sources of Python's standard library
            (`tasks.data.text.load_text`).
        batch_size: windows per mini-batch, drawn with replacement; at least 1.
        length: characters of a window that are predicted; between 1 and 512.
        label_noise: share of the characters to predict that are replaced by uniformly drawn ones, in [0, 1]; those that
            they are predicted from, and the held-out text, stay.
    """

    text_file: str = ""
    batch_size: int = 16
    length: int = 20
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}")
        if not 1 <= self.length <= 512:
            raise ValueError(f"length must lie in [1, 512]; got {self.length}")
        check_label_noise(self.label_noise)

    @abstractmethod
    def logits(self, params: Tensors, characters: torch.Tensor) -> torch.Tensor:
        """Scores [windows, length, 96] of what follows each of `characters` [windows, length, 96] (one-hot)."""

    def shared_data(self) -> Tensors:
        return {"text": load_text(self.text_file)[0]}

    def sample_task(self, split: str, generator: torch.Generator) -> Tensors:
        text = load_text(self.text_file)[1].ranges[check_split(split)]
        if text.num_test < self.length + 1:
            raise ValueError(f"length must be below {text.num_test} for a text this short; got {self.length}")
        return text.as_task()

    def sample_batches(self, task: Tensors, num_steps: int, generator: torch.Generator) -> Tensors:
        num_starts = int(task["num_rows"]) - self.length  # a window ends before the held-out text begins
        starts = torch.randint(num_starts, (num_steps, self.batch_size), generator=generator)
        rows = int(task["first_row"]) + starts
        if not self.label_noise:
            return {"rows": rows}
        following = load_text(self.text_file)[0][rows[..., None] + 1 + torch.arange(self.length)].long()
        return {"rows": rows, "targets": with_noise(following, NUM_CHARACTERS, self.label_noise, generator)}

    def _scores(self, params: Tensors, text: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores [characters, 96], the characters that follow [characters]) of the windows that begin at `starts`."""
        windows = text[starts[:, None] + torch.arange(self.length + 1, device=starts.device)].long()
        dtype = next(iter(params.values())).dtype
        # A product with one-hot rows: the backward pass of indexing would write one entry at a time.
        one_hot = (windows[:, :-1, None] == torch.arange(NUM_CHARACTERS, device=starts.device)).to(dtype)
        return self.logits(params, one_hot).reshape(-1, NUM_CHARACTERS), windows[:, 1:].reshape(-1)

    def loss(self, params: Tensors, task: Tensors, batch: Tensors) -> torch.Tensor:
        scores, following = self._scores(params, task["text"], batch["rows"])
        return cross_entropy(scores, batch["targets"].flatten() if "targets" in batch else following)

    def eval_metrics(self, params: Tensors, task: Tensors) -> Tensors:
        """The "test_loss" and "test_accuracy" of the next character in the held-out text."""
        num_test = load_text(self.text_file)[1].num_test
        stride = max(1, (num_test - self.length - 1) // _TEST_WINDOWS)
        index = torch.arange(_TEST_WINDOWS, device=task["first_row"].device) * stride % (num_test - self.length)
        scores, following = self._scores(params, task["text"], task["first_row"] + task["num_rows"] + index)
        right = (scores.argmax(-1) == following).to(scores.dtype).mean()
        return {"test_loss": cross_entropy(scores, following), "test_accuracy": right}


def _matrix(generator: torch.Generator, *shape: int, gain: float = 1.0) -> torch.Tensor:
    """N(0, gain²/fan_in), fan_in being the first dimension."""
    return torch.randn(*shape, generator=generator) * (gain / math.sqrt(shape[0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharMLP(CharacterModel):
    """A feed-forward character model: the last few characters, embedded side by side, and one hidden layer.

    Parameters are "embedding" [96, embedding], "input" [context · embedding, hidden], whose rows begin with those of
    the earliest character, "bias" [hidden], "output" [hidden, 96] and "output_bias" [96]. Where the context reaches
    beyond the start of the window, zeros stand for embeddings. Source: Bengio, Ducharme, Vincent and Jauvin, 2003,
    without the direct connections from embeddings to scores.

    Attributes:
        context: how many characters, the present one included, a prediction sees; at least 1.
        embedding: numbers that stand for a character; at least 1.
        hidden: width of the hidden layer; at least 1.
        activation: one of `tasks.activations.ACTIVATIONS`.
    """

    name: ClassVar[str] = "char_mlp"
    context: int = 4
    embedding: int = 8
    hidden: int = 32
    activation: str = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("context", "embedding", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {self.activation!r}")

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        return {
            "embedding": torch.randn(NUM_CHARACTERS, self.embedding, generator=generator),
            "input": _matrix(generator, self.context * self.embedding, self.hidden),
            "bias": torch.zeros(self.hidden),
            "output": _matrix(generator, self.hidden, NUM_CHARACTERS),
            "output_bias": torch.zeros(NUM_CHARACTERS),
        }

    def logits(self, params: Tensors, characters: torch.Tensor) -> torch.Tensor:
        length = characters.shape[1]
        padded = F.pad(characters @ params["embedding"], (0, 0, self.context - 1, 0))
        seen = torch.cat([padded[:, k : k + length] for k in range(self.context)], dim=-1)
        hidden = ACTIVATIONS[self.activation](seen @ params["input"] + params["bias"])
        return hidden @ params["output"] + params["output_bias"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharRNN(CharacterModel):
    """A recurrent character model: a tanh (Elman) or gated recurrent unit cell, from a zero state in every window.

    Parameters are "input" [96, rows], "state" [hidden, rows] and "bias" [rows], where rows is hidden, or three times
    that for the gated cell, then "output" [hidden, 96] and "output_bias" [96]. Sources: Elman, 1990; Cho et al., 2014,
    with the reset after the product, as in PyTorch.

    Attributes:
        cell: "tanh" or "gru".
        hidden: width of the state; at least 1.
    """

    name: ClassVar[str] = "char_rnn"
    cell: str = "tanh"
    hidden: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell not in ("tanh", "gru"):
            raise ValueError(f"cell must be one of tanh, gru; got {self.cell!r}")
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1; got {self.hidden}")

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        rows = self.hidden * (3 if self.cell == "gru" else 1)
        return {
            # Only one entry of a one-hot row is not zero, so its weights need no division by the fan-in.
            "input": _matrix(generator, NUM_CHARACTERS, rows, gain=math.sqrt(NUM_CHARACTERS) / 2),
            "state": _matrix(generator, self.hidden, rows),
            "bias": torch.zeros(rows),
            "output": _matrix(generator, self.hidden, NUM_CHARACTERS),
            "output_bias": torch.zeros(NUM_CHARACTERS),
        }

    def _step(self, params: Tensors, given: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The new state [windows, hidden] from what the character contributes [windows, rows] and the state."""
        if self.cell == "tanh":
            return torch.tanh(given + state @ params["state"])
        reset, update, candidate = params["state"].chunk(3, dim=1)
        given_reset, given_update, given_candidate = given.chunk(3, dim=1)
        kept = torch.sigmoid(given_update + state @ update)
        new = torch.tanh(given_candidate + torch.sigmoid(given_reset + state @ reset) * (state @ candidate))
        return kept * state + (1 - kept) * new

    def logits(self, params: Tensors, characters: torch.Tensor) -> torch.Tensor:
        given = characters @ params["input"] + params["bias"]
        state = torch.zeros_like(given[:, 0, : self.hidden])
        states = []
        for step in range(given.shape[1]):
            state = self._step(params, given[:, step], state)
            states.append(state)
        return torch.stack(states, dim=1) @ params["output"] + params["output_bias"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharTransformer(CharacterModel):
    """A decoder-only transformer: learned positions, causal attention, layer normalization before each part, GELU.

    Parameters, of width d, are "characters" [96, d], "positions" [length, d], for each layer two normalizations
    "0.norm1.scale" [d] and so on, "0.attention" [d, 3 d], "0.attention_out" [d, d], "0.wide" [d, 4 d] and "0.narrow" [4
    d, d] with biases, then "norm.scale", "norm.shift" [d] and "output" [d, 96]. Source: Vaswani et al., 2017, with the
    normalization where Radford et al., 2019, have it.

    Attributes:
        num_layers: at least 1.
        num_heads: at least 1, a divisor of `width`.
        width: of the residual stream; at least 1. The feed-forward part is four times as wide.
    """

    name: ClassVar[str] = "char_transformer"
    num_layers: int = 1
    num_heads: int = 2
    width: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_layers", "num_heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads must divide width ({self.width}); got {self.num_heads}")

    def init_params(self, task: Tensors, generator: torch.Generator) -> Tensors:
        d = self.width
        params = {
            "characters": torch.randn(NUM_CHARACTERS, d, generator=generator) * 0.5,
            "positions": torch.randn(self.length, d, generator=generator) * 0.1,
        }
        # Both parts of a layer add to the residual stream: smaller when there are more of them.
        gain = 1 / math.sqrt(2 * self.num_layers)
        for i in range(self.num_layers):
            params |= {f"{i}.norm{k}.scale": torch.ones(d) for k in (1, 2)}
            params |= {f"{i}.norm{k}.shift": torch.zeros(d) for k in (1, 2)}
            params[f"{i}.attention"] = _matrix(generator, d, 3 * d)
            params[f"{i}.attention_out"] = _matrix(generator, d, d, gain=gain)
            params[f"{i}.wide"] = _matrix(generator, d, 4 * d)
            params[f"{i}.wide_bias"] = torch.zeros(4 * d)
            params[f"{i}.narrow"] = _matrix(generator, 4 * d, d, gain=gain)
            params[f"{i}.narrow_bias"] = torch.zeros(d)
        params |= {"norm.scale": torch.ones(d), "norm.shift": torch.zeros(d)}
        params["output"] = _matrix(generator, d, NUM_CHARACTERS)
        return params

    def _norm(self, params: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.width,)) * params[f"{name}.scale"] + params[f"{name}.shift"]

    def _attend(self, params: Tensors, layer: int, x: torch.Tensor) -> torch.Tensor:
        windows, length, _ = x.shape
        heads = (x @ params[f"{layer}.attention"]).reshape(windows, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ value
        return mixed.transpose(1, 2).reshape(windows, length, -1) @ params[f"{layer}.attention_out"]

    def logits(self, params: Tensors, characters: torch.Tensor) -> torch.Tensor:
        x = characters @ params["characters"] + params["positions"]
        for i in range(self.num_layers):
            x = x + self._attend(params, i, self._norm(params, f"{i}.norm1", x))
            wide = F.gelu(self._norm(params, f"{i}.norm2", x) @ params[f"{i}.wide"] + params[f"{i}.wide_bias"])
            x = x + wide @ params[f"{i}.narrow"] + params[f"{i}.narrow_bias"]
        return self._norm(params, "norm", x) @ params["output"]
