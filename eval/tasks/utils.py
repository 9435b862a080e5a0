"""Data preparation for the offline tasks; the harness loads this file by its path."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict


def split_articles(text: str) -> list[str]:
    """Split WikiText at its top-level headings (`= Title =`).

    This is the rule of EleutherAI/wikitext_document_level, which the harness's own
    `wikitext` task reads: 62 articles in the test split.
    """
    articles: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            articles.append([])
        articles[-1].append(line)
    return [article for lines in articles if (article := "\n".join(lines)).strip()]


def wikitext_articles(dataset: Dataset) -> Dataset:
    """Make one document (`page`) of each article of a file read whole (`text`)."""
    pages = [article for text in dataset["text"] for article in split_articles(text)]
    return Dataset.from_dict({"page": pages})


def embedded_heldout(**_metadata: Any) -> DatasetDict:
    """Return the held-out documents of the embedded corpus as the split `test`."""
    # Here and not above, so that the other tasks need no installed package.
    from llm_vtrans.embedded.corpus import heldout_documents

    return DatasetDict(test=Dataset.from_dict({"text": heldout_documents()}))
