"""The compiled kernel for matrices in a basis against plain torch in float64, and what it leaves to plain torch."""

import pytest
import torch

from learned_opt.rules.basis import Basis, Turn, observe, refresh, turn_of, without_noise
from learned_opt.rules.kernels import basis_native, build

BASIS = Basis(longest=128, decay=0.95, every=5, vectors=50)
SHAPES = [(2, 2), (3, 5), (8, 8), (16, 33), (31, 4), (64, 20), (128, 128), (128, 2), (3, 300), (200, 17), (50, 1)]
LEADS = [(), (1,), (3,)]

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="needs a C++ compiler")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(tensors):
    return {name: value.double() for name, value in tensors.items()}


def state_of(shape, lead):
    """The state of matrices that have seen 12 gradients, two changes of the basis among them."""
    sides = BASIS.sides(shape)
    state = wide(sides.init(*lead, dtype=torch.float32, device="cpu"))
    for step in range(12):
        state |= observe(BASIS, sides, state, random(*lead, *shape, seed=step).double())
        if step % 5 == 0:
            state |= refresh(sides, state, step == 0)
    return sides, {name: value.float().contiguous() for name, value in state.items()}


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernel's functions that have been called."""
    found, run = [], basis_native._run

    def noted(name, *arguments):
        found.append(name)
        run(name, *arguments)

    monkeypatch.setattr(basis_native, "_run", noted)
    return found


def close(found, want, **tolerance):
    torch.testing.assert_close(found, want.float(), **{"rtol": 1e-6, "atol": 1e-9, **tolerance})


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_is_what_it_is_in_float64(shape, lead, calls):
    sides, state = state_of(shape, lead)
    matrices = random(*lead, *shape, seed=99)
    turn, exact = turn_of(state), turn_of(wide(state))
    close(turn.into(matrices), exact.into(matrices.double()))
    close(turn.back(matrices), exact.back(matrices.double()))
    close(turn.gradients(matrices), exact.into(matrices.double()))
    for name, value in observe(BASIS, sides, state, matrices).items():
        close(value, observe(BASIS, sides, wide(state), matrices.double())[name])
    for first in (False, True, torch.arange(max(lead, default=1))[:, None, None] == 1):
        if isinstance(first, torch.Tensor) and not lead:
            continue
        for name, value in refresh(sides, state, first).items():
            close(value, refresh(sides, wide(state), first)[name], atol=1e-6, rtol=0)
            one = torch.eye(value.shape[-1]).expand_as(value)
            torch.testing.assert_close(value.mT @ value, one, atol=2e-6, rtol=0)
    assert set(calls) == {"turn", "observe", "refresh"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_and_without_the_kernel_one_can_hardly_tell(shape, monkeypatch):
    """Both round once: weak directions, which a rule steps along like strong ones, agree as well as those."""
    sides, state = state_of(shape, (2,))
    weak = random(2, shape[0], 1, seed=5) @ random(2, 1, shape[1], seed=6) + 1e-4 * random(2, *shape)
    found = []
    for native in "10":
        monkeypatch.setenv("LEARNED_OPT_NATIVE", native)
        turn = turn_of(state)
        found.append([turn.gradients(weak), turn.back(weak)])
        found[-1] += [*observe(BASIS, sides, state, weak).values(), *refresh(sides, state, False).values()]
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=3e-7, atol=1e-9)


def test_averages_are_overwritten_where_they_lie():
    sides, state = state_of((6, 4), ())
    want = observe(BASIS, sides, state, random(6, 4))
    packed = torch.cat([value.reshape(-1) for value in state.values()])
    sizes = [value.numel() for value in state.values()]
    views = {n: part.view_as(v) for (n, v), part in zip(state.items(), packed.split(sizes))}
    addresses = {name: value.data_ptr() for name, value in views.items()}
    observe(BASIS, sides, views, random(6, 4), overwrite=True)
    for name, value in want.items():
        assert views[name].equal(value) and views[name].data_ptr() == addresses[name]
    scattered = {name: value.mT.contiguous().mT for name, value in state.items()}
    observe(BASIS, sides, scattered, random(6, 4), overwrite=True)
    for name, value in want.items():
        assert scattered[name].equal(value) and not scattered[name].is_contiguous()


