"""A run that is saved and resumed in somebody's trainer ends as one that was not."""

from __future__ import annotations

import pytest
import torch
import torchrun
from optimizer_cases import artifact_of, assert_same, copies, train
from torch import nn

from learned_opt import LearnedOptimizer, save_artifact

WEIGHTS = artifact_of("rnnprop")


def network():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return model


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 3, generator=generator), torch.randint(0, 2, (48,), generator=generator)


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, inputs, labels):
            return {"loss": nn.functional.cross_entropy(self.body(inputs), labels)}

    data = [{"inputs": x, "labels": y} for x, y in zip(*rows())]

    def trainer(folder, **kwargs):
        model = Classifier()
        arguments = transformers.TrainingArguments(
            str(folder),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            save_strategy="steps",
            save_steps=5,
            report_to=[],
            use_cpu=True,
            seed=0,
            disable_tqdm=True,
            warmup_steps=2,
            **kwargs,
        )
        optimizer = LearnedOptimizer(model.parameters(), WEIGHTS)
        return transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.state.global_step == whole.state.global_step == 12
    assert_same(whole.model.parameters(), resumed.model.parameters())


@pytest.mark.filterwarnings("ignore")  # Accelerate's own
def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    data = torch.utils.data.TensorDataset(*rows())

    def prepare():
        model = network()
        optimizer = LearnedOptimizer(model.parameters(), WEIGHTS)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        return accelerator.prepare(model, optimizer, loader, scheduler)

    def epoch(model, optimizer, loader, scheduler):
        for inputs, targets in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(inputs), targets))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()

    run = prepare()
    epoch(*run)
    accelerator.save_state(str(tmp_path))
    epoch(*run)
    want = copies(run[0].parameters())
    accelerator.load_state(str(tmp_path))
    epoch(*run)
    assert_same(want, run[0].parameters())


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.parametrize("automatic", [True, False])
def test_lightning(tmp_path, automatic):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = network()
            self.automatic_optimization = automatic

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self.body(batch[0]), batch[1])
            if automatic:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def configure_optimizers(self):
            optimizer = LearnedOptimizer(self.parameters(), WEIGHTS)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

    data = torch.utils.data.TensorDataset(*rows())

    def fit(num_epochs, **kwargs):
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=num_epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8), **kwargs)
        return module, trainer

    whole, _ = fit(4)
    _, half = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, ckpt_path=str(tmp_path / "half.ckpt"))
    assert_same(whole.parameters(), resumed.parameters())


SCRIPT = """
import sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from integrations.test_trainers import network
from learned_opt import LearnedOptimizer
from optimizer_cases import train

action = sys.argv[1]
dist.init_process_group("gloo")
model = network()
fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = LearnedOptimizer(model.parameters(), "net.safetensors")
if action == "load":
    states = get_state_dict(model, optimizer)
    dcp.load(dict(zip("mo", states)), checkpoint_id="checkpoint")
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
train(model, optimizer, 3, start=0 if action == "save" else 3)
if action == "save":
    dcp.save(dict(zip("mo", get_state_dict(model, optimizer))), checkpoint_id="checkpoint")
full = [param.full_tensor().detach() for param in model.parameters()]
if dist.get_rank() == 0:
    torch.save(full, f"{action}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_fsdp2_checkpoint_across_numbers_of_ranks(tmp_path):
    save_artifact(tmp_path / "net.safetensors", WEIGHTS.rule, WEIGHTS.theta)
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    for action, num_ranks in (("save", 2), ("load", 1)):
        done = torchrun.run(torchrun.command(num_ranks, "script.py", action), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    reference = network()
    optimizer = LearnedOptimizer(reference.parameters(), WEIGHTS)
    for action in ("save", "load"):
        train(reference, optimizer, 3, start=0 if action == "save" else 3)
        # Sharding changes in what order gradients are summed, so that the last bits may differ.
        assert_same(torch.load(tmp_path / f"{action}.pt"), reference.parameters(), exact=False, rtol=1e-4, atol=1e-6)
