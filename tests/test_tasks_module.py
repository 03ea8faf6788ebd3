"""Tasks on a module and data of one's own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learned_opt.batched import BatchedFamily, OneByOneWarning
from learned_opt.task import SPLITS, draw_batches, draw_task, task_seed
from tasks import GroupedData, ModuleFamily

SIZES = [4, 7, 2, 30, 5, 9, 12, 2, 6, 8, 3, 11]


def table(seed=0):
    """Rows whose first input is the row number, with a name per group, in mixed order."""
    random = np.random.default_rng(seed)
    groups = np.repeat([f"store {i}" for i in range(len(SIZES))], SIZES)
    groups = groups[random.permutation(len(groups))]
    inputs = random.normal(size=(len(groups), 3)).astype(np.float32)
    inputs[:, 0] = np.arange(len(groups))
    return inputs, random.normal(size=len(groups)).astype(np.float32), groups


def small_net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def family(**options):
    module = options.pop("module", small_net)
    loss = options.pop("loss", F.mse_loss)
    data = options.pop("data", None) or GroupedData(*table())
    return ModuleFamily(module, loss, data, **options)


def test_groups_belong_to_one_split_with_all_of_their_rows():
    inputs, targets, groups = table()
    data = GroupedData(inputs, targets, groups)
    assert [data.num_groups(s) for s in SPLITS] == [8, 2, 2]
    assert sorted(name for s in SPLITS for name in data.labels[s]) == sorted(set(groups))
    for split in SPLITS:
        for name, rows in zip(data.labels[split], data.ranges[split]):
            size = rows.num_train + rows.num_test
            mine = data.inputs[rows.first : rows.first + size, 0].int().numpy()
            assert sorted(mine) == np.flatnonzero(groups == name).tolist()
            assert rows.num_test == max(1, round(size * 0.25)) and rows.num_train >= 1
            np.testing.assert_array_equal(data.targets[rows.first : rows.first + size].numpy(), targets[mine])
    assert GroupedData(inputs, targets, groups, seed=1).labels != data.labels
    assert GroupedData(inputs, targets, groups).labels == data.labels


def test_without_groups_the_rows_are_dealt_out():
    inputs, targets, _ = table()
    data = GroupedData(inputs, targets)
    sizes = [sum(r.num_train + r.num_test for r in data.ranges[s]) for s in SPLITS]
    assert sum(sizes) == len(inputs) and all(data.num_groups(s) == 1 for s in SPLITS)
    assert sorted(data.inputs[:, 0].int().tolist()) == list(range(len(inputs)))


def test_a_task_is_one_group_and_trains_on_its_training_rows_alone():
    inputs, targets, groups = table()
    own = family()
    shared = own.shared_data()
    seen = set()
    for i in range(60):
        seed = task_seed("meta_train", 0, i)
        task, _ = draw_task(own, "meta_train", seed)
        rows = draw_batches(own, task, seed, 0, 64)["rows"]
        assert rows.shape == (64, 32)
        numbers = shared["inputs"][rows.flatten(), 0].int().unique().numpy()
        (name,) = set(groups[numbers])
        assert len(numbers) == int(task["num_rows"])
        seen.add(name)
    assert len(seen) == 8  # all groups of meta-train come up


def test_metrics_are_those_of_the_held_out_rows_whatever_the_groups_sizes():
    own = family()
    batched = BatchedFamily(own, dtype=torch.float64)
    seeds = [task_seed("meta_train", 0, i) for i in range(12)]
    stacked, params = batched.start("meta_train", seeds)
    got = batched.eval_metrics(params, stacked)["test_loss"]
    for i, seed in enumerate(seeds):
        task, start = draw_task(own, "meta_train", seed)
        first = int(task["first_row"] + task["num_rows"])
        rows = slice(first, first + int(task["num_test"]))
        net = small_net().double()
        net.load_state_dict({n: v.double() for n, v in start.items()})
        want = F.mse_loss(net(own.shared_data()["inputs"][rows].double()), own.shared_data()["targets"][rows].double())
        torch.testing.assert_close(got[i], want.detach(), rtol=1e-10, atol=0)


def test_accuracy_for_integer_targets():
    inputs, targets, groups = table()
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([0.0, 1.0]))  # always says class 1
    own = ModuleFamily(net, F.cross_entropy, GroupedData(inputs, targets > 0, groups), init="module")
    task, params = draw_task(own, "meta_test", 2)
    first = int(task["first_row"] + task["num_rows"])
    want = own.shared_data()["targets"][first : first + int(task["num_test"])].float().mean()
    torch.testing.assert_close(own.eval_metrics(params, {**task, **own.shared_data()})["test_accuracy"], want)


def test_training_equals_plain_training_of_the_module():
    """Gradient descent through the family and through the module itself, ten steps, float64."""
    own = family()
    batched = BatchedFamily(own, dtype=torch.float64)
    seeds = [task_seed("meta_train", 1, i) for i in range(2)]
    stacked, params = batched.start("meta_train", seeds)
    batches = batched.batches(stacked, seeds, [0, 0], 10)
    start = params.clone()
    for step in range(10):
        losses, grads = batched.losses_and_grads(params, stacked, {n: v[step] for n, v in batches.items()})
        params = params - 1e-4 * grads
    for i in range(2):
        net = small_net().double()
        net.load_state_dict(batched.unflatten(start[i]))
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
        for step in range(10):
            rows = batches["rows"][step, i]
            loss = F.mse_loss(
                net(own.shared_data()["inputs"][rows].double()), own.shared_data()["targets"][rows].double()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(
            params[i], torch.cat([p.detach().flatten() for p in net.parameters()]), rtol=1e-9, atol=1e-12
        )


def test_a_module_is_left_alone_and_reset_by_its_own_methods():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Flatten(0))
    before = copy.deepcopy(net.state_dict())
    data = GroupedData(*table()[:2], np.arange(99) % 6)
    own = ModuleFamily(net, F.mse_loss, data)
    _, first = draw_task(own, "meta_train", 0)
    _, second = draw_task(own, "meta_train", 3)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert net[1].track_running_stats and net.training
    assert not torch.equal(first["0.weight"], second["0.weight"])
    assert first["0.weight"].abs().max() <= 3**-0.5  # the bound of nn.Linear's own initialization
    assert torch.equal(first["1.weight"], torch.ones(4))


def test_init_module_starts_every_task_from_its_weights():
    net = small_net()
    own = family(module=net, init="module")
    for seed in (0, 3):
        _, params = draw_task(own, "meta_train", seed)
        assert all(torch.equal(params[n], p) for n, p in net.named_parameters())


def test_a_factory_is_called_for_every_task_with_a_seed_of_its_own():
    def make():
        net = small_net()
        nn.init.constant_(net[2].bias, 7.0)
        return net

    own = family(module=make)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    (_, a), (_, b), (_, again) = (draw_task(own, "meta_train", seed) for seed in (0, 3, 0))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(a["0.weight"], b["0.weight"]) and torch.equal(a["0.weight"], again["0.weight"])
    assert a["2.bias"].item() == b["2.bias"].item() == 7.0


def test_frozen_parameters_and_buffers_are_constants():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 1), nn.Flatten(0))
    net[0].requires_grad_(False)
    net[1].running_mean.fill_(0.5)
    own = family(module=net)
    task, params = draw_task(own, "meta_train", 0)
    assert list(params) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    inputs = own.shared_data()["inputs"][:6]
    copied = copy.deepcopy(net)
    copied.load_state_dict({**net.state_dict(), **params})
    torch.testing.assert_close(own.outputs(params, {**task, **own.shared_data()}, inputs), copied(inputs).detach())


def test_batch_normalization_uses_the_statistics_of_the_batch():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Flatten(0))
    inputs, targets, _ = table()
    own = ModuleFamily(net, F.mse_loss, GroupedData(inputs, targets, np.arange(99) % 6))
    task, params = draw_task(own, "meta_train", 0)
    net.load_state_dict({**net.state_dict(), **params})
    rows = torch.arange(10)
    loss = own.loss(params, {**task, **own.shared_data()}, {"rows": rows})
    want = F.mse_loss(net(own.shared_data()["inputs"][rows]), own.shared_data()["targets"][rows])
    torch.testing.assert_close(loss, want.detach())
    with pytest.raises(
        ValueError, match="every group's held-out rows must be at least 2; got 32 and 1. Raise batch_size or"
    ):
        family(module=net)


class StepsInRows(nn.Module):
    """Normalizes every row's two steps, folded into the rows, and looks at what comes out of both."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        steps = torch.stack([x, x.flip(1)], dim=1)
        return self.last(torch.tanh(self.norm(self.first(steps).flatten(0, 1)))).reshape(-1, 2).sum(1)


