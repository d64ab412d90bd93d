"""CT-MoE: a 2D multimodal model that reads whole CT volumes.

Names are imported on first use, so that `import ct_moe` (and with it `ct-moe --help`) loads neither torch nor
transformers. The first model, processor or pipeline class that is used registers all of them with the library's Auto
classes: then this package's own code runs, and only `pipeline()` needs `trust_remote_code`.
"""

from functools import cache
from importlib import import_module


__version__ = "0.1.0"

_MODULES = {
    "configuration_ct_moe": ["CTMoEConfig", "CTMoEVisionConfig", "CTMoEVolumeEncoderConfig"],
    "image_processing_ct_moe": ["CTMoEImageProcessor"],
    "modeling_ct_moe": [
        "CTMoEForConditionalGeneration",
        "CTMoEModel",
        "CTMoEPreTrainedModel",
        "CTMoEVisionModel",
        "CTMoEVolumeEncoder",
    ],
    "pipeline_ct_moe": ["CTReportPipeline"],
    "processing_ct_moe": ["CTMoEProcessor"],
    "routing_ct_moe": ["routing_maps", "routing_statistics"],
}
_LIGHT_MODULES = {
    "errors_ct_moe": [
        "CTMoEError",
        "ConversionError",
        "DataError",
        "ModelError",
        "PromptError",
        "PublishError",
        "TrainingError",
        "VolumeError",
    ],
    "volume_io_ct_moe": ["Volume", "load_volume"],
}
_MODULE_OF = {name: module for module, names in {**_MODULES, **_LIGHT_MODULES}.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULE_OF[name]
    if module in _MODULES:
        _register_auto_classes()
    return getattr(import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


@cache
def _register_auto_classes() -> None:
    import transformers
    from transformers.pipelines import PIPELINE_REGISTRY

    classes = {}
    for module, names in _MODULES.items():
        loaded = import_module(f".{module}", __name__)
        classes.update({name: getattr(loaded, name) for name in names})
    config, model = classes["CTMoEConfig"], classes["CTMoEForConditionalGeneration"]
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoModel.register(config, model, exist_ok=True)
    transformers.AutoModelForImageTextToText.register(config, model, exist_ok=True)
    transformers.AutoImageProcessor.register(
        config, image_processor_classes={"pil": classes["CTMoEImageProcessor"]}, exist_ok=True
    )
    transformers.AutoProcessor.register(config, classes["CTMoEProcessor"], exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(
        "ct-report",
        pipeline_class=classes["CTReportPipeline"],
        pt_model=transformers.AutoModelForImageTextToText,
        type="multimodal",
    )
