"""Schemas of webhooks."""

from datetime import datetime
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, field_validator

from service.api.schemas.names import Examples
from service.domain.jobs import JobState
from service.domain.submission import Tag
from service.domain.webhooks import Threshold
from trainer.jobspec import FrozenModel

THRESHOLD = {"metric": "accuracy", "relation": "at_least", "bound": 0.9}
ENDS = [state for state in JobState if state.is_terminal]


class MakeWebhook(FrozenModel):
    """Request for a new webhook."""

    EXAMPLES: ClassVar[Examples] = {
        "of two ends and a threshold, for the jobs with a tag": {
            "url": "https://example.org/hooks/training",
            "states": ["succeeded", "failed"],
            "thresholds": [THRESHOLD],
            "tag": "nightly",
        },
        "of all ends": {"url": "https://example.org/hooks/training"},
    }

    url: Annotated[HttpUrl, Field(strict=False)] = Field(
        description="where messages are sent to, by POST: a public https:// address; answers 2xx once it "
        "has a message"
    )
    states: Annotated[list[Annotated[JobState, Field(strict=False)]], Field(max_length=len(ENDS))] = Field(
        ENDS, description="terminal states of jobs to report"
    )
    thresholds: Annotated[list[Threshold], Field(max_length=10)] = Field(
        [], description="values of metrics to report, once per job, at the first measurement that meets one"
    )
    tag: Tag | None = Field(None, description="of which of the owner's jobs; null: of all of them")

    @field_validator("states")
    @classmethod
    def _are_ends(cls, states: list[JobState]) -> list[JobState]:
        if not set(states) <= set(ENDS):
            raise ValueError(f"must be among {', '.join(ENDS)}")
        return states


class WebhookView(BaseModel):
    """A webhook, without its secret."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(examples=["webhook-41d7c0aa9be2"])
    owner: str = Field(examples=["ann"])
    url: str = Field(examples=["https://example.org/hooks/training"])
    states: list[JobState] = Field(examples=[["succeeded", "failed"]])
    thresholds: list[Threshold] = Field(examples=[[THRESHOLD]])
    tag: str | None = Field(examples=["nightly"])
    created_at: datetime = Field(examples=["2026-03-02T09:30:00Z"])


class MadeWebhook(WebhookView):
    """New webhook with its signing secret."""

    secret: str = Field(
        examples=["whsec_…"],
        description="for a library of Standard Webhooks, which checks the header `webhook-signature` by it",
    )


class WebhookList(BaseModel):
    """A page of webhooks, newest first."""

    webhooks: list[WebhookView]
    next_page_token: str | None


class DeliveryView(BaseModel):
    """Message and its result."""

    model_config = ConfigDict(from_attributes=True)

    id: str = Field(
        examples=["message-90b3aa71cd52"], description="the header `webhook-id`, the same in all attempts"
    )
    job_id: str = Field(examples=["job-3f9c2b7a10de"])
    about: str = Field(examples=["succeeded"], description="a state, or a threshold")
    created_at: datetime = Field(examples=["2026-03-02T09:30:00Z"])
    due_at: datetime = Field(examples=["2026-03-02T09:30:00Z"], description="of the next try")
    attempts: int = Field(examples=[1])
    ended_at: datetime | None = Field(
        examples=["2026-03-02T09:30:01Z"], description="when it was taken, or given up"
    )
    is_delivered: bool = Field(examples=[True])
    answer: str = Field(examples=["204"], description="to the last try")


class DeliveryList(BaseModel):
    """A page of messages, newest first."""

    deliveries: list[DeliveryView]
    next_page_token: str | None