class Channels(nn.Module):
    """Normalizes channels over rows and positions, twice by one layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2), nn.Linear(6, 1)
        self.again = self.norm

    def forward(self, x):
        y = self.norm(self.conv(x[:, None]))
        return self.last(self.again(torch.tanh(y)).flatten(1))[:, 0]


BATCH_NORMALIZED = {
    "rows": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)),
    "the layer alone": lambda: nn.BatchNorm1d(3),
    "steps folded into rows": StepsInRows,
    "positions": Channels,
}


@pytest.mark.parametrize("kind", list(BATCH_NORMALIZED))
def test_batch_normalization_of_groups_of_unequal_size_leaves_out_the_padding(kind):
    """Batched metrics against the module itself, in train mode, on each group's own held-out rows."""
    make, random = BATCH_NORMALIZED[kind], np.random.default_rng(1)
    groups = np.repeat(np.arange(10), [8, 30, 9, 12, 40, 13, 11, 25, 10, 22])
    inputs = random.normal(size=(len(groups), 3))
    targets = inputs if kind == "the layer alone" else inputs.sum(1)
    own = ModuleFamily(make, F.mse_loss, GroupedData(inputs, targets + 0.1, groups), batch_size=7)
    batched, seeds = BatchedFamily(own, dtype=torch.float64), [task_seed("meta_train", 2, i) for i in range(12)]
    stacked, params = batched.start("meta_train", seeds)
    params = params + 0.3 * torch.randn(params.shape, generator=torch.Generator().manual_seed(0), dtype=params.dtype)
    shared = own.shared_data()
    metrics = batched.eval_metrics(params, stacked)["test_loss"]
    batch = {n: v[0] for n, v in batched.batches(stacked, seeds, [0] * 12, 1).items()}
    losses = batched.losses(params, stacked, batch)
    assert len({int(n) for n in stacked["num_test"]}) >= 3
    for i in range(12):
        net = make().double()
        net.load_state_dict({**net.state_dict(), **batched.unflatten(params[i])})
        first = int(stacked["first_row"][i] + stacked["num_rows"][i])
        for rows, got in (
            (torch.arange(first, first + int(stacked["num_test"][i])), metrics[i]),
            (batch["rows"][i], losses[i]),
        ):
            want = F.mse_loss(net(shared["inputs"][rows].double()), shared["targets"][rows].double())
            torch.testing.assert_close(got, want.detach(), rtol=1e-10, atol=0)


