"""Registry of execution providers.

To add one, write a module that creates a :class:`~cbedge.backends.provider.Provider`, and add an entry here.
"""

from cbedge.arguments import check_type
from cbedge.backends.ort_cuda import CUDA
from cbedge.backends.ort_decoder import OnnxDecoder
from cbedge.backends.provider import Provider, check_runtime
from cbedge.errors import DeviceError, install_extra

CPU = Provider(
    device="cpu",
    name="CPUExecutionProvider",
    new_decoder=OnnxDecoder,
    install=f"the installed ONNX Runtime has no CPU kernels; type: {install_extra('cpu')}",
    is_repeatable=True,
    failure="ONNX Runtime could not start on the CPU; type: pip install --force-reinstall onnxruntime",
)
PROVIDERS = {provider.device: provider for provider in (CUDA, CPU)}  # ``auto`` selects the first one that can run
DEVICES = ("auto", *sorted(PROVIDERS))


def choose_device(name: str) -> str:
    """Resolve a device name; ``auto`` is the first of :data:`PROVIDERS` that ONNX Runtime and the machine support.

    Raises:
        DeviceError: the name is unknown, or the installed ONNX Runtime does not support the device.
    """
    check_runtime()
    check_type("device", name, str, "text", DeviceError)
    if name not in DEVICES:
        raise DeviceError(f"unknown device {name[:20]!r}; give one of: {', '.join(DEVICES)}")
    if name == CPU.device:
        return name
    import onnxruntime

    built_for = onnxruntime.get_available_providers()
    if name == "auto":
        return next(p.device for p in PROVIDERS.values() if p is CPU or (p.name in built_for and p.has_hardware()))
    if PROVIDERS[name].name not in built_for:
        raise DeviceError(PROVIDERS[name].install)
    return name
