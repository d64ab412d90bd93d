"""CT-MoE: a 2D multimodal model that reads whole CT volumes.

Names are imported on first use, so that `import ct_moe` (and with it `ct-moe --help`) loads neither torch nor
transformers.
"""

from importlib import import_module


__version__ = "0.1.0"

_MODULES = {
    "configuration_ct_moe": ["CTMoEConfig", "CTMoEVisionConfig"],
    "errors_ct_moe": ["CTMoEError", "ConversionError", "ModelError", "PromptError", "VolumeError"],
    "image_processing_ct_moe": ["CTMoEImageProcessor"],
    "modeling_ct_moe": [
        "CTMoEForConditionalGeneration",
        "CTMoEModel",
        "CTMoEPreTrainedModel",
        "CTMoEVisionModel",
    ],
    "pipeline_ct_moe": ["CTReportPipeline"],
    "processing_ct_moe": ["CTMoEProcessor"],
    "volume_io_ct_moe": ["Volume", "VolumeWarning", "load_volume"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