def test_matrices_that_lie_apart_and_more_of_them_than_sets():
    """Columns of wider rows, as particles have them, and several rows of state for each set of vectors."""
    _, state = state_of((4, 3), (5,))
    turn = turn_of(state)
    rows = random(2, 5, 20)[..., 4:16]
    assert not rows.is_contiguous()
    want = Turn(*(side.double() for side in (turn.left, turn.right))).into(rows.double().unflatten(-1, (4, 3)))
    close(turn.into(rows.unflatten(-1, (4, 3))), want)
    odd = random(5, 3, 4).mT  # rows that are not contiguous
    close(turn.into(odd), turn_of(wide(state)).into(odd.double()))


def test_a_matrix_is_the_same_alone_and_among_others_on_any_number_of_threads():
    sides, state = state_of((20, 12), (7,))
    matrices, found, before = random(7, 20, 12), [], torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            found.append([*observe(BASIS, sides, state, matrices).values(), *refresh(sides, state, False).values()])
            found[-1].append(turn_of(state).gradients(matrices))
    finally:
        torch.set_num_threads(before)
    assert all(one.equal(other) for one, other in zip(*found))
    mine = {name: value[3] for name, value in state.items()}
    alone = [*observe(BASIS, sides, mine, matrices[3]).values(), *refresh(sides, mine, False).values()]
    alone.append(turn_of(mine).gradients(matrices[3]))
    assert all(one.equal(all_of_them[3]) for one, all_of_them in zip(alone, found[0]))


@pytest.mark.parametrize("size", [5, 16, 40])
def test_rounding_is_no_gradient(size):
    one = Turn(torch.eye(size), torch.eye(size))
    matrix = random(size, size)
    matrix[0, 1], matrix[-1, -1], matrix[1, 0] = 1e-8, -1e-8, matrix.abs().max() * 2e-6
    found = one.gradients(matrix)
    assert found[0, 1] == 0 and found[-1, -1] == 0 and found[1, 0] == matrix[1, 0]
    assert found.equal(without_noise(matrix))
    matrix[2, 2] = float("nan")
    assert one.gradients(matrix).isnan().any() and Turn(None, torch.eye(size)).gradients(matrix)[0, 1] == matrix[0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_numbers_that_are_not_finite_count_zero_in_averages(bad):
    sides, state = state_of((9, 9), (2,))
    broken = random(2, 9, 9)
    whole = broken.clone()
    broken[1, 3, 3], whole[1, 3, 3] = bad, 0
    found, want = (observe(BASIS, sides, state, matrices) for matrices in (broken, whole))
    assert all(found[name].equal(value) for name, value in want.items())


@pytest.mark.parametrize("case", ["double", "large", "graph", "empty", "off"])
def test_what_is_left_to_plain_torch(case, calls, monkeypatch):
    matrices, turn = random(4, 4), Turn(torch.linalg.qr(random(4, 4, seed=1)).Q, None)
    if case == "double":
        matrices, turn = matrices.double(), Turn(turn.left.double(), None)
    elif case == "large":
        matrices = random(4, 5000)
    elif case == "graph":
        matrices.requires_grad_()
    elif case == "empty":
        matrices = matrices.expand(0, 4, 4)
    else:
        monkeypatch.setenv("LEARNED_OPT_NATIVE", "0")
    found = turn.into(matrices)
    torch.testing.assert_close(found, (turn.left.double().mT @ matrices.double()).to(matrices), rtol=0, atol=0)
    assert not calls and found.requires_grad == (case == "graph")
    if case == "graph":
        with torch.no_grad():
            turn.into(matrices)
        assert calls == ["turn"]
