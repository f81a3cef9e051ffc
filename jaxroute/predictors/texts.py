"""The prompts' texts of a bank."""

from __future__ import annotations

from pathlib import Path

from jaxroute.banks.tables import Table
from jaxroute.errors import UserError


def texts_of(table: Table, folder: Path) -> list[str]:
    """Return the text of each prompt; `folder` names the table in messages.

    Raises:
        UserError: the table has no texts, or a row has none.
    """
    path = folder / "queries.parquet"
    if "prompt" not in table.queries.columns:
        raise UserError(
            f"{path} has no column 'prompt', and a predictor needs the prompts' text: add it, or build the bank with "
            "python -m jaxroute bank build"
        )
    prompts = table.queries["prompt"].tolist()
    for row, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise UserError(f"{path}, row {row}: prompt is {prompt!r}, which is not text: correct the table")
    return prompts
