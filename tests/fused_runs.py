"""What tests/test_fused.py runs in processes of their own: Triton reads whether to interpret when it is imported.

python tests/fused_runs.py numbers|optimizer|compiled    prints one JSON object
"""

from __future__ import annotations

import copy
import json
import re
import sys
import warnings
from typing import Any

import torch
from optimizer_cases import artifact_of, model_of

from learned_opt import LearnedOptimizer, rules
from learned_opt.rules.kernels import fused
from learned_opt.rules.kernels.fused import Factors

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "compact": ("compact", {}),
    "rnnprop": ("rnnprop", {}),
    "l2l": ("l2l", {}),
    "three layers of five": ("compact", {"num_layers": 3, "hidden_size": 5, "beta": 0.5, "output_tanh": False}),
    "dense three, one of seventeen": ("l2l", {"dense_units": 3, "num_layers": 1, "hidden_size": 17, "log_range": 5.0}),
    "one unit, no memory": ("compact", {"hidden_size": 1, "beta": 0.0, "eps": 1e-3}),
    "widest": ("compact", {"hidden_size": 64, "dense_units": 40}),
}
SIZES = (3, 64, 70)
"""Less than a block, one, and one that begins a second. The interpreter takes a tenth of a second for a block."""
DTYPES = {"float32": (torch.float32,) * 3, "bfloat16": (torch.bfloat16,) * 3}
NUM_STEPS = 3


def gradients(n: int, generator: torch.Generator) -> torch.Tensor:
    """Gradients of all sizes: every third coordinate 0, every fifth extreme."""
    grads = torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 8 - 6)
    for k, value in enumerate((1e-42, -1e-30, 1e-12, -3e18, 1e30, -3e38)):
        grads[5 * k + 1 :: 30] = value
    grads[::3] = 0
    return grads


def compare(name: str, n: int) -> str:
    """Steps of the kernel and of the rule on n coordinates; says where they part, or ""."""
    rule_name, settings = CASES[name]
    rule = rules.get(rule_name, **settings)
    assert isinstance(rule, rules.LSTMRule)
    generator = torch.Generator().manual_seed(n)
    theta = {key: value * 2 for key, value in rule.init_theta(generator).items()}
    weights = fused.flat_weights(rule, theta)
    state = rule.init_state(n)
    names = [key for key in state if key != "step"]
    # Rows of a wider matrix, as chunks of a block are.
    matrix = torch.full((rule.rows_per_coordinate, n + 9), 7.0)
    rows = matrix[:, 4 : 4 + n]
    rows.zero_()
    params = torch.randn(n, generator=generator)
    for step in range(NUM_STEPS):
        grads = gradients(n, generator)
        factors = Factors(lr=2.0, keep=0.75, maximize=step == 1)
        signed = -grads if factors.maximize else grads
        update, state = rule.update(theta, signed, params, state)
        moved, only_update = params.clone(), torch.zeros(n)
        fused.launch(rule.config, weights, moved, grads, rows.clone(), [(float(step), n)], factors)
        fused.launch(rule.config, weights, only_update, grads, rows, [(float(step), n)], Factors(lr=1.0, keep=0.0))
        if factors.maximize:  # the second launch went downhill: go on from the rule's own state
            rows.copy_(torch.cat([state[key].reshape(-1, n) for key in names]))
        else:
            torch.testing.assert_close(only_update, update, rtol=1e-4, atol=1e-7, equal_nan=True)
            assert bool((only_update[update == 0] == 0).all()), "coordinates without gradients move"
        torch.testing.assert_close(moved, params * 0.75 + update * 2, rtol=1e-5, atol=1e-6, equal_nan=True)
        expected = torch.cat([state[key].reshape(-1, n) for key in names])
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        params = moved
    outside = torch.cat([matrix[:, :4], matrix[:, 4 + n :]], 1)
    assert bool((outside == 7).all()), "the kernel wrote outside its coordinates"
    return ""


