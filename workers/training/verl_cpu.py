"""verl's platform plug-in for machines without an accelerator.

`VERL_PLATFORM=cpu` with `VERL_USE_EXTERNAL_MODULES=workers.training.verl_cpu` makes `import verl` load and
choose it: verl has no CPU platform of its own and takes "cuda" where it finds no device.
"""

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Whatever a CPU does not need to be told."""


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _device_module() -> ModuleType:
    """`torch.cpu` plus the functions of `torch.cuda` that verl calls on whatever device it has."""
    module = ModuleType("workers.training.verl_cpu.device")
    vars(module).update({name: value for name, value in vars(torch.cpu).items() if name[0] != "_"})
    of_memory = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    without_effect = ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device")
    vars(module).update(dict.fromkeys(of_memory, _zero) | dict.fromkeys(without_effect, _nothing))
    vars(module).update(
        mem_get_info=lambda *args: (0, 0),
        get_device_name=lambda *args: "CPU",
        get_rng_state=lambda *args: torch.get_rng_state(),  # of a device, which torch's own has not
        set_rng_state=lambda state, *args: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
    )
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """The CPU as verl's device."""

    device_name = vendor_name = "cpu"  # properties in the base; a plain value reads the same
    device_module = _device_module()
    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"  # no index: both `Tensor.to` and `torch.device` take the name

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> AbstractContextManager[None]:
        return nullcontext()

    def ray_resource_name(self) -> str:
        return "GPU"  # in no bundle: verl names it there with use_gpu=True only

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False