def test_sampled_data_belongs_to_the_task():
    splits = []

    def sample(split, generator):
        splits.append(split)
        inputs = torch.randn(8, 3, generator=generator)
        return inputs, inputs.sum(1)

    own = ModuleFamily(small_net, F.mse_loss, sample, batch_size=4)
    task, params = draw_task(own, "meta_test", 2)
    assert splits[-1] == "meta_test"
    assert int(task["num_rows"]) == 6 and int(task["num_test"]) == 2
    assert draw_batches(own, task, 2, 0, 32)["rows"].max() == 5
    net = small_net()
    net.load_state_dict(params)
    want = F.mse_loss(net(task["inputs"][6:]), task["targets"][6:])
    torch.testing.assert_close(own.eval_metrics(params, {**task, **own.shared_data()})["test_loss"], want.detach())


class Frame:
    """The two things that `from_frame` asks of a table."""

    def __init__(self, columns):
        self.columns = list(columns)
        self._values = columns

    def __getitem__(self, name):
        return self._values[name]


def frame_of(columns, kind):
    return pytest.importorskip("pandas").DataFrame(columns) if kind == "pandas" else Frame(columns)


@pytest.mark.parametrize("kind", ["plain", "pandas"])
def test_from_frame(kind):
    inputs, targets, groups = table()
    frame = frame_of({"row": inputs[:, 0], "store": groups, "sold": targets, "count": np.arange(99)}, kind)
    data = GroupedData.from_frame(frame, group="store", target="sold")
    assert data.inputs.shape == (99, 2) and torch.equal(data.inputs[:, 0], data.inputs[:, 1])
    assert data.labels == GroupedData(inputs, targets, groups).labels
    assert GroupedData.from_frame(frame, group="store", target="sold", features=["row"]).inputs.shape == (99, 1)
    with pytest.raises(ValueError, match="group: the table has no column 'shop'; it has row, store, sold, count"):
        GroupedData.from_frame(frame, group="shop", target="sold")
    with pytest.raises(ValueError, match="features: the table has no column 'x'"):
        GroupedData.from_frame(frame, group="store", target="sold", features=["x"])
    with pytest.raises(ValueError, match="features must name at least one column"):
        GroupedData.from_frame(frame, group="store", target="sold", features=[])
    with pytest.raises(ValueError, match="features must be a list of columns; got 'row'"):
        GroupedData.from_frame(frame, group="store", target="sold", features="row")
    with pytest.raises(ValueError, match=r"features must not name the target, .*; got \['row', 'sold'\]"):
        GroupedData.from_frame(frame, group="store", target="sold", features=["row", "sold"])
    frame = frame_of({0: inputs[:, 0], 1: groups, 2: targets}, kind)
    numbered = GroupedData.from_frame(frame, group=1, target=2)
    assert numbered.labels == data.labels and torch.equal(numbered.inputs, data.inputs[:, :1])
    with pytest.raises(ValueError, match="target: the table has no column '2'; it has 0, 1, 2"):
        GroupedData.from_frame(frame, group=1, target="2")
    frame = frame_of({"row": inputs[:, 0], "store": groups, "sold": targets}, kind)
    with pytest.raises(
        ValueError, match="column 'store' must be numbers; got values of type .*Encode them as numbers first"
    ):
        GroupedData.from_frame(frame, group="row", target="sold", features=["store"])


