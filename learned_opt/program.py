"""A function of tensors as a flat list of tensor operations.

Function transforms (`vmap`, `grad`) run through several layers of Python for every operation. `trace` records what
they do once, for arguments of these shapes, and leaves out what does nothing: views of the shape that is there already,
first powers, products with ones, and whatever depends on shapes alone, which is computed once and kept. On the CPU the
list is then run by TorchScript's interpreter, which takes a fifth of Python's time for an operation. The result
computes the same bits.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

_aten = torch.ops.aten
_RESHAPING = (
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten.reshape.default,
)
_LARGEST_CONSTANT = 2**16  # numbers; anything larger is made again rather than kept
_OF_SHAPE_ALONE = (_aten.ones_like.default, _aten.zeros_like.default, _aten.new_zeros.default, _aten.full_like.default)


def trace(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """Record a function.

    Args:
        function: of these arguments; must not branch on the values of tensors.
        arguments: tensors and (nested) dicts of tensors, as in later calls: the same keys, shapes and types.

    Returns:
        A function of the same arguments with the same results.
    """
    flat, spec = pytree.tree_flatten(arguments)
    out_spec: list[Any] = []

    def flat_function(*tensors: torch.Tensor) -> Any:
        result, found = pytree.tree_flatten(function(*pytree.tree_unflatten(list(tensors), spec)))
        out_spec[:] = [found]
        return result

    module = make_fx(flat_function)(*flat)
    _simplify(module)
    run = _interpreted(module, flat) or module.forward

    def program(*arguments: Any) -> Any:
        return pytree.tree_unflatten(list(run(*_leaves(arguments))), out_spec[0])

    return program


def _interpreted(module: fx.GraphModule, flat: list[Any]) -> Callable[..., Any] | None:
    """The module run by TorchScript; None where that cannot be, or does not compute the same bits."""
    if not all(isinstance(value, torch.Tensor) and value.is_cpu for value in flat):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what a trace does not see: the module has no branches
        try:
            script = torch.jit.freeze(torch.jit.trace(module, tuple(flat), check_trace=False).eval())
            same = [_equal(script(*flat), module(*flat)) for _ in range(2)]  # it is optimized after its first runs
        except (RuntimeError, AttributeError, NotImplementedError, TypeError):
            return None
    return script if all(same) else None


def _equal(first: Any, second: Any) -> bool:
    """Whether two lists of tensors hold the same; NaN is equal to NaN and to nothing else."""
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(first, second)
    )


def _leaves(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """What `tree_flatten` finds in tensors and dicts, without its overhead."""
    out: list[torch.Tensor] = []
    for argument in arguments:
        if isinstance(argument, dict):
            out.extend(argument.values())
        else:
            out.append(argument)
    return out


def _simplify(module: fx.GraphModule) -> None:
    """Take out operations that do nothing, and keep what depends on no argument as constants."""
    constants: dict[fx.Node, torch.Tensor] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and isinstance(value := getattr(module, str(node.target), None), torch.Tensor):
            constants[node] = value
            continue
        if node.op != "call_function":
            continue
        same = _same_as(node, constants)
        if same is not None:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
            continue
        if node.target in _OF_SHAPE_ALONE or (
            node.all_input_nodes
            and all(n in constants for n in node.all_input_nodes)
            and node.target is not operator.getitem
        ):
            value = _evaluate(node, constants)
            if value is not None:
                constants[node] = value
    _keep(module, constants)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def _same_as(node: fx.Node, constants: dict[fx.Node, torch.Tensor]) -> fx.Node | None:
    """The input that this node returns unchanged, if it does."""
    if node.target is operator.getitem:
        split = node.args[0]
        if not isinstance(split, fx.Node) or split.target is not _aten.split_with_sizes.default:
            return None
        return split.args[0] if len(split.args[1]) == 1 else None  # type: ignore[arg-type, return-value]
    if node.target is _aten.mul.Tensor:
        for one, other in (node.args, node.args[::-1]):
            if not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or not _alike(other, node):
                continue
            if one in constants and (constants[one] == 1).all():
                return other
        return None
    if not node.args or not isinstance(source := node.args[0], fx.Node):
        if node.target is _aten.cat.default and len(node.args[0]) == 1:  # type: ignore[arg-type]
            return node.args[0][0]  # type: ignore[index, return-value]
        return None
    unchanged = _alike(source, node)
    if node.target in _RESHAPING and unchanged:
        return source
    if node.target is _aten.permute.default and unchanged and list(node.args[1]) == list(range(len(node.args[1]))):  # type: ignore[arg-type]
        return source
    if node.target is _aten.pow.Tensor_Scalar and node.args[1] == 1 and unchanged:
        return source
    return None


def _alike(before: fx.Node, after: fx.Node) -> bool:
    """Whether both are tensors of one shape and dtype that lie in memory alike."""
    x, y = before.meta.get("val"), after.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    return x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


def _evaluate(node: fx.Node, constants: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The value of a node whose inputs are constants, or of which only shapes count; None if it is not to be kept."""
    like = node.meta.get("val")
    if not isinstance(like, torch.Tensor) or like.numel() > _LARGEST_CONSTANT or node.target is _aten.new_zeros.default:
        return None  # new_zeros may be written into

    def value_of(part: fx.Node) -> Any:
        if part in constants:
            return constants[part]
        sample = part.meta["val"]
        return torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)

    args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
    with torch.no_grad():
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    return value if isinstance(value, torch.Tensor) else None


def _keep(module: fx.GraphModule, constants: dict[fx.Node, torch.Tensor]) -> None:
    """Put constants in the place of nodes whose value is needed by something that is not constant itself."""
    for index, (node, value) in enumerate(constants.items()):
        if node.op == "get_attr" or all(user in constants for user in node.users):
            continue
        name = f"_constant_{index}"
        module.register_buffer(name, value)
        with module.graph.inserting_before(node):
            kept = module.graph.get_attr(name)
        kept.meta["val"] = node.meta["val"]
        for user in [u for u in node.users if u not in constants]:
            user.replace_input_with(node, kept)
