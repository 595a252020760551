"""A run's theta for use outside wardround: safetensors, PyTorch, ONNX, MONAI; each is loaded again and compared."""

from server.export.write import Exported, Format, export_run

__all__ = ["Exported", "Format", "export_run"]
