"""Language models for TensorRT: a decoder graph with static scales, or a checkpoint in ModelOpt's layout."""

from exporters.tensorrt.language.export import export_language
from exporters.tensorrt.language.options import Calibration, LanguageExportOptions, LanguageFormat
from exporters.tensorrt.language.plan import LANGUAGE_KIND, LanguagePlan, is_language_artifact, plan_language

__all__ = [
    "LANGUAGE_KIND",
    "Calibration",
    "LanguageExportOptions",
    "LanguageFormat",
    "LanguagePlan",
    "export_language",
    "is_language_artifact",
    "plan_language",
]
