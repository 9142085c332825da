"""What torch does without its compiler loaded, and that whoever needs it afterwards finds the real one, once."""

from __future__ import annotations

import subprocess
import sys

import pytest

_TRAIN = """
import sys, os, tempfile
import torch
from torch import nn
from distkd.engines.compiler import postpone_compiler
postpone_compiler()
torch.distributed.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
def step():
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state_dict()
step()
assert not any(name.startswith("torch._dynamo.") for name in sys.modules), "loaded"
"""
_ONCE = """
step()
import torch._dynamo
names = [name for name in sys.modules if name.startswith("torch._dynamo.") and name.count(".") == 2]
assert len(names) > 50, names
for name in names:
    inner = getattr(torch._dynamo, name.rpartition(".")[2])
    assert not hasattr(inner, "__spec__") or inner is sys.modules[name], name
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.__file__
torch.distributed.destroy_process_group()
"""


def _run(*parts: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(parts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "needs",
    [
        "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item() == 2",
        "from torch._dynamo.exc import Unsupported; import torch._dynamo as d; assert d.exc.Unsupported is Unsupported",
        "assert torch._dynamo.utils.counters is not None",
    ],
    ids=["compile", "import", "attribute"],
)
def test_steps_do_without_the_compiler_and_who_needs_it_gets_the_real_one(needs: str):
    _run(_TRAIN, needs, _ONCE)


def test_the_real_one_stays_where_it_is_loaded_already():
    postpone = "from distkd.engines.compiler import postpone_compiler; postpone_compiler()"
    _run(f"import sys, torch, torch._dynamo as real; {postpone}; assert sys.modules['torch._dynamo'] is real")
