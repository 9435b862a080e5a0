"""Model families: importing this package registers every adapter."""

from llm_vtrans.families import gqa_decoder as gqa_decoder
from llm_vtrans.families.base import Architecture, Axis, Family, Shape, Sublayer, family_for

__all__ = ["Architecture", "Axis", "Family", "Shape", "Sublayer", "family_for"]