def test_a_column_that_is_there_twice():
    class Doubled(Frame):
        columns = ("a", "a", "g", "t")

        def __init__(self):
            pass

    with pytest.raises(ValueError, match="features: the table has more than one column 'a'; it has a, a, g, t"):
        GroupedData.from_frame(Doubled(), group="g", target="t")


def test_what_is_no_table():
    with pytest.raises(ValueError, match="frame must be a table with named columns, .*; got ndarray. Give arrays to"):
        GroupedData.from_frame(np.zeros((9, 3)), group="g", target="t")


def test_groups_by_tensor_and_by_day():
    inputs, targets, _ = table()
    numbers = np.arange(99) % 6
    by_tensor = GroupedData(inputs, targets, torch.from_numpy(numbers))
    assert by_tensor.labels == GroupedData(inputs, targets, numbers).labels
    days = np.datetime64("2024-03-01", "ns") + numbers * np.timedelta64(1, "D")
    labels = sorted(day[:10] for split in GroupedData(inputs, targets, days).labels.values() for day in split)
    assert labels == [f"2024-03-0{i}" for i in range(1, 7)]


def test_dtypes():
    inputs, targets, groups = table()
    data = GroupedData(inputs.astype(np.float64), targets.astype(np.int32), groups)
    assert data.inputs.dtype == torch.float32 and data.targets.dtype == torch.int64
    assert (
        GroupedData(
            torch.arange(10, dtype=torch.int16), torch.zeros(10).bool(), [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
        ).inputs.dtype
        == torch.int64
    )


def with_nan():
    inputs, targets, groups = table()
    inputs[[5, 9], 1] = np.nan
    return inputs, targets, groups


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros((0, 3)), np.zeros(0), []), {}, r"inputs must have at least one row; got shape \(0, 3\)"),
        ((np.zeros((4, 3)), np.zeros(5), [0] * 4), {}, r"targets must have one entry per row of inputs \(4\); got 5"),
        (
            (np.zeros((4, 3)), np.zeros(4), [0] * 5),
            {},
            r"groups must have one entry per row of inputs \(4\); got shape \(5,\)",
        ),
        ((np.zeros((4, 3)), np.zeros(4), [0, 1, None, 1]), {}, "groups has a missing value in row 2; drop such rows"),
        ((np.zeros((3, 3)), np.zeros(3), [0.0, 1.0, np.nan]), {}, "groups has a missing value in row 2"),
        (
            (np.zeros((4, 3)), np.zeros(4), list("aabb")),
            {},
            "groups must name at least 3 groups of 2 rows or more.*; got 2",
        ),
        (
            with_nan(),
            {},
            "inputs must be finite; 2 of 99 rows hold NaN or infinity, the first in row 5. Fill in or drop",
        ),
        ((np.zeros((4, 3)), np.full(4, np.inf), list("aabb")), {}, "targets must be finite; 4 of 4 rows"),
        (
            (np.array([["x"]] * 4), np.zeros(4)),
            {},
            "inputs must be numbers; got values of type <U1 such as .*Encode them",
        ),
        (([[1, 2], [3]], np.zeros(2)), {}, "inputs must have rows of one length; "),
        ((torch.zeros(4, 3) * 1j, np.zeros(4)), {}, "inputs must be real numbers; got torch.complex64. Give real and"),
        ((np.zeros((5, 3)), np.zeros(5)), {}, "data without groups must have at least 6 rows; got 5"),
        (table(), {"test_share": 1.0}, "test_share must lie strictly between 0 and 1; got 1.0"),
        (table(), {"small_groups": "skip"}, "small_groups must be error or drop; got 'skip'"),
        (table(), {"seed": -1}, "seed must not be negative; got -1"),
    ],
)
def test_bad_data(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        GroupedData(*arguments, **options)


def test_groups_with_too_few_rows():
    groups = ["a", "a", "b", "b", "b", "c", "c", "lonely", "d", "d"]
    inputs, targets = np.zeros((10, 2)), np.zeros(10)
    with pytest.raises(
        ValueError, match=r"1 of 5 groups have fewer than 2 rows, for example lonely; .*small_groups='drop'"
    ):
        GroupedData(inputs, targets, groups)
    data = GroupedData(inputs, targets, groups, small_groups="drop")
    assert len(data.inputs) == 9 and sorted(n for s in SPLITS for n in data.labels[s]) == ["a", "b", "c", "d"]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        y = self.layer(x).flatten()
        return y if y.sum() > 0 else 2 * y


class Counts(Branches):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x).flatten()


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x @ self.weight


