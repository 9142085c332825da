"""DeepSpeed brought into a process: imported without its habit of compiling, and started in the group that there is."""

# DeepSpeed is not typed
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from distkd.base import World
from distkd.errors import ConfigError

__all__ = ["forget", "import_quietly", "join"]


def import_quietly(device: torch.device) -> Any:
    """DeepSpeed for this kind of device, without its habit of compiling.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it guesses, and warns, otherwise
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            import deepspeed.ops

            _compile_nothing(deepspeed)
    except ImportError as error:
        raise ConfigError(
            f"engine.name is deepspeed, but it cannot be imported ({error}); pip install 'distkd[deepspeed]', or use "
            "engine.name=ddp or fsdp"
        ) from error
    return deepspeed


def _compile_nothing(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling what is not used here.

    On a CPU each process would build an operator for inference, a minute the first time; it is told that this machine
    cannot. Answered before it is asked, the question starts no compiler either to find out what else would be possible.
    And decorating the Muon optimizer, which every start imports, would load torch's compiler, four seconds.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    from deepspeed.runtime import compiler

    before, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        compiler.compile = before


def join(world: World, device: torch.device) -> None:
    """Let DeepSpeed start in the process group that there is.

    It would clone the group, with a timeout of its own, so it is handed ours. It needs one in a world of one, too.
    """
    from deepspeed.utils import groups

    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if not dist.is_initialized():
        assert world.size == 1, world
        on_cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=dist.HashStore(),  # pyright: ignore[reportPrivateImportUsage]
            rank=0,
            world_size=1,
            device_id=device if on_cuda else None,
        )
    assert dist.get_world_size() == world.size, (dist.get_world_size(), world)
    forget()
    groups._WORLD_GROUP = dist.group.WORLD  # pyright: ignore[reportPrivateUsage]


def forget() -> None:
    """Clear what earlier engines left in DeepSpeed's modules: groups that may be gone, and the modules of stage 3.

    It also numbers parameters and modules over all engines of a process; these numbers must be equal on all ranks.
    """
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    comm.cdb = None
    groups._release_process_group_references()  # pyright: ignore[reportPrivateUsage]
    FWD_MODULE_STACK.clear()
    Init.param_id = 0
    counter: Any = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__  # pyright: ignore[reportPrivateUsage]
    counter[0][0] = 0
