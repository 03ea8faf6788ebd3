"""The recipes of docs/integrations.md, run as they stand."""

from __future__ import annotations

import os
import re
from pathlib import Path

import fork_server
import pytest
import torch
from optimizer_cases import artifact_of

from learned_opt import save_artifact

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
PACKAGES = {"transformers", "accelerate", "lightning"}
SECTIONS = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
(PRELUDE,) = CODE.findall(SECTIONS[0])
RECIPES = {title: CODE.findall(text)[0] for title, text in zip(SECTIONS[1::2], SECTIONS[2::2])}
ALONE = [title for title, code in RECIPES.items() if "destroy_process_group" not in code]
TOGETHER = [title for title in RECIPES if title not in ALONE]

CHECK_RANKS = """
whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
first = torch.cat([p.reshape(-1) for p in whole])
others = [torch.empty_like(first) for _ in range(dist.get_world_size())]
dist.all_gather(others, first.detach())
assert len(others) == 2 and all(torch.equal(first, other) for other in others)
assert not torch.equal(first, torch.cat([p.reshape(-1) for p in untouched.parameters()]))
print("ranks agree")
"""


# Accelerate turns its FSDP mode on for GPUs alone; what it does in that mode works on CPUs.
SHARD_ON_CPU = """
from accelerate.utils import DistributedType
accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
accelerator.state._shared_state["fsdp_plugin"] = plugin
assert accelerator.is_fsdp2
"""


def needs(code):
    """The packages of the extra that a recipe imports."""
    return [name for name in PACKAGES if re.search(rf"^(import|from) {name}\b", code, re.MULTILINE)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = artifact_of("compact")
    save_artifact(tmp_path / "optimizer.safetensors", made.rule, made.theta)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_has_them_all():
    assert len(RECIPES) >= 18
    assert {name for code in RECIPES.values() for name in needs(code)} == PACKAGES


@pytest.mark.filterwarnings("ignore")  # other packages' own
@pytest.mark.parametrize("title", ALONE)
def test_recipe(title, folder):
    for package in needs(RECIPES[title]):
        pytest.importorskip(package)
    names: dict = {"__name__": "recipe"}
    exec(compile(PRELUDE, "prelude", "exec"), names)
    if "embedding" not in RECIPES[title]:
        before = [p.detach().clone() for p in names["model"].parameters()]
        params = names["model"].parameters
    torch._dynamo.reset()
    exec(compile(RECIPES[title], title, "exec"), names)
    if "embedding" in RECIPES[title]:
        assert names["optimizer"].state[names["readout"].weight]["step"] == 1
    else:
        assert all(torch.isfinite(p).all() and not torch.equal(p, b) for p, b in zip(params(), before))


@pytest.mark.parametrize("title", TOGETHER)
def test_recipe_on_two_ranks(title, folder):
    for package in needs(RECIPES[title]):
        pytest.importorskip(package)
    checks = CHECK_RANKS
    if "FSDP2" in title:
        checks += "assert all(hasattr(p, 'full_tensor') for p in model.parameters()), 'not sharded'\n"
    code = RECIPES[title].replace("dist.barrier()\n", checks + "dist.barrier()\n")
    code = code.replace("Accelerator(fsdp_plugin=plugin)\n", "Accelerator(fsdp_plugin=plugin)\n" + SHARD_ON_CPU)
    assert CHECK_RANKS in code
    prelude = PRELUDE + "import copy\nuntouched = copy.deepcopy(model)\n"
    Path("recipe.py").write_text(prelude + code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "recipe.py"]
    done = fork_server.run(*launch, cwd=folder, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ranks agree") == 2