class FromNumpy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(np.random.default_rng().normal(size=3), dtype=torch.float32))

    def forward(self, x):
        return x @ self.weight


class Noisy(Branches):
    def forward(self, x):
        return F.dropout(self.layer(x), 0.5).flatten()


class Pair(Branches):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"init": "zeros"}, "init must be reset or module; got 'zeros'"),
        ({"test_share": 0.0}, "test_share must lie strictly between 0 and 1; got 0.0"),
        ({"data": 3}, r"data must be a GroupedData or a function \(split, generator\) -> \(inputs, targets\); got int"),
        ({"data": table()}, r"got tuple. Wrap arrays as GroupedData\(inputs, targets, groups\) and tables by Grouped"),
        ({"loss": "mse"}, r"loss must be a function \(outputs, targets\) -> scalar, such as .*; got 'mse'"),
        ({"loss": nn.MSELoss}, r"such as F.mse_loss or nn.MSELoss\(\); got <class '.*MSELoss'>"),
        ({"module": nn.Linear}, "makes the module failed when called without arguments: .*'in_features' and 'out_fe"),
        (
            {"module": nn.Sequential(nn.LazyLinear(1), nn.Flatten(0))},
            "module has a parameter of unknown shape, '0.weight'; give its layer its number of inputs",
        ),
        ({"module": 3}, "module must be a torch.nn.Module or a function that makes one; got int"),
        ({"module": lambda: 3}, "the function that makes the module must return a torch.nn.Module; got int"),
        ({"module": nn.Flatten(0)}, "module must have at least one parameter with requires_grad=True; it has none"),
        (
            {"module": Bare()},
            r"init='reset' cannot re-draw 'weight' of 'module' \(Bare has no reset_parameters\); give a function",
        ),
        ({"module": FromNumpy}, "module must make the same weights from the same torch seed"),
        (
            {"module": nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1))},
            r"module has dropout in '1' \(Dropout, rate 0.1\).*module.eval\(\)",
        ),
        (
            {"module": nn.LSTM(3, 4)},
            "LSTM in '' cannot be batched by torch.func.vmap; loop over time steps with nn.LSTMCell",
        ),
        ({"module": nn.Linear(4, 1)}, r"module failed on a batch of inputs, shape \(32, 3\) of float32: mat1 and mat2"),
        (
            {"data": GroupedData(np.arange(36).reshape(12, 3), np.zeros(12), list("abcd") * 3)},
            r"module failed on a batch of inputs, shape \(32, 3\) of int64: .*; layers other than embeddings want",
        ),
        ({"module": Pair()}, r"module must return one tensor with one row per row of inputs .*; got tuple"),
        ({"module": Counts()}, r"module changes its buffer 'calls' when it runs.*call module.eval\(\)"),
        (
            {"module": Noisy()},
            r"module or loss draws random numbers when it runs.*call module.eval\(\)",
        ),
        (
            {"loss": lambda o, t: (o - t).square().mean() * float(o.numpy().size)},
            r"can neither be batched by torch.func.vmap \(.*\) nor differentiated by torch.func.grad \(.*\); write",
        ),
        (
            {"module": nn.Linear(3, 1)},
            r"outputs, shape \(32, 1\) of float32, and targets, shape \(32,\) of float32.*nn.Flatten\(0\)",
        ),
        (
            {"loss": F.cross_entropy, "module": nn.Linear(3, 2)},
            "loss failed on outputs, .*Class losses want integer targets",
        ),
        (
            {"loss": nn.MSELoss(reduction="none")},
            r"loss must return a scalar tensor; got shape \(32,\). Reduce it, e.g. with .mean\(\)",
        ),
        ({"loss": lambda o, t: 1.0}, "loss must return a scalar tensor; got float"),
        ({"loss": lambda o, t: (o > t).sum()}, "loss must be a floating-point scalar; got torch.int64"),
        ({"data": lambda s, g: torch.zeros(3)}, r"must return a tuple \(inputs, targets\); got Tensor"),
        (
            {"data": lambda s, g: (torch.zeros(3, 3), torch.zeros(2))},
            "must have the same number of rows, at least 2; got 3 and 2",
        ),
        (
            {"data": lambda s, g: (torch.full((3, 3), float("nan")), torch.zeros(3))},
            "sampled inputs must be finite; 3 of 3 rows",
        ),
    ],
)
def test_what_does_not_fit_together(options, message):
    with pytest.raises(ValueError, match=message):
        family(**options)


