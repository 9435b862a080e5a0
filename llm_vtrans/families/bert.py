"""BERT: post-norm encoder with LayerNorm, absolute positions, token types, biases everywhere.

A post-norm's output is the residual stream, so the hidden mask acts there. `Encoder`
holds what BERT and its descendants with the same layers share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from llm_vtrans.errors import UserError
from llm_vtrans.families.base import (
    Architecture,
    Axis,
    Dim,
    Family,
    Norm,
    Role,
    Stream,
    Sublayer,
    TensorSpec,
    head_of,
    register,
)
from llm_vtrans.families.layouts import Fields, coupled_per_layer_config, coupled_stock_config

ENCODER = "encoder.layer.{}."
IGNORED = (
    ".embeddings.position_ids", ".pooler.dense.weight", ".pooler.dense.bias",
    "cls.seq_relationship.weight", "cls.seq_relationship.bias", ".decoder.bias",
)  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """The rows of an encoder and of its heads.

    Attributes:
        config: parsed by `transformers`.
        prefix: of the base model's tensors, with its dot.
    """

    config: Any
    prefix: str

    @property
    def hidden(self) -> Dim:
        """The residual stream, and whatever must be as wide as it."""
        return Dim(self.config.hidden_size, Axis.HIDDEN)

    def dense(
        self, path: str, out: Dim, into: Dim, stream: Stream, part: Sublayer | None = None,
        positions: int | None = None,
    ) -> tuple[TensorSpec, ...]:  # fmt: skip
        """Weight and bias of a linear layer; only a write's bias touches the stream."""
        bias = stream if stream is Stream.JOINS else Stream.APART
        return (
            TensorSpec(f"{path}.weight", (out, into), stream, part, positions=positions),
            TensorSpec(f"{path}.bias", (out,), bias, part),
        )

    def post_norm(self, path: str, part: Sublayer | None) -> tuple[TensorSpec, ...]:
        """A norm whose output is the stream."""
        leaves = ("weight", "bias")
        return tuple(
            TensorSpec(f"{path}.{leaf}", (self.hidden,), Stream.RENEWS, part) for leaf in leaves
        )

    def head_norm(self, path: str) -> tuple[TensorSpec, ...]:
        """A norm inside a head."""
        return (
            TensorSpec(f"{path}.weight", (self.hidden,), Stream.SCALES),
            TensorSpec(f"{path}.bias", (self.hidden,), Stream.SHIFTS),
        )

    def embeddings(self) -> tuple[TensorSpec, ...]:
        """The three tables, tokens first, and their norm."""
        prefix, config = f"{self.prefix}embeddings.", self.config
        tables = {
            "word": config.vocab_size,
            "position": config.max_position_embeddings,
            "token_type": config.type_vocab_size,
        }
        rows = tuple(
            TensorSpec(
                f"{prefix}{name}_embeddings.weight", (Dim(size), self.hidden), Stream.JOINS,
                is_lookup=True,
            )
            for name, size in tables.items()
        )  # fmt: skip
        return *rows, *self.post_norm(f"{prefix}LayerNorm", None)

    def layers(self) -> tuple[TensorSpec, ...]:
        """One transformer layer."""
        prefix = self.prefix + ENCODER
        attention, feed = Sublayer.ATTENTION, Sublayer.FFN
        ffn = Dim(self.config.intermediate_size, Axis.FFN)
        roles = {"query": Role.QUERY, "key": Role.KEY, "value": Role.VALUE}
        mixed = Dim(self.config.hidden_size, Axis.HEADS, (Role.OUTPUT,))
        inputs = [
            self.dense(
                f"{prefix}attention.self.{name}",
                Dim(self.config.hidden_size, Axis.HEADS, (role,)),
                self.hidden, Stream.READS, attention,
            )
            for name, role in roles.items()
        ]  # fmt: skip
        output = f"{prefix}attention.output"
        return (
            *(row for rows in inputs for row in rows),
            *self.dense(f"{output}.dense", self.hidden, mixed, Stream.JOINS, attention),
            *self.post_norm(f"{output}.LayerNorm", attention),
            *self.dense(f"{prefix}intermediate.dense", ffn, self.hidden, Stream.READS, feed),
            *self.dense(f"{prefix}output.dense", self.hidden, ffn, Stream.JOINS, feed),
            *self.post_norm(f"{prefix}output.LayerNorm", feed),
        )

    def pooled(self, dense: str, classifier: str, num_labels: int) -> tuple[TensorSpec, ...]:
        """A layer as wide as the stream on the first token, and a classifier behind it."""
        return (
            *self.dense(dense, self.hidden, self.hidden, Stream.READS, positions=1),
            *self.dense(classifier, Dim(num_labels), self.hidden, Stream.TAKES, positions=1),
        )

    def masked_lm(self, dense: str, norm: str, decoder: str, bias: str) -> tuple[TensorSpec, ...]:
        """Transform, norm and a decoder that is usually the token table."""
        vocab = Dim(self.config.vocab_size)
        rows = (
            *self.dense(dense, self.hidden, self.hidden, Stream.READS),
            *self.head_norm(norm),
            TensorSpec(bias, (vocab,)),
        )
        if self.config.tie_word_embeddings:
            return rows
        return *rows, *self.dense(decoder, vocab, self.hidden, Stream.TAKES)

    def spans(self) -> tuple[TensorSpec, ...]:
        """Start and end of an answer, at every position."""
        return self.dense("qa_outputs", Dim(self.config.num_labels), self.hidden, Stream.READS)

    def architecture(
        self, head: tuple[TensorSpec, ...], final_norm: str, tied_head: str | None, positions: int
    ) -> Architecture:
        """The whole table.

        Raises:
            UserError: a decoder, or positions that are not absolute.
        """
        config = self.config
        if config.is_decoder or config.add_cross_attention:
            raise UserError(f"{config.model_type} as a decoder is not supported")
        if getattr(config, "position_embedding_type", "absolute") != "absolute":
            raise UserError(f"{config.model_type}: only absolute positions are supported")
        return Architecture(
            num_layers=config.num_hidden_layers,
            num_units={
                Axis.HIDDEN: config.hidden_size,
                Axis.HEADS: config.num_attention_heads,
                Axis.FFN: config.intermediate_size,
            },
            tensors=(*self.embeddings(), *self.layers(), *head),
            final_norm=final_norm,
            tied_head=tied_head if config.tie_word_embeddings else None,
            max_positions=positions,
            norm=Norm.LAYER,
            couples_heads=True,
        )


