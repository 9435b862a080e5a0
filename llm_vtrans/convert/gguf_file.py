"""Writes a checkpoint as one GGUF file, tensor by tensor, with the `gguf` package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from llm_vtrans.convert.layouts import Layout, arranged, empty_ffn, gguf_name, layout_of
from llm_vtrans.errors import UserError
from llm_vtrans.loading.checkpoint import Checkpoint
from llm_vtrans.loading.source import check_known

TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
# Regular expressions of pre-tokenizers -> llama.cpp's name of them.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    LLAMA3_SPLIT: "llama-bpe",
    LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
}


def write_gguf(folder: Path, path: Path, dtype: str) -> None:
    """Converts a checkpoint.

    Args:
        folder: the checkpoint, in either layout.
        path: file to write.
        dtype: of the matrices, `auto` for the checkpoint's own; vectors are float32.

    Raises:
        UserError: model or tokenizer that llama.cpp does not know.
    """
    checkpoint = Checkpoint.open(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    layout = layout_of(config)
    tokenizer = TokenizerFields.read(folder, config.vocab_size)
    stored = next(i.dtype for n, i in checkpoint.tensors.items() if "embed_tokens" in n)
    name = str(stored).removeprefix("torch.") if dtype == "auto" else dtype
    if name not in TYPES:
        raise UserError(f"tensors of {name} cannot be written as GGUF: give --dtype float16")
    kind, file_type = TYPES[name]
    writer = gguf.GGUFWriter(path, layout.architecture)
    _write_fields(writer, config, layout, file_type, folder.resolve().name)
    tokenizer.write(writer)

    tensors: dict[str, Callable[[], Tensor]] = {
        gguf_name(n): lambda n=n: arranged(n, checkpoint.read(n), layout)  # type: ignore[misc]
        for n in checkpoint.tensors
    }
    for layer in layout.bare_attention:
        for n, tensor in empty_ffn(layer, config.hidden_size).items():
            tensors[n] = lambda tensor=tensor: tensor  # type: ignore[misc]
    for n, read in tensors.items():
        _announce(writer, n, read(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for read in tensors.values():
        writer.write_tensor_data(_encoded(read(), kind))
    writer.close()


def _encoded(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> Any:
    """A tensor's bytes: matrices in `kind`, vectors in float32."""
    values = tensor.to(torch.float32).numpy()
    return values if values.ndim < 2 else gguf.quants.quantize(values, kind)


def _announce(
    writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: gguf.GGMLQuantizationType
) -> None:
    data = _encoded(tensor, kind)
    raw = kind if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
    writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=raw)


def _write_fields(
    writer: gguf.GGUFWriter, config: Any, layout: Layout, file_type: gguf.LlamaFileType, name: str
) -> None:
    """Sizes and constants of the model."""
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(layout.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_rope_dimension_count(layout.head_dim)
    if layout.is_uniform:
        writer.add_head_count(layout.heads[0])
        writer.add_head_count_kv(layout.kv_heads[0])
        writer.add_feed_forward_length(layout.ffn[0])
    else:
        bare = layout.bare_attention
        writer.add_head_count(list(layout.heads))
        writer.add_head_count_kv(list(layout.kv_heads))
        writer.add_feed_forward_length([1 if i in bare else n for i, n in enumerate(layout.ffn)])
    _write_rope(writer, config)


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """Rotary base and scaling.

    Raises:
        UserError: a scaling that is not written here.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind != "default":
        raise UserError(f"rotary scaling {kind!r} is not written as GGUF yet")


class TokenizerFields:
    """A byte-level BPE tokenizer as GGUF stores it."""

    def __init__(self, tokens: list[str], types: list[int], merges: list[str], pre: str, ids: Any):
        self.tokens, self.types, self.merges, self.pre, self.ids = tokens, types, merges, pre, ids

    @classmethod
    def read(cls, folder: Path, vocab_size: int) -> TokenizerFields:
        """Reads `tokenizer.json`.

        Raises:
            UserError: not byte-level BPE, or a way to split text that llama.cpp does not know.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        try:
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: GGUF needs a tokenizer.json") from error
        model = content["model"]
        pre = _pre_tokenizer(content.get("pre_tokenizer"))
        if model["type"] != "BPE" or model.get("byte_fallback") or pre is None:
            raise UserError(
                f"{folder}: only byte-level BPE tokenizers split as GPT-2, Llama 3 or Qwen 2 do "
                "are written as GGUF so far"
            )
        check_known(folder, "token", max(model["vocab"].values()), vocab_size)
        tokens = [f"[PAD{i}]" for i in range(vocab_size)]
        types = [int(gguf.TokenType.UNUSED)] * vocab_size
        for token, index in model["vocab"].items():
            tokens[index], types[index] = token, int(gguf.TokenType.NORMAL)
        for added in content.get("added_tokens", []):
            if added["id"] >= vocab_size:  # padding, say: the model has no row for it
                continue
            is_control = added["special"]
            kind = gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED
            tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        pad = tokenizer.pad_token_id
        ids = {
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "pad": pad if pad is not None and pad < vocab_size else None,
            "adds_bos": tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id],
        }
        return cls(tokens, types, merges, pre, ids)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Adds the tokenizer's fields."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        if self.ids["bos"] is not None:
            writer.add_bos_token_id(self.ids["bos"])
        if self.ids["eos"] is not None:
            writer.add_eos_token_id(self.ids["eos"])
        if self.ids["pad"] is not None:
            writer.add_pad_token_id(self.ids["pad"])
        writer.add_add_bos_token(self.ids["adds_bos"])


def _pre_tokenizer(spec: Any) -> str | None:
    """llama.cpp's name of a pre-tokenizer, None for those it does not know."""
    if not isinstance(spec, dict):
        return None
    if spec["type"] == "ByteLevel":
        return "gpt-2" if spec.get("use_regex", True) else None
    parts = spec.get("pretokenizers", [])
    if spec["type"] == "Sequence" and [p["type"] for p in parts] == ["Split", "ByteLevel"]:
        return PRE_TOKENIZERS.get(parts[0]["pattern"].get("Regex", ""))
    return None