def test_sampled_shapes_must_agree():
    def sample(split, generator):
        rows = int(torch.randint(3, 30, (), generator=generator))
        return torch.zeros(rows, 3), torch.zeros(rows)

    with pytest.raises(ValueError, match="sampled data must have the same shape for every task; got"):
        family(data=sample)


def test_eval_mode_makes_dropout_acceptable():
    net = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5), nn.Flatten(0)).eval()
    assert BatchedFamily(family(module=net)).num_parameters == 4


def huber_by_hand(outputs, targets):
    error = (outputs - targets).abs().mean()
    return error.square() if error < 1 else 2 * error - 1


@pytest.mark.parametrize("options", [{"module": Branches()}, {"loss": huber_by_hand}], ids=["module", "loss"])
def test_python_branches_run_one_by_one_with_equal_results(options):
    own = family(**options, batch_size=3)
    batched, seeds = BatchedFamily(own, dtype=torch.float64), [0, 3, 6]
    stacked, params = batched.start("meta_train", seeds)
    batch = {n: v[0] for n, v in batched.batches(stacked, seeds, [0] * 3, 1).items()}
    with pytest.warns(OneByOneWarning, match="module: loss cannot be batched .* 3 of them take 3 times as long"):
        losses, grads = batched.losses_and_grads(params, stacked, batch)
    metrics = batched.eval_metrics(params, stacked)
    shared = {n: v.double() if v.is_floating_point() else v for n, v in own.shared_data().items()}
    for i in range(3):
        task = {**{n: v[i] for n, v in stacked.items()}, **shared}
        leaf = params[i].clone().requires_grad_()
        loss = own.loss(batched.unflatten(leaf), task, {n: v[i] for n, v in batch.items()})
        torch.testing.assert_close(losses[i], loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grads[i], torch.autograd.grad(loss, leaf)[0], rtol=1e-12, atol=1e-14)
        want = own.eval_metrics(batched.unflatten(params[i]), task)["test_loss"]
        if "loss" in options:
            rows = int(task["first_row"] + task["num_rows"]) + torch.arange(int(task["num_test"]))
            outputs = own.outputs(batched.unflatten(params[i]), task, task["inputs"][rows])
            error = (outputs - task["targets"][rows]).abs()
            torch.testing.assert_close(want, torch.where(error < 1, error.square(), 2 * error - 1).mean())
        torch.testing.assert_close(metrics["test_loss"][i], want, rtol=1e-12, atol=0)


