"""Path parameters: identifiers, which end before the colon of a verb.

For example `/v1/jobs/{job_id}:cancel`.
"""

from typing import Annotated

from fastapi import Path
from starlette.convertors import Convertor, register_url_convertor


class IdentifierConvertor(Convertor[str]):
    """Identifier up to a slash or colon, so that `GET …:cancel` is a wrong method."""

    regex = "[^/:]+"

    def convert(self, value: str) -> str:
        """Decode the parameter."""
        return value

    def to_string(self, value: str) -> str:
        """Encode the parameter."""
        return value


register_url_convertor("identifier", IdentifierConvertor())

JOB, COMPARISON, TOKEN = r"^job-[0-9a-f]{1,12}$", r"^comparison-[0-9a-f]{1,12}$", r"^token-[0-9a-f]{1,12}$"
JobId = Annotated[str, Path(pattern=JOB, description="such as `job-3f9c2b7a10de`")]
ComparisonId = Annotated[str, Path(pattern=COMPARISON, description="such as `comparison-3f9c2b7a10de`")]
TokenId = Annotated[str, Path(pattern=TOKEN, description="such as `token-3f9c2b7a10de`")]
WebhookId = Annotated[str, Path(pattern=r"^webhook-[0-9a-f]{1,12}$", description="such as `webhook-3f9c2b7a10de`")]
