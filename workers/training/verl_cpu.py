"""verl's platform plug-in for machines without an accelerator.

`VERL_PLATFORM=cpu` with `VERL_USE_EXTERNAL_MODULES=workers.training.verl_cpu` makes `import verl` load and
choose it (verl has no CPU platform of its own and takes "cuda" where it finds no device). Collectives go
through gloo; memory figures of the device are 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _device_module() -> ModuleType:
    """`torch.cpu` plus the functions of `torch.cuda` that verl calls on whatever device it has."""
    module = ModuleType("workers.training.verl_cpu.device")
    vars(module).update({name: value for name, value in vars(torch.cpu).items() if name[0] != "_"})

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    of_memory = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    vars(module).update(dict.fromkeys(of_memory, zero))
    without_effect = ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device")
    vars(module).update(dict.fromkeys(without_effect, nothing))
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
    """The CPU as verl's device. `current_device` is the string "cpu", which both `Tensor.to` and
    `torch.device` take."""

    _module = _device_module()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return self._module

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None