def test_shares_of_the_groups():
    data = GroupedData(*table(), shares=(1 / 3, 1 / 6, 1 / 2))
    assert [data.num_groups(s) for s in SPLITS] == [4, 2, 6]
    assert [GroupedData(*table(), shares=(0.02, 0.02, 0.96)).num_groups(s) for s in SPLITS] == [1, 1, 10]
    assert [GroupedData(*table(), shares=(0.02, 0.96, 0.02)).num_groups(s) for s in SPLITS] == [1, 10, 1]
    for bad in ((0.5, 0.5), (0.5, 0.5, 0.0), (0.5, 0.5, 0.5)):
        with pytest.raises(
            ValueError, match=r"shares must be 3 positive numbers with sum 1, for meta_train, .*; got \("
        ):
            GroupedData(*table(), shares=bad)


def test_judged_on_held_out_rows_and_trained_on_the_others():
    plain, judged = family(), family(judge="query")
    seed = task_seed("meta_train", 0, 1)
    task, params = draw_task(judged, "meta_train", seed)
    batches = draw_batches(judged, task, seed, 0, 64)
    torch.testing.assert_close(batches["rows"], draw_batches(plain, task, seed, 0, 64)["rows"])
    first_held_out = int(task["first_row"] + task["num_rows"])
    held_out = range(first_held_out, first_held_out + int(task["num_test"]))
    assert set(batches["query_rows"].flatten().tolist()) == set(held_out)
    whole = {**task, **judged.shared_data()}
    batch = {"rows": batches["rows"][0], "query_rows": torch.tensor(list(held_out))}
    torch.testing.assert_close(judged.query_loss(params, whole, batch), judged.eval_metrics(params, whole)["test_loss"])
    torch.testing.assert_close(judged.loss(params, whole, batch), plain.loss(params, whole, batch))
    assert plain.query_loss(params, whole, batch) is None
    assert BatchedFamily(judged).judged_apart and not BatchedFamily(plain).judged_apart
    assert plain.config()["judge"] == "support"