def numbers() -> dict[str, Any]:
    """Disagreements per case and size, and what the optimizer's own check finds."""
    out: dict[str, Any] = {}
    for name in CASES:
        for n in SIZES if name == "compact" else SIZES[-1:]:
            try:
                out[f"{name}, {n}"] = compare(name, n)
            except AssertionError as error:
                out[f"{name}, {n}"] = str(error)
        rule = rules.get(CASES[name][0], **CASES[name][1])
        assert isinstance(rule, rules.LSTMRule)
        theta = rule.init_theta(torch.Generator().manual_seed(1))
        for dtype, dtypes in DTYPES.items():
            out[f"check of {name}, {dtype}"] = fused.disagreement(rule, theta, *dtypes, torch.device("cpu"))
    return out


def step_on_made_up_gradients(model: torch.nn.Module, mine: LearnedOptimizer, num_steps: int) -> None:
    """Steps whose gradients do not depend on the parameters, so that roundings do not feed on each other."""
    generator = torch.Generator().manual_seed(num_steps)
    for _ in range(num_steps):
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = grad if param.requires_grad else None
        mine.step()


def optimizer() -> dict[str, Any]:
    """A run of steps with the kernel and one without, per rule and dtype.

    Launches, the largest difference in units of the last place of 1 + |value|, and whether the step counts agree.
    """
    launches = 0
    launch, wanted = fused.launch, fused.wanted

    def counting(*args: Any) -> None:
        nonlocal launches
        launches += 1
        launch(*args)

    fused.launch = counting
    out: dict[str, Any] = {}
    dtypes = {name: [(torch.float32, None)] for name in ("compact", "rnnprop", "l2l")}
    dtypes["compact"].append((torch.bfloat16, None))
    dtypes["rnnprop"].append((torch.float32, torch.bfloat16))
    for name, ways in dtypes.items():
        for dtype, state_dtype in ways:
            runs = []
            launches = 0
            for use in (False, True):
                fused.wanted = (lambda *args: True) if use else wanted
                model = model_of(dtype=dtype)
                last = model[2].weight
                groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.01}]
                mine = LearnedOptimizer(groups, artifact_of(name), state_dtype=state_dtype, chunk_size=13)
                last.requires_grad_(False)  # thaws later: a chunk with several step counts
                step_on_made_up_gradients(model, mine, 2)
                last.requires_grad_(True)
                step_on_made_up_gradients(model, mine, 2)
                rows = [v for state in mine.state.values() for k, v in state.items() if k != "step"]
                counts = [float(state["step"]) for state in mine.state.values()]
                runs.append((copy.deepcopy([*model.parameters(), *rows]), counts))
            (plain, counts), (kernel, kernel_counts) = runs
            eps = torch.finfo(torch.bfloat16 if torch.bfloat16 in (dtype, state_dtype) else torch.float32).eps
            ratios = [(a.float() - b.float()).abs() / (1 + a.float().abs()) / eps for a, b in zip(plain, kernel)]
            worst = max(ratio.max().item() for ratio in ratios)
            out[f"{name}, {dtype}, {state_dtype}"] = [launches, worst, counts == kernel_counts]
    return out


def compiled() -> dict[str, Any]:
    """Compile for GPUs that need not be there: tensor-core products, bytes of shared memory, bytes of machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from learned_opt.rules.kernels.fused_kernel import lstm_step

    out = {}
    for name, capability, dtype in (("compact", 75, "fp32"), ("compact", 80, "bf16"), ("rnnprop", 90, "fp32")):
        rule = rules.get(name)
        assert isinstance(rule, rules.LSTMRule)
        constants = fused.compiled_settings(rule.config, capability >= 80)
        options = {"num_warps": constants.pop("num_warps")}
        signature = dict.fromkeys(("params", "grads", "rows"), f"*{dtype}")
        signature |= dict.fromkeys(("weights", "corrections"), "*fp32")
        signature |= dict.fromkeys(("correction_stride", "n", "row_stride"), "i32")
        signature |= dict.fromkeys(("lr", "keep", "direction"), "fp32")
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(lstm_step, {key: signature[key] for key in lstm_step.arg_names}, constants)
        done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        matrix_products = len(re.findall(r"mma\.(?:sync|async)", done.asm["ptx"]))
        out[f"{name}, {capability}"] = [matrix_products, done.metadata.shared, len(done.asm["cubin"])]
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error", fused.FusedStepWarning)
    with torch.no_grad() if sys.argv[1] == "numbers" else torch.enable_grad():
        print(json.dumps({"numbers": numbers, "optimizer": optimizer, "compiled": compiled}[sys.argv[1]]()))
