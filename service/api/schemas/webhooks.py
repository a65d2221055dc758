"""Schemas of webhooks."""

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, Field, HttpUrl, field_validator

from service.domain.jobs import JobState
from service.domain.submission import Tag
from service.domain.webhooks import Delivery, Threshold, Webhook
from trainer.jobspec import FrozenModel

ENDS = [state for state in JobState if state.is_terminal]


class MakeWebhook(FrozenModel):
    """Request for a new webhook."""

    url: Annotated[HttpUrl, Field(strict=False)] = Field(
        description="where messages are sent to, by POST: a public https:// address; answers 2xx once it has a message"
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

    id: str
    owner: str
    url: str
    states: list[JobState]
    thresholds: list[Threshold]
    tag: str | None
    created_at: datetime

    @classmethod
    def of(cls, webhook: Webhook) -> "WebhookView":
        """Show a webhook."""
        return cls.model_validate({name: getattr(webhook, name) for name in cls.model_fields})


class MadeWebhook(WebhookView):
    """New webhook with its signing secret."""

    secret: str = Field(
        description="for a library of Standard Webhooks, which checks the header `webhook-signature` by it"
    )


class WebhookList(BaseModel):
    """A page of webhooks, newest first."""

    webhooks: list[WebhookView]
    next_page_token: str | None


class DeliveryView(BaseModel):
    """Message and its result."""

    id: str = Field(description="the header `webhook-id`, the same in all tries")
    job_id: str
    about: str = Field(description="a state, or a threshold")
    created_at: datetime
    due_at: datetime = Field(description="of the next try")
    tries: int
    ended_at: datetime | None = Field(description="when it was taken, or given up")
    is_delivered: bool
    answer: str = Field(description="to the last try")

    @classmethod
    def of(cls, delivery: Delivery) -> "DeliveryView":
        """Show a message."""
        return cls(**{name: getattr(delivery, name) for name in cls.model_fields})


class DeliveryList(BaseModel):
    """A page of messages, newest first."""

    deliveries: list[DeliveryView]
    next_page_token: str | None