def _describe(config: Any) -> Architecture:
    encoder, head = Encoder(config, "bert."), head_of(config)
    transform, final_norm, tied = "cls.predictions.transform", "", None
    if head == "ForMaskedLM":
        final_norm, tied = f"{transform}.LayerNorm.weight", "cls.predictions.decoder.weight"
        rows = encoder.masked_lm(
            f"{transform}.dense", f"{transform}.LayerNorm", "cls.predictions.decoder",
            "cls.predictions.bias",
        )  # fmt: skip
    elif head in ("ForSequenceClassification", "ForMultipleChoice"):
        num_labels = 1 if head == "ForMultipleChoice" else config.num_labels
        rows = encoder.pooled("bert.pooler.dense", "classifier", num_labels)
    elif head == "ForQuestionAnswering":
        rows = encoder.spans()
    else:
        raise UserError(f"Bert{head} is not supported")
    return encoder.architecture(rows, final_norm, tied, config.max_position_embeddings)


BERT = register(
    Family(
        model_types=("bert",),
        describe=_describe,
        stock_config=partial(coupled_stock_config, names=Fields()),
        per_layer_config=partial(coupled_per_layer_config, names=Fields()),
        ignored=IGNORED,
        base_prefix="bert.",
        renames=((".gamma", ".weight"), (".beta", ".bias")),
    )
)
