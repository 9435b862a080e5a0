"""Model families: importing this package registers every adapter."""

from llm_vtrans.families import bert as bert
from llm_vtrans.families import gemma as gemma
from llm_vtrans.families import gpt2 as gpt2
from llm_vtrans.families import gqa_decoder as gqa_decoder
from llm_vtrans.families import roberta as roberta
from llm_vtrans.families.base import Architecture, Axis, Family, Shape, Sublayer, family_for

__all__ = ["Architecture", "Axis", "Family", "Shape", "Sublayer", "family_for"]
